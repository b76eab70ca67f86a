"""Flat storage: many arrays in one buffer, as views of it, so that a step is one call and copies nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, TypeAlias

from fastadam import libraries, trees
from fastadam.attached import Attached, Tensor
from fastadam.checks import count, require_flag
from fastadam.segments import Segment

Pattern: TypeAlias = str | re.Pattern[str] | Callable[[str], object]
"""What chooses arrays by their names."""


@dataclass(frozen=True)
class _Part:
    """An array in the buffer: its names (several if it was given several times), place, shape and source."""

    names: list[str]
    offset: int
    shape: tuple[int, ...]
    source: Any

    @property
    def size(self) -> int:
        return prod(self.shape)


class Flat:
    """Arrays in one flat buffer; :func:`flatten` makes it.

    Attributes
    ----------
    params : array, shape (n,)
        The buffer, of the library, the dtype and the device of the arrays; it starts at a multiple of 64
        bytes. Pass it to :meth:`fastadam.FusedAdam.step`.
    views : dict, list or tuple
        Views of it with the shapes of the arrays, nested as those were.
    by_name : dict
        The same views by their dotted names.
    names : tuple of str
        A name for each array in the buffer, in its order: keys, fields and places in sequences, with dots
        between them. An array that was given several times has its first one here.
    shapes : tuple of tuple of int
        Of the arrays in the buffer, in its order.
    sizes, offsets : tuple of int
        Elements of each of these, and where it starts.

    See Also
    --------
    flatten : Its example.
    """

    def __init__(self, tree: object, parts: list[_Part], library: libraries.Library, in_place: bool) -> None:
        self._parts, self._library, self._tree = parts, library, tree
        self.names = tuple(part.names[0] for part in parts)
        self.shapes = tuple(part.shape for part in parts)
        self.sizes = tuple(part.size for part in parts)
        self.offsets = tuple(part.offset for part in parts)
        self._size = parts[-1].offset + parts[-1].size
        self.params = library.aligned_zeros(self._size, parts[0].source)
        self._of_params = [self._view(self.params, part) for part in parts]
        for view, part in zip(self._of_params, parts, strict=True):
            library.fill(view, part.source)
        self.by_name, self.views = self._arranged(self._of_params)
        self._grads: Any = None
        self._of_grads: list[Any] = []
        self._attached: Attached | None = None
        if in_place:
            self._make_grads()
            buffers = zip(parts, self._of_params, self._of_grads, strict=True)
            tensors = [Tensor(f"arrays[{p.names[0]!r}]", p.source, view, grad) for p, view, grad in buffers]
            self._attached = Attached(tensors)
            self._attached.attach()
        self._parts = [_Part(part.names, part.offset, part.shape, None) for part in parts]

    @property
    def grads(self) -> Any:
        """The gradients, shape (n,): a buffer like ``params``, of zeros, made when it is asked for first.

        Raises
        ------
        ValueError
            With ``in_place=True``, if a tensor or its gradient is no view any more: see :meth:`attach`.
        """
        if self._attached is not None:
            self._attached.require()
        elif self._grads is None:
            self._make_grads()
        return self._grads

    @property
    def grad_views(self) -> Any:
        """Views of ``grads``, nested as ``views``."""
        _ = self.grads
        return self._arranged(self._of_grads)[1]

    def segments(self, pattern: Pattern, **hyperparameters: Any) -> tuple[Segment, ...]:
        """Return segments of all arrays whose name matches, with hyperparameters of their own.

        Parameters
        ----------
        pattern : str, compiled regular expression or callable
            A whole name with wildcards, as ``fnmatch`` has them (``"*.bias"``); what is searched for in a
            name; or a function of a name that says whether to take it.
        **hyperparameters
            Those of :class:`fastadam.Segment`.

        Returns
        -------
        tuple of Segment
            In the order of the buffer; arrays beside each other are in one.

        Raises
        ------
        TypeError
            If ``pattern`` is none, or a hyperparameter is not of its type.
        ValueError
            If no name matches, or a hyperparameter is out of its range.
        """
        matches = _matcher(pattern)
        matched = [any(map(matches, part.names)) for part in self._parts]
        if not any(matched):
            known = ", ".join(self.names[:8]) + ", ..." * (len(self.names) > 8)
            raise ValueError(f"pattern must match a name; got {pattern!r}. The names: {known}.")
        runs: list[list[int]] = []
        open_run = False
        for part, is_matched in zip(self._parts, matched, strict=True):
            if not part.size:
                continue
            stop = part.offset + part.size
            if is_matched and open_run:
                runs[-1][1] = stop
            elif is_matched:
                runs.append([part.offset, stop])
            open_run = is_matched
        return tuple(Segment(start, stop, **hyperparameters) for start, stop in runs)

    def attach(self) -> None:
        """Make the tensors views of ``params`` again, and their gradients views of ``grads``.

        Only with ``in_place=True``, which has done it once. Values are those of the tensors: what lies
        elsewhere is copied in, and a gradient of None is zeros. Needed after what puts other memory in
        their place: ``zero_grad(set_to_none=True)``, ``module.to(...)``,
        ``load_state_dict(..., assign=True)``.

        Raises
        ------
        ValueError
            Without ``in_place=True``, or if a tensor has another shape, dtype or device now.
        """
        if self._attached is None:
            raise ValueError("attach must follow flatten with in_place=True; got in_place=False.")
        self._attached.attach()

    def _make_grads(self) -> None:
        self._grads = self._library.aligned_zeros(self._size, self.params)
        self._of_grads = [self._view(self._grads, part) for part in self._parts]

    def _view(self, flat: Any, part: _Part) -> Any:
        return flat[part.offset : part.offset + part.size].reshape(part.shape)

    def _arranged(self, views: list[Any]) -> tuple[dict[str, Any], Any]:
        by_name = {name: view for part, view in zip(self._parts, views, strict=True) for name in part.names}
        order = [name for name, _ in trees.leaves(self._tree)]
        in_order = {name: by_name[name] for name in order}
        return in_order, trees.rebuild(self._tree, iter(in_order.values()))

    def __reduce__(self) -> Any:
        raise TypeError("flat must not be copied or pickled; got such a call. Flatten a copy of its views.")

    def __repr__(self) -> str:
        kind, place = self._library.dtype(self.params), self._library.place(self.params)
        return f"Flat({kind}[{self._size}] of {self._library.name} in {place}, {len(self.names)} arrays)"


def flatten(arrays: Any, *, align: int = 1, in_place: bool = False) -> Flat:
    """Copy arrays into one flat buffer, once, and return it with views of their shapes.

    Parameters
    ----------
    arrays : dict, list, tuple or torch.nn.Module
        Arrays of NumPy or CuPy, or tensors of PyTorch, in containers nested as you like, NamedTuples too: all
        of one library, dtype (float32, float64, float16, bfloat16) and device. They are read only, and may be
        read-only, not contiguous, empty, and 0-d. An array that is given twice is stored once. Of a module,
        those parameters that require a gradient, by name.
    align : int, default 1
        Each array starts at a multiple of so many elements, with zeros between them, which stay zeros; 1 puts
        one array directly behind the other.
    in_place : bool, default False
        Make the given tensors views of the buffer themselves, and their ``grad`` views of ``grads``, so that
        ``backward`` accumulates there. Of PyTorch only.

    Returns
    -------
    Flat

    Raises
    ------
    TypeError
        If something in ``arrays`` is no such array, or differs from the first in library, dtype or device.
    ValueError
        If there is no array, two have the same name, or ``in_place`` cannot be.

    Examples
    --------
    >>> import numpy as np
    >>> import fastadam
    >>> layers = {"hidden": {"weight": np.ones((2, 3)), "bias": np.zeros(3)}, "scale": np.ones(())}
    >>> flat = fastadam.flatten(layers)
    >>> flat.names
    ('hidden.weight', 'hidden.bias', 'scale')
    >>> flat.views["hidden"]["weight"].shape
    (2, 3)
    >>> flat.grad_views["hidden"]["bias"][:] = 1.0
    >>> opt = fastadam.FusedAdam(weight_decay=0.1, segments=flat.segments("*.bias", weight_decay=0.0))
    >>> opt.step(flat.params, flat.grads)
    >>> flat.views["hidden"]["bias"].round(4).tolist()
    [-0.001, -0.001, -0.001]
    """
    align, in_place = count("align", align), require_flag("in_place", in_place)
    if libraries.is_module(arrays):
        named = arrays.named_parameters(remove_duplicate=False)
        arrays = {name: parameter for name, parameter in named if parameter.requires_grad}
    found = list(trees.leaves(arrays))
    if found and not found[0][0]:
        raise TypeError(f"arrays must be a dict, a list or a tuple of arrays; got {type(arrays).__name__}.")
    if not found:
        raise ValueError("arrays must hold an array; got none.")

    parts: dict[Any, _Part] = {}
    taken: set[str] = set()
    first = libraries.of(found[0][1], f"arrays[{found[0][0]!r}]")
    end = 0
    for name, array in found:
        label = f"arrays[{name!r}]"
        _require_alike(label, array, first, found[0])
        if name in taken:
            raise ValueError(f"arrays must have different dotted names; got {name!r} twice.")
        taken.add(name)
        if in_place:
            _require_in_place(label, array, first)
        shape = tuple(map(int, array.shape))
        key = first.key(array) if prod(shape) and not in_place else id(array)
        if key in parts:
            parts[key].names.append(name)
            continue
        parts[key] = part = _Part([name], -(-end // align) * align, shape, array)
        end = part.offset + part.size
    return Flat(arrays, list(parts.values()), first, in_place)


def _require_alike(label: str, array: Any, first: libraries.Library, other: tuple[str, Any]) -> None:
    library = libraries.of(array, label)
    there = f"of arrays[{other[0]!r}]"
    if library is not first:
        raise TypeError(f"{label} must be of the library {there} ({first.name}); got {library.name}.")
    for what, of in (("dtype", first.dtype), ("device", first.place)):
        wanted, got = of(other[1]), of(array)
        if wanted != got:
            raise TypeError(
                f"{label} must have the {what} {there} ({wanted}); got {got}. Flatten each {what} on its own."
            )


def _require_in_place(label: str, array: Any, library: libraries.Library) -> None:
    if library is not libraries.TORCH:
        raise ValueError(f"in_place must be False for arrays of {library.name}; got True. Use flat.views.")
    if not array.is_leaf:
        raise ValueError(f"{label} must be a leaf of the graph for in_place; got a result of other tensors.")


def _matcher(pattern: Any) -> Callable[[str], object]:
    if isinstance(pattern, str):
        return lambda name: fnmatchcase(name, pattern)
    if isinstance(pattern, re.Pattern):
        search: Callable[[str], object] = pattern.search
        return search
    if callable(pattern):
        chosen: Callable[[str], object] = pattern
        return chosen
    raise TypeError(
        "pattern must be a string, a compiled regular expression or a function of a name; got"
        f" {type(pattern).__name__}."
    )

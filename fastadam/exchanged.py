"""What every exchange of state needs: many arrays <-> one buffer of moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from fastadam import formats
from fastadam.adam import FusedAdam
from fastadam.buffers import Array
from fastadam.flat import Flat
from fastadam.segments import Segments

_MASTERS = ("master_params", "param_master", "param_remainder")


class Layout:
    """Where arrays lie in the buffer.

    Parameters
    ----------
    labels : sequence of str
        What errors call the arrays, in the order of the buffer.
    sizes : sequence of int
        Elements of each.
    flat : Flat, optional
        Whose buffer it is; without it each array lies directly behind the other.

    Raises
    ------
    TypeError
        If ``flat`` is none.
    ValueError
        If the arrays are not those of ``flat``.
    """

    def __init__(self, labels: Sequence[str], sizes: Sequence[int], flat: Flat | None) -> None:
        self.labels, self.sizes = labels, sizes
        self.offsets: Sequence[int] = list(accumulate(sizes, initial=0))[:-1]
        self.size = sum(sizes)
        if flat is None:
            return
        if not isinstance(flat, Flat):
            raise TypeError(f"flat must be what fastadam.flatten returns; got {type(flat).__name__}.")
        if len(sizes) != len(flat.sizes):
            raise ValueError(
                f"flat must have {len(sizes)} arrays, one for each parameter; got {len(flat.sizes)}."
            )
        for label, size, wanted, name in zip(labels, sizes, flat.sizes, flat.names, strict=True):
            if size != wanted:
                raise ValueError(f"{label} must have {wanted} elements, those of {name!r}; got {size}.")
        self.offsets, self.size = flat.offsets, int(flat.params.shape[0])

    def join(self, arrays: Sequence[Any]) -> Array:
        """Return arrays as one buffer, of float64 or float32.

        Raises
        ------
        TypeError
            If one is of another dtype than the first.
        """
        hosts = [host(array, label) for array, label in zip(arrays, self.labels, strict=True)]
        for one, label, size in zip(hosts, self.labels, self.sizes, strict=True):
            if one.dtype != hosts[0].dtype:
                raise TypeError(f"{label} must be {hosts[0].dtype}, as the first is; got {one.dtype}.")
            if one.size != size:
                raise ValueError(
                    f"{label} must have {size} elements, as its first moment has; got {one.size}."
                )
        joined = np.zeros(self.size, hosts[0].dtype if hosts else np.float32)
        for one, offset in zip(hosts, self.offsets, strict=True):
            joined[offset : offset + one.size] = one.reshape(-1)
        return joined

    def split(self, joined: Array) -> list[Array]:
        """Return copies of the parts of a buffer."""
        return [
            joined[offset : offset + size].copy()
            for offset, size in zip(self.offsets, self.sizes, strict=True)
        ]


def host(array: Any, label: str) -> Array:
    """Return an array of any library in CPU memory, 16-bit numbers as float32.

    Raises
    ------
    TypeError
        If it is no array of floating-point numbers.
    """
    if hasattr(array, "detach"):  # PyTorch: bfloat16 has no NumPy
        array = array.detach().cpu()
        array = (array.float() if array.dtype.itemsize == 2 else array).numpy()
    elif hasattr(array, "get"):  # CuPy
        array = array.get()
    elif not isinstance(array, np.ndarray) and hasattr(array, "numpy"):  # a variable of Keras
        array = array.numpy()
    found: Array = np.asarray(array)
    if found.dtype == np.float16 or formats.is_bfloat16(found.dtype):
        found = found.astype(np.float32)
    if found.dtype not in formats.FLOATS:
        raise TypeError(f"{label} must be an array of floating-point numbers; got {found.dtype}.")
    return found


def load(opt: FusedAdam, step: int, moments: Mapping[str, Array], **hyperparameters: Any) -> None:
    """Put a step counter, moments and hyperparameters into an optimizer, or raise and change nothing.

    What is not given stays, but for an average of the parameters, which nobody has.
    """
    if opt.ema_decay is not None:
        raise ValueError(f"opt must have ema_decay=None, for no average is taken over; got {opt.ema_decay}.")
    own = opt._hyperparameters.to_dict()
    if opt.segments:
        own["segments"] = Segments(opt.segments).to_array(max(step, 1))
    plainly = {"state_dtype": "float32", "master_params": None}  # what is given, not what is kept
    opt.load_state_dict({**own, **hyperparameters, **plainly, "step": step, **moments})


def unload(opt: FusedAdam) -> dict[str, Any]:
    """Return the state dict of an optimizer, with moments as numbers of float32 or float64.

    Raises
    ------
    TypeError, ValueError
        If it is no optimizer, or has not taken a step.
    """
    require_optimizer(opt)
    entries = {name: value for name, value in opt.state_dict().items() if name not in _MASTERS}
    if "exp_avg" not in entries:
        raise ValueError("opt must have taken a step; got no moments.")
    plain = FusedAdam()
    plain.load_state_dict(entries)
    return plain.state_dict()


def require_optimizer(opt: object) -> None:
    """Raise TypeError unless it is a FusedAdam."""
    if not isinstance(opt, FusedAdam):
        raise TypeError(f"opt must be a FusedAdam; got {type(opt).__name__}.")


def require_size(what: str, layout: Layout, entries: Mapping[str, Any]) -> None:
    """Raise ValueError unless arrays have as many elements as the moments."""
    size = entries["exp_avg"].size
    if layout.size != size:
        raise ValueError(f"{what} must have {size} elements, as many as the moments; got {layout.size}.")


def require_one_step(steps: Mapping[str, Any]) -> int:
    """Return the number of steps that all have taken, by label; raise ValueError if there are several."""
    labels = list(steps)
    for label in labels:
        if int(steps[label]) != int(steps[labels[0]]):
            raise ValueError(
                f"{label} must be {int(steps[labels[0]])}, as {labels[0]} is; got {int(steps[label])}."
                " One step counter is for the whole buffer."
            )
    return int(steps[labels[0]])


def require_no_amsgrad(opt: FusedAdam, whose: str) -> None:
    """Raise ValueError if an optimizer keeps a maximum that another library has not."""
    if opt.amsgrad:
        raise ValueError(f"opt must have amsgrad=False for the state of {whose}; got True.")

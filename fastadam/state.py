"""What an optimizer remembers between steps: moments, average and masters of the parameters, step counter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, cast

import numpy as np

from fastadam import buffers, eight_bit, formats, loading
from fastadam.buffers import Buffer
from fastadam.checks import count
from fastadam.kernels.cuda import Cuda, DeviceBuffer
from fastadam.kernels.cuda_clock import Clock
from fastadam.kernels.grids import PACK
from fastadam.precision import IN_BLOCKS

_CACHE_LINE = 64
_STAGGER = 64 * 1024 + _CACHE_LINE
"""Bytes before and between large moments. Buffers of a power of two would share cache sets and memory banks:
without the gap a step of 2**26 float32 elements can take twice as long (CONTRIBUTING.md)."""
_SWAPPED = 2**16
"""Elements that are exchanged at a time: they stay in the cache."""
MASTERS = {"float32": "param_master", "split": "param_remainder"}
"""What a master of the parameters is called in the state."""
_MASTER_DTYPES = {"param_master": np.float32, "param_remainder": np.int16}
_IN_BLOCKS = (eight_bit.SIGNED, eight_bit.UNSIGNED)
_LARGE = 2**24
"""Bytes of a moment from which the gap helps: the moments do not fit a cache. In the cache it costs 10 %."""


class State:
    """The moments and the step counter of one optimizer.

    The meanings are PyTorch's: the moments are not debiased, ``step`` counts the steps taken. The attributes
    cannot be set; the moments are flat views of the optimizer's own memory, with the size of the parameters
    and the dtype of the arithmetic or that of ``state_dtype``, and writing to them changes the state; to see
    bfloat16 needs ml_dtypes, and moments in 8 bits are read-only copies in float32. On a GPU they are arrays
    of the backend's library (CuPy or Numba), and what writes to them must be in stream order with the steps;
    on a GPU those in 8 bits are such copies in CPU memory, too, and to ask for one waits for the device.

    Parameters
    ----------
    names : tuple of str
        The moments, in the order of the rule's ``state``, and behind them a master of the parameters.
    size : int
        Elements of each.
    dtype : dtype
        Of the arithmetic.
    step : int
        Steps taken.
    stored : tuple of dtype, optional
        Of each in memory, where it is not that of the arithmetic.
    """

    # _arrays and _block are for the optimizer. Nobody else gets them: a kernel trusts their size and dtype.
    __slots__ = (
        *(
            "_arrays",
            "_block",
            "_clock",
            "_kernels",
            "_layout",
            "_master",
            "_names",
            "_scales",
            "_step",
            "_views",
        ),
    )

    def __init__(
        self,
        names: tuple[str, ...] = (),
        size: int = 0,
        dtype: Any = np.float32,
        step: int = 0,
        stored: tuple[np.dtype[Any], ...] | None = None,
    ) -> None:
        # One block for all moments: one allocation, one overlap check. Fresh pages are zero, untouched.
        stored = stored or (np.dtype(dtype),) * len(names)
        # Scales behind them, one for each block of a moment in 8 bits.
        in_blocks = [kind in _IN_BLOCKS for kind in stored]
        counts = [eight_bit.blocks_of(size) if has_scales else 0 for has_scales in in_blocks]
        lengths = [*(size * kind.itemsize for kind in stored), *(4 * count for count in counts)]
        kinds = (*stored, *(formats.FLOAT32,) * len(counts))
        gap = _STAGGER if max(lengths, default=0) >= _LARGE else 0
        strides = [-(-length // _CACHE_LINE) * _CACHE_LINE + gap if length else 0 for length in lengths]
        memory = np.zeros(gap + sum(strides) + _CACHE_LINE, np.uint8)
        start = -memory.ctypes.data % _CACHE_LINE + gap
        starts = accumulate(strides, initial=start)
        self._names = names
        self._block: Buffer = memory
        self._views: tuple[Any, ...] = tuple(
            memory[offset : offset + length].view(kind)
            for offset, length, kind in zip(starts, lengths, kinds, strict=False)
        )
        self._views, scales = self._views[: len(names)], self._views[len(names) :]
        has_master = bool(names) and names[-1] in MASTERS.values()
        self._master: Any = self._views[-1] if has_master else None
        self._arrays: tuple[Buffer, ...] = (
            self._views[:-1] if has_master else self._views
        )  # a kernel's states
        # Of each of them, an empty one where it has none; nothing where no moment is in blocks.
        self._scales: tuple[Any, ...] = scales[: len(self._arrays)] if any(in_blocks) else ()
        # Of the size and the dtype of the arithmetic, in no memory to speak of.
        self._layout: Buffer = np.broadcast_to(np.zeros((), dtype), size)
        self._step = step
        self._kernels: Cuda | None = None  # where the moments lie in GPU memory
        self._clock: Clock | None = None  # where the step counter does, too

    @classmethod
    def on_device(
        cls,
        kernels: Cuda,
        like: DeviceBuffer,
        names: tuple[str, ...],
        stored: tuple[str, ...],
        master: str | None,
        host: State,
        start: Mapping[str, float] | None = None,
    ) -> State:
        """Return a state in GPU memory, made in the order of ``like.stream``.

        Parameters
        ----------
        kernels : Cuda
        like : DeviceBuffer
            The parameters: the states get their size and device, and their place in packs, so that a step can
            access all of them in packs. An average and a master begin with them.
        names, stored : tuple of str
            The states, and the format of each.
        master : str or None
            The name of the master.
        host : State
            What it starts from: a state in CPU memory with these moments, or with none.
        start : mapping of str to float, optional
            What moments begin with that do not begin with 0.
        """
        stream, math = like.stream or 0, formats.math_of(like.dtype)
        if start and not host._views:
            moments = tuple(name for name in names if name != "param_ema")
            host = cls(
                moments, like.size, math, host._step, kept(moments, stored[: len(moments)], None, math)[1]
            )
            host._fill(start)
        names, dtypes = kept(names, stored, master, math)
        place = like.pointer // like.dtype.itemsize % (PACK // math.itemsize)
        lengths = [like.size * dtype.itemsize for dtype in dtypes]
        # Behind them scales, of each state some or none; at places of their own.
        n_arrays = len(names) - (master is not None)
        counts = [eight_bit.blocks_of(like.size) if dtype in _IN_BLOCKS else 0 for dtype in dtypes[:n_arrays]]
        places = [*(place * dtype.itemsize for dtype in dtypes), *(0 for _ in counts)]
        ends = [at + n for at, n in zip(places, [*lengths, *(4 * n for n in counts)], strict=True)]
        strides = [-(-end // _CACHE_LINE) * _CACHE_LINE for end in ends]
        starts = [start + at for start, at in zip(accumulate(strides, initial=0), places, strict=False)]
        starts, of_scales = starts[: len(dtypes)], starts[len(dtypes) :]
        total = sum(strides) + _CACHE_LINE
        if host._views:
            image = np.zeros(total, np.uint8)
            pairs = [*zip(starts, host._views, strict=False), *zip(of_scales, host._scales, strict=False)]
            for at, moment in pairs:
                image[at : at + moment.nbytes] = moment.view(np.uint8)
            memory = kernels.to_device(image, like.device, stream)
        else:
            memory = kernels.zeros(total, like.device, stream)

        def buffer(start: int, size: int, dtype: Any, owner: Any = memory) -> DeviceBuffer:
            address = kernels.address(memory) + start
            return DeviceBuffer(address, size, np.dtype(dtype), like.device, stream, owner)

        state = cls(step=host._step)
        state._names, state._kernels = names, kernels
        state._block = buffer(0, total, np.uint8)
        arrays = [buffer(start, like.size, dtype) for start, dtype in zip(starts, dtypes, strict=True)]
        for name, array in list(zip(names, arrays, strict=True))[len(host._views) :]:
            if name in {"param_ema", MASTERS["float32"]}:
                _start_from(kernels, array, like)
        state._views = tuple(
            memory[start : start + length].view(dtype)
            for start, length, dtype in zip(starts, lengths, dtypes, strict=True)
        )
        state._master = None if master is None else arrays.pop()
        state._arrays = tuple(arrays)
        state._layout = buffer(0, like.size, math)
        if not set(_IN_BLOCKS).isdisjoint(dtypes):
            state._scales = tuple(
                buffer(start, count, np.float32, memory[start : start + 4 * count].view(np.float32))
                for start, count in zip(of_scales, counts, strict=True)
            )
        return state

    @classmethod
    def of_params(
        cls,
        params: buffers.Array,
        names: tuple[str, ...],
        stored: tuple[str, ...],
        master: str | None,
        host: State,
        start: Mapping[str, float] | None = None,
    ) -> State:
        """Return a state in CPU memory for parameters of which there is none, or one without the master.

        Parameters
        ----------
        params : ndarray
            With which an average and a master begin.
        names, stored : tuple of str
            The states, and the format of each.
        master : str or None
            The name of the master.
        host : State
            What it starts from: a state with these moments, or with none.
        start : mapping of str to float, optional
            What moments begin with that do not begin with 0.
        """
        math = formats.math_of(params.dtype)
        names, dtypes = kept(names, stored, master, math)
        state = cls(names, params.size, math, host._step, dtypes)
        for mine, theirs in zip(state._views, host._views, strict=False):
            mine[:] = theirs
        for mine, theirs in zip(state._scales, host._scales, strict=False):
            mine[:] = theirs
        if not host._views:
            state._fill(start or {})
        if not host._views and state.param_ema is not None:
            state._arrays[-1][:] = formats.decoded(params)  # type: ignore[index]
        if master == MASTERS["float32"]:
            state._master[:] = formats.decoded(params)
        return state

    def _fill(self, start: Mapping[str, float]) -> None:
        for name, value in start.items():
            k = self._names.index(name)
            with np.errstate(over="ignore"):  # what does not fit is refused before a step is taken
                number = np.array([value], self._layout.dtype)
            self._views[k][...], scales = loading.converted(number, None, self._views[k].dtype)
            if scales is not None:
                self._scales[k][...] = scales

    @classmethod
    def from_dict(
        cls,
        entries: Mapping[str, Any],
        names: tuple[str, ...],
        current: State,
        *,
        said: tuple[str, ...] | None = None,
        wanted: tuple[str, ...] | None = None,
    ) -> State:
        """Return the state that ``to_dict`` gave, in CPU memory and arrays of its own.

        Parameters
        ----------
        entries : mapping
            ``"step"`` and, once a step was taken, the moments; and a master of the parameters or none.
        names : tuple of str
            The moments that the rule keeps.
        current : State
            The state to be replaced; where it has moments, the new ones must be of their size and dtype.
        said, wanted : tuple of str, optional
            The format of each moment in the entries, and in the state: "float32" is that of the arithmetic.

        Raises
        ------
        TypeError, ValueError
            If a key is missing or unknown, the step is no count, or a moment has another size or dtype.
        """
        require_keys(entries, ["step"])
        step = count("state_dict['step']", plain(entries["step"]), least=0)
        masters = tuple(name for name in _MASTER_DTYPES if name in entries)
        said, wanted = (kinds or ("float32",) * len(names) for kinds in (said, wanted))
        scales = tuple(
            name + loading.SCALES for name, kind in zip(names, said, strict=True) if kind in IN_BLOCKS
        )
        unknown = [key for key in entries if key not in {"step", *names, *masters, *scales}]
        if unknown:
            raise ValueError(f"state_dict must have no key {unknown[0]!r}.")
        if step == 0 and len(entries) == 1:
            return cls()
        require_keys(entries, (*names, *scales))
        if not (names or masters):
            return cls(step=step)

        names, said, wanted = (*names, *masters), (*said, *masters), (*wanted, *masters)
        labels = [f"state_dict['{name}']" for name in names]
        moments = [loading.array(entries[n], f, kind) for n, f, kind in zip(names, labels, said, strict=True)]
        math = formats.math_of(moments[0].dtype)
        model = current._layout if current._names else np.broadcast_to(np.zeros((), math), moments[0].size)
        model_label = "the state" if current._names else labels[0]
        for moment, label, kind in zip(moments, labels, said, strict=True):
            buffers.require_in_cpu_memory(label, moment)
            if kind in MASTERS.values() and math != formats.FLOAT32:
                raise TypeError(f"{label} must come with moments of float32; got {math}.")
            buffers.require_same_size(label, moment, model_label, model)
        dtypes = tuple(loading.dtype_of(kind, math) for kind in wanted)

        state = cls(names, moments[0].size, math, step, dtypes)
        for k, (name, kind, moment) in enumerate(zip(names, said, moments, strict=True)):
            codes, given_scales = moment, None
            if kind in IN_BLOCKS:
                dtype = loading.dtype_of(kind, math)
                given_scales = loading.scales(entries, name, moment, dtype)
                codes = cast("buffers.Array", moment).view(dtype)
            state._views[k][...], of_blocks = loading.converted(codes, given_scales, dtypes[k])
            if of_blocks is not None:
                state._scales[k][...] = of_blocks
        return state

    def to_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """Return ``step`` and the moments in CPU memory, as copies or views; waits for the device."""
        copies = list(map(self._copy if copy else _itself, self._views))
        as_codes = {"bfloat16": np.uint16, **dict.fromkeys(IN_BLOCKS, np.uint8)}
        copies = [
            copy.view(as_codes.get(self._kind_of(name), copy.dtype))
            for name, copy in zip(self._names, copies, strict=True)
        ]
        names = [name + loading.SCALES for name in self._names]
        scales = {
            name: self._copy_of_scales(of_state) if copy else of_state
            for name, of_state in zip(names, self._scales, strict=False)
            if of_state.size
        }
        return {"step": self.step, **dict(zip(self._names, copies, strict=True)), **scales}

    def _copy(self, view: Any) -> buffers.Array:
        """Return a copy of a view in CPU memory; waits for the device."""
        kernels = self._kernels
        if kernels is None:
            return view.copy()  # type: ignore[no-any-return]
        return kernels.to_host(view, cast("DeviceBuffer", self._block).device)

    def _copy_of_scales(self, scales: Any) -> buffers.Array:
        return self._copy(scales.owner if isinstance(scales, DeviceBuffer) else scales)

    def _kind_of(self, name: str) -> str:
        """Return the format of a state; of what is not coded "float32"."""
        if name in _MASTER_DTYPES:
            return "float32"
        return formats.kind_of(self._views[self._names.index(name)].dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        names = tuple(name for name in self._names if name not in _MASTER_DTYPES)
        return _restore, (names, tuple(map(self._kind_of, names)), self.to_dict())

    @property
    def step(self) -> int:
        """Steps taken; where a GPU counts them, it is read from there, and waits for the device."""
        return self._step if self._clock is None else self._clock.step()

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Views of the moments in the order of the rule's ``state``; empty before the first step."""
        return tuple(map(self._view, self._names))

    @property
    def moments(self) -> dict[str, Any]:
        """A new dict of name -> view of the moment; empty before the first step."""
        return dict(zip(self._names, self.arrays, strict=True))

    def _view(self, name: str) -> Any:
        if name not in self._names:
            return None
        k = self._names.index(name)
        view, kind = self._views[k], self._kind_of(name)
        if kind in IN_BLOCKS:
            codes, scales = (
                (view, self._scales[k])
                if self._kernels is None
                else (self._copy(view), self._copy_of_scales(self._scales[k]))
            )
            numbers = eight_bit.decode(codes, scales)
            numbers.flags.writeable = False  # to write to them would change nothing
            return numbers
        return formats.shown(view) if kind == "bfloat16" else view[:]

    def leave_clock(self) -> None:
        """Count on the host again; waits for the device."""
        self._step, self._clock = self.step, None

    def swap_last(self, params: Buffer) -> None:
        """Exchange the last array, the average of the parameters, with ``params``."""
        last, kernels = self._arrays[-1], self._kernels
        if kernels is not None:
            kernels.swap(cast("DeviceBuffer", params), cast("DeviceBuffer", last))
            return
        from fastadam.kernels import threads  # loads Numba

        # In another thread, which no signal handler interrupts: half of an exchange would lose parameters.
        threads.run_in_pool([partial(_exchange, cast("buffers.Array", last), cast("buffers.Array", params))])

    @property
    def param_ema(self) -> Any:
        """Average of the parameters, shape (n,), or None without ``ema_decay`` or before the first step."""
        return self._view("param_ema")

    @property
    def exp_avg(self) -> Any:
        """Moving average of the gradient, shape (n,), or None before the first step."""
        return self._view("exp_avg")

    @property
    def exp_avg_sq(self) -> Any:
        """Moving average of the squared gradient, shape (n,), or None before the first step."""
        return self._view("exp_avg_sq")

    @property
    def max_exp_avg_sq(self) -> Any:
        """Maximum of ``exp_avg_sq`` so far, shape (n,), or None without AMSGrad or before the first step."""
        return self._view("max_exp_avg_sq")

    def __getattr__(self, name: str) -> Any:
        """Return a state by its name; None before the first step.

        ``exp_inf``, ``momentum_buffer``, ``square_avg``, ``grad_avg``, ``acc_delta``, ``sum`` or what another
        rule keeps: each has shape (n,).
        """
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._names:
            return self._view(name)
        if not self._names:
            return None
        raise AttributeError(f"state must have {name!r}; got {list(self._names)}.")

    @property
    def param_master(self) -> Any:
        """The parameters in float32, shape (n,), or None without ``master_params="float32"``."""
        return self._view("param_master")

    @property
    def param_remainder(self) -> Any:
        """What is missing to the parameters in float32, int16, or None without ``master_params="split"``."""
        return self._view("param_remainder")

    def __repr__(self) -> str:
        arrays = ", ".join(
            f"{name}={formats.name_of(view.dtype) if name not in _MASTER_DTYPES else view.dtype}[{view.size}]"
            for name, view in zip(self._names, self._views, strict=True)
        )
        # Reading the step counter of a clock would wait for the device.
        step = self._step if self._clock is None else "<in GPU memory>"
        return f"State(step={step}{', ' if arrays else ''}{arrays})"


def require_keys(state_dict: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise ValueError unless a state dict has all of ``keys``."""
    for key in keys:
        if key not in state_dict:
            raise ValueError(f"state_dict must have the key {key!r}; got {list(state_dict)}.")


def plain(number: Any) -> Any:
    """Undo what ``numpy.savez`` does to numbers: a 0-d array is a scalar, a 1-d array a list."""
    return number.tolist() if isinstance(number, (np.ndarray, np.generic)) else number


def kept(
    names: tuple[str, ...], stored: tuple[str, ...], master: str | None, math: np.dtype[Any]
) -> tuple[tuple[str, ...], tuple[np.dtype[Any], ...]]:
    """Return the names of states and of a master, and how each is stored."""
    dtypes = tuple(formats.stored_as(kind, math) for kind in stored)
    if master is None:
        return names, dtypes
    return (*names, master), (*dtypes, np.dtype(_MASTER_DTYPES[master]))


def _itself(view: Any) -> Any:
    return view


def _start_from(kernels: Cuda, array: DeviceBuffer, params: DeviceBuffer) -> None:
    """Queue that what is kept of parameters begins with them."""
    if array.dtype == params.dtype:
        nbytes = params.size * params.dtype.itemsize
        kernels.copy(array.pointer, params.pointer, nbytes, params.device, params.stream or 0)
    else:
        kernels.widen(array, params)


def _exchange(one: buffers.Array, other: buffers.Array) -> None:
    """Exchange the contents of two arrays, block by block."""
    block = np.empty(min(_SWAPPED, one.size), one.dtype)
    for start in range(0, one.size, _SWAPPED):
        part = slice(start, start + _SWAPPED)
        held = block[: one[part].size]
        held[:] = one[part]
        one[part] = other[part]
        other[part] = held


def _restore(names: tuple[str, ...], stored: tuple[str, ...], entries: dict[str, Any]) -> State:
    """Undo ``State.__reduce__``: the moments share one block again."""
    return State.from_dict(entries, names, State(), said=stored, wanted=stored)

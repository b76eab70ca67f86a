"""The Numba-CUDA backend: kernels in Python (:mod:`fastadam.kernels.cuda_loop`), compiled at run time.

Numba compiles to link-time code, and NVIDIA's linker makes the machine code: it is the one that can be told
not to fuse multiply-adds, which Numba's own launches cannot. The CUDA driver launches.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

import llvmlite
import numba
import numpy as np
from cuda import pathfinder
from cuda.bindings import driver, nvjitlink
from numba import cuda, types

from . import (
    cubins,
    cuda_blocks_loop,
    cuda_blocks_observed,
    cuda_decide,
    cuda_loop,
    cuda_stored_loop,
    cuda_units_decide,
    cuda_units_loop,
)
from .compiling import digest
from .cuda import (
    CLOCK_ENTRIES,
    LEGACY_STREAM,
    STEP_ACROSS,
    UNIT_ENTRIES,
    UNIT_STEPS,
    Array,
    Cuda,
    Event,
    Kernel,
    KernelTypes,
)
from .device_storage import StoredTypes

_LINK_OPTIONS = ("-lto", "-fma=0", "-ftz=0", "-prec-div=1", "-prec-sqrt=1")

_MOST_REGISTERS = {("step_units_observed", "float32"): 128}
"""Of a kernel and dtype that take up to 136 if they are not told, of which one block fits a multiprocessor,
not two. In float64 it would spill."""

_MOST_REGISTERS_IN_BLOCKS = 128
"""Of steps of moments in blocks: those over units of AMSGrad with all else take 130 (sm_90)."""

_C_TYPES: dict[type, Any] = {
    int: ctypes.c_int64,
    float: ctypes.c_double,
    np.float32: ctypes.c_float,
    np.float64: ctypes.c_double,
}


_INTEGER, _DOUBLE = types.int64, types.float64
_INTEGERS, _DOUBLES = types.CPointer(_INTEGER), types.CPointer(_DOUBLE)
_SCALE = (_DOUBLE, types.CPointer(types.float32), _DOUBLES, _INTEGER)
_LRS = (_DOUBLES, _INTEGER, _INTEGER)
_COLUMNS = (_INTEGERS, _INTEGER, _DOUBLES)


def _signature(entry: str, kinds: KernelTypes) -> tuple[Any, ...]:
    number = types.float32 if kinds.dtype == np.float32 else types.float64
    pointer = types.CPointer(number)
    grads = _pointer_to(kinds.grads)
    form = (*_SCALE, _INTEGERS, *_LRS, _DOUBLE, *_COLUMNS, pointer, *[_INTEGER] * 3, _INTEGERS, _DOUBLES)
    row = (pointer, _INTEGER, _INTEGER, _INTEGERS, _DOUBLES)
    without_rule = {
        "set_lr": (_DOUBLES, _DOUBLE),
        "accumulate": (pointer, grads, _INTEGER, _INTEGER),
        "widen": (pointer, grads, _INTEGER),
        "form_keys": (_INTEGERS, _INTEGERS, _INTEGER, _INTEGER),
        "measure": (grads, _INTEGER, _DOUBLES),
        "form_coefficients": form,
        "decide": (_DOUBLES, _INTEGER, _INTEGER, _DOUBLE, _INTEGER, *form),
        "measure_units": (grads, _INTEGERS, _INTEGER, _DOUBLES),
        "sum_groups": (_DOUBLES, _INTEGERS, _INTEGER, _DOUBLES, _INTEGER, _INTEGER),
        "form_rows": (*row, *_COLUMNS, _INTEGER, _INTEGERS, *_LRS),
        "conclude": (_DOUBLES, _INTEGER, _INTEGER, _INTEGERS, _DOUBLES),
        "clear_units": (grads, _INTEGERS, _INTEGER),
    }
    if entry in without_rule:
        return without_rule[entry]
    buffers: tuple[Any, ...] = (pointer, pointer, types.UniTuple(pointer, kinds.n_states))
    if kinds.stored is not None:
        buffers = _stored_buffers(entry, kinds.stored)
    decided = (pointer, _INTEGERS, _INTEGERS)
    sums = (_DOUBLES, _INTEGER) if entry == "step_units_observed" else ()
    if entry in (*UNIT_STEPS, STEP_ACROSS) and kinds.stored is not None and kinds.stored.in_blocks:
        layout: tuple[Any, ...] = (_INTEGER,) * 3
        if entry != "step_units":
            layout = (pointer, _INTEGER, _INTEGER, *((_INTEGERS, _INTEGER) if sums else ()))
        tables = (types.CPointer(types.int32), _INTEGERS, _INTEGERS, *layout, pointer)
        return (*buffers, *tables, *decided, *sums)
    if entry in UNIT_STEPS:
        tables = (_INTEGERS, _INTEGERS, _INTEGER, pointer)
        return (*buffers, *tables, *decided, *sums)
    layout = (_INTEGER,) * 3
    if entry == "step_captured":
        return (*buffers, *layout, *decided)
    return (*buffers, *layout, types.UniTuple(number, len(kinds.coefficients)))


def _pointer_to(dtype: np.dtype[Any]) -> Any:
    return types.CPointer(numba.from_dtype(dtype))


def _stored_buffers(entry: str, stored: StoredTypes) -> tuple[Any, ...]:
    """Return the types of buffers, and of the keys of stochastic rounding."""
    kept = [*stored.states, *(dtype for dtype in (stored.master, stored.out) if dtype is not None)]
    params, grads, *others = map(_pointer_to, (stored.params, stored.grads, *kept))
    keys = (_INTEGERS,) * stored.rounds
    scales = [types.UniTuple(types.CPointer(types.float32), len(stored.in_blocks))] * bool(stored.in_blocks)
    if entry in UNIT_STEPS and not scales:
        return params, grads, types.Tuple((*others, *keys))
    if entry == "step":
        keys = (_INTEGER,) * (2 * stored.rounds)
    return types.Tuple((params, grads, *others)), *scales, types.Tuple(keys)


def _function(entry: str, kinds: KernelTypes) -> Callable[..., None]:
    if entry in CLOCK_ENTRIES + UNIT_ENTRIES:
        module = cuda_decide if entry in CLOCK_ENTRIES else cuda_units_decide
        function: Callable[..., None] = getattr(module, entry)
        return function
    if kinds.stored is not None and kinds.stored.in_blocks:
        if entry == STEP_ACROSS:
            return cuda_blocks_observed.make_step_across(kinds)
        if entry == "step_units_observed":
            return cuda_blocks_observed.make_step_in_blocks_observed(kinds)
        return cuda_blocks_loop.make_step_in_blocks(kinds, entry)
    if entry in UNIT_STEPS:
        return cuda_units_loop.make_step_units(kinds, observed=entry == "step_units_observed")
    make = cuda_loop.make_step if kinds.stored is None else cuda_stored_loop.make_step_stored
    return make(kinds, captured=entry == "step_captured")


def compile_kernel(entry: str, kinds: KernelTypes, capability: tuple[int, int], *options: str) -> bytes:
    """Return the machine code of a kernel, as a cubin, or as PTX with the option ``-ptx``.

    Parameters
    ----------
    entry : str
        ``"step"``, ``"step_captured"`` or one of ``CLOCK_ENTRIES``, ``UNIT_STEPS`` and ``UNIT_ENTRIES``, or
        ``STEP_ACROSS``.
    kinds : KernelTypes
    capability : tuple of int
        Of the device, (major, minor).
    *options
        More options for the linker.
    """
    # Whatever NUMBA_CUDA_DEBUGINFO and NUMBA_OPT say: debugging code stops at what Python raises for.
    code, _ = cuda.compile(
        _function(entry, kinds),
        types.void(*_signature(entry, kinds)),
        device=False,
        abi="numba",
        cc=capability,
        output="ltoir",
        debug=False,
        opt=True,
    )
    registers = _MOST_REGISTERS.get((entry, kinds.dtype.name))
    if kinds.stored is not None and kinds.stored.in_blocks:
        registers = _MOST_REGISTERS_IN_BLOCKS
    limit = () if registers is None else (f"-maxrregcount={registers}",)
    return _link(code, entry, f"sm_{capability[0]}{capability[1]}", *limit, *options)


def _link(code: bytes, entry: str, architecture: str, *options: str) -> bytes:
    arguments = [*_LINK_OPTIONS, f"-arch={architecture}", *options]
    linker = None
    try:
        linker = nvjitlink.create(len(arguments), arguments)
        nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, code, len(code), entry)
        nvjitlink.complete(linker)
        if "-ptx" in options:
            linked = bytearray(nvjitlink.get_linked_ptx_size(linker))
            nvjitlink.get_linked_ptx(linker, linked)
        else:
            linked = bytearray(nvjitlink.get_linked_cubin_size(linker))
            nvjitlink.get_linked_cubin(linker, linked)
    except nvjitlink.nvJitLinkError as error:
        reason = ": ".join(filter(None, (str(error), _error_log(linker))))
        raise RuntimeError(f"nvJitLink cannot link {entry} for {architecture}: {reason}") from error
    finally:
        if linker is not None:
            nvjitlink.destroy(linker)
    return bytes(linked)


def _error_log(linker: int | None) -> str:
    log = bytearray()
    if linker is not None:
        with contextlib.suppress(nvjitlink.nvJitLinkError):
            log = bytearray(nvjitlink.get_error_log_size(linker))
            nvjitlink.get_error_log(linker, log)
    lines = log.rstrip(b"\0").decode(errors="replace").splitlines()
    return "; ".join(filter(None, map(str.strip, lines)))


def _check(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(error)
        _, description = driver.cuGetErrorString(error)
        said = ": ".join(text.decode() for text in (name, description) if text)
        raise RuntimeError(f"CUDA refuses: {said or error}")
    return values[0] if values else None


def _compilers() -> list[Any]:
    """Return what tells these compilers from others, as far as it can be told: that must not stop a step.

    NVIDIA's come in wheels, or in the system's toolkit, of which Python's package managers know nothing; and
    the numbers that its libraries give of themselves can stay the same in an update. So: their files, too.
    """
    found: list[Any] = [llvmlite.__version__, numba.__version__]
    for ask in (
        lambda: metadata.version("numba-cuda"),
        lambda: cuda.config.CUDA_DEBUGINFO_DEFAULT,  # compiles the functions that a kernel calls otherwise
        nvjitlink.version,
        lambda: cubins.stamp(pathfinder.load_nvidia_dynamic_lib("nvJitLink").abs_path),
        lambda: cubins.stamp(_path("nvvm")),
        lambda: cubins.stamp(_path("libdevice")),
    ):
        try:
            found.append(ask())
        except Exception:  # whatever a search for libraries raises
            found.append(None)
    return found


def _path(name: str) -> str:
    """Return where Numba finds a part of the toolkit."""
    from numba.cuda.cuda_paths import get_cuda_paths  # of its inner workings: an import that may fail

    return str(get_cuda_paths()[name].info)


def _cubin(entry: str, kinds: KernelTypes, capability: tuple[int, int]) -> bytes:
    """Return a compiled kernel, from disk where the same compilers have compiled the same."""
    key = repr((digest(), _compilers(), _LINK_OPTIONS, entry, kinds, capability))
    return cubins.cached(
        cubins.folder(cuda_decide.set_lr), key, lambda: compile_kernel(entry, kinds, capability)
    )


@cache
def _kernel(entry: str, kinds: KernelTypes, device: int) -> Kernel:
    with cuda.gpus[device]:
        capability = tuple(cuda.gpus[device].compute_capability[:2])
        cubin = _cubin(entry, kinds, capability)
        module = _check(driver.cuModuleLoadData(np.frombuffer(cubin, np.uint8).ctypes.data))
        return _check(driver.cuModuleGetFunction(module, cubins.symbol(cubin)))


@cache
def _resident_threads(device: int) -> int:
    gpu = cuda.gpus[device]
    return int(gpu.MULTIPROCESSOR_COUNT * gpu.MAX_THREADS_PER_MULTI_PROCESSOR)


class NumbaCuda(Cuda):
    """Steps by Numba-CUDA."""

    name = "numba-cuda"

    def kernel(self, entry: str, types: KernelTypes, device: int) -> Kernel:
        return _kernel(entry, types, device)

    def launch(
        self, kernel: Kernel, blocks: int, threads: int, args: tuple[Any, ...], device: int, stream: int
    ) -> None:
        values = (args, tuple(_C_TYPES[type(argument)] for argument in args))
        with cuda.gpus[device]:
            _check(driver.cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, 0, stream, values, 0))

    def event(self, device: int) -> Event:
        with cuda.gpus[device]:
            return _check(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))

    def order(self, first: int, then: int, event: Event, device: int) -> None:
        with cuda.gpus[device]:
            _check(driver.cuEventRecord(event, first))
            _check(driver.cuStreamWaitEvent(then, event, 0))
            _check(driver.cuEventDestroy(event))  # when it has passed

    def is_capturing(self, stream: int, device: int) -> bool:
        # The legacy stream cannot be captured, and asking for it fails while another stream is.
        if stream in LEGACY_STREAM:
            return False
        with cuda.gpus[device]:
            status = _check(driver.cuStreamIsCapturing(stream))
        return bool(status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)

    def zeros(self, nbytes: int, device: int, stream: int) -> Array:
        with cuda.gpus[device]:
            array = cuda.device_array(nbytes, np.uint8)
            _check(driver.cuMemsetD8Async(self.address(array), 0, nbytes, stream))
        return array

    def to_device(self, array: np.ndarray[Any, Any], device: int, stream: int) -> Array:
        with cuda.gpus[device]:
            there = cuda.device_array(array.nbytes, np.uint8)
            _check(driver.cuMemcpyHtoDAsync(self.address(there), array.ctypes.data, array.nbytes, stream))
            _check(driver.cuStreamSynchronize(stream))  # the host's array may go
            return there

    def to_host(self, array: Array, device: int) -> np.ndarray[Any, Any]:
        with cuda.gpus[device]:
            _check(driver.cuCtxSynchronize())
            host: np.ndarray[Any, Any] = array.copy_to_host()
            return host

    def copy(self, to: int, source: int, nbytes: int, device: int, stream: int) -> None:
        with cuda.gpus[device]:
            _check(driver.cuMemcpyDtoDAsync(to, source, nbytes, stream))

    def address(self, array: Array) -> int:
        return int(array.__cuda_array_interface__["data"][0])

    def device_of(self, pointer: int) -> int:
        attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        return int(_check(driver.cuPointerGetAttribute(attribute, pointer)))

    def device_count(self) -> int:
        return len(cuda.gpus)

    def current_device(self) -> int:
        return int(cuda.get_current_device().id)

    def resident_threads(self, device: int) -> int:
        return _resident_threads(device)


backend = NumbaCuda()

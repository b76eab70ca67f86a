"""The CUDA kernels of both backends, compiled for GPUs that are not there; no driver is needed.

Importing this module skips the tests that do, with the reason, where a compiler is missing.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import ptx
import pytest
from oracles import FLAGS, PHASES, flags_id

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda.bindings.nvrtc", exc_type=ImportError)
pytest.importorskip("cuda.bindings.nvjitlink", reason="needs cuda.bindings.nvjitlink", exc_type=ImportError)
pytest.importorskip("numba_cuda", reason="needs numba-cuda", exc_type=ImportError)

from cuda.bindings import nvrtc
from numba import cuda
from numba.cuda import dispatcher

from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import cubins, cuda_numba, cuda_source
from fastadam.kernels.cuda import CLOCK_ENTRIES, UNIT_ENTRIES, UNIT_STEPS, KernelTypes

BACKENDS = ["cupy", "numba-cuda"]
DTYPES = ["float32", "float64"]
SUFFIX = {"float32": "f32", "float64": "f64"}
ENTRIES = ["step", "step_captured", *CLOCK_ENTRIES, *UNIT_STEPS, *UNIT_ENTRIES]
SM_80, SM_90, SM_100 = (8, 0), (9, 0), (10, 0)

VARIANTS = {flags_id(flags): flags for flags in FLAGS + PHASES}
"""Every combination of flags, and more parts of the phase, by its name."""

_BARE = [{name: flag for name, flag in flags.items() if "decay" not in name} for flags in PHASES[-2:]]
BARE = {flags_id(flags): flags for flags in ({**flags, "ema_decay": 0.9} for flags in _BARE)}
"""All parts but weight decay."""

EVERY_PART = ["plain", "l2", "amsgrad-maximize-adamw", "adamw-whole", "amsgrad-maximize-l2-whole"]
"""Variants that have every rule, direction and decay among them, alone and with all other parts."""

MOST = EVERY_PART[-1]
"""A variant with as many instructions as there are."""

CUPY_APPENDS = ("-ftz=true", "--device-as-default-execution-space")
"""What CuPy appends to a module's options: cupy/cuda/compiler.py, _compile_with_cache_cuda and below."""


class Build(NamedTuple):
    """A kernel as a backend makes it for a variant, a dtype and an architecture."""

    backend: str
    entry: str
    dtype: str
    variant: str
    capability: tuple[int, int] = SM_90

    @property
    def hyperparameters(self) -> Hyperparameters:
        return AdamHyperparameters(**(VARIANTS | BARE)[self.variant])

    @property
    def types(self) -> KernelTypes:
        c = Coefficients(self.hyperparameters, np.dtype(self.dtype))
        types = c.scaled_types if self.unscales else c.types
        return types if self.entry.startswith("step") else types.of_clock

    @property
    def unscales(self) -> bool:
        """Whether the gradient is divided by a scale: in the variants of all parts, and in no other."""
        return self.variant.endswith("whole")

    @property
    def suffix(self) -> str:
        """Of the PTX instructions of its dtype."""
        return SUFFIX[self.dtype]

    def named(self, kernels: dict[str, Any]) -> Any:
        """Return its own among all kernels of a module, by name."""
        if self.backend == "cupy":
            return kernels[self.entry]
        (only,) = kernels.values()  # of a mangled name that differs from one compilation to the next
        return only

    def __str__(self) -> str:
        return "-".join([*self[:-1], arch(self.capability)])


EAGER_STEPS = [
    *(Build(*kind) for kind in product(["cupy"], ["step"], DTYPES, VARIANTS)),
    *(Build(*kind) for kind in product(["numba-cuda"], ["step"], ["float32"], VARIANTS)),
    *(Build(*kind) for kind in product(["numba-cuda"], ["step"], ["float64"], EVERY_PART)),
]
"""Numba takes the longest to compile, so it makes every variant of one dtype only."""

STEPS = [
    *EAGER_STEPS,
    *(Build(*kind) for kind in product(BACKENDS, ["step_captured"], DTYPES, EVERY_PART)),
    *(Build(*kind) for kind in product(["cupy"], ["step"], DTYPES, EVERY_PART[1:], [SM_80, SM_100])),
    *(Build(*kind) for kind in product(["numba-cuda"], ["step"], DTYPES, EVERY_PART[-2:], [SM_80, SM_100])),
]
"""Of Numba's on other architectures, as of all captured ones, those that take the most registers."""

ELSEWHERE = [
    Build(*kind) for kind in product(BACKENDS, ["step_captured"], DTYPES, EVERY_PART[-2:], [SM_80, SM_100])
]
"""Steps that take the most registers, and spilled on architectures other than the first."""

UNITS = [
    *(Build(*kind) for kind in product(BACKENDS, UNIT_STEPS, DTYPES, EVERY_PART)),
    *(Build(*kind) for kind in product(BACKENDS, UNIT_STEPS, DTYPES, EVERY_PART[-2:], [SM_80, SM_100])),
]
"""Steps over units."""

SUMMING = ["measure", "decide", "measure_units", "sum_groups", "conclude"]

OTHERS = [
    *(Build(*kind) for kind in product(BACKENDS, CLOCK_ENTRIES + UNIT_ENTRIES, DTYPES, ["adamw"])),
    *(Build(*kind) for kind in product(BACKENDS, SUMMING, DTYPES, ["adamw"], [SM_80, SM_100])),
]
"""The kernels whose code is read; of those that know no rule, no variant differs."""


def arch(capability: tuple[int, int]) -> str:
    return "sm_{}{}".format(*capability)


def ptx_of(build: Build) -> str:
    """Return the PTX of a kernel."""
    if build.backend == "cupy":
        module, _ = compile_cuda(*_cupy_arguments(build))
    else:
        module = text(_numba(build.entry, build.types, build.capability, "-ptx"))
    return build.named(ptx.entries(module))


def cubin_of(build: Build) -> bytes:
    """Return the machine code of the module that holds a kernel."""
    if build.backend == "cupy":
        _, module = compile_cuda(*_cupy_arguments(build))
        return module
    return _numba(build.entry, build.types, build.capability)


# --- CuPy: NVRTC --------------------------------------------------------------------------------------------


def _cupy_arguments(build: Build) -> tuple[str, tuple[int, int], tuple[str, ...]]:
    return source_of(build), build.capability, (*cuda_source.OPTIONS, *CUPY_APPENDS)


def source_of(build: Build) -> str:
    """Return the CUDA C++ of the module that holds a kernel."""
    return cuda_source.source_of(build.entry, build.types)


def plant(statement: str, number: str = "float", name: str = "planted") -> str:
    """Return CUDA C++ with something that a check must see."""
    return f'extern "C" __global__ void {name}({number}* a, {number}* b, int n) {{ {statement} }}\n'


@cache
def compile_cuda(
    source: str,
    capability: tuple[int, int] = SM_90,
    options: tuple[str, ...] = (*cuda_source.OPTIONS, *CUPY_APPENDS),
) -> tuple[str, bytes]:
    """Compile CUDA C++; return (PTX, cubin)."""
    code, machine_code = _nvrtc(source, capability, options, "PTX", "CUBIN")
    return text(code), machine_code


def _nvrtc(source: str, capability: tuple[int, int], options: tuple[str, ...], *outputs: str) -> list[bytes]:
    """Compile CUDA C++ to some outputs of NVRTC; whatever the compiler has to say is an error."""
    flags = [option.encode() for option in (f"-arch={arch(capability)}", *options)]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        log = text(_output(program, "ProgramLog")).strip()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS or log:
            raise RuntimeError(f"NVRTC says: {status.name}\n{log}")
        return [_output(program, kind) for kind in outputs]
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC refuses: {status.name}")
    return values[0] if values else None


def _output(program: Any, kind: str) -> bytes:
    content = bytearray(_checked(getattr(nvrtc, f"nvrtcGet{kind}Size")(program)))
    _checked(getattr(nvrtc, f"nvrtcGet{kind}")(program, content))
    return bytes(content)


def text(output: bytes) -> str:
    """Decode what a compiler ends with a zero byte."""
    return output.decode().rstrip("\0")


# --- Numba --------------------------------------------------------------------------------------------------

_function = cache(cuda_numba._function)


@cache
def _numba(entry: str, types: KernelTypes, capability: tuple[int, int], *options: str) -> bytes:
    """Compile and link; Numba's share, which takes seconds, is done once for all workers and outputs."""
    device = SimpleNamespace(compute_capability=capability)
    make = cuda.compile

    def compile_once(function: Any, *arguments: Any, **flags: Any) -> tuple[bytes, None]:
        key = f"{entry} {types} {capability}"
        return cubins.cached(_SHARED, key, lambda: make(function, *arguments, **flags)[0]), None

    with (
        mock.patch.object(dispatcher, "get_current_device", return_value=device),
        mock.patch.object(cuda_numba, "_function", _function),
        mock.patch.object(cuda, "compile", compile_once),
    ):
        return cuda_numba.compile_kernel(entry, types, capability, *options)


_SHARED = Path(os.environ["FASTADAM_TESTS_SHARE"])
"""Made by tests/conftest.py for one run: no other has the same sources."""


@cache
def link_cuda(source: str, capability: tuple[int, int]) -> bytes:
    """Compile CUDA C++ as the Numba backend does its kernels: return the cubin that its linker makes."""
    (code,) = _nvrtc(source, capability, ("-dlto",), "LTOIR")
    any_kernel = Build("numba-cuda", "set_lr", "float32", "plain")
    with mock.patch.object(cuda, "compile", return_value=(code, None)):
        return cuda_numba.compile_kernel(any_kernel.entry, any_kernel.types, capability)

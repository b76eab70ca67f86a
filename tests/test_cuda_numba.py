"""The Numba-CUDA backend up to the driver: what it compiles, what it keeps, what it says of errors."""

from __future__ import annotations

from types import SimpleNamespace

import cuda_builds
import pytest
from cuda_builds import DTYPES, SM_80, SM_90, SM_100, Build
from ptx import entries

from fastadam.kernels import cubins, cuda_numba

KINDS, OTHER_KINDS = (Build("numba-cuda", "step", dtype, "plain").types for dtype in DTYPES)


# --- The cache ----------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What was compiled, with a cache of its own."""
    calls = []

    def compile_kernel(*call):
        calls.append(call)
        return b"cubin %d" % len(calls)

    monkeypatch.setattr(cubins, "folder", lambda _: tmp_path)
    monkeypatch.setattr(cuda_numba, "compile_kernel", compile_kernel)
    return calls


def cubin():
    return cuda_numba._cubin("set_lr", KINDS, (9, 0))


def test_compiled_once(compiled):
    assert cubin() == cubin() == b"cubin 1"
    assert compiled == [("set_lr", KINDS, (9, 0))]
    assert cuda_numba._cubin("set_lr", KINDS, (8, 0)) == b"cubin 2"
    assert cuda_numba._cubin("form_coefficients", KINDS, (9, 0)) == b"cubin 3"
    assert (
        cuda_numba._cubin("set_lr", Build("numba-cuda", "step", "float64", "plain").types, (9, 0))
        == b"cubin 4"
    )


def other_stamp(name):
    real = cubins.stamp

    def stamp(path):
        return ("other", 1, 2) if name in path.lower() else real(path)

    return stamp


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("llvmlite.__version__", "other"),
        ("numba.__version__", "other"),
        ("metadata.version", lambda _: "other"),
        ("cuda.config.CUDA_DEBUGINFO_DEFAULT", 1),
        ("nvjitlink.version", lambda: (99, 0)),
        ("cubins.stamp", other_stamp("libnvjitlink")),
        ("cubins.stamp", other_stamp("libnvvm")),
        ("cubins.stamp", other_stamp("libdevice")),
        ("_LINK_OPTIONS", ("-lto",)),
        ("digest", lambda: "other"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_compiler_compiles_again(compiled, monkeypatch, place, value):
    assert cubin() == b"cubin 1"
    with monkeypatch.context() as other:
        owner, _, name = place.rpartition(".")
        at = cuda_numba
        for part in filter(None, owner.split(".")):
            at = getattr(at, part)
        other.setattr(at, name, value)
        assert cubin() == cubin() == b"cubin 2"
    assert cubin() == b"cubin 1"


def test_compilers_that_cannot_be_told_do_not_stop_a_step(compiled, monkeypatch):
    def fail(*_):
        raise RuntimeError("not found")

    for module, name in [
        (cuda_numba.metadata, "version"),
        (cuda_numba.nvjitlink, "version"),
        (cuda_numba.pathfinder, "load_nvidia_dynamic_lib"),
        (cuda_numba, "_path"),
    ]:
        monkeypatch.setattr(module, name, fail)
    assert cuda_numba._compilers()[2] is None
    assert cuda_numba._compilers()[-4:] == [None] * 4
    assert cubin() == b"cubin 1"


# --- Names --------------------------------------------------------------------------------------------------

SOURCE = """
__device__ __noinline__ float helper(float x) { return sqrtf(x) / 3; }
extern "C" __global__ void first(float* a) { *a = helper(*a); }
"""
SECOND = 'extern "C" __global__ void second(float* a) { *a = helper(1 + *a); }'


@pytest.mark.parametrize("entry", ["step", "set_lr"])
@pytest.mark.parametrize("capability", [SM_80, SM_90, SM_100, (12, 0)], ids=str)
def test_the_name_of_a_kernel(capability, entry):
    build = Build("numba-cuda", entry, "float32", "plain", capability)
    module = cuda_builds.text(cuda_builds._numba(entry, build.types, capability, "-ptx"))
    (name,) = entries(module)
    assert cubins.symbol(cuda_builds.cubin_of(build)) == name.encode()


@pytest.mark.parametrize("capability", [SM_80, SM_90, SM_100], ids=str)
def test_a_subroutine_is_no_kernel(capability):
    _, found = cuda_builds.compile_cuda(SOURCE, capability)
    assert b"helper" in found
    assert cubins.symbol(found) == b"first"
    _, both = cuda_builds.compile_cuda(SOURCE + SECOND, capability)
    with pytest.raises(RuntimeError, match=r"^cubin must have one entry point; got \[b'\w+', b'\w+'\]\.$"):
        cubins.symbol(both)


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "architecture", "error", "log"),
    [
        (lambda _: b"no code " * 9, "sm_90", "INCORRECT_INPUT_TYPE", r": ERROR .*NVJITLINK_INPUT_LTOIR"),
        (lambda code: code[:-8], "sm_90", "NVVM_COMPILE", r": .*NVVM_ERROR_COMPILATION"),
        (lambda code: code, "sm_999", "UNRECOGNIZED_ARCH", "$"),
    ],
    ids=["junk", "cut short", "unknown GPU"],
)
def test_errors_of_the_linker(change, architecture, error, log):
    (code,) = cuda_builds._nvrtc(SOURCE, SM_90, ("-dlto",), "LTOIR")
    with pytest.raises(RuntimeError) as caught:
        cuda_numba._link(change(code), "step_captured", architecture)
    message = rf"nvJitLink cannot link step_captured for {architecture}: ERROR_{error} \(\d+\){log}"
    assert caught.match(f"^{message}")
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)
    assert isinstance(caught.value.__cause__, cuda_numba.nvjitlink.nvJitLinkError)


@pytest.mark.parametrize(
    ("name", "description", "message"),
    [
        (b"CUDA_ERROR_INVALID_VALUE", b"invalid argument", "CUDA_ERROR_INVALID_VALUE: invalid argument"),
        (b"CUDA_ERROR_NEW", None, "CUDA_ERROR_NEW"),
        (None, None, "12345"),
    ],
)
def test_errors_of_the_driver(monkeypatch, name, description, message):
    driver = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        cuGetErrorName=lambda _: (0, name),
        cuGetErrorString=lambda _: (0, description),
    )
    monkeypatch.setattr(cuda_numba, "driver", driver)
    assert cuda_numba._check((0, "value")) == "value"
    assert cuda_numba._check((0,)) is None
    with pytest.raises(RuntimeError) as caught:
        cuda_numba._check((12345, None))
    assert str(caught.value) == f"CUDA refuses: {message}"

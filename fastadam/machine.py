"""What the speed and the behaviour of fastadam depend on besides its code; what ``fastadam info`` shows."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import llvmlite.binding as llvm

import fastadam
from fastadam import backends
from fastadam.kernels import cpu as cpu_backend
from fastadam.kernels import threads

_CPUINFO = Path("/proc/cpuinfo")  # on Linux

_OPTIONAL = {
    "CuPy": ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy"),
    "numba-cuda": ("numba-cuda",),
    "PyTorch": ("torch",),
}
"""Name -> the distributions it comes in."""

_SIMD = {
    "sve": "scalable, width unknown (SVE)",
    "avx512f": "512 bits (AVX-512)",
    "avx2": "256 bits (AVX2)",
    "avx": "256 bits (AVX)",
    "sse2": "128 bits (SSE2)",
    "neon": "128 bits (NEON)",
}
"""LLVM's name of a feature -> its registers; the first that the CPU has counts."""


def facts() -> dict[str, str]:
    """Return all facts: name -> value. Imports GPU libraries, to see whether they can run; never raises."""
    return {
        "fastadam": fastadam.__version__,
        "Python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        **{name: _version(name.lower()) for name in ("NumPy", "Numba", "llvmlite")},
        **{name: _version(*distributions) for name, distributions in _OPTIONAL.items()},
        "CPU": f"{cpu()} ({llvm.get_host_cpu_name()})",
        "SIMD registers": simd(_cpu_features()),
        "Threads": threads_used(),
        "Kernel cache": kernel_cache(),
        **_backends(),
        "CUDA devices": "\n".join(cuda_devices()) or "none found",
    }


def cpu() -> str:
    """Return the name of the CPU model, or of the architecture where the system does not tell."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def simd(features: Mapping[str, bool]) -> str:
    """Return the width of the widest vector registers among a CPU's features, as LLVM names them."""
    return next((width for name, width in _SIMD.items() if features.get(name)), "unknown")


def threads_used() -> str:
    """Return how many threads a step of a large buffer runs on, and whose they are."""
    try:
        count, layer, safe = threads.count(), threads.layer(), threads.numba_is_safe()
    except ValueError as error:  # Numba: no threading layer could be loaded
        return f"none: {error}"
    return (
        f"{count} (Numba's, {layer})"
        if safe
        else f"{count} (fastadam's own pool; Numba's {layer} is not safe)"
    )


def kernel_cache() -> str:
    """Return the folder where compiled kernels are kept, or why there is none."""
    stats = getattr(cpu_backend.serial, "stats", None)
    if stats is None:  # a plain function
        return "none (NUMBA_DISABLE_JIT is set: nothing is compiled)"
    return str(stats.cache_path or "none (no writable location)")


def cuda_devices() -> list[str]:
    """Return the NVIDIA GPUs that the driver's own program lists, without their serial numbers."""
    listing = _nvidia_smi("-L")
    if not listing:
        return []
    details = {}
    for line in _nvidia_smi("--query-gpu=index,compute_cap,memory.total", "--format=csv,noheader"):
        values = [value.strip() for value in line.split(",")]
        if len(values) == 3 and "[" not in line:  # [N/A], [Not Supported]
            details[f"GPU {values[0]}"] = f" (compute capability {values[1]}, {values[2]})"
    names = [line.partition(" (UUID")[0].strip() for line in listing]
    return [name + details.get(name.partition(":")[0], "") for name in names]


def _nvidia_smi(*arguments: str) -> list[str]:
    """Return the lines that it prints; none without it, or where it fails (old ones know no compute_cap)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        run = subprocess.run([program, *arguments], capture_output=True, check=True, text=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in run.stdout.splitlines() if line.strip()]


def _backends() -> dict[str, str]:
    """Return whether each backend can run here."""
    return {f"Backend {name}": reason for name, reason in backends.status().items()}


def _version(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _cpu_features() -> dict[str, bool]:
    try:
        features = dict(llvm.get_host_cpu_features())
    except RuntimeError:  # LLVM does not know this CPU
        features = {}
    if platform.machine().lower() in {"aarch64", "arm64"}:
        features.setdefault("neon", True)  # part of the architecture, but not always listed
    return features

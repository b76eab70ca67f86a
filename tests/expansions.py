"""What square roots and divisions become in machine code, measured on kernels of nothing else.

Neither is one instruction on a GPU. The compiler gives each its share of inlined code, and a kernel one copy
of the paths for rare operands: the arithmetic of a kernel is linear in their numbers from one of each on.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import sass
from cuda_builds import compile_cuda, link_cuda

ONE_EACH, TWO_ROOTS, TWO_QUOTIENTS = (1, 1), (2, 1), (1, 2)
ONE_QUOTIENT = (0, 1)
MANY = (3, 4)
"""Numbers of (roots, quotients): those that the shares follow from, and those to try them on."""

SAMPLES = [ONE_EACH, TWO_ROOTS, TWO_QUOTIENTS, ONE_QUOTIENT, MANY]
_C = {"f32": ("float", "f"), "f64": ("double", "d")}


def _name(suffix: str, roots: int, quotients: int) -> str:
    return f"sample_{suffix}_{roots}_{quotients}"


def _sample(suffix: str, roots: int, quotients: int) -> str:
    number, letter = _C[suffix]
    root, quotient = f"sqrt.rn.{suffix} %0, %0;", f"div.rn.{suffix} %0, %0, %1;"
    lines = [f'asm("{root}" : "+{letter}"(a[{k}]));' for k in range(roots)]
    lines += [f'asm("{quotient}" : "+{letter}"(a[{roots + k}]) : "{letter}"(b));' for k in range(quotients)]
    signature = f"{_name(suffix, roots, quotients)}({number}* a, {number} b)"
    return f'extern "C" __global__ void {signature} {{ {" ".join(lines)} }}'


SOURCE = "\n".join(_sample(suffix, *sample) for suffix in _C for sample in SAMPLES)


@cache
def _measured(backend: str, capability: tuple[int, int]) -> dict[str, Counter[str]]:
    """Return the arithmetic of each sample by its name."""
    cubin = compile_cuda(SOURCE, capability)[1] if backend == "cupy" else link_cuda(SOURCE, capability)
    kernels = sass.kernels(cubin)
    listings = sass.disassemble([kernel.code for kernel in kernels.values()], capability)
    return dict(zip(kernels, map(sass.arithmetic, listings), strict=True))


class Expansions:
    """The arithmetic of square roots and divisions of one dtype, by backend and architecture."""

    def __init__(self, backend: str, capability: tuple[int, int], suffix: str) -> None:
        measured = _measured(backend, capability)
        self._sample = {sample: measured[_name(suffix, *sample)] for sample in SAMPLES}
        assert self._by_shares(*MANY) == self._sample[MANY], "shares do not add up"

    def arithmetic(self, roots: int, quotients: int) -> Counter[str]:
        if roots == quotients == 0:
            return Counter()
        if (roots, quotients) in self._sample:
            return self._sample[roots, quotients]
        assert roots > 0 < quotients, "no sample is like this"
        return self._by_shares(roots, quotients)

    def _by_shares(self, roots: int, quotients: int) -> Counter[str]:
        once, root, quotient = (self._sample[s] for s in (ONE_EACH, TWO_ROOTS, TWO_QUOTIENTS))
        shares = Counter(once)
        for name, n in once.items():
            shares[name] += (roots - 1) * (root[name] - n) + (quotients - 1) * (quotient[name] - n)
        return shares

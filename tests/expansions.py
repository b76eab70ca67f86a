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
ONE_QUOTIENT, TWO_ALONE = (0, 1), (0, 2)
MANY = (3, 4)
"""Numbers of (roots, quotients): those that the shares follow from, and those to try them on."""

MANY_ALONE = (0, 5)
"""Of quotients without a root."""

SAMPLES = [ONE_EACH, TWO_ROOTS, TWO_QUOTIENTS, ONE_QUOTIENT, TWO_ALONE, MANY, MANY_ALONE]
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
        for many in (MANY, MANY_ALONE):
            assert self._by_shares(*many) == self._sample[many], "shares do not add up"

    def arithmetic(self, roots: int, quotients: int) -> Counter[str]:
        if roots == quotients == 0:
            return Counter()
        if (roots, quotients) in self._sample:
            return self._sample[roots, quotients]
        assert quotients > 0, "no sample is like this"
        return self._by_shares(roots, quotients)

    def _by_shares(self, roots: int, quotients: int) -> Counter[str]:
        if not roots:
            one, two = self._sample[ONE_QUOTIENT], self._sample[TWO_ALONE]
            return Counter({name: n + (quotients - 1) * (two[name] - n) for name, n in one.items()})
        once, root, quotient = (self._sample[s] for s in (ONE_EACH, TWO_ROOTS, TWO_QUOTIENTS))
        shares = Counter(once)
        for name, n in once.items():
            shares[name] += (roots - 1) * (root[name] - n) + (quotients - 1) * (quotient[name] - n)
        return shares

"""What the PTX of a kernel consists of, and what it may not."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from cuda_builds import Build, ptx_of
from ptx import count

from fastadam.kernels import grids


@cache
def ops_of(build: Build) -> Counter[str]:
    """Count the instructions of a kernel."""
    return count(ptx_of(build))


def foreign(ops, suffix):
    """Return the instructions of PTX that a step of one dtype may not have: all but those listed here.

    The manual of PTX: an ``add`` or ``mul`` with an explicit ``.rn`` is never fused, ``sqrt.rn`` and
    ``div.rn`` are those of IEEE 754, and without ``.ftz`` subnormals are kept. Newer compilers do not tell
    floats from bits in memory.
    """
    bits = suffix.replace("f", "b")
    harmless = re.compile(
        rf"""(add|sub|mul|div|sqrt)\.rn\.{suffix}
        | (neg|selp|mov|ld\.param|setp\.(lt|le|gt|ge|eq|ne)u?)\.{suffix}
        | (ld|st)\.global(\.v[24])?\.({suffix}|{bits})
        | [a-z]+(\.[a-z]+)*(\.[usb](32|64))+  # of integers
        | (and|or|xor|not|mov)\.pred
        | bra(\.uni)? | ret | \$\w+  # a label""",
        re.VERBOSE,
    )
    return {op for op in ops if not harmless.fullmatch(op)}


def copies(ops, access, buffers):
    """Return how often the code loads or stores some number of buffers, all of them every time."""
    times, rest = divmod(ops, buffers)
    assert (times > 0, rest) == (True, 0), f"{access}: {ops} of {buffers} buffers"
    return times


def bodies(ops, build):
    """Return how often the code of a step updates a pack, and an element alone.

    Every time it loads all buffers once, and stores all but the gradients.
    """
    lanes = grids.PACK // build.types.dtype.itemsize
    n_loads, n_stores = build.types.n_states + 2, build.types.n_states + 1

    def accesses(access, vector):
        bits = build.suffix.replace("f", "b")
        return sum(ops[f"{access}.global.{vector}{kind}"] for kind in (build.suffix, bits))

    packs = copies(accesses("ld", f"v{lanes}."), "packs loaded", n_loads)
    assert copies(accesses("st", f"v{lanes}."), "packs stored", n_stores) == packs
    alone = copies(accesses("st", ""), "elements stored", n_stores)
    if build.entry == "step":  # a captured step loads its coefficients, too
        assert copies(accesses("ld", ""), "elements loaded", n_loads) == alone
    return packs, alone

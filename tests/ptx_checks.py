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
    harmless = re.compile(
        rf"""(add|sub|mul|div|sqrt)\.rn\.{suffix}
        | (neg|selp|mov|ld\.param|setp\.(lt|le|gt|ge|eq|ne)u?)\.{suffix}
        | (ld|st)\.global(\.v[24])?\.({suffix}|b(32|64))
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


def n_accesses(build):
    """Return how many buffers a step loads, and how many it stores."""
    n_buffers = build.types.n_states + 2
    return n_buffers, n_buffers if build.hyperparameters.zero_grads else n_buffers - 1


def n_divisions(build):
    """Return how often a step divides for an element: by the denominator, and to unscale the gradient."""
    return 1 if build.hyperparameters.max_grad_value is None else 2


def bodies(ops, build):
    """Return how often the code of a step updates a pack, and an element alone.

    Every time it loads all buffers once, and stores all but the gradients, or those too.
    """
    n_loads, n_stores = n_accesses(build)
    one = build.types.dtype.itemsize

    def accesses(access, nbytes):
        # Of a zero, compilers make an integer; newer ones, of all that they store.
        return sum(
            ops[f"{access}.global.{vector}{kind}{8 * width}"]
            for vector, width in (("", nbytes), ("v2.", nbytes // 2), ("v4.", nbytes // 4))
            for kind in "fbu"
        )

    packs = copies(accesses("ld", grids.PACK), "packs loaded", n_loads)
    assert copies(accesses("st", grids.PACK), "packs stored", n_stores) == packs
    counted = build.entry == "step_captured" and one == 8  # the step counter is as wide as an element
    alone = copies(accesses("st", one) - counted, "elements stored", n_stores)
    if build.entry == "step":  # a captured step loads its coefficients, too
        assert copies(accesses("ld", one), "elements loaded", n_loads) == alone
    return packs, alone

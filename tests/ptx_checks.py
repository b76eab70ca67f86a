"""What the PTX of a kernel consists of, and what it may not."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from cuda_builds import SM_90, Build, ptx_of
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
        | (neg|selp|mov|ld\.param|setp\.(lt|le|gt|ge|eq|ne|num)u?)\.{suffix}
        | (ld|st)\.global(\.v[24])?\.({suffix}|b(32|64))
        | [a-z]+(\.[a-z]+)*(\.[usb](32|64))+  # of integers
        | (and|or|xor|not|mov)\.pred
        | bra(\.uni)? | ret | \$\w+  # a label""",
        re.VERBOSE,
    )
    return {op for op in ops if not harmless.fullmatch(op)}


def computing(ops):
    """Return what computes with floats of any width: all but loads, stores and moves."""
    return Counter({op: n for op, n in ops.items() if ".f" in op and not re.match(r"(ld|st|mov)\.", op)})


_OF_A_SCALE = {"cvt.f64.f32": 1, "mul.rn.f64": 2}
"""To multiply a scale with one of either width: a float32 widened, with its subnormals, and two products."""

_FOLDS = 5
"""Of the 32 lanes of a warp to one."""


def due_of_clock(ops, build):
    """Return all that a kernel that knows no rule may do with floats.

    The tree has as many additions as the compiler unrolls its loops to. Three operations of NVRTC's are not
    spelled out, for there is nothing to fuse: a sum with a quotient, a product that is stored, and the
    difference of a number and itself. The machine code has to show it.
    """
    by_numba, narrow, adds = build.backend == "numba-cuda", build.dtype == "float32", ops["add.rn.f64"]
    decay = Counter({"mul.rn.f64" if by_numba else "mul.f64": 1})
    match build.entry:
        case "set_lr" | "form_keys" | "widen":
            return Counter()
        case "accumulate":
            return Counter({f"add.rn.{build.suffix}": ops[f"add.rn.{build.suffix}"]})
        case "measure" | "measure_units":
            n = ops["mul.rn.f64"]
            if by_numba:  # counts in float64; the first 0 plus 1 or 0 is no addition
                assert adds in (2 * (n + _FOLDS) - 1, 2 * (n + _FOLDS))
                counts = {"sub.rn.f64": n, "selp.f64": n}
            else:
                assert adds == n + _FOLDS
                counts = {"sub.f64": n}
            due = Counter({"mul.rn.f64": n, "add.rn.f64": adds, "setp.neu.f64": n, **counts})
            return due + Counter({"cvt.f64.f32": n} if narrow else {})
        case "form_coefficients":
            due = decay + Counter({**_OF_A_SCALE, "div.rn.f64": 1, "cvt.rn.f64.s64": 1})
            # A clip factor of 1 is one in Numba's code already.
            return due + Counter({"cvt.rn.f32.f64": 3 if by_numba else 4} if narrow else {})
        case "decide":
            assert adds > _FOLDS
            due = decay + Counter(_OF_A_SCALE)
            due += Counter({"sqrt.rn.f64": 1, "div.rn.f64": 3, "add.rn.f64": adds, "cvt.rn.f64.u32": 1})
            due += Counter({"setp.gt.f64": 1, "selp.f64": 1})
            due += Counter({"setp.gt.f64": 1} if by_numba else {"add.f64": 1, "cvt.rn.f64.s64": 1})
            due["cvt.rn.f64.s64"] += 1
            assert ops["selp.f64"] - due["selp.f64"] in (0, 1), "a number or a quotient"
            due["selp.f64"] = ops["selp.f64"]
            return due + Counter({"cvt.rn.f32.f64": 4} if narrow else {})
        case "sum_groups":
            assert adds > _FOLDS
            return Counter({"add.rn.f64": adds})
        case "form_rows":  # of which some decays are decoupled
            n, decays = ops["div.rn.f64"], sum(ops[op] for op in decay)
            assert 0 < decays < n
            due = Counter({"div.rn.f64": n, **dict.fromkeys(decay, decays)})
            return due + Counter({"cvt.rn.f32.f64": n + decays} if narrow else {})
        case "conclude":
            assert adds > _FOLDS
            due = Counter({"sqrt.rn.f64": 3 if by_numba else 1, "div.rn.f64": 1, "add.rn.f64": adds})
            return due + Counter({} if by_numba else {"cvt.rn.f64.s64": 1})
        case "clear_units":
            return Counter()
    raise ValueError(build.entry)


# --- Steps over units ---------------------------------------------------------------------------------------


def arithmetic(ops):
    """Return the additions, multiplications, divisions and roots, fused and approximate ones, too."""
    return Counter({op: n for op, n in computing(ops).items() if not re.match(r"(neg|selp|setp|cvt)\.", op)})


@cache
def arithmetic_of_an_element(build):
    """Return what a captured step does with each element."""
    ops = ops_of(build._replace(entry="step_captured"))
    n = ops[f"sqrt.rn.{build.suffix}"]
    found = arithmetic(ops)
    assert all(times % n == 0 for times in found.values())
    return Counter({op: times // n for op, times in found.items()})


def without_decay(build):
    """Return a build of the same with no weight decay."""
    bare = {
        "l2": "plain",
        "adamw": "plain",
        "adamw-whole": "whole",
        "amsgrad-maximize-adamw": "amsgrad-maximize",
    }
    return build._replace(variant=bare.get(build.variant, build.variant.replace("-l2", "")))


_SEEN = {  # of each element; CuPy's counts are integers
    "cupy": Counter({"mul.rn.f64": 3, "sub.rn.f64": 1, "sub.f64": 1, "add.rn.f64": 3}),
    "numba-cuda": Counter({"mul.rn.f64": 3, "sub.rn.f64": 2, "add.rn.f64": 5}),
}
_FOLDED = {"cupy": (3 * _FOLDS,), "numba-cuda": (5 * _FOLDS, _FOLDS)}
"""Additions of the folds of an observed step: of all sums, or in a loop over them."""


def elements_of_units(ops, build):
    """Return how often the code of a step over units steps an element, if its arithmetic is what it must be.

    CuPy's decays every element and takes what it needs; Numba's has other code for rows without a decay. And
    Numba's squares a float64 gradient once, where the rule takes it as it was given.
    """
    n = ops[f"sqrt.rn.{build.suffix}"]
    by_numba, has_decay = build.backend == "numba-cuda", build.hyperparameters.weight_decay > 0
    decayed = arithmetic_of_an_element(build)
    bare = arithmetic_of_an_element(without_decay(build)) if by_numba and has_decay else decayed
    observed = build.entry == "step_units_observed"
    seen = _SEEN[build.backend] if observed else Counter()
    due = []
    for k in range(1, n) if bare != decayed else [n]:
        rule = Counter(
            {op: k * decayed[op] + (n - k) * bare[op] + n * seen[op] for op in decayed | bare | seen}
        )
        due += (
            [rule + Counter({"add.rn.f64": folds}) for folds in _FOLDED[build.backend]]
            if observed
            else [rule]
        )
    found = arithmetic(ops)
    shared = range(n + 1) if by_numba and observed and build.dtype == "float64" else [0]
    assert any(found + Counter({"mul.rn.f64": squares}) in due for squares in shared), "arithmetic"
    return n


def assert_accesses_of_units(ops, build):
    """Every element is loaded once, and stored once; coefficients are loaded once."""
    n, one = elements_of_units(ops, build), build.suffix
    assert build.capability == SM_90, "newer compilers do not tell zeros from numbers that are stored"
    buffers = build.types.n_states + 2
    assert ops[f"ld.global.{one}"] == n * buffers + len(build.types.coefficients), "elements loaded"
    observed = build.entry == "step_units_observed"
    sums = (3 if build.backend == "cupy" else 5) if observed and one == "f64" else 0
    assert ops[f"st.global.{one}"] == n * (buffers - 1) + sums, "elements stored"
    zeros = ops[f"st.global.u{one[1:]}"]
    if one == "f64":  # the step counter is as wide, and what is counted
        zeros -= 1 + (0 if not observed else 3 if build.backend == "cupy" else 1)
    if build.hyperparameters.zero_grads:
        assert zeros - n in CLEARED_IN_UNITS, "zeros stored"
    else:
        assert zeros == 0, "zeros stored"


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
    return 2 if build.unscales else 1


CLEARED_WHERE_SKIPPED = (1, 4 + 1)
"""Stores of the loop that clears the gradients of a skipped step: as compilers unroll it, or do not."""


CLEARED_IN_UNITS = (1, 4 + 1, 4 + 3)
"""The same of a step over units."""


def bodies(ops, build):
    """Return how often the code of a step updates a pack, and an element alone.

    Every time it loads all buffers once, and stores all but the gradients, or those too. A captured step also
    loads its coefficients, and clears gradients in a loop of its own where it is skipped.
    """
    n_loads, n_stores = n_accesses(build)
    one = build.types.dtype.itemsize
    captured = build.entry == "step_captured"

    def accesses(access, nbytes, kinds="fbu"):
        # Of a zero, compilers make an integer; newer ones, of all that they store.
        return sum(
            ops[f"{access}.global.{vector}{kind}{8 * width}"]
            for vector, width in (("", nbytes), ("v2.", nbytes // 2), ("v4.", nbytes // 4))
            for kind in kinds
        )

    packs = copies(accesses("ld", grids.PACK), "packs loaded", n_loads)
    assert copies(accesses("st", grids.PACK), "packs stored", n_stores) == packs
    if not captured:
        alone = copies(accesses("st", one), "elements stored", n_stores)
        assert copies(accesses("ld", one), "elements loaded", n_loads) == alone
        return packs, alone
    assert build.capability == SM_90, "newer compilers do not tell zeros from numbers that are stored"
    cleared = n_stores == n_loads
    alone = copies(accesses("st", one, "f"), "elements stored", n_stores - cleared)
    zeros = accesses("st", one, "u") - (one == 8)  # the step counter is as wide as an element
    assert zeros - alone in CLEARED_WHERE_SKIPPED if cleared else zeros == 0, "elements stored as zeros"
    loaded = accesses("ld", one, "f") - len(build.types.coefficients)
    assert copies(loaded, "elements loaded", n_loads) == alone
    return packs, alone

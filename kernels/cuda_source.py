"""The CUDA C++ source of a step: ``kernels/step.cu``, the rule translated, and the entries of the kernels.

``step`` takes the coefficients by value. ``step_captured`` reads them from device memory, where
``form_coefficients`` or ``decide`` formed them from the step counter and the learning rate there, and counts
itself: a captured CUDA graph replays both. ``measure`` is the pass over all gradients for ``decide``;
``set_lr`` changes the learning rate, in stream order.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from . import grids, rules
from .cuda import KernelTypes
from .translation import Function, translate
from .tree import CHUNK, LANES

OPTIONS = ("--std=c++20",)
"""For NVRTC, which knows C++20 from CUDA 12 on."""

_TYPES = {
    "float32": (
        'using Scalar = float;\n#define SUFFIX "f32"\n#define LETTER "f"\n#define ROUND "cvt.rn.f32.f64"\n'
    ),
    "float64": 'using Scalar = double;\n#define SUFFIX "f64"\n#define LETTER "d"\n#define ROUND "mov.f64"\n',
}


@cache
def source(types: KernelTypes) -> str:
    """Return the source of the kernels for some types, of float32 or float64.

    With 1 to 3 states it has ``step`` and ``step_captured``; with none, the others.
    """
    loop = _read("step.cu")
    if not types.n_states:
        formed = (rules.step_size, rules.lr_times_weight_decay, rules.clip_factor)
        schedule = [translate(function, {}) for function in formed]
        sizes = (
            f"constexpr int THREADS = {grids.BLOCK}, RESIDENT = {grids.RESIDENT}, TREE_LANES = {LANES};\n"
            f"constexpr long long CHUNK = {CHUNK};\n"
            f"constexpr double CLIP_EPS = {rules.CLIP_EPS!r};"
        )
        return "\n\n".join([_TYPES[types.dtype.name], loop, *schedule, sizes, _read("clock.cu")])
    transforms = (types.conditioning, types.direction, types.decay)
    choices: dict[Function, dict[type, Function]] = {
        rules.transform: {kind: rules.TRANSFORMS[kind] for kind in transforms},
        rules.advance: {types.rule: rules.RULES[types.rule]},
        rules.track: {types.average: rules.AVERAGES[types.average]},
        rules.split: {},
        rules.join: {},
    }
    equation = translate(rules.update, choices)
    return "\n\n".join([_TYPES[types.dtype.name], loop, equation, _steps(types)])


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _steps(types: KernelTypes) -> str:
    kinds = ["None" if kind is type(None) else kind.__name__ for kind in types.parts]
    members = " ".join(f"{kind} {name};" for kind, name in zip(kinds, rules.Update._fields, strict=True))
    values = [f"c{k}" for k in range(len(types.coefficients))]
    stored = [f"coefficients[{k}]" for k in range(len(types.coefficients))]

    moments = ", ".join(f"Real* state{k}" for k in range(types.n_states))
    grads = "const Real* grads" if types.clear is type(None) else "Real* grads"
    buffers = f"Real* params, {grads}, {moments}, long long size, long long head, long long packs"
    count = "\n    if (!*skip && blockIdx.x == 0 && threadIdx.x == 0) *step += 1;"
    resident = grids.RESIDENT if types.dtype.itemsize == 4 else grids.RESIDENT_WIDE

    def kernel(resident: int) -> str:
        return f'extern "C" __global__ void __launch_bounds__({grids.BLOCK}, {resident})'

    def body(skip: str, coefficients: list[str], last: str = "") -> str:
        left = iter(coefficients)
        parts = [[next(left) for _ in getattr(kind, "_fields", ())] for kind in types.parts]
        return f"""{{
    Real* const states[] = {{{", ".join(f"state{k}" for k in range(types.n_states))}}};
    const Update c{{{", ".join(f"{{{', '.join(part)}}}" for part in parts)}}};
    step_elements(params, grads, states, size, head, packs, {skip}, [&](Real param, Real grad, auto state) {{
        return update(param, grad, state, c);
    }});{last}
}}"""

    return f"""
struct Update {{ {members} }};

{kernel(resident)} step({buffers}, {", ".join(f"Real {value}" for value in values)}) {body("false", values)}

{kernel(resident - grids.FEWER_CAPTURED)}
step_captured({buffers}, const Real* coefficients, long long* step, const long long* skip)
{body("*skip", stored, count)}
"""

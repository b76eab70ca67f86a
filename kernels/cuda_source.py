"""The CUDA C++ source of a step: ``kernels/step.cu``, the rule translated, and the entries of the kernels.

``step`` takes the coefficients by value. ``step_captured`` reads them from device memory, where
``form_coefficients`` formed them from the step counter and the learning rate there, and counts itself: a
captured CUDA graph replays both. ``set_lr`` changes that learning rate, in stream order.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from . import grids, rules
from .cuda import KernelTypes
from .translation import translate

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

    With 1 to 3 states it has ``step`` and ``step_captured``; with none, ``form_coefficients`` and ``set_lr``.
    """
    loop = Path(__file__).with_name("step.cu").read_text(encoding="utf-8")
    if not types.n_states:
        schedule = [translate(function, {}) for function in (rules.step_size, rules.lr_times_weight_decay)]
        return "\n\n".join([_TYPES[types.dtype.name], loop, *schedule, _CLOCK])
    transforms = (types.conditioning, types.direction, types.decay)
    choices = {
        rules.transform: {kind: rules.TRANSFORMS[kind] for kind in transforms},
        rules.advance: {types.rule: rules.RULES[types.rule]},
        rules.track: {types.average: rules.AVERAGES[types.average]},
        rules.split: {},
        rules.join: {},
    }
    equation = translate(rules.update, choices)
    return "\n\n".join([_TYPES[types.dtype.name], loop, equation, _steps(types)])


_CLOCK = """
extern "C" __global__ void form_coefficients(
    const long long* step, const double* lr, double weight_decay,
    const double* corrections1, long long count1, const double* inverse_corrections2, long long count2,
    Real* coefficients, long long step_size_at, long long inverse_at, long long decay_at) {
    const long long next = *step + 1;
    const double correction1 = corrections1[(next < count1 ? next : count1) - 1];
    coefficients[step_size_at] = rounded(step_size(*lr, correction1));
    coefficients[inverse_at] = rounded(inverse_corrections2[(next < count2 ? next : count2) - 1]);
    coefficients[decay_at] = rounded(lr_times_weight_decay(*lr, weight_decay));
}

extern "C" __global__ void set_lr(double* lr, double value) { *lr = value; }
"""


def _steps(types: KernelTypes) -> str:
    kinds = ["None" if kind is type(None) else kind.__name__ for kind in types.parts]
    members = " ".join(f"{kind} {name};" for kind, name in zip(kinds, rules.Update._fields, strict=True))
    values = [f"c{k}" for k in range(len(types.coefficients))]
    stored = [f"coefficients[{k}]" for k in range(len(types.coefficients))]

    moments = ", ".join(f"Real* state{k}" for k in range(types.n_states))
    grads = "const Real* grads" if types.clear is type(None) else "Real* grads"
    buffers = f"Real* params, {grads}, {moments}, long long size, long long head, long long packs"
    count = "\n    if (blockIdx.x == 0 && threadIdx.x == 0) *step += 1;"
    kernel = f'extern "C" __global__ void __launch_bounds__({grids.BLOCK}, {grids.RESIDENT})'

    def body(coefficients: list[str], last: str = "") -> str:
        left = iter(coefficients)
        parts = [[next(left) for _ in getattr(kind, "_fields", ())] for kind in types.parts]
        return f"""{{
    Real* const states[] = {{{", ".join(f"state{k}" for k in range(types.n_states))}}};
    const Update c{{{", ".join(f"{{{', '.join(part)}}}" for part in parts)}}};
    step_elements(params, grads, states, size, head, packs, [&](Real param, Real grad, auto state) {{
        return update(param, grad, state, c);
    }});{last}
}}"""

    return f"""
struct Update {{ {members} }};

{kernel} step({buffers}, {", ".join(f"Real {value}" for value in values)}) {body(values)}

{kernel} step_captured({buffers}, const Real* coefficients, long long* step) {body(stored, count)}
"""

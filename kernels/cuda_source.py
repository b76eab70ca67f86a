"""The CUDA C++ source of a step: ``kernels/step.cu``, the rule translated, and the entries of the kernels.

``step`` takes the coefficients by value. ``step_captured`` reads them from device memory, where
``form_coefficients`` or ``decide`` formed them from the step counter and the learning rate there, and counts
itself: a captured CUDA graph replays both. ``measure`` is the pass over all gradients for ``decide``;
``set_lr`` changes the learning rate, in stream order.

Where there are units, a step is ``step_units``, or ``step_units_observed``, which has sums of what it sees;
what surrounds it is in ``kernels/rows.cu``. A step of other storage than the dtype of the arithmetic is in
``kernels/stored.cu``, and begins with what :mod:`fastadam.kernels.cuda_stored_source` writes. A step of many
buffers, ``step_tensors``, is in ``kernels/tensors.cu``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from . import cuda_stored_source, grids, rules
from .cuda import STEP_ACROSS, STEP_TENSORS, UNIT_ENTRIES, UNIT_STEPS, KernelTypes
from .translation import Function, translate
from .tree import CHUNK, LANES
from .units import columns_of

OPTIONS = ("--std=c++20",)
"""For NVRTC, which knows C++20 from CUDA 12 on."""

_TYPES = {
    "float32": (
        'using Scalar = float;\n#define SUFFIX "f32"\n#define LETTER "f"\n#define ROUND "cvt.rn.f32.f64"\n'
    ),
    "float64": 'using Scalar = double;\n#define SUFFIX "f64"\n#define LETTER "d"\n#define ROUND "mov.f64"\n',
}


def source_of(entry: str, types: KernelTypes) -> str:
    """Return the source that has a kernel."""
    if entry == STEP_TENSORS:
        return source(types, tensors=True)
    is_observed = entry in {"step_units_observed", STEP_ACROSS}
    units = is_observed or entry in UNIT_STEPS + UNIT_ENTRIES
    return source(types, units=units, observed=is_observed and types.stored is not None)


@cache
def source(types: KernelTypes, *, units: bool = False, observed: bool = False, tensors: bool = False) -> str:
    """Return the source of the kernels for some types, of float32 or float64.

    With a rule it has ``step`` and ``step_captured``; without, the others. With ``units`` it has those of
    ``UNIT_STEPS``, or of ``UNIT_ENTRIES``; of other than plain storage only that which is asked for. With
    ``tensors`` it has that of ``STEP_TENSORS``.
    """
    parts = [_TYPES[types.dtype.name], _read("step.cu")]
    if units or types.rule is type(None):
        parts += [_sizes(), _read("tree.cu")]
    if types.stored is not None:
        parts += [cuda_stored_source.hash_constants(), _read("formats.cu")]
    if types.rule is type(None):
        parts.append(f"using Grad = {cuda_stored_source.name_of(types.grads)};")
        formed = (rules.step_size, rules.lr_times_weight_decay, rules.clip_factor)
        schedule = [*(translate(function, {}) for function in formed), _read("columns.cu")]
        if units:
            return "\n\n".join([*parts, *schedule, _read("rows.cu")])
        return "\n\n".join(
            [*parts, *schedule, f"constexpr double CLIP_EPS = {rules.CLIP_EPS!r};", _read("clock.cu")]
        )
    transforms = (types.conditioning, types.direction, types.decay)
    choices: dict[Function, dict[type, Function]] = {
        rules.transform: {kind: rules.TRANSFORMS[kind] for kind in transforms},
        rules.advance: {types.rule: rules.RULES[types.rule]},
        rules.track: {types.average: rules.AVERAGES[types.average]},
        rules.split: {},
        rules.join: {},
    }
    parts += [f"enum {{ MOMENTS = {types.n_moments} }};", translate(rules.update, choices)]
    if units:
        parts += [translate(rules.vanishes, {}), _read("units.cu")]
    if types.stored is not None:
        in_blocks = bool(types.stored.in_blocks)
        parts += [_read("eight_bits.cu")] if in_blocks else []
        parts += [cuda_stored_source.arrays(types), _read("stored.cu")]
        if in_blocks:
            parts += [cuda_stored_source.foreseen(types), _read("block_scales.cu"), _read("blocks.cu")]
        parts += [_read("blocks_observed.cu")] if in_blocks and observed else []
    if tensors:
        parts.append(_read("tensors.cu"))
        return "\n\n".join([*parts, _tensor_step(types)])
    return "\n\n".join([*parts, _unit_steps(types, observed=observed) if units else _steps(types)])


def _sizes() -> str:
    return f"""constexpr int THREADS = {grids.BLOCK}, TREE_LANES = {LANES};
constexpr long long CHUNK = {CHUNK};
enum {{ RESIDENT = {grids.RESIDENT} }};"""


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _kinds(types: KernelTypes) -> list[str]:
    return ["None" if kind is type(None) else kind.__name__ for kind in types.parts]


def _update(kinds: list[str]) -> str:
    members = " ".join(f"{kind} {name};" for kind, name in zip(kinds, rules.Update._fields, strict=True))
    return f"struct Update {{ {members} }};"


def _braced(types: KernelTypes, values: list[str]) -> list[str]:
    """Return the coefficients of each part of an update, as C++ has a struct of them."""
    left = iter(values)
    parts = [[next(left) for _ in getattr(kind, "_fields", ())] for kind in types.parts]
    return [f"{{{', '.join(part)}}}" for part in parts]


def _buffers(types: KernelTypes) -> str:
    if types.stored is not None:
        return cuda_stored_source.buffers(types)
    grads = "const Real* grads" if types.clear is type(None) else "Real* grads"
    return ", ".join(["Real* params", grads, *(f"Real* state{k}" for k in range(types.n_states))])


def _states(types: KernelTypes) -> str:
    if types.stored is not None:
        return cuda_stored_source.together(types)
    states = ", ".join(f"state{k}" for k in range(types.n_states))
    return f"Real* const states[room<{types.n_states}>] = {{{states}}};"


_COUNT = "if (!*skip && blockIdx.x == 0 && threadIdx.x == 0) *step += 1;"


def _resident(types: KernelTypes) -> int:
    if types.stored is not None:
        return grids.RESIDENT_STORED
    return grids.RESIDENT if types.dtype.itemsize == 4 else grids.RESIDENT_WIDE


def _kernel(resident: int) -> str:
    return f'extern "C" __global__ void __launch_bounds__({grids.BLOCK}, {resident})'


_LOOP = """const auto update_element = [&](Real param, Real grad, auto state) {{
        return update(param, grad, state, c);
    }};
    step_elements<{states}>(params, grads, states, size, head, packs, {skip}, update_element{by});"""
_STORED_LOOP = "step_stored(arrays, size, head, packs, {skip}, rounding, c{by});"
_BLOCK_LOOP = "step_in_blocks(arrays, scales, size, head, packs, {skip}, rounding, c);"
_DECIDED = "const Real* coefficients, long long* step, const long long* skip"


def _steps(types: KernelTypes) -> str:
    values = [f"c{k}" for k in range(len(types.coefficients))]
    stored = [f"coefficients[{k}]" for k in range(len(types.coefficients))]
    layout = "long long size, long long head, long long packs"
    eager, captured = cuda_stored_source.keys(types)
    loop = _LOOP if types.stored is None else _BLOCK_LOOP if types.stored.in_blocks else _STORED_LOOP

    def body(skip: str, keys: str, coefficients: list[str], last: str = "") -> str:
        return f"""{{
    {_states(types)}{keys}
    const Update c{{{", ".join(_braced(types, coefficients))}}};
    {loop.format(skip=skip, states=types.n_states, by="")}{last}
}}"""

    passed = ", ".join(f"Real {value}" for value in values)
    return f"""
{_update(_kinds(types))}

{_kernel(_resident(types))}
step({_buffers(types)}{eager.parameters}, {layout}, {passed}) {body("false", eager.rounding, values)}

{_kernel(_resident(types) - grids.FEWER_CAPTURED)}
step_captured({_buffers(types)}{captured.parameters}, {layout}, {_DECIDED})
{body("*skip", captured.rounding, stored, f"{chr(10)}    {_COUNT}")}
"""


def _of_row(types: KernelTypes, values: list[str]) -> tuple[str, str]:
    """Return what an update is of which the decay and the rule come from a row, and what reads one."""
    kinds, decays, columns = _kinds(types), types.decay is not type(None), len(columns_of(types.rule))
    if decays:
        kinds[2] = f"Perhaps<{kinds[2]}>"
    parts = _braced(types, values)
    parts[2] = "{{row[0]}, row[0] == row[0]}" if decays else "{}"
    parts[3] = f"{{{', '.join(f'row[{k}]' for k in range(1, columns))}}}"
    coefficients = f"""[&](long long at) {{
        const Real* const row = rows + {columns} * at;
        return Update{{{", ".join(parts)}}};
    }}"""
    return _update(kinds), coefficients


def _tensor_step(types: KernelTypes) -> str:
    n, plain = types.n_states, types.stored is None
    passed = [f"c{k}" for k in range(len(getattr(types.conditioning, "_fields", ())))]
    update, coefficients = _of_row(types, passed + [""] * (len(types.coefficients) - len(passed)))
    parameters = "".join(f", Real {value}" for value in passed)
    kinds = ["Param", "Grad", *(f"State{k}" for k in range(n))]
    if plain:
        kinds = ["Real", "const Real", *["Real"] * n]
    names = ["params", "grads", *(f"state{k}" for k in range(n))]
    columns = ["PARAMS_AT", "GRADS_AT", *(f"STATES_AT + {k}" for k in range(n))]
    views = "\n        ".join(
        f"{kind}* const {name} = element<{kind}>(place[{column}], start);"
        for kind, name, column in zip(kinds, names, columns, strict=True)
    )
    loop = (_LOOP if plain else _STORED_LOOP).format(skip="false", states=n, by=", of_block()")
    rounding = "" if plain else cuda_stored_source.keys(types)[0].rounding
    return f"""
{update}

{_kernel(_resident(types) - grids.FEWER_CAPTURED)}
{STEP_TENSORS}(const Piece* pieces, long long count, const long long* places, const Real* rows{parameters}) {{
    const auto coefficients = {coefficients};
    each_piece(pieces, count, [&](long long buffer, long long start, long long length) {{
        const long long* const place = places + (STATES_AT + {n}) * buffer;
        start -= place[FIRST];
        {views}
        {_states(types)}
        const auto [size, head, packs] = layout_of(length, {", ".join(names)});
        const auto c = coefficients(place[ROW]);{rounding}
        {loop}
    }});
}}"""


def _unit_steps(types: KernelTypes, *, observed: bool) -> str:
    update, coefficients = _of_row(types, [f"coefficients[{k}]" for k in range(len(types.coefficients))])
    keys = cuda_stored_source.keys(types)[1]

    def kernel(name: str, fewer: int, tables: str, call: str, *, sums: bool = False) -> str:
        more = ", Sums* sums, long long apart" if sums else ""
        begin = "\n    __shared__ Sums lanes[KINDS][THREADS];" if sums else ""
        count = "" if name == STEP_ACROSS else f"\n    {_COUNT}"
        return f"""
{_kernel(_resident(types) - fewer)}
{name}({_buffers(types)}{keys.parameters}, {tables}, const Real* rows, {_DECIDED}{more}) {{{begin}
    {_states(types)}{keys.rounding}
    {call.format(coefficients)};{count}
}}"""

    captured = "step_units", grids.FEWER_CAPTURED
    watched = "step_units_observed", grids.FEWER_OBSERVED if types.stored is None else grids.FEWER_CAPTURED
    seen = "Observed{{lanes, sums, apart, {{}}}}"
    if types.stored is not None and types.stored.in_blocks:
        tables = "const int* of_block, const long long* pieces, const long long* first_piece, "
        table = "BlockTable{{of_block, pieces, first_piece}}"
        if not observed:
            call = f"step_units_in_blocks(arrays, scales, {table}, size, head, packs, *skip, rounding, {{}})"
            kernels = [kernel(*captured, f"{tables}long long size, long long head, long long packs", call)]
        else:
            tables += "Real* kept, long long across, long long size"
            first = f"arrays, scales, {table}, Across{{{{kept, across}}}}, "
            more, bounds = "size, *skip, rounding, {}", "Table{{bounds, chunks}}, "
            kernels = [
                kernel(STEP_ACROSS, grids.FEWER_CAPTURED, tables, f"step_blocks_across({first}{more})"),
                kernel(
                    *watched,
                    f"{tables}, const long long* bounds, long long chunks",
                    f"step_chunks_in_blocks({first}{bounds}{more}, {seen})",
                    sums=True,
                ),
            ]
        return "\n".join([update, *kernels])
    tables = "const long long* pieces, const long long* first_piece, long long chunks"
    clears = "false" if types.clear is type(None) else "true"
    grad = "const Real" if types.clear is type(None) else "Real"
    elements = f"Elements<{types.n_states}, {grad}>{{{{params, grads, states}}}}"
    if types.stored is not None:
        elements = "StoredElements<decltype(rounding)>{{arrays, rounding}}"
    call = f"step_chunks<{clears}>({elements}, Pieces{{{{pieces, first_piece, chunks}}}}, *skip, {{}}"
    plain = kernel(*captured, tables, f"{call}, Unobserved{{{{}}}})")
    looking = kernel(*watched, tables, f"{call}, {seen})", sums=True)
    kernels = [plain, looking] if types.stored is None else [looking if observed else plain]
    return "\n".join([update, *kernels])

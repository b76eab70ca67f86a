"""The elements of a lane of a warp that steps a block: loaded, stepped, stored, kept, seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from . import formats, rules
from .cuda import KernelTypes
from .cuda_block_views import keep_states, largest_codes, load_states, store_states
from .cuda_seen import make_see_stored
from .cuda_stored_loop import at_place
from .device_storage import StoredTypes
from .storage import at_element, load, load_param, store, store_param, word_of_param
from .tree import LANES

_MAGNITUDES = {np.dtype(np.int8): 127, np.dtype(np.uint8): 255}
"""What bits of a code say whether it is zero."""


class Elements:
    """Device functions on the elements of a lane, for the types of a kernel.

    Those that step return what was seen, and more where the kernel is ``observed``; they set gradients to
    zero as the types say, unless they are ``kept``.
    """

    def __init__(self, kinds: KernelTypes, *, observed: bool = False, kept: bool = False) -> None:
        stored: StoredTypes = kinds.stored  # type: ignore[assignment]
        behind = 2 + len(stored.states)
        master_of = at_place(None if stored.master is None else behind)
        out_of = at_place(None if stored.out is None else behind + (stored.master is not None))
        clears = kinds.clear is not type(None)
        clears_stepped = clears and not kept
        magnitude = _MAGNITUDES.get(stored.states[0])
        see = make_see_stored(magnitude=magnitude, observed=observed)

        def no_words(rounding: Any, i: int) -> None:
            return None

        def words(rounding: Any, i: int) -> Any:
            drawn, at = at_element(rounding, i), np.int64(i)
            first = formats.random_bits(drawn.moments, drawn.first, at)
            return first, formats.random_bits(drawn.params, drawn.first, at)

        words_of = cuda.jit(device=True)(words if stored.rounds else no_words)

        @cuda.jit(device=True)
        def states_of(arrays: Any) -> Any:
            return arrays[2:behind]

        @cuda.jit(device=True)
        def gradient(arrays: Any, k: int, c: Any) -> Any:
            param = load_param(arrays[0], master_of(arrays), k)
            return rules.prepared(param, load(arrays[1], k), c)[1]

        @cuda.jit(device=True)
        def number(arrays: Any, k: int) -> Any:
            return load_param(arrays[0], master_of(arrays), k)

        @cuda.jit(device=True)
        def new_state(arrays: Any, k: int, c: Any, views: Any, checks: Any) -> Any:
            param, state = number(arrays, k), load_states(states_of(arrays), k, views, checks)
            return rules.update(param, load(arrays[1], k), state, c)[1]

        @cuda.jit(device=True)
        def step_one(
            arrays: Any, k: int, i: int, c: Any, rounding: Any, views: Any, checks: Any, seen: Any
        ) -> Any:
            states, master = states_of(arrays), master_of(arrays)
            before, grad = load_param(arrays[0], master, k), load(arrays[1], k)
            state = load_states(states, k, views, checks)
            param, state = rules.update(before, grad, state, c)
            store_states(states, k, state, words_of(rounding, i), views, checks)
            store_param(arrays[0], master, k, param, word_of_param(at_element(rounding, i), i))
            store(out_of(arrays), k, param)
            if clears_stepped:
                arrays[1][k] = 0
            return see(seen, before, grad, arrays[0], master, states, k, c.rule.step_size)

        @cuda.jit(device=True)
        def see_one(arrays: Any, k: int, before: Any, step_size: Any, seen: Any) -> Any:
            grad, states, master = load(arrays[1], k), states_of(arrays), master_of(arrays)
            return see(seen, before, grad, arrays[0], master, states, k, step_size)

        @cuda.jit(device=True)
        def step(
            arrays: Any, i: int, stop: int, c: Any, rounding: Any, views: Any, checks: Any, seen: Any
        ) -> Any:
            while i < stop:
                seen = step_one(arrays, i, i, c, rounding, views, checks, seen)
                i += LANES
            return seen

        @cuda.jit(device=True)
        def keep(arrays: Any, i: int, stop: int, rounding: Any, views: Any, checks: Any) -> None:
            while i < stop:
                keep_states(states_of(arrays), i, words_of(rounding, i), views, checks)
                i += LANES

        @cuda.jit(device=True)
        def largest(arrays: Any, i: int, stop: int) -> Any:
            found = np.uint32(0)
            while i < stop:
                found = np.uint32(found | largest_codes(states_of(arrays), i))
                i += LANES
            return found

        @cuda.jit(device=True)
        def clear(arrays: Any, i: int, stop: int) -> None:
            if clears:
                while i < stop:
                    arrays[1][i] = 0
                    i += LANES

        self.states_of, self.gradient, self.number = states_of, gradient, number
        self.new_state, self.step_one, self.see_one = new_state, step_one, see_one
        self.step, self.keep, self.largest, self.clear = step, keep, largest, clear
        self.observed = observed

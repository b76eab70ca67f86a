"""Steps of moments in 8 bits, in NumPy after the text of :mod:`fastadam.eight_bit`, block by block."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import ml_dtypes
import numpy as np
from segment_steps import slices

from fastadam import eight_bit, precision
from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import relatives, rules
from fastadam.rounding import rounding

BLOCK = 128
F, U = np.float32, np.uint32
UP, OFFSET = F(1 + 2.0**-20), F(2.0**-15)
PER_PEAK, PER_SQUARE = F((1 + 2.0**-20) / (1.875 - 2.0**-15)), F((1 + 2.0**-20) / 1.875)
ABS, FINE, SIGN = U(0x7FFFFFFF), U(0x7FFFFFFC), U(0x80000000)
LEAST, LARGEST = U(0x00800000), U(0x7F088888)
DTYPES = {"float32": F, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def bits(number):
    return np.asarray(number, F).view(U)


def number(word):
    return np.asarray(word, U).view(F)


def base(shift):
    return U(0x40000000) - (U(256) << shift)


# --- The rule, on arrays ------------------------------------------------------------------------------------


def moving(average, value, beta, one_minus_beta):
    if one_minus_beta < beta:
        return average + one_minus_beta * (value - average)
    return value + beta * (average - value)


def prepared(c, param, grad):
    """Return the parameters and the gradients as the rule gets them."""
    conditioning, direction, decay, *_ = c
    if conditioning is not None:
        if hasattr(conditioning, "grad_scale"):
            grad = grad / conditioning.grad_scale
        grad = grad * conditioning.clip_factor
        grad = np.where(grad > conditioning.max_value, conditioning.max_value, grad)
        grad = np.where(grad < -conditioning.max_value, -conditioning.max_value, grad)
    if direction is not None:
        grad = -grad
    if decay is not None:
        if hasattr(decay, "weight_decay"):
            grad = grad + decay.weight_decay * param
        else:
            param = param - decay.lr_times_weight_decay * param
    return param, grad


def advanced(c, param, grad, states):
    """Return the new parameters and states; of a relative of Adam its equation gives them."""
    rule = c.rule
    if not isinstance(rule, rules.Adam):
        moments = tuple(value for name, value in states.items() if name != "param_ema")
        with mock.patch.object(rules, "sqrt", np.sqrt), mock.patch.object(relatives, "sqrt", np.sqrt):
            if type(rule) in relatives.FORESEEN:
                param, new = rules.advance(param, grad, moments, rule)
            else:
                param, *new = one_by_one(rule, param, grad, *moments)
        average = (moving(states["param_ema"], param, *c.average),) if "param_ema" in states else ()
        return param, dict(zip(states, (*new, *average), strict=True))
    first = moving(states["exp_avg"], grad, rule.beta1, rule.one_minus_beta1)
    second = moving(states["exp_avg_sq"], grad * grad, rule.beta2, rule.one_minus_beta2)
    new, divides = {"exp_avg": first, "exp_avg_sq": second}, second
    if "max_exp_avg_sq" in states:
        divides = np.where(states["max_exp_avg_sq"] > second, states["max_exp_avg_sq"], second)
        new["max_exp_avg_sq"] = divides
    param = param - rule.step_size * (first / (np.sqrt(divides * rule.inv_bias_correction2) + rule.eps))
    if "param_ema" in states:
        new["param_ema"] = moving(states["param_ema"], param, *c.average)
    return param, new


def one_by_one(rule, param, grad, *moments):
    """Return the new parameters and states of a rule that chooses for each element."""
    found = np.empty((1 + len(moments), param.size), F)
    for k, (p, g, *state) in enumerate(zip(param, grad, *moments, strict=True)):
        new, moved = rules.advance(p, g, tuple(state), rule)
        found[:, k] = new, *moved
    return found


# --- Codes --------------------------------------------------------------------------------------------------


def encode_first(values, word, random, limited):
    scaled = np.abs(values) * (F(1) / number(word)) + OFFSET
    code = (bits(scaled) + (random & U(0xFFFFF))) >> U(20) & U(127)
    if limited:
        code = np.where(scaled >= F(1.75), U(126), code)
        code = np.where(np.isfinite(values), code, U(127))
    return (code | (bits(values) >> U(24) & U(128))).astype(np.uint8)


def encode_second(values, word, random, limited):
    shift = U(17) + (word & U(3))
    scaled = values * (F(1) / number(word & FINE))
    raised = np.maximum(bits(scaled).view(np.int32), (base(shift) + (U(1) << shift)).view(np.int32)).view(U)
    code = (raised + (random >> (U(32) - shift))) >> shift & U(255)
    code = np.where(values == 0, U(0), code)
    if limited:
        code = np.where(scaled >= F(1.75), U(254), code)
        code = np.where(np.isfinite(values), code, U(255))
    return code.astype(np.uint8)


def bfloat16_codes(values, random):
    """Return bfloat16, by the lower 16 random bits, or to the nearest without."""
    if random is None:
        return values.astype(ml_dtypes.bfloat16)
    code = (bits(values) + (random & U(0xFFFF))) >> U(16)
    code = np.where(np.isnan(values), U(0x7FC0), code)
    return code.astype(np.uint16).view(ml_dtypes.bfloat16)


def random_words(h, step, size):
    """Return the two random words of each element."""
    *keys, first = rounding(h.seed, step, h.offset)
    index = np.arange(size, dtype=np.uint64) + first
    place = index.astype(U) * U(0xC2B2AE3D) + (index >> np.uint64(32)).astype(U) * U(0x27D4EB2F)
    mixed = [place + key for key in keys]
    return [(word ^ word >> U(15)) * U(0xD35A2D97) for word in mixed]


# --- A step -------------------------------------------------------------------------------------------------


class literal_blocks:  # noqa: N801
    """An optimizer with moments of which some are in 8 bits."""

    def __init__(self, params, segments=(), h=None, **options):
        self.h = h = h or AdamHyperparameters(**options)
        self.kinds = dict(zip(h.state, h.formats(), strict=True))
        self.in_blocks = [name for name, kind in self.kinds.items() if kind in precision.IN_BLOCKS]
        self.is_foreseen = h.rule.coefficients in relatives.FORESEEN
        self.parts = slices(segments, params.size)
        self.dtype, self.size, self.step_number = params.dtype, params.size, 0
        self.exact = params.astype(F)
        self.states = {
            name: np.zeros(params.size, np.uint8 if kind in precision.IN_BLOCKS else DTYPES[kind])
            for name, kind in self.kinds.items()
        }
        if h.ema_decay is not None:
            self.states["param_ema"] = self.exact.copy()
        blocks = eight_bit.blocks_of(params.size)
        self.words = {name: np.zeros(blocks, U) for name in self.in_blocks}
        for name, value in h.start().items():
            self.start(name, np.full(params.size, value, F))

    def start(self, name, values):
        """Begin with values of a state."""
        if name not in self.in_blocks:
            self.states[name][:] = values
            return
        dtype = np.dtype(np.int8 if self.has_sign(name) else np.uint8)
        codes, scales = eight_bit.encode(values, dtype)
        self.states[name], self.words[name] = codes.view(np.uint8), scales.view(U)

    def has_sign(self, name):
        return self.kinds[name] == precision.SIGNED_8BIT

    def mask(self, name):
        """Return the bits of a scale that are its own."""
        return ABS if self.has_sign(name) else FINE

    def codes(self, name):
        return self.states[name].view(np.int8) if self.has_sign(name) else self.states[name]

    def decoded(self, name, part):
        """Return the numbers of a part that lies in one block."""
        if name not in self.in_blocks:
            return self.states[name][part].astype(F)
        words = self.words[name][part.start // BLOCK, None]
        return eight_bit.decode(self.codes(name)[part], words.view(F))

    def step(self, grads, **scales):
        self.step_number += 1
        grads = grads.astype(F)
        self.random = [None, None]
        if self.h.rounding == "stochastic":
            self.random = random_words(self.h, self.step_number, self.size)
        pieces = []
        for start, stop, overrides in self.parts:
            c = None
            if overrides is not None:
                c = Coefficients(self.h.changed(**overrides), np.dtype(F)).update(self.step_number, **scales)
            edges = [start, *range(start - start % BLOCK + BLOCK, stop, BLOCK), stop]
            pieces += [(slice(a, b), c) for a, b in pairwise(edges)]
        self.new = self.exact.copy()
        with np.errstate(all="ignore"):
            for block in range(eight_bit.blocks_of(self.size)):
                inside = [piece for piece in pieces if piece[0].start // BLOCK == block]
                if any(c is not None for _, c in inside):
                    self._step_block(block, inside, grads)
            self._store_params()

    def _step_block(self, block, pieces, grads):
        new, prepared_of = {}, {}
        for k, (part, c) in enumerate(pieces):
            if c is None:
                continue
            param, grad = prepared_of[k] = prepared(c, self.exact[part], grads[part])
            states = {name: self.decoded(name, part) for name in self.states}
            self.new[part], new[k] = advanced(c, param, grad, states)
        if self.is_foreseen:
            words, limited = self._new_words(block, pieces, prepared_of)
        else:
            words, limited = self._words_of_new(block, pieces, new)
        encoded, changed = {}, {}
        for name, word in words.items():
            old = self.words[name][block]
            mask = self.mask(name)
            changed[name] = F(1) / number(old & mask) != F(1) / number(word & mask)
            if not self.has_sign(name):
                changed[name] |= old & U(3) != word & U(3)
            changed[name] |= limited and old <= ABS
        for k, (part, c) in enumerate(pieces):
            for name in self.states if c is not None else words:
                values = self.decoded(name, part) if c is None else new[k][name]
                if c is not None or changed[name]:
                    encoded[name, k] = self._encoded(name, values, words.get(name), part, limited)
        for (name, k), codes in encoded.items():
            self.states[name][pieces[k][0]] = codes
        whole = slice(block * BLOCK, (block + 1) * BLOCK)
        for name, word in words.items():
            codes = self.states[name][whole]
            has_largest = ((codes & 127) == 127 if self.has_sign(name) else codes == 255).any()
            self.words[name][block] = word | (SIGN if limited and has_largest else U(0))

    def _words_of_new(self, block, pieces, new):
        """Return the new scales of a block by what its states become, and whether something is not finite."""
        old = {name: words[block] for name, words in self.words.items()}
        stepped = {name: np.concatenate([each[name] for each in new.values()]) for name in old}
        kept = [part for part, c in pieces if c is None]
        left = {name: [abs(self.decoded(name, part)) for part in kept] for name in old}

        def words_of(values):
            found = {}
            for name, each in values.items():
                peak = np.abs(each).max(initial=F(0))
                word = bits(peak * (PER_PEAK if self.has_sign(name) else PER_SQUARE))
                word = word if self.has_sign(name) else word + U(3) & ~U(3)
                found[name] = max(word, LEAST, *[old[name] & self.mask(name)] * bool(kept))
            return found

        words = words_of(stepped)
        are_finite = all(np.isfinite(each).all() for each in stepped.values())
        limited = not are_finite or any(word > LARGEST for word in words.values())
        limited |= any(word > ABS for word in old.values())
        if limited:
            words = words_of({name: each[np.isfinite(each)] for name, each in stepped.items()})
            words = {name: min(word, LARGEST) for name, word in words.items()}
        for name, word in words.items():
            if not self.has_sign(name):
                each = np.concatenate([np.abs(stepped[name]), *left[name]])
                least = each[each > 0].min(initial=F(np.inf)) * (F(1) / number(word))
                span = (U(0x40000000) - bits(least)) >> U(17)
                coarse = sum((U(span > limit) for limit in (254, 508, 1016)), U(0))
                words[name] = word | (U(3) if limited else coarse)
        return words, limited

    def _new_words(self, block, pieces, prepared_of):
        """Return the new scales of a block, and whether something in it is not finite."""
        old = {name: words[block] for name, words in self.words.items()}
        bounds, is_finite = self._bounds(old, pieces, prepared_of, finite_only=False)
        limited = not is_finite or any(word > ABS for word in old.values())
        if limited:
            bounds, _ = self._bounds(old, pieces, prepared_of, finite_only=True)
            bounds = {name: min(word, LARGEST) for name, word in bounds.items()}
        beta2 = min(c.rule.beta2 for _, c in pieces if c is not None)
        for name, word in bounds.items():
            if name != "exp_avg":
                coarse = U(3) if limited else self._coarseness(name, block, word, beta2)
                bounds[name] = word | coarse
        return bounds, limited

    def _bounds(self, old, pieces, prepared_of, *, finite_only):
        bounds, is_finite = dict.fromkeys(old, LEAST), True
        for k, (_, c) in enumerate(pieces):
            found = {name: word & (ABS if name == "exp_avg" else FINE) for name, word in old.items()}
            if c is not None:
                grad = np.abs(prepared_of[k][1])
                if finite_only:
                    grad = grad[np.isfinite(grad * grad)]
                peak = grad.max(initial=F(0))
                rule = c.rule
                first = (rule.beta1 * number(old.get("exp_avg", U(0)) & ABS)) * UP
                first += (rule.one_minus_beta1 * peak) * PER_PEAK
                second = (rule.beta2 * number(old.get("exp_avg_sq", U(0)) & FINE)) * UP
                second += (rule.one_minus_beta2 * (peak * peak)) * PER_SQUARE
                is_finite &= bool(np.isfinite([first, second, peak * peak]).all())
                if is_finite or finite_only:
                    second = bits(second) + U(3) & ~U(3)
                    new = {"exp_avg": bits(first), "exp_avg_sq": second}
                    new["max_exp_avg_sq"] = max(found.get("max_exp_avg_sq", U(0)), second)
                    found = {name: new[name] for name in found}
            bounds = {name: max(word, found[name]) for name, word in bounds.items()}
        return bounds, is_finite and all(word <= LARGEST for word in bounds.values())

    def _coarseness(self, name, block, word, beta2):
        old, codes = self.words[name][block], self.states[name][block * BLOCK : (block + 1) * BLOCK]
        if old == 0:
            return U(3)
        shift = U(17) + (old & U(3))
        least = U(codes[codes > 0].min(initial=255)) if codes.any() else U(256)
        least = number(base(shift) + (least << shift)) * number(old & FINE) * beta2 * (F(1) / number(word))
        span = (U(0x40000000) - bits(least)) >> U(17)
        return sum((U(span > limit) for limit in (254, 508, 1016)), U(0))

    def _encoded(self, name, values, word, part, limited):
        one, other = (None if words is None else words[part] for words in self.random)
        if name == "param_ema" or self.kinds[name] == "float32":
            return values
        place = list(self.states).index(name)
        random = other if place == 2 else one
        if self.kinds[name] == "bfloat16":
            if random is not None and place > 0:
                random = random >> U(16)
            return bfloat16_codes(values, random)
        if random is not None and (place == 0) != self.has_sign(name):  # its halves, exchanged
            random = random >> U(16) | random << U(16)
        if self.has_sign(name):
            return encode_first(values, word, U(1 << 19) if random is None else random, limited)
        return encode_second(values, word, U(1 << 31) if random is None else random, limited)

    def _store_params(self):
        """Store the new parameters: to the nearest, or without a master at random."""
        stepped = np.zeros(self.size, bool)
        for start, stop, overrides in self.parts:
            stepped[start:stop] = overrides is not None
        if self.dtype == ml_dtypes.bfloat16 and self.h.master_params is None:
            stored = bfloat16_codes(self.new, self.random[1])
        else:
            stored = self.new.astype(self.dtype)
        self.exact = np.where(stepped, self.new if self.h.master_params else stored.astype(F), self.exact)
        self.params = self.exact.astype(self.dtype)

    def _without_sign_of_nan(self, name, codes):
        """Return codes; the sign of one of NaN carries nothing."""
        codes = codes.view(np.uint8)
        if not self.has_sign(name):
            return codes
        flagged = np.repeat(self.words[name] > ABS, BLOCK)[: codes.size]
        return np.where(flagged & (codes & 127 == 127), 127, codes).astype(np.uint8)

    def assert_same(self, opt, params, assert_same_bits, what=""):
        """Assert that an optimizer has the same codes, scales and parameters, bit for bit."""
        assert_same_bits(params.astype(F), self.params.astype(F), f"params {what}")
        for k, name in enumerate(self.h.state):
            found = opt.state._views[k]
            if name in self.in_blocks:
                words = opt.state._scales[k].view(U)
                assert_same_bits(words, self.words[name], f"scales of {name} {what}")
                codes = (self._without_sign_of_nan(name, codes) for codes in (found, self.states[name]))
                assert_same_bits(*codes, f"codes of {name} {what}")
            else:
                found = found.view(self.states[name].dtype).astype(F)
                assert_same_bits(found, self.states[name].astype(F), f"{name} {what}")

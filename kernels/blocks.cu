// A step of moments of which some come in blocks of 128 elements that share a scale, as kernels/stored.py takes it on
// the CPU. kernels/cuda_source.py puts kernels/stored.cu and kernels/eight_bits.cu before it.
//
// A warp takes a block at a time, and every lane forms the same scales. Where the buffers are aligned for it, and a
// block is whole, finite, and of one set of coefficients, each lane holds four neighbours in registers: memory traffic
// as that of kernels/stored.cu, with 1 byte for what is stored in 8 bits, and 4 bytes for each scale, read and
// written. All other blocks are read two or three times, from the cache mostly.

constexpr int BLOCK = 128, LANES_OF_WARP = 32;
constexpr long long KEPT = -1;

constexpr unsigned LEAST_SCALE = 0x00800000, LARGEST_SCALE = 0x7F088888;
constexpr unsigned UP = 0x3F800008;          // of 1 + 2**-20
constexpr unsigned PER_PEAK = 0x3F088923;    // of that over 1.875 - 2**-15
constexpr unsigned PER_SQUARE = 0x3F088891;  // of that over 1.875

DEVICE unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }
DEVICE unsigned smaller(unsigned a, unsigned b) { return a < b ? a : b; }
DEVICE unsigned magnitude_bits(Real number) { return bits_of(number) & MAGNITUDE; }

// --- What a warp has in common ---------------------------------------------------------------------------------

constexpr unsigned ALL_LANES = 0xFFFFFFFF;

DEVICE unsigned largest_of_warp(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(ALL_LANES, value);
#else
    for (int apart = 1; apart < LANES_OF_WARP; apart *= 2)
        value = larger(value, __shfl_xor_sync(ALL_LANES, value, apart));
    return value;
#endif
}
DEVICE unsigned least_of_warp(unsigned value) { return ~largest_of_warp(~value); }

// --- Of each state in blocks: bits of the new scale, or of the old one with what it says ------------------------

struct Scales {
    unsigned* of[3];  // a pointer for each state that may be in blocks, null for one that is in none
};
struct Scale3 {
    unsigned of[3];
};
struct Flags {
    bool of[3];
};

template <class Do> DEVICE void for_each_in_blocks(Do act) {
    if constexpr (IN_BLOCKS<State0>) act(0);
    if constexpr (IN_BLOCKS<State1>) act(1);
    if constexpr (IN_BLOCKS<State2>) act(2);
}

DEVICE Scale3 scales_at(const Scales& scales, long long block) {
    Scale3 found{};
    for_each_in_blocks([&](int k) { found.of[k] = scales.of[k][block]; });
    return found;
}

// The old scale, without its flag and without what says how coarse mantissas are.
DEVICE unsigned bare(unsigned word, int state) { return word & (state == 0 ? MAGNITUDE : FINE); }

DEVICE void raise(unsigned& bound, unsigned to) { bound = larger(larger(to, LEAST_SCALE), bound); }

DEVICE Real follows(Real beta, unsigned old, Real one_minus_beta, Real number, unsigned share) {
    return beta * real_of(old) * real_of(UP) + one_minus_beta * number * real_of(share);
}

// To those of elements that are stepped, whose gradients reach `peak`: not finite where the square of that is not.
template <class Rule> DEVICE void raise_to_step(Scale3& bounds, const Scale3& old, unsigned peak, const Rule& rule) {
    const Real number = real_of(peak), square = number * number;
    if constexpr (IN_BLOCKS<State0>) {
        const Real first = follows(rule.beta1, bare(old.of[0], 0), rule.one_minus_beta1, number, PER_PEAK);
        raise(bounds.of[0], bits_of(first + square * real_of(0)));
    }
    if constexpr (IN_BLOCKS<State1>) {
        const unsigned old_bits = bare(old.of[1], 1);
        const unsigned second =
            (bits_of(follows(rule.beta2, old_bits, rule.one_minus_beta2, square, PER_SQUARE)) + 3) & ~3u;
        raise(bounds.of[1], second);
        if constexpr (IN_BLOCKS<State2>) raise(bounds.of[2], larger(bare(old.of[2], 2), second));
    }
}

// To the scales as they are: what is kept of a block needs them.
DEVICE void raise_to_kept(Scale3& bounds, const Scale3& old) {
    for_each_in_blocks([&](int k) { raise(bounds.of[k], bare(old.of[k], k)); });
}

// Whether a block has and gets only finite moments.
DEVICE bool are_finite(const Scale3& bounds, const Scale3& old) {
    bool found = true;
    for_each_in_blocks([&](int k) { found = found && bounds.of[k] <= LARGEST_SCALE && !(old.of[k] & FLAG); });
    return found;
}

// --- Views ------------------------------------------------------------------------------------------------------

struct Views {
    View<State0> of0;
    View<State1> of1;
    View<State2> of2;
};

DEVICE void have(View<Signed>& view, unsigned old, unsigned bound, unsigned, Real, bool) {
    view = {real_of(old & MAGNITUDE), real_of(ONE) / real_of(bound)};
}
// `least` is the least code but zero: the least that a moment that is not zero can become decides how coarse
// mantissas must be.
DEVICE void have(View<Unsigned>& view, unsigned old, unsigned bound, unsigned least, Real beta2, bool is_finite) {
    const Real scale = real_of(old & FINE), inverse = real_of(ONE) / real_of(bound);
    const unsigned shift = SHIFT + (old & COARSEST), base = base_of(shift);
    const unsigned span = (TWO - bits_of(real_of(base + (least << shift)) * scale * beta2 * inverse)) >> SHIFT;
    const unsigned coarse =
        !is_finite || old == 0 ? COARSEST : static_cast<unsigned>(span > 254) + (span > 508) + (span > 1016);
    const unsigned new_shift = SHIFT + coarse;
    view = {scale, inverse, shift, base, new_shift, base_of(new_shift) + (1u << new_shift)};
}
template <class Code> DEVICE void have(View<Code>&, unsigned, unsigned, unsigned, Real, bool) {}

DEVICE Views views_of(const Scale3& old, const Scale3& bounds, const Scale3& least, Real beta2, bool is_finite) {
    Views views;
    have(views.of0, old.of[0], bounds.of[0], least.of[0], beta2, is_finite);
    have(views.of1, old.of[1], bounds.of[1], least.of[1], beta2, is_finite);
    have(views.of2, old.of[2], bounds.of[2], least.of[2], beta2, is_finite);
    return views;
}

// In the order in which codes are small: zero comes last.
DEVICE unsigned ordered(Unsigned number) { return (number.code - 1u) & 255; }
template <class Code> DEVICE unsigned ordered(Code) { return 255; }

DEVICE Scale3 least_codes(unsigned ordered1, unsigned ordered2) {
    Scale3 least{};
    if constexpr (IN_BLOCKS<State1>) least.of[1] = least_of_warp(ordered1) + 1;
    if constexpr (IN_BLOCKS<State2>) least.of[2] = least_of_warp(ordered2) + 1;
    return least;
}

template <class Code> DEVICE unsigned coarseness(const View<Code>&) { return 0; }
DEVICE unsigned coarseness(const View<Unsigned>& view) { return view.new_shift - SHIFT; }

DEVICE bool is_largest(Signed number) { return (number.code & 127) == 127; }
DEVICE bool is_largest(Unsigned number) { return number.code == 255; }
template <class Code> DEVICE bool is_largest(Code) { return false; }

// By one lane, when all of the warp have read them.
DEVICE void set_scales(const Scales& scales, long long block, const Scale3& bounds, const Views& views, Flags flags) {
    __syncwarp();
    if (threadIdx.x % LANES_OF_WARP != 0) return;
    const unsigned coarse[3] = {coarseness(views.of0), coarseness(views.of1), coarseness(views.of2)};
    for_each_in_blocks([&](int k) {
        scales.of[k][block] = bounds.of[k] | coarse[k] | (flags.of[k] ? FLAG : 0);
    });
}

// --- Which elements a lane takes, and what looks at them ----------------------------------------------------------

// Of a whole block four neighbours, of any other piece every 32nd; nothing looks. kernels/blocks_observed.cu has others.
struct Unwatched : Unobserved {
    static constexpr bool CLEARS = true;  // whether gradients are set to zero, if at all
    METHOD Packed<LANES> whole(long long block) const { return {block * BLOCK + threadIdx.x % LANES_OF_WARP * LANES}; }
    METHOD long long first(long long start) const { return start + threadIdx.x % LANES_OF_WARP; }
};

// What is zero if the moment is: of 8 bits the magnitude, without its scale.
template <class Code> DEVICE Real moment_of(Code number) { return decoded(number); }
DEVICE Real moment_of(Signed number) { return real_of((number.code & 127u) << 24); }

// --- Elements of a lane ------------------------------------------------------------------------------------------

struct NotFinite {  // what a block has, and what it gets, that is not
    Flags old;
    bool clamps;
};

template <int N> struct Held {
    Param param[N];
    Gradient grad[N];
    State0 state0[N];
    State1 state1[N];
    State2 state2[N];
    State3 state3[N];
    Master master[N];

    template <class At> METHOD void read_params(const Arrays& arrays, At at) {
        if constexpr (READS_PARAMS) read(arrays.params, at, param);
        if constexpr (IS_THERE<Master>) read(arrays.master, at, master);
    }
    template <class At> METHOD void read_grads(const Arrays& arrays, At at) {
        read_params(arrays, at);
        read(const_cast<const Gradient*>(arrays.grads), at, grad);
    }
    template <class At> METHOD void read_states(const Arrays& arrays, At at) {
        read(arrays.state0, at, state0);
        read(arrays.state1, at, state1);
        if constexpr (IS_THERE<State2>) read(arrays.state2, at, state2);
        if constexpr (IS_THERE<State3>) read(arrays.state3, at, state3);
    }
    METHOD Real number(int k) const { return starts_from(param[k], master[k]); }
    // The gradient of an element as a rule gets it.
    template <class Coefficients> METHOD Real gradient(int k, const Coefficients& c) const {
        return prepared(number(k), decoded(grad[k]), c)._1;
    }
    template <class At, class Rounding, class Coefficients, class Seen>
    METHOD void step(const Arrays& arrays, At at, const Views& views, const NotFinite& bad, Rounding rounding,
                     const Coefficients& c, Seen& seen) {
        Out out[N];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            Real now[STATES];
            now[0] = decoded(state0[k], views.of0, bad.old.of[0]);
            now[1] = decoded(state1[k], views.of1, bad.old.of[1]);
            if constexpr (IS_THERE<State2>) now[2] = decoded(state2[k], views.of2, bad.old.of[2]);
            if constexpr (IS_THERE<State3>) now[3] = decoded(state3[k]);
            const Real before = number(k), given = decoded(grad[k]);
            auto [param_now, state] = update(before, given, pack_state<STATES>(now), c);
            unpack_state(state, now);
            const auto words = rounding.words(at.index(k));
            encode_state(now[0], state0[k], words, 0, views.of0, bad.clamps);
            encode_state(now[1], state1[k], words, 1, views.of1, bad.clamps);
            if constexpr (IS_THERE<State2>) encode_state(now[2], state2[k], words, 2, views.of2, bad.clamps);
            if constexpr (IS_THERE<State3>) encode(now[3], state3[k], Nearest{});
            keep(param_now, param[k], master[k], words.param());
            if constexpr (IS_THERE<Out>) encode(param_now, out[k], Nearest{});
            seen.see(before, given, number(k), moment_of(state0[k]), c.rule.step_size);
        }
        write(arrays.params, at, param);
        if constexpr (IsMutable<Grad>::value && Seen::CLEARS) {
            const Gradient zeros[N]{};
            write(arrays.grads, at, zeros);
        }
        write(arrays.state0, at, state0);
        write(arrays.state1, at, state1);
        if constexpr (IS_THERE<State2>) write(arrays.state2, at, state2);
        if constexpr (IS_THERE<State3>) write(arrays.state3, at, state3);
        if constexpr (IS_THERE<Master>) write(arrays.master, at, master);
        if constexpr (IS_THERE<Out>) write(arrays.out, at, out);
    }
};

// What is kept is written again where the scale changes, or the largest code becomes one of what is not finite.
template <class Code, class Drawn>
DEVICE void rewrite(Code* to, Code& code, const Drawn& words, int state, const View<Code>& view, const NotFinite& bad) {
    if constexpr (IN_BLOCKS<Code>) {
        if (!view.changes() && !(bad.clamps && !bad.old.of[state])) return;
        encode_state(decoded(code, view, bad.old.of[state]), code, words, state, view, bad.clamps);
        *to = code;
    }
}

// --- Blocks ------------------------------------------------------------------------------------------------------

// Steps a whole block of which every element has the coefficients `c`; or writes nothing and returns false, if what is
// not finite is in it.
template <class Rounding, class Coefficients, class Seen>
DEVICE bool step_block(const Arrays& arrays, const Scales& scales, long long block, Rounding rounding,
                       const Coefficients& c, Seen seen) {
    const auto at = seen.whole(block);
    Held<LANES> held{};
    held.read_grads(arrays, at);
    held.read_states(arrays, at);
    const Scale3 old = scales_at(scales, block);
    unsigned peak = 0, ordered1 = 255, ordered2 = 255;
#pragma unroll
    for (int k = 0; k < LANES; ++k) {
        peak = larger(peak, magnitude_bits(held.gradient(k, c)));
        ordered1 = smaller(ordered1, ordered(held.state1[k]));
        ordered2 = smaller(ordered2, ordered(held.state2[k]));
    }
    Scale3 bounds{};
    raise_to_step(bounds, old, largest_of_warp(peak), c.rule);
    if (!are_finite(bounds, old)) return false;
    const Views views = views_of(old, bounds, least_codes(ordered1, ordered2), c.rule.beta2, true);
    held.step(arrays, at, views, NotFinite{}, rounding, c, seen);
    set_scales(scales, block, bounds, views, Flags{});
    return true;
}

struct Piece {
    long long start, stop, row;
};

// Steps any block, of some pieces, each with a row of coefficients or kept as it is.
template <class Pieces, class Rounding, class Coefficients, class Seen>
DEVICE void step_any_block(const Arrays& arrays, const Scales& scales, long long block, long long size, Pieces pieces,
                           Rounding rounding, Coefficients coefficients, Seen seen) {
    const long long start = block * BLOCK, stop = start + BLOCK < size ? start + BLOCK : size;
    const int lane = threadIdx.x % LANES_OF_WARP;
    const Scale3 old = scales_at(scales, block);
    Scale3 bounds;
    Real beta2;
    bool is_usual = false;
#pragma unroll 1
    for (bool finite_only = false;; finite_only = true) {
        bounds = Scale3{}, beta2 = real_of(ONE);
#pragma unroll 1
        for (int k = 0; k < pieces.count(); ++k) {
            const Piece piece = pieces.at(k);
            if (piece.row == KEPT) {
                raise_to_kept(bounds, old);
                continue;
            }
            const auto c = coefficients(piece.row);
            unsigned peak = 0;
#pragma unroll 1
            for (long long i = piece.start + lane; i < piece.stop; i += LANES_OF_WARP) {
                Held<1> held{};
                held.read_grads(arrays, Packed<1>{i});
                const Real grad = held.gradient(0, c);
                if (!finite_only || grad * grad < real_of(INFINITE)) peak = larger(peak, magnitude_bits(grad));
            }
            raise_to_step(bounds, old, largest_of_warp(peak), c.rule);
            beta2 = c.rule.beta2 < beta2 ? c.rule.beta2 : beta2;
        }
        if (finite_only) break;
        is_usual = are_finite(bounds, old);
        if (is_usual) break;
    }
    unsigned ordered1 = 255, ordered2 = 255;
#pragma unroll 1
    for (long long i = start + lane; i < stop; i += LANES_OF_WARP) {
        if constexpr (IN_BLOCKS<State1>) ordered1 = smaller(ordered1, ordered(arrays.state1[i]));
        if constexpr (IN_BLOCKS<State2>) ordered2 = smaller(ordered2, ordered(arrays.state2[i]));
    }
    NotFinite bad{{}, !is_usual};
    for_each_in_blocks([&](int k) {
        bounds.of[k] = is_usual ? bounds.of[k] : smaller(bounds.of[k], LARGEST_SCALE);
        bad.old.of[k] = old.of[k] & FLAG;
    });
    const Views views = views_of(old, bounds, least_codes(ordered1, ordered2), beta2, is_usual);
    Flags is_cut_off{};
#pragma unroll 1
    for (int k = 0; k < pieces.count(); ++k) {
        const Piece piece = pieces.at(k);
        const auto c = coefficients(piece.row == KEPT ? 0 : piece.row);
#pragma unroll 1
        for (long long i = seen.first(piece.start); i < piece.stop; i += LANES_OF_WARP) {
            Held<1> held{};
            held.read_states(arrays, Packed<1>{i});
            if (piece.row != KEPT) {
                held.read_grads(arrays, Packed<1>{i});
                held.step(arrays, Packed<1>{i}, views, bad, rounding, c, seen);
            } else {
                const auto words = rounding.words(i);
                rewrite(arrays.state0 + i, held.state0[0], words, 0, views.of0, bad);
                rewrite(arrays.state1 + i, held.state1[0], words, 1, views.of1, bad);
                if constexpr (IN_BLOCKS<State2>) rewrite(arrays.state2 + i, held.state2[0], words, 2, views.of2, bad);
            }
            is_cut_off.of[0] = is_cut_off.of[0] || is_largest(held.state0[0]);
            is_cut_off.of[1] = is_cut_off.of[1] || is_largest(held.state1[0]);
            is_cut_off.of[2] = is_cut_off.of[2] || is_largest(held.state2[0]);
        }
    }
    for_each_in_blocks([&](int k) { is_cut_off.of[k] = largest_of_warp(is_cut_off.of[k] && bad.clamps) != 0; });
    set_scales(scales, block, bounds, views, is_cut_off);
}

// --- The loops -----------------------------------------------------------------------------------------------------

// The pieces of a block: what of it there is, or those of a table.
struct OnePiece {
    Piece piece;
    METHOD int count() const { return 1; }
    METHOD Piece at(int) const { return piece; }
};
struct TablePieces {
    const long long* table;  // (start, stop, row) each
    int size;
    METHOD int count() const { return size; }
    METHOD Piece at(int k) const { return {table[3 * k], table[3 * k + 1], table[3 * k + 2]}; }
};

DEVICE OnePiece all_of(long long block, long long size, long long row) {
    const long long start = block * BLOCK;
    return {{start, start + BLOCK < size ? start + BLOCK : size, row}};
}

template <class Act> DEVICE void for_each_block(long long size, Act act) {
    const long long warps_of_block = blockDim.x / LANES_OF_WARP, warps = gridDim.x * warps_of_block;
    const long long first = blockIdx.x * warps_of_block + threadIdx.x / LANES_OF_WARP;
#pragma unroll 1
    for (long long block = first; block < (size + BLOCK - 1) / BLOCK; block += warps) act(block);
}

DEVICE void clear(const Arrays& arrays, Piece piece) {
    if constexpr (IsMutable<Grad>::value)
        for (long long i = piece.start + threadIdx.x % LANES_OF_WARP; i < piece.stop; i += LANES_OF_WARP)
            clear(arrays.grads, i);
}

// As `step_stored`: the buffers are aligned for packs from their first elements on, where there are any.
template <class Rounding, class Coefficients>
DEVICE void step_in_blocks(const Arrays& arrays, const Scales& scales, long long size, long long head, long long packs,
                           bool skip, Rounding rounding, const Coefficients& c) {
    for_each_block(size, [&](long long block) {
        const OnePiece all = all_of(block, size, 0);
        if (skip) return clear(arrays, all.piece);
        const bool is_packed = head == 0 && packs > 0 && (block + 1) * BLOCK <= size;
        if (is_packed && step_block(arrays, scales, block, rounding, c, Unwatched{})) return;
        step_any_block(arrays, scales, block, size, all, rounding, [&](long long) { return c; }, Unwatched{});
    });
}

// Which units there are: of each block the row of coefficients, or -1 for none, or -2 - k where it is cut, for the
// pieces from `first[k]` up to, without, `first[k + 1]`.
struct BlockTable {
    const int* of_block;
    const long long* pieces;
    const long long* first;
    METHOD TablePieces pieces_of(long long cut) const {
        return {pieces + 3 * first[cut], static_cast<int>(first[cut + 1] - first[cut])};
    }
};

template <class Rounding, class Coefficients>
DEVICE void step_units_in_blocks(const Arrays& arrays, const Scales& scales, const BlockTable& table, long long size,
                                 long long head, long long packs, bool skip, Rounding rounding,
                                 Coefficients coefficients) {
    for_each_block(size, [&](long long block) {
        const long long row = table.of_block[block];
        if (row == KEPT) return;
        if (row < KEPT) {
            const TablePieces pieces = table.pieces_of(KEPT - 1 - row);
            if (!skip) return step_any_block(arrays, scales, block, size, pieces, rounding, coefficients, Unwatched{});
            for (int k = 0; k < pieces.count(); ++k)
                if (pieces.at(k).row != KEPT) clear(arrays, pieces.at(k));
            return;
        }
        const OnePiece all = all_of(block, size, row);
        if (skip) return clear(arrays, all.piece);
        const bool is_packed = head == 0 && packs > 0 && (block + 1) * BLOCK <= size;
        if (is_packed && step_block(arrays, scales, block, rounding, coefficients(row), Unwatched{})) return;
        step_any_block(arrays, scales, block, size, all, rounding, coefficients, Unwatched{});
    });
}

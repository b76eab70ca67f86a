// A step of states of which some come in blocks of 128 elements that share a scale, as kernels/stored.py takes it on
// the CPU. kernels/cuda_source.py puts kernels/block_scales.cu before it.
//
// A warp takes a block at a time. Where the buffers are aligned for it, and a block is whole, finite, and of one set of
// coefficients, each lane holds four neighbours in registers: memory traffic as that of kernels/stored.cu, with 1 byte
// for what is stored in 8 bits, and 4 bytes for each scale, read and written. Of rules that are not FORESEEN it computes
// the new states twice, first for their scales. All other blocks are read two or three times, from the cache mostly.

// --- Which elements a lane takes, and what looks at them ----------------------------------------------------------

// Of a whole block four neighbours, of any other piece every 32nd; nothing looks. kernels/blocks_observed.cu has others.
struct Unwatched : Unobserved {
    static constexpr bool CLEARS = true;  // whether gradients are set to zero, if at all
    METHOD Packed<LANES> whole(long long block) const { return {block * BLOCK + threadIdx.x % LANES_OF_WARP * LANES}; }
    METHOD long long first(long long start) const { return start + threadIdx.x % LANES_OF_WARP; }
};

// What is zero if the state is: of 8 bits the magnitude, without its scale.
template <class Code> DEVICE Real moment_of(Code number) { return decoded(number); }
DEVICE Real moment_of(Signed number) { return real_of((number.code & 127u) << 24); }
DEVICE Real moment_of(Unsigned number) { return real_of(number.code << 23); }

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
        if constexpr (IS_THERE<State1>) read(arrays.state1, at, state1);
        if constexpr (IS_THERE<State2>) read(arrays.state2, at, state2);
        if constexpr (IS_THERE<State3>) read(arrays.state3, at, state3);
    }
    METHOD Real number(int k) const { return starts_from(param[k], master[k]); }
    // The gradient of an element as a rule gets it.
    template <class Coefficients> METHOD Real gradient(int k, const Coefficients& c) const {
        return prepared(number(k), decoded(grad[k]), c)._1;
    }
    METHOD void decode(int k, const Views& views, const Flags& flags, Real* now) const {
        now[0] = decoded(state0[k], views.of0, flags.of[0]);
        if constexpr (IS_THERE<State1>) now[1] = decoded(state1[k], views.of1, flags.of[1]);
        if constexpr (IS_THERE<State2>) now[2] = decoded(state2[k], views.of2, flags.of[2]);
        if constexpr (IS_THERE<State3>) now[3] = decoded(state3[k]);
    }
    // Returns the new parameter, and sets the states.
    template <class Coefficients>
    METHOD Real updated(int k, const Views& views, const Flags& flags, const Coefficients& c, Real* now) const {
        decode(k, views, flags, now);
        auto [param_now, state] = update(number(k), decoded(grad[k]), pack_state<STATES>(now), c);
        unpack_state(state, now);
        return param_now;
    }
    template <class At, class Rounding, class Coefficients, class Seen>
    METHOD void step(const Arrays& arrays, At at, const Views& views, const NotFinite& bad, Rounding rounding,
                     const Coefficients& c, Seen& seen) {
        Out out[N];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            Real now[STATES];
            const Real before = number(k), param_now = updated(k, views, bad.old, c, now);
            const auto words = rounding.words(at.index(k));
            encode_state(now[0], state0[k], words, 0, views.of0, bad.clamps);
            if constexpr (IS_THERE<State1>) encode_state(now[1], state1[k], words, 1, views.of1, bad.clamps);
            if constexpr (IS_THERE<State2>) encode_state(now[2], state2[k], words, 2, views.of2, bad.clamps);
            if constexpr (IS_THERE<State3>) encode(now[3], state3[k], Nearest{});
            keep(param_now, param[k], master[k], words.param());
            if constexpr (IS_THERE<Out>) encode(param_now, out[k], Nearest{});
            seen.see(before, decoded(grad[k]), number(k), moment_of(state0[k]), c.rule.step_size);
        }
        write(arrays.params, at, param);
        if constexpr (IsMutable<Grad>::value && Seen::CLEARS) {
            const Gradient zeros[N]{};
            write(arrays.grads, at, zeros);
        }
        write(arrays.state0, at, state0);
        if constexpr (IS_THERE<State1>) write(arrays.state1, at, state1);
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

// Of a block of which every element has the coefficients `c`.
template <class Coefficients>
DEVICE Limits limits_of(const Held<LANES>& held, const Scale3& old, const Views& views, const Coefficients& c) {
    Limits limits{};
    if constexpr (FORESEEN) {
        unsigned peak = 0, ordered1 = 255, ordered2 = 255;
#pragma unroll
        for (int k = 0; k < LANES; ++k) {
            peak = larger(peak, magnitude_bits(held.gradient(k, c)));
            ordered1 = smaller(ordered1, ordered(held.state1[k]));
            ordered2 = smaller(ordered2, ordered(held.state2[k]));
        }
        raise_to_step(limits.bounds, old, largest_of_warp(peak), c.rule);
        limits.least = least_left(views, ordered1, ordered2, c.rule.beta2);
    } else {
        Extents extents;
#pragma unroll
        for (int k = 0; k < LANES; ++k) {
            Real now[STATES];
            held.updated(k, views, Flags{}, c, now);
            extents.reach(now, false);
        }
        raise_to_extents(limits, extents);
    }
    return limits;
}

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
    Views views = views_before(old);
    const Limits limits = limits_of(held, old, views, c);
    if (!are_finite(limits.bounds, old)) return false;
    write_by(views, limits, true);
    held.step(arrays, at, views, NotFinite{}, rounding, c, seen);
    set_scales(scales, block, limits.bounds, views, Flags{});
    return true;
}

struct Piece {
    long long start, stop, row;
};

// Of some pieces of a block, each with a row of coefficients or kept as it is; with `bad.clamps` of what is finite.
template <class Pieces, class Coefficients>
DEVICE Limits limits_of(const Arrays& arrays, Piece all, Pieces pieces, const Scale3& old, const Views& views,
                        const NotFinite& bad, Coefficients coefficients) {
    const int lane = threadIdx.x % LANES_OF_WARP;
    Limits limits{};
    Extents extents;
    Real beta2 = real_of(ONE);
#pragma unroll 1
    for (int k = 0; k < pieces.count(); ++k) {
        const Piece piece = pieces.at(k);
        const bool is_kept = piece.row == KEPT;
        if (is_kept) raise_to_kept(limits.bounds, old);
        if (FORESEEN && is_kept) continue;
        const auto c = coefficients(is_kept ? 0 : piece.row);
        unsigned peak = 0;
#pragma unroll 1
        for (long long i = piece.start + lane; i < piece.stop; i += LANES_OF_WARP) {
            Held<1> held{};
            if constexpr (FORESEEN) {
                held.read_grads(arrays, Packed<1>{i});
                const Real grad = held.gradient(0, c);
                if (!bad.clamps || grad * grad < real_of(INFINITE)) peak = larger(peak, magnitude_bits(grad));
            } else {
                Real now[STATES];
                held.read_states(arrays, Packed<1>{i});
                if (is_kept) {
                    held.decode(0, views, bad.old, now);
                    extents.leave(now);
                } else {
                    held.read_grads(arrays, Packed<1>{i});
                    held.updated(0, views, bad.old, c, now);
                    extents.reach(now, bad.clamps);
                }
            }
        }
        if constexpr (FORESEEN) {
            raise_to_step(limits.bounds, old, largest_of_warp(peak), c.rule);
            beta2 = c.rule.beta2 < beta2 ? c.rule.beta2 : beta2;
        }
    }
    if constexpr (FORESEEN) {
        unsigned ordered1 = 255, ordered2 = 255;
#pragma unroll 1
        for (long long i = all.start + lane; i < all.stop; i += LANES_OF_WARP) {
            if constexpr (IN_BLOCKS<State1>) ordered1 = smaller(ordered1, ordered(arrays.state1[i]));
            if constexpr (IN_BLOCKS<State2>) ordered2 = smaller(ordered2, ordered(arrays.state2[i]));
        }
        limits.least = least_left(views, ordered1, ordered2, beta2);
    } else {
        raise_to_extents(limits, extents);
    }
    return limits;
}

// Steps any block, of such pieces.
template <class Pieces, class Rounding, class Coefficients, class Seen>
DEVICE void step_any_block(const Arrays& arrays, const Scales& scales, long long block, long long size, Pieces pieces,
                           Rounding rounding, Coefficients coefficients, Seen seen) {
    const Piece all{block * BLOCK, block * BLOCK + BLOCK < size ? block * BLOCK + BLOCK : size, KEPT};
    const Scale3 old = scales_at(scales, block);
    Views views = views_before(old);
    Limits limits;
    NotFinite bad{};
    for_each_in_blocks([&](int k) { bad.old.of[k] = old.of[k] & FLAG; });
#pragma unroll 1
    for (;; bad.clamps = true) {
        limits = limits_of(arrays, all, pieces, old, views, bad, coefficients);
        if (bad.clamps || are_finite(limits.bounds, old)) break;
    }
    for_each_in_blocks([&](int k) {
        if (bad.clamps) limits.bounds.of[k] = smaller(limits.bounds.of[k], LARGEST_SCALE);
    });
    write_by(views, limits, !bad.clamps);
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
                if constexpr (IN_BLOCKS<State1>) rewrite(arrays.state1 + i, held.state1[0], words, 1, views.of1, bad);
                if constexpr (IN_BLOCKS<State2>) rewrite(arrays.state2 + i, held.state2[0], words, 2, views.of2, bad);
            }
            is_cut_off.of[0] = is_cut_off.of[0] || is_largest(held.state0[0]);
            is_cut_off.of[1] = is_cut_off.of[1] || is_largest(held.state1[0]);
            is_cut_off.of[2] = is_cut_off.of[2] || is_largest(held.state2[0]);
        }
    }
    for_each_in_blocks([&](int k) { is_cut_off.of[k] = largest_of_warp(is_cut_off.of[k] && bad.clamps) != 0; });
    set_scales(scales, block, limits.bounds, views, is_cut_off);
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

// A step over units, each with a row of coefficients, a chunk of a run at a time. kernels/cuda_source.py puts
// kernels/tree.cu before it, and after it the rule in C++ and the kernels' entries.
//
// Memory traffic is that of kernels/step.cu without the elements that no unit covers, and 24 bytes for each piece
// of a unit; `step_units_observed` writes 48 bytes for each chunk. Accesses are of one element: 128 bytes of a
// warp, wherever units begin.

// Which pieces there are: chunk c has those from `first[c]` up to, without, `first[c + 1]`.
struct Pieces {
    const long long* table;  // (start, stop, row) each
    const long long* first;
    long long chunks;
};

// --- What is looked at while it is in registers --------------------------------------------------------------

enum { GRADS, UPDATES, PARAMS, KINDS };

struct Observed {
    Sums (*lanes)[THREADS];
    Sums* sums;  // KINDS arrays, so many sums apart:
    long long apart;
    Sums seen[KINDS];

    METHOD void begin() {
#pragma unroll
        for (int kind = 0; kind < KINDS; ++kind) seen[kind] = {0, 0};
    }
    // Of an element, and what is zero where it has no update.
    METHOD void see(Real before, Real grad, Real after, Real moved_by, Real step_size) {
        const double now = wide(after.value), change = minus(now, wide(before.value));
        seen[GRADS] = plus(seen[GRADS], of_gradient(grad));
        seen[UPDATES] = plus(seen[UPDATES], Sums{times(change, change), vanishes(before, after, moved_by, step_size)});
        seen[PARAMS] = plus(seen[PARAMS], Sums{times(now, now), 0});
    }
    // Every thread of the block comes here.
    METHOD void end(long long chunk, bool is_there) {
        fold(lanes, seen);
        if (threadIdx.x % TREE_LANES != 0 || !is_there) return;
#pragma unroll
        for (int kind = 0; kind < KINDS; ++kind) sums[kind * apart + chunk] = seen[kind];
    }
};

// --- The loop ------------------------------------------------------------------------------------------------

// Steps N elements, so far apart that neighbours are a warp's: all loads before all stores.
template <int N, int STATES, class Grad, class Coefficients, class Seen>
DEVICE void step_some(Real* params, Grad* grads, Real* const* states, long long i, Coefficients c, Seen& seen) {
    Real param[N], grad[N], state[N][room<STATES>];
#pragma unroll
    for (int k = 0; k < N; ++k) {
        param[k] = params[i + k * TREE_LANES], grad[k] = grads[i + k * TREE_LANES];
#pragma unroll
        for (int s = 0; s < STATES; ++s) state[k][s] = states[s][i + k * TREE_LANES];
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
        auto [new_param, new_state] = update(param[k], grad[k], pack_state<STATES>(state[k]), c);
        unpack_state(new_state, state[k]);
        const Real moved_by = MOMENTS > 0 ? state[k][0] : grad[k];
        seen.see(param[k], grad[k], new_param, moved_by, c.rule.step_size);
        param[k] = new_param;
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
        params[i + k * TREE_LANES] = param[k];
        if constexpr (IsMutable<Grad>::value) grads[i + k * TREE_LANES] = Real{};
#pragma unroll
        for (int s = 0; s < STATES; ++s) states[s][i + k * TREE_LANES] = state[k][s];
    }
}

// Buffers that are all of Real.
template <int STATES, class Grad> struct Elements {
    Real* params;
    Grad* grads;
    Real* const* states;
    METHOD void clear(long long i) const {
        if constexpr (IsMutable<Grad>::value) grads[i] = Real{};
    }
    template <int N, class Coefficients, class Seen>
    METHOD void step(long long i, const Coefficients& c, Seen& seen) const {
        step_some<N, STATES>(params, grads, states, i, c, seen);
    }
};

// A warp takes a chunk at a time, and each of its lanes the elements that the tree gives to it, in their order.
// `coefficients(row)` returns those of a row.
template <bool CLEAR, class Stepped, class Coefficients, class Seen>
DEVICE void step_chunks(Stepped elements, Pieces pieces, bool skip, Coefficients coefficients, Seen seen) {
    const int lane = threadIdx.x % TREE_LANES;
    const long long blocks = gridDim.x;
    for (long long first = blockIdx.x * static_cast<long long>(WARPS); first < pieces.chunks; first += blocks * WARPS) {
        const long long chunk = first + threadIdx.x / TREE_LANES;
        const bool is_there = chunk < pieces.chunks;
        const long long* piece = pieces.table + 3 * (is_there ? pieces.first[chunk] : 0);
        const long long* const end = pieces.table + 3 * (is_there ? pieces.first[chunk + 1] : 0);
        const long long start = is_there ? piece[0] : 0;
        seen.begin();
#pragma unroll 1
        for (; piece < end; piece += 3) {
            const long long stop = piece[1];
            long long i = piece[0] + ((lane - (piece[0] - start)) & (TREE_LANES - 1));
            if (skip) {
                if constexpr (CLEAR) for (; i < stop; i += TREE_LANES) elements.clear(i);
                continue;
            }
            const auto c = coefficients(piece[2]);
#pragma unroll 1
            for (; i + (LANES - 1) * TREE_LANES < stop; i += LANES * TREE_LANES)
                elements.template step<LANES>(i, c, seen);
#pragma unroll 1
            for (; i < stop; i += TREE_LANES) elements.template step<1>(i, c, seen);
        }
        seen.end(chunk, is_there);
    }
}

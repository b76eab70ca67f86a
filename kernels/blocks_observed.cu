// A step over units of states in blocks that has sums of what it sees. kernels/cuda_source.py puts kernels/units.cu and
// kernels/blocks.cu before it.
//
// A warp takes a chunk of a run at a time, and that block by block: of each, every lane takes the elements that the tree
// gives to it. A whole block is read once, in accesses of 32 neighbours; others as in kernels/blocks.cu. Memory traffic
// is that of a step without, and 48 bytes for each chunk.
//
// Blocks begin at multiples of 128 elements, chunks where runs do. A block of which two chunks have elements, or more, is
// stepped before all chunks; what its parameters were is kept until these look at it, 512 bytes each, written and read.

// The blocks across chunks: those that are cut of which the first pieces are.
struct Across {
    Real* kept;  // BLOCK for each
    long long count;
    METHOD bool has(long long row) const { return row < KEPT && KEPT - 1 - row < count; }
};

// Looks at nothing, and leaves gradients to those who do.
struct Before : Unwatched {
    static constexpr bool CLEARS = false;
};

struct Watched {
    static constexpr bool CLEARS = true;
    Observed& observed;
    long long origin;  // where the chunk begins
    METHOD long long first(long long start) const {
        return start + ((threadIdx.x % LANES_OF_WARP - (start - origin)) & (LANES_OF_WARP - 1));
    }
    METHOD Apart<LANES> whole(long long block) const { return {first(block * BLOCK)}; }
    METHOD void see(Real before, Real grad, Real after, Real moved_by, Real step_size) {
        observed.see(before, grad, after, moved_by, step_size);
    }
};

template <class Rounding, class Coefficients>
DEVICE void step_blocks_across(const Arrays& arrays, const Scales& scales, const BlockTable& table, Across across,
                               long long size, bool skip, Rounding rounding, Coefficients coefficients) {
    if (skip) return;
    for_each_block(across.count * BLOCK, [&](long long k) {
        const TablePieces pieces = table.pieces_of(k);
        const long long block = pieces.at(0).start / BLOCK;
        const Piece all = all_of(block, size, KEPT).piece;
        for (long long i = all.start + threadIdx.x % LANES_OF_WARP; i < all.stop; i += LANES_OF_WARP) {
            Held<1> held{};
            held.read_params(arrays, Packed<1>{i});
            across.kept[k * BLOCK + i - all.start] = held.number(0);
        }
        __syncwarp();  // other lanes may write them
        step_any_block(arrays, scales, block, size, pieces, rounding, coefficients, Before{});
    });
}

// Looks at those elements of a block across chunks, stepped before, that the chunk has: `start` up to `stop`.
template <class Coefficients>
DEVICE void see_across(const Arrays& arrays, TablePieces pieces, const Real* kept, long long start, long long stop,
                       Coefficients coefficients, Watched seen) {
#pragma unroll 1
    for (int k = 0; k < pieces.count(); ++k) {
        const Piece piece = pieces.at(k);
        if (piece.row == KEPT || piece.start < start || piece.start >= stop) continue;
        const Real step_size = coefficients(piece.row).rule.step_size;
#pragma unroll 1
        for (long long i = seen.first(piece.start); i < piece.stop; i += LANES_OF_WARP) {
            Held<1> held{};
            held.read_grads(arrays, Packed<1>{i});
            read(arrays.state0, Packed<1>{i}, held.state0);
            seen.see(kept[i % BLOCK], decoded(held.grad[0]), held.number(0), moment_of(held.state0[0]), step_size);
            clear(arrays.grads, i);
        }
    }
}

template <class Rounding, class Coefficients>
DEVICE void step_chunks_in_blocks(const Arrays& arrays, const Scales& scales, const BlockTable& table, Across across,
                                  Table chunks, long long size, bool skip, Rounding rounding,
                                  Coefficients coefficients, Observed observed) {
    const long long blocks = gridDim.x;
    for (long long first = blockIdx.x * static_cast<long long>(WARPS); first < chunks.count(); first += blocks * WARPS) {
        const long long chunk = first + threadIdx.x / TREE_LANES;
        const bool is_there = chunk < chunks.count();
        const long long start = is_there ? chunks.start(chunk) : 0, stop = is_there ? chunks.stop(chunk) : 0;
        observed.begin();
        Watched seen{observed, start};
        if (skip) clear(arrays, Piece{start, stop, 0});
#pragma unroll 1
        for (long long block = start / BLOCK; !skip && block * BLOCK < stop; ++block) {
            const long long row = table.of_block[block];
            if (row < KEPT) {
                const TablePieces pieces = table.pieces_of(KEPT - 1 - row);
                if (across.has(row)) {
                    const Real* const kept = across.kept + (KEPT - 1 - row) * BLOCK;
                    see_across(arrays, pieces, kept, start, stop, coefficients, seen);
                } else {
                    step_any_block(arrays, scales, block, size, pieces, rounding, coefficients, seen);
                }
                continue;
            }
            const bool is_whole = (block + 1) * BLOCK <= size;
            if (is_whole && step_block(arrays, scales, block, rounding, coefficients(row), seen)) continue;
            step_any_block(arrays, scales, block, size, all_of(block, size, row), rounding, coefficients, seen);
        }
        observed.end(chunk, is_there);
    }
}

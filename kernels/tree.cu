// Sums over a buffer on the device, by the tree of kernels/norms.py. kernels/cuda_source.py puts kernels/step.cu and
// the sizes before it.

constexpr int WARPS = THREADS / TREE_LANES;

// --- float64, in which nothing is fused ----------------------------------------------------------------------

#ifdef __CUDA_ARCH__
DEVICE double plus(double a, double b) { return __dadd_rn(a, b); }
DEVICE double times(double a, double b) { return __dmul_rn(a, b); }
DEVICE double minus(double a, double b) { return __dsub_rn(a, b); }
DEVICE double over(double a, double b) { return __ddiv_rn(a, b); }
DEVICE double root(double a) { return __dsqrt_rn(a); }
DEVICE double wide(float a) {
    double result;
    asm("cvt.f64.f32 %0, %1;" : "=d"(result) : "f"(a));  // a conversion that is not spelled out would flush
    return result;
}
#else
DEVICE double plus(double a, double b) { return a + b; }
DEVICE double times(double a, double b) { return a * b; }
DEVICE double minus(double a, double b) { return a - b; }
DEVICE double over(double a, double b) { return a / b; }
DEVICE double root(double a) { return __builtin_sqrt(a); }
DEVICE double wide(float a) { return a; }
#endif
DEVICE double wide(double a) { return a; }

// --- The tree ------------------------------------------------------------------------------------------------

struct Sums {
    double squares;
    long long count;
};

DEVICE Sums plus(Sums a, Sums b) { return {plus(a.squares, b.squares), a.count + b.count}; }

// Of an element of the gradient.
DEVICE Sums of_gradient(Real grad) {
    const double value = wide(grad.value);
    return {times(value, value), value - value != 0};
}

// Folds the lanes of each warp, of KINDS sums at once; the first lane has the results. Every thread of the block
// comes here.
template <int KINDS> DEVICE void fold(Sums (*lanes)[THREADS], Sums (&sums)[KINDS]) {
    const int lane = threadIdx.x % TREE_LANES;
    __syncthreads();  // the fold before has read its lanes
#pragma unroll
    for (int kind = 0; kind < KINDS; ++kind) lanes[kind][threadIdx.x] = sums[kind];
#pragma unroll
    for (int width = TREE_LANES / 2; width > 0; width /= 2) {
        __syncthreads();
        if (lane >= width) continue;
#pragma unroll
        for (int kind = 0; kind < KINDS; ++kind)
            lanes[kind][threadIdx.x] = plus(lanes[kind][threadIdx.x], lanes[kind][threadIdx.x + width]);
    }
#pragma unroll
    for (int kind = 0; kind < KINDS; ++kind) sums[kind] = lanes[kind][threadIdx.x];
}

// The chunks of `size` terms, and those of a table: `(start, stop)` each.
struct Even {
    long long size;
    METHOD long long count() const { return (size + CHUNK - 1) / CHUNK; }
    METHOD long long start(long long chunk) const { return chunk * CHUNK; }
    METHOD long long stop(long long chunk) const { return start(chunk) + CHUNK < size ? start(chunk) + CHUNK : size; }
};
struct Table {
    const long long* bounds;
    long long chunks;
    METHOD long long count() const { return chunks; }
    METHOD long long start(long long chunk) const { return bounds[2 * chunk]; }
    METHOD long long stop(long long chunk) const { return bounds[2 * chunk + 1]; }
};

// Writes the sums of chunks of terms, those of blocks `block`, `block + blocks`, ...; a warp takes one at a time.
template <class Chunks, class Term>
DEVICE void sum_chunks(Sums (*lanes)[THREADS], Chunks chunks, long long block, long long blocks, Sums* sums,
                       Term term) {
    for (long long first = block * WARPS; first < chunks.count(); first += blocks * WARPS) {
        const long long chunk = first + threadIdx.x / TREE_LANES;
        const bool is_there = chunk < chunks.count();
        const long long stop = is_there ? chunks.stop(chunk) : 0;
        Sums sum[1]{};
#pragma unroll 8
        for (long long i = (is_there ? chunks.start(chunk) : 0) + threadIdx.x % TREE_LANES; i < stop; i += TREE_LANES)
            sum[0] = plus(sum[0], term(i));
        fold(lanes, sum);
        if (threadIdx.x % TREE_LANES == 0 && is_there) sums[chunk] = sum[0];
    }
}

// Sums what lies at `sums` by the tree, level by level, each behind the one before; one block, all of it. What the
// first thread returns is the result.
DEVICE Sums sum_all(Sums (*lanes)[THREADS], Sums* sums, long long left) {
    while (left > 1) {
        Sums* const to = sums + left;
        sum_chunks(lanes, Even{left}, 0, 1, to, [&](long long i) { return sums[i]; });
        __syncthreads();
        left = Even{left}.count();
        sums = to;
    }
    return left ? *sums : Sums{0, 0};
}

// Of the report of a step, which the host reads when it is asked to.
enum { NORM, CLIP_FACTOR, SKIPPED, NONFINITE, STEP, LR, SCALE, UPDATE_NORM, PARAM_NORM, VANISHED };

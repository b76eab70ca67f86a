// What is decided on the device before a step: the pass over all gradients by the tree of kernels/norms.py, and
// the coefficients of the step. kernels/cuda_source.py puts kernels/step.cu and the sizes before it.
//
// Memory traffic of `measure` in float32: reads 4 n bytes, writes 16 bytes for 2,048 elements.

constexpr int WARPS = THREADS / TREE_LANES;

// --- float64, in which nothing is fused ----------------------------------------------------------------------

#ifdef __CUDA_ARCH__
DEVICE double plus(double a, double b) { return __dadd_rn(a, b); }
DEVICE double times(double a, double b) { return __dmul_rn(a, b); }
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
DEVICE double over(double a, double b) { return a / b; }
DEVICE double root(double a) { return __builtin_sqrt(a); }
DEVICE double wide(float a) { return a; }
#endif
DEVICE double wide(double a) { return a; }

// --- The tree ------------------------------------------------------------------------------------------------

struct Sums {
    double squares;
    long long nonfinite;
};

DEVICE Sums plus(Sums a, Sums b) { return {plus(a.squares, b.squares), a.nonfinite + b.nonfinite}; }

// Sums a chunk in each warp: lane by lane, then the lanes; the first lane has the sum. Every thread of the block
// comes here, with a chunk or without one (start == stop).
template <class Term> DEVICE Sums sum_chunk(Sums* lanes, long long start, long long stop, Term term) {
    const int lane = threadIdx.x % TREE_LANES;
    Sums sum{0, 0};
#pragma unroll 8
    for (long long i = start + lane; i < stop; i += TREE_LANES) sum = plus(sum, term(i));
    __syncthreads();  // the fold of the chunk before has read its lanes
    lanes[threadIdx.x] = sum;
#pragma unroll
    for (int width = TREE_LANES / 2; width > 0; width /= 2) {
        __syncthreads();
        if (lane < width) lanes[threadIdx.x] = plus(lanes[threadIdx.x], lanes[threadIdx.x + width]);
    }
    return lanes[threadIdx.x];
}

// Writes the sums of the chunks of `size` terms, those of blocks `block`, `block + blocks`, ...
template <class Term>
DEVICE void sum_chunks(Sums* lanes, long long size, long long block, long long blocks, Sums* sums, Term term) {
    const long long chunks = (size + CHUNK - 1) / CHUNK;
    for (long long first = block * WARPS; first < chunks; first += blocks * WARPS) {
        const long long chunk = first + threadIdx.x / TREE_LANES;
        const long long start = chunk < chunks ? chunk * CHUNK : size;
        const long long stop = start + CHUNK < size ? start + CHUNK : size;
        const Sums sum = sum_chunk(lanes, start, stop, term);
        if (threadIdx.x % TREE_LANES == 0 && chunk < chunks) sums[chunk] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
measure(const Real* grads, long long size, Sums* sums) {
    __shared__ Sums lanes[THREADS];
    sum_chunks(lanes, size, blockIdx.x, gridDim.x, sums, [&](long long i) {
        const double value = wide(grads[i].value);
        return Sums{times(value, value), value - value != 0};
    });
}

// --- The coefficients of the next step -----------------------------------------------------------------------

// Of the report of a step, which the host reads when it is asked to.
enum { NORM, CLIP_FACTOR, SKIPPED, NONFINITE, STEP, LR };

struct Form {
    const long long* step;
    const double* lrs;
    long long lr_base, lr_count;
    double weight_decay;
    const double* corrections1;
    long long count1;
    const double* inverse_corrections2;
    long long count2;
    Real* coefficients;
    long long step_size_at, inverse_at, decay_at, scale_at, clip_at;
    long long* skip;
    double* report;

    // One thread. Changes nothing but the coefficients, the flag and the report: it may be repeated.
    METHOD void form(double scale, double norm, double clip_factor, long long nonfinite, bool skipped) const {
        const long long taken = *step, at = taken - lr_base;
        const double lr = lrs[at < lr_count ? at : lr_count - 1];
        const double correction1 = corrections1[(taken < count1 ? taken + 1 : count1) - 1];
        coefficients[step_size_at] = rounded(step_size(lr, correction1));
        coefficients[inverse_at] = rounded(inverse_corrections2[(taken < count2 ? taken + 1 : count2) - 1]);
        coefficients[decay_at] = rounded(lr_times_weight_decay(lr, weight_decay));
        coefficients[scale_at] = rounded(scale);
        coefficients[clip_at] = rounded(clip_factor);
        *skip = skipped;
        report[NORM] = norm, report[CLIP_FACTOR] = clip_factor, report[SKIPPED] = skipped;
        report[NONFINITE] = double(nonfinite), report[STEP] = double(skipped ? taken : taken + 1), report[LR] = lr;
    }
};

// A scale of the host, times one of 4 or 8 bytes in device memory, if there is one.
DEVICE double scale_of(double value, const float* narrow, const double* broad, long long bytes) {
    return bytes == 4 ? times(value, wide(*narrow)) : bytes == 8 ? times(value, *broad) : value;
}

#define FORM_PARAMETERS                                                                                          \
    double scale, const float *scale32, const double *scale64, long long scale_bytes, const long long *step,     \
        const double *lrs, long long lr_base, long long lr_count, double weight_decay,                           \
        const double *corrections1, long long count1, const double *inverse_corrections2, long long count2,      \
        Real *coefficients, long long step_size_at, long long inverse_at, long long decay_at,                    \
        long long scale_at, long long clip_at, long long *skip, double *report
#define FORM                                                                                                     \
    Form{step, lrs, lr_base, lr_count, weight_decay, corrections1, count1, inverse_corrections2, count2,         \
         coefficients, step_size_at, inverse_at, decay_at, scale_at, clip_at, skip, report}

extern "C" __global__ void form_coefficients(FORM_PARAMETERS) {
    FORM.form(scale_of(scale, scale32, scale64, scale_bytes), 0, 1, 0, false);
}

// One block. Sums what `measure` left, chunk by chunk, from `sums` to behind it, and decides.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
decide(Sums* sums, long long left, long long clips, double max_norm, long long skips, FORM_PARAMETERS) {
    __shared__ Sums lanes[THREADS];
    Sums* from = sums;
    while (left > 1) {
        Sums* const to = from + left;
        sum_chunks(lanes, left, 0, 1, to, [&](long long i) { return from[i]; });
        __syncthreads();
        left = (left + CHUNK - 1) / CHUNK;
        from = to;
    }
    if (threadIdx.x != 0) return;
    const Sums total = left ? *from : Sums{0, 0};
    const double by = scale_of(scale, scale32, scale64, scale_bytes);
    const double norm = over(root(total.squares), by);
    const double factor = clips ? clip_factor(norm, max_norm, CLIP_EPS, 1.0) : 1.0;
    FORM.form(by, norm, factor, total.nonfinite, skips && total.nonfinite > 0);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
accumulate(Real* total, Real* grads, long long size, long long clear) {
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += threads) {
        total[i] = total[i] + grads[i];
        if (clear) grads[i] = Real{};
    }
}

extern "C" __global__ void set_lr(double* lrs, double value) { *lrs = value; }

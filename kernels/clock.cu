// What is decided on the device before a step: the pass over all gradients, and the coefficients of the step.
// kernels/cuda_source.py puts kernels/tree.cu and how gradients are stored (Grad) before it.
//
// Memory traffic of `measure` in float32: reads 4 n bytes, writes 16 bytes for 2,048 elements.

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
measure(const Grad* grads, long long size, Sums* sums) {
    __shared__ Sums lanes[1][THREADS];
    sum_chunks(lanes, Even{size}, blockIdx.x, gridDim.x, sums, [&](long long i) {
        return of_gradient(decoded(grads[i]));
    });
}

// --- The coefficients of the next step -----------------------------------------------------------------------

struct Form {
    const long long* step;
    const double* lrs;
    long long lr_base, lr_count;
    double weight_decay;
    const Column* columns;
    long long n_columns;
    const double* numbers;
    Real* coefficients;
    long long decay_at, scale_at, clip_at;
    long long* skip;
    double* report;

    METHOD double lr() const {
        const long long at = *step - lr_base;
        return lrs[at < lr_count ? at : lr_count - 1];
    }
    // What follows changes nothing but the coefficients, the flag and the report: it may be repeated.
    //
    // Those of the rule: a thread takes a coefficient at a time.
    METHOD void form_rule() const {
#pragma unroll 1
        for (long long k = threadIdx.x; k < n_columns; k += blockDim.x)
            columns[k].form(coefficients, numbers, lr(), *step);
    }
    // The others. One thread.
    METHOD void form(double scale, double norm, double clip_factor, long long nonfinite, bool skipped) const {
        const long long taken = *step;
        coefficients[decay_at] = rounded(lr_times_weight_decay(lr(), weight_decay));
        coefficients[scale_at] = rounded(scale);
        coefficients[clip_at] = rounded(clip_factor);
        *skip = skipped;
        report[NORM] = norm, report[CLIP_FACTOR] = clip_factor, report[SKIPPED] = skipped;
        report[NONFINITE] = double(nonfinite), report[STEP] = double(skipped ? taken : taken + 1), report[LR] = lr();
        report[SCALE] = scale;
    }
};

// A scale of the host, times one of 4 or 8 bytes in device memory, if there is one.
DEVICE double scale_of(double value, const float* narrow, const double* broad, long long bytes) {
    return bytes == 4 ? times(value, wide(*narrow)) : bytes == 8 ? times(value, *broad) : value;
}

#define FORM_PARAMETERS                                                                                          \
    double scale, const float *scale32, const double *scale64, long long scale_bytes, const long long *step,     \
        const double *lrs, long long lr_base, long long lr_count, double weight_decay, const Column *columns,    \
        long long n_columns, const double *numbers, Real *coefficients, long long decay_at, long long scale_at,  \
        long long clip_at, long long *skip, double *report
#define FORM                                                                                                     \
    Form{step, lrs, lr_base, lr_count, weight_decay, columns, n_columns, numbers,                                \
         coefficients, decay_at, scale_at, clip_at, skip, report}

// One block.
extern "C" __global__ void form_coefficients(FORM_PARAMETERS) {
    const Form form = FORM;
    form.form_rule();
    if (threadIdx.x == 0) form.form(scale_of(scale, scale32, scale64, scale_bytes), 0, 1, 0, false);
}

// One block. Sums what `measure` left, chunk by chunk, from `sums` to behind it, and decides.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
decide(Sums* sums, long long left, long long clips, double max_norm, long long skips, FORM_PARAMETERS) {
    __shared__ Sums lanes[1][THREADS];
    const Form form = FORM;
    form.form_rule();  // while sums are fetched
    const Sums total = sum_all(lanes, sums, left);
    if (threadIdx.x != 0) return;
    const double by = scale_of(scale, scale32, scale64, scale_bytes);
    const double norm = over(root(total.squares), by);
    const double factor = clips ? clip_factor(norm, max_norm, CLIP_EPS, 1.0) : 1.0;
    form.form(by, norm, factor, total.count, skips && total.count > 0);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
accumulate(Real* total, Grad* grads, long long size, long long clear) {
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += threads) {
        total[i] = total[i] + decoded(grads[i]);
        if (clear) grads[i] = Grad{};
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
widen(Real* to, const Grad* from, long long size) {
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += threads)
        to[i] = decoded(from[i]);
}

// The keys of stochastic rounding in the next step, as fastadam/rounding.py forms them. One thread.
extern "C" __global__ void form_keys(long long* keys, const long long* step, long long seed, long long first) {
    unsigned long long bits = static_cast<unsigned long long>(seed) ^ static_cast<unsigned long long>(*step + 1);
    bits += 0x9E3779B97F4A7C15;
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9;
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB;
    keys[0] = static_cast<long long>(bits ^ bits >> 31), keys[1] = first;
}

extern "C" __global__ void set_lr(double* lrs, double value) { *lrs = value; }

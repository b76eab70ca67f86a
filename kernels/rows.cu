// What surrounds a step over units: sums over chunks of runs, the rows of coefficients, and the report of what was
// seen. kernels/cuda_source.py puts kernels/tree.cu and how gradients are stored (Grad) before it.
//
// Memory traffic of `measure_units` in float32: reads 4 bytes of each element of a run, and 16 bytes for each chunk,
// writes 16 bytes for each chunk.

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
measure_units(const Grad* grads, const long long* bounds, long long chunks, Sums* sums) {
    __shared__ Sums lanes[1][THREADS];
    const Table table{bounds, chunks};
    sum_chunks(lanes, table, blockIdx.x, gridDim.x, sums, [&](long long i) {
        return of_gradient(decoded(grads[i]));
    });
}

// One level over `arrays` arrays of sums, `apart` from each other, each to the same place in its own.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
sum_groups(const Sums* from, const long long* groups, long long count, Sums* to, long long arrays, long long apart) {
    __shared__ Sums lanes[1][THREADS];
    for (; arrays > 0; --arrays, from += apart, to += apart)
        sum_chunks(lanes, Table{groups, count}, blockIdx.x, gridDim.x, to, [&](long long i) { return from[i]; });
}

// Coefficients of each row that change from step to step: the decay's is its first, where that is decoupled. Of each
// row, `sources` has which learning rate it has, and `columns` those that the rule has. A thread takes a row at a time.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
form_rows(Real* rows, long long count, long long width, const long long* sources, const double* weight_decays,
          const Column* columns, long long n_columns, const double* numbers, long long decoupled,
          const long long* step, const double* lrs, long long lr_base, long long lr_count) {
    const long long taken = *step, at = taken - lr_base < lr_count ? taken - lr_base : lr_count - 1;
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long k = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; k < count; k += threads) {
        const double lr = lrs[sources[k] * lr_count + at];
        Real* const row = rows + width * k;
#pragma unroll 1
        for (long long j = k * n_columns; j < (k + 1) * n_columns; ++j) columns[j].form(row, numbers, lr, taken);
        if (decoupled) row[0] = rounded(lr_times_weight_decay(lr, weight_decays[k]));
    }
}

// One block, behind a step. Sums what it has seen, of which `sums` has three arrays, `apart` from each other; of a
// step that was skipped the report is whole already.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
conclude(Sums* sums, long long left, long long apart, const long long* skip, double* report) {
    __shared__ Sums lanes[1][THREADS];
    if (*skip) return;
#pragma unroll 1
    for (int kind = 0; kind < 3; ++kind) {
        const Sums total = sum_all(lanes, sums + kind * apart, left);
        if (threadIdx.x != 0) continue;
        const double norm = root(total.squares), count = double(total.count);
        if (kind == 0) report[NORM] = over(norm, report[SCALE]), report[NONFINITE] = count;
        if (kind == 1) report[UPDATE_NORM] = norm, report[VANISHED] = count;
        if (kind == 2) report[PARAM_NORM] = norm;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
clear_units(Grad* grads, const long long* bounds, long long chunks) {
    const long long warps = static_cast<long long>(gridDim.x) * WARPS;
    for (long long k = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / TREE_LANES; k < chunks; k += warps)
        for (long long i = bounds[2 * k] + threadIdx.x % TREE_LANES; i < bounds[2 * k + 1]; i += TREE_LANES)
            grads[i] = Grad{};
}

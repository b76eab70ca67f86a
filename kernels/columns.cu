// Coefficients that are formed for each step, of one set or of a table of them. kernels/cuda_source.py puts it before
// kernels/clock.cu and kernels/rows.cu.

// Its place among the coefficients, whether it is the learning rate over a number or that number, and the table of its
// numbers by step, from the first on; the last is also that of all later steps.
struct Column {
    long long place, is_over_lr, first, count;

    METHOD void form(Real* coefficients, const double* numbers, double lr, long long taken) const {
        const double number = numbers[first + (taken < count ? taken : count - 1)];
        coefficients[place] = rounded(is_over_lr ? step_size(lr, number) : number);
    }
};

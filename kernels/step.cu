// The CUDA C++ side of a step: numbers, tuples, and the loop over a buffer. kernels/cuda_source.py puts before
// it what it is compiled for (Scalar, SUFFIX, LETTER), and after it the rule in C++ and the kernels' entries.
//
// Memory traffic in float32: reads 16 n and writes 12 n bytes with two states, and 4 n more or less with each,
// in 16-byte accesses where the buffers allow it. Buffers must not overlap: the caller checks.

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define METHOD __device__ __forceinline__
#else
#define DEVICE static inline
#define METHOD inline
#endif

// --- Numbers -------------------------------------------------------------------------------------------------

// Rounds to nearest, keeps subnormals, and is never fused, whatever the compiler's flags say: CuPy compiles with
// -ftz=true and NVRTC fuses multiply-adds by default, but neither looks into an instruction that is spelled out.
struct Real {
    Scalar value;
};

#ifdef __CUDA_ARCH__
#define UNARY(name, instruction, portable)                                                      \
    DEVICE Real name(Real a) {                                                                  \
        Real result;                                                                            \
        asm(instruction SUFFIX " %0, %1;" : "=" LETTER(result.value) : LETTER(a.value));        \
        return result;                                                                          \
    }
#define BINARY(symbol, instruction)                                                             \
    DEVICE Real operator symbol(Real a, Real b) {                                               \
        Real result;                                                                            \
        asm(instruction SUFFIX " %0, %1, %2;"                                                   \
            : "=" LETTER(result.value) : LETTER(a.value), LETTER(b.value));                     \
        return result;                                                                          \
    }
#define COMPARISON(symbol, instruction)                                                         \
    DEVICE bool operator symbol(Real a, Real b) {                                               \
        int result;                                                                             \
        asm("{ .reg .pred p; " instruction SUFFIX " p, %1, %2; selp.s32 %0, 1, 0, p; }"         \
            : "=r"(result) : LETTER(a.value), LETTER(b.value));                                 \
        return result;                                                                          \
    }
#else
#define UNARY(name, instruction, portable) DEVICE Real name(Real a) { return {static_cast<Scalar>(portable(a.value))}; }
#define BINARY(symbol, instruction) DEVICE Real operator symbol(Real a, Real b) { return {a.value symbol b.value}; }
#define COMPARISON(symbol, instruction) DEVICE bool operator symbol(Real a, Real b) { return a.value symbol b.value; }
#endif

UNARY(operator-, "neg.", -)
UNARY(sqrt, "sqrt.rn.", __builtin_sqrt)
BINARY(+, "add.rn.")
BINARY(-, "sub.rn.")
BINARY(*, "mul.rn.")
BINARY(/, "div.rn.")
COMPARISON(<, "setp.lt.")
COMPARISON(<=, "setp.le.")
COMPARISON(>, "setp.gt.")
COMPARISON(>=, "setp.ge.")
COMPARISON(==, "setp.eq.")
COMPARISON(!=, "setp.neu.")

DEVICE Real rounded(double number) {
#ifdef __CUDA_ARCH__
    Real result;
    asm(ROUND " %0, %1;" : "=" LETTER(result.value) : "d"(number));
    return result;
#else
    return {static_cast<Scalar>(number)};
#endif
}

// Of a number that is stored as it is.
DEVICE Real decoded(Real number) { return number; }

// --- What is looked at while it is in registers: here nothing, kernels/units.cu has the rest -----------------

struct Unobserved {
    METHOD void see(Real, Real, Real, Real, Real) {}
    METHOD void begin() {}
    METHOD void end(long long, bool) {}
};

// --- Tuples --------------------------------------------------------------------------------------------------

template <class... Values> struct Tuple;
template <> struct Tuple<> {};
template <class A> struct Tuple<A> { A _0; };
template <class A, class B> struct Tuple<A, B> { A _0; B _1; };
template <class A, class B, class C> struct Tuple<A, B, C> { A _0; B _1; C _2; };
template <class A, class B, class C, class D> struct Tuple<A, B, C, D> { A _0; B _1; C _2; D _3; };

template <class... Values> DEVICE Tuple<Values...> tuple(Values... values) { return {values...}; }

// Elements of an array for so many states: there is no array of none.
template <int STATES> constexpr int room = STATES > 0 ? STATES : 1;

template <int STATES> DEVICE auto pack_state(const Real* a) {
    if constexpr (STATES == 0) return tuple();
    else if constexpr (STATES == 1) return tuple(a[0]);
    else if constexpr (STATES == 2) return tuple(a[0], a[1]);
    else if constexpr (STATES == 3) return tuple(a[0], a[1], a[2]);
    else return tuple(a[0], a[1], a[2], a[3]);
}

DEVICE void unpack_state(Tuple<>, Real*) {}
DEVICE void unpack_state(Tuple<Real> state, Real* a) { a[0] = state._0; }
DEVICE void unpack_state(Tuple<Real, Real> state, Real* a) { a[0] = state._0, a[1] = state._1; }
DEVICE void unpack_state(Tuple<Real, Real, Real> state, Real* a) {
    a[0] = state._0, a[1] = state._1, a[2] = state._2;
}
DEVICE void unpack_state(Tuple<Real, Real, Real, Real> state, Real* a) {
    a[0] = state._0, a[1] = state._1, a[2] = state._2, a[3] = state._3;
}

// The moments and the average, which is the last of the state where there is one.

struct None {};

template <class Part> constexpr bool is_there = true;
template <> constexpr bool is_there<None> = false;

template <class... Moments> DEVICE auto split(Tuple<Moments...> state, None) { return tuple(state, None{}); }
template <class A, class Average> requires is_there<Average>
DEVICE auto split(Tuple<A> state, Average) {
    return tuple(tuple(), state._0);
}
template <class A, class B, class Average> requires is_there<Average>
DEVICE auto split(Tuple<A, B> state, Average) {
    return tuple(tuple(state._0), state._1);
}
template <class A, class B, class C, class Average> requires is_there<Average>
DEVICE auto split(Tuple<A, B, C> state, Average) {
    return tuple(tuple(state._0, state._1), state._2);
}
template <class A, class B, class C, class D, class Average> requires is_there<Average>
DEVICE auto split(Tuple<A, B, C, D> state, Average) {
    return tuple(tuple(state._0, state._1, state._2), state._3);
}

template <class Moments> DEVICE auto join(Moments moments, None) { return moments; }
DEVICE auto join(Tuple<>, Real average) { return tuple(average); }
template <class A> DEVICE auto join(Tuple<A> moments, Real average) { return tuple(moments._0, average); }
template <class A, class B> DEVICE auto join(Tuple<A, B> moments, Real average) {
    return tuple(moments._0, moments._1, average);
}
template <class A, class B, class C> DEVICE auto join(Tuple<A, B, C> moments, Real average) {
    return tuple(moments._0, moments._1, moments._2, average);
}

// --- A decay that some rows of coefficients have, and others not ----------------------------------------------

template <class Decay> struct Perhaps {
    Decay decay;
    bool is_there;
};

template <class Decay> DEVICE auto transform(Real param, Real grad, Perhaps<Decay> c) {
    const auto decayed = transform(param, grad, c.decay);
    return tuple(c.is_there ? decayed._0 : param, c.is_there ? decayed._1 : grad);
}

// --- The loop ------------------------------------------------------------------------------------------------

constexpr int LANES = 16 / sizeof(Scalar);

template <class Value> struct IsMutable { static constexpr bool value = true; };
template <class Value> struct IsMutable<const Value> { static constexpr bool value = false; };

struct alignas(16) Pack {
    Real lane[LANES];
};

// Which one a thread is of those that share a buffer.
struct Threads {
    long long mine, count;
};
DEVICE Threads of_grid() {
    const long long block = blockIdx.x, blocks = gridDim.x;
    return {block * blockDim.x + threadIdx.x, blocks * blockDim.x};
}
DEVICE Threads of_block() { return {threadIdx.x, blockDim.x}; }

// Updates [head, head + packs * LANES) in packs, and the elements before and after one by one. Where the buffers
// are not aligned to 16 bytes together, packs is 0. Any number of threads makes the same bits: no element knows
// of another. Gradients that are not const are set to zero, also where the step is skipped.
template <int STATES, class Grad, class Update>
DEVICE void step_elements(Real* params, Grad* grads, Real* const* states, long long size, long long head,
                          long long packs, bool skip, Update update_element, Threads by = of_grid()) {
    constexpr bool CLEAR = IsMutable<Grad>::value;
    const auto [thread, threads] = by;

    if (skip) {
        if constexpr (CLEAR) for (long long i = thread; i < size; i += threads) grads[i] = Real{};
        return;
    }

#pragma unroll 1
    for (long long k = thread; k < packs; k += threads) {
        const long long i = head + k * LANES;
        Pack param = *reinterpret_cast<const Pack*>(params + i);
        const Pack grad = *reinterpret_cast<const Pack*>(grads + i);
        Pack state[room<STATES>];
#pragma unroll
        for (int s = 0; s < STATES; ++s) state[s] = *reinterpret_cast<const Pack*>(states[s] + i);
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
            Real now[room<STATES>];
#pragma unroll
            for (int s = 0; s < STATES; ++s) now[s] = state[s].lane[lane];
            auto [new_param, new_state] = update_element(param.lane[lane], grad.lane[lane], pack_state<STATES>(now));
            unpack_state(new_state, now);
            param.lane[lane] = new_param;
#pragma unroll
            for (int s = 0; s < STATES; ++s) state[s].lane[lane] = now[s];
        }
        *reinterpret_cast<Pack*>(params + i) = param;
        if constexpr (CLEAR) *reinterpret_cast<Pack*>(grads + i) = Pack{};
#pragma unroll
        for (int s = 0; s < STATES; ++s) *reinterpret_cast<Pack*>(states[s] + i) = state[s];
    }

#pragma unroll 1
    for (long long k = thread; k < size - packs * LANES; k += threads) {
        const long long i = k < head ? k : k + packs * LANES;
        Real now[room<STATES>];
#pragma unroll
        for (int s = 0; s < STATES; ++s) now[s] = states[s][i];
        auto [new_param, new_state] = update_element(params[i], grads[i], pack_state<STATES>(now));
        unpack_state(new_state, now);
        params[i] = new_param;
        if constexpr (CLEAR) grads[i] = Real{};
#pragma unroll
        for (int s = 0; s < STATES; ++s) states[s][i] = now[s];
    }
}

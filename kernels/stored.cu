// A step of buffers that are not all of float32. kernels/cuda_source.py puts kernels/formats.cu, the rule in C++, and
// how each buffer is stored before it: Param, Grad, State0 to State3, Master, Out; None for what is not there.
//
// Memory traffic: that of kernels/step.cu with 2 bytes in place of 4 for what is stored in 16 bits; a master is read
// and written, a copy of the parameters written. A pack has four elements, in 8 or in 16 bytes.

struct Arrays {
    Param* params;
    Grad* grads;
    State0* state0;
    State1* state1;
    State2* state2;
    State3* state3;
    Master* master;
    Out* out;
};

// --- Elements that a thread takes together: neighbours, aligned for one access, or those of a lane of a warp --

template <int COUNT> struct Packed {
    static constexpr int N = COUNT;
    long long i;
    METHOD long long index(int k) const { return i + k; }
};
template <int COUNT> struct Apart {
    static constexpr int N = COUNT;
    long long i;
    METHOD long long index(int k) const { return i + k * 32; }
};

template <class Code, int N> struct alignas(N * sizeof(Code)) Codes {
    Code lane[N];
};

template <class Code, int N> DEVICE void read(const Code* from, Packed<N> at, Code (&to)[N]) {
    const Codes<Code, N> codes = *reinterpret_cast<const Codes<Code, N>*>(from + at.i);
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = codes.lane[k];
}
template <class Code, int N> DEVICE void read(const Code* from, Apart<N> at, Code (&to)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = from[at.index(k)];
}
template <class Code, int N> DEVICE void write(Code* to, Packed<N> at, const Code (&from)[N]) {
    Codes<Code, N> codes;
#pragma unroll
    for (int k = 0; k < N; ++k) codes.lane[k] = from[k];
    *reinterpret_cast<Codes<Code, N>*>(to + at.i) = codes;
}
template <class Code, int N> DEVICE void write(Code* to, Apart<N> at, const Code (&from)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) to[at.index(k)] = from[k];
}

template <class Code> struct Plain { using Type = Code; };
template <class Code> struct Plain<const Code> { using Type = Code; };
using Gradient = typename Plain<Grad>::Type;

DEVICE void clear(Gradient* grads, long long i) { grads[i] = Gradient{}; }
DEVICE void clear(const Gradient*, long long) {}

// --- What a parameter is, and becomes ------------------------------------------------------------------------

template <class Code> DEVICE Real starts_from(Code param, None) { return decoded(param); }
template <class Code> DEVICE Real starts_from(Code, Real master) { return master; }
DEVICE Real starts_from(Bfloat16 param, Remainder rest) { return joined(param, rest); }

template <class Code, class How> DEVICE void keep(Real number, Code& param, None&, How how) {
    encode(number, param, how);
}
template <class Code, class How> DEVICE void keep(Real number, Code& param, Real& master, How) {
    master = number;
    encode(number, param, Nearest{});
}
template <class How> DEVICE void keep(Real number, Bfloat16& param, Remainder& rest, How) { halve(number, param, rest); }

template <class Code> constexpr bool IS_THERE = is_there<Code>;
constexpr bool READS_PARAMS = !(IS_THERE<Master> && sizeof(Master) == sizeof(Real));
constexpr int STATES = IS_THERE<State0> + IS_THERE<State1> + IS_THERE<State2> + IS_THERE<State3>;

// What is zero where an element has no update: its first moment, or the gradient where there is none.
template <class Code> DEVICE Real moved_by(Code state0, Real grad) {
    if constexpr (MOMENTS > 0) return decoded(state0);
    else return grad;
}

// --- The loop ------------------------------------------------------------------------------------------------

// All loads before all stores.
template <class At, class Rounding, class Coefficients, class Seen>
DEVICE void step_some(const Arrays& arrays, At at, Rounding rounding, const Coefficients& c, Seen& seen) {
    constexpr int N = At::N;
    Param param[N]{};
    Gradient grad[N];
    State0 state0[N];
    State1 state1[N];
    State2 state2[N];
    State3 state3[N];
    Master master[N];
    Out out[N];
    if constexpr (READS_PARAMS) read(arrays.params, at, param);
    read(const_cast<const Gradient*>(arrays.grads), at, grad);
    if constexpr (IS_THERE<State0>) read(arrays.state0, at, state0);
    if constexpr (IS_THERE<State1>) read(arrays.state1, at, state1);
    if constexpr (IS_THERE<State2>) read(arrays.state2, at, state2);
    if constexpr (IS_THERE<State3>) read(arrays.state3, at, state3);
    if constexpr (IS_THERE<Master>) read(arrays.master, at, master);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        Real now[room<STATES>];
        if constexpr (IS_THERE<State0>) now[0] = decoded(state0[k]);
        if constexpr (IS_THERE<State1>) now[1] = decoded(state1[k]);
        if constexpr (IS_THERE<State2>) now[2] = decoded(state2[k]);
        if constexpr (IS_THERE<State3>) now[3] = decoded(state3[k]);
        const Real before = starts_from(param[k], master[k]), given = decoded(grad[k]);
        auto [number, state] = update(before, given, pack_state<STATES>(now), c);
        unpack_state(state, now);
        const auto words = rounding.words(at.index(k));
        if constexpr (IS_THERE<State0>) encode(now[0], state0[k], words.first());
        if constexpr (IS_THERE<State1>) encode(now[1], state1[k], words.second());
        if constexpr (IS_THERE<State2>) encode(now[2], state2[k], words.third());
        if constexpr (IS_THERE<State3>) encode(now[3], state3[k], Nearest{});  // an average: never rounded
        keep(number, param[k], master[k], words.param());
        if constexpr (IS_THERE<Out>) encode(number, out[k], Nearest{});
        const Real after = starts_from(param[k], master[k]);
        seen.see(before, given, after, moved_by(state0[k], given), c.rule.step_size);
    }
    write(arrays.params, at, param);
    if constexpr (IsMutable<Grad>::value) {
        const Gradient zeros[N]{};
        write(arrays.grads, at, zeros);
    }
    if constexpr (IS_THERE<State0>) write(arrays.state0, at, state0);
    if constexpr (IS_THERE<State1>) write(arrays.state1, at, state1);
    if constexpr (IS_THERE<State2>) write(arrays.state2, at, state2);
    if constexpr (IS_THERE<State3>) write(arrays.state3, at, state3);
    if constexpr (IS_THERE<Master>) write(arrays.master, at, master);
    if constexpr (IS_THERE<Out>) write(arrays.out, at, out);
}

// As `step_elements` in kernels/step.cu.
template <class Rounding, class Coefficients>
DEVICE void step_stored(const Arrays& arrays, long long size, long long head, long long packs, bool skip,
                        Rounding rounding, const Coefficients& c, Threads by = of_grid()) {
    const auto [thread, threads] = by;

    if (skip) {
        if constexpr (IsMutable<Grad>::value) for (long long i = thread; i < size; i += threads) clear(arrays.grads, i);
        return;
    }
    Unobserved seen;
#pragma unroll 1
    for (long long k = thread; k < packs; k += threads)
        step_some(arrays, Packed<LANES>{head + k * LANES}, rounding, c, seen);
#pragma unroll 1
    for (long long k = thread; k < size - packs * LANES; k += threads)
        step_some(arrays, Packed<1>{k < head ? k : k + packs * LANES}, rounding, c, seen);
}

// What a step over units steps.
template <class Rounding> struct StoredElements {
    Arrays arrays;
    Rounding rounding;
    METHOD void clear(long long i) const { ::clear(arrays.grads, i); }
    template <int N, class Coefficients, class Seen>
    METHOD void step(long long i, const Coefficients& c, Seen& seen) const {
        step_some(arrays, Apart<N>{i}, rounding, c, seen);
    }
};

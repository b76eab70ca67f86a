// The scales of blocks of 128 elements: how a block is read and written, and the bounds that become its scales, as
// kernels/views.py and kernels/bounds.py have them. kernels/cuda_source.py puts kernels/stored.cu, kernels/eight_bits.cu
// and whether the rule is FORESEEN before it. A warp takes a block, and every lane forms the same scales.

constexpr int BLOCK = 128, LANES_OF_WARP = 32;
constexpr long long KEPT = -1;

constexpr unsigned LEAST_SCALE = 0x00800000, LARGEST_SCALE = 0x7F088888;
constexpr unsigned UP = 0x3F800008;          // of 1 + 2**-20
constexpr unsigned PER_PEAK = 0x3F088923;    // of that over 1.875 - 2**-15
constexpr unsigned PER_SQUARE = 0x3F088891;  // of that over 1.875

DEVICE unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }
DEVICE unsigned smaller(unsigned a, unsigned b) { return a < b ? a : b; }
DEVICE unsigned magnitude_bits(Real number) { return bits_of(number) & MAGNITUDE; }

// --- What a warp has in common ---------------------------------------------------------------------------------

constexpr unsigned ALL_LANES = 0xFFFFFFFF;

DEVICE unsigned largest_of_warp(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(ALL_LANES, value);
#else
    for (int apart = 1; apart < LANES_OF_WARP; apart *= 2)
        value = larger(value, __shfl_xor_sync(ALL_LANES, value, apart));
    return value;
#endif
}
DEVICE unsigned least_of_warp(unsigned value) { return ~largest_of_warp(~value); }

// --- Of each state in blocks: bits of the new scale, or of the old one with what it says ------------------------

struct Scales {
    unsigned* of[3];  // a pointer for each state that may be in blocks, null for one that is in none
};
struct Scale3 {
    unsigned of[3];
};
struct Flags {
    bool of[3];
};

template <class Do> DEVICE void for_each_in_blocks(Do act) {
    if constexpr (IN_BLOCKS<State0>) act(0);
    if constexpr (IN_BLOCKS<State1>) act(1);
    if constexpr (IN_BLOCKS<State2>) act(2);
}

DEVICE Scale3 scales_at(const Scales& scales, long long block) {
    Scale3 found{};
    for_each_in_blocks([&](int k) { found.of[k] = scales.of[k][block]; });
    return found;
}

DEVICE bool is_signed(int state) {
    return state == 0 ? IS_SIGNED<State0> : state == 1 ? IS_SIGNED<State1> : IS_SIGNED<State2>;
}

// The old scale, without its flag and without what says how coarse mantissas are.
DEVICE unsigned bare(unsigned word, int state) { return word & (is_signed(state) ? MAGNITUDE : FINE); }

DEVICE void raise(unsigned& bound, unsigned to) { bound = larger(larger(to, LEAST_SCALE), bound); }

// To the scales as they are: what is kept of a block needs them.
DEVICE void raise_to_kept(Scale3& bounds, const Scale3& old) {
    for_each_in_blocks([&](int k) { raise(bounds.of[k], bare(old.of[k], k)); });
}

// Whether a block has and gets only what is finite.
DEVICE bool are_finite(const Scale3& bounds, const Scale3& old) {
    bool found = true;
    for_each_in_blocks([&](int k) { found = found && bounds.of[k] <= LARGEST_SCALE && !(old.of[k] & FLAG); });
    return found;
}

// --- Views ------------------------------------------------------------------------------------------------------

struct Views {
    View<State0> of0;
    View<State1> of1;
    View<State2> of2;
};

DEVICE Views views_before(const Scale3& old) {
    Views views;
    views.of0.read_by(old.of[0]);
    views.of1.read_by(old.of[1]);
    views.of2.read_by(old.of[2]);
    return views;
}

// Of new states in blocks: bounds that become scales, and bits of the least but zero of those without a sign.
struct Limits {
    Scale3 bounds, least;
};

DEVICE void write_by(Views& views, const Limits& limits, bool is_finite) {
    views.of0.write_by(limits.bounds.of[0], limits.least.of[0], is_finite);
    views.of1.write_by(limits.bounds.of[1], limits.least.of[1], is_finite);
    views.of2.write_by(limits.bounds.of[2], limits.least.of[2], is_finite);
}

template <class Code> DEVICE unsigned coarseness(const View<Code>&) { return 0; }
DEVICE unsigned coarseness(const View<Unsigned>& view) { return view.new_shift - SHIFT; }

DEVICE bool is_largest(Signed number) { return (number.code & 127) == 127; }
DEVICE bool is_largest(Unsigned number) { return number.code == 255; }
template <class Code> DEVICE bool is_largest(Code) { return false; }

// By one lane, when all of the warp have read them.
DEVICE void set_scales(const Scales& scales, long long block, const Scale3& bounds, const Views& views, Flags flags) {
    __syncwarp();
    if (threadIdx.x % LANES_OF_WARP != 0) return;
    const unsigned coarse[3] = {coarseness(views.of0), coarseness(views.of1), coarseness(views.of2)};
    for_each_in_blocks([&](int k) {
        scales.of[k][block] = bounds.of[k] | coarse[k] | (flags.of[k] ? FLAG : 0);
    });
}

// --- Limits of rules that are foreseen: by the largest gradient, and the least share of an old second moment -------

DEVICE Real follows(Real beta, unsigned old, Real one_minus_beta, Real number, unsigned share) {
    return beta * real_of(old) * real_of(UP) + one_minus_beta * number * real_of(share);
}

// Raises bounds to those of elements that are stepped, whose gradients reach `peak`: not finite where the square of that
// is not.
template <class Rule> DEVICE void raise_to_step(Scale3& bounds, const Scale3& old, unsigned peak, const Rule& rule) {
    const Real number = real_of(peak), square = number * number;
    if constexpr (IN_BLOCKS<State0>) {
        const Real first = follows(rule.beta1, bare(old.of[0], 0), rule.one_minus_beta1, number, PER_PEAK);
        raise(bounds.of[0], bits_of(first + square * real_of(0)));
    }
    if constexpr (IN_BLOCKS<State1>) {
        const unsigned old_bits = bare(old.of[1], 1);
        const unsigned second =
            (bits_of(follows(rule.beta2, old_bits, rule.one_minus_beta2, square, PER_SQUARE)) + 3) & ~3u;
        raise(bounds.of[1], second);
        if constexpr (IN_BLOCKS<State2>) raise(bounds.of[2], larger(bare(old.of[2], 2), second));
    }
}

// In the order in which codes are small: zero comes last.
DEVICE unsigned ordered(Unsigned number) { return (number.code - 1u) & 255; }
template <class Code> DEVICE unsigned ordered(Code) { return 255; }

// In a block that was never stepped nothing is: what comes could lie anywhere.
DEVICE unsigned least_left(const View<Unsigned>& view, unsigned ordered, Real beta2) {
    return bits_of(real_of(view.base + ((least_of_warp(ordered) + 1) << view.shift)) * view.scale * beta2);
}
template <class Code> DEVICE unsigned least_left(const View<Code>&, unsigned, Real) { return 0; }

DEVICE Scale3 least_left(const Views& views, unsigned ordered1, unsigned ordered2, Real beta2) {
    return {{0, least_left(views.of1, ordered1, beta2), least_left(views.of2, ordered2, beta2)}};
}

// --- Limits of all other rules: by the new states of a lane ---------------------------------------------------------

struct Extents {
    Scale3 largest{};  // bits of the largest magnitude
    Scale3 before{{MAGNITUDE - 1, MAGNITUDE - 1, MAGNITUDE - 1}};  // of the least but zero, less 1: zero comes last
    METHOD void leave(const Real* states) {
        for_each_in_blocks([&](int k) {
            if (!is_signed(k)) before.of[k] = smaller(before.of[k], magnitude_bits(states[k]) - 1);
        });
    }
    METHOD void reach(const Real* states, bool finite_only) {
        leave(states);
        for_each_in_blocks([&](int k) {
            const unsigned bits = magnitude_bits(states[k]);
            if (!finite_only || bits < INFINITE) largest.of[k] = larger(largest.of[k], bits);
        });
    }
};

DEVICE void raise_to_extents(Limits& limits, const Extents& extents) {
    for_each_in_blocks([&](int k) {
        const Real largest = real_of(largest_of_warp(extents.largest.of[k]));
        unsigned bound = bits_of(largest * real_of(is_signed(k) ? PER_PEAK : PER_SQUARE));
        if (!is_signed(k)) {
            bound = (bound + 3) & ~3u;
            limits.least.of[k] = least_of_warp(extents.before.of[k]) + 1;
        }
        raise(limits.bounds.of[k], bound);
    });
}

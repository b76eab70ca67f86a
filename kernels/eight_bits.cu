// How float32 numbers become codes of 8 bits and back, as kernels/eight_bits.py has it, in units of the scale that a
// block of them shares. kernels/cuda_source.py puts kernels/formats.cu before it.

struct Signed { unsigned char code; };    // a sign and a magnitude
struct Unsigned { unsigned char code; };  // of what is never negative

constexpr unsigned MAGNITUDE = 0x7FFFFFFF, FLAG = 0x80000000, FINE = 0x7FFFFFFC;
constexpr unsigned OFFSET = 0x38000000, TWO = 0x40000000, ONE = 0x3F800000;  // bits of 2**-15, 2 and 1
constexpr unsigned LARGEST = 0x3FE00000;  // of 1.75, from which on what is finite is cut off where something is not
constexpr unsigned SHIFT = 17, COARSEST = 3;

template <class Code> constexpr bool IN_BLOCKS = false;
template <> constexpr bool IN_BLOCKS<Signed> = true;
template <> constexpr bool IN_BLOCKS<Unsigned> = true;
template <class Code> constexpr bool IS_SIGNED = false;
template <> constexpr bool IS_SIGNED<Signed> = true;

DEVICE unsigned base_of(unsigned shift) { return TWO - (256u << shift); }

// How a block is read, by the bits of its scale; and written, by those of a bound that becomes its scale and of the
// least of its numbers but zero, which decides how coarse mantissas must be.
template <class Code> struct View {  // of what is in none
    METHOD void read_by(unsigned) {}
    METHOD void write_by(unsigned, unsigned, bool) {}
};
template <> struct View<Signed> {
    Real scale, inverse;  // of the old scale; of the new one
    METHOD void read_by(unsigned word) { scale = real_of(word & MAGNITUDE); }
    METHOD void write_by(unsigned bound, unsigned, bool) { inverse = real_of(ONE) / real_of(bound); }
    METHOD bool changes() const { return real_of(ONE) / scale != inverse; }
};
template <> struct View<Unsigned> {
    Real scale, inverse;
    unsigned shift, base;       // base: bits of what code 0 would be, were it not zero
    unsigned new_shift, least;  // least: bits of what code 1 will be
    METHOD void read_by(unsigned word) {
        scale = real_of(word & FINE);
        shift = SHIFT + (word & COARSEST);
        base = base_of(shift);
    }
    METHOD void write_by(unsigned bound, unsigned smallest, bool is_finite) {
        inverse = real_of(ONE) / real_of(bound);
        const unsigned span = (TWO - bits_of(real_of(smallest) * inverse)) >> SHIFT;
        new_shift = SHIFT + (is_finite ? (span > 254) + (span > 508) + (span > 1016) : COARSEST);
        least = base_of(new_shift) + (1u << new_shift);
    }
    METHOD bool changes() const { return real_of(ONE) / scale != inverse || shift != new_shift; }
};

DEVICE bool is_finite(Real number) { return (bits_of(number) & MAGNITUDE) < INFINITE; }

// --- Codes to numbers; the largest code of a flagged block is not finite --------------------------------------

template <class Code> DEVICE Real decoded(Code number, const View<Code>&, bool) { return decoded(number); }

DEVICE Real decoded(Signed number, const View<Signed>& view, bool is_flagged) {
    const unsigned magnitude = number.code & 127u, sign = (number.code & 128u) << 24;
    const Real value = (real_of(magnitude << 20 | OFFSET) - real_of(OFFSET)) * view.scale;
    return real_of((is_flagged && magnitude == 127 ? 0x7FC00000 : bits_of(value) & MAGNITUDE) | sign);
}

DEVICE Real decoded(Unsigned number, const View<Unsigned>& view, bool is_flagged) {
    const unsigned code = number.code;
    const Real value = real_of((code << view.shift) + view.base) * view.scale;
    return is_flagged && code == 255 ? real_of(INFINITE) : real_of(code == 0 ? 0 : bits_of(value));
}

// --- Numbers to codes; clamped, what is not finite gets the largest code, and nothing else does ---------------

DEVICE unsigned lowest(Random random) { return random.bits & 0xFFFFF; }
DEVICE unsigned lowest(Nearest) { return 1u << 19; }
DEVICE unsigned highest(Random random, unsigned count) { return random.bits >> (32 - count); }
DEVICE unsigned highest(Nearest, unsigned count) { return 1u << (count - 1); }

DEVICE unsigned clamped(unsigned code, Real number, Real scaled, unsigned largest) {
    if (!is_finite(number)) return largest;
    return scaled < real_of(LARGEST) ? code : largest - 1;
}

template <class How> DEVICE void encode(Real number, Signed& to, How how, const View<Signed>& view, bool clamps) {
    const Real scaled = real_of(bits_of(number) & MAGNITUDE) * view.inverse + real_of(OFFSET);
    unsigned code = (bits_of(scaled) + lowest(how)) >> 20 & 127;
    if (clamps) code = clamped(code, number, scaled, 127);
    to.code = static_cast<unsigned char>(code | (bits_of(number) >> 24 & 128));
}

template <class How> DEVICE void encode(Real number, Unsigned& to, How how, const View<Unsigned>& view, bool clamps) {
    const Real scaled = number * view.inverse;
    const unsigned bits = bits_of(scaled);
    const bool is_more = static_cast<int>(bits) > static_cast<int>(view.least);
    unsigned code = ((is_more ? bits : view.least) + highest(how, view.new_shift)) >> view.new_shift;
    if ((bits_of(number) & MAGNITUDE) == 0) code = 0;
    if (clamps) code = clamped(code, number, scaled, 255);
    to.code = static_cast<unsigned char>(code);
}

// --- Of any storage: whole words round to 8 bits, halves to 16 -------------------------------------------------

// Codes with a sign take the lower bits of a word, others the upper ones. The first two states share one: as it is for a
// first state with a sign and for a second without, with its halves exchanged for all others.
template <class Code> DEVICE Random whole(const Words& words, int state) {
    const unsigned word = state < 2 ? words.moments : words.params;
    const bool is_turned = (state == 0) != IS_SIGNED<Code>;
    return {is_turned ? word >> 16 | word << 16 : word};
}
template <class Code> DEVICE Nearest whole(const NoWords&, int) { return {}; }

DEVICE Random half(const Words& words, int state) {
    return state == 0 ? words.first() : state == 1 ? words.second() : words.third();
}
DEVICE Nearest half(const NoWords&, int) { return {}; }

template <class Code, class Drawn>
DEVICE void encode_state(Real number, Code& to, const Drawn& words, int state, const View<Code>& view, bool clamps) {
    if constexpr (IN_BLOCKS<Code>) encode(number, to, whole<Code>(words, state), view, clamps);
    else encode(number, to, half(words, state));
}

// How float32 numbers become 16-bit codes and back, as kernels/formats.py has it. kernels/cuda_source.py puts
// kernels/step.cu before it.
//
// Integers, but for float16 to the nearest and back, which GPUs convert; no instruction here flushes subnormals,
// whatever the compiler's flags say.

struct Bfloat16 { unsigned short code; };
struct Float16 { unsigned short code; };
struct Remainder { short code; };  // what a bfloat16 lacks to a float32

#ifdef __CUDA_ARCH__
DEVICE unsigned bits_of(Real number) { return __float_as_uint(number.value); }
DEVICE Real real_of(unsigned bits) { return {__uint_as_float(bits)}; }
#else
DEVICE unsigned bits_of(Real number) { return __builtin_bit_cast(unsigned, number.value); }
DEVICE Real real_of(unsigned bits) { return {__builtin_bit_cast(float, bits)}; }
#endif

constexpr unsigned INFINITE = 0x7F800000, REBIAS = (127 - 15) << 23, LEAST_NORMAL_HALF = 0x38800000;

DEVICE bool is_nan(unsigned bits) { return (bits & 0x7FFFFFFF) > INFINITE; }

// --- Codes to numbers ----------------------------------------------------------------------------------------

DEVICE Real decoded(Bfloat16 number) { return real_of(static_cast<unsigned>(number.code) << 16); }

DEVICE Real decoded(Float16 number) {
#ifdef __CUDA_ARCH__
    Real result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result.value) : "h"(number.code));
    return result;
#else
    const unsigned magnitude = number.code & 0x7FFF, sign = (number.code & 0x8000u) << 16;
    if (magnitude >= 0x7C00) return real_of(sign | INFINITE | magnitude << 13);
    return real_of(sign | bits_of(real_of(magnitude << 13) * real_of((127 + 112) << 23)));
#endif
}

DEVICE Real joined(Bfloat16 number, Remainder rest) {
    return real_of((static_cast<unsigned>(number.code) << 16) + static_cast<unsigned>(static_cast<int>(rest.code)));
}

// --- Numbers to codes: to the nearest, ties to even, or by random bits ---------------------------------------

struct Nearest {};
struct Random { unsigned bits; };

DEVICE unsigned short upper_half(unsigned bits) { return static_cast<unsigned short>(bits >> 16); }

DEVICE void encode(Real number, Real& to, Nearest) { to = number; }
DEVICE void encode(Real number, Real& to, Random) { to = number; }

DEVICE void encode_bfloat16(unsigned bits, unsigned add, Bfloat16& to) {
    to.code = upper_half(is_nan(bits) ? bits | 0x00400000 : bits + add);
}
DEVICE void encode(Real number, Bfloat16& to, Nearest) {
    const unsigned bits = bits_of(number);
    encode_bfloat16(bits, 0x7FFF + (bits >> 16 & 1), to);
}
DEVICE void encode(Real number, Bfloat16& to, Random random) {
    encode_bfloat16(bits_of(number), random.bits & 0xFFFF, to);
}

// Of what is below 2**-14: how many units of 2**-40 it has.
DEVICE unsigned units_of(Real small) {
    const Real units = small * real_of((127 + 40) << 23);
#ifdef __CUDA_ARCH__
    unsigned result;
    asm("cvt.rzi.u32.f32 %0, %1;" : "=r"(result) : "f"(units.value));
    return result;
#else
    return static_cast<unsigned>(units.value);
#endif
}

DEVICE void encode(Real number, Float16& to, Random random) {
    const unsigned bits = bits_of(number), magnitude = bits & 0x7FFFFFFF;
    const bool is_small = magnitude < LEAST_NORMAL_HALF;
    const unsigned units = units_of(real_of(is_small ? magnitude : 0)) + (random.bits & 0xFFFF);
    const unsigned normal = magnitude - REBIAS + (random.bits & 0x1FFF);
    unsigned code = is_small ? units >> 16 : normal >> 13;
    if (magnitude >= 0x47800000) code = magnitude > INFINITE ? 0x7E00 : 0x7C00;  // from 2**16 on
    to.code = static_cast<unsigned short>(code | (bits >> 16 & 0x8000));
}

DEVICE void encode(Real number, Float16& to, Nearest) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.code) : "f"(number.value));
#else
    const unsigned bits = bits_of(number), magnitude = bits & 0x7FFFFFFF, rebiased = magnitude - REBIAS;
    unsigned code = (rebiased + 0x0FFF + (rebiased >> 13 & 1)) >> 13;
    if (magnitude < LEAST_NORMAL_HALF) code = bits_of(real_of(magnitude) + real_of(0x3F000000)) - 0x3F000000;
    if (magnitude >= 0x477FF000) code = magnitude > INFINITE ? 0x7E00 : 0x7C00;  // from 65520 on
    to.code = static_cast<unsigned short>(code | (bits >> 16 & 0x8000));
#endif
}

// The nearest bfloat16, ties away from zero, and what is left: exact together.
DEVICE void halve(Real number, Bfloat16& to, Remainder& rest) {
    unsigned bits = bits_of(number);
    if (is_nan(bits)) bits = (bits & 0x80000000) | 0x7FC00000;  // one full of ones would turn its sign around
    to.code = upper_half(bits + 0x8000);
    rest.code = static_cast<short>(bits - (static_cast<unsigned>(to.code) << 16));
}

// --- Random bits ---------------------------------------------------------------------------------------------

// Those of an element: for its first two moments, and for the parameter and a third one.
struct Words {
    unsigned moments, params;
    METHOD Random first() const { return {moments}; }
    METHOD Random second() const { return {moments >> 16}; }
    METHOD Random third() const { return {params >> 16}; }
    METHOD Random param() const { return {params}; }
};
struct NoWords {
    METHOD Nearest first() const { return {}; }
    METHOD Nearest second() const { return {}; }
    METHOD Nearest third() const { return {}; }
    METHOD Nearest param() const { return {}; }
};

// The keys of a step, and the index of element 0 in the whole buffer.
struct AtRandom {
    long long bits, first;
    METHOD Words words(long long i) const {
        const unsigned long long element = static_cast<unsigned long long>(first) + static_cast<unsigned long long>(i);
        const unsigned place =
            static_cast<unsigned>(element) * WEYL + static_cast<unsigned>(element >> 32) * WEYL_OF_HIGH;
        return {hashed(place + static_cast<unsigned>(bits)),
                hashed(place + static_cast<unsigned>(static_cast<unsigned long long>(bits) >> 32))};
    }
    METHOD static unsigned hashed(unsigned word) { return (word ^ word >> 15) * MULTIPLIER; }
};
struct ToNearest {
    METHOD NoWords words(long long) const { return {}; }
};

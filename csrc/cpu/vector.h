// Vectors of floats as wide as the target's registers, and what the operators do with them. GCC and clang
// have these types for every processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "operators.h"

// A call costs more than what these do, and a vector would go through memory.
#define LUMI_INLINE inline __attribute__((always_inline))

namespace lumi::LUMI_TARGET {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kWidth = kBytes / 4;  // floats in a vector

typedef float Vec __attribute__((vector_size(kBytes)));
typedef std::int32_t IntVec __attribute__((vector_size(kBytes)));
typedef std::uint32_t UintVec __attribute__((vector_size(kBytes)));
typedef std::uint16_t ShortVec __attribute__((vector_size(kBytes / 2)));

struct BFloat16 {
    std::uint16_t bits;
};

template <typename T>
LUMI_INLINE T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

template <typename To, typename From>
LUMI_INLINE To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

LUMI_INLINE Vec broadcast(float x) { return Vec{} + x; }

LUMI_INLINE Vec load(const float* from) {
    Vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

LUMI_INLINE Vec load(const BFloat16* from) {
    ShortVec bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits_as<Vec>(__builtin_convertvector(bits, UintVec) << 16);
}

LUMI_INLINE void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

// To the nearest, ties to even; NaN stays NaN.
LUMI_INLINE void store(BFloat16* to, Vec x) {
    const UintVec bits = bits_as<UintVec>(x);
    const UintVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const UintVec kept = x == x ? rounded : UintVec{} + 0x7fc0u;
    const ShortVec narrow = __builtin_convertvector(kept, ShortVec);
    std::memcpy(to, &narrow, sizeof narrow);
}

// The first `count` elements, up to kWidth; zeros behind them.
template <typename T>
LUMI_INLINE Vec load(const T* from, int count) {
    if (count == kWidth) return load(from);
    T some[kWidth] = {};
    for (int i = 0; i < count; ++i) some[i] = from[i];
    return load(some);
}

template <typename T>
LUMI_INLINE void store(T* to, Vec x, int count) {
    if (count == kWidth) return store(to, x);
    T some[kWidth];
    store(some, x);
    for (int i = 0; i < count; ++i) to[i] = some[i];
}

LUMI_INLINE float to_float(float x) { return x; }
LUMI_INLINE float to_float(BFloat16 x) { return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16); }

template <int kSize>
struct FloatsOfBytes {
    typedef float type __attribute__((vector_size(kSize)));
};

// Half is added to half, which costs a few instructions; lane after lane would cost one latency each.
template <int kSize>
LUMI_INLINE float sum_of_bytes(typename FloatsOfBytes<kSize>::type x) {
    if constexpr (kSize == 8) {
        return x[0] + x[1];
    } else {
        typename FloatsOfBytes<kSize / 2>::type halves[2];
        std::memcpy(halves, &x, sizeof x);
        return sum_of_bytes<kSize / 2>(halves[0] + halves[1]);
    }
}

LUMI_INLINE float sum(Vec x) { return sum_of_bytes<kBytes>(x); }

constexpr float kLowest = -3.4e38f;  // the first maximum, instead of -infinity, whose differences are NaN

LUMI_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

LUMI_INLINE float max(Vec x) {
    float largest = x[0];
    for (int i = 1; i < kWidth; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// Calls body(offset, count) for the vectors that make up `size` elements; `count` is below kWidth in the last
// alone.
template <typename Body>
LUMI_INLINE void for_each_vector(Int size, const Body& body) {
    Int i = 0;
    for (; i + kWidth <= size; i += kWidth) body(i, kWidth);
    if (i < size) body(i, static_cast<int>(size - i));
}

// The sum of term(offset, count), a vector with zeros from count on, over the vectors that make up `size`
// elements. Sums of 1024 are added up, which loses fewer digits.
template <typename Term>
LUMI_INLINE float sum_of(Int size, const Term& term) {
    constexpr Int kBlock = 1024;
    float total = 0;
    for (Int start = 0; start < size; start += kBlock) {
        Vec block{};
        for_each_vector(size - start < kBlock ? size - start : kBlock,
                        [&](Int i, int count) { block += term(start + i, count); });
        total += sum(block);
    }
    return total;
}

// e^x to 1.5 ulp: 2^n e^r with n = round(x / ln 2), and a polynomial for e^r, |r| <= ln 2 / 2. Infinity and 0
// where a float overflows and underflows; NaN stays NaN.
LUMI_INLINE Vec exp(Vec x) {
    const Vec lowest = broadcast(-104.0f), highest = broadcast(89.0f);
    x = x < lowest ? lowest : x;
    x = x > highest ? highest : x;
    const Vec shift = broadcast(12582912.0f);  // 1.5 * 2^23: a sum with it has no digits behind the point
    const Vec shifted = x * 1.44269504088896341f + shift;
    const Vec n = shifted - shift;
    const Vec r =
        (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first with few digits
    Vec p = broadcast(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    // 2^n in two factors, since 2^128 and 2^-150 have no float of their own.
    const IntVec exponent = bits_as<IntVec>(shifted) - bits_as<IntVec>(shift), half = exponent >> 1;
    return p * bits_as<Vec>((half + 127) << 23) * bits_as<Vec>((exponent - half + 127) << 23);
}

}  // namespace lumi::LUMI_TARGET

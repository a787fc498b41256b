// Vectors of float32 as wide as the machine's own, by GCC's vector extensions, and the numbers that
// are read into them.
#pragma once

#include <cstdint>
#include <cstring>

// So that small arrays of vectors stay in registers.
#define UNROLL _Pragma("GCC unroll 16")

#if defined __AVX512F__
constexpr int64_t LANES = 16;
#elif defined __AVX2__
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t halves __attribute__((vector_size(LANES * sizeof(uint16_t))));

struct bf16 {
    uint16_t top;  // the upper half of a float32
};

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
    const uint32_t whole = static_cast<uint32_t>(x.top) << 16;
    float y;
    memcpy(&y, &whole, sizeof y);
    return y;
}

static inline vec load(const float* from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}
static inline vec load(const bf16* from) {
    halves h;
    memcpy(&h, from, sizeof h);
    return reinterpret_cast<vec>(__builtin_convertvector(h, bits) << 16);
}

static inline void store(float* to, vec v) { memcpy(to, &v, sizeof v); }
// Rounds to nearest, ties to even; a NaN stays one.
static inline void store(bf16* to, vec v) {
    const bits whole = reinterpret_cast<bits>(v);
    const bits rounded = (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
    const bits nan = (whole >> 16) | 0x40;
    const halves h = __builtin_convertvector(v == v ? rounded : nan, halves);
    memcpy(to, &h, sizeof h);
}

// The first `count` of a vector's numbers, zeros after them.
template <class T> static inline vec load_part(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
    T all[LANES] = {};
    memcpy(all, from, count * sizeof(T));
    return load(all);
}
template <class T> static inline void store_part(T* to, vec v, int64_t count) {
    if (count >= LANES) return store(to, v);
    T all[LANES];
    store(all, v);
    memcpy(to, all, count * sizeof(T));
}

// Neighbouring lanes of both added up: the sums of a's pairs, then those of b's.
static inline vec add_pairs(vec a, vec b) {
#if defined __AVX512F__
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined __AVX2__
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// With N = LANES, lane i of the result is the sum of v[i]'s lanes; with half of that, lanes 2i and
// 2i + 1 are those of its halves, and so on. v is overwritten.
template <int64_t N> static inline vec sums(vec* v) {
    if constexpr (N > 1) {
        UNROLL for (int64_t i = 0; i < N / 2; i++) v[i] = add_pairs(v[2 * i], v[2 * i + 1]);
        return sums<N / 2>(v);
    }
    return v[0];
}

// e^x, for x up to 0: 2^n times a polynomial of the rest, of 1e-7 relative error. 0 below e^-87;
// a NaN stays one.
static inline vec exponential(vec given) {
    typedef int32_t ints __attribute__((vector_size(LANES * sizeof(int32_t))));
    const vec lowest = vec{} - 87.0f;
    const vec x = given > lowest ? given : lowest;
    const vec scaled = x * 1.44269504f;
    const ints n = __builtin_convertvector(scaled - 0.5f, ints);  // towards zero: nearest, as x <= 0
    const vec whole = __builtin_convertvector(n, vec);
    const vec rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    const vec power = p * reinterpret_cast<vec>((n + 127) << 23);
    return given >= lowest ? power : given < lowest ? vec{} : given;
}

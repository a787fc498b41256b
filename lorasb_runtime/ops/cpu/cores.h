// One row times its own core.
#pragma once

#include <algorithm>

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// How rows of an activation's type T are multiplied by cores of type C: a row is `number`s, zeros up
// to a multiple of WIDTH.
template <class T, class C> struct Core {
    typedef float number;
    static constexpr int64_t WIDTH = LANES;

    // LANES rows of R times h, or `count` of them. Asks for the same of `next`.
    template <bool ALL>
    static vec multiply(const C* core, const C* next, const number* h, int64_t r, int64_t count) {
        vec totals[LANES] = {};
        for (int64_t j = 0; j < r; j += WIDTH) {
            const vec x = load(h + j);
            UNROLL for (int64_t k = 0; k < LANES; k++) {
                if (!ALL && k >= count) break;
                const int64_t at = k * r + j;
                __builtin_prefetch(next + at);
                totals[k] += (ALL ? load(core + at) : load_part(core + at, r - j)) * x;
            }
        }
        return sums<LANES>(totals);
    }
};

#ifdef __AVX512BF16__
template <> struct Core<bf16, bf16> {
    typedef bf16 number;
    static constexpr int64_t WIDTH = 2 * LANES;

    template <bool ALL>
    static vec multiply(const bf16* core, const bf16* next, const bf16* h, int64_t r,
                        int64_t count) {
        __m512 totals[LANES] = {};
        for (int64_t j = 0; j < r; j += WIDTH) {
            const __m512bh x = reinterpret_cast<__m512bh>(_mm512_loadu_si512(h + j));
            const __mmask32 mask = r - j >= WIDTH ? ~0u : (1u << (r - j)) - 1;
            UNROLL for (int64_t k = 0; k < LANES; k++) {
                if (!ALL && k >= count) break;
                const int64_t at = k * r + j;
                __builtin_prefetch(next + at);
                const __m512i part = ALL ? _mm512_loadu_si512(core + at)
                                         : _mm512_maskz_loadu_epi16(mask, core + at);
                totals[k] = _mm512_dpbf16_ps(totals[k], reinterpret_cast<__m512bh>(part), x);
            }
        }
        return sums<LANES>(reinterpret_cast<vec*>(totals));
    }

    // Two rows of R in each vector, for r = 16.
    static vec multiply_pairs(const bf16* core, const bf16* next, const bf16* h) {
        const __m256i once = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(h));
        const __m512bh x = reinterpret_cast<__m512bh>(_mm512_maskz_broadcast_i64x4(0xff, once));
        __m512 totals[LANES / 2];
        UNROLL for (int64_t k = 0; k < LANES / 2; k++) {
            __builtin_prefetch(next + k * WIDTH);
            const __m512i part = _mm512_loadu_si512(core + k * WIDTH);
            totals[k] =
                _mm512_dpbf16_ps(_mm512_setzero_ps(), reinterpret_cast<__m512bh>(part), x);
        }
        return sums<LANES / 2>(reinterpret_cast<vec*>(totals));
    }
};
#endif

// out = R h: [r, r] times [r]; out has room for whole vectors. Asks for the next core meanwhile.
template <class T, class C>
static inline void times_core(const C* core, const C* next, const typename Core<T, C>::number* h,
                              int64_t r, float* out) {
    typedef Core<T, C> Own;
#ifdef __AVX512BF16__
    if constexpr (sizeof(T) + sizeof(C) == 2 * sizeof(bf16))
        if (r == LANES) return store(out, Own::multiply_pairs(core, next, h));
#endif
    for (int64_t i = 0; i < r; i += LANES) {
        const auto multiply =
            r % Own::WIDTH ? Own::template multiply<false> : Own::template multiply<true>;
        store(out + i, multiply(core + i * r, next + i * r, h, r, std::min(LANES, r - i)));
    }
}

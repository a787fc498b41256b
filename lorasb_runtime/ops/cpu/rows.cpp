// What a decoder layer does to each row between its matrix multiplies.

#include <cmath>
#include <omp.h>

#include "vectors.h"

namespace {

constexpr int64_t LEAST_SHARED = 1 << 14;  // numbers from which on threads share the rows

// out = x / sqrt(mean(x^2) + eps) * weight.
template <class T>
void norm_row(const T* x, const float* weight, T* out, int64_t n, float eps) {
    vec squares = {};
    for (int64_t j = 0; j < n; j += LANES) {
        const vec part = load_part(x + j, n - j);
        squares += part * part;
    }
    vec all[LANES] = {squares};
    const float scale = 1 / std::sqrt(sums<LANES>(all)[0] / n + eps);
    for (int64_t j = 0; j < n; j += LANES)
        store_part(out + j, load_part(x + j, n - j) * scale * load_part(weight + j, n - j), n - j);
}

// out = gate / (1 + e^-gate) * up.
template <class T> void gate_row(const T* gate, const T* up, T* out, int64_t n) {
    for (int64_t j = 0; j < n; j += LANES) {
        const vec x = load_part(gate + j, n - j);
        // The exponential of what is not above 0; the other sign's share follows from it.
        const vec small = exponential(x < 0 ? x : -x);
        const vec share = (x < 0 ? small : vec{} + 1.0f) / (small + 1.0f);
        store_part(out + j, x * share * load_part(up + j, n - j), n - j);
    }
}

// Number j of a head and number j + d/2 turn by the angle whose cosine and sine are given.
template <class T> void rotate_head(T* x, const T* cos, const T* sin, int64_t d) {
    const int64_t half = d / 2;
    for (int64_t j = 0; j < half; j += LANES) {
        const int64_t n = half - j;
        const vec a = load_part(x + j, n), b = load_part(x + half + j, n);
        const vec ca = load_part(cos + j, n), cb = load_part(cos + half + j, n);
        const vec sa = load_part(sin + j, n), sb = load_part(sin + half + j, n);
        store_part(x + j, a * ca - b * sa, n);
        store_part(x + half + j, b * cb + a * sb, n);
    }
}

}  // namespace

#define ROWS(SUFFIX, T)                                                                            \
    extern "C" void rms_norm_##SUFFIX(const T* x, int64_t x_row, const float* weight, T* out,      \
                                      int64_t rows, int64_t n, float eps) {                        \
        _Pragma("omp parallel for schedule(static) if (rows * n >= LEAST_SHARED)")                 \
        for (int64_t i = 0; i < rows; i++) norm_row(x + i * x_row, weight, out + i * n, n, eps);   \
    }                                                                                              \
    extern "C" void silu_mul_##SUFFIX(const T* gate, int64_t gate_row_, const T* up,               \
                                      int64_t up_row, T* out, int64_t rows, int64_t n) {           \
        _Pragma("omp parallel for schedule(static) if (rows * n >= LEAST_SHARED)")                 \
        for (int64_t i = 0; i < rows; i++)                                                         \
            gate_row(gate + i * gate_row_, up + i * up_row, out + i * n, n);                       \
    }                                                                                              \
    extern "C" void rotate_##SUFFIX(T* q, int64_t q_row, int64_t heads, T* k, int64_t k_row,       \
                                    int64_t kv_heads, const T* cos, const T* sin, int64_t rows,    \
                                    int64_t d) {                                                   \
        _Pragma("omp parallel for schedule(static) if (rows * heads * d >= LEAST_SHARED)")         \
        for (int64_t i = 0; i < rows; i++) {                                                       \
            for (int64_t h = 0; h < heads; h++)                                                    \
                rotate_head(q + i * q_row + h * d, cos + i * d, sin + i * d, d);                   \
            for (int64_t h = 0; h < kv_heads; h++)                                                 \
                rotate_head(k + i * k_row + h * d, cos + i * d, sin + i * d, d);                   \
        }                                                                                          \
    }

ROWS(f32, float)
ROWS(bf16, bf16)

// Attention of one or few new tokens of each sequence over its part of the KV cache.
//
// Their keys and values are written into the cache first. A task is one sequence's one KV head with
// all query heads that share it, four of them at a time, so that each key is read once for them.

#include <algorithm>
#include <cmath>
#include <omp.h>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t HEADS = 4;    // query heads that are handled together
constexpr int64_t VECTORS = 4;  // of a value that are added up together
constexpr int64_t LINE = 64;    // bytes that a processor fetches at once

template <class T> struct Attention {
    const T *q, *k, *v;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides
    T* out;
    int64_t out_row, out_head;
    T *keys, *values;
    int64_t cache_row, cache_head;
    // Of each sequence: its first token's row of the batch, how many tokens, its row of the cache,
    // its first token's place there.
    const int64_t *firsts, *counts, *rows, *positions;
    int64_t heads, kv_heads, d, window;
    float scaling, softcap;

    int64_t vectors() const { return (d + LANES - 1) / LANES; }

    void run(int64_t i, int64_t kv_head, std::vector<float>& scratch) const {
        const int64_t place = rows[i] * cache_row + kv_head * cache_head;
        for (int64_t t = 0; t < counts[i]; t++) {
            const int64_t row = firsts[i] + t, to = place + (positions[i] + t) * d;
            std::copy_n(k + row * k_row + kv_head * k_head, d, keys + to);
            std::copy_n(v + row * v_row + kv_head * v_head, d, values + to);
        }
        for (int64_t t = 0; t < counts[i]; t++)
            attend_all(firsts[i] + t, kv_head, place, positions[i] + t + 1, scratch);
    }

    // The query heads of one token, which sees the first `end` keys behind `place`.
    void attend_all(int64_t row, int64_t kv_head, int64_t place, int64_t end,
                    std::vector<float>& scratch) const {
        const int64_t begin = window ? std::max<int64_t>(0, end - window) : 0;
        const T* first_key = keys + place + begin * d;
        const T* first_value = values + place + begin * d;
        const int64_t group = heads / kv_heads;
        for (int64_t g = 0; g < group; g += HEADS) {
            const int64_t head = kv_head * group + g;
            switch (std::min(HEADS, group - g)) {
                case 1: attend<1>(row, head, first_key, first_value, end - begin, scratch); break;
                case 2: attend<2>(row, head, first_key, first_value, end - begin, scratch); break;
                case 3: attend<3>(row, head, first_key, first_value, end - begin, scratch); break;
                default: attend<4>(row, head, first_key, first_value, end - begin, scratch);
            }
        }
    }

    template <int64_t G>
    void attend(int64_t row, int64_t head, const T* key, const T* value, int64_t length,
                std::vector<float>& scratch) const {
        const int64_t padded = (length + LANES - 1) / LANES * LANES, wide = vectors() * LANES;
        scratch.resize(G * (padded + wide));
        float* scores = scratch.data();
        float* queries = scores + G * padded;
        for (int64_t g = 0; g < G; g++)
            for (int64_t c = 0; c < d; c += LANES) {
                const T* from = q + row * q_row + (head + g) * q_head + c;
                store(queries + g * wide + c, load_part(from, d - c) * scaling);
            }
        for (int64_t j = 0; j < length; j += LANES)
            score<G>(key + j * d, value + j * d, std::min(LANES, length - j), queries, wide,
                     scores + j, padded);
        float shares[G];
        for (int64_t g = 0; g < G; g++) shares[g] = 1 / soften(scores + g * padded, padded);
        for (int64_t c = 0; c < d; c += VECTORS * LANES) {
            vec totals[G][VECTORS] = {};
            if (d - c >= VECTORS * LANES)
                add_values<G, true>(value + c, length, 0, scores, padded, totals);
            else
                add_values<G, false>(value + c, length, d - c, scores, padded, totals);
            for (int64_t g = 0; g < G; g++) {
                T* to = out + row * out_row + (head + g) * out_head + c;
                for (int64_t n = 0; n < VECTORS && c + n * LANES < d; n++)
                    store_part(to + n * LANES, totals[g][n] * shares[g], d - c - n * LANES);
            }
        }
    }

    // LANES keys' scores, or fewer and then minus infinity. The next keys and these values are asked
    // for meanwhile.
    template <int64_t G>
    void score(const T* key, const T* value, int64_t count, const float* queries, int64_t wide,
               float* scores, int64_t padded) const {
        vec products[G][LANES] = {};
        for (int64_t j = 0; j < count; j++) {
            for (int64_t c = 0; c < d; c += LINE / sizeof(T)) {
                __builtin_prefetch(key + (j + LANES) * d + c);
                __builtin_prefetch(value + j * d + c);
            }
            vec product[G] = {};
            for (int64_t c = 0; c < d; c += LANES) {
                const vec part = load_part(key + j * d + c, d - c);
                for (int64_t g = 0; g < G; g++) product[g] += part * load(queries + g * wide + c);
            }
            for (int64_t g = 0; g < G; g++) products[g][j] = product[g];
        }
        for (int64_t g = 0; g < G; g++) {
            store(scores + g * padded, sums<LANES>(products[g]));
            std::fill(scores + g * padded + count, scores + g * padded + LANES, -INFINITY);
        }
    }

    // Scores become their exponentials over the largest; returns their sum. Whole vectors.
    float soften(float* scores, int64_t padded) const {
        vec most = load(scores), total = {};
        for (int64_t j = 0; j < padded; j += LANES) {
            if (softcap)
                for (int64_t n = j; n < j + LANES; n++)
                    if (scores[n] > -INFINITY) scores[n] = softcap * std::tanh(scores[n] / softcap);
            const vec these = load(scores + j);
            most = these > most ? these : most;
        }
        float each[LANES];
        store(each, most);
        const float largest = *std::max_element(each, each + LANES);
        for (int64_t j = 0; j < padded; j += LANES) {
            const vec weights = exponential(load(scores + j) - largest);
            store(scores + j, weights);
            total += weights;
        }
        vec all[LANES] = {total};
        return sums<LANES>(all)[0];
    }

    template <int64_t G, bool WHOLE>
    void add_values(const T* value, int64_t length, int64_t rest, const float* weights,
                    int64_t padded, vec (*totals)[VECTORS]) const {
        for (int64_t j = 0; j < length; j++)
            for (int64_t n = 0; n < VECTORS; n++) {
                if (!WHOLE && n * LANES >= rest) break;
                const T* from = value + j * d + n * LANES;
                const vec part = WHOLE ? load(from) : load_part(from, rest - n * LANES);
                for (int64_t g = 0; g < G; g++) totals[g][n] += part * weights[g * padded + j];
            }
    }

    void run_all(int64_t count) const {
#pragma omp parallel
        {
            std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
            for (int64_t t = 0; t < count * kv_heads; t++) run(t / kv_heads, t % kv_heads, scratch);
        }
    }
};

}  // namespace

// Strides in numbers; spans: firsts, counts, rows, positions, each [count]; window 0: none, softcap
// 0: none.
#define ATTEND(NAME, T)                                                                            \
    extern "C" void NAME(const T* q, int64_t q_row, int64_t q_head, const T* k, int64_t k_row,     \
                         int64_t k_head, const T* v, int64_t v_row, int64_t v_head, T* out,        \
                         int64_t out_row, int64_t out_head, T* keys, T* values, int64_t cache_row, \
                         int64_t cache_head, const int64_t* spans, int64_t count, int64_t heads,   \
                         int64_t kv_heads, int64_t d, int64_t window, float scaling,               \
                         float softcap) {                                                          \
        const int64_t *counts = spans + count, *rows = counts + count, *places = rows + count;     \
        Attention<T>{q,       k,        v,          q_row,      q_head, k_row,     k_head,         \
                     v_row,   v_head,   out,        out_row,    out_head, keys,    values,         \
                     cache_row, cache_head, spans,  counts,     rows,   places,    heads,          \
                     kv_heads, d,       window,     scaling,    softcap}                           \
            .run_all(count);                                                                       \
    }

ATTEND(attend_cached_f32, float)
ATTEND(attend_cached_bf16, bf16)

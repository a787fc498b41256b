// y += B (R (A x)) for rows that each have a core R of their own, for m target modules at once.
//
// A thread takes a part of the rows through all three multiplies, so that none waits for another.
// A and B come in blocks of 16 of their outputs, [blocks, inputs, 16], zeros after the last output;
// every module's B starts a new block.

#include <algorithm>
#include <omp.h>
#include <vector>

#include "vectors.h"

namespace {

#ifdef __AVX512F__
constexpr int64_t ROWS = 16;  // of the batch, which share each number of a block once it is loaded
#else
constexpr int64_t ROWS = 4;
#endif

inline int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// N rows of y[.., 16] = or += one block [inputs, 16] times their x [inputs].
template <bool ADD, int64_t N, class Y, class T>
void times_block(Y* const* y, const float* const* x, const T* block, int64_t inputs,
                 int64_t outputs) {
    vec total[N] = {};
    if (ADD)
        for (int64_t n = 0; n < N; n++) total[n] = load_part(y[n], outputs);
    for (int64_t j = 0; j < inputs; j++) {
        const vec column = load(block + j * LANES);
        for (int64_t n = 0; n < N; n++) total[n] += column * x[n][j];
    }
    for (int64_t n = 0; n < N; n++) store_part(y[n], total[n], outputs);
}

template <bool ADD, class Y, class T>
void times_block(int64_t rows, Y* const* y, const float* const* x, const T* block, int64_t inputs,
                 int64_t outputs) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        times_block<ADD, ROWS>(y + i, x + i, block, inputs, outputs);
    for (; i + 4 <= rows; i += 4) times_block<ADD, 4>(y + i, x + i, block, inputs, outputs);
    for (; i < rows; i++) times_block<ADD, 1>(y + i, x + i, block, inputs, outputs);
}

// out = R h: [r, r] times [r]; h and out have room for whole vectors, h zeros after r.
template <class C> void times_core(const C* core, const float* h, int64_t r, float* out) {
    for (int64_t i = 0; i < r; i += LANES) {
        vec totals[LANES] = {};
        const int64_t count = std::min(LANES, r - i);
        for (int64_t j = 0; j < r; j += LANES) {
            const vec x = load(h + j);
            for (int64_t k = 0; k < count; k++)
                totals[k] += load_part(core + (i + k) * r + j, r - j) * x;
        }
        store(out + i, sums(totals));
    }
}

template <class T> void widen_all(const T* from, int64_t count, float* to) {
    for (int64_t j = 0; j < count; j += LANES)
        store_part(to + j, load_part(from + j, count - j), count - j);
}

template <class T, class C> struct Group {
    T* y;
    int64_t y_stride;
    const T* x;
    int64_t x_stride, inputs;
    const T* a;  // null where x is A x already
    const C* cores;
    int64_t core_stride;
    const int64_t* slots;
    const T* b;
    const int64_t* spans;  // begin, end of each member's outputs in y
    int64_t members, r;

    // Rows first..last; of their outputs every block whose number is `part` modulo `parts`.
    void run(int64_t first, int64_t last, int64_t part, int64_t parts) const {
        const int64_t width = whole(members * r), padded = whole(r);
        std::vector<float> xs(a ? ROWS * inputs : 0), hs(ROWS * width), h(padded);
        std::vector<float> vs(ROWS * members * padded);
        int64_t rows[ROWS];
        while (first < last) {
            int64_t n = 0;
            for (; first < last && n < ROWS; first++)
                if (slots[first]) rows[n++] = first;
            shrink(rows, n, xs.data(), hs.data(), width);
            for (int64_t i = 0; i < n; i++)
                for (int64_t m = 0; m < members; m++) {
                    const C* core = cores + slots[rows[i]] * core_stride + m * r * r;
                    std::copy_n(&hs[i * width + m * r], r, h.data());
                    times_core(core, h.data(), r, &vs[(i * members + m) * padded]);
                }
            expand(rows, n, vs.data(), padded, part, parts);
        }
    }

    // hs[i] = A x of row i.
    void shrink(const int64_t* rows, int64_t n, float* xs, float* hs, int64_t width) const {
        float* to[ROWS];
        const float* from[ROWS];
        for (int64_t i = 0; i < n; i++) {
            widen_all(x + rows[i] * x_stride, a ? inputs : members * r,
                      a ? xs + i * inputs : hs + i * width);
            from[i] = xs + i * inputs;
        }
        if (!a) return;
        for (int64_t o = 0; o < width; o += LANES) {
            for (int64_t i = 0; i < n; i++) to[i] = hs + i * width + o;
            times_block<false>(n, to, from, a + o * inputs, inputs, LANES);
        }
    }

    void expand(const int64_t* rows, int64_t n, const float* vs, int64_t padded, int64_t part,
                int64_t parts) const {
        T* to[ROWS];
        const float* from[ROWS];
        const T* block = b;
        int64_t number = 0;
        for (int64_t m = 0; m < members; m++) {
            for (int64_t i = 0; i < n; i++) from[i] = vs + (i * members + m) * padded;
            for (int64_t o = spans[2 * m]; o < spans[2 * m + 1]; o += LANES, block += r * LANES) {
                if (number++ % parts != part) continue;
                for (int64_t i = 0; i < n; i++) to[i] = y + rows[i] * y_stride + o;
                times_block<true>(n, to, from, block, r, std::min(LANES, spans[2 * m + 1] - o));
            }
        }
    }

    void run_all(int64_t count) const {
        const int64_t threads = omp_get_max_threads();
        // Few rows: every thread takes them all, and its part of the outputs.
        const int64_t shares = count >= 4 * threads ? threads : 1;
        const int64_t parts = threads / shares;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t t = 0; t < threads; t++) {
            const int64_t share = t / parts;
            run(count * share / shares, count * (share + 1) / shares, t % parts, parts);
        }
    }
};

}  // namespace

// Strides in numbers, not bytes. cores: the group's columns of the slot table, at slot 0.
#define ADD_DELTA(NAME, T, C)                                                                      \
    extern "C" void NAME(T* y, int64_t y_stride, const T* x, int64_t x_stride, int64_t inputs,     \
                         const T* a, const C* cores, int64_t core_stride, const int64_t* slots,    \
                         int64_t rows, const T* b, const int64_t* spans, int64_t members,          \
                         int64_t r) {                                                              \
        Group<T, C>{y,     y_stride, x, x_stride, inputs,  a, cores, core_stride,                  \
                    slots, b,        spans, members,  r}                                           \
            .run_all(rows);                                                                        \
    }

ADD_DELTA(add_delta_f32_f32, float, float)
ADD_DELTA(add_delta_f32_bf16, float, bf16)
ADD_DELTA(add_delta_bf16_f32, bf16, float)
ADD_DELTA(add_delta_bf16_bf16, bf16, bf16)

// y += B (R (A x)) for rows that each have a core R of their own, for m target modules at once.
//
// A thread takes a part of the rows through all three multiplies, so that none waits for another.
// A and each module's B are packed as of blocks.h.

#include <omp.h>
#include <vector>

#include "blocks.h"
#include "cores.h"

namespace {

template <class T, class C> struct Group {
    typedef typename Panel<T>::number number;

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
        const int64_t width = round_up(members * r, LANES), padded = round_up(r, LANES);
        std::vector<number> panel(ROWS * Panel<T>::depth(std::max(a ? inputs : 0, r)));
        std::vector<float> hs(ROWS * width), vs(ROWS * members * padded);
        std::vector<typename Core<T, C>::number> h(round_up(r, Core<T, C>::WIDTH));
        int64_t rows[ROWS];
        while (first < last) {
            int64_t n = 0;
            for (; first < last && n < ROWS; first++)
                if (slots[first]) rows[n++] = first;
            if (!n) break;
            if (a)
                shrink(rows, n, {panel.data(), inputs}, hs.data(), width);
            else
                for (int64_t i = 0; i < n; i++)
                    convert(x + rows[i] * x_stride, members * r, &hs[i * width]);
            for (int64_t i = 0; i < n; i++) {
                const C* core = cores + slots[rows[i]] * core_stride;
                const C* next = cores + slots[rows[std::min(i + 1, n - 1)]] * core_stride;
                for (int64_t m = 0; m < members; m++, core += r * r, next += r * r) {
                    convert(&hs[i * width + m * r], r, h.data());
                    times_core<T>(core, next, h.data(), r, &vs[(i * members + m) * padded]);
                }
            }
            expand(rows, n, {panel.data(), r}, vs.data(), padded, part, parts);
        }
    }

    // hs[i] = A x of row rows[i].
    void shrink(const int64_t* rows, int64_t n, Panel<T> panel, float* hs, int64_t width) const {
        vec totals[ROWS];
        for (int64_t i = 0; i < n; i++) panel.set(i, x + rows[i] * x_stride);
        panel.begin();
        for (int64_t o = 0; o < width; o += LANES) {
            panel.times(a + o * panel.depth(inputs), n, totals);
            for (int64_t i = 0; i < n; i++) store(hs + i * width + o, totals[i]);
        }
        panel.end();
    }

    void expand(const int64_t* rows, int64_t n, Panel<T> panel, const float* vs, int64_t padded,
                int64_t part, int64_t parts) const {
        vec totals[ROWS];
        const T* block = b;
        int64_t number = 0;
        panel.begin();
        for (int64_t m = 0; m < members; m++) {
            for (int64_t i = 0; i < n; i++) panel.set(i, vs + (i * members + m) * padded);
            for (int64_t o = spans[2 * m]; o < spans[2 * m + 1]; o += LANES) {
                if (number++ % parts == part) {
                    const int64_t count = std::min(LANES, spans[2 * m + 1] - o);
                    panel.times(block, n, totals);
                    for (int64_t i = 0; i < n; i++) {
                        T* to = y + rows[i] * y_stride + o;
                        store_part(to, load_part(to, count) + totals[i], count);
                    }
                }
                block += panel.depth(r) * LANES;
            }
        }
        panel.end();
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

// Outputs of a block.
extern "C" void block_outputs(int64_t* outputs) { *outputs = LANES; }

// Whether this process may use what the kernels were compiled for: Linux gives AMX's tiles to those
// who ask.
extern "C" void kernels_allowed(int64_t* allowed) {
#ifdef __AMX_BF16__
    constexpr int64_t REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    *allowed = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
#else
    *allowed = 1;
#endif
}

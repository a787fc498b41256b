// A matrix [outputs, inputs] in blocks of LANES outputs, and rows times one block.
//
// float32: a block is [depth, LANES]. bfloat16: [depth / 2, LANES, 2], pairs of inputs, as AMX
// wants its tiles. depth is the inputs and zeros after them; zeros fill up the last block, too. Such
// matrices are made in blocks_cpu.py.
#pragma once

#include <algorithm>

#include "vectors.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef __AVX512F__
constexpr int64_t ROWS = 16;  // which share each number of a block once it is loaded
#else
constexpr int64_t ROWS = 8;
#endif

constexpr int64_t HELD = 32;  // inputs of 16 bits that one of AMX's tiles holds

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class T> static inline int64_t block_depth(int64_t inputs) {
    return sizeof(T) == 4 ? inputs : round_up(inputs, inputs <= HELD ? 2 : HELD);
}

template <class X, class T> static inline void convert(const X* from, int64_t count, T* to) {
    for (int64_t j = 0; j < count; j += LANES)
        store_part(to + j, load_part(from + j, count - j), count - j);
}

// Up to ROWS rows, made ready to be multiplied by blocks; `rows` has room for ROWS * depth.
template <class T> struct Panel {
    typedef float number;

    static int64_t depth(int64_t inputs) { return block_depth<T>(inputs); }

    number* rows;
    int64_t inputs;

    template <class X> void set(int64_t i, const X* from) const {
        convert(from, inputs, rows + i * depth(inputs));
        std::fill(rows + i * depth(inputs) + inputs, rows + (i + 1) * depth(inputs), 0);
    }

    void begin() const {}
    void end() const {}

    // totals[i] = the block's outputs for row i.
    void times(const T* block, int64_t count, vec* totals) const {
        int64_t i = 0;
        for (; i + ROWS <= count; i += ROWS) add_up<ROWS>(block, i, totals);
        for (; i + 4 <= count; i += 4) add_up<4>(block, i, totals);
        for (; i < count; i++) add_up<1>(block, i, totals);
    }

    template <int64_t N> void add_up(const T* block, int64_t first, vec* totals) const {
        const int64_t all = depth(inputs), each = sizeof(T) == 2 ? 2 : 1;
        const number* x = rows + first * all;
        vec sum[N] = {};
        for (int64_t j = 0; j < all; j += each, block += each * LANES) {
            vec columns[2];
            load_columns(block, columns);
            for (int64_t n = 0; n < N; n++)
                for (int64_t e = 0; e < each; e++) sum[n] += columns[e] * x[n * all + j + e];
        }
        for (int64_t n = 0; n < N; n++) totals[first + n] = sum[n];
    }

    static void load_columns(const float* from, vec* columns) { columns[0] = load(from); }
    static void load_columns(const bf16* from, vec* columns) {
        bits pairs;
        memcpy(&pairs, from, sizeof pairs);
        columns[0] = reinterpret_cast<vec>(pairs << 16);
        columns[1] = reinterpret_cast<vec>(pairs & 0xffff0000);
    }
};

#ifdef __AMX_BF16__
// AMX's tiles: 0 to 3 hold totals, 4 and 5 rows, 6 and 7 parts of blocks.
namespace tiles {

constexpr int64_t SIDE = 16;  // rows, and outputs of a block

// The compiler does not know what memory the instructions on tiles read: all that was written before
// is to be there.
static inline void written(const void* last) { __asm__ volatile("" ::"r"(last) : "memory"); }

// Sets this thread's tiles up for up to 32 rows, and blocks of this depth.
static inline void set_up(int64_t rows, int64_t depth) {
    struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    const int64_t held = std::min(HELD, depth), upper = std::min(SIDE, rows);
    const int64_t lower = rows > SIDE ? rows - SIDE : SIDE;
    for (int64_t i = 0; i < 8; i++) {
        config.bytes[i] = i == 4 || i == 5 ? held * sizeof(bf16) : SIDE * sizeof(float);
        config.rows[i] = i >= 6 ? held / 2 : i == 2 || i == 3 || i == 5 ? lower : upper;
    }
    written(&config);
    _tile_loadconfig(&config);
}

// As much as a tile holds.
static inline void ask_for(const bf16* from) {
    for (int64_t n = 0; n < HELD; n += 2) __builtin_prefetch(from + n * LANES);
}

// Totals of R times 16 rows and B blocks are zeroed, added up from one or more matrices, and stored.
template <int R, int B> static inline void zero() {
    _tile_zero(0);
    if (B > 1) _tile_zero(1);
    if (R > 1) _tile_zero(2);
    if (R > 1 && B > 1) _tile_zero(3);
}

// Totals that were stored before, as of `store`.
template <int R, int B> static inline void load(const float* totals, int64_t width) {
    const int64_t bytes = width * sizeof(float);
    _tile_loadd(0, totals, bytes);
    if (B > 1) _tile_loadd(1, totals + LANES, bytes);
    if (R > 1) _tile_loadd(2, totals + SIDE * width, bytes);
    if (R > 1 && B > 1) _tile_loadd(3, totals + SIDE * width + LANES, bytes);
}

// Rows, `row` numbers apart, of which HELD inputs lie together; the next are `step` numbers away.
struct Place {
    const bf16* rows;
    int64_t row, step;
};

// Adds the rows times blocks of this depth, the second `apart` numbers behind the first. Asks for
// what is to come, two tiles ahead.
template <int R, int B>
static inline void add(Place x, const bf16* block, int64_t depth, int64_t apart) {
    const bf16 *second = block + apart, *rows = x.rows;
    written(rows);
    for (int64_t j = 0; j < depth; j += HELD, rows += x.step) {
        ask_for(block + (j + 2 * HELD) * LANES);
        if (B > 1) ask_for(second + (j + 2 * HELD) * LANES);
        _tile_loadd(6, block + j * LANES, LANES * sizeof(float));
        _tile_loadd(4, rows, x.row * sizeof(bf16));
        _tile_dpbf16ps(0, 4, 6);
        if (B > 1) {
            _tile_loadd(7, second + j * LANES, LANES * sizeof(float));
            _tile_dpbf16ps(1, 4, 7);
        }
        if (R > 1) {
            _tile_loadd(5, rows + SIDE * x.row, x.row * sizeof(bf16));
            _tile_dpbf16ps(2, 5, 6);
            if (B > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
}

// totals: [16 R, 16 B], rows `width` numbers apart.
template <int R, int B> static inline void store(float* totals, int64_t width) {
    const int64_t bytes = width * sizeof(float);
    _tile_stored(0, totals, bytes);
    if (B > 1) _tile_stored(1, totals + LANES, bytes);
    if (R > 1) _tile_stored(2, totals + SIDE * width, bytes);
    if (R > 1 && B > 1) _tile_stored(3, totals + SIDE * width + LANES, bytes);
}

}  // namespace tiles

template <> struct Panel<bf16> {
    typedef bf16 number;

    static int64_t depth(int64_t inputs) { return block_depth<bf16>(inputs); }

    number* rows;
    int64_t inputs;

    template <class X> void set(int64_t i, const X* from) const {
        convert(from, inputs, rows + i * depth(inputs));
        std::fill(rows + i * depth(inputs) + inputs, rows + (i + 1) * depth(inputs), bf16{0});
    }

    void begin() const { tiles::set_up(ROWS, depth(inputs)); }
    void end() const { _tile_release(); }

    void times(const bf16* block, int64_t, vec* totals) const {
        const int64_t all = depth(inputs);
        tiles::zero<1, 1>();
        tiles::add<1, 1>({rows, all, HELD}, block, all, 0);
        tiles::store<1, 1>(reinterpret_cast<float*>(totals), LANES);
    }
};
#endif

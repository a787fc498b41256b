// A matrix [outputs, inputs] in blocks of 16 outputs, and rows times one block.
//
// float32: a block is [depth, 16]. bfloat16: [depth / 2, 16, 2], pairs of inputs, as AMX wants its
// tiles. depth is the inputs and zeros after them; zeros fill up the last block, too.
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
constexpr int64_t ROWS = 4;
#endif

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class X, class T> static inline void convert(const X* from, int64_t count, T* to) {
    for (int64_t j = 0; j < count; j += LANES)
        store_part(to + j, load_part(from + j, count - j), count - j);
}

// Up to ROWS rows, made ready to be multiplied by blocks; `rows` has room for ROWS * depth.
template <class T> struct Panel {
    typedef float number;

    static int64_t depth(int64_t inputs) { return sizeof(T) == 2 ? round_up(inputs, 2) : inputs; }

    number* rows;
    int64_t inputs;

    template <class X> void set(int64_t i, const X* from) const {
        convert(from, inputs, rows + i * depth(inputs));
        std::fill(rows + i * depth(inputs) + inputs, rows + (i + 1) * depth(inputs), 0);
    }

    void begin() const {}
    void end() const {}

    // totals[i] = the block's 16 outputs for row i.
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
template <> struct Panel<bf16> {
    typedef bf16 number;

    static constexpr int64_t TILE = 32;  // inputs that one tile holds

    static int64_t depth(int64_t inputs) {
        return inputs <= TILE ? round_up(inputs, 2) : round_up(inputs, TILE);
    }

    number* rows;
    int64_t inputs;

    template <class X> void set(int64_t i, const X* from) const {
        convert(from, inputs, rows + i * depth(inputs));
        std::fill(rows + i * depth(inputs) + inputs, rows + (i + 1) * depth(inputs), bf16{0});
    }

    // Sets this thread's tiles up: 0 takes the totals, 1 rows, 2 a part of a block.
    void begin() const {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } tiles;
        const int64_t held = std::min(TILE, depth(inputs));
        tiles.bytes[0] = tiles.bytes[2] = LANES * sizeof(float);
        tiles.bytes[1] = held * sizeof(bf16);
        tiles.rows[0] = tiles.rows[1] = ROWS;
        tiles.rows[2] = held / 2;
        _tile_loadconfig(&tiles);
    }
    void end() const { _tile_release(); }

    // As much as a tile holds.
    static void ask_for(const bf16* from) {
        for (int64_t n = 0; n < TILE; n += 2) __builtin_prefetch(from + n * LANES);
    }

    // Asks for the block after the next, too.
    void times(const bf16* block, int64_t, vec* totals) const {
        const int64_t all = depth(inputs);
        _tile_zero(0);
        for (int64_t j = 0; j < all; j += TILE) {
            _tile_loadd(1, rows + j, all * sizeof(bf16));
            ask_for(block + (2 * all + j) * LANES);
            _tile_loadd(2, block + j * LANES, LANES * sizeof(float));
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, totals, sizeof(vec));
    }
};
#endif

template <class T> int64_t packed_size(int64_t outputs, int64_t inputs) {
    return round_up(outputs, LANES) * Panel<T>::depth(inputs);
}

// packed: packed_size numbers, all zero.
template <class T> void pack(const T* matrix, int64_t outputs, int64_t inputs, T* packed) {
    const int64_t each = sizeof(T) == 2 ? 2 : 1, depth = Panel<T>::depth(inputs);
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t j = 0; j < inputs; j++) {
            const int64_t row = o / LANES * depth + j / each * each;
            packed[row * LANES + o % LANES * each + j % each] = matrix[o * inputs + j];
        }
}

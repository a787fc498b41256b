// x W^T + bias on AMX's tiles, for bfloat16 weights that lie in the blocks of blocks.h.
//
// A thread takes a part of the outputs: decoding, a step reads every weight once and does little
// with it, so that all depends on reading them without a pause.

#include <omp.h>

#include "blocks.h"

#ifdef __AMX_BF16__
namespace {

struct Linear {
    const bf16* x;
    int64_t x_row, rows, inputs;  // a multiple of HELD
    const bf16* weight;
    int64_t outputs;
    const bf16* bias;  // null: none
    bf16* y;

    // Blocks first..last of the outputs.
    void run(int64_t first, int64_t last) const {
        int64_t ready = 0;
        for (int64_t b = first; b < last; b += 2)
            for (int64_t r = 0; r < rows; r += 2 * tiles::SIDE) {
                const int64_t n = std::min(rows - r, 2 * tiles::SIDE);
                if (n != ready) tiles::set_up(ready = n, inputs);
                multiply(r, n, b, std::min<int64_t>(last - b, 2));
            }
        _tile_release();
    }

    void multiply(int64_t r, int64_t n, int64_t b, int64_t blocks) const {
        constexpr int64_t WIDTH = 2 * LANES;
        alignas(64) float totals[2 * tiles::SIDE * WIDTH];
        const bf16 *from = x + r * x_row, *block = weight + b * LANES * inputs;
        if (n > tiles::SIDE && blocks > 1)
            tiles::multiply<2, 2>(from, x_row, block, inputs, totals, WIDTH);
        else if (n > tiles::SIDE)
            tiles::multiply<2, 1>(from, x_row, block, inputs, totals, WIDTH);
        else if (blocks > 1)
            tiles::multiply<1, 2>(from, x_row, block, inputs, totals, WIDTH);
        else
            tiles::multiply<1, 1>(from, x_row, block, inputs, totals, WIDTH);
        for (int64_t k = 0; k < blocks; k++) {
            const int64_t o = (b + k) * LANES, count = std::min(LANES, outputs - o);
            const vec added = bias ? load_part(bias + o, count) : vec{};
            for (int64_t i = 0; i < n; i++)
                store_part(y + (r + i) * outputs + o, load(totals + i * WIDTH + k * LANES) + added,
                           count);
        }
    }
};

}  // namespace

// x: neighbours in a row, `x_row` numbers from row to row. y: [rows, outputs], contiguous.
extern "C" void linear_bf16(const bf16* x, int64_t x_row, int64_t rows, int64_t inputs,
                            const bf16* weight, int64_t outputs, const bf16* bias, bf16* y) {
    const Linear linear{x, x_row, rows, inputs, weight, outputs, bias, y};
    const int64_t blocks = round_up(outputs, LANES) / LANES;
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        linear.run(blocks * thread / threads, blocks * (thread + 1) / threads);
    }
}
#endif

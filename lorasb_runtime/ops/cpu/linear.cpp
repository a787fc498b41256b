// x W^T + bias on AMX's tiles, for bfloat16 weights that lie in the blocks of blocks.h; and the same
// with rows that each have a core R of their own, + B (R (A x)).
//
// A thread takes a part of the outputs: decoding, a step reads every weight once and does little
// with it, so that all depends on reading them without a pause. B's part joins the totals while
// they are in the tiles, and is rounded with them.

#include <memory>
#include <omp.h>
#include <vector>

#include "blocks.h"
#include "cores.h"

#ifdef __AMX_BF16__
namespace {

constexpr int64_t MOST_ROWS = 2 * tiles::SIDE;  // that share a block once it is loaded
// Of many rows, what stays near while the blocks pass it.
constexpr int64_t NEAR_ROWS = 8 * MOST_ROWS, NEAR_INPUTS = 32 * HELD;

// R (A x) of the first `rows` rows, and the B's that it is yet to be multiplied by.
struct Values {
    const bf16* v;  // [rows, members * depth], and zero rows to a multiple of MOST_ROWS
    int64_t rows, depth, members;
    const bf16* b;
    const int64_t* spans;  // begin, end of each member's outputs, in whole blocks but for the last

    const bf16* of(int64_t row, int64_t member) const {
        return v + row * members * depth + member * depth;
    }
    // The member that has these outputs, or `members`; `block`: its block of B.
    int64_t member(int64_t output, const bf16*& block) const {
        block = b;
        for (int64_t m = 0; m < members; m++) {
            const int64_t begin = spans[2 * m], end = spans[2 * m + 1];
            if (begin <= output && output < end) {
                block += (output - begin) * depth;
                return m;
            }
            block += round_up(end - begin, LANES) * depth;
        }
        return members;
    }
};

struct Linear {
    const bf16* x;  // [rows, inputs], or many rows packed; inputs: a multiple of HELD
    int64_t rows, inputs;
    const bf16* weight;
    int64_t outputs;
    const bf16* bias;  // null: none
    bf16* y;  // [rows, outputs]

    // This thread's part of the outputs; values: null for none. Many rows are taken by parts that
    // stay near, with a part of the inputs at a time.
    void run(const Values* values) const {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t blocks = round_up(outputs, LANES) / LANES;
        const int64_t first = blocks * thread / threads * LANES;
        const int64_t last = blocks * (thread + 1) / threads * LANES;
        const int64_t some = rows > MOST_ROWS ? std::min(inputs, NEAR_INPUTS) : inputs;
        const int64_t near = round_up(std::min(rows, NEAR_ROWS), MOST_ROWS);
        std::vector<float> held(some < inputs ? near * (last - first) : 0);
        int64_t ready = 0, count = 1;
        for (int64_t begin = 0; begin < rows; begin += NEAR_ROWS)
            for (int64_t from = 0; from < inputs; from += some)
                for (int64_t o = first; o < last; o += count * LANES) {
                    const bf16 *b = nullptr, *next = nullptr;
                    const int64_t member = values ? values->member(o, b) : 0;
                    const bool alike = !values || values->member(o + LANES, next) == member;
                    const bool expands = values && member < values->members;
                    count = o + LANES < last && alike ? 2 : 1;
                    float* place = held.data() + (o - first) * MOST_ROWS;
                    const int64_t end = std::min(rows, begin + NEAR_ROWS);
                    for (int64_t r = begin; r < end; r += MOST_ROWS) {
                        const int64_t n = std::min(rows - r, MOST_ROWS);
                        if (n != ready) tiles::set_up(ready = n, HELD);
                        const bool has = expands && r < values->rows;
                        const bf16* v = has ? values->of(r, member) : nullptr;
                        const Part part{r, n, o, from, std::min(inputs - from, some), place, v, b,
                                        values ? values->members * values->depth : 0,
                                        values ? values->depth : 0};
                        const auto sum = n > tiles::SIDE
                                             ? count > 1 ? &Linear::add<2, 2> : &Linear::add<2, 1>
                                         : count > 1 ? &Linear::add<1, 2>
                                                     : &Linear::add<1, 1>;
                        (this->*sum)(part);
                        place += (last - first) * MOST_ROWS;
                    }
                }
        _tile_release();
    }

    // n rows from r on, outputs from o on, `depth` inputs from `from` on; `held`: the totals of the
    // inputs before, for MOST_ROWS rows; v: null, or rows that B's block is to be multiplied by.
    struct Part {
        int64_t r, n, o, from, depth;
        float* held;
        const bf16 *v, *b;
        int64_t v_row, v_depth;
    };

    template <int R, int B> void add(const Part& part) const {
        constexpr int64_t WIDTH = B * LANES;
        if (part.from)
            tiles::load<R, B>(part.held, WIDTH);
        else
            tiles::zero<R, B>();
        const bf16* block = weight + part.o * inputs + part.from * LANES;
        tiles::add<R, B>(place(part.r, part.from), block, part.depth, inputs * LANES);
        if (part.from + part.depth < inputs) return tiles::store<R, B>(part.held, WIDTH);
        if (part.v)
            tiles::add<R, B>({part.v, part.v_row, HELD}, part.b, part.v_depth,
                             part.v_depth * LANES);
        alignas(64) float totals[R * tiles::SIDE * WIDTH];
        tiles::store<R, B>(totals, WIDTH);
        for (int64_t k = 0; k < WIDTH; k += LANES) {
            const int64_t o = part.o + k, count = std::min(LANES, outputs - o);
            const vec added = bias ? load_part(bias + o, count) : vec{};
            bf16* to = y + part.r * outputs + o;
            for (int64_t i = 0; i < part.n; i++)
                store_part(to + i * outputs, load(totals + i * WIDTH + k) + added, count);
        }
    }

    // Of rows from r on, a multiple of MOST_ROWS.
    tiles::Place place(int64_t r, int64_t from) const {
        if (rows > MOST_ROWS)
            return {x + r * inputs + from * MOST_ROWS, HELD, MOST_ROWS * HELD};
        return {x + r * inputs + from, inputs, HELD};
    }
};

// A linear's rows as it reads them: as they are, or, more than MOST_ROWS, packed, MOST_ROWS of them
// at a time and HELD inputs of each together, so that tiles have no gaps.
struct Packed {
    const bf16* given;
    int64_t rows, inputs;
    std::unique_ptr<bf16[]> own;

    Packed(const bf16* x, int64_t rows, int64_t inputs) : given(x), rows(rows), inputs(inputs) {
        if (rows > MOST_ROWS) own.reset(new bf16[round_up(rows, MOST_ROWS) * inputs]);
    }
    const bf16* x() const { return own ? own.get() : given; }

    // All threads take part, and have it when it is done.
    void fill() const {
        if (!own) return;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < inputs; j += HELD)
                std::copy_n(given + r * inputs + j, HELD,
                            own.get() + r / MOST_ROWS * MOST_ROWS * inputs + j * MOST_ROWS +
                                r % MOST_ROWS * HELD);
    }
};

// shrink: gives A x of all members, one after the other.
template <class C>
void run_adapted(const Packed& packed, const Linear& linear, const Linear& shrink, const C* cores,
                 int64_t core_row, const int64_t* slots, int64_t rows, const bf16* b,
                 const int64_t* spans, int64_t members, int64_t r) {
    const int64_t depth = round_up(r, HELD);
    std::vector<bf16> v(round_up(rows, MOST_ROWS) * members * depth);
    const Values values{v.data(), rows, depth, members, b, spans};
    const auto core = [&](int64_t pair) {
        return cores + slots[pair / members] * core_row + pair % members * r * r;
    };
#pragma omp parallel
    {
        packed.fill();
        shrink.run(nullptr);
        std::vector<typename Core<bf16, C>::number> h(round_up(r, Core<bf16, C>::WIDTH));
        std::vector<float> out(round_up(r, LANES));
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < rows * members; pair++) {
            if (!slots[pair / members]) continue;
            convert(shrink.y + pair * r, r, h.data());
            times_core<bf16>(core(pair), core(std::min(pair + 1, rows * members - 1)), h.data(), r,
                             out.data());
            convert(out.data(), r, v.data() + pair * depth);
        }
        linear.run(&values);
    }
}

}  // namespace

extern "C" void linear_bf16(const bf16* x, int64_t rows, int64_t inputs, const bf16* weight,
                            int64_t outputs, const bf16* bias, bf16* y) {
    const Packed packed(x, rows, inputs);
    const Linear linear{packed.x(), rows, inputs, weight, outputs, bias, y};
#pragma omp parallel
    {
        packed.fill();
        linear.run(nullptr);
    }
}

// Behind the weight's outputs lie those of A; h: [rows, members * r], A x. Deltas are those of the
// first `adapted` rows; cores: the group's columns of the slot table, at slot 0.
#define ADAPTED_LINEAR(NAME, C)                                                                    \
    extern "C" void NAME(const bf16* x, int64_t rows, int64_t inputs, const bf16* weight,          \
                         int64_t outputs, const bf16* bias, bf16* y, bf16* h, const C* cores,      \
                         int64_t core_row, const int64_t* slots, int64_t adapted, const bf16* b,   \
                         const int64_t* spans, int64_t members, int64_t r) {                       \
        const Packed packed(x, rows, inputs);                                                      \
        const bf16* a = weight + outputs * inputs;                                                 \
        run_adapted(packed, Linear{packed.x(), rows, inputs, weight, outputs, bias, y},            \
                    Linear{packed.x(), rows, inputs, a, members * r, nullptr, h}, cores, core_row, \
                    slots, adapted, b, spans, members, r);                                         \
    }

ADAPTED_LINEAR(adapted_linear_bf16_f32, float)
ADAPTED_LINEAR(adapted_linear_bf16_bf16, bf16)
#endif

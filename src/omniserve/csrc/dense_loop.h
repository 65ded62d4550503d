// The inner loops of dense.h, given an instruction set's vectors: kLanes, Floats, load(const float*),
// store(float*, Floats), broadcast(float), fused(a, b, c) = a * b + c, kFilledRows and Weights<DType>. Everything is in
// an unnamed namespace, see attend_loop.h.
#pragma once

#include "dense.h"
#include "simd.h"
#include "unrolled.h"

namespace omniserve {
namespace {

constexpr int kAhead = 8192;  // bytes of weights that are fetched ahead

/// Inputs that lie side by side in a panel.
template <DType kType>
constexpr int kInputsOf = kType == DType::bf16 ? 2 : 1;

/// Adds kInputs inputs, from `k` on, to the sums. w: their weights.
template <class Ops, DType kType, int kInputs, int kRows, int kVecs>
OMNI_INLINE inline void add_inputs(const std::byte* w, const float* const (&x)[kRows], int k,
                                   typename Ops::Floats (&sum)[kRows][kVecs]) {
    constexpr int kStep = kInputsOf<kType>, kVecBytes = Ops::kLanes * kStep * int(item_size(kType));
    typename Ops::Floats weights[kVecs][kStep];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) Ops::template Weights<kType>::load(w + v * kVecBytes, weights[v]);
#pragma GCC unroll 2
    for (int step = 0; step < kInputs; ++step) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const auto factor = Ops::broadcast(x[r][k + step]);
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) sum[r][v] = Ops::fused(weights[v][step], factor, sum[r][v]);
        }
    }
}

/// Sums of kRows rows over inputs [first, last), for kVecs vectors of outputs from `vec` on.
template <class Ops, DType kType, int kRows, int kVecs>
void block(const PanelArgs& a, int row, int vec, int first, int last) {
    constexpr int kStep = kInputsOf<kType>, kItem = int(item_size(kType));
    constexpr int kRowBytes = kPanel * kStep * kItem;
    const std::byte* w = static_cast<const std::byte*>(a.weights) + size_t(first) / kStep * kRowBytes +
                         vec * Ops::kLanes * kStep * kItem;
    const float* x[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
        x[r] = static_cast<const float*>(a.x) + (row + r < a.num_rows ? row + r : a.num_rows - 1) * a.x_stride;
    typename Ops::Floats sum[kRows][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sum[r][v] = Ops::broadcast(0.0f);
    int k = first;
    for (; k + kStep <= last; k += kStep, w += kRowBytes) {
        if (vec == 0)
#pragma GCC unroll 4
            for (int line = 0; line < kRowBytes; line += 64) __builtin_prefetch(w + kAhead + line, 0, 2);
        add_inputs<Ops, kType, kStep>(w, x, k, sum);
    }
    if (k < last) add_inputs<Ops, kType, 1>(w, x, k, sum);
    float* to = a.sums + row * kPanel + vec * Ops::kLanes;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r, to += kPanel) {
        if (row + r >= a.num_rows) break;  // not in the loop's condition: gcc unrolls no loop with two of them
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
            float* total = to + v * Ops::kLanes;
            Ops::store(total, first == 0 ? sum[r][v] : Ops::add(Ops::load(total), sum[r][v]));
        }
    }
}

/// As many vectors of outputs at a time as keep the sums in registers.
template <class Ops, DType kType, int kRows>
void rows_of(const PanelArgs& a, int row, int first, int last) {
    constexpr int kAll = kPanel / Ops::kLanes;
    constexpr int kVecs = kRows * kAll <= Ops::kSums ? kAll : kRows * kAll / 2 <= Ops::kSums ? kAll / 2 : kAll / 4;
    static_assert(kVecs >= 1 && kRows * kVecs <= Ops::kSums);
    for (int vec = 0; vec < kAll; vec += kVecs) block<Ops, kType, kRows, kVecs>(a, row, vec, first, last);
}

/// Rows from `row` on, the most that one of the loops takes; returns how many. Where a few rows take longer than a few
/// more (they wait for memory, in a worse rhythm), 2 or more are filled up to Ops::kFilledRows: the last row is
/// computed again, and not stored.
template <class Ops, DType kType>
int some_rows(const PanelArgs& a, int row, int first, int last) {
    const int left = a.num_rows - row;
    int taken = 0;
    const auto take = [&](auto count) {
        constexpr bool fills_up = count() == Ops::template kFilledRows<kType>;
        if (taken == 0 && count() <= Ops::kRows && (count() <= left || (fills_up && left > 1))) {
            if constexpr (count() <= Ops::kRows) rows_of<Ops, kType, count()>(a, row, first, last);
            taken = count() < left ? count() : left;
        }
    };
    take(Index<12>{}), take(Index<8>{}), take(Index<6>{}), take(Index<4>{}), take(Index<2>{}), take(Index<1>{});
    return taken;
}

/// One panel for all rows, up to Ops::kRows at a time: x of a block of inputs stays in the nearest cache, and the
/// panel's weights of that block for the rows after the first ones.
template <class Ops, DType kType>
void panel(const PanelArgs& a) {
    for (int first = 0; first < a.num_in; first += kBlock) {
        const int last = first + kBlock < a.num_in ? first + kBlock : a.num_in;
        for (int row = 0; row < a.num_rows;) row += some_rows<Ops, kType>(a, row, first, last);
    }
}

/// silu(x) = x * sigmoid(x), by the exponential of -|x|. Plain loops: the compiler has this file's vectors for them.
inline void apply_gate(const float* gate, float* up, size_t count) {
    float exps[kPanel];
    for (size_t i = 0; i < count; i += kPanel) {
        for (int j = 0; j < kPanel; ++j) exps[j] = -__builtin_fabsf(gate[i + j]);
        kernels().exp_nonpositive(exps, exps, kPanel);
        for (int j = 0; j < kPanel; ++j) {
            const float x = gate[i + j], other = exps[j] / (1.0f + exps[j]);  // sigmoid(-|x|)
            up[i + j] *= x * (x < 0.0f ? other : 1.0f - other);
        }
    }
}

}  // namespace
}  // namespace omniserve

// The inner loops of dense.h, given an instruction set's vectors: kLanes, Floats, load(const float*),
// store(float*, Floats), broadcast(float), fused(a, b, c) = a * b + c and Weights<DType>. Everything is in an unnamed
// namespace, see attend_loop.h.
#pragma once

#include "dense.h"
#include "unrolled.h"

namespace omniserve {
namespace {

constexpr int kAhead = 8192;  // bytes of weights that are fetched ahead

/// Sums of kRows rows over inputs [first, last), for kVecs vectors of outputs from `vec` on.
template <class Ops, DType kType, int kRows, int kVecs>
OMNI_INLINE inline void block(const PanelArgs& a, int row, int vec, int first, int last) {
    using Vec = typename Ops::Floats;
    using W = typename Ops::template Weights<kType>;
    constexpr int kStep = kType == DType::bf16 ? 2 : 1;  // inputs that lie side by side
    constexpr int kVecBytes = Ops::kLanes * kStep * int(item_size(kType));
    constexpr int kRowBytes = kPanel * kStep * int(item_size(kType));
    const std::byte* w = static_cast<const std::byte*>(a.weights) + size_t(first) / kStep * kRowBytes + vec * kVecBytes;
    const float* x = static_cast<const float*>(a.x) + row * a.x_stride;
    Vec sum[kRows][kVecs];
    each<kRows, kVecs, 1>([&](auto r, auto v, auto) OMNI_INLINE { sum[r()][v()] = Ops::broadcast(0.0f); });
    const auto add = [&](int k, auto count) OMNI_INLINE {
        Vec weights[kVecs][kStep];
        unrolled<kVecs>([&](auto v) OMNI_INLINE { W::load(w + v() * kVecBytes, weights[v()]); });
        if (vec == 0)
            for (int line = 0; line < kRowBytes; line += 64) __builtin_prefetch(w + kAhead + line, 0, 2);
        each<count(), kRows, 1>([&](auto step, auto r, auto) OMNI_INLINE {
            const Vec factor = Ops::broadcast(x[r() * a.x_stride + k + step()]);
            unrolled<kVecs>([&](auto v) OMNI_INLINE {
                sum[r()][v()] = Ops::fused(weights[v()][step()], factor, sum[r()][v()]);
            });
        });
        w += kRowBytes;
    };
    int k = first;
    for (; k + kStep <= last; k += kStep) add(k, Index<kStep>{});
    if (k < last) add(k, Index<1>{});
    float* to = a.sums + row * kPanel + vec * Ops::kLanes;
    each<kRows, kVecs, 1>([&](auto r, auto v, auto) OMNI_INLINE {
        float* total = to + r() * kPanel + v() * Ops::kLanes;
        Ops::store(total, first == 0 ? sum[r()][v()] : Ops::add(Ops::load(total), sum[r()][v()]));
    });
}

/// As many vectors of outputs at a time as keep the sums in registers.
template <class Ops, DType kType, int kRows>
void rows_of(const PanelArgs& a, int row, int first, int last) {
    constexpr int kAll = kPanel / Ops::kLanes;
    constexpr int kVecs = kRows * kAll <= Ops::kSums ? kAll : kRows * kAll / 2 <= Ops::kSums ? kAll / 2 : kAll / 4;
    static_assert(kVecs >= 1 && kRows * kVecs <= Ops::kSums);
    for (int vec = 0; vec < kAll; vec += kVecs) block<Ops, kType, kRows, kVecs>(a, row, vec, first, last);
}

template <class Ops, DType kType, int kMaxRows = Ops::kRows>
void some_rows(const PanelArgs& a, int row, int count, int first, int last) {
    if constexpr (kMaxRows > 0) {
        if (count == kMaxRows) rows_of<Ops, kType, kMaxRows>(a, row, first, last);
        else some_rows<Ops, kType, kMaxRows - 1>(a, row, count, first, last);
    }
}

/// One panel for all rows, Ops::kRows at a time: x of a block of inputs stays in the nearest cache, and the panel's
/// weights of that block for the rows after the first ones.
template <class Ops, DType kType>
void panel(const PanelArgs& a) {
    for (int first = 0; first < a.num_in; first += kBlock) {
        const int last = first + kBlock < a.num_in ? first + kBlock : a.num_in;
        for (int row = 0; row < a.num_rows; row += Ops::kRows) {
            const int left = a.num_rows - row;
            some_rows<Ops, kType>(a, row, left < Ops::kRows ? left : Ops::kRows, first, last);
        }
    }
}

}  // namespace
}  // namespace omniserve

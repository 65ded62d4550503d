// What a decoder does to each row between the products: norms and rotary embedding. Arithmetic is float32. Rows
// of 16 bits are rounded at the end, and by the norm also before the weight, as transformers does.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace omniserve {

/// Rows in memory, `stride` elements apart.
struct RowSpan {
    void* data;
    ptrdiff_t stride;
    DType dtype;

    std::byte* row(int64_t i) const { return static_cast<std::byte*>(data) + i * stride * ptrdiff_t(item_size(dtype)); }
};

/// Of each row the `groups` parts of `size` elements, each on its own: y = x / sqrt(mean(x^2) + eps), rounded to the type
/// of the rows, times weight[groups][size]. `y` may be `x`.
void rms_norm(int n, int groups, int size, const RowSpan& x, const void* weight, float eps, const RowSpan& y);

/// Rotary embedding of the first `heads` heads of each row, in place. Row i takes row positions[i] of the two tables
/// [positions][head_dim]: x * cos + (x with its halves swapped) * sin, where sin is negative in its first half.
void rotate_heads(int n, int heads, int head_dim, const RowSpan& x, const void* cos, const void* sin,
                  const int64_t* positions);

}  // namespace omniserve

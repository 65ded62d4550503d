// What attention may be off by, beyond the order of its sums, where int8 KV is multiplied as integers.
#pragma once

#include <string_view>

#include "attention.h"

namespace omniserve::testing {

/// How far float32 attention over the same KV may lie apart when its sums are taken in another order, for the small
/// numbers of these tests. Where queries and weights are rounded to 16 bits, tile by tile, what that costs too; its
/// exact bound is tested by tests/host/test_int8.py.
inline double attention_tolerance(const KvGeometry& kv, int group) {
    const std::string_view path = kernels().name;
    const bool has_integers = path == "avx512_vnni" || path == "avx512_bf16";
    const bool fits = group > 1 && kv.page_size % 64 == 0 && kv.head_dim % 64 == 0;
    return has_integers && kv.dtype == DType::i8 && fits ? 2e-4 : 3e-6;
}

}  // namespace omniserve::testing

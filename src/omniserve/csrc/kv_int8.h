// KV in int8: symmetric, one float32 scale per token and KV head.
//
// With amax the largest magnitude of a token's head_dim elements, scale = amax / 127 and an element is stored as
// x / scale, rounded to nearest, ties to even: at most half a scale is lost. A token whose amax is below 2^-119 is
// stored as zeros (scale 0); one with an infinity or a NaN reads back as NaN throughout (scale NaN).
#pragma once

#include "kv.h"

namespace omniserve {

/// write_rows for a store of int8; arguments are checked already.
void write_rows_int8(const PagedKv& kv, int layer, int num_rows, const KvRows& rows, const int32_t* page_ids,
                     const int32_t* offsets);

/// repack from a blob of floating point to one of int8.
void quantise_page(const KvGeometry& from, const std::byte* from_page, int from_offset, const KvGeometry& to,
                   std::byte* to_page, int to_offset, int num_tokens);

}  // namespace omniserve

// Decode attention of the device: one query token for each of n sequences, over the device's own paged KV.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "thread_team.h"

namespace omniserve {

struct PagedAttentionArgs {
    const PagedKv* kv = nullptr;
    int32_t layer = 0;
    int32_t num_sequences = 0;
    int32_t num_heads = 0;                 // a multiple of num_kv_heads
    const float* q = nullptr;              // [num_sequences][num_heads * head_dim]
    const int32_t* page_tables = nullptr;  // row i at page_tables + i * table_stride
    ptrdiff_t table_stride = 0;
    const int32_t* context_lens = nullptr;  // tokens to attend to, the query's own included; 0 gives zeros
    float* out = nullptr;                   // [num_sequences][num_heads * head_dim]
    float scale = 1.0f;
    int32_t window = 0;  // of its tokens a query attends to the last so many; 0: to all
};

/// Throws std::invalid_argument naming the field when a size or a page id is out of range.
void check(const PagedAttentionArgs& args);

/// Work is split by sequence and, where there are too few of them, by token range; whoever finishes the last range of a
/// sequence merges them. There is no barrier except the join at the end.
void paged_attention(ThreadTeam& team, const PagedAttentionArgs& args);

}  // namespace omniserve

// Attention of prompts on the device: the rows of prefill chunks over the device's own paged KV, their own tokens
// included, which are written before.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "thread_team.h"

namespace omniserve {

/// Rows first_row .. first_row + num_rows - 1 of the batch: tokens start .. start + num_rows - 1 of one prompt.
struct PromptChunk {
    int32_t first_row = 0;
    int32_t num_rows = 0;
    int64_t start = 0;
};

struct PromptAttentionArgs {
    const PagedKv* kv = nullptr;
    int32_t layer = 0;
    int32_t num_chunks = 0;
    int32_t num_heads = 0;  // a multiple of num_kv_heads
    const PromptChunk* chunks = nullptr;
    const int32_t* page_tables = nullptr;  // of chunk i at page_tables + i * table_stride
    ptrdiff_t table_stride = 0;
    DType dtype = DType::f32;  // of q and out
    const void* q = nullptr;   // row r is [num_heads * head_dim] at q + r * q_stride elements
    ptrdiff_t q_stride = 0;
    void* out = nullptr;  // as q
    ptrdiff_t out_stride = 0;
    float scale = 1.0f;
    int32_t window = 0;  // a token attends to the last so many, itself included; 0: to all
};

/// Throws std::invalid_argument naming the field when a size or a page id is out of range.
void check(const PromptAttentionArgs& args);

/// A block of rows and one KV head is one piece of work: all its queries read a tile of keys and values while that is
/// in the nearest cache, and no tile behind its last row is read.
void prompt_attention(ThreadTeam& team, const PromptAttentionArgs& args);

}  // namespace omniserve

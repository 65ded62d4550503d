// Attention over paged KV as an algebra of partial states.
//
// A state is the attention of a group of queries (all query heads of one KV head) over some tokens:
//
//     acc[group][head_dim]   sum over tokens of exp(score - m) * v        (not normalised)
//     m[group]               largest score seen, -inf when empty
//     l[group]               sum over tokens of exp(score - m)
//
// stored flat in that order. States over disjoint token ranges merge in any order; the empty state is legal. The
// log-sum-exp of a state is m + ln(l), natural logarithm.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kv.h"
#include "simd.h"

namespace omniserve {

/// Floats of the state of one KV head.
constexpr size_t state_floats(int group, int head_dim) { return size_t(group) * (head_dim + 2); }

/// States of several KV heads, one after the other.
struct StateShape {
    int num_heads = 1;  // KV heads
    int group = 1;      // queries of each
    int head_dim = 0;

    size_t head_floats() const { return state_floats(group, head_dim); }
    size_t floats() const { return num_heads * head_floats(); }
};

/// One piece of work: tokens [first, last) of one page table, one layer, KV heads [first_head, first_head + num_heads),
/// for `group` queries of each: those of one sequence, or of all sequences that share the tokens.
struct AttendArgs {
    const PagedKv* kv = nullptr;
    const int32_t* page_table = nullptr;  // token t lies in page page_table[t / page_size]
    int32_t layer = 0;
    int32_t first_head = 0;
    int32_t num_heads = 1;
    int64_t first = 0;
    int64_t last = 0;
    const float* q = nullptr;  // [num_heads][group][head_dim], not yet scaled
    int32_t group = 1;
    float scale = 1.0f;        // multiplies q, usually 1 / sqrt(head_dim)
    float* state = nullptr;    // out, [num_heads] states of state_floats(group, head_dim)
    float* scratch = nullptr;  // scratch_floats(num_heads, group, head_dim), one per thread
    // Prompts: the group is that of several tokens, one after the other, of which each sees those up to its own.
    int32_t queries_per_token = 0;  // 0: no prompt, all queries see all tokens
    int64_t first_position = 0;     // of the first of these tokens
    int32_t window = 0;             // a token sees the last so many; 0: all
};

/// Floats that one call of `attend` needs to work in.
size_t scratch_floats(int num_heads, int group, int head_dim);

inline void attend(const AttendArgs& args) {
    kernels().attend[static_cast<int>(args.kv->geometry.dtype)](args);
}

void clear_states(float* states, const StateShape& shape);

/// into := into merged with `piece`, head by head.
void merge_states(float* into, const float* piece, const StateShape& shape);

/// out[num_heads][group][head_dim] = acc / l, zeros for an empty state; lse[num_heads][group] = m + ln(l) unless null.
void finish_states(const float* states, const StateShape& shape, float* out, float* lse = nullptr);

}  // namespace omniserve

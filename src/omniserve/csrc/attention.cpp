// The algebra of states.
#include "attention.h"

#include <cmath>
#include <limits>

#include "attend_loop.h"

namespace omniserve {

size_t scratch_floats(int num_heads, int group, int head_dim) {
    return size_t(group) * (size_t(num_heads) * head_dim + kScoreStride + 1);
}

namespace {

void clear_state(float* state, int group, int head_dim) {
    const size_t acc = size_t(group) * head_dim;
    for (size_t i = 0; i < acc; ++i) state[i] = 0.0f;
    for (int g = 0; g < group; ++g) {
        state[acc + g] = -std::numeric_limits<float>::infinity();
        state[acc + group + g] = 0.0f;
    }
}

void merge_state(float* into, const float* piece, int group, int head_dim) {
    const size_t acc = size_t(group) * head_dim;
    for (int g = 0; g < group; ++g) {
        float& m = into[acc + g];
        float& l = into[acc + group + g];
        const float piece_m = piece[acc + g], piece_l = piece[acc + group + g];
        if (piece_l == 0.0f) continue;
        const float top = m > piece_m ? m : piece_m;
        const float keep = l == 0.0f ? 0.0f : std::exp(m - top);
        const float add = std::exp(piece_m - top);
        float* a = into + size_t(g) * head_dim;
        const float* b = piece + size_t(g) * head_dim;
        for (int d = 0; d < head_dim; ++d) a[d] = a[d] * keep + b[d] * add;
        l = l * keep + piece_l * add;
        m = top;
    }
}

void finish_state(const float* state, int group, int head_dim, float* out, float* lse) {
    const size_t acc = size_t(group) * head_dim;
    for (int g = 0; g < group; ++g) {
        const float m = state[acc + g], l = state[acc + group + g];
        const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
        for (int d = 0; d < head_dim; ++d) out[g * size_t(head_dim) + d] = state[g * size_t(head_dim) + d] * inverse;
        if (lse) lse[g] = m + std::log(l);
    }
}

}  // namespace

void clear_states(float* states, const StateShape& shape) {
    for (int head = 0; head < shape.num_heads; ++head)
        clear_state(states + head * shape.head_floats(), shape.group, shape.head_dim);
}

void merge_states(float* into, const float* piece, const StateShape& shape) {
    for (int head = 0; head < shape.num_heads; ++head)
        merge_state(into + head * shape.head_floats(), piece + head * shape.head_floats(), shape.group, shape.head_dim);
}

void finish_states(const float* states, const StateShape& shape, float* out, float* lse) {
    for (int head = 0; head < shape.num_heads; ++head)
        finish_state(states + head * shape.head_floats(), shape.group, shape.head_dim,
                     out + size_t(head) * shape.group * shape.head_dim, lse ? lse + head * shape.group : nullptr);
}

}  // namespace omniserve

// A slot's rows as attention works on them: float32, whatever the act dtype they travel in.
//
// The host's workers convert, not the device: it has one thread where they are many, and moves half the bytes for it.
#pragma once

#include "attention.h"
#include "segment.h"

namespace omniserve {

/// Queries of the slot's row, [q_elements] floats: the slot's own, or widened into `scratch`.
inline const float* queries_of_slot(const Segment& segment, int slot, float* scratch) {
    const LaneGeometry& g = segment.geometry();
    if (g.act_dtype == DType::f32) return reinterpret_cast<const float*>(segment.q(slot));
    kernels().to_f32(segment.q(slot), g.act_dtype, scratch, g.q_elements());
    return scratch;
}

/// Result of the slot's row from its states, rounded once to the act dtype; `scratch` holds q_elements floats.
inline void store_result(const Segment& segment, int slot, const float* states, float* scratch) {
    const LaneGeometry& g = segment.geometry();
    const StateShape shape{g.num_kv_heads, g.group(), g.head_dim};
    if (g.act_dtype == DType::f32) return finish_states(states, shape, reinterpret_cast<float*>(segment.result(slot)));
    finish_states(states, shape, scratch);
    kernels().from_f32(scratch, segment.result(slot), g.act_dtype, g.q_elements());
}

}  // namespace omniserve

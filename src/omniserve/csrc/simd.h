// The inner loops for one instruction set, and which are in use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "dtype.h"

namespace omniserve {

struct AttendArgs;
struct PanelArgs;

struct DensePanels {
    /// One panel of dense.h for float32 rows, by the type of its weights.
    void (*of[kNumDTypes])(const PanelArgs& args);
    /// up[i] *= silu(gate[i]); `count` is a multiple of kPanel.
    void (*gate)(const float* gate, float* up, size_t count);
};

/// Inner loops of attention.h and dense.h. Every member is callable from any thread.
struct Kernels {
    const char* name;
    /// Fills args.state; each KV element is read from memory once for all queries of the group.
    void (*attend[kNumDTypes])(const AttendArgs& args);
    /// y[i] = exp(x[i]) for x[i] <= 0, relative error at most 1e-7; exactly 0 below -87.
    void (*exp_nonpositive)(const float* x, float* y, size_t count);
    void (*to_f32)(const void* from, DType dtype, float* to, size_t count);
    void (*from_f32)(const float* from, void* to, DType dtype, size_t count);
    /// Reads `bytes` bytes as fast as one core can and returns something that depends on all of them.
    uint64_t (*stream_sum)(const void* from, size_t bytes);
    const DensePanels* dense;
    /// One panel of bfloat16 weights for bfloat16 rows; null: rows are widened.
    void (*dense_bf16_rows)(const PanelArgs& args);
};

/// The kernels in use: the best the CPU offers unless set_simd chose.
const Kernels& kernels();

/// Chooses "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon" or "auto" for the whole process, between
/// calls. Throws std::invalid_argument when the name is unknown or the CPU lacks the instructions.
void set_simd(std::string_view name);

}  // namespace omniserve

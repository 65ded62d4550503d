// y = x W^T for the few rows of a walk, from weights packed once: bound by reading W, and a row's sums are the same
// whatever rows are beside it.
//
// W [num_out][num_in] is cut into panels of kPanel outputs. A panel holds, for each input, the weights of its outputs
// side by side, so that vector lanes are outputs, a weight is multiplied with all rows once it is in a register, and a
// panel is read from beginning to end:
//
//     float32, float16, int8   [num_in][kPanel]
//     bfloat16                 [num_in / 2, rounded up][kPanel][2]    pairs of inputs in one word, for the dot product
//
// Outputs that fill up the last panel have weights of zero. int8 has one float32 scale an output.
//
// Sums are float32, taken over blocks of kBlock inputs (pairs, by the dot product) in the order of inputs, then over
// the blocks: one order for any number of rows and threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dtype.h"
#include "thread_team.h"

namespace omniserve {

inline constexpr int kPanel = 32;
inline constexpr int kBlock = 512;  // inputs whose sums stay in registers; even

/// Rows x of one call for one panel: what the inner loops see.
struct PanelArgs {
    const void* weights;  // of the panel
    int num_in;
    int num_rows;
    const void* x;        // [num_rows][num_in]: float32, or bfloat16 pairs for the dot product
    ptrdiff_t x_stride;   // elements
    float* sums;          // out, [num_rows][kPanel]
};

/// A weight in packed form, in memory of its own.
class DenseWeight {
public:
    /// Packs `num_out` rows of `num_in` elements of type `from`, `stride` elements apart, and keeps them in `dtype`:
    /// float32, bfloat16, float16, or int8 with a scale an output (its largest magnitude / 127).
    DenseWeight(const void* weights, DType from, ptrdiff_t stride, int num_out, int num_in, DType dtype);
    ~DenseWeight();
    DenseWeight(const DenseWeight&) = delete;
    DenseWeight& operator=(const DenseWeight&) = delete;

    int num_out() const { return num_out_; }
    int num_in() const { return num_in_; }
    DType dtype() const { return dtype_; }
    size_t bytes() const { return num_panels() * panel_bytes_ + scales_.size() * sizeof(float); }
    int num_panels() const { return (num_out_ + kPanel - 1) / kPanel; }
    size_t panel_bytes() const { return panel_bytes_; }
    const std::byte* panel(int index) const { return data_ + index * panel_bytes_; }
    /// Of a panel's outputs; null unless int8.
    const float* scales(int panel) const { return scales_.empty() ? nullptr : scales_.data() + panel * kPanel; }

private:
    void pack_panel(int index, const float* rows);

    int num_out_, num_in_;
    DType dtype_;
    size_t panel_bytes_;
    std::byte* data_;
    std::vector<float> scales_;
};

struct DenseArgs {
    const DenseWeight* weight;
    int num_rows;
    const void* x;       // [num_rows][num_in]
    ptrdiff_t x_stride;  // elements
    void* y;             // [num_rows][num_out]
    ptrdiff_t y_stride;
    DType dtype;                  // of x and y: float32, bfloat16 or float16
    const float* bias = nullptr;  // [num_out]
    // A gated product: y = silu(x gate^T + gate_bias) * (x W^T + bias). Same shape and type as the weight.
    const DenseWeight* gate = nullptr;
    const float* gate_bias = nullptr;
};

/// y = x W^T + bias, or the gated product, the panels shared out among the team. Throws std::invalid_argument.
void dense(ThreadTeam& team, const DenseArgs& args);

}  // namespace omniserve

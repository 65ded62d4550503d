#include "row_ops.h"

#include <cmath>
#include <vector>

#include "simd.h"

namespace omniserve {
namespace {

constexpr int kSums = 16;  // partial sums that the compiler keeps in vectors

/// `count` elements as float32: themselves, or widened into `buffer`.
const float* widened(const void* from, DType dtype, size_t count, std::vector<float>& buffer) {
    if (dtype == DType::f32) return static_cast<const float*>(from);
    buffer.resize(count);
    kernels().to_f32(from, dtype, buffer.data(), count);
    return buffer.data();
}

float sum_of_squares(const float* x, int count) {
    float sums[kSums] = {};
    int i = 0;
    for (; i + kSums <= count; i += kSums)
        for (int j = 0; j < kSums; ++j) sums[j] += x[i + j] * x[i + j];
    for (; i < count; ++i) sums[0] += x[i] * x[i];
    float total = 0.0f;
    for (float sum : sums) total += sum;
    return total;
}

/// x rounded to `dtype` and back.
void round_to(DType dtype, float* x, size_t count, std::vector<uint16_t>& buffer) {
    if (dtype == DType::f32) return;
    buffer.resize(count);
    kernels().from_f32(x, buffer.data(), dtype, count);
    kernels().to_f32(buffer.data(), dtype, x, count);
}

}  // namespace

void rms_norm(int n, int groups, int size, const RowSpan& x, const void* weight, float eps, const RowSpan& y) {
    const size_t count = size_t(groups) * size;
    thread_local std::vector<float> wide_x, wide_weight, result;
    thread_local std::vector<uint16_t> rounded;
    const float* w = widened(weight, x.dtype, count, wide_weight);
    result.resize(count);
    for (int i = 0; i < n; ++i) {
        const float* from = widened(x.row(i), x.dtype, count, wide_x);
        float* to = y.dtype == DType::f32 ? reinterpret_cast<float*>(y.row(i)) : result.data();
        for (size_t at = 0; at < count; at += size) {
            const float scale = 1.0f / std::sqrt(sum_of_squares(from + at, size) / float(size) + eps);
            for (int d = 0; d < size; ++d) to[at + d] = from[at + d] * scale;
        }
        round_to(y.dtype, to, count, rounded);
        for (size_t d = 0; d < count; ++d) to[d] *= w[d];
        if (y.dtype != DType::f32) kernels().from_f32(to, y.row(i), y.dtype, count);
    }
}

void rotate_heads(int n, int heads, int head_dim, const RowSpan& x, const void* cos, const void* sin,
                  const int64_t* positions) {
    const size_t count = size_t(heads) * head_dim, row_bytes = head_dim * item_size(x.dtype);
    const int half = head_dim / 2;
    thread_local std::vector<float> wide_x, wide_cos, wide_sin, result;
    result.resize(head_dim);
    for (int i = 0; i < n; ++i) {
        const auto of_row = [&](const void* table) {
            return static_cast<const std::byte*>(table) + positions[i] * row_bytes;
        };
        const float* c = widened(of_row(cos), x.dtype, head_dim, wide_cos);
        const float* s = widened(of_row(sin), x.dtype, head_dim, wide_sin);
        const bool is_wide = x.dtype == DType::f32;
        if (!is_wide) widened(x.row(i), x.dtype, count, wide_x);
        float* head = is_wide ? reinterpret_cast<float*>(x.row(i)) : wide_x.data();
        for (int h = 0; h < heads; ++h, head += head_dim) {
            for (int d = 0; d < half; ++d) {
                const float first = head[d], second = head[d + half];
                result[d] = first * c[d] + second * s[d];
                result[d + half] = second * c[d + half] + first * s[d + half];
            }
            for (int d = 0; d < head_dim; ++d) head[d] = result[d];
        }
        if (!is_wide) kernels().from_f32(wide_x.data(), x.row(i), x.dtype, count);
    }
}

}  // namespace omniserve

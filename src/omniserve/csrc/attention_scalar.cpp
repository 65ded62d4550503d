// The reference path: plain C++ for any CPU, written to be read beside attention_avx2.cpp.
#include <cmath>
#include <cstring>

#include "attend_loop.h"
#include "kernels.h"

namespace omniserve {
namespace {

template <DType kType>
struct ScalarOps : PlainQueries {
    using T = std::conditional_t<kType == DType::f32, float,
                                 std::conditional_t<kType == DType::i8, int8_t, uint16_t>>;

    static float load(T value) {
        if constexpr (kType == DType::f32 || kType == DType::i8) return value;
        else if constexpr (kType == DType::bf16) return bf16_to_f32(value);
        else return f16_to_f32(value);
    }

    static void scores(const Tile<T>& tile, int page_size, int head_dim, const float* q, int group, float scale,
                       float* scores) {
        int at = 0;
        for (int r = 0; r < tile.num_runs; ++r) {
            const Run<T>& run = tile.runs[r];
            for (int g = 0; g < group; ++g) {
                float* row = scores + g * kScoreStride + at;
                for (int t = 0; t < run.count; ++t) row[t] = 0.0f;
                for (int d = 0; d < head_dim; ++d) {
                    const float weight = q[g * head_dim + d];
                    const T* k = run.k + size_t(d) * page_size;
                    for (int t = 0; t < run.count; ++t) row[t] += weight * load(k[t]);
                }
                for (int t = 0; t < run.count; ++t) row[t] *= scale;
            }
            at += run.count;
        }
    }

    static float softmax(float* row, int count, float& m, float& l) {
        float top = m;
        for (int t = 0; t < count; ++t) top = row[t] > top ? row[t] : top;
        float sum = 0.0f;
        for (int t = 0; t < count; ++t) sum += row[t] = std::exp(row[t] - top);
        const float rescale = std::exp(m - top);
        l = l * rescale + sum;
        m = top;
        return rescale;
    }

    static void accumulate(const Tile<T>& tile, int head_dim, const float* weights, int group,
                           const float* rescale, float* acc) {
        for (int g = 0; g < group; ++g) {
            float* row = acc + g * head_dim;
            const float* weight = weights + g * kScoreStride;
            for (int d = 0; d < head_dim; ++d) row[d] *= rescale[g];
            for (int r = 0; r < tile.num_runs; ++r) {
                const T* v = tile.runs[r].v;
                for (int t = 0; t < tile.runs[r].count; ++t, ++weight, v += head_dim)
                    for (int d = 0; d < head_dim; ++d) row[d] += *weight * load(v[d]);
            }
        }
    }
};

void exp_nonpositive(const float* x, float* y, size_t count) {
    for (size_t i = 0; i < count; ++i) y[i] = x[i] < -87.0f ? 0.0f : std::exp(x[i]);
}

void to_f32(const void* from, DType dtype, float* to, size_t count) {
    if (dtype == DType::f32) {
        std::memcpy(to, from, count * sizeof(float));
        return;
    }
    const auto* bits = static_cast<const uint16_t*>(from);
    if (dtype == DType::bf16)
        for (size_t i = 0; i < count; ++i) to[i] = bf16_to_f32(bits[i]);
    else
        for (size_t i = 0; i < count; ++i) to[i] = f16_to_f32(bits[i]);
}

void from_f32(const float* from, void* to, DType dtype, size_t count) {
    if (dtype == DType::f32) {
        std::memcpy(to, from, count * sizeof(float));
        return;
    }
    auto* bits = static_cast<uint16_t*>(to);
    if (dtype == DType::bf16)
        for (size_t i = 0; i < count; ++i) bits[i] = f32_to_bf16(from[i]);
    else
        for (size_t i = 0; i < count; ++i) bits[i] = f32_to_f16(from[i]);
}

uint64_t stream_sum(const void* from, size_t bytes) {
    const auto* words = static_cast<const uint64_t*>(from);
    uint64_t sum = 0;
    for (size_t i = 0; i < bytes / sizeof(uint64_t); ++i) sum += words[i];
    return sum;
}

}  // namespace

const Kernels kScalarKernels = {
    "scalar",
    {attend_loop<ScalarOps<DType::f32>>, attend_loop<ScalarOps<DType::bf16>>, attend_loop<ScalarOps<DType::f16>>,
     attend_loop<ScalarOps<DType::i8>>},
    exp_nonpositive,
    to_f32,
    from_f32,
    stream_sum,
    &kScalarDense,
    nullptr,
};

}  // namespace omniserve

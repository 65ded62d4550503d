#include "kv_int8.h"

#include <algorithm>
#include <limits>

namespace omniserve {
namespace {

constexpr int kBlock = 64;              // tokens whose K is rounded together: their scales stay in the cache
constexpr float kSmallest = 0x1p-119f;  // of an amax; its scale is still far from subnormal
constexpr int32_t kInfinityBits = 0x7f800000;

template <DType kType>
struct Act {
    using T = std::conditional_t<kType == DType::f32, float, uint16_t>;

    static float widen(T value) {
        if constexpr (kType == DType::f32) return value;
        else if constexpr (kType == DType::bf16) return bf16_to_f32(value);
        else return widen_half(value);
    }

    /// f16_to_f32 without branches, for vectors: the exponent moves from bias 15 to bias 127 by a product, which also
    /// normalises subnormal halves.
    static float widen_half(uint16_t half) {
        const uint32_t magnitude = half & 0x7fffu;
        const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
        const uint32_t special = magnitude >= 0x7c00u ? uint32_t{kInfinityBits} : 0;
        return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | special | (half & 0x8000u) << 16);
    }

    /// |value| as an integer that compares alike, infinity and then NaN above all numbers: unlike a maximum of floats,
    /// one of integers is turned into vector instructions.
    static int32_t magnitude(T value) { return std::bit_cast<int32_t>(widen(value)) & 0x7fffffff; }
};

struct Scale {
    float kept;     // in the page
    float divisor;  // infinite where all elements become 0
};

Scale scale_of(int32_t amax_bits) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    if (amax_bits >= kInfinityBits) return {std::numeric_limits<float>::quiet_NaN(), infinity};
    const float amax = std::bit_cast<float>(amax_bits);
    if (amax < kSmallest) return {0.0f, infinity};
    return {amax / 127.0f, amax / 127.0f};
}

/// The adder rounds to nearest even at 2^0, and leaves the integer in the low bits. It is in -127 .. 127 without a
/// clamp: |x| is at most amax, and rounding of scale and quotient is far below the half that 128 needs.
int8_t quantise(float x, float divisor) {
    return static_cast<int8_t>(std::bit_cast<uint32_t>(x / divisor + 0x1.8p23f));
}

/// One token: [n] elements side by side. Returns the scale.
template <DType kType>
float quantise_row(const typename Act<kType>::T* __restrict from, int n, int8_t* __restrict to) {
    int32_t amax = 0;
    for (int i = 0; i < n; ++i) amax = std::max(amax, Act<kType>::magnitude(from[i]));
    const Scale scale = scale_of(amax);
    for (int i = 0; i < n; ++i) to[i] = quantise(Act<kType>::widen(from[i]), scale.divisor);
    return scale.kept;
}

/// `count` tokens of one head's K, columns of [head_dim][from_stride], to columns of [head_dim][to_stride].
template <DType kType>
void quantise_columns(const typename Act<kType>::T* __restrict from, int from_stride, int head_dim, int count,
                      int8_t* __restrict to, int to_stride, float* __restrict scales) {
    for (int first = 0; first < count; first += kBlock) {
        const int n = std::min(kBlock, count - first);
        int32_t amax[kBlock] = {};
        float divisor[kBlock];
        for (int d = 0; d < head_dim; ++d) {
            const auto* row = from + size_t(d) * from_stride + first;
            for (int t = 0; t < n; ++t) amax[t] = std::max(amax[t], Act<kType>::magnitude(row[t]));
        }
        for (int t = 0; t < n; ++t) {
            const Scale scale = scale_of(amax[t]);
            scales[first + t] = scale.kept;
            divisor[t] = scale.divisor;
        }
        for (int d = 0; d < head_dim; ++d) {
            const auto* row = from + size_t(d) * from_stride + first;
            int8_t* out = to + size_t(d) * to_stride + first;
            for (int t = 0; t < n; ++t) out[t] = quantise(Act<kType>::widen(row[t]), divisor[t]);
        }
    }
}

template <DType kType>
void write_rows_as(const PagedKv& kv, int layer, int num_rows, const KvRows& rows, const int32_t* page_ids,
                   const int32_t* offsets) {
    using T = typename Act<kType>::T;
    const KvGeometry& g = kv.geometry;
    int8_t column[kMaxHeadDim];
    for (int i = 0; i < num_rows; ++i) {
        const T* k = static_cast<const T*>(rows.k) + i * rows.k_stride;
        const T* v = static_cast<const T*>(rows.v) + i * rows.v_stride;
        for (int head = 0; head < g.num_kv_heads; ++head, k += g.head_dim, v += g.head_dim) {
            kv.k_scales(page_ids[i], layer, head)[offsets[i]] = quantise_row<kType>(k, g.head_dim, column);
            int8_t* k_to = kv.k_block<int8_t>(page_ids[i], layer, head) + offsets[i];
            for (int d = 0; d < g.head_dim; ++d) k_to[size_t(d) * g.page_size] = column[d];
            int8_t* v_to = kv.v_block<int8_t>(page_ids[i], layer, head) + size_t(offsets[i]) * g.head_dim;
            kv.v_scales(page_ids[i], layer, head)[offsets[i]] = quantise_row<kType>(v, g.head_dim, v_to);
        }
    }
}

/// Tokens of one head and layer of page 0 of `from` to page 0 of `to`.
template <DType kType>
void quantise_head(const PagedKv& from, int from_offset, const PagedKv& to, int to_offset, int layer, int head,
                   int num_tokens) {
    using T = typename Act<kType>::T;
    const int head_dim = from.geometry.head_dim;
    quantise_columns<kType>(from.k_block<T>(0, layer, head) + from_offset, from.geometry.page_size, head_dim,
                            num_tokens, to.k_block<int8_t>(0, layer, head) + to_offset, to.geometry.page_size,
                            to.k_scales(0, layer, head) + to_offset);
    const T* v_from = from.v_block<T>(0, layer, head) + size_t(from_offset) * head_dim;
    int8_t* v_to = to.v_block<int8_t>(0, layer, head) + size_t(to_offset) * head_dim;
    float* v_scales = to.v_scales(0, layer, head) + to_offset;
    for (int t = 0; t < num_tokens; ++t, v_from += head_dim, v_to += head_dim)
        v_scales[t] = quantise_row<kType>(v_from, head_dim, v_to);
}

}  // namespace

void write_rows_int8(const PagedKv& kv, int layer, int num_rows, const KvRows& rows, const int32_t* page_ids,
                     const int32_t* offsets) {
    const auto write = rows.dtype == DType::f32    ? write_rows_as<DType::f32>
                       : rows.dtype == DType::bf16 ? write_rows_as<DType::bf16>
                                                   : write_rows_as<DType::f16>;
    write(kv, layer, num_rows, rows, page_ids, offsets);
}

void quantise_page(const KvGeometry& from, const std::byte* from_page, int from_offset, const KvGeometry& to,
                   std::byte* to_page, int to_offset, int num_tokens) {
    const PagedKv source{from, const_cast<std::byte*>(from_page), 1}, target{to, to_page, 1};
    const auto head_of_layer = from.dtype == DType::f32    ? quantise_head<DType::f32>
                               : from.dtype == DType::bf16 ? quantise_head<DType::bf16>
                                                           : quantise_head<DType::f16>;
    for (int layer = 0; layer < from.num_layers; ++layer)
        for (int head = 0; head < from.num_kv_heads; ++head)
            head_of_layer(source, from_offset, target, to_offset, layer, head, num_tokens);
}

}  // namespace omniserve

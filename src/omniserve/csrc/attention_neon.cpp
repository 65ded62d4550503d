// NEON path (AArch64, nothing beyond ARMv8.0-A). Same structure as attention_avx2.cpp with 4 lanes and 32 registers:
// a unit is 4 vectors, 16 tokens of K or 16 dimensions of V. See attend_loop.h for why nothing here is visible outside.
//
// Queries and weights are read as scalars next to their use and multiplied by element (`fmla v, v, v.s[0]`): a scalar
// load needs none of the vector units that bound this loop, and holds one register where a broadcast of a whole group
// would hold six. CMakeLists.txt keeps gcc from moving these loads ahead of others, which would spill sums.
#include <arm_neon.h>

#include "attend_loop.h"
#include "kernels.h"

namespace omniserve {
namespace {

constexpr int kLanes = 4;
constexpr int kMaxSubgroup = 6;  // queries whose sums stay in registers: 6 x 4 sums + 4 loads + 1 query + 1 zero = 30

/// Loads kVecs * 4 elements, kVecs even, as float32 vectors in the order of memory.
template <DType kType>
struct Storage;

template <>
struct Storage<DType::f32> {
    using T = float;
    template <int kVecs>
    static void load(const T* p, float32x4_t* x) {
#pragma GCC unroll 8
        for (int i = 0; i < kVecs; ++i) x[i] = vld1q_f32(p + i * kLanes);
    }
};

template <>
struct Storage<DType::bf16> {
    using T = uint16_t;
    template <int kVecs>
    static void load(const T* p, float32x4_t* x) {
        // A bfloat16 is the upper half of a float32: zeros are zipped in below.
        const uint16x8_t zero = vdupq_n_u16(0);
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; i += 2) {
            const uint16x8_t bits = vld1q_u16(p + i * kLanes);
            x[i] = vreinterpretq_f32_u16(vzip1q_u16(zero, bits));
            x[i + 1] = vreinterpretq_f32_u16(vzip2q_u16(zero, bits));
        }
    }
};

template <>
struct Storage<DType::f16> {
    using T = uint16_t;
    template <int kVecs>
    static void load(const T* p, float32x4_t* x) {
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; i += 2) {
            const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(p + i * kLanes));
            x[i] = vcvt_f32_f16(vget_low_f16(half));
            x[i + 1] = vcvt_high_f32_f16(half);
        }
    }
};

template <>
struct Storage<DType::i8> {  // the integers: attend_loop multiplies by their scales
    using T = int8_t;
    template <int kVecs>
    static void load(const T* p, float32x4_t* x) {
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; i += 2) {
            const int16x8_t wide = vmovl_s8(vld1_s8(p + i * kLanes));
            x[i] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
            x[i + 1] = vcvtq_f32_s32(vmovl_high_s16(wide));
        }
    }
};

/// As in attention_avx2.cpp: relative error at most 1e-7 (tested); 0 below -87, before results turn subnormal.
float32x4_t exp_nonpositive(float32x4_t x) {
    const float32x4_t lowest = vdupq_n_f32(-87.0f);
    const uint32x4_t alive = vmvnq_u32(vcltq_f32(x, lowest));  // what is no number stays none
    x = vmaxq_f32(x, lowest);
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504088896341f));
    float32x4_t r = vfmsq_n_f32(x, n, 0.693145751953125f);  // ln2, upper bits: n * this is exact
    r = vfmsq_n_f32(r, n, 1.428606820309417e-6f);           // ln2, the rest
    float32x4_t y = vdupq_n_f32(1.0f / 5040);
    y = vfmaq_f32(vdupq_n_f32(1.0f / 720), y, r);
    y = vfmaq_f32(vdupq_n_f32(1.0f / 120), y, r);
    y = vfmaq_f32(vdupq_n_f32(1.0f / 24), y, r);
    y = vfmaq_f32(vdupq_n_f32(1.0f / 6), y, r);
    y = vfmaq_f32(vdupq_n_f32(0.5f), y, r);
    y = vfmaq_f32(vdupq_n_f32(1.0f), y, r);
    y = vfmaq_f32(vdupq_n_f32(1.0f), y, r);
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    const float32x4_t scaled = vmulq_f32(y, vreinterpretq_f32_s32(power));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(scaled), alive));
}

float exp_nonpositive(float x) { return vgetq_lane_f32(exp_nonpositive(vdupq_n_f32(x)), 0); }

void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }  // into the second-level cache

/// sum[g] += weight[g * stride] * x, for kGroup queries.
template <int kGroup, int kVecs>
void add_products(const float* weight, ptrdiff_t stride, const float32x4_t* x, float32x4_t (*sum)[kVecs]) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g) {
        const float w = weight[g * stride];
#pragma GCC unroll 8
        for (int i = 0; i < kVecs; ++i) sum[g][i] = vfmaq_n_f32(sum[g][i], x[i], w);
    }
}

template <int kGroup, int kVecs>
void clear(float32x4_t (*sum)[kVecs]) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
        for (int i = 0; i < kVecs; ++i) sum[g][i] = vdupq_n_f32(0.0f);
}

template <DType kType>
struct NeonOps : PlainQueries {
    using S = Storage<kType>;
    using T = typename S::T;

    /// Asks for `kCount` elements from p on to be in the second-level cache soon.
    template <int kCount>
    static void fetch(const T* p) {
#pragma GCC unroll 4
        for (int i = 0; i < kCount * int(sizeof(T)); i += 64) prefetch(reinterpret_cast<const char*>(p) + i);
    }

    /// Scores of kChunk tokens for kGroup queries; what lies `ahead` elements further on is fetched meanwhile.
    template <int kGroup>
    static void chunk_scores(const T* k, int page_size, int head_dim, const float* q, float scale, float* scores,
                             ptrdiff_t ahead) {
        constexpr int kVecs = kChunk / kLanes;
        constexpr int kUnroll = kGroup == 1 ? 4 : kGroup <= 3 ? 2 : 1;  // enough sums to hide the latency of FMA
        constexpr int kStep = kUnroll < 2 ? 2 : kUnroll;
        float32x4_t sum[kUnroll][kGroup][kVecs];
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u) clear<kGroup, kVecs>(sum[u]);
        for (int d = 0; d < head_dim; d += kStep) {
#pragma GCC unroll 4
            for (int u = 0; u < kStep; ++u, k += page_size, ++q) {
                float32x4_t x[kVecs];
                S::template load<kVecs>(k, x);
                fetch<kChunk>(k + ahead);
                add_products<kGroup, kVecs>(q, head_dim, x, sum[u % kUnroll]);
            }
        }
#pragma GCC unroll 8
        for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
            for (int i = 0; i < kVecs; ++i) {
                float32x4_t x = sum[0][g][i];
#pragma GCC unroll 4
                for (int u = 1; u < kUnroll; ++u) x = vaddq_f32(x, sum[u][g][i]);
                vst1q_f32(scores + g * kScoreStride + i * kLanes, vmulq_n_f32(x, scale));
            }
    }

    static void scores(const Tile<T>& tile, int page_size, int head_dim, const float* q, int group, float scale,
                       float* scores) {
        int at = 0;
        for (int r = 0; r < tile.num_runs; ++r) {
            const Run<T>& run = tile.runs[r];
            for (int t = 0; t < run.count; t += kChunk)
                each_subgroup<kMaxSubgroup>(group, [&](int g, auto count) {
                    const ptrdiff_t ahead = g == 0 && t * sizeof(T) % 64 == 0 ? run.k_ahead : 0;  // once a cache line
                    chunk_scores<count()>(run.k + t, page_size, head_dim, q + g * head_dim, scale,
                                          scores + g * kScoreStride + at + t, ahead);
                });
            at += run.count;
        }
    }

    static float softmax(float* row, int count, float& m, float& l) {
        for (int t = count; t % kLanes; ++t) row[t] = -__builtin_inff();  // weight 0
        float32x4_t top4 = vdupq_n_f32(m);
        for (int t = 0; t < count; t += kLanes) top4 = vmaxq_f32(top4, vld1q_f32(row + t));
        const float top = vmaxvq_f32(top4);
        float32x4_t sum = vdupq_n_f32(0.0f);
        for (int t = 0; t < count; t += kLanes) {
            const float32x4_t y = exp_nonpositive(vsubq_f32(vld1q_f32(row + t), vdupq_n_f32(top)));
            vst1q_f32(row + t, y);
            sum = vaddq_f32(sum, y);
        }
        const float rescale = exp_nonpositive(m - top);
        l = l * rescale + vaddvq_f32(sum);
        m = top;
        return rescale;
    }

    /// Values of kVecs * 4 dimensions from `dim` on, summed over the tile for kGroup queries.
    template <int kGroup, int kVecs>
    static void sum_values(const Tile<T>& tile, bool is_ahead, int dim, int head_dim, const float* weights,
                           const float* rescale, float* acc) {
        float32x4_t sum[kGroup][kVecs];
        clear<kGroup, kVecs>(sum);
        const float* weight = weights;
        for (int r = 0; r < tile.num_runs; ++r) {
            const ptrdiff_t ahead = is_ahead ? tile.runs[r].v_ahead : 0;
            const T* v = tile.runs[r].v + dim;
            for (int t = 0; t < tile.runs[r].count; ++t, ++weight, v += head_dim) {
                float32x4_t x[kVecs];
                S::template load<kVecs>(v, x);
                fetch<kVecs * kLanes>(v + ahead);
                add_products<kGroup, kVecs>(weight, kScoreStride, x, sum);
            }
        }
#pragma GCC unroll 8
        for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
            for (int i = 0; i < kVecs; ++i) {
                float* to = acc + g * head_dim + dim + i * kLanes;
                vst1q_f32(to, vfmaq_n_f32(sum[g][i], vld1q_f32(to), rescale[g]));
            }
    }

    template <int kGroup>
    static void sum_group(const Tile<T>& tile, bool is_ahead, int head_dim, const float* weights, const float* rescale,
                          float* acc) {
        constexpr int kWide = kGroup <= 2 ? 8 : 4;  // vectors per pass
        int dim = 0;
        for (; dim + kWide * kLanes <= head_dim; dim += kWide * kLanes)
            sum_values<kGroup, kWide>(tile, is_ahead, dim, head_dim, weights, rescale, acc);
        if (kWide > 4 && dim + 4 * kLanes <= head_dim) {
            sum_values<kGroup, 4>(tile, is_ahead, dim, head_dim, weights, rescale, acc);
            dim += 4 * kLanes;
        }
        if (dim < head_dim)  // 8: head sizes are multiples of that
            sum_values<kGroup, 2>(tile, is_ahead, dim, head_dim, weights, rescale, acc);
    }

    static void accumulate(const Tile<T>& tile, int head_dim, const float* weights, int group, const float* rescale,
                           float* acc) {
        each_subgroup<kMaxSubgroup>(group, [&](int g, auto count) {  // the first one fetches for all
            sum_group<count()>(tile, g == 0, head_dim, weights + g * kScoreStride, rescale + g, acc + g * head_dim);
        });
    }
};

void exp_nonpositive_all(const float* x, float* y, size_t count) {
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) vst1q_f32(y + i, exp_nonpositive(vld1q_f32(x + i)));
    for (; i < count; ++i) y[i] = exp_nonpositive(x[i]);
}

/// Widens blocks of 8 and returns how many elements that were.
template <DType kType>
size_t widen(const void* from, float* to, size_t count) {
    const auto* p = static_cast<const typename Storage<kType>::T*>(from);
    size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        float32x4_t x[2];
        Storage<kType>::template load<2>(p + i, x);
        vst1q_f32(to + i, x[0]);
        vst1q_f32(to + i + kLanes, x[1]);
    }
    return i;
}

void to_f32(const void* from, DType dtype, float* to, size_t count) {
    size_t done = 0;
    if (dtype == DType::bf16) done = widen<DType::bf16>(from, to, count);
    if (dtype == DType::f16) done = widen<DType::f16>(from, to, count);
    kScalarKernels.to_f32(static_cast<const char*>(from) + done * item_size(dtype), dtype, to + done, count - done);
}

void from_f32(const float* from, void* to, DType dtype, size_t count) {
    if (dtype != DType::f16) return kScalarKernels.from_f32(from, to, dtype, count);
    auto* bits = static_cast<uint16_t*>(to);
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        vst1_u16(bits + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
    kScalarKernels.from_f32(from + i, bits + i, dtype, count - i);
}

uint64_t stream_sum(const void* from, size_t bytes) {
    const auto* p = static_cast<const uint64_t*>(from);
    uint64x2_t sum[4] = {};
    const size_t blocks = bytes / sizeof(sum);
    for (size_t i = 0; i < blocks; ++i, p += 8)
        for (int j = 0; j < 4; ++j) sum[j] = vaddq_u64(sum[j], vld1q_u64(p + j * 2));
    return vaddvq_u64(vaddq_u64(vaddq_u64(sum[0], sum[1]), vaddq_u64(sum[2], sum[3]))) +
           kScalarKernels.stream_sum(p, bytes - blocks * sizeof(sum));
}

}  // namespace

const Kernels kNeonKernels = {
    "neon",
    {attend_loop<NeonOps<DType::f32>>, attend_loop<NeonOps<DType::bf16>>, attend_loop<NeonOps<DType::f16>>,
     attend_loop<NeonOps<DType::i8>>},
    exp_nonpositive_all,
    to_f32,
    from_f32,
    stream_sum,
    &kNeonDense,
    nullptr,
};

}  // namespace omniserve

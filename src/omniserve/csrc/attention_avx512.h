// Inner loops of the AVX-512 paths (F, BW, DQ, VL). Same structure as attention_avx2.cpp with 16 lanes and 32
// registers: a chunk of scores is up to a whole tile, so that K is read in the order of memory, groups of up to 8
// queries stay in registers, and tails of tokens and dimensions are masks. See attend_loop.h for why nothing here is
// visible outside.
#pragma once

#include <immintrin.h>

#include "attend_loop.h"
#include "kernels.h"

namespace omniserve {
namespace {

constexpr int kMaxSubgroup = 8;  // queries whose sums stay in registers: 8 x 2 sums, at most 24 in all, of 32
constexpr int kLanes = 16;

__mmask16 first_lanes(int count) {
    return count >= kLanes ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

/// Loads kVecs * 16 elements as float32 vectors in an order of the type's own; `natural` restores the order of memory.
/// Doing so once per sum, not per load, saves bfloat16 all its shuffles. With kMasked only `count` elements are read,
/// the others are zero. kVecs is 1 or even.
template <DType kType>
struct Storage;

template <>
struct Storage<DType::f32> {
    using T = float;
    template <int kVecs, bool kMasked>
    OMNI_INLINE static void load(const T* p, int count, __m512 (&x)[kVecs]) {
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i)
            x[i] = kMasked ? _mm512_maskz_loadu_ps(first_lanes(count - i * kLanes), p + i * kLanes)
                           : _mm512_loadu_ps(p + i * kLanes);
    }
    template <int kVecs>
    OMNI_INLINE static void natural(__m512 (&)[kVecs]) {}
};

/// 16 elements of 2 bytes, `count` of them when masked.
template <bool kMasked>
__m256i load_halves(const uint16_t* p, int count) {
    return kMasked ? _mm256_maskz_loadu_epi16(first_lanes(count), p)
                   : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

template <>
struct Storage<DType::bf16> {
    using T = uint16_t;
    template <int kVecs, bool kMasked>
    OMNI_INLINE static void load(const T* p, int count, __m512 (&x)[kVecs]) {
        if constexpr (kVecs == 1) {
            x[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves<kMasked>(p, count)), 16));
        } else {  // of every 32 elements first 0 2 4 .. 30, then 1 3 5 .. 31
#pragma GCC unroll 2
            for (int i = 0; i < kVecs; i += 2) {
                const int left = count - i * kLanes;
                const __mmask32 mask = first_lanes(left) | __mmask32(first_lanes(left - kLanes)) << kLanes;
                const __m512i bits = kMasked ? _mm512_maskz_loadu_epi16(mask, p + i * kLanes)
                                             : _mm512_loadu_si512(p + i * kLanes);
                x[i] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
                x[i + 1] = _mm512_castsi512_ps(
                    _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
            }
        }
    }
    template <int kVecs>
    OMNI_INLINE static void natural(__m512 (&x)[kVecs]) {
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#pragma GCC unroll 2
        for (int i = 0; i + 1 < kVecs; i += 2) {
            const __m512 even = x[i], odd = x[i + 1];
            x[i] = _mm512_permutex2var_ps(even, low, odd);
            x[i + 1] = _mm512_permutex2var_ps(even, high, odd);
        }
    }
};

template <>
struct Storage<DType::f16> {
    using T = uint16_t;
    template <int kVecs, bool kMasked>
    OMNI_INLINE static void load(const T* p, int count, __m512 (&x)[kVecs]) {
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i)
            x[i] = _mm512_cvtph_ps(load_halves<kMasked>(p + i * kLanes, count - i * kLanes));
    }
    template <int kVecs>
    OMNI_INLINE static void natural(__m512 (&)[kVecs]) {}
};

template <>
struct Storage<DType::i8> {  // the integers: attend_loop multiplies by their scales
    using T = int8_t;
    template <int kVecs, bool kMasked>
    OMNI_INLINE static void load(const T* p, int count, __m512 (&x)[kVecs]) {
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i) {
            const T* from = p + i * kLanes;
            const __m128i bits = kMasked ? _mm_maskz_loadu_epi8(first_lanes(count - i * kLanes), from)
                                         : _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            x[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bits));
        }
    }
    template <int kVecs>
    OMNI_INLINE static void natural(__m512 (&)[kVecs]) {}
};

/// As in attention_avx2.cpp: relative error at most 1e-7 (tested); 0 below -87, before results turn subnormal.
__m512 exp_nonpositive(__m512 x) {
    const __m512 lowest = _mm512_set1_ps(-87.0f);
    const __mmask16 alive = _mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ);  // what is no number stays none
    x = _mm512_max_ps(lowest, x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);  // ln2, upper bits: n * this is exact
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.428606820309417e-6f), r);      // ln2, the rest
    __m512 y = _mm512_set1_ps(1.0f / 5040);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 720));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 120));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 24));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 6));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(alive, y, n);
}

template <DType kType>
struct Avx512Ops : PlainQueries {
    using S = Storage<kType>;
    using T = typename S::T;

    /// Asks for `kCount` elements from p on to be in the second-level cache soon.
    template <int kCount>
    OMNI_INLINE static void fetch(const T* p) {
#pragma GCC unroll 4
        for (int i = 0; i < kCount * int(sizeof(T)); i += 64)
            _mm_prefetch(reinterpret_cast<const char*>(p) + i, _MM_HINT_T1);
    }

    template <int kVecs>
    OMNI_INLINE static void store_scores(const __m512 (&sum)[kVecs], int count, float scale, float* to) {
#pragma GCC unroll 4
        for (int i = 0; i < kVecs; ++i)
            _mm512_mask_storeu_ps(to + i * kLanes, first_lanes(count - i * kLanes),
                                  _mm512_mul_ps(sum[i], _mm512_set1_ps(scale)));
    }

    /// Scores of `count` tokens, at most kVecs * 16 and exactly that unless kMasked, for kGroup queries; what
    /// lies `ahead` elements further on is fetched meanwhile.
    template <int kGroup, int kVecs, bool kMasked>
    static void chunk_scores(const T* k, int count, int page_size, int head_dim, const float* q, float scale,
                             float* scores, ptrdiff_t ahead) {
        constexpr int kUnroll = kGroup * kVecs >= 12 ? 1 : kGroup * kVecs >= 4 ? 2 : 4;  // hides the latency of FMA
        constexpr int kStep = kUnroll < 2 ? 2 : kUnroll;
        __m512 sum[kUnroll][kGroup][kVecs];
        for (auto& part : sum)
            for (auto& row : part)
                for (__m512& x : row) x = _mm512_setzero_ps();
        for (int d = 0; d < head_dim; d += kStep) {
#pragma GCC unroll 4
            for (int u = 0; u < kStep; ++u) {
                __m512 x[kVecs];
                const T* row = k + size_t(d + u) * page_size;
                S::template load<kVecs, kMasked>(row, count, x);
                fetch<kVecs * kLanes>(row + ahead);
#pragma GCC unroll 8
                for (int g = 0; g < kGroup; ++g) {
                    const __m512 weight = _mm512_set1_ps(q[g * head_dim + d + u]);
#pragma GCC unroll 4
                    for (int i = 0; i < kVecs; ++i)
                        sum[u % kUnroll][g][i] = _mm512_fmadd_ps(weight, x[i], sum[u % kUnroll][g][i]);
                }
            }
        }
#pragma GCC unroll 8
        for (int g = 0; g < kGroup; ++g) {
            __m512 row[kVecs];  // a copy: sums whose address is taken would live in memory
#pragma GCC unroll 4
            for (int i = 0; i < kVecs; ++i) {
                row[i] = sum[0][g][i];
#pragma GCC unroll 4
                for (int u = 1; u < kUnroll; ++u) row[i] = _mm512_add_ps(row[i], sum[u][g][i]);
            }
            S::template natural<kVecs>(row);
            store_scores<kVecs>(row, count, scale, scores + g * kScoreStride);
        }
    }

    /// Scores of one run for kGroup queries, in the widest chunks that its length and the registers allow.
    template <int kGroup>
    static void run_scores(const Run<T>& run, ptrdiff_t ahead, int page_size, int head_dim, const float* q,
                           float scale, float* scores) {
        for (int t = 0, count; t < run.count; t += count) {
            const T* k = run.k + t;
            const int left = run.count - t;
            if constexpr (kGroup <= 6) {
                if (left >= 64) {
                    count = 64;
                    chunk_scores<kGroup, 4, false>(k, count, page_size, head_dim, q, scale, scores + t, ahead);
                    continue;
                }
            }
            count = left < 32 ? left : 32;
            float* to = scores + t;
            if (count == 32) chunk_scores<kGroup, 2, false>(k, count, page_size, head_dim, q, scale, to, ahead);
            else if (count > 16) chunk_scores<kGroup, 2, true>(k, count, page_size, head_dim, q, scale, to, ahead);
            else if (count == 16) chunk_scores<kGroup, 1, false>(k, count, page_size, head_dim, q, scale, to, ahead);
            else chunk_scores<kGroup, 1, true>(k, count, page_size, head_dim, q, scale, to, ahead);
        }
    }

    static void scores(const Tile<T>& tile, int page_size, int head_dim, const float* q, int group, float scale,
                       float* scores) {
        int at = 0;
        for (int r = 0; r < tile.num_runs; ++r) {
            const Run<T>& run = tile.runs[r];
            each_subgroup<kMaxSubgroup>(group, [&](int g, auto count) {
                const ptrdiff_t ahead = g == 0 ? run.k_ahead : 0;  // once for all queries
                run_scores<count()>(run, ahead, page_size, head_dim, q + g * head_dim, scale,
                                    scores + g * kScoreStride + at);
            });
            at += run.count;
        }
    }

    static float softmax(float* row, int count, float& m, float& l) {
        __m512 x[kTile / kLanes];
        __m512 top16 = _mm512_set1_ps(m);
        const int vecs = (count + kLanes - 1) / kLanes;
        for (int i = 0; i < vecs; ++i) {  // lanes without a token weigh nothing
            x[i] = _mm512_mask_loadu_ps(_mm512_set1_ps(-__builtin_inff()), first_lanes(count - i * kLanes),
                                        row + i * kLanes);
            top16 = _mm512_max_ps(top16, x[i]);
        }
        const float top = _mm512_reduce_max_ps(top16);
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < vecs; ++i) {
            const __m512 y = exp_nonpositive(_mm512_sub_ps(x[i], _mm512_set1_ps(top)));
            _mm512_storeu_ps(row + i * kLanes, y);
            sum = _mm512_add_ps(sum, y);
        }
        const float rescale = _mm512_cvtss_f32(exp_nonpositive(_mm512_set1_ps(m - top)));
        l = l * rescale + _mm512_reduce_add_ps(sum);
        m = top;
        return rescale;
    }

    /// Values of `num_dims` dimensions from `dim` on, at most kVecs * 16 and exactly that unless kMasked, summed over
    /// the tile for kGroup queries.
    template <int kGroup, int kVecs, bool kMasked>
    static void sum_values(const Tile<T>& tile, bool is_ahead, int dim, int num_dims, int head_dim,
                           const float* weights, const float* rescale, float* acc) {
        __m512 sum[kGroup][kVecs];
        for (auto& row : sum)
            for (__m512& x : row) x = _mm512_setzero_ps();
        const float* weight = weights;
        for (int r = 0; r < tile.num_runs; ++r) {
            const ptrdiff_t ahead = is_ahead ? tile.runs[r].v_ahead : 0;
            const T* v = tile.runs[r].v + dim;
            for (int t = 0; t < tile.runs[r].count; ++t, ++weight, v += head_dim) {
                __m512 x[kVecs];
                S::template load<kVecs, kMasked>(v, num_dims, x);
                fetch<kVecs * kLanes>(v + ahead);
#pragma GCC unroll 8
                for (int g = 0; g < kGroup; ++g) {
                    const __m512 w = _mm512_set1_ps(weight[g * kScoreStride]);
#pragma GCC unroll 4
                    for (int i = 0; i < kVecs; ++i) sum[g][i] = _mm512_fmadd_ps(w, x[i], sum[g][i]);
                }
            }
        }
#pragma GCC unroll 8
        for (int g = 0; g < kGroup; ++g) {
            __m512 row[kVecs];  // a copy, as above
#pragma GCC unroll 4
            for (int i = 0; i < kVecs; ++i) row[i] = sum[g][i];
            S::template natural<kVecs>(row);
#pragma GCC unroll 4
            for (int i = 0; i < kVecs; ++i) {
                float* to = acc + g * head_dim + dim + i * kLanes;
                const __mmask16 mask = first_lanes(num_dims - i * kLanes);
                const __m512 before = _mm512_maskz_loadu_ps(mask, to);
                _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(before, _mm512_set1_ps(rescale[g]), row[i]));
            }
        }
    }

    template <int kGroup>
    static void sum_group(const Tile<T>& tile, bool is_ahead, int head_dim, const float* weights, const float* rescale,
                          float* acc) {
        constexpr int kWide = kGroup <= 6 ? 4 : 2;  // vectors per pass: at most 24 sums; wider is no faster
        for (int dim = 0, dims; dim < head_dim; dim += dims) {
            const int left = head_dim - dim;
            if constexpr (kWide >= 4) {
                if (left >= 64) {
                    dims = 64;
                    sum_values<kGroup, 4, false>(tile, is_ahead, dim, dims, head_dim, weights, rescale, acc);
                    continue;
                }
            }
            dims = left < 32 ? left : 32;
            if (dims == 32) sum_values<kGroup, 2, false>(tile, is_ahead, dim, dims, head_dim, weights, rescale, acc);
            else sum_values<kGroup, 2, true>(tile, is_ahead, dim, dims, head_dim, weights, rescale, acc);
        }
    }

    static void accumulate(const Tile<T>& tile, int head_dim, const float* weights, int group, const float* rescale,
                           float* acc) {
        each_subgroup<kMaxSubgroup>(group, [&](int g, auto count) {
            sum_group<count()>(tile, g == 0, head_dim, weights + g * kScoreStride, rescale + g, acc + g * head_dim);
        });
    }
};

}  // namespace
}  // namespace omniserve

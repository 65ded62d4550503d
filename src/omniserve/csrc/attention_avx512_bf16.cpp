// AVX-512 path with BF16: scores of bfloat16 keys by the dot product instruction, two dimensions at a time.
//
// A product of two bfloat16 numbers is exact in float32 and the sums are float32, so nothing is lost as long as the
// queries are bfloat16 numbers themselves, which those of a bfloat16 model are. Others take the path that widens.
// Values are widened as ever: their weights are no bfloat16 numbers. (The instruction takes subnormal numbers for
// zero.)
//
// The half of the work that becomes cheaper matters from about 5 queries a KV head on, where arithmetic and not memory
// is the limit.
#include "attention_avx512.h"

namespace omniserve {
namespace {

/// Two bfloat16 numbers in one word, the first one below.
uint32_t pack(float first, float second) {
    return __builtin_bit_cast(uint32_t, first) >> 16 | (__builtin_bit_cast(uint32_t, second) & 0xffff0000u);
}

struct DotOps : Avx512Ops<DType::bf16> {
    /// Pairs of dimensions, [num_heads][group][head_dim / 2]. head_dim is even.
    static const uint32_t* queries(const AttendArgs& args, float* scratch) {
        auto* pairs = reinterpret_cast<uint32_t*>(scratch);
        const size_t count = size_t(args.num_heads) * args.group * args.kv->geometry.head_dim / 2;
        for (size_t i = 0; i < count; ++i) pairs[i] = pack(args.q[2 * i], args.q[2 * i + 1]);
        return pairs;
    }
    static int query_stride(int head_dim) { return head_dim / 2; }

    /// Tokens 0 .. 31 of two dimensions, as pairs: tokens 0-3 8-11 16-19 24-27, then the others.
    template <bool kMasked>
    OMNI_INLINE static void load_pairs(const T* k, int page_size, int count, __m512i& low, __m512i& high) {
        const __mmask32 mask = first_lanes(count) | __mmask32(first_lanes(count - kLanes)) << kLanes;
        const __m512i even = kMasked ? _mm512_maskz_loadu_epi16(mask, k) : _mm512_loadu_si512(k);
        const __m512i odd = kMasked ? _mm512_maskz_loadu_epi16(mask, k + page_size) : _mm512_loadu_si512(k + page_size);
        low = _mm512_unpacklo_epi16(even, odd);
        high = _mm512_unpackhi_epi16(even, odd);
    }

    /// Sums of such pairs back in the order of memory.
    OMNI_INLINE static void natural_pairs(__m512& low, __m512& high) {
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        const __m512 a = low, b = high;
        low = _mm512_permutex2var_ps(a, first, b);
        high = _mm512_permutex2var_ps(a, second, b);
    }

    /// Scores of `count` tokens, at most 32 * kHalves and exactly that unless kMasked; see Avx512Ops::chunk_scores.
    template <int kGroup, int kHalves, bool kMasked>
    static void chunk_dots(const T* k, int count, int page_size, int head_dim, const uint32_t* q, float scale,
                           float* scores, ptrdiff_t ahead) {
        constexpr int kVecs = 2 * kHalves;
        constexpr int kUnroll = kGroup * kVecs >= 8 ? 1 : 8 / (kGroup * kVecs);  // hides the latency of the products
        __m512 sum[kUnroll][kGroup][kVecs];
        for (auto& part : sum)
            for (auto& row : part)
                for (__m512& x : row) x = _mm512_setzero_ps();
        const int pairs = head_dim / 2;  // a multiple of 4, as kUnroll divides
        for (int d = 0; d < pairs; d += kUnroll) {
#pragma GCC unroll 4
            for (int u = 0; u < kUnroll; ++u) {
                __m512i x[kVecs];
                const T* row = k + size_t(d + u) * 2 * page_size;
#pragma GCC unroll 2
                for (int half = 0; half < kHalves; ++half)
                    load_pairs<kMasked>(row + half * 32, page_size, count - half * 32, x[2 * half], x[2 * half + 1]);
                fetch<kVecs * kLanes>(row + ahead);
                fetch<kVecs * kLanes>(row + page_size + ahead);
#pragma GCC unroll 8
                for (int g = 0; g < kGroup; ++g) {
                    const __m512i pair = _mm512_set1_epi32(static_cast<int>(q[g * pairs + d + u]));
#pragma GCC unroll 4
                    for (int i = 0; i < kVecs; ++i)
                        sum[u][g][i] = _mm512_dpbf16_ps(sum[u][g][i], __m512bh(x[i]), __m512bh(pair));
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
#pragma GCC unroll 2
            for (int half = 0; half < kHalves; ++half) natural_pairs(row[2 * half], row[2 * half + 1]);
            store_scores<kVecs>(row, count, scale, scores + g * kScoreStride);
        }
    }

    template <int kGroup>
    static void run_dots(const Run<T>& run, ptrdiff_t ahead, int page_size, int head_dim, const uint32_t* q,
                         float scale, float* scores) {
        for (int t = 0, count; t < run.count; t += count) {
            const int left = run.count - t;
            if constexpr (kGroup <= 6) {
                if (left >= 64) {
                    count = 64;
                    chunk_dots<kGroup, 2, false>(run.k + t, count, page_size, head_dim, q, scale, scores + t, ahead);
                    continue;
                }
            }
            count = left < 32 ? left : 32;
            if (count == 32)
                chunk_dots<kGroup, 1, false>(run.k + t, count, page_size, head_dim, q, scale, scores + t, ahead);
            else
                chunk_dots<kGroup, 1, true>(run.k + t, count, page_size, head_dim, q, scale, scores + t, ahead);
        }
    }

    static void scores(const Tile<T>& tile, int page_size, int head_dim, const uint32_t* q, int group, float scale,
                       float* scores) {
        int at = 0;
        for (int r = 0; r < tile.num_runs; at += tile.runs[r++].count)
            each_subgroup<kMaxSubgroup>(group, [&](int g, auto count) {
                run_dots<count()>(tile.runs[r], g == 0 ? tile.runs[r].k_ahead : 0, page_size, head_dim,
                                  q + g * query_stride(head_dim), scale, scores + g * kScoreStride + at);
            });
    }
};

bool are_bf16(const float* x, size_t count) {
    uint32_t lost = 0;
    for (size_t i = 0; i < count; ++i) lost |= __builtin_bit_cast(uint32_t, x[i]) & 0xffffu;
    return lost == 0;
}

}  // namespace

void attend_bf16_by_dots(const AttendArgs& args) {
    const size_t count = size_t(args.num_heads) * args.group * args.kv->geometry.head_dim;
    if (are_bf16(args.q, count)) attend_loop<DotOps>(args);
    else attend_loop<Avx512Ops<DType::bf16>>(args);
}

}  // namespace omniserve

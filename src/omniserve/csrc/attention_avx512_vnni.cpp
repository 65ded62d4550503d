// AVX-512 path with VNNI: attention over int8 KV by the dot product instruction, four products of bytes a lane.
//
// One operand of vpdpbusd is unsigned, the other signed, and the sums are exact. Queries and weights, which are no
// bytes, are rounded to integers of 16 bits, 256 * high + low, each term a byte:
//
//     scores   K as it is kept + 128, unsigned; queries signed, in 32639ths of the query's largest magnitude. What the
//              128 add is the same for all tokens: the sums start at minus that.
//     values   V as it is kept, signed; weights, V's scales included, unsigned, in 65535ths of the tile's largest.
//
// So a query's element and a weight lose at most half of such a part: what that costs is bounded and tested
// (tests/host/test_int8.py), and far below what int8 itself costs. Sums of a tile fit 32 bits: 256 dimensions of
// 32639 * 127, 64 tokens of 65535 * 127; on the way there they may wrap, which exact sums undo.
//
// Four rows of 64 bytes - dimensions of K, tokens of V - become four vectors of 16 columns by unpacking; the order of
// columns is put right once per sum. Pages and head sizes that are no multiples of 64 take the path that widens,
// and so do single queries: memory limits them either way, and widening spreads its loads better.
#include "attention_avx512.h"

namespace omniserve {
namespace {

constexpr int kColumns = 64;  // bytes of a register
// Queries whose sums stay in registers, with room for what the compiler needs beside them: 16 sums of 32 registers, for
// 64 columns or half of them. Halves cost a second load and no second unpacking.
constexpr int kMaxDots = 4;
constexpr int kMaxWholeDots = 2;
constexpr float kQueryLevels = 32639.0f;  // 127 * 256 + 127: 256 * high + low with both in -128 .. 127
constexpr float kWeightLevels = 65535.0f;
constexpr int32_t kInfinityBits = 0x7f800000;

/// |x| as integers that compare alike, infinity and NaN above all numbers.
__m512i magnitudes(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }

/// Rounds numbers to integers such that the largest magnitude becomes `levels`.
class Rounding {
public:
    /// `largest` by its bits. Where a number was none, `size` is NaN and the integers mean nothing.
    Rounding(int32_t largest, float levels) : size(__builtin_bit_cast(float, largest)) {
        exponent_ = factor_ = _mm512_setzero_ps();
        if (largest >= kInfinityBits) size = __builtin_nanf("");
        if (largest == 0 || largest >= kInfinityBits) return;
        // By way of 1 .. 2: the reciprocal of a very small number is infinite.
        const __m512 all = _mm512_set1_ps(size);
        const __m512 exponent = _mm512_getexp_ps(all);
        exponent_ = _mm512_sub_ps(_mm512_setzero_ps(), exponent);
        factor_ = _mm512_div_ps(_mm512_set1_ps(levels), _mm512_scalef_ps(all, exponent_));
    }

    __m512i operator()(__m512 x) const {
        return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_scalef_ps(x, exponent_), factor_));
    }

    float size;  // what `levels` is worth

private:
    __m512 exponent_, factor_;
};

/// Writes the terms of 16 integers as the bytes high[0..3] low[0..3] high[4..7] ... low[12..15]. With kSigned the low
/// ones are signed too.
template <bool kSigned>
void store_terms(__m512i x, uint32_t* to) {
    const __m128i low = _mm512_cvtepi32_epi8(x);
    const __m512i rounded = kSigned ? _mm512_add_epi32(x, _mm512_set1_epi32(128)) : x;
    const __m128i high = _mm512_cvtepi32_epi8(_mm512_srai_epi32(rounded, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(high, low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4), _mm_unpackhi_epi32(high, low));
}

/// Columns of four rows: lane i of a vector has its column's four bytes. Vectors 0 and 1 have columns 0-3 16-19 32-35
/// 48-51 and 4-7 20-23 .., 2 and 3 go on at column 8. Of these two halves, kHalves from kFirst on.
template <int kFirst, int kHalves>
OMNI_INLINE inline void interleave(const __m512i (&row)[4], __m512i (&x)[2 * kHalves]) {
    unrolled<kHalves>([&](auto half) OMNI_INLINE {
        constexpr bool is_low = kFirst + half() == 0;
        const __m512i a = is_low ? _mm512_unpacklo_epi8(row[0], row[1]) : _mm512_unpackhi_epi8(row[0], row[1]);
        const __m512i b = is_low ? _mm512_unpacklo_epi8(row[2], row[3]) : _mm512_unpackhi_epi8(row[2], row[3]);
        x[2 * half()] = _mm512_unpacklo_epi16(a, b);
        x[2 * half() + 1] = _mm512_unpackhi_epi16(a, b);
    });
}

/// Whether a pass fetches what belongs to this row: a pass for half of the columns does so for half of the rows.
/// Fetched all in one of the passes, they would come in bursts.
template <int kFirst, int kHalves>
constexpr bool fetches(int row) {
    return kHalves == 2 || row % 2 == kFirst;
}

/// Adds four products a lane. The empty statement keeps gcc from copying a sum to another register in every round.
OMNI_INLINE inline void add_dots(__m512i& sum, __m512i of_unsigned, __m512i of_signed) {
    sum = _mm512_dpbusd_epi32(sum, of_unsigned, of_signed);
    asm("" : "+v"(sum));
}

/// Sums of such vectors by both terms, for kGroup queries.
template <int kGroup, int kFirst, int kHalves>
struct DotSums {
    static constexpr int kVecs = 2 * kHalves;
    __m512i sum[kGroup][2][kVecs];

    OMNI_INLINE void clear() {
        each<kGroup, 2, kVecs>(
            [&](auto g, auto term, auto i) OMNI_INLINE { sum[g()][term()][i()] = _mm512_setzero_si512(); });
    }

    /// body(column, sums of 8 columns from there on, as float32) for all columns of one query.
    template <class Body>
    OMNI_INLINE void each_eight(int g, Body&& body) const {
        const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        unrolled<kHalves>([&](auto half) OMNI_INLINE {
            __m512i both[2];
            unrolled<2>([&](auto i) OMNI_INLINE {
                constexpr int vec = 2 * half() + i();
                both[i()] = _mm512_add_epi32(_mm512_slli_epi32(sum[g][0][vec], 8), sum[g][1][vec]);
            });
            const __m512 a = _mm512_cvtepi32_ps(_mm512_permutex2var_epi64(both[0], first, both[1]));
            const __m512 b = _mm512_cvtepi32_ps(_mm512_permutex2var_epi64(both[0], second, both[1]));
            constexpr int column = 8 * (kFirst + half());
            body(column, _mm512_castps512_ps256(a));
            body(column + 16, _mm512_extractf32x8_ps(a, 1));
            body(column + 32, _mm512_castps512_ps256(b));
            body(column + 48, _mm512_extractf32x8_ps(b, 1));
        });
    }
};

/// One tile's weights of one query: runs one after the other, each filled up with zeros to a multiple of 4 tokens.
struct Weights {
    alignas(64) uint32_t terms[2 * (kTile / 4 + 4)];  // of 4 tokens, high and low; the last store reaches past the end
    float size;                                       // what kWeightLevels is worth
};

__mmask8 first_eight(int count) {
    return count >= 8 ? __mmask8(0xff) : count <= 0 ? __mmask8(0) : __mmask8((1 << count) - 1);
}

// The inner loops are functions of their own: among others' variables gcc spills their sums.
#define OMNI_ALONE __attribute__((noinline))

struct IntegerOps : Avx512Ops<DType::i8> {
    // A query: terms of four dimensions each, high and low, then where its low sums start and what kQueryLevels is
    // worth.
    static int query_stride(int head_dim) { return head_dim / 2 + 2; }

    static void round_query(const float* q, int head_dim, uint32_t* to) {
        __m512i largest = _mm512_setzero_si512(), sum = _mm512_setzero_si512();
        for (int d = 0; d < head_dim; d += kLanes)
            largest = _mm512_max_epi32(largest, magnitudes(_mm512_loadu_ps(q + d)));
        const Rounding rounding(_mm512_reduce_max_epi32(largest), kQueryLevels);
        for (int d = 0; d < head_dim; d += kLanes) {
            const __m512i x = rounding(_mm512_loadu_ps(q + d));
            sum = _mm512_add_epi32(sum, x);
            store_terms<true>(x, to + d / 2);
        }
        to[head_dim / 2] = uint32_t(_mm512_reduce_add_epi32(sum)) * uint32_t(-128);
        to[head_dim / 2 + 1] = __builtin_bit_cast(uint32_t, rounding.size);
    }

    static const uint32_t* queries(const AttendArgs& args, float* scratch) {
        const int head_dim = args.kv->geometry.head_dim;
        auto* to = reinterpret_cast<uint32_t*>(scratch);
        for (int i = 0; i < args.num_heads * args.group; ++i)
            round_query(args.q + size_t(i) * head_dim, head_dim, to + size_t(i) * query_stride(head_dim));
        return to;
    }

    /// Scores of `count` tokens, at most 64 and exactly that unless kMasked, those of the chosen halves.
    template <int kGroup, int kFirst, int kHalves, bool kMasked>
    OMNI_ALONE static void chunk_dots(const T* k, int count, int page_size, int head_dim, const uint32_t* q,
                                      float scale, float* scores, ptrdiff_t ahead) {
        constexpr int kVecs = 2 * kHalves;
        const ptrdiff_t stride = query_stride(head_dim);
        const __mmask64 mask = kMasked ? (uint64_t{1} << count) - 1 : ~uint64_t{0};
        DotSums<kGroup, kFirst, kHalves> sums;
        sums.clear();
        unrolled<kGroup>([&](auto g) OMNI_INLINE {
            const __m512i start = _mm512_set1_epi32(int(q[g() * stride + head_dim / 2]));
            unrolled<kVecs>([&](auto i) OMNI_INLINE { sums.sum[g()][1][i()] = start; });
        });
        const uint32_t* terms = q;
        for (int d = 0; d < head_dim; d += 4, terms += 2, k += 4 * ptrdiff_t(page_size)) {
            __m512i row[4], x[kVecs];
            unrolled<4>([&](auto i) OMNI_INLINE {
                const T* from = k + i() * ptrdiff_t(page_size);
                row[i()] = kMasked ? _mm512_maskz_loadu_epi8(mask, from) : _mm512_loadu_si512(from);
                if constexpr (fetches<kFirst, kHalves>(i())) fetch<kColumns>(from + ahead);
            });
            interleave<kFirst, kHalves>(row, x);
            unrolled<kVecs>([&](auto i) OMNI_INLINE { x[i()] = _mm512_xor_si512(x[i()], _mm512_set1_epi8(-128)); });
            each<kGroup, 2, 1>([&](auto g, auto term, auto) OMNI_INLINE {
                const __m512i weight = _mm512_set1_epi32(int(terms[g() * stride + term()]));
                unrolled<kVecs>([&](auto i) OMNI_INLINE { add_dots(sums.sum[g()][term()][i()], x[i()], weight); });
            });
        }
        unrolled<kGroup>([&](auto g) OMNI_INLINE {
            const float size = __builtin_bit_cast(float, q[g() * stride + head_dim / 2 + 1]);
            const __m256 factor = _mm256_set1_ps(size * scale), part = _mm256_set1_ps(1 / kQueryLevels);
            sums.each_eight(g(), [&](int column, __m256 x) OMNI_INLINE {
                float* to = scores + g() * kScoreStride + column;
                x = _mm256_mul_ps(_mm256_mul_ps(x, part), factor);
                if constexpr (kMasked) _mm256_mask_storeu_ps(to, first_eight(count - column), x);
                else _mm256_storeu_ps(to, x);
            });
        });
    }

    template <int kGroup, bool kMasked>
    static void run_dots(const Run<T>& run, ptrdiff_t ahead, int page_size, int head_dim, const uint32_t* q,
                         float scale, float* scores) {
        if constexpr (kGroup <= kMaxWholeDots) {
            chunk_dots<kGroup, 0, 2, kMasked>(run.k, run.count, page_size, head_dim, q, scale, scores, ahead);
        } else {
            chunk_dots<kGroup, 0, 1, kMasked>(run.k, run.count, page_size, head_dim, q, scale, scores, ahead);
            chunk_dots<kGroup, 1, 1, kMasked>(run.k, run.count, page_size, head_dim, q, scale, scores, ahead);
        }
    }

    static void scores(const Tile<T>& tile, int page_size, int head_dim, const uint32_t* q, int group, float scale,
                       float* scores) {
        int at = 0;
        for (int r = 0; r < tile.num_runs; at += tile.runs[r++].count) {
            const Run<T>& run = tile.runs[r];
            each_subgroup<kMaxDots>(group, [&](int g, auto count) {
                const auto dots = run.count == kColumns ? run_dots<count(), false> : run_dots<count(), true>;
                dots(run, g == 0 ? run.k_ahead : 0, page_size, head_dim, q + g * query_stride(head_dim), scale,
                     scores + g * kScoreStride + at);
            });
        }
    }

    static void round_weights(const Tile<T>& tile, const float* weights, Weights& to) {
        __m512i largest = _mm512_setzero_si512();
        for (int t = 0; t < tile.num_tokens; t += kLanes)
            largest = _mm512_max_epi32(
                largest, magnitudes(_mm512_maskz_loadu_ps(first_lanes(tile.num_tokens - t), weights + t)));
        const Rounding rounding(_mm512_reduce_max_epi32(largest), kWeightLevels);
        to.size = rounding.size;
        uint32_t* terms = to.terms;
        for (int r = 0; r < tile.num_runs; ++r) {
            const int count = tile.runs[r].count;
            for (int t = 0; t < count; t += kLanes)
                store_terms<false>(rounding(_mm512_maskz_loadu_ps(first_lanes(count - t), weights + t)), terms + t / 2);
            terms += 2 * ((count + 3) / 4);
            weights += count;
        }
    }

    /// Values of 64 dimensions from `dim` on, those of the chosen halves, summed over the tile for kGroup queries.
    template <int kGroup, int kFirst, int kHalves>
    OMNI_ALONE static void sum_dots(const Tile<T>& tile, bool is_ahead, int dim, int head_dim, const Weights* weights,
                                    const float* rescale, float* acc) {
        constexpr int kVecs = 2 * kHalves;
        DotSums<kGroup, kFirst, kHalves> sums;
        sums.clear();
        int at = 0;  // among the terms
        for (int r = 0; r < tile.num_runs; ++r) {
            const ptrdiff_t ahead = is_ahead ? tile.runs[r].v_ahead : 0;
            const auto add = [&](const T* v, int last) OMNI_INLINE {  // tokens 0 .. last; further ones weigh nothing
                __m512i row[4], x[kVecs];
                unrolled<4>([&](auto i) OMNI_INLINE {
                    const T* from = v + (i() < last ? i() : last) * ptrdiff_t(head_dim);
                    row[i()] = _mm512_loadu_si512(from);
                    if constexpr (fetches<kFirst, kHalves>(i())) fetch<kColumns>(from + ahead);
                });
                interleave<kFirst, kHalves>(row, x);
                each<kGroup, 2, 1>([&](auto g, auto term, auto) OMNI_INLINE {
                    const __m512i weight = _mm512_set1_epi32(int(weights[g()].terms[at + term()]));
                    unrolled<kVecs>([&](auto i) OMNI_INLINE { add_dots(sums.sum[g()][term()][i()], weight, x[i()]); });
                });
                at += 2;
            };
            const T* v = tile.runs[r].v + dim;
            int left = tile.runs[r].count;
            for (; left >= 4; left -= 4, v += 4 * ptrdiff_t(head_dim)) add(v, 3);
            if (left > 0) add(v, left - 1);
        }
        unrolled<kGroup>([&](auto g) OMNI_INLINE {
            const __m256 older = _mm256_set1_ps(rescale[g()]), size = _mm256_set1_ps(weights[g()].size);
            const __m256 part = _mm256_set1_ps(1 / kWeightLevels);
            sums.each_eight(g(), [&](int column, __m256 x) OMNI_INLINE {
                float* to = acc + g() * head_dim + dim + column;
                const __m256 before = _mm256_mul_ps(_mm256_loadu_ps(to), older);
                _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_mul_ps(x, part), size, before));
            });
        });
    }

    template <int kGroup>
    static void sum_group(const Tile<T>& tile, bool is_ahead, int head_dim, const float* rows, const float* rescale,
                          float* acc) {
        Weights weights[kGroup];
        for (int g = 0; g < kGroup; ++g) round_weights(tile, rows + g * kScoreStride, weights[g]);
        for (int dim = 0; dim < head_dim; dim += kColumns) {
            if constexpr (kGroup <= kMaxWholeDots) {
                sum_dots<kGroup, 0, 2>(tile, is_ahead, dim, head_dim, weights, rescale, acc);
            } else {
                sum_dots<kGroup, 0, 1>(tile, is_ahead, dim, head_dim, weights, rescale, acc);
                sum_dots<kGroup, 1, 1>(tile, is_ahead, dim, head_dim, weights, rescale, acc);
            }
        }
    }

    static void accumulate(const Tile<T>& tile, int head_dim, const float* weights, int group, const float* rescale,
                           float* acc) {
        each_subgroup<kMaxDots>(group, [&](int g, auto count) {
            sum_group<count()>(tile, g == 0, head_dim, weights + g * kScoreStride, rescale + g, acc + g * head_dim);
        });
    }
};

}  // namespace

void attend_int8_by_dots(const AttendArgs& args) {
    const KvGeometry& kv = args.kv->geometry;
    if (args.group > 1 && kv.page_size % kTile == 0 && kv.head_dim % kColumns == 0) attend_loop<IntegerOps>(args);
    else kAvx512Kernels.attend[static_cast<int>(DType::i8)](args);
}

}  // namespace omniserve

// AVX2 + FMA + F16C path. Same structure as attention_scalar.cpp; compiled with its own -m flags and reached only
// through the table at the end, after the CPU was asked. See attend_loop.h for why nothing here is visible outside.
#include <immintrin.h>

#include "attend_loop.h"
#include "kernels.h"

namespace omniserve {
namespace {

constexpr int kMaxSubgroup = 6;  // queries whose sums stay in registers: 6 x 2 sums + 2 loads + 1 broadcast = 15 of 16

struct Pair {
    __m256 a, b;
};

/// Loads 16 elements as two vectors in an order of the type's own; `natural` restores the order of memory. Doing so
/// once per sum, not per load, saves bfloat16 all its shuffles.
template <DType kType>
struct Storage;

template <>
struct Storage<DType::f32> {
    using T = float;
    static Pair load16(const T* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static __m256 load8(const T* p) { return _mm256_loadu_ps(p); }
    static Pair natural(Pair x) { return x; }
};

template <>
struct Storage<DType::bf16> {
    using T = uint16_t;
    static Pair load16(const T* p) {  // elements 0 2 4 .. 14 and 1 3 5 .. 15
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    static __m256 load8(const T* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static Pair natural(Pair x) {
        const __m256 low = _mm256_unpacklo_ps(x.a, x.b);   // 0 1 2 3 | 8 9 10 11
        const __m256 high = _mm256_unpackhi_ps(x.a, x.b);  // 4 5 6 7 | 12 13 14 15
        return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
    }
};

template <>
struct Storage<DType::f16> {
    using T = uint16_t;
    static __m256 load8(const T* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static Pair load16(const T* p) { return {load8(p), load8(p + 8)}; }
    static Pair natural(Pair x) { return x; }
};

template <>
struct Storage<DType::i8> {  // the integers: attend_loop multiplies by their scales
    using T = int8_t;
    static __m256 load8(const T* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static Pair load16(const T* p) { return {load8(p), load8(p + 8)}; }
    static Pair natural(Pair x) { return x; }
};

float reduce_max(__m256 x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

float reduce_add(__m256 x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

/// exp(x) for x <= 0: x = n ln2 + r with |r| <= ln2 / 2, exp(r) by a polynomial of degree 7 (remainder below 6e-9),
/// 2^n by the exponent field. Relative error at most 1e-7 (tested); 0 below -87, before results turn subnormal.
__m256 exp_nonpositive(__m256 x) {
    const __m256 lowest = _mm256_set1_ps(-87.0f);
    const __m256 alive = _mm256_cmp_ps(x, lowest, _CMP_NLT_UQ);  // what is no number stays none
    x = _mm256_max_ps(lowest, x);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145751953125f), x);     // ln2, upper bits: n * this is exact
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.428606820309417e-6f), r);         // ln2, the rest
    __m256 y = _mm256_set1_ps(1.0f / 5040);
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 720));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 120));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 24));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f / 6));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(0.5f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(_mm256_mul_ps(y, _mm256_castsi256_ps(power)), alive);
}

float exp_nonpositive(float x) {
    return _mm_cvtss_f32(_mm256_castps256_ps128(exp_nonpositive(_mm256_set1_ps(x))));
}

template <DType kType>
struct Avx2Ops : PlainQueries {
    using S = Storage<kType>;
    using T = typename S::T;

    /// What a pass over K or V fetches into the second-level cache meanwhile: its share of the next tile's K or V, a
    /// little at every step. With 8 registers of sums a tile takes many passes; if the first one fetched all of it, the
    /// core's miss buffers would overflow, and prefetches be dropped.
    struct Ahead {
        const char* at;
        size_t step;  // bytes; what lies within a cache line of it is asked for twice

        /// The share [first, last) of `total` equal ones of so many elements, over so many steps.
        Ahead(const T* next, size_t elements, int first, int last, int total, int num_steps)
            : at(reinterpret_cast<const char*>(next) + elements * sizeof(T) / total * first),
              step(elements * sizeof(T) / total * (last - first) / num_steps) {}
        void fetch() {
            for (size_t i = 0; i < step; i += 64) _mm_prefetch(at + i, _MM_HINT_T1);
            at += step;
        }
    };

    /// Scores of kChunk tokens for kGroup queries.
    template <int kGroup>
    static void chunk_scores(const T* k, int page_size, int head_dim, const float* q, float scale, float* scores,
                             Ahead ahead) {
        constexpr int kUnroll = kGroup == 1 ? 4 : kGroup <= 3 ? 2 : 1;  // enough sums to hide the latency of FMA
        constexpr int kStep = kUnroll < 2 ? 2 : kUnroll;
        Pair sum[kUnroll][kGroup];
        for (auto& part : sum)
            for (Pair& pair : part) pair = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int d = 0; d < head_dim; d += kStep) {
#pragma GCC unroll 4
            for (int u = 0; u < kStep; ++u) {
                const Pair x = S::load16(k + size_t(d + u) * page_size);
                ahead.fetch();
#pragma GCC unroll 6
                for (int g = 0; g < kGroup; ++g) {
                    const __m256 weight = _mm256_broadcast_ss(q + g * head_dim + d + u);
                    Pair& to = sum[u % kUnroll][g];
                    to.a = _mm256_fmadd_ps(weight, x.a, to.a);
                    to.b = _mm256_fmadd_ps(weight, x.b, to.b);
                }
            }
        }
        for (int g = 0; g < kGroup; ++g) {
            for (int u = 1; u < kUnroll; ++u) {
                sum[0][g].a = _mm256_add_ps(sum[0][g].a, sum[u][g].a);
                sum[0][g].b = _mm256_add_ps(sum[0][g].b, sum[u][g].b);
            }
            const Pair row = S::natural(sum[0][g]);
            _mm256_storeu_ps(scores + g * kScoreStride, _mm256_mul_ps(row.a, _mm256_set1_ps(scale)));
            _mm256_storeu_ps(scores + g * kScoreStride + 8, _mm256_mul_ps(row.b, _mm256_set1_ps(scale)));
        }
    }

    static void scores(const Tile<T>& tile, int page_size, int head_dim, const float* q, int group, float scale,
                       float* scores) {
        int at = 0;
        for (int r = 0; r < tile.num_runs; ++r) {
            const Run<T>& run = tile.runs[r];
            const int passes = (run.count + kChunk - 1) / kChunk * ((group + kMaxSubgroup - 1) / kMaxSubgroup);
            // Rows of K are one stretch where the run is a whole page.
            const size_t elements = run.count == page_size ? size_t(page_size) * head_dim : 0;
            for (int t = 0, pass = 0; t < run.count; t += kChunk)
                each_subgroup<kMaxSubgroup>(group, [&](int g, auto count) {
                    const Ahead ahead(run.k + run.k_ahead, elements, pass, pass + 1, passes, head_dim);
                    ++pass;
                    chunk_scores<count()>(run.k + t, page_size, head_dim, q + g * head_dim, scale,
                                          scores + g * kScoreStride + at + t, ahead);
                });
            at += run.count;
        }
    }

    static float softmax(float* row, int count, float& m, float& l) {
        for (int t = count; t % 8; ++t) row[t] = -__builtin_inff();  // weight 0
        __m256 top8 = _mm256_set1_ps(m);
        for (int t = 0; t < count; t += 8) top8 = _mm256_max_ps(top8, _mm256_loadu_ps(row + t));
        const float top = reduce_max(top8);
        __m256 sum = _mm256_setzero_ps();
        for (int t = 0; t < count; t += 8) {
            const __m256 y = exp_nonpositive(_mm256_sub_ps(_mm256_loadu_ps(row + t), _mm256_set1_ps(top)));
            _mm256_storeu_ps(row + t, y);
            sum = _mm256_add_ps(sum, y);
        }
        const float rescale = exp_nonpositive(m - top);
        l = l * rescale + reduce_add(sum);
        m = top;
        return rescale;
    }

    /// One subgroup of the queries: which, of how many. The next tile's V is fetched by all of them together.
    struct Subgroup {
        int index, count;
    };

    /// Values of 16 * kUnits dimensions from `dim` on, summed over the tile for kGroup queries.
    template <int kGroup, int kUnits>
    static void sum_values(const Tile<T>& tile, Subgroup part, int dim, int head_dim, const float* weights,
                           const float* rescale, float* acc) {
        Pair sum[kGroup][kUnits];
        for (auto& part : sum)
            for (Pair& pair : part) pair = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        const float* weight = weights;
        for (int r = 0; r < tile.num_runs; ++r) {
            const Run<T>& run = tile.runs[r];
            const int units = head_dim / 16, first = part.index * units + dim / 16;
            Ahead ahead(run.v + run.v_ahead, size_t(run.count) * head_dim, first, first + kUnits, part.count * units,
                        run.count);
            const T* v = run.v + dim;
            for (int t = 0; t < run.count; ++t, ++weight, v += head_dim) {
                ahead.fetch();
#pragma GCC unroll 4
                for (int u = 0; u < kUnits; ++u) {
                    const Pair x = S::load16(v + u * 16);
#pragma GCC unroll 6
                    for (int g = 0; g < kGroup; ++g) {
                        const __m256 w = _mm256_broadcast_ss(weight + g * kScoreStride);
                        sum[g][u].a = _mm256_fmadd_ps(w, x.a, sum[g][u].a);
                        sum[g][u].b = _mm256_fmadd_ps(w, x.b, sum[g][u].b);
                    }
                }
            }
        }
        for (int g = 0; g < kGroup; ++g) {
            const __m256 factor = _mm256_set1_ps(rescale[g]);
            for (int u = 0; u < kUnits; ++u) {
                float* to = acc + g * head_dim + dim + u * 16;
                const Pair x = S::natural(sum[g][u]);
                _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_loadu_ps(to), factor, x.a));
                _mm256_storeu_ps(to + 8, _mm256_fmadd_ps(_mm256_loadu_ps(to + 8), factor, x.b));
            }
        }
    }

    /// The last 8 dimensions of a head size that is no multiple of 16.
    static void sum_last8(const Tile<T>& tile, int dim, int head_dim, const float* weights, float rescale, float* acc) {
        __m256 sum = _mm256_mul_ps(_mm256_loadu_ps(acc + dim), _mm256_set1_ps(rescale));
        for (int r = 0; r < tile.num_runs; ++r) {
            const T* v = tile.runs[r].v + dim;
            for (int t = 0; t < tile.runs[r].count; ++t, ++weights, v += head_dim)
                sum = _mm256_fmadd_ps(_mm256_broadcast_ss(weights), S::load8(v), sum);
        }
        _mm256_storeu_ps(acc + dim, sum);
    }

    template <int kGroup>
    static void sum_group(const Tile<T>& tile, Subgroup part, int head_dim, const float* weights, const float* rescale,
                          float* acc) {
        constexpr int kMaxUnits = kGroup == 1 ? 4 : kGroup <= 3 ? 2 : 1;
        const int units = head_dim / 16;
        for (int unit = 0, size; unit < units; unit += size) {
            size = next_part(units - unit, kMaxUnits);
            const int dim = unit * 16;
            if constexpr (kMaxUnits >= 4) {
                if (size == 4) sum_values<kGroup, 4>(tile, part, dim, head_dim, weights, rescale, acc);
                if (size == 3) sum_values<kGroup, 3>(tile, part, dim, head_dim, weights, rescale, acc);
            }
            if constexpr (kMaxUnits >= 2) {
                if (size == 2) sum_values<kGroup, 2>(tile, part, dim, head_dim, weights, rescale, acc);
            }
            if (size == 1) sum_values<kGroup, 1>(tile, part, dim, head_dim, weights, rescale, acc);
        }
        if (head_dim % 16)
            for (int g = 0; g < kGroup; ++g)
                sum_last8(tile, units * 16, head_dim, weights + g * kScoreStride, rescale[g], acc + g * head_dim);
    }

    static void accumulate(const Tile<T>& tile, int head_dim, const float* weights, int group, const float* rescale,
                           float* acc) {
        Subgroup part{0, (group + kMaxSubgroup - 1) / kMaxSubgroup};
        each_subgroup<kMaxSubgroup>(group, [&](int g, auto count) {
            sum_group<count()>(tile, part, head_dim, weights + g * kScoreStride, rescale + g, acc + g * head_dim);
            ++part.index;
        });
    }
};

void exp_nonpositive_all(const float* x, float* y, size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(y + i, exp_nonpositive(_mm256_loadu_ps(x + i)));
    for (; i < count; ++i) y[i] = exp_nonpositive(x[i]);
}

template <DType kType>
void widen(const void* from, float* to, size_t count) {
    using S = Storage<kType>;
    const auto* p = static_cast<const typename S::T*>(from);
    size_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, S::load8(p + i));
    for (; i < count; ++i) {
        typename S::T last[8] = {p[i]};
        to[i] = _mm_cvtss_f32(_mm256_castps256_ps128(S::load8(last)));
    }
}

void to_f32(const void* from, DType dtype, float* to, size_t count) {
    if (dtype == DType::f32) widen<DType::f32>(from, to, count);
    else if (dtype == DType::bf16) widen<DType::bf16>(from, to, count);
    else widen<DType::f16>(from, to, count);
}

void from_f32(const float* from, void* to, DType dtype, size_t count) {
    if (dtype != DType::f16) return kScalarKernels.from_f32(from, to, dtype, count);
    auto* bits = static_cast<uint16_t*>(to);
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bits + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    kScalarKernels.from_f32(from + i, bits + i, dtype, count - i);
}

uint64_t stream_sum(const void* from, size_t bytes) {
    const auto* p = static_cast<const __m256i*>(from);
    __m256i sum[4] = {};
    const size_t blocks = bytes / sizeof(sum);
    for (size_t i = 0; i < blocks; ++i, p += 4)
        for (int j = 0; j < 4; ++j) sum[j] = _mm256_add_epi64(sum[j], _mm256_loadu_si256(p + j));
    alignas(32) uint64_t words[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words),
                       _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3])));
    return words[0] + words[1] + words[2] + words[3] +
           kScalarKernels.stream_sum(p, bytes - blocks * sizeof(sum));
}

}  // namespace

const Kernels kAvx2Kernels = {
    "avx2",
    {attend_loop<Avx2Ops<DType::f32>>, attend_loop<Avx2Ops<DType::bf16>>, attend_loop<Avx2Ops<DType::f16>>,
     attend_loop<Avx2Ops<DType::i8>>},
    exp_nonpositive_all,
    to_f32,
    from_f32,
    stream_sum,
    &kAvx2Dense,
    nullptr,
};

}  // namespace omniserve

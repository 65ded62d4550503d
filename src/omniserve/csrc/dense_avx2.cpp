// Dense rows with AVX2, FMA and F16C: vectors for dense_loop.h.
#include <immintrin.h>

#include "dense_loop.h"
#include "kernels.h"

namespace omniserve {
namespace {

struct Avx2Vectors {
    using Floats = __m256;
    static constexpr int kLanes = 8;
    static constexpr int kSums = 12;  // of 16 registers
    static constexpr int kRows = 6;
    template <DType kType>
    static constexpr int kFilledRows = 0;

    OMNI_INLINE static Floats load(const float* p) { return _mm256_loadu_ps(p); }
    OMNI_INLINE static void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
    OMNI_INLINE static Floats broadcast(float x) { return _mm256_set1_ps(x); }
    OMNI_INLINE static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    OMNI_INLINE static Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

    template <DType kType>
    struct Weights;
};

template <>
struct Avx2Vectors::Weights<DType::f32> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[1]) {
        w[0] = _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    }
};

template <>
struct Avx2Vectors::Weights<DType::bf16> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[2]) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        w[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u))));
    }
};

template <>
struct Avx2Vectors::Weights<DType::f16> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[1]) {
        w[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
};

template <>
struct Avx2Vectors::Weights<DType::i8> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[1]) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        w[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
};

}  // namespace

const DensePanels kAvx2Dense = {{panel<Avx2Vectors, DType::f32>, panel<Avx2Vectors, DType::bf16>,
                                 panel<Avx2Vectors, DType::f16>, panel<Avx2Vectors, DType::i8>},
                                 apply_gate};

}  // namespace omniserve

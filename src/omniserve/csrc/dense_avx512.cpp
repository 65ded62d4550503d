// Dense rows with AVX-512 (F): vectors for dense_loop.h.
#include <immintrin.h>

#include "dense_loop.h"
#include "kernels.h"

namespace omniserve {
namespace {

struct Avx512Vectors {
    using Floats = __m512;
    static constexpr int kLanes = 16;
    static constexpr int kSums = 24;  // of 32 registers
    static constexpr int kRows = 12;
    template <DType kType>
    static constexpr int kFilledRows = kType == DType::f32 ? 6 : 0;

    OMNI_INLINE static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    OMNI_INLINE static void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
    OMNI_INLINE static Floats broadcast(float x) { return _mm512_set1_ps(x); }
    OMNI_INLINE static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    OMNI_INLINE static Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

    template <DType kType>
    struct Weights;
};

template <>
struct Avx512Vectors::Weights<DType::f32> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[1]) { w[0] = _mm512_loadu_ps(p); }
};

template <>
struct Avx512Vectors::Weights<DType::bf16> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[2]) {
        const __m512i pairs = _mm512_loadu_si512(p);
        w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        w[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
    }
};

template <>
struct Avx512Vectors::Weights<DType::f16> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[1]) {
        w[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
};

template <>
struct Avx512Vectors::Weights<DType::i8> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[1]) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        w[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
};

}  // namespace

const DensePanels kAvx512Dense = {{panel<Avx512Vectors, DType::f32>, panel<Avx512Vectors, DType::bf16>,
                                 panel<Avx512Vectors, DType::f16>, panel<Avx512Vectors, DType::i8>},
                                 apply_gate};

}  // namespace omniserve

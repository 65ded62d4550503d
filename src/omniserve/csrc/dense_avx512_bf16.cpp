// Dense rows with AVX-512 BF16: two inputs at a time by the dot product instruction, twice the arithmetic of float32.
//
// For rows that are bfloat16 numbers themselves. A product of two such numbers is exact in float32 and the sums are
// float32, though in pairs of inputs, not one after the other. (The instruction takes subnormal numbers for zero.)
#include <immintrin.h>

#include "dense_loop.h"
#include "kernels.h"

namespace omniserve {
namespace {

/// A "float" of these vectors is a pair of bfloat16 numbers where it is a factor, and a float32 where it is a sum.
struct PairVectors {
    using Floats = __m512;
    static constexpr int kLanes = 16;
    static constexpr int kSums = 24;
    static constexpr int kRows = 12;
    template <DType kType>
    static constexpr int kFilledRows = 0;

    OMNI_INLINE static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    OMNI_INLINE static void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
    OMNI_INLINE static Floats broadcast(float x) { return _mm512_set1_ps(x); }
    OMNI_INLINE static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    OMNI_INLINE static Floats fused(Floats a, Floats b, Floats c) {
        return _mm512_dpbf16_ps(c, __m512bh(_mm512_castps_si512(a)), __m512bh(_mm512_castps_si512(b)));
    }

    template <DType kType>
    struct Weights {
        OMNI_INLINE static void load(const std::byte* p, Floats (&w)[1]) { w[0] = _mm512_loadu_ps(p); }
    };
};

}  // namespace

void dense_bf16_by_dots(const PanelArgs& args) {
    // Pairs take the place of float32 numbers: half as many inputs, in rows of half as many elements.
    PanelArgs pairs = args;
    pairs.num_in = (args.num_in + 1) / 2;
    pairs.x_stride = args.x_stride / 2;
    panel<PairVectors, DType::f32>(pairs);
}

}  // namespace omniserve

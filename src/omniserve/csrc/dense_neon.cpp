// Dense rows with NEON (AArch64): vectors for dense_loop.h.
#include <arm_neon.h>

#include "dense_loop.h"
#include "kernels.h"

namespace omniserve {
namespace {

struct NeonVectors {
    using Floats = float32x4_t;
    static constexpr int kLanes = 4;
    static constexpr int kSums = 24;  // of 32 registers
    static constexpr int kRows = 6;
    template <DType kType>
    static constexpr int kFilledRows = 0;

    OMNI_INLINE static Floats load(const float* p) { return vld1q_f32(p); }
    OMNI_INLINE static void store(float* p, Floats x) { vst1q_f32(p, x); }
    OMNI_INLINE static Floats broadcast(float x) { return vdupq_n_f32(x); }
    OMNI_INLINE static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
    OMNI_INLINE static Floats fused(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }

    template <DType kType>
    struct Weights;
};

template <>
struct NeonVectors::Weights<DType::f32> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[1]) {
        w[0] = vld1q_f32(reinterpret_cast<const float*>(p));
    }
};

template <>
struct NeonVectors::Weights<DType::bf16> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[2]) {
        const uint32x4_t pairs = vld1q_u32(reinterpret_cast<const uint32_t*>(p));
        w[0] = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
        w[1] = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
    }
};

template <>
struct NeonVectors::Weights<DType::f16> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[1]) {
        w[0] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
    }
};

template <>
struct NeonVectors::Weights<DType::i8> {
    OMNI_INLINE static void load(const std::byte* p, Floats (&w)[1]) {
        const uint32x2_t four = vld1_dup_u32(reinterpret_cast<const uint32_t*>(p));
        const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(four));
        w[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    }
};

}  // namespace

const DensePanels kNeonDense = {{panel<NeonVectors, DType::f32>, panel<NeonVectors, DType::bf16>,
                                 panel<NeonVectors, DType::f16>, panel<NeonVectors, DType::i8>},
                                 apply_gate};

}  // namespace omniserve

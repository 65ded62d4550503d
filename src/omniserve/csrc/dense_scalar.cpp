// Dense rows in plain C++ for any CPU: vectors of one float for dense_loop.h.
#include "dense_loop.h"
#include "kernels.h"

namespace omniserve {
namespace {

struct ScalarVectors {
    using Floats = float;
    static constexpr int kLanes = 1;
    static constexpr int kSums = 32;
    static constexpr int kRows = 1;
    template <DType kType>
    static constexpr int kFilledRows = 0;

    static float load(const float* p) { return *p; }
    static void store(float* p, float x) { *p = x; }
    static float broadcast(float x) { return x; }
    static float add(float a, float b) { return a + b; }
    static float fused(float a, float b, float c) { return a * b + c; }

    template <DType kType>
    struct Weights {
        static void load(const std::byte* p, float (&w)[kType == DType::bf16 ? 2 : 1]) {
            if constexpr (kType == DType::f32) {
                w[0] = *reinterpret_cast<const float*>(p);
            } else if constexpr (kType == DType::bf16) {
                w[0] = bf16_to_f32(reinterpret_cast<const uint16_t*>(p)[0]);
                w[1] = bf16_to_f32(reinterpret_cast<const uint16_t*>(p)[1]);
            } else if constexpr (kType == DType::f16) {
                w[0] = f16_to_f32(*reinterpret_cast<const uint16_t*>(p));
            } else {
                w[0] = float(*reinterpret_cast<const int8_t*>(p));
            }
        }
    };
};

}  // namespace

const DensePanels kScalarDense = {{panel<ScalarVectors, DType::f32>, panel<ScalarVectors, DType::bf16>,
                                   panel<ScalarVectors, DType::f16>, panel<ScalarVectors, DType::i8>},
                                 apply_gate};

}  // namespace omniserve

// State algebra and the choice of instruction set.
#include "attention.h"

#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "attend_loop.h"
#include "kernels.h"

namespace omniserve {
namespace {

/// One instruction set: its kernels (null when not compiled in) and whether CPU and operating system have it.
struct Candidate {
    std::string_view name;
    const char* needs;
    const Kernels* kernels;
    bool is_available;
};

#if defined(OMNISERVE_X86)
/// kAvx512Kernels with int8 and bfloat16 attention by the dot product instructions that a CPU has.
Kernels avx512_with_dots(const char* name, bool of_int8, bool of_bf16) {
    Kernels same = kAvx512Kernels;
    same.name = name;
    if (of_int8) same.attend[static_cast<int>(DType::i8)] = attend_int8_by_dots;
    if (of_bf16) same.attend[static_cast<int>(DType::bf16)] = attend_bf16_by_dots;
    return same;
}
#endif

/// All that set_simd knows, the best last. __builtin_cpu_supports also asks whether the operating system saves the
/// registers (xgetbv).
const std::array<Candidate, 6>& candidates() {
#if defined(OMNISERVE_X86)
    static const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                   __builtin_cpu_supports("avx512vl");
    static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    static const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
    static const Kernels vnni_kernels = avx512_with_dots("avx512_vnni", has_vnni, false);
    static const Kernels bf16_kernels = avx512_with_dots("avx512_bf16", has_vnni, has_bf16);
    const Kernels *avx2 = &kAvx2Kernels, *avx512 = &kAvx512Kernels;
    const Kernels *avx512_vnni = &vnni_kernels, *avx512_bf16 = &bf16_kernels;
#else
    constexpr bool has_avx2 = false, has_avx512 = false, has_vnni = false, has_bf16 = false;
    const Kernels *avx2 = nullptr, *avx512 = nullptr, *avx512_vnni = nullptr, *avx512_bf16 = nullptr;
#endif
#if defined(OMNISERVE_NEON)
    const Kernels* neon = &kNeonKernels;  // part of every AArch64 CPU: nothing to ask
#else
    const Kernels* neon = nullptr;
#endif
    static const std::array<Candidate, 6> all = {{
        {"scalar", "", &kScalarKernels, true},
        {"avx2", "AVX2 with FMA and F16C", avx2, has_avx2},
        {"avx512", "AVX-512 with F, BW, DQ and VL", avx512, has_avx512},
        {"avx512_vnni", "AVX-512 with F, BW, DQ, VL and VNNI", avx512_vnni, has_vnni},
        {"avx512_bf16", "AVX-512 with F, BW, DQ, VL and BF16", avx512_bf16, has_bf16},
        {"neon", "NEON (AArch64)", neon, neon != nullptr},
    }};
    return all;
}

const Kernels* best_kernels() {
    const Kernels* best = nullptr;
    for (const Candidate& candidate : candidates())
        if (candidate.is_available) best = candidate.kernels;
    return best;
}

std::atomic<const Kernels*>& active() {
    static std::atomic<const Kernels*> chosen{best_kernels()};
    return chosen;
}

}  // namespace

const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }

void set_simd(std::string_view name) {
    if (name == "auto") {
        active() = best_kernels();
        return;
    }
    for (const Candidate& candidate : candidates()) {
        if (candidate.name != name) continue;
        if (!candidate.is_available)
            throw std::invalid_argument(std::string("simd: this CPU has no ") + candidate.needs);
        active() = candidate.kernels;
        return;
    }
    throw std::invalid_argument("simd must be auto, scalar, avx2, avx512, avx512_vnni, avx512_bf16 or neon, not " +
                                std::string(name));
}

size_t scratch_floats(int num_heads, int group, int head_dim) {
    return size_t(group) * (size_t(num_heads) * head_dim + kScoreStride + 1);
}

namespace {

void clear_state(float* state, int group, int head_dim) {
    const size_t acc = size_t(group) * head_dim;
    for (size_t i = 0; i < acc; ++i) state[i] = 0.0f;
    for (int g = 0; g < group; ++g) {
        state[acc + g] = -std::numeric_limits<float>::infinity();
        state[acc + group + g] = 0.0f;
    }
}

void merge_state(float* into, const float* piece, int group, int head_dim) {
    const size_t acc = size_t(group) * head_dim;
    for (int g = 0; g < group; ++g) {
        float& m = into[acc + g];
        float& l = into[acc + group + g];
        const float piece_m = piece[acc + g], piece_l = piece[acc + group + g];
        if (piece_l == 0.0f) continue;
        const float top = m > piece_m ? m : piece_m;
        const float keep = l == 0.0f ? 0.0f : std::exp(m - top);
        const float add = std::exp(piece_m - top);
        float* a = into + size_t(g) * head_dim;
        const float* b = piece + size_t(g) * head_dim;
        for (int d = 0; d < head_dim; ++d) a[d] = a[d] * keep + b[d] * add;
        l = l * keep + piece_l * add;
        m = top;
    }
}

void finish_state(const float* state, int group, int head_dim, float* out, float* lse) {
    const size_t acc = size_t(group) * head_dim;
    for (int g = 0; g < group; ++g) {
        const float m = state[acc + g], l = state[acc + group + g];
        const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
        for (int d = 0; d < head_dim; ++d) out[g * size_t(head_dim) + d] = state[g * size_t(head_dim) + d] * inverse;
        if (lse) lse[g] = m + std::log(l);
    }
}

}  // namespace

void clear_states(float* states, const StateShape& shape) {
    for (int head = 0; head < shape.num_heads; ++head)
        clear_state(states + head * shape.head_floats(), shape.group, shape.head_dim);
}

void merge_states(float* into, const float* piece, const StateShape& shape) {
    for (int head = 0; head < shape.num_heads; ++head)
        merge_state(into + head * shape.head_floats(), piece + head * shape.head_floats(), shape.group, shape.head_dim);
}

void finish_states(const float* states, const StateShape& shape, float* out, float* lse) {
    for (int head = 0; head < shape.num_heads; ++head)
        finish_state(states + head * shape.head_floats(), shape.group, shape.head_dim,
                     out + size_t(head) * shape.group * shape.head_dim, lse ? lse + head * shape.group : nullptr);
}

}  // namespace omniserve

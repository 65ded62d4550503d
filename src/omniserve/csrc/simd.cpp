// The choice of instruction set.
#include "simd.h"

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

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
/// kAvx512Kernels with the dot product instructions that a CPU has.
Kernels avx512_with_dots(const char* name, bool of_int8, bool of_bf16) {
    Kernels same = kAvx512Kernels;
    same.name = name;
    if (of_int8) same.attend[static_cast<int>(DType::i8)] = attend_int8_by_dots;
    if (of_bf16) same.attend[static_cast<int>(DType::bf16)] = attend_bf16_by_dots;
    if (of_bf16) same.dense_bf16_rows = dense_bf16_by_dots;
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

}  // namespace omniserve

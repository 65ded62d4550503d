// Storage types of activations and KV, and their scalar conversions.
//
// bfloat16 and float16 are carried as uint16_t bit patterns. Conversion to a narrower type rounds to nearest, ties to
// even, exactly as torch and the F16C instructions do, so that host and device agree bit for bit.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace omniserve {

/// i8 stores KV of the host and weights: it is lossy, and has scales beside its elements (kv.h, dense.h).
enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };
inline constexpr int kNumDTypes = 4;

/// Bytes of one element.
constexpr size_t item_size(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2; }

/// The name torch uses: "float32", "bfloat16", "float16" or "int8".
constexpr const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::f32: return "float32";
        case DType::bf16: return "bfloat16";
        case DType::f16: return "float16";
        default: return "int8";
    }
}

/// Parses the name of an activation type; `field` names the argument in the error. Throws std::invalid_argument.
inline DType parse_dtype(const char* field, const std::string& text) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16})
        if (text == dtype_name(dtype)) return dtype;
    throw std::invalid_argument(std::string(field) + " must be float32, bfloat16 or float16, not " + text);
}

/// As parse_dtype, for what may be stored as int8 too: KV and weights.
inline DType parse_stored_dtype(const char* field, const std::string& text) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::i8})
        if (text == dtype_name(dtype)) return dtype;
    throw std::invalid_argument(std::string(field) + " must be float32, bfloat16, float16 or int8, not " + text);
}

inline float bf16_to_f32(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t f32_to_bf16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // keep NaN a NaN
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_f32(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude >= 0x0400u) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(subnormal));
}

inline uint16_t f32_to_f16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and up round to infinity
    if (magnitude < 0x38800000u) {
        // Below 2^-14 the result is a multiple of 2^-24, the spacing of float32 in [0.5, 1): let the adder round.
        const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace omniserve

// AVX-512 path (F, BW, DQ, VL): the table, and what is no attention.
#include "attention_avx512.h"

namespace omniserve {
namespace {

void exp_nonpositive_all(const float* x, float* y, size_t count) {
    for (size_t i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i < kLanes ? int(count - i) : kLanes);
        _mm512_mask_storeu_ps(y + i, mask, exp_nonpositive(_mm512_maskz_loadu_ps(mask, x + i)));
    }
}

template <DType kType>
void widen(const void* from, float* to, size_t count) {
    using S = Storage<kType>;
    const auto* p = static_cast<const typename S::T*>(from);
    for (size_t i = 0; i < count; i += kLanes) {
        const int valid = count - i < kLanes ? int(count - i) : kLanes;
        __m512 x[1];
        S::template load<1, true>(p + i, valid, x);
        _mm512_mask_storeu_ps(to + i, first_lanes(valid), x[0]);
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
    for (size_t i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i < kLanes ? int(count - i) : kLanes);
        _mm256_mask_storeu_epi16(bits + i, mask,
                                 _mm512_cvtps_ph(_mm512_maskz_loadu_ps(mask, from + i), _MM_FROUND_TO_NEAREST_INT));
    }
}

uint64_t stream_sum(const void* from, size_t bytes) {
    const auto* p = static_cast<const char*>(from);
    __m512i sum[4];
    for (__m512i& x : sum) x = _mm512_setzero_si512();
    const size_t blocks = bytes / sizeof(sum);
    for (size_t i = 0; i < blocks; ++i, p += sizeof(sum))
        for (int j = 0; j < 4; ++j) sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(p + j * 64));
    const __m512i all = _mm512_add_epi64(_mm512_add_epi64(sum[0], sum[1]), _mm512_add_epi64(sum[2], sum[3]));
    alignas(64) uint64_t words[8];
    _mm512_store_si512(words, all);
    uint64_t total = kScalarKernels.stream_sum(p, bytes - blocks * sizeof(sum));
    for (uint64_t word : words) total += word;
    return total;
}

}  // namespace

const Kernels kAvx512Kernels = {
    "avx512",
    {attend_loop<Avx512Ops<DType::f32>>, attend_loop<Avx512Ops<DType::bf16>>, attend_loop<Avx512Ops<DType::f16>>,
     attend_loop<Avx512Ops<DType::i8>>},
    exp_nonpositive_all,
    to_f32,
    from_f32,
    stream_sum,
    &kAvx512Dense,
    nullptr,
};

}  // namespace omniserve

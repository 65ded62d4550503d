// The tables of inner loops, one per instruction set. A new one adds its own translation unit, a table
// here, and its test of the CPU in attention.cpp.
#pragma once

#include "attention.h"

namespace omniserve {

extern const Kernels kScalarKernels;
#if defined(OMNISERVE_X86)
extern const Kernels kAvx2Kernels;    // needs AVX2, FMA and F16C
extern const Kernels kAvx512Kernels;  // needs these and AVX-512 F, BW, DQ, VL
/// What takes the place of their attention over int8 on a CPU with AVX-512 VNNI, and over bfloat16 on one with AVX-512
/// BF16. Functions, not tables of their own: a copy of theirs would be made by code compiled for that CPU, at start-up,
/// on any CPU.
void attend_int8_by_dots(const AttendArgs& args);
void attend_bf16_by_dots(const AttendArgs& args);
#endif
#if defined(OMNISERVE_NEON)
extern const Kernels kNeonKernels;    // needs nothing that an AArch64 CPU may lack
#endif

}  // namespace omniserve

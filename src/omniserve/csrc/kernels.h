// The tables of inner loops, one per instruction set. A new one adds its own translation unit, a table
// here, and its test of the CPU in simd.cpp.
#pragma once

#include "simd.h"

namespace omniserve {

extern const Kernels kScalarKernels;
extern const DensePanels kScalarDense;
#if defined(OMNISERVE_X86)
extern const Kernels kAvx2Kernels;    // needs AVX2, FMA and F16C
extern const Kernels kAvx512Kernels;  // needs these and AVX-512 F, BW, DQ, VL
extern const DensePanels kAvx2Dense, kAvx512Dense;  // of these two
/// What takes the place of their attention over int8 on a CPU with AVX-512 VNNI, and over bfloat16 on one with AVX-512
/// BF16, and joins their dense loops there. Functions, not tables of their own: a copy of theirs would be made by code
/// compiled for that CPU, at start-up, on any CPU.
void attend_int8_by_dots(const AttendArgs& args);
void attend_bf16_by_dots(const AttendArgs& args);
void dense_bf16_by_dots(const PanelArgs& args);
#endif
#if defined(OMNISERVE_NEON)
extern const Kernels kNeonKernels;    // needs nothing that an AArch64 CPU may lack
extern const DensePanels kNeonDense;
#endif

}  // namespace omniserve

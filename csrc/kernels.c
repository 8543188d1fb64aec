// SPDX-License-Identifier: Apache-2.0
/* Which table of kernels is in force. */
#include "kernels.h"

#include "cpu.h"

#if defined(__x86_64__)
#define CHOOSE(table, suffix)                \
    switch (cmb_isa_current()) {             \
    case CMB_ISA_AVX512_BF16:                \
        return &table##avx512_bf16_##suffix; \
    case CMB_ISA_AVX512:                     \
        return &table##avx512_##suffix;      \
    case CMB_ISA_AVX2:                       \
        return &table##avx2_##suffix;        \
    default:                                 \
        return &table##base_##suffix;        \
    }
#elif defined(__aarch64__)
#define CHOOSE(table, suffix) return cmb_isa_current() == CMB_ISA_NEON ? &table##neon_##suffix : &table##base_##suffix;
#else
#define CHOOSE(table, suffix) return &table##base_##suffix;
#endif

const cmb_kernels_f32 *cmb_kernels_in_force_f32(void) { CHOOSE(cmb_kernels_, f32) }
const cmb_kernels_f64 *cmb_kernels_in_force_f64(void) { CHOOSE(cmb_kernels_, f64) }
const cmb_half *cmb_half_in_force_bf16(void) { CHOOSE(cmb_half_, bf16) }
const cmb_half *cmb_half_in_force_f16(void) { CHOOSE(cmb_half_, f16) }

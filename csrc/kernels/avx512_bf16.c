// SPDX-License-Identifier: Apache-2.0
/* AVX-512 (F, BW, DQ, VL) with BF16, which multiplies pairs of bfloat16 (pairs.inc.h). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
#include <immintrin.h>

#include "kernels/kernels.h"

#define ISA avx512_bf16
#define TARGET_AVX512
#define VECTOR_BYTES 64
#define REGISTERS 24

#define DOT_PAIRS(a, b, c) ((vec)_mm512_dpbf16_ps((__m512)(c), (__m512bh)(a), (__m512bh)(b)))
#define ROUND(x, y) ((__m512i)_mm512_cvtne2ps_pbh((__m512)(y), (__m512)(x)))
#define ROUND_PAIRS(x, y) _mm512_permutexvar_epi16(interleaved, ROUND(x, y))
static const short interleaved_order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#define interleaved (*(const __m512i_u *)interleaved_order)

#include "kernels/isa.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int cmb_no_avx512_bf16; /* a translation unit must not be empty */
#endif

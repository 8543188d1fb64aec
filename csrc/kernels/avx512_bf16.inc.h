// SPDX-License-Identifier: Apache-2.0
/* The parameters of AVX-512 with BF16, for isa.inc.h. */
#include <immintrin.h>

#define TARGET_AVX512
#define VECTOR_BYTES 64
#define REGISTERS 24

#define DOT_PAIRS(a, b, c) ((vec)_mm512_dpbf16_ps((__m512)(c), (__m512bh)(a), (__m512bh)(b)))
#define ROUND(x, y) ((__m512i)_mm512_cvtne2ps_pbh((__m512)(y), (__m512)(x)))
#define ROUND_PAIRS(x, y) _mm512_permutexvar_epi16(interleaved, ROUND(x, y))
static const short interleaved_order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#define interleaved (*(const __m512i_u *)interleaved_order)

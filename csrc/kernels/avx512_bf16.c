// SPDX-License-Identifier: Apache-2.0
/* AVX-512 (F, BW, DQ, VL) with BF16, which multiplies pairs of bfloat16 (pairs.inc.h). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
#include "kernels/kernels.h"

#define ISA avx512_bf16

#include "kernels/avx512_bf16.inc.h"
#include "kernels/isa.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int cmb_no_avx512_bf16; /* a translation unit must not be empty */
#endif

// SPDX-License-Identifier: Apache-2.0
/* AVX-512 with BF16, and AMX with BF16: matrix registers, which multiply blocks of pairs (matrix.inc.h). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
#include "kernels/kernels.h"

#define ISA amx
#define MATRIX

#include "kernels/avx512_bf16.inc.h"
#include "kernels/isa.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int cmb_no_amx; /* a translation unit must not be empty */
#endif

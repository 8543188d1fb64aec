// SPDX-License-Identifier: Apache-2.0
/* AVX-512 (F, BW, DQ, VL). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include <immintrin.h>

#include "kernels/kernels.h"

#define ISA avx512
#define TARGET_AVX512
#define VECTOR_BYTES 64
#define REGISTERS 24

#include "kernels/isa.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int cmb_no_avx512; /* a translation unit must not be empty */
#endif

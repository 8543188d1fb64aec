// SPDX-License-Identifier: Apache-2.0
/* AVX2 and FMA. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>

#include "kernels/kernels.h"

#define ISA avx2
#define TARGET_AVX2
#define VECTOR_BYTES 32
#define REGISTERS 12

#include "kernels/isa.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int cmb_no_avx2; /* a translation unit must not be empty */
#endif

// SPDX-License-Identifier: Apache-2.0
/* Baseline: 16-byte vectors, SSE2 on x86-64, whatever the compiler makes of them elsewhere. */

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "kernels.h"

#define ISA base
#define VECTOR_BYTES 16
#define REGISTERS 12

#include "isa.inc.h"

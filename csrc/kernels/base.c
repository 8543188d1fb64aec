// SPDX-License-Identifier: Apache-2.0
/* The baseline of every architecture, 16-byte vectors: SSE2 on x86-64, NEON on aarch64, elsewhere what the compiler
 * makes of them. */
#if defined(__x86_64__)
#include <emmintrin.h>
#define TARGET_SSE2
#elif defined(__aarch64__)
#include <arm_neon.h>
#define TARGET_NEON
#endif

#include "kernels/kernels.h"

#define ISA base
#define VECTOR_BYTES 16
#define REGISTERS 12

#include "kernels/isa.inc.h"

// SPDX-License-Identifier: Apache-2.0
/* Baseline: 16-byte vectors, SSE2 on x86-64, whatever the compiler makes of them elsewhere. */

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

#define ISA base
#define VECTOR_BYTES 16
#define REGISTERS 12

#define REAL float
#define SUFFIX f32
#define FLOAT_BITS 32
#include "kernels.inc.h"

#include "half.inc.h"

#undef REAL
#undef SUFFIX
#undef FLOAT_BITS
#define REAL double
#define SUFFIX f64
#define FLOAT_BITS 64
#include "kernels.inc.h"

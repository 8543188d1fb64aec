// SPDX-License-Identifier: Apache-2.0
/* NEON, with FMA on every aarch64. */
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels.h"

#define ISA neon
#define VECTOR_BYTES 16
#define REGISTERS 24

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
#else
typedef int cmb_no_neon; /* a translation unit must not be empty */
#endif

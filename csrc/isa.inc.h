// SPDX-License-Identifier: Apache-2.0
/* The tables of one instruction set: of float, of the 16-bit formats over it, and of double. The including file has set
 * the target, ISA, VECTOR_BYTES and REGISTERS. */
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

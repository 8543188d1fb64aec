// SPDX-License-Identifier: Apache-2.0
/* The tables of one instruction set: float, the 16-bit formats, double. The file of the instruction set sets the
 * compiler's target and defines ISA, TARGET_.., VECTOR_BYTES and REGISTERS before it includes this file. */
#define REAL float
#define SUFFIX f32
#define FLOAT_BITS 32
#include "kernels/bodies.inc.h"

#include "kernels/narrow.inc.h"

#undef REAL
#undef SUFFIX
#undef FLOAT_BITS
#define REAL double
#define SUFFIX f64
#define FLOAT_BITS 64
#include "kernels/bodies.inc.h"

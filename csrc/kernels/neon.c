// SPDX-License-Identifier: Apache-2.0
/* NEON, with FMA on every aarch64. */
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels/kernels.h"

#define ISA neon
#define TARGET_NEON
#define VECTOR_BYTES 16
#define REGISTERS 24

#include "kernels/isa.inc.h"
#else
typedef int cmb_no_neon; /* a translation unit must not be empty */
#endif

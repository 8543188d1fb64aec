// SPDX-License-Identifier: Apache-2.0
#define FORMAT bf16
#define REAL float
#define SUFFIX f32
#define STORED uint16_t
#define HALF cmb_half_in_force_bf16()
#include "stages.inc.h"

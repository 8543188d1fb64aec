// SPDX-License-Identifier: Apache-2.0
#define FORMAT f16
#define REAL float
#define SUFFIX f32
#define STORED uint16_t
#define HALF cmb_half_in_force_f16()
#include "stages.inc.h"

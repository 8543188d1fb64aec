// SPDX-License-Identifier: Apache-2.0
#define FORMAT bf16
#define REAL float
#define SUFFIX f32
#define STORED uint16_t
#define NARROW(isa) cmb_narrow_for_bf16(isa)
#include "tile/stages.inc.h"

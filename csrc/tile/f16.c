// SPDX-License-Identifier: Apache-2.0
#define FORMAT f16
#define REAL float
#define SUFFIX f32
#define STORED uint16_t
#define NARROW(isa) cmb_narrow_for_f16(isa)
#include "tile/stages.inc.h"

// SPDX-License-Identifier: Apache-2.0
#define FORMAT f32
#define REAL float
#define SUFFIX f32
#define STORED float
#define NARROW(isa) NULL
#include "tile/stages.inc.h"

// SPDX-License-Identifier: Apache-2.0
#define REAL float
#define SUFFIX f32
#include "stages.inc.h"

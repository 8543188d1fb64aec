// SPDX-License-Identifier: Apache-2.0
#define REAL double
#define SUFFIX f64
#include "stages.inc.h"

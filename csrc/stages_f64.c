// SPDX-License-Identifier: Apache-2.0
#define FORMAT f64
#define REAL double
#define SUFFIX f64
#define STORED double
#define HALF NULL
#include "stages.inc.h"

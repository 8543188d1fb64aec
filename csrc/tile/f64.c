// SPDX-License-Identifier: Apache-2.0
#define FORMAT f64
#define REAL double
#define SUFFIX f64
#define STORED double
#define NARROW(isa) NULL
#include "tile/stages.inc.h"

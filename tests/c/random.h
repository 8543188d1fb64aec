// SPDX-License-Identifier: Apache-2.0
/* The random numbers of the C tests: the same ones in every run. */
#ifndef CMB_TEST_RANDOM_H
#define CMB_TEST_RANDOM_H

#include <stdint.h>

static uint64_t random_state = 1; /* a test that sets it begins a sequence of its own */

static inline uint64_t random_bits(void) { /* splitmix64 */
    uint64_t x = random_state += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static inline int random_below(int n) { return (int)(random_bits() % (uint64_t)n); }

/* In [from, to). */
static inline double uniform(double from, double to) {
    return from + (to - from) * ((double)(random_bits() >> 11) * 0x1p-53);
}

#endif

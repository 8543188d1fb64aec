// SPDX-License-Identifier: Apache-2.0
/* What a query's parts cover, by one 64-bit word for each position: the words of a set are added, or united.
 *
 *   sums     random words. The sum of a multiset equals the sum of another one with a chance of 2^-64, so equal sums
 *            mean that a query's parts hold each position of its support exactly once (Zobrist hashing).
 *   unions   a bit for each of 64 positions, in rounds of 64: exact. Tells what is covered at least once.
 * Internal. */
#ifndef CMB_COVERAGE_H
#define CMB_COVERAGE_H

#include <stdbool.h>
#include <stdint.h>

/* The random word of a position. */
static inline uint64_t cmb_position_word(int64_t position) { /* splitmix64 */
    uint64_t x = (uint64_t)position + UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* The word of two sets together. */
static inline uint64_t cmb_join(uint64_t a, uint64_t b, bool is_union) { return is_union ? a | b : a + b; }

#endif

// SPDX-License-Identifier: Apache-2.0
/* The best of some regions: cmb_select's order of scores. Internal. */
#ifndef CMB_BEST_H
#define CMB_BEST_H

#include <stdint.h>
#include <string.h>

/* Puts a region among the best `count` so far, k at most, in its place: larger scores come first, of equal ones the
 * lowest number. `best` holds their scores; both arrays have room for k. Returns the new count. */
static inline int64_t cmb_join_best(double score, int64_t region, int64_t k, int64_t count, double *best,
                                    int64_t *regions) {
    int64_t at = count;
    while (at > 0 && (score > best[at - 1] || (score == best[at - 1] && region < regions[at - 1])))
        at--;
    if (at == k)
        return count;
    count += count < k;
    memmove(best + at + 1, best + at, (size_t)(count - 1 - at) * sizeof *best);
    memmove(regions + at + 1, regions + at, (size_t)(count - 1 - at) * sizeof *regions);
    best[at] = score;
    regions[at] = region;
    return count;
}

#endif

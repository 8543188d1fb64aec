// SPDX-License-Identifier: Apache-2.0
/* Where a decoder keeps the rows of a sequence that it continues. Internal.
 *
 * Level 0 is the positions. A pattern's regions are nodes of levels 1, 2, ..: node x of level t holds the positions
 * [x * size[t], (x + 1) * size[t]). Of each level a range of nodes is kept, side by side. After 11 positions of
 * Tree(2):
 *
 *     level 3      node 0                            positions 0 .. 7
 *     level 1                    node 4              positions 8, 9
 *     level 0                            node 10     the position itself
 *
 * Axial has as many nodes of level 1 as positions: node t is region t (docs/mathematics.md, section 3).
 */
#ifndef CMB_PAST_H
#define CMB_PAST_H

#include <stdbool.h>
#include <stdint.h>

enum { CMB_MAX_LEVELS = 32 }; /* sizes up to 2^30 positions, and the positions */

/* The kept nodes of a level: `first` and those after it, up to `end`. Node x is row `row` + x - first of the table. */
typedef struct {
    int64_t first, end, row;
} cmb_kept;

struct cmb_past {
    int64_t length; /* positions whose queries have been computed */
    int levels;
    int64_t size[CMB_MAX_LEVELS];
    cmb_kept kept[CMB_MAX_LEVELS]; /* what is there once the new positions are added; rows of regions count from 0 */
    int64_t positions, regions;    /* rows of the table */
    bool copies; /* a node is a copy of its last position: sparse baselines see their summaries as positions */
    int lanes;   /* of one new query: query heads that share a key head, side by side; else 1 */
};
typedef struct cmb_past cmb_past;

/* The nodes of `size` positions that a plan of `length` positions has summarized, where the query that is `lag` after a
 * node's last position is the first to attend it. */
static inline int64_t cmb_complete(int64_t length, int64_t size, int64_t lag) {
    return length > lag ? (length - lag) / size : 0;
}

#endif

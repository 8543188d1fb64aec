// SPDX-License-Identifier: Apache-2.0
/*
 * Lanes that are query heads. A heads' tile (plan/read.h) has one position x as its query. The query heads that share a
 * key head attend the same rows in it. Four heads or more run as the lanes of one tile, which reads each key and value
 * once:
 *
 *                     each head's tile          the tile of the heads
 *     width           1                         16 to 64
 *     lane            -                         0           1           2           ..
 *     query           row x of the head         row x of    row x of    row x of
 *                                               head h      head h + 1  head h + 2
 *
 * A lane has the same bits however many lanes there are, but other bits than the row kernel's. So the problem alone
 * decides whether heads are lanes (cmb_are_heads_lanes), and the number of lanes may be anything. Internal.
 */
#ifndef CMB_HEADS_H
#define CMB_HEADS_H

#include "plan/read.h"
#include "tile/stages.h"

/* The most lanes that divide a group: the query heads of a key head. */
static inline int cmb_lanes_of_group(int64_t group) {
    int lanes = (int)cmb_min(group, CMB_TILE);
    while (lanes > 1 && group % lanes)
        lanes--;
    return lanes;
}

/* Whether the heads of a group are lanes. Each lane costs as much as any other, idle or not: three row tiles are as
 * fast as 16 lanes. */
static inline bool cmb_are_heads_lanes(int64_t group, bool have_own_biases) {
    enum { FEWEST = 4 };
    return cmb_lanes_of_group(group) >= FEWEST && !have_own_biases;
}

/* A tile in the form that the stages take: tile 0 of `head`. */
typedef struct {
    cmb_head head;
    cmb_plan plan;
    cmb_tile tile[2];
} cmb_heads_tile;

/* Makes the tile of position `query`, with runs [run, end) of the plan of `first`, for `lanes` heads from `first` on.
 * `second` is the head after it, or `first` again if there is one lane. The distance between the two, in each array, is
 * the step from any head to the next. */
void cmb_make_heads_tile(const cmb_stage_table *stage, const cmb_head *first, const cmb_head *second, int lanes,
                         int32_t query, int32_t run, int32_t end, cmb_heads_tile *to);

#endif

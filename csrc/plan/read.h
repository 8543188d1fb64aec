// SPDX-License-Identifier: Apache-2.0
/* Reading a plan's lists and masks. Internal. */
#ifndef CMB_READ_H
#define CMB_READ_H

#include "runtime/status.h"

enum {
    CMB_TILE = 64,       /* the most queries of a tile: one for each bit of a mask */
    CMB_CHUNK_ROWS = 96, /* the most rows that a tile takes at a time; a smaller chunk's size divides it */
};

static inline int64_t cmb_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t cmb_max(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- lists ---- */

static inline cmb_list cmb_list_make(int64_t start, int64_t step, int64_t count) {
    CMB_ASSERT(start == (int32_t)start && step == (int32_t)step && count == (int32_t)count);
    return (cmb_list){(int32_t)start, (int32_t)step, (int32_t)count};
}

/* The n-th row of a list. */
static inline int32_t cmb_list_at(const cmb_plan *plan, cmb_list list, int32_t n) {
    CMB_ASSERT(0 <= n && n < list.count);
    CMB_ASSERT(list.step || (0 <= list.start && list.start + n < plan->indices));
    return list.step ? list.start + list.step * n : plan->index[list.start + n];
}

/* Elements [first, end) of a list, as far as the list has them. */
static inline cmb_list cmb_list_cut(cmb_list list, int64_t first, int64_t end) {
    CMB_ASSERT(first >= 0);
    end = cmb_min(end, list.count);
    if (first >= end)
        return (cmb_list){0, 1, 0};
    return cmb_list_make(list.start + first * (list.step ? list.step : 1), list.step, end - first);
}

typedef struct {
    int64_t low, high;
} cmb_row_range;

/* The lowest and the highest row of a list with a step. */
static inline cmb_row_range cmb_list_range(cmb_list list) {
    CMB_ASSERT(list.step && list.count > 0);
    const int64_t last = list.start + (int64_t)list.step * (list.count - 1);
    return list.step < 0 ? (cmb_row_range){last, list.start} : (cmb_row_range){list.start, last};
}

/* Whether the rows of a list with a step are positions, and no regions. */
static inline bool cmb_are_positions(const cmb_plan *plan, cmb_list list) {
    return list.step && cmb_list_range(list).high < plan->L;
}

/* ---- masks ---- */

/* Bits first <= t < end of a mask, clipped to its 64. */
static inline uint64_t cmb_lane_mask(int64_t first, int64_t end) {
    first = first < 0 ? 0 : first;
    end = end > 64 ? 64 : end;
    return end <= first ? 0 : ~UINT64_C(0) >> (64 - (end - first)) << first;
}

/* The bits of `mask` at `lanes`, side by side. */
static inline uint64_t cmb_gather_lanes(uint64_t mask, uint64_t lanes) {
    uint64_t gathered = 0;
    for (int t = 0; lanes; lanes &= lanes - 1, t++)
        gathered |= (mask >> __builtin_ctzll(lanes) & 1) << t;
    return gathered;
}

/* The width of a lane tile of `count` queries: whole groups of 16 lanes. */
static inline int32_t cmb_tile_width(int64_t count) { return (int32_t)((count + 15) / 16 * 16); }

/* Whether this is a heads' tile: a row tile of a position that attends positions alone, in lists with a step and
 * without masks. All query heads of a key head attend the same keys and values in it, and may be its lanes
 * (tile/heads.h). */
static inline bool cmb_is_heads_tile(const cmb_plan *plan, const cmb_tile *tile) {
    if (tile->width != 1 || cmb_list_at(plan, tile->query, 0) >= plan->L)
        return false;
    for (int32_t n = tile[0].run; n < tile[1].run; n++)
        if (plan->run[n].mask >= 0 || !cmb_are_positions(plan, plan->run[n].row))
            return false;
    return true;
}

/* ---- tasks and tiles ---- */

static inline int32_t cmb_tasks_in(const cmb_plan *plan, int32_t wave) {
    return wave < plan->waves ? plan->wave[wave + 1] - plan->wave[wave] : 0;
}

/* Tasks of the longest wave. */
static inline int32_t cmb_longest_wave(const cmb_plan *plan) {
    int32_t most = 0;
    for (int32_t wave = 0; wave < plan->waves; wave++)
        most = cmb_tasks_in(plan, wave) > most ? cmb_tasks_in(plan, wave) : most;
    return most;
}

static inline bool cmb_is_of_positions(const cmb_plan *plan, int32_t tile) {
    return cmb_list_at(plan, plan->tile[tile].query, 0) < plan->L;
}

/* Whether the task ends with a tile of positions. */
static inline bool cmb_attends(const cmb_plan *plan, int32_t task) {
    const int32_t end = plan->task[task + 1].tile;
    return end > plan->task[task].tile && cmb_is_of_positions(plan, end - 1);
}

/* Whether an item of a shared head begins with this task (traits.sharing.by_task). Items go from the last task to the
 * first. */
static inline bool cmb_begins_item(const cmb_plan *plan, int32_t task) {
    return !plan->traits.is_fusible || cmb_attends(plan, task);
}

/* How many regions pick: all with CMB_POOL_FIRST, else none. */
static inline int64_t cmb_picking_regions(const cmb_plan *plan) {
    return plan->pooling == CMB_POOL_FIRST ? plan->R : 0;
}

#endif

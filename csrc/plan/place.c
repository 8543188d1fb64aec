// SPDX-License-Identifier: Apache-2.0
/*
 * Renumbers a plan that continues a sequence for the rows that a decoder keeps (past.h): the plan is read and made once
 * more, step by step.
 *
 *     rows in the plan      0 ..  positions  .. L | L ..  regions, level by level  .. L + R | scratch rows
 *     rows of the table     0 .. kept, then new   | kept of level 1, of level 2, ..         | scratch rows
 *
 * A builder makes whole tiles, some of whose queries were computed before. Those lanes leave their tile. A row that
 * only they attend may be gone. Another row takes its place under an empty mask, so that the rows behind it stay in
 * their places: then the bits of a query do not depend on the queries beside it.
 */
#include "plan/build.h"

enum { NOT_KEPT = -1 };

typedef struct {
    const cmb_plan *from;
    const cmb_past *past;
    int64_t first_region[CMB_MAX_LEVELS]; /* of each level, in the numbers of `from`: its node 0 */
    cmb_build build;                      /* of the renumbered plan */
    int32_t *row;                         /* the list at hand, row by row */
    uint64_t *mask;
    int64_t
        left_out; /* rows at the end of the tile's runs so far that no lane attends: they stand before the next row */
} placing;

/* ---- rows --------------------------------------------------------------------------------------- */

/* The table row of a node. */
static int32_t place_node(const placing *p, int level, int64_t node) {
    const cmb_kept *kept = &p->past->kept[level];
    if (node < kept->first || node >= kept->end)
        return NOT_KEPT;
    return (int32_t)((level ? p->past->positions : 0) + kept->row + node - kept->first);
}

static int level_of(const placing *p, int64_t x) {
    int level = 0;
    while (level + 1 < p->past->levels && p->first_region[level + 1] <= x)
        level++;
    return level;
}

static int32_t place_row(const placing *p, int64_t x) {
    const int64_t scratch = x - p->from->L - p->from->R;
    if (scratch >= 0)
        return (int32_t)(p->past->positions + p->past->regions + scratch);
    const int level = level_of(p, x);
    int32_t row = place_node(p, level, level ? x - p->first_region[level] : x);
    for (int t = 1; row == NOT_KEPT && p->past->copies && t < p->past->levels; t++)
        if ((x + 1) % p->past->size[t] == 0)
            row = place_node(p, t, (x + 1) / p->past->size[t] - 1);
    return row;
}

/* Whether the rows of a list are rows side by side in the table too; *to becomes the list there. */
static bool place_list(const placing *p, cmb_list list, cmb_list *to) {
    if (list.step < 1)
        return false;
    const int64_t last = list.start + (int64_t)list.step * (list.count - 1);
    const int level = level_of(p, list.start);
    const int64_t node = level ? list.start - p->first_region[level] : list.start;
    const cmb_kept *kept = &p->past->kept[level];
    if (level_of(p, last) != level || node < kept->first || node + last - list.start >= kept->end)
        return false;
    *to = cmb_list_make(place_node(p, level, node), list.step, list.count);
    return true;
}

/* The most rows that are placed one by one: those of a list, or of a tile's runs with masks. */
static int64_t longest_list(const placing *p) {
    const cmb_plan *from = p->from;
    cmb_list to;
    int64_t longest = 1;
    for (int32_t tile = 0; tile < from->tiles; tile++) {
        int64_t rows = 1;
        for (int32_t n = from->tile[tile].run; n < from->tile[tile + 1].run; n++)
            if (from->run[n].mask >= 0 || !place_list(p, from->run[n].row, &to))
                rows += from->run[n].row.count;
        longest = rows > longest ? rows : longest;
    }
    for (int32_t n = 0; n < from->pools; n++)
        if (from->pool[n].child.count > longest && !place_list(p, from->pool[n].child, &to))
            longest = from->pool[n].child.count;
    return longest;
}

/* ---- steps -------------------------------------------------------------------------------------- */

/* A list all of whose rows are kept. */
static cmb_list place_whole(placing *p, cmb_list list) {
    cmb_list to;
    if (place_list(p, list, &to))
        return to;
    for (int32_t n = 0; n < list.count; n++) {
        p->row[n] = place_row(p, cmb_list_at(p->from, list, n));
        CMB_ASSERT(p->row[n] != NOT_KEPT);
    }
    return cmb_build_list(&p->build, p->row, list.count);
}

/* Rows that no lane attends, before the next row. Returns how many they are. */
static int64_t place_left_out(placing *p) {
    const int64_t n = p->left_out;
    for (int64_t k = 0; k < n; k++) {
        p->row[k] = place_row(p, p->past->length);
        p->mask[k] = 0;
    }
    p->left_out = 0;
    return n;
}

/* A run without masks; `lanes` are those of the new tile. */
static void place_run(placing *p, cmb_list list, uint64_t lanes) {
    if (p->left_out) {
        const int64_t n = place_left_out(p);
        p->row[n] = place_row(p, cmb_list_at(p->from, list, 0));
        p->mask[n] = lanes;
        cmb_build_masked_run(&p->build, cmb_build_list(&p->build, p->row, n + 1), p->mask);
        list = cmb_list_cut(list, 1, list.count);
    }
    cmb_build_run(&p->build, place_whole(p, list));
}

/* A run with masks, for the lanes from `skip` on. `many` lanes take the place of each. */
static void place_masked_run(placing *p, const cmb_run *run, int64_t skip, uint64_t lanes, int many) {
    const uint64_t all = many > 1 ? cmb_lane_mask(0, many) : lanes;
    const int32_t stand_in = place_row(p, p->past->length);
    int64_t n = place_left_out(p), unmasked = 0;
    for (int32_t k = 0; k < run->row.count; k++) {
        uint64_t mask = p->from->mask[run->mask + k] >> skip & lanes;
        mask = mask && many > 1 ? all : mask;
        const int32_t row = place_row(p, cmb_list_at(p->from, run->row, k));
        CMB_ASSERT(row != NOT_KEPT || !mask);
        p->row[n] = row == NOT_KEPT ? stand_in : row;
        unmasked += mask == all;
        p->mask[n++] = mask;
    }
    for (; n > 0 && !p->mask[n - 1]; n--)
        p->left_out++;
    const cmb_list list = cmb_build_list(&p->build, p->row, n);
    if (unmasked == n)
        cmb_build_run(&p->build, list);
    else
        cmb_build_masked_run(&p->build, list, p->mask);
}

static void place_tile(placing *p, const cmb_tile *tile) {
    const bool is_stage_2 = cmb_list_at(p->from, tile->query, 0) < p->from->L;
    const int64_t earlier = is_stage_2 ? p->past->length - tile->query.start : 0, step = tile->query.step;
    CMB_ASSERT(!is_stage_2 || step > 0);
    const int64_t skip = earlier > 0 ? (earlier + step - 1) / step : 0;
    const cmb_list query = cmb_list_cut(tile->query, skip, tile->query.count);
    const int many = is_stage_2 ? p->past->lanes : 1;
    CMB_ASSERT(many == 1 || query.count <= 1);
    if (query.count < 1)
        return;
    cmb_list to = place_whole(p, query);
    if (many > 1)
        to = cmb_list_make(to.start, 1, many);
    cmb_build_tile(&p->build, to, tile->width == 1 ? 1 : cmb_tile_width(to.count));
    p->left_out = 0;
    for (int32_t n = tile->run; n < tile[1].run; n++)
        if (p->from->run[n].mask < 0)
            place_run(p, p->from->run[n].row, cmb_lane_mask(0, to.count));
        else
            place_masked_run(p, &p->from->run[n], skip, cmb_lane_mask(0, query.count), many);
}

static void place_waves(placing *p) {
    const cmb_plan *from = p->from;
    for (int32_t wave = 0; wave < from->waves; wave++) {
        cmb_build_wave(&p->build);
        for (int32_t task = from->wave[wave]; task < from->wave[wave + 1] && cmb_build_task(&p->build); task++) {
            for (int32_t n = from->task[task].pool; n < from->task[task + 1].pool; n++)
                cmb_build_pool(&p->build, place_row(p, from->pool[n].row), place_whole(p, from->pool[n].child));
            for (int32_t n = from->task[task].tile; n < from->task[task + 1].tile; n++)
                place_tile(p, &from->tile[n]);
        }
    }
}

cmb_status cmb_place_plan(const cmb_plan *from, const cmb_past *past, const cmb_interrupt *interrupt, cmb_plan **plan,
                          cmb_error *error) {
    placing p = {.from = from, .past = past};
    for (int t = 1, rows = 0; t < past->levels; t++) {
        p.first_region[t] = from->L + rows;
        const int64_t nodes = rows < from->R ? (from->L + past->size[t] - 1) / past->size[t] : 0;
        rows += (int)nodes;
    }
    const size_t longest = (size_t)longest_list(&p);
    p.mask = cmb_allocate(longest * (sizeof *p.mask + sizeof *p.row));
    if (!p.mask)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory while making a plan of length %lld", (long long)from->L);
    p.row = (int32_t *)(void *)(p.mask + longest);
    const cmb_plan_options options = {.is_causal = true,
                                      .size_bias = from->size_bias,
                                      .pooling = from->pooling,
                                      .interrupt = interrupt,
                                      .past = past};
    cmb_status status = cmb_build_begin(&p.build, past->positions, past->regions, from->N, &options, error);
    if (!status) {
        p.build.is_placed = true;
        place_waves(&p);
        status = cmb_build_end(&p.build, plan, error);
    }
    cmb_release(p.mask);
    return status;
}

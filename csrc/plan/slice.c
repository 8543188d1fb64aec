// SPDX-License-Identifier: Apache-2.0
/* The slice of a plan that some consecutive queries attend. Its queries are counted from the first of them; keys and
 * regions keep their rows. A tile of the base, and its slice of queries 5 and 6:
 *
 *     query of the base   4  5  6  7          query of the slice   0  1
 *     row 0               x  x  x  x                               x  x
 *     row 4               x  .  .  .                               .  .      keeps its place
 *     row 5               .  x  x  x                               x  x
 *     row 7               .  .  .  x                                         the last rows are left out
 *
 * A row that none of the queries attends keeps its place: a query's bits depend on which of a tile's rows share a
 * chunk. No region is summarized. The pool steps of the tiles' regions stay: they count unmasked positions, and a
 * region without any takes no place. */
#include "plan/build.h"

#include <string.h>

typedef struct {
    cmb_build *build;
    const cmb_plan *base;
    int64_t first, count; /* the queries */
    bool *needed;         /* [R + N] the region is a row of some tile, or one that is is pooled from it */
    bool *kept;           /* [pools] pool steps of needed rows */
    uint64_t *mask;       /* [longest masked run] masks in the making */
} slicing;

/* The lanes of a tile whose queries are in the slice. A tile of regions has none. */
static uint64_t lanes_of(const slicing *s, const cmb_tile *tile) {
    uint64_t lanes = 0;
    if (tile->query.step) {
        const cmb_row_range range = cmb_list_range(tile->query);
        if (range.high < s->first || range.low >= s->first + s->count)
            return 0;
    }
    for (int32_t t = 0; t < tile->query.count; t++) {
        const int64_t query = cmb_list_at(s->base, tile->query, t) - s->first;
        if (query >= 0 && query < s->count)
            lanes |= cmb_lane_mask(t, t + 1);
    }
    return lanes;
}

/* ---- which regions are counted ------------------------------------------------------------------ */

static void need_rows(slicing *s, cmb_list list) {
    const bool are_positions = cmb_are_positions(s->base, list);
    for (int32_t n = 0; !are_positions && n < list.count; n++) {
        const int32_t x = cmb_list_at(s->base, list, n);
        if (x >= s->base->L)
            s->needed[x - s->base->L] = true;
    }
    cmb_build_goes_on(s->build, are_positions ? 1 : list.count);
}

/* A row is pooled after its children, so that one pass backwards meets it before them. A task's scratch rows are its
 * own. */
static void find_kept_pools(slicing *s) {
    const cmb_plan *base = s->base;
    for (const cmb_tile *tile = base->tile; tile < base->tile + base->tiles; tile++) {
        const int32_t end = lanes_of(s, tile) ? tile[1].run : tile->run;
        for (int32_t run = tile->run; run < end && !s->build->status; run++)
            need_rows(s, base->run[run].row);
    }
    for (int32_t task = base->tasks - 1; task >= 0 && cmb_build_goes_on(s->build, 1); task--) {
        memset(s->needed + base->R, 0, (size_t)base->N * sizeof *s->needed);
        for (int32_t n = base->task[task + 1].pool - 1; n >= base->task[task].pool; n--) {
            s->kept[n] = s->needed[base->pool[n].row - base->L];
            if (s->kept[n])
                need_rows(s, base->pool[n].child);
        }
    }
}

/* ---- steps -------------------------------------------------------------------------------------- */

static cmb_list copy_list(const slicing *s, cmb_list list) {
    return list.step ? list : cmb_build_list(s->build, s->base->index + list.start, list.count);
}

static void slice_run(const slicing *s, const cmb_run *run, uint64_t lanes, bool is_last) {
    const uint64_t all = cmb_lane_mask(0, __builtin_popcountll(lanes));
    const cmb_list row = copy_list(s, run->row);
    bool is_masked = false;
    for (int32_t n = 0; run->mask >= 0 && n < row.count; n++) {
        s->mask[n] = cmb_gather_lanes(s->base->mask[run->mask + n], lanes);
        is_masked = is_masked || s->mask[n] != all;
    }
    if (!is_masked)
        cmb_build_run(s->build, row);
    else if (is_last)
        cmb_build_masked_run(s->build, row, s->mask);
    else
        cmb_build_untrimmed_run(s->build, row, s->mask);
}

static bool has_attended_rows(const cmb_plan *base, const cmb_run *run, uint64_t lanes) {
    for (int32_t n = 0; n < run->row.count; n++)
        if (run->mask < 0 || base->mask[run->mask + n] & lanes)
            return true;
    return false;
}

static void slice_tile(const slicing *s, const cmb_tile *tile, uint64_t lanes) {
    int32_t end = tile[1].run, query[CMB_TILE], count = 0;
    while (end > tile->run && !has_attended_rows(s->base, s->base->run + end - 1, lanes))
        end--;
    if (end == tile->run)
        return;
    for (uint64_t left = lanes; left; left &= left - 1)
        query[count++] = (int32_t)(cmb_list_at(s->base, tile->query, __builtin_ctzll(left)) - s->first);
    cmb_build_tile(s->build, cmb_build_list(s->build, query, count), tile->width == 1 ? 1 : cmb_tile_width(count));
    for (int32_t run = tile->run; run < end; run++)
        slice_run(s, s->base->run + run, lanes, run == end - 1);
}

static void slice_task(const slicing *s, const cmb_task *task) {
    const cmb_plan *base = s->base;
    for (int32_t n = task[0].pool; n < task[1].pool; n++)
        if (s->kept[n])
            cmb_build_pool(s->build, base->pool[n].row, copy_list(s, base->pool[n].child));
    for (int32_t n = task[0].tile; n < task[1].tile; n++) {
        const uint64_t lanes = lanes_of(s, base->tile + n);
        if (lanes)
            slice_tile(s, base->tile + n, lanes);
    }
}

/* Whether some of a task stays. */
static bool is_task_needed(const slicing *s, const cmb_task *task) {
    for (int32_t n = task[0].pool; n < task[1].pool; n++)
        if (s->kept[n])
            return true;
    for (int32_t n = task[0].tile; n < task[1].tile; n++)
        if (lanes_of(s, s->base->tile + n))
            return true;
    return false;
}

static void slice_waves(const slicing *s) {
    const cmb_plan *base = s->base;
    for (int32_t wave = 0; wave < base->waves; wave++) {
        cmb_build_wave(s->build);
        for (int32_t task = base->wave[wave]; task < base->wave[wave + 1]; task++) {
            if (!cmb_build_goes_on(s->build, 1))
                return;
            if (is_task_needed(s, base->task + task) && cmb_build_task(s->build))
                slice_task(s, base->task + task);
        }
    }
}

/* ---- the plan ----------------------------------------------------------------------------------- */

static size_t longest_masked_run(const cmb_plan *base) {
    int32_t longest = 0;
    for (int32_t run = 0; run < base->runs; run++)
        if (base->run[run].mask >= 0 && base->run[run].row.count > longest)
            longest = base->run[run].row.count;
    return (size_t)longest;
}

cmb_status cmb_plan_slice(const cmb_plan *base, int64_t first, int64_t count, const cmb_interrupt *interrupt,
                          cmb_plan **plan, cmb_error *error) {
    *plan = NULL;
    if (!base)
        return cmb_fail(error, CMB_ERR_VALUE, "base is missing");
    if (base->is_slice)
        return cmb_fail(error, CMB_ERR_VALUE, "base must be a whole plan, got a slice");
    if (count < 0 || count > base->L)
        return cmb_fail(error, CMB_ERR_VALUE, "count must be between 0 and %lld, got %lld", (long long)base->L,
                        (long long)count);
    if (first < 0 || first > base->L - count)
        return cmb_fail(error, CMB_ERR_VALUE, "first must be between 0 and %lld, got %lld",
                        (long long)(base->L - count), (long long)first);
    cmb_build build;
    slicing s = {.build = &build, .base = base, .first = first, .count = count};
    const size_t longest = longest_masked_run(base), rows = (size_t)base->R + (size_t)base->N;
    const size_t bytes = longest * sizeof *s.mask + (rows + (size_t)base->pools + 1) * sizeof *s.needed;
    s.mask = cmb_allocate(bytes);
    if (!s.mask)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory: a slice needs %zu bytes while it is made", bytes);
    memset(s.mask, 0, bytes);
    s.needed = (bool *)(s.mask + longest);
    s.kept = s.needed + rows;
    const cmb_plan_options options = {
        .is_causal = base->is_causal, .size_bias = base->size_bias, .pooling = base->pooling, .interrupt = interrupt};
    cmb_status status = cmb_build_begin(&build, base->L, base->R, base->N, &options, error);
    if (!status) {
        build.plan.weighted = base->weighted;
        build.plan.is_slice = true;
        build.plan.first_query = first;
        build.plan.queries = count;
        if (base->R > 0)
            find_kept_pools(&s);
        slice_waves(&s);
        status = cmb_build_end(&build, plan, error);
    }
    cmb_release(s.mask);
    return status;
}

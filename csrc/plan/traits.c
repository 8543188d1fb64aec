// SPDX-License-Identifier: Apache-2.0
/* The traits of a plan (cmb_plan_traits), which the engine would otherwise have to find in every call. A plan lists far
 * more rows than it has lists: a list with a step is judged by its two ends, so that the traits are found in time that
 * grows with the plan's bytes. */
#include "plan/plan.h"

#include <string.h>

/* ---- is_fusible ---- */

/* Tasks are counted from 0 within their wave. In plans of builders the number of a row's task ascends with the row:
 * `rise` says how far, so that one comparison answers for a whole list. */
typedef struct {
    const cmb_plan *plan;
    cmb_cancel *cancel;
    int64_t first; /* the arrays below begin with this row */
    int32_t *task; /* [L + R - first] the task that wrote the row last */
    int32_t *rise; /* [L + R - first] from element rise[x] to element x, `task` never falls */
} writers;

/* Before each wave. Its tasks read no row that another of its tasks writes, so `rise` holds until the wave ends. */
static void find_rises(const writers *w) {
    const int64_t count = w->plan->L + w->plan->R - w->first;
    for (int64_t n = 0; n < count && !cmb_tick(w->cancel, 1); n++)
        w->rise[n] = n > 0 && w->task[n - 1] <= w->task[n] ? w->rise[n - 1] : (int32_t)n;
}

/* Whether no later task than t was the last to write a row of the list that is `lowest` or higher. */
static bool is_ready(const writers *w, cmb_list list, int64_t lowest, int32_t t) {
    const int64_t end = w->plan->L + w->plan->R; /* scratch rows follow, which are the task's own */
    if (list.step) {
        const cmb_row_range range = cmb_list_range(list);
        const int64_t low = range.low < lowest ? lowest : range.low, high = range.high < end ? range.high : end - 1;
        if (high < low || (w->rise[high - w->first] <= low - w->first && w->task[high - w->first] <= t))
            return true;
    }
    if (cmb_tick(w->cancel, list.count))
        return false;
    for (int32_t n = 0; n < list.count; n++) {
        const int32_t x = cmb_list_at(w->plan, list, n);
        if (x >= lowest && x < end && w->task[x - w->first] > t)
            return false;
    }
    return true;
}

/* Whether task t of its wave, `task` of the plan, needs no row that a later task of an earlier wave writes. */
static bool is_task_fusible(const writers *w, int32_t task, int32_t t) {
    const cmb_plan *plan = w->plan;
    for (int32_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++) {
        if (!is_ready(w, plan->pool[n].child, plan->L, t))
            return false;
        if (plan->pool[n].row < plan->L + plan->R)
            w->task[plan->pool[n].row - w->first] = t;
    }
    for (int32_t n = plan->task[task].tile; n < plan->task[task + 1].tile; n++) {
        const cmb_list query = plan->tile[n].query;
        for (int32_t run = plan->tile[n].run; run < plan->tile[n + 1].run; run++)
            if (!is_ready(w, plan->run[run].row, plan->L, t))
                return false;
        if (!is_ready(w, query, w->first, t))
            return false;
        for (int32_t i = 0; i < query.count; i++) {
            const int32_t x = cmb_list_at(plan, query, i);
            if (x >= w->first)
                w->task[x - w->first] = t;
        }
    }
    return true;
}

static int64_t count_rows(const cmb_plan *plan, int32_t tile) {
    int64_t rows = 0;
    for (int32_t run = plan->tile[tile].run; run < plan->tile[tile + 1].run; run++)
        rows += plan->run[run].row.count;
    return rows;
}

/* Whether the last tile attends far more rows than the middle one, as in dense attention. */
static bool do_tiles_grow(const cmb_plan *plan) {
    return plan->tiles > 0 && 2 * count_rows(plan, plan->tiles - 1) > 3 * count_rows(plan, plan->tiles / 2);
}

/* A single wave may go from its first task on or, as waves that are not fused do, from its last one on. The latter is
 * better if the last tasks are the longest. The former is better for windows: the rows of a tile are then those that
 * earlier tiles had, and its own, which are prefetched.
 *
 * Rows of regions are written by pool steps and by the tiles that summarize them; rows of positions (their results and
 * the state of their softmax) by the tiles that attend. A position that is a query of one tile alone waits for nothing,
 * so the arrays leave positions out where all are such. */
static bool is_fusible(const writers *w) {
    enum { MAX_WAVES = 64 }; /* each takes a pass over all rows, and no builder makes as many */
    const cmb_plan *plan = w->plan;
    if (plan->waves == 1)
        return !do_tiles_grow(plan);
    if (plan->waves < 1 || plan->waves > MAX_WAVES)
        return false;
    for (int64_t n = 0; n < plan->L + plan->R - w->first && !cmb_tick(w->cancel, 1); n++)
        w->task[n] = 0;
    for (int32_t wave = 0; wave < plan->waves; wave++) {
        find_rises(w);
        for (int32_t task = plan->wave[wave]; task < plan->wave[wave + 1]; task++)
            if (cmb_tick(w->cancel, 64) || !is_task_fusible(w, task, task - plan->wave[wave]))
                return false;
    }
    return true;
}

/* ---- query_row, own_queries, shared_queries; key_row, own_keys, shared_keys ---- */

/* needs[r]: the one task that needs region r's row; NO_TASK; or ~next, with next > r, if several tasks need each of the
 * regions r to next - 1. So a list of many such regions takes a few steps. */
enum { NO_TASK = -1 };

static bool do_several_need(const int32_t *needs, int64_t r) { return needs[r] < NO_TASK; }

/* The first region of [r, end) that at most one task needs; `end` if there is none. */
static int64_t skip_shared(int32_t *needs, int64_t r, int64_t end) {
    while (r < end && do_several_need(needs, r)) {
        const int32_t next = ~needs[r];
        if (next < end && do_several_need(needs, next))
            needs[r] = needs[next];
        r = next;
    }
    return r < end ? r : end;
}

static void need_row(int32_t *needs, int64_t r, int32_t task) {
    if (!do_several_need(needs, r))
        needs[r] = needs[r] == NO_TASK || needs[r] == task ? task : ~(int32_t)(r + 1);
}

/* `task` needs the rows of the list's regions. */
static void need_rows(const cmb_plan *plan, cmb_list list, int32_t task, int32_t *needs, cmb_cancel *cancel) {
    if (cmb_are_positions(plan, list))
        return;
    if (list.step == 1) {
        const int64_t first = list.start - plan->L, end = cmb_min(first + list.count, plan->R);
        for (int64_t r = skip_shared(needs, cmb_max(first, 0), end); r < end && !cmb_tick(cancel, 1);
             r = skip_shared(needs, r + 1, end))
            need_row(needs, r, task);
        return;
    }
    if (cmb_tick(cancel, list.count))
        return;
    for (int32_t n = 0; n < list.count; n++) {
        const int64_t r = cmb_list_at(plan, list, n) - plan->L;
        if (r >= 0 && r < plan->R)
            need_row(needs, r, task);
    }
}

/* A task needs the q_R that it pools, pools further or has as a query; of the k_R also those that it attends. row[r]
 * becomes the place of region r's row. */
static void find_rows(const cmb_plan *plan, bool of_keys, int32_t *row, int32_t *own_rows, int32_t *shared_rows,
                      int32_t *needs, cmb_cancel *cancel) {
    for (int32_t r = 0; r < plan->R && !cmb_tick(cancel, 1); r++) {
        needs[r] = NO_TASK;
        row[r] = 0;
    }
    for (int32_t task = 0; task < plan->tasks && !cmb_tick(cancel, 16); task++) {
        for (int32_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++) {
            need_rows(plan, plan->pool[n].child, task, needs, cancel);
            need_rows(plan, cmb_list_make(plan->pool[n].row, 1, 1), task, needs, cancel);
        }
        for (int32_t n = plan->task[task].tile; n < plan->task[task + 1].tile; n++) {
            need_rows(plan, plan->tile[n].query, task, needs, cancel);
            for (int32_t run = plan->tile[n].run; of_keys && run < plan->tile[n + 1].run; run++)
                need_rows(plan, plan->run[run].row, task, needs, cancel);
        }
    }
    *own_rows = *shared_rows = 0;
    for (int32_t r = 0; r < plan->R && !cmb_tick(cancel, 1); r++)
        if (do_several_need(needs, r))
            row[r] = (*shared_rows)++;
    for (int32_t task = 0; task < plan->tasks && !cmb_tick(cancel, 16); task++) {
        int32_t own = 0;
        for (int32_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++) {
            const int64_t r = plan->pool[n].row - plan->L;
            if (r < plan->R && needs[r] == task)
                row[r] = ~own++;
        }
        *own_rows = own > *own_rows ? own : *own_rows;
    }
}

/* ---- pick ---- */

/* first[x] becomes the pick of row L + x, scratch rows included. */
static void find_picks(cmb_plan *plan, int32_t *pick, int32_t *first, cmb_cancel *cancel) {
    memset(first, 0, (size_t)plan->R * sizeof *first);
    for (int32_t n = 0; n < plan->pools && !cmb_tick(cancel, 4); n++) {
        const int32_t child = cmb_list_at(plan, plan->pool[n].child, 0);
        first[plan->pool[n].row - plan->L] = child < plan->L ? child : first[child - plan->L];
    }
    memcpy(pick, first, (size_t)plan->R * sizeof *pick);
    plan->traits.pick = pick;
}

/* ---- reused_rows ---- */

/* For a tile of regions that is not the first of the plan. */
static bool do_regions_pick_queries_before(const cmb_plan *plan, const cmb_tile *tile) {
    const cmb_list region = tile->query, query = tile[-1].query;
    if (tile->width == 1 || tile[-1].width == 1 || region.count > query.count)
        return false;
    for (int32_t i = 0; i < region.count; i++)
        if (plan->traits.pick[cmb_list_at(plan, region, i) - plan->L] != cmb_list_at(plan, query, i))
            return false;
    return true;
}

/* How many rows the tile before has attended, if these are the first of the tile's one run and only the last run of the
 * tile before has masks; else 0. */
static int32_t count_rows_before(const cmb_plan *plan, const cmb_tile *tile) {
    const cmb_list row = plan->run[tile->run].row;
    if (tile[1].run - tile->run != 1 || plan->run[tile->run].mask >= 0 || !row.step ||
        cmb_list_range(row).high >= plan->L)
        return 0;
    int32_t count = 0;
    for (int32_t n = tile[-1].run; n < tile->run; n++) {
        const cmb_run *run = plan->run + n;
        const bool is_next = run->row.step && run->row.start == row.start + (int64_t)row.step * count &&
                             (run->row.step == row.step || run->row.count == 1);
        if (!is_next || run->row.count > row.count - count || (run->mask >= 0 && n + 1 < tile->run))
            return 0;
        count += run->row.count;
    }
    return count;
}

/* A region that an earlier tile has summarized in part continues from its own softmax instead. */
static void find_reused_rows(cmb_plan *plan, int32_t *reused_rows, int32_t *is_met, cmb_cancel *cancel) {
    memset(is_met, 0, (size_t)plan->R * sizeof *is_met);
    for (int32_t tile = 0; tile < plan->tiles; tile++) {
        const cmb_list query = plan->tile[tile].query;
        bool is_first = true;
        reused_rows[tile] = 0;
        if (cmb_tick(cancel, 4 + query.count))
            return;
        if (cmb_list_at(plan, query, 0) < plan->L)
            continue;
        for (int32_t i = 0; i < query.count; i++) {
            const int64_t r = cmb_list_at(plan, query, i) - plan->L;
            is_first = is_first && !is_met[r];
            is_met[r] = true;
        }
        if (is_first && tile > 0 && do_regions_pick_queries_before(plan, plan->tile + tile))
            reused_rows[tile] = count_rows_before(plan, plan->tile + tile);
    }
    plan->traits.reused_rows = reused_rows;
}

/* ---- only_attends ---- */

static bool attends_regions(const cmb_plan *plan, cmb_cancel *cancel) {
    for (int32_t run = 0; run < plan->runs && !cmb_tick(cancel, 1); run++) {
        const cmb_list row = plan->run[run].row;
        if (row.step && cmb_list_range(row).high >= plan->L)
            return true;
        if (row.step || cmb_tick(cancel, row.count))
            continue;
        for (int32_t n = 0; n < row.count; n++)
            if (cmb_list_at(plan, row, n) >= plan->L)
                return true;
    }
    return false;
}

/* ---- has_multi_tile_queries ---- */

/* Whether the positions that are queries ascend from tile to tile, so that none is a query twice. */
static bool do_queries_ascend(const cmb_plan *plan, cmb_cancel *cancel) {
    int64_t last = -1;
    for (int32_t tile = 0; tile < plan->tiles && !cmb_tick(cancel, 4); tile++) {
        const cmb_list query = plan->tile[tile].query;
        if (cmb_list_at(plan, query, 0) >= plan->L)
            continue;
        for (int32_t i = 0; query.step <= 0 && i < query.count; last = cmb_list_at(plan, query, i++))
            if (cmb_list_at(plan, query, i) <= last)
                return false;
        if (query.step > 0 && query.start <= last)
            return false;
        last = query.step > 0 ? cmb_list_range(query).high : last;
    }
    return true;
}

/* The same for any order of queries, by the positions met so far. */
static bool is_some_query_met_twice(const cmb_plan *plan, uint8_t *is_met, cmb_cancel *cancel) {
    memset(is_met, 0, (size_t)plan->L);
    for (int32_t tile = 0; tile < plan->tiles && !cmb_tick(cancel, 64); tile++) {
        const cmb_list query = plan->tile[tile].query;
        if (cmb_list_at(plan, query, 0) >= plan->L)
            continue;
        for (int32_t i = 0; i < query.count; i++)
            if (is_met[cmb_list_at(plan, query, i)]++)
                return true;
    }
    return false;
}

/* ---- has_heads_tiles ---- */

static bool has_some_heads_tile(const cmb_plan *plan, cmb_cancel *cancel) {
    for (int32_t tile = 0; tile < plan->tiles && !cmb_tick(cancel, 2); tile++)
        if (cmb_is_heads_tile(plan, plan->tile + tile))
            return true;
    return false;
}

/* Whether some tile of another kind has a query that a heads' tile before it has. */
static bool is_heads_tile_followed(const cmb_plan *plan, uint8_t *is_met, cmb_cancel *cancel) {
    memset(is_met, 0, (size_t)plan->L);
    for (int32_t tile = 0; tile < plan->tiles && !cmb_tick(cancel, 64); tile++) {
        const cmb_list query = plan->tile[tile].query;
        const bool is_heads_tile = cmb_is_heads_tile(plan, plan->tile + tile);
        if (cmb_list_at(plan, query, 0) >= plan->L)
            continue;
        for (int32_t i = 0; i < query.count; i++)
            if (is_heads_tile)
                is_met[cmb_list_at(plan, query, i)] = true;
            else if (is_met[cmb_list_at(plan, query, i)])
                return true;
    }
    return false;
}

/* ---- all of them ---- */

/* NULL, with the error filled in, if there is no memory. */
static void *allocate(const cmb_plan *plan, size_t count, size_t size, cmb_error *error) {
    void *memory = cmb_allocate(count * size);
    if (!memory)
        cmb_fail(error, CMB_ERR_MEMORY, "out of memory: a plan of length %lld needs %zu bytes while it is made",
                 (long long)plan->L, count * size);
    return memory;
}

/* In a block of its own: few plans keep it, and it would make the others up to a tenth larger. */
static cmb_status find_key_rows(cmb_plan *plan, int32_t *needs, cmb_cancel *cancel, cmb_error *error) {
    cmb_plan_traits *traits = &plan->traits;
    int32_t *key_row = allocate(plan, (size_t)plan->R, sizeof *key_row, error);
    if (!key_row)
        return CMB_ERR_MEMORY;
    find_rows(plan, true, key_row, &traits->own_keys, &traits->shared_keys, needs, cancel);
    if (traits->own_keys > 0 && traits->shared_keys <= plan->R - plan->R / 4) {
        traits->key_row = key_row;
    } else {
        traits->own_keys = traits->shared_keys = 0;
        cmb_release(key_row);
    }
    return CMB_OK;
}

cmb_status cmb_derive_traits(cmb_plan *plan, int32_t *rows, cmb_cancel *cancel, cmb_error *error) {
    cmb_plan_traits *traits = &plan->traits;
    *traits = (cmb_plan_traits){.has_heads_tiles = has_some_heads_tile(plan, cancel)};
    if (plan->tiles > 1 && !do_queries_ascend(plan, cancel)) {
        uint8_t *is_met = allocate(plan, (size_t)plan->L, sizeof *is_met, error);
        if (!is_met)
            return CMB_ERR_MEMORY;
        traits->has_multi_tile_queries = is_some_query_met_twice(plan, is_met, cancel);
        traits->has_heads_tiles = traits->has_heads_tiles && !is_heads_tile_followed(plan, is_met, cancel);
        cmb_release(is_met);
    }
    const bool picks = cmb_picking_regions(plan) > 0;
    const int64_t first = traits->has_multi_tile_queries ? 0 : plan->L;
    const size_t written = (size_t)(plan->L + plan->R - first), pooled = picks ? (size_t)plan->R + (size_t)plan->N : 0;
    int32_t *row = allocate(plan, 2 * written > pooled ? 2 * written : pooled, sizeof *row, error);
    if (!row)
        return CMB_ERR_MEMORY;
    traits->is_fusible = is_fusible(&(writers){plan, cancel, first, row, row + written});
    find_rows(plan, false, rows, &traits->own_queries, &traits->shared_queries, row, cancel);
    traits->query_row = rows;
    if (picks) {
        find_picks(plan, rows + plan->R, row, cancel);
        find_reused_rows(plan, rows + 2 * (int64_t)plan->R, row, cancel);
    }
    cmb_find_sharing(plan, cancel);
    traits->only_attends = plan->pools == 0 && attends_regions(plan, cancel);
    const cmb_status status = find_key_rows(plan, row, cancel, error);
    cmb_release(row);
    return status ? status : cmb_cancel_status(cancel, error);
}

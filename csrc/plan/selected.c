// SPDX-License-Identifier: Apache-2.0
/* Selected: the queries of another plan open some of the regions that they attend (docs/mathematics.md, section 3). An
 * opened region is replaced by the positions below it.
 *
 * Each tile of positions of the base plan becomes one tile that leaves the opened regions out, and one more tile for
 * each block of its queries that opens any. A tile of 64 queries with blocks of 32, where the first block opens region
 * 1 and the second block regions 0 and 2:
 *
 *                              lanes 0-31   lanes 32-63
 *    the base's tile, region 0     x             .
 *                     region 1     .             x
 *                     region 2     x             .
 *                     region 3     x             x
 *                     direct keys  as in the base
 *    tile of block 0, the positions of region 1             queries 0-31
 *    tile of block 1, those of region 0, those of region 2  queries 32-63
 *
 * A block of one query has a row tile, whose list leaves out what the query attends directly: without masks it is a
 * heads' tile (read.h). Regions that no query attends are not summarized. The softmax of a query continues from tile
 * to tile. Rows keep their places in the base's tile, and opened regions are ordered by their last position. So a
 * causal plan keeps the prefix rule of build.h where its base does. */
#include "plan/build.h"

#include <string.h>

typedef struct {
    cmb_build *build;
    const cmb_plan *base;
    const cmb_selection *selection;
    cmb_list *below;  /* [R + N] the positions below a region or scratch row, in lists of the build */
    uint64_t *listed; /* [R] lanes of the tile at hand whose block lists the region; else 0 */
    uint64_t *part;   /* [R] those of them that attend the region */
    uint64_t *direct; /* [L] lanes of the tile at hand that attend the position, as far as this matters; else 0 */
    int32_t *met;     /* [CMB_TILE k] regions with listed != 0 */
    int32_t *opened;  /* [k] regions that one block opens */
    int32_t *row;     /* [longest] a list in the making */
    uint64_t *mask;   /* [longest] its masks */
    int64_t met_count;
    bool *needed; /* [R] some position attends the region, or such a region's summary does */
} selecting;

/* Queries [first, end) of a tile, all of one block. */
typedef struct {
    int32_t first, end;
    const int64_t *region; /* [k] the regions that the block lists */
} block_lanes;

static int32_t row_at(const selecting *s, cmb_list list, int32_t n) {
    return list.step ? list.start + list.step * n : ((const int32_t *)s->build->index.data)[list.start + n];
}

static uint64_t mask_at(const cmb_plan *plan, const cmb_run *run, int32_t n, uint64_t all) {
    return run->mask < 0 ? all : plan->mask[run->mask + n];
}

/* The lanes after `first` that are of the block of lane `first`. */
static block_lanes block_from(const selecting *s, cmb_list query, int32_t first) {
    const int64_t block = cmb_list_at(s->base, query, first) / s->selection->block;
    int32_t end = first + 1;
    while (end < query.count && cmb_list_at(s->base, query, end) / s->selection->block == block)
        end++;
    return (block_lanes){first, end, s->selection->region + block * s->selection->count};
}

/* ---- positions below regions ---- */

/* Sets below[] of a pool step's row. Children that are positions are listed as they are. */
static void find_below(selecting *s, const cmb_pool *pool) {
    const int64_t L = s->base->L;
    int64_t count = 0;
    bool are_positions = true;
    for (int32_t n = 0; n < pool->child.count; n++) {
        const int32_t child = cmb_list_at(s->base, pool->child, n);
        are_positions = are_positions && child < L;
        if (child < L) {
            s->row[count++] = child;
            continue;
        }
        const cmb_list below = s->below[child - L];
        for (int32_t m = 0; m < below.count; m++)
            s->row[count++] = row_at(s, below, m);
    }
    s->below[pool->row - L] = are_positions ? pool->child : cmb_build_list(s->build, s->row, count);
    cmb_build_goes_on(s->build, count);
}

/* The most rows of a run, and the most positions below a row of a pool step. */
static int64_t longest_list(const cmb_plan *base, int64_t *below) {
    int64_t longest = 1;
    for (int32_t run = 0; run < base->runs; run++)
        longest = base->run[run].row.count > longest ? base->run[run].row.count : longest;
    for (int32_t pool = 0; pool < base->pools; pool++) {
        int64_t count = 0;
        for (int32_t n = 0; n < base->pool[pool].child.count; n++) {
            const int32_t child = cmb_list_at(base, base->pool[pool].child, n);
            count += child < base->L ? 1 : below[child - base->L];
        }
        below[base->pool[pool].row - base->L] = count;
        longest = count > longest ? count : longest;
    }
    return longest;
}

/* ---- the base's tile without the regions that are opened ---- */

static bool has_regions(const cmb_plan *base, cmb_list list) {
    if (list.step)
        return cmb_list_range(list).high >= base->L;
    for (int32_t n = 0; n < list.count; n++)
        if (cmb_list_at(base, list, n) >= base->L)
            return true;
    return false;
}

/* The lanes of `mask` that attend row x in the selected plan. */
static uint64_t remaining(selecting *s, int32_t x, uint64_t mask) {
    if (x < s->base->L)
        return mask;
    const uint64_t listed = s->listed[x - s->base->L];
    s->part[x - s->base->L] |= mask & listed;
    return s->selection->open ? s->selection->rest ? mask & ~listed : 0 : mask & listed;
}

static void copy_run(selecting *s, const cmb_run *run) {
    if (run->mask < 0)
        cmb_build_run(s->build, run->row);
    else
        cmb_build_untrimmed_run(s->build, run->row, s->base->mask + run->mask);
}

/* Whether the row is a region that is not summarized. */
static bool is_absent(const selecting *s, int32_t x) { return x >= s->base->L && !s->needed[x - s->base->L]; }

/* Adds the first `count` of s->row under s->mask. Where `list` has as many rows it is those. A position stands in,
 * under an empty mask, for each absent region, so that the rows behind it keep their places. */
static void add_run(selecting *s, cmb_list list, int64_t count, int32_t position) {
    bool is_same = count == list.count;
    for (int64_t n = 0; n < count; n++)
        if (is_absent(s, s->row[n])) {
            CMB_ASSERT(!s->mask[n]);
            s->row[n] = position;
            is_same = false;
        }
    cmb_build_untrimmed_run(s->build, is_same ? list : cmb_build_list(s->build, s->row, count), s->mask);
}

/* The run with its remaining lanes. Without `rest` it shrinks to the rows that some lane attends. Starts the tile
 * before its first run: a tile may lose all of its rows. */
static void select_run(selecting *s, const cmb_tile *tile, const cmb_run *run, bool *is_started) {
    const uint64_t all = cmb_lane_mask(0, tile->query.count);
    uint64_t seen = 0;
    int64_t count = 0;
    bool is_changed = false;
    const bool is_selected = has_regions(s->base, run->row);
    for (int32_t n = 0; is_selected && n < run->row.count; n++) {
        const int32_t x = cmb_list_at(s->base, run->row, n);
        const uint64_t mask = mask_at(s->base, run, n, all), left = remaining(s, x, mask);
        is_changed = is_changed || left != mask;
        seen |= left;
        if (left || s->selection->rest) {
            s->row[count] = x;
            s->mask[count++] = left;
        }
    }
    if (is_changed && !seen && !s->selection->rest)
        return;
    if (!*is_started)
        cmb_build_tile(s->build, tile->query, tile->width);
    *is_started = true;
    if (is_changed)
        add_run(s, run->row, count, cmb_list_at(s->base, tile->query, 0));
    else
        copy_run(s, run);
}

/* ---- the tiles of opened regions ---- */

/* The block's opened regions into s->opened, by their last position. Returns how many. */
static int64_t find_opened(selecting *s, block_lanes block) {
    const uint64_t lanes = cmb_lane_mask(block.first, block.end);
    int64_t count = 0;
    for (int64_t c = 0; c < s->selection->count; c++) {
        const int64_t r = block.region[c];
        if (r < 0 || !(s->part[r] & lanes))
            continue;
        const cmb_list below = s->below[r];
        const int32_t last = row_at(s, below, below.count - 1);
        int64_t at = count;
        while (at > 0 && s->opened[at - 1] != r) {
            const cmb_list before = s->below[s->opened[at - 1]];
            const int32_t end = row_at(s, before, before.count - 1);
            if (end < last || (end == last && s->opened[at - 1] < r))
                break;
            at--;
        }
        if (at > 0 && s->opened[at - 1] == r)
            continue;
        memmove(s->opened + at + 1, s->opened + at, (size_t)(count - at) * sizeof *s->opened);
        s->opened[at] = (int32_t)r;
        count++;
    }
    return count;
}

/* Adds the lanes that attend positions [low, high] directly to s->direct, or takes them out again. */
static void mark_direct(selecting *s, const cmb_tile *tile, int32_t low, int32_t high, bool is_marked) {
    const uint64_t all = cmb_lane_mask(0, tile->query.count);
    for (int32_t r = tile[0].run; r < tile[1].run; r++) {
        const cmb_run *run = s->base->run + r;
        if (run->row.step) {
            const cmb_row_range range = cmb_list_range(run->row);
            if (range.high < low || range.low > high)
                continue;
        }
        for (int32_t n = 0; n < run->row.count; n++) {
            const int32_t x = cmb_list_at(s->base, run->row, n);
            if (low <= x && x <= high)
                s->direct[x] = is_marked ? s->direct[x] | mask_at(s->base, run, n, all) : 0;
        }
    }
}

/* The lanes of a block attend the positions below region r, except those that they attend directly. Starts their tile
 * before its first run. */
static void open_region(selecting *s, const cmb_tile *tile, block_lanes block, int32_t r, bool *is_started) {
    const uint64_t all = cmb_lane_mask(0, block.end - block.first);
    const uint64_t lanes = s->part[r] >> block.first & all;
    const cmb_list below = s->below[r];
    int32_t whole = 0; /* rows that all lanes attend */
    for (int32_t n = 0; n < below.count; n++) {
        s->mask[n] = lanes & ~(s->direct[row_at(s, below, n)] >> block.first);
        s->row[whole] = row_at(s, below, n);
        whole += s->mask[n] == all;
    }
    if (whole == 0 && s->selection->block == 1)
        return;
    if (!*is_started)
        cmb_build_tile(s->build, cmb_list_cut(tile->query, block.first, block.end),
                       s->selection->block == 1 ? 1 : cmb_tile_width(block.end - block.first));
    *is_started = true;
    if (whole == below.count)
        cmb_build_run(s->build, below);
    else if (s->selection->block == 1)
        cmb_build_run(s->build, cmb_build_list(s->build, s->row, whole));
    else
        cmb_build_untrimmed_run(s->build, below, s->mask);
}

static void open_regions(selecting *s, const cmb_tile *tile) {
    int32_t low = INT32_MAX, high = -1;
    for (int64_t n = 0; n < s->met_count; n++) {
        const cmb_list below = s->below[s->met[n]];
        for (int32_t m = 0; s->part[s->met[n]] && m<below.count; m += below.count> 1 ? below.count - 1 : 1) {
            low = row_at(s, below, m) < low ? row_at(s, below, m) : low;
            high = row_at(s, below, m) > high ? row_at(s, below, m) : high;
        }
    }
    if (high < 0)
        return;
    mark_direct(s, tile, low, high, true);
    for (int32_t lane = 0; lane < tile->query.count && !s->build->status;) {
        const block_lanes block = block_from(s, tile->query, lane);
        const int64_t count = find_opened(s, block);
        bool is_started = false;
        lane = block.end;
        for (int64_t n = 0; n < count; n++)
            open_region(s, tile, block, s->opened[n], &is_started);
    }
    mark_direct(s, tile, low, high, false);
}

/* ---- one tile ---- */

static void list_regions(selecting *s, const cmb_tile *tile) {
    s->met_count = 0;
    for (int32_t lane = 0; lane < tile->query.count;) {
        const block_lanes block = block_from(s, tile->query, lane);
        for (int64_t c = 0; c < s->selection->count; c++) {
            const int64_t r = block.region[c];
            if (r < 0)
                continue;
            if (!s->listed[r])
                s->met[s->met_count++] = (int32_t)r;
            s->listed[r] |= cmb_lane_mask(block.first, block.end);
        }
        lane = block.end;
    }
    cmb_build_goes_on(s->build, tile->query.count * (1 + s->selection->count));
}

static void forget_regions(selecting *s) {
    for (int64_t n = 0; n < s->met_count; n++)
        s->listed[s->met[n]] = s->part[s->met[n]] = 0;
}

static void attend_selected(selecting *s, const cmb_tile *tile) {
    bool is_started = false;
    list_regions(s, tile);
    for (int32_t run = tile[0].run; run < tile[1].run; run++)
        select_run(s, tile, s->base->run + run, &is_started);
    if (s->selection->open)
        open_regions(s, tile);
    forget_regions(s);
}

/* The lanes of a tile of regions that are needed. */
static uint64_t needed_lanes(const selecting *s, const cmb_tile *tile) {
    uint64_t lanes = 0;
    for (int32_t t = 0; t < tile->query.count; t++)
        if (s->needed[cmb_list_at(s->base, tile->query, t) - s->base->L])
            lanes |= cmb_lane_mask(t, t + 1);
    return lanes;
}

/* Summarizes those regions of the tile that are needed. */
static void summarize_needed(selecting *s, const cmb_tile *tile) {
    const uint64_t lanes = needed_lanes(s, tile);
    const bool are_all = lanes == cmb_lane_mask(0, tile->query.count);
    if (!lanes)
        return;
    int32_t region[CMB_TILE], count = 0;
    for (uint64_t left = lanes; left; left &= left - 1)
        region[count++] = cmb_list_at(s->base, tile->query, __builtin_ctzll(left));
    cmb_build_tile(s->build, are_all ? tile->query : cmb_build_list(s->build, region, count),
                   tile->width == 1 ? 1 : cmb_tile_width(count));
    for (const cmb_run *run = s->base->run + tile[0].run; run < s->base->run + tile[1].run; run++) {
        if (are_all || run->mask < 0) {
            copy_run(s, run);
            continue;
        }
        for (int32_t n = 0; n < run->row.count; n++) {
            s->row[n] = cmb_list_at(s->base, run->row, n);
            s->mask[n] = cmb_gather_lanes(s->base->mask[run->mask + n], lanes);
        }
        add_run(s, run->row, run->row.count, row_at(s, s->below[region[0] - s->base->L], 0));
    }
}

/* ---- which regions are needed ---- */

/* Those that some of `lanes` attend in a tile of regions, or what remains of them in a tile of positions. */
static void need_rows(selecting *s, const cmb_tile *tile, uint64_t lanes, bool are_positions) {
    for (const cmb_run *run = s->base->run + tile[0].run; run < s->base->run + tile[1].run; run++) {
        if (!has_regions(s->base, run->row) || !cmb_build_goes_on(s->build, run->row.count))
            continue;
        for (int32_t n = 0; n < run->row.count; n++) {
            const int32_t x = cmb_list_at(s->base, run->row, n);
            const uint64_t mask = mask_at(s->base, run, n, lanes) & lanes;
            if (x >= s->base->L && (are_positions ? remaining(s, x, mask) : mask))
                s->needed[x - s->base->L] = true;
        }
    }
}

/* A region is summarized after its members and before its readers, so that one pass backwards meets readers first. */
static void find_needed(selecting *s) {
    for (int32_t n = s->base->tiles - 1; n >= 0 && !s->build->status; n--) {
        const cmb_tile *tile = s->base->tile + n;
        const bool are_positions = cmb_list_at(s->base, tile->query, 0) < s->base->L;
        if (are_positions)
            list_regions(s, tile);
        need_rows(s, tile, are_positions ? cmb_lane_mask(0, tile->query.count) : needed_lanes(s, tile), are_positions);
        if (are_positions)
            forget_regions(s);
    }
}

/* ---- the plan ---- */

static void select_all(selecting *s) {
    const cmb_plan *base = s->base;
    const bool has_summaries = s->build->plan.R > 0;
    for (int32_t pool = 0; pool < base->pools && !s->build->status; pool++)
        find_below(s, base->pool + pool);
    if (has_summaries)
        find_needed(s);
    for (int32_t wave = 0; wave < base->waves; wave++) {
        cmb_build_wave(s->build);
        for (int32_t t = base->wave[wave]; t < base->wave[wave + 1]; t++) {
            if (!cmb_build_task(s->build))
                return;
            for (int32_t n = base->task[t].pool; has_summaries && n < base->task[t + 1].pool; n++)
                cmb_build_pool(s->build, base->pool[n].row, base->pool[n].child);
            for (int32_t n = base->task[t].tile; n < base->task[t + 1].tile && !s->build->status; n++)
                if (cmb_list_at(base, base->tile[n].query, 0) < base->L)
                    attend_selected(s, base->tile + n);
                else if (has_summaries)
                    summarize_needed(s, base->tile + n);
        }
    }
}

static cmb_status check_selection(const cmb_plan *base, const cmb_selection *selection, cmb_error *error) {
    if (!base || !selection)
        return cmb_fail(error, CMB_ERR_VALUE, "%s is missing", base ? "selection" : "base");
    if (base->is_slice)
        return cmb_fail(error, CMB_ERR_VALUE, "base must be a whole plan, got a slice");
    if (selection->block < 1)
        return cmb_fail(error, CMB_ERR_VALUE, "block must be at least 1, got %lld", (long long)selection->block);
    if (selection->count < 0 || selection->count > INT32_MAX / CMB_TILE)
        return cmb_fail(error, CMB_ERR_VALUE, "count must be between 0 and %d, got %lld", INT32_MAX / CMB_TILE,
                        (long long)selection->count);
    if (!selection->open && selection->rest)
        return cmb_fail(error, CMB_ERR_VALUE, "open must be true where rest is true");
    if (selection->open && base->R > 0 && base->pools == 0)
        return cmb_fail(error, CMB_ERR_VALUE, "base has regions that the caller gives, whose positions are not known");
    const int64_t blocks = (base->L + selection->block - 1) / selection->block;
    if (blocks > 0 && selection->count > 0 && !selection->region)
        return cmb_fail(error, CMB_ERR_VALUE, "region is missing");
    for (int64_t n = 0; n < blocks * selection->count; n++)
        if (selection->region[n] < -1 || selection->region[n] >= base->R)
            return cmb_fail(error, CMB_ERR_VALUE, "regions must lie between -1 and %lld, got %lld for block %lld",
                            (long long)base->R - 1, (long long)selection->region[n], (long long)(n / selection->count));
    return CMB_OK;
}

/* One block of memory for all arrays of *s, which it returns, zeroed; NULL if there is none. */
static void *allocate_arrays(selecting *s, cmb_error *error) {
    const size_t R = (size_t)s->base->R, L = (size_t)s->base->L, below = R + (size_t)s->base->N;
    int64_t *counts = cmb_allocate((below + 1) * sizeof *counts);
    if (!counts) {
        cmb_fail(error, CMB_ERR_MEMORY, "out of memory: a selection needs %zu bytes while it is made",
                 (below + 1) * sizeof *counts);
        return NULL;
    }
    memset(counts, 0, (below + 1) * sizeof *counts);
    const size_t longest = (size_t)longest_list(s->base, counts), k = (size_t)s->selection->count;
    cmb_release(counts);
    const size_t bytes = (2 * R + L + longest) * sizeof *s->mask + below * sizeof *s->below +
                         ((CMB_TILE + 1) * k + longest + 1) * sizeof *s->row + R * sizeof *s->needed;
    void *memory = cmb_allocate(bytes);
    if (!memory) {
        cmb_fail(error, CMB_ERR_MEMORY, "out of memory: a selection needs %zu bytes while it is made", bytes);
        return NULL;
    }
    memset(memory, 0, bytes);
    s->listed = memory;
    s->part = s->listed + R;
    s->direct = s->part + R;
    s->mask = s->direct + L;
    s->below = (cmb_list *)(void *)(s->mask + longest);
    s->met = (int32_t *)(void *)(s->below + below);
    s->opened = s->met + CMB_TILE * k;
    s->row = s->opened + k + 1;
    s->needed = (bool *)(s->row + longest);
    return memory;
}

cmb_status cmb_plan_selected(const cmb_plan *base, const cmb_selection *selection, const cmb_interrupt *interrupt,
                             cmb_plan **plan, cmb_error *error) {
    *plan = NULL;
    TRY(check_selection(base, selection, error));
    cmb_build build;
    selecting s = {.build = &build, .base = base, .selection = selection};
    void *memory = allocate_arrays(&s, error);
    if (!memory)
        return CMB_ERR_MEMORY;
    const cmb_plan_options options = {
        .is_causal = base->is_causal, .size_bias = base->size_bias, .pooling = base->pooling, .interrupt = interrupt};
    const bool has_summaries = selection->rest || !selection->open;
    cmb_status status =
        cmb_build_begin(&build, base->L, has_summaries ? base->R : 0, has_summaries ? base->N : 0, &options, error);
    if (!status) {
        build.plan.weighted = base->weighted;
        cmb_build_lists_of(&build, base);
        select_all(&s);
        status = cmb_build_end(&build, plan, error);
    }
    cmb_release(memory);
    return status;
}

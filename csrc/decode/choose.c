// SPDX-License-Identifier: Apache-2.0
/*
 * A decoder whose queries open regions (docs/mathematics.md, section 3). A tile of the step's plan is attended in two
 * parts, which are the tiles that cmb_plan_selected makes of it for blocks of one query, so that the bits are theirs:
 *
 *     step's tile                        queries a b c d    regions, direct keys
 *     1. the tile, less what is opened   queries a b c d    the same rows; masks hide each query's opened regions
 *     2. a tile for each query           a | b | c | d      the positions of its opened regions
 *
 * In the second part the query heads that share a key head may be lanes of one tile (tile/heads.h). A worker keeps the
 * choices and the tiles of one of the step's tiles at a time: the step's plan never changes.
 */
#include "decode/decoder.h"
#include "plan/best.h"
#include "tile/heads.h"

#include <math.h>

/* ---- a worker's memory -------------------------------------------------------------------------- */

static int32_t most(int32_t a, int64_t b) { return a > b ? a : (int32_t)b; }

void cmb_measure_selection(const cmb_plan *plan, cmb_selector_size *size) {
    size->regions = most(size->regions, plan->R);
    for (int32_t tile = 0; tile < plan->tiles; tile++) {
        int64_t rows = 0;
        for (int32_t n = plan->tile[tile].run; n < plan->tile[tile + 1].run; n++)
            rows += plan->run[n].row.count;
        size->rows = most(size->rows, rows);
        size->runs = most(size->runs, plan->tile[tile + 1].run - plan->tile[tile].run);
    }
}

int64_t cmb_opened_rows(const cmb_decoder *d, int64_t length) {
    /* Of regions of many sizes the largest score highest (docs/selection.md), and they are most of the sequence. */
    return d->levels != 2 ? length : cmb_min(length, cmb_min(d->options.select, length / d->size[1]) * d->size[1]);
}

void cmb_take_selector(cmb_arena *arena, const cmb_selector_size *size, cmb_selector *selector) {
    const size_t regions = (size_t)size->regions, k = (size_t)size->k;
    const cmb_selector w = {
        .k = size->k,
        .head = cmb_take(arena, (size_t)size->heads, sizeof *w.head),
        .region = cmb_take(arena, regions, sizeof *w.region),
        .score = cmb_take(arena, regions, sizeof *w.score),
        .logit = cmb_take(arena, regions, sizeof *w.logit),
        .best = cmb_take(arena, k, sizeof *w.best),
        .opened = cmb_take(arena, k, sizeof *w.opened),
        .end = cmb_take(arena, k, sizeof *w.end),
        .chosen = cmb_take(arena, (size_t)size->queries, k * sizeof *w.chosen),
        .run = cmb_take(arena, (size_t)size->runs > k ? (size_t)size->runs : k, sizeof *w.run),
        .mask = cmb_take(arena, (size_t)size->rows, sizeof *w.mask),
    };
    if (arena->base)
        *selector = w;
}

/* ---- the choice --------------------------------------------------------------------------------- */

/* The level whose nodes the rows of regions around `region` are. */
static int level_of(const cmb_decoder *d, const cmb_sequence *s, int64_t region) {
    int level = 1;
    while (level + 1 < d->levels && s->level[level + 1].row <= region)
        level++;
    return level;
}

/* The regions that a lane of the tile attends, to w->region. Returns how many. */
static int64_t list_regions(const cmb_plan *plan, const cmb_tile *tile, int lane, cmb_selector *w) {
    int64_t count = 0;
    for (const cmb_run *run = plan->run + tile[0].run; run < plan->run + tile[1].run; run++)
        for (int32_t n = 0; n < run->row.count && !cmb_are_positions(plan, run->row); n++) {
            const int32_t x = cmb_list_at(plan, run->row, n);
            if (x >= plan->L && (run->mask < 0 || plan->mask[run->mask + n] >> lane & 1))
                w->region[count++] = x - (int32_t)plan->L;
        }
    return count;
}

/* The positions below a region that query i does not attend directly: [first, end) of the sequence. A region of
 * HeavilyCompressed may reach into the window. */
typedef struct {
    int64_t first, end;
} members;

static members members_of(const cmb_decoder *d, const cmb_sequence *s, int64_t region, int64_t i) {
    const cmb_pattern *pattern = &d->options.pattern;
    const int level = level_of(d, s, region);
    const int64_t size = d->size[level], node = s->level[level].first + region - s->level[level].row;
    const int64_t direct = pattern->kind == CMB_HEAVILY_COMPRESSED ? i - pattern->window + 1 : i;
    return (members){node * size, cmb_min((node + 1) * size, direct)};
}

/* The chosen regions in the order in which cmb_plan_selected opens them: by their last position. */
static void sort_by_end(const cmb_decoder *d, const cmb_sequence *s, int64_t count, int32_t *chosen, cmb_selector *w) {
    for (int64_t n = 0; n < count; n++) {
        const int64_t end = members_of(d, s, w->opened[n], INT64_MAX).end;
        int64_t at = n;
        for (; at > 0 && w->end[at - 1] > end; at--) {
            w->end[at] = w->end[at - 1];
            chosen[at] = chosen[at - 1];
        }
        w->end[at] = end;
        chosen[at] = (int32_t)w->opened[n];
    }
}

static void choose(const cmb_decoder *d, const cmb_sequence *s, int64_t x, int64_t regions, int32_t *chosen,
                   cmb_selector *w, cmb_scratch *scratch) {
    int64_t count = 0;
    for (int64_t n = 0; n < regions; n++)
        w->score[n] = -(double)INFINITY;
    for (int64_t h = 0; h < d->options.Hq / d->options.Hk; h++) {
        d->stage->region_logits(&w->head[h], x, regions, w->region, w->logit, scratch);
        for (int64_t n = 0; n < regions; n++) /* a NaN is no logit */
            w->score[n] = w->logit[n] > w->score[n] ? w->logit[n] : w->score[n];
    }
    for (int64_t n = 0; n < regions; n++) {
        const int64_t below = d->size[level_of(d, s, w->region[n])];
        const double score = d->options.pattern.size_bias ? w->score[n] + log((double)below) : w->score[n];
        count = cmb_join_best(score, w->region[n], w->k, count, w->best, w->opened);
    }
    sort_by_end(d, s, count, chosen, w);
    for (; count < w->k; count++)
        chosen[count] = -1;
}

void cmb_choose_regions(const cmb_decoder *d, const cmb_sequence *s, int32_t tile, int lanes, cmb_selector *w,
                        cmb_scratch *scratch) {
    const cmb_plan *plan = w->head->plan;
    const cmb_tile *t = plan->tile + tile;
    for (int lane = 0; lane < t->query.count; lane += lanes)
        choose(d, s, cmb_list_at(plan, t->query, lane), list_regions(plan, t, lane, w), w->chosen + lane / lanes * w->k,
               w, scratch);
}

/* ---- attending ---------------------------------------------------------------------------------- */

/* Takes these lanes from the row of a run with a mask. */
static void hide_row(const cmb_plan *plan, const cmb_run *run, int64_t row, uint64_t lanes, uint64_t *mask) {
    const cmb_list list = run->row;
    if (list.step == 1) {
        if (list.start <= row && row < list.start + list.count)
            mask[run->mask + row - list.start] &= ~lanes;
        return;
    }
    for (int32_t n = 0; n < list.count; n++)
        if (cmb_list_at(plan, list, n) == row)
            mask[run->mask + n] &= ~lanes;
}

/* Makes w->run and w->mask the tile's, less what its queries open. */
static void hide_opened(const cmb_plan *plan, const cmb_tile *tile, int lanes, cmb_selector *w) {
    const int32_t runs = tile[1].run - tile[0].run;
    int32_t masks = 0;
    for (int32_t n = 0; n < runs; n++) {
        const cmb_run *run = plan->run + tile->run + n;
        w->run[n] = (cmb_run){run->row, -1};
        if (run->mask < 0 && cmb_are_positions(plan, run->row))
            continue;
        w->run[n].mask = masks;
        for (int32_t k = 0; k < run->row.count; k++)
            w->mask[masks++] = run->mask < 0 ? cmb_lane_mask(0, tile->query.count) : plan->mask[run->mask + k];
    }
    for (int lane = 0; lane < tile->query.count; lane += lanes)
        for (int64_t c = lane / lanes * w->k, end = c + w->k; c < end && w->chosen[c] >= 0; c++)
            for (int32_t n = 0; n < runs; n++)
                if (!cmb_are_positions(plan, w->run[n].row))
                    hide_row(plan, &w->run[n], plan->L + w->chosen[c], cmb_lane_mask(lane, lane + lanes), w->mask);
}

/* Makes w->run the positions that a query opens. Returns how many runs they are. */
static int32_t open_regions(const cmb_decoder *d, const cmb_sequence *s, int64_t x, const int32_t *chosen,
                            cmb_selector *w) {
    const int64_t first = s->level[0].first;
    int32_t runs = 0;
    for (int64_t c = 0; c < w->k && chosen[c] >= 0; c++) {
        const members below = members_of(d, s, chosen[c], first + x);
        if (below.first < below.end)
            w->run[runs++] = (cmb_run){cmb_list_make(below.first - first, 1, below.end - below.first), -1};
    }
    return runs;
}

/* Position x of query heads [first, end) attends the runs in w->run. */
static void attend_opened(const cmb_decoder *d, const cmb_plan *plan, int64_t first, int64_t end, int64_t x,
                          int32_t runs, cmb_selector *w, cmb_scratch *scratch) {
    const cmb_decoder_options *o = &d->options;
    const bool are_lanes = cmb_are_heads_lanes(o->Hq / o->Hk, o->key_bias_heads > o->Hk);
    const int lanes = are_lanes ? cmb_lanes_of_group(end - first) : 1;
    const cmb_tile own[2] = {{cmb_list_make(x, 1, 1), 0, 1}, {.run = runs}};
    cmb_plan part = *plan;
    part.tile = own;
    part.run = w->run;
    for (int64_t h = first; h < end; h += lanes) {
        cmb_heads_tile tile;
        w->head[h].plan = &part;
        if (are_lanes)
            cmb_make_heads_tile(d->stage, &w->head[h], &w->head[h + (lanes > 1)], lanes, (int32_t)x, 0, runs, &tile);
        d->stage->tile(are_lanes ? &tile.head : &w->head[h], 0, -1, scratch);
    }
}

void cmb_attend_selected(const cmb_decoder *d, const cmb_sequence *s, int64_t first, int64_t end, int32_t tile,
                         int lanes, cmb_selector *w, cmb_scratch *scratch) {
    const cmb_plan *plan = w->head->plan;
    const cmb_tile *t = plan->tile + tile;
    const cmb_tile own[2] = {{t->query, 0, t->width}, {.run = t[1].run - t[0].run}};
    cmb_plan part = *plan;
    part.tile = own;
    part.run = w->run;
    part.mask = w->mask;
    hide_opened(plan, t, lanes, w);
    for (int64_t h = first; h < end; h += lanes) {
        w->head[h].plan = &part;
        d->stage->tile(&w->head[h], 0, -1, scratch);
    }
    for (int lane = 0; lane < t->query.count; lane += lanes) {
        const int64_t x = cmb_list_at(plan, t->query, lane);
        const int32_t runs = open_regions(d, s, x, w->chosen + lane / lanes * w->k, w);
        if (runs)
            attend_opened(d, plan, first, end, x, runs, w, scratch);
    }
}

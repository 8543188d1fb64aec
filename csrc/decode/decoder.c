// SPDX-License-Identifier: Apache-2.0
/*
 * A decoder's step: room and plans are made first, which may fail; then the heads run, each as in a call of attention.
 * A step of few positions is one loop over key heads, each of which is one thread's:
 *
 *     append      keys, values and queries to the tables; the softmax states of the new rows
 *     waves       the tasks of the step's plan; where queries open regions, only what summarizes
 *     select      where queries open regions: they choose, and then attend
 *     finish      the results
 *
 * A long step goes through these phases one after another, each on all threads. In a step of one position the query
 * heads of a key head are the lanes of one tile, which reads every key once for all of them, and every value but h_R,
 * which differs between them.
 */
#include "decode/decoder.h"
#include "plan/read.h"
#include "runtime/memory.h"
#include "runtime/threads.h"

#include <string.h>

/* Below this many products of a row's feature and a lane, waking a thread costs more than it gives (about 20 us). A
 * tile of one query counts as 8 lanes: it takes about half as long as 16. */
static const double worth_a_thread = 4 << 20;

/* From this many new positions on, tasks of one head run side by side. */
enum { MANY_POSITIONS = 64 };

/* The step of one sequence. */
typedef struct {
    int64_t n;      /* new positions */
    int64_t row;    /* of the first one, in the table of positions */
    cmb_plan *plan; /* NULL where n is 0 */
    bool is_owner;  /* it frees the plan; equal steps share one */
} step_plan;

typedef struct {
    const cmb_decoder *decoder;
    const cmb_new_positions *positions;
    step_plan *step; /* [B] */
    cmb_scratch **scratch;
    char *softmax, *region_softmax; /* [B][Hq][n or regions][2], as computed */
    int64_t regions;                /* rows of the largest table of regions */
    char *region_query;             /* [B][Hq][new_regions][D], as computed, where the tables do not keep them */
    int64_t new_regions;            /* of level 1, the most of a sequence */
    char *result;           /* [B][Hq][n][Dv], as computed, where `out` cannot hold it between a query's tiles */
    cmb_selector *selector; /* [workers]; NULL: no region is opened */
    cmb_selector_size selected;
    int lanes;
    int64_t part; /* query heads of a key head that open regions together: their choice is made once */
    int workers;
    int32_t wave, waves, tasks, tiles; /* the wave at hand, and the most of any plan */
    cmb_cancel cancel;
} running;

/* ---- one head ----------------------------------------------------------------------------------- */

/* Rows whose row `at` is the first of `data`. Only rows from `at` on are ever addressed. */
static cmb_rows rows_from(const void *data, int64_t row, int64_t at, size_t size) {
    return (cmb_rows){.data = (void *)((uintptr_t)data - (uintptr_t)at * (uintptr_t)row * size), .row = row};
}

static cmb_rows rows_of_head(const void *data, int64_t head, int64_t rows, int64_t dim, size_t size) {
    return (cmb_rows){.data = data ? (char *)data + (size_t)(head * rows * dim) * size : NULL, .row = dim};
}

/* The queries of query head h, by their rows in the table of positions. */
static cmb_rows kept_queries(const cmb_decoder *d, const cmb_sequence *s, int64_t h) {
    const bool is_apart = cmb_has_queries_apart(d);
    const cmb_table *table = is_apart ? &s->queries : &s->positions;
    const int64_t D = d->options.D, first = is_apart ? s->level[CMB_QUERIES].first - s->level[0].first : 0;
    const cmb_rows rows = rows_of_head(table->query, h, table->rows, D, d->stage->stored_size);
    return rows_from(rows.data, D, first, d->stage->stored_size);
}

/* The rows of the caller's array that belong to a head of a sequence. */
static const void *callers_rows(const cmb_array *array, int64_t b, int64_t h, size_t size) {
    return (const char *)array->data + (b * array->batch + h * array->head) * (int64_t)size;
}

/* Whether regions are summarized apart from the tiles that attend: where a tile's lanes are heads, each for itself, and
 * where queries open regions, before the choice. */
static bool summarizes_apart(const running *run) {
    return run->selector || (run->lanes > 1 && run->decoder->made == CMB_SUMMARIES);
}

/* Whether regions are rows of a grid, whose query and key are those of one of their positions. */
static bool picks(const cmb_decoder *d) {
    return d->options.pattern.kind == CMB_AXIAL && d->options.pattern.order == CMB_AXIAL_ROWMAJOR;
}

/* The first row of a level's regions that the step makes. */
static int64_t first_new_row(const running *run, int64_t b, int level) {
    const cmb_sequence *s = &run->decoder->sequence[b];
    return s->level[level].row + cmb_nodes(run->decoder, level, s->length) - s->level[level].first;
}

/* The queries of the new regions of query head h, indexed by the regions' rows in their table. */
static cmb_rows new_region_queries(const running *run, int64_t b, int64_t h) {
    const cmb_decoder_options *o = &run->decoder->options;
    const size_t size = run->decoder->stage->size;
    const char *first = run->region_query + (size_t)((b * o->Hq + h) * run->new_regions * o->D) * size;
    return rows_from(first, o->D, first_new_row(run, b, 1), size);
}

/* Query head h; with lanes, the heads from h on, or, for CMB_SUMMARIZE, h alone. */
static cmb_head make_head(const running *run, int64_t b, int64_t h, cmb_stages stages) {
    const cmb_decoder *d = run->decoder;
    const cmb_decoder_options *o = &d->options;
    const cmb_sequence *s = &d->sequence[b];
    const step_plan *step = &run->step[b];
    const size_t size = d->stage->size, stored = d->stage->stored_size;
    const int64_t key_head = h / (o->Hq / o->Hk), n = run->positions->n;
    const int64_t region_head = d->made == CMB_SUMMARIES ? h : key_head;
    const cmb_array *query = &run->positions->query, *out = &run->positions->out;
    const bool has_lanes = run->lanes > 1 && stages != CMB_SUMMARIZE, biased = o->key_bias_heads > 0;
    const bool weighted = d->made == CMB_SUMMARIES && o->pattern.weighted;
    const int64_t bias_head = h * o->key_bias_heads / o->Hq;
    cmb_head head = {
        .plan = step->plan,
        .stages = stages,
        .L = step->plan->L,
        .D = o->D,
        .Dv = o->Dv,
        .R = step->plan->R,
        .scale = d->scale,
        .softcap = o->softcap,
        .all_live = true,
        .counted =
            d->made == CMB_SUMMARIES && !picks(d) && (o->pattern.size_bias || o->pattern.pooling != CMB_POOL_MAX),
        .pool_query = true,
        .pool_key = !weighted,
        .weighted = weighted,
        .biased = biased,
        .pool_bias = biased && !weighted,
        .weighted_bias = biased && weighted,
        .count = s->regions.count ? s->regions.count + region_head * s->regions.rows : NULL,
        .query =
            d->made == CMB_SUMMARIES && !has_lanes
                ? kept_queries(d, s, h)
                : rows_from(callers_rows(query, b, h, stored), has_lanes ? query->head : query->row, step->row, stored),
        .key = rows_of_head(s->positions.key, key_head, s->positions.rows, o->D, stored),
        .value = rows_of_head(s->positions.value, key_head, s->positions.rows, o->Dv, stored),
        .region_query = cmb_drops_region_queries(d)
                            ? new_region_queries(run, b, h)
                            : rows_of_head(s->regions.query, region_head, s->regions.rows, o->D, size),
        .region_key = rows_of_head(s->regions.key, region_head, s->regions.rows, o->D, size),
        .region_value = rows_of_head(s->regions.value, region_head, s->regions.rows, o->Dv, size),
        .key_bias = rows_of_head(biased ? s->positions.bias : NULL, bias_head, s->positions.rows, 1, size),
        .region_bias = rows_of_head(biased ? s->regions.bias : NULL, d->made == CMB_SUMMARIES ? h : bias_head,
                                    s->regions.rows, 1, size),
        .lane_value = has_lanes && d->made == CMB_SUMMARIES ? s->regions.rows * o->Dv : 0,
        .softmax = rows_from(run->softmax + (size_t)((b * o->Hq + h) * n * 2) * size, 2, step->row, size),
        .region_softmax = {.data = run->region_softmax + (size_t)((b * o->Hq + h) * run->regions * 2) * size, .row = 2},
        .out = rows_from(callers_rows(out, b, h, stored), has_lanes ? out->head : out->row, step->row, stored),
    };
    if (o->sink.data)
        head.sink = rows_from(callers_rows(&o->sink, b, h, size), has_lanes ? o->sink.head : 0, step->row, size);
    if (stored == size)
        head.result = head.out;
    else if (run->result)
        head.result = rows_from(run->result + (size_t)((b * o->Hq + h) * n * o->Dv) * size, o->Dv, step->row, size);
    return head;
}

static cmb_rows from_row(cmb_rows rows, int64_t row, size_t size) {
    rows.data = (char *)rows.data + row * rows.row * (int64_t)size;
    return rows;
}

/* ---- the phases --------------------------------------------------------------------------------- */

static void copy_rows(int64_t n, size_t bytes, const char *from, int64_t from_step, char *to) {
    for (int64_t i = 0; i < n; i++)
        memcpy(to + (size_t)i * bytes, from + i * from_step, bytes);
}

/* The softmax states of the new regions of query head h; or, where they are done, their results. */
static void begin_or_finish_regions(const running *run, int64_t b, int64_t h, bool begins) {
    const cmb_decoder *d = run->decoder;
    const cmb_sequence *s = &d->sequence[b];
    const size_t size = d->stage->size;
    const cmb_rows none = {0};
    for (int t = 1; t < d->levels; t++) {
        const int64_t n = cmb_nodes(d, t, s->length + run->step[b].n) - cmb_nodes(d, t, s->length);
        const int64_t row = first_new_row(run, b, t);
        if (n < 1)
            continue;
        const cmb_head head = make_head(run, b, h, CMB_SUMMARIZE);
        const cmb_rows states = from_row(head.region_softmax, row, size);
        if (begins)
            d->stage->begin(n, states);
        for (int64_t x = row; begins && picks(d) && x < row + n; x++)
            head.count[x] = (int32_t)d->options.pattern.size; /* a whole row of the grid */
        if (begins)
            continue;
        d->stage->finish(n, states, from_row(head.region_value, row, size), head.Dv,
                         head.weighted ? from_row(head.region_key, row, size) : none, head.D);
        if (head.weighted_bias)
            d->stage->finish(n, states, from_row(head.region_bias, row, size), 1, none, 0);
    }
}

/* Begins or finishes the new queries and regions of `head`: query head h, or the heads that are lanes with it. */
static void begin_or_finish(const running *run, int64_t b, int64_t h, const cmb_head *head, bool begins, int worker) {
    const cmb_decoder *d = run->decoder;
    const size_t size = d->stage->size;
    const int64_t queries = run->lanes > 1 ? run->lanes : run->step[b].n;
    const cmb_rows softmax = from_row(head->softmax, run->step[b].row, size);
    const cmb_rows none = {0};
    if (begins)
        d->stage->begin(queries, softmax);
    else if (head->result.data)
        d->stage->finish(queries, softmax, from_row(head->result, run->step[b].row, size), head->Dv, none, 0);
    if (!begins && run->result)
        d->stage->narrow(queries, head->Dv, from_row(head->result, run->step[b].row, size),
                         from_row(head->out, run->step[b].row, d->stage->stored_size), run->scratch[worker]);
    for (int64_t each = h; d->made == CMB_SUMMARIES && each < h + run->lanes; each++)
        begin_or_finish_regions(run, b, each, begins);
}

/* The new rows of a key head, and of its query heads, to the tables. */
static void append_rows(const running *run, int64_t b, int64_t key_head, int worker) {
    const cmb_decoder *d = run->decoder;
    const cmb_decoder_options *o = &d->options;
    const cmb_new_positions *p = run->positions;
    const int64_t group = o->Hq / o->Hk, biases = o->key_bias_heads / o->Hk;
    const step_plan *step = &run->step[b];
    const cmb_table *to = &d->sequence[b].positions;
    const size_t size = d->stage->size, stored = d->stage->stored_size, key = (size_t)o->D * stored,
                 value = (size_t)o->Dv * stored;
    copy_rows(step->n, key, callers_rows(&p->key, b, key_head, stored), p->key.row * (int64_t)stored,
              (char *)to->key + (size_t)(key_head * to->rows + step->row) * key);
    copy_rows(step->n, value, callers_rows(&p->value, b, key_head, stored), p->value.row * (int64_t)stored,
              (char *)to->value + (size_t)(key_head * to->rows + step->row) * value);
    for (int64_t h = key_head * biases; h < (key_head + 1) * biases; h++)
        copy_rows(step->n, size, callers_rows(&p->key_bias, b, h, size), p->key_bias.row * (int64_t)size,
                  (char *)to->bias + (size_t)(h * to->rows + step->row) * size);
    if (d->made == CMB_COPIES)
        cmb_copy_regions(d, &d->sequence[b], step->n, key_head, run->scratch[worker]);
    for (int64_t h = key_head * group; d->made == CMB_SUMMARIES && h < (key_head + 1) * group; h++)
        copy_rows(step->n, key, callers_rows(&p->query, b, h, stored), p->query.row * (int64_t)stored,
                  from_row(kept_queries(d, &d->sequence[b], h), step->row, stored).data);
}

static void run_stages(const running *run, const cmb_head *head, int32_t task, int worker) {
    const cmb_stage_table *stage = run->decoder->stage;
    if (head->stages & CMB_SUMMARIZE)
        stage->pool(head, task, run->scratch[worker]);
    for (int32_t tile = head->plan->task[task].tile; tile < head->plan->task[task + 1].tile; tile++)
        stage->tile(head, tile, -1, run->scratch[worker]);
}

/* The stages of query head h, or of those that are lanes with it: these have regions of their own. */
static cmb_head make_task_head(const running *run, int64_t b, int64_t h) {
    return make_head(run, b, h, summarizes_apart(run) ? CMB_ATTEND : CMB_BOTH);
}

/* A step that selects attends when all regions are there. */
static void run_task(const running *run, int64_t b, int64_t h, const cmb_head *head, int32_t task, int worker) {
    const int64_t apart = summarizes_apart(run) && run->step[b].plan->pools ? run->lanes : 0;
    for (int64_t each = h; each < h + apart; each++) {
        const cmb_head own = make_head(run, b, each, CMB_SUMMARIZE);
        run_stages(run, &own, task, worker);
    }
    if (!run->selector)
        run_stages(run, head, task, worker);
}

/* Whether the step of sequence b has so many tiles, and this one has queries that are positions. */
static bool attends(const running *run, int64_t b, int64_t tile) {
    const cmb_plan *plan = run->step[b].plan;
    return plan && tile < plan->tiles && cmb_list_at(plan, plan->tile[tile].query, 0) < plan->L;
}

/* A step that selects: the queries of one tile of a key head choose regions, and then `part` of its query heads, from
 * head h on, attend. */
static void select_in_tile(const running *run, int64_t b, int64_t h, int64_t tile, int worker) {
    const cmb_sequence *s = &run->decoder->sequence[b];
    cmb_selector *selector = &run->selector[worker];
    const int64_t group = run->selected.heads, first = h % group;
    if (!attends(run, b, tile))
        return;
    for (int64_t n = 0; n < group; n++) {
        selector->head[n] = make_head(run, b, h - first + n, CMB_ATTEND);
        selector->head[n].region_key = selector->head[0].region_key; /* k_R is the same for all */
    }
    cmb_choose_regions(run->decoder, s, (int32_t)tile, run->lanes, selector, run->scratch[worker]);
    cmb_attend_selected(run->decoder, s, first, first + run->part, (int32_t)tile, run->lanes, selector,
                        run->scratch[worker]);
}

/* Rows of `out` that have no position: a shorter sequence's. */
static void clear_rest(const running *run, int64_t b, int64_t h) {
    const cmb_array *out = &run->positions->out;
    const size_t stored = run->decoder->stage->stored_size;
    char *row = (char *)(uintptr_t)callers_rows(out, b, h, stored);
    for (int64_t i = run->step[b].n; i < run->positions->n; i++)
        memset(row + i * out->row * (int64_t)stored, 0, (size_t)run->decoder->options.Dv * stored);
}

/* A step of few positions that selects, when the regions of a key head are there. */
static void select_for_key_head(const running *run, int64_t b, int64_t key_head, int worker) {
    const int64_t group = run->selected.heads;
    for (int32_t tile = 0; tile < run->tiles; tile++)
        for (int64_t h = key_head * group; h < (key_head + 1) * group; h += run->part)
            select_in_tile(run, b, h, tile, worker);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h += run->lanes) {
        const cmb_head head = make_task_head(run, b, h);
        begin_or_finish(run, b, h, &head, false, worker);
    }
}

/* A step of few positions: all of a key head on one thread. */
static void run_key_head(void *context, int64_t index, int worker) {
    const running *run = context;
    const cmb_decoder_options *o = &run->decoder->options;
    const int64_t b = index / o->Hk, key_head = index % o->Hk, group = o->Hq / o->Hk;
    const cmb_plan *plan = run->step[b].plan;
    if (plan)
        append_rows(run, b, key_head, worker);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h += run->lanes) {
        if (plan) {
            const cmb_head head = make_task_head(run, b, h);
            begin_or_finish(run, b, h, &head, true, worker);
            for (int32_t task = 0; task < plan->tasks; task++)
                run_task(run, b, h, &head, task, worker);
            if (!run->selector)
                begin_or_finish(run, b, h, &head, false, worker);
        }
        for (int64_t each = h; each < h + run->lanes; each++)
            clear_rest(run, b, each);
    }
    if (run->selector && plan)
        select_for_key_head(run, b, key_head, worker);
}

/* The phases of a long step. */

static void append(void *context, int64_t index, int worker) {
    const running *run = context;
    const cmb_decoder_options *o = &run->decoder->options;
    const int64_t b = index / o->Hk, key_head = index % o->Hk, group = o->Hq / o->Hk;
    if (!run->step[b].plan)
        return;
    append_rows(run, b, key_head, worker);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h += run->lanes) {
        const cmb_head head = make_task_head(run, b, h);
        begin_or_finish(run, b, h, &head, true, worker);
    }
}

/* One task of one head, or of the heads that are lanes of a tile. The last tasks of a plan are the longest, and start
 * first. */
static void run_task_of_wave(void *context, int64_t index, int worker) {
    const running *run = context;
    const int64_t heads = run->decoder->options.Hq / run->lanes, items = run->decoder->options.B * heads;
    const int64_t item = index % items, b = item / heads, t = run->tasks - 1 - index / items;
    const cmb_plan *plan = run->step[b].plan;
    if (!plan || run->wave >= plan->waves || plan->wave[run->wave] + t >= plan->wave[run->wave + 1])
        return;
    const int64_t h = item % heads * run->lanes;
    const cmb_head head = make_task_head(run, b, h);
    run_task(run, b, h, &head, plan->wave[run->wave] + (int32_t)t, worker);
}

static void finish(void *context, int64_t index, int worker) {
    const running *run = context;
    const int64_t heads = run->decoder->options.Hq / run->lanes, b = index / heads, h = index % heads * run->lanes;
    if (run->step[b].plan) {
        const cmb_head head = make_task_head(run, b, h);
        begin_or_finish(run, b, h, &head, false, worker);
    }
    for (int64_t each = h; each < h + run->lanes; each++)
        clear_rest(run, b, each);
}

/* A long step that selects: one tile of a part of the heads of a key head. */
static void select_in_part(void *context, int64_t index, int worker) {
    const running *run = context;
    const int64_t parts = run->decoder->options.Hq / run->part, items = run->decoder->options.B * parts;
    const int64_t item = index % items;
    select_in_tile(run, item / parts, item % parts * run->part, run->tiles - 1 - index / items, worker);
}

static void run_heads(running *run) {
    const cmb_decoder_options *o = &run->decoder->options;
    if (run->workers == 1 || (run->positions->n < MANY_POSITIONS && o->B * o->Hk >= run->workers)) {
        cmb_parallel_for(o->B * o->Hk, run->workers, run_key_head, run, &run->cancel);
        return;
    }
    cmb_parallel_for(o->B * o->Hk, run->workers, append, run, &run->cancel);
    for (run->wave = 0; run->wave < run->waves && !cmb_cancelled(&run->cancel, 0); run->wave++) {
        run->tasks = 0;
        for (int64_t b = 0; b < o->B; b++) {
            const cmb_plan *plan = run->step[b].plan;
            const int32_t tasks =
                plan && run->wave < plan->waves ? plan->wave[run->wave + 1] - plan->wave[run->wave] : 0;
            run->tasks = tasks > run->tasks ? tasks : run->tasks;
        }
        cmb_parallel_for(o->B * o->Hq / run->lanes * run->tasks, run->workers, run_task_of_wave, run, &run->cancel);
    }
    if (run->selector)
        cmb_parallel_for(o->B * o->Hq / run->part * run->tiles, run->workers, select_in_part, run, &run->cancel);
    cmb_parallel_for(o->B * o->Hq / run->lanes, run->workers, finish, run, &run->cancel);
}

/* ---- the step ----------------------------------------------------------------------------------- */

/* Whether a step of the sequence has the plan of the step before it. */
static bool is_same_step(const cmb_sequence *a, const cmb_sequence *b) {
    return a->length == b->length && a->regions.rows == b->regions.rows &&
           memcmp(a->level, b->level, sizeof a->level) == 0;
}

static cmb_status make_steps(cmb_decoder *d, running *run, const cmb_interrupt *interrupt, cmb_error *error) {
    for (int64_t b = 0; b < d->options.B; b++) {
        cmb_sequence *s = &d->sequence[b];
        step_plan *step = &run->step[b];
        step->n = run->positions->lengths ? run->positions->lengths[b] : run->positions->n;
        if (step->n == 0)
            continue;
        TRY(cmb_make_room(d, s, step->n, error));
        step->row = s->length - s->level[0].first;
        if (b > 0 && step[-1].plan && step[-1].n == step->n && is_same_step(s, s - 1))
            step->plan = step[-1].plan;
        else {
            TRY(cmb_plan_step(d, s, step->n, run->lanes, interrupt, &step->plan, error));
            step->is_owner = true;
        }
    }
    return CMB_OK;
}

/* The workers, and the sizes of the workspace. */
static cmb_scratch_use measure_steps(running *run) {
    const cmb_decoder *d = run->decoder;
    const cmb_decoder_options *o = &d->options;
    cmb_scratch_use use = {
        .isa = cmb_isa_current(), .D = o->D, .Dv = o->Dv, .softcap = o->softcap > 0, .biased = o->key_bias_heads > 0};
    double work = 0;
    for (int64_t b = 0; b < o->B; b++) {
        const cmb_plan *plan = run->step[b].plan;
        if (!plan)
            continue;
        run->waves = plan->waves > run->waves ? plan->waves : run->waves;
        run->regions = plan->R > run->regions ? plan->R : run->regions;
        run->tiles = plan->tiles > run->tiles ? plan->tiles : run->tiles;
        use.N = plan->N > use.N ? plan->N : use.N;
        if (cmb_drops_region_queries(d)) {
            const cmb_sequence *s = &d->sequence[b];
            const int64_t made = cmb_nodes(d, 1, s->length + run->step[b].n) - cmb_nodes(d, 1, s->length);
            run->new_regions = made > run->new_regions ? made : run->new_regions;
        }
        if (o->select > 0) {
            cmb_measure_selection(plan, &run->selected);
            work += (double)cmb_opened_rows(d, d->sequence[b].length + run->step[b].n) *
                    (double)(run->step[b].n * run->lanes);
        }
        for (int32_t n = 0; n < plan->pools; n++)
            use.children = plan->pool[n].child.count > use.children ? plan->pool[n].child.count : use.children;
        for (const cmb_tile *tile = plan->tile; tile < plan->tile + plan->tiles; tile++)
            for (int32_t n = tile->run; n < tile[1].run; n++)
                work += (double)plan->run[n].row.count * (tile->query.count == 1 ? (tile->width + 1) / 2 : tile->width);
    }
    run->selected.heads = o->Hq / o->Hk;
    run->selected.queries = cmb_min(run->positions->n, CMB_TILE);
    run->selected.k = cmb_min(o->select, run->selected.regions);
    work *= (double)(o->Hq / run->lanes) * (double)(o->D + o->Dv);
    run->workers = work < worth_a_thread ? 1 : cmb_get_num_threads();
    return use;
}

/* Blocks of this size and more are kept by the allocator for the next call: their pages are there. */
static const size_t least_workspace = 256 << 10;

static void take_workspace(running *run, const cmb_scratch_use *use, cmb_arena *arena) {
    const cmb_decoder_options *o = &run->decoder->options;
    const size_t size = run->decoder->stage->size, heads = (size_t)(o->B * o->Hq);
    const bool is_taken = arena->base;
    run->scratch = cmb_take(arena, (size_t)run->workers, sizeof *run->scratch);
    run->softmax = cmb_take(arena, heads * (size_t)run->positions->n * 2, size);
    run->region_softmax = cmb_take(arena, heads * (size_t)run->regions * 2, size);
    run->region_query = cmb_take(arena, heads * (size_t)run->new_regions, (size_t)o->D * size);
    if ((run->selected.k > 0 || o->pattern.kind == CMB_AXIAL) && size > run->decoder->stage->stored_size)
        run->result = cmb_take(arena, heads * (size_t)run->positions->n, (size_t)o->Dv * size);
    if (run->selected.k > 0) {
        run->selector = cmb_take(arena, (size_t)run->workers, sizeof *run->selector);
        for (int n = 0; n < run->workers; n++)
            cmb_take_selector(arena, &run->selected, is_taken ? &run->selector[n] : NULL);
    }
    for (int n = 0; n < run->workers; n++) {
        cmb_scratch *scratch = run->decoder->stage->scratch(arena, use, &run->cancel, n);
        if (is_taken)
            run->scratch[n] = scratch;
    }
    if (arena->used < least_workspace)
        arena->used = least_workspace;
}

/* Sets `part`: all query heads of a key head, or fewer where workers would idle. */
static void divide_heads(running *run) {
    const cmb_decoder_options *o = &run->decoder->options;
    const int64_t n = run->positions->n, tiles = n < MANY_POSITIONS ? 1 : n / CMB_TILE;
    run->part = o->Hq / o->Hk;
    while (run->part > run->lanes && o->B * o->Hq / run->part * tiles < run->workers)
        run->part = run->part % 2 ? run->lanes : run->part / 2;
}

static void free_plans(running *run) {
    for (int64_t b = 0; b < run->decoder->options.B; b++) {
        if (run->step[b].is_owner)
            cmb_plan_free(run->step[b].plan);
        run->step[b] = (step_plan){0};
    }
}

static cmb_status run_step(cmb_decoder *d, running *run, const cmb_interrupt *interrupt, cmb_error *error) {
    cmb_arena arena = {0};
    TRY(make_steps(d, run, interrupt, error));
    cmb_scratch_use use = measure_steps(run);
    const int64_t heads = d->options.B * d->options.Hq;
    if (run->lanes > 1 && heads / run->lanes < run->workers) { /* threads would be idle */
        while (run->lanes > 1 && heads / run->lanes < run->workers)
            run->lanes = run->lanes % 2 ? 1 : run->lanes / 2;
        free_plans(run);
        TRY(make_steps(d, run, interrupt, error));
        use = measure_steps(run);
    }
    divide_heads(run);
    take_workspace(run, &use, &arena);
    TRY(cmb_arena_allocate(&arena, error));
    take_workspace(run, &use, &arena);
    cmb_cancel_init(&run->cancel, interrupt);
    run_heads(run);
    cmb_release(arena.base);
    TRY(cmb_cancel_status(&run->cancel, error));
    for (int64_t b = 0; b < d->options.B; b++) {
        cmb_sequence *s = &d->sequence[b];
        s->length += run->step[b].n;
        s->longest = s->length > s->longest ? s->length : s->longest;
        if (run->step[b].n)
            cmb_give_back_room(d, s);
    }
    return CMB_OK;
}

enum { FEWEST_WITH_REGIONS = 3 }; /* two heads with h_R of their own are as fast one after the other */

/* The query heads that are lanes of one tile, in a step of one position: those of a key head. 1 where a tile has not so
 * many lanes, where the heads' biases or weighted keys differ, and where a tile would copy the rows of h_R, which
 * differ too. */
static int count_lanes(const cmb_decoder *d) {
    const cmb_decoder_options *o = &d->options;
    const int64_t group = o->Hq / o->Hk;
    const bool copies_rows = group > CMB_GROUP || d->stage->stored_size < d->stage->size;
    const bool is_worth = d->made != CMB_SUMMARIES || (group >= FEWEST_WITH_REGIONS && !copies_rows);
    const bool have_one_key = o->key_bias_heads <= o->Hk && !o->pattern.weighted;
    return is_worth && have_one_key && group <= CMB_TILE ? (int)group : 1;
}

cmb_status cmb_decoder_step(cmb_decoder *d, const cmb_new_positions *positions, const cmb_interrupt *interrupt,
                            cmb_error *error) {
    const cmb_decoder_options *o = &d->options;
    TRY(cmb_check_new_positions(d, positions, error));
    if (positions->n == 0 || o->B == 0)
        return CMB_OK;
    running run = {.decoder = d, .positions = positions, .lanes = 1};
    const int64_t group = o->Hk ? o->Hq / o->Hk : 0;
    if (group == 0) { /* nothing is attended, and nothing is kept */
        for (int64_t b = 0; b < o->B; b++) {
            cmb_sequence *s = &d->sequence[b];
            s->length += positions->lengths ? positions->lengths[b] : positions->n;
            s->longest = s->length > s->longest ? s->length : s->longest;
        }
        return CMB_OK;
    }
    if (positions->n == 1)
        run.lanes = count_lanes(d);
    run.step = cmb_allocate((size_t)o->B * sizeof *run.step);
    if (!run.step)
        return cmb_fail(error, CMB_ERR_MEMORY, "no memory for a step of %lld sequences", (long long)o->B);
    memset(run.step, 0, (size_t)o->B * sizeof *run.step);
    const cmb_status status = run_step(d, &run, interrupt, error);
    free_plans(&run);
    cmb_release(run.step);
    return status;
}

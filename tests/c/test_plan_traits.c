// SPDX-License-Identifier: Apache-2.0
/* The traits of plans, each found a second time by going through the rows that the lists name. */
#include "factorizations.h"

/* ---- what is found where plans are made ---- */

static void with_many_plans(void (*check)(const factorization *f, const cmb_plan *plan)) {
    for (kind k = DENSE; k < KINDS; k++)
        for (int64_t L = 1; L < 5000; L = 3 * L + 1)
            for (int bits = 0; bits < 4; bits++)
                for (int64_t span = 5; span < 1000; span *= 5) {
                    const factorization f = {k, L, span, bits & 1, bits & 2};
                    cmb_plan *plan = make(&f);
                    check(&f, plan);
                    cmb_plan_free(plan);
                }
}

/* ---- waves that can be fused ---- */

/* What a task does to a table row: the region's or result's writers of earlier waves come first. */
static bool follows_writers(const cmb_plan *plan, const vector *writers, int64_t row, int64_t wave, const bool *done) {
    if (row >= plan->L + plan->R)
        return true;
    for (int64_t n = 0; n < writers[row].count; n++)
        if (writers[row].item[n] < plan->wave[wave] && !done[writers[row].item[n]])
            return false;
    return true;
}

static bool list_follows(const cmb_plan *plan, const vector *writers, cmb_list list, bool regions, int64_t wave,
                         const bool *done) {
    for (int64_t n = 0; n < list.count; n++) {
        const int64_t row = row_at(plan, list, n);
        if ((!regions || row >= plan->L) && !follows_writers(plan, writers, row, wave, done))
            return false;
    }
    return true;
}

static int64_t count_rows_of(const cmb_plan *plan, int64_t tile) {
    int64_t rows = 0;
    for (int64_t run = plan->tile[tile].run; run < plan->tile[tile + 1].run; run++)
        rows += plan->run[run].row.count;
    return rows;
}

/* Of a single wave's tasks the last ones go first if they are the longest. */
static bool ends_with_longest(const cmb_plan *plan) {
    return plan->waves == 1 && plan->tiles > 0 &&
           (double)count_rows_of(plan, plan->tiles - 1) > 1.5 * (double)count_rows_of(plan, plan->tiles / 2);
}

/* Runs the tasks through: the t-th of every wave, then the next ones. */
static bool can_be_fused(const cmb_plan *plan) {
    vector *writers = make_lists(plan->L + plan->R + 1);
    bool *done = calloc((size_t)plan->tasks + 1, sizeof *done), fits = true;
    for (int64_t task = 0; task < plan->tasks; task++) {
        for (int64_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++)
            if (plan->pool[n].row < plan->L + plan->R)
                push(&writers[plan->pool[n].row], task);
        for (int64_t n = plan->task[task].tile; n < plan->task[task + 1].tile; n++)
            for (int64_t q = 0; q < plan->tile[n].query.count; q++)
                push(&writers[row_at(plan, plan->tile[n].query, q)], task);
    }
    for (int64_t t = 0; t < plan->tasks; t++)
        for (int64_t wave = 0; wave < plan->waves; wave++) {
            const int64_t task = plan->wave[wave] + t;
            if (task >= plan->wave[wave + 1])
                continue;
            for (int64_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++)
                fits = fits && list_follows(plan, writers, plan->pool[n].child, true, wave, done);
            for (int64_t n = plan->task[task].tile; n < plan->task[task + 1].tile; n++) {
                fits = fits && list_follows(plan, writers, plan->tile[n].query, false, wave, done);
                for (int64_t run = plan->tile[n].run; run < plan->tile[n + 1].run; run++)
                    fits = fits && list_follows(plan, writers, plan->run[run].row, true, wave, done);
            }
            done[task] = true;
        }
    free_lists(writers, plan->L + plan->R + 1);
    free(done);
    return fits && plan->waves > 0 && !ends_with_longest(plan);
}

static void check_fusible(const factorization *f, const cmb_plan *plan) {
    CHECK(plan->traits.is_fusible == can_be_fused(plan), "kind %d L %lld span %lld: %d", (int)f->kind, (long long)f->L,
          (long long)f->span, plan->traits.is_fusible);
    const bool has_spans = f->kind == FIXED || f->kind == FIXED_WINDOW || f->kind == HEAVY;
    const bool has_levels = f->kind == LOGSPARSE || f->kind == HIERARCHICAL || f->kind == TREE || f->kind == TREE2;
    if ((has_spans || has_levels) && f->is_causal && !f->is_sparse && plan->waves > 1)
        CHECK(plan->traits.is_fusible);
}

static void test_fusible(void) { with_many_plans(check_fusible); }

/* ---- positions that are queries of several tiles ---- */

static void check_multi_tile_queries(const factorization *f, const cmb_plan *plan) {
    int64_t most = 0, *tiles = calloc((size_t)(plan->L + plan->R) + 1, sizeof *tiles);
    for (int64_t tile = 0; tile < plan->tiles; tile++)
        for (int64_t q = 0; q < plan->tile[tile].query.count; q++) {
            const int64_t row = row_at(plan, plan->tile[tile].query, q);
            most = ++tiles[row] > most && row < plan->L ? tiles[row] : most;
        }
    free(tiles);
    CHECK(plan->traits.has_multi_tile_queries == (most > 1), "kind %d L %lld span %lld: %lld tiles", (int)f->kind,
          (long long)f->L, (long long)f->span, (long long)most);
    if (f->kind == FIXED || f->kind == LOGSPARSE)
        CHECK(!plan->traits.has_multi_tile_queries);
}

static void test_multi_tile_queries(void) { with_many_plans(check_multi_tile_queries); }

/* ---- heads' tiles ---- */

/* A row tile of one position, and rows that are positions, all of them attended. */
static bool is_heads_tile(const cmb_plan *plan, const cmb_tile *tile) {
    bool is_one = tile->width == 1 && row_at(plan, tile->query, 0) < plan->L;
    for (int64_t run = tile[0].run; is_one && run < tile[1].run; run++) {
        is_one = plan->run[run].mask < 0 && plan->run[run].row.step;
        for (int64_t n = 0; is_one && n < plan->run[run].row.count; n++)
            is_one = row_at(plan, plan->run[run].row, n) < plan->L;
    }
    return is_one;
}

static void check_heads_tiles(const factorization *f, const cmb_plan *plan) {
    bool *is_met = calloc((size_t)plan->L + 1, sizeof *is_met), is_followed = false, has_some = false;
    for (int64_t tile = 0; tile < plan->tiles; tile++) {
        const bool is_of_heads = is_heads_tile(plan, plan->tile + tile);
        has_some = has_some || is_of_heads;
        for (int64_t q = 0; q < plan->tile[tile].query.count; q++) {
            const int64_t row = row_at(plan, plan->tile[tile].query, q);
            if (row >= plan->L)
                continue;
            is_followed = is_followed || (is_met[row] && !is_of_heads);
            is_met[row] = is_met[row] || is_of_heads;
        }
    }
    free(is_met);
    CHECK(plan->traits.has_heads_tiles == (has_some && !is_followed), "kind %d L %lld span %lld: %d", (int)f->kind,
          (long long)f->L, (long long)f->span, plan->traits.has_heads_tiles);
}

/* Every query opens the first region, if it attends that. */
static void check_heads_tiles_of_selected(const factorization *f, const cmb_plan *plan) {
    cmb_plan *selected = NULL;
    cmb_error error;
    if (plan->pools == 0)
        return;
    int64_t *region = calloc((size_t)plan->L, sizeof *region);
    CHECK(region);
    CHECK(cmb_plan_selected(plan, &(cmb_selection){1, 1, region, true, true}, NULL, &selected, &error) == CMB_OK, "%s",
          error.message);
    check_heads_tiles(f, selected);
    if (f->kind == FIXED && f->is_causal && plan->L > f->span) /* the queries behind the first span */
        CHECK(selected->traits.has_heads_tiles);
    cmb_plan_free(selected);
    free(region);
}

static void test_heads_tiles(void) {
    with_many_plans(check_heads_tiles);
    with_many_plans(check_heads_tiles_of_selected);
    /* Position 2 in a heads' tile, and then in another tile or not. */
    for (int is_followed = 0; is_followed < 2; is_followed++) {
        const cmb_tile tile[] = {{{2, 1, 1}, 0, 1}, {{is_followed ? 1 : 0, 1, 2}, 1, 16}, {.run = 2}};
        const cmb_run run[] = {{{0, 1, 2}, -1}, {{0, 1, 1}, -1}};
        const cmb_plan arrays = {.L = 3,
                                 .waves = 1,
                                 .tasks = 1,
                                 .tiles = 2,
                                 .runs = 2,
                                 .wave = (const int32_t[]){0, 1},
                                 .task = (const cmb_task[]){{0, 0}, {0, 2}},
                                 .tile = tile,
                                 .run = run};
        cmb_plan *plan = NULL;
        cmb_error error;
        CHECK(cmb_plan_from_arrays(&arrays, NULL, &plan, &error) == CMB_OK, "%s", error.message);
        CHECK(plan->traits.has_heads_tiles == !is_followed && plan->traits.has_multi_tile_queries == is_followed);
        cmb_plan_free(plan);
    }
}

/* ---- q_R that only one task needs ---- */

typedef struct {
    int64_t first, last;
} range;

static void touch(const cmb_plan *plan, range *tasks, int64_t row, int64_t task) {
    if (row < plan->L || row >= plan->L + plan->R)
        return;
    range *own = &tasks[row - plan->L];
    own->first = own->first < task ? own->first : task;
    own->last = own->last > task ? own->last : task;
}

/* By the tasks that pool a region, pool it further, or ask with it, and with `of_keys` those that attend it: at most so
 * many of a task's are its alone, and so many are not. */
static void count_rows(const cmb_plan *plan, bool of_keys, int64_t *own, int64_t *shared) {
    range *tasks = calloc((size_t)plan->R + 1, sizeof *tasks);
    int64_t *alone = calloc((size_t)plan->tasks + 1, sizeof *alone);
    for (int64_t r = 0; r < plan->R; r++)
        tasks[r] = (range){plan->tasks, -1};
    for (int64_t task = 0; task < plan->tasks; task++) {
        for (int64_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++) {
            const cmb_pool *pool = &plan->pool[n];
            touch(plan, tasks, pool->row, task);
            for (int64_t i = 0; i < pool->child.count; i++)
                touch(plan, tasks, row_at(plan, pool->child, i), task);
        }
        for (int64_t n = plan->task[task].tile; n < plan->task[task + 1].tile; n++) {
            for (int64_t q = 0; q < plan->tile[n].query.count; q++)
                touch(plan, tasks, row_at(plan, plan->tile[n].query, q), task);
            for (int64_t run = plan->tile[n].run; of_keys && run < plan->tile[n + 1].run; run++)
                for (int64_t i = 0; i < plan->run[run].row.count; i++)
                    touch(plan, tasks, row_at(plan, plan->run[run].row, i), task);
        }
    }
    *own = *shared = 0;
    for (int64_t r = 0; r < plan->R; r++)
        if (tasks[r].first < tasks[r].last)
            (*shared)++;
        else if (tasks[r].last >= 0 && ++alone[tasks[r].last] > *own)
            *own = alone[tasks[r].last];
    free(tasks);
    free(alone);
}

static void check_own_rows(const factorization *f, const cmb_plan *plan) {
    int64_t own, shared;
    count_rows(plan, true, &own, &shared);
    if (own == 0 || shared > plan->R - plan->R / 4)
        own = shared = 0;
    CHECK(plan->traits.own_keys == own && plan->traits.shared_keys == shared,
          "keys of kind %d L %lld span %lld: %d and %d, not %lld and %lld", (int)f->kind, (long long)f->L,
          (long long)f->span, plan->traits.own_keys, plan->traits.shared_keys, (long long)own, (long long)shared);
    CHECK((own > 0) == (plan->traits.key_row != NULL));
    count_rows(plan, false, &own, &shared);
    CHECK(plan->traits.own_queries == own && plan->traits.shared_queries == shared,
          "kind %d L %lld span %lld: %d and %d, not %lld and %lld", (int)f->kind, (long long)f->L, (long long)f->span,
          plan->traits.own_queries, plan->traits.shared_queries, (long long)own, (long long)shared);
    if (f->kind == FIXED || f->kind == VERTICAL || f->kind == MIXTURE)
        CHECK(shared == 0 && (own > 0) == (plan->pools > 0));
}

static void test_own_rows(void) { with_many_plans(check_own_rows); }

/* ---- picks where nothing is masked ---- */

static void check_picks(const factorization *f, const cmb_plan *plan) {
    CHECK((plan->traits.pick != NULL) == (plan->pooling == CMB_POOL_FIRST && plan->R > 0), "kind %d", (int)f->kind);
    for (int32_t r = 0; f->kind == ROWMAJOR && r < plan->R; r++)
        CHECK(plan->traits.pick[r] == r, "L %lld: region %d picks %d", (long long)f->L, r, plan->traits.pick[r]);
}

static void test_picks(void) { with_many_plans(check_picks); }

/* ---- regions that continue from the softmax of the tile before ---- */

/* The rows of a tile's runs, in order. The number of those before the last run goes to *whole. */
static vector list_rows(const cmb_plan *plan, int64_t tile, int64_t *whole) {
    vector rows = {0};
    for (int32_t n = plan->tile[tile].run; n < plan->tile[tile + 1].run; n++) {
        *whole = rows.count;
        for (int64_t k = 0; k < plan->run[n].row.count; k++)
            push(&rows, row_at(plan, plan->run[n].row, k));
    }
    return rows;
}

static bool is_seen_by_all(const cmb_plan *plan, int64_t tile, int64_t runs) {
    for (int32_t n = plan->tile[tile].run; n < plan->tile[tile].run + runs; n++)
        if (plan->run[n].mask >= 0)
            return false;
    return true;
}

/* What the trait promises: the regions ask with the queries of the tile before, which has attended these rows. */
static int64_t reusable_rows(const cmb_plan *plan, int64_t tile) {
    const cmb_tile *at = plan->tile + tile, *before = at - 1;
    int64_t whole = 0;
    if (tile == 0 || at->width == 1 || before->width == 1 || at->query.count > before->query.count ||
        at[1].run - at->run != 1 || !is_seen_by_all(plan, tile, 1) ||
        !is_seen_by_all(plan, tile - 1, at->run - before->run - 1))
        return 0;
    for (int64_t t = 0; t < at->query.count; t++) {
        const int64_t region = row_at(plan, at->query, t);
        if (region < plan->L || plan->traits.pick[region - plan->L] != row_at(plan, before->query, t))
            return 0;
    }
    vector rows = list_rows(plan, tile, &whole), attended = list_rows(plan, tile - 1, &whole);
    int64_t count = attended.count <= rows.count ? attended.count : 0;
    if (count && memcmp(attended.item, rows.item, (size_t)count * sizeof *rows.item) != 0)
        count = 0;
    free(rows.item);
    free(attended.item);
    return count;
}

static void check_reused_rows(const factorization *f, const cmb_plan *plan) {
    const int32_t *reused = plan->traits.reused_rows;
    CHECK((reused != NULL) == (f->kind == ROWMAJOR && plan->R > 0), "kind %d", (int)f->kind);
    for (int64_t tile = 0; reused && tile < plan->tiles; tile++) {
        CHECK(reused[tile] == reusable_rows(plan, tile), "L %lld span %lld tile %lld: %d rows", (long long)f->L,
              (long long)f->span, (long long)tile, reused[tile]);
        const bool are_regions = row_at(plan, plan->tile[tile].query, 0) >= plan->L;
        CHECK(are_regions == (reused[tile] > 0));
    }
}

static void test_reused_rows(void) { with_many_plans(check_reused_rows); }

/* Region 4 is the mean of values 2 and 3, then of 0 and 1 as well. Its second tile asks with the query of the tile
 * before, for the same rows, but must continue from its own first tile. */
static void test_a_region_of_two_tiles_keeps_the_first(void) {
    const int32_t wave[] = {0, 1};
    const cmb_task task[] = {{0, 0}, {1, 3}};
    const cmb_pool pool[] = {{4, {0, 1, 2}}};
    const cmb_tile tile[] = {{{4, 1, 1}, 0, 16}, {{0, 1, 1}, 1, 16}, {{4, 1, 1}, 2, 16}, {{0, 1, 0}, 3, 0}};
    const cmb_run run[] = {{{2, 1, 2}, -1}, {{0, 1, 2}, -1}, {{0, 1, 2}, -1}};
    const cmb_plan arrays = {.L = 4,
                             .R = 1,
                             .pooling = CMB_POOL_FIRST,
                             .waves = 1,
                             .tasks = 1,
                             .pools = 1,
                             .tiles = 3,
                             .runs = 3,
                             .wave = wave,
                             .task = task,
                             .pool = pool,
                             .tile = tile,
                             .run = run};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    CHECK(cmb_plan_from_arrays(&arrays, NULL, &plan, &error) == CMB_OK, "%s", error.message);
    CHECK(plan->traits.pick[0] == 0 && plan->traits.reused_rows[2] == 0);
    double zero[4] = {0}, value[4] = {1, 2, 4, 8}, summary_key[1], summary_value[1];
    const cmb_problem problem = {.dtype = CMB_FLOAT64,
                                 .stages = CMB_SUMMARIZE,
                                 .B = 1,
                                 .Hq = 1,
                                 .Hk = 1,
                                 .L = 4,
                                 .D = 1,
                                 .Dv = 1,
                                 .plan = (const cmb_plan *const[]){plan},
                                 .plans = 1,
                                 .query = {zero, 1, 4, 4, 1},
                                 .key = {zero, 1, 4, 4, 1},
                                 .value = {value, 1, 4, 4, 1},
                                 .summary_key = {summary_key, 1, 1, 1, 1},
                                 .summary_value = {summary_value, 1, 1, 1, 1}};
    CHECK(cmb_forward(&problem, NULL, &error) == CMB_OK, "%s", error.message);
    CHECK(summary_value[0] == 3.75, "%g", summary_value[0]);
    cmb_plan_free(plan);
}

/* Dense lists L rows for each 64 queries, Fixed as many regions as lie before them: their plans take the time of their
 * lists, not of what these hold, which would be hours here. */
static void test_long_lists_are_judged_by_their_ends(void) {
    for (int is_causal = 0; is_causal < 2; is_causal++)
        for (int which = 0; which < 2; which++) {
            const cmb_plan_options options = {.is_causal = is_causal};
            const int64_t L = INT64_C(1) << 24;
            cmb_plan *plan = NULL, *copy = NULL;
            test_heap heap = {0};
            test_heap_use(&heap);
            end_after(300);
            CHECK((which ? cmb_plan_fixed(L, 512, 1, &options, &plan, NULL)
                         : cmb_plan_dense(L, &options, &plan, NULL)) == CMB_OK);
            CHECK(plan->traits.is_fusible == (which == is_causal) && !plan->traits.has_multi_tile_queries &&
                  !plan->traits.only_attends);
            CHECK((size_t)heap.peak < 4 * cmb_plan_bytes(plan), "%lld bytes for %zu", (long long)heap.peak,
                  cmb_plan_bytes(plan));
            if (!which)
                CHECK(cmb_plan_from_arrays(plan, NULL, &copy, NULL) == CMB_OK);
            end_after(0);
            cmb_plan_free(plan);
            cmb_plan_free(copy);
            test_heap_use(NULL);
        }
}

/* ---- how workers share a head ---- */

/* Of the tiles of positions, or of regions, in a task: the rows that they attend, how many of these are regions, and
 * the lowest and highest position that they touch. */
typedef struct {
    int64_t rows, regions, low, high;
} met;

static void meet_list(const cmb_plan *plan, cmb_list list, bool is_attended, met *it) {
    for (int64_t n = 0; n < list.count; n++) {
        const int64_t row = row_at(plan, list, n);
        it->rows += is_attended;
        it->regions += is_attended && row >= plan->L;
        it->low = row < plan->L && row < it->low ? row : it->low;
        it->high = row < plan->L && row > it->high ? row : it->high;
    }
}

static bool is_of_positions(const cmb_plan *plan, int64_t tile) {
    return row_at(plan, plan->tile[tile].query, 0) < plan->L;
}

static met meet(const cmb_plan *plan, int64_t task, bool of_positions) {
    met it = {.low = plan->L, .high = -1};
    for (int64_t tile = plan->task[task].tile; tile < plan->task[task + 1].tile; tile++) {
        if (is_of_positions(plan, tile) != of_positions)
            continue;
        meet_list(plan, plan->tile[tile].query, false, &it);
        for (int64_t run = plan->tile[tile].run; run < plan->tile[tile + 1].run; run++)
            meet_list(plan, plan->run[run].row, true, &it);
    }
    return it;
}

/* Tickets: of a tile two for each query and one for each row, of a pool step two for the region and for each child. */
static int64_t tickets_of(const cmb_plan *plan, int64_t tile) {
    return 2 * plan->tile[tile].query.count + count_rows_of(plan, tile);
}

static int64_t tickets_of_pools(const cmb_plan *plan, int64_t task) {
    int64_t tickets = 0;
    for (int64_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++)
        tickets += 2 + 2 * plan->pool[n].child.count;
    return tickets;
}

/* Backward takes the last task of every wave, from the last wave on; then the tasks before them. */
static void check_tickets(const cmb_plan *plan) {
    const cmb_plan_sharing *got = &plan->traits.sharing;
    int64_t of_tile = 0, of_task = 0, sum = 0;
    for (int64_t t = plan->tasks - 1; t >= 0; t--)
        for (int64_t wave = plan->waves - 1; wave >= 0; wave--) {
            const int64_t task = plan->wave[wave] + t,
                          end = task < plan->wave[wave + 1] ? plan->task[task + 1].tile : 0;
            if (task >= plan->wave[wave + 1])
                continue;
            const bool begins = !plan->traits.is_fusible || meet(plan, task, true).high >= 0;
            sum = (begins ? 0 : sum) + tickets_of_pools(plan, task);
            of_tile = tickets_of_pools(plan, task) > of_tile ? tickets_of_pools(plan, task) : of_tile;
            for (int64_t tile = plan->task[task].tile; tile < end; tile++) {
                sum += tickets_of(plan, tile);
                of_tile = tickets_of(plan, tile) > of_tile ? tickets_of(plan, tile) : of_tile;
            }
            of_task = sum > of_task ? sum : of_task;
        }
    CHECK(got->tickets_of_tile == of_tile && (!got->by_task || got->tickets_of_task == of_task));
}

static void check_sharing(const factorization *f, const cmb_plan *plan) {
    const cmb_plan_sharing *got = &plan->traits.sharing;
    bool by_task = true, are_apart = false;
    int64_t rows = 0, regions = 0, attended = -1, summarized = -1;
    for (int64_t task = 0; task < plan->tasks; task++) {
        const met positions = meet(plan, task, true), members = meet(plan, task, false);
        by_task = by_task && positions.low > attended;
        for (int64_t tile = plan->task[task].tile; tile < plan->task[task + 1].tile - 1; tile++)
            by_task = by_task && (!is_of_positions(plan, tile) || is_of_positions(plan, tile + 1));
        are_apart = are_apart || members.low <= summarized;
        attended = positions.high > attended ? positions.high : attended;
        summarized = members.high > summarized ? members.high : summarized;
        if (positions.high >= 0)
            rows = positions.rows + members.rows > rows ? positions.rows + members.rows : rows;
        regions = positions.regions > regions ? positions.regions : regions;
    }
    CHECK(got->by_task == by_task, "kind %d L %lld span %lld", (int)f->kind, (long long)f->L, (long long)f->span);
    if (by_task)
        CHECK(got->are_positions_apart == are_apart && got->rows_apart == (are_apart ? rows : regions),
              "kind %d L %lld span %lld: %lld rows", (int)f->kind, (long long)f->L, (long long)f->span,
              (long long)got->rows_apart);
    check_tickets(plan);
    const bool has_spans = (f->kind == FIXED || f->kind == TREE) && f->span <= 125 && f->span < f->L;
    if ((has_spans || f->kind == LOGSPARSE || f->kind == HIERARCHICAL) && !f->is_sparse)
        CHECK(got->by_task, "kind %d L %lld", (int)f->kind, (long long)f->L);
    if (f->kind == DENSE && f->L > 1000)
        CHECK(!got->by_task, "L %lld", (long long)f->L);
}

static void test_sharing(void) { with_many_plans(check_sharing); }

int main(int argc, char **argv) {
    const test_case tests[] = {
        TEST(test_fusible),
        TEST(test_multi_tile_queries),
        TEST(test_heads_tiles),
        TEST(test_own_rows),
        TEST(test_picks),
        TEST(test_reused_rows),
        TEST(test_sharing),
        TEST(test_a_region_of_two_tiles_keeps_the_first),
        TEST(test_long_lists_are_judged_by_their_ends),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

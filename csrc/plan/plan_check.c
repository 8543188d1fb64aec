// SPDX-License-Identifier: Apache-2.0
/* The check of a plan: everything that the engine relies on. First its lists, so that memory is taken only for rows
 * that some list names; then its pool steps, queries and runs, in the order in which the engine meets them. */
#include "plan/plan.h"

#include <string.h>

/* What is known of a row while the plan is read in order. */
typedef struct {
    int32_t pooled;  /* the last task that pooled the row, or -1 */
    int32_t queried; /* the last task that had the row as a query, or -1 */
    int32_t tile;    /* the last tile that had the row as a query, or -1 */
    int32_t last;    /* the highest position below the row */
    int32_t count;   /* positions below the row, repeats counted */
    bool is_read;    /* some tile attends the row */
} row_state;

typedef struct {
    const cmb_plan *plan;
    row_state *row;      /* [one more than the highest row that a list names] */
    int32_t wave_task;   /* first task of the wave */
    int32_t task;        /* the task at hand */
    int32_t first_query; /* lowest query row of the tile at hand */
    cmb_cancel *cancel;
    cmb_error *error;
} checker;

/* What `task` wrote, the task at hand may read: it wrote it itself, or an earlier wave did. */
static bool is_settled(const checker *check, int32_t task) {
    return task >= 0 && (task < check->wave_task || task == check->task);
}

/* What is wrong with a list of rows [0, limit), or NULL; *end becomes at least one more than its highest row. */
static const char *list_fault(const cmb_plan *plan, cmb_list list, int64_t limit, int64_t *end, cmb_cancel *cancel) {
    if (list.count < 1)
        return "are empty";
    if (list.step == 0 && (list.start < 0 || (int64_t)list.start + list.count > plan->indices))
        return "lie outside the index array";
    cmb_row_range range = {INT64_MAX, -1};
    if (list.step)
        range = cmb_list_range(list);
    if (list.step == 0)
        cmb_tick(cancel, list.count); /* the caller looks at its answer */
    for (int32_t n = 0; list.step == 0 && n < list.count; n++) {
        const int32_t x = plan->index[list.start + n];
        range.low = x < range.low ? x : range.low;
        range.high = x > range.high ? x : range.high;
    }
    if (range.low < 0 || range.high >= limit)
        return "lie outside the table";
    *end = range.high >= *end ? range.high + 1 : *end;
    return NULL;
}

/* Whether all lists lie in the table; *end becomes one more than the highest row that a list names. */
static cmb_status check_lists(const cmb_plan *plan, int64_t *end, cmb_cancel *cancel, cmb_error *error) {
    const int64_t regions_end = plan->L + plan->R, rows = regions_end + plan->N;
    *end = 0;
    for (int32_t pool = 0; pool < plan->pools && !cmb_tick(cancel, 4); pool++) {
        const int32_t row = plan->pool[pool].row;
        if (row < plan->L || row >= rows)
            return cmb_fail(error, CMB_ERR_VALUE, "pool %d writes row %d, which is no region or scratch row", pool,
                            row);
        *end = row >= *end ? row + INT64_C(1) : *end;
        const char *fault = list_fault(plan, plan->pool[pool].child, rows, end, cancel);
        if (fault)
            return cmb_fail(error, CMB_ERR_VALUE, "pool %d: its children %s", pool, fault);
    }
    for (int32_t tile = 0; tile < plan->tiles && !cmb_tick(cancel, 4); tile++) {
        const char *fault = list_fault(plan, plan->tile[tile].query, regions_end, end, cancel);
        if (fault)
            return cmb_fail(error, CMB_ERR_VALUE, "tile %d: its queries %s", tile, fault);
        for (int32_t run = plan->tile[tile].run; run < plan->tile[tile + 1].run; run++)
            if ((fault = list_fault(plan, plan->run[run].row, regions_end, end, cancel)))
                return cmb_fail(error, CMB_ERR_VALUE, "tile %d: its rows %s", tile, fault);
    }
    return cmb_cancel_status(cancel, error);
}

static cmb_status check_pool(checker *check, int32_t number) {
    const cmb_plan *plan = check->plan;
    const cmb_pool *pool = plan->pool + number;
    int64_t regions_end = plan->L + plan->R;
    row_state *row = check->row + pool->row;
    if (pool->row < regions_end && row->pooled >= 0)
        return cmb_fail(check->error, CMB_ERR_VALUE, "pool %d writes region %lld a second time", number,
                        (long long)(pool->row - plan->L));
    if (pool->row >= regions_end && row->pooled == check->task) /* backward reads what every step wrote */
        return cmb_fail(check->error, CMB_ERR_VALUE, "pool %d writes scratch row %lld a second time in its task",
                        number, (long long)(pool->row - regions_end));
    int64_t count = 0;
    int32_t last = 0;
    if (cmb_tick(check->cancel, pool->child.count))
        return cmb_cancel_status(check->cancel, check->error);
    for (int32_t n = 0; n < pool->child.count; n++) {
        int32_t child_row = cmb_list_at(plan, pool->child, n);
        const row_state *child = check->row + child_row;
        bool is_ready = child_row < plan->L ||
                        (child_row < regions_end ? is_settled(check, child->pooled) : child->pooled == check->task);
        if (!is_ready || child_row == pool->row)
            return cmb_fail(check->error, CMB_ERR_VALUE, "pool %d reads row %d before it is pooled", number, child_row);
        count += child->count;
        last = child->last > last ? child->last : last;
    }
    if (count > INT32_MAX)
        return cmb_fail(check->error, CMB_ERR_OVERFLOW, "pool %d stands for more than 2^31 - 1 positions", number);
    row->pooled = check->task;
    row->count = (int32_t)count;
    row->last = last;
    return CMB_OK;
}

static cmb_status check_queries(checker *check, int32_t number) {
    const cmb_plan *plan = check->plan;
    const cmb_tile *tile = plan->tile + number;
    int32_t width = tile->width;
    if (width != 1 && (width < 16 || width > 64 || width % 16))
        return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: its width must be 1, 16, 32, 48 or 64, got %d", number,
                        width);
    if (tile->query.count > width)
        return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: %d queries exceed its width %d", number,
                        tile->query.count, width);
    bool are_regions = cmb_list_at(plan, tile->query, 0) >= plan->L;
    check->first_query = INT32_MAX;
    for (int32_t t = 0; t < tile->query.count; t++) {
        int32_t query = cmb_list_at(plan, tile->query, t);
        row_state *row = check->row + query;
        if ((query >= plan->L) != are_regions)
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d mixes positions and regions as queries", number);
        if (plan->is_slice && query >= plan->queries)
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: query row %d is not in the slice", number, query);
        if (row->tile == number)
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d has query row %d twice", number, query);
        if (row->queried >= check->wave_task && row->queried != check->task)
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: query row %d belongs to another task of its wave",
                            number, query);
        if (are_regions && !is_settled(check, row->pooled))
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d summarizes region %lld before it is pooled", number,
                            (long long)(query - plan->L));
        if (row->is_read && are_regions)
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d summarizes region %lld after it was attended", number,
                            (long long)(query - plan->L));
        row->tile = number;
        row->queried = check->task;
        check->first_query = query < check->first_query ? query : check->first_query;
    }
    return CMB_OK;
}

/* A query of a causal plan sees row `key`: no position below the row may come after the query. If the query is a
 * region, the positions lie below the region from here on. */
static cmb_status check_order(checker *check, int32_t number, int32_t query, int32_t key) {
    row_state *row = check->row;
    if (query >= check->plan->L)
        row[query].last = row[key].last > row[query].last ? row[key].last : row[query].last;
    else if (row[key].last > query + check->plan->first_query)
        return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: query %lld of a causal plan sees position %d", number,
                        (long long)(query + check->plan->first_query), row[key].last);
    return CMB_OK;
}

static cmb_status check_run(checker *check, int32_t number, const cmb_run *run) {
    const cmb_plan *plan = check->plan;
    cmb_list query = plan->tile[number].query;
    if (run->mask >= 0 && (int64_t)run->mask + run->row.count > plan->masks)
        return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: its masks lie outside the mask array", number);
    uint64_t all = cmb_lane_mask(0, query.count);
    int32_t latest =
        0; /* the row with the highest position below it, which stands for all rows of a run without masks */
    const bool is_by_end = run->mask < 0 && run->row.step && cmb_list_range(run->row).high < plan->L; /* positions */
    if (is_by_end)
        latest = (int32_t)cmb_list_range(run->row).high;
    if (!is_by_end && cmb_tick(check->cancel, 2 * (int64_t)run->row.count))
        return cmb_cancel_status(check->cancel, check->error);
    for (int32_t n = 0; !is_by_end && n < run->row.count; n++) {
        int32_t key = cmb_list_at(plan, run->row, n);
        row_state *row = check->row + key;
        const bool is_given = (plan->pools == 0 || plan->is_slice) && row->queried < 0;
        if (key >= plan->L && !is_given && (row->tile == number || !is_settled(check, row->queried)))
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d attends region %lld before it is summarized", number,
                            (long long)(key - plan->L));
        row->is_read = true;
        if (n == 0 || row->last > check->row[latest].last)
            latest = key;
        uint64_t mask = run->mask < 0 ? 0 : plan->mask[run->mask + n];
        if (mask & ~all)
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: the mask of row %d has lanes without a query",
                            number, key);
        for (; plan->is_causal && mask; mask &= mask - 1) {
            cmb_status status = check_order(check, number, cmb_list_at(plan, query, __builtin_ctzll(mask)), key);
            if (status)
                return status;
        }
    }
    if (!plan->is_causal || run->mask >= 0)
        return CMB_OK;
    if (check->first_query < plan->L)
        return check_order(check, number, check->first_query, latest);
    for (int32_t t = 0; t < query.count; t++)
        check_order(check, number, cmb_list_at(plan, query, t), latest);
    return CMB_OK;
}

/* Sizes, and whether waves, tasks, pools, tiles and runs follow one another without gaps. */
static cmb_status check_frame(const cmb_plan *plan, cmb_error *error) {
    if (plan->L < 0 || plan->L > INT64_C(1) << 30)
        return cmb_fail(error, CMB_ERR_VALUE, "plan: length must be between 0 and 2^30, got %lld", (long long)plan->L);
    if (plan->R < 0 || plan->N < 0 || plan->L + plan->R + plan->N > INT32_MAX)
        return cmb_fail(error, CMB_ERR_VALUE, "plan: R and N must count the rows of one table, got %d and %d", plan->R,
                        plan->N);
    if (plan->is_slice ? plan->queries < 0 || plan->first_query < 0 || plan->queries > plan->L ||
                             plan->first_query > plan->L - plan->queries
                       : plan->queries != 0 || plan->first_query != 0)
        return cmb_fail(error, CMB_ERR_VALUE, "plan: first_query and queries must be of a slice, got %lld and %lld",
                        (long long)plan->first_query, (long long)plan->queries);
    if ((unsigned)plan->pooling > CMB_POOL_FIRST)
        return cmb_fail(error, CMB_ERR_VALUE, "plan: pooling must be max, mean, sum or first, got %d",
                        (int)plan->pooling);
    const struct {
        const char *name;
        int32_t count;
        const void *data;
    } array[] = {
        {"wave", plan->waves, plan->wave}, {"task", plan->tasks, plan->task}, {"pool", plan->pools, plan->pool},
        {"tile", plan->tiles, plan->tile}, {"run", plan->runs, plan->run},    {"index", plan->indices, plan->index},
        {"mask", plan->masks, plan->mask},
    };
    for (size_t n = 0; n < sizeof array / sizeof *array; n++) {
        bool has_end = n < 2 || n == 3;
        if (array[n].count < 0 || array[n].count > INT32_MAX - 1 || (!array[n].data && (has_end || array[n].count)))
            return cmb_fail(error, CMB_ERR_VALUE, "plan: array %s is missing or has a bad count, got %d", array[n].name,
                            array[n].count);
    }
    bool is_ordered = plan->wave[0] == 0 && plan->wave[plan->waves] == plan->tasks && plan->task[0].pool == 0 &&
                      plan->task[plan->tasks].pool == plan->pools && plan->task[0].tile == 0 &&
                      plan->task[plan->tasks].tile == plan->tiles && plan->tile[0].run == 0 &&
                      plan->tile[plan->tiles].run == plan->runs;
    for (int32_t n = 0; n < plan->waves; n++)
        is_ordered = is_ordered && plan->wave[n] <= plan->wave[n + 1];
    for (int32_t n = 0; n < plan->tasks; n++)
        is_ordered =
            is_ordered && plan->task[n].pool <= plan->task[n + 1].pool && plan->task[n].tile <= plan->task[n + 1].tile;
    for (int32_t n = 0; n < plan->tiles; n++)
        is_ordered = is_ordered && plan->tile[n].run <= plan->tile[n + 1].run;
    if (!is_ordered)
        return cmb_fail(error, CMB_ERR_VALUE, "plan: waves, tasks, pools, tiles and runs must follow one another");
    return CMB_OK;
}

cmb_status cmb_check_plan(const cmb_plan *plan, cmb_cancel *cancel, cmb_error *error) {
    if (!plan)
        return cmb_fail(error, CMB_ERR_VALUE, "plan is missing");
    TRY(check_frame(plan, error));
    int64_t rows;
    TRY(check_lists(plan, &rows, cancel, error));
    cmb_status status = CMB_OK;
    size_t bytes;
    checker check = {.plan = plan, .cancel = cancel, .error = error};
    if (!cmb_multiply((size_t)rows + 1, sizeof *check.row, &bytes))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "a plan of %lld rows does not fit in memory", (long long)rows);
    check.row = cmb_allocate(bytes);
    if (!check.row)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory: checking a plan takes %zu bytes", bytes);
    for (int64_t n = 0; n < rows && !cmb_tick(cancel, 8); n++)
        check.row[n] = (row_state){-1, -1, -1, (int32_t)(n < plan->L ? n : 0), n < plan->L, false};
    status = cmb_cancel_status(cancel, error);
    for (int32_t wave = 0; wave < plan->waves && !status; wave++) {
        check.wave_task = plan->wave[wave];
        for (check.task = check.wave_task; check.task < plan->wave[wave + 1]; check.task++) {
            const cmb_task *task = plan->task + check.task;
            for (int32_t pool = task[0].pool; pool < task[1].pool && !status; pool++)
                status = check_pool(&check, pool);
            for (int32_t tile = task[0].tile; tile < task[1].tile && !status; tile++) {
                status = check_queries(&check, tile);
                for (int32_t run = plan->tile[tile].run; run < plan->tile[tile + 1].run && !status; run++)
                    status = check_run(&check, tile, plan->run + run);
            }
            if (status || (status = cmb_tick(cancel, 16) ? cmb_cancel_status(cancel, error) : CMB_OK))
                goto out;
        }
    }
out:
    cmb_release(check.row);
    return status;
}

cmb_status cmb_plan_check(const cmb_plan *plan, const cmb_interrupt *interrupt, cmb_error *error) {
    cmb_cancel cancel;
    cmb_cancel_init(&cancel, interrupt);
    return cmb_check_plan(plan, &cancel, error);
}

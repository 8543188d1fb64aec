// SPDX-License-Identifier: Apache-2.0
/* Plans as data: made, copied, checked, measured. What a plan holds is said in combiner.h. */
#include "plan.h"
#include "runtime.h"

#include <string.h>

/* ---- memory: a finished plan is one block, its struct first ---- */

static int64_t picks(const cmb_plan *plan) { return plan->pooling == CMB_POOL_FIRST ? plan->R : 0; }

static bool plan_size(const cmb_plan *plan, size_t *bytes) {
    const size_t part[][2] = {
        {(size_t)plan->masks, sizeof *plan->mask},     {(size_t)plan->waves + 1, sizeof *plan->wave},
        {(size_t)plan->tasks + 1, sizeof *plan->task}, {(size_t)plan->pools, sizeof *plan->pool},
        {(size_t)plan->tiles + 1, sizeof *plan->tile}, {(size_t)plan->runs, sizeof *plan->run},
        {(size_t)plan->indices, sizeof *plan->index},  {(size_t)plan->R, sizeof *plan->query_row},
        {(size_t)picks(plan), sizeof *plan->pick},
    };
    *bytes = sizeof *plan;
    for (size_t n = 0; n < sizeof part / sizeof *part; n++) {
        size_t size;
        if (!cmb_multiply(part[n][0], part[n][1], &size) || !cmb_add(*bytes, size, bytes))
            return false;
    }
    return true;
}

static const void *place(char **at, const void *from, size_t count, size_t size) {
    void *to = *at;
    if (count)
        memcpy(to, from, count * size);
    *at += count * size;
    return to;
}

/* Whether none of the rows from `least` on was written by a later task than the t-th of its wave. */
static bool is_written(const cmb_plan *plan, cmb_list list, int64_t least, int32_t t, const int32_t *writer) {
    if (list.step && list.start < least && list.start + (int64_t)list.step * (list.count - 1) < least)
        return true;
    for (int32_t n = 0; n < list.count; n++) {
        const int32_t x = cmb_list_at(plan, list, n);
        if (x >= least && x < plan->L + plan->R && writer[x] > t) /* scratch rows are the task's own */
            return false;
    }
    return true;
}

/* Whether the t-th tasks of all waves may follow one another, and then those after them: no task needs what a later one
 * writes in an earlier wave. Region rows are written by pools, and with the positions' results by tiles. */
static bool is_fusible(const cmb_plan *plan, int32_t *writer) {
    const int64_t L = plan->L;
    memset(writer, 0, (size_t)(L + plan->R) * sizeof *writer);
    for (int32_t wave = 0; wave < plan->waves; wave++)
        for (int32_t task = plan->wave[wave]; task < plan->wave[wave + 1]; task++) {
            const int32_t t = task - plan->wave[wave];
            for (int32_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++) {
                if (!is_written(plan, plan->pool[n].child, L, t, writer))
                    return false;
                if (plan->pool[n].row < L + plan->R)
                    writer[plan->pool[n].row] = t;
            }
            for (int32_t n = plan->task[task].tile; n < plan->task[task + 1].tile; n++) {
                const cmb_list query = plan->tile[n].query;
                for (int32_t run = plan->tile[n].run; run < plan->tile[n + 1].run; run++)
                    if (!is_written(plan, plan->run[run].row, L, t, writer))
                        return false;
                if (!is_written(plan, query, 0, t, writer))
                    return false;
                for (int32_t i = 0; i < query.count; i++)
                    writer[cmb_list_at(plan, query, i)] = t;
            }
        }
    return true;
}

enum { NOBODY = -1, SEVERAL = -2 };

/* Regions of the list: `task` needs their q_R. */
static void need_queries(const cmb_plan *plan, cmb_list list, int32_t task, int32_t *needs) {
    if (list.step && list.start < plan->L && list.start + (int64_t)list.step * (list.count - 1) < plan->L)
        return;
    for (int32_t n = 0; n < list.count; n++) {
        const int64_t r = cmb_list_at(plan, list, n) - plan->L;
        if (r >= 0 && r < plan->R)
            needs[r] = needs[r] == NOBODY || needs[r] == task ? task : SEVERAL;
    }
}

/* Into `query_row`; needs[r] becomes the one task that needs the q_R of region r. */
static void find_query_rows(cmb_plan *plan, int32_t *query_row, int32_t *needs) {
    for (int32_t r = 0; r < plan->R; r++) {
        needs[r] = NOBODY;
        query_row[r] = 0;
    }
    for (int32_t task = 0; task < plan->tasks; task++) {
        for (int32_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++) {
            need_queries(plan, plan->pool[n].child, task, needs);
            need_queries(plan, cmb_list_make(plan->pool[n].row, 1, 1), task, needs);
        }
        for (int32_t n = plan->task[task].tile; n < plan->task[task + 1].tile; n++)
            need_queries(plan, plan->tile[n].query, task, needs);
    }
    plan->own_queries = plan->shared_queries = 0;
    for (int32_t r = 0; r < plan->R; r++)
        if (needs[r] == SEVERAL)
            query_row[r] = plan->shared_queries++;
    for (int32_t task = 0; task < plan->tasks; task++) {
        int32_t own = 0;
        for (int32_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++) {
            const int64_t r = plan->pool[n].row - plan->L;
            if (r < plan->R && needs[r] == task)
                query_row[r] = ~own++;
        }
        plan->own_queries = own > plan->own_queries ? own : plan->own_queries;
    }
    plan->query_row = query_row;
}

/* Into `pick`; first[] takes those of scratch rows too. */
static void find_picks(cmb_plan *plan, int32_t *pick, int32_t *first) {
    plan->pick = picks(plan) ? pick : NULL;
    if (!plan->pick)
        return;
    memset(first, 0, (size_t)plan->R * sizeof *first);
    for (int32_t n = 0; n < plan->pools; n++) {
        const int32_t child = cmb_list_at(plan, plan->pool[n].child, 0);
        first[plan->pool[n].row - plan->L] = child < plan->L ? child : first[child - plan->L];
    }
    memcpy(pick, first, (size_t)plan->R * sizeof *pick);
}

static bool attends_regions(const cmb_plan *plan) {
    for (int32_t run = 0; run < plan->runs; run++)
        for (int32_t n = 0; n < plan->run[run].row.count; n++)
            if (cmb_list_at(plan, plan->run[run].row, n) >= plan->L)
                return true;
    return false;
}

/* Whether some position's softmax goes on in a second tile. */
static bool resumes(const cmb_plan *plan, int32_t *met) {
    memset(met, 0, (size_t)plan->L * sizeof *met);
    for (int32_t tile = 0; tile < plan->tiles; tile++) {
        const cmb_list query = plan->tile[tile].query;
        if (cmb_list_at(plan, query, 0) >= plan->L)
            continue;
        for (int32_t i = 0; i < query.count; i++)
            if (met[cmb_list_at(plan, query, i)]++)
                return true;
    }
    return false;
}

/* `rows` has room for what is found of regions: query_row, and pick where there are picks. */
static cmb_status find_traits(cmb_plan *plan, int32_t *rows, cmb_error *error) {
    const size_t bytes = (size_t)(plan->L + plan->R + plan->N + 1) * sizeof(int32_t);
    int32_t *row = cmb_allocate(bytes);
    if (!row)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory: a plan of length %lld needs %zu bytes while it is made",
                        (long long)plan->L, bytes);
    plan->is_fusible = plan->waves > 1 && is_fusible(plan, row);
    plan->resumes = plan->tiles > 1 && resumes(plan, row);
    find_query_rows(plan, rows, row);
    find_picks(plan, rows + plan->R, row);
    plan->only_attends = plan->pools == 0 && attends_regions(plan);
    cmb_release(row);
    return CMB_OK;
}

static cmb_status plan_copy(const cmb_plan *from, cmb_plan **plan, cmb_error *error) {
    size_t bytes;
    if (!plan_size(from, &bytes))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "a plan of length %lld does not fit in memory", (long long)from->L);
    cmb_plan *copy = cmb_allocate(bytes);
    if (!copy)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory: a plan of length %lld takes %zu bytes",
                        (long long)from->L, bytes);
    *copy = *from;
    char *at = (char *)(copy + 1);
    copy->mask = place(&at, from->mask, (size_t)from->masks, sizeof *from->mask); /* first: the widest type */
    copy->wave = place(&at, from->wave, (size_t)from->waves + 1, sizeof *from->wave);
    copy->task = place(&at, from->task, (size_t)from->tasks + 1, sizeof *from->task);
    copy->pool = place(&at, from->pool, (size_t)from->pools, sizeof *from->pool);
    copy->tile = place(&at, from->tile, (size_t)from->tiles + 1, sizeof *from->tile);
    copy->run = place(&at, from->run, (size_t)from->runs, sizeof *from->run);
    copy->index = place(&at, from->index, (size_t)from->indices, sizeof *from->index);
    cmb_status status = find_traits(copy, (int32_t *)at, error);
    if (status)
        cmb_release(copy);
    else
        *plan = copy;
    return status;
}

cmb_status cmb_plan_from_arrays(const cmb_plan *arrays, cmb_plan **plan, cmb_error *error) {
    *plan = NULL;
    cmb_status status = cmb_plan_check(arrays, error);
    return status ? status : plan_copy(arrays, plan, error);
}

void cmb_plan_free(cmb_plan *plan) { cmb_release(plan); }

size_t cmb_plan_bytes(const cmb_plan *plan) {
    size_t bytes = 0;
    plan_size(plan, &bytes);
    return bytes;
}

/* ---- building ---- */

static bool reserve(cmb_build *build, cmb_vector *vector, size_t size, int64_t capacity) {
    if (build->status || capacity <= vector->capacity)
        return !build->status;
    if (capacity > INT32_MAX) {
        build->status = CMB_ERR_OVERFLOW;
        return false;
    }
    size_t bytes;
    void *data = cmb_multiply((size_t)capacity, size, &bytes) ? cmb_allocate(bytes) : NULL;
    if (!data) {
        build->status = CMB_ERR_MEMORY;
        return false;
    }
    if (vector->count)
        memcpy(data, vector->data, (size_t)vector->count * size);
    cmb_release(vector->data);
    vector->data = data;
    vector->capacity = capacity;
    return true;
}

/* Room for `count` more elements, or NULL where the build has failed. */
static void *extend(cmb_build *build, cmb_vector *vector, size_t size, int64_t count) {
    int64_t need = vector->count + count;
    if (need > vector->capacity) {
        int64_t twice = 2 * vector->capacity < INT32_MAX ? 2 * vector->capacity : INT32_MAX;
        if (!reserve(build, vector, size, need > twice ? need > 16 ? need : 16 : twice))
            return NULL;
    }
    if (build->status)
        return NULL;
    void *at = (char *)vector->data + (size_t)vector->count * size;
    vector->count = need;
    return at;
}

cmb_status cmb_check_length(int64_t L, cmb_error *error) {
    if (L < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "length must not be negative, got %lld", (long long)L);
    if (L > INT64_C(1) << 30)
        return cmb_fail(error, CMB_ERR_OVERFLOW, "length must be at most 2^30, got %lld", (long long)L);
    return CMB_OK;
}

cmb_status cmb_build_begin(cmb_build *build, int64_t L, int64_t R, int64_t N, const cmb_plan_options *options,
                           cmb_error *error) {
    *build = (cmb_build){0};
    if ((unsigned)options->pooling > CMB_POOL_FIRST)
        return cmb_fail(error, CMB_ERR_VALUE, "pooling must be max, mean, sum or first, got %d", (int)options->pooling);
    if (R > INT32_MAX - L || N > INT32_MAX - L - R)
        return cmb_fail(error, CMB_ERR_OVERFLOW, "length %lld with %lld regions exceeds the 2^31 - 1 rows of a plan",
                        (long long)L, (long long)R);
    build->plan = (cmb_plan){
        .L = L,
        .R = (int32_t)R,
        .N = (int32_t)N,
        .is_causal = options->is_causal,
        .size_bias = options->size_bias,
        .pooling = options->pooling,
    };
    /* A length that memory cannot hold fails here, and not after minutes of building. */
    reserve(build, &build->pool, sizeof(cmb_pool), R);
    reserve(build, &build->tile, sizeof(cmb_tile), L / 64 + 2);
    return CMB_OK;
}

void cmb_build_wave(cmb_build *build) {
    int32_t *first = extend(build, &build->wave, sizeof *first, 1);
    if (first)
        *first = (int32_t)build->task.count;
}

bool cmb_build_task(cmb_build *build) {
    cmb_task *task = extend(build, &build->task, sizeof *task, 1);
    if (task)
        *task = (cmb_task){(int32_t)build->pool.count, (int32_t)build->tile.count};
    return task != NULL;
}

void cmb_build_pool(cmb_build *build, int64_t row, cmb_list child) {
    cmb_pool *pool = extend(build, &build->pool, sizeof *pool, 1);
    if (pool)
        *pool = (cmb_pool){(int32_t)row, child};
}

void cmb_build_tile(cmb_build *build, cmb_list query, int32_t width) {
    cmb_tile *tile = extend(build, &build->tile, sizeof *tile, 1);
    if (tile)
        *tile = (cmb_tile){query, (int32_t)build->run.count, width};
}

void cmb_build_run(cmb_build *build, cmb_list row) {
    if (row.count < 1)
        return;
    cmb_run *run = extend(build, &build->run, sizeof *run, 1);
    if (run)
        *run = (cmb_run){row, -1};
}

/* A mask sequence that the plan already has, by its hash. count == 0: a free place. */
typedef struct {
    uint64_t hash;
    int32_t mask, count;
} known_mask;

static known_mask *find_mask(const cmb_build *build, uint64_t hash, const uint64_t *mask, int32_t count) {
    known_mask *table = build->known.data;
    const uint64_t *words = build->mask.data;
    uint64_t last = (uint64_t)build->known.capacity - 1;
    uint64_t at = hash & last;
    while (table[at].count && (table[at].hash != hash || table[at].count != count ||
                               memcmp(words + table[at].mask, mask, (size_t)count * sizeof *mask) != 0))
        at = (at + 1) & last;
    return table + at;
}

/* Keeps half of the table free. Its capacity is a power of two. */
static bool grow_known_masks(cmb_build *build) {
    cmb_vector old = build->known;
    if (old.capacity && 2 * (old.count + 1) <= old.capacity)
        return true;
    build->known = (cmb_vector){0};
    if (reserve(build, &build->known, sizeof(known_mask), old.capacity ? 2 * old.capacity : 64)) {
        build->known.count = old.count;
        memset(build->known.data, 0, (size_t)build->known.capacity * sizeof(known_mask));
        const known_mask *entry = old.data;
        for (int64_t n = 0; n < old.capacity; n++)
            if (entry[n].count)
                *find_mask(build, entry[n].hash, (const uint64_t *)build->mask.data + entry[n].mask, entry[n].count) =
                    entry[n];
    }
    cmb_release(old.data);
    return !build->status;
}

void cmb_build_masked_run(cmb_build *build, cmb_list row, const uint64_t *mask) {
    while (row.count > 0 && !mask[row.count - 1])
        row.count--;
    if (row.count < 1 || build->status || !grow_known_masks(build))
        return;
    uint64_t hash = 0;
    for (int32_t n = 0; n < row.count; n++) {
        hash = (hash ^ mask[n]) * UINT64_C(0x9e3779b97f4a7c15);
        hash ^= hash >> 32;
    }
    known_mask *known = find_mask(build, hash, mask, row.count);
    if (!known->count) {
        int32_t first = (int32_t)build->mask.count;
        uint64_t *words = extend(build, &build->mask, sizeof *words, row.count);
        if (!words)
            return;
        memcpy(words, mask, (size_t)row.count * sizeof *words);
        *known = (known_mask){hash, first, row.count};
        build->known.count++;
    }
    cmb_run *run = extend(build, &build->run, sizeof *run, 1);
    if (run)
        *run = (cmb_run){row, known->mask};
}

cmb_list cmb_build_list(cmb_build *build, const int32_t *row, int64_t count) {
    if (count < 1)
        return (cmb_list){0, 1, 0};
    int64_t step = count > 1 ? (int64_t)row[1] - row[0] : 1;
    int64_t n = 1;
    while (n < count && (int64_t)row[n] - row[n - 1] == step)
        n++;
    if (n == count && step)
        return cmb_list_make(row[0], step, count);
    int64_t start = build->index.count;
    int32_t *index = extend(build, &build->index, sizeof *index, count);
    if (!index)
        return (cmb_list){0, 1, 0};
    memcpy(index, row, (size_t)count * sizeof *index);
    return cmb_list_make(start, 0, count);
}

static bool sees_something(cmb_look look, int64_t a, int64_t n) {
    const int64_t count = look.row.count;
    switch (look.sight) {
    case CMB_BEHIND:
        return count > a + 1;
    case CMB_OTHERS:
        return count > 1 || (count == 1 && a + n > 1);
    default:
        return count > 0;
    }
}

/* All that queries [a, a + n) see of a list, but for the end of what they see up to themselves. */
static void look_at(cmb_build *build, cmb_look look, int64_t a, int64_t n) {
    uint64_t mask[CMB_TILE];
    const cmb_list row = look.row;
    switch (look.sight) {
    case CMB_EVERY:
        cmb_build_run(build, row);
        return;
    case CMB_UP_TO:
        cmb_build_run(build, cmb_cut(row, 0, a));
        return;
    case CMB_BEHIND:
        for (int64_t t = 1; t < n; t++)
            mask[t - 1] = cmb_lanes(0, t);
        cmb_build_masked_run(build, cmb_cut(row, a + 1, a + n), mask);
        cmb_build_run(build, cmb_cut(row, a + n, row.count));
        return;
    case CMB_OTHERS:
        cmb_build_run(build, cmb_cut(row, 0, a));
        if (n == 1 && a + 1 < row.count) {
            /* A query alone in its tile does not see its own row: the next stands in for it, so that those behind it
             * keep their places. */
            const int32_t next = (int32_t)(row.start + (a + 1) * row.step);
            cmb_build_masked_run(build, cmb_build_list(build, (int32_t[]){next, next}, 2), (uint64_t[]){0, 1});
            n = 2;
        } else {
            for (int64_t t = 0; t < n; t++)
                mask[t] = cmb_lanes(0, n) & ~cmb_lanes(t, t + 1);
            cmb_build_masked_run(build, cmb_cut(row, a, a + n), mask);
        }
        cmb_build_run(build, cmb_cut(row, a + n, row.count));
    }
}

void cmb_build_attend_from(cmb_build *build, cmb_list query, int64_t a, const cmb_look *look, int looks) {
    enum { MOST = 3 };
    int64_t n = cmb_least(CMB_TILE, query.count - a), rows = 0;
    int32_t row[MOST * CMB_TILE];
    uint64_t mask[MOST * CMB_TILE];
    cmb_list end = {0, 1, 0};
    int ends = 0;
    bool is_empty = true;
    for (int k = 0; k < looks; k++) {
        is_empty = is_empty && !sees_something(look[k], a, n);
        ends += look[k].sight == CMB_UP_TO;
    }
    if (n < 1 || is_empty)
        return;
    cmb_build_tile(build, cmb_cut(query, a, a + n), cmb_lanes_for(n));
    for (int k = 0; k < looks; k++)
        look_at(build, look[k], a, n);
    for (int64_t e = a; e < a + n; e++)
        for (int k = 0; k < looks; k++)
            if (look[k].sight == CMB_UP_TO && e < look[k].row.count) {
                row[rows] = (int32_t)(look[k].row.start + e * look[k].row.step);
                mask[rows++] = cmb_lanes(e - a, n);
                end = cmb_cut(look[k].row, a, a + n);
            }
    cmb_build_masked_run(build, ends > 1 ? cmb_build_list(build, row, rows) : end, mask);
}

void cmb_build_attend(cmb_build *build, cmb_list query, const cmb_look *look, int looks) {
    for (int64_t a = 0; a < query.count && !build->status; a += CMB_TILE)
        cmb_build_attend_from(build, query, a, look, looks);
}

cmb_status cmb_build_end(cmb_build *build, cmb_plan **plan, cmb_error *error) {
    cmb_build_wave(build);
    cmb_build_task(build);
    cmb_build_tile(build, (cmb_list){0, 1, 0}, 0);
    cmb_status status = build->status;
    cmb_plan *made = &build->plan;
    if (status == CMB_ERR_OVERFLOW)
        cmb_fail(error, status, "a plan of length %lld needs tables of more than 2^31 - 1 entries", (long long)made->L);
    else if (status)
        cmb_fail(error, status, "out of memory while making a plan of length %lld", (long long)made->L);
    else {
        made->waves = (int32_t)build->wave.count - 1;
        made->tasks = (int32_t)build->task.count - 1;
        made->pools = (int32_t)build->pool.count;
        made->tiles = (int32_t)build->tile.count - 1;
        made->runs = (int32_t)build->run.count;
        made->indices = (int32_t)build->index.count;
        made->masks = (int32_t)build->mask.count;
        made->wave = build->wave.data;
        made->task = build->task.data;
        made->pool = build->pool.data;
        made->tile = build->tile.data;
        made->run = build->run.data;
        made->index = build->index.data;
        made->mask = build->mask.data;
        status = plan_copy(made, plan, error);
    }
    const cmb_vector held[] = {build->wave, build->task,  build->pool, build->tile,
                               build->run,  build->index, build->mask, build->known};
    for (size_t n = 0; n < sizeof held / sizeof *held; n++)
        cmb_release(held[n].data);
    return status;
}

/* ---- the check ---- */

/* What is known of a table row while the plan is read in order. */
typedef struct {
    int32_t pooled; /* the task that last pooled it, or -1 */
    int32_t asked;  /* the task that last had it as a query, or -1 */
    int32_t tile;   /* the tile that last had it as a query, or -1 */
    int32_t last;   /* the highest position below it */
    int32_t count;  /* positions below it, repeats counted */
    bool read;      /* some tile attends it */
} row_state;

typedef struct {
    const cmb_plan *plan;
    row_state *row;
    int32_t wave_task; /* first task of the wave */
    int32_t task;
    int32_t first_query; /* lowest query row of the tile */
    cmb_error *error;
} checker;

/* Written before this task, or by it. */
static bool is_settled(const checker *check, int32_t task) {
    return task >= 0 && (task < check->wave_task || task == check->task);
}

/* What is wrong with a list of rows [0, limit), or NULL. */
static const char *list_fault(const cmb_plan *plan, cmb_list list, int64_t limit) {
    if (list.count < 1)
        return "are empty";
    if (list.step == 0) {
        if (list.start < 0 || (int64_t)list.start + list.count > plan->indices)
            return "lie outside the index array";
        for (int32_t n = 0; n < list.count; n++)
            if (plan->index[list.start + n] < 0 || plan->index[list.start + n] >= limit)
                return "lie outside the table";
        return NULL;
    }
    int64_t end = list.start + (int64_t)list.step * (list.count - 1);
    return list.start < 0 || list.start >= limit || end < 0 || end >= limit ? "lie outside the table" : NULL;
}

static cmb_status check_pool(checker *check, int32_t number) {
    const cmb_plan *plan = check->plan;
    const cmb_pool *pool = plan->pool + number;
    int64_t regions_end = plan->L + plan->R, rows = regions_end + plan->N;
    if (pool->row < plan->L || pool->row >= rows)
        return cmb_fail(check->error, CMB_ERR_VALUE, "pool %d writes row %d, which is no region or scratch row", number,
                        pool->row);
    row_state *row = check->row + pool->row;
    if (pool->row < regions_end && row->pooled >= 0)
        return cmb_fail(check->error, CMB_ERR_VALUE, "pool %d writes region %lld a second time", number,
                        (long long)(pool->row - plan->L));
    if (pool->row >= regions_end && row->pooled == check->task) /* backward reads what each step wrote */
        return cmb_fail(check->error, CMB_ERR_VALUE, "pool %d writes scratch row %lld a second time in its task",
                        number, (long long)(pool->row - regions_end));
    const char *fault = list_fault(plan, pool->child, rows);
    if (fault)
        return cmb_fail(check->error, CMB_ERR_VALUE, "pool %d: its children %s", number, fault);
    int64_t count = 0;
    int32_t last = 0;
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
    const char *fault = list_fault(plan, tile->query, plan->L + plan->R);
    if (fault)
        return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: its queries %s", number, fault);
    bool are_regions = cmb_list_at(plan, tile->query, 0) >= plan->L;
    check->first_query = INT32_MAX;
    for (int32_t t = 0; t < tile->query.count; t++) {
        int32_t query = cmb_list_at(plan, tile->query, t);
        row_state *row = check->row + query;
        if ((query >= plan->L) != are_regions)
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d mixes positions and regions as queries", number);
        if (row->tile == number)
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d has query row %d twice", number, query);
        if (row->asked >= check->wave_task && row->asked != check->task)
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: query row %d belongs to another task of its wave",
                            number, query);
        if (are_regions && !is_settled(check, row->pooled))
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d summarizes region %lld before it is pooled", number,
                            (long long)(query - plan->L));
        if (row->read && are_regions)
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d summarizes region %lld after it was attended", number,
                            (long long)(query - plan->L));
        row->tile = number;
        row->asked = check->task;
        check->first_query = query < check->first_query ? query : check->first_query;
    }
    return CMB_OK;
}

/* No lane of a causal plan sees a later position; what a region's lane sees lies below the region. */
static cmb_status check_order(checker *check, int32_t number, int32_t query, int32_t key) {
    row_state *row = check->row;
    if (query >= check->plan->L)
        row[query].last = row[key].last > row[query].last ? row[key].last : row[query].last;
    else if (row[key].last > query)
        return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: query %d of a causal plan sees position %d", number,
                        query, row[key].last);
    return CMB_OK;
}

static cmb_status check_run(checker *check, int32_t number, const cmb_run *run) {
    const cmb_plan *plan = check->plan;
    cmb_list query = plan->tile[number].query;
    const char *fault = list_fault(plan, run->row, plan->L + plan->R);
    if (fault)
        return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: its rows %s", number, fault);
    if (run->mask >= 0 && (int64_t)run->mask + run->row.count > plan->masks)
        return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d: its masks lie outside the mask array", number);
    uint64_t all = cmb_lanes(0, query.count);
    int32_t latest = 0; /* the row with the highest position: it answers for all rows that every lane sees */
    for (int32_t n = 0; n < run->row.count; n++) {
        int32_t key = cmb_list_at(plan, run->row, n);
        row_state *row = check->row + key;
        const bool is_given = plan->pools == 0 && row->asked < 0;
        if (key >= plan->L && !is_given && (row->tile == number || !is_settled(check, row->asked)))
            return cmb_fail(check->error, CMB_ERR_VALUE, "tile %d attends region %lld before it is summarized", number,
                            (long long)(key - plan->L));
        row->read = true;
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

/* Sizes, and that every range of the nested arrays lies in the next one. */
static cmb_status check_frame(const cmb_plan *plan, cmb_error *error) {
    if (plan->L < 0 || plan->L > INT64_C(1) << 30)
        return cmb_fail(error, CMB_ERR_VALUE, "plan: length must be between 0 and 2^30, got %lld", (long long)plan->L);
    if (plan->R < 0 || plan->N < 0 || plan->L + plan->R + plan->N > INT32_MAX)
        return cmb_fail(error, CMB_ERR_VALUE, "plan: R and N must count the rows of one table, got %d and %d", plan->R,
                        plan->N);
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

cmb_status cmb_plan_check(const cmb_plan *plan, cmb_error *error) {
    cmb_status status = check_frame(plan, error);
    if (status)
        return status;
    int64_t rows = plan->L + plan->R + plan->N;
    size_t bytes;
    checker check = {.plan = plan, .error = error};
    if (!cmb_multiply((size_t)rows + 1, sizeof *check.row, &bytes))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "a plan of %lld rows does not fit in memory", (long long)rows);
    check.row = cmb_allocate(bytes);
    if (!check.row)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory: checking a plan takes %zu bytes", bytes);
    for (int64_t n = 0; n < rows; n++)
        check.row[n] = (row_state){-1, -1, -1, (int32_t)(n < plan->L ? n : 0), n < plan->L, false};
    for (int32_t wave = 0; wave < plan->waves; wave++) {
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
            if (status)
                goto out;
        }
    }
out:
    cmb_release(check.row);
    return status;
}

/* ---- measures ---- */

/* Lanes computed for a row: the 16-lane groups that its mask leaves empty are skipped. */
static int64_t computed_lanes(uint64_t mask) {
    int64_t lanes = 0;
    for (; mask; mask >>= 16)
        lanes += mask & 0xffff ? 16 : 0;
    return lanes;
}

static void count_pairs(const cmb_plan *plan, cmb_plan_facts *facts) {
    for (int32_t number = 0; number < plan->tiles; number++) {
        const cmb_tile *tile = plan->tile + number;
        int64_t pairs = 0;
        for (int32_t n = tile->run; n < tile[1].run; n++) {
            const cmb_run *run = plan->run + n;
            if (run->mask < 0) {
                pairs += (int64_t)run->row.count * tile->query.count;
                facts->computed_pairs += (int64_t)run->row.count * tile->width;
                continue;
            }
            for (int32_t row = 0; row < run->row.count; row++) {
                uint64_t mask = plan->mask[run->mask + row];
                pairs += __builtin_popcountll(mask);
                facts->computed_pairs += tile->width == 1 ? 1 : computed_lanes(mask);
            }
        }
        bool is_attend = cmb_list_at(plan, tile->query, 0) < plan->L;
        *(is_attend ? &facts->attend_pairs : &facts->summarize_pairs) += pairs;
    }
}

/* From the keys' words word[0..L) makes the regions', word[L..L+R), and the queries', got[0..L): each the sum, or the
 * union, of the words of the rows that it attends. */
static void gather_words(const cmb_plan *plan, bool is_union, uint64_t *word, uint64_t *got) {
    memset(word + plan->L, 0, (size_t)plan->R * sizeof *word);
    memset(got, 0, (size_t)plan->L * sizeof *got);
    for (int32_t number = 0; number < plan->tiles; number++) {
        const cmb_tile *tile = plan->tile + number;
        uint64_t lane[64] = {0}, shared = 0;
        for (int32_t n = tile->run; n < tile[1].run; n++) {
            const cmb_run *run = plan->run + n;
            for (int32_t row = 0; row < run->row.count; row++) {
                uint64_t key = word[cmb_list_at(plan, run->row, row)];
                if (run->mask < 0)
                    shared = cmb_join(shared, key, is_union);
                else if (key)
                    for (uint64_t mask = plan->mask[run->mask + row]; mask; mask &= mask - 1)
                        lane[__builtin_ctzll(mask)] = cmb_join(lane[__builtin_ctzll(mask)], key, is_union);
            }
        }
        for (int32_t t = 0; t < tile->query.count; t++) {
            int32_t query = cmb_list_at(plan, tile->query, t);
            uint64_t *to = query < plan->L ? got + query : word + query;
            *to = cmb_join(*to, cmb_join(lane[t], shared, is_union), is_union);
        }
    }
}

/* True of another set of keys with a chance of 2^-64. */
static bool sums_to_support(const cmb_plan *plan, uint64_t *word, uint64_t *got) {
    uint64_t support = 0;
    for (int64_t j = 0; j < plan->L; j++)
        support += word[j] = cmb_key_word(j);
    gather_words(plan, false, word, got);
    uint64_t before = 0;
    for (int64_t i = 0; i < plan->L; i++) {
        before += word[i];
        if (got[i] != (plan->is_causal ? before : support))
            return false;
    }
    return true;
}

/* Exact, 64 keys at a time: a bit each. */
static bool covers_support(const cmb_plan *plan, uint64_t *word, uint64_t *got) {
    memset(word, 0, (size_t)plan->L * sizeof *word);
    for (int64_t first = 0; first < plan->L; first += 64) {
        int64_t end = first + 64 < plan->L ? first + 64 : plan->L;
        for (int64_t j = first; j < end; j++)
            word[j] = UINT64_C(1) << (j - first);
        gather_words(plan, true, word, got);
        for (int64_t i = plan->is_causal ? first : 0; i < plan->L; i++) {
            uint64_t support = cmb_lanes(0, plan->is_causal && i < end ? i + 1 - first : end - first);
            if (got[i] != support)
                return false;
        }
        memset(word + first, 0, (size_t)(end - first) * sizeof *word);
    }
    return true;
}

cmb_status cmb_plan_measure(const cmb_plan *plan, cmb_plan_facts *facts, cmb_error *error) {
    *facts = (cmb_plan_facts){0};
    size_t words = (size_t)(2 * plan->L + plan->R) + 1, bytes;
    uint64_t *word = cmb_multiply(words, sizeof *word, &bytes) ? cmb_allocate(bytes) : NULL;
    if (!word)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory: measuring a plan takes %zu words", words);
    uint64_t *got = word + plan->L + plan->R;
    count_pairs(plan, facts);
    facts->is_partition = sums_to_support(plan, word, got);
    facts->is_full = facts->is_partition || covers_support(plan, word, got);
    cmb_release(word);
    return CMB_OK;
}

// SPDX-License-Identifier: Apache-2.0
/*
 * Runs a problem: checks everything, takes all memory, then schedules waves of tasks over heads. Forward
 * runs every wave over a group of heads at once, each (head, task) pair on whichever thread is free. Backward
 * adds into rows that tasks and query heads share, so one thread takes a key head with all its query heads
 * and runs its tasks in reverse: that order, not the threads, decides the bits.
 */
#include "stages.h"

#include <math.h>
#include <string.h>

/* ---- checks ------------------------------------------------------------------------------------- */

enum { WIDEST_FEATURES = 1024 };

/* The offset of the last element must be addressable: strides may be anything that is. */
static cmb_status check_array(const char *name, const cmb_array *array, const cmb_problem *p, int64_t heads,
                              int64_t rows, int64_t dim, cmb_error *error) {
    if (!array->data)
        return cmb_fail(error, CMB_ERR_VALUE, "%s is missing", name);
    if (array->heads != heads)
        return cmb_fail(error, CMB_ERR_VALUE, "%s must have %lld heads, got %lld", name, (long long)heads,
                        (long long)array->heads);
    const int64_t counts[] = {p->B, heads, rows}, strides[] = {array->batch, array->head, array->row};
    int64_t reach = dim;
    for (int i = 0; i < 3; i++) {
        int64_t step, stride;
        if (counts[i] == 0)
            return CMB_OK;
        if (__builtin_sub_overflow(strides[i] < 0 ? 0 : strides[i], strides[i] < 0 ? strides[i] : 0, &stride) ||
            __builtin_mul_overflow(counts[i] - 1, stride, &step) || __builtin_add_overflow(reach, step, &reach) ||
            reach > INT64_MAX / 8)
            return cmb_fail(error, CMB_ERR_OVERFLOW, "%s spans more than can be addressed", name);
    }
    return CMB_OK;
}

/* Which of key or query heads a region array has. */
static int64_t either(const cmb_array *array, const cmb_problem *p) { return array->heads == p->Hk ? p->Hk : p->Hq; }

static int64_t most_regions(const cmb_problem *p) {
    int64_t R = 0;
    for (int64_t i = 0; i < p->plans; i++)
        R = p->plan[i]->R > R ? p->plan[i]->R : R;
    return R;
}

#define TRY(call)                          \
    do {                                   \
        const cmb_status status_ = (call); \
        if (status_ != CMB_OK)             \
            return status_;                \
    } while (0)

static cmb_status check_problem(const cmb_problem *p, bool backward, cmb_error *error) {
    if (p->dtype != CMB_FLOAT32 && p->dtype != CMB_FLOAT64)
        return cmb_fail(error, CMB_ERR_VALUE, "dtype must be CMB_FLOAT32 or CMB_FLOAT64, got %d", (int)p->dtype);
    if (p->stages < CMB_SUMMARIZE || p->stages > CMB_BOTH)
        return cmb_fail(error, CMB_ERR_VALUE, "stages must be 1, 2 or 3, got %d", (int)p->stages);
    const struct {
        const char *name;
        int64_t value, least, most;
    } sizes[] = {
        {"B", p->B, 0, INT64_MAX}, {"Hq", p->Hq, 0, INT64_MAX},     {"Hk", p->Hk, 0, INT64_MAX},
        {"L", p->L, 0, INT32_MAX}, {"D", p->D, 1, WIDEST_FEATURES}, {"Dv", p->Dv, 1, WIDEST_FEATURES},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < sizes[i].least || sizes[i].value > sizes[i].most)
            return cmb_fail(error, CMB_ERR_VALUE, "%s must be between %lld and %lld, got %lld", sizes[i].name,
                            (long long)sizes[i].least, (long long)sizes[i].most, (long long)sizes[i].value);
    if (p->Hk == 0 ? p->Hq != 0 : p->Hq % p->Hk != 0)
        return cmb_fail(error, CMB_ERR_VALUE, "query heads must be a multiple of key heads, got %lld and %lld",
                        (long long)p->Hq, (long long)p->Hk);
    if (!isfinite(p->scale))
        return cmb_fail(error, CMB_ERR_VALUE, "scale must be finite, got %g", p->scale);
    int64_t heads, rows, key_heads;
    if (__builtin_mul_overflow(p->B, p->Hq, &heads) || __builtin_mul_overflow(heads, p->L, &rows))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "B * Hq * L does not fit in 64 bits");
    if (__builtin_mul_overflow(p->B, p->Hk, &key_heads))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "B * Hk does not fit in 64 bits");
    if (p->plans != 1 && p->plans != key_heads)
        return cmb_fail(error, CMB_ERR_VALUE, "plans must be 1 or B * Hk = %lld, got %lld", (long long)key_heads,
                        (long long)p->plans);
    for (int64_t i = 0; i < p->plans; i++) {
        if (!p->plan || !p->plan[i])
            return cmb_fail(error, CMB_ERR_VALUE, "plan is missing");
        const cmb_plan *plan = p->plan[i], *first = p->plan[0];
        if (plan->L != p->L)
            return cmb_fail(error, CMB_ERR_VALUE, "plan must be of length %lld, got %lld", (long long)p->L,
                            (long long)plan->L);
        if (plan->pooling != first->pooling || plan->size_bias != first->size_bias ||
            plan->weighted != first->weighted || plan->is_causal != first->is_causal)
            return cmb_fail(error, CMB_ERR_VALUE,
                            "plans of one call must agree in pooling, size_bias, weighted and "
                            "is_causal");
    }
    const int64_t R = most_regions(p);
    const bool attend = p->stages & CMB_ATTEND, summarize = p->stages & CMB_SUMMARIZE;
    const bool weighted = p->plans && p->plan[0]->weighted && !p->region_key.data;
    TRY(check_array("query", &p->query, p, p->Hq, p->L, p->D, error));
    TRY(check_array("key", &p->key, p, p->Hk, p->L, p->D, error));
    TRY(check_array("value", &p->value, p, p->Hk, p->L, p->Dv, error));
    if (p->region_query.data)
        TRY(check_array("region_query", &p->region_query, p, p->Hq, R, p->D, error));
    if (p->region_key.data)
        TRY(check_array("region_key", &p->region_key, p, either(&p->region_key, p), R, p->D, error));
    if (p->stages == CMB_ATTEND || (p->stages == CMB_SUMMARIZE && !backward) || p->summary_key.data ||
        (backward && weighted))
        TRY(check_array("summary_key", &p->summary_key, p, weighted && summarize ? p->Hq : either(&p->summary_key, p),
                        R, p->D, error));
    if (p->stages != CMB_BOTH || backward || p->summary_value.data)
        TRY(check_array("summary_value", &p->summary_value, p, p->Hq, R, p->Dv, error));
    if (p->stages == CMB_SUMMARIZE || (backward && summarize) || p->summary_lse.data)
        TRY(check_array("summary_lse", &p->summary_lse, p, p->Hq, R, 1, error));
    if (attend) {
        TRY(check_array("out", &p->out, p, p->Hq, p->L, p->Dv, error));
        TRY(check_array("lse", &p->lse, p, p->Hq, p->L, 1, error));
    }
    return CMB_OK;
}

static cmb_status check_gradients(const cmb_problem *p, const cmb_gradients *g, cmb_error *error) {
    const int64_t R = most_regions(p);
    TRY(check_array("gradient of query", &g->query, p, p->Hq, p->L, p->D, error));
    TRY(check_array("gradient of key", &g->key, p, p->Hk, p->L, p->D, error));
    TRY(check_array("gradient of value", &g->value, p, p->Hk, p->L, p->Dv, error));
    if (p->stages & CMB_ATTEND) {
        TRY(check_array("gradient of out", &g->out, p, p->Hq, p->L, p->Dv, error));
        if (g->lse.data)
            TRY(check_array("gradient of lse", &g->lse, p, p->Hq, p->L, 1, error));
    }
    if (p->stages == CMB_ATTEND || g->summary_key.data)
        TRY(check_array("gradient of summary_key", &g->summary_key, p,
                        p->summary_key.data ? p->summary_key.heads : either(&g->summary_key, p), R, p->D, error));
    if (p->stages == CMB_ATTEND || g->summary_value.data)
        TRY(check_array("gradient of summary_value", &g->summary_value, p, p->Hq, R, p->Dv, error));
    if (p->stages != CMB_ATTEND && p->region_query.data)
        TRY(check_array("gradient of region_query", &g->region_query, p, p->Hq, R, p->D, error));
    if (p->stages != CMB_ATTEND && p->region_key.data)
        TRY(check_array("gradient of region_key", &g->region_key, p, p->region_key.heads, R, p->D, error));
    return CMB_OK;
}

/* ---- memory ------------------------------------------------------------------------------------- */

void *cmb_take(cmb_arena *arena, size_t count, size_t size) {
    size_t bytes, end;
    if (!cmb_multiply(count, size, &bytes) || !cmb_add(arena->used, bytes, &end) || !cmb_add(end, 63, &end)) {
        arena->overflow = true;
        return NULL;
    }
    void *taken = arena->base ? arena->base + arena->used : NULL;
    arena->used = end / 64 * 64;
    return taken;
}

/* The region tables of one head in flight: what the caller did not bring. */
typedef struct {
    void *query, *key, *value, *lse;
    void *query_grad, *key_grad, *value_grad;
    int32_t *count, *pick;
} tables;

typedef struct {
    const cmb_problem *problem;
    const cmb_gradients *gradients;
    const cmb_stage_table *stage;
    int64_t R, N, children; /* the largest of the plans' */
    int64_t units;          /* heads forward, key heads backward */
    int64_t slots;          /* of which in flight at once */
    int workers;
    cmb_cancel *cancel;
    tables *table;         /* [slots] */
    cmb_scratch **scratch; /* [workers] */
    int64_t first, flying; /* forward: the group of heads at hand */
    int32_t wave;
    int64_t *task; /* [slots + 1] first index of each head's tasks in this wave */
} schedule;

static bool keeps_key(const cmb_problem *p) { return p->summary_key.data && p->plan[0]->weighted; }

static void take_memory(schedule *run, cmb_arena *arena, bool backward) {
    const cmb_problem *p = run->problem;
    const size_t R = (size_t)run->R, r = run->stage->size, d = (size_t)p->D * r, dv = (size_t)p->Dv * r;
    const bool summarize = p->stages & CMB_SUMMARIZE;
    tables *table = cmb_take(arena, (size_t)run->slots, sizeof *table);
    cmb_scratch **scratch = cmb_take(arena, (size_t)run->workers, sizeof *scratch);
    int64_t *task = cmb_take(arena, (size_t)run->slots + 1, sizeof *task);
    for (int64_t i = 0; i < run->slots && !arena->overflow; i++) {
        tables t = {0};
        t.count = cmb_take(arena, R, sizeof(int32_t));
        t.pick = cmb_take(arena, R, sizeof(int32_t));
        if (summarize && !p->region_query.data)
            t.query = cmb_take(arena, R, d);
        if (summarize && !p->region_key.data && !keeps_key(p))
            t.key = cmb_take(arena, R, d);
        if (!p->summary_value.data)
            t.value = cmb_take(arena, R, dv);
        if (!p->summary_lse.data)
            t.lse = cmb_take(arena, R, r);
        if (backward && summarize) {
            t.query_grad = cmb_take(arena, R, d);
            t.key_grad = cmb_take(arena, R, d);
            t.value_grad = cmb_take(arena, R, dv);
        }
        if (table)
            table[i] = t;
    }
    for (int i = 0; i < run->workers; i++) {
        cmb_scratch *s = run->stage->scratch(arena, p->D, p->Dv, run->N, run->children, backward);
        if (scratch)
            scratch[i] = s;
    }
    run->table = table;
    run->scratch = scratch;
    run->task = task;
}

/* Below this many query features in all, waking a thread costs more than it gives (about 20 us). */
static const int64_t worth_a_thread = 65536;

/* Heads in flight share each wave's barrier, and the outer cache: the next wave finds there what the last one read. */
static const int64_t bytes_in_flight = 12 << 20;

static void plan_run(schedule *run, const cmb_problem *p, const cmb_gradients *gradients, bool backward) {
    *run = (schedule){.problem = p, .gradients = gradients, .R = most_regions(p)};
    run->stage = p->dtype == CMB_FLOAT32 ? cmb_stages_f32() : cmb_stages_f64();
    for (int64_t i = 0; i < p->plans; i++) {
        const cmb_plan *plan = p->plan[i];
        run->N = plan->N > run->N ? plan->N : run->N;
        for (int32_t s = 0; s < plan->pools; s++)
            run->children = plan->pool[s].child.count > run->children ? plan->pool[s].child.count : run->children;
    }
    const int threads = cmb_get_num_threads();
    const double work = (double)p->B * (double)p->Hq * (double)p->L * (double)(p->D + p->Dv);
    run->units = p->B * (backward ? p->Hk : p->Hq);
    run->workers = work < (double)worth_a_thread ? 1 : threads;
    if (backward) {
        run->workers = run->units < run->workers ? (int)run->units : run->workers;
        run->slots = run->workers;
    } else {
        const int64_t bytes = (p->L + run->R) * (2 * p->D + p->Dv) * (int64_t)run->stage->size;
        const int64_t fit = bytes > 0 ? bytes_in_flight / bytes : INT64_MAX;
        const int64_t fewest = (run->workers + 3) / 4; /* a wave of one head may have few tasks */
        run->slots = fit > fewest ? fit : fewest;
        run->slots = run->slots < run->units ? run->slots : run->units;
        run->slots = run->slots < 1024 ? run->slots : 1024;
    }
}

/* ---- one head ----------------------------------------------------------------------------------- */

static cmb_rows head_of(const cmb_problem *p, const cmb_array *array, size_t size, int64_t b, int64_t h) {
    if (!array->data)
        return (cmb_rows){NULL, 0};
    const int64_t at = b * array->batch + h * array->heads / p->Hq * array->head;
    return (cmb_rows){(char *)array->data + at * (int64_t)size, array->row};
}

static cmb_rows dense(void *data, int64_t row) { return (cmb_rows){data, row}; }

static cmb_head make_head(const schedule *run, const tables *t, int64_t b, int64_t h) {
    const cmb_problem *p = run->problem;
    const size_t size = run->stage->size;
    const int64_t hk = h / (p->Hq / p->Hk);
    const cmb_plan *plan = p->plan[p->plans == 1 ? 0 : b * p->Hk + hk];
    const bool summarize = p->stages & CMB_SUMMARIZE, first = plan->pooling == CMB_POOL_FIRST;
    const bool weighted = summarize && plan->weighted && !p->region_key.data;
    cmb_head head = {
        .plan = plan,
        .stages = p->stages,
        .L = p->L,
        .D = p->D,
        .Dv = p->Dv,
        .scale = p->scale,
        .key_mask = p->key_mask ? p->key_mask + b * p->mask_batch : NULL,
        .mask_row = p->mask_row,
        .all_live = !p->key_mask, /* a region that a plan summarises or attends has a pool, and no pool is empty */
        .pool_query = summarize && !first && !p->region_query.data,
        .pool_key = summarize && !first && !p->region_key.data && !weighted,
        .pick_query = summarize && first && !p->region_query.data,
        .pick_key = summarize && first && !p->region_key.data && !weighted,
        .weighted = weighted,
        .count = t->count,
        .pick = t->pick,
        .query = head_of(p, &p->query, size, b, h),
        .key = head_of(p, &p->key, size, b, h),
        .value = head_of(p, &p->value, size, b, h),
        .region_query = p->region_query.data ? head_of(p, &p->region_query, size, b, h) : dense(t->query, p->D),
        .region_value = p->summary_value.data ? head_of(p, &p->summary_value, size, b, h) : dense(t->value, p->Dv),
        .region_lse = p->summary_lse.data ? head_of(p, &p->summary_lse, size, b, h) : dense(t->lse, 1),
        .out = head_of(p, &p->out, size, b, h),
        .lse = head_of(p, &p->lse, size, b, h),
    };
    if (!summarize || (weighted && p->summary_key.data))
        head.region_key = head_of(p, &p->summary_key, size, b, h);
    else if (p->region_key.data)
        head.region_key = head_of(p, &p->region_key, size, b, h);
    else
        head.region_key = dense(t->key, p->D);
    head.counted = !head.all_live || plan->size_bias || plan->pooling == CMB_POOL_MEAN || plan->pooling == CMB_POOL_SUM;
    return head;
}

/* ---- forward ------------------------------------------------------------------------------------ */

static cmb_head flying_head(const schedule *run, int64_t slot) {
    const int64_t unit = run->first + slot, Hq = run->problem->Hq;
    return make_head(run, &run->table[slot], unit / Hq, unit % Hq);
}

static void clear_counts(const cmb_head *head) {
    memset(head->count, 0, (size_t)head->plan->R * sizeof(int32_t));
    memset(head->pick, 0, (size_t)head->plan->R * sizeof(int32_t));
}

static void begin_head(void *context, int64_t slot, int worker) {
    const schedule *run = context;
    (void)worker;
    const cmb_head head = flying_head(run, slot);
    clear_counts(&head);
    if (head.stages & CMB_ATTEND)
        run->stage->begin(head.L, head.lse);
    if (head.stages & CMB_SUMMARIZE)
        run->stage->begin(run->R, head.region_lse);
}

static void forward_task(void *context, int64_t index, int worker) {
    const schedule *run = context;
    /* The last tasks of a causal plan are the longest: they start first. */
    const int64_t last = run->task[run->flying] - 1 - index;
    int64_t slot = 0;
    while (run->task[slot + 1] <= last)
        slot++;
    const cmb_head head = flying_head(run, slot);
    const int32_t task = head.plan->wave[run->wave] + (int32_t)(last - run->task[slot]);
    run->stage->pool(&head, task, run->scratch[worker]);
    run->stage->tiles(&head, task, run->scratch[worker], run->cancel, worker);
}

static void end_head(void *context, int64_t slot, int worker) {
    const schedule *run = context;
    const cmb_problem *p = run->problem;
    (void)worker;
    const cmb_head head = flying_head(run, slot);
    const int64_t unit = run->first + slot, b = unit / p->Hq, h = unit % p->Hq;
    if (head.stages & CMB_ATTEND)
        run->stage->finish(head.L, head.lse, head.out, head.Dv, (cmb_rows){NULL, 0}, 0);
    if (!(head.stages & CMB_SUMMARIZE))
        return;
    if (p->summary_value.data)
        run->stage->finish(run->R, head.region_lse, head.region_value, head.Dv,
                           head.weighted ? head.region_key : (cmb_rows){NULL, 0}, head.D);
    const bool owner = p->summary_key.data && h % (p->Hq / p->summary_key.heads) == 0;
    if (p->stages == CMB_SUMMARIZE && owner && !head.weighted)
        run->stage->copy_region_keys(&head, run->R, head_of(p, &p->summary_key, run->stage->size, b, h));
}

static void forward(schedule *run) {
    const cmb_problem *p = run->problem;
    for (run->first = 0; run->first < run->units; run->first += run->slots) {
        run->flying = run->units - run->first < run->slots ? run->units - run->first : run->slots;
        cmb_parallel_for(run->flying, run->workers, begin_head, run, run->cancel);
        int32_t waves = 0;
        for (int64_t i = 0; i < p->plans; i++)
            waves = p->plan[i]->waves > waves ? p->plan[i]->waves : waves;
        for (run->wave = 0; run->wave < waves; run->wave++) {
            run->task[0] = 0;
            for (int64_t slot = 0; slot < run->flying; slot++) {
                const cmb_plan *plan = flying_head(run, slot).plan;
                const int32_t tasks = run->wave < plan->waves ? plan->wave[run->wave + 1] - plan->wave[run->wave] : 0;
                run->task[slot + 1] = run->task[slot] + tasks;
            }
            cmb_parallel_for(run->task[run->flying], run->workers, forward_task, run, run->cancel);
        }
        cmb_parallel_for(run->flying, run->workers, end_head, run, run->cancel);
    }
}

/* ---- backward ----------------------------------------------------------------------------------- */

/* Zeros, some rows at a time: the first touch of new memory is slow enough for Ctrl-C to be waited for. */
static void clear(const schedule *run, cmb_rows rows, int64_t n, int64_t dim, int worker) {
    enum { SLICE = 4096 };
    for (int64_t x = 0; x < n && !cmb_cancelled(run->cancel, worker); x += SLICE) {
        const int64_t at = x * rows.row * (int64_t)run->stage->size;
        run->stage->clear(dense((char *)rows.data + at, rows.row), n - x < SLICE ? n - x : SLICE, dim);
    }
}

/* Where a head's gradients go; those that query heads of a group share are cleared by the first of them. */
static void begin_gradients(const schedule *run, cmb_head *head, const tables *t, int64_t b, int64_t h, int worker) {
    const cmb_problem *p = run->problem;
    const cmb_gradients *g = run->gradients;
    const cmb_stage_table *stage = run->stage;
    const int64_t R = run->R, group = p->Hq / p->Hk;
    const bool summarize = p->stages & CMB_SUMMARIZE, first = h % group == 0;
    const cmb_rows nothing = {NULL, 0};
    head->grad.query = head_of(p, &g->query, stage->size, b, h);
    head->grad.key = head_of(p, &g->key, stage->size, b, h);
    head->grad.value = head_of(p, &g->value, stage->size, b, h);
    head->grad.out = head_of(p, &g->out, stage->size, b, h);
    head->grad.lse = head_of(p, &g->lse, stage->size, b, h);
    clear(run, head->grad.query, p->L, p->D, worker);
    if (first) {
        clear(run, head->grad.key, p->L, p->D, worker);
        clear(run, head->grad.value, p->L, p->Dv, worker);
    }
    if (!summarize) {
        head->grad.region_key = head_of(p, &g->summary_key, stage->size, b, h);
        head->grad.region_value = head_of(p, &g->summary_value, stage->size, b, h);
        if (first || p->summary_key.heads == p->Hq)
            clear(run, head->grad.region_key, R, p->D, worker);
        clear(run, head->grad.region_value, R, p->Dv, worker);
        return;
    }
    const bool given_key = p->region_key.data != NULL;
    const bool shared_key = given_key && !first && p->region_key.heads != p->Hq;
    /* A summary_key of Hk heads is one thing to a group, so its gradient enters once. */
    const bool enters = g->summary_key.data && h % (p->Hq / g->summary_key.heads) == 0;
    head->grad.region_query =
        p->region_query.data ? head_of(p, &g->region_query, stage->size, b, h) : dense(t->query_grad, p->D);
    head->grad.region_key = given_key ? head_of(p, &g->region_key, stage->size, b, h) : dense(t->key_grad, p->D);
    head->grad.region_value = dense(t->value_grad, p->Dv);
    clear(run, head->grad.region_query, R, p->D, worker);
    stage->begin_gradient(R, head->region_lse, enters ? head_of(p, &g->summary_key, stage->size, b, h) : nothing, p->D,
                          head->grad.region_key, shared_key);
    stage->begin_gradient(R, head->region_lse, head_of(p, &g->summary_value, stage->size, b, h), p->Dv,
                          head->grad.region_value, false);
}

static void backward_unit(void *context, int64_t unit, int worker) {
    const schedule *run = context;
    const cmb_problem *p = run->problem;
    const int64_t b = unit / p->Hk, hk = unit % p->Hk, group = p->Hq / p->Hk;
    const tables *t = &run->table[worker];
    cmb_scratch *scratch = run->scratch[worker];
    for (int64_t h = hk * group; h < (hk + 1) * group; h++) {
        cmb_head head = make_head(run, t, b, h);
        begin_gradients(run, &head, t, b, h, worker);
        clear_counts(&head);
        for (int32_t task = 0; task < head.plan->tasks && !cmb_cancelled(run->cancel, worker); task++)
            run->stage->pool(&head, task, scratch);
        for (int32_t wave = head.plan->waves - 1; wave >= 0; wave--)
            for (int32_t task = head.plan->wave[wave + 1] - 1; task >= head.plan->wave[wave]; task--) {
                if (cmb_cancelled(run->cancel, worker))
                    return;
                run->stage->tiles_backward(&head, task, scratch, run->cancel, worker);
                if (head.stages & CMB_SUMMARIZE)
                    run->stage->pool_backward(&head, task, scratch);
            }
    }
}

/* ---- entry points ------------------------------------------------------------------------------- */

static cmb_status execute(const cmb_problem *problem, const cmb_gradients *gradients, bool backward,
                          const cmb_interrupt *interrupt, size_t *only_bytes, cmb_error *error) {
    TRY(check_problem(problem, backward, error));
    if (backward && !only_bytes)
        TRY(check_gradients(problem, gradients, error));
    schedule run;
    cmb_cancel cancel;
    cmb_arena arena = {0};
    plan_run(&run, problem, gradients, backward);
    if (run.units == 0) {
        if (only_bytes)
            *only_bytes = 0;
        return CMB_OK;
    }
    take_memory(&run, &arena, backward);
    if (arena.overflow)
        return cmb_fail(error, CMB_ERR_OVERFLOW, "the workspace does not fit in memory's addresses");
    if (only_bytes) {
        *only_bytes = arena.used;
        return CMB_OK;
    }
    const size_t bytes = arena.used;
    void *memory = cmb_allocate(bytes);
    if (!memory)
        return cmb_fail(error, CMB_ERR_MEMORY, "no memory for a workspace of %zu bytes", bytes);
    arena = (cmb_arena){.base = memory};
    take_memory(&run, &arena, backward);
    run.cancel = &cancel;
    cmb_cancel_init(&cancel, interrupt);
    if (backward)
        cmb_parallel_for(run.units, run.workers, backward_unit, &run, &cancel);
    else
        forward(&run);
    cmb_release(memory);
    if (atomic_load(&cancel.stop))
        return cmb_fail(error, CMB_ERR_CANCELLED, "cancelled");
    return CMB_OK;
}

cmb_status cmb_forward(const cmb_problem *problem, const cmb_interrupt *interrupt, cmb_error *error) {
    return execute(problem, NULL, false, interrupt, NULL, error);
}

cmb_status cmb_backward(const cmb_problem *problem, const cmb_gradients *gradients, const cmb_interrupt *interrupt,
                        cmb_error *error) {
    return execute(problem, gradients, true, interrupt, NULL, error);
}

cmb_status cmb_workspace_bytes(const cmb_problem *problem, bool backward, size_t *bytes, cmb_error *error) {
    return execute(problem, NULL, backward, NULL, bytes, error);
}

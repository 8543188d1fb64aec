// SPDX-License-Identifier: Apache-2.0
/*
 * Runs a problem: checks everything, takes all memory, then schedules waves of tasks over heads. Forward
 * runs every wave over a group of heads at once, each (head, task) pair on whichever thread is free. Backward
 * adds into rows that tasks and query heads share, so one thread takes a key head with all its query heads
 * and runs its tasks in reverse: that order, not the threads, decides the bits. Heads that would leave threads idle
 * are shared by several, in turns that keep it (turns.h).
 */
#include "plan.h"
#include "stages.h"

#include <math.h>
#include <string.h>

/* ---- checks ------------------------------------------------------------------------------------- */

/* The offset of the last element must be addressable: strides may be anything that is. */
cmb_status cmb_check_array(const char *name, const cmb_array *array, int64_t B, int64_t heads, int64_t rows,
                           int64_t dim, cmb_error *error) {
    if (!array->data)
        return cmb_fail(error, CMB_ERR_VALUE, "%s is missing", name);
    if (array->heads != heads)
        return cmb_fail(error, CMB_ERR_VALUE, "%s must have %lld heads, got %lld", name, (long long)heads,
                        (long long)array->heads);
    const int64_t counts[] = {B, heads, rows}, strides[] = {array->batch, array->head, array->row};
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

static cmb_status check_array(const char *name, const cmb_array *array, const cmb_problem *p, int64_t heads,
                              int64_t rows, int64_t dim, cmb_error *error) {
    return cmb_check_array(name, array, p->B, heads, rows, dim, error);
}

/* Which of key or query heads a region array has. */
static int64_t either(const cmb_array *array, const cmb_problem *p) { return array->heads == p->Hk ? p->Hk : p->Hq; }

/* ---- segments: positions first, .. of the problem, regions region, .. of its region axis ---- */

typedef struct {
    int64_t first, L;
    int64_t region, R;
    const cmb_plan *const *plan; /* one, or [B, Hk] */
} segment;

static int64_t segments_of(const cmb_problem *p) { return p->segment ? p->segments : 1; }

/* Segment s, whose regions follow the first `region`. */
static segment segment_of(const cmb_problem *p, int64_t s, int64_t region) {
    const int64_t plans = segments_of(p) ? p->plans / segments_of(p) : 0;
    segment it = {.L = p->L, .region = region, .plan = p->plan + s * plans};
    if (p->segment) {
        it.first = p->segment[s];
        it.L = p->segment[s + 1] - it.first;
    }
    for (int64_t i = 0; i < plans; i++)
        it.R = it.plan[i]->R > it.R ? it.plan[i]->R : it.R;
    return it;
}

static int64_t count_regions(const cmb_problem *p) {
    int64_t R = 0;
    for (int64_t s = 0; s < segments_of(p); s++)
        R += segment_of(p, s, 0).R;
    return R;
}

static cmb_status check_segments(const cmb_problem *p, cmb_error *error) {
    if (!p->segment)
        return CMB_OK;
    if (p->segments < 0 || p->segments > INT32_MAX)
        return cmb_fail(error, CMB_ERR_VALUE, "segments must be between 0 and 2^31 - 1, got %lld",
                        (long long)p->segments);
    for (int64_t s = 0, before = 0; s <= p->segments; before = p->segment[s++])
        if (p->segment[s] < before || p->segment[s] > p->L || (s == 0 && p->segment[s] != 0) ||
            (s == p->segments && p->segment[s] != p->L))
            return cmb_fail(error, CMB_ERR_VALUE, "segment must run from 0 to %lld and not decrease, got %lld at %lld",
                            (long long)p->L, (long long)p->segment[s], (long long)s);
    return CMB_OK;
}

static cmb_status check_problem(const cmb_problem *p, bool backward, cmb_error *error) {
    if (p->dtype < CMB_FLOAT32 || p->dtype > CMB_FLOAT16)
        return cmb_fail(error, CMB_ERR_VALUE, "dtype must be between 0 and 3, got %d", (int)p->dtype);
    if (p->stages < CMB_SUMMARIZE || p->stages > CMB_BOTH)
        return cmb_fail(error, CMB_ERR_VALUE, "stages must be 1, 2 or 3, got %d", (int)p->stages);
    const struct {
        const char *name;
        int64_t value, least, most;
    } sizes[] = {
        {"B", p->B, 0, INT64_MAX}, {"Hq", p->Hq, 0, INT64_MAX},       {"Hk", p->Hk, 0, INT64_MAX},
        {"L", p->L, 0, INT32_MAX}, {"D", p->D, 1, CMB_MOST_FEATURES}, {"Dv", p->Dv, 1, CMB_MOST_FEATURES},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < sizes[i].least || sizes[i].value > sizes[i].most)
            return cmb_fail(error, CMB_ERR_VALUE, "%s must be between %lld and %lld, got %lld", sizes[i].name,
                            (long long)sizes[i].least, (long long)sizes[i].most, (long long)sizes[i].value);
    if (p->Hk == 0 ? p->Hq != 0 : p->Hq % p->Hk != 0)
        return cmb_fail(error, CMB_ERR_VALUE, "query heads must be a multiple of key heads, got %lld and %lld",
                        (long long)p->Hq, (long long)p->Hk);
    if (p->adds && p->dtype != CMB_FLOAT32 && p->dtype != CMB_FLOAT64)
        return cmb_fail(error, CMB_ERR_VALUE, "adds must be false for 16-bit dtypes");
    if (!isfinite(p->scale))
        return cmb_fail(error, CMB_ERR_VALUE, "scale must be finite, got %g", p->scale);
    if (!(p->dropout_p >= 0 && p->dropout_p <= 1))
        return cmb_fail(error, CMB_ERR_VALUE, "dropout_p must be between 0 and 1, got %g", p->dropout_p);
    TRY(check_segments(p, error));
    int64_t heads, rows, key_heads;
    if (__builtin_mul_overflow(p->B, p->Hq, &heads) || __builtin_mul_overflow(heads, p->L, &rows))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "B * Hq * L does not fit in 64 bits");
    if (__builtin_mul_overflow(p->B, p->Hk, &key_heads))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "B * Hk does not fit in 64 bits");
    const int64_t segments = segments_of(p);
    int64_t most;
    if (__builtin_mul_overflow(segments, key_heads, &most) || (p->plans != segments && p->plans != most))
        return cmb_fail(error, CMB_ERR_VALUE, "plans must be 1 or B * Hk = %lld, for each of %lld segments, got %lld",
                        (long long)key_heads, (long long)segments, (long long)p->plans);
    for (int64_t i = 0; i < p->plans; i++)
        if (!p->plan || !p->plan[i])
            return cmb_fail(error, CMB_ERR_VALUE, "plan is missing");
    for (int64_t i = 0; i < p->plans; i++) {
        const cmb_plan *plan = p->plan[i], *first = p->plan[0];
        const int64_t L = segment_of(p, i / (p->plans / segments), 0).L;
        if (plan->L != L)
            return cmb_fail(error, CMB_ERR_VALUE, "plan must be of length %lld, got %lld", (long long)L,
                            (long long)plan->L);
        if (plan->only_attends && p->stages & CMB_SUMMARIZE)
            return cmb_fail(error, CMB_ERR_VALUE,
                            "plan must pool the regions it attends, or they must be given to attend");
        if (plan->pooling != first->pooling || plan->size_bias != first->size_bias ||
            plan->weighted != first->weighted || plan->is_causal != first->is_causal)
            return cmb_fail(error, CMB_ERR_VALUE,
                            "plans of one call must agree in pooling, size_bias, weighted and "
                            "is_causal");
    }
    const int64_t R = count_regions(p);
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
    const int64_t R = count_regions(p);
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

/* The tables of one head in flight: of regions what the caller did not bring; where his elements are narrower than
 * those computed with, whatever is written; and where it is added to his, what positions get. NULL: the caller's own
 * rows are computed with. */
typedef struct {
    void *query, *key, *value, *lse;
    void *query_grad, *key_grad, *value_grad;
    struct {
        void *result;
        void *query_grad, *key_grad, *value_grad;
    } position;
    int32_t *count, *pick;
    int32_t *order; /* backward: [tasks] as one thread takes them forward */
    struct {
        uint8_t *query, *key, *value, *region_query, *region_key, *region_value;
    } stale; /* of the gradients */
} tables;

/* What a unit of work is: a head, query or key, of one segment of a batch entry. Heads are innermost: those in flight
 * share their positions. */
typedef struct {
    int64_t b, h;
    int64_t s; /* the segment's number */
    segment segment;
} unit;

/* Backward, of a head that workers share. */
typedef struct {
    unit unit;
    cmb_head head;
    cmb_turns turns;
    int32_t *first_item; /* [tasks + 1] of each task in order */
} shared_head;

typedef struct {
    const cmb_problem *problem;
    const cmb_gradients *gradients;
    const cmb_stage_table *stage;
    bool widens;                      /* the caller's elements are narrower than those computed with */
    int64_t L, R, N, children, tasks; /* the largest of the segments' and plans' */
    bool resumes;                     /* so are the results between two tiles of a query */
    int64_t own_queries;              /* of these, q_R that a worker has for the task at hand, */
    int64_t queries;                  /* and that are in tables: all R where there are none of the former */
    int64_t segments;
    segment *segment; /* [segments] */
    int64_t units;    /* heads of segments forward, key heads backward */
    int64_t shared;   /* backward: of these, the last ones, fewer than workers, who share them */
    int64_t slots;    /* of which in flight at once */
    int workers;
    cmb_cancel *cancel;
    tables *table;         /* [slots] */
    cmb_scratch **scratch; /* [workers] */
    shared_head *together; /* [shared] */
    int64_t touched;       /* gradient rows that a tile, or a task's pools, touch: at most so many */
    cmb_item *item;        /* [workers] where heads are shared */
    int64_t member;        /* then: of each key head's query heads the one at hand */
    int64_t first, flying; /* forward: the group of heads at hand */
    int32_t waves, wave;   /* the most of a plan, and the one at hand */
    int64_t *task;         /* [slots + 1] first index of each head's tasks in this wave, or of each team's in all */
    bool fused;            /* forward: task by task through all waves, so that a task finds its rows in the cache */
    atomic_int *through;   /* [slots][waves] then: tasks of the head that are through with a wave */
} schedule;

static bool pools_query(const cmb_problem *p) {
    return p->stages & CMB_SUMMARIZE && !p->region_query.data && p->plan[0]->pooling != CMB_POOL_FIRST;
}

static bool picks_key(const cmb_problem *p) { return p->plan[0]->pooling == CMB_POOL_FIRST && !p->plan[0]->weighted; }

static bool keeps_key(const cmb_problem *p) { return p->summary_key.data && p->plan[0]->weighted; }

/* Where k_R is, or is to be kept. */
static const cmb_array *region_key_of(const cmb_problem *p) {
    return !(p->stages & CMB_SUMMARIZE) || (!p->region_key.data && keeps_key(p)) ? &p->summary_key : &p->region_key;
}

static void take_memory(schedule *run, cmb_arena *arena, bool backward) {
    const cmb_problem *p = run->problem;
    const size_t L = (size_t)run->L, R = (size_t)run->R, r = run->stage->size, d = (size_t)p->D * r,
                 dv = (size_t)p->Dv * r;
    const bool apart = run->widens || p->adds;
    const bool summarize = p->stages & CMB_SUMMARIZE, attend = p->stages & CMB_ATTEND;
    segment *segments = cmb_take(arena, (size_t)run->segments, sizeof *segments);
    tables *table = cmb_take(arena, (size_t)run->slots, sizeof *table);
    cmb_scratch **scratch = cmb_take(arena, (size_t)run->workers, sizeof *scratch);
    int64_t *task = cmb_take(arena, (size_t)run->slots + 1, sizeof *task);
    atomic_int *through = cmb_take(arena, run->fused ? (size_t)(run->slots * run->waves) : 0, sizeof *through);
    for (int64_t i = 0; i < run->slots && !arena->overflow; i++) {
        tables t = {0};
        t.count = cmb_take(arena, R, sizeof(int32_t));
        t.pick = cmb_take(arena, p->plan[0]->pooling == CMB_POOL_FIRST ? R : 0, sizeof(int32_t));
        if (p->region_query.data ? summarize && run->widens : pools_query(p))
            t.query = cmb_take(arena, (size_t)run->queries, d);
        if (region_key_of(p)->data ? run->widens : summarize && !picks_key(p))
            t.key = cmb_take(arena, R, d);
        if (run->widens || !p->summary_value.data)
            t.value = cmb_take(arena, R, dv);
        if (!p->summary_lse.data)
            t.lse = cmb_take(arena, R, r);
        if (backward && summarize && (run->widens || !p->region_query.data))
            t.query_grad = cmb_take(arena, (size_t)run->queries, d);
        if (backward && (run->widens || (summarize && !p->region_key.data)))
            t.key_grad = cmb_take(arena, R, d);
        if (backward && (run->widens || summarize))
            t.value_grad = cmb_take(arena, R, dv);
        if (backward && apart) {
            t.position.query_grad = cmb_take(arena, L, d);
            t.position.key_grad = cmb_take(arena, L, d);
            t.position.value_grad = cmb_take(arena, L, dv);
        }
        if (!backward && apart && attend && run->resumes)
            t.position.result = cmb_take(arena, L, dv);
        t.order = cmb_take(arena, backward ? (size_t)run->tasks : 0, sizeof(int32_t));
        if (backward) {
            uint8_t **const stale[] = {&t.stale.query,        &t.stale.key,        &t.stale.value,
                                       &t.stale.region_query, &t.stale.region_key, &t.stale.region_value};
            for (int n = 0; n < 6; n++)
                *stale[n] = cmb_take(arena, (size_t)cmb_blocks(n < 3 ? run->L : run->R), 1);
        }
        if (table)
            table[i] = t;
    }
    for (int i = 0; i < run->workers; i++) {
        cmb_scratch *s = run->stage->scratch(arena, p->D, p->Dv, run->N, run->own_queries, run->children,
                                             p->dropout_p > 0, backward);
        if (scratch)
            scratch[i] = s;
    }
    for (int64_t s = 0, region = 0; segments && s < run->segments; region += segments[s++].R)
        segments[s] = segment_of(p, s, region);
    const size_t rows = 2 * (size_t)(run->L + run->R);
    shared_head *together = cmb_take(arena, (size_t)run->shared, sizeof *together);
    for (int64_t n = 0; n < run->shared; n++) {
        const shared_head own = {.turns = {.asked = cmb_take(arena, rows, sizeof *own.turns.asked),
                                           .through = cmb_take(arena, rows, sizeof *own.turns.through)},
                                 .first_item = cmb_take(arena, (size_t)run->tasks + 1, sizeof *own.first_item)};
        if (together)
            together[n] = own;
    }
    cmb_item *item = cmb_take(arena, run->shared > 0 ? (size_t)run->workers : 0, sizeof *item);
    for (int i = 0; i < run->workers && run->shared > 0; i++) {
        const cmb_item own = {
            .worker = i, .cancel = run->cancel, .turn = cmb_take(arena, (size_t)run->touched, sizeof *own.turn)};
        if (item)
            item[i] = own;
    }
    run->segment = segments;
    run->table = table;
    run->scratch = scratch;
    run->task = task;
    run->through = through;
    run->together = together;
    run->item = item;
}

static int32_t tasks_in(const cmb_plan *plan, int32_t wave) {
    return wave < plan->waves ? plan->wave[wave + 1] - plan->wave[wave] : 0;
}

static int32_t longest_wave(const cmb_plan *plan) {
    int32_t most = 0;
    for (int32_t wave = 0; wave < plan->waves; wave++)
        most = tasks_in(plan, wave) > most ? tasks_in(plan, wave) : most;
    return most;
}

/* Gradient rows that an item lists, at most (turns.h). */
static int64_t most_touched(const cmb_plan *plan) {
    int64_t most = 0;
    for (int32_t tile = 0; tile < plan->tiles; tile++) {
        int64_t rows = 2 * (int64_t)plan->tile[tile].query.count;
        for (int32_t run = plan->tile[tile].run; run < plan->tile[tile + 1].run; run++)
            rows += plan->run[run].row.count;
        most = rows > most ? rows : most;
    }
    for (int32_t task = 0; task < plan->tasks; task++) {
        int64_t rows = 0;
        for (int32_t p = plan->task[task].pool; p < plan->task[task + 1].pool; p++)
            rows += 2 * (1 + (int64_t)plan->pool[p].child.count);
        most = rows > most ? rows : most;
    }
    return most;
}

/* Below this many query features in all, waking a thread costs more than it gives (about 20 us). */
static const int64_t worth_a_thread = 65536;

/* Heads in flight share each wave's barrier, and the outer cache: the next wave finds there what the last one read. */
static const int64_t bytes_in_flight = 12 << 20;

static void plan_run(schedule *run, const cmb_problem *p, const cmb_gradients *gradients, bool backward) {
    *run = (schedule){.problem = p, .gradients = gradients, .segments = segments_of(p)};
    static const cmb_stage_table *(*const stages[])(void) = {
        [CMB_FLOAT32] = cmb_stages_f32,
        [CMB_FLOAT64] = cmb_stages_f64,
        [CMB_BFLOAT16] = cmb_stages_bf16,
        [CMB_FLOAT16] = cmb_stages_f16,
    };
    run->stage = stages[p->dtype]();
    run->widens = run->stage->stored_size < run->stage->size;
    for (int64_t s = 0; s < run->segments; s++) {
        const segment it = segment_of(p, s, 0);
        run->L = it.L > run->L ? it.L : run->L;
        run->R = it.R > run->R ? it.R : run->R;
    }
    int64_t fewest_tasks = INT32_MAX; /* of a head at once, at most: those of its longest wave */
    int64_t own = 0, shared = 0;
    bool found = true;
    run->fused = !backward;
    for (int64_t i = 0; i < p->plans; i++) {
        const cmb_plan *plan = p->plan[i];
        run->waves = plan->waves > run->waves ? plan->waves : run->waves;
        run->fused = run->fused && plan->is_fusible;
        run->resumes = run->resumes || plan->resumes;
        found = found && plan->query_row;
        own = plan->own_queries > own ? plan->own_queries : own;
        shared = plan->shared_queries > shared ? plan->shared_queries : shared;
        fewest_tasks = cmb_least(fewest_tasks, longest_wave(plan));
        run->tasks = plan->tasks > run->tasks ? plan->tasks : run->tasks;
        run->N = plan->N > run->N ? plan->N : run->N;
        for (int32_t s = 0; s < plan->pools; s++)
            run->children = plan->pool[s].child.count > run->children ? plan->pool[s].child.count : run->children;
    }
    const int threads = cmb_get_num_threads();
    /* A query attends some 64 rows and more; a few queries may attend any number of regions that are given. */
    const int64_t rows = p->L + (p->stages == CMB_ATTEND ? run->R / 64 : 0);
    const double work = (double)p->B * (double)p->Hq * (double)rows * (double)(p->D + p->Dv);
    run->units = p->B * run->segments * (backward ? p->Hk : p->Hq);
    run->workers = work < (double)worth_a_thread ? 1 : threads;
    if (backward) {
        run->shared = run->workers > 1 ? run->units % run->workers : 0;
        for (int64_t i = 0; run->shared > 0 && i < p->plans; i++) {
            const int64_t touched = most_touched(p->plan[i]);
            run->touched = touched > run->touched ? touched : run->touched;
        }
        run->slots = cmb_least(run->units, run->workers);
    } else {
        /* Of a head that is fused the longest tasks come last: there must be many. */
        run->fused = run->fused && (run->workers == 1 || run->units * fewest_tasks >= 16 * run->workers);
        const bool meets_results = (run->widens || p->adds) && run->resumes;
        const int64_t rows_met = run->fused && !meets_results ? run->R : run->L + run->R;
        const int64_t bytes = rows_met * (2 * p->D + p->Dv) * (int64_t)run->stage->size;
        const int64_t fit = bytes > 0 ? bytes_in_flight / bytes : INT64_MAX;
        /* A wave of one head may have few tasks, or one, and a head fused makes its workers wait for one another. */
        const int64_t fewest =
            fewest_tasks < 4 ? run->workers : cmb_least(run->workers, (run->workers + 3) / 4 + run->fused);
        run->slots = fit > fewest ? fit : fewest;
        run->slots = run->slots < run->units ? run->slots : run->units;
        run->slots = run->slots < 1024 ? run->slots : 1024;
    }
    /* A head that workers share has a task's tiles on several. */
    const bool fits = run->workers * own + run->slots * shared < run->slots * run->R;
    const bool apart = found && own > 0 && run->shared == 0 && fits && pools_query(p);
    run->own_queries = apart ? own : 0;
    run->queries = apart ? shared : run->R;
}

/* ---- one head ----------------------------------------------------------------------------------- */

static unit unit_of(const schedule *run, int64_t n, int64_t heads) {
    const int64_t s = n / heads % run->segments;
    return (unit){.b = n / heads / run->segments, .h = n % heads, .s = s, .segment = run->segment[s]};
}

static cmb_rows dense(void *data, int64_t row) { return (cmb_rows){.data = data, .row = row}; }

/* Rows first, .. of what the unit's query head reads of an array with elements of `size` bytes. */
static cmb_rows rows_of(const cmb_problem *p, const cmb_array *array, size_t size, const unit *u, int64_t first) {
    if (!array->data)
        return (cmb_rows){0};
    const int64_t at = u->b * array->batch + u->h * array->heads / p->Hq * array->head + first * array->row;
    return dense((char *)array->data + at * (int64_t)size, array->row);
}

/* The caller's rows of positions and of regions, as stored; of lse as computed. */
static cmb_rows positions(const schedule *run, const cmb_array *array, const unit *u) {
    return rows_of(run->problem, array, run->stage->stored_size, u, u->segment.first);
}

static cmb_rows regions(const schedule *run, const cmb_array *array, const unit *u) {
    return rows_of(run->problem, array, run->stage->stored_size, u, u->segment.region);
}

static cmb_rows position_lse(const schedule *run, const cmb_array *array, const unit *u) {
    return rows_of(run->problem, array, run->stage->size, u, u->segment.first);
}

/* What is computed with: the table's own rows where it has any, else the caller's. */
static cmb_rows computed(cmb_rows caller, void *own, int64_t dim) { return own ? dense(own, dim) : caller; }

static cmb_dropout dropout_of(const cmb_problem *p, const unit *u) {
    return (cmb_dropout){
        .threshold = (uint32_t)ceil(p->dropout_p * (1 << 24)),
        .factor = p->dropout_p < 1 ? 1 / (1 - p->dropout_p) : 0,
        .head = (uint32_t)u->h,
        .batch = (uint32_t)u->b,
        .row = p->dropout_row ? (uint32_t)p->dropout_row[u->s] : 0,
        .seed = p->seed,
    };
}

static cmb_head make_head(const schedule *run, const tables *t, const unit *u) {
    const cmb_problem *p = run->problem;
    const int64_t hk = u->h / (p->Hq / p->Hk);
    const cmb_plan *plan = u->segment.plan[p->plans == run->segments ? 0 : u->b * p->Hk + hk];
    const bool summarize = p->stages & CMB_SUMMARIZE, first = plan->pooling == CMB_POOL_FIRST;
    const bool weighted = summarize && plan->weighted && !p->region_key.data, known = plan->pick && !p->key_mask;
    cmb_head head = {
        .plan = plan,
        .stages = p->stages,
        .L = u->segment.L,
        .D = p->D,
        .Dv = p->Dv,
        .R = u->segment.R,
        .scale = p->scale,
        .dropout = dropout_of(p, u),
        .key_mask = p->key_mask ? p->key_mask + u->b * p->mask_batch + u->segment.first * p->mask_row : NULL,
        .mask_row = p->mask_row,
        .all_live = !p->key_mask, /* a region that a plan summarises or attends has a pool, and no pool is empty */
        .pool_query = pools_query(p),
        .query_row = run->own_queries ? plan->query_row : NULL,
        .pool_key = summarize && !first && !p->region_key.data && !weighted,
        .pick_query = summarize && first && !p->region_query.data,
        .pick_key = summarize && first && !p->region_key.data && !weighted,
        .weighted = weighted,
        .count = t->count,
        .pick = known ? plan->pick : t->pick,
        .picked = known || !first ? NULL : t->pick,
        .query = positions(run, &p->query, u),
        .key = positions(run, &p->key, u),
        .value = positions(run, &p->value, u),
        .region_query = computed(regions(run, &p->region_query, u), t->query, p->D),
        .region_key = computed(regions(run, region_key_of(p), u), t->key, p->D),
        .region_value = computed(regions(run, &p->summary_value, u), t->value, p->Dv),
        .region_lse = computed(rows_of(p, &p->summary_lse, run->stage->size, u, u->segment.region), t->lse, 1),
        .out = positions(run, &p->out, u),
        .lse = position_lse(run, &p->lse, u),
    };
    if (plan->resumes || !(run->widens || p->adds))
        head.result = computed(head.out, t->position.result, p->Dv);
    head.counted = !head.all_live || plan->size_bias || plan->pooling == CMB_POOL_MEAN || plan->pooling == CMB_POOL_SUM;
    return head;
}

/* ---- forward ------------------------------------------------------------------------------------ */

static cmb_head flying_head(const schedule *run, int64_t slot) {
    const unit u = unit_of(run, run->first + slot, run->problem->Hq);
    return make_head(run, &run->table[slot], &u);
}

/* What the caller brings of the regions, as it is computed with. */
static void widen_regions(const schedule *run, const cmb_head *head, const unit *u, bool backward, int worker) {
    const cmb_problem *p = run->problem;
    if (!run->widens)
        return;
    const bool attend_alone = !(p->stages & CMB_SUMMARIZE);
    const cmb_array *query = &p->region_query, *key = region_key_of(p), *value = &p->summary_value;
    if (query->data && !attend_alone)
        run->stage->widen(head->R, head->D, regions(run, query, u), head->region_query, run->scratch[worker]);
    if (key->data && (key == &p->region_key || attend_alone || backward))
        run->stage->widen(head->R, head->D, regions(run, key, u), head->region_key, run->scratch[worker]);
    if (value->data && (attend_alone || backward))
        run->stage->widen(head->R, head->Dv, regions(run, value, u), head->region_value, run->scratch[worker]);
}

static void clear_counts(const cmb_head *head) {
    memset(head->count, 0, (size_t)head->plan->R * sizeof(int32_t));
    for (int32_t r = 0; head->plan->only_attends && r < head->plan->R; r++)
        head->count[r] = 1; /* whatever it stands for, it is there */
    if (head->picked)
        memset(head->picked, 0, (size_t)head->plan->R * sizeof(int32_t));
}

static void begin_head(void *context, int64_t slot, int worker) {
    const schedule *run = context;
    const unit u = unit_of(run, run->first + slot, run->problem->Hq);
    const cmb_head head = make_head(run, &run->table[slot], &u);
    clear_counts(&head);
    widen_regions(run, &head, &u, false, worker);
    if (head.stages & CMB_ATTEND)
        run->stage->begin(head.L, head.lse);
    if (head.stages & CMB_SUMMARIZE)
        run->stage->begin(head.R, head.region_lse);
}

/* The head, or team of heads, whose tasks hold the index-th. */
static int64_t part_of(const schedule *run, int64_t index) {
    int64_t part = 0;
    while (run->task[part + 1] <= index)
        part++;
    return part;
}

/* Of another task the tile in the same place, or -1. */
static int32_t counterpart(const cmb_plan *plan, int32_t tile, int32_t task, int32_t other) {
    if (other < 0)
        return -1;
    tile += plan->task[other].tile - plan->task[task].tile;
    return tile < plan->task[other + 1].tile ? tile : -1;
}

/* `ahead` is a task that the worker has before it, or -1. */
static void forward_task(const schedule *run, const cmb_head *head, int32_t task, int32_t ahead, int worker) {
    const cmb_plan *plan = head->plan;
    run->stage->pool(head, task, run->scratch[worker]);
    for (int32_t tile = plan->task[task].tile; tile < plan->task[task + 1].tile; tile++)
        run->stage->tile(head, tile, counterpart(plan, tile, task, ahead), run->scratch[worker], run->cancel, worker);
}

static void task_of_wave(void *context, int64_t index, int worker) {
    const schedule *run = context;
    /* The last tasks of a causal plan are the longest: they start first. */
    const int64_t last = run->task[run->flying] - 1 - index, slot = part_of(run, last);
    const cmb_head head = flying_head(run, slot);
    const int32_t first = head.plan->wave[run->wave], t = (int32_t)(last - run->task[slot]);
    forward_task(run, &head, first + t, t >= run->workers ? first + t - run->workers : -1, worker);
}

/* As many heads as there are workers go together: of each the t-th tasks of all waves, then those after them. So a
 * worker rarely waits for another. */
typedef struct {
    int64_t slot; /* the first's */
    int64_t heads;
} team;

static team team_of(const schedule *run, int64_t number) {
    const int64_t slot = number * run->workers;
    return (team){slot, cmb_least(run->workers, run->flying - slot)};
}

/* A wave may need what the tasks before did in the one before: they began earlier, and the first of those at work waits
 * for nobody. */
static void tasks_of_waves(void *context, int64_t index, int worker) {
    const schedule *run = context;
    const int64_t number = part_of(run, index), within = index - run->task[number];
    const team own = team_of(run, number);
    const int64_t slot = own.slot + within % own.heads;
    const cmb_head head = flying_head(run, slot);
    const int32_t t = (int32_t)(within / own.heads), next = t + (int32_t)(run->workers / own.heads);
    for (int32_t wave = 0; wave < head.plan->waves; wave++) {
        atomic_int *through = &run->through[slot * run->waves + wave];
        const int32_t first = head.plan->wave[wave], tasks = tasks_in(head.plan, wave);
        if (t < tasks)
            forward_task(run, &head, first + t, next < tasks ? first + next : -1, worker);
        if (wave == head.plan->waves - 1 || !cmb_wait(through, t, run->cancel, worker))
            return;
        atomic_store_explicit(through, t + 1, memory_order_release);
    }
}

/* Rows that are done, to the caller where they are not his: narrower, or added to his. Those without an lse hold
 * nothing. */
static void deliver(const schedule *run, int64_t n, int64_t dim, cmb_rows lse, cmb_rows from, cmb_rows to, int worker) {
    if (!from.data || !to.data || from.data == to.data)
        return;
    if (run->widens)
        run->stage->narrow(n, dim, from, to, run->scratch[worker]);
    else
        run->stage->add(n, dim, lse, from, to, run->scratch[worker]);
}

static void end_head(void *context, int64_t slot, int worker) {
    const schedule *run = context;
    const cmb_problem *p = run->problem;
    const unit u = unit_of(run, run->first + slot, p->Hq);
    const cmb_head head = make_head(run, &run->table[slot], &u);
    const cmb_rows none = {0};
    if (head.stages & CMB_ATTEND) {
        deliver(run, head.L, head.Dv, head.lse, head.result, head.out, worker);
        run->stage->finish(head.L, head.lse, p->adds ? none : head.out, head.Dv, none, 0);
    }
    if (!(head.stages & CMB_SUMMARIZE))
        return;
    const cmb_rows summary_key = regions(run, &p->summary_key, &u), summary_value = regions(run, &p->summary_value, &u);
    if (summary_value.data) {
        deliver(run, head.R, head.Dv, head.region_lse, head.region_value, summary_value, worker);
        if (head.weighted)
            deliver(run, head.R, head.D, head.region_lse, head.region_key, summary_key, worker);
        run->stage->finish(head.R, head.region_lse, summary_value, head.Dv, head.weighted ? summary_key : none, head.D);
    }
    const bool owner = p->summary_key.data && u.h % (p->Hq / p->summary_key.heads) == 0;
    if (p->stages == CMB_SUMMARIZE && owner && !head.weighted)
        run->stage->copy_region_keys(&head, head.R, summary_key, run->scratch[worker]);
}

static void wave_by_wave(schedule *run) {
    for (run->wave = 0; run->wave < run->waves; run->wave++) {
        for (int64_t slot = 0; slot < run->flying; slot++)
            run->task[slot + 1] = run->task[slot] + tasks_in(flying_head(run, slot).plan, run->wave);
        cmb_parallel_for(run->task[run->flying], run->workers, task_of_wave, run, run->cancel);
    }
}

static void waves_fused(schedule *run) {
    for (int64_t n = 0; n < run->flying * run->waves; n++)
        atomic_init(&run->through[n], 0);
    int64_t number = 0;
    for (team it = team_of(run, 0); it.heads > 0; it = team_of(run, ++number)) {
        int64_t longest = 0;
        for (int64_t slot = it.slot; slot < it.slot + it.heads; slot++) {
            const int32_t tasks = longest_wave(flying_head(run, slot).plan);
            longest = tasks > longest ? tasks : longest;
        }
        run->task[number + 1] = run->task[number] + longest * it.heads;
    }
    cmb_parallel_for(run->task[number], run->workers, tasks_of_waves, run, run->cancel);
}

static void forward(schedule *run) {
    run->task[0] = 0;
    for (run->first = 0; run->first < run->units; run->first += run->slots) {
        run->flying = cmb_least(run->units - run->first, run->slots);
        cmb_parallel_for(run->flying, run->workers, begin_head, run, run->cancel);
        if (run->fused)
            waves_fused(run);
        else
            wave_by_wave(run);
        cmb_parallel_for(run->flying, run->workers, end_head, run, run->cancel);
    }
}

/* ---- backward ----------------------------------------------------------------------------------- */

/* Rows that are to be zero: each block when it is first met, or by `settle`. */
static cmb_rows zeroed(cmb_rows rows, int64_t count, int64_t dim, uint8_t *stale, bool first) {
    rows.stale = stale;
    rows.count = count;
    rows.dim = dim;
    if (first)
        memset(stale, 1, (size_t)cmb_blocks(count));
    return rows;
}

/* The first touch of new memory is slow enough for Ctrl-C to be waited for. */
static void settle(const schedule *run, cmb_rows rows, int worker) {
    for (int64_t block = 0; block < cmb_blocks(rows.count); block++) {
        if (block % CMB_BLOCK_ROWS == 0 && cmb_cancelled(run->cancel, worker))
            return;
        if (rows.stale[block])
            run->stage->clear(rows, block);
    }
}

/* Where a head's gradients go; those that query heads of a group share are begun by the first of them. */
static void begin_gradients(const schedule *run, cmb_head *head, const tables *t, const unit *u, int worker) {
    const cmb_problem *p = run->problem;
    const cmb_gradients *g = run->gradients;
    const int64_t L = head->L, R = head->R, D = p->D, Dv = p->Dv, group = p->Hq / p->Hk;
    const bool summarize = p->stages & CMB_SUMMARIZE, first = u->h % group == 0;
    const cmb_rows query = computed(positions(run, &g->query, u), t->position.query_grad, D);
    const cmb_rows key = computed(positions(run, &g->key, u), t->position.key_grad, D);
    const cmb_rows value = computed(positions(run, &g->value, u), t->position.value_grad, Dv);
    head->grad.query = zeroed(query, L, D, t->stale.query, true);
    head->grad.key = zeroed(key, L, D, t->stale.key, first);
    head->grad.value = zeroed(value, L, Dv, t->stale.value, first);
    head->grad.out = positions(run, &g->out, u);
    head->grad.lse = position_lse(run, &g->lse, u);

    /* Written gradients go to the caller; of those that are read stage 1 makes its own sums, from what it is given. */
    const cmb_rows summary_key = regions(run, &g->summary_key, u), summary_value = regions(run, &g->summary_value, u);
    const cmb_rows none = {0};
    const cmb_rows region_query = p->region_query.data ? regions(run, &g->region_query, u) : none;
    const cmb_rows region_key = !summarize ? summary_key : p->region_key.data ? regions(run, &g->region_key, u) : none;
    const cmb_array *given_key = summarize ? &p->region_key : &p->summary_key;
    const bool own_key = first || !given_key->data || given_key->heads == p->Hq;
    head->grad.region_key = zeroed(computed(region_key, t->key_grad, D), R, D, t->stale.region_key, own_key);
    head->grad.region_value =
        zeroed(computed(summarize ? none : summary_value, t->value_grad, Dv), R, Dv, t->stale.region_value, true);
    if (!summarize)
        return;
    const int64_t queries = head->query_row ? run->queries : R;
    head->grad.region_query = zeroed(computed(region_query, t->query_grad, D), queries, D, t->stale.region_query, true);
    /* A summary_key of Hk heads is one thing to a group, so its gradient enters once. */
    const bool enters = g->summary_key.data && u->h % (p->Hq / g->summary_key.heads) == 0;
    if (enters)
        run->stage->add(R, D, head->region_lse, summary_key, head->grad.region_key, run->scratch[worker]);
    if (summary_value.data)
        run->stage->add(R, Dv, head->region_lse, summary_value, head->grad.region_value, run->scratch[worker]);
}

/* Zeros in what no task met, of gradients that are the caller's; those of a group after its last head. */
static void end_gradients(const schedule *run, const cmb_head *head, const unit *u, int worker) {
    const cmb_problem *p = run->problem;
    const cmb_gradients *g = run->gradients;
    const bool summarize = p->stages & CMB_SUMMARIZE, last = (u->h + 1) % (p->Hq / p->Hk) == 0;
    const cmb_array *region_key = summarize ? &p->region_key : &p->summary_key;
    const cmb_rows none = {0};
    const bool whole_key = region_key->data && (last || region_key->heads == p->Hq);
    const struct {
        bool is_done;
        const cmb_rows *sums;
        cmb_rows to;
    } each[] = {
        {true, &head->grad.query, positions(run, &g->query, u)},
        {last, &head->grad.key, positions(run, &g->key, u)},
        {last, &head->grad.value, positions(run, &g->value, u)},
        {summarize && p->region_query.data, &head->grad.region_query, regions(run, &g->region_query, u)},
        {whole_key, &head->grad.region_key, regions(run, summarize ? &g->region_key : &g->summary_key, u)},
        {!summarize, &head->grad.region_value, regions(run, &g->summary_value, u)},
    };
    for (size_t n = 0; n < sizeof each / sizeof *each; n++) {
        if (!each[n].is_done)
            continue;
        settle(run, *each[n].sums, worker);
        deliver(run, each[n].sums->count, each[n].sums->dim, none, *each[n].sums, each[n].to, worker);
    }
}

/* Tasks in the order in which one thread takes them forward; backward takes the reverse. */
static void order_tasks(const cmb_plan *plan, int32_t *order) {
    for (int32_t task = 0; task < plan->tasks; task++)
        order[task] = task;
    for (int32_t t = 0, n = 0; plan->is_fusible && n < plan->tasks; t++)
        for (int32_t wave = 0; wave < plan->waves; wave++)
            if (t < tasks_in(plan, wave))
                order[n++] = plan->wave[wave] + t;
}

/* A query head of the unit, ready for its tasks but for the pools; worker's is the scratch used. */
static cmb_head begin_backward(const schedule *run, const tables *t, const unit *u, int worker) {
    cmb_head head = make_head(run, t, u);
    begin_gradients(run, &head, t, u, worker);
    widen_regions(run, &head, u, true, worker);
    clear_counts(&head);
    order_tasks(head.plan, t->order);
    return head;
}

static void backward_task(const schedule *run, const cmb_head *head, int32_t task, int worker) {
    const cmb_plan *plan = head->plan;
    run->stage->pool_own(head, task, run->scratch[worker]);
    for (int32_t tile = plan->task[task + 1].tile - 1; tile >= plan->task[task].tile; tile--) {
        if (cmb_cancelled(run->cancel, worker))
            return;
        const int32_t ahead = counterpart(plan, tile, task, task - 1);
        run->stage->tile_backward(head, tile, ahead, run->scratch[worker], NULL, run->cancel, worker);
    }
    if (head->stages & CMB_SUMMARIZE)
        run->stage->pool_backward(head, task, run->scratch[worker], NULL);
}

static void backward_unit(void *context, int64_t index, int worker) {
    const schedule *run = context;
    const cmb_problem *p = run->problem;
    const int64_t group = p->Hq / p->Hk;
    const tables *t = &run->table[worker];
    cmb_scratch *scratch = run->scratch[worker];
    unit u = unit_of(run, index, p->Hk);
    const int64_t end = (u.h + 1) * group;
    for (u.h *= group; u.h < end; u.h++) {
        const cmb_head head = begin_backward(run, t, &u, worker);
        const cmb_plan *plan = head.plan;
        for (int32_t task = 0; task < plan->tasks && !cmb_cancelled(run->cancel, worker); task++)
            run->stage->pool(&head, task, scratch);
        for (int32_t n = plan->tasks - 1; n >= 0; n--)
            backward_task(run, &head, t->order[n], worker);
        if (cmb_cancelled(run->cancel, worker))
            return;
        end_gradients(run, &head, &u, worker);
    }
}

/* ---- backward of heads that workers share ------------------------------------------------------- */

static void begin_shared(void *context, int64_t n, int worker) {
    const schedule *run = context;
    const cmb_problem *p = run->problem;
    shared_head *it = &run->together[n];
    it->unit = unit_of(run, run->units - run->shared + n, p->Hk);
    it->unit.h = it->unit.h * (p->Hq / p->Hk) + run->member;
    it->head = begin_backward(run, &run->table[n], &it->unit, worker);
    const cmb_plan *plan = it->head.plan;
    it->first_item[0] = 0;
    for (int32_t i = 0; i < plan->tasks; i++) {
        const cmb_task *task = &plan->task[run->table[n].order[i]];
        it->first_item[i + 1] = it->first_item[i] + 1 + task[1].tile - task[0].tile;
    }
    cmb_begin_turns(&it->turns, it->head.L + it->head.R);
}

static void clear_shared(void *context, int64_t index, int worker) {
    const schedule *run = context;
    const cmb_head *head = &run->together[index % run->shared].head;
    const int64_t block = index / run->shared;
    (void)worker;
    const cmb_rows *const rows[] = {&head->grad.query,        &head->grad.key,        &head->grad.value,
                                    &head->grad.region_query, &head->grad.region_key, &head->grad.region_value};
    for (int n = 0; n < 6; n++)
        if (rows[n]->stale && block < cmb_blocks(rows[n]->count) && rows[n]->stale[block])
            run->stage->clear(*rows[n], block);
}

static void pool_shared(void *context, int64_t index, int worker) {
    const schedule *run = context;
    const cmb_head *head = &run->together[index % run->shared].head;
    const int64_t t = index / run->shared;
    if (t < tasks_in(head->plan, run->wave))
        run->stage->pool(head, head->plan->wave[run->wave] + (int32_t)t, run->scratch[worker]);
}

static void ask_for_list(const cmb_plan *plan, cmb_list list, cmb_row_kind kind, cmb_item *item) {
    if (list.step)
        cmb_ask(item, kind, list.start, list.step, list.count);
    for (int32_t n = 0; !list.step && n < list.count; n++)
        cmb_ask(item, kind, cmb_list_at(plan, list, n), 1, 1);
}

static void ask_for_tile(const cmb_head *head, const cmb_tile *tile, cmb_item *item) {
    const cmb_plan *plan = head->plan;
    for (int32_t run = tile->run; run < tile[1].run; run++)
        ask_for_list(plan, plan->run[run].row, CMB_KEY_ROWS, item);
    item->held = item->count;
    ask_for_list(plan, tile->query, CMB_QUERY_ROWS, item);
    if (cmb_list_at(plan, tile->query, 0) >= head->L)
        ask_for_list(plan, tile->query, CMB_KEY_ROWS, item);
}

static void ask_for_pools(const cmb_head *head, int32_t task, cmb_item *item) {
    const cmb_plan *plan = head->plan;
    const bool picks = plan->pooling == CMB_POOL_FIRST;
    for (int32_t p = plan->task[task].pool; p < plan->task[task + 1].pool; p++) {
        const cmb_pool *pool = &plan->pool[p];
        for (int32_t n = -1; n < (picks ? 1 : pool->child.count); n++) {
            int32_t x = n < 0 ? pool->row : cmb_list_at(plan, pool->child, n);
            if (n == 0 && picks && pool->row < head->L + plan->R)
                x = head->pick[pool->row - head->L];
            if (x >= head->L + plan->R) /* a scratch row, the worker's own */
                continue;
            cmb_ask(item, CMB_QUERY_ROWS, x, 1, 1);
            cmb_ask(item, CMB_KEY_ROWS, x, 1, 1);
        }
    }
}

/* Items are numbered in the order of one thread: of the last task the last tile to the first, then its pools; and so
 * on to the first task. */
static void backward_item(const schedule *run, int64_t n, int32_t number, int worker) {
    const shared_head *shared = &run->together[n];
    const cmb_head *head = &shared->head;
    const cmb_plan *plan = head->plan;
    cmb_item *item = &run->item[worker];
    const int32_t *first = shared->first_item, at = first[plan->tasks] - 1 - number;
    int32_t i = 0, end = plan->tasks;
    while (end - i > 1) {
        const int32_t middle = i + (end - i) / 2;
        if (first[middle] <= at)
            i = middle;
        else
            end = middle;
    }
    const int32_t task = run->table[n].order[i], tile = plan->task[task].tile + at - first[i] - 1;
    const bool is_tile = at > first[i], pools = !is_tile && head->stages & CMB_SUMMARIZE;
    if (!cmb_enter(item, number))
        return;
    if (is_tile)
        ask_for_tile(head, &plan->tile[tile], item);
    else if (pools)
        ask_for_pools(head, task, item);
    cmb_entered(item);
    if (is_tile)
        run->stage->tile_backward(head, tile, -1, run->scratch[worker], item, run->cancel, worker);
    else if (pools)
        run->stage->pool_backward(head, task, run->scratch[worker], item);
    cmb_pass(item, item->count);
}

/* Workers begin at different heads and, once nothing of one is left to begin, help with the next. */
static void share_items(void *context, int64_t index, int worker) {
    const schedule *run = context;
    for (int64_t n = 0; n < run->shared; n++) {
        const int64_t at = (index + n) % run->shared;
        shared_head *shared = &run->together[at];
        const int32_t items = shared->first_item[shared->head.plan->tasks];
        int32_t number;
        run->item[worker].turns = &shared->turns;
        while (!cmb_cancelled(run->cancel, worker) && (number = atomic_fetch_add(&shared->turns.claimed, 1)) < items)
            backward_item(run, at, number, worker);
    }
}

static void end_shared(void *context, int64_t n, int worker) {
    const schedule *run = context;
    const shared_head *shared = &run->together[n];
    end_gradients(run, &shared->head, &shared->unit, worker);
}

static void backward_together(schedule *run) {
    const int64_t blocks = cmb_blocks(run->L > run->R ? run->L : run->R), group = run->problem->Hq / run->problem->Hk;
    for (run->member = 0; run->member < group; run->member++) {
        cmb_parallel_for(run->shared, run->workers, begin_shared, run, run->cancel);
        if (cmb_cancelled(run->cancel, 0))
            return;
        cmb_parallel_for(run->shared * blocks, run->workers, clear_shared, run, run->cancel);
        for (run->wave = 0; run->wave < run->waves; run->wave++) {
            int64_t longest = 0;
            for (int64_t n = 0; n < run->shared; n++) {
                const int32_t tasks = tasks_in(run->together[n].head.plan, run->wave);
                longest = tasks > longest ? tasks : longest;
            }
            cmb_parallel_for(run->shared * longest, run->workers, pool_shared, run, run->cancel);
        }
        cmb_parallel_for(run->workers, run->workers, share_items, run, run->cancel);
        if (cmb_cancelled(run->cancel, 0))
            return;
        cmb_parallel_for(run->shared, run->workers, end_shared, run, run->cancel);
    }
}

static void backward_units(schedule *run) {
    cmb_parallel_for(run->units - run->shared, run->workers, backward_unit, run, run->cancel);
    if (run->shared > 0 && !cmb_cancelled(run->cancel, 0))
        backward_together(run);
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
    run.cancel = &cancel;
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
    cmb_cancel_init(&cancel, interrupt);
    if (backward)
        backward_units(&run);
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

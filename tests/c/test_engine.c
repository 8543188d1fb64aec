// SPDX-License-Identifier: Apache-2.0
/*
 * cmb_forward and cmb_backward as a C program sees them: against the spec's formulas in double, row by row over the
 * plan's lists; their bits, whatever the layout, the threads and the instruction set; their errors, memory, cancelling
 * and forks.
 */
#define _GNU_SOURCE
#include "kernels.h"
#include "testlib.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char context[200]; /* the case at hand, for whoever reads the failure */

#define CASE(...) snprintf(context, sizeof context, __VA_ARGS__)

/* ---- random numbers ----------------------------------------------------------------------------- */

static uint64_t random_state = 1;

static uint64_t random_bits(void) { /* splitmix64 */
    uint64_t x = random_state += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static double uniform(void) { return 2 * ((double)(random_bits() >> 11) * 0x1p-53) - 1; }

/* ---- problems ----------------------------------------------------------------------------------- */

typedef enum {
    DENSE,
    FIXED,
    LOGSPARSE,
    HIERARCHICAL,
    TREE, /* span + 1: the branching */
    VERTICAL,
    HORIZONTAL,
    ROWMAJOR,
    WEIGHTED,
    MIXTURE,
    ROUTING, /* span: how many clusters */
    PATTERNS,
} pattern;

/* What a test asks for; zeros are a plain small problem but for the sizes. */
typedef struct {
    pattern pattern;
    int64_t span;
    cmb_plan_options options;
    cmb_dtype dtype;
    int64_t B, Hq, Hk, L, D, Dv;
    bool masked, given_query;
    int64_t given_key;    /* heads of region_key; 0: pooled */
    int64_t summary_key;  /* heads of summary_key where it is kept; 0: Hk */
    bool positions_first; /* arrays are [B, L, H, D] with gaps between the rows */
    bool backwards;       /* negative strides */
} request;

enum { ARRAYS = 20 };

/* A problem, its gradients and the memory of both. */
typedef struct {
    request asked;
    cmb_plan *plan;
    cmb_problem problem;
    cmb_gradients gradients;
    uint8_t *mask;
    size_t size; /* of one number */
    struct {
        void *memory;
        size_t bytes;
    } block[ARRAYS];
    int blocks;
} fixture;

static void *zeros(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    CHECK(memory);
    return memory;
}

/* The number at an element of an array, whatever its type. */
static char *element(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d) {
    return (char *)a->data + (b * a->batch + h * a->head + x * a->row + d) * (int64_t)f->size;
}

static double get(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d) {
    const char *at = element(f, a, b, h, x, d);
    float narrow;
    double wide;
    memcpy(&narrow, at, sizeof narrow);
    if (f->size == sizeof narrow)
        return (double)narrow;
    memcpy(&wide, at, sizeof wide);
    return wide;
}

static void put(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d, double value) {
    char *at = element(f, a, b, h, x, d);
    const float narrow = (float)value;
    if (f->size == sizeof narrow)
        memcpy(at, &narrow, sizeof narrow);
    else
        memcpy(at, &value, sizeof value);
}

/* An array full of 0x5a, laid out as asked. */
static cmb_array new_array(fixture *f, int64_t heads, int64_t rows, int64_t dim) {
    const int64_t B = f->asked.B, gap = f->asked.positions_first ? 3 : 0;
    cmb_array a = {.heads = heads};
    a.row = f->asked.positions_first ? heads * (dim + gap) : dim;
    a.head = f->asked.positions_first ? dim + gap : rows * dim;
    a.batch = heads * rows * (dim + gap);
    const size_t bytes = (size_t)(B * a.batch) * f->size;
    CHECK(f->blocks < ARRAYS);
    char *memory = zeros(bytes, 1);
    memset(memory, 0x5a, bytes);
    f->block[f->blocks].memory = memory;
    f->block[f->blocks++].bytes = bytes;
    a.data = memory;
    if (f->asked.backwards && rows > 0 && B > 0) {
        a.data = memory + ((B - 1) * a.batch + (rows - 1) * a.row) * (int64_t)f->size;
        a.batch = -a.batch;
        a.row = -a.row;
    }
    return a;
}

static void fill(const fixture *f, const cmb_array *a, int64_t rows, int64_t dim) {
    for (int64_t b = 0; b < f->asked.B; b++) /* in one order, whatever the layout */
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t x = 0; x < rows; x++)
                for (int64_t d = 0; d < dim; d++)
                    put(f, a, b, h, x, d, uniform());
}

static cmb_array new_input(fixture *f, int64_t heads, int64_t rows, int64_t dim) {
    const cmb_array a = new_array(f, heads, rows, dim);
    fill(f, &a, rows, dim);
    return a;
}

static cmb_status build(const request *asked, cmb_plan **plan, cmb_error *error) {
    const int64_t L = asked->L, span = asked->span;
    const cmb_plan_options *options = &asked->options;
    const bool is_weighted = asked->pattern == WEIGHTED;
    switch (asked->pattern) {
    case DENSE:
        return cmb_plan_dense(L, options, plan, error);
    case FIXED:
        return cmb_plan_fixed(L, span, options, plan, error);
    case LOGSPARSE:
    case HIERARCHICAL:
        return cmb_plan_logsparse(L, asked->pattern == HIERARCHICAL, options, plan, error);
    case TREE:
        return cmb_plan_tree(L, span + 1, 0, options, plan, error);
    case MIXTURE:
        return cmb_plan_axial_mixture(L, span, options, plan, error);
    case ROUTING: {
        int64_t *cluster = zeros((size_t)L, sizeof *cluster);
        for (int64_t i = 0; i < L; i++)
            cluster[i] = (i * i + i / 3) % (span < L ? span : L);
        const cmb_status status = cmb_plan_routing(L, cluster, options, plan, error);
        free(cluster);
        return status;
    }
    default:
        return cmb_plan_axial(L, span, (cmb_axial_order)(asked->pattern - VERTICAL - is_weighted), is_weighted, options,
                              plan, error);
    }
}

static cmb_plan *new_plan(const request *asked) {
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    CHECK(build(asked, &plan, &error) == CMB_OK, "%s", error.message);
    return plan;
}

/* Everything that CMB_BOTH needs, forward and backward, from the same random numbers for the same sizes. */
static fixture *new_fixture(request asked) {
    fixture *f = zeros(1, sizeof *f);
    f->asked = asked;
    f->size = asked.dtype == CMB_FLOAT32 ? sizeof(float) : sizeof(double);
    f->plan = new_plan(&asked);
    const int64_t R = f->plan->R, Hq = asked.Hq, Hk = asked.Hk, L = asked.L, D = asked.D, Dv = asked.Dv;
    cmb_problem *p = &f->problem;
    cmb_gradients *g = &f->gradients;
    random_state = 1;
    *p = (cmb_problem){.dtype = asked.dtype,
                       .stages = CMB_BOTH,
                       .B = asked.B,
                       .Hq = Hq,
                       .Hk = Hk,
                       .L = L,
                       .D = D,
                       .Dv = Dv,
                       .scale = 1.5 / sqrt((double)D),
                       .plan = (const cmb_plan *const *)&f->plan,
                       .plans = 1};
    p->query = new_input(f, Hq, L, D);
    p->key = new_input(f, Hk, L, D);
    p->value = new_input(f, Hk, L, Dv);
    g->out = new_input(f, Hq, L, Dv);
    g->lse = new_input(f, Hq, L, 1);
    if (asked.given_query)
        p->region_query = new_input(f, Hq, R, D);
    if (asked.given_key)
        p->region_key = new_input(f, asked.given_key, R, D);
    if (asked.masked) {
        f->mask = zeros((size_t)(asked.B * L), 1);
        for (int64_t i = 0; i < asked.B * L; i++)
            f->mask[i] = random_bits() % 3 > 0;
        p->key_mask = f->mask;
        p->mask_batch = L;
        p->mask_row = 1;
    }
    if (f->plan->weighted && !asked.given_key)
        p->summary_key = new_array(f, Hq, R, D);
    p->summary_value = new_array(f, Hq, R, Dv);
    p->summary_lse = new_array(f, Hq, R, 1);
    p->out = new_array(f, Hq, L, Dv);
    p->lse = new_array(f, Hq, L, 1);
    g->query = new_array(f, Hq, L, D);
    g->key = new_array(f, Hk, L, D);
    g->value = new_array(f, Hk, L, Dv);
    if (asked.given_query)
        g->region_query = new_array(f, Hq, R, D);
    if (asked.given_key)
        g->region_key = new_array(f, asked.given_key, R, D);
    return f;
}

/* The same problem for one stage at a time, which keeps k_R. */
static fixture *new_staged_fixture(request asked) {
    fixture *f = new_fixture(asked);
    const int64_t heads = asked.summary_key ? asked.summary_key : asked.Hk;
    if (!f->problem.summary_key.data)
        f->problem.summary_key = new_array(f, heads, f->plan->R, asked.D);
    f->gradients.summary_key = new_array(f, f->problem.summary_key.heads, f->plan->R, asked.D);
    f->gradients.summary_value = new_array(f, asked.Hq, f->plan->R, asked.Dv);
    return f;
}

static void free_fixture(fixture *f) {
    cmb_plan_free(f->plan);
    for (int i = 0; i < f->blocks; i++)
        free(f->block[i].memory);
    free(f->mask);
    free(f);
}

static void forward(const fixture *f) {
    cmb_error error = {0};
    CHECK(cmb_forward(&f->problem, NULL, &error) == CMB_OK, "%s: %s", error.message, context);
}

static void backward(const fixture *f) {
    cmb_error error = {0};
    CHECK(cmb_backward(&f->problem, &f->gradients, NULL, &error) == CMB_OK, "%s: %s", error.message, context);
}

/* Every number of an array is to the bit the other's, whatever their layouts. */
static void check_same(const fixture *f, const cmb_array *a, const fixture *g, const cmb_array *b, int64_t rows,
                       int64_t dim, const char *name) {
    if (!a->data)
        return;
    for (int64_t n = 0; n < f->asked.B; n++)
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t x = 0; x < rows; x++)
                CHECK(memcmp(element(f, a, n, h, x, 0), element(g, b, n, h, x, 0), (size_t)dim * f->size) == 0,
                      "%s of batch %lld head %lld row %lld: %s", name, (long long)n, (long long)h, (long long)x,
                      context);
}

static void check_same_forward(const fixture *f, const fixture *g) {
    const cmb_problem *p = &f->problem, *q = &g->problem;
    check_same(f, &p->out, g, &q->out, p->L, p->Dv, "out");
    check_same(f, &p->lse, g, &q->lse, p->L, 1, "lse");
    check_same(f, &p->summary_value, g, &q->summary_value, f->plan->R, p->Dv, "summary_value");
    check_same(f, &p->summary_lse, g, &q->summary_lse, f->plan->R, 1, "summary_lse");
}

static void check_same_results(const fixture *f, const fixture *g) {
    const cmb_gradients *a = &f->gradients, *b = &g->gradients;
    const cmb_problem *p = &f->problem;
    check_same_forward(f, g);
    check_same(f, &a->query, g, &b->query, p->L, p->D, "gradient of query");
    check_same(f, &a->key, g, &b->key, p->L, p->D, "gradient of key");
    check_same(f, &a->value, g, &b->value, p->L, p->Dv, "gradient of value");
    check_same(f, &a->region_query, g, &b->region_query, f->plan->R, p->D, "gradient of region_query");
    check_same(f, &a->region_key, g, &b->region_key, f->plan->R, p->D, "gradient of region_key");
}

/* ---- the definition ----------------------------------------------------------------------------- */

/* One head by the spec, in double, over a table of L + R rows of everything. */
typedef struct {
    int64_t rows, L, D, Dv;
    uint8_t *sees;                                     /* [rows][rows] how often a row attends another */
    uint8_t *below;                                    /* [rows][L] positions below, masked ones left out */
    int *count;                                        /* [rows] of them */
    int64_t *pick;                                     /* [rows and scratch] of them the first in the pool's order */
    double *query, *key, *value, *lse;                 /* [rows][D], [rows][D], [rows][Dv] v, h; [rows] */
    double *out;                                       /* [L][Dv] */
    double *d_query, *d_key, *d_value, *d_out, *d_lse; /* gradients */
} table;

static int32_t list_row(const cmb_plan *plan, cmb_list list, int32_t n) {
    return list.step ? list.start + list.step * n : plan->index[list.start + n];
}

static table new_table(const fixture *f) {
    const cmb_plan *plan = f->plan;
    table t = {.L = f->asked.L, .D = f->asked.D, .Dv = f->asked.Dv, .rows = f->asked.L + plan->R};
    const size_t n = (size_t)t.rows, d = (size_t)t.D, dv = (size_t)t.Dv, w = sizeof(double);
    t.sees = zeros(n * n, 1);
    t.below = zeros(n * (size_t)t.L, 1);
    t.count = zeros(n, sizeof *t.count);
    t.pick = zeros(n + (size_t)plan->N, sizeof *t.pick);
    t.query = zeros(n * d, w);
    t.key = zeros(n * d, w);
    t.value = zeros(n * dv, w);
    t.lse = zeros(n, w);
    t.out = zeros((size_t)t.L * dv, w);
    t.d_query = zeros(n * d, w);
    t.d_key = zeros(n * d, w);
    t.d_value = zeros(n * dv, w);
    t.d_out = zeros((size_t)t.L * dv, w);
    t.d_lse = zeros((size_t)t.L, w);
    for (int32_t i = 0; i < plan->tiles; i++)
        for (int32_t r = plan->tile[i].run; r < plan->tile[i + 1].run; r++) {
            const cmb_run *run = &plan->run[r];
            for (int32_t y = 0; y < run->row.count; y++)
                for (int32_t x = 0; x < plan->tile[i].query.count; x++)
                    if (run->mask < 0 || plan->mask[run->mask + y] >> x & 1)
                        t.sees[list_row(plan, plan->tile[i].query, x) * t.rows + list_row(plan, run->row, y)]++;
        }
    return t;
}

static void free_table(table *t) {
    void *const all[] = {t->sees, t->below, t->count,   t->pick,  t->query,   t->key,   t->value,
                         t->lse,  t->out,   t->d_query, t->d_key, t->d_value, t->d_out, t->d_lse};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* For every row the first unmasked position below it, or -1. */
static void find_picks(const fixture *f, table *t) {
    for (int64_t j = 0; j < t->L; j++)
        t->pick[j] = t->count[j] ? j : -1;
    for (int32_t n = 0; n < f->plan->pools; n++) {
        const cmb_pool *step = &f->plan->pool[n];
        t->pick[step->row] = -1;
        for (int32_t k = step->child.count - 1; k >= 0; k--)
            if (t->pick[list_row(f->plan, step->child, k)] >= 0)
                t->pick[step->row] = t->pick[list_row(f->plan, step->child, k)];
    }
}

/* The position whose feature d is the pool's. */
static int64_t pooled_from(const table *t, cmb_pooling pooling, const double *from, int64_t row, int64_t d) {
    int64_t best = -1;
    if (pooling == CMB_POOL_FIRST)
        return t->pick[row];
    for (int64_t j = 0; j < t->L; j++)
        if (t->below[row * t->L + j] && (best < 0 || from[j * t->D + d] > from[best * t->D + d]))
            best = j;
    return best;
}

static void pool_row(const table *t, cmb_pooling pooling, double *rows, int64_t row) {
    for (int64_t d = 0; d < t->D; d++) {
        if (pooling == CMB_POOL_MAX || pooling == CMB_POOL_FIRST) {
            rows[row * t->D + d] = rows[pooled_from(t, pooling, rows, row, d) * t->D + d];
            continue;
        }
        double sum = 0;
        for (int64_t j = 0; j < t->L; j++)
            if (t->below[row * t->L + j])
                sum += rows[j * t->D + d];
        rows[row * t->D + d] = pooling == CMB_POOL_MEAN ? sum / t->count[row] : sum;
    }
}

static void pool_row_backward(const table *t, cmb_pooling pooling, const double *rows, double *grad, int64_t row) {
    const bool is_one = pooling == CMB_POOL_MAX || pooling == CMB_POOL_FIRST;
    for (int64_t d = 0; d < t->D; d++)
        for (int64_t j = 0; j < t->L; j++) {
            if (!t->below[row * t->L + j] || (is_one && j != pooled_from(t, pooling, rows, row, d)))
                continue;
            grad[j * t->D + d] += grad[row * t->D + d] / (pooling == CMB_POOL_MEAN ? t->count[row] : 1);
        }
}

static double logit(const fixture *f, const table *t, int64_t x, int64_t y) {
    double sum = 0;
    for (int64_t d = 0; d < t->D; d++)
        sum += t->query[x * t->D + d] * t->key[y * t->D + d];
    return f->problem.scale * sum + (f->asked.options.size_bias && y >= t->L ? log(t->count[y]) : 0);
}

/* Means of values and, where `key` is one, of keys. */
static void softmax_row(const fixture *f, const table *t, int64_t x, double *to, double *key) {
    double top = -INFINITY, sum = 0;
    t->lse[x] = -INFINITY;
    for (int64_t y = 0; y < t->rows; y++)
        if (t->sees[x * t->rows + y] && t->count[y])
            top = fmax(top, logit(f, t, x, y));
    for (int64_t y = 0; y < t->rows; y++)
        if (t->sees[x * t->rows + y] && t->count[y])
            sum += t->sees[x * t->rows + y] * exp(logit(f, t, x, y) - top);
    if (sum == 0)
        return;
    t->lse[x] = top + log(sum);
    for (int64_t y = 0; y < t->rows; y++) {
        if (!t->sees[x * t->rows + y] || !t->count[y])
            continue;
        const double p = t->sees[x * t->rows + y] * exp(logit(f, t, x, y) - t->lse[x]);
        for (int64_t d = 0; d < t->Dv; d++)
            to[d] += p * t->value[y * t->Dv + d];
        for (int64_t d = 0; key && d < t->D; d++)
            key[d] += p * t->key[y * t->D + d];
    }
}

static void softmax_row_backward(const fixture *f, const table *t, int64_t x, const double *out, const double *d_out,
                                 double d_lse, const double *key, const double *d_key) {
    double delta = -d_lse;
    for (int64_t d = 0; d < t->Dv; d++)
        delta += out[d] * d_out[d];
    for (int64_t d = 0; key && d < t->D; d++)
        delta += key[d] * d_key[d];
    for (int64_t y = 0; t->lse[x] > -INFINITY && y < t->rows; y++) {
        if (!t->sees[x * t->rows + y] || !t->count[y])
            continue;
        const double p = t->sees[x * t->rows + y] * exp(logit(f, t, x, y) - t->lse[x]);
        double dp = 0;
        for (int64_t d = 0; d < t->Dv; d++) {
            dp += d_out[d] * t->value[y * t->Dv + d];
            t->d_value[y * t->Dv + d] += p * d_out[d];
        }
        for (int64_t d = 0; key && d < t->D; d++) {
            dp += d_key[d] * t->key[y * t->D + d];
            t->d_key[y * t->D + d] += p * d_key[d];
        }
        const double ds = p * (dp - delta) * f->problem.scale;
        for (int64_t d = 0; d < t->D; d++) {
            t->d_query[x * t->D + d] += ds * t->key[y * t->D + d];
            t->d_key[y * t->D + d] += ds * t->query[x * t->D + d];
        }
    }
}

static void read_rows(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t n, int64_t dim, double *to) {
    for (int64_t x = 0; x < n; x++)
        for (int64_t d = 0; d < dim; d++)
            to[x * dim + d] = get(f, a, b, h * a->heads / f->asked.Hq, x, d);
}

/* Head h of batch entry b, forward and backward. */
static table attend_by_definition(const fixture *f, int64_t b, int64_t h) {
    const cmb_problem *p = &f->problem;
    const cmb_pooling pooling = f->plan->pooling;
    const bool is_weighted = f->plan->weighted && !p->region_key.data;
    table t = new_table(f);
    const int64_t L = t.L, R = t.rows - L;
    read_rows(f, &p->query, b, h, L, t.D, t.query);
    read_rows(f, &p->key, b, h, L, t.D, t.key);
    read_rows(f, &p->value, b, h, L, t.Dv, t.value);
    read_rows(f, &f->gradients.out, b, h, L, t.Dv, t.d_out);
    read_rows(f, &f->gradients.lse, b, h, L, 1, t.d_lse);
    for (int64_t j = 0; j < L; j++)
        t.count[j] = t.below[j * L + j] = !f->mask || f->mask[b * L + j];
    find_picks(f, &t);
    for (int64_t x = L; x < t.rows; x++) {
        for (int64_t y = 0; y < x; y++)
            for (int64_t j = 0; t.sees[x * t.rows + y] && j < L; j++)
                t.below[x * L + j] |= t.below[y * L + j];
        for (int64_t j = 0; j < L; j++)
            t.count[x] += t.below[x * L + j];
        t.lse[x] = -INFINITY;
        if (t.count[x] == 0)
            continue;
        pool_row(&t, pooling, t.query, x);
        if (!is_weighted)
            pool_row(&t, pooling, t.key, x);
        if (p->region_query.data)
            for (int64_t d = 0; d < t.D; d++)
                t.query[x * t.D + d] = get(f, &p->region_query, b, h, x - L, d);
        if (p->region_key.data)
            for (int64_t d = 0; d < t.D; d++)
                t.key[x * t.D + d] = get(f, &p->region_key, b, h * p->region_key.heads / p->Hq, x - L, d);
        softmax_row(f, &t, x, t.value + x * t.Dv, is_weighted ? t.key + x * t.D : NULL);
    }
    for (int64_t x = 0; x < L; x++)
        softmax_row(f, &t, x, t.out + x * t.Dv, NULL);
    for (int64_t x = 0; x < L; x++)
        softmax_row_backward(f, &t, x, t.out + x * t.Dv, t.d_out + x * t.Dv, t.d_lse[x], NULL, NULL);
    for (int64_t x = L + R - 1; x >= L; x--) {
        softmax_row_backward(f, &t, x, t.value + x * t.Dv, t.d_value + x * t.Dv, 0,
                             is_weighted ? t.key + x * t.D : NULL, t.d_key + x * t.D);
        if (t.count[x] && !p->region_query.data)
            pool_row_backward(&t, pooling, t.query, t.d_query, x);
        if (t.count[x] && !p->region_key.data && !is_weighted)
            pool_row_backward(&t, pooling, t.key, t.d_key, x);
    }
    return t;
}

/* n rows of one head against the definition's, `sum` of its query heads where an array has fewer. Rounding: some
 * hundred terms, each off by a few times the rounding of its logit. */
static void check_rows(const fixture *f, const cmb_array *a, int64_t b, int64_t head, int64_t n, int64_t dim,
                       const double *want, const char *name) {
    if (!a->data)
        return;
    double most = 1;
    for (int64_t i = 0; i < n * dim; i++)
        most = isfinite(want[i]) ? fmax(most, fabs(want[i])) : most;
    const double slack = 128 * most * (f->size == sizeof(float) ? (double)FLT_EPSILON : DBL_EPSILON);
    for (int64_t x = 0; x < n; x++)
        for (int64_t d = 0; d < dim; d++) {
            const double got = get(f, a, b, head, x, d), right = want[x * dim + d];
            CHECK(got == right || fabs(got - right) <= slack, "%s of head %lld, %lld, %lld is %.17g, not %.17g: %s",
                  name, (long long)head, (long long)x, (long long)d, got, right, context);
        }
}

static void add_rows(double *to, const double *from, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        to[i] += from[i];
}

/* Everything that forward and backward wrote. */
static void check_results(const fixture *f) {
    const cmb_problem *p = &f->problem;
    const cmb_gradients *g = &f->gradients;
    const int64_t L = p->L, R = f->plan->R, D = p->D, Dv = p->Dv, group = p->Hk ? p->Hq / p->Hk : 1;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t hk = 0; hk < p->Hk; hk++) {
            double *d_key = zeros((size_t)((L + R) * D), sizeof *d_key),
                   *d_value = zeros((size_t)(L * Dv), sizeof *d_value);
            for (int64_t h = hk * group; h < (hk + 1) * group; h++) {
                table t = attend_by_definition(f, b, h);
                check_rows(f, &p->out, b, h, L, Dv, t.out, "out");
                check_rows(f, &p->lse, b, h, L, 1, t.lse, "lse");
                check_rows(f, &p->summary_value, b, h, R, Dv, t.value + L * Dv, "summary_value");
                check_rows(f, &p->summary_lse, b, h, R, 1, t.lse + L, "summary_lse");
                check_rows(f, &g->query, b, h, L, D, t.d_query, "gradient of query");
                check_rows(f, &g->region_query, b, h, R, D, t.d_query + L * D, "gradient of region_query");
                if (f->asked.given_key == p->Hq)
                    check_rows(f, &g->region_key, b, h, R, D, t.d_key + L * D, "gradient of region_key");
                add_rows(d_key, t.d_key, (L + R) * D);
                add_rows(d_value, t.d_value, L * Dv);
                free_table(&t);
            }
            check_rows(f, &g->key, b, hk, L, D, d_key, "gradient of key");
            check_rows(f, &g->value, b, hk, L, Dv, d_value, "gradient of value");
            if (f->asked.given_key && f->asked.given_key != p->Hq)
                check_rows(f, &g->region_key, b, hk, R, D, d_key + L * D, "gradient of region_key");
            free(d_key);
            free(d_value);
        }
}

static void check_against_definition(request asked) {
    CASE("pattern %d span %lld causal %d pooling %d size_bias %d sparse %d dtype %d B %lld Hq %lld Hk %lld L %lld D "
         "%lld "
         "Dv %lld masked %d given %d %lld isa %s",
         asked.pattern, (long long)asked.span, asked.options.is_causal, asked.options.pooling, asked.options.size_bias,
         asked.options.sparse, asked.dtype, (long long)asked.B, (long long)asked.Hq, (long long)asked.Hk,
         (long long)asked.L, (long long)asked.D, (long long)asked.Dv, asked.masked, asked.given_query,
         (long long)asked.given_key, cmb_get_isa());
    fixture *f = new_fixture(asked);
    forward(f);
    backward(f);
    check_results(f);
    free_fixture(f);
}

static const request small = {
    .pattern = FIXED, .span = 4, .dtype = CMB_FLOAT64, .B = 1, .Hq = 1, .Hk = 1, .L = 23, .D = 8, .Dv = 5};

/* ---- against the definition --------------------------------------------------------------------- */

static void every_pattern(void) {
    static const int64_t lengths[] = {1, 2, 3, 4, 5, 16, 17, 31, 67}, dims[][2] = {{8, 5}, {1, 1}, {59, 64}, {17, 33}};
    int n = 0;
    for (int which = DENSE; which < PATTERNS; which++)
        for (int causal = 0; causal < 2; causal++)
            for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
                for (int dtype = 0; dtype < 2; dtype++) {
                    request asked = small;
                    asked.pattern = (pattern)which;
                    asked.span = 1 + n % 7;
                    asked.options.is_causal = causal;
                    asked.options.pooling = (cmb_pooling)(n % 3);
                    asked.options.size_bias = n / 3 % 2;
                    asked.options.sparse = n % 11 == 10;
                    asked.dtype = (cmb_dtype)dtype;
                    asked.L = lengths[l];
                    asked.D = dims[n % 4][0];
                    asked.Dv = dims[n % 4][1];
                    CHECK(cmb_set_isa(cmb_isa_name(n % cmb_isa_count()), NULL) == CMB_OK);
                    check_against_definition(asked);
                    n++;
                }
    CHECK(cmb_set_isa(cmb_isa_name(cmb_isa_count() - 1), NULL) == CMB_OK);
}

/* Batches, groups of query heads, masks, given abstractions: all together and each alone. */
static void every_option(void) {
    for (int which = FIXED; which < PATTERNS; which++)
        for (int options = 0; options < 64; options++) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.options.is_causal = options & 1;
            asked.masked = options >> 1 & 1;
            asked.given_query = options >> 2 & 1;
            asked.Hq = options & 8 ? 4 : 2;
            asked.Hk = 2;
            asked.given_key = options >> 4 == 1 ? asked.Hk : options >> 4 == 2 ? asked.Hq : 0;
            asked.options.size_bias = options >> 4 == 3;
            asked.options.pooling = (cmb_pooling)(options % 3);
            asked.dtype = (cmb_dtype)(options / 2 % 2);
            asked.B = 1 + options % 2;
            check_against_definition(asked);
        }
}

/* Nothing to attend to: zeros, -inf, no gradient; and what is masked is never read. */
static void masked_and_poisoned(void) {
    for (int which = DENSE; which < PATTERNS; which++)
        for (int dtype = 0; dtype < 2; dtype++) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.dtype = (cmb_dtype)dtype;
            asked.options.is_causal = true;
            asked.masked = true;
            fixture *clean = new_fixture(asked), *poisoned = new_fixture(asked);
            CASE("poison in pattern %d dtype %d", which, dtype);
            for (int64_t j = 0; j < asked.L; j++) {
                clean->mask[j] = poisoned->mask[j] = j > 5 && j % 3;
                for (int64_t d = 0; d < asked.D && !clean->mask[j]; d++)
                    put(poisoned, &poisoned->problem.key, 0, 0, j, d, d % 2 ? NAN : INFINITY);
                for (int64_t d = 0; d < asked.Dv && !clean->mask[j]; d++)
                    put(poisoned, &poisoned->problem.value, 0, 0, j, d, d % 2 ? NAN : -INFINITY);
            }
            forward(clean);
            backward(clean);
            check_results(clean);
            forward(poisoned);
            backward(poisoned);
            check_same_results(clean, poisoned);
            for (int64_t i = 0; i <= 5; i++) {
                CHECK(get(clean, &clean->problem.lse, 0, 0, i, 0) == -INFINITY, "%s", context);
                for (int64_t d = 0; d < asked.Dv; d++)
                    CHECK(get(clean, &clean->problem.out, 0, 0, i, d) == 0, "%s", context);
                for (int64_t d = 0; d < asked.D; d++)
                    CHECK(get(clean, &clean->gradients.query, 0, 0, i, d) == 0, "%s", context);
            }
            free_fixture(clean);
            free_fixture(poisoned);
        }
}

/* A NaN value reaches the queries whose support holds it, directly or through a region, and no other bit. */
static void poison_stays(void) {
    for (int which = DENSE; which < PATTERNS; which++)
        for (int64_t at = 0; at < small.L; at += 5) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.dtype = CMB_FLOAT32;
            asked.options.is_causal = true;
            fixture *clean = new_fixture(asked), *poisoned = new_fixture(asked);
            CASE("NaN value %lld in pattern %d", (long long)at, which);
            put(poisoned, &poisoned->problem.value, 0, 0, at, 2, NAN);
            forward(clean);
            forward(poisoned);
            for (int64_t i = 0; i < asked.L; i++)
                for (int64_t d = 0; d < asked.Dv; d++) {
                    const double was = get(clean, &clean->problem.out, 0, 0, i, d);
                    const double is = get(poisoned, &poisoned->problem.out, 0, 0, i, d);
                    CHECK(i >= at && d == 2 ? is != is : is == was, "out %lld, %lld: %s", (long long)i, (long long)d,
                          context);
                }
            free_fixture(clean);
            free_fixture(poisoned);
        }
}

static void empty(void) {
    static const int64_t sizes[][4] = {{0, 2, 2, 5}, {1, 0, 0, 5}, {1, 0, 2, 5}, {2, 2, 1, 0}, {0, 0, 0, 0}};
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++)
        for (int which = DENSE; which < PATTERNS; which++) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.B = sizes[n][0];
            asked.Hq = sizes[n][1];
            asked.Hk = sizes[n][2];
            asked.L = sizes[n][3];
            CASE("empty %zu pattern %d", n, which);
            fixture *f = new_fixture(asked);
            forward(f);
            /* without a query head to call for it, the keys' gradients are not written */
            backward(f);
            free_fixture(f);
        }
}

/* ---- bits --------------------------------------------------------------------------------------- */

/* Large enough for threads, with tiles of every kind. */
static request large(pattern which) {
    return (request){.pattern = which,
                     .span = 16,
                     .options = {.is_causal = true},
                     .dtype = CMB_FLOAT32,
                     .B = 2,
                     .Hq = 4,
                     .Hk = 2,
                     .L = 139,
                     .D = 40,
                     .Dv = 24};
}

static void layouts(void) {
    for (int which = DENSE; which < PATTERNS; which++)
        for (int kind = 0; kind < 4; kind++) {
            request asked = large((pattern)which);
            asked.L = 75;
            asked.masked = kind == 3;
            asked.given_key = asked.Hk;
            fixture *plain = new_fixture(asked);
            asked.positions_first = kind != 1;
            asked.backwards = kind > 0;
            fixture *other = new_fixture(asked);
            CASE("pattern %d layout %d", which, kind);
            forward(plain);
            backward(plain);
            forward(other);
            backward(other);
            check_same_results(plain, other);
            free_fixture(plain);
            free_fixture(other);
        }
}

/* What lies between the rows of a strided output is the caller's. */
static void gaps_are_kept(void) {
    request asked = small;
    asked.positions_first = true;
    asked.dtype = CMB_FLOAT32;
    fixture *f = new_fixture(asked);
    CASE("gaps");
    forward(f);
    backward(f);
    const cmb_array *outputs[] = {&f->problem.out, &f->problem.lse, &f->gradients.query, &f->gradients.key};
    const int64_t dims[] = {asked.Dv, 1, asked.D, asked.D};
    for (int n = 0; n < 4; n++)
        for (int64_t x = 0; x < asked.L; x++)
            for (size_t byte = 0; byte < 3 * f->size; byte++)
                CHECK(element(f, outputs[n], 0, 0, x, dims[n])[byte] == 0x5a, "array %d row %lld", n, (long long)x);
    free_fixture(f);
}

/* One key for all positions, by a stride of zero. */
static void broadcast_inputs(void) {
    request asked = small;
    fixture *f = new_fixture(asked), *g = new_fixture(asked);
    CASE("broadcast");
    f->problem.key.row = 0;
    for (int64_t j = 0; j < asked.L; j++)
        for (int64_t d = 0; d < asked.D; d++)
            put(g, &g->problem.key, 0, 0, j, d, get(f, &f->problem.key, 0, 0, 0, d));
    forward(f);
    forward(g);
    backward(f);
    backward(g);
    check_same_results(f, g);
    free_fixture(f);
    free_fixture(g);
}

/* The numbers of a float array without gaps, rounded in place and as the 16-bit dtype has them. */
static void round_array(const cmb_half *half, const cmb_array *a, int64_t B, int64_t rows, int64_t dim, cmb_array *to) {
    const int64_t count = B * a->heads * rows * dim;
    if (!a->data)
        return;
    *to = *a;
    to->data = zeros((size_t)count, sizeof(uint16_t));
    half->narrow(count, a->data, to->data);
    half->widen(count, to->data, a->data);
}

static void check_rounded(const cmb_half *half, const cmb_array *a, const cmb_array *rounded, int64_t B, int64_t rows,
                          int64_t dim, const char *name) {
    const int64_t count = B * a->heads * rows * dim;
    if (!a->data)
        return;
    uint16_t *expected = zeros((size_t)count, sizeof *expected);
    half->narrow(count, a->data, expected);
    CHECK(memcmp(rounded->data, expected, (size_t)count * sizeof *expected) == 0, "%s: %s", name, context);
    free(expected);
}

/* Without products of pairs a 16-bit dtype has, to the bit, float's results, rounded. */
static void half_dtype(request asked, cmb_dtype dtype) {
    fixture *f = new_fixture(asked);
    const cmb_half *half = dtype == CMB_BFLOAT16 ? cmb_half_in_force_bf16() : cmb_half_in_force_f16();
    const int64_t B = asked.B, L = asked.L, R = f->plan->R, D = asked.D, Dv = asked.Dv;
    cmb_problem *p = &f->problem, q = *p;
    cmb_gradients *g = &f->gradients, d = *g;
    q.dtype = dtype;
    const struct {
        cmb_array *wide, *rounded;
        int64_t rows, dim;
        const char *name;
    } arrays[] = {
        {&p->query, &q.query, L, D, "query"},
        {&p->key, &q.key, L, D, "key"},
        {&p->value, &q.value, L, Dv, "value"},
        {&p->region_query, &q.region_query, R, D, "region_query"},
        {&p->region_key, &q.region_key, R, D, "region_key"},
        {&g->out, &d.out, L, Dv, "gradient of out"},
        {&p->out, &q.out, L, Dv, "out"},
        {&p->summary_value, &q.summary_value, R, Dv, "summary_value"},
        {&p->summary_key, &q.summary_key, R, D, "summary_key"},
        {&g->query, &d.query, L, D, "gradient of query"},
        {&g->key, &d.key, L, D, "gradient of key"},
        {&g->value, &d.value, L, Dv, "gradient of value"},
        {&g->region_query, &d.region_query, R, D, "gradient of region_query"},
        {&g->region_key, &d.region_key, R, D, "gradient of region_key"},
    };
    enum { COUNT = sizeof arrays / sizeof *arrays };
    for (int n = 0; n < COUNT; n++)
        round_array(half, arrays[n].wide, B, arrays[n].rows, arrays[n].dim, arrays[n].rounded);
    q.lse = new_array(f, asked.Hq, L, 1);
    q.summary_lse = new_array(f, asked.Hq, R, 1);
    cmb_error error = {0};
    forward(f);
    CHECK(cmb_forward(&q, NULL, &error) == CMB_OK, "%s: %s", error.message, context);
    CHECK(memcmp(q.lse.data, p->lse.data, (size_t)(B * asked.Hq * L) * sizeof(float)) == 0, "lse: %s", context);
    for (int n = 6; n < 9; n++) {
        check_rounded(half, arrays[n].wide, arrays[n].rounded, B, arrays[n].rows, arrays[n].dim, arrays[n].name);
        if (arrays[n].wide->data)
            half->widen(B * arrays[n].wide->heads * arrays[n].rows * arrays[n].dim, arrays[n].rounded->data,
                        arrays[n].wide->data);
    }
    backward(f);
    CHECK(cmb_backward(&q, &d, NULL, &error) == CMB_OK, "%s: %s", error.message, context);
    for (int n = 9; n < COUNT; n++)
        check_rounded(half, arrays[n].wide, arrays[n].rounded, B, arrays[n].rows, arrays[n].dim, arrays[n].name);
    for (int n = 0; n < COUNT; n++)
        if (arrays[n].wide->data)
            free(arrays[n].rounded->data);
    free_fixture(f);
}

static void half_dtypes(void) {
    const char *isa = cmb_get_isa();
    if (strcmp(isa, "avx512_bf16") == 0)
        CHECK(cmb_set_isa("avx512", NULL) == CMB_OK);
    for (int which = DENSE; which < PATTERNS; which++)
        for (int options = 0; options < 4; options++) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.B = 2;
            asked.Hq = 4;
            asked.Hk = 2;
            asked.L = 71;
            asked.options.is_causal = options & 1;
            asked.masked = options & 2;
            asked.given_query = options == 1;
            asked.given_key = options == 2 ? 2 : 0;
            asked.dtype = CMB_FLOAT32;
            for (int dtype = CMB_BFLOAT16; dtype <= CMB_FLOAT16; dtype++) {
                CASE("pattern %d options %d dtype %d", which, options, dtype);
                half_dtype(asked, (cmb_dtype)dtype);
            }
        }
    CHECK(cmb_set_isa(isa, NULL) == CMB_OK);
}

static void threads(void) {
    static const int counts[] = {1, 2, 3, 7};
    for (int which = DENSE; which < PATTERNS; which++) {
        fixture *f[4];
        for (int n = 0; n < 4; n++) {
            CASE("pattern %d threads %d", which, counts[n]);
            f[n] = new_fixture(large((pattern)which));
            CHECK(cmb_set_num_threads(counts[n], NULL) == CMB_OK);
            for (int again = 0; again < (n ? 2 : 1); again++) {
                forward(f[n]);
                backward(f[n]);
                check_same_results(f[0], f[n]);
            }
        }
        for (int n = 0; n < 4; n++)
            free_fixture(f[n]);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

/* Long enough for two threads to go through fused waves; seven go wave by wave. */
static void fused_waves(void) {
    static const int counts[] = {1, 2, 7};
    for (int which = FIXED; which <= LOGSPARSE; which++) {
        request asked = large((pattern)which);
        asked.L = which == FIXED ? 1100 : 2600; /* tasks have 256 positions, or 512 */
        asked.D = asked.Dv = 8;
        asked.options.pooling = which == FIXED ? CMB_POOL_MAX : CMB_POOL_FIRST;
        fixture *f[3];
        for (int n = 0; n < 3; n++) {
            CASE("pattern %d threads %d", which, counts[n]);
            f[n] = new_fixture(asked);
            CHECK(f[n]->plan->is_fusible);
            CHECK(cmb_set_num_threads(counts[n], NULL) == CMB_OK);
            forward(f[n]);
            backward(f[n]);
            check_same_results(f[0], f[n]);
        }
        for (int n = 0; n < 3; n++)
            free_fixture(f[n]);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

static void instruction_sets(void) {
    for (int which = DENSE; which < PATTERNS; which++)
        for (int dtype = 0; dtype < 2; dtype++) {
            fixture *known = NULL; /* of the first with FMA */
            for (int isa = cmb_isa_count() > 1; isa < cmb_isa_count(); isa++) {
                request asked = large((pattern)which);
                asked.dtype = (cmb_dtype)dtype;
                asked.masked = dtype;
                CHECK(cmb_set_isa(cmb_isa_name(isa), NULL) == CMB_OK);
                CASE("pattern %d isa %s", which, cmb_get_isa());
                fixture *f = new_fixture(asked);
                forward(f);
                backward(f);
                if (known)
                    check_same_results(known, f);
                else
                    known = f;
                if (f != known)
                    free_fixture(f);
            }
            free_fixture(known);
        }
}

/* A batch entry, a head and a causal prefix have the bits that they have in company; another scale has others. */
static void company(void) {
    for (int which = DENSE; which < PATTERNS; which++) {
        request asked = large((pattern)which);
        CASE("company in pattern %d", which);
        fixture *all = new_fixture(asked);
        asked.L = 70;
        fixture *prefix = new_fixture(asked);
        asked.L = all->asked.L;
        asked.B = asked.Hq = asked.Hk = 1;
        fixture *one = new_fixture(asked);
        /* the last batch entry's last head */
        one->problem.query.data = element(all, &all->problem.query, 1, 3, 0, 0);
        one->problem.key.data = element(all, &all->problem.key, 1, 1, 0, 0);
        one->problem.value.data = element(all, &all->problem.value, 1, 1, 0, 0);
        const cmb_array *from[] = {&all->problem.query, &all->problem.key, &all->problem.value};
        cmb_array *to[] = {&prefix->problem.query, &prefix->problem.key, &prefix->problem.value};
        for (int n = 0; n < 3; n++)
            *to[n] = *from[n];
        forward(all);
        forward(one);
        forward(prefix);
        for (int64_t x = 0; x < asked.L; x++)
            CHECK(memcmp(element(all, &all->problem.out, 1, 3, x, 0), element(one, &one->problem.out, 0, 0, x, 0),
                         (size_t)asked.Dv * all->size) == 0,
                  "row %lld: %s", (long long)x, context);
        check_same(prefix, &prefix->problem.out, all, &all->problem.out, 70, asked.Dv, "out");
        check_same(prefix, &prefix->problem.lse, all, &all->problem.lse, 70, 1, "lse");
        one->problem.scale *= 1.0001;
        forward(one);
        CHECK(memcmp(element(all, &all->problem.out, 1, 3, asked.L - 1, 0),
                     element(one, &one->problem.out, 0, 0, asked.L - 1, 0), (size_t)asked.Dv * all->size) != 0,
              "%s", context);
        free_fixture(all);
        free_fixture(prefix);
        free_fixture(one);
    }
}

/* ---- the stages --------------------------------------------------------------------------------- */

static void add_arrays(const fixture *f, const cmb_array *to, const fixture *g, const cmb_array *from, int64_t n,
                       int64_t dim) {
    for (int64_t b = 0; b < f->asked.B; b++)
        for (int64_t h = 0; h < to->heads; h++)
            for (int64_t x = 0; x < n; x++)
                for (int64_t d = 0; d < dim; d++)
                    put(f, to, b, h, x, d, get(f, to, b, h, x, d) + get(g, from, b, h, x, d));
}

/* Numbers that are there already, and what a call makes alone, to the bit of their sum. */
static void adding(void) {
    static const int counts[] = {1, 2, 7};
    for (int which = DENSE; which < PATTERNS; which++)
        for (int options = 0; options < 6; options++) {
            request asked = large((pattern)which);
            asked.L = 75;
            asked.dtype = (cmb_dtype)(options & 1);
            asked.options.is_causal = options & 1;
            asked.masked = options >> 1 == 1;
            asked.given_query = options >> 1 == 2;
            asked.given_key = options >> 1 == 2 ? asked.Hk : 0;
            asked.positions_first = options & 1;
            CASE("pattern %d options %d", which, options);
            fixture *alone = new_fixture(asked), *sums = new_fixture(asked);
            cmb_problem *p = &alone->problem, *q = &sums->problem;
            cmb_gradients *g = &alone->gradients, *k = &sums->gradients;
            forward(alone);
            backward(alone);
            const struct {
                const cmb_array *alone, *sum;
                int64_t dim;
            } grads[] = {
                {&g->query, &k->query, asked.D}, {&g->key, &k->key, asked.D}, {&g->value, &k->value, asked.Dv}};
            for (int n = 0; n < 3; n++) {
                fill(sums, grads[n].sum, asked.L, grads[n].dim);
                add_arrays(alone, grads[n].alone, sums, grads[n].sum, asked.L, grads[n].dim);
            }
            const cmb_array out = q->out;
            q->adds = true;
            q->out = p->out;
            q->lse = p->lse;
            q->summary_key = p->summary_key;
            q->summary_value = p->summary_value;
            q->summary_lse = p->summary_lse;
            CHECK(cmb_set_num_threads(counts[options % 3], NULL) == CMB_OK);
            backward(sums);
            q->out = out;
            fill(sums, &out, asked.L, asked.Dv);
            add_arrays(alone, &p->out, sums, &out, asked.L, asked.Dv);
            forward(sums);
            check_same_results(alone, sums);
            free_fixture(alone);
            free_fixture(sums);
        }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

/* SUMMARIZE, then ATTEND: BOTH's bits forward; backward, gradients that add up to the definition's. */
static void stages(void) {
    for (int which = FIXED; which < PATTERNS; which++)
        for (int options = 0; options < 24; options++) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.B = 2;
            asked.Hq = 4;
            asked.Hk = 2;
            asked.dtype = (cmb_dtype)(options & 1);
            asked.options.is_causal = options >> 1 & 1;
            asked.options.pooling = (cmb_pooling)(options % 3);
            asked.masked = options >> 2 & 1;
            asked.given_query = options >> 3;
            asked.given_key = options >> 3 == 0 ? 0 : options >> 3 == 1 ? asked.Hk : asked.Hq;
            asked.summary_key = options & 4 || asked.given_key == asked.Hq ? asked.Hq : asked.Hk;
            CASE("stages of pattern %d options %d", which, options);
            fixture *both = new_fixture(asked), *attend = new_staged_fixture(asked),
                    *summarize = new_staged_fixture(asked);
            cmb_problem *p = &attend->problem, *q = &summarize->problem;
            cmb_gradients *g = &attend->gradients, *k = &summarize->gradients;
            forward(both);
            q->stages = CMB_SUMMARIZE;
            q->out.data = q->lse.data = NULL;
            forward(summarize);
            p->stages = CMB_ATTEND;
            p->region_query.data = p->region_key.data = p->summary_lse.data = NULL;
            p->summary_key = q->summary_key;
            p->summary_value = q->summary_value;
            forward(attend);
            p->summary_lse = q->summary_lse;
            check_same_forward(both, attend);
            p->summary_lse.data = NULL;

            backward(attend);
            k->summary_key = g->summary_key;
            k->summary_value = g->summary_value;
            backward(summarize);
            add_arrays(attend, &g->query, summarize, &k->query, asked.L, asked.D);
            add_arrays(attend, &g->key, summarize, &k->key, asked.L, asked.D);
            add_arrays(attend, &g->value, summarize, &k->value, asked.L, asked.Dv);
            g->region_query = k->region_query;
            g->region_key = k->region_key;
            p->summary_lse = q->summary_lse;
            p->region_query = q->region_query;
            p->region_key = q->region_key;
            check_results(attend);
            free_fixture(both);
            free_fixture(attend);
            free_fixture(summarize);
        }
}

/* Summaries' gradients may be absent: then they are zeros. */
static void absent_gradients(void) {
    request asked = small;
    fixture *f = new_staged_fixture(asked), *g = new_staged_fixture(asked);
    CASE("absent gradients");
    for (int n = 0; n < 2; n++) {
        fixture *x = n ? g : f;
        x->problem.stages = CMB_SUMMARIZE;
        forward(x);
        for (int64_t r = 0; r < x->plan->R; r++) {
            for (int64_t d = 0; d < asked.D; d++)
                put(x, &x->gradients.summary_key, 0, 0, r, d, 0);
            for (int64_t d = 0; d < asked.Dv; d++)
                put(x, &x->gradients.summary_value, 0, 0, r, d, (double)r);
        }
    }
    g->gradients.summary_key.data = NULL;
    backward(f);
    backward(g);
    check_same_results(f, g);
    free_fixture(f);
    free_fixture(g);

    asked.dtype = CMB_FLOAT32;
    f = new_fixture(asked);
    g = new_fixture(asked);
    for (int64_t x = 0; x < asked.L; x++)
        put(f, &f->gradients.lse, 0, 0, x, 0, 0);
    g->gradients.lse.data = NULL;
    forward(f);
    forward(g);
    backward(f);
    backward(g);
    check_same_results(f, g);
    free_fixture(f);
    free_fixture(g);
}

/* Packed sequences are in every bit what each is alone: here the second has its arrays begin where it does. */
static void packed(void) {
    enum { AT = 35 };
    request asked = small;
    asked.pattern = FIXED;
    asked.span = 7;
    asked.L = 91; /* 13 regions: 5 and 8 */
    for (int kind = 0; kind < 4; kind++) {
        asked.dtype = kind & 1 ? CMB_FLOAT64 : CMB_FLOAT32;
        asked.masked = kind & 2;
        asked.given_key = kind == 3 ? asked.Hk : 0;
        asked.options.is_causal = kind > 0;
        fixture *whole = new_fixture(asked), *parts = new_fixture(asked);
        CASE("packed %d", kind);
        request one = asked, two = asked;
        one.L = AT;
        two.L = asked.L - AT;
        cmb_plan *plan[] = {new_plan(&one), new_plan(&two)};
        const int64_t segment[] = {0, AT, asked.L};
        whole->problem.segments = 2;
        whole->problem.segment = segment;
        whole->problem.plan = (const cmb_plan *const *)plan;
        whole->problem.plans = 2;
        parts->problem.dropout_p = whole->problem.dropout_p = kind ? 0.25 : 0;
        forward(whole);
        backward(whole);
        for (int s = 0; s < 2; s++) {
            cmb_problem p = parts->problem;
            cmb_gradients g = parts->gradients;
            const int64_t at = segment[s], region = s ? plan[0]->R : 0;
            cmb_array *const of_positions[] = {&p.query, &p.key, &p.value, &p.out, &p.lse,
                                               &g.out,   &g.lse, &g.query, &g.key, &g.value};
            cmb_array *const of_regions[] = {&p.region_key, &p.summary_value, &p.summary_lse, &g.region_key};
            for (size_t n = 0; n < sizeof of_positions / sizeof *of_positions; n++)
                of_positions[n]->data = element(parts, of_positions[n], 0, 0, at, 0);
            for (size_t n = 0; n < sizeof of_regions / sizeof *of_regions; n++)
                if (of_regions[n]->data)
                    of_regions[n]->data = element(parts, of_regions[n], 0, 0, region, 0);
            p.L = segment[s + 1] - at;
            p.plan = (const cmb_plan *const *)&plan[s];
            p.key_mask = p.key_mask ? p.key_mask + at : NULL;
            cmb_error error = {0};
            CHECK(cmb_forward(&p, NULL, &error) == CMB_OK, "%s", error.message);
            CHECK(cmb_backward(&p, &g, NULL, &error) == CMB_OK, "%s", error.message);
        }
        check_same_results(whole, parts);
        cmb_plan_free(plan[0]);
        cmb_plan_free(plan[1]);
        free_fixture(whole);
        free_fixture(parts);
    }
}

/* ---- errors ------------------------------------------------------------------------------------- */

static void expect(const fixture *f, bool is_backward, cmb_status status, const char *words) {
    cmb_error error = {0};
    const cmb_status got =
        is_backward ? cmb_backward(&f->problem, &f->gradients, NULL, &error) : cmb_forward(&f->problem, NULL, &error);
    CHECK(got == status, "%d, not %d: \"%s\" for \"%s\"", got, status, error.message, words);
    CHECK(error.status == status && strstr(error.message, words), "\"%s\" for \"%s\"", error.message, words);
    CHECK(is_backward ? cmb_backward(&f->problem, &f->gradients, NULL, NULL) == status
                      : cmb_forward(&f->problem, NULL, NULL) == status);
}

/* A change to a good problem, and the words that must come back; undone afterwards. */
#define WRONG(is_backward, status, words, ...)           \
    do {                                                 \
        const fixture good_ = *f;                        \
        __VA_ARGS__;                                     \
        expect(f, is_backward, CMB_ERR_##status, words); \
        *f = good_;                                      \
    } while (0)

static void wrong_arguments(void) {
    request asked = small;
    asked.Hq = 4;
    asked.Hk = 2;
    asked.given_query = true;
    asked.given_key = 2;
    fixture *f = new_staged_fixture(asked);
    cmb_problem *p = &f->problem;
    cmb_gradients *g = &f->gradients;
    void *before[ARRAYS];
    CASE("wrong arguments");
    for (int i = 0; i < f->blocks; i++) {
        before[i] = zeros(f->block[i].bytes, 1);
        memcpy(before[i], f->block[i].memory, f->block[i].bytes);
    }

    WRONG(false, VALUE, "dtype must be between 0 and 3, got 7", memset(&p->dtype, 0, sizeof p->dtype);
          memset(&p->dtype, 7, 1));
    WRONG(false, VALUE, "stages must be 1, 2 or 3, got 0", memset(&p->stages, 0, sizeof p->stages));
    WRONG(false, VALUE, "stages must be 1, 2 or 3, got 4", memset(&p->stages, 0, sizeof p->stages);
          memset(&p->stages, 4, 1));
    WRONG(false, VALUE, "B must be between 0 and 9223372036854775807, got -1", p->B = -1);
    WRONG(false, VALUE, "Hq must be", p->Hq = -4);
    WRONG(false, VALUE, "Hk must be", p->Hk = -2);
    WRONG(false, VALUE, "L must be between 0 and", p->L = -1);
    WRONG(false, VALUE, "adds must be false for 16-bit dtypes", p->adds = true; p->dtype = CMB_BFLOAT16);
    WRONG(false, VALUE, "dropout_p must be between 0 and 1, got -0.5", p->dropout_p = -0.5);
    WRONG(false, VALUE, "dropout_p must be between 0 and 1, got 1.5", p->dropout_p = 1.5);
    WRONG(false, VALUE, "dropout_p must be between 0 and 1, got", p->dropout_p = NAN);
    const int64_t late[] = {1, asked.L}, short_of[] = {0, asked.L - 1}, down[] = {0, 3, 2, asked.L};
    WRONG(false, VALUE, "segments must be between 0 and 2^31 - 1, got -1", p->segment = late; p->segments = -1);
    WRONG(false, VALUE, "and not decrease, got 1 at 0", p->segment = late; p->segments = 1);
    WRONG(false, VALUE, "segment must run from 0 to 23 and not decrease, got 22 at 1", p->segment = short_of;
          p->segments = 1);
    WRONG(false, VALUE, "and not decrease, got 2 at 2", p->segment = down; p->segments = 3);
    WRONG(false, VALUE, "and not decrease, got 0 at 0", p->segment = short_of; p->segments = 0);
    WRONG(false, VALUE, "L must be between 0 and", p->L = INT64_C(1) << 31);
    WRONG(false, VALUE, "D must be between 1 and 1024, got 0", p->D = 0);
    WRONG(false, VALUE, "D must be between 1 and 1024, got 1025", p->D = 1025);
    WRONG(false, VALUE, "Dv must be between 1 and 1024, got 0", p->Dv = 0);
    WRONG(false, VALUE, "Dv must be between 1 and 1024, got 1025", p->Dv = 1025);
    WRONG(false, VALUE, "query heads must be a multiple of key heads, got 4 and 3", p->Hk = 3);
    WRONG(false, VALUE, "query heads must be a multiple of key heads, got 4 and 0", p->Hk = 0);
    WRONG(false, VALUE, "scale must be finite, got nan", p->scale = NAN);
    WRONG(false, VALUE, "scale must be finite, got inf", p->scale = INFINITY);
    WRONG(false, OVERFLOW, "B * Hq * L", p->B = INT64_MAX);
    WRONG(false, OVERFLOW, "B * Hk does not", p->B = p->Hk = INT64_C(1) << 40; p->Hq = 0);
    WRONG(false, VALUE, "plans must be 1 or B * Hk = 2, for each of 1 segments, got 3", p->plans = 3);
    WRONG(false, VALUE, "plans must be 1 or B * Hk = 2, for each of 1 segments, got 0", p->plans = 0);
    WRONG(false, VALUE, "plan must be of length 22, got 23", p->L = 22);
    WRONG(false, VALUE, "plan is missing", p->plan = NULL);
    WRONG(true, VALUE, "plan is missing", p->plan = NULL);

    static const struct {
        const char *name;
        size_t offset;
        bool optional;
    } arrays[] = {
        {"query", offsetof(cmb_problem, query), false},
        {"key", offsetof(cmb_problem, key), false},
        {"value", offsetof(cmb_problem, value), false},
        {"region_query", offsetof(cmb_problem, region_query), true},
        {"region_key", offsetof(cmb_problem, region_key), true},
        {"summary_key", offsetof(cmb_problem, summary_key), true},
        {"summary_value", offsetof(cmb_problem, summary_value), true},
        {"summary_lse", offsetof(cmb_problem, summary_lse), true},
        {"out", offsetof(cmb_problem, out), false},
        {"lse", offsetof(cmb_problem, lse), false},
    };
    for (size_t n = 0; n < sizeof arrays / sizeof *arrays; n++) {
        cmb_array *a = (cmb_array *)(void *)((char *)p + arrays[n].offset);
        char words[64];
        if (!arrays[n].optional) {
            snprintf(words, sizeof words, "%s is missing", arrays[n].name);
            WRONG(false, VALUE, words, a->data = NULL);
        }
        snprintf(words, sizeof words, "%s must have ", arrays[n].name);
        WRONG(false, VALUE, words, a->heads = 7);
        snprintf(words, sizeof words, "%s spans more than can be addressed", arrays[n].name);
        WRONG(false, OVERFLOW, words, a->row = INT64_MAX / 4);
        WRONG(false, OVERFLOW, words, a->row = INT64_MIN);
        WRONG(false, OVERFLOW, words, a->head = INT64_MIN / 4);
        WRONG(false, OVERFLOW, words, p->B = 3; a->batch = INT64_MAX / 4; p->plans = 1);
    }

    p->stages = CMB_SUMMARIZE;
    WRONG(false, VALUE, "summary_key is missing", p->summary_key.data = NULL);
    WRONG(false, VALUE, "summary_value is missing", p->summary_value.data = NULL);
    WRONG(false, VALUE, "summary_lse is missing", p->summary_lse.data = NULL);
    WRONG(true, VALUE, "gradient of summary_key must have", g->summary_key.heads = 3);
    WRONG(true, VALUE, "gradient of summary_key must have", p->summary_key.data = NULL; p->summary_key.heads = 0;
          g->summary_key.heads = 0);
    WRONG(true, VALUE, "gradient of summary_key must have", p->summary_key.data = NULL; p->summary_key.heads = 3;
          g->summary_key.heads = 3);
    WRONG(true, VALUE, "gradient of summary_value must have", g->summary_value.heads = 2);
    WRONG(true, VALUE, "gradient of region_query is missing", g->region_query.data = NULL);
    WRONG(true, VALUE, "gradient of region_key is missing", g->region_key.data = NULL);
    WRONG(true, VALUE, "gradient of region_key must have 2 heads, got 4", g->region_key.heads = 4);
    p->stages = CMB_ATTEND;
    WRONG(false, VALUE, "summary_key is missing", p->summary_key.data = NULL);
    WRONG(false, VALUE, "summary_value is missing", p->summary_value.data = NULL);
    WRONG(true, VALUE, "gradient of summary_key is missing", g->summary_key.data = NULL);
    WRONG(true, VALUE, "gradient of summary_value is missing", g->summary_value.data = NULL);
    p->stages = CMB_BOTH;
    WRONG(true, VALUE, "summary_value is missing", p->summary_value.data = NULL);
    WRONG(true, VALUE, "summary_lse is missing", p->summary_lse.data = NULL);
    WRONG(true, VALUE, "gradient of out is missing", g->out.data = NULL);
    WRONG(true, VALUE, "gradient of lse must have 4 heads, got 2", g->lse.heads = 2);
    WRONG(true, VALUE, "gradient of query is missing", g->query.data = NULL);
    WRONG(true, VALUE, "gradient of key is missing", g->key.data = NULL);
    WRONG(true, VALUE, "gradient of value is missing", g->value.data = NULL);
    WRONG(true, OVERFLOW, "gradient of query spans more than can be addressed", g->query.row = INT64_MAX / 4);

    for (int i = 0; i < f->blocks; i++) {
        CHECK(memcmp(before[i], f->block[i].memory, f->block[i].bytes) == 0, "an error wrote to array %d", i);
        free(before[i]);
    }
    free_fixture(f);
}

/* Plans of one call agree in everything but their lists; each key head may have its own. */
static void plans(void) {
    request asked = small;
    asked.B = 1;
    asked.Hq = 4;
    asked.Hk = 2;
    CASE("plans");
    fixture *f = new_fixture(asked);
    request other = asked;
    const cmb_plan *pair[2] = {f->plan, NULL};
    f->problem.plan = pair;
    f->problem.plans = 2;
    expect(f, false, CMB_ERR_VALUE, "plan is missing");
    for (int n = 0; n < 3; n++) {
        other = asked;
        if (n == 0)
            other.options.is_causal = true;
        else if (n == 1)
            other.options.pooling = CMB_POOL_SUM;
        else
            other.options.size_bias = true;
        cmb_plan *wrong = new_plan(&other);
        pair[1] = wrong;
        expect(f, false, CMB_ERR_VALUE, "must agree");
        cmb_plan_free(wrong);
    }
    other = asked;
    other.L = asked.L - 1;
    cmb_plan *wrong = new_plan(&other);
    pair[1] = wrong;
    expect(f, false, CMB_ERR_VALUE, "plan must be of length 23, got 22");
    cmb_plan_free(wrong);

    other = asked;
    other.pattern = LOGSPARSE; /* with more regions than the first */
    fixture *alone = new_fixture(other), *whole = new_fixture(asked);
    pair[1] = alone->plan;
    const int64_t R = alone->plan->R;
    f->problem.summary_value.data = f->problem.summary_lse.data = NULL;
    forward(f);
    forward(whole);
    forward(alone);
    CHECK(R > f->plan->R);
    for (int64_t h = 0; h < 4; h++)
        for (int64_t x = 0; x < asked.L; x++) {
            const fixture *right = h < 2 ? whole : alone;
            CHECK(memcmp(element(f, &f->problem.out, 0, h, x, 0), element(right, &right->problem.out, 0, h, x, 0),
                         (size_t)asked.Dv * f->size) == 0,
                  "head %lld row %lld", (long long)h, (long long)x);
        }
    free_fixture(f);
    free_fixture(alone);
    free_fixture(whole);
}

/* ---- memory ------------------------------------------------------------------------------------- */

/* A call takes what it said, all of it before its first store, and gives it back; where it cannot, nothing happens. */
static void memory(void) {
    for (int which = DENSE; which < PATTERNS; which++)
        for (int is_backward = 0; is_backward < 2; is_backward++)
            for (int is_large = 0; is_large < 2; is_large++) {
                request asked = is_large ? large((pattern)which) : small;
                asked.pattern = (pattern)which;
                fixture *f = new_fixture(asked);
                test_heap heap = {0};
                size_t bytes = 0;
                bool done = false;
                CASE("memory of pattern %d backward %d large %d", which, is_backward, is_large);
                forward(f);
                if (!is_backward) /* so that a store shows */
                    memset(f->problem.out.data, 0x5a, (size_t)(asked.B * f->problem.out.batch) * f->size);
                CHECK(cmb_workspace_bytes(&f->problem, is_backward, &bytes, NULL) == CMB_OK);
                test_heap_use(&heap);
                for (int64_t k = 1; !done; k++)
                    for (int forever = 0; forever < 2; forever++) {
                        void *before[ARRAYS];
                        for (int i = 0; i < f->blocks; i++) {
                            before[i] = zeros(f->block[i].bytes, 1);
                            memcpy(before[i], f->block[i].memory, f->block[i].bytes);
                        }
                        cmb_error error = {0};
                        heap.calls = 0;
                        heap.peak = 0;
                        heap.fail = k;
                        heap.forever = forever;
                        const cmb_status status = is_backward ? cmb_backward(&f->problem, &f->gradients, NULL, &error)
                                                              : cmb_forward(&f->problem, NULL, &error);
                        CHECK(heap.live == 0, "%lld bytes are lost: %s", (long long)heap.live, context);
                        done = status == CMB_OK;
                        CHECK(done || (status == CMB_ERR_MEMORY && strstr(error.message, "no memory")), "%s", context);
                        CHECK(!done || (size_t)heap.peak == bytes, "%lld bytes, not %zu: %s", (long long)heap.peak,
                              bytes, context);
                        for (int i = 0; i < f->blocks; i++) {
                            CHECK(done || memcmp(before[i], f->block[i].memory, f->block[i].bytes) == 0,
                                  "array %d was written: %s", i, context);
                            free(before[i]);
                        }
                    }
                test_heap_use(NULL);
                if (!is_large) {
                    backward(f);
                    check_results(f);
                }
                free_fixture(f);
            }
}

/* Stages and batches change the workspace as the formula says, and it does not grow with L times L. */
static void workspace(void) {
    request asked = large(FIXED);
    size_t bytes[2];
    for (int n = 0; n < 2; n++) {
        asked.L = 4096 << n;
        asked.span = 64;
        fixture *f = new_fixture(asked);
        CHECK(cmb_workspace_bytes(&f->problem, true, &bytes[n], NULL) == CMB_OK);
        free_fixture(f);
    }
    CHECK(bytes[1] < 2 * bytes[0], "%zu, then %zu", bytes[0], bytes[1]);
    cmb_error error = {0};
    fixture *f = new_fixture(asked);
    f->problem.D = 0;
    CHECK(cmb_workspace_bytes(&f->problem, true, &bytes[0], &error) == CMB_ERR_VALUE && error.message[0] == 'D');
    free_fixture(f);
}

/* ---- cancelling --------------------------------------------------------------------------------- */

typedef struct {
    pthread_t caller;
    int polls, stop_at; /* 0: never */
} poller;

static bool poll_caller(void *state) {
    poller *p = state;
    CHECK(pthread_equal(p->caller, pthread_self()));
    return ++p->polls == p->stop_at;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* A call of a second or many ends soon after its poll says so, and the next one is right. */
static void cancel(void) {
    request asked = large(DENSE);
    asked.dtype = CMB_FLOAT64;
    asked.B = 1;
    asked.Hq = 2;
    asked.Hk = 1;
    asked.L = 20000;
    asked.D = asked.Dv = 64;
    fixture *f = new_fixture(asked);
    CASE("cancel");
    for (int count = 1; count <= 3; count += 2)
        for (int is_backward = 0; is_backward < 2; is_backward++) {
            poller state = {pthread_self(), 0, 2};
            const cmb_interrupt interrupt = {poll_caller, &state};
            cmb_error error = {0};
            test_heap heap = {0};
            CHECK(cmb_set_num_threads(count, NULL) == CMB_OK);
            test_heap_use(&heap);
            const double start = seconds();
            const cmb_status status = is_backward ? cmb_backward(&f->problem, &f->gradients, &interrupt, &error)
                                                  : cmb_forward(&f->problem, &interrupt, &error);
            const double took = seconds() - start;
            test_heap_use(NULL);
            CHECK(status == CMB_ERR_CANCELLED && strcmp(error.message, "cancelled") == 0, "%d", status);
            CHECK(state.polls == 2 && heap.live == 0);
            CHECK(took < 5, "%.2f s", took); /* 0.1 s on a machine that has nothing else to do */
            check_against_definition(small);
        }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
    free_fixture(f);
}

/* A poll that never stops changes nothing. */
static void poll_changes_nothing(void) {
    request asked = large(LOGSPARSE);
    fixture *f = new_fixture(asked), *g = new_fixture(asked);
    poller state = {pthread_self(), 0, 0};
    const cmb_interrupt interrupt = {poll_caller, &state}, nothing = {NULL, NULL};
    CASE("poll");
    forward(f);
    backward(f);
    CHECK(cmb_forward(&g->problem, &interrupt, NULL) == CMB_OK);
    CHECK(cmb_backward(&g->problem, &g->gradients, &interrupt, NULL) == CMB_OK);
    check_same_results(f, g);
    CHECK(cmb_forward(&g->problem, &nothing, NULL) == CMB_OK);
    check_same_results(f, g);
    free_fixture(f);
    free_fixture(g);
}

/* ---- callers ------------------------------------------------------------------------------------ */

typedef struct {
    const fixture *right;
    fixture *own; /* reads `right`'s inputs and plan */
    int rounds;
} caller;

/* A fixture with outputs of its own that shares the rest. */
static caller new_caller(const fixture *right, int rounds) {
    caller c = {right, new_fixture(right->asked), rounds};
    c.own->problem.plan = right->problem.plan;
    c.own->problem.query = right->problem.query;
    c.own->problem.key = right->problem.key;
    c.own->problem.value = right->problem.value;
    c.own->gradients.out = right->gradients.out;
    return c;
}

static void *call_many_times(void *argument) {
    const caller *c = argument;
    for (int n = 0; n < c->rounds; n++) {
        forward(c->own);
        backward(c->own);
        check_same_results(c->right, c->own);
    }
    return NULL;
}

static void callers_at_once(void) {
    enum { CALLERS = 4 };
    CHECK(cmb_set_num_threads(3, NULL) == CMB_OK);
    for (int which = FIXED; which <= LOGSPARSE; which++) {
        fixture *right = new_fixture(large((pattern)which));
        pthread_t thread[CALLERS];
        caller c[CALLERS];
        CASE("callers at once, pattern %d", which);
        forward(right);
        backward(right);
        for (int n = 0; n < CALLERS; n++) {
            c[n] = new_caller(right, 2);
            CHECK(pthread_create(&thread[n], NULL, call_many_times, &c[n]) == 0);
        }
        for (int n = 0; n < CALLERS; n++) {
            CHECK(pthread_join(thread[n], NULL) == 0);
            free_fixture(c[n].own);
        }
        free_fixture(right);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

/* Children of a process whose pool is at work or at rest compute what their parent does. */
static void forks(void) {
    fixture *right = new_fixture(large(LOGSPARSE));
    caller busy = new_caller(right, 6), own = new_caller(right, 1);
    pthread_t thread;
    CASE("forks");
    CHECK(cmb_set_num_threads(3, NULL) == CMB_OK);
    forward(right);
    backward(right);
    for (int at_work = 0; at_work < 2; at_work++) {
        CHECK(!at_work || pthread_create(&thread, NULL, call_many_times, &busy) == 0);
        for (int n = 0; n < 4; n++) {
            const pid_t child = fork();
            CHECK(child >= 0);
            if (child == 0) {
                alarm(30);
                call_many_times(&own);
                raise(SIGKILL); /* no exit: a leak checker would find what the parent's threads held */
            }
            call_many_times(&own);
            int status = 0;
            CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
                  "status %#x", (unsigned)status);
        }
        CHECK(!at_work || pthread_join(thread, NULL) == 0);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
    free_fixture(busy.own);
    free_fixture(own.own);
    free_fixture(right);
}

/* What a call reads stays as it was. */
static void inputs_are_kept(void) {
    for (int which = DENSE; which < PATTERNS; which++) {
        request asked = large((pattern)which);
        asked.given_query = true;
        asked.given_key = asked.Hk;
        fixture *f = new_fixture(asked), *fresh = new_fixture(asked);
        CASE("inputs of pattern %d", which);
        forward(f);
        backward(f);
        for (int i = 0; i < 7; i++) /* query, key, value, gradients of out and lse, region_query, region_key */
            CHECK(memcmp(f->block[i].memory, fresh->block[i].memory, f->block[i].bytes) == 0, "array %d: %s", i,
                  context);
        free_fixture(f);
        free_fixture(fresh);
    }
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(every_pattern),
        TEST(every_option),
        TEST(masked_and_poisoned),
        TEST(poison_stays),
        TEST(empty),
        TEST(layouts),
        TEST(gaps_are_kept),
        TEST(broadcast_inputs),
        TEST(half_dtypes),
        TEST(threads),
        TEST(fused_waves),
        TEST(instruction_sets),
        TEST(company),
        TEST(adding),
        TEST(stages),
        TEST(packed),
        TEST(absent_gradients),
        TEST(wrong_arguments),
        TEST(plans),
        TEST(memory),
        TEST(workspace),
        TEST(cancel),
        TEST(poll_changes_nothing),
        TEST(callers_at_once),
        TEST(forks),
        TEST(inputs_are_kept),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

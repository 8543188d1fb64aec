// SPDX-License-Identifier: Apache-2.0
/*
 * Problems for the tests of cmb_forward and cmb_backward: a request says what a test asks for, a fixture is the problem
 * with its plan, its arrays and its gradients, filled from the same random numbers for the same sizes.
 */
#ifndef CMB_TEST_PROBLEMS_H
#define CMB_TEST_PROBLEMS_H

#include "arrays.h"
#include "random.h"

#include <math.h>

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
    ROUTING,      /* span: how many clusters */
    WINDOW,       /* span: the size */
    FIXED_WINDOW, /* span: of Fixed, and the window */
    HEAVY,        /* HeavilyCompressed; span: the rate and the window */
    PATTERNS,
} pattern;

/* What a test asks for. Fields that are left 0 ask for the plain case, except for the sizes. */
typedef struct {
    pattern pattern;
    int64_t span;
    cmb_plan_options options;
    cmb_dtype dtype;
    int64_t B, Hq, Hk, L, D, Dv;
    bool masked, given_query;
    int64_t given_key;   /* heads of region_key; 0: pooled */
    int64_t summary_key; /* heads of summary_key in a staged fixture; 0: Hk */
    bool softcap, sink;
    int64_t key_bias, region_bias; /* their heads; 0: none */
    bool positions_first;          /* arrays are [B, L, H, D] with gaps between the rows */
    bool backwards;                /* negative strides */
} request;

enum { ARRAYS = 36 };

/* A problem, its gradients and the memory of both. */
typedef struct {
    request asked;
    cmb_plan *plan;
    cmb_problem problem;
    cmb_gradients gradients;
    uint8_t *mask;
    size_t size; /* of one number */
    test_block block[ARRAYS];
    int blocks;
} fixture;

static inline char *element(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d) {
    return array_at(f->size, a, b, h, x, d);
}

static inline double get(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d) {
    return array_get(f->size, a, b, h, x, d);
}

static inline void put(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d, double value) {
    array_put(f->size, a, b, h, x, d, value);
}

static inline cmb_array new_array(fixture *f, int64_t heads, int64_t rows, int64_t dim) {
    const layout lies = {f->asked.positions_first, f->asked.backwards};
    CHECK(f->blocks < ARRAYS);
    return array_make(f->size, lies, f->asked.B, heads, rows, dim, &f->block[f->blocks++]);
}

static inline void fill(const fixture *f, const cmb_array *a, int64_t rows, int64_t dim) {
    for (int64_t b = 0; b < f->asked.B; b++) /* in the same order for every layout */
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t x = 0; x < rows; x++)
                for (int64_t d = 0; d < dim; d++)
                    put(f, a, b, h, x, d, uniform(-1, 1));
}

static inline cmb_array new_input(fixture *f, int64_t heads, int64_t rows, int64_t dim) {
    const cmb_array a = new_array(f, heads, rows, dim);
    fill(f, &a, rows, dim);
    return a;
}

static inline cmb_status build(const request *asked, cmb_plan **plan, cmb_error *error) {
    const int64_t L = asked->L, span = asked->span;
    const cmb_plan_options *options = &asked->options;
    const bool is_weighted = asked->pattern == WEIGHTED;
    switch (asked->pattern) {
    case DENSE:
        return cmb_plan_dense(L, options, plan, error);
    case FIXED:
        return cmb_plan_fixed(L, span, 1, options, plan, error);
    case LOGSPARSE:
    case HIERARCHICAL:
        return cmb_plan_logsparse(L, asked->pattern == HIERARCHICAL, options, plan, error);
    case TREE:
        return cmb_plan_tree(L, span + 1, 0, options, plan, error);
    case MIXTURE:
        return cmb_plan_axial_mixture(L, span, options, plan, error);
    case FIXED_WINDOW:
        return cmb_plan_fixed(L, span, span, options, plan, error);
    case WINDOW:
        return cmb_plan_window(L, span, options, plan, error);
    case HEAVY:
        return cmb_plan_heavily_compressed(L, span, span, options, plan, error);
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

static inline cmb_plan *new_plan(const request *asked) {
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    CHECK(build(asked, &plan, &error) == CMB_OK, "%s", error.message);
    return plan;
}

/* Everything that CMB_BOTH needs, forward and backward. The same sizes get the same random numbers. */
static inline fixture *new_fixture(request asked) {
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
    if (asked.softcap)
        p->softcap = 0.7;
    if (asked.key_bias)
        p->key_bias = new_input(f, asked.key_bias, L, 1);
    if (asked.region_bias)
        p->region_bias = new_input(f, asked.region_bias, R, 1);
    if (asked.sink)
        p->sink = new_input(f, Hq, 1, 1);
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
    if (f->plan->weighted && asked.key_bias && !asked.region_bias)
        p->summary_bias = new_array(f, Hq, R, 1);
    p->summary_value = new_array(f, Hq, R, Dv);
    p->summary_lse = new_array(f, Hq, R, 1);
    p->summary_softmax = new_array(f, Hq, R, 2);
    p->out = new_array(f, Hq, L, Dv);
    p->lse = new_array(f, Hq, L, 1);
    p->softmax = new_array(f, Hq, L, 2);
    g->query = new_array(f, Hq, L, D);
    g->key = new_array(f, Hk, L, D);
    g->value = new_array(f, Hk, L, Dv);
    if (asked.given_query)
        g->region_query = new_array(f, Hq, R, D);
    if (asked.given_key)
        g->region_key = new_array(f, asked.given_key, R, D);
    if (asked.key_bias)
        g->key_bias = new_array(f, asked.key_bias, L, 1);
    if (asked.region_bias)
        g->region_bias = new_array(f, asked.region_bias, R, 1);
    if (asked.sink)
        g->sink = new_array(f, Hq, 1, 1);
    return f;
}

/* The same problem with the arrays that one stage at a time needs: k_R and the gradients of the summaries. */
static inline fixture *new_staged_fixture(request asked) {
    fixture *f = new_fixture(asked);
    const int64_t heads = asked.summary_key ? asked.summary_key : asked.Hk;
    if (!f->problem.summary_key.data)
        f->problem.summary_key = new_array(f, heads, f->plan->R, asked.D);
    f->gradients.summary_key = new_array(f, f->problem.summary_key.heads, f->plan->R, asked.D);
    f->gradients.summary_value = new_array(f, asked.Hq, f->plan->R, asked.Dv);
    return f;
}

static inline void free_fixture(fixture *f) {
    cmb_plan_free(f->plan);
    for (int i = 0; i < f->blocks; i++)
        free(f->block[i].memory);
    free(f->mask);
    free(f);
}

static inline void forward(const fixture *f) {
    cmb_error error = {0};
    CHECK(cmb_forward(&f->problem, NULL, &error) == CMB_OK, "%s: %s", error.message, context);
}

static inline void backward(const fixture *f) {
    cmb_error error = {0};
    CHECK(cmb_backward(&f->problem, &f->gradients, NULL, &error) == CMB_OK, "%s: %s", error.message, context);
}

/* Checks that two arrays, of any layouts, have the same bits. */
static inline void check_same(const fixture *f, const cmb_array *a, const fixture *g, const cmb_array *b, int64_t rows,
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

static inline void check_same_forward(const fixture *f, const fixture *g) {
    const cmb_problem *p = &f->problem, *q = &g->problem;
    check_same(f, &p->out, g, &q->out, p->L, p->Dv, "out");
    check_same(f, &p->lse, g, &q->lse, p->L, 1, "lse");
    check_same(f, &p->softmax, g, &q->softmax, p->L, 2, "softmax");
    check_same(f, &p->summary_value, g, &q->summary_value, f->plan->R, p->Dv, "summary_value");
    check_same(f, &p->summary_lse, g, &q->summary_lse, f->plan->R, 1, "summary_lse");
    check_same(f, &p->summary_softmax, g, &q->summary_softmax, f->plan->R, 2, "summary_softmax");
}

static inline void check_same_results(const fixture *f, const fixture *g) {
    const cmb_gradients *a = &f->gradients, *b = &g->gradients;
    const cmb_problem *p = &f->problem;
    check_same_forward(f, g);
    check_same(f, &a->query, g, &b->query, p->L, p->D, "gradient of query");
    check_same(f, &a->key, g, &b->key, p->L, p->D, "gradient of key");
    check_same(f, &a->value, g, &b->value, p->L, p->Dv, "gradient of value");
    check_same(f, &a->region_query, g, &b->region_query, f->plan->R, p->D, "gradient of region_query");
    check_same(f, &a->region_key, g, &b->region_key, f->plan->R, p->D, "gradient of region_key");
    check_same(f, &a->key_bias, g, &b->key_bias, p->L, 1, "gradient of key_bias");
    check_same(f, &a->region_bias, g, &b->region_bias, f->plan->R, 1, "gradient of region_bias");
    check_same(f, &a->sink, g, &b->sink, 1, 1, "gradient of sink");
}

/* to += from, number by number. */
static inline void add_arrays(const fixture *f, const cmb_array *to, const fixture *g, const cmb_array *from, int64_t n,
                              int64_t dim) {
    for (int64_t b = 0; b < f->asked.B; b++)
        for (int64_t h = 0; h < to->heads; h++)
            for (int64_t x = 0; x < n; x++)
                for (int64_t d = 0; d < dim; d++)
                    put(f, to, b, h, x, d, get(f, to, b, h, x, d) + get(g, from, b, h, x, d));
}

/* ---- the usual requests -------------------------------------------------------------------------- */

static const request small = {
    .pattern = FIXED, .span = 4, .dtype = CMB_FLOAT64, .B = 1, .Hq = 1, .Hk = 1, .L = 23, .D = 8, .Dv = 5};

/* Large enough for several threads, with tiles of every kind. */
static inline request large(pattern which) {
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

#endif

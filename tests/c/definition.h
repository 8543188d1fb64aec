// SPDX-License-Identifier: Apache-2.0
/* The definition of attention by a plan, in double, one head at a time and row by row over the plan's lists; and the
 * check of a fixture's results against it. */
#ifndef CMB_TEST_DEFINITION_H
#define CMB_TEST_DEFINITION_H

#include "problems.h"

#include <float.h>

/* One head, forward and backward: rows 0 .. L - 1 are the positions, rows L .. L + R - 1 the regions. */
typedef struct {
    int64_t rows, L, D, Dv;
    uint8_t *sees;                     /* [rows][rows] how often a row attends another */
    uint8_t *below;                    /* [rows][L] whether a position lies below the row and is unmasked */
    int *count;                        /* [rows] positions below */
    int64_t *pick;                     /* [rows and scratch rows] the first of them in the pool's order, or -1 */
    double *query, *key, *value, *lse; /* [rows][D], [rows][D], [rows][Dv] v and h, [rows] */
    double *out;                       /* [L][Dv] */
    double *bias, sink;                /* [rows] */
    double *d_query, *d_key, *d_value, *d_out, *d_lse; /* gradients */
    double *d_bias, d_sink;
} table;

static inline int32_t list_row(const cmb_plan *plan, cmb_list list, int32_t n) {
    return list.step ? list.start + list.step * n : plan->index[list.start + n];
}

static inline table new_table(const fixture *f) {
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
    t.bias = zeros(n, w);
    t.d_bias = zeros(n, w);
    t.sink = -INFINITY;
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

static inline void free_table(table *t) {
    void *const all[] = {t->sees, t->below,   t->count, t->pick,    t->query, t->key,   t->value, t->lse,
                         t->out,  t->d_query, t->d_key, t->d_value, t->d_out, t->d_lse, t->bias,  t->d_bias};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* For every row the first unmasked position below it, or -1. */
static inline void find_picks(const fixture *f, table *t) {
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

/* The position whose feature d the pool takes, for max and first. */
static inline int64_t pooled_from(const table *t, cmb_pooling pooling, const double *from, int64_t dim, int64_t row,
                                  int64_t d) {
    int64_t best = -1;
    if (pooling == CMB_POOL_FIRST)
        return t->pick[row];
    for (int64_t j = 0; j < t->L; j++)
        if (t->below[row * t->L + j] && (best < 0 || from[j * dim + d] > from[best * dim + d]))
            best = j;
    return best;
}

static inline void pool_row(const table *t, cmb_pooling pooling, double *rows, int64_t dim, int64_t row) {
    for (int64_t d = 0; d < dim; d++) {
        if (pooling == CMB_POOL_MAX || pooling == CMB_POOL_FIRST) {
            rows[row * dim + d] = rows[pooled_from(t, pooling, rows, dim, row, d) * dim + d];
            continue;
        }
        double sum = 0;
        for (int64_t j = 0; j < t->L; j++)
            if (t->below[row * t->L + j])
                sum += rows[j * dim + d];
        rows[row * dim + d] = pooling == CMB_POOL_MEAN ? sum / t->count[row] : sum;
    }
}

static inline void pool_row_backward(const table *t, cmb_pooling pooling, const double *rows, double *grad, int64_t dim,
                                     int64_t row) {
    const bool is_one = pooling == CMB_POOL_MAX || pooling == CMB_POOL_FIRST;
    for (int64_t d = 0; d < dim; d++)
        for (int64_t j = 0; j < t->L; j++) {
            if (!t->below[row * t->L + j] || (is_one && j != pooled_from(t, pooling, rows, dim, row, d)))
                continue;
            grad[j * dim + d] += grad[row * dim + d] / (pooling == CMB_POOL_MEAN ? t->count[row] : 1);
        }
}

/* The logit, and in *slope its derivative by the product of query and key. */
static inline double sloped_logit(const fixture *f, const table *t, int64_t x, int64_t y, double *slope) {
    const double cap = f->problem.softcap;
    double sum = 0;
    for (int64_t d = 0; d < t->D; d++)
        sum += t->query[x * t->D + d] * t->key[y * t->D + d];
    sum *= f->problem.scale;
    *slope = f->problem.scale;
    if (cap > 0) {
        const double share = tanh(sum / cap);
        *slope *= 1 - share * share;
        sum = cap * share;
    }
    return sum + t->bias[y] + (f->asked.options.size_bias && y >= t->L ? log(t->count[y]) : 0);
}

static inline double logit(const fixture *f, const table *t, int64_t x, int64_t y) {
    double slope;
    return sloped_logit(f, t, x, y, &slope);
}

/* Row x's weighted mean of values and, where these are not NULL, of keys and of biases. */
static inline void softmax_row(const fixture *f, const table *t, int64_t x, double *to, double *key, double *bias) {
    const double sink = x < t->L ? t->sink : -INFINITY;
    double top = sink, sum = 0;
    t->lse[x] = sink;
    for (int64_t y = 0; y < t->rows; y++)
        if (t->sees[x * t->rows + y] && t->count[y])
            top = fmax(top, logit(f, t, x, y));
    for (int64_t y = 0; y < t->rows; y++)
        if (t->sees[x * t->rows + y] && t->count[y])
            sum += t->sees[x * t->rows + y] * exp(logit(f, t, x, y) - top);
    if (sum == 0)
        return;
    sum += exp(sink - top);
    t->lse[x] = top + log(sum);
    for (int64_t y = 0; y < t->rows; y++) {
        if (!t->sees[x * t->rows + y] || !t->count[y])
            continue;
        const double p = t->sees[x * t->rows + y] * exp(logit(f, t, x, y) - t->lse[x]);
        for (int64_t d = 0; d < t->Dv; d++)
            to[d] += p * t->value[y * t->Dv + d];
        for (int64_t d = 0; key && d < t->D; d++)
            key[d] += p * t->key[y * t->D + d];
        if (bias)
            *bias += p * t->bias[y];
    }
}

static inline void softmax_row_backward(const fixture *f, table *t, int64_t x, const double *out, const double *d_out,
                                        double d_lse, const double *key, const double *d_key, const double *bias,
                                        const double *d_bias) {
    double delta = -d_lse;
    for (int64_t d = 0; d < t->Dv; d++)
        delta += out[d] * d_out[d];
    for (int64_t d = 0; key && d < t->D; d++)
        delta += key[d] * d_key[d];
    delta += bias ? *bias * *d_bias : 0;
    if (x < t->L && t->sink > -INFINITY)
        t->d_sink -= exp(t->sink - t->lse[x]) * delta;
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
        if (bias) {
            dp += *d_bias * t->bias[y];
            t->d_bias[y] += p * *d_bias;
        }
        double slope;
        (void)sloped_logit(f, t, x, y, &slope);
        t->d_bias[y] += p * (dp - delta);
        const double ds = p * (dp - delta) * slope;
        for (int64_t d = 0; d < t->D; d++) {
            t->d_query[x * t->D + d] += ds * t->key[y * t->D + d];
            t->d_key[y * t->D + d] += ds * t->query[x * t->D + d];
        }
    }
}

static inline void read_rows(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t n, int64_t dim,
                             double *to) {
    for (int64_t x = 0; x < n; x++)
        for (int64_t d = 0; d < dim; d++)
            to[x * dim + d] = get(f, a, b, h * a->heads / f->asked.Hq, x, d);
}

/* Head h of batch entry b, forward and backward. */
static inline table attend_by_definition(const fixture *f, int64_t b, int64_t h) {
    const cmb_problem *p = &f->problem;
    const cmb_pooling pooling = f->plan->pooling;
    const bool is_weighted = f->plan->weighted && !p->region_key.data;
    const bool has_weighted_bias = f->plan->weighted && p->key_bias.data && !p->region_bias.data;
    table t = new_table(f);
    const int64_t L = t.L, R = t.rows - L;
    read_rows(f, &p->query, b, h, L, t.D, t.query);
    read_rows(f, &p->key, b, h, L, t.D, t.key);
    read_rows(f, &p->value, b, h, L, t.Dv, t.value);
    read_rows(f, &f->gradients.out, b, h, L, t.Dv, t.d_out);
    read_rows(f, &f->gradients.lse, b, h, L, 1, t.d_lse);
    if (p->key_bias.data)
        read_rows(f, &p->key_bias, b, h, L, 1, t.bias);
    if (p->sink.data)
        read_rows(f, &p->sink, b, h, 1, 1, &t.sink);
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
        pool_row(&t, pooling, t.query, t.D, x);
        if (!is_weighted)
            pool_row(&t, pooling, t.key, t.D, x);
        if (!has_weighted_bias)
            pool_row(&t, pooling, t.bias, 1, x);
        if (p->region_bias.data)
            t.bias[x] = get(f, &p->region_bias, b, h * p->region_bias.heads / p->Hq, x - L, 0);
        if (p->region_query.data)
            for (int64_t d = 0; d < t.D; d++)
                t.query[x * t.D + d] = get(f, &p->region_query, b, h, x - L, d);
        if (p->region_key.data)
            for (int64_t d = 0; d < t.D; d++)
                t.key[x * t.D + d] = get(f, &p->region_key, b, h * p->region_key.heads / p->Hq, x - L, d);
        softmax_row(f, &t, x, t.value + x * t.Dv, is_weighted ? t.key + x * t.D : NULL,
                    has_weighted_bias ? t.bias + x : NULL);
    }
    for (int64_t x = 0; x < L; x++)
        softmax_row(f, &t, x, t.out + x * t.Dv, NULL, NULL);
    for (int64_t x = 0; x < L; x++)
        softmax_row_backward(f, &t, x, t.out + x * t.Dv, t.d_out + x * t.Dv, t.d_lse[x], NULL, NULL, NULL, NULL);
    for (int64_t x = L + R - 1; x >= L; x--) {
        softmax_row_backward(f, &t, x, t.value + x * t.Dv, t.d_value + x * t.Dv, 0,
                             is_weighted ? t.key + x * t.D : NULL, t.d_key + x * t.D,
                             has_weighted_bias ? t.bias + x : NULL, t.d_bias + x);
        if (t.count[x] && !p->region_query.data)
            pool_row_backward(&t, pooling, t.query, t.d_query, t.D, x);
        if (t.count[x] && !p->region_key.data && !is_weighted)
            pool_row_backward(&t, pooling, t.key, t.d_key, t.D, x);
        if (t.count[x] && !p->region_bias.data && !has_weighted_bias)
            pool_row_backward(&t, pooling, t.bias, t.d_bias, 1, x);
    }
    return t;
}

/* Checks n rows of one head against the definition's. The slack is for rounding: some hundred terms, each off by a few
 * times the rounding of its logit. */
static inline void check_rows(const fixture *f, const cmb_array *a, int64_t b, int64_t head, int64_t n, int64_t dim,
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

static inline void add_rows(double *to, const double *from, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        to[i] += from[i];
}

/* Checks everything that forward and backward have written. */
static inline void check_results(const fixture *f) {
    const cmb_problem *p = &f->problem;
    const cmb_gradients *g = &f->gradients;
    const int64_t L = p->L, R = f->plan->R, D = p->D, Dv = p->Dv, group = p->Hk ? p->Hq / p->Hk : 1;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t hk = 0; hk < p->Hk; hk++) {
            double *d_bias = zeros((size_t)(L + R), sizeof *d_bias),
                   *d_key = zeros((size_t)((L + R) * D), sizeof *d_key),
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
                check_rows(f, &g->sink, b, h, 1, 1, &t.d_sink, "gradient of sink");
                if (f->asked.key_bias == p->Hq)
                    check_rows(f, &g->key_bias, b, h, L, 1, t.d_bias, "gradient of key_bias");
                if (f->asked.region_bias == p->Hq)
                    check_rows(f, &g->region_bias, b, h, R, 1, t.d_bias + L, "gradient of region_bias");
                add_rows(d_bias, t.d_bias, L + R);
                add_rows(d_key, t.d_key, (L + R) * D);
                add_rows(d_value, t.d_value, L * Dv);
                free_table(&t);
            }
            check_rows(f, &g->key, b, hk, L, D, d_key, "gradient of key");
            check_rows(f, &g->value, b, hk, L, Dv, d_value, "gradient of value");
            if (f->asked.given_key && f->asked.given_key != p->Hq)
                check_rows(f, &g->region_key, b, hk, R, D, d_key + L * D, "gradient of region_key");
            if (f->asked.key_bias && f->asked.key_bias != p->Hq)
                check_rows(f, &g->key_bias, b, hk, L, 1, d_bias, "gradient of key_bias");
            if (f->asked.region_bias && f->asked.region_bias != p->Hq)
                check_rows(f, &g->region_bias, b, hk, R, 1, d_bias + L, "gradient of region_bias");
            free(d_bias);
            free(d_key);
            free(d_value);
        }
}

static inline void check_against_definition(request asked) {
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

#endif

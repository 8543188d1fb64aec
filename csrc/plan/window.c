// SPDX-License-Identifier: Apache-2.0
/* Window: a query attends the positions nearer than `size`. HeavilyCompressed: it attends spans as regions too, those
 * that end at its position or before it when causal (docs/mathematics.md, section 3). Causal plans keep the prefix rule
 * of build.h. */
#include "plan/spans.h"

enum {
    TASK_QUERIES = 256, /* queries of a task of Window: four tiles */
};

typedef struct {
    int64_t size;
    int64_t rate; /* positions of a span; 0: there are no regions */
} near_and_far;

/* Whether a query after a is the first to see a span: the span that ends at its position j. */
static bool is_closing(const cmb_build *build, const near_and_far *w, int64_t a, int64_t j) {
    return w->rate && build->plan.is_causal && j > a && (j + 1) % w->rate == 0;
}

/* Rows [row, end), each for those of queries [a, a + n) that are nearer than `size`. They are fewer than 2 CMB_TILE.
 * Before the own row of a query that is the first to see a span comes the span's region. The masks depend on row - a
 * and on a modulo the rate alone, so that tiles share them. */
static void attend_edge(cmb_build *build, const near_and_far *w, int64_t a, int64_t n, int64_t row, int64_t end) {
    enum { MAX_ROWS = 3 * CMB_TILE };
    int32_t seen[MAX_ROWS];
    uint64_t mask[MAX_ROWS];
    int64_t rows = 0;
    CMB_ASSERT(end - row <= 2 * CMB_TILE);
    for (int64_t j = row; j < end; j++) {
        const int64_t first = build->plan.is_causal ? j : j - w->size + 1;
        if (is_closing(build, w, a, j)) {
            seen[rows] = (int32_t)(build->plan.L + j / w->rate);
            mask[rows++] = cmb_lane_mask(j - a, n);
        }
        seen[rows] = (int32_t)j;
        mask[rows++] = cmb_lane_mask(first - a, cmb_min(j + w->size - a, n));
    }
    cmb_build_masked_run(build, cmb_build_list(build, seen, rows), mask);
}

/* A tile of queries [a, a + n). It takes the regions that all of its queries see, then positions in their order. For
 * size 6 and n 4:
 *
 *   row        a-5 a-4 a-3 a-2 a-1  a  a+1 a+2 a+3   causal; otherwise also a+4 to a+8
 *   query a     x   x   x   x   x   x   .   .   .
 *         a+1   .   x   x   x   x   x   x   .   .
 *         a+2   .   .   x   x   x   x   x   x   .
 *         a+3   .   .   .   x   x   x   x   x   x
 *                         [ for all ]
 */
static void attend_near(cmb_build *build, const near_and_far *w, int64_t a, int64_t n) {
    const int64_t L = build->plan.L, size = w->size;
    const int64_t reach = build->plan.is_causal ? 1 : size; /* query i sees rows below i + reach */
    const int64_t first = a < size ? 0 : a - size + 1;
    const int64_t end = cmb_min(a + n - 1 + reach, L);
    /* All queries see the rows [from, to). */
    const int64_t from = a + n < size ? 0 : a + n - size;
    const int64_t to = cmb_min(a + reach, end);
    cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_tile_width(n));
    if (w->rate)
        cmb_build_run(build, cmb_list_make(L, 1, build->plan.is_causal ? (a + 1) / w->rate : build->plan.R));
    if (from >= to) {
        attend_edge(build, w, a, n, first, end);
        return;
    }
    attend_edge(build, w, a, n, first, from);
    cmb_build_run(build, cmb_list_make(from, 1, to - from));
    attend_edge(build, w, a, n, to, end);
}

cmb_status cmb_plan_window(int64_t L, int64_t size, const cmb_plan_options *options, cmb_plan **plan,
                           cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = cmb_check_options(L, options, error);
    if (status)
        return status;
    if (size < 1)
        return cmb_fail(error, CMB_ERR_VALUE, "size must be at least 1, got %lld", (long long)size);
    status = cmb_build_begin(&build, L, 0, 0, options, error);
    if (status)
        return status;
    const near_and_far w = {.size = L < 1 ? 1 : cmb_min(size, L)};
    cmb_build_wave(&build);
    for (int64_t task = build.first / CMB_TILE * CMB_TILE; task < L && cmb_build_task(&build); task += TASK_QUERIES)
        for (int64_t a = task; a < cmb_min(task + TASK_QUERIES, L); a += CMB_TILE)
            attend_near(&build, &w, a, cmb_min(CMB_TILE, L - a));
    return cmb_build_end(&build, plan, error);
}

cmb_status cmb_plan_heavily_compressed(int64_t L, int64_t rate, int64_t window, const cmb_plan_options *options,
                                       cmb_plan **plan, cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = cmb_check_options(L, options, error);
    if (status)
        return status;
    if (rate < 1)
        return cmb_fail(error, CMB_ERR_VALUE, "rate must be at least 1, got %lld", (long long)rate);
    if (window < 1)
        return cmb_fail(error, CMB_ERR_VALUE, "window must be at least 1, got %lld", (long long)window);
    if (options->sparse)
        return cmb_plan_window(L, window, options, plan, error);
    rate = cmb_min(rate, L + 1); /* not to L: a span that is longer than the sequence is not complete */
    status = cmb_build_begin(&build, L, (L + rate - 1) / rate, 0, options, error);
    if (status)
        return status;
    cmb_build_spans(&build, rate, 0); /* query i sees span c from i = (c + 1) * rate - 1 on */
    const near_and_far w = {.size = L < 1 ? 1 : cmb_min(window, L), .rate = rate};
    cmb_span_tiles t = {.span = rate, .shift = rate - 1};
    cmb_build_wave(&build);
    while (cmb_next_span_tile(&build, &t))
        attend_near(&build, &w, t.a, t.n);
    return cmb_build_end(&build, plan, error);
}

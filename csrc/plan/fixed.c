// SPDX-License-Identifier: Apache-2.0
/* Dense, and Fixed: a query attends its own span, or the spans that meet its window, and the others through their
 * regions (docs/mathematics.md, section 3). Causal plans keep the prefix rule of build.h. */
#include "plan/spans.h"

/* A tile's queries [a, a + n) attend the positions [first, end) of their own span: up to themselves when causal. */
static void attend_own(cmb_build *build, int64_t first, int64_t end, int64_t a, int64_t n) {
    if (!build->plan.is_causal) {
        cmb_build_run(build, cmb_list_make(first, 1, end - first));
        return;
    }
    uint64_t mask[CMB_TILE];
    for (int64_t t = 0; t < n; t++)
        mask[t] = cmb_lane_mask(t, n);
    cmb_build_run(build, cmb_list_make(first, 1, a - first));
    cmb_build_masked_run(build, cmb_list_make(a, 1, n), mask);
}

cmb_status cmb_plan_dense(int64_t L, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = cmb_check_options(L, options, error);
    if (status || (status = cmb_build_begin(&build, L, 0, 0, options, error)))
        return status;
    cmb_build_wave(&build);
    for (int64_t a = build.first / CMB_TILE * CMB_TILE; a < L && cmb_build_task(&build); a += CMB_TILE) {
        int64_t n = cmb_min(CMB_TILE, L - a);
        cmb_build_tile(&build, cmb_list_make(a, 1, n), cmb_tile_width(n));
        attend_own(&build, 0, L, a, n);
    }
    return cmb_build_end(&build, plan, error);
}

/* Queries [a, a + n) lie in one span. `summary` has one row for each span, through which other spans' queries see it.
 */
static void attend_from_one_span(cmb_build *build, int64_t span, cmb_list summary, int64_t a, int64_t n) {
    int64_t c = a / span;
    cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_tile_width(n));
    cmb_build_run(build, cmb_list_cut(summary, 0, c));
    if (!build->plan.is_causal)
        cmb_build_run(build, cmb_list_cut(summary, c + 1, summary.count));
    attend_own(build, c * span, cmb_min((c + 1) * span, build->plan.L), a, n);
}

/* Queries [a, a + n) are as many whole spans as fit in a tile. Their positions come in order, each span's summary
 * behind them, so that a length that ends inside the tile lacks rows at the end alone. */
static void attend_from_spans(cmb_build *build, int64_t span, cmb_list summary, bool is_sparse, int64_t a, int64_t n) {
    int64_t L = build->plan.L, rows = 0;
    bool is_causal = build->plan.is_causal;
    int32_t row[2 * CMB_TILE];
    uint64_t mask[2 * CMB_TILE];
    for (int64_t first = 0; first < n; first += span) {
        int64_t end = cmb_min(first + span, n);
        uint64_t own = cmb_lane_mask(first, end);
        uint64_t others = is_causal ? cmb_lane_mask(end, n) : cmb_lane_mask(0, n) & ~own;
        for (int64_t t = first; t < end; t++) {
            row[rows] = (int32_t)(a + t);
            mask[rows] = is_causal ? cmb_lane_mask(t, end) : own;
            if (is_sparse && t == first + span - 1)
                mask[rows] |= others;
            rows++;
        }
        if (!is_sparse && others) {
            row[rows] = (int32_t)(L + (a + first) / span);
            mask[rows++] = others;
        }
    }
    cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_tile_width(n));
    cmb_build_run(build, cmb_list_cut(summary, 0, a / span));
    if (!is_causal)
        cmb_build_run(build, cmb_list_cut(summary, (a + CMB_TILE / span * span) / span, summary.count));
    cmb_build_masked_run(build, cmb_build_list(build, row, rows), mask);
}

/* ---- windows ---- */

typedef struct {
    int64_t span, window;
    cmb_list summary; /* of each span the row through which queries far from it see it */
    bool is_sparse;
} windowed;

/* The first query that sees span c through its summary because its window has left the span. */
static int64_t left_behind(const windowed *w, int64_t c) { return (c + 1) * w->span + w->window - 1; }

/* The first span that the window of query i meets, which is the number of spans that it has left behind. */
static int64_t first_met(const windowed *w, int64_t i) { return i < w->window ? 0 : (i - w->window + 1) / w->span; }

/* Position j is the summary of its span in the sparse baseline, which is seen from afar too. */
static bool is_summary(const windowed *w, int64_t j) { return w->is_sparse && j % w->span == w->span - 1; }

/* A causal tile of queries [a, a + n). Its rows are the summaries of the spans that query a has left behind, then the
 * positions before a. Then come, query by query, the summary of the span that this query is the first to leave behind,
 * if there is one, and the query's own position. So a shorter plan lacks rows at the end alone. */
static void attend_window_causal(cmb_build *build, const windowed *w, int64_t a, int64_t n) {
    int32_t row[2 * CMB_TILE];
    uint64_t mask[2 * CMB_TILE];
    int64_t rows = 0, c = first_met(w, a);
    /* All queries of the tile see the positions from `common` to a. */
    const int64_t first = c * w->span, common = cmb_min(first_met(w, a + n - 1) * w->span, a);
    cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_tile_width(n));
    cmb_build_run(build, cmb_list_cut(w->summary, 0, c));
    CMB_ASSERT(common - first <= 2 * CMB_TILE);
    for (int64_t j = first; j < common; j++)
        mask[j - first] = cmb_lane_mask(0, is_summary(w, j) ? n : cmb_min(left_behind(w, j / w->span) - a, n));
    cmb_build_masked_run(build, cmb_list_make(first, 1, common - first), mask);
    cmb_build_run(build, cmb_list_make(common, 1, a - common));
    for (int64_t i = a; i < a + n; i++) {
        if (i == left_behind(w, c)) {
            if (!w->is_sparse) {
                row[rows] = (int32_t)(build->plan.L + c);
                mask[rows++] = cmb_lane_mask(i - a, n);
            }
            c++;
        }
        row[rows] = (int32_t)i;
        mask[rows++] = cmb_lane_mask(i - a, is_summary(w, i) ? n : cmb_min(left_behind(w, i / w->span) - a, n));
    }
    cmb_build_masked_run(build, cmb_build_list(build, row, rows), mask);
}

/* A tile of queries [a, a + n), span by span. */
static void attend_window_whole(cmb_build *build, const windowed *w, int64_t a, int64_t n) {
    const int64_t L = build->plan.L, c_end = cmb_min(a + n + w->window - 2, L - 1) / w->span + 1;
    int64_t c = first_met(w, a), common = c * w->span, rows = 0;
    int32_t row[2 * CMB_TILE];
    uint64_t mask[2 * CMB_TILE];
    cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_tile_width(n));
    cmb_build_run(build, cmb_list_cut(w->summary, 0, c));
    cmb_build_run(build, cmb_list_cut(w->summary, c_end, w->summary.count));
    for (; c < c_end; c++) {
        const int64_t first = c * w->span, end = cmb_min(first + w->span, L);
        const uint64_t all = cmb_lane_mask(0, n);
        const uint64_t near = cmb_lane_mask(first - w->window + 1 - a, cmb_min(left_behind(w, c) - a, n));
        if (near == all) {
            const int64_t last = cmb_min((a + w->window - 1) / w->span, c_end - 1); /* to which all is seen by all */
            c = c < last ? last : c;
            continue;
        }
        cmb_build_run(build, cmb_list_make(common, 1, first - common));
        common = end;
        for (int64_t j = first; j < end + !w->is_sparse; j++) { /* the summary comes last */
            row[rows] = (int32_t)(j < end ? j : L + c);
            mask[rows++] = j == end ? all & ~near : is_summary(w, j) ? all : near;
            if (rows == 2 * CMB_TILE) {
                cmb_build_masked_run(build, cmb_build_list(build, row, rows), mask);
                rows = 0;
            }
        }
    }
    cmb_build_run(build, cmb_list_make(common, 1, cmb_min(c_end * w->span, L) - common));
    cmb_build_masked_run(build, cmb_build_list(build, row, rows), mask);
}

/* ---- Fixed ---- */

cmb_status cmb_plan_fixed(int64_t L, int64_t span, int64_t window, const cmb_plan_options *options, cmb_plan **plan,
                          cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = cmb_check_options(L, options, error);
    if (status)
        return status;
    if (span < 1)
        return cmb_fail(error, CMB_ERR_VALUE, "span must be at least 1, got %lld", (long long)span);
    if (window < 1)
        return cmb_fail(error, CMB_ERR_VALUE, "window must be at least 1, got %lld", (long long)window);
    const bool is_causal = options->is_causal;
    const int64_t shift = (window - 1) % span; /* where a span is left behind, the same for all lengths */
    span = L < 1 ? 1 : cmb_min(span, L);
    window = cmb_min(window, L + 1);
    int64_t spans = (L + span - 1) / span;
    status = cmb_build_begin(&build, L, options->sparse ? 0 : spans, 0, options, error);
    if (status)
        return status;
    if (!options->sparse)
        cmb_build_spans(&build, span, window);
    /* The sparse baseline sees another span through its last position; a last span that is shorter has none. */
    cmb_list summary = options->sparse ? cmb_list_make(span - 1, span, L / span) : cmb_list_make(L, 1, spans);
    const windowed w = {span, window, summary, options->sparse};
    cmb_span_tiles t = {.span = span, .shift = shift};
    cmb_build_wave(&build);
    while (cmb_next_span_tile(&build, &t)) {
        if (window > 1 && is_causal)
            attend_window_causal(&build, &w, t.a, t.n);
        else if (window > 1)
            attend_window_whole(&build, &w, t.a, t.n);
        else if (span < CMB_TILE)
            attend_from_spans(&build, span, summary, options->sparse, t.a, t.n);
        else
            attend_from_one_span(&build, span, summary, t.a, t.n);
    }
    return cmb_build_end(&build, plan, error);
}

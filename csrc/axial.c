// SPDX-License-Identifier: Apache-2.0
/* Axial and AxialMixture (spec: "Factorizations"). Positions lie row by row in a grid; a query of column c and row r
 * attends its own row and column, and the rest of the grid through regions that are parts of columns or of rows.
 * Tiles hold queries, or regions, of one row or one column; a query meets its row and its column in different waves.
 * Tiles of a causal plan keep the rules that patterns.c states. */
#include "plan.h"
#include "runtime.h"

typedef struct {
    cmb_build *build;
    int64_t L;
    int64_t width; /* as given: a row has so many regions */
    int64_t m;     /* columns that hold a position, */
    int64_t n;     /* rows, */
    int64_t last;  /* and the length of the last row */
    bool is_causal;
} grid;

static int64_t row_length(const grid *g, int64_t r) { return r < g->n - 1 ? g->m : g->last; }

/* Of a table whose row `base` stands for position 0: what stands for a grid row's first `count` columns, and for a
 * column's positions. */
static cmb_list row_of(const grid *g, int64_t base, int64_t r, int64_t count) {
    return cmb_list_make(base + r * g->m, 1, count);
}

static cmb_list column_of(const grid *g, int64_t base, int64_t c) {
    return cmb_list_make(base + c, g->m, g->n - (c >= g->last));
}

/* A list of two rows. */
static cmb_list pair(int64_t a, int64_t b) { return cmb_list_make(a, b - a, 2); }

static cmb_list one(int64_t row) { return cmb_list_make(row, 1, 1); }

/* Columns whose queries lie in some other row that sees row r, a later one when causal. */
static int64_t seen_columns(const grid *g, int64_t r) {
    if (!g->is_causal && r > 0)
        return g->m;
    int64_t behind = g->L - (r + 1) * g->m;
    return behind < 0 ? 0 : cmb_least(behind, g->m);
}

/* ---- rows and columns themselves ---- */

/* A column's queries attend what lies along it, but in their own row. */
static void attend_along(const grid *g, int64_t c, cmb_look *look, int looks) {
    cmb_list column = column_of(g, 0, c);
    for (int k = 0; k < looks; k++)
        if (look[k].sight != CMB_EVERY)
            look[k].sight = g->is_causal ? CMB_UP_TO : CMB_OTHERS;
    /* The query one row below a position sees up to it. */
    cmb_build_attend(g->build, g->is_causal ? cmb_cut(column, 1, column.count) : column, look, looks);
}

static void attend_column(const grid *g, int64_t c) {
    attend_along(g, c, &(cmb_look){column_of(g, 0, c), CMB_OTHERS}, 1);
}

/* A row's queries attend it and the other columns: what lies above (`up` stands for) and below (`down`) it. */
static void attend_row(const grid *g, int64_t r, int64_t up, int64_t down) {
    cmb_look look[3];
    int looks = 0;
    if (up && r > 0)
        look[looks++] = (cmb_look){row_of(g, up, r - 1, g->m), CMB_OTHERS};
    if (down && r + 1 < g->n)
        look[looks++] = (cmb_look){row_of(g, down, r + 1, row_length(g, r + 1)), CMB_OTHERS};
    cmb_list row = row_of(g, 0, r, row_length(g, r));
    look[looks++] = (cmb_look){row, g->is_causal ? CMB_UP_TO : CMB_EVERY};
    cmb_build_attend(g->build, row, look, looks);
}

/* ---- parts of columns ---- */

enum { COLUMNS = 8 }; /* neighbours that a task takes together: of each row so many positions lie side by side */

/* Rows up + t: the column of t down to t; down + t, unless causal: from t on. */
static void pool_columns(const grid *g, int64_t c, int64_t end, int64_t up, int64_t down) {
    const int64_t m = g->m;
    for (int64_t r = 0; r < g->n; r++)
        for (int64_t t = r * m + c; t < cmb_least(r * m + end, g->L); t++)
            cmb_build_pool(g->build, up + t, r == 0 ? one(t) : pair(up + t - m, t));
    for (int64_t r = g->n - 1; down && r >= 0; r--)
        for (int64_t t = r * m + c; t < cmb_least(r * m + end, g->L); t++)
            cmb_build_pool(g->build, down + t, t + m >= g->L ? one(t) : pair(t, down + t + m));
}

static void summarize_column(const grid *g, int64_t c, int64_t up, int64_t down) {
    cmb_list column = column_of(g, 0, c);
    /* The row below a part sees it from the other columns, which a last row of one position lacks. */
    int64_t parts = g->n - 1 - (c == 0 && g->last == 1);
    if (g->m == 1)
        return;
    cmb_build_attend(g->build, cmb_cut(column_of(g, up, c), 0, parts), &(cmb_look){column, CMB_UP_TO}, 1);
    if (down)
        cmb_build_attend(g->build, cmb_cut(column_of(g, down, c), 1, column.count), &(cmb_look){column, CMB_BEHIND}, 1);
}

static void build_columns(const grid *g, int64_t up, int64_t down, bool attended) {
    cmb_build_wave(g->build);
    for (int64_t first = 0; first < g->m && cmb_build_task(g->build); first += COLUMNS) {
        const int64_t end = cmb_least(first + COLUMNS, g->m);
        pool_columns(g, first, end, up, down);
        for (int64_t c = first; c < end; c++) {
            summarize_column(g, c, up, down);
            if (attended)
                attend_column(g, c);
        }
    }
}

static void build_vertical(const grid *g) {
    int64_t up = g->L, down = g->is_causal ? 0 : 2 * g->L;
    build_columns(g, up, down, true);
    cmb_build_wave(g->build);
    for (int64_t r = 0; r < g->n && cmb_build_task(g->build); r++)
        attend_row(g, r, up, down);
}

static void build_sparse(const grid *g) {
    cmb_build_wave(g->build);
    for (int64_t c = 0; c < g->m && cmb_build_task(g->build); c++)
        attend_column(g, c);
    cmb_build_wave(g->build);
    for (int64_t r = 0; r < g->n && cmb_build_task(g->build); r++)
        attend_row(g, r, 0, 0);
}

/* ---- parts of rows ---- */

/* Region r * m + c: row r without column c, from the row's prefixes and suffixes, which are the scratch rows. */
static void summarize_row_without(const grid *g, int64_t r) {
    cmb_build *build = g->build;
    int64_t length = row_length(g, r), region = g->L + r * g->m;
    int64_t prefix = g->L + build->plan.R, suffix = prefix + g->m;
    cmb_list row = row_of(g, 0, r, length);
    for (int64_t c = 0; c < length; c++)
        cmb_build_pool(build, prefix + c, c ? pair(prefix + c - 1, row.start + c) : one(row.start));
    for (int64_t c = length - 1; c > 0; c--)
        cmb_build_pool(build, suffix + c, c < length - 1 ? pair(row.start + c, suffix + c + 1) : one(row.start + c));
    for (int64_t c = 0; c < g->width; c++)
        if (c >= length)
            cmb_build_pool(build, region + c, one(prefix + length - 1));
        else if (length > 1)
            cmb_build_pool(build, region + c,
                           c == 0            ? one(suffix + 1)
                           : c == length - 1 ? one(prefix + c - 1)
                                             : pair(prefix + c - 1, suffix + c + 1));
    cmb_list regions = row_of(g, g->L, r, seen_columns(g, r));
    if (length > 1)
        cmb_build_attend(build, regions, &(cmb_look){row, CMB_OTHERS}, 1);
    else
        cmb_build_attend(build, cmb_cut(regions, 1, g->m), &(cmb_look){row, CMB_EVERY}, 1);
}

static void build_horizontal(const grid *g) {
    cmb_build_wave(g->build);
    for (int64_t r = 0; r < g->n && cmb_build_task(g->build); r++) {
        summarize_row_without(g, r);
        attend_row(g, r, 0, 0);
    }
    cmb_build_wave(g->build);
    for (int64_t c = 0; c < g->m && cmb_build_task(g->build); c++) {
        int64_t rows = g->m == 1 ? 0 : g->n - (c == 0 && g->last == 1);
        cmb_look look[] = {{cmb_list_make(g->L + c, g->m, rows), CMB_OTHERS}, {column_of(g, 0, c), CMB_OTHERS}};
        attend_along(g, c, look, 2);
    }
}

/* Rows left + r * m + c and right + r * m + c: row r left and right of column c; a row that ends before it lies left.
 */
static void summarize_row_halves(const grid *g, int64_t r, int64_t left, int64_t right) {
    cmb_build *build = g->build;
    int64_t length = row_length(g, r), columns = seen_columns(g, r);
    cmb_list row = row_of(g, 0, r, length);
    left += r * g->m;
    right += r * g->m;
    for (int64_t c = 1; c < g->width; c++)
        cmb_build_pool(build, left + c,
                       c == 1        ? one(row.start)
                       : c <= length ? pair(left + c - 1, row.start + c - 1)
                                     : one(left + length));
    for (int64_t c = length - 2; c >= 0; c--)
        cmb_build_pool(build, right + c,
                       c == length - 2 ? one(row.start + c + 1) : pair(row.start + c + 1, right + c + 1));
    cmb_build_attend(build, cmb_cut(cmb_list_make(left, 1, columns), 1, columns), &(cmb_look){row, CMB_UP_TO}, 1);
    cmb_build_attend(build, cmb_cut(cmb_list_make(right, 1, columns), 0, length - 1), &(cmb_look){row, CMB_BEHIND}, 1);
}

static void build_mixture(const grid *g) {
    int64_t up = g->L, down = g->is_causal ? 0 : 2 * g->L;
    int64_t left = (g->is_causal ? 2 : 3) * g->L, right = left + g->n * g->width;
    build_columns(g, up, down, false);
    cmb_build_wave(g->build);
    for (int64_t r = 0; r < g->n && cmb_build_task(g->build); r++) {
        summarize_row_halves(g, r, left, right);
        attend_row(g, r, up, down);
    }
    cmb_build_wave(g->build);
    for (int64_t c = 0; c < g->m && cmb_build_task(g->build); c++) {
        int64_t rights = c == g->m - 1 ? 0 : g->n - (g->last <= c + 1);
        cmb_look look[] = {{cmb_list_make(left + c, g->m, c ? g->n : 0), CMB_OTHERS},
                           {cmb_list_make(right + c, g->m, rights), CMB_OTHERS},
                           {column_of(g, 0, c), CMB_OTHERS}};
        attend_along(g, c, look, 3);
    }
}

/* ---- whole rows, picked at a column ---- */

/* Region t: the row of t, which takes the query and key of t, else of the nearest unmasked position before it, else of
 * the nearest after it: the first of those up to t, leftwards, then of those after it. */
static void pool_row_at(const grid *g, int64_t r) {
    cmb_build *build = g->build;
    int64_t length = row_length(g, r), region = g->L + r * g->m;
    int64_t before = 2 * g->L, after = before + g->m;
    cmb_list row = row_of(g, 0, r, length);
    for (int64_t c = 0; c < length; c++)
        cmb_build_pool(build, before + c, c ? pair(row.start + c, before + c - 1) : one(row.start));
    for (int64_t c = length - 1; c > 0; c--)
        cmb_build_pool(build, after + c, c < length - 1 ? pair(row.start + c, after + c + 1) : one(row.start + c));
    for (int64_t c = 0; c < length; c++)
        cmb_build_pool(build, region + c, c < length - 1 ? pair(before + c, after + c + 1) : one(before + c));
}

/* A row's queries attend it, and then what stands for it asks with the same: the engine lets each go on where the other
 * ended. */
static void attend_and_summarize_row(const grid *g, int64_t r) {
    cmb_list row = row_of(g, 0, r, row_length(g, r));
    cmb_list regions = row_of(g, g->L, r, cmb_least(row.count, seen_columns(g, r)));
    for (int64_t a = 0; a < row.count; a += CMB_TILE) {
        cmb_build_attend_from(g->build, row, a, &(cmb_look){row, g->is_causal ? CMB_UP_TO : CMB_EVERY}, 1);
        cmb_build_attend_from(g->build, regions, a, &(cmb_look){row, CMB_EVERY}, 1);
    }
}

static void build_rowmajor(const grid *g) {
    cmb_build_wave(g->build);
    for (int64_t r = 0; r < g->n && cmb_build_task(g->build); r++) {
        pool_row_at(g, r);
        attend_and_summarize_row(g, r);
    }
    cmb_build_wave(g->build);
    for (int64_t c = 0; c < g->m && (c % COLUMNS || cmb_build_task(g->build)); c++) {
        cmb_look look[] = {{column_of(g, g->L, c), CMB_OTHERS}, {one(2 * g->L - 1), CMB_EVERY}};
        attend_along(g, c, look, !g->is_causal && c >= g->last ? 2 : 1);
    }
}

/* ---- builders ---- */

static cmb_status begin_grid(grid *g, int64_t L, int64_t width, const cmb_plan_options *options, cmb_error *error) {
    cmb_status status = cmb_check_length(L, error);
    if (status)
        return status;
    if (width < 1)
        return cmb_fail(error, CMB_ERR_VALUE, "width must be at least 1, got %lld", (long long)width);
    *g = (grid){.L = L, .width = cmb_least(width, INT64_C(1) << 32), .is_causal = options->is_causal};
    g->m = cmb_least(g->width, L);
    g->n = L ? (L + g->m - 1) / g->m : 0;
    g->last = L - (g->n - 1) * g->m;
    return CMB_OK;
}

cmb_status cmb_plan_axial(int64_t L, int64_t width, cmb_axial_order order, bool weighted,
                          const cmb_plan_options *options, cmb_plan **plan, cmb_error *error) {
    *plan = NULL;
    if ((unsigned)order > CMB_AXIAL_ROWMAJOR)
        return cmb_fail(error, CMB_ERR_VALUE, "order must be vertical, horizontal or rowmajor, got %d", (int)order);
    if (weighted && order != CMB_AXIAL_ROWMAJOR)
        return cmb_fail(error, CMB_ERR_VALUE, "row_key may be weighted only where order is rowmajor");
    grid g;
    cmb_build build;
    cmb_status status = begin_grid(&g, L, width, options, error);
    if (status)
        return status;
    bool is_vertical = order == CMB_AXIAL_VERTICAL, is_horizontal = order == CMB_AXIAL_HORIZONTAL;
    int64_t R = is_horizontal ? g.n * g.width : is_vertical && !g.is_causal ? 2 * L : L;
    cmb_plan_options own = *options;
    if (order == CMB_AXIAL_ROWMAJOR)
        own.pooling = CMB_POOL_FIRST;
    status = cmb_build_begin(&build, L, own.sparse ? 0 : R, own.sparse || is_vertical ? 0 : 2 * g.m, &own, error);
    if (status)
        return status;
    build.plan.weighted = weighted && !own.sparse;
    g.build = &build;
    if (own.sparse)
        build_sparse(&g);
    else if (is_vertical)
        build_vertical(&g);
    else if (is_horizontal)
        build_horizontal(&g);
    else
        build_rowmajor(&g);
    return cmb_build_end(&build, plan, error);
}

cmb_status cmb_plan_axial_mixture(int64_t L, int64_t width, const cmb_plan_options *options, cmb_plan **plan,
                                  cmb_error *error) {
    *plan = NULL;
    grid g = {0};
    cmb_build build;
    cmb_status status = begin_grid(&g, L, width, options, error);
    if (status)
        return status;
    int64_t R = (g.is_causal ? L : 2 * L) + 2 * g.n * g.width;
    status = cmb_build_begin(&build, L, options->sparse ? 0 : R, 0, options, error);
    if (status)
        return status;
    g.build = &build;
    if (options->sparse)
        build_sparse(&g);
    else
        build_mixture(&g);
    return cmb_build_end(&build, plan, error);
}

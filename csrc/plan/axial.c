// SPDX-License-Identifier: Apache-2.0
/* Axial and AxialMixture (docs/mathematics.md, section 3). Positions lie row by row in a grid. A query in row r and
 * column c attends that row and column, and the rest of the grid through regions, which are parts of columns or of
 * rows. "Row" here means a row of the grid; base + t is the table's row for position t, or for the t-th region of a
 * family.
 *
 *   width = 4          direct keys and regions of query 10 (row 2, column 2), causal
 *    0  1  2  3         vertical      2 6 8 9 10    {0 4} {1 5} {3 7}          the other columns, above
 *    4  5  6  7         horizontal    2 6 8 9 10    {0 1 3} {4 5 7}            the rows before, without column 2
 *    8  9 10 11         rowmajor          8 9 10    {0 1 2 3} {4 5 6 7}        the rows before, whole
 *                       mixture       2 6 8 9 10    vertical's, and {0 1} {3} {4 5} {7}
 *
 * A tile's queries, or regions, lie in one row or one column; a query meets its row and its column in different waves.
 * Causal plans keep the prefix rule of build.h.
 *
 * A plan that continues a sequence makes the regions that its positions complete: parts of columns, each with its last
 * position, and all regions of a row with the last position of the row. */
#include "plan/build.h"

typedef struct {
    cmb_build *build;
    int64_t L;
    int64_t width; /* as given: the regions of a row */
    int64_t m;     /* columns that hold a position */
    int64_t n;     /* rows */
    int64_t last;  /* positions of the last row */
    bool is_causal;
} grid;

static int64_t row_length(const grid *g, int64_t r) { return r < g->n - 1 ? g->m : g->last; }

/* The first `count` columns of row r, and the whole of column c. */
static cmb_list row_of(const grid *g, int64_t base, int64_t r, int64_t count) {
    return cmb_list_make(base + r * g->m, 1, count);
}

static cmb_list column_of(const grid *g, int64_t base, int64_t c) {
    return cmb_list_make(base + c, g->m, g->n - (c >= g->last));
}

static cmb_list pair(int64_t a, int64_t b) { return cmb_list_make(a, b - a, 2); }

static cmb_list one(int64_t row) { return cmb_list_make(row, 1, 1); }

/* Columns with a query in another row that attends row r: in a later one when causal. In a plan that
 * continues a sequence: all columns of a complete row, none of another. */
static int64_t seen_columns(const grid *g, int64_t r) {
    if (g->build->past)
        return (r + 1) * g->width <= g->L ? g->m : 0;
    if (!g->is_causal && r > 0)
        return g->m;
    int64_t behind = g->L - (r + 1) * g->m;
    return behind < 0 ? 0 : cmb_min(behind, g->m);
}

/* ---- the first query: 0 but in a plan that continues a sequence ---- */

static int64_t first_row(const grid *g) { return g->m ? g->build->first / g->m : 0; }

/* How many elements of a list of positions come before the first query. */
static int64_t count_earlier(const grid *g, cmb_list position) {
    const int64_t before = g->build->first - position.start;
    return before > 0 ? (before + position.step - 1) / position.step : 0;
}

/* Neighbouring columns that have a query, `most` at a time, from the column of the first query on. */
typedef struct {
    int64_t most;
    int64_t first, end;
    int64_t done;
} column_group;

enum { COLUMNS = 8 }; /* of one task: in each row, their positions lie side by side in memory */

/* The next columns, from a struct that is zero but for `most`; false after the last ones, or if the build has failed.
 * Starts their task. */
static bool next_columns(const grid *g, column_group *next) {
    const int64_t left = cmb_min(g->m, g->L - g->build->first) - next->done;
    if (left < 1 || !cmb_build_task(g->build))
        return false;
    next->first = (g->build->first + next->done) % g->m;
    next->end = cmb_min((next->first / next->most + 1) * next->most, cmb_min(g->m, next->first + left));
    next->done += next->end - next->first;
    return true;
}

/* ---- own rows and columns ---- */

/* The queries attend what they see of the spans. */
static void attend(const grid *g, cmb_list query, const cmb_span *span, int spans) {
    const int64_t first = count_earlier(g, query);
    for (int64_t a = first / CMB_TILE * CMB_TILE; first < query.count && a < query.count && !g->build->status;
         a += CMB_TILE)
        cmb_build_attend_from(g->build, query, a, span, spans);
}

/* A column's queries attend what the spans hold for the other rows: for earlier ones when causal. */
static void attend_along(const grid *g, int64_t c, cmb_span *span, int spans) {
    cmb_list column = column_of(g, 0, c);
    for (int k = 0; k < spans; k++)
        if (span[k].visibility != CMB_EVERY)
            span[k].visibility = g->is_causal ? CMB_UP_TO : CMB_OTHERS;
    /* Row 0's query attends nothing then, and the query of row r + 1 attends up to row r. */
    attend(g, g->is_causal ? cmb_list_cut(column, 1, column.count) : column, span, spans);
}

static void attend_column(const grid *g, int64_t c) {
    attend_along(g, c, &(cmb_span){column_of(g, 0, c), CMB_OTHERS}, 1);
}

/* A row's queries attend it, and the other columns above it (regions up + t) and below it (regions down + t); 0: none.
 */
static void attend_row(const grid *g, int64_t r, int64_t up, int64_t down) {
    cmb_span span[3];
    int spans = 0;
    if (up && r > 0)
        span[spans++] = (cmb_span){row_of(g, up, r - 1, g->m), CMB_OTHERS};
    if (down && r + 1 < g->n)
        span[spans++] = (cmb_span){row_of(g, down, r + 1, row_length(g, r + 1)), CMB_OTHERS};
    cmb_list row = row_of(g, 0, r, row_length(g, r));
    span[spans++] = (cmb_span){row, g->is_causal ? CMB_UP_TO : CMB_EVERY};
    attend(g, row, span, spans);
}

/* ---- parts of columns ---- */

/* Region up + t is the column of t down to t. Region down + t, if not causal, is that column from t on. */
static void pool_columns(const grid *g, int64_t c, int64_t end, int64_t up, int64_t down) {
    const int64_t m = g->m;
    for (int64_t r = first_row(g); r < g->n; r++)
        for (int64_t t = r * m + c; t < cmb_min(r * m + end, g->L); t++)
            if (t >= g->build->first)
                cmb_build_pool(g->build, up + t, r == 0 ? one(t) : pair(up + t - m, t));
    for (int64_t r = g->n - 1; down && r >= 0; r--)
        for (int64_t t = r * m + c; t < cmb_min(r * m + end, g->L); t++)
            cmb_build_pool(g->build, down + t, t + m >= g->L ? one(t) : pair(t, down + t + m));
}

static void summarize_column(const grid *g, int64_t c, int64_t up, int64_t down) {
    cmb_list column = column_of(g, 0, c);
    /* The queries of the row below, in the other columns, attend a part; a last row of one position has none. */
    const int64_t attended = g->n - 1 - (c == 0 && g->last == 1);
    const cmb_list parts = cmb_list_cut(column_of(g, up, c), 0, g->build->past ? g->n : attended);
    if (g->width == 1)
        return;
    for (int64_t a = count_earlier(g, column); a < parts.count && !g->build->status; a += CMB_TILE)
        cmb_build_attend_from(g->build, parts, a, &(cmb_span){column, CMB_UP_TO}, 1);
    if (down)
        cmb_build_attend(g->build, cmb_list_cut(column_of(g, down, c), 1, column.count), &(cmb_span){column, CMB_AFTER},
                         1);
}

static void build_columns(const grid *g, int64_t up, int64_t down, bool attended) {
    column_group next = {.most = COLUMNS};
    cmb_build_wave(g->build);
    while (next_columns(g, &next)) {
        pool_columns(g, next.first, next.end, up, down);
        for (int64_t c = next.first; c < next.end; c++) {
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
    for (int64_t r = first_row(g); r < g->n && cmb_build_task(g->build); r++)
        attend_row(g, r, up, down);
}

static void build_sparse(const grid *g) {
    column_group next = {.most = 1};
    cmb_build_wave(g->build);
    while (next_columns(g, &next))
        attend_column(g, next.first);
    cmb_build_wave(g->build);
    for (int64_t r = first_row(g); r < g->n && cmb_build_task(g->build); r++)
        attend_row(g, r, 0, 0);
}

/* ---- parts of rows ---- */

/* Region r * m + c is row r without column c: pooled from a prefix and a suffix of the row, which are scratch rows. */
static void summarize_row_without(const grid *g, int64_t r) {
    cmb_build *build = g->build;
    int64_t length = row_length(g, r), region = g->L + r * g->m;
    int64_t prefix = g->L + build->plan.R, suffix = prefix + g->m;
    cmb_list row = row_of(g, 0, r, length);
    cmb_list regions = row_of(g, g->L, r, seen_columns(g, r));
    if (build->past && regions.count == 0) /* without a past all members are on record */
        return;
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
    if (length > 1)
        cmb_build_attend(build, regions, &(cmb_span){row, CMB_OTHERS}, 1);
    else
        cmb_build_attend(build, cmb_list_cut(regions, 1, g->m), &(cmb_span){row, CMB_EVERY}, 1);
}

static void build_horizontal(const grid *g) {
    column_group next = {.most = 1};
    cmb_build_wave(g->build);
    for (int64_t r = first_row(g); r < g->n && cmb_build_task(g->build); r++) {
        summarize_row_without(g, r);
        attend_row(g, r, 0, 0);
    }
    cmb_build_wave(g->build);
    while (next_columns(g, &next)) {
        const int64_t c = next.first;
        int64_t rows = g->m == 1 ? 0 : g->n - (c == 0 && g->last == 1);
        cmb_span span[] = {{cmb_list_make(g->L + c, g->m, rows), CMB_OTHERS}, {column_of(g, 0, c), CMB_OTHERS}};
        attend_along(g, c, span, 2);
    }
}

/* Regions left + r * m + c and right + r * m + c are the parts of row r left and right of column c. A row that ends
 * before column c is all left. */
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
    cmb_build_attend(build, cmb_list_cut(cmb_list_make(left, 1, columns), 1, columns), &(cmb_span){row, CMB_UP_TO}, 1);
    cmb_build_attend(build, cmb_list_cut(cmb_list_make(right, 1, columns), 0, length - 1), &(cmb_span){row, CMB_AFTER},
                     1);
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
        cmb_span span[] = {{cmb_list_make(left + c, g->m, c ? g->n : 0), CMB_OTHERS},
                           {cmb_list_make(right + c, g->m, rights), CMB_OTHERS},
                           {column_of(g, 0, c), CMB_OTHERS}};
        attend_along(g, c, span, 3);
    }
}

/* ---- whole rows, picked at a column ---- */

/* Region t is the row of t, with the query and key of t. If t is masked, it picks the nearest unmasked position of its
 * row before t, else the nearest after it: children are listed from t leftwards, then from t + 1 rightwards. */
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

/* In a plan that continues no key is masked, so that a region has the one child that it picks. */
static void pick_row_at(const grid *g, int64_t r) {
    for (int64_t c = 0; c < seen_columns(g, r); c++)
        cmb_build_pool(g->build, g->L + r * g->m + c, one(r * g->m + c));
}

/* Each row is attended by its queries, then summarized by its regions, whose queries are the same: 64 queries at a
 * time, so that a tile of regions can continue from the softmax of the tile before (cmb_plan_traits, reused_rows). */
static void attend_and_summarize_row(const grid *g, int64_t r) {
    cmb_list row = row_of(g, 0, r, row_length(g, r));
    cmb_list regions = row_of(g, g->L, r, cmb_min(row.count, seen_columns(g, r)));
    for (int64_t a = 0; a < row.count; a += CMB_TILE) {
        cmb_build_attend_from(g->build, row, a, &(cmb_span){row, g->is_causal ? CMB_UP_TO : CMB_EVERY}, 1);
        cmb_build_attend_from(g->build, regions, a, &(cmb_span){row, CMB_EVERY}, 1);
    }
}

/* The regions of row r and columns [a, a + 64) attend the row as in attend_and_summarize_row, where their softmax
 * continues from the one of the queries, whose tile ends with a chunk:
 *
 *     rows        0 .. a - 1    a .. a + 63     filler up to   a .. a + 63     a + 64 .. m - 1
 *     region c    all           those up to c   a chunk's end  those after c   all
 */
static void summarize_after_queries(const grid *g, cmb_list row, int64_t a, int64_t n) {
    const int64_t b = a + n;
    int32_t member[2 * CMB_TILE + CMB_CHUNK_ROWS];
    uint64_t mask[2 * CMB_TILE + CMB_CHUNK_ROWS];
    int64_t rows = 0;
    for (int64_t c = a; c < b; c++) {
        member[rows] = (int32_t)(row.start + c);
        mask[rows++] = cmb_lane_mask(c - a, n);
    }
    for (; (a + rows) % CMB_CHUNK_ROWS; mask[rows++] = 0)
        member[rows] = row.start;
    for (int64_t c = a; c < b; c++) {
        member[rows] = (int32_t)(row.start + c);
        mask[rows++] = cmb_lane_mask(0, c - a);
    }
    cmb_build_run(g->build, cmb_list_cut(row, 0, a));
    cmb_build_untrimmed_run(g->build, cmb_build_list(g->build, member, rows), mask);
    cmb_build_run(g->build, cmb_list_cut(row, b, row.count));
}

/* attend_and_summarize_row in a plan that continues a sequence. */
static void continue_row(const grid *g, int64_t r) {
    const cmb_list row = row_of(g, 0, r, row_length(g, r)), regions = row_of(g, g->L, r, seen_columns(g, r));
    attend_row(g, r, 0, 0);
    for (int64_t a = 0; a < regions.count && !g->build->status; a += CMB_TILE) {
        const int64_t n = cmb_min(CMB_TILE, regions.count - a);
        cmb_build_tile(g->build, cmb_list_cut(regions, a, a + n), cmb_tile_width(n));
        if (g->build->plan.weighted)
            cmb_build_run(g->build, row);
        else
            summarize_after_queries(g, row, a, n);
    }
}

static void build_rowmajor(const grid *g) {
    column_group next = {.most = COLUMNS};
    cmb_build_wave(g->build);
    for (int64_t r = first_row(g); r < g->n && cmb_build_task(g->build); r++)
        if (g->build->past) {
            pick_row_at(g, r);
            continue_row(g, r);
        } else {
            pool_row_at(g, r);
            attend_and_summarize_row(g, r);
        }
    cmb_build_wave(g->build);
    while (next_columns(g, &next))
        for (int64_t c = next.first; c < next.end; c++) {
            cmb_span span[] = {{column_of(g, g->L, c), CMB_OTHERS}, {one(2 * g->L - 1), CMB_EVERY}};
            attend_along(g, c, span, !g->is_causal && c >= g->last ? 2 : 1);
        }
}

/* ---- builders ---- */

static cmb_status begin_grid(grid *g, int64_t L, int64_t width, const cmb_plan_options *options, cmb_error *error) {
    cmb_status status = cmb_check_options(L, options, error);
    if (status)
        return status;
    if (width < 1)
        return cmb_fail(error, CMB_ERR_VALUE, "width must be at least 1, got %lld", (long long)width);
    *g = (grid){.L = L, .width = cmb_min(width, INT64_C(1) << 32), .is_causal = options->is_causal};
    g->m = cmb_min(g->width, L);
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
    const bool picks = order == CMB_AXIAL_ROWMAJOR && !own.past;
    if (picks)
        own.pooling = CMB_POOL_FIRST;
    const int64_t scratch = !own.sparse && (is_horizontal || picks) ? 2 * g.m : 0;
    status = cmb_build_begin(&build, L, own.sparse ? 0 : R, scratch, &own, error);
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

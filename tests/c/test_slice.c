// SPDX-License-Identifier: Apache-2.0
/* cmb_plan_slice: each query attends what it attends in the whole plan, in the same order. tests/test_slices.py
 * compares the bits of calls. */
#include "factorizations.h"

/* The regions whose positions below are known are those that some query attends, and what these are pooled from. */
static void check_pools(const cmb_plan *base, const cmb_plan *slice, const vector *rows) {
    vector *of_base = pooled_positions(base), *of_slice = pooled_positions(slice);
    for (int64_t n = 0; n < slice->queries; n++)
        for (int64_t k = 0; k < rows[n].count; k++) {
            const int64_t r = rows[n].item[k] - base->L;
            CHECK(r < 0 || are_equal(&of_base[r], &of_slice[r]), "region %lld", (long long)r);
        }
    for (int64_t r = 0; r < base->R; r++)
        CHECK(of_slice[r].count == 0 || are_equal(&of_base[r], &of_slice[r]), "region %lld", (long long)r);
    free_lists(of_base, base->R + base->N);
    free_lists(of_slice, base->R + base->N);
}

static void check_slice(const factorization *f, const cmb_plan *base, int64_t first, int64_t count) {
    cmb_plan *slice = NULL, *copy = NULL;
    cmb_error error = {0};
    CHECK(cmb_plan_slice(base, first, count, NULL, &slice, &error) == CMB_OK, "%s", error.message);
    CHECK(cmb_plan_from_arrays(slice, NULL, &copy, &error) == CMB_OK, "%s: kind %d L %lld first %lld count %lld",
          error.message, (int)f->kind, (long long)f->L, (long long)first, (long long)count);
    CHECK(slice->is_slice && slice->first_query == first && slice->queries == count && slice->L == base->L &&
          slice->R == base->R && slice->is_causal == base->is_causal);
    vector *of_base = attended_rows(base), *of_slice = attended_rows(slice);
    for (int64_t n = 0; n < count; n++)
        CHECK(are_equal(&of_base[first + n], &of_slice[n]), "kind %d L %lld span %lld first %lld query %lld",
              (int)f->kind, (long long)f->L, (long long)f->span, (long long)first, (long long)n);
    for (int64_t x = count; x < base->L + base->R; x++)
        CHECK(of_slice[x].count == 0);
    check_pools(base, slice, of_slice);
    free_lists(of_base, base->L + base->R);
    free_lists(of_slice, base->L + base->R);
    cmb_plan_free(slice);
    cmb_plan_free(copy);
}

static void test_rows(void) {
    const int64_t length[] = {1, 2, 17, 64, 65, 130, 257};
    random_state = 11;
    for (kind k = DENSE; k < KINDS; k++)
        for (size_t n = 0; n < sizeof length / sizeof *length; n++)
            for (int turn = 0; turn < 8; turn++) {
                const int64_t L = length[n];
                const factorization f = {k, L, 2 + random_below(20), turn % 2 == 0, turn == 7};
                cmb_plan *base = make(&f);
                const int64_t first = random_below((int)L + 1);
                check_slice(&f, base, first, random_below((int)(L - first) + 1));
                check_slice(&f, base, L - 1, 1);
                check_slice(&f, base, 0, turn == 0 ? L : 0);
                cmb_plan_free(base);
            }
}

/* Rows that only other lanes attend keep their places, but for those at the end of a tile. */
static void test_places(void) {
    cmb_plan *base = make(&(factorization){WINDOW, 64, 8, true, false}), *slice = NULL;
    CHECK(cmb_plan_slice(base, 40, 2, NULL, &slice, NULL) == CMB_OK);
    CHECK(slice->tiles == 1 && slice->tile[0].width == 16);
    int64_t place = 0;
    bool is_seen = false;
    for (int32_t n = 0; n < slice->runs; n++)
        for (int32_t k = 0; k < slice->run[n].row.count; k++, place++) {
            const uint64_t mask = slice->run[n].mask < 0 ? 3 : slice->mask[slice->run[n].mask + k];
            CHECK(row_at(slice, slice->run[n].row, k) == place);
            CHECK(mask == (place < 33 || place > 41 ? 0 : place == 33 ? 1 : place == 41 ? 2 : 3));
            is_seen = mask != 0;
        }
    CHECK(place == 42 && is_seen);
    cmb_plan_free(slice);
    cmb_plan_free(base);
}

static void expect_no_plan(cmb_status status, const cmb_plan *plan, const cmb_error *error, const char *message) {
    CHECK(status == CMB_ERR_VALUE && !plan && strcmp(error->message, message) == 0, "%s, not %s", error->message,
          message);
}

static void test_bad_slices(void) {
    cmb_plan *base = make(&(factorization){FIXED, 10, 4, true, false}), *slice = NULL, *plan = NULL;
    cmb_error error = {0};
    cmb_plan_facts facts;
    expect_no_plan(cmb_plan_slice(NULL, 0, 1, NULL, &plan, &error), plan, &error, "base is missing");
    expect_no_plan(cmb_plan_slice(base, 0, 11, NULL, &plan, &error), plan, &error,
                   "count must be between 0 and 10, got 11");
    expect_no_plan(cmb_plan_slice(base, 0, -1, NULL, &plan, &error), plan, &error,
                   "count must be between 0 and 10, got -1");
    expect_no_plan(cmb_plan_slice(base, 8, 3, NULL, &plan, &error), plan, &error,
                   "first must be between 0 and 7, got 8");
    expect_no_plan(cmb_plan_slice(base, -1, 3, NULL, &plan, &error), plan, &error,
                   "first must be between 0 and 7, got -1");
    CHECK(cmb_plan_slice(base, 5, 3, NULL, &slice, &error) == CMB_OK, "%s", error.message);
    expect_no_plan(cmb_plan_slice(slice, 0, 1, NULL, &plan, &error), plan, &error,
                   "base must be a whole plan, got a slice");
    const int64_t region[10] = {0};
    expect_no_plan(cmb_plan_selected(slice, &(cmb_selection){1, 1, region, true, true}, NULL, &plan, &error), plan,
                   &error, "base must be a whole plan, got a slice");
    expect_no_plan(cmb_plan_measure(slice, NULL, &facts, &error), plan, &error, "plan must be whole, got a slice");
    const cmb_plan *sliced = slice;
    const cmb_scoring scoring = {
        .B = 1, .Hq = 1, .Hk = 1, .L = 10, .D = 1, .scale = 1, .plan = &sliced, .plans = 1, .block = 1};
    CHECK(cmb_select(&scoring, NULL, &error) == CMB_ERR_VALUE);
    CHECK(strcmp(error.message, "plan 0 must be whole, got a slice") == 0, "%s", error.message);
    cmb_plan damaged = *slice;
    damaged.queries = 2;
    expect_no_plan(cmb_plan_from_arrays(&damaged, NULL, &plan, &error), plan, &error,
                   "tile 0: query row 2 is not in the slice");
    damaged = *slice;
    damaged.first_query = 4;
    expect_no_plan(cmb_plan_from_arrays(&damaged, NULL, &plan, &error), plan, &error,
                   "tile 0: query 4 of a causal plan sees position 5");
    damaged.first_query = 8;
    expect_no_plan(cmb_plan_from_arrays(&damaged, NULL, &plan, &error), plan, &error,
                   "plan: first_query and queries must be of a slice, got 8 and 3");
    damaged = *base;
    damaged.queries = 3;
    expect_no_plan(cmb_plan_from_arrays(&damaged, NULL, &plan, &error), plan, &error,
                   "plan: first_query and queries must be of a slice, got 0 and 3");
    cmb_plan_free(slice);
    cmb_plan_free(base);
}

static cmb_status use_slice(void *context) {
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    const cmb_status status = cmb_plan_slice(context, 30, 20, NULL, &plan, &error);
    CHECK((status == CMB_OK) == (plan != NULL) && status == error.status);
    cmb_plan_free(plan);
    return status;
}

static void test_failing_memory(void) {
    for (kind k = DENSE; k < KINDS; k++) {
        cmb_plan *base = make(&(factorization){k, 64, 4, true, false});
        fail_each_allocation(use_slice, base);
        cmb_plan_free(base);
    }
}

int main(int argc, char **argv) {
    const test_case tests[] = {
        TEST(test_rows),
        TEST(test_places),
        TEST(test_bad_slices),
        TEST(test_failing_memory),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

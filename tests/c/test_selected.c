// SPDX-License-Identifier: Apache-2.0
/* cmb_plan_selected against its definition, row by row, on the plans that other builders make. */
#include "factorizations.h"

typedef struct {
    factorization base;
    int64_t block, count;
    bool open, rest;
} selected;

static int64_t blocks_of(const selected *s) { return (s->base.L + s->block - 1) / s->block; }

/* Any numbers from -1 on, repeats among them. */
static int64_t *draw_regions(const selected *s, int64_t R) {
    int64_t *region = calloc((size_t)(blocks_of(s) * s->count) + 1, sizeof *region);
    CHECK(region);
    for (int64_t n = 0; n < blocks_of(s) * s->count; n++)
        region[n] = random_below((int)R + 1) - 1;
    return region;
}

static bool contains(const vector *list, int64_t x) {
    for (int64_t n = 0; n < list->count; n++)
        if (list->item[n] == x)
            return true;
    return false;
}

/* The rows of query i: those of the base, with the listed regions opened. */
static vector select_rows(const selected *s, const int64_t *region, const vector *of_base, const vector *below,
                          int64_t i) {
    const int64_t L = s->base.L;
    const vector listed = {(int64_t *)(uintptr_t)(region + i / s->block * s->count), s->count, s->count};
    vector rows = {0};
    for (int64_t n = 0; n < of_base->count; n++) {
        const int64_t x = of_base->item[n];
        const bool is_listed = x >= L && contains(&listed, x - L);
        if (x < L || (s->open ? s->rest && !is_listed : is_listed))
            push(&rows, x);
    }
    for (int64_t n = 0; s->open && n < of_base->count; n++) {
        const int64_t r = of_base->item[n] - L;
        for (int64_t m = 0; r >= 0 && contains(&listed, r) && m < below[r].count; m++)
            if (!contains(of_base, below[r].item[m]))
                push(&rows, below[r].item[m]);
    }
    sort(&rows);
    return rows;
}

static void check_against_base(const selected *s) {
    const int64_t L = s->base.L;
    cmb_plan *base = make(&s->base), *plan = NULL;
    cmb_error error = {0};
    int64_t *region = draw_regions(s, base->R);
    const cmb_selection selection = {s->block, s->count, region, s->open, s->rest};
    CHECK(cmb_plan_selected(base, &selection, NULL, &plan, &error) == CMB_OK, "%s", error.message);
    CHECK(cmb_plan_check(plan, NULL, &error) == CMB_OK,
          "%s: kind %d L %lld span %lld causal %d block %lld count %lld open %d rest %d", error.message,
          (int)s->base.kind, (long long)L, (long long)s->base.span, s->base.is_causal, (long long)s->block,
          (long long)s->count, s->open, s->rest);
    CHECK(plan->R == (s->rest || !s->open ? base->R : 0) && plan->is_causal == base->is_causal);
    vector *of_base = attended_rows(base), *of_plan = attended_rows(plan), *below = pooled_positions(base);
    bool *needed = calloc((size_t)plan->R + 1, sizeof *needed);
    CHECK(needed);
    for (int64_t i = 0; i < L; i++) {
        vector rows = select_rows(s, region, &of_base[i], below, i);
        sort(&of_plan[i]);
        CHECK(are_equal(&of_plan[i], &rows), "kind %d L %lld block %lld query %lld", (int)s->base.kind, (long long)L,
              (long long)s->block, (long long)i);
        for (int64_t n = 0; n < rows.count; n++)
            if (rows.item[n] >= L)
                needed[rows.item[n] - L] = true;
        free(rows.item);
    }
    for (int64_t r = plan->R - 1; r >= 0; r--) { /* what is needed is summarized as in the base, and nothing else */
        const vector nothing = {0};
        sort(&of_base[L + r]);
        sort(&of_plan[L + r]);
        CHECK(are_equal(&of_plan[L + r], needed[r] ? &of_base[L + r] : &nothing), "region %lld", (long long)r);
        for (int64_t n = 0; n < of_plan[L + r].count; n++)
            if (of_plan[L + r].item[n] >= L)
                needed[of_plan[L + r].item[n] - L] = true;
    }
    free(needed);
    free(region);
    free_lists(of_base, L + base->R);
    free_lists(of_plan, L + plan->R);
    free_lists(below, base->R + base->N);
    cmb_plan_free(base);
    cmb_plan_free(plan);
}

static void test_against_base(void) {
    const int64_t length[] = {1, 2, 17, 63, 64, 65, 130, 257}, block[] = {1, 3, 16, 64, 100, INT64_C(1) << 40};
    random_state = 7;
    for (kind k = FIXED; k < KINDS; k++)
        for (size_t n = 0; n < sizeof length / sizeof *length; n++)
            for (size_t m = 0; m < sizeof block / sizeof *block; m++)
                for (int turn = 0; turn < 6; turn++) {
                    const bool open = turn % 3 != 2;
                    const factorization base = {k, length[n], 2 + random_below(20), turn % 2 == 0, false};
                    check_against_base(&(selected){base, block[m], random_below(6), open, open && turn % 3 == 0});
                }
}

/* Queries of a shorter plan have the rows that they have in a longer one, each in its place. */
static void test_prefixes(void) {
    const int64_t region[] = {0, 3, 5, 1, 8, 2, 11, 4, 0, 9, 6, 7, 12, 3, 1, 17, 10, 2, 30, 20, 5, 2, 25, 14};
    for (int64_t block = 16; block <= 64; block *= 2)
        for (int64_t L = 1; L < 190; L++) {
            vector rows[2][190] = {{{0}}};
            for (int longer = 0; longer < 2; longer++) {
                const int64_t length = longer ? 192 : L;
                cmb_plan *base = make(&(factorization){FIXED, length, 6, true, false}), *plan = NULL;
                int64_t own[24];
                for (int n = 0; n < 24; n++)
                    own[n] = region[n] < base->R ? region[n] : -1; /* of positions that the prefix does not have */
                const cmb_selection selection = {block, 2, own, true, true};
                CHECK(cmb_plan_selected(base, &selection, NULL, &plan, NULL) == CMB_OK);
                for (int32_t tile = 0; tile < plan->tiles; tile++)
                    for (int32_t t = 0; t < plan->tile[tile].query.count; t++) {
                        const int64_t i = row_at(plan, plan->tile[tile].query, t);
                        int64_t place = 0;
                        for (int32_t r = plan->tile[tile].run; i < L && r < plan->tile[tile + 1].run; r++)
                            for (int32_t k = 0; k < plan->run[r].row.count; k++, place++)
                                if (plan->run[r].mask < 0 || plan->mask[plan->run[r].mask + k] >> t & 1) {
                                    const int64_t x = row_at(plan, plan->run[r].row, k);
                                    push(&rows[longer][i], x < length ? x : INT64_C(1) << 32 | (x - length));
                                    push(&rows[longer][i], place);
                                }
                    }
                cmb_plan_free(base);
                cmb_plan_free(plan);
            }
            for (int64_t i = 0; i < L; i++) {
                CHECK(are_equal(&rows[0][i], &rows[1][i]), "L %lld block %lld query %lld", (long long)L,
                      (long long)block, (long long)i);
                free(rows[0][i].item);
                free(rows[1][i].item);
            }
        }
}

static void test_bad_selections(void) {
    cmb_plan *base = make(&(factorization){FIXED, 10, 4, true, false}), *plan = NULL;
    cmb_error error = {0};
    const int64_t region[] = {0, 3, -2};
    const struct {
        cmb_selection selection;
        const char *message;
    } bad[] = {
        {{0, 1, region, true, true}, "block must be at least 1, got 0"},
        {{10, -1, region, true, true}, "count must be between 0 and 33554431, got -1"},
        {{10, 1, NULL, true, true}, "region is missing"},
        {{10, 1, region, false, true}, "open must be true where rest is true"},
        {{5, 1, region, true, true}, "regions must lie between -1 and 2, got 3 for block 1"},
        {{10, 1, region + 2, true, false}, "regions must lie between -1 and 2, got -2 for block 0"},
    };
    for (size_t n = 0; n < sizeof bad / sizeof *bad; n++)
        expect(cmb_plan_selected(base, &bad[n].selection, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error,
               bad[n].message);
    expect(cmb_plan_selected(NULL, &bad[0].selection, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "base is missing");
    expect(cmb_plan_selected(base, NULL, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error, "selection is missing");
    cmb_plan_free(base);
    /* One query, one region that no pool step makes: its caller gives the summary. */
    const int32_t wave[] = {0, 1};
    const cmb_task task[] = {{0, 0}, {0, 1}};
    const cmb_tile tile[] = {{{0, 1, 1}, 0, 16}, {{0, 1, 0}, 1, 0}};
    const cmb_run run[] = {{{0, 1, 2}, -1}};
    const cmb_plan given = {.L = 1,
                            .R = 1,
                            .waves = 1,
                            .tasks = 1,
                            .tiles = 1,
                            .runs = 1,
                            .wave = wave,
                            .task = task,
                            .tile = tile,
                            .run = run};
    CHECK(cmb_plan_from_arrays(&given, NULL, &base, &error) == CMB_OK, "%s", error.message);
    expect(cmb_plan_selected(base, &(cmb_selection){1, 1, region, true, true}, NULL, &plan, &error), CMB_ERR_VALUE,
           plan, &error, "base has regions that the caller gives, whose positions are not known");
    CHECK(cmb_plan_selected(base, &(cmb_selection){1, 1, region, false, false}, NULL, &plan, &error) == CMB_OK);
    CHECK(plan->R == 1 && plan->runs == 1 && plan->run[0].row.count == 2);
    cmb_plan_free(plan);
    cmb_plan_free(base);
}

static cmb_status use_selection(void *context) {
    const int64_t region[] = {0, 5, 3, 1};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    const cmb_selection selection = {16, 1, region, true, true};
    const cmb_status status = cmb_plan_selected(context, &selection, NULL, &plan, &error);
    CHECK((status == CMB_OK) == (plan != NULL) && status == error.status);
    cmb_plan_free(plan);
    return status;
}

static void test_failing_memory(void) {
    for (kind k = FIXED; k <= TREE2; k++) {
        cmb_plan *base = make(&(factorization){k, 64, 4, true, false});
        fail_each_allocation(use_selection, base);
        cmb_plan_free(base);
    }
}

int main(int argc, char **argv) {
    const test_case tests[] = {
        TEST(test_against_base),
        TEST(test_prefixes),
        TEST(test_bad_selections),
        TEST(test_failing_memory),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

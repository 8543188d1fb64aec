// SPDX-License-Identifier: Apache-2.0
/* The check of plans, against damaged ones; and that making, checking and measuring plans can be cancelled. */
#include "factorizations.h"

/* A plan whose arrays a test may change. */
static cmb_plan *make_writable(kind k, int64_t L, bool is_causal) {
    return make(&(factorization){k, L, 12, is_causal, false});
}

static void damage(const int32_t *field, int32_t value) { *(int32_t *)(uintptr_t)field = value; }

static void expect_broken(cmb_plan *plan, const char *part) {
    cmb_error error = {0};
    CHECK(cmb_plan_check(plan, NULL, &error) == CMB_ERR_VALUE && strstr(error.message, part), "\"%s\", not \"%s\"",
          error.message, part);
    cmb_plan_free(plan);
}

static void test_check_refuses(void) {
    cmb_plan *plan = make_writable(FIXED, 100, true);
    plan->R = -1;
    expect_broken(plan, "R and N");
    plan = make_writable(FIXED, 100, true);
    plan->L = INT64_MAX;
    expect_broken(plan, "length must be between 0 and 2^30");
    plan = make_writable(FIXED, 100, true);
    plan->pooling = (cmb_pooling)-1;
    expect_broken(plan, "pooling must be");
    plan = make_writable(FIXED, 100, true);
    plan->run = NULL;
    expect_broken(plan, "array run is missing");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->pool[1].row, 5);
    expect_broken(plan, "pool 1 writes row 5, which is no region or scratch row");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->pool[1].row, 100);
    expect_broken(plan, "pool 1 writes region 0 a second time");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->N, 1);
    damage(&plan->pool[0].row, 100 + plan->R);
    damage(&plan->pool[1].row, 100 + plan->R);
    expect_broken(plan, "pool 1 writes scratch row 0 a second time in its task");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->pool[1].child.count, 200);
    expect_broken(plan, "pool 1: its children lie outside the table");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->pool[1].child.start, 108);
    damage(&plan->pool[1].child.count, 1);
    expect_broken(plan, "pool 1 reads row 108 before it is pooled");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->pool[3].child.start, 99);
    damage(&plan->pool[3].child.count, 1);
    expect_broken(plan, "of a causal plan sees position 99");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->tile[0].width, 8);
    expect_broken(plan, "tile 0: its width must be 1, 16, 32, 48 or 64, got 8");
    plan = make_writable(FIXED, 100, false);
    damage(&plan->tile[1].query.start, 100);
    CHECK(cmb_plan_check(plan, NULL, NULL) == CMB_ERR_VALUE);
    expect_broken(plan, "attends region 1 before it is summarized");
    plan = make_writable(FIXED, 400, true);
    damage(&plan->tile[plan->tiles - 1].query.start, 0);
    expect_broken(plan, "belongs to another task of its wave");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->tile[plan->tiles - 1].query.start, 80);
    expect_broken(plan, "its queries lie outside the table");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->tile[plan->tiles - 1].query.count, 39);
    expect_broken(plan, "has lanes without a query");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->run[plan->runs - 1].mask, plan->masks);
    expect_broken(plan, "its masks lie outside the mask array");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->index[3], 108);
    expect_broken(plan, "attends region 8 before it is summarized");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->wave[1], plan->tasks + 1);
    expect_broken(plan, "must follow one another");
    plan = make_writable(DENSE, 100, true);
    damage(&plan->tile[1].query.step, -1);
    expect_broken(plan, "belongs to another task of its wave");
    plan = make_writable(DENSE, 100, false);
    damage(&plan->tile[1].query.count, 30);
    plan->is_causal = true;
    expect_broken(plan, "tile 0: query 0 of a causal plan sees position 99");
}

/* Whatever the integers hold, the check says so or the plan can be read: run under a sanitizer. */
static void test_damaged_plans(void) {
    int64_t passed = 0;
    for (int n = 0; n < 20000; n++) {
        cmb_plan *plan = make_writable((kind)(n % KINDS), 1 + random_below(90), random_below(2));
        const struct {
            const void *data;
            int64_t words;
        } array[] = {{plan->wave, plan->waves + 1},         {plan->task, 2 * (plan->tasks + 1)},
                     {plan->pool, 4 * plan->pools},         {plan->tile, 5 * (plan->tiles + 1)},
                     {plan->run, 4 * plan->runs},           {plan->index, plan->indices},
                     {plan->mask, 2 * (int64_t)plan->masks}};
        for (int64_t k = random_below(3); k >= 0; k--) {
            const int64_t a = random_below(7);
            if (!array[a].words)
                continue;
            char *word = (char *)(uintptr_t)array[a].data + 4 * random_below((int)array[a].words);
            int32_t old;
            memcpy(&old, word, 4);
            const int64_t value[] = {(int64_t)old + 1, (int64_t)old - 1, 0, -1, INT32_MAX,
                                     INT32_MIN,        random_below(200)};
            old = (int32_t)value[random_below(7)];
            memcpy(word, &old, 4);
        }
        cmb_plan_facts facts;
        cmb_error error = {0};
        const cmb_status status = cmb_plan_check(plan, NULL, &error);
        CHECK(status == CMB_OK || (status == CMB_ERR_VALUE && error.message[0]));
        if (!status) {
            passed++;
            CHECK(cmb_plan_measure(plan, NULL, &facts, &error) == CMB_OK);
        }
        cmb_plan_free(plan);
    }
    CHECK(passed > 0 && passed < 10000, "%lld", (long long)passed);
}

/* Rows that nothing names take no memory, however many a plan says that it has. */
static void test_rows_without_a_name(void) {
    const int32_t wave[] = {0, 1};
    const cmb_task task[] = {{0, 0}, {0, 1}};
    const cmb_tile tile[] = {{{2, 1, 5}, 0, 16}, {{0, 1, 0}, 1, 0}};
    const cmb_run run[] = {{{0, 1, 3}, -1}};
    const cmb_plan arrays = {.L = INT64_C(1) << 30,
                             .N = 1 << 29,
                             .waves = 1,
                             .tasks = 1,
                             .tiles = 1,
                             .runs = 1,
                             .wave = wave,
                             .task = task,
                             .tile = tile,
                             .run = run};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    test_heap heap = {0};
    test_heap_use(&heap);
    CHECK(cmb_plan_check(&arrays, NULL, &error) == CMB_OK, "%s", error.message);
    CHECK(heap.peak < 1000, "%lld bytes", (long long)heap.peak);
    CHECK(cmb_plan_from_arrays(&arrays, NULL, &plan, &error) == CMB_OK, "%s", error.message);
    CHECK(heap.peak < 1000, "%lld bytes", (long long)heap.peak);
    cmb_plan_free(plan);
    test_heap_use(NULL);
}

/* ---- cancelling ---- */

static bool stop_at_once(void *polls) {
    ++*(int *)polls;
    return true;
}

typedef struct {
    cmb_plan_options options;
    int64_t *cluster;          /* [2^23] */
    const cmb_plan *plan;      /* of 2^21 positions */
    const cmb_lists *lists[3]; /* of 2^23 positions */
} long_work;

static cmb_status work_long(const long_work *work, int which, cmb_plan **plan, cmb_error *error) {
    const cmb_plan_options *options = &work->options;
    const int64_t L = INT64_C(1) << 23;
    cmb_plan_facts facts;
    switch (which) {
    case 0:
        return cmb_plan_dense(L << 6, options, plan, error);
    case 1:
        return cmb_plan_fixed(L << 4, 1 << 13, 1, options, plan, error);
    case 2:
        return cmb_plan_logsparse(L, false, options, plan, error);
    case 3:
        return cmb_plan_logsparse(L, true, options, plan, error);
    case 4:
        return cmb_plan_tree(L, 4, 0, options, plan, error);
    case 5:
        return cmb_plan_axial(L, 1 << 11, CMB_AXIAL_ROWMAJOR, false, options, plan, error);
    case 6:
        return cmb_plan_axial_mixture(L, 1 << 11, options, plan, error);
    case 7:
        return cmb_plan_routing(L, work->cluster, options, plan, error);
    case 8:
        return cmb_plan_from_arrays(work->plan, options->interrupt, plan, error);
    case 9:
        return cmb_plan_check(work->plan, options->interrupt, error);
    case 10:
        return cmb_plan_measure(work->plan, options->interrupt, &facts, error);
    case 11:
        return cmb_plan_slice(work->plan, 0, work->plan->L, options->interrupt, plan, error);
    case 12:
        return cmb_plan_selected(work->plan, &(cmb_selection){64, 1, work->cluster, true, true}, options->interrupt,
                                 plan, error);
    default:
        return cmb_plan_from_parts(L, work->lists[0], work->lists[1], work->lists[2], CMB_COVER_FULL, options, plan,
                                   error);
    }
}

/* All that makes or reads plans asks within its time whether to stop, and leaves nothing behind. */
static void test_cancelled(void) {
    enum { WORKS = 14, LENGTH = 1 << 23, PARTS = 4 };
    int polls = 0;
    const cmb_interrupt interrupt = {stop_at_once, &polls};
    long_work work = {.options = {.is_causal = true}};
    cmb_plan *made = NULL;
    CHECK(cmb_plan_logsparse(1 << 21, false, &work.options, &made, NULL) == CMB_OK);
    work.plan = made;
    work.cluster = calloc(LENGTH, sizeof *work.cluster);
    int64_t *offset = calloc(LENGTH + 1, sizeof *offset), *item = calloc((size_t)PARTS * LENGTH, sizeof *item),
            *none = calloc(LENGTH + 1, sizeof *none);
    CHECK(work.cluster && offset && item && none);
    for (int64_t i = 0; i < LENGTH; i++) {
        work.cluster[i] = i * i % 1000;
        offset[i + 1] = PARTS * (i + 1);
    }
    const cmb_lists direct = {LENGTH, offset, item}, regions = {LENGTH, none, item}, members = {0};
    work.lists[0] = &direct;
    work.lists[1] = &regions;
    work.lists[2] = &members;
    work.options.interrupt = &interrupt;
    for (int which = 0; which < WORKS; which++) {
        cmb_plan *plan = NULL;
        cmb_error error = {0};
        test_heap heap = {0};
        polls = 0;
        test_heap_use(&heap);
        const cmb_status status = work_long(&work, which, &plan, &error);
        test_heap_use(NULL);
        CHECK(status == CMB_ERR_CANCELLED && strcmp(error.message, "cancelled") == 0, "work %d: %d, \"%s\"", which,
              status, error.message);
        CHECK(polls == 1 && !plan && heap.live == 0, "work %d: %d polls, %lld bytes kept", which, polls,
              (long long)heap.live);
    }
    cmb_plan_free(made);
    free(work.cluster);
    free(offset);
    free(item);
    free(none);
}

int main(int argc, char **argv) {
    const test_case tests[] = {
        TEST(test_check_refuses),
        TEST(test_damaged_plans),
        TEST(test_rows_without_a_name),
        TEST(test_cancelled),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

// SPDX-License-Identifier: Apache-2.0
/* cmb_select: what it refuses, and every allocation failing in turn. tests/test_select.py judges what it chooses. And
 * the logits by which a decoder chooses. */
#include "factorizations.h"
#include "runtime/memory.h"
#include "tile/stages.h"

enum { L = 40, D = 4, BLOCK = 16, K = 3 };

typedef struct {
    cmb_plan *plan;
    float query[2 * L * D], region_key[2 * L * D];
    int64_t regions[(L + BLOCK - 1) / BLOCK * K];
    uint8_t key_mask[L];
    cmb_scoring scoring;
} scored;

/* Two query heads of one key head. */
static void prepare(scored *s, kind k) {
    s->plan = make(&(factorization){k, L, 4, true, false});
    for (int n = 0; n < 2 * L * D; n++) {
        s->query[n] = (float)uniform(-1, 1);
        s->region_key[n] = (float)uniform(-1, 1);
    }
    memset(s->key_mask, 1, sizeof s->key_mask);
    s->scoring = (cmb_scoring){
        .dtype = CMB_FLOAT32,
        .B = 1,
        .Hq = 2,
        .Hk = 1,
        .L = L,
        .D = D,
        .scale = 1,
        .plan = (const cmb_plan *const *)&s->plan,
        .plans = 1,
        .query = {s->query, 2, 0, L * D, D},
        .region_key = {s->region_key, 1, 0, 0, D},
        .key_mask = s->key_mask,
        .mask_row = 1,
        .block = BLOCK,
        .k = K,
        .regions = s->regions,
    };
}

static cmb_status use(void *context) {
    cmb_error error = {0};
    const cmb_status status = cmb_select(context, NULL, &error);
    CHECK(status == error.status);
    return status;
}

static void test_failing_memory(void) {
    for (kind k = FIXED; k <= TREE2; k++) {
        scored s;
        prepare(&s, k);
        fail_each_allocation(use, &s.scoring);
        cmb_plan_free(s.plan);
    }
}

/* A region that only masked positions lie below is not chosen. */
static void test_masked_regions(void) {
    scored s;
    prepare(&s, FIXED);
    memset(s.key_mask, 0, 4);
    CHECK(cmb_select(&s.scoring, NULL, NULL) == CMB_OK);
    for (size_t n = 0; n < sizeof s.regions / sizeof *s.regions; n++)
        CHECK(s.regions[n] != 0 && s.regions[n] >= -1 && s.regions[n] < s.plan->R);
    cmb_plan_free(s.plan);
}

static void refuse(const cmb_scoring *scoring, const char *message) {
    cmb_error error = {0};
    expect(cmb_select(scoring, NULL, &error), CMB_ERR_VALUE, NULL, &error, message);
}

static void test_refusals(void) {
    scored s;
    prepare(&s, FIXED);
    refuse(NULL, "problem is missing");
#define REFUSE(field, value, message) \
    do {                              \
        cmb_scoring bad = s.scoring;  \
        bad.field = value;            \
        refuse(&bad, message);        \
    } while (0)
    REFUSE(dtype, CMB_FLOAT16, "dtype must be CMB_FLOAT32 or CMB_FLOAT64, got 3");
    REFUSE(B, -1, "B must be between 0 and 9223372036854775807, got -1");
    REFUSE(D, 0, "D must be between 1 and 1024, got 0");
    REFUSE(block, 0, "block must be between 1 and 9223372036854775807, got 0");
    REFUSE(k, -1, "k must be between 0 and 2147483647, got -1");
    REFUSE(score, (cmb_score)2, "score must be between 0 and 1, got 2");
    REFUSE(Hk, 3, "Hq must be a multiple of Hk, got 2 and 3");
    REFUSE(plans, 2, "plans must be 1 or B * Hk, 1, got 2");
    REFUSE(L, L - 1, "plan 0 must be of length 39");
    REFUSE(regions, NULL, "regions is missing");
    cmb_plan_free(s.plan);
}

/* A choice among many regions looks for a cancel before each chunk: then the logits that are left are zeros. */
static void test_cancelled_logits(void) {
    enum { REGIONS = 1000 };
    static float query[D], key[REGIONS * D];
    int32_t region[REGIONS];
    double logit[REGIONS];
    const cmb_scratch_use use = {.isa = cmb_isa_current(), .D = D, .Dv = D};
    const cmb_plan plan = {.L = 1, .R = REGIONS};
    const cmb_head head = {.plan = &plan,
                           .L = 1,
                           .D = D,
                           .scale = 0.5,
                           .query = {.data = query, .row = D},
                           .region_key = {.data = key, .row = D}};
    cmb_cancel cancel;
    cmb_arena arena = {0};
    for (int n = 0; n < REGIONS * D; n++)
        key[n] = (float)random_below(9);
    for (int n = 0; n < D; n++)
        query[n] = (float)(1 + random_below(9));
    for (int n = 0; n < REGIONS; n++)
        region[n] = REGIONS - 1 - n;
    cmb_stages_f32()->scratch(&arena, &use, &cancel, 0);
    CHECK(cmb_arena_allocate(&arena, NULL) == CMB_OK);
    cmb_scratch *scratch = cmb_stages_f32()->scratch(&arena, &use, &cancel, 0);
    for (int is_cancelled = 0; is_cancelled < 2; is_cancelled++) {
        cmb_cancel_init(&cancel, NULL);
        atomic_store(&cancel.stop, is_cancelled);
        cmb_stages_f32()->region_logits(&head, 0, REGIONS, region, logit, scratch);
        for (int n = 0; n < REGIONS; n++) {
            double expected = 0;
            for (int d = 0; d < D; d++)
                expected += 0.5 * (double)query[d] * (double)key[region[n] * D + d];
            CHECK(logit[n] == (is_cancelled ? 0 : expected), "%g, expected %g", logit[n], expected);
        }
    }
    cmb_release(arena.base);
}

int main(int argc, char **argv) {
    const test_case tests[] = {
        TEST(test_refusals),
        TEST(test_masked_regions),
        TEST(test_failing_memory),
        TEST(test_cancelled_logits),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

// SPDX-License-Identifier: Apache-2.0
/* The errors of cmb_forward and cmb_backward, and the memory that they take. */
#include "definition.h"

static void expect(const fixture *f, bool is_backward, cmb_status status, const char *words) {
    cmb_error error = {0};
    const cmb_status got =
        is_backward ? cmb_backward(&f->problem, &f->gradients, NULL, &error) : cmb_forward(&f->problem, NULL, &error);
    CHECK(got == status, "%d, not %d: \"%s\" for \"%s\"", got, status, error.message, words);
    CHECK(error.status == status && strstr(error.message, words), "\"%s\" for \"%s\"", error.message, words);
    CHECK(is_backward ? cmb_backward(&f->problem, &f->gradients, NULL, NULL) == status
                      : cmb_forward(&f->problem, NULL, NULL) == status);
}

/* Changes a good problem, expects an error with these words, and undoes the change. */
#define WRONG(is_backward, status, words, ...)           \
    do {                                                 \
        const fixture good_ = *f;                        \
        __VA_ARGS__;                                     \
        expect(f, is_backward, CMB_ERR_##status, words); \
        *f = good_;                                      \
    } while (0)

static void wrong_arguments(void) {
    request asked = small;
    asked.Hq = 4;
    asked.Hk = 2;
    asked.given_query = true;
    asked.given_key = 2;
    fixture *f = new_staged_fixture(asked);
    cmb_problem *p = &f->problem;
    cmb_gradients *g = &f->gradients;
    void *before[ARRAYS];
    CASE("wrong arguments");
    for (int i = 0; i < f->blocks; i++) {
        before[i] = zeros(f->block[i].bytes, 1);
        memcpy(before[i], f->block[i].memory, f->block[i].bytes);
    }

    WRONG(false, VALUE, "dtype must be between 0 and 3, got 7", memset(&p->dtype, 0, sizeof p->dtype);
          memset(&p->dtype, 7, 1));
    WRONG(false, VALUE, "stages must be 1, 2 or 3, got 0", memset(&p->stages, 0, sizeof p->stages));
    WRONG(false, VALUE, "stages must be 1, 2 or 3, got 4", memset(&p->stages, 0, sizeof p->stages);
          memset(&p->stages, 4, 1));
    WRONG(false, VALUE, "B must be between 0 and 9223372036854775807, got -1", p->B = -1);
    WRONG(false, VALUE, "Hq must be", p->Hq = -4);
    WRONG(false, VALUE, "Hk must be", p->Hk = -2);
    WRONG(false, VALUE, "L must be between 0 and", p->L = -1);
    WRONG(false, VALUE, "components must be at least 0, got -1", p->components = -1);
    WRONG(false, VALUE, "dropout_p must be between 0 and 1, got -0.5", p->dropout_p = -0.5);
    WRONG(false, VALUE, "dropout_p must be between 0 and 1, got 1.5", p->dropout_p = 1.5);
    WRONG(false, VALUE, "dropout_p must be between 0 and 1, got", p->dropout_p = NAN);
    const int64_t late[] = {1, asked.L}, short_of[] = {0, asked.L - 1}, down[] = {0, 3, 2, asked.L};
    WRONG(false, VALUE, "segments must be between 0 and 2^31 - 1, got -1", p->segment = late; p->segments = -1);
    WRONG(false, VALUE, "and not decrease, got 1 at 0", p->segment = late; p->segments = 1);
    WRONG(false, VALUE, "segment must run from 0 to 23 and not decrease, got 22 at 1", p->segment = short_of;
          p->segments = 1);
    WRONG(false, VALUE, "and not decrease, got 2 at 2", p->segment = down; p->segments = 3);
    WRONG(false, VALUE, "and not decrease, got 0 at 0", p->segment = short_of; p->segments = 0);
    WRONG(false, VALUE, "L must be between 0 and", p->L = INT64_C(1) << 31);
    WRONG(false, OVERFLOW, "B and Hq must be at most 2^32 with dropout", p->dropout_p = 0.5;
          p->B = (INT64_C(1) << 32) + 1);
    const int64_t nothing[] = {0, 0, 0};
    WRONG(false, OVERFLOW, "heads of 2 segments do not fit in 64 bits", p->L = 0; p->segment = nothing; p->segments = 2;
          p->B = INT64_MAX / 4);
    WRONG(false, VALUE, "out is written and must not have rows that overlap", p->out.row = 0);
    WRONG(false, VALUE, "lse is written and", p->lse.head = 3);
    WRONG(false, VALUE, "summary_value is written and", p->summary_value.row = -2);
    WRONG(true, VALUE, "gradient of query is written and", g->query.head = g->query.row);
    WRONG(true, VALUE, "gradient of region_key is written and", g->region_key.row = 0);
    CHECK(cmb_forward(NULL, NULL, NULL) == CMB_ERR_VALUE && cmb_backward(NULL, g, NULL, NULL) == CMB_ERR_VALUE);
    CHECK(cmb_backward(p, NULL, NULL, NULL) == CMB_ERR_VALUE &&
          cmb_cluster(NULL, 0, 0, true, NULL, NULL) == CMB_ERR_VALUE);
    WRONG(false, VALUE, "D must be between 1 and 1024, got 0", p->D = 0);
    WRONG(false, VALUE, "D must be between 1 and 1024, got 1025", p->D = 1025);
    WRONG(false, VALUE, "Dv must be between 1 and 1024, got 0", p->Dv = 0);
    WRONG(false, VALUE, "Dv must be between 1 and 1024, got 1025", p->Dv = 1025);
    WRONG(false, VALUE, "query heads must be a multiple of key heads, got 4 and 3", p->Hk = 3);
    WRONG(false, VALUE, "query heads must be a multiple of key heads, got 4 and 0", p->Hk = 0);
    WRONG(false, VALUE, "scale must be finite, got nan", p->scale = NAN);
    WRONG(false, VALUE, "scale must be finite, got inf", p->scale = INFINITY);
    WRONG(false, OVERFLOW, "B * Hq * L", p->B = INT64_MAX);
    WRONG(false, OVERFLOW, "B * Hk does not", p->B = p->Hk = INT64_C(1) << 40; p->Hq = 0);
    WRONG(false, VALUE, "plans must be 1 or B * Hk = 2, for each of 1 segments, got 3", p->plans = 3);
    WRONG(false, VALUE, "plans must be 1 or B * Hk = 2, for each of 1 segments, got 0", p->plans = 0);
    WRONG(false, VALUE, "plan must be of length 22, got 23", p->L = 22);
    WRONG(false, VALUE, "plan is missing", p->plan = NULL);
    WRONG(true, VALUE, "plan is missing", p->plan = NULL);

    static const struct {
        const char *name;
        size_t offset;
        bool optional;
    } arrays[] = {
        {"query", offsetof(cmb_problem, query), false},
        {"key", offsetof(cmb_problem, key), false},
        {"value", offsetof(cmb_problem, value), false},
        {"region_query", offsetof(cmb_problem, region_query), true},
        {"region_key", offsetof(cmb_problem, region_key), true},
        {"summary_key", offsetof(cmb_problem, summary_key), true},
        {"summary_value", offsetof(cmb_problem, summary_value), true},
        {"summary_lse", offsetof(cmb_problem, summary_lse), true},
        {"summary_softmax", offsetof(cmb_problem, summary_softmax), true},
        {"out", offsetof(cmb_problem, out), false},
        {"lse", offsetof(cmb_problem, lse), true},
        {"softmax", offsetof(cmb_problem, softmax), true},
    };
    for (size_t n = 0; n < sizeof arrays / sizeof *arrays; n++) {
        cmb_array *a = (cmb_array *)(void *)((char *)p + arrays[n].offset);
        char words[64];
        if (!arrays[n].optional) {
            snprintf(words, sizeof words, "%s is missing", arrays[n].name);
            WRONG(false, VALUE, words, a->data = NULL);
        }
        snprintf(words, sizeof words, "%s must have ", arrays[n].name);
        WRONG(false, VALUE, words, a->heads = 7);
        snprintf(words, sizeof words, "%s spans more than can be addressed", arrays[n].name);
        WRONG(false, OVERFLOW, words, a->row = INT64_MAX / 4);
        WRONG(false, OVERFLOW, words, a->row = INT64_MIN);
        WRONG(false, OVERFLOW, words, a->head = INT64_MIN / 4);
        WRONG(false, OVERFLOW, words, p->B = 3; a->batch = INT64_MAX / 4; p->plans = 1);
    }

    p->stages = CMB_SUMMARIZE;
    WRONG(false, VALUE, "summary_key is missing", p->summary_key.data = NULL);
    WRONG(false, VALUE, "summary_value is missing", p->summary_value.data = NULL);
    WRONG(true, VALUE, "summary_softmax is missing", p->summary_softmax.data = NULL);
    WRONG(true, VALUE, "gradient of summary_key must have", g->summary_key.heads = 3);
    WRONG(true, VALUE, "gradient of summary_key must have", p->summary_key.data = NULL; p->summary_key.heads = 0;
          g->summary_key.heads = 0);
    WRONG(true, VALUE, "gradient of summary_key must have", p->summary_key.data = NULL; p->summary_key.heads = 3;
          g->summary_key.heads = 3);
    WRONG(true, VALUE, "gradient of summary_value must have", g->summary_value.heads = 2);
    WRONG(true, VALUE, "gradient of region_query is missing", g->region_query.data = NULL);
    WRONG(true, VALUE, "gradient of region_key is missing", g->region_key.data = NULL);
    WRONG(true, VALUE, "gradient of region_key must have 2 heads, got 4", g->region_key.heads = 4);
    p->stages = CMB_ATTEND;
    WRONG(false, VALUE, "summary_key is missing", p->summary_key.data = NULL);
    WRONG(false, VALUE, "summary_value is missing", p->summary_value.data = NULL);
    WRONG(true, VALUE, "gradient of summary_key is missing", g->summary_key.data = NULL);
    WRONG(true, VALUE, "gradient of summary_value is missing", g->summary_value.data = NULL);
    p->stages = CMB_BOTH;
    WRONG(true, VALUE, "summary_value is missing", p->summary_value.data = NULL);
    WRONG(true, VALUE, "summary_softmax is missing", p->summary_softmax.data = NULL);
    WRONG(true, VALUE, "softmax is missing", p->softmax.data = NULL);
    WRONG(true, VALUE, "gradient of out is missing", g->out.data = NULL);
    WRONG(true, VALUE, "gradient of lse must have 4 heads, got 2", g->lse.heads = 2);
    WRONG(true, VALUE, "gradient of query is missing", g->query.data = NULL);
    WRONG(true, VALUE, "gradient of key is missing", g->key.data = NULL);
    WRONG(true, VALUE, "gradient of value is missing", g->value.data = NULL);
    WRONG(true, OVERFLOW, "gradient of query spans more than can be addressed", g->query.row = INT64_MAX / 4);

    for (int i = 0; i < f->blocks; i++) {
        CHECK(memcmp(before[i], f->block[i].memory, f->block[i].bytes) == 0, "an error wrote to array %d", i);
        free(before[i]);
    }
    free_fixture(f);
}

/* Plans of one call must agree in everything but their lists. Each key head may have a plan of its own. */
static void plans(void) {
    request asked = small;
    asked.B = 1;
    asked.Hq = 4;
    asked.Hk = 2;
    CASE("plans");
    fixture *f = new_fixture(asked);
    request other = asked;
    const cmb_plan *pair[2] = {f->plan, NULL};
    f->problem.plan = pair;
    f->problem.plans = 2;
    expect(f, false, CMB_ERR_VALUE, "plan is missing");
    for (int n = 0; n < 3; n++) {
        other = asked;
        if (n == 0)
            other.options.is_causal = true;
        else if (n == 1)
            other.options.pooling = CMB_POOL_SUM;
        else
            other.options.size_bias = true;
        cmb_plan *wrong = new_plan(&other);
        pair[1] = wrong;
        expect(f, false, CMB_ERR_VALUE, "must agree");
        cmb_plan_free(wrong);
    }
    other = asked;
    other.L = asked.L - 1;
    cmb_plan *wrong = new_plan(&other);
    pair[1] = wrong;
    expect(f, false, CMB_ERR_VALUE, "plan must be of length 23, got 22");
    cmb_plan_free(wrong);

    other = asked;
    other.pattern = LOGSPARSE; /* has more regions than the first plan */
    fixture *alone = new_fixture(other), *whole = new_fixture(asked);
    pair[1] = alone->plan;
    const int64_t R = alone->plan->R;
    f->problem.summary_value.data = f->problem.summary_lse.data = f->problem.summary_softmax.data = NULL;
    forward(f);
    forward(whole);
    forward(alone);
    CHECK(R > f->plan->R);
    for (int64_t h = 0; h < 4; h++)
        for (int64_t x = 0; x < asked.L; x++) {
            const fixture *right = h < 2 ? whole : alone;
            CHECK(memcmp(element(f, &f->problem.out, 0, h, x, 0), element(right, &right->problem.out, 0, h, x, 0),
                         (size_t)asked.Dv * f->size) == 0,
                  "head %lld row %lld", (long long)h, (long long)x);
        }
    free_fixture(f);
    free_fixture(alone);
    free_fixture(whole);
}

/* A slice attends its queries alone, with the bits that they have among all, and takes given summaries alone. */
static void slices(void) {
    request asked = small;
    asked.B = 2;
    asked.Hq = 4;
    asked.Hk = 2;
    asked.masked = asked.sink = true;
    asked.options.is_causal = true;
    CASE("slices");
    fixture *whole = new_staged_fixture(asked), *f = new_staged_fixture(asked);
    cmb_problem *p = &f->problem;
    cmb_gradients *g = &f->gradients;
    const int64_t first = 5, count = 9;
    cmb_plan *own[2] = {NULL};
    whole->problem.stages = CMB_SUMMARIZE;
    forward(whole);
    whole->problem.stages = CMB_ATTEND;
    forward(whole);
    backward(whole);
    for (int n = 0; n < 2; n++)
        CHECK(cmb_plan_slice(f->plan, first + n, count, NULL, &own[n], NULL) == CMB_OK);
    const cmb_plan *pair[4] = {own[0], own[0], own[0], own[1]};
    p->plan = pair;
    p->summary_key = whole->problem.summary_key;
    p->summary_value = whole->problem.summary_value;
    p->query.data = element(f, &p->query, 0, 0, first, 0);
    g->out.data = element(f, &g->out, 0, 0, first, 0);
    g->lse.data = element(f, &g->lse, 0, 0, first, 0);
    WRONG(false, VALUE, "plan must be whole, unless it attends given summaries", p->stages = CMB_BOTH);
    p->stages = CMB_ATTEND;
    WRONG(true, VALUE, "plans of one call must have the same queries", p->plans = 4);
    p->segment = (const int64_t[]){0, asked.L}; /* a sequence and its one segment are the same */
    p->segments = 1;
    int64_t from = first, some = count;
    cmb_queries_of_plan(p, 0, &from, &some);
    CHECK(from == first && some == count);
    forward(f);
    backward(f);
    for (int64_t b = 0; b < asked.B; b++)
        for (int64_t h = 0; h < asked.Hq; h++)
            for (int64_t x = 0; x < count; x++) {
                CHECK(memcmp(element(f, &p->out, b, h, x, 0), element(whole, &whole->problem.out, b, h, first + x, 0),
                             (size_t)asked.Dv * f->size) == 0);
                CHECK(get(f, &p->lse, b, h, x, 0) == get(whole, &whole->problem.lse, b, h, first + x, 0));
                for (int64_t d = 0; d < asked.D; d++)
                    CHECK(get(f, &g->query, b, h, x, d) == get(whole, &whole->gradients.query, b, h, first + x, d));
            }
    for (int n = 0; n < 2; n++)
        cmb_plan_free(own[n]);
    free_fixture(f);
    free_fixture(whole);
}

/* A call takes as much memory as cmb_workspace_bytes says, before its first store, and releases it. If there is not
 * enough memory, nothing is written. */
static void memory(void) {
    for (int which = DENSE; which < PATTERNS; which++)
        for (int is_backward = 0; is_backward < 2; is_backward++)
            for (int is_large = 0; is_large < 2; is_large++) {
                request asked = is_large ? large((pattern)which) : small;
                asked.pattern = (pattern)which;
                fixture *f = new_fixture(asked);
                test_heap heap = {0};
                size_t bytes = 0;
                bool done = false;
                CASE("memory of pattern %d backward %d large %d", which, is_backward, is_large);
                forward(f);
                if (!is_backward) /* makes every store visible */
                    memset(f->problem.out.data, 0x5a, (size_t)(asked.B * f->problem.out.batch) * f->size);
                CHECK(cmb_workspace_bytes(&f->problem, is_backward, &bytes, NULL) == CMB_OK);
                test_heap_use(&heap);
                for (int64_t k = 1; !done; k++)
                    for (int forever = 0; forever < 2; forever++) {
                        void *before[ARRAYS];
                        for (int i = 0; i < f->blocks; i++) {
                            before[i] = zeros(f->block[i].bytes, 1);
                            memcpy(before[i], f->block[i].memory, f->block[i].bytes);
                        }
                        cmb_error error = {0};
                        heap.calls = 0;
                        heap.peak = 0;
                        heap.fail = k;
                        heap.forever = forever;
                        const cmb_status status = is_backward ? cmb_backward(&f->problem, &f->gradients, NULL, &error)
                                                              : cmb_forward(&f->problem, NULL, &error);
                        CHECK(heap.live == 0, "%lld bytes are lost: %s", (long long)heap.live, context);
                        done = status == CMB_OK;
                        CHECK(done || (status == CMB_ERR_MEMORY && strstr(error.message, "no memory")), "%s", context);
                        CHECK(!done || (size_t)heap.peak == bytes, "%lld bytes, not %zu: %s", (long long)heap.peak,
                              bytes, context);
                        for (int i = 0; i < f->blocks; i++) {
                            CHECK(done || memcmp(before[i], f->block[i].memory, f->block[i].bytes) == 0,
                                  "array %d was written: %s", i, context);
                            free(before[i]);
                        }
                    }
                test_heap_use(NULL);
                if (!is_large) {
                    backward(f);
                    check_results(f);
                }
                free_fixture(f);
            }
}

/* The workspace does not grow with L times L. */
static void workspace(void) {
    request asked = large(FIXED);
    size_t bytes[2];
    for (int n = 0; n < 2; n++) {
        asked.L = 4096 << n;
        asked.span = 64;
        fixture *f = new_fixture(asked);
        CHECK(cmb_workspace_bytes(&f->problem, true, &bytes[n], NULL) == CMB_OK);
        free_fixture(f);
    }
    CHECK(bytes[1] < 2 * bytes[0], "%zu, then %zu", bytes[0], bytes[1]);
    cmb_error error = {0};
    fixture *f = new_fixture(asked);
    f->problem.D = 0;
    CHECK(cmb_workspace_bytes(&f->problem, true, &bytes[0], &error) == CMB_ERR_VALUE && error.message[0] == 'D');
    free_fixture(f);
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(wrong_arguments), TEST(plans), TEST(slices), TEST(memory), TEST(workspace),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

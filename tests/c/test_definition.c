// SPDX-License-Identifier: Apache-2.0
/* cmb_forward and cmb_backward against the definition: every pattern and option, masks and poison, one stage at a time.
 */
#include "definition.h"

static void every_pattern(void) {
    static const int64_t lengths[] = {1, 2, 3, 4, 5, 16, 17, 31, 67}, dims[][2] = {{8, 5}, {1, 1}, {59, 64}, {17, 33}};
    int n = 0;
    for (int which = DENSE; which < PATTERNS; which++)
        for (int causal = 0; causal < 2; causal++)
            for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
                for (int dtype = 0; dtype < 2; dtype++) {
                    request asked = small;
                    asked.pattern = (pattern)which;
                    asked.span = 1 + n % 7;
                    asked.options.is_causal = causal;
                    asked.options.pooling = (cmb_pooling)(n % 3);
                    asked.options.size_bias = n / 3 % 2;
                    asked.options.sparse = n % 11 == 10;
                    asked.dtype = (cmb_dtype)dtype;
                    asked.L = lengths[l];
                    asked.D = dims[n % 4][0];
                    asked.Dv = dims[n % 4][1];
                    CHECK(cmb_set_isa(cmb_isa_name(n % cmb_isa_count()), NULL) == CMB_OK);
                    check_against_definition(asked);
                    n++;
                }
    CHECK(cmb_set_isa(cmb_isa_name(cmb_isa_count() - 1), NULL) == CMB_OK);
}

/* Batches, groups of query heads, masks and given abstractions, in every combination. */
static void every_option(void) {
    for (int which = FIXED; which < PATTERNS; which++)
        for (int options = 0; options < 64; options++) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.options.is_causal = options & 1;
            asked.masked = options >> 1 & 1;
            asked.given_query = options >> 2 & 1;
            asked.Hq = options & 8 ? 4 : 2;
            asked.Hk = 2;
            asked.given_key = options >> 4 == 1 ? asked.Hk : options >> 4 == 2 ? asked.Hq : 0;
            asked.options.size_bias = options >> 4 == 3;
            asked.options.pooling = (cmb_pooling)(options % 3);
            asked.dtype = (cmb_dtype)(options / 2 % 2);
            asked.B = 1 + options % 2;
            check_against_definition(asked);
        }
}

/* Softcap, biases of keys and of regions, and sinks, in every combination. */
static void every_term(void) {
    for (int which = DENSE; which < PATTERNS; which++)
        for (int terms = 1; terms < 64; terms++) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.B = 1 + terms % 2;
            asked.Hq = 4;
            asked.Hk = 2;
            asked.dtype = (cmb_dtype)(terms / 2 % 2);
            asked.options.is_causal = terms % 3 > 0;
            asked.options.pooling = (cmb_pooling)(terms % 3);
            asked.options.size_bias = terms % 7 == 0;
            asked.masked = terms % 5 == 0;
            asked.softcap = terms & 1;
            asked.sink = terms & 2;
            asked.key_bias = terms & 4 ? asked.Hk : terms & 8 ? asked.Hq : 0;
            asked.region_bias = terms & 16 ? asked.Hk : terms & 32 ? asked.Hq : 0;
            CHECK(cmb_set_isa(cmb_isa_name(terms % cmb_isa_count()), NULL) == CMB_OK);
            check_against_definition(asked);
        }
    CHECK(cmb_set_isa(cmb_isa_name(cmb_isa_count() - 1), NULL) == CMB_OK);
}

/* A query without a key to attend gets zeros, an lse of -inf and no gradient. Masked keys and values are never read. */
static void masked_and_poisoned(void) {
    for (int which = DENSE; which < PATTERNS; which++)
        for (int dtype = 0; dtype < 2; dtype++) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.dtype = (cmb_dtype)dtype;
            asked.options.is_causal = true;
            asked.masked = true;
            fixture *clean = new_fixture(asked), *poisoned = new_fixture(asked);
            CASE("poison in pattern %d dtype %d", which, dtype);
            for (int64_t j = 0; j < asked.L; j++) {
                clean->mask[j] = poisoned->mask[j] = j > 5 && j % 3;
                for (int64_t d = 0; d < asked.D && !clean->mask[j]; d++)
                    put(poisoned, &poisoned->problem.key, 0, 0, j, d, d % 2 ? NAN : INFINITY);
                for (int64_t d = 0; d < asked.Dv && !clean->mask[j]; d++)
                    put(poisoned, &poisoned->problem.value, 0, 0, j, d, d % 2 ? NAN : -INFINITY);
            }
            forward(clean);
            backward(clean);
            check_results(clean);
            forward(poisoned);
            backward(poisoned);
            check_same_results(clean, poisoned);
            for (int64_t i = 0; i <= 5; i++) {
                CHECK(get(clean, &clean->problem.lse, 0, 0, i, 0) == -INFINITY, "%s", context);
                for (int64_t d = 0; d < asked.Dv; d++)
                    CHECK(get(clean, &clean->problem.out, 0, 0, i, d) == 0, "%s", context);
                for (int64_t d = 0; d < asked.D; d++)
                    CHECK(get(clean, &clean->gradients.query, 0, 0, i, d) == 0, "%s", context);
            }
            free_fixture(clean);
            free_fixture(poisoned);
        }
}

/* A NaN value reaches the queries that attend it, directly or through a region, and changes no other bit. */
static void poison_stays(void) {
    for (int which = DENSE; which < PATTERNS; which++)
        for (int64_t at = 0; at < small.L; at += 5) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.dtype = CMB_FLOAT32;
            asked.options.is_causal = true;
            fixture *clean = new_fixture(asked), *poisoned = new_fixture(asked);
            CASE("NaN value %lld in pattern %d", (long long)at, which);
            put(poisoned, &poisoned->problem.value, 0, 0, at, 2, NAN);
            forward(clean);
            forward(poisoned);
            for (int64_t i = 0; i < asked.L; i++)
                for (int64_t d = 0; d < asked.Dv; d++) {
                    const bool attends = i >= at && (which != WINDOW || i - at < asked.span);
                    const double was = get(clean, &clean->problem.out, 0, 0, i, d);
                    const double is = get(poisoned, &poisoned->problem.out, 0, 0, i, d);
                    CHECK(attends && d == 2 ? is != is : is == was, "out %lld, %lld: %s", (long long)i, (long long)d,
                          context);
                }
            free_fixture(clean);
            free_fixture(poisoned);
        }
}

static void empty(void) {
    static const int64_t sizes[][4] = {{0, 2, 2, 5}, {1, 0, 0, 5}, {1, 0, 2, 5}, {2, 2, 1, 0}, {0, 0, 0, 0}};
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++)
        for (int which = DENSE; which < PATTERNS; which++) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.B = sizes[n][0];
            asked.Hq = sizes[n][1];
            asked.Hk = sizes[n][2];
            asked.L = sizes[n][3];
            CASE("empty %zu pattern %d", n, which);
            fixture *f = new_fixture(asked);
            forward(f);
            /* without a query head, the gradients of keys are not written */
            backward(f);
            free_fixture(f);
        }
}

/* SUMMARIZE, then ATTEND: forward the bits of BOTH, backward gradients that add up to the definition's. */
static void stages(void) {
    for (int which = FIXED; which < PATTERNS; which++)
        for (int options = 0; options < 24; options++) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.B = 2;
            asked.Hq = 4;
            asked.Hk = 2;
            asked.dtype = (cmb_dtype)(options & 1);
            asked.options.is_causal = options >> 1 & 1;
            asked.options.pooling = (cmb_pooling)(options % 3);
            asked.masked = options >> 2 & 1;
            asked.given_query = options >> 3;
            asked.given_key = options >> 3 == 0 ? 0 : options >> 3 == 1 ? asked.Hk : asked.Hq;
            asked.summary_key = options & 4 || asked.given_key == asked.Hq ? asked.Hq : asked.Hk;
            CASE("stages of pattern %d options %d", which, options);
            fixture *both = new_fixture(asked), *attend = new_staged_fixture(asked),
                    *summarize = new_staged_fixture(asked);
            cmb_problem *p = &attend->problem, *q = &summarize->problem;
            cmb_gradients *g = &attend->gradients, *k = &summarize->gradients;
            forward(both);
            q->stages = CMB_SUMMARIZE;
            q->out.data = q->lse.data = q->softmax.data = NULL;
            forward(summarize);
            p->stages = CMB_ATTEND;
            p->region_query.data = p->region_key.data = p->summary_lse.data = p->summary_softmax.data = NULL;
            p->summary_key = q->summary_key;
            p->summary_value = q->summary_value;
            forward(attend);
            p->summary_lse = q->summary_lse;
            p->summary_softmax = q->summary_softmax;
            check_same_forward(both, attend);
            p->summary_lse.data = p->summary_softmax.data = NULL;

            backward(attend);
            k->summary_key = g->summary_key;
            k->summary_value = g->summary_value;
            backward(summarize);
            add_arrays(attend, &g->query, summarize, &k->query, asked.L, asked.D);
            add_arrays(attend, &g->key, summarize, &k->key, asked.L, asked.D);
            add_arrays(attend, &g->value, summarize, &k->value, asked.L, asked.Dv);
            g->region_query = k->region_query;
            g->region_key = k->region_key;
            p->summary_lse = q->summary_lse;
            p->region_query = q->region_query;
            p->region_key = q->region_key;
            check_results(attend);
            free_fixture(both);
            free_fixture(attend);
            free_fixture(summarize);
        }
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(every_pattern), TEST(every_option), TEST(every_term), TEST(masked_and_poisoned),
        TEST(poison_stays),  TEST(empty),        TEST(stages),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

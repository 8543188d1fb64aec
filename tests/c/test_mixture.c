// SPDX-License-Identifier: Apache-2.0
/* A mixture is its components' mean, and refuses what it has not. What belongs to one component, and the output, have
 * the mean's bits. The gradients of query, key and value are one sum over all components, in another order. */
#include "problems.h"

#include <float.h>

/* Rows of a region axis from `first` on. */
static cmb_array regions_from(const fixture *f, cmb_array array, int64_t first) {
    if (array.data)
        array.data = element(f, &array, 0, 0, 0, 0) + first * array.row * (int64_t)f->size;
    return array;
}

/* The features of a row from `first` on. */
static cmb_array features_from(const fixture *f, cmb_array array, int64_t first) {
    array.data = (char *)array.data + first * (int64_t)f->size;
    return array;
}

static void divide(const fixture *f, const cmb_array *a, int64_t rows, int64_t dim, double by) {
    for (int64_t b = 0; a->data && b < f->asked.B; b++)
        for (int64_t h = 0; h < a->heads; h++)
            for (int64_t x = 0; x < rows; x++)
                for (int64_t d = 0; d < dim; d++)
                    put(f, a, b, h, x, d, get(f, a, b, h, x, d) / by);
}

enum { COMPONENTS = 3 };

/* Checks that two arrays differ by no more than two orders of the same sums do. A row's gradient has one term at most
 * for each position and each region, each rounded by the size of the sum so far, for which the largest result stands.
 */
static void check_close(const fixture *f, const cmb_array *a, const fixture *g, const cmb_array *b, int64_t rows,
                        int64_t dim, const char *name) {
    const double rounding = (f->size == sizeof(float) ? (double)FLT_EPSILON : DBL_EPSILON) * 2 * (double)rows;
    double most = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t n = 0; n < f->asked.B; n++)
            for (int64_t h = 0; h < a->heads; h++)
                for (int64_t x = 0; x < rows; x++)
                    for (int64_t d = 0; d < dim; d++) {
                        const double got = get(f, a, n, h, x, d), want = get(g, b, n, h, x, d);
                        most = fmax(most, fabs(want));
                        CHECK(pass == 0 || fabs(got - want) <= rounding * most,
                              "%s of batch %lld head %lld, %lld, %lld is %.17g, not %.17g: %s", name, (long long)n,
                              (long long)h, (long long)x, (long long)d, got, want, context);
                    }
}

/* The problem of a mixture, with arrays for the regions of all components, `R` together. */
static fixture *new_mixture(request asked, const cmb_plan *const plan[COMPONENTS], int64_t R) {
    fixture *f = new_fixture(asked);
    cmb_problem *p = &f->problem;
    cmb_gradients *g = &f->gradients;
    p->components = p->plans = COMPONENTS;
    p->plan = plan;
    if (asked.given_query) {
        p->region_query = new_input(f, asked.Hq, R, asked.D);
        g->region_query = new_array(f, asked.Hq, R, asked.D);
    }
    if (asked.given_key) {
        p->region_key = new_input(f, asked.given_key, R, asked.D);
        g->region_key = new_array(f, asked.given_key, R, asked.D);
    }
    p->summary_key = asked.given_key ? (cmb_array){0} : new_array(f, asked.Hq, R, asked.D);
    p->summary_value = new_array(f, asked.Hq, R, asked.Dv);
    p->summary_lse = new_array(f, asked.Hq, R, 1);
    p->summary_softmax = new_array(f, asked.Hq, R, 2);
    p->softmax = new_array(f, asked.Hq, asked.L, COMPONENTS * 2);
    p->component_out = new_array(f, asked.Hq, asked.L, COMPONENTS * asked.Dv);
    p->lse.data = g->lse.data = NULL;
    return f;
}

/* A component of `whole` alone, whose regions begin at row `first`, has its bits in the mixture; then its results
 * become terms of the mean. */
static void check_component(const fixture *whole, fixture *alone, int64_t n, int64_t first) {
    const cmb_problem *m = &whole->problem;
    const cmb_gradients *k = &whole->gradients;
    const int64_t L = m->L, R = alone->plan->R, D = m->D, Dv = m->Dv;
    cmb_problem *p = &alone->problem;
    cmb_gradients *g = &alone->gradients;
    p->query = m->query;
    p->key = m->key;
    p->value = m->value;
    p->key_mask = m->key_mask;
    p->region_query = regions_from(whole, m->region_query, first);
    p->region_key = regions_from(whole, m->region_key, first);
    g->out = k->out;
    g->lse.data = NULL;
    forward(alone);
    backward(alone);
    const cmb_array out = features_from(whole, m->component_out, n * Dv),
                    softmax = features_from(whole, m->softmax, n * 2), key = regions_from(whole, m->summary_key, first),
                    value = regions_from(whole, m->summary_value, first),
                    lse = regions_from(whole, m->summary_lse, first),
                    state = regions_from(whole, m->summary_softmax, first),
                    query_grad = regions_from(whole, k->region_query, first),
                    key_grad = regions_from(whole, k->region_key, first);
    divide(alone, &g->region_query, R, D, COMPONENTS);
    divide(alone, &g->region_key, R, D, COMPONENTS);
    check_same(alone, &p->out, whole, &out, L, Dv, "component_out");
    check_same(alone, &p->softmax, whole, &softmax, L, 2, "softmax");
    check_same(alone, &p->summary_key, whole, &key, R, D, "summary_key");
    check_same(alone, &p->summary_value, whole, &value, R, Dv, "summary_value");
    check_same(alone, &p->summary_lse, whole, &lse, R, 1, "summary_lse");
    check_same(alone, &p->summary_softmax, whole, &state, R, 2, "summary_softmax");
    check_same(alone, &g->region_query, whole, &query_grad, R, D, "gradient of region_query");
    check_same(alone, &g->region_key, whole, &key_grad, R, D, "gradient of region_key");
}

/* Whether out is added up or its terms are kept. */
static void mixtures(void) {
    static const int counts[] = {1, 3, 7}; /* of four key heads 3 threads share one, 7 share all */
    for (int which = DENSE; which < PATTERNS; which++)
        for (int options = 0; options < 6; options++) {
            request asked = large((pattern)which), other[COMPONENTS];
            asked.dtype = (cmb_dtype)(options & 1);
            asked.options.is_causal = options & 1;
            asked.masked = options >> 1 == 1;
            asked.given_query = options >> 1 == 2;
            asked.given_key = options >> 1 == 2 ? asked.Hk : 0;
            asked.positions_first = options & 1;
            CASE("pattern %d options %d", which, options);
            CHECK(cmb_set_num_threads(counts[options % 3], NULL) == CMB_OK);
            fixture *alone[COMPONENTS];
            const cmb_plan *plan[COMPONENTS];
            int64_t R = 0;
            for (int n = 0; n < COMPONENTS; n++) {
                other[n] = asked;
                other[n].pattern = (pattern)((which + 4 * n) % PATTERNS);
                alone[n] = new_fixture(other[n]);
                plan[n] = alone[n]->plan;
                R += plan[n]->R;
            }
            fixture *kept = new_mixture(asked, plan, R), *summed = new_mixture(asked, plan, R);
            summed->problem.component_out.data = NULL;
            forward(kept);
            forward(summed);
            check_same(kept, &kept->problem.out, summed, &summed->problem.out, asked.L, asked.Dv, "out");
            backward(kept);
            const struct {
                const cmb_array *term[COMPONENTS], *mean;
                int64_t dim;
            } means[] = {
#define TERMS(array) {&alone[0]->array, &alone[1]->array, &alone[2]->array}
                {TERMS(problem.out), &kept->problem.out, asked.Dv},
                {TERMS(gradients.query), &kept->gradients.query, asked.D},
                {TERMS(gradients.key), &kept->gradients.key, asked.D},
                {TERMS(gradients.value), &kept->gradients.value, asked.Dv},
#undef TERMS
            };
            for (int64_t n = 0, first = 0; n < COMPONENTS; first += plan[n++]->R)
                check_component(kept, alone[n], n, first);
            for (int k = 0; k < 4; k++) {
                const cmb_array *sum = means[k].term[0];
                for (int n = 1; n < COMPONENTS; n++)
                    add_arrays(alone[0], sum, alone[n], means[k].term[n], asked.L, means[k].dim);
                divide(alone[0], sum, asked.L, means[k].dim, COMPONENTS);
                (k == 0 ? check_same : check_close)(alone[0], sum, kept, means[k].mean, asked.L, means[k].dim, "mean");
            }
            for (int n = 0; n < COMPONENTS; n++)
                free_fixture(alone[n]);
            free_fixture(kept);
            free_fixture(summed);
        }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

/* Threads that share heads, by task and by tile, give the gradients of one thread: later components add to rows that
 * hold the sums of those before. */
static void shared_heads(void) {
    static const pattern by_task[] = {FIXED, LOGSPARSE, HIERARCHICAL}, by_tile[] = {WINDOW, DENSE, FIXED};
    for (int options = 0; options < 8; options++) {
        request asked = large(FIXED);
        asked.L = 1100; /* tasks for three threads */
        asked.dtype = (cmb_dtype)(options & 1);
        asked.masked = options >> 1 & 1;
        const pattern *which = options >> 2 ? by_tile : by_task;
        const cmb_plan *plan[COMPONENTS];
        int64_t R = 0;
        CASE("shared heads, options %d", options);
        for (int n = 0; n < COMPONENTS; n++) {
            request component = asked;
            component.pattern = which[n];
            plan[n] = new_plan(&component);
            R += plan[n]->R;
            CHECK(plan[n]->traits.sharing.by_task == (which[n] != WINDOW && which[n] != DENSE));
        }
        fixture *alone = new_mixture(asked, plan, R), *together = new_mixture(asked, plan, R);
        for (int threads = 1; threads <= 3; threads += 2) { /* of four key heads three threads share one */
            const fixture *f = threads == 1 ? alone : together;
            CHECK(cmb_set_num_threads(threads, NULL) == CMB_OK);
            forward(f);
            backward(f);
        }
        const cmb_gradients *a = &alone->gradients, *b = &together->gradients;
        check_same(alone, &a->query, together, &b->query, asked.L, asked.D, "gradient of query");
        check_same(alone, &a->key, together, &b->key, asked.L, asked.D, "gradient of key");
        check_same(alone, &a->value, together, &b->value, asked.L, asked.Dv, "gradient of value");
        for (int n = 0; n < COMPONENTS; n++)
            cmb_plan_free((cmb_plan *)plan[n]);
        free_fixture(alone);
        free_fixture(together);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

/* What a mixture must be given, and what it has not. */
static void wrong_mixtures(void) {
    request asked = small;
    fixture *alone = new_fixture(asked);
    const cmb_plan *plan[COMPONENTS] = {alone->plan, alone->plan, alone->plan};
    fixture *f = new_mixture(asked, plan, COMPONENTS * alone->plan->R);
    cmb_problem *p = &f->problem;
    cmb_gradients *g = &f->gradients;
    CASE("wrong mixtures");
    forward(f);
    backward(f);
#define WRONG(backward, status, words, ...)                                                                        \
    do {                                                                                                           \
        const fixture good_ = *f;                                                                                  \
        cmb_error error = {0};                                                                                     \
        __VA_ARGS__;                                                                                               \
        const cmb_status got = (backward) ? cmb_backward(p, g, NULL, &error) : cmb_forward(p, NULL, &error);       \
        CHECK(got == CMB_ERR_##status && strstr(error.message, words), "\"%s\" for \"%s\"", error.message, words); \
        *f = good_;                                                                                                \
    } while (0)
    WRONG(false, VALUE, "components must be at least 0, got -1", p->components = -1);
    WRONG(false, VALUE, "stages must be 3 for a mixture, got 1", p->stages = CMB_SUMMARIZE);
    WRONG(false, VALUE, "stages must be 3 for a mixture, got 2", p->stages = CMB_ATTEND);
    WRONG(false, VALUE, "for each of 1 segments of each component, got 2", p->plans = 2);
    WRONG(false, VALUE, "for each of 1 segments of each component, got 0", p->plans = 0);
    WRONG(false, VALUE, "lse must be absent for a mixture", p->lse = p->out);
    WRONG(true, VALUE, "gradient of lse must be absent for a mixture", g->lse = g->out);
    WRONG(true, VALUE, "component_out is missing", p->component_out.data = NULL);
    WRONG(true, VALUE, "softmax is missing", p->softmax.data = NULL);
    WRONG(false, VALUE, "component_out is written and must not have rows that overlap",
          p->component_out.row = asked.Dv);
    WRONG(false, VALUE, "softmax is written and must not have rows that overlap", p->softmax.row = 2);
    enum { LONG = 1 << 16, MANY = 1 << 15 };
    request longer = asked;
    longer.pattern = WINDOW;
    longer.L = LONG;
    cmb_plan *window = new_plan(&longer);
    const cmb_plan **many = zeros(MANY + 2, sizeof *many);
    for (int n = 0; n < MANY + 2; n++)
        many[n] = window;
    WRONG(false, OVERFLOW, "components must have at most 2^31 rows before the last one with dropout",
          p->dropout_p = 0.5;
          p->L = LONG; p->plan = many; p->components = p->plans = MANY + 2);
    WRONG(false, VALUE, "query is missing", p->dropout_p = 0.5; p->L = LONG; p->plan = many;
          p->components = p->plans = MANY + 1; p->query.data = NULL);
#undef WRONG
    free(many);
    cmb_plan_free(window);
    free_fixture(alone);
    free_fixture(f);
}

/* A call takes one block, for all components, of the size that cmb_workspace_bytes says, and writes nothing without it.
 */
static void memory(void) {
    fixture *alone = new_fixture(large(FIXED)), *other = new_fixture(large(HIERARCHICAL));
    const cmb_plan *plan[COMPONENTS] = {alone->plan, other->plan, alone->plan};
    fixture *f = new_mixture(large(FIXED), plan, 2 * alone->plan->R + other->plan->R);
    forward(f);
    for (int is_backward = 0; is_backward < 2; is_backward++) {
        const cmb_array *written = is_backward ? &f->gradients.query : &f->problem.out;
        const size_t size = (size_t)(f->asked.B * written->batch) * f->size;
        void *before = zeros(size, 1);
        test_heap heap = {.fail = 1};
        size_t bytes = 0;
        cmb_error error = {0};
        CASE("memory backward %d", is_backward);
        memset(written->data, 0x5a, size);
        memcpy(before, written->data, size);
        CHECK(cmb_workspace_bytes(&f->problem, is_backward, &bytes, NULL) == CMB_OK);
        for (int k = 0; k < 2; k++) {
            test_heap_use(&heap);
            const cmb_status status = is_backward ? cmb_backward(&f->problem, &f->gradients, NULL, &error)
                                                  : cmb_forward(&f->problem, NULL, &error);
            test_heap_use(NULL);
            CHECK(status == (k ? CMB_OK : CMB_ERR_MEMORY) && heap.live == 0, "%s", context);
            CHECK((memcmp(before, written->data, size) == 0) == (k == 0), "%s", context);
            CHECK(heap.calls == k + 1 && (k == 0 || (size_t)heap.peak == bytes), "%s", context);
        }
        free(before);
    }
    free_fixture(alone);
    free_fixture(other);
    free_fixture(f);
}

/* A poll ends the call in whichever component it is. */
static void cancelled(void) {
    request asked = large(WINDOW), longer;
    asked.B = 1;
    asked.L = 20000;
    longer = asked;
    longer.pattern = DENSE;
    cmb_plan *dense = new_plan(&longer), *window = new_plan(&asked);
    const cmb_plan *plan[COMPONENTS] = {window, dense, window};
    fixture *f = new_mixture(asked, plan, 0);
    CASE("cancelled mixture");
    memset(f->problem.softmax.data, 0, (size_t)f->problem.softmax.batch * f->size);
    for (int is_backward = 0; is_backward < 2; is_backward++) {
        poller state = {pthread_self(), 0, 2};
        const cmb_interrupt interrupt = {poll_caller, &state};
        test_heap heap = {0};
        test_heap_use(&heap);
        const cmb_status status = is_backward ? cmb_backward(&f->problem, &f->gradients, &interrupt, NULL)
                                              : cmb_forward(&f->problem, &interrupt, NULL);
        test_heap_use(NULL);
        CHECK(status == CMB_ERR_CANCELLED && state.polls == 2 && heap.live == 0, "%d, %d polls", status, state.polls);
    }
    cmb_plan_free(dense);
    cmb_plan_free(window);
    free_fixture(f);
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(mixtures), TEST(shared_heads), TEST(wrong_mixtures), TEST(memory), TEST(cancelled),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

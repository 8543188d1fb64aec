// SPDX-License-Identifier: Apache-2.0
/* The builders of plans: what they make, for every small length; prefixes; sizes that they refuse; failing memory. */
#include "factorizations.h"

/* How often the parts of a query cover a position of its support: the least and the most often. */
static void count_coverage(const factorization *f, const specified *s, int64_t *least, int64_t *most) {
    *least = INT64_MAX;
    *most = 0;
    int64_t *times = calloc((size_t)f->L + 1, sizeof *times);
    CHECK(times);
    for (int64_t i = 0; i < f->L; i++) {
        memset(times, 0, (size_t)f->L * sizeof *times);
        for (int64_t n = 0; n < s->query[i].count; n++) {
            const int64_t row = s->query[i].item[n];
            for (int64_t k = 0; row >= f->L && k < s->below[row - f->L].count; k++)
                times[s->below[row - f->L].item[k]]++;
            if (row < f->L)
                times[row]++;
        }
        for (int64_t j = 0; j < (f->is_causal ? i + 1 : f->L); j++) {
            *least = times[j] < *least ? times[j] : *least;
            *most = times[j] > *most ? times[j] : *most;
        }
    }
    free(times);
}

static void check_against_specification(const factorization *f) {
    cmb_error error = {0};
    cmb_plan *plan = make(f);
    specified s = specify(f);
    vector *rows = attended_rows(plan), *below = pooled_positions(plan);
    int64_t pairs = 0, summarized = 0;
    CHECK(cmb_plan_check(plan, NULL, &error) == CMB_OK, "%s", error.message);
    CHECK(plan->R == s.R, "%d regions, not %lld", plan->R, (long long)s.R);
    for (int64_t i = 0; i < f->L; i++) {
        sort(&rows[i]);
        CHECK(are_equal(&rows[i], &s.query[i]), "kind %d L %lld span %lld causal %d sparse %d query %lld", (int)f->kind,
              (long long)f->L, (long long)f->span, f->is_causal, f->is_sparse, (long long)i);
        pairs += s.query[i].count;
    }
    for (int64_t r = 0; r < s.R; r++) {
        CHECK(are_equal(&below[r], &s.below[r]), "kind %d L %lld span %lld causal %d region %lld", (int)f->kind,
              (long long)f->L, (long long)f->span, f->is_causal, (long long)r);
        CHECK(are_equal(&rows[f->L + r], &s.member[r]), "kind %d L %lld span %lld causal %d region %lld", (int)f->kind,
              (long long)f->L, (long long)f->span, f->is_causal, (long long)r);
        summarized += s.member[r].count;
    }
    cmb_plan_facts facts;
    CHECK(cmb_plan_measure(plan, NULL, &facts, &error) == CMB_OK, "%s", error.message);
    CHECK(facts.attend_pairs == pairs && facts.summarize_pairs == summarized);
    CHECK(facts.computed_pairs >= pairs + summarized);
    if (f->kind == MIXTURE && !f->is_sparse)
        CHECK(facts.is_full && facts.is_partition == (f->span == 1 || f->span >= f->L));
    else if ((!f->is_sparse && f->kind != WINDOW && f->kind != HEAVY) || f->kind == DENSE)
        CHECK(facts.is_partition && facts.is_full);
    else {
        int64_t least, most;
        count_coverage(f, &s, &least, &most);
        CHECK(facts.is_full == (least > 0) && facts.is_partition == (least > 0 && most < 2));
    }
    free_lists(rows, f->L + s.R);
    free_lists(below, s.R + plan->N);
    forget(&s, f->L);
    cmb_plan_free(plan);
}

static void check_length_of_all(int64_t L) {
    const int64_t span[] = {1, 2, 3, 7, 16, 21, 33, 63, 64, 65, 100, 128, 600, INT64_MAX};
    for (int is_causal = 0; is_causal < 2; is_causal++)
        for (int is_sparse = 0; is_sparse < 2; is_sparse++) {
            factorization f = {.L = L, .is_causal = is_causal, .is_sparse = is_sparse};
            for (f.kind = DENSE; f.kind < KINDS; f.kind++)
                for (size_t n = 0; n < sizeof span / sizeof *span; n++) {
                    f.span = span[n];
                    const bool is_small =
                        f.kind >= TREE && f.span <= 600 && (L < 300 || f.span == 33) && (f.kind > TREE2 || f.span > 1);
                    if ((f.kind == FIXED && (L < 300 || span[n] > 16)) || (n == 0 && f.kind < TREE) || is_small)
                        check_against_specification(&f);
                }
        }
}

static void test_specification(void) {
    for (int64_t L = 0; L <= 70; L++)
        check_length_of_all(L);
    const int64_t more[] = {127, 128, 129, 1000, 2047, 2048, 2049};
    for (size_t n = 0; n < sizeof more / sizeof *more; n++)
        check_length_of_all(more[n]);
}

static void test_blocks_longer_than_a_chunk(void) {
    for (int is_causal = 0; is_causal < 2; is_causal++)
        for (int hierarchical = 0; hierarchical < 2; hierarchical++)
            check_against_specification(
                &(factorization){hierarchical ? HIERARCHICAL : LOGSPARSE, 9000, 1, is_causal, false});
}

static void test_long_plans(void) {
    for (kind k = DENSE; k < KINDS; k++)
        for (int is_sparse = 0; is_sparse < 2; is_sparse++) {
            const factorization f = {k, 65536, 256, true, is_sparse};
            cmb_plan *plan = make(&f);
            cmb_error error = {0};
            CHECK(cmb_plan_check(plan, NULL, &error) == CMB_OK, "%s", error.message);
            /* 1% of query, key, value and out: 8 heads, 64 features, float32 */
            CHECK(cmb_plan_bytes(plan) < 5368709, "%zu bytes", cmb_plan_bytes(plan));
            cmb_plan_free(plan);
        }
}

/* ---- a causal prefix computes the same ---- */

typedef struct {
    const cmb_plan *plan;
    const factorization *f;
    vector *below;
    vector *tiles; /* [L + R] of each query row */
} prefix_side;

/* The same number for the same region, whatever the length: its span, or its place in the region order. */
static int64_t name_row(const prefix_side *side, int64_t row) {
    const int64_t L = side->plan->L, r = row - L, halves = (side->plan->R - L) / 2;
    if (r < 0)
        return row;
    if (side->f->kind < VERTICAL)
        return (side->below[r].item[0] + 1) << 32 | side->below[r].count;
    if (side->f->kind != MIXTURE || r < L)
        return INT64_C(1) << 32 | r;
    return r < L + halves ? INT64_C(2) << 32 | (r - L) : INT64_C(3) << 32 | (r - L - halves);
}

static prefix_side open_side(const cmb_plan *plan, const factorization *f) {
    prefix_side side = {plan, f, pooled_positions(plan), make_lists(plan->L + plan->R)};
    for (int32_t n = 0; n < plan->tiles; n++)
        for (int32_t t = 0; t < plan->tile[n].query.count; t++)
            push(&side.tiles[row_at(plan, plan->tile[n].query, t)], (int64_t)n << 6 | t);
    return side;
}

static void close_side(prefix_side *side) {
    free_lists(side->below, side->plan->R + side->plan->N);
    free_lists(side->tiles, side->plan->L + side->plan->R);
}

/* The tile's rows, -1 in place of those that its lane t does not see, and those that it sees. */
static void list_tile(const prefix_side *side, int64_t tile, int64_t t, vector *rows, vector *seen) {
    const cmb_plan *plan = side->plan;
    rows->count = seen->count = 0;
    for (int32_t n = plan->tile[tile].run; n < plan->tile[tile + 1].run; n++)
        for (int32_t k = 0; k < plan->run[n].row.count; k++) {
            const bool is_seen = plan->run[n].mask < 0 || plan->mask[plan->run[n].mask + k] >> t & 1;
            push(rows, is_seen ? name_row(side, row_at(plan, plan->run[n].row, k)) : -1);
            if (is_seen)
                push(seen, rows->item[rows->count - 1]);
        }
}

static void check_prefix(const factorization *f, int64_t longer) {
    factorization g = *f;
    g.L = longer;
    cmb_plan *plan[2] = {make(f), make(&g)};
    prefix_side side[2] = {open_side(plan[0], f), open_side(plan[1], &g)};
    vector rows[2] = {{0}}, seen[2] = {{0}};
    for (int64_t x = 0; x < f->L + plan[0]->R; x++) {
        int64_t y = x;
        if (x >= f->L) /* the same region */
            for (y = longer; name_row(&side[1], y) != name_row(&side[0], x);)
                if (++y == longer + plan[1]->R)
                    break;
        const vector *tiles = &side[0].tiles[x], *others = &side[1].tiles[y];
        if (!tiles->count)
            continue;
        CHECK(tiles->count == others->count, "query row %lld", (long long)x);
        for (int64_t n = 0; n < tiles->count; n++) {
            const int64_t a = tiles->item[n] >> 6, b = others->item[n] >> 6;
            CHECK((plan[0]->tile[a].width == 1) == (plan[1]->tile[b].width == 1));
            list_tile(&side[0], a, tiles->item[n] & 63, &rows[0], &seen[0]);
            list_tile(&side[1], b, others->item[n] & 63, &rows[1], &seen[1]);
            CHECK(are_equal(&seen[0], &seen[1]), "query row %lld", (long long)x);
            if (rows[1].count > 96) { /* taken 96 at a time: what is seen keeps its place */
                CHECK(rows[0].count <= rows[1].count);
                rows[1].count = rows[0].count;
                CHECK(are_equal(&rows[0], &rows[1]), "kind %d L %lld of %lld span %lld query row %lld", (int)f->kind,
                      (long long)f->L, (long long)longer, (long long)f->span, (long long)x);
            }
        }
    }
    for (int n = 0; n < 2; n++) {
        free(rows[n].item);
        free(seen[n].item);
        close_side(&side[n]);
        cmb_plan_free(plan[n]);
    }
}

static void test_prefixes(void) {
    const int64_t span[] = {1, 2, 3, 5, 16, 30, 63, 64, 70, 130, 1000};
    const int64_t length[] = {1, 2, 15, 40, 64, 77, 130, 199, 320};
    for (size_t n = 0; n < sizeof length / sizeof *length; n++)
        for (int is_sparse = 0; is_sparse < 2; is_sparse++) {
            factorization f = {.L = length[n], .is_causal = true, .is_sparse = is_sparse};
            for (f.kind = DENSE; f.kind < KINDS; f.kind++)
                for (size_t m = 0; m < sizeof span / sizeof *span; m++) {
                    f.span = span[m];
                    if (f.kind == ROUTING && f.span > f.L) /* clusters would depend on the length */
                        continue;
                    if (f.kind == FIXED || f.kind > TREE2 || (f.kind >= TREE && f.span > 1) ||
                        (f.kind < TREE && m == 0)) {
                        check_prefix(&f, f.L + 1);
                        check_prefix(&f, 333);
                    }
                }
        }
    for (kind k = LOGSPARSE; k <= HIERARCHICAL; k++) {
        check_prefix(&(factorization){k, 4090, 1, true, false}, 4097);
        check_prefix(&(factorization){k, 2100, 1, true, false}, 4200);
    }
}

/* ---- refusals ---- */

static void test_bad_sizes(void) {
    const cmb_plan_options options = {.is_causal = true};
    const cmb_plan_options odd = {.pooling = (cmb_pooling)9};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    expect(cmb_plan_fixed(8, 0, 1, &options, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "span must be at least 1, got 0");
    expect(cmb_plan_fixed(8, INT64_MIN, 1, &options, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "span must be at least 1, got -9223372036854775808");
    expect(cmb_plan_fixed(8, 2, 0, &options, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "window must be at least 1, got 0");
    expect(cmb_plan_heavily_compressed(8, 0, 1, &options, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "rate must be at least 1, got 0");
    expect(cmb_plan_heavily_compressed(8, 1, 0, &options, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "window must be at least 1, got 0");
    expect(cmb_plan_window(8, 0, &options, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "size must be at least 1, got 0");
    expect(cmb_plan_dense(-1, &options, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "length must not be negative, got -1");
    expect(cmb_plan_logsparse((INT64_C(1) << 30) + 1, false, &options, &plan, &error), CMB_ERR_OVERFLOW, plan, &error,
           "length must be at most 2^30, got 1073741825");
    expect(cmb_plan_fixed(INT64_C(1) << 30, 1, 1, &options, &plan, &error), CMB_ERR_OVERFLOW, plan, &error,
           "length 1073741824 with 1073741824 regions exceeds the 2^31 - 1 rows of a plan");
    expect(cmb_plan_dense(8, &odd, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "pooling must be max, mean, sum or first, got 9");
    const cmb_lists lists = {0};
    const int64_t cluster[8] = {0};
    static const char missing[] = "options is missing";
    expect(cmb_plan_dense(8, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error, missing);
    expect(cmb_plan_fixed(8, 2, 1, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error, missing);
    expect(cmb_plan_logsparse(8, true, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error, missing);
    expect(cmb_plan_tree(8, 2, 0, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error, missing);
    expect(cmb_plan_axial(8, 2, CMB_AXIAL_VERTICAL, false, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error, missing);
    expect(cmb_plan_axial_mixture(8, 2, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error, missing);
    expect(cmb_plan_window(8, 2, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error, missing);
    expect(cmb_plan_heavily_compressed(8, 2, 2, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error, missing);
    expect(cmb_plan_routing(8, cluster, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error, missing);
    expect(cmb_plan_routing(8, NULL, &options, &plan, &error), CMB_ERR_VALUE, plan, &error, "cluster is missing");
    expect(cmb_plan_from_parts(0, &lists, &lists, &lists, CMB_COVER_ANY, NULL, &plan, &error), CMB_ERR_VALUE, plan,
           &error, missing);
    expect(cmb_plan_from_parts(0, &lists, NULL, &lists, CMB_COVER_ANY, &options, &plan, &error), CMB_ERR_VALUE, plan,
           &error, "regions is missing");
    expect(cmb_plan_from_arrays(NULL, NULL, &plan, &error), CMB_ERR_VALUE, plan, &error, "plan is missing");
    CHECK(cmb_plan_check(NULL, NULL, NULL) == CMB_ERR_VALUE &&
          cmb_plan_measure(NULL, NULL, &(cmb_plan_facts){0}, NULL) == CMB_ERR_VALUE);
    CHECK(cmb_plan_dense(-1, &options, &plan, NULL) == CMB_ERR_VALUE && !plan);
}

typedef struct {
    size_t limit, taken;
} small_heap;

static void *allocate_small(size_t bytes, void *context) {
    small_heap *heap = context;
    if (bytes > heap->limit)
        return NULL;
    heap->taken++;
    return cmb_aligned_malloc(64, bytes);
}

static void release_small(void *pointer, void *context) {
    ((small_heap *)context)->taken--;
    cmb_aligned_free(pointer);
}

static void test_lengths_beyond_memory(void) {
    small_heap heap = {.limit = (size_t)1 << 28};
    cmb_set_allocator(&(cmb_allocator){allocate_small, release_small, &heap});
    const cmb_plan_options options = {.is_causal = true};
    const int64_t L = INT64_C(1) << 30;
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    expect(cmb_plan_dense(L, &options, &plan, &error), CMB_ERR_MEMORY, plan, &error,
           "out of memory while making a plan of length 1073741824");
    CHECK(cmb_plan_fixed(L, 2, 1, &options, &plan, &error) == CMB_ERR_MEMORY && !plan);
    CHECK(cmb_plan_fixed(L, 32768, 1, &options, &plan, &error) == CMB_ERR_MEMORY && !plan);
    CHECK(cmb_plan_fixed(L, 32768, 100, &options, &plan, &error) == CMB_ERR_MEMORY && !plan);
    CHECK(cmb_plan_window(L, 32768, &options, &plan, &error) == CMB_ERR_MEMORY && !plan);
    CHECK(cmb_plan_heavily_compressed(L, 100, 100, &options, &plan, &error) == CMB_ERR_MEMORY && !plan);
    CHECK(cmb_plan_logsparse(L, false, &options, &plan, &error) == CMB_ERR_MEMORY && !plan);
    CHECK(cmb_plan_logsparse(L, true, &options, &plan, &error) == CMB_ERR_MEMORY && !plan);
    CHECK(heap.taken == 0);
    cmb_set_allocator(NULL);
}

/* ---- failing memory ---- */

static cmb_status use_factorization(void *context) {
    const factorization *f = context;
    cmb_plan *plan = NULL, *copy = NULL;
    cmb_plan_facts facts;
    cmb_error error = {0};
    cmb_status status = build(f, &plan, &error);
    CHECK((status == CMB_OK) == (plan != NULL) && status == error.status);
    if (!status)
        status = cmb_plan_from_arrays(plan, NULL, &copy, &error);
    if (!status)
        status = cmb_plan_measure(copy, NULL, &facts, &error);
    cmb_plan_free(plan);
    cmb_plan_free(copy);
    return status;
}

static void test_failing_allocations(void) {
    for (kind k = DENSE; k < KINDS; k++)
        for (int bits = 0; bits < 4; bits++)
            fail_each_allocation(use_factorization, &(factorization){k, k == LOGSPARSE && !bits ? 9000 : 700,
                                                                     bits & 1 ? 5 : 100, bits & 1, bits & 2});
}

int main(int argc, char **argv) {
    const test_case tests[] = {
        TEST(test_specification),       TEST(test_blocks_longer_than_a_chunk),
        TEST(test_long_plans),          TEST(test_prefixes),
        TEST(test_bad_sizes),           TEST(test_lengths_beyond_memory),
        TEST(test_failing_allocations),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

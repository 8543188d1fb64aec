// SPDX-License-Identifier: Apache-2.0
/* A user's own factorization: parts drawn by chance, and those of the known factorizations; refusals; failing memory.
 */
#include "factorizations.h"

/* ---- a user's own parts ---- */

typedef struct {
    int64_t L, R;
    vector *direct, *regions, *members;
} random_parts;

static cmb_lists flatten(const vector *lists, int64_t count, vector *offset, vector *item) {
    offset->count = item->count = 0;
    push(offset, 0);
    for (int64_t n = 0; n < count; n++) {
        for (int64_t k = 0; k < lists[n].count; k++)
            push(item, lists[n].item[k]);
        push(offset, item->count);
    }
    return (cmb_lists){count, offset->item, item->item};
}

static cmb_status build_parts(const random_parts *p, cmb_cover cover, const cmb_plan_options *options, cmb_plan **plan,
                              cmb_error *error) {
    vector offset[3] = {{0}}, item[3] = {{0}};
    const cmb_lists direct = flatten(p->direct, p->L, &offset[0], &item[0]);
    const cmb_lists regions = flatten(p->regions, p->L, &offset[1], &item[1]);
    const cmb_lists members = flatten(p->members, p->R, &offset[2], &item[2]);
    const cmb_status status = cmb_plan_from_parts(p->L, &direct, &regions, &members, cover, options, plan, error);
    for (int n = 0; n < 3; n++) {
        free(offset[n].item);
        free(item[n].item);
    }
    return status;
}

static void free_parts(random_parts *p) {
    free_lists(p->direct, p->L);
    free_lists(p->regions, p->L);
    free_lists(p->members, p->R);
}

/* below[r]: positions below region r, repeats counted, ascending. */
static random_parts draw_parts(int64_t L, int64_t R, bool is_causal, bool is_nested, vector *below) {
    random_parts p = {L, R, make_lists(L), make_lists(L), make_lists(R)};
    for (int64_t r = 0; r < R; r++) {
        for (int64_t n = random_below(6); n > 0; n--) {
            if (is_nested && r && random_below(3) == 0) {
                const int64_t q = random_below((int)r);
                if (below[q].count > 60)
                    continue;
                push(&p.members[r], L + q);
                for (int64_t k = 0; k < below[q].count; k++)
                    push(&below[r], below[q].item[k]);
            } else if (L) {
                push(&p.members[r], random_below((int)L));
                push(&below[r], p.members[r].item[p.members[r].count - 1]);
            }
        }
        sort(&below[r]);
    }
    for (int64_t i = 0; i < L; i++) {
        for (int64_t n = random_below(8); n > 0; n--)
            push(&p.direct[i], random_below((int)(is_causal ? i + 1 : L)));
        for (int64_t n = R ? random_below(5) : 0; n > 0; n--) {
            const int64_t r = random_below((int)R);
            if (!is_causal || !below[r].count || below[r].item[below[r].count - 1] <= i)
                push(&p.regions[i], r);
        }
    }
    return p;
}

/* Refused where query i, not -1, is the first that its parts do not cover as they must, and key j its first such. */
static void check_cover(const random_parts *p, cmb_cover cover, bool is_causal, int64_t i, int64_t j) {
    const cmb_plan_options options = {.is_causal = is_causal};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    const cmb_status status = build_parts(p, cover, &options, &plan, &error);
    char words[120];
    snprintf(words, sizeof words, "parts must cover query %lld's support %s once, but key %lld ", (long long)i,
             cover == CMB_COVER_FULL ? "at least" : "exactly", (long long)j);
    CHECK(status == (i < 0 ? CMB_OK : CMB_ERR_VALUE) && !plan == (i >= 0), "%s, not %s", error.message, words);
    CHECK(i < 0 || strstr(error.message, words) == error.message, "%s, not %s", error.message, words);
    cmb_plan_free(plan);
}

static void check_parts(int64_t L, int64_t R, bool is_causal, bool is_nested, cmb_pooling pooling) {
    vector *below = make_lists(R);
    random_parts p = draw_parts(L, R, is_causal, is_nested, below);
    const cmb_plan_options options = {.is_causal = is_causal, .pooling = pooling};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    CHECK(build_parts(&p, CMB_COVER_ANY, &options, &plan, &error) == CMB_OK, "%s", error.message);
    CHECK(cmb_plan_check(plan, NULL, &error) == CMB_OK, "%s", error.message);
    vector *rows = attended_rows(plan), *pooled = pooled_positions(plan);
    bool *needed = calloc((size_t)R + 1, 1);
    int64_t pairs = 0, uneven[2] = {-1, -1}, lacking[2] = {-1, -1}; /* a query, a key */
    CHECK(needed);
    for (int64_t i = 0; i < L; i++) {
        int64_t *cover = calloc((size_t)L, sizeof *cover);
        vector expected = {0};
        CHECK(cover);
        for (int64_t n = 0; n < p.direct[i].count; n++) {
            push(&expected, p.direct[i].item[n]);
            cover[p.direct[i].item[n]]++;
        }
        for (int64_t n = 0; n < p.regions[i].count; n++) {
            const int64_t r = p.regions[i].item[n];
            needed[r] = true;
            if (below[r].count)
                push(&expected, L + r);
            for (int64_t k = 0; k < below[r].count; k++)
                cover[below[r].item[k]]++;
        }
        for (int64_t j = 0; j < (is_causal ? i + 1 : L); j++) {
            if (cover[j] != 1 && uneven[0] < 0)
                memcpy(uneven, (int64_t[]){i, j}, sizeof uneven);
            if (cover[j] == 0 && lacking[0] < 0)
                memcpy(lacking, (int64_t[]){i, j}, sizeof lacking);
        }
        sort(&expected);
        sort(&rows[i]);
        CHECK(are_equal(&rows[i], &expected), "query %lld", (long long)i);
        pairs += expected.count;
        free(expected.item);
        free(cover);
    }
    for (int64_t r = R - 1; r >= 0; r--) {
        vector expected = {0};
        for (int64_t n = 0; n < p.members[r].count; n++) {
            const int64_t member = p.members[r].item[n];
            if (member >= L && needed[r])
                needed[member - L] = true;
            if (needed[r] && (member < L || below[member - L].count))
                push(&expected, member);
        }
        CHECK(are_equal(&rows[L + r], &expected), "region %lld", (long long)r);
        if (pooling == CMB_POOL_MEAN)
            sort(&pooled[r]);
        CHECK(are_equal(&pooled[r], &below[r]), "region %lld", (long long)r);
        free(expected.item);
    }
    cmb_plan_facts facts;
    CHECK(cmb_plan_measure(plan, NULL, &facts, &error) == CMB_OK, "%s", error.message);
    CHECK(facts.attend_pairs == pairs);
    CHECK(facts.is_partition == (uneven[0] < 0) && facts.is_full == (lacking[0] < 0));
    check_cover(&p, CMB_COVER_ANY, is_causal, -1, -1);
    check_cover(&p, CMB_COVER_FULL, is_causal, lacking[0], lacking[1]);
    check_cover(&p, CMB_COVER_PARTITION, is_causal, uneven[0], uneven[1]);
    cmb_plan *copy = NULL;
    CHECK(cmb_plan_from_arrays(plan, NULL, &copy, &error) == CMB_OK, "%s", error.message);
    CHECK(cmb_plan_bytes(copy) == cmb_plan_bytes(plan));
    const int32_t *key_row = plan->traits.key_row; /* in a block of its own */
    const size_t apart = key_row ? (size_t)R * sizeof *key_row : 0;
    CHECK(memcmp(copy + 1, plan + 1, cmb_plan_bytes(plan) - sizeof *plan - apart) == 0);
    CHECK(!key_row == !copy->traits.key_row && (!key_row || memcmp(copy->traits.key_row, key_row, apart) == 0));
    cmb_plan_free(copy);
    cmb_plan_free(plan);
    free(needed);
    free_lists(rows, L + R);
    free_lists(pooled, R);
    free_lists(below, R);
    free_parts(&p);
}

static void test_random_parts(void) {
    for (int n = 0; n < 600; n++)
        check_parts(random_below(n % 10 ? 40 : 200), random_below(30), n & 1, n & 2,
                    n & 4 ? CMB_POOL_MAX : CMB_POOL_MEAN);
    check_parts(1500, 30, true, true, CMB_POOL_MAX); /* more mask sequences than the first table holds */
}

/* Every factorization's own lists, given as parts, are the partition they were. */
static void test_known_parts(void) {
    for (kind k = DENSE; k < MIXTURE; k++)
        for (int is_causal = 0; is_causal < 2; is_causal++) {
            const factorization f = {k, 150, 12, is_causal, false};
            specified s = specify(&f);
            random_parts p = {f.L, s.R, make_lists(f.L), make_lists(f.L), make_lists(s.R)};
            for (int64_t i = 0; i < f.L; i++)
                for (int64_t n = 0; n < s.query[i].count; n++)
                    push(s.query[i].item[n] < f.L ? &p.direct[i] : &p.regions[i],
                         s.query[i].item[n] < f.L ? s.query[i].item[n] : s.query[i].item[n] - f.L);
            for (int64_t r = 0; r < s.R; r++)
                for (int64_t n = 0; n < s.member[r].count; n++)
                    push(&p.members[r], s.member[r].item[n]);
            const cmb_plan_options options = {.is_causal = is_causal};
            cmb_plan *plan = NULL;
            cmb_plan_facts facts;
            cmb_error error = {0};
            CHECK(build_parts(&p, CMB_COVER_PARTITION, &options, &plan, &error) == CMB_OK, "%s", error.message);
            CHECK(cmb_plan_check(plan, NULL, &error) == CMB_OK, "%s", error.message);
            CHECK(cmb_plan_measure(plan, NULL, &facts, &error) == CMB_OK && facts.is_partition && facts.is_full);
            check_cover(&p, CMB_COVER_FULL, is_causal, -1, -1);
            push(&p.direct[140], 100);
            check_cover(&p, CMB_COVER_FULL, is_causal, -1, -1);
            check_cover(&p, CMB_COVER_PARTITION, is_causal, 140, 100);
            p.direct[140].count = p.regions[140].count = 0;
            check_cover(&p, CMB_COVER_FULL, is_causal, 140, 0);
            cmb_plan_free(plan);
            free_parts(&p);
            forget(&s, f.L);
        }
}

/* Covers everything, some of it twice. */
static random_parts overlapping_parts(void) {
    const int64_t L = 130;
    random_parts p = {L, 0, make_lists(L), make_lists(L), make_lists(0)};
    for (int64_t i = 0; i < L; i++)
        for (int64_t j = 0; j <= i; j++) {
            push(&p.direct[i], j);
            if (j == 128)
                push(&p.direct[i], j);
        }
    return p;
}

static void test_full_but_no_partition(void) {
    random_parts p = overlapping_parts();
    const cmb_plan_options options = {.is_causal = true};
    for (int is_full = 1; is_full >= 0; is_full--) {
        cmb_plan *plan = NULL;
        cmb_plan_facts facts;
        cmb_error error = {0};
        CHECK(build_parts(&p, CMB_COVER_ANY, &options, &plan, &error) == CMB_OK, "%s", error.message);
        CHECK(cmb_plan_measure(plan, NULL, &facts, &error) == CMB_OK);
        CHECK(!facts.is_partition && facts.is_full == is_full);
        check_cover(&p, CMB_COVER_PARTITION, true, 128, 128);
        check_cover(&p, CMB_COVER_FULL, true, is_full ? -1 : 129, 100);
        cmb_plan_free(plan);
        p.direct[129].item[100] = 99;
    }
    free_parts(&p);
}

/* ---- refusals ---- */

static void expect_parts(const char *message, int64_t L, const cmb_lists *direct, const cmb_lists *regions,
                         const cmb_lists *members, cmb_status status) {
    const cmb_plan_options options = {.is_causal = true};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    expect(cmb_plan_from_parts(L, direct, regions, members, CMB_COVER_ANY, &options, &plan, &error), status, plan,
           &error, message);
}

static void expect_uncovered(const char *message, cmb_cover cover, const cmb_lists *direct, const cmb_lists *regions,
                             const cmb_lists *members) {
    const cmb_plan_options options = {.is_causal = true};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    expect(cmb_plan_from_parts(4, direct, regions, members, cover, &options, &plan, &error), CMB_ERR_VALUE, plan,
           &error, message);
}

#define LISTS(count, offset, ...)                        \
    &(cmb_lists) {                                       \
        count, offset, (const int64_t[]) { __VA_ARGS__ } \
    }
#define OFFSETS(...) ((const int64_t[]){__VA_ARGS__})

static void test_bad_parts(void) {
    const int64_t *each = OFFSETS(0, 1, 2, 3, 4), *none = OFFSETS(0, 0, 0, 0, 0);
    const cmb_lists *direct = LISTS(4, each, 0, 1, 2, 3), *empty = LISTS(4, none, 0), *members = LISTS(0, NULL, 0);
    expect_parts("direct[2] holds key 3, which lies after query 2 of a causal plan", 4, LISTS(4, each, 0, 1, 3, 3),
                 empty, members, CMB_ERR_VALUE);
    expect_parts("direct[1] holds key 4, which is not a position below 4", 4, LISTS(4, each, 0, 4, 2, 3), empty,
                 members, CMB_ERR_VALUE);
    expect_parts("direct[3] holds key -1, which is not a position below 4", 4, LISTS(4, each, 0, 1, 2, -1), empty,
                 members, CMB_ERR_VALUE);
    expect_parts("direct must hold 4 lists, one for each position, got 3", 4, LISTS(3, each, 0, 1, 2), empty, members,
                 CMB_ERR_VALUE);
    expect_parts("regions: offsets must start at 0 and not decrease, got 1 at 0", 4, direct,
                 LISTS(4, OFFSETS(1, 1, 1, 1, 1), 0), members, CMB_ERR_VALUE);
    expect_parts("direct: offsets must start at 0 and not decrease, got 1 at 3", 4,
                 LISTS(4, OFFSETS(0, 1, 2, 1, 4), 0, 1, 2, 3), empty, members, CMB_ERR_VALUE);
    expect_parts("regions[0] holds 0, but there are 0 regions", 4, direct, LISTS(4, each, 0, 0, 0, 0), members,
                 CMB_ERR_VALUE);
    expect_parts("regions[1] holds region 0, whose key 2 lies after query 1 of a causal plan", 4, direct,
                 LISTS(4, OFFSETS(0, 0, 1, 1, 1), 0), LISTS(1, OFFSETS(0, 2), 1, 2), CMB_ERR_VALUE);
    expect_parts("members[0] holds region 0, which is not listed before it", 4, direct, empty,
                 LISTS(1, OFFSETS(0, 2), 1, 4), CMB_ERR_VALUE);
    expect_parts("members[0] holds region 1, which is not listed before it", 4, direct, empty,
                 LISTS(2, OFFSETS(0, 1, 2), 5, 0), CMB_ERR_VALUE);
    expect_parts("members[1] holds 6, which is neither a position below 4 nor a region", 4, direct, empty,
                 LISTS(2, OFFSETS(0, 1, 2), 0, 6), CMB_ERR_VALUE);
    expect_parts("members must not hold a negative number of lists, got -1", 4, direct, empty, LISTS(-1, NULL, 0),
                 CMB_ERR_VALUE);
    const cmb_plan_options sparse = {.sparse = true};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    expect(cmb_plan_from_parts(4, direct, empty, members, CMB_COVER_ANY, &sparse, &plan, &error), CMB_ERR_VALUE, plan,
           &error, "sparse must be false: parts say themselves what is left out");
    int64_t offset[41], item[80]; /* each region twice the one before */
    for (int64_t r = 0; r <= 40; r++)
        offset[r] = 2 * r;
    for (int64_t r = 0; r < 40; r++)
        item[2 * r] = item[2 * r + 1] = r ? 4 + r - 1 : 0;
    expect_parts("members[30] stands for more than 2^31 - 1 positions", 4, direct, empty,
                 &(cmb_lists){40, offset, item}, CMB_ERR_OVERFLOW);
}

/* Queries see their own pair directly, and the one before it through region 0. */
static void test_uncovered_parts(void) {
    const cmb_lists *direct = LISTS(4, OFFSETS(0, 1, 3, 4, 6), 0, 1, 0, 2, 3, 2),
                    *regions = LISTS(4, OFFSETS(0, 0, 0, 1, 2), 0, 0),
                    *members = LISTS(3, OFFSETS(0, 2, 4, 5), 1, 0, 4, 0, 2);
    const cmb_plan_options options = {.is_causal = true};
    cmb_plan *plan = NULL;
    CHECK(cmb_plan_from_parts(4, direct, regions, members, CMB_COVER_PARTITION, &options, &plan, NULL) == CMB_OK);
    cmb_plan_free(plan);
    expect_uncovered("cover must be any, full or partition, got 3", (cmb_cover)3, direct, regions, members);
    expect_uncovered("parts must cover query 1's support exactly once, but key 0 is left out", CMB_COVER_PARTITION,
                     LISTS(4, OFFSETS(0, 1, 2, 3, 5), 0, 1, 2, 2, 3), regions, members);
    expect_uncovered("parts must cover query 2's support at least once, but key 0 is left out", CMB_COVER_FULL, direct,
                     LISTS(4, OFFSETS(0, 0, 0, 1, 2), 2, 0), members);
    expect_uncovered("parts must cover query 3's support exactly once, but key 3 lies twice in direct[3]",
                     CMB_COVER_PARTITION, LISTS(4, OFFSETS(0, 1, 3, 4, 7), 0, 1, 0, 2, 3, 2, 3), regions, members);
    expect_uncovered("parts must cover query 3's support exactly once, but key 1 lies in direct[3] and in region 0",
                     CMB_COVER_PARTITION, LISTS(4, OFFSETS(0, 1, 3, 4, 7), 0, 1, 0, 2, 3, 2, 1), regions, members);
    expect_uncovered("parts must cover query 2's support exactly once, but key 0 lies in region 0 and in region 1",
                     CMB_COVER_PARTITION, direct, LISTS(4, OFFSETS(0, 0, 0, 2, 3), 0, 1, 0), members);
    expect_uncovered("parts must cover query 2's support exactly once, but key 0 lies twice in region 1",
                     CMB_COVER_PARTITION, direct, LISTS(4, OFFSETS(0, 0, 0, 1, 2), 1, 0), members);
    expect_uncovered("parts must cover query 3's support exactly once, but key 0 lies in region 0, which regions[3] "
                     "holds twice",
                     CMB_COVER_PARTITION, direct, LISTS(4, OFFSETS(0, 0, 0, 1, 3), 0, 0, 0), members);
}

/* ---- failing memory ---- */

static cmb_status use_parts(void *context) {
    const cmb_plan_options options = {0};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    const cmb_status status = build_parts(context, CMB_COVER_ANY, &options, &plan, &error);
    CHECK((status == CMB_OK) == (plan != NULL) && status == error.status);
    cmb_plan_free(plan);
    return status;
}

static cmb_status use_covering_parts(void *context) {
    const cmb_plan_options options = {.is_causal = true};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    const cmb_status status = build_parts(context, CMB_COVER_FULL, &options, &plan, &error);
    CHECK((status == CMB_OK) == (plan != NULL) && status == error.status);
    cmb_plan_free(plan);
    return status;
}

static void test_failing_allocations_of_parts(void) {
    vector *below = make_lists(50);
    random_parts p = draw_parts(300, 50, false, true, below);
    fail_each_allocation(use_parts, &p);
    free_lists(below, 50);
    free_parts(&p);
    p = overlapping_parts();
    fail_each_allocation(use_covering_parts, &p);
    free_parts(&p);
}

int main(int argc, char **argv) {
    const test_case tests[] = {
        TEST(test_random_parts), TEST(test_known_parts),     TEST(test_full_but_no_partition),
        TEST(test_bad_parts),    TEST(test_uncovered_parts), TEST(test_failing_allocations_of_parts),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

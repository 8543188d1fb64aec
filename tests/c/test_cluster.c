// SPDX-License-Identifier: Apache-2.0
/* cmb_cluster, cmb_assign and cmb_update_centroids: against their definitions in double, row by row; their bits, which
 * do not depend on layouts, threads or instruction sets; their errors, memory and cancelling. */
#define _GNU_SOURCE
#include "arrays.h"
#include "random.h"

#include <math.h>

/* ---- problems ----------------------------------------------------------------------------------- */

typedef struct {
    cmb_dtype dtype;
    int64_t B, H, L, D, n;
    bool rows_first; /* x and centroids are [B, rows, H, D] with gaps between the rows */
    bool backwards;  /* negative strides */
} request;

static const request small = {.dtype = CMB_FLOAT64, .B = 2, .H = 2, .L = 70, .D = 5, .n = 6};
static const request large = {.dtype = CMB_FLOAT32, .B = 2, .H = 3, .L = 600, .D = 12, .n = 30};

/* A problem and its memory: x, centroids, new_centroids, clusters. */
typedef struct {
    cmb_clustering problem;
    size_t size; /* of one number */
    test_block block[4];
} fixture;

static char *element(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d) {
    return array_at(f->size, a, b, h, x, d);
}

static double get(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d) {
    return array_get(f->size, a, b, h, x, d);
}

static void put(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d, double value) {
    array_put(f->size, a, b, h, x, d, value);
}

static cmb_array new_array(fixture *f, int which, const request *asked, int64_t rows) {
    const layout lies = {asked->rows_first, asked->backwards};
    return array_make(f->size, lies, asked->B, asked->H, rows, asked->D, &f->block[which]);
}

/* The same sizes get the same random numbers, in every layout. */
static fixture *new_fixture(request asked) {
    fixture *f = zeros(1, sizeof *f);
    f->size = asked.dtype == CMB_FLOAT32 ? sizeof(float) : sizeof(double);
    cmb_clustering *p = &f->problem;
    *p = (cmb_clustering){.dtype = asked.dtype, .B = asked.B, .H = asked.H, .L = asked.L, .D = asked.D, .n = asked.n};
    p->x = new_array(f, 0, &asked, asked.L);
    p->centroids = new_array(f, 1, &asked, asked.n);
    p->new_centroids = new_array(f, 2, &asked, asked.n);
    f->block[3].bytes = (size_t)(asked.B * asked.H * asked.L) * sizeof *p->clusters;
    f->block[3].memory = p->clusters = zeros(f->block[3].bytes, 1);
    memset(p->clusters, 0x5a, f->block[3].bytes);
    random_state = 1;
    for (int64_t b = 0; b < asked.B; b++)
        for (int64_t h = 0; h < asked.H; h++)
            for (int64_t x = 0; x < asked.L + asked.n; x++)
                for (int64_t d = 0; d < asked.D; d++)
                    put(f, x < asked.L ? &p->x : &p->centroids, b, h, x < asked.L ? x : x - asked.L, d, uniform(-1, 1));
    return f;
}

static void free_fixture(fixture *f) {
    for (int i = 0; i < 4; i++)
        free(f->block[i].memory);
    free(f);
}

typedef enum { CLUSTER, CLUSTER_BALANCED, FIT, ASSIGN, ASSIGN_BALANCED, UPDATE, CALLS } which_call;

static cmb_status call(const fixture *f, which_call which, const cmb_interrupt *interrupt, cmb_error *error) {
    cmb_clustering p = f->problem;
    switch (which) {
    case CLUSTER:
    case CLUSTER_BALANCED:
        return cmb_cluster(&p, 5, 3, which == CLUSTER_BALANCED, interrupt, error);
    case FIT:
        p.clusters = NULL;
        return cmb_cluster(&p, 5, 3, true, interrupt, error);
    case ASSIGN:
    case ASSIGN_BALANCED:
        return cmb_assign(&p, which == ASSIGN_BALANCED, interrupt, error);
    case UPDATE:
    default:
        return cmb_update_centroids(&p, 0.75, interrupt, error);
    }
}

/* UPDATE reads clusters: it gets valid ones. */
static void run(const fixture *f, which_call which) {
    cmb_error error = {0};
    if (which == UPDATE)
        for (int64_t i = 0; i < f->problem.B * f->problem.H * f->problem.L; i++)
            f->problem.clusters[i] = i * 7919 % f->problem.n;
    CHECK(call(f, which, NULL, &error) == CMB_OK, "%s: %s", error.message, context);
}

static void check_same(const fixture *f, const fixture *g) {
    const cmb_clustering *p = &f->problem, *q = &g->problem;
    CHECK(memcmp(p->clusters, q->clusters, f->block[3].bytes) == 0, "%s", context);
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++)
            for (int64_t c = 0; c < p->n; c++)
                CHECK(memcmp(element(f, &p->new_centroids, b, h, c, 0), element(g, &q->new_centroids, b, h, c, 0),
                             (size_t)p->D * f->size) == 0,
                      "centroid %lld of batch %lld head %lld: %s", (long long)c, (long long)b, (long long)h, context);
}

/* ---- the definition ----------------------------------------------------------------------------- */

/* Row x of an array at unit length; returns false if it has no direction. */
static bool direction(const fixture *f, const cmb_array *a, int64_t b, int64_t h, int64_t x, double *to) {
    double square = 0;
    for (int64_t d = 0; d < f->problem.D; d++) {
        to[d] = get(f, a, b, h, x, d);
        square += to[d] * to[d];
    }
    const bool has = square > 0 && isfinite(square);
    for (int64_t d = 0; d < f->problem.D; d++)
        to[d] = has ? to[d] / sqrt(square) : 0;
    return has;
}

/* similarity[x * n + c] */
static void similarities(const fixture *f, const cmb_array *centroids, int64_t b, int64_t h, double *similarity) {
    const cmb_clustering *p = &f->problem;
    double row[64], centroid[64];
    for (int64_t x = 0; x < p->L; x++)
        for (int64_t c = 0; c < p->n; c++) {
            direction(f, &p->x, b, h, x, row);
            direction(f, centroids, b, h, c, centroid);
            double sum = 0;
            for (int64_t d = 0; d < p->D; d++)
                sum += row[d] * centroid[d];
            similarity[x * p->n + c] = sum;
        }
}

/* Checks that one head's rows are in their most similar clusters, or in one that is less similar by at most `slack`. */
static void check_assigned(const fixture *f, const double *similarity, const int64_t *cluster, double slack) {
    for (int64_t x = 0; x < f->problem.L; x++) {
        const double *s = similarity + x * f->problem.n;
        int64_t best = 0;
        for (int64_t c = 1; c < f->problem.n; c++)
            best = s[c] > s[best] ? c : best;
        CHECK(cluster[x] == best || (cluster[x] >= 0 && cluster[x] < f->problem.n && s[best] - s[cluster[x]] <= slack),
              "row %lld in cluster %lld, not %lld: %s", (long long)x, (long long)cluster[x], (long long)best, context);
    }
}

/* The definition of balanced clusters, which searches for the next row each time. The rows are random doubles, so that
 * rounding decides nothing. */
static void check_balanced(const fixture *f, const double *similarity, const int64_t *cluster) {
    const int64_t L = f->problem.L, n = f->problem.n;
    int64_t *size = calloc((size_t)n, sizeof *size), extra = L % n;
    bool *placed = calloc((size_t)L, sizeof *placed);
    CHECK(size && placed);
    for (int64_t turn = 0; turn < L; turn++) {
        int64_t next = -1, best = -1;
        double furthest = -1;
        for (int64_t x = 0; x < L; x++) {
            double top = -9, second = -9;
            for (int64_t c = 0; c < n; c++) {
                const double s = similarity[x * n + c];
                second = s > top ? top : s > second ? s : second;
                top = s > top ? s : top;
            }
            if (!placed[x] && top - second > furthest) {
                next = x;
                furthest = top - second;
            }
        }
        for (int64_t c = 0; c < n; c++)
            if (size[c] < L / n + (extra > 0) && (best < 0 || similarity[next * n + c] > similarity[next * n + best]))
                best = c;
        CHECK(cluster[next] == best, "row %lld in cluster %lld, not %lld: %s", (long long)next,
              (long long)cluster[next], (long long)best, context);
        extra -= size[best]++ == L / n;
        placed[next] = true;
    }
    free(size);
    free(placed);
}

/* Checks that new_centroids are those that `from`, its clusters and `decay` make. */
static void check_moved(const fixture *f, const fixture *from, const cmb_array *old, double decay, double slack) {
    const cmb_clustering *p = &f->problem;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++)
            for (int64_t c = 0; c < p->n; c++) {
                double mean[64] = {0}, row[64], square = 0;
                int64_t count = 0;
                for (int64_t x = 0; x < p->L; x++) {
                    if (p->clusters[(b * p->H + h) * p->L + x] != c || !direction(f, &p->x, b, h, x, row))
                        continue;
                    count++;
                    for (int64_t d = 0; d < p->D; d++)
                        mean[d] += row[d];
                }
                for (int64_t d = 0; d < p->D; d++) {
                    const double before = get(from, old, b, h, c, d);
                    row[d] = count ? decay * before + (1 - decay) * mean[d] / (double)count : before;
                    square += row[d] * row[d];
                }
                for (int64_t d = 0; d < p->D; d++) {
                    const double want = count ? row[d] / sqrt(square) : row[d];
                    const double got = get(f, &p->new_centroids, b, h, c, d);
                    CHECK(fabs(got - want) <= slack, "centroid %lld [%lld] is %.17g, not %.17g: %s", (long long)c,
                          (long long)d, got, want, context);
                }
            }
}

/* Sizes around those of tiles, chunks, blocks of rows and samples. */
static const int64_t sizes[][3] = {{1, 1, 1},   {2, 3, 2},     {63, 5, 4},  {64, 16, 64},
                                   {65, 17, 7}, {130, 33, 97}, {513, 8, 20}};

static void definition(void) {
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int dtype = 0; dtype < 2; dtype++) {
            request asked = {
                .dtype = (cmb_dtype)dtype, .B = 1, .H = 2, .L = sizes[i][0], .D = sizes[i][1], .n = sizes[i][2]};
            const double slack = dtype == CMB_FLOAT32 ? 1e-5 : 1e-13; /* the rounding of D terms and of directions */
            fixture *f = new_fixture(asked);
            double *similarity = calloc((size_t)(asked.L * asked.n), sizeof *similarity);
            CHECK(similarity);
            CASE("L %lld D %lld n %lld dtype %d", (long long)asked.L, (long long)asked.D, (long long)asked.n, dtype);
            for (which_call which = ASSIGN; which <= ASSIGN_BALANCED; which++) {
                run(f, which);
                for (int64_t h = 0; h < 2; h++) {
                    similarities(f, &f->problem.centroids, 0, h, similarity);
                    if (which == ASSIGN)
                        check_assigned(f, similarity, f->problem.clusters + h * asked.L, slack);
                    else if (dtype == CMB_FLOAT64)
                        check_balanced(f, similarity, f->problem.clusters + h * asked.L);
                }
            }
            run(f, UPDATE);
            check_moved(f, f, &f->problem.centroids, 0.75, 100 * slack);
            free(similarity);
            free_fixture(f);
        }
}

/* The first centroids are rows, no two the same if the rows differ. A round is an assignment and an update of decay 0.
 * The clusters are the assignment to the last centroids. */
static void rounds(void) {
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        request asked = {.dtype = CMB_FLOAT64, .B = 1, .H = 2, .L = sizes[i][0], .D = sizes[i][1], .n = sizes[i][2]};
        fixture *f = new_fixture(asked), *g = new_fixture(asked);
        CASE("rounds L %lld D %lld n %lld", (long long)asked.L, (long long)asked.D, (long long)asked.n);
        CHECK(cmb_cluster(&f->problem, 0, 9, false, NULL, NULL) == CMB_OK);
        for (int64_t h = 0; h < 2; h++)
            for (int64_t c = 0, used = -1; c < asked.n; c++, used = -1) {
                double row[64];
                for (int64_t x = 0; x < asked.L && used < 0; x++) {
                    double off = 0;
                    direction(f, &f->problem.x, 0, h, x, row);
                    for (int64_t d = 0; d < asked.D; d++)
                        off = fmax(off, fabs(row[d] - get(f, &f->problem.new_centroids, 0, h, c, d)));
                    used = off < 1e-14 ? x : -1;
                }
                CHECK(used >= 0, "centroid %lld is no row: %s", (long long)c, context);
                CHECK(asked.D == 1 || f->problem.clusters[h * asked.L + used] == c, "centroid %lld is not its own: %s",
                      (long long)c, context);
            }
        for (int64_t round = 1; round <= 3; round++) {
            /* g: the centroids one round after f's, which f's clusters belong to */
            CHECK(cmb_cluster(&g->problem, round, 9, false, NULL, NULL) == CMB_OK);
            memcpy(g->problem.clusters, f->problem.clusters, f->block[3].bytes);
            check_moved(g, f, &f->problem.new_centroids, 0, 1e-12);
            CHECK(cmb_cluster(&f->problem, round, 9, false, NULL, NULL) == CMB_OK);
            fixture *again = new_fixture(asked);
            again->problem.centroids = f->problem.new_centroids;
            CHECK(cmb_assign(&again->problem, false, NULL, NULL) == CMB_OK);
            CHECK(memcmp(again->problem.clusters, f->problem.clusters, f->block[3].bytes) == 0, "%s", context);
            free_fixture(again);
        }
        free_fixture(f);
        free_fixture(g);
    }
}

/* Rows and centroids without a direction, of zeros, NaN or Inf; and some whose squares leave the range of the type. */
static void no_direction(void) {
    for (int dtype = 0; dtype < 2; dtype++) {
        request asked = small;
        asked.dtype = (cmb_dtype)dtype;
        const double odd[] = {0, NAN, INFINITY, -INFINITY, dtype ? 1e300 : 1e38, dtype ? 1e-310 : 1e-40};
        fixture *f = new_fixture(asked);
        const cmb_clustering *p = &f->problem;
        CASE("no direction, dtype %d", dtype);
        for (int64_t h = 0; h < p->H; h++)
            for (int kind = 0; kind < 6; kind++)
                for (int64_t d = 0; d < p->D; d++) {
                    put(f, &p->x, 1, h, 10 * kind, d, kind && d ? odd[kind] / 3 : odd[kind]);
                    if (kind == 1 || kind == 2)
                        put(f, &p->centroids, 1, h, kind, d, odd[kind]);
                }
        for (which_call which = 0; which < CALLS; which++) {
            run(f, which);
            for (int64_t i = 0; i < p->B * p->H * p->L; i++)
                CHECK(p->clusters[i] >= 0 && p->clusters[i] < p->n, "%s", context);
            if (which == UPDATE)
                continue;
            for (int kind = 0; kind < 4 && (which == CLUSTER || which == ASSIGN); kind++)
                CHECK(p->clusters[(p->H + 1) * p->L + 10 * kind] == 0, "kind %d: %s", kind, context);
            for (int64_t c = 0; c < p->n && which <= FIT; c++)
                CHECK(isfinite(get(f, &p->new_centroids, 1, 1, c, 0)), "%s", context);
        }
        for (int64_t c = 1; c <= 2; c++) /* stay as they are */
            for (int64_t d = 0; d < p->D; d++)
                CHECK(memcmp(element(f, &p->new_centroids, 1, 0, c, d), element(f, &p->centroids, 1, 0, c, d),
                             f->size) == 0);
        free_fixture(f);
    }
}

static void empty(void) {
    static const int64_t counts[][3] = {{0, 2, 70}, {2, 0, 70}, {2, 2, 0}, {0, 0, 0}};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        for (which_call which = 0; which < CALLS; which++) {
            request asked = small;
            asked.B = counts[i][0];
            asked.H = counts[i][1];
            asked.L = counts[i][2];
            CASE("empty %zu call %d", i, (int)which);
            fixture *f = new_fixture(asked);
            run(f, which);
            if (which != ASSIGN && which != ASSIGN_BALANCED && asked.L == 0)
                for (int64_t c = 0; c < asked.n && asked.B && asked.H; c++)
                    CHECK(get(f, &f->problem.new_centroids, 1, 1, c, 0) ==
                              (which == UPDATE ? get(f, &f->problem.centroids, 1, 1, c, 0) : 0),
                          "%s", context);
            free_fixture(f);
        }
}

/* ---- bits --------------------------------------------------------------------------------------- */

static void layouts(void) {
    for (which_call which = 0; which < CALLS; which++)
        for (int way = 1; way < 4; way++) {
            request asked = large, other = large;
            other.rows_first = way & 1;
            other.backwards = way & 2;
            CASE("layout %d call %d", way, (int)which);
            fixture *f = new_fixture(asked), *g = new_fixture(other), *fresh = new_fixture(other);
            run(f, which);
            run(g, which);
            if (which < ASSIGN || which == UPDATE)
                check_same(f, g);
            else
                CHECK(memcmp(f->problem.clusters, g->problem.clusters, f->block[3].bytes) == 0, "%s", context);
            for (int i = 0; i < 2; i++)
                CHECK(memcmp(g->block[i].memory, fresh->block[i].memory, g->block[i].bytes) == 0,
                      "an input was written: %s", context);
            free_fixture(f);
            free_fixture(g);
            free_fixture(fresh);
        }
}

static void threads(void) {
    static const int counts[] = {2, 3, 7};
    for (which_call which = 0; which < CALLS; which++) {
        fixture *f = new_fixture(large);
        CHECK(cmb_set_num_threads(1, NULL) == CMB_OK);
        run(f, which);
        for (int n = 0; n < 3; n++) {
            fixture *g = new_fixture(large);
            CASE("call %d threads %d", (int)which, counts[n]);
            CHECK(cmb_set_num_threads(counts[n], NULL) == CMB_OK);
            run(g, which);
            check_same(f, g);
            free_fixture(g);
        }
        free_fixture(f);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

static void instruction_sets(void) {
    for (which_call which = 0; which < CALLS; which++)
        for (int dtype = 0; dtype < 2; dtype++) {
            request asked = large;
            asked.dtype = (cmb_dtype)dtype;
            asked.D = 21;
            fixture *known = NULL; /* the results of the lowest instruction set with FMA */
            for (int isa = cmb_isa_count() > 1; isa < cmb_isa_count(); isa++) {
                CHECK(cmb_set_isa(cmb_isa_name(isa), NULL) == CMB_OK);
                CASE("call %d dtype %d isa %s", (int)which, dtype, cmb_get_isa());
                fixture *f = new_fixture(asked);
                run(f, which);
                if (known)
                    check_same(known, f);
                else
                    known = f;
                if (f != known)
                    free_fixture(f);
            }
            free_fixture(known);
        }
}

/* A head alone has the bits that it has among others, even among more heads than are in flight at once. */
static void company(void) {
    request asked = small;
    asked.dtype = CMB_FLOAT32;
    asked.B = 600;
    CASE("company");
    for (which_call which = 0; which < UPDATE; which++) {
        fixture *all = new_fixture(asked);
        request alone = asked;
        alone.B = alone.H = 1;
        fixture *one = new_fixture(alone);
        one->problem.x.data = element(all, &all->problem.x, 599, 1, 0, 0);
        one->problem.centroids.data = element(all, &all->problem.centroids, 599, 1, 0, 0);
        run(all, which);
        run(one, which);
        if (which != FIT)
            CHECK(memcmp(one->problem.clusters, all->problem.clusters + 1199 * asked.L, one->block[3].bytes) == 0,
                  "call %d", (int)which);
        if (which < ASSIGN)
            CHECK(memcmp(one->problem.new_centroids.data, element(all, &all->problem.new_centroids, 599, 1, 0, 0),
                         one->block[2].bytes) == 0,
                  "call %d", (int)which);
        free_fixture(all);
        free_fixture(one);
    }
}

/* ---- errors ------------------------------------------------------------------------------------- */

static void expect(const fixture *f, which_call which, cmb_status status, const char *words) {
    cmb_error error = {0};
    const cmb_status got = call(f, which, NULL, &error);
    CHECK(got == status, "%d, not %d: \"%s\" for \"%s\"", got, status, error.message, words);
    CHECK(error.status == status && strstr(error.message, words), "\"%s\" for \"%s\"", error.message, words);
    CHECK(call(f, which, NULL, NULL) == status);
}

/* Changes a good problem, expects an error with these words, and undoes the change. */
#define WRONG(which, status, words, ...)           \
    do {                                           \
        const cmb_clustering good_ = f->problem;   \
        __VA_ARGS__;                               \
        expect(f, which, CMB_ERR_##status, words); \
        f->problem = good_;                        \
    } while (0)

static void wrong_arguments(void) {
    fixture *f = new_fixture(small), *fresh = new_fixture(small);
    cmb_clustering *p = &f->problem;
    memset(p->clusters, 0, f->block[3].bytes);
    memset(fresh->problem.clusters, 0, f->block[3].bytes);
    for (which_call which = 0; which < CALLS; which++) {
        WRONG(which, VALUE, "dtype must be CMB_FLOAT32 or CMB_FLOAT64, got 7", memset(&p->dtype, 0, sizeof p->dtype);
              memset(&p->dtype, 7, 1));
        WRONG(which, VALUE, "B must be between 0 and 9223372036854775807, got -1", p->B = -1);
        WRONG(which, VALUE, "H must be between 0 and", p->H = -1);
        WRONG(which, VALUE, "L must be between 0 and 1073741824, got -1", p->L = -1);
        WRONG(which, VALUE, "L must be between 0 and 1073741824, got 1073741825", p->L = (INT64_C(1) << 30) + 1);
        WRONG(which, VALUE, "n must be between 1 and 1073741824, got 0", p->n = 0);
        WRONG(which, VALUE, "D must be between 1 and 1024, got 0", p->D = 0);
        WRONG(which, VALUE, "D must be between 1 and 1024, got 1025", p->D = 1025);
        WRONG(which, OVERFLOW, "B * H * L does not fit", p->B = INT64_MAX);
        WRONG(which, VALUE, "x is missing", p->x.data = NULL);
        WRONG(which, VALUE, "x must have 2 heads, got 3", p->x.heads = 3);
        WRONG(which, OVERFLOW, "x spans more than can be addressed", p->x.row = INT64_MAX / 4);
        if (which <= FIT)
            WRONG(which, VALUE, "n must be at most the length of x, 70, got 71", p->n = 71);
        if (which > FIT) {
            WRONG(which, VALUE, "centroids is missing", p->centroids.data = NULL);
            WRONG(which, OVERFLOW, "centroids spans more than", p->centroids.head = INT64_MIN);
            WRONG(which, VALUE, "clusters is missing", p->clusters = NULL);
        }
        if (which <= FIT || which == UPDATE)
            WRONG(which, VALUE, "new_centroids must have 2 heads, got 1", p->new_centroids.heads = 1);
    }
    WRONG(UPDATE, VALUE, "new_centroids is missing", p->new_centroids.data = NULL);
    static const double decays[] = {NAN, -0.1, 1.1};
    for (int i = 0; i < 3; i++) {
        cmb_error error = {0};
        CHECK(cmb_update_centroids(p, decays[i], NULL, &error) == CMB_ERR_VALUE);
        CHECK(strstr(error.message, "decay must be between 0 and 1, got "), "%s", error.message);
    }
    cmb_error error = {0};
    CHECK(cmb_cluster(p, -1, 0, false, NULL, &error) == CMB_ERR_VALUE);
    CHECK(strstr(error.message, "iterations must be between 0 and"), "%s", error.message);
    for (int i = 0; i < 2; i++) {
        p->clusters[2 * 70 + 11] = i ? 6 : -1;
        expect(f, UPDATE, CMB_ERR_VALUE,
               i ? "clusters must lie between 0 and 5, got 6 at position 11"
                 : "clusters must lie between 0 and 5, got -1 at position 11");
    }
    p->clusters[2 * 70 + 11] = 0;
    for (int i = 0; i < 4; i++)
        CHECK(memcmp(f->block[i].memory, fresh->block[i].memory, f->block[i].bytes) == 0, "an error wrote to array %d",
              i);
    free_fixture(f);
    free_fixture(fresh);
}

/* A call takes one block before its first store and releases it. If there is no memory, nothing is written. */
static void memory(void) {
    for (which_call which = 0; which < CALLS; which++) {
        fixture *f = new_fixture(large), *fresh = new_fixture(large);
        test_heap heap = {.fail = 1};
        cmb_error error = {0};
        CASE("memory of call %d", (int)which);
        memset(f->problem.clusters, 0, f->block[3].bytes);
        memset(fresh->problem.clusters, 0, f->block[3].bytes);
        test_heap_use(&heap);
        CHECK(call(f, which, NULL, &error) == CMB_ERR_MEMORY && strstr(error.message, "no memory for a workspace"),
              "%s: %s", error.message, context);
        for (int i = 0; i < 4; i++)
            CHECK(memcmp(f->block[i].memory, fresh->block[i].memory, f->block[i].bytes) == 0,
                  "array %d was written: %s", i, context);
        heap.fail = 0;
        run(f, which);
        CHECK(heap.calls == 2 && heap.live == 0 && heap.peak > 0, "%s", context);
        test_heap_use(NULL);
        run(fresh, which);
        check_same(f, fresh);
        free_fixture(f);
        free_fixture(fresh);
    }
}

/* ---- cancelling --------------------------------------------------------------------------------- */

/* A call of seconds ends soon after its poll asks for it, and the next call is right. */
static void cancel(void) {
    enum { TIMES = 2000 };
    const request asked = {.dtype = CMB_FLOAT64, .B = 1, .H = 1, .L = 2000, .D = 32, .n = 500};
    fixture *f = new_fixture(asked), *right = new_fixture(large);
    f->problem.B = TIMES; /* entries, which are all the same */
    f->problem.x.batch = f->problem.centroids.batch = 0;
    f->problem.new_centroids.data = NULL;
    free(f->block[3].memory);
    f->block[3].memory = f->problem.clusters = calloc(TIMES, f->block[3].bytes);
    CHECK(f->problem.clusters);
    run(right, CLUSTER);
    for (int count = 1; count <= 3; count += 2)
        for (which_call which = 0; which < UPDATE; which++) {
            poller state = {pthread_self(), 0, 3};
            const cmb_interrupt interrupt = {poll_caller, &state};
            cmb_error error = {0};
            test_heap heap = {0};
            CASE("cancel of call %d with %d threads", (int)which, count);
            CHECK(cmb_set_num_threads(count, NULL) == CMB_OK);
            test_heap_use(&heap);
            const double start = seconds();
            const cmb_status status = call(f, which, &interrupt, &error);
            const double took = seconds() - start;
            test_heap_use(NULL);
            CHECK(status == CMB_ERR_CANCELLED && strcmp(error.message, "cancelled") == 0, "%d: %s", status, context);
            CHECK(state.polls == 3 && heap.live == 0, "%s", context);
            CHECK(took < 5, "%.2f s: %s", took, context); /* 0.2 s on an idle machine */
            fixture *g = new_fixture(large);
            state = (poller){pthread_self(), 0, 0}; /* a poll that never stops changes nothing */
            CHECK(call(g, CLUSTER, &interrupt, NULL) == CMB_OK);
            check_same(right, g);
            free_fixture(g);
        }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
    free_fixture(f);
    free_fixture(right);
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(definition),       TEST(rounds),  TEST(no_direction),    TEST(empty),  TEST(layouts), TEST(threads),
        TEST(instruction_sets), TEST(company), TEST(wrong_arguments), TEST(memory), TEST(cancel),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

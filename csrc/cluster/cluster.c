// SPDX-License-Identifier: Apache-2.0
/* Spherical k-means, which makes the clusters of Routing: random numbers, checks and entry points. cluster.inc.h
 * computes, for each type. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels/kernels.h"
#include "runtime/arena.h"
#include "runtime/array.h"
#include "runtime/memory.h"
#include "runtime/threads.h"

typedef enum { CLUSTER, ASSIGN, UPDATE } operation;

typedef struct {
    const cmb_clustering *problem;
    operation operation;
    int64_t iterations;
    uint64_t seed;
    double decay;
    bool balanced;
    const cmb_interrupt *interrupt;
} request;

enum {
    LANES = 64,      /* rows whose similarities are computed together */
    SAMPLE = 16,     /* rows for each cluster that k-means++ chooses from */
    TASK_ROWS = 512, /* rows of a block, which one task handles */
    ROWS_BETWEEN_POLLS = 1 << 16,
};

/* Below this many multiply-adds, waking a thread costs more than it gives (about 20 us). */
static const double worth_a_thread = 1 << 22;

/* Heads in flight share every phase's barrier and the outer cache: a phase finds there what the phase before has read.
 */
static const int64_t bytes_in_flight = 12 << 20;

/* ---- random numbers ----------------------------------------------------------------------------- */

static uint64_t mix(uint64_t x) { /* the finalizer of splitmix64 */
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* The counter-th number: what is drawn for one row or cluster depends on no other one. */
static uint64_t draw(uint64_t seed, int64_t counter) {
    const uint64_t step = UINT64_C(0x9e3779b97f4a7c15);
    return mix(mix(seed + step) + (uint64_t)(counter + 1) * step);
}

/* ---- for each type ------------------------------------------------------------------------------ */

#define PASTE2(a, b) a##_##b
#define NAME2(a, b) PASTE2(a, b)

#define REAL float
#define BITS uint32_t
#define SUFFIX f32
#include "cluster/cluster.inc.h"

#undef REAL
#undef BITS
#undef SUFFIX
#define REAL double
#define BITS uint64_t
#define SUFFIX f64
#include "cluster/cluster.inc.h"

/* ---- checks ------------------------------------------------------------------------------------- */

static cmb_status check_clusters(const cmb_clustering *p, cmb_error *error) {
    const int64_t count = p->B * p->H * p->L;
    for (int64_t i = 0; i < count; i++)
        if (p->clusters[i] < 0 || p->clusters[i] >= p->n)
            return cmb_fail(error, CMB_ERR_VALUE, "clusters must lie between 0 and %lld, got %lld at position %lld",
                            (long long)p->n - 1, (long long)p->clusters[i], (long long)(i % p->L));
    return CMB_OK;
}

static cmb_status check_request(const request *r, cmb_error *error) {
    const cmb_clustering *p = r->problem;
    const int64_t most = INT64_C(1) << 30;
    if (!p)
        return cmb_fail(error, CMB_ERR_VALUE, "problem is missing");
    if (p->dtype != CMB_FLOAT32 && p->dtype != CMB_FLOAT64)
        return cmb_fail(error, CMB_ERR_VALUE, "dtype must be CMB_FLOAT32 or CMB_FLOAT64, got %d", (int)p->dtype);
    const struct {
        const char *name;
        int64_t value, least, most;
    } sizes[] = {
        {"B", p->B, 0, INT64_MAX}, {"H", p->H, 0, INT64_MAX},        {"L", p->L, 0, most},
        {"n", p->n, 1, most},      {"D", p->D, 1, CMB_MAX_FEATURES}, {"iterations", r->iterations, 0, INT64_MAX},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < sizes[i].least || sizes[i].value > sizes[i].most)
            return cmb_fail(error, CMB_ERR_VALUE, "%s must be between %lld and %lld, got %lld", sizes[i].name,
                            (long long)sizes[i].least, (long long)sizes[i].most, (long long)sizes[i].value);
    if (r->operation == CLUSTER && p->L > 0 && p->n > p->L)
        return cmb_fail(error, CMB_ERR_VALUE, "n must be at most the length of x, %lld, got %lld", (long long)p->L,
                        (long long)p->n);
    if (!(r->decay >= 0 && r->decay <= 1))
        return cmb_fail(error, CMB_ERR_VALUE, "decay must be between 0 and 1, got %g", r->decay);
    int64_t heads, rows;
    if (__builtin_mul_overflow(p->B, p->H, &heads) || __builtin_mul_overflow(heads, p->L, &rows))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "B * H * L does not fit in 64 bits");
    TRY(cmb_check_array("x", &p->x, p->B, p->H, p->L, p->D, error));
    if (r->operation != CLUSTER)
        TRY(cmb_check_array("centroids", &p->centroids, p->B, p->H, p->n, p->D, error));
    if (r->operation == UPDATE || (r->operation == CLUSTER && p->new_centroids.data))
        TRY(cmb_check_array("new_centroids", &p->new_centroids, p->B, p->H, p->n, p->D, error));
    if (r->operation != CLUSTER && !p->clusters)
        return cmb_fail(error, CMB_ERR_VALUE, "clusters is missing");
    return r->operation == UPDATE ? check_clusters(p, error) : CMB_OK;
}

/* ---- entry points ------------------------------------------------------------------------------- */

static cmb_status execute(const request *r, cmb_error *error) {
    TRY(check_request(r, error));
    const cmb_clustering *p = r->problem;
    /* There may be any number of heads without positions; then centroids alone are written. */
    if (p->B == 0 || p->H == 0 || (p->L == 0 && !p->new_centroids.data))
        return CMB_OK;
    return p->dtype == CMB_FLOAT32 ? execute_f32(r, error) : execute_f64(r, error);
}

cmb_status cmb_cluster(const cmb_clustering *problem, int64_t iterations, uint64_t seed, bool balanced,
                       const cmb_interrupt *interrupt, cmb_error *error) {
    const request r = {.problem = problem,
                       .operation = CLUSTER,
                       .iterations = iterations,
                       .seed = seed,
                       .balanced = balanced && problem && problem->clusters,
                       .interrupt = interrupt};
    return execute(&r, error);
}

cmb_status cmb_assign(const cmb_clustering *problem, bool balanced, const cmb_interrupt *interrupt, cmb_error *error) {
    const request r = {.problem = problem, .operation = ASSIGN, .balanced = balanced, .interrupt = interrupt};
    return execute(&r, error);
}

cmb_status cmb_update_centroids(const cmb_clustering *problem, double decay, const cmb_interrupt *interrupt,
                                cmb_error *error) {
    const request r = {.problem = problem, .operation = UPDATE, .decay = decay, .interrupt = interrupt};
    return execute(&r, error);
}

// SPDX-License-Identifier: Apache-2.0
/*
 * Combiner: full attention at sub-quadratic cost (Ren et al., NeurIPS 2021), the C library.
 *
 * Letters, used everywhere:
 *   B   batch entries            L   positions (0-based)       D   features of query and key
 *   Hq  query heads              R   regions of one plan       Dv  features of value
 *   Hk  key / value heads        N   scratch rows of one task  i, j, r   query, key, region
 *
 * One table of L + R + N rows serves every factorization: rows 0..L-1 are the positions' own keys,
 * values and queries; rows L..L+R-1 are the regions' abstractions k_R, expectations h_R and queries q_R;
 * rows L+R.. are scratch for pooling. Summarising and attending are then the same operation: some
 * queries attend a list of table rows under a mask. A plan lists those operations.
 *
 * Every function may be called from any thread at any time. Inputs are never written. A function that
 * can fail returns a cmb_status and, where `error` is not NULL, says in it which argument was wrong,
 * what it was and what was expected; nothing is written to an output before every check has passed and
 * all memory has been taken.
 */
#ifndef COMBINER_H
#define COMBINER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CMB_VERSION "0.1.0"

/* ---- status ------------------------------------------------------------------------------------- */

typedef enum {
    CMB_OK = 0,
    CMB_ERR_MEMORY = -1,    /* an allocation failed */
    CMB_ERR_VALUE = -2,     /* an argument is out of its range or does not fit the others */
    CMB_ERR_OVERFLOW = -3,  /* a size cannot be addressed */
    CMB_ERR_CANCELLED = -4, /* the caller's poll asked to stop; outputs hold unspecified values */
} cmb_status;

typedef struct {
    cmb_status status;
    char message[240]; /* "span must be at least 1, got 0" */
} cmb_error;

/* ---- plans -------------------------------------------------------------------------------------- */

typedef enum {
    CMB_POOL_MAX,  /* per feature; ties go to the first child; a NaN child makes NaN */
    CMB_POOL_MEAN, /* over positions: a child weighs as many positions as lie unmasked below it */
    CMB_POOL_SUM,
    CMB_POOL_FIRST, /* the first child with an unmasked position below it: a pick, an alias, no copy */
} cmb_pooling;

/* Table rows start, start + step, ...; with step == 0, index[start], index[start + 1], ... */
typedef struct {
    int32_t start, step, count;
} cmb_list;

/* Writes the abstraction (q_R and k_R) of `row`, L <= row < L + R + N, from its children: positions, or
 * rows pooled earlier, in position order. Scratch rows live as long as their task, which writes each once. */
typedef struct {
    int32_t row;
    cmb_list child;
} cmb_pool;

/* Table rows (never scratch) that a tile's queries attend. `mask` < 0: every query sees every row; else
 * bit t of mask[mask + n] says whether query t of the tile sees the n-th row of the list. */
typedef struct {
    cmb_list row;
    int32_t mask;
} cmb_run;

/* Up to `width` queries, all positions (< L: attend) or all regions (>= L: summarise), and the runs they
 * attend: runs [run, next tile's run). A query met again in a later tile resumes its online softmax.
 * `width` is 16, 32, 48 or 64 lanes, or 1: the row kernel, whose sums over features run in another
 * order, so that a plan, and never the count, decides which arithmetic a row gets. */
typedef struct {
    cmb_list query;
    int32_t run;
    int32_t width;
} cmb_tile;

/* Its pool steps [pool, next task's pool), then its tiles [tile, next task's tile), in order. */
typedef struct {
    int32_t pool, tile;
} cmb_task;

/* A plan is data: immutable once made. Tasks of one wave do not depend on one another: no two write one
 * row, and what they read was written in an earlier wave or by themselves. Backward is the same list in
 * reverse. */
typedef struct {
    int64_t L;
    int32_t R, N;
    bool is_causal;
    bool size_bias; /* log of the unmasked positions below a region joins its logit */
    bool weighted;  /* k_R = sum_j p(j|R) k_j in place of the pool; per query head then */
    cmb_pooling pooling;
    bool is_fusible; /* tasks may go through all waves in turn; found where plans are made, false is always right */
    int32_t waves, tasks, pools, tiles, runs;
    int32_t indices, masks;
    const int32_t *wave;  /* [waves + 1] first task */
    const cmb_task *task; /* [tasks + 1] */
    const cmb_pool *pool; /* [pools] */
    const cmb_tile *tile; /* [tiles + 1]; of the last only `run` is read */
    const cmb_run *run;   /* [runs] */
    const int32_t *index; /* [indices] */
    const uint64_t *mask; /* [masks] */
    /* Where plans are made it is found which q_R only the task that pools it needs: ~n, the n-th of its task's, of
     * which there are at most `own_queries`; any other is row n of `shared_queries`. NULL: of each region, row r. */
    const int32_t *query_row; /* [R] */
    int32_t own_queries, shared_queries;
    const int32_t *pick; /* [R] found too, with CMB_POOL_FIRST: the picks where no position is masked. Else NULL */
    bool resumes;        /* found too: some position is a query of more than one tile */
    bool only_attends;   /* found too: regions, without a pool in the plan. They must be given: for CMB_ATTEND alone */
} cmb_plan;

typedef struct {
    bool is_causal;
    bool sparse; /* the sparse baseline: direct keys only, R = 0 */
    bool size_bias;
    cmb_pooling pooling;
} cmb_plan_options;

/* Builders, one per factorization (spec: "Factorizations"). Each returns a new plan in *plan, to be given
 * to cmb_plan_free, or leaves NULL there. 0 <= L <= 2^30. */
cmb_status cmb_plan_dense(int64_t L, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error);
cmb_status cmb_plan_fixed(int64_t L, int64_t span, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error);
cmb_status cmb_plan_logsparse(int64_t L, bool hierarchical, const cmb_plan_options *options, cmb_plan **plan,
                              cmb_error *error);

typedef enum {
    CMB_AXIAL_VERTICAL,   /* the other columns, above the own row (and below it) */
    CMB_AXIAL_HORIZONTAL, /* the other rows, without the own column */
    CMB_AXIAL_ROWMAJOR,   /* the other rows, whole, each with the query and key it has in the own column: no pooling */
} cmb_axial_order;

/* Positions lie row by row, `width` to a row. weighted: rowmajor's keys are sum_j p(j|R) k_j, not picked. */
cmb_status cmb_plan_axial(int64_t L, int64_t width, cmb_axial_order order, bool weighted,
                          const cmb_plan_options *options, cmb_plan **plan, cmb_error *error);
/* Vertical's regions and the rows' parts on both sides of the own column, in one softmax. */
cmb_status cmb_plan_axial_mixture(int64_t L, int64_t width, const cmb_plan_options *options, cmb_plan **plan,
                                  cmb_error *error);
/* Nodes of level t hold branching^t positions; levels == 0: until one node covers L. branching >= 2. */
cmb_status cmb_plan_tree(int64_t L, int64_t branching, int64_t levels, const cmb_plan_options *options, cmb_plan **plan,
                         cmb_error *error);
/* cluster[i], 0 <= cluster[i] < 2^30, is the cluster of position i. Memory grows with the largest one. */
cmb_status cmb_plan_routing(int64_t L, const int64_t *cluster, const cmb_plan_options *options, cmb_plan **plan,
                            cmb_error *error);

/* Integer lists in one array: list n is item[offset[n] .. offset[n + 1]). */
typedef struct {
    int64_t count;
    const int64_t *offset; /* [count + 1] */
    const int64_t *item;
} cmb_lists;

/* What a query's parts must cover of its support, repeats counted. */
typedef enum {
    CMB_COVER_ANY,       /* what they like */
    CMB_COVER_FULL,      /* every position at least once */
    CMB_COVER_PARTITION, /* every position exactly once */
} cmb_cover;

/* A user's own factorization: direct key positions and region numbers of every query (both of L lists),
 * and the members of every region: positions, or L + r for an earlier region r. A position outside the
 * support, a member not listed before, or a query whose parts do not cover what they must is CMB_ERR_VALUE
 * naming the first offending query and key. Costs as much as cmb_plan_measure. */
cmb_status cmb_plan_from_parts(int64_t L, const cmb_lists *direct, const cmb_lists *regions, const cmb_lists *members,
                               cmb_cover cover, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error);

/* A copy of a plan given as arrays, after cmb_plan_check. */
cmb_status cmb_plan_from_arrays(const cmb_plan *arrays, cmb_plan **plan, cmb_error *error);

void cmb_plan_free(cmb_plan *plan);

/* Everything the engine relies on: bounds, order, single writers. CMB_ERR_VALUE says what is broken. */
cmb_status cmb_plan_check(const cmb_plan *plan, cmb_error *error);

typedef struct {
    int64_t attend_pairs;    /* sum over queries of direct keys and regions */
    int64_t summarize_pairs; /* the same of the regions' own softmaxes */
    int64_t computed_pairs;  /* both, with the lanes that masks and widths leave idle: what the tiles cost */
    bool is_partition;       /* every query's support exactly once */
    bool is_full;            /* at least once */
} cmb_plan_facts;

/* Costs O(pairs), and O(pairs L / 64) where a plan covers the support more than once; nothing is cached. */
cmb_status cmb_plan_measure(const cmb_plan *plan, cmb_plan_facts *facts, cmb_error *error);

size_t cmb_plan_bytes(const cmb_plan *plan);

/* ---- attention ---------------------------------------------------------------------------------- */

/* Of the 16-bit ones rows are read and written; what is computed, and every lse, is float32. */
typedef enum { CMB_FLOAT32, CMB_FLOAT64, CMB_BFLOAT16, CMB_FLOAT16 } cmb_dtype;

/* A strided array [B, heads, rows, features] with contiguous features; strides count elements and may be
 * zero or negative. Arrays without a feature axis (lse) have `row` as their last. An array with Hk heads
 * serves query head h with head h / (Hq / Hk). data == NULL: absent. */
typedef struct {
    void *data;
    int64_t heads;
    int64_t batch, head, row;
} cmb_array;

typedef enum {
    CMB_SUMMARIZE = 1, /* stage 1: k_R, h_R of every region that some query attends */
    CMB_ATTEND = 2,    /* stage 2: given summary_key and summary_value */
    CMB_BOTH = 3,
} cmb_stages;

typedef struct {
    cmb_dtype dtype;
    cmb_stages stages;
    int64_t B, Hq, Hk, L, D, Dv;
    double scale;
    bool adds; /* forward to `out`, backward to the gradients of query, key and value: they hold numbers already. Each
                * head's are complete before they are added, once. Not of 16-bit dtypes, whose sums would be rounded */

    /* Packed sequences: positions segment[s] <= i < segment[s + 1] are computed as if they were alone, with a plan of
     * their own length, in each batch entry; their regions follow those of the segments before. */
    int64_t segments;       /* 0: one of all L positions */
    const int64_t *segment; /* [segments + 1], from 0 to L, not decreasing */

    const cmb_plan *const *plan; /* [segments] or [segments, B, Hk]; same pooling and flags in all */
    int64_t plans;
    cmb_array query, key, value; /* [B, Hq, L, D], [B, Hk, L, D], [B, Hk, L, Dv] */

    const uint8_t *key_mask; /* [B, L], 0 = leave out: such a key, value and pooled query is never read; or NULL */
    int64_t mask_batch, mask_row;

    cmb_array region_query; /* [B, Hq, R, D] in place of the pooled q_R, or absent */
    cmb_array region_key;   /* [B, Hk or Hq, R, D] in place of k_R, or absent */

    /* Weight p of stage 2, of query i in its segment and table row n, becomes p / (1 - dropout_p) if u >= dropout_p,
     * else 0: u is 24 bits of word n' mod 4 of Philox4x32-10 with counter (n' div 4, i, h, b), n' = n + dropout_row[s],
     * and the seed as key. lse does not know of it. */
    double dropout_p; /* 0 <= dropout_p <= 1 */
    uint64_t seed;
    const int64_t *dropout_row; /* [segments]; NULL: 0 */

    /* The regions' rows, R the sum over segments of the largest of their plans'. Rows no query attends hold zeros (lse
     * -inf).
     *   forward SUMMARIZE  writes all three
     *   forward ATTEND     reads key and value; lse is not used
     *   forward BOTH       writes those present: value and lse, and key where the plan is weighted, are
     *                      what backward needs
     *   backward           reads value; lse but for ATTEND; key for ATTEND and where the plan is weighted */
    cmb_array summary_key;   /* [B, Hk or Hq, R, D] */
    cmb_array summary_value; /* [B, Hq, R, Dv] */
    cmb_array summary_lse;   /* [B, Hq, R] */

    cmb_array out; /* [B, Hq, L, Dv]; written by forward, read by backward; not for SUMMARIZE */
    cmb_array lse; /* [B, Hq, L] natural log of the normaliser, -inf where nothing is attended; with out */
} cmb_problem;

/* Gradients of one scalar. Those read: out and lse (lse may be absent), or for SUMMARIZE summary_key and
 * summary_value (each may be absent). Those written: query, key, value (all required), region_query and
 * region_key where they were given, and for ATTEND summary_key and summary_value. Shapes as in cmb_problem. */
typedef struct {
    cmb_array out, lse;
    cmb_array summary_key, summary_value;
    cmb_array query, key, value;
    cmb_array region_query, region_key;
} cmb_gradients;

/* Called from the calling thread alone, at least every 50 ms or between two chunks of one tile; true asks
 * to stop. A NULL poll never stops. */
typedef struct {
    bool (*poll)(void *context);
    void *context;
} cmb_interrupt;

cmb_status cmb_forward(const cmb_problem *problem, const cmb_interrupt *interrupt, cmb_error *error);
cmb_status cmb_backward(const cmb_problem *problem, const cmb_gradients *gradients, const cmb_interrupt *interrupt,
                        cmb_error *error);

/* Bytes that the call takes at most, and takes before its first store. */
cmb_status cmb_workspace_bytes(const cmb_problem *problem, bool backward, size_t *bytes, cmb_error *error);

/* ---- clusters ----------------------------------------------------------------------------------- */

/* The rows of x in n clusters, for each head of each batch entry alone. A row's direction is the row at unit
 * length; a row of zeros, or with a NaN or Inf, has none: it is as similar, 0, to every centroid, and moves none. The
 * similarity of a row and a centroid is the dot product of their directions. */
typedef struct {
    cmb_dtype dtype;
    int64_t B, H, L, D, n;
    cmb_array x;             /* [B, H, L, D] */
    cmb_array centroids;     /* [B, H, n, D]: read by assign and update */
    cmb_array new_centroids; /* [B, H, n, D]: written by cluster, or absent there, and by update */
    int64_t *clusters; /* [B, H, L] without gaps: written by cluster, or NULL there, and by assign; read by update */
} cmb_clustering;

/* Spherical k-means: k-means++ of `seed` among a sample of at most 16 n rows, then `iterations` rounds of assigning
 * rows and moving every centroid to the direction of its rows' sum (one without rows stays); then, where clusters are
 * wanted, what cmb_assign makes of the centroids. n <= L but where L is 0. The bits depend on nothing but a head's own
 * rows, n, iterations and seed. */
cmb_status cmb_cluster(const cmb_clustering *problem, int64_t iterations, uint64_t seed, bool balanced,
                       const cmb_interrupt *interrupt, cmb_error *error);

/* Every row joins the most similar centroid, of equals the first. Balanced: rows in descending order of what their
 * most similar centroid is ahead of the next one, of equals the first, each join the most similar centroid with room:
 * L / n clusters' worth each, and one more for the first L mod n clusters that come to it. */
cmb_status cmb_assign(const cmb_clustering *problem, bool balanced, const cmb_interrupt *interrupt, cmb_error *error);

/* One step of online k-means: a centroid becomes the direction of decay * centroid + (1 - decay) * the mean direction
 * of its cluster's rows; without rows, or where that has no direction, it stays. 0 <= decay <= 1. */
cmb_status cmb_update_centroids(const cmb_clustering *problem, double decay, const cmb_interrupt *interrupt,
                                cmb_error *error);

/* ---- the process -------------------------------------------------------------------------------- */

/* Threads a call may use, this one included. The default is COMBINER_NUM_THREADS, else OMP_NUM_THREADS,
 * else the processors this process may run on, capped by its cgroup's quota. count == 0 restores it. */
cmb_status cmb_set_num_threads(int64_t count, cmb_error *error);
__attribute__((visibility("default"))) int cmb_get_num_threads(void); /* threadpoolctl knows the library by it */
/* Ends the pool's threads and waits for them; the next call starts new ones. */
void cmb_stop_threads(void);

/* A host's own threads in place of the pool's, for the calls of this thread until it is given NULL. */
typedef struct {
    int threads; /* at most, the calling one included; cmb_get_num_threads says no more than this meanwhile */
    /* Has task(argument) run once, on any thread, before or after this returns; false where it will not be run. A task
     * that starts late does nothing: no call waits for one that has not started. */
    bool (*start)(void *context, void (*task)(void *argument), void *argument);
    void *context;
} cmb_scheduler;
void cmb_use_scheduler(const cmb_scheduler *scheduler);

/* Instruction sets, lowest first: "base", then "avx2", "avx512", "avx512_bf16" or "neon". The highest the machine has
 * (on Intel's up to avx512) is used unless COMBINER_ISA or this call names another; a name in COMBINER_ISA that the
 * machine lacks is ignored. */
int cmb_isa_count(void);             /* those this machine can run */
const char *cmb_isa_name(int index); /* 0 <= index < cmb_isa_count() */
const char *cmb_get_isa(void);
cmb_status cmb_set_isa(const char *name, cmb_error *error);

/* Where all memory comes from; NULL functions restore the default. Set it while no call is running and no plan is
 * alive. `allocate` returns 64-byte aligned memory or NULL. */
typedef struct {
    void *(*allocate)(size_t bytes, void *context);
    void (*release)(void *pointer, void *context);
    void *context;
} cmb_allocator;
void cmb_set_allocator(const cmb_allocator *allocator);

/* The default allocator, whichever is set: malloc, but for up to 512 MiB in blocks of 256 KiB and more that are kept
 * when they are released. For results too: mapping them anew costs up to a fifth of a call. cmb_release_kept frees what
 * is kept. */
void *cmb_default_allocate(size_t bytes);
void *cmb_default_reallocate(void *pointer, size_t bytes);
void cmb_default_release(void *pointer);
void cmb_release_kept(void);

#ifdef __cplusplus
}
#endif
#endif

// SPDX-License-Identifier: Apache-2.0
/*
 * Combiner: full attention at sub-quadratic cost (Ren et al., NeurIPS 2021, arXiv 2107.05768), the C library.
 * docs/mathematics.md defines what it computes; this header says how a caller describes it.
 *
 * Letters
 *   B   batch entries            L   positions, from 0         D    features of query and key
 *   Hq  query heads              R   regions of one plan       Dv   features of value
 *   Hk  key / value heads        N   scratch rows of a task    i, j, r   a query, a key, a region
 *
 * Glossary
 *   position   one token of a sequence: its query, key and value are one row each
 *   region     a set of positions that queries see as one summary: key k_R, value h_R, query q_R
 *   row        a position, a region, or a scratch row: a line of the table below
 *   pool step  makes one row's k_R and q_R (maximum, mean, sum or first) from its children's
 *   tile       up to 64 query rows, one to a lane, and the runs of rows that they attend
 *   lane       one query of a tile, and its bit in a mask
 *   run        a list of rows that a tile attends, with one mask for each row or none at all
 *   mask       64 bits for one row of a run: bit t says whether lane t attends the row
 *   task       pool steps, then tiles, in order, on one thread
 *   wave       tasks that do not depend on one another; waves run in order
 *   plan       the waves for one length: plain arrays, which one engine runs for every factorization
 *   slice      the part of a plan that some of its queries attend, whose regions the caller gives
 *
 * The table. Summarizing a region and attending are the same operation on it: some query rows attend some rows, and
 * each gets a softmax-weighted sum of their values. A region's sum is its h_R, a position's is its row of the output.
 *
 *                |         positions         |   regions   |          scratch
 *          row   |   0     1     ..    L-1   |  L .. L+R-1 |  L+R .. L+R+N-1
 *         -------+---------------------------+-------------+-----------------------------------------
 *          key   |  k_0   k_1    ..  k_(L-1) |     k_R     |  k   from a pool step, for later
 *          query |  q_0   q_1    ..  q_(L-1) |     q_R     |  q   pool steps of the same task
 *          value |  v_0   v_1    ..  v_(L-1) |     h_R     |      none: no tile attends a scratch row
 *
 * An example: cmb_plan_fixed with L = 8, span = 4, causal. Region 0 (row 8) is positions 0-3, region 1 (row 9) is 4-7.
 * Queries attend their own span up to themselves, and the earlier span through its region.
 *
 *     wave 0   task 0   pool step   row 8 <- children 0 1 2 3
 *                       pool step   row 9 <- children 4 5 6 7        (no query sees it; its members are on record)
 *                       tile 0      query row 8, width 1             summarize: the row of h_0
 *                         run         rows 0 1 2 3, no mask
 *     wave 1   task 1   tile 1      query rows 0 .. 7, width 16      attend: 8 lanes of 16 are used
 *                         run         rows 0 1 2 3 8 4 5 6 7, with these masks
 *
 *                                       lane    0 1 2 3 4 5 6 7
 *                         mask of row 0         x x x x . . . .     0x0f
 *                         mask of row 1         . x x x . . . .     0x0e
 *                         mask of row 2         . . x x . . . .     0x0c
 *                         mask of row 3         . . . x . . . .     0x08
 *                         mask of row 8         . . . . x x x x     0xf0     the region of positions 0-3
 *                         mask of row 4         . . . . x x x x     0xf0
 *                         mask of row 5         . . . . . x x x     0xe0
 *                         mask of row 6         . . . . . . x x     0xc0
 *                         mask of row 7         . . . . . . . x     0x80
 *
 * Calls. Every function may be called from any thread at any time, unless its comment says otherwise. A function that
 * can fail returns a cmb_status; where `error` is not NULL, it also says there which argument was wrong, what it was
 * and what was expected. Nothing is written to an output before every check has passed and all memory has been taken.
 *
 * Arrays. Inputs are never written, and may overlap one another. The rows of an output must not overlap one another,
 * which is checked; an output must not overlap an input or another output, which is not checked.
 *
 * Compilers and systems. The library is C11 with GNU extensions: GCC 12 or later, or clang, for POSIX or Windows, and
 * without -ffast-math. This header is strict C11, and C++11.
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

enum { CMB_MAX_FEATURES = 1024 }; /* D and Dv are at most this */

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
    CMB_POOL_MAX,   /* per feature; ties go to the first child; a NaN child makes NaN */
    CMB_POOL_MEAN,  /* over positions: a child weighs as many positions as lie unmasked below it */
    CMB_POOL_SUM,   /* a masked child adds nothing */
    CMB_POOL_FIRST, /* the first child with an unmasked position below it: a pick, an alias, no copy */
} cmb_pooling;

/* A list of rows: start, start + step, ...; with step == 0, index[start], index[start + 1], ... */
typedef struct {
    int32_t start, step, count;
} cmb_list;

/* Makes k_R and q_R of `row`, L <= row < L + R + N, from its children in position order: positions, or rows that were
 * pooled earlier. A scratch row lives as long as its task, which writes it once. */
typedef struct {
    int32_t row;
    cmb_list child;
} cmb_pool;

/* Rows (never scratch) that a tile's queries attend. mask < 0: every lane attends every row. Else bit t of
 * mask[mask + n] says whether lane t attends the n-th row of the list. */
typedef struct {
    cmb_list row;
    int32_t mask;
} cmb_run;

/* Up to `width` query rows, all positions (attend) or all regions (summarize), and the runs that they attend: runs
 * [run, next tile's run). If a row is a query of several tiles, its softmax continues from one tile to the next.
 *
 * `width` chooses the kernel. 16, 32, 48 or 64: the lane kernel, with vectors along queries. 1: the row kernel, with
 * vectors along features, whose dot products are summed in another order. So the plan, and not the number of queries
 * that happen to be left, decides the bits of a result. Where four query heads or more share a key head, and a position
 * attends positions alone in a row tile (has_heads_tiles), they are the lanes of a lane tile instead, unless dropout or
 * biases differ between them. */
typedef struct {
    cmb_list query;
    int32_t run;
    int32_t width;
} cmb_tile;

/* Pool steps [pool, next task's pool), then tiles [tile, next task's tile), in order. */
typedef struct {
    int32_t pool, tile;
} cmb_task;

/* Backward, where several workers share a head. */
typedef struct {
    /* A worker may take a whole task: in every task the tiles of positions come last, and touch higher positions than
     * the tasks before, so that the queries of two tasks meet in regions alone. What a task's queries add to the
     * gradients of regions is kept apart until the task's turn comes. */
    bool by_task;
    /* By task alone: whether regions of several tasks have positions in common. Then sums for positions are kept apart
     * too. */
    bool are_positions_apart;
    int64_t rows_apart; /* by task alone: the most rows whose sums a task keeps apart */
    int64_t
        tickets_of_task; /* by task alone: the most rows that a worker's task, and those it takes with it, wait for */
    int64_t tickets_of_tile; /* the most rows that a tile, or the pools of a task, waits for */
} cmb_plan_sharing;

/* What is derived from a plan's arrays when the plan is made. The arrays that a caller brings leave it empty. */
typedef struct {
    bool is_fusible;             /* task t of every wave may run before task t + 1 of any wave. A single wave that ends
                                  * with its longest tasks does not count: these had better run first */
    bool has_multi_tile_queries; /* some position is a query of more than one tile */
    bool only_attends;           /* it attends regions but pools none, so the caller gives them: for CMB_ATTEND alone */
    bool has_heads_tiles; /* some row tile is of a position that attends positions alone, without masks, and no tile of
                           * another kind follows such a tile for the same position */

    /* Where region r's q_R is stored. n >= 0: row n of the head's table, which has shared_queries rows. n < 0: row ~n
     * of the task's own memory, which has at most own_queries rows: no other task reads it. */
    const int32_t *query_row; /* [R] */
    int32_t own_queries, shared_queries;
    /* The same of k_R, and of h_R where it is not kept, and of the gradients of both. NULL, with own_keys 0, where
     * several tasks need more than three quarters of the regions. */
    const int32_t *key_row; /* [R] */
    int32_t own_keys, shared_keys;

    const int32_t *pick; /* [R] with CMB_POOL_FIRST: the position that region r picks if no key is masked; else NULL */

    /* Prefix reuse, with CMB_POOL_FIRST; else NULL. n > 0: this tile summarizes regions that pick the queries of the
     * tile before, which has attended the first n rows of this tile's one run (those of its own last run under its
     * masks), so that the regions' softmax may continue from the queries'. 0: it begins with nothing attended. */
    const int32_t *reused_rows; /* [tiles] */

    cmb_plan_sharing sharing;
} cmb_plan_traits;

/* A plan never changes once it is made. Two tasks of one wave write no row in common, and read only what an earlier
 * wave or they themselves have written. Backward runs the same list in reverse. */
typedef struct {
    int64_t L;
    int32_t R, N;
    bool is_causal;
    bool size_bias; /* log of the unmasked positions below a region joins its logit */
    bool weighted;  /* k_R = sum_j p(j|R) k_j in place of the pool; per query head then */
    bool is_slice;  /* its queries are positions first_query + n, n < queries; a tile lists n. false: all positions */
    int64_t first_query, queries;
    cmb_pooling pooling;
    int32_t waves, tasks, pools, tiles, runs;
    int32_t indices, masks;
    const int32_t *wave;  /* [waves + 1] first task */
    const cmb_task *task; /* [tasks + 1] */
    const cmb_pool *pool; /* [pools] */
    const cmb_tile *tile; /* [tiles + 1]; of the last only `run` is read */
    const cmb_run *run;   /* [runs] */
    const int32_t *index; /* [indices] */
    const uint64_t *mask; /* [masks] */
    cmb_plan_traits traits;
} cmb_plan;

/* `poll` is called from the calling thread alone, at least every 50 ms or between two chunks of one tile; if it returns
 * true, the call stops. A NULL poll never stops. */
typedef struct {
    bool (*poll)(void *context);
    void *context;
} cmb_interrupt;

typedef struct {
    bool is_causal;
    bool sparse; /* the sparse baseline: direct keys only, R = 0 */
    bool size_bias;
    cmb_pooling pooling;
    const cmb_interrupt *interrupt; /* of the builder alone; may be NULL */
    const struct cmb_past *past;    /* of a cmb_decoder alone: what it keeps of the sequence; else NULL */
} cmb_plan_options;

/* Builders, one for each factorization (docs/mathematics.md, section 3). Each returns a new plan in *plan, which
 * cmb_plan_free releases, or leaves NULL there. 0 <= L <= 2^30. */
cmb_status cmb_plan_dense(int64_t L, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error);
/* Direct: every span that meets the window of positions nearer than `window`; 1: the own span alone, as in the paper.
 */
cmb_status cmb_plan_fixed(int64_t L, int64_t span, int64_t window, const cmb_plan_options *options, cmb_plan **plan,
                          cmb_error *error);
cmb_status cmb_plan_logsparse(int64_t L, bool hierarchical, const cmb_plan_options *options, cmb_plan **plan,
                              cmb_error *error);

typedef enum {
    CMB_AXIAL_VERTICAL,   /* regions: the other columns, above the own row (and below it) */
    CMB_AXIAL_HORIZONTAL, /* regions: the other rows, without the own column */
    CMB_AXIAL_ROWMAJOR, /* regions: the other rows, whole, each with its query and key of the own column: no pooling */
} cmb_axial_order;

/* Positions lie row by row in a grid, `width` to a row. weighted: rowmajor's keys are sum_j p(j|R) k_j, not picked. */
cmb_status cmb_plan_axial(int64_t L, int64_t width, cmb_axial_order order, bool weighted,
                          const cmb_plan_options *options, cmb_plan **plan, cmb_error *error);
/* Vertical's regions and the rows' parts on both sides of the own column, in one softmax. */
cmb_status cmb_plan_axial_mixture(int64_t L, int64_t width, const cmb_plan_options *options, cmb_plan **plan,
                                  cmb_error *error);
/* A node of level t holds branching^t positions. levels == 0: as many as it takes for one node to cover L.
 * branching >= 2. */
cmb_status cmb_plan_tree(int64_t L, int64_t branching, int64_t levels, const cmb_plan_options *options, cmb_plan **plan,
                         cmb_error *error);
/* cluster[i], 0 <= cluster[i] < 2^30, is the cluster of position i. Memory grows with the largest number. */
cmb_status cmb_plan_routing(int64_t L, const int64_t *cluster, const cmb_plan_options *options, cmb_plan **plan,
                            cmb_error *error);
/* A query attends the positions nearer than `size`, size >= 1: itself and, causal, size - 1 before it. R = 0. */
cmb_status cmb_plan_window(int64_t L, int64_t size, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error);
/* Direct: the positions nearer than `window`. Regions: the spans of `rate` positions, when causal those that end at the
 * query's position or before it. window >= 1, rate >= 1. */
cmb_status cmb_plan_heavily_compressed(int64_t L, int64_t rate, int64_t window, const cmb_plan_options *options,
                                       cmb_plan **plan, cmb_error *error);

/* Integer lists in one array: list n is item[offset[n] .. offset[n + 1]). */
typedef struct {
    int64_t count;
    const int64_t *offset; /* [count + 1] */
    const int64_t *item;
} cmb_lists;

/* How often a query's parts must cover each position of its support. */
typedef enum {
    CMB_COVER_ANY,       /* any number of times */
    CMB_COVER_FULL,      /* at least once */
    CMB_COVER_PARTITION, /* exactly once */
} cmb_cover;

/* A user's own factorization. `direct` and `regions` list every query's direct keys (positions) and regions (numbers
 * from 0); both hold L lists. `members` lists every region's members: positions, or L + q for a region q listed before.
 * CMB_ERR_VALUE names the first query and key at fault: a position outside the support, a member that was not listed
 * before, or a query whose parts do not cover its support as `cover` demands. A `cover` other than CMB_COVER_ANY costs
 * as much as cmb_plan_measure. */
cmb_status cmb_plan_from_parts(int64_t L, const cmb_lists *direct, const cmb_lists *regions, const cmb_lists *members,
                               cmb_cover cover, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error);

/* Which regions the queries of each block list: block t is queries [t * block, (t + 1) * block). */
typedef struct {
    int64_t block, count;
    const int64_t *region; /* [(L + block - 1) / block, count] numbers from 0; -1 lists nothing; repeats count once */
    bool open;             /* a listed region is replaced by the positions below it; false: it stays a region */
    bool rest;             /* a query attends its other regions too; `open` must be true then */
} cmb_selection;

/* The plan `base`, with each query's listed regions opened. A region that a query does not attend in `base` means
 * nothing to that query. A position that the query attends directly is not attended twice. */
cmb_status cmb_plan_selected(const cmb_plan *base, const cmb_selection *selection, const cmb_interrupt *interrupt,
                             cmb_plan **plan, cmb_error *error);

/* The slice of queries [first, first + count), for CMB_ATTEND alone: rows of queries and of their results are those of
 * these positions, with the bits that a call of `base` gives them. Made in time that grows with the rows that they
 * attend, and with the tiles and pool steps of `base`. */
cmb_status cmb_plan_slice(const cmb_plan *base, int64_t first, int64_t count, const cmb_interrupt *interrupt,
                          cmb_plan **plan, cmb_error *error);

/* Checks the arrays (cmb_plan_check), copies them and derives the traits. */
cmb_status cmb_plan_from_arrays(const cmb_plan *arrays, const cmb_interrupt *interrupt, cmb_plan **plan,
                                cmb_error *error);

void cmb_plan_free(cmb_plan *plan);

/* Checks everything that the engine relies on: bounds, order, one writer for each row. CMB_ERR_VALUE says what is
 * broken. The time grows with the rows that lists name by index, under a mask or among the regions; a list of positions
 * with a step and no mask is checked at its two ends. The memory grows with the highest row that a list names. */
cmb_status cmb_plan_check(const cmb_plan *plan, const cmb_interrupt *interrupt, cmb_error *error);

typedef struct {
    int64_t attend_pairs;    /* (query, row) pairs of stage 2: direct keys and regions, summed over the queries */
    int64_t summarize_pairs; /* pairs of stage 1: members, summed over the regions that are summarized */
    int64_t computed_pairs;  /* both, with the lanes that masks and widths leave idle: what the tiles cost */
    bool is_partition;       /* every query's parts cover its support exactly once */
    bool is_full;            /* at least once */
} cmb_plan_facts;

/* Takes O(pairs), or O(pairs L / 64) for a plan that is no partition. Nothing is cached. Not of a slice. */
cmb_status cmb_plan_measure(const cmb_plan *plan, const cmb_interrupt *interrupt, cmb_plan_facts *facts,
                            cmb_error *error);

size_t cmb_plan_bytes(const cmb_plan *plan);

/* ---- attention ---------------------------------------------------------------------------------- */

/* 16-bit rows are widened to float32 when they are read and rounded when they are written; lse is float32 for them. */
typedef enum { CMB_FLOAT32, CMB_FLOAT64, CMB_BFLOAT16, CMB_FLOAT16 } cmb_dtype;

/* A strided array [B, heads, rows, features] with contiguous features; `batch`, `head` and `row` are strides in
 * elements and may be zero or negative. An array without a feature axis (lse) ends with its rows. An array with Hk
 * heads serves query head h with its head h / (Hq / Hk). data == NULL: absent. */
typedef struct {
    void *data;
    int64_t heads;
    int64_t batch, head, row;
} cmb_array;

typedef enum {
    CMB_SUMMARIZE = 1, /* stage 1: makes k_R, h_R of every region that some query attends */
    CMB_ATTEND = 2,    /* stage 2, from the caller's summary_key and summary_value */
    CMB_BOTH = 3,
} cmb_stages;

typedef struct {
    cmb_dtype dtype;
    cmb_stages stages;
    int64_t B, Hq, Hk, L, D, Dv;
    double scale; /* factor of the logits. 0, an initialiser's default, means 1 / sqrt(D); -0.0 means a factor of 0 */

    /* Packed sequences: segment s, positions [segment[s], segment[s + 1]) of each batch entry, is computed as if it
     * were alone, with a plan of its own length. The segments' regions lie one segment after the other. */
    int64_t segments;       /* 0: one of all L positions */
    const int64_t *segment; /* [segments + 1], from 0 to L, not decreasing */

    /* A mixture: each of its components is a factorization with a softmax of its own; `out` is the mean of what the
     * components compute, a sum in the order of the components, divided once (16-bit dtypes: each term rounded, sum and
     * division in float32). For BOTH alone. A segment's regions lie component by component. */
    int64_t components; /* 0: one, no mixture */

    /* [components, segments], or [components, segments, B, Hk]; same pooling and flags in all of a component. Or
     * slices, in each segment of the same queries: query, out, lse and softmax, and their gradients, have a row for
     * each of these queries, segment by segment, in place of L. */
    const cmb_plan *const *plan;
    int64_t plans;
    cmb_array query, key, value; /* [B, Hq, L, D], [B, Hk, L, D], [B, Hk, L, Dv] */

    const uint8_t
        *key_mask; /* [B, L] or NULL. 0: the position's key, value and pooled query are left out, never read */
    int64_t mask_batch, mask_row;

    /* Terms of the logit, of both stages and of every row (docs/mathematics.md, section 2). The elements of biases and
     * sinks have the type of lse. */
    double softcap;        /* the capped logit is softcap * tanh(logit / softcap); 0: none */
    cmb_array key_bias;    /* [B, Hk or Hq, L] added to the logit of a key; pooled as k_R is for a region. Or absent */
    cmb_array region_bias; /* [B, Hk or Hq, R] in place of the pooled bias of a region, or absent */
    cmb_array sink;        /* [B, Hq, 1] the logit of one more part of every query, with the value 0; or absent */

    cmb_array region_query; /* [B, Hq, R, D] in place of the pooled q_R, or absent */
    cmb_array region_key;   /* [B, Hk or Hq, R, D] in place of k_R, or absent */

    /* Dropout of stage 2: the weight p of query i (counted in its segment) for row n becomes p / (1 - dropout_p) if
     * u >= dropout_p, else 0. u is 24 bits of word n' mod 4 of Philox4x32-10 with the seed as key and the counter
     * (n' div 4, i, h', b'): h' = h + dropout_head, b' = b + dropout_batch, and n' = n + the rows L + R of the
     * segment's earlier components. lse is that of the weights before dropout. */
    double dropout_p; /* 0 <= dropout_p <= 1 */
    uint64_t seed;
    uint32_t dropout_head, dropout_batch; /* where this problem's heads and batch entries begin in a larger one */

    /* Summaries, one row for each region: R here is the sum over segments and components of their largest plan's R. The
     * row of a region that no query attends holds zeros, and lse -inf. For BOTH, summary_key has the rows of components
     * with weighted plans alone.
     *   forward SUMMARIZE  writes key and value, and what is present of the others
     *   forward ATTEND     reads key and value, and bias if it is present
     *   forward BOTH       writes what is present; backward needs value and softmax, key and bias if a plan is weighted
     *   backward           reads value; softmax, except for ATTEND; key and bias for ATTEND and if a plan is weighted
     * Bias is read and written only where regions have biases. */
    cmb_array summary_key;     /* [B, Hk or Hq, R, D] */
    cmb_array summary_value;   /* [B, Hq, R, Dv] */
    cmb_array summary_bias;    /* [B, Hk or Hq, R] */
    cmb_array summary_lse;     /* [B, Hq, R] */
    cmb_array summary_softmax; /* [B, Hq, R, 2] */

    /* Results of stage 2, so not for SUMMARIZE. Forward writes out, and what is present of the others; backward reads
     * softmax and out, or, of a mixture, component_out. */
    cmb_array out;           /* [B, Hq, L, Dv] */
    cmb_array component_out; /* [B, Hq, L, components * Dv] of a mixture: what each component computes */
    cmb_array lse; /* [B, Hq, L] natural log of the normaliser, -inf where nothing is attended; none of a mixture */
    /* [B, Hq, L, components * 2] state of each query's softmax: its largest logit m, and the sum of e^(logit - m); -inf
     * and 0 where nothing is attended. lse is m plus the log of the sum, rounded */
    cmb_array softmax;
} cmb_problem;

/* Gradients of one scalar, shaped as in cmb_problem.
 * Read: out and lse (lse may be absent); for SUMMARIZE, summary_key, summary_value and summary_bias (each may be
 * absent).
 * Written: query, key and value (all required); key_bias, sink, region_query, region_key and region_bias if they were
 * given; for ATTEND, summary_key and summary_value, and summary_bias if it was given. */
typedef struct {
    cmb_array out, lse;
    cmb_array summary_key, summary_value, summary_bias;
    cmb_array query, key, value;
    cmb_array region_query, region_key;
    cmb_array key_bias, region_bias, sink;
} cmb_gradients;

double cmb_default_scale(int64_t D); /* 1 / sqrt(D) */

cmb_status cmb_forward(const cmb_problem *problem, const cmb_interrupt *interrupt, cmb_error *error);
cmb_status cmb_backward(const cmb_problem *problem, const cmb_gradients *gradients, const cmb_interrupt *interrupt,
                        cmb_error *error);

/* The most bytes that the call takes, of a backward without gradients of summaries; it takes them all before its first
 * store. */
cmb_status cmb_workspace_bytes(const cmb_problem *problem, bool backward, size_t *bytes, cmb_error *error);

/* Of the queries [first, first + count) of a problem, those in the segment of plan n, counted in it: *first and *count
 * are then what cmb_plan_slice takes. Reads the problem's L, components, segments and plans. */
void cmb_queries_of_plan(const cmb_problem *problem, int64_t n, int64_t *first, int64_t *count);

/* ---- selection ---------------------------------------------------------------------------------- */

/* A region's score for a block of queries: the largest or the mean of its logits scale * q . k_R, over the queries of
 * the block that attend it and the query heads of the key head. With size_bias, the log of the unmasked positions below
 * it is added. */
typedef enum { CMB_SCORE_MAX, CMB_SCORE_MEAN } cmb_score;

typedef struct {
    cmb_dtype dtype; /* CMB_FLOAT32 or CMB_FLOAT64 */
    int64_t B, Hq, Hk, L, D;
    double scale;
    const cmb_plan *const *plan; /* [plans] */
    int64_t plans;               /* 1, or B * Hk */
    cmb_array query;             /* [B, Hq, L, D] */
    cmb_array region_key;        /* [B, Hk or Hq, R, D] k_R */
    const uint8_t *key_mask; /* [B, L] or NULL, as in cmb_problem: a region without an unmasked position is no part */
    int64_t mask_batch, mask_row;
    int64_t block, k;
    cmb_score score;
    bool by_first_query; /* the block's first query alone scores: the choice depends on no later position */
    int64_t *regions;    /* [B, Hk, (L + block - 1) / block, k] contiguous: written */
} cmb_scoring;

/* The k regions of each block with the largest scores, the largest first; of equal scores the lowest number first, and
 * a NaN is as -inf. Only regions that a scoring query attends are chosen: -1 for what is missing. The result is a
 * cmb_selection's `region`. */
cmb_status cmb_select(const cmb_scoring *problem, const cmb_interrupt *interrupt, cmb_error *error);

/* ---- clusters ----------------------------------------------------------------------------------- */

/* Divides the rows of x into n clusters, each head of each batch entry by itself. A row's direction is the row scaled
 * to unit length. A row of zeros, or with a NaN or Inf, has no direction: its similarity to every centroid is 0, and it
 * moves none. The similarity of a row and a centroid is the dot product of their directions. */
typedef struct {
    cmb_dtype dtype;
    int64_t B, H, L, D, n;
    cmb_array x;             /* [B, H, L, D] */
    cmb_array centroids;     /* [B, H, n, D]: read by assign and update */
    cmb_array new_centroids; /* [B, H, n, D]: written by cluster, or absent there, and by update */
    int64_t *clusters; /* [B, H, L] contiguous: written by cluster, or NULL there, and by assign; read by update */
} cmb_clustering;

/* Spherical k-means: k-means++ with `seed` on a sample of at most 16 n rows, then `iterations` rounds, each of which
 * assigns the rows and moves every centroid to the direction of its rows' sum (a centroid without rows stays). At the
 * end, if clusters are wanted, cmb_assign makes them from the centroids. n <= L unless L is 0. The bits depend only on
 * the head's own rows, n, iterations and seed. */
cmb_status cmb_cluster(const cmb_clustering *problem, int64_t iterations, uint64_t seed, bool balanced,
                       const cmb_interrupt *interrupt, cmb_error *error);

/* Every row joins the most similar centroid; of equally similar ones, the first. Balanced: the rows come in descending
 * order of their margin, the best similarity minus the second best (equal margins: the first row first), and each joins
 * the most similar centroid with room. A cluster has room for floor(L / n) rows; the first L mod n clusters to fill
 * have room for one more. */
cmb_status cmb_assign(const cmb_clustering *problem, bool balanced, const cmb_interrupt *interrupt, cmb_error *error);

/* One step of online k-means: a centroid becomes the direction of decay * centroid + (1 - decay) * mean, where mean is
 * the mean direction of its cluster's rows. It stays if it has no rows or that sum has no direction. 0 <= decay <= 1.
 */
cmb_status cmb_update_centroids(const cmb_clustering *problem, double decay, const cmb_interrupt *interrupt,
                                cmb_error *error);

/* ---- continuing a sequence ---------------------------------------------------------------------- */

typedef enum {
    CMB_DENSE,
    CMB_FIXED,
    CMB_LOGSPARSE,
    CMB_TREE,
    CMB_WINDOW,
    CMB_HEAVILY_COMPRESSED,
    CMB_AXIAL,
} cmb_pattern_kind;

/* A factorization of any length: the arguments of its builder. */
typedef struct {
    cmb_pattern_kind kind;
    int64_t size;      /* Fixed: span; Tree: branching; Window: size; HeavilyCompressed: rate; Axial: width */
    int64_t window;    /* Fixed, HeavilyCompressed */
    int64_t levels;    /* Tree */
    bool hierarchical; /* LogSparse */
    bool sparse, size_bias;
    cmb_pooling pooling;   /* not CMB_POOL_FIRST */
    cmb_axial_order order; /* Axial */
    bool weighted;         /* Axial */
} cmb_pattern;

typedef struct {
    cmb_pattern pattern;
    cmb_dtype dtype;
    int64_t B, Hq, Hk, D, Dv;
    double scale;           /* as in cmb_problem */
    double softcap;         /* as in cmb_problem */
    int64_t key_bias_heads; /* Hk or Hq: every new position brings a bias of its key, for so many heads; 0: none does */
    cmb_array sink;         /* as in cmb_problem; copied */
    int64_t rollback;       /* the positions that cmb_decoder_rollback may forget, at most */
    int64_t select;         /* the regions that each query opens; 0 for Axial and for patterns without regions */
} cmb_decoder_options;

/* Causal attention of sequences that grow, one in each batch entry: the rows of `cmb_forward` of the whole sequences,
 * to the bit, however the positions are divided between calls. It keeps what later queries attend or summarize
 * (csrc/decode/decoder.h). One thread at a time may use a decoder.
 *
 * With `select` the rows are those of cmb_plan_selected with the regions that cmb_select chooses, by the largest logit,
 * for blocks of one query. Then all keys and values of the sequence are kept. */
typedef struct cmb_decoder cmb_decoder;

/* n new positions of every sequence, or of sequence b the first lengths[b] of them; rows of `out` beyond these are
 * zeros. Inputs are copied. */
typedef struct {
    int64_t n;
    const int64_t *lengths;      /* [B] between 0 and n; NULL: n */
    cmb_array query, key, value; /* [B, Hq, n, D], [B, Hk, n, D], [B, Hk, n, Dv] */
    cmb_array key_bias;          /* [B, key_bias_heads, n] as in cmb_problem; absent where key_bias_heads is 0 */
    cmb_array out;               /* [B, Hq, n, Dv] */
} cmb_new_positions;

cmb_status cmb_decoder_new(const cmb_decoder_options *options, cmb_decoder **decoder, cmb_error *error);
/* Where this fails, the decoder is as it was; `out` may hold anything. */
cmb_status cmb_decoder_step(cmb_decoder *decoder, const cmb_new_positions *positions, const cmb_interrupt *interrupt,
                            cmb_error *error);
/* Forgets the last n positions of every sequence, or n[b] of sequence b where `per_sequence`. CMB_ERR_VALUE if that is
 * more than the sequence has, or more than `rollback` before its longest. */
cmb_status cmb_decoder_rollback(cmb_decoder *decoder, const int64_t *n, bool per_sequence, cmb_error *error);
cmb_status cmb_decoder_copy(const cmb_decoder *decoder, cmb_decoder **copy, cmb_error *error);
/* Another decoder, whose sequence b is a copy of sequence chosen[b]; a sequence may be chosen any number of times. */
cmb_status cmb_decoder_take(const cmb_decoder *decoder, const int64_t *chosen, int64_t count, cmb_decoder **taken,
                            cmb_error *error);
int64_t cmb_decoder_length(const cmb_decoder *decoder, int64_t b); /* 0 <= b < B */
size_t cmb_decoder_bytes(const cmb_decoder *decoder);              /* of the rows that it keeps room for */
void cmb_decoder_free(cmb_decoder *decoder);

/* ---- the process -------------------------------------------------------------------------------- */

/* Threads that a call may use, the calling thread included. The default is COMBINER_NUM_THREADS, else OMP_NUM_THREADS,
 * else the processors this process may run on, capped by its cgroup's quota. count == 0 restores it. */
cmb_status cmb_set_num_threads(int64_t count, cmb_error *error);
#ifdef _WIN32
#define CMB_EXPORTED __declspec(dllexport)
#else
#define CMB_EXPORTED __attribute__((visibility("default")))
#endif
CMB_EXPORTED int cmb_get_num_threads(void); /* threadpoolctl knows the library by it */
/* Ends the pool's threads and waits for them; the next call starts new ones. If a poll calls this, the threads end when
 * the running job has ended. */
void cmb_stop_threads(void);

/* Has the calls of this thread use a host's threads in place of the pool's, until it sets another scheduler, or NULL
 * for the pool. Returns the scheduler that was set before, or NULL. */
typedef struct {
    int threads; /* the most that a call uses, the calling one included; below 2, the calling one alone. It also caps
                  * cmb_get_num_threads */
    /* Has task(argument) run once, on any thread, before or after this returns; false if it will not run. A task that
     * starts late does nothing: no call waits for a task that has not started. */
    bool (*start)(void *context, void (*task)(void *argument), void *argument);
    void *context;
} cmb_scheduler;
const cmb_scheduler *cmb_use_scheduler(const cmb_scheduler *scheduler);

/* Instruction sets, lowest first: "base", then "avx2", "avx512", "avx512_bf16", "amx" or "neon". The highest that the
 * machine has (on Intel's processors, not avx512_bf16) is used unless COMBINER_ISA or cmb_set_isa names another. A name
 * in COMBINER_ISA that the machine lacks is ignored. */
int cmb_isa_count(void);             /* those this machine can run */
const char *cmb_isa_name(int index); /* 0 <= index < cmb_isa_count() */
const char *cmb_get_isa(void);
cmb_status cmb_set_isa(const char *name, cmb_error *error);

/* The source of all memory, except for the record by which a call invites a scheduler's threads, which may outlive the
 * call. NULL functions restore the default. Set it while no call runs and no plan is alive. `allocate` returns 64-byte
 * aligned memory, or NULL. */
typedef struct {
    void *(*allocate)(size_t bytes, void *context);
    void (*release)(void *pointer, void *context);
    void *context;
} cmb_allocator;
void cmb_set_allocator(const cmb_allocator *allocator);

/* The default allocator, whatever cmb_set_allocator has set: malloc, which keeps released blocks of 256 KiB and more,
 * up to 512 MiB of them, for the next call; cmb_release_kept frees them. Results may come from it too: mapping large
 * ones anew costs up to a fifth of a call. */
void *cmb_default_allocate(size_t bytes);
void *cmb_default_reallocate(void *pointer, size_t bytes);
void cmb_default_release(void *pointer);
void cmb_release_kept(void);

#ifdef __cplusplus
}
#endif
#endif

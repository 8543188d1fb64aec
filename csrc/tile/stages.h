// SPDX-License-Identifier: Apache-2.0
/*
 * The two stages of one task of one head: pool steps, then tiles. csrc/engine schedules them; stages.inc.h computes
 * them for each dtype. This header is the interface between the two. Internal.
 */
#ifndef CMB_STAGES_H
#define CMB_STAGES_H

#include "kernels/kernels.h"
#include "runtime/arena.h"
#include "runtime/tickets.h"

enum { CMB_BLOCK_ROWS = 64 }; /* rows that are zeroed together */
static inline int64_t cmb_blocks(int64_t rows) { return (rows + CMB_BLOCK_ROWS - 1) / CMB_BLOCK_ROWS; }

/* The rows of one head of an array: row x is at element x * row of data. A gradient's rows are zeroed in blocks, each
 * block when its first row is asked for: the rows are then in the cache when a tile adds to them. (Row by row where
 * workers share a head by task: engine/shared.c.) */
typedef struct {
    void *data;
    int64_t row;
    uint8_t *unzeroed; /* [cmb_blocks(count)] blocks that are still to be zeroed; NULL: none */
    int64_t count, dim;
} cmb_rows;

/* The gradients of one head. */
typedef struct {
    cmb_rows query, key, value;
    cmb_rows region_query, region_key, region_value;
    cmb_rows key_bias, region_bias; /* data is NULL where there are no such biases */
    cmb_rows sink;                  /* [1] for every query, whose sum is the gradient of the sink */
    cmb_rows out, lse;              /* lse.data may be NULL */
} cmb_gradient_rows;

/* One query head of one segment of a problem. Arrays of regions have row r for table row L + r,
 * but where query_row, key_row or value_row say otherwise.
 *
 * Elements of query, key, value, out and grad.out are the caller's. All others are of the type that is computed with,
 * which is wider for the 16-bit dtypes. */
typedef struct {
    const cmb_plan *plan;
    cmb_stages stages;
    int64_t L, D, Dv;
    int64_t queries; /* rows of query, out, softmax and of their gradients: L, or those of a slice */
    int64_t R;       /* rows of the arrays of regions; the plan may use fewer */
    double scale;
    double softcap; /* 0: none */
    cmb_dropout dropout;
    const uint8_t *key_mask; /* NULL: every key takes part */
    int64_t mask_row;

    bool all_live;             /* no position is masked and no region is empty: `count` is not read */
    bool counted;              /* `count` is written: all_live does not hold, or pooling or size_bias needs it */
    bool pool_query, pool_key; /* this abstraction is pooled here, not given, picked or weighted */
    bool pick_query, pick_key; /* it is the row of position pick[r] */
    bool weighted;             /* k_R is summed by the summarizing softmax, beside h_R */
    bool biased;               /* logits have biases: key_bias or region_bias has data */
    bool pool_bias, pick_bias, weighted_bias; /* of b_R, as above of k_R */
    int32_t *count;                           /* [R] unmasked positions below */
    const int32_t *pick;                      /* [R] */
    int32_t *picked;                          /* pick, where this head's pool steps write it; else NULL */
    /* [R] q_R is row n of region_query, or, as ~n, row n of the worker's scratch for the task at hand. NULL: row r of
     * region_query. */
    const int32_t *query_row;
    const int32_t *key_row;   /* [R] the same of k_R, and of the gradients of k_R and h_R */
    const int32_t *value_row; /* [R] the same of h_R */

    cmb_rows query, key, value;
    cmb_rows region_query, region_key, region_value;
    int64_t lane_value; /* where lanes are query heads: elements from one's region_value to the next's; else 0 */
    cmb_rows key_bias, region_bias; /* [1] b; without data 0 */
    cmb_rows sink; /* [1] of each query the logit of a part with the value 0; row is 0 where all have the same */
    cmb_rows softmax, region_softmax; /* [2] m and l, the state of each softmax */
    cmb_rows out;
    /* Forward: where results accumulate between a query's tiles: `out` itself, or a copy of the type that is computed
     * with. Without data each query has one tile, which writes or adds to `out`. */
    cmb_rows result;

    cmb_gradient_rows grad;
} cmb_head;

/* One worker's memory: a tile's packed queries, logits and sums, and a task's scratch rows. */
typedef struct cmb_scratch cmb_scratch;

/* What a scratch is for: its kernels and its size. */
typedef struct {
    cmb_isa isa;
    int64_t D, Dv;
    int64_t N;        /* scratch rows of a plan, at most */
    int64_t queries;  /* q_R that a task pools for itself, at most */
    int64_t keys;     /* the same of k_R */
    int64_t children; /* children of a pool step, at most */
    int64_t apart;    /* rows whose sums are kept apart, at most */
    bool dropout, softcap, biased, backward;
} cmb_scratch_use;

/* The functions of one dtype. None can fail. */
typedef struct {
    size_t size;        /* of an element that is computed with */
    size_t stored_size; /* of an element of the caller's rows; lse has `size` */

    /* Takes from the arena the scratch of one worker of a call, or only its size while the arena measures (then NULL).
     * `cancel` may end the call. */
    cmb_scratch *(*scratch)(cmb_arena *arena, const cmb_scratch_use *use, cmb_cancel *cancel, int worker);

    /* Forward, and in backward before all tiles: a task's pool steps. */
    void (*pool)(const cmb_head *head, int32_t task, cmb_scratch *scratch);
    /* Backward, before a task's tiles: pools the q_R and k_R that lie in the worker's scratch, and zeroes their
     * gradients and those of h_R. */
    void (*pool_own)(const cmb_head *head, int32_t task, cmb_scratch *scratch);
    /* Backward, after a task's tiles. `item`: NULL, or where workers share the head what has entered for these rows. */
    void (*pool_backward)(const cmb_head *head, int32_t task, cmb_scratch *scratch, cmb_item *item);
    /* Backward, where workers share a head (engine/shared.c). keep_apart: from now on what tiles add to the gradients
     * of regions, and with `positions` to those of keys and values, is kept in the scratch. add_apart adds it, in the
     * order of the tiles. */
    void (*keep_apart)(bool positions, cmb_scratch *scratch);
    void (*add_apart)(const cmb_head *head, cmb_scratch *scratch);
    /* `ahead`: the tile that this worker takes next, to be prefetched; or -1. */
    void (*tile)(const cmb_head *head, int32_t tile, int32_t ahead, cmb_scratch *scratch);
    /* `item` as for pool_backward. */
    void (*tile_backward)(const cmb_head *head, int32_t tile, int32_t ahead, cmb_scratch *scratch, cmb_item *item);

    /* Before the first tile: n states of "nothing attended". */
    void (*begin)(int64_t n, cmb_rows softmax);
    /* After the last tile, in `dim` features of `rows` and `more_dim` of `more`, where they have data: a row that has
     * attended nothing becomes 0, one all of whose logits were -inf becomes NaN. */
    void (*finish)(int64_t n, cmb_rows softmax, cmb_rows rows, int64_t dim, cmb_rows more, int64_t more_dim);
    /* The same zeros in the caller's rows, where tiles have written all other rows. */
    void (*clear_unattended)(int64_t n, cmb_rows softmax, cmb_rows rows, int64_t dim);
    /* lse = m + log l; where nothing was attended the sink, or -inf without one. */
    void (*write_lse)(int64_t n, cmb_rows softmax, cmb_rows sink, cmb_rows lse);
    /* to[k] = scale * q . k_R of query x and region[k], k < n, as cmb_select has it for a block of one query. */
    void (*region_logits)(const cmb_head *head, int64_t x, int64_t n, const int32_t *region, double *to,
                          cmb_scratch *scratch);
    /* k_R of regions r < n to the caller's rows; 0 for a region that attends nothing. */
    void (*copy_region_keys)(const cmb_head *head, int64_t n, cmb_rows to, const cmb_scratch *scratch);
    /* The same of b_R. */
    void (*copy_region_biases)(const cmb_head *head, int64_t n, cmb_rows to);
    /* Adds n biases' gradients to those of regions that attend something. */
    void (*add_biases)(int64_t n, cmb_rows softmax, cmb_rows from, cmb_rows to);
    /* Backward, before the first tile: the sink's gradient from queries that attend nothing, whose lse is the sink. */
    void (*begin_sink)(const cmb_head *head);
    /* After the last tile: the sum of the sink's gradients over the queries, in their order. */
    void (*sum_sink)(const cmb_head *head, void *sum);
    /* to = the sum of n elements. */
    void (*add_up)(int64_t n, const void *from, int64_t step, void *to);
    /* Zeros the row, or the block's rows. */
    void (*zero_row)(const cmb_rows *rows, int64_t x);
    void (*zero_block)(cmb_rows rows, int64_t block);
    /* Adds n of the caller's rows to gradients; if `softmax` has data, only rows that attend something. */
    void (*add)(int64_t n, int64_t dim, cmb_rows softmax, cmb_rows from, cmb_rows to, const cmb_scratch *scratch);
    /* n rows of `dim` features: the sum of `terms` rows of `from`, which lie side by side, divided by `count`. Of the
     * caller's elements; 16-bit ones are summed and divided in float32. `to` may be `from`. */
    void (*mean)(int64_t n, int64_t dim, int64_t terms, int64_t count, cmb_rows from, cmb_rows to,
                 const cmb_scratch *scratch);
    /* Divides n numbers, one in each row, of the type that is computed with. */
    void (*divide)(int64_t n, int64_t count, cmb_rows rows);
    /* n rows from the caller's elements to those that are computed with, and back. */
    void (*widen)(int64_t n, int64_t dim, cmb_rows from, cmb_rows to, const cmb_scratch *scratch);
    void (*narrow)(int64_t n, int64_t dim, cmb_rows from, cmb_rows to, const cmb_scratch *scratch);
} cmb_stage_table;

const cmb_stage_table *cmb_stages_f32(void);
const cmb_stage_table *cmb_stages_f64(void);
const cmb_stage_table *cmb_stages_bf16(void);
const cmb_stage_table *cmb_stages_f16(void);
const cmb_stage_table *cmb_stage_table_of(cmb_dtype dtype); /* one of these four */

#endif

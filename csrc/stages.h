// SPDX-License-Identifier: Apache-2.0
/* One task of one head: what engine.c schedules and stages.inc.h computes, for each dtype. Internal. */
#ifndef CMB_STAGES_H
#define CMB_STAGES_H

#include "kernels.h"
#include "runtime.h"
#include "turns.h"

enum { CMB_BLOCK_ROWS = 64 };
static inline int64_t cmb_blocks(int64_t rows) { return (rows + CMB_BLOCK_ROWS - 1) / CMB_BLOCK_ROWS; }

/* One head of a cmb_array: row x is at element x * row of data. Gradients are zeroed in blocks of rows when one of them
 * is first met, so that they are in the cache when they are added to: in stale[block] where that is still to come. */
typedef struct {
    void *data;
    int64_t row;
    uint8_t *stale; /* [cmb_blocks(count)], or NULL: all rows hold what they should */
    int64_t count, dim;
} cmb_rows;

/* One query head of one segment of a problem. Region tables have rows 0..R-1 for table rows L..L+R-1. The elements of
 * query, key, value, out and grad.out are as stored by the caller; those of all other rows are what is computed with,
 * which is wider for the 16-bit dtypes. */
typedef struct {
    const cmb_plan *plan;
    cmb_stages stages;
    int64_t L, D, Dv;
    int64_t R; /* rows of the region tables, of which the plan may use fewer */
    double scale;
    cmb_dropout dropout;
    const uint8_t *key_mask; /* NULL: every key takes part */
    int64_t mask_row;

    bool all_live;             /* no row is masked or empty: `count` need not be asked */
    bool counted;              /* `count` is kept: something asks it */
    bool pool_query, pool_key; /* this abstraction is pooled here, not given, picked or weighted */
    bool pick_query, pick_key; /* it is the row of position pick[r] */
    bool weighted;             /* k_R comes out of the summarising softmax, beside h_R */
    int32_t *count;            /* [R] unmasked positions below */
    const int32_t *pick;       /* [R] */
    int32_t *picked;           /* the same, where pools are to find them */
    const int32_t *query_row;  /* [R] q_R is row n of region_query, or ~n of what the scratch has for the task at hand;
                                * NULL: row r of region_query */

    cmb_rows query, key, value;
    cmb_rows region_query, region_key, region_value, region_lse;
    cmb_rows out, lse;
    /* Forward: `out`, or what is to become it; without data `out` gets what a query's one tile makes. */
    cmb_rows result;

    struct {
        cmb_rows query, key, value;
        cmb_rows region_query, region_key, region_value;
        cmb_rows out, lse; /* lse.data may be NULL */
    } grad;
} cmb_head;

enum { CMB_MOST_FEATURES = 1024 };

/* Whether `array` is there, has these heads and can be addressed. */
cmb_status cmb_check_array(const char *name, const cmb_array *array, int64_t B, int64_t heads, int64_t rows,
                           int64_t dim, cmb_error *error);

/* Memory that is taken piece by piece from one block; with base NULL it only measures. */
typedef struct {
    char *base;
    size_t used;
    bool overflow;
} cmb_arena;
void *cmb_take(cmb_arena *arena, size_t count, size_t size);

/* One worker's memory: a tile's packed queries, logits and sums, and a task's scratch rows. */
typedef struct cmb_scratch cmb_scratch;

typedef struct {
    size_t size;        /* of an element that is computed with */
    size_t stored_size; /* of one of the caller's, but for those of lse */
    /* Takes a scratch from the arena (NULL while measuring) for plans of at most N scratch rows, tasks with the q_R of
     * `queries` regions, and pools of `children`. */
    cmb_scratch *(*scratch)(cmb_arena *arena, int64_t D, int64_t Dv, int64_t N, int64_t queries, int64_t children,
                            bool dropout, bool backward);
    void (*pool)(const cmb_head *head, int32_t task, cmb_scratch *scratch);
    /* Backward, before a task's tiles: what `pool` leaves to each task, its own q_R. */
    void (*pool_own)(const cmb_head *head, int32_t task, cmb_scratch *scratch);
    void (*pool_backward)(const cmb_head *head, int32_t task, cmb_scratch *scratch, cmb_item *item);
    /* `ahead` is a tile that the worker has before it, or -1. */
    void (*tile)(const cmb_head *head, int32_t tile, int32_t ahead, cmb_scratch *scratch, cmb_cancel *cancel,
                 int worker);
    /* `item`, where several workers share the head, has entered with what the tile or the pools ask for. */
    void (*tile_backward)(const cmb_head *head, int32_t tile, int32_t ahead, cmb_scratch *scratch, cmb_item *item,
                          cmb_cancel *cancel, int worker);
    /* Before the first tile every lse is -inf, "nothing attended yet"; after the last one rows that kept it
     * become zeros. `dim` features of `rows`, as stored, and of `more` where it has data. */
    void (*begin)(int64_t n, cmb_rows lse);
    void (*finish)(int64_t n, cmb_rows lse, cmb_rows rows, int64_t dim, cmb_rows more, int64_t more_dim);
    /* k_R of every region r < n with an lse, 0 for the others, as stored */
    void (*copy_region_keys)(const cmb_head *head, int64_t n, cmb_rows to, const cmb_scratch *scratch);
    /* Zeros in the block's rows, which are stale no longer. */
    void (*clear)(cmb_rows rows, int64_t block);
    /* Adds n rows, as stored, to sums: where there are lses, of those that have one. */
    void (*add)(int64_t n, int64_t dim, cmb_rows lse, cmb_rows from, cmb_rows to, const cmb_scratch *scratch);
    /* n rows from the caller's elements to those that are computed with, where they differ, and back. */
    void (*widen)(int64_t n, int64_t dim, cmb_rows from, cmb_rows to, const cmb_scratch *scratch);
    void (*narrow)(int64_t n, int64_t dim, cmb_rows from, cmb_rows to, const cmb_scratch *scratch);
} cmb_stage_table;

/* For the instruction set in force. */
const cmb_stage_table *cmb_stages_f32(void);
const cmb_stage_table *cmb_stages_f64(void);
const cmb_stage_table *cmb_stages_bf16(void);
const cmb_stage_table *cmb_stages_f16(void);

#endif

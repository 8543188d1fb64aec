// SPDX-License-Identifier: Apache-2.0
/*
 * How a call runs: what the files of the engine share. Internal.
 *
 *   cmb_call                      one component of one call of cmb_forward or cmb_backward
 *     segment[segments]           the packed sequences
 *     slot[max_in_flight]         the heads in flight: of each
 *       id                          which head of the problem it is
 *       head                        the rows that its tiles read and write: the caller's, or those of
 *       the workspace               tables of one head, used by one head after another
 *     scratch[workers]            the tile's own memory, used by one worker
 *     forward | backward          what one direction alone needs
 *
 * engine.c runs the calls of a problem's components: call.c plans a call and lays out its workspace, forward.c and
 * backward.c go through the heads, and head.c makes the rows of one head and stores what its tiles have computed.
 */
#ifndef CMB_CALL_H
#define CMB_CALL_H

#include "engine/problem.h"
#include "plan/read.h"
#include "runtime/threads.h"
#include "tile/heads.h"

/* One query head of one segment of a batch entry. */
typedef struct {
    int64_t b, h;
    int64_t s; /* number of the segment */
    cmb_segment segment;
} cmb_head_id;

/* A head in flight. A table of the workspace is NULL where the caller's own rows are used in place. There are tables
 * - of regions, for what the caller does not pass;
 * - of everything that is written, in float32, for the 16-bit dtypes, whose sums would be rounded term by term;
 * - forward, of results that are added to the caller's rows (`adds`) once the head is complete. */
typedef struct {
    cmb_head_id id;
    cmb_head head;
    void *query, *key, *value, *softmax; /* rows of regions: q_R, k_R, h_R and the states of their softmax: R, or
                                          * table_queries and table_keys */
    void *query_grad, *key_grad, *value_grad;
    void *bias, *bias_grad; /* [R] b_R */
    struct {                /* [L] rows of positions; [queries] but for the keys' and values' */
        void *result, *softmax;
        void *query_grad, *key_grad, *value_grad;
        void *sink_grad; /* the sink's, from each query */
    } position;
    int32_t *count, *pick; /* [R] as in cmb_head */
    int32_t *order;        /* backward: [tasks] in the order in which one thread takes them forward */
    struct {               /* backward: [blocks] as in cmb_rows, of the head's gradients */
        uint8_t *query, *key, *value, *region_query, *region_key, *region_value, *key_bias, *region_bias;
    } unzeroed;
    cmb_gradient_rows to_zero; /* by task: the gradients, with the blocks that are to start from zero */
} cmb_slot;

/* What workers need to share one head's backward. */
typedef struct {
    cmb_tickets tickets;
    int32_t items;
    int32_t *first_item; /* [tasks + 1] by tile: the first item of each task, in the order of cmb_slot.order. By task:
                          * where in that order each item begins, then -1 */
} cmb_shared_head;

typedef struct {
    const cmb_problem *given;         /* of all components */
    const cmb_gradients *given_grads; /* backward's; NULL where only the workspace is measured */
    int64_t component;                /* the one at hand */
    const cmb_problem *problem;       /* of the component at hand alone; the given one where there is no other */
    const cmb_gradients *gradients;
    bool adds; /* results for positions are added to the caller's rows, which hold the sums of earlier components */
    bool is_backward;
    const cmb_stage_table *stage;
    bool is_narrow; /* the caller's elements are narrower than those that are computed with */
    cmb_isa isa;    /* it and the number of threads are read once: they may be set meanwhile */
    int workers;
    cmb_cancel *cancel;
    double scale;
    uint32_t dropout_threshold;

    int64_t L, queries, R, N, children, tasks; /* the largest of the segments and plans */
    int32_t waves;
    bool has_multi_tile_queries; /* some query has several tiles: its result is kept between them */
    /* Rows of q_R in a worker's scratch, for the task at hand, or 0 where all are in the slot's table; and rows of the
     * table. The same of k_R, with the gradients of k_R and h_R. */
    int64_t own_queries, table_queries;
    int64_t own_keys, table_keys;
    bool are_values_own; /* forward: h_R lie as k_R do */

    int64_t segments;
    cmb_segment *segment;  /* [segments] */
    int64_t heads;         /* of all segments and batch entries: query heads forward, key heads backward */
    bool are_heads_lanes;  /* query heads are lanes of heads' tiles (tile/heads.h) */
    int lanes;             /* query heads of a key head that take each task together; else 1 */
    int64_t max_in_flight; /* query heads, a multiple of `lanes` */
    cmb_slot *slot;        /* [max_in_flight] */
    cmb_scratch **scratch; /* [workers] */

    struct {
        int64_t first, in_flight; /* the group of heads at hand */
        bool is_fused;            /* a task goes through all waves by itself */
        int32_t wave;             /* not fused: the wave at hand */
        int64_t *first_task;      /* [max_in_flight + 1] of each unit in this wave, or of each team in all waves */
        atomic_int *finished;     /* fused: [max_in_flight][waves] tasks of the unit that have finished the wave */
    } forward;

    struct {
        int64_t shared;               /* the last `shared` of the heads: each is computed by all workers together */
        cmb_shared_head *shared_head; /* [shared]; `lanes` query heads of each are the first slots */
        bool by_task;                 /* of the two kinds of items in shared.c */
        cmb_item *item;               /* [workers] */
        int64_t max_tickets;          /* that an item takes */
        int64_t max_apart;            /* by task: rows whose sums a task keeps apart */
        int64_t group_head;           /* the query head at hand, or the first of `lanes`, counted within its group */
        int32_t wave;                 /* the wave whose pools are at hand */
        void *sink; /* [B, components, segments, Hq] the gradient of each head's sink, where there are sinks */
    } backward;
} cmb_call;

/* ---- the call (call.c) -------------------------------------------------------------------------- */

/* Plans a call whose fields above `scale` are set, of a problem that has been checked; `workers` is the most that there
 * may be, and then how many there are. Its workspace is not taken yet. */
void cmb_plan_call(cmb_call *call);

/* Measures the workspace, or takes it and leaves it in the call's pointers. */
void cmb_take_workspace(cmb_call *call, cmb_arena *arena);

/* ---- one head (head.c) -------------------------------------------------------------------------- */

/* Head n of the call, where each segment of each batch entry has `heads` of them. Heads are innermost: those in flight
 * share their positions. */
cmb_head_id cmb_head_number(const cmb_call *call, int64_t n, int64_t heads);

/* Makes the slot's head: its rows, and the regions that the caller passes, as they are computed with. */
void cmb_begin_head(const cmb_call *call, cmb_slot *slot, cmb_head_id id, int worker);

/* Forward: the softmax states before the first tile, and the results after the last one. */
void cmb_begin_results(const cmb_call *call, const cmb_slot *slot);
void cmb_end_results(const cmb_call *call, const cmb_slot *slot, int worker);

/* The heads' tile `tile` of a plan, for the `lanes` heads from this slot on. */
void cmb_make_tile_of_slots(const cmb_call *call, const cmb_slot *slot, int32_t tile, cmb_heads_tile *to);

/* Backward: the gradients before the last tile, and after the first one. */
void cmb_begin_gradients(const cmb_call *call, cmb_slot *slot, int worker);
void cmb_end_gradients(const cmb_call *call, const cmb_slot *slot, int worker);

/* ---- all heads ---------------------------------------------------------------------------------- */

void cmb_run_forward(cmb_call *call);
void cmb_run_backward(cmb_call *call);

/* Backward (backward.c): makes the slot's head and begins its gradients; a tile for `lanes` heads from this slot on. */
void cmb_begin_backward(const cmb_call *call, cmb_slot *slot, cmb_head_id id, int worker);
void cmb_run_tile_of_lanes(const cmb_call *call, const cmb_slot *slot, int32_t tile, int worker, cmb_item *item);

/* Backward of the last heads, each by all workers together (shared.c): fills in what its workspace depends on; runs
 * them. */
void cmb_plan_shared(cmb_call *call);
void cmb_run_shared(cmb_call *call);

/* Backward, once all heads of all components are done, or where there are none: the gradients of the sinks, summed over
 * components and segments, and divided by the number of components. */
void cmb_store_sinks(const cmb_call *call);

/* ---- tasks and tiles of a plan ------------------------------------------------------------------ */

/* Whether `lanes` heads run the tile together. */
static inline bool cmb_is_of_lanes(const cmb_call *call, const cmb_plan *plan, int32_t tile) {
    return call->are_heads_lanes && plan->traits.has_heads_tiles && cmb_is_heads_tile(plan, plan->tile + tile);
}

/* The items of so many tasks, by tile (shared.c): of each query head the pools of each task and its
 * tiles, and, where heads are lanes, once more the tiles for all of them. */
static inline int64_t cmb_count_items(const cmb_call *call, int64_t tasks, int64_t tiles) {
    return call->lanes * (tasks + tiles) + (call->are_heads_lanes ? tiles : 0);
}

/* The tile of task `other` in the place that `tile` has in `task`; -1 where there is none or `other` is -1. */
static inline int32_t cmb_counterpart(const cmb_plan *plan, int32_t tile, int32_t task, int32_t other) {
    if (other < 0)
        return -1;
    tile += plan->task[other].tile - plan->task[task].tile;
    return tile < plan->task[other + 1].tile ? tile : -1;
}

#endif

// SPDX-License-Identifier: Apache-2.0
/*
 * The two stages, for one type: pooling, and the tile, forward and backward. Arithmetic, and every row of a region
 * or of a sum, is REAL (SUFFIX); rows of positions that the caller brings are STORED, which for the 16-bit formats
 * is narrower: HALF is their conversions then, else NULL, and a row is widened when it is gathered. A tile packs its
 * queries once (times scale * log2 e, so that softmax is 2^x), then takes its rows a chunk at a time:
 *
 *   forward    S = K Q^T, online softmax, O += (M P)^T V          M: dropout's factors, 1 without
 *   backward   S = K Q^T, dP = M (V dO^T), P = 2^(S - lse), dS = P (dP - delta) scale,
 *              dV += M P dO, dK += dS Q, dQ += dS^T K        delta = rowsum(dO * O) - dlse
 *
 * S is [rows][lanes]. Where masks leave lanes out, products skip the 16-lane groups (S) and 4-lane groups
 * (sums over rows) that a block of rows does not see. What is masked contributes exactly 0, unless a
 * value there is not finite: then 0 * NaN would spread it to rows that do not depend on it, so such a tile
 * (found by testing its result) is summed once more by the exact path, lane by lane over what each sees.
 * Skipping a zero changes no bit, so both paths agree wherever both are right.
 */
#include <math.h>
#include <string.h>

#include "cpu.h"
#include "kernels.h"
#include "plan.h"
#include "stages.h"

#define PASTE2(a, b) a##_##b
#define NAME2(a, b) PASTE2(a, b)
#define KERNELS NAME2(cmb_kernels, SUFFIX)

enum {
    WIDEST = 64,                     /* lanes of a tile */
    CHUNK = 384 / (int)sizeof(REAL), /* rows: 96 or 48, so that S, K or V and Q^T share the first-level cache */
    BLOCK = 6,                       /* rows that share one window of lane groups: a micro-kernel's height */
    NIBBLE = 4,                      /* lanes that share one window of rows */
    SLICE = 12,                      /* rows or lanes of a product between two fetches ahead, */
    FETCH = 2,                       /* and what is fetched then: as many lines as may be under way at once */
};

static const REAL infinity = (REAL)INFINITY;
/* lse of a query whose live logits are so far all -inf: not "nothing attended" (-inf), and NaN in the end. */
static const REAL only_infinite =
    sizeof(REAL) == 4 ? (REAL)-3.40282346638528859812e+38 : (REAL)-1.79769313486231570815e+308;
static const double log2_e = 1.44269504088896340736, ln_2 = 0.69314718055994530942;

/* Whether a stored row is not yet numbers to compute with. */
static const bool widens = sizeof(STORED) < sizeof(REAL);

/* A tile whose rows are fetched while the products of the one at hand run, which leave memory idle: its queries, and
 * the rows of its last run, which as a rule no other tile has met yet. */
typedef struct {
    const cmb_head *head;
    const cmb_tile *tile; /* or NULL */
    int32_t next;         /* of its queries and rows */
} fetching;

struct cmb_scratch {
    const KERNELS *kernel;
    const cmb_half *half;
    bool backward;
    cmb_item *item; /* backward, of a head that workers share: the turns of the tile at hand */
    fetching ahead;
    uint64_t seen;                     /* of the lanes, those that have seen something */
    const cmb_tile *ended;             /* the tile whose end packed, state and sum hold, if it began with nothing */
    int width;                         /* of the tile at hand */
    REAL *packed;                      /* [D][64] Q^T */
    REAL *s;                           /* [CHUNK][64] */
    REAL *sum;                         /* [64][Dv + D] O, and the sums of k where weighted */
    REAL *state;                       /* [4][64] m, l, alpha; backward: lse2, delta */
    REAL *line;                        /* [CHUNK + 16 or D] a compacted row of p, a scaled query */
    const REAL **packed_row;           /* [max(D, Dv)] */
    const REAL **lane_in;              /* [64] */
    REAL **lane_out;                   /* [64] */
    REAL **s_row;                      /* [CHUNK] */
    const REAL **key, **value, **list; /* [CHUNK] */
    uint64_t *lanes;                   /* [CHUNK] */
    double *bias;                      /* [CHUNK] log2 of a region's size */
    uint32_t *row;                     /* [CHUNK] table rows */
    REAL *keep;                        /* [CHUNK][64] dropout's factors */

    REAL *packed_grad, *packed_key_grad; /* [Dv][64], [D][64] */
    REAL *dp;                            /* [CHUNK][64] */
    REAL **dkey, **dvalue;               /* [CHUNK] */
    int64_t *listed;                     /* [CHUNK] places of the rows in the tile's runs, one after the other */
    const REAL **grad_in, **key_grad_in; /* [64] dO, and dk_R where weighted */

    /* Rows that are not where and as the caller stored them: widened, padded to pairs, or brought together. */
    REAL *query_row, *grad_row; /* [64][D], [64][Dv] */
    REAL *key_row, *value_row;  /* [CHUNK][D], [CHUNK][Dv] */
    REAL *result_row;           /* [2][Dv] */
    REAL *child_row;            /* [children][D] */

    /* Pairs: of weights, of rows, and of those that a lane does not see whole; and a tile's queries and their dO. */
    REAL *pair_weight, *pair_row, *pair_part;   /* [CHUNK / 2][64], the others [CHUNK / 2][max(D, Dv)] */
    const REAL **pair_list;                     /* [CHUNK / 2] */
    REAL *pair_query, *pair_grad;               /* [32][D], [32][Dv] */
    const REAL **pair_query_in, **pair_grad_in; /* [32] */

    int64_t N;
    REAL *pool_query, *pool_key;           /* [N][D] */
    REAL *pool_query_grad, *pool_key_grad; /* [N][D] */
    REAL *own_query, *own_query_grad;      /* [queries][D] */
    int32_t *count, *pick;                 /* [N] */
    const REAL **child;                    /* [children] */
    REAL **child_grad;                     /* [children] */
    REAL *weight;                          /* [children] */
};

static cmb_scratch *take_scratch(cmb_arena *arena, int64_t D, int64_t Dv, int64_t N, int64_t queries, int64_t children,
                                 bool dropout, bool backward) {
    const cmb_half *half = HALF;
    cmb_scratch s = {.half = half, .backward = backward, .N = N};
    cmb_scratch *scratch = cmb_take(arena, 1, sizeof s);
    const size_t r = sizeof(REAL), p = sizeof(void *), d = (size_t)D, dv = (size_t)Dv, n = (size_t)N,
                 c = (size_t)children;
    s.packed = cmb_take(arena, d * WIDEST, r);
    s.s = cmb_take(arena, CHUNK * WIDEST, r);
    s.sum = cmb_take(arena, WIDEST * (dv + d), r);
    s.state = cmb_take(arena, 4 * WIDEST, r);
    s.line = cmb_take(arena, d > CHUNK + CMB_GROUP ? d : CHUNK + CMB_GROUP, r);
    s.packed_row = cmb_take(arena, d > dv ? d : dv, p);
    s.lane_in = cmb_take(arena, WIDEST, p);
    s.lane_out = cmb_take(arena, WIDEST, p);
    s.s_row = cmb_take(arena, CHUNK, p);
    s.key = cmb_take(arena, CHUNK, p);
    s.value = cmb_take(arena, CHUNK, p);
    s.list = cmb_take(arena, CHUNK, p);
    s.lanes = cmb_take(arena, CHUNK, sizeof(uint64_t));
    s.bias = cmb_take(arena, CHUNK, sizeof(double));
    s.row = cmb_take(arena, CHUNK, sizeof(uint32_t));
    s.keep = cmb_take(arena, dropout ? CHUNK * WIDEST : 0, r);
    s.pool_query = cmb_take(arena, n, d * r);
    s.pool_key = cmb_take(arena, n, d * r);
    s.own_query = cmb_take(arena, (size_t)queries, d * r);
    s.query_row = cmb_take(arena, WIDEST * d, r);
    s.key_row = cmb_take(arena, CHUNK * d, r);
    s.value_row = cmb_take(arena, CHUNK * dv, r);
    s.result_row = cmb_take(arena, 2, dv * r);
    s.child_row = cmb_take(arena, widens ? c : 0, d * r);
    s.count = cmb_take(arena, n, sizeof(int32_t));
    s.pick = cmb_take(arena, n, sizeof(int32_t));
    s.child = cmb_take(arena, c, p);
    s.weight = cmb_take(arena, c, r);
    if (backward) {
        s.packed_grad = cmb_take(arena, dv * WIDEST, r);
        s.packed_key_grad = cmb_take(arena, d * WIDEST, r);
        s.dp = cmb_take(arena, CHUNK * WIDEST, r);
        s.dkey = cmb_take(arena, CHUNK, p);
        s.dvalue = cmb_take(arena, CHUNK, p);
        s.listed = cmb_take(arena, CHUNK, sizeof(int64_t));
        s.grad_in = cmb_take(arena, WIDEST, p);
        s.key_grad_in = cmb_take(arena, WIDEST, p);
        s.pool_query_grad = cmb_take(arena, n, d * r);
        s.pool_key_grad = cmb_take(arena, n, d * r);
        s.own_query_grad = cmb_take(arena, (size_t)queries, d * r);
        s.child_grad = cmb_take(arena, c, p);
        s.grad_row = cmb_take(arena, WIDEST * dv, r);
    }
    if (half && half->product) {
        enum { PAIRS = CHUNK / 2 };
        s.pair_weight = cmb_take(arena, PAIRS * WIDEST, r);
        s.pair_row = cmb_take(arena, PAIRS * (d > dv ? d : dv), r);
        s.pair_part = cmb_take(arena, PAIRS * (d > dv ? d : dv), r);
        s.pair_list = cmb_take(arena, PAIRS, p);
        s.pair_query = cmb_take(arena, backward ? WIDEST / 2 * d : 0, r);
        s.pair_grad = cmb_take(arena, backward ? WIDEST / 2 * dv : 0, r);
        s.pair_query_in = cmb_take(arena, WIDEST / 2, p);
        s.pair_grad_in = cmb_take(arena, WIDEST / 2, p);
    }
    if (scratch) {
        s.kernel = NAME2(cmb_kernels_in_force, SUFFIX)();
        *scratch = s;
    }
    return scratch;
}

/* ---- rows of the table -------------------------------------------------------------------------- */

static inline REAL *at(cmb_rows rows, int64_t x) { return (REAL *)rows.data + x * rows.row; }

/* A row of the table: as the caller stored it, or where `number` is not NULL that. */
typedef struct {
    const STORED *stored;
    const REAL *number;
} table_row;

static inline table_row stored_row(cmb_rows rows, int64_t x) {
    return (table_row){.stored = (const STORED *)rows.data + x * rows.row};
}

static inline table_row number_row(const REAL *number) { return (table_row){.number = number}; }

/* To compute with: itself, or in `wide`. */
static inline const REAL *numbers(table_row row, int64_t dim, REAL *wide, const cmb_scratch *w) {
    if (row.number)
        return row.number;
    if (!widens)
        return (const REAL *)(const void *)row.stored;
    w->half->widen(dim, (const uint16_t *)(const void *)row.stored, (float *)wide);
    return wide;
}

/* In whole pairs, the last one filled up with a zero: itself, or in `copy`. */
static const REAL *in_pairs(table_row row, int64_t dim, void *copy, const cmb_scratch *w) {
    if (!row.number && dim % 2 == 0 && (uintptr_t)row.stored % sizeof(float) == 0)
        return (const REAL *)(const void *)row.stored;
    uint16_t *half = copy;
    if (row.number)
        w->half->round(dim, (const float *)row.number, half);
    else
        memcpy(half, row.stored, (size_t)dim * sizeof *half);
    if (dim % 2)
        half[dim] = 0;
    return copy;
}

static inline void to_stored(int64_t dim, const REAL *from, STORED *to, const cmb_scratch *w) {
    if (widens)
        w->half->narrow(dim, (const float *)from, (uint16_t *)to);
    else
        memcpy(to, from, (size_t)dim * sizeof *to);
}

static inline void add_numbers(int64_t dim, const REAL *more, REAL *sum) {
    for (int64_t d = 0; d < dim; d++)
        sum[d] += more[d];
}

static void clear(cmb_rows rows, int64_t block) {
    const int64_t first = block * CMB_BLOCK_ROWS,
                  end = first + CMB_BLOCK_ROWS < rows.count ? first + CMB_BLOCK_ROWS : rows.count;
    for (int64_t x = first; x < end; x++)
        memset(at(rows, x), 0, (size_t)rows.dim * sizeof(REAL));
    if (rows.stale)
        rows.stale[block] = 0;
}

/* A row of a gradient that is to be read or added to. */
static inline REAL *sum_at(cmb_rows rows, int64_t x) {
    if (rows.stale && rows.stale[x / CMB_BLOCK_ROWS])
        clear(rows, x / CMB_BLOCK_ROWS);
    return at(rows, x);
}

/* Of q_R, or of its gradient; `own` are the rows of the task at hand. */
static inline REAL *region_query_at(const cmb_head *head, cmb_rows rows, REAL *own, int64_t r) {
    const int64_t n = head->query_row ? head->query_row[r] : r;
    return n < 0 ? own + ~n * head->D : sum_at(rows, n);
}

static inline bool live(const cmb_head *head, int64_t x) {
    if (head->all_live)
        return true;
    if (x < head->L)
        return !head->key_mask || head->key_mask[x * head->mask_row];
    return head->count[x - head->L] > 0;
}

/* A fetch ahead may ask while another worker is at the task that picks: of an earlier pick it fetches the row in vain.
 */
static inline int32_t pick(const cmb_head *head, int64_t r) {
    return __atomic_load_n(&head->pick[r], __ATOMIC_RELAXED);
}

static inline table_row query_row(const cmb_head *head, int64_t x, const cmb_scratch *w) {
    const int64_t r = x - head->L;
    if (r < 0 || head->pick_query)
        return stored_row(head->query, r < 0 ? x : pick(head, r));
    return number_row(region_query_at(head, head->region_query, w->own_query, r));
}

static inline table_row key_row(const cmb_head *head, int64_t x) {
    const int64_t r = x - head->L;
    if (r < 0 || head->pick_key)
        return stored_row(head->key, r < 0 ? x : pick(head, r));
    return number_row(at(head->region_key, r));
}

static inline table_row value_row(const cmb_head *head, int64_t x) {
    return x < head->L ? stored_row(head->value, x) : number_row(at(head->region_value, x - head->L));
}

/* Where a query's sums are, divided by the normaliser, while it may have another tile. */
static inline REAL *result_row(const cmb_head *head, int64_t x) {
    return x < head->L ? at(head->result, x) : at(head->region_value, x - head->L);
}

static inline REAL *lse_of(const cmb_head *head, int64_t x) {
    return x < head->L ? at(head->lse, x) : at(head->region_lse, x - head->L);
}

/* ---- fetching ahead ----------------------------------------------------------------------------- */

static void begin_fetching(const cmb_head *head, int32_t tile, cmb_scratch *w) {
    const cmb_tile *ahead = tile < 0 ? NULL : &head->plan->tile[tile];
    if (ahead && cmb_list_at(head->plan, ahead->query, 0) >= head->L) /* what regions ask with is not pooled yet */
        ahead = NULL;
    w->ahead = (fetching){head, ahead, 0};
}

static inline void fetch(table_row row, int64_t dim) {
    const char *data = row.number ? (const char *)row.number : (const char *)row.stored;
    const int64_t bytes = dim * (int64_t)(row.number ? sizeof(REAL) : sizeof(STORED));
    for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch(data + at);
}

static void fetch_ahead(cmb_scratch *w) {
    const cmb_head *head = w->ahead.head;
    const cmb_tile *tile = w->ahead.tile;
    if (!tile)
        return;
    const cmb_list query = tile->query, row = head->plan->run[tile[1].run - 1].row;
    const int32_t end = w->ahead.next + FETCH;
    for (int32_t n = w->ahead.next; n < end; n++) {
        if (n < query.count) {
            const int32_t x = cmb_list_at(head->plan, query, n);
            fetch(query_row(head, x, w), head->D);
            if (w->backward) {
                fetch(stored_row(head->out, x), head->Dv);
                fetch(stored_row(head->grad.out, x), head->Dv);
            }
        }
        if (n < row.count) {
            const int32_t x = cmb_list_at(head->plan, row, n);
            fetch(key_row(head, x), head->D);
            fetch(value_row(head, x), head->Dv);
        }
    }
    w->ahead.next = end;
    if (end >= query.count && end >= row.count)
        w->ahead.tile = NULL;
}

/* ---- pooling ------------------------------------------------------------------------------------ */

static inline int32_t *count_of(const cmb_head *head, cmb_scratch *w, int64_t x) {
    const int64_t r = x - head->L, R = head->plan->R;
    return r < R ? &head->count[r] : &w->count[r - R];
}

static inline int32_t *pick_of(const cmb_head *head, cmb_scratch *w, int64_t x) {
    const int64_t r = x - head->L, R = head->plan->R;
    return r < R ? &head->picked[r] : &w->pick[r - R];
}

static inline bool in_pool(const cmb_head *head, cmb_scratch *w, int32_t x) {
    return !head->counted || (x < head->L ? live(head, x) : *count_of(head, w, x) > 0);
}

/* The rows of queries or of keys, or of their gradients. */
typedef struct {
    cmb_rows position, region;
    REAL *scratch; /* [N][D] */
    bool queries;
    REAL *own; /* of queries */
} pooled;

static pooled pooled_queries(const cmb_head *head, const cmb_scratch *w) {
    return (pooled){head->query, head->region_query, w->pool_query, true, w->own_query};
}

static pooled pooled_keys(const cmb_head *head, const cmb_scratch *w) {
    return (pooled){head->key, head->region_key, w->pool_key, false, NULL};
}

/* Row x; of queries and keys themselves beyond the positions. */
static inline REAL *pool_row(const cmb_head *head, const pooled *rows, int64_t x) {
    const int64_t r = x - head->L, R = head->plan->R;
    if (r < 0)
        return sum_at(rows->position, x);
    if (r >= R)
        return rows->scratch + (r - R) * head->D;
    return rows->queries ? region_query_at(head, rows->region, rows->own, r) : sum_at(rows->region, r);
}

/* Positions below the children of a pool step; in w->weight each child's, when there are any dead or means. */
static int32_t count_children(const cmb_head *head, const cmb_pool *pool, cmb_scratch *w, int32_t *children) {
    const cmb_plan *plan = head->plan;
    *children = pool->child.count;
    if (!head->counted)
        return pool->child.count;
    int32_t total = 0, n = 0;
    for (int32_t t = 0; t < pool->child.count; t++) {
        const int32_t x = cmb_list_at(plan, pool->child, t);
        const int32_t below = x < head->L ? live(head, x) : *count_of(head, w, x);
        if (below)
            w->weight[n++] = plan->pooling == CMB_POOL_MEAN ? (REAL)below : 1;
        total += below;
    }
    *count_of(head, w, pool->row) = total;
    *children = n;
    return total;
}

static void gather_children(const cmb_head *head, const cmb_pool *pool, const pooled *rows, cmb_scratch *w) {
    for (int32_t t = 0, n = 0; t < pool->child.count; t++) {
        const int32_t x = cmb_list_at(head->plan, pool->child, t);
        if (!in_pool(head, w, x))
            continue;
        w->child[n] = x < head->L ? numbers(stored_row(rows->position, x), head->D, w->child_row + n * head->D, w)
                                  : pool_row(head, rows, x);
        n++;
    }
}

static void gather_child_gradients(const cmb_head *head, const cmb_pool *pool, const pooled *rows, cmb_scratch *w) {
    for (int32_t t = 0, n = 0; t < pool->child.count; t++) {
        const int32_t x = cmb_list_at(head->plan, pool->child, t);
        if (in_pool(head, w, x))
            w->child_grad[n++] = pool_row(head, rows, x);
    }
}

static void pool_rows(const cmb_head *head, const cmb_pool *pool, const pooled *rows, int32_t n, int32_t total,
                      cmb_scratch *w) {
    REAL *to = pool_row(head, rows, pool->row);
    gather_children(head, pool, rows, w);
    if (n == 1) { /* exactly, whatever the pool */
        memcpy(to, w->child[0], (size_t)head->D * sizeof(REAL));
    } else if (head->plan->pooling == CMB_POOL_MAX) {
        w->kernel->max_pool(n, w->child, head->D, to, false);
    } else {
        const REAL *weight = w->weight;
        w->kernel->product(1, head->D, n, &weight, 1, w->child, &to, 0, false);
        if (head->plan->pooling == CMB_POOL_MEAN)
            w->kernel->divide(head->D, to, (REAL)total, to);
    }
}

/* The task's pools, of queries and of keys as they are wanted, into rows from `least` on. */
static void pool_from(const cmb_head *head, int32_t task, int64_t least, bool queries, bool keys, cmb_scratch *w) {
    const cmb_plan *plan = head->plan;
    const pooled query = pooled_queries(head, w), key = pooled_keys(head, w);
    if (!head->counted && !head->pool_query && !head->pool_key && !head->picked)
        return;
    for (int32_t p = plan->task[task].pool; p < plan->task[task + 1].pool; p++) {
        const cmb_pool *step = &plan->pool[p];
        int32_t n;
        if (step->row < least)
            continue;
        const int32_t total = count_children(head, step, w, &n);
        if (total == 0)
            continue;
        if (head->picked) {
            int32_t t = 0, x = cmb_list_at(plan, step->child, 0);
            while (!in_pool(head, w, x))
                x = cmb_list_at(plan, step->child, ++t);
            __atomic_store_n(pick_of(head, w, step->row), x < head->L ? x : *pick_of(head, w, x), __ATOMIC_RELAXED);
            continue;
        }
        if (queries && head->pool_query)
            pool_rows(head, step, &query, n, total, w);
        if (keys && head->pool_key)
            pool_rows(head, step, &key, n, total, w);
    }
}

static void pool(const cmb_head *head, int32_t task, cmb_scratch *w) {
    const bool later = w->backward && head->query_row && head->plan->shared_queries == 0;
    pool_from(head, task, head->L, !later, true, w);
}

static void pool_own(const cmb_head *head, int32_t task, cmb_scratch *w) {
    if (!head->query_row)
        return;
    pool_from(head, task, head->L, true, false, w);
    const cmb_plan *plan = head->plan;
    int64_t own = 0;
    for (int32_t p = plan->task[task].pool; p < plan->task[task + 1].pool; p++) {
        const int64_t r = plan->pool[p].row - head->L;
        own += r < plan->R && head->query_row[r] < 0;
    }
    memset(w->own_query_grad, 0, (size_t)(own * head->D) * sizeof(REAL));
}

static void add_row(cmb_scratch *w, int64_t dim, REAL factor, const REAL *from, REAL *to) {
    const REAL *a = &factor;
    w->kernel->product(1, dim, 1, &a, 0, &from, &to, 0, true);
}

static void pool_rows_backward(const cmb_head *head, const cmb_pool *pool, const pooled *rows, const pooled *grads,
                               int32_t n, int32_t total, cmb_scratch *w) {
    const REAL *top = pool_row(head, rows, pool->row);
    REAL *grad = pool_row(head, grads, pool->row);
    gather_child_gradients(head, pool, grads, w);
    if (n > 1 && head->plan->pooling == CMB_POOL_MAX) {
        gather_children(head, pool, rows, w);
        w->kernel->max_pool_backward(n, w->child, head->D, top, grad, w->child_grad);
    } else {
        for (int32_t t = 0; t < n; t++) {
            const bool mean = n > 1 && head->plan->pooling == CMB_POOL_MEAN;
            add_row(w, head->D, mean ? w->weight[t] / (REAL)total : 1, grad, w->child_grad[t]);
        }
    }
}

static void pool_backward(const cmb_head *head, int32_t task, cmb_scratch *w, cmb_item *item) {
    const cmb_plan *plan = head->plan;
    const pooled query = pooled_queries(head, w), key = pooled_keys(head, w);
    const pooled query_grad = {head->grad.query, head->grad.region_query, w->pool_query_grad, true, w->own_query_grad};
    const pooled key_grad = {head->grad.key, head->grad.region_key, w->pool_key_grad, false, NULL};
    if (item && !cmb_await(item, 0, item->count))
        return;
    if (plan->N) { /* the scratch rows are other tasks' by now */
        pool_from(head, task, head->L + plan->R, !head->query_row, true, w);
        memset(w->pool_query_grad, 0, (size_t)(plan->N * head->D) * sizeof(REAL));
        memset(w->pool_key_grad, 0, (size_t)(plan->N * head->D) * sizeof(REAL));
    }
    for (int32_t p = plan->task[task + 1].pool - 1; p >= plan->task[task].pool; p--) {
        const cmb_pool *step = &plan->pool[p];
        int32_t n;
        const int32_t total = count_children(head, step, w, &n);
        if (total == 0)
            continue;
        if (plan->pooling == CMB_POOL_FIRST) {
            const int64_t r = step->row - head->L;
            if (r < plan->R && head->pick_query)
                add_row(w, head->D, 1, sum_at(head->grad.region_query, r), sum_at(head->grad.query, head->pick[r]));
            if (r < plan->R && head->pick_key)
                add_row(w, head->D, 1, sum_at(head->grad.region_key, r), sum_at(head->grad.key, head->pick[r]));
            continue;
        }
        if (head->pool_query)
            pool_rows_backward(head, step, &query, &query_grad, n, total, w);
        if (head->pool_key)
            pool_rows_backward(head, step, &key, &key_grad, n, total, w);
    }
}

/* ---- a tile's queries and rows ------------------------------------------------------------------ */

typedef struct {
    const cmb_tile *tile;
    int n;                      /* lanes */
    bool regions;               /* its queries are regions: summarising */
    bool weighted;              /* and their keys are sums too */
    bool dropout;               /* some of its weights fall */
    bool paired;                /* its rows and queries, and the weights in sums, are multiplied in pairs */
    uint64_t all;               /* lanes that take part at all */
    int32_t run, next;          /* where the gathering stands */
    int64_t listed;             /* rows of the runs before */
    const uint64_t *had;        /* where it goes on for another tile: masks of rows that this one had attended, */
    int32_t had_first, had_end; /* elements [had_first, had_end) of its run */
    bool masked;                /* of the chunk gathered last: some lane does not see some row */
    int rows;                   /* of that chunk */
} tile_state;

/* False where the compiler can see it: products of numbers are to ask nothing. */
static inline bool is_paired(const tile_state *t) { return widens && t->paired; }

/* Numbers in an element, and elements that hold so many numbers. */
static inline int each(const tile_state *t) { return is_paired(t) ? 2 : 1; }

static inline int elements(const tile_state *t, int64_t numbers) { return (int)((numbers + each(t) - 1) / each(t)); }

static tile_state begin_tile(const cmb_head *head, const cmb_tile *tile, const cmb_scratch *w) {
    tile_state t = {.tile = tile, .n = tile->query.count, .run = tile->run};
    t.regions = cmb_list_at(head->plan, tile->query, 0) >= head->L;
    t.weighted = t.regions && head->weighted;
    t.dropout = !t.regions && head->dropout.factor != 1;
    t.paired = widens && w->half->product && tile->width > 1 && !t.weighted;
    t.all = t.n == 64 ? ~UINT64_C(0) : (UINT64_C(1) << t.n) - 1;
    if (t.regions && !head->all_live)
        for (int i = 0; i < t.n; i++)
            if (!live(head, cmb_list_at(head->plan, tile->query, i)))
                t.all &= ~(UINT64_C(1) << i);
    return t;
}

/* The lane itself, or in place of one that takes no part some lane that does: its row may hold anything. */
static inline int live_lane(const tile_state *t, int lane) {
    return t->all >> lane & 1 ? lane : __builtin_ctzll(t->all);
}

/* Whether a tile does better with copies side by side: rows of a column, which may be an index list, or of one head
 * among others lie a power of two apart, so that they share few of a cache's sets, and each has its own page. Narrow
 * tiles use a row too few times. */
static inline bool is_scattered(const cmb_tile *tile, cmb_list list, cmb_rows rows, int64_t dim) {
    return tile->width > CMB_GROUP && (list.step != 1 || rows.row != dim);
}

/* n rows of the list side by side in `copy`, if they lie apart and are not there yet. */
static inline void bring_together(const tile_state *t, cmb_list list, cmb_rows rows, int64_t dim, int n,
                                  const REAL **row, REAL *copy, const cmb_scratch *w) {
    if (n > 0 && row[0] != copy && is_scattered(t->tile, list, rows, dim))
        w->kernel->gather(n, row, elements(t, dim), copy);
}

/* A row of the tile as its products take it, made in `copy` where it is not so already. */
static inline const REAL *operand(const tile_state *t, table_row row, int64_t dim, REAL *copy, const cmb_scratch *w) {
    return is_paired(t) ? in_pairs(row, dim, copy, w) : numbers(row, dim, copy, w);
}

/* The operands of n rows x, x + step, .., as the caller stored them or `computed`. */
static inline void operands(const tile_state *t, cmb_rows rows, bool computed, int64_t x, int64_t step, int n,
                            int64_t dim, REAL *copy, const REAL **to, const cmb_scratch *w) {
    for (int i = 0; i < n; i++, x += step)
        to[i] = operand(t, computed ? number_row(at(rows, x)) : stored_row(rows, x), dim, copy + i * dim, w);
}

static inline void sums_at(cmb_rows rows, int64_t x, int64_t step, int n, REAL **to) {
    for (int i = 0; i < n; i++, x += step)
        to[i] = sum_at(rows, x);
}

/* Elements [next, next + n) of a run that lies in the positions, or the regions, without a question per row. */
static void gather_straight(const cmb_head *head, const tile_state *t, cmb_list list, int n, int at, cmb_scratch *w) {
    const int64_t row = list.start + (int64_t)list.step * t->next, step = list.step;
    const bool regions = row >= head->L;
    const int64_t x = regions ? row - head->L : row;
    operands(t, regions ? head->region_key : head->key, regions, x, step, n, head->D, w->key_row + at * head->D,
             w->key + at, w);
    operands(t, regions ? head->region_value : head->value, regions, x, step, n, head->Dv, w->value_row + at * head->Dv,
             w->value + at, w);
    for (int i = 0; i < n; i++) {
        w->bias[at + i] = 0;
        w->row[at + i] = (uint32_t)(row + step * i);
    }
    if (!w->backward)
        return;
    sums_at(regions ? head->grad.region_key : head->grad.key, x, step, n, w->dkey + at);
    sums_at(regions ? head->grad.region_value : head->grad.value, x, step, n, w->dvalue + at);
}

static void gather_row(const cmb_head *head, const tile_state *t, int32_t x, int at, cmb_scratch *w) {
    const int64_t r = x - head->L;
    w->key[at] = operand(t, key_row(head, x), head->D, w->key_row + at * head->D, w);
    w->value[at] = operand(t, value_row(head, x), head->Dv, w->value_row + at * head->Dv, w);
    w->bias[at] = head->plan->size_bias && r >= 0 ? log2((double)head->count[r]) : 0;
    w->row[at] = (uint32_t)x;
    if (!w->backward)
        return;
    w->dkey[at] = r < 0 ? sum_at(head->grad.key, x) : sum_at(head->grad.region_key, r);
    w->dvalue[at] = r < 0 ? sum_at(head->grad.value, x) : sum_at(head->grad.region_value, r);
}

static inline int64_t last_of(cmb_list list) { return list.start + (int64_t)list.step * (list.count - 1); }

static inline bool are_positions(const cmb_head *head, cmb_list list) {
    return list.step && list.start < head->L && last_of(list) < head->L;
}

/* The lanes that have attended a row of the tile's run already. */
static inline uint64_t had_by(const tile_state *t, int32_t n) {
    return n >= t->had_first && n < t->had_end && t->had ? t->had[n - t->had_first] : 0;
}

/* The next rows, up to CHUNK of them: pointers, lanes and biases. Rows that are masked or empty are left out. */
static bool gather(const cmb_head *head, tile_state *t, cmb_scratch *w) {
    const cmb_plan *plan = head->plan;
    const uint64_t full = t->n == 64 ? ~UINT64_C(0) : (UINT64_C(1) << t->n) - 1;
    int n = 0;
    t->masked = t->all != full;
    for (; t->run < t->tile[1].run && n < CHUNK; t->run++, t->next = 0) {
        const cmb_run *run = &plan->run[t->run];
        const uint64_t *mask = run->mask < 0 ? NULL : plan->mask + run->mask;
        const cmb_list list = run->row;
        const int from = n;
        const bool are_regions = list.step && list.start >= head->L && last_of(list) >= head->L;
        t->masked |= mask != NULL || t->next < t->had_end;
        if (head->all_live && (are_positions(head, list) || (are_regions && !head->pick_key && !plan->size_bias))) {
            const int taken = list.count - t->next < CHUNK - n ? list.count - t->next : CHUNK - n;
            gather_straight(head, t, list, taken, n, w);
            for (int i = 0; i < taken; i++)
                w->lanes[n + i] = mask ? mask[t->next + i] & t->all : t->all;
            for (int i = 0; i < taken && t->next + i < t->had_end; i++)
                w->lanes[n + i] &= ~had_by(t, t->next + i);
            for (int i = 0; w->item && i < taken; i++)
                w->listed[n + i] = t->listed + t->next + i;
            n += taken;
            t->next += taken;
        } else {
            for (; t->next < list.count && n < CHUNK; t->next++) {
                const int32_t x = cmb_list_at(plan, list, t->next);
                if (!live(head, x))
                    continue;
                gather_row(head, t, x, n, w);
                if (w->item)
                    w->listed[n] = t->listed + t->next;
                w->lanes[n++] = (mask ? mask[t->next] & t->all : t->all) & ~had_by(t, t->next);
            }
        }
        bring_together(t, list, head->key, head->D, n - from, w->key + from, w->key_row + from * head->D, w);
        bring_together(t, list, head->value, head->Dv, n - from, w->value + from, w->value_row + from * head->Dv, w);
        if (t->next < list.count)
            break;
        t->listed += list.count;
    }
    t->rows = n;
    return n > 0;
}

static void add_bias(const cmb_head *head, const tile_state *t, int lanes, cmb_scratch *w) {
    if (!head->plan->size_bias)
        return;
    for (int i = 0; i < t->rows; i++)
        if (w->bias[i] != 0)
            for (int lane = 0; lane < lanes; lane++)
                w->s[i * lanes + lane] += (REAL)w->bias[i];
}

/* Which of the chunk's weights stay, as factors in w->keep. */
static void draw_dropout(const cmb_head *head, const tile_state *t, int width, cmb_scratch *w) {
    uint32_t query[WIDEST] = {0};
    for (int lane = 0; lane < t->n; lane++)
        query[lane] = (uint32_t)cmb_list_at(head->plan, t->tile->query, lane);
    w->kernel->dropout(t->rows, w->row, width, query, &head->dropout, w->keep);
}

static void drop(const tile_state *t, int width, REAL *x, cmb_scratch *w) {
    w->kernel->multiply(t->rows * width, w->keep, x);
}

/* The 16-lane groups [*from, *to) that some row of [i, end) is seen by. */
static void group_window(const cmb_scratch *w, int i, int end, int *from, int *to) {
    uint64_t seen = 0;
    for (; i < end; i++)
        seen |= w->lanes[i];
    *from = seen ? __builtin_ctzll(seen) / CMB_GROUP : 0;
    *to = seen ? (63 - __builtin_clzll(seen)) / CMB_GROUP + 1 : 0;
}

/* For every 4 lanes the rows [first, last) that one of them sees. */
static void row_windows(const cmb_scratch *w, int rows, uint8_t first[16], uint8_t last[16]) {
    const uint64_t nibbles = UINT64_C(0x1111111111111111);
    memset(first, 0, 16);
    memset(last, 0, 16);
    uint64_t seen = 0;
    for (int i = 0; i < rows && seen != nibbles; i++) {
        uint64_t m = w->lanes[i] | w->lanes[i] >> 1;
        m = (m | m >> 2) & nibbles & ~seen;
        for (seen |= m; m; m &= m - 1)
            first[__builtin_ctzll(m) / NIBBLE] = (uint8_t)i;
    }
    seen = 0;
    for (int i = rows - 1; i >= 0 && seen != nibbles; i--) {
        uint64_t m = w->lanes[i] | w->lanes[i] >> 1;
        m = (m | m >> 2) & nibbles & ~seen;
        for (seen |= m; m; m &= m - 1)
            last[__builtin_ctzll(m) / NIBBLE] = (uint8_t)(i + 1);
    }
}

/* ---- a tile's products -------------------------------------------------------------------------- */

/* Elements are numbers, or pairs: of features, of rows or of lanes. */
static inline void product(const tile_state *t, int64_t m, int64_t n, int64_t k, const REAL *const *a, int64_t a_step,
                           const REAL *const *b, REAL *const *c, int64_t column, bool add, cmb_scratch *w) {
    for (int64_t i = 0; i < m; i += SLICE) {
        const int64_t slice = m - i < SLICE ? m - i : SLICE;
        fetch_ahead(w);
        if (is_paired(t))
            w->half->product(slice, n, k, a + i, a_step, b, c + i, column, add);
        else
            w->kernel->product(slice, n, k, a + i, a_step, b, c + i, column, add);
    }
}

/* Lanes side by side, feature by feature; pairs are not scaled. */
static void pack(const tile_state *t, const REAL *const *lane_row, int64_t dim, REAL scale, REAL *packed,
                 const cmb_scratch *w) {
    if (is_paired(t))
        w->half->pack(t->n, lane_row, elements(t, dim), w->width, packed);
    else
        w->kernel->pack(t->n, lane_row, dim, scale, w->width, packed);
}

/* Rows 2 i and 2 i + 1 of n that were stored, interleaved. */
static const REAL *const *pair_rows(int n, const REAL *const *row, int64_t dim, REAL *pairs, const REAL **list,
                                    const cmb_scratch *w) {
    for (int i = 0; i < n; i += 2) {
        list[i / 2] = pairs + i / 2 * dim;
        w->half->interleave(dim, row[i], i + 1 < n ? row[i + 1] : NULL, pairs + i / 2 * dim);
    }
    return list;
}

/* Weights p[row][lane] in pairs of rows. */
static const REAL *row_pairs(const tile_state *t, const REAL *p, cmb_scratch *w) {
    for (int i = 0; i < t->rows; i += 2)
        w->half->pair(w->width, p + i * w->width, i + 1 < t->rows ? p + (i + 1) * w->width : NULL,
                      w->pair_weight + i / 2 * w->width);
    return w->pair_weight;
}

/* Those of rows [begin, end) in pairs of lanes. */
static const REAL *lane_pairs(const REAL *p, int begin, int end, cmb_scratch *w) {
    w->half->round((end - begin) * w->width, (const float *)p + begin * w->width,
                   (uint16_t *)w->pair_weight + begin * w->width);
    return w->pair_weight;
}

/* A row or a pair of rows, of which `seen` has bits for those that count: zeros in place of the other, where any number
 * may lie. */
static const REAL *seen_part(const tile_state *t, const REAL *row, int64_t dim, unsigned seen, REAL *part) {
    if (!is_paired(t) || seen == 3)
        return row;
    memcpy(part, row, (size_t)dim * sizeof *part);
    for (int64_t d = 0; d < dim; d++)
        memset((char *)(part + d) + (seen == 1 ? 2 : 0), 0, 2); /* of little-endian words */
    return part;
}

/* s[row][lane] (+)= row . packed, where some lane of the row's block sees it. `clear`: zeros where not. */
static void row_products(const tile_state *t, const REAL *const *row, int64_t dim, const REAL *packed, REAL *s,
                         bool add, bool clear, cmb_scratch *w) {
    const int n = elements(t, dim);
    for (int d = 0; d < n; d++)
        w->packed_row[d] = packed + d * w->width;
    for (int i = 0; i < t->rows; i++)
        w->s_row[i] = s + i * w->width;
    if (!t->masked || w->width == CMB_GROUP) {
        product(t, t->rows, w->width, n, row, 1, w->packed_row, w->s_row, 0, add, w);
        return;
    }
    for (int i = 0; i < t->rows; i += BLOCK) {
        const int end = i + BLOCK < t->rows ? i + BLOCK : t->rows;
        int from, to;
        group_window(w, i, end, &from, &to);
        if (to > from)
            product(t, end - i, (to - from) * CMB_GROUP, n, row + i, 1, w->packed_row, w->s_row + i, from * CMB_GROUP,
                    add, w);
        for (int r = i; clear && r < end; r++) {
            memset(w->s_row[r], 0, (size_t)(from * CMB_GROUP) * sizeof(REAL));
            memset(w->s_row[r] + to * CMB_GROUP, 0, (size_t)(w->width - to * CMB_GROUP) * sizeof(REAL));
        }
    }
}

/* to[lane] += sum over rows of p[row][lane] * row, for every lane over the rows that it and its neighbours see. */
static void lane_sums(const tile_state *t, const REAL *p, const REAL *const *row, int64_t dim, REAL *const *to,
                      bool exact, cmb_scratch *w) {
    const int rows = elements(t, t->rows);
    if (is_paired(t)) {
        p = row_pairs(t, p, w);
        row = pair_rows(t->rows, row, dim, w->pair_row, w->pair_list, w);
    }
    if (exact) {
        for (int lane = 0; lane < t->n; lane++) {
            int n = 0;
            for (int i = 0; i < rows; i++) {
                unsigned seen = (unsigned)(w->lanes[i * each(t)] >> lane & 1);
                if (each(t) == 2 && i * 2 + 1 < t->rows)
                    seen |= (unsigned)(w->lanes[i * 2 + 1] >> lane & 1) << 1;
                if (!seen)
                    continue;
                w->line[n] = p[i * w->width + lane];
                w->list[n++] = seen_part(t, row[i], dim, seen, w->pair_part + i * dim);
            }
            const REAL *line = w->line;
            product(t, 1, dim, n, &line, 1, w->list, to + lane, 0, true, w);
        }
        return;
    }
    uint8_t first[16] = {0}, last[16];
    if (t->masked)
        row_windows(w, t->rows, first, last);
    else
        memset(last, t->rows, sizeof last);
    for (int i = 0; i < 16; i++) {
        first[i] = (uint8_t)(first[i] / each(t));
        last[i] = (uint8_t)elements(t, last[i]);
    }
    const REAL *a[WIDEST];
    for (int lane = 0; lane < t->n;) {
        const int window = lane / NIBBLE, begin = first[window], count = last[window] - begin;
        int n = 0; /* lanes with one window go together */
        for (; lane + n < t->n && first[(lane + n) / NIBBLE] == begin && last[(lane + n) / NIBBLE] == begin + count;
             n++)
            a[n] = p + begin * w->width + lane + n;
        if (count > 0)
            product(t, n, dim, count, a, w->width, row + begin, to + lane, 0, true, w);
        lane += n;
    }
}

/* to[row] += sum over lanes of p[row][lane] * lane_row[lane], rows [begin, end): rows of lanes, or of pairs of them. */
static void row_sums(const tile_state *t, int begin, int end, const REAL *p, const REAL *const *lane_row, int64_t dim,
                     REAL *const *to, bool exact, cmb_scratch *w) {
    const int step = w->width / each(t);
    const REAL *a[CHUNK];
    if (is_paired(t))
        p = lane_pairs(p, begin, end, w);
    if (exact) {
        const REAL *list[WIDEST];
        for (int i = begin; i < end; i++) {
            int n = 0;
            for (int lane = 0; lane < t->n; lane += each(t)) {
                const unsigned seen = (unsigned)(w->lanes[i] >> lane) & ((1u << each(t)) - 1);
                if (!seen)
                    continue;
                w->line[n] = p[i * step + lane / each(t)];
                list[n++] = seen_part(t, lane_row[lane / each(t)], dim, seen, w->pair_part + lane / each(t) * dim);
            }
            const REAL *line = w->line;
            product(t, 1, dim, n, &line, 1, list, to + i, 0, true, w);
        }
        return;
    }
    const int height = !t->masked || w->width == CMB_GROUP ? end - begin : BLOCK;
    for (int i = begin, stop; i < end; i = stop) {
        stop = i + height < end ? i + height : end;
        int from = 0, to_group = w->width / CMB_GROUP;
        if (t->masked)
            group_window(w, i, stop, &from, &to_group);
        const int lane = from * CMB_GROUP / each(t);
        const int lanes = elements(t, to_group * CMB_GROUP < t->n ? to_group * CMB_GROUP : t->n) - lane;
        for (int r = i; r < stop; r++)
            a[r - i] = p + r * step + lane;
        if (lanes > 0)
            product(t, stop - i, dim, lanes, a, 1, lane_row + lane, to + i, 0, true, w);
    }
}

/* ---- forward ------------------------------------------------------------------------------------ */

/* The state from which a query's softmax goes on: m (base 2), l, and sums that l divides. */
static void resume(const cmb_head *head, const tile_state *t, int lane, REAL *m, REAL *l, REAL *sum, uint64_t *seen) {
    const int64_t x = cmb_list_at(head->plan, t->tile->query, lane);
    const REAL lse = *lse_of(head, x);
    *m = -infinity;
    *l = 0;
    if (lse == -infinity || lse == only_infinite) { /* the sums are 0 */
        if (lse == only_infinite)
            *seen |= UINT64_C(1) << lane;
        return;
    }
    *m = (REAL)((double)lse * log2_e);
    *l = 1;
    memcpy(sum, result_row(head, x), (size_t)head->Dv * sizeof(REAL));
    if (t->weighted)
        memcpy(sum + head->Dv, at(head->region_key, x - head->L), (size_t)head->D * sizeof(REAL));
}

/* log2 of l > 0. A float's takes the first terms of the series of atanh, within 3e-11, at half the cost of libm's. */
static inline double log2_sum(REAL l) {
    if (sizeof(REAL) == 8 || !(l < infinity))
        return log2((double)l);
    enum { MANTISSA = 52, TERMS = 6 };
    const uint64_t root_half = 0x3fe6a09e667f3bcd; /* l = 2^power * f with f in [sqrt(1/2), sqrt(2)) */
    double f = (double)l;
    uint64_t word;
    memcpy(&word, &f, sizeof word);
    const int64_t power = (int64_t)(word - root_half) >> MANTISSA;
    word -= (uint64_t)power << MANTISSA;
    memcpy(&f, &word, sizeof f);
    const double t = (f - 1) / (f + 1);
    double sum = 0;
    for (int k = TERMS - 1; k >= 0; k--)
        sum = sum * (t * t) + 2 * log2_e / (2 * k + 1);
    return (double)power + sum * t;
}

static void conclude(const cmb_head *head, const tile_state *t, int lane, REAL m, REAL l, const REAL *sum,
                     uint64_t seen, cmb_scratch *w) {
    const int64_t x = cmb_list_at(head->plan, t->tile->query, lane);
    if (!(seen >> lane & 1)) /* the tile shows it nothing: its lse would come back rounded */
        return;
    /* Without a weight, 0 / 0. */
    *lse_of(head, x) = l == 0 ? only_infinite : (REAL)(((double)m + log2_sum(l)) * ln_2);
    const bool is_done = !t->regions && !head->result.data;
    w->kernel->divide(head->Dv, sum, l, is_done ? w->result_row : result_row(head, x));
    if (is_done && widens)
        to_stored(head->Dv, w->result_row, (STORED *)head->out.data + x * head->out.row, w);
    else if (is_done)
        add_numbers(head->Dv, w->result_row, at(head->out, x));
    if (t->weighted)
        w->kernel->divide(head->D, sum + head->Dv, l, at(head->region_key, x - head->L));
}

/* S of the chunk, times log2 e. */
static void logits(const cmb_head *head, const tile_state *t, bool clear, cmb_scratch *w) {
    row_products(t, w->key, head->D, w->packed, w->s, false, clear, w);
    if (is_paired(t))
        w->kernel->scale(t->rows * w->width, w->s, (REAL)(head->scale * log2_e));
    add_bias(head, t, w->width, w);
}

/* The tile before, where regions ask with its queries for rows of which it attends the first (what stands for a row
 * asks as its queries do): their softmax goes on from where that tile ends. Else NULL. */
static const cmb_tile *beginning(const cmb_head *head, tile_state *t) {
    const cmb_plan *plan = head->plan;
    const cmb_tile *tile = t->tile, *before = tile - 1;
    if (!t->regions || t->weighted || !head->pick_query || tile == plan->tile || before->width == 1 ||
        tile->query.count > before->query.count)
        return NULL;
    for (int i = 0; i < t->n; i++)
        if (head->pick[cmb_list_at(plan, tile->query, i) - head->L] != cmb_list_at(plan, before->query, i))
            return NULL;
    const cmb_run *run = &plan->run[tile->run];
    const cmb_list row = run->row;
    if (tile[1].run - tile->run != 1 || run->mask >= 0 || !are_positions(head, row))
        return NULL;
    const uint64_t *had = NULL;
    int32_t first = 0, end = 0;
    for (int32_t n = before->run; n < before[1].run; n++) {
        const cmb_run *next = &plan->run[n];
        const bool fits = next->row.step && next->row.start == row.start + row.step * end &&
                          (next->row.step == row.step || next->row.count == 1) && next->row.count <= row.count - end;
        if (!fits || had)
            return NULL;
        if (next->mask >= 0) {
            had = plan->mask + next->mask;
            first = end;
        }
        end += next->row.count;
    }
    t->had = had;
    t->had_first = first;
    t->had_end = end;
    t->next = had ? first : end;
    if (t->next == row.count) {
        t->run++;
        t->next = 0;
    }
    return before;
}

/* Packs the queries and begins their softmax, where earlier tiles left it or `afresh`. */
static void begin_lanes(const cmb_head *head, tile_state *t, bool afresh, cmb_scratch *w) {
    REAL *m = w->state, *l = m + WIDEST;
    const int64_t dim = head->Dv + (t->weighted ? head->D : 0);
    w->width = t->tile->width;
    w->seen = 0;
    w->ended = t->dropout ? NULL : t->tile;
    const bool most_resume = !afresh && head->plan->resumes;
    if (!most_resume)
        memset(w->sum, 0, (size_t)(t->n * dim) * sizeof(REAL));
    for (int lane = 0; lane < t->n; lane++) {
        const table_row query = query_row(head, cmb_list_at(head->plan, t->tile->query, live_lane(t, lane)), w);
        w->lane_in[lane] = operand(t, query, head->D, w->query_row + lane * head->D, w);
        w->lane_out[lane] = w->sum + lane * dim;
        if (afresh)
            continue;
        resume(head, t, lane, m + lane, l + lane, w->lane_out[lane], &w->seen);
        if (l[lane] > 0)
            w->ended = NULL;
        else if (most_resume)
            memset(w->lane_out[lane], 0, (size_t)dim * sizeof(REAL));
    }
    for (int lane = afresh ? 0 : t->n; lane < w->width; lane++) {
        m[lane] = -infinity;
        l[lane] = 0;
    }
    if (w->seen)
        w->ended = NULL;
    pack(t, w->lane_in, head->D, (REAL)(head->scale * log2_e), w->packed, w);
}

/* Takes the rows still to come into the lanes' softmax and sums; false where the call is cancelled. */
static bool attend_rows(const cmb_head *head, tile_state *t, bool exact, cmb_scratch *w, cmb_cancel *cancel,
                        int worker) {
    REAL *m = w->state, *l = m + WIDEST, *alpha = l + WIDEST;
    const int64_t dim = head->Dv + (t->weighted ? head->D : 0);
    bool started = false;
    for (int lane = 0; lane < t->n; lane++)
        started |= l[lane] > 0;
    for (; gather(head, t, w); started = true) {
        if (cmb_cancelled(cancel, worker))
            return false;
        logits(head, t, false, w);
        for (int lane = 0; lane < w->width; lane += CMB_GROUP) {
            int begin = 0, end = t->rows;
            if (t->masked) { /* the rows that this group sees */
                const uint64_t group = UINT64_C(0xffff) << lane;
                while (begin < end && !(w->lanes[begin] & group))
                    begin++;
                while (end > begin && !(w->lanes[end - 1] & group))
                    end--;
            }
            if (begin == end)
                continue;
            begin -= begin % each(t); /* whole pairs: of the other row, zeros */
            end += end < t->rows ? end % each(t) : 0;
            const bool changed = w->kernel->softmax(end - begin, w->s + begin * w->width, w->width,
                                                    t->masked ? w->lanes + begin : NULL, lane, m, l, alpha);
            for (int i = lane; changed && started && i < lane + CMB_GROUP && i < t->n; i++)
                if (alpha[i] != 1)
                    w->kernel->scale(dim, w->lane_out[i], alpha[i]);
        }
        for (int i = 0; i < t->rows; i++)
            w->seen |= w->lanes[i];
        if (t->dropout) {
            draw_dropout(head, t, w->width, w);
            drop(t, w->width, w->s, w);
        }
        lane_sums(t, w->s, w->value, head->Dv, w->lane_out, exact, w);
        if (t->weighted) {
            REAL *key_sum[WIDEST];
            for (int lane = 0; lane < t->n; lane++)
                key_sum[lane] = w->lane_out[lane] + head->Dv;
            lane_sums(t, w->s, w->key, head->D, key_sum, exact, w);
        }
    }
    return true;
}

static void lane_tile(const cmb_head *head, const cmb_tile *tile, bool exact, cmb_scratch *w, cmb_cancel *cancel,
                      int worker) {
    tile_state t = begin_tile(head, tile, w);
    if (!t.all)
        return;
    const cmb_tile *before = beginning(head, &t);
    if (!before)
        begin_lanes(head, &t, false, w);
    else if (w->ended != before) { /* as that tile begins, whether or not it is wanted itself */
        tile_state first = begin_tile(head, before, w);
        first.dropout = false;
        begin_lanes(head, &first, true, w);
        if (!attend_rows(head, &first, exact, w, cancel, worker))
            return;
    }
    if (!attend_rows(head, &t, exact, w, cancel, worker))
        return;
    const int64_t dim = head->Dv + (t.weighted ? head->D : 0);
    if (!exact && !w->kernel->finite(t.n * dim, w->sum)) {
        w->ended = NULL;
        lane_tile(head, tile, true, w, cancel, worker); /* nothing is stored yet */
        return;
    }
    for (int lane = 0; lane < t.n; lane++)
        conclude(head, &t, lane, w->state[lane], w->state[WIDEST + lane], w->lane_out[lane], w->seen, w);
    if (before) /* which have gone on */
        w->ended = NULL;
}

/* One query: rows it does not see are left out, so nothing needs a mask. */
static int visible_rows(const tile_state *t, cmb_scratch *w) {
    if (!t->masked)
        return t->rows;
    int n = 0;
    for (int i = 0; i < t->rows; i++)
        if (w->lanes[i] & 1) {
            w->key[n] = w->key[i];
            w->value[n] = w->value[i];
            w->bias[n] = w->bias[i];
            w->row[n] = w->row[i];
            if (w->backward) {
                w->dkey[n] = w->dkey[i];
                w->dvalue[n] = w->dvalue[i];
                w->listed[n] = w->listed[i];
            }
            n++;
        }
    return n;
}

static void row_tile(const cmb_head *head, const cmb_tile *tile, cmb_scratch *w, cmb_cancel *cancel, int worker) {
    tile_state t = begin_tile(head, tile, w);
    w->ended = NULL;
    REAL m, l, *sum = w->sum, *key_sum = sum + head->Dv, *query = w->line;
    const REAL *s = w->s;
    uint64_t seen = 0;
    if (!t.all)
        return;
    memset(sum, 0, (size_t)(head->Dv + (t.weighted ? head->D : 0)) * sizeof(REAL));
    resume(head, &t, 0, &m, &l, sum, &seen);
    memcpy(query, numbers(query_row(head, cmb_list_at(head->plan, tile->query, 0), w), head->D, w->query_row, w),
           (size_t)head->D * sizeof(REAL));
    w->kernel->scale(head->D, query, (REAL)(head->scale * log2_e));
    while (gather(head, &t, w)) {
        if (cmb_cancelled(cancel, worker))
            return;
        t.rows = visible_rows(&t, w);
        if (t.rows == 0)
            continue;
        seen = 1;
        w->kernel->dot(t.rows, w->key, head->D, query, w->s);
        add_bias(head, &t, 1, w);
        const bool started = l > 0;
        const REAL alpha = w->kernel->row_softmax(t.rows, w->s, &m, &l);
        if (started && alpha != 1)
            w->kernel->scale(head->Dv + (t.weighted ? head->D : 0), sum, alpha);
        if (t.dropout) {
            draw_dropout(head, &t, 1, w);
            drop(&t, 1, w->s, w);
        }
        w->kernel->product(1, head->Dv, t.rows, &s, 1, w->value, &sum, 0, true);
        if (t.weighted)
            w->kernel->product(1, head->D, t.rows, &s, 1, w->key, &key_sum, 0, true);
    }
    conclude(head, &t, 0, m, l, sum, seen, w);
}

/* Whether a tile belongs to the stages asked for. */
static bool wanted(const cmb_head *head, const cmb_tile *tile) {
    const bool regions = cmb_list_at(head->plan, tile->query, 0) >= head->L;
    return head->stages & (regions ? CMB_SUMMARIZE : CMB_ATTEND);
}

static void tile_forward(const cmb_head *head, int32_t number, int32_t ahead, cmb_scratch *w, cmb_cancel *cancel,
                         int worker) {
    const cmb_tile *tile = &head->plan->tile[number];
    if (!wanted(head, tile))
        return;
    begin_fetching(head, ahead, w);
    if (tile->width == 1)
        row_tile(head, tile, w, cancel, worker);
    else
        lane_tile(head, tile, false, w, cancel, worker);
}

/* ---- backward ----------------------------------------------------------------------------------- */

/* The gradient rows of a tile's queries: theirs, and of regions those that earlier tiles have summed up. */
static bool await_queries(const cmb_scratch *w) {
    return !w->item || cmb_await(w->item, w->item->held, w->item->count);
}

/* Those of the chunk's rows [begin, end). */
static bool await_rows(int begin, int end, const cmb_scratch *w) {
    return !w->item || cmb_await(w->item, w->listed[begin], w->listed[end - 1] + 1);
}

/* Gives up what the tile has listed up to the chunk's row before `end`. */
static void pass_rows(int end, const cmb_scratch *w) {
    if (w->item)
        cmb_pass(w->item, w->listed[end - 1] + 1);
}

static inline table_row grad_row(const cmb_head *head, int64_t x) {
    return x < head->L ? stored_row(head->grad.out, x) : number_row(sum_at(head->grad.region_value, x - head->L));
}

/* The rows of the tile's queries, and of what their gradients come from and go to. */
static void gather_queries(const cmb_head *head, const tile_state *t, cmb_scratch *w) {
    const cmb_list list = t->tile->query;
    for (int lane = 0; lane < t->n; lane++) {
        const int64_t x = cmb_list_at(head->plan, list, lane), r = x - head->L;
        const table_row query = query_row(head, cmb_list_at(head->plan, list, live_lane(t, lane)), w);
        w->lane_in[lane] = operand(t, query, head->D, w->query_row + lane * head->D, w);
        w->grad_in[lane] = operand(t, grad_row(head, x), head->Dv, w->grad_row + lane * head->Dv, w);
        w->lane_out[lane] =
            r < 0 ? sum_at(head->grad.query, x) : region_query_at(head, head->grad.region_query, w->own_query_grad, r);
        w->key_grad_in[lane] = t->weighted ? sum_at(head->grad.region_key, r) : NULL;
    }
    bring_together(t, list, head->query, head->D, t->n, w->lane_in, w->query_row, w);
    bring_together(t, list, head->grad.out, head->Dv, t->n, w->grad_in, w->grad_row, w);
}

/* lse in base 2 and delta of one of them; false where it attends nothing. */
static bool begin_lane(const cmb_head *head, const tile_state *t, int lane, REAL *lse2, REAL *delta, cmb_scratch *w) {
    const int64_t x = cmb_list_at(head->plan, t->tile->query, lane), r = x - head->L;
    const REAL lse = *lse_of(head, x);
    *lse2 = *delta = 0;
    if (lse == -infinity)
        return false;
    const REAL *result =
        r < 0 ? numbers(stored_row(head->out, x), head->Dv, w->result_row, w) : at(head->region_value, r);
    const REAL *out_grad =
        is_paired(t) ? numbers(grad_row(head, x), head->Dv, w->result_row + head->Dv, w) : w->grad_in[lane];
    *lse2 = (REAL)((double)lse * log2_e);
    w->kernel->dot(1, &result, head->Dv, out_grad, delta);
    if (t->weighted) {
        const REAL *key = at(head->region_key, r);
        REAL more;
        w->kernel->dot(1, &key, head->D, w->key_grad_in[lane], &more);
        *delta += more;
    }
    if (r < 0 && head->grad.lse.data)
        *delta -= *at(head->grad.lse, x);
    return true;
}

static void lane_tile_backward(const cmb_head *head, const cmb_tile *tile, cmb_scratch *w, cmb_cancel *cancel,
                               int worker) {
    tile_state t = begin_tile(head, tile, w);
    w->width = tile->width;
    REAL *lse2 = w->state, *delta = lse2 + WIDEST;
    if (!t.all || !await_queries(w))
        return;
    gather_queries(head, &t, w);
    uint64_t attending = 0;
    for (int lane = 0; lane < t.n; lane++)
        if (begin_lane(head, &t, lane, lse2 + lane, delta + lane, w))
            attending |= UINT64_C(1) << lane;
    t.all &= attending;
    if (!t.all)
        return;
    for (int lane = t.n; lane < w->width; lane++)
        lse2[lane] = delta[lane] = 0;
    pack(&t, w->lane_in, head->D, (REAL)(head->scale * log2_e), w->packed, w);
    pack(&t, w->grad_in, head->Dv, 1, w->packed_grad, w);
    if (t.weighted)
        w->kernel->pack(t.n, w->key_grad_in, head->D, 1, w->width, w->packed_key_grad);
    const REAL *const *query_in = w->lane_in, *const *grad_in = w->grad_in;
    if (is_paired(&t)) {
        query_in = pair_rows(t.n, query_in, head->D, w->pair_query, w->pair_query_in, w);
        grad_in = pair_rows(t.n, grad_in, head->Dv, w->pair_grad, w->pair_grad_in, w);
    }

    while (gather(head, &t, w)) {
        if (cmb_cancelled(cancel, worker))
            return;
        logits(head, &t, true, w);
        row_products(&t, w->value, head->Dv, w->packed_grad, w->dp, false, true, w);
        if (t.weighted)
            row_products(&t, w->key, head->D, w->packed_key_grad, w->dp, true, false, w);
        if (t.dropout) {
            draw_dropout(head, &t, w->width, w);
            drop(&t, w->width, w->dp, w);
        }
        bool finite = true;
        for (int lane = 0; lane < w->width; lane += CMB_GROUP)
            finite &= w->kernel->softmax_backward(t.rows, w->s, w->dp, w->width, t.masked ? w->lanes : NULL, lane, lse2,
                                                  delta, (REAL)head->scale);
        if (t.dropout)
            drop(&t, w->width, w->s, w);
        lane_sums(&t, w->dp, w->key, head->D, w->lane_out, !finite, w);
        for (int i = 0, end; i < t.rows; i = end) { /* of a shared head a few at a time: others wait for them */
            end = w->item && i + SLICE < t.rows ? i + SLICE : t.rows;
            if (!await_rows(i, end, w))
                return;
            row_sums(&t, i, end, w->s, grad_in, head->Dv, w->dvalue, !finite, w);
            if (t.weighted)
                row_sums(&t, i, end, w->s, w->key_grad_in, head->D, w->dkey, !finite, w);
            row_sums(&t, i, end, w->dp, query_in, head->D, w->dkey, !finite, w);
            pass_rows(end, w);
        }
    }
}

static void row_tile_backward(const cmb_head *head, const cmb_tile *tile, cmb_scratch *w, cmb_cancel *cancel,
                              int worker) {
    tile_state t = begin_tile(head, tile, w);
    REAL lse2, delta, *query = w->line;
    const REAL *dp = w->dp;
    if (!t.all || !await_queries(w))
        return;
    gather_queries(head, &t, w);
    if (!begin_lane(head, &t, 0, &lse2, &delta, w))
        return;
    memcpy(query, w->lane_in[0], (size_t)head->D * sizeof(REAL));
    w->kernel->scale(head->D, query, (REAL)(head->scale * log2_e));
    while (gather(head, &t, w)) {
        if (cmb_cancelled(cancel, worker))
            return;
        t.rows = visible_rows(&t, w);
        if (t.rows == 0)
            continue;
        if (!await_rows(0, t.rows, w))
            return;
        const REAL *p_at[CHUNK], *ds_at[CHUNK];
        for (int i = 0; i < t.rows; i++) {
            p_at[i] = w->s + i;
            ds_at[i] = w->dp + i;
        }
        w->kernel->dot(t.rows, w->key, head->D, query, w->s);
        add_bias(head, &t, 1, w);
        w->kernel->dot(t.rows, w->value, head->Dv, w->grad_in[0], w->dp);
        if (t.weighted) {
            REAL more[CHUNK];
            w->kernel->dot(t.rows, w->key, head->D, w->key_grad_in[0], more);
            for (int i = 0; i < t.rows; i++)
                w->dp[i] += more[i];
        }
        if (t.dropout) {
            draw_dropout(head, &t, 1, w);
            drop(&t, 1, w->dp, w);
        }
        w->kernel->row_softmax_backward(t.rows, w->s, w->dp, lse2, delta, (REAL)head->scale);
        if (t.dropout)
            drop(&t, 1, w->s, w);
        w->kernel->product(t.rows, head->Dv, 1, p_at, 0, w->grad_in, w->dvalue, 0, true);
        if (t.weighted)
            w->kernel->product(t.rows, head->D, 1, p_at, 0, w->key_grad_in, w->dkey, 0, true);
        w->kernel->product(t.rows, head->D, 1, ds_at, 0, w->lane_in, w->dkey, 0, true);
        w->kernel->product(1, head->D, t.rows, &dp, 1, w->key, w->lane_out, 0, true);
        pass_rows(t.rows, w);
    }
}

static void tile_backward(const cmb_head *head, int32_t number, int32_t ahead, cmb_scratch *w, cmb_item *item,
                          cmb_cancel *cancel, int worker) {
    const cmb_tile *tile = &head->plan->tile[number];
    if (!wanted(head, tile))
        return;
    begin_fetching(head, ahead, w);
    w->item = item;
    if (tile->width == 1)
        row_tile_backward(head, tile, w, cancel, worker);
    else
        lane_tile_backward(head, tile, w, cancel, worker);
}

/* ---- beginnings and ends ------------------------------------------------------------------------ */

static void begin(int64_t n, cmb_rows lse) {
    for (int64_t x = 0; x < n; x++)
        *at(lse, x) = -infinity;
}

static void finish(int64_t n, cmb_rows lse, cmb_rows rows, int64_t dim, cmb_rows more, int64_t more_dim) {
    for (int64_t x = 0; x < n; x++) {
        REAL *value = at(lse, x);
        if (*value == only_infinite)
            *value = (REAL)NAN;
        if (*value == -infinity && rows.data)
            memset((STORED *)rows.data + x * rows.row, 0, (size_t)dim * sizeof(STORED));
        if (*value == -infinity && more.data)
            memset((STORED *)more.data + x * more.row, 0, (size_t)more_dim * sizeof(STORED));
    }
}

static void copy_region_keys(const cmb_head *head, int64_t n, cmb_rows to, const cmb_scratch *w) {
    for (int64_t r = 0; r < n; r++) {
        STORED *row = (STORED *)to.data + r * to.row;
        if (*at(head->region_lse, r) == -infinity)
            memset(row, 0, (size_t)head->D * sizeof *row);
        else if (head->pick_key)
            memcpy(row, (const STORED *)head->key.data + head->pick[r] * head->key.row, (size_t)head->D * sizeof *row);
        else
            to_stored(head->D, at(head->region_key, r), row, w);
    }
}

static void add(int64_t n, int64_t dim, cmb_rows lse, cmb_rows from, cmb_rows to, const cmb_scratch *w) {
    for (int64_t x = 0; x < n; x++)
        if (!lse.data || *at(lse, x) != -infinity)
            add_numbers(dim, numbers(stored_row(from, x), dim, w->sum, w), sum_at(to, x));
}

static void widen(int64_t n, int64_t dim, cmb_rows from, cmb_rows to, const cmb_scratch *w) {
    for (int64_t x = 0; x < n; x++)
        numbers(stored_row(from, x), dim, at(to, x), w);
}

static void narrow(int64_t n, int64_t dim, cmb_rows from, cmb_rows to, const cmb_scratch *w) {
    for (int64_t x = 0; x < n; x++)
        to_stored(dim, at(from, x), (STORED *)to.data + x * to.row, w);
}

const cmb_stage_table *NAME2(cmb_stages, FORMAT)(void) {
    static const cmb_stage_table table = {
        .size = sizeof(REAL),
        .stored_size = sizeof(STORED),
        .scratch = take_scratch,
        .pool = pool,
        .pool_own = pool_own,
        .pool_backward = pool_backward,
        .tile = tile_forward,
        .tile_backward = tile_backward,
        .begin = begin,
        .finish = finish,
        .copy_region_keys = copy_region_keys,
        .clear = clear,
        .add = add,
        .widen = widen,
        .narrow = narrow,
    };
    return &table;
}

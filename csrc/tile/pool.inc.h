// SPDX-License-Identifier: Apache-2.0
/*
 * Pooling: the abstractions q_R and k_R of regions, and their biases, from their children, forward and backward. A
 * child is a position or a row that was pooled earlier: a region, or a scratch row of the same task (table rows L + R
 * ..). This file knows no tile.
 */

/* Unmasked positions below row x >= L. */
static inline int32_t *count_of(const cmb_head *head, cmb_scratch *w, int64_t x) {
    const int64_t r = x - head->L, R = head->plan->R;
    CMB_ASSERT(0 <= r && r < R + w->N);
    return r < R ? &head->count[r] : &w->count[r - R];
}

static inline int32_t *pick_of(const cmb_head *head, cmb_scratch *w, int64_t x) {
    const int64_t r = x - head->L, R = head->plan->R;
    return r < R ? &head->picked[r] : &w->pick[r - R];
}

/* Whether row x takes part as a child. */
static inline bool is_live_child(const cmb_head *head, cmb_scratch *w, int32_t x) {
    return !head->counted || (x < head->L ? is_live(head, x) : *count_of(head, w, x) > 0);
}

/* Where the rows of one kind lie: of queries or keys, or of their gradients. */
typedef struct {
    cmb_rows position, region;
    REAL *scratch;        /* [N][D] */
    const int32_t *place; /* of regions, as in cmb_head */
    REAL *own;            /* the worker's rows for the task at hand */
} pooled;

static pooled pooled_queries(const cmb_head *head, const cmb_scratch *w) {
    return (pooled){head->query, head->region_query, w->pool_query, head->query_row, w->own_query};
}

static pooled pooled_keys(const cmb_head *head, const cmb_scratch *w) {
    return (pooled){head->key, head->region_key, w->pool_key, head->key_row, w->own_key};
}

/* Row x as REAL. A position only of gradients: the positions' queries and keys are STORED. */
static inline REAL *pool_row(const cmb_head *head, const pooled *rows, int64_t x) {
    const int64_t r = x - head->L, R = head->plan->R;
    if (r < 0)
        return zeroed_at(rows->position, x);
    if (r >= R)
        return rows->scratch + (r - R) * head->D;
    return zeroed_placed_at(rows->place, rows->region, rows->own, head->D, r);
}

/* Returns the unmasked positions below a pool step's children, and in *children the number of live children. Where some
 * may be masked, or are regions, w->weight becomes their weights: positions for a mean, else 1. */
static int32_t count_children(const cmb_head *head, const cmb_pool *pool, cmb_scratch *w, int32_t *children) {
    const cmb_plan *plan = head->plan;
    *children = pool->child.count;
    if (!head->counted)
        return pool->child.count;
    int32_t total = 0, n = 0;
    for (int32_t t = 0; t < pool->child.count; t++) {
        const int32_t x = cmb_list_at(plan, pool->child, t);
        const int32_t below = x < head->L ? is_live(head, x) : *count_of(head, w, x);
        if (below)
            w->weight[n++] = plan->pooling == CMB_POOL_MEAN ? (REAL)below : 1;
        total += below;
    }
    *children = n;
    return total;
}

/* w->child becomes the rows of the live children. */
static void gather_children(const cmb_head *head, const cmb_pool *pool, const pooled *rows, cmb_scratch *w) {
    for (int32_t t = 0, n = 0; t < pool->child.count; t++) {
        const int32_t x = cmb_list_at(head->plan, pool->child, t);
        if (!is_live_child(head, w, x))
            continue;
        w->child[n] = x < head->L ? as_real(stored_row(rows->position, x), head->D, w->child_copy + n * head->D, w)
                                  : pool_row(head, rows, x);
        n++;
    }
}

/* w->stored_child becomes the live children's rows of 16-bit numbers. False if a child is a region, whose row is REAL.
 */
static bool gather_stored_children(const cmb_head *head, const cmb_pool *pool, const pooled *rows, cmb_scratch *w) {
    for (int32_t t = 0, n = 0; is_narrow && t < pool->child.count; t++) {
        const int32_t x = cmb_list_at(head->plan, pool->child, t);
        if (x >= head->L)
            return false;
        if (is_live_child(head, w, x))
            w->stored_child[n++] = (const uint16_t *)(const void *)stored_row(rows->position, x).stored;
    }
    return is_narrow;
}

static void gather_child_gradients(const cmb_head *head, const cmb_pool *pool, const pooled *rows, cmb_scratch *w) {
    for (int32_t t = 0, n = 0; t < pool->child.count; t++) {
        const int32_t x = cmb_list_at(head->plan, pool->child, t);
        if (is_live_child(head, w, x))
            w->child_grad[n++] = pool_row(head, rows, x);
    }
}

static void pool_rows(const cmb_head *head, const cmb_pool *pool, const pooled *rows, int32_t n, int32_t total,
                      cmb_scratch *w) {
    REAL *to = pool_row(head, rows, pool->row);
    const bool is_max_of_several = n > 1 && head->plan->pooling == CMB_POOL_MAX;
    if (is_max_of_several && gather_stored_children(head, pool, rows, w)) {
        w->format->max_pool(n, w->stored_child, head->D, (float *)to, false);
        return;
    }
    gather_children(head, pool, rows, w);
    if (n == 1) { /* the child itself, without rounding, whatever the pooling */
        memcpy(to, w->child[0], (size_t)head->D * sizeof(REAL));
    } else if (is_max_of_several) {
        w->kernel->max_pool(n, w->child, head->D, to, false);
    } else {
        const REAL *weight = w->weight;
        w->kernel->gemm(1, head->D, n, &weight, 1, w->child, &to, 0, false);
        if (head->plan->pooling == CMB_POOL_MEAN)
            w->kernel->divide(head->D, to, (REAL)total, to);
    }
}

/* Where b of row x lies that a pool step makes, or its gradient: `scratch` holds those of scratch rows. */
static inline REAL *pooled_bias(const cmb_head *head, cmb_rows region, REAL *scratch, int64_t x) {
    const int64_t r = x - head->L, R = head->plan->R;
    CMB_ASSERT(r >= 0);
    return r < R ? zeroed_at(region, r) : scratch + r - R;
}

static inline REAL child_bias(const cmb_head *head, const cmb_scratch *w, int64_t x) {
    return x < head->L ? *at(head->key_bias, x) : *pooled_bias(head, head->region_bias, w->pool_bias, x);
}

/* b_R, by the rule that makes k_R. Sums are double, because biases may be large and differ by little. */
static void pool_biases(const cmb_head *head, const cmb_pool *pool, int32_t n, int32_t total, cmb_scratch *w) {
    REAL *to = pooled_bias(head, head->region_bias, w->pool_bias, pool->row), top = -infinity;
    const bool is_max = n == 1 || head->plan->pooling == CMB_POOL_MAX;
    double sum = 0;
    for (int32_t t = 0, i = 0; t < pool->child.count; t++) {
        const int32_t x = cmb_list_at(head->plan, pool->child, t);
        if (!is_live_child(head, w, x))
            continue;
        const REAL b = child_bias(head, w, x);
        top = b > top || isnan(b) ? b : top;
        sum += is_max ? 0 : (double)w->weight[i++] * (double)b;
    }
    *to = is_max ? top : (REAL)(head->plan->pooling == CMB_POOL_MEAN ? sum / total : sum);
}

/* Whether region r lies in the worker's scratch, for the task at hand. */
static inline bool is_own(const int32_t *place, int64_t r) { return place && place[r] < 0; }

/* What pool steps make; with OWN_ROWS only the q_R and k_R in the worker's scratch, and the rows that these need.
 * COUNTS are those of the table; those of scratch rows are always made. A task's counts of the table are written once,
 * by `pool`, because workers that share a head read them later. */
enum { QUERIES = 1, KEYS = 2, BIASES = 4, OWN_ROWS = 8, COUNTS = 16 };

static bool makes_queries(const cmb_head *head, int64_t r, int what) {
    const bool is_scratch_row = r >= head->plan->R;
    return what & QUERIES && head->pool_query &&
           (!(what & OWN_ROWS) || (is_scratch_row ? head->query_row != NULL : is_own(head->query_row, r)));
}

/* A plan with rows L + R .. has no own k_R (engine/call.c). */
static bool makes_keys(const cmb_head *head, int64_t r, int what) {
    return what & KEYS && head->pool_key && (!(what & OWN_ROWS) || (r < head->plan->R && is_own(head->key_row, r)));
}

/* The task's pool steps that write row `first` or a later one. */
static void pool_from(const cmb_head *head, int32_t task, int64_t first, int what, cmb_scratch *w) {
    const cmb_plan *plan = head->plan;
    const pooled query = pooled_queries(head, w), key = pooled_keys(head, w);
    if (!head->counted && !head->pool_query && !head->pool_key && !head->pool_bias && !head->picked)
        return;
    for (int32_t p = plan->task[task].pool; p < plan->task[task + 1].pool; p++) {
        const cmb_pool *step = &plan->pool[p];
        int32_t n;
        if (step->row < first)
            continue;
        const int32_t total = count_children(head, step, w, &n);
        if (head->counted && (what & COUNTS || step->row >= head->L + plan->R))
            *count_of(head, w, step->row) = total;
        if (total == 0)
            continue;
        if (head->picked) { /* the first live child: a position, or that child's own pick */
            int32_t t = 0, x = cmb_list_at(plan, step->child, 0);
            while (!is_live_child(head, w, x))
                x = cmb_list_at(plan, step->child, ++t);
            __atomic_store_n(pick_of(head, w, step->row), x < head->L ? x : *pick_of(head, w, x), __ATOMIC_RELAXED);
            continue;
        }
        if (makes_queries(head, step->row - head->L, what))
            pool_rows(head, step, &query, n, total, w);
        if (makes_keys(head, step->row - head->L, what))
            pool_rows(head, step, &key, n, total, w);
        if (what & BIASES && head->pool_bias)
            pool_biases(head, step, n, total, w);
    }
}

/* How many regions of the task are own, and whether all are. */
static int64_t count_own(const cmb_head *head, int32_t task, const int32_t *place, bool *are_all) {
    const cmb_plan *plan = head->plan;
    int64_t own = 0, regions = 0;
    for (int32_t p = plan->task[task].pool; place && p < plan->task[task + 1].pool; p++) {
        const int64_t r = plan->pool[p].row - head->L;
        regions += r < plan->R;
        own += r < plan->R && place[r] < 0;
    }
    *are_all = place && own == regions;
    return own;
}

/* A task's abstractions. In backward pool_own makes the q_R and k_R that lie in scratch, and pool makes the tables'
 * rows. For these it makes the rows in scratch too, since a table's row may be pooled from them. */
static void pool(const cmb_head *head, int32_t task, cmb_scratch *w) {
    bool all_queries = false, all_keys = false;
    if (w->backward) {
        count_own(head, task, head->query_row, &all_queries);
        count_own(head, task, head->key_row, &all_keys);
    }
    pool_from(head, task, head->L, (all_queries ? 0 : QUERIES) | (all_keys ? 0 : KEYS) | BIASES | COUNTS, w);
}

/* Backward, before a task's tiles: makes the task's own abstractions, and zeroes their gradients. */
static void pool_own(const cmb_head *head, int32_t task, cmb_scratch *w) {
    bool are_all;
    const int64_t queries = count_own(head, task, head->query_row, &are_all),
                  keys = count_own(head, task, head->key_row, &are_all);
    const bool overwritten = head->query_row && head->plan->N > 0; /* rows L + R .., by other tasks */
    if (queries + keys == 0 && !overwritten)
        return;
    pool_from(head, task, head->L, QUERIES | KEYS | OWN_ROWS, w);
    memset(w->own_query_grad, 0, (size_t)(queries * head->D) * sizeof(REAL));
    memset(w->own_key_grad, 0, (size_t)(keys * head->D) * sizeof(REAL));
    memset(w->own_value_grad, 0, (size_t)(keys * head->Dv) * sizeof(REAL));
}

/* to += factor * from */
static void add_scaled(cmb_scratch *w, int64_t dim, REAL factor, const REAL *from, REAL *to) {
    const REAL *a = &factor;
    w->kernel->gemm(1, dim, 1, &a, 0, &from, &to, 0, true);
}

static void pool_rows_backward(const cmb_head *head, const cmb_pool *pool, const pooled *rows, const pooled *grads,
                               int32_t n, int32_t total, cmb_scratch *w) {
    const REAL *top = pool_row(head, rows, pool->row);
    REAL *grad = pool_row(head, grads, pool->row);
    gather_child_gradients(head, pool, grads, w);
    const bool is_max_of_several = n > 1 && head->plan->pooling == CMB_POOL_MAX;
    if (is_max_of_several && gather_stored_children(head, pool, rows, w)) {
        w->format->max_pool_backward(n, w->stored_child, head->D, (const float *)top, (const float *)grad,
                                     (float *const *)(void *)w->child_grad);
    } else if (is_max_of_several) {
        gather_children(head, pool, rows, w);
        w->kernel->max_pool_backward(n, w->child, head->D, top, grad, w->child_grad);
    } else {
        for (int32_t t = 0; t < n; t++) {
            const bool mean = n > 1 && head->plan->pooling == CMB_POOL_MEAN;
            add_scaled(w, head->D, mean ? w->weight[t] / (REAL)total : 1, grad, w->child_grad[t]);
        }
    }
}

static void pool_biases_backward(const cmb_head *head, const cmb_pool *pool, int32_t n, int32_t total, cmb_scratch *w) {
    const cmb_rows grads = head->grad.region_bias;
    const REAL top = *pooled_bias(head, head->region_bias, w->pool_bias, pool->row),
               grad = *pooled_bias(head, grads, w->pool_bias_grad, pool->row);
    const bool is_max = n == 1 || head->plan->pooling == CMB_POOL_MAX, is_mean = head->plan->pooling == CMB_POOL_MEAN;
    for (int32_t t = 0, i = 0; t < pool->child.count; t++) {
        const int32_t x = cmb_list_at(head->plan, pool->child, t);
        if (!is_live_child(head, w, x))
            continue;
        REAL *to = x < head->L ? zeroed_at(head->grad.key_bias, x) : pooled_bias(head, grads, w->pool_bias_grad, x);
        const REAL b = is_max ? child_bias(head, w, x) : 0;
        if (!is_max) {
            *to += is_mean ? w->weight[i++] / (REAL)total * grad : grad;
        } else if (b == top || (isnan(b) && isnan(top))) { /* the first of equals */
            *to += grad;
            return;
        }
    }
}

static void pool_backward(const cmb_head *head, int32_t task, cmb_scratch *w, cmb_item *item) {
    const cmb_plan *plan = head->plan;
    const pooled query = pooled_queries(head, w), key = pooled_keys(head, w);
    const pooled query_grad = {head->grad.query, head->grad.region_query, w->pool_query_grad, head->query_row,
                               w->own_query_grad};
    const pooled key_grad = {head->grad.key, head->grad.region_key, w->pool_key_grad, head->key_row, w->own_key_grad};
    if (item && !cmb_await_tickets(item, 0, item->count))
        return;
    if (plan->N) { /* other tasks have overwritten the scratch rows */
        pool_from(head, task, head->L + plan->R, (head->query_row ? 0 : QUERIES) | KEYS | BIASES, w);
        memset(w->pool_query_grad, 0, (size_t)(plan->N * head->D) * sizeof(REAL));
        memset(w->pool_key_grad, 0, (size_t)(plan->N * head->D) * sizeof(REAL));
        if (head->pool_bias)
            memset(w->pool_bias_grad, 0, (size_t)plan->N * sizeof(REAL));
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
                add_scaled(w, head->D, 1, zeroed_at(head->grad.region_query, r),
                           zeroed_at(head->grad.query, head->pick[r]));
            if (r < plan->R && head->pick_key)
                add_scaled(w, head->D, 1, zeroed_at(head->grad.region_key, r),
                           zeroed_at(head->grad.key, head->pick[r]));
            if (r < plan->R && head->pick_bias)
                *zeroed_at(head->grad.key_bias, head->pick[r]) += *zeroed_at(head->grad.region_bias, r);
            continue;
        }
        if (head->pool_query)
            pool_rows_backward(head, step, &query, &query_grad, n, total, w);
        if (head->pool_key)
            pool_rows_backward(head, step, &key, &key_grad, n, total, w);
        if (head->pool_bias)
            pool_biases_backward(head, step, n, total, w);
    }
}

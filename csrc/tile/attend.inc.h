// SPDX-License-Identifier: Apache-2.0
/*
 * The tile: its queries attend its rows, a chunk at a time. Two kinds, each forward and then backward:
 *
 *     lane tile    16 to 64 queries: S is [rows][lanes], vectors run along the lanes
 *     row tile     one query against many rows (a large region's summary): vectors run along the features
 *
 * A lane tile of one query runs as a row tile whose sums are in the order of lanes: the bits are the same, and no lane
 * is idle. (Backward, only if the query is a position.)
 */

/* Whether the call is cancelled. Asked before the chunk's products, which take some nanoseconds for 16 logits of 64
 * features. */
static inline bool is_cancelled(const cmb_head *head, const tile_state *t, const cmb_scratch *w) {
    const int64_t logits = (int64_t)t->rows * t->tile->width;
    return cmb_worker_tick(w->cancel, w->worker, (logits / 16 + 1) * ((head->D + head->Dv) / 128 + 1));
}

/* ---- dropout ------------------------------------------------------------------------------------ */

/* Draws the factors of the chunk's weights. */
static void draw_dropout(const cmb_head *head, const tile_state *t, int lanes, cmb_scratch *w) {
    uint32_t query[CMB_TILE] = {0}; /* positions */
    for (int lane = 0; lane < t->n; lane++)
        query[lane] = (uint32_t)(cmb_list_at(head->plan, t->tile->query, lane) + head->plan->first_query);
    w->kernel->dropout(t->rows, w->row, lanes, query, &head->dropout, w->drop_factor);
}

static void drop(const tile_state *t, int lanes, REAL *x, cmb_scratch *w) {
    w->kernel->multiply(t->rows * lanes, w->drop_factor, x);
}

/* ---- prefix reuse ------------------------------------------------------------------------------- */

/* In row-major plans a region's query is a position's query, and the region attends a run whose first elements that
 * position has attended: the keys of its row of the grid, up to its own when causal. A tile of such regions starts from
 * the final m, l and O of the tile before it in the plan, which has the positions' queries, and attends the rest of the
 * run (cmb_plan_traits, reused_rows). Returns that tile and sets which rows are left; NULL if this tile starts with
 * nothing attended. */
static const cmb_tile *reusable_prefix(const cmb_head *head, tile_state *t) {
    const cmb_plan *plan = head->plan;
    const cmb_tile *tile = t->tile;
    if (!t->regions || t->weighted || t->weighted_bias || !head->pick_query ||
        !plan->traits.reused_rows[tile - plan->tile])
        return NULL;
    for (int i = 0; head->pick != plan->traits.pick && i < t->n; i++) { /* with a key mask, picks may be others */
        const int64_t r = cmb_list_at(plan, tile->query, i) - head->L;
        if (head->pick[r] != plan->traits.pick[r])
            return NULL;
    }
    const cmb_run *last = &plan->run[tile->run - 1];
    t->prefix.end = plan->traits.reused_rows[tile - plan->tile];
    t->prefix.first = t->prefix.end - last->row.count;
    t->prefix.mask = last->mask < 0 ? NULL : plan->mask + last->mask;
    t->next = t->prefix.mask ? t->prefix.first : t->prefix.end;
    if (t->next == plan->run[tile->run].row.count) {
        t->run++;
        t->next = 0;
    }
    return tile - 1;
}

/* ---- lane tile, forward ------------------------------------------------------------------------- */

/* Packs the queries, and loads m, l and O of each lane: as its last tile left them, or `afresh` of nothing attended. */
static void begin_lanes(const cmb_head *head, tile_state *t, bool afresh, cmb_scratch *w) {
    REAL *m = w->softmax_state, *l = m + CMB_TILE;
    const int64_t dim = t->sums;
    w->width = t->tile->width;
    w->attending = 0;
    w->last_tile = t->dropout || (!afresh && has_sink(head, t)) ? NULL : t->tile;
    const bool may_resume = !afresh && head->plan->traits.has_multi_tile_queries;
    if (!may_resume)
        memset(w->sum, 0, (size_t)(t->n * dim) * sizeof(REAL));
    for (int lane = 0; lane < t->n; lane++) {
        const table_row query = query_row(head, cmb_list_at(head->plan, t->tile->query, live_lane(t, lane)), w);
        w->lane_query[lane] = operand(t, query, head->D, w->query_copy + lane * head->D, w);
        w->lane_sum[lane] = w->sum + lane * dim;
        if (afresh)
            continue;
        if (resume(head, t, lane, m + lane, l + lane, w->lane_sum[lane], w))
            w->last_tile = NULL;
        else if (may_resume)
            memset(w->lane_sum[lane], 0, (size_t)dim * sizeof(REAL));
    }
    for (int lane = afresh ? 0 : t->n; lane < w->width; lane++) {
        m[lane] = -infinity;
        l[lane] = 0;
    }
    pack_queries(head, t, w);
}

/* The online softmax of one chunk: w->s becomes e^(S - m); m and l are updated, and earlier sums are scaled where m has
 * grown. `started`: some lane has sums. */
static void softmax_lanes(const tile_state *t, const REAL *bias, bool started, cmb_scratch *w) {
    REAL *m = w->softmax_state, *l = m + CMB_TILE, *alpha = l + CMB_TILE;
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
        begin -= begin % numbers_per_word(t); /* whole pairs of rows: the masked one's weights become zeros */
        end += end < t->rows ? end % numbers_per_word(t) : 0;
        const bool changed =
            w->kernel->softmax(end - begin, w->s + begin * w->width, w->width, t->masked ? w->lanes + begin : NULL,
                               bias ? bias + begin : NULL, lane, m, l, alpha);
        for (int i = lane; changed && started && i < lane + CMB_GROUP && i < t->n; i++)
            if (alpha[i] != 1)
                w->kernel->scale(t->sums, w->lane_sum[i], alpha[i]);
    }
}

/* O += P^T V where each lane has an h_R of its own: lane by lane, over the rows that it sees. */
static void own_value_sums(const cmb_head *head, const tile_state *t, cmb_scratch *w) {
    CMB_ASSERT(w->width == CMB_GROUP && !is_paired(t)); /* so that no row is a copy */
    for (int lane = 0; lane < t->n; lane++) {
        const int64_t own = lane * head->lane_value;
        int n = 0;
        for (int i = 0; i < t->rows; i++) {
            if (!(w->lanes[i] >> lane & 1))
                continue;
            w->compact[n] = w->s[i * CMB_GROUP + lane];
            w->compact_row[n++] = w->value[i] + (w->row[i] < head->L ? 0 : own);
        }
        const REAL *weights = w->compact;
        w->kernel->gemm(1, head->Dv, n, &weights, 1, w->compact_row, w->lane_sum + lane, 0, true);
    }
}

/* Attends the tile's remaining rows. False where the call is cancelled. */
static bool attend_rows(const cmb_head *head, tile_state *t, bool exact, cmb_scratch *w) {
    const REAL *l = w->softmax_state + CMB_TILE;
    bool started = false;
    for (int lane = 0; lane < t->n; lane++)
        started |= l[lane] > 0;
    for (; gather(head, t, w); started = true) {
        if (is_cancelled(head, t, w))
            return false;
        begin_products(t, w);
        row_products(t, w->key, head->D, w->packed, w->s, false, false, w);
        score(head, t, w->width, w);
        softmax_lanes(t, biases(head, w), started, w);
        for (int i = 0; i < t->rows; i++)
            w->attending |= w->lanes[i];
        if (t->dropout) {
            draw_dropout(head, t, w->width, w);
            drop(t, w->width, w->s, w);
        }
        if (head->lane_value)
            own_value_sums(head, t, w);
        else
            lane_sums(t, w->s, w->value, head->Dv, w->lane_sum, exact, w);
        REAL *more_sum[CMB_TILE];
        for (int lane = 0; t->weighted && lane < t->n; lane++)
            more_sum[lane] = w->lane_sum[lane] + head->Dv;
        if (t->weighted)
            lane_sums(t, w->s, w->key, head->D, more_sum, exact, w);
        for (int lane = 0; t->weighted_bias && lane < t->n; lane++)
            more_sum[lane] = w->lane_sum[lane] + t->sums - 1;
        if (t->weighted_bias)
            lane_sums(t, w->s, w->bias_row, 1, more_sum, exact, w);
        end_products(t, w);
    }
    return true;
}

static void lane_tile(const cmb_head *head, const cmb_tile *tile, bool exact, cmb_scratch *w) {
    tile_state t = begin_tile(head, tile, w);
    if (!t.all)
        return;
    const cmb_tile *before = reusable_prefix(head, &t);
    if (!before)
        begin_lanes(head, &t, false, w);
    else if (w->last_tile != before) { /* the scratch does not hold its softmax: compute that again */
        tile_state first = begin_tile(head, before, w);
        first.dropout = false;
        begin_lanes(head, &first, true, w);
        if (!attend_rows(head, &first, exact, w))
            return;
    }
    if (!attend_rows(head, &t, exact, w))
        return;
    if (!exact && !w->kernel->finite(t.n * t.sums, w->sum)) {
        w->last_tile = NULL;
        lane_tile(head, tile, true, w); /* from the start: nothing is stored yet */
        return;
    }
    for (int lane = 0; lane < t.n; lane++) {
        if (lane % 2 == 0)
            prefetch_some(w);
        finish_lane(head, &t, lane, w->softmax_state[lane], w->softmax_state[CMB_TILE + lane], w->lane_sum[lane],
                    w->attending, w);
    }
    if (before) /* the scratch holds the regions' softmax */
        w->last_tile = NULL;
}

/* ---- row tile, forward -------------------------------------------------------------------------- */

/* Four lines at a time: the loop would cost as much as the prefetches. Up to three lines behind the bytes come too. */
static inline void prefetch_bytes(uintptr_t first, int64_t bytes) {
    enum { LINE = 64, TOGETHER = 4 };
    for (int64_t at = 0; at < bytes; at += TOGETHER * LINE)
        for (int n = 0; n < TOGETHER; n++)
            __builtin_prefetch((const void *)(first + (uintptr_t)(at + n * LINE)));
}

/* The lines of n rows, `ahead` bytes behind them. Rows side by side take one loop. */
static inline void prefetch_rows(int n, const REAL *const *row, int64_t dim, uintptr_t ahead) {
    const int64_t bytes = dim * (int64_t)sizeof(REAL);
    const bool are_neighbours = (uintptr_t)row[n - 1] - (uintptr_t)row[0] == (uintptr_t)((n - 1) * bytes);
    for (int i = 0; i < (are_neighbours ? 1 : n); i++)
        prefetch_bytes((uintptr_t)row[i] + ahead, are_neighbours ? n * bytes : bytes);
}

/* S of one query over the chunk. One query uses each row once, so that memory limits it: while 16 rows of keys are
 * multiplied, their values are prefetched, and the keys that lie 16 rows further. */
static void dot_in_order(const cmb_head *head, const tile_state *t, const REAL *query, cmb_scratch *w) {
    for (int i = 0; i < t->rows; i += CMB_GROUP) {
        const int n = t->rows - i < CMB_GROUP ? t->rows - i : CMB_GROUP;
        if (!is_narrow) {
            prefetch_rows(n, w->value + i, head->Dv, 0);
            prefetch_rows(n, w->key + i, head->D, CMB_GROUP * (uintptr_t)head->key.row * sizeof(REAL));
        }
        w->kernel->dot_in_order(n, w->key + i, head->D, query, w->s + i);
    }
}

static void row_tile(const cmb_head *head, const cmb_tile *tile, cmb_scratch *w) {
    const bool in_order = tile->width > 1;
    tile_state t = begin_tile(head, tile, w);
    w->last_tile = NULL;
    REAL m, l, *sum = w->sum, *key_sum = sum + head->Dv, *bias_sum = sum + t.sums - 1;
    const REAL *s = w->s;
    uint64_t attending = 0;
    if (!t.all)
        return;
    memset(sum, 0, (size_t)t.sums * sizeof(REAL));
    resume(head, &t, 0, &m, &l, sum, w);
    const table_row row = query_row(head, cmb_list_at(head->plan, tile->query, 0), w);
    const REAL *query = scaled_query(head, as_real(row, head->D, w->query_copy, w), w);
    while (gather(head, &t, w)) {
        if (is_cancelled(head, &t, w))
            return;
        keep_seen_rows(&t, w);
        if (t.rows == 0)
            continue;
        attending = 1;
        if (in_order)
            dot_in_order(head, &t, query, w);
        else
            w->kernel->dot(t.rows, w->key, head->D, query, w->s);
        score(head, &t, 1, w);
        const bool started = l > 0;
        const REAL alpha = in_order ? w->kernel->row_softmax_in_order(t.rows, w->s, biases(head, w), &m, &l)
                                    : w->kernel->row_softmax(t.rows, w->s, biases(head, w), &m, &l);
        if (started && alpha != 1)
            w->kernel->scale(t.sums, sum, alpha);
        if (t.dropout) {
            draw_dropout(head, &t, 1, w);
            drop(&t, 1, w->s, w);
        }
        w->kernel->gemm(1, head->Dv, t.rows, &s, 1, w->value, &sum, 0, true);
        if (t.weighted)
            w->kernel->gemm(1, head->D, t.rows, &s, 1, w->key, &key_sum, 0, true);
        if (t.weighted_bias)
            w->kernel->gemm(1, 1, t.rows, &s, 1, w->bias_row, &bias_sum, 0, true);
    }
    finish_lane(head, &t, 0, m, l, sum, attending, w);
}

/* ---- backward: gradient rows that workers share ------------------------------------------------- */

/* Waits for the gradient rows of the tile's queries. A region's hold what earlier tiles have summed. False where the
 * call is cancelled. */
static bool await_queries(const cmb_scratch *w) {
    return !w->item || cmb_await_tickets(w->item, w->item->held, w->item->count);
}

/* The same for the gradient rows of the chunk's rows [begin, end). */
static bool await_rows(int begin, int end, const cmb_scratch *w) {
    return !w->item || cmb_await_tickets(w->item, w->place[begin], w->place[end - 1] + 1);
}

/* Releases the tile's gradient rows up to the chunk's row end - 1, the rows that were masked among them too. */
static void release_rows(int end, const cmb_scratch *w) {
    if (w->item)
        cmb_release_tickets(w->item, w->place[end - 1] + 1);
}

/* ---- lane tile, backward ------------------------------------------------------------------------ */

/* For each lane its query, dO, and the row that receives dQ. */
static void gather_queries(const cmb_head *head, const tile_state *t, cmb_scratch *w) {
    const cmb_list list = t->tile->query;
    for (int lane = 0; lane < t->n; lane++) {
        const int64_t x = cmb_list_at(head->plan, list, lane), r = x - head->L;
        const table_row query = query_row(head, cmb_list_at(head->plan, list, live_lane(t, lane)), w);
        w->lane_query[lane] = operand(t, query, head->D, w->query_copy + lane * head->D, w);
        w->lane_grad[lane] = operand(t, out_grad_row(head, x, w), head->Dv, w->grad_copy + lane * head->Dv, w);
        w->lane_sum[lane] =
            r < 0 ? zeroed_at(head->grad.query, x)
                  : zeroed_placed_at(head->query_row, head->grad.region_query, w->own_query_grad, head->D, r);
        w->lane_key_grad[lane] = t->weighted ? zeroed_at(head->grad.region_key, r) : NULL;
        if (t->weighted_bias)
            w->lane_bias_grad[lane] = zeroed_at(head->grad.region_bias, r);
    }
    make_contiguous(t, list, head->query, head->D, t->n, w->lane_query, w->query_copy, w);
    make_contiguous(t, list, head->grad.out, head->Dv, t->n, w->lane_grad, w->grad_copy, w);
}

/* m, 1 / l and delta of a lane. False where it attends nothing. */
static bool begin_lane_backward(const cmb_head *head, const tile_state *t, int lane, REAL *m, REAL *inverse_l,
                                REAL *delta, cmb_scratch *w) {
    const int64_t x = cmb_list_at(head->plan, t->tile->query, lane), r = x - head->L;
    const REAL *state = state_of(head, x);
    *m = *inverse_l = *delta = 0;
    if (attends_nothing(state))
        return false;
    *m = state[0];
    *inverse_l = 1 / state[1];
    const REAL *result =
        r < 0 ? as_real(stored_row(head->out, x), head->Dv, w->result_copy, w) : at(head->region_value, r);
    const REAL *out_grad =
        is_paired(t) ? as_real(out_grad_row(head, x, w), head->Dv, w->result_copy + head->Dv, w) : w->lane_grad[lane];
    w->kernel->dot(1, &result, head->Dv, out_grad, delta);
    if (t->weighted) {
        const REAL *key = at(head->region_key, r);
        REAL more;
        w->kernel->dot(1, &key, head->D, w->lane_key_grad[lane], &more);
        *delta += more;
    }
    if (t->weighted_bias)
        *delta += *at(head->region_bias, r) * *w->lane_bias_grad[lane];
    if (r < 0 && head->grad.lse.data)
        *delta -= *at(head->grad.lse, x);
    return true;
}

static void lane_tile_backward(const cmb_head *head, const cmb_tile *tile, cmb_scratch *w) {
    tile_state t = begin_tile(head, tile, w);
    w->width = tile->width;
    REAL *m = w->softmax_state, *inverse_l = m + CMB_TILE, *delta = inverse_l + CMB_TILE;
    if (!t.all || !await_queries(w))
        return;
    gather_queries(head, &t, w);
    uint64_t attending = 0;
    for (int lane = 0; lane < t.n; lane++)
        if (begin_lane_backward(head, &t, lane, m + lane, inverse_l + lane, delta + lane, w))
            attending |= UINT64_C(1) << lane;
    if (has_sink(head, &t))
        sink_gradients(head, &t, attending, m, inverse_l, delta, w);
    t.all &= attending;
    if (!t.all)
        return;
    for (int lane = t.n; lane < w->width; lane++)
        m[lane] = inverse_l[lane] = delta[lane] = 0;
    pack_queries(head, &t, w);
    pack(&t, w->lane_grad, head->Dv, 1, w->packed_grad, w);
    if (t.weighted)
        pack(&t, w->lane_key_grad, head->D, 1, w->packed_key_grad, w);
    if (t.weighted_bias)
        pack(&t, w->lane_bias_grad, 1, 1, w->packed_bias_grad, w);
    const REAL *const *queries = w->lane_query, *const *grads = w->lane_grad;
    if (is_paired(&t)) {
        queries = pair_rows(t.n, queries, head->D, w->pair_query, w->pair_queries, w);
        grads = pair_rows(t.n, grads, head->Dv, w->pair_grad, w->pair_grads, w);
    }

    while (gather(head, &t, w)) {
        if (is_cancelled(head, &t, w))
            return;
        begin_products(&t, w);
        row_products(&t, w->key, head->D, w->packed, w->s, false, true, w);
        bool finite = score(head, &t, w->width, w);
        row_products(&t, w->value, head->Dv, w->packed_grad, w->dp, false, true, w);
        if (t.weighted)
            row_products(&t, w->key, head->D, w->packed_key_grad, w->dp, true, false, w);
        if (t.weighted_bias)
            row_products(&t, w->bias_row, 1, w->packed_bias_grad, w->dp, true, false, w);
        if (t.dropout) {
            draw_dropout(head, &t, w->width, w);
            drop(&t, w->width, w->dp, w);
        }
        finite &= score_backward(head, &t, w->width, m, inverse_l, delta, w);
        if (t.dropout)
            drop(&t, w->width, w->s, w);
        lane_sums(&t, w->dp, w->key, head->D, w->lane_sum, !finite, w);
        end_products(&t, w);
        /* Where workers share the head, a few rows at a time: the other workers wait for them. */
        for (int i = 0, end; i < t.rows; i = end) {
            end = w->item && i + slice_rows(&t, w) < t.rows ? i + slice_rows(&t, w) : t.rows;
            if (!await_rows(i, end, w))
                return;
            begin_products(&t, w);
            row_sums(&t, i, end, w->s, grads, head->Dv, w->dvalue, !finite, w);
            if (t.weighted)
                row_sums(&t, i, end, w->s, w->lane_key_grad, head->D, w->dkey, !finite, w);
            row_sums(&t, i, end, w->dp, queries, head->D, w->dkey, !finite, w);
            if (head->biased)
                add_bias_sums(head, &t, i, end, !finite, w);
            end_products(&t, w);
            release_rows(end, w);
        }
    }
}

/* ---- row tile, backward ------------------------------------------------------------------------- */

static void row_tile_backward(const cmb_head *head, const cmb_tile *tile, cmb_scratch *w) {
    const bool in_order = tile->width > 1;
    tile_state t = begin_tile(head, tile, w);
    REAL m, inverse_l, delta;
    const REAL *dp = w->dp;
    if (!t.all || !await_queries(w))
        return;
    gather_queries(head, &t, w);
    if (!begin_lane_backward(head, &t, 0, &m, &inverse_l, &delta, w))
        return;
    if (has_sink(head, &t))
        sink_gradients(head, &t, 1, &m, &inverse_l, &delta, w);
    const REAL *query = scaled_query(head, w->lane_query[0], w);
    while (gather(head, &t, w)) {
        if (is_cancelled(head, &t, w))
            return;
        keep_seen_rows(&t, w);
        if (t.rows == 0)
            continue;
        if (!await_rows(0, t.rows, w))
            return;
        const REAL *p_at[CHUNK], *ds_at[CHUNK];
        for (int i = 0; i < t.rows; i++) {
            p_at[i] = w->s + i;
            ds_at[i] = w->dp + i;
        }
        if (in_order)
            w->kernel->dot_in_order(t.rows, w->key, head->D, query, w->s);
        else
            w->kernel->dot(t.rows, w->key, head->D, query, w->s);
        score(head, &t, 1, w);
        if (in_order)
            w->kernel->dot_in_order(t.rows, w->value, head->Dv, w->lane_grad[0], w->dp);
        else
            w->kernel->dot(t.rows, w->value, head->Dv, w->lane_grad[0], w->dp);
        if (t.weighted) {
            REAL more[CHUNK];
            w->kernel->dot(t.rows, w->key, head->D, w->lane_key_grad[0], more);
            for (int i = 0; i < t.rows; i++)
                w->dp[i] += more[i];
        }
        for (int i = 0; t.weighted_bias && i < t.rows; i++)
            w->dp[i] += w->bias[i] * *w->lane_bias_grad[0];
        if (t.dropout) {
            draw_dropout(head, &t, 1, w);
            drop(&t, 1, w->dp, w);
        }
        score_backward(head, &t, 1, &m, &inverse_l, &delta, w);
        if (t.dropout)
            drop(&t, 1, w->s, w);
        w->kernel->gemm(t.rows, head->Dv, 1, p_at, 0, w->lane_grad, w->dvalue, 0, true);
        if (t.weighted)
            w->kernel->gemm(t.rows, head->D, 1, p_at, 0, w->lane_key_grad, w->dkey, 0, true);
        w->kernel->gemm(t.rows, head->D, 1, ds_at, 0, w->lane_query, w->dkey, 0, true);
        w->kernel->gemm(1, head->D, t.rows, &dp, 1, w->key, w->lane_sum, 0, true);
        if (head->biased)
            add_bias_sums(head, &t, 0, t.rows, true, w);
        release_rows(t.rows, w);
    }
}

/* ---- either kind -------------------------------------------------------------------------------- */

/* Whether a tile belongs to a stage that the caller asks for. */
static bool is_wanted(const cmb_head *head, const cmb_tile *tile) {
    const bool regions = cmb_list_at(head->plan, tile->query, 0) >= head->L;
    return head->stages & (regions ? CMB_SUMMARIZE : CMB_ATTEND);
}

/* Whether a lane tile may run as a row tile: not where its products take pairs, or it continues another tile's softmax.
 */
static bool is_one_query(const cmb_head *head, const cmb_tile *tile, const cmb_scratch *w) {
    return tile->query.count == 1 && !head->pick_query && !(is_narrow && w->format->gemm);
}

static void tile_forward(const cmb_head *head, int32_t number, int32_t ahead, cmb_scratch *w) {
    const cmb_tile *tile = &head->plan->tile[number];
    if (!is_wanted(head, tile))
        return;
    begin_prefetch(head, ahead, w);
    if (tile->width == 1 || is_one_query(head, tile, w))
        row_tile(head, tile, w);
    else
        lane_tile(head, tile, false, w);
}

static void tile_backward(const cmb_head *head, int32_t number, int32_t ahead, cmb_scratch *w, cmb_item *item) {
    const cmb_tile *tile = &head->plan->tile[number];
    if (!is_wanted(head, tile))
        return;
    begin_prefetch(head, ahead, w);
    w->item = item;
    const bool is_position = cmb_list_at(head->plan, tile->query, 0) < head->L;
    if (tile->width == 1 || (is_position && is_one_query(head, tile, w)))
        row_tile_backward(head, tile, w);
    else
        lane_tile_backward(head, tile, w);
}

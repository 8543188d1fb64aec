// SPDX-License-Identifier: Apache-2.0
/*
 * The score: the logit that the product of a query and a key becomes, and its derivative. Whatever changes a logit is
 * in this file. Lane tiles and row tiles, forward and backward, call its functions:
 *
 *     z(x, t) = cap(scale * (q_x . k_t)) + size(t) + b(t)
 *     cap(a)  = softcap * tanh(a / softcap), or a without a softcap
 *     size(t) = with size_bias the log of the unmasked positions below region t, else 0
 *     b(t)    = the bias of row t: of a position the caller's, of a region pooled as its key is, or the caller's
 *
 *     dz / d(q_x . k_t) = scale * cap'        dz / db(t) = 1
 *
 * A bias may be as large as the sequence is long, and z, rounded, would lose the other terms. So b stays apart from
 * w->s, and the softmax takes (b - m) + s, whose difference is exact where it matters.
 *
 * The scale is multiplied into the queries before the products, which takes D multiplications a query and not one for
 * each element of S. Queries that are pairs of 16-bit numbers stay as stored, and S is scaled.
 */

/* Q^T of a lane tile, times scale. */
static inline void pack_queries(const cmb_head *head, const tile_state *t, cmb_scratch *w) {
    pack(t, w->lane_query, head->D, (REAL)head->scale, w->packed, w);
}

/* The query of a row tile, times scale. */
static inline const REAL *scaled_query(const cmb_head *head, const REAL *query, cmb_scratch *w) {
    memcpy(w->compact, query, (size_t)head->D * sizeof(REAL));
    w->kernel->scale(head->D, w->compact, (REAL)head->scale);
    return w->compact;
}

/* The biases of the chunk, b of each row; NULL where logits have none. */
static inline REAL *biases(const cmb_head *head, const cmb_scratch *w) { return head->biased ? w->bias : NULL; }

static inline REAL size_of(const cmb_head *head, int64_t x) {
    return x < head->L ? 0 : (REAL)log((double)head->count[x - head->L]);
}

/* w->s[row][lane] of the chunk: products become logits, but for their biases, which are gathered beside them. A row
 * tile has one lane. False if the softcap has made a product finite that was not: backward asks. */
static inline bool score(const cmb_head *head, const tile_state *t, int lanes, cmb_scratch *w) {
    CMB_ASSERT(0 < t->rows && t->rows <= CHUNK && (lanes == w->width || (lanes == 1 && t->n == 1)));
    bool finite = true;
    if (is_paired(t))
        w->kernel->scale(t->rows * lanes, w->s, (REAL)head->scale);
    if (head->softcap > 0)
        finite = w->kernel->softcap(t->rows * lanes, w->s, (REAL)head->softcap, w->slope);
    for (int i = 0; head->plan->size_bias && i < t->rows; i++) {
        const REAL size = size_of(head, w->row[i]);
        for (int lane = 0; size != 0 && lane < lanes; lane++)
            w->s[i * lanes + lane] += size;
    }
    for (int i = 0; head->biased && i < t->rows; i++)
        w->bias[i] = bias_of(head, w->row[i]);
    return finite;
}

/* The derivative. w->s: logits become the weights P. w->dp: the gradient of the weights becomes that of the products,
 * and w->bias_sum that of the biases. m, inverse_l = 1 / l and delta have an element for each lane. False if an element
 * of S or dP was not finite; row tiles do not ask. */
static inline bool score_backward(const cmb_head *head, const tile_state *t, int lanes, const REAL *m,
                                  const REAL *inverse_l, const REAL *delta, cmb_scratch *w) {
    static const REAL ones[CMB_TILE] = {[0 ... CMB_TILE - 1] = 1};
    const REAL scale = (REAL)head->scale, slope = head->biased ? 1 : scale, *row[CHUNK];
    const int64_t n = (int64_t)t->rows * lanes;
    bool finite = true;
    if (lanes == 1)
        w->kernel->row_softmax_backward(n, w->s, w->dp, biases(head, w), *m, *inverse_l, *delta, slope);
    for (int lane = 0; lanes > 1 && lane < lanes; lane += CMB_GROUP)
        finite &= w->kernel->softmax_backward(t->rows, w->s, w->dp, lanes, t->masked ? w->lanes : NULL, biases(head, w),
                                              lane, m, inverse_l, delta, slope);
    if (head->biased) {
        for (int i = 0; i < t->rows; i++)
            row[i] = w->dp + i * lanes;
        w->kernel->dot(t->rows, row, lanes, ones, w->bias_sum);
        w->kernel->scale(n, w->dp, scale);
    }
    if (head->softcap > 0)
        w->kernel->multiply(n, w->slope, w->dp);
    return finite;
}

/* Adds the gradients of the biases of the chunk's rows [begin, end): w->bias_sum and, where b_R is weighted, what the
 * weights w->s pass on from it. `exact` as for row_sums. */
static inline void add_bias_sums(const cmb_head *head, const tile_state *t, int begin, int end, bool exact,
                                 cmb_scratch *w) {
    REAL *to[CHUNK];
    for (int i = begin; i < end; i++) {
        to[i] = is_kept_apart(head, w->row[i], w) ? w->apart_bias + (w->dkey[i] - w->apart_key) / head->D
                                                  : bias_grad_of(head, w->row[i]);
        if (to[i])
            *to[i] += w->bias_sum[i];
    }
    if (t->weighted_bias && t->tile->width > 1)
        row_sums(t, begin, end, w->s, w->lane_bias_grad, 1, to, exact, w);
    for (int i = begin; t->weighted_bias && t->tile->width == 1 && i < end; i++)
        *to[i] += w->s[i] * *w->lane_bias_grad[0];
}

/* The logits of query x and n regions, without their terms, in the order of sums of cmb_select's blocks of one query;
 * 0 where the call is cancelled. */
static void region_logits(const cmb_head *head, int64_t x, int64_t n, const int32_t *region, double *to,
                          cmb_scratch *w) {
    const REAL *query = as_real(query_row(head, x, w), head->D, w->query_copy, w);
    for (int64_t first = 0; first < n; first += CHUNK) {
        const int64_t count = n - first < CHUNK ? n - first : CHUNK;
        if (cmb_cancelled(w->cancel, w->worker)) {
            memset(to + first, 0, (size_t)(n - first) * sizeof *to);
            return;
        }
        for (int64_t k = 0; k < count; k++)
            w->key[k] = key_row(head, head->L + region[first + k], w).real;
        w->kernel->dot(count, w->key, head->D, query, w->s);
        for (int64_t k = 0; k < count; k++)
            to[first + k] = (double)((REAL)head->scale * w->s[k]);
    }
}

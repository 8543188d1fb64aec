// SPDX-License-Identifier: Apache-2.0
/*
 * Rows of the table [positions ; regions], of the results and of the gradients.
 *
 * x is a row of the table: position x, or region r = x - L. Rows of positions are STORED; all other rows are REAL.
 */

static inline REAL *at(cmb_rows rows, int64_t x) { return (REAL *)rows.data + x * rows.row; }

/* One row as it lies in memory: `real` if that is not NULL, else `stored`. */
typedef struct {
    const STORED *stored;
    const REAL *real;
} table_row;

static inline table_row stored_row(cmb_rows rows, int64_t x) {
    return (table_row){.stored = (const STORED *)rows.data + x * rows.row};
}

static inline table_row real_row(const REAL *real) { return (table_row){.real = real}; }

/* The row as REAL: in place, or widened into `copy`. */
static inline const REAL *as_real(table_row row, int64_t dim, REAL *copy, const cmb_scratch *w) {
    if (row.real)
        return row.real;
    if (!is_narrow)
        return (const REAL *)(const void *)row.stored;
    w->format->widen(dim, (const uint16_t *)(const void *)row.stored, (float *)copy);
    return copy;
}

/* The row as pairs of 16-bit numbers, a zero after an odd last one: in place, or in `copy`. */
static const REAL *as_pairs(table_row row, int64_t dim, void *copy, const cmb_scratch *w) {
    if (!row.real && dim % 2 == 0 && (uintptr_t)row.stored % sizeof(float) == 0)
        return (const REAL *)(const void *)row.stored;
    uint16_t *narrow = copy;
    if (row.real)
        w->format->round(dim, (const float *)row.real, narrow);
    else
        memcpy(narrow, row.stored, (size_t)dim * sizeof *narrow);
    if (dim % 2)
        narrow[dim] = 0;
    return copy;
}

/* Rounds where STORED is narrower. */
static inline void to_stored(int64_t dim, const REAL *from, STORED *to, const cmb_scratch *w) {
    if (is_narrow)
        w->format->narrow(dim, (const float *)from, (uint16_t *)to);
    else
        memcpy(to, from, (size_t)dim * sizeof *to);
}

static inline void add_row(int64_t dim, const REAL *from, REAL *to) {
    for (int64_t d = 0; d < dim; d++)
        to[d] += from[d];
}

/* ---- gradients ---------------------------------------------------------------------------------- */

static void zero_row(const cmb_rows *rows, int64_t x) { memset(at(*rows, x), 0, (size_t)rows->dim * sizeof(REAL)); }

static void zero_block(cmb_rows rows, int64_t block) {
    CMB_ASSERT(rows.data && 0 <= block && block < cmb_blocks(rows.count));
    const int64_t first = block * CMB_BLOCK_ROWS,
                  end = first + CMB_BLOCK_ROWS < rows.count ? first + CMB_BLOCK_ROWS : rows.count;
    for (int64_t x = first; x < end; x++)
        zero_row(&rows, x);
    if (rows.unzeroed)
        rows.unzeroed[block] = 0;
}

/* Row x; of a gradient its block is zeroed when the first of its rows is asked for. */
static inline REAL *zeroed_at(cmb_rows rows, int64_t x) {
    CMB_ASSERT(rows.data && x >= 0 && (!rows.unzeroed || x < rows.count));
    if (rows.unzeroed && rows.unzeroed[x / CMB_BLOCK_ROWS])
        zero_block(rows, x / CMB_BLOCK_ROWS);
    return at(rows, x);
}

/* ---- queries, keys, values ---------------------------------------------------------------------- */

/* Row r of regions, which `place` may place elsewhere (cmb_plan_traits, query_row): a row of the head's array, or of
 * `own`, the worker's rows for the task at hand. */
static inline REAL *placed_at(const int32_t *place, cmb_rows rows, REAL *own, int64_t dim, int64_t r) {
    const int64_t n = place ? place[r] : r;
    return n < 0 ? own + ~n * dim : at(rows, n);
}

/* The same; of gradients the block is zeroed as in zeroed_at. */
static inline REAL *zeroed_placed_at(const int32_t *place, cmb_rows rows, REAL *own, int64_t dim, int64_t r) {
    const int64_t n = place ? place[r] : r;
    return n < 0 ? own + ~n * dim : zeroed_at(rows, n);
}

/* Whether row x takes part: a position that is not masked, a region with such a position below it. */
static inline bool is_live(const cmb_head *head, int64_t x) {
    if (head->all_live)
        return true;
    if (x < head->L)
        return !head->key_mask || head->key_mask[x * head->mask_row];
    return head->count[x - head->L] > 0;
}

/* The position whose row is region r's. Atomic, because a prefetch may ask while another worker's task picks: it then
 * reads an earlier pick, and fetches a row in vain. */
static inline int32_t picked_position(const cmb_head *head, int64_t r) {
    return __atomic_load_n(&head->pick[r], __ATOMIC_RELAXED);
}

static inline table_row query_row(const cmb_head *head, int64_t x, const cmb_scratch *w) {
    const int64_t r = x - head->L;
    if (r < 0 || head->pick_query)
        return stored_row(head->query, r < 0 ? x : picked_position(head, r));
    return real_row(placed_at(head->query_row, head->region_query, w->own_query, head->D, r));
}

static inline table_row key_row(const cmb_head *head, int64_t x, const cmb_scratch *w) {
    const int64_t r = x - head->L;
    if (r < 0 || head->pick_key)
        return stored_row(head->key, r < 0 ? x : picked_position(head, r));
    return real_row(placed_at(head->key_row, head->region_key, w->own_key, head->D, r));
}

/* h_R. Backward, and where the caller asks for summaries, none is the worker's own. */
static inline REAL *region_value_row(const cmb_head *head, int64_t r, const cmb_scratch *w) {
    return placed_at(head->value_row, head->region_value, w->own_value, head->Dv, r);
}

static inline table_row value_row(const cmb_head *head, int64_t x, const cmb_scratch *w) {
    return x < head->L ? stored_row(head->value, x) : real_row(region_value_row(head, x - head->L, w));
}

/* The rows of dK and dV. */
static inline REAL *key_grad_row(const cmb_head *head, int64_t x, const cmb_scratch *w) {
    const int64_t r = x - head->L;
    return r < 0 ? zeroed_at(head->grad.key, x)
                 : zeroed_placed_at(head->key_row, head->grad.region_key, w->own_key_grad, head->D, r);
}

static inline REAL *value_grad_row(const cmb_head *head, int64_t x, const cmb_scratch *w) {
    const int64_t r = x - head->L;
    return r < 0 ? zeroed_at(head->grad.value, x)
                 : zeroed_placed_at(head->key_row, head->grad.region_value, w->own_value_grad, head->Dv, r);
}

/* dO of a position; of a region dh_R, which the tiles that attend it have summed. */
static inline table_row out_grad_row(const cmb_head *head, int64_t x, const cmb_scratch *w) {
    return x < head->L ? stored_row(head->grad.out, x) : real_row(value_grad_row(head, x, w));
}

/* ---- biases ------------------------------------------------------------------------------------- */

/* b of row x. */
static inline REAL bias_of(const cmb_head *head, int64_t x) {
    const int64_t r = x - head->L;
    if (r < 0 || head->pick_bias)
        return head->key_bias.data ? *at(head->key_bias, r < 0 ? x : picked_position(head, r)) : 0;
    return head->region_bias.data ? *at(head->region_bias, r) : 0;
}

/* The gradient of row x's b; NULL where there is no such bias. */
static inline REAL *bias_grad_of(const cmb_head *head, int64_t x) {
    const int64_t r = x - head->L;
    const cmb_rows rows = r < 0 ? head->grad.key_bias : head->grad.region_bias;
    return rows.data ? zeroed_at(rows, r < 0 ? x : r) : NULL;
}

/* ---- sums that are kept apart -------------------------------------------------------------------- */

/* A tile's sum over its queries is added to a row of dK or dV once. So a row of zeros may take that row's place, and be
 * added to it later, without a change of bits. */

static void keep_apart(bool positions, cmb_scratch *w) {
    w->keeps_apart = true;
    w->keeps_positions_apart = positions;
    w->aparts = 0;
}

/* Whether what tiles add to table row x is kept apart. It is not for a region whose gradient lies in the worker's
 * scratch. */
static inline bool is_kept_apart(const cmb_head *head, int64_t x, const cmb_scratch *w) {
    if (x < head->L)
        return w->keeps_positions_apart;
    return w->keeps_apart && !(head->key_row && head->key_row[x - head->L] < 0);
}

/* A row of zeros for dk, dv and db of table row x. Returns its number. */
static int32_t new_apart(const cmb_head *head, int32_t x, cmb_scratch *w) {
    CMB_ASSERT(w->aparts < w->apart);
    const int32_t n = w->aparts++;
    w->apart_row[n] = x;
    memset(w->apart_key + n * head->D, 0, (size_t)head->D * sizeof(REAL));
    memset(w->apart_value + n * head->Dv, 0, (size_t)head->Dv * sizeof(REAL));
    if (head->biased)
        w->apart_bias[n] = 0;
    return n;
}

static void add_apart(const cmb_head *head, cmb_scratch *w) {
    w->keeps_apart = w->keeps_positions_apart = false;
    for (int32_t n = 0; n < w->aparts; n++) {
        const int32_t x = w->apart_row[n];
        add_row(head->D, w->apart_key + n * head->D, key_grad_row(head, x, w));
        add_row(head->Dv, w->apart_value + n * head->Dv, value_grad_row(head, x, w));
        REAL *bias = head->biased ? bias_grad_of(head, x) : NULL;
        if (bias)
            *bias += w->apart_bias[n];
    }
}

/* ---- whole arrays ------------------------------------------------------------------------------- */

static void widen(int64_t n, int64_t dim, cmb_rows from, cmb_rows to, const cmb_scratch *w) {
    for (int64_t x = 0; x < n; x++)
        as_real(stored_row(from, x), dim, at(to, x), w);
}

static void narrow(int64_t n, int64_t dim, cmb_rows from, cmb_rows to, const cmb_scratch *w) {
    for (int64_t x = 0; x < n; x++)
        to_stored(dim, at(from, x), (STORED *)to.data + x * to.row, w);
}

static void mean(int64_t n, int64_t dim, int64_t terms, int64_t count, cmb_rows from, cmb_rows to,
                 const cmb_scratch *w) {
    enum { PIECE = 64 }; /* features at a time */
    REAL sum[PIECE], copy[PIECE];
    for (int64_t x = 0; x < n; x++)
        for (int64_t d = 0; d < dim; d += PIECE) {
            const int64_t size = dim - d < PIECE ? dim - d : PIECE;
            table_row term = stored_row(from, x);
            term.stored += d;
            memcpy(sum, as_real(term, size, copy, w), (size_t)size * sizeof(REAL));
            for (int64_t t = 1; t < terms; t++) {
                term.stored += dim;
                add_row(size, as_real(term, size, copy, w), sum);
            }
            for (int64_t k = 0; k < size; k++)
                sum[k] /= (REAL)count;
            to_stored(size, sum, (STORED *)to.data + x * to.row + d, w);
        }
}

static void divide(int64_t n, int64_t count, cmb_rows rows) {
    for (int64_t x = 0; x < n; x++)
        *at(rows, x) /= (REAL)count;
}

// SPDX-License-Identifier: Apache-2.0
/*
 * A query's softmax between its tiles. Where a query has several tiles, each resumes what the one before it stored:
 *
 *     begin -> tile: resume .. finish_lane -> next tile: resume .. finish_lane -> finish, write_lse
 *
 *     state    m, the largest logit so far, and l, the sum of e^(logit - m);   -inf and 0: nothing attended
 *     result   O = (sum of e^(logit - m) v) / l, in the head's array `result`, or region_value for a region
 */

/* m and l of row x. */
static inline REAL *state_of(const cmb_head *head, int64_t x) {
    return x < head->L ? at(head->softmax, x) : at(head->region_softmax, x - head->L);
}

static inline bool attends_nothing(const REAL *state) { return state[0] == -infinity; }

static inline REAL *result_row(const cmb_head *head, int64_t x, const cmb_scratch *w) {
    return x < head->L ? at(head->result, x) : region_value_row(head, x - head->L, w);
}

static void begin(int64_t n, cmb_rows softmax) {
    for (int64_t x = 0; x < n; x++) {
        at(softmax, x)[0] = -infinity;
        at(softmax, x)[1] = 0;
    }
}

/* ---- from tile to tile -------------------------------------------------------------------------- */

/* With l = 0 all weights were 0: each sum is 0, or NaN where a value was not finite. Divided by l both become NaN. That
 * is the right result if no tile follows, but a tile that follows must resume the sums. So a sum of 0 is stored as this
 * NaN: its payload tells it from others. */
static inline REAL zero_sum(void) {
    const uint32_t word = 0x7fc0a110;
    const uint64_t long_word = 0x7ff800000000a110;
    REAL x;
    memcpy(&x, sizeof x == sizeof word ? (const void *)&word : &long_word, sizeof x);
    return x;
}

static void store_sums(int64_t dim, const REAL *sum, REAL l, REAL *row, const cmb_scratch *w) {
    const REAL zero = zero_sum();
    w->kernel->divide(dim, sum, l, row);
    for (int64_t d = 0; l == 0 && d < dim; d++)
        if (sum[d] == 0)
            memcpy(row + d, &zero, sizeof zero);
}

static void load_sums(int64_t dim, const REAL *row, REAL l, REAL *sum, const cmb_scratch *w) {
    const REAL zero = zero_sum();
    memcpy(sum, row, (size_t)dim * sizeof *sum);
    if (l != 0)
        w->kernel->scale(dim, sum, l);
    for (int64_t d = 0; l == 0 && d < dim; d++)
        if (memcmp(sum + d, &zero, sizeof zero) == 0)
            sum[d] = 0;
}

/* Whether the softmax of a tile's queries has the part with the logit `sink` and the value 0. */
static inline bool has_sink(const cmb_head *head, const tile_state *t) { return !t->regions && head->sink.data; }

/* Loads a lane's m, l and sums as its last tile left them. Returns false, and leaves the sums, where it has attended
 * nothing: then m and l are those of the sink alone, or of nothing. */
static bool resume(const cmb_head *head, const tile_state *t, int lane, REAL *m, REAL *l, REAL *sum, cmb_scratch *w) {
    const int64_t x = cmb_list_at(head->plan, t->tile->query, lane);
    const REAL *state = state_of(head, x);
    *m = state[0];
    *l = state[1];
    if (attends_nothing(state)) {
        if (has_sink(head, t)) {
            *m = *at(head->sink, x);
            *l = 1;
        }
        return false;
    }
    load_sums(head->Dv, result_row(head, x, w), *l, sum, w);
    if (t->weighted)
        load_sums(head->D, at(head->region_key, x - head->L), *l, sum + head->Dv, w);
    if (t->weighted_bias)
        load_sums(1, at(head->region_bias, x - head->L), *l, sum + t->sums - 1, w);
    return true;
}

/* Stores a lane's m, l and result at the end of a tile. A lane that has seen no row of the tile keeps what it has:
 * storing it again would round it again. */
static void finish_lane(const cmb_head *head, const tile_state *t, int lane, REAL m, REAL l, const REAL *sum,
                        uint64_t attending, cmb_scratch *w) {
    const int64_t x = cmb_list_at(head->plan, t->tile->query, lane);
    if (!(attending >> lane & 1))
        return;
    CMB_ASSERT(!(l < 0));
    REAL *state = state_of(head, x);
    state[0] = m > lowest ? m : lowest;
    state[1] = l;
    const bool is_done = !t->regions && !head->result.data; /* the query's only tile: straight to `out` */
    store_sums(head->Dv, sum, l, is_done ? w->result_copy : result_row(head, x, w), w);
    if (is_done && is_narrow)
        to_stored(head->Dv, w->result_copy, (STORED *)head->out.data + x * head->out.row, w);
    else if (is_done)
        add_row(head->Dv, w->result_copy, at(head->out, x));
    if (t->weighted)
        store_sums(head->D, sum + head->Dv, l, at(head->region_key, x - head->L), w);
    if (t->weighted_bias)
        store_sums(1, sum + t->sums - 1, l, at(head->region_bias, x - head->L), w);
}

/* ---- after the last tile ------------------------------------------------------------------------ */

static void fill(REAL *row, int64_t dim, REAL value) {
    for (int64_t d = 0; d < dim; d++)
        row[d] = value;
}

static void finish(int64_t n, cmb_rows softmax, cmb_rows rows, int64_t dim, cmb_rows more, int64_t more_dim) {
    for (int64_t x = 0; x < n; x++) {
        const REAL *state = at(softmax, x), value = attends_nothing(state) ? 0 : (REAL)NAN;
        if (state[1] != 0)
            continue;
        if (rows.data)
            fill(at(rows, x), dim, value);
        if (more.data)
            fill(at(more, x), more_dim, value);
    }
}

static void clear_unattended(int64_t n, cmb_rows softmax, cmb_rows rows, int64_t dim) {
    for (int64_t x = 0; x < n; x++)
        if (attends_nothing(at(softmax, x)))
            memset((STORED *)rows.data + x * rows.row, 0, (size_t)dim * sizeof(STORED));
}

/* log l, l > 0. For a float the first terms of the series of atanh, within 3e-11: half the cost of libm's. */
static inline double log_sum(REAL l) {
    if (sizeof(REAL) == 8 || !(l < infinity))
        return log((double)l);
    enum { MANTISSA = 52, TERMS = 6 };
    const uint64_t root_half = 0x3fe6a09e667f3bcd; /* l = 2^power * f with f in [sqrt(1/2), sqrt(2)) */
    const double ln_2 = 0.69314718055994530942;
    double f = (double)l;
    uint64_t word;
    memcpy(&word, &f, sizeof word);
    const int64_t power = (int64_t)(word - root_half) >> MANTISSA;
    word -= (uint64_t)power << MANTISSA;
    memcpy(&f, &word, sizeof f);
    const double t = (f - 1) / (f + 1);
    double sum = 0;
    for (int k = TERMS - 1; k >= 0; k--)
        sum = sum * (t * t) + 2.0 / (2 * k + 1);
    return (double)power * ln_2 + sum * t;
}

static void write_lse(int64_t n, cmb_rows softmax, cmb_rows sink, cmb_rows lse) {
    const REAL empty = sink.data ? *at(sink, 0) : -infinity;
    for (int64_t x = 0; x < n; x++) {
        const REAL *state = at(softmax, x);
        if (state[1] == 0)
            *at(lse, x) = attends_nothing(state) ? empty : (REAL)NAN;
        else
            *at(lse, x) = (REAL)((double)state[0] + log_sum(state[1]));
    }
}

static void copy_region_keys(const cmb_head *head, int64_t n, cmb_rows to, const cmb_scratch *w) {
    for (int64_t r = 0; r < n; r++) {
        STORED *row = (STORED *)to.data + r * to.row;
        if (attends_nothing(at(head->region_softmax, r)))
            memset(row, 0, (size_t)head->D * sizeof *row);
        else if (head->pick_key)
            memcpy(row, (const STORED *)head->key.data + head->pick[r] * head->key.row, (size_t)head->D * sizeof *row);
        else
            to_stored(head->D, at(head->region_key, r), row, w);
    }
}

static void copy_region_biases(const cmb_head *head, int64_t n, cmb_rows to) {
    for (int64_t r = 0; r < n; r++)
        *at(to, r) = attends_nothing(at(head->region_softmax, r)) ? 0 : bias_of(head, head->L + r);
}

static void add_biases(int64_t n, cmb_rows softmax, cmb_rows from, cmb_rows to) {
    for (int64_t r = 0; r < n; r++)
        if (!attends_nothing(at(softmax, r)))
            *zeroed_at(to, r) += *at(from, r);
}

static void add(int64_t n, int64_t dim, cmb_rows softmax, cmb_rows from, cmb_rows to, const cmb_scratch *w) {
    for (int64_t x = 0; x < n; x++)
        if (!softmax.data || !attends_nothing(at(softmax, x)))
            add_row(dim, as_real(stored_row(from, x), dim, w->sum, w), zeroed_at(to, x));
}

/* ---- the gradient of the sink ------------------------------------------------------------------- */

static void begin_sink(const cmb_head *head) {
    for (int64_t x = 0; x < head->queries; x++)
        *at(head->grad.sink, x) = head->grad.lse.data ? *at(head->grad.lse, x) : 0;
}

/* Of each lane in `attending` the gradient that its query gives the sink: -delta times the weight of the sink. */
static void sink_gradients(const cmb_head *head, const tile_state *t, uint64_t attending, const REAL *m,
                           const REAL *inverse_l, const REAL *delta, const cmb_scratch *w) {
    REAL weight[CMB_TILE];
    for (int lane = 0; lane < t->n; lane++)
        weight[lane] = *at(head->sink, cmb_list_at(head->plan, t->tile->query, lane)) - m[lane];
    w->kernel->exp(t->n, weight, weight);
    for (int lane = 0; lane < t->n; lane++)
        if (attending >> lane & 1)
            *at(head->grad.sink, cmb_list_at(head->plan, t->tile->query, lane)) =
                -delta[lane] * (weight[lane] * inverse_l[lane]);
}

static void add_up(int64_t n, const void *from, int64_t step, void *to) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)((const REAL *)from)[i * step];
    *(REAL *)to = (REAL)sum;
}

static void sum_sink(const cmb_head *head, void *sum) {
    add_up(head->queries, head->grad.sink.data, head->grad.sink.row, sum);
}

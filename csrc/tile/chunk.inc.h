// SPDX-License-Identifier: Apache-2.0
/*
 * The chunk: the rows that a tile takes next, gathered as pointers from the tile's runs.
 *
 *     runs of the tile    [ row 0 .. 99 ]  [ row 128, 130 .. 158 ]  [ rows of an index list ]
 *                          `- chunk 0 -' `--- chunk 1, at most CHUNK rows ---' `- chunk 2 ...
 *
 *     key[n], value[n]    row n: in place, or a copy that is widened, padded to pairs, or contiguous
 *     lanes[n]            bit t: lane t sees row n
 *     row[n]              its number in the table
 *     dkey[n], dvalue[n]  backward: its rows of the gradients
 *
 * Masked positions and empty regions are left out.
 */

/* A tile in work, and how far its rows are taken. */
typedef struct {
    const cmb_tile *tile;
    int n;              /* lanes in use */
    bool regions;       /* its queries are regions: it summarizes */
    bool weighted;      /* and k_R is summed beside h_R */
    bool weighted_bias; /* and so is b_R */
    int64_t sums;       /* features of what is summed for each lane: h_R, then k_R, then b_R */
    bool dropout;       /* its weights may be dropped */
    bool paired;        /* its products take pairs of 16-bit numbers */
    uint64_t all;       /* lanes that take part */
    int32_t run, next;  /* the next row: element `next` of run `run` */
    int64_t taken;      /* rows of the runs before it */
    /* Prefix reuse: elements [0, end) of the first run were attended by an earlier tile, [first, end) of them only by
     * the lanes in mask[element - first]. */
    struct {
        const uint64_t *mask;
        int32_t first, end;
    } prefix;

    int rows;    /* of the chunk */
    bool masked; /* some lane does not see some row of the chunk */
} tile_state;

static inline uint64_t first_lanes(int n) { return n == 64 ? ~UINT64_C(0) : (UINT64_C(1) << n) - 1; }

static tile_state begin_tile(const cmb_head *head, const cmb_tile *tile, const cmb_scratch *w) {
    CMB_ASSERT(tile->width == 1 || (tile->width % CMB_GROUP == 0 && tile->width <= CMB_TILE));
    CMB_ASSERT(1 <= tile->query.count && tile->query.count <= tile->width);
    tile_state t = {.tile = tile, .n = tile->query.count, .run = tile->run};
    t.regions = cmb_list_at(head->plan, tile->query, 0) >= head->L;
    t.weighted = t.regions && head->weighted;
    t.weighted_bias = t.regions && head->weighted_bias;
    t.sums = head->Dv + (t.weighted ? head->D : 0) + t.weighted_bias;
    t.dropout = !t.regions && cmb_drops(&head->dropout);
    t.paired = is_narrow && w->format->gemm && tile->width > 1 && !t.weighted && !t.weighted_bias;
    t.all = first_lanes(t.n);
    if (t.regions && !head->all_live)
        for (int i = 0; i < t.n; i++)
            if (!is_live(head, cmb_list_at(head->plan, tile->query, i)))
                t.all &= ~(UINT64_C(1) << i);
    return t;
}

/* The lane itself; for a lane that takes no part one that does, because the row of the former may hold anything. */
static inline int live_lane(const tile_state *t, int lane) {
    CMB_ASSERT(t->all);
    return t->all >> lane & 1 ? lane : __builtin_ctzll(t->all);
}

/* ---- operands of the products ------------------------------------------------------------------- */

/* `is_narrow` lets the compiler drop pairs from the arithmetic of float32 and float64. */
static inline bool is_paired(const tile_state *t) { return is_narrow && t->paired; }

/* A word of an operand has the size of a REAL and holds one number, or a pair. */
static inline int numbers_per_word(const tile_state *t) { return is_paired(t) ? 2 : 1; }

static inline int words(const tile_state *t, int64_t numbers) {
    return (int)((numbers + numbers_per_word(t) - 1) / numbers_per_word(t));
}

/* The row as words: in place, or in `copy`. */
static inline const REAL *operand(const tile_state *t, table_row row, int64_t dim, REAL *copy, const cmb_scratch *w) {
    return is_paired(t) ? as_pairs(row, dim, copy, w) : as_real(row, dim, copy, w);
}

/* Rows x, x + step, .. of an array whose rows are REAL, or STORED. */
static inline void gather_operands(const tile_state *t, cmb_rows rows, bool real, int64_t x, int64_t step, int n,
                                   int64_t dim, REAL *copy, const REAL **to, const cmb_scratch *w) {
    if (is_paired(t) && real && step == 1 && rows.row == dim && dim % 2 == 0) { /* side by side: all at once */
        w->format->round(n * dim, (const float *)at(rows, x), (uint16_t *)copy);
        for (int i = 0; i < n; i++)
            to[i] = copy + i * (dim / 2);
        return;
    }
    for (int i = 0; i < n; i++, x += step)
        to[i] = operand(t, real ? real_row(at(rows, x)) : stored_row(rows, x), dim, copy + i * dim, w);
}

static inline void gather_gradients(cmb_rows rows, int64_t x, int64_t step, int n, REAL **to) {
    for (int i = 0; i < n; i++, x += step)
        to[i] = zeroed_at(rows, x);
}

/* Rows of a column, of an index list, or of one head among others lie a power of two apart: they fall into few sets of
 * the cache, each in a page of its own. A tile that uses each row often enough copies them side by side. */
static inline bool is_scattered(const cmb_tile *tile, cmb_list list, cmb_rows rows, int64_t dim) {
    return tile->width > CMB_GROUP && (list.step != 1 || rows.row != dim);
}

/* Scattered rows become contiguous in `copy`, where they are not yet. */
static inline void make_contiguous(const tile_state *t, cmb_list list, cmb_rows rows, int64_t dim, int n,
                                   const REAL **row, REAL *copy, const cmb_scratch *w) {
    if (n > 0 && row[0] != copy && is_scattered(t->tile, list, rows, dim))
        w->kernel->gather(n, row, words(t, dim), copy);
}

/* ---- gathering ---------------------------------------------------------------------------------- */

/* n rows of a list with a step that lies whole in the positions, or whole in the regions, and all of whose rows are
 * live: one decision for all of them. */
static void gather_straight(const cmb_head *head, const tile_state *t, cmb_list list, int n, int at, cmb_scratch *w) {
    const int64_t row = list.start + (int64_t)list.step * t->next, step = list.step;
    const bool regions = row >= head->L;
    const int64_t x = regions ? row - head->L : row;
    CMB_ASSERT(0 < n && at + n <= CHUNK && 0 <= x && x + step * (n - 1) < (regions ? head->plan->R : head->L));
    gather_operands(t, regions ? head->region_key : head->key, regions, x, step, n, head->D, w->key_copy + at * head->D,
                    w->key + at, w);
    gather_operands(t, regions ? head->region_value : head->value, regions, x, step, n, head->Dv,
                    w->value_copy + at * head->Dv, w->value + at, w);
    for (int i = 0; i < n; i++)
        w->row[at + i] = (uint32_t)(row + step * i);
    if (!w->backward)
        return;
    gather_gradients(regions ? head->grad.region_key : head->grad.key, x, step, n, w->dkey + at);
    gather_gradients(regions ? head->grad.region_value : head->grad.value, x, step, n, w->dvalue + at);
}

static void gather_row(const cmb_head *head, const tile_state *t, int32_t x, int at, cmb_scratch *w) {
    CMB_ASSERT(0 <= x && x < head->L + head->plan->R && at < CHUNK);
    w->key[at] = operand(t, key_row(head, x, w), head->D, w->key_copy + at * head->D, w);
    w->value[at] = operand(t, value_row(head, x, w), head->Dv, w->value_copy + at * head->Dv, w);
    w->row[at] = (uint32_t)x;
    if (!w->backward)
        return;
    const int32_t apart = is_kept_apart(head, x, w) ? new_apart(head, x, w) : -1;
    w->dkey[at] = apart < 0 ? key_grad_row(head, x, w) : w->apart_key + apart * head->D;
    w->dvalue[at] = apart < 0 ? value_grad_row(head, x, w) : w->apart_value + apart * head->Dv;
}

static inline int64_t last_of(cmb_list list) { return list.start + (int64_t)list.step * (list.count - 1); }

static inline bool are_positions(const cmb_head *head, cmb_list list) {
    return list.step && list.start < head->L && last_of(list) < head->L;
}

/* Regions whose rows are evenly spaced, as the list is. */
static inline bool are_even_regions(const cmb_head *head, cmb_list list, const cmb_scratch *w) {
    return list.step && list.start >= head->L && last_of(list) >= head->L && !head->pick_key && !head->key_row &&
           !w->keeps_apart;
}

/* Prefix reuse: the lanes that have attended element n of the run. */
static inline uint64_t seen_before(const tile_state *t, int32_t n) {
    return n >= t->prefix.first && n < t->prefix.end && t->prefix.mask ? t->prefix.mask[n - t->prefix.first] : 0;
}

/* Gathers the next chunk; false where no row is left. */
static bool gather(const cmb_head *head, tile_state *t, cmb_scratch *w) {
    const cmb_plan *plan = head->plan;
    int n = 0;
    t->masked = t->all != first_lanes(t->n);
    for (; t->run < t->tile[1].run && n < CHUNK; t->run++, t->next = 0) {
        const cmb_run *run = &plan->run[t->run];
        const uint64_t *mask = run->mask < 0 ? NULL : plan->mask + run->mask;
        const cmb_list list = run->row;
        const int from = n;
        t->masked |= mask != NULL || t->next < t->prefix.end;
        if (head->all_live &&
            ((are_positions(head, list) && !w->keeps_positions_apart) || are_even_regions(head, list, w))) {
            const int taken = list.count - t->next < CHUNK - n ? list.count - t->next : CHUNK - n;
            gather_straight(head, t, list, taken, n, w);
            for (int i = 0; i < taken; i++)
                w->lanes[n + i] = mask ? mask[t->next + i] & t->all : t->all;
            for (int i = 0; i < taken && t->next + i < t->prefix.end; i++)
                w->lanes[n + i] &= ~seen_before(t, t->next + i);
            for (int i = 0; w->item && i < taken; i++)
                w->place[n + i] = t->taken + t->next + i;
            n += taken;
            t->next += taken;
        } else {
            for (; t->next < list.count && n < CHUNK; t->next++) {
                const int32_t x = cmb_list_at(plan, list, t->next);
                if (!is_live(head, x))
                    continue;
                gather_row(head, t, x, n, w);
                if (w->item)
                    w->place[n] = t->taken + t->next;
                w->lanes[n++] = (mask ? mask[t->next] & t->all : t->all) & ~seen_before(t, t->next);
            }
        }
        make_contiguous(t, list, head->key, head->D, n - from, w->key + from, w->key_copy + from * head->D, w);
        make_contiguous(t, list, head->value, head->Dv, n - from, w->value + from, w->value_copy + from * head->Dv, w);
        if (t->next < list.count)
            break;
        t->taken += list.count;
    }
    t->rows = n;
    return n > 0;
}

/* A row tile has one lane: the rows that it does not see leave the chunk, so that nothing else needs a mask. */
static void keep_seen_rows(tile_state *t, cmb_scratch *w) {
    if (!t->masked)
        return;
    int n = 0;
    for (int i = 0; i < t->rows; i++)
        if (w->lanes[i] & 1) {
            w->key[n] = w->key[i];
            w->value[n] = w->value[i];
            w->row[n] = w->row[i];
            if (w->backward) {
                w->dkey[n] = w->dkey[i];
                w->dvalue[n] = w->dvalue[i];
                w->place[n] = w->place[i];
            }
            n++;
        }
    t->rows = n;
}

/* ---- prefetching the next tile ------------------------------------------------------------------ */

/* Whether neighbours in the list lie a multiple of 8 KiB apart, as in a column of a grid. Such rows fall into so few
 * sets of a cache that prefetched ones would push out one another. */
static inline bool would_collide(cmb_list list, cmb_rows rows) {
    enum { APART = 8 << 10 };
    return list.step > 1 && list.step * rows.row * (int64_t)sizeof(STORED) % APART == 0;
}

/* `tile` is the worker's next tile, or -1. */
static void begin_prefetch(const cmb_head *head, int32_t tile, cmb_scratch *w) {
    const cmb_tile *ahead = tile < 0 ? NULL : &head->plan->tile[tile];
    if (!(head->stages & CMB_ATTEND)) /* then no tile of positions runs */
        ahead = NULL;
    if (ahead && cmb_list_at(head->plan, ahead->query, 0) >= head->L) /* its queries, q_R, are not pooled yet */
        ahead = NULL;
    w->ahead = (prefetch_cursor){.head = head};
    if (!ahead)
        return;
    w->ahead.query = ahead->query;
    w->ahead.row = head->plan->run[ahead[1].run - 1].row;
    if (would_collide(w->ahead.row, head->key))
        w->ahead.row.count = 0;
    w->ahead.end = w->ahead.query.count > w->ahead.row.count ? w->ahead.query.count : w->ahead.row.count;
    w->ahead.each = 1 + (CMB_PREFETCH_BYTES - 1) / (int32_t)(head->D * (int64_t)sizeof(STORED));
}

static inline void prefetch_row(table_row row, int64_t dim) {
    enum { LINE = 64 };
    const char *data = row.real ? (const char *)row.real : (const char *)row.stored;
    const int64_t bytes = dim * (int64_t)(row.real ? sizeof(REAL) : sizeof(STORED));
    for (int64_t at = 0; at < bytes; at += LINE)
        __builtin_prefetch(data + at);
}

/* Prefetches the next queries, with what is stored for them, and the next rows. */
static void prefetch_some(cmb_scratch *w) {
    const cmb_head *head = w->ahead.head;
    const cmb_list query = w->ahead.query, row = w->ahead.row;
    const int32_t end = (int32_t)cmb_min(w->ahead.next + w->ahead.each, w->ahead.end);
    for (int32_t n = w->ahead.next; n < end; n++) {
        if (n < query.count) {
            const int32_t x = cmb_list_at(head->plan, query, n);
            prefetch_row(query_row(head, x, w), head->D);
            if (w->backward) {
                prefetch_row(stored_row(head->out, x), head->Dv);
                prefetch_row(stored_row(head->grad.out, x), head->Dv);
                prefetch_row(real_row(at(head->grad.query, x)), head->D);
            } else {
                prefetch_row(head->result.data ? real_row(at(head->result, x)) : stored_row(head->out, x), head->Dv);
            }
        }
        if (n < row.count) {
            const int32_t x = cmb_list_at(head->plan, row, n);
            prefetch_row(key_row(head, x, w), head->D);
            prefetch_row(value_row(head, x, w), head->Dv);
            if (w->backward && x < head->L) {
                prefetch_row(real_row(at(head->grad.key, x)), head->D);
                prefetch_row(real_row(at(head->grad.value, x)), head->Dv);
            }
        }
    }
    w->ahead.next = end;
}

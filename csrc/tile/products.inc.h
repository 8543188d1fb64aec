// SPDX-License-Identifier: Apache-2.0
/*
 * The products of a chunk. All are one kernel, gemm, whose rows are reached through pointers:
 *
 *     row_products   s[row][lane]  (+)= row . packed lane          S = K Q^T, dP = V dO^T
 *     lane_sums      to[lane]       +=  sum over rows of p[row][lane] * row          O += P^T V, dQ += dS^T K
 *     row_sums       to[row]        +=  sum over lanes of p[row][lane] * lane_row    dV += P dO, dK += dS Q
 *
 * Windows leave out what masks hide. In S a window is a range of 16-lane groups for each block of 6 rows, or of 16 with
 * matrix registers. In a sum over rows it is a range of rows for each quad of lanes, or for each 16 lanes. S of two
 * blocks, # computed:
 *
 *     lanes     0       16      32      48      64
 *     6 rows    |-------|#######|#######|-------|      lanes of groups 1 and 2 see one of these rows
 *     6 rows    |-------|-------|#######|-------|
 */

/* ---- windows ------------------------------------------------------------------------------------ */

/* Words that join a sum together (kernels.h): 1, or 16 with matrix registers, which compute 16 rows at a time. */
static inline int group_of_words(const tile_state *t, const cmb_scratch *w) {
    return is_paired(t) ? w->format->group : 1;
}

/* Rows that share a window of lane groups. */
static inline int window_height(const tile_state *t, const cmb_scratch *w) {
    const int group = group_of_words(t, w);
    return group > CMB_BLOCK ? group : CMB_BLOCK;
}

/* Rows of one turn where workers share gradient rows: whole windows, so that row_sums multiplies only what row_products
 * has computed, and tested. */
static inline int slice_rows(const tile_state *t, const cmb_scratch *w) { return 2 * window_height(t, w); }

/* The lane groups [*from, *to): every lane that sees one of the rows [i, end) is in one of them. */
static void group_window(const cmb_scratch *w, int i, int end, int *from, int *to) {
    uint64_t seen = 0;
    for (; i < end; i++)
        seen |= w->lanes[i];
    *from = seen ? __builtin_ctzll(seen) / CMB_GROUP : 0;
    *to = seen ? (63 - __builtin_clzll(seen)) / CMB_GROUP + 1 : 0;
}

enum { QUADS = CMB_TILE / CMB_QUAD }; /* of lanes */

/* For each quad of lanes the rows [first, last): every row that one of its lanes sees is among them. `together` quads
 * share their window. */
static void row_windows(const cmb_scratch *w, int rows, int together, uint8_t first[QUADS], uint8_t last[QUADS]) {
    const uint64_t every_quad = UINT64_C(0x1111111111111111); /* the lowest bit of each */
    memset(first, 0, QUADS);
    memset(last, 0, QUADS);
    uint64_t found = 0;
    for (int i = 0; i < rows && found != every_quad; i++) {
        uint64_t m = w->lanes[i] | w->lanes[i] >> 1;
        m = (m | m >> 2) & every_quad & ~found;
        for (found |= m; m; m &= m - 1)
            first[__builtin_ctzll(m) / CMB_QUAD] = (uint8_t)i;
    }
    found = 0;
    for (int i = rows - 1; i >= 0 && found != every_quad; i--) {
        uint64_t m = w->lanes[i] | w->lanes[i] >> 1;
        m = (m | m >> 2) & every_quad & ~found;
        for (found |= m; m; m &= m - 1)
            last[__builtin_ctzll(m) / CMB_QUAD] = (uint8_t)(i + 1);
    }
    for (int quad = 0; together > 1 && quad < QUADS; quad += together) {
        uint8_t from = UINT8_MAX, to = 0;
        for (int i = quad; i < quad + together; i++) {
            from = first[i] < last[i] && first[i] < from ? first[i] : from;
            to = last[i] > to ? last[i] : to;
        }
        memset(first + quad, to ? from : 0, (size_t)together);
        memset(last + quad, to, (size_t)together);
    }
}

/* ---- the kernels -------------------------------------------------------------------------------- */

/* gemm of words, the first of which is word `first` of the sum, in slices of one micro-kernel's rows; narrow ones have
 * twice as many. The next tile's rows are prefetched between two slices. */
static inline void gemm(const tile_state *t, int64_t m, int64_t n, int64_t k, const REAL *const *a, int64_t a_step,
                        const REAL *const *b, REAL *const *c, int64_t column, bool add, int64_t first, cmb_scratch *w) {
    const int64_t rows = n > 2 * CMB_GROUP && !is_paired(t) ? CMB_BLOCK : slice_rows(t, w);
    for (int64_t i = 0; i < m; i += rows) {
        const int64_t slice = m - i < rows ? m - i : rows;
        prefetch_some(w);
        if (is_paired(t))
            w->format->gemm(slice, n, k, a + i, a_step, b, c + i, column, add, first);
        else
            w->kernel->gemm(slice, n, k, a + i, a_step, b, c + i, column, add);
    }
}

/* packed[word][lane] = scale * lane_row[lane][word]; pairs are not scaled. */
static void pack(const tile_state *t, const REAL *const *lane_row, int64_t dim, REAL scale, REAL *packed,
                 const cmb_scratch *w) {
    if (is_paired(t))
        w->format->pack(t->n, lane_row, words(t, dim), w->width, packed);
    else
        w->kernel->pack(t->n, lane_row, dim, scale, w->width, packed);
}

/* begin_products and end_products enclose products. No code between the two may return, wait for another thread, or
 * call the caller back, whose code may use the same registers. */
static inline void begin_products(const tile_state *t, const cmb_scratch *w) {
    if (is_paired(t) && w->format->begin)
        w->format->begin();
}

static inline void end_products(const tile_state *t, const cmb_scratch *w) {
    if (is_paired(t) && w->format->end)
        w->format->end();
}

/* ---- pairs -------------------------------------------------------------------------------------- */

/* Stored rows 2 i and 2 i + 1, interleaved: a word holds one feature of both. Returns pointers to the pairs. */
static const REAL *const *pair_rows(int n, const REAL *const *row, int64_t dim, REAL *pairs, const REAL **list,
                                    const cmb_scratch *w) {
    for (int i = 0; i < n; i += 2) {
        list[i / 2] = pairs + i / 2 * dim;
        w->format->interleave(dim, row[i], i + 1 < n ? row[i + 1] : NULL, pairs + i / 2 * dim);
    }
    return list;
}

/* Weights p[row][lane], rounded: a word holds one lane of rows 2 i and 2 i + 1. */
static const REAL *pair_weights_of_rows(const tile_state *t, const REAL *p, cmb_scratch *w) {
    for (int i = 0; i < t->rows; i += 2)
        w->format->pair(w->width, p + i * w->width, i + 1 < t->rows ? p + (i + 1) * w->width : NULL,
                        w->pair_weight + i / 2 * w->width);
    return w->pair_weight;
}

/* Weights of rows [begin, end), rounded: a word holds lanes 2 i and 2 i + 1 of one row. */
static const REAL *pair_weights_of_lanes(const REAL *p, int begin, int end, cmb_scratch *w) {
    w->format->round((end - begin) * w->width, (const float *)p + begin * w->width,
                     (uint16_t *)w->pair_weight + begin * w->width);
    return w->pair_weight;
}

/* A row, or a pair of rows of which only those with a bit in `seen` count. The other's numbers, which may be NaN,
 * become zeros. */
static const REAL *seen_part(const tile_state *t, const REAL *row, int64_t dim, unsigned seen, REAL *part) {
    if (!is_paired(t) || seen == 3)
        return row;
    const size_t half = seen == 1 ? 0 : 2; /* pairs exist on x86 alone: little-endian */
    memset(part, 0, (size_t)dim * sizeof *part);
    for (int64_t d = 0; seen && d < dim; d++)
        memcpy((char *)(part + d) + half, (const char *)(row + d) + half, 2);
    return part;
}

/* ---- the three products ------------------------------------------------------------------------- */

/* Zeroes lane groups [from, to) of a row of S, one by one: the compiler then knows how many bytes. */
static inline void clear_groups(REAL *s, int from, int to) {
    for (int group = from; group < to; group++)
        memset(s + group * CMB_GROUP, 0, CMB_GROUP * sizeof *s);
}

/* s[row][lane] (+)= row . packed lane, in the windows; `clear` stores zeros outside of them. */
static void row_products(const tile_state *t, const REAL *const *row, int64_t dim, const REAL *packed, REAL *s,
                         bool add, bool clear, cmb_scratch *w) {
    const int n = words(t, dim);
    for (int d = 0; d < n; d++)
        w->packed_row[d] = packed + d * w->width;
    for (int i = 0; i < t->rows; i++)
        w->s_row[i] = s + i * w->width;
    if (!t->masked || w->width == CMB_GROUP) {
        gemm(t, t->rows, w->width, n, row, 1, w->packed_row, w->s_row, 0, add, 0, w);
        return;
    }
    const int height = window_height(t, w);
    for (int i = 0; i < t->rows; i += height) {
        const int end = i + height < t->rows ? i + height : t->rows;
        int from, to;
        group_window(w, i, end, &from, &to);
        if (to > from)
            gemm(t, end - i, (to - from) * CMB_GROUP, n, row + i, 1, w->packed_row, w->s_row + i, from * CMB_GROUP, add,
                 0, w);
        for (int r = i; clear && r < end; r++) {
            clear_groups(w->s_row[r], 0, from);
            clear_groups(w->s_row[r], to, w->width / CMB_GROUP);
        }
    }
}

/* The exact path of lane_sums: each lane over the rows that it sees. */
static void exact_lane_sums(const tile_state *t, const REAL *p, const REAL *const *row, int64_t dim, REAL *const *to,
                            cmb_scratch *w) {
    const int rows = words(t, t->rows), each = numbers_per_word(t);
    const bool in_groups = group_of_words(t, w) > 1; /* then a row that is left out is a word of zeros */
    for (int lane = 0; lane < t->n; lane++) {
        int n = 0;
        for (int i = 0; i < rows; i++) {
            unsigned seen = (unsigned)(w->lanes[i * each] >> lane & 1);
            if (each == 2 && i * 2 + 1 < t->rows)
                seen |= (unsigned)(w->lanes[i * 2 + 1] >> lane & 1) << 1;
            if (!seen && !in_groups)
                continue;
            w->compact[n] = seen ? p[i * w->width + lane] : 0;
            w->compact_row[n++] = seen_part(t, row[i], dim, seen, w->pair_part + i * dim);
        }
        const REAL *weights = w->compact;
        gemm(t, 1, dim, n, &weights, 1, w->compact_row, to + lane, 0, true, 0, w);
    }
}

/* to[lane] += sum over rows of p[row][lane] * row. */
static void lane_sums(const tile_state *t, const REAL *p, const REAL *const *row, int64_t dim, REAL *const *to,
                      bool exact, cmb_scratch *w) {
    if (is_paired(t)) {
        p = pair_weights_of_rows(t, p, w);
        row = pair_rows(t->rows, row, dim, w->pair_row, w->pair_list, w);
    }
    if (exact) {
        exact_lane_sums(t, p, row, dim, to, w);
        return;
    }
    uint8_t first[QUADS] = {0}, last[QUADS];
    if (t->masked)
        row_windows(w, t->rows, group_of_words(t, w) / CMB_QUAD, first, last);
    else
        memset(last, t->rows, sizeof last);
    for (int i = 0; i < QUADS; i++) {
        first[i] = (uint8_t)(first[i] / numbers_per_word(t));
        last[i] = (uint8_t)words(t, last[i]);
    }
    const REAL *a[CMB_TILE];
    for (int lane = 0; lane < t->n;) {
        const int quad = lane / CMB_QUAD, begin = first[quad], count = last[quad] - begin;
        int n = 0; /* neighbouring lanes with the same window */
        for (; lane + n < t->n && first[(lane + n) / CMB_QUAD] == begin && last[(lane + n) / CMB_QUAD] == begin + count;
             n++)
            a[n] = p + begin * w->width + lane + n;
        if (count > 0)
            gemm(t, n, dim, count, a, w->width, row + begin, to + lane, 0, true, begin, w);
        lane += n;
    }
}

/* The exact path of row_sums: each row over the lanes that see it. */
static void exact_row_sums(const tile_state *t, int begin, int end, const REAL *p, const REAL *const *lane_row,
                           int64_t dim, REAL *const *to, cmb_scratch *w) {
    const int each = numbers_per_word(t), step = w->width / each;
    const bool in_groups = group_of_words(t, w) > 1; /* then a lane that is left out is a word of zeros */
    const REAL *list[CMB_TILE];
    for (int i = begin; i < end; i++) {
        int n = 0;
        for (int lane = 0; lane < t->n; lane += each) {
            const unsigned seen = (unsigned)(w->lanes[i] >> lane) & ((1u << each) - 1);
            if (!seen && !in_groups)
                continue;
            w->compact[n] = seen ? p[i * step + lane / each] : 0;
            list[n++] = seen_part(t, lane_row[lane / each], dim, seen, w->pair_part + lane / each * dim);
        }
        const REAL *weights = w->compact;
        gemm(t, 1, dim, n, &weights, 1, list, to + i, 0, true, 0, w);
    }
}

/* to[row] += sum over lanes of p[row][lane] * lane_row[lane], for rows [begin, end). With pairs, lane_row holds pairs
 * of lanes. */
static void row_sums(const tile_state *t, int begin, int end, const REAL *p, const REAL *const *lane_row, int64_t dim,
                     REAL *const *to, bool exact, cmb_scratch *w) {
    CMB_ASSERT(0 <= begin && begin < end && end <= t->rows);
    if (is_paired(t))
        p = pair_weights_of_lanes(p, begin, end, w);
    if (exact) {
        exact_row_sums(t, begin, end, p, lane_row, dim, to, w);
        return;
    }
    const int step = w->width / numbers_per_word(t);
    const int height = !t->masked || w->width == CMB_GROUP ? end - begin : window_height(t, w);
    const REAL *a[CHUNK];
    for (int i = begin, stop; i < end; i = stop) {
        stop = i + height < end ? i + height : end;
        int from = 0, to_group = w->width / CMB_GROUP;
        if (t->masked)
            group_window(w, i, stop, &from, &to_group);
        const int lane = from * CMB_GROUP / numbers_per_word(t);
        const int lanes = words(t, to_group * CMB_GROUP < t->n ? to_group * CMB_GROUP : t->n) - lane;
        for (int r = i; r < stop; r++)
            a[r - i] = p + r * step + lane;
        if (lanes > 0)
            gemm(t, stop - i, dim, lanes, a, 1, lane_row + lane, to + i, 0, true, lane, w);
    }
}

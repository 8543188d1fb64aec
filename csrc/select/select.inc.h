// SPDX-License-Identifier: Apache-2.0
/* The scores of regions and the best of each block, for one type: REAL and its SUFFIX. Logits are computed as in
 * attention: a group's queries are lanes, packed transposed, and the keys of the regions that the group attends are
 * multiplied with them a chunk at a time. One task scores all heads of its blocks, in order, so that neither tasks nor
 * threads decide a bit. */
#define N(name) NAME2(name, SUFFIX)
#define KERNELS NAME2(cmb_kernels, SUFFIX)
#define call_state NAME2(call_state, SUFFIX)
#define worker_state NAME2(worker_state, SUFFIX)
#define CHUNK (CMB_CHUNK_BYTES / (int)sizeof(REAL)) /* regions whose logits are computed together */

/* One worker's memory. */
typedef struct {
    const REAL *query[LANES];
    const REAL *key[CHUNK];
    REAL *s_row[CHUNK];
    REAL *packed;            /* [D][LANES] */
    const REAL **packed_row; /* [D] */
    REAL *s;                 /* [CHUNK][LANES] logits */
    double *score;           /* [R] of the block at hand: the maximum, or the sum */
    int64_t *pairs;          /* [R] (query, region) pairs so far; 0 between blocks */
    int32_t *met;            /* [R] regions with pairs > 0 */
    int64_t met_count;
    const int64_t *below; /* [R + N] the unmasked positions below the regions of the head at hand */
} worker_state;

typedef struct {
    const layout *layout;
    const part_index *index; /* [plans] */
    const KERNELS *kernel;
    int64_t *below; /* [plans, or B * plans with a mask][rows] */
    int64_t rows;   /* the most R + N of a plan */
    int64_t tasks;  /* of a head */
    worker_state *worker;
} call_state;

static const REAL *N(row_of)(const cmb_array *array, int64_t b, int64_t h, int64_t x) {
    return (const REAL *)array->data + b * array->batch + h * array->head + x * array->row;
}

/* ---- scores ---- */

/* Joins the logits of a region, s[lane], into its score. A NaN is no logit. */
static void N(join)(const cmb_scoring *p, worker_state *w, const part *found, const REAL *s) {
    const int32_t r = found->region;
    if (!w->below[r])
        return;
    if (!w->pairs[r]) {
        w->met[w->met_count++] = r;
        w->score[r] = p->score == CMB_SCORE_MEAN ? 0 : -(double)INFINITY;
    }
    for (uint64_t lanes = found->lanes; lanes; lanes &= lanes - 1) {
        const double logit = (double)s[__builtin_ctzll(lanes)];
        w->pairs[r]++;
        if (p->score == CMB_SCORE_MEAN)
            w->score[r] += logit;
        else
            w->score[r] = logit > w->score[r] ? logit : w->score[r];
    }
}

/* The queries of group g for query head h join the scores. */
static void N(score_group)(const call_state *call, worker_state *w, const part_index *index, int64_t b, int64_t h,
                           int64_t g) {
    const layout *l = call->layout;
    const cmb_scoring *p = l->problem;
    const int64_t first = g / l->groups_per_block * p->block + g % l->groups_per_block * LANES;
    const int64_t end = cmb_min(p->by_first_query ? first + 1 : first / p->block * p->block + p->block, p->L);
    const int n = (int)cmb_min(LANES, end - first), width = cmb_tile_width(n);
    const int64_t key_head = h * p->region_key.heads / p->Hq;
    for (int t = 0; t < n; t++)
        w->query[t] = N(row_of)(&p->query, b, h, first + t);
    if (n > 1) {
        call->kernel->pack(n, w->query, p->D, (REAL)p->scale, width, w->packed);
        for (int64_t d = 0; d < p->D; d++)
            w->packed_row[d] = w->packed + d * width;
    }
    for (int64_t at = index->first[g]; at < index->first[g + 1]; at += CHUNK) {
        const int64_t count = cmb_min(CHUNK, index->first[g + 1] - at);
        for (int64_t k = 0; k < count; k++) {
            w->key[k] = N(row_of)(&p->region_key, b, key_head, index->part[at + k].region);
            w->s_row[k] = w->s + k * width;
        }
        if (n > 1)
            call->kernel->gemm(count, width, p->D, w->key, 1, w->packed_row, w->s_row, 0, false);
        else { /* one query: a row tile's product */
            call->kernel->dot(count, w->key, p->D, w->query[0], w->packed);
            for (int64_t k = 0; k < count; k++)
                w->s_row[k][0] = (REAL)p->scale * w->packed[k];
        }
        for (int64_t k = 0; k < count; k++)
            N(join)(p, w, &index->part[at + k], w->s_row[k]);
    }
}

/* ---- the best ---- */

/* Writes the k regions of the largest scores, of equal ones the lowest numbers first, and -1 for those that are not
 * there. Scores are final; forgets them. */
static void N(take_best)(const cmb_scoring *p, worker_state *w, double *best, int64_t *regions) {
    int64_t count = 0;
    for (int64_t n = 0; n < w->met_count; n++) {
        const int32_t r = w->met[n];
        w->pairs[r] = 0;
        count = cmb_join_best(w->score[r], r, p->k, count, best, regions);
    }
    for (; count < p->k; count++)
        regions[count] = -1;
    w->met_count = 0;
}

/* The mean or maximum, and the log of the region's size, which its logit has in attention too. */
static void N(finish_scores)(const cmb_scoring *p, const cmb_plan *plan, worker_state *w) {
    for (int64_t n = 0; n < w->met_count; n++) {
        const int32_t r = w->met[n];
        if (p->score == CMB_SCORE_MEAN)
            w->score[r] /= (double)w->pairs[r];
        if (isnan(w->score[r]))
            w->score[r] = -(double)INFINITY;
        if (plan->size_bias)
            w->score[r] += log((double)w->below[r]);
    }
}

/* Blocks [task * TASK_BLOCKS, ...) of one key head. */
static void N(select_blocks)(void *context, int64_t task, int worker) {
    const call_state *call = context;
    const layout *l = call->layout;
    const cmb_scoring *p = l->problem;
    const int64_t head = task / call->tasks, first = task % call->tasks * TASK_BLOCKS;
    const int64_t b = head / p->Hk, hk = head % p->Hk, group = p->Hq / p->Hk, n = p->plans > 1 ? head : 0;
    worker_state *w = &call->worker[worker];
    w->below = call->below + (p->plans > 1 ? head : p->key_mask ? b : 0) * call->rows;
    for (int64_t t = first; t < cmb_min(first + TASK_BLOCKS, l->blocks); t++) {
        if (cmb_cancelled(l->cancel, worker))
            return;
        for (int64_t h = hk * group; h < (hk + 1) * group; h++)
            for (int64_t g = t * l->groups_per_block; g < (t + 1) * l->groups_per_block; g++)
                if (call->index[n].first[g] < call->index[n].first[g + 1])
                    N(score_group)(call, w, &call->index[n], b, h, g);
        N(finish_scores)(p, p->plan[n], w);
        int64_t *regions = p->regions + (head * l->blocks + t) * p->k;
        N(take_best)(p, w, (double *)(void *)w->s, regions);
    }
}

/* ---- all of them ---- */

static void N(take_memory)(call_state *call, int workers, int64_t lists, cmb_arena *arena) {
    const cmb_scoring *p = call->layout->problem;
    const size_t D = (size_t)p->D, R = (size_t)call->rows, k = (size_t)p->k;
    const size_t best = (k + 1) * sizeof(double), s = CHUNK * LANES * sizeof(REAL);
    call->below = cmb_take(arena, (size_t)lists, R * sizeof *call->below);
    call->worker = cmb_take(arena, (size_t)workers, sizeof *call->worker);
    for (int i = 0; i < workers; i++) {
        worker_state w = {.packed = cmb_take(arena, (D > CHUNK ? D : CHUNK) * LANES, sizeof(REAL))};
        w.packed_row = cmb_take(arena, D, sizeof *w.packed_row);
        w.s = cmb_take(arena, 1, s > best ? s : best);
        w.score = cmb_take(arena, R, sizeof *w.score);
        w.pairs = cmb_take(arena, R, sizeof *w.pairs);
        w.met = cmb_take(arena, R, sizeof *w.met);
        if (w.pairs)
            memset(w.pairs, 0, R * sizeof *w.pairs);
        if (call->worker)
            call->worker[i] = w;
    }
}

static cmb_status N(execute)(const layout *l, const part_index *index, cmb_error *error) {
    const cmb_scoring *p = l->problem;
    cmb_arena arena = {0};
    call_state call = {.layout = l, .index = index, .rows = 1, .tasks = (l->blocks + TASK_BLOCKS - 1) / TASK_BLOCKS};
    double pairs = 0;
    for (int64_t n = 0; n < p->plans; n++) {
        call.rows = p->plan[n]->R + p->plan[n]->N > call.rows ? p->plan[n]->R + p->plan[n]->N : call.rows;
        pairs += (double)index[n].first[index[n].groups] * (p->plans > 1 ? 1 : (double)(p->B * p->Hk));
    }
    const bool is_small = pairs * (double)(LANES * (p->Hq / p->Hk) * p->D) < worth_a_thread;
    const int workers = is_small ? 1 : cmb_get_num_threads();
    const int64_t lists = p->plans > 1 ? p->plans : p->key_mask ? p->B : 1;
    call.kernel = NAME2(cmb_kernels_for, SUFFIX)(cmb_isa_current());
    N(take_memory)(&call, workers, lists, &arena);
    TRY(cmb_arena_allocate(&arena, error));
    N(take_memory)(&call, workers, lists, &arena);
    for (int64_t n = 0; n < lists; n++)
        count_below(p, p->plan[p->plans > 1 ? n : 0], p->plans > 1 ? n / p->Hk : n, call.below + n * call.rows,
                    l->cancel);
    cmb_parallel_for(p->B * p->Hk * call.tasks, workers, N(select_blocks), &call, l->cancel);
    cmb_release(arena.base);
    return cmb_cancel_status(l->cancel, error);
}

#undef N
#undef KERNELS
#undef call_state
#undef worker_state
#undef CHUNK

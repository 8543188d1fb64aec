// SPDX-License-Identifier: Apache-2.0
/*
 * Spherical k-means for one type: REAL, its SUFFIX, and BITS, an unsigned integer of the same size. All heads in flight
 * go through each phase together:
 *
 *   phase          what it makes                                     one task handles
 *   normalise      the rows at unit length                           a block of rows
 *   sow, or read   the centroids, by k-means++ or as given           a head
 *   label          the most similar centroid of each row             a block of rows
 *   collect        the rows of each cluster                          a head
 *   move           each centroid, from the rows of its cluster       a cluster
 *   balance        clusters of equal sizes                           a head
 *   finish         the caller's results                              a head
 *
 * Similarities are computed in tiles, as in attention: the lanes are rows, packed transposed, and each chunk of
 * centroids is multiplied with them. One thread sums the rows of a cluster, in the rows' order and in chunks of LANES,
 * so that neither the blocks nor the threads decide a bit.
 */
#define N(name) NAME2(name, SUFFIX)
#define KERNELS NAME2(cmb_kernels, SUFFIX)
#define call_state NAME2(call_state, SUFFIX)
#define head_state NAME2(head_state, SUFFIX)
#define worker_state NAME2(worker_state, SUFFIX)
#define CHUNK \
    (384 / (int)sizeof(REAL)) /* centroids: their similarities and the packed rows fit the first-level cache */

/* One head in flight. */
typedef struct {
    REAL *row_direction;      /* [L][D] the row at unit length, or zeros if it has no direction */
    bool *has_direction;      /* [L] of each row */
    int32_t *label;           /* [L] cluster of each row */
    int32_t *member;          /* [L] sow: the sample; collect: rows, cluster by cluster; balance: rows by margin */
    int32_t *first;           /* [n + 2] where a cluster's members begin; balance: the sizes of the clusters */
    REAL *centroid;           /* [n][D] as given or made */
    REAL *centroid_direction; /* [n][D] the same at unit length, with which rows are compared */
    REAL *sample;             /* [16 n / LANES, rounded up][D][LANES] the sample's rows, packed */
    double *weight;           /* [16 n] of each row of the sample */
    REAL *margin;             /* [L] the largest similarity minus the second largest */
    int32_t *other;           /* [L] what a radix sort moves rows to and from */
    int32_t *open;            /* [n] clusters with room */
    atomic_bool changed;      /* a label has changed in this round */
    bool converged;           /* no label changed in the last round: no later round changes anything */
} head_state;

/* One worker's memory. */
typedef struct {
    const REAL *row[LANES];
    const REAL *centroid[CHUNK];
    REAL *s_row[CHUNK];
    REAL chunk_best[LANES], chunk_arg[LANES]; /* the largest similarity of a chunk, and its centroid's place there */
    REAL best[LANES], second[LANES];          /* the largest and second largest of all centroids */
    int32_t nearest[LANES];                   /* the most similar centroid */
    REAL one[LANES];                          /* ones: the weights of a plain sum */
    REAL *packed;                             /* [D][LANES] */
    const REAL **packed_row;                  /* [D] */
    const REAL **sample_row;                  /* [D] */
    REAL *s;                                  /* [CHUNK, or n if balanced][LANES] similarities */
    REAL *sum, *mean;                         /* [D] */
} worker_state;

typedef struct {
    const request *request;
    const cmb_clustering *problem;
    const KERNELS *kernel;
    int64_t heads;                 /* of all batch entries */
    int64_t max_in_flight;         /* heads at once, */
    int64_t first_head, in_flight; /* and the group of them at hand */
    int64_t row_tasks;             /* blocks of rows of a head */
    bool wants_margins;            /* label finds margins too */
    int workers;
    cmb_cancel *cancel;
    head_state *head;       /* [max_in_flight] */
    worker_state **scratch; /* [workers] */
} call_state;

/* Whether to leave a loop over rows at row i: asks once in many rows whether the call is cancelled. */
static bool N(leave)(const call_state *call, int64_t i, int worker) {
    return i % ROWS_BETWEEN_POLLS == 0 && cmb_cancelled(call->cancel, worker);
}

static REAL *N(array_row)(const call_state *call, const cmb_array *array, int64_t slot, int64_t x) {
    const int64_t head = call->first_head + slot, H = call->problem->H;
    return (REAL *)array->data + head / H * array->batch + head % H * array->head + x * array->row;
}

/* ---- directions --------------------------------------------------------------------------------- */

/* Writes `from` at unit length; if it has no direction, writes zeros and returns false. */
static bool N(direct)(const KERNELS *kernel, int64_t D, const REAL *from, REAL *to) {
    /* From here to the largest number a sum of squares is exact to within rounding. */
    const REAL least = sizeof(REAL) == 4 ? (REAL)0x1p-100 : (REAL)0x1p-960;
    const REAL *row = to;
    REAL square;
    memcpy(to, from, (size_t)D * sizeof(REAL));
    kernel->dot(1, &row, D, to, &square);
    if (!(square >= least && isfinite(square))) {
        double top = 0;
        int exponent;
        for (int64_t d = 0; d < D; d++)
            top = fabs((double)to[d]) > top ? fabs((double)to[d]) : top;
        if (top == 0 || !kernel->finite(D, to)) {
            memset(to, 0, (size_t)D * sizeof(REAL));
            return false;
        }
        frexp(top, &exponent);
        const int most = sizeof(REAL) == 4 ? FLT_MAX_EXP - 1 : DBL_MAX_EXP - 1;
        kernel->scale(D, to, (REAL)ldexp(1, -exponent < most ? -exponent : most));
        kernel->dot(1, &row, D, to, &square);
    }
    kernel->divide(D, to, (REAL)sqrt((double)square), to);
    return true;
}

/* Centroid c becomes `from`. */
static void N(place)(const call_state *call, head_state *head, int64_t c, const REAL *from) {
    const int64_t D = call->problem->D;
    memcpy(head->centroid + c * D, from, (size_t)D * sizeof(REAL));
    N(direct)(call->kernel, D, from, head->centroid_direction + c * D);
}

static void N(normalise)(void *context, int64_t index, int worker) {
    const call_state *call = context;
    const cmb_clustering *p = call->problem;
    const int64_t slot = index / call->row_tasks, a = index % call->row_tasks * TASK_ROWS, D = p->D;
    head_state *head = &call->head[slot];
    for (int64_t i = a; i < a + TASK_ROWS && i < p->L && !(i % LANES == 0 && cmb_cancelled(call->cancel, worker));
         i++) {
        head->has_direction[i] =
            N(direct)(call->kernel, D, N(array_row)(call, &p->x, slot, i), head->row_direction + i * D);
        head->label[i] = -1;
    }
}

/* The centroids and clusters that the caller passes. */
static void N(read)(void *context, int64_t slot, int worker) {
    const call_state *call = context;
    const cmb_clustering *p = call->problem;
    head_state *head = &call->head[slot];
    for (int64_t c = 0; c < p->n && !(c % LANES == 0 && cmb_cancelled(call->cancel, worker)); c++)
        N(place)(call, head, c, N(array_row)(call, &p->centroids, slot, c));
    for (int64_t i = 0; call->request->operation == UPDATE && i < p->L && !N(leave)(call, i, worker); i++)
        head->label[i] = (int32_t)p->clusters[(call->first_head + slot) * p->L + i];
}

/* ---- similarities ------------------------------------------------------------------------------- */

/* For each lane: the most similar of the first m centroids or, if `open` is not NULL, of the m centroids that it lists;
 * then all their similarities stay in s. Returns false if the call is cancelled. */
static bool N(compare)(const call_state *call, const head_state *head, int lanes, int64_t m, const int32_t *open,
                       int worker) {
    worker_state *w = call->scratch[worker];
    const int64_t D = call->problem->D;
    const bool finds_second = call->wants_margins && !open;
    call->kernel->pack(lanes, w->row, D, 1, LANES, w->packed);
    for (int t = 0; t < LANES; t++) {
        w->best[t] = w->second[t] = -(REAL)INFINITY;
        w->nearest[t] = 0;
    }
    for (int64_t c = 0; c < m; c += CHUNK) {
        if (cmb_cancelled(call->cancel, worker))
            return false;
        const int count = m - c < CHUNK ? (int)(m - c) : CHUNK;
        REAL *s = w->s + (open ? c * LANES : 0);
        for (int k = 0; k < count; k++) {
            w->centroid[k] = head->centroid_direction + (open ? open[c + k] : c + k) * D;
            w->s_row[k] = s + k * LANES;
        }
        call->kernel->gemm(count, LANES, D, w->centroid, 1, w->packed_row, w->s_row, 0, false);
        call->kernel->argmax(count, s, LANES, w->chunk_best, w->chunk_arg);
        for (int t = 0; t < LANES; t++) {
            const bool ahead = w->chunk_best[t] > w->best[t];
            if (finds_second) {
                const REAL behind = ahead ? w->best[t] : w->chunk_best[t];
                w->second[t] = behind > w->second[t] ? behind : w->second[t];
                s[(int)w->chunk_arg[t] * LANES + t] = -(REAL)INFINITY;
            }
            if (ahead) {
                w->best[t] = w->chunk_best[t];
                w->nearest[t] = (int32_t)c + (int32_t)w->chunk_arg[t];
            }
        }
        if (finds_second) {
            call->kernel->argmax(count, s, LANES, w->chunk_best, w->chunk_arg);
            for (int t = 0; t < LANES; t++)
                w->second[t] = w->chunk_best[t] > w->second[t] ? w->chunk_best[t] : w->second[t];
        }
    }
    return true;
}

static void N(label)(void *context, int64_t index, int worker) {
    const call_state *call = context;
    const int64_t L = call->problem->L, D = call->problem->D, a = index % call->row_tasks * TASK_ROWS;
    const int64_t end = a + TASK_ROWS < L ? a + TASK_ROWS : L;
    head_state *head = &call->head[index / call->row_tasks];
    worker_state *w = call->scratch[worker];
    bool changed = false;
    for (int64_t i = a; i < end && !head->converged; i += LANES) {
        const int lanes = end - i < LANES ? (int)(end - i) : LANES;
        for (int t = 0; t < lanes; t++)
            w->row[t] = head->row_direction + (i + t) * D;
        if (!N(compare)(call, head, lanes, call->problem->n, NULL, worker))
            return;
        for (int t = 0; t < lanes; t++) {
            changed |= head->label[i + t] != w->nearest[t];
            head->label[i + t] = w->nearest[t];
            if (call->wants_margins)
                head->margin[i + t] = w->best[t] - w->second[t];
        }
    }
    if (changed)
        atomic_store_explicit(&head->changed, true, memory_order_relaxed);
}

/* ---- centroids ---------------------------------------------------------------------------------- */

/* Selection sampling: draws *size of the rows that have a direction, in order, each set of rows as likely as any other.
 */
static bool N(draw_sample)(const call_state *call, head_state *head, int64_t *size, int worker) {
    const cmb_clustering *p = call->problem;
    int64_t left = 0, taken = 0;
    for (int64_t i = 0; i < p->L && !N(leave)(call, i, worker); i++)
        left += head->has_direction[i];
    *size = left < SAMPLE * p->n ? left : SAMPLE * p->n;
    for (int64_t i = 0; taken < *size && !N(leave)(call, i, worker); i++) {
        if (!head->has_direction[i])
            continue;
        if ((int64_t)((draw(call->request->seed, i) >> 32) * (uint64_t)left >> 32) < *size - taken)
            head->member[taken++] = (int32_t)i;
        left--;
    }
    return taken == *size;
}

/* k-means++: a row of the sample becomes a centroid with a probability in proportion to 1 - s, half the square of its
 * distance, where s is its similarity to the most similar centroid so far. */
static void N(sow)(void *context, int64_t slot, int worker) {
    const call_state *call = context;
    const cmb_clustering *p = call->problem;
    const int64_t D = p->D;
    head_state *head = &call->head[slot];
    worker_state *w = call->scratch[worker];
    int64_t size;
    if (!N(draw_sample)(call, head, &size, worker))
        return;
    for (int64_t j = 0; j < size; j += LANES) {
        if (cmb_cancelled(call->cancel, worker))
            return;
        const int lanes = size - j < LANES ? (int)(size - j) : LANES;
        for (int t = 0; t < lanes; t++) {
            w->row[t] = head->row_direction + head->member[j + t] * D;
            head->weight[j + t] = 2; /* the largest distance */
        }
        call->kernel->pack(lanes, w->row, D, 1, LANES, head->sample + j * D);
    }
    double total = 2 * (double)size;
    memset(w->sum, 0, (size_t)D * sizeof(REAL));
    for (int64_t c = 0; c < p->n; c++) {
        const double mark = (double)(draw(call->request->seed, p->L + c) >> 11) * 0x1p-53 * total;
        double sum = 0;
        int64_t chosen = 0;
        for (int64_t j = 0; j < size && sum <= mark; j++) {
            if (head->weight[j] > 0)
                chosen = j;
            sum += head->weight[j];
        }
        const REAL *row = size ? head->row_direction + head->member[chosen] * D : w->sum;
        N(place)(call, head, c, row);
        total = 0;
        for (int64_t j = 0; j < size; j += LANES) {
            if (cmb_cancelled(call->cancel, worker))
                return;
            const REAL *panel = head->sample + j * D;
            for (int64_t d = 0; d < D; d++)
                w->sample_row[d] = panel + d * LANES;
            call->kernel->gemm(1, LANES, D, &row, 1, w->sample_row, &w->s, 0, false);
            for (int t = 0; t < LANES && j + t < size; t++) {
                double *weight = &head->weight[j + t], distance = 1 - (double)w->s[t];
                distance = distance > 0 && j + t != chosen ? distance : 0;
                *weight = distance < *weight ? distance : *weight;
                total += *weight;
            }
        }
        if (cmb_cancelled(call->cancel, worker))
            return;
    }
}

static void N(note_convergence)(head_state *head) {
    head->converged = !atomic_load_explicit(&head->changed, memory_order_relaxed);
    atomic_store_explicit(&head->changed, false, memory_order_relaxed);
}

/* Counting sort, by label, of the rows that have a direction. */
static void N(collect)(void *context, int64_t slot, int worker) {
    const call_state *call = context;
    const int64_t L = call->problem->L, n = call->problem->n;
    head_state *head = &call->head[slot];
    int32_t *end = head->first + 1; /* end[c] is the beginning of cluster c until its rows are placed */
    if (head->converged)
        return;
    memset(head->first, 0, ((size_t)n + 2) * sizeof(int32_t));
    for (int64_t i = 0; i < L && !N(leave)(call, i, worker); i++)
        if (head->has_direction[i])
            end[head->label[i] + 1]++;
    for (int64_t c = 0; c < n; c++)
        end[c + 1] += end[c];
    for (int64_t i = 0; i < L && !N(leave)(call, i, worker); i++)
        if (head->has_direction[i])
            head->member[end[head->label[i]]++] = (int32_t)i;
}

/* A centroid becomes decay * centroid + (1 - decay) * mean of its cluster's directions, at unit length. */
static void N(move)(void *context, int64_t index, int worker) {
    const call_state *call = context;
    const KERNELS *kernel = call->kernel;
    const int64_t c = index % call->problem->n, D = call->problem->D;
    const double decay = call->request->decay;
    head_state *head = &call->head[index / call->problem->n];
    worker_state *w = call->scratch[worker];
    const int64_t begin = head->first[c], end = head->first[c + 1];
    if (head->converged || begin == end)
        return;
    for (int64_t i = begin; i < end; i += LANES) {
        const int count = end - i < LANES ? (int)(end - i) : LANES;
        const REAL *one = w->one;
        if (cmb_cancelled(call->cancel, worker))
            return;
        for (int t = 0; t < count; t++)
            w->row[t] = head->row_direction + head->member[i + t] * D;
        kernel->gemm(1, D, count, &one, 1, w->row, &w->sum, 0, i > begin);
    }
    const REAL share[] = {(REAL)decay, (REAL)((1 - decay) / (double)(end - begin))}, *weight = share;
    const REAL *row[] = {head->centroid + c * D, w->sum};
    kernel->gemm(1, D, 2, &weight, 1, row, &w->mean, 0, false);
    if (N(direct)(kernel, D, w->mean, w->sum))
        N(place)(call, head, c, w->sum);
}

/* ---- clusters of equal sizes -------------------------------------------------------------------- */

/* Radix sort of the rows by descending margin; equal margins keep the rows' order. A margin is not negative, so that
 * its bits, read as an integer, have its order. The number of passes is even: the result is in `member`. */
static bool N(sort)(const call_state *call, head_state *head, int worker) {
    const int64_t L = call->problem->L;
    for (int64_t i = 0; i < L && !N(leave)(call, i, worker); i++)
        head->member[i] = (int32_t)i;
    for (size_t shift = 0; shift < 8 * sizeof(REAL); shift += 8) {
        int64_t begin[257] = {0};
        for (int round = 0; round < 2; round++) {
            for (int64_t i = 0; i < L; i++) {
                if (N(leave)(call, i, worker))
                    return false;
                BITS key;
                memcpy(&key, &head->margin[head->member[i]], sizeof key);
                const size_t digit = (size_t)(~key >> shift & 255);
                if (round == 0)
                    begin[digit + 1]++;
                else
                    head->other[begin[digit]++] = head->member[i];
            }
            for (int digit = 0; round == 0 && digit < 256; digit++)
                begin[digit + 1] += begin[digit];
        }
        int32_t *sorted = head->other;
        head->other = head->member;
        head->member = sorted;
    }
    return true;
}

/* Rows, by descending margin, join the most similar cluster that has room. */
static void N(balance)(void *context, int64_t slot, int worker) {
    const call_state *call = context;
    const int64_t L = call->problem->L, n = call->problem->n, D = call->problem->D;
    const int32_t share = (int32_t)(L / n);
    int64_t extra = L % n; /* clusters that may still take one row more than their share */
    head_state *head = &call->head[slot];
    worker_state *w = call->scratch[worker];
    int32_t *size = head->first;
    if (!N(sort)(call, head, worker))
        return;
    memset(size, 0, (size_t)n * sizeof *size);
    for (int64_t i = 0; i < L; i += LANES) {
        const int lanes = L - i < LANES ? (int)(L - i) : LANES;
        int64_t m = 0;
        for (int64_t c = 0; c < n; c++)
            if (size[c] < share + (extra > 0))
                head->open[m++] = (int32_t)c;
        for (int t = 0; t < lanes; t++)
            w->row[t] = head->row_direction + head->member[i + t] * D;
        if (!N(compare)(call, head, lanes, m, head->open, worker))
            return;
        for (int t = 0; t < lanes; t++) {
            int64_t nearest = w->nearest[t];
            if (size[head->open[nearest]] >= share + (extra > 0)) { /* it was filled by an earlier row of this block */
                REAL top = -(REAL)INFINITY;
                if (cmb_cancelled(call->cancel, worker))
                    return;
                for (int64_t k = 0; k < m; k++)
                    if (w->s[k * LANES + t] > top && size[head->open[k]] < share + (extra > 0)) {
                        top = w->s[k * LANES + t];
                        nearest = k;
                    }
            }
            const int32_t c = head->open[nearest];
            extra -= size[c]++ == share;
            head->label[head->member[i + t]] = c;
        }
    }
}

/* ---- all heads ---------------------------------------------------------------------------------- */

static void N(finish)(void *context, int64_t slot, int worker) {
    const call_state *call = context;
    const cmb_clustering *p = call->problem;
    const head_state *head = &call->head[slot];
    const bool labels = call->request->operation != UPDATE && p->clusters;
    const bool centroids = call->request->operation != ASSIGN && p->new_centroids.data;
    for (int64_t c = 0; centroids && c < p->n && !N(leave)(call, c, worker); c++)
        memcpy(N(array_row)(call, &p->new_centroids, slot, c), head->centroid + c * p->D, (size_t)p->D * sizeof(REAL));
    for (int64_t i = 0; labels && i < p->L && !N(leave)(call, i, worker); i++)
        p->clusters[(call->first_head + slot) * p->L + i] = head->label[i];
}

static void N(take_memory)(call_state *call, cmb_arena *arena) {
    const request *r = call->request;
    const size_t L = (size_t)call->problem->L, D = (size_t)call->problem->D, n = (size_t)call->problem->n;
    const size_t most = L < SAMPLE * n ? L : SAMPLE * n, size = (most + LANES - 1) / LANES * LANES;
    const size_t chunk = r->balanced && n > CHUNK ? n : CHUNK;
    call->head = cmb_take(arena, (size_t)call->max_in_flight, sizeof *call->head);
    call->scratch = cmb_take(arena, (size_t)call->workers, sizeof *call->scratch);
    for (int64_t i = 0; i < call->max_in_flight && !arena->overflow; i++) {
        head_state h = {.row_direction = cmb_take(arena, L, D * sizeof(REAL))};
        h.has_direction = cmb_take(arena, L, sizeof *h.has_direction);
        h.label = cmb_take(arena, L, sizeof *h.label);
        h.member = cmb_take(arena, L, sizeof *h.member);
        h.first = cmb_take(arena, n + 2, sizeof *h.first);
        h.centroid = cmb_take(arena, n, D * sizeof(REAL));
        h.centroid_direction = cmb_take(arena, n, D * sizeof(REAL));
        if (r->operation == CLUSTER) {
            h.sample = cmb_take(arena, size, D * sizeof(REAL));
            h.weight = cmb_take(arena, size, sizeof *h.weight);
        }
        if (r->balanced) {
            h.margin = cmb_take(arena, L, sizeof *h.margin);
            h.other = cmb_take(arena, L, sizeof *h.other);
            h.open = cmb_take(arena, n, sizeof *h.open);
        }
        if (call->head)
            memcpy(&call->head[i], &h, sizeof h);
    }
    for (int i = 0; i < call->workers; i++) {
        worker_state *w = cmb_take(arena, 1, sizeof *w);
        REAL *packed = cmb_take(arena, D * LANES, sizeof(REAL));
        REAL *s = cmb_take(arena, chunk, LANES * sizeof(REAL));
        REAL *sum = cmb_take(arena, D, sizeof(REAL)), *mean = cmb_take(arena, D, sizeof(REAL));
        const REAL **packed_row = cmb_take(arena, D, sizeof *packed_row);
        const REAL **sample_row = cmb_take(arena, D, sizeof *sample_row);
        if (!w)
            continue;
        call->scratch[i] = w;
        w->packed = packed;
        w->s = s;
        w->sum = sum;
        w->mean = mean;
        w->packed_row = packed_row;
        w->sample_row = sample_row;
        for (size_t d = 0; d < D; d++)
            packed_row[d] = packed + d * LANES;
        for (int t = 0; t < LANES; t++)
            w->one[t] = 1;
    }
}

/* `parts` tasks for each head in flight. */
static void N(for_all_heads)(call_state *call, int64_t parts, cmb_body body) {
    cmb_parallel_for(call->in_flight * parts, call->workers, body, call, call->cancel);
}

/* Rounds of k-means, until no label changes. */
static void N(iterate)(call_state *call) {
    bool converged = false;
    for (int64_t round = 0; round < call->request->iterations && !converged && !cmb_cancelled(call->cancel, 0);
         round++) {
        N(for_all_heads)(call, call->row_tasks, N(label));
        converged = true;
        for (int64_t slot = 0; slot < call->in_flight; slot++) {
            N(note_convergence)(&call->head[slot]);
            converged &= call->head[slot].converged;
        }
        N(for_all_heads)(call, 1, N(collect));
        N(for_all_heads)(call, call->problem->n, N(move));
    }
}

static void N(run_group)(call_state *call) {
    const request *r = call->request;
    call->wants_margins = false;
    for (int64_t slot = 0; slot < call->in_flight; slot++) {
        atomic_init(&call->head[slot].changed, false);
        call->head[slot].converged = false;
    }
    N(for_all_heads)(call, call->row_tasks, N(normalise));
    N(for_all_heads)(call, 1, r->operation == CLUSTER ? N(sow) : N(read));
    if (r->operation == CLUSTER)
        N(iterate)(call);
    if (r->operation == UPDATE) {
        N(for_all_heads)(call, 1, N(collect));
        N(for_all_heads)(call, call->problem->n, N(move));
    } else if (call->problem->clusters) {
        call->wants_margins = r->balanced;
        for (int64_t slot = 0; slot < call->in_flight; slot++)
            call->head[slot].converged &= !r->balanced; /* the labels are final, but not the margins */
        N(for_all_heads)(call, call->row_tasks, N(label));
        if (r->balanced)
            N(for_all_heads)(call, 1, N(balance));
    }
    N(for_all_heads)(call, 1, N(finish));
}

static cmb_status N(execute)(const request *r, cmb_error *error) {
    const cmb_clustering *p = r->problem;
    cmb_cancel cancel;
    cmb_arena arena = {0};
    call_state call = {.request = r, .problem = p, .heads = p->B * p->H, .cancel = &cancel};
    const double work = (double)call.heads * (double)p->L * (double)p->D * (double)p->n;
    call.kernel = NAME2(cmb_kernels_for, SUFFIX)(cmb_isa_current());
    call.workers = work < worth_a_thread ? 1 : cmb_get_num_threads();
    call.row_tasks = (p->L + TASK_ROWS - 1) / TASK_ROWS;
    const int64_t bytes = (p->L + p->n) * p->D * (int64_t)sizeof(REAL);
    call.max_in_flight = bytes_in_flight / bytes > call.workers ? bytes_in_flight / bytes : call.workers;
    call.max_in_flight = call.max_in_flight < call.heads ? call.max_in_flight : call.heads;
    call.max_in_flight = call.max_in_flight < 1024 ? call.max_in_flight : 1024;
    N(take_memory)(&call, &arena);
    TRY(cmb_arena_allocate(&arena, error));
    N(take_memory)(&call, &arena);
    cmb_cancel_init(&cancel, r->interrupt);
    for (; call.first_head < call.heads && !cmb_cancelled(&cancel, 0); call.first_head += call.max_in_flight) {
        call.in_flight =
            call.heads - call.first_head < call.max_in_flight ? call.heads - call.first_head : call.max_in_flight;
        N(run_group)(&call);
    }
    cmb_release(arena.base);
    return cmb_cancel_status(&cancel, error);
}

#undef N
#undef KERNELS
#undef call_state
#undef head_state
#undef worker_state
#undef CHUNK

// SPDX-License-Identifier: Apache-2.0
/*
 * Spherical k-means for one type (REAL, SUFFIX, BITS: as many bits unsigned). A head goes through phases, each of
 * which all heads in flight go through together:
 *
 *   normalise      rows at unit length                   a task: a block of rows
 *   sow, or read   centroids by k-means++, or as given           a head
 *   label          the most similar centroid of each row         a block of rows
 *   collect        the rows of each cluster                      a head
 *   move           each centroid to its rows                     a cluster
 *   balance        clusters of equal sizes                       a head
 *   finish         results                                       a head
 *
 * Similarities are tiles as in attention: lanes are rows, packed transposed, against centroids a chunk at a time. A
 * sum over rows runs in the rows' order, in chunks of LANES, by one thread: blocks and threads decide no bit.
 */
#define N(name) NAME2(name, SUFFIX)
#define KERNELS NAME2(cmb_kernels, SUFFIX)
#define schedule NAME2(schedule, SUFFIX)
#define head_state NAME2(head_state, SUFFIX)
#define worker_state NAME2(worker_state, SUFFIX)
#define CHUNK (384 / (int)sizeof(REAL)) /* centroids, so that similarities and rows share the first-level cache */

/* One head in flight. */
typedef struct {
    REAL *unit;          /* [L][D] the rows' directions, zeros where there is none */
    bool *live;          /* [L] whether there is one */
    int32_t *label;      /* [L] */
    int32_t *member;     /* [L] rows cluster by cluster; the sample; the order of a balanced assignment */
    int32_t *first;      /* [n + 2] where the members of a cluster begin; the size of a balanced cluster */
    REAL *centroid;      /* [n][D] as they came or were made, */
    REAL *direction;     /* [n][D] and as rows are compared with them */
    REAL *sample;        /* [16 n / LANES, rounded up][D][LANES] the sample, packed */
    double *weight;      /* [16 n] of each row of the sample */
    REAL *margin;        /* [L] what the most similar centroid is ahead of the next one */
    int32_t *other;      /* [L] the other half of a sort */
    int32_t *open;       /* [n] clusters with room */
    atomic_bool changed; /* a label did in this round */
    bool settled;        /* none did in the last one, nor will in a later one */
} head_state;

/* One worker's memory. */
typedef struct {
    const REAL *row[LANES];
    const REAL *centroid[CHUNK];
    REAL *s_row[CHUNK];
    REAL chunk_top[LANES], chunk_arg[LANES]; /* of a chunk of centroids, */
    REAL top[LANES], next[LANES];            /* and of all: the largest similarity, the second, */
    int32_t nearest[LANES];                  /* and whose the largest is */
    REAL one[LANES];
    REAL *packed;            /* [D][LANES] */
    const REAL **packed_row; /* [D] */
    const REAL **sample_row; /* [D] */
    REAL *s;                 /* [CHUNK, or n where balanced][LANES] similarities */
    REAL *sum, *mean;        /* [D] */
} worker_state;

typedef struct {
    const request *request;
    const cmb_clustering *problem;
    const KERNELS *kernel;
    int64_t units, slots, first, flying; /* heads: all, in flight at once; the group at hand */
    int64_t row_tasks;                   /* of a head */
    bool margins;                        /* are wanted with the labels */
    int workers;
    cmb_cancel *cancel;
    head_state *head;       /* [slots] */
    worker_state **scratch; /* [workers] */
} schedule;

/* True now and then where the call was cancelled: the condition to leave a loop over rows. */
static bool N(leave)(const schedule *run, int64_t i, int worker) {
    return i % ROWS_BETWEEN_POLLS == 0 && cmb_cancelled(run->cancel, worker);
}

static REAL *N(array_row)(const schedule *run, const cmb_array *array, int64_t slot, int64_t x) {
    const int64_t unit = run->first + slot, H = run->problem->H;
    return (REAL *)array->data + unit / H * array->batch + unit % H * array->head + x * array->row;
}

/* ---- directions --------------------------------------------------------------------------------- */

/* Writes `from` at unit length, or zeros and returns false where it has no direction. */
static bool N(direct)(const KERNELS *kernel, int64_t D, const REAL *from, REAL *to) {
    /* Squares add up to within rounding from here to the largest number. */
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

static void N(place)(const schedule *run, head_state *head, int64_t c, const REAL *from) {
    const int64_t D = run->problem->D;
    memcpy(head->centroid + c * D, from, (size_t)D * sizeof(REAL));
    N(direct)(run->kernel, D, from, head->direction + c * D);
}

static void N(normalise)(void *context, int64_t index, int worker) {
    const schedule *run = context;
    const cmb_clustering *p = run->problem;
    const int64_t slot = index / run->row_tasks, a = index % run->row_tasks * TASK_ROWS, D = p->D;
    head_state *head = &run->head[slot];
    for (int64_t i = a; i < a + TASK_ROWS && i < p->L && !(i % LANES == 0 && cmb_cancelled(run->cancel, worker)); i++) {
        head->live[i] = N(direct)(run->kernel, D, N(array_row)(run, &p->x, slot, i), head->unit + i * D);
        head->label[i] = -1;
    }
}

/* The given centroids and clusters. */
static void N(read)(void *context, int64_t slot, int worker) {
    const schedule *run = context;
    const cmb_clustering *p = run->problem;
    head_state *head = &run->head[slot];
    for (int64_t c = 0; c < p->n && !(c % LANES == 0 && cmb_cancelled(run->cancel, worker)); c++)
        N(place)(run, head, c, N(array_row)(run, &p->centroids, slot, c));
    for (int64_t i = 0; run->request->operation == UPDATE && i < p->L && !N(leave)(run, i, worker); i++)
        head->label[i] = (int32_t)p->clusters[(run->first + slot) * p->L + i];
}

/* ---- similarities ------------------------------------------------------------------------------- */

/* For each of the lanes: the most similar of the first m of the centroids, or of those listed in `open`, in which case
 * their similarities stay in s. */
static bool N(compare)(const schedule *run, const head_state *head, int lanes, int64_t m, const int32_t *open,
                       int worker) {
    worker_state *w = run->scratch[worker];
    const int64_t D = run->problem->D;
    const bool second = run->margins && !open;
    run->kernel->pack(lanes, w->row, D, 1, LANES, w->packed);
    for (int t = 0; t < LANES; t++) {
        w->top[t] = w->next[t] = -(REAL)INFINITY;
        w->nearest[t] = 0;
    }
    for (int64_t c = 0; c < m; c += CHUNK) {
        if (cmb_cancelled(run->cancel, worker))
            return false;
        const int count = m - c < CHUNK ? (int)(m - c) : CHUNK;
        REAL *s = w->s + (open ? c * LANES : 0);
        for (int k = 0; k < count; k++) {
            w->centroid[k] = head->direction + (open ? open[c + k] : c + k) * D;
            w->s_row[k] = s + k * LANES;
        }
        run->kernel->product(count, LANES, D, w->centroid, 1, w->packed_row, w->s_row, 0, false);
        run->kernel->argmax(count, s, LANES, w->chunk_top, w->chunk_arg);
        for (int t = 0; t < LANES; t++) {
            const bool ahead = w->chunk_top[t] > w->top[t];
            if (second) {
                const REAL behind = ahead ? w->top[t] : w->chunk_top[t];
                w->next[t] = behind > w->next[t] ? behind : w->next[t];
                s[(int)w->chunk_arg[t] * LANES + t] = -(REAL)INFINITY;
            }
            if (ahead) {
                w->top[t] = w->chunk_top[t];
                w->nearest[t] = (int32_t)c + (int32_t)w->chunk_arg[t];
            }
        }
        if (second) {
            run->kernel->argmax(count, s, LANES, w->chunk_top, w->chunk_arg);
            for (int t = 0; t < LANES; t++)
                w->next[t] = w->chunk_top[t] > w->next[t] ? w->chunk_top[t] : w->next[t];
        }
    }
    return true;
}

static void N(label)(void *context, int64_t index, int worker) {
    const schedule *run = context;
    const int64_t L = run->problem->L, D = run->problem->D, a = index % run->row_tasks * TASK_ROWS;
    const int64_t end = a + TASK_ROWS < L ? a + TASK_ROWS : L;
    head_state *head = &run->head[index / run->row_tasks];
    worker_state *w = run->scratch[worker];
    bool changed = false;
    for (int64_t i = a; i < end && !head->settled; i += LANES) {
        const int lanes = end - i < LANES ? (int)(end - i) : LANES;
        for (int t = 0; t < lanes; t++)
            w->row[t] = head->unit + (i + t) * D;
        if (!N(compare)(run, head, lanes, run->problem->n, NULL, worker))
            return;
        for (int t = 0; t < lanes; t++) {
            changed |= head->label[i + t] != w->nearest[t];
            head->label[i + t] = w->nearest[t];
            if (run->margins)
                head->margin[i + t] = w->top[t] - w->next[t];
        }
    }
    if (changed)
        atomic_store_explicit(&head->changed, true, memory_order_relaxed);
}

/* ---- centroids ---------------------------------------------------------------------------------- */

/* Selection sampling: `size` of the live rows, in order. */
static bool N(draw_sample)(const schedule *run, head_state *head, int64_t *size, int worker) {
    const cmb_clustering *p = run->problem;
    int64_t live = 0, taken = 0;
    for (int64_t i = 0; i < p->L && !N(leave)(run, i, worker); i++)
        live += head->live[i];
    *size = live < SAMPLE * p->n ? live : SAMPLE * p->n;
    for (int64_t i = 0; taken < *size && !N(leave)(run, i, worker); i++) {
        if (!head->live[i])
            continue;
        if ((int64_t)((draw(run->request->seed, i) >> 32) * (uint64_t)live >> 32) < *size - taken)
            head->member[taken++] = (int32_t)i;
        live--;
    }
    return taken == *size;
}

/* k-means++: a row becomes a centroid with a chance in proportion to 1 - its similarity to the nearest one so far, half
 * the square of their distance. */
static void N(sow)(void *context, int64_t slot, int worker) {
    const schedule *run = context;
    const cmb_clustering *p = run->problem;
    const int64_t D = p->D;
    head_state *head = &run->head[slot];
    worker_state *w = run->scratch[worker];
    int64_t size;
    if (!N(draw_sample)(run, head, &size, worker))
        return;
    for (int64_t j = 0; j < size; j += LANES) {
        if (cmb_cancelled(run->cancel, worker))
            return;
        const int lanes = size - j < LANES ? (int)(size - j) : LANES;
        for (int t = 0; t < lanes; t++) {
            w->row[t] = head->unit + head->member[j + t] * D;
            head->weight[j + t] = 2; /* the most there is */
        }
        run->kernel->pack(lanes, w->row, D, 1, LANES, head->sample + j * D);
    }
    double total = 2 * (double)size;
    memset(w->sum, 0, (size_t)D * sizeof(REAL));
    for (int64_t c = 0; c < p->n; c++) {
        const double mark = (double)(draw(run->request->seed, p->L + c) >> 11) * 0x1p-53 * total;
        double sum = 0;
        int64_t chosen = 0;
        for (int64_t j = 0; j < size && sum <= mark; j++) {
            if (head->weight[j] > 0)
                chosen = j;
            sum += head->weight[j];
        }
        const REAL *row = size ? head->unit + head->member[chosen] * D : w->sum;
        N(place)(run, head, c, row);
        total = 0;
        for (int64_t j = 0; j < size; j += LANES) {
            if (cmb_cancelled(run->cancel, worker))
                return;
            const REAL *panel = head->sample + j * D;
            for (int64_t d = 0; d < D; d++)
                w->sample_row[d] = panel + d * LANES;
            run->kernel->product(1, LANES, D, &row, 1, w->sample_row, &w->s, 0, false);
            for (int t = 0; t < LANES && j + t < size; t++) {
                double *weight = &head->weight[j + t], distance = 1 - (double)w->s[t];
                distance = distance > 0 && j + t != chosen ? distance : 0;
                *weight = distance < *weight ? distance : *weight;
                total += *weight;
            }
        }
        if (cmb_cancelled(run->cancel, worker))
            return;
    }
}

static void N(settle)(head_state *head) {
    head->settled = !atomic_load_explicit(&head->changed, memory_order_relaxed);
    atomic_store_explicit(&head->changed, false, memory_order_relaxed);
}

/* Counting sort of the live rows by label. */
static void N(collect)(void *context, int64_t slot, int worker) {
    const schedule *run = context;
    const int64_t L = run->problem->L, n = run->problem->n;
    head_state *head = &run->head[slot];
    int32_t *end = head->first + 1; /* of cluster c: its beginning until its rows are placed */
    if (head->settled)
        return;
    memset(head->first, 0, ((size_t)n + 2) * sizeof(int32_t));
    for (int64_t i = 0; i < L && !N(leave)(run, i, worker); i++)
        if (head->live[i])
            end[head->label[i] + 1]++;
    for (int64_t c = 0; c < n; c++)
        end[c + 1] += end[c];
    for (int64_t i = 0; i < L && !N(leave)(run, i, worker); i++)
        if (head->live[i])
            head->member[end[head->label[i]]++] = (int32_t)i;
}

static void N(move)(void *context, int64_t index, int worker) {
    const schedule *run = context;
    const KERNELS *kernel = run->kernel;
    const int64_t c = index % run->problem->n, D = run->problem->D;
    const double decay = run->request->decay;
    head_state *head = &run->head[index / run->problem->n];
    worker_state *w = run->scratch[worker];
    const int64_t begin = head->first[c], end = head->first[c + 1];
    if (head->settled || begin == end)
        return;
    for (int64_t i = begin; i < end; i += LANES) {
        const int count = end - i < LANES ? (int)(end - i) : LANES;
        const REAL *one = w->one;
        if (cmb_cancelled(run->cancel, worker))
            return;
        for (int t = 0; t < count; t++)
            w->row[t] = head->unit + head->member[i + t] * D;
        kernel->product(1, D, count, &one, 1, w->row, &w->sum, 0, i > begin);
    }
    const REAL share[] = {(REAL)decay, (REAL)((1 - decay) / (double)(end - begin))}, *weight = share;
    const REAL *row[] = {head->centroid + c * D, w->sum};
    kernel->product(1, D, 2, &weight, 1, row, &w->mean, 0, false);
    if (N(direct)(kernel, D, w->mean, w->sum))
        N(place)(run, head, c, w->sum);
}

/* ---- clusters of equal sizes -------------------------------------------------------------------- */

/* Radix sort of the rows by descending margin, of equals the first before: a margin is 0 or more, so that its bits are
 * in its order. The passes are even in number: the result is in `member`. */
static bool N(sort)(const schedule *run, head_state *head, int worker) {
    const int64_t L = run->problem->L;
    for (int64_t i = 0; i < L && !N(leave)(run, i, worker); i++)
        head->member[i] = (int32_t)i;
    for (size_t shift = 0; shift < 8 * sizeof(REAL); shift += 8) {
        int64_t begin[257] = {0};
        for (int round = 0; round < 2; round++) {
            for (int64_t i = 0; i < L; i++) {
                if (N(leave)(run, i, worker))
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

static void N(balance)(void *context, int64_t slot, int worker) {
    const schedule *run = context;
    const int64_t L = run->problem->L, n = run->problem->n, D = run->problem->D;
    const int32_t share = (int32_t)(L / n);
    int64_t extra = L % n; /* clusters that may yet take one more */
    head_state *head = &run->head[slot];
    worker_state *w = run->scratch[worker];
    int32_t *size = head->first;
    if (!N(sort)(run, head, worker))
        return;
    memset(size, 0, (size_t)n * sizeof *size);
    for (int64_t i = 0; i < L; i += LANES) {
        const int lanes = L - i < LANES ? (int)(L - i) : LANES;
        int64_t m = 0;
        for (int64_t c = 0; c < n; c++)
            if (size[c] < share + (extra > 0))
                head->open[m++] = (int32_t)c;
        for (int t = 0; t < lanes; t++)
            w->row[t] = head->unit + head->member[i + t] * D;
        if (!N(compare)(run, head, lanes, m, head->open, worker))
            return;
        for (int t = 0; t < lanes; t++) {
            int64_t nearest = w->nearest[t];
            if (size[head->open[nearest]] >= share + (extra > 0)) { /* full since this block began */
                REAL top = -(REAL)INFINITY;
                if (cmb_cancelled(run->cancel, worker))
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
    const schedule *run = context;
    const cmb_clustering *p = run->problem;
    const head_state *head = &run->head[slot];
    const bool labels = run->request->operation != UPDATE && p->clusters;
    const bool centroids = run->request->operation != ASSIGN && p->new_centroids.data;
    for (int64_t c = 0; centroids && c < p->n && !N(leave)(run, c, worker); c++)
        memcpy(N(array_row)(run, &p->new_centroids, slot, c), head->centroid + c * p->D, (size_t)p->D * sizeof(REAL));
    for (int64_t i = 0; labels && i < p->L && !N(leave)(run, i, worker); i++)
        p->clusters[(run->first + slot) * p->L + i] = head->label[i];
}

static void N(take_memory)(schedule *run, cmb_arena *arena) {
    const request *r = run->request;
    const size_t L = (size_t)run->problem->L, D = (size_t)run->problem->D, n = (size_t)run->problem->n;
    const size_t most = L < SAMPLE * n ? L : SAMPLE * n, size = (most + LANES - 1) / LANES * LANES;
    const size_t chunk = r->balanced && n > CHUNK ? n : CHUNK;
    run->head = cmb_take(arena, (size_t)run->slots, sizeof *run->head);
    run->scratch = cmb_take(arena, (size_t)run->workers, sizeof *run->scratch);
    for (int64_t i = 0; i < run->slots && !arena->overflow; i++) {
        head_state h = {.unit = cmb_take(arena, L, D * sizeof(REAL))};
        h.live = cmb_take(arena, L, sizeof *h.live);
        h.label = cmb_take(arena, L, sizeof *h.label);
        h.member = cmb_take(arena, L, sizeof *h.member);
        h.first = cmb_take(arena, n + 2, sizeof *h.first);
        h.centroid = cmb_take(arena, n, D * sizeof(REAL));
        h.direction = cmb_take(arena, n, D * sizeof(REAL));
        if (r->operation == CLUSTER) {
            h.sample = cmb_take(arena, size, D * sizeof(REAL));
            h.weight = cmb_take(arena, size, sizeof *h.weight);
        }
        if (r->balanced) {
            h.margin = cmb_take(arena, L, sizeof *h.margin);
            h.other = cmb_take(arena, L, sizeof *h.other);
            h.open = cmb_take(arena, n, sizeof *h.open);
        }
        if (run->head)
            memcpy(&run->head[i], &h, sizeof h);
    }
    for (int i = 0; i < run->workers; i++) {
        worker_state *w = cmb_take(arena, 1, sizeof *w);
        REAL *packed = cmb_take(arena, D * LANES, sizeof(REAL));
        REAL *s = cmb_take(arena, chunk, LANES * sizeof(REAL));
        REAL *sum = cmb_take(arena, D, sizeof(REAL)), *mean = cmb_take(arena, D, sizeof(REAL));
        const REAL **packed_row = cmb_take(arena, D, sizeof *packed_row);
        const REAL **sample_row = cmb_take(arena, D, sizeof *sample_row);
        if (!w)
            continue;
        run->scratch[i] = w;
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

static void N(each)(schedule *run, int64_t parts, cmb_body body) {
    cmb_parallel_for(run->flying * parts, run->workers, body, run, run->cancel);
}

/* Rounds of k-means: after one in which no label changed, no later one changes anything. */
static void N(iterate)(schedule *run) {
    bool settled = false;
    for (int64_t round = 0; round < run->request->iterations && !settled && !cmb_cancelled(run->cancel, 0); round++) {
        N(each)(run, run->row_tasks, N(label));
        settled = true;
        for (int64_t slot = 0; slot < run->flying; slot++) {
            N(settle)(&run->head[slot]);
            settled &= run->head[slot].settled;
        }
        N(each)(run, 1, N(collect));
        N(each)(run, run->problem->n, N(move));
    }
}

static void N(run_group)(schedule *run) {
    const request *r = run->request;
    run->margins = false;
    for (int64_t slot = 0; slot < run->flying; slot++) {
        atomic_init(&run->head[slot].changed, false);
        run->head[slot].settled = false;
    }
    N(each)(run, run->row_tasks, N(normalise));
    N(each)(run, 1, r->operation == CLUSTER ? N(sow) : N(read));
    if (r->operation == CLUSTER)
        N(iterate)(run);
    if (r->operation == UPDATE) {
        N(each)(run, 1, N(collect));
        N(each)(run, run->problem->n, N(move));
    } else if (run->problem->clusters) {
        run->margins = r->balanced;
        for (int64_t slot = 0; slot < run->flying; slot++)
            run->head[slot].settled &= !r->balanced; /* its labels stand, but margins it has none */
        N(each)(run, run->row_tasks, N(label));
        if (r->balanced)
            N(each)(run, 1, N(balance));
    }
    N(each)(run, 1, N(finish));
}

static cmb_status N(execute)(const request *r, cmb_error *error) {
    const cmb_clustering *p = r->problem;
    cmb_cancel cancel;
    cmb_arena arena = {0};
    schedule run = {.request = r, .problem = p, .units = p->B * p->H, .cancel = &cancel};
    const double work = (double)run.units * (double)p->L * (double)p->D * (double)p->n;
    run.kernel = NAME2(cmb_kernels_in_force, SUFFIX)();
    run.workers = work < worth_a_thread ? 1 : cmb_get_num_threads();
    run.row_tasks = (p->L + TASK_ROWS - 1) / TASK_ROWS;
    const int64_t bytes = (p->L + p->n) * p->D * (int64_t)sizeof(REAL);
    run.slots = bytes_in_flight / bytes > run.workers ? bytes_in_flight / bytes : run.workers;
    run.slots = run.slots < run.units ? run.slots : run.units;
    run.slots = run.slots < 1024 ? run.slots : 1024;
    N(take_memory)(&run, &arena);
    if (arena.overflow)
        return cmb_fail(error, CMB_ERR_OVERFLOW, "the workspace does not fit in memory's addresses");
    const size_t needed = arena.used;
    void *memory = cmb_allocate(needed);
    if (!memory)
        return cmb_fail(error, CMB_ERR_MEMORY, "no memory for a workspace of %zu bytes", needed);
    arena = (cmb_arena){.base = memory};
    N(take_memory)(&run, &arena);
    cmb_cancel_init(&cancel, r->interrupt);
    for (; run.first < run.units && !cmb_cancelled(&cancel, 0); run.first += run.slots) {
        run.flying = run.units - run.first < run.slots ? run.units - run.first : run.slots;
        N(run_group)(&run);
    }
    cmb_release(memory);
    if (atomic_load(&cancel.stop))
        return cmb_fail(error, CMB_ERR_CANCELLED, "cancelled");
    return CMB_OK;
}

#undef N
#undef KERNELS
#undef schedule
#undef head_state
#undef worker_state
#undef CHUNK

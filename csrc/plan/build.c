// SPDX-License-Identifier: Apache-2.0
/* Making plans: growing arrays, shared mask sequences, and tiles for spans of rows. */
#include "plan/build.h"

#include <string.h>

/* ---- arrays ---- */

/* Memory of the build itself while it lasts, then of the allocator. */
static void *take_memory(cmb_build *build, size_t bytes) {
    if (bytes > sizeof build->memory - build->used)
        return cmb_allocate(bytes);
    void *memory = build->memory + build->used;
    const size_t taken = build->used + (bytes + 15) / 16 * 16;
    build->used = taken < sizeof build->memory ? taken : sizeof build->memory;
    return memory;
}

static void release_memory(const cmb_build *build, void *memory) {
    const uintptr_t at = (uintptr_t)memory - (uintptr_t)build->memory;
    if (at >= sizeof build->memory)
        cmb_release(memory);
}

static bool reserve(cmb_build *build, cmb_vector *vector, size_t size, int64_t capacity) {
    if (build->status || capacity <= vector->capacity)
        return !build->status;
    if (capacity > INT32_MAX) {
        build->status = CMB_ERR_OVERFLOW;
        return false;
    }
    size_t bytes;
    void *data = cmb_multiply((size_t)capacity, size, &bytes) ? take_memory(build, bytes) : NULL;
    if (!data) {
        build->status = CMB_ERR_MEMORY;
        return false;
    }
    cmb_copy_bytes(&build->cancel, data, vector->data, (size_t)vector->count * size);
    release_memory(build, vector->data);
    vector->data = data;
    vector->capacity = capacity;
    return cmb_build_goes_on(build, 0);
}

bool cmb_build_goes_on(cmb_build *build, int64_t work) {
    if (!build->status && cmb_tick(&build->cancel, work))
        build->status = CMB_ERR_CANCELLED;
    return !build->status;
}

/* Room for `count` more elements; NULL if the build has failed. */
static void *extend(cmb_build *build, cmb_vector *vector, size_t size, int64_t count) {
    if (!cmb_build_goes_on(build, 16 + count))
        return NULL;
    int64_t need = vector->count + count;
    if (need > vector->capacity) {
        int64_t twice = 2 * vector->capacity < INT32_MAX ? 2 * vector->capacity : INT32_MAX;
        if (!reserve(build, vector, size, need > twice ? need > 16 ? need : 16 : twice))
            return NULL;
    }
    void *at = (char *)vector->data + (size_t)vector->count * size;
    vector->count = need;
    return at;
}

/* ---- begin, and the steps ---- */

cmb_status cmb_check_options(int64_t L, const cmb_plan_options *options, cmb_error *error) {
    if (!options)
        return cmb_fail(error, CMB_ERR_VALUE, "options is missing");
    if (L < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "length must not be negative, got %lld", (long long)L);
    if (L > INT64_C(1) << 30)
        return cmb_fail(error, CMB_ERR_OVERFLOW, "length must be at most 2^30, got %lld", (long long)L);
    return CMB_OK;
}

cmb_status cmb_build_begin(cmb_build *build, int64_t L, int64_t R, int64_t N, const cmb_plan_options *options,
                           cmb_error *error) {
    memset(build, 0, offsetof(cmb_build, memory));
    cmb_cancel_init(&build->cancel, options->interrupt);
    if ((unsigned)options->pooling > CMB_POOL_FIRST)
        return cmb_fail(error, CMB_ERR_VALUE, "pooling must be max, mean, sum or first, got %d", (int)options->pooling);
    if (R > INT32_MAX - L || N > INT32_MAX - L - R)
        return cmb_fail(error, CMB_ERR_OVERFLOW, "length %lld with %lld regions exceeds the 2^31 - 1 rows of a plan",
                        (long long)L, (long long)R);
    build->plan = (cmb_plan){
        .L = L,
        .R = (int32_t)R,
        .N = (int32_t)N,
        .is_causal = options->is_causal,
        .size_bias = options->size_bias,
        .pooling = options->pooling,
    };
    build->past = options->past;
    if (build->past) {
        build->first = build->past->length;
        return CMB_OK;
    }
    /* A length that memory cannot hold fails here rather than after minutes of building. */
    reserve(build, &build->pool, sizeof(cmb_pool), R);
    reserve(build, &build->tile, sizeof(cmb_tile), L / 64 + 2);
    return CMB_OK;
}

void cmb_build_wave(cmb_build *build) {
    int32_t *first = extend(build, &build->wave, sizeof *first, 1);
    if (first)
        *first = (int32_t)build->task.count;
}

bool cmb_build_task(cmb_build *build) {
    cmb_task *task = extend(build, &build->task, sizeof *task, 1);
    if (task)
        *task = (cmb_task){(int32_t)build->pool.count, (int32_t)build->tile.count};
    return task != NULL;
}

void cmb_build_pool(cmb_build *build, int64_t row, cmb_list child) {
    CMB_ASSERT(row >= build->plan.L && row < build->plan.L + build->plan.R + build->plan.N);
    cmb_pool *pool = extend(build, &build->pool, sizeof *pool, 1);
    if (pool)
        *pool = (cmb_pool){(int32_t)row, child};
}

void cmb_build_tile(cmb_build *build, cmb_list query, int32_t width) {
    CMB_ASSERT(query.count <= width && (width <= 1 || width % 16 == 0) && width <= CMB_TILE);
    cmb_tile *tile = extend(build, &build->tile, sizeof *tile, 1);
    if (tile)
        *tile = (cmb_tile){query, (int32_t)build->run.count, width};
}

void cmb_build_run(cmb_build *build, cmb_list row) {
    if (row.count < 1)
        return;
    cmb_run *run = extend(build, &build->run, sizeof *run, 1);
    if (run)
        *run = (cmb_run){row, -1};
}

/* ---- masks ---- */

/* A mask sequence of the plan. count == 0: a free place of the hash table. */
typedef struct {
    uint64_t hash;
    int32_t mask, count;
} known_mask;

static known_mask *find_mask(const cmb_build *build, uint64_t hash, const uint64_t *mask, int32_t count) {
    known_mask *table = build->known.data;
    const uint64_t *words = build->mask.data;
    uint64_t last = (uint64_t)build->known.capacity - 1;
    uint64_t at = hash & last;
    while (table[at].count && (table[at].hash != hash || table[at].count != count ||
                               memcmp(words + table[at].mask, mask, (size_t)count * sizeof *mask) != 0))
        at = (at + 1) & last;
    return table + at;
}

/* Keeps half of the table free. Its capacity is a power of two. */
static bool grow_known_masks(cmb_build *build) {
    cmb_vector old = build->known;
    if (old.capacity && 2 * (old.count + 1) <= old.capacity)
        return true;
    build->known = (cmb_vector){0};
    if (reserve(build, &build->known, sizeof(known_mask), old.capacity ? 2 * old.capacity : 64)) {
        build->known.count = old.count;
        memset(build->known.data, 0, (size_t)build->known.capacity * sizeof(known_mask));
        const known_mask *entry = old.data;
        for (int64_t n = 0; n < old.capacity; n++)
            if (entry[n].count)
                *find_mask(build, entry[n].hash, (const uint64_t *)build->mask.data + entry[n].mask, entry[n].count) =
                    entry[n];
    }
    release_memory(build, old.data);
    return !build->status;
}

void cmb_build_masked_run(cmb_build *build, cmb_list row, const uint64_t *mask) {
    while (row.count > 0 && !mask[row.count - 1])
        row.count--;
    cmb_build_untrimmed_run(build, row, mask);
}

void cmb_build_untrimmed_run(cmb_build *build, cmb_list row, const uint64_t *mask) {
    if (row.count < 1 || build->status || !grow_known_masks(build))
        return;
    uint64_t hash = 0;
    for (int32_t n = 0; n < row.count; n++) {
        hash = (hash ^ mask[n]) * UINT64_C(0x9e3779b97f4a7c15);
        hash ^= hash >> 32;
    }
    known_mask *known = find_mask(build, hash, mask, row.count);
    if (!known->count) {
        int32_t first = (int32_t)build->mask.count;
        uint64_t *words = extend(build, &build->mask, sizeof *words, row.count);
        if (!words)
            return;
        memcpy(words, mask, (size_t)row.count * sizeof *words);
        *known = (known_mask){hash, first, row.count};
        build->known.count++;
    }
    cmb_run *run = extend(build, &build->run, sizeof *run, 1);
    if (run)
        *run = (cmb_run){row, known->mask};
}

cmb_list cmb_build_list(cmb_build *build, const int32_t *row, int64_t count) {
    if (count < 1)
        return (cmb_list){0, 1, 0};
    int64_t step = count > 1 ? (int64_t)row[1] - row[0] : 1;
    int64_t n = 1;
    while (n < count && (int64_t)row[n] - row[n - 1] == step)
        n++;
    if (n == count && step)
        return cmb_list_make(row[0], step, count);
    int64_t start = build->index.count;
    int32_t *index = extend(build, &build->index, sizeof *index, count);
    if (!index)
        return (cmb_list){0, 1, 0};
    memcpy(index, row, (size_t)count * sizeof *index);
    return cmb_list_make(start, 0, count);
}

void cmb_build_lists_of(cmb_build *build, const cmb_plan *plan) {
    CMB_ASSERT(build->index.count == 0);
    int32_t *index = plan->indices ? extend(build, &build->index, sizeof *index, plan->indices) : NULL;
    if (index)
        cmb_copy_bytes(&build->cancel, index, plan->index, (size_t)plan->indices * sizeof *index);
}

/* ---- tiles for spans of rows ---- */

static bool is_something_visible(cmb_span span, int64_t a, int64_t n) {
    const int64_t count = span.row.count;
    switch (span.visibility) {
    case CMB_AFTER:
        return count > a + 1;
    case CMB_OTHERS:
        return count > 1 || (count == 1 && a + n > 1);
    default:
        return count > 0;
    }
}

/* Queries [a, a + n) attend the elements of the span but their own, [a, a + n) each for the other lanes. */
static void attend_others(cmb_build *build, cmb_list row, int64_t a, int64_t n) {
    uint64_t mask[CMB_TILE];
    cmb_build_run(build, cmb_list_cut(row, 0, a));
    if (n == 1 && a + 1 < row.count) {
        /* Nobody in the tile sees element a, but a longer plan has it here, for later queries. Element a + 1 stands in
         * for it under an empty mask, so that the rows behind it have the places that they have in a longer plan. */
        CMB_ASSERT(row.step);
        const int32_t next = (int32_t)(row.start + (a + 1) * row.step);
        cmb_build_masked_run(build, cmb_build_list(build, (int32_t[]){next, next}, 2), (uint64_t[]){0, 1});
        n = 2;
    } else {
        for (int64_t t = 0; t < n; t++)
            mask[t] = cmb_lane_mask(0, n) & ~cmb_lane_mask(t, t + 1);
        cmb_build_masked_run(build, cmb_list_cut(row, a, a + n), mask);
    }
    cmb_build_run(build, cmb_list_cut(row, a + n, row.count));
}

static void attend_after(cmb_build *build, cmb_list row, int64_t a, int64_t n) {
    uint64_t mask[CMB_TILE];
    for (int64_t t = 1; t < n; t++)
        mask[t - 1] = cmb_lane_mask(0, t);
    cmb_build_masked_run(build, cmb_list_cut(row, a + 1, a + n), mask);
    cmb_build_run(build, cmb_list_cut(row, a + n, row.count));
}

/* Queries [a, a + n) attend what they see of a span, except for elements [a, a + n) of CMB_UP_TO. */
static void attend_span(cmb_build *build, cmb_span span, int64_t a, int64_t n) {
    switch (span.visibility) {
    case CMB_EVERY:
        cmb_build_run(build, span.row);
        return;
    case CMB_UP_TO:
        cmb_build_run(build, cmb_list_cut(span.row, 0, a));
        return;
    case CMB_AFTER:
        attend_after(build, span.row, a, n);
        return;
    case CMB_OTHERS:
        attend_others(build, span.row, a, n);
    }
}

/* Elements [a, a + n) of the CMB_UP_TO spans, element by element, each for the lanes from its own on. */
static void attend_up_to(cmb_build *build, const cmb_span *span, int spans, int64_t a, int64_t n) {
    enum { MAX_SPANS = 3 };
    int32_t row[MAX_SPANS * CMB_TILE];
    uint64_t mask[MAX_SPANS * CMB_TILE];
    int64_t rows = 0;
    int cut_spans = 0;
    cmb_list last = {0, 1, 0};
    for (int k = 0; k < spans; k++)
        cut_spans += span[k].visibility == CMB_UP_TO;
    CMB_ASSERT(cut_spans <= MAX_SPANS);
    for (int64_t e = a; e < a + n; e++)
        for (int k = 0; k < spans; k++)
            if (span[k].visibility == CMB_UP_TO && e < span[k].row.count) {
                CMB_ASSERT(span[k].row.step || cut_spans == 1);
                row[rows] = (int32_t)(span[k].row.start + e * span[k].row.step);
                mask[rows++] = cmb_lane_mask(e - a, n);
                last = cmb_list_cut(span[k].row, a, a + n);
            }
    cmb_build_masked_run(build, cut_spans > 1 ? cmb_build_list(build, row, rows) : last, mask);
}

void cmb_build_attend_from(cmb_build *build, cmb_list query, int64_t a, const cmb_span *span, int spans) {
    const int64_t n = cmb_min(CMB_TILE, query.count - a);
    bool is_empty = true;
    for (int k = 0; k < spans; k++)
        is_empty = is_empty && !is_something_visible(span[k], a, n);
    if (n < 1 || is_empty)
        return;
    cmb_build_tile(build, cmb_list_cut(query, a, a + n), cmb_tile_width(n));
    for (int k = 0; k < spans; k++)
        attend_span(build, span[k], a, n);
    attend_up_to(build, span, spans, a, n);
}

void cmb_build_attend(cmb_build *build, cmb_list query, const cmb_span *span, int spans) {
    for (int64_t a = 0; a < query.count && !build->status; a += CMB_TILE)
        cmb_build_attend_from(build, query, a, span, spans);
}

/* ---- end ---- */

cmb_status cmb_build_end(cmb_build *build, cmb_plan **plan, cmb_error *error) {
    cmb_build_wave(build);
    cmb_build_task(build);
    cmb_build_tile(build, (cmb_list){0, 1, 0}, 0);
    cmb_status status = build->status;
    cmb_plan *made = &build->plan;
    if (status == CMB_ERR_OVERFLOW)
        cmb_fail(error, status, "a plan of length %lld needs tables of more than 2^31 - 1 entries", (long long)made->L);
    else if (status == CMB_ERR_CANCELLED)
        cmb_fail(error, status, "cancelled");
    else if (status)
        cmb_fail(error, status, "out of memory while making a plan of length %lld", (long long)made->L);
    else {
        made->waves = (int32_t)build->wave.count - 1;
        made->tasks = (int32_t)build->task.count - 1;
        made->pools = (int32_t)build->pool.count;
        made->tiles = (int32_t)build->tile.count - 1;
        made->runs = (int32_t)build->run.count;
        made->indices = (int32_t)build->index.count;
        made->masks = (int32_t)build->mask.count;
        made->wave = build->wave.data;
        made->task = build->task.data;
        made->pool = build->pool.data;
        made->tile = build->tile.data;
        made->run = build->run.data;
        made->index = build->index.data;
        made->mask = build->mask.data;
        status = build->past && !build->is_placed
                     ? cmb_place_plan(made, build->past, build->cancel.interrupt, plan, error)
                     : cmb_copy_plan(made, build->is_placed, &build->cancel, plan, error);
    }
    const cmb_vector held[] = {build->wave, build->task,  build->pool, build->tile,
                               build->run,  build->index, build->mask, build->known};
    for (size_t n = 0; n < sizeof held / sizeof *held; n++)
        release_memory(build, held[n].data);
    return status;
}

// SPDX-License-Identifier: Apache-2.0
/* The factorizations as plans (spec: "Factorizations"). Tiles, tasks and their rows' order are anchored at absolute
 * positions and never depend on what remains of the length: a causal plan's queries attend the same rows in the same
 * order whatever follows them, so that a prefix's results have the same bits. A shorter plan may lack rows only where
 * no lane left sees them, and, since the lane kernel takes rows 96 at a time, behind the others of a longer list. */
#include "plan.h"
#include "runtime.h"

#include <string.h>

enum {
    TILE = 64,           /* queries of a tile */
    NARROW = 16,         /* queries of a LogSparse tile: 64 would see three times the rows that 16 do */
    TASK_QUERIES = 1024, /* queries of a task of narrow tiles */
    SPAN_QUERIES = 512,  /* Fixed: a task has whole spans of up to so many positions, or so many of a longer span */
    CHUNK_LEVEL = 11,    /* LogSparse blocks of up to 2^11 keys are summarized chunk by chunk */
};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Elements [first, end) of a list, as far as it has them. */
static cmb_list cut(cmb_list list, int64_t first, int64_t end) {
    end = least(end, list.count);
    if (first >= end)
        return (cmb_list){0, 1, 0};
    return cmb_list_make(list.start + first * list.step, list.step, end - first);
}

static cmb_status check_length(int64_t L, cmb_error *error) {
    if (L < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "length must not be negative, got %lld", (long long)L);
    if (L > INT64_C(1) << 30)
        return cmb_fail(error, CMB_ERR_OVERFLOW, "length must be at most 2^30, got %lld", (long long)L);
    return CMB_OK;
}

/* ---- Dense and Fixed ---- */

/* The tile's queries [a, a + n) attend the keys of their own span [first, end): up to themselves when causal. */
static void attend_own(cmb_build *build, int64_t first, int64_t end, int64_t a, int64_t n) {
    if (!build->plan.is_causal) {
        cmb_build_run(build, cmb_list_make(first, 1, end - first));
        return;
    }
    uint64_t mask[TILE];
    for (int64_t t = 0; t < n; t++)
        mask[t] = cmb_lanes(t, n);
    cmb_build_run(build, cmb_list_make(first, 1, a - first));
    cmb_build_masked_run(build, cmb_list_make(a, 1, n), mask);
}

cmb_status cmb_plan_dense(int64_t L, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = check_length(L, error);
    if (status || (status = cmb_build_begin(&build, L, 0, 0, options, error)))
        return status;
    cmb_build_wave(&build);
    for (int64_t a = 0; a < L && cmb_build_task(&build); a += TILE) {
        int64_t n = least(TILE, L - a);
        cmb_build_tile(&build, cmb_list_make(a, 1, n), cmb_lanes_for(n));
        attend_own(&build, 0, L, a, n);
    }
    return cmb_build_end(&build, plan, error);
}

/* Region L + c is span c, pooled so that its members are known even where nobody attends it. */
static void summarize_spans(cmb_build *build, int64_t span, int64_t spans) {
    int64_t L = build->plan.L, group = span < SPAN_QUERIES ? SPAN_QUERIES / span : 1;
    int64_t attended = build->plan.is_causal ? spans - 1 : spans > 1 ? spans : 0;
    cmb_build_wave(build);
    for (int64_t first = 0; first < spans && cmb_build_task(build); first += group) {
        int64_t end = least(first + group, spans);
        for (int64_t c = first; c < end; c++)
            cmb_build_pool(build, L + c, cmb_list_make(c * span, 1, least(span, L - c * span)));
        for (int64_t c = first; c < least(end, attended); c++) {
            cmb_build_tile(build, cmb_list_make(L + c, 1, 1), 1);
            cmb_build_run(build, cmb_list_make(c * span, 1, least(span, L - c * span)));
        }
    }
}

/* A tile lies in one span. `summary` lists what the other spans are seen through, in order. */
static void attend_wide_spans(cmb_build *build, int64_t span, int64_t spans, cmb_list summary) {
    int64_t L = build->plan.L;
    for (int64_t c = 0; c < spans; c++) {
        int64_t first = c * span, end = least(first + span, L);
        for (int64_t a = first; a < end; a += TILE) {
            int64_t n = least(TILE, end - a);
            if ((a - first) % SPAN_QUERIES == 0 && !cmb_build_task(build))
                return;
            cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_lanes_for(n));
            cmb_build_run(build, cut(summary, 0, c));
            if (!build->plan.is_causal)
                cmb_build_run(build, cut(summary, c + 1, summary.count));
            attend_own(build, first, end, a, n);
        }
    }
}

/* A tile holds as many whole spans as fit. Its own spans come key by key, each span's summary behind its keys, so that
 * a length that ends in the tile only lacks rows at the end. */
static void attend_narrow_spans(cmb_build *build, int64_t span, cmb_list summary, bool is_sparse) {
    int64_t L = build->plan.L, step = TILE / span * span;
    bool is_causal = build->plan.is_causal;
    for (int64_t a = 0; a < L && cmb_build_task(build); a += step) {
        int64_t n = least(step, L - a), rows = 0;
        int32_t row[2 * TILE];
        uint64_t mask[2 * TILE];
        for (int64_t first = 0; first < n; first += span) {
            int64_t end = least(first + span, n);
            uint64_t own = cmb_lanes(first, end);
            uint64_t others = is_causal ? cmb_lanes(end, n) : cmb_lanes(0, n) & ~own;
            for (int64_t t = first; t < end; t++) {
                row[rows] = (int32_t)(a + t);
                mask[rows] = is_causal ? cmb_lanes(t, end) : own;
                if (is_sparse && t == first + span - 1)
                    mask[rows] |= others;
                rows++;
            }
            if (!is_sparse && others) {
                row[rows] = (int32_t)(L + (a + first) / span);
                mask[rows++] = others;
            }
        }
        cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_lanes_for(n));
        cmb_build_run(build, cut(summary, 0, a / span));
        if (!is_causal)
            cmb_build_run(build, cut(summary, (a + step) / span, summary.count));
        cmb_build_masked_run(build, cmb_build_list(build, row, rows), mask);
    }
}

cmb_status cmb_plan_fixed(int64_t L, int64_t span, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = check_length(L, error);
    if (status)
        return status;
    if (span < 1)
        return cmb_fail(error, CMB_ERR_VALUE, "span must be at least 1, got %lld", (long long)span);
    span = L < 1 ? 1 : least(span, L);
    int64_t spans = (L + span - 1) / span;
    status = cmb_build_begin(&build, L, options->sparse ? 0 : spans, 0, options, error);
    if (status)
        return status;
    if (!options->sparse)
        summarize_spans(&build, span, spans);
    /* The sparse baseline sees another span through its last position, where it has one. */
    cmb_list summary = options->sparse ? cmb_list_make(span - 1, span, L / span) : cmb_list_make(L, 1, spans);
    cmb_build_wave(&build);
    if (span < TILE)
        attend_narrow_spans(&build, span, summary, options->sparse);
    else
        attend_wide_spans(&build, span, spans, summary);
    return cmb_build_end(&build, plan, error);
}

/* ---- LogSparse ---- */

/* Block b of level l: positions [b << l, (b + 1) << l), clipped to L. Level 0 are the positions themselves. */
typedef struct {
    int64_t L;
    bool is_causal;
    int top;           /* highest level with 2^l < L: the blocks that some query may attend */
    int64_t first[32]; /* table row of the level's block 0 */
    int64_t count[32];
} dyadic;

/* Some query lies in the block's sibling, and when causal behind the block. */
static bool is_attended(const dyadic *blocks, int level, int64_t block) {
    return (block ^ 1) << level < blocks->L && (!blocks->is_causal || block % 2 == 0);
}

/* The rows of two neighbouring levels' blocks: children of [block, block + n). */
static cmb_list children(const dyadic *blocks, int level, int64_t block, int64_t n) {
    int64_t child = 2 * block;
    return cmb_list_make(blocks->first[level - 1] + child, 1, least(2 * n, blocks->count[level - 1] - child));
}

static void pool_blocks(cmb_build *build, const dyadic *blocks, int level, int64_t first, int64_t end) {
    for (int64_t b = first; b < least(end, blocks->count[level]); b++)
        cmb_build_pool(build, blocks->first[level] + b, children(blocks, level, b, 1));
}

/* Hierarchical: every block that is attended or lies in one that is attends its two halves. These are the level's first
 * blocks: when causal the whole ones before the last position, whose own regions cover all of them. */
static void summarize_halves(cmb_build *build, const dyadic *blocks, int level, int64_t first, int64_t end) {
    uint64_t mask[2 * NARROW];
    end = least(end, blocks->is_causal ? (blocks->L - 1) >> level : blocks->count[level]);
    for (int64_t b = first; b < end; b += NARROW) {
        int64_t n = least(NARROW, end - b);
        cmb_list row = children(blocks, level, b, n);
        for (int32_t k = 0; k < row.count; k++)
            mask[k] = cmb_lanes(k / 2, k / 2 + 1);
        cmb_build_tile(build, cmb_list_make(blocks->first[level] + b, 1, n), cmb_lanes_for(n));
        cmb_build_masked_run(build, row, mask);
    }
}

/* The attended blocks of levels [low, high] that hold some of the keys [a, a + n) attend them; n is 2^low at least
 * where the blocks lie in the keys, and at most where the keys lie in the blocks. */
static void summarize_keys(cmb_build *build, const dyadic *blocks, int low, int high, int64_t a, int64_t n) {
    int64_t keys = least(n, blocks->L - a), lanes = 0;
    int32_t query[TILE];
    uint64_t mask[TILE] = {0};
    bool is_full = n <= INT64_C(1) << low;
    for (int level = low; level <= high; level++)
        for (int64_t b = a >> level; b << level < a + keys; b++) {
            if (!is_attended(blocks, level, b))
                continue;
            int64_t end = least(((b + 1) << level) - a, keys);
            for (int64_t key = is_full ? keys : (b << level) - a; key < end; key++)
                mask[key] |= cmb_lanes(lanes, lanes + 1);
            query[lanes++] = (int32_t)(blocks->first[level] + b);
        }
    if (!lanes)
        return;
    cmb_build_tile(build, cmb_build_list(build, query, lanes), cmb_lanes_for(lanes));
    if (is_full)
        cmb_build_run(build, cmb_list_make(a, 1, keys));
    else
        cmb_build_masked_run(build, cmb_list_make(a, 1, keys), mask);
}

static void summarize_chunks(cmb_build *build, const dyadic *blocks, bool is_hierarchical) {
    enum { LOW = 5 }; /* 32 keys hold 31 blocks of levels 1 to 5, of which a causal plan attends 16 */
    int top = blocks->top < CHUNK_LEVEL ? blocks->top : CHUNK_LEVEL;
    int64_t chunk = INT64_C(1) << CHUNK_LEVEL;
    cmb_build_wave(build);
    for (int64_t first = 0; first < blocks->L && cmb_build_task(build); first += chunk) {
        for (int level = 1; level <= top; level++)
            pool_blocks(build, blocks, level, first >> level, (first + chunk) >> level);
        for (int level = 1; is_hierarchical && level <= top; level++)
            summarize_halves(build, blocks, level, first >> level, (first + chunk) >> level);
        for (int64_t a = first; !is_hierarchical && a < least(first + chunk, blocks->L); a += TILE) {
            for (int64_t half = a; half < least(a + TILE, blocks->L); half += TILE / 2)
                summarize_keys(build, blocks, 1, top < LOW ? top : LOW, half, TILE / 2);
            summarize_keys(build, blocks, LOW + 1, top, a, TILE);
        }
    }
}

/* The blocks that hold several chunks. */
static void summarize_big_blocks(cmb_build *build, const dyadic *blocks, bool is_hierarchical) {
    cmb_build_wave(build);
    cmb_build_task(build);
    for (int level = CHUNK_LEVEL + 1; level <= blocks->top; level++)
        pool_blocks(build, blocks, level, 0, blocks->count[level]);
    for (int level = CHUNK_LEVEL + 1; is_hierarchical && level <= blocks->top; level++)
        summarize_halves(build, blocks, level, 0, blocks->count[level]);
    if (is_hierarchical)
        return;
    cmb_build_wave(build);
    for (int level = CHUNK_LEVEL + 1; level <= blocks->top; level++)
        for (int64_t b = 0; b < blocks->count[level]; b++) {
            if (!is_attended(blocks, level, b))
                continue;
            if (!cmb_build_task(build))
                return;
            int64_t first = b << level;
            cmb_build_tile(build, cmb_list_make(blocks->first[level] + b, 1, 1), 1);
            cmb_build_run(build, cmb_list_make(first, 1, least(INT64_C(1) << level, blocks->L - first)));
        }
}

/* Queries [a, a + n) attend themselves and, on every level, the sibling of their own block: its region or, in the
 * sparse baseline and on level 0, its position nearest to them. */
static void attend_siblings(cmb_build *build, const dyadic *blocks, int64_t a, int64_t n, bool is_sparse) {
    enum { INSIDE = 4 }; /* levels whose blocks lie in a tile; on higher ones all lanes share one sibling */
    int32_t shared[32], region[NARROW];
    uint64_t region_mask[NARROW], key_mask[NARROW] = {0};
    int64_t shareds = 0, regions = 0;
    for (int64_t t = 0; t < n; t++)
        key_mask[t] = cmb_lanes(t, t + 1);
    for (int level = 0; level <= blocks->top; level++)
        for (int64_t own = a >> level; own << level < a + n; own++) {
            int64_t sibling = own ^ 1;
            if (!is_attended(blocks, level, sibling) || sibling << level >= blocks->L)
                continue;
            bool is_position = is_sparse || level == 0;
            int64_t nearest = sibling < own ? (own << level) - 1 : sibling << level;
            int64_t row = is_position ? nearest : blocks->first[level] + sibling;
            uint64_t lanes = cmb_lanes((own << level) - a, least(((own + 1) << level) - a, n));
            if (level >= INSIDE)
                shared[shareds++] = (int32_t)row;
            else if (is_position)
                key_mask[row - a] |= lanes;
            else {
                region[regions] = (int32_t)row;
                region_mask[regions++] = lanes;
            }
        }
    cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_lanes_for(n));
    cmb_build_run(build, cmb_build_list(build, shared, shareds));
    cmb_build_masked_run(build, cmb_build_list(build, region, regions), region_mask);
    cmb_build_masked_run(build, cmb_list_make(a, 1, n), key_mask);
}

cmb_status cmb_plan_logsparse(int64_t L, bool hierarchical, const cmb_plan_options *options, cmb_plan **plan,
                              cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = check_length(L, error);
    if (status)
        return status;
    dyadic blocks = {.L = L, .is_causal = options->is_causal, .count = {L}};
    int64_t rows = L;
    for (int level = 1; INT64_C(1) << level < L; level++) {
        blocks.top = level;
        blocks.first[level] = rows;
        blocks.count[level] = (blocks.count[level - 1] + 1) / 2;
        rows += blocks.count[level];
    }
    status = cmb_build_begin(&build, L, options->sparse ? 0 : rows - L, 0, options, error);
    if (status)
        return status;
    if (!options->sparse && blocks.top > 0) {
        summarize_chunks(&build, &blocks, hierarchical);
        if (blocks.top > CHUNK_LEVEL)
            summarize_big_blocks(&build, &blocks, hierarchical);
    }
    cmb_build_wave(&build);
    for (int64_t a = 0; a < L; a += NARROW) {
        if (a % TASK_QUERIES == 0 && !cmb_build_task(&build))
            break;
        attend_siblings(&build, &blocks, a, least(NARROW, L - a), options->sparse);
    }
    return cmb_build_end(&build, plan, error);
}

/* ---- a user's own ---- */

/* What lies below a region. */
typedef struct {
    int32_t first, last; /* lowest and highest position */
    int32_t count;       /* positions, repeats counted; 0: a dead region, left out wherever it is listed */
    int32_t depth;       /* regions nested in it, one in another */
    bool is_needed;      /* a query attends it, or a needed region has it as a member */
} region_facts;

/* One row of a tile's union: the k-th time that some query lists it. */
typedef struct {
    uint64_t mask;
    int32_t row;
    int32_t next;      /* slot of its next time, or -1 */
    int32_t lane, now; /* the first time's slot knows the last lane that listed the row, and how far that came */
} union_slot;

typedef struct {
    cmb_build *build;
    int64_t L, R;
    bool is_causal;
    const cmb_lists *direct, *regions, *members;
    region_facts *region; /* [R] */
    int32_t *head;        /* [L + R] slot of a row's first time; holds for a slot of that row alone */
    union_slot *slot;     /* [capacity]: the rows of a tile */
    int64_t *key;         /* [capacity] a sort key for each of them, or for a region's members */
    int32_t *row;         /* [capacity] */
    uint64_t *mask;       /* [capacity] */
    int64_t capacity;
    cmb_error *error;
} parts;

static int64_t list_size(const cmb_lists *lists, int64_t n) { return lists->offset[n + 1] - lists->offset[n]; }

/* In place and without memory of its own, as qsort is not. */
static void heap_sort(int64_t *key, int64_t count) {
    for (int64_t heap = count / 2, end = count; end > 1;) {
        int64_t moved;
        if (heap > 0)
            moved = key[--heap];
        else {
            moved = key[--end];
            key[end] = key[0];
        }
        int64_t at = heap;
        for (int64_t child = 2 * at + 1; child < end; child = 2 * at + 1) {
            if (child + 1 < end && key[child] < key[child + 1])
                child++;
            if (key[child] <= moved)
                break;
            key[at] = key[child];
            at = child;
        }
        key[at] = moved;
    }
}

static cmb_status check_lists(const cmb_lists *lists, const char *name, int64_t count, cmb_error *error) {
    if (lists->count != count)
        return cmb_fail(error, CMB_ERR_VALUE, "%s must hold %lld lists, one for each position, got %lld", name,
                        (long long)count, (long long)lists->count);
    int64_t before = 0;
    for (int64_t n = 0; lists->count && n <= count; n++) {
        int64_t offset = lists->offset[n];
        if (offset < before || (n == 0 && offset))
            return cmb_fail(error, CMB_ERR_VALUE, "%s: offsets must start at 0 and not decrease, got %lld at %lld",
                            name, (long long)offset, (long long)n);
        before = offset;
    }
    return CMB_OK;
}

static cmb_status read_members(parts *p, int64_t r) {
    region_facts *region = p->region + r;
    int64_t count = 0;
    *region = (region_facts){.first = INT32_MAX, .last = -1};
    for (int64_t n = p->members->offset[r]; n < p->members->offset[r + 1]; n++) {
        int64_t member = p->members->item[n];
        if (member < 0 || member >= p->L + p->R)
            return cmb_fail(p->error, CMB_ERR_VALUE,
                            "members[%lld] holds %lld, which is neither a position below %lld nor a region",
                            (long long)r, (long long)member, (long long)p->L);
        if (member >= p->L + r)
            return cmb_fail(p->error, CMB_ERR_VALUE, "members[%lld] holds region %lld, which is not listed before it",
                            (long long)r, (long long)(member - p->L));
        region_facts below = {.first = (int32_t)member, .last = (int32_t)member, .count = 1, .depth = -1};
        if (member >= p->L)
            below = p->region[member - p->L];
        if (!below.count)
            continue;
        region->first = below.first < region->first ? below.first : region->first;
        region->last = below.last > region->last ? below.last : region->last;
        region->depth = below.depth + 1 > region->depth ? below.depth + 1 : region->depth;
        count += below.count;
        if (count > INT32_MAX)
            return cmb_fail(p->error, CMB_ERR_OVERFLOW, "members[%lld] stands for more than 2^31 - 1 positions",
                            (long long)r);
    }
    region->count = (int32_t)count;
    return CMB_OK;
}

static cmb_status check_query(const parts *p, int64_t i) {
    for (int64_t n = p->direct->offset[i]; n < p->direct->offset[i + 1]; n++) {
        int64_t key = p->direct->item[n];
        if (key < 0 || key >= p->L)
            return cmb_fail(p->error, CMB_ERR_VALUE, "direct[%lld] holds key %lld, which is not a position below %lld",
                            (long long)i, (long long)key, (long long)p->L);
        if (p->is_causal && key > i)
            return cmb_fail(p->error, CMB_ERR_VALUE,
                            "direct[%lld] holds key %lld, which lies after query %lld of a causal plan", (long long)i,
                            (long long)key, (long long)i);
    }
    for (int64_t n = p->regions->offset[i]; n < p->regions->offset[i + 1]; n++) {
        int64_t r = p->regions->item[n];
        if (r < 0 || r >= p->R)
            return cmb_fail(p->error, CMB_ERR_VALUE, "regions[%lld] holds %lld, but there are %lld regions",
                            (long long)i, (long long)r, (long long)p->R);
        if (p->is_causal && p->region[r].last > i)
            return cmb_fail(p->error, CMB_ERR_VALUE,
                            "regions[%lld] holds region %lld, whose key %d lies after query %lld of a causal plan",
                            (long long)i, (long long)r, p->region[r].last, (long long)i);
        p->region[r].is_needed = true;
    }
    return CMB_OK;
}

/* All arguments, and with them what is known of the regions. */
static cmb_status read_parts(parts *p) {
    cmb_status status = CMB_OK;
    for (int64_t r = 0; r < p->R && !status; r++)
        status = read_members(p, r);
    for (int64_t i = 0; i < p->L && !status; i++)
        status = check_query(p, i);
    for (int64_t r = p->R - 1; r >= 0 && !status; r--)
        for (int64_t n = p->members->offset[r]; p->region[r].is_needed && n < p->members->offset[r + 1]; n++)
            if (p->members->item[n] >= p->L)
                p->region[p->members->item[n] - p->L].is_needed = true;
    return status;
}

/* Room for the rows of one tile or the members of one region; false, and the build has failed, where there is none. */
static bool make_room(parts *p, int64_t capacity) {
    if (capacity <= p->capacity)
        return true;
    capacity = capacity < 2 * p->capacity ? 2 * p->capacity : capacity;
    size_t part = (size_t)capacity, per = sizeof *p->slot + sizeof *p->mask + sizeof *p->key + sizeof *p->row, bytes;
    char *data = cmb_multiply(part, per, &bytes) ? cmb_allocate(bytes) : NULL;
    if (!data) {
        p->build->status = CMB_ERR_MEMORY;
        return false;
    }
    cmb_release(p->slot);
    p->slot = (union_slot *)(void *)data;
    p->mask = (uint64_t *)(void *)(data + part * sizeof *p->slot);
    p->key = (int64_t *)(void *)(p->mask + part);
    p->row = (int32_t *)(void *)(p->key + part);
    p->capacity = capacity;
    return true;
}

/* ---- regions ---- */

/* The positions below a region, repeats counted, as sort keys. */
static int64_t collect_positions(const parts *p, int64_t r, int32_t *stack, int64_t *key) {
    int64_t depth = 0, count = 0;
    stack[depth++] = (int32_t)(p->L + r);
    while (depth) {
        int64_t row = stack[--depth];
        if (row < p->L)
            key[count++] = row;
        else if (p->region[row - p->L].count)
            for (int64_t n = p->members->offset[row - p->L]; n < p->members->offset[row - p->L + 1]; n++)
                stack[depth++] = (int32_t)p->members->item[n];
    }
    return count;
}

/* Pools a live region's members in position order, so that ties go to the lowest one, and has it attend them as given.
 */
static void summarize_members(parts *p, int64_t r, int32_t *stack) {
    cmb_build *build = p->build;
    if (!make_room(p, list_size(p->members, r)))
        return;
    int64_t count = 0;
    for (int64_t n = p->members->offset[r]; n < p->members->offset[r + 1]; n++) {
        int64_t row = p->members->item[n];
        const region_facts *below = row < p->L ? NULL : p->region + (row - p->L);
        if (below && !below->count)
            continue;
        p->row[count] = (int32_t)row;
        p->key[count++] = (below ? below->first : row) << 32 | row;
    }
    cmb_list member = cmb_build_list(build, p->row, count);
    if (p->region[r].is_needed) {
        cmb_build_tile(build, cmb_list_make(p->L + r, 1, 1), 1);
        cmb_build_run(build, member);
    }
    heap_sort(p->key, count);
    bool is_sorted = true, is_interleaved = false;
    for (int64_t n = 0, last = -1; n < count; n++) {
        int64_t row = p->key[n] & INT32_MAX, first = p->key[n] >> 32;
        is_sorted = is_sorted && row == p->row[n];
        is_interleaved = is_interleaved || first < last;
        int64_t end = row < p->L ? row : p->region[row - p->L].last;
        last = end > last ? end : last;
    }
    /* Interleaved regions have no order that is the positions' own; only mean and sum do without one. */
    if (is_interleaved && (build->plan.pooling == CMB_POOL_MAX || build->plan.pooling == CMB_POOL_FIRST)) {
        if (!make_room(p, p->region[r].count))
            return;
        count = collect_positions(p, r, stack, p->key);
        heap_sort(p->key, count);
        is_sorted = false;
    }
    if (!is_sorted) {
        for (int64_t n = 0; n < count; n++)
            p->row[n] = (int32_t)(p->key[n] & INT32_MAX);
        member = cmb_build_list(build, p->row, count);
    }
    cmb_build_pool(build, p->L + r, member);
}

/* A wave for each depth of nesting. */
static void summarize_parts(parts *p) {
    enum { GROUP = 16 };
    size_t members = p->R ? (size_t)p->members->offset[p->R] : 0, bytes;
    int64_t live = 0;
    int64_t *order = cmb_allocate(((size_t)p->R + 1) * sizeof *order);
    int32_t *stack = cmb_multiply(members + 1, sizeof *stack, &bytes) ? cmb_allocate(bytes) : NULL;
    if (!order || !stack) {
        p->build->status = CMB_ERR_MEMORY;
        goto out;
    }
    for (int64_t r = 0; r < p->R; r++)
        if (p->region[r].count)
            order[live++] = (int64_t)p->region[r].depth << 32 | r;
    heap_sort(order, live);
    for (int64_t n = 0, group = 0; n < live; n++, group++) {
        if (n == 0 || order[n] >> 32 != order[n - 1] >> 32) {
            cmb_build_wave(p->build);
            group = 0;
        }
        if (group % GROUP == 0 && !cmb_build_task(p->build))
            break;
        summarize_members(p, order[n] & INT32_MAX, stack);
    }
out:
    cmb_release(order);
    cmb_release(stack);
}

/* ---- queries ---- */

/* Adds a row of lane t's to the union, which has `slots` slots; returns how many it has then. */
static int32_t unite_row(parts *p, int32_t slots, int32_t row, int32_t t) {
    uint64_t bit = UINT64_C(1) << t;
    int32_t head = p->head[row];
    union_slot *first = p->slot + head;
    if (head >= slots || first->row != row || first->lane < 0) {
        p->head[row] = slots;
        p->slot[slots] = (union_slot){bit, row, -1, t, slots};
        return slots + 1;
    }
    if (first->lane != t)
        first->now = head;
    else {
        union_slot *before = p->slot + first->now;
        if (before->next < 0) {
            p->slot[slots] = (union_slot){0, row, -1, -1, -1};
            before->next = slots++;
        }
        first->now = before->next;
    }
    first->lane = t;
    p->slot[first->now].mask |= bit;
    return slots;
}

/* The rows that queries [a, a + n) list, as slots: each as often as the query that lists it most. */
static int32_t unite_rows(parts *p, int64_t a, int64_t n) {
    int32_t slots = 0;
    for (int32_t t = 0; t < n; t++) {
        for (int64_t k = p->direct->offset[a + t]; k < p->direct->offset[a + t + 1]; k++)
            slots = unite_row(p, slots, (int32_t)p->direct->item[k], t);
        for (int64_t k = p->regions->offset[a + t]; k < p->regions->offset[a + t + 1]; k++)
            if (p->region[p->regions->item[k]].count)
                slots = unite_row(p, slots, (int32_t)(p->L + p->regions->item[k]), t);
    }
    return slots;
}

/* The widest tiles that compute at most a quarter more than the least: they fetch fewer rows. */
static int64_t choose_width(parts *p) {
    const int64_t width[] = {16, 32, 64};
    double cost[3] = {0}, least_cost = 0;
    for (int w = 0; w < 3; w++) {
        for (int64_t a = 0; a < p->L; a += width[w])
            cost[w] += (double)unite_rows(p, a, least(width[w], p->L - a)) * (double)width[w];
        least_cost = w == 0 || cost[w] < least_cost ? cost[w] : least_cost;
    }
    int w = 2;
    while (cost[w] > 1.25 * least_cost)
        w--;
    return width[w];
}

static void attend_parts(parts *p) {
    cmb_build *build = p->build;
    int64_t most = 0;
    for (int64_t a = 0; a < p->L; a += TILE) {
        int64_t end = least(a + TILE, p->L);
        int64_t items = p->direct->offset[end] - p->direct->offset[a];
        if (__builtin_add_overflow(items, p->regions->offset[end] - p->regions->offset[a], &items) ||
            items >= INT32_MAX) {
            build->status = CMB_ERR_OVERFLOW;
            return;
        }
        most = items > most ? items : most;
    }
    if (build->status || !make_room(p, most + 1))
        return;
    int64_t width = choose_width(p);
    cmb_build_wave(build);
    for (int64_t a = 0; a < p->L; a += width) {
        int64_t n = least(width, p->L - a), full = 0;
        if (a % TILE == 0 && !cmb_build_task(build))
            break;
        int32_t slots = unite_rows(p, a, n);
        if (!slots)
            continue;
        for (int32_t s = 0; s < slots; s++) { /* full rows first, then by row */
            bool is_full = p->slot[s].mask == cmb_lanes(0, n);
            p->key[s] = (int64_t)!is_full << 62 | (int64_t)p->slot[s].row << 31 | s;
            full += is_full;
        }
        heap_sort(p->key, slots);
        for (int32_t k = 0; k < slots; k++) {
            const union_slot *slot = p->slot + (p->key[k] & INT32_MAX);
            p->row[k] = slot->row;
            p->mask[k] = slot->mask;
        }
        cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_lanes_for(n));
        cmb_build_run(build, cmb_build_list(build, p->row, full));
        cmb_build_masked_run(build, cmb_build_list(build, p->row + full, slots - full), p->mask + full);
    }
}

cmb_status cmb_plan_from_parts(int64_t L, const cmb_lists *direct, const cmb_lists *regions, const cmb_lists *members,
                               const cmb_plan_options *options, cmb_plan **plan, cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    parts p = {
        .build = &build,
        .L = L,
        .R = members->count,
        .is_causal = options->is_causal,
        .direct = direct,
        .regions = regions,
        .members = members,
        .error = error,
    };
    cmb_status status = check_length(L, error);
    if (status || (status = check_lists(direct, "direct", L, error)) ||
        (status = check_lists(regions, "regions", L, error)))
        return status;
    if (p.R < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "members must not hold a negative number of lists, got %lld",
                        (long long)p.R);
    if (options->sparse)
        return cmb_fail(error, CMB_ERR_VALUE, "sparse must be false: parts say themselves what is left out");
    if ((status = check_lists(members, "members", p.R, error)) ||
        (status = cmb_build_begin(&build, L, p.R, 0, options, error)))
        return status;
    size_t rows = (size_t)(L + p.R) + 1;
    p.region = cmb_allocate(((size_t)p.R + 1) * sizeof *p.region);
    p.head = cmb_allocate(rows * sizeof *p.head);
    if (!p.region || !p.head) {
        build.status = CMB_ERR_MEMORY;
        goto out;
    }
    memset(p.head, 0, rows * sizeof *p.head);
    status = read_parts(&p);
    if (status) {
        build.status = status;
        error = NULL; /* it is filled */
        goto out;
    }
    summarize_parts(&p);
    attend_parts(&p);
out:
    cmb_release(p.region);
    cmb_release(p.head);
    cmb_release(p.slot);
    return cmb_build_end(&build, plan, error);
}

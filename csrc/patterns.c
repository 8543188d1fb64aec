// SPDX-License-Identifier: Apache-2.0
/* The factorizations as plans (spec: "Factorizations"). Tiles, tasks and their rows' order are anchored at absolute
 * positions and never depend on what remains of the length: a causal plan's queries attend the same rows in the same
 * order whatever follows them, so that a prefix's results have the same bits. A shorter plan may lack rows only where
 * no lane left sees them, and, since the lane kernel takes rows 96 at a time, behind the others of a longer list. */
#include "plan.h"
#include "runtime.h"

#include <string.h>

enum {
    NARROW = 16,         /* queries of a LogSparse tile: 64 would see three times the rows that 16 do */
    TASK_QUERIES = 1024, /* queries of a task of narrow tiles */
    SPAN_QUERIES = 256,  /* Fixed: a task has whole spans of up to so many positions, or so many of a longer span */
    CHUNK_LEVEL = 9,     /* LogSparse: a task has 2^9 keys, with the smaller blocks in them */
    HALVES_LEVEL = 11,   /* hierarchical: a task summarizes the blocks in 2^11 keys */
};

/* ---- Dense and Fixed ---- */

/* The tile's queries [a, a + n) attend the keys of their own span [first, end): up to themselves when causal. */
static void attend_own(cmb_build *build, int64_t first, int64_t end, int64_t a, int64_t n) {
    if (!build->plan.is_causal) {
        cmb_build_run(build, cmb_list_make(first, 1, end - first));
        return;
    }
    uint64_t mask[CMB_TILE];
    for (int64_t t = 0; t < n; t++)
        mask[t] = cmb_lanes(t, n);
    cmb_build_run(build, cmb_list_make(first, 1, a - first));
    cmb_build_masked_run(build, cmb_list_make(a, 1, n), mask);
}

cmb_status cmb_plan_dense(int64_t L, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = cmb_check_length(L, error);
    if (status || (status = cmb_build_begin(&build, L, 0, 0, options, error)))
        return status;
    cmb_build_wave(&build);
    for (int64_t a = 0; a < L && cmb_build_task(&build); a += CMB_TILE) {
        int64_t n = cmb_least(CMB_TILE, L - a);
        cmb_build_tile(&build, cmb_list_make(a, 1, n), cmb_lanes_for(n));
        attend_own(&build, 0, L, a, n);
    }
    return cmb_build_end(&build, plan, error);
}

/* Where the task of both waves that begins with position a ends: it has whole spans, or a part of a long one. So what a
 * task summarizes is what it attends next, and a causal plan's waves can be fused. */
static int64_t block_end(const cmb_build *build, int64_t span, int64_t a) {
    int64_t whole = span < CMB_TILE ? CMB_TILE / span * span : span;
    if (whole < SPAN_QUERIES)
        return cmb_least(a + SPAN_QUERIES / whole * whole, build->plan.L);
    return cmb_least(cmb_least(a + SPAN_QUERIES, (a / span + 1) * span), build->plan.L);
}

/* Region L + c is span c, pooled so that its members are known even where nobody attends it. */
static void summarize_spans(cmb_build *build, int64_t span, int64_t spans) {
    int64_t L = build->plan.L, c = 0;
    int64_t attended = build->plan.is_causal ? spans - 1 : spans > 1 ? spans : 0;
    cmb_build_wave(build);
    for (int64_t a = 0, end; a < L && cmb_build_task(build); a = end) {
        end = block_end(build, span, a);
        for (; c < spans && cmb_least((c + 1) * span, L) <= end; c++) {
            cmb_list own = cmb_list_make(c * span, 1, cmb_least(span, L - c * span));
            cmb_build_pool(build, L + c, own);
            if (c >= attended)
                continue;
            cmb_build_tile(build, cmb_list_make(L + c, 1, 1), 1);
            cmb_build_run(build, own);
        }
    }
}

/* Queries [a, a + n) lie in one span. `summary` lists what the other spans are seen through, in order. */
static void attend_from_one_span(cmb_build *build, int64_t span, cmb_list summary, int64_t a, int64_t n) {
    int64_t c = a / span;
    cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_lanes_for(n));
    cmb_build_run(build, cmb_cut(summary, 0, c));
    if (!build->plan.is_causal)
        cmb_build_run(build, cmb_cut(summary, c + 1, summary.count));
    attend_own(build, c * span, cmb_least((c + 1) * span, build->plan.L), a, n);
}

/* Queries [a, a + n) are as many whole spans as fit in a tile. These come key by key, each span's summary behind its
 * keys, so that a length that ends in the tile only lacks rows at the end. */
static void attend_from_spans(cmb_build *build, int64_t span, cmb_list summary, bool is_sparse, int64_t a, int64_t n) {
    int64_t L = build->plan.L, rows = 0;
    bool is_causal = build->plan.is_causal;
    int32_t row[2 * CMB_TILE];
    uint64_t mask[2 * CMB_TILE];
    for (int64_t first = 0; first < n; first += span) {
        int64_t end = cmb_least(first + span, n);
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
    cmb_build_run(build, cmb_cut(summary, 0, a / span));
    if (!is_causal)
        cmb_build_run(build, cmb_cut(summary, (a + CMB_TILE / span * span) / span, summary.count));
    cmb_build_masked_run(build, cmb_build_list(build, row, rows), mask);
}

cmb_status cmb_plan_fixed(int64_t L, int64_t span, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = cmb_check_length(L, error);
    if (status)
        return status;
    if (span < 1)
        return cmb_fail(error, CMB_ERR_VALUE, "span must be at least 1, got %lld", (long long)span);
    span = L < 1 ? 1 : cmb_least(span, L);
    int64_t spans = (L + span - 1) / span;
    status = cmb_build_begin(&build, L, options->sparse ? 0 : spans, 0, options, error);
    if (status)
        return status;
    if (!options->sparse)
        summarize_spans(&build, span, spans);
    /* The sparse baseline sees another span through its last position, where it has one. */
    cmb_list summary = options->sparse ? cmb_list_make(span - 1, span, L / span) : cmb_list_make(L, 1, spans);
    cmb_build_wave(&build);
    for (int64_t a = 0, end; a < L && cmb_build_task(&build); a = end) {
        end = block_end(&build, span, a);
        for (int64_t t = a, n; t < end; t += n) {
            n = cmb_least(end - t, span < CMB_TILE ? CMB_TILE / span * span : CMB_TILE);
            if (span < CMB_TILE) {
                attend_from_spans(&build, span, summary, options->sparse, t, n);
                continue;
            }
            n = cmb_least(n, (t / span + 1) * span - t);
            attend_from_one_span(&build, span, summary, t, n);
        }
    }
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
    return cmb_list_make(blocks->first[level - 1] + child, 1, cmb_least(2 * n, blocks->count[level - 1] - child));
}

static void pool_blocks(cmb_build *build, const dyadic *blocks, int level, int64_t first, int64_t end) {
    for (int64_t b = first; b < cmb_least(end, blocks->count[level]); b++)
        cmb_build_pool(build, blocks->first[level] + b, children(blocks, level, b, 1));
}

/* Hierarchical: every block that is attended or lies in one that is attends its two halves. These are the level's first
 * blocks: when causal the whole ones before the last position, whose own regions cover all of them. */
static void summarize_halves(cmb_build *build, const dyadic *blocks, int level, int64_t first, int64_t end) {
    uint64_t mask[2 * NARROW];
    end = cmb_least(end, blocks->is_causal ? (blocks->L - 1) >> level : blocks->count[level]);
    for (int64_t b = first; b < end; b += NARROW) {
        int64_t n = cmb_least(NARROW, end - b);
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
    int64_t keys = cmb_least(n, blocks->L - a), lanes = 0;
    int32_t query[CMB_TILE];
    uint64_t mask[CMB_TILE] = {0};
    bool is_full = n <= INT64_C(1) << low;
    for (int level = low; level <= high; level++)
        for (int64_t b = a >> level; b << level < a + keys; b++) {
            if (!is_attended(blocks, level, b))
                continue;
            int64_t end = cmb_least(((b + 1) << level) - a, keys);
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
            uint64_t lanes = cmb_lanes((own << level) - a, cmb_least(((own + 1) << level) - a, n));
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

/* The blocks of levels 1 to `top` that hold some of the positions [first, end). */
static void pool_within(cmb_build *build, const dyadic *blocks, int top, int64_t first, int64_t end) {
    enum { NEAR = 6 }; /* 64 positions with all that lies in them stay in the first-level cache */
    for (int64_t a = first; a < end; a += INT64_C(1) << NEAR)
        for (int level = 1; level <= cmb_least(NEAR, top); level++)
            pool_blocks(build, blocks, level, a >> level, (a + (INT64_C(1) << NEAR)) >> level);
    for (int level = NEAR + 1; level <= top; level++)
        pool_blocks(build, blocks, level, first >> level, (end + (INT64_C(1) << level) - 1) >> level);
}

static void summarize_within(cmb_build *build, const dyadic *blocks, int top, int64_t first, int64_t end) {
    enum { LOW = 5 }; /* 32 keys hold 31 blocks of levels 1 to 5, of which a causal plan attends 16 */
    for (int64_t a = first; a < end; a += CMB_TILE) {
        for (int64_t half = a; half < cmb_least(a + CMB_TILE, end); half += CMB_TILE / 2)
            summarize_keys(build, blocks, 1, top < LOW ? top : LOW, half, CMB_TILE / 2);
        summarize_keys(build, blocks, LOW + 1, top, a, CMB_TILE);
    }
}

/* Whether the level's block that holds a chunk ends with it. */
static bool ends_with(const dyadic *blocks, int level, int64_t chunk) {
    return (chunk + 1) % (INT64_C(1) << (level - CHUNK_LEVEL)) == 0 || chunk == blocks->count[CHUNK_LEVEL] - 1;
}

/* The blocks of CHUNK_LEVEL, from their keys, and those that hold several. A chunk's task has those that end with it,
 * so that a causal plan's waves can be fused. */
static void summarize_big_blocks(cmb_build *build, const dyadic *blocks) {
    const int64_t L = blocks->L, chunks = blocks->count[CHUNK_LEVEL];
    for (int level = CHUNK_LEVEL; level <= blocks->top; level++) {
        cmb_build_wave(build);
        for (int64_t c = 0; c < chunks && cmb_build_task(build); c++) {
            int64_t b = c >> (level - CHUNK_LEVEL), first = b << level;
            if (level == CHUNK_LEVEL)
                cmb_build_pool(build, blocks->first[level] + b,
                               cmb_list_make(first, 1, cmb_least(INT64_C(1) << level, L - first)));
            else if (ends_with(blocks, level, c))
                pool_blocks(build, blocks, level, b, b + 1);
        }
    }
    cmb_build_wave(build);
    for (int64_t c = 0; c < chunks && cmb_build_task(build); c++)
        for (int level = CHUNK_LEVEL; level <= blocks->top; level++) {
            int64_t b = c >> (level - CHUNK_LEVEL), first = b << level;
            if (!ends_with(blocks, level, c) || !is_attended(blocks, level, b))
                continue;
            cmb_build_tile(build, cmb_list_make(blocks->first[level] + b, 1, 1), 1);
            cmb_build_run(build, cmb_list_make(first, 1, cmb_least(INT64_C(1) << level, L - first)));
        }
}

/* Blocks below CHUNK_LEVEL are attended within their chunk alone: what they need is pooled, summarized and attended in
 * one task, while it is in the cache. */
static void build_flat(cmb_build *build, const dyadic *blocks, bool is_sparse) {
    int top = blocks->top < CHUNK_LEVEL ? blocks->top : CHUNK_LEVEL - 1;
    if (!is_sparse && blocks->top >= CHUNK_LEVEL)
        summarize_big_blocks(build, blocks);
    cmb_build_wave(build);
    for (int64_t first = 0; first < blocks->L && cmb_build_task(build); first += INT64_C(1) << CHUNK_LEVEL) {
        int64_t end = cmb_least(first + (INT64_C(1) << CHUNK_LEVEL), blocks->L);
        if (!is_sparse && top > 0) {
            pool_within(build, blocks, top, first, end);
            summarize_within(build, blocks, top, first, end);
        }
        for (int64_t a = first; a < end; a += NARROW)
            attend_siblings(build, blocks, a, cmb_least(NARROW, end - a), is_sparse);
    }
}

/* Summaries of summaries need the lower ones first: chunk by chunk, then the blocks that hold several. */
static void build_hierarchical(cmb_build *build, const dyadic *blocks) {
    int top = blocks->top < HALVES_LEVEL ? blocks->top : HALVES_LEVEL;
    int64_t chunk = INT64_C(1) << HALVES_LEVEL;
    if (top > 0)
        cmb_build_wave(build);
    for (int64_t first = 0; top > 0 && first < blocks->L && cmb_build_task(build); first += chunk) {
        pool_within(build, blocks, top, first, cmb_least(first + chunk, blocks->L));
        for (int level = 1; level <= top; level++)
            summarize_halves(build, blocks, level, first >> level, (first + chunk) >> level);
    }
    if (blocks->top > top) {
        cmb_build_wave(build);
        cmb_build_task(build);
        for (int level = top + 1; level <= blocks->top; level++)
            pool_blocks(build, blocks, level, 0, blocks->count[level]);
        for (int level = top + 1; level <= blocks->top; level++)
            summarize_halves(build, blocks, level, 0, blocks->count[level]);
    }
    cmb_build_wave(build);
    for (int64_t a = 0; a < blocks->L; a += NARROW) {
        if (a % TASK_QUERIES == 0 && !cmb_build_task(build))
            break;
        attend_siblings(build, blocks, a, cmb_least(NARROW, blocks->L - a), false);
    }
}

cmb_status cmb_plan_logsparse(int64_t L, bool hierarchical, const cmb_plan_options *options, cmb_plan **plan,
                              cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = cmb_check_length(L, error);
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
    if (hierarchical && !options->sparse)
        build_hierarchical(&build, &blocks);
    else
        build_flat(&build, &blocks, options->sparse);
    return cmb_build_end(&build, plan, error);
}

// SPDX-License-Identifier: Apache-2.0
/* LogSparse, flat and hierarchical (docs/mathematics.md, section 3). On every level, a query attends the sibling of its
 * own block. Causal plans keep the prefix rule of build.h.
 *
 *   positions   0  1  2  3  4  5  6  7
 *   level 1    |  0  |  1  |  2  |  3  |    Query 5 attends itself, its sibling 4 on level 0, block 3 on level 1 unless
 *   level 2    |     0     |     1     |    causal, and block 0 on level 2.
 *
 * Tree(2) has the hierarchical form's parts. This builder's tiles gather a query's blocks of all levels in two lists,
 * where a tree's have a run for each level. */
#include "plan/build.h"

enum {
    NARROW = 16,     /* queries of a tile: 64 would see three times the rows that 16 do */
    CHUNK_LEVEL = 8, /* a task has a chunk of 2^8 positions, with the smaller blocks in it */
};

/* Block b of level l: positions [b << l, (b + 1) << l), clipped to L. Level 0 is the positions themselves. */
typedef struct {
    int64_t L;
    int64_t continued;   /* positions of the plan that this one continues */
    int64_t first_query; /* where the tile of the first query begins */
    bool is_causal;
    int top;           /* the highest level with 2^l < L: a query may attend its blocks */
    int64_t first[32]; /* table row of the level's block 0 */
    int64_t count[32];
} dyadic;

/* Whether a query attends the block: one in its sibling, which must come after the block when causal. */
static bool is_attended(const dyadic *blocks, int level, int64_t block) {
    return (block ^ 1) << level < blocks->L && (!blocks->is_causal || block % 2 == 0);
}

/* The first block of a level that the plan pools and summarizes: a plan that continues has those before. */
static int64_t first_block(const dyadic *blocks, int level) {
    return cmb_complete(blocks->continued, INT64_C(1) << level, 1);
}

/* The children of blocks [block, block + n): their halves on the level below. */
static cmb_list children(const dyadic *blocks, int level, int64_t block, int64_t n) {
    int64_t child = 2 * block;
    return cmb_list_make(blocks->first[level - 1] + child, 1, cmb_min(2 * n, blocks->count[level - 1] - child));
}

static int64_t later(int64_t a, int64_t b) { return a > b ? a : b; }

/* A plan that continues leaves incomplete blocks to the plan that attends them. */
static void pool_blocks(cmb_build *build, const dyadic *blocks, int level, int64_t first, int64_t end) {
    end = cmb_min(end, build->past ? (blocks->L - 1) >> level : blocks->count[level]);
    for (int64_t b = later(first, first_block(blocks, level)); b < end; b++)
        cmb_build_pool(build, blocks->first[level] + b, children(blocks, level, b, 1));
}

/* Hierarchical: a block attends its two halves if a query attends the block, or a larger one that holds it. When
 * causal, these are the level's whole blocks before the last position: the last query's regions cover them all. */
static void summarize_halves(cmb_build *build, const dyadic *blocks, int level, int64_t first, int64_t end) {
    uint64_t mask[2 * NARROW];
    end = cmb_min(end, blocks->is_causal ? (blocks->L - 1) >> level : blocks->count[level]);
    for (int64_t b = later(first, first_block(blocks, level)); b < end; b += NARROW) {
        int64_t n = cmb_min(NARROW, end - b);
        cmb_list row = children(blocks, level, b, n);
        for (int32_t k = 0; k < row.count; k++)
            mask[k] = cmb_lane_mask(k / 2, k / 2 + 1);
        cmb_build_tile(build, cmb_list_make(blocks->first[level] + b, 1, n), cmb_tile_width(n));
        cmb_build_masked_run(build, row, mask);
    }
}

/* Flat: the blocks of levels [low, high] that hold some of the positions [a, a + n) attend them, if a query attends the
 * blocks. Either all of the blocks lie inside the positions (n >= 2^high), or all hold every one of them (n <= 2^low).
 */
static void summarize_keys(cmb_build *build, const dyadic *blocks, int low, int high, int64_t a, int64_t n) {
    int64_t keys = cmb_min(n, blocks->L - a), lanes = 0;
    int32_t query[CMB_TILE];
    uint64_t mask[CMB_TILE] = {0};
    bool is_full = n <= INT64_C(1) << low;
    for (int level = low; level <= high; level++)
        for (int64_t b = later(a >> level, first_block(blocks, level)); b << level < a + keys; b++) {
            if (!is_attended(blocks, level, b))
                continue;
            int64_t end = cmb_min(((b + 1) << level) - a, keys);
            for (int64_t key = is_full ? keys : (b << level) - a; key < end; key++)
                mask[key] |= cmb_lane_mask(lanes, lanes + 1);
            query[lanes++] = (int32_t)(blocks->first[level] + b);
        }
    if (!lanes)
        return;
    cmb_build_tile(build, cmb_build_list(build, query, lanes), cmb_tile_width(lanes));
    if (is_full)
        cmb_build_run(build, cmb_list_make(a, 1, keys));
    else
        cmb_build_masked_run(build, cmb_list_make(a, 1, keys), mask);
}

/* Queries [a, a + n) attend themselves and, on every level, the sibling of their own block: through its region or, on
 * level 0 and in the sparse baseline, through the position in it that is nearest to their block. */
static void attend_siblings(cmb_build *build, const dyadic *blocks, int64_t a, int64_t n, bool is_sparse) {
    enum { INSIDE = 4 }; /* below this level a tile holds several blocks; from it on, all lanes share one sibling */
    int32_t shared[32], region[NARROW];
    uint64_t region_mask[NARROW], key_mask[NARROW] = {0};
    int64_t shareds = 0, regions = 0;
    for (int64_t t = 0; t < n; t++)
        key_mask[t] = cmb_lane_mask(t, t + 1);
    const bool keeps_places = blocks->is_causal && !is_sparse;
    const int top = keeps_places && blocks->top < INSIDE - 1 ? INSIDE - 1 : blocks->top;
    const int64_t most = keeps_places ? NARROW : n;
    for (int level = 0; level <= top; level++)
        for (int64_t own = a >> level; own << level < a + most; own++) {
            int64_t sibling = own ^ 1;
            if (own << level >= a + n) {
                /* Queries of a longer plan attend it. Query a's row stands in, so that rows have the same places. */
                if (level > 0 && level < INSIDE && sibling < own) {
                    region[regions] = (int32_t)a;
                    region_mask[regions++] = 0;
                }
                continue;
            }
            if (!is_attended(blocks, level, sibling) || sibling << level >= blocks->L)
                continue;
            bool is_position = is_sparse || level == 0;
            int64_t nearest = sibling < own ? (own << level) - 1 : sibling << level;
            int64_t row = is_position ? nearest : blocks->first[level] + sibling;
            uint64_t lanes = cmb_lane_mask((own << level) - a, cmb_min(((own + 1) << level) - a, n));
            if (level >= INSIDE)
                shared[shareds++] = (int32_t)row;
            else if (is_position)
                key_mask[row - a] |= lanes;
            else {
                region[regions] = (int32_t)row;
                region_mask[regions++] = lanes;
            }
        }
    cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_tile_width(n));
    cmb_build_run(build, cmb_build_list(build, shared, shareds));
    cmb_build_untrimmed_run(build, cmb_build_list(build, region, regions), region_mask);
    cmb_build_masked_run(build, cmb_list_make(a, 1, n), key_mask);
}

/* The blocks of levels 1 to `top` that hold some of the positions [first, end). */
static void pool_within(cmb_build *build, const dyadic *blocks, int top, int64_t first, int64_t end) {
    enum { NEAR = 6 }; /* 64 positions and the blocks in them stay in the first-level cache */
    for (int64_t a = first; a < end; a += INT64_C(1) << NEAR)
        for (int level = 1; level <= cmb_min(NEAR, top); level++)
            pool_blocks(build, blocks, level, a >> level, (a + (INT64_C(1) << NEAR)) >> level);
    for (int level = NEAR + 1; level <= top; level++)
        pool_blocks(build, blocks, level, first >> level, (end + (INT64_C(1) << level) - 1) >> level);
}

static void summarize_within(cmb_build *build, const dyadic *blocks, int top, int64_t first, int64_t end) {
    enum { LOW = 5 }; /* 32 keys hold 31 blocks of levels 1 to 5, of which a causal plan attends 16 */
    for (int64_t a = first; a < end; a += CMB_TILE) {
        for (int64_t half = a; half < cmb_min(a + CMB_TILE, end); half += CMB_TILE / 2)
            summarize_keys(build, blocks, 1, top < LOW ? top : LOW, half, CMB_TILE / 2);
        summarize_keys(build, blocks, LOW + 1, top, a, CMB_TILE);
    }
}

/* Whether the chunk is the last one of the level's block that holds it. */
static bool ends_with(const dyadic *blocks, int level, int64_t chunk) {
    return (chunk + 1) % (INT64_C(1) << (level - CHUNK_LEVEL)) == 0 || chunk == blocks->count[CHUNK_LEVEL] - 1;
}

/* The blocks of CHUNK_LEVEL, from their positions, and those of higher levels, from their halves. A chunk's task has
 * the blocks that end with the chunk, so that the waves of a causal plan are fusible. */
static void summarize_big_blocks(cmb_build *build, const dyadic *blocks) {
    const int64_t L = blocks->L, chunks = blocks->count[CHUNK_LEVEL], start = first_block(blocks, CHUNK_LEVEL);
    const int64_t pooled = build->past ? (L - 1) >> CHUNK_LEVEL : chunks;
    for (int level = CHUNK_LEVEL; level <= blocks->top; level++) {
        cmb_build_wave(build);
        for (int64_t c = start; c < pooled && cmb_build_task(build); c++) {
            int64_t b = c >> (level - CHUNK_LEVEL), first = b << level;
            if (level == CHUNK_LEVEL)
                cmb_build_pool(build, blocks->first[level] + b,
                               cmb_list_make(first, 1, cmb_min(INT64_C(1) << level, L - first)));
            else if (ends_with(blocks, level, c))
                pool_blocks(build, blocks, level, b, b + 1);
        }
    }
    cmb_build_wave(build);
    for (int64_t c = start; c < pooled && cmb_build_task(build); c++)
        for (int level = CHUNK_LEVEL; level <= blocks->top; level++) {
            int64_t b = c >> (level - CHUNK_LEVEL), first = b << level;
            if (!ends_with(blocks, level, c) || !is_attended(blocks, level, b))
                continue;
            cmb_build_tile(build, cmb_list_make(blocks->first[level] + b, 1, 1), 1);
            cmb_build_run(build, cmb_list_make(first, 1, cmb_min(INT64_C(1) << level, L - first)));
        }
}

/* Only queries of its own chunk attend a block below CHUNK_LEVEL. So one task pools, summarizes and attends a chunk's
 * blocks, while they are in the cache. */
static void build_flat(cmb_build *build, const dyadic *blocks, bool is_sparse) {
    int top = blocks->top < CHUNK_LEVEL ? blocks->top : CHUNK_LEVEL - 1;
    if (!is_sparse && blocks->top >= CHUNK_LEVEL)
        summarize_big_blocks(build, blocks);
    cmb_build_wave(build);
    const int64_t start = first_block(blocks, CHUNK_LEVEL) << CHUNK_LEVEL;
    for (int64_t first = start; first < blocks->L && cmb_build_task(build); first += INT64_C(1) << CHUNK_LEVEL) {
        int64_t end = cmb_min(first + (INT64_C(1) << CHUNK_LEVEL), blocks->L);
        if (!is_sparse && top > 0) {
            pool_within(build, blocks, top, first, end);
            summarize_within(build, blocks, top, first, end);
        }
        for (int64_t a = later(first, blocks->first_query); a < end; a += NARROW)
            attend_siblings(build, blocks, a, cmb_min(NARROW, end - a), is_sparse);
    }
}

/* A block's summary needs its halves' summaries: first those of the blocks inside a chunk of 2^CHUNK_LEVEL positions,
 * then a wave for each higher level, then the queries. A chunk's task has the blocks that end with the chunk. */
static void build_hierarchical(cmb_build *build, const dyadic *blocks) {
    const int top = blocks->top < CHUNK_LEVEL ? blocks->top : CHUNK_LEVEL;
    const int64_t L = blocks->L, chunk = INT64_C(1) << CHUNK_LEVEL, start = first_block(blocks, CHUNK_LEVEL);
    if (top > 0)
        cmb_build_wave(build);
    for (int64_t first = start * chunk; top > 0 && first < L && cmb_build_task(build); first += chunk) {
        pool_within(build, blocks, top, first, cmb_min(first + chunk, L));
        for (int level = 1; level <= top; level++)
            summarize_halves(build, blocks, level, first >> level, (first + chunk) >> level);
    }
    for (int level = top + 1; level <= blocks->top; level++) {
        cmb_build_wave(build);
        for (int64_t c = start; c * chunk < L && cmb_build_task(build); c++) {
            const int64_t b = c >> (level - CHUNK_LEVEL);
            if (!ends_with(blocks, level, c))
                continue;
            pool_blocks(build, blocks, level, b, b + 1);
            summarize_halves(build, blocks, level, b, b + 1);
        }
    }
    cmb_build_wave(build);
    for (int64_t first = start * chunk; first < L && cmb_build_task(build); first += chunk)
        for (int64_t a = later(first, blocks->first_query); a < cmb_min(first + chunk, L); a += NARROW)
            attend_siblings(build, blocks, a, cmb_min(NARROW, L - a), false);
}

cmb_status cmb_plan_logsparse(int64_t L, bool hierarchical, const cmb_plan_options *options, cmb_plan **plan,
                              cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = cmb_check_options(L, options, error);
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
    blocks.continued = build.first;
    blocks.first_query = build.first / NARROW * NARROW;
    if (hierarchical && !options->sparse)
        build_hierarchical(&build, &blocks);
    else
        build_flat(&build, &blocks, options->sparse);
    return cmb_build_end(&build, plan, error);
}

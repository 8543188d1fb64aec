// SPDX-License-Identifier: Apache-2.0
/* Tree (docs/mathematics.md, section 3): a node of level t is a block of branching^t positions, and its children are
 * the nodes of level t - 1 in it. Nodes with the same parent, or all nodes of the top level, are a family. A query
 * attends its own node of level 1 directly and, on every level, the rest of the family of its own node. Causal plans
 * keep the prefix rule of build.h.
 *
 * A task has a block of positions and the nodes that end in it, so that the waves of a causal plan are fusible and a
 * block is pooled, summarized and attended while it is in the cache. Tree(8), whose blocks have 256 positions:
 *
 *     wave 0      levels 1 and 2, whose nodes lie in one block
 *     wave 1, ..  level 3, and so on: one level each, since a node has children in earlier blocks
 *     last wave   the queries */
#include "plan/build.h"

enum {
    NARROW = 16,       /* queries of a tile if nodes of level 1 have no more: a wider tile would see many more rows */
    ROW_BRANCHING = 5, /* from this branching on, a node is summarized by a tile of its own, with the row kernel */
    BLOCK = 256,       /* the most positions of a block; it is whole nodes where they are smaller */
};

typedef struct {
    cmb_build *build;
    int64_t L, branching;
    int64_t block;
    int top;   /* the highest level with nodes that a query attends */
    int inner; /* the highest level whose nodes lie in one block each, or 0 */
    bool is_causal;
    int64_t first[32]; /* table row of a level's node 0; level 0 is the positions */
    int64_t count[32];
    int64_t size[32]; /* positions of a node */
} hierarchy;

/* The children of nodes [node, node + n). */
static cmb_list children(const hierarchy *tree, int level, int64_t node, int64_t n) {
    int64_t child = node * tree->branching;
    int64_t end = cmb_min(child + n * tree->branching, tree->count[level - 1]);
    return cmb_list_make(tree->first[level - 1] + child, 1, end - child);
}

/* The first block with a node or a query of this plan. A plan that this one continues has the blocks before. */
static int64_t first_block(const hierarchy *tree) {
    return tree->build->first > 0 ? (tree->build->first - 1) / tree->block : 0;
}

typedef struct {
    int64_t first, end;
} node_range;

/* The nodes of a level that end in block t. The last node ends with the sequence. */
static node_range nodes_ending_in(const hierarchy *tree, int level, int64_t t) {
    const int64_t size = tree->size[level], end = (t + 1) * tree->block;
    const int64_t first = t * tree->block / size, made = cmb_complete(tree->build->first, size, 1);
    return (node_range){first > made ? first : made, end < tree->L ? end / size : tree->count[level]};
}

/* A causal plan needs the nodes before its last query, which attends them or a node that holds them. A bidirectional
 * plan needs every node. */
static int64_t needed_nodes(const hierarchy *tree, int level) {
    return tree->is_causal ? (tree->L - 1) / tree->size[level] : tree->count[level];
}

static void pool_nodes(const hierarchy *tree, int level, node_range nodes) {
    const bool is_whole = !tree->build->past; /* then all members are on record */
    const int64_t end = is_whole ? nodes.end : cmb_min(nodes.end, needed_nodes(tree, level));
    for (int64_t node = nodes.first; node < end; node++)
        cmb_build_pool(tree->build, tree->first[level] + node, children(tree, level, node, 1));
}

static void summarize_nodes(const hierarchy *tree, int level, node_range nodes) {
    enum { NODES = 16 };
    const int64_t most = tree->branching < ROW_BRANCHING ? NODES : 1;
    const int64_t end = cmb_min(nodes.end, needed_nodes(tree, level));
    uint64_t mask[NODES * ROW_BRANCHING];
    for (int64_t node = nodes.first; node < end; node += most) {
        const int64_t n = cmb_min(most, end - node);
        const cmb_list row = children(tree, level, node, n);
        cmb_build_tile(tree->build, cmb_list_make(tree->first[level] + node, 1, n), most > 1 ? cmb_tile_width(n) : 1);
        for (int64_t k = 0; most > 1 && k < row.count; k++)
            mask[k] = cmb_lane_mask(k / tree->branching, k / tree->branching + 1);
        if (most > 1)
            cmb_build_masked_run(tree->build, row, mask);
        else
            cmb_build_run(tree->build, row);
    }
}

/* A wave: in the task of each block the nodes of levels [low, high] that end in it. */
static void summarize_levels(const hierarchy *tree, int low, int high) {
    cmb_build_wave(tree->build);
    for (int64_t t = first_block(tree); t * tree->block < tree->L && cmb_build_task(tree->build); t++) {
        for (int level = low; level <= high; level++)
            pool_nodes(tree, level, nodes_ending_in(tree, level, t));
        for (int level = low; level <= high; level++)
            summarize_nodes(tree, level, nodes_ending_in(tree, level, t));
    }
}

/* The node's family: nodes [first, end) of its level. */
static int64_t family_first(const hierarchy *tree, int level, int64_t node) {
    return level == tree->top ? 0 : node / tree->branching * tree->branching;
}

static int64_t family_end(const hierarchy *tree, int level, int64_t node) {
    int64_t end = tree->count[level];
    return level == tree->top ? end : cmb_min(family_first(tree, level, node) + tree->branching, end);
}

/* The lanes of a tile of queries [a, a + n) whose positions lie in [first, end). */
static uint64_t lanes_in(int64_t a, int64_t n, int64_t first, int64_t end) {
    return cmb_lane_mask(first - a, cmb_min(end - a, n));
}

/* The rows, for these lanes of a tile of n queries. */
static void attend_for(const hierarchy *tree, cmb_list row, uint64_t lanes, int64_t n) {
    uint64_t mask[CMB_TILE];
    if (lanes == cmb_lane_mask(0, n)) {
        cmb_build_run(tree->build, row);
        return;
    }
    CMB_ASSERT(row.count <= CMB_TILE); /* a tile with two families holds whole nodes of level 1 */
    for (int64_t k = 0; k < row.count; k++)
        mask[k] = lanes;
    cmb_build_masked_run(tree->build, row, mask);
}

/* On one level, the nodes before the first query's node, in its family: for the lanes of that family. */
static void attend_before(const hierarchy *tree, int level, int64_t a, int64_t n) {
    int64_t own = a / tree->size[level], first = family_first(tree, level, own), end = family_end(tree, level, own);
    cmb_list row = cmb_list_make(tree->first[level] + first, 1, own - first);
    attend_for(tree, row, lanes_in(a, n, a, end * tree->size[level]), n);
}

/* On one level of a bidirectional plan, the nodes that hold a query of the tile: for the other lanes of their family.
 */
static void attend_within(const hierarchy *tree, int level, int64_t a, int64_t n) {
    int64_t size = tree->size[level], last = (a + n - 1) / size, rows = 0;
    int32_t row[CMB_TILE];
    uint64_t mask[CMB_TILE];
    for (int64_t node = a / size; node <= last; node++) {
        uint64_t family = lanes_in(a, n, family_first(tree, level, node) * size, family_end(tree, level, node) * size);
        uint64_t others = family & ~lanes_in(a, n, node * size, (node + 1) * size);
        if (others) {
            row[rows] = (int32_t)(tree->first[level] + node);
            mask[rows++] = others;
        }
    }
    cmb_build_masked_run(tree->build, cmb_build_list(tree->build, row, rows), mask);
}

/* On one level, the nodes after the last query's node, in its family: for the lanes of that family. */
static void attend_after(const hierarchy *tree, int level, int64_t a, int64_t n) {
    int64_t own = (a + n - 1) / tree->size[level];
    int64_t first = family_first(tree, level, own), end = family_end(tree, level, own);
    cmb_list row = cmb_list_make(tree->first[level] + own + 1, 1, end - own - 1);
    attend_for(tree, row, lanes_in(a, n, first * tree->size[level], a + n), n);
}

/* Causal: the tile's own positions in order and, behind the last position of a node, the node, which later lanes of its
 * family attend. */
static void attend_in_turn(const hierarchy *tree, int64_t a, int64_t n) {
    int64_t rows = 0;
    int32_t row[2 * CMB_TILE];
    uint64_t mask[2 * CMB_TILE];
    for (int64_t j = a; j < a + n; j++) {
        row[rows] = (int32_t)j;
        mask[rows++] = lanes_in(a, n, j, (j / tree->branching + 1) * tree->branching);
        for (int level = 1; level <= tree->top && (j + 1) % tree->size[level] == 0; level++) {
            int64_t node = j / tree->size[level];
            uint64_t later = lanes_in(a, n, j + 1, family_end(tree, level, node) * tree->size[level]);
            if (!later)
                continue;
            row[rows] = (int32_t)(tree->first[level] + node);
            mask[rows++] = later;
        }
    }
    cmb_build_masked_run(tree->build, cmb_build_list(tree->build, row, rows), mask);
}

static void attend(const hierarchy *tree, int64_t a, int64_t n) {
    int64_t b = tree->branching, first = a / b * b;
    cmb_build_tile(tree->build, cmb_list_make(a, 1, n), cmb_tile_width(n));
    for (int level = tree->top; level > 0; level--)
        attend_before(tree, level, a, n);
    if (tree->is_causal) {
        cmb_build_run(tree->build, cmb_list_make(first, 1, a - first));
        attend_in_turn(tree, a, n);
        return;
    }
    for (int level = tree->top; level > 0; level--) {
        attend_after(tree, level, a, n);
        attend_within(tree, level, a, n);
    }
    if (b >= n) { /* one node */
        cmb_build_run(tree->build, cmb_list_make(first, 1, cmb_min(b, tree->L - first)));
        return;
    }
    uint64_t mask[CMB_TILE];
    for (int64_t t = 0; t < n; t++)
        mask[t] = lanes_in(a, n, (a + t) / b * b, ((a + t) / b + 1) * b);
    cmb_build_masked_run(tree->build, cmb_list_make(a, 1, n), mask);
}

/* A tile holds whole nodes of level 1, or lies in one. It is in the task of the block in which it ends. */
static void attend_all(const hierarchy *tree) {
    const int64_t b = tree->branching, start = tree->build->first, leaf = b > CMB_TILE ? start / b * b : 0;
    const int64_t width = b <= NARROW ? NARROW / b * b : b <= CMB_TILE ? CMB_TILE / b * b : CMB_TILE;
    int64_t block = first_block(tree) - 1;
    cmb_build_wave(tree->build);
    for (int64_t a = leaf + (start - leaf) / width * width, end; a < tree->L; a = end) {
        end = cmb_min(b > CMB_TILE ? cmb_min(a + width, (a / b + 1) * b) : a + width, tree->L);
        for (; block < (end - 1) / tree->block; block++)
            if (!cmb_build_task(tree->build))
                return;
        attend(tree, a, end - a);
    }
}

cmb_status cmb_plan_tree(int64_t L, int64_t branching, int64_t levels, const cmb_plan_options *options, cmb_plan **plan,
                         cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = cmb_check_options(L, options, error);
    if (status)
        return status;
    if (branching < 2)
        return cmb_fail(error, CMB_ERR_VALUE, "branching must be at least 2, got %lld", (long long)branching);
    if (levels < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "levels must be at least 1, or 0 for all, got %lld", (long long)levels);
    hierarchy tree = {.build = &build, .L = L, .is_causal = options->is_causal, .count = {L}, .size = {1}};
    int64_t b = tree.branching = cmb_min(branching, L < 2 ? 2 : L), rows = L;
    for (int t = 1; (levels == 0 || t <= levels) && tree.size[t - 1] * b < L; t++) {
        tree.top = t;
        tree.size[t] = tree.size[t - 1] * b;
        tree.first[t] = rows;
        tree.count[t] = (tree.count[t - 1] + b - 1) / b;
        rows += tree.count[t];
    }
    status = cmb_build_begin(&build, L, options->sparse ? 0 : rows - L, 0, options, error);
    if (status)
        return status;
    if (options->sparse)
        tree.top = 0;
    tree.block = BLOCK;
    for (int level = 1; level <= tree.top && tree.size[level] <= BLOCK; level++) {
        tree.block = BLOCK / tree.size[level] * tree.size[level];
        tree.inner = level;
    }
    if (tree.inner > 0)
        summarize_levels(&tree, 1, tree.inner);
    for (int level = tree.inner + 1; level <= tree.top; level++)
        summarize_levels(&tree, level, level);
    attend_all(&tree);
    return cmb_build_end(&build, plan, error);
}

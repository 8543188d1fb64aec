// SPDX-License-Identifier: Apache-2.0
/* Tree (spec: "Factorizations"): nodes of level t are blocks of branching^t positions, and a query attends the siblings
 * of the nodes that hold it. Tiles of a causal plan keep the rules that patterns.c states. */
#include "plan.h"
#include "runtime.h"

enum {
    NARROW = 16,        /* queries of a tile of nodes of up to so many: more would see many more rows */
    ROW_BRANCHING = 5,  /* from so many children on a node is summarized by itself */
    TASK_NODES = 64,    /* nodes, */
    TASK_QUERIES = 512, /* or queries, of a task */
};

typedef struct {
    cmb_build *build;
    int64_t L, branching;
    int top; /* the highest level of nodes that some query attends */
    bool is_causal;
    int64_t first[32]; /* table row of a level's node 0; level 0 are the positions */
    int64_t count[32];
    int64_t size[32]; /* positions of a node */
} hierarchy;

/* The children of nodes [node, node + n). */
static cmb_list children(const hierarchy *tree, int level, int64_t node, int64_t n) {
    int64_t child = node * tree->branching;
    int64_t end = cmb_least(child + n * tree->branching, tree->count[level - 1]);
    return cmb_list_make(tree->first[level - 1] + child, 1, end - child);
}

/* A causal plan's last query attends all nodes before it, or what holds them; a bidirectional plan needs every node. */
static void summarize_level(const hierarchy *tree, int level) {
    enum { NODES = 16 };
    int64_t needed = tree->is_causal ? (tree->L - 1) / tree->size[level] : tree->count[level];
    int64_t nodes = tree->branching < ROW_BRANCHING ? NODES : 1;
    uint64_t mask[NODES * ROW_BRANCHING];
    cmb_build_wave(tree->build);
    for (int64_t x = 0; x < tree->count[level]; x += TASK_NODES) {
        if (!cmb_build_task(tree->build))
            return;
        int64_t end = cmb_least(x + TASK_NODES, tree->count[level]);
        for (int64_t node = x; node < end; node++)
            cmb_build_pool(tree->build, tree->first[level] + node, children(tree, level, node, 1));
        end = cmb_least(end, needed);
        for (int64_t node = x; node < end; node += nodes) {
            int64_t n = cmb_least(nodes, end - node);
            cmb_list row = children(tree, level, node, n);
            cmb_build_tile(tree->build, cmb_list_make(tree->first[level] + node, 1, n),
                           nodes > 1 ? cmb_lanes_for(n) : 1);
            for (int64_t k = 0; nodes > 1 && k < row.count; k++)
                mask[k] = cmb_lanes(k / tree->branching, k / tree->branching + 1);
            if (nodes > 1)
                cmb_build_masked_run(tree->build, row, mask);
            else
                cmb_build_run(tree->build, row);
        }
    }
}

/* The first node of those that lie with `node` in one node of the next level, or on the highest level of all, and the
 * end of them. */
static int64_t family_first(const hierarchy *tree, int level, int64_t node) {
    return level == tree->top ? 0 : node / tree->branching * tree->branching;
}

static int64_t family_end(const hierarchy *tree, int level, int64_t node) {
    int64_t end = tree->count[level];
    return level == tree->top ? end : cmb_least(family_first(tree, level, node) + tree->branching, end);
}

/* Lanes of [a, a + n) in positions [first, end). */
static uint64_t lanes_in(int64_t a, int64_t n, int64_t first, int64_t end) {
    return cmb_lanes(first - a, cmb_least(end - a, n));
}

/* Of one level the nodes that begin before the tile's queries, whose first node is `own`, and are over by then: they
 * are the first of its family. */
static void attend_before(const hierarchy *tree, int level, int64_t a, int64_t n) {
    int64_t own = a / tree->size[level], first = family_first(tree, level, own), end = family_end(tree, level, own);
    cmb_list row = cmb_list_make(tree->first[level] + first, 1, own - first);
    uint64_t mask[CMB_TILE], lanes = lanes_in(a, n, a, end * tree->size[level]);
    if (lanes == cmb_lanes(0, n)) {
        cmb_build_run(tree->build, row);
        return;
    }
    for (int64_t k = 0; k < row.count; k++)
        mask[k] = lanes;
    cmb_build_masked_run(tree->build, row, mask);
}

/* Of one level the nodes with a query of the tile, for the others of their family, and unless they come before. */
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

/* And those behind the tile's queries. */
static void attend_behind(const hierarchy *tree, int level, int64_t a, int64_t n) {
    int64_t own = (a + n - 1) / tree->size[level];
    int64_t first = family_first(tree, level, own), end = family_end(tree, level, own);
    cmb_list row = cmb_list_make(tree->first[level] + own + 1, 1, end - own - 1);
    uint64_t mask[CMB_TILE], lanes = lanes_in(a, n, first * tree->size[level], a + n);
    if (lanes == cmb_lanes(0, n)) {
        cmb_build_run(tree->build, row);
        return;
    }
    for (int64_t k = 0; k < row.count; k++)
        mask[k] = lanes;
    cmb_build_masked_run(tree->build, row, mask);
}

/* Causal: the tile's own positions in turn, behind each of them the nodes that it ends, as later queries see them. */
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
    cmb_build_tile(tree->build, cmb_list_make(a, 1, n), cmb_lanes_for(n));
    for (int level = tree->top; level > 0; level--)
        attend_before(tree, level, a, n);
    if (tree->is_causal) {
        cmb_build_run(tree->build, cmb_list_make(first, 1, a - first));
        attend_in_turn(tree, a, n);
        return;
    }
    for (int level = tree->top; level > 0; level--) {
        attend_behind(tree, level, a, n);
        attend_within(tree, level, a, n);
    }
    if (b >= n) { /* one node */
        cmb_build_run(tree->build, cmb_list_make(first, 1, cmb_least(b, tree->L - first)));
        return;
    }
    uint64_t mask[CMB_TILE];
    for (int64_t t = 0; t < n; t++)
        mask[t] = lanes_in(a, n, (a + t) / b * b, ((a + t) / b + 1) * b);
    cmb_build_masked_run(tree->build, cmb_list_make(a, 1, n), mask);
}

cmb_status cmb_plan_tree(int64_t L, int64_t branching, int64_t levels, const cmb_plan_options *options, cmb_plan **plan,
                         cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = cmb_check_length(L, error);
    if (status)
        return status;
    if (branching < 2)
        return cmb_fail(error, CMB_ERR_VALUE, "branching must be at least 2, got %lld", (long long)branching);
    if (levels < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "levels must be at least 1, or 0 for all, got %lld", (long long)levels);
    hierarchy tree = {.build = &build, .L = L, .is_causal = options->is_causal, .count = {L}, .size = {1}};
    int64_t b = tree.branching = cmb_least(branching, L < 2 ? 2 : L), rows = L;
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
    for (int level = 1; level <= tree.top; level++)
        summarize_level(&tree, level);
    /* A tile holds whole nodes of level 1, or lies in one. */
    int64_t width = b <= NARROW ? NARROW / b * b : b <= CMB_TILE ? CMB_TILE / b * b : CMB_TILE, task = -1;
    cmb_build_wave(&build);
    for (int64_t a = 0; a < L;) {
        if (a / TASK_QUERIES != task && !cmb_build_task(&build))
            break;
        task = a / TASK_QUERIES;
        int64_t end = b > CMB_TILE ? cmb_least(a + width, (a / b + 1) * b) : a + width;
        attend(&tree, a, cmb_least(end, L) - a);
        a = end;
    }
    return cmb_build_end(&build, plan, error);
}

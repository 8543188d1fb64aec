// SPDX-License-Identifier: Apache-2.0
/* For the tests of plans: lists of lists; what a plan says; and the factorizations as docs/mathematics.md defines them
 * (section 3), written here a second time without any thought of tiles. */
#ifndef CMB_FACTORIZATIONS_H
#define CMB_FACTORIZATIONS_H

#include "random.h"
#include "testlib.h"

/* ---- lists of lists ---- */

typedef struct {
    int64_t *item;
    int64_t count, capacity;
} vector;

static inline void push(vector *to, int64_t item) {
    if (to->count == to->capacity) {
        to->capacity = to->capacity ? 2 * to->capacity : 8;
        to->item = realloc(to->item, (size_t)to->capacity * sizeof *to->item);
        CHECK(to->item);
    }
    to->item[to->count++] = item;
}

static inline vector *make_lists(int64_t count) {
    vector *lists = calloc((size_t)count + 1, sizeof *lists);
    CHECK(lists);
    return lists;
}

static inline void free_lists(vector *lists, int64_t count) {
    for (int64_t n = 0; n < count; n++)
        free(lists[n].item);
    free(lists);
}

static inline int compare(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static inline void sort(vector *list) {
    if (list->count)
        qsort(list->item, (size_t)list->count, sizeof *list->item, compare);
}

static inline bool are_equal(const vector *a, const vector *b) {
    return a->count == b->count && (!a->count || memcmp(a->item, b->item, (size_t)a->count * sizeof *a->item) == 0);
}

/* ---- what a plan says ---- */

static inline int64_t row_at(const cmb_plan *plan, cmb_list list, int64_t n) {
    return list.step ? list.start + list.step * n : plan->index[list.start + n];
}

/* Rows that each query row attends, tile after tile in the plan's order. */
static inline vector *attended_rows(const cmb_plan *plan) {
    vector *rows = make_lists(plan->L + plan->R);
    for (int32_t tile = 0; tile < plan->tiles; tile++) {
        const cmb_list query = plan->tile[tile].query;
        for (int32_t n = plan->tile[tile].run; n < plan->tile[tile + 1].run; n++) {
            const cmb_run *run = plan->run + n;
            for (int32_t k = 0; k < run->row.count; k++)
                for (int32_t t = 0; t < query.count; t++)
                    if (run->mask < 0 || plan->mask[run->mask + k] >> t & 1)
                        push(&rows[row_at(plan, query, t)], row_at(plan, run->row, k));
        }
    }
    return rows;
}

/* Positions below each region, in the order in which its pool meets them. */
static inline vector *pooled_positions(const cmb_plan *plan) {
    vector *below = make_lists(plan->R + plan->N);
    for (int32_t n = 0; n < plan->pools; n++) {
        const cmb_pool *pool = plan->pool + n;
        below[pool->row - plan->L].count = 0; /* a scratch row may be written again */
        for (int32_t k = 0; k < pool->child.count; k++) {
            const int64_t child = row_at(plan, pool->child, k);
            vector *to = &below[pool->row - plan->L];
            if (child < plan->L)
                push(to, child);
            else
                for (int64_t m = 0; m < below[child - plan->L].count; m++)
                    push(to, below[child - plan->L].item[m]);
        }
    }
    return below;
}

/* ---- what the specification says ---- */

typedef enum {
    DENSE,
    FIXED,
    LOGSPARSE,
    HIERARCHICAL,
    TREE, /* span: the branching; as many levels as there are */
    TREE2,
    VERTICAL, /* span: the width */
    HORIZONTAL,
    ROWMAJOR,
    MIXTURE,
    ROUTING,      /* span: how many clusters, drawn anew for each position but the same in every length */
    WINDOW,       /* span: the size */
    FIXED_WINDOW, /* span: of Fixed; the window is window_of */
    HEAVY,        /* HeavilyCompressed; span: the rate; the window is window_of */
    KINDS,
} kind;

typedef struct {
    kind kind;
    int64_t L, span;
    bool is_causal, is_sparse;
} factorization;

typedef struct {
    vector *query;      /* [L] rows, ascending */
    vector *member;     /* [capacity] rows, ascending, where the region is summarized */
    vector *below;      /* [capacity] positions in the order in which they are pooled */
    int64_t (*span)[3]; /* [capacity] first position, end, level; end 0: not a span, and its members are those below */
    int64_t R, capacity;
} specified;

static inline int64_t cluster_of(const factorization *f, int64_t i) {
    const uint64_t hash = (uint64_t)(i + 1) * UINT64_C(0x9e3779b97f4a7c15);
    return (int64_t)((hash >> 33) % (uint64_t)(f->span < f->L ? f->span : f->L));
}

/* Below, at and above the span. */
static inline int64_t window_of(const factorization *f) {
    return f->kind != FIXED_WINDOW && f->kind != HEAVY ? 1 : 2 + (f->span < 1000 ? f->span * f->span : 1) % 139;
}

static inline void specify_fixed(const factorization *f, specified *s) {
    const int64_t L = f->L, c = f->span, w = window_of(f);
    for (int64_t first = 0; !f->is_sparse && first < L; first += c, s->R++) {
        s->span[s->R][0] = first;
        s->span[s->R][1] = first + c < L ? first + c : L;
    }
    for (int64_t i = 0; i < L; i++) {
        const int64_t first = i < w ? 0 : (i - w + 1) / c; /* the spans that the window meets */
        const int64_t last = f->is_causal ? i / c : (i > L - w ? L - 1 : i + w - 1) / c;
        for (int64_t j = 0; j < (f->is_causal ? i + 1 : L); j++)
            if ((j / c >= first && j / c <= last) || (f->is_sparse && j % c == c - 1))
                push(&s->query[i], j);
        for (int64_t t = 0; t < s->R; t++)
            if (t < first || (t > last && !f->is_causal))
                push(&s->query[i], L + t);
    }
}

static inline void specify_logsparse(const factorization *f, specified *s) {
    const int64_t L = f->L;
    int64_t base[40] = {0};
    for (int l = 1; INT64_C(1) << l < L; l++) {
        base[l] = L + s->R;
        for (int64_t b = 0; !f->is_sparse && b << l < L; b++, s->R++) {
            s->span[s->R][0] = b << l;
            s->span[s->R][1] = (b + 1) << l < L ? (b + 1) << l : L;
            s->span[s->R][2] = l;
        }
    }
    for (int64_t i = 0; i < L; i++) {
        push(&s->query[i], i);
        for (int l = 0; INT64_C(1) << l < L; l++) {
            const bool is_left = i >> l & 1;
            const int64_t block = (i >> l) ^ 1;
            if (block << l >= L || (!is_left && f->is_causal))
                continue;
            if (l == 0)
                push(&s->query[i], i ^ 1);
            else if (f->is_sparse)
                push(&s->query[i], is_left ? ((block + 1) << l) - 1 : block << l);
            else
                push(&s->query[i], base[l] + block);
        }
        sort(&s->query[i]);
    }
}

static inline void specify_tree(const factorization *f, specified *s) {
    const int64_t L = f->L, b = f->span, levels = f->kind == TREE ? 64 : 2;
    int64_t base[40] = {0}, size[41] = {1, b}, top = 0;
    for (int64_t t = 1; t <= levels && size[t] < L; t++) {
        top = t;
        base[t] = L + s->R;
        size[t + 1] = size[t] * b;
        for (int64_t first = 0; !f->is_sparse && first < L; first += size[t], s->R++) {
            s->span[s->R][0] = first;
            s->span[s->R][1] = first + size[t] < L ? first + size[t] : L;
            s->span[s->R][2] = t;
        }
    }
    for (int64_t i = 0; i < L; i++) {
        for (int64_t j = 0; j < (f->is_causal ? i + 1 : L); j++)
            if (j / b == i / b)
                push(&s->query[i], j);
        for (int64_t t = 1; t <= top && !f->is_sparse; t++)
            for (int64_t x = 0; x * size[t] < L; x++)
                if ((t == top || x / b == i / size[t + 1]) && (x < i / size[t] || (x > i / size[t] && !f->is_causal)))
                    push(&s->query[i], base[t] + x);
        sort(&s->query[i]);
    }
}

static inline void push_region(specified *s, vector below) { s->below[s->R++] = below; }

static inline vector part_of(const factorization *f, int64_t row, int64_t column, int64_t from, int64_t to) {
    vector part = {0};
    for (int64_t j = from < 0 ? 0 : from; j < to && j < f->L; j++)
        if ((row < 0 || j / f->span == row) && (column < 0 || j % f->span == column))
            push(&part, j);
    return part;
}

static inline void specify_axial(const factorization *f, specified *s) {
    const int64_t L = f->L, m = f->span, n = (L + m - 1) / m;
    const bool is_mixture = f->kind == MIXTURE, is_whole = !f->is_causal;
    int64_t down = 0, left = 0, right = 0;
    for (int64_t t = 0; t < L && !f->is_sparse && (is_mixture || f->kind == VERTICAL); t++)
        push_region(s, part_of(f, -1, t % m, 0, t + 1));
    down = s->R;
    for (int64_t t = 0; t < L && !f->is_sparse && is_whole && (is_mixture || f->kind == VERTICAL); t++)
        push_region(s, part_of(f, -1, t % m, t, L));
    left = s->R;
    for (int64_t x = 0; x < n * m && !f->is_sparse && (is_mixture || f->kind == HORIZONTAL); x++) {
        vector part = part_of(f, x / m, -1, 0, x);
        for (int64_t j = x + 1; f->kind == HORIZONTAL && j < L && j / m == x / m; j++)
            push(&part, j);
        push_region(s, part);
    }
    right = s->R;
    for (int64_t x = 0; x < n * m && !f->is_sparse && is_mixture; x++)
        push_region(s, part_of(f, x / m, -1, x + 1, L));
    for (int64_t t = 0; t < L && !f->is_sparse && f->kind == ROWMAJOR; t++) {
        vector part = {0};
        for (int64_t j = t; j >= 0 && j / m == t / m; j--)
            push(&part, j);
        for (int64_t j = t + 1; j < L && j / m == t / m; j++)
            push(&part, j);
        push_region(s, part);
    }
    for (int64_t i = 0; i < L; i++) {
        const int64_t r = i / m, c = i % m;
        const bool only_row = f->kind == ROWMAJOR && !f->is_sparse;
        for (int64_t j = 0; j < (is_whole ? L : i + 1); j++)
            if (j / m == r || (j % m == c && !only_row))
                push(&s->query[i], j);
        if (f->is_sparse)
            continue;
        for (int64_t t = 0; t < L && (is_mixture || f->kind == VERTICAL); t++) {
            if (t % m != c && t / m == r - 1)
                push(&s->query[i], L + t);
            if (t % m != c && t / m == r + 1 && is_whole)
                push(&s->query[i], L + down + t);
        }
        for (int64_t row = 0; row < n; row++) {
            if (row == r || (row > r && !is_whole))
                continue;
            const int64_t x = row * m + c;
            if (f->kind == ROWMAJOR)
                push(&s->query[i], L + (x < L ? x : L - 1));
            if ((f->kind == HORIZONTAL || is_mixture) && s->below[left + x].count)
                push(&s->query[i], L + left + x);
            if (is_mixture && s->below[right + x].count)
                push(&s->query[i], L + right + x);
        }
        sort(&s->query[i]);
    }
}

static inline void specify_routing(const factorization *f, specified *s) {
    const int64_t L = f->L;
    int64_t C = 0;
    for (int64_t i = 0; i < L; i++)
        C = cluster_of(f, i) >= C ? cluster_of(f, i) + 1 : C;
    for (int64_t r = 0; r < (f->is_causal ? L : C) && !f->is_sparse; r++) {
        vector part = {0};
        for (int64_t j = 0; j < (f->is_causal ? r + 1 : L); j++)
            if (cluster_of(f, j) == (f->is_causal ? cluster_of(f, r) : r))
                push(&part, j);
        push_region(s, part);
    }
    for (int64_t i = 0; i < L; i++) {
        for (int64_t j = 0; j < (f->is_causal ? i + 1 : L); j++)
            if (cluster_of(f, j) == cluster_of(f, i))
                push(&s->query[i], j);
        for (int64_t c = 0; c < C && !f->is_sparse; c++) {
            int64_t last = -1;
            for (int64_t j = 0; j < (f->is_causal ? i : L); j++)
                last = cluster_of(f, j) == c ? j : last;
            if (c != cluster_of(f, i) && last >= 0)
                push(&s->query[i], L + (f->is_causal ? last : c));
        }
        sort(&s->query[i]);
    }
}

static inline void specify_window(const factorization *f, specified *s) {
    for (int64_t i = 0; i < f->L; i++)
        for (int64_t j = 0; j < f->L; j++)
            if (j <= i ? i - j < f->span : !f->is_causal && j - i < f->span)
                push(&s->query[i], j);
}

static inline void specify_heavily_compressed(const factorization *f, specified *s) {
    const int64_t L = f->L;
    specify_window(&(factorization){WINDOW, L, window_of(f), f->is_causal, f->is_sparse}, s);
    for (int64_t first = 0; !f->is_sparse && first < L; first += f->span, s->R++) {
        s->span[s->R][0] = first;
        s->span[s->R][1] = first + f->span < L ? first + f->span : L;
        for (int64_t i = f->is_causal ? first + f->span - 1 : 0; i < L; i++)
            push(&s->query[i], L + s->R);
    }
}

static inline specified specify(const factorization *f) {
    const int64_t L = f->L, capacity = f->kind < VERTICAL ? 2 * L : 4 * L + 2 * f->span;
    specified s = {.query = make_lists(L),
                   .member = make_lists(capacity),
                   .below = make_lists(capacity),
                   .span = calloc((size_t)capacity + 1, 24),
                   .capacity = capacity};
    CHECK(s.span);
    if (f->kind == WINDOW)
        specify_window(f, &s);
    else if (f->kind == FIXED_WINDOW)
        specify_fixed(f, &s);
    else if (f->kind == HEAVY)
        specify_heavily_compressed(f, &s);
    else if (f->kind == ROUTING)
        specify_routing(f, &s);
    else if (f->kind >= VERTICAL)
        specify_axial(f, &s);
    else if (f->kind == TREE || f->kind == TREE2)
        specify_tree(f, &s);
    else if (f->kind == LOGSPARSE || f->kind == HIERARCHICAL)
        specify_logsparse(f, &s);
    else
        specify_fixed(&(factorization){f->kind, L, f->kind == DENSE ? L + 1 : f->span, f->is_causal,
                                       f->is_sparse || f->kind == DENSE},
                      &s);
    bool *needed = calloc((size_t)s.R + 1, 1);
    CHECK(needed);
    for (int64_t i = 0; i < L; i++)
        for (int64_t n = 0; n < s.query[i].count; n++)
            if (s.query[i].item[n] >= L)
                needed[s.query[i].item[n] - L] = true;
    for (int64_t r = s.R - 1; r >= 0; r--) {
        const int64_t *span = s.span[r];
        const bool has_halves = (f->kind == HIERARCHICAL || f->kind == TREE || f->kind == TREE2) && span[2] > 1;
        for (int64_t j = span[0]; j < span[1]; j++)
            push(&s.below[r], j);
        if (!span[1] && needed[r]) {
            for (int64_t k = 0; k < s.below[r].count; k++)
                push(&s.member[r], s.below[r].item[k]);
            sort(&s.member[r]);
        }
        for (int64_t j = span[0]; needed[r] && !has_halves && j < span[1]; j++)
            push(&s.member[r], j);
        for (int64_t child = 0; needed[r] && has_halves && child < r; child++) {
            const int64_t *part = s.span[child];
            if (part[2] == span[2] - 1 && part[0] >= span[0] && part[1] <= span[1])
                push(&s.member[r], L + child);
        }
        for (int64_t n = 0; n < s.member[r].count; n++)
            if (s.member[r].item[n] >= L)
                needed[s.member[r].item[n] - L] = true;
    }
    free(needed);
    return s;
}

static inline void forget(specified *s, int64_t L) {
    free_lists(s->query, L);
    free_lists(s->member, s->capacity);
    free_lists(s->below, s->capacity);
    free(s->span);
}

static inline cmb_status build(const factorization *f, cmb_plan **plan, cmb_error *error) {
    const cmb_plan_options options = {.is_causal = f->is_causal, .sparse = f->is_sparse};
    switch (f->kind) {
    case DENSE:
        return cmb_plan_dense(f->L, &options, plan, error);
    case FIXED:
        return cmb_plan_fixed(f->L, f->span, 1, &options, plan, error);
    case LOGSPARSE:
    case HIERARCHICAL:
        return cmb_plan_logsparse(f->L, f->kind == HIERARCHICAL, &options, plan, error);
    case TREE:
    case TREE2:
        return cmb_plan_tree(f->L, f->span, f->kind == TREE ? 0 : 2, &options, plan, error);
    case MIXTURE:
        return cmb_plan_axial_mixture(f->L, f->span, &options, plan, error);
    case FIXED_WINDOW:
        return cmb_plan_fixed(f->L, f->span, window_of(f), &options, plan, error);
    case WINDOW:
        return cmb_plan_window(f->L, f->span, &options, plan, error);
    case HEAVY:
        return cmb_plan_heavily_compressed(f->L, f->span, window_of(f), &options, plan, error);
    case ROUTING: {
        int64_t *cluster = calloc((size_t)f->L + 1, sizeof *cluster);
        CHECK(cluster);
        for (int64_t i = 0; i < f->L; i++)
            cluster[i] = cluster_of(f, i);
        const cmb_status status = cmb_plan_routing(f->L, cluster, &options, plan, error);
        free(cluster);
        return status;
    }
    default:
        return cmb_plan_axial(f->L, f->span, (cmb_axial_order)(f->kind - VERTICAL), false, &options, plan, error);
    }
}

static inline cmb_plan *make(const factorization *f) {
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    const cmb_status status = build(f, &plan, &error);
    CHECK(status == CMB_OK, "%s", error.message);
    return plan;
}

/* Every allocation in turn, alone and with all after it. */
static inline void fail_each_allocation(cmb_status (*run)(void *context), void *context) {
    for (int forever = 0; forever < 2; forever++)
        for (int64_t k = 1;; k++) {
            test_heap heap = {.fail = k, .forever = forever};
            test_heap_use(&heap);
            const cmb_status status = run(context);
            CHECK(heap.live == 0, "%lld bytes kept after allocation %lld failed", (long long)heap.live, (long long)k);
            test_heap_use(NULL);
            if (heap.calls < k) {
                CHECK(status == CMB_OK);
                break;
            }
            CHECK(status == CMB_ERR_MEMORY);
        }
}

static inline void expect(cmb_status status, cmb_status expected, const cmb_plan *plan, const cmb_error *error,
                          const char *message) {
    CHECK(status == expected && error->status == expected, "%d: %s", (int)status, error->message);
    CHECK(!plan);
    CHECK(strcmp(error->message, message) == 0, "\"%s\", not \"%s\"", error->message, message);
}

#endif

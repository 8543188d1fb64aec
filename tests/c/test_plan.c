// SPDX-License-Identifier: Apache-2.0
/* Plans against the table of factorizations in the specification, written here a second time without any thought of
 * tiles; the check against damaged plans; every allocation failing in turn. */
#include "testlib.h"

/* ---- lists of lists ---- */

typedef struct {
    int64_t *item;
    int64_t count, capacity;
} vector;

static void push(vector *to, int64_t item) {
    if (to->count == to->capacity) {
        to->capacity = to->capacity ? 2 * to->capacity : 8;
        to->item = realloc(to->item, (size_t)to->capacity * sizeof *to->item);
        CHECK(to->item);
    }
    to->item[to->count++] = item;
}

static vector *make_lists(int64_t count) {
    vector *lists = calloc((size_t)count + 1, sizeof *lists);
    CHECK(lists);
    return lists;
}

static void free_lists(vector *lists, int64_t count) {
    for (int64_t n = 0; n < count; n++)
        free(lists[n].item);
    free(lists);
}

static int compare(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void sort(vector *list) {
    if (list->count)
        qsort(list->item, (size_t)list->count, sizeof *list->item, compare);
}

static bool are_equal(const vector *a, const vector *b) {
    return a->count == b->count && (!a->count || memcmp(a->item, b->item, (size_t)a->count * sizeof *a->item) == 0);
}

static uint64_t random_state = 1;

static int64_t random_below(int64_t end) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (int64_t)(random_state % (uint64_t)end);
}

/* ---- what a plan says ---- */

static int64_t row_at(const cmb_plan *plan, cmb_list list, int64_t n) {
    return list.step ? list.start + list.step * n : plan->index[list.start + n];
}

/* Rows that each query row attends, tile after tile in the plan's order. */
static vector *attended_rows(const cmb_plan *plan) {
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
static vector *pooled_positions(const cmb_plan *plan) {
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
    ROUTING, /* span: how many clusters, drawn anew for each position but the same in every length */
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

static int64_t cluster_of(const factorization *f, int64_t i) {
    const uint64_t hash = (uint64_t)(i + 1) * UINT64_C(0x9e3779b97f4a7c15);
    return (int64_t)((hash >> 33) % (uint64_t)(f->span < f->L ? f->span : f->L));
}

static void specify_fixed(const factorization *f, specified *s) {
    const int64_t L = f->L, c = f->span;
    for (int64_t first = 0; !f->is_sparse && first < L; first += c, s->R++) {
        s->span[s->R][0] = first;
        s->span[s->R][1] = first + c < L ? first + c : L;
    }
    for (int64_t i = 0; i < L; i++) {
        for (int64_t j = 0; j < (f->is_causal ? i + 1 : L); j++)
            if (j / c == i / c || (f->is_sparse && j % c == c - 1))
                push(&s->query[i], j);
        for (int64_t t = 0; t < s->R; t++)
            if (t < i / c || (t > i / c && !f->is_causal))
                push(&s->query[i], L + t);
    }
}

static void specify_logsparse(const factorization *f, specified *s) {
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

static void specify_tree(const factorization *f, specified *s) {
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

static void push_region(specified *s, vector below) { s->below[s->R++] = below; }

static vector part_of(const factorization *f, int64_t row, int64_t column, int64_t from, int64_t to) {
    vector part = {0};
    for (int64_t j = from < 0 ? 0 : from; j < to && j < f->L; j++)
        if ((row < 0 || j / f->span == row) && (column < 0 || j % f->span == column))
            push(&part, j);
    return part;
}

static void specify_axial(const factorization *f, specified *s) {
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

static void specify_routing(const factorization *f, specified *s) {
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

static specified specify(const factorization *f) {
    const int64_t L = f->L, capacity = f->kind < VERTICAL ? 2 * L : 4 * L + 2 * f->span;
    specified s = {.query = make_lists(L),
                   .member = make_lists(capacity),
                   .below = make_lists(capacity),
                   .span = calloc((size_t)capacity + 1, 24),
                   .capacity = capacity};
    CHECK(s.span);
    if (f->kind == ROUTING)
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

static void forget(specified *s, int64_t L) {
    free_lists(s->query, L);
    free_lists(s->member, s->capacity);
    free_lists(s->below, s->capacity);
    free(s->span);
}

static cmb_status build(const factorization *f, cmb_plan **plan, cmb_error *error) {
    const cmb_plan_options options = {.is_causal = f->is_causal, .sparse = f->is_sparse};
    switch (f->kind) {
    case DENSE:
        return cmb_plan_dense(f->L, &options, plan, error);
    case FIXED:
        return cmb_plan_fixed(f->L, f->span, &options, plan, error);
    case LOGSPARSE:
    case HIERARCHICAL:
        return cmb_plan_logsparse(f->L, f->kind == HIERARCHICAL, &options, plan, error);
    case TREE:
    case TREE2:
        return cmb_plan_tree(f->L, f->span, f->kind == TREE ? 0 : 2, &options, plan, error);
    case MIXTURE:
        return cmb_plan_axial_mixture(f->L, f->span, &options, plan, error);
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

static cmb_plan *make(const factorization *f) {
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    const cmb_status status = build(f, &plan, &error);
    CHECK(status == CMB_OK, "%s", error.message);
    return plan;
}

static void check_against_specification(const factorization *f) {
    cmb_error error = {0};
    cmb_plan *plan = make(f);
    specified s = specify(f);
    vector *rows = attended_rows(plan), *below = pooled_positions(plan);
    int64_t pairs = 0, summarized = 0;
    CHECK(cmb_plan_check(plan, &error) == CMB_OK, "%s", error.message);
    CHECK(plan->R == s.R, "%d regions, not %lld", plan->R, (long long)s.R);
    for (int64_t i = 0; i < f->L; i++) {
        sort(&rows[i]);
        CHECK(are_equal(&rows[i], &s.query[i]), "kind %d L %lld span %lld causal %d sparse %d query %lld", (int)f->kind,
              (long long)f->L, (long long)f->span, f->is_causal, f->is_sparse, (long long)i);
        pairs += s.query[i].count;
    }
    for (int64_t r = 0; r < s.R; r++) {
        CHECK(are_equal(&below[r], &s.below[r]), "kind %d L %lld span %lld causal %d region %lld", (int)f->kind,
              (long long)f->L, (long long)f->span, f->is_causal, (long long)r);
        CHECK(are_equal(&rows[f->L + r], &s.member[r]), "kind %d L %lld span %lld causal %d region %lld", (int)f->kind,
              (long long)f->L, (long long)f->span, f->is_causal, (long long)r);
        summarized += s.member[r].count;
    }
    cmb_plan_facts facts;
    CHECK(cmb_plan_measure(plan, &facts, &error) == CMB_OK, "%s", error.message);
    CHECK(facts.attend_pairs == pairs && facts.summarize_pairs == summarized);
    CHECK(facts.computed_pairs >= pairs + summarized);
    if (f->kind == MIXTURE && !f->is_sparse)
        CHECK(facts.is_full && facts.is_partition == (f->span == 1 || f->span >= f->L));
    else if (!f->is_sparse || f->kind == DENSE)
        CHECK(facts.is_partition && facts.is_full);
    else {
        bool is_whole = true;
        for (int64_t i = 0; i < f->L; i++)
            is_whole = is_whole && s.query[i].count == (f->is_causal ? i + 1 : f->L);
        CHECK(facts.is_partition == is_whole && facts.is_full == is_whole);
    }
    free_lists(rows, f->L + s.R);
    free_lists(below, s.R + plan->N);
    forget(&s, f->L);
    cmb_plan_free(plan);
}

static void check_length_of_all(int64_t L) {
    const int64_t span[] = {1, 2, 3, 7, 16, 21, 33, 63, 64, 65, 100, 128, 600, INT64_MAX};
    for (int is_causal = 0; is_causal < 2; is_causal++)
        for (int is_sparse = 0; is_sparse < 2; is_sparse++) {
            factorization f = {.L = L, .is_causal = is_causal, .is_sparse = is_sparse};
            for (f.kind = DENSE; f.kind < KINDS; f.kind++)
                for (size_t n = 0; n < sizeof span / sizeof *span; n++) {
                    f.span = span[n];
                    const bool is_small =
                        f.kind >= TREE && f.span <= 600 && (L < 300 || f.span == 33) && (f.kind > TREE2 || f.span > 1);
                    if ((f.kind == FIXED && (L < 300 || span[n] > 16)) || (n == 0 && f.kind < TREE) || is_small)
                        check_against_specification(&f);
                }
        }
}

static void test_specification(void) {
    for (int64_t L = 0; L <= 70; L++)
        check_length_of_all(L);
    const int64_t more[] = {127, 128, 129, 1000, 2047, 2048, 2049};
    for (size_t n = 0; n < sizeof more / sizeof *more; n++)
        check_length_of_all(more[n]);
}

static void test_blocks_longer_than_a_chunk(void) {
    for (int is_causal = 0; is_causal < 2; is_causal++)
        for (int hierarchical = 0; hierarchical < 2; hierarchical++)
            check_against_specification(
                &(factorization){hierarchical ? HIERARCHICAL : LOGSPARSE, 9000, 1, is_causal, false});
}

static void test_long_plans(void) {
    for (kind k = DENSE; k < KINDS; k++)
        for (int is_sparse = 0; is_sparse < 2; is_sparse++) {
            const factorization f = {k, 65536, 256, true, is_sparse};
            cmb_plan *plan = make(&f);
            cmb_error error = {0};
            CHECK(cmb_plan_check(plan, &error) == CMB_OK, "%s", error.message);
            /* 1% of query, key, value and out: 8 heads, 64 features, float32 */
            CHECK(cmb_plan_bytes(plan) < 5368709, "%zu bytes", cmb_plan_bytes(plan));
            cmb_plan_free(plan);
        }
}

/* ---- what is found where plans are made ---- */

static void with_many_plans(void (*check)(const factorization *f, const cmb_plan *plan)) {
    for (kind k = DENSE; k < KINDS; k++)
        for (int64_t L = 1; L < 5000; L = 3 * L + 1)
            for (int bits = 0; bits < 4; bits++)
                for (int64_t span = 5; span < 1000; span *= 5) {
                    const factorization f = {k, L, span, bits & 1, bits & 2};
                    cmb_plan *plan = make(&f);
                    check(&f, plan);
                    cmb_plan_free(plan);
                }
}

/* ---- waves that can be fused ---- */

/* What a task does to a table row: the region's or result's writers of earlier waves come first. */
static bool follows_writers(const cmb_plan *plan, const vector *writers, int64_t row, int64_t wave, const bool *done) {
    if (row >= plan->L + plan->R)
        return true;
    for (int64_t n = 0; n < writers[row].count; n++)
        if (writers[row].item[n] < plan->wave[wave] && !done[writers[row].item[n]])
            return false;
    return true;
}

static bool list_follows(const cmb_plan *plan, const vector *writers, cmb_list list, bool regions, int64_t wave,
                         const bool *done) {
    for (int64_t n = 0; n < list.count; n++) {
        const int64_t row = row_at(plan, list, n);
        if ((!regions || row >= plan->L) && !follows_writers(plan, writers, row, wave, done))
            return false;
    }
    return true;
}

/* Runs the tasks through: the t-th of every wave, then the next ones. */
static bool can_be_fused(const cmb_plan *plan) {
    vector *writers = make_lists(plan->L + plan->R + 1);
    bool *done = calloc((size_t)plan->tasks + 1, sizeof *done), fits = true;
    for (int64_t task = 0; task < plan->tasks; task++) {
        for (int64_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++)
            if (plan->pool[n].row < plan->L + plan->R)
                push(&writers[plan->pool[n].row], task);
        for (int64_t n = plan->task[task].tile; n < plan->task[task + 1].tile; n++)
            for (int64_t q = 0; q < plan->tile[n].query.count; q++)
                push(&writers[row_at(plan, plan->tile[n].query, q)], task);
    }
    for (int64_t t = 0; t < plan->tasks; t++)
        for (int64_t wave = 0; wave < plan->waves; wave++) {
            const int64_t task = plan->wave[wave] + t;
            if (task >= plan->wave[wave + 1])
                continue;
            for (int64_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++)
                fits = fits && list_follows(plan, writers, plan->pool[n].child, true, wave, done);
            for (int64_t n = plan->task[task].tile; n < plan->task[task + 1].tile; n++) {
                fits = fits && list_follows(plan, writers, plan->tile[n].query, false, wave, done);
                for (int64_t run = plan->tile[n].run; run < plan->tile[n + 1].run; run++)
                    fits = fits && list_follows(plan, writers, plan->run[run].row, true, wave, done);
            }
            done[task] = true;
        }
    free_lists(writers, plan->L + plan->R + 1);
    free(done);
    return fits && plan->waves > 1;
}

static void check_fusible(const factorization *f, const cmb_plan *plan) {
    CHECK(plan->is_fusible == can_be_fused(plan), "kind %d L %lld span %lld: %d", (int)f->kind, (long long)f->L,
          (long long)f->span, plan->is_fusible);
    if ((f->kind == FIXED || f->kind == LOGSPARSE) && f->is_causal && !f->is_sparse)
        CHECK(plan->is_fusible == (plan->waves > 1));
}

static void test_fusible(void) { with_many_plans(check_fusible); }

/* ---- positions that a second tile goes on with ---- */

static void check_resumes(const factorization *f, const cmb_plan *plan) {
    int64_t most = 0, *tiles = calloc((size_t)(plan->L + plan->R) + 1, sizeof *tiles);
    for (int64_t tile = 0; tile < plan->tiles; tile++)
        for (int64_t q = 0; q < plan->tile[tile].query.count; q++) {
            const int64_t row = row_at(plan, plan->tile[tile].query, q);
            most = ++tiles[row] > most && row < plan->L ? tiles[row] : most;
        }
    free(tiles);
    CHECK(plan->resumes == (most > 1), "kind %d L %lld span %lld: %lld tiles", (int)f->kind, (long long)f->L,
          (long long)f->span, (long long)most);
    if (f->kind == FIXED || f->kind == LOGSPARSE)
        CHECK(!plan->resumes);
}

static void test_resumes(void) { with_many_plans(check_resumes); }

/* ---- q_R that only one task needs ---- */

typedef struct {
    int64_t first, last;
} range;

static void touch(const cmb_plan *plan, range *tasks, int64_t row, int64_t task) {
    if (row < plan->L || row >= plan->L + plan->R)
        return;
    range *own = &tasks[row - plan->L];
    own->first = own->first < task ? own->first : task;
    own->last = own->last > task ? own->last : task;
}

/* By the tasks that pool a region, pool it further, or ask with it: at most so many of a task's are its alone, and so
 * many are not. */
static void count_queries(const cmb_plan *plan, int64_t *own, int64_t *shared) {
    range *tasks = calloc((size_t)plan->R + 1, sizeof *tasks);
    int64_t *alone = calloc((size_t)plan->tasks + 1, sizeof *alone);
    for (int64_t r = 0; r < plan->R; r++)
        tasks[r] = (range){plan->tasks, -1};
    for (int64_t task = 0; task < plan->tasks; task++) {
        for (int64_t n = plan->task[task].pool; n < plan->task[task + 1].pool; n++) {
            const cmb_pool *pool = &plan->pool[n];
            touch(plan, tasks, pool->row, task);
            for (int64_t i = 0; i < pool->child.count; i++)
                touch(plan, tasks, row_at(plan, pool->child, i), task);
        }
        for (int64_t n = plan->task[task].tile; n < plan->task[task + 1].tile; n++)
            for (int64_t q = 0; q < plan->tile[n].query.count; q++)
                touch(plan, tasks, row_at(plan, plan->tile[n].query, q), task);
    }
    *own = *shared = 0;
    for (int64_t r = 0; r < plan->R; r++)
        if (tasks[r].first < tasks[r].last)
            (*shared)++;
        else if (tasks[r].last >= 0 && ++alone[tasks[r].last] > *own)
            *own = alone[tasks[r].last];
    free(tasks);
    free(alone);
}

static void check_own_queries(const factorization *f, const cmb_plan *plan) {
    int64_t own, shared;
    count_queries(plan, &own, &shared);
    CHECK(plan->own_queries == own && plan->shared_queries == shared,
          "kind %d L %lld span %lld: %d and %d, not %lld and %lld", (int)f->kind, (long long)f->L, (long long)f->span,
          plan->own_queries, plan->shared_queries, (long long)own, (long long)shared);
    if (f->kind == FIXED || f->kind == VERTICAL || f->kind == MIXTURE)
        CHECK(shared == 0 && (own > 0) == (plan->pools > 0));
}

static void test_own_queries(void) { with_many_plans(check_own_queries); }

/* ---- picks where nothing is masked ---- */

static void check_picks(const factorization *f, const cmb_plan *plan) {
    CHECK((plan->pick != NULL) == (plan->pooling == CMB_POOL_FIRST && plan->R > 0), "kind %d", (int)f->kind);
    for (int32_t r = 0; f->kind == ROWMAJOR && r < plan->R; r++)
        CHECK(plan->pick[r] == r, "L %lld: region %d picks %d", (long long)f->L, r, plan->pick[r]);
}

static void test_picks(void) { with_many_plans(check_picks); }

/* ---- a causal prefix computes the same ---- */

typedef struct {
    const cmb_plan *plan;
    const factorization *f;
    vector *below;
    vector *tiles; /* [L + R] of each query row */
} prefix_side;

/* The same number for the same region, whatever the length: its span, or its place in the region order. */
static int64_t name_row(const prefix_side *side, int64_t row) {
    const int64_t L = side->plan->L, r = row - L, halves = (side->plan->R - L) / 2;
    if (r < 0)
        return row;
    if (side->f->kind < VERTICAL)
        return (side->below[r].item[0] + 1) << 32 | side->below[r].count;
    if (side->f->kind != MIXTURE || r < L)
        return INT64_C(1) << 32 | r;
    return r < L + halves ? INT64_C(2) << 32 | (r - L) : INT64_C(3) << 32 | (r - L - halves);
}

static prefix_side open_side(const cmb_plan *plan, const factorization *f) {
    prefix_side side = {plan, f, pooled_positions(plan), make_lists(plan->L + plan->R)};
    for (int32_t n = 0; n < plan->tiles; n++)
        for (int32_t t = 0; t < plan->tile[n].query.count; t++)
            push(&side.tiles[row_at(plan, plan->tile[n].query, t)], (int64_t)n << 6 | t);
    return side;
}

static void close_side(prefix_side *side) {
    free_lists(side->below, side->plan->R + side->plan->N);
    free_lists(side->tiles, side->plan->L + side->plan->R);
}

/* The tile's rows, -1 in place of those that its lane t does not see, and those that it sees. */
static void list_tile(const prefix_side *side, int64_t tile, int64_t t, vector *rows, vector *seen) {
    const cmb_plan *plan = side->plan;
    rows->count = seen->count = 0;
    for (int32_t n = plan->tile[tile].run; n < plan->tile[tile + 1].run; n++)
        for (int32_t k = 0; k < plan->run[n].row.count; k++) {
            const bool is_seen = plan->run[n].mask < 0 || plan->mask[plan->run[n].mask + k] >> t & 1;
            push(rows, is_seen ? name_row(side, row_at(plan, plan->run[n].row, k)) : -1);
            if (is_seen)
                push(seen, rows->item[rows->count - 1]);
        }
}

static void check_prefix(const factorization *f, int64_t longer) {
    factorization g = *f;
    g.L = longer;
    cmb_plan *plan[2] = {make(f), make(&g)};
    prefix_side side[2] = {open_side(plan[0], f), open_side(plan[1], &g)};
    vector rows[2] = {{0}}, seen[2] = {{0}};
    for (int64_t x = 0; x < f->L + plan[0]->R; x++) {
        int64_t y = x;
        if (x >= f->L) /* the same region */
            for (y = longer; name_row(&side[1], y) != name_row(&side[0], x);)
                if (++y == longer + plan[1]->R)
                    break;
        const vector *tiles = &side[0].tiles[x], *others = &side[1].tiles[y];
        if (!tiles->count)
            continue;
        CHECK(tiles->count == others->count, "query row %lld", (long long)x);
        for (int64_t n = 0; n < tiles->count; n++) {
            const int64_t a = tiles->item[n] >> 6, b = others->item[n] >> 6;
            CHECK((plan[0]->tile[a].width == 1) == (plan[1]->tile[b].width == 1));
            list_tile(&side[0], a, tiles->item[n] & 63, &rows[0], &seen[0]);
            list_tile(&side[1], b, others->item[n] & 63, &rows[1], &seen[1]);
            CHECK(are_equal(&seen[0], &seen[1]), "query row %lld", (long long)x);
            if (rows[1].count > 96) { /* taken 96 at a time: what is seen keeps its place */
                CHECK(rows[0].count <= rows[1].count);
                rows[1].count = rows[0].count;
                CHECK(are_equal(&rows[0], &rows[1]), "kind %d L %lld of %lld span %lld query row %lld", (int)f->kind,
                      (long long)f->L, (long long)longer, (long long)f->span, (long long)x);
            }
        }
    }
    for (int n = 0; n < 2; n++) {
        free(rows[n].item);
        free(seen[n].item);
        close_side(&side[n]);
        cmb_plan_free(plan[n]);
    }
}

static void test_prefixes(void) {
    const int64_t span[] = {1, 2, 3, 5, 16, 30, 63, 64, 70, 130, 1000};
    const int64_t length[] = {1, 2, 15, 40, 64, 77, 130, 199, 320};
    for (size_t n = 0; n < sizeof length / sizeof *length; n++)
        for (int is_sparse = 0; is_sparse < 2; is_sparse++) {
            factorization f = {.L = length[n], .is_causal = true, .is_sparse = is_sparse};
            for (f.kind = DENSE; f.kind < KINDS; f.kind++)
                for (size_t m = 0; m < sizeof span / sizeof *span; m++) {
                    f.span = span[m];
                    if (f.kind == ROUTING && f.span > f.L) /* clusters would depend on the length */
                        continue;
                    if (f.kind == FIXED || f.kind > TREE2 || (f.kind >= TREE && f.span > 1) ||
                        (f.kind < TREE && m == 0)) {
                        check_prefix(&f, f.L + 1);
                        check_prefix(&f, 333);
                    }
                }
        }
    for (kind k = LOGSPARSE; k <= HIERARCHICAL; k++) {
        check_prefix(&(factorization){k, 4090, 1, true, false}, 4097);
        check_prefix(&(factorization){k, 2100, 1, true, false}, 4200);
    }
}

/* ---- a user's own parts ---- */

typedef struct {
    int64_t L, R;
    vector *direct, *regions, *members;
} random_parts;

static cmb_lists flatten(const vector *lists, int64_t count, vector *offset, vector *item) {
    offset->count = item->count = 0;
    push(offset, 0);
    for (int64_t n = 0; n < count; n++) {
        for (int64_t k = 0; k < lists[n].count; k++)
            push(item, lists[n].item[k]);
        push(offset, item->count);
    }
    return (cmb_lists){count, offset->item, item->item};
}

static cmb_status build_parts(const random_parts *p, cmb_cover cover, const cmb_plan_options *options, cmb_plan **plan,
                              cmb_error *error) {
    vector offset[3] = {{0}}, item[3] = {{0}};
    const cmb_lists direct = flatten(p->direct, p->L, &offset[0], &item[0]);
    const cmb_lists regions = flatten(p->regions, p->L, &offset[1], &item[1]);
    const cmb_lists members = flatten(p->members, p->R, &offset[2], &item[2]);
    const cmb_status status = cmb_plan_from_parts(p->L, &direct, &regions, &members, cover, options, plan, error);
    for (int n = 0; n < 3; n++) {
        free(offset[n].item);
        free(item[n].item);
    }
    return status;
}

static void free_parts(random_parts *p) {
    free_lists(p->direct, p->L);
    free_lists(p->regions, p->L);
    free_lists(p->members, p->R);
}

/* below[r]: positions below region r, repeats counted, ascending. */
static random_parts draw_parts(int64_t L, int64_t R, bool is_causal, bool is_nested, vector *below) {
    random_parts p = {L, R, make_lists(L), make_lists(L), make_lists(R)};
    for (int64_t r = 0; r < R; r++) {
        for (int64_t n = random_below(6); n > 0; n--) {
            if (is_nested && r && random_below(3) == 0) {
                const int64_t q = random_below(r);
                if (below[q].count > 60)
                    continue;
                push(&p.members[r], L + q);
                for (int64_t k = 0; k < below[q].count; k++)
                    push(&below[r], below[q].item[k]);
            } else if (L) {
                push(&p.members[r], random_below(L));
                push(&below[r], p.members[r].item[p.members[r].count - 1]);
            }
        }
        sort(&below[r]);
    }
    for (int64_t i = 0; i < L; i++) {
        for (int64_t n = random_below(8); n > 0; n--)
            push(&p.direct[i], random_below(is_causal ? i + 1 : L));
        for (int64_t n = R ? random_below(5) : 0; n > 0; n--) {
            const int64_t r = random_below(R);
            if (!is_causal || !below[r].count || below[r].item[below[r].count - 1] <= i)
                push(&p.regions[i], r);
        }
    }
    return p;
}

/* Refused where query i, not -1, is the first that its parts do not cover as they must, and key j its first such. */
static void check_cover(const random_parts *p, cmb_cover cover, bool is_causal, int64_t i, int64_t j) {
    const cmb_plan_options options = {.is_causal = is_causal};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    const cmb_status status = build_parts(p, cover, &options, &plan, &error);
    char words[120];
    snprintf(words, sizeof words, "parts must cover query %lld's support %s once, but key %lld ", (long long)i,
             cover == CMB_COVER_FULL ? "at least" : "exactly", (long long)j);
    CHECK(status == (i < 0 ? CMB_OK : CMB_ERR_VALUE) && !plan == (i >= 0), "%s, not %s", error.message, words);
    CHECK(i < 0 || strstr(error.message, words) == error.message, "%s, not %s", error.message, words);
    cmb_plan_free(plan);
}

static void check_parts(int64_t L, int64_t R, bool is_causal, bool is_nested, cmb_pooling pooling) {
    vector *below = make_lists(R);
    random_parts p = draw_parts(L, R, is_causal, is_nested, below);
    const cmb_plan_options options = {.is_causal = is_causal, .pooling = pooling};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    CHECK(build_parts(&p, CMB_COVER_ANY, &options, &plan, &error) == CMB_OK, "%s", error.message);
    CHECK(cmb_plan_check(plan, &error) == CMB_OK, "%s", error.message);
    vector *rows = attended_rows(plan), *pooled = pooled_positions(plan);
    bool *needed = calloc((size_t)R + 1, 1);
    int64_t pairs = 0, uneven[2] = {-1, -1}, lacking[2] = {-1, -1}; /* a query, a key */
    CHECK(needed);
    for (int64_t i = 0; i < L; i++) {
        int64_t *cover = calloc((size_t)L, sizeof *cover);
        vector expected = {0};
        CHECK(cover);
        for (int64_t n = 0; n < p.direct[i].count; n++) {
            push(&expected, p.direct[i].item[n]);
            cover[p.direct[i].item[n]]++;
        }
        for (int64_t n = 0; n < p.regions[i].count; n++) {
            const int64_t r = p.regions[i].item[n];
            needed[r] = true;
            if (below[r].count)
                push(&expected, L + r);
            for (int64_t k = 0; k < below[r].count; k++)
                cover[below[r].item[k]]++;
        }
        for (int64_t j = 0; j < (is_causal ? i + 1 : L); j++) {
            if (cover[j] != 1 && uneven[0] < 0)
                memcpy(uneven, (int64_t[]){i, j}, sizeof uneven);
            if (cover[j] == 0 && lacking[0] < 0)
                memcpy(lacking, (int64_t[]){i, j}, sizeof lacking);
        }
        sort(&expected);
        sort(&rows[i]);
        CHECK(are_equal(&rows[i], &expected), "query %lld", (long long)i);
        pairs += expected.count;
        free(expected.item);
        free(cover);
    }
    for (int64_t r = R - 1; r >= 0; r--) {
        vector expected = {0};
        for (int64_t n = 0; n < p.members[r].count; n++) {
            const int64_t member = p.members[r].item[n];
            if (member >= L && needed[r])
                needed[member - L] = true;
            if (needed[r] && (member < L || below[member - L].count))
                push(&expected, member);
        }
        CHECK(are_equal(&rows[L + r], &expected), "region %lld", (long long)r);
        if (pooling == CMB_POOL_MEAN)
            sort(&pooled[r]);
        CHECK(are_equal(&pooled[r], &below[r]), "region %lld", (long long)r);
        free(expected.item);
    }
    cmb_plan_facts facts;
    CHECK(cmb_plan_measure(plan, &facts, &error) == CMB_OK, "%s", error.message);
    CHECK(facts.attend_pairs == pairs);
    CHECK(facts.is_partition == (uneven[0] < 0) && facts.is_full == (lacking[0] < 0));
    check_cover(&p, CMB_COVER_ANY, is_causal, -1, -1);
    check_cover(&p, CMB_COVER_FULL, is_causal, lacking[0], lacking[1]);
    check_cover(&p, CMB_COVER_PARTITION, is_causal, uneven[0], uneven[1]);
    cmb_plan *copy = NULL;
    CHECK(cmb_plan_from_arrays(plan, &copy, &error) == CMB_OK, "%s", error.message);
    CHECK(cmb_plan_bytes(copy) == cmb_plan_bytes(plan));
    CHECK(memcmp(copy + 1, plan + 1, cmb_plan_bytes(plan) - sizeof *plan) == 0);
    cmb_plan_free(copy);
    cmb_plan_free(plan);
    free(needed);
    free_lists(rows, L + R);
    free_lists(pooled, R);
    free_lists(below, R);
    free_parts(&p);
}

static void test_random_parts(void) {
    for (int n = 0; n < 600; n++)
        check_parts(random_below(n % 10 ? 40 : 200), random_below(30), n & 1, n & 2,
                    n & 4 ? CMB_POOL_MAX : CMB_POOL_MEAN);
    check_parts(1500, 30, true, true, CMB_POOL_MAX); /* more mask sequences than the first table holds */
}

/* Every factorization's own lists, given as parts, are the partition they were. */
static void test_known_parts(void) {
    for (kind k = DENSE; k < MIXTURE; k++)
        for (int is_causal = 0; is_causal < 2; is_causal++) {
            const factorization f = {k, 150, 12, is_causal, false};
            specified s = specify(&f);
            random_parts p = {f.L, s.R, make_lists(f.L), make_lists(f.L), make_lists(s.R)};
            for (int64_t i = 0; i < f.L; i++)
                for (int64_t n = 0; n < s.query[i].count; n++)
                    push(s.query[i].item[n] < f.L ? &p.direct[i] : &p.regions[i],
                         s.query[i].item[n] < f.L ? s.query[i].item[n] : s.query[i].item[n] - f.L);
            for (int64_t r = 0; r < s.R; r++)
                for (int64_t n = 0; n < s.member[r].count; n++)
                    push(&p.members[r], s.member[r].item[n]);
            const cmb_plan_options options = {.is_causal = is_causal};
            cmb_plan *plan = NULL;
            cmb_plan_facts facts;
            cmb_error error = {0};
            CHECK(build_parts(&p, CMB_COVER_PARTITION, &options, &plan, &error) == CMB_OK, "%s", error.message);
            CHECK(cmb_plan_check(plan, &error) == CMB_OK, "%s", error.message);
            CHECK(cmb_plan_measure(plan, &facts, &error) == CMB_OK && facts.is_partition && facts.is_full);
            check_cover(&p, CMB_COVER_FULL, is_causal, -1, -1);
            push(&p.direct[140], 100);
            check_cover(&p, CMB_COVER_FULL, is_causal, -1, -1);
            check_cover(&p, CMB_COVER_PARTITION, is_causal, 140, 100);
            p.direct[140].count = p.regions[140].count = 0;
            check_cover(&p, CMB_COVER_FULL, is_causal, 140, 0);
            cmb_plan_free(plan);
            free_parts(&p);
            forget(&s, f.L);
        }
}

/* Covers everything, some of it twice. */
static random_parts overlapping_parts(void) {
    const int64_t L = 130;
    random_parts p = {L, 0, make_lists(L), make_lists(L), make_lists(0)};
    for (int64_t i = 0; i < L; i++)
        for (int64_t j = 0; j <= i; j++) {
            push(&p.direct[i], j);
            if (j == 128)
                push(&p.direct[i], j);
        }
    return p;
}

static void test_full_but_no_partition(void) {
    random_parts p = overlapping_parts();
    const cmb_plan_options options = {.is_causal = true};
    for (int is_full = 1; is_full >= 0; is_full--) {
        cmb_plan *plan = NULL;
        cmb_plan_facts facts;
        cmb_error error = {0};
        CHECK(build_parts(&p, CMB_COVER_ANY, &options, &plan, &error) == CMB_OK, "%s", error.message);
        CHECK(cmb_plan_measure(plan, &facts, &error) == CMB_OK);
        CHECK(!facts.is_partition && facts.is_full == is_full);
        check_cover(&p, CMB_COVER_PARTITION, true, 128, 128);
        check_cover(&p, CMB_COVER_FULL, true, is_full ? -1 : 129, 100);
        cmb_plan_free(plan);
        p.direct[129].item[100] = 99;
    }
    free_parts(&p);
}

/* ---- refusals ---- */

static void expect(cmb_status status, cmb_status expected, const cmb_plan *plan, const cmb_error *error,
                   const char *message) {
    CHECK(status == expected && error->status == expected, "%d: %s", (int)status, error->message);
    CHECK(!plan);
    CHECK(strcmp(error->message, message) == 0, "\"%s\", not \"%s\"", error->message, message);
}

static void test_bad_sizes(void) {
    const cmb_plan_options options = {.is_causal = true};
    const cmb_plan_options odd = {.pooling = (cmb_pooling)9};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    expect(cmb_plan_fixed(8, 0, &options, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "span must be at least 1, got 0");
    expect(cmb_plan_fixed(8, INT64_MIN, &options, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "span must be at least 1, got -9223372036854775808");
    expect(cmb_plan_dense(-1, &options, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "length must not be negative, got -1");
    expect(cmb_plan_logsparse((INT64_C(1) << 30) + 1, false, &options, &plan, &error), CMB_ERR_OVERFLOW, plan, &error,
           "length must be at most 2^30, got 1073741825");
    expect(cmb_plan_fixed(INT64_C(1) << 30, 1, &options, &plan, &error), CMB_ERR_OVERFLOW, plan, &error,
           "length 1073741824 with 1073741824 regions exceeds the 2^31 - 1 rows of a plan");
    expect(cmb_plan_dense(8, &odd, &plan, &error), CMB_ERR_VALUE, plan, &error,
           "pooling must be max, mean, sum or first, got 9");
    CHECK(cmb_plan_dense(-1, &options, &plan, NULL) == CMB_ERR_VALUE && !plan);
}

static void expect_parts(const char *message, int64_t L, const cmb_lists *direct, const cmb_lists *regions,
                         const cmb_lists *members, cmb_status status) {
    const cmb_plan_options options = {.is_causal = true};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    expect(cmb_plan_from_parts(L, direct, regions, members, CMB_COVER_ANY, &options, &plan, &error), status, plan,
           &error, message);
}

static void expect_uncovered(const char *message, cmb_cover cover, const cmb_lists *direct, const cmb_lists *regions,
                             const cmb_lists *members) {
    const cmb_plan_options options = {.is_causal = true};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    expect(cmb_plan_from_parts(4, direct, regions, members, cover, &options, &plan, &error), CMB_ERR_VALUE, plan,
           &error, message);
}

#define LISTS(count, offset, ...)                        \
    &(cmb_lists) {                                       \
        count, offset, (const int64_t[]) { __VA_ARGS__ } \
    }
#define OFFSETS(...) ((const int64_t[]){__VA_ARGS__})

static void test_bad_parts(void) {
    const int64_t *each = OFFSETS(0, 1, 2, 3, 4), *none = OFFSETS(0, 0, 0, 0, 0);
    const cmb_lists *direct = LISTS(4, each, 0, 1, 2, 3), *empty = LISTS(4, none, 0), *members = LISTS(0, NULL, 0);
    expect_parts("direct[2] holds key 3, which lies after query 2 of a causal plan", 4, LISTS(4, each, 0, 1, 3, 3),
                 empty, members, CMB_ERR_VALUE);
    expect_parts("direct[1] holds key 4, which is not a position below 4", 4, LISTS(4, each, 0, 4, 2, 3), empty,
                 members, CMB_ERR_VALUE);
    expect_parts("direct[3] holds key -1, which is not a position below 4", 4, LISTS(4, each, 0, 1, 2, -1), empty,
                 members, CMB_ERR_VALUE);
    expect_parts("direct must hold 4 lists, one for each position, got 3", 4, LISTS(3, each, 0, 1, 2), empty, members,
                 CMB_ERR_VALUE);
    expect_parts("regions: offsets must start at 0 and not decrease, got 1 at 0", 4, direct,
                 LISTS(4, OFFSETS(1, 1, 1, 1, 1), 0), members, CMB_ERR_VALUE);
    expect_parts("direct: offsets must start at 0 and not decrease, got 1 at 3", 4,
                 LISTS(4, OFFSETS(0, 1, 2, 1, 4), 0, 1, 2, 3), empty, members, CMB_ERR_VALUE);
    expect_parts("regions[0] holds 0, but there are 0 regions", 4, direct, LISTS(4, each, 0, 0, 0, 0), members,
                 CMB_ERR_VALUE);
    expect_parts("regions[1] holds region 0, whose key 2 lies after query 1 of a causal plan", 4, direct,
                 LISTS(4, OFFSETS(0, 0, 1, 1, 1), 0), LISTS(1, OFFSETS(0, 2), 1, 2), CMB_ERR_VALUE);
    expect_parts("members[0] holds region 0, which is not listed before it", 4, direct, empty,
                 LISTS(1, OFFSETS(0, 2), 1, 4), CMB_ERR_VALUE);
    expect_parts("members[0] holds region 1, which is not listed before it", 4, direct, empty,
                 LISTS(2, OFFSETS(0, 1, 2), 5, 0), CMB_ERR_VALUE);
    expect_parts("members[1] holds 6, which is neither a position below 4 nor a region", 4, direct, empty,
                 LISTS(2, OFFSETS(0, 1, 2), 0, 6), CMB_ERR_VALUE);
    expect_parts("members must not hold a negative number of lists, got -1", 4, direct, empty, LISTS(-1, NULL, 0),
                 CMB_ERR_VALUE);
    const cmb_plan_options sparse = {.sparse = true};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    expect(cmb_plan_from_parts(4, direct, empty, members, CMB_COVER_ANY, &sparse, &plan, &error), CMB_ERR_VALUE, plan,
           &error, "sparse must be false: parts say themselves what is left out");
    int64_t offset[41], item[80]; /* each region twice the one before */
    for (int64_t r = 0; r <= 40; r++)
        offset[r] = 2 * r;
    for (int64_t r = 0; r < 40; r++)
        item[2 * r] = item[2 * r + 1] = r ? 4 + r - 1 : 0;
    expect_parts("members[30] stands for more than 2^31 - 1 positions", 4, direct, empty,
                 &(cmb_lists){40, offset, item}, CMB_ERR_OVERFLOW);
}

/* Queries see their own pair directly, and the one before it through region 0. */
static void test_uncovered_parts(void) {
    const cmb_lists *direct = LISTS(4, OFFSETS(0, 1, 3, 4, 6), 0, 1, 0, 2, 3, 2),
                    *regions = LISTS(4, OFFSETS(0, 0, 0, 1, 2), 0, 0),
                    *members = LISTS(3, OFFSETS(0, 2, 4, 5), 1, 0, 4, 0, 2);
    const cmb_plan_options options = {.is_causal = true};
    cmb_plan *plan = NULL;
    CHECK(cmb_plan_from_parts(4, direct, regions, members, CMB_COVER_PARTITION, &options, &plan, NULL) == CMB_OK);
    cmb_plan_free(plan);
    expect_uncovered("cover must be any, full or partition, got 3", (cmb_cover)3, direct, regions, members);
    expect_uncovered("parts must cover query 1's support exactly once, but key 0 is left out", CMB_COVER_PARTITION,
                     LISTS(4, OFFSETS(0, 1, 2, 3, 5), 0, 1, 2, 2, 3), regions, members);
    expect_uncovered("parts must cover query 2's support at least once, but key 0 is left out", CMB_COVER_FULL, direct,
                     LISTS(4, OFFSETS(0, 0, 0, 1, 2), 2, 0), members);
    expect_uncovered("parts must cover query 3's support exactly once, but key 3 lies twice in direct[3]",
                     CMB_COVER_PARTITION, LISTS(4, OFFSETS(0, 1, 3, 4, 7), 0, 1, 0, 2, 3, 2, 3), regions, members);
    expect_uncovered("parts must cover query 3's support exactly once, but key 1 lies in direct[3] and in region 0",
                     CMB_COVER_PARTITION, LISTS(4, OFFSETS(0, 1, 3, 4, 7), 0, 1, 0, 2, 3, 2, 1), regions, members);
    expect_uncovered("parts must cover query 2's support exactly once, but key 0 lies in region 0 and in region 1",
                     CMB_COVER_PARTITION, direct, LISTS(4, OFFSETS(0, 0, 0, 2, 3), 0, 1, 0), members);
    expect_uncovered("parts must cover query 2's support exactly once, but key 0 lies twice in region 1",
                     CMB_COVER_PARTITION, direct, LISTS(4, OFFSETS(0, 0, 0, 1, 2), 1, 0), members);
    expect_uncovered("parts must cover query 3's support exactly once, but key 0 lies in region 0, which regions[3] "
                     "holds twice",
                     CMB_COVER_PARTITION, direct, LISTS(4, OFFSETS(0, 0, 0, 1, 3), 0, 0, 0), members);
}

typedef struct {
    size_t limit, taken;
} small_heap;

static void *allocate_small(size_t bytes, void *context) {
    small_heap *heap = context;
    if (bytes > heap->limit)
        return NULL;
    heap->taken++;
    void *pointer = NULL;
    return posix_memalign(&pointer, 64, bytes) == 0 ? pointer : NULL;
}

static void release_small(void *pointer, void *context) {
    ((small_heap *)context)->taken--;
    free(pointer);
}

static void test_lengths_beyond_memory(void) {
    small_heap heap = {.limit = (size_t)1 << 28};
    cmb_set_allocator(&(cmb_allocator){allocate_small, release_small, &heap});
    const cmb_plan_options options = {.is_causal = true};
    const int64_t L = INT64_C(1) << 30;
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    expect(cmb_plan_dense(L, &options, &plan, &error), CMB_ERR_MEMORY, plan, &error,
           "out of memory while making a plan of length 1073741824");
    CHECK(cmb_plan_fixed(L, 2, &options, &plan, &error) == CMB_ERR_MEMORY && !plan);
    CHECK(cmb_plan_fixed(L, 32768, &options, &plan, &error) == CMB_ERR_MEMORY && !plan);
    CHECK(cmb_plan_logsparse(L, false, &options, &plan, &error) == CMB_ERR_MEMORY && !plan);
    CHECK(cmb_plan_logsparse(L, true, &options, &plan, &error) == CMB_ERR_MEMORY && !plan);
    CHECK(heap.taken == 0);
    cmb_set_allocator(NULL);
}

/* Every allocation in turn, alone and with all after it. */
static void fail_each_allocation(cmb_status (*run)(void *context), void *context) {
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

static cmb_status use_factorization(void *context) {
    const factorization *f = context;
    cmb_plan *plan = NULL, *copy = NULL;
    cmb_plan_facts facts;
    cmb_error error = {0};
    cmb_status status = build(f, &plan, &error);
    CHECK((status == CMB_OK) == (plan != NULL) && status == error.status);
    if (!status)
        status = cmb_plan_from_arrays(plan, &copy, &error);
    if (!status)
        status = cmb_plan_measure(copy, &facts, &error);
    cmb_plan_free(plan);
    cmb_plan_free(copy);
    return status;
}

static cmb_status use_parts(void *context) {
    const cmb_plan_options options = {0};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    const cmb_status status = build_parts(context, CMB_COVER_ANY, &options, &plan, &error);
    CHECK((status == CMB_OK) == (plan != NULL) && status == error.status);
    cmb_plan_free(plan);
    return status;
}

static cmb_status use_covering_parts(void *context) {
    const cmb_plan_options options = {.is_causal = true};
    cmb_plan *plan = NULL;
    cmb_error error = {0};
    const cmb_status status = build_parts(context, CMB_COVER_FULL, &options, &plan, &error);
    CHECK((status == CMB_OK) == (plan != NULL) && status == error.status);
    cmb_plan_free(plan);
    return status;
}

static void test_failing_allocations(void) {
    for (kind k = DENSE; k < KINDS; k++)
        for (int bits = 0; bits < 4; bits++)
            fail_each_allocation(use_factorization, &(factorization){k, k == LOGSPARSE && !bits ? 9000 : 700,
                                                                     bits & 1 ? 5 : 100, bits & 1, bits & 2});
    vector *below = make_lists(50);
    random_parts p = draw_parts(300, 50, false, true, below);
    fail_each_allocation(use_parts, &p);
    free_lists(below, 50);
    free_parts(&p);
    p = overlapping_parts();
    fail_each_allocation(use_covering_parts, &p);
    free_parts(&p);
}

/* ---- the check ---- */

/* A plan whose arrays a test may change. */
static cmb_plan *make_writable(kind k, int64_t L, bool is_causal) {
    return make(&(factorization){k, L, 12, is_causal, false});
}

static void damage(const int32_t *field, int32_t value) { *(int32_t *)(uintptr_t)field = value; }

static void expect_broken(cmb_plan *plan, const char *part) {
    cmb_error error = {0};
    CHECK(cmb_plan_check(plan, &error) == CMB_ERR_VALUE && strstr(error.message, part), "\"%s\", not \"%s\"",
          error.message, part);
    cmb_plan_free(plan);
}

static void test_check_refuses(void) {
    cmb_plan *plan = make_writable(FIXED, 100, true);
    plan->R = -1;
    expect_broken(plan, "R and N");
    plan = make_writable(FIXED, 100, true);
    plan->L = INT64_MAX;
    expect_broken(plan, "length must be between 0 and 2^30");
    plan = make_writable(FIXED, 100, true);
    plan->pooling = (cmb_pooling)-1;
    expect_broken(plan, "pooling must be");
    plan = make_writable(FIXED, 100, true);
    plan->run = NULL;
    expect_broken(plan, "array run is missing");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->pool[1].row, 5);
    expect_broken(plan, "pool 1 writes row 5, which is no region or scratch row");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->pool[1].row, 100);
    expect_broken(plan, "pool 1 writes region 0 a second time");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->N, 1);
    damage(&plan->pool[0].row, 100 + plan->R);
    damage(&plan->pool[1].row, 100 + plan->R);
    expect_broken(plan, "pool 1 writes scratch row 0 a second time in its task");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->pool[1].child.count, 200);
    expect_broken(plan, "pool 1: its children lie outside the table");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->pool[1].child.start, 108);
    damage(&plan->pool[1].child.count, 1);
    expect_broken(plan, "pool 1 reads row 108 before it is pooled");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->pool[3].child.start, 99);
    damage(&plan->pool[3].child.count, 1);
    expect_broken(plan, "of a causal plan sees position 99");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->tile[0].width, 8);
    expect_broken(plan, "tile 0: its width must be 1, 16, 32, 48 or 64, got 8");
    plan = make_writable(FIXED, 100, false);
    damage(&plan->tile[1].query.start, 100);
    CHECK(cmb_plan_check(plan, NULL) == CMB_ERR_VALUE);
    expect_broken(plan, "attends region 1 before it is summarized");
    plan = make_writable(FIXED, 400, true);
    damage(&plan->tile[plan->tiles - 1].query.start, 0);
    expect_broken(plan, "belongs to another task of its wave");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->tile[plan->tiles - 1].query.start, 80);
    expect_broken(plan, "its queries lie outside the table");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->tile[plan->tiles - 1].query.count, 39);
    expect_broken(plan, "has lanes without a query");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->run[plan->runs - 1].mask, plan->masks);
    expect_broken(plan, "its masks lie outside the mask array");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->index[3], 108);
    expect_broken(plan, "attends region 8 before it is summarized");
    plan = make_writable(FIXED, 100, true);
    damage(&plan->wave[1], plan->tasks + 1);
    expect_broken(plan, "must follow one another");
    plan = make_writable(DENSE, 100, true);
    damage(&plan->tile[1].query.step, -1);
    expect_broken(plan, "belongs to another task of its wave");
    plan = make_writable(DENSE, 100, false);
    damage(&plan->tile[1].query.count, 30);
    plan->is_causal = true;
    expect_broken(plan, "tile 0: query 0 of a causal plan sees position 99");
}

/* Whatever the integers hold, the check says so or the plan can be read: run under a sanitizer. */
static void test_damaged_plans(void) {
    int64_t passed = 0;
    for (int n = 0; n < 20000; n++) {
        cmb_plan *plan = make_writable((kind)(n % KINDS), 1 + random_below(90), random_below(2));
        const struct {
            const void *data;
            int64_t words;
        } array[] = {{plan->wave, plan->waves + 1},         {plan->task, 2 * (plan->tasks + 1)},
                     {plan->pool, 4 * plan->pools},         {plan->tile, 5 * (plan->tiles + 1)},
                     {plan->run, 4 * plan->runs},           {plan->index, plan->indices},
                     {plan->mask, 2 * (int64_t)plan->masks}};
        for (int64_t k = random_below(3); k >= 0; k--) {
            const int64_t a = random_below(7);
            if (!array[a].words)
                continue;
            char *word = (char *)(uintptr_t)array[a].data + 4 * random_below(array[a].words);
            int32_t old;
            memcpy(&old, word, 4);
            const int64_t value[] = {(int64_t)old + 1, (int64_t)old - 1, 0, -1, INT32_MAX,
                                     INT32_MIN,        random_below(200)};
            old = (int32_t)value[random_below(7)];
            memcpy(word, &old, 4);
        }
        cmb_plan_facts facts;
        cmb_error error = {0};
        const cmb_status status = cmb_plan_check(plan, &error);
        CHECK(status == CMB_OK || (status == CMB_ERR_VALUE && error.message[0]));
        if (!status) {
            passed++;
            CHECK(cmb_plan_measure(plan, &facts, &error) == CMB_OK);
        }
        cmb_plan_free(plan);
    }
    CHECK(passed > 0 && passed < 10000, "%lld", (long long)passed);
}

int main(int argc, char **argv) {
    const test_case tests[] = {
        TEST(test_specification),
        TEST(test_blocks_longer_than_a_chunk),
        TEST(test_long_plans),
        TEST(test_fusible),
        TEST(test_resumes),
        TEST(test_own_queries),
        TEST(test_picks),
        TEST(test_prefixes),
        TEST(test_random_parts),
        TEST(test_known_parts),
        TEST(test_full_but_no_partition),
        TEST(test_bad_sizes),
        TEST(test_bad_parts),
        TEST(test_uncovered_parts),
        TEST(test_lengths_beyond_memory),
        TEST(test_failing_allocations),
        TEST(test_check_refuses),
        TEST(test_damaged_plans),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

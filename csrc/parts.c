// SPDX-License-Identifier: Apache-2.0
/* A user's own factorization: a plan from lists of positions and regions. */
#include "plan.h"
#include "runtime.h"

#include <stdio.h>
#include <string.h>

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

/* ---- coverage ---- */

/* From the keys' words word[0..L) makes the regions', word[L..L+R): each the sum, or the union, of its members'. */
static void join_members(const parts *p, bool is_union, uint64_t *word) {
    for (int64_t r = 0; r < p->R; r++) {
        uint64_t joined = 0;
        for (int64_t n = p->members->offset[r]; n < p->members->offset[r + 1]; n++)
            joined = cmb_join(joined, word[p->members->item[n]], is_union);
        word[p->L + r] = joined;
    }
}

/* The same of a query's parts. */
static uint64_t join_parts(const parts *p, bool is_union, const uint64_t *word, int64_t i) {
    uint64_t joined = 0;
    for (int64_t n = p->direct->offset[i]; n < p->direct->offset[i + 1]; n++)
        joined = cmb_join(joined, word[p->direct->item[n]], is_union);
    for (int64_t n = p->regions->offset[i]; n < p->regions->offset[i + 1]; n++)
        joined = cmb_join(joined, word[p->L + p->regions->item[n]], is_union);
    return joined;
}

/* Lists, ascending, the queries whose parts are not their support, each position once; returns how many. */
static int64_t find_uneven(const parts *p, uint64_t *word, int32_t *query) {
    uint64_t support = 0, before = 0;
    int64_t count = 0;
    for (int64_t j = 0; j < p->L; j++)
        support += word[j] = cmb_key_word(j);
    join_members(p, false, word);
    for (int64_t i = 0; i < p->L; i++) {
        before += word[i];
        if (join_parts(p, false, word, i) != (p->is_causal ? before : support))
            query[count++] = (int32_t)i;
    }
    return count;
}

/* Of these queries how many come before the first whose parts leave a position out. Exact, 64 keys at a time: a bit
 * each. */
static int64_t count_full(const parts *p, uint64_t *word, const int32_t *query, int64_t count) {
    memset(word, 0, (size_t)p->L * sizeof *word);
    for (int64_t first = 0; first < p->L && count; first += 64) {
        int64_t end = cmb_least(first + 64, p->L);
        for (int64_t j = first; j < end; j++)
            word[j] = UINT64_C(1) << (j - first);
        join_members(p, true, word);
        for (int64_t n = 0; n < count; n++) {
            uint64_t support = cmb_lanes(0, (p->is_causal ? cmb_least(query[n] + 1, end) : end) - first);
            if (join_parts(p, true, word, query[n]) != support)
                count = n;
        }
        memset(word + first, 0, (size_t)(end - first) * sizeof *word);
    }
    return count;
}

/* The first position of its support that query i's parts leave out, or hold more than once where they must not; and in
 * word[0..L) how often they hold each. */
static int64_t find_key(const parts *p, uint64_t *word, int64_t i, cmb_cover cover) {
    memset(word, 0, (size_t)(p->L + p->R) * sizeof *word);
    for (int64_t n = p->direct->offset[i]; n < p->direct->offset[i + 1]; n++)
        word[p->direct->item[n]]++;
    for (int64_t n = p->regions->offset[i]; n < p->regions->offset[i + 1]; n++)
        word[p->L + p->regions->item[n]]++;
    for (int64_t r = p->R - 1; r >= 0; r--)
        for (int64_t n = p->members->offset[r]; n < p->members->offset[r + 1]; n++)
            word[p->members->item[n]] += word[p->L + r];
    int64_t key = 0;
    while (word[key] == 1 || (word[key] && cover == CMB_COVER_FULL))
        key++;
    return key;
}

static cmb_status refuse_cover(const parts *p, uint64_t *word, int64_t i, cmb_cover cover) {
    const char *demand = cover == CMB_COVER_FULL ? "at least once" : "exactly once";
    int64_t key = find_key(p, word, i, cover), part[2] = {0}, found = 0;
    if (!word[key])
        return cmb_fail(p->error, CMB_ERR_VALUE, "parts must cover query %lld's support %s, but key %lld is left out",
                        (long long)i, demand, (long long)key);
    memset(word, 0, (size_t)p->L * sizeof *word);
    word[key] = 1;
    join_members(p, false, word); /* how often each region holds the key */
    for (int64_t n = p->direct->offset[i]; n < p->direct->offset[i + 1] && found < 2; n++)
        if (p->direct->item[n] == key)
            part[found++] = key;
    for (int64_t n = p->regions->offset[i]; n < p->regions->offset[i + 1]; n++)
        for (uint64_t times = word[p->L + p->regions->item[n]]; times && found < 2; times--)
            part[found++] = p->L + p->regions->item[n];
    char name[2][40], where[120];
    for (int n = 0; n < 2; n++)
        snprintf(name[n], sizeof *name, part[n] < p->L ? "direct[%lld]" : "region %lld",
                 (long long)(part[n] < p->L ? i : part[n] - p->L));
    if (part[0] != part[1])
        snprintf(where, sizeof where, "in %s and in %s", name[0], name[1]);
    else if (part[0] < p->L || word[part[0]] > 1)
        snprintf(where, sizeof where, "twice in %s", name[0]);
    else
        snprintf(where, sizeof where, "in %s, which regions[%lld] holds twice", name[0], (long long)i);
    return cmb_fail(p->error, CMB_ERR_VALUE, "parts must cover query %lld's support %s, but key %lld lies %s",
                    (long long)i, demand, (long long)key, where);
}

static cmb_status check_cover(const parts *p, cmb_cover cover) {
    if (cover == CMB_COVER_ANY)
        return CMB_OK;
    size_t words = (size_t)(p->L + p->R) + 1;
    uint64_t *word = cmb_allocate(words * sizeof *word + (size_t)p->L * sizeof(int32_t));
    if (!word)
        return cmb_fail(p->error, CMB_ERR_MEMORY, "out of memory: checking what parts cover takes %zu words", words);
    int32_t *query = (int32_t *)(void *)(word + words);
    cmb_status status = CMB_OK;
    int64_t uneven = find_uneven(p, word, query);
    int64_t right = cover == CMB_COVER_FULL ? count_full(p, word, query, uneven) : 0;
    if (right < uneven)
        status = refuse_cover(p, word, query[right], cover);
    cmb_release(word);
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
            cost[w] += (double)unite_rows(p, a, cmb_least(width[w], p->L - a)) * (double)width[w];
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
    for (int64_t a = 0; a < p->L; a += CMB_TILE) {
        int64_t end = cmb_least(a + CMB_TILE, p->L);
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
        int64_t n = cmb_least(width, p->L - a), full = 0;
        if (a % CMB_TILE == 0 && !cmb_build_task(build))
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
                               cmb_cover cover, const cmb_plan_options *options, cmb_plan **plan, cmb_error *error) {
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
    cmb_status status = cmb_check_length(L, error);
    if (status || (status = check_lists(direct, "direct", L, error)) ||
        (status = check_lists(regions, "regions", L, error)))
        return status;
    if (p.R < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "members must not hold a negative number of lists, got %lld",
                        (long long)p.R);
    if (options->sparse)
        return cmb_fail(error, CMB_ERR_VALUE, "sparse must be false: parts say themselves what is left out");
    if ((unsigned)cover > CMB_COVER_PARTITION)
        return cmb_fail(error, CMB_ERR_VALUE, "cover must be any, full or partition, got %d", (int)cover);
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
    if (!status)
        status = check_cover(&p, cover);
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

// SPDX-License-Identifier: Apache-2.0
/* A user's own factorization: a plan from lists of positions and regions. First the lists are read and checked, then
 * what they cover; then regions are summarized, a wave for each depth of nesting, and queries attend in one more wave,
 * in tiles of neighbouring queries whose rows are united. */
#include "plan/build.h"
#include "plan/coverage.h"

#include <stdio.h>
#include <string.h>

/* What is known of a region. */
typedef struct {
    int32_t first, last; /* the lowest and the highest position below it */
    int32_t count;       /* positions below it, repeats counted; 0: a dead region, left out wherever it is listed */
    int32_t depth;       /* regions nested in one another below it */
    bool is_needed;      /* a query attends it, or a needed region has it as a member */
} region_facts;

/* A row in the union of what a tile's queries list. A query may list a row several times: the k-th slot of a row is for
 * the queries' k-th time, so that a row has as many slots as the query that lists it most often. */
typedef struct {
    uint64_t mask; /* the lanes that list the row for the k-th time */
    int32_t row;
    int32_t next; /* the row's next slot, or -1 */
    int32_t lane,
        now; /* only in the row's first slot: the last lane that listed the row, and the slot of its last time */
} union_slot;

typedef struct {
    cmb_build *build;
    int64_t L, R;
    bool is_causal;
    const cmb_lists *direct, *regions, *members;
    region_facts *region; /* [R] */
    int32_t *head;        /* [L + R] a row's first slot; not valid unless slot[head[row]] is one of that row */
    union_slot *slot;     /* [capacity] the rows of a tile */
    int64_t *key;         /* [capacity] their sort keys, or those of a region's members */
    int32_t *row;         /* [capacity] */
    uint64_t *mask;       /* [capacity] */
    int64_t capacity;
    cmb_error *error;
} parts;

static int64_t list_size(const cmb_lists *lists, int64_t n) { return lists->offset[n + 1] - lists->offset[n]; }

/* The number of parts of query i. */
static int64_t parts_of(const parts *p, int64_t i) { return list_size(p->direct, i) + list_size(p->regions, i); }

/* Ascending, in place. Not qsort, which may allocate, and cannot be cancelled. */
static void heap_sort(cmb_build *build, int64_t *key, int64_t count) {
    for (int64_t heap = count / 2, end = count; end > 1 && cmb_build_goes_on(build, 16);) {
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

/* Checks all lists and finds what is known of the regions. */
static cmb_status read_parts(parts *p) {
    cmb_status status = CMB_OK;
    for (int64_t r = 0; r < p->R && !status && cmb_build_goes_on(p->build, 4 + list_size(p->members, r)); r++)
        status = read_members(p, r);
    for (int64_t i = 0; i < p->L && !status && cmb_build_goes_on(p->build, 4 + parts_of(p, i)); i++)
        status = check_query(p, i);
    for (int64_t r = p->R - 1; r >= 0 && !status && cmb_build_goes_on(p->build, 4 + list_size(p->members, r)); r--)
        for (int64_t n = p->members->offset[r]; p->region[r].is_needed && n < p->members->offset[r + 1]; n++)
            if (p->members->item[n] >= p->L)
                p->region[p->members->item[n] - p->L].is_needed = true;
    return status;
}

/* ---- coverage ---- */

/* From the positions' words word[0 .. L) (coverage.h) makes the regions', word[L .. L+R): the sum, or the union, of
 * their members'. */
static void join_members(const parts *p, bool is_union, uint64_t *word) {
    for (int64_t r = 0; r < p->R && cmb_build_goes_on(p->build, 4 + list_size(p->members, r)); r++) {
        uint64_t joined = 0;
        for (int64_t n = p->members->offset[r]; n < p->members->offset[r + 1]; n++)
            joined = cmb_join(joined, word[p->members->item[n]], is_union);
        word[p->L + r] = joined;
    }
}

/* The word of query i: the sum, or the union, of its parts'. */
static uint64_t join_parts(const parts *p, bool is_union, const uint64_t *word, int64_t i) {
    uint64_t joined = 0;
    for (int64_t n = p->direct->offset[i]; n < p->direct->offset[i + 1]; n++)
        joined = cmb_join(joined, word[p->direct->item[n]], is_union);
    for (int64_t n = p->regions->offset[i]; n < p->regions->offset[i + 1]; n++)
        joined = cmb_join(joined, word[p->L + p->regions->item[n]], is_union);
    return joined;
}

/* Lists the queries whose parts are no partition of their support, in ascending order; returns how many there are. */
static int64_t find_uneven(const parts *p, uint64_t *word, int32_t *query) {
    uint64_t support = 0, before = 0;
    int64_t count = 0;
    for (int64_t j = 0; j < p->L && cmb_build_goes_on(p->build, 2); j++)
        support += word[j] = cmb_position_word(j);
    join_members(p, false, word);
    for (int64_t i = 0; i < p->L && cmb_build_goes_on(p->build, 4 + parts_of(p, i)); i++) {
        before += word[i];
        if (join_parts(p, false, word, i) != (p->is_causal ? before : support))
            query[count++] = (int32_t)i;
    }
    return count;
}

/* How many of these queries come before the first whose parts leave out a position: exact, 64 positions at a time, one
 * bit for each. */
static int64_t count_full(const parts *p, uint64_t *word, const int32_t *query, int64_t count) {
    memset(word, 0, (size_t)p->L * sizeof *word);
    for (int64_t first = 0; first < p->L && count && cmb_build_goes_on(p->build, 64); first += 64) {
        int64_t end = cmb_min(first + 64, p->L);
        for (int64_t j = first; j < end; j++)
            word[j] = UINT64_C(1) << (j - first);
        join_members(p, true, word);
        for (int64_t n = 0; n < count && cmb_build_goes_on(p->build, 4 + parts_of(p, query[n])); n++) {
            uint64_t support = cmb_lane_mask(0, (p->is_causal ? cmb_min(query[n] + 1, end) : end) - first);
            if (join_parts(p, true, word, query[n]) != support)
                count = n;
        }
        memset(word + first, 0, (size_t)(end - first) * sizeof *word);
    }
    return count;
}

/* The first position of its support that query i's parts do not hold as often as `cover` demands. word[0 .. L) becomes
 * how often they hold each position. */
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
    join_members(p, false, word); /* word[L + r]: how often region r holds the key */
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
    if (right < uneven && !p->build->status)
        status = refuse_cover(p, word, query[right], cover);
    cmb_release(word);
    return status;
}

/* Makes room for the rows of one tile, or the members of one region. False if there is none: the build has failed. */
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

/* Lists the positions below a region as sort keys, with repeats; returns how many there are. */
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

/* A live region attends its members as they are listed, if a query needs it, and pools them in position order, so that
 * ties go to the lowest position. */
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
    heap_sort(build, p->key, count);
    bool is_sorted = true, is_interleaved = false;
    for (int64_t n = 0, last = -1; n < count; n++) {
        int64_t row = p->key[n] & INT32_MAX, first = p->key[n] >> 32;
        is_sorted = is_sorted && row == p->row[n];
        is_interleaved = is_interleaved || first < last;
        int64_t end = row < p->L ? row : p->region[row - p->L].last;
        last = end > last ? end : last;
    }
    /* Members that interleave are in position order in no order of theirs: then the positions below are pooled, unless
     * the pool asks for no order (mean and sum). */
    if (is_interleaved && (build->plan.pooling == CMB_POOL_MAX || build->plan.pooling == CMB_POOL_FIRST)) {
        if (!make_room(p, p->region[r].count))
            return;
        count = collect_positions(p, r, stack, p->key);
        heap_sort(build, p->key, count);
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
    heap_sort(p->build, order, live);
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

/* Adds a row that lane t lists to the union of `slots` slots; returns how many slots there are then. Lanes come in
 * ascending order. */
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

/* Unites the rows that queries [a, a + n) list; returns the number of slots. */
static int32_t unite_rows(parts *p, int64_t a, int64_t n) {
    int32_t slots = 0;
    for (int32_t t = 0; t < n && cmb_build_goes_on(p->build, 4 + 2 * parts_of(p, a + t)); t++) {
        for (int64_t k = p->direct->offset[a + t]; k < p->direct->offset[a + t + 1]; k++)
            slots = unite_row(p, slots, (int32_t)p->direct->item[k], t);
        for (int64_t k = p->regions->offset[a + t]; k < p->regions->offset[a + t + 1]; k++)
            if (p->region[p->regions->item[k]].count)
                slots = unite_row(p, slots, (int32_t)(p->L + p->regions->item[k]), t);
    }
    return slots;
}

/* The widest of the widths whose cost is at most 1.25 times the lowest: wider tiles fetch fewer rows. */
static int64_t choose_width(parts *p) {
    const int64_t width[] = {16, 32, 64};
    double cost[3] = {0}, lowest_cost = 0;
    for (int w = 0; w < 3; w++) {
        for (int64_t a = 0; a < p->L; a += width[w])
            cost[w] += (double)unite_rows(p, a, cmb_min(width[w], p->L - a)) * (double)width[w];
        lowest_cost = w == 0 || cost[w] < lowest_cost ? cost[w] : lowest_cost;
    }
    int w = 2;
    while (cost[w] > 1.25 * lowest_cost)
        w--;
    return width[w];
}

static void attend_parts(parts *p) {
    cmb_build *build = p->build;
    int64_t max_items = 0;
    for (int64_t a = 0; a < p->L; a += CMB_TILE) {
        int64_t end = cmb_min(a + CMB_TILE, p->L);
        int64_t items = p->direct->offset[end] - p->direct->offset[a];
        if (__builtin_add_overflow(items, p->regions->offset[end] - p->regions->offset[a], &items) ||
            items >= INT32_MAX) {
            build->status = CMB_ERR_OVERFLOW;
            return;
        }
        max_items = items > max_items ? items : max_items;
    }
    if (build->status || !make_room(p, max_items + 1))
        return;
    int64_t width = choose_width(p);
    cmb_build_wave(build);
    for (int64_t a = 0; a < p->L; a += width) {
        int64_t n = cmb_min(width, p->L - a), full = 0;
        if (a % CMB_TILE == 0 && !cmb_build_task(build))
            break;
        int32_t slots = unite_rows(p, a, n);
        if (!slots)
            continue;
        for (int32_t s = 0; s < slots;
             s++) { /* first the rows that all lanes attend, then the others, each ascending */
            bool is_full = p->slot[s].mask == cmb_lane_mask(0, n);
            p->key[s] = (int64_t)!is_full << 62 | (int64_t)p->slot[s].row << 31 | s;
            full += is_full;
        }
        heap_sort(build, p->key, slots);
        for (int32_t k = 0; k < slots; k++) {
            const union_slot *slot = p->slot + (p->key[k] & INT32_MAX);
            p->row[k] = slot->row;
            p->mask[k] = slot->mask;
        }
        cmb_build_tile(build, cmb_list_make(a, 1, n), cmb_tile_width(n));
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
        .direct = direct,
        .regions = regions,
        .members = members,
        .error = error,
    };
    cmb_status status = cmb_check_options(L, options, error);
    if (!status && (!direct || !regions || !members))
        status = cmb_fail(error, CMB_ERR_VALUE, "%s is missing", !direct ? "direct" : !regions ? "regions" : "members");
    if (status)
        return status;
    p.R = members->count;
    p.is_causal = options->is_causal;
    if ((status = check_lists(direct, "direct", L, error)) || (status = check_lists(regions, "regions", L, error)))
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
    if (!status && !build.status)
        status = check_cover(&p, cover);
    if (status) {
        build.status = status;
        error = NULL; /* it is filled in already */
        goto out;
    }
    if (build.status) /* cut short: the regions are incomplete */
        goto out;
    summarize_parts(&p);
    attend_parts(&p);
out:
    cmb_release(p.region);
    cmb_release(p.head);
    cmb_release(p.slot);
    return cmb_build_end(&build, plan, error);
}

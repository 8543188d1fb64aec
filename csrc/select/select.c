// SPDX-License-Identifier: Apache-2.0
/* Which regions a block of queries opens (docs/mathematics.md, section 3): the index of a plan's regions by blocks,
 * checks and the entry point. select.inc.h computes, for each type. */
#include <math.h>
#include <string.h>

#include "kernels/kernels.h"
#include "plan/best.h"
#include "plan/read.h"
#include "runtime/arena.h"
#include "runtime/array.h"
#include "runtime/memory.h"
#include "runtime/threads.h"

enum {
    LANES = CMB_TILE, /* queries of a group, whose logits are computed together */
    TASK_BLOCKS = 16, /* blocks of a task */
};

/* Below this many multiply-adds, waking a thread costs more than it gives (about 20 us). */
static const double worth_a_thread = 1 << 20;

/* ---- the index of a plan ------------------------------------------------------------------------ */

/* A region that some queries of a group attend. */
typedef struct {
    int32_t region;
    uint64_t lanes; /* bit t: the group's query t attends it */
} part;

/* A block's queries in groups of up to LANES. A block that is scored by its first query has one group of one. */
typedef struct {
    int64_t groups; /* of all blocks */
    int64_t *first; /* [groups + 1] a group's parts are part[first[g] .. first[g + 1]) */
    part *part;     /* [first[groups]] */
} part_index;

typedef struct {
    const cmb_scoring *problem;
    int64_t blocks;           /* T */
    int64_t groups_per_block; /* but the last block may have fewer */
    cmb_cancel *cancel;
} layout;

static int64_t group_of(const layout *l, int64_t query) {
    const int64_t block = l->problem->block;
    return query / block * l->groups_per_block + query % block / LANES;
}

/* Whether the score looks at this query. */
static bool is_scored(const layout *l, int64_t query) {
    return !l->problem->by_first_query || query % l->problem->block == 0;
}

/* A part for each region of the run and each stretch of lanes of one group that attend it. Without `index->part`,
 * counts the parts of group g in first[g + 1]; with it, writes them from first[g] on. */
static void index_run(const layout *l, const cmb_plan *plan, const cmb_tile *tile, const cmb_run *run,
                      part_index *index) {
    const uint64_t all = cmb_lane_mask(0, tile->query.count);
    for (int32_t n = 0; n < run->row.count && !cmb_tick(l->cancel, 1); n++) {
        const int64_t r = cmb_list_at(plan, run->row, n) - plan->L;
        uint64_t lanes = run->mask < 0 ? all : plan->mask[run->mask + n];
        if (r < 0)
            continue;
        while (lanes) {
            part found = {(int32_t)r, 0};
            int64_t group = -1;
            for (; lanes; lanes &= lanes - 1) {
                const int64_t query = cmb_list_at(plan, tile->query, __builtin_ctzll(lanes));
                if (!is_scored(l, query))
                    continue;
                if (group >= 0 && group_of(l, query) != group)
                    break;
                group = group_of(l, query);
                found.lanes |= UINT64_C(1) << query % l->problem->block % LANES;
            }
            if (group < 0)
                break;
            if (index->part)
                index->part[index->first[group]++] = found;
            else
                index->first[group + 1]++;
        }
    }
}

static void index_tiles(const layout *l, const cmb_plan *plan, part_index *index) {
    for (int32_t tile = 0; tile < plan->tiles; tile++) {
        const cmb_tile *t = plan->tile + tile;
        if (cmb_list_at(plan, t->query, 0) >= plan->L)
            continue;
        for (int32_t run = t[0].run; run < t[1].run; run++) {
            const cmb_list row = plan->run[run].row;
            if (!row.step || cmb_list_range(row).high >= plan->L)
                index_run(l, plan, t, plan->run + run, index);
        }
    }
}

static void free_index(part_index *index) {
    cmb_release(index->first);
    cmb_release(index->part);
}

static cmb_status make_index(const layout *l, const cmb_plan *plan, part_index *index, cmb_error *error) {
    *index = (part_index){.groups = l->blocks * l->groups_per_block};
    const size_t count = (size_t)index->groups + 2;
    index->first = cmb_allocate(count * sizeof *index->first);
    if (!index->first)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory: %zu bytes for the regions of blocks",
                        count * sizeof *index->first);
    memset(index->first, 0, count * sizeof *index->first);
    index_tiles(l, plan, index);
    for (int64_t g = 0; g < index->groups; g++)
        index->first[g + 1] += index->first[g];
    const size_t bytes = ((size_t)index->first[index->groups] + 1) * sizeof *index->part;
    index->part = cmb_allocate(bytes);
    if (!index->part)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory: %zu bytes for the regions of blocks", bytes);
    /* Writing moves first[g] to the end of group g, which is where group g + 1 began. */
    index_tiles(l, plan, index);
    memmove(index->first + 1, index->first, (size_t)index->groups * sizeof *index->first);
    index->first[0] = 0;
    return cmb_cancel_status(l->cancel, error);
}

/* ---- regions that a mask leaves empty, and their sizes ------------------------------------------- */

/* row[r]: the unmasked positions below region r of a plan, for batch entry b; 1 for regions that the caller gives.
 * `row` is memory for R + N numbers. */
static void count_below(const cmb_scoring *p, const cmb_plan *plan, int64_t b, int64_t *row, cmb_cancel *cancel) {
    for (int32_t r = 0; r < plan->R; r++)
        row[r] = plan->pools == 0;
    for (int32_t n = 0; n < plan->pools && !cmb_tick(cancel, 1 + plan->pool[n].child.count); n++) {
        const cmb_pool *pool = plan->pool + n;
        int64_t count = 0;
        for (int32_t k = 0; k < pool->child.count; k++) {
            const int64_t child = cmb_list_at(plan, pool->child, k);
            if (child >= plan->L)
                count += row[child - plan->L];
            else
                count += !p->key_mask || p->key_mask[b * p->mask_batch + child * p->mask_row];
        }
        row[pool->row - plan->L] = count;
    }
}

/* ---- for each type ------------------------------------------------------------------------------ */

#define PASTE2(a, b) a##_##b
#define NAME2(a, b) PASTE2(a, b)

#define REAL float
#define SUFFIX f32
#include "select/select.inc.h"

#undef REAL
#undef SUFFIX
#define REAL double
#define SUFFIX f64
#include "select/select.inc.h"

/* ---- the entry point ---------------------------------------------------------------------------- */

static cmb_status check(const cmb_scoring *p, cmb_error *error) {
    if (!p)
        return cmb_fail(error, CMB_ERR_VALUE, "problem is missing");
    if (p->dtype != CMB_FLOAT32 && p->dtype != CMB_FLOAT64)
        return cmb_fail(error, CMB_ERR_VALUE, "dtype must be CMB_FLOAT32 or CMB_FLOAT64, got %d", (int)p->dtype);
    const struct {
        const char *name;
        int64_t value, least, most;
    } sizes[] = {
        {"B", p->B, 0, INT64_MAX},        {"Hk", p->Hk, 0, INT64_MAX},
        {"Hq", p->Hq, 0, INT64_MAX},      {"L", p->L, 0, INT64_C(1) << 30},
        {"D", p->D, 1, CMB_MAX_FEATURES}, {"block", p->block, 1, INT64_MAX},
        {"k", p->k, 0, INT32_MAX},        {"score", p->score, CMB_SCORE_MAX, CMB_SCORE_MEAN},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < sizes[i].least || sizes[i].value > sizes[i].most)
            return cmb_fail(error, CMB_ERR_VALUE, "%s must be between %lld and %lld, got %lld", sizes[i].name,
                            (long long)sizes[i].least, (long long)sizes[i].most, (long long)sizes[i].value);
    if (p->Hk ? p->Hq % p->Hk : p->Hq)
        return cmb_fail(error, CMB_ERR_VALUE, "Hq must be a multiple of Hk, got %lld and %lld", (long long)p->Hq,
                        (long long)p->Hk);
    int64_t heads;
    if (__builtin_mul_overflow(p->B, p->Hk, &heads))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "B * Hk does not fit in 64 bits");
    if (!p->plan || (p->plans != 1 && p->plans != heads))
        return cmb_fail(error, CMB_ERR_VALUE, "plans must be 1 or B * Hk, %lld, got %lld", (long long)heads,
                        (long long)p->plans);
    int64_t R = 0;
    for (int64_t n = 0; n < p->plans; n++) {
        if (!p->plan[n] || p->plan[n]->L != p->L)
            return cmb_fail(error, CMB_ERR_VALUE, "plan %lld must be of length %lld", (long long)n, (long long)p->L);
        if (p->plan[n]->is_slice)
            return cmb_fail(error, CMB_ERR_VALUE, "plan %lld must be whole, got a slice", (long long)n);
        R = p->plan[n]->R > R ? p->plan[n]->R : R;
    }
    TRY(cmb_check_array("query", &p->query, p->B, p->Hq, p->L, p->D, error));
    const int64_t key_heads = p->region_key.heads == p->Hq ? p->Hq : p->Hk;
    if (R > 0)
        TRY(cmb_check_array("region_key", &p->region_key, p->B, key_heads, R, p->D, error));
    if (!p->regions && p->k > 0)
        return cmb_fail(error, CMB_ERR_VALUE, "regions is missing");
    return CMB_OK;
}

cmb_status cmb_select(const cmb_scoring *problem, const cmb_interrupt *interrupt, cmb_error *error) {
    TRY(check(problem, error));
    const cmb_scoring *p = problem;
    if (p->B == 0 || p->Hk == 0 || p->L == 0 || p->k == 0)
        return CMB_OK;
    cmb_cancel cancel;
    cmb_cancel_init(&cancel, interrupt);
    const int64_t block = p->block < p->L ? p->block : p->L;
    const layout l = {.problem = p,
                      .blocks = (p->L + p->block - 1) / p->block,
                      .groups_per_block = p->by_first_query ? 1 : (block + LANES - 1) / LANES,
                      .cancel = &cancel};
    part_index *index = cmb_allocate((size_t)p->plans * sizeof *index);
    if (!index)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory: %zu bytes", (size_t)p->plans * sizeof *index);
    memset(index, 0, (size_t)p->plans * sizeof *index);
    cmb_status status = CMB_OK;
    for (int64_t n = 0; n < p->plans && !status; n++)
        status = make_index(&l, p->plan[n], &index[n], error);
    if (!status)
        status = p->dtype == CMB_FLOAT32 ? execute_f32(&l, index, error) : execute_f64(&l, index, error);
    for (int64_t n = 0; n < p->plans; n++)
        free_index(&index[n]);
    cmb_release(index);
    return status;
}

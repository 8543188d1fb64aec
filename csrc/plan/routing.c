// SPDX-License-Identifier: Apache-2.0
/* Routing (docs/mathematics.md, section 3): a query attends its own cluster, and every other cluster through a region.
 * A query attends its own cluster in a tile of queries of that cluster. The regions it attends in the same tile if not
 * causal; if causal, in a later wave, in a tile of neighbouring positions. Causal plans keep the prefix rule of
 * build.h. */
#include "plan/build.h"

#include <string.h>

enum { TASK_MEMBERS = 512 }; /* queries of a task */

typedef struct {
    cmb_build *build;
    int64_t L, C;           /* C: one more than the largest cluster */
    const int64_t *cluster; /* [L] */
    int32_t *first;         /* [C + 1] a cluster's members are member[first[c] .. first[c + 1]) */
    int32_t *member;        /* [L] positions, cluster by cluster */
    int32_t *next;          /* [L] the next member of a position's cluster, or L */
    int32_t *last;          /* [C] the cluster's last member so far, or -1 */
    int32_t *row;           /* [C + L] a list in the making */
    uint64_t *mask;         /* [C + L] its masks */
} routing;

static void sort_members(routing *r) {
    for (int64_t i = 0; i < r->L; i++)
        r->first[r->cluster[i] + 1]++;
    for (int64_t c = 0; c < r->C; c++) {
        r->first[c + 1] += r->first[c];
        r->last[c] = -1;
    }
    memcpy(r->row, r->first, (size_t)r->C * sizeof *r->row);
    for (int64_t i = 0; i < r->L; i++) {
        int64_t c = r->cluster[i];
        if (r->last[c] >= 0)
            r->next[r->last[c]] = (int32_t)i;
        r->next[i] = (int32_t)r->L;
        r->last[c] = (int32_t)i;
        r->member[r->row[c]++] = (int32_t)i;
    }
}

/* Causal: region t is the members of t's cluster up to t. The queries between t and the next member attend it. */
static void summarize_prefixes(routing *r, int64_t c, cmb_list members) {
    const int32_t *member = r->member + r->first[c];
    for (int64_t k = 0; k < members.count; k++)
        cmb_build_pool(r->build, r->L + member[k],
                       k ? cmb_list_make(r->L + member[k - 1], member[k] - r->L - member[k - 1], 2)
                         : cmb_list_make(member[k], 1, 1));
    for (int64_t a = 0; a < members.count; a += CMB_TILE) {
        int32_t lane[CMB_TILE];
        uint64_t mask[CMB_TILE];
        int64_t n = cmb_min(CMB_TILE, members.count - a), lanes = 0;
        memset(mask, 0, sizeof mask);
        for (int64_t k = 0; k < n; k++) {
            if (r->next[member[a + k]] == member[a + k] + 1)
                continue;
            for (int64_t e = 0; e <= k; e++)
                mask[e] |= cmb_lane_mask(lanes, lanes + 1);
            lane[lanes++] = (int32_t)(r->L + member[a + k]);
        }
        if (!lanes)
            continue;
        cmb_build_tile(r->build, cmb_build_list(r->build, lane, lanes), cmb_tile_width(lanes));
        cmb_build_run(r->build, cmb_list_cut(members, 0, a));
        cmb_build_masked_run(r->build, cmb_list_cut(members, a, a + n), mask);
    }
}

/* Queries [a, a + n) attend the other clusters' members before them: first the regions that end before a, which a lane
 * attends until the cluster's next member; then those that end inside [a, a + n). */
static void attend_prefixes(routing *r, int64_t a, int64_t n) {
    int64_t rows = 0;
    for (int64_t c = 0; c < r->C && cmb_build_goes_on(r->build, 1); c++) {
        if (r->last[c] < 0 || r->next[r->last[c]] == a)
            continue;
        r->row[rows] = (int32_t)(r->L + r->last[c]);
        r->mask[rows++] = cmb_lane_mask(0, cmb_min(r->next[r->last[c]] - a, n));
    }
    for (int64_t i = a; i < a + n; i++) {
        r->last[r->cluster[i]] = (int32_t)i;
        uint64_t lanes = cmb_lane_mask(i + 1 - a, cmb_min(r->next[i] - a, n));
        if (!lanes)
            continue;
        r->row[rows] = (int32_t)(r->L + i);
        r->mask[rows++] = lanes;
    }
    if (!rows)
        return;
    cmb_build_tile(r->build, cmb_list_make(a, 1, n), cmb_tile_width(n));
    cmb_list row = cmb_build_list(r->build, r->row, rows);
    /* Stretches of rows that all lanes attend become runs without masks. */
    enum { WORTH_A_RUN = 5 };
    int64_t done = 0;
    for (int64_t k = 0; k < rows;) {
        int64_t end = k;
        while (end < rows && r->mask[end] == cmb_lane_mask(0, n))
            end++;
        if (end - k >= WORTH_A_RUN || (end == rows && k == 0)) {
            cmb_build_masked_run(r->build, cmb_list_cut(row, done, k), r->mask + done);
            cmb_build_run(r->build, cmb_list_cut(row, k, end));
            done = end;
        }
        k = end + 1;
    }
    cmb_build_masked_run(r->build, cmb_list_cut(row, done, rows), r->mask + done);
}

static void build_causal(routing *r, cmb_list members, bool is_sparse) {
    cmb_build_wave(r->build);
    for (int64_t c = 0; c < r->C && cmb_build_goes_on(r->build, 4); c++) {
        cmb_list own = cmb_list_cut(members, r->first[c], r->first[c + 1]);
        if (!own.count)
            continue;
        if (!cmb_build_task(r->build))
            return;
        cmb_build_attend(r->build, own, &(cmb_span){own, CMB_UP_TO}, 1);
        if (!is_sparse)
            summarize_prefixes(r, c, own);
    }
    if (is_sparse)
        return;
    for (int64_t c = 0; c < r->C; c++)
        r->last[c] = -1;
    cmb_build_wave(r->build);
    for (int64_t a = 0; a < r->L; a += CMB_TILE) {
        if (a % TASK_MEMBERS == 0 && !cmb_build_task(r->build))
            return;
        attend_prefixes(r, a, cmb_min(CMB_TILE, r->L - a));
    }
}

/* Not causal: region c is cluster c. */
static void build_whole(routing *r, cmb_list members, bool is_sparse) {
    int64_t live = 0, queries = 0;
    for (int64_t c = 0; c < r->C; c++)
        if (r->first[c + 1] > r->first[c])
            r->row[live++] = (int32_t)(r->L + c);
    cmb_list region = cmb_build_list(r->build, r->row, is_sparse ? 0 : live);
    cmb_build_wave(r->build);
    for (int64_t k = 0; k < region.count; k++) {
        int64_t c = r->row[k] - r->L;
        cmb_list own = cmb_list_cut(members, r->first[c], r->first[c + 1]);
        if (k % 16 == 0 && !cmb_build_task(r->build))
            return;
        cmb_build_pool(r->build, r->L + c, own);
        if (live < 2)
            continue;
        cmb_build_tile(r->build, cmb_list_make(r->L + c, 1, 1), 1);
        cmb_build_run(r->build, own);
    }
    cmb_build_wave(r->build);
    for (int64_t k = 0; k < live; k++) {
        int64_t c = r->row[k] - r->L;
        cmb_list own = cmb_list_cut(members, r->first[c], r->first[c + 1]);
        const cmb_span span[] = {{cmb_list_cut(region, 0, k), CMB_EVERY},
                                 {cmb_list_cut(region, k + 1, region.count), CMB_EVERY},
                                 {own, CMB_EVERY}};
        for (int64_t a = 0; a < own.count; a += TASK_MEMBERS) {
            cmb_list query = cmb_list_cut(own, a, a + TASK_MEMBERS);
            if ((queries == 0 || queries + query.count > TASK_MEMBERS) && !cmb_build_task(r->build))
                return;
            queries = (queries + query.count > TASK_MEMBERS ? 0 : queries) + query.count;
            cmb_build_attend(r->build, query, span, 3);
        }
    }
}

cmb_status cmb_plan_routing(int64_t L, const int64_t *cluster, const cmb_plan_options *options, cmb_plan **plan,
                            cmb_error *error) {
    *plan = NULL;
    cmb_build build;
    cmb_status status = cmb_check_options(L, options, error);
    if (status)
        return status;
    if (L > 0 && !cluster)
        return cmb_fail(error, CMB_ERR_VALUE, "cluster is missing");
    routing r = {.build = &build, .L = L, .cluster = cluster};
    for (int64_t i = 0; i < L; i++) {
        if (cluster[i] < 0 || cluster[i] >= INT64_C(1) << 30)
            return cmb_fail(error, CMB_ERR_VALUE, "clusters must lie between 0 and 2^30 - 1, got %lld at position %lld",
                            (long long)cluster[i], (long long)i);
        r.C = cluster[i] >= r.C ? cluster[i] + 1 : r.C;
    }
    status = cmb_build_begin(&build, L, options->sparse ? 0 : options->is_causal ? L : r.C, 0, options, error);
    if (status)
        return status;
    const size_t l = (size_t)L, c = (size_t)r.C;
    const size_t bytes = (l + c) * sizeof *r.mask + (3 * (l + c) + 1) * sizeof *r.row;
    void *memory = cmb_allocate(bytes);
    if (memory) {
        memset(memory, 0, bytes);
        r.mask = memory;
        r.row = (int32_t *)(void *)(r.mask + l + c);
        r.first = r.row + l + c;
        r.last = r.first + c + 1;
        r.member = r.last + c;
        r.next = r.member + l;
        sort_members(&r);
        cmb_list members = cmb_build_list(&build, r.member, L);
        (options->is_causal ? build_causal : build_whole)(&r, members, options->sparse);
    } else
        build.status = CMB_ERR_MEMORY;
    cmb_release(memory);
    return cmb_build_end(&build, plan, error);
}

// SPDX-License-Identifier: Apache-2.0
/* Making plans: a builder states waves, tasks, pool steps, tiles and runs in order. Internal. */
#ifndef CMB_BUILD_H
#define CMB_BUILD_H

#include "plan/past.h"
#include "plan/plan.h"

/* The prefix rule. The first positions of a causal sequence have the bits that they have alone, whatever follows them.
 * So every builder of a causal plan
 *   - anchors tiles, tasks and the order of rows at absolute positions, never at what remains of the length;
 *   - gives a query the same rows in the same order for every length;
 *   - may leave out, in a shorter plan, rows that none of its lanes attends at the end of a tile's rows, and nowhere
 *     else: chunks, pairs of rows and groups of pairs are counted from a tile's first row (kernels.h). */

typedef struct {
    void *data;
    int64_t count, capacity;
} cmb_vector;

/* A plan in the making. The first failure is kept and turns every later call into a no-op, so a builder reads as the
 * list of what it makes. A builder leaves its loops when cmb_build_task or cmb_build_goes_on says false. */
typedef struct {
    cmb_plan plan; /* sizes and flags; the arrays are the vectors until cmb_build_end */
    /* The plan of a decoder continues one of the sequence's first `first` positions: it has the queries from `first` on
     * (and may have those that share a tile with them), and pools and summarizes the regions that the plan of `first`
     * positions does not. 0: a whole plan. */
    int64_t first;
    const cmb_past *past; /* where the rows of a continued sequence are; NULL for a whole plan */
    bool is_placed;       /* its rows are those of `past` */
    cmb_vector wave, task, pool, tile, run, index, mask;
    cmb_vector known; /* hash table of the mask sequences so far: runs with the same masks share them */
    cmb_cancel cancel;
    cmb_status status;
    /* The first memory of the vectors. The plan of a step is small, and twenty allocations would take as long as the
     * rest of its making. */
    size_t used;
    _Alignas(16) char memory[4096];
} cmb_build;

/* Whether the options are there and 0 <= L <= 2^30. */
cmb_status cmb_check_options(int64_t L, const cmb_plan_options *options, cmb_error *error);
/* Checks the sizes and options and starts a build, which cmb_build_end must end. If this fails, there is no build. */
cmb_status cmb_build_begin(cmb_build *build, int64_t L, int64_t R, int64_t N, const cmb_plan_options *options,
                           cmb_error *error);
/* Whether to go on; counts `work` units (cmb_tick) beyond those that the functions below count. */
bool cmb_build_goes_on(cmb_build *build, int64_t work);
/* Starts a wave: the tasks up to the next cmb_build_wave belong to it. */
void cmb_build_wave(cmb_build *build);
/* Starts a task: the pool steps and tiles up to the next cmb_build_task belong to it. */
bool cmb_build_task(cmb_build *build);
void cmb_build_pool(cmb_build *build, int64_t row, cmb_list child);
/* Starts a tile. At least one run that is not empty must follow. */
void cmb_build_tile(cmb_build *build, cmb_list query, int32_t width);
/* Adds a run without masks, unless the list is empty. */
void cmb_build_run(cmb_build *build, cmb_list row);
/* Adds a run with mask[n] for its n-th row, without the rows at its end that no lane attends. */
void cmb_build_masked_run(cmb_build *build, cmb_list row, const uint64_t *mask);
/* The same with every row, unless the list is empty. */
void cmb_build_untrimmed_run(cmb_build *build, cmb_list row, const uint64_t *mask);
/* These rows as a list: start and step if they have one step, else a new stretch of the index array. */
cmb_list cmb_build_list(cmb_build *build, const int32_t *row, int64_t count);

/* Makes every list of another plan a list of this one. Comes before all lists of its own. */
void cmb_build_lists_of(cmb_build *build, const cmb_plan *plan);

/* Which elements of a span the queries attend, by the numbers of both in their lists. For three queries and the four
 * rows e0 .. e3 of a span:
 *
 *            CMB_EVERY    CMB_UP_TO    CMB_AFTER    CMB_OTHERS
 *   query    0  1  2      0  1  2      0  1  2      0  1  2
 *   e0       x  x  x      x  x  x      .  .  .      .  x  x
 *   e1       x  x  x      .  x  x      x  .  .      x  .  x
 *   e2       x  x  x      .  .  x      x  x  .      x  x  .
 *   e3       x  x  x      .  .  .      x  x  x      x  x  x
 */
typedef enum {
    CMB_EVERY,
    CMB_UP_TO,
    CMB_AFTER,
    CMB_OTHERS,
} cmb_visibility;

typedef struct {
    cmb_list row;
    cmb_visibility visibility;
} cmb_span;

/* The queries attend what they see of the spans, in tiles of CMB_TILE queries. The list of a CMB_OTHERS span has a
 * step, and so have those of CMB_UP_TO spans if there are several.
 *
 * A tile of queries [a, a + n) takes its rows in the order of the spans, except for elements [a, a + n) of CMB_UP_TO
 * spans: these come last, element by element, so that a shorter plan lacks rows at the end alone. */
void cmb_build_attend(cmb_build *build, cmb_list query, const cmb_span *span, int spans);
/* Only the tile that begins with query a. */
void cmb_build_attend_from(cmb_build *build, cmb_list query, int64_t a, const cmb_span *span, int spans);

/* The plan of `from`, which continues a sequence, with its rows where the past has them (place.c). */
cmb_status cmb_place_plan(const cmb_plan *from, const cmb_past *past, const cmb_interrupt *interrupt, cmb_plan **plan,
                          cmb_error *error);

/* The finished plan, its rows where the past has them, or NULL and the first failure. Releases everything that the
 * build holds. */
cmb_status cmb_build_end(cmb_build *build, cmb_plan **plan, cmb_error *error);

#endif

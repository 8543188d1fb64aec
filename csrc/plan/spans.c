// SPDX-License-Identifier: Apache-2.0
/* Plans whose regions are spans: their tasks and tiles. */
#include "plan/spans.h"

enum {
    SPAN_QUERIES = 256, /* positions of a task at most: whole spans together, or a piece of a longer span */
};

/* The end of the task that begins with position a, in both waves: whole spans, or a part of a long one. */
static int64_t task_end(const cmb_build *build, int64_t span, int64_t a) {
    int64_t whole = span < CMB_TILE ? CMB_TILE / span * span : span;
    if (whole < SPAN_QUERIES)
        return cmb_min(a + SPAN_QUERIES / whole * whole, build->plan.L);
    return cmb_min(cmb_min(a + SPAN_QUERIES, (a / span + 1) * span), build->plan.L);
}

void cmb_build_spans(cmb_build *build, int64_t span, int64_t window) {
    const int64_t L = build->plan.L;
    int64_t c = cmb_complete(build->first, span, window);
    cmb_build_wave(build);
    for (int64_t a = c * span, end; a < L && cmb_build_task(build); a = end) {
        end = task_end(build, span, a);
        for (; c < build->plan.R && cmb_min((c + 1) * span, L) <= end; c++) {
            cmb_list own = cmb_list_make(c * span, 1, cmb_min(span, L - c * span));
            const bool is_seen_after = (c + 1) * span + window <= L;
            const bool is_seen_before = !build->plan.is_causal && c * span >= window;
            /* Spans that no query sees are pooled too, so that their members are on record; in a plan that continues,
             * they are left to the plan that sees them. */
            if (is_seen_after || !build->past)
                cmb_build_pool(build, L + c, own);
            if (!is_seen_after && !is_seen_before)
                continue;
            cmb_build_tile(build, cmb_list_make(L + c, 1, 1), 1);
            cmb_build_run(build, own);
        }
    }
}

/* The start of the tile that holds query i. */
static int64_t tile_start(const cmb_span_tiles *tile, int64_t i) {
    const int64_t whole = tile->span < CMB_TILE ? CMB_TILE / tile->span * tile->span : tile->span;
    const int64_t origin = i < tile->shift ? 0 : tile->shift, within = i < tile->shift ? i : (i - origin) % whole;
    return i - within + within / CMB_TILE * CMB_TILE;
}

bool cmb_next_span_tile(cmb_build *build, cmb_span_tiles *tile) {
    const int64_t L = build->plan.L, span = tile->span, shift = tile->shift;
    const bool is_first = tile->end == 0;
    const int64_t a = is_first ? tile_start(tile, build->first) : tile->a + tile->n;
    if (a >= L || !cmb_build_goes_on(build, 0))
        return false;
    if (is_first || a == tile->end) {
        if (!cmb_build_task(build))
            return false;
        tile->end = cmb_min(a < shift ? cmb_min(a + SPAN_QUERIES, shift) : shift + task_end(build, span, a - shift), L);
    }
    const int64_t end = tile->end;
    tile->a = a;
    if (a < shift)
        tile->n = cmb_min(end - a, CMB_TILE);
    else if (span < CMB_TILE)
        tile->n = cmb_min(end - a, CMB_TILE / span * span);
    else
        tile->n = cmb_min(end - a, cmb_min(CMB_TILE, span - (a - shift) % span));
    return true;
}

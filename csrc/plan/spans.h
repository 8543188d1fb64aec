// SPDX-License-Identifier: Apache-2.0
/* Plans whose regions are spans: row L + c is the region of positions [c * span, (c + 1) * span), clipped to L. One
 * wave summarizes the spans, the next attends. Internal. */
#ifndef CMB_SPANS_H
#define CMB_SPANS_H

#include "plan/build.h"

/* The wave that summarizes all plan.R spans. Only spans that some query sees get a tile: a causal query i sees span c
 * as a region if i >= (c + 1) * span + window - 1; otherwise also if i <= c * span - window. */
void cmb_build_spans(cmb_build *build, int64_t span, int64_t window);

/* The tiles of the wave that attends, queries [a, a + n) each. They begin at `shift` modulo the span, 0 <= shift <
 * span. A tile of spans of CMB_TILE or more ends there too, and shorter spans are whole in a tile. If causal queries
 * begin to see spans at `shift` modulo the span, the t-th task sees what the first t tasks have summarized, and the
 * waves are fusible. */
typedef struct {
    int64_t span, shift;
    int64_t end; /* of the task at hand */
    int64_t a, n;
} cmb_span_tiles;

/* The next tile, from one that is zero but for span and shift; false after the last one, or if the build has failed.
 * Starts the tasks. */
bool cmb_next_span_tile(cmb_build *build, cmb_span_tiles *tile);

#endif

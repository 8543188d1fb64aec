// SPDX-License-Identifier: Apache-2.0
/* A problem's components and packed sequences, and what follows from its plans and arrays. Internal. */
#ifndef CMB_PROBLEM_H
#define CMB_PROBLEM_H

#include "combiner.h"

/* One packed sequence, as one component sees it. */
typedef struct {
    int64_t first, L;            /* its positions are [first, first + L) of the problem */
    int64_t first_row, queries;  /* rows [first_row, first_row + queries) of query and of results are its queries: all
                                  * of its positions, or those of a slice */
    int64_t first_region, R;     /* its regions are rows [first_region, first_region + R) of the region axis */
    int64_t dropout_row;         /* rows of the segment's earlier components, which dropout numbers first */
    const cmb_plan *const *plan; /* one for all heads, or [B, Hk]; R is the largest of theirs */
} cmb_segment;

/* 1 too where there are no heads, and so no plans. */
int64_t cmb_count_components(const cmb_problem *p);
int64_t cmb_count_segments(const cmb_problem *p);

/* Rows of query and of its results: L, or those of the segments' slices. */
int64_t cmb_count_queries(const cmb_problem *p);

/* Segment s of component c; where its queries, its regions and dropout's rows begin is left 0. */
cmb_segment cmb_segment_at(const cmb_problem *p, int64_t c, int64_t s);

/* All segments of component c. Regions lie segment by segment, in each component by component. */
void cmb_find_segments(const cmb_problem *p, int64_t c, cmb_segment *segment);

/* Rows of the region axis: the sum of R over segments and components. */
int64_t cmb_count_regions(const cmb_problem *p);

/* Whether some component sums weighted keys: summary_key is one of its results. */
bool cmb_has_weighted_plans(const cmb_problem *p);

/* ---- of a problem with one component ------------------------------------------------------------ */

/* Whether q_R is pooled, rather than given or the row of a picked position. */
bool cmb_pools_query(const cmb_problem *p);

/* Whether k_R is the row of a picked position. */
bool cmb_picks_key(const cmb_problem *p);

/* The caller's array that k_R is read from or kept in; its data may be NULL. */
const cmb_array *cmb_region_key_of(const cmb_problem *p);

/* Whether some row has a bias. */
bool cmb_has_biases(const cmb_problem *p);

/* Whether b_R follows from key_bias, as k_R from key. */
bool cmb_makes_region_bias(const cmb_problem *p);

/* The caller's array that b_R is read from or kept in; its data may be NULL. */
const cmb_array *cmb_region_bias_of(const cmb_problem *p);

#endif

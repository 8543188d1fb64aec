// SPDX-License-Identifier: Apache-2.0
#include "engine/problem.h"

#include <fenv.h>
#include <math.h>

int64_t cmb_count_components(const cmb_problem *p) { return p->components > 0 && p->plans > 0 ? p->components : 1; }

int64_t cmb_count_segments(const cmb_problem *p) { return p->segment ? p->segments : 1; }

int64_t cmb_count_queries(const cmb_problem *p) {
    int64_t queries = 0;
    if (p->plans == 0 || !p->plan[0]->is_slice)
        return p->L;
    for (int64_t s = 0; s < cmb_count_segments(p); s++)
        queries += cmb_segment_at(p, 0, s).queries;
    return queries;
}

cmb_segment cmb_segment_at(const cmb_problem *p, int64_t c, int64_t s) {
    const int64_t segments = cmb_count_segments(p);
    const int64_t plans = segments ? p->plans / cmb_count_components(p) / segments : 0;
    cmb_segment it = {.L = p->L, .plan = p->plan + (c * segments + s) * plans};
    if (p->segment) {
        it.first = p->segment[s];
        it.L = p->segment[s + 1] - it.first;
    }
    it.queries = plans && it.plan[0]->is_slice ? it.plan[0]->queries : it.L;
    for (int64_t i = 0; i < plans; i++)
        it.R = it.plan[i]->R > it.R ? it.plan[i]->R : it.R;
    return it;
}

void cmb_queries_of_plan(const cmb_problem *p, int64_t n, int64_t *first, int64_t *count) {
    const int64_t segments = cmb_count_segments(p), all = segments * cmb_count_components(p);
    if (all == 0 || p->plans < all) { /* which cmb_check_problem refuses */
        *first = *count = 0;
        return;
    }
    const int64_t s = n / (p->plans / all) % segments;
    const int64_t begin = p->segment ? p->segment[s] : 0, end = p->segment ? p->segment[s + 1] : p->L;
    const int64_t from = *first > begin ? *first : begin, to = *first + *count < end ? *first + *count : end;
    *count = to > from ? to - from : 0;
    *first = *count ? from - begin : 0;
}

void cmb_find_segments(const cmb_problem *p, int64_t c, cmb_segment *segment) {
    int64_t region = 0, query = 0;
    for (int64_t s = 0; s < cmb_count_segments(p); s++) {
        for (int64_t n = 0, row = 0; n < cmb_count_components(p); n++) {
            cmb_segment it = cmb_segment_at(p, n, s);
            it.first_row = query;
            it.first_region = region;
            it.dropout_row = row;
            if (n == c)
                segment[s] = it;
            region += it.R;
            row += it.L + it.R;
        }
        query += segment[s].queries;
    }
}

int64_t cmb_count_regions(const cmb_problem *p) {
    int64_t R = 0;
    for (int64_t c = 0; c < cmb_count_components(p); c++)
        for (int64_t s = 0; s < cmb_count_segments(p); s++)
            R += cmb_segment_at(p, c, s).R;
    return R;
}

bool cmb_has_weighted_plans(const cmb_problem *p) {
    const int64_t components = cmb_count_components(p), plans = p->plans / components;
    for (int64_t c = 0; plans > 0 && c < components; c++)
        if (p->plan[c * plans]->weighted)
            return true;
    return false;
}

bool cmb_pools_query(const cmb_problem *p) {
    return p->stages & CMB_SUMMARIZE && !p->region_query.data && p->plan[0]->pooling != CMB_POOL_FIRST;
}

bool cmb_picks_key(const cmb_problem *p) { return p->plan[0]->pooling == CMB_POOL_FIRST && !p->plan[0]->weighted; }

const cmb_array *cmb_region_key_of(const cmb_problem *p) {
    if (!(p->stages & CMB_SUMMARIZE))
        return &p->summary_key;
    const bool is_kept = p->summary_key.data && p->plan[0]->weighted; /* for backward */
    return !p->region_key.data && is_kept ? &p->summary_key : &p->region_key;
}

bool cmb_has_biases(const cmb_problem *p) { return p->key_bias.data || cmb_region_bias_of(p)->data; }

bool cmb_makes_region_bias(const cmb_problem *p) {
    return p->stages & CMB_SUMMARIZE && p->key_bias.data && !p->region_bias.data;
}

const cmb_array *cmb_region_bias_of(const cmb_problem *p) {
    const bool is_kept = p->summary_bias.data && p->plan[0]->weighted;
    return !(p->stages & CMB_SUMMARIZE) || (cmb_makes_region_bias(p) && is_kept) ? &p->summary_bias : &p->region_bias;
}

/* Rounded to nearest whatever the caller's rounding mode is, since every bit of the result depends on it. */
double cmb_default_scale(int64_t D) {
    fenv_t mode;
    fegetenv(&mode);
    fesetenv(FE_DFL_ENV);
    volatile double features = (double)D; /* compilers move arithmetic across fesetenv */
    volatile double scale = 1 / sqrt(features);
    fesetenv(&mode);
    return scale;
}

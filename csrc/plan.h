// SPDX-License-Identifier: Apache-2.0
/* Making plans, and reading the lists in them. Internal. */
#ifndef CMB_PLAN_H
#define CMB_PLAN_H

#include "combiner.h"

typedef struct {
    void *data;
    int64_t count, capacity;
} cmb_vector;

enum { CMB_TILE = 64 }; /* queries of a tile */

/* A plan in the making. The first failure is kept and turns every later call into a no-op, so that a builder
 * reads as the list of what it makes; cmb_build_task says when there is no use in going on. */
typedef struct {
    cmb_plan plan; /* sizes and flags; the arrays are the vectors until cmb_build_end */
    cmb_vector wave, task, pool, tile, run, index, mask;
    cmb_vector known; /* hash table of the mask sequences so far, which tiles share */
    cmb_status status;
} cmb_build;

/* 0 <= L <= 2^30 */
cmb_status cmb_check_length(int64_t L, cmb_error *error);
/* Checks the sizes and options and starts a build, which cmb_build_end must end; after a failure there is none. */
cmb_status cmb_build_begin(cmb_build *build, int64_t L, int64_t R, int64_t N, const cmb_plan_options *options,
                           cmb_error *error);
/* Everything up to the next cmb_build_wave belongs to this wave, up to the next cmb_build_task to this task. */
void cmb_build_wave(cmb_build *build);
bool cmb_build_task(cmb_build *build);
void cmb_build_pool(cmb_build *build, int64_t row, cmb_list child);
/* Starts a tile; at least one run that is not empty follows. */
void cmb_build_tile(cmb_build *build, cmb_list query, int32_t width);
/* Empty lists are left out. */
void cmb_build_run(cmb_build *build, cmb_list row);
/* The same with a mask word for each row; rows at the end that nobody sees are left out. */
void cmb_build_masked_run(cmb_build *build, cmb_list row, const uint64_t *mask);
/* These rows as a list: start and step where they have one, else a new stretch of the index array. */
cmb_list cmb_build_list(cmb_build *build, const int32_t *row, int64_t count);

/* Which elements of a list the q-th query of another sees. */
typedef enum {
    CMB_EVERY,
    CMB_UP_TO,  /* e <= q */
    CMB_BEHIND, /* e > q */
    CMB_OTHERS, /* e != q */
} cmb_sight;

typedef struct {
    cmb_list row;
    cmb_sight sight;
} cmb_look;

/* The queries, a tile for each CMB_TILE of them, attend what they see of the lists, of which those of CMB_OTHERS, or
 * several of CMB_UP_TO, have a step. What comes after the queries of a list cut short stands at the end, element by
 * element, so that the others keep their places. */
void cmb_build_attend(cmb_build *build, cmb_list query, const cmb_look *look, int looks);
/* The tile of those from the a-th on alone. */
void cmb_build_attend_from(cmb_build *build, cmb_list query, int64_t a, const cmb_look *look, int looks);

/* The finished plan, or NULL and the first failure. Releases whatever the build held. */
cmb_status cmb_build_end(cmb_build *build, cmb_plan **plan, cmb_error *error);

static inline cmb_list cmb_list_make(int64_t start, int64_t step, int64_t count) {
    return (cmb_list){(int32_t)start, (int32_t)step, (int32_t)count};
}

/* The n-th row of a list. */
static inline int32_t cmb_list_at(const cmb_plan *plan, cmb_list list, int32_t n) {
    return list.step ? list.start + list.step * n : plan->index[list.start + n];
}

static inline int64_t cmb_least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Elements [first, end) of a list, as far as it has them. */
static inline cmb_list cmb_cut(cmb_list list, int64_t first, int64_t end) {
    end = cmb_least(end, list.count);
    if (first >= end)
        return (cmb_list){0, 1, 0};
    return cmb_list_make(list.start + first * (list.step ? list.step : 1), list.step, end - first);
}

/* Lanes that hold `count` queries of a lane tile. */
static inline int32_t cmb_lanes_for(int64_t count) { return (int32_t)((count + 15) / 16 * 16); }

/* A random word for each key: a query's keys sum to its support's words only where they are the support, each key once;
 * another set does with a chance of 2^-64. */
static inline uint64_t cmb_key_word(int64_t key) { /* splitmix64 */
    uint64_t x = (uint64_t)key + UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

/* The words of two sets of keys joined: their sum, or their union where a key is a bit. */
static inline uint64_t cmb_join(uint64_t a, uint64_t b, bool is_union) { return is_union ? a | b : a + b; }

/* Bits lo <= t < hi of a mask word, wherever lo and hi lie. */
static inline uint64_t cmb_lanes(int64_t lo, int64_t hi) {
    lo = lo < 0 ? 0 : lo;
    hi = hi > 64 ? 64 : hi;
    return hi <= lo ? 0 : ~UINT64_C(0) >> (64 - (hi - lo)) << lo;
}

#endif

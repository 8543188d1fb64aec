// SPDX-License-Identifier: Apache-2.0
/* Strided arrays of float or double for the tests: `size` is that of a number. And a poll that asks a call to stop. */
#ifndef CMB_TEST_ARRAYS_H
#define CMB_TEST_ARRAYS_H

#include "testlib.h"

#include <pthread.h>

static char context[200]; /* names the case at hand in the message of a failure */

#define CASE(...) snprintf(context, sizeof context, __VA_ARGS__)

static inline void *zeros(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    CHECK(memory);
    return memory;
}

/* How an array lies in memory. */
typedef struct {
    bool rows_first; /* [B, rows, heads, dim] with gaps between the rows, in place of [B, heads, rows, dim] */
    bool backwards;  /* negative strides */
} layout;

typedef struct {
    void *memory;
    size_t bytes;
} test_block;

/* An array full of 0x5a, whose memory *to holds. */
static inline cmb_array array_make(size_t size, layout lies, int64_t B, int64_t heads, int64_t rows, int64_t dim,
                                   test_block *to) {
    const int64_t gap = lies.rows_first ? 3 : 0;
    cmb_array a = {.heads = heads};
    a.row = lies.rows_first ? heads * (dim + gap) : dim;
    a.head = lies.rows_first ? dim + gap : rows * dim;
    a.batch = heads * rows * (dim + gap);
    to->bytes = (size_t)(B * a.batch) * size;
    char *memory = zeros(to->bytes, 1);
    memset(memory, 0x5a, to->bytes);
    to->memory = a.data = memory;
    if (lies.backwards && rows > 0 && B > 0) {
        a.data = memory + ((B - 1) * a.batch + (rows - 1) * a.row) * (int64_t)size;
        a.batch = -a.batch;
        a.row = -a.row;
    }
    return a;
}

/* The address of an element. */
static inline char *array_at(size_t size, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d) {
    return (char *)a->data + (b * a->batch + h * a->head + x * a->row + d) * (int64_t)size;
}

static inline double array_get(size_t size, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d) {
    const char *at = array_at(size, a, b, h, x, d);
    float narrow;
    double wide;
    memcpy(&narrow, at, sizeof narrow);
    if (size == sizeof narrow)
        return (double)narrow;
    memcpy(&wide, at, sizeof wide);
    return wide;
}

static inline void array_put(size_t size, const cmb_array *a, int64_t b, int64_t h, int64_t x, int64_t d,
                             double value) {
    const float narrow = (float)value;
    memcpy(array_at(size, a, b, h, x, d), size == sizeof value ? (const void *)&value : &narrow, size);
}

/* A cmb_interrupt's context: asks to stop at poll number `stop_at` (from 1; 0: never). */
typedef struct {
    pthread_t caller;
    int polls, stop_at;
} poller;

static inline bool poll_caller(void *state) {
    poller *p = (poller *)state;
    CHECK(pthread_equal(p->caller, pthread_self()));
    return ++p->polls == p->stop_at;
}

static inline double seconds(void) { return 1e-9 * (double)cmb_now(); }

#endif

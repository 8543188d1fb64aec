// SPDX-License-Identifier: Apache-2.0
/* A workspace is one block from which arrays are taken one after another. The same code runs twice: first with base
 * NULL, which measures the block, then on the block itself. Internal. */
#ifndef CMB_ARENA_H
#define CMB_ARENA_H

#include "runtime/status.h"

typedef struct {
    char *base;    /* NULL: measure only */
    size_t used;   /* bytes, a multiple of 64 */
    bool overflow; /* the size does not fit a size_t */
} cmb_arena;

/* The next count * size bytes, 64-byte aligned; NULL while measuring, and after an overflow. */
void *cmb_take(cmb_arena *arena, size_t count, size_t size);

/* Gives a measured arena its block, to be released by cmb_release(arena->base), and makes it empty again. */
cmb_status cmb_arena_allocate(cmb_arena *arena, cmb_error *error);

#endif

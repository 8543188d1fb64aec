// SPDX-License-Identifier: Apache-2.0
/* The library's heap: the caller's allocator, or the default one, which keeps large blocks. Internal. */
#ifndef CMB_MEMORY_H
#define CMB_MEMORY_H

#include "combiner.h"

/* 64-byte aligned memory from the allocator in force; NULL when it is out of memory. */
void *cmb_allocate(size_t bytes);
void cmb_release(void *pointer);

/* a * b and a + b, or false where the result does not fit. Every size in bytes is computed with these. */
static inline bool cmb_multiply(size_t a, size_t b, size_t *result) { return !__builtin_mul_overflow(a, b, result); }
static inline bool cmb_add(size_t a, size_t b, size_t *result) { return !__builtin_add_overflow(a, b, result); }

#endif

// SPDX-License-Identifier: Apache-2.0
/* What the library asks of the process: memory, threads, the clock, errors. Internal. */
#ifndef CMB_RUNTIME_H
#define CMB_RUNTIME_H

#include "combiner.h"

#include <stdatomic.h>

/* 64-byte aligned, through the caller's allocator; NULL when it is out of memory. */
void *cmb_allocate(size_t bytes);
void cmb_release(void *pointer);

/* a * b and a + b, or false where the result does not fit: every size is computed with these. */
static inline bool cmb_multiply(size_t a, size_t b, size_t *result) { return !__builtin_mul_overflow(a, b, result); }
static inline bool cmb_add(size_t a, size_t b, size_t *result) { return !__builtin_add_overflow(a, b, result); }

/* Fills *error (where not NULL) and returns `status`. */
cmb_status cmb_fail(cmb_error *error, cmb_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Returns from the caller where the call did not succeed. */
#define TRY(call)                          \
    do {                                   \
        const cmb_status status_ = (call); \
        if (status_ != CMB_OK)             \
            return status_;                \
    } while (0)

int64_t cmb_now(void); /* ns of the monotonic clock */

/* Within a loop that waits for another thread. */
static inline void cmb_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The state of one call's wish to stop. Worker 0 is the calling thread: it alone polls, 50 ms apart. */
typedef struct {
    const cmb_interrupt *interrupt; /* may be NULL */
    int64_t next_poll;              /* worker 0's, in ns of the monotonic clock */
    atomic_bool stop;
} cmb_cancel;

void cmb_cancel_init(cmb_cancel *cancel, const cmb_interrupt *interrupt);
bool cmb_cancelled(cmb_cancel *cancel, int worker);

/* Runs body(context, index, worker) for every index in [0, count), each once, on up to `workers` threads:
 * the calling one is worker 0. Indices are claimed in ascending order. Returns when all have ended; after
 * a cancel the unclaimed ones are dropped. Runs on the calling thread alone when the pool serves another
 * call, or when no thread can be started: the results must not depend on it. Every body runs with the
 * default floating-point mode, which is restored for the caller. */
typedef void (*cmb_body)(void *context, int64_t index, int worker);
void cmb_parallel_for(int64_t count, int workers, cmb_body body, void *context, cmb_cancel *cancel);

#endif

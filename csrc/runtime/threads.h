// SPDX-License-Identifier: Apache-2.0
/* A loop whose iterations several threads share. Internal. */
#ifndef CMB_THREADS_H
#define CMB_THREADS_H

#include "runtime/cancel.h"

/* Runs body(context, index, worker) once for every index in [0, count), on up to `workers` threads; the calling thread
 * is worker 0. Indices are claimed in ascending order. Returns when all iterations have ended; after a cancel the
 * unclaimed ones are dropped. Where the pool serves another call or no thread can be started, the calling thread runs
 * everything: results must not depend on the threads. Every body runs in the default floating-point mode; the caller's
 * own mode is restored. */
typedef void (*cmb_body)(void *context, int64_t index, int worker);
void cmb_parallel_for(int64_t count, int workers, cmb_body body, void *context, cmb_cancel *cancel);

/* For the body of a loop that waits for another thread. */
static inline void cmb_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif

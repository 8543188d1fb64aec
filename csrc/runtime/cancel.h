// SPDX-License-Identifier: Apache-2.0
/* How a call is cancelled: the calling thread polls the caller, and every worker looks at one flag. Internal. */
#ifndef CMB_CANCEL_H
#define CMB_CANCEL_H

#include "combiner.h"

#include <stdatomic.h>

/* One call's cancellation. Worker 0 is the calling thread: it alone polls, at most every 50 ms. */
typedef struct {
    const cmb_interrupt *interrupt; /* may be NULL */
    int64_t next_poll;              /* worker 0's, in ns of cmb_now */
    int64_t work;                   /* units counted by cmb_tick since it last looked at the clock */
    atomic_bool stop;               /* the call is cancelled */
} cmb_cancel;

void cmb_cancel_init(cmb_cancel *cancel, const cmb_interrupt *interrupt);

/* Whether the call is cancelled. Worker 0 polls the caller when a poll is due. */
bool cmb_cancelled(cmb_cancel *cancel, int worker);

/* cmb_cancelled for tight loops of the calling thread: counts units of a few nanoseconds of work, and looks at the
 * clock once in 65,536 of them. */
static inline bool cmb_tick(cmb_cancel *cancel, int64_t work) {
    enum { UNITS_BETWEEN_LOOKS = 1 << 16 };
    cancel->work += work;
    if (cancel->work < UNITS_BETWEEN_LOOKS)
        return atomic_load_explicit(&cancel->stop, memory_order_relaxed);
    cancel->work = 0;
    return cmb_cancelled(cancel, 0);
}

/* The same for any worker. */
static inline bool cmb_worker_tick(cmb_cancel *cancel, int worker, int64_t work) {
    return worker == 0 ? cmb_tick(cancel, work) : atomic_load_explicit(&cancel->stop, memory_order_relaxed);
}

/* The status that the call returns at its end: CMB_OK or CMB_ERR_CANCELLED. */
cmb_status cmb_cancel_status(const cmb_cancel *cancel, cmb_error *error);

#endif

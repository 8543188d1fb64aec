// SPDX-License-Identifier: Apache-2.0
#include "runtime/cancel.h"
#include "runtime/status.h"
#include "runtime/system.h"

static const int64_t poll_interval = 50 * 1000 * 1000; /* ns: ends a call within 0.1 s, at no measurable cost */

void cmb_cancel_init(cmb_cancel *cancel, const cmb_interrupt *interrupt) {
    cancel->interrupt = interrupt;
    cancel->next_poll = cmb_now() + poll_interval;
    cancel->work = 0;
    atomic_init(&cancel->stop, false);
}

bool cmb_cancelled(cmb_cancel *cancel, int worker) {
    if (worker == 0 && cmb_now() >= cancel->next_poll) {
        const cmb_interrupt *interrupt = cancel->interrupt;
        const bool pollable = interrupt && interrupt->poll && !atomic_load(&cancel->stop);
        if (pollable && interrupt->poll(interrupt->context))
            atomic_store(&cancel->stop, true);
        cancel->next_poll =
            cmb_now() + poll_interval; /* counted from the poll's end: a slow poll leaves time for work */
    }
    return atomic_load_explicit(&cancel->stop, memory_order_relaxed);
}

cmb_status cmb_cancel_status(const cmb_cancel *cancel, cmb_error *error) {
    return atomic_load(&cancel->stop) ? cmb_fail(error, CMB_ERR_CANCELLED, "cancelled") : CMB_OK;
}

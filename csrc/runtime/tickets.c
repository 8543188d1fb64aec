// SPDX-License-Identifier: Apache-2.0
#include "runtime/tickets.h"
#include "runtime/status.h"
#include "runtime/system.h"
#include "runtime/threads.h"

/* Spins, since the wait is as a rule short (microseconds), and gives the processor away after that. */
bool cmb_wait(const atomic_int *counter, int32_t value, cmb_cancel *cancel, int worker) {
    enum { SPINS = 1 << 12 };
    for (int n = 0; atomic_load_explicit(counter, memory_order_acquire) != value; n++) {
        if (n < SPINS) {
            cmb_pause();
            continue;
        }
        if (cmb_cancelled(cancel, worker))
            return false;
        cmb_yield();
    }
    return true;
}

void cmb_begin_tickets(cmb_tickets *tickets, int64_t rows) {
    tickets->rows = rows;
    atomic_init(&tickets->claimed, 0);
    atomic_init(&tickets->entered, 0);
    for (int64_t n = 0; n < 2 * rows; n++) {
        tickets->dispenser[n] = (cmb_dispenser){0};
        atomic_init(&tickets->now_serving[n], 0);
    }
}

bool cmb_enter(cmb_item *item, int32_t number) {
    CMB_ASSERT(number >= 0 && number < atomic_load(&item->tickets->claimed));
    item->number = number;
    item->count = item->held = item->released = 0;
    item->repeats = false;
    return cmb_wait(&item->tickets->entered, number, item->cancel, item->worker);
}

void cmb_entered(cmb_item *item) { atomic_fetch_add_explicit(&item->tickets->entered, 1, memory_order_release); }

void cmb_take_tickets(cmb_item *item, cmb_row_kind kind, int64_t row, int64_t step, int64_t count) {
    CMB_ASSERT(count == 0 || (row >= 0 && row < item->tickets->rows));
    CMB_ASSERT(count == 0 || (row + step * (count - 1) >= 0 && row + step * (count - 1) < item->tickets->rows));
    const int32_t taker = item->number + 1;
    row += kind == CMB_KEY_ROWS ? item->tickets->rows : 0;
    cmb_ticket *ticket = item->ticket + item->count;
    item->count += count;
    for (int64_t n = 0; n < count; n++, row += step) {
        cmb_dispenser *dispenser = &item->tickets->dispenser[row];
        const bool again = dispenser->last_taker == taker;
        item->repeats |= again;
        ticket[n] = (cmb_ticket){(uint32_t)row, again ? -1 : dispenser->next};
        *dispenser = (cmb_dispenser){dispenser->next + !again, taker};
    }
}

static bool await(const cmb_item *item, const cmb_ticket *ticket) {
    const atomic_int *now_serving = &item->tickets->now_serving[ticket->row];
    return ticket->number < 0 || atomic_load_explicit(now_serving, memory_order_acquire) == ticket->number ||
           cmb_wait(now_serving, ticket->number, item->cancel, item->worker);
}

bool cmb_await_tickets(const cmb_item *item, int64_t first, int64_t end) {
    CMB_ASSERT(0 <= first && first <= end && end <= item->count);
    if (item->repeats) {
        first = 0;
        end = item->count;
    }
    for (int64_t n = first; n < end; n++)
        if (!await(item, &item->ticket[n]))
            return false;
    return true;
}

void cmb_release_tickets(cmb_item *item, int64_t end) {
    CMB_ASSERT(end <= item->count);
    if (item->repeats && end < item->count)
        return;
    for (; item->released < end; item->released++) {
        const cmb_ticket *ticket = &item->ticket[item->released];
        if (!await(item, ticket)) /* a row that the item did not touch has not been waited for */
            return;
        if (ticket->number >= 0)
            atomic_store_explicit(&item->tickets->now_serving[ticket->row], ticket->number + 1, memory_order_release);
    }
}

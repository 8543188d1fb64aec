// SPDX-License-Identifier: Apache-2.0
#include "turns.h"

#include <sched.h>

/* Spins, since what is waited for is a chunk of a tile away (microseconds); gives the processor away where it is not.
 */
bool cmb_wait(const atomic_int *through, int32_t turn, cmb_cancel *cancel, int worker) {
    enum { SPINS = 1 << 12 };
    for (int n = 0; atomic_load_explicit(through, memory_order_acquire) != turn; n++) {
        if (n < SPINS) {
            cmb_pause();
            continue;
        }
        if (cmb_cancelled(cancel, worker))
            return false;
        sched_yield();
    }
    return true;
}

void cmb_begin_turns(cmb_turns *turns, int64_t rows) {
    turns->rows = rows;
    atomic_init(&turns->claimed, 0);
    atomic_init(&turns->entered, 0);
    for (int64_t n = 0; n < 2 * rows; n++) {
        turns->asked[n] = (cmb_asked){0};
        atomic_init(&turns->through[n], 0);
    }
}

bool cmb_enter(cmb_item *item, int32_t number) {
    item->number = number;
    item->count = item->held = item->over = 0;
    item->repeats = false;
    return cmb_wait(&item->turns->entered, number, item->cancel, item->worker);
}

void cmb_entered(cmb_item *item) { atomic_fetch_add_explicit(&item->turns->entered, 1, memory_order_release); }

void cmb_ask(cmb_item *item, cmb_row_kind kind, int64_t row, int64_t step, int64_t count) {
    const int32_t mark = item->number + 1;
    row += kind == CMB_KEY_ROWS ? item->turns->rows : 0;
    cmb_turn *turn = item->turn + item->count;
    item->count += count;
    for (int64_t n = 0; n < count; n++, row += step) {
        cmb_asked *asked = &item->turns->asked[row];
        const bool again = asked->item == mark;
        item->repeats |= again;
        turn[n] = (cmb_turn){(uint32_t)row, again ? -1 : asked->turns};
        *asked = (cmb_asked){asked->turns + !again, mark};
    }
}

static bool wait_for(const cmb_item *item, const cmb_turn *turn) {
    const atomic_int *through = &item->turns->through[turn->row];
    return turn->turn < 0 || atomic_load_explicit(through, memory_order_acquire) == turn->turn ||
           cmb_wait(through, turn->turn, item->cancel, item->worker);
}

bool cmb_await(const cmb_item *item, int64_t first, int64_t end) {
    if (item->repeats) {
        first = 0;
        end = item->count;
    }
    for (int64_t n = first; n < end; n++)
        if (!wait_for(item, &item->turn[n]))
            return false;
    return true;
}

void cmb_pass(cmb_item *item, int64_t end) {
    if (item->repeats && end < item->count)
        return;
    for (; item->over < end; item->over++) {
        const cmb_turn *turn = &item->turn[item->over];
        if (!wait_for(item, turn)) /* it may not have been needed */
            return;
        if (turn->turn >= 0)
            atomic_store_explicit(&item->turns->through[turn->row], turn->turn + 1, memory_order_release);
    }
}

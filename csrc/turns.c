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

void cmb_begin_turns(cmb_turns *turns, int64_t blocks) {
    turns->blocks = blocks;
    atomic_init(&turns->claimed, 0);
    atomic_init(&turns->entered, 0);
    for (int64_t n = 0; n < 2 * blocks; n++) {
        turns->asked[n] = 0;
        atomic_init(&turns->through[n], 0);
    }
}

static bool wait_for(cmb_item *item, const atomic_int *value, int32_t wanted) {
    return cmb_wait(value, wanted, item->cancel, item->worker);
}

bool cmb_enter(cmb_item *item, int32_t number) {
    item->count = item->over = 0;
    return wait_for(item, &item->turns->entered, number);
}

void cmb_entered(cmb_item *item) { atomic_fetch_add_explicit(&item->turns->entered, 1, memory_order_release); }

static int64_t block_of(const cmb_item *item, cmb_row_kind kind, int64_t row) {
    return (kind == CMB_KEY_ROWS ? item->turns->blocks : 0) + row / CMB_TURN_ROWS;
}

void cmb_ask(cmb_item *item, cmb_row_kind kind, int64_t row, int64_t last) {
    const int64_t block = block_of(item, kind, row);
    if (item->place[block]) {
        cmb_turn *before = &item->turn[item->place[block] - 1];
        before->last = last > before->last ? last : before->last;
        return;
    }
    item->turn[item->count++] = (cmb_turn){block, item->turns->asked[block]++, last};
    item->place[block] = item->count;
}

bool cmb_await(cmb_item *item, cmb_row_kind kind, int64_t row) {
    if (!item)
        return true;
    const cmb_turn *turn = &item->turn[item->place[block_of(item, kind, row)] - 1];
    return wait_for(item, &item->turns->through[turn->block], turn->turn);
}

bool cmb_await_all(cmb_item *item) {
    for (int32_t n = 0; item && n < item->count; n++)
        if (!wait_for(item, &item->turns->through[item->turn[n].block], item->turn[n].turn))
            return false;
    return true;
}

void cmb_pass(cmb_item *item, int64_t use) {
    for (; item && item->over < item->count && item->turn[item->over].last < use; item->over++) {
        const cmb_turn *turn = &item->turn[item->over];
        item->place[turn->block] = 0;
        if (wait_for(item, &item->turns->through[turn->block], turn->turn)) /* it may not have been needed */
            atomic_store_explicit(&item->turns->through[turn->block], turn->turn + 1, memory_order_release);
    }
}

// SPDX-License-Identifier: Apache-2.0
/*
 * How threads wait for one another: at one counter, or in turns.
 *
 * In turns the threads that share one head's backward keep the bits of one thread: whatever adds to a block of gradient
 * rows, or reads one, does so in the order in which one thread would. Items (a tile; a task's pool steps) enter in that
 * order and say then which blocks they are going to touch. An item adds to a block once all before it are through with
 * it, so that two tiles over the same rows follow one another chunk by chunk. The first of those at work waits for
 * nobody: there is no deadlock. Internal.
 */
#ifndef CMB_TURNS_H
#define CMB_TURNS_H

#include "runtime.h"

/* Waits for *through to be `turn`; false where the call is cancelled first. */
bool cmb_wait(const atomic_int *through, int32_t turn, cmb_cancel *cancel, int worker);

/* Turns are taken at as many rows as a narrow tile has queries, so that neighbours do not wait for each other's. */
enum { CMB_TURN_ROWS = 16 };
static inline int64_t cmb_turn_blocks(int64_t rows) { return (rows + CMB_TURN_ROWS - 1) / CMB_TURN_ROWS; }

/* Blocks of table rows, those of the query's gradients first, then those of the key's and value's. */
typedef enum { CMB_QUERY_ROWS, CMB_KEY_ROWS } cmb_row_kind;

typedef struct {
    int64_t blocks;      /* of each kind */
    atomic_int claimed;  /* items: the next one's number */
    atomic_int entered;  /* items */
    int32_t *asked;      /* [2 * blocks] turns given out; of the item that is entering alone */
    atomic_int *through; /* [2 * blocks] turns that are over */
} cmb_turns;

/* What one worker's item has asked for. */
typedef struct {
    int64_t block;
    int32_t turn;
    int64_t last; /* its use after which others may have it */
} cmb_turn;

typedef struct {
    cmb_turns *turns; /* of the head at hand */
    cmb_cancel *cancel;
    int worker;
    int32_t *place; /* [2 * blocks] 1 + where in `turn`, or 0 */
    cmb_turn *turn; /* [2 * blocks] */
    int32_t count, over;
} cmb_item;

/* Nobody has had a turn. */
void cmb_begin_turns(cmb_turns *turns, int64_t blocks);

/* A place in a tile's runs: uses are compared by it. */
static inline int64_t cmb_use(int32_t run, int32_t row) { return (int64_t)run << 32 | row; }

/* Items enter in the order of their numbers, each between these two. False where the call is cancelled. */
bool cmb_enter(cmb_item *item, int32_t number);
void cmb_entered(cmb_item *item);
/* While entering: rows first, .. of a block, for the last time at `last` if not asked for again. */
void cmb_ask(cmb_item *item, cmb_row_kind kind, int64_t row, int64_t last);
/* Waits for the turn at a row that was asked for, or at all of them. False where the call is cancelled; without an item
 * there is nothing to wait for, or to give up. */
bool cmb_await(cmb_item *item, cmb_row_kind kind, int64_t row);
bool cmb_await_all(cmb_item *item);
/* Gives up what is not used from `use` on; with INT64_MAX all, and the item ends. */
void cmb_pass(cmb_item *item, int64_t use);

#endif

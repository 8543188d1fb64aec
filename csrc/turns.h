// SPDX-License-Identifier: Apache-2.0
/*
 * How threads wait for one another: at one counter, or in turns.
 *
 * In turns the threads that share one head's backward keep the bits of one thread: whatever adds to a gradient row, or
 * reads one, does so in the order in which one thread would. Items (a tile; a task's pool steps) enter in that order
 * and list then the rows that they are going to touch. An item adds to a row once all before it are through with it, so
 * that two tiles over the same rows follow one another a few rows apart. The first of those at work waits for nobody:
 * there is no deadlock. Internal.
 */
#ifndef CMB_TURNS_H
#define CMB_TURNS_H

#include "runtime.h"

/* Waits for *through to be `turn`; false where the call is cancelled first. */
bool cmb_wait(const atomic_int *through, int32_t turn, cmb_cancel *cancel, int worker);

/* The query's gradient rows, and the key's and value's. */
typedef enum { CMB_QUERY_ROWS, CMB_KEY_ROWS } cmb_row_kind;

typedef struct {
    int32_t turns; /* given out */
    int32_t item;  /* 1 + that which had the last of them */
} cmb_asked;

typedef struct {
    int64_t rows;        /* of each kind */
    atomic_int claimed;  /* items: the next one's number */
    atomic_int entered;  /* items */
    cmb_asked *asked;    /* [2 * rows]; of the item that is entering alone */
    atomic_int *through; /* [2 * rows] turns that are over */
} cmb_turns;

typedef struct {
    uint32_t row; /* of both kinds */
    int32_t turn; /* or -1: the row is listed before */
} cmb_turn;

/* What one worker is at. */
typedef struct {
    cmb_turns *turns; /* of the head at hand */
    cmb_cancel *cancel;
    int worker;
    int32_t number;
    cmb_turn *turn; /* as listed: of a tile the rows in the order of their use, then from `held` those of its queries */
    int64_t count, held;
    int64_t over; /* so many have been given up */
    bool repeats; /* some row is listed twice: the item takes all its turns together, and gives them up at its end */
} cmb_item;

/* Nobody has had a turn. */
void cmb_begin_turns(cmb_turns *turns, int64_t rows);

/* Items enter in the order of their numbers, each between these two. False where the call is cancelled. */
bool cmb_enter(cmb_item *item, int32_t number);
void cmb_entered(cmb_item *item);
/* While entering: lists rows row, row + step, .. */
void cmb_ask(cmb_item *item, cmb_row_kind kind, int64_t row, int64_t step, int64_t count);
/* Waits for the turns at the rows listed from the first-th to before the end-th. False where the call is cancelled. */
bool cmb_await(const cmb_item *item, int64_t first, int64_t end);
/* Gives up the rows listed before the end-th. */
void cmb_pass(cmb_item *item, int64_t end);

#endif

// SPDX-License-Identifier: Apache-2.0
/*
 * How threads that share one head's backward keep the bits of one thread: every gradient row has a ticket lock, so that
 * the work that adds to a row, or reads it, takes place in the order in which one thread would do it.
 *
 * An item of work is a tile, a task's pool steps, or a whole task (engine/shared.c). Items are numbered in the order of
 * one thread. A worker
 *
 *   claims an item     cmb_tickets.claimed, from any thread;
 *   enters             one item at a time, in the order of their numbers, and takes a ticket for each row that the item
 *                      is going to touch (cmb_enter, cmb_take_tickets, cmb_entered);
 *   waits for rows     until the row serves its ticket (cmb_await_tickets), and adds to them;
 *   releases rows      so that the row serves the next ticket (cmb_release_tickets).
 *
 * Tiles over the same rows follow one another a few rows apart. The first item that has not ended waits for no other
 * item, so that no deadlock is possible. Internal.
 */
#ifndef CMB_TICKETS_H
#define CMB_TICKETS_H

#include "runtime/cancel.h"

/* Waits until *counter is `value`; returns false if the call is cancelled first. */
bool cmb_wait(const atomic_int *counter, int32_t value, cmb_cancel *cancel, int worker);

/* A table row has two locks: one for its query's gradient, one for its key's and value's. */
typedef enum { CMB_QUERY_ROWS, CMB_KEY_ROWS } cmb_row_kind;

/* The dispenser of a row's tickets. */
typedef struct {
    int32_t next;       /* ticket to hand out */
    int32_t last_taker; /* 1 + the number of the item that took the last one; 0: nobody has */
} cmb_dispenser;

/* One head's locks. */
typedef struct {
    int64_t rows;             /* of each kind */
    atomic_int claimed;       /* number of the next item to claim */
    atomic_int entered;       /* items that have entered */
    cmb_dispenser *dispenser; /* [2 * rows]; touched only by the item that is entering */
    atomic_int *now_serving;  /* [2 * rows] */
} cmb_tickets;

typedef struct {
    uint32_t row;   /* index into now_serving */
    int32_t number; /* -1: the item has a ticket for the row already */
} cmb_ticket;

/* The item that one worker has at hand. */
typedef struct {
    cmb_tickets *tickets; /* of the item's head */
    cmb_cancel *cancel;
    int worker;
    int32_t number;
    cmb_ticket *ticket; /* in the order taken: a tile's rows in the order of their use, then from `held` its queries';
                         * or the rows that a task needs at once, then from `held` those that it needs later */
    int64_t count, held;
    int64_t released; /* tickets given back so far */
    bool repeats;     /* a row occurs twice: the item waits for all its rows at once, and releases them at its end */
} cmb_item;

/* Makes all locks free and no item claimed. */
void cmb_begin_tickets(cmb_tickets *tickets, int64_t rows);

/* Items enter one at a time, in the order of their numbers, each between these two calls. cmb_enter returns false if
 * the call is cancelled. */
bool cmb_enter(cmb_item *item, int32_t number);
void cmb_entered(cmb_item *item);
/* While entering: takes tickets for rows row, row + step, ... */
void cmb_take_tickets(cmb_item *item, cmb_row_kind kind, int64_t row, int64_t step, int64_t count);
/* Waits until the rows of tickets [first, end) serve this item; returns false if the call is cancelled. */
bool cmb_await_tickets(const cmb_item *item, int64_t first, int64_t end);
/* Releases the rows of tickets [0, end). */
void cmb_release_tickets(cmb_item *item, int64_t end);

#endif

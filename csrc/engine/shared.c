// SPDX-License-Identifier: Apache-2.0
/*
 * Backward of a head that all workers compute together, with the bits of one worker: its items add to each gradient row
 * in the order in which one worker would (runtime/tickets.h). There are two kinds of items.
 *
 * By task, where the queries of different tasks attend regions in common and no positions, as in Fixed, LogSparse and
 * Tree. An item is a task that attends, with those that follow in backward's order and do not: they read what it adds.
 * What its queries add to the gradients of regions is kept apart, so that it waits for the items before it only once:
 *
 *     worker 0   | queries of span 9       |add| summary of span 9 |  queries of span 7 ..
 *     worker 1      | queries of span 8       |add| summary of span 8 |  queries of span 6 ..
 *
 * Where regions have positions in common (LogSparse), what is added to positions is kept apart too.
 *
 * By tile, where tasks attend the same positions, as those of Dense, Window and Axial do. An item is a tile or a task's
 * pools. A tile waits for rows a few at a time, so that tiles over the same rows follow one another.
 */
#include "engine/call.h"

#include <string.h>

/* ---- which kind, and how much memory ------------------------------------------------------------ */

void cmb_plan_shared(cmb_call *call) {
    enum { MOST = 2048 }; /* 1 MiB of 64 features in float32: what is kept apart should stay in the cache */
    const cmb_problem *p = call->problem;
    int64_t tasks = 0, apart = 0, of_task = 0, of_tile = 0;
    bool by_task = !call->are_heads_lanes;
    for (int64_t i = 0; i < p->plans; i++) {
        const cmb_plan_sharing *plan = &p->plan[i]->traits.sharing;
        by_task = by_task && plan->by_task;
        tasks = cmb_max(tasks, cmb_longest_wave(p->plan[i]));
        apart = cmb_max(apart, plan->rows_apart);
        of_task = cmb_max(of_task, plan->tickets_of_task);
        of_tile = cmb_max(of_tile, plan->tickets_of_tile);
    }
    by_task = by_task && apart <= MOST && tasks >= call->workers; /* fewer tasks would leave workers idle */
    call->backward.by_task = by_task;
    call->backward.max_apart = by_task ? apart : 0;
    call->backward.max_tickets = by_task ? of_task : of_tile;
}

/* Whether row x is a scratch row, or its q_R or k_R lies in the worker's scratch: `place` is query_row or key_row. */
static bool is_own(const cmb_plan *plan, const int32_t *place, int64_t x) {
    return x >= plan->L + plan->R || (x >= plan->L && place && place[x - plan->L] < 0);
}

/* ---- tickets ------------------------------------------------------------------------------------ */

/* Which rows of a list take part. */
typedef enum { POSITIONS = 1, REGIONS = 2, ALL = 3 } some_rows;

/* Takes tickets for the chosen rows of the list, except for rows that are the worker's own. */
static void take_rows(const cmb_head *head, cmb_list list, some_rows which, cmb_row_kind kind, cmb_item *item) {
    const cmb_plan *plan = head->plan;
    const int32_t *place = kind == CMB_KEY_ROWS ? head->key_row : head->query_row;
    if (cmb_are_positions(plan, list)) {
        if (which & POSITIONS)
            cmb_take_tickets(item, kind, list.start, list.step, list.count);
        return;
    }
    if (list.step && !place && which == ALL && cmb_list_range(list).high < plan->L + plan->R) {
        cmb_take_tickets(item, kind, list.start, list.step, list.count);
        return;
    }
    for (int32_t n = 0; n < list.count; n++) {
        const int32_t x = cmb_list_at(plan, list, n);
        if (which & (x < plan->L ? POSITIONS : REGIONS) && !is_own(plan, place, x))
            cmb_take_tickets(item, kind, x, 1, 1);
    }
}

static void take_attended(const cmb_head *head, int32_t tile, some_rows which, cmb_item *item) {
    const cmb_plan *plan = head->plan;
    for (int32_t run = plan->tile[tile].run; run < plan->tile[tile + 1].run; run++)
        take_rows(head, plan->run[run].row, which, CMB_KEY_ROWS, item);
}

/* A region's own key row holds its summary's gradient. */
static void take_queries(const cmb_head *head, int32_t tile, cmb_item *item) {
    const cmb_list query = head->plan->tile[tile].query;
    take_rows(head, query, ALL, CMB_QUERY_ROWS, item);
    if (!cmb_is_of_positions(head->plan, tile))
        take_rows(head, query, ALL, CMB_KEY_ROWS, item);
}

/* Of each pool step the region and its children; of a pick the one child that was picked. */
static void take_pools(const cmb_head *head, int32_t task, cmb_item *item) {
    const cmb_plan *plan = head->plan;
    const bool picks = plan->pooling == CMB_POOL_FIRST;
    for (int32_t p = plan->task[task].pool; p < plan->task[task + 1].pool; p++) {
        const cmb_pool *pool = &plan->pool[p];
        for (int32_t n = -1; n < (picks ? 1 : pool->child.count); n++) {
            int32_t x = n < 0 ? pool->row : cmb_list_at(plan, pool->child, n);
            if (n == 0 && picks && pool->row < head->L + plan->R)
                x = head->pick[pool->row - head->L];
            take_rows(head, cmb_list_make(x, 1, 1), ALL, CMB_QUERY_ROWS, item);
            take_rows(head, cmb_list_make(x, 1, 1), ALL, CMB_KEY_ROWS, item);
        }
    }
}

/* ---- by tile ------------------------------------------------------------------------------------ */

static void zero_block_of(const cmb_call *call, const cmb_head *head, int64_t block) {
    const cmb_gradient_rows *g = &head->grad;
    const cmb_rows *const rows[] = {&g->query,      &g->key,          &g->value,    &g->region_query,
                                    &g->region_key, &g->region_value, &g->key_bias, &g->region_bias};
    for (size_t n = 0; n < sizeof rows / sizeof *rows; n++)
        if (rows[n]->unzeroed && block < cmb_blocks(rows[n]->count) && rows[n]->unzeroed[block])
            call->stage->zero_block(*rows[n], block);
}

/* Zeroes a block of each gradient: here no item may be the first to touch a block, since items overlap. The lanes of
 * one key head share some of the gradients. */
static void zero_shared(void *context, int64_t index, int worker) {
    const cmb_call *call = context;
    const cmb_slot *slot = &call->slot[index % call->backward.shared * call->lanes];
    (void)worker;
    for (int h = 0; h < call->lanes; h++)
        zero_block_of(call, &slot[h].head, index / call->backward.shared);
}

/* Items are numbered in the order of one worker: of the last task the last tile to the first one, then its pools; and
 * so on to the first task. first_item counts the other way, from the first task: a task's pools, then its tiles. With
 * lanes these are the items of the last head, then those of the head before it, up to the first one; and then come the
 * tiles once more, for all heads. Of the two items that a tile has for a head, one does nothing. */
static void number_tiles(const cmb_call *call, const cmb_slot *slot, cmb_shared_head *shared_head) {
    const cmb_plan *plan = slot->head.plan;
    shared_head->items = 0;
    for (int32_t i = 0; i < plan->tasks; i++) {
        const cmb_task *task = &plan->task[slot->order[i]];
        shared_head->first_item[i] = shared_head->items;
        shared_head->items += (int32_t)cmb_count_items(call, 1, task[1].tile - task[0].tile);
    }
}

/* The last i with first[i] <= at. */
static int32_t find_task(const int32_t *first, int32_t tasks, int32_t at) {
    int32_t i = 0, end = tasks;
    while (end - i > 1) {
        const int32_t middle = i + (end - i) / 2;
        if (first[middle] <= at)
            i = middle;
        else
            end = middle;
    }
    return i;
}

static void run_tile(const cmb_call *call, int64_t n, int32_t number, int worker) {
    const cmb_slot *slot = &call->slot[n * call->lanes];
    const cmb_plan *plan = slot->head.plan;
    const cmb_shared_head *shared_head = &call->backward.shared_head[n];
    const int32_t *first = shared_head->first_item, at = shared_head->items - 1 - number;
    cmb_item *item = &call->backward.item[worker];
    CMB_ASSERT(at >= 0);
    const int32_t i = find_task(first, plan->tasks, at), task = slot->order[i];
    const int32_t tiles = plan->task[task + 1].tile - plan->task[task].tile, of_head = 1 + tiles;
    const bool is_of_lanes = at - first[i] >= call->lanes * of_head;
    const int32_t h = is_of_lanes ? 0 : call->lanes - 1 - (at - first[i]) / of_head;
    const int32_t step = is_of_lanes ? 1 + at - first[i] - call->lanes * of_head : (at - first[i]) % of_head;
    const cmb_head *head = &slot[h].head;
    const int32_t tile = plan->task[task].tile + step - 1;
    const bool is_tile = step > 0 && cmb_is_of_lanes(call, plan, tile) == is_of_lanes;
    const bool is_pools = step == 0 && head->stages & CMB_SUMMARIZE;
    if (!cmb_enter(item, number))
        return;
    if (is_tile) {
        take_attended(head, tile, ALL, item);
        item->held = item->count;
        take_queries(head, tile, item);
    } else if (is_pools) {
        take_pools(head, task, item);
    }
    CMB_ASSERT(item->count <= call->backward.max_tickets);
    cmb_entered(item);
    if (is_tile && is_of_lanes)
        cmb_run_tile_of_lanes(call, slot, tile, worker, item);
    else if (is_tile)
        call->stage->tile_backward(head, tile, -1, call->scratch[worker], item);
    else if (is_pools)
        call->stage->pool_backward(head, task, call->scratch[worker], item);
    cmb_release_tickets(item, item->count);
}

/* ---- by task ------------------------------------------------------------------------------------ */

static void zero_blocks(const cmb_call *call, cmb_rows rows) {
    for (int64_t block = 0; rows.unzeroed && block < cmb_blocks(rows.count); block++)
        if (rows.unzeroed[block])
            call->stage->zero_block(rows, block);
}

/* Zeroes the gradients of biases. Leaves those of rows to the item that is the first to touch a row, whose worker then
 * has the row in its cache: tiles and pools zero nothing. */
static void begin_zeroing(const cmb_call *call, cmb_slot *slot) {
    cmb_gradient_rows *g = &slot->head.grad;
    zero_blocks(call, g->key_bias);
    zero_blocks(call, g->region_bias);
    slot->to_zero = *g;
    g->query.unzeroed = g->key.unzeroed = g->value.unzeroed = NULL;
    g->region_query.unzeroed = g->region_key.unzeroed = g->region_value.unzeroed = NULL;
}

static void zero_row(const cmb_call *call, const cmb_rows *rows, int64_t x) {
    if (rows->unzeroed && rows->unzeroed[x / CMB_BLOCK_ROWS])
        call->stage->zero_row(rows, x);
}

/* Zeroes the gradients that a lock guards, if they are to start from zero. */
static void zero_gradients(const cmb_call *call, const cmb_slot *slot, int64_t lock, int64_t rows) {
    const cmb_gradient_rows *g = &slot->to_zero;
    const bool is_of_key = lock >= rows;
    const int32_t *place = is_of_key ? slot->head.key_row : slot->head.query_row;
    const int64_t x = lock % rows, r = x - slot->head.L, at = r < 0 ? x : place ? place[r] : r;
    if (is_of_key) {
        zero_row(call, r < 0 ? &g->key : &g->region_key, at);
        zero_row(call, r < 0 ? &g->value : &g->region_value, at);
    } else if (r >= 0 || x < slot->head.queries) {
        zero_row(call, r < 0 ? &g->query : &g->region_query, at);
    }
}

/* Zeroes the item's rows that no item before has touched: their ticket is the first, 0. */
static void zero_first(const cmb_call *call, const cmb_slot *slot, const cmb_item *item) {
    for (int64_t n = 0; n < item->count; n++)
        if (item->ticket[n].number == 0)
            zero_gradients(call, slot, item->ticket[n].row, item->tickets->rows);
}

static void clear_blocks(cmb_rows rows) {
    if (rows.unzeroed)
        memset(rows.unzeroed, 0, (size_t)cmb_blocks(rows.count));
}

/* After the last item: zeroes the rows that no item has touched, those of regions that other plans of the call have
 * among them. Regions that are placed elsewhere have no gradients that are outputs. Then no block is left to be zeroed.
 */
static void end_zeroing(const cmb_call *call, const cmb_slot *slot, const cmb_tickets *tickets, int worker) {
    enum { POLL_ROWS = 1 << 12 };
    const cmb_gradient_rows *g = &slot->to_zero;
    for (int64_t lock = 0; lock < 2 * tickets->rows; lock++) {
        const int32_t *place = lock < tickets->rows ? slot->head.query_row : slot->head.key_row;
        if (lock % POLL_ROWS == 0 && cmb_cancelled(call->cancel, worker))
            return;
        if (tickets->dispenser[lock].next == 0 && (lock % tickets->rows < slot->head.L || !place))
            zero_gradients(call, slot, lock, tickets->rows);
    }
    clear_blocks(g->query);
    clear_blocks(g->key);
    clear_blocks(g->value);
    clear_blocks(g->region_query);
    clear_blocks(g->region_key);
    clear_blocks(g->region_value);
}

/* In the order of one worker, which is that of cmb_slot.order from its end. */
static void number_tasks(const cmb_slot *slot, cmb_shared_head *shared_head) {
    const cmb_plan *plan = slot->head.plan;
    shared_head->items = 0;
    for (int32_t i = plan->tasks - 1; i >= 0; i--)
        if (shared_head->items == 0 || cmb_begins_item(plan, slot->order[i]))
            shared_head->first_item[shared_head->items++] = i;
    shared_head->first_item[shared_head->items] = -1;
}

/* The rows that a task's tiles of positions add to. */
static void take_at_once(const cmb_head *head, int32_t task, cmb_item *item) {
    const cmb_plan *plan = head->plan;
    for (int32_t tile = plan->task[task].tile; tile < plan->task[task + 1].tile; tile++)
        if (cmb_is_of_positions(plan, tile)) {
            take_queries(head, tile, item);
            if (!plan->traits.sharing.are_positions_apart)
                take_attended(head, tile, POSITIONS, item);
        }
}

/* The rows to which sums that were kept apart are added, and those of the task's tiles of regions and of its pools. */
static void take_for_later(const cmb_head *head, int32_t task, cmb_item *item) {
    const cmb_plan *plan = head->plan;
    const some_rows apart = plan->traits.sharing.are_positions_apart ? ALL : REGIONS;
    for (int32_t tile = plan->task[task].tile; tile < plan->task[task + 1].tile; tile++) {
        take_attended(head, tile, cmb_is_of_positions(plan, tile) ? apart : ALL, item);
        if (!cmb_is_of_positions(plan, tile))
            take_queries(head, tile, item);
    }
    if (head->stages & CMB_SUMMARIZE)
        take_pools(head, task, item);
}

/* Whether the tile's regions are the worker's own, so that no other task needs their q_R either: then the tile touches
 * no row that others touch, but for those that it attends. */
static bool reads_own(const cmb_head *head, int32_t tile) {
    const cmb_list query = head->plan->tile[tile].query;
    for (int32_t n = 0; n < query.count; n++)
        if (!is_own(head->plan, head->key_row, cmb_list_at(head->plan, query, n)))
            return false;
    return true;
}

/* False where the call is cancelled. */
static bool run_task(const cmb_call *call, const cmb_head *head, int32_t task, cmb_item *item, int worker) {
    const cmb_plan *plan = head->plan;
    cmb_scratch *scratch = call->scratch[worker];
    const bool positions = plan->traits.sharing.are_positions_apart && cmb_attends(plan, task);
    const int32_t first = plan->task[task].tile;
    int32_t tile = plan->task[task + 1].tile - 1;
    call->stage->pool_own(head, task, scratch);
    call->stage->keep_apart(positions, scratch);
    for (; tile >= first && (cmb_is_of_positions(plan, tile) || (positions && reads_own(head, tile))); tile--)
        call->stage->tile_backward(head, tile, cmb_counterpart(plan, tile, task, task - 1), scratch, NULL);
    if (cmb_cancelled(call->cancel, worker) || !cmb_await_tickets(item, item->held, item->count))
        return false;
    item->held = item->count; /* the item's other tasks need not wait */
    call->stage->add_apart(head, scratch);
    for (; tile >= first; tile--)
        call->stage->tile_backward(head, tile, -1, scratch, NULL);
    if (head->stages & CMB_SUMMARIZE)
        call->stage->pool_backward(head, task, scratch, NULL);
    return !cmb_cancelled(call->cancel, worker);
}

static void run_tasks(const cmb_call *call, int64_t n, int32_t number, int worker) {
    const cmb_slot *slot = &call->slot[n];
    const int32_t *first = &call->backward.shared_head[n].first_item[number];
    cmb_item *item = &call->backward.item[worker];
    if (!cmb_enter(item, number))
        return;
    take_at_once(&slot->head, slot->order[first[0]], item);
    item->held = item->count;
    for (int32_t i = first[0]; i > first[1]; i--)
        take_for_later(&slot->head, slot->order[i], item);
    item->repeats = false; /* a row's first ticket comes before its others, and all rows are released together */
    CMB_ASSERT(item->count <= call->backward.max_tickets);
    cmb_entered(item);
    zero_first(call, slot, item);
    if (!cmb_await_tickets(item, 0, item->held))
        return;
    for (int32_t i = first[0]; i > first[1]; i--)
        if (!run_task(call, &slot->head, slot->order[i], item, worker))
            return;
    cmb_release_tickets(item, item->count);
}

/* ---- all items of the shared heads -------------------------------------------------------------- */

static void begin_shared(void *context, int64_t n, int worker) {
    const cmb_call *call = context;
    const cmb_problem *p = call->problem;
    cmb_slot *slot = &call->slot[n * call->lanes];
    cmb_shared_head *shared_head = &call->backward.shared_head[n];
    cmb_head_id id = cmb_head_number(call, call->heads - call->backward.shared + n, p->Hk);
    id.h = id.h * (p->Hq / p->Hk) + call->backward.group_head;
    for (int h = 0; h < call->lanes; h++, id.h++)
        cmb_begin_backward(call, &slot[h], id, worker);
    if (call->backward.by_task) {
        begin_zeroing(call, slot);
        number_tasks(slot, shared_head);
    } else {
        number_tiles(call, slot, shared_head);
    }
    cmb_begin_tickets(&shared_head->tickets, slot->head.L + slot->head.R);
}

static void pool_shared(void *context, int64_t index, int worker) {
    const cmb_call *call = context;
    const int64_t heads = call->backward.shared * call->lanes, t = index / heads;
    const cmb_head *head = &call->slot[index % heads].head;
    if (t < cmb_tasks_in(head->plan, call->backward.wave))
        call->stage->pool(head, head->plan->wave[call->backward.wave] + (int32_t)t, call->scratch[worker]);
}

static void pool_waves(cmb_call *call) {
    const int64_t shared = call->backward.shared;
    for (int32_t wave = 0; wave < call->waves; wave++) {
        int64_t longest = 0;
        for (int64_t n = 0; n < shared; n++)
            longest = cmb_max(longest, cmb_tasks_in(call->slot[n * call->lanes].head.plan, wave));
        call->backward.wave = wave;
        cmb_parallel_for(shared * call->lanes * longest, call->workers, pool_shared, call, call->cancel);
    }
}

/* Workers begin with different heads. A worker that finds all items of a head claimed helps with the next head. */
static void run_items(void *context, int64_t index, int worker) {
    const cmb_call *call = context;
    for (int64_t n = 0; n < call->backward.shared; n++) {
        const int64_t at = (index + n) % call->backward.shared;
        cmb_shared_head *shared_head = &call->backward.shared_head[at];
        int32_t number;
        call->backward.item[worker].tickets = &shared_head->tickets;
        while (!cmb_cancelled(call->cancel, worker) &&
               (number = atomic_fetch_add(&shared_head->tickets.claimed, 1)) < shared_head->items)
            (call->backward.by_task ? run_tasks : run_tile)(call, at, number, worker);
    }
}

static void end_shared(void *context, int64_t n, int worker) {
    const cmb_call *call = context;
    const cmb_slot *slot = &call->slot[n * call->lanes];
    if (call->backward.by_task)
        end_zeroing(call, slot, &call->backward.shared_head[n].tickets, worker);
    for (int h = 0; h < call->lanes; h++)
        cmb_end_gradients(call, &slot[h], worker);
}

void cmb_run_shared(cmb_call *call) {
    const int64_t shared = call->backward.shared, group = call->problem->Hq / call->problem->Hk;
    const int64_t blocks = cmb_blocks(cmb_max(call->L, call->R));
    for (int64_t h = 0; h < group; h += call->lanes) {
        call->backward.group_head = h;
        cmb_parallel_for(shared, call->workers, begin_shared, call, call->cancel);
        if (cmb_cancelled(call->cancel, 0)) /* some slots hold no head */
            return;
        if (!call->backward.by_task)
            cmb_parallel_for(shared * blocks, call->workers, zero_shared, call, call->cancel);
        pool_waves(call);
        cmb_parallel_for(call->workers, call->workers, run_items, call, call->cancel);
        if (cmb_cancelled(call->cancel, 0)) /* sums are incomplete */
            return;
        cmb_parallel_for(shared, call->workers, end_shared, call, call->cancel);
    }
}

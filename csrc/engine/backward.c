// SPDX-License-Identifier: Apache-2.0
/*
 * Backward: gradient rows are sums over tasks and query heads, and the order of the terms decides the bits. So one
 * worker takes a key head with all its query heads, and runs the tasks in the reverse of forward's order. The last
 * heads of a call, fewer than there are workers, would leave workers idle: those are each computed by all workers
 * together, in the same order row by row (tickets.h).
 *
 * Where heads are lanes (tile/heads.h), a worker takes a task for `lanes` query heads at once: first the
 * heads' tiles, the last one first, and then, head by head, the task's other tiles and its pools.
 */
#include "engine/call.h"

/* Tasks in the order in which one worker takes them forward. */
static void order_tasks(const cmb_plan *plan, int32_t *order) {
    for (int32_t task = 0; task < plan->tasks; task++)
        order[task] = task;
    for (int32_t t = 0, n = 0; plan->traits.is_fusible && n < plan->tasks; t++)
        for (int32_t wave = 0; wave < plan->waves; wave++)
            if (t < cmb_tasks_in(plan, wave))
                order[n++] = plan->wave[wave] + t;
}

static void begin_head(const cmb_call *call, cmb_slot *slot, cmb_head_id id, int worker) {
    cmb_begin_head(call, slot, id, worker);
    cmb_begin_gradients(call, slot, worker);
    order_tasks(slot->head.plan, slot->order);
}

/* ---- one worker, one key head ------------------------------------------------------------------- */

static void run_task_of_head(const cmb_call *call, const cmb_head *head, int32_t task, int worker) {
    const cmb_plan *plan = head->plan;
    cmb_scratch *scratch = call->scratch[worker];
    call->stage->pool_own(head, task, scratch);
    for (int32_t tile = plan->task[task + 1].tile - 1; tile >= plan->task[task].tile; tile--) {
        if (cmb_cancelled(call->cancel, worker))
            return;
        if (!cmb_is_of_lanes(call, plan, tile))
            call->stage->tile_backward(head, tile, cmb_counterpart(plan, tile, task, task - 1), scratch, NULL);
    }
    if (head->stages & CMB_SUMMARIZE)
        call->stage->pool_backward(head, task, scratch, NULL);
}

static void run_tile_of_lanes(const cmb_call *call, const cmb_slot *slot, int32_t tile, int worker, cmb_item *item) {
    cmb_heads_tile of_heads;
    cmb_make_tile_of_slots(call, slot, tile, &of_heads);
    call->stage->tile_backward(&of_heads.head, 0, -1, call->scratch[worker], item);
}

static void run_task(const cmb_call *call, const cmb_slot *slot, int32_t task, int worker) {
    const cmb_plan *plan = slot->head.plan;
    for (int32_t tile = plan->task[task + 1].tile - 1; call->are_heads_lanes && tile >= plan->task[task].tile; tile--) {
        if (cmb_cancelled(call->cancel, worker))
            return;
        if (cmb_is_of_lanes(call, plan, tile))
            run_tile_of_lanes(call, slot, tile, worker, NULL);
    }
    for (int n = 0; n < call->lanes; n++)
        run_task_of_head(call, &slot[n].head, task, worker);
}

static void run_key_head(void *context, int64_t index, int worker) {
    const cmb_call *call = context;
    const cmb_problem *p = call->problem;
    const int64_t group = p->Hq / p->Hk;
    cmb_slot *slot = &call->slot[(int64_t)worker * call->lanes];
    cmb_head_id id = cmb_head_number(call, index, p->Hk); /* h is the key head, and then each of its query heads */
    const int64_t end = (id.h + 1) * group;
    for (id.h *= group; id.h < end;) {
        for (int n = 0; n < call->lanes; n++, id.h++) {
            begin_head(call, &slot[n], id, worker);
            const cmb_head *head = &slot[n].head;
            for (int32_t task = 0; task < head->plan->tasks && !cmb_cancelled(call->cancel, worker); task++)
                call->stage->pool(head, task, call->scratch[worker]);
        }
        for (int32_t n = slot->head.plan->tasks - 1; n >= 0; n--)
            run_task(call, slot, slot->order[n], worker);
        if (cmb_cancelled(call->cancel, worker))
            return;
        for (int n = 0; n < call->lanes; n++)
            cmb_end_gradients(call, &slot[n], worker);
    }
}

/* ---- all workers, shared heads ------------------------------------------------------------------ */

/* Items are numbered in the order of one worker: of the last task the last tile to the first one, then its pools; and
 * so on to the first task. first_item counts the other way, from the first task: a task's pools, then its tiles. With
 * lanes these are the items of the last head, then those of the head before it, up to the first one; and then come the
 * tiles once more, for all heads. Of the two items that a tile has for a head, one does nothing. */
static void begin_shared(void *context, int64_t n, int worker) {
    const cmb_call *call = context;
    const cmb_problem *p = call->problem;
    cmb_slot *slot = &call->slot[n * call->lanes];
    cmb_sharing *sharing = &call->backward.sharing[n];
    cmb_head_id id = cmb_head_number(call, call->heads - call->backward.shared + n, p->Hk);
    id.h = id.h * (p->Hq / p->Hk) + call->backward.group_head;
    for (int h = 0; h < call->lanes; h++, id.h++)
        begin_head(call, &slot[h], id, worker);
    const cmb_plan *plan = slot->head.plan;
    sharing->first_item[0] = 0;
    for (int32_t i = 0; i < plan->tasks; i++) {
        const cmb_task *task = &plan->task[slot->order[i]];
        sharing->first_item[i + 1] =
            sharing->first_item[i] + (int32_t)cmb_count_items(call, 1, task[1].tile - task[0].tile);
    }
    cmb_begin_tickets(&sharing->tickets, slot->head.L + slot->head.R);
}

static void zero_block_of(const cmb_call *call, const cmb_head *head, int64_t block) {
    const cmb_rows *const rows[] = {&head->grad.query,        &head->grad.key,        &head->grad.value,
                                    &head->grad.region_query, &head->grad.region_key, &head->grad.region_value,
                                    &head->grad.key_bias,     &head->grad.region_bias};
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

static void pool_shared(void *context, int64_t index, int worker) {
    const cmb_call *call = context;
    const int64_t heads = call->backward.shared * call->lanes, t = index / heads;
    const cmb_head *head = &call->slot[index % heads].head;
    if (t < cmb_tasks_in(head->plan, call->backward.wave))
        call->stage->pool(head, head->plan->wave[call->backward.wave] + (int32_t)t, call->scratch[worker]);
}

static void take_list(const cmb_plan *plan, cmb_list list, cmb_row_kind kind, cmb_item *item) {
    if (list.step)
        cmb_take_tickets(item, kind, list.start, list.step, list.count);
    for (int32_t n = 0; !list.step && n < list.count; n++)
        cmb_take_tickets(item, kind, cmb_list_at(plan, list, n), 1, 1);
}

/* The rows that the tile attends, in order, then its queries; a region's own key row holds its summary's gradient. */
static void take_tile(const cmb_head *head, const cmb_tile *tile, cmb_item *item) {
    const cmb_plan *plan = head->plan;
    for (int32_t run = tile->run; run < tile[1].run; run++)
        take_list(plan, plan->run[run].row, CMB_KEY_ROWS, item);
    item->held = item->count;
    take_list(plan, tile->query, CMB_QUERY_ROWS, item);
    if (cmb_list_at(plan, tile->query, 0) >= head->L)
        take_list(plan, tile->query, CMB_KEY_ROWS, item);
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
            if (x >= head->L + plan->R) /* a scratch row, which is the worker's own */
                continue;
            cmb_take_tickets(item, CMB_QUERY_ROWS, x, 1, 1);
            cmb_take_tickets(item, CMB_KEY_ROWS, x, 1, 1);
        }
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

static void run_item(const cmb_call *call, int64_t n, int32_t number, int worker) {
    const cmb_slot *slot = &call->slot[n * call->lanes];
    const cmb_plan *plan = slot->head.plan;
    const int32_t *first = call->backward.sharing[n].first_item, at = first[plan->tasks] - 1 - number;
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
    if (is_tile)
        take_tile(head, &plan->tile[tile], item);
    else if (is_pools)
        take_pools(head, task, item);
    CMB_ASSERT(item->count <= call->backward.max_tickets);
    cmb_entered(item);
    if (is_tile && is_of_lanes)
        run_tile_of_lanes(call, slot, tile, worker, item);
    else if (is_tile)
        call->stage->tile_backward(head, tile, -1, call->scratch[worker], item);
    else if (is_pools)
        call->stage->pool_backward(head, task, call->scratch[worker], item);
    cmb_release_tickets(item, item->count);
}

/* Workers begin with different heads. A worker that finds all items of a head claimed helps with the next head. */
static void run_items(void *context, int64_t index, int worker) {
    const cmb_call *call = context;
    for (int64_t n = 0; n < call->backward.shared; n++) {
        const int64_t at = (index + n) % call->backward.shared;
        cmb_sharing *sharing = &call->backward.sharing[at];
        const int32_t items = sharing->first_item[call->slot[at * call->lanes].head.plan->tasks];
        int32_t number;
        call->backward.item[worker].tickets = &sharing->tickets;
        while (!cmb_cancelled(call->cancel, worker) &&
               (number = atomic_fetch_add(&sharing->tickets.claimed, 1)) < items)
            run_item(call, at, number, worker);
    }
}

static void end_shared(void *context, int64_t n, int worker) {
    const cmb_call *call = context;
    for (int h = 0; h < call->lanes; h++)
        cmb_end_gradients(call, &call->slot[n * call->lanes + h], worker);
}

static void pool_waves(cmb_call *call) {
    const int64_t shared = call->backward.shared;
    for (int32_t wave = 0; wave < call->waves; wave++) {
        int64_t longest = 0;
        for (int64_t n = 0; n < shared; n++) {
            const int32_t tasks = cmb_tasks_in(call->slot[n * call->lanes].head.plan, wave);
            longest = tasks > longest ? tasks : longest;
        }
        call->backward.wave = wave;
        cmb_parallel_for(shared * call->lanes * longest, call->workers, pool_shared, call, call->cancel);
    }
}

static void run_shared(cmb_call *call) {
    const int64_t shared = call->backward.shared, group = call->problem->Hq / call->problem->Hk;
    const int64_t blocks = cmb_blocks(call->L > call->R ? call->L : call->R);
    for (int64_t h = 0; h < group; h += call->lanes) {
        call->backward.group_head = h;
        cmb_parallel_for(shared, call->workers, begin_shared, call, call->cancel);
        if (cmb_cancelled(call->cancel, 0)) /* some slots hold no head */
            return;
        cmb_parallel_for(shared * blocks, call->workers, zero_shared, call, call->cancel);
        pool_waves(call);
        cmb_parallel_for(call->workers, call->workers, run_items, call, call->cancel);
        if (cmb_cancelled(call->cancel, 0)) /* sums are incomplete */
            return;
        cmb_parallel_for(shared, call->workers, end_shared, call, call->cancel);
    }
}

void cmb_run_backward(cmb_call *call) {
    const int64_t shared = call->backward.shared;
    cmb_parallel_for(call->heads - shared, call->workers, run_key_head, call, call->cancel);
    if (shared > 0 && !cmb_cancelled(call->cancel, 0))
        run_shared(call);
}

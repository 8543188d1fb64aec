// SPDX-License-Identifier: Apache-2.0
/*
 * Backward: gradient rows are sums over tasks and query heads, and the order of the terms decides the bits. So one
 * worker takes a key head with all its query heads, and runs the tasks in the reverse of forward's order. The last
 * heads of a call, fewer than there are workers, would leave workers idle: those are each computed by all workers
 * together, in the same order row by row (shared.c).
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

void cmb_begin_backward(const cmb_call *call, cmb_slot *slot, cmb_head_id id, int worker) {
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

void cmb_run_tile_of_lanes(const cmb_call *call, const cmb_slot *slot, int32_t tile, int worker, cmb_item *item) {
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
            cmb_run_tile_of_lanes(call, slot, tile, worker, NULL);
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
            cmb_begin_backward(call, &slot[n], id, worker);
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

void cmb_run_backward(cmb_call *call) {
    const int64_t shared = call->backward.shared;
    cmb_parallel_for(call->heads - shared, call->workers, run_key_head, call, call->cancel);
    if (shared > 0 && !cmb_cancelled(call->cancel, 0))
        cmb_run_shared(call);
}

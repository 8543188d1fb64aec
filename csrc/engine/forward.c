// SPDX-License-Identifier: Apache-2.0
/*
 * Forward: group after group of heads, as many as stay in the outer cache together. Within a group each pair of a head
 * and a task goes to whichever worker is free.
 *
 * Not fused, all heads of the group finish a wave before the next wave begins. Fused, a task goes through all waves by
 * itself, so that what it summarizes is still in its worker's cache when it is attended: task t goes on to wave w + 1
 * once tasks 0 .. t - 1 of its head have finished wave w. So that this wait is rare, heads go in teams of as many as
 * there are workers: task t of every head of the team, then task t + 1 of every head.
 *
 * Where heads are lanes (tile/heads.h), `lanes` query heads of a key head take the place of one head: a unit, whose
 * slots lie side by side. A task is then first each head's own tiles, and after these the heads' tiles.
 */
#include "engine/call.h"

static void begin_head(void *context, int64_t slot, int worker) {
    const cmb_call *call = context;
    const cmb_head_id id = cmb_head_number(call, call->forward.first + slot, call->problem->Hq);
    cmb_begin_head(call, &call->slot[slot], id, worker);
    cmb_begin_results(call, &call->slot[slot]);
}

static void end_head(void *context, int64_t slot, int worker) {
    const cmb_call *call = context;
    cmb_end_results(call, &call->slot[slot], worker);
}

static int64_t units_in_flight(const cmb_call *call) { return call->forward.in_flight / call->lanes; }

static cmb_slot *unit_number(const cmb_call *call, int64_t number) { return &call->slot[number * call->lanes]; }

/* The unit, or team, whose tasks include the index-th of the group. */
static int64_t owner_of(const cmb_call *call, int64_t index) {
    int64_t owner = 0;
    CMB_ASSERT(index >= 0);
    while (call->forward.first_task[owner + 1] <= index)
        owner++;
    return owner;
}

/* `ahead` is a task that the worker is likely to have next, whose rows the tiles prefetch; or -1. */
static void run_task_of_head(const cmb_call *call, const cmb_head *head, int32_t task, int32_t ahead, int worker) {
    const cmb_plan *plan = head->plan;
    cmb_scratch *scratch = call->scratch[worker];
    call->stage->pool(head, task, scratch);
    for (int32_t tile = plan->task[task].tile; tile < plan->task[task + 1].tile; tile++)
        if (!cmb_is_of_lanes(call, plan, tile))
            call->stage->tile(head, tile, cmb_counterpart(plan, tile, task, ahead), scratch);
}

static void run_task(const cmb_call *call, const cmb_slot *unit, int32_t task, int32_t ahead, int worker) {
    const cmb_plan *plan = unit->head.plan;
    for (int n = 0; n < call->lanes; n++)
        run_task_of_head(call, &unit[n].head, task, ahead, worker);
    for (int32_t tile = plan->task[task].tile; call->are_heads_lanes && tile < plan->task[task + 1].tile; tile++)
        if (cmb_is_of_lanes(call, plan, tile)) {
            cmb_heads_tile of_heads;
            cmb_make_tile_of_slots(call, unit, tile, &of_heads);
            call->stage->tile(&of_heads.head, 0, -1, call->scratch[worker]);
        }
}

/* ---- wave by wave ------------------------------------------------------------------------------- */

static void run_task_of_wave(void *context, int64_t index, int worker) {
    const cmb_call *call = context;
    /* The last tasks of a causal plan are the longest, and start first. */
    const int64_t last = call->forward.first_task[units_in_flight(call)] - 1 - index, number = owner_of(call, last);
    const cmb_slot *unit = unit_number(call, number);
    const int32_t first = unit->head.plan->wave[call->forward.wave];
    const int32_t t = (int32_t)(last - call->forward.first_task[number]), next = t - call->workers;
    run_task(call, unit, first + t, next >= 0 ? first + next : -1, worker);
}

static void run_waves(cmb_call *call) {
    for (int32_t wave = 0; wave < call->waves; wave++) {
        call->forward.wave = wave;
        const int64_t units = units_in_flight(call);
        int64_t *first_task = call->forward.first_task;
        for (int64_t n = 0; n < units; n++)
            first_task[n + 1] = first_task[n] + cmb_tasks_in(unit_number(call, n)->head.plan, wave);
        cmb_parallel_for(first_task[units], call->workers, run_task_of_wave, call, call->cancel);
    }
}

/* ---- fused waves -------------------------------------------------------------------------------- */

/* Units that go together. */
typedef struct {
    int64_t first, units;
} team;

static team team_number(const cmb_call *call, int64_t number) {
    const int64_t first = number * call->workers;
    return (team){first, cmb_min(call->workers, units_in_flight(call) - first)};
}

/* A task waits only for tasks that were claimed before it, and the first one at work waits for none: no deadlock. */
static void run_task_of_all_waves(void *context, int64_t index, int worker) {
    const cmb_call *call = context;
    const int64_t number = owner_of(call, index), within = index - call->forward.first_task[number];
    const team own = team_number(call, number);
    const int64_t n = own.first + within % own.units;
    const cmb_slot *unit = unit_number(call, n);
    const cmb_plan *plan = unit->head.plan;
    const int32_t t = (int32_t)(within / own.units), next = t + (int32_t)(call->workers / own.units);
    for (int32_t wave = 0; wave < plan->waves; wave++) {
        atomic_int *finished = &call->forward.finished[n * call->waves + wave];
        const int32_t first = plan->wave[wave], tasks = cmb_tasks_in(plan, wave);
        if (t < tasks)
            run_task(call, unit, first + t, next < tasks ? first + next : -1, worker);
        if (wave == plan->waves - 1 || !cmb_wait(finished, t, call->cancel, worker))
            return;
        atomic_store_explicit(finished, t + 1, memory_order_release);
    }
}

static void run_fused_waves(cmb_call *call) {
    int64_t *first_task = call->forward.first_task, number = 0;
    for (int64_t n = 0; n < units_in_flight(call) * call->waves; n++)
        atomic_init(&call->forward.finished[n], 0);
    for (team it = team_number(call, 0); it.units > 0; it = team_number(call, ++number)) {
        int64_t longest = 0;
        for (int64_t n = it.first; n < it.first + it.units; n++) {
            const int32_t tasks = cmb_longest_wave(unit_number(call, n)->head.plan);
            longest = tasks > longest ? tasks : longest;
        }
        first_task[number + 1] = first_task[number] + longest * it.units;
    }
    cmb_parallel_for(first_task[number], call->workers, run_task_of_all_waves, call, call->cancel);
}

void cmb_run_forward(cmb_call *call) {
    call->forward.first_task[0] = 0;
    for (int64_t first = 0; first < call->heads; first += call->max_in_flight) {
        call->forward.first = first;
        call->forward.in_flight = cmb_min(call->heads - first, call->max_in_flight);
        cmb_parallel_for(call->forward.in_flight, call->workers, begin_head, call, call->cancel);
        if (cmb_cancelled(call->cancel, 0)) /* some slots hold no head */
            return;
        if (call->forward.is_fused)
            run_fused_waves(call);
        else
            run_waves(call);
        cmb_parallel_for(call->forward.in_flight, call->workers, end_head, call, call->cancel);
    }
}

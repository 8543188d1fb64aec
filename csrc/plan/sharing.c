// SPDX-License-Identifier: Apache-2.0
/* How workers may share the backward pass of a head: traits.sharing. Items, by task and by tile, are those of
 * engine/shared.c. */
#include "plan/plan.h"

static void widen(cmb_row_range *range, cmb_row_range by) {
    *range = (cmb_row_range){cmb_min(range->low, by.low), cmb_max(range->high, by.high)};
}

/* Widens *range to the positions of the list. Returns how many regions the list has. A list with a step that has
 * positions alone, or regions alone, is judged by its ends. */
static int64_t meet_rows(const cmb_plan *plan, cmb_list list, cmb_row_range *range, cmb_cancel *cancel) {
    int64_t regions = 0;
    if (cmb_are_positions(plan, list)) {
        widen(range, cmb_list_range(list));
        return 0;
    }
    if (list.step && cmb_list_range(list).low >= plan->L)
        return list.count;
    if (cmb_tick(cancel, list.count))
        return 0;
    for (int32_t n = 0; n < list.count; n++) {
        const int64_t x = cmb_list_at(plan, list, n);
        regions += x >= plan->L;
        if (x < plan->L)
            widen(range, (cmb_row_range){x, x});
    }
    return regions;
}

/* What the tiles of a task touch, those of positions or those of regions. */
typedef struct {
    cmb_row_range range;   /* positions; the lowest is L if there are none */
    int64_t rows, regions; /* attended, counted for each tile */
} touched;

static touched find_touched(const cmb_plan *plan, int32_t task, bool of_positions, cmb_cancel *cancel) {
    touched it = {.range = {plan->L, -1}};
    for (int32_t tile = plan->task[task].tile; tile < plan->task[task + 1].tile; tile++) {
        if (cmb_is_of_positions(plan, tile) != of_positions)
            continue;
        meet_rows(plan, plan->tile[tile].query, &it.range, cancel);
        for (int32_t run = plan->tile[tile].run; run < plan->tile[tile + 1].run; run++) {
            it.regions += meet_rows(plan, plan->run[run].row, &it.range, cancel);
            it.rows += plan->run[run].row.count;
        }
    }
    return it;
}

static bool do_positions_come_last(const cmb_plan *plan, int32_t task) {
    for (int32_t tile = plan->task[task].tile + 1; tile < plan->task[task + 1].tile; tile++)
        if (cmb_is_of_positions(plan, tile - 1) && !cmb_is_of_positions(plan, tile))
            return false;
    return true;
}

/* All but the tickets. (Queries of a slice are counted from 0, which makes the answer more cautious.) */
static cmb_plan_sharing find_what_meets(const cmb_plan *plan, cmb_cancel *cancel) {
    int64_t end = 0, summarized = 0, rows = 0, regions = 0;
    bool are_positions_apart = false;
    for (int32_t task = 0; task < plan->tasks && !cmb_tick(cancel, 64); task++) {
        const touched attended = find_touched(plan, task, true, cancel),
                      members = find_touched(plan, task, false, cancel);
        if (attended.range.low < end || !do_positions_come_last(plan, task))
            return (cmb_plan_sharing){0};
        end = cmb_max(end, attended.range.high + 1);
        are_positions_apart |= members.range.low < summarized;
        summarized = cmb_max(summarized, members.range.high + 1);
        rows = cmb_max(rows, cmb_attends(plan, task) ? attended.rows + members.rows : 0);
        regions = cmb_max(regions, attended.regions);
    }
    return (cmb_plan_sharing){.by_task = true,
                              .are_positions_apart = are_positions_apart,
                              .rows_apart = are_positions_apart ? rows : regions};
}

/* Tickets of a task's tiles and pools together; or the most that one of these takes. */
static int64_t count_tickets(const cmb_plan *plan, int32_t task, bool together) {
    int64_t most = 0, rows = 0;
    for (int32_t tile = plan->task[task].tile; tile < plan->task[task + 1].tile; tile++) {
        rows = (together ? rows : 0) + 2 * (int64_t)plan->tile[tile].query.count;
        for (int32_t run = plan->tile[tile].run; run < plan->tile[tile + 1].run; run++)
            rows += plan->run[run].row.count;
        most = cmb_max(most, rows);
    }
    rows = together ? rows : 0;
    for (int32_t p = plan->task[task].pool; p < plan->task[task + 1].pool; p++)
        rows += 2 * (1 + (int64_t)plan->pool[p].child.count);
    return cmb_max(most, rows);
}

/* Of an item. Items of several tasks have a task of each wave at most, in the order of backward. */
static int64_t most_tickets(const cmb_plan *plan, bool by_task, cmb_cancel *cancel) {
    int64_t most = 0, rows = 0;
    for (int32_t task = 0; task < plan->tasks && !cmb_tick(cancel, 64); task++)
        most = cmb_max(most, count_tickets(plan, task, by_task));
    if (!by_task || !plan->traits.is_fusible)
        return most;
    for (int32_t t = cmb_longest_wave(plan) - 1; t >= 0; t--)
        for (int32_t wave = plan->waves - 1; wave >= 0 && !cmb_tick(cancel, 64); wave--) {
            const int32_t task = plan->wave[wave] + t;
            if (t >= cmb_tasks_in(plan, wave))
                continue;
            rows = (cmb_attends(plan, task) ? 0 : rows) + count_tickets(plan, task, true);
            most = cmb_max(most, rows);
        }
    return most;
}

void cmb_find_sharing(cmb_plan *plan, cmb_cancel *cancel) {
    cmb_plan_sharing sharing = find_what_meets(plan, cancel);
    sharing.tickets_of_tile = most_tickets(plan, false, cancel);
    sharing.tickets_of_task = sharing.by_task ? most_tickets(plan, true, cancel) : 0;
    plan->traits.sharing = sharing;
}

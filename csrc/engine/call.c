// SPDX-License-Identifier: Apache-2.0
/* Plans a call: how many workers, which heads at once, fused or wave by wave; and lays out its workspace. */
#include "engine/call.h"

#include <math.h>

/* Below this many query features in all, waking a thread costs more than it gives (about 20 us). */
static const int64_t worth_a_thread = 65536;

/* Heads in flight share each wave's barrier and the outer cache: a wave finds there what the wave before has read. */
static const int64_t bytes_in_flight = 12 << 20;
enum { MAX_IN_FLIGHT = 1024 };

/* ---- planning a call ---------------------------------------------------------------------------- */

/* The largest of the segments' and plans' sizes. */
static void find_sizes(cmb_call *call) {
    const cmb_problem *p = call->problem;
    for (int64_t s = 0; s < call->segments; s++) {
        const cmb_segment it = cmb_segment_at(p, 0, s);
        call->L = it.L > call->L ? it.L : call->L;
        call->queries = it.queries > call->queries ? it.queries : call->queries;
        call->R = it.R > call->R ? it.R : call->R;
    }
    for (int64_t i = 0; i < p->plans; i++) {
        const cmb_plan *plan = p->plan[i];
        call->waves = plan->waves > call->waves ? plan->waves : call->waves;
        call->tasks = plan->tasks > call->tasks ? plan->tasks : call->tasks;
        call->N = plan->N > call->N ? plan->N : call->N;
        call->has_multi_tile_queries = call->has_multi_tile_queries || plan->traits.has_multi_tile_queries;
        for (int32_t s = 0; s < plan->pools; s++)
            call->children = plan->pool[s].child.count > call->children ? plan->pool[s].child.count : call->children;
    }
}

static int count_workers(const cmb_call *call) {
    const cmb_problem *p = call->problem;
    /* A query attends some 64 rows or more; but a few queries may attend any number of regions that are given. */
    const int64_t rows = cmb_count_queries(p) + (p->stages == CMB_ATTEND ? call->R / 64 : 0);
    const double work = (double)p->B * (double)p->Hq * (double)rows * (double)(p->D + p->Dv);
    return work < (double)worth_a_thread ? 1 : call->workers;
}

/* Whether query heads are lanes, and how many. In backward the number of lanes decides the order of
 * the sums over heads. So it depends on the problem alone. */
static void find_lanes(cmb_call *call) {
    const cmb_problem *p = call->problem;
    const int64_t group = p->Hk > 0 ? p->Hq / p->Hk : 1;
    const bool have_own_biases = p->key_bias.data && p->key_bias.heads > p->Hk;
    call->lanes = 1;
    call->are_heads_lanes = false;
    for (int64_t i = 0; i < p->plans; i++)
        call->are_heads_lanes = call->are_heads_lanes || p->plan[i]->traits.has_heads_tiles;
    call->are_heads_lanes =
        call->are_heads_lanes && !call->dropout_threshold && cmb_are_heads_lanes(group, have_own_biases);
    if (!call->are_heads_lanes)
        return;
    call->lanes = cmb_lanes_of_group(group);
    for (int64_t i = 0; i < p->plans; i++)
        if (cmb_count_items(call, p->plan[i]->tasks, p->plan[i]->tiles) > INT32_MAX)
            call->lanes = 1;
}

static void plan_forward(cmb_call *call) {
    const cmb_problem *p = call->problem;
    const int workers = call->workers;
    int64_t tasks_at_once = INT32_MAX; /* of the head with the fewest: those of its longest wave */
    bool is_fused = true;
    for (int64_t i = 0; i < p->plans; i++) {
        is_fused = is_fused && p->plan[i]->traits.is_fusible;
        tasks_at_once = cmb_min(tasks_at_once, cmb_longest_wave(p->plan[i]));
    }
    while (call->lanes > 1 && call->heads / call->lanes * tasks_at_once < 4 * workers) /* workers would idle */
        call->lanes = call->lanes % 2 ? 1 : call->lanes / 2;
    const int64_t units = call->heads / call->lanes;
    /* The longest tasks of a fused unit come last: unless there are many tasks, workers would idle at the end. */
    call->forward.is_fused = is_fused && (workers == 1 || units * tasks_at_once >= 16 * workers);
    const bool meets_results = (call->is_narrow || call->adds) && call->has_multi_tile_queries;
    const int64_t rows = call->forward.is_fused && !meets_results ? call->R : call->L + call->R;
    const int64_t bytes = rows * (2 * p->D + p->Dv) * (int64_t)call->stage->size;
    const int64_t fit = bytes > 0 ? bytes_in_flight / bytes / call->lanes : INT64_MAX;
    /* A wave of one unit may have few tasks or one, and workers of one fused unit would wait for one another. */
    const int64_t needed = tasks_at_once < 4 ? workers : cmb_min(workers, (workers + 3) / 4 + call->forward.is_fused);
    call->max_in_flight = cmb_min(cmb_min(fit > needed ? fit : needed, units), MAX_IN_FLIGHT / call->lanes);
    call->max_in_flight *= call->lanes;
}

static void plan_backward(cmb_call *call) {
    call->max_in_flight = cmb_min(call->heads, call->workers) * call->lanes;
    call->backward.shared = call->workers > 1 ? call->heads % call->workers : 0;
    if (call->backward.shared > 0)
        cmb_plan_shared(call);
}

/* Whether a task's own k_R may lie in scratch: if the call pools them, and their gradients begin with 0. Left out are
 * plans with rows L + R .., which backward would have to pool before the k_R, and heads' tiles, which read tables. */
static bool may_keys_be_own(const cmb_call *call) {
    const cmb_problem *p = call->problem;
    const cmb_gradients *g = call->gradients;
    const bool has_gradients = g && (g->summary_key.data || g->summary_value.data);
    return p->stages == CMB_BOTH && !cmb_picks_key(p) && !p->plan[0]->weighted && !cmb_region_key_of(p)->data &&
           call->N == 0 && !call->are_heads_lanes && !has_gradients;
}

/* Rows in a worker's scratch, and rows in a slot's table: with `may_be_own`, rows that one task alone needs lie in the
 * scratch of its worker, if that takes less memory. */
static void place_rows(const cmb_call *call, bool may_be_own, int64_t own, int64_t others, int64_t *own_rows,
                       int64_t *table_rows) {
    const bool is_less = call->workers * own + call->max_in_flight * others < call->max_in_flight * call->R;
    const bool in_scratch = may_be_own && own > 0 && is_less;
    *own_rows = in_scratch ? own : 0;
    *table_rows = in_scratch ? others : call->R;
}

/* Where q_R and k_R lie, in all heads and segments of the call. Where the tiles of a task run on several workers, all
 * lie in tables. */
static void place_regions(cmb_call *call) {
    const cmb_problem *p = call->problem;
    int64_t queries = 0, other_queries = 0, keys = 0, other_keys = 0;
    bool are_known = true, have_keys = true; /* of all plans */
    for (int64_t i = 0; i < p->plans; i++) {
        const cmb_plan_traits *traits = &p->plan[i]->traits;
        are_known &= traits->query_row != NULL;
        have_keys &= traits->key_row || p->plan[i]->R == 0;
        queries = cmb_max(traits->own_queries, queries);
        other_queries = cmb_max(traits->shared_queries, other_queries);
        keys = cmb_max(traits->own_keys, keys);
        other_keys = cmb_max(traits->shared_keys, other_keys);
    }
    const bool may_be_own = p->plans > 0 && (call->backward.shared == 0 || call->backward.by_task);
    place_rows(call, may_be_own && are_known && cmb_pools_query(p), queries, other_queries, &call->own_queries,
               &call->table_queries);
    place_rows(call, may_be_own && have_keys && may_keys_be_own(call), keys, other_keys, &call->own_keys,
               &call->table_keys);
    /* Not for 16-bit dtypes: a call that keeps h_R has a table of them in float32, and cmb_workspace_bytes gives one
     * figure for calls that keep h_R and for calls that do not. */
    call->are_values_own = call->own_keys > 0 && !call->is_backward && !call->is_narrow && !p->summary_value.data;
}

void cmb_plan_call(cmb_call *call) {
    const cmb_problem *p = call->problem;
    call->scale = p->scale != 0 ? p->scale : signbit(p->scale) ? 0 : cmb_default_scale(p->D);
    call->dropout_threshold = (uint32_t)ceil(p->dropout_p * (1 << 24));
    call->segments = cmb_count_segments(p);
    call->heads = p->B * call->segments * (call->is_backward ? p->Hk : p->Hq);
    find_sizes(call);
    call->workers = count_workers(call);
    find_lanes(call);
    if (call->is_backward)
        plan_backward(call);
    else
        plan_forward(call);
    place_regions(call);
}

/* ---- memory ------------------------------------------------------------------------------------- */

/* Whether the query heads of a key head share one gradient of the keys, or biases, that the caller gives for regions.
 */
static bool is_shared(const cmb_problem *p, const cmb_array *of_both, const cmb_array *of_attend) {
    const cmb_array *given = p->stages & CMB_SUMMARIZE ? of_both : of_attend;
    return given->data && given->heads < p->Hq;
}

static bool is_key_shared(const cmb_problem *p) { return is_shared(p, &p->region_key, &p->summary_key); }
static bool is_bias_shared(const cmb_problem *p) { return is_shared(p, &p->region_bias, &p->summary_bias); }

/* What the slots of one key head share: the gradients of its keys and values, and of regions' where these are given. */
static cmb_slot take_slot_of_group(const cmb_call *call, cmb_arena *arena) {
    const cmb_problem *p = call->problem;
    const size_t L = (size_t)call->L, size = call->stage->size, blocks = (size_t)cmb_blocks(call->L);
    const size_t region_blocks = (size_t)cmb_blocks(call->R);
    cmb_slot slot = {0};
    if (!call->is_backward)
        return slot;
    if (is_key_shared(p) && call->is_narrow)
        slot.key_grad = cmb_take(arena, (size_t)call->R, (size_t)p->D * size);
    if (is_key_shared(p))
        slot.unzeroed.region_key = cmb_take(arena, region_blocks, 1);
    if (is_bias_shared(p))
        slot.unzeroed.region_bias = cmb_take(arena, region_blocks, 1);
    if (call->is_narrow) {
        slot.position.key_grad = cmb_take(arena, L, (size_t)p->D * size);
        slot.position.value_grad = cmb_take(arena, L, (size_t)p->Dv * size);
    }
    slot.unzeroed.key = cmb_take(arena, blocks, 1);
    slot.unzeroed.value = cmb_take(arena, blocks, 1);
    if (p->key_bias.data)
        slot.unzeroed.key_bias = cmb_take(arena, blocks, 1);
    return slot;
}

/* The slot of one head. All take the same bytes, so that from head to head each table has one step. */
static cmb_slot take_slot(const cmb_call *call, cmb_slot slot, cmb_arena *arena) {
    const cmb_problem *p = call->problem;
    const size_t positions = (size_t)call->queries; /* those that are queries */
    const size_t R = (size_t)call->R, queries = (size_t)call->table_queries, keys = (size_t)call->table_keys;
    const size_t size = call->stage->size, d = (size_t)p->D * size, dv = (size_t)p->Dv * size;
    const bool summarize = p->stages & CMB_SUMMARIZE, attend = p->stages & CMB_ATTEND;
    const bool is_narrow = call->is_narrow, backward = call->is_backward;
    slot.count = cmb_take(arena, R, sizeof(int32_t));
    slot.pick = cmb_take(arena, p->plan[0]->pooling == CMB_POOL_FIRST ? R : 0, sizeof(int32_t));
    if (p->region_query.data ? summarize && is_narrow : cmb_pools_query(p))
        slot.query = cmb_take(arena, queries, d);
    if (cmb_region_key_of(p)->data ? is_narrow : summarize && !cmb_picks_key(p))
        slot.key = cmb_take(arena, keys, d);
    const bool keeps_biases = cmb_makes_region_bias(p) && (p->plan[0]->weighted || !cmb_picks_key(p));
    if (keeps_biases && !cmb_region_bias_of(p)->data)
        slot.bias = cmb_take(arena, R, size);
    if (is_narrow || !p->summary_value.data)
        slot.value = cmb_take(arena, call->are_values_own ? keys : R, dv);
    if (summarize && !p->summary_softmax.data)
        slot.softmax = cmb_take(arena, R, 2 * size);
    if (attend && !p->softmax.data)
        slot.position.softmax = cmb_take(arena, positions, 2 * size);
    if (!backward && (is_narrow || call->adds) && attend && call->has_multi_tile_queries)
        slot.position.result = cmb_take(arena, positions, dv);
    if (!backward)
        return slot;
    if (summarize && (is_narrow || !p->region_query.data))
        slot.query_grad = cmb_take(arena, queries, d);
    if (!is_key_shared(p) && (is_narrow || (summarize && !p->region_key.data)))
        slot.key_grad = cmb_take(arena, keys, d);
    if (is_narrow || summarize)
        slot.value_grad = cmb_take(arena, keys, dv);
    if (is_narrow)
        slot.position.query_grad = cmb_take(arena, positions, d);
    if (cmb_makes_region_bias(p))
        slot.bias_grad = cmb_take(arena, R, size);
    if (attend && p->sink.data)
        slot.position.sink_grad = cmb_take(arena, positions, size);
    slot.order = cmb_take(arena, (size_t)call->tasks, sizeof(int32_t));
    slot.unzeroed.query = cmb_take(arena, (size_t)cmb_blocks(call->L), 1);
    const size_t region_blocks = (size_t)cmb_blocks(call->R);
    slot.unzeroed.region_query = cmb_take(arena, region_blocks, 1);
    slot.unzeroed.region_value = cmb_take(arena, region_blocks, 1);
    if (!is_key_shared(p))
        slot.unzeroed.region_key = cmb_take(arena, region_blocks, 1);
    if (!is_bias_shared(p) && (cmb_makes_region_bias(p) || cmb_region_bias_of(p)->data))
        slot.unzeroed.region_bias = cmb_take(arena, region_blocks, 1);
    return slot;
}

static cmb_shared_head take_shared_head(const cmb_call *call, cmb_arena *arena) {
    const size_t locks = 2 * (size_t)(call->L + call->R);
    cmb_shared_head it = {0};
    it.tickets.dispenser = cmb_take(arena, locks, sizeof *it.tickets.dispenser);
    it.tickets.now_serving = cmb_take(arena, locks, sizeof *it.tickets.now_serving);
    it.first_item = cmb_take(arena, (size_t)call->tasks + 1, sizeof *it.first_item);
    return it;
}

void cmb_take_workspace(cmb_call *call, cmb_arena *arena) {
    const size_t slots = (size_t)call->max_in_flight, workers = (size_t)call->workers;
    const bool shares = call->backward.shared > 0, is_fused = call->forward.is_fused;
    call->segment = cmb_take(arena, (size_t)call->segments, sizeof *call->segment);
    call->slot = cmb_take(arena, slots, sizeof *call->slot);
    call->scratch = cmb_take(arena, workers, sizeof *call->scratch);
    call->forward.first_task = cmb_take(arena, slots + 1, sizeof *call->forward.first_task);
    call->forward.finished =
        cmb_take(arena, is_fused ? slots * (size_t)call->waves : 0, sizeof *call->forward.finished);
    call->backward.shared_head = cmb_take(arena, (size_t)call->backward.shared, sizeof *call->backward.shared_head);
    call->backward.item = cmb_take(arena, shares ? workers : 0, sizeof *call->backward.item);
    const bool is_taken = arena->base;
    const cmb_scratch_use use = {.isa = call->isa,
                                 .D = call->problem->D,
                                 .Dv = call->problem->Dv,
                                 .N = call->N,
                                 .queries = call->own_queries,
                                 .keys = call->own_keys,
                                 .children = call->children,
                                 .apart = call->backward.max_apart,
                                 .dropout = call->dropout_threshold > 0,
                                 .softcap = call->problem->softcap > 0,
                                 .biased = cmb_has_biases(call->problem),
                                 .backward = call->is_backward};

    if (is_taken)
        cmb_find_segments(call->given, call->component, call->segment);
    cmb_slot of_group = {0};
    for (int64_t n = 0; n < call->max_in_flight && !arena->overflow; n++) {
        if (n % call->lanes == 0)
            of_group = take_slot_of_group(call, arena);
        const cmb_slot slot = take_slot(call, of_group, arena);
        if (is_taken)
            call->slot[n] = slot;
    }
    for (int n = 0; n < call->workers; n++) {
        cmb_scratch *scratch = call->stage->scratch(arena, &use, call->cancel, n);
        if (is_taken)
            call->scratch[n] = scratch;
    }
    for (int64_t n = 0; n < call->backward.shared; n++) {
        const cmb_shared_head shared_head = take_shared_head(call, arena);
        if (is_taken)
            call->backward.shared_head[n] = shared_head;
    }
    for (int n = 0; shares && n < call->workers; n++) {
        cmb_ticket *ticket = cmb_take(arena, (size_t)call->backward.max_tickets, sizeof *ticket);
        if (is_taken)
            call->backward.item[n] = (cmb_item){.worker = n, .cancel = call->cancel, .ticket = ticket};
    }
}

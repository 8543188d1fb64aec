// SPDX-License-Identifier: Apache-2.0
/*
 * One head: views of the caller's arrays and of the slot's workspace as rows, the zeroing of gradients, and the storing
 * of what was computed apart from the caller's rows.
 */
#include "engine/call.h"

#include <string.h>

static const cmb_rows no_rows = {0};

/* ---- views -------------------------------------------------------------------------------------- */

cmb_head_id cmb_head_number(const cmb_call *call, int64_t n, int64_t heads) {
    CMB_ASSERT(n >= 0 && n < call->heads && heads > 0);
    const int64_t s = n / heads % call->segments;
    return (cmb_head_id){.b = n / heads / call->segments, .h = n % heads, .s = s, .segment = call->segment[s]};
}

/* Rows first, first + 1, ... of an array with elements of `size` bytes, in the array's head that serves the query head.
 */
static cmb_rows rows_of(const cmb_problem *p, const cmb_array *array, size_t size, const cmb_head_id *id,
                        int64_t first) {
    if (!array->data)
        return no_rows;
    CMB_ASSERT(id->b >= 0 && id->b < p->B && id->h >= 0 && id->h < p->Hq);
    const int64_t at = id->b * array->batch + id->h * array->heads / p->Hq * array->head + first * array->row;
    return (cmb_rows){.data = (char *)array->data + at * (int64_t)size, .row = array->row};
}

/* The caller's rows of positions, of those that are queries, and of regions, in the dtype. */
static cmb_rows positions(const cmb_call *call, const cmb_array *array, const cmb_head_id *id) {
    return rows_of(call->problem, array, call->stage->stored_size, id, id->segment.first);
}

static cmb_rows queries(const cmb_call *call, const cmb_array *array, const cmb_head_id *id) {
    return rows_of(call->problem, array, call->stage->stored_size, id, id->segment.first_row);
}

static cmb_rows regions(const cmb_call *call, const cmb_array *array, const cmb_head_id *id) {
    return rows_of(call->problem, array, call->stage->stored_size, id, id->segment.first_region);
}

/* The same of lse, biases and softmax states, whose elements are those that are computed with. */
static cmb_rows positions_as_computed(const cmb_call *call, const cmb_array *array, const cmb_head_id *id) {
    return rows_of(call->problem, array, call->stage->size, id, id->segment.first);
}

static cmb_rows queries_as_computed(const cmb_call *call, const cmb_array *array, const cmb_head_id *id) {
    return rows_of(call->problem, array, call->stage->size, id, id->segment.first_row);
}

static cmb_rows regions_as_computed(const cmb_call *call, const cmb_array *array, const cmb_head_id *id) {
    return rows_of(call->problem, array, call->stage->size, id, id->segment.first_region);
}

/* The workspace's rows where there are any, else the caller's. */
static cmb_rows own_or(void *own, int64_t dim, cmb_rows callers) {
    return own ? (cmb_rows){.data = own, .row = dim} : callers;
}

/* ---- the head ----------------------------------------------------------------------------------- */

static cmb_dropout dropout_of(const cmb_call *call, const cmb_head_id *id) {
    const cmb_problem *p = call->problem;
    return (cmb_dropout){
        .threshold = call->dropout_threshold,
        .factor = p->dropout_p < 1 ? 1 / (1 - p->dropout_p) : 0,
        .head = (uint32_t)id->h + p->dropout_head,
        .batch = (uint32_t)id->b + p->dropout_batch,
        .row = (uint32_t)id->segment.dropout_row,
        .seed = p->seed,
    };
}

static cmb_head make_head(const cmb_call *call, const cmb_slot *slot) {
    const cmb_problem *p = call->problem;
    const cmb_head_id *id = &slot->id;
    const int64_t key_head = id->h / (p->Hq / p->Hk);
    const cmb_plan *plan = id->segment.plan[p->plans == call->segments ? 0 : id->b * p->Hk + key_head];
    const bool summarize = p->stages & CMB_SUMMARIZE, first = plan->pooling == CMB_POOL_FIRST;
    const bool weighted = summarize && plan->weighted && !p->region_key.data;
    const bool makes_bias = cmb_makes_region_bias(p);
    const bool are_picks_known = plan->traits.pick && !p->key_mask;
    cmb_head head = {
        .plan = plan,
        .stages = p->stages,
        .L = id->segment.L,
        .queries = id->segment.queries,
        .D = p->D,
        .Dv = p->Dv,
        .R = id->segment.R,
        .scale = call->scale,
        .softcap = p->softcap,
        .dropout = dropout_of(call, id),
        .key_mask = p->key_mask ? p->key_mask + id->b * p->mask_batch + id->segment.first * p->mask_row : NULL,
        .mask_row = p->mask_row,
        .all_live = !p->key_mask, /* every region that a plan summarizes or attends has a pool, and no pool is empty */
        .pool_query = cmb_pools_query(p),
        .query_row = call->own_queries ? plan->traits.query_row : NULL,
        .key_row = call->own_keys ? plan->traits.key_row : NULL,
        .value_row = call->are_values_own ? plan->traits.key_row : NULL,
        .pool_key = summarize && !first && !p->region_key.data && !weighted,
        .pick_query = summarize && first && !p->region_query.data,
        .pick_key = summarize && first && !p->region_key.data && !weighted,
        .weighted = weighted,
        .biased = cmb_has_biases(p),
        .pool_bias = makes_bias && !first && !plan->weighted,
        .pick_bias = makes_bias && first && !plan->weighted,
        .weighted_bias = makes_bias && plan->weighted,
        .count = slot->count,
        .pick = are_picks_known ? plan->traits.pick : slot->pick,
        .picked = are_picks_known || !first ? NULL : slot->pick,
        .query = queries(call, &p->query, id),
        .key = positions(call, &p->key, id),
        .value = positions(call, &p->value, id),
        .region_query = own_or(slot->query, p->D, regions(call, &p->region_query, id)),
        .region_key = own_or(slot->key, p->D, regions(call, cmb_region_key_of(p), id)),
        .region_value = own_or(slot->value, p->Dv, regions(call, &p->summary_value, id)),
        .key_bias = positions_as_computed(call, &p->key_bias, id),
        .region_bias = own_or(slot->bias, 1, regions_as_computed(call, cmb_region_bias_of(p), id)),
        .sink = p->stages & CMB_ATTEND ? rows_of(p, &p->sink, call->stage->size, id, 0) : no_rows,
        .softmax = own_or(slot->position.softmax, 2, queries_as_computed(call, &p->softmax, id)),
        .region_softmax = own_or(slot->softmax, 2, regions_as_computed(call, &p->summary_softmax, id)),
        .out = queries(call, &p->out, id),
    };
    if (plan->traits.has_multi_tile_queries || !(call->is_narrow || call->adds))
        head.result = own_or(slot->position.result, p->Dv, head.out);
    head.sink.row = 0;
    head.counted = !head.all_live || plan->size_bias || plan->pooling == CMB_POOL_MEAN || plan->pooling == CMB_POOL_SUM;
    return head;
}

void cmb_make_tile_of_slots(const cmb_call *call, const cmb_slot *slot, int32_t tile, cmb_heads_tile *to) {
    const cmb_tile *t = slot->head.plan->tile + tile;
    const int32_t query = cmb_list_at(slot->head.plan, t->query, 0);
    for (int n = 0; n < call->lanes; n++) {
        const cmb_rows *rows = &slot[n].head.grad.query;
        if (rows->unzeroed && rows->unzeroed[query / CMB_BLOCK_ROWS])
            call->stage->zero_block(*rows, query / CMB_BLOCK_ROWS);
    }
    const cmb_head *second = &slot[call->lanes > 1].head;
    cmb_make_heads_tile(call->stage, &slot->head, second, call->lanes, query, t[0].run, t[1].run, to);
    to->head.grad.query.unzeroed = NULL;
}

/* Widens the regions' rows that the caller passes and the call reads. */
static void widen_regions(const cmb_call *call, const cmb_slot *slot, int worker) {
    const cmb_problem *p = call->problem;
    const cmb_head *head = &slot->head;
    if (!call->is_narrow)
        return;
    const bool only_attend = !(p->stages & CMB_SUMMARIZE), reads_summaries = only_attend || call->is_backward;
    const cmb_array *query = &p->region_query, *key = cmb_region_key_of(p), *value = &p->summary_value;
    cmb_scratch *scratch = call->scratch[worker];
    if (query->data && !only_attend)
        call->stage->widen(head->R, head->D, regions(call, query, &slot->id), head->region_query, scratch);
    if (key->data && (key == &p->region_key || reads_summaries))
        call->stage->widen(head->R, head->D, regions(call, key, &slot->id), head->region_key, scratch);
    if (value->data && reads_summaries)
        call->stage->widen(head->R, head->Dv, regions(call, value, &slot->id), head->region_value, scratch);
}

static void clear_counts(const cmb_head *head) {
    memset(head->count, 0, (size_t)head->plan->R * sizeof(int32_t));
    for (int32_t r = 0; head->plan->traits.only_attends && r < head->plan->R; r++)
        head->count[r] = 1; /* a region that is given counts as one position */
    if (head->picked)
        memset(head->picked, 0, (size_t)head->plan->R * sizeof(int32_t));
}

void cmb_begin_head(const cmb_call *call, cmb_slot *slot, cmb_head_id id, int worker) {
    slot->id = id;
    slot->head = make_head(call, slot);
    clear_counts(&slot->head);
    widen_regions(call, slot, worker);
}

/* Stores finished rows that were computed apart: rounded to 16 bits, or added to the caller's. Rows whose
 * softmax attends nothing add nothing. */
static void store_rows(const cmb_call *call, int64_t n, int64_t dim, cmb_rows softmax, cmb_rows from, cmb_rows to,
                       int worker) {
    if (!from.data || !to.data || from.data == to.data)
        return;
    if (call->is_narrow)
        call->stage->narrow(n, dim, from, to, call->scratch[worker]);
    else
        call->stage->add(n, dim, softmax, from, to, call->scratch[worker]);
}

/* The mean over the components, once the last one has stored `own`: the sum of all, or, where the mean goes elsewhere,
 * the last of the terms, which lie side by side. */
static void store_mean(const cmb_call *call, int64_t n, int64_t dim, cmb_rows own, cmb_rows mean, int worker) {
    const int64_t count = cmb_count_components(call->given), terms = own.data == mean.data ? 1 : count;
    if (count == 1)
        return;
    own.data = (char *)own.data - (terms - 1) * dim * (int64_t)call->stage->stored_size;
    call->stage->mean(n, dim, terms, count, own, mean, call->scratch[worker]);
}

static bool is_last_component(const cmb_call *call) { return call->component == cmb_count_components(call->given) - 1; }

/* ---- results ------------------------------------------------------------------------------------ */

void cmb_begin_results(const cmb_call *call, const cmb_slot *slot) {
    const cmb_head *head = &slot->head;
    if (head->stages & CMB_ATTEND)
        call->stage->begin(head->queries, head->softmax);
    if (head->stages & CMB_SUMMARIZE)
        call->stage->begin(head->R, head->region_softmax);
}

static void end_positions(const cmb_call *call, const cmb_slot *slot, int worker) {
    const cmb_head *head = &slot->head;
    const cmb_rows lse = queries_as_computed(call, &call->problem->lse, &slot->id);
    call->stage->finish(head->queries, head->softmax, head->result, head->Dv, no_rows, 0);
    store_rows(call, head->queries, head->Dv, head->softmax, head->result, head->out, worker);
    if (!head->result.data && !call->adds)
        call->stage->clear_unattended(head->queries, head->softmax, head->out, head->Dv);
    if (is_last_component(call))
        store_mean(call, head->queries, head->Dv, head->out, queries(call, &call->given->out, &slot->id), worker);
    if (lse.data)
        call->stage->write_lse(head->queries, head->softmax, head->sink, lse);
}

static void end_regions(const cmb_call *call, const cmb_slot *slot, int worker) {
    const cmb_problem *p = call->problem;
    const cmb_head *head = &slot->head;
    const cmb_rows key = regions(call, &p->summary_key, &slot->id), value = regions(call, &p->summary_value, &slot->id),
                   lse = regions_as_computed(call, &p->summary_lse, &slot->id);
    if (value.data) {
        call->stage->finish(head->R, head->region_softmax, head->region_value, head->Dv,
                            head->weighted ? head->region_key : no_rows, head->D);
        store_rows(call, head->R, head->Dv, head->region_softmax, head->region_value, value, worker);
        if (head->weighted)
            store_rows(call, head->R, head->D, head->region_softmax, head->region_key, key, worker);
    }
    if (head->weighted_bias)
        call->stage->finish(head->R, head->region_softmax, head->region_bias, 1, no_rows, 0);
    if (lse.data)
        call->stage->write_lse(head->R, head->region_softmax, no_rows, lse);
    /* Of the query heads that share one k_R the first one copies it. */
    const bool is_first = p->summary_key.data && slot->id.h % (p->Hq / p->summary_key.heads) == 0;
    if (p->stages == CMB_SUMMARIZE && is_first && !head->weighted)
        call->stage->copy_region_keys(head, head->R, key, call->scratch[worker]);
    const bool copies_bias = p->stages == CMB_SUMMARIZE && p->summary_bias.data && !head->weighted_bias;
    if (copies_bias && slot->id.h % (p->Hq / p->summary_bias.heads) == 0)
        call->stage->copy_region_biases(head, head->R, regions_as_computed(call, &p->summary_bias, &slot->id));
}

void cmb_end_results(const cmb_call *call, const cmb_slot *slot, int worker) {
    if (slot->head.stages & CMB_ATTEND)
        end_positions(call, slot, worker);
    if (slot->head.stages & CMB_SUMMARIZE)
        end_regions(call, slot, worker);
}

/* ---- gradients ---------------------------------------------------------------------------------- */

/* Rows that are to start from zero. They are zeroed block by block, when one of a block's rows is first touched or by
 * zero_rest; `first` marks all blocks as unzeroed. */
static cmb_rows zeroed(cmb_rows rows, int64_t count, int64_t dim, uint8_t *unzeroed, bool first) {
    CMB_ASSERT(count == 0 || (rows.data && unzeroed));
    rows.unzeroed = unzeroed;
    rows.count = count;
    rows.dim = dim;
    if (first)
        memset(unzeroed, 1, (size_t)cmb_blocks(count));
    return rows;
}

/* The same, unless the rows hold the sums of earlier components, to which this one adds. */
static cmb_rows zeroed_or_held(cmb_rows rows, int64_t count, int64_t dim, uint8_t *unzeroed, bool first, bool is_held) {
    if (!is_held)
        return zeroed(rows, count, dim, unzeroed, first);
    rows.count = count;
    rows.dim = dim;
    return rows;
}

/* Zeroes the blocks that no task has touched. The first touch of new memory is slow enough for a cancel to be looked
 * for.
 */
static void zero_rest(const cmb_call *call, cmb_rows rows, int worker) {
    for (int64_t block = 0; block < cmb_blocks(rows.count); block++) {
        if (block % CMB_BLOCK_ROWS == 0 && cmb_cancelled(call->cancel, worker))
            return;
        if (rows.unzeroed && rows.unzeroed[block])
            call->stage->zero_block(rows, block);
    }
}

/* The gradients of biases are summed in the caller's rows, those of regions whose biases are made in the slot's. */
static void begin_bias_gradients(const cmb_call *call, cmb_slot *slot) {
    const cmb_problem *p = call->problem;
    const cmb_gradients *g = call->gradients;
    const cmb_head_id *id = &slot->id;
    cmb_head *head = &slot->head;
    const bool summarize = p->stages & CMB_SUMMARIZE, first = id->h % (p->Hq / p->Hk) == 0;
    const cmb_array *given = summarize ? &p->region_bias : &p->summary_bias;
    head->grad.key_bias = head->grad.region_bias = no_rows;
    if (p->key_bias.data)
        head->grad.key_bias =
            zeroed_or_held(positions_as_computed(call, &g->key_bias, id), head->L, 1, slot->unzeroed.key_bias,
                           first || p->key_bias.heads == p->Hq, call->component > 0);
    if (given->data || slot->bias_grad) {
        const cmb_rows callers = regions_as_computed(call, summarize ? &g->region_bias : &g->summary_bias, id);
        head->grad.region_bias = zeroed(own_or(slot->bias_grad, 1, callers), head->R, 1, slot->unzeroed.region_bias,
                                        first || !given->data || given->heads == p->Hq);
    }
    const cmb_array *summary = &g->summary_bias; /* of Hk heads: one array for a group, which adds it once */
    if (summarize && summary->data && head->grad.region_bias.data && id->h % (p->Hq / summary->heads) == 0)
        call->stage->add_biases(head->R, head->region_softmax, regions_as_computed(call, summary, id),
                                head->grad.region_bias);
    if (head->sink.data) {
        head->grad.sink = (cmb_rows){.data = slot->position.sink_grad, .row = 1};
        call->stage->begin_sink(head);
    }
}

/* Query heads of one group share the gradients of key and value, which the first of them begins. */
void cmb_begin_gradients(const cmb_call *call, cmb_slot *slot, int worker) {
    const cmb_problem *p = call->problem;
    const cmb_gradients *g = call->gradients;
    const cmb_head_id *id = &slot->id;
    cmb_head *head = &slot->head;
    const int64_t L = head->L, R = head->R, D = p->D, Dv = p->Dv, group = p->Hq / p->Hk;
    const bool summarize = p->stages & CMB_SUMMARIZE, first = id->h % group == 0;
    const cmb_rows query = own_or(slot->position.query_grad, D, queries(call, &g->query, id));
    const cmb_rows key = own_or(slot->position.key_grad, D, positions(call, &g->key, id));
    const cmb_rows value = own_or(slot->position.value_grad, Dv, positions(call, &g->value, id));
    head->grad.query = zeroed_or_held(query, head->queries, D, slot->unzeroed.query, true, call->adds);
    head->grad.key = zeroed_or_held(key, L, D, slot->unzeroed.key, first, call->adds);
    head->grad.value = zeroed_or_held(value, L, Dv, slot->unzeroed.value, first, call->adds);
    head->grad.out = queries(call, &g->out, id);
    head->grad.lse = queries_as_computed(call, &g->lse, id);

    /* With stage 1 the gradients of k_R and h_R are sums of the call's own, which begin with what the caller passes as
     * gradients of the summaries. Without it they are outputs. */
    const cmb_rows summary_key = regions(call, &g->summary_key, id),
                   summary_value = regions(call, &g->summary_value, id);
    const cmb_rows region_query = p->region_query.data ? regions(call, &g->region_query, id) : no_rows;
    const cmb_rows region_key = !summarize           ? summary_key
                                : p->region_key.data ? regions(call, &g->region_key, id)
                                                     : no_rows;
    const cmb_array *given_key = summarize ? &p->region_key : &p->summary_key;
    const bool begins_key = first || !given_key->data || given_key->heads == p->Hq;
    const int64_t keys = call->own_keys ? call->table_keys : R;
    head->grad.region_key =
        zeroed(own_or(slot->key_grad, D, region_key), keys, D, slot->unzeroed.region_key, begins_key);
    head->grad.region_value = zeroed(own_or(slot->value_grad, Dv, summarize ? no_rows : summary_value), keys, Dv,
                                     slot->unzeroed.region_value, true);
    begin_bias_gradients(call, slot);
    if (!summarize)
        return;
    const int64_t queries = call->own_queries ? call->table_queries : R;
    head->grad.region_query =
        zeroed(own_or(slot->query_grad, D, region_query), queries, D, slot->unzeroed.region_query, true);
    /* The gradient of a summary_key of Hk heads is one array for a group, which adds it once. */
    if (g->summary_key.data && id->h % (p->Hq / g->summary_key.heads) == 0)
        call->stage->add(R, D, head->region_softmax, summary_key, head->grad.region_key, call->scratch[worker]);
    if (summary_value.data)
        call->stage->add(R, Dv, head->region_softmax, summary_value, head->grad.region_value, call->scratch[worker]);
}

/* The gradient of the sink from one head's queries. */
static void *sink_sum(const cmb_call *call, int64_t b, int64_t s, int64_t h) {
    char *sums = call->backward.sink;
    const int64_t n = (b * cmb_count_components(call->given) + call->component) * call->segments + s;
    return sums ? sums + (n * call->problem->Hq + h) * (int64_t)call->stage->size : NULL;
}

/* Completes what begin_bias_gradients began. */
static void end_bias_gradients(const cmb_call *call, const cmb_slot *slot, int worker) {
    const cmb_problem *p = call->problem;
    const cmb_head *head = &slot->head;
    const cmb_head_id *id = &slot->id;
    const int64_t count = cmb_count_components(call->given);
    const cmb_array *given = p->stages & CMB_SUMMARIZE ? &p->region_bias : &p->summary_bias;
    const bool last = (id->h + 1) % (p->Hq / p->Hk) == 0;
    if (p->key_bias.data && (last || p->key_bias.heads == p->Hq)) {
        zero_rest(call, head->grad.key_bias, worker);
        if (count > 1 && is_last_component(call))
            call->stage->divide(head->L, count, head->grad.key_bias);
    }
    if (given->data && (last || given->heads == p->Hq)) {
        zero_rest(call, head->grad.region_bias, worker);
        if (count > 1)
            call->stage->divide(head->R, count, head->grad.region_bias);
    }
    if (head->sink.data && call->backward.sink)
        call->stage->sum_sink(head, sink_sum(call, id->b, id->s, id->h));
}

/* Of the gradients that are outputs: zeroes what no task has touched, and stores what was computed apart. A group's
 * gradients are complete after its last query head. */
void cmb_end_gradients(const cmb_call *call, const cmb_slot *slot, int worker) {
    const cmb_problem *p = call->problem;
    const cmb_gradients *g = call->gradients, *given = call->given_grads;
    const cmb_head *head = &slot->head;
    const cmb_head_id *id = &slot->id;
    const bool summarize = p->stages & CMB_SUMMARIZE, last = (id->h + 1) % (p->Hq / p->Hk) == 0;
    const cmb_array *given_key = summarize ? &p->region_key : &p->summary_key;
    const bool is_key_complete = given_key->data && (last || given_key->heads == p->Hq);
    const struct {
        bool is_complete;
        const cmb_rows *sums;
        cmb_rows to;
        const cmb_array *mean; /* of positions, over the components */
    } outputs[] = {
        {true, &head->grad.query, queries(call, &g->query, id), &given->query},
        {last, &head->grad.key, positions(call, &g->key, id), &given->key},
        {last, &head->grad.value, positions(call, &g->value, id), &given->value},
        {summarize && p->region_query.data, &head->grad.region_query, regions(call, &g->region_query, id), NULL},
        {is_key_complete, &head->grad.region_key, regions(call, summarize ? &g->region_key : &g->summary_key, id),
         NULL},
        {!summarize, &head->grad.region_value, regions(call, &g->summary_value, id), NULL},
    };
    for (size_t n = 0; n < sizeof outputs / sizeof *outputs; n++) {
        const cmb_rows *sums = outputs[n].sums, to = outputs[n].to;
        const cmb_array *mean = outputs[n].mean;
        if (!outputs[n].is_complete)
            continue;
        zero_rest(call, *sums, worker);
        store_rows(call, sums->count, sums->dim, no_rows, *sums, to, worker);
        if (!mean || is_last_component(call))
            store_mean(call, sums->count, sums->dim, to, mean ? positions(call, mean, id) : to, worker);
    }
    end_bias_gradients(call, slot, worker);
}

void cmb_store_sinks(const cmb_call *call) {
    const cmb_problem *p = call->given;
    const int64_t components = cmb_count_components(p), sums = components * cmb_count_segments(p);
    const cmb_array *to = &call->given_grads->sink;
    const size_t size = call->stage->size;
    if (!(p->stages & CMB_ATTEND) || !p->sink.data)
        return;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->Hq; h++) {
            char *own = call->backward.sink, *at = (char *)to->data + (b * to->batch + h * to->head) * (int64_t)size;
            own = own ? own + (b * sums * p->Hq + h) * (int64_t)size : NULL;
            call->stage->add_up(own ? sums : 0, own, p->Hq, at);
            if (components > 1)
                call->stage->divide(1, components, (cmb_rows){.data = at, .row = 1});
        }
}

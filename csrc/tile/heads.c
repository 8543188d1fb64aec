// SPDX-License-Identifier: Apache-2.0
#include "tile/heads.h"

/* Row x of every head, one after another, as the rows of one array. */
static cmb_rows across(cmb_rows first, cmb_rows second, int32_t x, size_t size) {
    const uintptr_t from = (uintptr_t)first.data;
    if (!first.data)
        return first;
    return (cmb_rows){
        .data = (void *)(from + (uintptr_t)(x * first.row) * size),
        .row = (int64_t)((uintptr_t)second.data - from) / (int64_t)size,
    };
}

void cmb_make_heads_tile(const cmb_stage_table *stage, const cmb_head *first, const cmb_head *second, int lanes,
                         int32_t query, int32_t run, int32_t end, cmb_heads_tile *to) {
    const size_t size = stage->size, stored = stage->stored_size;
    cmb_head *head = &to->head;
    *head = *first;
    to->plan = *first->plan;
    to->tile[0] = (cmb_tile){{0, 1, lanes}, run, cmb_tile_width(lanes)};
    to->tile[1] = (cmb_tile){.run = end};
    to->plan.tile = to->tile;
    head->plan = &to->plan;
    head->L = head->L > lanes ? head->L : lanes; /* the lanes are rows of positions */
    head->lane_value = 0;
    head->query = across(first->query, second->query, query, stored);
    head->out = across(first->out, second->out, query, stored);
    head->result = across(first->result, second->result, query, size);
    head->softmax = across(first->softmax, second->softmax, query, size);
    head->sink = across(first->sink, second->sink, query, size);
    head->grad.query = across(first->grad.query, second->grad.query, query, size);
    head->grad.sink = across(first->grad.sink, second->grad.sink, query, size);
    head->grad.out = across(first->grad.out, second->grad.out, query, stored);
    head->grad.lse = across(first->grad.lse, second->grad.lse, query, size);
}

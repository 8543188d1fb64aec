// SPDX-License-Identifier: Apache-2.0
/* A finished plan: one block of memory, the struct first and its arrays behind it, but for traits.key_row, which has a
 * block of its own. combiner.h says what a plan holds. */
#include "plan/plan.h"

#include <string.h>

static bool plan_size(const cmb_plan *plan, bool has_traits, size_t *bytes) {
    const size_t regions = has_traits ? (size_t)plan->R : 0, picks = has_traits ? (size_t)cmb_picking_regions(plan) : 0;
    const size_t part[][2] = {
        {(size_t)plan->masks, sizeof *plan->mask},
        {(size_t)plan->waves + 1, sizeof *plan->wave},
        {(size_t)plan->tasks + 1, sizeof *plan->task},
        {(size_t)plan->pools, sizeof *plan->pool},
        {(size_t)plan->tiles + 1, sizeof *plan->tile},
        {(size_t)plan->runs, sizeof *plan->run},
        {(size_t)plan->indices, sizeof *plan->index},
        {regions, sizeof *plan->traits.query_row},
        {picks, sizeof *plan->traits.pick},
        {picks ? (size_t)plan->tiles : 0, sizeof *plan->traits.reused_rows},
    };
    *bytes = sizeof *plan;
    for (size_t n = 0; n < sizeof part / sizeof *part; n++) {
        size_t size;
        if (!cmb_multiply(part[n][0], part[n][1], &size) || !cmb_add(*bytes, size, bytes))
            return false;
    }
    return true;
}

void cmb_copy_bytes(cmb_cancel *cancel, void *to, const void *from, size_t bytes) {
    enum { PIECE = 4 << 20 };
    for (size_t at = 0; at < bytes && !cmb_cancelled(cancel, 0); at += PIECE)
        memcpy((char *)to + at, (const char *)from + at, bytes - at < PIECE ? bytes - at : PIECE);
}

static const void *append(cmb_cancel *cancel, char **end, const void *from, size_t count, size_t size) {
    void *to = *end;
    cmb_copy_bytes(cancel, to, from, count * size);
    *end += count * size;
    return to;
}

cmb_status cmb_copy_plan(const cmb_plan *from, bool is_step, cmb_cancel *cancel, cmb_plan **plan, cmb_error *error) {
    size_t bytes;
    if (!plan_size(from, !is_step, &bytes))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "a plan of length %lld does not fit in memory", (long long)from->L);
    cmb_plan *copy = cmb_allocate(bytes);
    if (!copy)
        return cmb_fail(error, CMB_ERR_MEMORY, "out of memory: a plan of length %lld takes %zu bytes",
                        (long long)from->L, bytes);
    *copy = *from;
    copy->traits = (cmb_plan_traits){0};
    char *end = (char *)(copy + 1);
    copy->mask = append(cancel, &end, from->mask, (size_t)from->masks, sizeof *from->mask); /* first: the widest type */
    copy->wave = append(cancel, &end, from->wave, (size_t)from->waves + 1, sizeof *from->wave);
    copy->task = append(cancel, &end, from->task, (size_t)from->tasks + 1, sizeof *from->task);
    copy->pool = append(cancel, &end, from->pool, (size_t)from->pools, sizeof *from->pool);
    copy->tile = append(cancel, &end, from->tile, (size_t)from->tiles + 1, sizeof *from->tile);
    copy->run = append(cancel, &end, from->run, (size_t)from->runs, sizeof *from->run);
    copy->index = append(cancel, &end, from->index, (size_t)from->indices, sizeof *from->index);
    cmb_status status = cmb_cancel_status(cancel, error); /* a copy cut short must not be read */
    if (!status && !is_step)
        status = cmb_derive_traits(copy, (int32_t *)(void *)end, cancel, error);
    if (status)
        cmb_plan_free(copy);
    else
        *plan = copy;
    return status;
}

cmb_status cmb_plan_from_arrays(const cmb_plan *arrays, const cmb_interrupt *interrupt, cmb_plan **plan,
                                cmb_error *error) {
    *plan = NULL;
    cmb_cancel cancel;
    cmb_cancel_init(&cancel, interrupt);
    TRY(cmb_check_plan(arrays, &cancel, error));
    return cmb_copy_plan(arrays, false, &cancel, plan, error);
}

void cmb_plan_free(cmb_plan *plan) {
    if (plan)
        cmb_release((void *)plan->traits.key_row);
    cmb_release(plan);
}

size_t cmb_plan_bytes(const cmb_plan *plan) {
    size_t bytes = 0;
    plan_size(plan, true, &bytes);
    return bytes + (plan->traits.key_row ? (size_t)plan->R * sizeof *plan->traits.key_row : 0);
}

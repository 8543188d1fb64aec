// SPDX-License-Identifier: Apache-2.0
/*
 * Runs a problem: checks it, plans it, takes one workspace, and goes through the heads. All that can fail comes before
 * the first store. The workspace is measured and taken by the same code (arena.h), so that cmb_workspace_bytes is
 * exact.
 *
 * The components of a mixture are calls of their own, one after the other in the same workspace. What they compute for
 * positions, out or the gradients of query, key and value, meets in one of two ways:
 *
 *   sums     the first component stores its results in the caller's rows, each later one adds its own to them: a
 *            head's out when it is complete, gradients tile by tile
 *   parts    each component stores its results side by side with those of the others, in component_out, or, since sums
 *            of 16-bit numbers would be rounded, in the workspace
 *
 * The last component makes the mean of either, head by head as each is complete. Results for regions are the rows of
 * one component, which divides them itself.
 */
#include "engine/call.h"
#include "engine/check.h"
#include "runtime/memory.h"

/* What the calls of a problem's components share. */
typedef struct {
    cmb_call asked; /* what each call is planned from */
    int64_t components;
    bool has_parts;
    cmb_array part[3];   /* of out, or of the gradients of query, key and value: [B, heads, L, components * dim] */
    cmb_problem problem; /* of the component at hand, where there are several */
    cmb_gradients gradients;
} mixture;

static mixture begin_mixture(const cmb_problem *problem, const cmb_gradients *gradients, bool is_backward,
                             cmb_cancel *cancel) {
    const cmb_stage_table *stage = cmb_stage_table_of(problem->dtype);
    return (mixture){
        .asked = {.given = problem,
                  .given_grads = gradients,
                  .problem = problem,
                  .gradients = gradients,
                  .is_backward = is_backward,
                  .stage = stage,
                  .is_narrow = stage->stored_size < stage->size,
                  .isa = cmb_isa_current(),
                  .workers = cmb_get_num_threads(),
                  .cancel = cancel},
        .components = cmb_count_components(problem),
    };
}

/* Finds the parts, if there are to be any: the caller's, or the workspace's. And takes backward's terms of sinks. */
static void take_parts(mixture *it, cmb_arena *arena) {
    const cmb_problem *p = it->asked.given;
    const bool is_backward = it->asked.is_backward, is_given = !is_backward && p->component_out.data;
    it->has_parts = it->components > 1 && (is_given || it->asked.is_narrow);
    if (is_given)
        it->part[0] = p->component_out;
    if (is_backward && p->stages & CMB_ATTEND && p->sink.data && p->L > 0)
        it->asked.backward.sink =
            cmb_take(arena, (size_t)(p->B * it->components * cmb_count_segments(p) * p->Hq), it->asked.stage->size);
    if (!it->has_parts || is_given || p->Hq == 0)
        return;
    const int64_t heads[] = {p->Hq, p->Hk, p->Hk}, dim[] = {is_backward ? p->D : p->Dv, p->D, p->Dv};
    for (int n = 0; n < (is_backward ? 3 : 1); n++) {
        const int64_t row = it->components * dim[n];
        void *data = cmb_take(arena, (size_t)(p->B * heads[n] * p->L), (size_t)row * it->asked.stage->stored_size);
        it->part[n] = (cmb_array){data, heads[n], heads[n] * p->L * row, p->L * row, row};
    }
}

/* The part of component c, `dim` elements of each row; absent where the array is. */
static cmb_array part_of(cmb_array array, int64_t c, int64_t dim, size_t size) {
    if (array.data)
        array.data = (char *)array.data + c * dim * (int64_t)size;
    return array;
}

/* The call of component c, planned; it lasts until another component is planned. */
static cmb_call plan_component(mixture *it, int64_t c) {
    cmb_call call = it->asked;
    call.component = c;
    if (it->components > 1) {
        const cmb_problem *given = call.given;
        const size_t size = call.stage->stored_size;
        cmb_problem *p = &it->problem;
        cmb_gradients *g = &it->gradients;
        *p = *given;
        p->components = 1;
        p->plans /= it->components;
        p->plan += c * p->plans;
        p->softmax = part_of(given->softmax, c, 2, call.stage->size);
        if (call.is_backward || it->has_parts)
            p->out = part_of(call.is_backward ? given->component_out : it->part[0], c, p->Dv, size);
        if (call.given_grads)
            *g = *call.given_grads;
        if (call.is_backward && it->has_parts) {
            g->query = part_of(it->part[0], c, p->D, size);
            g->key = part_of(it->part[1], c, p->D, size);
            g->value = part_of(it->part[2], c, p->Dv, size);
        }
        call.problem = p;
        call.gradients = g;
        call.adds = c > 0 && !it->has_parts;
    }
    cmb_plan_call(&call);
    return call;
}

/* A problem may have any number of empty heads, which are not gone through. */
static bool writes_nothing(const cmb_call *call) {
    const bool no_positions = call->L == 0 || (!call->is_backward && call->problem->stages == CMB_SUMMARIZE);
    return call->heads == 0 || (no_positions && call->R == 0);
}

/* Leaves in the arena the bytes of the parts and of the component that takes the most; returns the last one's call. */
static cmb_call measure(mixture *it, cmb_arena *arena) {
    cmb_call call;
    take_parts(it, arena);
    const size_t first = arena->used;
    size_t most = first;
    for (int64_t c = 0; c < it->components; c++) {
        call = plan_component(it, c);
        arena->used = first;
        if (!writes_nothing(&call))
            cmb_take_workspace(&call, arena);
        most = arena->used > most ? arena->used : most;
    }
    arena->used = most;
    return call;
}

static void run_component(cmb_call *call, cmb_arena *arena) {
    if (writes_nothing(call))
        return;
    cmb_take_workspace(call, arena);
    if (call->is_backward)
        cmb_run_backward(call);
    else
        cmb_run_forward(call);
}

static cmb_status run(const cmb_problem *problem, const cmb_gradients *gradients, bool is_backward,
                      const cmb_interrupt *interrupt, cmb_error *error) {
    cmb_cancel cancel;
    cmb_arena arena = {0};
    TRY(cmb_check_problem(problem, is_backward, error));
    if (is_backward)
        TRY(cmb_check_gradients(problem, gradients, error));
    TRY(cmb_check_outputs(problem, gradients, error));
    mixture it = begin_mixture(problem, gradients, is_backward, &cancel);
    cmb_call call = measure(&it, &arena);
    const size_t measured = arena.used;
    if (measured == 0 && !arena.overflow) {
        if (is_backward)
            cmb_store_sinks(&call);
        return CMB_OK;
    }
    TRY(cmb_arena_allocate(&arena, error));
    take_parts(&it, &arena);
    cmb_cancel_init(&cancel, interrupt);
    const size_t first = arena.used;
    for (int64_t c = 0; c < it.components && (c == 0 || !cmb_cancelled(&cancel, 0)); c++) {
        if (it.components > 1)
            call = plan_component(&it, c);
        call.backward.sink = it.asked.backward.sink;
        arena.used = first;
        run_component(&call, &arena);
        CMB_ASSERT(it.components > 1 ? arena.used <= measured : arena.used == measured);
    }
    (void)measured;
    if (is_backward && !cmb_cancelled(&cancel, 0))
        cmb_store_sinks(&call);
    cmb_release(arena.base);
    return cmb_cancel_status(&cancel, error);
}

cmb_status cmb_forward(const cmb_problem *problem, const cmb_interrupt *interrupt, cmb_error *error) {
    return run(problem, NULL, false, interrupt, error);
}

cmb_status cmb_backward(const cmb_problem *problem, const cmb_gradients *gradients, const cmb_interrupt *interrupt,
                        cmb_error *error) {
    return run(problem, gradients, true, interrupt, error);
}

cmb_status cmb_workspace_bytes(const cmb_problem *problem, bool backward, size_t *bytes, cmb_error *error) {
    cmb_arena arena = {0};
    TRY(cmb_check_problem(problem, backward, error));
    mixture it = begin_mixture(problem, NULL, backward, NULL);
    measure(&it, &arena);
    if (arena.overflow)
        return cmb_fail(error, CMB_ERR_OVERFLOW, "the workspace does not fit in memory's addresses");
    *bytes = arena.used;
    return CMB_OK;
}

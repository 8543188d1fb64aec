// SPDX-License-Identifier: Apache-2.0
#include "runtime/arena.h"
#include "runtime/memory.h"

void *cmb_take(cmb_arena *arena, size_t count, size_t size) {
    size_t bytes, end;
    CMB_ASSERT(arena->used % 64 == 0 && (uintptr_t)arena->base % 64 == 0);
    if (!cmb_multiply(count, size, &bytes) || !cmb_add(arena->used, bytes, &end) || !cmb_add(end, 63, &end)) {
        arena->overflow = true;
        return NULL;
    }
    void *taken = arena->base ? arena->base + arena->used : NULL;
    arena->used = end / 64 * 64;
    return taken;
}

cmb_status cmb_arena_allocate(cmb_arena *arena, cmb_error *error) {
    CMB_ASSERT(!arena->base);
    if (arena->overflow)
        return cmb_fail(error, CMB_ERR_OVERFLOW, "the workspace does not fit in memory's addresses");
    void *block = cmb_allocate(arena->used);
    if (!block)
        return cmb_fail(error, CMB_ERR_MEMORY, "no memory for a workspace of %zu bytes", arena->used);
    *arena = (cmb_arena){.base = block};
    return CMB_OK;
}

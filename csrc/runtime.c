// SPDX-License-Identifier: Apache-2.0
/* Memory, errors and the wish to stop. */
#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

/* ---- memory ------------------------------------------------------------------------------------- */

/* malloc, but for large blocks, of which one is kept when it is released: a call's workspace is as large as
 * its inputs, and having the system clear and map it anew costs up to a tenth of the call. It asks for huge
 * pages for the same reason. */
typedef struct {
    size_t bytes; /* that follow the header, of which the block has 64 bytes so that they are aligned */
} block_header;

static const size_t header_bytes = 64, huge_page = 2 << 20, large_block = 4 << 20, kept_at_most = 64 << 20;
static _Atomic(block_header *) kept;

static void *allocate_default(size_t bytes, void *context) {
    (void)context;
    const bool large = bytes >= large_block;
    block_header *block = large ? atomic_exchange(&kept, NULL) : NULL;
    if (block && block->bytes >= bytes)
        return (char *)block + header_bytes;
    free(block);
    size_t whole;
    void *fresh = NULL;
    if (!cmb_add(bytes, header_bytes, &whole) || posix_memalign(&fresh, large ? huge_page : header_bytes, whole) != 0)
        return NULL;
#if defined(MADV_HUGEPAGE)
    if (large)
        madvise(fresh, whole, MADV_HUGEPAGE); /* a hint: that it is refused changes nothing */
#endif
    block = fresh;
    block->bytes = bytes;
    return (char *)block + header_bytes;
}

static void release_default(void *pointer, void *context) {
    (void)context;
    block_header *block = (block_header *)(void *)((char *)pointer - header_bytes);
    if (block->bytes >= large_block && block->bytes <= kept_at_most)
        block = atomic_exchange(&kept, block);
    free(block);
}

static const cmb_allocator default_allocator = {allocate_default, release_default, NULL};
static cmb_allocator allocator = {allocate_default, release_default, NULL};

void cmb_set_allocator(const cmb_allocator *replacement) {
    const bool given = replacement && replacement->allocate && replacement->release;
    allocator = given ? *replacement : default_allocator;
}

void *cmb_allocate(size_t bytes) {
    return allocator.allocate(bytes > 0 ? bytes : 1, allocator.context); /* so that NULL always means failure */
}

void cmb_release(void *pointer) {
    if (pointer)
        allocator.release(pointer, allocator.context);
}

/* ---- errors ------------------------------------------------------------------------------------- */

cmb_status cmb_fail(cmb_error *error, cmb_status status, const char *format, ...) {
    if (error) {
        va_list arguments;
        va_start(arguments, format);
        error->status = status;
        vsnprintf(error->message, sizeof error->message, format, arguments);
        va_end(arguments);
    }
    return status;
}

/* ---- the wish to stop --------------------------------------------------------------------------- */

static const int64_t poll_interval = 50 * 1000 * 1000; /* ns: Ctrl-C within 0.1 s, no cost that could be measured */

int64_t cmb_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void cmb_cancel_init(cmb_cancel *cancel, const cmb_interrupt *interrupt) {
    cancel->interrupt = interrupt;
    cancel->next_poll = cmb_now() + poll_interval;
    atomic_init(&cancel->stop, false);
}

bool cmb_cancelled(cmb_cancel *cancel, int worker) {
    if (worker == 0 && cmb_now() >= cancel->next_poll) {
        const cmb_interrupt *interrupt = cancel->interrupt;
        const bool pollable = interrupt && interrupt->poll && !atomic_load(&cancel->stop);
        if (pollable && interrupt->poll(interrupt->context))
            atomic_store(&cancel->stop, true);
        cancel->next_poll = cmb_now() + poll_interval; /* after the poll: a slow one must not be all that runs */
    }
    return atomic_load_explicit(&cancel->stop, memory_order_relaxed);
}

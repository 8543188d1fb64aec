// SPDX-License-Identifier: Apache-2.0
/* Memory, errors and the wish to stop. */
#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

/* ---- memory ------------------------------------------------------------------------------------- */

/* malloc, but for large blocks, some of which are kept when they are released: workspaces and results are as large as
 * inputs and live for a call or two, and having the system map and clear them anew costs up to a fifth of the call. It
 * asks for huge pages for the same reason. */
typedef struct {
    size_t bytes; /* that follow the header, of which the block has 64 bytes so that they are aligned */
} block_header;

enum { KEPT_BLOCKS = 16 }; /* a step of training releases about ten: results, what is saved, workspaces */
static const size_t header_bytes = 64, huge_page = 2 << 20, large_block = 256 << 10, kept_at_most = 512 << 20;
static _Atomic(block_header *) kept[KEPT_BLOCKS];
static atomic_size_t kept_bytes; /* counted before a block is kept, and until it is gone */

static void free_kept(block_header *block) {
    if (block) {
        atomic_fetch_sub(&kept_bytes, block->bytes);
        free(block);
    }
}

/* A kept block that holds so much and wastes less than an eighth of itself, or NULL. */
static block_header *take_kept(size_t bytes) {
    for (int i = 0; i < KEPT_BLOCKS; i++) {
        block_header *block = atomic_load(&kept[i]) ? atomic_exchange(&kept[i], NULL) : NULL;
        if (block && block->bytes >= bytes && block->bytes - bytes < block->bytes / 8) {
            atomic_fetch_sub(&kept_bytes, block->bytes);
            return block;
        }
        if (block)
            free_kept(atomic_exchange(&kept[i], block)); /* another thread may have put one there meanwhile */
    }
    return NULL;
}

static void keep(block_header *block) {
    static atomic_uint turn;
    atomic_fetch_add(&kept_bytes, block->bytes);
    for (int i = 0; i < KEPT_BLOCKS && atomic_load(&kept_bytes) > kept_at_most; i++)
        free_kept(atomic_exchange(&kept[i], NULL));
    for (int i = 0; i < KEPT_BLOCKS; i++) {
        block_header *empty = NULL;
        if (atomic_compare_exchange_strong(&kept[i], &empty, block))
            return;
    }
    free_kept(atomic_exchange(&kept[atomic_fetch_add(&turn, 1) % KEPT_BLOCKS], block));
}

void cmb_release_kept(void) {
    for (int i = 0; i < KEPT_BLOCKS; i++)
        free_kept(atomic_exchange(&kept[i], NULL));
#if defined(__GLIBC__)
    malloc_trim(0); /* which would keep them too */
#endif
}

void *cmb_default_allocate(size_t bytes) {
    const bool large = bytes >= large_block;
    block_header *block = large ? take_kept(bytes) : NULL;
    if (block)
        return (char *)block + header_bytes;
    size_t whole;
    void *fresh = NULL;
    const size_t alignment = bytes >= 2 * huge_page ? huge_page : header_bytes;
    if (!cmb_add(bytes, header_bytes, &whole))
        return NULL;
    if (posix_memalign(&fresh, alignment, whole) != 0) {
        cmb_release_kept();
        if (posix_memalign(&fresh, alignment, whole) != 0)
            return NULL;
    }
#if defined(MADV_HUGEPAGE)
    if (alignment == huge_page)
        madvise(fresh, whole, MADV_HUGEPAGE); /* a hint: that it is refused changes nothing */
#endif
    block = fresh;
    block->bytes = bytes;
    return (char *)block + header_bytes;
}

void cmb_default_release(void *pointer) {
    if (!pointer)
        return;
    block_header *block = (block_header *)(void *)((char *)pointer - header_bytes);
    if (block->bytes >= large_block && block->bytes <= kept_at_most)
        keep(block);
    else
        free(block);
}

void *cmb_default_reallocate(void *pointer, size_t bytes) {
    void *moved = cmb_default_allocate(bytes);
    if (moved && pointer) {
        const size_t old = ((const block_header *)(const void *)((char *)pointer - header_bytes))->bytes;
        memcpy(moved, pointer, old < bytes ? old : bytes);
        cmb_default_release(pointer);
    }
    return moved;
}

static void *allocate_default(size_t bytes, void *context) {
    (void)context;
    return cmb_default_allocate(bytes);
}

static void release_default(void *pointer, void *context) {
    (void)context;
    cmb_default_release(pointer);
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

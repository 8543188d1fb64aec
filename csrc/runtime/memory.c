// SPDX-License-Identifier: Apache-2.0
/*
 * The default allocator is malloc, except that it keeps some of the large blocks that are released and hands them out
 * again. Workspaces and results are as large as the inputs and live for a call or two: having the system map and clear
 * such memory for every call costs up to a fifth of the call. Huge pages are asked for to save the same cost.
 */
#include "runtime/memory.h"
#include "runtime/status.h"
#include "runtime/system.h"

#include <stdatomic.h>
#include <string.h>

/* ---- the default allocator ---------------------------------------------------------------------- */

/* A block is a header of 64 bytes, which keeps the alignment, and then the caller's bytes. */
typedef struct {
    size_t bytes; /* without the header */
} block_header;

/* A place for a released block. A thread that takes the block out, by exchanging it for NULL, owns it, and may read its
 * header only then. Before, `bytes` and `turn` describe the block; they may be those of the place's last one. */
typedef struct {
    _Atomic(block_header *) block;
    atomic_size_t bytes;
    atomic_uint turn; /* number of the block, in the order in which they were kept */
} kept_place;

enum { KEPT_BLOCKS = 64 }; /* a training step of one pattern releases about ten: results, saved arrays, workspaces */
static const size_t header_bytes = 64, huge_page = 2 << 20, large_block = 256 << 10, max_kept_bytes = 512 << 20;
static kept_place kept[KEPT_BLOCKS];
static atomic_size_t kept_bytes; /* a block counts from before it is kept until after it is freed or taken */
static atomic_uint turns;

static void free_kept(block_header *block) {
    if (block) {
        atomic_fetch_sub(&kept_bytes, block->bytes);
        cmb_aligned_free(block);
    }
}

/* Whether a block may be handed out for `bytes`: less than an eighth of it is wasted. */
static bool does_fit(size_t block, size_t bytes) { return block >= bytes && block - bytes < block / 8; }

/* A kept block for `bytes`, or NULL. */
static block_header *take_kept(size_t bytes) {
    for (int i = 0; i < KEPT_BLOCKS; i++) {
        if (!does_fit(atomic_load_explicit(&kept[i].bytes, memory_order_relaxed), bytes) ||
            !atomic_load(&kept[i].block))
            continue;
        block_header *block = atomic_exchange(&kept[i].block, NULL);
        if (block && does_fit(block->bytes, bytes)) {
            atomic_fetch_sub(&kept_bytes, block->bytes);
            return block;
        }
        if (block) /* another thread has filled the place since */
            free_kept(atomic_exchange(&kept[i].block, block));
    }
    return NULL;
}

/* The place of the block that was kept first, or, if it may be empty, any empty place. NULL: no block is kept. */
static kept_place *oldest_place(bool may_be_empty) {
    const unsigned now = atomic_load(&turns);
    kept_place *oldest = NULL;
    unsigned age = 0;
    for (int i = 0; i < KEPT_BLOCKS; i++) {
        const bool is_empty = !atomic_load(&kept[i].block);
        if (is_empty && may_be_empty)
            return &kept[i];
        const unsigned other = now - atomic_load_explicit(&kept[i].turn, memory_order_relaxed);
        if (!is_empty && (!oldest || other > age)) {
            oldest = &kept[i];
            age = other;
        }
    }
    return oldest;
}

/* Keeps a block. Where there are too many, or too many bytes, the oldest ones are freed. */
static void keep(block_header *block) {
    const size_t bytes = block->bytes;
    atomic_fetch_add(&kept_bytes, bytes);
    for (int i = 0; i < KEPT_BLOCKS && atomic_load(&kept_bytes) > max_kept_bytes; i++) {
        kept_place *place = oldest_place(false);
        if (place)
            free_kept(atomic_exchange(&place->block, NULL));
    }
    kept_place *place = oldest_place(true);
    free_kept(atomic_exchange(&place->block, block));
    atomic_store_explicit(&place->bytes, bytes, memory_order_relaxed);
    atomic_store_explicit(&place->turn, atomic_fetch_add(&turns, 1), memory_order_relaxed);
}

void cmb_release_kept(void) {
    for (int i = 0; i < KEPT_BLOCKS; i++)
        free_kept(atomic_exchange(&kept[i].block, NULL));
    cmb_trim_heap(); /* malloc keeps freed memory too */
}

void *cmb_default_allocate(size_t bytes) {
    const bool large = bytes >= large_block;
    block_header *block = large ? take_kept(bytes) : NULL;
    if (block)
        return (char *)block + header_bytes;
    size_t whole;
    const size_t alignment = bytes >= 2 * huge_page ? huge_page : header_bytes;
    if (!cmb_add(bytes, header_bytes, &whole))
        return NULL;
    block = cmb_aligned_malloc(alignment, whole);
    if (!block) {
        cmb_release_kept();
        block = cmb_aligned_malloc(alignment, whole);
    }
    if (!block)
        return NULL;
    if (alignment == huge_page)
        cmb_prefer_huge_pages(block, whole);
    block->bytes = bytes;
    return (char *)block + header_bytes;
}

void cmb_default_release(void *pointer) {
    if (!pointer)
        return;
    CMB_ASSERT((uintptr_t)pointer % header_bytes == 0);
    block_header *block = (block_header *)(void *)((char *)pointer - header_bytes);
    if (block->bytes >= large_block && block->bytes <= max_kept_bytes)
        keep(block);
    else
        cmb_aligned_free(block);
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

/* ---- the allocator in force --------------------------------------------------------------------- */

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
    return allocator.allocate(bytes > 0 ? bytes : 1, allocator.context); /* NULL then always means failure */
}

void cmb_release(void *pointer) {
    if (pointer)
        allocator.release(pointer, allocator.context);
}

// SPDX-License-Identifier: Apache-2.0
/* The allocator, arenas, checks of arrays, and errors. */
#include "runtime/arena.h"
#include "runtime/array.h"
#include "runtime/memory.h"
#include "runtime/status.h"
#include "testlib.h"

/* Many small blocks do not push out a large one: page faults took half the time of a mixture's training step. Of blocks
 * that are too large together the last one is kept. */
static void keep_the_latest(void) {
    enum { LARGE = 40 << 20, HUGE = 300 << 20, SMALL = 300 << 10, BLOCKS = 40 };
    char *large = cmb_default_allocate(LARGE), *small[BLOCKS];
    for (int i = 0; i < BLOCKS; i++)
        CHECK((small[i] = cmb_default_allocate(SMALL)) != NULL);
    cmb_default_release(large);
    for (int i = 0; i < BLOCKS; i++)
        cmb_default_release(small[i]);
    CHECK(cmb_default_allocate(LARGE) == large);
    cmb_default_release(large);
    char *first = cmb_default_allocate(HUGE), *second = cmb_default_allocate(HUGE);
    cmb_default_release(first);
    cmb_default_release(second);
    CHECK(first && second && cmb_default_allocate(HUGE) == second);
    cmb_default_release(second);
    cmb_release_kept();
}

static void memory(void) {
    test_heap heap = {0};
    for (size_t bytes = 0; bytes < 300; bytes += 37) {
        char *plain = cmb_allocate(bytes);
        CHECK(plain && (uintptr_t)plain % 64 == 0);
        memset(plain, 1, bytes);
        cmb_release(plain);
    }
    cmb_release(NULL);
    CHECK(!cmb_allocate(SIZE_MAX));

    enum { LARGE = 5 << 20 }; /* such blocks are kept and handed out again, each to one caller */
    for (int round = 0; round < 3; round++) {
        char *one = cmb_allocate(LARGE), *other = cmb_allocate((size_t)LARGE << round);
        CHECK(one && other && (uintptr_t)one % 64 == 0 && (uintptr_t)other % 64 == 0);
        memset(one, 1, LARGE);
        memset(other, 2, (size_t)LARGE << round);
        CHECK(one[0] == 1 && one[LARGE - 1] == 1);
        cmb_release(one);
        cmb_release(other);
    }

    /* A kept block serves a request of about its size. There are limits to the blocks and the bytes that are kept. */
    cmb_release_kept();
    enum { BLOCKS = 80 };
    char *block[BLOCKS];
    for (int i = 0; i < BLOCKS; i++)
        CHECK((block[i] = cmb_default_allocate(LARGE)) != NULL);
    cmb_default_release(block[0]);
    char *smaller = cmb_default_allocate(LARGE / 2);
    CHECK(smaller && smaller != block[0]);
    CHECK(cmb_default_allocate(LARGE - 1000) == block[0]);
    for (int i = 0; i < BLOCKS; i++)
        cmb_default_release(block[i]);
    char *moved = cmb_default_allocate(1000);
    memset(moved, 7, 1000);
    CHECK((moved = cmb_default_reallocate(moved, LARGE)) && moved[0] == 7 && moved[999] == 7);
    CHECK((moved = cmb_default_reallocate(moved, 10)) && moved[9] == 7);
    cmb_default_release(moved);
    cmb_default_release(cmb_default_reallocate(NULL, 10));
    cmb_default_release(NULL);
    CHECK(!cmb_default_allocate(SIZE_MAX) && !cmb_default_reallocate(NULL, SIZE_MAX));
    cmb_default_release(smaller);
    cmb_release_kept();
    cmb_release_kept();

    test_heap_use(&heap);
    heap.fail = 2;
    void *first = cmb_allocate(100);
    void *second = cmb_allocate(100);
    void *third = cmb_allocate(200);
    CHECK(first && !second && third);
    CHECK((uintptr_t)first % 64 == 0 && heap.calls == 3 && heap.live == 300);
    cmb_release(first);
    cmb_release(second);
    cmb_release(third);
    CHECK(heap.live == 0 && heap.peak == 300);
    heap.forever = true;
    CHECK(!cmb_allocate(1) && !cmb_allocate(1));
    test_heap_use(NULL);

    void *again = cmb_allocate(64);
    CHECK(again && heap.calls == 5);
    cmb_release(again);
    cmb_set_allocator(NULL);
}

static void sizes(void) {
    size_t size = 0;
    CHECK(cmb_multiply(SIZE_MAX / 2, 2, &size) && size == SIZE_MAX - 1);
    CHECK(!cmb_multiply(SIZE_MAX / 2 + 1, 2, &size));
    CHECK(cmb_add(SIZE_MAX - 1, 1, &size) && size == SIZE_MAX);
    CHECK(!cmb_add(SIZE_MAX, 1, &size));
}

static void errors(void) {
    cmb_error error = {0};
    char text[500];
    CHECK(cmb_fail(NULL, CMB_ERR_MEMORY, "%d", 1) == CMB_ERR_MEMORY);
    CHECK(cmb_fail(&error, CMB_ERR_VALUE, "span must be at least 1, got %d", 0) == CMB_ERR_VALUE);
    CHECK(error.status == CMB_ERR_VALUE && strcmp(error.message, "span must be at least 1, got 0") == 0);
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    cmb_fail(&error, CMB_ERR_VALUE, "%s", text);
    CHECK(strlen(error.message) == sizeof error.message - 1);
}

/* An arena measures what it hands out later, in pieces of whole 64 bytes. A size that cannot be addressed is an error.
 */
static void arenas(void) {
    test_heap heap = {0};
    cmb_error error = {0};
    cmb_arena arena = {0};
    char *base = NULL;
    test_heap_use(&heap);
    for (int round = 0; round < 2; round++) {
        char *first = cmb_take(&arena, 3, 5), *none = cmb_take(&arena, 0, 8), *last = cmb_take(&arena, 65, 1);
        CHECK(arena.used == 64 + 128 && !arena.overflow);
        if (round == 0) {
            CHECK(!first && !none && !last && cmb_arena_allocate(&arena, &error) == CMB_OK);
            base = arena.base;
            CHECK(heap.live == 192 && arena.used == 0);
        } else {
            CHECK(first == base && none == base + 64 && last == base + 64);
        }
    }
    cmb_release(arena.base);
    CHECK(heap.live == 0);

    arena = (cmb_arena){.used = 64};
    heap = (test_heap){.fail = 1};
    CHECK(cmb_arena_allocate(&arena, &error) == CMB_ERR_MEMORY && strstr(error.message, "64 bytes"));
    test_heap_use(NULL);
    for (int kind = 0; kind < 2; kind++) {
        arena = (cmb_arena){.used = 64};
        CHECK(!cmb_take(&arena, kind ? SIZE_MAX : SIZE_MAX / 2, kind ? 1 : 3) && arena.overflow);
        CHECK(cmb_arena_allocate(&arena, &error) == CMB_ERR_OVERFLOW && !arena.base);
    }
}

static void arrays(void) {
    static float data;
    cmb_error error = {0};
    const cmb_array good = {.data = &data, .heads = 2, .batch = -60, .head = 30, .row = 10};
    cmb_array a = good;
    CHECK(cmb_check_array("x", &a, 3, 2, 3, 10, &error) == CMB_OK);
    CHECK(!cmb_rows_overlap(&a, 3, 3, 10) && cmb_rows_overlap(&a, 3, 3, 11) && cmb_rows_overlap(&a, 3, 4, 10));
    CHECK(!cmb_rows_overlap(&a, 3, 1, 30) && !cmb_rows_overlap(&a, 0, 3, 99));
    a.data = NULL;
    CHECK(cmb_check_array("x", &a, 3, 2, 3, 10, &error) == CMB_ERR_VALUE && strstr(error.message, "x is missing"));
    a = good;
    CHECK(cmb_check_array("x", &a, 3, 1, 3, 10, &error) == CMB_ERR_VALUE &&
          strstr(error.message, "x must have 1 heads, got 2"));
    a.row = INT64_MAX / 8;
    CHECK(cmb_check_array("x", &a, 3, 2, 1, 10, &error) == CMB_OK); /* the stride of one row is never used */
    CHECK(cmb_check_array("x", &a, 3, 2, 2, 10, &error) == CMB_ERR_OVERFLOW);
    a.row = INT64_MIN;
    CHECK(cmb_check_array("x", &a, 3, 2, 2, 10, &error) == CMB_ERR_OVERFLOW);
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(memory), TEST(keep_the_latest), TEST(sizes), TEST(errors), TEST(arenas), TEST(arrays),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

// SPDX-License-Identifier: Apache-2.0
/* A program of tests: a table of named functions. It runs all of them, or those that its arguments name, and ends with
 * the first failure. */
#ifndef CMB_TESTLIB_H
#define CMB_TESTLIB_H

#include "runtime/system.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

/* CHECK(condition) or CHECK(condition, "format", ...), whose message says what the values were. */
#define CHECK(condition, ...)                                           \
    do {                                                                \
        if (!(condition))                                               \
            test_fail(__FILE__, __LINE__, #condition, " " __VA_ARGS__); \
    } while (0)

__attribute__((format(printf, 4, 5), noreturn)) static inline void
test_fail(const char *file, int line, const char *condition, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: failed: %s:", file, line, condition);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    _Exit(1);
}

typedef struct {
    const char *name;
    void (*run)(void);
} test_case;

#define TEST(function) \
    { #function, function }

static inline int test_main(int argc, char **argv, const test_case *tests, size_t count) {
    int ran = 0;
    for (size_t n = 0; n < count; n++) {
        bool wanted = argc < 2;
        for (int a = 1; a < argc; a++)
            wanted |= strcmp(argv[a], tests[n].name) == 0;
        if (!wanted)
            continue;
        printf("%s\n", tests[n].name);
        fflush(stdout);
        tests[n].run();
        ran++;
    }
    if (ran == 0 || (argc > 1 && ran < argc - 1)) {
        fprintf(stderr, "%s: no test of that name\n", argv[0]);
        return 1;
    }
    return 0;
}

#ifndef _WIN32
/* Waits for a forked child, which must exit with 0. */
static inline void expect_success(pid_t child) {
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "child ended with status %x", (unsigned)status);
}
#endif

/* Ends the program if it has not called this again by then; 0: never. On Windows who runs the program has to. */
static inline void end_after(unsigned limit_s) {
#ifndef _WIN32
    alarm(limit_s);
#else
    (void)limit_s;
#endif
}

/* Sets a variable of the environment, or removes it if value is NULL. */
static inline void set_variable(const char *name, const char *value) {
#ifndef _WIN32
    CHECK((value ? setenv(name, value, 1) : unsetenv(name)) == 0);
#else
    CHECK(_putenv_s(name, value ? value : "") == 0);
#endif
}

/* An allocator that counts, and fails on request: at call `fail` (from 1; 0: never) and, with `forever`, at every later
 * call. `live` counts the bytes that are not yet released. Begin with test_heap heap = {0}. */
typedef struct {
    int64_t fail;
    bool forever;
    atomic_int_least64_t calls, live, peak;
} test_heap;

enum { TEST_HEAP_HEADER = 64 }; /* holds the size and keeps the alignment */

static inline void *test_allocate(size_t bytes, void *context) {
    test_heap *heap = (test_heap *)context;
    const int64_t call = atomic_fetch_add(&heap->calls, 1) + 1;
    if (call == heap->fail || (heap->forever && heap->fail > 0 && call > heap->fail))
        return NULL;
    void *block = cmb_aligned_malloc(64, bytes + TEST_HEAP_HEADER);
    if (!block)
        return NULL;
    memcpy(block, &bytes, sizeof bytes);
    const int64_t live = atomic_fetch_add(&heap->live, (int64_t)bytes) + (int64_t)bytes;
    int64_t peak = atomic_load(&heap->peak);
    while (live > peak && !atomic_compare_exchange_weak(&heap->peak, &peak, live)) {
    }
    return (char *)block + TEST_HEAP_HEADER;
}

static inline void test_release(void *pointer, void *context) {
    test_heap *heap = (test_heap *)context;
    char *block = (char *)pointer - TEST_HEAP_HEADER;
    size_t bytes = 0;
    memcpy(&bytes, block, sizeof bytes);
    atomic_fetch_sub(&heap->live, (int64_t)bytes);
    cmb_aligned_free(block);
}

/* The library allocates from `heap`; NULL restores the default. */
static inline void test_heap_use(test_heap *heap) {
    const cmb_allocator allocator = {heap ? test_allocate : NULL, heap ? test_release : NULL, heap};
    cmb_set_allocator(&allocator);
}

#endif

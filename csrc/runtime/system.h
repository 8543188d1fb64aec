// SPDX-License-Identifier: Apache-2.0
/* What the operating system gives: locks, threads, a clock, aligned memory, processors. posix.c and windows.c implement
 * this header, each for its system. Beside them only cpu.c knows a system: it reads Linux's cgroups. Internal. */
#ifndef CMB_SYSTEM_H
#define CMB_SYSTEM_H

#include "combiner.h"

#ifdef _WIN32
/* SRWLOCK, CONDITION_VARIABLE, INIT_ONCE and HANDLE are a pointer each. Without <windows.h>, which defines thousands of
 * names. */
typedef struct {
    void *word;
} cmb_mutex, cmb_condition, cmb_once;
typedef void *cmb_thread_id;
#define CMB_MUTEX_INIT \
    { 0 }
#define CMB_ONCE_INIT \
    { 0 }
#else
#include <pthread.h>
typedef pthread_mutex_t cmb_mutex;
typedef pthread_cond_t cmb_condition;
typedef pthread_once_t cmb_once;
typedef pthread_t cmb_thread_id;
#define CMB_MUTEX_INIT PTHREAD_MUTEX_INITIALIZER
#define CMB_ONCE_INIT PTHREAD_ONCE_INIT
#endif

/* ---- locks and conditions ----------------------------------------------------------------------- */

void cmb_lock(cmb_mutex *mutex);
void cmb_unlock(cmb_mutex *mutex);

/* Runs init before the first of all calls with this `once` returns. */
void cmb_call_once(cmb_once *once, void (*init)(void));

bool cmb_condition_init(cmb_condition *condition); /* false: the system has no room for it */
void cmb_condition_wait(cmb_condition *condition, cmb_mutex *mutex);
void cmb_condition_wait_until(cmb_condition *condition, cmb_mutex *mutex, int64_t deadline); /* in ns of cmb_now */
void cmb_condition_wake_all(cmb_condition *condition);

/* ---- threads ------------------------------------------------------------------------------------ */

/* A thread that runs body(number). The struct stays where it is until cmb_thread_join returns. */
typedef struct {
    cmb_thread_id id;
    void (*body)(int number);
    int number;
    int kept_off; /* a processor, or -1 */
} cmb_thread;

/* Starts *thread, whose body and number are set. No signal handler of the program runs in it. Returns false if the
 * system has no thread to give. */
bool cmb_thread_start(cmb_thread *thread, size_t stack_bytes);
void cmb_thread_join(cmb_thread *thread);

/* Gives the processor away. */
void cmb_yield(void);

/* The processor that this thread runs on; -1 where the system does not say. */
int cmb_processor(void);
/* cmb_keep_off takes the processor from those that the thread may run on, if others are left. cmb_let_on, which the
 * thread itself calls, gives it back. */
void cmb_keep_off(cmb_thread *thread, int processor);
void cmb_let_on(cmb_thread *thread);

/* Has `before` called before every fork, and `parent` and `child` after it, each in its process; returns false if the
 * system has no room for it. A system without fork never calls them. */
bool cmb_at_fork(void (*before)(void), void (*parent)(void), void (*child)(void));

/* ---- the rest ----------------------------------------------------------------------------------- */

int64_t cmb_now(void); /* ns of a clock that nobody sets */

/* Processors that this process may run on, by its affinity; at least 1. */
int cmb_affinity_count(void);

/* Memory at a multiple of `alignment`, which is a power of two and at least that of a pointer; NULL if there is none.
 */
void *cmb_aligned_malloc(size_t alignment, size_t bytes);
void cmb_aligned_free(void *pointer);
/* Hints, which the system may ignore: that a block gets huge pages; that freed memory goes back to the system. */
void cmb_prefer_huge_pages(void *pointer, size_t bytes);
void cmb_trim_heap(void);

#endif

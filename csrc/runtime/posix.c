// SPDX-License-Identifier: Apache-2.0
/* runtime/system.h on Linux, macOS and other POSIX systems. */
#if !defined(_WIN32)
#define _GNU_SOURCE
#include "runtime/system.h"

#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

/* ---- locks and conditions ----------------------------------------------------------------------- */

void cmb_lock(cmb_mutex *mutex) { pthread_mutex_lock(mutex); }
void cmb_unlock(cmb_mutex *mutex) { pthread_mutex_unlock(mutex); }
void cmb_call_once(cmb_once *once, void (*init)(void)) { pthread_once(once, init); }

bool cmb_condition_init(cmb_condition *condition) {
    pthread_condattr_t monotonic;
    if (pthread_condattr_init(&monotonic) != 0)
        return false;
#ifndef __APPLE__
    bool ok = pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC) == 0;
#else
    bool ok = true;
#endif
    ok = ok && pthread_cond_init(condition, &monotonic) == 0;
    pthread_condattr_destroy(&monotonic);
    return ok;
}

void cmb_condition_wait(cmb_condition *condition, cmb_mutex *mutex) { pthread_cond_wait(condition, mutex); }

void cmb_condition_wait_until(cmb_condition *condition, cmb_mutex *mutex, int64_t deadline) {
#ifndef __APPLE__
    const struct timespec until = {.tv_sec = (time_t)(deadline / 1000000000), .tv_nsec = (long)(deadline % 1000000000)};
    pthread_cond_timedwait(condition, mutex, &until);
#else
    int64_t left = deadline - cmb_now();
    if (left < 0)
        left = 0;
    const struct timespec span = {.tv_sec = (time_t)(left / 1000000000), .tv_nsec = (long)(left % 1000000000)};
    pthread_cond_timedwait_relative_np(condition, mutex, &span);
#endif
}

void cmb_condition_wake_all(cmb_condition *condition) { pthread_cond_broadcast(condition); }

/* ---- threads ------------------------------------------------------------------------------------ */

static void *run_body(void *argument) {
    const cmb_thread *thread = argument;
    thread->body(thread->number);
    return NULL;
}

bool cmb_thread_start(cmb_thread *thread, size_t stack_bytes) {
    pthread_attr_t attributes;
    sigset_t blocked, before;
    if (pthread_attr_init(&attributes) != 0)
        return false;
    bool started = false;
    thread->kept_off = -1;
    if (pthread_attr_setstacksize(&attributes, stack_bytes) == 0) {
        /* leave signals to the program's own threads, except for those that a fault of the thread itself raises */
        sigfillset(&blocked);
        sigdelset(&blocked, SIGSEGV);
        sigdelset(&blocked, SIGBUS);
        sigdelset(&blocked, SIGFPE);
        sigdelset(&blocked, SIGILL);
        pthread_sigmask(SIG_SETMASK, &blocked, &before);
        started = pthread_create(&thread->id, &attributes, run_body, thread) == 0;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    pthread_attr_destroy(&attributes);
    return started;
}

void cmb_thread_join(cmb_thread *thread) { pthread_join(thread->id, NULL); }

void cmb_yield(void) { sched_yield(); }

int cmb_processor(void) {
#ifdef __GLIBC__
    return sched_getcpu();
#else
    return -1;
#endif
}

void cmb_keep_off(cmb_thread *thread, int processor) {
#ifdef __GLIBC__
    cpu_set_t set;
    if (processor < 0 || processor >= CPU_SETSIZE || thread->kept_off >= 0 ||
        pthread_getaffinity_np(thread->id, sizeof set, &set) != 0 || !CPU_ISSET((size_t)processor, &set))
        return;
    CPU_CLR((size_t)processor, &set);
    if (CPU_COUNT(&set) > 0 && pthread_setaffinity_np(thread->id, sizeof set, &set) == 0)
        thread->kept_off = processor;
#else
    (void)thread, (void)processor;
#endif
}

void cmb_let_on(cmb_thread *thread) {
#ifdef __GLIBC__
    cpu_set_t set;
    if (thread->kept_off >= 0 && sched_getaffinity(0, sizeof set, &set) == 0) {
        CPU_SET((size_t)thread->kept_off, &set);
        sched_setaffinity(0, sizeof set, &set);
    }
#endif
    thread->kept_off = -1;
}

bool cmb_at_fork(void (*before)(void), void (*parent)(void), void (*child)(void)) {
    return pthread_atfork(before, parent, child) == 0;
}

/* ---- the rest ----------------------------------------------------------------------------------- */

int64_t cmb_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int cmb_affinity_count(void) {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
        return CPU_COUNT(&set);
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 && online < INT_MAX ? (int)online : 1;
}

void *cmb_aligned_malloc(size_t alignment, size_t bytes) {
    void *fresh = NULL;
    return posix_memalign(&fresh, alignment, bytes) == 0 ? fresh : NULL;
}

void cmb_aligned_free(void *pointer) { free(pointer); }

void cmb_prefer_huge_pages(void *pointer, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    madvise(pointer, bytes, MADV_HUGEPAGE);
#else
    (void)pointer, (void)bytes;
#endif
}

void cmb_trim_heap(void) {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}
#else
typedef int cmb_no_posix; /* a translation unit must not be empty */
#endif

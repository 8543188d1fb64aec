// SPDX-License-Identifier: Apache-2.0
/* runtime/system.h on Windows 7 and later. */
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include "runtime/system.h"

#include <malloc.h>
#include <process.h>
#include <windows.h>

_Static_assert(sizeof(SRWLOCK) == sizeof(cmb_mutex) && sizeof(CONDITION_VARIABLE) == sizeof(cmb_condition) &&
                   sizeof(INIT_ONCE) == sizeof(cmb_once) && sizeof(HANDLE) == sizeof(cmb_thread_id),
               "system.h declares these as a pointer each");

/* ---- locks and conditions ----------------------------------------------------------------------- */

void cmb_lock(cmb_mutex *mutex) { AcquireSRWLockExclusive((SRWLOCK *)mutex); }
void cmb_unlock(cmb_mutex *mutex) { ReleaseSRWLockExclusive((SRWLOCK *)mutex); }

static BOOL CALLBACK run_init(INIT_ONCE *once, void *init, void **context) {
    (void)once, (void)context;
    (*(void (**)(void))init)(); /* a pointer to the function's pointer: C has no cast from void * to a function */
    return TRUE;
}

void cmb_call_once(cmb_once *once, void (*init)(void)) {
    InitOnceExecuteOnce((INIT_ONCE *)once, run_init, (void *)&init, NULL);
}

bool cmb_condition_init(cmb_condition *condition) {
    InitializeConditionVariable((CONDITION_VARIABLE *)condition);
    return true;
}

void cmb_condition_wait(cmb_condition *condition, cmb_mutex *mutex) {
    SleepConditionVariableSRW((CONDITION_VARIABLE *)condition, (SRWLOCK *)mutex, INFINITE, 0);
}

void cmb_condition_wait_until(cmb_condition *condition, cmb_mutex *mutex, int64_t deadline) {
    const int64_t left = deadline - cmb_now(), most = INT32_MAX;
    const int64_t ms = left > 0 ? (left + 999999) / 1000000 : 0;
    SleepConditionVariableSRW((CONDITION_VARIABLE *)condition, (SRWLOCK *)mutex, (DWORD)(ms < most ? ms : most), 0);
}

void cmb_condition_wake_all(cmb_condition *condition) { WakeAllConditionVariable((CONDITION_VARIABLE *)condition); }

/* ---- threads ------------------------------------------------------------------------------------ */

static unsigned __stdcall run_body(void *argument) {
    const cmb_thread *thread = argument;
    thread->body(thread->number);
    return 0;
}

bool cmb_thread_start(cmb_thread *thread, size_t stack_bytes) {
    /* the C runtime's function, which prepares the thread for the C library */
    thread->id =
        (HANDLE)_beginthreadex(NULL, (unsigned)stack_bytes, run_body, thread, STACK_SIZE_PARAM_IS_A_RESERVATION, NULL);
    return thread->id != NULL;
}

void cmb_thread_join(cmb_thread *thread) {
    WaitForSingleObject(thread->id, INFINITE);
    CloseHandle(thread->id);
}

void cmb_yield(void) { SwitchToThread(); }

int cmb_processor(void) { return -1; }
void cmb_keep_off(cmb_thread *thread, int processor) { (void)thread, (void)processor; }
void cmb_let_on(cmb_thread *thread) { (void)thread; }

bool cmb_at_fork(void (*before)(void), void (*parent)(void), void (*child)(void)) {
    (void)before, (void)parent, (void)child;
    return true;
}

/* ---- the rest ----------------------------------------------------------------------------------- */

int64_t cmb_now(void) {
    LARGE_INTEGER ticks, per_second; /* 10 million a second on today's systems */
    QueryPerformanceFrequency(&per_second);
    QueryPerformanceCounter(&ticks);
    const int64_t seconds = ticks.QuadPart / per_second.QuadPart, rest = ticks.QuadPart % per_second.QuadPart;
    return seconds * 1000000000 + rest * 1000000000 / per_second.QuadPart;
}

int cmb_affinity_count(void) {
    DWORD_PTR own = 0, all = 0;
    GetProcessAffinityMask(GetCurrentProcess(), &own, &all); /* of the process's group of up to 64 processors */
    const int count = __builtin_popcountll(own);
    return count > 0 ? count : 1;
}

void *cmb_aligned_malloc(size_t alignment, size_t bytes) { return _aligned_malloc(bytes, alignment); }

void cmb_aligned_free(void *pointer) { _aligned_free(pointer); }

void cmb_prefer_huge_pages(void *pointer, size_t bytes) { (void)pointer, (void)bytes; } /* they need a privilege */

void cmb_trim_heap(void) {}
#else
typedef int cmb_no_windows; /* a translation unit must not be empty */
#endif

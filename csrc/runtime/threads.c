// SPDX-License-Identifier: Apache-2.0
/*
 * The thread pool, and jobs on the threads of a host. The pool is not OpenMP's: with libgomp a forked child hangs, a
 * thread that cannot start ends the process, and a call cannot be interrupted.
 *
 *   job          one cmb_parallel_for; it lies on its caller's stack
 *   worker       a thread that takes part in a job: 0 is the caller, n is the pool's thread n - 1
 *   join, leave  a worker enters and leaves a job, both under the mutex
 *   invitation   what a host's threads get instead; it lies on the heap and outlives its job
 *
 * The pool runs one job at a time. pool.job points to the job until the caller has seen the last worker leave. The
 * mutex guards everything here that is not atomic. A caller that finds the pool taken runs its job alone; so does a
 * nested call. No call waits for another job or for a worker that has not joined, so that no deadlock is possible.
 *
 * cmb_stop_threads joins the threads. In the middle of a tile they may be waiting for the thread that polls; if a poll
 * calls it, the threads are therefore stopped when the job has ended.
 *
 * A host's threads are invited to each job. A thread that comes too late finds the invitation void. Jobs of this kind
 * do not take the pool: any number of them may run at a time.
 */
#include "runtime/threads.h"
#include "runtime/cpu.h"
#include "runtime/status.h"
#include "runtime/system.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_THREADS = 1024, STACK_BYTES = 1 << 20, SPIN_NS = 50 * 1000 };

/* ---- the number of threads ---------------------------------------------------------------------- */

static atomic_int threads_chosen;  /* by cmb_set_num_threads; 0: none, use the default */
static atomic_int threads_default; /* 0: not read yet */

/* The variable's value, a positive integer or the first one of a comma-separated list; 0 if it has no such value. */
static int environment_count(const char *name) {
    const char *text = getenv(name);
    char *end = NULL;
    if (!text)
        return 0;
    const long count = strtol(text, &end, 10); /* LONG_MAX where it does not fit */
    end += strspn(end, " \t");
    if (count < 1 || (*end != '\0' && *end != ','))
        return 0;
    return count < MAX_THREADS ? (int)count : MAX_THREADS;
}

static int default_count(void) {
    int count = environment_count("COMBINER_NUM_THREADS");
    if (count == 0)
        count = environment_count("OMP_NUM_THREADS");
    if (count == 0)
        count = cmb_processors("");
    return count < MAX_THREADS ? count : MAX_THREADS;
}

static _Thread_local const cmb_scheduler *host; /* NULL: the pool */

const cmb_scheduler *cmb_use_scheduler(const cmb_scheduler *scheduler) {
    const cmb_scheduler *before = host;
    host = scheduler;
    return before;
}

static int configured_count(void) {
    int count = atomic_load_explicit(&threads_chosen, memory_order_relaxed);
    if (count == 0)
        count = atomic_load_explicit(&threads_default, memory_order_relaxed);
    if (count == 0) {
        count = default_count();
        atomic_store_explicit(&threads_default, count, memory_order_relaxed);
    }
    return count;
}

int cmb_get_num_threads(void) {
    const int count = configured_count(), lent = host && host->threads > 1 ? host->threads : 1;
    return host && lent < count ? lent : count;
}

cmb_status cmb_set_num_threads(int64_t count, cmb_error *error) {
    if (count < 0 || count > MAX_THREADS)
        return cmb_fail(error, CMB_ERR_VALUE, "count must be between 0 and %d, got %lld", MAX_THREADS,
                        (long long)count);
    if (count == 0)
        atomic_store(&threads_default, 0); /* environment and affinity may have changed since */
    atomic_store(&threads_chosen, (int)count);
    return CMB_OK;
}

/* ---- the floating-point mode -------------------------------------------------------------------- */

/* Sets the default mode (round to nearest, keep subnormals, trap nothing) and returns the mode before. A thread
 * inherits the mode of the thread that created it, and results must not depend on that. */
static uint64_t float_mode_default(void) {
#if defined(__SSE__)
    const uint32_t before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x1f80);
    return before;
#elif defined(__aarch64__)
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr\n\tmsr fpcr, xzr" : "=&r"(before) : : "memory");
    return before;
#else
    return 0;
#endif
}

static void float_mode_restore(uint64_t before) {
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr((uint32_t)before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory");
#else
    (void)before;
#endif
}

/* ---- the pool ----------------------------------------------------------------------------------- */

typedef struct {
    int64_t count;
    int workers; /* at most, the caller included */
    cmb_body body;
    void *context;
    cmb_cancel *cancel;
    atomic_int_least64_t next; /* index to claim */
    atomic_uint joined;        /* workers in the job, without the caller; changes under the mutex */
} job;

static struct {
    cmb_mutex mutex;
    cmb_condition wake; /* a job was posted, or the threads are to end */
    cmb_condition done; /* the last worker of a job has left, or the threads have ended */
    job *job;
    atomic_uint posted; /* jobs so far */
    int threads;        /* thread[n] is worker n + 1 */
    int sleeping;
    atomic_bool stopping;
    bool usable;
    cmb_thread thread[MAX_THREADS - 1];
    bool is_asleep[MAX_THREADS - 1];
} pool = {.mutex = CMB_MUTEX_INIT};

static bool init_conditions(void) { return cmb_condition_init(&pool.wake) && cmb_condition_init(&pool.done); }

/* The mutex is held during a fork, so that the child finds the pool in a consistent state. The child has none of the
 * threads, and its conditions are made anew, since they remember waiters. The child cannot complete a job in progress:
 * if the job's caller is the thread that forked (from a poll), the job is cancelled. */
static void before_fork(void) { cmb_lock(&pool.mutex); }

static void after_fork_parent(void) { cmb_unlock(&pool.mutex); }

static void after_fork_child(void) {
    if (pool.job) {
        atomic_store(&pool.job->cancel->stop, true);
        atomic_store(&pool.job->joined, 0);
    }
    pool.job = NULL;
    pool.threads = 0;
    pool.sleeping = 0;
    memset(pool.is_asleep, 0, sizeof pool.is_asleep);
    atomic_store(&pool.stopping, false);
    pool.usable = init_conditions();
    cmb_unlock(&pool.mutex);
}

static void init_pool(void) {
    pool.usable = init_conditions() && cmb_at_fork(before_fork, after_fork_parent, after_fork_child);
}

/* Installs the fork handlers before the first lock. */
static void lock_pool(void) {
    static cmb_once once = CMB_ONCE_INIT;
    cmb_call_once(&once, init_pool);
    cmb_lock(&pool.mutex);
}

static void run_job(job *work, int worker) {
    while (!cmb_cancelled(work->cancel, worker)) {
        if (worker > 0 && atomic_load_explicit(&pool.stopping, memory_order_relaxed))
            break;
        const int64_t index = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed);
        if (index >= work->count)
            break;
        work->body(work->context, index, worker);
    }
}

/* Waits briefly for *value to be `wanted`: jobs often follow one another faster than a thread wakes up. */
static void spin_until(atomic_uint *value, unsigned wanted) {
    const int64_t end = cmb_now() + SPIN_NS;
    do {
        for (int n = 0; n < 64; n++) {
            if (atomic_load_explicit(value, memory_order_acquire) == wanted)
                return;
            cmb_pause();
        }
    } while (cmb_now() < end);
}

/* For a worker that has joined. After it has left, the job may no longer exist. */
static void work_and_leave(job *work, int worker) {
    run_job(work, worker);
    cmb_lock(&pool.mutex);
    if (atomic_fetch_sub(&work->joined, 1) == 1)
        cmb_condition_wake_all(&pool.done);
    cmb_unlock(&pool.mutex);
}

static void run_worker(int worker) {
    unsigned seen = 0;
    float_mode_default();
    cmb_lock(&pool.mutex);
    while (!atomic_load(&pool.stopping)) {
        const unsigned posted = atomic_load(&pool.posted);
        if (posted == seen) {
            pool.sleeping++;
            pool.is_asleep[worker - 1] = true;
            cmb_condition_wait(&pool.wake, &pool.mutex);
            pool.is_asleep[worker - 1] = false;
            pool.sleeping--;
            cmb_let_on(&pool.thread[worker - 1]);
            continue;
        }
        seen = posted;
        job *work = pool.job;
        if (!work || worker >= work->workers || atomic_load(&work->next) >= work->count)
            continue;
        atomic_fetch_add(&work->joined, 1);
        cmb_unlock(&pool.mutex);
        work_and_leave(work, worker);
        spin_until(&pool.posted, seen + 1);
        cmb_lock(&pool.mutex);
    }
    cmb_unlock(&pool.mutex);
}

/* Starts the threads that are missing of workers 1 .. workers - 1, or as many as the system allows. The caller holds
 * the mutex. */
static void start_threads(int workers) {
    while (pool.threads < workers - 1) {
        cmb_thread *next = &pool.thread[pool.threads];
        next->body = run_worker;
        next->number = pool.threads + 1;
        if (!cmb_thread_start(next, STACK_BYTES))
            break;
        pool.threads++;
    }
}

/* Linux in a virtual machine may wake a thread on this processor although others are idle (their virtual processors
 * count as preempted), where it would wait for milliseconds. So sleeping threads may not run here until they have woken
 * up. The caller holds the mutex; two system calls for each thread are worth it for few threads alone. */
static void keep_off_this_processor(int workers) {
    enum { FEW = 8 };
    const int processor = cmb_processor();
    for (int n = 0; n < workers - 1 && n < pool.threads && n < FEW; n++)
        if (pool.is_asleep[n])
            cmb_keep_off(&pool.thread[n], processor);
}

/* Makes *work the pool's job; returns false if the pool has a job or cannot be used. */
static bool post_job(job *work) {
    lock_pool();
    const bool taken = pool.usable && !pool.job && !atomic_load(&pool.stopping);
    if (taken) {
        start_threads(work->workers);
        pool.job = work;
        atomic_fetch_add(&pool.posted, 1);
        if (pool.sleeping > 0) {
            keep_off_this_processor(work->workers);
            cmb_condition_wake_all(&pool.wake);
        }
    }
    cmb_unlock(&pool.mutex);
    return taken;
}

/* Waits until no worker is in the job, and polls meanwhile. */
static void await_job(job *work) {
    spin_until(&work->joined, 0);
    cmb_lock(&pool.mutex);
    while (atomic_load(&work->joined) > 0) {
        cmb_condition_wait_until(&pool.done, &pool.mutex, work->cancel->next_poll);
        cmb_unlock(&pool.mutex);
        cmb_cancelled(work->cancel, 0);
        cmb_lock(&pool.mutex);
    }
    if (pool.job == work)
        pool.job = NULL; /* in a child that the poll forked, it is NULL already */
    cmb_unlock(&pool.mutex);
}

/* ---- a host's threads --------------------------------------------------------------------------- */

/* All fields change under the mutex. The last holder frees the invitation. */
typedef struct {
    job *work;   /* NULL: the job has ended */
    int arrived; /* threads so far; the last one is the worker of that number */
    int holders; /* the caller, and the tasks that the host has not run yet */
} invitation;

static void drop_invitation(invitation *it) {
    cmb_lock(&pool.mutex);
    const bool last = --it->holders == 0;
    cmb_unlock(&pool.mutex);
    if (last)
        free(it);
}

static void follow_invitation(void *argument) {
    invitation *it = argument;
    cmb_lock(&pool.mutex);
    job *work = it->work;
    const int worker = work ? ++it->arrived : 0;
    if (work)
        atomic_fetch_add(&work->joined, 1);
    cmb_unlock(&pool.mutex);
    if (work) {
        const uint64_t mode = float_mode_default();
        work_and_leave(work, worker);
        float_mode_restore(mode);
    }
    drop_invitation(it);
}

/* NULL if there is no memory: the caller works alone. The memory is malloc's, since an invitation may outlive the call
 * and the allocator in force. */
static invitation *invite(job *work) {
    invitation *it = malloc(sizeof *it);
    if (!it)
        return NULL;
    *it = (invitation){.work = work, .holders = work->workers};
    lock_pool();
    const bool usable = pool.usable;
    cmb_unlock(&pool.mutex);
    for (int n = 1; n < work->workers; n++)
        if (!usable || !host->start(host->context, follow_invitation, it))
            drop_invitation(it);
    return it;
}

static void end_invitation(invitation *it) {
    cmb_lock(&pool.mutex);
    job *work = it->work;
    it->work = NULL;
    cmb_unlock(&pool.mutex);
    await_job(work);
    drop_invitation(it);
}

/* ---- jobs --------------------------------------------------------------------------------------- */

static _Thread_local bool at_work;     /* this thread is in a job */
static _Thread_local bool stop_is_due; /* and cmb_stop_threads was called in it */

void cmb_parallel_for(int64_t count, int workers, cmb_body body, void *context, cmb_cancel *cancel) {
    CMB_ASSERT(count >= 0 && workers >= 1);
    job work = {.count = count, .body = body, .context = context, .cancel = cancel};
    work.workers = workers < MAX_THREADS ? workers : MAX_THREADS;
    if (work.workers > count)
        work.workers = (int)count;
    const bool is_nested = at_work;
    const uint64_t mode = float_mode_default();
    at_work = true;
    invitation *invited = work.workers > 1 && host ? invite(&work) : NULL;
    const bool posted = work.workers > 1 && !host && post_job(&work);
    run_job(&work, 0);
    if (invited)
        end_invitation(invited);
    if (posted)
        await_job(&work);
    float_mode_restore(mode);
    at_work = is_nested;
    if (stop_is_due && !at_work)
        cmb_stop_threads();
}

void cmb_stop_threads(void) {
    stop_is_due = at_work;
    if (at_work)
        return;
    lock_pool();
    while (atomic_load(&pool.stopping))
        cmb_condition_wait(&pool.done, &pool.mutex); /* another thread is stopping them */
    atomic_store(&pool.stopping, true);
    const int threads = pool.threads;
    cmb_condition_wake_all(&pool.wake);
    cmb_unlock(&pool.mutex);
    for (int n = 0; n < threads; n++)
        cmb_thread_join(&pool.thread[n]);
    cmb_lock(&pool.mutex);
    pool.threads = 0;
    atomic_store(&pool.stopping, false);
    cmb_condition_wake_all(&pool.done);
    cmb_unlock(&pool.mutex);
}

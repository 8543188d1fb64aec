// SPDX-License-Identifier: Apache-2.0
/*
 * The thread pool. Our own and not OpenMP: a forked child must work, a thread that cannot start must not
 * end the process, and what sanitizers say must be true.
 *
 * One job runs at a time. It lives on its caller's stack; pool.job points to it until the caller has seen
 * its last worker leave, under the mutex, which guards everything here that is not atomic. Whoever finds
 * the pool taken, a nested call included, runs its own job alone: nobody ever waits for another job, so
 * there is no deadlock to find. The caller takes indices like any worker and never waits for one that has
 * not joined.
 *
 * A host's own threads are asked for each job by an invitation, which outlives the job: whoever comes too late
 * finds it void. Such jobs do not take the pool, so that any number of them run at a time.
 */
#include "cpu.h"
#include "runtime.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_THREADS = 1024, STACK_BYTES = 1 << 20, SPIN_NS = 50 * 1000 };

/* ---- the number of threads ---------------------------------------------------------------------- */

static atomic_int threads_chosen;  /* by cmb_set_num_threads; 0: the default */
static atomic_int threads_default; /* 0: not known yet */

/* A positive integer, or the first of a comma list of them; 0 where the variable holds no such thing. */
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

void cmb_use_scheduler(const cmb_scheduler *scheduler) { host = scheduler; }

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
    const int count = configured_count();
    return host && host->threads < count ? host->threads : count;
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

/* Puts the default mode in force (round to nearest, subnormals kept, nothing trapped) and returns the one
 * before: a thread inherits its creator's mode, and results must not depend on who that was. */
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
    int workers; /* threads of a number below this may join */
    cmb_body body;
    void *context;
    cmb_cancel *cancel;
    atomic_int_least64_t next; /* index to claim */
    atomic_uint joined;        /* workers inside, without the caller; changes under the mutex */
} job;

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t wake; /* a job was posted, or the threads are to end */
    pthread_cond_t done; /* a job's last worker left, or the threads have ended */
    job *job;
    atomic_uint posted; /* jobs so far */
    int threads;        /* thread[n] is worker n + 1 */
    int sleeping;
    atomic_bool stopping;
    bool usable;
    pthread_t thread[MAX_THREADS - 1];
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static bool init_conditions(void) {
    pthread_condattr_t monotonic;
    if (pthread_condattr_init(&monotonic) != 0)
        return false;
#ifndef __APPLE__
    bool ok = pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC) == 0;
#else
    bool ok = true;
#endif
    ok = ok && pthread_cond_init(&pool.wake, &monotonic) == 0 && pthread_cond_init(&pool.done, &monotonic) == 0;
    pthread_condattr_destroy(&monotonic);
    return ok;
}

static void wait_done(int64_t deadline) { /* in ns of the monotonic clock */
#ifndef __APPLE__
    const struct timespec until = {.tv_sec = (time_t)(deadline / 1000000000), .tv_nsec = (long)(deadline % 1000000000)};
    pthread_cond_timedwait(&pool.done, &pool.mutex, &until);
#else
    int64_t left = deadline - cmb_now();
    if (left < 0)
        left = 0;
    const struct timespec span = {.tv_sec = (time_t)(left / 1000000000), .tv_nsec = (long)(left % 1000000000)};
    pthread_cond_timedwait_relative_np(&pool.done, &pool.mutex, &span);
#endif
}

/* Fork with the mutex held, so that the child finds the pool between two changes. The threads are not
 * in the child, and conditions remember their waiters. A job in progress cannot be completed there: its
 * caller, if it is the one that forked (from a poll), is told to stop. */
static void before_fork(void) { pthread_mutex_lock(&pool.mutex); }

static void after_fork_parent(void) { pthread_mutex_unlock(&pool.mutex); }

static void after_fork_child(void) {
    if (pool.job) {
        atomic_store(&pool.job->cancel->stop, true);
        atomic_store(&pool.job->joined, 0);
    }
    pool.job = NULL;
    pool.threads = 0;
    pool.sleeping = 0;
    atomic_store(&pool.stopping, false);
    pool.usable = init_conditions();
    pthread_mutex_unlock(&pool.mutex);
}

static void init_pool(void) {
    pool.usable = init_conditions() && pthread_atfork(before_fork, after_fork_parent, after_fork_child) == 0;
}

/* The first lock must come after the fork handlers. */
static void lock_pool(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, init_pool);
    pthread_mutex_lock(&pool.mutex);
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

/* Until *value is as wanted, but not for long: jobs follow one another faster than a thread wakes. */
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

/* Joined under the mutex, left here; from then on *work may be gone. */
static void work_and_leave(job *work, int worker) {
    run_job(work, worker);
    pthread_mutex_lock(&pool.mutex);
    if (atomic_fetch_sub(&work->joined, 1) == 1)
        pthread_cond_broadcast(&pool.done);
    pthread_mutex_unlock(&pool.mutex);
}

static void *run_worker(void *argument) {
    const int worker = (int)(intptr_t)argument;
    unsigned seen = 0;
    float_mode_default();
    pthread_mutex_lock(&pool.mutex);
    while (!atomic_load(&pool.stopping)) {
        const unsigned posted = atomic_load(&pool.posted);
        if (posted == seen) {
            pool.sleeping++;
            pthread_cond_wait(&pool.wake, &pool.mutex);
            pool.sleeping--;
            continue;
        }
        seen = posted;
        job *work = pool.job;
        if (!work || worker >= work->workers || atomic_load(&work->next) >= work->count)
            continue;
        atomic_fetch_add(&work->joined, 1);
        pthread_mutex_unlock(&pool.mutex);
        work_and_leave(work, worker);
        spin_until(&pool.posted, seen + 1);
        pthread_mutex_lock(&pool.mutex);
    }
    pthread_mutex_unlock(&pool.mutex);
    return NULL;
}

/* Workers 1 .. workers - 1, or as many as can be had. Holds the mutex. */
static void start_threads(int workers) {
    pthread_attr_t attributes;
    sigset_t blocked, before;
    if (pool.threads >= workers - 1 || pthread_attr_init(&attributes) != 0)
        return;
    if (pthread_attr_setstacksize(&attributes, STACK_BYTES) == 0) {
        /* signals are the program's own threads' affair, but for those that a fault of this one raises */
        sigfillset(&blocked);
        sigdelset(&blocked, SIGSEGV);
        sigdelset(&blocked, SIGBUS);
        sigdelset(&blocked, SIGFPE);
        sigdelset(&blocked, SIGILL);
        pthread_sigmask(SIG_SETMASK, &blocked, &before);
        while (pool.threads < workers - 1) {
            void *number = (void *)(intptr_t)(pool.threads + 1);
            if (pthread_create(&pool.thread[pool.threads], &attributes, run_worker, number) != 0)
                break;
            pool.threads++;
        }
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    pthread_attr_destroy(&attributes);
}

/* Makes *work the pool's job; false where the pool has another one or cannot be used. */
static bool post_job(job *work) {
    lock_pool();
    const bool taken = pool.usable && !pool.job && !atomic_load(&pool.stopping);
    if (taken) {
        start_threads(work->workers);
        pool.job = work;
        atomic_fetch_add(&pool.posted, 1);
        if (pool.sleeping > 0)
            pthread_cond_broadcast(&pool.wake);
    }
    pthread_mutex_unlock(&pool.mutex);
    return taken;
}

/* Returns when no worker is inside the job, polling meanwhile. */
static void await_job(job *work) {
    spin_until(&work->joined, 0);
    pthread_mutex_lock(&pool.mutex);
    while (atomic_load(&work->joined) > 0) {
        wait_done(work->cancel->next_poll);
        pthread_mutex_unlock(&pool.mutex);
        cmb_cancelled(work->cancel, 0);
        pthread_mutex_lock(&pool.mutex);
    }
    if (pool.job == work)
        pool.job = NULL; /* not so in a child forked by the poll */
    pthread_mutex_unlock(&pool.mutex);
}

/* ---- a host's threads --------------------------------------------------------------------------- */

typedef struct {
    job *work;   /* NULL: too late */
    int arrived; /* so far; the number of the last */
    int holders; /* the caller and the tasks not yet run; all three change under the mutex */
} invitation;

static void drop_invitation(invitation *it) {
    pthread_mutex_lock(&pool.mutex);
    const bool last = --it->holders == 0;
    pthread_mutex_unlock(&pool.mutex);
    if (last)
        free(it);
}

static void follow_invitation(void *argument) {
    invitation *it = argument;
    pthread_mutex_lock(&pool.mutex);
    job *work = it->work;
    const int worker = work ? ++it->arrived : 0;
    if (work)
        atomic_fetch_add(&work->joined, 1);
    pthread_mutex_unlock(&pool.mutex);
    if (work) {
        const uint64_t mode = float_mode_default();
        work_and_leave(work, worker);
        float_mode_restore(mode);
    }
    drop_invitation(it);
}

/* NULL where the caller is to work alone. */
static invitation *invite(job *work) {
    invitation *it = malloc(sizeof *it);
    if (!it)
        return NULL;
    *it = (invitation){.work = work, .holders = work->workers};
    lock_pool();
    const bool usable = pool.usable;
    pthread_mutex_unlock(&pool.mutex);
    for (int n = 1; n < work->workers; n++)
        if (!usable || !host->start(host->context, follow_invitation, it))
            drop_invitation(it);
    return it;
}

static void end_invitation(invitation *it) {
    pthread_mutex_lock(&pool.mutex);
    job *work = it->work;
    it->work = NULL;
    pthread_mutex_unlock(&pool.mutex);
    await_job(work);
    drop_invitation(it);
}

/* ---- jobs --------------------------------------------------------------------------------------- */

void cmb_parallel_for(int64_t count, int workers, cmb_body body, void *context, cmb_cancel *cancel) {
    job work = {.count = count, .body = body, .context = context, .cancel = cancel};
    work.workers = workers < MAX_THREADS ? workers : MAX_THREADS;
    if (work.workers > count)
        work.workers = (int)count;
    const uint64_t mode = float_mode_default();
    invitation *invited = work.workers > 1 && host ? invite(&work) : NULL;
    const bool posted = work.workers > 1 && !host && post_job(&work);
    run_job(&work, 0);
    if (invited)
        end_invitation(invited);
    if (posted)
        await_job(&work);
    float_mode_restore(mode);
}

void cmb_stop_threads(void) {
    lock_pool();
    while (atomic_load(&pool.stopping))
        pthread_cond_wait(&pool.done, &pool.mutex); /* another is at it */
    atomic_store(&pool.stopping, true);
    const int threads = pool.threads;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
    for (int n = 0; n < threads; n++)
        pthread_join(pool.thread[n], NULL);
    pthread_mutex_lock(&pool.mutex);
    pool.threads = 0;
    atomic_store(&pool.stopping, false);
    pthread_cond_broadcast(&pool.done);
    pthread_mutex_unlock(&pool.mutex);
}

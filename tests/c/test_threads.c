// SPDX-License-Identifier: Apache-2.0
/* The thread pool and a host's threads: jobs, cancelling, forks, signals, processors and the floating-point mode. */
#define _GNU_SOURCE
#include "runtime/system.h"
#include "runtime/threads.h"
#include "testlib.h"

#include <fenv.h>
#include <pthread.h>
#include <time.h>
#ifdef __linux__
#include <sched.h>
#endif
#ifndef _WIN32
#include <signal.h>
#include <sys/resource.h>
#endif

static void sleep_ms(long ms) {
    const struct timespec span = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&span, NULL);
}

/* ---- jobs --------------------------------------------------------------------------------------- */

enum { MOST = 1000 };

typedef struct {
    int64_t count;
    int workers;
    int hits[MOST];            /* not atomic: TSan shows that the caller may read them */
    int64_t last[MOST];        /* of each worker: indices ascend */
    atomic_uint_least64_t who; /* bit of every worker that took part */
    long nap;                  /* ms */
} counting;

static void count_index(void *context, int64_t index, int worker) {
    counting *job = context;
    CHECK(index >= 0 && index < job->count && worker >= 0 && worker < job->workers);
    CHECK(index > job->last[worker], "%lld after %lld", (long long)index, (long long)job->last[worker]);
    job->last[worker] = index;
    job->hits[index]++;
    atomic_fetch_or(&job->who, UINT64_C(1) << (worker % 64));
    if (job->nap > 0)
        sleep_ms(job->nap);
}

/* Runs a job, checks that every index ran once, and returns the set of workers that took part. */
static uint64_t run_counted(int64_t count, int workers, long nap) {
    counting job = {.count = count, .workers = workers, .nap = nap};
    cmb_cancel cancel;
    CHECK(count <= MOST && workers <= MOST);
    for (int n = 0; n < workers; n++)
        job.last[n] = -1;
    cmb_cancel_init(&cancel, NULL);
    cmb_parallel_for(count, workers, count_index, &job, &cancel);
    for (int64_t n = 0; n < count; n++)
        CHECK(job.hits[n] == 1, "index %lld ran %d times, count %lld, workers %d", (long long)n, job.hits[n],
              (long long)count, workers);
    return job.who;
}

static void every_index_once(void) {
    static const int64_t counts[] = {0, 1, 2, 3, 7, 16, 100, MOST};
    static const int workers[] = {1, 2, 3, 7, 16};
    for (int round = 0; round < 20; round++)
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
            for (size_t w = 0; w < sizeof workers / sizeof *workers; w++)
                run_counted(counts[c], workers[w], 0);
}

static void workers_take_part(void) { CHECK(run_counted(8, 4, 50) == 0xf); }

static void nested_body(void *context, int64_t index, int worker) {
    (void)index, (void)worker;
    CHECK(run_counted(20, 3, 0) == 1, "a nested job runs on its caller");
    atomic_fetch_add((atomic_int *)context, 1);
}

static void nested(void) {
    atomic_int ran = 0;
    cmb_cancel cancel;
    cmb_cancel_init(&cancel, NULL);
    cmb_parallel_for(50, 4, nested_body, &ran, &cancel);
    CHECK(ran == 50);
}

static void *call_often(void *argument) {
    (void)argument;
    for (int n = 0; n < 100; n++)
        run_counted(n, 1 + n % 5, 0);
    return NULL;
}

static void many_callers(void) {
    pthread_t caller[8];
    for (int n = 0; n < 8; n++)
        CHECK(pthread_create(&caller[n], NULL, call_often, NULL) == 0);
    for (int n = 0; n < 50; n++)
        CHECK(cmb_set_num_threads(1 + n % 4, NULL) == CMB_OK && cmb_get_num_threads() > 0);
    for (int n = 0; n < 8; n++)
        pthread_join(caller[n], NULL);
    cmb_set_num_threads(0, NULL);
}

static void *stop_often(void *argument) {
    (void)argument;
    for (int n = 0; n < 50; n++)
        cmb_stop_threads();
    return NULL;
}

static void stop_threads(void) {
    pthread_t thread[4];
    cmb_stop_threads();
    cmb_stop_threads();
    run_counted(50, 3, 0);
    cmb_stop_threads();
    CHECK(run_counted(8, 4, 50) == 0xf);
    for (int n = 0; n < 4; n++)
        CHECK(pthread_create(&thread[n], NULL, n % 2 ? stop_often : call_often, NULL) == 0);
    for (int n = 0; n < 4; n++)
        pthread_join(thread[n], NULL);
}

/* ---- a host's threads --------------------------------------------------------------------------- */

enum { SPAWN, AT_ONCE, TOO_LATE, REFUSE };

typedef struct {
    int manner; /* one of these */
    int asked;
    pthread_t thread[16];
    void (*task[16])(void *argument);
    void *argument[16];
} host;

typedef struct {
    void (*task)(void *argument);
    void *argument;
} errand;

static void *run_errand(void *argument) {
    const errand todo = *(errand *)argument;
    free(argument);
    todo.task(todo.argument);
    return NULL;
}

static bool start_task(void *context, void (*task)(void *argument), void *argument) {
    host *it = context;
    const int n = it->asked++;
    CHECK(n < 16);
    if (it->manner == SPAWN) {
        errand *todo = malloc(sizeof *todo);
        CHECK(todo);
        *todo = (errand){task, argument};
        CHECK(pthread_create(&it->thread[n], NULL, run_errand, todo) == 0);
    } else if (it->manner == AT_ONCE) {
        task(argument);
    }
    it->task[n] = task;
    it->argument[n] = argument;
    return it->manner != REFUSE;
}

/* One job on up to 5 threads of a host that offers 4; returns the workers that took part. */
static uint64_t run_hosted(int manner, long nap) {
    host it = {.manner = manner};
    const cmb_scheduler scheduler = {.threads = 4, .start = start_task, .context = &it};
    cmb_use_scheduler(&scheduler);
    CHECK(cmb_set_num_threads(2, NULL) == CMB_OK && cmb_get_num_threads() == 2);
    CHECK(cmb_set_num_threads(5, NULL) == CMB_OK && cmb_get_num_threads() == 4);
    const uint64_t who = run_counted(20, cmb_get_num_threads(), nap);
    CHECK(run_counted(20, 1, 0) == 1 && it.asked == 3, "one worker asks for no threads");
    CHECK(cmb_use_scheduler(NULL) == &scheduler);
    CHECK(cmb_get_num_threads() == 5 && cmb_set_num_threads(0, NULL) == CMB_OK);
    for (int n = 0; n < it.asked; n++) {
        if (manner == SPAWN)
            pthread_join(it.thread[n], NULL);
        if (manner == TOO_LATE)
            it.task[n](it.argument[n]); /* its job has ended */
    }
    return who;
}

static void host_threads(void) {
    CHECK(run_hosted(SPAWN, 20) == 0xf);
    for (int round = 0; round < 50; round++)
        run_hosted(SPAWN, 0);
    CHECK(run_hosted(AT_ONCE, 0) == 2, "the first task has done all before the caller comes to it");
    CHECK(run_hosted(TOO_LATE, 0) == 1);
    CHECK(run_hosted(REFUSE, 0) == 1);
}

/* With a scheduler that lends no thread, the caller works alone. */
static void scheduler_without_threads(void) {
    host it = {.manner = REFUSE};
    const cmb_scheduler one = {.threads = 3, .start = start_task, .context = &it};
    CHECK(cmb_set_num_threads(5, NULL) == CMB_OK && !cmb_use_scheduler(&one));
    for (int threads = -1; threads < 2; threads++) {
        const cmb_scheduler none = {.threads = threads, .start = start_task, .context = &it};
        CHECK(cmb_use_scheduler(&none) == &one);
        CHECK(cmb_get_num_threads() == 1, "%d with %d threads", cmb_get_num_threads(), threads);
        CHECK(run_counted(20, cmb_get_num_threads(), 0) == 1 && it.asked == 0);
        CHECK(cmb_use_scheduler(&one) == &none && cmb_get_num_threads() == 3);
    }
    CHECK(cmb_use_scheduler(NULL) == &one && cmb_set_num_threads(0, NULL) == CMB_OK);
}

static void *host_often(void *argument) {
    (void)argument;
    for (int round = 0; round < 20; round++) {
        host it = {.manner = SPAWN};
        const cmb_scheduler scheduler = {.threads = 3, .start = start_task, .context = &it};
        cmb_use_scheduler(&scheduler);
        run_counted(50, 3, 0);
        for (int n = 0; n < it.asked; n++)
            pthread_join(it.thread[n], NULL);
    }
    return NULL;
}

/* Callers with hosts of their own run at once, while the pool has another job. */
static void many_hosts(void) {
    pthread_t caller[4];
    for (int n = 0; n < 4; n++)
        CHECK(pthread_create(&caller[n], NULL, host_often, NULL) == 0);
    CHECK(run_counted(8, 4, 50) == 0xf);
    for (int n = 0; n < 4; n++)
        pthread_join(caller[n], NULL);
}

/* ---- cancelling --------------------------------------------------------------------------------- */

typedef struct {
    pthread_t caller;
    int calls, stop_at;
    void (*act)(void);
    int64_t last, longest, asked; /* ns */
} poller;

static bool poll_counted(void *context) {
    poller *state = context;
    const int64_t now = cmb_now();
    CHECK(pthread_equal(pthread_self(), state->caller), "the caller alone polls");
    if (now - state->last > state->longest)
        state->longest = now - state->last;
    state->last = state->asked = now;
    if (state->act)
        state->act();
    return ++state->calls == state->stop_at;
}

typedef struct {
    cmb_cancel cancel;
    atomic_int ran;
} nap_job;

static void nap_body(void *context, int64_t index, int worker) {
    (void)index, (void)worker;
    atomic_fetch_add(&((nap_job *)context)->ran, 1);
    sleep_ms(1);
}

/* Worker 1 keeps its index until the call is cancelled, while the caller waits. */
static void hold_body(void *context, int64_t index, int worker) {
    nap_job *job = context;
    (void)index;
    atomic_fetch_add(&job->ran, 1);
    if (worker == 0) {
        while (atomic_load(&job->ran) < 2)
            sleep_ms(1);
    } else {
        while (!cmb_cancelled(&job->cancel, worker))
            sleep_ms(1);
    }
}

static int64_t cancel_once(int64_t count, int workers, cmb_body body) {
    poller state = {.caller = pthread_self(), .stop_at = 3, .last = cmb_now()};
    const cmb_interrupt interrupt = {poll_counted, &state};
    nap_job job = {.ran = 0};
    cmb_cancel_init(&job.cancel, &interrupt);
    cmb_parallel_for(count, workers, body, &job, &job.cancel);
    const int64_t late = cmb_now() - state.asked;
    CHECK(state.calls == 3 && cmb_cancelled(&job.cancel, 0) && cmb_cancelled(&job.cancel, 1));
    CHECK(count == 2 || job.ran < count);
    run_counted(100, workers, 0);
    return late > state.longest ? late : state.longest;
}

static void cancel_stops(void) {
    static const struct {
        int64_t count;
        int workers;
        cmb_body body;
    } cases[] = {{1000000, 1, nap_body}, {1000000, 4, nap_body}, {2, 2, hold_body}};
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        int64_t slowest = INT64_MAX; /* the longest wait for a poll or the return; the best of several attempts, since
                                        the machine may be busy */
        for (int attempt = 0; attempt < 5 && slowest > 100 * 1000 * 1000; attempt++) {
            const int64_t this = cancel_once(cases[n].count, cases[n].workers, cases[n].body);
            if (this < slowest)
                slowest = this;
        }
        CHECK(slowest <= 100 * 1000 * 1000, "case %zu took %lld ns", n, (long long)slowest);
    }
}

static void poll_may_stop_threads(void) {
    poller state = {.caller = pthread_self(), .stop_at = 3, .last = cmb_now(), .act = cmb_stop_threads};
    const cmb_interrupt interrupt = {poll_counted, &state};
    nap_job job = {.ran = 0};
    cmb_cancel_init(&job.cancel, &interrupt);
    cmb_parallel_for(1000000, 3, nap_body, &job, &job.cancel);
    CHECK(state.calls == 3);
    run_counted(100, 3, 0);
}

static void no_poll(void) {
    const cmb_interrupt never = {NULL, NULL};
    nap_job job = {.ran = 0};
    cmb_cancel_init(&job.cancel, &never);
    cmb_parallel_for(200, 2, nap_body, &job, &job.cancel);
    CHECK(job.ran == 200 && !cmb_cancelled(&job.cancel, 0));
}

/* ---- fork, threads that cannot start, signals ---------------------------------------------------- */

#ifndef _WIN32

/* A child, and a child of the child, start pools that work. */
static void fork_and_run(void) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child > 0) {
        expect_success(child);
        return;
    }
    alarm(60);
    CHECK(run_counted(8, 4, 50) == 0xf);
    const pid_t grandchild = fork();
    if (grandchild == 0) {
        alarm(60);
        CHECK(run_counted(8, 3, 50) == 0x7);
    } else {
        expect_success(grandchild);
    }
    _exit(0);
}

static void fork_before_use(void) {
    cmb_stop_threads();
    fork_and_run();
}

static void fork_after_use(void) {
    run_counted(100, 4, 0);
    fork_and_run();
    run_counted(100, 4, 0);
}

/* The system refuses threads to a user who has reached the limit of processes, but never to root. */
static bool forbid_threads(void) {
    const struct rlimit none = {0, 0};
    return (getuid() != 0 || setuid(65534) == 0) && setrlimit(RLIMIT_NPROC, &none) == 0;
}

/* With 0, 1 and 2 threads at work, when no more can start. */
static void threads_cannot_start(void) {
    for (int workers = 1; workers <= 3; workers++) {
        cmb_stop_threads();
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child > 0) {
            expect_success(child);
            continue;
        }
        alarm(60);
        run_counted(100, workers, 0);
        if (!forbid_threads())
            _exit(0); /* root may not become another user here */
        CHECK(run_counted(20, 8, 10) == (UINT64_C(1) << workers) - 1);
        CHECK(run_counted(20, 8, 0) != 0);
        _exit(0);
    }
}

static atomic_bool callers_end;

static void *call_until_end(void *argument) {
    (void)argument;
    while (!atomic_load(&callers_end))
        run_counted(20, 3, 1);
    return NULL;
}

static void fork_during_use(void) {
    pthread_t caller[3];
    atomic_store(&callers_end, false);
    for (int n = 0; n < 3; n++)
        CHECK(pthread_create(&caller[n], NULL, call_until_end, NULL) == 0);
    for (int n = 0; n < 10; n++) {
        sleep_ms(3);
        fork_and_run();
    }
    atomic_store(&callers_end, true);
    for (int n = 0; n < 3; n++)
        pthread_join(caller[n], NULL);
}

static pid_t forked;

static void fork_in_poll(void) {
    forked = fork();
    CHECK(forked >= 0);
    if (forked == 0) {
        alarm(60);
        run_counted(100, 3, 0); /* a new job while workers are still leaving the old one */
    }
}

/* In the child, the copy of a call in progress ends as cancelled; the parent's call goes on. */
static void fork_from_poll(void) {
    poller state = {.caller = pthread_self(), .stop_at = -1, .last = cmb_now(), .act = fork_in_poll};
    const cmb_interrupt interrupt = {poll_counted, &state};
    nap_job job = {.ran = 0};
    cmb_cancel_init(&job.cancel, &interrupt);
    cmb_parallel_for(250, 3, nap_body, &job, &job.cancel);
    CHECK(state.calls > 0);
    if (forked == 0) {
        CHECK(cmb_cancelled(&job.cancel, 0) || job.ran == 250); /* on a busy machine the job may end before the poll */
        CHECK(run_counted(8, 4, 50) == 0xf);
        _exit(0);
    }
    CHECK(!cmb_cancelled(&job.cancel, 0) && job.ran == 250);
    for (int n = 0; n < state.calls; n++) {
        int status = 0;
        CHECK(wait(&status) > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
}

static void signals_body(void *context, int64_t index, int worker) {
    sigset_t blocked;
    (void)context, (void)index;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    CHECK(sigismember(&blocked, SIGINT) == (worker > 0) && sigismember(&blocked, SIGALRM) == (worker > 0));
    CHECK(sigismember(&blocked, SIGSEGV) == 0);
    sleep_ms(5);
}

static void workers_block_signals(void) {
    cmb_cancel cancel;
    cmb_cancel_init(&cancel, NULL);
    cmb_stop_threads();
    cmb_parallel_for(20, 3, signals_body, NULL, &cancel);
}
#endif

/* ---- processors --------------------------------------------------------------------------------- */

#ifdef __GLIBC__
static void affinity_body(void *context, int64_t index, int worker) {
    cpu_set_t allowed;
    (void)index, (void)worker;
    CHECK(sched_getaffinity(0, sizeof allowed, &allowed) == 0 && CPU_EQUAL(&allowed, (cpu_set_t *)context));
    sleep_ms(1);
}

/* Threads that have slept may still run on all processors that the caller may run on. */
static void affinity_is_kept(void) {
    cmb_cancel cancel;
    cpu_set_t allowed;
    CHECK(sched_getaffinity(0, sizeof allowed, &allowed) == 0);
    for (int n = 0; n < 20; n++) {
        cmb_cancel_init(&cancel, NULL);
        sleep_ms(2);
        cmb_parallel_for(8, 3, affinity_body, &allowed, &cancel);
    }
}

static void wait_for_end(int number) { (void)number, sleep_ms(20); }

static void kept_off_a_processor(void) {
    cpu_set_t allowed, set;
    cmb_thread thread = {.body = wait_for_end};
    CHECK(sched_getaffinity(0, sizeof allowed, &allowed) == 0 && cmb_thread_start(&thread, 1 << 20));
    const int processor = cmb_processor(), count = CPU_COUNT(&allowed);
    cmb_keep_off(&thread, -1);
    cmb_keep_off(&thread, CPU_SETSIZE);
    CHECK(thread.kept_off == -1);
    cmb_keep_off(&thread, processor);
    CHECK(thread.kept_off == (count > 1 ? processor : -1)); /* one that is the only one stays */
    CHECK(pthread_getaffinity_np(thread.id, sizeof set, &set) == 0 && CPU_COUNT(&set) == (count > 1 ? count - 1 : 1));
    cmb_thread_join(&thread);
}
#endif

/* ---- the floating-point mode -------------------------------------------------------------------- */

static unsigned control_word(void) {
#ifdef __SSE__
    return __builtin_ia32_stmxcsr();
#else
    return (unsigned)fegetround();
#endif
}

static void float_body(void *context, int64_t index, int worker) {
    volatile double tiny = 1e-308, third = 3;
    (void)context, (void)index, (void)worker;
    CHECK(fegetround() == FE_TONEAREST);
    CHECK(tiny / 16 != 0, "subnormals are kept");
#ifdef __SSE__
    CHECK((control_word() & ~0x3fu) == 0x1f80, "%x", control_word());
#endif
    third = 1 / third; /* raises inexact, which must not reach the caller */
    sleep_ms(2);
}

static void float_mode(void) {
    const unsigned usual = control_word();
    for (int workers = 1; workers <= 3; workers += 2) {
        cmb_cancel cancel;
        cmb_cancel_init(&cancel, NULL);
        cmb_stop_threads(); /* threads then start in the odd mode */
#ifdef __SSE__
        __builtin_ia32_ldmxcsr(0xdfc0); /* flush subnormals, in and out; round up */
#else
        fesetround(FE_UPWARD);
#endif
        const unsigned odd = control_word();
        cmb_parallel_for(20, workers, float_body, NULL, &cancel);
        const unsigned after = control_word();
#ifdef __SSE__
        __builtin_ia32_ldmxcsr(usual);
#else
        fesetround((int)usual);
#endif
        CHECK(after == odd, "%x, not %x", after, odd);
    }
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
#ifndef _WIN32
        TEST(fork_before_use),
#endif
        TEST(every_index_once),
        TEST(workers_take_part),
        TEST(nested),
        TEST(many_callers),
        TEST(stop_threads),
        TEST(host_threads),
        TEST(scheduler_without_threads),
        TEST(many_hosts),
        TEST(cancel_stops),
        TEST(poll_may_stop_threads),
        TEST(no_poll),
#ifndef _WIN32
        TEST(fork_after_use),
        TEST(fork_during_use),
        TEST(fork_from_poll),
        TEST(threads_cannot_start),
        TEST(workers_block_signals),
#endif
#ifdef __GLIBC__
        TEST(affinity_is_kept),
        TEST(kept_off_a_processor),
#endif
        TEST(float_mode),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

// SPDX-License-Identifier: Apache-2.0
/* Memory, errors, cancelling, the thread pool, the thread count and the instruction sets. */
#define _GNU_SOURCE
#include "cpu.h"
#include "runtime.h"
#include "testlib.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *program;

static void sleep_ms(long ms) {
    const struct timespec span = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&span, NULL);
}

/* ---- memory and errors -------------------------------------------------------------------------- */

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

    enum { LARGE = 5 << 20 }; /* such a block may be kept and handed out again, to one taker */
    for (int round = 0; round < 3; round++) {
        char *one = cmb_allocate(LARGE), *other = cmb_allocate((size_t)LARGE << round);
        CHECK(one && other && (uintptr_t)one % 64 == 0 && (uintptr_t)other % 64 == 0);
        memset(one, 1, LARGE);
        memset(other, 2, (size_t)LARGE << round);
        CHECK(one[0] == 1 && one[LARGE - 1] == 1);
        cmb_release(one);
        cmb_release(other);
    }

    /* What is released comes back to a wish of about its size, up to so many blocks and so much in all. */
    cmb_release_kept();
    char *block[20];
    for (int i = 0; i < 20; i++)
        CHECK((block[i] = cmb_default_allocate(LARGE)) != NULL);
    cmb_default_release(block[0]);
    char *smaller = cmb_default_allocate(LARGE / 2);
    CHECK(smaller && smaller != block[0]);
    CHECK(cmb_default_allocate(LARGE - 1000) == block[0]);
    for (int i = 0; i < 20; i++)
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

/* ---- jobs --------------------------------------------------------------------------------------- */

enum { MOST = 1000 };

typedef struct {
    int64_t count;
    int workers;
    int hits[MOST];            /* plain on purpose: TSan shows that the caller may read them */
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

/* Runs a job and checks that every index ran once; returns the set of workers that took part. */
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

static void workers_take_part(void) { CHECK(run_counted(8, 4, 20) == 0xf); }

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
    CHECK(run_counted(8, 4, 20) == 0xf);
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
    cmb_use_scheduler(NULL);
    CHECK(cmb_get_num_threads() == 5 && cmb_set_num_threads(0, NULL) == CMB_OK);
    for (int n = 0; n < it.asked; n++) {
        if (manner == SPAWN)
            pthread_join(it.thread[n], NULL);
        if (manner == TOO_LATE)
            it.task[n](it.argument[n]); /* the job is gone */
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

/* Each caller has threads of its own, and the pool another job meanwhile. */
static void many_hosts(void) {
    pthread_t caller[4];
    for (int n = 0; n < 4; n++)
        CHECK(pthread_create(&caller[n], NULL, host_often, NULL) == 0);
    CHECK(run_counted(8, 4, 20) == 0xf);
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

/* Worker 1 holds on to its index until told to stop; the caller has nothing to do but wait. */
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
        int64_t slowest = INT64_MAX; /* of polls and the return; the best of some, as the machine may be busy */
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

/* ---- fork, and threads that cannot start ----------------------------------------------------------- */

static void expect_success(pid_t child) {
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "child ended with status %x", (unsigned)status);
}

/* A child, and its own child, start pools that work. */
static void fork_and_run(void) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child > 0) {
        expect_success(child);
        return;
    }
    alarm(10);
    CHECK(run_counted(8, 4, 20) == 0xf);
    const pid_t grandchild = fork();
    if (grandchild == 0) {
        alarm(10);
        CHECK(run_counted(8, 3, 20) == 0x7);
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

/* The system refuses threads to a user with no processes left to start; root it never refuses. */
static bool forbid_threads(void) {
    const struct rlimit none = {0, 0};
    return (getuid() != 0 || setuid(65534) == 0) && setrlimit(RLIMIT_NPROC, &none) == 0;
}

/* With 0, 1 and 2 threads there, and no others to be had. */
static void threads_cannot_start(void) {
    for (int workers = 1; workers <= 3; workers++) {
        cmb_stop_threads();
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child > 0) {
            expect_success(child);
            continue;
        }
        alarm(10);
        run_counted(100, workers, 0);
        if (!forbid_threads())
            _exit(0); /* a root that may not become another user */
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
        alarm(10);
        run_counted(100, 3, 0); /* a new job before the old one has been left */
    }
}

/* The child's copy of a call that is not done ends as cancelled; the parent's goes on. */
static void fork_from_poll(void) {
    poller state = {.caller = pthread_self(), .stop_at = -1, .last = cmb_now(), .act = fork_in_poll};
    const cmb_interrupt interrupt = {poll_counted, &state};
    nap_job job = {.ran = 0};
    cmb_cancel_init(&job.cancel, &interrupt);
    cmb_parallel_for(250, 3, nap_body, &job, &job.cancel);
    CHECK(state.calls > 0);
    if (forked == 0) {
        CHECK(cmb_cancelled(&job.cancel, 0) || job.ran == 250); /* all was done when a busy machine came to poll */
        CHECK(run_counted(8, 4, 20) == 0xf);
        _exit(0);
    }
    CHECK(!cmb_cancelled(&job.cancel, 0) && job.ran == 250);
    for (int n = 0; n < state.calls; n++) {
        int status = 0;
        CHECK(wait(&status) > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
}

/* ---- signals and the floating-point mode -------------------------------------------------------- */

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
        cmb_stop_threads(); /* so that threads are started in the odd mode */
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

/* ---- the number of threads ---------------------------------------------------------------------- */

static void thread_counts(void) {
    static const int64_t bad[] = {-1, INT64_MIN, 1025, INT64_MAX};
    cmb_error error;
    CHECK(cmb_set_num_threads(-1, &error) == CMB_ERR_VALUE);
    CHECK(strcmp(error.message, "count must be between 0 and 1024, got -1") == 0, "%s", error.message);
    CHECK(cmb_set_num_threads(5, NULL) == CMB_OK);
    for (size_t n = 0; n < sizeof bad / sizeof *bad; n++)
        CHECK(cmb_set_num_threads(bad[n], NULL) == CMB_ERR_VALUE);
    CHECK(cmb_get_num_threads() == 5);
    CHECK(cmb_set_num_threads(1024, NULL) == CMB_OK && cmb_get_num_threads() == 1024);
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK && cmb_get_num_threads() >= 1);
}

static void thread_count_of_environment(void) {
    static const struct {
        const char *own, *omp;
        int count; /* 0: the processors */
    } cases[] = {
        {"3", "5", 3},
        {NULL, "5", 5},
        {NULL, "6,2,1", 6},
        {NULL, " 7 , 2", 7},
        {"", "4", 4},
        {"0", "4", 4},
        {"-2", "4", 4},
        {"two", "4", 4},
        {"3x", "4", 4},
        {"100000", NULL, 1024},
        {NULL, NULL, 0},
        {"x", "auto", 0},
        {"99999999999999999999", NULL, 1024},
    };
    const char *const names[] = {"COMBINER_NUM_THREADS", "OMP_NUM_THREADS"};
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        for (int v = 0; v < 2; v++) {
            const char *value = v == 0 ? cases[n].own : cases[n].omp;
            if (value)
                setenv(names[v], value, 1);
            else
                unsetenv(names[v]);
        }
        const int expected = cases[n].count > 0 ? cases[n].count : cmb_processors("");
        cmb_set_num_threads(0, NULL);
        CHECK(cmb_get_num_threads() == expected, "case %zu: %d, not %d", n, cmb_get_num_threads(), expected);
    }
}

static void write_file(const char *root, const char *path, const char *text) {
    char full[512];
    snprintf(full, sizeof full, "%s%s", root, path);
    for (char *slash = strchr(full + strlen(root) + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(full, 0700);
        *slash = '/';
    }
    FILE *stream = fopen(full, "w");
    CHECK(stream && fputs(text, stream) >= 0 && fclose(stream) == 0, "%s", full);
}

/* What a quota of one and a half processors, and none, give in each place it can be. */
static void processors(void) {
    static const struct {
        const char *cgroup, *file, *text;
        int quota; /* 0: none */
    } cases[] = {
        {"0::/\n", "/sys/fs/cgroup/cpu.max", "150000 100000\n", 2},
        {"0::/\n", "/sys/fs/cgroup/cpu.max", "50000 100000\n", 1},
        {"0::/\n", "/sys/fs/cgroup/cpu.max", "max 100000\n", 0},
        {"0::/\n", "/sys/fs/cgroup/cpu.max", "", 0},
        {"0::/a/b\n", "/sys/fs/cgroup/a/b/cpu.max", "10000 100000\n", 1},
        {"0::/a/b\n", "/sys/fs/cgroup/a/cpu.max", "10000 100000\n", 1},
        {"0::/host/only\n", "/sys/fs/cgroup/cpu.max", "10000 100000\n", 1},
        {"5:cpu,cpuacct:/\n0::/\n", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "150000\n", 2},
        {"5:cpuset:/\n4:cpu:/a\n", "/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "50000\n", 1},
        {"4:cpu:/a\n", "/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n", 0},
        {"4:memory:/a\n", "/sys/fs/cgroup/memory/a/cpu.cfs_quota_us", "50000\n", 0},
        {"nonsense\n:\n::\n", "/sys/fs/cgroup/memory/cpu.max", "1 1", 0},
    };
    const int all = cmb_processors("/nowhere");
    CHECK(all >= 1);
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        char root[] = "/tmp/combiner-XXXXXX", command[64];
        CHECK(mkdtemp(root));
        write_file(root, "/proc/self/cgroup", cases[n].cgroup);
        write_file(root, cases[n].file, cases[n].text);
        write_file(root, "/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
        write_file(root, "/sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n");
        const int expected = cases[n].quota > 0 && cases[n].quota < all ? cases[n].quota : all;
        CHECK(cmb_processors(root) == expected, "case %zu: %d, not %d", n, cmb_processors(root), expected);
        snprintf(command, sizeof command, "rm -r %s", root);
        CHECK(system(command) == 0);
    }
}

/* ---- instruction sets --------------------------------------------------------------------------- */

/* Unless something else was set: COMBINER_ISA where the machine has it, else the best, on Intel's without bfloat16. */
static void isa_follows_environment(void) {
    const char *wanted = getenv("COMBINER_ISA");
    const char *expected = cmb_isa_name(cmb_isa_count() - 1);
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_is("intel") && strcmp(expected, "avx512_bf16") == 0)
        expected = "avx512";
#endif
    for (int n = 0; wanted && n < cmb_isa_count(); n++)
        if (strcmp(wanted, cmb_isa_name(n)) == 0)
            expected = wanted;
    CHECK(strcmp(cmb_get_isa(), expected) == 0, "%s, not %s", cmb_get_isa(), expected);
}

static void isa_environment(void) {
    for (int n = -1; n < cmb_isa_count(); n++) {
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            setenv("COMBINER_ISA", n < 0 ? "sse9" : cmb_isa_name(n), 1);
            execl(program, program, "isa_follows_environment", (char *)NULL);
            _exit(1);
        }
        expect_success(child);
    }
}

static void isa_choice(void) {
    cmb_error error = {0};
    const int count = cmb_isa_count();
    CHECK(count >= 1 && strcmp(cmb_isa_name(0), "base") == 0 && !cmb_isa_name(-1) && !cmb_isa_name(count));
#ifdef __aarch64__
    static const char *const names[] = {"base", "neon"};
#else
    static const char *const names[] = {"base", "avx2", "avx512", "avx512_bf16"};
#endif
    for (int n = 0; n < count; n++) {
        CHECK(strcmp(cmb_isa_name(n), names[n]) == 0);
        CHECK(cmb_set_isa(cmb_isa_name(n), &error) == CMB_OK && cmb_get_isa() == cmb_isa_name(n));
        CHECK((cmb_isa_current() == CMB_ISA_BASE) == (n == 0));
    }
    CHECK(cmb_set_isa("sse9", &error) == CMB_ERR_VALUE && error.status == CMB_ERR_VALUE);
    CHECK(strstr(error.message, "isa must be one of base") && strstr(error.message, "got sse9"), "%s", error.message);
    CHECK(cmb_set_isa(NULL, NULL) == CMB_ERR_VALUE && cmb_set_isa("", NULL) == CMB_ERR_VALUE);
    CHECK(cmb_get_isa() == cmb_isa_name(count - 1), "a refused name changes nothing");
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    CHECK((count >= 2) == (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")));
    CHECK((count >= 3) == (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512f")));
    CHECK((count >= 4) == (count >= 3 && __builtin_cpu_supports("avx512bf16")));
#endif
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(isa_follows_environment), /* first: before anything chooses */
        TEST(isa_environment),
        TEST(isa_choice),
        TEST(memory),
        TEST(sizes),
        TEST(errors),
        TEST(fork_before_use),
        TEST(every_index_once),
        TEST(workers_take_part),
        TEST(nested),
        TEST(many_callers),
        TEST(stop_threads),
        TEST(host_threads),
        TEST(many_hosts),
        TEST(cancel_stops),
        TEST(poll_may_stop_threads),
        TEST(no_poll),
        TEST(fork_after_use),
        TEST(fork_during_use),
        TEST(fork_from_poll),
        TEST(threads_cannot_start),
        TEST(workers_block_signals),
        TEST(float_mode),
        TEST(thread_counts),
        TEST(thread_count_of_environment),
        TEST(processors),
    };
    program = argv[0];
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

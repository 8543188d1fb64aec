// SPDX-License-Identifier: Apache-2.0
/* Calls that are cancelled, several at once, and in forked children. */
#define _GNU_SOURCE
#include "definition.h"

#include <signal.h>

/* A long call ends soon after its poll asks for it, and the next call is right. */
static void cancel(void) {
    request asked = large(DENSE);
    asked.dtype = CMB_FLOAT64;
    asked.B = 1;
    asked.Hq = 2;
    asked.Hk = 1;
    asked.L = 20000;
    asked.D = asked.Dv = 64;
    fixture *f = new_fixture(asked);
    CASE("cancel");
    for (int count = 1; count <= 3; count += 2)
        for (int is_backward = 0; is_backward < 2; is_backward++) {
            poller state = {pthread_self(), 0, 2};
            const cmb_interrupt interrupt = {poll_caller, &state};
            cmb_error error = {0};
            test_heap heap = {0};
            CHECK(cmb_set_num_threads(count, NULL) == CMB_OK);
            test_heap_use(&heap);
            const double start = seconds();
            const cmb_status status = is_backward ? cmb_backward(&f->problem, &f->gradients, &interrupt, &error)
                                                  : cmb_forward(&f->problem, &interrupt, &error);
            const double took = seconds() - start;
            test_heap_use(NULL);
            CHECK(status == CMB_ERR_CANCELLED && strcmp(error.message, "cancelled") == 0, "%d", status);
            CHECK(state.polls == 2 && heap.live == 0);
            CHECK(took < 5, "%.2f s", took); /* 0.1 s on an idle machine */
            check_against_definition(small);
        }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
    free_fixture(f);
}

/* Heads without rows take no time. Of many small heads none begins after a cancel. */
static void cancel_between_heads(void) {
    cmb_error error = {0};
    float number = 1, *out = zeros((size_t)2 << 24, sizeof *out);
    for (int which = 0; which < 3; which++) {
        poller state = {pthread_self(), 0, 1};
        const cmb_interrupt interrupt = {poll_caller, &state};
        const bool is_endless = which < 2;
        const cmb_array input = {.data = &number, .heads = 1};
        request asked = {.pattern = DENSE, .L = which > 0};
        cmb_plan *plan = new_plan(&asked);
        cmb_problem p = {.dtype = CMB_FLOAT32, .stages = which == 1 ? CMB_SUMMARIZE : CMB_BOTH, .Hq = 1, .Hk = 1};
        p.B = INT64_C(1) << (is_endless ? 40 : 24);
        p.L = asked.L;
        p.D = p.Dv = 1;
        p.plan = (const cmb_plan *const *)&plan;
        p.plans = 1;
        p.query = p.key = p.value = p.summary_key = p.summary_value = p.summary_lse = input;
        p.out = (cmb_array){.data = out, .heads = 1, .batch = 1};
        p.lse = (cmb_array){.data = out + (1 << 24), .heads = 1, .batch = 1};
        const double start = seconds();
        const cmb_status status = cmb_forward(&p, &interrupt, &error);
        const double took = seconds() - start;
        CHECK(status == (is_endless ? CMB_OK : CMB_ERR_CANCELLED), "%d: %s", which, error.message);
        CHECK(took < 2, "%d: %.2f s", which, took); /* all heads take 8 s; the call takes 0.1 s on an idle machine */
        cmb_plan_free(plan);
    }
    free(out);
}

static bool stop_threads(void *state) {
    cmb_stop_threads();
    ++*(int *)state;
    return false;
}

/* A poll may stop the threads, even while one of them waits, in the middle of a tile, for the thread that polls. */
static void threads_stopped_from_a_poll(void) {
    request asked = large(DENSE);
    asked.B = asked.Hq = asked.Hk = 1;
    asked.D = asked.Dv = 64;
    int polls = 0;
    const cmb_interrupt interrupt = {stop_threads, &polls};
    CASE("threads stopped from a poll");
    CHECK(cmb_set_num_threads(2, NULL) == CMB_OK);
    fixture *f = NULL;
    double took = 0;
    for (asked.L = 1024; took < 0.2; asked.L *= 2) { /* long enough for polls, on any machine */
        if (f)
            free_fixture(f);
        f = new_fixture(asked);
        forward(f);
        const double start = seconds();
        backward(f);
        took = seconds() - start;
    }
    asked.L /= 2;
    fixture *g = new_fixture(asked);
    end_after(300); /* ends a test that waits for ever */
    while (polls < 3) {
        CHECK(cmb_forward(&g->problem, &interrupt, NULL) == CMB_OK);
        CHECK(cmb_backward(&g->problem, &g->gradients, &interrupt, NULL) == CMB_OK);
    }
    end_after(0);
    check_same_results(f, g);
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
    free_fixture(f);
    free_fixture(g);
}

/* A poll that never stops changes nothing. */
static void poll_changes_nothing(void) {
    request asked = large(LOGSPARSE);
    fixture *f = new_fixture(asked), *g = new_fixture(asked);
    poller state = {pthread_self(), 0, 0};
    const cmb_interrupt interrupt = {poll_caller, &state}, nothing = {NULL, NULL};
    CASE("poll");
    forward(f);
    backward(f);
    CHECK(cmb_forward(&g->problem, &interrupt, NULL) == CMB_OK);
    CHECK(cmb_backward(&g->problem, &g->gradients, &interrupt, NULL) == CMB_OK);
    check_same_results(f, g);
    CHECK(cmb_forward(&g->problem, &nothing, NULL) == CMB_OK);
    check_same_results(f, g);
    free_fixture(f);
    free_fixture(g);
}

typedef struct {
    const fixture *right;
    fixture *own; /* has the inputs and the plan of `right` */
    int rounds;
} caller;

/* A fixture with outputs of its own. */
static caller new_caller(const fixture *right, int rounds) {
    caller c = {right, new_fixture(right->asked), rounds};
    c.own->problem.plan = right->problem.plan;
    c.own->problem.query = right->problem.query;
    c.own->problem.key = right->problem.key;
    c.own->problem.value = right->problem.value;
    c.own->gradients.out = right->gradients.out;
    return c;
}

static void *call_many_times(void *argument) {
    const caller *c = argument;
    for (int n = 0; n < c->rounds; n++) {
        forward(c->own);
        backward(c->own);
        check_same_results(c->right, c->own);
    }
    return NULL;
}

static void callers_at_once(void) {
    enum { CALLERS = 4 };
    CHECK(cmb_set_num_threads(3, NULL) == CMB_OK);
    for (int which = FIXED; which <= LOGSPARSE; which++) {
        fixture *right = new_fixture(large((pattern)which));
        pthread_t thread[CALLERS];
        caller c[CALLERS];
        CASE("callers at once, pattern %d", which);
        forward(right);
        backward(right);
        for (int n = 0; n < CALLERS; n++) {
            c[n] = new_caller(right, 2);
            CHECK(pthread_create(&thread[n], NULL, call_many_times, &c[n]) == 0);
        }
        for (int n = 0; n < CALLERS; n++) {
            CHECK(pthread_join(thread[n], NULL) == 0);
            free_fixture(c[n].own);
        }
        free_fixture(right);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

#ifndef _WIN32
/* A forked child computes what its parent computes, whether the pool is at work or at rest during the fork. */
static void forks(void) {
    fixture *right = new_fixture(large(LOGSPARSE));
    caller busy = new_caller(right, 6), own = new_caller(right, 1);
    pthread_t thread;
    CASE("forks");
    CHECK(cmb_set_num_threads(3, NULL) == CMB_OK);
    forward(right);
    backward(right);
    for (int at_work = 0; at_work < 2; at_work++) {
        CHECK(!at_work || pthread_create(&thread, NULL, call_many_times, &busy) == 0);
        for (int n = 0; n < 4; n++) {
            const pid_t child = fork();
            CHECK(child >= 0);
            if (child == 0) {
                alarm(30);
                call_many_times(&own);
                raise(SIGKILL); /* not exit: a leak checker would report what the parent's threads held */
            }
            call_many_times(&own);
            int status = 0;
            CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
                  "status %#x", (unsigned)status);
        }
        CHECK(!at_work || pthread_join(thread, NULL) == 0);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
    free_fixture(busy.own);
    free_fixture(own.own);
    free_fixture(right);
}
#endif

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(cancel),
        TEST(cancel_between_heads),
        TEST(threads_stopped_from_a_poll),
        TEST(poll_changes_nothing),
        TEST(callers_at_once),
#ifndef _WIN32
        TEST(forks),
#endif
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

// SPDX-License-Identifier: Apache-2.0
/* The number of threads, the processors and the instruction sets. */
#define _GNU_SOURCE
#include "runtime/cpu.h"
#include "testlib.h"

#ifndef _WIN32
#include <sys/stat.h>
#endif

#ifndef _WIN32
static const char *program; /* this program, which a test starts again */
#endif

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
        int count; /* 0: the number of processors */
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
        for (int v = 0; v < 2; v++)
            set_variable(names[v], v == 0 ? cases[n].own : cases[n].omp);
        const int expected = cases[n].count > 0 ? cases[n].count : cmb_processors("");
        cmb_set_num_threads(0, NULL);
        CHECK(cmb_get_num_threads() == expected, "case %zu: %d, not %d", n, cmb_get_num_threads(), expected);
    }
}

#ifdef __linux__
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

/* Quotas, whole, broken and absent, in each file that may hold one. */
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
#endif

/* ---- instruction sets --------------------------------------------------------------------------- */

/* The instruction set before any call of cmb_set_isa: COMBINER_ISA if the machine has it, else the highest, but not
 * avx512_bf16 on Intel's processors. */
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

#ifndef _WIN32
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
#endif

static void isa_choice(void) {
    cmb_error error = {0};
    const int count = cmb_isa_count();
    CHECK(count >= 1 && strcmp(cmb_isa_name(0), "base") == 0 && !cmb_isa_name(-1) && !cmb_isa_name(count));
#ifdef __aarch64__
    static const char *const names[] = {"base", "neon"};
#else
    static const char *const names[] = {"base", "avx2", "avx512", "avx512_bf16", "amx"};
#endif
    CHECK(CMB_ISA_COUNT == sizeof names / sizeof *names, "combiner.h names them");
    for (int n = 0; n < count; n++) {
        CHECK(strcmp(cmb_isa_name(n), names[n]) == 0);
        CHECK(cmb_set_isa(cmb_isa_name(n), &error) == CMB_OK && cmb_get_isa() == cmb_isa_name(n));
        CHECK((cmb_isa_current() == CMB_ISA_BASE) == (n == 0));
    }
    CHECK(cmb_set_isa("sse9", &error) == CMB_ERR_VALUE && error.status == CMB_ERR_VALUE);
    CHECK(strstr(error.message, "name must be one of base") && strstr(error.message, "got sse9"), "%s", error.message);
    CHECK(cmb_set_isa(NULL, NULL) == CMB_ERR_VALUE && cmb_set_isa("", NULL) == CMB_ERR_VALUE);
    CHECK(cmb_get_isa() == cmb_isa_name(count - 1), "a refused name changes nothing");
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse2")) { /* which every x86-64 has: zig's library leaves the compiler's table empty */
        CHECK((count >= 2) == (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")));
        CHECK((count >= 3) == (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512f")));
        CHECK((count >= 4) == (count >= 3 && __builtin_cpu_supports("avx512bf16")));
    }
#endif
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(isa_follows_environment), /* before anything chooses */
#ifndef _WIN32
        TEST(isa_environment),
#endif
        TEST(isa_choice),
        TEST(thread_counts),
        TEST(thread_count_of_environment),
#ifdef __linux__
        TEST(processors),
#endif
    };
#ifndef _WIN32
    program = argv[0];
#endif
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

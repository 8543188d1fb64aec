// SPDX-License-Identifier: Apache-2.0
/* What the machine offers: instruction sets and processors. */
#include "runtime/cpu.h"
#include "runtime/status.h"
#include "runtime/system.h"

#include <inttypes.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __x86_64__
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

/* ---- instruction sets --------------------------------------------------------------------------- */

#define NAME_OF(name, NAME, ...) [CMB_ISA_##NAME] = #name,
static const char *const isa_name[] = {CMB_ISAS(NAME_OF, )};

/* runs_NAME: whether the processor has the instruction set AND the system saves its registers. The second is asked
 * apart, because a kernel or a hypervisor that does not save them leaves the cpuid bits set. */
static bool runs_base(void) { return true; }

#if defined(__x86_64__)
enum { YMM = 0x6, ZMM = 0xe6 }; /* registers in xgetbv's word */

/* Whether the system saves these registers. */
static bool saves(uint32_t registers) {
    const uint32_t osxsave = 1u << 27;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave))
        return false;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & registers) == registers;
}

static bool runs_avx2(void) {
    const uint32_t fma = 1u << 12, avx = 1u << 28, avx2 = 1u << 5;
    uint32_t a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & (fma | avx)) == (fma | avx) &&
           __get_cpuid_count(7, 0, &a, &b, &c, &d) && b & avx2 && saves(YMM);
}

static bool runs_avx512(void) {
    const uint32_t f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    uint32_t a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & f_dq_bw_vl) == f_dq_bw_vl && saves(ZMM);
}

static bool runs_avx512_bf16(void) {
    const uint32_t bf16 = 1u << 5;
    uint32_t a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & bf16;
}

/* Linux saves AMX's registers, which are large, only for a process that has asked. It refuses where a thread has an
 * alternate signal stack that is too small for these registers, and once it has agreed it refuses such stacks. */
static bool runs_amx(void) {
#ifdef __linux__
    enum { TILES = 0x60000, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    const uint32_t bf16_tile = 1u << 22 | 1u << 24;
    uint32_t a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16_tile) == bf16_tile && saves(TILES) &&
           syscall(SYS_arch_prctl, (long)REQUEST_PERMISSION, (long)TILE_DATA) == 0;
#else
    return false;
#endif
}
#elif defined(__aarch64__)
static bool runs_neon(void) { return true; }
#endif

/* How many of the list the machine runs. */
static int detect(void) {
#define TEST_OF(name, NAME, ...) [CMB_ISA_##NAME] = runs_##name,
    static bool (*const runs[])(void) = {CMB_ISAS(TEST_OF, )};
    int count = 1;
    while (count < CMB_ISA_COUNT && runs[count]())
        count++;
    return count;
}

int cmb_isa_count(void) {
    static atomic_int known; /* detecting twice does no harm */
    int count = atomic_load_explicit(&known, memory_order_relaxed);
    if (count == 0) {
        count = detect();
        atomic_store_explicit(&known, count, memory_order_relaxed);
    }
    return count;
}

const char *cmb_isa_name(int index) { return index >= 0 && index < cmb_isa_count() ? isa_name[index] : NULL; }

static int isa_index(const char *name) {
    for (int n = 0; name && n < cmb_isa_count(); n++)
        if (strcmp(name, isa_name[n]) == 0)
            return n;
    return -1;
}

/* The highest; on Intel's processors not avx512_bf16, whose dot product takes the time of four multiply-adds of floats
 * and does the work of two (Emerald Rapids: calls in bfloat16 took 1.4 to 1.7 times as long as with avx512). */
static int best(void) {
    const int highest = cmb_isa_count() - 1;
#ifdef __x86_64__
    uint32_t a, b, c, d;
    if (highest == CMB_ISA_AVX512_BF16 && __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx &&
        c == signature_INTEL_ecx && d == signature_INTEL_edx)
        return highest - 1;
#endif
    return highest;
}

static atomic_int isa_chosen = -1; /* a cmb_isa; -1: COMBINER_ISA has not been read */

static int isa_chosen_index(void) {
    int chosen = atomic_load_explicit(&isa_chosen, memory_order_relaxed);
    if (chosen >= 0)
        return chosen;
    int first = isa_index(getenv("COMBINER_ISA"));
    if (first < 0)
        first = best();
    /* where another thread was quicker, cmb_set_isa's choice above all, it stands */
    return atomic_compare_exchange_strong(&isa_chosen, &chosen, first) ? first : chosen;
}

cmb_isa cmb_isa_current(void) { return (cmb_isa)isa_chosen_index(); }

const char *cmb_get_isa(void) { return isa_name[cmb_isa_current()]; }

cmb_status cmb_set_isa(const char *name, cmb_error *error) {
    const int index = isa_index(name);
    if (index < 0) {
        char names[64] = "";
        for (int n = 0, end = 0; n < cmb_isa_count(); n++)
            end += snprintf(names + end, sizeof names - (size_t)end, "%s%s", n > 0 ? ", " : "", cmb_isa_name(n));
        return cmb_fail(error, CMB_ERR_VALUE, "name must be one of %s on this machine, got %s", names,
                        name ? name : "NULL");
    }
    atomic_store(&isa_chosen, index);
    return CMB_OK;
}

/* ---- processors --------------------------------------------------------------------------------- */

#ifdef __linux__
/* Reads the first one or two integers of <directory>/<file>; returns how many there were. */
static int read_integers(const char *directory, const char *file, int64_t value[2]) {
    char path[1024];
    const int length = snprintf(path, sizeof path, "%s/%s", directory, file);
    if (length < 0 || (size_t)length >= sizeof path)
        return 0;
    FILE *stream = fopen(path, "re");
    if (!stream)
        return 0;
    const int count = fscanf(stream, "%" SCNd64 " %" SCNd64, &value[0], &value[1]);
    fclose(stream);
    return count > 0 ? count : 0;
}

/* Processors that one cgroup's own files grant, rounded up: "150000 100000" (us of processor time in us) grants 2.
 * INT_MAX: no limit. */
static int cgroup_quota(const char *directory) {
    int64_t quota[2], period[2];
    if (read_integers(directory, "cpu.max", quota) == 2) { /* cgroup v2; "max 100000" has no quota */
        period[0] = quota[1];
    } else if (read_integers(directory, "cpu.cfs_quota_us", quota) != 1 ||
               read_integers(directory, "cpu.cfs_period_us", period) != 1) {
        return INT_MAX;
    }
    if (quota[0] <= 0 || period[0] <= 0)
        return INT_MAX;
    const int64_t count = quota[0] / period[0] + (quota[0] % period[0] != 0);
    return count < INT_MAX ? (int)count : INT_MAX;
}

/* The smallest quota of a cgroup and its ancestors. In a container the path is often the host's, while the tree starts
 * at the container's own cgroup: a directory that is missing sets no limit. */
static int cgroup_path_quota(const char *tree, const char *path) {
    char directory[1024];
    const size_t top = strlen(tree);
    int least = INT_MAX;
    if (top + strlen(path) >= sizeof directory)
        path = "";
    snprintf(directory, sizeof directory, "%s%s", tree, path);
    for (;;) {
        const int quota = cgroup_quota(directory);
        if (quota < least)
            least = quota;
        char *slash = strrchr(directory + top, '/');
        if (!slash)
            return least;
        *slash = '\0';
    }
}

/* The smallest quota of all cgroups of this process. */
static int cgroups_quota(const char *root) {
    char path[512], tree[512], line[512];
    int least = INT_MAX;
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *stream = fopen(path, "re");
    if (!stream)
        return least;
    while (fgets(line, sizeof line, stream)) { /* "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1) */
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group)
            continue;
        *group++ = '\0';
        group[strcspn(group, "\n")] = '\0';
        const bool v2 = controllers[1] == '\0';
        bool cpu = false;
        char *rest = NULL;
        for (const char *name = strtok_r(controllers + 1, ",", &rest); name; name = strtok_r(NULL, ",", &rest))
            cpu |= strcmp(name, "cpu") == 0;
        if (!v2 && !cpu)
            continue;
        snprintf(tree, sizeof tree, "%s/sys/fs/cgroup%s", root, v2 ? "" : "/cpu");
        const int quota = cgroup_path_quota(tree, group);
        if (quota < least)
            least = quota;
    }
    fclose(stream);
    return least;
}
#endif

int cmb_processors(const char *root) {
    int count = cmb_affinity_count();
#ifdef __linux__
    const int quota = cgroups_quota(root);
    if (quota < count)
        count = quota;
#else
    (void)root;
#endif
    return count;
}

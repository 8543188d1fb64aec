// SPDX-License-Identifier: Apache-2.0
/* What the machine offers: instruction sets and processors. Internal. */
#ifndef CMB_CPU_H
#define CMB_CPU_H

/* The instruction sets of the architecture, lowest first: a processor that runs one runs all before it. X(name, NAME,
 * ...) for each. This list is the only one: it makes the enum, the names, the detection (runs_NAME in cpu.c), the
 * tables of kernels (kernels.h, kernels.c) and their tests, so that a set with a missing part does not compile or link.
 */
#if defined(__x86_64__)
#define CMB_ISAS(X, ...)                     \
    X(base, BASE, __VA_ARGS__)               \
    X(avx2, AVX2, __VA_ARGS__)               \
    X(avx512, AVX512, __VA_ARGS__)           \
    X(avx512_bf16, AVX512_BF16, __VA_ARGS__) \
    X(amx, AMX, __VA_ARGS__)
#elif defined(__aarch64__)
#define CMB_ISAS(X, ...)       \
    X(base, BASE, __VA_ARGS__) \
    X(neon, NEON, __VA_ARGS__)
#else
#define CMB_ISAS(X, ...) X(base, BASE, __VA_ARGS__)
#endif

#define CMB_ISA_ENUMERATOR(name, NAME, ...) CMB_ISA_##NAME,
typedef enum { CMB_ISAS(CMB_ISA_ENUMERATOR, ) CMB_ISA_COUNT } cmb_isa;

/* The instruction set whose kernels run. A call reads it once, for all its workers, because cmb_set_isa may change it
 * meanwhile, and sizes and bits depend on it. */
cmb_isa cmb_isa_current(void);

/* Processors that this process may use, at least 1: those of its affinity, but no more than the quota, rounded up, of
 * its cgroup (v1 or v2) and that cgroup's ancestors. Cgroup files are read below `root`, which is "" except in tests.
 */
int cmb_processors(const char *root);

#endif

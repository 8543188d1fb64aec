// SPDX-License-Identifier: Apache-2.0
/* For test_kernels.c --bench: how a kernel is timed, and what limits it. */
#ifndef CMB_KERNEL_BENCH_H
#define CMB_KERNEL_BENCH_H

#include "kernel_cases.h"

static double seconds(void) { return 1e-9 * (double)cmb_now(); }

/* Prints the best of many runs, as time and as `work` per nanosecond. */
#define MEASURE(work, unit, call, ...)                                                                   \
    do {                                                                                                 \
        double best_ = 1e9, began_ = seconds();                                                          \
        char name_[64];                                                                                  \
        do {                                                                                             \
            const double start_ = seconds();                                                             \
            for (int repeat_ = 0; repeat_ < 20; repeat_++) {                                             \
                call;                                                                                    \
            }                                                                                            \
            const double took_ = (seconds() - start_) / 20;                                              \
            best_ = took_ < best_ ? took_ : best_;                                                       \
        } while (seconds() - began_ < 0.05);                                                             \
        snprintf(name_, sizeof name_, __VA_ARGS__);                                                      \
        printf("  %-44s %10.0f ns %8.2f %s\n", name_, best_ * 1e9, (double)(work) / best_ * 1e-9, unit); \
    } while (0)

/* The limit of every kernel: twelve independent sums, whose multiply-adds wait only for the one before in the same sum.
 * The compiler must not know the factor: it folds a sum that stays the same. */
#define MULTIPLY_ADD_LOOP(name, target, real, bytes)                                                                  \
    target static __attribute__((noinline)) double name(int64_t rounds, real factor) {                                \
        typedef real vec __attribute__((vector_size(bytes)));                                                         \
        const vec f = (vec){0} + factor;                                                                              \
        vec a = f, b = a + f, c = b + f, d = c + f, e = d + f, g = e + f, h = g + f, i = h + f, j = i + f, k = j + f, \
            l = k + f, m = l + f;                                                                                     \
        for (int64_t n = 0; n < rounds; n++) {                                                                        \
            a = a * f + f, b = b * f + f, c = c * f + f, d = d * f + f, e = e * f + f, g = g * f + f;                 \
            h = h * f + f, i = i * f + f, j = j * f + f, k = k * f + f, l = l * f + f, m = m * f + f;                 \
            __asm__ volatile("" ::: "memory");                                                                        \
        }                                                                                                             \
        a += b + c + d + e + g + h + i + j + k + l + m;                                                               \
        return (double)a[0];                                                                                          \
    }
MULTIPLY_ADD_LOOP(loop_base_f32, , float, 16)
MULTIPLY_ADD_LOOP(loop_base_f64, , double, 16)
#if defined(__x86_64__)
MULTIPLY_ADD_LOOP(loop_avx2_f32, __attribute__((target("avx2,fma"))), float, 32)
MULTIPLY_ADD_LOOP(loop_avx2_f64, __attribute__((target("avx2,fma"))), double, 32)
MULTIPLY_ADD_LOOP(loop_avx512_f32, __attribute__((target("avx512f,fma"))), float, 64)
MULTIPLY_ADD_LOOP(loop_avx512_f64, __attribute__((target("avx512f,fma"))), double, 64)
#endif

static double limit_gflops(const char *isa, bool is_double) {
    static volatile double sink, factor = 0.5;
    const int64_t rounds = 1000000;
    double best = 1e9, lanes = is_double ? 2 : 4;
    for (int trial = 0; trial < 5; trial++) {
        const double start = seconds();
#if defined(__x86_64__)
        if (strncmp(isa, "avx512", 6) == 0 || strcmp(isa, "amx") == 0) {
            lanes = is_double ? 8 : 16;
            sink = is_double ? loop_avx512_f64(rounds, factor) : loop_avx512_f32(rounds, (float)factor);
        } else if (strcmp(isa, "avx2") == 0) {
            lanes = is_double ? 4 : 8;
            sink = is_double ? loop_avx2_f64(rounds, factor) : loop_avx2_f32(rounds, (float)factor);
        } else
#endif
            sink = is_double ? loop_base_f64(rounds, factor) : loop_base_f32(rounds, (float)factor);
        const double took = seconds() - start;
        best = took < best ? took : best;
    }
    (void)isa;
    (void)sink;
    return 24 * lanes * (double)rounds / best * 1e-9;
}

#endif

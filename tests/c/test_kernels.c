// SPDX-License-Identifier: Apache-2.0
/*
 * Every kernel of every instruction set that the machine has, in float and double. A result must agree
 *   - with its definition, computed in the next wider type, within a bound that follows from the roundings;
 *   - to the bit with the other instruction sets that have fused multiply-add;
 * and a kernel must stay within its arrays: each ends at a page that cannot be touched, or at a canary.
 *
 *   --exhaustive    e^x of every float, not of every 64th
 *   --bench         no tests: the time of each kernel, beside a bare loop of multiply-adds
 */
#define _GNU_SOURCE
#include "kernel_bench.h"

#include <float.h>
#include <math.h>
#include <signal.h>

static bool exhaustive;

#define PASTE2(a, b) a##_##b
#define NAME2(a, b) PASTE2(a, b)

#define REAL float
#define SUFFIX f32
#define WIDE double
#define REAL_BITS uint32_t
#define REAL_EPSILON ((double)FLT_EPSILON)
#define REAL_LEAST ((double)FLT_MIN) /* smaller results may be 0 */
#define REAL_MOST FLT_MAX
#define DEEPEST 88.0 /* e^-88 and less is 0 */
#define WIDE_EXP exp
#define WIDE_TANH tanh
#define WIDE_ABS fabs
#include "test_kernels.inc.h"

#undef REAL
#undef SUFFIX
#undef WIDE
#undef REAL_BITS
#undef REAL_EPSILON
#undef REAL_LEAST
#undef REAL_MOST
#undef DEEPEST
#undef WIDE_EXP
#undef WIDE_TANH
#undef WIDE_ABS
#define REAL double
#define SUFFIX f64
#define WIDE long double
#define REAL_BITS uint64_t
#define REAL_EPSILON ((long double)DBL_EPSILON)
#define REAL_LEAST ((long double)DBL_MIN)
#define REAL_MOST DBL_MAX
#define DEEPEST 709.0
#define WIDE_EXP expl
#define WIDE_TANH tanhl
#define WIDE_ABS fabsl
#include "test_kernels.inc.h"

#include "kernel_narrow.h"

/* ---- the accuracy of e^x ------------------------------------------------------------------------ */

static float float_of(uint32_t word) {
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
}

/* Every `step`-th float from `first` to `last`, in order of bits. For |x| < 2^-26 the result must be 1; from -87.68
 * down it may be 0. */
static void check_exp_floats(float first, float last, uint32_t step, double *worst) {
    enum { BATCH = 1024 };
    uint32_t word, end;
    float x[BATCH], y[BATCH];
    double right[BATCH];
    memcpy(&word, &first, sizeof word);
    memcpy(&end, &last, sizeof end);
    for (uint64_t at = word; at <= end;) {
        int n = 0;
        for (; n < BATCH && at <= end; n++, at += step) {
            x[n] = float_of((uint32_t)at);
            right[n] = fabsf(x[n]) < 0x1p-26f ? 1 : exp((double)x[n]);
        }
        for (int isa = 0; isa < cmb_isa_count(); isa++) {
            isas[isa].f32->exp(n, x, y);
            for (int i = 0; i < n; i++) {
                const double unit = right[i] < 0x1p-126 ? 0x1p-149 : ldexp(1, ilogb(right[i]) - 23);
                const double error = fabs((double)y[i] - right[i]) / unit;
                if (x[i] <= -87.68f && y[i] == 0)
                    continue;
                CHECK(fabsf(x[i]) >= 0x1p-26f || y[i] == 1, "%s: e^%a is %a", isas[isa].name, (double)x[i],
                      (double)y[i]);
                if (right[i] < 0x1p-126) /* subnormal: rounded twice */
                    CHECK(error < 1 + (isas[isa].fused ? 0 : 0.3), "%s: e^%a: %.3f ulp", isas[isa].name, (double)x[i],
                          error);
                else
                    worst[isa] = error > worst[isa] ? error : worst[isa];
            }
        }
    }
}

static void exp_of_floats(void) {
    double worst[sizeof isas / sizeof *isas] = {0};
    const uint32_t step = exhaustive ? 1 : 64;
    check_exp_floats(-0.0f, -88.0f, step, worst);
    check_exp_floats(0.0f, 1.0f, step, worst);
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        printf("  %s: %.3f ulp\n", isas[isa].name, worst[isa]);
        /* without FMA the polynomial rounds twice a step */
        const double bound = isas[isa].fused ? 0.89 : 1.17;
        CHECK(worst[isa] <= bound, "%s: %.3f ulp", isas[isa].name, worst[isa]);
    }
}

static void exp_of_doubles(void) {
    enum { COUNT = 20000 };
    static double x[COUNT], y[COUNT];
    static long double right[COUNT];
    /* Valgrind computes long double in double, where expl is off by a unit; exp is off by 0.52 at most. */
    const volatile long double one = 1;
    const bool extended = one + LDBL_EPSILON > one && LDBL_EPSILON < DBL_EPSILON;
    const long double loose = extended ? 0 : 0.52L;
    for (int i = 0; i < COUNT; i++) {
        x[i] = i % 4 == 0   ? uniform(-708, 1)
               : i % 4 == 1 ? uniform(-2, 1)
               : i % 4 == 2 ? uniform(-60, 0)
                            : ldexp(uniform(-1, 1), -random_below(60));
        right[i] = extended ? expl(x[i]) : exp(x[i]);
    }
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        long double worst = 0;
        isas[isa].f64->exp(COUNT, x, y);
        for (int i = 0; i < COUNT; i++) {
            const long double error = fabsl(y[i] - right[i]) / ldexpl(1, ilogbl(right[i]) - 52);
            worst = error > worst ? error : worst;
        }
        const long double bound = (strcmp(isas[isa].name, "base") == 0 ? 1.2L : 1.0L) + loose;
        printf("  %s: %.3Lf ulp\n", isas[isa].name, worst);
        CHECK(worst < bound, "%s: %.3Lf ulp", isas[isa].name, worst);
    }
}

/* ---- the program -------------------------------------------------------------------------------- */

static void bench(void) {
    for (int is_double = 0; is_double < 2; is_double++)
        for (int isa = 0; isa < cmb_isa_count(); isa++) {
            printf("\n%s %s%42s multiply-add loop %8.1f GFLOP/s\n", isas[isa].name, is_double ? "double" : "float", "",
                   limit_gflops(isas[isa].name, is_double));
            if (is_double)
                bench_f64(isas[isa].f64);
            else {
                bench_f32(isas[isa].f32);
                bench_half(isas[isa].bf16, "bf16");
                bench_half(isas[isa].f16, "f16");
            }
        }
}

int main(int argc, char **argv) {
    bool timing = false;
    int kept = 1;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--exhaustive") == 0)
            exhaustive = true;
        else if (strcmp(argv[i], "--bench") == 0)
            timing = true;
        else
            argv[kept++] = argv[i];
    }
    for (int isa = 0; isa < cmb_isa_count(); isa++)
        CHECK(strcmp(isas[isa].name, cmb_isa_name(isa)) == 0);
    raise_fence();
    if (timing) {
        bench();
        return 0;
    }
    signal(SIGSEGV, on_fault);
#ifdef SIGBUS
    signal(SIGBUS, on_fault);
#endif
#define BOTH(function) TEST(function##_f32), TEST(function##_f64)
    static const test_case tests[] = {
        BOTH(gather),
        BOTH(pack),
        BOTH(gemm),
        BOTH(dot),
        BOTH(dot_in_order),
        BOTH(softmax),
        BOTH(softmax_backward),
        BOTH(softmax_not_finite),
        BOTH(row_softmax),
        BOTH(row_softmax_in_order),
        BOTH(row_softmax_backward),
        BOTH(dropout),
        BOTH(scale_and_divide),
        BOTH(finite),
        BOTH(max_pool),
        BOTH(max_pool_rules),
        BOTH(max_pool_backward),
        BOTH(argmax),
        BOTH(biased_softmax),
        BOTH(biased_softmax_not_finite),
        BOTH(softcap),
        BOTH(exp_edges),
        TEST(half_numbers),
        TEST(half_rows),
        TEST(half_maxima),
        TEST(pairs),
        TEST(exp_of_floats),
        TEST(exp_of_doubles),
    };
    return test_main(kept, argv, tests, sizeof tests / sizeof *tests);
}

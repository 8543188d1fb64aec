// SPDX-License-Identifier: Apache-2.0
/*
 * Every kernel of every instruction set that the machine has, in float and double: against its definition in the
 * next wider type, within what rounding explains; to the bit among the instruction sets with fused multiply-add;
 * and within its arrays, each of which ends at a page that cannot be touched or at a canary.
 *
 *   --exhaustive    2^x of every float, not of every 64th
 *   --bench         the time of each kernel instead, beside a bare loop of multiply-adds
 */
#define _GNU_SOURCE
#include "kernels.h"
#include "testlib.h"

#include <float.h>
#include <math.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static const struct {
    const char *name;
    bool fused; /* multiply-add rounds once */
    const cmb_kernels_f32 *f32;
    const cmb_kernels_f64 *f64;
    const cmb_half *bf16, *f16;
} isas[] = {
#define ISA(isa, fused) \
    { #isa, fused, &cmb_kernels_##isa##_f32, &cmb_kernels_##isa##_f64, &cmb_half_##isa##_bf16, &cmb_half_##isa##_f16 }
#if defined(__x86_64__)
    ISA(base, false),
    ISA(avx2, true),
    ISA(avx512, true),
    ISA(avx512_bf16, true),
#elif defined(__aarch64__)
    ISA(base, true),
    ISA(neon, true),
#else
    ISA(base, false),
#endif
};

static char context[200]; /* the case at hand, for whoever reads the failure */

#define CASE(...) snprintf(context, sizeof context, __VA_ARGS__)

static void on_fault(int signal_number) {
    (void)signal_number;
    static const char text[] = "touched what is not its own: ";
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0 || write(STDERR_FILENO, context, strlen(context)) < 0 ||
        write(STDERR_FILENO, "\n", 1) < 0)
        _Exit(2);
    _Exit(1);
}

/* ---- random numbers ----------------------------------------------------------------------------- */

static uint64_t random_state = 1;

static uint64_t random_bits(void) { /* splitmix64 */
    uint64_t x = random_state += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static int random_below(int n) { return (int)(random_bits() % (uint64_t)n); }

static double uniform(double from, double to) { return from + (to - from) * ((double)(random_bits() >> 11) * 0x1p-53); }

/* Philox4x32-10 as its authors write it: one counter, ten rounds, the key bumped between them. */
static void philox(uint32_t word[4], const uint32_t key[2]) {
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        const uint64_t a = (uint64_t)0xD2511F53 * word[0], c = (uint64_t)0xCD9E8D57 * word[2];
        const uint32_t next[4] = {(uint32_t)(c >> 32) ^ word[1] ^ k0, (uint32_t)c, (uint32_t)(a >> 32) ^ word[3] ^ k1,
                                  (uint32_t)a};
        memcpy(word, next, sizeof next);
    }
}

/* ---- fenced memory ------------------------------------------------------------------------------ */

enum { SLOTS = 320, SLOT_BYTES = 64 << 10, CANARY_BYTES = 64, CANARY = 0xff }; /* a canary read as a number is NaN */

static struct {
    char *base;
    size_t stride;
    int used;
    struct {
        char *begin, *end;
    } array[SLOTS];
} fence;

static void raise_fence(void) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    fence.stride = SLOT_BYTES + page;
    fence.base = mmap(NULL, SLOTS * fence.stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(fence.base != MAP_FAILED);
    for (int i = 0; i < SLOTS; i++)
        CHECK(mprotect(fence.base + (size_t)i * fence.stride + SLOT_BYTES, page, PROT_NONE) == 0);
}

/* An array full of canaries, between canaries. Mostly it ends at the forbidden page; else a few elements before
 * it, for the sake of other alignments. */
static void *take(int64_t count, size_t size) {
    CHECK(fence.used < SLOTS);
    char *stop = fence.base + (size_t)fence.used * fence.stride + SLOT_BYTES;
    const size_t bytes = (size_t)count * size, after = random_below(4) ? 0 : size * (size_t)(1 + random_below(7));
    CHECK(bytes + after + CANARY_BYTES <= SLOT_BYTES);
    char *begin = stop - after - bytes;
    memset(begin - CANARY_BYTES, CANARY, CANARY_BYTES + bytes + after);
    fence.array[fence.used].begin = begin;
    fence.array[fence.used++].end = begin + bytes;
    return begin;
}

static void check_fence(void) {
    for (int i = 0; i < fence.used; i++) {
        const char *begin = fence.array[i].begin, *end = fence.array[i].end;
        const char *stop = fence.base + (size_t)i * fence.stride + SLOT_BYTES;
        for (const char *c = begin - CANARY_BYTES; c < begin; c++)
            CHECK(*c == (char)CANARY, "wrote before an array: %s", context);
        for (const char *c = end; c < stop; c++)
            CHECK(*c == (char)CANARY, "wrote after an array: %s", context);
    }
    fence.used = 0;
}

/* ---- the same bits ------------------------------------------------------------------------------ */

static uint64_t digest; /* of what the instruction set at hand made of the case */

static void check_digest(int isa) {
    static uint64_t expected;
    static bool known;
    if (isa == 0)
        known = false;
    if (isas[isa].fused) {
        CHECK(!known || digest == expected, "%s: other bits than the set before: %s", isas[isa].name, context);
        expected = digest;
        known = true;
    }
    digest = 0;
}

static void add_to_digest(uint64_t word) { digest = (digest ^ word) * UINT64_C(0x100000001b3) + 1; }

/* ---- options ------------------------------------------------------------------------------------ */

static bool exhaustive;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* The best of many runs; `work` in the unit of the figure. */
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

#define PASTE2(a, b) a##_##b
#define NAME2(a, b) PASTE2(a, b)

#define REAL float
#define SUFFIX f32
#define WIDE double
#define REAL_BITS uint32_t
#define REAL_EPSILON ((double)FLT_EPSILON)
#define REAL_LEAST ((double)FLT_MIN) /* smaller results may be 0 */
#define REAL_MOST FLT_MAX
#define DEEPEST 127.0 /* 2^-127 and less is 0 */
#define WIDE_EXP2 exp2
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
#undef WIDE_EXP2
#undef WIDE_ABS
#define REAL double
#define SUFFIX f64
#define WIDE long double
#define REAL_BITS uint64_t
#define REAL_EPSILON ((long double)DBL_EPSILON)
#define REAL_LEAST ((long double)DBL_MIN)
#define REAL_MOST DBL_MAX
#define DEEPEST 1023.0
#define WIDE_EXP2 exp2l
#define WIDE_ABS fabsl
#include "test_kernels.inc.h"

/* ---- the accuracy of 2^x ------------------------------------------------------------------------ */

static float float_of(uint32_t word) {
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
}

/* Every `step`-th float from `first` on, in order of bits, up to and including `last`. Below 2^-26 from 0 the result
 * is 1; from -126.5 down it may be 0 already. */
static void check_exp2_floats(float first, float last, uint32_t step, double *worst) {
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
            right[n] = fabsf(x[n]) < 0x1p-26f ? 1 : exp2((double)x[n]);
        }
        for (int isa = 0; isa < cmb_isa_count(); isa++) {
            isas[isa].f32->exp2(n, x, y);
            for (int i = 0; i < n; i++) {
                const double unit = right[i] < 0x1p-126 ? 0x1p-149 : ldexp(1, ilogb(right[i]) - 23);
                const double error = fabs((double)y[i] - right[i]) / unit;
                if (x[i] <= -126.5f && y[i] == 0)
                    continue;
                CHECK(fabsf(x[i]) >= 0x1p-26f || y[i] == 1, "%s: 2^%a is %a", isas[isa].name, (double)x[i],
                      (double)y[i]);
                if (right[i] < 0x1p-126) /* subnormal: rounded twice */
                    CHECK(error < 1 + (isas[isa].fused ? 0 : 0.3), "%s: 2^%a: %.3f ulp", isas[isa].name, (double)x[i],
                          error);
                else
                    worst[isa] = error > worst[isa] ? error : worst[isa];
            }
        }
    }
}

static void exp2_of_floats(void) {
    double worst[sizeof isas / sizeof *isas] = {0};
    const uint32_t step = exhaustive ? 1 : 64;
    check_exp2_floats(-0.0f, -127.0f, step, worst);
    check_exp2_floats(0.0f, 1.0f, step, worst);
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        printf("  %s: %.3f ulp\n", isas[isa].name, worst[isa]);
        /* without FMA the polynomial rounds twice a step */
        const double bound = isas[isa].fused ? 0.85 : 1.13;
        CHECK(worst[isa] <= bound, "%s: %.3f ulp", isas[isa].name, worst[isa]);
    }
}

static void exp2_of_doubles(void) {
    enum { COUNT = 20000 };
    static double x[COUNT], y[COUNT];
    static long double right[COUNT];
    /* valgrind computes long double in double: then the definition may be half a unit off itself */
    const volatile long double one = 1;
    const long double loose = one + LDBL_EPSILON > one && LDBL_EPSILON < DBL_EPSILON ? 0 : 0.6L;
    for (int i = 0; i < COUNT; i++) {
        x[i] = i % 4 == 0   ? uniform(-1022, 1)
               : i % 4 == 1 ? uniform(-2, 1)
               : i % 4 == 2 ? uniform(-60, 0)
                            : ldexp(uniform(-1, 1), -random_below(60));
        right[i] = exp2l(x[i]);
    }
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        long double worst = 0;
        isas[isa].f64->exp2(COUNT, x, y);
        for (int i = 0; i < COUNT; i++) {
            const long double error = fabsl(y[i] - right[i]) / ldexpl(1, ilogbl(right[i]) - 52);
            worst = error > worst ? error : worst;
        }
        const long double bound = (strcmp(isas[isa].name, "base") == 0 ? 1.2L : 1.0L) + loose;
        printf("  %s: %.3Lf ulp\n", isas[isa].name, worst);
        CHECK(worst < bound, "%s: %.3Lf ulp", isas[isa].name, worst);
    }
}

/* ---- the 16-bit formats ------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    int mantissa, bias; /* bits, and what the exponent is ahead by */
} half_format;
static const half_format formats[] = {{"bf16", 7, 127}, {"f16", 10, 15}};

static const cmb_half *half_of(int isa, int format) { return format ? isas[isa].f16 : isas[isa].bf16; }

/* What the bits say; Inf and NaN apart. */
static double half_value(half_format f, uint16_t x) {
    const int exponent = (x & 0x7fff) >> f.mantissa, fraction = x & ((1 << f.mantissa) - 1);
    const double size = exponent ? ldexp(fraction + (1 << f.mantissa), exponent - f.bias - f.mantissa)
                                 : ldexp(fraction, 1 - f.bias - f.mantissa);
    return x & 0x8000 ? -size : size;
}

static void check_narrow(int format, float x, uint16_t want) {
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        uint16_t got;
        half_of(isa, format)->narrow(1, &x, &got);
        CHECK(got == want, "%s %s: %a becomes %04x, not %04x", isas[isa].name, formats[format].name, (double)x, got,
              want);
    }
}

/* Every number there is, and the floats at and beside the middle between it and the next. */
static void half_numbers(void) {
    for (int format = 0; format < 2; format++) {
        const half_format f = formats[format];
        const uint16_t infinity = (uint16_t)(0x7fff >> f.mantissa << f.mantissa);
        for (uint32_t bits = 0; bits < 0x10000; bits++) {
            const uint16_t x = (uint16_t)bits, size = x & 0x7fff;
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                float wide;
                half_of(isa, format)->widen(1, &x, &wide);
                if (size > infinity)
                    CHECK(isnan(wide), "%s %s: %04x is %a", isas[isa].name, f.name, x, (double)wide);
                else
                    CHECK((double)wide ==
                                  (size == infinity ? copysign(INFINITY, x & 0x8000 ? -1 : 1) : half_value(f, x)) &&
                              !signbit(wide) == !(x & 0x8000),
                          "%s %s: %04x is %a", isas[isa].name, f.name, x, (double)wide);
                uint16_t back;
                half_of(isa, format)->narrow(1, &wide, &back);
                CHECK(size > infinity ? (back & 0x7fff) > infinity : back == x, "%s %s: %04x comes back as %04x",
                      isas[isa].name, f.name, x, back);
            }
            if (size >= infinity)
                continue;
            /* past the last number comes what would be the next: there Inf begins */
            const double next = half_value(f, (uint16_t)(x + 1));
            const double after = size + 1 == infinity ? copysign(ldexp(1, f.bias + 1), next) : next;
            const float middle = (float)((half_value(f, x) + after) / 2);
            if (isinf(middle))
                continue;
            check_narrow(format, middle, x & 1 ? (uint16_t)(x + 1) : x);
            check_narrow(format, nextafterf(middle, 0), x);
            check_narrow(format, nextafterf(middle, copysignf(INFINITY, middle)), (uint16_t)(x + 1));
        }
        check_narrow(format, FLT_MAX, infinity);
        check_narrow(format, -FLT_MAX, infinity | 0x8000);
        check_narrow(format, INFINITY, infinity);
    }
}

static void half_rows(void) {
    for (int format = 0; format < 2; format++)
        for (int n = 0; n < 70; n++) {
            CASE("%s rows of %d", formats[format].name, n);
            uint16_t *x = take(n, sizeof *x);
            for (int i = 0; i < n; i++)
                x[i] = (uint16_t)(random_bits() & 0xbfff); /* no Inf, no NaN */
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                float *wide = take(n, sizeof *wide);
                uint16_t *back = take(n, sizeof *back);
                half_of(isa, format)->widen(n, x, wide);
                half_of(isa, format)->narrow(n, wide, back);
                for (int i = 0; i < n; i++)
                    CHECK((double)wide[i] == half_value(formats[format], x[i]) && back[i] == x[i], "%s [%d]: %s",
                          isas[isa].name, i, context);
            }
            check_fence();
        }
}

/* A number of bfloat16, at random. */
static uint16_t random_bf16(void) {
    const float x = (float)uniform(-1, 1);
    uint16_t half;
    cmb_half_base_bf16.narrow(1, &x, &half);
    return half;
}

static uint16_t *half_row(int n) {
    uint16_t *x = take(n, sizeof *x);
    for (int i = 0; i < n; i++)
        x[i] = random_bf16();
    return x;
}

/* Rows of pairs. */
static uint16_t **pair_rows_of(int n, int pairs) {
    uint16_t **row = take(n, sizeof *row);
    for (int i = 0; i < n; i++) {
        row[i] = take(pairs, 2 * sizeof **row);
        for (int t = 0; t < 2 * pairs; t++)
            row[i][t] = random_bf16();
    }
    return row;
}

static void check_pair_product(const cmb_half *half, int m, int n, int k, int step, bool add) {
    CASE("pairs: product m %d n %d k %d step %d add %d", m, n, k, step, add);
    uint16_t **a = pair_rows_of(m, (k - 1) * step + 1), **b = pair_rows_of(k, n);
    float **c = rows_f32(m, n);
    double *before = take(m * n, sizeof *before);
    for (int i = 0; i < m * n; i++)
        before[i] = add ? (double)c[i / n][i % n] : 0;
    half->product(m, n, k, a, step, b, c, 0, add);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double sum = before[i * n + j], size = fabs(sum);
            for (int t = 0; t < 2 * k; t++) {
                const double term = half_value(formats[0], a[i][t / 2 * step * 2 + t % 2]) *
                                    half_value(formats[0], b[t / 2][2 * j + t % 2]);
                sum += term;
                size += fabs(term);
            }
            /* 2 k roundings of partial sums, of products too where they are not fused */
            CHECK(fabs((double)c[i][j] - sum) <= (4 * k + 1) * (double)FLT_EPSILON * size, "[%d][%d] %g, not %g: %s", i,
                  j, (double)c[i][j], sum, context);
        }
    check_fence();
}

static void pairs(void) {
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        const cmb_half *half = isas[isa].bf16;
        CHECK(!isas[isa].f16->product);
        if (!half->product)
            continue;
        for (int m = 1; m < 14; m++)
            for (int n = 1; n < 70; n += 1 + random_below(9))
                check_pair_product(half, m, n, 1 + random_below(40), 1 + random_below(2) * 15, random_below(2));
        for (int n = 1; n < 70; n++) {
            CASE("pairs of %d", n);
            uint16_t *x = half_row(n), *y = half_row(n);
            float *wide = take(2 * n, sizeof *wide);
            uint32_t *stored = take(n, 4), *rounded = take(n, 4), *alone = take(n, 4);
            half->widen(n, x, wide);
            half->widen(n, y, wide + n);
            for (int i = 0; i < 2 * n; i++) /* to be rounded back */
                wide[i] *= 1 + (float)uniform(-0x1p-9, 0x1p-9);
            half->interleave(n, x, y, stored);
            half->interleave(n, x, NULL, alone);
            half->pair(n, wide, wide + n, rounded);
            for (int i = 0; i < n; i++) {
                uint16_t low, high;
                half->narrow(1, wide + i, &low);
                half->narrow(1, wide + n + i, &high);
                CHECK(stored[i] == (x[i] | (uint32_t)y[i] << 16) && alone[i] == x[i], "[%d]: %s", i, context);
                CHECK(rounded[i] == (low | (uint32_t)high << 16), "[%d] %08x: %s", i, rounded[i], context);
            }
            half->pair(n, wide, NULL, rounded);
            for (int i = 0; i < n; i++)
                CHECK(rounded[i] >> 16 == 0, "[%d]: %s", i, context);
            uint16_t *narrow = take(n, 2), *round = take(n, 2);
            half->narrow(n, wide, narrow);
            half->round(n, wide, round);
            for (int i = 0; i < n; i++)
                CHECK(round[i] == narrow[i], "[%d] %04x: %s", i, round[i], context);
            check_fence();
        }
        for (int width = 16; width <= 64; width += 16)
            for (int n = 1; n <= width; n += 1 + random_below(5)) {
                const int dim = 1 + random_below(40);
                CASE("pairs: pack %d rows of %d to width %d", n, dim, width);
                uint16_t **row = pair_rows_of(n, dim);
                uint32_t *packed = take(dim * width, 4), want;
                half->pack(n, row, dim, width, packed);
                for (int d = 0; d < dim; d++)
                    for (int lane = 0; lane < width; lane++) {
                        want = lane < n ? row[lane][2 * d] | (uint32_t)row[lane][2 * d + 1] << 16 : 0;
                        CHECK(packed[d * width + lane] == want, "[%d][%d]: %s", d, lane, context);
                    }
                check_fence();
            }
    }
}

/* ---- timing ------------------------------------------------------------------------------------- */

/* What no kernel can pass: twelve sums, each multiply-add waiting only for its own last. The factor is not to be known
 * to the compiler: it folds a sum that stays the same. */
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
        if (strncmp(isa, "avx512", 6) == 0) {
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

/* The 16-bit rows of a tile of 64 queries, 96 rows and 64 features, and where there are any its products of pairs. */
static void bench_half(const cmb_half *half, const char *format) {
    enum { ROWS = 96, DIM = 64, PAIRS = ROWS * DIM / 2 };
    static uint16_t stored[ROWS * DIM];
    static float wide[ROWS * DIM], pairs[PAIRS], weights[ROWS / 2 * 64], s[ROWS * 64], out[64 * DIM];
    static const float *row[ROWS], *packed_row[DIM / 2], *pair_row[ROWS / 2], *lane[64];
    static float *s_row[ROWS], *out_row[64];
    for (int i = 0; i < ROWS * DIM; i++)
        stored[i] = random_bf16();
    MEASURE(ROWS * DIM, "G/s", half->widen(ROWS * DIM, stored, wide), "%s: widen %d", format, ROWS * DIM);
    MEASURE(ROWS * DIM, "G/s", half->narrow(ROWS * DIM, wide, stored), "%s: narrow %d", format, ROWS * DIM);
    if (!half->product)
        return;
    MEASURE(PAIRS, "G/s", half->interleave(PAIRS, stored, stored + PAIRS, pairs), "%s: interleave %d", format, PAIRS);
    MEASURE(ROWS * DIM, "G/s", half->round(ROWS * DIM, wide, stored), "%s: round %d", format, ROWS * DIM);
    MEASURE(PAIRS, "G/s", half->pair(PAIRS, wide, wide + PAIRS, pairs), "%s: pair %d", format, PAIRS);
    half->pair(ROWS / 2 * 64, wide, wide, weights);
    for (int i = 0; i < ROWS; i++) {
        row[i] = pairs + i * DIM / 2;
        s_row[i] = s + i * 64;
    }
    for (int i = 0; i < ROWS / 2; i++)
        pair_row[i] = pairs + i * DIM;
    for (int i = 0; i < DIM / 2; i++)
        packed_row[i] = weights + i * 64;
    for (int i = 0; i < 64; i++) {
        lane[i] = weights + i;
        out_row[i] = out + i * DIM;
    }
    const double flops = 2.0 * ROWS * 64 * DIM;
    MEASURE(flops, "GFLOP/s", half->product(ROWS, 64, DIM / 2, row, 1, packed_row, s_row, 0, false),
            "%s pairs: S = K Q^T   %d x %d x %d", format, ROWS, 64, DIM);
    MEASURE(flops, "GFLOP/s", half->product(64, DIM, ROWS / 2, lane, 64, pair_row, out_row, 0, false),
            "%s pairs: O = P^T V   %d x %d x %d", format, 64, DIM, ROWS);
}

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
    const struct sigaction fault = {.sa_handler = on_fault};
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
    sigaction(SIGSEGV, &fault, NULL);
    sigaction(SIGBUS, &fault, NULL);
#define BOTH(function) TEST(function##_f32), TEST(function##_f64)
    static const test_case tests[] = {
        BOTH(gather),
        BOTH(pack),
        BOTH(product),
        BOTH(dot),
        BOTH(softmax),
        BOTH(softmax_backward),
        BOTH(softmax_not_finite),
        BOTH(row_softmax),
        BOTH(row_softmax_backward),
        BOTH(dropout),
        BOTH(scale_and_divide),
        BOTH(finite),
        BOTH(max_pool),
        BOTH(max_pool_rules),
        BOTH(max_pool_backward),
        BOTH(argmax),
        BOTH(exp2_edges),
        TEST(half_numbers),
        TEST(half_rows),
        TEST(pairs),
        TEST(exp2_of_floats),
        TEST(exp2_of_doubles),
    };
    return test_main(kept, argv, tests, sizeof tests / sizeof *tests);
}

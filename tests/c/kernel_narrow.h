// SPDX-License-Identifier: Apache-2.0
/* For test_kernels.c: the 16-bit formats, and products of pairs. It takes rows of floats from
 * test_kernels.inc.h, which is included before. */
#ifndef CMB_KERNEL_NARROW_H
#define CMB_KERNEL_NARROW_H

#include "kernel_bench.h"

#include <float.h>
#include <math.h>

typedef struct {
    const char *name;
    int mantissa, bias; /* bits of the fraction, bias of the exponent */
} half_format;
static const half_format formats[] = {{"bf16", 7, 127}, {"f16", 10, 15}};

static const cmb_narrow_format *half_of(int isa, int format) { return format ? isas[isa].f16 : isas[isa].bf16; }

/* The value of a finite number. */
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

/* Every number of the format, and the floats at and beside the middle between two of them. */
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
            /* Inf begins at the middle between the last number and the one that would follow it */
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

/* The largest of each column of stored rows, alone or with what was there, and where its gradient goes: to the first
 * row that holds it. */
static void half_maxima(void) {
    for (int format = 0; format < 2; format++)
        for (int64_t dim = 1; dim <= 70; dim += 1 + random_below(3))
            for (int n = 1; n <= 20; n += 1 + random_below(6)) {
                CASE("%s: the largest of %d rows of %lld", formats[format].name, n, (long long)dim);
                const bool all_finite = random_below(2);
                uint16_t **row = take(n, sizeof *row);
                float **wide = take(n, sizeof *wide), **before = take(n, sizeof *before);
                float **grad_row = take(n, sizeof *grad_row);
                float *want = take(dim, sizeof *want), *grad = uniforms_f32(dim, -1, 1), *top = take(dim, sizeof *top);
                for (int i = 0; i < n; i++) {
                    row[i] = take(dim, sizeof **row);
                    wide[i] = take(dim, sizeof **wide);
                    before[i] = uniforms_f32(dim, -1, 1);
                    grad_row[i] = take(dim, sizeof **grad_row);
                    for (int64_t d = 0; d < dim; d++) /* few numbers, so that some are equal; or any bits, NaN too */
                        row[i][d] = (uint16_t)(all_finite || random_below(20) ? random_bits() & 0x8300 : random_bits());
                    half_of(0, format)->widen(dim, row[i], wide[i]);
                    for (int64_t d = 0; d < dim; d++)
                        want[d] = i ? greater_f32(wide[i][d], want[d]) : wide[0][d];
                }
                for (int isa = 0; isa < cmb_isa_count(); isa++) {
                    const cmb_narrow_format *half = half_of(isa, format);
                    half->max_pool(1, (const uint16_t *const *)row, dim, top, false);
                    half->max_pool(n - 1, (const uint16_t *const *)row + 1, dim, top, true);
                    for (int again = 0; again < 2; again++) {
                        for (int64_t d = 0; d < dim; d++)
                            CHECK(same_f32(top[d], want[d]) || (isnan(top[d]) && isnan(want[d])), "%s [%lld]: %s",
                                  isas[isa].name, (long long)d, context);
                        half->max_pool(n, (const uint16_t *const *)row, dim, top, false);
                    }
                    for (int i = 0; i < n; i++)
                        memcpy(grad_row[i], before[i], (size_t)dim * sizeof **grad_row);
                    half->max_pool_backward(n, (const uint16_t *const *)row, dim, top, grad, grad_row);
                    for (int64_t d = 0; d < dim; d++) {
                        bool given = false;
                        for (int i = 0; i < n; i++) {
                            const bool hit = !given && (wide[i][d] == want[d] || (isnan(wide[i][d]) && isnan(want[d])));
                            CHECK(grad_row[i][d] == (hit ? before[i][d] + grad[d] : before[i][d]),
                                  "%s row %d [%lld]: %s", isas[isa].name, i, (long long)d, context);
                            given |= hit;
                        }
                    }
                }
                check_fence();
            }
}

/* A random number of bfloat16. */
static uint16_t random_bf16(void) {
    const float x = (float)uniform(-1, 1);
    uint16_t half;
    cmb_narrow_base_bf16.narrow(1, &x, &half);
    return half;
}

static uint16_t *half_row(int n) {
    uint16_t *x = take(n, sizeof *x);
    for (int i = 0; i < n; i++)
        x[i] = random_bf16();
    return x;
}

/* n pairs, aligned as words. */
static uint16_t *random_words(int n) {
    uint16_t *x = take(n, 2 * sizeof *x);
    for (int i = 0; i < 2 * n; i++)
        x[i] = random_bf16();
    return x;
}

/* How rows lie in memory: each alone; one behind the other, in this or the opposite order; a word apart. */
typedef enum { APART, IN_ORDER, REVERSED, NEIGHBOURS, LAYOUTS } row_layout;

/* Rows of pairs. */
static uint16_t **pair_rows_of(int n, int pairs, row_layout layout) {
    uint16_t **row = take(n, sizeof *row);
    const int words = layout == NEIGHBOURS ? pairs + n - 1 : n * pairs;
    uint16_t *block = layout == APART ? NULL : random_words(words);
    for (int i = 0; i < n; i++)
        row[i] = layout == APART      ? random_words(pairs)
                 : layout == IN_ORDER ? block + 2 * i * pairs
                 : layout == REVERSED ? block + 2 * (n - 1 - i) * pairs
                                      : block + 2 * i;
    return row;
}

/* Sums, side by side or apart. */
static float **sums_of(int n, int columns, bool apart) {
    float **row = rows_f32(n, columns);
    float *block = apart ? NULL : take(n * columns, sizeof *block);
    for (int i = 0; i < n && !apart; i++) {
        memcpy(block + i * columns, row[i], (size_t)columns * sizeof *block);
        row[i] = block + i * columns;
    }
    return row;
}

static void begin_gemm(const cmb_narrow_format *half) {
    if (half->begin)
        half->begin();
}

static void end_gemm(const cmb_narrow_format *half) {
    if (half->end)
        half->end();
}

static void check_pair_gemm(const cmb_narrow_format *half, int m, int n, int k, int step, bool add, int first) {
    const row_layout of_a = step > 1 ? (row_layout)(random_below(2) * NEIGHBOURS) : (row_layout)random_below(LAYOUTS);
    const row_layout of_b = (row_layout)random_below(NEIGHBOURS);
    const int column = 5 * random_below(2);
    CASE("pairs: gemm m %d n %d k %d step %d add %d first %d column %d layouts %d %d", m, n, k, step, add, first,
         column, of_a, of_b);
    uint16_t **a = pair_rows_of(m, (k - 1) * step + 1, of_a), **b = pair_rows_of(k, column + n, of_b);
    float **c = sums_of(m, column + n, random_below(2));
    double *before = take(m * n, sizeof *before);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++)
            before[i * n + j] = add ? (double)c[i][column + j] : 0;
    begin_gemm(half);
    half->gemm(m, n, k, a, step, b, c, column, add, first);
    end_gemm(half);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double sum = before[i * n + j], size = fabs(sum);
            for (int t = 0; t < 2 * k; t++) {
                const double term = half_value(formats[0], a[i][t / 2 * step * 2 + t % 2]) *
                                    half_value(formats[0], b[t / 2][2 * (column + j) + t % 2]);
                sum += term;
                size += fabs(term);
            }
            /* 2 k roundings of partial sums, and of products where they are not fused */
            CHECK(fabs((double)c[i][column + j] - sum) <= (4 * k + 1) * (double)FLT_EPSILON * size,
                  "[%d][%d] %g, not %g: %s", i, j, (double)c[i][column + j], sum, context);
        }
    check_fence();
}

/* Words that are left out of a sum, which are zeros, and rows and columns that are computed alone change no bit. */
static void check_pair_bits(const cmb_narrow_format *half, int m, int n, int k, int first) {
    CASE("pairs: bits of m %d n %d k %d first %d", m, n, k, first);
    uint16_t **a = pair_rows_of(m, first + k, (row_layout)random_below(NEIGHBOURS));
    uint16_t **b = pair_rows_of(first + k, n, (row_layout)random_below(NEIGHBOURS));
    float **whole = sums_of(m, n, random_below(2)), **part = rows_f32(m, n);
    const uint16_t **rest = take(m, sizeof *rest);
    for (int i = 0; i < m; i++) {
        memset(a[i], 0, (size_t)first * 4);
        rest[i] = a[i] + 2 * first;
    }
    begin_gemm(half);
    half->gemm(m, n, first + k, a, 1, b, whole, 0, false, 0);
    const int cut = random_below(n);
    for (int i = 0; i < m; i++) {
        half->gemm(1, cut, k, rest + i, 1, b + first, part + i, 0, false, first);
        half->gemm(1, n - cut, k, rest + i, 1, b + first, part + i, cut, false, first);
    }
    end_gemm(half);
    for (int i = 0; i < m; i++)
        CHECK(memcmp(whole[i], part[i], (size_t)n * sizeof **whole) == 0, "[%d]: %s", i, context);
    check_fence();
}

static void pairs(void) {
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        const cmb_narrow_format *half = isas[isa].bf16;
        CHECK(!isas[isa].f16->gemm);
        if (!half->gemm)
            continue;
        for (int m = 1; m < 36; m++)
            for (int n = 1; n < 70; n += 1 + random_below(9))
                check_pair_gemm(half, m, n, 1 + random_below(40), 1 + random_below(2) * 15, random_below(2),
                                random_below(40));
        for (int trial = 0; trial < 100; trial++)
            check_pair_bits(half, 1 + random_below(40), 1 + random_below(70), 1 + random_below(40), random_below(40));
        for (int n = 1; n < 70; n++) {
            CASE("pairs of %d", n);
            uint16_t *x = half_row(n), *y = half_row(n);
            float *wide = take(2 * n, sizeof *wide);
            uint32_t *stored = take(n, 4), *rounded = take(n, 4), *alone = take(n, 4);
            half->widen(n, x, wide);
            half->widen(n, y, wide + n);
            for (int i = 0; i < 2 * n; i++) /* which rounds back to the number */
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
                uint16_t **row = pair_rows_of(n, dim, APART);
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

/* The conversions of a tile of 64 queries, 96 rows and 64 features, and its products of pairs if the table has them. */
static void bench_half(const cmb_narrow_format *half, const char *format) {
    enum { ROWS = 96, DIM = 64, PAIRS = ROWS * DIM / 2 };
    static uint16_t stored[ROWS * DIM];
    static float wide[ROWS * DIM], pairs[PAIRS], weights[ROWS / 2 * 64], s[ROWS * 64], out[64 * DIM];
    static const float *row[ROWS], *packed_row[DIM / 2], *pair_row[ROWS / 2], *lane[64];
    static float *s_row[ROWS], *out_row[64];
    for (int i = 0; i < ROWS * DIM; i++)
        stored[i] = random_bf16();
    MEASURE(ROWS * DIM, "G/s", half->widen(ROWS * DIM, stored, wide), "%s: widen %d", format, ROWS * DIM);
    MEASURE(ROWS * DIM, "G/s", half->narrow(ROWS * DIM, wide, stored), "%s: narrow %d", format, ROWS * DIM);
    static const uint16_t *stored_row[ROWS];
    for (int i = 0; i < ROWS; i++)
        stored_row[i] = stored + i * DIM;
    MEASURE(ROWS * DIM, "G/s", half->max_pool(ROWS, stored_row, DIM, out, false), "%s: max_pool %d x %d", format, ROWS,
            DIM);
    if (!half->gemm)
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
    const double flops = 2 * ROWS * 64 * DIM;
    begin_gemm(half);
    MEASURE(flops, "GFLOP/s", half->gemm(ROWS, 64, DIM / 2, row, 1, packed_row, s_row, 0, false, 0),
            "%s pairs: S = K Q^T   %d x %d x %d", format, ROWS, 64, DIM);
    MEASURE(flops, "GFLOP/s", half->gemm(64, DIM, ROWS / 2, lane, 64, pair_row, out_row, 0, false, 0),
            "%s pairs: O = P^T V   %d x %d x %d", format, 64, DIM, ROWS);
    end_gemm(half);
}

#endif

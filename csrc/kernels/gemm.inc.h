// SPDX-License-Identifier: Apache-2.0
/*
 * The kernel gemm (kernels.h). Elements are numbers, or words of two 16-bit numbers. Parameters:
 *   P(name)                  name of a function of this file
 *   FACTOR(p)                the element at p, in every lane
 *   MULTIPLY_ADD(a, b, c)    a * b + c; for words, the sum of both products and c
 * and those of bodies.inc.h.
 *
 * The micro-kernel holds a block of c in registers, mr rows by nr vectors:
 *
 *              b[t]:   v0     v1     v2     v3         nr vectors of one row of b
 *     a[0][t]        sum00  sum01  sum02  sum03        step t: every sum[i][j] += a[i][t] * v[j]
 *       ..             ..
 *     a[5][t]        sum50  sum51  sum52  sum53        mr rows
 *
 * More rows would need more registers than there are. With fewer, a step would wait for the multiply-adds of the one
 * before: a single row takes twice as many vectors, of which it reads a row of b whole.
 */

/* One block. Of the last vector only `part` elements exist, if part > 0. */
INLINE void P(micro)(int mr, int nr, int64_t k, const REAL *const *a, int64_t a_step, const REAL *const *b,
                     REAL *const *c, int64_t column, int part, bool add) {
    vec sum[12][8];
    const REAL *x[12];
    UNROLL
    for (int i = 0; i < mr; i++) {
        x[i] = a[i];
        UNROLL
        for (int j = 0; j < nr; j++)
            sum[i][j] = (vec){0};
    }
    int64_t at = 0;
    TWICE
    for (int64_t t = 0; t < k; t++, at += a_step) {
        const REAL *y = b[t] + column;
        vec v[8];
        UNROLL
        for (int j = 0; j < nr; j++)
            v[j] = part && j == nr - 1 ? load_part(y + j * LANES, part) : load(y + j * LANES);
        UNROLL
        for (int i = 0; i < mr; i++) {
            vec s = FACTOR(x[i] + at);
            UNROLL
            for (int j = 0; j < nr; j++)
                sum[i][j] = MULTIPLY_ADD(s, v[j], sum[i][j]);
        }
    }
    UNROLL
    for (int i = 0; i < mr; i++) {
        REAL *z = c[i] + column;
        UNROLL
        for (int j = 0; j < nr; j++) {
            REAL *to = z + j * LANES;
            if (part && j == nr - 1)
                store_part(to, add ? load_part(to, part) + sum[i][j] : sum[i][j], part);
            else
                store(to, add ? load(to) + sum[i][j] : sum[i][j]);
        }
    }
}

typedef void P(micro_kernel)(int64_t k, const REAL *const *a, int64_t a_step, const REAL *const *b, REAL *const *c,
                             int64_t column, int part, bool add);

/* Two functions for each shape: with whole vectors only, and with `part` elements in the last vector. */
#define MICRO(mr, nr)                                                                                              \
    NOINLINE void P(micro_##mr##x##nr)(int64_t k, const REAL *const *a, int64_t a_step, const REAL *const *b,      \
                                       REAL *const *c, int64_t column, int part, bool add) {                       \
        (void)part;                                                                                                \
        P(micro)(mr, nr, k, a, a_step, b, c, column, 0, add);                                                      \
    }                                                                                                              \
    NOINLINE void P(micro_part_##mr##x##nr)(int64_t k, const REAL *const *a, int64_t a_step, const REAL *const *b, \
                                            REAL *const *c, int64_t column, int part, bool add) {                  \
        P(micro)(mr, nr, k, a, a_step, b, c, column, part, add);                                                   \
    }
/* clang-format off */
MICRO(12, 1) MICRO(8, 1) MICRO(6, 1) MICRO(4, 1) MICRO(2, 1) MICRO(1, 1)
MICRO(6, 2) MICRO(4, 2) MICRO(2, 2) MICRO(1, 2) MICRO(1, 8)
#if REGISTERS >= 24
MICRO(12, 2) MICRO(8, 2)
MICRO(8, 3) MICRO(6, 3) MICRO(4, 3) MICRO(2, 3) MICRO(1, 3)
MICRO(6, 4) MICRO(4, 4) MICRO(2, 4) MICRO(1, 4)
enum { P(widest) = 4 };
#else
enum { P(widest) = 2 };
#endif
#undef MICRO

/* For each width nr the heights mr, highest first: as many accumulators as the registers hold. */
typedef struct {
    int height;
    P(micro_kernel) *whole, *part;
} P(step);
#define STEP(mr, nr) {mr, P(micro_##mr##x##nr), P(micro_part_##mr##x##nr)}
static const P(step) P(steps)[4][6] = {
    {STEP(12, 1), STEP(8, 1), STEP(6, 1), STEP(4, 1), STEP(2, 1), STEP(1, 1)},
#if REGISTERS >= 24
    {STEP(12, 2), STEP(8, 2), STEP(6, 2), STEP(4, 2), STEP(2, 2), STEP(1, 2)},
    {STEP(8, 3), STEP(6, 3), STEP(4, 3), STEP(2, 3), STEP(1, 3)},
    {STEP(6, 4), STEP(4, 4), STEP(2, 4), STEP(1, 4)},
#else
    {STEP(6, 2), STEP(4, 2), STEP(2, 2), STEP(1, 2)},
#endif
};
enum { P(long_row) = 8 }; /* vectors of a single row */
static const P(step) P(row_step) = STEP(1, 8);
#undef STEP
/* clang-format on */

/* The loop over columns is the outer one: k rows of a block of columns of b stay in the first-level cache while all
 * rows of a use them. */
static void P(gemm)(int64_t m, int64_t n, int64_t k, const REAL *const *a, int64_t a_step, const REAL *const *b,
                    REAL *const *c, int64_t column, bool add) {
    CMB_ASSERT(m >= 0 && n >= 0 && k >= 0 && a_step >= 0 && column >= 0);
    for (int64_t end = column + n; column < end;) {
        const int64_t vectors = (end - column + LANES - 1) / LANES;
        const bool is_row = m == 1 && vectors >= P(long_row);
        const int nr = is_row ? P(long_row) : vectors < P(widest) ? (int)vectors : P(widest);
        const int part = end - column < nr * LANES ? (int)(end - column) % LANES : 0;
        const P(step) *step = is_row ? &P(row_step) : P(steps)[nr - 1];
        for (int64_t i = 0; i < m; i += step->height) {
            while (step->height > m - i)
                step++;
            (part ? step->part : step->whole)(k, a + i, a_step, b, c + i, column, part, add);
        }
        column += nr * LANES;
    }
}

#undef P
#undef FACTOR
#undef MULTIPLY_ADD

// SPDX-License-Identifier: Apache-2.0
/*
 * The product of kernels.h, for elements that need not be numbers. Parameters, beside those of kernels.inc.h:
 *   P(name)              the names of what is defined here
 *   FACTOR(p)            the element at p, in every lane
 *   MULTIPLY_ADD(a, b, c)  c and the product of each pair of elements
 */

/* mr rows of a against nr vectors of b's columns; of the last vector only `part` elements, if part > 0. */
INLINE void P(micro)(int mr, int nr, int64_t k, const REAL *const *a, int64_t a_step, const REAL *const *b,
                     REAL *const *c, int64_t column, int part, bool add) {
    vec sum[12][4];
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
        vec v[4];
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

/* With whole vectors alone, and with a last one of `part` elements. */
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
MICRO(6, 2) MICRO(4, 2) MICRO(2, 2) MICRO(1, 2)
#if REGISTERS >= 24
MICRO(12, 2) MICRO(8, 2)
MICRO(8, 3) MICRO(6, 3) MICRO(4, 3) MICRO(2, 3) MICRO(1, 3)
MICRO(6, 4) MICRO(4, 4) MICRO(2, 4) MICRO(1, 4)
enum { P(widest) = 4 };
#else
enum { P(widest) = 2 };
#endif
#undef MICRO

/* Heights for each width, highest first: as many accumulators as the registers hold. */
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
#undef STEP
/* clang-format on */

/* Columns outside, so that k rows of b's columns stay in L1 while the rows of a pass. */
static void P(product)(int64_t m, int64_t n, int64_t k, const REAL *const *a, int64_t a_step, const REAL *const *b,
                       REAL *const *c, int64_t column, bool add) {
    for (int64_t end = column + n; column < end;) {
        const int64_t vectors = (end - column + LANES - 1) / LANES;
        const int nr = vectors < P(widest) ? (int)vectors : P(widest);
        const int part = end - column < nr * LANES ? (int)(end - column) % LANES : 0;
        const P(step) *step = P(steps)[nr - 1];
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

// SPDX-License-Identifier: Apache-2.0
/*
 * Pairs of bfloat16 (kernels.h), for an instruction set that multiplies them. Parameters beside those of bodies.inc.h:
 *   DOT_PAIRS(a, b, c)    in each float: a.lo * b.lo + a.hi * b.hi + c
 *   ROUND(x, y)           two vectors of floats as one of bfloat16, x's numbers first
 *   ROUND_PAIRS(x, y)     the same as pairs (x[i], y[i])
 *   MATRIX                defined: the set has matrix registers, whose gemm matrix.inc.h is; else DOT_PAIRS makes it
 * A pair lies where a float would. It is never computed with as a float.
 */
typedef uint32_t pair_bits __attribute__((may_alias));

#ifdef MATRIX
#include "kernels/matrix.inc.h"
#define PAIR_GEMM .gemm = matrix_gemm, .begin = matrix_begin, .end = matrix_end, .group = SIDE
#else
INLINE vec pair_factor(const float *p) { return (vec)((words){0} + *(const pair_bits *)p); }

#define P(name) pair_##name
#define FACTOR pair_factor
#define MULTIPLY_ADD DOT_PAIRS
#include "kernels/gemm.inc.h"

static void pair_gemm_rows(int64_t m, int64_t n, int64_t k, const void *a, int64_t a_step, const void *b, const void *c,
                           int64_t column, bool add, int64_t first) {
    (void)first;
    pair_gemm(m, n, k, a, a_step, b, c, column, add);
}
#define PAIR_GEMM .gemm = pair_gemm_rows, .group = 1
#endif

static void pair_pack(int n, const void *row, int64_t dim, int width, void *packed) {
    K(pack_rows)(n, row, dim, false, 1, width, packed);
}

static void pair_interleave(int64_t n, const void *first, const void *second, void *to) {
    const uint16_t *x = first, *y = second;
    float *pairs = to;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const words low = words_of(*(const unaligned_halves *)(x + i));
        const words high = y ? words_of(*(const unaligned_halves *)(y + i)) : (words){0};
        store(pairs + i, (vec)(low | high << 16));
    }
    for (; i < n; i++)
        *(pair_bits *)(pairs + i) = x[i] | (y ? (uint32_t)y[i] << 16 : 0);
}

typedef words words_of_halves __attribute__((aligned(2), may_alias));

static void pair_round(int64_t n, const float *x, uint16_t *y) {
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        *(words_of_halves *)(y + i) = (words)ROUND(load(x + i), load(x + i + LANES));
    if (i < n) {
        float rest[2 * LANES] = {0};
        memcpy(rest, x + i, (size_t)(n - i) * sizeof *x);
        const vec last = (vec)ROUND(load(rest), load(rest + LANES));
        memcpy(y + i, &last, (size_t)(n - i) * sizeof *y);
    }
}

static void pair_narrow(int64_t n, const void *first, const void *second, void *to) {
    const float *x = first, *y = second;
    float *pairs = to;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(pairs + i, (vec)ROUND_PAIRS(load(x + i), y ? load(y + i) : (vec){0}));
    if (i < n) {
        const int rest = (int)(n - i);
        store_part(pairs + i, (vec)ROUND_PAIRS(load_part(x + i, rest), y ? load_part(y + i, rest) : (vec){0}), rest);
    }
}

// SPDX-License-Identifier: Apache-2.0
/*
 * The one body of each kernel (kernels.h says what it computes), compiled for each type of each instruction set.
 * Parameters:
 *   REAL, SUFFIX, FLOAT_BITS     float, f32, 32 or double, f64, 64
 *   ISA, TARGET_.., VECTOR_BYTES avx2, TARGET_AVX2, 32 and so on, from the file of the instruction set (isa.inc.h)
 *   REGISTERS                    accumulators that the micro-kernel may hold: the vector registers less those for a row
 *                                of b and an element of a
 */
#include "runtime/status.h"

#include <math.h>
#include <string.h>

#define PASTE3(a, b, c) a##b##_##c
#define NAME3(a, b, c) PASTE3(a, b, c)
#define PASTE2(a, b) a##_##b
#define NAME2(a, b) PASTE2(a, b)
#define vec NAME2(vec, SUFFIX)
#define unaligned_vec NAME2(unaligned_vec, SUFFIX)
#define bits NAME2(bits, SUFFIX)
#define lane_bit NAME2(lane_bit, SUFFIX)
#define load NAME2(load, SUFFIX)
#define store NAME2(store, SUFFIX)
#define broadcast NAME2(broadcast, SUFFIX)
#define rounded NAME2(rounded, SUFFIX)
#define if_nonzero NAME2(if_nonzero, SUFFIX)
#define any NAME2(any, SUFFIX)
#define fma_vec NAME2(fma_vec, SUFFIX)
#define maximum NAME2(maximum, SUFFIX)
#define select_lanes NAME2(select_lanes, SUFFIX)
#define load_part NAME2(load_part, SUFFIX)
#define store_part NAME2(store_part, SUFFIX)
#define interleave_low NAME2(interleave_low, SUFFIX)
#define interleave_high NAME2(interleave_high, SUFFIX)
#define longs NAME2(longs, SUFFIX)
#define unaligned_longs NAME2(unaligned_longs, SUFFIX)
#define product_of_low NAME2(product_of_low, SUFFIX)
#define K(name) NAME2(name, SUFFIX)

#include "kernels/vec.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define TWICE _Pragma("clang loop unroll_count(2)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#define TWICE _Pragma("GCC unroll 2")
#endif
/* For the micro-kernel: inlined into its caller it spills its accumulators, and takes 5 times as long. */
#define NOINLINE static __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))

#define LOWEST (FLOAT_BITS == 32 ? (REAL)-3.40282346638528859812e+38 : (REAL)-1.79769313486231570815e+308)

#include "kernels/functions.inc.h"

/* ---- packing ------------------------------------------------------------------------------------ */

#if VECTOR_BYTES == 32 && FLOAT_BITS == 32
/* Transposes 8 x 8 elements in place. Shuffles within the halves of a vector are cheap: they transpose blocks of 4 x 4,
 * and the last step exchanges blocks. */
INLINE void K(transpose)(vec x[LANES]) {
    vec y[LANES], z[LANES];
    UNROLL
    for (int i = 0; i < LANES; i += 2) {
        y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    UNROLL
    for (int i = 0; i < LANES; i += 4)
        UNROLL
    for (int k = 0; k < 2; k++) {
        z[i + 2 * k] = __builtin_shufflevector(y[i + k], y[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        z[i + 2 * k + 1] = __builtin_shufflevector(y[i + k], y[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        x[i] = __builtin_shufflevector(z[i], z[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        x[i + 4] = __builtin_shufflevector(z[i], z[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
#else
/* Transposes LANES x LANES elements in place, by log2(LANES) perfect shuffles: each rotates the bits of the index (row,
 * column) by one. */
INLINE void K(transpose)(vec x[LANES]) {
    UNROLL
    for (int round = 1; round < LANES; round *= 2) {
        vec y[LANES];
        UNROLL
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = interleave_low(x[i], x[i + LANES / 2]);
            y[2 * i + 1] = interleave_high(x[i], x[i + LANES / 2]);
        }
        UNROLL
        for (int i = 0; i < LANES; i++)
            x[i] = y[i];
    }
}
#endif

/* `scaled` is a constant: false for words that hold pairs, which must not be multiplied as floats. */
INLINE void K(pack_rows)(int n, const REAL *const *row, int64_t dim, bool scaled, REAL scale, int width, REAL *packed) {
    CMB_ASSERT(0 <= n && n <= width && width % CMB_GROUP == 0);
    const vec factor = broadcast(scale);
    for (int lane = 0; lane < width; lane += LANES) {
        int64_t d = 0;
        for (; d + LANES <= dim; d += LANES) {
            vec x[LANES];
            UNROLL
            for (int i = 0; i < LANES; i++) {
                x[i] = lane + i < n ? load(row[lane + i] + d) : (vec){0};
                x[i] = scaled ? x[i] * factor : x[i];
            }
            K(transpose)(x);
            UNROLL
            for (int i = 0; i < LANES; i++)
                store(packed + (d + i) * width + lane, x[i]);
        }
        if (d < dim) {
            int rest = (int)(dim - d);
            vec x[LANES];
            UNROLL
            for (int i = 0; i < LANES; i++) {
                x[i] = lane + i < n ? load_part(row[lane + i] + d, rest) : (vec){0};
                x[i] = scaled ? x[i] * factor : x[i];
            }
            K(transpose)(x);
            for (int i = 0; i < rest; i++)
                store(packed + (d + i) * width + lane, x[i]);
        }
    }
}

static void K(pack)(int n, const REAL *const *row, int64_t dim, REAL scale, int width, REAL *packed) {
    K(pack_rows)(n, row, dim, true, scale, width, packed);
}

/* ---- rows that lie apart ------------------------------------------------------------------------- */

static void K(gather)(int n, const REAL **row, int64_t dim, REAL *to) {
    enum { NEAR = 6, LINE = 64 / sizeof(REAL) }; /* the row that is prefetched is NEAR rows after the one copied */
    for (int i = 0; i < n; i++, to += dim) {
        for (int64_t d = 0; i + NEAR < n && d < dim; d += LINE)
            __builtin_prefetch(row[i + NEAR] + d);
        int64_t d = 0;
        for (; d + LANES <= dim; d += LANES)
            store(to + d, load(row[i] + d));
        if (d < dim)
            store_part(to + d, load_part(row[i] + d, (int)(dim - d)), (int)(dim - d));
        row[i] = to;
    }
}

/* ---- gemm --------------------------------------------------------------------------------------- */

INLINE vec K(factor)(const REAL *p) { return broadcast(*p); }

#define P(name) K(name)
#define FACTOR K(factor)
#define MULTIPLY_ADD fma_vec
#include "kernels/gemm.inc.h"

/* ---- one query: vectors along the features ------------------------------------------------------ */

enum { K(parts) = CMB_GROUP / LANES > 0 ? CMB_GROUP / LANES : 1 }; /* vectors that hold 16 partial sums */

/* The total of 16 partial sums, in the same order for every vector length: the upper half is added to the lower half,
 * until one is left. */
INLINE REAL K(sum16)(const vec x[K(parts)]) {
    enum { QUADS = CMB_GROUP * sizeof(REAL) / 16, PER_QUAD = 16 / sizeof(REAL) };
    typedef REAL quad __attribute__((vector_size(16)));
    quad q[QUADS];
    memcpy(q, x, sizeof q);
    UNROLL
    for (int half = QUADS / 2; half > 0; half /= 2)
        UNROLL
    for (int i = 0; i < half; i++)
        q[i] += q[i + half];
    return PER_QUAD == 2 ? q[0][0] + q[0][1] : (q[0][0] + q[0][PER_QUAD / 2]) + (q[0][1] + q[0][PER_QUAD - 1]);
}

static void K(dot)(int64_t n, const REAL *const *row, int64_t dim, const REAL *x, REAL *s) {
    for (int64_t r = 0; r < n; r++) {
        vec sum[K(parts)];
        UNROLL
        for (int i = 0; i < K(parts); i++)
            sum[i] = (vec){0};
        int64_t d = 0;
        for (; d + CMB_GROUP <= dim; d += CMB_GROUP)
            UNROLL
        for (int i = 0; i < K(parts); i++)
            sum[i] = fma_vec(load(row[r] + d + i * LANES), load(x + d + i * LANES), sum[i]);
        for (int i = 0; d < dim; i++, d += LANES) {
            int rest = dim - d < LANES ? (int)(dim - d) : LANES;
            sum[i] = fma_vec(load_part(row[r] + d, rest), load_part(x + d, rest), sum[i]);
        }
        s[r] = K(sum16)(sum);
    }
}

/* s of the first n of `vectors` * LANES rows, some of the last vector's at least. A vector holds one feature of LANES
 * rows, and sums form a chain: of two or more, one's multiply-adds run while another's wait. */
INLINE void K(dot_lanes)(int vectors, int n, const REAL *const *row, int64_t dim, const REAL *x, REAL *s) {
    vec sum[K(parts)];
    UNROLL
    for (int v = 0; v < vectors; v++)
        sum[v] = (vec){0};
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
        vec y[K(parts)][LANES];
        UNROLL
        for (int v = 0; v < vectors; v++) {
            UNROLL
            for (int i = 0; i < LANES; i++)
                y[v][i] = load(row[v * LANES + i] + d);
            K(transpose)(y[v]);
        }
        UNROLL
        for (int i = 0; i < LANES; i++)
            UNROLL
        for (int v = 0; v < vectors; v++)
            sum[v] = fma_vec(y[v][i], broadcast(x[d + i]), sum[v]);
    }
    const int rest = (int)(dim - d);
    UNROLL
    for (int v = 0; v < vectors; v++) {
        vec y[LANES] = {{0}};
        for (int i = 0; rest && i < LANES; i++)
            y[i] = load_part(row[v * LANES + i] + d, rest);
        if (rest)
            K(transpose)(y);
        for (int i = 0; i < rest; i++)
            sum[v] = fma_vec(y[i], broadcast(x[d + i]), sum[v]);
        if (n - v * LANES < LANES)
            store_part(s + v * LANES, sum[v], n - v * LANES);
        else
            store(s + v * LANES, sum[v]);
    }
}

static void K(dot_in_order)(int64_t n, const REAL *const *row, int64_t dim, const REAL *x, REAL *s) {
    enum { ROWS = K(parts) * LANES };
    int64_t r = 0;
    for (; r + ROWS <= n; r += ROWS)
        K(dot_lanes)(K(parts), ROWS, row + r, dim, x, s + r);
    for (; r < n; r += LANES) {
        const int rows = n - r < LANES ? (int)(n - r) : LANES;
        const REAL *at[LANES];
        for (int i = 0; i < LANES; i++)
            at[i] = row[r + (i < rows ? i : 0)];
        K(dot_lanes)(1, rows, at, dim, x, s + r);
    }
}

#include "kernels/softmax.inc.h"

/* ---- dropout ------------------------------------------------------------------------------------ */

/* Philox4x32-10 (Salmon et al., SC 2011): the four words of CMB_GROUP counters that differ in their second word. A word
 * is the lower half of a 64-bit element, and upper halves may hold anything. A vector of words in memory becomes two
 * such vectors, of every other word each. They are computed together, because one alone would wait for its products. */
INLINE void K(philox)(uint32_t first, const uint32_t *second, const cmb_dropout *d, uint32_t word[4][CMB_GROUP]) {
    enum { TOGETHER = 2, EACH = VECTOR_BYTES / 8 };
    const longs zero = {0}, factor0 = zero + 0xD2511F53, factor2 = zero + 0xCD9E8D57;
    for (int at = 0; at < CMB_GROUP; at += TOGETHER * EACH) {
        longs x[4][TOGETHER];
        x[1][0] = *(const unaligned_longs *)(second + at);
        x[1][1] = x[1][0] >> 32;
        for (int n = 0; n < TOGETHER; n++) {
            x[0][n] = zero + first;
            x[2][n] = zero + d->head;
            x[3][n] = zero + d->batch;
        }
        uint32_t key[2] = {(uint32_t)d->seed, (uint32_t)(d->seed >> 32)};
        for (int round = 0; round < 10; round++) {
            UNROLL
            for (int n = 0; n < TOGETHER; n++) {
                const longs a = product_of_low(x[0][n], factor0), b = product_of_low(x[2][n], factor2);
                x[0][n] = b >> 32 ^ x[1][n] ^ (zero + key[0]);
                x[1][n] = b;
                x[2][n] = a >> 32 ^ x[3][n] ^ (zero + key[1]);
                x[3][n] = a;
            }
            key[0] += 0x9E3779B9;
            key[1] += 0xBB67AE85;
        }
        for (int w = 0; w < 4; w++)
            *(unaligned_longs *)(word[w] + at) = (x[w][0] & UINT32_MAX) | x[w][1] << 32;
    }
}

static void K(dropout)(int64_t n, const uint32_t *row, int width, const uint32_t *query, const cmb_dropout *dropout,
                       REAL *keep) {
    const REAL factor = (REAL)dropout->factor;
    const size_t lanes = width == 1 ? 1 : CMB_GROUP;
    CMB_ASSERT(width == 1 || width % CMB_GROUP == 0);
    for (int lane = 0; lane < width; lane += CMB_GROUP) {
        uint32_t second[CMB_GROUP] = {0}, word[4][CMB_GROUP];
        REAL kept[4][CMB_GROUP];
        memcpy(second, query + lane, lanes * sizeof *second);
        for (int64_t i = 0; i < n; i++) {
            const uint32_t at = row[i] + dropout->row;
            if (i == 0 || at / 4 != (row[i - 1] + dropout->row) / 4) { /* four neighbouring rows share a counter */
                K(philox)(at / 4, second, dropout, word);
                for (int r = 0; r < 4; r++)
                    for (int t = 0; t < CMB_GROUP; t++)
                        kept[r][t] = word[r][t] >> 8 >= dropout->threshold ? factor : 0;
            }
            if (width == 1) /* both sizes are constants: a short copy of an unknown size is slow */
                keep[i] = kept[at % 4][0];
            else
                memcpy(keep + i * width + lane, kept[at % 4], sizeof kept[0]);
        }
    }
}

static void K(multiply)(int64_t n, const REAL *factor, REAL *x) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(x + i, load(x + i) * load(factor + i));
    if (i < n)
        store_part(x + i, load_part(x + i, (int)(n - i)) * load_part(factor + i, (int)(n - i)), (int)(n - i));
}

/* ---- elementwise -------------------------------------------------------------------------------- */

static void K(scale)(int64_t n, REAL *x, REAL factor) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(x + i, load(x + i) * broadcast(factor));
    if (i < n)
        store_part(x + i, load_part(x + i, (int)(n - i)) * broadcast(factor), (int)(n - i));
}

static void K(divide)(int64_t n, const REAL *x, REAL divisor, REAL *y) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(y + i, load(x + i) / broadcast(divisor));
    if (i < n)
        store_part(y + i, load_part(x + i, (int)(n - i)) / broadcast(divisor), (int)(n - i));
}

static bool K(finite)(int64_t n, const REAL *x) {
    enum { CHAINS = 4 };
    vec poison[CHAINS] = {{0}}; /* 0 while everything is finite, NaN after */
    int64_t i = 0;
    for (; i + CHAINS * LANES <= n; i += CHAINS * LANES)
        UNROLL
    for (int j = 0; j < CHAINS; j++)
        poison[j] = fma_vec(load(x + i + j * LANES), (vec){0}, poison[j]);
    for (; i < n; i += LANES)
        poison[0] = fma_vec(n - i < LANES ? load_part(x + i, (int)(n - i)) : load(x + i), (vec){0}, poison[0]);
    UNROLL
    for (int j = 1; j < CHAINS; j++)
        poison[0] += poison[j];
    return !any((bits)(poison[0] != poison[0]));
}

/* ---- max pooling -------------------------------------------------------------------------------- */

/* The greater one; a NaN counts as greatest, and of two NaN or equals `top` stays. */
INLINE vec K(greater)(vec x, vec top) {
    return if_nonzero((bits)(x > top) | ((bits)(x != x) & (bits)(top == top)), x, top);
}

#define P(name) K(name)
#define ROW REAL
#define LOAD load
#define LOAD_PART load_part
#include "kernels/maxima.inc.h"

/* ---- the largest of a column -------------------------------------------------------------------- */

INLINE void K(argmax_part)(int vectors, int64_t n, const REAL *s, int width, REAL *top, REAL *arg) {
    vec best[4], where[4], at = {0};
    UNROLL
    for (int j = 0; j < vectors; j++) {
        best[j] = broadcast(-(REAL)INFINITY);
        where[j] = (vec){0};
    }
    for (int64_t i = 0; i < n; i++) {
        UNROLL
        for (int j = 0; j < vectors; j++) {
            vec x = load(s + i * width + j * LANES);
            bits greater = (bits)(x > best[j]);
            best[j] = if_nonzero(greater, x, best[j]);
            where[j] = if_nonzero(greater, at, where[j]);
        }
        at += broadcast(1);
    }
    UNROLL
    for (int j = 0; j < vectors; j++) {
        store(top + j * LANES, best[j]);
        store(arg + j * LANES, where[j]);
    }
}

/* Four vectors at once, because each is a chain of dependent steps. */
static void K(argmax)(int64_t n, const REAL *s, int width, REAL *top, REAL *arg) {
    CMB_ASSERT(n >= 0 && width % CMB_GROUP == 0);
    int lane = 0;
    for (; lane + 4 * LANES <= width; lane += 4 * LANES)
        K(argmax_part)(4, n, s + lane, width, top + lane, arg + lane);
    for (; lane < width; lane += LANES)
        K(argmax_part)(1, n, s + lane, width, top + lane, arg + lane);
}

/* ---- the table ---------------------------------------------------------------------------------- */

const NAME2(cmb_kernels, SUFFIX) NAME3(cmb_kernels_, ISA, SUFFIX) = {
    .pack = K(pack),
    .gather = K(gather),
    .gemm = K(gemm),
    .dot = K(dot),
    .dot_in_order = K(dot_in_order),
    .softmax = K(softmax),
    .softmax_backward = K(softmax_backward),
    .row_softmax = K(row_softmax),
    .row_softmax_in_order = K(row_softmax_in_order),
    .row_softmax_backward = K(row_softmax_backward),
    .dropout = K(dropout),
    .multiply = K(multiply),
    .scale = K(scale),
    .divide = K(divide),
    .finite = K(finite),
    .max_pool = K(max_pool),
    .max_pool_backward = K(max_pool_backward),
    .argmax = K(argmax),
    .exp = K(exp),
    .softcap = K(softcap),
};

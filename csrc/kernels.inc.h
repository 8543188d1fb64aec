// SPDX-License-Identifier: Apache-2.0
/*
 * The kernels' one body (kernels.h says what each computes). Parameters:
 *   REAL, SUFFIX, FLOAT_BITS   float, f32, 32 or double, f64, 64
 *   ISA, VECTOR_BYTES          avx2, 32 and so on; the including file has set the target
 *   REGISTERS                  accumulators the micro-kernel may hold: the vector registers less those
 *                              for one row of b and a broadcast
 */
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
#define words_of_longs NAME2(words_of_longs, SUFFIX)
#define load_words NAME2(load_words, SUFFIX)
#define store_words NAME2(store_words, SUFFIX)
#define product_of_low NAME2(product_of_low, SUFFIX)
#define K(name) NAME2(name, SUFFIX)

#include "vec.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define TWICE _Pragma("clang loop unroll_count(2)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#define TWICE _Pragma("GCC unroll 2")
#endif
/* Kept out of line: inlined into its caller the micro-kernel spills its accumulators (5 times slower). */
#define NOINLINE static __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))

#define LOWEST (FLOAT_BITS == 32 ? (REAL)-3.40282346638528859812e+38 : (REAL)-1.79769313486231570815e+308)

/* ---- 2^x ---------------------------------------------------------------------------------------- */

/* x <= 1. n = round(x) by adding a number whose last bit is worth 1 (and whose low bits carry the exponent's
 * bias), then a polynomial on x - n in [-1/2, 1/2]. Degree 6 with coefficients searched for float (0.843
 * ulp, every argument tried), degree 11 minimax for double (0.18 * 2^-53 before rounding). */
INLINE vec K(exp2_vec)(vec x) {
#if FLOAT_BITS == 32
    const vec magic = broadcast(12582912.0f + 127.0f), least = broadcast(-127.0f);
    static const REAL c[] = {
        0x1.42228p-13f, 0x1.5f181ap-10f, 0x1.3b2c92p-7f, 0x1.c6af3ep-5f, 0x1.ebfbdcp-3f, 0x1.62e43p-1f, 1.0f};
#else
    const vec magic = broadcast(6755399441055744.0 + 1023.0), least = broadcast(-1023.0);
    static const REAL c[] = {0x1.eabaad8f95e2fp-32, 0x1.e6091eff2c647p-28, 0x1.b524864a03113p-24, 0x1.62bfd27f38186p-20,
                             0x1.ffcbfc8da45eap-17, 0x1.4309130a5bd50p-13, 0x1.5d87fe78a090ap-10, 0x1.3b2ab6fba1877p-7,
                             0x1.c6b08d704a0cap-5,  0x1.ebfbdff82c59bp-3,  0x1.62e42fefa39efp-1,  1.0};
#endif
    x = maximum(least, x); /* the constant first: a NaN stays */
    vec biased = x + magic;
    vec f = x - (biased - magic);
    vec p = broadcast(c[0]);
    UNROLL
    for (int i = 1; i < (int)(sizeof c / sizeof *c); i++)
        p = fma_vec(p, f, broadcast(c[i]));
    vec power = (vec)((bits)biased << (FLOAT_BITS == 32 ? 23 : 52)); /* 2^n, and 0 for the least n */
    return rounded(p * power);
}

static void K(exp2)(int64_t n, const REAL *x, REAL *y) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(y + i, K(exp2_vec)(load(x + i)));
    if (i < n)
        store_part(y + i, K(exp2_vec)(load_part(x + i, (int)(n - i))), (int)(n - i));
}

/* ---- packing ------------------------------------------------------------------------------------ */

/* LANES x LANES, in place: log2(LANES) rounds of a perfect shuffle, each of which rotates the bits of
 * (row, column) by one. */
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

/* `scaled`, a constant: whether elements are numbers at all. */
INLINE void K(pack_rows)(int n, const REAL *const *row, int64_t dim, bool scaled, REAL scale, int width, REAL *packed) {
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
    enum { NEAR = 6, LINE = 64 / sizeof(REAL) }; /* rows from one that is fetched to the one that is copied meanwhile */
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

/* ---- the product -------------------------------------------------------------------------------- */

INLINE vec K(factor)(const REAL *p) { return broadcast(*p); }

#define P(name) K(name)
#define FACTOR K(factor)
#define MULTIPLY_ADD fma_vec
#include "product.inc.h"

/* ---- one query: vectors along the features ------------------------------------------------------ */

enum { K(parts) = CMB_GROUP / LANES > 0 ? CMB_GROUP / LANES : 1 }; /* vectors that hold 16 virtual lanes */

/* The 16 virtual lanes as a sum, in one order for every vector length: halves onto each other, to the end. */
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

static REAL K(row_softmax)(int64_t n, REAL *s, REAL *m, REAL *l) {
    REAL top = *m;
    for (int64_t i = 0; i < n; i++)
        top = s[i] > top ? s[i] : top;
    const vec base = broadcast(top > LOWEST ? top : LOWEST);
    for (int64_t i = n; i % CMB_GROUP; i++)
        s[i] = -(REAL)INFINITY;
    vec sum[K(parts)];
    UNROLL
    for (int i = 0; i < K(parts); i++)
        sum[i] = (vec){0};
    for (int64_t t = 0; t < n; t += CMB_GROUP)
        UNROLL
    for (int i = 0; i < K(parts); i++) {
        vec p = K(exp2_vec)(load(s + t + i * LANES) - base);
        store(s + t + i * LANES, p);
        sum[i] += p;
    }
    REAL alpha = K(exp2_vec)(broadcast(*m) - base)[0];
    REAL old = rounded(broadcast(*l * alpha))[0];
    *l = old + K(sum16)(sum);
    *m = top;
    return alpha;
}

static void K(row_softmax_backward)(int64_t n, REAL *s, REAL *dp, REAL lse2, REAL delta, REAL scale) {
    for (int64_t i = 0; i < n; i += LANES) {
        int rest = n - i < LANES ? (int)(n - i) : LANES;
        vec p = K(exp2_vec)(load_part(s + i, rest) - broadcast(lse2));
        vec ds = rounded(p * (load_part(dp + i, rest) - broadcast(delta))) * broadcast(scale);
        store_part(s + i, p, rest);
        store_part(dp + i, ds, rest);
    }
}

/* ---- the softmax of 16 lanes -------------------------------------------------------------------- */

static bool K(softmax)(int64_t n, REAL *s, int width, const uint64_t *mask, int lane0, REAL *m, REAL *l, REAL *alpha) {
    bits changed = {0};
    for (int v = 0; v < CMB_GROUP; v += LANES) {
        REAL *column = s + lane0 + v;
        const vec old = load(m + lane0 + v);
        vec top = old;
        if (mask) {
            for (int64_t i = 0; i < n; i++) {
                vec x = select_lanes(mask[i] >> (lane0 + v), load(column + i * width), broadcast(-(REAL)INFINITY));
                store(column + i * width, x);
                top = maximum(x, top);
            }
        } else {
            for (int64_t i = 0; i < n; i++)
                top = maximum(load(column + i * width), top);
        }
        const vec base = maximum(broadcast(LOWEST), top); /* -inf - -inf never happens */
        const vec a = K(exp2_vec)(old - base);
        vec sum = rounded(load(l + lane0 + v) * a);
        for (int64_t i = 0; i < n; i++) {
            vec p = K(exp2_vec)(load(column + i * width) - base);
            store(column + i * width, p);
            sum += p;
        }
        store(m + lane0 + v, top);
        store(l + lane0 + v, sum);
        store(alpha + lane0 + v, a);
        changed |= (bits)(a != broadcast(1));
    }
    bool any = false;
    for (int i = 0; i < LANES; i++)
        any |= changed[i] != 0;
    return any;
}

static bool K(softmax_backward)(int64_t n, REAL *s, REAL *dp, int width, const uint64_t *mask, int lane0,
                                const REAL *lse2, const REAL *delta, REAL scale) {
    vec poison = {0}; /* 0 while everything is finite, NaN after */
    const vec factor = broadcast(scale);
    for (int v = 0; v < CMB_GROUP; v += LANES) {
        const vec base = load(lse2 + lane0 + v), shift = load(delta + lane0 + v);
        for (int64_t i = 0; i < n; i++) {
            REAL *at = s + i * width + lane0 + v, *dat = dp + i * width + lane0 + v;
            vec x = load(at), dx = load(dat);
            poison = fma_vec(x, (vec){0}, poison);
            poison = fma_vec(dx, (vec){0}, poison);
            vec p = K(exp2_vec)(x - base);
            vec ds = rounded(p * (dx - shift)) * factor;
            if (mask) {
                p = select_lanes(mask[i] >> (lane0 + v), p, (vec){0});
                ds = select_lanes(mask[i] >> (lane0 + v), ds, (vec){0});
            }
            store(at, p);
            store(dat, ds);
        }
    }
    bool finite = true;
    for (int i = 0; i < LANES; i++)
        finite &= poison[i] == 0;
    return finite;
}

/* ---- dropout ------------------------------------------------------------------------------------ */

/* Philox4x32-10 (Salmon et al., SC 2011) for one counter and CMB_GROUP others that differ from it in their second word:
 * its four words. While they are made, only the lower half of an element counts; two vectors go together, since one
 * alone would wait for its products. */
INLINE void K(philox)(uint32_t first, const uint32_t *second, const cmb_dropout *d, uint32_t word[4][CMB_GROUP]) {
    enum { TOGETHER = 2, EACH = VECTOR_BYTES / 8 };
    const longs zero = {0}, factor0 = zero + 0xD2511F53, factor2 = zero + 0xCD9E8D57;
    for (int at = 0; at < CMB_GROUP; at += TOGETHER * EACH) {
        longs x[4][TOGETHER];
        for (int n = 0; n < TOGETHER; n++) {
            x[0][n] = zero + first;
            x[1][n] = load_words(second + at + n * EACH);
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
            for (int n = 0; n < TOGETHER; n++)
                store_words(word[w] + at + n * EACH, x[w][n]);
    }
}

static void K(dropout)(int64_t n, const uint32_t *row, int width, const uint32_t *query, const cmb_dropout *dropout,
                       REAL *keep) {
    const REAL factor = (REAL)dropout->factor;
    const size_t lanes = width == 1 ? 1 : CMB_GROUP;
    for (int lane = 0; lane < width; lane += CMB_GROUP) {
        uint32_t second[CMB_GROUP] = {0}, word[4][CMB_GROUP];
        REAL kept[4][CMB_GROUP];
        memcpy(second, query + lane, lanes * sizeof *second);
        for (int64_t i = 0; i < n; i++) {
            const uint32_t at = row[i] + dropout->row;
            if (i == 0 || at / 4 != (row[i - 1] + dropout->row) / 4) { /* neighbouring rows share a counter */
                K(philox)(at / 4, second, dropout, word);
                for (int r = 0; r < 4; r++)
                    for (int t = 0; t < CMB_GROUP; t++)
                        kept[r][t] = word[r][t] >> 8 >= dropout->threshold ? factor : 0;
            }
            memcpy(keep + i * width + lane, kept[at % 4], lanes * sizeof *keep);
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

/* x takes top's place where it is greater, or NaN (of which the first stays). */
INLINE vec K(greater)(vec x, vec top) {
    return if_nonzero((bits)(x > top) | ((bits)(x != x) & (bits)(top == top)), x, top);
}

/* The same where x is a number; a NaN is passed over. */
INLINE vec K(larger)(vec x, vec top) {
#if defined(__aarch64__)
    return if_nonzero((bits)(x > top), x, top); /* its maximum of zeros is +0 */
#else
    return maximum(x, top);
#endif
}

/* Features at a time: their maxima are chains of their own, so that none waits for another's. */
enum { K(chains) = 4 };

/* `nr` vectors of features from d on; of the last only `part` elements, if part > 0. False where `careful` is not and
 * some row is not finite: nothing is stored then. */
INLINE bool K(max_columns)(int nr, int64_t n, const REAL *const *row, int64_t d, int part, REAL *top, bool add,
                           bool careful) {
    vec best[K(chains)], poison[K(chains)]; /* 0 while everything is finite, NaN after */
    const REAL *first = add ? top : row[0];
    UNROLL
    for (int j = 0; j < nr; j++) {
        best[j] = part ? load_part(first + d, part) : load(first + d + j * LANES);
        poison[j] = best[j] * broadcast(0);
    }
    for (int64_t i = add ? 0 : 1; i < n; i++) {
        const REAL *y = row[i] + d;
        UNROLL
        for (int j = 0; j < nr; j++) {
            const vec x = part ? load_part(y, part) : load(y + j * LANES);
            best[j] = careful ? K(greater)(x, best[j]) : K(larger)(x, best[j]);
            poison[j] = careful ? poison[j] : fma_vec(x, broadcast(0), poison[j]);
        }
    }
    UNROLL
    for (int j = 1; j < nr; j++)
        poison[0] += poison[j];
    if (!careful && any((bits)(poison[0] != poison[0])))
        return false;
    UNROLL
    for (int j = 0; j < nr; j++) {
        if (part)
            store_part(top + d, best[j], part);
        else
            store(top + d + j * LANES, best[j]);
    }
    return true;
}

/* Few rows are looked at carefully at once. */
#define MAX_COLUMNS(nr, part)                                           \
    if (n < 8 || !K(max_columns)(nr, n, row, d, part, top, add, false)) \
        K(max_columns)(nr, n, row, d, part, top, add, true);

static void K(max_pool)(int64_t n, const REAL *const *row, int64_t dim, REAL *top, bool add) {
    int64_t d = 0;
    for (; d + K(chains) * LANES <= dim; d += K(chains) * LANES)
        MAX_COLUMNS(K(chains), 0)
    for (; d + LANES <= dim; d += LANES)
        MAX_COLUMNS(1, 0)
    if (d < dim)
        MAX_COLUMNS(1, (int)(dim - d))
}
#undef MAX_COLUMNS

INLINE void K(max_columns_backward)(int nr, int64_t n, const REAL *const *row, int64_t d, int part, const REAL *top,
                                    const REAL *grad, REAL *const *grad_row) {
    vec best[K(chains)], g[K(chains)];
    bits left[K(chains)];
    UNROLL
    for (int j = 0; j < nr; j++) {
        best[j] = part ? load_part(top + d, part) : load(top + d + j * LANES);
        g[j] = part ? load_part(grad + d, part) : load(grad + d + j * LANES);
        left[j] = (bits){0} == (bits){0};
    }
    for (int64_t i = 0; i < n; i++) {
        const REAL *y = row[i] + d;
        REAL *z = grad_row[i] + d;
        UNROLL
        for (int j = 0; j < nr; j++) {
            const vec x = part ? load_part(y, part) : load(y + j * LANES);
            const bits hit = left[j] & ((bits)(x == best[j]) | ((bits)(x != x) & (bits)(best[j] != best[j])));
            left[j] &= ~hit;
            if (!any(hit)) /* of many rows, most: their gradient is not even read */
                continue;
            const vec old = part ? load_part(z, part) : load(z + j * LANES);
            const vec sum = if_nonzero(hit, old + g[j], old);
            if (part)
                store_part(z, sum, part);
            else
                store(z + j * LANES, sum);
        }
    }
}

static void K(max_pool_backward)(int64_t n, const REAL *const *row, int64_t dim, const REAL *top, const REAL *grad,
                                 REAL *const *grad_row) {
    int64_t d = 0;
    for (; d + K(chains) * LANES <= dim; d += K(chains) * LANES)
        K(max_columns_backward)(K(chains), n, row, d, 0, top, grad, grad_row);
    for (; d + LANES <= dim; d += LANES)
        K(max_columns_backward)(1, n, row, d, 0, top, grad, grad_row);
    if (d < dim)
        K(max_columns_backward)(1, n, row, d, (int)(dim - d), top, grad, grad_row);
}

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

/* Four vectors at once, each a chain of dependent steps. */
static void K(argmax)(int64_t n, const REAL *s, int width, REAL *top, REAL *arg) {
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
    .product = K(product),
    .dot = K(dot),
    .softmax = K(softmax),
    .softmax_backward = K(softmax_backward),
    .row_softmax = K(row_softmax),
    .row_softmax_backward = K(row_softmax_backward),
    .dropout = K(dropout),
    .multiply = K(multiply),
    .scale = K(scale),
    .divide = K(divide),
    .finite = K(finite),
    .max_pool = K(max_pool),
    .max_pool_backward = K(max_pool_backward),
    .argmax = K(argmax),
    .exp2 = K(exp2),
};

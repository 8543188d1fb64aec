// SPDX-License-Identifier: Apache-2.0
/*
 * The kernels: the arithmetic that gains from an instruction set. Each instruction set has one table of functions for
 * each type, and the code above calls the functions of a table without knowing whose it is. bodies.inc.h holds the one
 * body of each function; the base table (16-byte vectors) is the specification of the others.
 *
 * A tile's lanes are its queries, `width` of them (a multiple of 16), side by side in memory:
 *
 *     packed[d * width + lane]   queries by feature        s[n * width + lane]   logits by row
 *
 * Rows of a table are reached through pointers, so that rows which lie anywhere need no copy.
 *
 * Bits: every element of a result has one accumulator, summed in index order by fused multiply-add. So the vector
 * length never changes a bit; only `base` on a machine without FMA differs.
 *
 * Memory: a pointer has no alignment beyond that of its type, and nothing past the last element of a row is read or
 * written. Inputs and outputs do not overlap unless a function says so.
 */
#ifndef CMB_KERNELS_H
#define CMB_KERNELS_H

#include "runtime/cpu.h"

#include <stdbool.h>
#include <stdint.h>

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "compile without -ffast-math and -Ofast: NaN and Inf are tested for, and the order of sums decides the bits"
#endif

/* Block sizes of the loops around the kernels. They are the same for all instruction sets and known to the compiler: a
 * chunk's rows are summed before they join a query's result, so that its size decides bits, and chunks and slices size
 * arrays on the stack. */
enum {
    CMB_GROUP = 16,        /* lanes that one call of `softmax` takes, and that windows of S are counted in */
    CMB_QUAD = 4,          /* lanes that share a window of rows in a sum over rows */
    CMB_BLOCK = 6,         /* rows that share a window of lane groups: the height of the widest micro-kernel */
    CMB_CHUNK_BYTES = 384, /* of one lane's logits in a chunk: 96 floats or 48 doubles, so that S, K or V, and Q^T fit
                            * into the first-level cache together */
    CMB_PREFETCH_BYTES = 256, /* of each array in one prefetch, but one row at least: the four arrays of forward have 16
                               * lines then, about as many as a core fetches at once */
};

/* Which weights of one head are dropped (combiner.h): those whose 24 random bits are below `threshold`. */
typedef struct {
    uint32_t threshold; /* 0: none */
    double factor;      /* of the weights that stay; 0 where all are dropped */
    uint32_t head, batch, row;
    uint64_t seed;
} cmb_dropout;

static inline bool cmb_drops(const cmb_dropout *dropout) { return dropout->threshold > 0; }

#define CMB_DECLARE_TABLE(name, NAME, type, table, suffix) extern const type table##_##name##_##suffix;

#define CMB_DECLARE_KERNELS(REAL, SUFFIX)                                                                              \
    typedef struct {                                                                                                   \
        /* ---- products ----------------------------------------------------------------------------- */              \
        /* packed[d * width + lane] = scale * row[lane][d], and 0 for lanes in [n, width). */                          \
        void (*pack)(int n, const REAL *const *row, int64_t dim, REAL scale, int width, REAL *packed);                 \
        /* Copies n rows side by side: to[i * dim + d] = row[i][d], and row[i] becomes the copy's address. */          \
        void (*gather)(int n, const REAL **row, int64_t dim, REAL *to);                                                \
        /* Indirect matrix product: c[i][column + j] (+)= sum over t < k of a[i][t * a_step] * b[t][column + j] for    \
         * i < m, j < n. The sum starts from 0, and where `add` it is added to c once. */                              \
        void (*gemm)(int64_t m, int64_t n, int64_t k, const REAL *const *a, int64_t a_step, const REAL *const *b,      \
                     REAL *const *c, int64_t column, bool add);                                                        \
        /* s[i] = sum over d of row[i][d] * x[d], in 16 partial sums, whatever the vector length. */                   \
        void (*dot)(int64_t n, const REAL *const *row, int64_t dim, const REAL *x, REAL *s);                           \
        /* The same sums in index order, each with one accumulator: the bits of gemm. */                               \
        void (*dot_in_order)(int64_t n, const REAL *const *row, int64_t dim, const REAL *x, REAL *s);                  \
        /* ---- softmax ------------------------------------------------------------------------------ */              \
        /* A step of the online softmax for lanes [lane0, lane0 + 16): logits s[i * width + lane] become e^(s - m). m  \
         * and l are updated, and alpha = e^(old m - m) is the factor for earlier sums. Returns whether an alpha is    \
         * not 1. Lane t sees row i if mask is NULL or has bit t in mask[i]; where it does not, s becomes 0 whatever   \
         * it held. `bias`, [n] or NULL, joins the logits: s + bias[i] is compared with m without rounding the sum. */ \
        bool (*softmax)(int64_t n, REAL *s, int width, const uint64_t *mask, const REAL *bias, int lane0, REAL *m,     \
                        REAL *l, REAL *alpha);                                                                         \
        /* Its derivative: s becomes p = e^(min(s - m, 0)) * inverse_l, where inverse_l is 1 / l; dp becomes           \
         * p * (dp - delta) * scale. Both become 0 where masked. Returns whether every s and dp was finite. */         \
        bool (*softmax_backward)(int64_t n, REAL *s, REAL *dp, int width, const uint64_t *mask, const REAL *bias,      \
                                 int lane0, const REAL *m, const REAL *inverse_l, const REAL *delta, REAL scale);      \
        /* The same two for one query and n rows: s[0..n). s and bias have room for n rounded up to 16. Returns alpha. \
         */                                                                                                            \
        REAL (*row_softmax)(int64_t n, REAL *s, REAL *bias, REAL *m, REAL *l);                                         \
        /* The same with the bits of `softmax`: its sum is in index order. */                                          \
        REAL (*row_softmax_in_order)(int64_t n, REAL *s, const REAL *bias, REAL *m, REAL *l);                          \
        void (*row_softmax_backward)(int64_t n, REAL *s, REAL *dp, const REAL *bias, REAL m, REAL inverse_l,           \
                                     REAL delta, REAL scale);                                                          \
        /* s[i] becomes x = cap * tanh(s[i] / cap), and slope[i], unless slope is NULL, its derivative 1 - (x /        \
         * cap)^2, which is 0 for a NaN. Returns whether every s was finite; true without slope. */                    \
        bool (*softcap)(int64_t n, REAL *s, REAL cap, REAL *slope);                                                    \
        /* keep[i * width + lane] = the factor of the weight of query[lane] for table row row[i]; `width` is 1, or as  \
         * above. */                                                                                                   \
        void (*dropout)(int64_t n, const uint32_t *row, int width, const uint32_t *query, const cmb_dropout *dropout,  \
                        REAL *keep);                                                                                   \
        /* ---- elementwise -------------------------------------------------------------------------- */              \
        void (*multiply)(int64_t n, const REAL *factor, REAL *x);        /* x[i] *= factor[i] */                       \
        void (*scale)(int64_t n, REAL *x, REAL factor);                  /* x[i] *= factor */                          \
        void (*divide)(int64_t n, const REAL *x, REAL divisor, REAL *y); /* y[i] = x[i] / divisor; x may be y */       \
        bool (*finite)(int64_t n, const REAL *x);                        /* whether all of x is */                     \
        /* y[i] = e^x[i] for x[i] <= 1: 0.89 ulp in float with FMA, 1.17 without; 0 from -87.68 (-708.75) down. */     \
        void (*exp)(int64_t n, const REAL *x, REAL *y);                                                                \
        /* ---- maxima ------------------------------------------------------------------------------- */              \
        /* top[d] = max over i of row[i][d], and of top[d] where `add`. A NaN makes NaN; of equals the first stays. */ \
        void (*max_pool)(int64_t n, const REAL *const *row, int64_t dim, REAL *top, bool add);                         \
        /* grad_row[i][d] += grad[d] for the first i with row[i][d] == top[d], or NaN both. */                         \
        void (*max_pool_backward)(int64_t n, const REAL *const *row, int64_t dim, const REAL *top, const REAL *grad,   \
                                  REAL *const *grad_row);                                                              \
        /* For every lane: top[lane] = max over i < n of s[i * width + lane], and arg[lane] = the first such i, as a   \
         * REAL. A NaN is no maximum; -inf and 0 where no s exceeds -inf. */                                           \
        void (*argmax)(int64_t n, const REAL *s, int width, REAL *top, REAL *arg);                                     \
    } cmb_kernels_##SUFFIX;                                                                                            \
    CMB_ISAS(CMB_DECLARE_TABLE, cmb_kernels_##SUFFIX, cmb_kernels, SUFFIX)                                             \
    const cmb_kernels_##SUFFIX *cmb_kernels_for_##SUFFIX(cmb_isa isa);

CMB_DECLARE_KERNELS(float, f32)
CMB_DECLARE_KERNELS(double, f64)

/* A 16-bit format, bfloat16 or float16. Its numbers are stored; the arithmetic is float's.
 *
 * Some instruction sets multiply pairs of such numbers (VDPBF16PS of AVX512_BF16, TDPBF16PS of AMX): a word of 32 bits
 * holds two numbers, lo and hi, and c += a.lo * b.lo + a.hi * b.hi in float. A pair takes the place of a float, so
 * `gemm` and `pack` are those of above with words for floats. Words, and arrays of pointers to them, are void here. */
typedef struct {
    void (*widen)(int64_t n, const uint16_t *x, float *y);  /* exact */
    void (*narrow)(int64_t n, const float *x, uint16_t *y); /* to nearest, ties to even */
    /* As those of above, of stored rows. */
    void (*max_pool)(int64_t n, const uint16_t *const *row, int64_t dim, float *top, bool add);
    void (*max_pool_backward)(int64_t n, const uint16_t *const *row, int64_t dim, const float *top, const float *grad,
                              float *const *grad_row);

    /* gemm, group, pack, interleave, pair and round are absent (NULL or 0) where the instruction set has no such
     * product. a and b are arrays of pointers to words, c is one of pointers to floats. The k words are words
     * [first, first + k) of a longer sum, whose other words are zeros. */
    void (*gemm)(int64_t m, int64_t n, int64_t k, const void *a, int64_t a_step, const void *b, const void *c,
                 int64_t column, bool add, int64_t first);
    /* A thread calls `begin` before its calls of gemm and `end` after them. NULL: the thread need not. */
    void (*begin)(void), (*end)(void);
    /* 1: each word joins its sum alone. 16: words [16 i, 16 i + 16) of the longer sum are added up first, and c is
     * computed in blocks of 16 rows and 16 columns. */
    int group;
    /* packed[d * width + lane] = word d of row[lane], and zeros for lanes in [n, width). */
    void (*pack)(int n, const void *row, int64_t dim, int width, void *packed);
    /* pairs[i] = (x[i], y[i]), or (x[i], 0) where y is NULL: `interleave` of stored numbers, `pair` of floats, which it
     * rounds. */
    void (*interleave)(int64_t n, const void *x, const void *y, void *pairs);
    void (*pair)(int64_t n, const void *x, const void *y, void *pairs);
    /* As `narrow`, but subnormal numbers may become 0; gemm takes them for 0. */
    void (*round)(int64_t n, const float *x, uint16_t *y);
} cmb_narrow_format;

#define CMB_DECLARE_NARROW(FORMAT)                                     \
    CMB_ISAS(CMB_DECLARE_TABLE, cmb_narrow_format, cmb_narrow, FORMAT) \
    const cmb_narrow_format *cmb_narrow_for_##FORMAT(cmb_isa isa);

CMB_DECLARE_NARROW(bf16)
CMB_DECLARE_NARROW(f16)

#endif

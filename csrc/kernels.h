// SPDX-License-Identifier: Apache-2.0
/*
 * The kernels: all the arithmetic that is worth an instruction set. One table of functions for each
 * instruction set and type; the code above them knows neither. kernels.inc.h holds the one body of each,
 * and the base table (16-byte vectors) is the specification of the others.
 *
 * A tile's lanes are its queries, `width` of them (a multiple of 16), side by side in memory:
 *   packed[d * width + lane]   queries by feature        s[n * width + lane]   logits by row
 * Rows of a table are reached through pointers, so a gather costs nothing. Every output element has one
 * accumulator, summed in index order by fused multiply-add: the vector length never changes a bit
 * (only `base` on a machine without FMA differs). No pointer needs an alignment beyond its type's, and
 * nothing past the last element of a row is read.
 */
#ifndef CMB_KERNELS_H
#define CMB_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

enum { CMB_GROUP = 16 }; /* lanes that masks and windows are counted in */

/* Which weights of one head fall (combiner.h): those with 24 random bits below `threshold`. */
typedef struct {
    uint32_t threshold; /* 0: none */
    double factor;      /* of the others; 0 where all fall */
    uint32_t head, batch, row;
    uint64_t seed;
} cmb_dropout;

#define CMB_DECLARE_KERNELS(REAL, SUFFIX)                                                                              \
    typedef struct {                                                                                                   \
        /* packed[d * width + lane] = scale * row[lane][d], and 0 for lanes in [n, width). */                          \
        void (*pack)(int n, const REAL *const *row, int64_t dim, REAL scale, int width, REAL *packed);                 \
        /* Copies n rows that lie apart side by side, to[i * dim + d] = row[i][d], and has row[i] be the copy. */      \
        void (*gather)(int n, const REAL **row, int64_t dim, REAL *to);                                                \
        /* c[i][column + j] (+)= sum over t < k of a[i][t * a_step] * b[t][column + j], i < m, j < n.                  \
         * The sum starts from 0 and is added once to c where `add`. c overlaps neither a nor b. */                    \
        void (*product)(int64_t m, int64_t n, int64_t k, const REAL *const *a, int64_t a_step, const REAL *const *b,   \
                        REAL *const *c, int64_t column, bool add);                                                     \
        /* s[i] = sum over d of row[i][d] * x[d], in 16 virtual lanes. */                                              \
        void (*dot)(int64_t n, const REAL *const *row, int64_t dim, const REAL *x, REAL *s);                           \
        /* One step of the online softmax (base 2) for 16 lanes: s[i * width + lane] becomes 2^(s - m), m and l are    \
         * updated and alpha = 2^(old m - m) is what earlier sums are to be multiplied with; returns whether any       \
         * alpha is not 1. Lane t of row i takes part if mask is NULL or bit `lane0 + t` of mask[i] is set: the        \
         * others become 0, whatever s held. */                                                                        \
        bool (*softmax)(int64_t n, REAL *s, int width, const uint64_t *mask, int lane0, REAL *m, REAL *l,              \
                        REAL *alpha);                                                                                  \
        /* Its derivative for 16 lanes: s becomes p = 2^(s - lse2), dp becomes p * (dp - delta) * scale, both 0        \
         * where masked; returns whether every s and dp was finite. */                                                 \
        bool (*softmax_backward)(int64_t n, REAL *s, REAL *dp, int width, const uint64_t *mask, int lane0,             \
                                 const REAL *lse2, const REAL *delta, REAL scale);                                     \
        /* The same two for one query, its rows side by side: s[0..n); s has room for n rounded up to 16. */           \
        REAL (*row_softmax)(int64_t n, REAL *s, REAL *m, REAL *l);                                                     \
        void (*row_softmax_backward)(int64_t n, REAL *s, REAL *dp, REAL lse2, REAL delta, REAL scale);                 \
        /* keep[i * width + lane] = the factor of table row row[i]'s weight for query[lane], or 0: width is 1 or as    \
         * above. */                                                                                                   \
        void (*dropout)(int64_t n, const uint32_t *row, int width, const uint32_t *query, const cmb_dropout *dropout,  \
                        REAL *keep);                                                                                   \
        /* x[0..n) *= factor[0..n) */                                                                                  \
        void (*multiply)(int64_t n, const REAL *factor, REAL *x);                                                      \
        /* x[0..n) *= factor; y = x / divisor; whether all of x is finite. */                                          \
        void (*scale)(int64_t n, REAL *x, REAL factor);                                                                \
        void (*divide)(int64_t n, const REAL *x, REAL divisor, REAL *y);                                               \
        bool (*finite)(int64_t n, const REAL *x);                                                                      \
        /* top[d] = max over i of row[i][d], and of top[d] where `add`; a NaN makes NaN, of equals the first stays. */ \
        void (*max_pool)(int64_t n, const REAL *const *row, int64_t dim, REAL *top, bool add);                         \
        /* grad_row[i][d] += grad[d] for the first i that holds top[d] */                                              \
        void (*max_pool_backward)(int64_t n, const REAL *const *row, int64_t dim, const REAL *top, const REAL *grad,   \
                                  REAL *const *grad_row);                                                              \
        /* For every lane: top[lane] = max over i < n of s[i * width + lane] and arg[lane] = the first such i, as a    \
         * REAL; -inf and 0 where none exceeds -inf (a NaN does not). */                                               \
        void (*argmax)(int64_t n, const REAL *s, int width, REAL *top, REAL *arg);                                     \
        /* y = 2^x for x <= 1, 0.84 ulp in float with FMA (1.13 without); 0 from -126.5 (-1022.5) down */              \
        void (*exp2)(int64_t n, const REAL *x, REAL *y);                                                               \
    } cmb_kernels_##SUFFIX;                                                                                            \
    extern const cmb_kernels_##SUFFIX cmb_kernels_base_##SUFFIX, cmb_kernels_avx2_##SUFFIX,                            \
        cmb_kernels_avx512_##SUFFIX, cmb_kernels_avx512_bf16_##SUFFIX, cmb_kernels_neon_##SUFFIX;                      \
    /* The table of the instruction set in force. */                                                                   \
    const cmb_kernels_##SUFFIX *cmb_kernels_in_force_##SUFFIX(void);

CMB_DECLARE_KERNELS(float, f32)
CMB_DECLARE_KERNELS(double, f64)

/* A 16-bit format, bfloat16 or float16, whose arithmetic is float's. */
typedef struct {
    void (*widen)(int64_t n, const uint16_t *x, float *y);  /* exact */
    void (*narrow)(int64_t n, const float *x, uint16_t *y); /* to nearest, of two as near the even one */

    /* What multiplies the format's numbers in pairs, two at the place of a float; NULL where nothing does. Pairs and
     * arrays of pointers to them are void here. The product of above, of elements that are pairs: both their products
     * are added, to a float; a and b are arrays of pointers, and so is c, to floats. */
    void (*product)(int64_t m, int64_t n, int64_t k, const void *a, int64_t a_step, const void *b, const void *c,
                    int64_t column, bool add);
    /* packed[d * width + lane] = the pair row[lane][d], and zeros for lanes in [n, width). */
    void (*pack)(int n, const void *row, int64_t dim, int width, void *packed);
    /* pairs[i] = (x[i], y[i]), or (x[i], 0) without y: of stored numbers, and of floats to be rounded. */
    void (*interleave)(int64_t n, const void *x, const void *y, void *pairs);
    void (*pair)(int64_t n, const void *x, const void *y, void *pairs);
    /* As `narrow`, but that subnormal numbers may become zeros, for which the product takes them. */
    void (*round)(int64_t n, const float *x, uint16_t *y);
} cmb_half;
#define CMB_DECLARE_HALF(FORMAT)                                                                    \
    extern const cmb_half cmb_half_base_##FORMAT, cmb_half_avx2_##FORMAT, cmb_half_avx512_##FORMAT, \
        cmb_half_avx512_bf16_##FORMAT, cmb_half_neon_##FORMAT;                                      \
    const cmb_half *cmb_half_in_force_##FORMAT(void);

CMB_DECLARE_HALF(bf16)
CMB_DECLARE_HALF(f16)

#endif

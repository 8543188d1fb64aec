// SPDX-License-Identifier: Apache-2.0
/*
 * The vector: VECTOR_BYTES of REAL, as a vector type of GCC and clang, which bring +, -, *, /, comparisons and bit
 * operations; and the few operations that they lack. bodies.inc.h includes this file once for each type.
 *
 * The including file of an instruction set defines VECTOR_BYTES, and the target whose intrinsics are to be used:
 * TARGET_SSE2, TARGET_AVX2, TARGET_AVX512, TARGET_NEON, or none, for vectors that the compiler translates. A macro of
 * our own, because clang's target pragma defines none.
 *
 * Everything is static: a function compiled for one instruction set must never be linked into the code of another.
 */

#if !defined(__clang__) && __GNUC__ < 12
#error "compile with GCC 12 or later, or clang: older ones lack __builtin_shufflevector"
#endif

#define LANES ((int)(VECTOR_BYTES / sizeof(REAL)))

typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL unaligned_vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
#if FLOAT_BITS == 32
typedef int32_t bits __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef int64_t bits __attribute__((vector_size(VECTOR_BYTES)));
#endif

static inline vec load(const REAL *p) { return *(const unaligned_vec *)p; }
static inline void store(REAL *p, vec x) { *(unaligned_vec *)p = x; }
static inline vec broadcast(REAL x) { return x - (vec){0}; } /* not x + 0: -0 stays -0 */

/* x, in such a way that the compiler does not fuse the product x with a later sum: it would do so on some instruction
 * sets only, and the bits would differ. */
static inline vec rounded(vec x) {
#if defined(TARGET_AVX512)
    __asm__("" : "+v"(x));
#elif defined(TARGET_AVX2) || defined(TARGET_SSE2)
    __asm__("" : "+x"(x));
#elif defined(TARGET_NEON)
    __asm__("" : "+w"(x));
#endif
    return x;
}

static inline vec if_nonzero(bits condition, vec a, vec b) {
    return (vec)(((bits)a & condition) | ((bits)b & ~condition));
}

/* Whether a bit of x is set. */
static inline bool any(bits x) {
#if defined(TARGET_AVX512)
    return _mm512_test_epi64_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(TARGET_AVX2)
    return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    uint64_t part[VECTOR_BYTES / 8], all = 0;
    memcpy(part, &x, sizeof part);
    for (int i = 0; i < VECTOR_BYTES / 8; i++)
        all |= part[i];
    return all != 0;
#endif
}

/* ---- the operations of a target -----------------------------------------------------------------
 *
 *   fma_vec(a, b, c)              a * b + c; rounded once, but on SSE2 and where the target is unknown
 *   maximum(a, b)                 the larger one; b if one is NaN or if both are 0
 *   select_lanes(word, a, b)      lane t from a if bit t of word is set, else from b
 *   load_part / store_part        the first n < LANES elements; loads zeros beyond
 */
#if !defined(TARGET_AVX512)
#if VECTOR_BYTES * 8 / FLOAT_BITS == 8
static const bits lane_bit = {1, 2, 4, 8, 16, 32, 64, 128};
#elif VECTOR_BYTES * 8 / FLOAT_BITS == 4
static const bits lane_bit = {1, 2, 4, 8};
#else
static const bits lane_bit = {1, 2};
#endif
#endif

#if defined(TARGET_AVX512) && FLOAT_BITS == 32

static inline vec fma_vec(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline vec maximum(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vec select_lanes(uint64_t word, vec a, vec b) {
    return (vec)_mm512_mask_blend_ps((__mmask16)word, (__m512)b, (__m512)a);
}
static inline vec load_part(const REAL *p, int n) { return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
static inline void store_part(REAL *p, vec x, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
}

#elif defined(TARGET_AVX512)

static inline vec fma_vec(vec a, vec b, vec c) { return (vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
static inline vec maximum(vec a, vec b) { return (vec)_mm512_max_pd((__m512d)a, (__m512d)b); }
static inline vec select_lanes(uint64_t word, vec a, vec b) {
    return (vec)_mm512_mask_blend_pd((__mmask8)word, (__m512d)b, (__m512d)a);
}
static inline vec load_part(const REAL *p, int n) { return (vec)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p); }
static inline void store_part(REAL *p, vec x, int n) {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)x);
}

#elif defined(TARGET_AVX2) && FLOAT_BITS == 32

static inline vec fma_vec(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline vec maximum(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vec select_lanes(uint64_t word, vec a, vec b) {
    bits seen = ((bits)_mm256_set1_epi32((int)(word & 0xff)) & lane_bit) == lane_bit;
    return (vec)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)seen);
}
static inline __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vec load_part(const REAL *p, int n) { return (vec)_mm256_maskload_ps(p, first_lanes(n)); }
static inline void store_part(REAL *p, vec x, int n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)x); }

#elif defined(TARGET_AVX2)

static inline vec fma_vec(vec a, vec b, vec c) { return (vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
static inline vec maximum(vec a, vec b) { return (vec)_mm256_max_pd((__m256d)a, (__m256d)b); }
static inline vec select_lanes(uint64_t word, vec a, vec b) {
    bits seen = ((bits)_mm256_set1_epi64x((int64_t)(word & 0xff)) & lane_bit) == lane_bit;
    return (vec)_mm256_blendv_pd((__m256d)b, (__m256d)a, (__m256d)seen);
}
static inline __m256i first_lanes64(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
static inline vec load_part(const REAL *p, int n) { return (vec)_mm256_maskload_pd(p, first_lanes64(n)); }
static inline void store_part(REAL *p, vec x, int n) { _mm256_maskstore_pd(p, first_lanes64(n), (__m256d)x); }

#else

#if defined(TARGET_NEON) && FLOAT_BITS == 32
static inline vec fma_vec(vec a, vec b, vec c) {
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#elif defined(TARGET_NEON)
static inline vec fma_vec(vec a, vec b, vec c) {
    return (vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
static inline vec fma_vec(vec a, vec b, vec c) { return rounded(a * b) + c; }
#endif
static inline vec maximum(vec a, vec b) { return if_nonzero((bits)(a > b), a, b); } /* NEON's own returns a NaN */
static inline vec select_lanes(uint64_t word, vec a, vec b) {
    bits seen = (((bits){0} + (int32_t)(word & 0xff)) & lane_bit) == lane_bit;
    return if_nonzero(seen, a, b);
}
static inline vec load_part(const REAL *p, int n) {
    vec x = {0};
    for (int i = 0; i < n; i++)
        x[i] = p[i];
    return x;
}
static inline void store_part(REAL *p, vec x, int n) {
    for (int i = 0; i < n; i++)
        p[i] = x[i];
}

#endif

/* ---- integers of 64 bits; the product of their lower halves, whatever the upper ones hold -------- */

typedef uint64_t longs __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t unaligned_longs __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
#if defined(TARGET_AVX512)
static inline longs product_of_low(longs a, longs b) { return (longs)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(TARGET_AVX2)
static inline longs product_of_low(longs a, longs b) { return (longs)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(TARGET_SSE2)
static inline longs product_of_low(longs a, longs b) { return (longs)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#elif defined(TARGET_NEON)
static inline longs product_of_low(longs a, longs b) {
    return (longs)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}
#else
static inline longs product_of_low(longs a, longs b) { return (a & UINT32_MAX) * (b & UINT32_MAX); }
#endif

/* ---- the lower, and the upper, halves of a and b interleaved: a0 b0 a1 b1 ... ------------------- */

#if VECTOR_BYTES * 8 / FLOAT_BITS == 2
static inline vec interleave_low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 2); }
static inline vec interleave_high(vec a, vec b) { return __builtin_shufflevector(a, b, 1, 3); }
#elif VECTOR_BYTES * 8 / FLOAT_BITS == 4
static inline vec interleave_low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
static inline vec interleave_high(vec a, vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#elif VECTOR_BYTES * 8 / FLOAT_BITS == 8
static inline vec interleave_low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
static inline vec interleave_high(vec a, vec b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
static inline vec interleave_low(vec a, vec b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
static inline vec interleave_high(vec a, vec b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#endif

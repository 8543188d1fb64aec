// SPDX-License-Identifier: Apache-2.0
/*
 * The vector of the instruction set and type being compiled: VECTOR_BYTES of REAL, as a GCC / clang vector
 * (+, -, *, /, comparisons and bit operations come with it), and the few operations that those lack.
 * Included by kernels.inc.h once per type, after REAL, SUFFIX, FLOAT_BITS and VECTOR_BYTES are defined.
 * Everything is static: a copy compiled for one instruction set must never be linked into another's path.
 */

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

/* A product that no later sum may be fused with: contraction would differ between instruction sets. */
static inline vec rounded(vec x) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
    __asm__("" : "+v"(x));
#elif defined(__x86_64__)
    __asm__("" : "+x"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}

static inline vec if_nonzero(bits condition, vec a, vec b) {
    return (vec)(((bits)a & condition) | ((bits)b & ~condition));
}

/* Whether some bit is set. */
static inline bool any(bits x) {
#if VECTOR_BYTES == 64
    return _mm512_test_epi64_mask((__m512i)x, (__m512i)x) != 0;
#elif VECTOR_BYTES == 32
    return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    uint64_t half[2];
    memcpy(half, &x, sizeof half);
    return (half[0] | half[1]) != 0;
#endif
}

/* The instruction set follows from VECTOR_BYTES (64: AVX-512, 32: AVX2): clang's target pragma defines no macro.
 * fma_vec(a, b, c) = a * b + c; maximum(a, b): b where either is NaN (aarch64: NaN) or where both are 0 (aarch64: +0);
 * select(word, a, b): lane t is a's where bit t of word is set;
 * load_part / store_part: the first n < LANES elements, 0 beyond. */
#if VECTOR_BYTES == 64 && FLOAT_BITS == 32
static inline vec fma_vec(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline vec maximum(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vec select_lanes(uint64_t word, vec a, vec b) {
    return (vec)_mm512_mask_blend_ps((__mmask16)word, (__m512)b, (__m512)a);
}
static inline vec load_part(const REAL *p, int n) { return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
static inline void store_part(REAL *p, vec x, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
}
#elif VECTOR_BYTES == 64
static inline vec fma_vec(vec a, vec b, vec c) { return (vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
static inline vec maximum(vec a, vec b) { return (vec)_mm512_max_pd((__m512d)a, (__m512d)b); }
static inline vec select_lanes(uint64_t word, vec a, vec b) {
    return (vec)_mm512_mask_blend_pd((__mmask8)word, (__m512d)b, (__m512d)a);
}
static inline vec load_part(const REAL *p, int n) { return (vec)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p); }
static inline void store_part(REAL *p, vec x, int n) {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)x);
}
#else
#if VECTOR_BYTES * 8 / FLOAT_BITS == 8
static const bits lane_bit = {1, 2, 4, 8, 16, 32, 64, 128};
#elif VECTOR_BYTES * 8 / FLOAT_BITS == 4
static const bits lane_bit = {1, 2, 4, 8};
#else
static const bits lane_bit = {1, 2};
#endif
#if VECTOR_BYTES == 32 && FLOAT_BITS == 32
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
#elif VECTOR_BYTES == 32
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
#if defined(__aarch64__) && FLOAT_BITS == 32
static inline vec fma_vec(vec a, vec b, vec c) {
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
static inline vec maximum(vec a, vec b) { return (vec)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
#elif defined(__aarch64__)
static inline vec fma_vec(vec a, vec b, vec c) {
    return (vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
static inline vec maximum(vec a, vec b) { return (vec)vmaxq_f64((float64x2_t)a, (float64x2_t)b); }
#else
static inline vec fma_vec(vec a, vec b, vec c) { return rounded(a * b) + c; }
static inline vec maximum(vec a, vec b) { return if_nonzero((bits)(a > b), a, b); }
#endif
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
#endif

/* Integers of 64 bits. load_words / store_words: each from, or its lower half to, 32 bits; product_of_low: of the lower
 * halves, whatever the upper ones hold. */
typedef uint64_t longs __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t words_of_longs __attribute__((vector_size(VECTOR_BYTES / 2), aligned(4), may_alias));
static inline longs load_words(const uint32_t *p) { return __builtin_convertvector(*(const words_of_longs *)p, longs); }
static inline void store_words(uint32_t *p, longs x) {
    *(words_of_longs *)p = __builtin_convertvector(x, words_of_longs);
}
#if VECTOR_BYTES == 64
static inline longs product_of_low(longs a, longs b) { return (longs)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif VECTOR_BYTES == 32
static inline longs product_of_low(longs a, longs b) { return (longs)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(__x86_64__)
static inline longs product_of_low(longs a, longs b) { return (longs)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#elif defined(__aarch64__)
static inline longs product_of_low(longs a, longs b) {
    return (longs)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}
#else
static inline longs product_of_low(longs a, longs b) { return (a & UINT32_MAX) * (b & UINT32_MAX); }
#endif

/* low and high halves of a and b, interleaved: a0 b0 a1 b1 ... */
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

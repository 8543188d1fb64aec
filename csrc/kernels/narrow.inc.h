// SPDX-License-Identifier: Apache-2.0
/*
 * The 16-bit formats (kernels.h says what each function computes). isa.inc.h includes this file after bodies.inc.h for
 * float, whose parameters it shares. It uses no conversions of an instruction set, so that
 * every instruction set gives the same bits, those of a NaN too.
 */
typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t unaligned_halves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

/* Numbers of 16 bits as words, and words whose upper halves are zeros as numbers of 16 bits. GCC converts vectors of 64
 * bytes half by half. */
#ifdef TARGET_AVX512
INLINE words words_of(halves x) { return (words)_mm512_cvtepu16_epi32((__m256i)x); }
INLINE halves halves_of(words x) { return (halves)_mm512_cvtepi32_epi16((__m512i)x); }
#else
INLINE words words_of(halves x) { return __builtin_convertvector(x, words); }
INLINE halves halves_of(words x) { return __builtin_convertvector(x, halves); }
#endif

INLINE words either(words condition, words a, words b) { return (a & condition) | (b & ~condition); }

/* bfloat16 is the upper half of a float. */
INLINE words bf16_widen(words x) { return x << 16; }

INLINE words bf16_narrow(words x) {
    const words nearest = (x + 0x7fff + (x >> 16 & 1)) >> 16; /* ties to even */
    return either((words)((x & 0x7fffffff) > 0x7f800000), x >> 16 | 0x40, nearest);
}

/* float16's exponent has bias 15, float's has 127: magnitude * 2^112 corrects it, for subnormal numbers too. */
INLINE words f16_widen(words x) {
    const words magnitude = (x & 0x7fff) << 13;
    const vec number = (vec)magnitude * broadcast(0x1p112f);
    const words special = (words)((x & 0x7c00) == 0x7c00); /* Inf, NaN */
    return either(special, magnitude | 0x7f800000, (words)number) | (x & 0x8000) << 16;
}

INLINE words f16_narrow(words x) {
    const words magnitude = x & 0x7fffffff, sign = x >> 16 & 0x8000;
    const words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13; /* Inf from 65520 on */
    /* In [1/2, 1) the last bit of a float is worth the last bit of a subnormal float16: adding 1/2 rounds to it. */
    const words subnormal = (words)((vec)magnitude + broadcast(0.5f)) - 0x3f000000;
    words half = either((words)(magnitude < 0x38800000), subnormal, normal);
    half = either((words)(magnitude >= 0x47800000), (words){0} + 0x7c00, half);
    return sign | either((words)(magnitude > 0x7f800000), 0x7e00 | (magnitude >> 13 & 0x3ff), half);
}

#ifdef DOT_PAIRS
#include "kernels/pairs.inc.h"
#define PAIRS PAIR_GEMM, .pack = pair_pack, .interleave = pair_interleave, .pair = pair_narrow, .round = pair_round
#else
#define PAIRS .gemm = NULL
#endif

#define FORMAT(format)                                                                     \
    INLINE vec format##_load(const uint16_t *p) {                                          \
        return (vec)format##_widen(words_of(*(const unaligned_halves *)p));                \
    }                                                                                      \
    INLINE vec format##_load_part(const uint16_t *p, int n) {                              \
        halves part = {0};                                                                 \
        memcpy(&part, p, (size_t)n * sizeof *p);                                           \
        return (vec)format##_widen(words_of(part));                                        \
    }                                                                                      \
    static void format##_widen_row(int64_t n, const uint16_t *x, float *y) {               \
        int64_t i = 0;                                                                     \
        for (; i + LANES <= n; i += LANES)                                                 \
            store(y + i, format##_load(x + i));                                            \
        if (i < n)                                                                         \
            store_part(y + i, format##_load_part(x + i, (int)(n - i)), (int)(n - i));      \
    }                                                                                      \
    static void format##_narrow_row(int64_t n, const float *x, uint16_t *y) {              \
        int64_t i = 0;                                                                     \
        for (; i + LANES <= n; i += LANES)                                                 \
            *(unaligned_halves *)(y + i) = halves_of(format##_narrow((words)load(x + i))); \
        if (i < n) {                                                                       \
            const words rest = format##_narrow((words)load_part(x + i, (int)(n - i)));     \
            const halves last = halves_of(rest);                                           \
            memcpy(y + i, &last, (size_t)(n - i) * sizeof *y);                             \
        }                                                                                  \
    }
FORMAT(bf16)
FORMAT(f16)
#undef FORMAT

#define P(name) bf16_##name
#define ROW uint16_t
#define LOAD bf16_load
#define LOAD_PART bf16_load_part
#include "kernels/maxima.inc.h"

#define P(name) f16_##name
#define ROW uint16_t
#define LOAD f16_load
#define LOAD_PART f16_load_part
#include "kernels/maxima.inc.h"

#define TABLE(format, ...)                                      \
    const cmb_narrow_format NAME3(cmb_narrow_, ISA, format) = { \
        .widen = format##_widen_row,                            \
        .narrow = format##_narrow_row,                          \
        .max_pool = format##_max_pool,                          \
        .max_pool_backward = format##_max_pool_backward,        \
        __VA_ARGS__,                                            \
    };
TABLE(bf16, PAIRS)
TABLE(f16, .gemm = NULL)
#undef TABLE
#undef PAIRS

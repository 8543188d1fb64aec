// SPDX-License-Identifier: Apache-2.0
/* For test_kernels.c: the tables under test, and the case at hand: its fenced arrays, and the digest of its results. */
#ifndef CMB_KERNEL_CASES_H
#define CMB_KERNEL_CASES_H

#include "kernels/kernels.h"
#include "pages.h"
#include "random.h"
#include "testlib.h"

#include <unistd.h>

static const struct {
    const char *name;
    bool fused; /* multiply-add rounds once */
    const cmb_kernels_f32 *f32;
    const cmb_kernels_f64 *f64;
    const cmb_narrow_format *bf16, *f16;
} isas[] = {
#ifdef __aarch64__
#define IS_FUSED(NAME) true
#else
#define IS_FUSED(NAME) (CMB_ISA_##NAME != CMB_ISA_BASE)
#endif
#define TABLES_OF(name, NAME, ...) \
    {#name,                        \
     IS_FUSED(NAME),               \
     &cmb_kernels_##name##_f32,    \
     &cmb_kernels_##name##_f64,    \
     &cmb_narrow_##name##_bf16,    \
     &cmb_narrow_##name##_f16},
    CMB_ISAS(TABLES_OF, )};

static char context[200]; /* the case at hand, for the message of a failure */

#define CASE(...) snprintf(context, sizeof context, __VA_ARGS__)

static void on_fault(int signal_number) {
    (void)signal_number;
    static const char text[] = "touched memory outside of its arrays: ";
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0 ||
        write(STDERR_FILENO, context, (unsigned)strlen(context)) < 0 || write(STDERR_FILENO, "\n", 1) < 0)
        _Exit(2);
    _Exit(1);
}

/* Philox4x32-10 as its authors write it: ten rounds of one counter, the key increased between them. */
static void philox(uint32_t word[4], const uint32_t key[2]) {
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        const uint64_t a = (uint64_t)0xD2511F53 * word[0], c = (uint64_t)0xCD9E8D57 * word[2];
        const uint32_t next[4] = {(uint32_t)(c >> 32) ^ word[1] ^ k0, (uint32_t)c, (uint32_t)(a >> 32) ^ word[3] ^ k1,
                                  (uint32_t)a};
        memcpy(word, next, sizeof next);
    }
}

/* ---- fenced memory ------------------------------------------------------------------------------ */

enum { SLOTS = 320, SLOT_BYTES = 64 << 10, CANARY_BYTES = 64, CANARY = 0xff }; /* a canary read as a number is NaN */

static struct {
    char *base;
    size_t stride;
    int used;
    struct {
        char *begin, *end;
    } array[SLOTS];
} fence;

static void raise_fence(void) {
    fence.stride = SLOT_BYTES + page_bytes();
    fence.base = map_pages(SLOTS * fence.stride);
    CHECK(fence.base);
    for (int i = 0; i < SLOTS; i++)
        CHECK(forbid_page(fence.base + (size_t)i * fence.stride + SLOT_BYTES));
}

/* An array full of canaries, between canaries. Three in four end at the forbidden page, the others a few elements
 * before it, so that there are other alignments. */
static void *take(int64_t count, size_t size) {
    CHECK(fence.used < SLOTS);
    char *stop = fence.base + (size_t)fence.used * fence.stride + SLOT_BYTES;
    const size_t bytes = (size_t)count * size, after = random_below(4) ? 0 : size * (size_t)(1 + random_below(7));
    CHECK(bytes + after + CANARY_BYTES <= SLOT_BYTES);
    char *begin = stop - after - bytes;
    memset(begin - CANARY_BYTES, CANARY, CANARY_BYTES + bytes + after);
    fence.array[fence.used].begin = begin;
    fence.array[fence.used++].end = begin + bytes;
    return begin;
}

static void check_fence(void) {
    for (int i = 0; i < fence.used; i++) {
        const char *begin = fence.array[i].begin, *end = fence.array[i].end;
        const char *stop = fence.base + (size_t)i * fence.stride + SLOT_BYTES;
        for (const char *c = begin - CANARY_BYTES; c < begin; c++)
            CHECK(*c == (char)CANARY, "wrote before an array: %s", context);
        for (const char *c = end; c < stop; c++)
            CHECK(*c == (char)CANARY, "wrote after an array: %s", context);
    }
    fence.used = 0;
}

/* ---- the same bits ------------------------------------------------------------------------------ */

static uint64_t digest; /* of the results of one instruction set */

static void check_digest(int isa) {
    static uint64_t expected;
    static bool known;
    if (isa == 0)
        known = false;
    if (isas[isa].fused) {
        CHECK(!known || digest == expected, "%s: other bits than the set before: %s", isas[isa].name, context);
        expected = digest;
        known = true;
    }
    digest = 0;
}

static void add_to_digest(uint64_t word) { digest = (digest ^ word) * UINT64_C(0x100000001b3) + 1; }

#endif

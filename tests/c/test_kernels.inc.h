// SPDX-License-Identifier: Apache-2.0
/*
 * The tests of test_kernels.c for one type (REAL, SUFFIX), judged in the next wider one (WIDE). A test makes a case,
 * runs it on every instruction set in arrays of its own, and compares each result with the definition: to the last bit
 * where there is only one rounding. REAL_EPSILON is two rounding errors.
 */

#define T(name) NAME2(name, SUFFIX)
#define KERNELS NAME2(cmb_kernels, SUFFIX)

/* ---- arrays ------------------------------------------------------------------------------------- */

static REAL *T(reals)(int64_t n) { return take(n, sizeof(REAL)); }

static REAL *T(copies)(const REAL *x, int64_t n) { return memcpy(T(reals)(n), x, (size_t)n * sizeof(REAL)); }

static REAL *T(uniforms)(int64_t n, double from, double to) {
    REAL *x = T(reals)(n);
    for (int64_t i = 0; i < n; i++)
        x[i] = (REAL)uniform(from, to);
    return x;
}

/* Small integers: many are equal, and zeros have either sign. */
static REAL *T(small_numbers)(int64_t n) {
    REAL *x = T(reals)(n);
    for (int64_t i = 0; i < n; i++) {
        x[i] = (REAL)(random_below(7) - 3);
        if (x[i] == 0 && random_below(2))
            x[i] = -x[i];
    }
    return x;
}

/* Pointers to n rows, each an array with a fence of its own. */
static REAL **T(rows)(int64_t n, int64_t dim) {
    REAL **row = take(n, sizeof *row);
    for (int64_t i = 0; i < n; i++)
        row[i] = T(uniforms)(dim, -1, 1);
    return row;
}

static const REAL *const *T(read)(REAL *const *row) { return (const REAL *const *)row; }

static bool T(same)(REAL x, REAL y) { return memcmp(&x, &y, sizeof x) == 0; }

/* All NaN count as equal. */
static void T(digest)(const REAL *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        REAL_BITS word = 0;
        memcpy(&word, &x[i], sizeof word);
        add_to_digest(x[i] == x[i] ? word : 1);
    }
}

static void T(check_near)(int isa, const char *what, int64_t at, REAL got, WIDE want, WIDE slack) {
    if (want != want)
        CHECK(got != got, "%s %s[%lld] is %g, not NaN: %s", isas[isa].name, what, (long long)at, (double)got, context);
    else
        CHECK(WIDE_ABS((WIDE)got - want) <= slack, "%s %s[%lld] is %.17g, not %.17g within %g: %s", isas[isa].name,
              what, (long long)at, (double)got, (double)want, (double)slack, context);
}

#include "kernel_products.inc.h"

#include "kernel_softmax.inc.h"

#include "kernel_rows.inc.h"

#include "kernel_bench.inc.h"

#undef T
#undef KERNELS

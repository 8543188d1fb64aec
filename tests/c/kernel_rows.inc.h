// SPDX-License-Identifier: Apache-2.0
/* For test_kernels.c: elementwise kernels, maxima, e^x. */

/* ---- elementwise -------------------------------------------------------------------------------- */

static void T(scale_and_divide)(void) {
    for (int n = 0; n <= 100; n += n < 70 ? 1 : 6) {
        CASE("scale and divide n %d", n);
        REAL *x = T(uniforms)(n, -3, 3);
        const REAL factor = (REAL)uniform(-2, 2), odd[] = {(REAL)NAN, (REAL)INFINITY, REAL_MOST, -0.0f};
        if (n > 0)
            x[random_below(n)] = odd[random_below(4)];
        for (int isa = 0; isa < cmb_isa_count(); isa++) {
            REAL *scaled = T(copies)(x, n), *divided = T(reals)(n);
            isas[isa].SUFFIX->scale(n, scaled, factor);
            isas[isa].SUFFIX->divide(n, x, factor, divided);
            for (int i = 0; i < n; i++) {
                const REAL quotient = x[i] / factor;
                CHECK(x[i] != x[i] ? scaled[i] != scaled[i] && divided[i] != divided[i]
                                   : T(same)(scaled[i], x[i] * factor) && T(same)(divided[i], quotient),
                      "%s [%d]: %s", isas[isa].name, i, context);
            }
            T(digest)(scaled, n);
            T(digest)(divided, n);
            check_digest(isa);
        }
        check_fence();
    }
}

static void T(finite)(void) {
    const REAL odd[] = {(REAL)NAN, (REAL)INFINITY, -(REAL)INFINITY};
    for (int n = 0; n <= 70; n++) {
        CASE("finite n %d", n);
        REAL *x = T(uniforms)(n, -1, 1);
        for (int i = 0; i < n; i += 3)
            x[i] = i % 2 ? REAL_MOST : -REAL_MOST;
        for (int isa = 0; isa < cmb_isa_count(); isa++) {
            CHECK(isas[isa].SUFFIX->finite(n, x), "%s: %s", isas[isa].name, context);
            for (int i = 0; i < n; i++) {
                const REAL kept = x[i];
                x[i] = odd[i % 3];
                CHECK(!isas[isa].SUFFIX->finite(n, x), "%s missed [%d]: %s", isas[isa].name, i, context);
                x[i] = kept;
            }
        }
        check_fence();
    }
}

/* ---- max pooling -------------------------------------------------------------------------------- */

/* The greater one: a NaN is the greatest, of equals `top` stays. */
static REAL T(greater)(REAL x, REAL top) { return x > top || (x != x && top == top) ? x : top; }

static REAL **T(pool_rows)(int n, int64_t dim) {
    REAL **row = take(n, sizeof *row);
    const bool all_finite = random_below(2);
    for (int i = 0; i < n; i++) {
        row[i] = T(small_numbers)(dim);
        for (int64_t d = 0; d < dim; d++)
            if (!all_finite && random_below(40) == 0)
                row[i][d] = random_below(2) ? (REAL)NAN : -(REAL)INFINITY;
    }
    return row;
}

static void T(max_pool)(void) {
    for (int64_t dim = 1; dim <= 70; dim++)
        for (int n = 0; n <= 20; n += 1 + random_below(6))
            for (int add = n == 0; add < 2; add++) {
                CASE("max_pool of %d rows of %lld add %d", n, (long long)dim, add);
                const REAL *const *row = T(read)(T(pool_rows)(n, dim));
                const REAL *before = T(small_numbers)(dim);
                for (int isa = 0; isa < cmb_isa_count(); isa++) {
                    REAL *top = T(copies)(before, dim);
                    isas[isa].SUFFIX->max_pool(n, row, dim, top, add);
                    for (int64_t d = 0; d < dim; d++) {
                        REAL want = add ? before[d] : row[0][d];
                        for (int i = 0; i < n; i++)
                            want = T(greater)(row[i][d], want);
                        CHECK(want != want ? top[d] != top[d] : T(same)(top[d], want), "%s [%lld] is %g, not %g: %s",
                              isas[isa].name, (long long)d, (double)top[d], (double)want, context);
                    }
                    T(digest)(top, dim);
                    check_digest(isa);
                }
                check_fence();
            }
}

/* Results known by hand. Columns: NaN first, NaN last, -0 then 0, 0 then -0, all -inf, all NaN. */
static void T(max_pool_rules)(void) {
    const REAL nan = (REAL)NAN, low = -(REAL)INFINITY, first[] = {nan, 1, -0.0f, 0, low, nan},
               last[] = {1, nan, 0, -0.0f, low, nan}, ones[] = {1, 1, 1, 1, 1, 1};
    const REAL *const row[] = {first, last};
    CASE("max_pool by hand");
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        REAL top[6], first_grad[6] = {0}, last_grad[6] = {0}, *const grad_row[] = {first_grad, last_grad};
        isas[isa].SUFFIX->max_pool(2, row, 6, top, false);
        CHECK(top[0] != top[0] && top[1] != top[1] && signbit(top[2]) && !signbit(top[3]) && top[4] == low &&
                  top[5] != top[5],
              "%s", isas[isa].name);
        isas[isa].SUFFIX->max_pool_backward(2, row, 6, top, ones, grad_row);
        for (int d = 0; d < 6; d++)
            CHECK(first_grad[d] == (d != 1) && last_grad[d] == (d == 1), "%s [%d]", isas[isa].name, d);

        const REAL *many[20] = {first + 2};
        for (int i = 1; i < 20; i++)
            many[i] = last + 2;
        isas[isa].SUFFIX->max_pool(20, many, 2, top, false);
        CHECK(signbit(top[0]) && !signbit(top[1]), "%s: of many rows", isas[isa].name);
    }
}

static void T(max_pool_backward)(void) {
    for (int64_t dim = 1; dim <= 70; dim++)
        for (int n = 1; n <= 20; n += 1 + random_below(6)) {
            CASE("max_pool_backward of %d rows of %lld", n, (long long)dim);
            const REAL *const *row = T(read)(T(pool_rows)(n, dim)), *const *before = T(read)(T(rows)(n, dim));
            REAL *top = T(small_numbers)(dim), *grad = T(uniforms)(dim, -1, 1), **got = T(rows)(n, dim);
            for (int64_t d = 0; d < dim; d++) { /* one in ten is a maximum that no row holds */
                top[d] = random_below(10) ? row[0][d] : 9;
                for (int i = 0; i < n; i++)
                    top[d] = T(greater)(row[i][d], top[d]);
            }
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                for (int i = 0; i < n; i++)
                    memcpy(got[i], before[i], (size_t)dim * sizeof(REAL));
                isas[isa].SUFFIX->max_pool_backward(n, row, dim, top, grad, got);
                for (int64_t d = 0; d < dim; d++) {
                    bool given = false;
                    for (int i = 0; i < n; i++) {
                        const bool hit =
                            !given && (row[i][d] == top[d] || (row[i][d] != row[i][d] && top[d] != top[d]));
                        CHECK(T(same)(got[i][d], hit ? before[i][d] + grad[d] : before[i][d]), "%s row %d [%lld]: %s",
                              isas[isa].name, i, (long long)d, context);
                        given |= hit;
                    }
                }
            }
            check_fence();
        }
}

/* ---- the largest of a column -------------------------------------------------------------------- */

static void T(argmax)(void) {
    for (int width = 16; width <= 64; width += 16)
        for (int n = 0; n <= 40; n += n < 12 ? 1 : 7) {
            CASE("argmax of %d rows of width %d", n, width);
            REAL *s = T(small_numbers)((int64_t)n * width);
            for (int64_t i = 0; i < (int64_t)n * width; i++)
                if (random_below(30) == 0)
                    s[i] = random_below(2) ? (REAL)NAN : -(REAL)INFINITY;
            for (int i = 0; i < n; i++) { /* a column of NaN and one of -inf */
                s[i * width] = (REAL)NAN;
                s[i * width + 1] = -(REAL)INFINITY;
            }
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                REAL *top = T(reals)(width), *arg = T(reals)(width);
                isas[isa].SUFFIX->argmax(n, s, width, top, arg);
                for (int t = 0; t < width; t++) {
                    REAL want = -(REAL)INFINITY;
                    int which = 0;
                    for (int i = 0; i < n; i++)
                        if (s[i * width + t] > want) {
                            want = s[i * width + t];
                            which = i;
                        }
                    CHECK(T(same)(top[t], want) && T(same)(arg[t], (REAL)which),
                          "%s [%d] is %g at %g, not %g at %d: %s", isas[isa].name, t, (double)top[t], (double)arg[t],
                          (double)want, which, context);
                }
                T(digest)(top, width);
                T(digest)(arg, width);
                check_digest(isa);
            }
            check_fence();
        }
}

/* ---- e^x ---------------------------------------------------------------------------------------- */

static void T(exp_edges)(void) {
    const REAL inf = (REAL)INFINITY, deepest = (REAL)-DEEPEST;
    const REAL x[] = {0, -0.0f, -inf, deepest, deepest - 1, -REAL_MOST, (REAL)NAN, -(REAL)NAN, 1, -1, deepest / 2};
    enum { COUNT = sizeof x / sizeof *x, EXACT = 8 };
    const REAL y[EXACT] = {1, 1, 0, 0, 0, 0, (REAL)NAN, (REAL)NAN};
    for (int n = 0; n <= 40; n++)
        for (int first = 0; first < COUNT; first++) {
            CASE("exp n %d first %d", n, first);
            REAL *in = T(reals)(n);
            for (int i = 0; i < n; i++)
                in[i] = x[(first + i) % COUNT];
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                REAL *out = T(reals)(n);
                isas[isa].SUFFIX->exp(n, in, out);
                for (int i = 0; i < n; i++) {
                    const int at = (first + i) % COUNT;
                    if (at < EXACT)
                        CHECK(x[at] != x[at] ? out[i] != out[i] : T(same)(out[i], y[at]), "%s: e^%g is %g: %s",
                              isas[isa].name, (double)x[at], (double)out[i], context);
                    else
                        T(check_near)
                    (isa, "y", i, out[i], WIDE_EXP((WIDE)x[at]), WIDE_EXP((WIDE)x[at]) * 2 * REAL_EPSILON);
                }
                T(digest)(out, n);
                check_digest(isa);
            }
            check_fence();
        }
}

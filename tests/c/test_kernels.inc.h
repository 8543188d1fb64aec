// SPDX-License-Identifier: Apache-2.0
/*
 * The checks of test_kernels.c for one type (REAL, SUFFIX), judged in the next wider one (WIDE). A check makes a
 * case, runs it on every instruction set in arrays of its own and compares each result with the definition, to
 * the last bit where only one rounding is involved. REAL_EPSILON is two rounding errors.
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

/* Whole numbers, of which many are equal, zeros of both signs among them. */
static REAL *T(small_numbers)(int64_t n) {
    REAL *x = T(reals)(n);
    for (int64_t i = 0; i < n; i++) {
        x[i] = (REAL)(random_below(7) - 3);
        if (x[i] == 0 && random_below(2))
            x[i] = -x[i];
    }
    return x;
}

/* Rows that lie anywhere, in an array of pointers with its own fence. */
static REAL **T(rows)(int64_t n, int64_t dim) {
    REAL **row = take(n, sizeof *row);
    for (int64_t i = 0; i < n; i++)
        row[i] = T(uniforms)(dim, -1, 1);
    return row;
}

static const REAL *const *T(read)(REAL *const *row) { return (const REAL *const *)row; }

static bool T(same)(REAL x, REAL y) { return memcmp(&x, &y, sizeof x) == 0; }

/* A NaN's sign and payload are no part of a result. */
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

/* ---- rows that lie apart ------------------------------------------------------------------------- */

static void T(gather)(void) {
    for (int isa = 0; isa < cmb_isa_count(); isa++)
        for (int n = 1; n <= 9; n++)
            for (int64_t dim = 1; dim < 70; dim += 1 + random_below(5)) {
                CASE("gather %d rows of %lld", n, (long long)dim);
                REAL *copy = T(reals)(n * dim);
                const REAL *row[9], *from[9];
                for (int i = 0; i < n; i++)
                    from[i] = row[i] = T(uniforms)(dim, -1, 1);
                isas[isa].SUFFIX->gather(n, row, dim, copy);
                for (int i = 0; i < n; i++)
                    CHECK(row[i] == copy + i * dim && memcmp(row[i], from[i], (size_t)dim * sizeof(REAL)) == 0,
                          "%s [%d]: %s", isas[isa].name, i, context);
                check_fence();
            }
}

/* ---- packing and products ----------------------------------------------------------------------- */

static void T(check_pack)(int n, int64_t dim, int width) {
    CASE("pack %d rows of %lld to width %d", n, (long long)dim, width);
    const REAL *const *row = T(read)(T(rows)(n, dim));
    const REAL factor = (REAL)uniform(0.1, 2);
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        REAL *packed = T(reals)(dim * width);
        isas[isa].SUFFIX->pack(n, row, dim, factor, width, packed);
        for (int64_t i = 0; i < dim * width; i++) {
            const int lane = (int)(i % width);
            CHECK(T(same)(packed[i], lane < n ? row[lane][i / width] * factor : 0), "%s [%lld]: %s", isas[isa].name,
                  (long long)i, context);
        }
    }
    check_fence();
}

static void T(pack)(void) {
    static const int64_t dims[] = {1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 23, 31, 32, 33, 59, 64, 111};
    for (int width = 16; width <= 64; width += 16)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
            for (int n = 0; n <= width; n += 1 + random_below(6))
                T(check_pack)(n, dims[d], width);
}

static void T(check_product)(int m, int n, int k, int step, int column, bool add) {
    CASE("product m %d n %d k %d step %d column %d add %d", m, n, k, step, column, add);
    const REAL *const *a = T(read)(T(rows)(m, k ? (int64_t)(k - 1) * step + 1 : 0));
    const REAL *const *b = T(read)(T(rows)(k, column + n));
    const REAL *const *before = T(read)(T(rows)(m, column + n));
    REAL **c = T(rows)(m, column + n);
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        for (int i = 0; i < m; i++)
            memcpy(c[i], before[i], (size_t)(column + n) * sizeof(REAL));
        isas[isa].SUFFIX->product(m, n, k, a, step, b, c, column, add);
        for (int i = 0; i < m; i++) {
            CHECK(memcmp(c[i], before[i], (size_t)column * sizeof(REAL)) == 0, "%s: wrote before its columns: %s",
                  isas[isa].name, context);
            for (int j = column; j < column + n; j++) {
                WIDE sum = 0, size = 0;
                for (int t = 0; t < k; t++) {
                    const WIDE term = (WIDE)a[i][t * step] * (WIDE)b[t][j];
                    sum += term;
                    size += WIDE_ABS(term);
                }
                if (add) {
                    sum += (WIDE)before[i][j];
                    size += WIDE_ABS((WIDE)before[i][j]);
                }
                /* k + 1 roundings of partial sums, k of products where not fused */
                T(check_near)(isa, "c", i * n + j - column, c[i][j], sum, (WIDE)(k + 1) * REAL_EPSILON * size);
            }
            T(digest)(c[i], column + n);
        }
        check_digest(isa);
    }
    check_fence();
}

static void T(product)(void) {
    for (int n = 0; n <= 66; n++) /* every width of the micro-kernels and every tail */
        for (int m = 0; m <= 13; m += n % 2 ? 1 : 4)
            T(check_product)(m, n, 3, 1, 0, m % 2);
    for (int round = 0; round < 400; round++) {
        const int steps[] = {0, 1, 16, 64};
        T(check_product)
        (random_below(27), random_below(112), random_below(40), steps[random_below(4)],
         random_below(3) * random_below(20), random_below(2));
    }
    T(check_product)(64, 64, 96, 64, 0, true);
    T(check_product)(30, 64, 64, 1, 0, false);
    T(check_product)(1, 1000, 30, 1, 0, true);
}

static void T(dot)(void) {
    for (int64_t dim = 1; dim <= 130; dim++)
        for (int64_t n = 0; n <= 5; n += 1 + dim % 3) {
            CASE("dot of %lld rows of %lld", (long long)n, (long long)dim);
            const REAL *const *row = T(read)(T(rows)(n, dim));
            const REAL *x = T(uniforms)(dim, -1, 1);
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                REAL *s = T(reals)(n);
                isas[isa].SUFFIX->dot(n, row, dim, x, s);
                for (int64_t i = 0; i < n; i++) {
                    WIDE sum = 0, size = 0;
                    for (int64_t d = 0; d < dim; d++) {
                        sum += (WIDE)row[i][d] * (WIDE)x[d];
                        size += WIDE_ABS((WIDE)row[i][d] * (WIDE)x[d]);
                    }
                    /* dim / 16 roundings in a lane, 4 of the lanes' sum */
                    T(check_near)(isa, "s", i, s[i], sum, (WIDE)(dim / 16 + 5) * REAL_EPSILON * size);
                }
                T(digest)(s, n);
                check_digest(isa);
            }
            check_fence();
        }
}

/* ---- softmax ------------------------------------------------------------------------------------ */

/* 2^(x - base) and how far off it may be: x - base is rounded before it is an exponent. */
static WIDE T(power)(REAL x, WIDE base, WIDE *slack) {
    const WIDE exponent = (WIDE)x - base, p = exponent < -DEEPEST - 100 ? 0 : WIDE_EXP2(exponent);
    *slack = p > 0 ? p * (2 + WIDE_ABS(exponent)) * REAL_EPSILON + REAL_LEAST : REAL_LEAST;
    return p;
}

/* The definition for one lane or row: m, l and s before, and what comes out. Logits that are not live are not
 * looked at. */
static void T(check_softmax)(int isa, int64_t n, const REAL *s, int64_t stride, const bool *live, REAL m, REAL l,
                             const REAL *p, REAL got_m, REAL got_l, REAL got_alpha) {
    REAL top = m;
    for (int64_t i = 0; i < n; i++)
        if (live[i] && s[i * stride] > top)
            top = s[i * stride];
    const WIDE base = top > -REAL_MOST ? (WIDE)top : -(WIDE)REAL_MOST;
    WIDE slack, alpha = T(power)(m, base, &slack), sum = (WIDE)l * alpha, sum_slack = (WIDE)l * slack;
    T(check_near)(isa, "alpha", 0, got_alpha, alpha, slack);
    for (int64_t i = 0; i < n; i++) {
        const WIDE want = live[i] ? T(power)(s[i * stride], base, &slack) : 0;
        T(check_near)(isa, "p", i, p[i * stride], want, live[i] ? slack : 0);
        sum += want;
        sum_slack += live[i] ? slack : 0;
    }
    CHECK(T(same)(got_m, top), "%s m is %g, not %g: %s", isas[isa].name, (double)got_m, (double)top, context);
    T(check_near)(isa, "l", 0, got_l, sum, sum_slack + (WIDE)(n + 2) * REAL_EPSILON * sum);
}

/* Logits of one softmax: near one another, far below, -inf. */
static REAL T(logit)(void) {
    const int kind = random_below(20);
    return kind == 0 ? -(REAL)INFINITY : (REAL)uniform(kind == 1 ? -1.2 * DEEPEST : -8, 8);
}

/* m and l as earlier rows left them, or as at the start. */
static void T(softmax_state)(int n, REAL *m, REAL *l) {
    for (int i = 0; i < n; i++) {
        const bool begun = random_below(3) > 0;
        m[i] = begun ? (REAL)uniform(-10, 10) : -(REAL)INFINITY;
        l[i] = begun ? (REAL)uniform(1, 50) : 0;
    }
}

static void T(check_softmax_tile)(int n, int width, int lane0, bool masked) {
    CASE("softmax n %d width %d lane0 %d masked %d", n, width, lane0, masked);
    REAL *s = T(reals)((int64_t)n * width), *m = T(reals)(width), *l = T(reals)(width);
    uint64_t *mask = masked ? take(n, sizeof *mask) : NULL;
    T(softmax_state)(width, m, l);
    for (int i = 0; i < n; i++) {
        if (mask)
            mask[i] = random_below(4) ? random_bits() : 0;
        for (int t = 0; t < width; t++) {
            const REAL odd[] = {(REAL)NAN, (REAL)INFINITY, REAL_MOST, 0};
            s[i * width + t] = !mask || mask[i] >> t & 1 ? T(logit)() : odd[random_below(4)];
        }
    }
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        REAL *p = T(copies)(s, (int64_t)n * width), *new_m = T(copies)(m, width), *new_l = T(copies)(l, width);
        REAL *alpha = T(copies)(m, width);
        const bool changed = isas[isa].SUFFIX->softmax(n, p, width, mask, lane0, new_m, new_l, alpha);
        bool any = false;
        for (int t = 0; t < width; t++) {
            if (t < lane0 || t >= lane0 + CMB_GROUP) {
                for (int i = 0; i < n; i++)
                    CHECK(T(same)(p[i * width + t], s[i * width + t]), "%s: wrote to lane %d: %s", isas[isa].name, t,
                          context);
                CHECK(T(same)(new_m[t], m[t]) && T(same)(new_l[t], l[t]) && T(same)(alpha[t], m[t]),
                      "%s: wrote to lane %d: %s", isas[isa].name, t, context);
                continue;
            }
            bool live[64];
            for (int i = 0; i < n; i++)
                live[i] = !mask || mask[i] >> t & 1;
            T(check_softmax)(isa, n, s + t, width, live, m[t], l[t], p + t, new_m[t], new_l[t], alpha[t]);
            any |= alpha[t] != 1;
        }
        CHECK(changed == any, "%s: %s", isas[isa].name, context);
        T(digest)(p, (int64_t)n * width);
        T(digest)(new_m, width);
        T(digest)(new_l, width);
        T(digest)(alpha, width);
        check_digest(isa);
    }
    check_fence();
}

static void T(softmax)(void) {
    for (int width = 16; width <= 64; width += 16)
        for (int lane0 = 0; lane0 < width; lane0 += CMB_GROUP)
            for (int n = 0; n <= 48; n += n < 17 ? 1 : 7) {
                T(check_softmax_tile)(n, width, lane0, false);
                T(check_softmax_tile)(n, width, lane0, true);
            }
}

/* A NaN or +inf logit makes its own lane NaN and no other; a lane whose m rises above all rows keeps alpha 1. */
static void T(softmax_not_finite)(void) {
    const REAL odd[] = {(REAL)NAN, -(REAL)NAN, (REAL)INFINITY};
    for (int lane = 0; lane < CMB_GROUP; lane++)
        for (int kind = 0; kind < 3; kind++) {
            enum { N = 5 };
            const int row = random_below(N);
            CASE("softmax with %g in lane %d row %d", (double)odd[kind], lane, row);
            REAL *s = T(uniforms)(N * CMB_GROUP, -3, 3), *m = T(reals)(CMB_GROUP), *l = T(reals)(CMB_GROUP);
            for (int t = 0; t < CMB_GROUP; t++) {
                m[t] = 5;
                l[t] = 1;
            }
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                REAL *clean = T(copies)(s, N * CMB_GROUP), *p = T(copies)(s, N * CMB_GROUP);
                REAL *clean_m = T(copies)(m, CMB_GROUP), *clean_l = T(copies)(l, CMB_GROUP);
                REAL *new_m = T(copies)(m, CMB_GROUP), *new_l = T(copies)(l, CMB_GROUP), *alpha = T(reals)(CMB_GROUP);
                CHECK(!isas[isa].SUFFIX->softmax(N, clean, CMB_GROUP, NULL, 0, clean_m, clean_l, alpha));
                p[row * CMB_GROUP + lane] = odd[kind];
                isas[isa].SUFFIX->softmax(N, p, CMB_GROUP, NULL, 0, new_m, new_l, alpha);
                CHECK(p[row * CMB_GROUP + lane] != p[row * CMB_GROUP + lane], "%s: %s", isas[isa].name, context);
                for (int t = 0; t < CMB_GROUP; t++) {
                    if (t == lane) {
                        CHECK(new_l[t] != new_l[t], "%s: %s", isas[isa].name, context);
                        continue;
                    }
                    CHECK(T(same)(new_m[t], clean_m[t]) && T(same)(new_l[t], clean_l[t]) && alpha[t] == 1, "%s: %s",
                          isas[isa].name, context);
                    for (int i = 0; i < N; i++)
                        CHECK(T(same)(p[i * CMB_GROUP + t], clean[i * CMB_GROUP + t]), "%s: %s", isas[isa].name,
                              context);
                }
            }
            check_fence();
        }
}

static void T(row_softmax)(void) {
    for (int n = 0; n <= 100; n += n < 34 ? 1 : 11)
        for (int round = 0; round < 4; round++) {
            CASE("row_softmax n %d", n);
            const int room = (n + 15) / 16 * 16;
            REAL *s = T(reals)(room), m, l;
            bool live[100];
            T(softmax_state)(1, &m, &l);
            for (int i = 0; i < n; i++) {
                s[i] = T(logit)();
                live[i] = true;
            }
            if (round == 3) /* nothing but -inf, from the start */
                for (int i = 0; i < n; i++) {
                    s[i] = m = -(REAL)INFINITY;
                    l = 0;
                }
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                REAL *p = T(copies)(s, room), *state = T(reals)(3);
                state[0] = m;
                state[1] = l;
                state[2] = isas[isa].SUFFIX->row_softmax(n, p, &state[0], &state[1]);
                T(check_softmax)(isa, n, s, 1, live, m, l, p, state[0], state[1], state[2]);
                T(digest)(p, n);
                T(digest)(state, 3);
                check_digest(isa);
                if (n == 0)
                    continue;
                p[random_below(n)] = (REAL)NAN;
                isas[isa].SUFFIX->row_softmax(n, p, &state[0], &state[1]);
                CHECK(state[1] != state[1], "%s lost a NaN: %s", isas[isa].name, context);
            }
            check_fence();
        }
}

static void T(check_derivative)(int isa, int64_t at, REAL s, REAL dp, REAL lse2, REAL delta, REAL scale, bool live,
                                REAL got_p, REAL got_ds) {
    WIDE slack = 0;
    const WIDE p = live ? T(power)(s, (WIDE)lse2, &slack) : 0,
               factor = live ? ((WIDE)dp - (WIDE)delta) * (WIDE)scale : 0;
    T(check_near)(isa, "p", at, got_p, p, slack);
    T(check_near)(isa, "ds", at, got_ds, p * factor, WIDE_ABS(factor) * (slack + 2 * REAL_EPSILON * p) + REAL_LEAST);
    CHECK(live || (T(same)(got_p, 0) && T(same)(got_ds, 0)), "%s [%lld] is masked, not 0: %s", isas[isa].name,
          (long long)at, context);
}

/* `odd`: the place of a number that is not finite, or -1 */
static void T(check_softmax_backward)(int n, int width, int lane0, bool masked, int64_t odd) {
    CASE("softmax_backward n %d width %d lane0 %d masked %d odd %lld", n, width, lane0, masked, (long long)odd);
    const int64_t size = (int64_t)n * width;
    REAL *s = T(reals)(size), *dp = T(uniforms)(size, -3, 3);
    REAL *lse2 = T(uniforms)(width, 8, 12), *delta = T(uniforms)(width, -1, 1);
    const REAL factor = (REAL)uniform(0.1, 1);
    uint64_t *mask = masked ? take(n, sizeof *mask) : NULL;
    for (int i = 0; mask && i < n; i++)
        mask[i] = random_below(4) ? random_bits() : 0;
    for (int64_t i = 0; i < size; i++)
        s[i] = T(logit)();
    for (int64_t i = 0; i < size; i++)
        if (s[i] == -(REAL)INFINITY)
            s[i] = -2;
    if (odd >= 0)
        (random_below(2) ? s : dp)[odd] = random_below(2) ? (REAL)NAN : (REAL)INFINITY;
    const bool inside = odd >= 0 && odd % width >= lane0 && odd % width < lane0 + CMB_GROUP;
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        REAL *p = T(copies)(s, size), *ds = T(copies)(dp, size);
        const bool finite = isas[isa].SUFFIX->softmax_backward(n, p, ds, width, mask, lane0, lse2, delta, factor);
        CHECK(finite == !inside, "%s says finite %d: %s", isas[isa].name, finite, context);
        for (int64_t i = 0; i < size; i++) {
            const int t = (int)(i % width);
            if (t < lane0 || t >= lane0 + CMB_GROUP)
                CHECK(T(same)(p[i], s[i]) && T(same)(ds[i], dp[i]), "%s: wrote to lane %d: %s", isas[isa].name, t,
                      context);
            else if (i != odd || (mask && !(mask[i / width] >> t & 1)))
                T(check_derivative)
            (isa, i, s[i], dp[i], lse2[t], delta[t], factor, !mask || mask[i / width] >> t & 1, p[i], ds[i]);
            else CHECK(!isfinite(ds[i]), "%s [%lld]: %s", isas[isa].name, (long long)i, context);
        }
        T(digest)(p, size);
        T(digest)(ds, size);
        check_digest(isa);
    }
    check_fence();
}

static void T(softmax_backward)(void) {
    for (int width = 16; width <= 64; width += 16)
        for (int lane0 = 0; lane0 < width; lane0 += CMB_GROUP)
            for (int n = 0; n <= 48; n += n < 17 ? 1 : 7)
                for (int masked = 0; masked < 2; masked++) {
                    T(check_softmax_backward)(n, width, lane0, masked, -1);
                    if (n > 0)
                        T(check_softmax_backward)(n, width, lane0, masked, random_below(n * width));
                }
}

static void T(row_softmax_backward)(void) {
    for (int n = 0; n <= 100; n += n < 34 ? 1 : 11) {
        CASE("row_softmax_backward n %d", n);
        REAL *s = T(uniforms)(n, -1.1 * DEEPEST, 8), *dp = T(uniforms)(n, -3, 3);
        const REAL lse2 = (REAL)uniform(8, 12), delta = (REAL)uniform(-1, 1), factor = (REAL)uniform(0.1, 1);
        for (int isa = 0; isa < cmb_isa_count(); isa++) {
            REAL *p = T(copies)(s, n), *ds = T(copies)(dp, n);
            isas[isa].SUFFIX->row_softmax_backward(n, p, ds, lse2, delta, factor);
            for (int i = 0; i < n; i++)
                T(check_derivative)(isa, i, s[i], dp[i], lse2, delta, factor, true, p[i], ds[i]);
            T(digest)(p, n);
            T(digest)(ds, n);
            check_digest(isa);
        }
        check_fence();
    }
}

/* ---- dropout ------------------------------------------------------------------------------------ */

static void T(check_dropout)(int n, int width, const cmb_dropout *dropout) {
    CASE("dropout n %d width %d threshold %u", n, width, dropout->threshold);
    uint32_t *row = take(n, sizeof *row), *query = take(width, sizeof *query);
    for (int i = 0; i < n; i++) /* neighbours, and rows from anywhere */
        row[i] = i && random_below(4) ? row[i - 1] + 1 : (uint32_t)random_bits();
    for (int lane = 0; lane < width; lane++)
        query[lane] = (uint32_t)random_bits();
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        REAL *keep = T(reals)((int64_t)n * width), *x = T(uniforms)((int64_t)n * width, -1, 1);
        const REAL *before = T(copies)(x, (int64_t)n * width);
        isas[isa].SUFFIX->dropout(n, row, width, query, dropout, keep);
        isas[isa].SUFFIX->multiply((int64_t)n * width, keep, x);
        for (int i = 0; i < n * width; i++) {
            const uint32_t at = row[i / width] + dropout->row;
            uint32_t word[4] = {at / 4, query[i % width], dropout->head, dropout->batch};
            philox(word, (const uint32_t[]){(uint32_t)dropout->seed, (uint32_t)(dropout->seed >> 32)});
            const REAL factor = word[at % 4] >> 8 < dropout->threshold ? 0 : (REAL)dropout->factor;
            CHECK(T(same)(keep[i], factor) && T(same)(x[i], before[i] * factor), "%s [%d]: %s", isas[isa].name, i,
                  context);
        }
    }
    check_fence();
}

static void T(dropout)(void) {
    for (int n = 0; n <= 40; n += 1 + n / 4)
        for (int width = 0; width <= 64; width += 16)
            for (int p = 0; p <= 4; p++)
                T(check_dropout)
    (n, width ? width : 1,
     &(cmb_dropout){.threshold = (uint32_t)p << 22,
                    .factor = p < 4 ? 4 / (4.0 - p) : 0,
                    .head = (uint32_t)random_bits(),
                    .batch = (uint32_t)random_bits(),
                    .row = (uint32_t)random_bits(),
                    .seed = random_bits()});
}

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

/* A NaN above all, the first of equals. */
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

/* The rules by hand: columns are (NaN first), (NaN last), (-0 then 0), (0 then -0), (all -inf), (all NaN). */
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
            for (int64_t d = 0; d < dim; d++) { /* sometimes a maximum that no row holds */
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
            for (int i = 0; i < n; i++) { /* whole columns of either */
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

/* ---- 2^x ---------------------------------------------------------------------------------------- */

static void T(exp2_edges)(void) {
    const REAL inf = (REAL)INFINITY, deepest = (REAL)-DEEPEST;
    const REAL x[] = {0, -0.0f, 1, -1, -inf, deepest, deepest - 1, -REAL_MOST, (REAL)NAN, -(REAL)NAN, deepest / 2};
    enum { COUNT = sizeof x / sizeof *x };
    const REAL y[COUNT] = {1, 1, 2, 0.5f, 0, 0, 0, 0, (REAL)NAN, (REAL)NAN, (REAL)WIDE_EXP2((WIDE)(deepest / 2))};
    for (int n = 0; n <= 40; n++)
        for (int first = 0; first < COUNT; first++) {
            CASE("exp2 n %d first %d", n, first);
            REAL *in = T(reals)(n);
            for (int i = 0; i < n; i++)
                in[i] = x[(first + i) % COUNT];
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                REAL *out = T(reals)(n);
                isas[isa].SUFFIX->exp2(n, in, out);
                for (int i = 0; i < n; i++) {
                    const int at = (first + i) % COUNT;
                    if (at < COUNT - 1)
                        CHECK(x[at] != x[at] ? out[i] != out[i] : T(same)(out[i], y[at]), "%s: 2^%g is %g: %s",
                              isas[isa].name, (double)x[at], (double)out[i], context);
                    else
                        T(check_near)(isa, "y", i, out[i], (WIDE)y[at], (WIDE)y[at] * 2 * REAL_EPSILON);
                }
                T(digest)(out, n);
                check_digest(isa);
            }
            check_fence();
        }
}

/* ---- timing ------------------------------------------------------------------------------------- */

enum { T(CHUNK) = 384 / (int)sizeof(REAL) }; /* rows that a tile takes at a time */

static void T(bench)(const KERNELS *kernel) {
    enum { ROWS = T(CHUNK), DIM = 64, MOST = 96 };
    static REAL key[MOST * DIM], query[64 * DIM], packed[DIM * 64], s[MOST * 64], dp[MOST * 64], out[64 * DIM];
    static const REAL *key_row[MOST], *query_row[64], *packed_row[DIM], *lane[64], *s_in[MOST];
    static REAL *s_row[MOST], *out_row[64], *key_grad_row[MOST];
    static REAL key_grad[MOST * DIM], m[64], l[64], alpha[64];
    static uint64_t mask[MOST];
    for (int i = 0; i < MOST * DIM; i++)
        key[i] = (REAL)uniform(-1, 1);
    for (int i = 0; i < 64 * DIM; i++)
        query[i] = (REAL)uniform(-1, 1);
    for (int i = 0; i < MOST; i++) {
        key_row[i] = key + i * DIM;
        key_grad_row[i] = key_grad + i * DIM;
        mask[i] = random_bits();
    }
    for (int i = 0; i < 64; i++) {
        query_row[i] = query + i * DIM;
        out_row[i] = out + i * DIM;
        lane[i] = s + i;
    }
    for (int width = 16; width <= 64; width += 16) {
        for (int d = 0; d < DIM; d++)
            packed_row[d] = packed + d * width;
        for (int i = 0; i < MOST; i++) {
            s_row[i] = s + i * width;
            s_in[i] = s + i * width;
        }
        const double flops = 2.0 * ROWS * DIM * width;
        MEASURE(width * DIM, "G/s", kernel->pack(width, query_row, DIM, 1, width, packed), "pack width %d", width);
        MEASURE(flops, "GFLOP/s", kernel->product(ROWS, width, DIM, key_row, 1, packed_row, s_row, 0, false),
                "S = K Q^T         %d x %d x %d", ROWS, width, DIM);
        MEASURE(flops, "GFLOP/s", kernel->product(width, DIM, ROWS, lane, width, key_row, out_row, 0, true),
                "O += P^T V        %d x %d x %d", width, DIM, ROWS);
        MEASURE(flops, "GFLOP/s", kernel->product(ROWS, DIM, width, s_in, 1, query_row, key_grad_row, 0, true),
                "dV += P dO        %d x %d x %d", ROWS, DIM, width);
        for (int masked = 0; masked < 2; masked++) {
            /* logits keep their size, or products would overflow and time what never happens */
            const uint64_t *seen = masked ? mask : NULL;
            for (int i = 0; i < ROWS * width; i++)
                s[i] = dp[i] = (REAL)uniform(-3, 0);
            for (int i = 0; i < width; i++)
                m[i] = l[i] = 0;
            MEASURE(ROWS * width, "G/s",
                    for (int t = 0; t < width; t += CMB_GROUP) kernel->softmax(ROWS, s, width, seen, t, m, l, alpha),
                    "softmax%s width %d", masked ? " masked" : "", width);
            for (int i = 0; i < ROWS * width; i++)
                s[i] = dp[i] = (REAL)uniform(-3, 0);
            MEASURE(ROWS * width, "G/s",
                    for (int t = 0; t < width; t += CMB_GROUP)
                        kernel->softmax_backward(ROWS, s, dp, width, seen, t, m, alpha, (REAL)0.125),
                    "softmax_backward%s width %d", masked ? " masked" : "", width);
        }
        memset(out, 0, sizeof out);
        memset(key_grad, 0, sizeof key_grad);
    }
    static uint32_t row[MOST], lane_query[64];
    for (int i = 0; i < MOST; i++)
        row[i] = lane_query[i % 64] = (uint32_t)i;
    MEASURE(ROWS * 64, "G/s", kernel->dropout(ROWS, row, 64, lane_query, &(cmb_dropout){.threshold = 1 << 22}, dp),
            "dropout %d x 64", ROWS);
    MEASURE(ROWS * 64, "G/s", kernel->multiply(ROWS * 64, s, dp), "multiply %d", ROWS * 64);
    const double row_flops = 2.0 * ROWS * DIM;
    const REAL *one = s;
    MEASURE(row_flops, "GFLOP/s", kernel->dot(ROWS, key_row, DIM, query, dp), "row: s = K q       %d x %d", ROWS, DIM);
    MEASURE(row_flops, "GFLOP/s", kernel->product(1, DIM, ROWS, &one, 1, key_row, out_row, 0, true),
            "row: o += p V      %d x %d", ROWS, DIM);
    MEASURE(ROWS, "G/s", kernel->row_softmax(ROWS, s, m, l), "row_softmax %d", ROWS);
    for (int i = 0; i < ROWS; i++)
        s[i] = dp[i] = (REAL)uniform(-3, 0);
    MEASURE(ROWS, "G/s", kernel->row_softmax_backward(ROWS, s, dp, 0, 0, 1), "row_softmax_backward %d", ROWS);
    MEASURE(DIM, "G/s", kernel->scale(DIM, out, 1), "scale %d", DIM);
    MEASURE(DIM, "G/s", kernel->divide(DIM, query, 3, out), "divide %d", DIM);
    MEASURE(64 * DIM, "G/s", kernel->finite(64 * DIM, query), "finite %d", 64 * DIM);
    MEASURE(ROWS * DIM, "G/s", kernel->max_pool(ROWS, key_row, DIM, out, false), "max_pool %d x %d", ROWS, DIM);
    MEASURE(ROWS * DIM, "G/s", kernel->max_pool_backward(ROWS, key_row, DIM, out, query, key_grad_row),
            "max_pool_backward %d x %d", ROWS, DIM);
    MEASURE(ROWS * 64, "G/s", kernel->argmax(ROWS, s, 64, out, dp), "argmax %d x 64", ROWS);
    for (int i = 0; i < MOST * 64; i++)
        s[i] = (REAL)uniform(-20, 0);
    MEASURE(MOST * 64, "G/s", kernel->exp2(MOST * 64, s, dp), "exp2 %d", MOST * 64);
}

#undef T
#undef KERNELS

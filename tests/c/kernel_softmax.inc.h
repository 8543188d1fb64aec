// SPDX-License-Identifier: Apache-2.0
/* For test_kernels.c: the softmax of lanes and of a row, forward and backward; dropout. */

/* ---- softmax ------------------------------------------------------------------------------------ */

/* e^(x - base), and in *slack its error bound: the kernel rounds x - base first. */
static WIDE T(power)(REAL x, WIDE base, WIDE *slack) {
    const WIDE exponent = (WIDE)x - base, p = exponent < -DEEPEST - 100 ? 0 : WIDE_EXP(exponent);
    *slack = p > 0 ? p * (2 + WIDE_ABS(exponent)) * REAL_EPSILON + REAL_LEAST : REAL_LEAST;
    return p;
}

/* Checks one lane, or a row, against the definition: m, l and s are those before the call. Logits that are not live
 * must not be read. */
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

/* A random logit: most in [-8, 8), some far below, some -inf. */
static REAL T(logit)(void) {
    const int kind = random_below(20);
    return kind == 0 ? -(REAL)INFINITY : (REAL)uniform(kind == 1 ? -1.2 * DEEPEST : -8, 8);
}

/* m and l of softmaxes that have begun, and of some that have not. */
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
        const bool changed = isas[isa].SUFFIX->softmax(n, p, width, mask, NULL, lane0, new_m, new_l, alpha);
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
                CHECK(!isas[isa].SUFFIX->softmax(N, clean, CMB_GROUP, NULL, NULL, 0, clean_m, clean_l, alpha));
                p[row * CMB_GROUP + lane] = odd[kind];
                isas[isa].SUFFIX->softmax(N, p, CMB_GROUP, NULL, NULL, 0, new_m, new_l, alpha);
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
            if (round == 3) /* all logits are -inf, and nothing is attended before */
                for (int i = 0; i < n; i++) {
                    s[i] = m = -(REAL)INFINITY;
                    l = 0;
                }
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                REAL *p = T(copies)(s, room), *state = T(reals)(3);
                state[0] = m;
                state[1] = l;
                state[2] = isas[isa].SUFFIX->row_softmax(n, p, NULL, &state[0], &state[1]);
                T(check_softmax)(isa, n, s, 1, live, m, l, p, state[0], state[1], state[2]);
                T(digest)(p, n);
                T(digest)(state, 3);
                check_digest(isa);
                if (n == 0)
                    continue;
                p[random_below(n)] = (REAL)NAN;
                isas[isa].SUFFIX->row_softmax(n, p, NULL, &state[0], &state[1]);
                CHECK(state[1] != state[1], "%s lost a NaN: %s", isas[isa].name, context);
            }
            check_fence();
        }
}

/* The bits are those of a lane of `softmax`, at -inf and NaN too. */
static void T(check_in_order)(int n, int round, const REAL *bias) {
    REAL *s = T(reals)(n), *lanes = T(reals)(n * CMB_GROUP), *first = T(reals)(2 * CMB_GROUP);
    T(softmax_state)(1, &first[0], &first[CMB_GROUP]);
    for (int i = 0; i < n; i++) {
        s[i] = round < 3 ? T(logit)() : -(REAL)INFINITY;
        if (round == 4 && i == n / 2)
            s[i] = (REAL)NAN;
        lanes[i * CMB_GROUP] = s[i];
    }
    if (round >= 3) {
        first[0] = -(REAL)INFINITY;
        first[CMB_GROUP] = 0;
    }
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        REAL *p = T(copies)(s, n), *state = T(reals)(3);
        REAL *q = T(copies)(lanes, n * CMB_GROUP), *m = T(copies)(first, CMB_GROUP);
        REAL *l = T(copies)(first + CMB_GROUP, CMB_GROUP), *alpha = T(reals)(CMB_GROUP);
        state[0] = first[0];
        state[1] = first[CMB_GROUP];
        state[2] = isas[isa].SUFFIX->row_softmax_in_order(n, p, bias, &state[0], &state[1]);
        isas[isa].SUFFIX->softmax(n, q, CMB_GROUP, NULL, bias, 0, m, l, alpha);
        CHECK(T(same)(state[0], m[0]) && T(same)(state[2], alpha[0]), "%s: %s", isas[isa].name, context);
        CHECK(T(same)(state[1], l[0]) || (state[1] != state[1] && l[0] != l[0]), "%s: %s", isas[isa].name, context);
        for (int i = 0; i < n; i++)
            CHECK(T(same)(p[i], q[i * CMB_GROUP]) || (p[i] != p[i] && q[i * CMB_GROUP] != q[i * CMB_GROUP]),
                  "%s [%d]: %s", isas[isa].name, i, context);
        T(digest)(p, n);
        T(digest)(state, 3);
        check_digest(isa);
    }
    check_fence();
}

static void T(row_softmax_in_order)(void) {
    for (int n = 0; n <= 100; n += n < 34 ? 1 : 11)
        for (int round = 0; round < 5; round++)
            for (int biased = 0; biased < 2; biased++) {
                CASE("row_softmax_in_order n %d round %d biased %d", n, round, biased);
                REAL *bias = biased ? T(reals)(n) : NULL;
                for (int i = 0; biased && i < n; i++)
                    bias[i] = T(logit)();
                T(check_in_order)(n, round, bias);
            }
}

static void T(check_derivative)(int isa, int64_t at, REAL s, REAL dp, REAL m, REAL share, REAL delta, REAL scale,
                                bool live, REAL got_p, REAL got_ds) {
    WIDE slack = 0;
    const WIDE p = live ? T(power)(s < m ? s : m, (WIDE)m, &slack) * (WIDE)share : 0,
               factor = live ? ((WIDE)dp - (WIDE)delta) * (WIDE)scale : 0;
    slack = live ? slack * (WIDE)share + REAL_EPSILON * p : 0;
    T(check_near)(isa, "p", at, got_p, p, slack);
    CHECK(got_p <= 1, "%s p [%lld] is above 1: %s", isas[isa].name, (long long)at, context);
    T(check_near)(isa, "ds", at, got_ds, p * factor, WIDE_ABS(factor) * (slack + 2 * REAL_EPSILON * p) + REAL_LEAST);
    CHECK(live || (T(same)(got_p, 0) && T(same)(got_ds, 0)), "%s [%lld] is masked, not 0: %s", isas[isa].name,
          (long long)at, context);
}

/* `odd`: index of an element that is not finite, or -1 */
static void T(check_softmax_backward)(int n, int width, int lane0, bool masked, int64_t odd) {
    CASE("softmax_backward n %d width %d lane0 %d masked %d odd %lld", n, width, lane0, masked, (long long)odd);
    const int64_t size = (int64_t)n * width;
    REAL *s = T(reals)(size), *dp = T(uniforms)(size, -3, 3);
    REAL *m = T(uniforms)(width, 6, 12), *share = T(uniforms)(width, 0.01, 1), *delta = T(uniforms)(width, -1, 1);
    const REAL factor = (REAL)uniform(0.1, 1);
    uint64_t *mask = masked ? take(n, sizeof *mask) : NULL;
    for (int i = 0; mask && i < n; i++)
        mask[i] = random_below(4) ? random_bits() : 0;
    for (int64_t i = 0; i < size; i++)
        s[i] = T(logit)();
    for (int64_t i = 0; i < size; i++)
        if (s[i] == -(REAL)INFINITY)
            s[i] = -2;
    if (odd >= 0) {
        (random_below(2) ? s : dp)[odd] = random_below(2) ? (REAL)NAN : (REAL)INFINITY;
        m[odd % width] = s[odd] > m[odd % width] ? s[odd] : m[odd % width];
    }
    const bool inside = odd >= 0 && odd % width >= lane0 && odd % width < lane0 + CMB_GROUP;
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        REAL *p = T(copies)(s, size), *ds = T(copies)(dp, size);
        const bool finite =
            isas[isa].SUFFIX->softmax_backward(n, p, ds, width, mask, NULL, lane0, m, share, delta, factor);
        CHECK(finite == !inside, "%s says finite %d: %s", isas[isa].name, finite, context);
        for (int64_t i = 0; i < size; i++) {
            const int t = (int)(i % width);
            if (t < lane0 || t >= lane0 + CMB_GROUP)
                CHECK(T(same)(p[i], s[i]) && T(same)(ds[i], dp[i]), "%s: wrote to lane %d: %s", isas[isa].name, t,
                      context);
            else if (i != odd || (mask && !(mask[i / width] >> t & 1)))
                T(check_derivative)
            (isa, i, s[i], dp[i], m[t], share[t], delta[t], factor, !mask || mask[i / width] >> t & 1, p[i], ds[i]);
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
        const REAL m = (REAL)uniform(6, 12), share = (REAL)uniform(0.01, 1);
        const REAL delta = (REAL)uniform(-1, 1), factor = (REAL)uniform(0.1, 1);
        for (int isa = 0; isa < cmb_isa_count(); isa++) {
            REAL *p = T(copies)(s, n), *ds = T(copies)(dp, n);
            isas[isa].SUFFIX->row_softmax_backward(n, p, ds, NULL, m, share, delta, factor);
            for (int i = 0; i < n; i++)
                T(check_derivative)(isa, i, s[i], dp[i], m, share, delta, factor, true, p[i], ds[i]);
            T(digest)(p, n);
            T(digest)(ds, n);
            check_digest(isa);
        }
        check_fence();
    }
}

/* With biases: the bits of logits without, where the sum of a logit and its bias is exact; and rows at any bias, large
 * ones too, have the weights of differences of biases. */
static void T(biased_softmax)(void) {
    for (int n = 1; n <= 40; n += 13)
        for (int round = 0; round < 6; round++) {
            const int width = 32, room = (n + 15) / 16 * 16;
            const double base = round < 3 ? 0 : 4096;
            CASE("biased softmax n %d round %d", n, round);
            REAL *s = T(reals)((int64_t)n * width), *sum = T(reals)((int64_t)n * width), *bias = T(reals)(room),
                 *dp = T(uniforms)((int64_t)n * width, -3, 3), *share = T(uniforms)(width, 0.01, 1),
                 *delta = T(uniforms)(width, -1, 1);
            uint64_t *mask = round % 3 ? take(n, sizeof *mask) : NULL;
            for (int i = 0; i < n; i++) {
                bias[i] = (REAL)(random_below(9) - 4);
                if (mask)
                    mask[i] = random_bits();
                for (int t = 0; t < width; t++) { /* small multiples of 1/8: every sum is exact */
                    s[i * width + t] = (REAL)(random_below(64) - 32) / 8;
                    sum[i * width + t] = s[i * width + t] + bias[i];
                }
                bias[i] += (REAL)base;
            }
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                const KERNELS *kernel = isas[isa].SUFFIX;
                REAL *p = T(copies)(s, (int64_t)n * width), *q = T(copies)(sum, (int64_t)n * width);
                REAL *m = T(reals)(width), *l = T(reals)(width), *plain_m = T(reals)(width), *plain_l = T(reals)(width),
                     *alpha = T(reals)(width);
                for (int t = 0; t < width; t++) {
                    m[t] = plain_m[t] = -(REAL)INFINITY;
                    l[t] = plain_l[t] = 0;
                }
                for (int lane = 0; lane < width; lane += CMB_GROUP) {
                    kernel->softmax(n, p, width, mask, bias, lane, m, l, alpha);
                    kernel->softmax(n, q, width, mask, NULL, lane, plain_m, plain_l, alpha);
                }
                for (int t = 0; t < width; t++) {
                    CHECK(m[t] == plain_m[t] + (REAL)base && T(same)(l[t], plain_l[t]), "%s: %s", isas[isa].name,
                          context);
                    for (int i = 0; i < n; i++)
                        CHECK(T(same)(p[i * width + t], q[i * width + t]), "%s: %s", isas[isa].name, context);
                }
                memcpy(p, s, (size_t)(n * width) * sizeof *p);
                memcpy(q, sum, (size_t)(n * width) * sizeof *q);
                REAL *ds = T(copies)(dp, (int64_t)n * width), *plain_ds = T(copies)(dp, (int64_t)n * width);
                for (int lane = 0; lane < width; lane += CMB_GROUP) {
                    kernel->softmax_backward(n, p, ds, width, mask, bias, lane, m, share, delta, 2);
                    kernel->softmax_backward(n, q, plain_ds, width, mask, NULL, lane, plain_m, share, delta, 2);
                }
                for (int i = 0; i < n * width; i++)
                    CHECK(T(same)(p[i], q[i]) && T(same)(ds[i], plain_ds[i]), "%s: %s", isas[isa].name, context);

                REAL *row = T(reals)(room), *plain = T(reals)(room), *of_row = T(copies)(bias, room);
                for (int i = 0; i < n; i++) {
                    row[i] = s[i * width];
                    plain[i] = sum[i * width];
                }
                REAL state[4] = {-(REAL)INFINITY, 0, -(REAL)INFINITY, 0};
                kernel->row_softmax(n, row, of_row, &state[0], &state[1]);
                kernel->row_softmax(n, plain, NULL, &state[2], &state[3]);
                CHECK(state[0] == state[2] + (REAL)base && T(same)(state[1], state[3]), "%s: %s", isas[isa].name,
                      context);
                for (int i = 0; i < n; i++) {
                    CHECK(T(same)(row[i], plain[i]), "%s: %s", isas[isa].name, context);
                    row[i] = s[i * width];
                    plain[i] = sum[i * width];
                    ds[i] = plain_ds[i] = dp[i];
                }
                kernel->row_softmax_backward(n, row, ds, of_row, state[0], share[0], delta[0], 2);
                kernel->row_softmax_backward(n, plain, plain_ds, NULL, state[2], share[0], delta[0], 2);
                for (int i = 0; i < n; i++)
                    CHECK(T(same)(row[i], plain[i]) && T(same)(ds[i], plain_ds[i]), "%s: %s", isas[isa].name, context);
            }
            check_fence();
        }
}

/* A NaN or infinite bias of a row reaches the lanes that see the row. */
static void T(biased_softmax_not_finite)(void) {
    enum { N = 7 };
    for (int kind = 0; kind < 2; kind++) {
        CASE("softmax with bias %d", kind);
        REAL *s = T(uniforms)(N * CMB_GROUP, -4, 4), *bias = T(uniforms)(N, -4, 4);
        uint64_t *mask = take(N, sizeof *mask);
        for (int i = 0; i < N; i++)
            mask[i] = i == 3 ? 0x00ff : 0xffff;
        bias[3] = kind ? (REAL)INFINITY : (REAL)NAN;
        for (int isa = 0; isa < cmb_isa_count(); isa++) {
            REAL *p = T(copies)(s, N * CMB_GROUP), *m = T(reals)(CMB_GROUP), *l = T(reals)(CMB_GROUP),
                 *alpha = T(reals)(CMB_GROUP);
            for (int t = 0; t < CMB_GROUP; t++) {
                m[t] = -(REAL)INFINITY;
                l[t] = 0;
            }
            isas[isa].SUFFIX->softmax(N, p, CMB_GROUP, mask, bias, 0, m, l, alpha);
            for (int t = 0; t < CMB_GROUP; t++) {
                CHECK((l[t] == l[t]) == (t >= 8), "%s lane %d: %s", isas[isa].name, t, context);
                CHECK(t < 8 || T(same)(p[3 * CMB_GROUP + t], 0), "%s lane %d: %s", isas[isa].name, t, context);
            }
        }
        check_fence();
    }
}

/* ---- softcap ------------------------------------------------------------------------------------ */

static void T(softcap)(void) {
    for (int n = 0; n <= 50; n += n < 20 ? 1 : 10)
        for (int round = 0; round < 4; round++) {
            const REAL cap = round < 2 ? 30 : (REAL)0.5;
            CASE("softcap n %d cap %g", n, (double)cap);
            REAL *s = T(uniforms)(n, round % 2 ? -200 : -1, round % 2 ? 200 : 1);
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                REAL *x = T(copies)(s, n), *y = T(copies)(s, n), *slope = T(reals)(n);
                CHECK(isas[isa].SUFFIX->softcap(n, x, cap, slope), "%s: %s", isas[isa].name, context);
                CHECK(isas[isa].SUFFIX->softcap(n, y, cap, NULL), "%s: %s", isas[isa].name, context);
                for (int i = 0; i < n; i++) {
                    const WIDE share = WIDE_TANH((WIDE)s[i] / (WIDE)cap), want = (WIDE)cap * share;
                    T(check_near)(isa, "softcap", i, x[i], want, 5 * REAL_EPSILON * WIDE_ABS(want));
                    T(check_near)(isa, "slope", i, slope[i], 1 - share * share, 10 * REAL_EPSILON);
                    CHECK(T(same)(x[i], y[i]) && slope[i] >= 0, "%s: %s", isas[isa].name, context);
                }
                T(digest)(x, n);
                T(digest)(slope, n);
                check_digest(isa);
                if (n == 0)
                    continue;
                const int odd = random_below(n);
                x[odd] = round % 2 ? (REAL)NAN : -(REAL)INFINITY;
                CHECK(!isas[isa].SUFFIX->softcap(n, x, cap, slope), "%s: %s", isas[isa].name, context);
                CHECK(slope[odd] == 0 && (round % 2 ? x[odd] != x[odd] : WIDE_ABS(x[odd] + cap) <= cap / 1000),
                      "%s: %s", isas[isa].name, context);
            }
            check_fence();
        }
}

/* ---- dropout ------------------------------------------------------------------------------------ */

static void T(check_dropout)(int n, int width, const cmb_dropout *dropout) {
    CASE("dropout n %d width %d threshold %u", n, width, dropout->threshold);
    uint32_t *row = take(n, sizeof *row), *query = take(width, sizeof *query);
    for (int i = 0; i < n; i++) /* runs of neighbouring rows, and single rows */
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

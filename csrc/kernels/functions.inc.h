// SPDX-License-Identifier: Apache-2.0
/* Functions of one number, on vectors: e^x, tanh x, and the kernels that apply them to arrays. Part of bodies.inc.h. */

/* ---- e^x ---------------------------------------------------------------------------------------- */

/* e^x for x <= 1, as 2^n e^r:
 *   n = round(x / ln 2): x / ln 2 + magic has no bits below 1. The low bits of magic are the exponent's bias, so that
 *       those of the sum are the exponent of 2^n.
 *   r = x - n ln 2, in [-ln 2 / 2, ln 2 / 2]. ln 2 has two parts, `high` and `low`: n * high is exact.
 *   e^r is a minimax polynomial whose last two coefficients are 1, so that e^0 is exactly 1. Its degree is 6 for float
 *       (0.89 ulp) and 11 for double (0.29 * 2^-53 before rounding). */
INLINE vec K(exp_vec)(vec x) {
#if FLOAT_BITS == 32
    const vec magic = broadcast(12582912.0f + 127.0f), least = broadcast(-88.0f);
    const vec log2_e = broadcast(0x1.715476p+0f), high = broadcast(-0x1.62e4p-1f), low = broadcast(-0x1.7f7d1cp-20f);
    static const REAL c[] = {0x1.6a23dp-10f, 0x1.123a2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f, 0x1.fffffcp-2f, 1.0f, 1.0f};
#else
    const vec magic = broadcast(6755399441055744.0 + 1023.0), least = broadcast(-709.0);
    const vec log2_e = broadcast(0x1.71547652b82fep+0), high = broadcast(-0x1.62e42fefa38p-1),
              low = broadcast(-0x1.ef35793c7673p-45);
    static const REAL c[] = {0x1.a4921b3cd4f1dp-26,
                             0x1.288cd6ca80abdp-22,
                             0x1.71e46bbee85f8p-19,
                             0x1.a019c0679956dp-16,
                             0x1.a019ff12c081dp-13,
                             0x1.6c16c1752799dp-10,
                             0x1.1111111176d96p-7,
                             0x1.5555555554d43p-5,
                             0x1.555555555542ap-3,
                             0x1.ffffffffffffep-2,
                             1.0,
                             1.0};
#endif
    x = maximum(least, x); /* x as the second argument: a NaN stays */
    vec biased = fma_vec(x, log2_e, magic);
    vec n = biased - magic;
    vec r = fma_vec(n, low, fma_vec(n, high, x));
    vec p = broadcast(c[0]);
    UNROLL
    for (int i = 1; i < (int)(sizeof c / sizeof *c); i++)
        p = fma_vec(p, r, broadcast(c[i]));
    vec power = (vec)((bits)biased << (FLOAT_BITS == 32 ? 23 : 52)); /* 2^n; 0 for the smallest n */
    return rounded(p * power);
}

static void K(exp)(int64_t n, const REAL *x, REAL *y) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(y + i, K(exp_vec)(load(x + i)));
    if (i < n)
        store_part(y + i, K(exp_vec)(load_part(x + i, (int)(n - i))), (int)(n - i));
}

/* ---- tanh --------------------------------------------------------------------------------------- */

/* tanh x = x P(x^2) / Q(x^2), P and Q near minimax up to the x from which tanh is 1 but for rounding: 4 ulp. The
 * coefficients are positive, so that nothing cancels. */
INLINE vec K(tanh_vec)(vec x) {
#if FLOAT_BITS == 32
    const vec most = broadcast(9.02f);
    static const REAL p[] = {0x1.c98d9cp-27f, 0x1.594e9ep-16f, 0x1.c9f596p-9f, 0x1.1203ecp-3f, 1.0f};
    static const REAL q[] = {0x1.a0ab22p-21f, 0x1.583df8p-12f, 0x1.a7dde6p-6f, 0x1.de5744p-2f, 1.0f};
#else
    const vec most = broadcast(19.07);
    static const REAL p[] = {0x1.e3f05ef9089b7p-76, 0x1.b5b6a59a70434p-61,
                             0x1.b99babe32f166p-49, 0x1.25901f3ea6788p-38,
                             0x1.4f7a138d2be62p-29, 0x1.6ec07f7f9d0f6p-21,
                             0x1.88a028d77a558p-14, 0x1.8791dfcde2774p-8,
                             0x1.36e651c4c96cap-3,  1.0};
    static const REAL q[] = {0x1.d64ea0fc09396p-68, 0x1.03c367b238302p-54,
                             0x1.1e209ba8cb2e8p-43, 0x1.e8c6f4396f83bp-34,
                             0x1.7f7176e8ada4dp-25, 0x1.25bff73ddd49dp-17,
                             0x1.b231e26941e98p-11, 0x1.196f484a12e1fp-5,
                             0x1.f0c87e37ba0abp-2,  1.0};
#endif
    x = maximum(-most, -maximum(-most, -x)); /* x as the second argument: a NaN stays */
    const vec u = rounded(x * x);
    vec top = broadcast(p[0]), bottom = broadcast(q[0]);
    UNROLL
    for (int i = 1; i < (int)(sizeof p / sizeof *p); i++) {
        top = fma_vec(top, u, broadcast(p[i]));
        bottom = fma_vec(bottom, u, broadcast(q[i]));
    }
    return rounded(x * top) / bottom;
}

INLINE vec K(softcap_vec)(vec x, REAL cap, vec *poison, vec *slope) {
    const vec t = K(tanh_vec)(x * broadcast(1 / cap));
    if (slope) {
        *poison = fma_vec(x, (vec){0}, *poison);
        const vec derivative = fma_vec(-t, t, broadcast(1));
        *slope = if_nonzero((bits)(derivative > 0), derivative, (vec){0});
    }
    return t * broadcast(cap);
}

INLINE bool K(softcap_of)(int64_t n, REAL *s, REAL cap, REAL *slope) {
    vec poison = {0}, derivative; /* poison: 0 while everything is finite, NaN after */
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        store(s + i, K(softcap_vec)(load(s + i), cap, &poison, slope ? &derivative : NULL));
        if (slope)
            store(slope + i, derivative);
    }
    if (i < n) {
        const int rest = (int)(n - i);
        store_part(s + i, K(softcap_vec)(load_part(s + i, rest), cap, &poison, slope ? &derivative : NULL), rest);
        if (slope)
            store_part(slope + i, derivative, rest);
    }
    bool finite = true;
    for (int lane = 0; lane < LANES; lane++)
        finite &= poison[lane] == 0;
    return finite;
}

static bool K(softcap)(int64_t n, REAL *s, REAL cap, REAL *slope) {
    return slope ? K(softcap_of)(n, s, cap, slope) : K(softcap_of)(n, s, cap, NULL);
}

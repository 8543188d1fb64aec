// SPDX-License-Identifier: Apache-2.0
/*
 * The softmax of one row, with vectors along its elements, and of 16 lanes, with vectors along the lanes; forward and
 * backward. Part of bodies.inc.h.
 *
 * Each kernel is compiled twice, with biases and without: `bias` is NULL as a constant in one of the two.
 */

/* x - base of a logit x = s + bias, which is not rounded: a bias may be so large that the sum would lose s. Where base
 * is the largest sum as rounded, the difference may exceed 0 a little; 1 bounds it where biases are beyond all measure.
 */
INLINE vec K(above)(vec base, vec s, vec bias) { return -maximum(broadcast(-1), -(bias - base + s)); }

INLINE REAL K(row_softmax_of)(int64_t n, REAL *s, REAL *bias, REAL *m, REAL *l) {
    REAL top = *m;
    for (int64_t i = 0; i < n; i++) {
        const REAL x = bias ? s[i] + bias[i] : s[i];
        top = x > top ? x : top;
    }
    const vec base = broadcast(top > LOWEST ? top : LOWEST);
    for (int64_t i = n; i % CMB_GROUP; i++) {
        s[i] = -(REAL)INFINITY;
        if (bias)
            bias[i] = 0;
    }
    vec sum[K(parts)];
    UNROLL
    for (int i = 0; i < K(parts); i++)
        sum[i] = (vec){0};
    for (int64_t t = 0; t < n; t += CMB_GROUP)
        UNROLL
    for (int i = 0; i < K(parts); i++) {
        const int64_t at = t + i * LANES;
        vec x = bias ? K(above)(base, load(s + at), load(bias + at)) : load(s + at) - base;
        vec p = K(exp_vec)(x);
        store(s + at, p);
        sum[i] += p;
    }
    REAL alpha = K(exp_vec)(broadcast(*m) - base)[0];
    REAL old = rounded(broadcast(*l * alpha))[0];
    *l = old + K(sum16)(sum);
    *m = top;
    return alpha;
}

static REAL K(row_softmax)(int64_t n, REAL *s, REAL *bias, REAL *m, REAL *l) {
    return bias ? K(row_softmax_of)(n, s, bias, m, l) : K(row_softmax_of)(n, s, NULL, m, l);
}

INLINE REAL K(row_softmax_in_order_of)(int64_t n, REAL *s, const REAL *bias, REAL *m, REAL *l) {
    REAL top = *m, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const REAL x = bias ? s[i] + bias[i] : s[i];
        top = x > top ? x : top;
    }
    const vec base = broadcast(top > LOWEST ? top : LOWEST);
    for (int64_t i = 0; i < n; i += LANES) {
        const int rest = n - i < LANES ? (int)(n - i) : LANES;
        const vec x = rest < LANES ? load_part(s + i, rest) : load(s + i);
        vec p;
        if (bias)
            p = K(exp_vec)(K(above)(base, x, rest < LANES ? load_part(bias + i, rest) : load(bias + i)));
        else
            p = K(exp_vec)(x - base);
        if (rest < LANES)
            store_part(s + i, p, rest);
        else
            store(s + i, p);
        for (int k = 0; k < rest; k++)
            sum += p[k];
    }
    const REAL alpha = K(exp_vec)(broadcast(*m) - base)[0];
    *l = rounded(broadcast(*l * alpha))[0] + sum;
    *m = top;
    return alpha;
}

static REAL K(row_softmax_in_order)(int64_t n, REAL *s, const REAL *bias, REAL *m, REAL *l) {
    return bias ? K(row_softmax_in_order_of)(n, s, bias, m, l) : K(row_softmax_in_order_of)(n, s, NULL, m, l);
}

/* e^(logit - m) * inverse_l. m is the largest logit as forward found it, perhaps on another instruction set: a logit
 * may be larger by a rounding error, and is taken for m, so that no weight exceeds 1. */
INLINE vec K(weights)(vec logit, vec m, vec inverse_l) {
    return rounded(K(exp_vec)(-maximum((vec){0}, m - logit)) * inverse_l);
}

/* The same of a logit s + bias, which is compared with m without rounding it. */
INLINE vec K(biased_weights)(vec s, vec bias, vec m, vec inverse_l) {
    return rounded(K(exp_vec)(K(above)(m, s, bias)) * inverse_l);
}

INLINE void K(row_softmax_backward_of)(int64_t n, REAL *s, REAL *dp, const REAL *bias, REAL m, REAL inverse_l,
                                       REAL delta, REAL scale) {
    for (int64_t i = 0; i < n; i += LANES) {
        int rest = n - i < LANES ? (int)(n - i) : LANES;
        vec x = load_part(s + i, rest), p;
        if (bias)
            p = K(biased_weights)(x, load_part(bias + i, rest), broadcast(m), broadcast(inverse_l));
        else
            p = K(weights)(x, broadcast(m), broadcast(inverse_l));
        vec ds = rounded(p * (load_part(dp + i, rest) - broadcast(delta))) * broadcast(scale);
        store_part(s + i, p, rest);
        store_part(dp + i, ds, rest);
    }
}

static void K(row_softmax_backward)(int64_t n, REAL *s, REAL *dp, const REAL *bias, REAL m, REAL inverse_l, REAL delta,
                                    REAL scale) {
    if (bias)
        K(row_softmax_backward_of)(n, s, dp, bias, m, inverse_l, delta, scale);
    else
        K(row_softmax_backward_of)(n, s, dp, NULL, m, inverse_l, delta, scale);
}

/* ---- the softmax of 16 lanes -------------------------------------------------------------------- */

/* The i-th logit of a column. Where the mask hides it, the logit and its element of s become -inf. */
INLINE vec K(masked_logit)(int64_t i, REAL *column, int width, const uint64_t *mask, const REAL *bias, int lane) {
    const vec none = broadcast(-(REAL)INFINITY);
    vec x = load(column + i * width);
    if (mask) {
        x = select_lanes(mask[i] >> lane, x, none);
        store(column + i * width, x);
    }
    if (!bias)
        return x;
    x += broadcast(bias[i]);
    return mask ? select_lanes(mask[i] >> lane, x, none) : x;
}

/* The largest of `top` and the n logits of a column, in chains of maxima that do not wait for one another. */
INLINE vec K(largest)(int64_t n, REAL *column, int width, const uint64_t *mask, const REAL *bias, int lane, vec top) {
    enum { CHAINS = 4 };
    const vec none = broadcast(-(REAL)INFINITY);
    vec most[CHAINS] = {top, none, none, none};
    int64_t i = 0;
    for (; i + CHAINS <= n; i += CHAINS)
        UNROLL
    for (int c = 0; c < CHAINS; c++)
        most[c] = maximum(K(masked_logit)(i + c, column, width, mask, bias, lane), most[c]);
    for (; i < n; i++)
        most[0] = maximum(K(masked_logit)(i, column, width, mask, bias, lane), most[0]);
    return maximum(maximum(most[3], most[2]), maximum(most[1], most[0]));
}

INLINE bool K(softmax_of)(int64_t n, REAL *s, int width, const uint64_t *mask, const REAL *bias, int lane0, REAL *m,
                          REAL *l, REAL *alpha) {
    CMB_ASSERT(n >= 0 && width % CMB_GROUP == 0 && lane0 % CMB_GROUP == 0 && 0 <= lane0 && lane0 < width);
    bits changed = {0};
    for (int v = 0; v < CMB_GROUP; v += LANES) {
        REAL *column = s + lane0 + v;
        const vec old = load(m + lane0 + v);
        const vec top = K(largest)(n, column, width, mask, bias, lane0 + v, old);
        const vec base = maximum(broadcast(LOWEST), top); /* not -inf: -inf - -inf is NaN */
        const vec a = K(exp_vec)(old - base);
        vec sum = {0}; /* of this chunk: adding small weights to a long sum one by one would lose their last bits */
        for (int64_t i = 0; i < n; i++) {
            vec x = load(column + i * width), p;
            if (bias) {
                p = K(exp_vec)(K(above)(base, x, broadcast(bias[i])));
                p = mask ? select_lanes(mask[i] >> (lane0 + v), p, (vec){0}) : p; /* the bias may be NaN or Inf */
            } else {
                p = K(exp_vec)(x - base);
            }
            store(column + i * width, p);
            sum += p;
        }
        store(m + lane0 + v, top);
        store(l + lane0 + v, rounded(load(l + lane0 + v) * a) + sum);
        store(alpha + lane0 + v, a);
        changed |= (bits)(a != broadcast(1));
    }
    return any(changed);
}

static bool K(softmax)(int64_t n, REAL *s, int width, const uint64_t *mask, const REAL *bias, int lane0, REAL *m,
                       REAL *l, REAL *alpha) {
    return bias ? K(softmax_of)(n, s, width, mask, bias, lane0, m, l, alpha)
                : K(softmax_of)(n, s, width, mask, NULL, lane0, m, l, alpha);
}

INLINE bool K(softmax_backward_of)(int64_t n, REAL *s, REAL *dp, int width, const uint64_t *mask, const REAL *bias,
                                   int lane0, const REAL *m, const REAL *inverse_l, const REAL *delta, REAL scale) {
    CMB_ASSERT(n >= 0 && width % CMB_GROUP == 0 && lane0 % CMB_GROUP == 0 && 0 <= lane0 && lane0 < width);
    vec poison = {0}; /* 0 while everything is finite, NaN after */
    for (int v = 0; v < CMB_GROUP; v += LANES) {
        const vec top = load(m + lane0 + v), inverse = load(inverse_l + lane0 + v), shift = load(delta + lane0 + v);
        for (int64_t i = 0; i < n; i++) {
            REAL *at = s + i * width + lane0 + v, *dat = dp + i * width + lane0 + v;
            vec x = load(at), dx = load(dat);
            poison = fma_vec(x, (vec){0}, poison);
            poison = fma_vec(dx, (vec){0}, poison);
            vec p = bias ? K(biased_weights)(x, broadcast(bias[i]), top, inverse) : K(weights)(x, top, inverse);
            vec ds = rounded(p * (dx - shift)) * broadcast(scale);
            if (mask) {
                p = select_lanes(mask[i] >> (lane0 + v), p, (vec){0});
                ds = select_lanes(mask[i] >> (lane0 + v), ds, (vec){0});
            }
            store(at, p);
            store(dat, ds);
        }
    }
    bool finite = true;
    for (int i = 0; i < LANES; i++)
        finite &= poison[i] == 0;
    return finite;
}

static bool K(softmax_backward)(int64_t n, REAL *s, REAL *dp, int width, const uint64_t *mask, const REAL *bias,
                                int lane0, const REAL *m, const REAL *inverse_l, const REAL *delta, REAL scale) {
    return bias ? K(softmax_backward_of)(n, s, dp, width, mask, bias, lane0, m, inverse_l, delta, scale)
                : K(softmax_backward_of)(n, s, dp, width, mask, NULL, lane0, m, inverse_l, delta, scale);
}

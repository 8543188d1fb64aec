// SPDX-License-Identifier: Apache-2.0
/*
 * The kernels max_pool and max_pool_backward (kernels.h), of rows of floats and of stored 16-bit numbers, which are
 * widened as they are loaded. Parameters, beside those of bodies.inc.h:
 *   P(name)              name of a function of this file
 *   ROW                  type of an element of a row
 *   LOAD(p)              a vector of a row's elements, as REAL
 *   LOAD_PART(p, n)      the first n of them, and zeros
 */

/* Vectors of features at a time: chains of maxima that do not wait for each other. */
enum { P(chains) = 4 };

/* A vector of a row; if part > 0, its first `part` elements. */
INLINE vec P(of_row)(const ROW *p, int part) { return part ? LOAD_PART(p, part) : LOAD(p); }

/* The maxima of `nr` vectors of features from d on; if part > 0, of one vector's first `part` elements. If not
 * `careful` NaNs are ignored: where an element is not finite nothing is stored, and the result is false. */
INLINE bool P(max_columns)(int nr, int64_t n, const ROW *const *row, int64_t d, int part, REAL *top, bool add,
                           bool careful) {
    vec best[P(chains)], poison[P(chains)]; /* 0 while everything is finite, NaN after */
    UNROLL
    for (int j = 0; j < nr; j++) {
        const int64_t at = d + j * LANES;
        if (add)
            best[j] = part ? load_part(top + at, part) : load(top + at);
        else
            best[j] = P(of_row)(row[0] + at, part);
        poison[j] = best[j] * broadcast(0);
    }
    for (int64_t i = add ? 0 : 1; i < n; i++) {
        const ROW *y = row[i] + d;
        UNROLL
        for (int j = 0; j < nr; j++) {
            const vec x = P(of_row)(y + j * LANES, part);
            best[j] = careful ? K(greater)(x, best[j]) : maximum(x, best[j]);
            poison[j] = careful ? poison[j] : fma_vec(x, broadcast(0), poison[j]);
        }
    }
    UNROLL
    for (int j = 1; j < nr; j++)
        poison[0] += poison[j];
    if (!careful && any((bits)(poison[0] != poison[0])))
        return false;
    UNROLL
    for (int j = 0; j < nr; j++) {
        if (part)
            store_part(top + d, best[j], part);
        else
            store(top + d + j * LANES, best[j]);
    }
    return true;
}

/* Fast, and again carefully where an element is not finite. For few rows carefully at once. */
#define MAX_COLUMNS(nr, part)                                           \
    if (n < 8 || !P(max_columns)(nr, n, row, d, part, top, add, false)) \
        P(max_columns)(nr, n, row, d, part, top, add, true);

static void P(max_pool)(int64_t n, const ROW *const *row, int64_t dim, REAL *top, bool add) {
    CMB_ASSERT(n > 0 || add);
    int64_t d = 0;
    for (; d + P(chains) * LANES <= dim; d += P(chains) * LANES)
        MAX_COLUMNS(P(chains), 0)
    for (; d + LANES <= dim; d += LANES)
        MAX_COLUMNS(1, 0)
    if (d < dim)
        MAX_COLUMNS(1, (int)(dim - d))
}
#undef MAX_COLUMNS

INLINE void P(max_columns_backward)(int nr, int64_t n, const ROW *const *row, int64_t d, int part, const REAL *top,
                                    const REAL *grad, REAL *const *grad_row) {
    vec best[P(chains)], g[P(chains)];
    bits left[P(chains)];
    UNROLL
    for (int j = 0; j < nr; j++) {
        best[j] = part ? load_part(top + d, part) : load(top + d + j * LANES);
        g[j] = part ? load_part(grad + d, part) : load(grad + d + j * LANES);
        left[j] = (bits){0} == (bits){0};
    }
    for (int64_t i = 0; i < n; i++) {
        const ROW *y = row[i] + d;
        REAL *z = grad_row[i] + d;
        UNROLL
        for (int j = 0; j < nr; j++) {
            const vec x = P(of_row)(y + j * LANES, part);
            const bits hit = left[j] & ((bits)(x == best[j]) | ((bits)(x != x) & (bits)(best[j] != best[j])));
            left[j] &= ~hit;
            if (!any(hit)) /* most of many rows: their gradient is not read */
                continue;
            const vec old = part ? load_part(z, part) : load(z + j * LANES);
            const vec sum = if_nonzero(hit, old + g[j], old);
            if (part)
                store_part(z, sum, part);
            else
                store(z + j * LANES, sum);
        }
    }
}

static void P(max_pool_backward)(int64_t n, const ROW *const *row, int64_t dim, const REAL *top, const REAL *grad,
                                 REAL *const *grad_row) {
    int64_t d = 0;
    for (; d + P(chains) * LANES <= dim; d += P(chains) * LANES)
        P(max_columns_backward)(P(chains), n, row, d, 0, top, grad, grad_row);
    for (; d + LANES <= dim; d += LANES)
        P(max_columns_backward)(1, n, row, d, 0, top, grad, grad_row);
    if (d < dim)
        P(max_columns_backward)(1, n, row, d, (int)(dim - d), top, grad, grad_row);
}

#undef P
#undef ROW
#undef LOAD
#undef LOAD_PART

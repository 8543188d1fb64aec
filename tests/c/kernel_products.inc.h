// SPDX-License-Identifier: Apache-2.0
/* For test_kernels.c: rows copied and packed, products. */

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

static void T(check_gemm)(int m, int n, int k, int step, int column, bool add) {
    CASE("gemm m %d n %d k %d step %d column %d add %d", m, n, k, step, column, add);
    const REAL *const *a = T(read)(T(rows)(m, k ? (int64_t)(k - 1) * step + 1 : 0));
    const REAL *const *b = T(read)(T(rows)(k, column + n));
    const REAL *const *before = T(read)(T(rows)(m, column + n));
    REAL **c = T(rows)(m, column + n);
    for (int isa = 0; isa < cmb_isa_count(); isa++) {
        for (int i = 0; i < m; i++)
            memcpy(c[i], before[i], (size_t)(column + n) * sizeof(REAL));
        isas[isa].SUFFIX->gemm(m, n, k, a, step, b, c, column, add);
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

static void T(gemm)(void) {
    for (int n = 0; n <= 66; n++) /* every width of the micro-kernels and every tail */
        for (int m = 0; m <= 13; m += n % 2 ? 1 : 4)
            T(check_gemm)(m, n, 3, 1, 0, m % 2);
    for (int round = 0; round < 400; round++) {
        const int steps[] = {0, 1, 16, 64};
        T(check_gemm)
        (random_below(27), random_below(112), random_below(40), steps[random_below(4)],
         random_below(3) * random_below(20), random_below(2));
    }
    T(check_gemm)(64, 64, 96, 64, 0, true);
    T(check_gemm)(30, 64, 64, 1, 0, false);
    T(check_gemm)(1, 1000, 30, 1, 0, true);
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

/* The bits are those of a product of one column. */
static void T(dot_in_order)(void) {
    for (int64_t dim = 1; dim <= 130; dim++)
        for (int n = 0; n <= 40; n += 1 + (int)dim % 7) {
            CASE("dot_in_order of %d rows of %lld", n, (long long)dim);
            const REAL *const *row = T(read)(T(rows)(n, dim));
            const REAL *x = T(uniforms)(dim, -1, 1), **element = take(dim, sizeof *element);
            REAL *expected = T(reals)(n), **to = take(n, sizeof *to);
            for (int64_t d = 0; d < dim; d++)
                element[d] = x + d;
            for (int i = 0; i < n; i++)
                to[i] = expected + i;
            for (int isa = 0; isa < cmb_isa_count(); isa++) {
                REAL *s = T(reals)(n);
                isas[isa].SUFFIX->dot_in_order(n, row, dim, x, s);
                isas[isa].SUFFIX->gemm(n, 1, dim, row, 1, element, to, 0, false);
                for (int i = 0; i < n; i++)
                    CHECK(T(same)(s[i], expected[i]), "%s [%d]: %s", isas[isa].name, i, context);
                T(digest)(s, n);
                check_digest(isa);
            }
            check_fence();
        }
}

// SPDX-License-Identifier: Apache-2.0
/* For test_kernels.c --bench: the time of each kernel of one table. */

enum { T(CHUNK) = CMB_CHUNK_BYTES / (int)sizeof(REAL) }; /* rows that a tile takes at a time */

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
        const double flops = 2 * ROWS * DIM * width;
        MEASURE(width * DIM, "G/s", kernel->pack(width, query_row, DIM, 1, width, packed), "pack width %d", width);
        MEASURE(flops, "GFLOP/s", kernel->gemm(ROWS, width, DIM, key_row, 1, packed_row, s_row, 0, false),
                "S = K Q^T         %d x %d x %d", ROWS, width, DIM);
        MEASURE(flops, "GFLOP/s", kernel->gemm(width, DIM, ROWS, lane, width, key_row, out_row, 0, true),
                "O += P^T V        %d x %d x %d", width, DIM, ROWS);
        MEASURE(flops, "GFLOP/s", kernel->gemm(ROWS, DIM, width, s_in, 1, query_row, key_grad_row, 0, true),
                "dV += P dO        %d x %d x %d", ROWS, DIM, width);
        for (int masked = 0; masked < 2; masked++) {
            /* logits of their usual size: softmax would otherwise time overflows */
            const uint64_t *seen = masked ? mask : NULL;
            for (int i = 0; i < ROWS * width; i++)
                s[i] = dp[i] = (REAL)uniform(-3, 0);
            for (int i = 0; i < width; i++)
                m[i] = l[i] = 0;
            MEASURE(ROWS * width, "G/s",
                    for (int t = 0; t < width; t += CMB_GROUP)
                        kernel->softmax(ROWS, s, width, seen, NULL, t, m, l, alpha),
                    "softmax%s width %d", masked ? " masked" : "", width);
            for (int i = 0; i < ROWS * width; i++)
                s[i] = dp[i] = (REAL)uniform(-3, 0);
            MEASURE(ROWS * width, "G/s",
                    for (int t = 0; t < width; t += CMB_GROUP)
                        kernel->softmax_backward(ROWS, s, dp, width, seen, NULL, t, m, alpha, alpha, (REAL)0.125),
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
    const double row_flops = 2 * ROWS * DIM;
    const REAL *one = s;
    MEASURE(row_flops, "GFLOP/s", kernel->dot(ROWS, key_row, DIM, query, dp), "row: s = K q       %d x %d", ROWS, DIM);
    MEASURE(row_flops, "GFLOP/s", kernel->gemm(1, DIM, ROWS, &one, 1, key_row, out_row, 0, true),
            "row: o += p V      %d x %d", ROWS, DIM);
    MEASURE(ROWS * 64, "G/s", (void)kernel->softcap(ROWS * 64, s, 50, NULL), "softcap %d", ROWS * 64);
    MEASURE(ROWS * 64, "G/s", (void)kernel->softcap(ROWS * 64, s, 50, dp), "softcap with slope %d", ROWS * 64);
    MEASURE(ROWS, "G/s", kernel->row_softmax(ROWS, s, NULL, m, l), "row_softmax %d", ROWS);
    for (int i = 0; i < ROWS; i++)
        s[i] = dp[i] = (REAL)uniform(-3, 0);
    MEASURE(ROWS, "G/s", kernel->row_softmax_backward(ROWS, s, dp, NULL, 0, 1, 0, 1), "row_softmax_backward %d", ROWS);
    MEASURE(DIM, "G/s", kernel->scale(DIM, out, 1), "scale %d", DIM);
    MEASURE(DIM, "G/s", kernel->divide(DIM, query, 3, out), "divide %d", DIM);
    MEASURE(64 * DIM, "G/s", kernel->finite(64 * DIM, query), "finite %d", 64 * DIM);
    MEASURE(ROWS * DIM, "G/s", kernel->max_pool(ROWS, key_row, DIM, out, false), "max_pool %d x %d", ROWS, DIM);
    MEASURE(ROWS * DIM, "G/s", kernel->max_pool_backward(ROWS, key_row, DIM, out, query, key_grad_row),
            "max_pool_backward %d x %d", ROWS, DIM);
    MEASURE(ROWS * 64, "G/s", kernel->argmax(ROWS, s, 64, out, dp), "argmax %d x 64", ROWS);
    for (int i = 0; i < MOST * 64; i++)
        s[i] = (REAL)uniform(-20, 0);
    MEASURE(MOST * 64, "G/s", kernel->exp(MOST * 64, s, dp), "exp %d", MOST * 64);
}

// SPDX-License-Identifier: Apache-2.0
/* Attention from C. The keys of each span are equal here, so a span's region stands for it exactly, and the result is
 * that of full attention, which this program computes naively to compare.
 *
 *     make lib && cc examples/attention.c -Icsrc build/libcombiner.a -lm -lpthread && ./a.out */
#include "combiner.h"

#include <math.h>
#include <stdio.h>

enum { L = 64, D = 4, SPAN = 8 };

#define ARRAY(x) \
    { .data = (x), .heads = 1, .batch = L * D, .head = L * D, .row = D }

int main(void) {
    float query[L][D], key[L][D], value[L][D], out[L][D];
    for (int i = 0; i < L; i++)
        for (int d = 0; d < D; d++) {
            query[i][d] = sinf((float)(2 * i + d));
            key[i][d] = cosf((float)(i / SPAN * D + d));
            value[i][d] = sinf((float)(i * D + d));
        }

    const cmb_plan_options options = {.is_causal = true,
                                      .size_bias = true}; /* a region weighs as much as its members */
    cmb_plan *plan = NULL;
    cmb_error error = {.status = CMB_OK};
    cmb_plan_fixed(L, SPAN, 1, &options, &plan, &error);
    const cmb_problem problem = {
        .dtype = CMB_FLOAT32,
        .stages = CMB_BOTH,
        .B = 1,
        .Hq = 1,
        .Hk = 1,
        .L = L,
        .D = D,
        .Dv = D,
        .plan = (const cmb_plan *const[]){plan},
        .plans = 1,
        .query = ARRAY(query),
        .key = ARRAY(key),
        .value = ARRAY(value),
        .out = ARRAY(out),
    };
    if (error.status != CMB_OK || cmb_forward(&problem, NULL, &error) != CMB_OK) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    cmb_plan_free(plan);

    double worst = 0;
    for (int i = 0; i < L; i++) {
        double weight[L], sum = 0;
        for (int j = 0; j <= i; j++) {
            double logit = 0;
            for (int d = 0; d < D; d++)
                logit += cmb_default_scale(D) * (double)query[i][d] * (double)key[j][d];
            sum += weight[j] = exp(logit);
        }
        for (int d = 0; d < D; d++) {
            double expected = 0;
            for (int j = 0; j <= i; j++)
                expected += weight[j] / sum * (double)value[j][d];
            worst = fmax(worst, fabs(expected - (double)out[i][d]));
        }
    }
    printf("out[%d] = %.4f %.4f %.4f %.4f\n", L - 1, out[L - 1][0], out[L - 1][1], out[L - 1][2], out[L - 1][3]);
    printf("largest difference from full attention: %.1e\n", worst);
    return worst < 1e-6 ? 0 : 1;
}

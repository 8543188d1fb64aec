// SPDX-License-Identifier: Apache-2.0
#include "runtime/array.h"
#include "runtime/status.h"

cmb_status cmb_check_array(const char *name, const cmb_array *array, int64_t B, int64_t heads, int64_t rows,
                           int64_t dim, cmb_error *error) {
    if (!array->data)
        return cmb_fail(error, CMB_ERR_VALUE, "%s is missing", name);
    if (array->heads != heads)
        return cmb_fail(error, CMB_ERR_VALUE, "%s must have %lld heads, got %lld", name, (long long)heads,
                        (long long)array->heads);
    const int64_t counts[] = {B, heads, rows}, strides[] = {array->batch, array->head, array->row};
    int64_t reach = dim; /* elements between the first and the last */
    for (int i = 0; i < 3; i++) {
        int64_t step, stride;
        if (counts[i] == 0)
            return CMB_OK;
        if (__builtin_sub_overflow(strides[i] < 0 ? 0 : strides[i], strides[i] < 0 ? strides[i] : 0, &stride) ||
            __builtin_mul_overflow(counts[i] - 1, stride, &step) || __builtin_add_overflow(reach, step, &reach) ||
            reach > INT64_MAX / 8)
            return cmb_fail(error, CMB_ERR_OVERFLOW, "%s spans more than can be addressed", name);
    }
    return CMB_OK;
}

bool cmb_rows_overlap(const cmb_array *array, int64_t B, int64_t rows, int64_t dim) {
    int64_t counts[] = {B, array->heads, rows}, steps[] = {array->batch, array->head, array->row}, reach = dim;
    if (B == 0 || array->heads == 0 || rows == 0)
        return false;
    for (int i = 0; i < 3; i++) /* the stride of an axis of one entry is never used */
        steps[i] = counts[i] > 1 && steps[i] < 0 ? -steps[i] : steps[i];
    for (int taken = 0; taken < 3; taken++) {
        int least = -1;
        for (int i = 0; i < 3; i++)
            if (counts[i] > 1 && (least < 0 || steps[i] < steps[least]))
                least = i;
        if (least < 0)
            break;
        if (steps[least] < reach)
            return true;
        reach += steps[least] * (counts[least] - 1);
        counts[least] = 1;
    }
    return false;
}

// SPDX-License-Identifier: Apache-2.0
/* What the options of a decoder, and new positions, must satisfy. */
#include "decode/decoder.h"
#include "runtime/array.h"

#include <float.h>
#include <math.h>

static cmb_status check_pattern(const cmb_pattern *pattern, cmb_error *error) {
    static const char *const names[] = {[CMB_FIXED] = "span",
                                        [CMB_TREE] = "branching",
                                        [CMB_WINDOW] = "size",
                                        [CMB_HEAVILY_COMPRESSED] = "rate",
                                        [CMB_AXIAL] = "width"};
    if ((unsigned)pattern->kind > CMB_AXIAL)
        return cmb_fail(error, CMB_ERR_VALUE, "kind must be between 0 and %d, got %d", CMB_AXIAL, (int)pattern->kind);
    const bool is_sized = pattern->kind != CMB_DENSE && pattern->kind != CMB_LOGSPARSE;
    const int smallest = pattern->kind == CMB_TREE ? 2 : 1;
    if (is_sized && pattern->size < smallest)
        return cmb_fail(error, CMB_ERR_VALUE, "%s must be at least %d, got %lld", names[pattern->kind], smallest,
                        (long long)pattern->size);
    if ((pattern->kind == CMB_FIXED || pattern->kind == CMB_HEAVILY_COMPRESSED) && pattern->window < 1)
        return cmb_fail(error, CMB_ERR_VALUE, "window must be at least 1, got %lld", (long long)pattern->window);
    if (pattern->kind == CMB_TREE && pattern->levels < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "levels must be at least 1, or 0 for all, got %lld",
                        (long long)pattern->levels);
    if ((unsigned)pattern->pooling > CMB_POOL_SUM)
        return cmb_fail(error, CMB_ERR_VALUE, "pooling must be max, mean or sum, got %d", (int)pattern->pooling);
    if ((unsigned)pattern->order > CMB_AXIAL_ROWMAJOR)
        return cmb_fail(error, CMB_ERR_VALUE, "order must be vertical, horizontal or rowmajor, got %d",
                        (int)pattern->order);
    if (pattern->weighted && (pattern->kind != CMB_AXIAL || pattern->order != CMB_AXIAL_ROWMAJOR))
        return cmb_fail(error, CMB_ERR_VALUE, "row_key may be weighted only where order is rowmajor");
    return CMB_OK;
}

cmb_status cmb_check_decoder_options(const cmb_decoder_options *o, cmb_error *error) {
    if ((unsigned)o->dtype > CMB_FLOAT16)
        return cmb_fail(error, CMB_ERR_VALUE, "dtype must be between 0 and 3, got %d", (int)o->dtype);
    if (o->D < 1 || o->D > CMB_MAX_FEATURES || o->Dv < 1 || o->Dv > CMB_MAX_FEATURES)
        return cmb_fail(error, CMB_ERR_VALUE, "D and Dv must be between 1 and %d, got %lld and %lld", CMB_MAX_FEATURES,
                        (long long)o->D, (long long)o->Dv);
    if (o->B < 0 || o->Hk < 0 || o->Hq < 0 || (o->Hk == 0 ? o->Hq != 0 : o->Hq % o->Hk != 0))
        return cmb_fail(error, CMB_ERR_VALUE, "query heads must be a multiple of key heads, got %lld and %lld",
                        (long long)o->Hq, (long long)o->Hk);
    if (o->rollback < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "rollback must not be negative, got %lld", (long long)o->rollback);
    if (!isfinite(o->scale))
        return cmb_fail(error, CMB_ERR_VALUE, "scale must be finite, got %g", o->scale);
    if (!(o->softcap >= 0 && o->softcap <= FLT_MAX))
        return cmb_fail(error, CMB_ERR_VALUE, "softcap must be positive and finite in float32, or 0, got %g",
                        o->softcap);
    if (o->key_bias_heads != 0 && o->key_bias_heads != o->Hk && o->key_bias_heads != o->Hq)
        return cmb_fail(error, CMB_ERR_VALUE, "key_bias_heads must be 0, %lld or %lld, got %lld", (long long)o->Hk,
                        (long long)o->Hq, (long long)o->key_bias_heads);
    if (o->sink.data)
        TRY(cmb_check_array("sink", &o->sink, o->B, o->Hq, 1, 1, error));
    if (o->select < 0 || o->select > INT32_MAX)
        return cmb_fail(error, CMB_ERR_VALUE, "select must be between 0 and %d, got %lld", INT32_MAX,
                        (long long)o->select);
    return check_pattern(&o->pattern, error);
}

cmb_status cmb_check_new_positions(const cmb_decoder *d, const cmb_new_positions *p, cmb_error *error) {
    const cmb_decoder_options *o = &d->options;
    if (p->n < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "n must not be negative, got %lld", (long long)p->n);
    for (int64_t b = 0; b < o->B; b++) {
        const int64_t n = p->lengths ? p->lengths[b] : p->n;
        if (n < 0 || n > p->n)
            return cmb_fail(error, CMB_ERR_VALUE, "lengths must be between 0 and %lld, got %lld at %lld",
                            (long long)p->n, (long long)n, (long long)b);
        if (n > (INT64_C(1) << 30) - d->sequence[b].length)
            return cmb_fail(error, CMB_ERR_OVERFLOW,
                            "a sequence must have at most 2^30 positions, got %lld and %lld more",
                            (long long)d->sequence[b].length, (long long)n);
    }
    TRY(cmb_check_array("query", &p->query, o->B, o->Hq, p->n, o->D, error));
    TRY(cmb_check_array("key", &p->key, o->B, o->Hk, p->n, o->D, error));
    TRY(cmb_check_array("value", &p->value, o->B, o->Hk, p->n, o->Dv, error));
    TRY(cmb_check_array("out", &p->out, o->B, o->Hq, p->n, o->Dv, error));
    if (o->key_bias_heads)
        TRY(cmb_check_array("key_bias", &p->key_bias, o->B, o->key_bias_heads, p->n, 1, error));
    else if (p->key_bias.data)
        return cmb_fail(error, CMB_ERR_VALUE, "key_bias must be absent where key_bias_heads is 0");
    if (cmb_rows_overlap(&p->out, o->B, p->n, o->Dv))
        return cmb_fail(error, CMB_ERR_VALUE, "out is written and must not have rows that overlap");
    return CMB_OK;
}

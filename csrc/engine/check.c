// SPDX-License-Identifier: Apache-2.0
#include "engine/check.h"
#include "engine/problem.h"
#include "runtime/array.h"
#include "runtime/status.h"

#include <float.h>
#include <math.h>

static cmb_status check_array(const char *name, const cmb_array *array, const cmb_problem *p, int64_t heads,
                              int64_t rows, int64_t dim, cmb_error *error) {
    return cmb_check_array(name, array, p->B, heads, rows, dim, error);
}

/* The heads of a region array that may have key or query heads. */
static int64_t key_or_query_heads(const cmb_array *array, const cmb_problem *p) {
    return array->heads == p->Hk ? p->Hk : p->Hq;
}

static cmb_status check_sizes(const cmb_problem *p, cmb_error *error) {
    if (p->dtype < CMB_FLOAT32 || p->dtype > CMB_FLOAT16)
        return cmb_fail(error, CMB_ERR_VALUE, "dtype must be between 0 and 3, got %d", (int)p->dtype);
    if (p->stages < CMB_SUMMARIZE || p->stages > CMB_BOTH)
        return cmb_fail(error, CMB_ERR_VALUE, "stages must be 1, 2 or 3, got %d", (int)p->stages);
    const struct {
        const char *name;
        int64_t value, min, max;
    } sizes[] = {
        {"B", p->B, 0, INT64_MAX}, {"Hq", p->Hq, 0, INT64_MAX},      {"Hk", p->Hk, 0, INT64_MAX},
        {"L", p->L, 0, INT32_MAX}, {"D", p->D, 1, CMB_MAX_FEATURES}, {"Dv", p->Dv, 1, CMB_MAX_FEATURES},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < sizes[i].min || sizes[i].value > sizes[i].max)
            return cmb_fail(error, CMB_ERR_VALUE, "%s must be between %lld and %lld, got %lld", sizes[i].name,
                            (long long)sizes[i].min, (long long)sizes[i].max, (long long)sizes[i].value);
    if (p->Hk == 0 ? p->Hq != 0 : p->Hq % p->Hk != 0)
        return cmb_fail(error, CMB_ERR_VALUE, "query heads must be a multiple of key heads, got %lld and %lld",
                        (long long)p->Hq, (long long)p->Hk);
    if (p->components < 0)
        return cmb_fail(error, CMB_ERR_VALUE, "components must be at least 0, got %lld", (long long)p->components);
    if (p->components > 1 && p->stages != CMB_BOTH)
        return cmb_fail(error, CMB_ERR_VALUE, "stages must be 3 for a mixture, got %d", (int)p->stages);
    if (!isfinite(p->scale))
        return cmb_fail(error, CMB_ERR_VALUE, "scale must be finite, got %g", p->scale);
    if (!(p->softcap >= 0 && p->softcap <= FLT_MAX))
        return cmb_fail(error, CMB_ERR_VALUE, "softcap must be positive and finite in float32, or 0, got %g",
                        p->softcap);
    return CMB_OK;
}

/* The boundaries run from 0 to L without decreasing. */
static cmb_status check_segments(const cmb_problem *p, cmb_error *error) {
    if (!p->segment)
        return CMB_OK;
    if (p->segments < 0 || p->segments > INT32_MAX)
        return cmb_fail(error, CMB_ERR_VALUE, "segments must be between 0 and 2^31 - 1, got %lld",
                        (long long)p->segments);
    for (int64_t s = 0, before = 0; s <= p->segments; before = p->segment[s++])
        if (p->segment[s] < before || p->segment[s] > p->L || (s == 0 && p->segment[s] != 0) ||
            (s == p->segments && p->segment[s] != p->L))
            return cmb_fail(error, CMB_ERR_VALUE, "segment must run from 0 to %lld and not decrease, got %lld at %lld",
                            (long long)p->L, (long long)p->segment[s], (long long)s);
    return CMB_OK;
}

/* Batch entry, head and table row are words of 32 bits in a random number's counter; a plan has less than 2^32 rows.
 * Comes after check_plans. */
static cmb_status check_dropout(const cmb_problem *p, cmb_error *error) {
    if (!(p->dropout_p >= 0 && p->dropout_p <= 1))
        return cmb_fail(error, CMB_ERR_VALUE, "dropout_p must be between 0 and 1, got %g", p->dropout_p);
    if (p->dropout_p > 0 && (p->B > INT64_C(1) << 32 || p->Hq > INT64_C(1) << 32))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "B and Hq must be at most 2^32 with dropout, got %lld and %lld",
                        (long long)p->B, (long long)p->Hq);
    for (int64_t s = 0; p->dropout_p > 0 && s < cmb_count_segments(p); s++)
        for (int64_t c = 0, row = 0; c < cmb_count_components(p); c++) {
            const cmb_segment it = cmb_segment_at(p, c, s);
            if (row > INT64_C(1) << 31)
                return cmb_fail(error, CMB_ERR_OVERFLOW,
                                "components must have at most 2^31 rows before the last one with dropout");
            row += it.L + it.R;
        }
    return CMB_OK;
}

/* One plan for each segment, or for each segment, batch entry and key head, of each component; all of a component are
 * of one kind. */
static cmb_status check_plans(const cmb_problem *p, cmb_error *error) {
    const int64_t segments = cmb_count_segments(p), components = cmb_count_components(p);
    int64_t heads, rows, key_heads, segment_heads, max_plans;
    if (__builtin_mul_overflow(p->B, p->Hq, &heads) || __builtin_mul_overflow(heads, p->L, &rows))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "B * Hq * L does not fit in 64 bits");
    if (__builtin_mul_overflow(p->B, p->Hk, &key_heads))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "B * Hk does not fit in 64 bits");
    if (__builtin_mul_overflow(segments, heads, &segment_heads))
        return cmb_fail(error, CMB_ERR_OVERFLOW, "B * Hq heads of %lld segments do not fit in 64 bits",
                        (long long)segments);
    if (__builtin_mul_overflow(segments, key_heads, &max_plans) || p->plans % components ||
        (p->plans / components != segments && p->plans / components != max_plans))
        return cmb_fail(error, CMB_ERR_VALUE, "plans must be 1 or B * Hk = %lld, for each of %lld segments%s, got %lld",
                        (long long)key_heads, (long long)segments, p->components > 1 ? " of each component" : "",
                        (long long)p->plans);
    for (int64_t i = 0; i < p->plans; i++)
        if (!p->plan || !p->plan[i])
            return cmb_fail(error, CMB_ERR_VALUE, "plan is missing");
    for (int64_t i = 0, own = p->plans / components; i < p->plans; i++) { /* own: of a component */
        const cmb_plan *plan = p->plan[i], *first = p->plan[i / own * own];
        const cmb_segment it = cmb_segment_at(p, i / own, i % own / (own / segments));
        if (plan->L != it.L)
            return cmb_fail(error, CMB_ERR_VALUE, "plan must be of length %lld, got %lld", (long long)it.L,
                            (long long)plan->L);
        if (plan->is_slice && p->stages != CMB_ATTEND)
            return cmb_fail(error, CMB_ERR_VALUE, "plan must be whole, unless it attends given summaries");
        if (plan->is_slice != first->is_slice || plan->first_query != it.plan[0]->first_query ||
            plan->queries != it.plan[0]->queries)
            return cmb_fail(error, CMB_ERR_VALUE, "plans of one call must have the same queries");
        if (plan->traits.only_attends && p->stages & CMB_SUMMARIZE)
            return cmb_fail(error, CMB_ERR_VALUE,
                            "plan must pool the regions it attends, or they must be given to attend");
        if (plan->pooling != first->pooling || plan->size_bias != first->size_bias ||
            plan->weighted != first->weighted || plan->is_causal != first->is_causal)
            return cmb_fail(error, CMB_ERR_VALUE,
                            "plans of one call must agree in pooling, size_bias, weighted and "
                            "is_causal");
    }
    return CMB_OK;
}

/* Biases of keys and of regions, and sinks. */
static cmb_status check_biases(const cmb_problem *p, int64_t R, bool backward, cmb_error *error) {
    const bool is_kept = cmb_makes_region_bias(p) && cmb_has_weighted_plans(p); /* b_R, of each query head */
    if (p->key_bias.data)
        TRY(check_array("key_bias", &p->key_bias, p, key_or_query_heads(&p->key_bias, p), p->L, 1, error));
    if (p->region_bias.data)
        TRY(check_array("region_bias", &p->region_bias, p, key_or_query_heads(&p->region_bias, p), R, 1, error));
    if (p->sink.data)
        TRY(check_array("sink", &p->sink, p, p->Hq, 1, 1, error));
    if (p->summary_bias.data || (backward && is_kept))
        TRY(check_array("summary_bias", &p->summary_bias, p, is_kept ? p->Hq : key_or_query_heads(&p->summary_bias, p),
                        R, 1, error));
    return CMB_OK;
}

cmb_status cmb_check_problem(const cmb_problem *p, bool backward, cmb_error *error) {
    if (!p)
        return cmb_fail(error, CMB_ERR_VALUE, "problem is missing");
    TRY(check_sizes(p, error));
    TRY(check_segments(p, error));
    TRY(check_plans(p, error));
    TRY(check_dropout(p, error));
    const int64_t R = cmb_count_regions(p), components = cmb_count_components(p), queries = cmb_count_queries(p);
    const bool attend = p->stages & CMB_ATTEND, summarize = p->stages & CMB_SUMMARIZE, is_mixture = p->components > 1;
    const bool weighted = !p->region_key.data && cmb_has_weighted_plans(p);
    TRY(check_array("query", &p->query, p, p->Hq, queries, p->D, error));
    TRY(check_array("key", &p->key, p, p->Hk, p->L, p->D, error));
    TRY(check_array("value", &p->value, p, p->Hk, p->L, p->Dv, error));
    if (p->region_query.data)
        TRY(check_array("region_query", &p->region_query, p, p->Hq, R, p->D, error));
    if (p->region_key.data)
        TRY(check_array("region_key", &p->region_key, p, key_or_query_heads(&p->region_key, p), R, p->D, error));
    TRY(check_biases(p, R, backward, error));
    if (p->stages == CMB_ATTEND || (p->stages == CMB_SUMMARIZE && !backward) || p->summary_key.data ||
        (backward && weighted))
        TRY(check_array("summary_key", &p->summary_key, p,
                        weighted && summarize ? p->Hq : key_or_query_heads(&p->summary_key, p), R, p->D, error));
    if (p->stages != CMB_BOTH || backward || p->summary_value.data)
        TRY(check_array("summary_value", &p->summary_value, p, p->Hq, R, p->Dv, error));
    if (p->summary_lse.data)
        TRY(check_array("summary_lse", &p->summary_lse, p, p->Hq, R, 1, error));
    if ((backward && summarize) || p->summary_softmax.data)
        TRY(check_array("summary_softmax", &p->summary_softmax, p, p->Hq, R, 2, error));
    if (attend && !(backward && is_mixture))
        TRY(check_array("out", &p->out, p, p->Hq, queries, p->Dv, error));
    if (p->lse.data && is_mixture)
        return cmb_fail(error, CMB_ERR_VALUE, "lse must be absent for a mixture, whose components have one each");
    if (p->lse.data)
        TRY(check_array("lse", &p->lse, p, p->Hq, queries, 1, error));
    if ((backward && attend) || p->softmax.data)
        TRY(check_array("softmax", &p->softmax, p, p->Hq, queries, components * 2, error));
    if (is_mixture && (backward || p->component_out.data))
        TRY(check_array("component_out", &p->component_out, p, p->Hq, p->L, components * p->Dv, error));
    return CMB_OK;
}

cmb_status cmb_check_gradients(const cmb_problem *p, const cmb_gradients *g, cmb_error *error) {
    if (!g)
        return cmb_fail(error, CMB_ERR_VALUE, "gradients is missing");
    const int64_t R = cmb_count_regions(p), queries = cmb_count_queries(p);
    TRY(check_array("gradient of query", &g->query, p, p->Hq, queries, p->D, error));
    TRY(check_array("gradient of key", &g->key, p, p->Hk, p->L, p->D, error));
    TRY(check_array("gradient of value", &g->value, p, p->Hk, p->L, p->Dv, error));
    if (p->stages & CMB_ATTEND) {
        TRY(check_array("gradient of out", &g->out, p, p->Hq, queries, p->Dv, error));
        if (g->lse.data && p->components > 1)
            return cmb_fail(error, CMB_ERR_VALUE, "gradient of lse must be absent for a mixture");
        if (g->lse.data)
            TRY(check_array("gradient of lse", &g->lse, p, p->Hq, queries, 1, error));
    }
    if (p->stages == CMB_ATTEND || g->summary_key.data)
        TRY(check_array("gradient of summary_key", &g->summary_key, p,
                        p->summary_key.data ? p->summary_key.heads : key_or_query_heads(&g->summary_key, p), R, p->D,
                        error));
    if (p->stages == CMB_ATTEND || g->summary_value.data)
        TRY(check_array("gradient of summary_value", &g->summary_value, p, p->Hq, R, p->Dv, error));
    if (p->key_bias.data)
        TRY(check_array("gradient of key_bias", &g->key_bias, p, p->key_bias.heads, p->L, 1, error));
    if (p->stages & CMB_ATTEND && p->sink.data)
        TRY(check_array("gradient of sink", &g->sink, p, p->Hq, 1, 1, error));
    if (p->stages & CMB_SUMMARIZE && p->region_bias.data)
        TRY(check_array("gradient of region_bias", &g->region_bias, p, p->region_bias.heads, R, 1, error));
    if (p->stages == CMB_ATTEND ? p->summary_bias.data != NULL : g->summary_bias.data != NULL)
        TRY(check_array("gradient of summary_bias", &g->summary_bias, p,
                        p->summary_bias.data ? p->summary_bias.heads : key_or_query_heads(&g->summary_bias, p), R, 1,
                        error));
    if (p->stages != CMB_ATTEND && p->region_query.data)
        TRY(check_array("gradient of region_query", &g->region_query, p, p->Hq, R, p->D, error));
    if (p->stages != CMB_ATTEND && p->region_key.data)
        TRY(check_array("gradient of region_key", &g->region_key, p, p->region_key.heads, R, p->D, error));
    return CMB_OK;
}

typedef struct {
    const char *name;
    const cmb_array *array; /* may be absent */
    bool is_written;
    int64_t rows, dim;
} output;

static cmb_status check_disjoint_rows(const output *outputs, size_t count, int64_t B, cmb_error *error) {
    for (const output *it = outputs; it < outputs + count; it++)
        if (it->is_written && it->array->data && cmb_rows_overlap(it->array, B, it->rows, it->dim))
            return cmb_fail(error, CMB_ERR_VALUE, "%s is written and must not have rows that overlap", it->name);
    return CMB_OK;
}

cmb_status cmb_check_outputs(const cmb_problem *p, const cmb_gradients *g, cmb_error *error) {
    const int64_t L = p->L, queries = cmb_count_queries(p), R = cmb_count_regions(p);
    const int64_t components = cmb_count_components(p);
    const bool attend = p->stages & CMB_ATTEND, summarize = p->stages & CMB_SUMMARIZE;
    if (g) {
        const output gradients[] = {
            {"gradient of query", &g->query, true, queries, p->D},
            {"gradient of key", &g->key, true, L, p->D},
            {"gradient of value", &g->value, true, L, p->Dv},
            {"gradient of region_query", &g->region_query, summarize && p->region_query.data, R, p->D},
            {"gradient of region_key", &g->region_key, summarize && p->region_key.data, R, p->D},
            {"gradient of key_bias", &g->key_bias, p->key_bias.data, L, 1},
            {"gradient of region_bias", &g->region_bias, summarize && p->region_bias.data, R, 1},
            {"gradient of sink", &g->sink, attend && p->sink.data, 1, 1},
            {"gradient of summary_bias", &g->summary_bias, !summarize && p->summary_bias.data, R, 1},
            {"gradient of summary_key", &g->summary_key, !summarize, R, p->D},
            {"gradient of summary_value", &g->summary_value, !summarize, R, p->Dv},
        };
        return check_disjoint_rows(gradients, sizeof gradients / sizeof *gradients, p->B, error);
    }
    const output results[] = {
        {"summary_key", &p->summary_key, summarize, R, p->D},
        {"summary_value", &p->summary_value, summarize, R, p->Dv},
        {"summary_bias", &p->summary_bias, summarize, R, 1},
        {"summary_lse", &p->summary_lse, summarize, R, 1},
        {"summary_softmax", &p->summary_softmax, summarize, R, 2},
        {"out", &p->out, attend, queries, p->Dv},
        {"lse", &p->lse, attend, queries, 1},
        {"softmax", &p->softmax, attend, queries, components * 2},
        {"component_out", &p->component_out, p->components > 1, L, components * p->Dv},
    };
    return check_disjoint_rows(results, sizeof results / sizeof *results, p->B, error);
}

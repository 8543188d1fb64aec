// SPDX-License-Identifier: Apache-2.0
/* The choice of regions: select. */
#include "binding.h"

/* An array `[..., Hk, T, k]` of int64 for the result. */
static PyObject *new_regions(call *c, cmb_scoring *s) {
    npy_intp shape[MAX_AXES];
    const int64_t blocks = s->L / s->block + (s->L % s->block != 0);
    int axes = shape_of(c, s->Hk, blocks, NO_FEATURES, shape);
    shape[axes++] = s->k;
    PyObject *array = hold(c, PyArray_SimpleNew(axes, shape, NPY_INT64), NULL);
    if (array)
        s->regions = data_of(array);
    return array;
}

PyDoc_STRVAR(
    select_doc,
    "select($module, query, key, region_key, plan, is_causal, scale, key_mask, block, k, score, by_first_query, "
    "/)\n--\n\nReturn the regions with the largest scores, for each block of queries.");

static PyObject *select_regions(PyObject *module, PyObject *args) {
    PyObject *query, *key, *region_key, *plan, *causal, *scale, *mask, *made, *result = NULL;
    long long block, k;
    int score, by_first_query;
    if (!PyArg_ParseTuple(args, "OOOOOOOLLip:select", &query, &key, &region_key, &plan, &causal, &scale, &mask, &block,
                          &k, &score, &by_first_query))
        return NULL;
    if (block < 1 || k < 0 || k > INT32_MAX)
        return PyErr_Format(PyExc_ValueError, "block and k must be at least 1 and 0, got %lld and %lld", block, k);
    call c = {.state = state_of(module), .type = NPY_NOTYPE};
    cmb_problem *p = &c.problem;
    cmb_array keys;
    if (!read_leader(&c, query, "query", "(..., Hq, L, D) or (L, D)") || !read_keys(&c, key) ||
        !read_plans(&c, plan, causal, false) || !read_scale(&c, scale) || !read_key_mask(&c, mask) ||
        !read_array(&c, region_key, "region_key", EITHER_HEADS, c.R, p->D, &keys))
        goto end;
    cmb_scoring s = {
        .dtype = p->dtype,
        .B = p->B,
        .Hq = p->Hq,
        .Hk = p->Hk,
        .L = p->L,
        .D = p->D,
        .scale = p->scale,
        .plan = p->plan,
        .plans = p->plans,
        .query = p->query,
        .region_key = keys,
        .key_mask = p->key_mask,
        .mask_batch = p->mask_batch,
        .mask_row = p->mask_row,
        .block = block,
        .k = k,
        .score = (cmb_score)score,
        .by_first_query = by_first_query,
    };
    if (!(made = new_regions(&c, &s)))
        goto end;
    library_call it;
    enter_library(&it);
    if (leave_library(&it, cmb_select(&s, &it.interrupt, &it.error)))
        result = Py_NewRef(made);
end:
    end_call(&c, 0);
    return result;
}

PyMethodDef select_methods[] = {
    {"select", select_regions, METH_VARARGS, select_doc},
    {NULL, NULL, 0, NULL},
};

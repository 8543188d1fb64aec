// SPDX-License-Identifier: Apache-2.0
/* Reads the arguments of attention into a cmb_problem. */
#include "binding.h"

#include <float.h>
#include <math.h>
#include <string.h>

static bool check_features(const char *name, int64_t features) {
    bool fits = features >= 1 && features <= CMB_MAX_FEATURES;
    if (!fits)
        PyErr_Format(PyExc_ValueError, "%s must have 1 to %d features, got %lld", name, CMB_MAX_FEATURES,
                     (long long)features);
    return fits;
}

bool read_leader(call *c, PyObject *object, const char *name, const char *shape) {
    cmb_problem *p = &c->problem;
    PyArrayObject *array = hold(c, to_array(object, name, real_array), name);
    if (!array || !check_type(c, array, name, FEATURES))
        return false;
    c->leader = name;
    c->axes = PyArray_NDIM(array);
    if (c->axes < 2) {
        PyErr_Format(PyExc_ValueError, "%s must have shape %s, got %d axes", name, shape, c->axes);
        return false;
    }
    p->B = 1;
    for (int a = 0; a < c->axes - 3; a++) {
        c->lead[a] = PyArray_DIM(array, a);
        if (__builtin_mul_overflow(p->B, (int64_t)c->lead[a], &p->B)) {
            PyErr_Format(PyExc_OverflowError, "%s has more batch entries than can be counted", name);
            return false;
        }
    }
    p->L = c->queries = PyArray_DIM(array, c->axes - 2);
    p->D = PyArray_DIM(array, c->axes - 1);
    if (!check_features(name, p->D) || !view_array(c, array, FEATURES, &p->query))
        return false;
    p->Hq = p->query.heads;
    return true;
}

bool read_keys(call *c, PyObject *key) {
    cmb_problem *p = &c->problem;
    PyArrayObject *array = read_array(c, key, "key", KEY_HEADS, c->has_offset ? KEY_ROWS : p->L, p->D, &p->key);
    if (!array)
        return false;
    p->L = PyArray_DIM(array, c->axes - 2);
    p->Hk = p->key.heads;
    if (p->Hk ? p->Hq % p->Hk : p->Hq) {
        PyErr_Format(PyExc_ValueError, "the heads of query must be a multiple of the heads of key, got %lld and %lld",
                     (long long)p->Hq, (long long)p->Hk);
        return false;
    }
    return true;
}

bool read_key_and_value(call *c, PyObject *key, PyObject *value) {
    cmb_problem *p = &c->problem;
    if (!read_keys(c, key))
        return false;
    PyArrayObject *array = read_array(c, value, "value", p->Hk, p->L, VALUE_FEATURES, &p->value);
    if (!array)
        return false;
    p->Dv = PyArray_DIM(array, c->axes - 1);
    return check_features("value", p->Dv);
}

bool read_number(PyObject *object, const char *name, const char *expected, double *number) {
    *number = PyFloat_AsDouble(object);
    if (!PyErr_Occurred())
        return true;
    if (PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_ValueError))
        raise_type(name, expected, object);
    else if (PyErr_ExceptionMatches(PyExc_OverflowError))
        PyErr_Format(PyExc_ValueError, "%s must be finite, got an int beyond float64", name);
    return false;
}

bool read_scale(call *c, PyObject *scale) {
    if (scale == Py_None)
        c->problem.scale = cmb_default_scale(c->problem.D);
    else if (!read_number(scale, "scale", "a number or None", &c->problem.scale))
        return false;
    if (!isfinite(c->problem.scale)) {
        PyErr_Format(PyExc_ValueError, "scale must be finite, got %S", scale);
        return false;
    }
    if (c->problem.scale == 0)
        c->problem.scale = -0.0; /* 0 stands for the default in combiner.h */
    return true;
}

bool read_softcap(call *c, PyObject *softcap) {
    double *cap = &c->problem.softcap;
    if (softcap == Py_None)
        return true;
    if (!read_number(softcap, "softcap", "a number or None", cap))
        return false;
    if (!(*cap > 0 && *cap <= FLT_MAX)) {
        PyErr_Format(PyExc_ValueError, "softcap must be positive and finite, got %S", softcap);
        return false;
    }
    return true;
}

bool read_key_mask(call *c, PyObject *object) {
    if (object == Py_None)
        return true;
    PyArrayObject *array = hold(c, to_array(object, "key_mask", "a bool NumPy array"), "key_mask");
    if (!array)
        return false;
    if (PyArray_TYPE(array) != NPY_BOOL) {
        PyErr_Format(PyExc_TypeError, "key_mask must be a bool NumPy array, got %S", PyArray_DESCR(array));
        return false;
    }
    npy_intp expected[MAX_AXES], batch;
    int axes = c->axes > 3 ? c->axes - 2 : 1;
    memcpy(expected, c->lead, (size_t)(axes - 1) * sizeof *expected);
    expected[axes - 1] = c->problem.L;
    if (!check_shape(c, array, "key_mask", axes, expected))
        return false;
    if (!merge_leading(c, array, &batch)) {
        array = hold(c, PyArray_NewCopy(array, NPY_CORDER), NULL);
        if (!array || !merge_leading(c, array, &batch))
            return false;
    }
    c->problem.key_mask = PyArray_DATA(array);
    c->problem.mask_batch = batch;
    c->problem.mask_row = PyArray_STRIDE(array, axes - 1);
    return true;
}

bool read_flag(PyObject *object, const char *name, bool *flag) {
    if (!PyBool_Check(object) && !PyArray_IsScalar(object, Bool)) {
        raise_type(name, "a bool", object);
        return false;
    }
    int truth = PyObject_IsTrue(object);
    *flag = truth == 1;
    return truth >= 0;
}

/* The plan of a sequence of length L. */
static bool read_plan(const call *c, PyObject *object, int64_t L, bool is_causal, const cmb_plan **plan) {
    if (!PyObject_TypeCheck(object, (PyTypeObject *)c->state->plan_type)) {
        raise_type("each plan of pattern", "a combiner.Plan", object);
        return false;
    }
    *plan = plan_of(object);
    if ((*plan)->L != L) {
        PyErr_Format(PyExc_ValueError, "pattern must be a plan for the length of %s, %lld, got one for %lld",
                     c->problem.segment ? "its segment"
                     : c->has_offset    ? "key"
                                        : "query",
                     (long long)L, (long long)(*plan)->L);
        return false;
    }
    if (is_causal && !(*plan)->is_causal) {
        PyErr_SetString(PyExc_ValueError, "is_causal must be False with a bidirectional plan as pattern, got True");
        return false;
    }
    return true;
}

bool read_cu_seqlens(call *c, PyObject *object) {
    cmb_problem *p = &c->problem;
    if (object == Py_None)
        return true;
    PyArrayObject *array = hold(c, read_integers(object, "cu_seqlens", NPY_INT64, 0), NULL);
    if (!array)
        return false;
    const int64_t *position = data_of((PyObject *)array);
    p->segment = position;
    p->segments = PyArray_SIZE(array) - 1;
    for (npy_intp s = 0; s <= p->segments; s++)
        if (s == 0 ? position[0] != 0 : position[s] < position[s - 1]) {
            PyErr_Format(PyExc_ValueError, "cu_seqlens must start at 0 and not decrease, got %lld at %zd",
                         (long long)position[s], s);
            return false;
        }
    if (p->segments < 0 || position[p->segments] != p->L) {
        PyErr_Format(PyExc_ValueError, "cu_seqlens must end at the length of query, %lld, got %S", (long long)p->L,
                     object);
        return false;
    }
    return true;
}

void free_slices(call *c) {
    for (int64_t n = 0; c->slices && n < c->problem.plans; n++)
        cmb_plan_free(c->slices[n]);
    PyMem_Free(c->slices);
}

bool read_offset(call *c, PyObject *object) {
    cmb_problem *p = &c->problem;
    if (!c->has_offset)
        return true;
    if (!PyLong_Check(object)) {
        raise_type("offset", "an int or None", object);
        return false;
    }
    const long long offset = PyLong_AsLongLong(object);
    if (c->queries > p->L) {
        PyErr_Format(PyExc_ValueError, "query must have at most key's length, %lld, with an offset, got %lld",
                     (long long)p->L, (long long)c->queries);
        return false;
    }
    if (PyErr_Occurred() || offset < 0 || offset > p->L - c->queries) {
        PyErr_Format(PyExc_ValueError, "offset must be between 0 and %lld, key's length less query's, got %S",
                     (long long)(p->L - c->queries), object);
        return false;
    }
    if (p->stages != CMB_ATTEND) {
        PyErr_SetString(PyExc_ValueError, "stages must be 2 with an offset");
        return false;
    }
    c->slices = PyMem_Calloc((size_t)p->plans + 1, sizeof *c->slices);
    if (!c->slices) {
        PyErr_NoMemory();
        return false;
    }
    for (int64_t n = 0; n < p->plans; n++) {
        int64_t first = offset, count = c->queries;
        library_call it;
        cmb_queries_of_plan(p, n, &first, &count);
        enter_library(&it);
        const cmb_status status = cmb_plan_slice(p->plan[n], first, count, &it.interrupt, &c->slices[n], &it.error);
        if (!leave_library(&it, status))
            return false;
    }
    p->plan = (const cmb_plan *const *)c->slices;
    return true;
}

bool read_dropout(call *c, PyObject *object) {
    cmb_problem *p = &c->problem;
    PyObject *dropout_p, *seed;
    if (object == Py_None)
        return true;
    if (!PyTuple_Check(object)) {
        raise_type("dropout", "None or a tuple of dropout_p and seed", object);
        return false;
    }
    if (!PyArg_ParseTuple(object, "OO:dropout", &dropout_p, &seed) ||
        !read_number(dropout_p, "dropout[0]", "a number", &p->dropout_p))
        return false;
    if (!PyLong_Check(seed)) {
        raise_type("dropout[1]", "an int", seed);
        return false;
    }
    p->seed = PyLong_AsUnsignedLongLong(seed);
    if (PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "dropout[1] must be a seed of 64 bits, got %S", seed);
        return false;
    }
    return true;
}

/* How many plans a component has: one for each segment, or for each segment, batch entry and key head. A Plan counts as
 * a tuple of one. -1: an exception is set. */
static Py_ssize_t count_plans(const call *c, PyObject *component) {
    const cmb_problem *p = &c->problem;
    const bool is_tuple = PyTuple_Check(component);
    const int64_t segments = p->segment ? p->segments : 1;
    const Py_ssize_t count = is_tuple ? PyTuple_Size(component) : 1;
    int64_t heads, expected;
    bool fits = !__builtin_mul_overflow(p->B, p->Hk, &heads) && !__builtin_mul_overflow(segments, heads, &expected);
    if (fits && (count == expected || (count == segments && (p->segment || !is_tuple))))
        return count;
    PyErr_Format(PyExc_ValueError,
                 "pattern must be a tuple of one plan for each of %lld batch entries and %lld key heads%s, got %zd",
                 (long long)p->B, (long long)p->Hk, p->segment ? " of each segment" : "", count);
    return -1;
}

/* Reads the `count` plans of a component to `to`, each `times`: once for each head that it serves. */
static bool read_component(call *c, PyObject *component, bool is_causal, Py_ssize_t count, Py_ssize_t times,
                           const cmb_plan **to) {
    const cmb_problem *p = &c->problem;
    const int64_t segments = p->segment ? p->segments : 1;
    for (Py_ssize_t n = 0, each = segments ? count / segments : 0; n < count;) {
        const int64_t s = n / each, L = p->segment ? p->segment[s + 1] - p->segment[s] : p->L;
        int64_t R = 0; /* the largest of the segment's plans */
        for (Py_ssize_t end = n + each; n < end; n++) {
            PyObject *object = PyTuple_Check(component) ? PyTuple_GetItem(component, n) : component;
            const cmb_plan *plan;
            if (!read_plan(c, object, L, is_causal, &plan))
                return false;
            R = plan->R > R ? plan->R : R;
            for (Py_ssize_t k = 0; k < times; k++)
                *to++ = plan;
        }
        c->R += R;
    }
    return true;
}

bool read_plans(call *c, PyObject *plan, PyObject *causal, bool is_mixture) {
    cmb_problem *p = &c->problem;
    bool is_causal;
    c->is_mixture = is_mixture;
    p->components = 1;
    if (!read_flag(causal, "is_causal", &is_causal))
        return false;
    if (!is_mixture && !PyTuple_Check(plan)) {
        p->plan = &c->one_plan;
        p->plans = 1;
        if (!read_plan(c, plan, p->L, is_causal, &c->one_plan))
            return false;
        c->R = c->one_plan->R;
        return true;
    }
    if (is_mixture && !(PyTuple_Check(plan) && PyTuple_Size(plan) > 0)) {
        raise_type("plan", "a tuple of one or more components", plan);
        return false;
    }
    if (is_mixture)
        p->components = PyTuple_Size(plan);
    const Py_ssize_t segments = p->segment ? p->segments : 1;
    Py_ssize_t most = segments; /* plans of each component: where one has a plan for each head, so have all */
    for (Py_ssize_t n = 0; n < p->components; n++) {
        const Py_ssize_t count = count_plans(c, is_mixture ? PyTuple_GetItem(plan, n) : plan);
        if (count < 0)
            return false;
        most = count == segments ? most : count;
    }
    c->plans = PyMem_Calloc((size_t)(p->components * most) + 1, sizeof *c->plans);
    if (!c->plans) {
        PyErr_NoMemory();
        return false;
    }
    p->plan = c->plans;
    p->plans = p->components * most;
    for (Py_ssize_t n = 0; n < p->components; n++) {
        PyObject *component = is_mixture ? PyTuple_GetItem(plan, n) : plan;
        const Py_ssize_t count = count_plans(c, component);
        if (!read_component(c, component, is_causal, count, count ? most / count : 0, c->plans + n * most))
            return false;
    }
    return true;
}

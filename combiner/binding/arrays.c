// SPDX-License-Identifier: Apache-2.0
/* NumPy arrays as the views that combiner.h takes, and new arrays for results. */
#include "binding.h"

#include <string.h>

/* ---- new arrays --------------------------------------------------------------------------------- */

/* Memory of large results comes from the library, which keeps it when they are freed, for the next call's results. */
static void *result_malloc(void *context, size_t bytes) {
    (void)context;
    return cmb_default_allocate(bytes);
}

static void *result_calloc(void *context, size_t count, size_t size) {
    size_t bytes;
    void *memory = __builtin_mul_overflow(count, size, &bytes) ? NULL : result_malloc(context, bytes);
    return memory ? memset(memory, 0, bytes) : NULL;
}

static void result_free(void *context, void *memory, size_t bytes) {
    (void)context, (void)bytes;
    cmb_default_release(memory);
}

static void *result_realloc(void *context, void *memory, size_t bytes) {
    (void)context;
    return cmb_default_reallocate(memory, bytes);
}

static PyDataMem_Handler result_memory = {
    "combiner", 1, {NULL, result_malloc, result_calloc, result_realloc, result_free}};

PyObject *result_memory_handler(void) { return PyCapsule_New(&result_memory, "mem_handler", NULL); }

/* A new uninitialised array; a large one takes its memory from the handler. */
static PyObject *new_result(const module_state *state, int axes, npy_intp *shape, int type, npy_intp itemsize) {
    enum { LARGE = 256 << 10 };
    npy_intp bytes = itemsize;
    for (int a = 0; a < axes; a++)
        if (__builtin_mul_overflow(bytes, shape[a], &bytes))
            bytes = 0; /* NumPy raises the error */
    PyObject *before = bytes >= LARGE ? PyDataMem_SetHandler(state->result_memory) : NULL;
    if (bytes >= LARGE && !before)
        return NULL;
    PyObject *array = PyArray_SimpleNew(axes, shape, type);
    if (before) {
        PyObject *type_, *value, *traceback; /* PyArray_SimpleNew may have set it */
        PyErr_Fetch(&type_, &value, &traceback);
        Py_XDECREF(PyDataMem_SetHandler(before));
        Py_DECREF(before);
        PyErr_Restore(type_, value, traceback);
    }
    return array;
}

/* ---- integers ---------------------------------------------------------------------------------- */

/* Whether `given` is [n, columns], or [n] where columns is 0; else the exception is set. */
static bool has_columns(PyArrayObject *given, const char *name, npy_intp columns) {
    if (columns ? PyArray_NDIM(given) == 2 && PyArray_DIM(given, 1) == columns : PyArray_NDIM(given) == 1)
        return true;
    PyObject *got = PyObject_GetAttrString((PyObject *)given, "shape");
    if (got && columns)
        PyErr_Format(PyExc_ValueError, "%s must have shape (n, %zd), got %S", name, columns, got);
    else if (got)
        PyErr_Format(PyExc_ValueError, "%s must have shape (n,), got %S", name, got);
    Py_XDECREF(got);
    return false;
}

/* Narrows `count` integers; a ValueError where one does not fit. */
static bool to_int32(const char *name, const int64_t *from, int32_t *to, npy_intp count) {
    for (npy_intp n = 0; n < count; n++) {
        if (from[n] != (int32_t)from[n]) {
            PyErr_Format(PyExc_ValueError, "%s must hold 32-bit integers, got %lld", name, (long long)from[n]);
            return false;
        }
        to[n] = (int32_t)from[n];
    }
    return true;
}

PyObject *read_integers(PyObject *object, const char *name, int type, npy_intp columns) {
    PyArrayObject *given = (PyArrayObject *)PyArray_FromAny(object, NULL, 0, 0, NPY_ARRAY_ENSUREARRAY, NULL);
    if (!given) {
        name_failure(name, "an array of integers");
        return NULL;
    }
    PyObject *wide = NULL, *result = NULL;
    const npy_intp size = PyArray_SIZE(given);
    if (size && !PyArray_ISINTEGER(given)) {
        PyErr_Format(PyExc_TypeError, "%s must hold integers, got %S", name, PyArray_DESCR(given));
        goto out;
    }
    if (size && !has_columns(given, name, columns))
        goto out;
    npy_intp shape[2] = {columns ? size / columns : size, columns};
    const bool fits = type != NPY_INT32 || PyArray_CanCastSafely(PyArray_TYPE(given), type);
    if (size && fits) {
        result = PyArray_FromAny((PyObject *)given, PyArray_DescrFromType(type), 0, 0,
                                 NPY_ARRAY_CARRAY | NPY_ARRAY_ENSURECOPY | NPY_ARRAY_FORCECAST, NULL);
        goto out;
    }
    result = PyArray_SimpleNew(columns ? 2 : 1, shape, type);
    if (!result || !size)
        goto out;
    wide = PyArray_FromAny((PyObject *)given, PyArray_DescrFromType(NPY_INT64), 0, 0,
                           NPY_ARRAY_CARRAY | NPY_ARRAY_FORCECAST, NULL);
    if (!wide || !to_int32(name, data_of(wide), data_of(result), size))
        Py_CLEAR(result);
out:
    Py_DECREF(given);
    Py_XDECREF(wide);
    return result;
}

/* ---- rows --------------------------------------------------------------------------------------- */

/* The names of KEY_HEADS and so on in messages, by their negated values. */
static const char *const open_extent[] = {NULL, "Hk", "Hk or Hq", "Dv", "n", NULL, NULL, "L"};

static content content_of(npy_intp features) {
    return features == NO_FEATURES ? LSE : features <= OF_SOFTMAX ? SOFTMAX : FEATURES;
}

void end_call(call *c, int first) {
    for (int n = first; n < c->holds; n++)
        Py_DECREF(c->held[n].object);
}

void *hold(call *c, void *object, const char *name) {
    if (object && c->holds == MAX_HELD) {
        Py_DECREF((PyObject *)object);
        PyErr_SetString(PyExc_SystemError, "one call holds too many objects");
        return NULL;
    }
    if (object) {
        c->held[c->holds].object = object;
        c->held[c->holds++].name = name;
    }
    return object;
}

PyArrayObject *to_array(PyObject *object, const char *name, const char *expected) {
    if (PyArray_CheckExact(object)) {
        Py_INCREF(object);
        return (PyArrayObject *)object;
    }
    bool is_refused = false;
    if (PyArray_Check(object)) { /* a masked array exists only where numpy.ma has been imported */
        PyObject *name_of_ma = PyUnicode_FromString("numpy.ma"), *ma, *masked_array;
        ma = name_of_ma ? PyImport_GetModule(name_of_ma) : NULL;
        masked_array = ma ? PyObject_GetAttrString(ma, "MaskedArray") : NULL;
        is_refused = masked_array && PyObject_IsInstance(object, masked_array) == 1;
        Py_XDECREF(name_of_ma);
        Py_XDECREF(ma);
        Py_XDECREF(masked_array);
        if (PyErr_Occurred())
            return NULL;
    } else
        is_refused = !PyObject_HasAttrString(object, "__array__") || PyObject_HasAttrString(object, "__dlpack__");
    if (is_refused) {
        raise_type(name, expected, object);
        return NULL;
    }
    PyObject *array = PyArray_FromAny(object, NULL, 0, 0, NPY_ARRAY_ENSUREARRAY, NULL);
    if (!array)
        name_failure(name, expected);
    return (PyArrayObject *)array;
}

/* "name must have shape (2, Hk, 16, 8), got (2, 16, 8)" */
static void raise_shape(const char *name, int axes, const npy_intp *expected, PyArrayObject *array) {
    PyObject *got = PyObject_GetAttrString((PyObject *)array, "shape");
    PyObject *text = got ? PyUnicode_FromString("(") : NULL;
    for (int a = 0; a < axes && text; a++) {
        const char *after = a + 1 < axes ? ", " : axes == 1 ? "," : "";
        PyObject *longer = expected[a] < 0 ? PyUnicode_FromFormat("%U%s%s", text, open_extent[-expected[a]], after)
                                           : PyUnicode_FromFormat("%U%zd%s", text, expected[a], after);
        Py_DECREF(text);
        text = longer;
    }
    if (text)
        PyErr_Format(PyExc_ValueError, "%s must have shape %U), got %S", name, text, got);
    Py_XDECREF(text);
    Py_XDECREF(got);
}

const char real_array[] = "a float32, float64, bfloat16 or float16 NumPy array";
const char integer_array[] = "a NumPy array of integers";

/* The package ml_dtypes registers bfloat16 with NumPy; its type number is no constant, but its name is. */
static bool is_bfloat16(PyArrayObject *array) {
    if (PyArray_TYPE(array) < NPY_USERDEF || PyArray_ITEMSIZE(array) != 2)
        return false;
    PyObject *name = PyObject_Str((PyObject *)PyArray_DESCR(array));
    const bool is_it = name && PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0;
    Py_XDECREF(name);
    PyErr_Clear();
    return is_it;
}

/* Reads the leader's dtype, which all other arrays must have. */
static bool read_type(call *c, PyArrayObject *array, const char *name) {
    cmb_dtype *dtype = &c->problem.dtype;
    c->type = PyArray_TYPE(array);
    c->itemsize = PyArray_ITEMSIZE(array);
    if (c->type == NPY_FLOAT32)
        *dtype = CMB_FLOAT32;
    else if (c->type == NPY_FLOAT64)
        *dtype = CMB_FLOAT64;
    else if (c->type == NPY_HALF)
        *dtype = CMB_FLOAT16;
    else if (is_bfloat16(array))
        *dtype = CMB_BFLOAT16;
    else {
        PyErr_Format(PyExc_TypeError, "%s must be %s, got %S", name, real_array, PyArray_DESCR(array));
        return false;
    }
    c->lse_type = *dtype == CMB_FLOAT64 ? NPY_FLOAT64 : NPY_FLOAT32;
    c->lse_itemsize = *dtype == CMB_FLOAT64 ? 8 : 4;
    return true;
}

bool check_type(call *c, PyArrayObject *array, const char *name, content holds) {
    static const char *const names[] = {
        [CMB_FLOAT32] = "float32", [CMB_FLOAT64] = "float64", [CMB_BFLOAT16] = "bfloat16", [CMB_FLOAT16] = "float16"};
    if (!PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s must be in native byte order, got %R", name, PyArray_DESCR(array));
        return false;
    }
    if (c->type == NPY_NOTYPE)
        return read_type(c, array, name);
    if (PyArray_TYPE(array) != (holds == FEATURES ? c->type : c->lse_type)) {
        const char *expected = holds != FEATURES && c->itemsize == 2 ? "float32" : names[c->problem.dtype];
        PyErr_Format(PyExc_TypeError, "%s must be %s like %s, got %S", name, expected, c->leader, PyArray_DESCR(array));
        return false;
    }
    return true;
}

bool merge_leading(const call *c, PyArrayObject *array, npy_intp *stride) {
    npy_intp extent = 1;
    *stride = 0;
    for (int a = c->axes - 4; a >= 0 && PyArray_SIZE(array); a--) {
        if (c->lead[a] == 1)
            continue;
        if (extent == 1)
            *stride = PyArray_STRIDE(array, a);
        else if (PyArray_STRIDE(array, a) != *stride * extent)
            return false;
        extent *= c->lead[a];
    }
    return true;
}

/* Fills `view`. False, without an exception, where the array has none: its features must be contiguous, its strides
 * whole elements. */
static bool describe(const call *c, PyArrayObject *array, content holds, cmb_array *view) {
    const bool has_features = holds != LSE;
    const int rows_axis = PyArray_NDIM(array) - 1 - has_features;
    const npy_intp itemsize = holds == FEATURES ? c->itemsize : c->lse_itemsize;
    view->data = PyArray_DATA(array);
    view->heads = c->axes > 2 ? PyArray_DIM(array, rows_axis - 1) : 1;
    view->batch = view->head = view->row = 0;
    if (PyArray_SIZE(array) == 0)
        return view->data != NULL;
    npy_intp batch, head = 0, row = 0;
    if (!PyArray_ISALIGNED(array) || !merge_leading(c, array, &batch))
        return false;
    if (c->axes > 2 && view->heads > 1)
        head = PyArray_STRIDE(array, rows_axis - 1);
    if (PyArray_DIM(array, rows_axis) > 1)
        row = PyArray_STRIDE(array, rows_axis);
    if (has_features && PyArray_DIM(array, rows_axis + 1) > 1 && PyArray_STRIDE(array, rows_axis + 1) != itemsize)
        return false;
    if (!has_features && row && row != itemsize)
        return false;
    if (batch % itemsize || head % itemsize || row % itemsize)
        return false;
    view->batch = batch / itemsize;
    view->head = head / itemsize;
    view->row = row / itemsize;
    return true;
}

int shape_of(const call *c, npy_intp heads, npy_intp rows, npy_intp features, npy_intp *shape) {
    int axes = 0;
    for (; axes < c->axes - 3; axes++)
        shape[axes] = c->lead[axes];
    if (c->axes > 2)
        shape[axes++] = heads;
    shape[axes++] = rows;
    if (features != NO_FEATURES)
        shape[axes++] = features <= OF_SOFTMAX ? features / OF_SOFTMAX * 2 : features;
    return axes;
}

bool check_shape(const call *c, PyArrayObject *array, const char *name, int axes, const npy_intp *expected) {
    bool fits = PyArray_NDIM(array) == axes;
    for (int a = 0; a < axes && fits; a++) {
        npy_intp extent = PyArray_DIM(array, a);
        if (expected[a] >= 0)
            fits = extent == expected[a];
        else if (expected[a] == EITHER_HEADS)
            fits = extent == c->problem.Hk || extent == c->problem.Hq;
    }
    if (!fits)
        raise_shape(name, axes, expected, array);
    return fits;
}

PyArrayObject *view_array(call *c, PyArrayObject *array, content holds, cmb_array *view) {
    if (describe(c, array, holds, view))
        return array;
    array = hold(c, PyArray_NewCopy(array, NPY_CORDER), NULL);
    return array && describe(c, array, holds, view) ? array : NULL;
}

PyArrayObject *read_array(call *c, PyObject *object, const char *name, npy_intp heads, npy_intp rows, npy_intp features,
                          cmb_array *view) {
    npy_intp expected[MAX_AXES];
    int axes = shape_of(c, heads, rows, features, expected);
    PyArrayObject *array = hold(c, to_array(object, name, real_array), name);
    if (!array || !check_type(c, array, name, content_of(features)) || !check_shape(c, array, name, axes, expected))
        return NULL;
    return view_array(c, array, content_of(features), view);
}

bool read_optional(call *c, PyObject *object, const char *name, npy_intp heads, npy_intp rows, npy_intp features,
                   cmb_array *view) {
    return object == Py_None || read_array(c, object, name, heads, rows, features, view);
}

bool read_term(call *c, PyObject *object, const char *name, npy_intp heads, npy_intp rows, cmb_array *view) {
    if (object == Py_None)
        return true;
    const bool has_rows = rows != NO_ROWS, has_heads = c->axes > 2;
    npy_intp shape[MAX_AXES + 1] = {1}, strides[MAX_AXES + 1] = {0};
    /* Without rows the view has one, and without heads one of these too. */
    const int extra = !has_rows && !has_heads;
    const int axes = extra + shape_of(c, heads, has_rows ? rows : 1, NO_FEATURES, shape + extra),
              most = axes - !has_rows;
    PyArrayObject *array = hold(c, to_array(object, name, "a NumPy array"), name);
    if (!array || !check_type(c, array, name, LSE))
        return false;
    npy_intp expected[MAX_AXES + 1];
    memcpy(expected, shape, sizeof expected);
    bool fits = PyArray_NDIM(array) <= most;
    for (int a = most - 1, g = PyArray_NDIM(array) - 1; fits && a >= 0; a--, g--) {
        const npy_intp extent = g < 0 ? 1 : PyArray_DIM(array, g), Hk = c->problem.Hk, Hq = c->problem.Hq;
        const bool is_rows = has_rows && a == most - 1;
        if (shape[a] == EITHER_HEADS)
            shape[a] = extent == Hq ? Hq : Hk;
        fits = extent == shape[a] ? g >= 0 || !is_rows : extent == 1 && !is_rows;
        strides[a] = g >= 0 && extent == shape[a] ? PyArray_STRIDE(array, g) : 0;
    }
    if (!fits) {
        raise_shape(name, most - extra, expected + extra, array);
        return false;
    }
    if (has_rows && PyArray_NDIM(array) == most && PyArray_CompareLists(PyArray_DIMS(array), shape, most))
        return view_array(c, array, LSE, view);
    PyArray_Descr *type = PyArray_DESCR(array);
    Py_INCREF((PyObject *)type);
    PyArrayObject *broadcast = hold(c,
                                    PyArray_NewFromDescr(&PyArray_Type, type, axes, shape, strides, PyArray_DATA(array),
                                                         PyArray_FLAGS(array) & NPY_ARRAY_ALIGNED, NULL),
                                    NULL);
    return broadcast && view_array(c, broadcast, LSE, view);
}

bool new_array(call *c, npy_intp heads, npy_intp rows, npy_intp features, cmb_array *view, PyObject **array) {
    npy_intp shape[MAX_AXES];
    int axes = shape_of(c, heads, rows, features, shape);
    const content holds = content_of(features);
    *array = hold(c,
                  new_result(c->state, axes, shape, holds == FEATURES ? c->type : c->lse_type,
                             holds == FEATURES ? c->itemsize : c->lse_itemsize),
                  NULL);
    return *array && describe(c, (PyArrayObject *)*array, holds, view);
}

/* Whether two elements of `array` may share memory: they cannot where, in the order of strides, each stride steps over
 * all that the axes before it span. */
static bool overlaps_itself(PyArrayObject *array) {
    npy_intp reach = PyArray_ITEMSIZE(array); /* bytes that the axes taken so far span */
    bool taken[MAX_AXES] = {false};
    if (PyArray_SIZE(array) == 0)
        return false;
    for (int n = 0; n < PyArray_NDIM(array); n++) {
        int least = -1;
        npy_intp step = 0;
        for (int a = 0; a < PyArray_NDIM(array); a++) {
            npy_intp stride = PyArray_STRIDE(array, a) < 0 ? -PyArray_STRIDE(array, a) : PyArray_STRIDE(array, a);
            if (!taken[a] && PyArray_DIM(array, a) > 1 && (least < 0 || stride < step)) {
                least = a;
                step = stride;
            }
        }
        if (least < 0)
            break;
        if (step < reach)
            return true;
        taken[least] = true;
        reach += step * (PyArray_DIM(array, least) - 1);
    }
    return false;
}

bool read_out(call *c, PyObject *object, npy_intp heads, npy_intp rows, npy_intp features, cmb_array *view,
              PyObject **stand_in) {
    if (!PyArray_Check(object)) { /* what __array__ returns may be a copy */
        raise_type("out", real_array, object);
        return false;
    }
    int inputs = c->holds;
    PyArrayObject *out = hold(c, to_array(object, "out", real_array), NULL);
    npy_intp expected[MAX_AXES];
    int axes = shape_of(c, heads, rows, features, expected);
    if (!out || !check_type(c, out, "out", FEATURES) || !check_shape(c, out, "out", axes, expected))
        return false;
    if (!PyArray_ISWRITEABLE(out)) {
        PyErr_SetString(PyExc_ValueError, "out must be writeable, got a read-only array");
        return false;
    }
    if (overlaps_itself(out)) {
        PyErr_SetString(PyExc_ValueError, "out must not overlap itself, got an array with shared elements");
        return false;
    }
    for (int n = 0; n < inputs; n++) {
        if (!c->held[n].name)
            continue;
        /* exact up to this much work; beyond it an overlap is assumed */
        PyObject *shares = PyObject_CallFunction(c->state->may_share_memory, "OOi", out, c->held[n].object, 10000);
        int truth = shares ? PyObject_IsTrue(shares) : -1;
        Py_XDECREF(shares);
        if (truth > 0)
            PyErr_Format(PyExc_ValueError, "out must not overlap %s, got an array that shares memory with it",
                         c->held[n].name);
        if (truth)
            return false;
    }
    return describe(c, out, FEATURES, view) || new_array(c, heads, rows, features, view, stand_in);
}

// SPDX-License-Identifier: Apache-2.0
/*
 * The one file that knows both Python and the C library. It turns arrays into the views that combiner.h takes,
 * allocates results, makes one library call with the GIL released and turns its status into an exception.
 *
 * A call owns everything it touches: `call.held` has a reference to each array whose memory the library sees, and to
 * the plans, so that nothing can be freed by another thread meanwhile. All of it is released in one place.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>
#if NPY_ABI_VERSION < 0x02000000
#error "build with NumPy 2.0 or later; what is built runs with NumPy 1.26 too"
#endif

#include <fenv.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "_xla.h"
#include "combiner.h"

typedef struct {
    PyObject *plan_type;
    PyObject *may_share_memory; /* numpy.may_share_memory */
    PyObject *result_memory;    /* NumPy's handler of large results' memory */
} module_state;

static module_state *state_of(PyObject *module) { return PyModule_GetState(module); }

/* ---- errors ------------------------------------------------------------------------------------- */

/* True for CMB_OK; else the exception is set. */
static bool raise_status(cmb_status status, const cmb_error *error) {
    switch (status) {
    case CMB_OK:
        return true;
    case CMB_ERR_MEMORY:
        PyErr_SetString(PyExc_MemoryError, error->message);
        return false;
    case CMB_ERR_VALUE:
        PyErr_SetString(PyExc_ValueError, error->message);
        return false;
    case CMB_ERR_OVERFLOW:
        PyErr_SetString(PyExc_OverflowError, error->message);
        return false;
    case CMB_ERR_CANCELLED: /* the signal handler's exception is pending */
        if (!PyErr_Occurred())
            PyErr_SetNone(PyExc_KeyboardInterrupt);
        return false;
    }
    PyErr_Format(PyExc_SystemError, "unknown status %d", (int)status);
    return false;
}

/* "name must be expected, got the object's type" */
static void raise_type(const char *name, const char *expected, PyObject *object) {
    PyObject *type_name = PyType_GetName(Py_TYPE(object));
    if (type_name)
        PyErr_Format(PyExc_TypeError, "%s must be %s, got %U", name, expected, type_name);
    Py_XDECREF(type_name);
}

/* ---- memory ------------------------------------------------------------------------------------- */

/* For tests: an allocator that counts what the library holds and fails on request. It stands in for the library's own
 * where COMBINER_TEST_ALLOCATOR is set when the module is first imported, before the library holds anything. */
static struct {
    atomic_bool is_decided, is_used;
    atomic_size_t live, peak;
    atomic_llong left; /* allocations before the one that fails; below 0 none does, or all do */
    atomic_bool keeps_failing;
} heap;

enum { HEADER = 64 }; /* holds the size; 64 bytes keep the alignment */

static void *allocate(size_t bytes, void *context) {
    (void)context;
    long long left = atomic_fetch_sub(&heap.left, 1);
    if (left == 1 || (left < 1 && atomic_load(&heap.keeps_failing)))
        return NULL;
    void *block;
    if (bytes > SIZE_MAX - HEADER || posix_memalign(&block, HEADER, bytes + HEADER))
        return NULL;
    memcpy(block, &bytes, sizeof bytes);
    size_t live = atomic_fetch_add(&heap.live, bytes) + bytes, peak = atomic_load(&heap.peak);
    while (live > peak && !atomic_compare_exchange_weak(&heap.peak, &peak, live)) {
    }
    return (char *)block + HEADER;
}

static void release(void *pointer, void *context) {
    (void)context;
    size_t bytes;
    void *block = (char *)pointer - HEADER;
    memcpy(&bytes, block, sizeof bytes);
    atomic_fetch_sub(&heap.live, bytes);
    free(block);
}

static bool check_heap(void) {
    if (!atomic_load(&heap.is_used))
        PyErr_SetString(PyExc_RuntimeError, "set COMBINER_TEST_ALLOCATOR before combiner is imported");
    return atomic_load(&heap.is_used);
}

PyDoc_STRVAR(fail_allocation_doc, "_fail_allocation($module, count, keep_failing=False, /)\n--\n\n"
                                  "Make the count-th allocation of the library from now fail, and all after it if\n"
                                  "keep_failing. (0) ends it.");

static PyObject *fail_allocation(PyObject *module, PyObject *args) {
    (void)module;
    long long count;
    int keeps_failing = 0;
    if (!check_heap() || !PyArg_ParseTuple(args, "L|p:_fail_allocation", &count, &keeps_failing))
        return NULL;
    atomic_store(&heap.keeps_failing, keeps_failing != 0);
    atomic_store(&heap.left, count);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(live_bytes_doc,
             "_live_bytes($module, /)\n--\n\nBytes that the library holds now: its plans' and its calls'.");

static PyObject *live_bytes(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return check_heap() ? PyLong_FromSize_t(atomic_load(&heap.live)) : NULL;
}

PyDoc_STRVAR(peak_bytes_doc, "_peak_bytes($module, /)\n--\n\nThe most bytes held at once since the last call of this.");

static PyObject *peak_bytes(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return check_heap() ? PyLong_FromSize_t(atomic_exchange(&heap.peak, atomic_load(&heap.live))) : NULL;
}

/* Large results' memory is the library's to keep when they are gone: the next call's results take it again. */
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

/* A new array, uninitialised; its memory is the handler's where that is worth it. */
static PyObject *new_result(const module_state *state, int axes, npy_intp *shape, int type, npy_intp itemsize) {
    enum { LARGE = 256 << 10 };
    npy_intp bytes = itemsize;
    for (int a = 0; a < axes; a++)
        if (__builtin_mul_overflow(bytes, shape[a], &bytes))
            bytes = 0; /* NumPy says what is wrong */
    PyObject *before = bytes >= LARGE ? PyDataMem_SetHandler(state->result_memory) : NULL;
    if (bytes >= LARGE && !before)
        return NULL;
    PyObject *array = PyArray_SimpleNew(axes, shape, type);
    if (before) {
        PyObject *type_, *value, *traceback; /* an exception of the array's stays */
        PyErr_Fetch(&type_, &value, &traceback);
        Py_XDECREF(PyDataMem_SetHandler(before));
        Py_DECREF(before);
        PyErr_Restore(type_, value, traceback);
    }
    return array;
}

/* ---- plans -------------------------------------------------------------------------------------- */

typedef struct {
    PyObject head;
    cmb_plan *plan; /* never changes */
} plan_object;

static const cmb_plan *plan_of(PyObject *self) { return ((plan_object *)self)->plan; }

static void plan_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_self = (freefunc)PyType_GetSlot(type, Py_tp_free);
    cmb_plan_free(((plan_object *)self)->plan);
    free_self(self);
    Py_DECREF(type);
}

/* A new instance of `type`, which takes over `plan`, if the builder succeeded. */
static PyObject *wrap_plan(PyTypeObject *type, cmb_plan *plan, cmb_status status, const cmb_error *error) {
    PyObject *self = raise_status(status, error) ? PyType_GenericAlloc(type, 0) : NULL;
    if (self)
        ((plan_object *)self)->plan = plan;
    else
        cmb_plan_free(plan);
    return self;
}

/* _build(name, length, first, second, is_causal, sparse, pooling, size_bias): Fixed's span; whether LogSparse is
 * hierarchical; Tree's branching and levels; Axial's width and order, 3 for rowmajor with weighted keys. */
static PyObject *plan_build(PyObject *type, PyObject *args) {
    const char *name;
    long long length, first, second;
    int is_causal, sparse, pooling, size_bias;
    if (!PyArg_ParseTuple(args, "sLLLppip:_build", &name, &length, &first, &second, &is_causal, &sparse, &pooling,
                          &size_bias))
        return NULL;
    cmb_plan_options options = {is_causal, sparse, size_bias, (cmb_pooling)pooling};
    cmb_plan *plan = NULL;
    cmb_error error;
    cmb_status status;
    PyThreadState *thread = PyEval_SaveThread();
    if (!strcmp(name, "fixed"))
        status = cmb_plan_fixed(length, first, &options, &plan, &error);
    else if (!strcmp(name, "logsparse"))
        status = cmb_plan_logsparse(length, first != 0, &options, &plan, &error);
    else if (!strcmp(name, "axial"))
        status = cmb_plan_axial(length, first, second == 3 ? CMB_AXIAL_ROWMAJOR : (cmb_axial_order)second, second == 3,
                                &options, &plan, &error);
    else if (!strcmp(name, "axial_mixture"))
        status = cmb_plan_axial_mixture(length, first, &options, &plan, &error);
    else if (!strcmp(name, "tree"))
        status = cmb_plan_tree(length, first, second, &options, &plan, &error);
    else
        status = cmb_plan_dense(length, &options, &plan, &error);
    PyEval_RestoreThread(thread);
    return wrap_plan((PyTypeObject *)type, plan, status, &error);
}

static void *data_of(PyObject *array) { return PyArray_DATA((PyArrayObject *)array); }

/* A new contiguous array of int32, int64 or uint64 with the integers of `object`: [count], or [count, columns] where
 * columns > 0. An empty sequence of any type will do. */
static PyObject *read_integers(PyObject *object, const char *name, int type, npy_intp columns) {
    PyArrayObject *given = (PyArrayObject *)PyArray_FromAny(object, NULL, 0, 0, NPY_ARRAY_ENSUREARRAY, NULL);
    PyObject *wide = NULL, *result = NULL;
    if (!given)
        return NULL;
    npy_intp size = PyArray_SIZE(given);
    npy_intp shape[2] = {size && columns ? PyArray_DIM(given, 0) : size, columns};
    if (size && !PyArray_ISINTEGER(given)) {
        PyErr_Format(PyExc_TypeError, "%s must hold integers, got %S", name, PyArray_DESCR(given));
        goto out;
    }
    if (size && !(columns ? PyArray_NDIM(given) == 2 && PyArray_DIM(given, 1) == columns : PyArray_NDIM(given) == 1)) {
        PyObject *got = PyObject_GetAttrString((PyObject *)given, "shape");
        if (got && columns)
            PyErr_Format(PyExc_ValueError, "%s must have shape (n, %zd), got %S", name, columns, got);
        else if (got)
            PyErr_Format(PyExc_ValueError, "%s must have shape (n,), got %S", name, got);
        Py_XDECREF(got);
        goto out;
    }
    wide = PyArray_FromAny((PyObject *)given, PyArray_DescrFromType(type == NPY_INT32 ? NPY_INT64 : type), 0, 0,
                           NPY_ARRAY_CARRAY | NPY_ARRAY_ENSURECOPY | NPY_ARRAY_FORCECAST, NULL);
    if (wide && type != NPY_INT32) {
        result = wide;
        wide = NULL;
    } else if (wide && (result = PyArray_SimpleNew(columns ? 2 : 1, shape, type))) {
        const int64_t *from = data_of(wide);
        int32_t *to = data_of(result);
        for (npy_intp n = 0; n < size; n++) {
            if (from[n] != (int32_t)from[n]) {
                PyErr_Format(PyExc_ValueError, "%s must hold 32-bit integers, got %lld", name, (long long)from[n]);
                Py_CLEAR(result);
                break;
            }
            to[n] = (int32_t)from[n];
        }
    }
out:
    Py_DECREF(given);
    Py_XDECREF(wide);
    return result;
}

/* _routing(clusters, is_causal, sparse, pooling, size_bias): the length is that of clusters. */
static PyObject *plan_routing(PyObject *type, PyObject *args) {
    PyObject *given;
    int is_causal, sparse, pooling, size_bias;
    if (!PyArg_ParseTuple(args, "Oppip:_routing", &given, &is_causal, &sparse, &pooling, &size_bias))
        return NULL;
    PyObject *clusters = read_integers(given, "clusters", NPY_INT64, 0);
    if (!clusters)
        return NULL;
    cmb_plan_options options = {is_causal, sparse, size_bias, (cmb_pooling)pooling};
    cmb_plan *plan = NULL;
    cmb_error error;
    PyThreadState *thread = PyEval_SaveThread();
    cmb_status status =
        cmb_plan_routing(PyArray_SIZE((PyArrayObject *)clusters), data_of(clusters), &options, &plan, &error);
    PyEval_RestoreThread(thread);
    Py_DECREF(clusters);
    return wrap_plan((PyTypeObject *)type, plan, status, &error);
}

/* Reads (offsets, items) as lists that lie within their items; the library checks the rest. */
static bool read_lists(PyObject *pair, const char *name, cmb_lists *lists, PyObject *held[2]) {
    PyObject *offsets, *items;
    if (!PyArg_ParseTuple(pair, "OO", &offsets, &items))
        return false;
    held[0] = read_integers(offsets, name, NPY_INT64, 0);
    held[1] = held[0] ? read_integers(items, name, NPY_INT64, 0) : NULL;
    if (!held[1])
        return false;
    npy_intp count = PyArray_SIZE((PyArrayObject *)held[0]), end = PyArray_SIZE((PyArrayObject *)held[1]);
    const int64_t *offset = data_of(held[0]);
    if (count < 1 || offset[count - 1] != end) {
        PyErr_Format(PyExc_ValueError, "%s: the last offset must be the number of items, %zd, got %lld", name, end,
                     count < 1 ? -1LL : (long long)offset[count - 1]);
        return false;
    }
    *lists = (cmb_lists){count - 1, offset, data_of(held[1])};
    return true;
}

static PyObject *plan_from_parts(PyObject *type, PyObject *args) {
    long long length;
    PyObject *pairs[3], *self = NULL;
    int cover, is_causal, pooling, size_bias;
    if (!PyArg_ParseTuple(args, "LO!O!O!ipip:_from_parts", &length, &PyTuple_Type, &pairs[0], &PyTuple_Type, &pairs[1],
                          &PyTuple_Type, &pairs[2], &cover, &is_causal, &pooling, &size_bias))
        return NULL;
    static const char *const names[3] = {"direct", "regions", "members"};
    PyObject *held[3][2] = {{NULL}};
    cmb_lists lists[3];
    cmb_plan_options options = {is_causal, false, size_bias, (cmb_pooling)pooling};
    cmb_plan *plan = NULL;
    cmb_error error;
    for (int n = 0; n < 3; n++)
        if (!read_lists(pairs[n], names[n], &lists[n], held[n]))
            goto out;
    PyThreadState *thread = PyEval_SaveThread();
    cmb_status status =
        cmb_plan_from_parts(length, &lists[0], &lists[1], &lists[2], (cmb_cover)cover, &options, &plan, &error);
    PyEval_RestoreThread(thread);
    self = wrap_plan((PyTypeObject *)type, plan, status, &error);
out:
    for (int n = 0; n < 3; n++) {
        Py_XDECREF(held[n][0]);
        Py_XDECREF(held[n][1]);
    }
    return self;
}

/* The flat arrays of a plan: their names and columns, in the order of cmb_plan. */
enum { WAVE, TASK, POOL, TILE, RUN, INDEX, MASK, ARRAYS };
static const struct {
    const char *name;
    int type, columns;
} flat[ARRAYS] = {
    [WAVE] = {"wave", NPY_INT32, 0},  [TASK] = {"task", NPY_INT32, 2}, [POOL] = {"pool", NPY_INT32, 4},
    [TILE] = {"tile", NPY_INT32, 5},  [RUN] = {"run", NPY_INT32, 4},   [INDEX] = {"index", NPY_INT32, 0},
    [MASK] = {"mask", NPY_UINT64, 0},
};
_Static_assert(sizeof(cmb_task) == 2 * 4 && sizeof(cmb_pool) == 4 * 4 && sizeof(cmb_tile) == 5 * 4 &&
                   sizeof(cmb_run) == 4 * 4,
               "the structures of a plan are rows of int32");

static PyObject *plan_from_arrays(PyObject *type, PyObject *args) {
    long long length;
    PyObject *given[ARRAYS], *self = NULL;
    int R, N, is_causal, pooling, size_bias, weighted;
    if (!PyArg_ParseTuple(args, "OOOOOOOLiipipp:_from_arrays", &given[WAVE], &given[TASK], &given[POOL], &given[TILE],
                          &given[RUN], &given[INDEX], &given[MASK], &length, &R, &N, &is_causal, &pooling, &size_bias,
                          &weighted))
        return NULL;
    PyObject *held[ARRAYS] = {NULL};
    int32_t count[ARRAYS];
    const void *data[ARRAYS];
    cmb_plan *plan = NULL;
    cmb_error error;
    for (int n = 0; n < ARRAYS; n++) {
        held[n] = read_integers(given[n], flat[n].name, flat[n].type, flat[n].columns);
        if (!held[n])
            goto out;
        npy_intp rows = PyArray_DIM((PyArrayObject *)held[n], 0);
        if (rows > INT32_MAX) {
            PyErr_Format(PyExc_OverflowError, "%s must have less than 2^31 rows, got %zd", flat[n].name, rows);
            goto out;
        }
        count[n] = (int32_t)rows;
        data[n] = data_of(held[n]);
    }
    cmb_plan arrays = {
        .L = length,
        .R = R,
        .N = N,
        .is_causal = is_causal,
        .size_bias = size_bias,
        .weighted = weighted,
        .pooling = (cmb_pooling)pooling,
        .waves = count[WAVE] - 1,
        .tasks = count[TASK] - 1,
        .pools = count[POOL],
        .tiles = count[TILE] - 1,
        .runs = count[RUN],
        .indices = count[INDEX],
        .masks = count[MASK],
        .wave = data[WAVE],
        .task = data[TASK],
        .pool = data[POOL],
        .tile = data[TILE],
        .run = data[RUN],
        .index = data[INDEX],
        .mask = data[MASK],
    };
    PyThreadState *thread = PyEval_SaveThread();
    cmb_status status = cmb_plan_from_arrays(&arrays, &plan, &error);
    PyEval_RestoreThread(thread);
    self = wrap_plan((PyTypeObject *)type, plan, status, &error);
out:
    for (int n = 0; n < ARRAYS; n++)
        Py_XDECREF(held[n]);
    return self;
}

static PyObject *plan_measure(PyObject *self, PyObject *unused) {
    (void)unused;
    cmb_plan_facts facts;
    cmb_error error;
    PyThreadState *thread = PyEval_SaveThread();
    cmb_status status = cmb_plan_measure(plan_of(self), &facts, &error);
    PyEval_RestoreThread(thread);
    if (!raise_status(status, &error))
        return NULL;
    return Py_BuildValue("(LLLNN)", (long long)facts.attend_pairs, (long long)facts.summarize_pairs,
                         (long long)facts.computed_pairs, PyBool_FromLong(facts.is_partition),
                         PyBool_FromLong(facts.is_full));
}

/* A dict of new read-only arrays: a view could outlive the plan. */
static PyObject *plan_arrays(PyObject *self, void *closure) {
    (void)closure;
    const cmb_plan *plan = plan_of(self);
    const struct {
        const void *data;
        npy_intp rows;
    } source[ARRAYS] = {
        [WAVE] = {plan->wave, plan->waves + 1}, [TASK] = {plan->task, plan->tasks + 1},
        [POOL] = {plan->pool, plan->pools},     [TILE] = {plan->tile, plan->tiles + 1},
        [RUN] = {plan->run, plan->runs},        [INDEX] = {plan->index, plan->indices},
        [MASK] = {plan->mask, plan->masks},
    };
    PyObject *dict = PyDict_New();
    for (int n = 0; n < ARRAYS && dict; n++) {
        npy_intp shape[2] = {source[n].rows, flat[n].columns};
        PyObject *array = PyArray_SimpleNew(flat[n].columns ? 2 : 1, shape, flat[n].type);
        if (array && source[n].rows)
            memcpy(data_of(array), source[n].data, (size_t)PyArray_NBYTES((PyArrayObject *)array));
        if (array)
            PyArray_CLEARFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE);
        if (!array || PyDict_SetItemString(dict, flat[n].name, array))
            Py_CLEAR(dict);
        Py_XDECREF(array);
    }
    return dict;
}

static PyObject *plan_length(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLongLong(plan_of(self)->L);
}

static PyObject *plan_region_count(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLong(plan_of(self)->R);
}

static PyObject *plan_scratch_count(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLong(plan_of(self)->N);
}

static PyObject *plan_pooling(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLong((long)plan_of(self)->pooling);
}

static PyObject *plan_is_causal(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(plan_of(self)->is_causal);
}

static PyObject *plan_size_bias(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(plan_of(self)->size_bias);
}

static PyObject *plan_weighted(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(plan_of(self)->weighted);
}

static PyObject *plan_nbytes(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromSize_t(cmb_plan_bytes(plan_of(self)));
}

static PyMethodDef plan_methods[] = {
    {"_build", plan_build, METH_VARARGS | METH_CLASS, NULL},
    {"_routing", plan_routing, METH_VARARGS | METH_CLASS, NULL},
    {"_from_parts", plan_from_parts, METH_VARARGS | METH_CLASS, NULL},
    {"_from_arrays", plan_from_arrays, METH_VARARGS | METH_CLASS, NULL},
    {"_measure", plan_measure, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef plan_getset[] = {
    {"length", plan_length, NULL, "L, the number of positions.", NULL},
    {"region_count", plan_region_count, NULL, "R, the number of regions.", NULL},
    {"scratch_count", plan_scratch_count, NULL, "N, the scratch rows of one task.", NULL},
    {"is_causal", plan_is_causal, NULL, "Whether query i sees positions up to i only.", NULL},
    {"size_bias", plan_size_bias, NULL, "Whether the log of a region's size joins its logit.", NULL},
    {"weighted", plan_weighted, NULL, "Whether k_R is the weighted mean of the members' keys.", NULL},
    {"nbytes", plan_nbytes, NULL, "Bytes of memory that the plan takes.", NULL},
    {"arrays", plan_arrays, NULL,
     "The flat arrays, read-only copies: wave [waves + 1], task [tasks + 1, 2], pool [pools, 4],\n"
     "tile [tiles + 1, 5], run [runs, 4], index and mask; the fields are those of combiner.h.",
     NULL},
    {"_pooling", plan_pooling, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot plan_slots[] = {
    {Py_tp_doc, "A checked, immutable plan of the C library."},
    {Py_tp_dealloc, plan_dealloc},
    {Py_tp_methods, plan_methods},
    {Py_tp_getset, plan_getset},
    {0, NULL},
};

static PyType_Spec plan_spec = {
    .name = "combiner._core.Plan",
    .basicsize = sizeof(plan_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = plan_slots,
};

/* ---- arguments ---------------------------------------------------------------------------------- */

enum {
    MAX_AXES = 64, /* of a NumPy array */
    MAX_HELD = 40, /* more than the arguments and results of one call, and their copies */
    MAX_FEATURES = 1024,
    NO_FEATURES = 0, /* the array ends with its rows */
};

/* Extents that a shape leaves open, and how messages call them. */
enum { KEY_HEADS = -1, EITHER_HEADS = -2, VALUE_FEATURES = -3, CLUSTERS = -4 };
static const char *const open_extent[] = {NULL, "Hk", "Hk or Hq", "Dv", "n"};

/* One call: the problem and what keeps its pointers alive. Array shapes are the leader's leading axes, then heads,
 * rows and features; where the leader is [L, D] there are neither leading axes nor heads. */
typedef struct {
    const module_state *state;
    cmb_problem problem;
    const char *leader; /* the array whose type and leading axes the others follow: "query" or "x" */
    int axes;           /* of it */
    npy_intp lead[MAX_AXES];
    int type, lse_type;
    npy_intp itemsize, lse_itemsize;
    int64_t R;
    const cmb_plan *one_plan;
    const cmb_plan **plans; /* of a tuple, or NULL */
    PyObject *plan;         /* a Plan or a tuple; held */
    int holds;
    struct {
        PyObject *object;
        const char *name; /* of an input, else NULL */
    } held[MAX_HELD];
} call;

static void end_call(call *c) {
    for (int n = 0; n < c->holds; n++)
        Py_DECREF(c->held[n].object);
    PyMem_Free((void *)c->plans);
}

/* Takes over the reference; returns `object`, NULL included. */
static void *hold(call *c, void *object, const char *name) {
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

/* `object` as an ndarray, not a subclass: what numpy.asarray makes of it; lists, masked arrays and other libraries'
 * arrays are refused, which interchange.py takes where all are alike. */
static PyArrayObject *to_array(PyObject *object, const char *name, const char *expected) {
    if (PyArray_CheckExact(object)) {
        Py_INCREF(object);
        return (PyArrayObject *)object;
    }
    bool is_refused = false;
    if (PyArray_Check(object)) { /* numpy.ma is imported where there is a masked array */
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
    return (PyArrayObject *)PyArray_FromAny(object, NULL, 0, 0, NPY_ARRAY_ENSUREARRAY, NULL);
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

static const char real_array[] = "a float32, float64, bfloat16 or float16 NumPy array";
static const char integer_array[] = "a NumPy array of integers";

/* A dtype that a package of its own registers with NumPy when it is imported (ml_dtypes): known by its name. */
static bool is_bfloat16(PyArrayObject *array) {
    if (PyArray_TYPE(array) < NPY_USERDEF || PyArray_ITEMSIZE(array) != 2)
        return false;
    PyObject *name = PyObject_Str((PyObject *)PyArray_DESCR(array));
    const bool is_it = name && PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0;
    Py_XDECREF(name);
    PyErr_Clear();
    return is_it;
}

/* The leader's type decides how all others are. */
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

/* Type and byte order. An array without features is an lse. */
static bool check_type(call *c, PyArrayObject *array, const char *name, bool has_features) {
    static const char *const names[] = {
        [CMB_FLOAT32] = "float32", [CMB_FLOAT64] = "float64", [CMB_BFLOAT16] = "bfloat16", [CMB_FLOAT16] = "float16"};
    if (!PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s must be in native byte order, got %R", name, PyArray_DESCR(array));
        return false;
    }
    if (c->type == NPY_NOTYPE)
        return read_type(c, array, name);
    if (PyArray_TYPE(array) != (has_features ? c->type : c->lse_type)) {
        const char *expected = !has_features && c->itemsize == 2 ? "float32" : names[c->problem.dtype];
        PyErr_Format(PyExc_TypeError, "%s must be %s like %s, got %S", name, expected, c->leader, PyArray_DESCR(array));
        return false;
    }
    return true;
}

/* The stride that spans the leading axes, in bytes; false where none does. */
static bool merge_leading(const call *c, PyArrayObject *array, npy_intp *stride) {
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

/* The array as a view with whole-element strides, or false where it has none. */
static bool describe(const call *c, PyArrayObject *array, bool has_features, cmb_array *view) {
    const int rows_axis = PyArray_NDIM(array) - 1 - has_features;
    const npy_intp itemsize = has_features ? c->itemsize : c->lse_itemsize;
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

/* Fills `shape` with the leading axes, heads, rows and features; returns the number of axes. */
static int shape_of(const call *c, npy_intp heads, npy_intp rows, npy_intp features, npy_intp *shape) {
    int axes = 0;
    for (; axes < c->axes - 3; axes++)
        shape[axes] = c->lead[axes];
    if (c->axes > 2)
        shape[axes++] = heads;
    shape[axes++] = rows;
    if (features != NO_FEATURES)
        shape[axes++] = features;
    return axes;
}

static bool check_shape(const call *c, PyArrayObject *array, const char *name, int axes, const npy_intp *expected) {
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

/* `array`, or the held copy of it that has a view. */
static PyArrayObject *view_array(call *c, PyArrayObject *array, bool has_features, cmb_array *view) {
    if (describe(c, array, has_features, view))
        return array;
    array = hold(c, PyArray_NewCopy(array, NPY_CORDER), NULL);
    return array && describe(c, array, has_features, view) ? array : NULL;
}

/* An input of the given shape; NULL where an exception is set. */
static PyArrayObject *read_array(call *c, PyObject *object, const char *name, npy_intp heads, npy_intp rows,
                                 npy_intp features, cmb_array *view) {
    npy_intp expected[MAX_AXES];
    int axes = shape_of(c, heads, rows, features, expected);
    PyArrayObject *array = hold(c, to_array(object, name, real_array), name);
    if (!array || !check_type(c, array, name, features != NO_FEATURES) || !check_shape(c, array, name, axes, expected))
        return NULL;
    return view_array(c, array, features != NO_FEATURES, view);
}

static bool read_optional(call *c, PyObject *object, const char *name, npy_intp heads, npy_intp rows, npy_intp features,
                          cmb_array *view) {
    return object == Py_None || read_array(c, object, name, heads, rows, features, view);
}

/* A new array, held; `view` describes it. */
static bool new_array(call *c, npy_intp heads, npy_intp rows, npy_intp features, cmb_array *view, PyObject **array) {
    npy_intp shape[MAX_AXES];
    int axes = shape_of(c, heads, rows, features, shape);
    const bool has_features = features != NO_FEATURES;
    *array = hold(c,
                  new_result(c->state, axes, shape, has_features ? c->type : c->lse_type,
                             has_features ? c->itemsize : c->lse_itemsize),
                  NULL);
    return *array && describe(c, (PyArrayObject *)*array, has_features, view);
}

static bool check_features(const char *name, int64_t features) {
    bool fits = features >= 1 && features <= MAX_FEATURES;
    if (!fits)
        PyErr_Format(PyExc_ValueError, "%s must have 1 to %d features, got %lld", name, MAX_FEATURES,
                     (long long)features);
    return fits;
}

/* The leading axes, type and sizes that all other arrays go by. */
static bool read_leader(call *c, PyObject *object, const char *name, const char *shape) {
    cmb_problem *p = &c->problem;
    PyArrayObject *array = hold(c, to_array(object, name, real_array), name);
    if (!array || !check_type(c, array, name, true))
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
    p->L = PyArray_DIM(array, c->axes - 2);
    p->D = PyArray_DIM(array, c->axes - 1);
    if (!check_features(name, p->D) || !view_array(c, array, true, &p->query))
        return false;
    p->Hq = p->query.heads;
    return true;
}

static bool read_key_and_value(call *c, PyObject *key, PyObject *value) {
    cmb_problem *p = &c->problem;
    if (!read_array(c, key, "key", KEY_HEADS, p->L, p->D, &p->key))
        return false;
    p->Hk = p->key.heads;
    if (p->Hk ? p->Hq % p->Hk : p->Hq) {
        PyErr_Format(PyExc_ValueError, "the heads of query must be a multiple of the heads of key, got %lld and %lld",
                     (long long)p->Hq, (long long)p->Hk);
        return false;
    }
    PyArrayObject *array = read_array(c, value, "value", p->Hk, p->L, VALUE_FEATURES, &p->value);
    if (!array)
        return false;
    p->Dv = PyArray_DIM(array, c->axes - 1);
    return check_features("value", p->Dv);
}

/* 1 / sqrt(D), rounded to nearest whatever the caller's mode is: it decides every bit. */
static double default_scale(int64_t D) {
    fenv_t mode;
    fegetenv(&mode);
    fesetenv(FE_DFL_ENV);
    volatile double features = (double)D; /* compilers move arithmetic across fesetenv */
    volatile double scale = 1 / sqrt(features);
    fesetenv(&mode);
    return scale;
}

static bool read_number(PyObject *object, const char *name, const char *expected, double *number) {
    *number = PyFloat_AsDouble(object);
    if (!PyErr_Occurred())
        return true;
    if (PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_ValueError))
        raise_type(name, expected, object);
    else if (PyErr_ExceptionMatches(PyExc_OverflowError))
        PyErr_Format(PyExc_ValueError, "%s must be finite, got an int beyond float64", name);
    return false;
}

static bool read_scale(call *c, PyObject *scale) {
    if (scale == Py_None)
        c->problem.scale = default_scale(c->problem.D);
    else if (!read_number(scale, "scale", "a number or None", &c->problem.scale))
        return false;
    if (!isfinite(c->problem.scale)) {
        PyErr_Format(PyExc_ValueError, "scale must be finite, got %S", scale);
        return false;
    }
    return true;
}

static bool read_key_mask(call *c, PyObject *object) {
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

static bool read_flag(PyObject *object, const char *name, bool *flag) {
    if (!PyBool_Check(object) && !PyArray_IsScalar(object, Bool)) {
        raise_type(name, "a bool", object);
        return false;
    }
    int truth = PyObject_IsTrue(object);
    *flag = truth == 1;
    return truth >= 0;
}

/* One plan given or made for this call, of a sequence of length L. */
static bool read_plan(const call *c, PyObject *object, int64_t L, bool is_causal, const cmb_plan **plan) {
    if (!PyObject_TypeCheck(object, (PyTypeObject *)c->state->plan_type)) {
        raise_type("each plan of pattern", "a combiner.Plan", object);
        return false;
    }
    *plan = plan_of(object);
    if ((*plan)->L != L) {
        PyErr_Format(PyExc_ValueError, "pattern must be a plan for the length of %s, %lld, got one for %lld",
                     c->problem.segment ? "its segment" : "query", (long long)L, (long long)(*plan)->L);
        return false;
    }
    if (is_causal && !(*plan)->is_causal) {
        PyErr_SetString(PyExc_ValueError, "is_causal must be False with a bidirectional plan as pattern, got True");
        return false;
    }
    return true;
}

static bool read_cu_seqlens(call *c, PyObject *object) {
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

/* None, or (dropout_p, seed, the rows before each segment's or None). */
static bool read_dropout(call *c, PyObject *object) {
    cmb_problem *p = &c->problem;
    PyObject *rows;
    unsigned long long seed;
    if (object == Py_None)
        return true;
    if (!PyArg_ParseTuple(object, "dKO:dropout", &p->dropout_p, &seed, &rows))
        return false;
    p->seed = seed;
    if (rows == Py_None)
        return true;
    PyArrayObject *array = hold(c, read_integers(rows, "dropout", NPY_INT64, 0), NULL);
    if (array && PyArray_SIZE(array) < (p->segment ? p->segments : 1)) {
        PyErr_SetString(PyExc_ValueError, "dropout must have an offset for each segment");
        return false;
    }
    p->dropout_row = array ? data_of((PyObject *)array) : NULL;
    return array != NULL;
}

/* A Plan, a tuple of one for each segment, batch entry and key head or for each segment, or what makes one of these:
 * any object with plan(length, is_causal). */
static bool read_pattern(call *c, PyObject *pattern, PyObject *causal) {
    cmb_problem *p = &c->problem;
    bool is_causal;
    if (!read_flag(causal, "is_causal", &is_causal))
        return false;
    PyObject *plan;
    if (PyObject_TypeCheck(pattern, (PyTypeObject *)c->state->plan_type) || PyTuple_Check(pattern)) {
        Py_INCREF(pattern);
        plan = pattern;
    } else {
        PyObject *method = PyType_Check(pattern) ? NULL : PyObject_GetAttrString(pattern, "plan");
        if (!method) {
            if (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_AttributeError))
                raise_type("pattern", "a pattern such as combiner.Fixed(), a combiner.Plan or a tuple of plans",
                           pattern);
            return false;
        }
        plan = PyObject_CallFunction(method, "LO", (long long)p->L, is_causal ? Py_True : Py_False);
        Py_DECREF(method);
    }
    c->plan = hold(c, plan, NULL);
    if (!c->plan)
        return false;
    if (!PyTuple_Check(c->plan)) {
        p->plan = &c->one_plan;
        p->plans = 1;
        if (!read_plan(c, c->plan, p->L, is_causal, &c->one_plan))
            return false;
        c->R = c->one_plan->R;
        return true;
    }
    Py_ssize_t count = PyTuple_Size(c->plan);
    int64_t segments = p->segment ? p->segments : 1, heads, expected;
    bool fits = !__builtin_mul_overflow(p->B, p->Hk, &heads) && !__builtin_mul_overflow(segments, heads, &expected);
    if (!fits || (count != expected && !(p->segment && count == segments))) {
        PyErr_Format(PyExc_ValueError,
                     "pattern must be a tuple of one plan for each of %lld batch entries and %lld key heads%s, got %zd",
                     (long long)p->B, (long long)p->Hk, p->segment ? " of each segment" : "", count);
        return false;
    }
    c->plans = PyMem_Calloc((size_t)count + 1, sizeof *c->plans);
    if (!c->plans) {
        PyErr_NoMemory();
        return false;
    }
    p->plan = c->plans;
    p->plans = count;
    for (Py_ssize_t n = 0, each = segments ? count / segments : 0; n < count;) {
        const int64_t s = n / each, L = p->segment ? p->segment[s + 1] - p->segment[s] : p->L;
        int64_t R = 0; /* the largest of the segment's plans */
        for (Py_ssize_t end = n + each; n < end; n++) {
            if (!read_plan(c, PyTuple_GetItem(c->plan, n), L, is_causal, &c->plans[n]))
                return false;
            R = c->plans[n]->R > R ? c->plans[n]->R : R;
        }
        c->R += R;
    }
    return true;
}

static bool is_weighted(const call *c) { return c->problem.plans > 0 && c->problem.plan[0]->weighted; }

/* Whether some element of `array` may lie where another does: no order of the axes has each stride step over
 * everything below it. */
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

/* The caller's `out`, and where it has no view a new array in *stand_in that is to be copied into it. */
static bool read_out(call *c, PyObject *object, npy_intp heads, npy_intp rows, npy_intp features, cmb_array *view,
                     PyObject **stand_in) {
    if (!PyArray_Check(object)) { /* what __array__ returns may be a copy */
        raise_type("out", real_array, object);
        return false;
    }
    int inputs = c->holds;
    PyArrayObject *out = hold(c, to_array(object, "out", real_array), NULL);
    npy_intp expected[MAX_AXES];
    int axes = shape_of(c, heads, rows, features, expected);
    if (!out || !check_type(c, out, "out", true) || !check_shape(c, out, "out", axes, expected))
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
        /* exact; where that takes more than this much work, taken for an overlap */
        PyObject *shares = PyObject_CallFunction(c->state->may_share_memory, "OOi", out, c->held[n].object, 10000);
        int truth = shares ? PyObject_IsTrue(shares) : -1;
        Py_XDECREF(shares);
        if (truth > 0)
            PyErr_Format(PyExc_ValueError, "out must not overlap %s, got an array that shares memory with it",
                         c->held[n].name);
        if (truth)
            return false;
    }
    return describe(c, out, true, view) || new_array(c, heads, rows, features, view, stand_in);
}

/* All that forward and backward have in common: query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens,
 * region_query, region_key, dropout. */
enum { INPUTS = 11 };

static bool read_problem(call *c, int stages, PyObject *const input[INPUTS]) {
    cmb_problem *p = &c->problem;
    p->stages = (cmb_stages)stages;
    return read_leader(c, input[0], "query", "(..., Hq, L, D) or (L, D)") &&
           read_key_and_value(c, input[1], input[2]) && read_cu_seqlens(c, input[7]) &&
           read_pattern(c, input[3], input[4]) && read_scale(c, input[5]) && read_key_mask(c, input[6]) &&
           read_dropout(c, input[10]) &&
           read_optional(c, input[8], "region_query", p->Hq, c->R, p->D, &p->region_query) &&
           read_optional(c, input[9], "region_key", EITHER_HEADS, c->R, p->D, &p->region_key);
}

/* ---- the calls ---------------------------------------------------------------------------------- */

/* The GIL is taken for the moment that Python's signal handlers run; only the main thread has any. */
static bool poll_signals(void *context) {
    PyThreadState **thread = context;
    PyEval_RestoreThread(*thread);
    bool stop = PyErr_CheckSignals() != 0;
    *thread = PyEval_SaveThread();
    return stop;
}

/* Forward where `gradients` is NULL. False where an exception is set. */
static bool run(const call *c, const cmb_gradients *gradients) {
    cmb_error error;
    PyThreadState *thread = PyEval_SaveThread();
    cmb_interrupt interrupt = {poll_signals, &thread};
    cmb_status status = gradients ? cmb_backward(&c->problem, gradients, &interrupt, &error)
                                  : cmb_forward(&c->problem, &interrupt, &error);
    PyEval_RestoreThread(thread);
    return raise_status(status, &error);
}

static PyObject *or_none(PyObject *object) { return object ? object : Py_None; }

/* The `region_key` given to `attend` is the summary's key, k_R whole. */
static bool read_summary(call *c, PyObject *region_key, PyObject *region_value) {
    cmb_problem *p = &c->problem;
    if (region_key == Py_None) {
        raise_type("region_key", real_array, region_key);
        return false;
    }
    p->summary_key = p->region_key;
    memset(&p->region_key, 0, sizeof p->region_key);
    return read_array(c, region_value, "region_value", p->Hq, c->R, p->Dv, &p->summary_value);
}

PyDoc_STRVAR(check_doc, "check($module, stages, query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens,\n"
                        "      region_query, region_key, dropout, region_value, /)\n--\n\n"
                        "Check the arguments of `forward` and return (plan, scale, R), without reading an array.");

static PyObject *check(PyObject *module, PyObject *args) {
    int stages;
    PyObject *input[INPUTS], *region_value, *result = NULL;
    if (!PyArg_ParseTuple(args, "iOOOOOOOOOOOO:check", &stages, &input[0], &input[1], &input[2], &input[3], &input[4],
                          &input[5], &input[6], &input[7], &input[8], &input[9], &input[10], &region_value))
        return NULL;
    call c = {.state = state_of(module), .type = NPY_NOTYPE};
    if (read_problem(&c, stages, input) && (stages != CMB_ATTEND || read_summary(&c, input[9], region_value)))
        result = Py_BuildValue("(OdL)", c.plan, c.problem.scale, (long long)c.R);
    end_call(&c);
    return result;
}

PyDoc_STRVAR(forward_doc,
             "forward($module, stages, query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens,\n"
             "        region_query, region_key, dropout, region_value, out, adds, for_backward, /)\n--\n\n"
             "Run stage 1 (stages = 1), 2 or both (3), in these last keeping what backward needs of 1 if asked.\n"
             "`adds`: to the numbers that are in `out`.\n"
             "Return (out, lse, summary_key, summary_value, summary_lse, plan, scale), None for what is absent.");

static PyObject *forward(PyObject *module, PyObject *args) {
    int stages, adds, for_backward;
    PyObject *input[INPUTS], *region_value, *given_out, *result = NULL;
    if (!PyArg_ParseTuple(args, "iOOOOOOOOOOOOOpp:forward", &stages, &input[0], &input[1], &input[2], &input[3],
                          &input[4], &input[5], &input[6], &input[7], &input[8], &input[9], &input[10], &region_value,
                          &given_out, &adds, &for_backward))
        return NULL;
    call c = {.state = state_of(module), .type = NPY_NOTYPE};
    cmb_problem *p = &c.problem;
    PyObject *out = NULL, *stand_in = NULL, *lse = NULL, *summary_key = NULL, *summary_value = NULL,
             *summary_lse = NULL;

    if (!read_problem(&c, stages, input))
        goto end;
    if (stages == CMB_ATTEND && !read_summary(&c, input[9], region_value))
        goto end;
    if (stages != CMB_SUMMARIZE) {
        out = given_out;
        p->adds = adds && given_out != Py_None;
        if (given_out != Py_None ? !read_out(&c, given_out, p->Hq, p->L, p->Dv, &p->out, &stand_in)
                                 : !new_array(&c, p->Hq, p->L, p->Dv, &p->out, &out))
            goto end;
        if (stand_in && p->adds && PyArray_CopyInto((PyArrayObject *)stand_in, (PyArrayObject *)out))
            goto end;
        if (!new_array(&c, p->Hq, p->L, NO_FEATURES, &p->lse, &lse))
            goto end;
    }
    if (stages == CMB_SUMMARIZE || (stages == CMB_BOTH && for_backward)) {
        int64_t key_heads = p->region_key.data ? p->region_key.heads : is_weighted(&c) ? p->Hq : p->Hk;
        if ((stages == CMB_SUMMARIZE || is_weighted(&c)) &&
            !new_array(&c, key_heads, c.R, p->D, &p->summary_key, &summary_key))
            goto end;
        if (!new_array(&c, p->Hq, c.R, p->Dv, &p->summary_value, &summary_value) ||
            !new_array(&c, p->Hq, c.R, NO_FEATURES, &p->summary_lse, &summary_lse))
            goto end;
    }
    if (!run(&c, NULL))
        goto end;
    if (stand_in && PyArray_CopyInto((PyArrayObject *)out, (PyArrayObject *)stand_in))
        goto end;
    result = Py_BuildValue("(OOOOOOd)", or_none(out), or_none(lse), or_none(summary_key), or_none(summary_value),
                           or_none(summary_lse), c.plan, p->scale);
end:
    end_call(&c);
    return result;
}

/* The gradients of query, key and value so far. */
static bool read_sums(call *c, PyObject *sums, cmb_gradients *g, PyObject *sum[3]) {
    const cmb_problem *p = &c->problem;
    PyObject *stand_in = NULL;
    if (!PyArg_ParseTuple(sums, "OOO:sums", &sum[0], &sum[1], &sum[2]) ||
        !read_out(c, sum[0], p->Hq, p->L, p->D, &g->query, &stand_in) ||
        !read_out(c, sum[1], p->Hk, p->L, p->D, &g->key, &stand_in) ||
        !read_out(c, sum[2], p->Hk, p->L, p->Dv, &g->value, &stand_in))
        return false;
    if (stand_in)
        PyErr_SetString(PyExc_ValueError, "sums must be arrays as backward makes them");
    return !stand_in;
}

PyDoc_STRVAR(backward_doc,
             "backward($module, stages, query, key, value, plan, scale, key_mask, cu_seqlens, region_query,\n"
             "         region_key, dropout, summary_key, summary_value, summary_lse, out, lse, grad_out,\n"
             "         grad_lse, grad_summary_key, grad_summary_value, sums, /)\n--\n\n"
             "Return the gradients (query, key, value, region_query, region_key, summary_key, summary_value),\n"
             "None for what was not given or, of the last two, for stages other than 2. The first three are added\n"
             "to `sums` if that is not None, and are it.");

static PyObject *backward(PyObject *module, PyObject *args) {
    int stages;
    PyObject *input[INPUTS], *summary[3], *out, *lse, *grad[4], *sums, *result = NULL;
    if (!PyArg_ParseTuple(args, "iOOOOOOOOOOOOOOOOOOOO:backward", &stages, &input[0], &input[1], &input[2], &input[3],
                          &input[5], &input[6], &input[7], &input[8], &input[9], &input[10], &summary[0], &summary[1],
                          &summary[2], &out, &lse, &grad[0], &grad[1], &grad[2], &grad[3], &sums))
        return NULL;
    input[4] = Py_False; /* a plan carries its own causality */
    call c = {.state = state_of(module), .type = NPY_NOTYPE};
    cmb_problem *p = &c.problem;
    cmb_gradients g;
    memset(&g, 0, sizeof g);
    PyObject *made[7] = {NULL};

    if (!read_problem(&c, stages, input) ||
        !read_optional(&c, summary[0], "saved['summary_key']", EITHER_HEADS, c.R, p->D, &p->summary_key) ||
        !read_array(&c, summary[1], "saved['summary_value']", p->Hq, c.R, p->Dv, &p->summary_value) ||
        !read_optional(&c, summary[2], "saved['summary_lse']", p->Hq, c.R, NO_FEATURES, &p->summary_lse))
        goto end;
    if (stages == CMB_SUMMARIZE) {
        int64_t key_heads = p->region_key.data ? p->region_key.heads : is_weighted(&c) ? p->Hq : p->Hk;
        if (!read_optional(&c, grad[2], "grad_summary_key", key_heads, c.R, p->D, &g.summary_key) ||
            !read_optional(&c, grad[3], "grad_summary_value", p->Hq, c.R, p->Dv, &g.summary_value))
            goto end;
    } else if (!read_array(&c, out, "saved['out']", p->Hq, p->L, p->Dv, &p->out) ||
               !read_array(&c, lse, "saved['lse']", p->Hq, p->L, NO_FEATURES, &p->lse) ||
               !read_array(&c, grad[0], "grad_out", p->Hq, p->L, p->Dv, &g.out) ||
               !read_optional(&c, grad[1], "grad_lse", p->Hq, p->L, NO_FEATURES, &g.lse))
        goto end;
    p->adds = sums != Py_None;
    if (p->adds ? !read_sums(&c, sums, &g, made)
                : !new_array(&c, p->Hq, p->L, p->D, &g.query, &made[0]) ||
                      !new_array(&c, p->Hk, p->L, p->D, &g.key, &made[1]) ||
                      !new_array(&c, p->Hk, p->L, p->Dv, &g.value, &made[2]))
        goto end;
    if (p->region_query.data && !new_array(&c, p->Hq, c.R, p->D, &g.region_query, &made[3]))
        goto end;
    if (p->region_key.data && !new_array(&c, p->region_key.heads, c.R, p->D, &g.region_key, &made[4]))
        goto end;
    if (stages == CMB_ATTEND && (!new_array(&c, p->summary_key.heads, c.R, p->D, &g.summary_key, &made[5]) ||
                                 !new_array(&c, p->Hq, c.R, p->Dv, &g.summary_value, &made[6])))
        goto end;
    if (!run(&c, &g))
        goto end;
    result = Py_BuildValue("(OOOOOOO)", made[0], made[1], made[2], or_none(made[3]), or_none(made[4]), or_none(made[5]),
                           or_none(made[6]));
end:
    end_call(&c);
    return result;
}

PyDoc_STRVAR(workspace_bytes_doc,
             "workspace_bytes($module, query, key, value, pattern, is_causal, scale, key_mask, cu_seqlens,\n"
             "                region_query, region_key, dropout, adds, backward, /)\n--\n\n"
             "Return the bytes that a call of both stages takes beside its results, or its backward's.");

static PyObject *workspace_bytes(PyObject *module, PyObject *args) {
    PyObject *input[INPUTS], *result = NULL;
    int adds, is_backward;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOOOpp:workspace_bytes", &input[0], &input[1], &input[2], &input[3], &input[4],
                          &input[5], &input[6], &input[7], &input[8], &input[9], &input[10], &adds, &is_backward))
        return NULL;
    call c = {.state = state_of(module), .type = NPY_NOTYPE};
    cmb_problem *p = &c.problem;
    size_t bytes;
    cmb_error error;
    if (!read_problem(&c, CMB_BOTH, input))
        goto end;
    p->adds = adds;
    /* Results as `forward` makes them, but of one element: nothing is computed. */
    double element;
    const cmb_array of_query = {.data = &element, .heads = p->Hq};
    p->out = p->lse = of_query;
    if (is_backward)
        p->summary_value = p->summary_lse = of_query;
    if (is_backward && is_weighted(&c))
        p->summary_key = of_query;
    if (raise_status(cmb_workspace_bytes(p, is_backward, &bytes, &error), &error))
        result = PyLong_FromSize_t(bytes);
end:
    end_call(&c);
    return result;
}

/* ---- clusters ----------------------------------------------------------------------------------- */

/* x `[..., H, L, D]` or `[L, D]`; its number of heads is called Hq in the call. */
static bool read_rows(call *c, PyObject *x, cmb_clustering *p) {
    if (!read_leader(c, x, "x", "(..., L, D)"))
        return false;
    const cmb_problem *q = &c->problem;
    *p = (cmb_clustering){.dtype = q->dtype, .B = q->B, .H = q->Hq, .L = q->L, .D = q->D, .x = q->query};
    return true;
}

/* Their number is what the axis before the last of the array holds. */
static bool read_centroids(call *c, PyObject *object, cmb_clustering *p) {
    PyArrayObject *array = hold(c, to_array(object, "centroids", real_array), "centroids");
    if (!array || !check_type(c, array, "centroids", true))
        return false;
    npy_intp expected[MAX_AXES];
    int axes = shape_of(c, p->H, CLUSTERS, p->D, expected);
    if (!check_shape(c, array, "centroids", axes, expected))
        return false;
    p->n = PyArray_DIM(array, axes - 2);
    if (p->n < 1) {
        PyErr_SetString(PyExc_ValueError, "centroids must be at least 1 for each head, got 0");
        return false;
    }
    return view_array(c, array, true, &p->centroids);
}

/* A copy: the library relies on what it has checked. */
static bool read_clusters(call *c, PyObject *object, cmb_clustering *p) {
    PyArrayObject *array = hold(c, to_array(object, "clusters", integer_array), "clusters");
    if (!array)
        return false;
    if (!PyArray_ISINTEGER(array)) {
        PyErr_Format(PyExc_TypeError, "clusters must be %s, got %S", integer_array, PyArray_DESCR(array));
        return false;
    }
    npy_intp expected[MAX_AXES];
    int axes = shape_of(c, p->H, p->L, NO_FEATURES, expected);
    if (!check_shape(c, array, "clusters", axes, expected))
        return false;
    PyObject *copy = PyArray_FromAny((PyObject *)array, PyArray_DescrFromType(NPY_INT64), 0, 0,
                                     NPY_ARRAY_CARRAY | NPY_ARRAY_ENSURECOPY | NPY_ARRAY_FORCECAST, NULL);
    if (!hold(c, copy, NULL))
        return false;
    p->clusters = data_of(copy);
    return true;
}

static PyObject *new_clusters(call *c, cmb_clustering *p) {
    npy_intp shape[MAX_AXES];
    int axes = shape_of(c, p->H, p->L, NO_FEATURES, shape);
    PyObject *array = hold(c, PyArray_SimpleNew(axes, shape, NPY_INT64), NULL);
    if (array)
        p->clusters = data_of(array);
    return array;
}

PyDoc_STRVAR(cluster_doc, "cluster($module, x, n, iterations, seed, balanced, centroids, /)\n--\n\n"
                          "Return the clusters that k-means makes or, if asked, its centroids.");

static PyObject *cluster(PyObject *module, PyObject *args) {
    long long n, iterations, seed;
    PyObject *x, *balanced, *result = NULL;
    int wants_centroids;
    if (!PyArg_ParseTuple(args, "OLLLOp:cluster", &x, &n, &iterations, &seed, &balanced, &wants_centroids))
        return NULL;
    call c = {.state = state_of(module), .type = NPY_NOTYPE};
    cmb_clustering p;
    bool is_balanced;
    cmb_error error;
    if (!read_rows(&c, x, &p) || !read_flag(balanced, "balanced", &is_balanced))
        goto end;
    if (p.L > 0 && n > p.L) { /* before an array of n is made */
        PyErr_Format(PyExc_ValueError, "n must be at most the length of x, %lld, got %lld", (long long)p.L, n);
        goto end;
    }
    p.n = n;
    PyObject *made;
    if (!wants_centroids)
        made = new_clusters(&c, &p);
    else if (!new_array(&c, p.H, n, p.D, &p.new_centroids, &made))
        made = NULL;
    if (!made)
        goto end;
    PyThreadState *thread = PyEval_SaveThread();
    cmb_interrupt interrupt = {poll_signals, &thread};
    cmb_status status = cmb_cluster(&p, iterations, (uint64_t)seed, is_balanced, &interrupt, &error);
    PyEval_RestoreThread(thread);
    if (raise_status(status, &error))
        result = Py_NewRef(made);
end:
    end_call(&c);
    return result;
}

PyDoc_STRVAR(assign_doc, "assign($module, x, centroids, balanced, /)\n--\n\nReturn the cluster of each row.");

static PyObject *assign(PyObject *module, PyObject *args) {
    PyObject *x, *centroids, *balanced, *made, *result = NULL;
    if (!PyArg_ParseTuple(args, "OOO:assign", &x, &centroids, &balanced))
        return NULL;
    call c = {.state = state_of(module), .type = NPY_NOTYPE};
    cmb_clustering p;
    bool is_balanced;
    cmb_error error;
    if (!read_rows(&c, x, &p) || !read_centroids(&c, centroids, &p) || !read_flag(balanced, "balanced", &is_balanced) ||
        !(made = new_clusters(&c, &p)))
        goto end;
    PyThreadState *thread = PyEval_SaveThread();
    cmb_interrupt interrupt = {poll_signals, &thread};
    cmb_status status = cmb_assign(&p, is_balanced, &interrupt, &error);
    PyEval_RestoreThread(thread);
    if (raise_status(status, &error))
        result = Py_NewRef(made);
end:
    end_call(&c);
    return result;
}

PyDoc_STRVAR(update_centroids_doc, "update_centroids($module, centroids, x, clusters, decay, /)\n--\n\n"
                                   "Return the centroids one step of online k-means later.");

static PyObject *update_centroids(PyObject *module, PyObject *args) {
    PyObject *centroids, *x, *clusters, *decay, *made, *result = NULL;
    if (!PyArg_ParseTuple(args, "OOOO:update_centroids", &centroids, &x, &clusters, &decay))
        return NULL;
    call c = {.state = state_of(module), .type = NPY_NOTYPE};
    cmb_clustering p;
    double number;
    cmb_error error;
    if (!read_rows(&c, x, &p) || !read_centroids(&c, centroids, &p) || !read_clusters(&c, clusters, &p) ||
        !read_number(decay, "decay", "a number", &number) || !new_array(&c, p.H, p.n, p.D, &p.new_centroids, &made))
        goto end;
    PyThreadState *thread = PyEval_SaveThread();
    cmb_interrupt interrupt = {poll_signals, &thread};
    cmb_status status = cmb_update_centroids(&p, number, &interrupt, &error);
    PyEval_RestoreThread(thread);
    if (raise_status(status, &error))
        result = Py_NewRef(made);
end:
    end_call(&c);
    return result;
}

/* ---- the process -------------------------------------------------------------------------------- */

PyDoc_STRVAR(set_num_threads_doc,
             "set_num_threads($module, count, /)\n--\n\nThreads a call may use; 0 restores the default.");

static PyObject *set_num_threads(PyObject *module, PyObject *args) {
    (void)module;
    long long count;
    cmb_error error;
    if (!PyArg_ParseTuple(args, "L:set_num_threads", &count) ||
        !raise_status(cmb_set_num_threads(count, &error), &error))
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(get_num_threads_doc,
             "get_num_threads($module, /)\n--\n\nThreads a call may use, the calling one included.");

static PyObject *get_num_threads(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLong(cmb_get_num_threads());
}

PyDoc_STRVAR(stop_threads_doc,
             "stop_threads($module, /)\n--\n\nEnd the pool's threads; the next call starts new ones.");

static PyObject *stop_threads(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyThreadState *thread = PyEval_SaveThread();
    cmb_stop_threads();
    PyEval_RestoreThread(thread);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(release_memory_doc,
             "release_memory($module, /)\n--\n\nGive what is kept of released memory back to the system.");

static PyObject *release_memory(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    cmb_release_kept();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(set_isa_doc, "set_isa($module, name, /)\n--\n\nUse the kernels of this instruction set.");

static PyObject *set_isa(PyObject *module, PyObject *name) {
    (void)module;
    if (!PyUnicode_Check(name)) {
        raise_type("name", "a str", name);
        return NULL;
    }
    const char *text = PyUnicode_AsUTF8AndSize(name, NULL);
    cmb_error error;
    if (!text || !raise_status(cmb_set_isa(text, &error), &error))
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(get_isa_doc, "get_isa($module, /)\n--\n\nThe instruction set in use.");

static PyObject *get_isa(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(cmb_get_isa());
}

PyDoc_STRVAR(isas_doc, "isas($module, /)\n--\n\nThe instruction sets this machine can run, lowest first.");

static PyObject *isas(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    int count = cmb_isa_count();
    PyObject *names = PyTuple_New(count);
    for (int n = 0; n < count && names; n++) {
        PyObject *name = PyUnicode_FromString(cmb_isa_name(n));
        if (!name || PyTuple_SetItem(names, n, name))
            Py_CLEAR(names);
    }
    return names;
}

/* ---- for JAX ------------------------------------------------------------------------------------ */

PyDoc_STRVAR(xla_targets_doc, "xla_targets($module, /)\n--\n\nThe custom calls of XLA, as capsules by name.");

static PyObject *xla_targets(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return Py_BuildValue("{s:N,s:N}", "combiner_forward", PyCapsule_New((void *)cmb_xla_forward, NULL, NULL),
                         "combiner_backward", PyCapsule_New((void *)cmb_xla_backward, NULL, NULL));
}

PyDoc_STRVAR(xla_keep_plan_doc, "xla_keep_plan($module, digest, plan, /)\n--\n\n"
                                "Let custom calls find the plan by its digest. It is never released.");

static PyObject *xla_keep_plan(PyObject *module, PyObject *args) {
    long long digest;
    PyObject *plan;
    if (!PyArg_ParseTuple(args, "LO!:xla_keep_plan", &digest, (PyTypeObject *)state_of(module)->plan_type, &plan))
        return NULL;
    if (!cmb_xla_keep_plan(digest, plan_of(plan)))
        return PyErr_NoMemory();
    Py_INCREF(plan);
    Py_RETURN_NONE;
}

/* ---- the module --------------------------------------------------------------------------------- */

static PyMethodDef core_methods[] = {
    {"check", check, METH_VARARGS, check_doc},
    {"forward", forward, METH_VARARGS, forward_doc},
    {"backward", backward, METH_VARARGS, backward_doc},
    {"workspace_bytes", workspace_bytes, METH_VARARGS, workspace_bytes_doc},
    {"cluster", cluster, METH_VARARGS, cluster_doc},
    {"assign", assign, METH_VARARGS, assign_doc},
    {"update_centroids", update_centroids, METH_VARARGS, update_centroids_doc},
    {"set_num_threads", set_num_threads, METH_VARARGS, set_num_threads_doc},
    {"get_num_threads", get_num_threads, METH_NOARGS, get_num_threads_doc},
    {"stop_threads", stop_threads, METH_NOARGS, stop_threads_doc},
    {"release_memory", release_memory, METH_NOARGS, release_memory_doc},
    {"set_isa", set_isa, METH_O, set_isa_doc},
    {"get_isa", get_isa, METH_NOARGS, get_isa_doc},
    {"isas", isas, METH_NOARGS, isas_doc},
    {"xla_targets", xla_targets, METH_NOARGS, xla_targets_doc},
    {"xla_keep_plan", xla_keep_plan, METH_VARARGS, xla_keep_plan_doc},
    {"_fail_allocation", fail_allocation, METH_VARARGS, fail_allocation_doc},
    {"_live_bytes", live_bytes, METH_NOARGS, live_bytes_doc},
    {"_peak_bytes", peak_bytes, METH_NOARGS, peak_bytes_doc},
    {NULL, NULL, 0, NULL},
};

static int core_exec(PyObject *module) {
    module_state *state = state_of(module);
    if (PyArray_ImportNumPyAPI() < 0)
        return -1;
    if (!atomic_exchange(&heap.is_decided, true) && getenv("COMBINER_TEST_ALLOCATOR")) {
        cmb_set_allocator(&(cmb_allocator){allocate, release, NULL});
        atomic_store(&heap.is_used, true);
    }
    state->plan_type = PyType_FromModuleAndSpec(module, &plan_spec, NULL);
    if (!state->plan_type || PyModule_AddType(module, (PyTypeObject *)state->plan_type))
        return -1;
    PyObject *numpy = PyImport_ImportModule("numpy");
    state->may_share_memory = numpy ? PyObject_GetAttrString(numpy, "may_share_memory") : NULL;
    Py_XDECREF(numpy);
    state->result_memory = PyCapsule_New(&result_memory, "mem_handler", NULL);
    if (!state->may_share_memory || !state->result_memory)
        return -1;
    if (PyModule_AddStringConstant(module, "VERSION", CMB_VERSION) ||
        PyModule_AddStringConstant(module, "COMPILER", __VERSION__) ||
        PyModule_AddStringConstant(module, "NUMPY", BUILD_NUMPY_VERSION))
        return -1;
    return 0;
}

static int core_traverse(PyObject *module, visitproc visit, void *arg) {
    module_state *state = state_of(module);
    Py_VISIT(state->plan_type);
    Py_VISIT(state->may_share_memory);
    Py_VISIT(state->result_memory);
    return 0;
}

static int core_clear(PyObject *module) {
    module_state *state = state_of(module);
    Py_CLEAR(state->plan_type);
    Py_CLEAR(state->may_share_memory);
    Py_CLEAR(state->result_memory);
    return 0;
}

static void core_free(void *module) { core_clear(module); }

static PyModuleDef_Slot core_slots[] = {
    {Py_mod_exec, core_exec},
#ifdef Py_mod_multiple_interpreters /* newer than the limited API; NumPy supports no subinterpreters */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT,          .m_name = "combiner._core", .m_doc = "The C library, as Python sees it.",
    .m_size = sizeof(module_state), .m_methods = core_methods,  .m_slots = core_slots,
    .m_traverse = core_traverse,    .m_clear = core_clear,      .m_free = core_free,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&core_module); }

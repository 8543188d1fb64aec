// SPDX-License-Identifier: Apache-2.0
/* The type Plan: a plan of the C library, its builders, and its arrays as NumPy arrays. */
#include "binding.h"

#include <string.h>

typedef struct {
    PyObject head;
    cmb_plan *plan; /* never changes */
} plan_object;

const cmb_plan *plan_of(PyObject *self) { return ((plan_object *)self)->plan; }

static void plan_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_self = (freefunc)PyType_GetSlot(type, Py_tp_free);
    cmb_plan_free(((plan_object *)self)->plan);
    free_self(self);
    Py_DECREF(type);
}

/* A new instance of `type`, which takes over `plan`, if the builder succeeded. */
static PyObject *wrap_plan(PyTypeObject *type, cmb_plan *plan, bool succeeded) {
    PyObject *self = succeeded ? PyType_GenericAlloc(type, 0) : NULL;
    if (self)
        ((plan_object *)self)->plan = plan;
    else
        cmb_plan_free(plan);
    return self;
}

/* The arguments that all builders share, and the plan that they make. */
typedef struct {
    int is_causal, sparse, pooling, size_bias;
    cmb_plan_options options;
    library_call call;
    cmb_plan *plan;
} building;

/* Addresses for "ppip", the format of the arguments that every builder ends with. */
#define OPTIONS(b) &(b).is_causal, &(b).sparse, &(b).pooling, &(b).size_bias

static void start_building(building *b) {
    enter_library(&b->call);
    b->options =
        (cmb_plan_options){b->is_causal, b->sparse, b->size_bias, (cmb_pooling)b->pooling, &b->call.interrupt, NULL};
    b->plan = NULL;
}

/* The new plan as an instance of `type`, or NULL where the builder failed. */
static PyObject *finish_building(building *b, PyObject *type, cmb_status status) {
    return wrap_plan((PyTypeObject *)type, b->plan, leave_library(&b->call, status));
}

/* The builders: class methods (length, the pattern's own numbers, is_causal, sparse, pooling, size_bias). */

static PyObject *plan_dense(PyObject *type, PyObject *args) {
    long long length;
    building b;
    if (!PyArg_ParseTuple(args, "Lppip:_dense", &length, OPTIONS(b)))
        return NULL;
    start_building(&b);
    return finish_building(&b, type, cmb_plan_dense(length, &b.options, &b.plan, &b.call.error));
}

static PyObject *plan_fixed(PyObject *type, PyObject *args) {
    long long length, span, window;
    building b;
    if (!PyArg_ParseTuple(args, "LLLppip:_fixed", &length, &span, &window, OPTIONS(b)))
        return NULL;
    start_building(&b);
    return finish_building(&b, type, cmb_plan_fixed(length, span, window, &b.options, &b.plan, &b.call.error));
}

static PyObject *plan_logsparse(PyObject *type, PyObject *args) {
    long long length;
    int hierarchical;
    building b;
    if (!PyArg_ParseTuple(args, "Lpppip:_logsparse", &length, &hierarchical, OPTIONS(b)))
        return NULL;
    start_building(&b);
    return finish_building(&b, type, cmb_plan_logsparse(length, hierarchical, &b.options, &b.plan, &b.call.error));
}

static PyObject *plan_axial(PyObject *type, PyObject *args) {
    long long length, width;
    int order, weighted;
    building b;
    if (!PyArg_ParseTuple(args, "LLipppip:_axial", &length, &width, &order, &weighted, OPTIONS(b)))
        return NULL;
    start_building(&b);
    return finish_building(
        &b, type, cmb_plan_axial(length, width, (cmb_axial_order)order, weighted, &b.options, &b.plan, &b.call.error));
}

static PyObject *plan_axial_mixture(PyObject *type, PyObject *args) {
    long long length, width;
    building b;
    if (!PyArg_ParseTuple(args, "LLppip:_axial_mixture", &length, &width, OPTIONS(b)))
        return NULL;
    start_building(&b);
    return finish_building(&b, type, cmb_plan_axial_mixture(length, width, &b.options, &b.plan, &b.call.error));
}

static PyObject *plan_tree(PyObject *type, PyObject *args) {
    long long length, branching, levels;
    building b;
    if (!PyArg_ParseTuple(args, "LLLppip:_tree", &length, &branching, &levels, OPTIONS(b)))
        return NULL;
    start_building(&b);
    return finish_building(&b, type, cmb_plan_tree(length, branching, levels, &b.options, &b.plan, &b.call.error));
}

/* The length is that of `clusters`. */
static PyObject *plan_routing(PyObject *type, PyObject *args) {
    PyObject *given;
    building b;
    if (!PyArg_ParseTuple(args, "Oppip:_routing", &given, OPTIONS(b)))
        return NULL;
    PyObject *clusters = read_integers(given, "clusters", NPY_INT64, 0);
    if (!clusters)
        return NULL;
    const npy_intp length = PyArray_SIZE((PyArrayObject *)clusters);
    start_building(&b);
    PyObject *self =
        finish_building(&b, type, cmb_plan_routing(length, data_of(clusters), &b.options, &b.plan, &b.call.error));
    Py_DECREF(clusters);
    return self;
}

static PyObject *plan_window(PyObject *type, PyObject *args) {
    long long length, size;
    building b;
    if (!PyArg_ParseTuple(args, "LLppip:_window", &length, &size, OPTIONS(b)))
        return NULL;
    start_building(&b);
    return finish_building(&b, type, cmb_plan_window(length, size, &b.options, &b.plan, &b.call.error));
}

/* (base, regions, count, block, open, rest): `regions` has `count` numbers for each of ceil(L / block) blocks. */
static PyObject *plan_selected(PyObject *type, PyObject *args) {
    PyObject *base, *given, *self = NULL;
    long long count, block;
    int open, rest;
    if (!PyArg_ParseTuple(args, "OOLLpp:_selected", &base, &given, &count, &block, &open, &rest))
        return NULL;
    const int is_plan = PyObject_IsInstance(base, type);
    if (is_plan < 1)
        return is_plan ? NULL : PyErr_Format(PyExc_TypeError, "base must be a Plan, got %R", base);
    PyObject *regions = read_integers(given, "regions", NPY_INT64, 0);
    if (!regions)
        return NULL;
    const long long L = plan_of(base)->L, blocks = block < 1 ? 0 : L / block + (L % block != 0);
    if (block < 1 || count < 0 || count > INT32_MAX || PyArray_SIZE((PyArrayObject *)regions) != blocks * count) {
        PyErr_Format(PyExc_ValueError, "regions must be %lld numbers for each of %lld blocks, got %zd in all", count,
                     blocks, PyArray_SIZE((PyArrayObject *)regions));
        goto out;
    }
    library_call it;
    cmb_plan *plan = NULL;
    const cmb_selection selection = {block, count, data_of(regions), open, rest};
    enter_library(&it);
    const bool succeeded =
        leave_library(&it, cmb_plan_selected(plan_of(base), &selection, &it.interrupt, &plan, &it.error));
    self = wrap_plan((PyTypeObject *)type, plan, succeeded);
out:
    Py_DECREF(regions);
    return self;
}

static PyObject *plan_heavily_compressed(PyObject *type, PyObject *args) {
    long long length, rate, window;
    building b;
    if (!PyArg_ParseTuple(args, "LLLppip:_heavily_compressed", &length, &rate, &window, OPTIONS(b)))
        return NULL;
    start_building(&b);
    return finish_building(&b, type,
                           cmb_plan_heavily_compressed(length, rate, window, &b.options, &b.plan, &b.call.error));
}

/* Reads (offsets, items). The last offset must be the number of items; the library checks the others. */
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
    static const char *const names[3] = {"direct", "regions", "members"};
    long long length;
    int cover;
    PyObject *pairs[3], *held[3][2] = {{NULL}}, *self = NULL;
    cmb_lists lists[3];
    building b = {.sparse = false};
    if (!PyArg_ParseTuple(args, "LO!O!O!ipip:_from_parts", &length, &PyTuple_Type, &pairs[0], &PyTuple_Type, &pairs[1],
                          &PyTuple_Type, &pairs[2], &cover, &b.is_causal, &b.pooling, &b.size_bias))
        return NULL;
    for (int n = 0; n < 3; n++)
        if (!read_lists(pairs[n], names[n], &lists[n], held[n]))
            goto out;
    start_building(&b);
    self = finish_building(&b, type,
                           cmb_plan_from_parts(length, &lists[0], &lists[1], &lists[2], (cmb_cover)cover, &b.options,
                                               &b.plan, &b.call.error));
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
    long long R, N;
    int is_causal, pooling, size_bias, weighted;
    if (!PyArg_ParseTuple(args, "OOOOOOOLLLpipp:_from_arrays", &given[WAVE], &given[TASK], &given[POOL], &given[TILE],
                          &given[RUN], &given[INDEX], &given[MASK], &length, &R, &N, &is_causal, &pooling, &size_bias,
                          &weighted))
        return NULL;
    PyObject *held[ARRAYS] = {NULL};
    int32_t count[ARRAYS];
    const void *data[ARRAYS];
    cmb_plan *plan = NULL;
    if (R < 0 || R > INT32_MAX || N < 0 || N > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s must be between 0 and 2^31 - 1, got %lld",
                     R < 0 || R > INT32_MAX ? "regions" : "scratch", R < 0 || R > INT32_MAX ? R : N);
        return NULL;
    }
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
        .R = (int32_t)R,
        .N = (int32_t)N,
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
    library_call it;
    enter_library(&it);
    const bool succeeded = leave_library(&it, cmb_plan_from_arrays(&arrays, &it.interrupt, &plan, &it.error));
    self = wrap_plan((PyTypeObject *)type, plan, succeeded);
out:
    for (int n = 0; n < ARRAYS; n++)
        Py_XDECREF(held[n]);
    return self;
}

static PyObject *plan_measure(PyObject *self, PyObject *unused) {
    (void)unused;
    cmb_plan_facts facts;
    library_call it;
    enter_library(&it);
    if (!leave_library(&it, cmb_plan_measure(plan_of(self), &it.interrupt, &facts, &it.error)))
        return NULL;
    return Py_BuildValue("(LLLNN)", (long long)facts.attend_pairs, (long long)facts.summarize_pairs,
                         (long long)facts.computed_pairs, PyBool_FromLong(facts.is_partition),
                         PyBool_FromLong(facts.is_full));
}

/* A dict of read-only copies: a view could outlive the plan. */
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
    {"_dense", plan_dense, METH_VARARGS | METH_CLASS, NULL},
    {"_fixed", plan_fixed, METH_VARARGS | METH_CLASS, NULL},
    {"_logsparse", plan_logsparse, METH_VARARGS | METH_CLASS, NULL},
    {"_axial", plan_axial, METH_VARARGS | METH_CLASS, NULL},
    {"_axial_mixture", plan_axial_mixture, METH_VARARGS | METH_CLASS, NULL},
    {"_tree", plan_tree, METH_VARARGS | METH_CLASS, NULL},
    {"_routing", plan_routing, METH_VARARGS | METH_CLASS, NULL},
    {"_window", plan_window, METH_VARARGS | METH_CLASS, NULL},
    {"_selected", plan_selected, METH_VARARGS | METH_CLASS, NULL},
    {"_heavily_compressed", plan_heavily_compressed, METH_VARARGS | METH_CLASS, NULL},
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

PyType_Spec plan_spec = {
    .name = "combiner._core.Plan",
    .basicsize = sizeof(plan_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = plan_slots,
};

// SPDX-License-Identifier: Apache-2.0
/* k-means: cluster, assign, update_centroids. */
#include "binding.h"

/* x `[..., H, L, D]` or `[L, D]`, the leader: H is read as Hq. */
static bool read_rows(call *c, PyObject *x, cmb_clustering *p) {
    const cmb_problem *q = &c->problem;
    if (!read_leader(c, x, "x", "(..., L, D)"))
        return false;
    if (q->L > INT64_C(1) << 30) {
        PyErr_Format(PyExc_ValueError, "x must have at most 2^30 rows, got %lld", (long long)q->L);
        return false;
    }
    *p = (cmb_clustering){.dtype = q->dtype, .B = q->B, .H = q->Hq, .L = q->L, .D = q->D, .x = q->query};
    return true;
}

/* n is the extent of the axis before the last. */
static bool read_centroids(call *c, PyObject *object, cmb_clustering *p) {
    PyArrayObject *array = hold(c, to_array(object, "centroids", real_array), "centroids");
    if (!array || !check_type(c, array, "centroids", FEATURES))
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
    return view_array(c, array, FEATURES, &p->centroids);
}

/* A copy, which no other thread can change after the library has checked it. */
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
    if (!read_rows(&c, x, &p) || !read_flag(balanced, "balanced", &is_balanced))
        goto end;
    if (p.L > 0 && n > p.L) { /* checked before n rows are allocated */
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
    library_call it;
    enter_library(&it);
    if (leave_library(&it, cmb_cluster(&p, iterations, (uint64_t)seed, is_balanced, &it.interrupt, &it.error)))
        result = Py_NewRef(made);
end:
    end_call(&c, 0);
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
    if (!read_rows(&c, x, &p) || !read_centroids(&c, centroids, &p) || !read_flag(balanced, "balanced", &is_balanced) ||
        !(made = new_clusters(&c, &p)))
        goto end;
    library_call it;
    enter_library(&it);
    if (leave_library(&it, cmb_assign(&p, is_balanced, &it.interrupt, &it.error)))
        result = Py_NewRef(made);
end:
    end_call(&c, 0);
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
    if (!read_rows(&c, x, &p) || !read_centroids(&c, centroids, &p) || !read_clusters(&c, clusters, &p) ||
        !read_number(decay, "decay", "a number", &number) || !new_array(&c, p.H, p.n, p.D, &p.new_centroids, &made))
        goto end;
    library_call it;
    enter_library(&it);
    if (leave_library(&it, cmb_update_centroids(&p, number, &it.interrupt, &it.error)))
        result = Py_NewRef(made);
end:
    end_call(&c, 0);
    return result;
}

PyMethodDef cluster_methods[] = {
    {"cluster", cluster, METH_VARARGS, cluster_doc},
    {"assign", assign, METH_VARARGS, assign_doc},
    {"update_centroids", update_centroids, METH_VARARGS, update_centroids_doc},
    {NULL, NULL, 0, NULL},
};

// SPDX-License-Identifier: Apache-2.0
/* The type Decoder: a decoder of the C library for arrays of one dtype and of one shape but for their positions. */
#include "binding.h"

typedef struct {
    PyObject head;
    cmb_decoder *decoder; /* never changes */
    cmb_problem like;     /* whose dtype and sizes, but for L, are those of every call */
    bool has_key_bias;    /* every call has one, for the heads of like.key_bias */
    bool is_busy;         /* a call of another thread runs without the GIL */
} decoder_object;

static decoder_object *decoder_of(PyObject *self) { return (decoder_object *)self; }

static void decoder_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_self = (freefunc)PyType_GetSlot(type, Py_tp_free);
    cmb_decoder_free(decoder_of(self)->decoder);
    free_self(self);
    Py_DECREF(type);
}

/* A new instance that takes over the decoder; NULL where there is none. */
static PyObject *wrap_decoder(PyTypeObject *type, cmb_decoder *decoder, const cmb_problem *like, bool has_key_bias) {
    PyObject *self = decoder ? PyType_GenericAlloc(type, 0) : NULL;
    if (!self) {
        cmb_decoder_free(decoder);
        return NULL;
    }
    decoder_of(self)->decoder = decoder;
    decoder_of(self)->like = *like;
    decoder_of(self)->has_key_bias = has_key_bias;
    return self;
}

/* query, key and value of a call. */
static bool read_tokens(call *c, PyObject *type, PyObject *query, PyObject *key, PyObject *value) {
    c->state = PyType_GetModuleState((PyTypeObject *)type);
    c->type = NPY_NOTYPE;
    return read_leader(c, query, "query", "(..., Hq, n, D) or (n, D)") && read_key_and_value(c, key, value);
}

static PyObject *decoder_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    long long size, window, levels, rollback, select;
    int kind, hierarchical, sparse, pooling, size_bias, order, weighted;
    PyObject *query, *key, *value, *scale, *softcap, *key_bias, *sink, *self = NULL;
    call c = {.holds = 0};
    cmb_error error;
    cmb_decoder *decoder = NULL;
    if (kwargs && PyDict_Size(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Decoder takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "(iLLLpppiip)OOOOOLLOO:Decoder", &kind, &size, &window, &levels, &hierarchical, &sparse,
                          &size_bias, &pooling, &order, &weighted, &query, &key, &value, &scale, &softcap, &rollback,
                          &select, &key_bias, &sink))
        return NULL;
    cmb_problem *p = &c.problem;
    if (read_tokens(&c, (PyObject *)type, query, key, value) && read_scale(&c, scale) && read_softcap(&c, softcap) &&
        read_term(&c, key_bias, "key_bias", EITHER_HEADS, p->L, &p->key_bias) &&
        read_term(&c, sink, "sink", p->Hq, NO_ROWS, &p->sink)) {
        const cmb_decoder_options options = {
            .pattern = {(cmb_pattern_kind)kind, size, window, levels, hierarchical, sparse, size_bias,
                        (cmb_pooling)pooling, (cmb_axial_order)order, weighted},
            .dtype = p->dtype,
            .B = p->B,
            .Hq = p->Hq,
            .Hk = p->Hk,
            .D = p->D,
            .Dv = p->Dv,
            .scale = p->scale,
            .softcap = p->softcap,
            .key_bias_heads = p->key_bias.heads,
            .sink = p->sink,
            .rollback = rollback,
            .select = select,
        };
        if (raise_status(cmb_decoder_new(&options, &decoder, &error), &error))
            self = wrap_decoder(type, decoder, p, key_bias != Py_None);
    }
    end_call(&c, 0);
    return self;
}

/* Whether no other thread uses the decoder; if so, it is this thread's until `leave`. */
static bool enter(PyObject *self) {
    if (!__atomic_exchange_n(&decoder_of(self)->is_busy, true, __ATOMIC_ACQUIRE))
        return true;
    PyErr_SetString(PyExc_RuntimeError, "one thread at a time may use a decoder, got a call while another one runs");
    return false;
}

static void leave(PyObject *self) { __atomic_store_n(&decoder_of(self)->is_busy, false, __ATOMIC_RELEASE); }

/* Whether the arrays of a call are like those that made the decoder. */
static bool check_like(PyObject *self, const cmb_problem *p) {
    const cmb_problem *like = &decoder_of(self)->like;
    const bool is_like = p->dtype == like->dtype && p->B == like->B && p->Hq == like->Hq && p->Hk == like->Hk &&
                         p->D == like->D && p->Dv == like->Dv;
    if (!is_like)
        PyErr_SetString(PyExc_ValueError, "query, key and value must have the dtype, the batch entries, the heads and "
                                          "the features of those that made the decoder");
    return is_like;
}

/* The biases of the keys, which come with every call or with none. */
static bool read_key_bias(PyObject *self, call *c, PyObject *key_bias, cmb_array *view) {
    if (decoder_of(self)->has_key_bias == (key_bias != Py_None))
        return read_term(c, key_bias, "key_bias", decoder_of(self)->like.key_bias.heads, c->problem.L, view);
    PyErr_Format(PyExc_ValueError, "key_bias must be %s like for the tokens before, got %s",
                 key_bias == Py_None ? "given" : "None", key_bias == Py_None ? "None" : "an array");
    return false;
}

PyDoc_STRVAR(step_doc, "step($self, query, key, value, lengths, key_bias, /)\n--\n\n"
                       "Attend with new positions, of each sequence the first `lengths` or all where it is None.");

static PyObject *decoder_step(PyObject *self, PyObject *args) {
    PyObject *query, *key, *value, *lengths, *key_bias, *out = NULL;
    call c = {.holds = 0};
    cmb_new_positions p = {.n = 0};
    bool succeeded = false;
    if (!PyArg_ParseTuple(args, "OOOOO:step", &query, &key, &value, &lengths, &key_bias))
        return NULL;
    if (!read_tokens(&c, (PyObject *)Py_TYPE(self), query, key, value) || !check_like(self, &c.problem) ||
        !read_key_bias(self, &c, key_bias, &p.key_bias) ||
        !new_array(&c, c.problem.Hq, c.problem.L, c.problem.Dv, &p.out, &out))
        goto out;
    if (lengths != Py_None) {
        PyArrayObject *array = hold(&c, read_integers(lengths, "lengths", NPY_INT64, 0), NULL);
        if (!array)
            goto out;
        if (PyArray_SIZE(array) != c.problem.B) {
            PyErr_Format(PyExc_ValueError, "lengths must have %lld entries, got %zd", (long long)c.problem.B,
                         PyArray_SIZE(array));
            goto out;
        }
        p.lengths = data_of((PyObject *)array);
    }
    if (decoder_of(self)->like.key_bias.heads == 0) /* none, or biases of no heads */
        p.key_bias.data = NULL;
    p.n = c.problem.L;
    p.query = c.problem.query;
    p.key = c.problem.key;
    p.value = c.problem.value;
    if (enter(self)) {
        library_call it;
        enter_library(&it);
        succeeded = leave_library(&it, cmb_decoder_step(decoder_of(self)->decoder, &p, &it.interrupt, &it.error));
        leave(self);
    }
out:
    if (succeeded)
        Py_INCREF(out);
    end_call(&c, 0);
    return succeeded ? out : NULL;
}

PyDoc_STRVAR(rollback_doc, "rollback($self, n, /)\n--\n\nForget the last n positions of every sequence, or n[b] of b.");

static PyObject *decoder_rollback(PyObject *self, PyObject *given) {
    PyObject *array = read_integers(given, "n", NPY_INT64, 0);
    if (!array)
        return NULL;
    const npy_intp count = PyArray_SIZE((PyArrayObject *)array);
    bool succeeded = false;
    cmb_error error;
    if (count != 1 && count != decoder_of(self)->like.B)
        PyErr_Format(PyExc_ValueError, "n must have %lld entries, got %zd", (long long)decoder_of(self)->like.B, count);
    else if (enter(self)) {
        succeeded =
            raise_status(cmb_decoder_rollback(decoder_of(self)->decoder, data_of(array), count > 1, &error), &error);
        leave(self);
    }
    Py_DECREF(array);
    if (!succeeded)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(copy_doc, "__deepcopy__($self, memo, /)\n--\n\nReturn another decoder of the same sequences.");

static PyObject *decoder_copy(PyObject *self, PyObject *memo) {
    (void)memo;
    cmb_decoder *copy = NULL;
    cmb_error error;
    bool succeeded = false;
    if (enter(self)) {
        succeeded = raise_status(cmb_decoder_copy(decoder_of(self)->decoder, &copy, &error), &error);
        leave(self);
    }
    return succeeded ? wrap_decoder(Py_TYPE(self), copy, &decoder_of(self)->like, decoder_of(self)->has_key_bias)
                     : NULL;
}

PyDoc_STRVAR(take_doc, "take($self, chosen, /)\n--\n\n"
                       "Return another decoder, whose sequence b is a copy of sequence chosen[b].");

static PyObject *decoder_take(PyObject *self, PyObject *given) {
    PyObject *array = read_integers(given, "chosen", NPY_INT64, 0);
    if (!array)
        return NULL;
    cmb_problem like = decoder_of(self)->like;
    cmb_decoder *taken = NULL;
    cmb_error error;
    bool succeeded = false;
    like.B = PyArray_SIZE((PyArrayObject *)array);
    if (enter(self)) {
        succeeded =
            raise_status(cmb_decoder_take(decoder_of(self)->decoder, data_of(array), like.B, &taken, &error), &error);
        leave(self);
    }
    Py_DECREF(array);
    return succeeded ? wrap_decoder(Py_TYPE(self), taken, &like, decoder_of(self)->has_key_bias) : NULL;
}

static PyObject *decoder_lengths(PyObject *self, void *closure) {
    (void)closure;
    npy_intp B = decoder_of(self)->like.B;
    PyObject *array = PyArray_SimpleNew(1, &B, NPY_INT64);
    for (int64_t b = 0; array && b < B; b++)
        ((int64_t *)data_of(array))[b] = cmb_decoder_length(decoder_of(self)->decoder, b);
    return array;
}

static PyObject *decoder_nbytes(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromSize_t(cmb_decoder_bytes(decoder_of(self)->decoder));
}

static PyMethodDef decoder_methods[] = {
    {"step", decoder_step, METH_VARARGS, step_doc},
    {"rollback", decoder_rollback, METH_O, rollback_doc},
    {"__deepcopy__", decoder_copy, METH_O, copy_doc},
    {"take", decoder_take, METH_O, take_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef decoder_attributes[] = {
    {"lengths", decoder_lengths, NULL, "Positions of each sequence so far: int64 [B].", NULL},
    {"nbytes", decoder_nbytes, NULL, "Bytes of the rows that there is room for.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot decoder_slots[] = {
    {Py_tp_doc, "Decoder(pattern, query, key, value, scale, softcap, rollback, select, key_bias, sink, /)\n--\n\n"
                "Sequences that grow by arrays like these, whose positions do not join them."},
    {Py_tp_new, decoder_new},
    {Py_tp_dealloc, decoder_dealloc},
    {Py_tp_methods, decoder_methods},
    {Py_tp_getset, decoder_attributes},
    {0, NULL},
};

PyType_Spec decoder_spec = {
    .name = "combiner._core.Decoder",
    .basicsize = sizeof(decoder_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = decoder_slots,
};

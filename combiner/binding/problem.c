// SPDX-License-Identifier: Apache-2.0
/*
 * The type Problem: the arguments of attention, checked once, and the calls of the library that take them.
 *
 * A Problem never changes, so any number of threads may run it at once: a method copies the problem's `call`, adds the
 * arrays of its own results to the copy, and releases them when it ends. The memory of the given arrays must stay where
 * it is as long as the problem lives, which NumPy ensures but for ndarray.resize(refcheck=False).
 */
#include "binding.h"

#include <string.h>

/* The given arguments, which the attributes return. */
enum {
    QUERY,
    KEY,
    VALUE,
    PLAN,
    SCALE,
    KEY_MASK,
    CU_SEQLENS,
    REGION_QUERY,
    REGION_KEY,
    REGION_VALUE,
    DROPOUT,
    SOFTCAP,
    KEY_BIAS,
    REGION_BIAS,
    SINK,
    OFFSET,
    ARGUMENTS
};

typedef struct {
    PyObject head;
    PyObject *given[ARGUMENTS];
    call call;
} problem_object;

static problem_object *problem_of(PyObject *self) { return (problem_object *)self; }

/* ---- the object --------------------------------------------------------------------------------- */

/* Makes the views of all given arguments. */
static bool read_problem(problem_object *self, int stages, PyObject *is_causal, bool is_mixture) {
    call *c = &self->call;
    cmb_problem *p = &c->problem;
    PyObject **given = self->given;
    p->stages = (cmb_stages)stages;
    c->has_offset = given[OFFSET] != Py_None;
    if (!read_leader(c, given[QUERY], "query", "(..., Hq, L, D) or (L, D)") ||
        !read_key_and_value(c, given[KEY], given[VALUE]) || !read_cu_seqlens(c, given[CU_SEQLENS]) ||
        !read_plans(c, given[PLAN], is_causal, is_mixture) || !read_offset(c, given[OFFSET]) ||
        !read_scale(c, given[SCALE]) || !read_key_mask(c, given[KEY_MASK]) || !read_dropout(c, given[DROPOUT]) ||
        !read_softcap(c, given[SOFTCAP]) ||
        !read_term(c, given[KEY_BIAS], "key_bias", EITHER_HEADS, p->L, &p->key_bias) ||
        !read_term(c, given[REGION_BIAS], "region_bias", EITHER_HEADS, c->R,
                   stages == CMB_ATTEND ? &p->summary_bias : &p->region_bias) ||
        !read_term(c, given[SINK], "sink", p->Hq, NO_ROWS, &p->sink) ||
        !read_optional(c, given[REGION_QUERY], "region_query", p->Hq, c->R, p->D, &p->region_query))
        return false;
    if (stages != CMB_ATTEND)
        return read_optional(c, given[REGION_KEY], "region_key", EITHER_HEADS, c->R, p->D, &p->region_key);
    return read_array(c, given[REGION_KEY], "region_key", EITHER_HEADS, c->R, p->D, &p->summary_key) &&
           read_array(c, given[REGION_VALUE], "region_value", p->Hq, c->R, p->Dv, &p->summary_value);
}

static PyObject *problem_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"stages",      "query",        "key",        "value",      "plan",
                            "is_causal",   "scale",        "key_mask",   "cu_seqlens", "region_query",
                            "region_key",  "region_value", "dropout",    "softcap",    "key_bias",
                            "region_bias", "sink",         "is_mixture", "offset",     NULL};
    int stages, is_mixture = 0;
    PyObject *is_causal = Py_False, *given[ARGUMENTS];
    for (int n = 0; n < ARGUMENTS; n++)
        given[n] = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iOOOO|OOOOOOOOOOOOpO:Problem", names, &stages, &given[QUERY],
                                     &given[KEY], &given[VALUE], &given[PLAN], &is_causal, &given[SCALE],
                                     &given[KEY_MASK], &given[CU_SEQLENS], &given[REGION_QUERY], &given[REGION_KEY],
                                     &given[REGION_VALUE], &given[DROPOUT], &given[SOFTCAP], &given[KEY_BIAS],
                                     &given[REGION_BIAS], &given[SINK], &is_mixture, &given[OFFSET]))
        return NULL;
    if (stages < CMB_SUMMARIZE || stages > CMB_BOTH) {
        PyErr_Format(PyExc_ValueError, "stages must be between 1 and 3, got %d", stages);
        return NULL;
    }
    PyObject *self = PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    for (int n = 0; n < ARGUMENTS; n++)
        problem_of(self)->given[n] = Py_NewRef(given[n]);
    problem_of(self)->call.state = PyType_GetModuleState(type);
    problem_of(self)->call.type = NPY_NOTYPE;
    if (!read_problem(problem_of(self), stages, is_causal, is_mixture))
        Py_CLEAR(self);
    return self;
}

static void problem_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_self = (freefunc)PyType_GetSlot(type, Py_tp_free);
    PyObject_GC_UnTrack(self);
    for (int n = 0; n < ARGUMENTS; n++)
        Py_XDECREF(problem_of(self)->given[n]);
    end_call(&problem_of(self)->call, 0);
    free_slices(&problem_of(self)->call);
    PyMem_Free((void *)problem_of(self)->call.plans);
    free_self(self);
    Py_DECREF(type);
}

/* There is no tp_clear: a problem's references never change, like a tuple's, so every cycle has another, mutable
 * member. */
static int problem_traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    for (int n = 0; n < ARGUMENTS; n++)
        Py_VISIT(problem_of(self)->given[n]);
    for (int n = 0; n < problem_of(self)->call.holds; n++)
        Py_VISIT(problem_of(self)->call.held[n].object);
    return 0;
}

/* A pickle holds the arguments, which are checked again when it is read. */
static PyObject *problem_reduce(PyObject *self, PyObject *unused) {
    (void)unused;
    PyObject **given = problem_of(self)->given;
    return Py_BuildValue("O(iOOOOOOOOOOOOOOOOOO)", Py_TYPE(self), (int)problem_of(self)->call.problem.stages,
                         given[QUERY], given[KEY], given[VALUE], given[PLAN], Py_False, given[SCALE], given[KEY_MASK],
                         given[CU_SEQLENS], given[REGION_QUERY], given[REGION_KEY], given[REGION_VALUE], given[DROPOUT],
                         given[SOFTCAP], given[KEY_BIAS], given[REGION_BIAS], given[SINK],
                         problem_of(self)->call.is_mixture ? Py_True : Py_False, given[OFFSET]);
}

static PyObject *problem_given(PyObject *self, void *which) {
    return Py_NewRef(problem_of(self)->given[(intptr_t)which]);
}

static PyObject *problem_stages(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLong((long)problem_of(self)->call.problem.stages);
}

static PyObject *problem_is_mixture(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(problem_of(self)->call.is_mixture);
}

static PyObject *problem_scale(PyObject *self, void *closure) {
    (void)closure;
    return PyFloat_FromDouble(problem_of(self)->call.problem.scale);
}

static PyObject *problem_region_count(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLongLong(problem_of(self)->call.R);
}

/* ---- the calls ---------------------------------------------------------------------------------- */

static PyStructSequence_Field result_fields[] = {
    {"out", "[..., Hq, L, Dv]"},
    {"lse", "[..., Hq, L], the log of each query's normaliser"},
    {"softmax", "[..., Hq, L, 2], the state of each query's softmax: its largest logit m and the sum of e^(logit - m); "
                "of a mixture [..., Hq, L, 2 components]"},
    {"summary_key", "k_R, [..., Hk or Hq, R, D]"},
    {"summary_value", "h_R, [..., Hq, R, Dv]"},
    {"summary_lse", "[..., Hq, R]"},
    {"summary_softmax", "[..., Hq, R, 2], the state of each region's softmax"},
    {"summary_bias", "b_R, [..., Hk or Hq, R], where regions have biases"},
    {"component_out", "[..., Hq, L, components Dv], of a mixture of several components: what each computes"},
    {NULL, NULL},
};
enum {
    OUT,
    LSE_OF_OUT,
    SOFTMAX_OF_OUT,
    SUMMARY_KEY,
    SUMMARY_VALUE,
    SUMMARY_LSE,
    SUMMARY_SOFTMAX,
    SUMMARY_BIAS,
    COMPONENT_OUT,
    RESULTS
};
PyStructSequence_Desc results_desc = {"combiner._core.Results", "What a forward call makes; None for what is absent.",
                                      result_fields, RESULTS};

/* Forward where `gradients` is NULL. */
static bool run(const call *c, const cmb_gradients *gradients) {
    library_call it;
    enter_library(&it);
    return leave_library(&it, gradients ? cmb_backward(&c->problem, gradients, &it.interrupt, &it.error)
                                        : cmb_forward(&c->problem, &it.interrupt, &it.error));
}

/* Whether some component has weighted plans. */
static bool is_weighted(const call *c) {
    const cmb_problem *p = &c->problem;
    const int64_t each = p->plans / p->components;
    for (int64_t n = 0; n < p->plans; n += each)
        if (p->plan[n]->weighted)
            return true;
    return false;
}

/* Heads of k_R: the given key's, or one for each query head where k_R is weighted. */
static int64_t summary_key_heads(const call *c) {
    const cmb_problem *p = &c->problem;
    return p->region_key.data ? p->region_key.heads : is_weighted(c) ? p->Hq : p->Hk;
}

/* Heads of b_R: the given bias's, or one for each query head where b_R is weighted. */
static int64_t summary_bias_heads(const call *c) {
    const cmb_problem *p = &c->problem;
    return p->region_bias.data ? p->region_bias.heads : is_weighted(c) ? p->Hq : p->key_bias.heads;
}

static bool has_region_biases(const call *c) { return c->problem.key_bias.data || c->problem.region_bias.data; }

/* What forward returns beside out and lse: nothing; the softmax of stage 2, beside which PyTorch's backward makes the
 * summaries again; or all that backward reads. */
enum { KEEP_NOTHING, KEEP_SOFTMAX, KEEP_ALL };

/* New arrays for the results of stage 2. Where the caller's array has no view, *stand_in is written in its place. */
static bool new_outputs(call *c, PyObject *given, bool wants_lse, int keep, PyObject *made[RESULTS],
                        PyObject **stand_in) {
    cmb_problem *p = &c->problem;
    const int64_t components = p->components;
    made[OUT] = given;
    if (given != Py_None ? !read_out(c, given, p->Hq, c->queries, p->Dv, &p->out, stand_in)
                         : !new_array(c, p->Hq, c->queries, p->Dv, &p->out, &made[OUT]))
        return false;
    return (!wants_lse || c->is_mixture || new_array(c, p->Hq, c->queries, NO_FEATURES, &p->lse, &made[LSE_OF_OUT])) &&
           (keep == KEEP_NOTHING ||
            new_array(c, p->Hq, c->queries, components * OF_SOFTMAX, &p->softmax, &made[SOFTMAX_OF_OUT])) &&
           (keep != KEEP_ALL || components == 1 ||
            new_array(c, p->Hq, p->L, components * p->Dv, &p->component_out, &made[COMPONENT_OUT]));
}

/* New arrays for the results of stage 1: all of them, or those that backward reads. */
static bool new_summaries(call *c, bool wants_all, bool keeps_all, PyObject *made[RESULTS]) {
    cmb_problem *p = &c->problem;
    return (!(wants_all || is_weighted(c)) ||
            new_array(c, summary_key_heads(c), c->R, p->D, &p->summary_key, &made[SUMMARY_KEY])) &&
           (!((wants_all || is_weighted(c)) && has_region_biases(c)) ||
            new_array(c, summary_bias_heads(c), c->R, NO_FEATURES, &p->summary_bias, &made[SUMMARY_BIAS])) &&
           (!wants_all || new_array(c, p->Hq, c->R, NO_FEATURES, &p->summary_lse, &made[SUMMARY_LSE])) &&
           new_array(c, p->Hq, c->R, p->Dv, &p->summary_value, &made[SUMMARY_VALUE]) &&
           (!keeps_all || new_array(c, p->Hq, c->R, OF_SOFTMAX, &p->summary_softmax, &made[SUMMARY_SOFTMAX]));
}

static PyObject *run_forward(PyObject *self, int stages, PyObject *given, bool wants_lse, int keep) {
    PyObject *stand_in = NULL, *made[RESULTS] = {NULL}, *results = NULL;
    call c = problem_of(self)->call;
    const int inputs = c.holds;
    c.problem.stages = (cmb_stages)stages;
    if (stages != CMB_SUMMARIZE && !new_outputs(&c, given, wants_lse, keep, made, &stand_in))
        goto end;
    if ((stages == CMB_SUMMARIZE || (stages == CMB_BOTH && keep == KEEP_ALL)) &&
        !new_summaries(&c, stages == CMB_SUMMARIZE, keep == KEEP_ALL, made))
        goto end;
    results = PyStructSequence_New((PyTypeObject *)c.state->results_type); /* nothing may fail once `out` is written */
    if (!results)
        goto end;
    for (int n = 0; n < RESULTS; n++)
        PyStructSequence_SetItem(results, n, Py_NewRef(made[n] ? made[n] : Py_None));
    if (!run(&c, NULL) || (stand_in && PyArray_CopyInto((PyArrayObject *)given, (PyArrayObject *)stand_in)))
        Py_CLEAR(results);
end:
    end_call(&c, inputs);
    return results;
}

PyDoc_STRVAR(forward_doc, "forward($self, /, out=None, wants_lse=True, keep=0)\n--\n\n"
                          "Run the problem's stages.\n\n"
                          "out : array that the result is written to.\n"
                          "wants_lse : no effect for a mixture, whose components have one each.\n"
                          "keep : of what backward needs 0 nothing, 1 the softmax of stage 2, or 2 all.");

static PyObject *problem_forward(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"out", "wants_lse", "keep", NULL};
    int wants_lse = 1, keep = KEEP_NOTHING;
    PyObject *given = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|Opi:forward", names, &given, &wants_lse, &keep))
        return NULL;
    return run_forward(self, (int)problem_of(self)->call.problem.stages, given, wants_lse, keep);
}

PyDoc_STRVAR(summarize_doc, "summarize($self, /)\n--\n\n"
                            "Run stage 1 alone and return its results, with all that backward needs of them.");

static PyObject *problem_summarize(PyObject *self, PyObject *unused) {
    (void)unused;
    return run_forward(self, CMB_SUMMARIZE, Py_None, false, KEEP_ALL);
}

/* Reads what forward returned. */
static bool read_results(call *c, PyObject *results) {
    cmb_problem *p = &c->problem;
    if (!PyObject_TypeCheck(results, (PyTypeObject *)c->state->results_type)) {
        raise_type("results", "what forward returned", results);
        return false;
    }
    PyObject *made[RESULTS];
    for (int n = 0; n < RESULTS; n++)
        made[n] = PyStructSequence_GetItem(results, n);
    if (p->stages & CMB_SUMMARIZE &&
        (!read_optional(c, made[SUMMARY_KEY], "saved['summary_key']", EITHER_HEADS, c->R, p->D, &p->summary_key) ||
         !read_array(c, made[SUMMARY_VALUE], "saved['summary_value']", p->Hq, c->R, p->Dv, &p->summary_value) ||
         !read_optional(c, made[SUMMARY_SOFTMAX], "saved['summary_softmax']", p->Hq, c->R, OF_SOFTMAX,
                        &p->summary_softmax) ||
         !read_optional(c, made[SUMMARY_BIAS], "saved['summary_bias']", EITHER_HEADS, c->R, NO_FEATURES,
                        &p->summary_bias)))
        return false;
    return p->stages == CMB_SUMMARIZE ||
           ((p->components > 1 ? read_array(c, made[COMPONENT_OUT], "saved['component_out']", p->Hq, p->L,
                                            p->components * p->Dv, &p->component_out)
                               : read_array(c, made[OUT], "saved['out']", p->Hq, c->queries, p->Dv, &p->out)) &&
            read_array(c, made[SOFTMAX_OF_OUT], "saved['softmax']", p->Hq, c->queries, p->components * OF_SOFTMAX,
                       &p->softmax));
}

enum { GRADIENTS = 9 };

/* Arrays for the gradients of query, key, value, region_query, region_key, region_value, key_bias, region_bias, sink.
 */
static bool new_gradients(call *c, cmb_gradients *g, PyObject *made[GRADIENTS]) {
    const cmb_problem *p = &c->problem;
    if (!new_array(c, p->Hq, c->queries, p->D, &g->query, &made[0]) ||
        !new_array(c, p->Hk, p->L, p->D, &g->key, &made[1]) || !new_array(c, p->Hk, p->L, p->Dv, &g->value, &made[2]))
        return false;
    if (p->region_query.data && !new_array(c, p->Hq, c->R, p->D, &g->region_query, &made[3]))
        return false;
    if (p->region_key.data && !new_array(c, p->region_key.heads, c->R, p->D, &g->region_key, &made[4]))
        return false;
    if (p->key_bias.data && !new_array(c, p->key_bias.heads, p->L, NO_FEATURES, &g->key_bias, &made[6]))
        return false;
    if (p->region_bias.data && !new_array(c, p->region_bias.heads, c->R, NO_FEATURES, &g->region_bias, &made[7]))
        return false;
    if (p->stages == CMB_ATTEND && p->summary_bias.data &&
        !new_array(c, p->summary_bias.heads, c->R, NO_FEATURES, &g->summary_bias, &made[7]))
        return false;
    if (p->stages & CMB_ATTEND && p->sink.data && !new_array(c, p->Hq, 1, NO_FEATURES, &g->sink, &made[8]))
        return false;
    return p->stages != CMB_ATTEND || (new_array(c, p->summary_key.heads, c->R, p->D, &g->summary_key, &made[4]) &&
                                       new_array(c, p->Hq, c->R, p->Dv, &g->summary_value, &made[5]));
}

PyDoc_STRVAR(
    backward_doc,
    "backward($self, /, results, grad_out=None, grad_lse=None, grad_summary_key=None,\n"
    "         grad_summary_value=None, grad_summary_bias=None)\n--\n\n"
    "Return the gradients of query, key, value, region_query, region_key, region_value, key_bias, region_bias\n"
    "and sink, None for the last six where they were not given. Those of the last three have the shape that\n"
    "these broadcast to.\n\n"
    "results : what forward returned with keep=2.");

static PyObject *problem_backward(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"results",           "grad_out", "grad_lse", "grad_summary_key", "grad_summary_value",
                            "grad_summary_bias", NULL};
    PyObject *results, *grad_out = Py_None, *grad_lse = Py_None, *grad_key = Py_None, *grad_value = Py_None;
    PyObject *grad_bias = Py_None, *made[GRADIENTS] = {NULL}, *gradients = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OOOOO:backward", names, &results, &grad_out, &grad_lse, &grad_key,
                                     &grad_value, &grad_bias))
        return NULL;
    call c = problem_of(self)->call;
    const cmb_problem *p = &c.problem;
    const int inputs = c.holds;
    cmb_gradients g;
    memset(&g, 0, sizeof g);
    if (!read_results(&c, results))
        goto end;
    if (p->stages == CMB_SUMMARIZE
            ? !read_optional(&c, grad_key, "grad_summary_key", summary_key_heads(&c), c.R, p->D, &g.summary_key) ||
                  !read_optional(&c, grad_value, "grad_summary_value", p->Hq, c.R, p->Dv, &g.summary_value) ||
                  !read_optional(&c, grad_bias, "grad_summary_bias", summary_bias_heads(&c), c.R, NO_FEATURES,
                                 &g.summary_bias)
            : !read_array(&c, grad_out, "grad_out", p->Hq, c.queries, p->Dv, &g.out) ||
                  !read_optional(&c, grad_lse, "grad_lse", p->Hq, c.queries, NO_FEATURES, &g.lse))
        goto end;
    if (!new_gradients(&c, &g, made) || !run(&c, &g))
        goto end;
    gradients = PyTuple_New(GRADIENTS);
    for (int n = 0; n < GRADIENTS && gradients; n++)
        PyTuple_SetItem(gradients, n, Py_NewRef(made[n] ? made[n] : Py_None));
end:
    end_call(&c, inputs);
    return gradients;
}

PyDoc_STRVAR(workspace_bytes_doc, "workspace_bytes($self, /, backward=False)\n--\n\n"
                                  "Return the bytes that forward or backward takes beside its results.");

static PyObject *problem_workspace_bytes(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"backward", NULL};
    int is_backward = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|p:workspace_bytes", names, &is_backward))
        return NULL;
    cmb_problem p = problem_of(self)->call.problem;
    size_t bytes;
    cmb_error error;
    /* Nothing is computed: of results only their presence counts, so one element stands for each. */
    double element;
    const cmb_array of_query = {.data = &element, .heads = p.Hq};
    p.out = of_query;
    if (is_backward)
        p.softmax = p.summary_value = p.summary_softmax = p.component_out = of_query;
    if (is_backward && is_weighted(&problem_of(self)->call))
        p.summary_key = of_query;
    if (is_backward && is_weighted(&problem_of(self)->call) && has_region_biases(&problem_of(self)->call))
        p.summary_bias = of_query;
    return raise_status(cmb_workspace_bytes(&p, is_backward, &bytes, &error), &error) ? PyLong_FromSize_t(bytes) : NULL;
}

/* ---- the type ----------------------------------------------------------------------------------- */

static PyMethodDef problem_methods[] = {
    {"forward", (PyCFunction)(void (*)(void))problem_forward, METH_VARARGS | METH_KEYWORDS, forward_doc},
    {"summarize", problem_summarize, METH_NOARGS, summarize_doc},
    {"backward", (PyCFunction)(void (*)(void))problem_backward, METH_VARARGS | METH_KEYWORDS, backward_doc},
    {"workspace_bytes", (PyCFunction)(void (*)(void))problem_workspace_bytes, METH_VARARGS | METH_KEYWORDS,
     workspace_bytes_doc},
    {"__reduce__", problem_reduce, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

#define GIVEN(name, which, doc) \
    { name, problem_given, NULL, doc, (void *)(intptr_t)(which) }

static PyGetSetDef problem_getset[] = {
    GIVEN("query", QUERY, NULL),
    GIVEN("key", KEY, NULL),
    GIVEN("value", VALUE, NULL),
    GIVEN("plan", PLAN, "A Plan, or a tuple of them; of a mixture a tuple of such components."),
    GIVEN("key_mask", KEY_MASK, NULL),
    GIVEN("cu_seqlens", CU_SEQLENS, NULL),
    GIVEN("region_query", REGION_QUERY, NULL),
    GIVEN("region_key", REGION_KEY, NULL),
    GIVEN("region_value", REGION_VALUE, NULL),
    GIVEN("softcap", SOFTCAP, NULL),
    GIVEN("key_bias", KEY_BIAS, NULL),
    GIVEN("region_bias", REGION_BIAS, NULL),
    GIVEN("sink", SINK, NULL),
    GIVEN("offset", OFFSET, "The position of the first query, of attend alone; None: every position is a query."),
    GIVEN("dropout", DROPOUT, "None, or (dropout_p, seed)."),
    {"stages", problem_stages, NULL, "1, summarize; 2, attend; 3, both.", NULL},
    {"is_mixture", problem_is_mixture, NULL, "Whether out is the mean of components.", NULL},
    {"scale", problem_scale, NULL, "The factor of the logits, never None.", NULL},
    {"region_count", problem_region_count, NULL, "R, of all sequences and components.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(problem_doc,
             "Problem(stages, query, key, value, plan, is_causal=False, scale=None, key_mask=None,\n"
             "        cu_seqlens=None, region_query=None, region_key=None, region_value=None,\n"
             "        dropout=None, softcap=None, key_bias=None, region_bias=None, sink=None,\n"
             "        is_mixture=False, offset=None)\n--\n\n"
             "The checked arguments of attention; they are immutable and can be pickled.\n\n"
             "stages : 1, summarize; 2, attend, given region_key and region_value; 3, both.\n"
             "plan : a Plan, or a tuple of one for each sequence, or for each sequence, batch entry and\n"
             "    key head.\n"
             "is_mixture : whether plan is a tuple of components, each as above: out is their mean.\n"
             "is_causal : whether every plan has to be causal.\n"
             "offset : of attend alone, the position of the first query; then query may be shorter than key.");

static PyType_Slot problem_slots[] = {
    {Py_tp_doc, (void *)problem_doc},
    {Py_tp_new, problem_new},
    {Py_tp_dealloc, problem_dealloc},
    {Py_tp_traverse, problem_traverse},
    {Py_tp_methods, problem_methods},
    {Py_tp_getset, problem_getset},
    {0, NULL},
};

PyType_Spec problem_spec = {
    .name = "combiner._core.Problem",
    .basicsize = sizeof(problem_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = problem_slots,
};

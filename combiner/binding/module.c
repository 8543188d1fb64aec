// SPDX-License-Identifier: Apache-2.0
/* The module combiner._core. */
#define BINDING_MODULE
#include "binding.h"

#include "xla.h"

PyDoc_STRVAR(
    set_num_threads_doc,
    "set_num_threads($module, count, /)\n--\n\nSet the number of threads that a call may use; 0 restores the default.");

static PyObject *set_num_threads(PyObject *module, PyObject *args) {
    (void)module;
    long long count;
    cmb_error error;
    if (!PyArg_ParseTuple(args, "L:set_num_threads", &count) ||
        !raise_status(cmb_set_num_threads(count, &error), &error))
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    get_num_threads_doc,
    "get_num_threads($module, /)\n--\n\nReturn the number of threads that a call may use, the calling one included.");

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
             "release_memory($module, /)\n--\n\nReturn memory that the library keeps for later calls to the system.");

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

PyDoc_STRVAR(get_isa_doc, "get_isa($module, /)\n--\n\nReturn the name of the instruction set in use.");

static PyObject *get_isa(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(cmb_get_isa());
}

PyDoc_STRVAR(
    isas_doc,
    "isas($module, /)\n--\n\nReturn the names of the instruction sets that this machine can run, lowest first.");

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

PyDoc_STRVAR(xla_targets_doc, "xla_targets($module, /)\n--\n\nReturn the custom calls of XLA: capsules by name.");

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

static PyMethodDef process_methods[] = {
    {"set_num_threads", set_num_threads, METH_VARARGS, set_num_threads_doc},
    {"get_num_threads", get_num_threads, METH_NOARGS, get_num_threads_doc},
    {"stop_threads", stop_threads, METH_NOARGS, stop_threads_doc},
    {"release_memory", release_memory, METH_NOARGS, release_memory_doc},
    {"set_isa", set_isa, METH_O, set_isa_doc},
    {"get_isa", get_isa, METH_NOARGS, get_isa_doc},
    {"isas", isas, METH_NOARGS, isas_doc},
    {"xla_targets", xla_targets, METH_NOARGS, xla_targets_doc},
    {"xla_keep_plan", xla_keep_plan, METH_VARARGS, xla_keep_plan_doc},
    {NULL, NULL, 0, NULL},
};

static int core_exec(PyObject *module) {
    module_state *state = state_of(module);
    if (PyArray_ImportNumPyAPI() < 0)
        return -1;
    use_test_heap();
    state->plan_type = PyType_FromModuleAndSpec(module, &plan_spec, NULL);
    state->problem_type = PyType_FromModuleAndSpec(module, &problem_spec, NULL);
    state->decoder_type = PyType_FromModuleAndSpec(module, &decoder_spec, NULL);
    state->results_type = (PyObject *)PyStructSequence_NewType(&results_desc);
    PyObject *const types[] = {state->plan_type, state->problem_type, state->decoder_type, state->results_type};
    for (size_t n = 0; n < sizeof types / sizeof *types; n++)
        if (!types[n] || PyModule_AddType(module, (PyTypeObject *)types[n]))
            return -1;
    PyObject *numpy = PyImport_ImportModule("numpy");
    state->may_share_memory = numpy ? PyObject_GetAttrString(numpy, "may_share_memory") : NULL;
    Py_XDECREF(numpy);
    state->result_memory = result_memory_handler();
    if (!state->may_share_memory || !state->result_memory)
        return -1;
    if (PyModule_AddFunctions(module, cluster_methods) || PyModule_AddFunctions(module, select_methods) ||
        PyModule_AddFunctions(module, test_heap_methods))
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
    Py_VISIT(state->problem_type);
    Py_VISIT(state->decoder_type);
    Py_VISIT(state->results_type);
    Py_VISIT(state->may_share_memory);
    Py_VISIT(state->result_memory);
    return 0;
}

static int core_clear(PyObject *module) {
    module_state *state = state_of(module);
    Py_CLEAR(state->plan_type);
    Py_CLEAR(state->problem_type);
    Py_CLEAR(state->decoder_type);
    Py_CLEAR(state->results_type);
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
#ifdef Py_mod_gil /* shared state is atomic (the library, the test heap) or immutable (plans, problems, the module's \
                     state) */
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT,          .m_name = "combiner._core",   .m_doc = "The C library, as Python sees it.",
    .m_size = sizeof(module_state), .m_methods = process_methods, .m_slots = core_slots,
    .m_traverse = core_traverse,    .m_clear = core_clear,        .m_free = core_free,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&core_module); }

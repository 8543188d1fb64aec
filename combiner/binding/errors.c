// SPDX-License-Identifier: Apache-2.0
/* What the library and NumPy report, as exceptions of Python. */
#include "binding.h"

bool raise_status(cmb_status status, const cmb_error *error) {
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

void raise_type(const char *name, const char *expected, PyObject *object) {
    PyObject *type_name = PyType_GetName(Py_TYPE(object));
    if (type_name)
        PyErr_Format(PyExc_TypeError, "%s must be %s, got %U", name, expected, type_name);
    Py_XDECREF(type_name);
}

void name_failure(const char *name, const char *expected) {
    PyObject *type = NULL, *value = NULL, *traceback = NULL;
    if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_ValueError))
        return;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_Format(type, "%s must be %s: %S", name, expected, value ? value : Py_None);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

/* The GIL is taken for the moment that Python's signal handlers run; only the main thread has any. */
static bool poll_signals(void *context) {
    PyThreadState **thread = context;
    PyEval_RestoreThread(*thread);
    bool stop = PyErr_CheckSignals() != 0;
    *thread = PyEval_SaveThread();
    return stop;
}

void enter_library(library_call *it) {
    it->interrupt = (cmb_interrupt){poll_signals, &it->thread};
    it->thread = PyEval_SaveThread();
}

bool leave_library(library_call *it, cmb_status status) {
    PyEval_RestoreThread(it->thread);
    return raise_status(status, &it->error);
}

// SPDX-License-Identifier: Apache-2.0
/* For tests: an allocator that counts what the library holds and fails on request. */
#include "binding.h"

#include "runtime/system.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static struct {
    atomic_bool is_decided, is_used;
    atomic_size_t live, peak;
    atomic_llong left; /* allocations up to the one that fails; below 1 none fails or, with keeps_failing, all do */
    atomic_bool keeps_failing;
} heap;

enum { HEADER = 64 }; /* holds the size; 64 bytes keep the alignment */

static void *allocate(size_t bytes, void *context) {
    (void)context;
    long long left = atomic_fetch_sub(&heap.left, 1);
    if (left == 1 || (left < 1 && atomic_load(&heap.keeps_failing)))
        return NULL;
    void *block = bytes > SIZE_MAX - HEADER ? NULL : cmb_aligned_malloc(HEADER, bytes + HEADER);
    if (!block)
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
    cmb_aligned_free(block);
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

/* The environment is read once, when the module is first imported. */
void use_test_heap(void) {
    if (atomic_exchange(&heap.is_decided, true) || !getenv("COMBINER_TEST_ALLOCATOR"))
        return;
    cmb_set_allocator(&(cmb_allocator){allocate, release, NULL});
    atomic_store(&heap.is_used, true);
}

PyMethodDef test_heap_methods[] = {
    {"_fail_allocation", fail_allocation, METH_VARARGS, fail_allocation_doc},
    {"_live_bytes", live_bytes, METH_NOARGS, live_bytes_doc},
    {"_peak_bytes", peak_bytes, METH_NOARGS, peak_bytes_doc},
    {NULL, NULL, 0, NULL},
};

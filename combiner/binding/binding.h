// SPDX-License-Identifier: Apache-2.0
/*
 * The binding: the module combiner._core, which knows both Python and the C library.
 *
 *   module.c     the module: its functions, state and types; settings of the process
 *   problem.c    the type Problem: attention's arguments, checked once, and the calls that run them
 *   plan.c       the type Plan
 *   decoder.c    the type Decoder: sequences that grow
 *   clusters.c   k-means
 *   select.c     the regions that queries open
 *   arguments.c  arguments that are no arrays with features: scale, key_mask, plans, cu_seqlens, dropout
 *   arrays.c     NumPy arrays as the views that combiner.h takes, and new arrays for results
 *   errors.c     statuses and NumPy's complaints as exceptions; Ctrl-C
 *   test_heap.c  for tests: an allocator that counts and fails on request
 *   xla.c        attention as custom calls of XLA, without Python
 *
 * Each file uses those below it. Every function that may fail returns false or NULL with an exception set.
 */
#ifndef CMB_BINDING_H
#define CMB_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* NumPy's C API is a table of functions that module.c reads; the other files share it. */
#define PY_ARRAY_UNIQUE_SYMBOL combiner_numpy_api
#ifndef BINDING_MODULE
#define NO_IMPORT_ARRAY
#endif
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>
#if NPY_ABI_VERSION < 0x02000000
#error "build with NumPy 2.0 or later; what is built runs with NumPy 1.26 too"
#endif

#include "combiner.h"

typedef struct {
    PyObject *plan_type;
    PyObject *problem_type;
    PyObject *decoder_type;
    PyObject *results_type;     /* of problem.forward */
    PyObject *may_share_memory; /* numpy.may_share_memory */
    PyObject *result_memory;    /* NumPy's handler of large results' memory */
} module_state;

static inline module_state *state_of(PyObject *module) { return PyModule_GetState(module); }

/* ---- errors.c ----------------------------------------------------------------------------------- */

/* True for CMB_OK; else the exception is set. */
bool raise_status(cmb_status status, const cmb_error *error);

/* TypeError: "name must be expected, got the object's type". */
void raise_type(const char *name, const char *expected, PyObject *object);

/* Turns the TypeError or ValueError that NumPy raised about an argument into one that names the argument. Other
 * exceptions stay. */
void name_failure(const char *name, const char *expected);

/* One call of the library, without the GIL: enter, call with its interrupt and error, leave. */
typedef struct {
    cmb_interrupt interrupt; /* by Python's signal handlers */
    cmb_error error;
    PyThreadState *thread;
} library_call;

void enter_library(library_call *it);
bool leave_library(library_call *it, cmb_status status); /* as raise_status */

/* ---- arrays.c ----------------------------------------------------------------------------------- */

enum {
    MAX_AXES = 64,   /* of a NumPy array */
    MAX_HELD = 60,   /* more than the arguments and results of one call, and their copies */
    NO_FEATURES = 0, /* the array ends with its rows */
    NO_ROWS = -6,    /* it ends with its heads, and where there are none it is a number */
    KEY_ROWS = -7,   /* an open extent, which messages call L */
};

/* Extents that a shape leaves open; messages call them Hk, Hk or Hq, Dv, n. n * OF_SOFTMAX stands for the states of n
 * softmaxes, two numbers each. */
enum { KEY_HEADS = -1, EITHER_HEADS = -2, VALUE_FEATURES = -3, CLUSTERS = -4, OF_SOFTMAX = -5 };

/* What a row holds: features, of the inputs' dtype; or one number of a softmax, or two, as computed. */
typedef enum { FEATURES, LSE, SOFTMAX } content;

/* What a call was given: the problem, and what keeps its pointers alive. `held` has a reference to each array whose
 * memory the library sees, and to the plans, so that no other thread can free them during a call.
 *
 * One array leads: its type and its leading axes are those of all others. Shapes are the leading axes, then heads, rows
 * and features; where the leader is [L, D] there are neither leading axes nor heads. */
typedef struct {
    const module_state *state;
    cmb_problem problem;
    const char *leader; /* its name: "query" or "x" */
    int axes;           /* of the leader */
    npy_intp lead[MAX_AXES];
    int type, lse_type;
    npy_intp itemsize, lse_itemsize;
    int64_t R; /* regions of all segments and components */
    bool is_mixture;
    bool has_offset;
    int64_t queries; /* rows of query and of its results: L, or fewer with an offset */
    const cmb_plan *one_plan;
    const cmb_plan **plans; /* of a tuple, or NULL: PyMem_Free */
    cmb_plan **slices;      /* with an offset: [problem.plans] the call's own, or NULL: free_slices */
    int holds;
    struct {
        PyObject *object;
        const char *name; /* of an input, else NULL */
    } held[MAX_HELD];
} call;

extern const char real_array[], integer_array[]; /* what messages expect */

static inline void *data_of(PyObject *array) { return PyArray_DATA((PyArrayObject *)array); }

/* Releases what is held from the `first` on. */
void end_call(call *c, int first);

/* Takes over the reference; returns `object`, NULL included. */
void *hold(call *c, void *object, const char *name);

/* `object` as an ndarray, not a subclass: what numpy.asarray makes of it. Lists, masked arrays and other libraries'
 * arrays are refused; interchange.py takes the last, where all are alike. */
PyArrayObject *to_array(PyObject *object, const char *name, const char *expected);

/* A new contiguous array of int32, int64 or uint64 with the integers of `object`: [count], or [count, columns] where
 * columns > 0. An empty sequence of any type and shape will do. */
PyObject *read_integers(PyObject *object, const char *name, int type, npy_intp columns);

/* Type and byte order; the leader's decide those of all others. */
bool check_type(call *c, PyArrayObject *array, const char *name, content holds);
bool check_shape(const call *c, PyArrayObject *array, const char *name, int axes, const npy_intp *expected);

/* Fills `shape` with the leading axes, heads, rows and features; returns the number of axes. */
int shape_of(const call *c, npy_intp heads, npy_intp rows, npy_intp features, npy_intp *shape);

/* The stride that spans the leading axes, in bytes; false, without an exception, where none does. */
bool merge_leading(const call *c, PyArrayObject *array, npy_intp *stride);

/* `array`, or the held copy of it that has a view. */
PyArrayObject *view_array(call *c, PyArrayObject *array, content holds, cmb_array *view);

/* An input of the given shape. */
PyArrayObject *read_array(call *c, PyObject *object, const char *name, npy_intp heads, npy_intp rows, npy_intp features,
                          cmb_array *view);
bool read_optional(call *c, PyObject *object, const char *name, npy_intp heads, npy_intp rows, npy_intp features,
                   cmb_array *view);

/* None, or an input [..., heads, rows] of the type of lse, or [..., heads] with NO_ROWS. Axes before the rows may be
 * missing or have length 1: it is broadcast along them. Heads that are open are Hk then. */
bool read_term(call *c, PyObject *object, const char *name, npy_intp heads, npy_intp rows, cmb_array *view);

/* The caller's array for results. Where it has no view *stand_in is a new array, to be copied into it. */
bool read_out(call *c, PyObject *object, npy_intp heads, npy_intp rows, npy_intp features, cmb_array *view,
              PyObject **stand_in);

/* A new array, held; `view` describes it. */
bool new_array(call *c, npy_intp heads, npy_intp rows, npy_intp features, cmb_array *view, PyObject **array);

/* A capsule for NumPy: memory of large results, which the library keeps when they are gone for the next call's. */
PyObject *result_memory_handler(void);

/* ---- arguments.c -------------------------------------------------------------------------------- */

/* The array that leads. `shape` is what the message expects. */
bool read_leader(call *c, PyObject *object, const char *name, const char *shape);
bool read_keys(call *c, PyObject *key);
bool read_key_and_value(call *c, PyObject *key, PyObject *value);
bool read_number(PyObject *object, const char *name, const char *expected, double *number);
bool read_flag(PyObject *object, const char *name, bool *flag);
bool read_scale(call *c, PyObject *scale);
bool read_softcap(call *c, PyObject *softcap);
bool read_key_mask(call *c, PyObject *object);
bool read_cu_seqlens(call *c, PyObject *object);
bool read_dropout(call *c, PyObject *object);

/* With an offset: replaces the plans by their slices of the queries, which begin at that position. */
bool read_offset(call *c, PyObject *object);
void free_slices(call *c);

/* A Plan, or a tuple of one for each segment, or for each segment, batch entry and key head; of a mixture a tuple of
 * such components. The caller holds them. Causal ones where `causal` is True. */
bool read_plans(call *c, PyObject *plan, PyObject *causal, bool is_mixture);

/* ---- plan.c, decoder.c, problem.c, clusters.c, select.c, test_heap.c ---------------------------- */

extern PyType_Spec plan_spec, problem_spec, decoder_spec;
extern PyStructSequence_Desc results_desc;
const cmb_plan *plan_of(PyObject *plan);

extern PyMethodDef cluster_methods[], select_methods[], test_heap_methods[];

/* Stands in for the library's allocator where COMBINER_TEST_ALLOCATOR is set, before the library holds anything. */
void use_test_heap(void);

#endif

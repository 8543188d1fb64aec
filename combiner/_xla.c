// SPDX-License-Identifier: Apache-2.0
/*
 * Attention as custom calls of XLA: the one file that knows both XLA's foreign function interface and the C library.
 * It knows no Python. combiner/jax.py checks every argument before it compiles a call; checked again here is what a
 * function that another process compiled (jax.export, a cache on disk) could get wrong: its plan, and the sizes that
 * follow from it.
 *
 * Buffers are dense and row-major, [..., heads, rows, features]; those of positions are [..., rows, heads, features]
 * where `heads_last`. Axes that jax.vmap put in front belong to the batch.
 */
#include "_xla.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- plans -------------------------------------------------------------------------------------- */

/* Compiled code knows a plan by its contents, not by an address, so that it finds the same plan in another process. */
typedef struct known_plan {
    struct known_plan *next;
    int64_t digest;
    const cmb_plan *plan;
} known_plan;

enum { BUCKETS = 1024 };
static known_plan *_Atomic known[BUCKETS]; /* lists that only grow */

static known_plan *_Atomic *bucket_of(int64_t digest) { return &known[(uint64_t)digest % BUCKETS]; }

static const cmb_plan *find_plan(int64_t digest) {
    for (const known_plan *it = atomic_load(bucket_of(digest)); it; it = it->next)
        if (it->digest == digest)
            return it->plan;
    return NULL;
}

bool cmb_xla_keep_plan(int64_t digest, const cmb_plan *plan) {
    known_plan *it = malloc(sizeof *it);
    if (!it)
        return false;
    *it = (known_plan){atomic_load(bucket_of(digest)), digest, plan};
    while (!atomic_compare_exchange_weak(bucket_of(digest), &it->next, it)) {
    }
    return true;
}

/* ---- what XLA passes ---------------------------------------------------------------------------- */

/* The arrays of a call, as numbered by ARRAYS in jax.py. */
enum {
    QUERY,
    KEY,
    VALUE,
    KEY_MASK,
    SEED,
    REGION_QUERY,
    REGION_KEY,
    SUMMARY_KEY,
    SUMMARY_VALUE,
    SUMMARY_LSE,
    OUT,
    LSE,
    GRAD_OUT,
    GRAD_LSE,
    GRAD_SUMMARY_KEY,
    GRAD_SUMMARY_VALUE,
    GRAD_QUERY,
    GRAD_KEY,
    GRAD_VALUE,
    GRAD_REGION_QUERY,
    GRAD_REGION_KEY,
    ARRAYS
};

typedef struct {
    int64_t count;
    const int64_t *item;
} integers;

typedef struct {
    const XLA_FFI_CallFrame *frame;
    const XLA_FFI_Buffer *array[ARRAYS]; /* NULL: absent */
    int64_t stages, batch, heads_last;   /* batch: entries of one call, before jax.vmap */
    double scale, dropout_p;
    integers plans, segments, dropout_rows;
    const char *wrong; /* the first thing that could not be read */
} call;

static const void *read_attribute(call *c, const char *name, XLA_FFI_AttrType type) {
    const XLA_FFI_Attrs *attrs = &c->frame->attrs;
    for (int64_t n = 0; n < attrs->size; n++)
        if (attrs->names[n]->len == strlen(name) && !memcmp(attrs->names[n]->ptr, name, strlen(name)) &&
            attrs->types[n] == type)
            return attrs->attrs[n];
    c->wrong = name;
    return NULL;
}

static void read_scalar(call *c, const char *name, XLA_FFI_DataType type, void *value) {
    const XLA_FFI_Scalar *scalar = read_attribute(c, name, XLA_FFI_AttrType_SCALAR);
    if (scalar && scalar->dtype == type)
        memcpy(value, scalar->value, 8);
    else
        c->wrong = name;
}

static integers read_integers(call *c, const char *name) {
    const XLA_FFI_Array *array = read_attribute(c, name, XLA_FFI_AttrType_ARRAY);
    if (array && array->dtype == XLA_FFI_DataType_S64)
        return (integers){(int64_t)array->size, array->data};
    c->wrong = name;
    return (integers){0};
}

/* `arrays` numbers the operands, then the results. */
static void read_arrays(call *c) {
    const integers number = read_integers(c, "arrays");
    const int64_t operands = c->frame->args.size, results = c->frame->rets.size;
    if (number.count != operands + results)
        c->wrong = "arrays";
    for (int64_t n = 0; n < number.count && !c->wrong; n++) {
        if (number.item[n] < 0 || number.item[n] >= ARRAYS)
            c->wrong = "arrays";
        else
            c->array[number.item[n]] = n < operands ? c->frame->args.args[n] : c->frame->rets.rets[n - operands];
    }
}

static bool read_call(call *c) {
    read_arrays(c);
    read_scalar(c, "stages", XLA_FFI_DataType_S64, &c->stages);
    read_scalar(c, "batch", XLA_FFI_DataType_S64, &c->batch);
    read_scalar(c, "heads_last", XLA_FFI_DataType_S64, &c->heads_last);
    read_scalar(c, "scale", XLA_FFI_DataType_F64, &c->scale);
    read_scalar(c, "dropout_p", XLA_FFI_DataType_F64, &c->dropout_p);
    c->plans = read_integers(c, "plans");
    c->segments = read_integers(c, "segments");
    c->dropout_rows = read_integers(c, "dropout_rows");
    for (int n = QUERY; n <= VALUE && !c->wrong; n++)
        if (!c->array[n] || c->array[n]->rank < 3)
            c->wrong = "query, key and value";
    return !c->wrong;
}

/* ---- the problem -------------------------------------------------------------------------------- */

/* What an array has to each batch entry and head. */
enum { POSITIONS = 1, REGIONS = 2, FEATURES = 4 };
static const struct {
    const char *name;
    int has;
} kind[ARRAYS] = {
    [QUERY] = {"query", POSITIONS | FEATURES},
    [KEY] = {"key", POSITIONS | FEATURES},
    [VALUE] = {"value", POSITIONS | FEATURES},
    [KEY_MASK] = {"key_mask", 0},
    [SEED] = {"seed", 0},
    [REGION_QUERY] = {"region_query", REGIONS | FEATURES},
    [REGION_KEY] = {"region_key", REGIONS | FEATURES},
    [SUMMARY_KEY] = {"summary_key", REGIONS | FEATURES},
    [SUMMARY_VALUE] = {"summary_value", REGIONS | FEATURES},
    [SUMMARY_LSE] = {"summary_lse", REGIONS},
    [OUT] = {"out", POSITIONS | FEATURES},
    [LSE] = {"lse", POSITIONS},
    [GRAD_OUT] = {"grad_out", POSITIONS | FEATURES},
    [GRAD_LSE] = {"grad_lse", POSITIONS},
    [GRAD_SUMMARY_KEY] = {"grad_summary_key", REGIONS | FEATURES},
    [GRAD_SUMMARY_VALUE] = {"grad_summary_value", REGIONS | FEATURES},
    [GRAD_QUERY] = {"grad_query", POSITIONS | FEATURES},
    [GRAD_KEY] = {"grad_key", POSITIONS | FEATURES},
    [GRAD_VALUE] = {"grad_value", POSITIONS | FEATURES},
    [GRAD_REGION_QUERY] = {"grad_region_query", REGIONS | FEATURES},
    [GRAD_REGION_KEY] = {"grad_region_key", REGIONS | FEATURES},
};

typedef struct {
    int64_t entries, heads, rows, features;
    int64_t head, row; /* strides */
    int64_t itemsize;
} layout;

static int64_t itemsize_of(XLA_FFI_DataType type) {
    return type == XLA_FFI_DataType_F64 ? 8 : type == XLA_FFI_DataType_F32 ? 4 : 2;
}

/* The library refuses -1. */
static cmb_dtype dtype_of(XLA_FFI_DataType type) {
    switch (type) {
    case XLA_FFI_DataType_F32:
        return CMB_FLOAT32;
    case XLA_FFI_DataType_F64:
        return CMB_FLOAT64;
    case XLA_FFI_DataType_BF16:
        return CMB_BFLOAT16;
    case XLA_FFI_DataType_F16:
        return CMB_FLOAT16;
    default:
        return (cmb_dtype)-1;
    }
}

static layout layout_of(const call *c, int n) {
    const XLA_FFI_Buffer *array = c->array[n];
    const bool has_features = kind[n].has & FEATURES;
    const int64_t axes = array->rank - has_features, *dims = array->dims;
    const bool heads_last = c->heads_last && has_features && kind[n].has & POSITIONS;
    layout it = {.entries = 1, .features = has_features ? dims[axes] : 1, .itemsize = itemsize_of(array->dtype)};
    for (int64_t a = 0; a < axes - 2; a++)
        it.entries *= dims[a];
    it.heads = dims[axes - (heads_last ? 1 : 2)];
    it.rows = dims[axes - (heads_last ? 2 : 1)];
    it.head = it.features * (heads_last ? 1 : it.rows);
    it.row = it.features * (heads_last ? it.heads : 1);
    return it;
}

/* Array n from batch entry `first` on. An empty buffer may be without an address. */
static cmb_array view(const call *c, int n, int64_t first) {
    static char nowhere[8];
    if (!c->array[n])
        return (cmb_array){0};
    const layout it = layout_of(c, n);
    const int64_t batch = it.heads * it.rows * it.features;
    char *data = c->array[n]->data;
    return (cmb_array){data ? data + first * batch * it.itemsize : nowhere, it.heads, batch, it.head, it.row};
}

/* The sizes of all arrays, which the library takes on trust. */
static bool check_sizes(call *c, const cmb_problem *p, int64_t entries, int64_t R) {
    const XLA_FFI_DataType type = c->array[QUERY]->dtype;
    const XLA_FFI_DataType lse_type = type == XLA_FFI_DataType_F64 ? type : XLA_FFI_DataType_F32;
    if (entries > 0 && (c->batch < 1 || entries % c->batch))
        c->wrong = "batch";
    for (int n = 0; n < ARRAYS && !c->wrong; n++) {
        if (!c->array[n] || !kind[n].has)
            continue;
        if (c->array[n]->rank < 2 + !!(kind[n].has & FEATURES)) {
            c->wrong = kind[n].name;
            continue;
        }
        const layout it = layout_of(c, n);
        const bool is_value =
            n == VALUE || n == SUMMARY_VALUE || n == OUT || n == GRAD_OUT || n == GRAD_SUMMARY_VALUE || n == GRAD_VALUE;
        if (it.entries != entries || it.rows != (kind[n].has & POSITIONS ? p->L : R) ||
            (kind[n].has & FEATURES && it.features != (is_value ? p->Dv : p->D)) ||
            c->array[n]->dtype != (kind[n].has & FEATURES ? type : lse_type))
            c->wrong = kind[n].name;
    }
    return !c->wrong;
}

/* Finds the plans; R is the sum over segments of the largest of theirs. */
static bool find_plans(call *c, cmb_problem *p, const cmb_plan **plan, int64_t *R) {
    p->segments = c->segments.count ? c->segments.count - 1 : 0;
    p->segment = c->segments.count ? c->segments.item : NULL;
    const int64_t sequences = p->segment ? p->segments : 1, each = sequences ? c->plans.count / sequences : 0;
    for (int64_t n = 0; n < c->plans.count; n++)
        if (!(plan[n] = find_plan(c->plans.item[n])))
            return false;
    for (int64_t s = 0; s < sequences; s++) {
        int64_t most = 0;
        for (int64_t n = s * each; n < (s + 1) * each; n++)
            most = plan[n]->R > most ? plan[n]->R : most;
        *R += most;
    }
    p->plan = plan;
    p->plans = c->plans.count;
    return true;
}

static cmb_gradients gradients_of(const call *c, int64_t first) {
    return (cmb_gradients){
        .out = view(c, GRAD_OUT, first),
        .lse = view(c, GRAD_LSE, first),
        .summary_key = view(c, GRAD_SUMMARY_KEY, first),
        .summary_value = view(c, GRAD_SUMMARY_VALUE, first),
        .query = view(c, GRAD_QUERY, first),
        .key = view(c, GRAD_KEY, first),
        .value = view(c, GRAD_VALUE, first),
        .region_query = view(c, GRAD_REGION_QUERY, first),
        .region_key = view(c, GRAD_REGION_KEY, first),
    };
}

/* Entries of jax.vmap are a batch, but for what goes by the number of a batch entry: then each is a call of its own. */
static cmb_status run(const call *c, cmb_problem p, int64_t entries, bool backward, cmb_error *error) {
    const int64_t sequences = p.segment ? p.segments : 1;
    const bool one_call = p.dropout_p == 0 && p.plans == sequences;
    p.B = one_call ? entries : c->batch;
    cmb_status status = CMB_OK;
    for (int64_t first = 0; first < entries && status == CMB_OK; first += p.B) {
        p.query = view(c, QUERY, first);
        p.key = view(c, KEY, first);
        p.value = view(c, VALUE, first);
        p.region_query = view(c, REGION_QUERY, first);
        p.region_key = view(c, REGION_KEY, first);
        p.summary_key = view(c, SUMMARY_KEY, first);
        p.summary_value = view(c, SUMMARY_VALUE, first);
        p.summary_lse = view(c, SUMMARY_LSE, first);
        p.out = view(c, OUT, first);
        p.lse = view(c, LSE, first);
        if (c->array[KEY_MASK]) {
            p.key_mask = (const uint8_t *)c->array[KEY_MASK]->data + first * p.L;
            p.mask_batch = p.L;
            p.mask_row = 1;
        }
        if (c->array[SEED]) {
            const uint32_t *word = (const uint32_t *)c->array[SEED]->data + first / p.B * 2;
            p.seed = (uint64_t)word[1] << 32 | word[0];
        }
        if (backward) {
            const cmb_gradients gradients = gradients_of(c, first);
            status = cmb_backward(&p, &gradients, NULL, error);
        } else {
            status = cmb_forward(&p, NULL, error);
        }
    }
    return status;
}

/* ---- handlers ----------------------------------------------------------------------------------- */

static XLA_FFI_Error *fail(const XLA_FFI_CallFrame *frame, XLA_FFI_Error_Code code, const char *message) {
    XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
    return frame->api->XLA_FFI_Error_Create(&args);
}

/* XLA asks a new handler which version of the interface it was compiled for. What this file uses is the same from 0.1,
 * JAX 0.5's, up to the header's: of these the newest that XLA knows, which it is the last to give up. */
static bool answer_metadata(XLA_FFI_CallFrame *frame) {
    for (XLA_FFI_Extension_Base *it = frame->extension_start; it; it = it->next)
        if (it->type == XLA_FFI_Extension_Metadata) {
            XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)it)->metadata;
            const int newest = frame->api ? frame->api->api_version.minor_version : 1;
            const int minor = newest < XLA_FFI_API_MINOR ? newest : XLA_FFI_API_MINOR;
            metadata->api_version =
                (XLA_FFI_Api_Version){XLA_FFI_Api_Version_STRUCT_SIZE, NULL, XLA_FFI_API_MAJOR, minor};
            metadata->traits = 0;
            return true;
        }
    return false;
}

/* Whether a request of XLA's thread pool succeeded. */
static bool succeeded(const XLA_FFI_CallFrame *frame, XLA_FFI_Error *error) {
    if (error)
        frame->api->XLA_FFI_Error_Destroy(
            &(XLA_FFI_Error_Destroy_Args){XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error});
    return !error;
}

static bool start_task(void *context, void (*task)(void *argument), void *argument) {
    const XLA_FFI_CallFrame *frame = context;
    XLA_FFI_ThreadPool_Schedule_Args args = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, task,
                                             argument};
    return succeeded(frame, frame->api->XLA_FFI_ThreadPool_Schedule(&args));
}

/* Threads of XLA's pool, the calling one for one of them; 1 where there is no pool. */
static int count_threads(const XLA_FFI_CallFrame *frame) {
    int64_t count = 1;
    XLA_FFI_ThreadPool_NumThreads_Args args = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx,
                                               &count};
    return succeeded(frame, frame->api->XLA_FFI_ThreadPool_NumThreads(&args)) && count > 1 ? (int)count : 1;
}

static XLA_FFI_Error *handle(XLA_FFI_CallFrame *frame, bool backward) {
    if (answer_metadata(frame))
        return NULL;
    char message[320];
    call c = {.frame = frame};
    if (!read_call(&c)) {
        snprintf(message, sizeof message, "combiner: cannot read %s of the custom call", c.wrong);
        return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, message);
    }
    const layout query = layout_of(&c, QUERY), key = layout_of(&c, KEY), value = layout_of(&c, VALUE);
    cmb_problem p = {
        .dtype = dtype_of(c.array[QUERY]->dtype),
        .stages = (cmb_stages)c.stages,
        .Hq = query.heads,
        .Hk = key.heads,
        .L = query.rows,
        .D = query.features,
        .Dv = value.features,
        .scale = c.scale,
        .dropout_p = c.dropout_p,
        .dropout_row = c.dropout_rows.count ? c.dropout_rows.item : NULL,
    };
    const cmb_plan **plan = malloc((size_t)(c.plans.count + 1) * sizeof *plan);
    if (!plan)
        return fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "combiner: no memory for the plans of a call");
    XLA_FFI_Error *failure = NULL;
    int64_t R = 0;
    if (!find_plans(&c, &p, plan, &R)) {
        failure = fail(frame, XLA_FFI_Error_Code_FAILED_PRECONDITION,
                       "combiner: this process does not know the plan of a function that another one compiled: call "
                       "combiner.jax with the same pattern, length and is_causal first");
    } else if (!check_sizes(&c, &p, query.entries, R)) {
        snprintf(message, sizeof message, "combiner: %s does not fit the query and the plan", c.wrong);
        failure = fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, message);
    } else {
        const cmb_scheduler threads = {count_threads(frame), start_task, frame};
        cmb_error error;
        cmb_use_scheduler(&threads);
        const cmb_status status = run(&c, p, query.entries, backward, &error);
        cmb_use_scheduler(NULL);
        if (status != CMB_OK) {
            snprintf(message, sizeof message, "combiner: %s", error.message);
            failure = fail(frame,
                           status == CMB_ERR_MEMORY ? XLA_FFI_Error_Code_RESOURCE_EXHAUSTED
                                                    : XLA_FFI_Error_Code_INVALID_ARGUMENT,
                           message);
        }
    }
    free(plan);
    return failure;
}

XLA_FFI_Error *cmb_xla_forward(XLA_FFI_CallFrame *frame) { return handle(frame, false); }

XLA_FFI_Error *cmb_xla_backward(XLA_FFI_CallFrame *frame) { return handle(frame, true); }

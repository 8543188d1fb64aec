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
#include "xla.h"

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

/* The arrays of a call, as numbered by AXES in jax/call.py. */
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
    SUMMARY_SOFTMAX,
    OUT,
    SOFTMAX,
    GRAD_OUT,
    GRAD_LSE,
    GRAD_SUMMARY_KEY,
    GRAD_SUMMARY_VALUE,
    GRAD_QUERY,
    GRAD_KEY,
    GRAD_VALUE,
    GRAD_REGION_QUERY,
    GRAD_REGION_KEY,
    LSE,
    SUMMARY_LSE,
    COMPONENT_OUT,
    KEY_BIAS,
    REGION_BIAS,
    SINK,
    SUMMARY_BIAS,
    GRAD_KEY_BIAS,
    GRAD_REGION_BIAS,
    GRAD_SINK,
    GRAD_SUMMARY_BIAS,
    SELECTED,
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
    double scale, softcap, dropout_p;
    int64_t components, offset; /* offset: as in jax/call.py */
    integers plans, segments;
    integers selection; /* block, open, rest where queries open regions of the plans; else empty */
    const char *wrong;  /* the first thing that could not be read */
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
    read_scalar(c, "components", XLA_FFI_DataType_S64, &c->components);
    read_scalar(c, "offset", XLA_FFI_DataType_S64, &c->offset);
    read_scalar(c, "scale", XLA_FFI_DataType_F64, &c->scale);
    read_scalar(c, "softcap", XLA_FFI_DataType_F64, &c->softcap);
    read_scalar(c, "dropout_p", XLA_FFI_DataType_F64, &c->dropout_p);
    c->plans = read_integers(c, "plans");
    c->segments = read_integers(c, "segments");
    c->selection = read_integers(c, "selection");
    if (!c->wrong && (c->components < 1 || c->components > INT32_MAX))
        c->wrong = "components";
    for (int n = QUERY; n <= VALUE && !c->wrong; n++)
        if (!c->array[n] || c->array[n]->rank < 3)
            c->wrong = "query, key and value";
    return !c->wrong;
}

/* ---- the problem -------------------------------------------------------------------------------- */

/* What an array has to each batch entry and head. */
enum { POSITIONS = 1, REGIONS = 2, FEATURES = 4, STATE = 8, ONE_ROW = 16, QUERIES = 32 };
static const struct {
    const char *name;
    int has;
} kind[ARRAYS] = {
    [QUERY] = {"query", QUERIES | FEATURES},
    [KEY] = {"key", POSITIONS | FEATURES},
    [VALUE] = {"value", POSITIONS | FEATURES},
    [KEY_MASK] = {"key_mask", 0},
    [SEED] = {"seed", 0},
    [REGION_QUERY] = {"region_query", REGIONS | FEATURES},
    [REGION_KEY] = {"region_key", REGIONS | FEATURES},
    [SUMMARY_KEY] = {"summary_key", REGIONS | FEATURES},
    [SUMMARY_VALUE] = {"summary_value", REGIONS | FEATURES},
    [SUMMARY_SOFTMAX] = {"summary_softmax", REGIONS | STATE},
    [OUT] = {"out", QUERIES | FEATURES},
    [SOFTMAX] = {"softmax", QUERIES | STATE},
    [GRAD_OUT] = {"grad_out", QUERIES | FEATURES},
    [GRAD_LSE] = {"grad_lse", QUERIES},
    [GRAD_SUMMARY_KEY] = {"grad_summary_key", REGIONS | FEATURES},
    [GRAD_SUMMARY_VALUE] = {"grad_summary_value", REGIONS | FEATURES},
    [GRAD_QUERY] = {"grad_query", QUERIES | FEATURES},
    [GRAD_KEY] = {"grad_key", POSITIONS | FEATURES},
    [GRAD_VALUE] = {"grad_value", POSITIONS | FEATURES},
    [GRAD_REGION_QUERY] = {"grad_region_query", REGIONS | FEATURES},
    [GRAD_REGION_KEY] = {"grad_region_key", REGIONS | FEATURES},
    [LSE] = {"lse", QUERIES},
    [SUMMARY_LSE] = {"summary_lse", REGIONS},
    [COMPONENT_OUT] = {"component_out", QUERIES | FEATURES},
    [KEY_BIAS] = {"key_bias", POSITIONS},
    [REGION_BIAS] = {"region_bias", REGIONS},
    [SINK] = {"sink", ONE_ROW},
    [SUMMARY_BIAS] = {"summary_bias", REGIONS},
    [GRAD_KEY_BIAS] = {"grad_key_bias", POSITIONS},
    [GRAD_REGION_BIAS] = {"grad_region_bias", REGIONS},
    [GRAD_SINK] = {"grad_sink", ONE_ROW},
    [GRAD_SUMMARY_BIAS] = {"grad_summary_bias", REGIONS},
    [SELECTED] = {"selected", 0},
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
    const bool has_features = kind[n].has & (FEATURES | STATE);
    const int64_t axes = array->rank - has_features, *dims = array->dims;
    const bool heads_last = c->heads_last && kind[n].has & FEATURES && kind[n].has & (POSITIONS | QUERIES);
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

/* Whether an array without heads is absent, or has this number of elements of this type. */
static void check_elements(call *c, int n, int64_t count, XLA_FFI_DataType type) {
    const XLA_FFI_Buffer *array = c->array[n];
    int64_t elements = 1;
    for (int64_t a = 0; array && a < array->rank; a++)
        elements *= array->dims[a];
    if (array && (elements != count || array->dtype != type))
        c->wrong = kind[n].name;
}

/* The sizes of all arrays, which the library takes on trust. */
static bool check_sizes(call *c, const cmb_problem *p, int64_t entries, int64_t queries, int64_t R) {
    const XLA_FFI_DataType type = c->array[QUERY]->dtype;
    const XLA_FFI_DataType lse_type = type == XLA_FFI_DataType_F64 ? type : XLA_FFI_DataType_F32;
    if (entries > 0 && (c->batch < 1 || entries % c->batch))
        c->wrong = "batch";
    if (c->plans.count % c->components)
        c->wrong = "components";
    for (int n = 0; n < ARRAYS && !c->wrong; n++) {
        if (!c->array[n] || !kind[n].has)
            continue;
        if (c->array[n]->rank < 2 + !!(kind[n].has & (FEATURES | STATE))) {
            c->wrong = kind[n].name;
            continue;
        }
        const layout it = layout_of(c, n);
        const bool is_value = n == VALUE || n == SUMMARY_VALUE || n == OUT || n == COMPONENT_OUT || n == GRAD_OUT ||
                              n == GRAD_SUMMARY_VALUE || n == GRAD_VALUE;
        const int64_t features = kind[n].has & STATE ? 2 : !(kind[n].has & FEATURES) ? 1 : is_value ? p->Dv : p->D;
        const int64_t parts = n == COMPONENT_OUT || n == SOFTMAX ? c->components : 1; /* side by side in each row */
        const int has = kind[n].has;
        const int64_t rows = has & POSITIONS ? p->L : has & QUERIES ? queries : has & ONE_ROW ? 1 : R;
        if (it.entries != entries || it.rows != rows || it.features != features * parts ||
            c->array[n]->dtype != (kind[n].has & FEATURES ? type : lse_type))
            c->wrong = kind[n].name;
    }
    if (c->wrong || entries == 0)
        return !c->wrong;
    check_elements(c, KEY_MASK, entries * p->L, XLA_FFI_DataType_PRED);
    check_elements(c, SEED, entries / c->batch * 4, XLA_FFI_DataType_U32);
    return !c->wrong;
}

/* With an offset: puts slices in place of the first *slices plans, all unless this fails. */
static cmb_status slice_plans(const call *c, const cmb_problem *p, int64_t queries, const cmb_plan **plan,
                              int64_t *slices, cmb_error *error) {
    for (int64_t n = 0; c->offset >= 0 && n < c->plans.count; n++) {
        int64_t first = c->offset, count = queries;
        cmb_plan *slice;
        cmb_queries_of_plan(p, n, &first, &count);
        const cmb_status status = cmb_plan_slice(plan[n], first, count, NULL, &slice, error);
        if (status)
            return status;
        plan[n] = slice;
        *slices = n + 1;
    }
    return CMB_OK;
}

/* ---- selections --------------------------------------------------------------------------------- */

/* SELECTED is int32 [..., key heads, blocks, k]: the regions that each block of queries lists. */
static int64_t block_of(const call *c) { return c->selection.item[0]; }
static bool opens(const call *c) { return c->selection.item[1]; }
static bool has_rest(const call *c) { return c->selection.item[2]; }
static bool has_summaries(const call *c) { return has_rest(c) || !opens(c); }

static int64_t count_sequences(const cmb_problem *p) { return p->segment ? p->segments : 1; }

static int64_t length_of(const cmb_problem *p, int64_t sequence) {
    return p->segment ? p->segment[sequence + 1] - p->segment[sequence] : p->L;
}

/* Blocks begin anew in each packed sequence. */
static int64_t blocks_of(const call *c, const cmb_problem *p, int64_t sequence) {
    const int64_t L = length_of(p, sequence);
    return L / block_of(c) + (L % block_of(c) != 0);
}

static int64_t count_blocks(const call *c, const cmb_problem *p) {
    int64_t blocks = 0;
    for (int64_t s = 0; s < count_sequences(p); s++)
        blocks += blocks_of(c, p, s);
    return blocks;
}

static bool check_selection(call *c, const cmb_problem *p, int64_t entries) {
    const XLA_FFI_Buffer *array = c->array[SELECTED];
    if (!array && c->selection.count == 0)
        return true;
    const int64_t sequences = count_sequences(p), each = sequences ? p->plans / sequences : 0;
    bool fits = array && c->selection.count == 3 && block_of(c) >= 1 && c->components == 1 && c->offset < 0 &&
                array->rank >= 3 && p->plans == each * sequences &&
                (sequences == 0 || each == 1 || each == c->batch * p->Hk);
    for (int64_t n = 0; n < p->plans && fits; n++)
        fits = p->plan[n]->L == length_of(p, n / each);
    if (!fits) {
        c->wrong = "selected";
        return false;
    }
    check_elements(c, SELECTED, entries * p->Hk * count_blocks(c, p) * array->dims[array->rank - 1],
                   XLA_FFI_DataType_S32);
    return !c->wrong;
}

static void free_plans(int64_t count, cmb_plan **plan) {
    for (int64_t n = 0; plan && n < count; n++)
        cmb_plan_free(plan[n]);
    free(plan);
}

/* Replaces the problem's plans by selections of them, of batch entries first, first + 1, ..: a plan for each key head,
 * sequence by sequence. The caller frees them with free_plans. */
static cmb_status select_plans(const call *c, cmb_problem *p, int64_t first, cmb_plan ***selected, cmb_error *error) {
    const XLA_FFI_Buffer *array = c->array[SELECTED];
    const int64_t heads = p->B * p->Hk, sequences = count_sequences(p), each = sequences ? p->plans / sequences : 0;
    const int64_t k = array->dims[array->rank - 1], items = count_blocks(c, p) * k;
    const int32_t *given = (const int32_t *)array->data + first * p->Hk * items;
    int64_t *region = malloc((size_t)(items + 1) * sizeof *region);
    cmb_plan **plan = *selected = calloc((size_t)(heads * sequences) + 1, sizeof *plan);
    const cmb_selection selection = {block_of(c), k, region, opens(c), has_rest(c)};
    cmb_status status = region && plan ? CMB_OK : CMB_ERR_MEMORY;
    if (status)
        snprintf(error->message, sizeof error->message, "no memory for the plans of a selection");
    int64_t at = 0; /* the first item of the sequence, among those of a head */
    for (int64_t s = 0; s < sequences; s++) {
        const int64_t own = blocks_of(c, p, s) * k;
        for (int64_t n = 0; n < heads && !status; n++) {
            for (int64_t i = 0; i < own; i++)
                region[i] = given[n * items + at + i];
            const cmb_plan *base = p->plan[s * each + (each > 1 ? n : 0)];
            status = cmb_plan_selected(base, &selection, NULL, &plan[s * heads + n], error);
        }
        at += own;
    }
    free(region);
    p->plan = (const cmb_plan *const *)plan;
    p->plans = heads * sequences;
    return status;
}

/* ---- a call ------------------------------------------------------------------------------------- */

/* Finds the plans; R is the sum over components and segments of the largest of theirs. */
static bool find_plans(call *c, cmb_problem *p, const cmb_plan **plan, int64_t *R) {
    p->segments = c->segments.count ? c->segments.count - 1 : 0;
    p->segment = c->segments.count ? c->segments.item : NULL;
    const int64_t sequences = c->components * count_sequences(p); /* of every component */
    const int64_t each = sequences ? c->plans.count / sequences : 0;
    for (int64_t n = 0; n < c->plans.count; n++)
        if (!(plan[n] = find_plan(c->plans.item[n])))
            return false;
    for (int64_t s = 0; each > 0 && s < sequences; s++) {
        int64_t most = 0;
        for (int64_t n = s * each; n < (s + 1) * each; n++)
            most = plan[n]->R > most ? plan[n]->R : most;
        *R += most;
    }
    if (c->selection.count == 3 && !has_summaries(c))
        *R = 0;
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
        .key_bias = view(c, GRAD_KEY_BIAS, first),
        .region_bias = view(c, GRAD_REGION_BIAS, first),
        .sink = view(c, GRAD_SINK, first),
        .summary_bias = view(c, GRAD_SUMMARY_BIAS, first),
    };
}

/* Entries of jax.vmap are a batch, but for what goes by the number of a batch entry: then each is a call of its own. */
static cmb_status run(const call *c, cmb_problem p, int64_t entries, bool backward, cmb_error *error) {
    const cmb_problem whole = p;
    const int64_t sequences = count_sequences(&p);
    const bool one_call = p.dropout_p == 0 && p.plans == c->components * sequences;
    p.B = one_call ? entries : c->batch;
    cmb_status status = CMB_OK;
    for (int64_t first = 0; first < entries && status == CMB_OK; first += p.B) {
        p.query = view(c, QUERY, first);
        p.key = view(c, KEY, first);
        p.value = view(c, VALUE, first);
        p.region_query = view(c, REGION_QUERY, first);
        p.region_key = view(c, REGION_KEY, first);
        p.key_bias = view(c, KEY_BIAS, first);
        p.region_bias = view(c, REGION_BIAS, first);
        p.sink = view(c, SINK, first);
        p.summary_bias = view(c, SUMMARY_BIAS, first);
        p.summary_key = view(c, SUMMARY_KEY, first);
        p.summary_value = view(c, SUMMARY_VALUE, first);
        p.summary_lse = view(c, SUMMARY_LSE, first);
        p.summary_softmax = view(c, SUMMARY_SOFTMAX, first);
        p.out = view(c, OUT, first);
        p.lse = view(c, LSE, first);
        p.softmax = view(c, SOFTMAX, first);
        p.component_out = view(c, COMPONENT_OUT, first);
        if (c->array[KEY_MASK]) {
            p.key_mask = (const uint8_t *)c->array[KEY_MASK]->data + first * p.L;
            p.mask_batch = p.L;
            p.mask_row = 1;
        }
        if (c->array[SEED]) { /* the seed's lower and higher word, then what the batch entries and heads begin with */
            const uint32_t *word = (const uint32_t *)c->array[SEED]->data + first / p.B * 4;
            p.seed = (uint64_t)word[1] << 32 | word[0];
            p.dropout_batch = word[2];
            p.dropout_head = word[3];
        }
        cmb_plan **selected = NULL;
        if (c->array[SELECTED] && p.Hk > 0) {
            p.plan = whole.plan;
            p.plans = whole.plans;
            status = select_plans(c, &p, first, &selected, error);
        }
        if (status == CMB_OK && backward) {
            const cmb_gradients gradients = gradients_of(c, first);
            status = cmb_backward(&p, &gradients, NULL, error);
        } else if (status == CMB_OK) {
            status = cmb_forward(&p, NULL, error);
        }
        free_plans(p.B * p.Hk * sequences, selected);
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
        .L = key.rows,
        .D = query.features,
        .Dv = value.features,
        .scale = c.scale,
        .softcap = c.softcap,
        .dropout_p = c.dropout_p,
        .components = c.components,
    };
    const cmb_plan **plan = malloc((size_t)(c.plans.count + 1) * sizeof *plan);
    if (!plan)
        return fail(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "combiner: no memory for the plans of a call");
    XLA_FFI_Error *failure = NULL;
    const int64_t queries = c.offset < 0 ? p.L : query.rows;
    int64_t R = 0, slices = 0;
    if (!find_plans(&c, &p, plan, &R)) {
        failure = fail(frame, XLA_FFI_Error_Code_FAILED_PRECONDITION,
                       "combiner: this process does not know the plan of a function that another one compiled: call "
                       "combiner.jax with the same pattern, length and is_causal first");
    } else if (!check_sizes(&c, &p, query.entries, queries, R) || !check_selection(&c, &p, query.entries)) {
        snprintf(message, sizeof message, "combiner: %s does not fit the query and the plan", c.wrong);
        failure = fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, message);
    } else {
        const cmb_scheduler threads = {count_threads(frame), start_task, frame};
        cmb_error error;
        const cmb_scheduler *before = cmb_use_scheduler(&threads);
        cmb_status status = slice_plans(&c, &p, queries, plan, &slices, &error);
        if (status == CMB_OK)
            status = run(&c, p, query.entries, backward, &error);
        cmb_use_scheduler(before);
        if (status != CMB_OK) {
            snprintf(message, sizeof message, "combiner: %s", error.message);
            failure = fail(frame,
                           status == CMB_ERR_MEMORY ? XLA_FFI_Error_Code_RESOURCE_EXHAUSTED
                                                    : XLA_FFI_Error_Code_INVALID_ARGUMENT,
                           message);
        }
    }
    for (int64_t n = 0; n < slices; n++)
        cmb_plan_free((cmb_plan *)(uintptr_t)plan[n]);
    free(plan);
    return failure;
}

XLA_FFI_Error *cmb_xla_forward(XLA_FFI_CallFrame *frame) { return handle(frame, false); }

XLA_FFI_Error *cmb_xla_backward(XLA_FFI_CallFrame *frame) { return handle(frame, true); }

// SPDX-License-Identifier: Apache-2.0
/* A decoder gives the bits of cmb_forward of the whole sequence, however its positions come; it refuses bad arguments,
 * and stays as it was where memory runs out or the caller stops a step. */
#include "arrays.h"
#include "random.h"

enum { B = 2, HQ = 4, HK = 2, D = 6, DV = 5, L = 300, ROLLBACK = 20 };

/* A pattern, and how many regions each query opens. */
typedef struct {
    cmb_pattern pattern;
    int64_t select;
} setup;

static const setup setups[] = {
    {{.kind = CMB_DENSE}, 0},
    {{.kind = CMB_FIXED, .size = 1, .window = 1}, 0},
    {{.kind = CMB_FIXED, .size = 16, .window = 1, .size_bias = true}, 0},
    {{.kind = CMB_FIXED, .size = 16, .window = 20, .pooling = CMB_POOL_MEAN}, 0},
    {{.kind = CMB_FIXED, .size = 100, .window = 30}, 0},
    {{.kind = CMB_FIXED, .size = 16, .window = 5, .sparse = true}, 0},
    {{.kind = CMB_LOGSPARSE, .pooling = CMB_POOL_SUM}, 0},
    {{.kind = CMB_LOGSPARSE, .hierarchical = true}, 0},
    {{.kind = CMB_LOGSPARSE, .sparse = true}, 0},
    {{.kind = CMB_TREE, .size = 2}, 0},
    {{.kind = CMB_TREE, .size = 4, .levels = 2}, 0},
    {{.kind = CMB_TREE, .size = 80}, 0},
    {{.kind = CMB_TREE, .size = 5, .sparse = true}, 0},
    {{.kind = CMB_WINDOW, .size = 1}, 0},
    {{.kind = CMB_WINDOW, .size = 100}, 0},
    {{.kind = CMB_HEAVILY_COMPRESSED, .size = 16, .window = 7}, 0},
    {{.kind = CMB_HEAVILY_COMPRESSED, .size = 7, .window = 100, .pooling = CMB_POOL_MEAN}, 0},
    {{.kind = CMB_HEAVILY_COMPRESSED, .size = 7, .window = 9, .sparse = true}, 0},
    {{.kind = CMB_AXIAL, .size = 1}, 0},
    {{.kind = CMB_AXIAL, .size = 16, .pooling = CMB_POOL_MEAN}, 0},
    {{.kind = CMB_AXIAL, .size = 100, .size_bias = true}, 0},
    {{.kind = CMB_AXIAL, .size = 1, .order = CMB_AXIAL_HORIZONTAL}, 0},
    {{.kind = CMB_AXIAL, .size = 16, .order = CMB_AXIAL_HORIZONTAL, .pooling = CMB_POOL_SUM}, 0},
    {{.kind = CMB_AXIAL, .size = 70, .order = CMB_AXIAL_HORIZONTAL, .size_bias = true}, 0},
    {{.kind = CMB_AXIAL, .size = 1, .order = CMB_AXIAL_ROWMAJOR}, 0},
    {{.kind = CMB_AXIAL, .size = 16, .order = CMB_AXIAL_ROWMAJOR, .size_bias = true}, 0},
    {{.kind = CMB_AXIAL, .size = 140, .order = CMB_AXIAL_ROWMAJOR}, 0},
    {{.kind = CMB_AXIAL, .size = 16, .order = CMB_AXIAL_ROWMAJOR, .weighted = true}, 0},
    {{.kind = CMB_AXIAL, .size = 7, .order = CMB_AXIAL_HORIZONTAL, .sparse = true}, 0},
    {{.kind = CMB_AXIAL, .size = (INT64_C(1) << 30) + 1}, 0},
    {{.kind = CMB_FIXED, .size = 16, .window = 1, .size_bias = true}, 2},
    {{.kind = CMB_FIXED, .size = 5, .window = 9, .pooling = CMB_POOL_MEAN}, 3},
    {{.kind = CMB_LOGSPARSE, .size_bias = true}, 1},
    {{.kind = CMB_LOGSPARSE, .hierarchical = true}, 2},
    {{.kind = CMB_TREE, .size = 3}, 4},
    {{.kind = CMB_TREE, .size = 16, .levels = 1}, 50},
    {{.kind = CMB_TREE, .size = (INT64_C(1) << 30) + 1}, 2},
    {{.kind = CMB_HEAVILY_COMPRESSED, .size = 7, .window = 30, .pooling = CMB_POOL_SUM}, 3},
};
enum { SETUPS = sizeof setups / sizeof *setups };

static cmb_plan *make_plan(const cmb_pattern *p) {
    const cmb_plan_options options = {
        .is_causal = true, .sparse = p->sparse, .size_bias = p->size_bias, .pooling = p->pooling};
    cmb_plan *plan = NULL;
    cmb_error error;
    cmb_status status = CMB_OK;
    switch (p->kind) {
    case CMB_DENSE:
        status = cmb_plan_dense(L, &options, &plan, &error);
        break;
    case CMB_FIXED:
        status = cmb_plan_fixed(L, p->size, p->window, &options, &plan, &error);
        break;
    case CMB_LOGSPARSE:
        status = cmb_plan_logsparse(L, p->hierarchical, &options, &plan, &error);
        break;
    case CMB_TREE:
        status = cmb_plan_tree(L, p->size, p->levels, &options, &plan, &error);
        break;
    case CMB_HEAVILY_COMPRESSED:
        status = cmb_plan_heavily_compressed(L, p->size, p->window, &options, &plan, &error);
        break;
    case CMB_AXIAL:
        status = cmb_plan_axial(L, p->size, p->order, p->weighted, &options, &plan, &error);
        break;
    default:
        status = cmb_plan_window(L, p->size, &options, &plan, &error);
    }
    CHECK(status == CMB_OK, "%s", error.message);
    return plan;
}

/* Terms of the logit: heads of biases, or 0. */
typedef struct {
    int64_t key_bias;
    bool sink;
    double softcap;
} terms;

static const terms every_terms[] = {{0}, {.key_bias = HK}, {.key_bias = HQ, .sink = true, .softcap = 1.5}};
enum { TERMS = sizeof every_terms / sizeof *every_terms, BLOCKS = 7 };

/* A sequence and the rows of cmb_forward of it. */
typedef struct {
    test_block block[BLOCKS];
    cmb_problem problem;
    cmb_array got; /* the rows of the decoder */
} fixture;

static void fill(const cmb_array *array, int64_t heads, int64_t rows, int64_t dim) {
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t x = 0; x < rows; x++)
                for (int64_t d = 0; d < dim; d++)
                    array_put(sizeof(float), array, b, h, x, d, uniform(-1, 1));
}

/* The k regions that each query opens, of its key head; int64 [B][HK][L][k], to be freed. */
static int64_t *choose_regions(const cmb_problem *whole, int64_t k) {
    const cmb_plan *plan = *whole->plan;
    const layout plain = {false, false};
    test_block blocks[2];
    cmb_problem p = *whole;
    cmb_error error;
    int64_t *regions = malloc((size_t)(B * HK * L * k) * sizeof *regions);
    p.stages = CMB_SUMMARIZE;
    p.key_bias = p.sink = p.out = (cmb_array){0};
    p.summary_key = array_make(sizeof(float), plain, B, HK, plan->R, D, &blocks[0]);
    p.summary_value = array_make(sizeof(float), plain, B, HQ, plan->R, DV, &blocks[1]);
    CHECK(cmb_forward(&p, NULL, &error) == CMB_OK, "%s", error.message);
    const cmb_scoring scoring = {
        .B = B,
        .Hq = HQ,
        .Hk = HK,
        .L = L,
        .D = D,
        .scale = cmb_default_scale(D),
        .plan = whole->plan,
        .plans = 1,
        .query = whole->query,
        .region_key = p.summary_key,
        .block = 1,
        .k = k,
        .regions = regions,
    };
    CHECK(cmb_select(&scoring, NULL, &error) == CMB_OK, "%s", error.message);
    free(blocks[0].memory);
    free(blocks[1].memory);
    return regions;
}

/* Each query of the whole sequence opens k regions. */
static void forward_selected(cmb_problem *p, const cmb_plan *base, int64_t k) {
    cmb_plan *plan[B * HK];
    cmb_error error;
    int64_t *regions = choose_regions(p, k);
    for (int n = 0; n < B * HK; n++) {
        const cmb_selection selection = {
            .block = 1, .count = k, .region = regions + n * L * k, .open = true, .rest = true};
        CHECK(cmb_plan_selected(base, &selection, NULL, &plan[n], &error) == CMB_OK, "%s", error.message);
    }
    p->plan = (const cmb_plan *const *)plan;
    p->plans = B * HK;
    CHECK(cmb_forward(p, NULL, &error) == CMB_OK, "%s", error.message);
    for (int n = 0; n < B * HK; n++)
        cmb_plan_free(plan[n]);
    free(regions);
}

static fixture make_fixture(const setup *of, const terms *t) {
    fixture f = {.problem = {.stages = CMB_BOTH, .B = B, .Hq = HQ, .Hk = HK, .L = L, .D = D, .Dv = DV, .plans = 1}};
    const layout plain = {false, false}, turned = {true, false};
    cmb_problem *p = &f.problem;
    cmb_plan *plan = make_plan(&of->pattern);
    cmb_error error;
    p->query = array_make(sizeof(float), turned, B, HQ, L, D, &f.block[0]);
    p->key = array_make(sizeof(float), plain, B, HK, L, D, &f.block[1]);
    p->value = array_make(sizeof(float), turned, B, HK, L, DV, &f.block[2]);
    p->out = array_make(sizeof(float), plain, B, HQ, L, DV, &f.block[3]);
    f.got = array_make(sizeof(float), turned, B, HQ, L, DV, &f.block[4]);
    fill(&p->query, HQ, L, D);
    fill(&p->key, HK, L, D);
    fill(&p->value, HK, L, DV);
    p->softcap = t->softcap;
    if (t->key_bias) {
        p->key_bias = array_make(sizeof(float), turned, B, t->key_bias, L, 1, &f.block[5]);
        fill(&p->key_bias, t->key_bias, L, 1);
    }
    if (t->sink) {
        p->sink = array_make(sizeof(float), turned, B, HQ, 1, 1, &f.block[6]);
        fill(&p->sink, HQ, 1, 1);
    }
    p->plan = (const cmb_plan *const *)&plan;
    if (of->select)
        forward_selected(p, plan, of->select);
    else
        CHECK(cmb_forward(p, NULL, &error) == CMB_OK, "%s", error.message);
    p->plan = NULL;
    cmb_plan_free(plan);
    return f;
}

static void free_fixture(fixture *f) {
    for (int n = 0; n < BLOCKS; n++)
        free(f->block[n].memory);
}

static cmb_array from_position(cmb_array array, int64_t x) {
    if (array.data)
        array.data = (float *)array.data + x * array.row;
    return array;
}

/* Positions [first, first + n) of the sequence. */
static cmb_new_positions positions(const fixture *f, int64_t first, int64_t n) {
    return (cmb_new_positions){
        .n = n,
        .query = from_position(f->problem.query, first),
        .key = from_position(f->problem.key, first),
        .value = from_position(f->problem.value, first),
        .key_bias = from_position(f->problem.key_bias, first),
        .out = from_position(f->got, first),
    };
}

static void check_rows(const fixture *f, int64_t first, int64_t end) {
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < HQ; h++)
            for (int64_t x = first; x < end; x++)
                CHECK(memcmp(array_at(sizeof(float), &f->got, b, h, x, 0),
                             array_at(sizeof(float), &f->problem.out, b, h, x, 0), DV * sizeof(float)) == 0,
                      "batch %d head %d row %d: %s", (int)b, (int)h, (int)x, context);
}

static cmb_decoder *make_decoder(const setup *of, const fixture *f) {
    const cmb_decoder_options options = {
        .pattern = of->pattern,
        .B = B,
        .Hq = HQ,
        .Hk = HK,
        .D = D,
        .Dv = DV,
        .softcap = f->problem.softcap,
        .key_bias_heads = f->problem.key_bias.heads,
        .sink = f->problem.sink,
        .rollback = ROLLBACK,
        .select = of->select,
    };
    cmb_decoder *decoder = NULL;
    cmb_error error;
    CHECK(cmb_decoder_new(&options, &decoder, &error) == CMB_OK, "%s", error.message);
    return decoder;
}

static void steps_of_any_size(void) {
    cmb_error error;
    for (int each = 0; each < SETUPS * TERMS; each++) {
        const int which = each / TERMS;
        fixture f = make_fixture(&setups[which], &every_terms[each % TERMS]);
        for (int round = 0; round < 6; round++) {
            const int most = (int[]){1, 3, 70, L, 20, 150}[round];
            CHECK(cmb_set_num_threads(1 + round % 3, &error) == CMB_OK);
            cmb_decoder *decoder = make_decoder(&setups[which], &f);
            for (int64_t at = 0, n; at < L; at += n) {
                n = 1 + random_below(most < L - at ? most : (int)(L - at));
                CASE("pattern %d, terms %d: %d positions at %d", which, each % TERMS, (int)n, (int)at);
                const cmb_new_positions p = positions(&f, at, n);
                CHECK(cmb_decoder_step(decoder, &p, NULL, &error) == CMB_OK, "%s", error.message);
                check_rows(&f, at, at + n);
                if (random_below(4) == 0) {
                    const int64_t back = random_below(n < ROLLBACK ? (int)n : ROLLBACK);
                    CHECK(cmb_decoder_rollback(decoder, &back, false, &error) == CMB_OK, "%s", error.message);
                    at -= back;
                }
                CHECK(cmb_decoder_length(decoder, B - 1) == at + n);
            }
            cmb_decoder_free(decoder);
        }
        free_fixture(&f);
    }
    CHECK(cmb_set_num_threads(0, &error) == CMB_OK);
}

/* A copy goes on alone; memory that runs out and a poll that stops leave the decoder as it was. */
static void failures_change_nothing(void) {
    cmb_error error;
    for (int which = 0; which < SETUPS; which++) {
        fixture f = make_fixture(&setups[which], &every_terms[which % TERMS]);
        test_heap heap = {0};
        test_heap_use(&heap);
        cmb_decoder *decoder = make_decoder(&setups[which], &f), *copy = NULL;
        int failures = 0;
        for (int64_t at = 0, n = 1; at < L; at += n, n = at + 3 * n < L ? 3 * n : L - at) {
            const cmb_new_positions p = positions(&f, at, n);
            CASE("pattern %d: %d positions at %d", which, (int)n, (int)at);
            cmb_status status = CMB_ERR_MEMORY;
            for (heap.fail = 1; status == CMB_ERR_MEMORY; heap.fail++) {
                heap.calls = 0;
                status = cmb_decoder_step(decoder, &p, NULL, &error);
                failures += status == CMB_ERR_MEMORY;
                CHECK(cmb_decoder_length(decoder, 0) == (status ? at : at + n));
            }
            CHECK(status == CMB_OK, "%s", error.message);
            check_rows(&f, at, at + n);
            heap.fail = 0;
        }
        CHECK(failures > 3, "%d", failures);
        CHECK(cmb_decoder_copy(decoder, &copy, &error) == CMB_OK, "%s", error.message);
        cmb_decoder_free(decoder);
        const int64_t back = ROLLBACK;
        CHECK(cmb_decoder_rollback(copy, &back, false, &error) == CMB_OK, "%s", error.message);
        const cmb_new_positions again = positions(&f, L - ROLLBACK, ROLLBACK);
        CHECK(cmb_decoder_step(copy, &again, NULL, &error) == CMB_OK, "%s", error.message);
        check_rows(&f, L - ROLLBACK, L);
        CHECK(cmb_decoder_bytes(copy) > 0);
        cmb_decoder_free(copy);
        CHECK(heap.live == 0, "%d bytes", (int)heap.live);
        test_heap_use(NULL);
        free_fixture(&f);
    }
}

/* The same array with its batch entries in reverse. */
static cmb_array reversed(cmb_array array) {
    if (array.data)
        array.data = (float *)array.data + (B - 1) * array.batch;
    array.batch = -array.batch;
    return array;
}

/* Sequences that change their places keep their tokens and their sinks, and go on; memory that runs out leaves the
 * decoder as it was. */
static void chosen_sequences_go_on(void) {
    const int64_t swapped[] = {1, 0}, many[] = {1, 1, 0, 1}, beyond[] = {0, B};
    cmb_error error;
    for (int which = 0; which < SETUPS; which++) {
        CASE("pattern %d", which);
        fixture f = make_fixture(&setups[which], &every_terms[TERMS - 1]);
        test_heap heap = {0};
        test_heap_use(&heap);
        cmb_decoder *decoder = make_decoder(&setups[which], &f), *taken = NULL, *more = NULL;
        const cmb_new_positions first = positions(&f, 0, 130);
        CHECK(cmb_decoder_step(decoder, &first, NULL, &error) == CMB_OK, "%s", error.message);
        cmb_status status = CMB_ERR_MEMORY;
        for (heap.fail = 1; status == CMB_ERR_MEMORY; heap.fail++) {
            heap.calls = 0;
            status = cmb_decoder_take(decoder, swapped, 2, &taken, &error);
            CHECK(status == CMB_OK || !taken);
        }
        CHECK(status == CMB_OK && heap.fail > 3, "%s", error.message);
        heap.fail = 0;
        cmb_new_positions rest = positions(&f, 130, L - 130);
        cmb_array *const arrays[] = {&rest.query, &rest.key, &rest.value, &rest.key_bias, &rest.out};
        for (size_t n = 0; n < sizeof arrays / sizeof *arrays; n++)
            *arrays[n] = reversed(*arrays[n]);
        CHECK(cmb_decoder_step(taken, &rest, NULL, &error) == CMB_OK, "%s", error.message);
        check_rows(&f, 0, L);
        CHECK(cmb_decoder_take(decoder, many, 4, &more, &error) == CMB_OK, "%s", error.message);
        CHECK(cmb_decoder_length(more, 3) == 130 && cmb_decoder_length(taken, 0) == L);
        cmb_decoder_free(more);
        CHECK(cmb_decoder_take(decoder, NULL, 0, &more, &error) == CMB_OK && cmb_decoder_bytes(more) == 0);
        cmb_decoder_free(more);
        CHECK(cmb_decoder_take(decoder, beyond, 2, &more, &error) == CMB_ERR_VALUE && !more);
        CHECK(strcmp(error.message, "chosen must be between 0 and 1, got 2") == 0, "%s", error.message);
        CHECK(cmb_decoder_take(decoder, swapped, -1, &more, &error) == CMB_ERR_VALUE && !more);
        CHECK(strcmp(error.message, "count must not be negative, got -1") == 0, "%s", error.message);
        cmb_decoder_free(decoder);
        cmb_decoder_free(taken);
        CHECK(heap.live == 0, "%d bytes", (int)heap.live);
        test_heap_use(NULL);
        free_fixture(&f);
    }
}

static void check_refused(const cmb_decoder_options *options, const char *message) {
    cmb_decoder *decoder = NULL;
    cmb_error error;
    CHECK(cmb_decoder_new(options, &decoder, &error) == CMB_ERR_VALUE && !decoder);
    CHECK(strcmp(error.message, message) == 0, "%s", error.message);
}

static void bad_arguments(void) {
    const cmb_decoder_options good = {
        .pattern = setups[1].pattern, .B = B, .Hq = HQ, .Hk = HK, .D = D, .Dv = DV, .rollback = 3};
    cmb_decoder_options bad = good;
    bad.pattern.kind = (cmb_pattern_kind)9;
    check_refused(&bad, "kind must be between 0 and 6, got 9");
    bad = good;
    bad.pattern.size = 0;
    check_refused(&bad, "span must be at least 1, got 0");
    bad.pattern = (cmb_pattern){.kind = CMB_TREE, .size = 1};
    check_refused(&bad, "branching must be at least 2, got 1");
    bad.pattern = (cmb_pattern){.kind = CMB_FIXED, .size = 4};
    check_refused(&bad, "window must be at least 1, got 0");
    bad.pattern = (cmb_pattern){.kind = CMB_DENSE, .pooling = CMB_POOL_FIRST};
    check_refused(&bad, "pooling must be max, mean or sum, got 3");
    bad.pattern = (cmb_pattern){.kind = CMB_AXIAL};
    check_refused(&bad, "width must be at least 1, got 0");
    bad.pattern = (cmb_pattern){.kind = CMB_AXIAL, .size = 4, .order = (cmb_axial_order)3};
    check_refused(&bad, "order must be vertical, horizontal or rowmajor, got 3");
    bad.pattern = (cmb_pattern){.kind = CMB_AXIAL, .size = 4, .weighted = true};
    check_refused(&bad, "row_key may be weighted only where order is rowmajor");
    bad = good;
    bad.Hq = 3;
    check_refused(&bad, "query heads must be a multiple of key heads, got 3 and 2");
    bad = good;
    bad.D = 0;
    check_refused(&bad, "D and Dv must be between 1 and 1024, got 0 and 5");
    bad = good;
    bad.rollback = -1;
    check_refused(&bad, "rollback must not be negative, got -1");
    bad = good;
    bad.select = -1;
    check_refused(&bad, "select must be between 0 and 2147483647, got -1");
    bad.pattern = (cmb_pattern){.kind = CMB_WINDOW, .size = 4};
    bad.select = 2;
    check_refused(&bad, "select must be 0 for a pattern without regions, got 2");
    bad.pattern = (cmb_pattern){.kind = CMB_AXIAL, .size = 4};
    check_refused(&bad, "select must be 0 for Axial, got 2");
    bad = good;
    bad.key_bias_heads = 3;
    check_refused(&bad, "key_bias_heads must be 0, 2 or 4, got 3");
    bad = good;
    bad.sink = (cmb_array){.data = &bad, .heads = 3};
    check_refused(&bad, "sink must have 4 heads, got 3");

    fixture f = make_fixture(&setups[1], &every_terms[0]), biased = make_fixture(&setups[1], &every_terms[1]);
    cmb_decoder *decoder = make_decoder(&setups[1], &f), *biased_decoder = make_decoder(&setups[1], &biased);
    cmb_error error;
    cmb_new_positions p = positions(&f, 0, 4);
    const int64_t lengths[B] = {4, 5};
    p.lengths = lengths;
    CHECK(cmb_decoder_step(decoder, &p, NULL, &error) == CMB_ERR_VALUE);
    CHECK(strcmp(error.message, "lengths must be between 0 and 4, got 5 at 1") == 0, "%s", error.message);
    p = positions(&f, 0, 4);
    p.key.data = NULL;
    CHECK(cmb_decoder_step(decoder, &p, NULL, &error) == CMB_ERR_VALUE);
    CHECK(strcmp(error.message, "key is missing") == 0, "%s", error.message);
    p = positions(&biased, 0, 4);
    CHECK(cmb_decoder_step(decoder, &p, NULL, &error) == CMB_ERR_VALUE);
    CHECK(strcmp(error.message, "key_bias must be absent where key_bias_heads is 0") == 0, "%s", error.message);
    p = positions(&f, 0, 4);
    CHECK(cmb_decoder_step(biased_decoder, &p, NULL, &error) == CMB_ERR_VALUE);
    CHECK(strcmp(error.message, "key_bias is missing") == 0, "%s", error.message);
    cmb_decoder_free(biased_decoder);
    free_fixture(&biased);
    p.out.row = 0;
    CHECK(cmb_decoder_step(decoder, &p, NULL, &error) == CMB_ERR_VALUE);
    const int64_t back = 1;
    CHECK(cmb_decoder_rollback(decoder, &back, false, &error) == CMB_ERR_VALUE);
    CHECK(cmb_decoder_length(decoder, 0) == 0);
    cmb_decoder_free(decoder);
    cmb_decoder_free(NULL);
    free_fixture(&f);
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(steps_of_any_size),
        TEST(failures_change_nothing),
        TEST(chosen_sequences_go_on),
        TEST(bad_arguments),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

// SPDX-License-Identifier: Apache-2.0
/* The bits of cmb_forward and cmb_backward do not depend on layouts, threads, instruction sets or the other heads. */
#include "kernels/kernels.h"
#include "problems.h"
#include "tile/stages.h"

static void layouts(void) {
    for (int which = DENSE; which < PATTERNS; which++)
        for (int kind = 0; kind < 4; kind++) {
            request asked = large((pattern)which);
            asked.L = 75;
            asked.masked = kind == 3;
            asked.given_key = asked.Hk;
            fixture *plain = new_fixture(asked);
            asked.positions_first = kind != 1;
            asked.backwards = kind > 0;
            fixture *other = new_fixture(asked);
            CASE("pattern %d layout %d", which, kind);
            forward(plain);
            backward(plain);
            forward(other);
            backward(other);
            check_same_results(plain, other);
            free_fixture(plain);
            free_fixture(other);
        }
}

/* Nothing is written between the rows of a strided output. */
static void gaps_are_kept(void) {
    request asked = small;
    asked.positions_first = true;
    asked.dtype = CMB_FLOAT32;
    fixture *f = new_fixture(asked);
    CASE("gaps");
    forward(f);
    backward(f);
    const cmb_array *outputs[] = {&f->problem.out, &f->problem.lse, &f->gradients.query, &f->gradients.key};
    const int64_t dims[] = {asked.Dv, 1, asked.D, asked.D};
    for (int n = 0; n < 4; n++)
        for (int64_t x = 0; x < asked.L; x++)
            for (size_t byte = 0; byte < 3 * f->size; byte++)
                CHECK(element(f, outputs[n], 0, 0, x, dims[n])[byte] == 0x5a, "array %d row %lld", n, (long long)x);
    free_fixture(f);
}

/* A stride of zero gives all positions one key. */
static void broadcast_inputs(void) {
    request asked = small;
    fixture *f = new_fixture(asked), *g = new_fixture(asked);
    CASE("broadcast");
    f->problem.key.row = 0;
    for (int64_t j = 0; j < asked.L; j++)
        for (int64_t d = 0; d < asked.D; d++)
            put(g, &g->problem.key, 0, 0, j, d, get(f, &f->problem.key, 0, 0, 0, d));
    forward(f);
    forward(g);
    backward(f);
    backward(g);
    check_same_results(f, g);
    free_fixture(f);
    free_fixture(g);
}

/* Rounds the numbers of a float array without gaps to the 16-bit dtype, in place, and stores them as such in *to. */
static void round_array(const cmb_narrow_format *narrow, const cmb_array *a, int64_t B, int64_t rows, int64_t dim,
                        cmb_array *to) {
    const int64_t count = B * a->heads * rows * dim;
    if (!a->data)
        return;
    *to = *a;
    to->data = zeros((size_t)count, sizeof(uint16_t));
    narrow->narrow(count, a->data, to->data);
    narrow->widen(count, to->data, a->data);
}

static void check_rounded(const cmb_narrow_format *narrow, const cmb_array *a, const cmb_array *rounded, int64_t B,
                          int64_t rows, int64_t dim, const char *name) {
    const int64_t count = B * a->heads * rows * dim;
    if (!a->data)
        return;
    uint16_t *expected = zeros((size_t)count, sizeof *expected);
    narrow->narrow(count, a->data, expected);
    CHECK(memcmp(rounded->data, expected, (size_t)count * sizeof *expected) == 0, "%s: %s", name, context);
    free(expected);
}

/* Without products of pairs, the results of a 16-bit dtype are float's results, rounded, to the bit. */
static void half_dtype(request asked, cmb_dtype dtype) {
    fixture *f = new_fixture(asked);
    const cmb_isa isa = cmb_isa_current();
    const cmb_narrow_format *narrow = dtype == CMB_BFLOAT16 ? cmb_narrow_for_bf16(isa) : cmb_narrow_for_f16(isa);
    const int64_t B = asked.B, L = asked.L, R = f->plan->R, D = asked.D, Dv = asked.Dv;
    cmb_problem *p = &f->problem, q = *p;
    cmb_gradients *g = &f->gradients, d = *g;
    q.dtype = dtype;
    const struct {
        cmb_array *wide, *rounded;
        int64_t rows, dim;
        const char *name;
    } arrays[] = {
        {&p->query, &q.query, L, D, "query"},
        {&p->key, &q.key, L, D, "key"},
        {&p->value, &q.value, L, Dv, "value"},
        {&p->region_query, &q.region_query, R, D, "region_query"},
        {&p->region_key, &q.region_key, R, D, "region_key"},
        {&g->out, &d.out, L, Dv, "gradient of out"},
        {&p->out, &q.out, L, Dv, "out"},
        {&p->summary_value, &q.summary_value, R, Dv, "summary_value"},
        {&p->summary_key, &q.summary_key, R, D, "summary_key"},
        {&g->query, &d.query, L, D, "gradient of query"},
        {&g->key, &d.key, L, D, "gradient of key"},
        {&g->value, &d.value, L, Dv, "gradient of value"},
        {&g->region_query, &d.region_query, R, D, "gradient of region_query"},
        {&g->region_key, &d.region_key, R, D, "gradient of region_key"},
    };
    enum { COUNT = sizeof arrays / sizeof *arrays };
    for (int n = 0; n < COUNT; n++)
        round_array(narrow, arrays[n].wide, B, arrays[n].rows, arrays[n].dim, arrays[n].rounded);
    q.lse = new_array(f, asked.Hq, L, 1);
    q.softmax = new_array(f, asked.Hq, L, 2);
    q.summary_lse = new_array(f, asked.Hq, R, 1);
    q.summary_softmax = new_array(f, asked.Hq, R, 2);
    cmb_error error = {0};
    forward(f);
    CHECK(cmb_forward(&q, NULL, &error) == CMB_OK, "%s: %s", error.message, context);
    CHECK(memcmp(q.lse.data, p->lse.data, (size_t)(B * asked.Hq * L) * sizeof(float)) == 0, "lse: %s", context);
    for (int n = 6; n < 9; n++) {
        check_rounded(narrow, arrays[n].wide, arrays[n].rounded, B, arrays[n].rows, arrays[n].dim, arrays[n].name);
        if (arrays[n].wide->data)
            narrow->widen(B * arrays[n].wide->heads * arrays[n].rows * arrays[n].dim, arrays[n].rounded->data,
                          arrays[n].wide->data);
    }
    backward(f);
    CHECK(cmb_backward(&q, &d, NULL, &error) == CMB_OK, "%s: %s", error.message, context);
    for (int n = 9; n < COUNT; n++)
        check_rounded(narrow, arrays[n].wide, arrays[n].rounded, B, arrays[n].rows, arrays[n].dim, arrays[n].name);
    for (int n = 0; n < COUNT; n++)
        if (arrays[n].wide->data)
            free(arrays[n].rounded->data);
    free_fixture(f);
}

static void half_dtypes(void) {
    const char *isa = cmb_get_isa();
    if (strcmp(isa, "avx512_bf16") == 0 || strcmp(isa, "amx") == 0)
        CHECK(cmb_set_isa("avx512", NULL) == CMB_OK);
    for (int which = DENSE; which < PATTERNS; which++)
        for (int options = 0; options < 4; options++) {
            request asked = small;
            asked.pattern = (pattern)which;
            asked.B = 2;
            asked.Hq = 4;
            asked.Hk = 2;
            asked.L = 71;
            asked.options.is_causal = options & 1;
            asked.masked = options & 2;
            asked.given_query = options == 1;
            asked.given_key = options == 2 ? 2 : 0;
            asked.dtype = CMB_FLOAT32;
            for (int dtype = CMB_BFLOAT16; dtype <= CMB_FLOAT16; dtype++) {
                CASE("pattern %d options %d dtype %d", which, options, dtype);
                half_dtype(asked, (cmb_dtype)dtype);
            }
        }
    CHECK(cmb_set_isa(isa, NULL) == CMB_OK);
}

static void threads(void) {
    static const int counts[] = {1, 2, 3, 7};
    for (int which = DENSE; which < PATTERNS; which++) {
        fixture *f[4];
        for (int n = 0; n < 4; n++) {
            CASE("pattern %d threads %d", which, counts[n]);
            f[n] = new_fixture(large((pattern)which));
            CHECK(cmb_set_num_threads(counts[n], NULL) == CMB_OK);
            for (int again = 0; again < (n ? 2 : 1); again++) {
                forward(f[n]);
                backward(f[n]);
                check_same_results(f[0], f[n]);
            }
        }
        for (int n = 0; n < 4; n++)
            free_fixture(f[n]);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

/* The plan becomes one whose queries open two regions each. */
static void open_regions(fixture *f) {
    const cmb_plan *base = f->plan;
    cmb_plan *selected = NULL;
    cmb_error error;
    int64_t *region = calloc((size_t)base->L * 2, sizeof *region);
    CHECK(region);
    for (int64_t i = 0; i < base->L; i++) {
        region[2 * i] = i % base->R;
        region[2 * i + 1] = 3 * i % base->R;
    }
    CHECK(cmb_plan_selected(base, &(cmb_selection){1, 2, region, true, true}, NULL, &selected, &error) == CMB_OK, "%s",
          error.message);
    CHECK(selected->traits.has_heads_tiles);
    cmb_plan_free(f->plan);
    f->plan = selected;
    free(region);
}

/* Six query heads of each key head are the lanes of the tiles of opened positions, for any threads, layout and terms.
 */
static void heads_as_lanes(void) {
    static const int counts[] = {1, 2, 3, 7};
    for (int options = 0; options < 6; options++) {
        fixture *f[4];
        for (int n = 0; n < 4; n++) {
            request asked = large(options % 2 ? LOGSPARSE : FIXED);
            asked.Hk = 1 + options % 3; /* several threads share the last key head, or each has its own */
            asked.Hq = 6 * asked.Hk;
            asked.options.is_causal = true;
            asked.L = 150;
            asked.span = 20;
            asked.given_key = options == 2 ? asked.Hk : 0;
            asked.masked = options == 3;
            asked.softcap = asked.sink = options > 3;
            asked.key_bias = asked.region_bias = options > 3 ? asked.Hk : 0;
            asked.positions_first = n == 2;
            CASE("options %d threads %d", options, counts[n]);
            f[n] = new_fixture(asked);
            open_regions(f[n]);
            CHECK(cmb_set_num_threads(counts[n], NULL) == CMB_OK);
            forward(f[n]);
            backward(f[n]);
            check_same_results(f[0], f[n]);
        }
        for (int n = 0; n < 4; n++)
            free_fixture(f[n]);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

/* Long enough for two threads to run fused waves; seven threads run wave by wave. */
static void fused_waves(void) {
    static const int counts[] = {1, 2, 7};
    for (int which = FIXED; which <= TREE; which++) {
        request asked = large((pattern)which);
        asked.L = which == FIXED ? 1100 : 2600; /* a task has 256 positions */
        asked.D = asked.Dv = 8;
        asked.options.pooling = which == FIXED ? CMB_POOL_MAX : CMB_POOL_FIRST;
        fixture *f[3];
        for (int n = 0; n < 3; n++) {
            CASE("pattern %d threads %d", which, counts[n]);
            f[n] = new_fixture(asked);
            CHECK(f[n]->plan->traits.is_fusible);
            CHECK(cmb_set_num_threads(counts[n], NULL) == CMB_OK);
            forward(f[n]);
            backward(f[n]);
            check_same_results(f[0], f[n]);
        }
        for (int n = 0; n < 3; n++)
            free_fixture(f[n]);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

/* k_R that one task alone uses lie in its worker's scratch; so do h_R, if the caller does not ask for them. Gradients
 * of the summaries, zeros here, keep all of them in tables. The bits are the same. */
static void regions_in_scratch(void) {
    static const cmb_pooling pooling[] = {CMB_POOL_MAX, CMB_POOL_MEAN};
    for (int options = 0; options < 8; options++) {
        request asked = large(options % 2 ? HIERARCHICAL : LOGSPARSE);
        asked.L = 700;
        asked.D = asked.Dv = 8;
        asked.options.pooling = pooling[options / 2 % 2];
        asked.masked = options / 4;
        asked.key_bias = options / 4 ? asked.Hk : 0;
        CASE("options %d", options);
        fixture *scratch = new_fixture(asked), *tables = new_staged_fixture(asked);
        CHECK(scratch->plan->traits.own_keys > 0);
        const cmb_array *zero[] = {&tables->gradients.summary_key, &tables->gradients.summary_value};
        for (int n = 0; n < 2; n++)
            for (int64_t b = 0; b < asked.B; b++)
                for (int64_t h = 0; h < zero[n]->heads; h++)
                    for (int64_t r = 0; r < tables->plan->R; r++)
                        for (int64_t d = 0; d < asked.D; d++)
                            put(tables, zero[n], b, h, r, d, 0);
        CHECK(cmb_set_num_threads(1, NULL) == CMB_OK);
        forward(tables);
        backward(tables);
        forward(scratch);
        backward(scratch);
        check_same_results(tables, scratch);
        const cmb_array value = scratch->problem.summary_value;
        size_t kept, not_kept;
        CHECK(cmb_workspace_bytes(&scratch->problem, false, &kept, NULL) == CMB_OK);
        scratch->problem.summary_value.data = NULL;
        CHECK(cmb_workspace_bytes(&scratch->problem, false, &not_kept, NULL) == CMB_OK);
        const size_t tables_of_values = (size_t)(asked.B * asked.Hq * scratch->plan->R * asked.Dv) * scratch->size;
        CHECK(not_kept < kept + tables_of_values, "%zu and %zu: %s", not_kept, kept, context);
        forward(scratch);
        scratch->problem.summary_value = value;
        check_same_forward(tables, scratch);
        free_fixture(scratch);
        free_fixture(tables);
    }
    CHECK(cmb_set_num_threads(0, NULL) == CMB_OK);
}

static void instruction_sets(void) {
    for (int which = DENSE; which < PATTERNS; which++)
        for (int dtype = 0; dtype < 2; dtype++) {
            fixture *known = NULL; /* the results of the lowest instruction set with FMA */
            for (int isa = cmb_isa_count() > 1; isa < cmb_isa_count(); isa++) {
                request asked = large((pattern)which);
                asked.dtype = (cmb_dtype)dtype;
                asked.masked = dtype;
                CHECK(cmb_set_isa(cmb_isa_name(isa), NULL) == CMB_OK);
                CASE("pattern %d isa %s", which, cmb_get_isa());
                fixture *f = new_fixture(asked);
                forward(f);
                backward(f);
                if (known)
                    check_same_results(known, f);
                else
                    known = f;
                if (f != known)
                    free_fixture(f);
            }
            free_fixture(known);
        }
}

/* An allocator that changes the instruction set in force, and finds writes behind the end of a block. */
typedef struct {
    const char *isa;
    size_t bytes;
    bool overrun;
} switching_heap;

enum { FENCE = 1 << 20 };

static void *allocate_and_switch(size_t bytes, void *state) {
    switching_heap *heap = state;
    CHECK(cmb_set_isa(heap->isa, NULL) == CMB_OK);
    void *block = cmb_aligned_malloc(64, bytes + FENCE);
    CHECK(block);
    memset((char *)block + bytes, 0x5a, FENCE);
    heap->bytes = bytes;
    return block;
}

static void release_and_look(void *block, void *state) {
    switching_heap *heap = state;
    for (int n = 0; n < FENCE; n++)
        heap->overrun |= ((const char *)block)[heap->bytes + (size_t)n] != 0x5a;
    cmb_aligned_free(block);
}

/* A call measures, takes and computes for one instruction set, whatever is set meanwhile. */
static void isa_changes_during_a_call(void) {
    const char *isa = cmb_get_isa();
    request asked = large(LOGSPARSE);
    CHECK(cmb_set_num_threads(16, NULL) == CMB_OK);
    for (int first = 0; first < cmb_isa_count(); first++)
        for (int then = 0; then < cmb_isa_count(); then++) {
            fixture *f = new_fixture(asked), *g = new_fixture(asked);
            switching_heap heap = {.isa = cmb_isa_name(then)};
            CASE("isa %s, then %s", cmb_isa_name(first), cmb_isa_name(then));
            f->problem.dtype = g->problem.dtype = CMB_BFLOAT16; /* the numbers are the halves of the floats */
            CHECK(cmb_set_isa(cmb_isa_name(first), NULL) == CMB_OK);
            forward(f);
            backward(f);
            const cmb_allocator allocator = {allocate_and_switch, release_and_look, &heap};
            cmb_set_allocator(&allocator);
            forward(g);
            CHECK(strcmp(cmb_get_isa(), heap.isa) == 0 && cmb_set_isa(cmb_isa_name(first), NULL) == CMB_OK);
            backward(g);
            cmb_set_allocator(NULL);
            CHECK(!heap.overrun, "%s", context);
            for (int n = 0; n < f->blocks; n++)
                CHECK(memcmp(f->block[n].memory, g->block[n].memory, f->block[n].bytes) == 0, "array %d: %s", n,
                      context);
            free_fixture(f);
            free_fixture(g);
        }
    CHECK(cmb_set_isa(isa, NULL) == CMB_OK && cmb_set_num_threads(0, NULL) == CMB_OK);
}

/* The size of a worker's scratch depends on the instruction set that is asked for, not on the one in force. Products of
 * pairs take more. */
static void scratch_of_an_isa(void) {
    const char *before = cmb_get_isa();
    size_t bytes[2];
    for (int n = 0; n < 2; n++) {
        const cmb_isa asked = n ? (cmb_isa)(CMB_ISA_COUNT - 1) : CMB_ISA_BASE;
        for (int isa = 0; isa < cmb_isa_count(); isa++) {
            cmb_arena arena = {0};
            CHECK(cmb_set_isa(cmb_isa_name(isa), NULL) == CMB_OK);
            const cmb_scratch_use use = {asked, 64, 64, 3, 2, 4, 5, 6, true, false, false, true};
            cmb_stages_bf16()->scratch(&arena, &use, NULL, 0);
            CHECK(isa == 0 || arena.used == bytes[n]);
            bytes[n] = arena.used;
        }
    }
#ifdef __x86_64__
    CHECK(bytes[1] > bytes[0]);
#endif
    CHECK(cmb_set_isa(before, NULL) == CMB_OK);
}

/* A batch entry, a head and a causal prefix alone have the bits that they have among others. Another scale has other
 * bits. */
static void company(void) {
    for (int which = DENSE; which < PATTERNS; which++) {
        request asked = large((pattern)which);
        CASE("company in pattern %d", which);
        fixture *all = new_fixture(asked);
        asked.L = 70;
        fixture *prefix = new_fixture(asked);
        asked.L = all->asked.L;
        asked.B = asked.Hq = asked.Hk = 1;
        fixture *one = new_fixture(asked);
        /* the last batch entry's last head */
        one->problem.query.data = element(all, &all->problem.query, 1, 3, 0, 0);
        one->problem.key.data = element(all, &all->problem.key, 1, 1, 0, 0);
        one->problem.value.data = element(all, &all->problem.value, 1, 1, 0, 0);
        const cmb_array *from[] = {&all->problem.query, &all->problem.key, &all->problem.value};
        cmb_array *to[] = {&prefix->problem.query, &prefix->problem.key, &prefix->problem.value};
        for (int n = 0; n < 3; n++)
            *to[n] = *from[n];
        forward(all);
        forward(one);
        forward(prefix);
        for (int64_t x = 0; x < asked.L; x++)
            CHECK(memcmp(element(all, &all->problem.out, 1, 3, x, 0), element(one, &one->problem.out, 0, 0, x, 0),
                         (size_t)asked.Dv * all->size) == 0,
                  "row %lld: %s", (long long)x, context);
        check_same(prefix, &prefix->problem.out, all, &all->problem.out, 70, asked.Dv, "out");
        check_same(prefix, &prefix->problem.lse, all, &all->problem.lse, 70, 1, "lse");
        one->problem.scale *= 1.0001;
        forward(one);
        CHECK(memcmp(element(all, &all->problem.out, 1, 3, asked.L - 1, 0),
                     element(one, &one->problem.out, 0, 0, asked.L - 1, 0), (size_t)asked.Dv * all->size) != 0,
              "%s", context);
        free_fixture(all);
        free_fixture(prefix);
        free_fixture(one);
    }
}

/* A packed sequence has the bits of a call of its own, whose arrays begin where the sequence begins. */
static void packed(void) {
    enum { AT = 35 };
    request asked = small;
    asked.pattern = FIXED;
    asked.span = 7;
    asked.L = 91; /* 13 regions: 5 and 8 */
    for (int kind = 0; kind < 4; kind++) {
        asked.dtype = kind & 1 ? CMB_FLOAT64 : CMB_FLOAT32;
        asked.masked = kind & 2;
        asked.given_key = kind == 3 ? asked.Hk : 0;
        asked.options.is_causal = kind > 0;
        fixture *whole = new_fixture(asked), *parts = new_fixture(asked);
        CASE("packed %d", kind);
        request one = asked, two = asked;
        one.L = AT;
        two.L = asked.L - AT;
        cmb_plan *plan[] = {new_plan(&one), new_plan(&two)};
        const int64_t segment[] = {0, AT, asked.L};
        whole->problem.segments = 2;
        whole->problem.segment = segment;
        whole->problem.plan = (const cmb_plan *const *)plan;
        whole->problem.plans = 2;
        parts->problem.dropout_p = whole->problem.dropout_p = kind ? 0.25 : 0;
        forward(whole);
        backward(whole);
        for (int s = 0; s < 2; s++) {
            cmb_problem p = parts->problem;
            cmb_gradients g = parts->gradients;
            const int64_t at = segment[s], region = s ? plan[0]->R : 0;
            cmb_array *const of_positions[] = {&p.query, &p.key, &p.value, &p.out, &p.lse,  &p.softmax,
                                               &g.out,   &g.lse, &g.query, &g.key, &g.value};
            cmb_array *const of_regions[] = {&p.region_key, &p.summary_value, &p.summary_lse, &p.summary_softmax,
                                             &g.region_key};
            for (size_t n = 0; n < sizeof of_positions / sizeof *of_positions; n++)
                of_positions[n]->data = element(parts, of_positions[n], 0, 0, at, 0);
            for (size_t n = 0; n < sizeof of_regions / sizeof *of_regions; n++)
                if (of_regions[n]->data)
                    of_regions[n]->data = element(parts, of_regions[n], 0, 0, region, 0);
            p.L = segment[s + 1] - at;
            p.plan = (const cmb_plan *const *)&plan[s];
            p.key_mask = p.key_mask ? p.key_mask + at : NULL;
            cmb_error error = {0};
            CHECK(cmb_forward(&p, NULL, &error) == CMB_OK, "%s", error.message);
            CHECK(cmb_backward(&p, &g, NULL, &error) == CMB_OK, "%s", error.message);
        }
        check_same_results(whole, parts);
        cmb_plan_free(plan[0]);
        cmb_plan_free(plan[1]);
        free_fixture(whole);
        free_fixture(parts);
    }
}

/* Gradients of the summaries and of lse that are absent stand for zeros. */
static void absent_gradients(void) {
    request asked = small;
    fixture *f = new_staged_fixture(asked), *g = new_staged_fixture(asked);
    CASE("absent gradients");
    for (int n = 0; n < 2; n++) {
        fixture *x = n ? g : f;
        x->problem.stages = CMB_SUMMARIZE;
        forward(x);
        for (int64_t r = 0; r < x->plan->R; r++) {
            for (int64_t d = 0; d < asked.D; d++)
                put(x, &x->gradients.summary_key, 0, 0, r, d, 0);
            for (int64_t d = 0; d < asked.Dv; d++)
                put(x, &x->gradients.summary_value, 0, 0, r, d, (double)r);
        }
    }
    g->gradients.summary_key.data = NULL;
    backward(f);
    backward(g);
    check_same_results(f, g);
    free_fixture(f);
    free_fixture(g);

    asked.dtype = CMB_FLOAT32;
    f = new_fixture(asked);
    g = new_fixture(asked);
    for (int64_t x = 0; x < asked.L; x++)
        put(f, &f->gradients.lse, 0, 0, x, 0, 0);
    g->gradients.lse.data = NULL;
    forward(f);
    forward(g);
    backward(f);
    backward(g);
    check_same_results(f, g);
    free_fixture(f);
    free_fixture(g);
}

/* A scale of 0 stands for 1 / sqrt(D), and a scale of -0.0 for 0. */
static void scale_left_out(void) {
    for (int dtype = 0; dtype < 2; dtype++) {
        request asked = small;
        asked.dtype = (cmb_dtype)dtype;
        fixture *f = new_fixture(asked), *g = new_fixture(asked);
        CASE("scale left out, dtype %d", dtype);
        f->problem.scale = 0;
        g->problem.scale = 1 / sqrt((double)asked.D);
        CHECK(g->problem.scale == cmb_default_scale(asked.D));
        for (int n = 0; n < 2; n++) {
            forward(n ? g : f);
            backward(n ? g : f);
        }
        check_same_results(f, g);
        f->problem.scale = -0.0;
        g->problem.scale = 1e-300; /* every logit is less than its rounding */
        for (int n = 0; n < 2; n++)
            forward(n ? g : f);
        check_same(f, &f->problem.out, g, &g->problem.out, asked.L, asked.Dv, "out");
        check_same(f, &f->problem.lse, g, &g->problem.lse, asked.L, 1, "lse");
        check_same(f, &f->problem.summary_value, g, &g->problem.summary_value, f->plan->R, asked.Dv, "summary_value");
        backward(f);
        for (int64_t i = 0; i < asked.L; i++)
            CHECK(get(f, &f->gradients.query, 0, 0, i, 0) == 0);
        free_fixture(f);
        free_fixture(g);
    }
}

/* A weight stays if u >= dropout_p: even the least probability drops a weight whose u is 0, of which this seed has one.
 */
static void dropout_of_the_least_probability(void) {
    request asked = small;
    asked.pattern = DENSE;
    asked.L = 64;
    fixture *f = new_fixture(asked), *g = new_fixture(asked);
    CASE("least dropout");
    f->problem.seed = 1692;
    f->problem.dropout_p = 1e-300;
    forward(f);
    forward(g);
    for (int64_t i = 0; i < asked.L; i++) {
        const bool same = get(f, &f->problem.out, 0, 0, i, 0) == get(g, &g->problem.out, 0, 0, i, 0);
        CHECK(same == (i != 39), "query %lld", (long long)i);
    }
    backward(f);
    backward(g);
    for (int64_t j = 0; j < asked.L; j++) {
        const double with = get(f, &f->gradients.value, 0, 0, j, 0), without = get(g, &g->gradients.value, 0, 0, j, 0);
        CHECK((with == without) == (j != 36), "key %lld", (long long)j);
    }
    free_fixture(f);
    free_fixture(g);
}

/* A call does not write to its inputs. */
static void inputs_are_kept(void) {
    for (int which = DENSE; which < PATTERNS; which++) {
        request asked = large((pattern)which);
        asked.given_query = true;
        asked.given_key = asked.Hk;
        fixture *f = new_fixture(asked), *fresh = new_fixture(asked);
        CASE("inputs of pattern %d", which);
        forward(f);
        backward(f);
        for (int i = 0; i < 7; i++) /* query, key, value, gradients of out and lse, region_query, region_key */
            CHECK(memcmp(f->block[i].memory, fresh->block[i].memory, f->block[i].bytes) == 0, "array %d: %s", i,
                  context);
        free_fixture(f);
        free_fixture(fresh);
    }
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(layouts),
        TEST(gaps_are_kept),
        TEST(broadcast_inputs),
        TEST(half_dtypes),
        TEST(threads),
        TEST(heads_as_lanes),
        TEST(fused_waves),
        TEST(regions_in_scratch),
        TEST(instruction_sets),
        TEST(isa_changes_during_a_call),
        TEST(scratch_of_an_isa),
        TEST(company),
        TEST(packed),
        TEST(absent_gradients),
        TEST(scale_left_out),
        TEST(dropout_of_the_least_probability),
        TEST(inputs_are_kept),
    };
    return test_main(argc, argv, tests, sizeof tests / sizeof *tests);
}

// SPDX-License-Identifier: Apache-2.0
/* What a decoder keeps of a sequence: the levels of its pattern, and tables of rows that grow. decoder.h has a picture.
 */
#include "decode/decoder.h"
#include "plan/read.h"
#include "runtime/arena.h"
#include "runtime/memory.h"

#include <string.h>

static const int64_t longest_sequence = INT64_C(1) << 30;

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- levels ------------------------------------------------------------------------------------- */

/* Levels of nodes of branching, branching^2, .. positions: `levels` of them, or as many as any length needs. */
static void add_levels(cmb_decoder *d, int64_t branching, int64_t levels) {
    while (d->levels < CMB_MAX_LEVELS - 1 && d->size[d->levels - 1] <= longest_sequence / branching &&
           (levels == 0 || d->levels <= levels)) {
        d->size[d->levels] = d->size[d->levels - 1] * branching;
        d->levels++;
    }
}

void cmb_find_levels(cmb_decoder *d) {
    const cmb_pattern *pattern = &d->options.pattern;
    d->levels = 1;
    d->size[0] = 1;
    d->lag = 1;
    d->made = pattern->sparse ? CMB_COPIES : CMB_SUMMARIES;
    if (pattern->kind == CMB_LOGSPARSE)
        add_levels(d, 2, 0);
    else if (pattern->kind == CMB_TREE) {
        add_levels(d, pattern->size, pattern->sparse ? 1 : pattern->levels);
        d->made = pattern->sparse ? CMB_NO_REGIONS : CMB_SUMMARIES;
    } else if (pattern->kind == CMB_FIXED) {
        d->lag = cmb_min(pattern->window, longest_sequence);
        d->size[d->levels++] = cmb_min(pattern->size, longest_sequence);
    } else if (pattern->kind == CMB_HEAVILY_COMPRESSED && !pattern->sparse) {
        d->lag = 0;
        d->size[d->levels++] = cmb_min(pattern->size, longest_sequence);
    } else if (pattern->kind == CMB_AXIAL && !pattern->sparse) {
        d->lag = 0;
        d->size[d->levels++] = 1;
    } else
        d->made = CMB_NO_REGIONS;
}

int64_t cmb_nodes(const cmb_decoder *d, int level, int64_t length) {
    const cmb_pattern *pattern = &d->options.pattern;
    const bool is_of_positions = level == 0 || level == CMB_QUERIES;
    if (!is_of_positions && pattern->kind == CMB_AXIAL && pattern->order != CMB_AXIAL_VERTICAL)
        return length / pattern->size * pattern->size; /* those of complete rows */
    return is_of_positions ? length : cmb_complete(length, d->size[level], d->lag);
}

/* Whether queries attend nodes of a level in their column, which are then kept for good. */
static bool is_attended_in_columns(const cmb_pattern *pattern, int level) {
    if (level == 0)
        return pattern->sparse || pattern->order != CMB_AXIAL_ROWMAJOR;
    const bool is_empty = pattern->order == CMB_AXIAL_HORIZONTAL && pattern->size == 1; /* a row without its column */
    return level == 1 && pattern->order != CMB_AXIAL_VERTICAL && !is_empty;
}

/* The first node of a level that queries from position `length` on attend, or that regions are made of for them. */
static int64_t first_needed(const cmb_decoder *d, int level, int64_t length) {
    const cmb_pattern *pattern = &d->options.pattern;
    if (level == 0 && d->options.select > 0) /* any position may be opened */
        return 0;
    if (pattern->kind == CMB_AXIAL) { /* all, or those from the own row on; regions, from the row before */
        const int64_t rows = length / pattern->size;
        return is_attended_in_columns(pattern, level) ? 0 : most(0, rows - (level == 1)) * pattern->size;
    }
    level = level == CMB_QUERIES ? 0 : level;
    const int64_t window = pattern->kind == CMB_WINDOW ? pattern->size : pattern->window;
    const int64_t nearest = most(0, length - cmb_min(window, longest_sequence) + 1);
    if (level == 0 && d->levels == 1 && (pattern->kind == CMB_WINDOW || pattern->kind == CMB_HEAVILY_COMPRESSED))
        return nearest;
    if (level == 0 && pattern->kind == CMB_HEAVILY_COMPRESSED)
        return cmb_min(nearest, cmb_nodes(d, 1, length) * d->size[1]);
    const bool summarizes_positions = pattern->kind == CMB_LOGSPARSE && !pattern->hierarchical && !pattern->sparse;
    if (level + 1 >= d->levels || (level == 0 && summarizes_positions))
        return 0;
    return cmb_nodes(d, level + 1, length) * (d->size[level + 1] / d->size[level]);
}

/* The same where `rollback` positions may be forgotten. */
static int64_t first_kept(const cmb_decoder *d, const cmb_sequence *s, int level) {
    return first_needed(d, level, most(0, s->longest - d->options.rollback));
}

/* Levels whose nodes are rows. */
static int stored_levels(const cmb_decoder *d) { return d->made == CMB_NO_REGIONS ? 1 : d->levels; }

/* The tables of a sequence, and the levels whose rows each has. */
enum { POSITIONS, REGIONS, QUERIES, MAX_TABLES };

static int count_tables(const cmb_decoder *d) { return cmb_has_queries_apart(d) ? MAX_TABLES : QUERIES; }

static cmb_table *table_of(cmb_sequence *s, int which) {
    return which == POSITIONS ? &s->positions : which == REGIONS ? &s->regions : &s->queries;
}

static int first_level(int which) { return which == QUERIES ? CMB_QUERIES : which; }

static int end_level(const cmb_decoder *d, int which) {
    return which == REGIONS ? stored_levels(d) : first_level(which) + 1;
}

/* ---- tables ------------------------------------------------------------------------------------- */

/* Key heads, or query heads: how many heads the rows of regions have. */
static int64_t region_heads(const cmb_decoder *d) { return d->made == CMB_SUMMARIES ? d->options.Hq : d->options.Hk; }

enum { QUERY, KEY, VALUE, BIAS, COUNT, ARRAYS };

/* Heads, and the bytes of a row, of each array of a table. */
typedef struct {
    int64_t heads[ARRAYS];
    size_t row[ARRAYS];
} table_shape;

static table_shape shape_of(const cmb_decoder *d, int which) {
    const cmb_decoder_options *o = &d->options;
    const bool summaries = d->made == CMB_SUMMARIES, is_regions = which == REGIONS;
    const bool has_queries = summaries && (is_regions ? !cmb_drops_region_queries(d) : !cmb_has_queries_apart(d));
    if (which == QUERIES)
        return (table_shape){.heads = {o->Hq}, .row = {(size_t)o->D * d->stage->stored_size}};
    const size_t size = is_regions ? d->stage->size : d->stage->stored_size;
    const int64_t heads = is_regions ? region_heads(d) : o->Hk;
    const int64_t biases = is_regions && o->key_bias_heads ? most(o->key_bias_heads, heads) : o->key_bias_heads;
    return (table_shape){
        .heads = {has_queries ? o->Hq : 0, heads, heads, biases, is_regions && summaries ? heads : 0},
        .row = {(size_t)o->D * size, (size_t)o->D * size, (size_t)o->Dv * size, d->stage->size, sizeof(int32_t)},
    };
}

static void lay_out(const table_shape *shape, int64_t rows, cmb_arena *arena, cmb_table *table) {
    void *array[ARRAYS] = {NULL};
    for (int n = 0; n < ARRAYS; n++) {
        size_t count;
        if (!cmb_multiply((size_t)shape->heads[n], (size_t)rows, &count))
            arena->overflow = true;
        else
            array[n] = cmb_take(arena, count, shape->row[n]);
    }
    if (arena->base)
        *table = (cmb_table){arena->base, array[QUERY], array[KEY], array[VALUE], array[BIAS], array[COUNT], rows, 0};
}

static cmb_status make_table(const cmb_decoder *d, int which, int64_t rows, cmb_table *table, cmb_error *error) {
    const table_shape shape = shape_of(d, which);
    cmb_arena arena = {0};
    lay_out(&shape, rows, &arena, table);
    TRY(cmb_arena_allocate(&arena, error));
    lay_out(&shape, rows, &arena, table);
    table->bytes = arena.used;
    return CMB_OK;
}

/* Moves n rows of every head, within a table or to another one. */
static void move_rows(const cmb_decoder *d, int which, const cmb_table *from, int64_t from_row, cmb_table *to,
                      int64_t to_row, int64_t n) {
    const table_shape shape = shape_of(d, which);
    char *const source[] = {from->query, from->key, from->value, from->bias, (char *)from->count};
    char *const target[] = {to->query, to->key, to->value, to->bias, (char *)to->count};
    for (int k = 0; k < ARRAYS; k++)
        for (int64_t h = 0; h < shape.heads[k] && n > 0; h++)
            memmove(target[k] + (size_t)(h * to->rows + to_row) * shape.row[k],
                    source[k] + (size_t)(h * from->rows + from_row) * shape.row[k], (size_t)n * shape.row[k]);
}

/* Copies a row of stored elements to a row of elements that the stages compute with. */
static void copy_row(const cmb_decoder *d, const char *from, size_t bytes, char *to, const cmb_scratch *scratch) {
    const int64_t dim = (int64_t)(bytes / d->stage->size);
    if (d->stage->stored_size < d->stage->size)
        d->stage->widen(1, dim, (cmb_rows){.data = (void *)(uintptr_t)from}, (cmb_rows){.data = to}, scratch);
    else
        memcpy(to, from, bytes);
}

void cmb_copy_regions(const cmb_decoder *d, const cmb_sequence *s, int64_t n, int64_t key_head,
                      const cmb_scratch *scratch) {
    const table_shape from = shape_of(d, POSITIONS), to = shape_of(d, REGIONS);
    const int64_t biases = d->options.key_bias_heads / d->options.Hk;
    for (int t = 1; t < d->levels; t++)
        for (int64_t x = cmb_nodes(d, t, s->length); x < cmb_nodes(d, t, s->length + n); x++) {
            const int64_t last = (x + 1) * d->size[t] - 1 - s->level[0].first;
            const int64_t row = s->level[t].row + x - s->level[t].first;
            const int64_t position = key_head * s->positions.rows + last, region = key_head * s->regions.rows + row;
            copy_row(d, (char *)s->positions.key + (size_t)position * from.row[KEY], to.row[KEY],
                     (char *)s->regions.key + (size_t)region * to.row[KEY], scratch);
            copy_row(d, (char *)s->positions.value + (size_t)position * from.row[VALUE], to.row[VALUE],
                     (char *)s->regions.value + (size_t)region * to.row[VALUE], scratch);
            for (int64_t h = key_head * biases; h < (key_head + 1) * biases; h++)
                memcpy((char *)s->regions.bias + (size_t)(h * s->regions.rows + row) * to.row[BIAS],
                       (char *)s->positions.bias + (size_t)(h * s->positions.rows + last) * from.row[BIAS],
                       to.row[BIAS]);
        }
}

/* ---- room --------------------------------------------------------------------------------------- */

enum { LEAST_ROOM = 16 }; /* positions */

/* Room for `needed` nodes, half as many again, and a whole family of small nodes from the beginning. */
static int64_t room_for(const cmb_decoder *d, int level, int64_t needed) {
    if (needed == 0)
        return 0;
    const int64_t family = level && level + 1 < d->levels ? d->size[level + 1] / d->size[level] + 2 : LEAST_ROOM;
    return most(needed + needed / 2 + 1, cmb_min(family, LEAST_ROOM));
}

/* The levels of a table, with `end` nodes in each to come, and the rows that they take; false where all have room and
 * nothing moves. */
typedef struct {
    cmb_level level[CMB_LEVELS];
    int64_t rows;
    bool moves, grows;
} table_layout;

static table_layout plan_layout(const cmb_decoder *d, const cmb_sequence *s, int which, int64_t length, bool shrinks) {
    table_layout to = {0};
    for (int t = first_level(which); t < end_level(d, which); t++) {
        const cmb_level *own = &s->level[t];
        const int64_t first = most(own->first, first_kept(d, s, t)), nodes = cmb_nodes(d, t, length);
        to.level[t] = *own;
        if (nodes - own->first > own->room || shrinks) {
            to.moves = true;
            to.level[t].first = first;
        }
        if (nodes - first > own->room || shrinks) {
            to.grows = true;
            to.level[t].room = room_for(d, t, nodes - first);
        }
        to.level[t].row = to.rows;
        to.rows += to.level[t].room;
    }
    return to;
}

/* Moves the rows of a layout to `to`, or within their own table where nothing grows. */
static void move_levels(const cmb_decoder *d, cmb_sequence *s, int which, const table_layout *layout, cmb_table *to) {
    cmb_table *own = table_of(s, which);
    for (int t = first_level(which); t < end_level(d, which); t++) {
        const cmb_level *from = &s->level[t], *after = &layout->level[t];
        const int64_t gone = after->first - from->first, kept = cmb_nodes(d, t, s->length) - after->first;
        if (layout->grows || gone)
            move_rows(d, which, own, from->row + gone, to, after->row, kept);
        s->level[t] = *after;
    }
    if (to != own) {
        cmb_release(own->block);
        *own = *to;
    }
}

cmb_status cmb_make_room(const cmb_decoder *d, cmb_sequence *s, int64_t n, cmb_error *error) {
    table_layout layouts[MAX_TABLES];
    cmb_table grown[MAX_TABLES] = {{0}};
    for (int which = 0; which < count_tables(d); which++) {
        layouts[which] = plan_layout(d, s, which, s->length + n, false);
        const cmb_status status =
            layouts[which].grows ? make_table(d, which, layouts[which].rows, &grown[which], error) : CMB_OK;
        if (status) {
            while (which-- > 0)
                cmb_release(grown[which].block);
            return status;
        }
    }
    for (int which = 0; which < count_tables(d); which++)
        if (layouts[which].moves)
            move_levels(d, s, which, &layouts[which], layouts[which].grows ? &grown[which] : table_of(s, which));
    return CMB_OK;
}

/* The nodes of a level that are kept at any later time, at most; those that are kept now where that has no bound. */
static int64_t most_kept(const cmb_decoder *d, const cmb_sequence *s, int level) {
    const cmb_pattern *pattern = &d->options.pattern;
    const int64_t now = cmb_nodes(d, level, s->length) - first_kept(d, s, level);
    if (level == 0 && d->options.select > 0)
        return now;
    if (pattern->kind == CMB_AXIAL)
        return is_attended_in_columns(pattern, level)
                   ? now
                   : most(now, 2 * cmb_min(pattern->size, s->length) + d->options.rollback);
    level = level == CMB_QUERIES ? 0 : level;
    if (level == 0 && (pattern->kind == CMB_WINDOW || pattern->kind == CMB_HEAVILY_COMPRESSED))
        return cmb_min(pattern->kind == CMB_WINDOW ? pattern->size : most(pattern->size, pattern->window),
                       longest_sequence) +
               d->options.rollback;
    if (level + 1 >= d->levels)
        return now;
    return most(now, (d->size[level + 1] + d->lag + d->options.rollback) / d->size[level]);
}

void cmb_give_back_room(const cmb_decoder *d, cmb_sequence *s) {
    enum { SLACK = 4, FEW = 64 };
    for (int which = 0; which < count_tables(d); which++) {
        int64_t room = 0, needed = 0;
        for (int t = first_level(which); t < end_level(d, which); t++) {
            room += s->level[t].room;
            needed += s->level[t].room ? most_kept(d, s, t) : 0;
        }
        if (room <= SLACK * needed + FEW)
            continue;
        cmb_table smaller;
        const table_layout layout = plan_layout(d, s, which, s->length, true);
        if (!make_table(d, which, layout.rows, &smaller, NULL))
            move_levels(d, s, which, &layout, &smaller);
    }
}

cmb_status cmb_copy_sequence(const cmb_decoder *d, const cmb_sequence *from, cmb_sequence *to, cmb_error *error) {
    cmb_sequence own = *from;
    *to = *from;
    to->positions = to->regions = to->queries = (cmb_table){0};
    for (int which = 0; which < count_tables(d); which++) {
        const cmb_table *source = table_of(&own, which);
        cmb_table *target = table_of(to, which);
        if (!source->block)
            continue;
        const cmb_status status = make_table(d, which, source->rows, target, error);
        if (status) {
            cmb_release_sequence(to);
            return status;
        }
        for (int t = first_level(which); t < end_level(d, which); t++)
            move_rows(d, which, source, from->level[t].row, target, from->level[t].row,
                      cmb_nodes(d, t, from->length) - from->level[t].first);
    }
    return CMB_OK;
}

void cmb_release_sequence(cmb_sequence *s) {
    for (int which = 0; which < MAX_TABLES; which++)
        cmb_release(table_of(s, which)->block);
    *s = (cmb_sequence){0};
}

/* ---- the plan of a step ------------------------------------------------------------------------- */

static cmb_status build_plan(const cmb_pattern *pattern, int64_t L, const cmb_plan_options *options, cmb_plan **plan,
                             cmb_error *error) {
    switch (pattern->kind) {
    case CMB_DENSE:
        return cmb_plan_dense(L, options, plan, error);
    case CMB_FIXED:
        return cmb_plan_fixed(L, pattern->size, pattern->window, options, plan, error);
    case CMB_LOGSPARSE:
        return cmb_plan_logsparse(L, pattern->hierarchical, options, plan, error);
    case CMB_TREE:
        return cmb_plan_tree(L, pattern->size, pattern->levels, options, plan, error);
    case CMB_HEAVILY_COMPRESSED:
        return cmb_plan_heavily_compressed(L, pattern->size, pattern->window, options, plan, error);
    case CMB_AXIAL:
        return cmb_plan_axial(L, pattern->size, pattern->order, pattern->weighted, options, plan, error);
    default:
        return cmb_plan_window(L, pattern->size, options, plan, error);
    }
}

cmb_status cmb_plan_step(const cmb_decoder *d, const cmb_sequence *s, int64_t n, int lanes,
                         const cmb_interrupt *interrupt, cmb_plan **plan, cmb_error *error) {
    const cmb_pattern *pattern = &d->options.pattern;
    const int64_t length = s->length + n, rows = length - s->level[0].first;
    cmb_past past = {
        .length = s->length,
        .levels = stored_levels(d),
        .positions = most(rows, rows - 1 + lanes), /* the lanes of one query are rows of queries and results */
        .regions = s->regions.rows,
        .copies = d->made == CMB_COPIES,
        .lanes = lanes,
    };
    for (int t = 0; t < past.levels; t++) {
        past.size[t] = d->size[t];
        past.kept[t] = (cmb_kept){s->level[t].first, cmb_nodes(d, t, length), s->level[t].row};
    }
    const cmb_plan_options options = {
        .is_causal = true,
        .sparse = pattern->sparse,
        .size_bias = pattern->size_bias && d->made == CMB_SUMMARIES,
        .pooling = pattern->pooling,
        .interrupt = interrupt,
        .past = &past,
    };
    return build_plan(pattern, length, &options, plan, error);
}

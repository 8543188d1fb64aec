// SPDX-License-Identifier: Apache-2.0
/*
 * A decoder: what it keeps of a sequence, and how a step runs. Internal.
 *
 * A step of n positions at length L is the part of the plan of L + n positions that the plan of L positions lacks: the
 * tiles of the new queries, and the regions that they are the first to attend. The pattern's own builder makes it
 * (cmb_build.first), so that a row has the bits of attention of the whole sequence, however its positions come:
 *
 *     plan of L      | tiles of queries 0 .. L - 1 | their regions |
 *     plan of L + n  | tiles of queries 0 .. L - 1 | their regions | tiles of L .. L + n - 1 | more regions |
 *                                                                  `------------- the step ---------------'
 *
 * Of the sequence two tables are kept: rows of positions, in the caller's dtype, and rows of regions, in the type that
 * is computed with, as biases are. Each level of regions has a part of the second (plan/past.h). The rows in use lie
 * side by side:
 *
 *     positions     |  needed by no later query  |  kept  |  new in this step  |  room  |
 *     level 1       |  ..                                                               |
 *     level 2       |  ..                                                               |
 *
 * A query of the sequence is a row of the positions too, or of a third table (cmb_has_queries_apart). Axial has one
 * level of regions, with a region for each position.
 *
 * Where there is no room, rows that are still needed move to the front, or to a larger table. So a step costs its
 * tiles, and on average a copy of each row that it keeps.
 *
 *     checks.c    the arguments
 *     keep.c      the levels of a pattern; tables of rows; room for a step; its plan
 *     choose.c    the regions that queries open
 *     decoder.c   the step: its heads, on all threads
 *     life.c      a decoder is made, rolled back, copied and freed
 */
#ifndef CMB_DECODER_H
#define CMB_DECODER_H

#include "plan/past.h"
#include "tile/stages.h"

/* The rows of one kind for all heads of a sequence. */
typedef struct {
    void *block;               /* the one allocation; NULL: no rows */
    void *query, *key, *value; /* [heads][rows][D or Dv] */
    void *bias;                /* [heads][rows] of the key */
    int32_t *count;            /* [heads][rows] positions below a region */
    int64_t rows;              /* of each head */
    size_t bytes;
} cmb_table;

/* Beside the levels of nodes the queries of positions, where they have a table of their own. */
enum { CMB_QUERIES = CMB_MAX_LEVELS, CMB_LEVELS };

/* The rows of one level: nodes from `first` on, in rows [row, row + room) of the table. */
typedef struct {
    int64_t first, row, room;
} cmb_level;

typedef struct {
    int64_t length, longest;               /* positions; the most since the last reset, from which a rollback counts */
    cmb_table positions, regions, queries; /* queries: where cmb_has_queries_apart */
    cmb_level level[CMB_LEVELS];
} cmb_sequence;

/* How a pattern's regions come to be rows. */
typedef enum {
    CMB_NO_REGIONS,
    CMB_SUMMARIES, /* pooled and summarized from their members */
    CMB_COPIES,    /* sparse baselines: the key and value of the last position */
} cmb_region_rows;

struct cmb_decoder {
    cmb_decoder_options options;
    const cmb_stage_table *stage;
    double scale;
    cmb_region_rows made;
    int levels;                   /* of nodes, positions among them */
    int64_t size[CMB_MAX_LEVELS]; /* positions of a node */
    int64_t lag;                  /* as in cmb_complete */
    cmb_sequence *sequence;       /* [B] */
};

/* ---- checks.c ----------------------------------------------------------------------------------- */

cmb_status cmb_check_decoder_options(const cmb_decoder_options *options, cmb_error *error);
cmb_status cmb_check_new_positions(const cmb_decoder *decoder, const cmb_new_positions *positions, cmb_error *error);

/* ---- keep.c ------------------------------------------------------------------------------------- */

/* Fills made, levels, size and lag. */
void cmb_find_levels(cmb_decoder *decoder);

/* Makes room for n more positions and for the regions that they complete. The sequence stays what it is. */
cmb_status cmb_make_room(const cmb_decoder *decoder, cmb_sequence *sequence, int64_t n, cmb_error *error);

/* CMB_COPIES: the new regions of a key head, once its n new positions are in their table. */
void cmb_copy_regions(const cmb_decoder *decoder, const cmb_sequence *sequence, int64_t n, int64_t key_head,
                      const cmb_scratch *scratch);

/* Gives memory back after a step that needed much more than the next ones will. */
void cmb_give_back_room(const cmb_decoder *decoder, cmb_sequence *sequence);

/* A copy, of all that is kept, to `to`, which has no rows yet. */
cmb_status cmb_copy_sequence(const cmb_decoder *decoder, const cmb_sequence *from, cmb_sequence *to, cmb_error *error);
void cmb_release_sequence(cmb_sequence *sequence);

/* The nodes of a level that plans of `length` positions have summarized; of level 0, the positions. */
int64_t cmb_nodes(const cmb_decoder *decoder, int level, int64_t length);

/* Queries are kept for the regions that they are pooled into, keys and values as long as a query may attend them. Where
 * these are kept for good, because any region may be opened or columns are attended, queries have a table of their own.
 */
static inline bool cmb_has_queries_apart(const cmb_decoder *decoder) {
    const cmb_pattern *pattern = &decoder->options.pattern;
    const bool attends_columns = pattern->kind == CMB_AXIAL && pattern->order != CMB_AXIAL_ROWMAJOR;
    return decoder->options.select > 0 || (attends_columns && decoder->made == CMB_SUMMARIES);
}

/* Whether a step drops the queries of the regions that it makes. Axial's regions of a row are pooled into no other
 * region, and are as many as positions. Other patterns keep these queries for the regions that they are pooled into. */
static inline bool cmb_drops_region_queries(const cmb_decoder *decoder) {
    const cmb_pattern *pattern = &decoder->options.pattern;
    return decoder->made == CMB_SUMMARIES && pattern->kind == CMB_AXIAL && pattern->order != CMB_AXIAL_VERTICAL;
}

/* The plan of n more positions over the rows of the sequence. */
cmb_status cmb_plan_step(const cmb_decoder *decoder, const cmb_sequence *sequence, int64_t n, int lanes,
                         const cmb_interrupt *interrupt, cmb_plan **plan, cmb_error *error);

/* ---- choose.c ----------------------------------------------------------------------------------- */

/* The most that a worker's memory holds in a step. */
typedef struct {
    int64_t heads;      /* query heads of a key head */
    int64_t queries;    /* of a tile */
    int64_t k;          /* regions that a query opens */
    int32_t regions;    /* of a table */
    int32_t rows, runs; /* of a tile */
} cmb_selector_size;

/* One worker's memory of a step that selects: a query's scores, and a tile in the making. */
typedef struct {
    int64_t k;
    cmb_head *head;        /* the query heads of the key head at hand */
    int32_t *region;       /* [regions] those that the query at hand attends */
    double *score, *logit; /* [regions] of these */
    double *best;          /* [k] */
    int64_t *opened, *end; /* [k] the query's regions, and their ends */
    int32_t *chosen;       /* [queries][k] regions of the tile at hand, rows of the table of regions, and then -1 */
    cmb_run *run;          /* [runs, at least k] */
    uint64_t *mask;        /* [rows] */
} cmb_selector;

/* About how many positions a query of a sequence opens. */
int64_t cmb_opened_rows(const cmb_decoder *decoder, int64_t length);
/* Makes the size enough for a plan. */
void cmb_measure_selection(const cmb_plan *plan, cmb_selector_size *size);
void cmb_take_selector(cmb_arena *arena, const cmb_selector_size *size, cmb_selector *selector);

/* Writes to selector->chosen the regions that each query of a tile of the step's plan opens. The logits of
 * all heads of selector->head decide. `lanes` lanes are one query of several heads. */
void cmb_choose_regions(const cmb_decoder *decoder, const cmb_sequence *sequence, int32_t tile, int lanes,
                        cmb_selector *selector, cmb_scratch *scratch);
/* The tile's queries of heads [first, end) of selector->head, a multiple of `lanes`, attend its rows with those regions
 * opened. Leaves these heads without a plan: they are made anew for the next tile. */
void cmb_attend_selected(const cmb_decoder *decoder, const cmb_sequence *sequence, int64_t first, int64_t end,
                         int32_t tile, int lanes, cmb_selector *selector, cmb_scratch *scratch);

#endif

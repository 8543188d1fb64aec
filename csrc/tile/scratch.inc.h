// SPDX-License-Identifier: Apache-2.0
/* The scratch: the memory of one worker, taken once for each call. Shapes stand in brackets. */

enum { CHUNK = CMB_CHUNK_BYTES / (int)sizeof(REAL) }; /* rows that a tile takes at a time: 96 or 48 */
_Static_assert(CMB_CHUNK_ROWS % CHUNK == 0, "plans that fill a chunk");

static const REAL infinity = (REAL)INFINITY;

/* The m of a query all of whose logits are -inf or NaN. It differs from -inf, which means "nothing attended": such a
 * query ends as NaN. */
static const REAL lowest = sizeof(REAL) == 4 ? (REAL)-3.40282346638528859812e+38 : (REAL)-1.79769313486231570815e+308;

/* The caller's elements have 16 bits: a row is widened before it is computed with. A constant, so that the compiler
 * drops the branches of the other case. */
static const bool is_narrow = sizeof(STORED) < sizeof(REAL);

/* The tile that this worker takes next. Its queries, the rows that their results go to, and the rows of its last run
 * are prefetched while the products of the tile at hand run: products leave memory idle, and as a rule no earlier tile
 * has touched those rows. */
typedef struct {
    const cmb_head *head;
    cmb_list query, row;
    int32_t next, end; /* index of the next query and of the next row; nothing is left at `end` */
    int32_t each;      /* queries, and rows, of one prefetch */
} prefetch_cursor;

struct cmb_scratch {
    cmb_cancel *cancel; /* the call's */
    int worker;
    const KERNELS *kernel;
    const cmb_narrow_format *format; /* of the caller's 16-bit elements, else NULL */
    bool backward;
    cmb_item *item; /* backward, where workers share a head: the tile's place in the order of gradient sums */
    prefetch_cursor ahead;

    /* The tile at hand. */
    int width;                 /* lanes of S */
    uint64_t attending;        /* forward: the lanes that have seen a row of this tile */
    const cmb_tile *last_tile; /* the tile whose final m, l and O are in softmax_state and sum, if that tile began with
                                * nothing attended; else NULL */
    REAL *packed;              /* [D][width] Q^T */
    REAL *sum;                 /* [lanes][Dv] O; with sums of keys and of biases behind it where these are weighted */
    REAL *softmax_state;       /* [4][64] forward: m, l, alpha; backward: m, 1 / l, delta */
    const REAL **lane_query;   /* [64] */
    REAL **lane_sum;           /* [64] forward: rows of `sum`; backward: rows of dQ */

    /* The chunk at hand. */
    REAL *s;                   /* [CHUNK][width] products, then logits, then weights */
    REAL **s_row;              /* [CHUNK] */
    const REAL **key, **value; /* [CHUNK] */
    uint64_t *lanes;           /* [CHUNK] the lanes that see each row */
    uint32_t *row;             /* [CHUNK] table rows */
    REAL *drop_factor;         /* [CHUNK][width] factors of the weights under dropout */
    REAL *bias;                /* [CHUNK + 16] b of each row; NULL where logits have none */
    const REAL **bias_row;     /* [CHUNK] the elements of `bias`, as rows of one feature */
    const REAL **packed_row;   /* [max(D, Dv)] */
    REAL *compact; /* [max(CHUNK + 16, D)] the weights of one lane, without gaps or with zeros there; a row tile's
                    * query */
    const REAL **compact_row; /* [CHUNK] the rows of those weights */

    /* Backward. */
    REAL *packed_grad, *packed_key_grad;     /* [Dv][width] dO^T, [D][width] */
    REAL *dp;                                /* [CHUNK][width] dP, then dS */
    REAL **dkey, **dvalue;                   /* [CHUNK] */
    int64_t *place;                          /* [CHUNK] where each row stands in the sequence of the tile's runs */
    REAL *slope;                             /* [CHUNK][width] the derivative of softcap */
    REAL *bias_sum;                          /* [CHUNK] the gradient of each row's bias, from this tile */
    const REAL **lane_grad, **lane_key_grad; /* [64] dO, and dk_R where the tile is weighted */
    const REAL **lane_bias_grad;             /* [64] db_R where it is weighted */
    REAL *packed_bias_grad;                  /* [width] */

    /* Sums that are kept apart (rows.inc.h). */
    bool keeps_apart, keeps_positions_apart;
    int64_t apart;                              /* rows that there is room for */
    int32_t aparts;                             /* rows kept so far */
    int32_t *apart_row;                         /* [apart] */
    REAL *apart_key, *apart_value, *apart_bias; /* [apart][D], [apart][Dv], [apart] */

    /* Copies of rows: widened, padded to whole pairs, or made contiguous. */
    REAL *query_copy, *grad_copy; /* [64][D], [64][Dv] */
    REAL *key_copy, *value_copy;  /* [CHUNK][D], [CHUNK][Dv] */
    REAL *result_copy;            /* [2][Dv] */
    REAL *child_copy;             /* [children][D] */

    /* Pairs of 16-bit numbers, where the instruction set multiplies them (kernels.h). */
    REAL *pair_weight;            /* [CHUNK / 2][64] */
    REAL *pair_row, *pair_part;   /* [CHUNK / 2][max(D, Dv)] pairs of rows; those with zeros for what is not seen */
    const REAL **pair_list;       /* [CHUNK / 2] */
    REAL *pair_query, *pair_grad; /* [32][D], [32][Dv] pairs of lanes */
    const REAL **pair_queries, **pair_grads; /* [32] */

    /* Pooling. Rows L + R .. of the table are this worker's: N rows that live as long as a task. */
    int64_t N;
    REAL *pool_query, *pool_key;           /* [N][D] */
    REAL *pool_query_grad, *pool_key_grad; /* [N][D] */
    REAL *pool_bias, *pool_bias_grad;      /* [N] */
    int32_t *count, *pick;                 /* [N] */
    REAL *own_query, *own_query_grad;      /* [queries][D] the q_R that only the task at hand uses */
    REAL *own_key, *own_key_grad;          /* [keys][D] the k_R */
    REAL *own_value, *own_value_grad;      /* [keys][Dv] forward: the h_R; backward: dh_R */
    const REAL **child;                    /* [children] */
    const uint16_t **stored_child;         /* [children] */
    REAL **child_grad;                     /* [children] */
    REAL *weight;                          /* [children] */
};

static cmb_scratch *take_scratch(cmb_arena *arena, const cmb_scratch_use *use, cmb_cancel *cancel, int worker) {
    const cmb_narrow_format *format = NARROW(use->isa);
    const bool backward = use->backward;
    cmb_scratch s = {
        .cancel = cancel, .worker = worker, .format = format, .backward = backward, .N = use->N, .apart = use->apart};
    cmb_scratch *scratch = cmb_take(arena, 1, sizeof s);
    const size_t r = sizeof(REAL), p = sizeof(void *), d = (size_t)use->D, dv = (size_t)use->Dv, n = (size_t)use->N,
                 c = (size_t)use->children, queries = (size_t)use->queries, keys = (size_t)use->keys,
                 apart = (size_t)use->apart, widest = d > dv ? d : dv;
    s.packed = cmb_take(arena, d * CMB_TILE, r);
    s.sum = cmb_take(arena, CMB_TILE * (dv + d + use->biased), r);
    s.softmax_state = cmb_take(arena, 4 * CMB_TILE, r);
    s.lane_query = cmb_take(arena, CMB_TILE, p);
    s.lane_sum = cmb_take(arena, CMB_TILE, p);
    s.s = cmb_take(arena, CHUNK * CMB_TILE, r);
    s.s_row = cmb_take(arena, CHUNK, p);
    s.key = cmb_take(arena, CHUNK, p);
    s.value = cmb_take(arena, CHUNK, p);
    s.lanes = cmb_take(arena, CHUNK, sizeof(uint64_t));
    s.row = cmb_take(arena, CHUNK, sizeof(uint32_t));
    s.drop_factor = cmb_take(arena, use->dropout ? CHUNK * CMB_TILE : 0, r);
    s.bias = cmb_take(arena, use->biased ? CHUNK + CMB_GROUP : 0, r);
    s.bias_row = cmb_take(arena, use->biased ? CHUNK : 0, p);
    s.packed_row = cmb_take(arena, widest, p);
    s.compact = cmb_take(arena, d > CHUNK + CMB_GROUP ? d : CHUNK + CMB_GROUP, r);
    s.compact_row = cmb_take(arena, CHUNK, p);
    s.query_copy = cmb_take(arena, CMB_TILE * d, r);
    s.key_copy = cmb_take(arena, CHUNK * d, r);
    s.value_copy = cmb_take(arena, CHUNK * dv, r);
    s.result_copy = cmb_take(arena, 2, dv * r);
    s.child_copy = cmb_take(arena, is_narrow ? c : 0, d * r);
    s.pool_query = cmb_take(arena, n, d * r);
    s.pool_key = cmb_take(arena, n, d * r);
    s.pool_bias = cmb_take(arena, use->biased ? n : 0, r);
    s.count = cmb_take(arena, n, sizeof(int32_t));
    s.pick = cmb_take(arena, n, sizeof(int32_t));
    s.own_query = cmb_take(arena, queries, d * r);
    s.own_key = cmb_take(arena, keys, d * r);
    s.own_value = cmb_take(arena, backward ? 0 : keys, dv * r);
    s.child = cmb_take(arena, c, p);
    s.stored_child = cmb_take(arena, is_narrow ? c : 0, p);
    s.weight = cmb_take(arena, c, r);
    if (backward) {
        s.packed_grad = cmb_take(arena, dv * CMB_TILE, r);
        s.packed_key_grad = cmb_take(arena, d * CMB_TILE, r);
        s.dp = cmb_take(arena, CHUNK * CMB_TILE, r);
        s.dkey = cmb_take(arena, CHUNK, p);
        s.dvalue = cmb_take(arena, CHUNK, p);
        s.place = cmb_take(arena, CHUNK, sizeof(int64_t));
        s.slope = cmb_take(arena, use->softcap ? CHUNK * CMB_TILE : 0, r);
        s.bias_sum = cmb_take(arena, use->biased ? CHUNK : 0, r);
        s.lane_bias_grad = cmb_take(arena, use->biased ? CMB_TILE : 0, p);
        s.packed_bias_grad = cmb_take(arena, use->biased ? CMB_TILE : 0, r);
        s.pool_bias_grad = cmb_take(arena, use->biased ? n : 0, r);
        s.lane_grad = cmb_take(arena, CMB_TILE, p);
        s.lane_key_grad = cmb_take(arena, CMB_TILE, p);
        s.grad_copy = cmb_take(arena, CMB_TILE * dv, r);
        s.pool_query_grad = cmb_take(arena, n, d * r);
        s.pool_key_grad = cmb_take(arena, n, d * r);
        s.own_query_grad = cmb_take(arena, queries, d * r);
        s.own_key_grad = cmb_take(arena, keys, d * r);
        s.own_value_grad = cmb_take(arena, keys, dv * r);
        s.child_grad = cmb_take(arena, c, p);
        s.apart_row = cmb_take(arena, apart, sizeof(int32_t));
        s.apart_key = cmb_take(arena, apart, d * r);
        s.apart_value = cmb_take(arena, apart, dv * r);
        s.apart_bias = cmb_take(arena, use->biased ? apart : 0, r);
    }
    if (format && format->gemm) {
        enum { PAIRS = CHUNK / 2, LANE_PAIRS = CMB_TILE / 2 };
        s.pair_weight = cmb_take(arena, PAIRS * CMB_TILE, r);
        s.pair_row = cmb_take(arena, PAIRS * widest, r);
        s.pair_part = cmb_take(arena, PAIRS * widest, r);
        s.pair_list = cmb_take(arena, PAIRS, p);
        s.pair_query = cmb_take(arena, backward ? LANE_PAIRS * d : 0, r);
        s.pair_grad = cmb_take(arena, backward ? LANE_PAIRS * dv : 0, r);
        s.pair_queries = cmb_take(arena, LANE_PAIRS, p);
        s.pair_grads = cmb_take(arena, LANE_PAIRS, p);
    }
    if (scratch) {
        s.kernel = NAME2(cmb_kernels_for, SUFFIX)(use->isa);
        for (int i = 0; use->biased && i < CHUNK; i++)
            s.bias_row[i] = s.bias + i;
        *scratch = s;
    }
    return scratch;
}

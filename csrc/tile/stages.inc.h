// SPDX-License-Identifier: Apache-2.0
/*
 * The two stages for one dtype: pooling, and the tile, forward and backward. The including file defines
 *   FORMAT          name of the dtype: f32, f64, bf16, f16
 *   REAL, SUFFIX    type of the arithmetic and of every row of a region or of a sum: float, f32 or double, f64
 *   STORED          type of the caller's rows of positions: REAL, or uint16_t for a 16-bit format
 *   NARROW(isa)     conversions of the 16-bit format, else NULL
 *
 * A tile is up to 64 queries, its lanes, and the table rows that they attend, taken a chunk at a time. Forward:
 *
 *     query of lane    0  1  2  3  4 .. width - 1          width: 16, 32, 48 or 64
 *                    +----------------------------+
 *     packed         |  |  |  |  |  |             |        [D][width]   Q^T times scale, once for each tile
 *                    |  v  v  v  v  v             |
 *                    +----------------------------+
 *     rows
 *     of a chunk     +----------------------------+
 *     K, V row 0     |  x  x  x  x  x             |        [rows][width]   S = K Q^T, the logits; then P = e^(S - m)
 *     K, V row 1     |  .  x  x  x  x             |
 *     K, V row 2     |  .  .  x  x  x             |        x: the lane sees the row;  .: a mask bit is 0, P = 0
 *     ..             |                            |
 *     K, V row 95    +----------------------------+
 *
 *     O of lane 0    -------- Dv --------                  [lanes][Dv]   O += P^T V, after each chunk
 *     O of lane 1    --------------------
 *     ..
 *
 * A row tile has one query: S is a column, and vectors run along the features.
 *
 *   forward    S = logits, online softmax P = e^(S - m), O += (M P)^T V        M: dropout's factors, else 1
 *   backward   S = logits, dP = M (V dO^T), P = e^(S - m) / l, dS = P (dP - delta),
 *              dV += (M P) dO, dK += scale dS Q, dQ += scale dS^T K            delta = rowsum(dO * O) - dlse
 *
 * m is a query's largest logit and l its sum of e^(S - m): the state of its softmax. Backward reads both and not
 * lse = m + log l, because lse is rounded to the size of m and would move every weight by that error.
 *
 * Masks. Products skip what no lane sees: groups of 16 lanes in S, rows that 4 lanes (matrix registers: 16) do not see
 * in a sum over rows. A
 * masked weight is exactly 0. Its product with a value that is not finite would still be NaN, and would reach queries
 * that do not depend on that value. So the result of a tile (backward: of a chunk) is tested, and where it has a NaN or
 * Inf it is computed again by the exact path, which sums for each lane only the rows that the lane sees. Skipping an
 * exact zero changes no bit, so both paths agree wherever both are finite. With matrix registers a zero takes the place
 * of what is left out, so that the groups of words stay the same.
 */
#include <math.h>
#include <string.h>

#include "kernels/kernels.h"
#include "plan/read.h"
#include "runtime/status.h"
#include "tile/stages.h"

#define PASTE2(a, b) a##_##b
#define NAME2(a, b) PASTE2(a, b)
#define KERNELS NAME2(cmb_kernels, SUFFIX)

/* Each part uses only the parts above it. */
#include "tile/scratch.inc.h" /* one worker's memory */

#include "tile/rows.inc.h" /* a row: stored or computed; a gradient row: zeroed on first touch */

#include "tile/pool.inc.h" /* abstractions of regions */

#include "tile/chunk.inc.h" /* the rows that a tile takes next */

#include "tile/products.inc.h" /* matrix products of a chunk */

#include "tile/score.inc.h" /* products to logits */

#include "tile/softmax.inc.h" /* a query's softmax, from one tile to the next */

#include "tile/attend.inc.h" /* the tile */

const cmb_stage_table *NAME2(cmb_stages, FORMAT)(void) {
    static const cmb_stage_table table = {
        .size = sizeof(REAL),
        .stored_size = sizeof(STORED),
        .scratch = take_scratch,
        .pool = pool,
        .pool_own = pool_own,
        .pool_backward = pool_backward,
        .keep_apart = keep_apart,
        .add_apart = add_apart,
        .tile = tile_forward,
        .tile_backward = tile_backward,
        .begin = begin,
        .finish = finish,
        .clear_unattended = clear_unattended,
        .write_lse = write_lse,
        .region_logits = region_logits,
        .copy_region_keys = copy_region_keys,
        .copy_region_biases = copy_region_biases,
        .add_biases = add_biases,
        .begin_sink = begin_sink,
        .sum_sink = sum_sink,
        .add_up = add_up,
        .zero_row = zero_row,
        .zero_block = zero_block,
        .add = add,
        .mean = mean,
        .divide = divide,
        .widen = widen,
        .narrow = narrow,
    };
    return &table;
}

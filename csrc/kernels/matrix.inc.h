// SPDX-License-Identifier: Apache-2.0
/*
 * The gemm of pairs on AMX's matrix registers. A register holds 16 rows of 16 words. One instruction multiplies two
 * registers and adds the product to a third one:
 *
 *                       columns:  0..15   16..31   32..47   48..63
 *     16 words of b               B5      B5       B5       B5          one after the other
 *     16 rows of a      A4        C0      C1       C2       C3          a block of c
 *
 * For each element of C the instruction sums the products of the 16 low numbers, and those of the 16 high numbers. It
 * adds the two sums, and adds the total to the element. So words join c in groups of 16, and bits depend on where a
 * group begins. Groups begin at multiples of 16 words of the whole sum, of which `first` words come before word 0
 * (kernels.h). Zeros take the place of words, rows and columns that are missing.
 *
 * Every function may overwrite these registers: none that is called between matrix_begin and matrix_end may use them.
 */

/* In assembly: GCC's intrinsics for these instructions do not say which memory they read and write. */
#define MATRIX_ZERO(c) __asm__ volatile("tilezero %%tmm" #c ::: "memory")
#define MATRIX_LOAD(a, from)                                                                            \
    do {                                                                                                \
        const matrix_rows from_ = (from);                                                               \
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #a ::"r"(from_.row), "r"(from_.step) : "memory"); \
    } while (0)
#define MATRIX_STORE(c, to)                                                                             \
    do {                                                                                                \
        const matrix_rows to_ = (to);                                                                   \
        __asm__ volatile("tilestored %%tmm" #c ", (%0,%1,1)" ::"r"(to_.row), "r"(to_.step) : "memory"); \
    } while (0)
#define MATRIX_MULTIPLY_ADD(a, b, c) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

enum { SIDE = 16, BLOCKS = 4 }; /* rows, and words of a row, of a register; registers of sums */

static void matrix_begin(void) {
    static const struct { /* what LDTILECFG reads */
        uint8_t palette, first_row, reserved[14];
        uint16_t bytes_of_row[16];
        uint8_t rows[16];
    } shapes = {.palette = 1, .bytes_of_row = {64, 64, 64, 64, 64, 64}, .rows = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
}

/* After `end` the system has no matrix registers to save when it switches threads. */
static void matrix_end(void) { __asm__ volatile("tilerelease" ::: "memory"); }

/* Rows that are `step` bytes apart. */
typedef struct {
    const void *row;
    int64_t step;
} matrix_rows;

typedef int64_t addresses __attribute__((vector_size(64), aligned(8), may_alias));

/* Whether these 16 rows lie at equal distances. */
INLINE bool are_spaced_evenly(const float *const *row) {
    const addresses place = {0, 1, 2, 3, 4, 5, 6, 7}, *at = (const addresses *)row;
    const int64_t start = (int64_t)row[0], step = (int64_t)row[1] - start;
    const addresses low = at[0] ^ (start + step * place), high = at[1] ^ (start + step * (place + 8));
    return !_mm512_test_epi64_mask((__m512i)(low | high), (__m512i)(low | high));
}

INLINE matrix_rows spaced_rows(const float *const *row, int64_t column) {
    return (matrix_rows){row[0] + column, (int64_t)row[1] - (int64_t)row[0]};
}

INLINE matrix_rows copied_rows(const float *copy) { return (matrix_rows){copy, SIDE * sizeof *copy}; }

/* An operand: words [at, at + n) of each row. In place, or in `copy`. */
INLINE matrix_rows operand_of_rows(int rows, int n, const float *const *row, int64_t at, float *copy) {
    if (rows == SIDE && n == SIDE && are_spaced_evenly(row))
        return spaced_rows(row, at);
    for (int i = 0; i < SIDE; i++)
        store_f32(copy + i * SIDE, i < rows ? load_part_f32(row[i] + at, n) : (vec_f32){0});
    return copied_rows(copy);
}

/* The same where the words of a row are `step` apart. Neighbouring rows then often begin at neighbouring words. */
INLINE matrix_rows operand_of_columns(int rows, int n, const float *const *row, int64_t step, int64_t at, float *copy) {
    bool are_neighbours = true;
    for (int i = 1; i < rows; i++)
        are_neighbours &= row[i] == row[0] + i;
    vec_f32 x[SIDE];
    for (int t = 0; t < SIDE; t++) {
        float column[SIDE] = {0};
        for (int i = 0; !are_neighbours && t < n && i < rows; i++)
            memcpy(column + i, row[i] + (at + t) * step, sizeof *column);
        x[t] = t < n && are_neighbours ? load_part_f32(row[0] + (at + t) * step, rows) : load_f32(column);
    }
    transpose_f32(x);
    for (int i = 0; i < SIDE; i++)
        store_f32(copy + i * SIDE, x[i]);
    return copied_rows(copy);
}

/* Stores the first rows and columns of `sum`, a copy of a register, in c, or adds them to c. */
INLINE void add_sums(int rows, int columns, const float *sum, float *const *c, int64_t column, bool add) {
    for (int i = 0; i < rows; i++) {
        const vec_f32 x = load_f32(sum + i * SIDE);
        store_part_f32(c[i] + column, add ? load_part_f32(c[i] + column, columns) + x : x, columns);
    }
}

/* A block of c: at most 16 rows and 64 columns. */
static void matrix_block(int m, int n, int64_t k, const float *const *a, int64_t a_step, const float *const *b,
                         float *const *c, int64_t column, bool add, int64_t first) {
    _Alignas(64) float a_copy[SIDE * SIDE], b_copy[SIDE * SIDE];
#define COLUMNS(j) (n - j * SIDE < SIDE ? n - j * SIDE : SIDE)
    MATRIX_ZERO(0);
    MATRIX_ZERO(1);
    MATRIX_ZERO(2);
    MATRIX_ZERO(3);
    for (int64_t t = 0; t < k;) {
        const int64_t group = SIDE - (first + t) % SIDE;
        const int count = (int)(group < k - t ? group : k - t);
        MATRIX_LOAD(4, a_step == 1 ? operand_of_rows(m, count, a, t, a_copy)
                                   : operand_of_columns(m, count, a, a_step, t, a_copy));
#define BLOCK(j)                                                                              \
    if (n > j * SIDE) {                                                                       \
        MATRIX_LOAD(5, operand_of_rows(count, COLUMNS(j), b + t, column + j * SIDE, b_copy)); \
        MATRIX_MULTIPLY_ADD(4, 5, j);                                                         \
    }
        BLOCK(0)
        BLOCK(1)
        BLOCK(2)
        BLOCK(3)
#undef BLOCK
        t += count;
    }
    const bool in_place = !add && m == SIDE && are_spaced_evenly((const float *const *)c);
#define BLOCK(j)                                                                  \
    if (in_place && COLUMNS(j) == SIDE) {                                         \
        MATRIX_STORE(j, spaced_rows((const float *const *)c, column + j * SIDE)); \
    } else if (n > j * SIDE) {                                                    \
        MATRIX_STORE(j, copied_rows(b_copy));                                     \
        add_sums(m, COLUMNS(j), b_copy, c, column + j * SIDE, add);               \
    }
    BLOCK(0)
    BLOCK(1)
    BLOCK(2)
    BLOCK(3)
#undef BLOCK
#undef COLUMNS
}

static void matrix_gemm(int64_t m, int64_t n, int64_t k, const void *a, int64_t a_step, const void *b, const void *c,
                        int64_t column, bool add, int64_t first) {
    enum { WIDTH = BLOCKS * SIDE };
    CMB_ASSERT(m >= 0 && n >= 0 && k >= 0 && a_step >= 0 && column >= 0 && first >= 0);
    for (int64_t i = 0; i < m; i += SIDE)
        for (int64_t j = 0; j < n; j += WIDTH)
            matrix_block((int)(m - i < SIDE ? m - i : SIDE), (int)(n - j < WIDTH ? n - j : WIDTH), k,
                         (const float *const *)a + i, a_step, b, (float *const *)c + i, column + j, add, first);
}

/* Linear layers over few rows with bfloat16 weights, for CPUs without bfloat16 products: decode steps, which reading the
 * weights binds. A weight is read from memory once, widened in registers, and meets up to ROWS rows of x at a time.
 *
 * A row's sums are made in the same order whatever the other rows are. Left out: in_features that are no multiple of 2 * LANES.
 */
#include "vectors.h"

#define ROWS 4
#define PREFETCH 2048 /* weights ahead */
#define COLUMNS 3 /* 4 x 3 accumulators, 3 weights and a row of x in 16 registers */

INLINE float bf16_value(uint16_t half) {
    const uint32_t word = (uint32_t)half << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

/* y[rows, columns] of x[rows, size] (float32) and w[columns, size]. A vector of weights is read as words of two: of each
 * 2 * LANES values of x the even ones come first, then the odd ones. */
INLINE void multiply_block(const int rows, const int columns, const float *x, const uint16_t *w, const uint16_t *bias, uint16_t *y,
                           int64_t size, int64_t y_stride) {
    vf acc[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < columns; j++) acc[i][j] = splat(0);
    for (int64_t k = 0; k < size; k += 2 * LANES) {
#pragma GCC unroll 8
        for (int j = 0; j < columns; j++) __builtin_prefetch(w + j * size + k + PREFETCH);
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {
            vf weight[COLUMNS];
#pragma GCC unroll 8
            for (int j = 0; j < columns; j++) {
                const vu words = (vu)*(const vu_at *)(w + j * size + k);
                weight[j] = (vf)(part ? words & 0xffff0000u : words << 16);
            }
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                const vf value = load_f32(x + i * size + k + part * LANES);
#pragma GCC unroll 8
                for (int j = 0; j < columns; j++) acc[i][j] += value * weight[j];
            }
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            vf sum = splat(sum_lanes(acc[i][j]) + (bias ? bf16_value(bias[j]) : 0.0f));
            y[i * y_stride + j] = to_bf16(sum)[0];
        }
}

static void multiply_columns(const int columns, const float *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, int64_t rows,
                             int64_t size, int64_t y_stride) {
#define BLOCK(R, C) multiply_block(R, C, x + row * size, w, bias, y + row * y_stride, size, y_stride)
#define CASES(C) \
    switch (rows - row) { \
        case 1: BLOCK(1, C); break; \
        case 2: BLOCK(2, C); break; \
        case 3: BLOCK(3, C); break; \
        default: BLOCK(4, C); \
    }
    for (int64_t row = 0; row < rows; row += ROWS) {
        if (columns == COLUMNS) CASES(COLUMNS)
        else if (columns == 2) CASES(2)
        else CASES(1)
    }
#undef CASES
#undef BLOCK
}

/* y[rows, out_features] = x[rows, size] w[out_features, size]^T + bias, all bfloat16; bias may be NULL.
 * Returns 0, or 1 if memory ran out. */
int longctx_linear(const uint16_t *x, const uint16_t *w, const uint16_t *bias, uint16_t *y, int64_t rows, int64_t size,
                   int64_t out_features, int num_threads) {
    float *wide = malloc((size_t)(rows * size) * sizeof(float));
    if (!wide) return 1;
    for (int64_t i = 0; i < rows * size; i += 2 * LANES) {
        const vu words = (vu)*(const vu_at *)(x + i);
        store_f32(wide + i, (vf)(words << 16));
        store_f32(wide + i + LANES, (vf)(words & 0xffff0000u));
    }
    const int64_t blocks = (out_features + COLUMNS - 1) / COLUMNS;
    /* Pieces, not halves: a core that does something else for a moment must not hold up the others. */
    const int piece = (int)(blocks / (8 * num_threads) + 1);
#pragma omp parallel for schedule(dynamic, piece) num_threads(num_threads)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t column = block * COLUMNS, left = out_features - column;
        multiply_columns(left < COLUMNS ? (int)left : COLUMNS, wide, w + column * size, bias ? bias + column : NULL, y + column,
                         rows, size, out_features);
    }
    free(wide);
    return 0;
}

/* The k highest of many scores, for retrieval: one pass, in which next to all scores are only compared. */
#include "vectors.h"

#define MAX_RANKED 64

/* Out: k indices, ascending, -1 for none in front. From the last score to the first, so that of equal ones the last wins. */
INLINE void rank_row(const float *scores, int64_t size, int k, float ties, int64_t *out) {
    float best[MAX_RANKED]; /* descending */
    int64_t index[MAX_RANKED];
    for (int i = 0; i < k; i++) best[i] = -INFINITY, index[i] = -1;
    float bound = -INFINITY; /* the lowest of them: what is not above it is none of them */
    for (int64_t stop = size; stop > 0; stop -= 4 * LANES) {
        const int64_t start = stop > 4 * LANES ? stop - 4 * LANES : 0;
        float rounded[4 * LANES];
        int is_above = 0;
        for (int64_t i = 0; i < stop - start; i++) {
            rounded[i] = rintf(scores[start + i] * ties);
            is_above |= rounded[i] > bound;
        }
        if (!is_above) continue;
        for (int64_t i = stop - start - 1; i >= 0; i--) {
            if (!(rounded[i] > bound)) continue;
            int place = k - 1;
            for (; place > 0 && rounded[i] > best[place - 1]; place--) best[place] = best[place - 1], index[place] = index[place - 1];
            best[place] = rounded[i], index[place] = start + i;
            bound = best[k - 1];
        }
    }
    for (int i = 0; i < k; i++) {
        int place = i;
        const int64_t own = index[i];
        for (; place > 0 && out[place - 1] > own; place--) out[place] = out[place - 1];
        out[place] = own;
    }
}

/* scores[rows, size] -> out[rows, k], 1 <= k <= 64; scores that are equal when rounded to 1 / ties are. */
void longctx_rank(const float *scores, int64_t *out, int64_t rows, int64_t size, int k, float ties, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows * size > 16384)
    for (int64_t row = 0; row < rows; row++) rank_row(scores + row * size, size, k, ties, out + row * k);
}

/* Paged attention for CPUs, and what precedes it: head norm, rotation, storing.
 *
 * Blocked online softmax after FlashAttention-2 (Dao, 2023, section 3.1); decode over long contexts is split over keys and
 * merged by log-sum-exp as in Flash-Decoding. The query heads that share a KV head are rows of one tile, so a page of KV
 * is read once for all of them.
 *
 * Memory orders ("paired", memory/layout.py): everything a matrix product touches is a 4-byte word, two bfloat16 or one
 * float32, so one micro-kernel serves both types. With S = page size, D = head dim, w = words:
 *   K page of one head  [D / p][S] w      QK^T: rows x S, D / p steps
 *   V page of one head  [S / p][D] w      PV:   rows x D, S / p steps
 * A row's result depends on its own keys and nothing else: the order of its sums is the same whatever shares the batch.
 *
 * On CPUs with AMX the same words are its right operands as they lie: 16 of K's steps by 16 keys, or 16 of V's by 16 columns, are
 * a tile. Every bfloat16 row goes that way, those of a decode step too, so its sums do not depend on its company either.
 *
 * Each token sees one range of keys: those its position says, or in a ranged call those that it is given.
 * Left out: head sizes that are no multiple of 16, soft-capped scores.
 */
#include "vectors.h"
#include "amx.h"

#define ROWS 6 /* rows of a micro-kernel call */
#define BLOCK_ROWS 32 /* rows of scores at one time: more than ROWS for AMX alone */
#if LANES == 16
#define VECTORS 4 /* vectors of LANES columns of a micro-kernel call: 6 x 4 accumulators of 32 registers */
#else
#define VECTORS 2 /* 6 x 2 of 16 */
#endif
#if defined(__AVX512BF16__)
#define IS_WIDENED(is_bf16) 0
#else /* no bfloat16 products: the left operand is kept as float32, the right one is widened in registers */
#define IS_WIDENED(is_bf16) (is_bf16)
#endif
#define MAX_DIM 256
#define TILE_ROWS 96
#define SPLIT_KEYS 2048 /* keys of one decode split; fixed, so that a result does not depend on the number of cores */
#define NEVER (-1e30f)

typedef struct {
    const void *qkv;           /* [T, (H + 2 K) * D] */
    const float *q_weight;     /* [D] or NULL: head norm */
    const float *k_weight;
    const float *cos;          /* [T, R] */
    const float *sin;
    const int64_t *slots;      /* [T]; negative: its keys and values are not stored */
    void *q;                   /* [T, H, D], written by prepare, read by attend */
    void *out;                 /* [T, H * D]; float32 in a ranged call */
    char *k_pages;             /* this layer's K of page 0, from the first KV head that is attended on */
    char *v_pages;
    const int32_t *cu_seqlens; /* [B + 1] */
    const int32_t *kv_lens;    /* [B]; not read in a ranged call */
    const int32_t *tables;     /* [B, table_stride] */
    const int32_t *first_keys; /* [T], or NULL: not a ranged call */
    const int32_t *last_keys;  /* [T], one after the last */
    float *lse;                /* [T, H], or NULL: not a ranged call */
    int64_t page_stride;       /* bytes between pages of one layer */
    int32_t num_tokens, num_segments, num_heads, num_kv_heads, head_dim, rotary_dim;
    int32_t page_size, table_stride, window /* 0: none */, is_bf16, num_threads;
    float scale, norm_eps;
} layer_args;

/* ---- the micro-kernel: C[rows, LANES * vectors] (+)= A[rows, steps] B[steps, ...], in words ------------------------
 * Where IS_WIDENED, A is float32: two values per word of B. */

#define WORDS_OF_A(is_bf16) (IS_WIDENED(is_bf16) ? 2 : 1)

INLINE float as_float(uint32_t word) {
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE vf multiply_add(int is_bf16, vf acc, uint32_t a, vu b) {
#if defined(__AVX512BF16__)
    if (is_bf16) return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
    (void)is_bf16;
    return acc + as_float(a) * (vf)b;
}

INLINE void multiply_block(const int is_bf16, const int rows, const int vectors, const int accumulate, const uint32_t *a,
                           int64_t a_stride, const uint32_t *b, int64_t b_stride, int steps, float *c, int64_t c_stride) {
    vf acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) acc[i][j] = accumulate ? load_f32(c + i * c_stride + j * LANES) : splat(0);
    for (int step = 0; step < steps; step++) {
        for (int part = 0; part < WORDS_OF_A(is_bf16); part++) {
            vu words[VECTORS];
#pragma GCC unroll 8
            for (int j = 0; j < vectors; j++) {
                words[j] = (vu)*(const vu_at *)(b + step * b_stride + j * LANES);
                if (IS_WIDENED(is_bf16)) words[j] = part ? words[j] & 0xffff0000u : words[j] << 16;
            }
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                const uint32_t value = a[i * a_stride + step * WORDS_OF_A(is_bf16) + part];
#pragma GCC unroll 8
                for (int j = 0; j < vectors; j++)
                    acc[i][j] = multiply_add(is_bf16, acc[i][j], value, words[j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) store_f32(c + i * c_stride + j * LANES, acc[i][j]);
}

INLINE void multiply_rows(const int is_bf16, const int rows, const int accumulate, const uint32_t *a, int64_t a_stride,
                          const uint32_t *b, int columns, int steps, float *c, int64_t c_stride) {
    int column = 0;
    for (; column + VECTORS * LANES <= columns; column += VECTORS * LANES)
        multiply_block(is_bf16, rows, VECTORS, accumulate, a, a_stride, b + column, columns, steps, c + column, c_stride);
    for (; column < columns; column += LANES)
        multiply_block(is_bf16, rows, 1, accumulate, a, a_stride, b + column, columns, steps, c + column, c_stride);
}

/* B is [steps, columns] words without gaps; rows is at most ROWS, or BLOCK_ROWS with AMX, which writes whole tiles of 16. */
INLINE void multiply(const int is_bf16, const int has_amx, int rows, const int accumulate, const uint32_t *a, int64_t a_stride, const uint32_t *b,
                     int columns, int steps, float *c, int64_t c_stride) {
    if (is_bf16 && has_amx) {
        amx_multiply(rows, accumulate, a, a_stride, b, columns, steps, c, c_stride);
        return;
    }
#define CASE(N) case N: multiply_rows(is_bf16, N, accumulate, a, a_stride, b, columns, steps, c, c_stride); break
    switch (rows) {
        CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
    }
#undef CASE
}

/* ---- one tile: rows of queries against a range of keys ------------------------------------------------------------ */

typedef struct {
    int32_t first, last; /* first >= last: none */
} key_range;

static int smaller(int a, int b) { return a < b ? a : b; }
static int larger(int a, int b) { return a > b ? a : b; }

/* The keys that a token of a segment sees. */
static key_range seen_keys(const layer_args *args, int segment, int token) {
    const int start = args->cu_seqlens[segment];
    if (args->first_keys) return (key_range){args->first_keys[start + token], args->last_keys[start + token]};
    const int position = args->kv_lens[segment] - (args->cu_seqlens[segment + 1] - start) + token;
    return (key_range){args->window ? larger(0, position - args->window + 1) : 0, position + 1};
}

/* The smallest range that holds both. */
static key_range hull(key_range a, key_range b) {
    if (a.first >= a.last) return b;
    if (b.first >= b.last) return a;
    return (key_range){smaller(a.first, b.first), larger(a.last, b.last)};
}

typedef struct {
    uint32_t q[TILE_ROWS * MAX_DIM];   /* rows x D / p words, or D float32 where IS_WIDENED */
    float out[TILE_ROWS * MAX_DIM];    /* rows x D, not yet divided by the sum */
    float max[TILE_ROWS];              /* of scaled scores, in units of log 2 */
    float sum[TILE_ROWS * LANES];      /* of weights, lane by lane */
    float scores[BLOCK_ROWS * MAX_DIM];     /* rows x page size */
    uint32_t weights[BLOCK_ROWS * MAX_DIM]; /* rows x page size / p words, or page size float32 where IS_WIDENED */
    key_range seen[TILE_ROWS];         /* by row: the keys it sees */
} __attribute__((aligned(64))) tile_state;

/* Scores of one row become weights; keys outside [first, last) weigh nothing. The row's output is rescaled if its maximum rose. */
INLINE void update_row(const int is_bf16, float *scores, void *weights, int page_size, int first, int last, float scale_log2,
                       float *row_max, float *row_sum, float *out, int dim) {
    const int whole = first <= 0 && last >= page_size;
    if (!whole)
        for (int j = 0; j < page_size; j++)
            if (j < first || j >= last) scores[j] = NEVER;
    vf best = load_f32(scores);
    for (int j = LANES; j < page_size; j += LANES) best = vmax(best, load_f32(scores + j));
    const float high = max_lanes(best) * scale_log2;
    if (high > *row_max) {
        float shrink = exp2f(*row_max - high);
        *row_max = high;
        store_f32(row_sum, load_f32(row_sum) * shrink);
        for (int d = 0; d < dim; d += LANES) store_f32(out + d, load_f32(out + d) * shrink);
    }
    vf total = load_f32(row_sum);
    for (int j = 0; j < page_size; j += LANES) {
        vf p = exp2_nonpositive(is_bf16, load_f32(scores + j) * scale_log2 - *row_max);
        if (!whole)
            for (int i = 0; i < LANES; i++)
                if (j + i < first || j + i >= last) p[i] = 0;
        total += p;
        store(is_bf16 && !IS_WIDENED(is_bf16), weights, j, p);
    }
    store_f32(row_sum, total);
}

/* All rows of the tile, keys [first_key, last_key). */
INLINE void attend_tile(const int is_bf16, const int has_amx, const layer_args *args, tile_state *tile, int num_rows, int kv_head,
                        const int32_t *table, int first_key, int last_key) {
    const int dim = args->head_dim, size = args->page_size, pair = is_bf16 ? 2 : 1;
    const int q_stride = dim / pair * WORDS_OF_A(is_bf16), weight_stride = size / pair * WORDS_OF_A(is_bf16);
    const int64_t head_bytes = (int64_t)dim * size * 4 / pair * kv_head;
    const float scale_log2 = args->scale * 1.44269504f;
    const int most = is_bf16 && has_amx ? BLOCK_ROWS : ROWS;
    key_range blocks[(TILE_ROWS + ROWS - 1) / ROWS]; /* what any row of each micro-kernel call sees */
    for (int row = 0; row < num_rows; row += most) {
        key_range all = {0, 0};
        for (int i = row; i < smaller(row + most, num_rows); i++) all = hull(all, tile->seen[i]);
        blocks[row / most] = all;
    }
    for (int page_idx = first_key / size; page_idx * size < last_key; page_idx++) {
        const int base = page_idx * size;
        const int64_t offset = table[page_idx] * args->page_stride + head_bytes;
        const uint32_t *k = (const uint32_t *)(args->k_pages + offset), *v = (const uint32_t *)(args->v_pages + offset);
        for (int row = 0; row < num_rows; row += most) {
            const int rows = num_rows - row < most ? num_rows - row : most;
            if (base >= blocks[row / most].last || base + size <= blocks[row / most].first) continue;
            multiply(is_bf16, has_amx, rows, 0, tile->q + row * q_stride, q_stride, k, size, dim / pair, tile->scores, size);
            for (int i = 0; i < rows; i++) {
                const key_range seen = tile->seen[row + i];
                const int first = larger(first_key, seen.first) - base, last = smaller(last_key, seen.last) - base;
                update_row(is_bf16, tile->scores + i * size, tile->weights + i * weight_stride, size, first, last, scale_log2,
                           tile->max + row + i, tile->sum + (row + i) * LANES, tile->out + (row + i) * dim, dim);
            }
            multiply(is_bf16, has_amx, rows, 1, tile->weights, weight_stride, v, dim, size / pair, tile->out + row * dim, dim);
        }
    }
}

/* ---- work: which tiles there are ----------------------------------------------------------------------------------- */

typedef struct {
    int32_t segment, kv_head, first_token /* within the segment */, num_tokens, first_key, last_key;
    int64_t partial; /* index of its partial result, -1: writes the output itself */
} work_item;

/* Lists the tiles, the long ones first; returns their number. items may be NULL to count only. */
static int64_t list_work(const layer_args *args, work_item *items, int64_t *num_partials) {
    const int group = args->num_heads / args->num_kv_heads, tile_tokens = larger(1, TILE_ROWS / group);
    int64_t count = 0;
    *num_partials = 0;
    for (int segment = 0; segment < args->num_segments; segment++) {
        const int num_tokens = args->cu_seqlens[segment + 1] - args->cu_seqlens[segment];
        for (int end = num_tokens; end > 0; end -= tile_tokens) {
            const int start = larger(0, end - tile_tokens);
            key_range all = {0, 0};
            for (int token = start; token < end; token++) all = hull(all, seen_keys(args, segment, token));
            const int first_key = all.first, last_key = all.last;
            const int split_start = first_key / SPLIT_KEYS, split_end = (last_key + SPLIT_KEYS - 1) / SPLIT_KEYS;
            const int split = num_tokens == 1 && split_end - split_start > 1;
            for (int kv_head = 0; kv_head < args->num_kv_heads; kv_head++) {
                for (int part = split ? split_start : 0; part < (split ? split_end : 1); part++) {
                    if (items)
                        items[count] = (work_item){segment, kv_head, start, end - start,
                                                   split ? larger(first_key, part * SPLIT_KEYS) : first_key,
                                                   split ? smaller(last_key, (part + 1) * SPLIT_KEYS) : last_key,
                                                   split ? *num_partials : -1};
                    *num_partials += split;
                    count++;
                }
            }
        }
    }
    return count;
}

INLINE void load_queries(const int is_bf16, const layer_args *args, const work_item *item, tile_state *tile, int group) {
    const int64_t token = args->cu_seqlens[item->segment] + item->first_token, size = (int64_t)group * args->head_dim;
    for (int t = 0; t < item->num_tokens; t++) {
        const int64_t from = ((token + t) * args->num_heads + (int64_t)item->kv_head * group) * args->head_dim;
        for (int64_t i = 0; i < size; i += LANES)
            store(is_bf16 && !IS_WIDENED(is_bf16), tile->q, t * size + i, load(is_bf16, args->q, from + i));
    }
}

INLINE void store_outputs(const int is_bf16, const layer_args *args, const work_item *item, const float *rows, const float *maxima,
                          const float *sums, int group) {
    const int dim = args->head_dim;
    const int64_t token = args->cu_seqlens[item->segment] + item->first_token;
    for (int r = 0; r < item->num_tokens * group; r++) {
        const int64_t head = (token + r / group) * args->num_heads + (int64_t)item->kv_head * group + r % group, to = head * dim;
        if (args->lse) { /* a row that saw nothing is all zeros: its maximum says nothing */
            const float divisor = sums[r] == 0 ? 1 : sums[r];
            for (int d = 0; d < dim; d += LANES) store_f32((float *)args->out + to + d, load_f32(rows + r * dim + d) / divisor);
            args->lse[head] = sums[r] == 0 ? -INFINITY : (maxima[r] + log2f(sums[r])) * 0.693147181f;
            continue;
        }
        const float inverse = 1.0f / sums[r];
        for (int d = 0; d < dim; d += LANES) store(is_bf16, args->out, to + d, load_f32(rows + r * dim + d) * inverse);
    }
}

INLINE void run_item(const int is_bf16, const int has_amx, const layer_args *args, const work_item *item, float *partials) {
    tile_state tile;
    const int group = args->num_heads / args->num_kv_heads, num_rows = item->num_tokens * group, dim = args->head_dim;
    load_queries(is_bf16, args, item, &tile, group);
    for (int r = 0; r < num_rows; r++) tile.seen[r] = seen_keys(args, item->segment, item->first_token + r / group);
    memset(tile.out, 0, (size_t)num_rows * dim * sizeof(float));
    for (int r = 0; r < num_rows; r++) {
        tile.max[r] = NEVER;
        store_f32(tile.sum + r * LANES, splat(0));
    }
    if (has_amx) amx_begin();
    attend_tile(is_bf16, has_amx, args, &tile, num_rows, item->kv_head, args->tables + (int64_t)item->segment * args->table_stride,
                item->first_key, item->last_key);
    if (has_amx) amx_end();
    float sums[TILE_ROWS];
    for (int r = 0; r < num_rows; r++) sums[r] = sum_lanes(load_f32(tile.sum + r * LANES));
    if (item->partial < 0) {
        store_outputs(is_bf16, args, item, tile.out, tile.max, sums, group);
        return;
    }
    float *partial = partials + item->partial * group * (dim + 2);
    memcpy(partial, tile.out, (size_t)group * dim * sizeof(float));
    memcpy(partial + group * dim, tile.max, (size_t)group * sizeof(float));
    memcpy(partial + group * (dim + 1), sums, (size_t)group * sizeof(float));
}

/* Merges the splits items[0 .. count) of one (segment, KV head), in key order. */
static void merge_splits(const layer_args *args, const work_item *items, int64_t count, float *partials) {
    const int group = args->num_heads / args->num_kv_heads, dim = args->head_dim;
    const int64_t size = (int64_t)group * (dim + 2);
    float *into = partials + items[0].partial * size, maxima[TILE_ROWS], sums[TILE_ROWS];
    for (int r = 0; r < group; r++) {
        float high = NEVER, sum = 0;
        for (int64_t i = 0; i < count; i++) high = fmaxf(high, into[i * size + group * dim + r]);
        for (int64_t i = 0; i < count; i++) {
            const float *from = into + i * size, factor = exp2f(from[group * dim + r] - high);
            sum += from[group * (dim + 1) + r] * factor;
            for (int d = 0; d < dim; d += LANES) {
                vf value = load_f32(from + r * dim + d) * factor;
                store_f32(into + r * dim + d, i ? load_f32(into + r * dim + d) + value : value);
            }
        }
        maxima[r] = high;
        sums[r] = sum;
    }
    store_outputs(args->is_bf16, args, items, into, maxima, sums, group);
}

/* OpenMP outlines a loop's body and would make is_bf16 a variable again: these pin it. */
typedef void run_function(const layer_args *, const work_item *, float *);
static __attribute__((noinline)) void run_amx(const layer_args *args, const work_item *item, float *partials) { run_item(1, 1, args, item, partials); }
static __attribute__((noinline)) void run_bf16(const layer_args *args, const work_item *item, float *partials) { run_item(1, 0, args, item, partials); }
static __attribute__((noinline)) void run_f32(const layer_args *args, const work_item *item, float *partials) { run_item(0, 0, args, item, partials); }

/* Attention of args->q over the pages into args->out: causal, or with args->first_keys ranged, which also writes args->lse.
 * Returns 0, or 1 if memory ran out. */
int longctx_attend(const layer_args *args) {
    int64_t num_partials, num_items = list_work(args, NULL, &num_partials);
    const int group = args->num_heads / args->num_kv_heads;
    work_item *items = malloc((size_t)(num_items ? num_items : 1) * sizeof(work_item));
    float *partials = num_partials ? malloc((size_t)num_partials * group * (args->head_dim + 2) * sizeof(float)) : NULL;
    if (!items || (num_partials && !partials)) {
        free(items);
        free(partials);
        return 1;
    }
    list_work(args, items, &num_partials);
    const int has_amx = args->is_bf16 && args->head_dim % 32 == 0 && args->page_size % 32 == 0 && amx_available();
    run_function *run = has_amx ? run_amx : args->is_bf16 ? run_bf16 : run_f32;
#pragma omp parallel for schedule(dynamic, 1) num_threads(args->num_threads) if (num_items > 1)
    for (int64_t i = 0; i < num_items; i++) run(args, items + i, partials);
    for (int64_t i = 0, next; i < num_items; i = next) {
        for (next = i + 1; next < num_items && items[i].partial >= 0 && items[next].segment == items[i].segment &&
                           items[next].kv_head == items[i].kv_head; next++) {}
        if (items[i].partial >= 0) merge_splits(args, items + i, next - i, partials);
    }
    free(items);
    free(partials);
    return 0;
}

/* ---- before attention: head norm, rotation, storing ------------------------------------------------------------------ */

/* x[dim] in float32: RMS norm if there is a weight, then the rotate-half form of RoPE on the first rotary_dim values. */
INLINE void normalise_and_rotate(float *x, int dim, const float *weight, float eps, const float *cos, const float *sin, int rotary_dim) {
    if (weight) {
        vf squares = splat(0);
        for (int d = 0; d < dim; d += LANES) squares += load_f32(x + d) * load_f32(x + d);
        const float factor = 1.0f / sqrtf(sum_lanes(squares) / dim + eps);
        for (int d = 0; d < dim; d += LANES) store_f32(x + d, load_f32(x + d) * factor * load_f32(weight + d));
    }
    const int half = rotary_dim / 2;
    for (int d = 0; d < half; d++) {
        const float low = x[d], high = x[d + half];
        x[d] = low * cos[d] - high * sin[d];
        x[d + half] = high * cos[d + half] + low * sin[d + half];
    }
}

INLINE void read_head(const int is_bf16, const void *from, int64_t offset, int dim, float *x) {
    for (int d = 0; d < dim; d += LANES) store_f32(x + d, load(is_bf16, from, offset + d));
}

INLINE void prepare_typed(const int is_bf16, const layer_args *args, int64_t token) {
    const int dim = args->head_dim, size = args->page_size, pair = is_bf16 ? 2 : 1;
    const int64_t heads = args->num_heads, kv_heads = args->num_kv_heads, row = token * (heads + 2 * kv_heads) * dim;
    const int64_t page = args->slots[token] / size, offset = args->slots[token] % size;
    const float *cos = args->cos + token * args->rotary_dim, *sin = args->sin + token * args->rotary_dim;
    float x[MAX_DIM];
    uint32_t words[MAX_DIM];
    for (int64_t head = 0; head < heads; head++) {
        read_head(is_bf16, args->qkv, row + head * dim, dim, x);
        normalise_and_rotate(x, dim, args->q_weight, args->norm_eps, cos, sin, args->rotary_dim);
        for (int d = 0; d < dim; d += LANES) store(is_bf16, args->q, (token * heads + head) * dim + d, load_f32(x + d));
    }
    if (args->slots[token] < 0) return;
    for (int64_t head = 0; head < kv_heads; head++) {
        const int64_t head_bytes = page * args->page_stride + (int64_t)dim * size * 4 / pair * head;
        read_head(is_bf16, args->qkv, row + (heads + head) * dim, dim, x);
        normalise_and_rotate(x, dim, args->k_weight, args->norm_eps, cos, sin, args->rotary_dim);
        for (int d = 0; d < dim; d += LANES) store(is_bf16, words, d, load_f32(x + d));
        uint32_t *k = (uint32_t *)(args->k_pages + head_bytes) + offset;
        for (int i = 0; i < dim / pair; i++) k[(int64_t)i * size] = words[i];
        const int64_t v_row = row + (heads + kv_heads + head) * dim;
        if (is_bf16) {
            uint16_t *v = (uint16_t *)(args->v_pages + head_bytes) + (offset / 2) * dim * 2 + offset % 2;
            for (int d = 0; d < dim; d++) v[2 * d] = ((const uint16_t *)args->qkv)[v_row + d];
        } else {
            memcpy((float *)(args->v_pages + head_bytes) + offset * dim, (const float *)args->qkv + v_row, dim * sizeof(float));
        }
    }
}

static __attribute__((noinline)) void prepare_bf16(const layer_args *args, int64_t token) { prepare_typed(1, args, token); }
static __attribute__((noinline)) void prepare_f32(const layer_args *args, int64_t token) { prepare_typed(0, args, token); }

/* Splits qkv, normalises and rotates queries and keys, writes queries to args->q and keys and values to their pages. */
void longctx_prepare(const layer_args *args) {
    const int64_t num_tokens = args->num_tokens;
    /* Neighbouring tokens share cache lines of a page: each thread takes whole runs of them. */
#pragma omp parallel for schedule(static) num_threads(args->num_threads) if (num_tokens > 8)
    for (int64_t token = 0; token < num_tokens; token++) {
        (args->is_bf16 ? prepare_bf16 : prepare_f32)(args, token);
    }
}

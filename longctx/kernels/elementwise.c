/* What lies between the linear layers: residual additions with RMS norm, SiLU gates. float32 inside. */
#include "vectors.h"

INLINE void norm_row(const int is_bf16, void *x, const void *addend, const float *weight, void *out, int64_t row, int64_t size, float eps) {
    vf squares = splat(0);
    for (int64_t c = 0; c < size; c += LANES) {
        vf value = load(is_bf16, x, row * size + c);
        if (addend) {
            value += load(is_bf16, addend, row * size + c);
            store(is_bf16, x, row * size + c, value);
            if (is_bf16) value = load(1, x, row * size + c); /* the norm sees what the next layer's residual sees */
        }
        squares += value * value;
    }
    const float factor = 1.0f / sqrtf(sum_lanes(squares) / (float)size + eps);
    for (int64_t c = 0; c < size; c += LANES)
        store(is_bf16, out, row * size + c, load(is_bf16, x, row * size + c) * factor * load_f32(weight + c));
}

/* out = rms_norm(x) * weight, after x += addend if addend is not NULL; size is a multiple of 16. */
void longctx_rms_norm(void *x, const void *addend, const float *weight, void *out, int64_t rows, int64_t size, float eps, int is_bf16,
                      int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows > 16)
    for (int64_t row = 0; row < rows; row++) {
        if (is_bf16) norm_row(1, x, addend, weight, out, row, size, eps);
        else norm_row(0, x, addend, weight, out, row, size, eps);
    }
}

INLINE vf silu(int is_bf16, vf x) {
    /* x * sigmoid(x), with 2^-|x log2 e| so that nothing overflows */
    vf magnitude = (vf)((vi)x & 0x7fffffff);
    vf small = exp2_nonpositive(is_bf16, magnitude * -1.44269504f);
    vi negative = x < 0.0f;
    vf top = (vf)(((vi)small & negative) | ((vi)splat(1) & ~negative));
    return x * top / (1.0f + small);
}

INLINE void silu_row(const int is_bf16, const void *gate_up, void *out, int64_t row, int64_t size) {
    for (int64_t c = 0; c < size; c += LANES) {
        vf gate = load(is_bf16, gate_up, row * 2 * size + c), up = load(is_bf16, gate_up, row * 2 * size + size + c);
        store(is_bf16, out, row * size + c, silu(is_bf16, gate) * up);
    }
}

/* out[rows, size] = silu(gate) * up of gate_up[rows, 2 * size]; size is a multiple of 16. */
void longctx_silu_mul(const void *gate_up, void *out, int64_t rows, int64_t size, int is_bf16, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) {
        if (is_bf16) silu_row(1, gate_up, out, row, size);
        else silu_row(0, gate_up, out, row, size);
    }
}

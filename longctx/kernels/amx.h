/* Intel's AMX: products of bfloat16 tiles, 16 rows by 32 values times 32 by 16. Compiled in where the compiler targets it, used where
 * the kernel lets the process have the tile registers.
 *
 * A product runs over blocks of 32 x 32 outputs: tiles 0-3 accumulate, 4-5 hold the left operand, 6-7 the right one. All tiles are
 * 16 rows of 64 bytes, always: rows past the last one are computed and never read, so their buffers must exist. */
#pragma once
#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

static int amx_available(void) {
    static int state = -1; /* two threads that ask at once find the same */
    if (state < 0) {
        const long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
        state = syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
    }
    return state;
}

static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) amx_config = {
    .palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

/* A thread's tiles: between begin and end nobody else may configure them. */
static void amx_begin(void) { _tile_loadconfig(&amx_config); }
static void amx_end(void) { _tile_release(); }

/* C[rows, columns] (+)= A[rows, steps] B[steps, columns], in words; columns a multiple of 32, steps of 16. Writes rows rounded up to 16. */
INLINE void amx_multiply(int rows, const int accumulate, const uint32_t *a, int64_t a_stride, const uint32_t *b, int columns,
                         int steps, float *c, int64_t c_stride) {
    __asm__ volatile("" ::: "memory"); /* GCC 12 does not know that tile loads read memory */
    for (int row = 0; row < rows; row += 32) {
        const int has_second = row + 16 < rows;
        const uint32_t *a0 = a + row * a_stride, *a1 = a0 + 16 * a_stride;
        for (int column = 0; column < columns; column += 32) {
            float *c0 = c + row * c_stride + column, *c1 = c0 + 16 * c_stride;
            if (accumulate) {
                _tile_loadd(0, c0, c_stride * 4);
                _tile_loadd(1, c0 + 16, c_stride * 4);
                if (has_second) {
                    _tile_loadd(2, c1, c_stride * 4);
                    _tile_loadd(3, c1 + 16, c_stride * 4);
                }
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int step = 0; step < steps; step += 16) {
                const uint32_t *b0 = b + (int64_t)step * columns + column;
                _tile_loadd(6, b0, columns * 4);
                _tile_loadd(7, b0 + 16, columns * 4);
                _tile_loadd(4, a0 + step, a_stride * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (has_second) {
                    _tile_loadd(5, a1 + step, a_stride * 4);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, c0, c_stride * 4);
            _tile_stored(1, c0 + 16, c_stride * 4);
            if (has_second) {
                _tile_stored(2, c1, c_stride * 4);
                _tile_stored(3, c1 + 16, c_stride * 4);
            }
        }
    }
}
#else
static int amx_available(void) { return 0; }
static void amx_begin(void) {}
static void amx_end(void) {}
INLINE void amx_multiply(int rows, const int accumulate, const uint32_t *a, int64_t a_stride, const uint32_t *b, int columns,
                         int steps, float *c, int64_t c_stride) {
    (void)rows, (void)accumulate, (void)a, (void)a_stride, (void)b, (void)columns, (void)steps, (void)c, (void)c_stride;
}
#endif

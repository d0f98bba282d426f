/* y[m, n] = sum over k of x[m, k] w[n, k] (+ bias[n]) (+ residual[m, n]), for few rows m, or many with a bfloat16 w.
 *
 * x may first be normed: x / sqrt(mean(x^2) + eps) * norm. With `gated`, w holds gate and up behind each other and
 * y[m, n] = silu(gate) * up, with half as many columns as w has rows.
 *
 * w is row-major [n, k], float or bfloat16, read from memory once, four rows at a time, with prefetch; all else is of one
 * type, float, or bfloat16 where w is. Weights that were bfloat16 when they were trained are the same numbers in half the
 * bytes, which is half the time of a product of one row. One vector
 * accumulator per (m, n) runs through k in order whatever m is, so a row's result has the same bits in every batch, on
 * any number of threads. Threads take chunks of rows of w.
 *
 * Where w is bfloat16 and x has many rows, a thread takes a tile of x and a chunk of w at a time, which together stay in
 * the second cache, its own: of w nothing but its bfloat16 crosses the caches that are shared.
 *
 * How memory is read decides the speed. Measured on one core (AMD EPYC, AVX-512), w [8192, 512] cold in cache, beside
 * other busy processes, GB/s of weights, float / bfloat16:
 *   m = 1: four rows abreast 14 / 10; row after row, prefetched 2 KB ahead, 25 / 22
 *   m = 6: prefetch abreast into the first cache 8 / 8; in order of addresses, 8 rows ahead, into the second 14 / 13
 *   m = 16: likewise, 6.4 / 4.0 and 7.9 / 4.8 (65 and 81 GFLOP/s) */

#define linear_block NAME(linear_block_)
#define linear_rows NAME(linear_rows_)
#define linear_finish NAME(linear_finish_)
#define prepare_x NAME(prepare_x_)
#define run_linear NAME(run_linear_)
#define inverse_rms NAME(inverse_rms_)

INLINE float inverse_rms(const void *x, int64_t cols, float eps, const int bf16) {
    vf squares = splat(0.f);
    int64_t i = 0;
    for (; i + LANES <= cols; i += LANES) {
        vf v = load(x, i, bf16);
        squares = fma(v, v, squares);
    }
    if (i < cols) {
        vf v = load_part(x, i, cols - i, bf16);
        squares = fma(v, v, squares);
    }
    return 1.f / __builtin_sqrtf(sum(squares) / (float)cols + eps);
}

/* Adds x[m, i...] w[j, i...] to the accumulators, for one step: LANES floats or 2 * LANES bfloat16. */
#define linear_step NAME(linear_step_)
INLINE void linear_step(const float *x, int64_t x_stride, const void *const w[4], int64_t i, const int rows,
                        const int narrow, vf acc[ROWS][4]) {
#pragma GCC unroll 2
    for (int half = 0; half <= narrow; half++) {
        vf b[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) b[j] = narrow ? load_half(w[j], i, half) : load(w[j], i, 0);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            vf a = load(x + m * x_stride, i + half * LANES, 0);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) acc[m][j] = fma(a, b[j], acc[m][j]);
        }
    }
}

/* rows x 4 sums into out[row][4]. w: four pointers to rows; what lies `ahead` bytes on is prefetched if that is not 0. */
INLINE void linear_block(const float *x, int64_t x_stride, const void *const w[4], int64_t k, int64_t ahead,
                         const int rows, const int narrow, v4 *out) {
    const int step = narrow ? 2 * LANES : LANES, size = narrow ? 2 : 4;
    vf acc[ROWS][4];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[m][j] = splat(0.f);
    int64_t i = 0;
    if (rows == 1) {
        /* One row of w after the other is one stream through memory, which is read fastest. */
        const int64_t whole = k / step * step;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            for (i = 0; i < whole; i += step) {
                __builtin_prefetch((const char *)w[j] + i * size + 2048, 0, 3);
#pragma GCC unroll 2
                for (int half = 0; half <= narrow; half++) {
                    vf b = narrow ? load_half(w[j], i, half) : load(w[j], i, 0);
                    acc[0][j] = fma(load(x, i + half * LANES, 0), b, acc[0][j]);
                }
            }
        i = whole;
    } else {
        for (; i + step <= k; i += step) {
            if (ahead) /* in order of addresses, into the second cache: the first one holds x and these rows */
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) __builtin_prefetch((const char *)w[0] + ahead + i * size * 4 + j * 64, 0, 2);
            linear_step(x, x_stride, w, i, rows, narrow, acc);
        }
    }
    if (i < k) { /* the rest, with zeros behind it */
        float x_rest[ROWS][2 * LANES] = {{0}}, w_rest[4][2 * LANES] = {{0}};
        const void *rest[4] = {w_rest[0], w_rest[1], w_rest[2], w_rest[3]};
        for (int j = 0; j < 4; j++) memcpy(w_rest[j], (const char *)w[j] + i * size, (size_t)((k - i) * size));
        /* Prepared rows are padded with zeros, and their bfloat16 halves lie apart. */
        for (int m = 0; m < rows; m++)
            memcpy(x_rest[m], x + m * x_stride + i, sizeof(float) * (size_t)(narrow ? step : k - i));
        linear_step(x_rest[0], 2 * LANES, rest, 0, rows, narrow, acc);
    }
    int first = 0;
#if LANES == 16
    if (rows >= 4) sum16(acc, out), first = 4;
#endif
#pragma GCC unroll 8
    for (int m = first; m < rows; m++) out[m] = sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

/* Four rows of w, with k numbers each, times `rows` rows of x. */
INLINE void linear_rows(const float *x, int64_t x_stride, const void *const w[4], int64_t k, int64_t ahead, int64_t rows,
                        const int narrow, v4 *out) {
    switch (rows) {
#if ROWS >= 6
    case 6: linear_block(x, x_stride, w, k, ahead, 6, narrow, out); break;
    case 5: linear_block(x, x_stride, w, k, ahead, 5, narrow, out); break;
    case 4: linear_block(x, x_stride, w, k, ahead, 4, narrow, out); break;
    case 3: linear_block(x, x_stride, w, k, ahead, 3, narrow, out); break;
#endif
    case 2: linear_block(x, x_stride, w, k, ahead, 2, narrow, out); break;
    default: linear_block(x, x_stride, w, k, ahead, 1, narrow, out); break;
    }
}

/* Bias, gate, residual and the store of row m, columns n to n + count - 1, count <= 4. */
INLINE void linear_finish(const struct linear_task *t, int64_t m, int64_t n, int64_t count, v4 value, v4 up,
                          const int bf16) {
    const int64_t num_out = t->gated ? t->n / 2 : t->n;
    if (t->bias) value += get4(t->bias, n, count, bf16);
    if (t->gated) value = silu_plain(value) * (t->bias ? up + get4(t->bias, n + num_out, count, bf16) : up);
    if (t->residual) value += get4(t->residual, m * t->residual_stride + n, count, bf16);
    put4(t->y, m * num_out + n, value, count, bf16);
}

/* `count` rows of x from `first` on as rows of floats, normed where asked; for bfloat16 weights with even and odd places of each step apart, as load_half
 * gives them. Rows are padded to a whole step of any set. Each thread makes its own, which is cheaper than to wait for
 * one. */
INLINE const float *prepare_x(const struct linear_task *t, float *all, int64_t first, int64_t count, int64_t *stride,
                              const int bf16, const int narrow) {
    if (!narrow && !t->norm) {
        *stride = t->x_stride;
        return (const float *)t->x + first * t->x_stride;
    }
    *stride = padded(t->k);
    for (int64_t m = 0; m < count; m++) {
        const void *x = (const char *)t->x + (first + m) * t->x_stride * (bf16 ? 2 : 4);
        const float scale = t->norm ? inverse_rms(x, t->k, t->eps, bf16) : 1.f;
        float *out = all + m * *stride;
        int64_t i = 0;
        for (; narrow && i + 2 * LANES <= t->k; i += 2 * LANES)
            for (int half = 0; half < 2; half++) {
                vf v = load_places(x, i, half, bf16) * scale;
                store(out, i + half * LANES, t->norm ? v * load_places(t->norm, i, half, bf16) : v, 0);
            }
        for (; !narrow && i + LANES <= t->k; i += LANES) store(out, i, load(x, i, 0) * scale * load(t->norm, i, 0), 0);
        const int64_t begin = i;
        for (; i < *stride; i++) out[i] = 0.f;
        for (i = begin; i < t->k; i++) {
            const float v = get(x, i, bf16) * scale;
            const int64_t at = narrow ? begin + (i - begin) / 2 + (i - begin) % 2 * LANES : i;
            out[at] = t->norm ? v * get(t->norm, i, bf16) : v;
        }
    }
    return all;
}

/* A row of bfloat16 as floats, with their places as in prepared rows, padded likewise. */
#define widen_row NAME(widen_row_)
INLINE void widen_row(const void *w, int64_t k, int64_t stride, float *out) {
    int64_t i = 0;
    for (; i + 2 * LANES <= k; i += 2 * LANES)
        for (int half = 0; half < 2; half++) store(out, i + half * LANES, load_half(w, i, half), 0);
    for (int64_t j = i; j < stride; j++) out[j] = 0.f;
    for (int64_t j = i; j < k; j++) out[i + (j - i) / 2 + (j - i) % 2 * LANES] = get(w, j, 1);
}

/* Rows `start` to `end` - 1 of w times `count` prepared rows of x, which are those from `first` on. */
#define linear_few NAME(linear_few_)
INLINE void linear_few(const struct linear_task *t, const float *x, int64_t stride, int64_t first, int64_t count,
                       int64_t start, int64_t end, const int bf16, const int narrow) {
    const int64_t num_out = t->gated ? t->n / 2 : t->n, bytes = t->k * (narrow ? 2 : 4);
    for (int64_t n = start; n < end; n += 4) {
        const void *w[2][4];
        for (int part = 0; part <= t->gated; part++) /* the last row again where there are fewer than four */
            for (int j = 0; j < 4; j++)
                w[part][j] = (const char *)t->w + (part * num_out + least(n + j, num_out - 1)) * bytes;
        for (int64_t m = 0; m < count; m += ROWS) {
            const int64_t rows = least(ROWS, count - m), ahead = m ? 0 : least(8 * bytes, 65536);
            v4 value[ROWS], up[ROWS] = {{0}};
            linear_rows(x + m * stride, stride, w[0], t->k, ahead, rows, narrow, value);
            if (t->gated) linear_rows(x + m * stride, stride, w[1], t->k, ahead, rows, narrow, up);
            for (int64_t r = 0; r < rows; r++)
                linear_finish(t, first + m + r, n, least(4, end - n), value[r], up[r], bf16);
        }
    }
}

/* The same from bfloat16 for many rows of x: those of w are widened once, into a panel that the second cache holds. */
#define linear_many NAME(linear_many_)
INLINE void linear_many(const struct linear_task *t, float *panel, const float *x, int64_t stride, int64_t first,
                        int64_t count, int64_t start, int64_t end, const int bf16) {
    const int64_t num_out = t->gated ? t->n / 2 : t->n, wide = end - start;
    for (int64_t i = 0; i < (t->gated ? 2 : 1) * wide; i++) {
        const int64_t row = i < wide ? start + i : num_out + start + i - wide;
        widen_row((const uint16_t *)t->w + row * t->k, t->k, stride, panel + i * stride);
    }
    for (int64_t m = 0; m < count; m += ROWS) {
        const int64_t rows = least(ROWS, count - m);
        for (int64_t n = 0; n < wide; n += 4) {
            const void *w[4], *w_up[4];
            for (int j = 0; j < 4; j++) w[j] = panel + least(n + j, wide - 1) * stride;
            v4 value[ROWS], up[ROWS] = {{0}};
            linear_rows(x + m * stride, stride, w, stride, 0, rows, 0, value);
            if (t->gated) {
                for (int j = 0; j < 4; j++) w_up[j] = panel + (wide + least(n + j, wide - 1)) * stride;
                linear_rows(x + m * stride, stride, w_up, stride, 0, rows, 0, up);
            }
            for (int64_t r = 0; r < rows; r++)
                linear_finish(t, first + m + r, start + n, least(4, wide - n), value[r], up[r], bf16);
        }
    }
}

INLINE void NAME(linear_typed_)(struct linear_task *t, int64_t thread, const int bf16, const int narrow) {
    const int64_t num_out = t->gated ? t->n / 2 : t->n, num_chunks = (num_out + t->chunk - 1) / t->chunk;
    const int64_t tile = t->tile ? t->tile : most(1, t->m), num_tiles = (t->m + tile - 1) / tile;
    float *const own = t->scratch + thread * (tile + t->panel_rows) * padded(t->k);
    const float *x = 0;
    int64_t stride = 0, prepared = -1;
    for (int64_t unit = claim(&t->next, 1); unit < num_chunks * num_tiles; unit = claim(&t->next, 1)) {
        const int64_t first = unit / num_chunks * tile, count = least(tile, t->m - first);
        if (first != prepared) x = prepare_x(t, own, first, count, &stride, bf16, narrow), prepared = first;
        const int64_t start = unit % num_chunks * t->chunk, end = least(start + t->chunk, num_out);
        if (narrow && t->panel_rows)
            linear_many(t, own + tile * stride, x, stride, first, count, start, end, bf16);
        else linear_few(t, x, stride, first, count, start, end, bf16, narrow);
    }
}

static void run_linear(void *task, int64_t thread, int64_t num_threads) {
    struct linear_task *t = task;
    (void)num_threads;
    if (t->bf16) NAME(linear_typed_)(t, thread, 1, 1);
    else if (t->narrow) NAME(linear_typed_)(t, thread, 0, 1);
    else NAME(linear_typed_)(t, thread, 0, 0);
}

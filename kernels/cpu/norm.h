/* Root-mean-square norm, y = x / sqrt(mean(x^2) + eps) * weight, and the gate of an MLP, y = silu(x) * up: one pass
 * over memory, float32 inside, rows divided evenly among the threads. */

#define norm_row NAME(norm_row_)
#define silu_row NAME(silu_row_)
#define run_norm NAME(run_norm_)
#define run_silu NAME(run_silu_)

INLINE void norm_row(const struct norm_task *t, const void *x, void *y, const int bf16) {
    const float scale = inverse_rms(x, t->cols, t->eps, bf16);
    int64_t i = 0;
    for (; i + LANES <= t->cols; i += LANES) store(y, i, load(x, i, bf16) * scale * load(t->weight, i, bf16), bf16);
    for (; i < t->cols; i++) put(y, i, get(x, i, bf16) * scale * get(t->weight, i, bf16), bf16);
}

static void run_norm(void *task, int64_t thread, int64_t num_threads) {
    const struct norm_task *t = task;
    const int64_t rows = t->outer * t->inner, size = t->bf16 ? 2 : 4;
    for (int64_t row = rows * thread / num_threads; row < rows * (thread + 1) / num_threads; row++) {
        const int64_t outer = row / t->inner, inner = row % t->inner;
        const char *x = (const char *)t->x + (outer * t->x_outer + inner * t->x_inner) * size;
        char *y = (char *)t->y + (outer * t->y_outer + inner * t->y_inner) * size;
        if (t->bf16) norm_row(t, x, y, 1);
        else norm_row(t, x, y, 0);
    }
}

INLINE void silu_row(const void *gate, const void *up, void *y, int64_t cols, const int bf16) {
    int64_t i = 0;
    for (; i < cols; i += LANES) {
        const int64_t count = least(LANES, cols - i);
        vf g = count == LANES ? load(gate, i, bf16) : load_part(gate, i, count, bf16);
        vf u = count == LANES ? load(up, i, bf16) : load_part(up, i, count, bf16);
        vf v = NAME(silu_)(g) * u;
        if (count == LANES) {
            store(y, i, v, bf16);
        } else {
            float part[LANES];
            store(part, 0, v, 0);
            for (int64_t j = 0; j < count; j++) put(y, i + j, part[j], bf16);
        }
    }
}

static void run_silu(void *task, int64_t thread, int64_t num_threads) {
    const struct silu_task *t = task;
    const int64_t size = t->bf16 ? 2 : 4;
    for (int64_t row = t->rows * thread / num_threads; row < t->rows * (thread + 1) / num_threads; row++) {
        const char *x = (const char *)t->x + row * t->x_stride * size;
        char *y = (char *)t->y + row * t->cols * size;
        if (t->bf16) silu_row(x, x + t->cols * size, y, t->cols, 1);
        else silu_row(x, x + t->cols * size, y, t->cols, 0);
    }
}

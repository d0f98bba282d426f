/* What a call gives to its threads: plain numbers and pointers, filled in by native.c's exported functions. */
#ifndef VASHISTA_TASKS_H
#define VASHISTA_TASKS_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define SPLIT 512     /* tokens of a context that one thread attends to at a time */
#define MAX_HEAD 256  /* largest head size */
#define UNIT 16       /* tokens of a unit: what sparse attention summarizes, ranks and keeps */
#define SCORE 256     /* units of a context that one thread scores at a time */

/* What numbers are stored as: the kernels' `bf16` is one of the first two, summaries are codes. */
enum { FLOAT, BFLOAT, SIGNED, UNSIGNED };

/* How units are ranked, as in sparse.py. */
enum { MEAN, MEAN_VARIANCE, BOX, WINDOW };

typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));

/* y = x W^T + bias + residual, or silu of its first half times its second. See linear.h. */
struct linear_task {
    const void *x, *norm, *w, *bias, *residual;
    void *y;
    float *scratch; /* num_threads * (tile + panel_rows) * padded(k) floats; only with norm or narrow */
    int64_t x_stride, residual_stride, m, n, k;
    float eps;
    int bf16, narrow, gated; /* narrow: w is bfloat16; bf16: all else is, too */
    int64_t chunk, next;
    int64_t tile, panel_rows; /* rows of x at a time, 0: all; rows of w that are widened at a time, 0: none */
};

/* y = x / sqrt(mean(x^2) + eps) * weight over rows of `cols`. See norm.h. */
struct norm_task {
    const void *x, *weight;
    void *y;
    int64_t x_outer, x_inner, y_outer, y_inner, outer, inner, cols;
    float eps;
    int bf16;
};

/* y[m, n] = silu(x[m, n]) * x[m, n + cols]. See norm.h. */
struct silu_task {
    const void *x;
    void *y;
    int64_t rows, cols, x_stride;
    int bf16;
};

/* A step of dense attention: what its layers share. attend.py has the same fields in the same order. */
struct attend_step {
    const float *cos, *sin;
    const int64_t *requests; /* 3 numbers each: row of the step, context length, index of its first page in pages */
    const int64_t *pages;
    int64_t *plan;           /* num_requests + 1: items before each request, filled in before a layer's threads start */
    int32_t *open;           /* num_requests * kv_heads: items not yet done, likewise */
    float *partial;          /* items * group * (head_dim + 2) */
    int64_t num_requests, heads, kv_heads, head_dim, rotary, page_size, bf16;
    double scale;
};

/* A layer of it: rotates, writes and attends for requests with one query each. See attend.h. */
struct attend_task {
    const struct attend_step *step;
    const void *qkv;
    void *cache, *out;
    const float *cos, *sin;
    const int64_t *requests, *pages;
    int64_t *plan;
    int32_t *open;
    float *partial;
    int64_t num_requests, heads, kv_heads, head_dim, rotary, page_size, num_slots, window;
    float scale;
    int bf16;
    int64_t next;
};

/* Key summaries of units. See summary.h. */
struct summary_task {
    const void *cache;
    const int64_t *runs; /* num_runs times: first slot, slot behind the last */
    const int64_t *plan; /* num_runs + 1: units before each run */
    uint8_t *codes;
    float *steps;
    int64_t num_runs, kv_heads, head_dim, num_slots, rule;
    int bf16;
    int64_t next;
};

/* A step of sparse attention: what its layers share. sparse.py has the same fields in the same order. */
struct sparse_step {
    const float *cos, *sin;
    const int64_t *requests; /* as in attend_task */
    const int64_t *offsets;  /* num_requests: where each begins in scratch */
    const int64_t *pages;
    int64_t *items;          /* 2 * pairs + 1, filled in before a layer's threads start */
    int32_t *open;           /* 3 * pairs, likewise */
    float *scratch, *partial;
    const int32_t *budgets;  /* num_layers * pairs, tokens */
    int32_t *kept, *num_kept;
    float *diagnostics;      /* num_layers * num_requests * heads * 6 */
    int64_t num_requests, heads, kv_heads, head_dim, rotary, page_size, max_units, num_sinks, num_recent;
    int64_t rule, bf16;
    double scale;
};

/* A layer of it: summarizes, scores, selects and attends. A pair is a request and a KV head. See sparse.h. */
struct sparse_task {
    struct attend_task base;
    const struct sparse_step *step;
    uint8_t *codes;
    float *steps;
    const int32_t *budgets;
    float *diagnostics;
    int64_t layer, num_pairs, next;
};

#define ALWAYS INT32_MAX /* key of a unit that is kept in any case */
#define GONE INT32_MIN   /* key of what is kept already, or is no unit; below that of any score */
#define LOG_UNIT 2.77258872f

/* A request and a KV head in a layer. "Strung": the tokens of the kept units, one unit's 16 after another's. */
struct pair {
    int64_t request, head, row, context, oldest, group;
    const int64_t *pages;
    int64_t first_unit, num_units, width; /* units that are seen, wholly or partly; width: padded for vectors */
    int64_t num_first, newest;            /* of them the first, and those from `newest` on, are kept in any case */
    int64_t num_kept, strung_end, num_cuts, num_parts; /* score items, attend items */
    float first_log, last_log;            /* log of the visible tokens of the first and the last unit */
    int is_covered;
    float *score, *bound, *diagnostics; /* [group, width] each; [group, 6] */
    int32_t *keys, *kept, *num_kept_to;
};

INLINE float get(const void *base, int64_t i, const int bf16) {
    if (!bf16) return ((const float *)base)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)base)[i] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE void put(void *base, int64_t i, float x, const int bf16) {
    if (!bf16) {
        ((float *)base)[i] = x;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = x != x ? (bits | 0x400000) : bits + 0x7fff + ((bits >> 16) & 1);
    ((uint16_t *)base)[i] = (uint16_t)(rounded >> 16);
}

/* Up to four elements; nothing past them is read or written. */
INLINE v4 get4(const void *base, int64_t i, int64_t count, const int bf16) {
    v4 v = {0};
    if (!bf16 && count == 4) memcpy(&v, (const float *)base + i, sizeof v);
    else
        for (int64_t j = 0; j < count; j++) v[j] = get(base, i + j, bf16);
    return v;
}

INLINE void put4(void *base, int64_t i, v4 v, int64_t count, const int bf16) {
    if (!bf16 && count == 4) memcpy((float *)base + i, &v, sizeof v);
    else
        for (int64_t j = 0; j < count; j++) put(base, i + j, v[j], bf16);
}

/* Rows of `bytes` at places of an array, `count` of them: what is read next. */
struct rows {
    const void *base;
    const int64_t *at;
    int64_t count, bytes;
};

/* Asks for the i-th row, if there is one, into the second cache, which has room for more requests under way: keys and
 * values came a quarter faster than into the first (AMD EPYC). Kept units lie apart: what the processor guesses by itself
 * is wrong there. */
INLINE void fetch(const struct rows *rows, int64_t i) {
    if (i >= rows->count) return;
    const char *row = (const char *)rows->base + rows->at[i] * rows->bytes;
    for (int64_t b = 0; b < rows->bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Natural logarithm of a positive normal number, to 1e-15. */
static inline double log_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int64_t power = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
    memcpy(&x, &bits, sizeof x);
    if (x > 1.4142135623730951) x *= 0.5, power++;
    const double s = (x - 1.) / (x + 1.), s2 = s * s; /* |s| < 0.172: s^23 / 23 is below 1e-18 */
    double series = 0.;
    for (int i = 21; i >= 1; i -= 2) series = series * s2 + 1. / i;
    return 2. * s * series + (double)power * 0.6931471805599453;
}

/* Floats that a prepared row of k takes: a whole number of steps of the widest set. */
INLINE int64_t padded(int64_t k) { return (k + 31) / 32 * 32; }

/* The next `count` units of work nobody has taken; the threads of a noisy machine do not wait for each other. */
INLINE int64_t claim(int64_t *next, int64_t count) { return __atomic_fetch_add(next, count, __ATOMIC_RELAXED); }

#endif

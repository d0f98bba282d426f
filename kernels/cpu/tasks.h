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

typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));

/* y = x W^T + bias + residual, or silu of its first half times its second. See linear.h. */
struct linear_task {
    const void *x, *norm, *w, *bias, *residual;
    void *y;
    float *scratch; /* num_threads * m * padded(k) floats; only with norm or bf16 */
    int64_t x_stride, residual_stride, m, n, k;
    float eps;
    int bf16, gated;
    int64_t chunk, next;
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

/* Rotates, writes and attends for requests with one query each. See attend.h. */
struct attend_task {
    const void *qkv;
    void *cache, *out;
    const float *cos, *sin;
    const int64_t *requests; /* 3 numbers each: row of the step, context length, index of its first page in pages */
    const int64_t *pages;
    int64_t *plan;           /* num_requests + 1: items before each request, filled in before the threads start */
    int32_t *open;           /* num_requests * kv_heads: items not yet done, likewise */
    float *partial;          /* items * group * (head_dim + 2) */
    int64_t num_requests, heads, kv_heads, head_dim, rotary, page_size, num_slots, window;
    float scale;
    int bf16;
    int64_t next;
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

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Floats that a prepared row of k takes: a whole number of steps of the widest set. */
INLINE int64_t padded(int64_t k) { return (k + 31) / 32 * 32; }

/* The next `count` units of work nobody has taken; the threads of a noisy machine do not wait for each other. */
INLINE int64_t claim(int64_t *next, int64_t count) { return __atomic_fetch_add(next, count, __ATOMIC_RELAXED); }

#endif

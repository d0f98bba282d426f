/* Key summaries: what stands for a unit of 16 neighbouring keys when units are ranked, in 8 bits a number.
 *
 * codes: [kv_heads, num_slots / 16, planes * head_dim], steps: [kv_heads, num_slots / 16, 4]. By rule, for the n keys of
 * a unit that are written:
 *     MEAN           m = mean, rounded to the nearest code * step
 *     MEAN_VARIANCE  m, and v = mean of (k - m)^2 likewise, unsigned, with its own step
 *     BOX            h = largest, rounded up, and l = least, rounded down: every key lies inside for certain
 * steps[0], steps[1]: of the planes. steps[2], the radius: no key is further from the decoded mean, for certain (box: 0).
 * steps[3]: at least the norm of the decoded mean (box: of both ends, added), which the bound's rounding is judged by.
 * Where a key is not finite the steps are NaN, and the unit scores as if it were infinitely good: it is kept, and the
 * NaN reaches the result as it does in dense attention.
 *
 * A summary is made anew from the keys of its unit alone, so it never depends on what the slots held before. */

#define mean_unit NAME(mean_unit_)
#define box_unit NAME(box_unit_)
#define box_step NAME(box_step_)
#define box_code NAME(box_code_)
#define summarize_unit NAME(summarize_unit_)
#define encode NAME(encode_)
#define run_summary NAME(run_summary_)

/* Squares of less than this are lost to underflow; over 256 dimensions they hide no larger distance. */
#define LOST 2e-18f

/* x / step to the nearest whole number from low to high, as codes; x becomes what they decode to. */
INLINE void encode(float *x, int64_t dim, float step, float low, float high, uint8_t *codes) {
    const vf shift = splat(12582912.f); /* 1.5 * 2^23: adding it rounds to a whole number */
    const float divisor = step == 0.f ? 1.f : step;
    for (int64_t d = 0; d < dim; d += LANES) {
        vf code = (load(x, d, 0) / divisor + shift) - shift;
        code = (vf)pick(code > high, (vi)splat(high), pick(code < low, (vi)splat(low), (vi)code));
        store(x, d, code * step, 0);
        vc narrow = __builtin_convertvector(__builtin_convertvector(code, vi), vc);
        memcpy(codes + d, &narrow, sizeof narrow);
    }
}

/* keys: the unit's first one. */
INLINE void mean_unit(const void *keys, int64_t count, int64_t dim, int has_variance, uint8_t *codes, float *steps,
                      const int bf16) {
    float mean[MAX_HEAD] __attribute__((aligned(64))), variance[MAX_HEAD] __attribute__((aligned(64)));
    vf top = splat(0.f), widest = splat(0.f), odd = splat(0.f), odd_variance = splat(0.f);
    for (int64_t d = 0; d < dim; d += LANES) {
        vf total = splat(0.f), squares = splat(0.f);
        for (int64_t i = 0; i < count; i++) total += load(keys, i * dim + d, bf16);
        const vf m = total / (float)count;
        store(mean, d, m, 0);
        top = larger((vf)((vi)m & 0x7fffffff), top);
        odd += m * 0.f; /* NaN if one is not finite */
        if (!has_variance) continue;
        for (int64_t i = 0; i < count; i++) {
            const vf x = load(keys, i * dim + d, bf16) - m;
            squares = fma(x, x, squares);
        }
        squares = squares / (float)count;
        store(variance, d, squares, 0);
        widest = larger(squares, widest);
        odd_variance += squares * 0.f;
    }
    const float nan = __builtin_nanf(""), slack = (float)(dim + 8) * 0x1p-24f;
    if (sum(odd) != 0.f) {
        steps[0] = steps[1] = steps[2] = steps[3] = nan;
        memset(codes, 0, (size_t)(dim * (1 + has_variance)));
        return;
    }
    steps[0] = largest(top) / 127.f, steps[1] = 0.f;
    encode(mean, dim, steps[0], -127.f, 127.f, codes);
    if (has_variance) {
        steps[1] = sum(odd_variance) != 0.f ? nan : largest(widest) / 255.f;
        if (steps[1] != steps[1]) memset(codes + dim, 0, (size_t)dim);
        else encode(variance, dim, steps[1], 0.f, 255.f, codes + dim);
    }
    vf squares = splat(0.f);
    for (int64_t d = 0; d < dim; d += LANES) squares = fma(load(mean, d, 0), load(mean, d, 0), squares);
    const float norm = __builtin_sqrtf(sum(squares)) * (1.f + slack) + LOST;
    float far = 0.f;
    for (int64_t i = 0; i < count; i++) {
        vf distance = splat(0.f);
        for (int64_t d = 0; d < dim; d += LANES) {
            const vf x = load(keys, i * dim + d, bf16) - load(mean, d, 0);
            distance = fma(x, x, distance);
        }
        const float all = sum(distance);
        far = all > far ? all : far;
    }
    /* Rounding: of the squares' sum, dim + 8 at most; of the decoded mean and the difference, one each. */
    steps[2] = __builtin_sqrtf(far) * (1.f + slack) + norm * 0x1p-22f + LOST;
    steps[3] = norm;
}

/* The least step with 127 steps >= top. */
INLINE float box_step(float top) {
    float step = top / 127.f;
    while ((double)step * 127. < (double)top) {
        uint32_t bits;
        memcpy(&bits, &step, sizeof bits);
        bits++;
        memcpy(&step, &bits, sizeof step);
    }
    return step;
}

/* The least code that is not below x. A code times a step is exact in double. */
INLINE int box_code(float x, float step) {
    if (step == 0.f) return 0;
    int code = (int)((double)x / (double)step);
    while ((double)code * (double)step < (double)x) code++;
    return code;
}

INLINE void box_unit(const void *keys, int64_t count, int64_t dim, uint8_t *codes, float *steps, const int bf16) {
    float high[MAX_HEAD] __attribute__((aligned(64))), low[MAX_HEAD] __attribute__((aligned(64)));
    vf top = splat(0.f), bottom = splat(0.f), odd = splat(0.f);
    for (int64_t d = 0; d < dim; d += LANES) {
        vf h = load(keys, d, bf16), l = h;
        for (int64_t i = 0; i < count; i++) {
            const vf x = load(keys, i * dim + d, bf16);
            h = larger(x, h), l = (vf)pick(x < l, (vi)x, (vi)l);
            odd += x * 0.f;
        }
        store(high, d, h, 0), store(low, d, l, 0);
        top = larger((vf)((vi)h & 0x7fffffff), top), bottom = larger((vf)((vi)l & 0x7fffffff), bottom);
    }
    if (sum(odd) != 0.f) {
        steps[0] = steps[1] = steps[2] = steps[3] = __builtin_nanf("");
        memset(codes, 0, (size_t)(2 * dim));
        return;
    }
    steps[0] = box_step(largest(top)), steps[1] = box_step(largest(bottom));
    double high_norm = 0., low_norm = 0.;
    for (int64_t d = 0; d < dim; d++) {
        const int h = box_code(high[d], steps[0]), l = -box_code(-low[d], steps[1]);
        codes[d] = (uint8_t)h, codes[dim + d] = (uint8_t)l;
        high_norm += (double)h * h, low_norm += (double)l * l;
    }
    const double norm = __builtin_sqrt(high_norm) * (double)steps[0] + __builtin_sqrt(low_norm) * (double)steps[1];
    steps[2] = 0.f;
    steps[3] = (float)(norm * (1. + 0x1p-22)) + LOST;
}

/* The summary of the unit whose first key is `keys` and of which `count` keys are written. */
static __attribute__((noinline)) void summarize_unit(int64_t rule, const void *keys, int64_t count, int64_t dim,
                                                     uint8_t *codes, float *steps, int bf16) {
    if (rule == BOX && bf16) box_unit(keys, count, dim, codes, steps, 1);
    else if (rule == BOX) box_unit(keys, count, dim, codes, steps, 0);
    else if (bf16) mean_unit(keys, count, dim, rule == MEAN_VARIANCE, codes, steps, 1);
    else mean_unit(keys, count, dim, rule == MEAN_VARIANCE, codes, steps, 0);
}

static void run_summary(void *task, int64_t thread, int64_t num_threads) {
    struct summary_task *t = task;
    const int64_t num_units = t->plan[t->num_runs], planes = t->rule == MEAN ? 1 : 2, size = t->bf16 ? 2 : 4;
    const int64_t dim = t->head_dim, at_once = 32;
    (void)thread, (void)num_threads;
    for (int64_t item = claim(&t->next, at_once); item < num_units * t->kv_heads; item = claim(&t->next, at_once)) {
        int64_t run = 0;
        for (int64_t i = item; i < least(item + at_once, num_units * t->kv_heads); i++) {
            const int64_t head = i / num_units, local = i % num_units;
            if (!local) run = 0;
            while (t->plan[run + 1] <= local) run++;
            const int64_t unit = t->runs[2 * run] / UNIT + local - t->plan[run];
            const int64_t count = least(UNIT, t->runs[2 * run + 1] - unit * UNIT);
            const int64_t at = head * (t->num_slots / UNIT) + unit;
            const char *keys = (const char *)t->cache + (head * t->num_slots + unit * UNIT) * dim * size;
            uint8_t *codes = t->codes + at * planes * dim;
            summarize_unit(t->rule, keys, count, dim, codes, t->steps + 4 * at, t->bf16);
        }
    }
}

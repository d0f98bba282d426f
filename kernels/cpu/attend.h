/* Decode attention over a paged store: one query a request, out = softmax(scale * q k^T) v.
 *
 * cache: [2, kv_heads, num_slots, head_dim], slot = page * page_size + offset. Queries and keys are rotated here (halves
 * paired, as in Llama), the new key and value written; the query group of a KV head reads each key once. Contexts are
 * cut at multiples of SPLIT tokens; an item of work is one request, KV head and cut, and whoever ends the last item of a
 * (request, KV head) merges its parts in order. So a result depends neither on the batch, nor on the pages that a
 * request got, nor on the number of threads. Float32 inside. */

#define rotate_head NAME(rotate_head_)
#define scores NAME(scores_)
#define add_values NAME(add_values_)
#define list_slots NAME(list_slots_)
#define attend_heads NAME(attend_heads_)
#define attend_kind NAME(attend_kind_)
#define attend_part NAME(attend_part_)
#define merge_parts NAME(merge_parts_)
#define run_attend NAME(run_attend_)
#define BLOCK 64

INLINE void rotate_head(const struct attend_task *t, const float *cos, const float *sin, int64_t from, float *out) {
    const int64_t half = t->rotary / 2;
    for (int64_t d = 0; d < half; d++) {
        float a = get(t->qkv, from + d, t->bf16), b = get(t->qkv, from + half + d, t->bf16);
        out[d] = a * cos[d] - b * sin[d];
        out[half + d] = b * cos[d] + a * sin[d];
    }
    for (int64_t d = t->rotary; d < t->head_dim; d++) out[d] = get(t->qkv, from + d, t->bf16);
}

/* s[g][i] = q[g] . key(slots[i]), four keys at a time, the last one repeated where there are fewer. Keys are `stride`
 * elements apart and stored as `kind` says. Meanwhile the rows of `next` are fetched. */
INLINE void scores(const void *keys, const int64_t *slots, int64_t count, int64_t stride, int64_t dim,
                   float q[][MAX_HEAD], const int group, const int kind, float s[][BLOCK], const struct rows *next) {
    for (int64_t i = 0; i < count; i += 4) {
        vf acc[GROUP][4];
        int64_t at[4];
        for (int j = 0; j < 4; j++) fetch(next, i + j);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) at[j] = slots[least(i + j, count - 1)] * stride;
#pragma GCC unroll 4
        for (int g = 0; g < group; g++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) acc[g][j] = splat(0.f);
        for (int64_t d = 0; d < dim; d += LANES) {
            vf k[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) k[j] = load(keys, at[j] + d, kind);
#pragma GCC unroll 4
            for (int g = 0; g < group; g++) {
                vf a = load(q[g], d, 0);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) acc[g][j] = fma(a, k[j], acc[g][j]);
            }
        }
#if LANES == 16
        if (group == 4) {
            v4 fours[4];
            sum16(acc, fours);
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) memcpy(&s[g][i], &fours[g], sizeof fours[g]);
            continue;
        }
#endif
#pragma GCC unroll 4
        for (int g = 0; g < group; g++) {
            v4 four = sum4(acc[g][0], acc[g][1], acc[g][2], acc[g][3]);
            memcpy(&s[g][i], &four, sizeof four);
        }
    }
}

/* out[g] = out[g] * keep[g] + sum over i of p[g][i] value(slots[i]), for `wide` vectors from d on. Meanwhile the rows of
 * `next` are fetched. */
INLINE void add_values(const void *values, const int64_t *slots, int64_t count, int64_t dim, int64_t d,
                       float p[][BLOCK], const float *keep, const int group, const int wide, const int bf16,
                       float out[][MAX_HEAD], const struct rows *next) {
    vf acc[GROUP][WIDE];
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++) acc[g][w] = load(out[g], d + w * LANES, 0) * keep[g];
    for (int64_t i = 0; i < count; i++) {
        vf v[WIDE];
        fetch(next, i);
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++) v[w] = load(values, slots[i] * dim + d + w * LANES, bf16);
#pragma GCC unroll 4
        for (int g = 0; g < group; g++) {
            vf a = splat(p[g][i]);
#pragma GCC unroll 4
            for (int w = 0; w < wide; w++) acc[g][w] = fma(a, v[w], acc[g][w]);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < group; g++)
#pragma GCC unroll 4
        for (int w = 0; w < wide; w++) store(out[g], d + w * LANES, acc[g][w], 0);
}

/* The slots of the tokens first to first + count - 1: of the context, or, with a list of kept units, of these strung
 * together. */
INLINE void list_slots(const int64_t *pages, int64_t page_size, const int32_t *kept, int64_t first, int64_t count,
                       int64_t *slots) {
    for (int64_t i = 0; i < count;) {
        const int64_t from = first + i, at = kept ? kept[from / UNIT] * (int64_t)UNIT + from % UNIT : from;
        const int64_t page = at / page_size, offset = at - page * page_size;
        const int64_t run = least(count - i, kept ? UNIT - from % UNIT : page_size - offset);
        for (int64_t j = 0; j < run; j++) slots[i + j] = pages[page] * page_size + offset + j;
        i += run;
    }
}

/* Online softmax of `group` queries over the tokens first to last - 1 (of the kept units, if any are given): out[g]
 * unnormalised, its maximum and its sum; in tilt, if wanted, the sum of weight * (score - maximum). */
INLINE void NAME(attend_group_)(const struct attend_task *t, const int64_t *pages, const int32_t *kept,
                                const void *keys, const void *values, int64_t first, int64_t last, float q[][MAX_HEAD],
                                const int group, const int bf16, float out[][MAX_HEAD], float *top, float *total,
                                float *tilt) {
    float s[GROUP][BLOCK] __attribute__((aligned(64))), keep[GROUP];
    int64_t places[2][BLOCK], *slots = places[0], *next_slots = places[1];
    const int64_t bytes = t->head_dim * (bf16 ? 2 : 4);
    const struct rows none = {0};
    for (int g = 0; g < group; g++) {
        top[g] = -__builtin_inff(), total[g] = 0.f;
        if (tilt) tilt[g] = 0.f;
        memset(out[g], 0, sizeof(float) * (size_t)t->head_dim);
    }
    const struct rows own = {values, slots, least(BLOCK - first % BLOCK, last - first), bytes};
    list_slots(pages, t->page_size, kept, first, own.count, slots);
    for (int64_t i = 0; i < own.count; i++) fetch(&own, i);
    for (int64_t start = first; start < last;) {
        const int64_t end = least((start / BLOCK + 1) * BLOCK, last), count = end - start;
        const struct rows next_keys = {keys, next_slots, least(BLOCK, last - end), bytes};
        const struct rows next_values = {values, next_slots, next_keys.count, bytes};
        list_slots(pages, t->page_size, kept, end, next_keys.count, next_slots);
        scores(keys, slots, count, t->head_dim, t->head_dim, q, group, bf16, s, &next_keys);
        for (int g = 0; g < group; g++) {
            for (int64_t i = count; i < (count + LANES - 1) / LANES * LANES; i++) s[g][i] = -__builtin_inff();
            vf most_yet = splat(top[g]), block = splat(0.f), tilted = splat(0.f);
            for (int64_t i = 0; i < count; i += LANES) most_yet = larger(load(s[g], i, 0), most_yet);
            const float highest = largest(most_yet);
            float added = 0.f;
            for (int64_t i = 0; i < count; i += LANES) {
                vf x = load(s[g], i, 0), p = expv(x - highest);
                p = (vf)((vi)p & (x != -__builtin_inff()));
                store(s[g], i, p, 0);
                block += p;
                if (tilt) tilted += (vf)((vi)(p * (x - highest)) & (x != -__builtin_inff()));
            }
            added = sum(block);
            keep[g] = top[g] == highest ? 1.f : expv(splat(top[g] - highest))[0];
            if (tilt && top[g] != highest && total[g] != 0.f) tilt[g] += total[g] * (top[g] - highest);
            if (tilt) tilt[g] = tilt[g] * keep[g] + sum(tilted);
            total[g] = total[g] * keep[g] + added;
            top[g] = highest;
        }
        int64_t d = 0;
        for (; d + WIDE * LANES <= t->head_dim; d += WIDE * LANES)
            add_values(values, slots, count, t->head_dim, d, s, keep, group, WIDE, bf16, out, d ? &none : &next_values);
        for (; d < t->head_dim; d += LANES)
            add_values(values, slots, count, t->head_dim, d, s, keep, group, 1, bf16, out, d ? &none : &next_values);
        int64_t *const done = slots;
        slots = next_slots, next_slots = done;
        start = end;
    }
}

/* The parts of a (request, KV head) to one row: sum of parts, each weighted by e^(its maximum - the greatest). */
INLINE void merge_parts(const struct attend_task *t, const float *parts, int64_t num_parts, int64_t stride,
                        int64_t out_at) {
    const int64_t dim = t->head_dim;
    float top = -__builtin_inff(), total = 0.f, out[MAX_HEAD] = {0};
    for (int64_t i = 0; i < num_parts; i++) top = parts[i * stride + dim] > top ? parts[i * stride + dim] : top;
    for (int64_t i = 0; i < num_parts; i++) {
        const float *part = parts + i * stride;
        const float weight = part[dim] == top ? 1.f : expv(splat(part[dim] - top))[0];
        total += part[dim + 1] * weight;
        for (int64_t d = 0; d < dim; d++) out[d] += part[d] * weight;
    }
    for (int64_t d = 0; d < dim; d++) put(t->out, out_at + d, out[d] / total, t->bf16);
}

/* Rotates and writes the request's new key, and writes its new value. */
INLINE void NAME(write_token_)(const struct attend_task *t, const float *cos, const float *sin, int64_t row, int64_t head,
                               int64_t slot, void *keys, void *values) {
    float key[MAX_HEAD];
    const int64_t dim = t->head_dim, width = (t->heads + 2 * t->kv_heads) * dim;
    const int64_t from = row * width + (t->heads + head) * dim;
    rotate_head(t, cos, sin, from, key);
    for (int64_t d = 0; d < dim; d++) {
        put(keys, slot * dim + d, key[d], t->bf16);
        put(values, slot * dim + d, get(t->qkv, from + t->kv_heads * dim + d, t->bf16), t->bf16);
    }
}

/* A part of the attention of a KV head's query group. to: per query its output, maximum, sum and, if wanted, tilt. */
INLINE void attend_heads(const struct attend_task *t, int64_t row, int64_t head, const int64_t *pages,
                         const int32_t *kept, const void *keys, const void *values, int64_t first, int64_t last,
                         const int bf16, int is_tilted, float *to) {
    const int64_t dim = t->head_dim, group = t->heads / t->kv_heads, width = (t->heads + 2 * t->kv_heads) * dim;
    const float *cos = t->cos + row * (t->rotary / 2), *sin = t->sin + row * (t->rotary / 2);
    for (int64_t from = 0; from < group; from += GROUP) {
        float q[GROUP][MAX_HEAD], out[GROUP][MAX_HEAD], top[GROUP], total[GROUP], tilts[GROUP];
        float *const tilt = is_tilted ? tilts : 0;
        const int64_t count = least(GROUP, group - from);
        for (int64_t g = 0; g < count; g++) {
            rotate_head(t, cos, sin, row * width + (head * group + from + g) * dim, q[g]);
            for (int64_t d = 0; d < dim; d++) q[g][d] *= t->scale;
        }
#define ATTEND(n) \
    NAME(attend_group_)(t, pages, kept, keys, values, first, last, q, n, bf16, out, top, total, tilt)
        switch (count) {
#if GROUP >= 4
        case 4: ATTEND(4); break;
        case 3: ATTEND(3); break;
#endif
        case 2: ATTEND(2); break;
        default: ATTEND(1); break;
        }
#undef ATTEND
        for (int64_t g = 0; g < count; g++, to += dim + 2 + is_tilted) {
            memcpy(to, out[g], sizeof(float) * (size_t)dim);
            to[dim] = top[g], to[dim + 1] = total[g];
            if (is_tilted) to[dim + 2] = tilts[g];
        }
    }
}

/* One copy serves dense and sparse attention. */
static __attribute__((noinline)) void attend_kind(const struct attend_task *t, int64_t row, int64_t head,
                                                  const int64_t *pages, const int32_t *kept, const void *keys,
                                                  const void *values, int64_t first, int64_t last, int is_tilted,
                                                  float *to) {
    if (t->bf16) attend_heads(t, row, head, pages, kept, keys, values, first, last, 1, is_tilted, to);
    else attend_heads(t, row, head, pages, kept, keys, values, first, last, 0, is_tilted, to);
}

INLINE void attend_part(struct attend_task *t, int64_t item, int64_t request, const int bf16) {
    const int64_t dim = t->head_dim, group = t->heads / t->kv_heads, size = bf16 ? 2 : 4;
    const int64_t row = t->requests[3 * request], context = t->requests[3 * request + 1];
    const int64_t *pages = t->pages + t->requests[3 * request + 2];
    const int64_t oldest = t->window ? most(0, context - t->window) : 0, num_parts = count_parts(context, oldest);
    const int64_t local = item - t->plan[request], head = local / num_parts, part = local % num_parts;
    const int64_t cut = oldest / SPLIT + part;
    const int64_t first = most(cut * SPLIT, oldest), last = least((cut + 1) * SPLIT, context);
    char *keys = (char *)t->cache + head * t->num_slots * dim * size, *values = keys + t->kv_heads * t->num_slots * dim * size;
    const int64_t stride = group * (dim + 2);
    if (last == context) {
        const float *cos = t->cos + row * (t->rotary / 2), *sin = t->sin + row * (t->rotary / 2);
        const int64_t at = context - 1, slot = pages[at / t->page_size] * t->page_size + at % t->page_size;
        NAME(write_token_)(t, cos, sin, row, head, slot, keys, values);
    }
    attend_kind(t, row, head, pages, 0, keys, values, first, last, 0, t->partial + item * stride);
    if (__atomic_sub_fetch(&t->open[request * t->kv_heads + head], 1, __ATOMIC_ACQ_REL)) return;
    for (int64_t g = 0; g < group; g++)
        merge_parts(t, t->partial + (item - part) * stride + g * (dim + 2), num_parts, stride,
                    (row * t->heads + head * group + g) * dim);
}

static void run_attend(void *task, int64_t thread, int64_t num_threads) {
    struct attend_task *t = task;
    const int64_t num_items = t->plan[t->num_requests];
    int64_t request = 0;
    (void)thread, (void)num_threads;
    for (int64_t item = claim(&t->next, 1); item < num_items; item = claim(&t->next, 1)) {
        while (t->plan[request + 1] <= item) request++; /* a thread's items only rise */
        if (t->bf16) attend_part(t, item, request, 1);
        else attend_part(t, item, request, 0);
    }
}

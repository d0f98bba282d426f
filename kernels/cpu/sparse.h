/* Decode attention to a kept part of the context: one query a request, each KV head with its own units of 16 tokens.
 *
 * A pair is a request and a KV head. Its work has two stages, each cut into items that threads claim one by one, all
 * pairs' first stages before all second ones:
 *     1. score: 256 units an item. The last item first writes the new key and value and makes their unit's summary anew.
 *        Whoever ends a pair's last item selects its units, lets the second stage begin, and sums up what is left out.
 *     2. attend: 512 tokens of the kept units, strung together, an item, by attend.h's online softmax. Whoever ends a
 *        pair's last item merges its parts in order.
 * A thread that claims a second-stage item before its pair has been selected waits for it: that work is then under way
 * on other threads and takes microseconds. What an item computes depends on its pair alone, so a result depends neither
 * on the batch, nor on the pages that a request got, nor on the number of threads. Where a budget covers the visible
 * context nothing is scored and the parts are those of attend.h, with its bits.
 *
 * Score of a unit for a query head, with the rotated query q times the scale, summaries as in summary.h:
 *     log n + step0 * (a . codes of plane 0) + step1 * (b . codes of plane 1)
 *     MEAN_VARIANCE: a = q, b = q^2 / 2.   BOX: a = max(q, 0), b = min(q, 0).   MEAN: no second plane.
 * n: visible tokens. A KV head's score is the largest of its queries'; NaN counts as infinity, so that what cannot be
 * judged is kept. The units of the first num_sinks and the last num_recent tokens are kept first, then by score, the
 * lower unit first where scores are equal. Order and choice are exact: a binary search for the threshold.
 *
 * The bound of a unit's log mass for one query, at least log of the sum of e^(logit) over its visible tokens:
 *     log n + x + |q| radius + slack * |q| (norm + radius) + 2^-20,    x the score's part without log n and variance
 * In exact arithmetic a logit is at most x + |q| radius. Rounding: with u = 2^-24 and R = |q| (norm + radius), a sum of
 * dim products in any order is off by less than dim * u * R; rotation, scale and |q| by 3, 1 and 2 u R; the last products
 * and sums by fewer than 10. So slack = (dim + 32) u covers all that grows with R, 2^-20 what is added to log n <= 2.8.
 * Summing e^x over dropped units adds, relatively: e^x itself 4 u and the difference before it 90 u, at most 64 sums a
 * lane and a fold before they go on in double, 72 u: less than 2^-16, which is added to the log.
 *
 * The dropped share follows from this bound and from the log of the kept mass, which rounding may have raised: by no more
 * than slack * |q| (norm + radius) of the kept units, the largest of which is added to the bound as well. */

#define list_units NAME(list_units_)
#define score_units NAME(score_units_)
#define score_block NAME(score_block_)
#define count_keys NAME(count_keys_)
#define rank_units NAME(rank_units_)
#define find_threshold NAME(find_threshold_)
#define keep_units NAME(keep_units_)
#define log_sum NAME(log_sum_)
#define kept_slack NAME(kept_slack_)
#define report_dropped NAME(report_dropped_)
#define report_kept NAME(report_kept_)
#define score_item NAME(score_item_)
#define attend_item NAME(attend_item_)
#define run_sparse NAME(run_sparse_)

/* The new key and value, and the summary of their unit, which the request has `count` tokens in. */
INLINE void NAME(write_unit_)(const struct sparse_task *t, const struct pair *p) {
    const struct attend_task *a = &t->base;
    const int64_t dim = a->head_dim, at = p->context - 1, size = a->bf16 ? 2 : 4, rule = t->step->rule;
    const int64_t slot = p->pages[at / a->page_size] * a->page_size + at % a->page_size, count = at % UNIT + 1;
    const float *cos = a->cos + p->row * (a->rotary / 2), *sin = a->sin + p->row * (a->rotary / 2);
    char *keys = (char *)a->cache + p->head * a->num_slots * dim * size;
    NAME(write_token_)(a, cos, sin, p->row, p->head, slot, keys, keys + a->kv_heads * a->num_slots * dim * size);
    if (rule == WINDOW) return;
    const int64_t unit = p->head * (a->num_slots / UNIT) + slot / UNIT, planes = rule == MEAN ? 1 : 2;
    summarize_unit(rule, keys + (slot / UNIT * UNIT) * dim * size, count, dim, t->codes + unit * planes * dim,
                   t->steps + 4 * unit, a->bf16);
}

/* Scores and bounds of `count` units for `group` queries, to columns `column` and on of the pair's rows from `from` on;
 * next: codes of the units that follow. */
INLINE void score_block(const struct sparse_task *t, const struct pair *p, const int64_t *units, int64_t count,
                        const struct rows *next, int64_t column, int64_t from, float a[][MAX_HEAD], float b[][MAX_HEAD],
                        const float *size, const int group, const int rule) {
    const int64_t dim = t->base.head_dim, stride = (rule == MEAN ? 1 : 2) * dim;
    const uint8_t *codes = t->codes + p->head * (t->base.num_slots / UNIT) * stride;
    const float *steps = t->steps + p->head * (t->base.num_slots / UNIT) * 4;
    const float slack = (float)(dim + 32) * 0x1p-24f;
    const struct rows none = {0}, next_steps = {steps, next->at, next->count, 4 * sizeof *steps};
    float first[GROUP][BLOCK] __attribute__((aligned(64))), second[GROUP][BLOCK] __attribute__((aligned(64)));
    float columns[4][BLOCK] __attribute__((aligned(64))), logs[BLOCK] __attribute__((aligned(64)));
    for (int64_t i = 0; i < count; i++) {
        for (int j = 0; j < 4; j++) columns[j][i] = steps[4 * units[i] + j];
        logs[i] = LOG_UNIT;
        fetch(&next_steps, i);
    }
    if (!column) logs[0] = p->first_log;
    if (column + count == p->num_units) logs[count - 1] = p->last_log;
    scores(codes, units, count, stride, dim, a, group, SIGNED, first, next);
    if (rule == MEAN_VARIANCE) scores(codes + dim, units, count, stride, dim, b, group, UNSIGNED, second, &none);
    if (rule == BOX) scores(codes + dim, units, count, stride, dim, b, group, SIGNED, second, &none);
    for (int g = 0; g < group; g++) {
        float *score = p->score + (from + g) * p->width + column, *bound = score + p->group * p->width;
        for (int64_t i = 0; i < count; i += LANES) {
            vf x = load(first[g], i, 0) * load(columns[0], i, 0), y = splat(0.f);
            const vf n = load(logs, i, 0), radius = load(columns[2], i, 0), norm = load(columns[3], i, 0);
            if (rule != MEAN) y = load(second[g], i, 0) * load(columns[1], i, 0);
            if (rule == BOX) x = x + y, y = splat(0.f);
            vf at_most = n + x + radius * size[g] + (norm + radius) * (slack * size[g]) + 0x1p-20f;
            vf estimate = n + x + y;
            at_most = (vf)pick(at_most != at_most, (vi)splat(__builtin_inff()), (vi)at_most);
            estimate = (vf)pick(estimate != estimate, (vi)splat(__builtin_inff()), (vi)estimate);
            store(bound, i, at_most, 0), store(score, i, estimate, 0);
        }
    }
}

/* Where the units first to first + count - 1 of those that the pair sees lie. */
INLINE void list_units(const struct pair *p, int64_t page_size, int64_t first, int64_t count, int64_t *units) {
    const int64_t a_page = page_size / UNIT;
    for (int64_t i = 0; i < count;) {
        const int64_t unit = p->first_unit + first + i, page = unit / a_page, offset = unit - page * a_page;
        const int64_t run = least(count - i, a_page - offset);
        for (int64_t j = 0; j < run; j++) units[i + j] = p->pages[page] * a_page + offset + j;
        i += run;
    }
}

/* Units first to last - 1 of those that the pair sees, for all its queries. */
INLINE void score_units(const struct sparse_task *t, const struct pair *p, int64_t first, int64_t last) {
    const struct attend_task *base = &t->base;
    const int64_t dim = base->head_dim, width = (base->heads + 2 * base->kv_heads) * dim, rule = t->step->rule;
    const int64_t stride = (rule == MEAN ? 1 : 2) * dim;
    const uint8_t *codes = t->codes + p->head * (base->num_slots / UNIT) * stride;
    const float *cos = base->cos + p->row * (base->rotary / 2), *sin = base->sin + p->row * (base->rotary / 2);
    const float *steps = t->steps + p->head * (base->num_slots / UNIT) * 4;
    int64_t own[BLOCK];
    const struct rows own_codes = {codes, own, least(BLOCK, last - first), stride};
    const struct rows own_steps = {steps, own, own_codes.count, 4 * sizeof *steps};
    list_units(p, base->page_size, first, own_codes.count, own);
    for (int64_t i = 0; i < own_codes.count; i++) fetch(&own_codes, i), fetch(&own_steps, i);
    for (int64_t from = 0; from < p->group; from += GROUP) {
        float a[GROUP][MAX_HEAD], b[GROUP][MAX_HEAD], size[GROUP];
        const int64_t group = least(GROUP, p->group - from);
        for (int64_t g = 0; g < group; g++) {
            double squares = 0.;
            rotate_head(base, cos, sin, p->row * width + (p->head * p->group + from + g) * dim, a[g]);
            for (int64_t d = 0; d < dim; d++) {
                const float x = a[g][d] * base->scale;
                squares += (double)x * (double)x;
                a[g][d] = rule == BOX && x < 0.f ? 0.f : x;
                b[g][d] = rule == BOX ? x - a[g][d] : x * x * 0.5f;
            }
            size[g] = (float)__builtin_sqrt(squares);
        }
        int64_t places[2][BLOCK], *units = places[0], *next_units = places[1];
        memcpy(units, own, sizeof *own * (size_t)own_codes.count);
        for (int64_t start = first; start < last; start += BLOCK) {
            const int64_t count = least(BLOCK, last - start), end = start + count;
            const struct rows next = {codes, next_units, least(BLOCK, last - end), stride};
            list_units(p, base->page_size, end, next.count, next_units);
#define SCORE_BLOCK(n, rule) score_block(t, p, units, count, &next, start, from, a, b, size, n, rule); break
#define BY_RULE(n) \
    switch (rule) { \
    case BOX: SCORE_BLOCK(n, BOX); \
    case MEAN_VARIANCE: SCORE_BLOCK(n, MEAN_VARIANCE); \
    default: SCORE_BLOCK(n, MEAN); \
    } \
    break
            switch (group) {
#if GROUP >= 4
            case 4: BY_RULE(4);
            case 3: BY_RULE(3);
#endif
            case 2: BY_RULE(2);
            default: BY_RULE(1);
            }
#undef SCORE_BLOCK
#undef BY_RULE
            int64_t *const done = units;
            units = next_units, next_units = done;
        }
    }
}

/* Whole numbers in the order of the pair's scores; ALWAYS for what is kept in any case, GONE behind the last unit. */
INLINE void rank_units(const struct pair *p) {
    for (int64_t i = 0; i < p->width; i += LANES) {
        vi best = GONE - (vi){0};
        for (int64_t g = 0; g < p->group; g++) {
            const vi bits = (vi)(load(p->score + g * p->width, i, 0) + 0.f); /* no -0 */
            const vi key = bits ^ ((bits >> 31) & 0x7fffffff);
            best = pick(key > best, key, best);
        }
        memcpy(p->keys + i, &best, sizeof best);
    }
    for (int64_t i = p->num_units; i < p->width; i++) p->keys[i] = GONE;
    for (int64_t i = 0; i < p->num_first; i++) p->keys[i] = ALWAYS;
    for (int64_t i = p->newest; i < p->num_units; i++) p->keys[i] = ALWAYS;
}

INLINE int64_t count_keys(const int32_t *keys, int64_t width, int32_t least_key) {
    vi total = {0};
    for (int64_t i = 0; i < width; i += LANES) {
        vi key;
        memcpy(&key, keys + i, sizeof key);
        total -= key >= least_key;
    }
    int64_t count = 0;
    for (int i = 0; i < LANES; i++) count += total[i];
    return count;
}

/* The largest number that at least p->num_kept keys reach, or one that exactly so many do. */
INLINE int32_t find_threshold(const struct pair *p) {
    int64_t low = GONE, high = (int64_t)ALWAYS + 1;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2, count = count_keys(p->keys, p->width, (int32_t)middle);
        if (count == p->num_kept) return (int32_t)middle;
        if (count > p->num_kept) low = middle;
        else high = middle;
    }
    return (int32_t)low;
}

/* Writes the list of kept units, ascending, and takes them out of the keys. */
INLINE void keep_units(const struct sparse_task *t, const struct pair *p) {
    int32_t threshold = ALWAYS;
    if (p->is_covered || t->step->rule == WINDOW) {
        const int64_t from = p->is_covered ? 0 : p->num_units - (p->num_kept - p->num_first);
        for (int64_t i = 0; i < p->num_units; i++) p->keys[i] = i < p->num_first || i >= from ? ALWAYS : GONE;
    } else {
        rank_units(p);
        threshold = find_threshold(p);
    }
    int64_t equal = p->num_kept, count = 0; /* of those at the threshold, how many are kept */
    if (threshold < ALWAYS) equal -= count_keys(p->keys, p->width, threshold + 1);
    for (int64_t i = 0; count < p->num_kept; i++) {
        const int32_t key = p->keys[i];
        const int is_equal = key == threshold && equal > 0, is_kept = key > threshold || is_equal;
        equal -= is_equal;
        p->kept[count] = (int32_t)(p->first_unit + i);
        p->keys[i] = is_kept ? GONE : key;
        count += is_kept;
    }
    *p->num_kept_to = (int32_t)count;
}

/* log of the sum of e^x over the units that are left in the keys, and the largest x; -inf where none is left. */
INLINE float log_sum(const struct pair *p, const float *x, float *top_to) {
    vf highest = splat(-__builtin_inff());
    for (int64_t i = 0; i < p->width; i += LANES) {
        vi key;
        memcpy(&key, p->keys + i, sizeof key);
        highest = larger((vf)pick(key != GONE, (vi)load(x, i, 0), (vi)splat(-__builtin_inff())), highest);
    }
    const float top = *top_to = largest(highest);
    if (top - top != 0.f) return top; /* infinite */
    double total = 0.;
    for (int64_t start = 0; start < p->width; start += 64 * LANES) {
        vf block = splat(0.f);
        for (int64_t i = start; i < least(start + 64 * LANES, p->width); i += LANES) {
            vi key;
            memcpy(&key, p->keys + i, sizeof key);
            block += (vf)((vi)expv(load(x, i, 0) - top) & (key != GONE));
        }
        total += (double)sum(block);
    }
    return (float)((double)top + log_of(total));
}

/* How far rounding can raise the log of the kept mass of the pair's query g; inf or NaN where keys are not finite. */
INLINE float kept_slack(const struct sparse_task *t, const struct pair *p, int64_t g) {
    const struct attend_task *a = &t->base;
    const int64_t dim = a->head_dim, from = p->row * (a->heads + 2 * a->kv_heads) * dim;
    const int64_t a_page = a->page_size / UNIT, num_units = a->num_slots / UNIT;
    const float *cos = a->cos + p->row * (a->rotary / 2), *sin = a->sin + p->row * (a->rotary / 2);
    float q[MAX_HEAD], longest = 0.f;
    double squares = 0.;
    rotate_head(a, cos, sin, from + (p->head * p->group + g) * dim, q);
    for (int64_t d = 0; d < dim; d++) squares += (double)q[d] * (double)q[d];
    for (int64_t i = 0; i < p->num_kept; i++) {
        const int64_t unit = p->pages[p->kept[i] / a_page] * a_page + p->kept[i] % a_page;
        const float *steps = t->steps + 4 * (p->head * num_units + unit), length = steps[2] + steps[3];
        if (!(length <= longest)) longest = length != length ? __builtin_inff() : length;
    }
    return (float)(dim + 32) * 0x1p-24f * (float)__builtin_sqrt(squares) * a->scale * longest;
}

/* Columns 2 to 5 of the diagnostics: what was left out. */
INLINE void report_dropped(const struct sparse_task *t, const struct pair *p) {
    const int64_t lead = p->kept[0] == p->first_unit ? p->oldest % UNIT : 0;
    const int is_first_left = p->kept[0] != p->first_unit, is_unknown = !p->is_covered && t->step->rule == WINDOW;
    for (int64_t g = 0; g < p->group; g++) {
        float *to = p->diagnostics + 6 * g, top;
        to[5] = (float)(p->is_covered ? p->context - p->oldest : p->strung_end - lead);
        to[2] = to[3] = is_unknown ? __builtin_nanf("") : -__builtin_inff();
        to[4] = is_unknown ? __builtin_inff() : -__builtin_inff();
        if (p->is_covered || is_unknown) continue;
        to[4] = log_sum(p, p->bound + g * p->width, &top) + 0x1p-16f + kept_slack(t, p, g);
        if (to[4] != to[4]) to[4] = __builtin_inff();
        to[2] = log_sum(p, p->score + g * p->width, &top);
        to[3] = top - LOG_UNIT;
        const float first = p->score[g * p->width] - p->first_log; /* of a unit that may be seen in part */
        if (is_first_left && first > to[3]) to[3] = first;
    }
}

INLINE void score_item(const struct sparse_task *t, const struct pair *p, int64_t cut, int32_t *open, int32_t *ready) {
    const int64_t first = cut * SCORE, last = least(first + SCORE, p->num_units);
    if (cut == p->num_cuts - 1) NAME(write_unit_)(t, p);
    if (!p->is_covered && t->step->rule != WINDOW) score_units(t, p, first, last);
    if (__atomic_sub_fetch(open, 1, __ATOMIC_ACQ_REL)) return;
    keep_units(t, p);
    __atomic_store_n(ready, 1, __ATOMIC_RELEASE);
    report_dropped(t, p);
}

/* Columns 0 and 1, from the parts of one query: log of the kept mass, and the entropy inside. */
INLINE void report_kept(const float *parts, int64_t num_parts, int64_t stride, int64_t dim, float *to) {
    float top = -__builtin_inff();
    double total = 0., tilt = 0.;
    for (int64_t i = 0; i < num_parts; i++) top = parts[i * stride + dim] > top ? parts[i * stride + dim] : top;
    for (int64_t i = 0; i < num_parts; i++) {
        const float *part = parts + i * stride + dim;
        const float weight = part[0] == top ? 1.f : expv(splat(part[0] - top))[0];
        total += (double)(part[1] * weight);
        tilt += (double)weight * (double)part[2];
        if (part[0] != top) tilt += (double)weight * (double)part[1] * (double)(part[0] - top);
    }
    if (!(total - total == 0. && total > 0.)) { /* a NaN among the keys, or logits beyond float32 */
        to[0] = to[1] = __builtin_nanf("");
        return;
    }
    const double log_total = log_of(total), entropy = log_total - tilt / total;
    to[0] = (float)((double)top + log_total);
    to[1] = entropy < 0. ? 0.f : (float)entropy; /* one key: rounding alone */
}

INLINE void attend_item(const struct sparse_task *t, const struct pair *p, int64_t item, int64_t part, int32_t *open,
                        const int32_t *ready) {
    const struct attend_task *a = &t->base;
    const int64_t dim = a->head_dim, size = a->bf16 ? 2 : 4, stride = p->group * (dim + 3);
    const char *keys = (const char *)a->cache + p->head * a->num_slots * dim * size;
    const char *values = keys + a->kv_heads * a->num_slots * dim * size;
    await(ready);
    const int64_t begin = p->is_covered ? p->oldest : p->kept[0] == p->first_unit ? p->oldest % UNIT : 0;
    const int64_t end = p->is_covered ? p->context : p->strung_end, cut = begin / SPLIT + part;
    attend_kind(a, p->row, p->head, p->pages, p->is_covered ? 0 : p->kept, keys, values, most(cut * SPLIT, begin),
                least((cut + 1) * SPLIT, end), 1, a->partial + item * stride);
    if (__atomic_sub_fetch(open, 1, __ATOMIC_ACQ_REL)) return;
    for (int64_t g = 0; g < p->group; g++) {
        const float *parts = a->partial + (item - part) * stride + g * (dim + 3);
        merge_parts(a, parts, p->num_parts, stride, (p->row * a->heads + p->head * p->group + g) * dim);
        report_kept(parts, p->num_parts, stride, dim, p->diagnostics + 6 * g);
    }
}

static void run_sparse(void *task, int64_t thread, int64_t num_threads) {
    struct sparse_task *t = task;
    const struct sparse_step *s = t->step;
    const int64_t num_pairs = t->num_pairs, num_items = s->items[2 * num_pairs];
    int32_t *open = s->open, *ready = open + 2 * num_pairs;
    int64_t job = 0; /* a pair's first stage, or, behind all of them, its second */
    (void)thread, (void)num_threads;
    for (int64_t item = claim(&t->next, 1); item < num_items; item = claim(&t->next, 1)) {
        while (s->items[job + 1] <= item) job++; /* a thread's items only rise */
        const int64_t local = item - s->items[job], index = job % num_pairs;
        const struct pair p = pair_of(t, index);
        if (job < num_pairs) score_item(t, &p, local, open + job, ready + index);
        else attend_item(t, &p, item - s->items[num_pairs], local, open + job, ready + index);
    }
}

/* What steps cost: as simulate.py, coefficients.py and work.py say it. native.c includes this once, after jobs.h. */

static double tokens_s(const struct machine *m, int64_t num_tokens) {
    int index = -1;
    while (index + 1 < NUM_KNOTS && m->knots[index + 1] <= (double)num_tokens) index++;
    if (index < 0) return m->base_s;
    return m->at_knots[index] + ((double)num_tokens - m->knots[index]) * m->per_token_s[index];
}

static int64_t attended_to(int64_t start, int64_t end) { return (end * (end + 1) - start * (start + 1)) / 2; }

/* As WorkModel.dense_pairs. */
static int64_t dense_pairs(const struct machine *m, int64_t start, int64_t end) {
    int64_t pairs = 0;
    for (int i = 0; i < (int)m->num_windows; i++) {
        const int64_t window = (int64_t)m->window[i], count = (int64_t)m->count[i];
        if (!window) {
            pairs += count * attended_to(start, end);
            continue;
        }
        int64_t full = end < window ? end : window;
        if (full < start) full = start;
        pairs += count * (attended_to(start, full) + (end - full) * window);
    }
    return pairs;
}

static double item(const struct machine *m, int64_t num_tokens, int64_t num_rows, double num_pairs) {
    return (double)num_tokens * m->weights + (double)num_rows * m->head + num_pairs * m->pair;
}

static void add(struct sums *sums, const struct job *job, double context, int sign) {
    sums->num += sign;
    sums->fixed_s += sign * job->fixed_s;
    sums->context_s += sign * job->context_s * context;
    sums->growth_s += sign * job->context_s;
    sums->fixed_pairs += sign * job->fixed_pairs;
    sums->context_pairs += sign * job->context_pairs * context;
    sums->growth_pairs += sign * job->context_pairs;
}

static void advance(struct sums *sums, double num_steps) {
    sums->context_s += sums->growth_s * num_steps;
    sums->context_pairs += sums->growth_pairs * num_steps;
}

static double mean_pairs(const struct sums *sums, double num_steps) {
    return sums->fixed_pairs + sums->context_pairs + sums->growth_pairs * (num_steps - 1) / 2;
}

/* Seconds of all that decode and the chunks, `extra` tokens of one more job among them where it is not negative. */
static double step_s(const struct simulation *s, int32_t extra, int64_t extra_tokens) {
    const struct machine *m = s->m;
    const int64_t num_chunks = s->num_chunks + (extra >= 0);
    int64_t num_tokens = s->all.num, num_single = s->all.num, num_rows = 0, pairs = 0;
    for (int64_t i = 0; i < num_chunks; i++) {
        const struct job *job = s->jobs + (i < s->num_chunks ? s->chunks[i].job : extra);
        const int64_t chunk = i < s->num_chunks ? s->chunks[i].num_tokens : extra_tokens, end = job->computed + chunk;
        pairs += dense_pairs(m, job->computed, end);
        num_tokens += chunk, num_single += chunk == 1, num_rows += end == job->known;
    }
    double seconds =
        tokens_s(m, num_tokens) + s->all.fixed_s + s->all.context_s + m->counts_s[PROMPT_PAIRS] * (double)pairs;
    const int64_t num_prompt = num_tokens - num_single;
    if (num_single && num_prompt && (double)num_prompt <= m->max_split_tokens) seconds += m->counts_s[SPLIT];
    return seconds + (double)num_chunks * m->counts_s[REQUESTS] + (double)num_rows * m->counts_s[ROWS];
}

/* As pace.promised_chunk. */
static int64_t promised_chunk(const struct simulation *s, int32_t job, int64_t at_most) {
    const struct machine *m = s->m;
    int64_t low = 0, high = at_most;
    if (step_s(s, job, at_most) + m->gap_s <= m->max_gap_s) return at_most;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (step_s(s, job, middle) + m->gap_s <= m->max_gap_s) low = middle;
        else high = middle;
    }
    const int64_t shortest = at_most < (int64_t)m->least_chunk ? at_most : (int64_t)m->least_chunk;
    return low >= shortest ? low : s->num_chunks ? 0 : shortest;
}

static int64_t chunk_of(const struct simulation *s, int32_t index, int64_t budget) {
    const struct job *job = s->jobs + index;
    const int64_t left = job->known - job->computed, at_most = left < budget ? left : budget;
    if (s->m->max_gap_s < 0 || !s->all.num || at_most <= 0) return at_most > 0 ? at_most : 0;
    return promised_chunk(s, index, at_most);
}

static double steps_in(const struct machine *m, double seconds, double first_s, double growth_s, double cold_s) {
    double num_steps;
    if (growth_s * seconds < 1e-3 * first_s * first_s) num_steps = seconds / first_s;
    else {
        const double b = first_s - growth_s / 2;
        num_steps = (sqrt(b * b + 2 * growth_s * seconds) - b) / growth_s;
    }
    if (cold_s < 1e-6 * first_s) return num_steps;
    const double all_cold_s = cold_s / (1.0 - m->cold_keep);
    for (int i = 0; i < 8; i++) {
        const double kept = pow(m->cold_keep, num_steps);
        const double off_s =
            num_steps * (first_s + growth_s * (num_steps - 1) / 2) + all_cold_s * (1.0 - kept) - seconds;
        const double slope_s = first_s + growth_s * (num_steps - 0.5) - all_cold_s * kept * m->log_cold_keep;
        num_steps = most(num_steps - off_s / slope_s, 0.0);
        if (fabs(off_s) < 1e-9 * first_s) break;
    }
    return num_steps;
}

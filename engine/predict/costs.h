/* What steps cost, and what jobs generate: as simulate.py, coefficients.py, work.py, lengths.py and decode_costs.py say
 * it. native.c includes this once, after jobs.h. */

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

/* Of all that decode and of chunks. */
struct step {
    int64_t num_chunks, num_tokens, num_single, num_rows, pairs;
};

static void add_chunk(const struct simulation *s, struct step *step, int32_t index, int64_t num_tokens) {
    const struct job *job = s->jobs + index;
    const int64_t end = job->computed + num_tokens;
    step->num_chunks++;
    step->num_tokens += num_tokens, step->num_single += num_tokens == 1;
    step->num_rows += end == job->known;
    step->pairs += dense_pairs(s->m, job->computed, end);
}

static struct step step_of(const struct simulation *s) {
    struct step step = {.num_tokens = s->all.num, .num_single = s->all.num};
    for (int64_t i = 0; i < s->num_chunks; i++) add_chunk(s, &step, s->chunks[i].job, s->chunks[i].num_tokens);
    return step;
}

/* Rows of the graph that holds so many tokens of prompts; 0 where none does. */
static int64_t prompt_rows(const struct machine *m, int64_t num_prompt) {
    if (!num_prompt) return 0;
    for (int i = 0; i < MAX_PROMPT_ROWS; i++)
        if (m->prompt_rows[i] >= (double)num_prompt) return (int64_t)m->prompt_rows[i];
    return 0;
}

static double step_s(const struct simulation *s, const struct step *step) {
    const struct machine *m = s->m;
    const int64_t num_prompt = step->num_tokens - step->num_single, num_rows = prompt_rows(m, num_prompt);
    double seconds = tokens_s(m, step->num_single + (num_rows ? num_rows : num_prompt)) + s->all.fixed_s +
                     s->all.context_s + m->counts_s[PROMPT_PAIRS] * (double)step->pairs;
    if (step->num_single && num_rows) seconds += m->counts_s[SPLIT];
    return seconds + (double)step->num_chunks * m->counts_s[REQUESTS] + (double)step->num_rows * m->counts_s[ROWS];
}

/* Seconds of the step with one more chunk, and of the gap behind it. */
static double with_chunk_s(const struct simulation *s, struct step step, int32_t job, int64_t num_tokens) {
    add_chunk(s, &step, job, num_tokens);
    return step_s(s, &step) + s->m->gap_s;
}

/* As pace.promised_chunk. */
static int64_t promised_chunk(const struct simulation *s, int32_t job, int64_t at_most) {
    const struct machine *m = s->m;
    const struct step before = step_of(s);
    int64_t low = 0, high = at_most;
    if (with_chunk_s(s, before, job, at_most) <= m->max_gap_s) return at_most;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (with_chunk_s(s, before, job, middle) <= m->max_gap_s) low = middle;
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

/* What jobs of the queue generate and cost. */

/* As OutputLengths._at: lengths has NUM_BINS times (survival, area, hazard). */
static double survival_at(const double *lengths, int64_t length, double *area) {
    if (length < 1) {
        *area = 0.0;
        return 1.0;
    }
    int index = 63 - __builtin_clzll((unsigned long long)length);
    if (index > NUM_BINS - 1) index = NUM_BINS - 1;
    const double *bin = lengths + 3 * index;
    const double decay = exp(-bin[2] * (double)(length + 1 - ((int64_t)1 << index)));
    *area = bin[1] + bin[0] * (1.0 - decay) / bin[2];
    return bin[0] * decay;
}

/* As OutputLengths.remaining. */
static double remaining(const double *lengths, int64_t num_generated, int64_t max_tokens) {
    const int64_t left = max_tokens - num_generated;
    if (left <= 1) return left > 0 ? (double)left : 0.0;
    double below, until;
    const double survival = survival_at(lengths, num_generated, &below);
    survival_at(lengths, max_tokens, &until);
    return least((double)left, most(1.0, (until - below) / most(survival, 1e-12)));
}

/* As DecodeCosts.of. 0 if the shape is not known. */
static int set_costs(const struct machine *m, const struct kind *kind, int64_t bucket, struct job *job) {
    if (bucket >= kind->num_shapes || kind->shapes[bucket].attended != kind->shapes[bucket].attended) return 0;
    const struct shape *shape = kind->shapes + bucket;
    const double *c = m->counts_s;
    job->fixed_s = c[ROWS] + c[REQUESTS];
    job->fixed_s += kind->is_drawn * c[DRAWN] + kind->is_shaped * c[SHAPED];
    if (shape->is_dense != 0.0) {
        job->fixed_s += c[DECODE_PAIRS] * shape->standing;
        job->context_s = c[DECODE_PAIRS] * shape->growing;
        job->fixed_pairs = shape->standing, job->context_pairs = shape->growing;
        return 1;
    }
    const double kept = least(shape->attended * kind->correction, shape->visible) * m->num_heads;
    const double standing = shape->standing / GROUP_TOKENS, growing = shape->growing / GROUP_TOKENS;
    job->fixed_s += c[SPARSE] + c[KEPT_PAIRS] * kept + c[SCORED_PAIRS] * standing;
    job->context_s = c[SCORED_PAIRS] * growing;
    job->fixed_pairs = kept + standing, job->context_pairs = growing;
    return 1;
}

/* Of a row: what it is still to generate on average. */
static double row_remaining(const struct simulation *s, const struct row *row) {
    const double left = row->never_stops != 0.0
                            ? row->max_tokens - row->num_output
                            : remaining(s->lengths, (int64_t)row->num_output, (int64_t)row->max_tokens);
    return most(left, 1.0);
}

static int64_t bucket_of(const struct job *job) { return (job->known + (int64_t)job->remaining / 2) / CONTEXT_STEP; }

/* What the job of a row needs once it runs: of a long queue most will not. */
static void work_out(struct simulation *s, struct job *job) {
    const struct row *row = job->row;
    job->row = NULL;
    job->remaining = row_remaining(s, row);
    if (!set_costs(s->m, s->kinds + (int64_t)row->kind, bucket_of(job), job)) s->has_unknown = 1;
}

/* The simulation of simulate.py in C: the same rules, the same order of sums, a hundredth of the time.
 *
 * forward.py is its door and says what goes in and comes out; simulate.py says what the rules mean, and a property test
 * (tests/engine/predict/test_forward.py) holds the two together. Here rows of the queue's table (queue.py) are made
 * into jobs first, with the mean of what each is still to generate (lengths.py) and what its decode steps cost
 * (decode_costs.py). Memory grows with the jobs and is freed at the end; no headers of Python, no threads, no state. */

#include "jobs.h"
#include "costs.h"

/* Events. */

static void note_point(struct simulation *s, double num_tokens, double time_s, double busy_s, double cold_share) {
    struct timeline *t = s->timeline;
    t->points[(int64_t)t->num_points++] = (struct point){num_tokens, time_s, busy_s, cold_share};
}

static void decode(struct simulation *s, int32_t index, double context) {
    struct job *job = s->jobs + index;
    job->context = context, job->joined = s->step;
    push(&s->ends, (struct timed){s->step + job->remaining, ++s->count, index});
    add(&s->all, job, context, 1);
    if (job->own_tokens > 0) add(&s->own, job, context, 1);
}

/* Takes a decoding request out, and its pages; the context that its next token would have. */
static double leave(struct simulation *s, int32_t index) {
    const struct job *job = s->jobs + index;
    const double context = job->context + s->step - job->joined;
    add(&s->all, job, context, -1);
    if (job->own_tokens > 0) add(&s->own, job, context, -1);
    s->free += (context - 1) / s->m->page_size + 0.5;
    return context;
}

static void end_due(struct simulation *s) {
    while (s->ends.num && s->ends.entries[0].at <= s->step + 1e-9) {
        const int32_t job = remove_at(&s->ends, 0).job;
        leave(s, job);
        s->own_left -= s->jobs[job].own_tokens > 0;
    }
}

static void begin(struct simulation *s, int32_t index) {
    struct job *job = s->jobs + index;
    struct timeline *t = s->timeline;
    job->remaining -= 1;
    if (job->own_tokens > 0) t->first_s = least(t->first_s, s->now);
    if (job->remaining > 0) decode(s, index, (double)(job->known + 1));
    else s->free += (double)up(job->known, (int64_t)s->m->page_size);
    if (job->own_tokens > 0) {
        s->own_left -= job->remaining <= 0;
        s->num_own_begun += !job->has_begun;
        job->has_begun = 1;
        if (s->num_own_begun == s->num_own && (s->last_own < 0 || s->last_own == index)) {
            s->last_own = index;
            note_point(s, job->own_tokens - job->remaining, s->now, s->own_busy_s, 0.0);
        }
    }
}

static double cool(struct simulation *s, int64_t num_tokens, double num_steps) {
    if ((double)num_tokens > s->m->few_tokens) {
        s->cold = 1.0;
        return 0.0;
    }
    const double before = s->cold;
    s->cold = before * pow(s->m->cold_keep, num_steps);
    return s->m->counts_s[COLD] * (before - s->cold) / (1.0 - s->m->cold_keep);
}

static void pass(struct simulation *s, double num_steps, double seconds, double own_share, double cold_s) {
    const double passed_s = seconds + num_steps * s->m->gap_s;
    s->now += passed_s;
    s->own_busy_s += seconds * own_share;
    s->step += num_steps;
    s->free -= (double)s->all.num * num_steps / s->m->page_size;
    advance(&s->all, num_steps);
    advance(&s->own, num_steps);
    if (s->last_own >= 0 && s->own.num) {
        const struct job *job = s->jobs + s->last_own;
        const double num_tokens = job->own_tokens - job->remaining + s->step - job->joined;
        note_point(s, least(num_tokens, job->own_tokens), s->now, s->own_busy_s,
                   cold_s != 0.0 ? cold_s / passed_s : 0.0);
    }
}

static int64_t pages_to_start(const struct simulation *s, const struct job *job) {
    const int64_t size = (int64_t)s->m->page_size;
    return up(job->known, size) - job->computed / size;
}

static int has_room(const struct simulation *s) {
    if (s->waiting.first == s->waiting.end) return 0;
    if ((double)(s->all.num + s->reading.end - s->reading.first) >= s->m->max_running) return 0;
    const struct job *job = s->jobs + s->waiting.jobs[s->waiting.first];
    return (double)s->all.num < s->m->max_batch && (double)pages_to_start(s, job) <= s->free + 1e-9;
}

/* Lets a step with the chunks pass. */
static void compute(struct simulation *s) {
    const struct machine *m = s->m;
    const struct step step = step_of(s);
    double own_work = 0.0;
    for (int64_t i = 0; i < s->num_chunks; i++) {
        const struct job *job = s->jobs + s->chunks[i].job;
        const int64_t chunk = s->chunks[i].num_tokens, end = job->computed + chunk;
        if (job->own_tokens > 0)
            own_work += item(m, chunk, end == job->known, (double)dense_pairs(m, job->computed, end));
    }
    const double cold_s = cool(s, step.num_tokens, 1.0), seconds = step_s(s, &step) + cold_s + s->idle_s;
    s->idle_s = 0.0;
    own_work += item(m, s->own.num, s->own.num, mean_pairs(&s->own, 1));
    const double num_pairs = (double)step.pairs + mean_pairs(&s->all, 1);
    pass(s, 1.0, seconds, own_work / item(m, step.num_tokens, s->all.num + step.num_rows, num_pairs), 0.0);
}

static void mixed_step(struct simulation *s) {
    int64_t budget = (int64_t)s->m->max_batch - s->all.num;
    s->num_chunks = 0;
    for (int64_t i = s->reading.first; i < s->reading.end; i++) {
        const int32_t job = s->reading.jobs[i];
        const int64_t num_tokens = chunk_of(s, job, budget);
        if (num_tokens > 0) {
            s->chunks[s->num_chunks++] = (struct chunk){job, num_tokens};
            budget -= num_tokens;
        }
    }
    while (budget > 0 && has_room(s)) {
        const int32_t index = s->waiting.jobs[s->waiting.first];
        struct job *job = s->jobs + index;
        const int64_t num_tokens = chunk_of(s, index, budget);
        if (!num_tokens) break;
        s->waiting.first++;
        if (job->row) work_out(s, job);
        s->free -= (double)pages_to_start(s, job);
        if (job->own_tokens > 0 && s->now < s->timeline->runs_s) s->timeline->runs_s = s->now;
        insert(s, &s->reading, index);
        s->chunks[s->num_chunks++] = (struct chunk){index, num_tokens};
        budget -= num_tokens;
    }
    compute(s);
    for (int64_t i = 0; i < s->num_chunks; i++) {
        struct job *job = s->jobs + s->chunks[i].job;
        job->computed += s->chunks[i].num_tokens;
        if (job->computed == job->known) {
            take_out(&s->reading, s->chunks[i].job);
            begin(s, s->chunks[i].job);
        }
    }
    end_due(s);
}

/* The last rank gives its pages back and waits. */
static void preempt(struct simulation *s) {
    const int64_t size = (int64_t)s->m->page_size;
    int64_t place = 0;
    for (int64_t i = 1; i < s->ends.num; i++)
        if (is_before(s->jobs + s->ends.entries[place].job, s->jobs + s->ends.entries[i].job)) place = i;
    int32_t index = s->ends.entries[place].job;
    const int32_t reading = s->reading.end > s->reading.first ? s->reading.jobs[s->reading.end - 1] : -1;
    if (reading >= 0 && is_before(s->jobs + index, s->jobs + reading)) {
        index = reading;
        s->reading.end--;
        s->free += (double)up(s->jobs[index].known, size);
    } else {
        const double end = remove_at(&s->ends, place).at;
        const int64_t context = (int64_t)leave(s, index);
        s->jobs[index].known = context > 1 ? context : 1;
        s->jobs[index].remaining = most(end - s->step, 1.0);
    }
    struct job *job = s->jobs + index;
    const int64_t kept = job->computed < job->known - 1 ? job->computed : job->known - 1;
    job->computed = s->m->prefix_caching != 0.0 ? kept / size * size : 0;
    insert(s, &s->waiting, index);
}

static void decode_steps(struct simulation *s, double until_s) {
    const struct machine *m = s->m;
    const double num = (double)s->all.num;
    if (s->free * m->page_size < num && s->ends.num + s->reading.end - s->reading.first > 1) {
        preempt(s);
        return;
    }
    const double first_s = tokens_s(m, s->all.num) + m->gap_s + s->all.fixed_s + s->all.context_s;
    double cold_s = num <= m->few_tokens ? s->cold * m->counts_s[COLD] : 0.0;
    double num_steps = most(s->ends.entries[0].at - s->step, 1e-6);
    if (until_s < INFINITY)
        num_steps =
            least(num_steps, most(1.0, ceil(steps_in(m, until_s - s->now, first_s, s->all.growth_s, cold_s))));
    if (s->ends.num > 1) num_steps = least(num_steps, most(1.0, s->free * m->page_size / num));
    cold_s = cool(s, s->all.num, num_steps);
    const double seconds =
        num_steps * (first_s + s->all.growth_s * (num_steps - 1) / 2) - num_steps * m->gap_s + cold_s;
    double share = 0.0;
    if (s->own.num) {
        share = item(m, s->own.num, s->own.num, mean_pairs(&s->own, num_steps));
        share /= item(m, s->all.num, s->all.num, mean_pairs(&s->all, num_steps));
    }
    pass(s, num_steps, seconds, share, cold_s);
    end_due(s);
}

/* As Simulation._extrapolate. */
static void extrapolate(struct simulation *s) {
    const struct machine *m = s->m;
    struct timeline *t = s->timeline;
    const double step = tokens_s(m, s->all.num) + m->gap_s + s->all.fixed_s + s->all.context_s;
    double num_own = 0.0;
    if (t->num_points == 0.0) {
        int64_t ahead = 0;
        const struct list *lists[] = {&s->reading, &s->waiting};
        for (int l = 0; l < 2; l++)
            for (int64_t i = lists[l]->first; i < lists[l]->end; i++) {
                const struct job *job = s->jobs + lists[l]->jobs[i];
                num_own = most(num_own, job->own_tokens);
                ahead += job->known > job->computed ? job->known - job->computed : 0;
            }
        const struct heap *heaps[] = {&s->joins, &s->ends};
        for (int h = 0; h < 2; h++)
            for (int64_t i = 0; i < heaps[h]->num; i++) {
                const struct job *job = s->jobs + heaps[h]->entries[i].job;
                if (h && job->own_tokens <= 0) continue;
                num_own = most(num_own, job->own_tokens);
                ahead += job->known > job->computed ? job->known - job->computed : 0;
            }
        s->now += (double)ahead / m->max_batch * tokens_s(m, (int64_t)m->max_batch);
        t->runs_s = least(t->runs_s, s->now), t->first_s = least(t->first_s, s->now);
        note_point(s, 1.0, s->now, s->own_busy_s, 0.0);
    } else num_own = s->jobs[s->last_own].own_tokens;
    const struct point first = t->points[0], last = t->points[(int64_t)t->num_points - 1];
    double pace_s = step, busy_s = step / (s->all.num > 1 ? (double)s->all.num : 1.0);
    const double num_tokens = last.num_tokens - first.num_tokens;
    if (num_tokens >= 4)
        pace_s = (last.time_s - first.time_s) / num_tokens, busy_s = (last.busy_s - first.busy_s) / num_tokens;
    const double left = num_own - last.num_tokens;
    note_point(s, num_own, last.time_s + left * pace_s, last.busy_s + left * busy_s, 0.0);
}

/* Jobs. */

/* The place of a new job, or -1. */
static int32_t new_job(struct simulation *s) {
    if (s->num_jobs == s->capacity && !grow(s, 2 * s->capacity)) return -1;
    s->jobs[s->num_jobs] = (struct job){0};
    return (int32_t)s->num_jobs++;
}

static int32_t new_given(struct simulation *s, const struct given *g) {
    const int32_t index = new_job(s);
    if (index < 0) return -1;
    s->jobs[index] = (struct job){
        .due_s = g->due_s, .tie = g->tie, .computed = (int64_t)g->computed, .known = (int64_t)g->known,
        .remaining = g->remaining, .fixed_s = g->fixed_s, .context_s = g->context_s, .fixed_pairs = g->fixed_pairs,
        .context_pairs = g->context_pairs, .own_tokens = g->own_tokens};
    return index;
}

static void wait(struct simulation *s, int32_t job, double at_s) {
    if (at_s <= s->now) insert(s, &s->waiting, job);
    else push(&s->joins, (struct timed){at_s, ++s->count, job});
}

/* The queue's requests, in the order of their ranks. */
static int add_queue(struct simulation *s, const struct row *rows, const int32_t *order, int64_t num_rows) {
    for (int64_t place = 0; place < num_rows; place++) {
        const struct row *row = rows + order[place];
        const int32_t index = new_job(s);
        if (index < 0) return NO_MEMORY;
        struct job *job = s->jobs + index;
        job->due_s = row->due_s, job->tie = (double)place, job->row = row;
        job->known = (int64_t)(row->num_prompt + row->num_output);
        if (row->is_running != 0.0) {
            work_out(s, job);
            job->computed = (int64_t)row->num_computed;
            if (job->known - job->computed > 1) insert(s, &s->reading, index);
            else decode(s, index, (double)job->known);
        } else {
            job->computed = (int64_t)least(row->num_cached, (double)(job->known - 1));
            wait(s, index, row->submitted_s);
        }
    }
    return s->has_unknown ? UNKNOWN_COSTS : DONE;
}

/* How many requests have a shape that is not known, then the kind and the bucket of each. */
static void list_unknown(const struct simulation *s, const struct row *rows, const int32_t *order, int64_t num_rows,
                         int64_t *unknown) {
    unknown[0] = 0;
    for (int64_t place = 0; place < num_rows; place++) {
        const struct row *row = rows + order[place];
        struct job job = {.known = (int64_t)(row->num_prompt + row->num_output), .remaining = row_remaining(s, row)};
        if (set_costs(s->m, s->kinds + (int64_t)row->kind, bucket_of(&job), &job)) continue;
        unknown[1 + 2 * unknown[0]] = (int64_t)row->kind, unknown[2 + 2 * unknown[0]] = bucket_of(&job);
        unknown[0]++;
    }
}

static int run(struct simulation *s, const struct given *newcomer) {
    struct timeline *t = s->timeline;
    double next_s = s->now + s->start->every_s;
    s->own_left = s->num_own;
    while (s->own_left > 0 && !s->has_unknown) {
        t->num_events++;
        if (t->num_events > s->m->max_events || t->num_points > s->start->max_own_events) {
            extrapolate(s);
            break;
        }
        while (s->joins.num && s->joins.entries[0].at <= s->now) {
            const int32_t job = remove_at(&s->joins, 0).job;
            insert(s, &s->waiting, job);
        }
        while (next_s <= s->now && newcomer) {
            const int32_t job = new_given(s, newcomer);
            if (job < 0) return NO_MEMORY;
            s->jobs[job].due_s = next_s + s->m->patience_s;
            insert(s, &s->waiting, job);
            next_s += s->start->every_s;
        }
        if (!s->all.num && s->reading.first == s->reading.end) s->free = s->m->num_pages;
        if (s->reading.first < s->reading.end || has_room(s)) {
            mixed_step(s);
            continue;
        }
        const double until_s = s->joins.num ? least(next_s, s->joins.entries[0].at) : next_s;
        if (s->all.num) decode_steps(s, until_s);
        else if (until_s < INFINITY) s->now = until_s;
        else return STUCK;
    }
    t->num_steps = s->step;
    return s->has_unknown ? UNKNOWN_COSTS : DONE;
}

#define EXPORT __attribute__((visibility("default")))

/* Version of the function below; forward.py refuses another. */
EXPORT int vashista_forward_version(void) { return 5; }

/* One run. rows, order: the queue's table and its ranks; given: further jobs, that wait from at_s on; newcomer: null, or
 * the job that comes every every_s. timeline: with room for max_own_events + 4 points. Returns DONE, or UNKNOWN_COSTS
 * with how many shapes are to be filled in first, then the kind and the bucket of contexts of each, or a failure.
 * unknown: with room for 1 + 2 * num_rows. */
EXPORT int vashista_forward(const struct machine *machine, const struct start *start, const struct row *rows,
                            const int32_t *order, int64_t num_rows, const struct kind *kinds, const double *lengths,
                            const struct given *given, int64_t num_given, const struct given *newcomer,
                            struct timeline *timeline, int64_t *unknown) {
    struct simulation s = {.m = machine, .start = start, .kinds = kinds, .lengths = lengths,
                           .timeline = timeline, .now = start->now_s,
                           .cold = start->cold, .idle_s = start->idle * machine->counts_s[IDLE],
                           .free = start->num_free_pages, .last_own = -1};
    timeline->runs_s = timeline->first_s = INFINITY;
    timeline->num_steps = timeline->num_events = timeline->num_points = 0.0;
    int result = grow(&s, num_rows + num_given + 64) ? DONE : NO_MEMORY;
    if (result == DONE) result = add_queue(&s, rows, order, num_rows);
    for (int64_t i = 0; i < num_given && result == DONE; i++) {
        const int32_t job = new_given(&s, given + i);
        s.num_own += given[i].own_tokens > 0;
        wait(&s, job, given[i].at_s);
    }
    if (result == DONE) result = run(&s, newcomer);
    if (result == UNKNOWN_COSTS) list_unknown(&s, rows, order, num_rows, unknown);
    release(&s);
    return result;
}

/* What a simulation is made of: what goes in and comes out, jobs, lists by rank, heaps by time, and their memory.
 * native.c includes this once. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NUM_KNOTS = 14, NUM_COUNTS = 12, NUM_BINS = 24, MAX_WINDOWS = 64, CONTEXT_STEP = 128, GROUP_TOKENS = 16,
       MAX_PROMPT_ROWS = 16 };
enum { ROWS, REQUESTS, DRAWN, SHAPED, SPARSE, DECODE_PAIRS, PROMPT_PAIRS, SCORED_PAIRS, KEPT_PAIRS, COLD, SPLIT, IDLE };
enum { DONE = 0, NO_MEMORY = -1, STUCK = -2, UNKNOWN_COSTS = 1 };

/* What stays while the engine and its coefficients do. Numbers of tokens and pages are whole. */
struct machine {
    double page_size, num_pages, max_running, max_batch, prefix_caching;
    double max_gap_s; /* promised to running streams; below 0: nothing is */
    double least_chunk, few_tokens, cold_keep, log_cold_keep, max_events, patience_s;
    double weights, head, pair, num_heads, num_windows;
    double prompt_rows[MAX_PROMPT_ROWS]; /* of graphs for prompts, fewest first; 0 behind the last */
    double window[MAX_WINDOWS], count[MAX_WINDOWS]; /* window 0: all is seen */
    double knots[NUM_KNOTS], base_s, gap_s, at_knots[NUM_KNOTS], per_token_s[NUM_KNOTS], counts_s[NUM_COUNTS];
};

/* A row of the queue's table. */
struct row {
    double due_s, num_prompt, num_output, max_tokens, never_stops, kind, num_computed, num_cached, submitted_s,
        is_running;
};

/* How decoding requests of one kind attend: of each CONTEXT_STEP of contexts, NaN where it is not known yet. */
struct shape {
    double attended, visible, standing, growing, is_dense;
};

struct kind {
    const struct shape *shapes;
    int64_t num_shapes;
    double is_drawn, is_shaped, correction;
};

/* A job that is not in the table: of the request that is predicted, or like those that will come. */
struct given {
    double due_s, tie, computed, known, remaining, fixed_s, context_s, fixed_pairs, context_pairs, own_tokens, at_s;
};

struct start {
    double now_s, num_free_pages, cold, idle, every_s, max_own_events;
};

struct point {
    double num_tokens, time_s, busy_s, cold_share;
};

struct timeline {
    double runs_s, first_s, num_steps, num_events, num_points;
    struct point points[]; /* max_own_events + 4 */
};

struct job {
    double due_s, tie; /* its rank */
    int64_t computed, known;
    double remaining, fixed_s, context_s, fixed_pairs, context_pairs, own_tokens, context, joined;
    int has_begun;
    const struct row *row; /* while what it will generate and what that costs is still to be worked out from it */
};

struct sums {
    int64_t num;
    double fixed_s, context_s, growth_s, fixed_pairs, context_pairs, growth_pairs;
};

struct timed {
    double at;
    int64_t count;
    int32_t job;
};

struct chunk {
    int32_t job;
    int64_t num_tokens;
};

struct heap {
    struct timed *entries;
    int64_t num;
};

struct list { /* of jobs by rank */
    int32_t *jobs;
    int64_t first, end;
};

struct simulation {
    const struct machine *m;
    const struct start *start;
    const struct kind *kinds;
    const double *lengths;
    struct timeline *timeline;
    struct job *jobs;
    int64_t num_jobs, capacity;
    struct list reading, waiting;
    struct heap ends, joins;
    struct chunk *chunks;
    int64_t num_chunks;
    double now, step, cold, idle_s, free, own_busy_s;
    int64_t count, num_own, own_left, num_own_begun, last_own;
    struct sums all, own;
    int has_unknown; /* costs of a job that runs */
};

static double least(double a, double b) { return b < a ? b : a; }
static double most(double a, double b) { return b > a ? b : a; }
static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Memory: every list, heap and set of chunks can hold all jobs. */

static int grow(struct simulation *s, int64_t capacity) {
    void *jobs = realloc(s->jobs, sizeof *s->jobs * (size_t)capacity);
    if (jobs) s->jobs = jobs;
    void *reading = realloc(s->reading.jobs, sizeof(int32_t) * (size_t)capacity);
    if (reading) s->reading.jobs = reading;
    void *waiting = realloc(s->waiting.jobs, sizeof(int32_t) * (size_t)capacity);
    if (waiting) s->waiting.jobs = waiting;
    void *ends = realloc(s->ends.entries, sizeof(struct timed) * (size_t)capacity);
    if (ends) s->ends.entries = ends;
    void *joins = realloc(s->joins.entries, sizeof(struct timed) * (size_t)capacity);
    if (joins) s->joins.entries = joins;
    void *chunks = realloc(s->chunks, sizeof *s->chunks * (size_t)capacity);
    if (chunks) s->chunks = chunks;
    if (!jobs || !reading || !waiting || !ends || !joins || !chunks) return 0;
    s->capacity = capacity;
    return 1;
}

static void release(struct simulation *s) {
    free(s->jobs), free(s->reading.jobs), free(s->waiting.jobs);
    free(s->ends.entries), free(s->joins.entries), free(s->chunks);
}

/* Ranks, lists and heaps. */

static int is_before(const struct job *a, const struct job *b) {
    return a->due_s < b->due_s || (a->due_s == b->due_s && a->tie < b->tie);
}

/* After those of the same rank. */
static void insert(const struct simulation *s, struct list *list, int32_t job) {
    if (list->end == s->capacity) {
        memmove(list->jobs, list->jobs + list->first, sizeof(int32_t) * (size_t)(list->end - list->first));
        list->end -= list->first, list->first = 0;
    }
    int64_t low = list->first, high = list->end;
    if (low < high && !is_before(s->jobs + job, s->jobs + list->jobs[high - 1])) low = high; /* as most come */
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (is_before(s->jobs + job, s->jobs + list->jobs[middle])) high = middle;
        else low = middle + 1;
    }
    memmove(list->jobs + low + 1, list->jobs + low, sizeof(int32_t) * (size_t)(list->end - low));
    list->jobs[low] = job;
    list->end++;
}

static void take_out(struct list *list, int32_t job) {
    int64_t at = list->first;
    while (list->jobs[at] != job) at++;
    memmove(list->jobs + at, list->jobs + at + 1, sizeof(int32_t) * (size_t)(list->end - at - 1));
    list->end--;
}

static int is_sooner(const struct timed *a, const struct timed *b) {
    return a->at < b->at || (a->at == b->at && a->count < b->count);
}

static void push(struct heap *heap, struct timed entry) {
    int64_t at = heap->num++;
    while (at && is_sooner(&entry, heap->entries + (at - 1) / 2)) {
        heap->entries[at] = heap->entries[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap->entries[at] = entry;
}

static struct timed remove_at(struct heap *heap, int64_t at) {
    const struct timed found = heap->entries[at], last = heap->entries[--heap->num];
    if (at == heap->num) return found;
    for (;;) { /* down */
        int64_t child = 2 * at + 1;
        if (child >= heap->num) break;
        if (child + 1 < heap->num && is_sooner(heap->entries + child + 1, heap->entries + child)) child++;
        if (!is_sooner(heap->entries + child, &last)) break;
        heap->entries[at] = heap->entries[child];
        at = child;
    }
    while (at && is_sooner(&last, heap->entries + (at - 1) / 2)) { /* or up, where it came from elsewhere */
        heap->entries[at] = heap->entries[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap->entries[at] = last;
    return found;
}

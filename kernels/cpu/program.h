/* Programs: tasks that were recorded once and are run one after another by one team of threads, which is cheaper than to
 * call together a team for each, and to come back to Python in between. A program lies in memory that program.py holds.
 * native.c includes this once, behind its `share`. */

/* What a task is before its threads start: counters at zero, and for attention what the step holds now. `rows` replaces
 * the number of rows it was made with. */
typedef void prepare(void *task, int64_t rows);

static void prepare_linear(void *task, int64_t rows) {
    struct linear_task *t = task;
    t->m = rows, t->next = 0;
}

static void prepare_norm(void *task, int64_t rows) {
    struct norm_task *t = task;
    t->outer = rows;
}

static void prepare_attend(void *task, int64_t rows) {
    struct attend_task *t = task;
    const struct attend_step *s = t->step;
    (void)rows;
    t->cos = s->cos, t->sin = s->sin, t->requests = s->requests, t->pages = s->pages, t->plan = s->plan;
    t->open = s->open, t->partial = s->partial, t->num_requests = s->num_requests, t->rotary = s->rotary, t->next = 0;
    t->plan[0] = 0;
    for (int64_t i = 0; i < t->num_requests; i++) {
        const int64_t context = t->requests[3 * i + 1], oldest = t->window ? most(0, context - t->window) : 0;
        const int64_t parts = count_parts(context, oldest);
        t->plan[i + 1] = t->plan[i] + t->kv_heads * parts;
        for (int64_t h = 0; h < t->kv_heads; h++) t->open[i * t->kv_heads + h] = (int32_t)parts;
    }
}

static void prepare_sparse(void *task, int64_t rows) {
    struct sparse_task *t = task;
    const struct sparse_step *s = t->step;
    const int64_t pairs = s->num_requests * s->kv_heads;
    (void)rows;
    t->base.cos = s->cos, t->base.sin = s->sin, t->base.requests = s->requests, t->base.pages = s->pages;
    t->base.partial = s->partial, t->base.num_requests = s->num_requests, t->base.rotary = s->rotary;
    t->budgets = s->budgets + t->layer * pairs;
    t->diagnostics = s->diagnostics + t->layer * s->num_requests * s->heads * 6;
    t->num_pairs = pairs, t->next = 0;
    s->items[0] = 0;
    for (int64_t i = 0; i < pairs; i++) {
        const struct pair p = pair_of(t, i);
        s->items[i + 1] = s->open[i] = (int32_t)p.num_cuts;
        s->items[pairs + i + 1] = s->open[pairs + i] = (int32_t)p.num_parts;
        s->open[2 * pairs + i] = 0;
    }
    for (int64_t i = 0; i < 2 * pairs; i++) s->items[i + 1] += s->items[i];
}

struct operation {
    work *run;
    prepare *prepare;
    union {
        struct linear_task linear;
        struct norm_task norm;
        struct attend_task attend;
        struct sparse_task sparse;
    } task;
};

struct program {
    int64_t capacity, count, rows;
    int64_t num_arrived; /* threads that are done with an operation, counted over all operations of a run */
    int32_t turn;        /* operations that are prepared */
    struct operation operations[];
};

/* Whoever is done last prepares the next operation; the others wait for that. */
static void run_program(void *task, int64_t thread, int64_t num_threads) {
    struct program *p = task;
    for (int64_t i = 0; i < p->count; i++) {
        struct operation *const operation = p->operations + i;
        operation->run(&operation->task, thread, num_threads);
        if (i + 1 == p->count) return;
        if (__atomic_add_fetch(&p->num_arrived, 1, __ATOMIC_ACQ_REL) == (i + 1) * num_threads) {
            operation[1].prepare(&operation[1].task, p->rows);
            __atomic_store_n(&p->turn, (int32_t)i + 2, __ATOMIC_RELEASE);
        } else {
            for (int spins = 0; __atomic_load_n(&p->turn, __ATOMIC_ACQUIRE) < i + 2; spins++) rest(spins);
        }
    }
}

/* Runs the task now, or records it where a program is given. -1 if that is full. */
static int submit(struct program *program, work *run, prepare *prepare, void *task, size_t size, int64_t rows,
                  int64_t num_threads) {
    if (!program) {
        prepare(task, rows);
        share(run, task, num_threads);
        return 0;
    }
    if (program->count == program->capacity) return -1;
    struct operation *const operation = program->operations + program->count++;
    operation->run = run, operation->prepare = prepare;
    memcpy(&operation->task, task, size);
    return 0;
}


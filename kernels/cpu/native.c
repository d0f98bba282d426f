/* Decode kernels for CPUs: linear products of few rows, norms, gates, paged attention dense and sparse, one by one
 * or as programs, without any headers of torch.
 *
 * Loaded by library.py through ctypes; the exported functions are at the end. The kernels are written once, in portable
 * vectors of GCC (linear.h, norm.h, attend.h, summary.h, sparse.h), and compiled for each instruction set; the best one that this processor
 * has is chosen at load. Threads are those of the OpenMP library that torch has loaded: its GOMP_parallel is handed in
 * (vashista_use_threads), so that no second pool competes for the cores. Without it everything runs on one thread.
 *
 * Every function returns 0, or -1 where its arguments are not supported; the Python doors check them before. */

#include <sched.h>

#include "tasks.h"

typedef void work(void *task, int64_t thread, int64_t num_threads);

INLINE int64_t count_parts(int64_t context, int64_t oldest) {
    return (context + SPLIT - 1) / SPLIT - oldest / SPLIT;
}

/* The visible part of a context in units, and how many of them a budget keeps. */
static struct pair pair_of(const struct sparse_task *t, int64_t index) {
    static const float logs[UNIT + 1] = {0.f,         0.f,         0.69314718f, 1.09861229f, 1.38629436f, 1.60943791f,
                                         1.79175947f, 1.94591015f, 2.07944154f, 2.19722458f, 2.30258509f, 2.39789527f,
                                         2.48490665f, 2.56494936f, 2.63905733f, 2.7080502f,  LOG_UNIT};
    const struct sparse_step *s = t->step;
    const int64_t request = index / s->kv_heads, window = t->base.window;
    struct pair p = {.request = request, .head = index % s->kv_heads, .row = s->requests[3 * request],
                     .context = s->requests[3 * request + 1], .pages = s->pages + s->requests[3 * request + 2],
                     .group = s->heads / s->kv_heads};
    p.oldest = window ? most(0, p.context - window) : 0;
    const int64_t visible = p.context - p.oldest, end = (p.context + UNIT - 1) / UNIT, budget = t->budgets[index];
    p.first_unit = p.oldest / UNIT;
    p.num_units = end - p.first_unit;
    p.width = (p.num_units + UNIT - 1) / UNIT * UNIT;
    p.first_log = logs[least(visible, UNIT - p.oldest % UNIT)];
    p.last_log = p.num_units > 1 ? logs[p.context - (end - 1) * UNIT] : p.first_log;
    p.num_first = least(p.num_units, most(0, (s->num_sinks + UNIT - 1) / UNIT - p.first_unit));
    p.newest = most(0, most(0, p.context - s->num_recent) / UNIT - p.first_unit);
    const int64_t always = p.num_units - most(0, p.newest - p.num_first);
    p.num_kept = budget >= visible ? p.num_units : least(p.num_units, most(budget / UNIT, always));
    p.is_covered = p.num_kept == p.num_units;
    p.strung_end = p.num_kept * UNIT - (end * UNIT - p.context);
    p.num_cuts = p.is_covered || s->rule == WINDOW ? 1 : (p.num_units + SCORE - 1) / SCORE;
    p.num_parts = p.is_covered ? count_parts(p.context, p.oldest) : (p.strung_end + SPLIT - 1) / SPLIT;
    p.score = s->scratch + s->offsets[request] + p.head * (2 * p.group + 1) * ((end + UNIT - 1) / UNIT * UNIT);
    p.bound = p.score + p.group * p.width;
    p.keys = (int32_t *)(p.bound + p.group * p.width);
    p.kept = s->kept + index * s->max_units;
    p.num_kept_to = s->num_kept + index;
    p.diagnostics = t->diagnostics + index * p.group * 6;
    return p;
}

/* Between two looks at what another thread is at work on: the processor is given up only after a while. */
static void rest(int spins) {
#ifdef __x86_64__
    _mm_pause();
#endif
    if (spins > 1000) sched_yield();
}

/* Until another thread has set the flag. */
static void await(const int32_t *flag) {
    for (int spins = 0; !__atomic_load_n(flag, __ATOMIC_ACQUIRE); spins++) rest(spins);
}

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, SUFFIX)

/* ROWS x 4 sums, GROUP x 4 scores and GROUP x WIDE outputs are what the registers of the set hold. */
#define SUFFIX plain
#define LANES 4
#define ROWS 2
#define GROUP 2
#define WIDE 2
#include "kernels.h"

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define SUFFIX avx2
#define LANES 8
#define ROWS 2
#define GROUP 2
#define WIDE 4
#include "kernels.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=512")
#define SUFFIX avx512
#define LANES 16
#define ROWS 6
#define GROUP 4
#define WIDE 4
#include "kernels.h"
#pragma GCC pop_options
#endif

struct set {
    const char *name;
    int lanes;
    work *linear, *norm, *silu, *attend, *summary, *sparse;
};

static const struct set sets[] = {
    {"plain", 4, run_linear_plain, run_norm_plain, run_silu_plain, run_attend_plain, run_summary_plain,
     run_sparse_plain},
#ifdef __x86_64__
    {"AVX2", 8, run_linear_avx2, run_norm_avx2, run_silu_avx2, run_attend_avx2, run_summary_avx2,
     run_sparse_avx2},
    {"AVX-512", 16, run_linear_avx512, run_norm_avx512, run_silu_avx512, run_attend_avx512, run_summary_avx512,
     run_sparse_avx512},
#endif
};

static int best_set(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 1;
#endif
    return 0;
}

/* Threads. `parallel` is GOMP_parallel; without it there is one. */

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void), (*team_size)(void);

struct team {
    work *run;
    void *task;
};

static void enter(void *data) {
    const struct team *team = data;
    team->run(team->task, thread_number(), team_size());
}

static void share(work *run, void *task, int64_t num_threads) {
    struct team team = {run, task};
    if (parallel && num_threads > 1) parallel(enter, &team, (unsigned)num_threads, 0);
    else run(task, 0, 1);
}

#include "program.h"
#include "support.h"

#define EXPORT __attribute__((visibility("default")))

/* Version of the functions below; library.py refuses another. */
EXPORT int vashista_version(void) { return 8; }

/* The sets this processor can run are 0 to the returned number. */
EXPORT int vashista_best_set(void) { return best_set(); }

EXPORT const char *vashista_set_name(int set) { return sets[set].name; }

EXPORT void vashista_use_threads(void *gomp_parallel, void *omp_get_thread_num, void *omp_get_num_threads) {
    memcpy(&parallel, &gomp_parallel, sizeof parallel);
    memcpy(&thread_number, &omp_get_thread_num, sizeof thread_number);
    memcpy(&team_size, &omp_get_num_threads, sizeof team_size);
}

/* Bytes of a program of at most `capacity` operations. */
EXPORT int64_t vashista_program_bytes(int64_t capacity) {
    return (int64_t)sizeof(struct program) + capacity * (int64_t)sizeof(struct operation);
}

/* memory: of that many bytes, aligned to 8. */
EXPORT void vashista_program_begin(struct program *memory, int64_t capacity) {
    memset(memory, 0, sizeof *memory);
    memory->capacity = capacity;
}

/* Runs a program's operations in order, linear products and norms on the first `rows` rows of their operands. */
EXPORT int vashista_program_run(struct program *p, int64_t rows, int64_t num_threads) {
    if (!p->count) return -1;
    p->rows = rows, p->num_arrived = 0, p->turn = 1;
    p->operations[0].prepare(&p->operations[0].task, rows);
    share(run_program, p, num_threads);
    return 0;
}

/* In the functions that take a program, null means: run now. */

/* tile, panel_rows: as in linear_task; panel_rows is at least what a chunk has. */
EXPORT int vashista_linear(struct program *program, const void *x, int64_t x_stride, const void *norm, float eps,
                           const void *w, const void *bias, const void *residual, int64_t residual_stride, void *y,
                           float *scratch, int64_t m, int64_t n, int64_t k, int bf16, int narrow, int gated,
                           int64_t tile, int64_t panel_rows, int set, int64_t num_threads) {
    struct linear_task t = {.x = x, .norm = norm, .w = w, .bias = bias, .residual = residual, .y = y, .scratch = scratch,
                            .x_stride = x_stride, .residual_stride = residual_stride, .n = n, .k = k, .eps = eps,
                            .bf16 = bf16, .narrow = narrow, .gated = gated, .tile = tile, .panel_rows = panel_rows};
    if (((norm || narrow) && !scratch) || (bf16 && !narrow) || (panel_rows && !narrow)) return -1;
    /* About 64 KB of weights at a time: small enough to share evenly, large enough for the prefetch to pay. */
    t.chunk = most(4, 65536 / (k * (narrow ? 2 : 4) * (gated ? 2 : 1)) / 4 * 4);
    if (panel_rows && panel_rows < t.chunk * (gated ? 2 : 1)) return -1;
    return submit(program, sets[set].linear, prepare_linear, &t, sizeof t, m, num_threads);
}

EXPORT int vashista_rms_norm(struct program *program, const void *x, int64_t x_outer, int64_t x_inner, void *y,
                             int64_t y_outer, int64_t y_inner, const void *weight, float eps, int64_t outer,
                             int64_t inner, int64_t cols, int bf16, int set, int64_t num_threads) {
    struct norm_task t = {.x = x, .weight = weight, .y = y, .x_outer = x_outer, .x_inner = x_inner, .y_outer = y_outer,
                          .y_inner = y_inner, .inner = inner, .cols = cols, .eps = eps, .bf16 = bf16};
    const int64_t useful = outer * inner * cols < 16384 ? 1 : num_threads;
    return submit(program, sets[set].norm, prepare_norm, &t, sizeof t, outer, useful);
}

EXPORT int vashista_silu_mul(const void *x, int64_t x_stride, void *y, int64_t rows, int64_t cols, int bf16, int set,
                             int64_t num_threads) {
    struct silu_task t = {.x = x, .y = y, .rows = rows, .cols = cols, .x_stride = x_stride, .bf16 = bf16};
    share(sets[set].silu, &t, rows * cols < 16384 ? 1 : num_threads);
    return 0;
}

/* step: read when the task runs, but for numbers of heads, head_dim, page_size and scale, which are read now. set: with LANES that
 * divide head_dim, else the next smaller one is taken. */
EXPORT int vashista_attend(struct program *program, const struct attend_step *step, const void *qkv, void *cache,
                           void *out, int64_t num_slots, int64_t window, int set, int64_t num_threads) {
    const struct attend_step *s = step;
    struct attend_task t = {.step = s, .qkv = qkv, .cache = cache, .out = out, .heads = s->heads,
                            .kv_heads = s->kv_heads, .head_dim = s->head_dim,
                            .page_size = s->page_size, .num_slots = num_slots, .window = window,
                            .scale = (float)s->scale, .bf16 = (int)s->bf16};
    if (s->head_dim > MAX_HEAD || s->head_dim % 8 || s->heads % s->kv_heads) return -1;
    while (s->head_dim % sets[set].lanes) set--;
    return submit(program, sets[set].attend, prepare_attend, &t, sizeof t, 0, num_threads);
}

/* plan: num_runs + 1 numbers, filled here. set: as in vashista_attend. */
EXPORT int vashista_summarize(const void *cache, uint8_t *codes, float *steps, const int64_t *runs, int64_t *plan,
                              int64_t num_runs, int64_t kv_heads, int64_t head_dim, int64_t num_slots, int64_t rule,
                              int bf16, int set, int64_t num_threads) {
    struct summary_task t = {.cache = cache, .runs = runs, .plan = plan, .codes = codes, .steps = steps,
                             .num_runs = num_runs, .kv_heads = kv_heads, .head_dim = head_dim, .num_slots = num_slots,
                             .rule = rule, .bf16 = bf16};
    if (head_dim > MAX_HEAD || head_dim % 8 || num_slots % UNIT || rule == WINDOW) return -1;
    while (head_dim % sets[set].lanes) set--;
    plan[0] = 0;
    for (int64_t i = 0; i < num_runs; i++)
        plan[i + 1] = plan[i] + (runs[2 * i + 1] + UNIT - 1) / UNIT - runs[2 * i] / UNIT;
    share(sets[set].summary, &t, plan[num_runs] * kv_heads < 64 ? 1 : num_threads);
    return 0;
}

/* step, set: as in vashista_attend. */
EXPORT int vashista_sparse(struct program *program, const struct sparse_step *step, const void *qkv, void *cache,
                           void *out, uint8_t *codes, float *steps, int64_t layer, int64_t num_slots, int64_t window,
                           int set, int64_t num_threads) {
    const struct sparse_step *s = step;
    struct sparse_task t = {
        .base = {.qkv = qkv, .cache = cache, .out = out, .heads = s->heads, .kv_heads = s->kv_heads,
                 .head_dim = s->head_dim, .page_size = s->page_size, .num_slots = num_slots,
                 .window = window, .scale = (float)s->scale, .bf16 = (int)s->bf16},
        .step = step, .codes = codes, .steps = steps, .layer = layer};
    if (s->head_dim > MAX_HEAD || s->head_dim % 8 || s->heads % s->kv_heads || s->page_size % UNIT || layer < 0)
        return -1;
    while (s->head_dim % sets[set].lanes) set--;
    return submit(program, sets[set].sparse, prepare_sparse, &t, sizeof t, 0, num_threads);
}

/* step: one whose layers have run. windows: num_layers. wanted: indices of requests. sums: 6 for each of them.
 * estimates: [num_wanted, num_layers, kv_heads]. */
EXPORT int vashista_sum_support(const struct sparse_step *step, const int64_t *windows, int64_t num_layers,
                                const int64_t *wanted, int64_t num_wanted, int has_estimate, double *sums,
                                double *estimates) {
    for (int64_t i = 0; i < num_wanted; i++)
        if (wanted[i] < 0 || wanted[i] >= step->num_requests) return -1;
    sum_support(step, windows, num_layers, wanted, num_wanted, has_estimate, sums, estimates);
    return 0;
}

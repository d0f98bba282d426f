/* Decode kernels for CPUs: linear products of few rows, norms, gates and paged attention, without any headers of torch.
 *
 * Loaded by library.py through ctypes; the exported functions are at the end. The kernels are written once, in portable
 * vectors of GCC (linear.h, norm.h, attend.h), and compiled for each instruction set; the best one that this processor
 * has is chosen at load. Threads are those of the OpenMP library that torch has loaded: its GOMP_parallel is handed in
 * (vashista_use_threads), so that no second pool competes for the cores. Without it everything runs on one thread.
 *
 * Every function returns 0, or -1 where its arguments are not supported; the Python doors check them before. */

#include "tasks.h"

typedef void work(void *task, int64_t thread, int64_t num_threads);

INLINE int64_t count_parts(int64_t context, int64_t oldest) {
    return (context + SPLIT - 1) / SPLIT - oldest / SPLIT;
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
    work *linear, *norm, *silu, *attend;
};

static const struct set sets[] = {
    {"plain", 4, run_linear_plain, run_norm_plain, run_silu_plain, run_attend_plain},
#ifdef __x86_64__
    {"AVX2", 8, run_linear_avx2, run_norm_avx2, run_silu_avx2, run_attend_avx2},
    {"AVX-512", 16, run_linear_avx512, run_norm_avx512, run_silu_avx512, run_attend_avx512},
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

#define EXPORT __attribute__((visibility("default")))

/* Version of the functions below; library.py refuses another. */
EXPORT int vashista_version(void) { return 2; }

/* The sets this processor can run are 0 to the returned number. */
EXPORT int vashista_best_set(void) { return best_set(); }

EXPORT const char *vashista_set_name(int set) { return sets[set].name; }

EXPORT void vashista_use_threads(void *gomp_parallel, void *omp_get_thread_num, void *omp_get_num_threads) {
    memcpy(&parallel, &gomp_parallel, sizeof parallel);
    memcpy(&thread_number, &omp_get_thread_num, sizeof thread_number);
    memcpy(&team_size, &omp_get_num_threads, sizeof team_size);
}

EXPORT int vashista_linear(const void *x, int64_t x_stride, const void *norm, float eps, const void *w, const void *bias,
                           const void *residual, int64_t residual_stride, void *y, float *scratch, int64_t m, int64_t n,
                           int64_t k, int bf16, int gated, int set, int64_t num_threads) {
    struct linear_task t = {.x = x, .norm = norm, .w = w, .bias = bias, .residual = residual, .y = y, .scratch = scratch,
                            .x_stride = x_stride, .residual_stride = residual_stride, .m = m, .n = n, .k = k, .eps = eps,
                            .bf16 = bf16, .gated = gated};
    if ((norm || bf16) && !scratch) return -1;
    /* About 64 KB of weights at a time: small enough to share evenly, large enough for the prefetch to pay. */
    t.chunk = most(4, 65536 / (k * (bf16 ? 2 : 4) * (gated ? 2 : 1)) / 4 * 4);
    share(sets[set].linear, &t, num_threads);
    return 0;
}

EXPORT int vashista_rms_norm(const void *x, int64_t x_outer, int64_t x_inner, void *y, int64_t y_outer, int64_t y_inner,
                             const void *weight, float eps, int64_t outer, int64_t inner, int64_t cols, int bf16, int set,
                             int64_t num_threads) {
    struct norm_task t = {.x = x, .weight = weight, .y = y, .x_outer = x_outer, .x_inner = x_inner, .y_outer = y_outer,
                          .y_inner = y_inner, .outer = outer, .inner = inner, .cols = cols, .eps = eps, .bf16 = bf16};
    share(sets[set].norm, &t, outer * inner * cols < 16384 ? 1 : num_threads);
    return 0;
}

EXPORT int vashista_silu_mul(const void *x, int64_t x_stride, void *y, int64_t rows, int64_t cols, int bf16, int set,
                             int64_t num_threads) {
    struct silu_task t = {.x = x, .y = y, .rows = rows, .cols = cols, .x_stride = x_stride, .bf16 = bf16};
    share(sets[set].silu, &t, rows * cols < 16384 ? 1 : num_threads);
    return 0;
}

/* Items of work of a call: the size of `partial` in rows of group * (head_dim + 2) floats. Fills plan. */
EXPORT int64_t vashista_plan(const int64_t *requests, int64_t num_requests, int64_t kv_heads, int64_t window,
                             int64_t *plan) {
    plan[0] = 0;
    for (int64_t i = 0; i < num_requests; i++) {
        const int64_t context = requests[3 * i + 1], oldest = window ? most(0, context - window) : 0;
        plan[i + 1] = plan[i] + kv_heads * count_parts(context, oldest);
    }
    return plan[num_requests];
}

/* plan: as vashista_plan left it. set: with LANES that divide head_dim, else the next smaller one is taken. */
EXPORT int vashista_attend(const void *qkv, void *cache, void *out, const float *cos, const float *sin,
                           const int64_t *requests, const int64_t *pages, int64_t *plan, int32_t *open, float *partial,
                           int64_t num_requests, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rotary,
                           int64_t page_size, int64_t num_slots, int64_t window, float scale, int bf16, int set,
                           int64_t num_threads) {
    struct attend_task t = {.qkv = qkv, .cache = cache, .out = out, .cos = cos, .sin = sin, .requests = requests,
                            .pages = pages, .plan = plan, .open = open, .partial = partial, .num_requests = num_requests,
                            .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim, .rotary = rotary,
                            .page_size = page_size, .num_slots = num_slots, .window = window, .scale = scale,
                            .bf16 = bf16};
    if (head_dim > MAX_HEAD || head_dim % 8 || rotary % 2 || rotary > head_dim || heads % kv_heads) return -1;
    while (head_dim % sets[set].lanes) set--;
    for (int64_t i = 0; i < num_requests; i++)
        for (int64_t h = 0; h < kv_heads; h++) open[i * kv_heads + h] = (int32_t)((plan[i + 1] - plan[i]) / kv_heads);
    share(sets[set].attend, &t, num_threads);
    return 0;
}

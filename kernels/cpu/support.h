/* Sums over a step's diagnostics: what each request left out, over layers and KV heads. One thread, some microseconds.
 * native.c includes this once; support.py is its door and says what the sums are. */

enum { DENSE, KEPT, VISIBLE, MASS_BOUND, MASS_ESTIMATE, GAP, NUM_SUMS };

/* e^x to 1e-15; below the smallest normal number 0. */
static double exp_of(double x) {
    if (x != x) return x;
    if (x > 709.) return __builtin_inf();
    if (x < -708.) return 0.;
    const double whole = __builtin_floor(x * 1.4426950408889634 + 0.5);
    const double rest = (x - whole * 0.693147180369123816) - whole * 1.90821492927058770e-10; /* |rest| < 0.347 */
    double series = 1.;
    for (int i = 14; i >= 1; i--) series = 1. + series * rest / i;
    const uint64_t bits = (uint64_t)((int64_t)whole + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return series * power;
}

/* The worse of two, of which a NaN is the worst. */
static double worse(double a, double b) { return a != a || a > b ? a : b; }

/* A head-step's part of a request's sums. of: its heads' diagnostics. A share of dropped mass rises with the log of
 * dropped over kept mass, so that the worst head's is found before it is made a share. Returns the share's estimate. */
static double add_head_step(const float *of, int64_t group, int64_t visible, int has_estimate, double *sums) {
    const double kept = (double)of[5];
    sums[KEPT] += kept, sums[VISIBLE] += (double)visible;
    if (kept >= (double)visible) {
        sums[DENSE] += 1.;
        return 0.;
    }
    double bound = -__builtin_inf(), estimate = bound, minus_gap = bound;
    for (int64_t g = 0; g < group; g++) {
        const float *head = of + 6 * g;
        bound = worse((double)head[4] - (double)head[0], bound);
        estimate = worse((double)head[2] - (double)head[0], estimate);
        minus_gap = worse((double)(head[3] - head[0]), minus_gap);
    }
    sums[MASS_BOUND] += bound == bound ? 1. / (1. + exp_of(-bound)) : 1.;
    const double share = has_estimate ? 1. / (1. + exp_of(-estimate)) : __builtin_nan("");
    sums[MASS_ESTIMATE] += share;
    sums[GAP] += has_estimate ? -minus_gap : __builtin_nan("");
    return share;
}

/* sums: NUM_SUMS for each of the `num_wanted` requests. estimates: [num_wanted, num_layers, kv_heads], of the dropped
 * mass of each head-step. windows: of each layer, 0 for none. */
static void sum_support(const struct sparse_step *s, const int64_t *windows, int64_t num_layers, const int64_t *wanted,
                        int64_t num_wanted, int has_estimate, double *sums, double *estimates) {
    const int64_t group = s->heads / s->kv_heads;
    memset(sums, 0, sizeof *sums * (size_t)(num_wanted * NUM_SUMS));
    for (int64_t layer = 0; layer < num_layers; layer++)
        for (int64_t i = 0; i < num_wanted; i++) {
            const int64_t context = s->requests[3 * wanted[i] + 1];
            const int64_t visible = windows[layer] ? least(context, windows[layer]) : context;
            const float *of = s->diagnostics + (layer * s->num_requests + wanted[i]) * s->heads * 6;
            double *found = estimates + (i * num_layers + layer) * s->kv_heads;
            for (int64_t head = 0; head < s->kv_heads; head++)
                found[head] =
                    add_head_step(of + head * group * 6, group, visible, has_estimate, sums + i * NUM_SUMS);
        }
}

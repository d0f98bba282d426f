/* Scores, selects, attends and merges for one (request, KV head) in one cluster of thread blocks, without a turn through
 * memory.
 *
 * Does what the programs of `unit_score` and `sparse_attend` do for a sparse pair, with the same masses, and from the same
 * scores the same kept groups, exactly (ties by the lowest index). Each block of the cluster owns a slice of the
 * candidates. What Triton has no words for is that blocks send numbers into each other's shared memory, and wait in
 * hardware until so many bytes have come: what all blocks count is known everywhere without a turn through memory, so that
 * they search together in place of each for itself, and the result of 16 blocks is merged without a counter in memory.
 *
 * Steps, with what is sent at the end of each (!):
 *   start      which pair, the pages of my slice; its summaries are brought nearer while the kernel before still works
 *   score      my slice, from its codes (`cluster_score.cu`); or its scores are loaded, which that kernel has made
 *   (with a coarse level, search and hand out come twice: first for its units, of which `cluster_rank.cu` scores the groups)
 *   search     16 guesses from a sample of all keys (!) are counted by all (!); the window between two of them is cut by 17
 *              again (!) until it holds few, which everybody gets (!) and ranks: the threshold is the need-th best key
 *   hand out   kept groups, in equal shares, to the blocks that attend to them (!)
 *   attend     a warp a group at a time, on tensor cores; before, each warp weighs what was dropped of its candidates (!)
 *   merge      each block gets its share of the output's dimensions from all (!) and writes it
 * Clusters behind those of the pairs write the summaries of the step's tokens (`cluster_upkeep.cu`).
 *
 * Compiled by `cluster.py` for one shape: GROUP (1 to 8), HEAD_DIM (a multiple of 16, from 64), PAGE_SIZE, CLUSTER,
 * KEYS_PER_THREAD, PER_COARSE, IS_SCORED, MAX_SHARE, MAX_OPENED, HAS_SOFTCAP, IS_HALF. `device.h` stands before it, the
 * other files behind, as in `launcher.SOURCES`.
 */

enum {
    GUESSES = 16,
    SAMPLE = 128,
    WINDOW = 256,
    UNIT = 16,
    RANKED = PER_COARSE > 0 ? UNIT * PER_COARSE : UNIT, /* tokens of the units whose scores are given */
    MAX_ITEMS = MAX_OPENED * PER_COARSE,                /* groups that a block scores itself */
    TEAM = MAX_ITEMS <= 32 ? 8 : 4,                     /* lanes that rank one */
    WARPS = THREADS / 32,
    WIDE = HEAD_DIM + 8, /* between rows in shared memory, so that eight rows lie in different banks */
    PAIRS = GROUP * HEAD_DIM / 2, /* of numbers of the output */
    PER_BLOCK = (PAIRS + CLUSTER - 1) / CLUSTER
};
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define NONE 0x007fffffu /* the place of -inf in the order of floats, see `order_of` */
#define MINUS_INFINITY float_of((int)0xff800000)

/* Summaries, see `key_summary`: codes of means and variances, and steps; of a page all of them take `record_bytes`. */
typedef struct {
    unsigned char *codes, *second_codes;
    float *steps;
    long long record_bytes, unit;
} Level;

typedef struct {
    const void *q, *k_cache, *v_cache;
    const int *page_table, *context_lens, *budgets;
    float *scores, *keys, *bounds; /* of the units that are ranked first: of the coarse level if there is one */
    const long long *slots;
    int *coarse_units, *coarse_kept;
    float *coarse_mass, *item_scores, *item_keys, *item_bounds;
    int *units, *num_kept;
    float *mass;
    void *out;
    float *lse;
    long long q_stride_row, q_stride_head, k_stride_page, k_stride_head, k_stride_token, v_stride_page, v_stride_head,
        v_stride_token, out_stride_row, out_stride_head, lse_stride, table_stride, capacity, max_kept, max_coarse, item_capacity;
    Level levels[2]; /* of groups, and of coarse units */
    int num_pairs, num_kv_heads, num_upkeep; /* levels whose summaries of the step's tokens are written */
    int window, num_sinks, num_recent, num_candidates, per_kept, full_context;
    int is_alone; /* no kernel follows that attends to dense pairs: there are none */
    float scale, softcap, slack;
} Job;

typedef struct {
    int group, page;
} Place;

typedef struct {
    /* attention: keys and values of a group a warp */
    VECTORS Bits16 keys[WARPS][UNIT][WIDE], values[WARPS][UNIT][WIDE]; /* until then see `Slice` */
    VECTORS float run_acc[WARPS][GROUP][WIDE];
    VECTORS int parts[CLUSTER][PER_BLOCK][2]; /* bits */
    VECTORS unsigned sample[SAMPLE], guesses[GUESSES];
    VECTORS int window[WINDOW];
    float run_peak[WARPS][GROUP], run_total[WARPS][GROUP];
    VECTORS int part_runs[CLUSTER][GROUP][2]; /* bits of peak and total */
    VECTORS Bits16 query[GROUP][HEAD_DIM];
    Signal sample_signal, count_signals[2], window_signal, opened_signal, item_signal, kept_signal, place_signal, mass_signal, merge_signal;
#if PER_COARSE > 0 || IS_SCORED
    VECTORS int query_codes[2 * GROUP][HEAD_DIM / 4 + 4], square_codes[2 * GROUP][HEAD_DIM / 4 + 4];
    float step[GROUP], square_step[GROUP], norm[GROUP], doubt[GROUP]; /* of each head, see `split_query` */
#endif
#if PER_COARSE > 0
    VECTORS unsigned items[CLUSTER * MAX_ITEMS]; /* keys of all candidates */
    float item_scores[MAX_ITEMS], item_bounds[MAX_ITEMS];
    unsigned kept_lanes[CLUSTER][WARPS]; /* of which teams' candidates are kept, a bit every TEAM lanes */
    VECTORS Place opened[MAX_OPENED];
    VECTORS int coarse_masses[CLUSTER * WARPS][3][2];
#endif
    VECTORS Place places[MAX_SHARE];
    /* the search */
    unsigned ranks[2][SAMPLE];
    unsigned warp_counts[WARPS][GUESSES / 2];
    int counts[2][CLUSTER][GUESSES / 2];
    int num_local;
    unsigned threshold;
    int warp_sums[WARPS];
    VECTORS int masses[CLUSTER * WARPS][3][2]; /* what is kept, dropped, and its bound, a warp: bits of peak and sum */
} Shared;
GIVE_SIZE(Shared)
ENSURE(HEAD_DIM / 2 >= CLUSTER, "`send_runs` has a thread send to each block");

/* What a block knows of its candidates while it has no keys and values yet, in their place. */
typedef struct {
    unsigned order[KEYS_PER_THREAD * THREADS];
    int page[KEYS_PER_THREAD * THREADS];
    float score[KEYS_PER_THREAD * THREADS], bound[KEYS_PER_THREAD * THREADS];
} Slice;
DEVICE Slice *slice_of(Shared *shared) {
    ENSURE(sizeof(Slice) <= sizeof shared->keys + sizeof shared->values, "a slice has no room");
    return (Slice *)shared->keys;
}

DEVICE int least(int one, int other) { return one < other ? one : other; }
DEVICE int most(int one, int other) { return one > other ? one : other; }
DEVICE float most_of(float one, float other) { return one > other ? one : other; }
DEVICE int divide_up(int number, int by) { return (number + by - 1) / by; }

/* A float's place in the order of all; 0x007fffff for -inf. */
DEVICE unsigned order_of(float value) {
    int bits = bits_of(value + 0.0f); /* no negative zero */
    return bits < 0 ? ~(unsigned)bits : (unsigned)bits | 0x80000000u;
}
/* The inverse. */
DEVICE float value_of(unsigned order) {
    return float_of((int)(order & 0x80000000u ? order & 0x7fffffffu : ~order));
}
/* What to subtract before an exponential. */
DEVICE float shift_of(float peak) { return peak == MINUS_INFINITY ? 0.0f : peak; }
DEVICE float exponential(float value) { return power_of_two(value * LOG2_E); }
DEVICE float log_of(float total, float peak) {
    if (peak > 3e38f) return peak;
    return total > 0.0f ? shift_of(peak) + natural_log(total) : MINUS_INFINITY;
}
DEVICE float log_add(float one, float other) {
    float peak = most_of(one, other), shift = shift_of(peak);
    return log_of(exponential(one - shift) + exponential(other - shift), peak);
}

/* What units of a pair are candidates, and what is kept anyway; as `unit_select.count_forced` and `list_units`. */
typedef struct {
    int low, high, first_unit, visible, num_items, need, sinks, recent, last;
} Pair;

DEVICE Pair read_pair(const Job *job, int size, int wanted, int low, int high) {
    Pair found;
    found.low = low;
    found.high = high;
    found.first_unit = low / size;
    int visible = divide_up(high, size) - found.first_unit;
    int sinks = least(most(divide_up(job->num_sinks, size) - found.first_unit, 0), visible);
    int recent = least(most(most(high - job->num_recent, 0) / size - found.first_unit, 0), visible);
    found.sinks = sinks;
    found.recent = most(recent, sinks);
    found.visible = visible;
    found.last = visible - found.recent;
    found.need = most(wanted - (sinks + found.last), 0);
    found.num_items = visible;
    return found;
}

/* Where a search stands: `num_low` >= need keys lie at or above `low`, `num_high` < need at or above `high`. Of lane r
 * the same of block r alone. */
typedef struct {
    unsigned low, high;
    int num_low, num_high, own_low, own_high;
} Search;

/* Send those of my candidates' keys that are in the sample of all to everybody; `num` of them, from `first` on. With their
 * number in place of the lowest bits, so that no two are equal. */
DEVICE void send_sample(Shared *shared, int num_items, int first, int num) {
    if (thread_index() == 0) expect_bytes(&shared->sample_signal, SAMPLE * 4);
    for (int i = thread_index(); i < SAMPLE * CLUSTER; i += THREADS) {
        int number = i / CLUSTER, item = number * num_items / SAMPLE - first;
        if (item < 0 || item >= num) continue;
        unsigned order = (slice_of(shared)->order[item] & ~(SAMPLE - 1u)) + (unsigned)number;
        send_int((int *)&shared->sample[number], i % CLUSTER, (int)order, &shared->sample_signal);
    }
}

/* Sixteen guesses from that sample, the same in every block, descending: where the sample has the threshold, and around
 * it; the last takes all. */
DEVICE void guess_first(Shared *shared, int num_items, int need) {
    int thread = thread_index(), mine = thread % SAMPLE, half = thread / SAMPLE;
    int expected = (need * (2 * SAMPLE) / num_items + 1) / 2, width = expected < 4 ? 0 : expected < 36 ? 1 : 2;
    int first = expected - ((GUESSES / 2 - 1) << width);
    if (thread < GUESSES) /* where the sample does not reach */
        shared->guesses[thread] = first + (thread << width) < 0 ? ~0u : NONE + 1;
    wait_for_signal(&shared->sample_signal, 0);
    unsigned value = shared->sample[mine];
    unsigned rank = 0;
    UNROLL for (int i = 0; i < SAMPLE / 8; i++) {
        Vector four = *(const Vector *)&shared->sample[half * (SAMPLE / 2) + 4 * i];
        rank += (four.x > value) + (four.y > value) + (four.z > value) + (four.w > value);
    }
    shared->ranks[half][mine] = rank;
    sync_block();
    int place = (int)(shared->ranks[0][mine] + shared->ranks[1][mine]) - first, number = place >> width;
    if (thread < SAMPLE && number >= 0 && number < GUESSES - 1 && number << width == place && value > NONE)
        shared->guesses[number] = value;
    sync_block();
}
/* Between the ends in equal steps of their order. */
DEVICE void guess_next(Shared *shared, Search search) {
    int thread = thread_index();
    unsigned long long distance = search.high - search.low;
    if (thread < GUESSES) shared->guesses[thread] = search.high - (unsigned)(distance * (thread + 1) / (GUESSES + 1));
    sync_block();
}

/* One round: everybody counts its keys at or above 16 guesses, and learns what all have. */
DEVICE Search count_round(Shared *shared, Search search, const unsigned *order, int need, int round) {
    int thread = thread_index(), lane = thread % 32, warp = thread / 32, rank = block_rank();
    /* read before the block waits: behind that a faster warp may make the next guesses */
    unsigned packed[GUESSES / 2], guess = shared->guesses[lane % GUESSES];
    UNROLL for (int k = 0; k < GUESSES / 2; k++) {
        unsigned one = shared->guesses[2 * k], two = shared->guesses[2 * k + 1], count = 0;
        UNROLL for (int j = 0; j < KEYS_PER_THREAD; j++)
            count += (order[j] >= one) + ((unsigned)(order[j] >= two) << 16);
        packed[k] = add_in_warp(count);
    }
    if (lane == 0) {
        UNROLL for (int k = 0; k < GUESSES / 2; k++) shared->warp_counts[warp][k] = packed[k];
    }
    sync_block();
    Signal *signal = &shared->count_signals[round % 2];
    if (thread == 0) expect_bytes(signal, CLUSTER * (GUESSES / 2) * 4);
    if (thread < CLUSTER * (GUESSES / 2)) {
        int to = thread / (GUESSES / 2), k = thread % (GUESSES / 2);
        unsigned sum = 0;
        UNROLL for (int w = 0; w < WARPS; w++) sum += shared->warp_counts[w][k];
        send_int(&shared->counts[round % 2][rank][k], to, (int)sum, signal);
    }
    wait_for_signal(signal, round / 2);
    const int(*counts)[GUESSES / 2] = shared->counts[round % 2];
    int total = 0;
    for (int r = lane / 8; r < CLUSTER; r += 4) total += counts[r][lane % 8];
    total += int_across(total, 8);
    total += int_across(total, 16);
    /* now lane l has the counts of guesses 2 (l % 8) and the next; it looks at guess l % 16 */
    int number = lane % GUESSES;
    int count = (int)((unsigned)int_from(total, number / 2) >> number % 2 * 16) & 0xffff;
    unsigned enough = lanes_where(count >= need) & 0xffff;
    int found = enough ? first_bit(enough) : GUESSES;
    int before = most(found - 1, 0), at = least(found, GUESSES - 1);
    unsigned low = (unsigned)int_from((int)guess, at), high = (unsigned)int_from((int)guess, before);
    int num_low = int_from(count, at), num_high = int_from(count, before);
    int row = least(lane, CLUSTER - 1);
    int own_low = (int)((unsigned)counts[row][at / 2] >> at % 2 * 16) & 0xffff;
    int own_high = (int)((unsigned)counts[row][before / 2] >> before % 2 * 16) & 0xffff;
    if (found > 0) {
        search.high = high;
        search.num_high = num_high;
        search.own_high = own_high;
    }
    if (found < GUESSES || round == 0) { /* in the first round the last guess is the lowest possible */
        search.low = low;
        search.num_low = num_low;
        search.own_low = own_low;
    }
    return search;
}

/* What a search ended with: keys above `order` are kept, and of those that equal it, the first `num_tied` of all. */
typedef struct {
    unsigned order;
    int num_free, num_tied, above_before, tied_before; /* the last two of the blocks before this one */
} Threshold;

/* Everybody gets the few keys between the ends of the search, block after block, and ranks them. */
DEVICE Threshold rank_window(Shared *shared, Search search, const unsigned *order, int need) {
    int thread = thread_index(), lane = thread % 32, warp = thread / 32, is_before = lane < block_rank();
    int start_low = (int)add_in_warp(is_before ? (unsigned)search.own_low : 0);
    int start_high = (int)add_in_warp(is_before ? (unsigned)search.own_high : 0);
    int start = start_low - start_high, size = search.num_low - search.num_high;
    if (thread == 0) expect_bytes(&shared->window_signal, size * 4);
    UNROLL for (int j = 0; j < KEYS_PER_THREAD; j++) {
        if (order[j] >= search.low && order[j] < search.high) {
            int *place = &shared->window[start + add_shared(&shared->num_local, 1)];
            UNROLL for (int to = 0; to < CLUSTER; to++) send_int(place, to, (int)order[j], &shared->window_signal);
        }
    }
    wait_for_signal(&shared->window_signal, 0);
    const unsigned *window = (const unsigned *)shared->window; /* zeros behind */
    if (warp * 32 < size) {
        unsigned value = window[thread];
        int rank = search.num_high, i = 0; /* of equal keys the earlier one has the lower rank */
        for (; i < warp * 32; i += 4) {
            Vector four = *(const Vector *)&window[i];
            rank += (four.x >= value) + (four.y >= value) + (four.z >= value) + (four.w >= value);
        }
        for (; i < warp * 32 + 32; i++) rank += window[i] > value || (window[i] == value && i < thread);
        for (; i < size; i += 4) {
            Vector four = *(const Vector *)&window[i];
            rank += (four.x > value) + (four.y > value) + (four.z > value) + (four.w > value);
        }
        if (thread < size && rank == need - 1) shared->threshold = value;
    }
    sync_block();
    Threshold found;
    found.order = shared->threshold;
    unsigned packed = 0; /* above and tied in earlier blocks, above in all: 256 at most, each */
    for (int i = lane; i < size; i += 32) {
        int is_above = window[i] > found.order, is_tied = window[i] == found.order, is_earlier = i < start;
        packed += (is_above && is_earlier) + ((unsigned)(is_tied && is_earlier) << 10) + ((unsigned)is_above << 20);
    }
    packed = add_in_warp(packed);
    found.above_before = start_high + (int)(packed & 1023);
    found.tied_before = (int)(packed >> 10 & 1023);
    found.num_tied = need - search.num_high - (int)(packed >> 20);
    found.num_free = need;
    return found;
}

/* Whether a group is kept whatever it scores. */
DEVICE int is_forced(Pair pair, int group) {
    int from_first = group - pair.first_unit;
    return from_first >= 0 && from_first < pair.visible && (from_first < pair.sinks || from_first >= pair.recent);
}

/* Begin to bring a group's keys and values nearer. */
DEVICE void fetch_place(const Job *job, long long head, Place place) {
    int offset = place.group * UNIT % PAGE_SIZE;
    const Bits16 *key = (const Bits16 *)job->k_cache + head * job->k_stride_head + place.page * job->k_stride_page +
                        offset * job->k_stride_token;
    const Bits16 *value = (const Bits16 *)job->v_cache + head * job->v_stride_head + place.page * job->v_stride_page +
                          offset * job->v_stride_token;
    if (job->k_stride_token == HEAD_DIM && job->v_stride_token == HEAD_DIM) {
        fetch_ahead(key, UNIT * HEAD_DIM * 2);
        fetch_ahead(value, UNIT * HEAD_DIM * 2);
        return;
    }
    NO_UNROLL for (int i = 0; i < UNIT; i++) {
        fetch_ahead(key + i * job->k_stride_token, HEAD_DIM * 2);
        fetch_ahead(value + i * job->v_stride_token, HEAD_DIM * 2);
    }
}

/* The same for the summaries of `num` neighbouring units of `size` tokens. */
DEVICE void fetch_summaries(const Level *level, long long head, int size, int page, int unit, int num) {
    long long at = head * (PAGE_SIZE / size) + unit % (PAGE_SIZE / size), record = page * level->record_bytes;
    fetch_ahead(level->codes + record + at * HEAD_DIM, num * HEAD_DIM);
    fetch_ahead(level->second_codes + record + at * (HEAD_DIM / 2), num * HEAD_DIM / 2);
    fetch_ahead(level->steps + record / 4 + at * 4, num * 16);
}

/* The same for what is kept for certain, while the rest of a search goes on; of a coarse unit, its groups' summaries. */
DEVICE void fetch_certain(const Job *job, long long head, Pair pair, unsigned high, const unsigned *order, const Place *mine) {
    UNROLL for (int j = 0; j < KEYS_PER_THREAD; j++) {
        if (order[j] >= high || is_forced(pair, mine[j].group)) {
#if PER_COARSE > 0
            fetch_summaries(&job->levels[0], head, UNIT, mine[j].page, mine[j].group * PER_COARSE, PER_COARSE);
#else
            fetch_place(job, head, mine[j]);
#endif
        }
    }
}

DEVICE Threshold find_threshold(
    Shared *shared, const Job *job, long long head, Pair pair, const unsigned *order, const Place *mine
) {
    int lane = thread_index() % 32, is_before = lane < block_rank();
    Threshold found;
    if (pair.need == 0) {
        found.order = ~0u;
        found.num_free = found.num_tied = found.above_before = found.tied_before = 0;
        return found;
    }
    guess_first(shared, pair.num_items, pair.need);
    Search search;
    search.low = search.high = ~0u;
    search.num_low = search.num_high = search.own_low = search.own_high = 0;
    int round = 0;
    while (1) {
        search = count_round(shared, search, order, pair.need, round);
        if (round++ == 0) fetch_certain(job, head, pair, search.high, order, mine);
        int is_exact = search.num_low <= pair.need || search.high - search.low == 1;
        if (is_exact || search.num_low - search.num_high <= WINDOW) break;
        guess_next(shared, search);
    }
    if (search.num_low > pair.need && search.high - search.low > 1) return rank_window(shared, search, order, pair.need);
    found.num_free = least(search.num_low, pair.need);
    if (search.num_low <= pair.need) { /* everything at or above `low` */
        found.order = search.low - 1;
        found.num_tied = found.tied_before = 0;
        found.above_before = (int)add_in_warp(is_before ? (unsigned)search.own_low : 0);
    } else { /* `low` itself comes more often than it may be kept */
        found.order = search.low;
        found.num_tied = pair.need - search.num_high;
        found.above_before = (int)add_in_warp(is_before ? (unsigned)search.own_high : 0);
        found.tied_before = (int)add_in_warp(is_before ? (unsigned)(search.own_low - search.own_high) : 0);
    }
    return found;
}

/* Send kept units, in their order and in equal shares, to those that work on them, and write their list; the bits of my
 * keys that are kept. Sinks and recent units have no key: they come first and last. */
DEVICE unsigned hand_out(
    Shared *shared, int *units, Place *places, Signal *signal, Pair pair, Threshold threshold, const unsigned *order,
    const Place *mine, int count, int share
) {
    int thread = thread_index(), lane = thread % 32, warp = thread / 32;
    if (thread == 0) {
        int before = least(block_rank() * share, count);
        expect_bytes(signal, (least(before + share, count) - before) * (int)sizeof(Place));
    }
    int own = 0;
    UNROLL for (int j = 0; j < KEYS_PER_THREAD; j++)
        own += (order[j] > threshold.order) + ((order[j] == threshold.order) << 16);
    int sum = own;
    UNROLL for (int distance = 1; distance < 32; distance *= 2) {
        int below = int_from_below(sum, distance);
        if (lane >= distance) sum += below;
    }
    if (lane == 31) shared->warp_sums[warp] = sum;
    sync_block();
    sum -= own;
    UNROLL for (int w = 0; w < WARPS - 1; w++) sum += w < warp ? shared->warp_sums[w] : 0;
    int above = threshold.above_before + (sum & 0xffff), tied = threshold.tied_before + (int)((unsigned)sum >> 16);
    unsigned is_kept = 0;
    UNROLL for (int j = 0; j < KEYS_PER_THREAD; j++) {
        int is_above = order[j] > threshold.order, is_tied = order[j] == threshold.order, at = count;
        if (is_above || (is_tied && tied < threshold.num_tied)) {
            at = pair.sinks + above + least(tied, threshold.num_tied);
            is_kept |= 1u << j;
        } else if (is_forced(pair, mine[j].group)) {
            int from_first = mine[j].group - pair.first_unit;
            at = from_first < pair.sinks ? from_first : pair.sinks + threshold.num_free + from_first - pair.recent;
        }
        if (at < count) {
            int to = at / share;
            units[at] = mine[j].group;
            send_two(&places[at - to * share], to, mine[j].group, mine[j].page, signal);
        }
        above += is_above;
        tied += is_tied;
    }
    return is_kept;
}

/* Attention to the groups that `cluster_search.cu` handed out, what was dropped meanwhile, and the merge: see there. */

/* The masses of my warp's `num` candidates a thread, to `masses` of block 0: see `unit_mass`. */
DEVICE void weigh(
    Shared *shared, int (*masses)[3][2], int num, const unsigned *order, const float *known, const float *bounds,
    unsigned is_kept
) {
    int lane = thread_index() % 32, warp = thread_index() / 32;
    unsigned peak[3] = {NONE, NONE, NONE}; /* kept, dropped, bound of dropped */
    UNROLL for (int j = 0; j < num; j++) {
        int is_dropped = order[j] > NONE && !(is_kept >> j & 1);
        unsigned kept = is_kept >> j & 1 ? order[j] : order_of(known[j]), bound = order_of(bounds[j]);
        if (is_dropped && order[j] > peak[1]) peak[1] = order[j];
        if (is_dropped && bound > peak[2]) peak[2] = bound;
        if (!is_dropped && kept > peak[0]) peak[0] = kept;
    }
    float shift[3], total[3] = {0.0f, 0.0f, 0.0f};
    UNROLL for (int k = 0; k < 3; k++) {
        peak[k] = most_in_warp(peak[k]);
        shift[k] = shift_of(value_of(peak[k]));
    }
    UNROLL for (int j = 0; j < num; j++) {
        int is_mine = is_kept >> j & 1, is_dropped = order[j] > NONE && !is_mine;
        float value = order[j] > NONE ? value_of(order[j]) : known[j];
        float power = exponential(value - (is_dropped ? shift[1] : shift[0]));
        total[0] += is_dropped ? 0.0f : power;
        total[1] += is_dropped ? power : 0.0f;
        if (is_dropped) total[2] += exponential(bounds[j] - shift[2]);
    }
    UNROLL for (int k = 0; k < 3; k++) {
        UNROLL for (int mask = 16; mask > 0; mask /= 2) total[k] += float_across(total[k], mask);
    }
    if (lane < 3) {
        float top = value_of(lane == 0 ? peak[0] : lane == 1 ? peak[1] : peak[2]);
        float sum = lane == 0 ? total[0] : lane == 1 ? total[1] : total[2];
        send_two(masses[block_rank() * WARPS + warp][lane], 0, bits_of(top), bits_of(sum), &shared->mass_signal);
    }
}

typedef struct {
    float kept, dropped, most_dropped, bound;
} Mass;

/* Of a level, what the warps have sent; by one warp. */
DEVICE Mass add_masses(const int (*masses)[3][2], float slack) {
    enum { EACH = CLUSTER * WARPS / 32 };
    int lane = thread_index() % 32;
    float sums[3], peaks[3];
    UNROLL for (int k = 0; k < 3; k++) {
        float top = MINUS_INFINITY, sum = 0.0f;
        UNROLL for (int i = 0; i < EACH; i++) top = most_of(float_of(masses[i * 32 + lane][k][0]), top);
        top = value_of(most_in_warp(order_of(top)));
        UNROLL for (int i = 0; i < EACH; i++) {
            const int *mine = masses[i * 32 + lane][k];
            sum += float_of(mine[1]) * exponential(float_of(mine[0]) - shift_of(top));
        }
        UNROLL for (int mask = 16; mask > 0; mask /= 2) sum += float_across(sum, mask);
        sums[k] = log_of(sum, top);
        peaks[k] = top;
    }
    float size = shift_of(sums[2]) < 0.0f ? -shift_of(sums[2]) : shift_of(sums[2]);
    Mass mass = {sums[0], sums[1], peaks[1], sums[2] + slack + 1e-6f * size};
    return mass;
}
DEVICE void write_mass(float *to, Mass mass) {
    to[0] = mass.kept;
    to[1] = mass.dropped;
    to[2] = mass.most_dropped;
    to[3] = mass.dropped == MINUS_INFINITY ? MINUS_INFINITY : mass.bound;
}

/* The query as the tensor core takes it: of the head lane / 4, dimensions lane % 4 * 2 and the next, of each half of 16. */
typedef struct {
    unsigned low[HEAD_DIM / 16], high[HEAD_DIM / 16];
} Query;

DEVICE Query load_query(const Shared *shared) {
    Query query;
    int lane = thread_index() % 32, member = lane / 4;
    UNROLL for (int k = 0; k < HEAD_DIM / 16; k++) {
        query.low[k] = query.high[k] = 0;
        if (member < GROUP) {
            query.low[k] = *(const unsigned *)&shared->query[member][k * 16 + lane % 4 * 2];
            query.high[k] = *(const unsigned *)&shared->query[member][k * 16 + 8 + lane % 4 * 2];
        }
    }
    return query;
}

/* Begin to copy one group's keys or values into the warp's place in shared memory, 16 bytes a lane and turn; what is not
 * visible becomes zero and is not read. */
DEVICE void fetch_rows(Bits16 (*to)[WIDE], const Bits16 *from, long long stride, int first, Pair pair) {
    enum { CHUNKS = HEAD_DIM / 8, ROWS = 32 / CHUNKS, TURNS = UNIT * CHUNKS / 32 };
    int lane = thread_index() % 32;
    if (32 % CHUNKS == 0 && first >= pair.low && first + UNIT <= pair.high) {
        int token = lane / CHUNKS, column = lane % CHUNKS * 8;
        Spot spot = spot_of(&to[token][column]);
        from += token * stride + column;
        UNROLL for (int i = 0; i < TURNS; i++) {
            copy_or_clear(spot + i * ROWS * (int)sizeof to[0], from, 1);
            from += ROWS * stride;
        }
        return;
    }
    NO_UNROLL for (int i = lane; i < UNIT * CHUNKS; i += 32) {
        int token = i / CHUNKS, column = i % CHUNKS * 8;
        int is_there = first + token >= pair.low && first + token < pair.high;
        copy_or_clear(spot_of(&to[token][column]), from + token * stride + column, is_there);
    }
}

DEVICE void fetch_group(Shared *shared, const Job *job, const Bits16 *k_head, const Bits16 *v_head, Pair pair, Place place) {
    int warp = thread_index() / 32, first = place.group * UNIT, offset = first % PAGE_SIZE;
    k_head += place.page * job->k_stride_page + offset * job->k_stride_token;
    v_head += place.page * job->v_stride_page + offset * job->v_stride_token;
    fetch_rows(shared->keys[warp], k_head, job->k_stride_token, first, pair);
    fetch_rows(shared->values[warp], v_head, job->v_stride_token, first, pair);
}

/* What a warp has of the output: of head lane / 4, dimensions 8 t + lane % 4 * 2 and the next. */
typedef struct {
    float acc[HEAD_DIM / 8][2], peak, total;
} Run;

/* One group: logits, weights, and its values added to the run. */
DEVICE void attend_group(Shared *shared, const Job *job, Query query, Pair pair, int group, Run *run) {
    int lane = thread_index() % 32, warp = thread_index() / 32;
    wait_for_copies();
    sync_warp();
    Spot key_spot = spot_of(&shared->keys[warp][lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
    float logit[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}}; /* of tokens 8 t + lane % 4 * 2 and the next */
    float other[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}}; /* of every second step: half the time in a row */
    UNROLL for (int k = 0; k < HEAD_DIM / 16; k++) {
        unsigned key[4];
        load_matrices(key, key_spot + k * 32);
        multiply_add(k % 2 ? other[0] : logit[0], query.low[k], query.high[k], key[0], key[1]);
        multiply_add(k % 2 ? other[1] : logit[1], query.low[k], query.high[k], key[2], key[3]);
    }
    float top = MINUS_INFINITY;
    UNROLL for (int i = 0; i < 4; i++) {
        int token = group * UNIT + i / 2 * 8 + lane % 4 * 2 + i % 2;
        float value = (logit[i / 2][i % 2] + other[i / 2][i % 2]) * job->scale;
        if (HAS_SOFTCAP) value = job->softcap * hyperbolic_tangent(value / job->softcap);
        value = token >= pair.low && token < pair.high ? value * LOG2_E : MINUS_INFINITY;
        logit[i / 2][i % 2] = value;
        top = most_of(value, top);
    }
    top = most_of(float_across(top, 1), top);
    top = most_of(float_across(top, 2), top);
    float new_peak = most_of(top, run->peak), shift = shift_of(new_peak), factor = power_of_two(run->peak - shift), sum = 0.0f;
    UNROLL for (int i = 0; i < 4; i++) {
        logit[i / 2][i % 2] = power_of_two(logit[i / 2][i % 2] - shift);
        sum += logit[i / 2][i % 2];
    }
    sum += float_across(sum, 1);
    sum += float_across(sum, 2);
    run->total = run->total * factor + sum;
    run->peak = new_peak;
    unsigned weight[2], rest[2]; /* rounded, and what rounding took: together exact enough */
    UNROLL for (int i = 0; i < 2; i++) {
        weight[i] = narrow_two(logit[i][0], logit[i][1]);
        rest[i] = narrow_two(
            logit[i][0] - widen((Bits16)(weight[i] & 0xffff)), logit[i][1] - widen((Bits16)(weight[i] >> 16))
        );
    }
    Spot value_spot = spot_of(&shared->values[warp][lane % 16][lane / 16 * 8]);
    UNROLL for (int t = 0; t < HEAD_DIM / 8; t += 2) {
        unsigned value[4];
        load_transposed(value, value_spot + t * 16);
        UNROLL for (int i = 0; i < 2; i++) {
            run->acc[t + i][0] *= factor;
            run->acc[t + i][1] *= factor;
            multiply_add(run->acc[t + i], weight[0], weight[1], value[2 * i], value[2 * i + 1]);
            multiply_add(run->acc[t + i], rest[0], rest[1], value[2 * i], value[2 * i + 1]);
        }
    }
    sync_warp(); /* the place is free */
}

/* The runs of my block's warps, to the blocks that have a share of the output. */
DEVICE void send_runs(Shared *shared, const Run *run) {
    int thread = thread_index(), lane = thread % 32, warp = thread / 32, rank = block_rank(), member = lane / 4;
    if (member < GROUP) {
        UNROLL for (int t = 0; t < HEAD_DIM / 8; t++) {
            shared->run_acc[warp][member][t * 8 + lane % 4 * 2] = run->acc[t][0];
            shared->run_acc[warp][member][t * 8 + lane % 4 * 2 + 1] = run->acc[t][1];
        }
        if (lane % 4 == 0) {
            shared->run_peak[warp][member] = run->peak;
            shared->run_total[warp][member] = run->total;
        }
    }
    sync_block();
    for (int at = thread; at < PAIRS; at += THREADS) {
        int of = at / (HEAD_DIM / 2), first = at % (HEAD_DIM / 2) * 2;
        float top = MINUS_INFINITY, all = 0.0f, sum = 0.0f, sum_2 = 0.0f;
        UNROLL for (int w = 0; w < WARPS; w++) top = most_of(shared->run_peak[w][of], top);
        UNROLL for (int w = 0; w < WARPS; w++) {
            float factor = power_of_two(shared->run_peak[w][of] - shift_of(top));
            sum += factor * shared->run_acc[w][of][first];
            sum_2 += factor * shared->run_acc[w][of][first + 1];
            all += factor * shared->run_total[w][of];
        }
        send_two(shared->parts[rank][at % PER_BLOCK], at / PER_BLOCK, bits_of(sum), bits_of(sum_2), &shared->merge_signal);
        if (first / 2 < CLUSTER)
            send_two(shared->part_runs[rank][of], first / 2, bits_of(top), bits_of(all), &shared->merge_signal);
    }
}

/* The runs of all blocks, for my share of the output. */
DEVICE void merge(Shared *shared, const Job *job, long long request, long long head) {
    int thread = thread_index(), rank = block_rank();
    wait_for_signal(&shared->merge_signal, 0);
    for (int i = thread; i < least(PER_BLOCK, PAIRS - rank * PER_BLOCK); i += THREADS) {
        int at = rank * PER_BLOCK + i, of = at / (HEAD_DIM / 2), first = at % (HEAD_DIM / 2) * 2;
        float top = MINUS_INFINITY, all = 0.0f, sum = 0.0f, sum_2 = 0.0f;
        UNROLL for (int r = 0; r < CLUSTER; r++) top = most_of(float_of(shared->part_runs[r][of][0]), top);
        UNROLL for (int r = 0; r < CLUSTER; r++) {
            float factor = power_of_two(float_of(shared->part_runs[r][of][0]) - shift_of(top));
            sum += factor * float_of(shared->parts[r][i][0]);
            sum_2 += factor * float_of(shared->parts[r][i][1]);
            all += factor * float_of(shared->part_runs[r][of][1]);
        }
        long long query_head = head * GROUP + of;
        Bits16 *to = (Bits16 *)job->out + request * job->out_stride_row + query_head * job->out_stride_head + first;
        to[0] = narrow(quotient(sum, all));
        to[1] = narrow(quotient(sum_2, all));
        if (job->lse && first == 0) job->lse[request * job->lse_stride + query_head] = top * LN_2 + natural_log(all);
    }
}

/* A pair that is not sparse: nothing is done, but where it has no context, or nobody else would come to it. */
DEVICE void skip_pair(const Job *job, long long index, long long request, long long head, int is_empty) {
    wait_for_previous();
    let_next_start();
    if (!is_empty && !job->is_alone) return;
    float value = is_empty ? 0.0f : float_of(0x7fc00000); /* NaN where the caller's word does not hold */
    for (int i = block_rank() * THREADS + thread_index(); i < GROUP * HEAD_DIM; i += CLUSTER * THREADS) {
        long long query_head = head * GROUP + i / HEAD_DIM;
        Bits16 *to = (Bits16 *)job->out + request * job->out_stride_row + query_head * job->out_stride_head;
        to[i % HEAD_DIM] = narrow(value);
        if (job->lse && i % HEAD_DIM == 0) job->lse[request * job->lse_stride + query_head] = is_empty ? MINUS_INFINITY : value;
    }
    if (block_rank() == 0 && thread_index() == 0) job->num_kept[index] = 0;
    if (block_rank() == 0 && thread_index() < 4) job->mass[index * 4 + thread_index()] = MINUS_INFINITY;
}

KERNEL cluster_attend(ARGUMENT Job given) {
    const Job *job = &given;
    Shared *shared = SHARED(Shared);
    int thread = thread_index(), lane = thread % 32, warp = thread / 32, rank = block_rank();
    long long index = cluster_index(), request = index / job->num_kv_heads, head = index % job->num_kv_heads;
#if IS_SCORED
    if (index >= job->num_pairs) {
        wait_for_previous();
        let_next_start();
        keep_up(shared, job, (index - job->num_pairs) * CLUSTER + rank);
        return;
    }
#endif
    int high = load_int(job->context_lens + request), budget = load_int(job->budgets + index);
    int low = job->window > 0 ? most(high - job->window, 0) : 0;
    if (budget >= high - low) {
        skip_pair(job, index, request, head, high == low);
        return;
    }
    for (int i = thread; i < WINDOW; i += THREADS) shared->window[i] = 0;
    if (thread == 0) {
        shared->num_local = 0;
        begin_signal(&shared->sample_signal);
        begin_signal(&shared->count_signals[0]);
        begin_signal(&shared->count_signals[1]);
        begin_signal(&shared->window_signal);
        begin_signal(&shared->opened_signal);
        begin_signal(&shared->item_signal);
        begin_signal(&shared->kept_signal);
        begin_signal(&shared->place_signal);
        begin_signal(&shared->mass_signal);
        begin_signal(&shared->merge_signal);
        int pairs = most(least(PAIRS - rank * PER_BLOCK, PER_BLOCK), 0), levels = PER_COARSE > 0 ? 2 : 1;
        if (rank == 0) expect_bytes(&shared->mass_signal, CLUSTER * WARPS * levels * 24);
        expect_bytes(&shared->merge_signal, CLUSTER * 8 * (pairs + GROUP));
    }
    arrive_cluster();
    Pair groups = read_pair(job, UNIT, budget / UNIT, low, high);
#if PER_COARSE > 0
    Pair pair = read_pair(job, RANKED, count_wanted(job, budget, high), low, high);
    if (rank == 0) fetch_forced(job, request, head, groups);
#else
    Pair pair = groups;
#endif
    const int *page_row = job->page_table + request * job->table_stride;
    int slice = divide_up(divide_up(pair.num_items, CLUSTER), KEYS_PER_THREAD) * KEYS_PER_THREAD;
    int first_item = rank * slice, my_first = thread * KEYS_PER_THREAD;
    int num_items = most(least(slice, pair.num_items - first_item), 0), first_unit = pair.first_unit + first_item;
    Place mine[KEYS_PER_THREAD];
    UNROLL for (int j = 0; j < KEYS_PER_THREAD; j++) {
        int is_mine = my_first + j < num_items;
        mine[j].group = is_mine ? first_unit + my_first + j : -1;
        mine[j].page = is_mine ? load_int(page_row + mine[j].group * RANKED / PAGE_SIZE) : 0;
        slice_of(shared)->page[my_first + j] = mine[j].page;
#if IS_SCORED
        if (is_mine) fetch_summaries(&job->levels[PER_COARSE > 0], head, RANKED, mine[j].page, mine[j].group, 1);
#endif
    }
    wait_for_previous();
    let_next_start();
    copy_query(shared, job, request, head);
    float *keys = job->keys + index * job->capacity + first_item, *scores = job->scores + index * job->capacity + first_item;
    float *bounds = job->bounds + index * job->capacity + first_item;
    unsigned order[KEYS_PER_THREAD];
    float known[KEYS_PER_THREAD], bound[KEYS_PER_THREAD];
#if IS_SCORED
    sync_block();
    score_slice(shared, job, head, pair, first_unit, num_items);
    sync_block();
    UNROLL for (int j = 0; j < KEYS_PER_THREAD; j++) {
        int item = my_first + j, is_mine = item < num_items, is_known = (mine[j].group + 1) * RANKED < high;
        order[j] = is_mine ? slice_of(shared)->order[item] : NONE;
        bound[j] = is_mine ? slice_of(shared)->bound[item] : MINUS_INFINITY;
        known[j] = is_mine && is_known ? slice_of(shared)->score[item] : MINUS_INFINITY;
        if (is_mine) { /* for those who look at a selection afterwards */
            scores[item] = slice_of(shared)->score[item];
            bounds[item] = bound[j];
            keys[item] = value_of(order[j]);
        }
    }
#else
    UNROLL for (int j = 0; j < KEYS_PER_THREAD; j++) {
        int item = my_first + j, is_mine = item < num_items;
        order[j] = is_mine ? order_of(load_float(keys + item)) : NONE;
        bound[j] = is_mine ? load_float(bounds + item) : MINUS_INFINITY;
        /* of sinks and recent units; the newest one's score is not known */
        known[j] = is_mine && (mine[j].group + 1) * RANKED < high ? load_float(scores + item) : MINUS_INFINITY;
        slice_of(shared)->order[item] = order[j];
    }
    sync_block();
#if PER_COARSE > 0
    split_query(shared, job); /* used after many a wait */
#endif
#endif
    wait_cluster();
    if (pair.need > 0) send_sample(shared, pair.num_items, first_item, num_items);
    Threshold threshold = find_threshold(shared, job, head, pair, order, mine);
    int *units = job->units + index * job->max_kept;
    int num_kept = pair.sinks + threshold.num_free + pair.last;
#if PER_COARSE > 0
    num_kept = least(num_kept, (int)job->max_coarse);
    int share = divide_up(num_kept, CLUSTER);
    unsigned is_opened = hand_out(
        shared, job->coarse_units + index * job->max_coarse, shared->opened, &shared->opened_signal, pair, threshold, order,
        mine, num_kept, share
    );
    if (rank == 0 && thread == 0) job->coarse_kept[index] = num_kept;
    Items items = score_items(shared, job, head, groups, num_kept, share);
    weigh(shared, shared->coarse_masses, KEYS_PER_THREAD, order, known, bound, is_opened); /* while others score */
    rank_items(shared, job, head, groups, &items);
    int count = items.num_kept;
    share = divide_up(count, CLUSTER);
#else
    int count = least(num_kept, (int)job->max_kept), share = divide_up(count, CLUSTER);
    unsigned is_kept = hand_out(
        shared, units, shared->places, &shared->place_signal, pair, threshold, order, mine, count, share
    );
#endif

    int num_mine = most(least(count - rank * share, share), 0);
    const Bits16 *k_head = (const Bits16 *)job->k_cache + head * job->k_stride_head;
    const Bits16 *v_head = (const Bits16 *)job->v_cache + head * job->v_stride_head;
    wait_for_signal(&shared->place_signal, 0);
    if (warp < num_mine) fetch_group(shared, job, k_head, v_head, groups, shared->places[warp]);
#if PER_COARSE > 0
    int is_item = thread % TEAM == 0 && items.item < items.num_mine, group = is_item ? group_of(shared, items.item) : 0;
    float item_bound = is_item ? shared->item_bounds[items.item] : MINUS_INFINITY, item_known = MINUS_INFINITY;
    unsigned item_order = is_item ? items.order : NONE;
    if (is_item && item_order == NONE && (group + 1) * UNIT < high) item_known = shared->item_scores[items.item];
    weigh(shared, shared->masses, 1, &item_order, &item_known, &item_bound, (unsigned)(is_item && items.is_kept));
#else
    weigh(shared, shared->masses, KEYS_PER_THREAD, order, known, bound, is_kept);
#endif
    Query query = load_query(shared);
    Run run;
    run.peak = MINUS_INFINITY;
    run.total = 0.0f;
    UNROLL for (int t = 0; t < HEAD_DIM / 8; t++) run.acc[t][0] = run.acc[t][1] = 0.0f;
    for (int i = warp; i < num_mine; i += WARPS) {
        if (i >= WARPS) fetch_group(shared, job, k_head, v_head, groups, shared->places[i]);
        attend_group(shared, job, query, groups, shared->places[i].group, &run);
    }
    send_runs(shared, &run);
#if PER_COARSE > 0
    list_items(shared, units, groups, &items);
#endif
    if (rank == 0 && warp == WARPS - 1) {
        wait_for_signal(&shared->mass_signal, 0);
        Mass mass = add_masses(shared->masses, job->slack);
#if PER_COARSE > 0
        Mass coarse = add_masses(shared->coarse_masses, job->slack);
        if (lane == 0) write_mass(job->coarse_mass + index * 4, coarse);
        if (coarse.dropped > MINUS_INFINITY) {
            mass.bound = mass.dropped > MINUS_INFINITY ? log_add(mass.bound, coarse.bound) : coarse.bound;
            mass.dropped = log_add(mass.dropped, coarse.dropped);
            mass.most_dropped = most_of(mass.most_dropped, coarse.most_dropped);
        }
#endif
        if (lane == 0) {
            job->num_kept[index] = count;
            write_mass(job->mass + index * 4, mass);
        }
    }
    merge(shared, job, request, head);
}

/* Scores the groups inside the coarse units that a search has opened, and keeps the best of all: see `cluster_search.cu`.
 *
 * Each block scores the groups of its share of opened units from their stored codes, as `unit_logit` does, by products of
 * 8-bit integers; sends their keys to all blocks; and ranks its own among them. Nothing of it goes through memory. For
 * summaries of means and variances, the maximum over the query group, and no softcap; HEAD_DIM 64, 128 or 256.
 */

#if PER_COARSE > 0
/* Coarse units that a pair wants kept, as `unit_score.count_wanted`. */
DEVICE int count_wanted(const Job *job, int budget, int high) {
    if (high <= job->full_context) return (int)job->max_coarse;
    int wanted = job->per_kept > 0 ? divide_up(budget * job->per_kept, RANKED) : job->num_candidates;
    return least(wanted, job->num_candidates);
}

/* Begin to bring sinks and recent groups nearer, a thread a group. */
DEVICE void fetch_forced(const Job *job, long long request, long long head, Pair groups) {
    int thread = thread_index();
    if (thread >= groups.sinks + groups.last) return;
    Place place;
    place.group = groups.first_unit + (thread < groups.sinks ? thread : groups.recent + thread - groups.sinks);
    place.page = load_int(job->page_table + request * job->table_stride + place.group * UNIT / PAGE_SIZE);
    fetch_place(job, head, place);
}

/* A coarse unit's groups, eight lanes each, into my item_scores and item_bounds from `to` on. */
DEVICE void score_unit(Shared *shared, const Job *job, long long head, Pair groups, Place unit, int to) {
    enum { WORDS = HEAD_DIM / 32, SQUARE_WORDS = HEAD_DIM / 64, ROWS = 2 * GROUP };
    const Level *level = &job->levels[0];
    int lane = thread_index() % 32, part = lane % 8, group = unit.group * PER_COARSE + lane / 8;
    int is_there = lane / 8 < PER_COARSE && group * UNIT < groups.high && (group + 1) * UNIT > groups.low;
    long long at = head * (PAGE_SIZE / UNIT) + group % (PAGE_SIZE / UNIT), record = unit.page * level->record_bytes;
    const int *codes = (const int *)(level->codes + record + at * HEAD_DIM);
    const int *squares = (const int *)(level->second_codes + record + at * (HEAD_DIM / 2));
    const float *steps = level->steps + record / 4 + at * 4;
    int products[ROWS], spreads[ROWS], words[WORDS], variances[SQUARE_WORDS];
    float step[3] = {0.0f, 0.0f, 0.0f};
    UNROLL for (int w = 0; w < WORDS; w++) words[w] = is_there ? load_int(codes + w * 8 + part) : 0;
    UNROLL for (int w = 0; w < SQUARE_WORDS; w++) variances[w] = is_there ? load_int(squares + w * 8 + part) : 0;
    UNROLL for (int i = 0; i < 3; i++) step[i] = is_there ? load_float(steps + i) : 0.0f;
    UNROLL for (int r = 0; r < ROWS; r++) {
        products[r] = spreads[r] = 0;
        UNROLL for (int w = 0; w < WORDS; w++)
            products[r] = add_products(words[w], shared->query_codes[r][w * 8 + part], products[r]);
        UNROLL for (int w = 0; w < SQUARE_WORDS; w++) {
            int low = variance_codes((unsigned)variances[w]), high = variance_codes((unsigned)variances[w] >> 16);
            spreads[r] = add_products(low, shared->square_codes[r][w * 8 + part], spreads[r]);
            spreads[r] = add_products(high, shared->square_codes[r][HEAD_DIM / 8 + w * 8 + part], spreads[r]);
        }
        UNROLL for (int mask = 4; mask > 0; mask /= 2) {
            products[r] += int_across(products[r], mask);
            spreads[r] += int_across(spreads[r], mask);
        }
    }
    float score = MINUS_INFINITY, bound = MINUS_INFINITY;
    UNROLL for (int g = 0; g < GROUP; g++) {
        float fine = shared->step[g] * (1.0f / 254.0f), square_fine = shared->square_step[g] * (1.0f / 254.0f);
        float logit = ((float)products[2 * g] * shared->step[g] + (float)products[2 * g + 1] * fine) * (step[0] * job->scale);
        float spread = (float)spreads[2 * g] * shared->square_step[g] + (float)spreads[2 * g + 1] * square_fine;
        bound = most_of(logit + shared->norm[g] * step[2] + shared->doubt[g] * step[0], bound);
        score = most_of(logit + spread * step[1], score);
    }
    int visible = least((group + 1) * UNIT, groups.high) - most(group * UNIT, groups.low);
    float size = natural_log((float)most(visible, 1));
    int is_known = (group + 1) * UNIT < groups.high;
    if (!are_finite(step)) score = bound = 1e38f;
    if (part == 0 && lane / 8 < PER_COARSE) {
        shared->item_scores[to + lane / 8] = !is_there ? MINUS_INFINITY : is_known ? clean(score + size) : 0.0f;
        shared->item_bounds[to + lane / 8] = !is_there ? MINUS_INFINITY : is_known ? clean(bound + size) : 0.0f;
    }
}

/* Candidates of a block: `num_mine`, from `first` on of all `total`. TEAM threads rank one; of my team's, if it has one,
 * the number in the block, its place in the order of keys, and whether it is kept; of all, how many are kept, and free. */
typedef struct {
    int num_mine, first, total, item, is_kept, num_kept, num_free;
    unsigned order;
} Items;

/* The group of my candidate of this number. */
DEVICE int group_of(const Shared *shared, int item) {
    return shared->opened[item / PER_COARSE].group * PER_COARSE + item % PER_COARSE;
}

/* Score my share of the opened units' groups, and send what they score to all blocks. */
DEVICE Items score_items(
    Shared *shared, const Job *job, long long head, Pair groups, int num_opened, int share
) {
    int thread = thread_index(), warp = thread / 32, rank = block_rank();
    int num_units = most(least(num_opened - rank * share, share), 0);
    Items items = {num_units * PER_COARSE, rank * share * PER_COARSE, num_opened * PER_COARSE, thread / TEAM, 0, 0, 0, NONE};
    if (thread == 0) {
        expect_bytes(&shared->item_signal, items.total * 4);
        expect_bytes(&shared->kept_signal, CLUSTER * WARPS * 4);
    }
    wait_for_signal(&shared->opened_signal, 0);
    for (int i = warp; i < num_units; i += WARPS)
        score_unit(shared, job, head, groups, shared->opened[i], i * PER_COARSE);
    sync_block();
    for (int i = thread; i < items.num_mine * CLUSTER; i += THREADS) {
        int item = i / CLUSTER, to = i % CLUSTER;
        unsigned order = is_forced(groups, group_of(shared, item)) ? NONE : order_of(shared->item_scores[item]);
        send_int((int *)&shared->items[items.first + item], to, (int)order, &shared->item_signal);
    }
    if (thread < items.num_mine) { /* for those who look at a selection afterwards */
        long long at = cluster_index() * job->item_capacity + items.first + thread;
        job->item_scores[at] = shared->item_scores[thread];
        job->item_bounds[at] = shared->item_bounds[thread];
        job->item_keys[at] = is_forced(groups, group_of(shared, thread)) ? MINUS_INFINITY : shared->item_scores[thread];
    }
    return items;
}

/* Find the best of all, ties by the lowest index, and send those of my share that are kept to the blocks that attend to
 * them: sinks and recent ones, then by rank, which needs no word from others how many they keep. */
DEVICE void rank_items(Shared *shared, const Job *job, long long head, Pair groups, Items *items) {
    int thread = thread_index(), lane = thread % 32, warp = thread / 32, rank = block_rank();
    int item = items->item, place = items->first + item, is_item = item < items->num_mine;
    wait_for_signal(&shared->item_signal, 0);
    unsigned value = is_item ? shared->items[place] : NONE, found = 0; /* above it, and << 16 all free ones */
    for (int i = thread % TEAM * 4; i < items->total; i += TEAM * 4) { /* `total` is a multiple of four */
        Vector four = *(const Vector *)&shared->items[i];
        found += (four.x >= value + (i >= place)) + ((unsigned)(four.x > NONE) << 16);
        found += (four.y >= value + (i + 1 >= place)) + ((unsigned)(four.y > NONE) << 16);
        found += (four.z >= value + (i + 2 >= place)) + ((unsigned)(four.z > NONE) << 16);
        found += (four.w >= value + (i + 3 >= place)) + ((unsigned)(four.w > NONE) << 16);
    }
    UNROLL for (int mask = 1; mask < TEAM; mask *= 2) found += (unsigned)int_across((int)found, mask);
    int above = (int)(found & 0xffff), num_forced = groups.sinks + groups.last;
    items->num_free = least(least((int)(found >> 16), groups.need), (int)job->max_kept - num_forced);
    items->num_kept = num_forced + items->num_free;
    items->is_kept = is_item && value > NONE && above < items->num_free;
    items->order = value;
    int to_each = divide_up(items->num_kept, CLUSTER), before = least(rank * to_each, items->num_kept);
    if (thread == 0)
        expect_bytes(&shared->place_signal, (least(before + to_each, items->num_kept) - before) * (int)sizeof(Place));
    if (thread % TEAM == 0 && is_item) {
        int group = group_of(shared, item), from_first = group - groups.first_unit, at = num_forced + above;
        if (is_forced(groups, group)) at = from_first < groups.sinks ? from_first : groups.sinks + from_first - groups.recent;
        if (items->is_kept || at < num_forced) {
            Place kept = {group, shared->opened[item / PER_COARSE].page};
            int to = at / to_each;
            send_two(&shared->places[at - to * to_each], to, kept.group, kept.page, &shared->place_signal);
            if (items->is_kept) fetch_place(job, head, kept);
        }
    }
    unsigned kept = lanes_where(items->is_kept && lane % TEAM == 0);
    if (lane < CLUSTER) send_int((int *)&shared->kept_lanes[rank][warp], lane, (int)kept, &shared->kept_signal);
}

/* Write the list of what is kept, ascending: each block its own, a thread a team. */
DEVICE void list_items(Shared *shared, int *units, Pair groups, const Items *items) {
    int thread = thread_index(), lane = thread % 32, me = block_rank() * WARPS + thread / 32, num_before = 0;
    wait_for_signal(&shared->kept_signal, 0);
    const unsigned *all = shared->kept_lanes[0];
    for (int i = lane; i < me; i += 32) num_before += count_bits(all[i]);
    num_before = (int)add_in_warp((unsigned)num_before) + count_bits(all[me] & ((1u << lane) - 1));
    if (thread % TEAM != 0 || items->item >= items->num_mine) return;
    int group = group_of(shared, items->item), from_first = group - groups.first_unit;
    if (items->is_kept)
        units[groups.sinks + num_before] = group;
    else if (is_forced(groups, group))
        units[from_first < groups.sinks ? from_first : groups.sinks + items->num_free + from_first - groups.recent] = group;
}
#endif

/* Writes the summaries that a decode step's tokens change, as `key_summary.summarize` does: a block a level and pair, in
 * clusters of their own behind those that attend. No unit of them is scored by its summary in the same step, so that
 * nobody waits for them. For means and variances.
 */

#if IS_SCORED
/* The greatest of all threads' numbers, none of them negative; `which`: a place of its own for each call. */
DEVICE float most_in_block(Shared *shared, float value, int which) {
    int thread = thread_index();
    unsigned top = most_in_warp((unsigned)bits_of(value));
    if (thread % 32 == 0) shared->ranks[which][thread / 32] = top;
    sync_block();
    UNROLL for (int w = 0; w < WARPS; w++) top = shared->ranks[which][w] > top ? shared->ranks[which][w] : top;
    return float_of((int)top);
}

DEVICE void keep_up(Shared *shared, const Job *job, long long task) {
    if (task >= (long long)job->num_upkeep * job->num_pairs) return;
    const Level *level = &job->levels[task / job->num_pairs];
    long long pair = task % job->num_pairs, head = pair % job->num_kv_heads, slot = job->slots[pair / job->num_kv_heads];
    if (slot < 0) return;
    long long page = slot / PAGE_SIZE, size = level->unit;
    int thread = thread_index(), lane = thread % 32, warp = thread / 32, offset = (int)(slot % PAGE_SIZE);
    int unit = offset / (int)size, num = offset % (int)size + 1, dim = thread;
    const Bits16 *from = (const Bits16 *)job->k_cache + page * job->k_stride_page + head * job->k_stride_head +
                         unit * size * job->k_stride_token;
    Bits16(*keys)[WIDE] = (Bits16(*)[WIDE])shared->keys;
    for (int i = thread; i < num * (HEAD_DIM / 8); i += THREADS) {
        int token = i / (HEAD_DIM / 8), column = i % (HEAD_DIM / 8) * 8;
        copy_or_clear(spot_of(&keys[token][column]), from + token * job->k_stride_token + column, 1);
    }
    wait_for_copies();
    sync_block();

    float share = 1.0f / (float)num, mean = 0.0f, variance = 0.0f, *told = shared->run_acc[0][0];
    if (dim < HEAD_DIM) {
        for (int t = 0; t < num; t++) mean += widen(keys[t][dim]);
        mean *= share;
        for (int t = 0; t < num; t++) variance += (widen(keys[t][dim]) - mean) * (widen(keys[t][dim]) - mean);
        variance *= share;
    }
    /* below the smallest normal numbers the reciprocal overflows: such keys are zero for any query */
    float step = most_in_block(shared, mean < 0.0f ? -mean : mean, 0) / 127.0f;
    float inverse = step > 1e-36f ? 1.0f / step : 0.0f, code = round_down(mean * inverse + 0.5f);
    code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
    float top = most_in_block(shared, variance, 1);
    inverse = top > 1e-34f ? 49.0f / top : 0.0f;
    float root = round_down(square_root(variance * inverse) + 0.5f);
    unsigned char *nibbles = (unsigned char *)shared->parts;
    if (dim < HEAD_DIM) {
        told[dim] = code * step;
        nibbles[dim] = (unsigned char)(root > 7.0f ? 7.0f : root);
    }
    sync_block();
    float farthest = 0.0f;
    for (int t = warp; t < num; t += WARPS) {
        float squares = 0.0f;
        for (int d = lane; d < HEAD_DIM; d += 32) squares += (widen(keys[t][d]) - told[d]) * (widen(keys[t][d]) - told[d]);
        UNROLL for (int mask = 16; mask > 0; mask /= 2) squares += float_across(squares, mask);
        farthest = most_of(squares, farthest);
    }
    /* up: 256 squares and their sum are off by less than 2e-5, and squares below 1e-38 are lost */
    float radius = square_root(most_in_block(shared, farthest, 0)) * 1.00003f + 2e-18f;

    long long at = head * (PAGE_SIZE / size) + unit, record = page * level->record_bytes;
    if (dim < HEAD_DIM) level->codes[record + at * HEAD_DIM + dim] = (unsigned char)(int)code;
    if (thread < HEAD_DIM / 2) { /* two dimensions a byte, in the order of `key_summary` */
        enum { HALF = HEAD_DIM / 2 };
        int two = 2 * thread, place = two % HALF / 4 * 4 + two / HALF * 2 + two % 4 / 2;
        level->second_codes[record + at * HALF + place] = (unsigned char)(nibbles[two] | nibbles[two + 1] << 4);
    }
    if (thread < 4) {
        float number = thread == 0 ? step : thread == 1 ? top / 127.0f : thread == 2 ? radius : 0.0f;
        level->steps[record / 4 + at * 4 + thread] = number;
    }
}
#endif

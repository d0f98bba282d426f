/* Scores the units that are ranked first, of groups or of a coarse level, from their stored codes, as `unit_score` does: by
 * products of 8-bit integers on tensor cores, 16 units a warp at a time. Each block scores its own candidates; scores,
 * keys and bounds are written to memory for those who look at a selection afterwards, but nobody waits for that.
 *
 * For summaries of means and variances, the maximum over the query group, and no softcap; HEAD_DIM 64, 128 or 256. Other
 * scores are made by a kernel before this one.
 */

/* The query, as it is. It is in shared memory from the next wait of the block on. */
DEVICE void copy_query(Shared *shared, const Job *job, long long request, long long head) {
    const Bits16 *from = (const Bits16 *)job->q + request * job->q_stride_row + head * GROUP * job->q_stride_head;
    for (int i = thread_index(); i < PAIRS; i += THREADS) {
        int member = i / (HEAD_DIM / 2), pair = i % (HEAD_DIM / 2);
        ((int *)shared->query[member])[pair] = load_int((const int *)(from + member * job->q_stride_head) + pair);
    }
}

#if PER_COARSE > 0 || IS_SCORED
/* The code of a number in steps, and of what that leaves, 254 times finer. */
DEVICE int code_of(float value, float step, int is_rest) {
    float scaled = value * (1.0f / step), high = round_down(scaled + 0.5f);
    float code = is_rest ? round_down((scaled - high) * 254.0f + 0.5f) : high;
    return (int)(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
}

/* Codes of the query and of scale^2 q^2 / 2, a warp a head: of each their steps, and what bounds take. They are in shared
 * memory from the next wait of the block on. See `unit_logit.split_queries`. */
DEVICE void split_query(Shared *shared, const Job *job) {
    int lane = thread_index() % 32, g = thread_index() / 32;
    if (g >= GROUP) return;
    const Bits16 *row = shared->query[g];
    float top = 0.0f, squares = 0.0f, scale = job->scale;
    UNROLL for (int i = 0; i < HEAD_DIM / 32; i++) {
        float value = widen(row[i * 32 + lane]);
        top = most_of(value < 0.0f ? -value : value, top);
        squares += value * value;
    }
    UNROLL for (int mask = 16; mask > 0; mask /= 2) {
        top = most_of(float_across(top, mask), top);
        squares += float_across(squares, mask);
    }
    float step = most_of(top, 1e-30f) / 127.0f, square_step = most_of(0.5f * (top * scale) * (top * scale), 1e-30f) / 127.0f;
    if (lane == 0) {
        shared->step[g] = step;
        shared->square_step[g] = square_step;
        shared->norm[g] = square_root(squares) * (1.00003f * scale) + 2e-18f * scale;
        shared->doubt[g] = top * (0.0025f * HEAD_DIM * scale);
    }
    for (int word = lane; word < HEAD_DIM / 4; word += 32) {
        unsigned codes[4] = {0, 0, 0, 0};
        UNROLL for (int i = 0; i < 4; i++) {
            float value = widen(row[word * 4 + i]), square = 0.5f * (value * scale) * (value * scale);
            codes[0] |= ((unsigned)code_of(value, step, 0) & 255) << 8 * i;
            codes[1] |= ((unsigned)code_of(value, step, 1) & 255) << 8 * i;
            codes[2] |= ((unsigned)code_of(square, square_step, 0) & 255) << 8 * i;
            codes[3] |= ((unsigned)code_of(square, square_step, 1) & 255) << 8 * i;
        }
        shared->query_codes[2 * g][word] = (int)codes[0];
        shared->query_codes[2 * g + 1][word] = (int)codes[1];
        shared->square_codes[2 * g][word] = (int)codes[2];
        shared->square_codes[2 * g + 1][word] = (int)codes[3];
    }
}

/* A finite score, as `unit_select.clean_scores`. */
DEVICE float clean(float score) {
    if (score != score || score > 1e38f) return 1e38f;
    if (score < -1e38f) return -1e38f;
    return score < 1e-30f && score > -1e-30f ? 0.0f : score;
}

/* Of a unit whose keys are not finite the steps are not either: it is kept, and its bound holds whatever it has. */
DEVICE int are_finite(const float *steps) { return steps[0] + steps[1] + steps[2] < 3e38f; }
#endif

#if IS_SCORED
/* Sixteen units as the tensor core takes them: a lane has a quarter of rows lane / 4 and lane / 4 + 8. */
typedef struct {
    unsigned means[2][HEAD_DIM / 16], variances[2][HEAD_DIM / 32];
    float steps[2][4]; /* of means, of variances, radius */
} Tile;

/* The tile of my block's candidates; `first` is the first of these. Past the last one, whatever lies in page 0. */
DEVICE Tile load_tile(Shared *shared, const Job *job, long long head, int tile, int first, int num) {
    Tile loaded;
    const Level *level = &job->levels[PER_COARSE > 0];
    int lane = thread_index() % 32, part = lane % 4;
    UNROLL for (int r = 0; r < 2; r++) {
        int mine = tile * 16 + r * 8 + lane / 4;
        long long page = mine < num ? slice_of(shared)->page[mine] : 0, record = page * level->record_bytes;
        long long at = head * (PAGE_SIZE / RANKED) + (first + mine) % (PAGE_SIZE / RANKED);
        load_words(loaded.means[r], level->codes + record + at * HEAD_DIM + part * (HEAD_DIM / 4), HEAD_DIM / 16);
        load_words(loaded.variances[r], level->second_codes + record + at * (HEAD_DIM / 2) + part * (HEAD_DIM / 8), HEAD_DIM / 32);
        unsigned steps[4];
        load_words(steps, level->steps + record / 4 + at * 4, 4);
        UNROLL for (int i = 0; i < 4; i++) loaded.steps[r][i] = float_of((int)steps[i]);
    }
    return loaded;
}

/* Score a tile, into my block's slice. */
DEVICE void score_tile(Shared *shared, const Job *job, Pair pair, Tile loaded, int tile, int first, int num) {
    enum { WORDS = HEAD_DIM / 16, SQUARE_WORDS = HEAD_DIM / 32, COLUMNS = (2 * GROUP + 7) / 8 };
    int lane = thread_index() % 32, part = lane % 4;
    float score[2] = {MINUS_INFINITY, MINUS_INFINITY}, bound[2] = {MINUS_INFINITY, MINUS_INFINITY};
    UNROLL for (int c = 0; c < COLUMNS; c++) {
        /* of the query's rows, two a head; heads past the last one repeat it */
        int row = least(c * 8 + lane / 4, 2 * GROUP - 2 + lane / 4 % 2), products[4] = {0, 0, 0, 0}, spreads[4] = {0, 0, 0, 0};
        UNROLL for (int w = 0; w < WORDS; w += 2) {
            const int *query = &shared->query_codes[row][part * WORDS + w];
            multiply_bytes(products, &loaded.means[0][w], &loaded.means[1][w], (unsigned)query[0], (unsigned)query[1]);
        }
        UNROLL for (int w = 0; w < SQUARE_WORDS; w++) {
            unsigned one[2], two[2];
            const int *query = &shared->square_codes[row][part * SQUARE_WORDS + w];
            UNROLL for (int half = 0; half < 2; half++) {
                one[half] = (unsigned)variance_codes(loaded.variances[0][w] >> 16 * half);
                two[half] = (unsigned)variance_codes(loaded.variances[1][w] >> 16 * half);
            }
            multiply_bytes(spreads, one, two, (unsigned)query[0], (unsigned)query[HEAD_DIM / 8]);
        }
        int g = least(c * 4 + part, GROUP - 1);
        float fine = shared->step[g] * (1.0f / 254.0f), square_fine = shared->square_step[g] * (1.0f / 254.0f);
        UNROLL for (int r = 0; r < 2; r++) {
            const float *steps = loaded.steps[r];
            float logit = (float)products[2 * r] * shared->step[g];
            logit = (logit + (float)products[2 * r + 1] * fine) * (steps[0] * job->scale);
            float spread = (float)spreads[2 * r] * shared->square_step[g] + (float)spreads[2 * r + 1] * square_fine;
            bound[r] = most_of(logit + shared->norm[g] * steps[2] + shared->doubt[g] * steps[0], bound[r]);
            score[r] = most_of(logit + spread * steps[1], score[r]);
        }
    }
    UNROLL for (int r = 0; r < 2; r++) {
        UNROLL for (int mask = 1; mask < 4; mask *= 2) {
            score[r] = most_of(float_across(score[r], mask), score[r]);
            bound[r] = most_of(float_across(bound[r], mask), bound[r]);
        }
        int mine = tile * 16 + r * 8 + lane / 4, unit = first + mine;
        if (part != 0 || mine >= num) continue;
        int visible = least((unit + 1) * RANKED, pair.high) - most(unit * RANKED, pair.low);
        float size = natural_log((float)most(visible, 1));
        int is_known = (unit + 1) * RANKED < pair.high; /* not the newest token's: its summary may be a step behind */
        int is_finite = are_finite(loaded.steps[r]);
        float value = is_known ? clean(is_finite ? score[r] + size : 1e38f) : 0.0f;
        slice_of(shared)->score[mine] = value;
        slice_of(shared)->bound[mine] = is_known ? clean(is_finite ? bound[r] + size : 1e38f) : 0.0f;
        slice_of(shared)->order[mine] = is_forced(pair, unit) ? NONE : order_of(value);
    }
}

/* Score my block's `num` candidates, the first of which is unit `first`. */
DEVICE void score_slice(Shared *shared, const Job *job, long long head, Pair pair, int first, int num) {
    int tile = thread_index() / 32;
    Tile next = load_tile(shared, job, head, tile, first, num);
    split_query(shared, job);
    sync_block();
    NO_UNROLL while (tile * 16 < num) {
        Tile loaded = next;
        if ((tile + WARPS) * 16 < num) next = load_tile(shared, job, head, tile + WARPS, first, num);
        score_tile(shared, job, pair, loaded, tile, first, num);
        tile += WARPS;
    }
}
#endif

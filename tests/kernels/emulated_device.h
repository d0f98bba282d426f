/* The names of kernels/cuda/device.h on a CPU: every thread of a cluster is a coroutine, so that `cluster_attend.cu` runs
 * with real warps, blocks and clusters, one switch at each point where they wait for each other.
 *
 * Shared memory starts as NaN and is a block's own; a write into another block's goes through `send_*` alone, as on a
 * device. Compiled with the kernel by emulated_cluster.py; `run_clusters` is what that calls.
 *
 * `makecontext` gives each coroutine its stack; after that they switch by `_longjmp`, which does not enter the system.
 */
#undef _FORTIFY_SOURCE /* with it `_longjmp` refuses to leave its stack */
#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define KERNEL static void
#define DEVICE static inline
#define ARGUMENT const
#define VECTORS _Alignas(16)
#define ENSURE _Static_assert
#define NO_UNROLL 
#define UNROLL

typedef struct { unsigned x, y, z, w; } Vector;
typedef unsigned short Bits16;

enum { STACK_BYTES = 48 << 10, NUM_FIBERS = CLUSTER * THREADS, NUM_WARPS = NUM_FIBERS / 32 };
typedef struct {
    int arrived;
    short turn;
} Barrier;
typedef struct {
    jmp_buf place; /* where it goes on, once begun */
    const short *awaited; /* it can go on when this is no longer `old`; NULL: at once */
    short old, cluster_turn; /* that its arrival was in */
    int block, thread, is_begun, is_done, num_exchanges;
} Fiber;
static Fiber fibers[NUM_FIBERS], *self;
static jmp_buf scheduler;
static size_t num_shared_bytes;
static char *stacks, *blocks[CLUSTER];
static Barrier warp_barriers[NUM_WARPS], block_barriers[CLUSTER], cluster_barrier;
static int exchanged[2][NUM_WARPS][32];
static int this_cluster;

static void wait_for_change(const short *place, short old) {
    if (*place != old) return;
    self->awaited = place;
    self->old = old;
    if (!_setjmp(self->place)) _longjmp(scheduler, 1);
}
static short arrive_at(Barrier *barrier, int size) {
    short turn = barrier->turn;
    if (++barrier->arrived == size) {
        barrier->arrived = 0;
        barrier->turn++;
    }
    return turn;
}
static void wait_at(Barrier *barrier, int size) {
    short turn = arrive_at(barrier, size);
    wait_for_change(&barrier->turn, turn);
}

#define SHARED(type) ((type *)blocks[self->block])
#define GIVE_SIZE(type)
DEVICE int thread_index(void) { return self->thread; }
DEVICE int cluster_index(void) { return this_cluster; }
DEVICE int block_rank(void) { return self->block; }
DEVICE void *in_block(void *place, int rank) { return (char *)place - blocks[self->block] + blocks[rank]; }

typedef struct {
    short phase, is_expected;
    int missing; /* bytes expected and not come */
} Signal;
DEVICE void turn_signal(Signal *signal) {
    if (!signal->is_expected || signal->missing) return;
    signal->is_expected = 0;
    signal->phase ^= 1;
}
DEVICE void begin_signal(Signal *signal) { memset(signal, 0, sizeof *signal); }
DEVICE void expect_bytes(Signal *signal, int bytes) {
    if (signal->is_expected++) abort();
    signal->missing += bytes;
    turn_signal(signal);
}
DEVICE void wait_for_signal(Signal *signal, int phase) { wait_for_change(&signal->phase, (short)(phase & 1)); }

/* On its way to another block, or this one. With a random schedule it comes late, and messages overtake each other. */
typedef struct {
    char *to;
    Signal *signal;
    int values[2], bytes, rank;
} Message;
enum { MAX_MESSAGES = 1 << 17 };
static Message messages[MAX_MESSAGES];
static int num_messages, has_lost_message, num_done_in[CLUSTER];
static unsigned long long seed; /* 0: messages come at once */
static unsigned draw(unsigned below) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)(seed >> 33) % below;
}
static void deliver(Message message) {
    if (num_done_in[message.rank] == THREADS) has_lost_message = 1;
    memcpy(message.to, message.values, (size_t)message.bytes);
    message.signal->missing -= message.bytes;
    turn_signal(message.signal);
}
DEVICE void send(void *place, int rank, const void *from, int bytes, Signal *signal) {
    size_t at = (size_t)((char *)place - blocks[self->block]);
    if ((uintptr_t)place % (uintptr_t)bytes || rank < 0 || rank >= CLUSTER || at + (size_t)bytes > num_shared_bytes) abort();
    Message message = {in_block(place, rank), in_block(signal, rank), {0, 0}, bytes, rank};
    memcpy(message.values, from, (size_t)bytes);
    if (!seed) deliver(message);
    else if (num_messages < MAX_MESSAGES) messages[num_messages++] = message;
    else abort();
}
DEVICE void send_int(int *place, int rank, int value, Signal *signal) { send(place, rank, &value, 4, signal); }
DEVICE void send_two(void *place, int rank, int one, int two, Signal *signal) {
    int both[2] = {one, two};
    send(place, rank, both, 8, signal);
}

DEVICE void sync_block(void) { wait_at(&block_barriers[self->block], THREADS); }
DEVICE int warp_number(void) { return self->block * (THREADS / 32) + self->thread / 32; }
DEVICE void sync_warp(void) { wait_at(&warp_barriers[warp_number()], 32); }
DEVICE void arrive_cluster(void) { self->cluster_turn = arrive_at(&cluster_barrier, NUM_FIBERS); }
DEVICE void wait_cluster(void) { wait_for_change(&cluster_barrier.turn, self->cluster_turn); }
DEVICE void wait_for_previous(void) {}
DEVICE void let_next_start(void) {}

/* What the lanes of my warp gave. */
DEVICE const int *exchange(int value) {
    int *slots = exchanged[self->num_exchanges++ % 2][warp_number()];
    slots[self->thread % 32] = value;
    sync_warp();
    return slots;
}
DEVICE unsigned add_in_warp(unsigned value) {
    const int *given = exchange((int)value);
    unsigned sum = 0;
    for (int i = 0; i < 32; i++) sum += (unsigned)given[i];
    return sum;
}
DEVICE unsigned most_in_warp(unsigned value) {
    const int *given = exchange((int)value);
    unsigned top = 0;
    for (int i = 0; i < 32; i++) top = (unsigned)given[i] > top ? (unsigned)given[i] : top;
    return top;
}
DEVICE unsigned lanes_where(int is_true) {
    const int *given = exchange(is_true);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= (unsigned)(given[i] != 0) << i;
    return bits;
}
DEVICE int int_from(int value, int lane) { return exchange(value)[lane % 32]; }
DEVICE int int_from_below(int value, int distance) {
    int lane = self->thread % 32;
    return exchange(value)[lane >= distance ? lane - distance : lane];
}
DEVICE int int_across(int value, int mask) { return exchange(value)[self->thread % 32 ^ mask]; }

DEVICE int bits_of(float value) {
    int bits;
    memcpy(&bits, &value, 4);
    return bits;
}
DEVICE float float_of(int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
DEVICE float float_across(float value, int mask) { return float_of(int_across(bits_of(value), mask)); }
DEVICE int add_shared(int *place, int value) {
    int before = *place;
    *place += value;
    return before;
}
DEVICE float load_float(const float *place) { return *place; }
DEVICE int load_int(const int *place) { return *place; }
DEVICE void load_words(unsigned *to, const void *from, int num_words) {
    if ((uintptr_t)from % (num_words == 2 ? 8 : 16)) abort();
    memcpy(to, from, 4 * (size_t)num_words);
}
typedef char *Spot;
DEVICE Spot spot_of(const void *place) { return (char *)place; }
DEVICE void copy_or_clear(Spot to, const void *from, int is_there) {
    if ((uintptr_t)to % 16 || (is_there && (uintptr_t)from % 16)) abort();
    if (is_there) memcpy(to, from, 16);
    else memset(to, 0, 16);
}
DEVICE void fetch_ahead(const void *from, int bytes) {
    if ((uintptr_t)from % 16 || bytes % 16) abort();
}
DEVICE void wait_for_copies(void) {}
DEVICE int count_bits(unsigned bits) { return __builtin_popcount(bits); }
DEVICE int add_products(int bytes, int others, int sum) {
    for (int i = 0; i < 32; i += 8) sum += (int8_t)(bytes >> i) * (int8_t)(others >> i);
    return sum;
}
DEVICE int variance_codes(unsigned nibbles) {
    static const unsigned char variances[8] = {0, 3, 10, 23, 41, 65, 93, 127};
    unsigned codes = 0;
    for (int i = 0; i < 4; i++) codes |= (unsigned)variances[nibbles >> 4 * i & 7] << 8 * i;
    return (int)codes;
}
DEVICE float round_down(float value) { return floorf(value); }
DEVICE float square_root(float value) { return sqrtf(value); }
DEVICE int first_bit(unsigned bits) { return __builtin_ffs((int)bits) - 1; }
DEVICE float power_of_two(float value) { return exp2f(value); }
DEVICE float natural_log(float value) { return logf(value); }
DEVICE float hyperbolic_tangent(float value) { return tanhf(value); }
DEVICE float quotient(float value, float by) { return value / by; }
#if IS_HALF
DEVICE float widen(Bits16 bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return (float)value;
}
DEVICE Bits16 narrow(float value) {
    _Float16 half = (_Float16)value;
    Bits16 bits;
    memcpy(&bits, &half, 2);
    return bits;
}
#else
DEVICE float widen(Bits16 bits) { return float_of((int)((unsigned)bits << 16)); }
DEVICE Bits16 narrow(float value) {
    unsigned bits = (unsigned)bits_of(value);
    if (value != value) return 0x7fc0;
    return (Bits16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#endif
DEVICE unsigned narrow_two(float low, float high) { return narrow(low) | (unsigned)narrow(high) << 16; }

/* What each lane of my warp gave, `size` bytes of 32. */
DEVICE const char *exchange_bytes(const void *given, size_t size) {
    static char slots[2][NUM_WARPS][32][32];
    char(*mine)[32] = slots[self->num_exchanges++ % 2][warp_number()];
    memcpy(mine[self->thread % 32], given, size);
    sync_warp();
    return mine[0];
}
DEVICE void load_matrices(unsigned *to, Spot row) {
    if ((uintptr_t)row % 16) abort();
    const char *rows = exchange_bytes(&row, sizeof row);
    int lane = self->thread % 32;
    for (int i = 0; i < 4; i++) {
        const Bits16 *of;
        memcpy(&of, rows + (i * 8 + lane / 4) * 32, sizeof of);
        to[i] = of[lane % 4 * 2] | (unsigned)of[lane % 4 * 2 + 1] << 16;
    }
}
DEVICE void load_transposed(unsigned *to, Spot row) {
    if ((uintptr_t)row % 16) abort();
    const char *rows = exchange_bytes(&row, sizeof row);
    int lane = self->thread % 32;
    for (int i = 0; i < 4; i++) {
        const Bits16 *one, *two;
        memcpy(&one, rows + (i * 8 + lane % 4 * 2) * 32, sizeof one);
        memcpy(&two, rows + (i * 8 + lane % 4 * 2 + 1) * 32, sizeof two);
        to[i] = one[lane / 4] | (unsigned)two[lane / 4] << 16;
    }
}
DEVICE void multiply_add(float *sum, unsigned left, unsigned left_8, unsigned right, unsigned right_8) {
    unsigned given[4] = {left, left_8, right, right_8};
    const char *all = exchange_bytes(given, sizeof given);
    int row = self->thread % 32 / 4, column = self->thread % 4 * 2;
    for (int i = 0; i < 2; i++) {
        for (int k = 0; k < 16; k++) {
            unsigned lefts[4], rights[4];
            memcpy(lefts, all + (row * 4 + k % 8 / 2) * 32, sizeof lefts);
            memcpy(rights, all + ((column + i) * 4 + k % 8 / 2) * 32, sizeof rights);
            unsigned one = lefts[k / 8] >> k % 2 * 16, other = rights[2 + k / 8] >> k % 2 * 16;
            sum[i] += widen((Bits16)(one & 0xffff)) * widen((Bits16)(other & 0xffff));
        }
    }
}
DEVICE void multiply_bytes(int *sum, const unsigned *left, const unsigned *left_8, unsigned right, unsigned right_4) {
    unsigned given[6] = {left[0], left[1], left_8[0], left_8[1], right, right_4};
    const char *all = exchange_bytes(given, sizeof given);
    int row = self->thread % 32 / 4, column = self->thread % 4 * 2;
    for (int i = 0; i < 4; i++) {
        for (int word = 0; word < 4; word++) {
            unsigned lefts[6], rights[6];
            memcpy(lefts, all + (row * 4 + word) * 32, sizeof lefts);
            memcpy(rights, all + ((column + i % 2) * 4 + word) * 32, sizeof rights);
            sum[i] = add_products((int)lefts[i / 2 * 2], (int)rights[4], sum[i]);
            sum[i] = add_products((int)lefts[i / 2 * 2 + 1], (int)rights[5], sum[i]);
        }
    }
}

#include "cluster_search.cu"
#include "cluster_score.cu"
#include "cluster_rank.cu"
#include "cluster_upkeep.cu"
#include "cluster_attend.cu"

static Job current_job;
static void run_fiber(void) {
    cluster_attend(current_job);
    self->is_done = 1;
    _longjmp(scheduler, 1);
}

/* Let a thread go on until it waits or is done. */
static void resume(Fiber *fiber) {
    static ucontext_t context;
    self = fiber;
    if (_setjmp(scheduler)) return;
    if (fiber->is_begun) _longjmp(fiber->place, 1);
    fiber->is_begun = 1;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + (size_t)(fiber - fibers) * STACK_BYTES;
    context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
}

/* Let those of a warp's threads go on that can; how many did. */
static int run_warp(int warp, int is_backwards) {
    int num_resumed = 0;
    for (int i = 0; i < 32; i++) {
        Fiber *fiber = &fibers[warp * 32 + (is_backwards ? 31 - i : i)];
        if (fiber->is_done || (fiber->awaited && *fiber->awaited == fiber->old)) continue;
        resume(fiber);
        num_resumed++;
        num_done_in[fiber->block] += fiber->is_done;
    }
    return num_resumed;
}

/* Deliver some of the messages, and find an order of the warps, some of which pause; how much was done. */
static int shuffle(int *order, int *pauses) {
    int num_delivered = 0, part = (int)draw(8);
    for (int i = num_messages - 1; i >= 0; i--) {
        if ((int)draw(8) < part) continue;
        deliver(messages[i]);
        messages[i] = messages[--num_messages];
        num_delivered++;
    }
    for (int i = NUM_WARPS - 1; i > 0; i--) {
        int other = (int)draw((unsigned)i + 1), warp = order[i];
        order[i] = order[other];
        order[other] = warp;
    }
    for (int i = 0; i < NUM_WARPS; i++) pauses[i] = pauses[i] > 0 ? pauses[i] - 1 : draw(64) ? 0 : (int)draw(100);
    return num_delivered;
}

/* All clusters, one after the other. `schedule`: 0, threads take their turns from the first to the last; -1, from the last
 * to the first, so that what a thread reads before it has waited for who writes it is old in one of the two; above 0, a
 * random order of the warps, some of which fall far behind, with messages that come late. Returns 0; 1 where threads wait
 * for each other for ever; 2 where a block was sent something when it had ended. */
int run_clusters(const Job *job, int num_clusters, int schedule) {
    int order[NUM_WARPS], pauses[NUM_WARPS], is_backwards = schedule < 0;
    seed = schedule > 0 ? (unsigned long long)schedule : 0;
    num_shared_bytes = sizeof(Shared);
    current_job = *job;
    has_lost_message = 0;
    stacks = malloc((size_t)NUM_FIBERS * STACK_BYTES);
    for (int i = 0; i < CLUSTER; i++) blocks[i] = aligned_alloc(16, (sizeof(Shared) + 15) / 16 * 16);
    for (this_cluster = 0; this_cluster < num_clusters; this_cluster++) {
        memset(warp_barriers, 0, sizeof warp_barriers);
        memset(block_barriers, 0, sizeof block_barriers);
        memset(&cluster_barrier, 0, sizeof cluster_barrier);
        memset(num_done_in, 0, sizeof num_done_in);
        memset(pauses, 0, sizeof pauses);
        num_messages = 0;
        for (int i = 0; i < CLUSTER; i++) memset(blocks[i], 0xff, sizeof(Shared));
        for (int i = 0; i < NUM_FIBERS; i++) fibers[i] = (Fiber){.block = i / THREADS, .thread = i % THREADS};
        for (int i = 0; i < NUM_WARPS; i++) order[i] = is_backwards ? NUM_WARPS - 1 - i : i;
        for (int num_idle = 0, num_done = 0; num_done < NUM_FIBERS;) {
            int num_moved = seed ? shuffle(order, pauses) : 0;
            for (int i = 0; i < NUM_WARPS; i++) num_moved += pauses[order[i]] ? 0 : run_warp(order[i], is_backwards);
            num_idle = num_moved ? 0 : num_idle + 1;
            if (num_idle > (seed ? 1000 : 0)) return 1;
            num_done = 0;
            for (int i = 0; i < CLUSTER; i++) num_done += num_done_in[i];
        }
        if (has_lost_message || num_messages) return 2;
    }
    for (int i = 0; i < CLUSTER; i++) free(blocks[i]);
    free(stacks);
    return 0;
}

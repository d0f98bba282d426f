/* What `cluster_attend.cu` asks of a CUDA device, by names: compiled before it by `cluster.py`.
 *
 * tests/kernels/emulated_device.h has the same names for a CPU, so that the kernel is tested without a GPU.
 * Compute capability 9.0: clusters of blocks that write into each other's shared memory, and launches that overlap.
 */

#define KERNEL extern "C" __global__ __launch_bounds__(THREADS, HEAD_DIM > 128 ? 1 : 2) void
#define DEVICE static __device__ __forceinline__
#define ARGUMENT __grid_constant__ const
#define VECTORS __align__(16)
#if IS_HALF
#define NUMBER "f16"
#else
#define NUMBER "bf16"
#endif
#define ENSURE static_assert
#define NO_UNROLL _Pragma("unroll 1")
#define UNROLL _Pragma("unroll")

typedef uint4 Vector;
typedef unsigned short Bits16;

extern __shared__ __align__(16) unsigned char shared_bytes[];
#define SHARED(type) ((type *)shared_bytes)

#define GIVE_SIZE(type) extern "C" __device__ const unsigned num_shared_bytes = sizeof(type);

DEVICE int thread_index(void) { return threadIdx.x; }
DEVICE int cluster_index(void) { return blockIdx.x / CLUSTER; }
DEVICE int block_rank(void) { return blockIdx.x % CLUSTER; }

/* Where bytes that other blocks send are counted: a phase ends when as many have come as are expected. */
typedef unsigned long long Signal;
DEVICE unsigned shared_address(const void *place) { return (unsigned)__cvta_generic_to_shared(place); }
DEVICE unsigned remote_address(const void *place, int rank) {
    unsigned address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(place)), "r"(rank));
    return address;
}
DEVICE void begin_signal(Signal *signal) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(signal)) : "memory");
}
/* One thread, once a phase; what is sent may come before. */
DEVICE void expect_bytes(Signal *signal, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(signal)), "r"(bytes) : "memory");
}
DEVICE void wait_for_signal(Signal *signal, int phase) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
            shared_address(signal)
        ),
        "r"(phase & 1)
        : "memory"
    );
}
/* To the same place in another block of the cluster, or in this one. */
DEVICE void send_int(int *place, int rank, int value, Signal *signal) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote_address(place, rank)),
                 "r"(value), "r"(remote_address(signal, rank))
                 : "memory");
}
DEVICE void send_two(void *place, int rank, int one, int two, Signal *signal) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                     remote_address(place, rank)
                 ),
                 "r"(one), "r"(two), "r"(remote_address(signal, rank))
                 : "memory");
}

DEVICE void sync_block(void) { __syncthreads(); }
DEVICE void sync_warp(void) { __syncwarp(); }
/* All blocks of the cluster have begun their signals: between the two a block may do other things. */
DEVICE void arrive_cluster(void) {
    asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void wait_cluster(void) { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

/* A place in shared memory, counted in bytes; worked out where it is asked for, so that what is added to it is not kept in
 * registers through a loop. */
typedef unsigned Spot;
DEVICE Spot spot_of(const void *place) {
    Spot spot = shared_address(place);
    asm volatile("" : "+r"(spot));
    return spot;
}

/* Until the kernel before this one has ended; and from now on the next may start. */
DEVICE void wait_for_previous(void) { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_start(void) { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

DEVICE unsigned add_in_warp(unsigned value) { return __reduce_add_sync(~0u, value); }
DEVICE unsigned most_in_warp(unsigned value) { return __reduce_max_sync(~0u, value); }
DEVICE unsigned lanes_where(int is_true) { return __ballot_sync(~0u, is_true); }
DEVICE int int_from(int value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE int int_from_below(int value, int distance) { return __shfl_up_sync(~0u, value, distance); }
DEVICE int int_across(int value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE float float_across(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE int add_shared(int *place, int value) { return atomicAdd(place, value); }

/* Past the first cache, which the writes of other blocks do not reach. */
DEVICE float load_float(const float *place) { return __ldcg(place); }
DEVICE int load_int(const int *place) { return __ldcg(place); }
/* A multiple of four words from 16 bytes on; two words from eight. */
DEVICE void load_words(unsigned *to, const void *from, int num_words) {
    if (num_words == 2) {
        uint2 two = __ldcg((const uint2 *)from);
        to[0] = two.x, to[1] = two.y;
        return;
    }
    UNROLL for (int i = 0; i < num_words; i += 4) {
        Vector four = __ldcg((const Vector *)from + i / 4);
        to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
}

/* 16 bytes from memory to shared memory, or zeros; they are there, for the thread itself, after `wait_for_copies`. */
DEVICE void copy_or_clear(Spot to, const void *from, int is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
/* Memory to the second cache, a multiple of 16 bytes. */
DEVICE void fetch_ahead(const void *from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
DEVICE void wait_for_copies(void) { asm volatile("cp.async.wait_all;" ::: "memory"); }

DEVICE int bits_of(float value) { return __float_as_int(value); }
DEVICE float float_of(int bits) { return __int_as_float(bits); }
DEVICE int count_bits(unsigned bits) { return __popc(bits); }
/* The sum and the products of four signed bytes of each. */
DEVICE int add_products(int bytes, int others, int sum) { return __dp4a(bytes, others, sum); }
/* Four variances in steps, of the low four nibbles: see `key_summary.VARIANCES`. */
DEVICE int variance_codes(unsigned nibbles) { return (int)__byte_perm(0x170A0300, 0x7F5D4129, nibbles); }
DEVICE float round_down(float value) { return floorf(value); }
DEVICE float square_root(float value) { return sqrtf(value); }
DEVICE int first_bit(unsigned bits) { return __ffs(bits) - 1; }
DEVICE float power_of_two(float value) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
    return power;
}
DEVICE float natural_log(float value) { return __logf(value); }
DEVICE float quotient(float value, float by) { return __fdividef(value, by); }
DEVICE float hyperbolic_tangent(float value) { return tanhf(value); }

/* Four matrices of 8 x 8 numbers, lane l giving the place of row l % 8 of matrix l / 8; of each, a lane gets the two
 * numbers (l / 4, l % 4 * 2 and on), or of the transposed one. */
DEVICE void load_matrices(unsigned *to, Spot row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}
DEVICE void load_transposed(unsigned *to, Spot row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}
/* sum += left [8 x 16] right [16 x 8], as the tensor core has them in its lanes: of the sum a lane has the numbers
 * (l / 4, l % 4 * 2 and the next); rows 8 to 15 of the instruction are zero. */
DEVICE void multiply_add(float *sum, unsigned left, unsigned left_8, unsigned right, unsigned right_8) {
    float none = 0.0f, unused, unused_2;
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NUMBER "." NUMBER ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, "
        "{%0, %1, %9, %9};"
        : "+f"(sum[0]), "+f"(sum[1]), "=f"(unused), "=f"(unused_2)
        : "r"(left), "r"(0), "r"(left_8), "r"(right), "r"(right_8), "f"(none));
    (void)unused, (void)unused_2;
}
/* sum += left [16 x 32] right [32 x 8], signed bytes, four a word: of rows l / 4 and l / 4 + 8 of `left`, and of column l / 4
 * of `right`, a lane has words l % 4 and l % 4 + 4; of the sum rows l / 4 and l / 4 + 8, columns l % 4 * 2 and the next. */
DEVICE void multiply_bytes(int *sum, const unsigned *left, const unsigned *left_8, unsigned right, unsigned right_4) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(left[0]), "r"(left_8[0]), "r"(left[1]), "r"(left_8[1]), "r"(right), "r"(right_4));
}
DEVICE float widen(Bits16 bits) {
#if IS_HALF
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return __int_as_float((int)bits << 16);
#endif
}
DEVICE Bits16 narrow(float value) {
    Bits16 bits;
    asm("cvt.rn." NUMBER ".f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
DEVICE unsigned narrow_two(float low, float high) {
    unsigned bits;
    asm("cvt.rn." NUMBER "x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

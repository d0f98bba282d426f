/* Vectors of LANES floats for one instruction set, in GCC's portable vector types. Included once per set by native.c,
 * which defines LANES, NAME (adds the set's suffix) and the blocking of the kernels. Everything is inlined, so that no
 * vector crosses a call. bfloat16 is the upper half of a float; it is widened by a shift and rounded to nearest even. */

#define vf NAME(vf_)
#define vi NAME(vi_)
#define vh NAME(vh_)
#define vc NAME(vc_)
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef int8_t vc __attribute__((vector_size(LANES)));

#define splat NAME(splat_)
#define load NAME(load_)
#define load_part NAME(load_part_)
#define load_codes NAME(load_codes_)
#define load_half NAME(load_half_)
#define load_places NAME(load_places_)
#define store NAME(store_)
#define sum NAME(sum_)
#define sum4 NAME(sum4_)
#define sum16 NAME(sum16_)
#define expv NAME(expv_)
#define fold NAME(fold_)
#define pick NAME(pick_)
#define larger NAME(larger_)
#define largest NAME(largest_)
#define fma NAME(fma_)

INLINE vf splat(float x) { return x - (vf){0}; }

/* a where the mask is set, else b. A cast between vectors keeps the bits. */
INLINE vi pick(vi mask, vi a, vi b) { return (mask & a) | (~mask & b); }

/* a * b + c. Said outright and compiled with -ffp-contract=off: left to the compiler, one copy of a loop fuses the two
 * and another does not, and equal rows get different bits. */
INLINE vf fma(vf a, vf b, vf c) {
#if LANES == 16
    return _mm512_fmadd_ps(a, b, c);
#elif LANES == 8
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

/* Codes of 8 bits, signed or not, from `from` on. */
INLINE vf load_codes(const uint8_t *from, const int is_signed) {
#if LANES == 16
    const __m128i bytes = _mm_loadu_si128((const __m128i *)from);
    return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif LANES == 8
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)from);
    return _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    vc codes;
    memcpy(&codes, from, sizeof codes);
    vi wide = __builtin_convertvector(codes, vi);
    return __builtin_convertvector(is_signed ? wide : wide & 0xff, vf);
#endif
}

/* Elements i to i + LANES - 1 of an array of what `kind` says: floats, bfloat16 or codes. */
INLINE vf load(const void *base, int64_t i, const int kind) {
    vf v;
    if (kind == SIGNED || kind == UNSIGNED) return load_codes((const uint8_t *)base + i, kind == SIGNED);
    if (kind == BFLOAT) {
        vh h;
        memcpy(&h, (const uint16_t *)base + i, sizeof h);
        vi wide = __builtin_convertvector(h, vi) << 16;
        memcpy(&v, &wide, sizeof v);
    } else {
        memcpy(&v, (const float *)base + i, sizeof v);
    }
    return v;
}

/* The first n < LANES elements from i on, zeros behind them; reads nothing past them. */
INLINE vf load_part(const void *base, int64_t i, int64_t n, const int bf16) {
    float part[LANES] = {0};
    for (int64_t j = 0; j < n; j++) part[j] = get(base, i + j, bf16);
    return load(part, 0, 0);
}

/* Of 2 * LANES bfloat16 from i on, those at even (half 0) or odd (half 1) places: cheaper than widening neighbours. */
INLINE vf load_half(const void *base, int64_t i, const int half) {
    vi pairs;
    memcpy(&pairs, (const uint16_t *)base + i, sizeof pairs);
    return (vf)(half ? pairs & (int32_t)0xffff0000 : pairs << 16);
}

/* The same of 2 * LANES floats, or bfloat16. */
INLINE vf load_places(const void *base, int64_t i, const int half, const int bf16) {
    if (bf16) return load_half(base, i, half);
    const vf a = load(base, i, 0), b = load(base, i + LANES, 0);
#if LANES == 16
    return half ? __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
                : __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif LANES == 8
    return half ? __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
                : __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
    return half ? __builtin_shufflevector(a, b, 1, 3, 5, 7) : __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}

INLINE void store(void *base, int64_t i, vf v, const int bf16) {
    if (bf16) {
        vi bits;
        memcpy(&bits, &v, sizeof bits);
        vi rounded = bits + 0x7fff + ((bits >> 16) & 1);
        /* Rounding would turn some NaNs into infinity: they get their quiet bit instead. */
        rounded = pick(v != v, bits | 0x400000, rounded);
        vh h = __builtin_convertvector((rounded >> 16) & 0xffff, vh);
        memcpy((uint16_t *)base + i, &h, sizeof h);
    } else {
        memcpy((float *)base + i, &v, sizeof v);
    }
}

/* LANES partial sums to four: lane i of the result holds the lanes i, i + 4, i + 8, ... added pairwise. */
INLINE v4 fold(vf v) {
#if LANES == 16
    v8 w = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LANES == 8
    v8 w = v;
#endif
#if LANES >= 8
    return __builtin_shufflevector(w, w, 0, 1, 2, 3) + __builtin_shufflevector(w, w, 4, 5, 6, 7);
#else
    return v;
#endif
}

/* The four sums over lanes. Each is added in an order of its own lanes alone, so it does not depend on its place. */
INLINE v4 sum4(vf a, vf b, vf c, vf d) {
    v4 e = fold(a), f = fold(b), g = fold(c), h = fold(d);
    v4 ef = __builtin_shufflevector(e, f, 0, 4, 1, 5) + __builtin_shufflevector(e, f, 2, 6, 3, 7);
    v4 gh = __builtin_shufflevector(g, h, 0, 4, 1, 5) + __builtin_shufflevector(g, h, 2, 6, 3, 7);
    return __builtin_shufflevector(ef, gh, 0, 1, 4, 5) + __builtin_shufflevector(ef, gh, 2, 3, 6, 7);
}

#if LANES == 16
/* A step of sum4 for two vectors at once: lanes 8 apart added, then 4, 2 and 1 apart. */
#define HALVES(a, b) (_mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee))
#define QUARTERS(a, b) (_mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd))
#define PAIRS(a, b) (_mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee))
#define NEIGHBOURS(a, b) (_mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xdd))

/* sum4 of four times four vectors, with its bits, for half the work of four calls: out[g] of v[g]. */
INLINE void sum16(vf v[4][4], v4 *out) {
    vf quarters[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) quarters[j] = QUARTERS(HALVES(v[0][j], v[1][j]), HALVES(v[2][j], v[3][j]));
    const vf all = NEIGHBOURS(PAIRS(quarters[0], quarters[1]), PAIRS(quarters[2], quarters[3]));
    memcpy(out, &all, sizeof all);
}
#endif

INLINE float sum(vf v) {
    v4 w = fold(v);
    return (w[0] + w[2]) + (w[1] + w[3]);
}

/* The larger of each lane; b where a is NaN. */
INLINE vf larger(vf a, vf b) { return (vf)pick(a > b, (vi)a, (vi)b); }

/* The largest lane, of which none is NaN. */
INLINE float largest(vf v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof lanes);
#pragma GCC unroll 4
    for (int n = LANES / 2; n > 0; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
    return lanes[0];
}

/* e^x to 2 units in the last place (Cephes' expf). Arguments beyond +-87 count as +-87; NaN stays NaN. */
INLINE vf expv(vf x) {
    x = (vf)pick(x < -87.f, (vi)splat(-87.f), (vi)x);
    x = (vf)pick(x > 87.f, (vi)splat(87.f), (vi)x);
    const vf shift = splat(12582912.f); /* 1.5 * 2^23: adding it rounds to a whole number */
    vf n = fma(x, splat(1.44269504f), shift) - shift;
    vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p * r, r, r + 1.f);
    vi power = (__builtin_convertvector((vf)((vi)n & (n == n)), vi) + 127) << 23;
    return p * (vf)power;
}

/* x / (1 + e^-x). Below -87 it is less than the smallest normal float in size and counts as the value there. */
INLINE vf NAME(silu_)(vf x) {
    x = (vf)pick(x < -87.f, (vi)splat(-87.f), (vi)x);
    return x / (1.f + expv(-x));
}

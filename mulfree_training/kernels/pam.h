/* Piecewise affine arithmetic on whole vectors, equal to reference.py bit for bit (any NaN equals any NaN).
 *
 * GCC and Clang vector extensions: the same lines become AVX-512, AVX2, SSE or NEON. Nothing here branches on data, and
 * nothing multiplies or divides. Operands and results are patterns (ivec) where an operation works on patterns, floats
 * (vec) where it works on floats; a cast goes from one to the other.
 */
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Patterns, as in bits.py. */
static const int32_t SIGN = INT32_MIN, ABS = 0x7fffffff, MANT = 0x007fffff;
static const int32_t BIAS = 0x3f800000;  /* 1.0 */
static const int32_t MIN = 0x00800000;   /* the smallest normal number */
static const int32_t INF = 0x7f800000;
static const int32_t QUIET = 0x7fc00000; /* NaN */

static inline vec load(const float *x) { return *(const vec *)x; }
static inline ivec load(const int32_t *x) { return *(const ivec *)x; }
static inline void store(float *x, vec value) { *(vec *)x = value; }
static inline void store(int32_t *x, ivec value) { *(ivec *)x = value; }
static inline ivec all(int32_t x) { return x - (ivec){}; }
static inline vec all(float x) { return x - (vec){}; }

/* The first n < LANES entries; the others are `fill`. */
static inline vec load_part(const float *x, int64_t n, float fill) {
#if defined(__AVX512F__)
    return (vec)_mm512_mask_loadu_ps((__m512)all(fill), (__mmask16)((1u << n) - 1), x);
#else
    float y[LANES]; /* in pieces, because a memcpy of any other length is a call */
    store(y, all(fill));
    int64_t i = 0;
    if (n & 4) memcpy(y, x, 16), i = 4;
    if (n & 2) memcpy(y + i, x + i, 8), i += 2;
    if (n & 1) memcpy(y + i, x + i, 4);
    return load(y);
#endif
}
static inline void store_part(float *x, int64_t n, vec value) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(x, (__mmask16)((1u << n) - 1), (__m512)value);
#else
    float y[LANES];
    store(y, value);
    int64_t i = 0;
    if (n & 4) memcpy(x, y, 16), i = 4;
    if (n & 2) memcpy(x + i, y + i, 8), i += 2;
    if (n & 1) memcpy(x + i, y + i, 4);
#endif
}

/* Sums of patterns wrap around: signed vectors may not. */
static inline ivec plus(ivec a, ivec b) { return (ivec)((uvec)a + (uvec)b); }
static inline ivec minus(ivec a, ivec b) { return (ivec)((uvec)a - (uvec)b); }

static inline ivec select(ivec mask, ivec yes, ivec no) { return mask ? yes : no; }
static inline vec select(ivec mask, vec yes, vec no) { return mask ? yes : no; }
static inline ivec least(ivec a, ivec b) { return a < b ? a : b; }
static inline ivec most(ivec a, ivec b) { return a > b ? a : b; }

/* Is any lane of the mask set? */
static inline bool any(ivec mask) {
    int32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= mask[i];
    return found != 0;
}

/* Pattern of |x|, subnormal numbers read as zero. */
static inline ivec magnitude(ivec x) {
    const ivec size = x & ABS;
    return size & (size >= MIN);
}

/* size + shift for a size >= 0 and |shift| < 2^31 - MIN: 0 below the smallest normal number, at most infinity. */
static inline ivec clamped(ivec size, ivec shift) {
    const ivec over = size >= INF - most(shift, (ivec){}), under = size < MIN - shift;
    return select(over, all(INF), plus(size, shift) & ~under);
}

/* What PAM and PAD share: operand magnitudes m and n, the clamped sum or difference, where it is zero or infinite. */
static inline ivec finished(ivec a, ivec b, ivec m, ivec n, ivec size, ivec zero, ivec infinite) {
    size = select(infinite, all(INF), size & ~zero) | ((a ^ b) & SIGN);
    return select((m > INF) | (n > INF) | (zero & infinite), all(QUIET), size);
}

static inline ivec pam_mul(ivec a, ivec b, int32_t shift) {
    const ivec m = magnitude(a), n = magnitude(b);
    const ivec zero = (m == 0) | (n == 0), infinite = (m == INF) | (n == INF);
    return finished(a, b, m, n, clamped(m, n - (BIAS - shift)), zero, infinite);
}

static inline ivec pam_div(ivec a, ivec b, int32_t shift) {
    const ivec m = magnitude(a), n = magnitude(b);
    const ivec zero = (m == 0) | (n == INF), infinite = (m == INF) | (n == 0);
    return finished(a, b, m, n, clamped(m, BIAS - shift - n), zero, infinite);
}

/* Derivative of PAM(a, b) with respect to a: sign(b) 2^(E_b + carry of the mantissas). */
static inline ivec pam_slope(ivec a, ivec b, int32_t shift) {
    const ivec m = magnitude(a), n = magnitude(b);
    ivec size = clamped(n, (m & MANT) + shift) & ~MANT & (n != 0);
    size = select(n == INF, all(INF), size) | (b & SIGN);
    return select((m > INF) | (n > INF), all(QUIET), size);
}

static inline ivec pam_mul_grad(ivec grad, ivec a, ivec b, int32_t shift) {
    return pam_mul(grad, pam_slope(a, b, shift), 0);
}

/* sign(x) 2^E: infinities and NaN as they are. */
static inline ivec pam_power(ivec x) {
    const ivec size = magnitude(x);
    return select(size > INF, x, x & ~MANT);
}

/* Derivative of y = PAD(a, b) with respect to b, applied to grad. */
static inline ivec pam_div_grad(ivec grad, ivec a, ivec b, int32_t shift) {
    const ivec y = pam_div(a, b, shift);
    return pam_mul(grad, pam_div(pam_power(y), pam_power(b), 0), 0) ^ SIGN;
}

static inline vec floor_of(vec x) {
    const ivec bits = (ivec)x, large = (bits & ABS) >= 0x4b000000; /* 2^23 and beyond: whole already, infinite or NaN */
    const vec cut = __builtin_convertvector(__builtin_convertvector(select(large, (vec){}, x), ivec), vec);
    const vec down = select(cut > x, cut - 1.0f, cut);
    return select(large, x, (vec)((ivec)down | (bits & SIGN)));
}

/* 2^floor(x) (1 + x - floor(x)). */
static inline vec pam_exp2(vec x) {
    const ivec unordered = x != x;
    vec within = select(x > 254.0f, all(254.0f), x);
    within = select(within < -254.0f, all(-254.0f), within);
    within = select(unordered, (vec){}, within);
    const vec whole = floor_of(within);
    const ivec power = (ivec)((uvec)__builtin_convertvector(whole, ivec) << 23);
    const ivec size = clamped((ivec)(1.0f + (within - whole)), power);
    return (vec)select(unordered, all(QUIET), size);
}

static inline ivec pam_exp2_grad(ivec grad, vec x) { return pam_mul(grad, (ivec)pam_exp2(floor_of(x)), 0); }

/* E + M; -inf at 0, NaN for negative x. */
static inline vec pam_log2(vec x) {
    const ivec bits = (ivec)x, size = magnitude(bits);
    const vec exponent = __builtin_convertvector((size >> 23) - 127, vec);
    const vec fraction = (vec)((size & MANT) | BIAS) - 1.0f;
    ivec y = select(size == INF, all(INF), (ivec)(exponent + fraction));
    y = select(size == 0, all(INF | SIGN), y);
    return (vec)select((size > INF) | ((bits < 0) & (size > 0)), all(QUIET), y);
}

static inline ivec pam_log2_grad(ivec grad, vec x) {
    return select(x < 0.0f, all(QUIET), pam_div(grad, pam_power((ivec)x), 0));
}

static inline ivec pam_sqrt(ivec x) {
    const ivec size = magnitude(x);
    ivec root = (((size - BIAS) >> 1) + BIAS) & (size != 0);
    root = select(size == INF, all(INF), root) | (x & SIGN);
    return select((size > INF) | ((x < 0) & (size > 0)), all(QUIET), root);
}

static inline ivec pam_sqrt_grad(ivec grad, ivec x) {
    const ivec half = pam_mul(grad, all((int32_t)0x3f000000), 0);
    return pam_mul(half, pam_div(pam_power(pam_sqrt(x)), pam_power(x), 0), 0);
}

/* The sixteen running sums of reference.row_sum; a vector at entry i of a row (a multiple of LANES) goes to
 * part[i / LANES % PARTS]. Entries past the end of the row must be 0. */
enum { PARTS = 16 / LANES };
struct RunningSums {
    vec part[PARTS];
};

static inline void add_at(RunningSums &sums, int64_t i, vec x) { sums.part[(i / LANES) & (PARTS - 1)] += x; }

static inline float total_of(const RunningSums &sums) {
    float lanes[16];
    memcpy(lanes, sums.part, sizeof lanes);
    for (int half = 8; half > 0; half >>= 1)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

static inline float row_sum(const float *x, int64_t n) {
    RunningSums sums = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < PARTS; j++) sums.part[j] += load(x + i + j * LANES);
    for (; i + LANES <= n; i += LANES) add_at(sums, i, load(x + i));
    if (i < n) add_at(sums, i, load_part(x + i, n - i, 0.0f));
    return total_of(sums);
}

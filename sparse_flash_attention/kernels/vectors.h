/* Vectors of the processor at hand, and the one matrix product that all of the attention is made of.
 *
 * GCC and Clang vector extensions: the same lines become AVX-512, AVX2, SSE or NEON.
 */
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
enum { LANES = 16, PANEL = 4, ROWS = 6 }; /* 24 sums, 4 rows of B and a broadcast fill 32 registers */
#elif defined(__AVX__)
enum { LANES = 8, PANEL = 2, ROWS = 6 }; /* 12 sums, 2 rows of B and a broadcast fill 16 registers */
#else
enum { LANES = 4, PANEL = 2, ROWS = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *x) { return *(const vec *)x; }
static inline void store(float *x, vec value) { *(vec *)x = value; }
static inline vec all(float x) { return x - (vec){}; }
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* 2^x to 2 units in the last place for x <= 127; exactly 0 below -126 (subnormal results), NaN stays NaN */
static inline vec exp2_of(vec x) {
    const vec shifted = x + 12582912.0f; /* 1.5 * 2^23: the integer part moves into the low bits */
    const vec f = x - (shifted - 12582912.0f);
    const ivec power = ((ivec)shifted << 23) + 0x3f800000;
    vec y = 1.5403530e-4f * f + 1.3333558e-3f; /* Taylor series of 2^f, |f| <= 1/2 */
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
    return x < -126.0f ? (vec){} : y * (vec)power;
}

static inline float sum_of(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

static inline float max_of(vec x) {
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
    return found;
}

/* Where a product goes: row m of the result starts at at(m); with an index, at the row of a larger matrix. */
struct Target {
    float *base;
    int64_t stride;
    const int32_t *index;
    float *at(int64_t m) const { return base + (index ? index[m] : m) * stride; }
};

template <int M, int N>
static inline __attribute__((always_inline)) void micro(
    int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step, Target c, int64_t m,
    int64_t n, bool add
) {
    vec sums[M][N];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) sums[i][j] = add ? load(c.at(m + i) + n + j * LANES) : (vec){};
    for (int64_t k = 0; k < depth; k++, a += a_step, b += b_step) {
        vec row[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) row[j] = load(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const vec factor = all(a[i * a_row]);
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) sums[i][j] += factor * row[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) store(c.at(m + i) + n + j * LANES, sums[i][j]);
}

template <int M>
static void columns(
    int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step, Target c, int64_t m,
    int64_t n, int64_t until, bool add
) {
    for (; n + PANEL * LANES <= until; n += PANEL * LANES)
        micro<M, PANEL>(depth, a, a_row, a_step, b + n, b_step, c, m, n, add);
#if defined(__AVX512F__)
    if (n + 3 * LANES <= until) {
        micro<M, 3>(depth, a, a_row, a_step, b + n, b_step, c, m, n, add);
        n += 3 * LANES;
    } else if (n + 2 * LANES <= until) {
        micro<M, 2>(depth, a, a_row, a_step, b + n, b_step, c, m, n, add);
        n += 2 * LANES;
    }
#endif
    if (n < until) micro<M, 1>(depth, a, a_row, a_step, b + n, b_step, c, m, n, add);
}

/* c[m + i][n] (+)= sum over k < depth of a[i * a_row + k * a_step] * b[k * b_step + n], for i < rows <= ROWS and the
 * columns begin <= n < end, both multiples of LANES. */
static void product(
    int64_t rows, int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step,
    Target c, int64_t m, int64_t begin, int64_t end, bool add
) {
    switch (rows) {
        case 1: return columns<1>(depth, a, a_row, a_step, b, b_step, c, m, begin, end, add);
        case 2: return columns<2>(depth, a, a_row, a_step, b, b_step, c, m, begin, end, add);
        case 3: return columns<3>(depth, a, a_row, a_step, b, b_step, c, m, begin, end, add);
        case 4: return columns<4>(depth, a, a_row, a_step, b, b_step, c, m, begin, end, add);
        case 5: return columns<5>(depth, a, a_row, a_step, b, b_step, c, m, begin, end, add);
        default: return columns<ROWS>(depth, a, a_row, a_step, b, b_step, c, m, begin, end, add);
    }
}

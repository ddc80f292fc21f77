/* Register tiles of the matrix product and of its exact derivative. Each sums over one index in its order, unblocked.
 *
 * A product whose operands and result are normal numbers is one sum of patterns, in which the signs multiply by
 * themselves. What else a tile must do follows from the ranges of its operands (see matmul.cpp).
 */
#pragma once
#include "pam.h"

/* Vectors in a row of a tile, at most, and the rows of tiles of 1, 2, … vectors: of the product, of the product where
 * masks need registers, and of the derivative, which keeps mantissas beside its sums. */
#if defined(__AVX512F__)
enum { PANEL = 4 };
static constexpr int PLAIN_ROWS[] = {8, 8, 8, 6}, MASKED_ROWS[] = {8, 8, 6, 6}, SLOPE_ROWS[] = {8, 6, 4, 4};
#elif defined(__AVX2__)
enum { PANEL = 3 };
static constexpr int PLAIN_ROWS[] = {8, 6, 4}, MASKED_ROWS[] = {6, 4, 3}, SLOPE_ROWS[] = {6, 3, 2};
#else
enum { PANEL = 2 };
static constexpr int PLAIN_ROWS[] = {8, 4}, MASKED_ROWS[] = {6, 4}, SLOPE_ROWS[] = {6, 3};
#endif
enum { MOST_ROWS = 8 };

/* PLAIN: normal numbers all through. LEFT, RIGHT, BOTH: zeros in these operands. SMALL: products below the smallest
 * normal number, and zeros anywhere. GUARDED: anything. */
enum Case { PLAIN, LEFT, RIGHT, BOTH, SMALL, GUARDED, CASES };

/* A tile of a product: c[i][j] = sum over k < depth of PAM(a[i][k], b[k][j]). */
struct Product {
    int64_t depth;
    const int32_t *a; /* patterns */
    int64_t a_row;
    const int32_t *b;     /* patterns less `bias`, whole vectors a row */
    const int32_t *limit; /* smallest magnitude of an a whose product with b counts. Not in PLAIN, LEFT */
    int32_t bias;         /* BIAS - shift */
    float *c;
    int64_t c_row, columns; /* only this many columns of c exist */
};

template <int M, int N>
static inline void write(const vec (&sums)[M][N], float *c, int64_t c_row, int64_t columns) {
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
            float *to = c + i * c_row + j * LANES;
            if (columns >= (j + 1) * LANES) store(to, sums[i][j]);
            else store_part(to, columns - j * LANES, sums[i][j]);
        }
}

/* One pattern in all lanes. As a float, or GCC works on it in a general register, which is slow to copy from. */
static inline ivec spread(const int32_t *x) { return (ivec)all(*(const float __attribute__((may_alias)) *)x); }

/* sum + (mask ? x : 0) for a sum that is not -0 */
static inline vec add_where(ivec mask, vec sum, ivec x) {
#if defined(__AVX512F__)
    return select(mask, sum + (vec)x, sum);
#else
    return sum + (vec)(x & mask);
#endif
}

template <int CASE, int M, int N>
static __attribute__((noinline)) void product_tile(const Product &t) {
    const int32_t *a = t.a, *b = t.b, *limit = t.limit;
    const int64_t a_row = t.a_row, depth = t.depth;
    vec sums[M][N] = {};
    for (int64_t k = 0; k < depth; k++, b += N * LANES, limit += N * LANES) {
        ivec y[N], least_x[N], right[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
            y[j] = load(b + j * LANES);
            if (CASE == RIGHT || CASE == BOTH || CASE == SMALL) least_x[j] = load(limit + j * LANES);
            if (CASE == RIGHT || CASE == BOTH) right[j] = least_x[j] != INT32_MAX;
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const ivec x = spread(a + i * a_row + k);
            const ivec left = (x & INF) != 0, size = x & ABS;
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) {
                const ivec sum = plus(x, y[j]);
                if (CASE == PLAIN) sums[i][j] += (vec)sum;
                if (CASE == LEFT) sums[i][j] = add_where(left, sums[i][j], sum);
                if (CASE == RIGHT) sums[i][j] = add_where(right[j], sums[i][j], sum);
                if (CASE == BOTH) sums[i][j] = add_where(left, sums[i][j], sum & right[j]);
                if (CASE == SMALL) sums[i][j] = add_where(size >= least_x[j], sums[i][j], sum);
            }
        }
    }
    write<M, N>(sums, t.c, t.c_row, t.columns);
}

/* The tile for this case and number of rows, at most M. */
template <int CASE, int N, int M>
static void product_rows(const Product &t, int64_t rows) {
    if (rows == M) return product_tile<CASE, M, N>(t);
    if constexpr (M > 1) product_rows<CASE, N, M - 1>(t, rows);
}

template <int N>
static void guarded_product(const Product &t, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
        vec sums[1][N] = {};
        for (int64_t k = 0; k < t.depth; k++)
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) {
                const ivec y = plus(load(t.b + (k * N + j) * LANES), all(t.bias));
                sums[0][j] += (vec)pam_mul(all(t.a[i * t.a_row + k]), y, BIAS - t.bias);
            }
        write<1, N>(sums, t.c + i * t.c_row, t.c_row, t.columns);
    }
}

/* A tile of the derivative: c[i][j] = sum over p < depth of g[i][p] shifted by the slope of PAM(a[i][j], b[p][j]). */
struct Derivative {
    int64_t depth;
    const int32_t *g; /* patterns */
    int64_t g_row;
    const int32_t *limit; /* smallest slope whose product with g counts. Only in SMALL */
    int64_t limit_row;
    const int32_t *a;     /* patterns, rows of PANEL vectors */
    const int32_t *b;     /* patterns less `bias`, whole vectors a row; zeros without a sign */
    int32_t bias;         /* BIAS - shift */
    float *c;
    int64_t c_row, columns;
};

template <int CASE, int M, int N>
static __attribute__((noinline)) void derivative_tile(const Derivative &t) {
    const int32_t *g = t.g, *b = t.b, *limit = t.limit;
    const int64_t g_row = t.g_row, depth = t.depth;
    const ivec zero = all((int32_t)-t.bias);
    vec sums[M][N] = {};
    ivec mantissa[M][N];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) mantissa[i][j] = magnitude(load(t.a + (i * PANEL + j) * LANES)) & MANT;
    for (int64_t p = 0; p < depth; p++, b += N * LANES) {
        ivec y[N], right[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
            y[j] = load(b + j * LANES);
            if (CASE != PLAIN) right[j] = y[j] != zero;
            if (CASE == SMALL) y[j] = plus(y[j], all(BIAS)) & right[j];
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const ivec x = spread(g + i * g_row + p), less = plus(x, all(-BIAS)), left = (x & INF) != 0;
            ivec least_slope;
            if (CASE == SMALL) least_slope = spread(limit + i * t.limit_row + p);
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) {
                const ivec slope = plus(y[j], mantissa[i][j]) & ~MANT;
                if (CASE == PLAIN) sums[i][j] += (vec)plus(slope, x);
                if (CASE == BOTH) sums[i][j] = add_where(left, sums[i][j], plus(slope, x) & right[j]);
                if (CASE == SMALL)
                    sums[i][j] = add_where((slope & ABS) >= least_slope, sums[i][j], plus(slope, less));
            }
        }
    }
    write<M, N>(sums, t.c, t.c_row, t.columns);
}

template <int CASE, int N, int M>
static void derivative_rows(const Derivative &t, int64_t rows) {
    if (rows == M) return derivative_tile<CASE, M, N>(t);
    if constexpr (M > 1) derivative_rows<CASE, N, M - 1>(t, rows);
}

template <int N>
static void guarded_derivative(const Derivative &t, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
        vec sums[1][N] = {};
        for (int64_t p = 0; p < t.depth; p++)
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) {
                const ivec y = plus(load(t.b + (p * N + j) * LANES), all(t.bias));
                const ivec x = load(t.a + (i * PANEL + j) * LANES);
                sums[0][j] += (vec)pam_mul_grad(all(t.g[i * t.g_row + p]), x, y, BIAS - t.bias);
            }
        write<1, N>(sums, t.c + i * t.c_row, t.c_row, t.columns);
    }
}

/* All rows of a block, in tiles of nearly equal height; N is at least the number of vectors in a row. */
template <int N>
static void product_block(int kind, Product t, int64_t rows) {
    if constexpr (N > 1)
        if (t.columns <= (N - 1) * LANES) return product_block<N - 1>(kind, t, rows);
    if (kind == GUARDED) return guarded_product<N>(t, rows);
    const int64_t highest = kind == PLAIN ? PLAIN_ROWS[N - 1] : MASKED_ROWS[N - 1];
    for (int64_t tiles = (rows + highest - 1) / highest; tiles > 0; tiles--) {
        const int64_t count = rows / tiles;
        switch (kind) {
            case PLAIN: product_rows<PLAIN, N, PLAIN_ROWS[N - 1]>(t, count); break;
            case LEFT: product_rows<LEFT, N, MASKED_ROWS[N - 1]>(t, count); break;
            case RIGHT: product_rows<RIGHT, N, MASKED_ROWS[N - 1]>(t, count); break;
            case BOTH: product_rows<BOTH, N, MASKED_ROWS[N - 1]>(t, count); break;
            default: product_rows<SMALL, N, MASKED_ROWS[N - 1]>(t, count);
        }
        t.a += count * t.a_row;
        t.c += count * t.c_row;
        rows -= count;
    }
}

template <int N>
static void derivative_block(int kind, const Derivative &t, int64_t rows) {
    if constexpr (N > 1)
        if (t.columns <= (N - 1) * LANES) return derivative_block<N - 1>(kind, t, rows);
    switch (kind) {
        case PLAIN: return derivative_rows<PLAIN, N, SLOPE_ROWS[N - 1]>(t, rows);
        case BOTH: return derivative_rows<BOTH, N, SLOPE_ROWS[N - 1]>(t, rows);
        case SMALL: return derivative_rows<SMALL, N, SLOPE_ROWS[N - 1]>(t, rows);
        default: return guarded_derivative<N>(t, rows);
    }
}

/* What the kernels on rows share: walking along rows, sums of several rows at once, splitting rows between threads.
 *
 * Rows are worked on in groups of up to LANES, one pass after the other. What is one value a row (a sum, a maximum) is
 * found for the whole group at once, a row in each lane, so that no pass waits for the last sum of a single row.
 *
 * A row is walked through in whole vectors and, at its end, a part of one. Functions take the place as an object, Whole
 * or Part, that loads and stores there: the end of a row costs whole vectors nothing.
 */
#pragma once
#include <algorithm>

#include "light.h"

struct Whole {
    vec load(const float *x, float) const { return ::load(x); }
    void store(float *x, vec value) const { ::store(x, value); }
    vec keep(vec x) const { return x; }
};

/* The first n lanes. */
static inline ivec below(int64_t n) {
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane < (int32_t)n;
}

struct Part {
    int64_t n;
    ivec inside;
    explicit Part(int64_t n) : n(n), inside(below(n)) {}
    vec load(const float *x, float fill) const {
#if defined(__AVX2__) && !defined(__AVX512F__)
        return select(inside, (vec)_mm256_maskload_ps(x, (__m256i)inside), all(fill));
#else
        return load_part(x, n, fill);
#endif
    }
    void store(float *x, vec value) const { store_part(x, n, value); }
    /* Zeros past the end, for a sum. */
    vec keep(vec x) const { return select(inside, x, (vec){}); }
};

template <class F> static inline void along(int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i, Whole());
    if (i < n) f(i, Part(n - i));
}

/* Two vectors of rows, each row `2 half` neighbours, to one of rows of `half`: the upper halves put into the lower. The
 * rows of one stand before those of the other, in pieces of four lanes where a row has fewer. */
template <int half, class Join> static inline vec fold(vec a, vec b, Join join) {
    ivec low;
    for (int i = 0; i < LANES; i++) {
        const int piece = half >= 4 ? LANES : 4, in_piece = i % piece, row = in_piece / half, rows = piece / half;
        low[i] = i - in_piece + row % (rows / 2) * 2 * half + in_piece % half + (row < rows / 2 ? 0 : LANES);
    }
    return join(__builtin_shuffle(a, b, low), __builtin_shuffle(a, b, low + half));
}

/* One value a row from LANES vectors, a row each; lane r is that of row r, whose upper half is put into the lower one
 * until one value is left, as reference.row_sum does. */
template <class Join> static inline vec folded(const vec *rows, Join join) {
    vec pieces[4];
    for (int k = 0; k < 4; k++) {
        if constexpr (LANES == 16)
            pieces[k] = fold<4>(fold<8>(rows[k], rows[4 + k], join), fold<8>(rows[8 + k], rows[12 + k], join), join);
        else if constexpr (LANES == 8)
            pieces[k] = fold<4>(rows[k], rows[4 + k], join);
        else
            pieces[k] = rows[k];
    }
    return fold<1>(fold<2>(pieces[0], pieces[1], join), fold<2>(pieces[2], pieces[3], join), join);
}
static inline vec summed(const vec *rows) {
    return folded(rows, [](vec a, vec b) { return a + b; });
}

/* The running sums of a row down to one vector, in the order of reference.row_sum. */
static inline vec gathered(const RunningSums &sums) {
    if (PARTS == 4) return (sums.part[0] + sums.part[2 % PARTS]) + (sums.part[1 % PARTS] + sums.part[3 % PARTS]);
    return PARTS == 2 ? sums.part[0] + sums.part[1 % PARTS] : sums.part[0];
}

enum { ONE_THREAD = 32768, NEAR = 4096, BUFFERS = 2 };

/* Arguments of every kernel; what one does not have is 0. Steps are in elements from one row to the next. */
struct Rows {
    float *out, *weight_out;
    const float *x, *grad, *weight, *bias;
    float *scratch; /* for rows longer than NEAR: BUFFERS padded rows a thread */
    int64_t rows, n, x_step, grad_step, threads;
    int64_t shift, exact, exact_log2;
    double eps;
};

/* Distance of rows in a buffer: whole vectors. */
static inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

/* All rows in groups by f(first, count, buffers); each buffer has `count` rows. */
template <class F> static inline void each_group(const Rows &r, F f) {
    const int64_t size = padded(r.n), most = std::max<int64_t>(1, std::min<int64_t>(NEAR / size, LANES));
    const int64_t threads = r.rows * r.n > ONE_THREAD ? r.threads : 1, groups = (r.rows + most - 1) / most;
    const int64_t share = (groups + threads - 1) / threads * most;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++) {
        alignas(64) float near[BUFFERS][NEAR];
        float *const far = size > NEAR ? r.scratch + t * BUFFERS * size : nullptr;
        float *const buffers[BUFFERS] = {size > NEAR ? far : near[0], size > NEAR ? far + size : near[1]};
        const int64_t end = std::min((t + 1) * share, r.rows);
        for (int64_t i = t * share; i < end; i += most) f(i, std::min(most, end - i), buffers);
    }
}

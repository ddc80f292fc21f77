/* What the kernels on rows share: walking along a row, and splitting rows between threads.
 *
 * A row is walked through in whole vectors and, at its end, a part of one. Functions take the place as an object, Whole
 * or Part, that loads and stores there: the end of a row costs whole rows nothing.
 */
#pragma once
#include "light.h"

struct Whole {
    vec load(const float *x, float) const { return ::load(x); }
    void store(float *x, vec value) const { ::store(x, value); }
    vec keep(vec x) const { return x; }
};

struct Part {
    int64_t n;
    ivec inside;
    explicit Part(int64_t n) : n(n) {
        ivec lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
        inside = lane < (int32_t)n;
    }
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

enum { ONE_THREAD = 32768, SHORT_ROW = 1024, BUFFERS = 2 };

/* Arguments of every kernel; what one does not have is 0. Steps are in elements from one row to the next. */
struct Rows {
    float *out, *weight_out;
    const float *x, *grad, *weight, *bias;
    float *scratch; /* for rows longer than SHORT_ROW: BUFFERS padded rows a thread */
    int64_t rows, n, x_step, grad_step, threads;
    int64_t shift, exact, exact_log2;
    double eps;
};

static inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

/* Every row i by f(i, buffers), buffers being BUFFERS rows of `padded` floats each. */
template <class F> static inline void each_row(const Rows &r, F f) {
    const int64_t threads = r.rows * r.n > ONE_THREAD ? r.threads : 1, share = (r.rows + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++) {
        alignas(64) float near[BUFFERS * SHORT_ROW];
        float *const buffers = r.n > SHORT_ROW ? r.scratch + t * BUFFERS * padded(r.n) : near;
        const int64_t end = (t + 1) * share < r.rows ? (t + 1) * share : r.rows;
        for (int64_t i = t * share; i < end; i++) f(i, buffers);
    }
}

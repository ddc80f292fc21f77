/* One rotational optimizer step (Kosson, Messmer, Jaggi 2024, section 4) for all tensors of a model, row by row.
 *
 * A row x (n floats) of norm N with base direction d turns by about `rotation` radians and keeps its norm:
 *     x~ = x - mean(x),   d' = d - mean(d) - x~ <d,x~>/<x~,x~>
 *     u <- f u + (1-f) |d'|^2,   k = rotation N / sqrt(u/(1-f^t))
 *     x <- N (x~ - k d') / |x~ - k d'|,   |x~ - k d'|^2 = |x~|^2 + k^2 |d'|^2   (d' is orthogonal to x~)
 * Means, products and norms come from one pass, so the result is known before it is written, and weights, gradients and
 * moments cross the memory bus once: 28 bytes a parameter for AdamW, as in a fused plain step.
 *
 * |d'|^2 in closed form cancels where d is nearly radial or constant; such rows are summed again ("careful").
 * A non-finite gradient stays out of its coordinate's moments, and its row does not turn in this step. Every row is
 * summed in one fixed order, so the number of threads changes no bit.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* normally built for the very processor; without -march=native one copy a processor family, chosen when loaded */
#if defined(__x86_64__) && !defined(__AVX2__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

enum { ADAMW, SGD, GRADIENT, LION };        /* GRADIENT: SGD without momentum */
enum { SHORT_ROW = 128, LONG_ROW = 16384 }; /* rows of at least and at most so many floats are cached one by one */
enum { LANES = 8, GROUP = 16 };             /* floats in a vector; short rows taken together, at most */
enum { BLOCK = 2048 };                      /* floats summed in float */
enum { TASK = 16384 };                      /* floats that one thread takes at a time, about */
enum { WORDS = 11, NUMBERS = 12 };

/* |d'| below this fraction of |d| is the rounding noise of a radial or constant direction: no update */
static const float NOISE = 16 * 1.1920929e-07f;

typedef struct {
    float *weight;
    const float *grad;
    float *first, *second; /* moments; momentum buffer in `first` */
    float *norm, *update_sq;
    const float *speed; /* factor on each row's turn, or NULL */
    int64_t rows, columns, kind, zero_mean;
    float rotation, decay, fresh, correction; /* radians, f, 1 - f (f may round to 1), 1/(1 - f^t) */
    float scale;                              /* the base direction is scale * d (Adam's bias corrections) */
    float lr, weight_decay;                   /* of the base step, which rows of norm zero take */
    float sign, c[5];                         /* -1 to maximise; constants of `direction` */
} Tensor;

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Mask){__VA_ARGS__})
#pragma GCC diagnostic ignored "-Wpsabi" /* Lanes pass through inlined functions only */
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* over a row: d, x, d x, x^2, d^2, and 0 g, which is NaN if one g is not finite */
typedef struct { double d, x, dx, xx, dd, bad; } Sums;
/* d' = d - along x - offset; |x~|^2, |d'|^2, <x~,d'> (zero but for rounding); does the closed form cancel? */
typedef struct { float mean, along, offset, xx, sq, cross, cancels; } Parts;
typedef struct { float keep, push, moves; } Move; /* x <- keep (x - mean) - push (d - along x - offset), if it moves */

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Base direction of one coordinate and its new moments. */
INLINE float direction(int kind, const float *c, float g, float x, float m, float v, float *m_new, float *v_new) {
    const int finite = 0 * g == 0;
    if (kind == ADAMW) { /* c = 1-b1, b2, 1-b2, eps sqrt(1-b2^t), l2 of the second moment */
        float h = g + c[4] * x;
        *m_new = finite ? m + c[0] * (g - m) : m;
        *v_new = finite ? c[1] * v + c[2] * h * h : v;
        return *m_new / (sqrtf(*v_new) + c[3]);
    }
    if (kind == SGD) { /* c = momentum, weight of the new gradient, share of the gradient and of the buffer in d */
        *m_new = finite ? c[0] * m + c[1] * g : m;
        return c[2] * g + c[3] * *m_new;
    }
    if (kind == LION) { /* c = 1-b1, 1-b2 */
        float u = m + c[0] * (g - m);
        *m_new = finite ? m + c[1] * (g - m) : m;
        return (float)((u > 0) - (u < 0));
    }
    return g;
}

/* Row of length n: what of d is mean and radial. A row of norm zero takes the plain step: nothing is taken away. */
INLINE Parts project(float n, float zero_mean, float norm, float d, float x, float dx, float xx, float dd) {
    const float centre = norm == 0 ? 0 : zero_mean / n, mean = centre * x, mean_d = centre * d;
    xx -= n * mean * mean, dx -= n * mean * mean_d;
    const float along = (xx > 0) & (norm != 0) ? dx / xx : 0, sq = dd - n * mean_d * mean_d - along * dx;
    return (Parts){mean, along, mean_d - along * mean, xx, sq, 0, sq < 0.25f * dd};
}

INLINE Parts project_row(const Tensor *t, int64_t r, Sums s) {
    return project(t->columns, t->zero_mean, t->norm[r], s.d, s.x, s.dx, s.xx, s.dd);
}

/* The row's move; updates its running mean of |d'|^2. */
INLINE Move turn(const Tensor *t, Parts p, float dd, float norm, float speed, float *update_sq) {
    const float scale = t->scale, sq = (p.sq > NOISE * NOISE * dd ? p.sq : 0) * scale * scale;
    const float finite = dd * 0 + sq * 0 == 0 ? 1 : 0, old = *update_sq;
    const float u = norm != 0 ? t->decay * old + t->fresh * sq : old;
    const float size = sqrtf(u * t->correction);
    const float k = size > 0 ? t->rotation * speed * norm / size : 0; /* length of the step per unit of d' */
    const float keep = norm / sqrtf(p.xx - 2 * k * scale * p.cross + k * k * sq);
    const float moves = k * p.xx != 0 ? finite : 0, plain = 1 - t->lr * t->weight_decay;
    *update_sq = finite != 0 ? u : old;
    return (Move){norm != 0 ? keep : plain, norm != 0 ? keep * k * scale : t->lr * scale, norm != 0 ? moves : finite};
}

/* Directions of `count` coordinates from `at` on, into d; with `store` their new moments too. Were all g finite? */
INLINE int directions(int kind, const Tensor *t, int64_t at, int64_t count, float *d, int store) {
    const float *x = t->weight + at, *g = t->grad + at;
    float *first = (kind != GRADIENT ? t->first : t->weight) + at;
    float *second = (kind == ADAMW ? t->second : t->weight) + at;
    const float c[5] = {t->c[0], t->c[1], t->c[2], t->c[3], t->c[4]}, sign = t->sign;
    float bad = 0;
#pragma omp simd reduction(+ : bad)
    for (int64_t j = 0; j < count; j++) {
        float m_new = 0, v_new = 0;
        d[j] = direction(kind, c, sign * g[j], x[j], first[j], second[j], &m_new, &v_new);
        if (store && kind != GRADIENT) first[j] = m_new;
        if (store && kind == ADAMW) second[j] = v_new;
        bad += 0 * g[j];
    }
    return bad == 0;
}

/* The same, and in the same pass the sums, added to s. */
INLINE void summed_directions(int kind, const Tensor *t, int64_t at, int64_t count, float *d, int store, Sums *s) {
    const float *x = t->weight + at, *g = t->grad + at;
    float *first = (kind != GRADIENT ? t->first : t->weight) + at;
    float *second = (kind == ADAMW ? t->second : t->weight) + at;
    const float c[5] = {t->c[0], t->c[1], t->c[2], t->c[3], t->c[4]}, sign = t->sign;
    float sum_d = 0, sum_x = 0, sum_dx = 0, sum_xx = 0, sum_dd = 0, bad = 0;
#pragma omp simd reduction(+ : sum_d, sum_x, sum_dx, sum_xx, sum_dd, bad)
    for (int64_t j = 0; j < count; j++) {
        float m_new = 0, v_new = 0, x_j = x[j];
        float d_j = direction(kind, c, sign * g[j], x_j, first[j], second[j], &m_new, &v_new);
        if (store && kind != GRADIENT) first[j] = m_new;
        if (store && kind == ADAMW) second[j] = v_new;
        d[j] = d_j;
        sum_d += d_j, sum_x += x_j, sum_dx += d_j * x_j, sum_xx += x_j * x_j, sum_dd += d_j * d_j;
        bad += 0 * g[j];
    }
    s->d += sum_d, s->x += sum_x, s->dx += sum_dx, s->xx += sum_xx, s->dd += sum_dd, s->bad += bad;
}

/* |d'|^2 and <x~,d'> of `count` coordinates, from the coordinates themselves, added to p. */
INLINE void add_rest(const float *d, const float *x, int64_t count, Parts *p) {
    const float mean = p->mean, along = p->along, offset = p->offset;
    float sq = 0, cross = 0;
#pragma omp simd reduction(+ : sq, cross)
    for (int64_t j = 0; j < count; j++) {
        float rest = d[j] - along * x[j] - offset;
        sq += rest * rest;
        cross += rest * (x[j] - mean);
    }
    p->sq += sq, p->cross += cross;
}

/* New weights. A careful row is rounded as add_rest() saw it, the others take one multiplication less. */
INLINE void write(float *x, const float *d, int64_t count, Parts p, Move m) {
    const float mean = p.mean, along = p.along, offset = p.offset, keep = m.keep, push = m.push;
    const float factor = keep + push * along, rest = push * offset - keep * mean;
    if (m.moves == 0) return;
    if (p.cancels != 0) {
#pragma omp simd
        for (int64_t j = 0; j < count; j++) x[j] = keep * (x[j] - mean) - push * (d[j] - along * x[j] - offset);
    } else {
#pragma omp simd
        for (int64_t j = 0; j < count; j++) x[j] = factor * x[j] - push * d[j] + rest;
    }
}

INLINE float speed_of(const Tensor *t, int64_t r) { return t->speed ? t->speed[r] : 1; }

/* Rows [r0, r1), of at most LONG_ROW coordinates. */
INLINE void cached_rows(int kind, const Tensor *t, int64_t r0, int64_t r1) {
    const int64_t n = t->columns;
    float d[LONG_ROW];
    for (int64_t r = r0; r < r1; r++) {
        float *x = t->weight + r * n;
        Sums s = {0};
        for (int64_t j = 0; j < n; j += BLOCK)
            summed_directions(kind, t, r * n + j, smaller(n - j, BLOCK), d + j, 1, &s);
        s.dd += s.bad; /* a sum of d^2 that is not finite keeps a row where it is */
        Parts p = project_row(t, r, s);
        if (p.cancels != 0) {
            p.sq = 0;
            for (int64_t j = 0; j < n; j += BLOCK) add_rest(d + j, x + j, smaller(n - j, BLOCK), &p);
        }
        write(x, d, n, p, turn(t, p, s.dd, t->norm[r], speed_of(t, r), t->update_sq + r));
    }
}

/* Neighbours added: lane l of the result is lanes 2l and 2l + 1 of a, then of b. */
INLINE Lanes add_pairs(Lanes a, Lanes b) {
    return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}

/* Lane r of the result: the sum over the lanes of sums[r]. */
INLINE Lanes add_lanes(Lanes *sums) {
    for (int rows = LANES; rows > 1; rows /= 2)
        for (int r = 0; r < rows / 2; r++) sums[r] = add_pairs(sums[2 * r], sums[2 * r + 1]);
    return sums[0];
}

/* The sums of up to LANES short rows, ordered as in Sums, from column `first` of out on; d and x are read past their
 * end, by less than a vector. */
INLINE void short_sums(const float *d, const float *x, int64_t n, int64_t rows, int64_t first, float out[5][GROUP]) {
    Lanes sums[5][LANES] = {0};
    Mask inside;
    for (int l = 0; l < LANES; l++) inside[l] = l < n % LANES ? -1 : 0;
    for (int64_t r = 0; r < rows; r++) {
        Lanes sum_d = {0}, sum_x = {0}, sum_dx = {0}, sum_xx = {0}, sum_dd = {0};
        for (int64_t j = 0; j < n; j += LANES) {
            Lanes d_j = *(const Lanes *)(d + r * n + j), x_j = *(const Lanes *)(x + r * n + j);
            if (j + LANES > n) d_j = (Lanes)((Mask)d_j & inside), x_j = (Lanes)((Mask)x_j & inside);
            sum_d += d_j, sum_x += x_j, sum_dx += d_j * x_j, sum_xx += x_j * x_j, sum_dd += d_j * d_j;
        }
        sums[0][r] = sum_d, sums[1][r] = sum_x, sums[2][r] = sum_dx, sums[3][r] = sum_xx, sums[4][r] = sum_dd;
    }
    for (int i = 0; i < 5; i++) *(Lanes *)(out[i] + first) = add_lanes(sums[i]);
}

/* Up to GROUP short rows: what comes once a coordinate is done over their coordinates in one go, what comes once a row
 * in vectors across the rows. */
INLINE void short_rows(int kind, const Tensor *t, int64_t r0, int64_t rows) {
    const int64_t n = t->columns;
    float *weight = t->weight + r0 * n, *norm = t->norm + r0, *update_sq = t->update_sq + r0;
    float d[GROUP * SHORT_ROW + LANES], x[GROUP * SHORT_ROW + LANES], sums[5][GROUP];
    float speed[GROUP], mean[GROUP], along[GROUP], offset[GROUP], xx[GROUP], sq[GROUP], cross[GROUP], cancels[GROUP];
    float keep[GROUP], push[GROUP], moves[GROUP];
    const int finite = directions(kind, t, r0 * n, rows * n, d, 1);
    memcpy(x, weight, (size_t)(rows * n) * sizeof *x);
    for (int64_t r = 0; r < rows; r += LANES)
        short_sums(d + r * n, x + r * n, n, smaller(rows - r, LANES), r, sums);
    for (int64_t r = 0; r < rows; r++) speed[r] = speed_of(t, r0 + r);
    /* a sum of d^2 that is not finite keeps a row where it is */
    for (int64_t j = 0; !finite && j < rows * n; j++) sums[4][j / n] += 0 * t->grad[r0 * n + j];
#pragma omp simd
    for (int64_t r = 0; r < rows; r++) {
        const Parts p = project(n, t->zero_mean, norm[r], sums[0][r], sums[1][r], sums[2][r], sums[3][r], sums[4][r]);
        mean[r] = p.mean, along[r] = p.along, offset[r] = p.offset, xx[r] = p.xx, sq[r] = p.sq, cross[r] = p.cross;
        cancels[r] = p.cancels;
    }
    for (int64_t r = 0; r < rows; r++) {
        Parts p = {mean[r], along[r], offset[r], xx[r], 0, 0, 1};
        if (cancels[r] == 0) continue;
        add_rest(d + r * n, x + r * n, n, &p);
        sq[r] = p.sq, cross[r] = p.cross;
    }
#pragma omp simd
    for (int64_t r = 0; r < rows; r++) {
        const Parts p = {mean[r], along[r], offset[r], xx[r], sq[r], cross[r], cancels[r]};
        const Move m = turn(t, p, sums[4][r], norm[r], speed[r], update_sq + r);
        keep[r] = m.keep, push[r] = m.push, moves[r] = m.moves;
    }
    for (int64_t r = 0; r < rows; r++) {
        const Parts p = {mean[r], along[r], offset[r], xx[r], sq[r], cross[r], cancels[r]};
        write(weight + r * n, d + r * n, n, p, (Move){keep[r], push[r], moves[r]});
    }
}

INLINE void rows_of_kind(int kind, const Tensor *t, int64_t r0, int64_t r1) {
    if (t->columns >= SHORT_ROW) {
        cached_rows(kind, t, r0, r1);
        return;
    }
    /* more rows share the latency of what comes once a row, as long as they leave the cache to the streams */
    const int64_t group = t->columns < 48 ? GROUP : LANES;
    for (int64_t r = r0; r < r1; r += group) short_rows(kind, t, r, smaller(r1 - r, group));
}

/* Rows [r0, r1) of a tensor, on one thread. */
CLONES static void some_rows(const Tensor *t, int64_t r0, int64_t r1) {
    switch (t->kind) {
    case ADAMW: rows_of_kind(ADAMW, t, r0, r1); break;
    case SGD: rows_of_kind(SGD, t, r0, r1); break;
    case LION: rows_of_kind(LION, t, r0, r1); break;
    default: rows_of_kind(GRADIENT, t, r0, r1);
    }
}

typedef struct { Sums sums; Parts parts; } Block; /* what a block of a long row adds to its row */

/* One block of a long row: its sums; with `p` its rest; with `m` too its new weights and moments. */
INLINE void block_of_kind(int kind, const Tensor *t, int64_t at, int64_t count, Block *b, const Parts *p,
                          const Move *m) {
    float d[BLOCK], *x = t->weight + at;
    if (!p) {
        b->sums = (Sums){0};
        summed_directions(kind, t, at, count, d, 0, &b->sums);
        return;
    }
    directions(kind, t, at, count, d, m != NULL);
    if (m) {
        write(x, d, count, *p, *m);
    } else {
        b->parts = *p;
        b->parts.sq = b->parts.cross = 0;
        add_rest(d, x, count, &b->parts);
    }
}

CLONES static void one_block(const Tensor *t, int64_t at, int64_t count, Block *b, const Parts *p, const Move *m) {
    switch (t->kind) {
    case ADAMW: block_of_kind(ADAMW, t, at, count, b, p, m); break;
    case SGD: block_of_kind(SGD, t, at, count, b, p, m); break;
    case LION: block_of_kind(LION, t, at, count, b, p, m); break;
    default: block_of_kind(GRADIENT, t, at, count, b, p, m);
    }
}

static void all_blocks(const Tensor *t, int64_t at, Block *blocks, const Parts *p, const Move *m, int threads) {
    const int64_t n = t->columns;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < n; j += BLOCK)
        one_block(t, at + j, smaller(n - j, BLOCK), blocks + j / BLOCK, p, m);
}

/* A row too long for the cache, its blocks shared by all threads; d is computed again for each use, not stored. */
static void long_row(const Tensor *t, int64_t r, Block *blocks, int threads) {
    const int64_t n = t->columns, at = r * n, count = (n + BLOCK - 1) / BLOCK;
    Sums s = {0};
    all_blocks(t, at, blocks, NULL, NULL, threads);
    for (int64_t i = 0; i < count; i++) {
        const Sums b = blocks[i].sums;
        s.d += b.d, s.x += b.x, s.dx += b.dx, s.xx += b.xx, s.dd += b.dd + b.bad;
    }
    Parts p = project_row(t, r, s);
    if (p.cancels != 0) {
        all_blocks(t, at, blocks, &p, NULL, threads);
        double sq = 0, cross = 0;
        for (int64_t i = 0; i < count; i++) sq += blocks[i].parts.sq, cross += blocks[i].parts.cross;
        p.sq = (float)sq, p.cross = (float)cross;
    }
    const Move m = turn(t, p, s.dd, t->norm[r], speed_of(t, r), t->update_sq + r);
    all_blocks(t, at, blocks, &p, &m, threads);
}

static Tensor tensor_at(const int64_t *w, const double *x) {
    Tensor t = {(float *)w[0], (const float *)w[1], (float *)w[2], (float *)w[3], (float *)w[4], (float *)w[5],
                (const float *)w[6], w[7], w[8], w[9], w[10], (float)x[0], (float)x[1], (float)(1 - x[1]),
                (float)(1 / x[2]), (float)x[3], (float)x[4], (float)x[5], (float)x[6], {0}};
    for (int i = 0; i < 5; i++) t.c[i] = (float)x[7 + i];
    return t;
}

/* The step of `count` tensors, none empty: WORDS addresses and integers and NUMBERS doubles each, ordered as `Tensor`.
 * `failed` becomes 1 if memory for the work list is lacking; nothing is touched then. */
void rotational_step(int64_t count, const int64_t *words, const double *numbers, int64_t threads, int64_t *failed) {
    Tensor *tensors = malloc((size_t)(count + 1) * sizeof *tensors);
    int64_t *first_task = malloc((size_t)(count + 1) * sizeof *first_task), longest = 0;
    for (int64_t i = 0; tensors && first_task && i < count; i++) {
        tensors[i] = tensor_at(words + i * WORDS, numbers + i * NUMBERS);
        const int64_t n = tensors[i].columns, batch = 1 + (TASK - 1) / n;
        first_task[0] = 0;
        first_task[i + 1] = first_task[i] + (n > LONG_ROW ? 0 : (tensors[i].rows + batch - 1) / batch);
        longest = n > LONG_ROW && n > longest ? n : longest;
    }
    Block *blocks = malloc((size_t)(longest / BLOCK + 1) * sizeof *blocks);
    *failed = !tensors || !first_task || !blocks;
    if (*failed || count == 0) goto done;
#pragma omp parallel for num_threads((int)threads) schedule(dynamic, 1)
    for (int64_t k = 0; k < first_task[count]; k++) {
        int64_t low = 0, high = count; /* bisect for the tensor with first_task[low] <= k < first_task[low + 1] */
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            *(first_task[middle] <= k ? &low : &high) = middle;
        }
        const Tensor *t = tensors + low;
        const int64_t batch = 1 + (TASK - 1) / t->columns, r0 = (k - first_task[low]) * batch;
        some_rows(t, r0, smaller(r0 + batch, t->rows));
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t r = 0; tensors[i].columns > LONG_ROW && r < tensors[i].rows; r++)
            long_row(tensors + i, r, blocks, (int)threads);
done:
    free(tensors);
    free(first_task);
    free(blocks);
}

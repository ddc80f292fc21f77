/* Attention of queries over ranges of keys, forward and backward, tile by tile on the CPU.
 *
 * Rows come in the order of the plan: query i of one (batch, head) sees the keys begin[i] .. end[i]-1 of that order, and
 * neither bound falls along i. So a tile of queries meets one range of keys, a group of ROWS queries one range inside
 * it, and what no row of the group sees is never computed: neither scores nor their products with values.
 *
 * Every thread takes one run of queries of equal work. It packs the keys it meets (gathered, converted to float, keys
 * transposed block by block), then walks through its tiles with an online softmax (Dao et al. 2022). The backward pass
 * recomputes the weights from the log-sum-exp; gradients of queries are private to a thread, those of keys are added
 * straight into the result, except for a head that two threads share: there the later thread has a buffer of its own,
 * and the buffers are added in the order of the threads, so a given number of threads always gives the same bits.
 */
#include "rows.h"

#include <cmath>
#include <vector>

namespace {

enum { TILE = 96, BLOCK = 128 }; /* queries and keys that are handled at a time */
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;

int64_t blocks_of(int64_t k_len) { return (k_len + BLOCK - 1) / BLOCK; }

struct Call {
    int64_t batch, heads, kv_heads, q_len, k_len, dim, v_dim;
    int type;
    float scale;
    Rows q, k, v;
    const int32_t *q_order, *k_order, *k_begin, *k_end; /* (batch * heads, q_len or k_len) */
    void *out;                                          /* contiguous (B, H, Tq, Dv) */
    float *lse;                                         /* (B, H, Tq) */

    int64_t groups() const { return heads / kv_heads; }
    int64_t base(const Rows &x, int64_t n, bool of_keys) const {
        const int64_t head = n % heads;
        return n / heads * x.batch + (of_keys ? head / groups() : head) * x.head;
    }
};

/* Row i of all B * H * Tq costs its visible keys, and something of its own. */
int64_t cost(const Call &c, int64_t i) { return c.k_end[i] - c.k_begin[i] + 8; }

/* Cut all query rows into runs of equal cost, one a thread: run t is cuts[t] .. cuts[t + 1]. */
std::vector<int64_t> share(const Call &c, int threads) {
    const int64_t rows = c.batch * c.heads * c.q_len;
    int64_t total = 0, seen = 0;
    for (int64_t i = 0; i < rows; i++) total += cost(c, i);
    std::vector<int64_t> cuts(threads + 1, rows);
    cuts[0] = 0;
    int next = 1;
    for (int64_t i = 0; i < rows && next < threads; i++) {
        seen += cost(c, i);
        while (next < threads && seen >= total / threads * next) cuts[next++] = i + 1;
    }
    return cuts;
}

/* The keys first .. last-1 of one head as blocks: transposed (dim x BLOCK) and, if wanted, row by row. */
void pack(
    const Call &c, const Rows &x, int64_t n, int64_t first, int64_t last, float *transposed, float *plain
) {
    const int64_t wide = padded(x.width), base = c.base(x, n, true);
    const int32_t *order = c.k_order + n * c.k_len;
    float group[LANES * 1024];
    for (int64_t j = first / BLOCK * BLOCK; j < last; j += LANES) {
        for (int64_t r = 0; r < LANES; r++) {
            float *row = plain ? plain + (j + r) * wide : group + r * wide;
            /* keys of a neighbouring range may hold anything: they are not read at all */
            if (j + r >= first && j + r < last) read_row(x, c.type, base + order[j + r] * x.row, row);
            else memset(row, 0, wide * sizeof(float));
        }
        if (!transposed) continue;
        const float *from = plain ? plain + j * wide : group;
        float *to = transposed + j / BLOCK * BLOCK * x.width + j % BLOCK;
        for (int64_t d = 0; d < x.width; d++)
            for (int64_t r = 0; r < LANES; r++) to[d * BLOCK + r] = from[r * wide + d];
    }
}

/* The columns of a block that the rows m .. m + rows - 1 of a tile see, widened to whole vectors. */
struct Span {
    int64_t begin, end;
    Span(const int32_t *begins, const int32_t *ends, int64_t m, int64_t rows, int64_t block) {
        begin = most(begins[m] - block, 0) / LANES * LANES;
        end = least(padded(most(ends[m + rows - 1] - block, 0)), BLOCK);
        int64_t seen = 0;
        for (int64_t r = m; r < m + rows; r++) seen += ends[r] - begins[r];
        if (!seen) end = begin;
    }
    bool empty() const { return begin >= end; }
};

/* Scores of one row outside of what it sees become -inf, so that their weight is exactly 0. */
void hide(float *row, const Span &span, int64_t begin, int64_t end) {
    const int64_t lo = least(most(begin, span.begin), span.end), hi = most(least(end, span.end), lo);
    for (int64_t x = span.begin; x < lo; x++) row[x] = -INFINITY;
    for (int64_t x = hi; x < span.end; x++) row[x] = -INFINITY;
}

/* Walk through the tiles of the rows from .. until-1: `enter(n, first, last)` is called with the keys that the run meets
 * in a head before its tiles, `tile(n, i, rows)` for each tile. */
template <class Enter, class Tile>
void walk(const Call &c, int64_t from, int64_t until, Enter enter, Tile tile) {
    while (from < until) {
        const int64_t n = from / c.q_len, stop = least((n + 1) * c.q_len, until);
        enter(n, (int64_t)c.k_begin[from], (int64_t)c.k_end[stop - 1]);
        for (int64_t i = from; i < stop; i += TILE) tile(n, i, least(TILE, stop - i));
        from = stop;
    }
}

/* The queries of a tile, times scale * log2(e): scores then are exponents of 2. What sees nothing is not read. */
void read_queries(const Call &c, int64_t n, int64_t i, int64_t rows, float *q) {
    const int64_t wide = padded(c.dim), base = c.base(c.q, n, false);
    const float factor = c.scale * LOG2E;
    for (int64_t m = 0; m < rows; m++) {
        float *row = q + m * wide;
        if (c.k_begin[i + m] >= c.k_end[i + m]) {
            memset(row, 0, wide * sizeof(float));
            continue;
        }
        read_row(c.q, c.type, base + c.q_order[i + m] * c.q.row, row);
        for (int64_t x = 0; x < wide; x += LANES) store(row + x, load(row + x) * factor);
    }
}

struct Forward {
    const Call &c;
    int64_t wide = padded(c.dim), v_wide = padded(c.v_dim), keys = blocks_of(c.k_len) * BLOCK;
    float *kt, *values, *q, *o, *s;
    float highest[TILE], total[TILE];

    static int64_t floats(const Call &c) {
        const int64_t wide = padded(c.dim), v_wide = padded(c.v_dim);
        return blocks_of(c.k_len) * BLOCK * (c.dim + v_wide) + TILE * (wide + v_wide + BLOCK);
    }

    Forward(const Call &call, float *scratch) : c(call) {
        kt = scratch;
        values = kt + keys * c.dim;
        q = values + keys * v_wide;
        o = q + TILE * wide;
        s = o + TILE * v_wide;
    }

    void enter(int64_t n, int64_t first, int64_t last) {
        pack(c, c.k, n, first, last, kt, nullptr);
        pack(c, c.v, n, first, last, nullptr, values);
    }

    /* Turn one row of scores into weights; the output and the sum so far shrink when a new maximum is found. */
    void soften(int64_t r, const Span &span) {
        float *row = s + r * BLOCK;
        vec top = all(-INFINITY), sum = {};
        for (int64_t x = span.begin; x < span.end; x += LANES) {
            const vec y = load(row + x);
            top = y > top ? y : top;
        }
        const float peak = max_of(top);
        if (peak > highest[r]) {
            if (total[r] > 0) {
                const float shrink = exp2f(highest[r] - peak);
                total[r] *= shrink;
                for (int64_t x = 0; x < v_wide; x += LANES)
                    store(o + r * v_wide + x, load(o + r * v_wide + x) * shrink);
            }
            highest[r] = peak;
        }
        const float shift = highest[r] == -INFINITY ? 0 : highest[r];
        for (int64_t x = span.begin; x < span.end; x += LANES) {
            const vec p = exp2_of(load(row + x) - shift);
            store(row + x, p);
            sum += p;
        }
        total[r] += sum_of(sum);
    }

    void tile(int64_t n, int64_t i, int64_t rows) {
        const int32_t *order = c.q_order + i, *begins = c.k_begin + i, *ends = c.k_end + i;
        read_queries(c, n, i, rows, q);
        memset(o, 0, rows * v_wide * sizeof(float));
        for (int64_t m = 0; m < rows; m++) highest[m] = -INFINITY, total[m] = 0;
        for (int64_t j = begins[0] / BLOCK * BLOCK; j < ends[rows - 1]; j += BLOCK) {
            for (int64_t m = 0; m < rows; m += ROWS) {
                const int64_t count = least(ROWS, rows - m);
                const Span span(begins, ends, m, count, j);
                if (span.empty()) continue;
                product(count, c.dim, q + m * wide, wide, 1, kt + j * c.dim, BLOCK, {s, BLOCK, nullptr}, m, span.begin,
                        span.end, false);
                for (int64_t r = m; r < m + count; r++) {
                    hide(s + r * BLOCK, span, begins[r] - j, ends[r] - j);
                    soften(r, span);
                }
                product(count, span.end - span.begin, s + m * BLOCK + span.begin, BLOCK, 1,
                        values + (j + span.begin) * v_wide, v_wide, {o, v_wide, nullptr}, m, 0, v_wide, true);
            }
        }
        for (int64_t m = 0; m < rows; m++) {
            const int64_t place = n * c.q_len + order[m];
            const bool alive = begins[m] < ends[m];
            float *row = o + m * v_wide;
            if (alive)
                for (int64_t x = 0; x < v_wide; x += LANES) store(row + x, load(row + x) / total[m]);
            else
                memset(row, 0, v_wide * sizeof(float)); // 0 times a NaN that others in the tile see is no 0
            write_row(c.out, c.type, place * c.v_dim, c.v_dim, row);
            c.lse[place] = alive ? (highest[m] + log2f(total[m])) * LN2 : INFINITY;
        }
    }
};

struct Gradients {
    Rows grad;
    void *dq;       /* contiguous (B, H, Tq, D) */
    float *dk, *dv; /* zeros, (B, Hk, Tk, padded D) and (B, Hk, Tk, padded Dv) */
};

struct Backward {
    const Call &c;
    const Gradients &to;
    int64_t wide = padded(c.dim), v_wide = padded(c.v_dim), keys = blocks_of(c.k_len) * BLOCK;
    int64_t shared; /* a head of keys that an earlier run writes to as well, or -1 */
    float *own;     /* this run's gradients of that head */
    float *kt, *kr, *vt, *q, *g, *dq, *p, *ds;
    float level[TILE], delta[TILE];

    static int64_t owned(const Call &c) { return c.k_len * (padded(c.dim) + padded(c.v_dim)); }
    static int64_t floats(const Call &c) {
        const int64_t wide = padded(c.dim), v_wide = padded(c.v_dim);
        return blocks_of(c.k_len) * BLOCK * (c.dim + wide + c.v_dim) + TILE * (2 * wide + v_wide + 2 * BLOCK) + v_wide;
    }

    Backward(const Call &call, const Gradients &gradients, int64_t shared_head, float *buffer, float *scratch)
        : c(call), to(gradients), shared(shared_head), own(buffer) {
        kt = scratch;
        kr = kt + keys * c.dim;
        vt = kr + keys * wide;
        q = vt + keys * c.v_dim;
        g = q + TILE * wide;
        dq = g + TILE * v_wide;
        p = dq + TILE * wide;
        ds = p + TILE * BLOCK;
        if (shared >= 0) memset(own, 0, owned(c) * sizeof(float));
    }

    void enter(int64_t n, int64_t first, int64_t last) {
        pack(c, c.k, n, first, last, kt, kr);
        pack(c, c.v, n, first, last, vt, nullptr);
    }

    void read(int64_t n, int64_t i, int64_t rows) {
        read_queries(c, n, i, rows, q);
        const Rows made = {c.out, 0, 0, c.v_dim, c.v_dim};
        float *o = ds + TILE * BLOCK;
        for (int64_t m = 0; m < rows; m++) {
            const int64_t place = n * c.q_len + c.q_order[i + m];
            float *row = g + m * v_wide;
            if (c.k_begin[i + m] >= c.k_end[i + m]) {
                memset(row, 0, v_wide * sizeof(float));
                delta[m] = 0, level[m] = INFINITY;
                continue;
            }
            read_row(to.grad, c.type, c.base(to.grad, n, false) + c.q_order[i + m] * to.grad.row, row);
            read_row(made, c.type, place * c.v_dim, o);
            vec sum = {};
            for (int64_t x = 0; x < v_wide; x += LANES) sum += load(o + x) * load(row + x);
            delta[m] = sum_of(sum);
            level[m] = c.lse[place] * LOG2E;
        }
    }

    /* Weights and gradients of the scores (times ln 2, as the queries carry log2(e)) of one row. */
    void differentiate(int64_t r, const Span &span) {
        float *weights = p + r * BLOCK, *slopes = ds + r * BLOCK;
        for (int64_t x = span.begin; x < span.end; x += LANES) {
            const vec y = exp2_of(load(weights + x) - level[r]);
            store(weights + x, y);
            store(slopes + x, y * (load(slopes + x) - delta[r]) * LN2);
        }
    }

    void tile(int64_t n, int64_t i, int64_t rows) {
        const int32_t *begins = c.k_begin + i, *ends = c.k_end + i;
        read(n, i, rows);
        memset(dq, 0, rows * wide * sizeof(float));
        for (int64_t j = begins[0] / BLOCK * BLOCK; j < ends[rows - 1]; j += BLOCK) {
            for (int64_t m = 0; m < rows; m += ROWS) queries(i, j, m, least(ROWS, rows - m));
            keys_of(n, i, j, rows);
        }
        for (int64_t m = 0; m < rows; m++) {
            float *row = dq + m * wide;
            if (begins[m] < ends[m])
                for (int64_t x = 0; x < wide; x += LANES) store(row + x, load(row + x) * (c.scale * LOG2E));
            else
                memset(row, 0, wide * sizeof(float));
            write_row(to.dq, c.type, (n * c.q_len + c.q_order[i + m]) * c.dim, c.dim, row);
        }
    }

    /* Scores, their gradients and the gradients of a group of queries on one block of keys. */
    void queries(int64_t i, int64_t j, int64_t m, int64_t count) {
        const int32_t *begins = c.k_begin + i, *ends = c.k_end + i;
        const Span span(begins, ends, m, count, j);
        if (span.begin > 0 || span.end < BLOCK) { /* the keys' sums below run over whole columns */
            memset(p + m * BLOCK, 0, count * BLOCK * sizeof(float));
            memset(ds + m * BLOCK, 0, count * BLOCK * sizeof(float));
        }
        if (span.empty()) return;
        product(count, c.dim, q + m * wide, wide, 1, kt + j * c.dim, BLOCK, {p, BLOCK, nullptr}, m, span.begin,
                span.end, false);
        product(count, c.v_dim, g + m * v_wide, v_wide, 1, vt + j * c.v_dim, BLOCK, {ds, BLOCK, nullptr}, m,
                span.begin, span.end, false);
        for (int64_t r = m; r < m + count; r++) {
            hide(p + r * BLOCK, span, begins[r] - j, ends[r] - j);
            differentiate(r, span);
        }
        product(count, span.end - span.begin, ds + m * BLOCK + span.begin, BLOCK, 1, kr + (j + span.begin) * wide, wide,
                {dq, wide, nullptr}, m, 0, wide, true);
    }

    /* Gradients of a block of keys and values: groups of keys, each over the queries that see any of them. */
    void keys_of(int64_t n, int64_t i, int64_t j, int64_t rows) {
        const int32_t *begins = c.k_begin + i, *ends = c.k_end + i, *order = c.k_order + n * c.k_len + j;
        const int64_t head = n / c.heads * c.kv_heads + n % c.heads / c.groups();
        const bool mine = head == shared;
        float *dk = mine ? own : to.dk + head * c.k_len * wide;
        float *dv = mine ? own + c.k_len * wide : to.dv + head * c.k_len * v_wide;
        const int64_t stop = least(ends[rows - 1] - j, BLOCK);
        int64_t first = 0, last = 0;
        for (int64_t x = most(begins[0] - j, 0); x < stop; x += ROWS) {
            const int64_t count = least(ROWS, stop - x);
            while (first < rows && ends[first] <= j + x) first++;
            while (last < rows && begins[last] < j + x + count) last++;
            if (first >= last) continue;
            product(count, last - first, p + first * BLOCK + x, 1, BLOCK, g + first * v_wide, v_wide,
                    {dv, v_wide, order}, x, 0, v_wide, true);
            product(count, last - first, ds + first * BLOCK + x, 1, BLOCK, q + first * wide, wide, {dk, wide, order}, x,
                    0, wide, true);
        }
    }
};

enum { SIZES = 9, STRIDES = 12 };

Call read_call(const int64_t *sizes, float scale, void *const *data) {
    const int64_t *strides = sizes + SIZES;
    Call c{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], (int)sizes[7], scale};
    c.q = {data[0], strides[0], strides[1], strides[2], c.dim};
    c.k = {data[1], strides[3], strides[4], strides[5], c.dim};
    c.v = {data[2], strides[6], strides[7], strides[8], c.v_dim};
    c.q_order = (const int32_t *)data[3], c.k_order = (const int32_t *)data[4];
    c.k_begin = (const int32_t *)data[5], c.k_end = (const int32_t *)data[6];
    c.out = data[7], c.lse = (float *)data[8];
    return c;
}

} // namespace

extern "C" {

/* Floats of scratch, forward and backward. */
void attention_scratch(const int64_t *sizes, int64_t *floats) {
    void *none[9] = {};
    const Call c = read_call(sizes, 1, none);
    const int64_t threads = sizes[8];
    floats[0] = threads * padded(Forward::floats(c));
    floats[1] = threads * padded(Backward::floats(c)) + (threads - 1) * Backward::owned(c);
}

/* sizes: B, H, Hk, Tq, Tk, D, Dv, type, threads, then the strides of q, k, v and the output's gradient;
 * data: q, k, v, q_order, k_order, k_begin, k_end, out, lse. */
void attention_forward(const int64_t *sizes, float scale, void *const *data, float *scratch) {
    const Call c = read_call(sizes, scale, data);
    const int threads = sizes[8];
    const auto cuts = share(c, threads);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int t = 0; t < threads; t++) {
        Forward run(c, scratch + t * padded(Forward::floats(c)));
        walk(c, cuts[t], cuts[t + 1], [&](auto... a) { run.enter(a...); }, [&](auto... a) { run.tile(a...); });
    }
}

/* As above, and data: gradient of the output, dq, dk, dv (float zeros, rows padded to whole vectors). */
void attention_backward(const int64_t *sizes, float scale, void *const *data, float *scratch) {
    const Call c = read_call(sizes, scale, data);
    const int64_t *strides = sizes + SIZES + 9;
    const Gradients to{{data[9], strides[0], strides[1], strides[2], c.v_dim}, data[10], (float *)data[11],
                       (float *)data[12]};
    const int threads = sizes[8];
    const auto cuts = share(c, threads);
    const int64_t floats = padded(Backward::floats(c)), wide = padded(c.dim), v_wide = padded(c.v_dim);
    const int64_t rows_of_head = c.q_len * c.groups();
    std::vector<int64_t> shared(threads);
    /* the first run shares with nobody before it */
    const auto buffer = [&](int t) { return t ? scratch + threads * floats + (t - 1) * Backward::owned(c) : nullptr; };
    for (int t = 0; t < threads; t++)
        shared[t] = cuts[t] < cuts[t + 1] && cuts[t] % rows_of_head ? cuts[t] / rows_of_head : -1;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int t = 0; t < threads; t++) {
        Backward run(c, to, shared[t], buffer(t), scratch + t * floats);
        walk(c, cuts[t], cuts[t + 1], [&](auto... a) { run.enter(a...); }, [&](auto... a) { run.tile(a...); });
    }
    for (int t = 0; t < threads; t++) {
        if (shared[t] < 0) continue;
        const float *own = buffer(t);
        float *dk = to.dk + shared[t] * c.k_len * wide, *dv = to.dv + shared[t] * c.k_len * v_wide;
        for (int64_t x = 0; x < c.k_len * wide; x++) dk[x] += own[x];
        for (int64_t x = 0; x < c.k_len * v_wide; x++) dv[x] += own[c.k_len * wide + x];
    }
}

/* `times` products of a tile (TILE x 64) with a block of keys (64 x BLOCK), for the bench's floor: the rate at which this
 * processor multiplies matrices that lie in its nearest cache. memory: TILE * 64 + 64 * BLOCK + TILE * BLOCK floats. */
void attention_products(float *memory, const int64_t *times) {
    float *a = memory, *b = a + TILE * 64, *c = b + 64 * BLOCK;
    for (int64_t t = 0; t < *times; t++)
        for (int64_t m = 0; m < TILE; m += ROWS)
            product(ROWS, 64, a + m * 64, 64, 1, b, BLOCK, {c, BLOCK, nullptr}, m, 0, BLOCK, false);
}

/* How many floats a vector has. */
void attention_lanes(int64_t *lanes) { *lanes = LANES; }
}

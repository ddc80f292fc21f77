/* The matrix product in piecewise affine arithmetic and its exact derivative, equal to reference.py bit for bit.
 *
 * Both have one shape: rows of X (M, D) and panels of columns of Y (D, W) are combined over D. The product has X = A
 * and Y = B. The derivative with respect to A has X = grad, Y = B^T, and needs A where it writes. Panels are copied,
 * the rows of X only where they are not contiguous; the ranges found on the way say which tile of tiles.h will do.
 */
#include "tiles.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

/* A matrix of patterns with any strides (in elements). */
struct Matrix {
    const int32_t *data;
    int64_t row, column;
    Matrix from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
};

/* What magnitudes are there: the smallest normal one (or MAX), the largest, and is any below the normal ones. */
struct Range {
    int32_t low = INT32_MAX, high = 0, zero = 0;
};

static inline ivec shuffled(ivec a, ivec b, ivec index) {
#if defined(__clang__)
    ivec y;
    for (int i = 0; i < LANES; i++) y[i] = index[i] < LANES ? a[index[i]] : b[index[i] - LANES];
    return y;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

struct Scan {
    ivec high = {}, zero = {};
    uvec low = ~(uvec){};
    void add(ivec x) {
        const ivec size = x & ABS, above = size - MIN;
        const uvec unsigned_above = (uvec)above; /* magnitudes below MIN become the largest here */
        low = low < unsigned_above ? low : unsigned_above;
        high = most(high, size);
        zero |= above;
    }
    Range range() const {
        uvec least = low;
        ivec highest = high, found = zero, lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma GCC unroll 4
        for (int half = LANES / 2; half > 0; half >>= 1) {
            const uvec other = (uvec)shuffled((ivec)least, (ivec)least, lane ^ half);
            least = least < other ? least : other;
            highest = most(highest, shuffled(highest, highest, lane ^ half));
            found |= shuffled(found, found, lane ^ half);
        }
        const bool any_normal = least[0] <= (uint32_t)(INT32_MAX - MIN);
        return {any_normal ? (int32_t)least[0] + MIN : INT32_MAX, highest[0], found[0] < 0};
    }
};

static inline int64_t padded(int64_t n) { return (n + LANES - 1) & -(int64_t)LANES; }
static inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
static inline int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }

static inline ivec part_of(const int32_t *x, int64_t n) { return (ivec)load_part((const float *)x, n, 1.0f); }

/* Rows become columns: log2 LANES perfect shuffles. */
static inline void transpose(ivec (&x)[LANES]) {
    ivec low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = (i >> 1) + (i & 1 ? LANES : 0);
        high[i] = low[i] + LANES / 2;
    }
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step += step) {
        ivec y[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = shuffled(x[i], x[i + LANES / 2], low);
            y[2 * i + 1] = shuffled(x[i], x[i + LANES / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

/* Copy rows x columns of a matrix into contiguous rows of `step`; what pads the last vector is normal. */
static void copy(Matrix x, int64_t rows, int64_t columns, int32_t *to, int64_t step) {
    if (x.column == 1) {
        for (int64_t i = 0; i < rows; i++, to += step) {
            const int32_t *from = x.data + i * x.row;
            int64_t j = 0;
            for (; j + LANES <= columns; j += LANES) store(to + j, load(from + j));
            if (j < columns) store(to + j, part_of(from + j, columns - j));
        }
    } else if (x.row == 1) {
        for (int64_t j = 0; j < columns; j += LANES)
            for (int64_t i = 0; i < rows; i += LANES) {
                ivec block[LANES];
                const int64_t count = fewer(LANES, rows - i);
                const int32_t *from = x.data + i + j * x.column;
                for (int l = 0; l < LANES; l++) {
                    block[l] = count == LANES ? load(from) : part_of(from, count);
                    from += j + l + 1 < columns ? x.column : 0;
                }
                transpose(block);
                if (count == LANES)
                    for (int l = 0; l < LANES; l++) store(to + (i + l) * step + j, block[l]);
                else
                    for (int64_t l = 0; l < count; l++) store(to + (i + l) * step + j, block[l]);
            }
    } else {
        for (int64_t i = 0; i < rows; i++, to += step)
            for (int64_t j = 0; j < padded(columns); j++) to[j] = x.data[i * x.row + fewer(j, columns - 1) * x.column];
    }
}

static Range range_of_rows(Matrix x, int64_t rows, int64_t columns) {
    Scan scan;
    for (int64_t i = 0; i < rows; i++) {
        const int32_t *from = x.data + i * x.row;
        int64_t j = 0;
        for (; j + LANES <= columns; j += LANES) scan.add(load(from + j));
        if (j < columns) scan.add(part_of(from + j, columns - j));
    }
    return scan.range();
}

/* One problem, as Python packs it. */
struct Numbers {
    const int32_t *x, *y, *a; /* operands; a only in the derivative */
    float *out;               /* (batch, rows, width), contiguous */
    int32_t *scratch;
    int64_t batch, rows, depth, width;
    int64_t x_strides[3], y_strides[3], a_strides[3]; /* batch, row, column */
    int64_t shift, derivative, threads;
};

/* Rows of X that share a range: these, or more until they hold so many entries. Products that are worth a thread. */
enum { GROUP = 24, GROUP_WORK = 4096, WORKER_WORK = 1 << 19 };

/* How a problem is cut. */
struct Plan {
    int64_t panels, wide, panel_size, group, groups, x_step;
    bool copy_x, together; /* together: the threads share one item of the batch at a time, else each takes its own */
    int64_t workers, shared, own, total;
};

static Plan plan_of(const Numbers &t) {
    Plan s;
    const int64_t vectors = up(t.width, LANES);
    s.panels = up(vectors, PANEL);
    s.wide = s.panels ? up(vectors, s.panels) * LANES : 0; /* of nearly equal width: 3 + 2 rather than 4 + 1 */
    s.panel_size = t.depth * s.wide;
    s.group = t.derivative ? 2 * GROUP : GROUP;
    while (s.group < t.rows && s.group * t.depth < GROUP_WORK) s.group += s.group;
    s.groups = up(t.rows, s.group);
    if (s.groups) s.group = up(t.rows, s.groups); /* of nearly equal height, for threads */
    s.copy_x = t.x_strides[2] != 1 && t.depth > 1;
    s.x_step = padded(t.depth);
    s.workers = fewer(t.threads, 1 + t.batch * t.rows * t.depth * t.width / WORKER_WORK);
    s.together = t.batch < 4 * s.workers && t.batch % s.workers != 0;
    s.shared = s.panels * s.panel_size + (s.copy_x ? t.rows * s.x_step : 0) + (s.panels + s.groups) * 4;
    s.shared = (s.shared + 15) & -16;
    /* thresholds: of a panel of Y in the product, of a group of X in the derivative */
    s.own = t.derivative ? fewer(s.group, t.rows) * s.x_step : s.panel_size;
    s.own = (s.own + 15) & -16;
    s.total = s.together ? s.shared + s.workers * s.own : s.workers * (s.shared + s.own);
    return s;
}

/* An item of the batch and its memory. */
struct Item {
    const Numbers &t;
    const Plan &s;
    Matrix x, y, a;
    float *out;
    int32_t *panels, *copied, *limits;
    Range *x_ranges, *y_ranges;

    Item(const Numbers &t, const Plan &s, int32_t *shared, int32_t *own) : t(t), s(s), limits(own) {
        panels = shared;
        copied = panels + s.panels * s.panel_size;
        x_ranges = (Range *)(copied + (s.copy_x ? t.rows * s.x_step : 0));
        y_ranges = x_ranges + s.groups;
    }
    void at(int64_t n) {
        x = {t.x + n * t.x_strides[0], t.x_strides[1], t.x_strides[2]};
        y = {t.y + n * t.y_strides[0], t.y_strides[1], t.y_strides[2]};
        a = {t.a + n * t.a_strides[0], t.a_strides[1], t.a_strides[2]};
        out = t.out + n * t.rows * t.width;
    }
    int32_t bias() const { return BIAS - (int32_t)t.shift; }
    int64_t columns(int64_t panel) const { return fewer(s.wide, t.width - panel * s.wide); }
    int64_t rows(int64_t group) const { return fewer(s.group, t.rows - group * s.group); }

    void pack_panel(int64_t panel) {
        const int64_t count = columns(panel), size = t.depth * padded(count);
        int32_t *to = panels + panel * s.panel_size;
        copy(y.from(0, panel * s.wide), t.depth, count, to, padded(count));
        Scan scan;
        for (int64_t i = 0; i < size; i += LANES) {
            ivec value = load(to + i);
            scan.add(value);
            if (t.derivative) value &= (value & INF) != 0;
            store(to + i, minus(value, all(bias())));
        }
        y_ranges[panel] = scan.range();
    }
    Matrix rows_of(int64_t group) const {
        if (!s.copy_x) return x.from(group * s.group, 0);
        return {copied + group * s.group * s.x_step, s.x_step, 1};
    }
    void pack(int64_t rank, int64_t team) {
        for (int64_t i = rank; i < s.panels; i += team) pack_panel(i);
        const int64_t first = s.groups * rank / team, last = s.groups * (rank + 1) / team;
        if (s.copy_x && first < last) {
            /* all at once: whole lines of a transposed matrix */
            const int64_t row = first * s.group, count = fewer(last * s.group, t.rows) - row;
            copy(x.from(row, 0), count, t.depth, copied + row * s.x_step, s.x_step);
        }
        for (int64_t i = first; i < last; i++) x_ranges[i] = range_of_rows(rows_of(i), rows(i), t.depth);
    }
    int kind_of_product(const Range &left, const Range &right) const {
        const int64_t excess = bias();
        if (left.high >= INF || right.high >= INF || left.high - excess + right.high >= INF) return GUARDED;
        if (left.low - excess + right.low < MIN) return SMALL;
        if (left.zero && right.zero) return LANES == 16 ? BOTH : SMALL;
        return left.zero ? LEFT : right.zero ? RIGHT : PLAIN;
    }
    /* limits: magnitudes that an x must have to count, for each y of a panel */
    void find_limits(int64_t panel) {
        const int32_t *from = panels + panel * s.panel_size;
        for (int64_t i = 0; i < t.depth * padded(columns(panel)); i += LANES) {
            const ivec size = plus(load(from + i), all(bias())) & ABS;
            store(limits + i, select(size < MIN, all(INT32_MAX), most(all(MIN), MIN + bias() - size)));
        }
    }
    int kind_of_derivative(const Range &left, const Range &right) const {
        /* the slope of y has at most one exponent more than y, and as many less as a shift below 1 takes */
        const int64_t more = MIN + (t.shift > 0 ? t.shift : 0), less = t.shift < 0 ? MIN : 0;
        const int64_t most = right.high + more, lowest = (int64_t)right.low - less;
        if (left.high >= INF || most >= INF || left.high - BIAS + most >= INF) return GUARDED;
        if (lowest < MIN + MIN || left.low - BIAS + lowest - MIN < MIN) return SMALL;
        return left.zero || right.zero ? BOTH : PLAIN;
    }
    /* limits: magnitudes that a slope must have to count, for each x of a group */
    void find_slope_limits(int64_t group) {
        const Matrix from = rows_of(group);
        for (int64_t i = 0; i < rows(group); i++)
            for (int64_t j = 0; j < t.depth; j += LANES) {
                const int32_t *at = from.data + i * from.row + j;
                const ivec size = (j + LANES <= t.depth ? load(at) : part_of(at, t.depth - j)) & ABS;
                const ivec limit = select(size < MIN, all(INT32_MAX), most(all(MIN), MIN + BIAS - size));
                store(limits + i * s.x_step + j, limit);
            }
    }
    void differentiate(int64_t rank, int64_t team) {
        const int64_t units = s.panels * s.groups;
        int64_t known = -1;
        for (int64_t unit = units * rank / team; unit < units * (rank + 1) / team; unit++) {
            const int64_t group = unit / s.panels, panel = unit - group * s.panels, width = columns(panel);
            const Matrix left = rows_of(group);
            const int kind = kind_of_derivative(x_ranges[group], y_ranges[panel]);
            if (known != group && kind == SMALL) {
                find_slope_limits(group);
                known = group;
            }
            for (int64_t i = 0, count; i < rows(group); i += count) {
                int32_t factors[MOST_ROWS * PANEL * LANES];
                const int64_t m = group * s.group + i, remaining = rows(group) - i;
                count = remaining / up(remaining, SLOPE_ROWS[up(width, LANES) - 1]);
                copy(a.from(m, panel * s.wide), count, width, factors, PANEL * LANES);
                Scan scan;
                for (int64_t l = 0; l < count; l++)
                    for (int64_t j = 0; j < padded(width); j += LANES) scan.add(load(factors + l * PANEL * LANES + j));
                const Derivative tile = {
                    t.depth, left.data + i * left.row, left.row, limits + i * s.x_step, s.x_step, factors,
                    panels + panel * s.panel_size, bias(), out + m * t.width + panel * s.wide, t.width, width};
                const int own_kind = scan.range().high > INF ? GUARDED : kind;
                derivative_block<PANEL>(own_kind, tile, count);
            }
        }
    }
    void multiply(int64_t rank, int64_t team) {
        const int64_t units = s.panels * s.groups;
        int64_t known = -1;
        for (int64_t unit = units * rank / team; unit < units * (rank + 1) / team; unit++) {
            const int64_t panel = unit / s.groups, group = unit - panel * s.groups;
            const Matrix left = rows_of(group);
            const int kind = kind_of_product(x_ranges[group], y_ranges[panel]);
            if (known != panel && (kind == RIGHT || kind == BOTH || kind == SMALL)) {
                find_limits(panel);
                known = panel;
            }
            float *to = out + group * s.group * t.width + panel * s.wide;
            const Product tile = {t.depth, left.data, left.row, panels + panel * s.panel_size, limits,
                                  bias(), to, t.width, columns(panel)};
            product_block<PANEL>(kind, tile, rows(group));
        }
    }
};

static void run(const Numbers &t, const Plan &s, int64_t rank, int64_t team) {
    if (s.together) {
        Item item(t, s, t.scratch, t.scratch + s.shared + rank * s.own);
        for (int64_t n = 0; n < t.batch; n++) {
            item.at(n);
            item.pack(rank, team);
#pragma omp barrier
            t.derivative ? item.differentiate(rank, team) : item.multiply(rank, team);
#pragma omp barrier
        }
    } else {
        int32_t *memory = t.scratch + rank * (s.shared + s.own);
        Item item(t, s, memory, memory + s.shared);
        for (int64_t n = t.batch * rank / team; n < t.batch * (rank + 1) / team; n++) {
            item.at(n);
            item.pack(0, 1);
            t.derivative ? item.differentiate(0, 1) : item.multiply(0, 1);
        }
    }
}

extern "C" void matmul_scratch(const void *numbers, int64_t *words) {
    *words = plan_of(*(const Numbers *)numbers).total;
}

extern "C" void matmul_run(const void *numbers) {
    const Numbers &t = *(const Numbers *)numbers;
    const Plan s = plan_of(t);
#if defined(_OPENMP)
    if (s.workers > 1) {
#pragma omp parallel num_threads(s.workers)
        run(t, s, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    run(t, s, 0, 1);
}

/* The piecewise affine primitives on whole tensors, equal to reference.py bit for bit.
 *
 * The result is contiguous. Operands may have any strides: an operand that is not contiguous along the innermost
 * dimension (a scalar, a column, a transposed matrix) is gathered a block at a time into a buffer that stays in the
 * first-level cache, so that no broadcast operand is ever written out.
 */
#include <algorithm>

#include "light.h"

enum Operation { MUL, DIV, SLOPE, MUL_GRAD, DIV_GRAD, EXP2, EXP2_GRAD, LOG2, LOG2_GRAD, SQRT, SQRT_GRAD };

enum { MOST_DIMS = 8, BLOCK = 512, BATCH = 4, ONE_THREAD = 32768 };

/* Sizes and strides in elements, outermost dimension first; dims = 0 stands for contiguous operands. */
struct Numbers {
    int32_t *out;
    const int32_t *operands[3];
    int64_t operation, shift, threads, count, dims;
    int64_t sizes[MOST_DIMS], strides[3][MOST_DIMS];
};

/* One operation on up to three patterns; those that it does not have repeat the first. */
template <int operation> static inline ivec one(ivec a, ivec b, ivec c, int32_t shift) {
    if (operation == MUL) return pam_mul(a, b, shift);
    if (operation == DIV) return pam_div(a, b, shift);
    if (operation == SLOPE) return pam_slope(a, b, shift);
    if (operation == MUL_GRAD) return pam_mul_grad(a, b, c, shift);
    if (operation == DIV_GRAD) return pam_div_grad(a, b, c, shift);
    if (operation == EXP2) return (ivec)pam_exp2((vec)a);
    if (operation == EXP2_GRAD) return pam_exp2_grad(a, (vec)b);
    if (operation == LOG2) return (ivec)pam_log2((vec)a);
    if (operation == LOG2_GRAD) return pam_log2_grad(a, (vec)b);
    if (operation == SQRT) return pam_sqrt(a);
    return pam_sqrt_grad(a, b);
}

/* The same without guards, for the operations that have such a form. */
template <int operation> static inline ivec light_one(ivec a, ivec b, ivec c, int32_t shift) {
    if (operation == MUL) return Light::mul(a, b, shift);
    if (operation == DIV) return Light::div(a, b, shift);
    if (operation == MUL_GRAD) return Light::mul(a, Light::slope(b, c, shift), 0);
    if (operation == DIV_GRAD) return Light::div_grad(a, b, c, shift);
    if (operation == EXP2) return (ivec)Light::exp2((vec)a);
    return Light::mul(a, (ivec)Light::exp2(quick_floor((vec)b)), 0);
}
constexpr bool has_light(int operation) {
    return operation == MUL || operation == DIV || operation == MUL_GRAD || operation == DIV_GRAD ||
           operation == EXP2 || operation == EXP2_GRAD;
}

/* What a batch spans, lane by lane: the largest magnitude of each operand, the smallest of the last one, and the
 * largest number in it. */
struct Range {
    ivec a, b, c, low, top;
};

/* May a magnitude up to m reach infinity when `add` is added? */
static inline ivec overflows(ivec m, ivec add) { return m >= INF - most(add, (ivec){}); }

/* Where the form without guards could go wrong. */
template <int operation> static inline ivec unsafe(const Range &r, int32_t shift) {
    const ivec inverse = BIAS - shift - r.low;
    if (operation == MUL) return (r.b >= INF) | overflows(r.a, r.b - (BIAS - shift));
    if (operation == DIV) return (r.b >= INF) | (r.low < MIN) | overflows(r.a, inverse);
    if (operation == MUL_GRAD) {
        /* a slope has at most one exponent more than c */
        const ivec up = all(MIN + (shift > 0 ? shift : 0)), slope = plus(r.c, up);
        return (r.b >= INF) | overflows(r.c, up) | overflows(r.a, slope - BIAS);
    }
    if (operation == DIV_GRAD) {
        const ivec y = plus(r.b, inverse), up = BIAS + MIN - r.low, slope = plus(y, up);
        return (r.c >= INF) | (r.low < MIN) | overflows(r.b, inverse) | overflows(y, up) | overflows(r.a, slope - BIAS);
    }
    if (operation == EXP2) return (r.a > INF) | (r.top >= BIAS + 6 * MIN); /* 64 */
    return (r.b > INF) | (r.top >= BIAS + 5 * MIN) | (r.a >= BIAS + 64 * MIN);
}

/* Whole batches from the first entry on without guards; returns how many entries are done. It stops before a batch that
 * needs them. */
template <int operation>
static inline int64_t light_part(int32_t *out, const int32_t *a, const int32_t *b, const int32_t *c, int64_t n,
                                 int32_t shift) {
    int64_t i = 0;
    for (; i + BATCH * LANES <= n; i += BATCH * LANES) {
        ivec x[BATCH], y[BATCH], z[BATCH];
        Range range = {{}, {}, {}, all(ABS), all(SIGN)};
        for (int j = 0; j < BATCH; j++) {
            const int64_t at = i + j * LANES;
            x[j] = load(a + at), y[j] = load(b + at), z[j] = load(c + at);
            range.a = most(range.a, x[j] & ABS), range.b = most(range.b, y[j] & ABS);
            range.c = most(range.c, z[j] & ABS);
            range.low = least(range.low, z[j] & ABS), range.top = most(range.top, z[j]);
        }
        if (any_of(unsafe<operation>(range, shift))) return i;
        for (int j = 0; j < BATCH; j++) store(out + i + j * LANES, light_one<operation>(x[j], y[j], z[j], shift));
    }
    return i;
}

template <int operation>
static void contiguous(int32_t *out, const int32_t *a, const int32_t *b, const int32_t *c, int64_t n, int32_t shift) {
    const bool light = has_light(operation);
    for (int64_t i = 0; i < n;) {
        if (light) i += light_part<operation>(out + i, a + i, b + i, c + i, n - i, shift);
        /* what stopped it is one batch, or entries too few for one */
        const int64_t end = light && i + BATCH * LANES < n ? i + BATCH * LANES : n;
        for (; i + LANES <= end; i += LANES)
            store(out + i, one<operation>(load(a + i), load(b + i), load(c + i), shift));
        if (i == end) continue;
        const ivec x = (ivec)load_part((const float *)a + i, end - i, 0.0f);
        const ivec y = (ivec)load_part((const float *)b + i, end - i, 0.0f);
        const ivec z = (ivec)load_part((const float *)c + i, end - i, 0.0f);
        store_part((float *)out + i, end - i, (vec)one<operation>(x, y, z, shift));
        i = end;
    }
}

typedef void Run(int32_t *, const int32_t *, const int32_t *, const int32_t *, int64_t, int32_t);
static Run *const RUNS[] = {contiguous<MUL>,       contiguous<DIV>,       contiguous<SLOPE>,    contiguous<MUL_GRAD>,
                            contiguous<DIV_GRAD>,  contiguous<EXP2>,      contiguous<EXP2_GRAD>, contiguous<LOG2>,
                            contiguous<LOG2_GRAD>, contiguous<SQRT>,      contiguous<SQRT_GRAD>};

/* Dimensions of size 1 dropped, and those joined that every operand walks through with one stride. */
static void join(Numbers &numbers) {
    int64_t kept = 0;
    for (int64_t d = 0; d < numbers.dims; d++) {
        const int64_t size = numbers.sizes[d];
        if (size == 1) continue;
        bool joins = kept > 0;
        for (int k = 0; k < 3; k++) joins &= kept > 0 && numbers.strides[k][kept - 1] == numbers.strides[k][d] * size;
        if (!joins) numbers.sizes[kept++] = 1;
        numbers.sizes[kept - 1] *= size;
        for (int k = 0; k < 3; k++) numbers.strides[k][kept - 1] = numbers.strides[k][d];
    }
    if (!kept) {
        numbers.sizes[kept++] = 1;
        for (int k = 0; k < 3; k++) numbers.strides[k][0] = 1;
    }
    numbers.dims = kept;
}

/* `rows` rows of `width` entries one after the other. Writes up to LANES - 1 entries past the end. */
static void gather(int32_t *to, const int32_t *from, int64_t rows, int64_t width, int64_t row_step, int64_t step) {
    for (int64_t row = 0; row < rows; row++, to += width, from += row_step) {
        if (step == 0) {
            const ivec value = all(*from);
            for (int64_t i = 0; i < width; i += LANES) store(to + i, value);
        } else if (step == 1) {
            int64_t i = 0;
            for (; i + LANES <= width; i += LANES) store(to + i, load(from + i));
            if (i < width) store((float *)to + i, load_part((const float *)from + i, width - i, 0.0f));
        } else {
            for (int64_t i = 0; i < width; i++) to[i] = from[i * step];
        }
    }
}

/* Entries [start, end) of the result in tiles: a part of a row, or several rows where they are short. */
static void strided(const Numbers &numbers, int64_t start, int64_t end) {
    int32_t gathered[3][BLOCK + LANES];
    const int32_t *from[3] = {};
    int64_t held[3] = {};
    const int64_t inner = numbers.dims - 1, width = numbers.sizes[inner];
    int64_t at[MOST_DIMS], rest = start;
    for (int64_t d = inner; d >= 0; d--) at[d] = rest % numbers.sizes[d], rest /= numbers.sizes[d];
    while (start < end) {
        int64_t n = std::min(width - at[inner], end - start), rows = 1;
        const bool short_rows = inner > 0 && n == width && 2 * width <= BLOCK;
        if (short_rows)
            rows = std::min({BLOCK / width, numbers.sizes[inner - 1] - at[inner - 1], (end - start) / width});
        for (int k = 0; k < 3; k++)
            if (numbers.strides[k][inner] != 1) n = std::min(n, (int64_t)BLOCK);
        const int32_t *x[3];
        for (int k = 0; k < 3; k++) {
            const int64_t *const strides = numbers.strides[k], step = strides[inner];
            const int64_t row_step = inner > 0 ? strides[inner - 1] : 0;
            x[k] = numbers.operands[k];
            for (int64_t d = 0; d <= inner; d++) x[k] += at[d] * strides[d];
            if (step == 1 && (rows == 1 || row_step == width)) continue;
            /* what starts at one place is the same every time, so that broadcast operands are gathered once */
            if (from[k] != x[k] || held[k] < n * rows) {
                gather(gathered[k], x[k], rows, n, row_step, step);
                from[k] = x[k], held[k] = n * rows;
            }
            x[k] = gathered[k];
        }
        RUNS[numbers.operation](numbers.out + start, x[0], x[1], x[2], n * rows, (int32_t)numbers.shift);
        start += n * rows, at[inner] += n;
        if (at[inner] < width || inner == 0) continue;
        at[inner] = 0, at[inner - 1] += rows;
        for (int64_t d = inner - 1; d > 0 && at[d] == numbers.sizes[d]; d--) at[d] = 0, at[d - 1]++;
    }
}

extern "C" void elementwise_run(const Numbers *given) {
    const int64_t count = given->count, threads = count > ONE_THREAD ? given->threads : 1;
    Run *const run = RUNS[given->operation];
    const int32_t *const *x = given->operands;
    const int32_t shift = (int32_t)given->shift;
    if (given->dims == 0 && threads == 1) return run(given->out, x[0], x[1], x[2], count, shift);
    Numbers numbers = *given;
    if (given->dims) join(numbers);
    const int64_t width = numbers.dims ? numbers.sizes[numbers.dims - 1] : 1; /* rows are better not cut */
    const int64_t share = ((count + width - 1) / width + threads - 1) / threads * width;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++) {
        const int64_t start = t * share, end = std::min(start + share, count);
        if (start >= end) continue;
        if (numbers.dims) strided(numbers, start, end);
        else run(numbers.out + start, x[0] + start, x[1] + start, x[2] + start, end - start, shift);
    }
}

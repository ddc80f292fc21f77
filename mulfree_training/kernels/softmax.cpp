/* Softmax and log-softmax along rows, forward and backward, equal to formulas.py over reference.py bit for bit.
 *
 * A row is first tried with the light arithmetic. Where it holds NaN, an infinity other than -inf, nothing but -inf, or
 * values so large that a product might overflow, the guarded one starts the row again.
 */
#include "rows.h"

static const float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f, INFINITE = __builtin_inff();
static const int32_t LARGE = BIAS + 40 * MIN; /* 2^40: sums and products of smaller numbers are finite here */

static inline ivec bits(vec x) { return (ivec)x; }
static inline ivec bits(float x) { return (ivec)all(x); }

/* PAM(x, log2 e), and -inf for -inf. In the light arithmetic what overflows and NaN become infinite. */
static inline vec scaled(Guarded, vec x, const Guarded::Factor &log2e) {
    return select(x == -INFINITE, all(-INFINITE), (vec)Guarded::times(bits(x), log2e));
}
static inline vec scaled(Light, vec x, const Light::Factor &log2e) {
    const ivec m = bits(x) & ABS, size = least(plus(m, log2e.add), all(INF));
    return (vec)(select(m >= log2e.least, size, (ivec){}) | (bits(x) & SIGN));
}

template <class Unit> struct Softmax {
    typedef typename Unit::Factor Factor;
    static constexpr bool LIGHT = Unit::LIGHT;
    const int32_t shift;
    const Factor log2e, ln2;
    /* What _powers in formulas.py finds; the same in all lanes. */
    vec top, total;

    explicit Softmax(int64_t shift)
        : shift((int32_t)shift), log2e(Unit::by(bits(LOG2E), shift)), ln2(Unit::by(bits(LN2), shift)) {}

    /* Fills e; false where this arithmetic must not be used. */
    bool powers(const float *x, float *e, int64_t n) {
        ivec seen = {};
        vec highest = all(-INFINITE);
        along(n, [&](int64_t i, auto at) {
            const vec value = at.load(x + i, -INFINITE), u = scaled(Unit(), value, log2e);
            seen = most(seen, bits(value) & ABS);
            highest = Unit::larger(highest, u);
            store(e + i, u);
        });
        highest = largest_in_all<Unit>(highest);
        if (LIGHT && (any_of(seen > INF) || !(highest[0] > -INFINITE && highest[0] < 1e12f))) return false;
        top = quick_floor(highest);
        top = select(top == -INFINITE, (vec){}, top);
        RunningSums sums = {};
        along(n, [&](int64_t i, auto at) {
            const vec power = Unit::exp2(load(e + i) - top);
            store(e + i, power);
            add_at(sums, i, at.keep(power));
        });
        total = total_in_all(sums);
        return true;
    }

    /* From the gradient of e to that of x, exactly. */
    ivec exactly_back(ivec grad, vec x) const {
        const vec u = scaled(Unit(), x, log2e);
        const ivec of_u = Unit::mul(grad, (ivec)Unit::exp2(quick_floor(u - top)), 0);
        return Unit::mul(of_u, Unit::slope(bits(x), bits(LOG2E), shift), 0);
    }

    bool forward(const float *x, float *out, float *e, int64_t n) {
        if (!powers(x, e, n)) return false;
        const Factor share = Unit::over(bits(total), shift);
        const ivec some = total != 0;
        along(n, [&](int64_t i, auto at) {
            const ivec y = Unit::times(bits(load(e + i)), share);
            at.store(out + i, (vec)(LIGHT ? y : y & some));
        });
        return true;
    }

    template <bool exact> bool backward(const float *grad, const float *x, float *out, float *e, int64_t n) {
        if (!powers(x, e, n)) return false;
        const ivec inverse = Unit::times(bits(1.0f), Unit::over(bits(total), shift));
        const Factor share = Unit::over(bits(total), shift), twice = Unit::then(share, share);
        const Factor power = Unit::over(Unit::power(bits(total)), 0), by_inverse = Unit::by(inverse, shift);
        ivec seen = {};
        RunningSums sums = {};
        along(n, [&](int64_t i, auto at) {
            const ivec g = bits(at.load(grad + i, 0.0f)), own = bits(load(e + i));
            seen = most(seen, g & ABS);
            const ivec factor = exact ? Unit::times(Unit::power(Unit::times(own, share)), power) : Unit::times(own, twice);
            add_at(sums, i, at.keep((vec)(Unit::mul(g, factor, exact ? 0 : shift) ^ SIGN)));
        });
        if (LIGHT && any_of(seen >= LARGE)) return false;
        const vec whole = total_in_all(sums);
        const ivec some = total != 0;
        along(n, [&](int64_t i, auto at) {
            const vec value = at.load(x + i, -INFINITE);
            const ivec g = bits(at.load(grad + i, 0.0f)), own = bits(load(e + i));
            const ivec direct = exact ? Unit::mul(g, Unit::slope(own, inverse, 0), 0) : Unit::times(g, by_inverse);
            const ivec of_e = bits((vec)direct + whole);
            const ivec gx = exact ? exactly_back(of_e, value) : Unit::mul(Unit::times(own, ln2), of_e, shift, log2e);
            at.store(out + i, (vec)(gx & (LIGHT ? value != -INFINITE : (value != -INFINITE) & some)));
        });
        return true;
    }

    bool log_forward(const float *x, float *out, float *e, int64_t n) {
        if (!powers(x, e, n)) return false;
        const vec y = (vec)Unit::times(bits(top + pam_log2(total)), Unit::over(bits(LOG2E), shift));
        along(n, [&](int64_t i, auto at) { at.store(out + i, at.load(x + i, 0.0f) - y); });
        return true;
    }

    template <bool exact>
    bool log_backward(const float *grad, const float *x, float *out, float *e, int64_t n, bool exact_log2) {
        if (!powers(x, e, n)) return false;
        RunningSums sums = {};
        along(n, [&](int64_t i, auto at) { add_at(sums, i, at.load(grad + i, 0.0f)); });
        const ivec g = bits(total_in_all(sums)) ^ SIGN;
        if (LIGHT && any_of((g & ABS) >= LARGE)) return false;
        const ivec inverse = Unit::times(bits(1.0f), Unit::over(bits(LOG2E), shift));
        const ivec of_bits = exact ? Unit::mul(g, Unit::slope(bits(top + pam_log2(total)), inverse, 0), 0)
                                   : Unit::mul(inverse, g, shift);
        const ivec of_sum = exact || exact_log2 ? pam_log2_grad(of_bits, total)
                                                : Unit::div(Unit::div(of_bits, bits(total), shift), bits(LN2), shift);
        const Factor factor = Unit::then(Unit::then(ln2, Unit::by(of_sum, shift)), log2e);
        along(n, [&](int64_t i, auto at) {
            const vec value = at.load(x + i, -INFINITE);
            const ivec through = exact ? exactly_back(of_sum, value) : Unit::times(bits(load(e + i)), factor);
            const vec gx = at.load(grad + i, 0.0f) + (vec)through;
            at.store(out + i, (vec)(bits(gx) & (value != -INFINITE)));
        });
        return true;
    }
};

/* Rows of one function: run(unit, row, buffer) says whether the unit's arithmetic did. */
template <class F> static inline void rows_of(const Rows &r, F run) {
    /* the light arithmetic takes it that a product with log2 e never has a smaller pattern */
    const bool light = bits(LOG2E)[0] - BIAS + r.shift >= 0;
    Softmax<Light> quick(r.shift);
    Softmax<Guarded> careful(r.shift);
    each_row(r, [=](int64_t i, float *buffer) mutable {
        if (!light || !run(quick, i, buffer)) run(careful, i, buffer);
    });
}

extern "C" void softmax_run(const Rows *given) {
    const Rows &r = *given;
    rows_of(r, [&r](auto &unit, int64_t i, float *e) { return unit.forward(r.x + i * r.x_step, r.out + i * r.n, e, r.n); });
}

extern "C" void log_softmax_run(const Rows *given) {
    const Rows &r = *given;
    rows_of(r, [&r](auto &unit, int64_t i, float *e) {
        return unit.log_forward(r.x + i * r.x_step, r.out + i * r.n, e, r.n);
    });
}

template <bool exact> static void backward(const Rows &r) {
    rows_of(r, [&r](auto &unit, int64_t i, float *e) {
        const float *grad = r.grad + i * r.grad_step, *x = r.x + i * r.x_step;
        return unit.template backward<exact>(grad, x, r.out + i * r.n, e, r.n);
    });
}

template <bool exact> static void log_backward(const Rows &r) {
    rows_of(r, [&r](auto &unit, int64_t i, float *e) {
        const float *grad = r.grad + i * r.grad_step, *x = r.x + i * r.x_step;
        return unit.template log_backward<exact>(grad, x, r.out + i * r.n, e, r.n, r.exact_log2 != 0);
    });
}

extern "C" void softmax_grad_run(const Rows *r) { r->exact ? backward<true>(*r) : backward<false>(*r); }
extern "C" void log_softmax_grad_run(const Rows *r) { r->exact ? log_backward<true>(*r) : log_backward<false>(*r); }

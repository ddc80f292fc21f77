/* Softmax and log-softmax along rows, forward and backward, equal to formulas.py over reference.py bit for bit.
 *
 * A group of rows is first tried with the light arithmetic. Where it holds NaN, an infinity other than -inf, or values
 * so large that a product might overflow, the guarded one starts again.
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

/* A group of rows, which is worked on in passes; each function returns false where this arithmetic must not be used. */
template <class Unit> struct Group {
    typedef typename Unit::Factor Factor;
    const Rows &r;
    const int64_t n, first, count, width;
    float *const buffer; /* e */
    const int32_t shift;
    const Factor log2e, ln2;
    /* What _powers in formulas.py finds, a row in each lane. */
    alignas(4 * LANES) vec top, total;

    Group(const Rows &r, int64_t first, int64_t count, float *buffer)
        : r(r), n(r.n), first(first), count(count), width(padded(r.n)), buffer(buffer), shift((int32_t)r.shift),
          log2e(Unit::by(bits(LOG2E), shift)), ln2(Unit::by(bits(LN2), shift)) {}

    const float *x(int64_t k) const { return r.x + (first + k) * r.x_step; }
    const float *grad(int64_t k) const { return r.grad + (first + k) * r.grad_step; }
    float *out(int64_t k) const { return r.out + (first + k) * n; }

    bool powers() {
        alignas(4 * LANES) vec each[LANES] = {};
        ivec seen = {};
        const Factor log2e = this->log2e; /* the compiler takes it that a store could change a member */
        for (int64_t k = 0; k < count; k++) {
            vec highest = all(-INFINITE);
            const float *from = x(k);
            float *e = buffer + k * width;
            along(n, [&](int64_t i, auto at) {
                const vec value = at.load(from + i, -INFINITE), u = scaled(Unit(), value, log2e);
                seen = most(seen, bits(value) & ABS);
                highest = Unit::larger(highest, u);
                store(e + i, u);
            });
            each[k] = highest;
        }
        top = quick_floor(folded(each, [](vec a, vec b) { return Unit::larger(a, b); }));
        if (Unit::LIGHT && any_of((seen > INF) | (top >= 1e12f))) return false;
        top = select(top == -INFINITE, (vec){}, top);
        for (int64_t k = 0; k < count; k++) {
            RunningSums sums = {};
            const vec own_top = in_all(top, k);
            float *e = buffer + k * width;
            along(n, [&](int64_t i, auto at) {
                const vec power = Unit::exp2(load(e + i) - own_top);
                store(e + i, power);
                add_at(sums, i, at.keep(power));
            });
            each[k] = gathered(sums);
        }
        total = summed(each);
        return true;
    }

    /* The sum is 0 in a row of nothing but -inf, where e is 0 and so is what comes from e over the sum. */
    ivec divisor() const { return bits(select(total == 0, all(1.0f), total)); }

    /* From the gradient of e to that of x, exactly. */
    ivec exactly_back(ivec grad, vec x, vec own_top, const Factor &log2e) const {
        const vec u = scaled(Unit(), x, log2e);
        const ivec of_u = Unit::mul(grad, (ivec)Unit::exp2(quick_floor(u - own_top)), 0);
        return Unit::mul(of_u, Unit::slope(bits(x), bits(LOG2E), shift), 0);
    }

    bool softmax() {
        if (!powers()) return false;
        const Factor shares = Unit::over(divisor(), shift);
        for (int64_t k = 0; k < count; k++) {
            const Factor share = Unit::lane(shares, k);
            const float *e = buffer + k * width;
            float *to = out(k);
            along(n, [&](int64_t i, auto at) { at.store(to + i, (vec)Unit::times(bits(load(e + i)), share)); });
        }
        return true;
    }

    template <bool exact> bool softmax_grad() {
        if (!powers()) return false;
        const int32_t shift = this->shift;
        const ivec sum = divisor(), inverses = pam_div(bits(1.0f), sum, shift);
        const Factor shares = Unit::over(sum, shift), twices = Unit::then(shares, shares);
        const Factor by_powers = Unit::over(pam_power(sum), 0), by_inverses = Unit::by(inverses, shift);
        alignas(4 * LANES) vec each[LANES] = {};
        ivec seen = {};
        for (int64_t k = 0; k < count; k++) {
            RunningSums sums = {};
            const Factor share = Unit::lane(shares, k), twice = Unit::lane(twices, k), power = Unit::lane(by_powers, k);
            const float *from = grad(k), *e = buffer + k * width;
            along(n, [&](int64_t i, auto at) {
                const ivec g = bits(at.load(from + i, 0.0f)), own = bits(load(e + i));
                seen = most(seen, g & ABS);
                const auto y = exact ? Unit::right(Unit::power(Unit::times(own, share)), power, 0)
                                     : Unit::right(own, twice, shift);
                add_at(sums, i, at.keep((vec)(Unit::mul(g, y) ^ SIGN)));
            });
            each[k] = gathered(sums);
        }
        if (Unit::LIGHT && any_of(seen >= LARGE)) return false;
        const vec wholes = summed(each);
        const ivec some = total != 0;
        const Factor ln2 = this->ln2, log2e = this->log2e;
        for (int64_t k = 0; k < count; k++) {
            const Factor by_inverse = Unit::lane(by_inverses, k);
            const ivec inverse = in_all(inverses, k), not_empty = in_all(some, k);
            const vec whole = in_all(wholes, k), own_top = in_all(top, k);
            const float *from = x(k), *down = grad(k), *e = buffer + k * width;
            float *to = out(k);
            along(n, [&](int64_t i, auto at) {
                const vec value = at.load(from + i, -INFINITE);
                const ivec g = bits(at.load(down + i, 0.0f)), own = bits(load(e + i));
                const ivec direct = exact ? Unit::mul(g, Unit::slope(own, inverse, 0), 0) : Unit::times(g, by_inverse);
                const ivec of_e = bits((vec)direct + whole);
                const ivec gx = exact ? exactly_back(of_e, value, own_top, log2e)
                                      : Unit::mul(of_e, Unit::right(own, ln2, shift), log2e);
                at.store(to + i, (vec)(gx & (value != -INFINITE) & not_empty));
            });
        }
        return true;
    }

    bool log_softmax() {
        if (!powers()) return false;
        const vec means = (vec)pam_div(bits(top + pam_log2(total)), bits(LOG2E), shift);
        for (int64_t k = 0; k < count; k++) {
            const vec mean = in_all(means, k);
            const float *from = x(k);
            float *to = out(k);
            along(n, [&](int64_t i, auto at) { at.store(to + i, at.load(from + i, 0.0f) - mean); });
        }
        return true;
    }

    /* The gradient of every row's sum of e. */
    template <bool exact> ivec of_sums(ivec grads) const {
        const ivec c = bits(LOG2E), inverse = pam_div(bits(1.0f), c, shift);
        const ivec of_bits = exact ? pam_mul_grad(grads, bits(top + pam_log2(total)), inverse, 0)
                                   : pam_mul(inverse, grads, shift);
        if (exact || r.exact_log2) return pam_log2_grad(of_bits, total);
        return pam_div(pam_div(of_bits, bits(total), shift), bits(LN2), shift);
    }

    template <bool exact> bool log_softmax_grad() {
        if (!powers()) return false;
        const int32_t shift = this->shift;
        alignas(4 * LANES) vec each[LANES] = {};
        for (int64_t k = 0; k < count; k++) {
            RunningSums sums = {};
            const float *from = grad(k);
            along(n, [&](int64_t i, auto at) { add_at(sums, i, at.load(from + i, 0.0f)); });
            each[k] = gathered(sums);
        }
        const ivec of_all = of_sums<exact>(bits(summed(each)) ^ SIGN);
        if (Unit::LIGHT && any_of(((of_all & ABS) >= LARGE) & below(count))) return false;
        const Factor ln2 = this->ln2, log2e = this->log2e;
        for (int64_t k = 0; k < count; k++) {
            const ivec of_sum = in_all(of_all, k);
            const auto factor = Unit::right(of_sum, shift);
            const vec own_top = in_all(top, k);
            const float *from = x(k), *down = grad(k), *e = buffer + k * width;
            float *to = out(k);
            along(n, [&](int64_t i, auto at) {
                const vec value = at.load(from + i, -INFINITE);
                const ivec back = exact ? exactly_back(of_sum, value, own_top, log2e)
                                        : Unit::mul(Unit::times(bits(load(e + i)), ln2), factor, log2e);
                at.store(to + i, (vec)(bits(at.load(down + i, 0.0f) + (vec)back) & (value != -INFINITE)));
            });
        }
        return true;
    }
};

/* All groups by run(group), first with the light arithmetic. */
template <class F> static inline void groups_of(const Rows &r, F run) {
    /* there a product with log2 e must not have a smaller pattern */
    const bool light = bits(LOG2E)[0] - BIAS + r.shift >= 0;
    each_group(r, [&r, run, light](int64_t first, int64_t count, float *const *buffers) {
        Group<Light> quick(r, first, count, buffers[0]);
        if (light && run(quick)) return;
        Group<Guarded> careful(r, first, count, buffers[0]);
        run(careful);
    });
}

extern "C" void softmax_run(const Rows *r) {
    groups_of(*r, [](auto &group) { return group.softmax(); });
}
extern "C" void softmax_grad_run(const Rows *r) {
    if (r->exact) groups_of(*r, [](auto &group) { return group.template softmax_grad<true>(); });
    else groups_of(*r, [](auto &group) { return group.template softmax_grad<false>(); });
}
extern "C" void log_softmax_run(const Rows *r) {
    groups_of(*r, [](auto &group) { return group.log_softmax(); });
}
extern "C" void log_softmax_grad_run(const Rows *r) {
    if (r->exact) groups_of(*r, [](auto &group) { return group.template log_softmax_grad<true>(); });
    else groups_of(*r, [](auto &group) { return group.template log_softmax_grad<false>(); });
}

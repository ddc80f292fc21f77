/* Layer norm along rows, forward and backward, equal to formulas.py over reference.py bit for bit.
 *
 * A row is first tried with the light arithmetic, for which inputs, gradient and weight must be below 2^20 and the
 * deviation between 2^-12 and 2^40; then all products and sums are finite in rows of up to 2^20 entries. Otherwise the
 * guarded arithmetic starts the row again.
 */
#include "rows.h"

static const int32_t LARGE = BIAS + 20 * MIN;
static const int64_t LONG = 1 << 20;

static inline ivec bits(vec x) { return (ivec)x; }
static inline ivec bits(float x) { return (ivec)all(x); }

template <class Unit> struct Norm {
    typedef typename Unit::Factor Factor;
    static constexpr bool LIGHT = Unit::LIGHT;
    const int32_t shift;
    const int64_t n;
    const float eps;
    const Factor over_n;
    /* Parts of the norm, the same in all lanes; z is in the first buffer. */
    vec total, squares, variance;
    ivec d;
    Factor over_d;

    explicit Norm(const Rows &r)
        : shift((int32_t)r.shift), n(r.n), eps((float)r.eps), over_n(Unit::over(bits((float)r.n), (int32_t)r.shift)) {}

    /* Fills z, zeros after its end; false where this arithmetic must not be used. */
    bool deviations(const float *x, float *z) {
        ivec seen = {};
        RunningSums sums = {};
        along(n, [&](int64_t i, auto at) {
            const vec value = at.load(x + i, 0.0f);
            seen = most(seen, bits(value) & ABS);
            add_at(sums, i, value);
        });
        if (LIGHT && any_of(seen >= LARGE)) return false;
        total = total_in_all(sums);
        const vec mean = (vec)Unit::times(bits(total), over_n);
        sums = {};
        along(n, [&](int64_t i, auto at) {
            const vec value = at.keep(at.load(x + i, 0.0f) - mean);
            store(z + i, value);
            add_at(sums, i, (vec)Unit::mul(bits(value), bits(value), shift));
        });
        squares = total_in_all(sums);
        variance = (vec)Unit::times(bits(squares), over_n) + eps;
        d = LIGHT ? Unit::sqrt(bits(variance)) : pam_sqrt(bits(variance));
        if (LIGHT && any_of((d < BIAS - 12 * MIN) | (d > BIAS + 40 * MIN))) return false;
        over_d = Unit::over(d, shift);
        return true;
    }

    bool forward(const float *x, const float *weight, const float *bias, float *out, float *z) {
        if (!deviations(x, z)) return false;
        along(n, [&](int64_t i, auto at) {
            ivec y = Unit::times(bits(load(z + i)), over_d);
            if (weight) y = Unit::mul(y, bits(at.load(weight + i, 0.0f)), shift);
            at.store(out + i, bias ? (vec)y + at.load(bias + i, 0.0f) : (vec)y);
        });
        return true;
    }

    /* The gradient after the weight. */
    template <bool exact> ivec after(ivec grad, ivec h, ivec w) const {
        return exact ? Unit::mul(grad, Unit::slope(h, w, shift), 0) : Unit::mul(grad, w, shift);
    }

    template <bool exact>
    bool backward(const float *grad, const float *x, const float *weight, float *out, float *weight_out, float *z) {
        if (!deviations(x, z)) return false;
        float *const gz = z + padded(n);
        const Factor twice = Unit::then(over_d, over_d), power = Unit::over(Unit::power(d), 0);
        ivec seen = {};
        RunningSums sums = {};
        along(n, [&](int64_t i, auto at) {
            const ivec own = bits(load(z + i)), h = Unit::times(own, over_d);
            ivec g = bits(at.load(grad + i, 0.0f));
            seen = most(seen, g & ABS);
            if (weight) {
                const ivec w = bits(at.load(weight + i, 0.0f));
                const ivec gw = exact ? Unit::mul(g, Unit::slope(w, h, shift), 0) : Unit::mul(g, h, shift);
                at.store(weight_out + i, (vec)gw);
                g = after<exact>(g, h, w);
            }
            store(gz + i, (vec)g);
            const ivec factor = exact ? Unit::times(Unit::power(h), power) : Unit::times(own, twice);
            add_at(sums, i, at.keep((vec)(Unit::mul(g, factor, exact ? 0 : shift) ^ SIGN)));
        });
        if (LIGHT && any_of(seen >= LARGE)) return false;
        const ivec gd = bits(total_in_all(sums)), per_n = Unit::times(bits(1.0f), over_n);
        const ivec inverse = Unit::times(bits(1.0f), over_d), half = bits(0.5f);
        ivec g_squares;
        if (exact) g_squares = pam_mul_grad(pam_sqrt_grad(gd, bits(variance)), bits(squares), per_n, 0);
        else g_squares = Unit::mul(per_n, Unit::times(Unit::mul(gd, half, 0), over_d), shift);
        if (LIGHT && any_of((g_squares & ABS) >= BIAS + 80 * MIN)) return false;
        const Factor by_squares = Unit::by(g_squares, shift), by_inverse = Unit::by(inverse, shift);
        sums = {};
        along(n, [&](int64_t i, auto at) {
            const ivec own = bits(load(z + i)), g = bits(load(gz + i));
            const ivec straight = exact ? Unit::mul(g, Unit::slope(own, inverse, 0), 0) : Unit::times(g, by_inverse);
            const vec round = (vec)(exact ? Unit::mul(g_squares, Unit::slope(own, own, shift), 0) : Unit::times(own, by_squares));
            const vec both = (vec)straight + (round + round);
            store(gz + i, both);
            add_at(sums, i, at.keep(both));
        });
        const ivec g_mean = bits(total_in_all(sums)) ^ SIGN;
        const vec of_mean = (vec)(exact ? Unit::mul(g_mean, Unit::slope(bits(total), per_n, 0), 0) : Unit::mul(per_n, g_mean, shift));
        along(n, [&](int64_t i, auto at) { at.store(out + i, load(gz + i) + of_mean); });
        return true;
    }
};

static bool is_small(const float *x, int64_t n) {
    ivec seen = {};
    if (x) along(n, [&](int64_t i, auto at) { seen = most(seen, bits(at.load(x + i, 0.0f)) & ABS); });
    return !any_of(seen >= LARGE);
}

template <class F> static inline void rows_of(const Rows &r, F run) {
    const bool light = r.n <= LONG && is_small(r.weight, r.n);
    Norm<Light> quick(r);
    Norm<Guarded> careful(r);
    each_row(r, [=](int64_t i, float *buffer) mutable {
        if (!light || !run(quick, i, buffer)) run(careful, i, buffer);
    });
}

extern "C" void layer_norm_run(const Rows *given) {
    const Rows &r = *given;
    rows_of(r, [&r](auto &unit, int64_t i, float *buffer) {
        return unit.forward(r.x + i * r.x_step, r.weight, r.bias, r.out + i * r.n, buffer);
    });
}

template <bool exact> static void backward(const Rows &r) {
    rows_of(r, [&r](auto &unit, int64_t i, float *buffer) {
        const float *grad = r.grad + i * r.grad_step, *x = r.x + i * r.x_step;
        float *weight_out = r.weight ? r.weight_out + i * r.n : nullptr;
        return unit.template backward<exact>(grad, x, r.weight, r.out + i * r.n, weight_out, buffer);
    });
}

extern "C" void layer_norm_grad_run(const Rows *r) { r->exact ? backward<true>(*r) : backward<false>(*r); }

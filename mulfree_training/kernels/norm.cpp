/* Layer norm along rows, forward and backward, equal to formulas.py over reference.py bit for bit.
 *
 * A group of rows is first tried with the light arithmetic, for which inputs, gradient and weight must be below 2^20
 * and the deviation between 2^-12 and 2^40: all products and sums are finite then in rows of up to 2^20 entries.
 * Otherwise the guarded arithmetic starts again.
 */
#include "rows.h"

static const int32_t LARGE = BIAS + 20 * MIN;
static const int64_t LONG = 1 << 20;

static inline ivec bits(vec x) { return (ivec)x; }
static inline ivec bits(float x) { return (ivec)all(x); }

/* A group of rows, which is worked on in passes; each function returns false where this arithmetic must not be used. */
template <class Unit> struct Group {
    typedef typename Unit::Factor Factor;
    const Rows &r;
    const int64_t n, first, count, width;
    float *const *const buffers; /* z, and the gradients of its entries */
    const int32_t shift;
    const ivec length, inside;
    /* What _normed in formulas.py finds, a row in each lane. */
    alignas(4 * LANES) vec total, squares, variance;
    alignas(4 * LANES) ivec d;
    Factor over_d;

    Group(const Rows &r, int64_t first, int64_t count, float *const *buffers)
        : r(r), n(r.n), first(first), count(count), width(padded(r.n)), buffers(buffers), shift((int32_t)r.shift),
          length(bits((float)r.n)), inside(below(count)) {}

    const float *x(int64_t k) const { return r.x + (first + k) * r.x_step; }
    const float *grad(int64_t k) const { return r.grad + (first + k) * r.grad_step; }
    float *out(int64_t k) const { return r.out + (first + k) * n; }

    /* Fills z. */
    bool deviations() {
        alignas(4 * LANES) vec each[LANES] = {};
        ivec seen = {};
        const int32_t shift = this->shift; /* the compiler takes it that a store could change a member */
        for (int64_t k = 0; k < count; k++) {
            RunningSums sums = {};
            const float *from = x(k);
            along(n, [&](int64_t i, auto at) {
                const vec value = at.load(from + i, 0.0f);
                seen = most(seen, bits(value) & ABS);
                add_at(sums, i, value);
            });
            each[k] = gathered(sums);
        }
        if (Unit::LIGHT && any_of(seen >= LARGE)) return false;
        total = summed(each);
        const vec means = (vec)pam_div(bits(total), length, shift);
        for (int64_t k = 0; k < count; k++) {
            RunningSums sums = {};
            const vec mean = in_all(means, k);
            const float *from = x(k);
            float *z = buffers[0] + k * width;
            along(n, [&](int64_t i, auto at) {
                const vec value = at.load(from + i, 0.0f) - mean;
                store(z + i, value);
                add_at(sums, i, at.keep((vec)Unit::square(bits(value), shift)));
            });
            each[k] = gathered(sums);
        }
        squares = summed(each);
        variance = (vec)pam_div(bits(squares), length, shift) + (float)r.eps;
        d = pam_sqrt(bits(variance));
        if (Unit::LIGHT && any_of(((d < BIAS - 12 * MIN) | (d > BIAS + 40 * MIN)) & inside)) return false;
        over_d = Unit::over(d, shift);
        return true;
    }

    template <bool weighted> bool layer_norm() {
        if (!deviations()) return false;
        const int32_t shift = this->shift;
        const float *const weight = r.weight, *const bias = r.bias;
        for (int64_t k = 0; k < count; k++) {
            const Factor share = Unit::lane(over_d, k);
            const float *z = buffers[0] + k * width;
            float *to = out(k);
            along(n, [&](int64_t i, auto at) {
                ivec y = Unit::times(bits(load(z + i)), share);
                if (weighted) y = Unit::mul(y, bits(at.load(weight + i, 0.0f)), shift);
                at.store(to + i, bias ? (vec)y + at.load(bias + i, 0.0f) : (vec)y);
            });
        }
        return true;
    }

    /* Up to the gradients of the deviations: the gradients after the weight go to the second buffer. */
    template <bool exact, bool weighted> ivec of_deviations(ivec &largest) {
        alignas(4 * LANES) vec each[LANES] = {};
        ivec seen = {};
        const int32_t shift = this->shift;
        const float *const weight = r.weight;
        const Factor twices = Unit::then(over_d, over_d), by_powers = Unit::over(pam_power(d), 0);
        for (int64_t k = 0; k < count; k++) {
            RunningSums sums = {};
            const Factor share = Unit::lane(over_d, k), twice = Unit::lane(twices, k), power = Unit::lane(by_powers, k);
            const float *from = grad(k), *z = buffers[0] + k * width;
            float *of_h = buffers[1] + k * width, *to = weighted ? r.weight_out + (first + k) * n : nullptr;
            along(n, [&](int64_t i, auto at) {
                const ivec own = bits(load(z + i)), h = Unit::times(own, share);
                ivec g = bits(at.load(from + i, 0.0f));
                seen = most(seen, g & ABS);
                if (weighted) {
                    const ivec w = bits(at.load(weight + i, 0.0f));
                    const auto to_w = exact ? Unit::right(Unit::slope(w, h, shift), 0) : Unit::right(own, share, shift);
                    at.store(to + i, (vec)Unit::mul(g, to_w));
                    g = Unit::mul(g, exact ? Unit::right(Unit::slope(h, w, shift), 0) : Unit::right(w, shift));
                }
                store(of_h + i, (vec)g);
                const auto to_d = exact ? Unit::right(Unit::power(h), power, 0) : Unit::right(own, twice, shift);
                add_at(sums, i, at.keep((vec)(Unit::mul(g, to_d) ^ SIGN)));
            });
            each[k] = gathered(sums);
        }
        largest = seen;
        return bits(summed(each));
    }

    template <bool exact, bool weighted> bool layer_norm_grad() {
        if (!deviations()) return false;
        const int32_t shift = this->shift;
        ivec largest;
        const ivec of_d = of_deviations<exact, weighted>(largest);
        if (Unit::LIGHT && any_of(largest >= LARGE)) return false;
        const ivec per_n = pam_div(bits(1.0f), length, shift), inverses = pam_div(bits(1.0f), d, shift);
        const ivec of_variance = exact ? pam_sqrt_grad(of_d, bits(variance))
                                       : pam_div(pam_mul(of_d, bits(0.5f), 0), d, shift);
        const ivec of_squares = exact ? pam_mul_grad(of_variance, bits(squares), per_n, 0)
                                      : pam_mul(per_n, of_variance, shift);
        if (Unit::LIGHT && any_of(((of_squares & ABS) >= BIAS + 80 * MIN) & inside)) return false;
        const Factor by_inverses = Unit::by(inverses, shift);
        alignas(4 * LANES) vec each[LANES] = {};
        for (int64_t k = 0; k < count; k++) {
            RunningSums sums = {};
            const Factor by_inverse = Unit::lane(by_inverses, k);
            const ivec square = in_all(of_squares, k), inverse = in_all(inverses, k);
            const auto by_square = Unit::right(square, shift);
            const float *z = buffers[0] + k * width;
            float *of_z = buffers[1] + k * width;
            along(n, [&](int64_t i, auto at) {
                const ivec own = bits(load(z + i)), g = bits(load(of_z + i));
                const ivec direct = exact ? Unit::mul(g, Unit::slope(own, inverse, 0), 0) : Unit::times(g, by_inverse);
                const vec half = (vec)(exact ? Unit::mul(square, Unit::slope(own, own, shift), 0)
                                             : Unit::mul(own, by_square));
                const vec both = (vec)direct + (half + half);
                store(of_z + i, both);
                add_at(sums, i, at.keep(both));
            });
            each[k] = gathered(sums);
        }
        const ivec of_mean = bits(summed(each)) ^ SIGN;
        const vec of_all = (vec)(exact ? pam_mul_grad(of_mean, bits(total), per_n, 0) : pam_mul(per_n, of_mean, shift));
        for (int64_t k = 0; k < count; k++) {
            const vec own = in_all(of_all, k);
            const float *of_z = buffers[1] + k * width;
            float *to = out(k);
            along(n, [&](int64_t i, auto at) { at.store(to + i, load(of_z + i) + own); });
        }
        return true;
    }
};

/* All groups by run(group), first with the light arithmetic. */
template <class F> static inline void groups_of(const Rows &r, F run) {
    ivec seen = {};
    if (r.weight) along(r.n, [&](int64_t i, auto at) { seen = most(seen, bits(at.load(r.weight + i, 0.0f)) & ABS); });
    const bool light = r.n <= LONG && !any_of(seen >= LARGE);
    each_group(r, [&r, run, light](int64_t first, int64_t count, float *const *buffers) {
        Group<Light> quick(r, first, count, buffers);
        if (light && run(quick)) return;
        Group<Guarded> careful(r, first, count, buffers);
        run(careful);
    });
}

extern "C" void layer_norm_run(const Rows *r) {
    if (r->weight) groups_of(*r, [](auto &group) { return group.template layer_norm<true>(); });
    else groups_of(*r, [](auto &group) { return group.template layer_norm<false>(); });
}

template <bool exact> static void backward(const Rows &r) {
    if (r.weight) groups_of(r, [](auto &group) { return group.template layer_norm_grad<exact, true>(); });
    else groups_of(r, [](auto &group) { return group.template layer_norm_grad<exact, false>(); });
}
extern "C" void layer_norm_grad_run(const Rows *r) { r->exact ? backward<true>(*r) : backward<false>(*r); }

/* One AdamW step in place on many tensors, equal to formulas.adamw over reference.py bit for bit. */
#include <algorithm>

#include "rows.h"

enum { BATCH = 2 };
static const int32_t LARGE = BIAS + 60 * MIN; /* 2^60 */

/* All tensors are contiguous; numbers as in formulas.AdamWNumbers. */
struct Numbers {
    const int64_t *counts;  /* entries of each tensor */
    float *const *pointers; /* all parameters, then all gradients, first moments, second moments */
    int64_t tensors, total, threads, decays;
    double beta1, rest1, beta2, rest2, eps, decay, step_size;
};

static inline ivec bits(vec x) { return (ivec)x; }

template <class Unit> struct Step {
    typedef typename Unit::Factor Factor;
    const Factor beta1, rest1, beta2, rest2, decay, step_size;
    const vec eps;
    const bool decays;

    explicit Step(const Numbers &c)
        : beta1(by(c.beta1)), rest1(by(c.rest1)), beta2(by(c.beta2)), rest2(by(c.rest2)), decay(by(c.decay)),
          step_size(by(c.step_size)), eps(all((float)c.eps)), decays(c.decays != 0) {}

    static Factor by(double factor) { return Unit::by(bits(all((float)factor)), 0); }

    void take(vec &param, vec g, vec &m, vec &v) const {
        m = (vec)Unit::times(bits(m), beta1) + (vec)Unit::times(bits(g), rest1);
        v = (vec)Unit::times(bits(v), beta2) + (vec)Unit::times(Unit::square(bits(g), 0), rest2);
        const vec d = (vec)Unit::sqrt(bits(v)) + eps;
        if (decays) param = param - (vec)Unit::times(bits(param), decay);
        const ivec ratio = Unit::div(bits(m), bits(d), 0) & (d != 0);
        param = param - (vec)Unit::times(ratio, step_size);
    }
};

/* Entries of one tensor. */
struct Entries {
    float *param, *grad, *m, *v;

    template <class Unit, class Place> void step(const Step<Unit> &unit, int64_t i, Place at) const {
        vec x = at.load(param + i, 0.0f), first = at.load(m + i, 0.0f), second = at.load(v + i, 0.0f);
        unit.take(x, at.load(grad + i, 0.0f), first, second);
        at.store(param + i, x), at.store(m + i, first), at.store(v + i, second);
    }

    /* May the light arithmetic take the batch at i? Second moments must not be negative. */
    bool is_small(int64_t i) const {
        ivec large = {}, low = {};
        for (int j = 0; j < BATCH; j++, i += LANES) {
            const ivec second = load((const int32_t *)v + i);
            large = most(large, most(load((const int32_t *)param + i) & ABS, load((const int32_t *)grad + i) & ABS));
            large = most(large, most(load((const int32_t *)m + i) & ABS, second));
            low = least(low, second);
        }
        return !any_of((large >= LARGE) | (low < 0));
    }

    void step(const Step<Light> &quick, const Step<Guarded> &careful, bool light, int64_t n) const {
        int64_t i = 0;
        for (; i + BATCH * LANES <= n; i += BATCH * LANES) {
            if (light && is_small(i))
                for (int j = 0; j < BATCH; j++) step(quick, i + j * LANES, Whole());
            else
                for (int j = 0; j < BATCH; j++) step(careful, i + j * LANES, Whole());
        }
        const Entries rest = {param + i, grad + i, m + i, v + i};
        along(n - i, [&](int64_t j, auto at) { rest.step(careful, j, at); });
    }
};

extern "C" void adamw_run(const Numbers *given) {
    const Numbers &c = *given;
    const Step<Light> quick(c);
    const Step<Guarded> careful(c);
    /* with these a ratio is below 2^126, and nothing else is larger */
    bool light = c.eps == 0 || (c.eps > 0x1p-62 && c.eps < 0x1p60);
    for (double factor : {c.beta1, c.rest1, c.beta2, c.rest2, c.decay, c.step_size})
        light &= factor >= 0 && factor <= 1;
    const int64_t threads = c.total > ONE_THREAD ? c.threads : 1, share = (c.total + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < threads; t++) {
        int64_t before = 0; /* entries of the tensors so far, of which this thread has [t share, (t + 1) share) */
        for (int64_t k = 0; k < c.tensors; before += c.counts[k++]) {
            const int64_t start = std::max((int64_t)0, t * share - before);
            const int64_t end = std::min(c.counts[k], (t + 1) * share - before);
            if (start >= end) continue;
            float *const *x = c.pointers + k;
            const int64_t next = c.tensors;
            const Entries entries = {x[0] + start, x[next] + start, x[2 * next] + start, x[3 * next] + start};
            entries.step(quick, careful, light, end - start);
        }
    }
}

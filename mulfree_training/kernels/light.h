/* Two arithmetics with one face, for kernels that look at the range of their data first.
 *
 * Guarded is right for all patterns. Light is right for all but infinities and NaN, as long as no product overflows and
 * no divisor is zero; it flushes what is below the smallest normal number, as reference.py does, so that both give the
 * same bits wherever Light may be used. It is several times as fast: it never looks for special values, and a chain of
 * factors that are the same in all lanes becomes one addition and one comparison.
 */
#pragma once
#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>
#endif
#include "pam.h"

/* Is any lane of a mask set? */
static inline bool any_of(ivec mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    return any(mask);
#endif
}

/* As floor_of, NaN included. */
static inline vec quick_floor(vec x) {
#if defined(__AVX512F__)
    return (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (vec)_mm256_floor_ps((__m256)x);
#else
    return floor_of(x);
#endif
}

/* Lane r of a vector in memory, in all lanes. */
static inline ivec in_all(const ivec &x, int64_t r) { return all(((const int32_t *)&x)[r]); }
static inline vec in_all(const vec &x, int64_t r) { return all(((const float *)&x)[r]); }

struct Guarded {
    static constexpr bool LIGHT = false;
    static inline ivec mul(ivec x, ivec y, int32_t shift) { return pam_mul(x, y, shift); }
    static inline ivec square(ivec x, int32_t shift) { return pam_mul(x, x, shift); }
    static inline ivec div(ivec x, ivec y, int32_t shift) { return pam_div(x, y, shift); }
    static inline ivec slope(ivec x, ivec y, int32_t shift) { return pam_slope(x, y, shift); }
    static inline ivec power(ivec x) { return pam_power(x); }
    static inline vec exp2(vec x) { return pam_exp2(x); }
    static inline ivec sqrt(ivec x) { return pam_sqrt(x); }
    /* A NaN wins. */
    static inline vec larger(vec x, vec y) { return select((x > y) | (x != x), x, y); }

    /* A product by, or a quotient over, what is the same in all lanes; or several one after the other. */
    struct alignas(4 * LANES) Factor {
        ivec value[3];
        bool divides[3];
        int32_t shift, count;
    };
    static inline Factor by(ivec value, int32_t shift) { return {{value}, {false}, shift, 1}; }
    static inline Factor over(ivec value, int32_t shift) { return {{value}, {true}, shift, 1}; }
    static inline Factor then(Factor f, const Factor &g) {
        for (int i = 0; i < g.count; i++) f.value[f.count] = g.value[i], f.divides[f.count++] = g.divides[i];
        return f;
    }
    /* Lane r of a factor in all lanes. */
    static inline Factor lane(const Factor &f, int64_t r) {
        Factor one = f;
        for (int i = 0; i < f.count; i++) one.value[i] = in_all(f.value[i], r);
        return one;
    }
    static inline ivec times(ivec x, const Factor &f) {
        for (int i = 0; i < f.count; i++) x = f.divides[i] ? div(x, f.value[i], f.shift) : mul(x, f.value[i], f.shift);
        return x;
    }

    /* The right side of a product of two vectors. */
    struct Right {
        ivec value;
        int32_t shift;
    };
    static inline Right right(ivec y, int32_t shift) { return {y, shift}; }
    static inline Right right(ivec y, const Factor &f, int32_t shift) { return {times(y, f), shift}; }
    static inline ivec mul(ivec x, const Right &y) { return mul(x, y.value, y.shift); }
    static inline ivec mul(ivec x, const Right &y, const Factor &f) { return times(mul(x, y), f); }
};

struct Light {
    static constexpr bool LIGHT = true;
    /* Of a positive factor: what it adds to a magnitude, and the smallest magnitude that it does not bring to zero. */
    struct alignas(4 * LANES) Factor {
        ivec add, least;
    };
    static inline Factor by(ivec value, int32_t shift) {
        const ivec add = value - (BIAS - shift);
        return {add, select(value < MIN, all(INF), most(all(MIN), MIN - add))};
    }
    static inline Factor over(ivec value, int32_t shift) {
        const ivec add = BIAS - shift - value;
        return {add, most(all(MIN), MIN - add)};
    }
    /* Neither is zero. */
    static inline Factor then(const Factor &f, const Factor &g) {
        return {plus(f.add, g.add), most(f.least, minus(g.least, f.add))};
    }
    static inline Factor lane(const Factor &f, int64_t r) { return {in_all(f.add, r), in_all(f.least, r)}; }
    static inline ivec times(ivec x, const Factor &f) {
        const ivec m = x & ABS;
        return select(m >= f.least, plus(m, f.add), (ivec){}) | (x & SIGN);
    }

    /* What a pattern adds to the magnitude of another in a product; of a zero so little that all is below zero. */
    struct Right {
        ivec add, sign;
    };
    static inline Right right(ivec y, int32_t shift) {
        const ivec n = y & ABS;
        return {select(n >= MIN, n - (BIAS - shift), all(SIGN)), y};
    }
    static inline Right right(ivec y, const Factor &f, int32_t shift) {
        const ivec n = y & ABS;
        return {select(n >= f.least, plus(n, f.add - (BIAS - shift)), all(SIGN)), y};
    }
    static inline ivec mul(ivec x, const Right &y) { return mul(x, y, {(ivec){}, all(MIN)}); }
    static inline ivec mul(ivec x, const Right &y, const Factor &f) {
        const ivec m = x & ABS, size = plus(m, y.add);
        return select((m >= MIN) & (size >= f.least), plus(size, f.add), (ivec){}) | ((x ^ y.sign) & SIGN);
    }
    static inline ivec mul(ivec x, ivec y, int32_t shift) {
        const ivec m = x & ABS, n = y & ABS, size = plus(m, n - (BIAS - shift));
        return select((least(m, n) >= MIN) & (size >= MIN), size, (ivec){}) | ((x ^ y) & SIGN);
    }
    static inline ivec square(ivec x, int32_t shift) {
        const ivec m = x & ABS, size = plus(m, m - (BIAS - shift));
        return select(size >= MIN, size, (ivec){});
    }
    static inline ivec div(ivec x, ivec y, int32_t shift) {
        const ivec m = x & ABS, size = plus(m, BIAS - shift - (y & ABS));
        return select((m >= MIN) & (size >= MIN), size, (ivec){}) | ((x ^ y) & SIGN);
    }
    static inline ivec slope(ivec x, ivec y, int32_t shift) {
        const ivec m = x & ABS, n = y & ABS;
        const ivec size = plus(n, select(m >= MIN, m & MANT, (ivec){}) + shift);
        return select((n >= MIN) & (size >= MIN), size & ~MANT, (ivec){}) | (y & SIGN);
    }
    static inline ivec power(ivec x) { return x & ~MANT; }
    static inline ivec div_grad(ivec grad, ivec x, ivec y, int32_t shift) {
        return mul(grad, div(power(div(x, y, shift)), power(y), 0), 0) ^ SIGN;
    }
    static inline ivec sqrt(ivec x) {
        const ivec m = x & ABS;
        return select(m >= MIN, ((m - BIAS) >> 1) + BIAS, (ivec){}) | (x & SIGN);
    }
    static inline vec larger(vec x, vec y) {
#if defined(__AVX512F__)
        return (vec)_mm512_max_ps((__m512)x, (__m512)y); /* by itself the compiler takes three instructions */
#else
        return x > y ? x : y;
#endif
    }
    /* 2^x for x < 128. */
    static inline vec exp2(vec x) {
        x = larger(x, all(-254.0f));
        const vec whole = quick_floor(x);
        const ivec power = (ivec)((uvec)__builtin_convertvector(whole, ivec) << 23);
        const ivec size = plus((ivec)(1.0f + (x - whole)), power);
        return (vec)select(size >= MIN, size, (ivec){});
    }
};

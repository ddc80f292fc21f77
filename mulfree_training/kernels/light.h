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

/* Lane i becomes lane i ^ distance. */
template <int distance> static inline vec swapped(vec x) {
#if defined(__AVX512F__)
    if (distance == 8) return (vec)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e);
    if (distance == 4) return (vec)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1);
    if (distance == 2) return (vec)_mm512_permute_ps((__m512)x, 0x4e);
    return (vec)_mm512_permute_ps((__m512)x, 0xb1);
#else
    ivec at;
    for (int i = 0; i < LANES; i++) at[i] = i ^ distance;
    return (vec)__builtin_shuffle((ivec)x, at);
#endif
}

/* reference.row_sum of sixteen running sums, in all lanes. */
static inline vec total_in_all(const RunningSums &sums) {
    vec x = sums.part[0];
    if (PARTS == 2) x += sums.part[1 % PARTS];
    if (PARTS == 4) x = (x + sums.part[2 % PARTS]) + (sums.part[1 % PARTS] + sums.part[3 % PARTS]);
    if (LANES == 16) x += swapped<8>(x);
    if (LANES >= 8) x += swapped<4>(x);
    x += swapped<2>(x);
    return x + swapped<1>(x);
}

template <class Unit> static inline vec largest_in_all(vec x) {
    if (LANES == 16) x = Unit::larger(x, swapped<8>(x));
    if (LANES >= 8) x = Unit::larger(x, swapped<4>(x));
    x = Unit::larger(x, swapped<2>(x));
    return Unit::larger(x, swapped<1>(x));
}

static inline ivec signs(ivec a, ivec b) { return (a ^ b) & SIGN; }

struct Guarded {
    static constexpr bool LIGHT = false;
    static inline ivec mul(ivec a, ivec b, int32_t shift) { return pam_mul(a, b, shift); }
    static inline ivec div(ivec a, ivec b, int32_t shift) { return pam_div(a, b, shift); }
    static inline ivec slope(ivec a, ivec b, int32_t shift) { return pam_slope(a, b, shift); }
    static inline ivec power(ivec x) { return pam_power(x); }
    static inline ivec div_grad(ivec grad, ivec x, ivec y, int32_t shift) { return pam_div_grad(grad, x, y, shift); }
    static inline vec exp2(vec x) { return pam_exp2(x); }
    /* A NaN wins. */
    static inline vec larger(vec x, vec y) { return select((x > y) | (x != x), x, y); }
    static inline ivec sqrt(ivec x) { return pam_sqrt(x); }

    /* One factor, or several one after the other. */
    struct Factor {
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
    static inline ivec times(ivec x, const Factor &f) {
        for (int i = 0; i < f.count; i++) x = f.divides[i] ? div(x, f.value[i], f.shift) : mul(x, f.value[i], f.shift);
        return x;
    }
    /* x times y, then the factor. */
    static inline ivec mul(ivec x, ivec y, int32_t shift, const Factor &f) { return times(mul(x, y, shift), f); }
};

struct Light {
    static constexpr bool LIGHT = true;
    /* What a factor adds to a magnitude, and the smallest magnitude that it does not bring to zero. */
    struct Factor {
        ivec add, least, sign;
    };
    static inline Factor by(ivec value, int32_t shift) {
        const ivec n = value & ABS, add = n - (BIAS - shift);
        return {add, select(n < MIN, all(INF), most(all(MIN), MIN - add)), value};
    }
    static inline Factor over(ivec value, int32_t shift) {
        const ivec add = BIAS - shift - (value & ABS);
        return {add, most(all(MIN), MIN - add), value};
    }
    static inline Factor then(const Factor &f, const Factor &g) {
        const ivec before = select(g.least == INF, all(INF), minus(g.least, f.add));
        return {plus(f.add, g.add), most(f.least, before), f.sign ^ g.sign};
    }
    static inline ivec times(ivec x, const Factor &f) {
        const ivec m = x & ABS;
        return select(m >= f.least, plus(m, f.add), (ivec){}) | signs(x, f.sign);
    }
    static inline ivec product(ivec x, ivec y, int32_t shift, ivec limit, ivec add, ivec sign) {
        const ivec m = x & ABS, n = y & ABS, size = plus(m, n - (BIAS - shift));
        return select((least(m, n) >= MIN) & (size >= limit), plus(size, add), (ivec){}) | ((x ^ y ^ sign) & SIGN);
    }
    static inline ivec mul(ivec x, ivec y, int32_t shift) { return product(x, y, shift, all(MIN), (ivec){}, (ivec){}); }
    static inline ivec mul(ivec x, ivec y, int32_t shift, const Factor &f) {
        return product(x, y, shift, f.least, f.add, f.sign);
    }
    static inline ivec div(ivec x, ivec y, int32_t shift) {
        const ivec m = x & ABS, size = plus(m, BIAS - shift - (y & ABS));
        return select((m >= MIN) & (size >= MIN), size, (ivec){}) | signs(x, y);
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
    static inline vec larger(vec x, vec y) { return x > y ? x : y; }
    /* 2^x for x < 128. */
    static inline vec exp2(vec x) {
        x = x > -254.0f ? x : all(-254.0f);
        const vec whole = quick_floor(x);
        const ivec power = (ivec)((uvec)__builtin_convertvector(whole, ivec) << 23);
        const ivec size = plus((ivec)(1.0f + (x - whole)), power);
        return (vec)select(size >= MIN, size, (ivec){});
    }
    static inline ivec sqrt(ivec x) {
        return select((x & ABS) >= MIN, (((x & ABS) - BIAS) >> 1) + BIAS, (ivec){}) | (x & SIGN);
    }
};

/* Rows of tensors in memory: float, bfloat16 or half, read and written as floats. */
#pragma once
#include "vectors.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    float x;
    uint32_t bits = rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : rest << 13;
    memcpy(&x, &bits, 4);
    if (rest < 0x7c00) x *= 5.192296858534828e33f; /* 2^112 */
    memcpy(&bits, &x, 4);
    bits |= sign;
    memcpy(&x, &bits, 4);
    return x;
#endif
}

static inline uint16_t float_to_half(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, 0);
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00; /* rounds to 65536 or more */
    if (bits < 0x38800000) {                      /* subnormal: adding 1/2 leaves the rounded value in the low bits */
        float y;
        memcpy(&y, &bits, 4);
        y += 0.5f;
        memcpy(&bits, &y, 4);
        return sign | (bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | ((bits - 0x38000000) >> 13);
#endif
}

/* A (B, H, T, D) tensor of any strides (in elements; the last one is 1). */
struct Rows {
    const void *data;
    int64_t batch, head, row;
    int64_t width;
};

/* Copy one row as floats and pad it with zeros. */
static inline void read_row(const Rows &x, int type, int64_t offset, float *to) {
    const int64_t n = x.width;
    if (type == FLOAT32) {
        memcpy(to, (const float *)x.data + offset, n * 4);
    } else if (type == BFLOAT16) {
        const uint16_t *from = (const uint16_t *)x.data + offset;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = (uint32_t)from[i] << 16;
            memcpy(to + i, &bits, 4);
        }
    } else {
        const uint16_t *from = (const uint16_t *)x.data + offset;
        for (int64_t i = 0; i < n; i++) to[i] = half_to_float(from[i]);
    }
    for (int64_t i = n; i < padded(n); i++) to[i] = 0;
}

/* Round one row of floats to the type and store it. */
static inline void write_row(void *data, int type, int64_t offset, int64_t n, const float *from) {
    if (type == FLOAT32) {
        memcpy((float *)data + offset, from, n * 4);
    } else if (type == BFLOAT16) {
        uint16_t *to = (uint16_t *)data + offset;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, from + i, 4);
            to[i] = from[i] != from[i] ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* nearest, ties to even */
        }
    } else {
        uint16_t *to = (uint16_t *)data + offset;
        for (int64_t i = 0; i < n; i++) to[i] = float_to_half(from[i]);
    }
}

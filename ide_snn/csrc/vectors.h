/* What the kernels have in common: vectors as wide as a register of the processor, and the places of what is not 0. */

#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* Numbers of 4 bytes in a register. Wider vectors than the processor has would go through memory. */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define SUMS 4 /* partial sums side by side hide the latency of an addition */

/* before a loop whose passes do not depend on each other, also where its result is one of its operands */
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

typedef float Lanes __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

/* n of `size` numbers, and zeros behind them. All are read as vectors: processors wait when they read as one what was written in
 * pieces, as by a copy. */
static inline __attribute__((always_inline)) void read_row(const float *from, int64_t n, int64_t size, Lanes *row) {
    if (n == size)
        for (int64_t j = 0; j < size / WIDTH; j++) row[j] = ((const Lanes *)from)[j];
    else {
        memset(row, 0, size * sizeof(float));
        memcpy(row, from, n * sizeof(float));
    }
}

/* The first n of the numbers of a row. */
static inline __attribute__((always_inline)) void write_row(const Lanes *row, int64_t n, int64_t size, float *to) {
    for (int64_t j = 0; j < size; j += WIDTH) {
        Lanes own = row[j / WIDTH]; /* whose address may be known: the row stays in registers */
        if (n == size) *(Lanes *)(to + j) = own;
        else if (n > j) memcpy(to + j, &own, (n - j < WIDTH ? n - j : WIDTH) * sizeof(float));
    }
}

#define SPARE 7 /* entries that `compress` may write behind its last one */

#if defined(__AVX2__)
/* Byte i of entry m is the place of the bit i of those set in m. */
static uint64_t set_bits[256];

__attribute__((constructor)) static void list_set_bits(void) {
    for (int m = 0; m < 256; m++)
        for (int bit = 0, n = 0; bit < 8; bit++)
            if (m >> bit & 1) set_bits[m] |= (uint64_t)bit << 8 * n++;
}

static inline __m256i places_in(int mask) { return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)set_bits[mask])); }
#endif

/* The numbers of scale * x (scale may be NULL) that are not 0, and step times their places; returns how many. NaN is not 0. */
static inline int64_t compress(const float *x, const float *scale, int64_t size, int32_t step, float *value, int32_t *place) {
    int64_t n = 0, i = 0;
#if defined(__AVX2__)
    __m256i steps = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(step));
    for (; i + 8 <= size; i += 8, steps = _mm256_add_epi32(steps, _mm256_set1_epi32(8 * step))) {
        __m256 own = _mm256_loadu_ps(x + i);
        if (scale) own = _mm256_mul_ps(own, _mm256_loadu_ps(scale + i));
        int mask = _mm256_movemask_ps(_mm256_cmp_ps(own, _mm256_setzero_ps(), _CMP_NEQ_UQ));
        __m256i kept = places_in(mask);
        _mm256_storeu_ps(value + n, _mm256_permutevar8x32_ps(own, kept));
        _mm256_storeu_si256((__m256i *)(place + n), _mm256_permutevar8x32_epi32(steps, kept));
        n += __builtin_popcount((unsigned)mask);
    }
#endif
    for (; i < size; i++) { /* without branches: zeros come at random */
        float own = scale ? x[i] * scale[i] : x[i];
        int32_t bits;
        memcpy(&bits, &own, sizeof bits);
        value[n] = own;
        place[n] = (int32_t)i * step;
        n += (bits & 0x7fffffff) != 0;
    }
    return n;
}

/* The places of the ones among `size` bytes that are 0 or 1; returns how many. */
static inline int64_t compress_bytes(const uint8_t *x, int64_t size, int32_t *place) {
    int64_t n = 0, i = 0;
    for (; i + 8 <= size; i += 8) {
        uint64_t eight;
        memcpy(&eight, x + i, 8);
#if defined(__AVX2__)
        int mask = (int)(eight * 0x0102040810204080u >> 56); /* bit k is that of byte k */
        _mm256_storeu_si256((__m256i *)(place + n), _mm256_add_epi32(places_in(mask), _mm256_set1_epi32((int32_t)i)));
        n += __builtin_popcount((unsigned)mask);
#else
        if (!eight) continue;
        for (int k = 0; k < 8; k++) { /* without branches: spikes come at random */
            place[n] = (int32_t)(i + k);
            n += x[i + k];
        }
#endif
    }
    for (; i < size; i++)
        if (x[i]) place[n++] = (int32_t)i;
    return n;
}

/* To bfloat16: to nearest, ties to even. */
static inline void round_to_bfloat16(const float *restrict x, int64_t n, uint16_t *restrict to) {
    for (int64_t j = 0; j < n; j++) {
        uint32_t bits;
        memcpy(&bits, x + j, sizeof bits);
        uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        to[j] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest); /* NaN stays NaN */
    }
}

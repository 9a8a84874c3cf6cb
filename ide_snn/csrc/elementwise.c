/* Operations on each number of tensors in float32, one pass over memory, with the rounding of the torch operations they
 * replace. Threads take shares of the numbers, or samples, from a shared counter. */

#include <math.h>

#include "vectors.h"

#define SHARE 8192 /* numbers that a thread takes at a time */

typedef struct {
    int64_t size;
    int64_t next;           /* share to be taken by the next thread; starts at 0 */
    float *response;        /* [size] */
    const float *gain, *drive; /* [size] or NULL */
    float *slope, *through; /* [size]; the same where there is no gain; where there is one, `through` may be NULL and the
                             * slope may be written over the gain */
    double threshold;
} Slopes;

/* z = (gain response + drive) / threshold: response becomes sigma(z), through sigma'(z) / threshold, slope that times
 * the gain. */
void slopes(Slopes *w) {
    float threshold = (float)w->threshold, one = 1 / threshold;
    for (int64_t i; (i = SHARE * __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->size;) {
        int64_t n = w->size - i < SHARE ? w->size - i : SHARE;
        float *restrict z = w->response + i, *restrict through = (w->through ? w->through : w->slope) + i;
        if (w->gain)
            for (int64_t j = 0; j < n; j++) z[j] *= w->gain[i + j];
        if (w->drive)
            for (int64_t j = 0; j < n; j++) z[j] += w->drive[i + j];
        for (int64_t j = 0; j < n; j++) {
            float a = z[j] / threshold;
            through[j] = a >= 0 && a <= 1 ? one : 0;
            a = a < 0 ? 0 : a; /* NaN stays NaN */
            z[j] = a > 1 ? 1 : a;
        }
        if (w->gain && w->through) {
            INDEPENDENT
            for (int64_t j = 0; j < n; j++) w->slope[i + j] = through[j] * w->gain[i + j];
        } else if (w->gain)
            for (int64_t j = 0; j < n; j++) through[j] *= w->gain[i + j];
    }
}

typedef struct {
    int64_t size;
    int64_t next;       /* share to be taken by the next thread; starts at 0 */
    const void *x;      /* [size], float32 or */
    int64_t is_rounded; /* 1: bfloat16 */
    const float *scale; /* [size] */
    uint16_t *to;       /* [size] bfloat16 */
} Rounded;

/* to = scale x, rounded to nearest, ties to even. */
void rounded(Rounded *w) {
    float room[SHARE];
    for (int64_t i; (i = SHARE * __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->size;) {
        int64_t n = w->size - i < SHARE ? w->size - i : SHARE;
        const float *scale = w->scale + i;
        if (w->is_rounded) {
            const uint16_t *x = (const uint16_t *)w->x + i;
            for (int64_t j = 0; j < n; j++) {
                uint32_t bits = (uint32_t)x[j] << 16;
                memcpy(room + j, &bits, sizeof bits);
            }
            for (int64_t j = 0; j < n; j++) room[j] *= scale[j];
        } else {
            const float *x = (const float *)w->x + i;
            for (int64_t j = 0; j < n; j++) room[j] = x[j] * scale[j];
        }
        round_to_bfloat16(room, n, w->to + i);
    }
}

typedef struct {
    int64_t rows, columns;
    int64_t next;       /* columns to be taken by the next thread; starts at 0 */
    const float *x, *y; /* [rows][columns] */
    float *to;          /* [columns][rows] */
} Turned;

#define LINE 16 /* columns that a thread takes at a time: a line of the cache */

/* to = the transpose of x * y, number by number. */
void turned(Turned *w) {
    for (int64_t first; (first = LINE * __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->columns;) {
        int64_t n = w->columns - first < LINE ? w->columns - first : LINE;
        float *to = w->to + first * w->rows;
        for (int64_t i = 0; i < w->rows; i++) {
            const float *x = w->x + i * w->columns + first, *y = w->y + i * w->columns + first;
            for (int64_t j = 0; j < n; j++) to[j * w->rows + i] = x[j] * y[j];
        }
    }
}

typedef struct {
    int64_t samples, size;
    int64_t next;       /* sample to be taken by the next thread; starts at 0 */
    uint64_t key;
    int64_t first;      /* number of the first sample */
    int64_t least;      /* number from which on an element is kept */
    float *gain;        /* [samples][size] */
    double kept;
} Gains;

#define GAMMA 0x9e3779b97f4a7c15u
#define PIECES 4    /* of 16 bits in a random number */
#define NUMBERS 128 /* that are drawn before their elements are written */

static inline uint64_t mix(uint64_t z) { /* SplitMix64 */
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* gain = kept where 16 bits of the random numbers of ide_snn.dropout are at least `least`, else 0. */
void gains(Gains *w) {
    int64_t some = SHARE / (w->size + 1) + 1;
    uint64_t bits[NUMBERS] = {0};
    int16_t pieces[NUMBERS * PIECES], least = (int16_t)w->least;
    float kept = (float)w->kept;
    for (int64_t b; (b = some * __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->samples;)
        for (int64_t sample = b; sample < b + some && sample < w->samples; sample++) {
            float *gain = w->gain + sample * w->size;
            uint64_t from = mix(w->key + (uint64_t)(w->first + sample + 1) * GAMMA);
            for (int64_t i = 0; i < w->size; i += NUMBERS * PIECES) {
                int64_t left = w->size - i, n = left < NUMBERS * PIECES ? left : NUMBERS * PIECES;
                for (int64_t j = 0; j < (n + PIECES - 1) / PIECES; j++) bits[j] = mix(from += GAMMA);
                memcpy(pieces, bits, sizeof bits);
                for (int64_t j = 0; j < n; j++) gain[i + j] = pieces[j] >= least ? kept : 0;
            }
        }
}

typedef struct {
    int64_t samples, size, populations;
    int64_t next;                 /* sample to be taken by the next thread; starts at 0 */
    const float *const *membrane; /* of each population, [samples][its size] */
    const int64_t *sizes;
    const float *weighted;        /* [samples][size] of the last population */
    float *rate;                  /* [samples][size], may be `weighted` */
    double total;
} Rate;

/* rate = weighted / total, NaN in a sample where a membrane is NaN or infinite. */
void rate(Rate *w) {
    int64_t some = SHARE / (w->size + 1) + 1;
    float total = (float)w->total;
    for (int64_t b; (b = some * __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->samples;)
        for (int64_t sample = b; sample < b + some && sample < w->samples; sample++) {
            int32_t largest = 0; /* bits of |u| are ordered as |u| is, infinity and NaN last */
            for (int64_t p = 0; p < w->populations; p++) {
                const float *u = w->membrane[p] + sample * w->sizes[p];
                for (int64_t i = 0; i < w->sizes[p]; i++) {
                    int32_t own;
                    memcpy(&own, u + i, sizeof own);
                    own &= 0x7fffffff;
                    largest = own > largest ? own : largest;
                }
            }
            float poison = largest >= 0x7f800000 ? NAN : 0;
            const float *weighted = w->weighted + sample * w->size;
            float *to = w->rate + sample * w->size;
            INDEPENDENT
            for (int64_t i = 0; i < w->size; i++) to[i] = weighted[i] / total + poison;
        }
}

/* Responses that batch norm normalises, the firing rates they cause, and the derivatives of both; ide_snn/conv_rates.py has the mathematics.
 * Tensors are [rows][channels], as images are that lie channels-last: a row is one position of one sample. Responses,
 * rates and cotangents are float32 or bfloat16. Threads take shares of the rows from a shared counter; sums over the rows of a share are
 * results of their own, so that they do not depend on who took it. */

#include <math.h>

#include "vectors.h"

#define ROWS 64   /* that a thread takes at a time */
#define MOST 512  /* channels at a time: what is done to them stays in the cache */

#define INLINE static inline __attribute__((always_inline))
#define FOR_SHARES(w) \
    for (int64_t share, first; (share = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED), first = share * ROWS) < w->rows;) \
        for (int64_t c = 0, last = first + ROWS < w->rows ? first + ROWS : w->rows, n; \
             n = w->channels - c < MOST ? w->channels - c : MOST, c < w->channels; c += MOST)

typedef struct {
    const void *at;
    int64_t is_rounded; /* bfloat16 */
} Numbers;

INLINE void read(Numbers from, int64_t i, int64_t n, float *to) {
    if (from.is_rounded) {
        const uint16_t *x = (const uint16_t *)from.at + i;
        for (int64_t j = 0; j < n; j++) {
            uint32_t bits = (uint32_t)x[j] << 16;
            memcpy(to + j, &bits, sizeof bits);
        }
    } else memcpy(to, (const float *)from.at + i, n * sizeof(float));
}

INLINE void write(const float *from, int64_t n, Numbers to, int64_t i) {
    if (to.is_rounded) round_to_bfloat16(from, n, (uint16_t *)to.at + i);
    else memcpy((float *)to.at + i, from, n * sizeof(float));
}

typedef struct {
    int64_t rows, channels;
    int64_t next;        /* share to be taken by the next thread; starts at 0 */
    Numbers y;           /* [rows][channels] */
    const float *centre; /* [channels] or NULL for 0 */
    float *sums;         /* [shares][2][channels] results: of y - centre, and of its squares */
} Moments;

void moments(Moments *w) {
    FOR_SHARES(w) {
        float sum[MOST] = {0}, squares[MOST] = {0}, y[MOST];
        for (int64_t row = first; row < last; row++) {
            read(w->y, row * w->channels + c, n, y);
            if (w->centre)
                for (int64_t j = 0; j < n; j++) y[j] -= w->centre[c + j];
            for (int64_t j = 0; j < n; j++) sum[j] += y[j];
            for (int64_t j = 0; j < n; j++) squares[j] += y[j] * y[j];
        }
        float *to = w->sums + 2 * share * w->channels + c;
        memcpy(to, sum, n * sizeof(float));
        memcpy(to + w->channels, squares, n * sizeof(float));
    }
}

typedef struct {
    const float *factor, *shift; /* [channels], or NULL for 1 and 0 */
    const float *gain;           /* [rows][channels] or NULL for 1 */
    double threshold;            /* or 0: no neuron fires, and z itself is the result */
} Response;

/* gain (factor y + shift) / threshold, or without the threshold, for n channels from c of a row, whose first number is i. */
INLINE void potential(const Response *of, int64_t c, int64_t i, int64_t n, const float *y, float *z) {
    float threshold = (float)of->threshold;
    if (of->factor)
        for (int64_t j = 0; j < n; j++) z[j] = y[j] * of->factor[c + j];
    else memcpy(z, y, n * sizeof(float));
    if (of->shift)
        for (int64_t j = 0; j < n; j++) z[j] += of->shift[c + j];
    if (of->gain)
        for (int64_t j = 0; j < n; j++) z[j] *= of->gain[i + j];
    if (threshold)
        for (int64_t j = 0; j < n; j++) z[j] /= threshold;
}

/* gain sigma'(z) / threshold, or the gain */
INLINE void slope_of(const Response *of, int64_t i, int64_t n, const float *z, float *slope) {
    float one = of->threshold ? 1 / (float)of->threshold : 1;
    if (of->threshold)
        for (int64_t j = 0; j < n; j++) slope[j] = z[j] >= 0 && z[j] <= 1 ? one : 0;
    else
        for (int64_t j = 0; j < n; j++) slope[j] = one;
    if (of->gain)
        for (int64_t j = 0; j < n; j++) slope[j] *= of->gain[i + j];
}

typedef struct {
    int64_t rows, channels;
    int64_t next; /* as above */
    Numbers y;
    Response response;
    Numbers rate; /* result: sigma(z), or z */
    float *slope; /* [rows][channels] result, or NULL */
} Rates;

void rates(Rates *w) {
    FOR_SHARES(w) {
        float y[MOST], z[MOST];
        for (int64_t row = first; row < last; row++) {
            int64_t i = row * w->channels + c;
            read(w->y, i, n, y);
            potential(&w->response, c, i, n, y, z);
            if (w->slope) slope_of(&w->response, i, n, z, w->slope + i);
            if (w->response.threshold)
                for (int64_t j = 0; j < n; j++) {
                    float a = z[j] < 0 ? 0 : z[j]; /* NaN stays NaN */
                    z[j] = a > 1 ? 1 : a;
                }
            write(z, n, w->rate, i);
        }
    }
}

typedef struct {
    int64_t rows, channels;
    int64_t next; /* as above */
    Numbers y;
    Response response;
    const float *mean, *scale; /* [channels]: h = (y - mean) scale */
    Numbers cotangent;         /* of the result of `rates` */
    float *sums;               /* [shares][2][channels] results of `sums`: of e, and of e h */
    const float *share, *slant; /* [channels] means over the rows of e and e h */
    Numbers to_y;              /* result of `cotangents` */
} Cotangents;

/* e = slope times the cotangent, and h. */
INLINE void behind(const Cotangents *w, int64_t c, int64_t i, int64_t n, float *e, float *h) {
    float z[MOST];
    read(w->y, i, n, h);
    read(w->cotangent, i, n, e);
    potential(&w->response, c, i, n, h, z);
    slope_of(&w->response, i, n, z, z);
    for (int64_t j = 0; j < n; j++) e[j] *= z[j];
    for (int64_t j = 0; j < n; j++) h[j] = (h[j] - w->mean[c + j]) * w->scale[c + j];
}

void sums(Cotangents *w) {
    FOR_SHARES(w) {
        float sum[MOST] = {0}, with_h[MOST] = {0}, e[MOST], h[MOST];
        for (int64_t row = first; row < last; row++) {
            behind(w, c, row * w->channels + c, n, e, h);
            for (int64_t j = 0; j < n; j++) sum[j] += e[j];
            for (int64_t j = 0; j < n; j++) with_h[j] += e[j] * h[j];
        }
        float *to = w->sums + 2 * share * w->channels + c;
        memcpy(to, sum, n * sizeof(float));
        memcpy(to + w->channels, with_h, n * sizeof(float));
    }
}

/* to_y = factor (e - share - h slant) */
void cotangents(Cotangents *w) {
    FOR_SHARES(w) {
        float e[MOST], h[MOST];
        for (int64_t row = first; row < last; row++) {
            int64_t i = row * w->channels + c;
            behind(w, c, i, n, e, h);
            for (int64_t j = 0; j < n; j++) e[j] -= w->share[c + j] + h[j] * w->slant[c + j];
            for (int64_t j = 0; j < n; j++) e[j] *= w->response.factor[c + j];
            write(e, n, w->to_y, i);
        }
    }
}

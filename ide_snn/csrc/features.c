/* The input stage of a fully connected population behind its product: batch norm, dropout gain, and their derivatives;
 * ide_snn/input_stage.py has the mathematics. Tensors are [samples][features]; threads take a few features, of all samples. */

#include <math.h>
#include <stdint.h>

#define STEPS 64 /* samples */
#define SOME 16  /* features that a thread takes at a time: a line of the cache */

typedef struct {
    int64_t samples, features;
    int64_t next;               /* features to be taken by the next thread; starts at 0 */
    const float *x, *bias;      /* W x without the bias [features], which may be NULL */
    const float *gain;          /* or NULL */
    const float *gamma, *beta;  /* [features]; both NULL: without batch norm */
    float *mean, *scale;        /* [features] results: mean of W x, 1 / sqrt(var + eps) */
    float *running_mean, *running_var; /* [features] */
    int64_t *batches;           /* that the running ones have seen, or NULL */
    double eps, momentum;
    float *drive;               /* result */
} Forward;

#define FOR_FEATURES(w) \
    for (int64_t first; (first = SOME * __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->features;)

static inline int64_t some_of(int64_t features, int64_t first) { return features - first < SOME ? features - first : SOME; }

/* Called with a constant for n where all SOME are there, so that the loops over them become vectors. */
static inline __attribute__((always_inline)) void forward_some(Forward *w, int64_t first, int64_t n) {
    int64_t stride = w->features, samples = w->samples;
    const float *restrict x = w->x + first, *restrict gain = w->gain ? w->gain + first : 0;
    float *restrict drive = w->drive + first;
    float factor[SOME], shift[SOME];
    for (int64_t j = 0; j < n; j++) factor[j] = 1, shift[j] = w->bias ? w->bias[first + j] : 0;
    if (w->gamma) {
        double sum[SOME] = {0}, squares[SOME] = {0};
        float mean[SOME];
        for (int64_t b = 0; b < samples; b += STEPS) {
            int64_t end = samples - b < STEPS ? samples : b + STEPS;
            float some[SOME] = {0}; /* sums of a few samples are in float32 */
            for (int64_t c = b; c < end; c++)
                for (int64_t j = 0; j < n; j++) some[j] += x[c * stride + j];
            for (int64_t j = 0; j < n; j++) sum[j] += some[j];
        }
        for (int64_t j = 0; j < n; j++) mean[j] = (float)(sum[j] / samples);
        for (int64_t b = 0; b < samples; b += STEPS) {
            int64_t end = samples - b < STEPS ? samples : b + STEPS;
            float some[SOME] = {0};
            for (int64_t c = b; c < end; c++)
                for (int64_t j = 0; j < n; j++) some[j] += (x[c * stride + j] - mean[j]) * (x[c * stride + j] - mean[j]);
            for (int64_t j = 0; j < n; j++) squares[j] += some[j];
        }
        for (int64_t j = 0; j < n; j++) {
            int64_t c = first + j;
            double var = squares[j] / samples, unbiased = squares[j] / (samples - 1);
            w->mean[c] = mean[j];
            w->scale[c] = (float)(1 / sqrt(var + w->eps));
            w->running_mean[c] += (float)(w->momentum * (mean[j] + shift[j] - w->running_mean[c]));
            w->running_var[c] += (float)(w->momentum * (unbiased - w->running_var[c]));
            factor[j] = w->gamma[c] * w->scale[c];
            float nothing = shift[j] - shift[j]; /* but NaN, where the bias is not finite: it is to be seen */
            shift[j] = w->beta[c] - mean[j] * factor[j] + nothing;
        }
    }
    for (int64_t i = 0; i < samples * stride; i += stride) {
        for (int64_t j = 0; j < n; j++) drive[i + j] = x[i + j] * factor[j] + shift[j];
        if (gain)
            for (int64_t j = 0; j < n; j++) drive[i + j] *= gain[i + j];
    }
}

/* drive = gain * BN(W x + b), for which the bias changes nothing, by the statistics of the batch, which move the running ones. */
void forward(Forward *w) {
    FOR_FEATURES(w) {
        int64_t n = some_of(w->features, first);
        if (!first && w->batches) ++*w->batches;
        if (n == SOME) forward_some(w, first, SOME);
        else forward_some(w, first, n);
    }
}

typedef struct {
    int64_t samples, features;
    int64_t next;                   /* as above */
    const float *v;                 /* solution of the solve */
    const float *slope, *through;   /* derivatives of the rate in the feedback's response, and in the drive; NULL: no response, and 1 */
    const float *x, *gain;          /* as above */
    const float *gamma, *mean, *scale;
    float *to_response, *to_x;      /* results; the first [features][samples] */
    float *turned;                  /* [features][samples] to_x once more, or NULL */
    float *to_gamma, *to_beta;      /* [features] results */
    float *to_bias, *to_feedback_bias; /* [features] results, or NULL */
} Backward;

static inline __attribute__((always_inline)) void backward_some(Backward *w, int64_t first, int64_t n) {
    int64_t stride = w->features, samples = w->samples;
    float *restrict to_x = w->to_x + first;
    const float *restrict v = w->v + first, *restrict slope = w->slope ? w->slope + first : 0;
    const float *restrict through = w->through ? w->through + first : 0;
    const float *restrict x = w->x + first, *restrict gain = w->gain ? w->gain + first : 0;
    double sum[SOME] = {0}, with_x[SOME] = {0}, of_response[SOME] = {0}, of_x[SOME] = {0};
    float mean[SOME], scale[SOME], factor[SOME];
    for (int64_t j = 0; j < n; j++) {
        mean[j] = w->gamma ? w->mean[first + j] : 0;
        scale[j] = w->gamma ? w->scale[first + j] : 1;
        factor[j] = w->gamma ? w->gamma[first + j] * scale[j] : 1;
    }
    for (int64_t b = 0; b < samples; b += STEPS) {
        int64_t end = samples - b < STEPS ? samples : b + STEPS;
        float some[3][SOME] = {0}; /* sums of a few samples are in float32 */
        for (int64_t c = b; c < end; c++) {
            int64_t i = c * stride;
            float own[SOME], response[SOME];
            for (int64_t j = 0; j < n; j++) own[j] = v[i + j];
            if (through)
                for (int64_t j = 0; j < n; j++) own[j] *= through[i + j];
            if (gain)
                for (int64_t j = 0; j < n; j++) own[j] *= gain[i + j];
            for (int64_t j = 0; j < n; j++) some[0][j] += own[j];
            for (int64_t j = 0; j < n; j++) some[1][j] += own[j] * ((x[i + j] - mean[j]) * scale[j]);
            for (int64_t j = 0; j < n; j++) to_x[i + j] = own[j];
            if (!slope) continue;
            for (int64_t j = 0; j < n; j++) response[j] = v[i + j] * slope[i + j];
            for (int64_t j = 0; j < n; j++) some[2][j] += response[j];
            for (int64_t j = 0; j < n; j++) w->to_response[(first + j) * samples + c] = response[j];
        }
        for (int64_t j = 0; j < n; j++) sum[j] += some[0][j], with_x[j] += some[1][j], of_response[j] += some[2][j];
    }
    if (w->gamma) {
        float share[SOME], slant[SOME];
        for (int64_t j = 0; j < n; j++) share[j] = (float)(sum[j] / samples), slant[j] = (float)(with_x[j] / samples);
        for (int64_t b = 0; b < samples; b += STEPS) {
            int64_t end = samples - b < STEPS ? samples : b + STEPS;
            float some[SOME] = {0};
            for (int64_t c = b; c < end; c++)
                for (int64_t j = 0, i = c * stride; j < n; j++) {
                    float own = factor[j] * (to_x[i + j] - share[j] - (x[i + j] - mean[j]) * scale[j] * slant[j]);
                    to_x[i + j] = own;
                    some[j] += own;
                }
            for (int64_t j = 0; j < n; j++) of_x[j] += some[j];
        }
    }
    if (w->turned)
        for (int64_t c = 0; c < samples; c++)
            for (int64_t j = 0; j < n; j++) w->turned[(first + j) * samples + c] = to_x[c * stride + j];
    for (int64_t j = 0; j < n; j++) {
        int64_t c = first + j;
        if (w->gamma) {
            w->to_gamma[c] = (float)with_x[j];
            w->to_beta[c] = (float)sum[j];
        }
        if (w->to_bias) w->to_bias[c] = (float)(w->gamma ? of_x[j] : sum[j]);
        if (w->to_feedback_bias) w->to_feedback_bias[c] = (float)of_response[j];
    }
}

/* From the solution v: to_response = slope v, to_x the cotangent of x, and those of the vectors over features. */
void backward(Backward *w) {
    FOR_FEATURES(w) {
        int64_t n = some_of(w->features, first);
        if (n == SOME) backward_some(w, first, SOME);
        else backward_some(w, first, n);
    }
}

/* The vector work of one GMRES step in float32, one pass over memory; ide_snn/solvers/gmres.py has the mathematics. */

#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define SUMS 4 /* independent partial sums hide the latency of an addition */

typedef float Lanes __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

static double dot(int64_t n, const float *x, const float *y) {
    Lanes sums[SUMS] = {0};
    int64_t i = 0;
    for (; i + SUMS * WIDTH <= n; i += SUMS * WIDTH)
        for (int k = 0; k < SUMS; k++) sums[k] += *(const Lanes *)(x + i + k * WIDTH) * *(const Lanes *)(y + i + k * WIDTH);
    double total = 0;
    for (int k = 0; k < SUMS; k++)
        for (int j = 0; j < WIDTH; j++) total += sums[k][j];
    for (; i < n; i++) total += (double)x[i] * y[i];
    return total;
}

/* For each group g of [groups][n]: w = q_k - image, made orthogonal to q_1..q_k by modified Gram-Schmidt and normalised;
 * it overwrites image. h [k + 1][groups] gets the coefficients and last ||w||; a w below `noise` times its length
 * before is noise, and becomes 0. */
void arnoldi(int64_t groups, int64_t n, int64_t k, const float *const *basis, float *image, float *h, int64_t passes,
             float noise, int64_t *next) {
    for (int64_t g; (g = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < groups;) {
        float *w = image + g * n;
        const float *newest = basis[k - 1] + g * n;
        for (int64_t i = 0; i < n; i++) w[i] = newest[i] - w[i];
        double before = sqrt(dot(n, w, w));
        for (int64_t j = 0; j < k; j++) h[j * groups + g] = 0;
        for (int64_t pass = 0; pass < passes; pass++)
            for (int64_t j = 0; j < k; j++) {
                const float *q = basis[j] + g * n;
                float c = (float)dot(n, q, w);
                for (int64_t i = 0; i < n; i++) w[i] -= c * q[i];
                h[j * groups + g] += c;
            }
        double length = sqrt(dot(n, w, w));
        if (length <= noise * before) length = 0; /* also NaN stays NaN */
        h[k * groups + g] = (float)length;
        float unit = length == 0 ? 0.0f : (float)(1 / length);
        for (int64_t i = 0; i < n; i++) w[i] *= unit;
    }
}

/* The vector work of a linear solve in float32, one pass over memory; ide_snn/solvers has the mathematics. */

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

/* r = b + image - y, which overwrites image, and its norm, for each group of [groups][n]. */
void residual(int64_t groups, int64_t n, const float *b, const float *y, float *image, float *norm, int64_t *next) {
    for (int64_t g; (g = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < groups;) {
        float *r = image + g * n;
        for (int64_t i = 0; i < n; i++) r[i] = (b[g * n + i] + r[i]) - y[g * n + i];
        norm[g] = (float)sqrt(dot(n, r, r));
    }
}

/* scaled = b / unit with unit a power of two near the largest |b| of the group (1 where that is 0 or not finite), and
 * norm = ||scaled||. */
void rescale(int64_t groups, int64_t n, const float *b, float *scaled, float *unit, float *norm, int64_t *next) {
    for (int64_t g; (g = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < groups;) {
        const float *x = b + g * n;
        float *y = scaled + g * n, largest = 0, poison = 0;
        for (int64_t i = 0; i < n; i++) {
            float size = fabsf(x[i]);
            largest = size > largest ? size : largest;
            poison += x[i] * 0; /* NaN where one is NaN or infinite */
        }
        int exponent = 0;
        if (largest > 0 && poison == 0) frexpf(largest, &exponent);
        exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
        float factor = ldexpf(1, -exponent);
        for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor;
        unit[g] = ldexpf(1, exponent);
        norm[g] = (float)sqrt(dot(n, y, y));
    }
}

/* A Krylov space of at most m dimensions, in double: for each group the triangular factor R [m][m] (by columns), the
 * rotations (cos, sin) [m][2], and the right-hand side [m + 1] of min ||beta e_1 - H c||. */
static double *state_of(double *state, int64_t g, int64_t m) { return state + g * (m * m + 3 * m + 1); }

/* Starts the spaces: r becomes q_1 = r / ||r||, 0 where r is. */
void start(int64_t groups, int64_t n, float *r, double *state, int64_t m, int64_t *next) {
    for (int64_t g; (g = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < groups;) {
        float *q = r + g * n;
        double length = sqrt(dot(n, q, q));
        float factor = length == 0 ? 0.0f : (float)(1 / length);
        for (int64_t i = 0; i < n; i++) q[i] *= factor;
        state_of(state, g, m)[m * m + 2 * m] = length;
    }
}

/* For each group: w = q_k - image, made orthogonal to q_1..q_k by modified Gram-Schmidt and normalised, overwrites
 * image; a w below `noise` times its length before is noise, and becomes 0. Its coefficients, column k of H, are turned
 * by Givens rotations; predicted [groups] gets the residual norm of the least-squares problem. */
void extend(int64_t groups, int64_t n, int64_t k, const float *const *basis, float *image, double *state, int64_t m,
            int64_t passes, float noise, float *predicted, int64_t *next) {
    for (int64_t g; (g = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < groups;) {
        float *w = image + g * n;
        const float *newest = basis[k - 1] + g * n;
        double *column = state_of(state, g, m) + (k - 1) * m, *rotation = state_of(state, g, m) + m * m;
        double *right = rotation + 2 * m;
        for (int64_t i = 0; i < n; i++) w[i] = newest[i] - w[i];
        double before = sqrt(dot(n, w, w));
        for (int64_t j = 0; j < k; j++) column[j] = 0;
        for (int64_t pass = 0; pass < passes; pass++)
            for (int64_t j = 0; j < k; j++) {
                const float *q = basis[j] + g * n;
                float c = (float)dot(n, q, w);
                for (int64_t i = 0; i < n; i++) w[i] -= c * q[i];
                column[j] += c;
            }
        double length = sqrt(dot(n, w, w));
        if (length <= noise * before) length = 0; /* also NaN stays NaN */
        float unit = length == 0 ? 0.0f : (float)(1 / length);
        for (int64_t i = 0; i < n; i++) w[i] *= unit;

        for (int64_t i = 0; i + 1 < k; i++) {
            double upper = column[i], lower = column[i + 1], cosine = rotation[2 * i], sine = rotation[2 * i + 1];
            column[i] = cosine * upper + sine * lower;
            column[i + 1] = cosine * lower - sine * upper;
        }
        double radius = hypot(column[k - 1], length);
        double cosine = radius > 0 ? column[k - 1] / radius : 1, sine = radius > 0 ? length / radius : 0;
        if (isnan(radius)) cosine = sine = radius;
        rotation[2 * k - 2] = cosine;
        rotation[2 * k - 1] = sine;
        column[k - 1] = radius;
        right[k] = -sine * right[k - 1];
        right[k - 1] *= cosine;
        predicted[g] = (float)fabs(right[k]);
    }
}

/* y += c_1 q_1 + ... + c_k q_k with R c = right; an exhausted direction gets 0. The residual, the basis q_1..q_{k+1} times
 * the right-hand side that is left with its rotations turned back, overwrites q_{k+1}; norm [groups] is its length. */
void finish(int64_t groups, int64_t n, int64_t k, float *const *basis, float *y, double *state, int64_t m, float *norm,
            int64_t *next) {
    for (int64_t g; (g = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < groups;) {
        double *r = state_of(state, g, m), *rotation = r + m * m, *c = rotation + 2 * m; /* the solution overwrites */
        double rest = c[k];                                                             /* the right-hand side */
        for (int64_t i = k - 1; i >= 0; i--) {
            for (int64_t j = i + 1; j < k; j++) c[i] -= r[j * m + i] * c[j];
            c[i] = r[i * m + i] == 0 ? 0 : c[i] / r[i * m + i];
        }
        float *left = basis[k] + g * n, *to = y + g * n;
        double below = rest; /* coefficient of q_{i+1} before rotation i is turned back */
        for (int64_t i = k - 1; i >= 0; i--) {
            double sine = rotation[2 * i + 1], own = rotation[2 * i] * below;
            rotation[2 * i] = own; /* of q_{i+2}, counted from 1 */
            below = -sine * below;
        }
        for (int64_t i = 0; i < n; i++) left[i] *= (float)rotation[2 * k - 2];
        for (int64_t j = 0; j < k; j++) {
            const float *q = basis[j] + g * n;
            float own = (float)(j ? rotation[2 * j - 2] : below), share = (float)c[j];
            for (int64_t i = 0; i < n; i++) to[i] += share * q[i];
            for (int64_t i = 0; i < n; i++) left[i] += own * q[i];
        }
        norm[g] = (float)sqrt(dot(n, left, left));
    }
}

/* The vector work of a linear solve in float32, one pass over memory; ide_snn/solvers has the mathematics.
 *
 * Each kernel takes groups from a shared counter until there are none, so that any number of threads may run it.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define SUMS 4 /* independent partial sums hide the latency of an addition */

typedef float Lanes __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef double Wide __attribute__((vector_size(8 * WIDTH)));

typedef struct {
    int64_t groups, n;   /* of the vectors [groups][n] */
    int64_t count;       /* of the groups to work on, open[0..count - 1]; all where open is NULL */
    int64_t k, m;        /* of the Krylov space: vectors in use, and dimensions at most */
    int64_t passes;      /* of Gram-Schmidt */
    const float *b;      /* [groups][n] */
    float *y, *image;    /* [groups][n]; image [count][n] in the order of `open` */
    float *const *basis; /* k + 1 vectors [some groups][n] */
    const int64_t *const *rows; /* of each, the row of every group in it; NULL: its number */
    const int64_t *open;
    int64_t *dimensions; /* [groups], of the space of each */
    double *state;       /* [groups][m * m + 3 * m + 1], see state_of */
    float *unit;         /* [groups], powers of two */
    double *norm, *length; /* [groups]; of what, each kernel says */
    double noise;
    int64_t padding[8];  /* what threads write is not in the cache line of what they read */
    int64_t next;        /* group to be taken by the next thread; starts at 0 */
} Work;

#define WORTH_TAKING 8192 /* numbers */

/* The next group of this thread after *g, of those up to *end that it has taken. */
static inline int next_group(Work *w, int64_t *g, int64_t *end) {
    if (++*g < *end) return 1;
    int64_t some = w->n < WORTH_TAKING ? WORTH_TAKING / (w->n + 1) + 1 : 1, all = w->open ? w->count : w->groups;
    *g = __atomic_fetch_add(&w->next, some, __ATOMIC_RELAXED);
    *end = *g + some < all ? *g + some : all;
    return *g < *end;
}

#define FOR_GROUPS(w) for (int64_t g = -1, end = 0; next_group(w, &g, &end);)

/* Basis vector j of group g. */
static inline float *vector(const Work *w, int64_t j, int64_t g) {
    return w->basis[j] + (w->rows[j] ? w->rows[j][g] : g) * w->n;
}

static double dot(int64_t n, const float *x, const float *y) {
    Lanes sums[SUMS] = {0};
    int64_t i = 0;
    for (; i + SUMS * WIDTH <= n; i += SUMS * WIDTH)
        for (int k = 0; k < SUMS; k++) sums[k] += *(const Lanes *)(x + i + k * WIDTH) * *(const Lanes *)(y + i + k * WIDTH);
    double total = 0;
    Wide wide = {0};
    for (int k = 0; k < SUMS; k++) wide += __builtin_convertvector(sums[k], Wide);
    for (int j = 0; j < WIDTH; j++) total += wide[j];
    for (; i < n; i++) total += (double)x[i] * y[i];
    return total;
}

/* r = b + image - y, which overwrites image, and its norm, for each group. */
void residual(Work *w) {
    int64_t n = w->n;
    FOR_GROUPS(w) {
        const float *b = w->b + g * n, *y = w->y + g * n;
        float *r = w->image + g * n;
        for (int64_t i = 0; i < n; i++) r[i] = (b[i] + r[i]) - y[i];
        w->norm[g] = sqrt(dot(n, r, r));
    }
}

/* y = b / unit with unit a power of two near the largest |b| of the group (1 where that is 0 or not finite), and
 * norm = ||y||. */
void rescale(Work *w) {
    int64_t n = w->n;
    FOR_GROUPS(w) {
        const float *x = w->b + g * n;
        float *y = w->y + g * n, largest;
        int32_t bits = 0; /* those of |x| are ordered as |x| is, infinity and NaN last */
        for (int64_t i = 0; i < n; i++) {
            int32_t own;
            memcpy(&own, x + i, sizeof own);
            own &= 0x7fffffff;
            bits = own > bits ? own : bits;
        }
        memcpy(&largest, &bits, sizeof largest);
        int exponent = 0;
        if (largest > 0 && isfinite(largest)) frexpf(largest, &exponent);
        exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
        float factor = ldexpf(1, -exponent);
        for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor;
        w->unit[g] = ldexpf(1, exponent);
        w->norm[g] = sqrt(dot(n, y, y));
    }
}

/* A Krylov space of at most m dimensions, in double: for each group the triangular factor R [m][m] (by columns), the
 * rotations (cos, sin) [m][2], and the right-hand side [m + 1] of min ||beta e_1 - H c||. */
static double *state_of(const Work *w, int64_t g) { return w->state + g * (w->m * w->m + 3 * w->m + 1); }

/* Starts the spaces: y becomes q_1 = b / ||b||, 0 where b is. */
void start(Work *w) {
    FOR_GROUPS(w) {
        const float *b = w->b + g * w->n;
        float *q = w->y + g * w->n;
        double length = sqrt(dot(w->n, b, b));
        float factor = length == 0 ? 0.0f : (float)(1 / length);
        for (int64_t i = 0; i < w->n; i++) q[i] = b[i] * factor;
        state_of(w, g)[w->m * w->m + 2 * w->m] = length;
    }
}

/* For each open group: x = q_k - image, made orthogonal to q_1..q_k by modified Gram-Schmidt and normalised, overwrites
 * image; an x below `noise` times its length before is noise, and becomes 0. Its coefficients, column k of H, are turned
 * by Givens rotations; norm [groups] gets the residual norm of the least-squares problem. */
void extend(Work *w) {
    int64_t n = w->n, k = w->k, m = w->m;
    for (int64_t i = -1, end = 0; next_group(w, &i, &end);) {
        int64_t g = w->open ? w->open[i] : i;
        float *x = w->image + i * n;
        const float *newest = vector(w, k - 1, g);
        double *column = state_of(w, g) + (k - 1) * m, *rotation = state_of(w, g) + m * m;
        double *right = rotation + 2 * m;
        for (int64_t i = 0; i < n; i++) x[i] = newest[i] - x[i];
        double before = sqrt(dot(n, x, x));
        for (int64_t j = 0; j < k; j++) column[j] = 0;
        for (int64_t pass = 0; pass < w->passes; pass++)
            for (int64_t j = 0; j < k; j++) {
                const float *q = vector(w, j, g);
                float c = (float)dot(n, q, x);
                for (int64_t i = 0; i < n; i++) x[i] -= c * q[i];
                column[j] += c;
            }
        double length = sqrt(dot(n, x, x));
        if (length <= w->noise * before) length = 0; /* also NaN stays NaN */
        float unit = length == 0 ? 0.0f : (float)(1 / length);
        for (int64_t i = 0; i < n; i++) x[i] *= unit;

        for (int64_t i = 0; i + 1 < k; i++) {
            double upper = column[i], lower = column[i + 1], cosine = rotation[2 * i], sine = rotation[2 * i + 1];
            column[i] = cosine * upper + sine * lower;
            column[i + 1] = cosine * lower - sine * upper;
        }
        double radius = hypot(column[k - 1], length);
        /* An image in the span of those before it reduces nothing: its coefficient is 0, and all that is left stays. */
        int useless = radius <= w->noise * before;
        double cosine = useless ? 0 : column[k - 1] / radius, sine = useless ? 1 : length / radius;
        if (useless) radius = 0;
        if (isnan(radius)) cosine = sine = radius;
        rotation[2 * k - 2] = cosine;
        rotation[2 * k - 1] = sine;
        column[k - 1] = radius;
        right[k] = -sine * right[k - 1];
        right[k - 1] *= cosine;
        w->norm[g] = fabs(right[k]);
        w->dimensions[g] = k;
    }
}

/* y = b (NULL: 0) + c_1 q_1 + ... + c_k q_k with R c = right; a useless direction gets 0. The residual, the basis q_1..q_{k+1} times
 * the right-hand side that is left with its rotations turned back, goes to image, which may be q_{k+1}; norm [groups] is
 * its own, and length [groups] that of y. k is the group's own. */
void finish(Work *w) {
    int64_t n = w->n, m = w->m;
    FOR_GROUPS(w) {
        int64_t k = w->dimensions[g];
        double *r = state_of(w, g), *rotation = r + m * m, *c = rotation + 2 * m;
        double rest[2] = {c[k], 0}; /* coefficient of q_{i+2} before rotation i is turned back, and after */
        for (int64_t i = k - 1; i >= 0; i--) {
            for (int64_t j = i + 1; j < k; j++) c[i] -= r[j * m + i] * c[j];
            c[i] = r[i * m + i] == 0 ? 0 : c[i] / r[i * m + i];
            rest[1] = rotation[2 * i] * rest[0];
            rest[0] = -rotation[2 * i + 1] * rest[0];
            rotation[2 * i] = rest[1]; /* now that of q_{i+2}; rest[0] is that of q_1 in the end */
        }
        const float *last = vector(w, k, g);
        float *left = w->image + g * n, *y = w->y + g * n;
        for (int64_t i = 0; i < n; i++) left[i] = last[i] * (float)rotation[2 * k - 2];
        for (int64_t j = 0; j < k; j++) {
            const float *q = vector(w, j, g);
            float share = (float)c[j], of_rest = (float)(j ? rotation[2 * j - 2] : rest[0]);
            const float *before = j ? y : w->b ? w->b + g * n : 0;
            if (before)
                for (int64_t i = 0; i < n; i++) y[i] = before[i] + share * q[i];
            else
                for (int64_t i = 0; i < n; i++) y[i] = share * q[i];
            for (int64_t i = 0; i < n; i++) left[i] += of_rest * q[i];
        }
        w->norm[g] = sqrt(dot(n, left, left));
        w->length[g] = sqrt(dot(n, y, y));
    }
}

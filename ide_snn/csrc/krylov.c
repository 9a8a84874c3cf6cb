/* The vector work of a linear solve in float32, one pass over memory; ide_snn/solvers has the mathematics.
 *
 * Each kernel takes groups from a shared counter until there are none, so that any number of threads may run it.
 */

#include <math.h>
#include "apply.h"
#include "vectors.h"

typedef double Wide __attribute__((vector_size(8 * WIDTH)));

typedef struct {
    int64_t groups, n;     /* of the vectors [groups][n] */
    const float *b;
    float *y, *image;
    float *unit;           /* [groups], powers of two */
    double *norm;          /* [groups]; of what, each kernel says */
    int64_t padding[8];    /* what threads write is not in the cache line of what they read */
    int64_t next;          /* group to be taken by the next thread; starts at 0 */
} Work;

#define WORTH_TAKING 8192 /* numbers */

/* The next group of this thread after *g, of those up to *end that it has taken. */
static inline int next_group(Work *w, int64_t *g, int64_t *end) {
    if (++*g < *end) return 1;
    int64_t some = w->n < WORTH_TAKING ? WORTH_TAKING / (w->n + 1) + 1 : 1;
    *g = __atomic_fetch_add(&w->next, some, __ATOMIC_RELAXED);
    *end = *g + some < w->groups ? *g + some : w->groups;
    return *g < *end;
}

#define FOR_GROUPS(w) for (int64_t g = -1, end = 0; next_group(w, &g, &end);)

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

/* The exponent of a power of two near the largest |x|; 0 where that is 0 or not finite. */
static int exponent_of(int64_t n, const float *x) {
    float largest;
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
    return exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
}

/* y = b / unit with unit a power of two near the largest |b| of the group (1 where that is 0 or not finite), and
 * norm = ||y||. */
void rescale(Work *w) {
    int64_t n = w->n;
    FOR_GROUPS(w) {
        const float *x = w->b + g * n;
        float *y = w->y + g * n;
        int exponent = exponent_of(n, x);
        float factor = ldexpf(1, -exponent);
        for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor;
        w->unit[g] = ldexpf(1, exponent);
        w->norm[g] = sqrt(dot(n, y, y));
    }
}

/* One factor of A. */
typedef struct {
    Apply apply;
    const void *factor;
    int64_t size;               /* numbers per sample of y */
} Factor;

/* GMRES without restarts, each group in a Krylov space of its own. A thread takes `together` groups, and multiplies those
 * of them that are not solved. */
typedef struct {
    int64_t groups, n, together;
    int64_t m, passes;          /* dimensions at most; of Gram-Schmidt */
    const Factor *factors;      /* of A, the one that is applied first at the front */
    int64_t count;              /* of them */
    const float *b, *start;     /* [groups][n] right-hand sides; added to the solutions, or NULL */
    float *y, *residual;        /* [groups][n]; the second may be NULL */
    const double *rhs;          /* [groups] what norms are relative to; NULL: ||b|| */
    double *norm, *length;      /* [groups] of the residual and its rounding, and of y, relative to rhs; 0 where that is */
    int64_t *dimensions;        /* [groups] used: products */
    double enough;              /* relative norm of a residual that needs no further dimension */
    double noise;
    double rounding;            /* of A v by the factors, in units of ||A v||; 0: as float32 */
    char *memory;
    int64_t room[4];            /* bytes of a thread's memory: of its basis, its states, a product between factors, and scratch */
    int64_t padding[8];         /* what threads write is not in the cache line of what they read */
    int64_t next, threads;      /* first group to be taken by the next thread, and threads that have memory; both start at 0 */
    int64_t finished;           /* groups; starts at 0 */
    double worst, longest;      /* of all norms, NaN if one is, and of all lengths */
    int64_t most, total;        /* of the dimensions */
} Solve;

/* The space of one group: q_0..q_m, `stride` numbers apart, and in double the triangular factor R [m][m] (by columns), the
 * rotations (cos, sin) [m][2], and the right-hand side [m + 1] of min ||beta e_1 - H c||; and the norms of A q_0..A q_{m-1}, where
 * they are rounded. */
typedef struct {
    float *basis;
    double *r, *rotation, *right, *image;
    int64_t stride, k, group;
    double rhs;
    double beta; /* ||b||; sums of squares are of vectors in units of it: float32 holds those of no small b */
} Space;

static int64_t state_size(int64_t m) { return m * m + 4 * m + 1; }

/* q_0 = b / ||b||, 0 where b is. Returns the norm of the residual. */
static double begin(const Solve *w, Space *s) {
    const float *b = w->b + s->group * w->n;
    int exponent = exponent_of(w->n, b);
    float scale = ldexpf(1, -exponent);
    for (int64_t i = 0; i < w->n; i++) s->basis[i] = b[i] * scale;
    double length = sqrt(dot(w->n, s->basis, s->basis));
    float factor = length == 0 ? 0.0f : (float)(1 / length);
    for (int64_t i = 0; i < w->n; i++) s->basis[i] *= factor;
    s->beta = ldexp(length, exponent);
    s->right[0] = 1;
    s->k = 0;
    s->rhs = w->rhs ? w->rhs[s->group] : s->beta;
    return s->beta;
}

/* From A q_k, which lies at q_{k+1}: (1 - A) q_k, made orthogonal to q_0..q_k by modified Gram-Schmidt and normalised, becomes
 * q_{k+1}; where it falls below `noise` times its length before it is noise, and becomes 0. Its coefficients, a column of H,
 * are turned into one of R by the rotations so far and a new one. Returns the norm of the residual that is left. */
static double extend(const Solve *w, Space *s) {
    int64_t n = w->n, k = s->k++;
    float *x = s->basis + s->stride * (k + 1);
    const float *newest = s->basis + s->stride * k;
    double *column = s->r + k * w->m;
    if (w->rounding) s->image[k] = sqrt(dot(n, x, x));
    for (int64_t i = 0; i < n; i++) x[i] = newest[i] - x[i];
    double before = sqrt(dot(n, x, x));
    for (int64_t j = 0; j <= k; j++) column[j] = 0;
    for (int64_t pass = 0; pass < w->passes; pass++)
        for (int64_t j = 0; j <= k; j++) {
            const float *q = s->basis + s->stride * j;
            float c = (float)dot(n, q, x);
            for (int64_t i = 0; i < n; i++) x[i] -= c * q[i];
            column[j] += c;
        }
    double length = sqrt(dot(n, x, x));
    if (length <= w->noise * before) length = 0; /* also NaN stays NaN */
    float unit = length == 0 ? 0.0f : (float)(1 / length);
    for (int64_t i = 0; i < n; i++) x[i] *= unit;

    for (int64_t i = 0; i < k; i++) {
        double upper = column[i], lower = column[i + 1], cosine = s->rotation[2 * i], sine = s->rotation[2 * i + 1];
        column[i] = cosine * upper + sine * lower;
        column[i + 1] = cosine * lower - sine * upper;
    }
    double radius = hypot(column[k], length);
    /* An image in the span of those before it reduces nothing: its coefficient is 0, and all that is left stays. */
    int useless = radius <= w->noise * before;
    double cosine = useless ? 0 : column[k] / radius, sine = useless ? 1 : length / radius;
    if (useless) radius = 0;
    if (isnan(radius)) cosine = sine = radius;
    s->rotation[2 * k] = cosine;
    s->rotation[2 * k + 1] = sine;
    column[k] = radius;
    s->right[k + 1] = -sine * s->right[k];
    s->right[k] *= cosine;
    return fabs(s->right[k + 1]) * s->beta;
}

/* ||x|| / unit for a unit of the size of x or larger. */
static double length_in(int64_t n, const float *x, double unit) {
    if (unit > 1e-10 && unit < 1e10) return sqrt(dot(n, x, x)) / unit;
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += (double)x[i] * x[i];
    return sqrt(total) / unit;
}

/* y = start + c_0 q_0 + ... + c_{k-1} q_{k-1} with R c = right; a useless direction gets 0. The residual is the basis q_0..q_k
 * times the right-hand side that is left with its rotations turned back; it overwrites q_k. */
static void finish(const Solve *w, Space *s) {
    int64_t n = w->n, k = s->k, g = s->group;
    double *c = s->right, *rotation = s->rotation;
    double rest[2] = {c[k], c[k]}; /* coefficient of q_{i+1} before rotation i is turned back, and after */
    for (int64_t i = k - 1; i >= 0; i--) {
        for (int64_t j = i + 1; j < k; j++) c[i] -= s->r[j * w->m + i] * c[j];
        c[i] = s->r[i * w->m + i] == 0 ? 0 : c[i] / s->r[i * w->m + i];
        rest[1] = rotation[2 * i] * rest[0];
        rest[0] = -rotation[2 * i + 1] * rest[0];
        rotation[2 * i] = rest[1]; /* now that of q_{i+1}; rest[0] is that of q_0 in the end */
    }
    const float *start = w->start ? w->start + g * n : 0;
    double beta = s->beta, rhs = s->rhs;
    float *left = s->basis + s->stride * k, *y = w->y + g * n, own = (float)(k ? rotation[2 * k - 2] : rest[0]);
    for (int64_t i = 0; i < n; i++) left[i] *= own;
    if (!k)
        for (int64_t i = 0; i < n; i++) y[i] = start ? start[i] : 0;
    for (int64_t j = 0; j < k; j++) {
        const float *q = s->basis + s->stride * j, *before = j ? y : start;
        float share = (float)(c[j] * beta), of_rest = (float)(j ? rotation[2 * j - 2] : rest[0]);
        if (before)
            for (int64_t i = 0; i < n; i++) y[i] = before[i] + share * q[i];
        else
            for (int64_t i = 0; i < n; i++) y[i] = share * q[i];
        for (int64_t i = 0; i < n; i++) left[i] += of_rest * q[i];
    }
    w->dimensions[g] = k;
    w->length[g] = rhs == 0 ? 0 : length_in(n, y, rhs);
    double rounding = 0; /* of the residual: that of A y, at most */
    for (int64_t j = 0; w->rounding && j < k; j++) rounding += w->rounding * fabs(c[j]) * s->image[j];
    w->norm[g] = rhs == 0 ? 0 : (sqrt(dot(n, left, left)) + rounding) * beta / rhs;
    if (w->residual)
        for (int64_t i = 0; i < n; i++) w->residual[g * n + i] = left[i] * (float)beta;
}

/* What all groups have in common, by the thread that finished the last of them. */
static void sum_up(Solve *w) {
    w->worst = w->longest = w->most = w->total = 0;
    for (int64_t g = 0; g < w->groups; g++) {
        if (!(w->norm[g] <= w->worst)) w->worst = isnan(w->worst) ? w->worst : w->norm[g];
        if (!(w->length[g] <= w->longest)) w->longest = isnan(w->longest) ? w->longest : w->length[g];
        w->most = w->dimensions[g] > w->most ? w->dimensions[g] : w->most;
        w->total += w->dimensions[g];
    }
}

/* The q_{k+1} of `open` spaces = A q_k, from factor to factor through `between`. */
static void multiply(const Solve *w, int64_t open, Space *const *spaces, char *between, char *scratch) {
    int64_t samples[open];
    const float *from[open];
    float *to[open];
    for (int64_t i = 0; i < open; i++) {
        samples[i] = spaces[i]->group;
        from[i] = spaces[i]->basis + spaces[i]->stride * spaces[i]->k;
    }
    for (int64_t f = 0; f < w->count; f++) {
        for (int64_t i = 0; i < open; i++)
            to[i] = f + 1 < w->count ? (float *)(between + f % 2 * w->room[2]) + i * w->factors[f].size
                                     : spaces[i]->basis + spaces[i]->stride * (spaces[i]->k + 1);
        w->factors[f].apply(w->factors[f].factor, scratch, open, samples, from, to);
        for (int64_t i = 0; i < open; i++) from[i] = to[i];
    }
}

void gmres(Solve *w) {
    char *mine = w->memory + __atomic_fetch_add(&w->threads, 1, __ATOMIC_RELAXED) * (w->room[0] + w->room[1] + 2 * w->room[2] + w->room[3]);
    float *basis = (float *)mine;
    double *state = (double *)(mine + w->room[0]);
    char *between = (char *)state + w->room[1], *scratch = between + 2 * w->room[2];
    for (int64_t first; (first = __atomic_fetch_add(&w->next, w->together, __ATOMIC_RELAXED)) < w->groups;) {
        int64_t groups = w->groups - first < w->together ? w->groups - first : w->together, open = 0;
        Space spaces[groups], *unsolved[groups];
        for (int64_t i = 0; i < groups; i++) {
            double *r = state + i * state_size(w->m), *rotation = r + w->m * w->m;
            double *right = rotation + 2 * w->m;
            spaces[i] = (Space){basis + i * w->n, r, rotation, right, right + w->m + 1, w->together * w->n, 0, first + i, 0, 0};
            double left = begin(w, spaces + i);
            if (left > w->enough * spaces[i].rhs && left < INFINITY) unsolved[open++] = spaces + i;
        }
        for (int64_t k = 0; open && k < w->m; k++) {
            multiply(w, open, unsolved, between, scratch);
            int64_t kept = 0;
            for (int64_t i = 0; i < open; i++) {
                double left = extend(w, unsolved[i]);
                if (left > w->enough * unsolved[i]->rhs && left < INFINITY) unsolved[kept++] = unsolved[i];
            }
            open = kept;
        }
        for (int64_t i = 0; i < groups; i++) finish(w, spaces + i);
        if (__atomic_add_fetch(&w->finished, groups, __ATOMIC_ACQ_REL) == w->groups) sum_up(w);
    }
}

/* The norm constraint of a matrix in float32; ide_snn/optimizations.py has the mathematics.
 *
 * Threads take chunks of the matrix from a shared counter. Where a phase needs all chunks of the one before, they wait for
 * each other; any number of threads may run a kernel, and every sum has its order whatever their number is.
 */

#include <math.h>

#include "vectors.h"

#define CHUNK 64 /* columns, or 16 rows */
#define ROWS 16

typedef struct {
    int64_t next, done; /* chunks taken and finished; start at 0 */
    int64_t padding[6];
} Phase;

typedef struct {
    int64_t rows, columns;
    const float *matrix;    /* [rows][columns] */
    float *u, *v;           /* [rows], [columns] */
    float *kept_u, *kept_v; /* what `step` makes of them once more, or NULL */
    const float *g;         /* [rows][columns] */
    float *result;          /* [rows][columns] */
    double *sums;           /* room for one per row or column */
    const float *alpha;     /* or NULL */
    double bound;
    double s, scale, p;     /* s is the result of `step`, p that of `pull` */
    float factor;           /* result of `step` with an alpha */
    int64_t padding[8];     /* what threads write is not in the cache line of what they read */
    Phase phases[3];
} Work;

/* The next chunk of a phase, or -1 when all are taken and finished. */
static inline int64_t next_chunk(Phase *p, int64_t chunks, int64_t before) {
    if (before >= 0) __atomic_fetch_add(&p->done, 1, __ATOMIC_RELEASE);
    int64_t chunk = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED);
    if (chunk < chunks) return chunk;
    while (__atomic_load_n(&p->done, __ATOMIC_ACQUIRE) < chunks) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    return -1;
}

#define FOR_CHUNKS(p, chunks) for (int64_t chunk = -1; (chunk = next_chunk(p, chunks, chunk)) >= 0;)

static float dot(int64_t n, const float *x, const float *y) {
    Lanes sums[SUMS] = {0};
    float total = 0;
    int64_t i = 0;
    for (; i + SUMS * WIDTH <= n; i += SUMS * WIDTH)
        for (int k = 0; k < SUMS; k++) sums[k] += *(const Lanes *)(x + i + k * WIDTH) * *(const Lanes *)(y + i + k * WIDTH);
    for (int k = 1; k < SUMS; k++) sums[0] += sums[k];
    for (int j = 0; j < WIDTH; j++) total += sums[0][j];
    for (; i < n; i++) total += x[i] * y[i];
    return total;
}

static double norm(int64_t n, const double *x) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += x[i] * x[i];
    return sqrt(total);
}

/* One step of the power iteration: v = M^T u / ||M^T u||, u = M v / ||M v||, and s = ||M v|| = <u, M v>; and what M is to be
 * multiplied by, factor = clip(alpha, -bound, bound) / s. */
void step(Work *w) {
    int64_t rows = w->rows, columns = w->columns;
    double *of_v = w->sums, *of_u = w->sums + columns;
    FOR_CHUNKS(w->phases, (columns + CHUNK - 1) / CHUNK) {
        int64_t first = chunk * CHUNK, n = columns - first < CHUNK ? columns - first : CHUNK;
        float sums[CHUNK] = {0};
        for (int64_t i = 0; i < rows; i++) {
            const float *row = w->matrix + i * columns + first;
            if (n == CHUNK)
                for (int64_t j = 0; j < CHUNK; j++) sums[j] += w->u[i] * row[j];
            else
                for (int64_t j = 0; j < n; j++) sums[j] += w->u[i] * row[j];
        }
        for (int64_t j = 0; j < n; j++) of_v[first + j] = sums[j];
    }
    double length = norm(columns, of_v);
    FOR_CHUNKS(w->phases + 1, (columns + CHUNK - 1) / CHUNK)
        for (int64_t j = chunk * CHUNK; j < columns && j < (chunk + 1) * CHUNK; j++) {
            w->v[j] = (float)(of_v[j] / length);
            if (w->kept_v) w->kept_v[j] = w->v[j];
        }
    FOR_CHUNKS(w->phases + 2, (rows + ROWS - 1) / ROWS)
        for (int64_t i = chunk * ROWS; i < rows && i < (chunk + 1) * ROWS; i++)
            of_u[i] = dot(columns, w->matrix + i * columns, w->v);
    if (__atomic_exchange_n(&w->phases[0].padding[0], 1, __ATOMIC_RELAXED)) return; /* the first one here does the rest */
    w->s = norm(rows, of_u);
    for (int64_t i = 0; i < rows; i++) w->u[i] = (float)(of_u[i] / w->s);
    if (w->kept_u) memcpy(w->kept_u, w->u, rows * sizeof *w->u);
    if (!w->alpha) return;
    float bound = (float)w->bound, alpha = *w->alpha;
    w->factor = (alpha < -bound ? -bound : alpha > bound ? bound : alpha) / (float)w->s;
}

/* result = scale (g - p u v^T) with p = <g, M> / s; it may be g. */
void pull(Work *w) {
    int64_t rows = w->rows, columns = w->columns;
    FOR_CHUNKS(w->phases, (rows + ROWS - 1) / ROWS)
        for (int64_t i = chunk * ROWS; i < rows && i < (chunk + 1) * ROWS; i++)
            w->sums[i] = dot(columns, w->g + i * columns, w->matrix + i * columns);
    double p = 0;
    for (int64_t i = 0; i < rows; i++) p += w->sums[i];
    p /= w->s;
    float scale = (float)w->scale;
    FOR_CHUNKS(w->phases + 1, (rows + ROWS - 1) / ROWS)
        for (int64_t i = chunk * ROWS; i < rows && i < (chunk + 1) * ROWS; i++) {
            const float *g = w->g + i * columns, *v = w->v;
            float *to = w->result + i * columns, share = (float)(p * w->u[i]);
            INDEPENDENT
            for (int64_t j = 0; j < columns; j++) to[j] = scale * (g[j] - share * v[j]);
        }
    if (!__atomic_exchange_n(&w->phases[0].padding[0], 1, __ATOMIC_RELAXED)) w->p = p;
}

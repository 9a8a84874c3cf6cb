/* Products of a few vectors with a dense matrix in float32, as the factors of a solve (csrc/krylov.c).
 *
 * Every number of a product has one sum over the inputs, in their order, whatever other vectors are multiplied with it: the
 * result does not depend on how samples are put together, nor on the number of threads.
 */

#include <stdint.h>
#include <string.h>

/* A tile of ROWS vectors and COLUMNS outputs, whose sums stay in registers. */
#if defined(__AVX512F__)
#define WIDTH 16
#define ROWS 8
#elif defined(__AVX__)
#define WIDTH 8
#define ROWS 6
#else
#define WIDTH 4
#define ROWS 4
#endif
#define VECTORS 2
#define COLUMNS (VECTORS * WIDTH)

typedef float Lanes __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

typedef struct {
    int64_t inputs, outputs;
    const float *weight; /* [blocks][inputs][COLUMNS], zero behind the last output */
    const float *scale;  /* [B][inputs] or NULL */
} Dense;

int64_t columns(void) { return COLUMNS; }

typedef struct {
    int64_t inputs, outputs;
    const float *weight; /* [inputs][outputs] */
    float *packed;       /* as in Dense */
    int64_t next;        /* block to be taken by the next thread; starts at 0 */
} Pack;

void pack(Pack *w) {
    for (int64_t b; (b = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) * COLUMNS < w->outputs;) {
        int64_t left = w->outputs - b * COLUMNS, n = left < COLUMNS ? left : COLUMNS;
        const float *from = w->weight + b * COLUMNS;
        float *to = w->packed + b * w->inputs * COLUMNS;
        for (int64_t p = 0; p < w->inputs; p++, from += w->outputs, to += COLUMNS) {
            memcpy(to, from, n * sizeof(float));
            memset(to + n, 0, (COLUMNS - n) * sizeof(float));
        }
    }
}

/* y[i][0..n - 1] = sum over p of x[i][p] * weight[p][0..n - 1] for i < rows, which is a constant. */
static inline __attribute__((always_inline)) void tile(int rows, int64_t inputs, const float *x, const float *weight, int64_t n,
                                                       float *const *y) {
    Lanes sum[ROWS][VECTORS] = {0};
    for (int64_t p = 0; p < inputs; p++, weight += COLUMNS)
        for (int i = 0; i < rows; i++) {
            float value = x[i * inputs + p];
            for (int j = 0; j < VECTORS; j++) sum[i][j] += value * *(const Lanes *)(weight + j * WIDTH);
        }
    for (int i = 0; i < rows; i++) memcpy(y[i], sum[i], n * sizeof(float));
}

/* y[i] = (scale * x[i]) weight for the samples; scratch holds count * inputs numbers. */
void multiply(const Dense *k, char *scratch, int64_t count, const int64_t *samples, const float *const *x, float *const *y) {
    float *scaled = (float *)scratch;
    for (int64_t i = 0; i < count; i++) {
        float *to = scaled + i * k->inputs;
        const float *scale = k->scale ? k->scale + samples[i] * k->inputs : 0;
        for (int64_t p = 0; p < k->inputs; p++) to[p] = scale ? x[i][p] * scale[p] : x[i][p];
    }
    for (int64_t b = 0; b * COLUMNS < k->outputs; b++) {
        const float *weight = k->weight + b * k->inputs * COLUMNS;
        int64_t left = k->outputs - b * COLUMNS, n = left < COLUMNS ? left : COLUMNS;
        for (int64_t i = 0; i < count; i += ROWS) {
            float *to[ROWS];
            const float *from = scaled + i * k->inputs;
            int64_t rows = count - i < ROWS ? count - i : ROWS;
            for (int64_t j = 0; j < rows; j++) to[j] = y[i + j] + b * COLUMNS;
            switch (rows) {
                case 1: tile(1, k->inputs, from, weight, n, to); break;
                case 2: tile(2, k->inputs, from, weight, n, to); break;
                case 3: tile(3, k->inputs, from, weight, n, to); break;
                case 4: tile(4, k->inputs, from, weight, n, to); break;
#if ROWS > 4
                case 5: tile(5, k->inputs, from, weight, n, to); break;
                case 6: tile(6, k->inputs, from, weight, n, to); break;
#endif
#if ROWS > 6
                case 7: tile(7, k->inputs, from, weight, n, to); break;
                case 8: tile(8, k->inputs, from, weight, n, to); break;
#endif
            }
        }
    }
}

typedef struct {
    const Dense *factor;
    int64_t batch, together; /* samples, and those that a thread takes at a time */
    const float *x;          /* [batch][inputs] */
    float *y;                /* [batch][outputs] */
    char *memory;
    int64_t room;            /* bytes of a thread's scratch memory */
    int64_t next, threads;   /* sample to be taken by the next thread, and threads that have memory; both start at 0 */
} Product;

/* y = (scale * x) weight for all samples. */
void product(Product *w) {
    const Dense *k = w->factor;
    char *scratch = w->memory + __atomic_fetch_add(&w->threads, 1, __ATOMIC_RELAXED) * w->room;
    for (int64_t first; (first = __atomic_fetch_add(&w->next, w->together, __ATOMIC_RELAXED)) < w->batch;) {
        int64_t count = w->batch - first < w->together ? w->batch - first : w->together, samples[count];
        const float *x[count];
        float *y[count];
        for (int64_t i = 0; i < count; i++) {
            samples[i] = first + i;
            x[i] = w->x + (first + i) * k->inputs;
            y[i] = w->y + (first + i) * k->outputs;
        }
        multiply(k, scratch, count, samples, x, y);
    }
}

/* Products of a few vectors with a dense matrix in float32, as the factors of a solve (csrc/krylov.c).
 *
 * The order of a sum over the inputs depends on the zeros of its own sample alone, whatever other vectors are multiplied with
 * it: the result does not depend on how samples are put together, nor on the number of threads.
 */

#include "vectors.h"

/* A tile of ROWS vectors and COLUMNS outputs, whose sums stay in registers. */
#if defined(__AVX512F__)
#define ROWS 8
#elif defined(__AVX__)
#define ROWS 6
#else
#define ROWS 4
#endif
#define VECTORS 2
#define FEW 192  /* inputs, of which two blocks fit the first-level cache */
#define SPARSE 2 /* part of the inputs below which walking over them is faster: one row is read per input and sample */
#define COLUMNS (VECTORS * WIDTH)

typedef struct {
    int64_t inputs, outputs;
    const float *weight; /* [blocks, an even number][inputs][COLUMNS], zero behind the last output */
    const float *scale;  /* [B][inputs] or NULL */
} Dense;

int64_t columns(void) { return COLUMNS; }

typedef struct {
    int64_t inputs, outputs, blocks;
    const float *weight; /* [inputs][outputs] */
    const float *scale;  /* what it is multiplied by, or NULL */
    float *packed;       /* as in Dense */
    int64_t next;        /* block to be taken by the next thread; starts at 0 */
} Pack;

void pack(Pack *w) {
    float scale = w->scale ? *w->scale : 1;
    for (int64_t b; (b = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->blocks;) {
        int64_t left = w->outputs - b * COLUMNS, n = left < 0 ? 0 : left < COLUMNS ? left : COLUMNS;
        const float *from = w->weight + b * COLUMNS;
        float *to = w->packed + b * w->inputs * COLUMNS;
        for (int64_t p = 0; p < w->inputs; p++, from += w->outputs, to += COLUMNS) {
            Lanes row[VECTORS];
            read_row(from, n, COLUMNS, row);
            for (int j = 0; j < VECTORS; j++) ((Lanes *)to)[j] = scale * row[j];
        }
    }
}

/* A sample's inputs: all of them, or where many are 0 the others and where their rows of a block of the weight begin. */
typedef struct {
    float *value;
    int32_t *row; /* NULL: all inputs */
    int64_t n;
    float *y;
} Row;

/* y[i][0..n - 1] = sum over p of value[i][p] * weight[p][0..n - 1] for i < rows, which is a constant. */
static inline __attribute__((always_inline)) void tile(int rows, int64_t inputs, const Row *const *x, const float *weight, int64_t b,
                                                       int64_t n) {
    Lanes sum[ROWS][VECTORS] = {0};
    const float *value[ROWS];
    for (int i = 0; i < rows; i++) value[i] = x[i]->value;
    for (int64_t p = 0; p < inputs; p++, weight += COLUMNS)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < VECTORS; j++) sum[i][j] += value[i][p] * *(const Lanes *)(weight + j * WIDTH);
    for (int i = 0; i < rows; i++) write_row(sum[i], n, COLUMNS, x[i]->y + b * COLUMNS);
}

/* The same for one sample by its inputs that are not 0, for one or two blocks, which is a constant. */
static inline __attribute__((always_inline)) void walk(int blocks, const Row *x, int64_t inputs, const float *weight, int64_t b, int64_t n) {
    int sums = SUMS / blocks; /* that fit the registers */
    Lanes part[SUMS][2 * VECTORS] = {0};
    float *y = x->y + b * COLUMNS;
    int64_t e = 0;
    for (; e + sums <= x->n; e += sums)
        for (int q = 0; q < sums; q++) {
            float value = x->value[e + q];
            for (int j = 0; j < blocks * VECTORS; j++)
                part[q][j] += value * *(const Lanes *)(weight + x->row[e + q] + j / VECTORS * inputs * COLUMNS + j % VECTORS * WIDTH);
        }
    for (; e < x->n; e++) {
        float value = x->value[e];
        for (int j = 0; j < blocks * VECTORS; j++)
            part[0][j] += value * *(const Lanes *)(weight + x->row[e] + j / VECTORS * inputs * COLUMNS + j % VECTORS * WIDTH);
    }
    for (int q = 1; q < sums; q++)
        for (int j = 0; j < blocks * VECTORS; j++) part[0][j] += part[q][j];
    write_row(part[0], n, blocks * COLUMNS, y);
}

/* Takes scale * x; where few are not 0 those alone. */
static void take(Row *to, int64_t inputs, const float *x, const float *scale) {
    to->n = compress(x, scale, inputs, COLUMNS, to->value, to->row);
    if (to->n * SPARSE < inputs) return;
    to->row = 0;
    for (int64_t p = 0; p < inputs; p++) to->value[p] = scale ? x[p] * scale[p] : x[p];
}

/* y[i] = (scale * x[i]) weight for the samples; of scratch each takes inputs + 1 + SPARE numbers of 8 bytes. */
void multiply(const Dense *k, char *scratch, int64_t count, const int64_t *samples, const float *const *x, float *const *y) {
    int64_t few = 0, many = 0;
    Row rows[count];
    const Row *sparse[count], *dense[count];
    for (int64_t i = 0; i < count; i++) {
        float *value = (float *)scratch + 2 * i * (k->inputs + 1 + SPARE);
        rows[i] = (Row){value, (int32_t *)(value + k->inputs + 1 + SPARE), 0, y[i]};
        take(rows + i, k->inputs, x[i], k->scale ? k->scale + samples[i] * k->inputs : 0);
        if (rows[i].row) sparse[few++] = rows + i;
        else dense[many++] = rows + i;
    }
    for (int64_t b = 0; b * COLUMNS < k->outputs; b++) {
        const float *weight = k->weight + b * k->inputs * COLUMNS;
        int64_t left = k->outputs - b * COLUMNS, n = left < COLUMNS ? left : COLUMNS;
        if (k->inputs > FEW)
            for (int64_t i = 0; i < few; i++) walk(1, sparse[i], k->inputs, weight, b, n);
        else if (b % 2 == 0)
            for (int64_t i = 0; i < few; i++) walk(2, sparse[i], k->inputs, weight, b, left < 2 * COLUMNS ? left : 2 * COLUMNS);
        for (int64_t i = 0; i < many; i += ROWS) switch (many - i < ROWS ? many - i : ROWS) {
                case 1: tile(1, k->inputs, dense + i, weight, b, n); break;
                case 2: tile(2, k->inputs, dense + i, weight, b, n); break;
                case 3: tile(3, k->inputs, dense + i, weight, b, n); break;
                case 4: tile(4, k->inputs, dense + i, weight, b, n); break;
#if ROWS > 4
                case 5: tile(5, k->inputs, dense + i, weight, b, n); break;
                case 6: tile(6, k->inputs, dense + i, weight, b, n); break;
#endif
#if ROWS > 6
                case 7: tile(7, k->inputs, dense + i, weight, b, n); break;
                case 8: tile(8, k->inputs, dense + i, weight, b, n); break;
#endif
            }
    }
}

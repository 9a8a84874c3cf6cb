/* Products of the linear layer behind a population, whose outputs are few, in float32.
 *
 * The order of a sum depends on the sizes alone. */

#include "vectors.h"

#define GROUP 4    /* rows whose sums are taken side by side: each number of the other factor is read once for them */
#define SHARE 8192 /* multiplications that a thread takes at a time */

typedef struct {
    int64_t samples, inputs, outputs;
    int64_t next;        /* sample to be taken by the next thread; starts at 0 */
    const float *x;      /* [samples][inputs] */
    const float *weight; /* [outputs][inputs] */
    const float *bias;   /* [outputs] or NULL */
    float *y;            /* [samples][outputs] */
} Dots;

/* y = x weight^T + bias. */
void dots(Dots *w) {
    int64_t some = SHARE / (w->inputs * w->outputs + 1) + 1, whole = w->inputs / WIDTH * WIDTH;
    for (int64_t s; (s = some * __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->samples;)
        for (int64_t i = s; i < s + some && i < w->samples; i++)
            for (int64_t o = 0; o < w->outputs; o += GROUP) {
                const float *x = w->x + i * w->inputs, *row[GROUP];
                Lanes sum[GROUP] = {0};
                for (int q = 0; q < GROUP; q++) /* behind the last output the last one again */
                    row[q] = w->weight + (o + q < w->outputs ? o + q : w->outputs - 1) * w->inputs;
                for (int64_t p = 0; p < whole; p += WIDTH)
                    for (int q = 0; q < GROUP; q++) sum[q] += *(const Lanes *)(x + p) * *(const Lanes *)(row[q] + p);
                for (int q = 0; q < GROUP && o + q < w->outputs; q++) {
                    float total = 0;
                    for (int j = 0; j < WIDTH; j++) total += sum[q][j];
                    for (int64_t p = whole; p < w->inputs; p++) total += x[p] * row[q][p];
                    w->y[i * w->outputs + o + q] = w->bias ? total + w->bias[o + q] : total;
                }
            }
}

typedef struct {
    int64_t rows, terms, columns;
    int64_t next;             /* part to be taken by the next thread; starts at 0 */
    int64_t by_row, by_term;  /* places from one number of `factor` to the next */
    const float *factor;      /* [rows][terms] */
    const float *x;           /* [terms][columns] */
    float *y;                 /* [rows][columns] */
    float *sums;              /* [rows] or NULL */
} Combine;

/* y = factor x, and the sums of the factor's rows. A part is GROUP rows of WIDTH columns. */
void combine(Combine *w) {
    int64_t across = (w->columns + WIDTH - 1) / WIDTH, parts = (w->rows + GROUP - 1) / GROUP * across;
    int64_t some = SHARE / (w->terms * GROUP * WIDTH + 1) + 1;
    for (int64_t s; (s = some * __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < parts;)
        for (int64_t part = s; part < s + some && part < parts; part++) {
            int64_t r = part / across * GROUP, c = part % across * WIDTH, n = w->columns - c < WIDTH ? w->columns - c : WIDTH;
            const float *factor[GROUP];
            Lanes sum[GROUP] = {0};
            for (int q = 0; q < GROUP; q++) factor[q] = w->factor + (r + q < w->rows ? r + q : w->rows - 1) * w->by_row;
            for (int64_t t = 0; t < w->terms; t++) {
                const float *from = w->x + t * w->columns + c;
                Lanes x;
                read_row(from, n, WIDTH, &x);
                for (int q = 0; q < GROUP; q++) sum[q] += factor[q][t * w->by_term] * x;
            }
            for (int q = 0; q < GROUP && r + q < w->rows; q++) write_row(sum + q, n, WIDTH, w->y + (r + q) * w->columns + c);
            if (c == 0 && w->sums)
                for (int q = 0; q < GROUP && r + q < w->rows; q++) {
                    float total = 0;
                    for (int64_t t = 0; t < w->terms; t++) total += factor[q][t * w->by_term];
                    w->sums[r + q] = total;
                }
        }
}

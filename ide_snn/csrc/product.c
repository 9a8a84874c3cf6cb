/* A linear map of single samples, applied to all of a batch. */

#include "apply.h"

typedef struct {
    Apply apply;
    const void *factor;
    int64_t inputs, outputs; /* numbers per sample of x and y */
    int64_t batch, together; /* samples, and those that a thread takes at a time */
    const float *x;
    float *y;
    char *memory;
    int64_t room;            /* bytes of a thread's scratch memory */
    int64_t padding[8];      /* what threads write is not in the cache line of what they read */
    int64_t next, threads;   /* sample to be taken by the next thread, and threads that have memory; both start at 0 */
} Product;

void product(Product *w) {
    char *scratch = w->memory + __atomic_fetch_add(&w->threads, 1, __ATOMIC_RELAXED) * w->room;
    for (int64_t first; (first = __atomic_fetch_add(&w->next, w->together, __ATOMIC_RELAXED)) < w->batch;) {
        int64_t count = w->batch - first < w->together ? w->batch - first : w->together, samples[count];
        const float *x[count];
        float *y[count];
        for (int64_t i = 0; i < count; i++) {
            samples[i] = first + i;
            x[i] = w->x + (first + i) * w->inputs;
            y[i] = w->y + (first + i) * w->outputs;
        }
        w->apply(w->factor, scratch, count, samples, x, y);
    }
}

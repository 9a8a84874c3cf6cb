/* Kernels one after the other on the same threads. */

#include <stdint.h>
#include <string.h>

typedef struct {
    void (*kernel)(void *work); /* one whose callers share the work among them */
    void *work;
    int64_t entered, left;      /* threads; start at 0 */
    int64_t padding[4];
} Stage;

typedef struct {
    char *place;
    int64_t size;
} Counter;

typedef struct {
    Stage *stages;
    int64_t count;
    const Counter *counters; /* what stages and works count in */
    int64_t counted;
} Sequence;

/* To be called before every run, by one thread. */
void clear(Sequence *s) {
    for (int64_t i = 0; i < s->counted; i++) memset(s->counters[i].place, 0, s->counters[i].size);
}

/* Threads wait behind each stage for those that are in it. One that comes later finds nothing left to do, so any number of
 * threads may run a sequence. The fences order the counters of a stage and of its kernel, for all threads alike. */
void sequence(Sequence *s) {
    for (int64_t i = 0; i < s->count; i++) {
        Stage *stage = s->stages + i;
        __atomic_fetch_add(&stage->entered, 1, __ATOMIC_SEQ_CST);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        stage->kernel(stage->work);
        __atomic_fetch_add(&stage->left, 1, __ATOMIC_SEQ_CST);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        while (__atomic_load_n(&stage->left, __ATOMIC_ACQUIRE) < __atomic_load_n(&stage->entered, __ATOMIC_ACQUIRE)) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
}

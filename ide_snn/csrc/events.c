/* Event-driven products and simulation of a feedback SNN in float32; ide_snn/event_driven.py has the mathematics.
 *
 * A product adds one row of weights per event (a spike, or a value that is not zero) and kernel tap:
 *
 *     y[target][:] += sum over events (position, channel) of value * W[tap][channel][:]     for all (position, target) of tap
 *
 * With weights in whole units the sums have 16 bits, twice as many to a register. The unit of an output channel is so large
 * that no set of spikes can overflow its sum, so sums are exact, in any order.
 *
 * All tensors are channels-last, [B][positions][channels]. Output channels are cut into blocks; while one position's
 * events are added, a block of its sums stays in registers, and the rows of one tap in the cache. A connection may take a
 * few samples together, as if their positions were one sample's: a weight too large for the cache is then read once for all
 * of them. Samples are independent: threads take some at a time from a shared counter, and every sum has its order, so the
 * result depends neither on the number of threads nor on what is taken together.
 */

#include <math.h>

#include "vectors.h"

#define LANES 16 /* channels are padded to a multiple of it */
#define STRETCH 512 /* neurons updated at a time: what a step reads and writes of them stays in the first-level cache */

typedef int32_t Bits __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int16_t Levels __attribute__((vector_size(4 * WIDTH), aligned(2), may_alias));

typedef struct {
    int64_t in_positions, in_channels, out_positions, out_channels; /* positions are those of a sample */
    int64_t together;               /* samples at most whose events are walked over at a time */
    int64_t taps, block, blocks;    /* block: output channels per block, a multiple of LANES */
    const float *weight;            /* [blocks][taps][in_channels][block], zero behind out_channels */
    const int32_t *target;          /* [taps][together * in_positions]: output position that a tap leads to, -1 for none */
    const float *bias;              /* [out_channels] or NULL */
    const float *gain;              /* [B][out_positions][out_channels] or NULL */
    const int16_t *levels;          /* the weight in whole units, laid out alike; NULL where it is `weight` */
    const float *unit;              /* [blocks * block], of `levels`, per output channel */
} Connection;

typedef struct {
    int64_t size;    /* neurons per sample */
    float *u;        /* [B][size] membrane */
    uint8_t *spikes; /* [B][size] of the step before on entry, of the last step on return */
    float *weighted; /* [B][size] or NULL: sum of leak^(T-t) s[t] */
    float *count;    /* [B][size] or NULL: number of spikes */
    float *response; /* [B][size] or NULL: mean of K s + bias, see `simulate` */
} Population;

/* What a thread needs for itself, cut from memory that all share. */
typedef struct {
    int64_t threads;      /* that have taken theirs; starts at 0 */
    int64_t size;         /* bytes of one thread */
    int64_t accumulators; /* floats; then event channels [events], their values [events] and 4 * positions numbers */
    int64_t events, positions;
    char *memory;
} Scratch;

typedef struct {
    int32_t *channel; /* [positions * channels] channels of the events, position by position */
    float *value;     /* [positions * channels] their values; NULL for spikes */
    int32_t *first;   /* [positions + 1]: where the events of a position start */
    int32_t *order;   /* [positions]: those with events */
    int32_t *pairs;   /* [2 * positions + 2]: of one tap */
    int64_t active;   /* entries of `order` */
    int64_t positions; /* so far */
} Events;

static Events cut_scratch(const Scratch *s, char *mine, float **acc) {
    *acc = (float *)mine;
    int32_t *channel = (int32_t *)(*acc + s->accumulators), *first = channel + 2 * s->events;
    Events events = {channel, (float *)(channel + s->events), first, first + s->positions, first + 2 * s->positions, 0, 0};
    return events;
}

static Events take_scratch(Scratch *s, float **acc) {
    return cut_scratch(s, s->memory + __atomic_fetch_add(&s->threads, 1, __ATOMIC_RELAXED) * s->size, acc);
}

static void no_events(Events *events) { events->first[0] = events->positions = events->active = 0; }

/* Notes the next position, whose events end before event n. */
static inline void close_position(Events *events, int64_t n) {
    int32_t p = (int32_t)events->positions++;
    events->first[p + 1] = (int32_t)n;
    events->order[events->active] = p;
    events->active += n > events->first[p];
}

/* Appends the events of further positions. */
static void collect_spikes(const uint8_t *spikes, int64_t positions, int64_t channels, Events *events) {
    int64_t n = events->first[events->positions];
    for (int64_t p = 0; p < positions; p++) {
        n += compress_bytes(spikes + p * channels, channels, events->channel + n);
        close_position(events, n);
    }
}

static void collect_values(const float *x, const float *scale, int64_t positions, int64_t channels, Events *events) {
    int64_t n = events->first[events->positions];
    for (int64_t p = 0; p < positions; p++) {
        int64_t at = p * channels;
        n += compress(x + at, scale ? scale + at : 0, channels, 1, events->value + n, events->channel + n);
        close_position(events, n);
    }
}

/* Positions with events that `tap` leads somewhere, and where: their number. */
static inline int64_t find_pairs(const Connection *k, int64_t tap, const Events *events) {
    const int32_t *target = k->target + tap * k->together * k->in_positions;
    int64_t pairs = 0;
    for (int64_t i = 0; i < events->active; i++) {
        int32_t p = events->order[i];
        events->pairs[2 * pairs] = p;
        events->pairs[2 * pairs + 1] = target[p];
        pairs += target[p] >= 0;
    }
    return pairs;
}

/* Called with constants for `weighted` and `block`, so that the sums of a position stay in registers. */
static inline __attribute__((always_inline)) void walk(const Connection *k, int64_t b, const Events *events, int weighted,
                                                       int64_t block, float *acc) {
    for (int64_t tap = 0; tap < k->taps; tap++) {
        const float *rows = k->weight + (b * k->taps + tap) * k->in_channels * block;
        int64_t pairs = find_pairs(k, tap, events);
        for (int64_t i = 0; i < pairs; i++) {
            int32_t p = events->pairs[2 * i], e = events->first[p], end = events->first[p + 1];
            Lanes *y = (Lanes *)(acc + events->pairs[2 * i + 1] * block), sum[block / WIDTH];
            for (int64_t j = 0; j < block / WIDTH; j++) sum[j] = y[j];
            if (block == 16 && end - e >= 2 * SUMS) {
                Lanes part[SUMS][16 / WIDTH] = {0}; /* one sum would wait for each addition */
                for (; e + SUMS <= end; e += SUMS)
                    for (int64_t q = 0; q < SUMS; q++) {
                        const Lanes *row = (const Lanes *)(rows + events->channel[e + q] * block);
                        for (int64_t j = 0; j < block / WIDTH; j++)
                            if (weighted) part[q][j] += events->value[e + q] * row[j];
                            else part[q][j] += row[j];
                    }
                for (int64_t q = 0; q < SUMS; q++)
                    for (int64_t j = 0; j < block / WIDTH; j++) sum[j] += part[q][j];
            }
            for (; e < end; e++) {
                const Lanes *row = (const Lanes *)(rows + events->channel[e] * block);
                if (weighted)
                    for (int64_t j = 0; j < block / WIDTH; j++) sum[j] += events->value[e] * row[j];
                else
                    for (int64_t j = 0; j < block / WIDTH; j++) sum[j] += row[j];
            }
            for (int64_t j = 0; j < block / WIDTH; j++) y[j] = sum[j];
        }
    }
}

/* The same for spikes and `levels`. */
static inline __attribute__((always_inline)) void walk_levels(const Connection *k, int64_t b, const Events *events,
                                                              int64_t block, int16_t *acc) {
    for (int64_t tap = 0; tap < k->taps; tap++) {
        const int16_t *rows = k->levels + (b * k->taps + tap) * k->in_channels * block;
        int64_t pairs = find_pairs(k, tap, events);
        for (int64_t i = 0; i < pairs; i++) {
            int32_t p = events->pairs[2 * i], e = events->first[p], end = events->first[p + 1];
            Levels *y = (Levels *)(acc + events->pairs[2 * i + 1] * block), sum[block / (2 * WIDTH)];
            for (int64_t j = 0; j < block / (2 * WIDTH); j++) sum[j] = y[j];
            if (block == 32 && end - e >= 2 * SUMS) {
                Levels part[SUMS][32 / (2 * WIDTH)] = {0}; /* as above */
                for (; e + SUMS <= end; e += SUMS)
                    for (int64_t q = 0; q < SUMS; q++) {
                        const Levels *row = (const Levels *)(rows + events->channel[e + q] * block);
                        for (int64_t j = 0; j < block / (2 * WIDTH); j++) part[q][j] += row[j];
                    }
                for (int64_t q = 0; q < SUMS; q++)
                    for (int64_t j = 0; j < block / (2 * WIDTH); j++) sum[j] += part[q][j];
            }
            for (; e < end; e++) {
                const Levels *row = (const Levels *)(rows + events->channel[e] * block);
                for (int64_t j = 0; j < block / (2 * WIDTH); j++) sum[j] += row[j];
            }
            for (int64_t j = 0; j < block / (2 * WIDTH); j++) y[j] = sum[j];
        }
    }
}

/* acc [positions][block] = block `b` of the response to the spikes, in units, without bias. */
static void respond_in_levels(const Connection *k, int64_t b, const Events *events, int64_t positions, int16_t *acc) {
    memset(acc, 0, positions * k->block * sizeof(int16_t));
    switch (k->block) {
        case 32: walk_levels(k, b, events, 32, acc); break;
        case 64: walk_levels(k, b, events, 64, acc); break;
        case 96: walk_levels(k, b, events, 96, acc); break;
        case 128: walk_levels(k, b, events, 128, acc); break;
    }
}

/* current [positions][block] of sums in units, bias included. */
static inline void from_levels(const Connection *k, int64_t b, int64_t positions, const int16_t *restrict acc,
                               float *restrict current) {
    const float *unit = k->unit + b * k->block, *bias = k->bias ? k->bias + b * k->block : 0;
    int64_t left = k->out_channels - b * k->block, n = left < k->block ? left : k->block;
    for (int64_t p = 0; p < positions; p++, acc += k->block, current += k->block) {
        for (int64_t j = 0; j < k->block; j++) current[j] = (float)acc[j] * unit[j];
        if (bias)
            for (int64_t j = 0; j < n; j++) current[j] += bias[j];
    }
}

/* acc [positions][block] = block `b` of the response to the events, bias included. */
static void respond(const Connection *k, int64_t b, const Events *events, int64_t positions, int weighted, float *acc) {
    memset(acc, 0, positions * k->block * sizeof(float));
    switch (k->block + weighted) {
        case 16: walk(k, b, events, 0, 16, acc); break;
        case 17: walk(k, b, events, 1, 16, acc); break;
        case 32: walk(k, b, events, 0, 32, acc); break;
        case 33: walk(k, b, events, 1, 32, acc); break;
        case 48: walk(k, b, events, 0, 48, acc); break;
        case 49: walk(k, b, events, 1, 48, acc); break;
        case 64: walk(k, b, events, 0, 64, acc); break;
        case 65: walk(k, b, events, 1, 64, acc); break;
    }
    if (k->bias) {
        int64_t first = b * k->block, n = k->out_channels - first < k->block ? k->out_channels - first : k->block;
        for (int64_t p = 0; p < positions; p++)
            for (int64_t j = 0; j < n; j++) acc[p * k->block + j] += k->bias[first + j];
    }
}

typedef struct {
    int64_t taps, in_channels, out_channels;
    int64_t in_stride, out_stride; /* of the weight; taps are contiguous */
    int64_t block, blocks, next;   /* next: block to be taken by the next thread; starts at 0 */
    const float *weight, *scale;   /* what the weight is multiplied by, or NULL */
    float *packed;                 /* [blocks][taps][in_channels][block], zero behind out_channels; or */
    int16_t *levels;               /* the same in whole units */
    float *unit;                   /* [blocks * block], what the levels are multiples of; 1 where all are 0 */
    int64_t largest;               /* sum that a unit leaves room for */
} Pack;

static inline float scale_of(const Pack *w) { return w->scale ? *w->scale : 1; }

/* Adds |scale x| and scale x up; one sum of each would wait for each addition. */
static void add_up(const float *x, float scale, int64_t n, double *absolute, double *plain) {
    Lanes both[2][SUMS] = {0};
    int64_t i = 0;
    for (; i + SUMS * WIDTH <= n; i += SUMS * WIDTH)
        for (int q = 0; q < SUMS; q++) {
            Lanes own = scale * *(const Lanes *)(x + i + q * WIDTH);
            both[0][q] += (Lanes)((Bits)own & 0x7fffffff); /* without the sign */
            both[1][q] += own;
        }
    for (int q = 0; q < SUMS; q++)
        for (int j = 0; j < WIDTH; j++) {
            *absolute += both[0][q][j];
            *plain += both[1][q][j];
        }
    for (; i < n; i++) {
        *absolute += fabsf(scale * x[i]);
        *plain += scale * x[i];
    }
}

/* The unit of an output channel: with P the sum of its positive weights and N that of the others, n of them, the largest
 * sum of rounded weights is at most max(P, -N) / unit + n / 2. */
static float unit_of(const Pack *w, const float *from) {
    double absolute = 0, plain = 0;
    int64_t runs = w->in_stride == w->taps ? 1 : w->in_channels, n = w->taps * w->in_channels;
    for (int64_t c = 0; c < runs; c++) add_up(from + c * w->in_stride, scale_of(w), n / runs, &absolute, &plain);
    double unit = (absolute + fabs(plain)) / 2 * 1.0001 / (w->largest - 0.5 * n); /* the sums are in float32 */
    return unit < 1e-30 ? 1 : (float)unit; /* weights that are nothing beside any threshold become 0 */
}

#define ROWS 4 /* output channels that are packed side by side */

/* to[c * block + r] = scale * from[r][c * stride] in whole units, for n input channels. */
static inline __attribute__((always_inline)) void pack_rows(const float *const *from, float scale, int64_t n, int64_t stride,
                                                            const float *per_unit, int16_t *to, int64_t block) {
    int16_t room[ROWS][STRETCH];
    for (int64_t start = 0; start < n; start += STRETCH) {
        int64_t part = n - start < STRETCH ? n - start : STRETCH;
        for (int r = 0; r < ROWS; r++)
            for (int64_t c = 0; c < part; c++)
                room[r][c] = (int16_t)(int32_t)rintf(scale * from[r][(start + c) * stride] * per_unit[r]);
        for (int64_t c = 0; c < part; c++) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
            uint64_t four = 0; /* one store instead of four: they are what this takes its time for */
            for (int r = 0; r < ROWS; r++) four |= (uint64_t)(uint16_t)room[r][c] << 16 * r;
            memcpy(to + (start + c) * block, &four, sizeof four);
#else
            for (int r = 0; r < ROWS; r++) to[(start + c) * block + r] = room[r][c];
#endif
        }
    }
}

static void pack_levels(const Pack *w, int64_t b, const float *from, int64_t n) {
    int16_t *to = w->levels + b * w->taps * w->in_channels * w->block;
    float scale = scale_of(w);
    for (int64_t j = 0; j < w->block; j += ROWS, to += ROWS) {
        const float *rows[ROWS];
        float per_unit[ROWS];
        for (int r = 0; r < ROWS; r++) {
            int inside = j + r < n; /* behind the last channel there are zeros */
            rows[r] = from + (inside ? j + r : 0) * w->out_stride;
            w->unit[b * w->block + j + r] = inside ? unit_of(w, rows[r]) : 1;
            per_unit[r] = inside ? 1 / w->unit[b * w->block + j + r] : 0;
        }
        if (w->in_stride == 1) /* then there is one tap, and the compiler sees that the rows are contiguous */
            pack_rows(rows, scale, w->in_channels, 1, per_unit, to, w->block);
        else
            for (int64_t tap = 0; tap < w->taps; tap++) {
                const float *own[ROWS];
                for (int r = 0; r < ROWS; r++) own[r] = rows[r] + tap;
                pack_rows(own, scale, w->in_channels, w->in_stride, per_unit, to + tap * w->in_channels * w->block, w->block);
            }
    }
}

void pack(Pack *w) {
    for (int64_t b; (b = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->blocks;) {
        int64_t first = b * w->block, n = w->out_channels - first < w->block ? w->out_channels - first : w->block;
        const float *from = w->weight + first * w->out_stride;
        if (w->levels) {
            pack_levels(w, b, from, n);
            continue;
        }
        float *to = w->packed + b * w->taps * w->in_channels * w->block, scale = scale_of(w);
        for (int64_t tap = 0; tap < w->taps; tap++)
            for (int64_t c = 0; c < w->in_channels; c++, to += w->block) {
                const float *own = from + tap + c * w->in_stride;
                for (int64_t j = 0; j < n; j++) to[j] = scale * own[j * w->out_stride];
                for (int64_t j = n; j < w->block; j++) to[j] = 0;
            }
    }
}

/* 1 where a number is -1, 0 where it is 0. */
static inline void write_spikes(Bits fired, uint8_t *to) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)(fired & 1)));
#elif defined(__AVX2__)
    __m256i ones = (__m256i)(fired & 1);
    __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(ones), _mm256_extracti128_si256(ones, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packs_epi16(halves, halves));
#else
    for (int j = 0; j < WIDTH; j++) to[j] = (uint8_t)-fired[j];
#endif
}

/* One step of n neurons in numbers from `at` on, driven by `response`: the same operations in the same order as
 * ide_snn.neurons.step_. `drive` may be NULL; `total` or NULL takes up the responses. */
static void advance(const Population *q, int64_t at, int64_t n, const float *response, const float *gain, const float *drive,
                    float threshold, float leak, float *total) {
    const Lanes one = 1.0f + (Lanes){0};
    float *u = q->u + at, *weighted = q->weighted ? q->weighted + at : 0, *count = q->count ? q->count + at : 0;
    uint8_t *spikes = q->spikes + at;
    int64_t j = 0;
    for (; j + WIDTH <= n; j += WIDTH) {
        Lanes x = *(const Lanes *)(response + j), v, s;
        Bits fired;
        if (total) *(Lanes *)(total + at + j) = *(Lanes *)(total + at + j) * leak + x;
        if (gain) x *= *(const Lanes *)(gain + at + j);
        if (drive) x += *(const Lanes *)(drive + at + j);
        v = *(Lanes *)(u + j) + x;
        fired = v >= threshold;
        s = (Lanes)(fired & (Bits)one);
        *(Lanes *)(u + j) = (v - threshold * s) * leak;
        write_spikes(fired, spikes + j);
        if (weighted) *(Lanes *)(weighted + j) = *(Lanes *)(weighted + j) * leak + s;
        if (count) *(Lanes *)(count + j) += s;
    }
    for (; j < n; j++) {
        float x = response[j], v, s;
        if (total) total[at + j] = total[at + j] * leak + x;
        if (gain) x *= gain[at + j];
        if (drive) x += drive[at + j];
        v = u[j] + x;
        s = v >= threshold ? 1.0f : 0.0f;
        u[j] = (v - threshold * s) * leak;
        spikes[j] = v >= threshold;
        if (weighted) weighted[j] = weighted[j] * leak + s;
        if (count) count[j] += s;
    }
}

/* A population of `samples` samples from the first on, driven by the events of its predecessor. Blocks of STRETCH channels
 * are computed, then the neurons of one position after the other. `response` or NULL: takes up the responses; with a `share`
 * other than 0 it is multiplied by that in the end, and the neurons stay as they are. */
static void update(const Connection *k, const Population *q, int64_t sample, int64_t samples, const Events *events,
                   const float *drive, float threshold, float leak, float *response, float share, float *acc) {
    float room[STRETCH];
    int64_t all = samples * k->out_positions, size = all * k->block;
    for (int64_t b = 0; b < k->blocks; b += STRETCH / k->block) {
        int64_t blocks = k->blocks - b < STRETCH / k->block ? k->blocks - b : STRETCH / k->block;
        int64_t first = b * k->block, left = k->out_channels - first, n = left < STRETCH ? left : STRETCH;
        for (int64_t i = 0; i < blocks; i++)
            if (k->levels) respond_in_levels(k, b + i, events, all, (int16_t *)acc + i * size);
            else respond(k, b + i, events, all, 0, acc + i * size);
        /* positions follow each other in memory where one block has all channels */
        int64_t most = k->block == k->out_channels ? STRETCH / k->block : 1;
        for (int64_t p = 0; p < all; p += most) {
            int64_t at = (sample * k->out_positions + p) * k->out_channels + first, behind = all - p;
            int64_t positions = behind < most ? behind : most;
            for (int64_t i = 0; i < blocks; i++) {
                int64_t source = i * size + p * k->block;
                if (k->levels) from_levels(k, b + i, positions, (const int16_t *)acc + source, room + i * k->block);
                else memcpy(room + i * k->block, acc + source, positions * k->block * sizeof(float));
            }
            if (share == 0) advance(q, at, n * positions, room, k->gain, drive, threshold, leak, response);
            else
                for (int64_t j = 0; j < n * positions; j++) response[at + j] = (response[at + j] * leak + room[j]) * share;
        }
    }
}

typedef struct {
    const Connection *connections; /* the feedback, then from population i - 1 to i */
    const Population *populations;
    int64_t n, batch, steps;
    int64_t group;                 /* samples that a thread takes at a time: no connection takes more together */
    int64_t next;                  /* first sample to be taken by the next thread; starts at 0 */
    int64_t from_rest;             /* 1: whatever the populations hold, they start from 0 */
    const float *drive;            /* [B][size of population 0] */
    double threshold, leak;
    double share;                  /* of a time step in the mean response; 0 where further steps are to follow */
    Scratch scratch;
} Simulation;

static void rest(const Population *q, int64_t sample, int64_t samples) {
    int64_t at = sample * q->size, bytes = samples * q->size * sizeof(float);
    memset(q->u + at, 0, bytes);
    memset(q->spikes + at, 0, samples * q->size);
    if (q->weighted) memset(q->weighted + at, 0, bytes);
    if (q->count) memset(q->count + at, 0, bytes);
    if (q->response) memset(q->response + at, 0, bytes);
}

/* Advances the populations by `steps` time steps. The mean response of population 0 to the spikes s[1..T] of the last one,
 * the share times the sum of leak^(T-t) (K s[t] + bias), takes one more response behind the last step. */
void simulate(Simulation *s) {
    float *acc, threshold = (float)s->threshold, leak = (float)s->leak;
    Events events = take_scratch(&s->scratch, &acc);
    for (int64_t begin; (begin = __atomic_fetch_add(&s->next, s->group, __ATOMIC_RELAXED)) < s->batch;) {
        int64_t end = begin + s->group < s->batch ? begin + s->group : s->batch;
        for (int64_t i = 0; s->from_rest && i < s->n; i++) rest(s->populations + i, begin, end - begin);
        int64_t extra = s->populations->response && s->share != 0; /* step, of the response alone */
        for (int64_t t = 0; t < s->steps + extra; t++)
            for (int64_t i = 0; i < (t < s->steps ? s->n : 1); i++) {
                const Connection *k = s->connections + i;
                const Population *source = s->populations + (i ? i - 1 : s->n - 1);
                for (int64_t sample = begin; sample < end; sample += k->together) {
                    int64_t samples = end - sample < k->together ? end - sample : k->together;
                    no_events(&events);
                    collect_spikes(source->spikes + sample * source->size, samples * k->in_positions, k->in_channels, &events);
                    update(k, s->populations + i, sample, samples, &events, i ? 0 : s->drive, threshold, leak,
                           s->from_rest && !t ? 0 : s->populations[i].response, t < s->steps ? 0 : (float)s->share, acc);
                }
            }
    }
}

typedef struct {
    const Connection *connection;
    int64_t batch;
    int64_t next;          /* first sample to be taken by the next thread; starts at 0 */
    const uint8_t *spikes; /* [B][in_positions][in_channels], or NULL for */
    const float *x, *scale; /* numbers, with many zeros; scale may be NULL */
    float *y;              /* [B][out_positions][out_channels] */
    Scratch scratch;
} Product;

/* y[i] [out_positions][out_channels] = gain * (K x + bias) of the samples whose events these are. `gain` may be NULL. */
static void response(const Connection *k, int64_t samples, const Events *events, int weighted, const float *const *gain,
                     float *acc, float *const *y) {
    for (int64_t b = 0; b < k->blocks; b++) {
        float room[STRETCH];
        if (k->levels) respond_in_levels(k, b, events, samples * k->out_positions, (int16_t *)acc);
        else respond(k, b, events, samples * k->out_positions, weighted, acc);
        int64_t c = b * k->block, n = k->out_channels - c < k->block ? k->out_channels - c : k->block;
        for (int64_t i = 0; i < samples; i++)
            for (int64_t p = 0; p < k->out_positions; p++) {
                int64_t at = p * k->out_channels + c, source = (i * k->out_positions + p) * k->block;
                if (k->levels) from_levels(k, b, 1, (const int16_t *)acc + source, room);
                memcpy(y[i] + at, k->levels ? room : acc + source, n * sizeof(float));
                if (gain)
                    for (int64_t j = 0; j < n; j++) y[i][at + j] *= gain[i][at + j];
            }
    }
}

/* y = gain * (K (scale * x) + bias), or of the spikes. With levels, of spikes only. */
void product(Product *w) {
    const Connection *k = w->connection;
    float *acc;
    Events events = take_scratch(&w->scratch, &acc);
    int64_t in = k->in_positions * k->in_channels, out = k->out_positions * k->out_channels;
    for (int64_t first; (first = __atomic_fetch_add(&w->next, k->together, __ATOMIC_RELAXED)) < w->batch;) {
        int64_t samples = w->batch - first < k->together ? w->batch - first : k->together;
        const float *gain[samples];
        float *y[samples];
        for (int64_t i = 0; i < samples; i++) {
            gain[i] = k->gain ? k->gain + (first + i) * out : 0;
            y[i] = w->y + (first + i) * out;
        }
        no_events(&events);
        if (w->spikes) collect_spikes(w->spikes + first * in, samples * k->in_positions, k->in_channels, &events);
        else collect_values(w->x + first * in, w->scale ? w->scale + first * in : 0, samples * k->in_positions, k->in_channels, &events);
        response(k, samples, &events, !w->spikes, k->gain ? gain : 0, acc, y);
    }
}

typedef struct {
    const Connection *connection; /* without gain */
    const float *scale; /* [B][in_positions][in_channels] or NULL */
    Scratch scratch;    /* its sizes; the memory comes with each call */
} Factor;

/* y[i] = K (scale * x[i]) for samples[i] of the batch, as a factor of a solve (csrc/krylov.c). */
void multiply(const Factor *f, char *scratch, int64_t count, const int64_t *samples, const float *const *x, float *const *y) {
    const Connection *k = f->connection;
    int64_t in = k->in_positions * k->in_channels;
    float *acc;
    Events events = cut_scratch(&f->scratch, scratch, &acc);
    for (int64_t i = 0; i < count; i++) {
        no_events(&events);
        collect_values(x[i], f->scale ? f->scale + samples[i] * in : 0, k->in_positions, k->in_channels, &events);
        response(k, 1, &events, 1, 0, acc, y + i);
    }
}

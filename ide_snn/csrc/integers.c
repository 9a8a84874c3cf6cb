/* Products of vectors with a dense matrix in whole numbers: factors of 16 bits, sums of 32 bits, twice as many to a register as
 * in float32. ide_snn/integers.py has the mathematics.
 *
 *     y_j = unit unit_j sum over p of k_p k_pj        x_p = unit k_p, unit = max |x| / LEVELS        W_pj = unit_j k_pj
 *
 * each rounded to nearest. The units are so large that no sum can overflow. Sums are exact: the same in any order.
 *
 * Instructions multiply numbers in pairs. For vectors without zeros the weights of two inputs are packed side by side; where many
 * numbers of a vector are 0, pairs are made of those that are not, so rows stay apart until they are read.
 */

#include "vectors.h"

/* A tile of ROWS vectors and COLUMNS outputs, whose sums stay in registers. */
#if defined(__AVX512BW__)
#define ROWS 8
typedef __m512i Sums;
#define load(p) _mm512_loadu_si512(p)
#define same(pair) _mm512_set1_epi32(pair)
#define narrow(a, b) _mm512_packs_epi32(a, b)
#define low(a, b) _mm512_unpacklo_epi16(a, b)
#define high(a, b) _mm512_unpackhi_epi16(a, b)
#if defined(__AVX512VNNI__)
#define add_products(sum, x, w) _mm512_dpwssd_epi32(sum, x, w)
#else
#define add_products(sum, x, w) _mm512_add_epi32(sum, _mm512_madd_epi16(x, w))
#endif
#elif defined(__AVX2__) && WIDTH == 8
#define ROWS 4
typedef __m256i Sums;
#define load(p) _mm256_loadu_si256((const __m256i *)(p))
#define same(pair) _mm256_set1_epi32(pair)
#define narrow(a, b) _mm256_packs_epi32(a, b)
#define low(a, b) _mm256_unpacklo_epi16(a, b)
#define high(a, b) _mm256_unpackhi_epi16(a, b)
#if defined(__AVXVNNI__)
#define add_products(sum, x, w) _mm256_dpwssd_avx_epi32(sum, x, w)
#else
#define add_products(sum, x, w) _mm256_add_epi32(sum, _mm256_madd_epi16(x, w))
#endif
#endif
#define VECTORS 2
#define COLUMNS (VECTORS * WIDTH)
#define THIN 2 /* part of the inputs below which walking over them is faster */

#define INLINE static inline __attribute__((always_inline)) /* called with constants */

typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int16_t Level __attribute__((may_alias));

#define LEVELS 4095     /* of a vector: 12 bits and a sign */
#define MOST 524416     /* (2^31 - 1) / LEVELS: the sum of the absolute levels of an output's weights */
#define LARGEST 32767   /* of them */
#define SMALL 0x1p-100f /* numbers below are brought to the middle of float32's range first */

/* The bits of x + NEAREST end in those of the whole number nearest to x, of 16 bits. */
#define NEAREST 0x1.8p23f
#define NEAREST_BITS 0x4b400000

typedef struct {
    int64_t inputs, outputs;
    const int32_t *weight; /* [blocks][pairs of inputs][COLUMNS], two of 16 bits in each; zero behind the last input and output. Or
                              [blocks][inputs, an even number][WIDTH]: rows apart, as `narrow` has their halves */
    const float *unit;     /* [blocks * COLUMNS], divided by LEVELS */
    const float *scale;    /* of rows apart: [B][inputs] or NULL */
} Whole;

/* 0 where the processor lacks the instructions. */
#if defined(ROWS)
int64_t columns(void) { return COLUMNS; }
#else
int64_t columns(void) { return 0; }
#endif

typedef struct {
    int64_t inputs, outputs, blocks;
    int64_t by_outputs;  /* the weight is [outputs][inputs], else [inputs][outputs] */
    int64_t apart;       /* rows; the weight is [inputs][outputs] */
    const float *weight;
    const float *scale;  /* what it is multiplied by where rows are apart, or NULL */
    int32_t *packed;     /* as in Whole */
    float *unit;
    int64_t next;        /* block to be taken by the next thread; starts at 0 */
} Pack;

#if defined(ROWS)

static inline uint32_t nearest(float x) {
    uint32_t bits;
    x += NEAREST;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The lower and the upper halves of two vectors, number by number. */
#if WIDTH == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#endif
#if defined(__clang__)
#define interleave(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define interleave(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

/* Row i and column i of a square change places: each round interleaves its upper and its lower half. */
static inline void transpose(Ints *rows) {
    for (int round = 1; round < WIDTH; round *= 2) {
        Ints next[WIDTH];
        for (int i = 0; i < WIDTH / 2; i++) {
            next[2 * i] = interleave(rows[i], rows[i + WIDTH / 2], LOW);
            next[2 * i + 1] = interleave(rows[i], rows[i + WIDTH / 2], HIGH);
        }
        for (int i = 0; i < WIDTH; i++) rows[i] = next[i];
    }
}

/* The unit of weights of absolute sum `sum`, the largest of which is `most`, divided by LEVELS; and 1 / unit. NaN stays, and of what
 * is too small for 1 / unit the levels are 0. */
static inline float unit_of(float sum, float most, int64_t inputs, float *inverse) {
    float unit = sum / (float)(MOST - inputs), by_most = most / LARGEST; /* each is rounded by at most 1/2 */
    unit = unit < by_most ? by_most : unit;
    *inverse = unit > SMALL ? 1 / unit : 0;
    return unit / LEVELS;
}

static inline float magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= 0x7fffffff;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

/* The sums of the absolute numbers of the columns, and the largest of them. */
INLINE void magnitudes_of_columns(const Pack *w, const float *from, float scale, int64_t n, Lanes *sum, Lanes *largest) {
    Ints most[VECTORS] = {0}; /* bits of numbers without sign are ordered as the numbers are, infinity and NaN last */
    for (int j = 0; j < VECTORS; j++) sum[j] = (Lanes){0};
    for (int64_t p = 0; p < w->inputs; p++) {
        Lanes row[VECTORS];
        read_row(from + p * w->outputs, n, COLUMNS, row);
        for (int j = 0; j < VECTORS; j++) {
            Ints bits = (Ints)(scale * row[j]) & 0x7fffffff, more = bits > most[j];
            sum[j] += (Lanes)bits;
            most[j] = (bits & more) | (most[j] & ~more);
        }
    }
    memcpy(largest, most, sizeof most);
}

/* The nearest whole numbers. */
static inline Ints levels_of(Lanes x) { return (Ints)(x + NEAREST) - NEAREST_BITS; }

INLINE void pack_inputs(Pack *w, int64_t b, int64_t n) {
    const float *from = w->weight + b * COLUMNS;
    int64_t pairs = (w->inputs + 1) / 2;
    int32_t *to = w->packed + b * pairs * COLUMNS;
    Lanes inverse[VECTORS] = {0}, sum[VECTORS], largest[VECTORS];
    float *unit = w->unit + b * COLUMNS, scale = w->scale ? *w->scale : 1;
    magnitudes_of_columns(w, from, scale, n, sum, largest);
    for (int64_t j = 0; j < COLUMNS; j++)
        unit[j] = unit_of(((float *)sum)[j], ((float *)largest)[j], w->inputs, (float *)inverse + j);
    for (int64_t p = 0; p < w->inputs; p += 2) {
        Lanes row[2][VECTORS] = {0};
        Ints k[2][VECTORS];
        read_row(from + p * w->outputs, n, COLUMNS, row[0]);
        if (p + 1 < w->inputs) read_row(from + (p + 1) * w->outputs, n, COLUMNS, row[1]);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < VECTORS; j++) k[i][j] = levels_of(scale * row[i][j] * inverse[j]);
        for (int i = 0; i < 2; i++, to += WIDTH)
            if (w->apart) *(Ints *)to = (Ints)narrow((Sums)k[i][0], (Sums)k[i][1]);
            else *(Ints *)to = k[1][i] << 16 | (k[0][i] & 0xffff);
    }
}

/* Sum of the absolute numbers, and the largest of them. */
static inline float magnitudes(int64_t n, const float *x, float *largest) {
    Lanes sums = {0};
    Ints most = {0}; /* bits of numbers without sign are ordered as the numbers are */
    int64_t i = 0;
    float total = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        Ints bits = *(const Ints *)(x + i) & 0x7fffffff, more = bits > most;
        sums += (Lanes)bits;
        most = (bits & more) | (most & ~more);
    }
    *largest = 0;
    for (int j = 0; j < WIDTH; j++) {
        float own = ((Lanes)most)[j];
        total += sums[j];
        *largest = *largest < own ? own : *largest;
    }
    for (; i < n; i++) {
        float own = magnitude(x[i]);
        total += own;
        *largest = *largest < own ? own : *largest;
    }
    return total;
}

/* Pairs of inputs come out of `narrow` in this order. */
static inline int64_t pair_at(int64_t i) { return (i & 2 ? WIDTH / 2 : 0) + i / 4 * 2 + (i & 1); }

static void pack_outputs(Pack *w, int64_t b, int64_t n) {
    int64_t pairs = (w->inputs + 1) / 2;
    int32_t *to = w->packed + b * pairs * COLUMNS;
    float inverse[COLUMNS] = {0}, *unit = w->unit + b * COLUMNS;
    const float *from = w->weight + b * COLUMNS * w->inputs;
    for (int64_t j = 0; j < COLUMNS; j++) {
        float sum = 0, largest = 0;
        if (j < n) sum = magnitudes(w->inputs, from + j * w->inputs, &largest);
        unit[j] = unit_of(sum, largest, w->inputs, inverse + j);
    }
    for (int64_t first = 0; first < pairs; first += WIDTH) {
        int64_t left = w->inputs - 2 * first;
        for (int64_t r = 0; r < COLUMNS; r += WIDTH) {
            Ints square[WIDTH] = {0};
            for (int64_t j = r; j < r + WIDTH && j < n; j++) {
                const float *row = from + j * w->inputs + 2 * first;
                float part[2 * WIDTH] = {0};
                Ints k[2];
                if (left < 2 * WIDTH) row = memcpy(part, row, left * sizeof(float));
                for (int i = 0; i < 2; i++) k[i] = levels_of(((const Lanes *)row)[i] * inverse[j]);
                square[j - r] = (Ints)narrow((Sums)k[0], (Sums)k[1]);
            }
            transpose(square);
            for (int64_t i = 0; i < WIDTH; i++)
                if (2 * pair_at(i) < left) *(Ints *)(to + (first + pair_at(i)) * COLUMNS + r) = square[i];
        }
    }
}

void pack(Pack *w) {
    for (int64_t b; (b = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->blocks;) {
        int64_t left = w->outputs - b * COLUMNS, n = left < COLUMNS ? left : COLUMNS;
        if (w->by_outputs) pack_outputs(w, b, n);
        else if (n == COLUMNS) pack_inputs(w, b, COLUMNS);
        else pack_inputs(w, b, n);
    }
}

/* A vector in whole numbers, and its largest number without sign. */
typedef struct {
    int32_t *pairs;
    int64_t n; /* of them */
    int32_t *row; /* where the rows of its numbers begin, or NULL: it has all */
    float largest;
    float *y;
} Row;

static void take(Row *to, int64_t n, const float *x) {
    int32_t most = 0; /* bits of numbers without sign are ordered as the numbers are, infinity and NaN last */
    Level *k = (Level *)to->pairs;
    float largest;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    memcpy(&largest, &most, sizeof largest);
    float before = largest < SMALL ? 1 / SMALL : 1, factor = largest > 0 ? LEVELS / (largest * before) : largest;
    to->largest = largest;
    for (int64_t i = 0; i < n; i++) k[i] = (int16_t)nearest(x[i] * before * factor);
    if (n % 2) k[n] = 0;
    to->n = (n + 1) / 2;
}

/* Takes scale * x; where few are not 0 those alone. */
static void take_scaled(Row *to, int64_t inputs, const float *x, const float *scale, float *room) {
    int64_t n = compress(x, scale, inputs, WIDTH, room, to->row);
    if (n * THIN < inputs) {
        take(to, n, room);
        to->row[n] = 0; /* behind an odd number, whose partner is 0 */
        return;
    }
    for (int64_t p = 0; p < inputs; p++) room[p] = scale ? x[p] * scale[p] : x[p];
    take(to, inputs, room);
    to->row = 0;
}

INLINE void interleaved(const int32_t *first, const int32_t *second, Sums *w) {
    Sums a = load(first), b = load(second);
    w[0] = low(a, b);
    w[1] = high(a, b);
}

/* Keeps x in a register: compilers load a factor of many sums anew for each, or put sums into memory between steps. */
#define hold(x) __asm__ volatile("" : "+v"(x))

INLINE void put(const Sums *sum, const Row *x, const float *unit, int64_t b, int64_t n) {
    Lanes y[VECTORS];
    for (int j = 0; j < VECTORS; j++) y[j] = __builtin_convertvector((Ints)sum[j], Lanes) * ((const Lanes *)unit)[j] * x->largest;
    if (n == COLUMNS)
        for (int j = 0; j < VECTORS; j++) ((Lanes *)(x->y + b * COLUMNS))[j] = y[j];
    else
        memcpy(x->y + b * COLUMNS, y, n * sizeof(float));
}

INLINE void tile(int apart, int rows, int64_t pairs, const Row *const *x, const int32_t *weight, const float *unit, int64_t b, int64_t n) {
    Sums sum[ROWS][VECTORS];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < VECTORS; j++) sum[i][j] = (Sums){0};
    for (int64_t p = 0; p < pairs; p++, weight += COLUMNS) {
        Sums w[VECTORS];
        if (apart) interleaved(weight, weight + WIDTH, w);
        else
            for (int j = 0; j < VECTORS; j++) w[j] = load(weight + j * WIDTH);
        for (int j = 0; j < VECTORS; j++) hold(w[j]);
        for (int i = 0; i < rows; i++) {
            Sums k = same(x[i]->pairs[p]);
            for (int j = 0; j < VECTORS; j++) {
                sum[i][j] = add_products(sum[i][j], k, w[j]);
                hold(sum[i][j]);
            }
        }
    }
    for (int i = 0; i < rows; i++) put(sum[i], x[i], unit, b, n);
}

/* The same for one vector by its numbers that are not 0. */
static inline void walk(const Row *x, const int32_t *weight, const float *unit, int64_t b, int64_t n) {
    Sums part[SUMS][VECTORS], w[VECTORS];
    for (int q = 0; q < SUMS; q++)
        for (int j = 0; j < VECTORS; j++) part[q][j] = (Sums){0};
    int64_t e = 0;
    for (; e + SUMS <= x->n; e += SUMS)
        for (int q = 0; q < SUMS; q++) {
            const int32_t *row = x->row + 2 * (e + q);
            interleaved(weight + row[0], weight + row[1], w);
            for (int j = 0; j < VECTORS; j++) part[q][j] = add_products(part[q][j], same(x->pairs[e + q]), w[j]);
        }
    for (; e < x->n; e++) {
        interleaved(weight + x->row[2 * e], weight + x->row[2 * e + 1], w);
        for (int j = 0; j < VECTORS; j++) part[0][j] = add_products(part[0][j], same(x->pairs[e]), w[j]);
    }
    for (int q = 1; q < SUMS; q++)
        for (int j = 0; j < VECTORS; j++) part[0][j] = (Sums)((Ints)part[0][j] + (Ints)part[q][j]);
    put(part[0], x, unit, b, n);
}

INLINE void multiply_block(int apart, const Whole *k, int64_t b, int64_t few, const Row *const *thin, int64_t many, const Row *const *full) {
    int64_t pairs = (k->inputs + 1) / 2, left = k->outputs - b * COLUMNS, n = left < COLUMNS ? left : COLUMNS;
    const int32_t *weight = k->weight + b * pairs * COLUMNS;
    const float *unit = k->unit + b * COLUMNS;
    for (int64_t i = 0; i < few; i++) walk(thin[i], weight, unit, b, n);
    for (int64_t i = 0; i < many; i += ROWS) switch (many - i < ROWS ? many - i : ROWS) {
            case 1: tile(apart, 1, pairs, full + i, weight, unit, b, n); break;
            case 2: tile(apart, 2, pairs, full + i, weight, unit, b, n); break;
            case 3: tile(apart, 3, pairs, full + i, weight, unit, b, n); break;
            case 4: tile(apart, 4, pairs, full + i, weight, unit, b, n); break;
#if ROWS > 4
            case 5: tile(apart, 5, pairs, full + i, weight, unit, b, n); break;
            case 6: tile(apart, 6, pairs, full + i, weight, unit, b, n); break;
            case 7: tile(apart, 7, pairs, full + i, weight, unit, b, n); break;
            case 8: tile(apart, 8, pairs, full + i, weight, unit, b, n); break;
#endif
        }
}

/* y[i] = x[i] weight; of scratch each takes (inputs + 1) / 2 numbers of 4 bytes. */
void multiply(const Whole *k, char *scratch, int64_t count, const int64_t *samples, const float *const *x, float *const *y) {
    (void)samples; /* the map is the same for all */
    Row rows[count];
    const Row *full[count];
    for (int64_t i = 0; i < count; i++) {
        rows[i] = (Row){(int32_t *)scratch + i * ((k->inputs + 1) / 2), 0, 0, 0, y[i]};
        take(rows + i, k->inputs, x[i]);
        full[i] = rows + i;
    }
    for (int64_t b = 0; b * COLUMNS < k->outputs; b++) multiply_block(0, k, b, 0, full, count, full);
}

/* y[i] = (scale * x[i]) weight of rows apart, skipping zeros. Scratch has inputs + 1 + SPARE numbers of 4 bytes, and for each vector
 * as many places and (inputs + 1) / 2 pairs. */
void multiply_thin(const Whole *k, char *scratch, int64_t count, const int64_t *samples, const float *const *x, float *const *y) {
    int64_t few = 0, many = 0, places = k->inputs + 1 + SPARE;
    float *room = (float *)scratch;
    int32_t *next = (int32_t *)scratch + places;
    Row rows[count];
    const Row *thin[count], *full[count];
    for (int64_t i = 0; i < count; i++, next += places + (k->inputs + 1) / 2) {
        rows[i] = (Row){next + places, 0, next, 0, y[i]};
        take_scaled(rows + i, k->inputs, x[i], k->scale ? k->scale + samples[i] * k->inputs : 0, room);
        if (rows[i].row) thin[few++] = rows + i;
        else full[many++] = rows + i;
    }
    for (int64_t b = 0; b * COLUMNS < k->outputs; b++) multiply_block(1, k, b, few, thin, many, full);
}

#endif

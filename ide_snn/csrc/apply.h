/* Linear maps of single samples that other kernels call; ide_snn/native.py has them as `Factor`. */

#pragma once

#include <stdint.h>

/* y[i] = the map's product with x[i] for samples[i] of the batch, i < count. */
typedef void (*Apply)(const void *factor, char *scratch, int64_t count, const int64_t *samples, const float *const *x,
                      float *const *y);

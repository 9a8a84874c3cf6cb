/* One time step of n neurons, the operations and the rounding of ide_snn.neurons.step_. */

#include <stdint.h>

/* u <- u + (current * gain + drive); s = u >= V_th; u <- leak (u - V_th s); weighted <- leak weighted + s; count <- count + s.
 * gain, drive, weighted and count may be NULL; current is overwritten. */
void step(int64_t n, float *restrict current, const float *restrict gain, const float *restrict drive, float *restrict u,
          float *restrict spikes, float *restrict weighted, float *restrict count, float threshold, float leak) {
    enum { STRETCH = 512 }; /* stays in the first-level cache over the loops below, each of which is vectorised */
    for (int64_t first = 0; first < n; first += STRETCH) {
        int64_t end = first + STRETCH < n ? first + STRETCH : n;
        if (gain)
            for (int64_t i = first; i < end; i++) current[i] *= gain[i];
        if (drive)
            for (int64_t i = first; i < end; i++) current[i] += drive[i];
        for (int64_t i = first; i < end; i++) {
            float v = u[i] + current[i];
            float s = v >= threshold ? 1.0f : 0.0f;
            u[i] = (v - threshold * s) * leak;
            spikes[i] = s;
        }
        if (weighted)
            for (int64_t i = first; i < end; i++) weighted[i] = weighted[i] * leak + spikes[i];
        if (count)
            for (int64_t i = first; i < end; i++) count[i] += spikes[i];
    }
}

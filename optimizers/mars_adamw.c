/* MARS-AdamW on contiguous arrays, in one pass over memory (optimizers/kernel.py).

   Compiled once for REAL = float and once for REAL = double. Without -ffast-math: sums are written
   with independent lanes instead, and nothing changes how the process treats small numbers. */

#include <stdint.h>
#include <tgmath.h>

enum { LANES = 16, BLOCK = 2048 };

/* Sums of at most BLOCK squares in REAL, added up in double. */

double square_sum(int64_t n, const REAL *g)
{
    double total = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t end = start + BLOCK < n ? start + BLOCK : n;
        REAL lanes[LANES] = {0};
        int64_t i = start;
        for (; i + LANES <= end; i += LANES)
            for (int k = 0; k < LANES; k++)
                lanes[k] += g[i + k] * g[i + k];
        for (; i < end; i++)
            total += (double)g[i] * g[i];
        for (int k = 0; k < LANES; k++)
            total += lanes[k];
    }
    return total;
}

/* The sums for g and for c = g + kappa (g - h), into out[0] and out[1]. */
void square_sums(int64_t n, const REAL *g, const REAL *h, REAL kappa, double *out)
{
    double own = 0, corrected = 0;
    REAL c[BLOCK];
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t count = n - start < BLOCK ? n - start : BLOCK;
        for (int64_t i = 0; i < count; i++)
            c[i] = g[start + i] + kappa * (g[start + i] - h[start + i]);
        own += square_sum(count, g + start); /* a block of g is still in the cache */
        corrected += square_sum(count, c);
    }
    out[0] = own;
    out[1] = corrected;
}

/* c = scale (g + kappa (g - h)); h = g; m, v and x as AdamW takes c.

   decay = 1 - lr weight_decay; step = lr / (1 - beta1^t); root = 1 / sqrt(1 - beta2^t).
   largest is amsgrad's largest v so far, or null. */
void mars_adamw(int64_t n, REAL *restrict x, const REAL *restrict g, REAL *restrict h,
                REAL *restrict m, REAL *restrict v, REAL *restrict largest, REAL kappa, REAL scale,
                REAL beta1, REAL beta2, REAL decay, REAL step, REAL root, REAL eps)
{
    REAL c[BLOCK];
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t count = n - start < BLOCK ? n - start : BLOCK;
        /* Two loops of few streams each are faster than one of all; c stays in the cache. */
        for (int64_t i = 0; i < count; i++) {
            const REAL gradient = g[start + i];
            c[i] = scale * (gradient + kappa * (gradient - h[start + i]));
            h[start + i] = gradient;
        }
        REAL *restrict xs = x + start, *restrict ms = m + start, *restrict vs = v + start;
        if (largest) {
            REAL *restrict most = largest + start;
            for (int64_t i = 0; i < count; i++) {
                ms[i] += (1 - beta1) * (c[i] - ms[i]);
                vs[i] = beta2 * vs[i] + (1 - beta2) * c[i] * c[i];
                most[i] = most[i] > vs[i] ? most[i] : vs[i];
                xs[i] = decay * xs[i] - step * ms[i] / (sqrt(most[i]) * root + eps);
            }
        } else {
            for (int64_t i = 0; i < count; i++) {
                const REAL mean = ms[i] + (1 - beta1) * (c[i] - ms[i]);
                const REAL square = beta2 * vs[i] + (1 - beta2) * c[i] * c[i];
                ms[i] = mean;
                vs[i] = square;
                xs[i] = decay * xs[i] - step * mean / (sqrt(square) * root + eps);
            }
        }
    }
}

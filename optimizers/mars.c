/* MARS-AdamW and MARS-Lion on contiguous arrays, in one pass over memory (optimizers/kernel.py).

   Compiled once for REAL = float and once for REAL = double. Without -ffast-math: sums are written
   with independent lanes instead, and nothing changes how the process treats small numbers. */

#include <stdint.h>
#include <tgmath.h>

enum {
    LANES = 32,  /* with fewer, sums wait for one another */
    BLOCK = 2048, /* of a norm: as many squares are added up in REAL, blocks in double */
    PIECE = 256   /* of an update: two loops over the same 5 kB; with 2048 it takes 1.2 times as long */
};

/* |g|^2 and |g + kappa (g - h)|^2 into out[0] and out[1]; without h the first alone. */
void square_sums(int64_t n, const REAL *g, const REAL *h, REAL kappa, double *out)
{
    double own = 0, corrected = 0;
    const int64_t whole = n - n % LANES;
    for (int64_t start = 0; start < whole; start += BLOCK) {
        const int64_t end = start + BLOCK < whole ? start + BLOCK : whole;
        REAL own_lanes[LANES] = {0}, lanes[LANES] = {0};
        if (h)
            for (int64_t i = start; i < end; i += LANES)
                for (int k = 0; k < LANES; k++) {
                    const REAL gradient = g[i + k];
                    const REAL c = gradient + kappa * (gradient - h[i + k]);
                    own_lanes[k] += gradient * gradient;
                    lanes[k] += c * c;
                }
        else
            for (int64_t i = start; i < end; i += LANES)
                for (int k = 0; k < LANES; k++)
                    own_lanes[k] += g[i + k] * g[i + k];
        for (int k = 0; k < LANES; k++) {
            own += own_lanes[k];
            corrected += lanes[k];
        }
    }
    for (int64_t i = whole; i < n; i++) {
        const double c = h ? g[i] + kappa * (g[i] - h[i]) : 0;
        own += (double)g[i] * g[i];
        corrected += c * c;
    }
    out[0] = own;
    out[1] = corrected;
}

/* c = scale (g + kappa (g - h)); h = g.

   A loop of its own over a piece, before that of the update: two loops of few streams each are
   faster than one of all, and c stays in the cache. */
static inline void correct(int64_t n, const REAL *restrict g, REAL *restrict h, REAL *restrict c,
                           REAL kappa, REAL scale)
{
    for (int64_t i = 0; i < n; i++) {
        const REAL gradient = g[i];
        c[i] = scale * (gradient + kappa * (gradient - h[i]));
        h[i] = gradient;
    }
}

/* m, v and x as AdamW takes c, and h = g.

   decay = 1 - lr weight_decay; step = lr / (1 - beta1^t); root = 1 / sqrt(1 - beta2^t).
   largest is amsgrad's largest v so far, or null. */
void mars_adamw(int64_t n, REAL *restrict x, const REAL *restrict g, REAL *restrict h,
                REAL *restrict m, REAL *restrict v, REAL *restrict largest, REAL kappa, REAL scale,
                REAL beta1, REAL beta2, REAL decay, REAL step, REAL root, REAL eps)
{
    REAL c[PIECE];
    for (int64_t start = 0; start < n; start += PIECE) {
        const int64_t count = n - start < PIECE ? n - start : PIECE;
        correct(count, g + start, h + start, c, kappa, scale);
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

/* m and x as Lion takes c, x = decay x - lr sign(m), and h = g. */
void mars_lion(int64_t n, REAL *restrict x, const REAL *restrict g, REAL *restrict h,
               REAL *restrict m, REAL kappa, REAL scale, REAL beta1, REAL decay, REAL lr)
{
    REAL c[PIECE];
    for (int64_t start = 0; start < n; start += PIECE) {
        const int64_t count = n - start < PIECE ? n - start : PIECE;
        correct(count, g + start, h + start, c, kappa, scale);
        REAL *restrict xs = x + start, *restrict ms = m + start;
        for (int64_t i = 0; i < count; i++) {
            const REAL mean = ms[i] + (1 - beta1) * (c[i] - ms[i]);
            ms[i] = mean;
            /* No sign of what is no number. */
            xs[i] = decay * xs[i] - (mean > 0 ? lr : mean < 0 ? -lr : 0 * mean);
        }
    }
}

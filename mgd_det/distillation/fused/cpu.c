/* Absolute max pooling, marginal ReLU and partial L2 of float32 maps in one pass (see __init__.py).

   Linked against no OpenMP library of its own: the symbols are found in the one that torch has loaded, so that both
   share a pool of threads. */

#include <math.h>
#include <stdint.h>

/* Pixels whose running largest and smallest values stay in a core's first cache. */
#define TILE 1024

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORS
#endif

/* Without a branch for NaN, which would keep the compiler from using vectors: plane() deals with it. */
static inline float larger(float a, float b) { return a > b ? a : b; }
static inline float smaller(float a, float b) { return a < b ? a : b; }

/* One student channel of one image. teacher: the image's channels, one after the other. */
VECTORS
static double plane(const float *student, const float *teacher, const int64_t *group, int64_t members, float margin,
                    int64_t pixels, float *residual) {
    float high[TILE], low[TILE];
    double total = 0;
    for (int64_t start = 0; start < pixels; start += TILE) {
        int n = (int)(pixels - start < TILE ? pixels - start : TILE);
        const float *first = teacher + group[0] * pixels + start;
        int nan = margin != margin;
        for (int i = 0; i < n; ++i) {
            high[i] = low[i] = first[i];
            nan |= first[i] != first[i];
        }
        for (int64_t k = 1; k < members; ++k) {
            const float *member = teacher + group[k] * pixels + start;
            for (int i = 0; i < n; ++i) {
                high[i] = larger(member[i], high[i]);
                low[i] = smaller(member[i], low[i]);
                nan |= member[i] != member[i];
            }
        }
        const float *s = student + start;
        float *r = residual + start;
        float sum = 0;
#pragma omp simd reduction(+ : sum) reduction(| : nan)
        for (int i = 0; i < n; ++i) {
            float target = larger(high[i] >= -low[i] ? high[i] : low[i], margin);
            float difference = s[i] - target;
            /* Where the teacher is silent only a student above it counts. */
            difference = target > 0 ? difference : larger(difference, 0);
            nan |= s[i] != s[i];
            r[i] = difference;
            sum += difference * difference;
        }
        if (nan) { /* as in plain torch, where the loss is NaN */
            sum = NAN;
            for (int i = 0; i < n; ++i) r[i] = NAN;
        }
        total += sum;
    }
    return total;
}

void mgd_amp_partial_l2(const float *student, const float *teacher, const float *margin, const int64_t *groups,
                        float *residual, double *sums, int64_t images, int64_t student_channels,
                        int64_t teacher_channels, int64_t members, int64_t pixels, int threads) {
    int64_t planes = images * student_channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < planes; ++i) {
        int64_t image = i / student_channels, channel = i % student_channels;
        sums[i] = plane(student + i * pixels, teacher + image * teacher_channels * pixels, groups + channel * members,
                        members, margin[channel], pixels, residual + i * pixels);
    }
}

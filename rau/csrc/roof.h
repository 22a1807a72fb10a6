/* The memory's roof: a copy, a triad, and the sum of more arrays, as fast as this processor moves bytes in plain loops. What the
   kernels reach is a share of it, so it runs in the same process, with the same OpenMP threads. */

#ifndef RAU_ROOF_H
#define RAU_ROOF_H

#include "versions.h"

/* to = from[0] + from[1] / 2 + from[2] / 2 ..., from element `j` to `end`; `around` the cache, to + j must then be aligned to 64
   bytes. In place is to == from[0]. */
typedef void (*rau_roof_kernel)(float *to, const float *const *from, int arrays, ptrdiff_t j, ptrdiff_t end, int around);

#define RAU_ROOF(version, target, vector, load, store, stream, fill, add, multiply)                                 \
    RAU_INLINE target void rau_roof_of_##version(                                                                    \
        float *to, const float *const *from, const int arrays, ptrdiff_t j, ptrdiff_t end, const int around) {       \
        const ptrdiff_t step = sizeof(vector) / sizeof(float), whole = j + (end - j) / step * step;                  \
        const vector half = fill(0.5f);                                                                              \
        for (; j < whole; j += step) {                                                                               \
            vector sum = load(from[0] + j);                                                                          \
            for (int k = 1; k < arrays; k++) sum = add(sum, multiply(half, load(from[k] + j)));                      \
            if (around) stream(to + j, sum);                                                                         \
            else store(to + j, sum);                                                                                 \
        }                                                                                                            \
        for (; j < end; j++) {                                                                                       \
            float sum = from[0][j];                                                                                  \
            for (int k = 1; k < arrays; k++) sum += 0.5f * from[k][j];                                               \
            to[j] = sum;                                                                                             \
        }                                                                                                            \
    }                                                                                                                \
    static target void rau_roof_##version(                                                                           \
        float *to, const float *const *from, int arrays, ptrdiff_t j, ptrdiff_t end, int around) {                   \
        if (arrays == 1 && around) rau_roof_of_##version(to, from, 1, j, end, 1);                                    \
        else if (arrays == 1) rau_roof_of_##version(to, from, 1, j, end, 0);                                         \
        else if (arrays == 2 && around) rau_roof_of_##version(to, from, 2, j, end, 1);                               \
        else if (arrays == 2) rau_roof_of_##version(to, from, 2, j, end, 0);                                         \
        else rau_roof_of_##version(to, from, arrays, j, end, around);                                                \
    }

#ifdef RAU_X86
RAU_ROOF(baseline, , __m128, _mm_loadu_ps, _mm_storeu_ps, _mm_stream_ps, _mm_set1_ps, _mm_add_ps, _mm_mul_ps)
#else
static void rau_roof_baseline(float *to, const float *const *from, int arrays, ptrdiff_t j, ptrdiff_t end, int around) {
    (void)around;
    if (arrays == 1)
        for (; j < end; j++) to[j] = from[0][j];
    else if (arrays == 2)
        for (; j < end; j++) to[j] = from[0][j] + 0.5f * from[1][j];
    else
        for (; j < end; j++) {
            float sum = from[0][j];
            for (int k = 1; k < arrays; k++) sum += 0.5f * from[k][j];
            to[j] = sum;
        }
}
#endif
#ifdef RAU_VERSIONS
RAU_ROOF(avx2, __attribute__((target("avx2"))), __m256, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_stream_ps, _mm256_set1_ps,
         _mm256_add_ps, _mm256_mul_ps)
RAU_ROOF(avx512, __attribute__((target("avx512f"))), __m512, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_stream_ps,
         _mm512_set1_ps, _mm512_add_ps, _mm512_mul_ps)
#endif

/* Over `runs` of n elements each, `stride` elements apart. */
static void rau_roof(
    float *to, const float *const *from, int arrays, ptrdiff_t n, ptrdiff_t runs, ptrdiff_t stride, int around, int threads) {
    const rau_version *found[3];
    const int versions = rau_versions(found); /* the roof is the machine's, whatever version the kernels run in */
#ifdef RAU_VERSIONS
    const rau_roof_kernel kernels[3] = {rau_roof_baseline, rau_roof_avx2, rau_roof_avx512};
#else
    const rau_roof_kernel kernels[3] = {rau_roof_baseline, rau_roof_baseline, rau_roof_baseline};
#endif
    const rau_roof_kernel kernel = kernels[versions - 1];
    if (rau_forked || !RAU_OPENMP || threads < 2) { /* enters no parallel region */
        for (ptrdiff_t r = 0; r < runs; r++) kernel(to, from, arrays, r * stride, r * stride + n, around);
        if (around) rau_fence();
        return;
    }
    const ptrdiff_t lines = (n + 15) / 16;
    int part;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (part = 0; part < threads; part++) {
        if (runs == 1) {
            const ptrdiff_t first = lines * part / threads * 16, last = lines * (part + 1) / threads * 16;
            kernel(to, from, arrays, first, last < n ? last : n, around);
        } else {
            for (ptrdiff_t r = runs * part / threads; r < runs * (part + 1) / threads; r++)
                kernel(to, from, arrays, r * stride, r * stride + n, around);
        }
        if (around) rau_fence();
    }
}

#endif

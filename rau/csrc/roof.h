/* The memory's roof: a copy and a triad, as fast as this processor moves bytes in plain loops. What the
   kernels reach is a share of it, so it runs in the same process, with the same OpenMP threads. */

#ifndef RAU_ROOF_H
#define RAU_ROOF_H

#include "versions.h"

/* to = a + b / 2, or a copy of a where b is NULL; `around` the cache, `to` must then be aligned to 64 bytes.
   In place is to == a. */
typedef void (*rau_roof_kernel)(float *to, const float *a, const float *b, ptrdiff_t n, int around);

#define RAU_ROOF(version, target, vector, load, store, stream, fill, add, multiply)                                 \
    static target void rau_roof_##version(float *to, const float *a, const float *b, ptrdiff_t n, int around) {     \
        const ptrdiff_t step = sizeof(vector) / sizeof(float), whole = n / step * step;                              \
        const vector half = fill(0.5f);                                                                              \
        ptrdiff_t j = 0;                                                                                             \
        if (b == NULL && around)                                                                                     \
            for (; j < whole; j += step) stream(to + j, load(a + j));                                                \
        else if (b == NULL)                                                                                          \
            for (; j < whole; j += step) store(to + j, load(a + j));                                                 \
        else if (around)                                                                                             \
            for (; j < whole; j += step) stream(to + j, add(load(a + j), multiply(half, load(b + j))));              \
        else                                                                                                         \
            for (; j < whole; j += step) store(to + j, add(load(a + j), multiply(half, load(b + j))));               \
        for (; j < n; j++) to[j] = b == NULL ? a[j] : a[j] + 0.5f * b[j];                                            \
    }

#ifdef RAU_X86
RAU_ROOF(baseline, , __m128, _mm_loadu_ps, _mm_storeu_ps, _mm_stream_ps, _mm_set1_ps, _mm_add_ps, _mm_mul_ps)
#else
static void rau_roof_baseline(float *to, const float *a, const float *b, ptrdiff_t n, int around) {
    (void)around;
    if (b == NULL)
        for (ptrdiff_t j = 0; j < n; j++) to[j] = a[j];
    else
        for (ptrdiff_t j = 0; j < n; j++) to[j] = a[j] + 0.5f * b[j];
}
#endif
#ifdef RAU_VERSIONS
RAU_ROOF(avx2, __attribute__((target("avx2"))), __m256, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_stream_ps, _mm256_set1_ps,
         _mm256_add_ps, _mm256_mul_ps)
RAU_ROOF(avx512, __attribute__((target("avx512f"))), __m512, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_stream_ps,
         _mm512_set1_ps, _mm512_add_ps, _mm512_mul_ps)
#endif

static void rau_roof(float *to, const float *a, const float *b, ptrdiff_t n, int around, int threads) {
    const rau_version *found[3];
    const int versions = rau_versions(found); /* the roof is the machine's, whatever version the kernels run in */
#ifdef RAU_VERSIONS
    const rau_roof_kernel kernels[3] = {rau_roof_baseline, rau_roof_avx2, rau_roof_avx512};
#else
    const rau_roof_kernel kernels[3] = {rau_roof_baseline, rau_roof_baseline, rau_roof_baseline};
#endif
    const rau_roof_kernel kernel = kernels[versions - 1];
    if (rau_forked || !RAU_OPENMP || threads < 2) { /* enters no parallel region */
        kernel(to, a, b, n, around);
        if (around) rau_fence();
        return;
    }
    const ptrdiff_t lines = (n + 15) / 16;
    int part;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (part = 0; part < threads; part++) {
        const ptrdiff_t first = lines * part / threads * 16, last = lines * (part + 1) / threads * 16;
        kernel(to + first, a + first, b == NULL ? NULL : b + first, (last < n ? last : n) - first, around);
        if (around) rau_fence();
    }
}

#endif

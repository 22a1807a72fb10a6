/* The row kernels in every instruction-set version that the compiler knows, the choice between them, and what surrounds them: the
   floating-point mode and what built this. tile.h says what they are given; one_version.h holds their code. */

#ifndef RAU_VERSIONS_H
#define RAU_VERSIONS_H

#include "threads.h"
#include "tile.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#define RAU_VERSION baseline
#define RAU_TARGET
#if defined(__GNUC__) && !defined(RAU_PLAIN_C)
#define RAU_BYTES 16 /* SSE2, NEON, or what the processor has */
#else
#define RAU_BYTES 0
#endif
#include "one_version.h"

#ifdef RAU_VERSIONS
#define RAU_VERSION avx2
#define RAU_TARGET __attribute__((target("avx2,f16c")))
#define RAU_BYTES 32
#include "one_version.h"

#define RAU_VERSION avx512
#ifdef __clang__
#define RAU_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c"), min_vector_width(512)))
#else
#define RAU_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,prefer-vector-width=512")))
#endif
#define RAU_BYTES 64
#include "one_version.h"
#endif

#ifdef RAU_VERSIONS
/* How many versions beyond the first the processor has and the system saves the registers of. The processor is asked here:
   __builtin_cpu_supports says no to everything under zig's runtime, and not every compiler's knows f16c. */
static int rau_beyond_baseline(void) {
    unsigned a, b, c, d, saved, high;
    const unsigned basic = bit_OSXSAVE | bit_AVX | bit_F16C;
    const unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & basic) != basic) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return 0;
    return (saved & 0xe6) == 0xe6 && (b & wide) == wide ? 2 : 1;
}

static int rau_is_intel(void) {
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
}
#endif

/* The versions that this processor can run, best last; returns how many. */
static int rau_versions(const rau_version *found[3]) {
    int count = 0;
    found[count++] = &rau_version_baseline;
#ifdef RAU_VERSIONS
    const int beyond = rau_beyond_baseline();
    if (beyond > 0) found[count++] = &rau_version_avx2;
    if (beyond > 1) found[count++] = &rau_version_avx512;
#endif
    return count;
}

/* What the speed depends on and the bits do not, chosen from what the processor says of itself. */
typedef struct {
    ptrdiff_t tile_bytes;   /* of weights in a tile */
    ptrdiff_t stream_bytes; /* an output larger than this goes around the cache */
    ptrdiff_t worker_bytes; /* less than this is not worth another thread */
    ptrdiff_t rows_ahead;   /* contiguous rows to prefetch; 0: leave it to the processor */
} rau_tuning;

static rau_tuning rau_tuned(void) {
    /* The third level's size is not asked for: systems tell that of all the processor, of which a program has a share. */
    rau_tuning tuning = {1 << 18, 1 << 23, 1 << 18, 0};
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long second = sysconf(_SC_LEVEL2_CACHE_SIZE); /* 0 or less where the system does not say */
    if (second > 0 && second / 2 < tuning.tile_bytes) tuning.tile_bytes = second / 2; /* the rest is for the rows that pass by */
#endif
#ifdef RAU_VERSIONS
    if (rau_is_intel()) tuning.rows_ahead = 4; /* which gain from it; AMD's lose: they follow long rows by themselves */
#endif
    return tuning;
}

static rau_kernel rau_rows_kernel(const rau_version *version, int first, int later) {
    return first == later ? version->rows[first] : version->into_f32[later];
}

/* The floating-point environment: another library may have asked for flushed subnormals, which would
   change bits. Each worker sets IEEE's defaults and puts back what it found. */
#ifdef RAU_X86
typedef unsigned int rau_fenv;
static rau_fenv rau_fenv_set(void) {
    rau_fenv old = _mm_getcsr();
    _mm_setcsr(0x1f80); /* round to nearest, all exceptions masked, subnormals kept */
    return old;
}
static void rau_fenv_restore(rau_fenv old) { _mm_setcsr(old); }
static void rau_fence(void) { _mm_sfence(); }
#elif defined(RAU_NEON)
typedef uint64_t rau_fenv;
static rau_fenv rau_fenv_set(void) { /* glibc's fesetenv keeps AHP and DN, which change what conversions of float16 are */
    uint64_t old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    if (old) __asm__ volatile("msr fpcr, %0" : : "r"(UINT64_C(0)) : "memory");
    return old;
}
static void rau_fenv_restore(rau_fenv old) {
    if (old) __asm__ volatile("msr fpcr, %0" : : "r"(old) : "memory");
}
static void rau_fence(void) {}
#else
#include <fenv.h>
typedef fenv_t rau_fenv;
static rau_fenv rau_fenv_set(void) {
    fenv_t old;
    fegetenv(&old);
    fesetenv(FE_DFL_ENV);
    return old;
}
static void rau_fenv_restore(rau_fenv old) { fesetenv(&old); }
static void rau_fence(void) {}
#endif

/* What built this, for show_config. */
#if defined(__clang__)
#define RAU_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define RAU_COMPILER "gcc " __VERSION__
#elif defined(_MSC_VER)
#define RAU_COMPILER "msvc"
#else
#define RAU_COMPILER "unknown"
#endif
#ifndef RAU_COMPILE_FLAGS
#define RAU_COMPILE_FLAGS "unknown"
#endif

#endif

/* Row kernels of the streaming merge, in the instruction-set versions that the compiler knows.

   A tile is a rectangle of tokens x heads of one block. It is merged in two phases: `weigh` turns the
   statistics of its K states into one weight for each state and row, and writes the result's statistics;
   `rows` then streams the rows once. The arithmetic is that of backends/numpy_.py, bit for bit: IEEE
   operations only, in one order, never fused. one_version.h holds the code, compiled once for each version:
   weigh.h the first phase, merge.h the second. */

#ifndef RAU_ROWS_H
#define RAU_ROWS_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__) || (defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0)
#error "rau needs IEEE arithmetic: no -ffast-math, no x87 (on 32-bit x86 add -msse2 -mfpmath=sse)"
#endif

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(RAU_PLAIN_C)
#define RAU_X86 1
#include <immintrin.h>
#endif
#if defined(RAU_X86) && defined(__GNUC__) /* gcc and clang compile a function for a version by attribute */
#define RAU_VERSIONS 1
#include <cpuid.h>
#endif

#if defined(__GNUC__)
#define RAU_INLINE static inline __attribute__((always_inline))
#define RAU_PREFETCH(address) __builtin_prefetch((address), 0, 3)
#else
#define RAU_INLINE static inline
#define RAU_PREFETCH(address) ((void)0)
#endif

enum rau_format { RAU_F32, RAU_F16, RAU_BF16, RAU_F64 };

enum {
    RAU_GROUP = 16,       /* rows weighed at a time, at most */
    RAU_RUN = 96,         /* rows ahead of which statistics are prefetched */
    RAU_LONG = 128,       /* rows: runs of so many or more have their weights padded, each by a cache line */
    RAU_SHORT_RUN = 8192, /* bytes: shorter runs of rows are prefetched across their ends */
    RAU_APART = 8         /* rows ahead of which rows with gaps between them are prefetched */
};

typedef struct { /* where the rows of one array of one tile lie; strides in bytes */
    char *base;
    ptrdiff_t token, head;
} rau_plane;

typedef struct { /* where some rows of one array are */
    char *at;
    ptrdiff_t step;
} rau_line;

typedef struct {
    ptrdiff_t states, tokens, heads, head_dim, lanes;
    int stream;                   /* write the result around the cache */
    ptrdiff_t ahead;              /* contiguous rows to prefetch ahead; 0: none */
    const rau_plane *attn;        /* states + 1 planes each: the inputs, then the result */
    const rau_plane *max;
    const rau_plane *sum;
    void *weights;                /* [states][heads][tokens] or [states][tokens][heads], float, or double where statistics are */
    ptrdiff_t weight_state, weight_token, weight_head; /* set by weigh, in elements */
    double *numbers;              /* scratch, aligned: [2 * states][RAU_GROUP] */
    rau_line *lines;              /* scratch: [2 * states + 2] */
    const char **sources;         /* scratch: [states] */
    double *shares;               /* scratch: [states] */
} rau_tile;

typedef void (*rau_kernel)(rau_tile *);

typedef struct { /* one instruction-set version */
    const char *name;
    rau_kernel weigh_f32, weigh_f64;
    rau_kernel rows_f32, rows_f16, rows_bf16, rows_f64;
    rau_kernel rows_f32_f16, rows_f32_bf16; /* a float32 first state, 16-bit later ones */
} rau_version;

/* Weights of a state that a tile of some rows may take, padding included: a cache line after RAU_LONG rows or more. */
static ptrdiff_t rau_most_weights(ptrdiff_t rows) { return rows + rows / RAU_LONG * (64 / (ptrdiff_t)sizeof(float)); }

#define RAU_ITEM(format) ((format) == RAU_F32 ? 4 : 2) /* bytes; float64 has kernels of its own */
#define RAU_STRING_(name) #name
#define RAU_STRING(name) RAU_STRING_(name)
#define RAU_PASTE_(a, b) a##_##b
#define RAU_PASTE(a, b) RAU_PASTE_(a, b)
#define RAU_NAME(name) RAU_PASTE(name, RAU_VERSION)

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
static int rau_has_f16c(void) { /* not every compiler's __builtin_cpu_supports knows the name */
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

/* The versions that this processor can run, best last; returns how many. */
static int rau_versions(const rau_version *found[3]) {
    int count = 0;
    found[count++] = &rau_version_baseline;
#ifdef RAU_VERSIONS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && rau_has_f16c())
        found[count++] = &rau_version_avx2;
    if (count == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found[count++] = &rau_version_avx512;
#endif
    return count;
}

/* Contiguous rows to prefetch ahead. Intel's processors gain from it, AMD's lose: theirs follow long rows by themselves. */
static int rau_rows_ahead(void) {
#ifdef RAU_VERSIONS
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") ? 4 : 0;
#else
    return 0;
#endif
}

static rau_kernel rau_rows_kernel(const rau_version *version, int first, int later) {
    switch (first) {
    case RAU_F16: return version->rows_f16;
    case RAU_BF16: return version->rows_bf16;
    case RAU_F64: return version->rows_f64;
    default:
        return later == RAU_F16 ? version->rows_f32_f16 : later == RAU_BF16 ? version->rows_f32_bf16 : version->rows_f32;
    }
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

/* libgomp's threads do not survive a fork, and waiting for them hangs: a forked child runs serially. */
static int rau_forked = 0;
#if !defined(_WIN32)
#include <pthread.h>
static void rau_in_child(void) { rau_forked = 1; }
static void rau_watch_forks(void) { pthread_atfork(NULL, NULL, rau_in_child); }
#else
static void rau_watch_forks(void) {}
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
#ifndef RAU_OPENMP
#ifdef _OPENMP
#define RAU_OPENMP 1
#else
#define RAU_OPENMP 0
#endif
#endif

#endif

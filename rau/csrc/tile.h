/* What the row kernels are given: where a tile of rows lies, and the table of kernels that one instruction-set version fills.

   A tile is a rectangle of tokens x heads of one block. It is merged in two phases: `weigh` (weigh.h) turns the statistics of its
   K states into one weight for each state and row, and writes the result's statistics; `rows` (merge.h) then streams the rows
   once. The arithmetic is that of rau/arithmetic.py, bit for bit: IEEE operations only, in one order, never fused. */

#ifndef RAU_TILE_H
#define RAU_TILE_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__) || (defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0)
#error "rau needs IEEE arithmetic: no -ffast-math, no x87 (on 32-bit x86 add -msse2 -mfpmath=sse)"
#endif

#if defined(_MSC_VER) && defined(__clang__)
#pragma STDC FP_CONTRACT OFF /* clang in MSVC's mode fuses under /fp:precise where the processor can: on ARM */
#elif defined(_MSC_VER)
#pragma fp_contract(off) /* before Visual Studio 2022 17.0 a product and a sum became one instruction even under /fp:precise */
#endif

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(RAU_PLAIN_C)
#define RAU_X86 1
#include <immintrin.h>
#endif
#if defined(RAU_X86) && defined(__GNUC__) /* gcc and clang compile a function for a version by attribute */
#define RAU_VERSIONS 1
#include <cpuid.h>
#endif

#if defined(__aarch64__) && defined(__GNUC__) && !defined(RAU_PLAIN_C)
#define RAU_NEON 1
#include <arm_neon.h>
#endif

#if defined(__GNUC__)
#define RAU_INLINE static inline __attribute__((always_inline))
#define RAU_PREFETCH(address) __builtin_prefetch((address), 0, 3)
#else
#define RAU_INLINE static inline
#define RAU_PREFETCH(address) ((void)(address))
#endif

enum rau_format { RAU_F32, RAU_F16, RAU_BF16, RAU_F64, RAU_FORMATS };
#define RAU_ITEM(format) ((format) == RAU_F64 ? 8 : (format) == RAU_F32 ? 4 : 2) /* bytes */

/* Measured on Zen 5 (RAU_GATHERED: on Zen 3); docs/benchmarks.md, "What was tried and did not pay", has the figures of the other choices. */
enum {
    RAU_GROUP = 16,       /* rows weighed at a time, at most: in groups of 64 a row takes 6.6 ns, in these 3.9 */
    RAU_RUN = 96,         /* rows ahead of which statistics are prefetched: 0.82 of their triad, 0.70 at 16 rows */
    RAU_LONG = 128,       /* rows: so long a run's weights are padded by a cache line, or 64 runs share 12 ways of a set */
    RAU_SHORT_RUN = 8192, /* bytes: shorter runs of rows are prefetched across their ends, which no processor follows by itself */
    RAU_GATHERED = 512,   /* bytes of rows of the result that go around the cache together where one by one does not do */
    RAU_LONGEST_GATHERED = 4096, /* bytes of such a row */
    RAU_APART = 8         /* rows ahead of which rows with gaps between them are prefetched: half an array's heads 0.30 -> 0.55 */
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
    rau_kernel rows[RAU_FORMATS];     /* all states in one format */
    rau_kernel into_f32[RAU_FORMATS]; /* a float32 first state, later ones in another format */
} rau_version;

/* Weights of a state that a tile of some rows may take, padding included: a cache line after RAU_LONG rows or more. */
static ptrdiff_t rau_most_weights(ptrdiff_t rows) { return rows + rows / RAU_LONG * (64 / (ptrdiff_t)sizeof(float)); }

#define RAU_STRING_(name) #name
#define RAU_STRING(name) RAU_STRING_(name)
#define RAU_PASTE_(a, b) a##_##b
#define RAU_PASTE(a, b) RAU_PASTE_(a, b)
#define RAU_NAME(name) RAU_PASTE(name, RAU_VERSION)

#endif

/* The row kernels without Python: one checksum for each instruction-set version, over merges of numbers made of integers.

   tests/kernels.py compiles this for several processors and by several compilers; all of them have to print the same checksum.
   It catches contraction, byte order, word sizes and whatever a compiler believes that IEEE arithmetic may do. */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define RAU_COMPILE_FLAGS ""
#define RAU_OPENMP 0
#include "versions.h"

enum { TOKENS = 7, HEADS = 3, ROWS = TOKENS * HEADS, LANES = 8, MOST = 9, LONGEST = 70 };

static uint64_t counter;
static uint64_t word(void) { /* SplitMix64 */
    uint64_t z = counter += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static double between(double low, double high) { return low + (high - low) * (double)(word() >> 44) / 1048576.0; }

static void put_bits(char *to, size_t item, uint64_t bits) {
    if (item == 2) { const uint16_t x = (uint16_t)bits; memcpy(to, &x, 2); }
    if (item == 4) { const uint32_t x = (uint32_t)bits; memcpy(to, &x, 4); }
    if (item == 8) memcpy(to, &bits, 8);
}

static uint64_t get_bits(const char *at, size_t item) {
    uint16_t half; uint32_t single; uint64_t whole;
    if (item == 2) return memcpy(&half, at, 2), half;
    if (item == 4) return memcpy(&single, at, 4), single;
    return memcpy(&whole, at, 8), whole;
}

/* Bits of the fraction and of the whole, by format. */
static const int fraction[RAU_FORMATS] = {23, 10, 7, 52}, width[RAU_FORMATS] = {32, 16, 16, 64};

static uint64_t canonical(uint64_t bits, int format) { /* all NaN are one */
    const uint64_t all = (UINT64_C(1) << (width[format] - 1)) - 1, infinity = all >> fraction[format] << fraction[format];
    return (bits & all) > infinity ? all : bits;
}

/* Any bits at all in one number of four, else a number around 1. */
static uint64_t number(int format) {
    const uint64_t bits = word() >> (64 - width[format]);
    if (word() % 4 == 0) return bits;
    const uint64_t one = (UINT64_C(1) << (width[format] - 2)) - (UINT64_C(1) << fraction[format]);
    return (one - (UINT64_C(2) << fraction[format]) + (bits >> 1) % (UINT64_C(4) << fraction[format])) | (bits & 1) << (width[format] - 1);
}

static double statistic(int maximum) {
    switch (word() % 24) {
    case 0: return -INFINITY;
    case 1: return INFINITY;
    case 2: return NAN;
    case 3: return 0.0;
    case 4: return maximum ? -0.0 : -2.5;
    case 5: return maximum ? 3e38 : 1e-42;
    case 6: return maximum ? -3e38 : 3e38;
    case 7: return maximum ? -100.25 : 1e-37;
    case 8: return maximum ? 3.5 : 1.0;
    default: return maximum ? between(-20, 20) : between(1, 100);
    }
}

/* What another library may have left behind: other rounding, subnormals flushed, another float16. */
#if defined(RAU_X86)
enum { HOSTILE = 0x8040 | 0x4000 }; /* FTZ, DAZ, upwards */
static unsigned floating_mode(void) { return _mm_getcsr() & 0xffc0u; }
static void set_floating_mode(unsigned mode) { _mm_setcsr(mode | 0x1f80u); }
#elif defined(__aarch64__)
enum { HOSTILE = 1 << 26 | 1 << 25 | 1 << 24 | 1 << 22 }; /* AHP, DN, FZ, upwards */
static unsigned floating_mode(void) { uint64_t fpcr; __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr)); return (unsigned)fpcr; }
static void set_floating_mode(unsigned mode) { const uint64_t fpcr = mode; __asm__ volatile("msr fpcr, %0" : : "r"(fpcr)); }
#else
enum { HOSTILE = FE_UPWARD };
static unsigned floating_mode(void) { return (unsigned)fegetround(); }
static void set_floating_mode(unsigned mode) { fesetround((int)mode); }
#endif

static void *claim(size_t bytes) {
    void *memory = calloc(bytes ? bytes : 1, 1);
    if (!memory) exit(2);
    return memory;
}

static uint64_t sum;
static void add(uint64_t bits) { sum = (sum ^ bits) * UINT64_C(0x100000001B3); } /* as FNV-1a, a number at a time */

static void merge(const rau_version *version, int first, int later, int states, int head_dim, int lanes, int stream,
                  int hostile) {
    const int wide = first == RAU_F64, stats = wide ? RAU_F64 : RAU_F32;
    const size_t stats_item = wide ? 8 : 4;
    rau_plane planes[3][MOST + 1];
    char *memory[3][MOST + 1];
    for (int k = 0; k <= states; k++) {
        const int format = k == 0 || k == states ? first : later;
        const size_t item = (size_t)RAU_ITEM(format), row = (size_t)(head_dim + (k == 1)) * item; /* the second has gaps */
        memory[0][k] = claim(ROWS * row);
        planes[0][k] = (rau_plane){memory[0][k], (ptrdiff_t)(HEADS * row), (ptrdiff_t)row};
        for (int i = 0; k < states && i < ROWS * (head_dim + (k == 1)); i++)
            put_bits(memory[0][k] + (size_t)i * item, item, number(format));
        for (int part = 1; part < 3; part++) {
            char *at = memory[part][k] = claim(ROWS * (size_t)lanes * stats_item);
            planes[part][k] = (rau_plane){at, (ptrdiff_t)(HEADS * lanes * stats_item), (ptrdiff_t)(lanes * stats_item)};
            for (int i = 0; k < states && i < ROWS; i++) {
                const double x = statistic(part == 1);
                const float narrow = (float)x;
                for (int lane = 0; lane < lanes; lane++, at += stats_item) memcpy(at, wide ? (const void *)&x : (const void *)&narrow, stats_item);
            }
        }
    }
    rau_tile tile = {states, TOKENS, HEADS, head_dim, lanes, stream, 0, planes[0], planes[1], planes[2],
                     claim((size_t)states * (size_t)rau_most_weights(ROWS) * 8 + 64), 0, 0, 0,
                     claim((size_t)states * 2 * RAU_GROUP * sizeof(double) + 64), claim((2 * (size_t)states + 2) * sizeof(rau_line)),
                     claim((size_t)states * sizeof(char *)), claim((size_t)states * sizeof(double))};
    void *kept[] = {tile.weights, tile.numbers, tile.lines, (void *)tile.sources, tile.shares};
    tile.weights = (char *)tile.weights + (64 - (uintptr_t)tile.weights % 64) % 64;
    tile.numbers = (double *)((char *)tile.numbers + (64 - (uintptr_t)tile.numbers % 64) % 64);
    const unsigned usual = floating_mode();
    if (hostile) set_floating_mode(HOSTILE);
    const rau_fenv old = rau_fenv_set();
    (wide ? version->weigh_f64 : version->weigh_f32)(&tile);
    rau_rows_kernel(version, first, later)(&tile);
    if (stream) rau_fence();
    rau_fenv_restore(old);
    if (hostile && (floating_mode() & HOSTILE) != HOSTILE) add(1); /* which is to be as it was found */
    set_floating_mode(usual);
    const size_t item = (size_t)RAU_ITEM(first);
    for (int i = 0; i < ROWS * head_dim; i++) add(canonical(get_bits(memory[0][states] + (size_t)i * item, item), first));
    for (int part = 1; part < 3; part++)
        for (int i = 0; i < ROWS * lanes; i++) {
            const uint64_t bits = get_bits(memory[part][states] + (size_t)i * stats_item, stats_item);
            add(part == 1 && !(bits << 1 << (64 - width[stats])) ? 0 : canonical(bits, stats)); /* a maximum of 0 has no sign */
        }
    for (int k = 0; k <= states; k++)
        for (int part = 0; part < 3; part++) free(memory[part][k]);
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) free(kept[i]);
}

int main(void) {
    static const int pairs[][2] = {{RAU_F32, RAU_F32}, {RAU_F16, RAU_F16}, {RAU_BF16, RAU_BF16}, {RAU_F64, RAU_F64},
                                   {RAU_F32, RAU_F16}, {RAU_F32, RAU_BF16}};
    static const int states[] = {1, 2, 3, 4, 5, 8, MOST}, head_dims[] = {1, 5, 8, 16, 17, 33, 64, LONGEST};
    const rau_version *found[3];
    const int count = rau_versions(found);
    for (int v = 0; v < count; v++) {
        sum = UINT64_C(0xCBF29CE484222325), counter = 0;
        int merges = 0;
        for (size_t p = 0; p < sizeof pairs / sizeof *pairs; p++)
            for (size_t k = 0; k < sizeof states / sizeof *states; k++)
                for (size_t d = 0; d < sizeof head_dims / sizeof *head_dims; d++)
                    for (int way = 0; way < 4; way++, merges++)
                        merge(found[v], pairs[p][0], pairs[p][1], states[k], head_dims[d], (k + d) % 2 ? 1 : LANES, way % 2, way / 2);
        printf("%016" PRIx64 " %s, %d merges\n", sum, found[v]->name, merges);
    }
    return 0;
}

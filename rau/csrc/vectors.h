/* The vectors of one instruction-set version, RAU_BYTES long: GNU C's, which gcc and clang compile for any processor; 0: single
   numbers, for other compilers. Intrinsics stand only where vectors cannot say it: a comparison of AVX-512 is a mask, and a store
   around the cache has no spelling in C. No include guard: one_version.h includes this once for each version. */

#if RAU_BYTES
typedef float RAU_NAME(floats) __attribute__((vector_size(RAU_BYTES)));
typedef uint32_t RAU_NAME(words) __attribute__((vector_size(RAU_BYTES)));
typedef double RAU_NAME(doubles) __attribute__((vector_size(RAU_BYTES)));
typedef uint64_t RAU_NAME(longs) __attribute__((vector_size(RAU_BYTES)));
typedef float RAU_NAME(half_floats) __attribute__((vector_size(RAU_BYTES / 2))); /* as many as doubles */
typedef uint16_t RAU_NAME(shorts) __attribute__((vector_size(RAU_BYTES / 2)));   /* as many as floats */
#define CONVERT(type, x) __builtin_convertvector(x, type)
#define ALL_BITS(type, comparison) ((type)(comparison)) /* or none */
#else
typedef float RAU_NAME(floats);
typedef uint32_t RAU_NAME(words);
typedef double RAU_NAME(doubles);
typedef uint64_t RAU_NAME(longs);
typedef float RAU_NAME(half_floats);
typedef uint16_t RAU_NAME(shorts);
#define CONVERT(type, x) ((type)(x))
#define ALL_BITS(type, comparison) ((type)0 - (type)(comparison))
#endif
#define FLOATS RAU_NAME(floats)
#define WORDS RAU_NAME(words)
#define DOUBLES RAU_NAME(doubles)
#define LONGS RAU_NAME(longs)
#define HALF_FLOATS RAU_NAME(half_floats)
#define SHORTS RAU_NAME(shorts)
#define FLOATS_IN ((ptrdiff_t)(sizeof(FLOATS) / sizeof(float)))
#define DOUBLES_IN ((ptrdiff_t)(sizeof(DOUBLES) / sizeof(double)))

RAU_INLINE RAU_TARGET WORDS RAU_NAME(words_of)(FLOATS x) { WORDS bits; memcpy(&bits, &x, sizeof bits); return bits; }
RAU_INLINE RAU_TARGET FLOATS RAU_NAME(floats_of)(WORDS bits) { FLOATS x; memcpy(&x, &bits, sizeof x); return x; }
RAU_INLINE RAU_TARGET LONGS RAU_NAME(longs_of)(DOUBLES x) { LONGS bits; memcpy(&bits, &x, sizeof bits); return bits; }
RAU_INLINE RAU_TARGET DOUBLES RAU_NAME(doubles_of)(LONGS bits) { DOUBLES x; memcpy(&x, &bits, sizeof x); return x; }
/* Half as long numbers in memory, as many as there are words. gcc 12 converts such vectors number by number. */
RAU_INLINE RAU_TARGET WORDS RAU_NAME(words_at)(const char *at) {
#if RAU_BYTES == 64
    return (WORDS)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
#elif RAU_BYTES == 32
    return (WORDS)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
#elif defined(RAU_X86) && RAU_BYTES
    return (WORDS)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i *)at), _mm_setzero_si128());
#else
    SHORTS halves;
    memcpy(&halves, at, sizeof halves);
#if defined(RAU_NEON) && RAU_BYTES
    return (WORDS)vmovl_u16((uint16x4_t)halves);
#else
    return CONVERT(WORDS, halves);
#endif
#endif
}
RAU_INLINE RAU_TARGET DOUBLES RAU_NAME(all)(double x) { DOUBLES zero = {0}; return zero + x; }
/* Comparisons, and the choice between two vectors by one. */
#if RAU_BYTES == 64
#define MASK __mmask8
#define GREATER(x, y) _mm512_cmp_pd_mask((__m512d)(x), (__m512d)(y), _CMP_GT_OQ)
#define EQUAL(x, y) _mm512_cmp_pd_mask((__m512d)(x), (__m512d)(y), _CMP_EQ_OQ)
#define IS_NAN(x) _mm512_cmp_pd_mask((__m512d)(x), (__m512d)(x), _CMP_UNORD_Q)
#define SELECT(mask, yes, no) ((DOUBLES)_mm512_mask_blend_pd((mask), (__m512d)(no), (__m512d)(yes)))
#else
#define MASK LONGS
#define GREATER(x, y) ALL_BITS(LONGS, (x) > (y))
#define EQUAL(x, y) ALL_BITS(LONGS, (x) == (y))
#define IS_NAN(x) ALL_BITS(LONGS, (x) != (x))
#if RAU_BYTES == 32
#define SELECT(mask, yes, no) ((DOUBLES)_mm256_blendv_pd((__m256d)(no), (__m256d)(yes), (__m256d)(mask)))
#else
#define SELECT RAU_NAME(select)
RAU_INLINE RAU_TARGET DOUBLES SELECT(LONGS mask, DOUBLES yes, DOUBLES no) {
    return RAU_NAME(doubles_of)((mask & RAU_NAME(longs_of)(yes)) | (~mask & RAU_NAME(longs_of)(no)));
}
#endif
#endif
#define ALL RAU_NAME(all)

/* Store a vector: 0 as usual, 16 or RAU_BYTES around the cache in pieces of so many bytes, which `to` is aligned to. */
RAU_INLINE RAU_TARGET void RAU_NAME(put)(char *to, const void *vector, size_t bytes, int around) {
#if defined(RAU_X86) && RAU_BYTES
    if (around == 16) {
        const __m128i *pieces = (const __m128i *)vector;
        for (int i = 0; i < RAU_BYTES / 16; i++) _mm_stream_si128((__m128i *)to + i, _mm_loadu_si128(pieces + i));
        return;
    }
#if RAU_BYTES == 64
    if (around) {
        _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(vector));
        return;
    }
#elif RAU_BYTES == 32
    if (around) {
        _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)vector));
        return;
    }
#endif
#else
    (void)around;
#endif
    memcpy(to, vector, bytes);
}

/* Which of put's ways an address allows. */
RAU_INLINE RAU_TARGET int RAU_NAME(way)(const char *to, int stream) {
#if RAU_BYTES
    const uintptr_t at = (uintptr_t)to;
    return !stream || at % 16 ? 0 : at % RAU_BYTES ? 16 : RAU_BYTES;
#else
    (void)to, (void)stream;
    return 0;
#endif
}

/* The row kernels, for the version that RAU_VERSION, RAU_TARGET and RAU_BYTES name. They are written once, in vectors of
   RAU_BYTES bytes (GNU C's, which gcc and clang compile for any processor; 0: single numbers, for other compilers), with
   intrinsics only for what vectors cannot say. No include guard: _rows.h includes this once for each version. */

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

/* ---- weigh: statistics into weights ------------------------------------------------------------------ */

/* The exponential of x <= 0 or NaN, in place of x: see rau/backends/exponential.py. It is one long chain of dependent
   operations, so the chains of `count` vectors go side by side. */
RAU_INLINE RAU_TARGET void RAU_NAME(exp_nonpositive)(DOUBLES *x, const int count) {
    static const double coefficients[] = {
        1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0,
        1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 1.0 / 2.0, 1.0, 1.0,
    };
    const DOUBLES zero = {0}, round = ALL(0x1.8p52), least = ALL(-708.0);
    DOUBLES shifted[4], r[4], p[4];
    for (int i = 0; i < count; i++) {
        const DOUBLES safe = SELECT(GREATER(least, x[i]), zero, x[i]);
        shifted[i] = safe * 0x1.71547652b82fep+0 + round;
        const DOUBLES k = shifted[i] - round;
        r[i] = (safe - k * 0x1.62e42feep-1) - k * 0x1.a39ef35793c76p-33;
        p[i] = ALL(1.0 / 479001600.0);
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 12
#endif
    for (int j = 0; j < 12; j++)
        for (int i = 0; i < count; i++) p[i] = p[i] * r[i] + coefficients[j];
    for (int i = 0; i < count; i++) {
        /* The low bits of `shifted` hold k: made an exponent, they are 2^k. */
        const DOUBLES power = RAU_NAME(doubles_of)((RAU_NAME(longs_of)(shifted[i]) + 1023) << 52);
        const DOUBLES result = SELECT(GREATER(least, x[i]), zero, p[i] * power);
        x[i] = SELECT(IS_NAN(x[i]), x[i], result);
    }
}

#if RAU_BYTES == 64
#define EACH_ROW(of) {of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)}
#elif RAU_BYTES == 32
#define EACH_ROW(of) {of(0), of(1), of(2), of(3)}
#elif RAU_BYTES == 16
#define EACH_ROW(of) {of(0), of(1)}
#else
#define EACH_ROW(of) {of(0)}
#endif

/* Lane 0 of `count` rows, `step` bytes apart; the first one stands for those beyond. */
RAU_INLINE RAU_TARGET DOUBLES RAU_NAME(load_rows)(const char *at, ptrdiff_t step, ptrdiff_t count, const int wide) {
#define AT(j) (at + ((j) < count ? (j) * step : 0))
#define DOUBLE_AT(j) *(const double *)AT(j)
#define FLOAT_AT(j) *(const float *)AT(j)
    if (wide) {
        DOUBLES rows = EACH_ROW(DOUBLE_AT);
        return rows;
    }
#if RAU_BYTES == 64
    if (step == 32 && count == 8) { /* Whole rows of 8 lanes: a load takes one number from each of two, nothing else is touched. */
        const float *from = (const float *)at;
        __m512 pairs = _mm512_maskz_loadu_ps(0x0101, from);
        pairs = _mm512_mask_loadu_ps(pairs, 0x0202, from + 15);
        pairs = _mm512_mask_loadu_ps(pairs, 0x0404, from + 30);
        pairs = _mm512_mask_loadu_ps(pairs, 0x0808, from + 45);
        pairs = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0), pairs);
        return (DOUBLES)_mm512_cvtps_pd(_mm512_castps512_ps256(pairs));
    }
#endif
    HALF_FLOATS rows = EACH_ROW(FLOAT_AT);
    return CONVERT(DOUBLES, rows);
#undef AT
#undef DOUBLE_AT
#undef FLOAT_AT
}

/* Write a number into all lanes of each of `count` rows. */
RAU_INLINE RAU_TARGET void RAU_NAME(store_rows)(
    char *to, ptrdiff_t step, ptrdiff_t count, ptrdiff_t lanes, DOUBLES rows, int stream, const int wide) {
    if (wide) {
        double numbers[sizeof(DOUBLES) / sizeof(double)];
        memcpy(numbers, &rows, sizeof numbers);
        for (ptrdiff_t j = 0; j < count; j++, to += step)
            for (ptrdiff_t lane = 0; lane < lanes; lane++) ((double *)to)[lane] = numbers[j];
        return;
    }
    const HALF_FLOATS narrow = CONVERT(HALF_FLOATS, rows);
#if RAU_BYTES == 64
    if (step == 32 && count == 8 && lanes == 8) {
        const __m512 all = _mm512_castps256_ps512((__m256)narrow);
        const __m512i second = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const int around = RAU_NAME(way)(to, stream) == RAU_BYTES;
        for (int pair = 0; pair < 4; pair++, to += 64) {
            const __m512 both = _mm512_permutexvar_ps(_mm512_add_epi32(second, _mm512_set1_epi32(2 * pair)), all);
            if (around) _mm512_stream_ps((float *)to, both);
            else _mm512_storeu_ps(to, both);
        }
        return;
    }
#endif
    float numbers[sizeof(DOUBLES) / sizeof(double)];
    memcpy(numbers, &narrow, sizeof numbers);
#if defined(RAU_X86) && RAU_BYTES >= 32
    if (lanes == 8 && stream && ((uintptr_t)to | (uintptr_t)step) % 32 == 0) {
        for (ptrdiff_t j = 0; j < count; j++, to += step) _mm256_stream_ps((float *)to, _mm256_set1_ps(numbers[j]));
        return;
    }
#else
    (void)stream;
#endif
    for (ptrdiff_t j = 0; j < count; j++, to += step)
        if (lanes == 8)
            for (int lane = 0; lane < 8; lane++) ((float *)to)[lane] = numbers[j];
        else
            for (ptrdiff_t lane = 0; lane < lanes; lane++) ((float *)to)[lane] = numbers[j];
}

RAU_INLINE RAU_TARGET void RAU_NAME(prefetch)(const char *row, ptrdiff_t bytes) {
    for (ptrdiff_t j = 0; j < bytes && j < 1024; j += 64) RAU_PREFETCH(row + j);
}

/* Merge the statistics of `count` rows, as many as `vectors` vectors hold or fewer. `lines` are where they are in the maxima
   and the sums of the states, then of the result; the weights of a state follow `gap` bytes after those of the one before. */
RAU_INLINE RAU_TARGET void RAU_NAME(weigh_rows)(
    const rau_line *lines, const ptrdiff_t states, const ptrdiff_t step, const int vectors, ptrdiff_t count, char *weights,
    ptrdiff_t gap, DOUBLES *numbers, ptrdiff_t lanes, int stream, const int wide) {
    const DOUBLES zero = {0}, infinity = ALL(INFINITY), one = ALL(1.0);
    DOUBLES of_two[8], *shares = states == 2 ? of_two : numbers, *sums = shares + states * vectors;
    DOUBLES max[2] = {-infinity, -infinity}, sum[2] = {zero, zero}, live[2] = {zero, zero}, alone[2] = {zero, zero};
#define STEP(line) (step ? step : lines[line].step)
#define AT(line) (lines[line].at + v * DOUBLES_IN * STEP(line))
    /* All inputs of these rows are read before anything is written: the result may stand on an input. */
    for (ptrdiff_t k = 0; k < states; k++)
        for (int v = 0; v < vectors; v++) {
            RAU_NAME(prefetch)(AT(k) + RAU_RUN * STEP(k), DOUBLES_IN * STEP(k));
            RAU_NAME(prefetch)(AT(states + k) + RAU_RUN * STEP(states + k), DOUBLES_IN * STEP(states + k));
            DOUBLES m = RAU_NAME(load_rows)(AT(k), STEP(k), count, wide);
            DOUBLES l = RAU_NAME(load_rows)(AT(states + k), STEP(states + k), count, wide);
            /* An empty side is (-inf, 0) from here on, whatever stood there. */
            const MASK empty = EQUAL(l, zero) | EQUAL(m, -infinity);
            m = SELECT(empty, -infinity, m);
            l = SELECT(empty, zero, l);
            max[v] = SELECT(GREATER(m, max[v]) | IS_NAN(m), m, max[v]); /* a NaN stays: nothing is larger */
            live[v] += SELECT(empty, zero, one);
            alone[v] = SELECT(empty, alone[v], l);
            shares[k * vectors + v] = m;
            sums[k * vectors + v] = l;
        }
    for (ptrdiff_t k = 0; k < states; k++)
        for (int v = 0; v < vectors; v++) shares[k * vectors + v] -= max[v];
    if (states == 2) { /* One side is at the maximum, and the exponential of 0 is 1: one of them is enough. */
        DOUBLES exponential[2];
        for (int v = 0; v < vectors; v++) exponential[v] = SELECT(EQUAL(shares[v], zero), shares[vectors + v], shares[v]);
        RAU_NAME(exp_nonpositive)(exponential, vectors);
        for (int i = 0; i < 2 * vectors; i++) {
            const DOUBLES other = SELECT(IS_NAN(shares[i]), shares[i], exponential[i % vectors]);
            shares[i] = SELECT(EQUAL(shares[i], zero), one, other);
        }
    } else {
        ptrdiff_t k = 0;
        for (; k + 4 <= states * vectors; k += 4) RAU_NAME(exp_nonpositive)(shares + k, 4);
        for (; k < states * vectors; k++) RAU_NAME(exp_nonpositive)(shares + k, 1);
    }
    for (ptrdiff_t k = 0; k < states; k++)
        for (int v = 0; v < vectors; v++) {
            const DOUBLES total = sums[k * vectors + v], share = total * shares[k * vectors + v];
            shares[k * vectors + v] = SELECT(EQUAL(total, zero), zero, share);
            sum[v] += shares[k * vectors + v];
        }
    for (int v = 0; v < vectors; v++) {
        DOUBLES divisor = sum[v];
        if (wide) { /* Finite sums may add up beyond float64; scaled by a power of two their shares are still right. */
            const MASK huge = EQUAL(divisor, infinity) | EQUAL(divisor, -infinity);
            DOUBLES scaled = zero;
            for (ptrdiff_t k = 0; k < states; k++) {
                const DOUBLES small = shares[k * vectors + v] * 0x1p-64;
                scaled += small;
                shares[k * vectors + v] = SELECT(huge, small, shares[k * vectors + v]);
            }
            divisor = SELECT(huge, scaled, divisor);
        }
        const MASK single = EQUAL(live[v], one); /* a single live side comes back as it is */
        char *to = weights + v * DOUBLES_IN * (wide ? sizeof(double) : sizeof(float));
        for (ptrdiff_t k = 0; k < states; k++, to += gap) {
            DOUBLES weight = SELECT(single, one, shares[k * vectors + v] / divisor);
            weight = SELECT(EQUAL(sums[k * vectors + v], zero), zero, weight);
            if (wide) {
                memcpy(to, &weight, count * sizeof(double));
            } else {
                const HALF_FLOATS narrow = CONVERT(HALF_FLOATS, weight);
                memcpy(to, &narrow, count * sizeof(float));
            }
        }
        sum[v] = SELECT(single, alone[v], sum[v]);
    }
    for (int v = 0; v < vectors; v++) {
        RAU_NAME(store_rows)(AT(2 * states), STEP(2 * states), count, lanes, max[v], stream, wide);
        RAU_NAME(store_rows)(AT(2 * states + 1), STEP(2 * states + 1), count, lanes, sum[v], stream, wide);
    }
#undef AT
#undef STEP
}

/* Weigh a tile whose rows lie `step` bytes apart along the inner axis, in all arrays; 0: each has a step of its own. */
RAU_INLINE RAU_TARGET void RAU_NAME(weigh_along)(
    const rau_tile *tile, const ptrdiff_t states, const ptrdiff_t step, const int along_heads, ptrdiff_t outer,
    ptrdiff_t inner, const int wide) {
    rau_line of_two[6], *lines = states == 2 ? of_two : tile->lines;
    const ptrdiff_t item = wide ? sizeof(double) : sizeof(float), gap = tile->tokens * tile->heads * item;
    const ptrdiff_t lanes = tile->lanes;
    const int stream = tile->stream;
    DOUBLES *numbers = (DOUBLES *)tile->numbers;
    char *weights = (char *)tile->weights;
    for (ptrdiff_t o = 0; o < outer; o++) {
        for (ptrdiff_t j = 0; j < 2 * states + 2; j++) {
            const rau_plane plane = j < states ? tile->max[j] : j < 2 * states ? tile->sum[j - states]
                                  : j == 2 * states ? tile->max[states] : tile->sum[states];
            lines[j].at = plane.base + o * (along_heads ? plane.token : plane.head);
            lines[j].step = along_heads ? plane.head : plane.token;
        }
        ptrdiff_t rest = inner;
#define WEIGH_ROWS(step, vectors, count) \
    RAU_NAME(weigh_rows)(lines, states, step, vectors, count, weights, gap, numbers, lanes, stream, wide)
#define GO_ON(rows) \
    rest -= (rows), weights += (rows) * item; \
    for (ptrdiff_t j = 0; j < 2 * states + 2; j++) lines[j].at += (rows) * (step ? step : lines[j].step)
        while (states == 2 && rest >= 2 * DOUBLES_IN) {
            WEIGH_ROWS(step, 2, DOUBLES_IN);
            GO_ON(2 * DOUBLES_IN);
        }
        while (rest >= DOUBLES_IN) {
            WEIGH_ROWS(step, 1, DOUBLES_IN);
            GO_ON(DOUBLES_IN);
        }
        if (rest) {
            WEIGH_ROWS(0, 1, rest);
            weights += rest * item;
        }
#undef WEIGH_ROWS
#undef GO_ON
    }
}

RAU_INLINE RAU_TARGET void RAU_NAME(weigh)(rau_tile *tile, const int wide) {
    const ptrdiff_t states = tile->states, row = tile->lanes * (wide ? sizeof(double) : sizeof(float));
    /* Run along the axis whose rows are closer together. */
    const rau_plane *result = &tile->max[states];
    const int along_heads = tile->tokens == 1 || (tile->heads > 1 && result->head < result->token);
    ptrdiff_t inner = along_heads ? tile->heads : tile->tokens;
    ptrdiff_t outer = along_heads ? tile->tokens : tile->heads;
    tile->weight_token = along_heads ? inner : 1;
    tile->weight_head = along_heads ? 1 : inner;
    int one = 1, dense = 1;
    for (ptrdiff_t k = 0; k <= states; k++) {
        const rau_plane *max = &tile->max[k], *sum = &tile->sum[k];
        const ptrdiff_t along_max = along_heads ? max->head : max->token, across_max = along_heads ? max->token : max->head;
        const ptrdiff_t along_sum = along_heads ? sum->head : sum->token, across_sum = along_heads ? sum->token : sum->head;
        one &= across_max == inner * along_max && across_sum == inner * along_sum;
        dense &= along_max == row && along_sum == row;
    }
    if (one) { /* The other axis goes on at the end of this one: they are walked as one. Short axes would make short runs. */
        inner *= outer;
        outer = 1;
    }
    if (states == 2 && dense && row == 32 && !wide) RAU_NAME(weigh_along)(tile, 2, 32, along_heads, outer, inner, wide);
    else if (states == 2) RAU_NAME(weigh_along)(tile, 2, 0, along_heads, outer, inner, wide);
    else RAU_NAME(weigh_along)(tile, states, 0, along_heads, outer, inner, wide);
}

static RAU_TARGET void RAU_NAME(weigh_f32)(rau_tile *tile) { RAU_NAME(weigh)(tile, 0); }
static RAU_TARGET void RAU_NAME(weigh_f64)(rau_tile *tile) { RAU_NAME(weigh)(tile, 1); }

/* ---- formats: widening is exact, narrowing rounds once, to nearest even ---------------------------------- */

typedef struct { /* what is merged at a time: two vectors of float */
    FLOATS a, b;
} RAU_NAME(unit);
#define UNIT RAU_NAME(unit)
#define UNIT_IN (2 * FLOATS_IN)


RAU_INLINE RAU_TARGET FLOATS RAU_NAME(from_f16)(const char *at) {
#if RAU_BYTES == 64
    return (FLOATS)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#elif RAU_BYTES == 32
    return (FLOATS)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#else
    SHORTS halves;
    memcpy(&halves, at, sizeof halves);
    const WORDS zero = {0}, h = CONVERT(WORDS, halves);
    const WORDS magnitude = (h & 0x7fffu) << 13;
    /* The exponent is still biased by 15: 2^112 corrects it, subnormals included. */
    WORDS bits = RAU_NAME(words_of)(RAU_NAME(floats_of)(magnitude) * 0x1p112f);
    bits |= ALL_BITS(WORDS, magnitude >= zero + 0x0f800000u) & 0x7f800000u; /* infinity and NaN keep the largest exponent */
    return RAU_NAME(floats_of)(bits | (h & 0x8000u) << 16);
#endif
}

#if RAU_BYTES < 32
RAU_INLINE RAU_TARGET WORDS RAU_NAME(choose)(WORDS mask, WORDS yes, WORDS no) { return (mask & yes) | (~mask & no); }

RAU_INLINE RAU_TARGET SHORTS RAU_NAME(to_f16)(FLOATS x) {
    const WORDS zero = {0}, bits = RAU_NAME(words_of)(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    /* Normal results: move the exponent's bias from 127 to 15 and round 13 bits away. */
    WORDS normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    normal = RAU_NAME(choose)(ALL_BITS(WORDS, normal > zero + 0x7c00u), zero + 0x7c00u, normal); /* too large: infinity */
    /* Subnormal results are multiples of 2^-24, which is the spacing of floats next to 0.5. */
    const WORDS small = RAU_NAME(words_of)(RAU_NAME(floats_of)(magnitude) + 0.5f) - 0x3f000000u;
    WORDS result = RAU_NAME(choose)(ALL_BITS(WORDS, magnitude < zero + 0x38800000u), small, normal);
    result = RAU_NAME(choose)(ALL_BITS(WORDS, magnitude > zero + 0x7f800000u), zero + 0x7e00u, result);
    return CONVERT(SHORTS, result | sign);
}
#endif

/* bfloat16, in the upper half of each word. */
RAU_INLINE RAU_TARGET WORDS RAU_NAME(to_bf16)(FLOATS x) {
    const WORDS bits = RAU_NAME(words_of)(x);
    const WORDS rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
#if RAU_BYTES == 64
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
    return (WORDS)_mm512_mask_mov_epi32((__m512i)rounded, nan, (__m512i)(bits | 0x400000u));
#else
    const WORDS nan = ALL_BITS(WORDS, x != x);
    return (nan & (bits | 0x400000u)) | (~nan & rounded);
#endif
}

/* Two vectors of elements. `paired`: the even ones and the odd ones of bfloat16, which lie in one word; otherwise in their
   order. */
RAU_INLINE RAU_TARGET UNIT RAU_NAME(load_unit)(const char *at, const int format, const int paired) {
    UNIT unit;
    if (format == RAU_F32) {
        memcpy(&unit, at, sizeof unit);
    } else if (format == RAU_F16) {
        unit.a = RAU_NAME(from_f16)(at);
        unit.b = RAU_NAME(from_f16)(at + sizeof(SHORTS));
    } else if (paired) {
        WORDS words;
        memcpy(&words, at, sizeof words);
        unit.a = RAU_NAME(floats_of)(words << 16);
        unit.b = RAU_NAME(floats_of)(words & 0xffff0000u);
    } else {
        SHORTS halves[2];
        memcpy(halves, at, sizeof halves);
        unit.a = RAU_NAME(floats_of)(CONVERT(WORDS, halves[0]) << 16);
        unit.b = RAU_NAME(floats_of)(CONVERT(WORDS, halves[1]) << 16);
    }
    return unit;
}

RAU_INLINE RAU_TARGET void RAU_NAME(store_unit)(char *to, UNIT unit, int around, const int format) {
    if (format == RAU_F32) {
        RAU_NAME(put)(to, &unit.a, sizeof unit.a, around);
        RAU_NAME(put)(to + sizeof unit.a, &unit.b, sizeof unit.b, around);
    } else if (format == RAU_BF16) {
        const WORDS words = (RAU_NAME(to_bf16)(unit.a) >> 16) | (RAU_NAME(to_bf16)(unit.b) & 0xffff0000u);
        RAU_NAME(put)(to, &words, sizeof words, around);
    } else {
#if RAU_BYTES == 64
        const __m256i a = _mm512_cvtps_ph((__m512)unit.a, _MM_FROUND_TO_NEAREST_INT);
        const __m256i b = _mm512_cvtps_ph((__m512)unit.b, _MM_FROUND_TO_NEAREST_INT);
        const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
#elif RAU_BYTES == 32
        const __m128i a = _mm256_cvtps_ph((__m256)unit.a, _MM_FROUND_TO_NEAREST_INT);
        const __m128i b = _mm256_cvtps_ph((__m256)unit.b, _MM_FROUND_TO_NEAREST_INT);
        const __m256i halves = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
#else
        const SHORTS halves[2] = {RAU_NAME(to_f16)(unit.a), RAU_NAME(to_f16)(unit.b)};
#endif
        RAU_NAME(put)(to, &halves, sizeof halves, around);
    }
}

/* ---- rows: one pass over the elements -------------------------------------------------------------------- */

/* Some elements of a row of the result, from as many of each of its sources. The first source's format is `lead`, the others'
   `later`, the result's `format`. */
RAU_INLINE RAU_TARGET UNIT RAU_NAME(merge_unit)(
    const char *const *sources, const float *shares, const ptrdiff_t used, ptrdiff_t first, const int lead, const int later,
    const int format) {
    UNIT sum = {0};
    for (ptrdiff_t k = 0; k < used; k++) {
        const int its = k ? later : lead;
        UNIT unit = RAU_NAME(load_unit)(sources[k] + first * RAU_ITEM(its), its, lead == RAU_BF16 && format == RAU_BF16);
        unit.a *= shares[k];
        unit.b *= shares[k];
        sum.a = k ? sum.a + unit.a : unit.a;
        sum.b = k ? sum.b + unit.b : unit.b;
    }
    return sum;
}

/* A row shorter than a unit passes through memory of our own. */
static RAU_TARGET void RAU_NAME(merge_short_row)(
    char *to, const char *const *sources, const float *shares, const ptrdiff_t used, ptrdiff_t head_dim, const int lead,
    const int later, const int format) {
    char piece[sizeof(UNIT)];
    const char *at = piece;
    UNIT sum = {0};
    for (ptrdiff_t k = 0; k < used; k++) {
        const int its = k ? later : lead;
        const float one = 1.0f;
        memset(piece, 0, sizeof piece);
        memcpy(piece, sources[k], head_dim * RAU_ITEM(its));
        UNIT unit = RAU_NAME(merge_unit)(&at, &one, 1, 0, its, its, format);
        sum.a = k ? sum.a + unit.a * shares[k] : unit.a * shares[k];
        sum.b = k ? sum.b + unit.b * shares[k] : unit.b * shares[k];
    }
    RAU_NAME(store_unit)(piece, sum, 0, format);
    memcpy(to, piece, head_dim * RAU_ITEM(format));
}

/* A row of the result, in one pass. */
RAU_INLINE RAU_TARGET void RAU_NAME(merge_row)(
    char *to, const char *const *sources, const float *shares, const ptrdiff_t used, ptrdiff_t head_dim, int around,
    const int lead, const int later, const int format) {
    const ptrdiff_t end = head_dim - UNIT_IN;
    if (end < 0) {
        RAU_NAME(merge_short_row)(to, sources, shares, used, head_dim, lead, later, format);
        return;
    }
    UNIT last = {0};
    const int ragged = head_dim % UNIT_IN != 0;
    /* A row of a broken number of units ends with one that overlaps the one before. It is merged first: once that is stored,
       and the result stands on a source, its elements are not there any more. */
    if (ragged) last = RAU_NAME(merge_unit)(sources, shares, used, end, lead, later, format);
    for (ptrdiff_t j = 0; j <= end; j += UNIT_IN)
        RAU_NAME(store_unit)(
            to + j * RAU_ITEM(format), RAU_NAME(merge_unit)(sources, shares, used, j, lead, later, format), around, format);
    to += end * RAU_ITEM(format);
    if (ragged) RAU_NAME(store_unit)(to, last, RAU_NAME(way)(to, around), format);
}

/* The rows of a tile run along the axis on which those of the result are closer together. */
typedef struct {
    ptrdiff_t outer, inner;
    int by_token;
} RAU_NAME(walk);

RAU_INLINE RAU_TARGET RAU_NAME(walk) RAU_NAME(walk_of)(const rau_tile *tile) {
    const rau_plane *result = &tile->attn[tile->states];
    RAU_NAME(walk) walk = {tile->tokens, tile->heads, 0};
    if (tile->heads == 1 || (tile->tokens > 1 && result->token < result->head)) {
        walk.outer = tile->heads;
        walk.inner = tile->tokens;
        walk.by_token = 1;
    }
    return walk;
}

#define ALONG(plane) (walk.by_token ? (plane).token : (plane).head)
#define ACROSS(plane) (walk.by_token ? (plane).head : (plane).token)

/* Two states: the case that matters. */
RAU_INLINE RAU_TARGET void RAU_NAME(rows_of_two)(const rau_tile *tile, const int format, const int later) {
    const RAU_NAME(walk) walk = RAU_NAME(walk_of)(tile);
    const rau_plane *attn = tile->attn;
    const ptrdiff_t head_dim = tile->head_dim, count = tile->tokens * tile->heads, ahead = tile->ahead;
    const ptrdiff_t bytes = head_dim * RAU_ITEM(format), later_bytes = head_dim * RAU_ITEM(later);
    const ptrdiff_t step_a = ALONG(attn[0]), step_b = ALONG(attn[1]), step_to = ALONG(attn[2]);
    const ptrdiff_t step_weight = walk.by_token ? tile->weight_token : tile->weight_head;
    for (ptrdiff_t o = 0; o < walk.outer; o++) {
        const char *a = attn[0].base + o * ACROSS(attn[0]), *b = attn[1].base + o * ACROSS(attn[1]);
        char *to = attn[2].base + o * ACROSS(attn[2]);
        const float *weights = (const float *)tile->weights + o * (walk.by_token ? tile->weight_head : tile->weight_token);
        for (ptrdiff_t i = 0; i < walk.inner; i++) {
            if (ahead && i + ahead < walk.inner) {
                RAU_NAME(prefetch)(a + ahead * step_a, bytes);
                RAU_NAME(prefetch)(b + ahead * step_b, later_bytes);
            }
            const float shares[2] = {weights[0], weights[count]};
            const char *sources[2] = {a, b};
            const int around = RAU_NAME(way)(to, tile->stream);
            /* A state without a weight is not read; NaN is a weight too. */
            if (shares[0] != 0.0f && shares[1] != 0.0f)
                RAU_NAME(merge_row)(to, sources, shares, 2, head_dim, around, format, later, format);
            else if (shares[0] != 0.0f)
                RAU_NAME(merge_row)(to, sources, shares, 1, head_dim, around, format, later, format);
            else if (shares[1] != 0.0f)
                RAU_NAME(merge_row)(to, sources + 1, shares + 1, 1, head_dim, around, later, later, format);
            else
                memset(to, 0, bytes);
            a += step_a;
            b += step_b;
            to += step_to;
            weights += step_weight;
        }
    }
}

RAU_INLINE RAU_TARGET void RAU_NAME(rows_of_many)(rau_tile *tile, const int format, const int later) {
    const RAU_NAME(walk) walk = RAU_NAME(walk_of)(tile);
    const rau_plane *attn = tile->attn, *result = &attn[tile->states];
    const ptrdiff_t head_dim = tile->head_dim, count = tile->tokens * tile->heads, ahead = tile->ahead;
    const ptrdiff_t bytes = head_dim * RAU_ITEM(format), later_bytes = head_dim * RAU_ITEM(later);
    float *shares = (float *)tile->shares;
    for (ptrdiff_t o = 0; o < walk.outer; o++)
        for (ptrdiff_t i = 0; i < walk.inner; i++) {
            const ptrdiff_t t = walk.by_token ? i : o, h = walk.by_token ? o : i;
            const float *weights = (const float *)tile->weights + t * tile->weight_token + h * tile->weight_head;
            ptrdiff_t used = 0;
            int first_used = 0;
            for (ptrdiff_t k = 0; k < tile->states; k++) {
                const char *at = attn[k].base + t * attn[k].token + h * attn[k].head;
                if (ahead && i + ahead < walk.inner) RAU_NAME(prefetch)(at + ahead * ALONG(attn[k]), k ? later_bytes : bytes);
                const float weight = weights[k * count];
                if (weight != 0.0f) {
                    tile->sources[used] = at;
                    shares[used++] = weight;
                    first_used |= k == 0;
                }
            }
            char *to = result->base + t * result->token + h * result->head;
            const int around = RAU_NAME(way)(to, tile->stream);
            if (used == 0)
                memset(to, 0, bytes);
            else if (format == later || first_used)
                RAU_NAME(merge_row)(to, tile->sources, shares, used, head_dim, around, format, later, format);
            else
                RAU_NAME(merge_row)(to, tile->sources, shares, used, head_dim, around, later, later, format);
        }
}

RAU_INLINE RAU_TARGET void RAU_NAME(rows)(rau_tile *tile, const int format, const int later) {
    if (tile->states == 2) RAU_NAME(rows_of_two)(tile, format, later);
    else RAU_NAME(rows_of_many)(tile, format, later);
}

static RAU_TARGET void RAU_NAME(rows_f32)(rau_tile *tile) { RAU_NAME(rows)(tile, RAU_F32, RAU_F32); }
static RAU_TARGET void RAU_NAME(rows_f16)(rau_tile *tile) { RAU_NAME(rows)(tile, RAU_F16, RAU_F16); }
static RAU_TARGET void RAU_NAME(rows_bf16)(rau_tile *tile) { RAU_NAME(rows)(tile, RAU_BF16, RAU_BF16); }
static RAU_TARGET void RAU_NAME(rows_f32_f16)(rau_tile *tile) { RAU_NAME(rows)(tile, RAU_F32, RAU_F16); }
static RAU_TARGET void RAU_NAME(rows_f32_bf16)(rau_tile *tile) { RAU_NAME(rows)(tile, RAU_F32, RAU_BF16); }

static RAU_TARGET void RAU_NAME(rows_f64)(rau_tile *tile) {
    const ptrdiff_t head_dim = tile->head_dim, count = tile->tokens * tile->heads;
    const rau_plane *result = &tile->attn[tile->states];
    for (ptrdiff_t t = 0; t < tile->tokens; t++)
        for (ptrdiff_t h = 0; h < tile->heads; h++) {
            const double *weights = (const double *)tile->weights + t * tile->weight_token + h * tile->weight_head;
            double *to = (double *)(result->base + t * result->token + h * result->head);
            ptrdiff_t used = 0;
            for (ptrdiff_t k = 0; k < tile->states; k++)
                if (weights[k * count] != 0.0) {
                    tile->sources[used] = tile->attn[k].base + t * tile->attn[k].token + h * tile->attn[k].head;
                    tile->shares[used++] = weights[k * count];
                }
            ptrdiff_t j = 0;
            const int around = RAU_NAME(way)((const char *)to, tile->stream);
            for (; j + DOUBLES_IN <= head_dim; j += DOUBLES_IN) {
                DOUBLES sum = {0};
                for (ptrdiff_t k = 0; k < used; k++) {
                    DOUBLES term;
                    memcpy(&term, tile->sources[k] + j * sizeof(double), sizeof term);
                    term *= tile->shares[k];
                    sum = k ? sum + term : term;
                }
                RAU_NAME(put)((char *)(to + j), &sum, sizeof sum, around);
            }
            for (; j < head_dim; j++) {
                double sum = 0.0;
                for (ptrdiff_t k = 0; k < used; k++) {
                    const double term = tile->shares[k] * ((const double *)tile->sources[k])[j];
                    sum = k ? sum + term : term;
                }
                to[j] = sum;
            }
        }
}

static const rau_version RAU_NAME(rau_version) = {
    RAU_STRING(RAU_VERSION),
    RAU_NAME(weigh_f32), RAU_NAME(weigh_f64),
    RAU_NAME(rows_f32), RAU_NAME(rows_f16), RAU_NAME(rows_bf16), RAU_NAME(rows_f64),
    RAU_NAME(rows_f32_f16), RAU_NAME(rows_f32_bf16),
};

#undef CONVERT
#undef MASK
#undef FLOATS
#undef WORDS
#undef DOUBLES
#undef LONGS
#undef HALF_FLOATS
#undef SHORTS
#undef FLOATS_IN
#undef DOUBLES_IN
#undef SELECT
#undef ALL
#undef ALL_BITS
#undef GREATER
#undef EQUAL
#undef IS_NAN
#undef EACH_ROW
#undef UNIT
#undef UNIT_IN
#undef ALONG
#undef ACROSS
#undef RAU_VERSION
#undef RAU_TARGET
#undef RAU_BYTES

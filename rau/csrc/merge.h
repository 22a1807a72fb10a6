/* The rows' elements, for the version at hand: a part of one_version.h. */

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

/* bfloat16, in the upper half of each word. A NaN stays one without a look at it: its lower half is 0, in which rounding carries
   nothing upwards, since a NaN comes from a bfloat16 number, from a weight (weigh.h sees to it) or from an operation. */
RAU_INLINE RAU_TARGET WORDS RAU_NAME(to_bf16)(FLOATS x) {
    const WORDS bits = RAU_NAME(words_of)(x);
    return bits + (0x7fffu + ((bits >> 16) & 1u));
}

/* The upper halves of two vectors' words: those of `low` become the lower ones. */
RAU_INLINE RAU_TARGET WORDS RAU_NAME(upper_halves)(WORDS low, WORDS high) {
#if RAU_BYTES == 32
    return (WORDS)_mm256_blend_epi16((__m256i)(low >> 16), (__m256i)high, 0xaa);
#else
    return (low >> 16) | (high & 0xffff0000u);
#endif
}

/* Two vectors of elements. `paired`: the even ones and the odd ones of bfloat16, which lie in one word; otherwise in their
   order. */
RAU_INLINE RAU_TARGET UNIT RAU_NAME(load_unit)(const char *at, const int format, const int paired) {
    UNIT unit;
    if (format == RAU_F32) {
        memcpy(&unit.a, at, sizeof unit.a); /* one by one: gcc 12 takes both through the stack (0.57 of the roof for 0.91) */
        memcpy(&unit.b, at + sizeof unit.a, sizeof unit.b);
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
        memcpy(&halves[0], at, sizeof halves[0]); /* one by one, as above */
        memcpy(&halves[1], at + sizeof halves[0], sizeof halves[1]);
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
        const WORDS words = RAU_NAME(upper_halves)(RAU_NAME(to_bf16)(unit.a), RAU_NAME(to_bf16)(unit.b));
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
#elif RAU_BYTES
        /* One vector: gcc 12 takes two halves of one through the stack. */
        const LONGS halves = {(uint64_t)RAU_NAME(to_f16)(unit.a), (uint64_t)RAU_NAME(to_f16)(unit.b)};
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

RAU_INLINE RAU_TARGET void RAU_NAME(prefetch)(const char *row, ptrdiff_t bytes) {
    for (ptrdiff_t j = 0; j < bytes && j < 1024; j += 64) RAU_PREFETCH(row + j);
}

/* How many bytes ahead of a row to prefetch; 0: leave it to the processor. It follows what is contiguous by itself, though
   Intel's not as far ahead as pays. Where short runs of rows do not go on in the next one, fetch the same row of that. */
RAU_INLINE RAU_TARGET ptrdiff_t RAU_NAME(ahead_of)(
    const rau_plane *plane, const RAU_NAME(walk) walk, ptrdiff_t contiguous, ptrdiff_t bytes) {
    const ptrdiff_t along = ALONG(*plane), across = ACROSS(*plane);
    if (walk.outer > 1 && across != walk.inner * along && walk.inner * bytes <= RAU_SHORT_RUN) return across;
    return (along == bytes ? contiguous : RAU_APART) * along;
}

/* Two states: the case that matters. */
RAU_INLINE RAU_TARGET void RAU_NAME(rows_of_two)(const rau_tile *tile, const int format, const int later) {
    const RAU_NAME(walk) walk = RAU_NAME(walk_of)(tile);
    const rau_plane *attn = tile->attn;
    const ptrdiff_t head_dim = tile->head_dim, state = tile->weight_state;
    const ptrdiff_t bytes = head_dim * RAU_ITEM(format), later_bytes = head_dim * RAU_ITEM(later);
    const ptrdiff_t ahead_a = RAU_NAME(ahead_of)(&attn[0], walk, tile->ahead, bytes);
    const ptrdiff_t ahead_b = RAU_NAME(ahead_of)(&attn[1], walk, tile->ahead, later_bytes);
    const ptrdiff_t step_a = ALONG(attn[0]), step_b = ALONG(attn[1]), step_to = ALONG(attn[2]);
    const ptrdiff_t step_weight = walk.by_token ? tile->weight_token : tile->weight_head;
    for (ptrdiff_t o = 0; o < walk.outer; o++) {
        const char *a = attn[0].base + o * ACROSS(attn[0]), *b = attn[1].base + o * ACROSS(attn[1]);
        char *to = attn[2].base + o * ACROSS(attn[2]);
        const float *weights = (const float *)tile->weights + o * (walk.by_token ? tile->weight_head : tile->weight_token);
        for (ptrdiff_t i = 0; i < walk.inner; i++) {
            if (ahead_a) RAU_NAME(prefetch)(a + ahead_a, bytes);
            if (ahead_b) RAU_NAME(prefetch)(b + ahead_b, later_bytes);
            const float shares[2] = {weights[0], weights[state]};
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
    const ptrdiff_t head_dim = tile->head_dim, state = tile->weight_state;
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
                const ptrdiff_t ahead = RAU_NAME(ahead_of)(&attn[k], walk, tile->ahead, k ? later_bytes : bytes);
                if (ahead) RAU_NAME(prefetch)(at + ahead, k ? later_bytes : bytes);
                const float weight = weights[k * state];
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
    const ptrdiff_t head_dim = tile->head_dim, state = tile->weight_state;
    const rau_plane *result = &tile->attn[tile->states];
    for (ptrdiff_t t = 0; t < tile->tokens; t++)
        for (ptrdiff_t h = 0; h < tile->heads; h++) {
            const double *weights = (const double *)tile->weights + t * tile->weight_token + h * tile->weight_head;
            double *to = (double *)(result->base + t * result->token + h * result->head);
            ptrdiff_t used = 0;
            for (ptrdiff_t k = 0; k < tile->states; k++)
                if (weights[k * state] != 0.0) {
                    tile->sources[used] = tile->attn[k].base + t * tile->attn[k].token + h * tile->attn[k].head;
                    tile->shares[used++] = weights[k * state];
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

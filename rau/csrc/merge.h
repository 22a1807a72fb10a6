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
#elif defined(RAU_NEON) && RAU_BYTES
    uint16x4_t halves;
    memcpy(&halves, at, sizeof halves);
    return (FLOATS)vcvt_f32_f16(vreinterpret_f16_u16(halves));
#else
    const WORDS zero = {0}, h = RAU_NAME(words_at)(at);
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
#if defined(RAU_NEON) && RAU_BYTES
    return (SHORTS)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x));
#else
    const WORDS zero = {0}, bits = RAU_NAME(words_of)(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    /* Normal results: move the exponent's bias from 127 to 15 and round 13 bits away. */
    WORDS normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    normal = RAU_NAME(choose)(ALL_BITS(WORDS, normal > zero + 0x7c00u), zero + 0x7c00u, normal); /* too large: infinity */
    /* Subnormal results are multiples of 2^-24, which is the spacing of floats next to 0.5. */
    const WORDS small = RAU_NAME(words_of)(RAU_NAME(floats_of)(magnitude) + 0.5f) - 0x3f000000u;
    WORDS result = RAU_NAME(choose)(ALL_BITS(WORDS, magnitude < zero + 0x38800000u), small, normal);
    result = RAU_NAME(choose)(ALL_BITS(WORDS, magnitude > zero + 0x7f800000u), zero + 0x7e00u, result);
    return CONVERT(SHORTS, result | sign);
#endif
}
#endif

/* bfloat16, in the upper half of each word. A NaN stays one without a look at it: its lower half is 0, in which rounding carries
   nothing upwards, since a NaN comes from a bfloat16 number, from a weight (weigh.h sees to it) or from an operation.
   By integers everywhere: x86's vcvtneps2bf16 takes subnormal numbers for 0, and ARM's bfcvtn, whose manual promises this rounding,
   came with Armv8.6, which many processors there do not have; it would want a version of its own. */
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
        unit.a = RAU_NAME(floats_of)(RAU_NAME(words_at)(at) << 16);
        unit.b = RAU_NAME(floats_of)(RAU_NAME(words_at)(at + sizeof(SHORTS)) << 16);
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
    const int paired = lead == RAU_BF16 && format == RAU_BF16;
    UNIT sum = RAU_NAME(load_unit)(sources[0] + first * RAU_ITEM(lead), lead, paired);
    sum.a *= shares[0];
    sum.b *= shares[0];
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 4
#endif
    for (ptrdiff_t k = 1; k < used; k++) {
        const UNIT unit = RAU_NAME(load_unit)(sources[k] + first * RAU_ITEM(later), later, paired);
        sum.a += unit.a * shares[k];
        sum.b += unit.b * shares[k];
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

/* The same of float64. */
RAU_INLINE RAU_TARGET DOUBLES RAU_NAME(doubles_at)(const char *row, ptrdiff_t j) {
    DOUBLES some;
    memcpy(&some, row + j * sizeof(double), sizeof some);
    return some;
}

RAU_INLINE RAU_TARGET DOUBLES RAU_NAME(merge_some_doubles)(
    const char *const *sources, const double *shares, const ptrdiff_t used, ptrdiff_t first) {
    DOUBLES sum = RAU_NAME(doubles_at)(sources[0], first) * shares[0];
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 4
#endif
    for (ptrdiff_t k = 1; k < used; k++) sum += RAU_NAME(doubles_at)(sources[k], first) * shares[k];
    return sum;
}

RAU_INLINE RAU_TARGET void RAU_NAME(merge_doubles)(
    char *to, const char *const *sources, const double *shares, const ptrdiff_t used, ptrdiff_t head_dim, int around) {
    const ptrdiff_t end = head_dim - DOUBLES_IN;
    if (end < 0) {
        for (ptrdiff_t j = 0; j < head_dim; j++) {
            double sum = ((const double *)sources[0])[j] * shares[0];
            for (ptrdiff_t k = 1; k < used; k++) sum += ((const double *)sources[k])[j] * shares[k];
            ((double *)to)[j] = sum;
        }
        return;
    }
    DOUBLES last = {0};
    const int ragged = head_dim % DOUBLES_IN != 0;
    if (ragged) last = RAU_NAME(merge_some_doubles)(sources, shares, used, end);
    for (ptrdiff_t j = 0; j <= end; j += DOUBLES_IN) {
        const DOUBLES sum = RAU_NAME(merge_some_doubles)(sources, shares, used, j);
        RAU_NAME(put)(to + j * sizeof(double), &sum, sizeof sum, around);
    }
    to += end * sizeof(double);
    if (ragged) RAU_NAME(put)(to, &last, sizeof last, RAU_NAME(way)(to, around));
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

/* Rows of the result on their way around the cache that lie where no such store can put them (see put in vectors.h): they are
   gathered here, and leave by whole lines. Stored as usual between others that go around, they took 4 to 20 times as long, since
   a processor then has to bring back, or to write in parts, what it has just sent away. */
typedef struct {
    char rows[RAU_GATHERED + RAU_LONGEST_GATHERED]; /* as they will lie from the line `to` on */
    char *to;
    ptrdiff_t first, end; /* which bytes of them there are */
} RAU_NAME(gathered);

RAU_INLINE RAU_TARGET void RAU_NAME(store_lines)(RAU_NAME(gathered) *some) {
    const ptrdiff_t whole = some->end / 64 * 64, vector = FLOATS_IN * sizeof(float);
    ptrdiff_t j = 0;
    if (!whole) return;
    if (some->first) { /* the start of this line belongs to somebody else */
        memcpy(some->to + some->first, some->rows + some->first, 64 - some->first);
        some->first = 0;
        j = 64;
    }
    for (; j < whole; j += vector) RAU_NAME(put)(some->to + j, some->rows + j, vector, RAU_NAME(way)(some->to, 1));
    memcpy(some->rows, some->rows + whole, 64);
    some->to += whole;
    some->end -= whole;
}

RAU_INLINE RAU_TARGET void RAU_NAME(store_gathered)(RAU_NAME(gathered) *some) {
    RAU_NAME(store_lines)(some);
    if (some->end > some->first) memcpy(some->to + some->first, some->rows + some->first, some->end - some->first);
}

/* Where a row is to be written instead of at `to`. */
RAU_INLINE RAU_TARGET char *RAU_NAME(gather)(RAU_NAME(gathered) *some, char *to, ptrdiff_t bytes) {
    if (to != some->to + some->end) {
        RAU_NAME(store_gathered)(some);
        some->first = some->end = (uintptr_t)to % 64;
        some->to = to - some->end;
    } else if (some->end >= RAU_GATHERED) {
        RAU_NAME(store_lines)(some);
    }
    some->end += bytes;
    return some->rows + some->end - bytes;
}

/* How rows of the result are stored. */
enum { RAU_NAME(through), RAU_NAME(around), RAU_NAME(by_lines) };

RAU_INLINE RAU_TARGET int RAU_NAME(stores)(const rau_tile *tile, const RAU_NAME(walk) walk, ptrdiff_t bytes) {
    const rau_plane *result = &tile->attn[tile->states];
    const ptrdiff_t along = ALONG(*result), across = walk.outer > 1 ? ACROSS(*result) : 0;
    if (!RAU_NAME(way)((const char *)64, tile->stream)) return RAU_NAME(through);
    if (((uintptr_t)result->base | along | across | bytes) % 16 == 0) return RAU_NAME(around);
    return along == bytes && bytes <= RAU_LONGEST_GATHERED ? RAU_NAME(by_lines) : RAU_NAME(through);
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
    const int stores = RAU_NAME(stores)(tile, walk, bytes);
    RAU_NAME(gathered) some;
    some.to = NULL;
    some.first = some.end = 0;
    for (ptrdiff_t o = 0; o < walk.outer; o++) {
        const char *a = attn[0].base + o * ACROSS(attn[0]), *b = attn[1].base + o * ACROSS(attn[1]);
        char *to = attn[2].base + o * ACROSS(attn[2]);
        const float *weights = (const float *)tile->weights + o * (walk.by_token ? tile->weight_head : tile->weight_token);
        for (ptrdiff_t i = 0; i < walk.inner; i++) {
            if (ahead_a) RAU_NAME(prefetch)(a + ahead_a, bytes);
            if (ahead_b) RAU_NAME(prefetch)(b + ahead_b, later_bytes);
            const float shares[2] = {weights[0], weights[state]};
            const char *sources[2] = {a, b};
            const int around = RAU_NAME(way)(to, stores == RAU_NAME(around));
            char *at = stores == RAU_NAME(by_lines) ? RAU_NAME(gather)(&some, to, bytes) : to;
            /* A state without a weight is not read; NaN is a weight too. */
            if (shares[0] != 0.0f && shares[1] != 0.0f)
                RAU_NAME(merge_row)(at, sources, shares, 2, head_dim, around, format, later, format);
            else if (shares[0] != 0.0f)
                RAU_NAME(merge_row)(at, sources, shares, 1, head_dim, around, format, later, format);
            else if (shares[1] != 0.0f)
                RAU_NAME(merge_row)(at, sources + 1, shares + 1, 1, head_dim, around, later, later, format);
            else
                memset(at, 0, bytes);
            a += step_a;
            b += step_b;
            to += step_to;
            weights += step_weight;
        }
    }
    if (stores == RAU_NAME(by_lines)) RAU_NAME(store_gathered)(&some);
}

RAU_INLINE RAU_TARGET void RAU_NAME(rows_of_many)(rau_tile *tile, const int format, const int later) {
    const RAU_NAME(walk) walk = RAU_NAME(walk_of)(tile);
    const rau_plane *attn = tile->attn, *result = &attn[tile->states];
    const ptrdiff_t head_dim = tile->head_dim, state = tile->weight_state;
    const ptrdiff_t bytes = head_dim * RAU_ITEM(format), later_bytes = head_dim * RAU_ITEM(later);
    const ptrdiff_t step_to = ALONG(*result), step_weight = walk.by_token ? tile->weight_token : tile->weight_head;
    const int stores = RAU_NAME(stores)(tile, walk, bytes);
    RAU_NAME(gathered) some;
    some.to = NULL;
    some.first = some.end = 0;
    const int wide = format == RAU_F64;
    const ptrdiff_t item = wide ? sizeof(double) : sizeof(float); /* of weights */
    float *shares = (float *)tile->shares;
    rau_line *rows = tile->lines, *ahead = rows + tile->states; /* where the rows are, and how far before those to prefetch */
    for (ptrdiff_t o = 0; o < walk.outer; o++) {
        for (ptrdiff_t k = 0; k < tile->states; k++) {
            rows[k].at = attn[k].base + o * ACROSS(attn[k]);
            rows[k].step = ALONG(attn[k]);
            ahead[k].step = RAU_NAME(ahead_of)(&attn[k], walk, tile->ahead, k ? later_bytes : bytes);
        }
        char *to = result->base + o * ACROSS(*result);
        const char *weights = (const char *)tile->weights + o * (walk.by_token ? tile->weight_head : tile->weight_token) * item;
        for (ptrdiff_t i = 0; i < walk.inner; i++) {
            ptrdiff_t used = 0;
            int first_used = 0;
            for (ptrdiff_t k = 0; k < tile->states; k++) {
                const char *at = rows[k].at, *weight = weights + k * state * item;
                if (ahead[k].step) RAU_NAME(prefetch)(at + ahead[k].step, k ? later_bytes : bytes);
                rows[k].at += rows[k].step;
                if (wide ? *(const double *)weight == 0.0 : *(const float *)weight == 0.0f) continue;
                tile->sources[used] = at;
                if (wide) tile->shares[used] = *(const double *)weight;
                else shares[used] = *(const float *)weight;
                used++;
                first_used |= k == 0;
            }
            const int around = RAU_NAME(way)(to, stores == RAU_NAME(around));
            char *place = stores == RAU_NAME(by_lines) ? RAU_NAME(gather)(&some, to, bytes) : to;
            if (used == 0)
                memset(place, 0, bytes);
            else if (wide && used == 2)
                RAU_NAME(merge_doubles)(place, tile->sources, tile->shares, 2, head_dim, around);
            else if (wide)
                RAU_NAME(merge_doubles)(place, tile->sources, tile->shares, used, head_dim, around);
            else if (format == later || first_used)
                RAU_NAME(merge_row)(place, tile->sources, shares, used, head_dim, around, format, later, format);
            else
                RAU_NAME(merge_row)(place, tile->sources, shares, used, head_dim, around, later, later, format);
            to += step_to;
            weights += step_weight * item;
        }
    }
    if (stores == RAU_NAME(by_lines)) RAU_NAME(store_gathered)(&some);
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

static RAU_TARGET void RAU_NAME(rows_f64)(rau_tile *tile) { RAU_NAME(rows_of_many)(tile, RAU_F64, RAU_F64); }

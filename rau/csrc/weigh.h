/* Statistics into weights, for the version at hand: a part of one_version.h. */

/* The exponentials of m[i] - top[i] <= 0 or NaN in place of m[i]: see rau/arithmetic.py, which has the same numbers.
   Each is one long chain of dependent operations, so `count` chains go side by side. */
RAU_INLINE RAU_TARGET void RAU_NAME(exp_differences)(DOUBLES *m, const DOUBLES *top, const int count) {
    static const double coefficients[] = {
        0x1.ad92c81f74ea2p-26, 0x1.28adf7a9a959ep-22, 0x1.71df18fbb1812p-19, 0x1.a0199963c408ap-16, 0x1.a01a012fec32ap-13,
        0x1.6c16c18475a28p-10, 0x1.1111111126b37p-7, 0x1.55555555506cp-5, 0x1.55555555554fep-3, 0x1.000000000000ap-1, 0x1p0,
        0x1p0,
    };
    const DOUBLES zero = {0}, round = ALL(0x1.8p52), least = ALL(-708.0);
    DOUBLES x[4], lost[4], shifted[4], r[4], p[4];
    for (int i = 0; i < count; i++) {
        x[i] = m[i] - top[i];
        const DOUBLES back = x[i] - m[i]; /* Knuth's TwoSum: what the difference lost, exactly */
        lost[i] = (m[i] - (x[i] - back)) - (top[i] + back);
        const DOUBLES safe = SELECT(GREATER(least, x[i]), zero, x[i]);
        shifted[i] = safe * 0x1.71547652b82fep+0 + round;
        const DOUBLES k = shifted[i] - round;
        r[i] = (safe - k * 0x1.62e42feep-1) - k * 0x1.a39ef35793c76p-33;
        p[i] = ALL(coefficients[0]);
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 11
#endif
    for (int j = 1; j < 12; j++)
        for (int i = 0; i < count; i++) p[i] = p[i] * r[i] + coefficients[j];
    for (int i = 0; i < count; i++) {
        /* The low bits of `shifted` hold k: made an exponent, they are 2^k. */
        const DOUBLES power = RAU_NAME(doubles_of)((RAU_NAME(longs_of)(shifted[i]) + 1023) << 52), q = p[i] * power;
        const DOUBLES result = SELECT(GREATER(least, x[i]), zero, q + q * lost[i]);
        m[i] = SELECT(IS_NAN(x[i]), x[i], result);
    }
}

/* Vectors of rows weighed at a time: the chain of one exponential is long, and other rows fill its gaps. */
#if RAU_BYTES == 32
#define GROUP 4
#else
#define GROUP 2
#endif

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
    if (step == 32 && count == 8) { /* A load has two rows; the last takes no more than lane 0, behind which may be nothing. */
        const float *from = (const float *)at;
        const __m512i firsts = _mm512_setr_epi32(0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24);
        const __m512 low = _mm512_permutex2var_ps(_mm512_loadu_ps(from), firsts, _mm512_loadu_ps(from + 16));
        const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(from + 32), firsts, _mm512_maskz_loadu_ps(0x0101, from + 48));
        const __m512 pairs = _mm512_mask_mov_ps(low, 0xf0, high);
        return (DOUBLES)_mm512_cvtps_pd(_mm512_castps512_ps256(pairs));
    }
#endif
    HALF_FLOATS rows;
    if (step == sizeof(float) && count == DOUBLES_IN) memcpy(&rows, at, sizeof rows);
    else rows = (HALF_FLOATS)EACH_ROW(FLOAT_AT);
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
    if (step == sizeof(float) && count == DOUBLES_IN && lanes == 1) {
        memcpy(to, &narrow, sizeof narrow);
        return;
    }
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

/* A walk over the statistics of a tile, and the rows of it that are to be prefetched next: `lead` rows after those at hand. */
typedef struct {
    const rau_tile *tile;
    ptrdiff_t states, step, outer_rows, inner_rows;
    int along_heads;
    ptrdiff_t outer, inner, lead;
} RAU_NAME(upcoming);

/* Keep the statistics of RAU_RUN rows on their way: called for the first to the fourth quarter of a group, between pieces of
   work, since a processor holds no more than some twenty requests, and waits where they come all at once. At the end of a run
   go on with the start of the next one: what lies behind the end is not wanted soon, and nobody else fetches the start. Behind
   the last run lies what the next tile needs. */
RAU_INLINE RAU_TARGET void RAU_NAME(prefetch_statistics)(RAU_NAME(upcoming) *next, const int quarter) {
    const ptrdiff_t states = next->states, few = 2 * RAU_RUN / states, run = few < 2 * RAU_GROUP ? 2 * RAU_GROUP : few;
    while (next->lead < run - RAU_GROUP + quarter * (RAU_GROUP / 4)) {
        const int last = next->outer == next->outer_rows - 1;
        const ptrdiff_t left = last ? RAU_GROUP / 4 : next->inner_rows - next->inner;
        const ptrdiff_t rows = left < RAU_GROUP / 4 ? left : RAU_GROUP / 4;
        for (ptrdiff_t k = 0; k < 2 * states; k++) {
            const rau_plane *plane = k < states ? &next->tile->max[k] : &next->tile->sum[k - states];
            const ptrdiff_t along = next->step ? next->step : next->along_heads ? plane->head : plane->token;
            const ptrdiff_t across = next->along_heads ? plane->token : plane->head;
            const ptrdiff_t in_line = along > 0 && along < 64 ? 64 / along : 1;
            const char *at = plane->base + next->outer * across + next->inner * along;
            for (ptrdiff_t i = 0; i < rows; i += in_line) RAU_PREFETCH(at + i * along);
        }
        next->lead += rows;
        next->inner += rows;
        if (next->inner == next->inner_rows && !last) {
            next->inner = 0;
            next->outer++;
        }
    }
}

/* Merge the statistics of `count` rows, as many as `vectors` vectors hold or fewer. `lines` are where they are in the maxima
   and the sums of the states, then of the result; the weights of a state follow `gap` bytes after those of the one before. */
RAU_INLINE RAU_TARGET void RAU_NAME(weigh_rows)(
    const rau_line *lines, const ptrdiff_t states, const ptrdiff_t step, const int vectors, ptrdiff_t count, char *weights,
    ptrdiff_t gap, DOUBLES *numbers, ptrdiff_t lanes, int stream, const int wide, RAU_NAME(upcoming) *next) {
    const DOUBLES zero = {0}, infinity = ALL(INFINITY), one = ALL(1.0);
    DOUBLES of_two[4 * GROUP], *shares = states == 2 ? of_two : numbers, *sums = shares + states * vectors;
    DOUBLES max[GROUP], sum[GROUP], live[GROUP], alone[GROUP];
    for (int v = 0; v < vectors; v++) {
        max[v] = -infinity;
        sum[v] = live[v] = alone[v] = zero;
    }
#define STEP(line) (step ? step : lines[line].step)
#define AT(line) (lines[line].at + v * DOUBLES_IN * STEP(line))
    RAU_NAME(prefetch_statistics)(next, 1);
    /* All inputs of these rows are read before anything is written: the result may stand on an input. */
    for (ptrdiff_t k = 0; k < states; k++)
        for (int v = 0; v < vectors; v++) {
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
    RAU_NAME(prefetch_statistics)(next, 2);
    if (states == 2) { /* One side is at the maximum, and the exponential of 0 is 1: one of them is enough. */
        DOUBLES exponential[GROUP];
        for (int v = 0; v < vectors; v++)
            exponential[v] = SELECT(EQUAL(shares[v], max[v]), shares[vectors + v], shares[v]);
        RAU_NAME(exp_differences)(exponential, max, vectors);
        for (int i = 0; i < 2 * vectors; i++) {
            const DOUBLES apart = shares[i] - max[i % vectors]; /* NaN for infinite maxima, which are no ordinary ones */
            const DOUBLES other = SELECT(IS_NAN(apart), apart, exponential[i % vectors]);
            shares[i] = SELECT(EQUAL(apart, zero), one, other);
        }
    } else {
        const DOUBLES top[4] = {max[0], max[1 % vectors], max[2 % vectors], max[3 % vectors]};
        const ptrdiff_t all = states * vectors;
        ptrdiff_t i = 0;
        for (; i + 4 <= all; i += 4) RAU_NAME(exp_differences)(shares + i, top, 4);
        for (; i < all; i++) RAU_NAME(exp_differences)(shares + i, top + i % vectors, 1);
    }
    for (ptrdiff_t k = 0; k < states; k++)
        for (int v = 0; v < vectors; v++) {
            const DOUBLES total = sums[k * vectors + v], share = total * shares[k * vectors + v];
            shares[k * vectors + v] = SELECT(EQUAL(total, zero), zero, share);
            sum[v] += shares[k * vectors + v];
        }
    RAU_NAME(prefetch_statistics)(next, 3);
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
            weight = SELECT(IS_NAN(weight), ALL(NAN), weight); /* whose lower bits are 0: to_bf16 in merge.h counts on it */
            if (wide) {
                memcpy(to, &weight, count * sizeof(double));
            } else {
                const HALF_FLOATS narrow = CONVERT(HALF_FLOATS, weight);
                memcpy(to, &narrow, count * sizeof(float));
            }
        }
        sum[v] = SELECT(single, alone[v], sum[v]);
    }
    RAU_NAME(prefetch_statistics)(next, 4);
    for (int v = 0; lanes && v < vectors; v++) {
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
    const ptrdiff_t item = wide ? sizeof(double) : sizeof(float), gap = tile->weight_state * item;
    const ptrdiff_t next_run = (along_heads ? tile->weight_token : tile->weight_head) * item;
    const ptrdiff_t lanes = tile->lanes;
    const int stream = tile->stream;
    DOUBLES *numbers = (DOUBLES *)tile->numbers;
    RAU_NAME(upcoming) next = {tile, states, step, outer, inner, along_heads, 0, 0, 0};
    for (ptrdiff_t o = 0; o < outer; o++) {
        char *weights = (char *)tile->weights + o * next_run;
        for (ptrdiff_t j = 0; j < 2 * states + 2; j++) {
            const rau_plane plane = j < states ? tile->max[j] : j < 2 * states ? tile->sum[j - states]
                                  : j == 2 * states ? tile->max[states] : tile->sum[states];
            lines[j].at = plane.base + o * (along_heads ? plane.token : plane.head);
            lines[j].step = along_heads ? plane.head : plane.token;
        }
        ptrdiff_t rest = inner;
#define WEIGH_ROWS(apart, vectors, rows, count) \
    RAU_NAME(weigh_rows)(lines, states, apart, vectors, count, weights, gap, numbers, lanes, stream, wide, &next); \
    next.lead -= (rows), rest -= (rows), weights += (rows) * item; \
    for (ptrdiff_t j = 0; j < 2 * states + 2; j++) lines[j].at += (rows) * (step ? step : lines[j].step)
        while (rest >= GROUP * DOUBLES_IN) {
            WEIGH_ROWS(step, GROUP, GROUP * DOUBLES_IN, DOUBLES_IN);
        }
        while (rest >= DOUBLES_IN) {
            WEIGH_ROWS(step, 1, DOUBLES_IN, DOUBLES_IN);
        }
        if (rest) {
            WEIGH_ROWS(0, 1, rest, rest);
        }
#undef WEIGH_ROWS
    }
}

RAU_INLINE RAU_TARGET void RAU_NAME(weigh)(rau_tile *tile, const int wide) {
    const ptrdiff_t states = tile->states;
    /* Run along the axis whose rows are closer together. */
    const rau_plane *result = &tile->max[states];
    const int along_heads = tile->tokens == 1 || (tile->heads > 1 && result->head < result->token);
    ptrdiff_t inner = along_heads ? tile->heads : tile->tokens;
    ptrdiff_t outer = along_heads ? tile->tokens : tile->heads;
    const ptrdiff_t row = along_heads ? tile->max[0].head : tile->max[0].token;
    int one = 1, even = 1;
    for (ptrdiff_t k = 0; k <= states; k++) {
        const rau_plane *max = &tile->max[k], *sum = &tile->sum[k];
        const ptrdiff_t along_max = along_heads ? max->head : max->token, across_max = along_heads ? max->token : max->head;
        const ptrdiff_t along_sum = along_heads ? sum->head : sum->token, across_sum = along_heads ? sum->token : sum->head;
        one &= across_max == inner * along_max && across_sum == inner * along_sum;
        even &= along_max == row && along_sum == row;
    }
    /* Runs of weights that start a power of two apart would share a few sets of the cache. */
    const ptrdiff_t item = wide ? sizeof(double) : sizeof(float);
    const ptrdiff_t run = inner < RAU_LONG ? inner : inner + 64 / item;
    tile->weight_token = along_heads ? run : 1;
    tile->weight_head = along_heads ? 1 : run;
    tile->weight_state = outer * run;
    if (one && run == inner) { /* The other axis goes on at the end of this one: short runs are walked as one. */
        inner *= outer;
        outer = 1;
    }
    if (states == 2 && even && row == 32 && !wide) RAU_NAME(weigh_along)(tile, 2, 32, along_heads, outer, inner, wide);
    else if (states == 2 && even && row == 4 && !wide) RAU_NAME(weigh_along)(tile, 2, 4, along_heads, outer, inner, wide);
    else if (states == 2) RAU_NAME(weigh_along)(tile, 2, 0, along_heads, outer, inner, wide);
    else RAU_NAME(weigh_along)(tile, states, 0, along_heads, outer, inner, wide);
}

static RAU_TARGET void RAU_NAME(weigh_f32)(rau_tile *tile) { RAU_NAME(weigh)(tile, 0); }
static RAU_TARGET void RAU_NAME(weigh_f64)(rau_tile *tile) { RAU_NAME(weigh)(tile, 1); }

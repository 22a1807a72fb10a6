/* The row kernels, for the version that RAU_VERSION, RAU_TARGET and RAU_F16C name. Plain loops, which the
   compiler vectorises for the version; intrinsics only where it cannot. No include guard: _rows.h includes
   this once for each version. */

/* ---- weigh: statistics into weights ------------------------------------------------------------------ */

/* The exponential of x <= 0 or NaN: see exp_nonpositive in backends/numpy_.py. */
RAU_INLINE RAU_TARGET double RAU_NAME(rau_exp)(double x) {
    const double round = 0x1.8p52;
    double safe = x >= -708.0 ? x : 0.0;
    double shifted = safe * 0x1.71547652b82fep+0 + round;
    double k = shifted - round;
    double r = (safe - k * 0x1.62e42feep-1) - k * 0x1.a39ef35793c76p-33;
    double p = 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 1.0 / 2.0;
    p = p * r + 1.0;
    p = p * r + 1.0;
    rau_bits64 bits;
    bits.f = shifted; /* its low bits hold k */
    bits.u = (bits.u + 1023) << 52;
    double result = p * bits.f;
    result = x < -708.0 ? 0.0 : result;
    return x != x ? x : result;
}

/* Merge `count` rows: numbers holds the maxima of each state, then the sums, RAU_RUN apart. Leaves the
   weights in place of the maxima, and the merged maximum and sum in max and sum. */
RAU_INLINE RAU_TARGET void RAU_NAME(rau_weigh_run)(
    double *RAU_RESTRICT numbers, ptrdiff_t states, ptrdiff_t count, double *RAU_RESTRICT max, double *RAU_RESTRICT sum,
    const int wide) {
    double RAU_ALIGNED(live[RAU_RUN]), RAU_ALIGNED(alone[RAU_RUN]);
    double *m = numbers, *l = numbers + states * RAU_RUN;
    for (ptrdiff_t j = 0; j < count; j++) {
        max[j] = -INFINITY;
        sum[j] = 0.0;
        live[j] = 0.0;
        alone[j] = 0.0;
    }
    for (ptrdiff_t k = 0; k < states; k++)
        for (ptrdiff_t j = 0; j < count; j++) {
            double mk = m[k * RAU_RUN + j], lk = l[k * RAU_RUN + j];
            int empty = (lk == 0.0) | (mk == -INFINITY);
            mk = empty ? -INFINITY : mk;
            /* An empty side is (-inf, 0) from here on, whatever stood there. */
            m[k * RAU_RUN + j] = mk;
            l[k * RAU_RUN + j] = empty ? 0.0 : lk;
            max[j] = ((mk > max[j]) | (mk != mk)) ? mk : max[j]; /* a NaN stays: nothing is larger */
            live[j] += empty ? 0.0 : 1.0;
            alone[j] = empty ? alone[j] : lk;
        }
    for (ptrdiff_t k = 0; k < states; k++)
        for (ptrdiff_t j = 0; j < count; j++) {
            double mk = m[k * RAU_RUN + j], lk = l[k * RAU_RUN + j];
            double a = lk * RAU_NAME(rau_exp)(mk - max[j]);
            a = lk == 0.0 ? 0.0 : a;
            m[k * RAU_RUN + j] = a;
            sum[j] += a;
        }
    if (wide) { /* Finite sums may add up beyond float64; scaled by a power of two their shares are still right. */
        for (ptrdiff_t j = 0; j < count; j++)
            if (isinf(sum[j])) {
                double scaled = 0.0;
                for (ptrdiff_t k = 0; k < states; k++)
                    scaled += m[k * RAU_RUN + j] *= 0x1p-64;
                for (ptrdiff_t k = 0; k < states; k++)
                    m[k * RAU_RUN + j] /= scaled;
            } else {
                for (ptrdiff_t k = 0; k < states; k++)
                    m[k * RAU_RUN + j] /= sum[j];
            }
    } else {
        for (ptrdiff_t k = 0; k < states; k++)
            for (ptrdiff_t j = 0; j < count; j++)
                m[k * RAU_RUN + j] /= sum[j];
    }
    for (ptrdiff_t k = 0; k < states; k++)
        for (ptrdiff_t j = 0; j < count; j++) {
            double w = live[j] == 1.0 ? 1.0 : m[k * RAU_RUN + j];
            m[k * RAU_RUN + j] = l[k * RAU_RUN + j] == 0.0 ? 0.0 : w;
        }
    for (ptrdiff_t j = 0; j < count; j++)
        sum[j] = live[j] == 1.0 ? alone[j] : sum[j]; /* a single live side comes back as it is */
}

RAU_INLINE RAU_TARGET void RAU_NAME(rau_weigh)(rau_tile *tile, const int wide) {
    const ptrdiff_t states = tile->states, rows = tile->tokens * tile->heads, lanes = tile->lanes;
    double RAU_ALIGNED(max[RAU_RUN]), RAU_ALIGNED(sum[RAU_RUN]);
    /* Run along the axis whose rows are closer together. */
    const ptrdiff_t by_token = tile->max[states].token, by_head = tile->max[states].head;
    const int along_heads = tile->tokens == 1 || (tile->heads > 1 && by_head < by_token);
    const ptrdiff_t inner = along_heads ? tile->heads : tile->tokens;
    const ptrdiff_t outer = along_heads ? tile->tokens : tile->heads;
    tile->weight_token = along_heads ? inner : 1;
    tile->weight_head = along_heads ? 1 : inner;

    for (ptrdiff_t o = 0; o < outer; o++)
        for (ptrdiff_t i = 0; i < inner; i += RAU_RUN) {
            const ptrdiff_t count = inner - i < RAU_RUN ? inner - i : RAU_RUN;
            /* All inputs of these rows are read before anything is written: the result may stand on an input. */
            for (ptrdiff_t k = 0; k < 2 * states; k++) {
                const rau_plane *plane = k < states ? &tile->max[k] : &tile->sum[k - states];
                const ptrdiff_t step = along_heads ? plane->head : plane->token;
                const char *at = plane->base + o * (along_heads ? plane->token : plane->head) + i * step;
                double *to = tile->numbers + k * RAU_RUN;
                for (ptrdiff_t j = 0; j < count; j++)
                    to[j] = wide ? *(const double *)(at + j * step) : *(const float *)(at + j * step);
            }
            RAU_NAME(rau_weigh_run)(tile->numbers, states, count, max, sum, wide);
            for (ptrdiff_t k = 0; k < states; k++) {
                const double *from = tile->numbers + k * RAU_RUN;
                if (wide) {
                    double *to = (double *)tile->weights + k * rows + o * inner + i;
                    for (ptrdiff_t j = 0; j < count; j++) to[j] = from[j];
                } else {
                    float *to = (float *)tile->weights + k * rows + o * inner + i;
                    for (ptrdiff_t j = 0; j < count; j++) to[j] = (float)from[j];
                }
            }
            for (int part = 0; part < 2; part++) {
                const rau_plane *plane = part ? &tile->sum[states] : &tile->max[states];
                const double *from = part ? sum : max;
                const ptrdiff_t step = along_heads ? plane->head : plane->token;
                char *to = plane->base + o * (along_heads ? plane->token : plane->head) + i * step;
                for (ptrdiff_t j = 0; j < count; j++, to += step) {
                    if (wide) {
                        for (ptrdiff_t lane = 0; lane < lanes; lane++) ((double *)to)[lane] = from[j];
                    } else if (lanes == 8) {
                        const float value = (float)from[j];
                        for (int lane = 0; lane < 8; lane++) ((float *)to)[lane] = value;
                    } else {
                        for (ptrdiff_t lane = 0; lane < lanes; lane++) ((float *)to)[lane] = (float)from[j];
                    }
                }
            }
        }
}

static RAU_TARGET void RAU_NAME(rau_weigh_f32)(rau_tile *tile) { RAU_NAME(rau_weigh)(tile, 0); }
static RAU_TARGET void RAU_NAME(rau_weigh_f64)(rau_tile *tile) { RAU_NAME(rau_weigh)(tile, 1); }

/* ---- formats: widening is exact, narrowing rounds once, to nearest even ---------------------------------- */

RAU_INLINE RAU_TARGET float RAU_NAME(rau_from_bf16)(uint16_t h) {
    rau_bits32 bits;
    bits.u = (uint32_t)h << 16;
    return bits.f;
}

RAU_INLINE RAU_TARGET uint16_t RAU_NAME(rau_to_bf16)(float x) {
    rau_bits32 bits;
    bits.f = x;
    uint32_t rounded = (bits.u + (0x7fffu + ((bits.u >> 16) & 1u))) >> 16;
    return (uint16_t)((bits.u & 0x7fffffffu) > 0x7f800000u ? (bits.u >> 16) | 0x40u : rounded);
}

RAU_INLINE RAU_TARGET float RAU_NAME(rau_from_f16)(uint16_t h) {
    rau_bits32 bits;
    uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    bits.u = magnitude; /* the exponent is still biased by 15: 2^112 corrects it, subnormals included */
    bits.f *= 0x1p112f;
    bits.u |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u; /* infinity and NaN keep the largest exponent */
    bits.u |= (uint32_t)(h & 0x8000u) << 16;
    return bits.f;
}

RAU_INLINE RAU_TARGET uint16_t RAU_NAME(rau_to_f16)(float x) {
    rau_bits32 bits, small;
    bits.f = x;
    const uint32_t sign = (bits.u >> 16) & 0x8000u, magnitude = bits.u & 0x7fffffffu;
    /* Normal results: move the exponent's bias from 127 to 15 and round 13 bits away. */
    uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    normal = normal > 0x7c00u ? 0x7c00u : normal; /* beyond the format: infinity */
    /* Subnormal results are multiples of 2^-24, which is the spacing of floats next to 0.5. */
    small.u = magnitude;
    small.f += 0.5f;
    uint32_t result = magnitude < 0x38800000u ? small.u - 0x3f000000u : normal;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return (uint16_t)(sign | result);
}

RAU_INLINE RAU_TARGET void RAU_NAME(rau_widen_f16)(float *RAU_RESTRICT to, const uint16_t *RAU_RESTRICT from, ptrdiff_t n) {
    ptrdiff_t j = 0;
#if RAU_F16C
    for (; j + 8 <= n; j += 8)
        _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + j))));
#endif
    for (; j < n; j++) to[j] = RAU_NAME(rau_from_f16)(from[j]);
}

RAU_INLINE RAU_TARGET void RAU_NAME(rau_narrow_f16)(uint16_t *RAU_RESTRICT to, const float *RAU_RESTRICT from, ptrdiff_t n) {
    ptrdiff_t j = 0;
#if RAU_F16C
    for (; j + 8 <= n; j += 8)
        _mm_storeu_si128((__m128i *)(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; j < n; j++) to[j] = RAU_NAME(rau_to_f16)(from[j]);
}

/* ---- rows: one pass over the elements -------------------------------------------------------------------- */

/* Copy around the cache where the address allows it; otherwise, and elsewhere, through it. */
RAU_INLINE RAU_TARGET void RAU_NAME(rau_put)(char *to, const char *from, size_t bytes, int stream) {
#ifdef RAU_X86
    if (stream && ((uintptr_t)to & 15) == 0) {
        size_t j = 0;
        for (; j + 16 <= bytes; j += 16)
            _mm_stream_si128((__m128i *)(to + j), _mm_loadu_si128((const __m128i *)(from + j)));
        if (j < bytes) memcpy(to + j, from + j, bytes - j);
        return;
    }
#else
    (void)stream;
#endif
    memcpy(to, from, bytes);
}

/* sum (+)= weight * elements */
RAU_INLINE RAU_TARGET void RAU_NAME(rau_add_term)(
    float *RAU_RESTRICT sum, const char *at, ptrdiff_t skip, ptrdiff_t n, float weight, const int format, const int first) {
    float RAU_ALIGNED(wide[RAU_PIECE]);
    const float *term = (const float *)at + skip;
    if (format == RAU_BF16) {
        const uint16_t *from = (const uint16_t *)at + skip;
        if (first)
            for (ptrdiff_t j = 0; j < n; j++) sum[j] = weight * RAU_NAME(rau_from_bf16)(from[j]);
        else
            for (ptrdiff_t j = 0; j < n; j++) sum[j] += weight * RAU_NAME(rau_from_bf16)(from[j]);
        return;
    }
    if (format == RAU_F16) {
        RAU_NAME(rau_widen_f16)(wide, (const uint16_t *)at + skip, n);
        term = wide;
    }
    if (first)
        for (ptrdiff_t j = 0; j < n; j++) sum[j] = weight * term[j];
    else
        for (ptrdiff_t j = 0; j < n; j++) sum[j] += weight * term[j];
}

/* sum = weight * elements + weight * elements: the case that matters, in one loop */
RAU_INLINE RAU_TARGET void RAU_NAME(rau_two_terms)(
    float *RAU_RESTRICT sum, const char *a, const char *b, ptrdiff_t skip, ptrdiff_t n, float wa, float wb, const int format) {
    if (format == RAU_BF16) {
        const uint16_t *x = (const uint16_t *)a + skip, *y = (const uint16_t *)b + skip;
        for (ptrdiff_t j = 0; j < n; j++)
            sum[j] = wa * RAU_NAME(rau_from_bf16)(x[j]) + wb * RAU_NAME(rau_from_bf16)(y[j]);
    } else if (format == RAU_F16) {
        float RAU_ALIGNED(wide_a[RAU_PIECE]), RAU_ALIGNED(wide_b[RAU_PIECE]);
        RAU_NAME(rau_widen_f16)(wide_a, (const uint16_t *)a + skip, n);
        RAU_NAME(rau_widen_f16)(wide_b, (const uint16_t *)b + skip, n);
        for (ptrdiff_t j = 0; j < n; j++) sum[j] = wa * wide_a[j] + wb * wide_b[j];
    } else {
        const float *x = (const float *)a + skip, *y = (const float *)b + skip;
        for (ptrdiff_t j = 0; j < n; j++) sum[j] = wa * x[j] + wb * y[j];
    }
}

RAU_INLINE RAU_TARGET void RAU_NAME(rau_store)(
    char *to, const float *RAU_RESTRICT sum, ptrdiff_t skip, ptrdiff_t n, const int format, int stream) {
    if (format == RAU_F32) {
        RAU_NAME(rau_put)(to + 4 * skip, (const char *)sum, 4 * n, stream);
    } else {
        uint16_t RAU_ALIGNED(half[RAU_PIECE]);
        if (format == RAU_F16)
            RAU_NAME(rau_narrow_f16)(half, sum, n);
        else
            for (ptrdiff_t j = 0; j < n; j++) half[j] = RAU_NAME(rau_to_bf16)(sum[j]);
        RAU_NAME(rau_put)(to + 2 * skip, (const char *)half, 2 * n, stream);
    }
}

/* The states that have a weight in one row: their pointers and weights, packed together. A state without
   one is not read. Returns how many there are; first_used tells whether state 0 is among them. */
RAU_INLINE RAU_TARGET ptrdiff_t RAU_NAME(rau_gather)(rau_tile *tile, ptrdiff_t t, ptrdiff_t h, const int wide, int *first_used) {
    const ptrdiff_t rows = tile->tokens * tile->heads, row = t * tile->weight_token + h * tile->weight_head;
    ptrdiff_t used = 0;
    *first_used = 0;
    for (ptrdiff_t k = 0; k < tile->states; k++) {
        const double w = wide ? ((const double *)tile->weights)[k * rows + row] : ((const float *)tile->weights)[k * rows + row];
        if (w != 0.0) { /* NaN is a weight too */
            tile->sources[used] = tile->attn[k].base + t * tile->attn[k].token + h * tile->attn[k].head;
            tile->shares[used++] = w;
            *first_used |= k == 0;
        }
    }
    return used;
}

RAU_INLINE RAU_TARGET void RAU_NAME(rau_prefetch)(const rau_tile *tile, ptrdiff_t t, ptrdiff_t h, ptrdiff_t bytes, ptrdiff_t later_bytes) {
    h += RAU_AHEAD;
    if (h >= tile->heads) {
        t += 1;
        h -= tile->heads;
        if (t >= tile->tokens || h >= tile->heads) return;
    }
    for (ptrdiff_t k = 0; k < tile->states; k++) {
        const char *at = tile->attn[k].base + t * tile->attn[k].token + h * tile->attn[k].head;
        const ptrdiff_t end = k ? later_bytes : bytes;
        for (ptrdiff_t j = 0; j < end && j < 1024; j += 64) RAU_PREFETCH(at + j);
    }
}

RAU_INLINE RAU_TARGET void RAU_NAME(rau_rows)(rau_tile *tile, const int format, const int later) {
    float RAU_ALIGNED(sum[RAU_PIECE]);
    const ptrdiff_t head_dim = tile->head_dim;
    const rau_plane *result = &tile->attn[tile->states];
    const ptrdiff_t bytes = head_dim * (format == RAU_F32 ? 4 : 2), later_bytes = head_dim * (later == RAU_F32 ? 4 : 2);
    for (ptrdiff_t t = 0; t < tile->tokens; t++)
        for (ptrdiff_t h = 0; h < tile->heads; h++) {
            int first_used;
            const ptrdiff_t used = RAU_NAME(rau_gather)(tile, t, h, 0, &first_used);
            char *to = result->base + t * result->token + h * result->head;
            RAU_NAME(rau_prefetch)(tile, t, h, bytes, later_bytes);
            for (ptrdiff_t skip = 0; skip < head_dim; skip += RAU_PIECE) {
                const ptrdiff_t n = head_dim - skip < RAU_PIECE ? head_dim - skip : RAU_PIECE;
                if (used == 2 && (format == later || !first_used)) {
                    RAU_NAME(rau_two_terms)(sum, tile->sources[0], tile->sources[1], skip, n, (float)tile->shares[0],
                                            (float)tile->shares[1], later);
                } else if (used == 0) {
                    memset(sum, 0, n * sizeof(float));
                } else {
                    if (format == later || !first_used)
                        RAU_NAME(rau_add_term)(sum, tile->sources[0], skip, n, (float)tile->shares[0], later, 1);
                    else
                        RAU_NAME(rau_add_term)(sum, tile->sources[0], skip, n, (float)tile->shares[0], format, 1);
                    for (ptrdiff_t k = 1; k < used; k++)
                        RAU_NAME(rau_add_term)(sum, tile->sources[k], skip, n, (float)tile->shares[k], later, 0);
                }
                RAU_NAME(rau_store)(to, sum, skip, n, format, tile->stream);
            }
        }
}

static RAU_TARGET void RAU_NAME(rau_rows_f32)(rau_tile *tile) { RAU_NAME(rau_rows)(tile, RAU_F32, RAU_F32); }
static RAU_TARGET void RAU_NAME(rau_rows_f16)(rau_tile *tile) { RAU_NAME(rau_rows)(tile, RAU_F16, RAU_F16); }
static RAU_TARGET void RAU_NAME(rau_rows_bf16)(rau_tile *tile) { RAU_NAME(rau_rows)(tile, RAU_BF16, RAU_BF16); }
static RAU_TARGET void RAU_NAME(rau_rows_f32_f16)(rau_tile *tile) { RAU_NAME(rau_rows)(tile, RAU_F32, RAU_F16); }
static RAU_TARGET void RAU_NAME(rau_rows_f32_bf16)(rau_tile *tile) { RAU_NAME(rau_rows)(tile, RAU_F32, RAU_BF16); }

static RAU_TARGET void RAU_NAME(rau_rows_f64)(rau_tile *tile) {
    double RAU_ALIGNED(sum[RAU_PIECE]);
    const ptrdiff_t head_dim = tile->head_dim;
    const rau_plane *result = &tile->attn[tile->states];
    for (ptrdiff_t t = 0; t < tile->tokens; t++)
        for (ptrdiff_t h = 0; h < tile->heads; h++) {
            int first_used;
            const ptrdiff_t used = RAU_NAME(rau_gather)(tile, t, h, 1, &first_used);
            char *to = result->base + t * result->token + h * result->head;
            RAU_NAME(rau_prefetch)(tile, t, h, 8 * head_dim, 8 * head_dim);
            for (ptrdiff_t skip = 0; skip < head_dim; skip += RAU_PIECE) {
                const ptrdiff_t n = head_dim - skip < RAU_PIECE ? head_dim - skip : RAU_PIECE;
                if (used == 0) memset(sum, 0, n * sizeof(double));
                for (ptrdiff_t k = 0; k < used; k++) {
                    const double *term = (const double *)tile->sources[k] + skip;
                    const double weight = tile->shares[k];
                    if (k == 0)
                        for (ptrdiff_t j = 0; j < n; j++) sum[j] = weight * term[j];
                    else
                        for (ptrdiff_t j = 0; j < n; j++) sum[j] += weight * term[j];
                }
                RAU_NAME(rau_put)(to + 8 * skip, (const char *)sum, 8 * n, tile->stream);
            }
        }
}

#define RAU_STRING_(name) #name
#define RAU_STRING(name) RAU_STRING_(name)
static const rau_version RAU_NAME(rau_version) = {
    RAU_STRING(RAU_VERSION),
    RAU_NAME(rau_weigh_f32), RAU_NAME(rau_weigh_f64),
    RAU_NAME(rau_rows_f32), RAU_NAME(rau_rows_f16), RAU_NAME(rau_rows_bf16), RAU_NAME(rau_rows_f64),
    RAU_NAME(rau_rows_f32_f16), RAU_NAME(rau_rows_f32_bf16),
};
#undef RAU_STRING
#undef RAU_STRING_
#undef RAU_VERSION
#undef RAU_TARGET
#undef RAU_F16C

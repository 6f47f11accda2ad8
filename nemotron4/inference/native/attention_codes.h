// Attention over keys and values in codes of eight bits. Part of attention.h.
//
// Queries, and the weights of the softmax times the values' scales, become codes of sixteen bits, so that the sums of
// products are exact under every instruction set.

// To each query's ``sum``: ``count`` pairs of its codes ``x`` times sixteen pairs of codes in sixteen lanes.
template <int QB, class Ahead>
INLINE void dot_pairs(const int16_t *x, int x_stride, const int8_t *pairs, int stride, int count, I (&sum)[QB], Ahead ahead) {
    const auto two = [&](int j, int i) {
        int32_t both;
        memcpy(&both, x + j * x_stride + 2 * i, 4);
        return both;
    };
#if defined(__AVX2__) && !defined(__AVX512BW__)
    for (int half = 0; half < 2; half++) {
        __m256i dots[QB];
        for (int j = 0; j < QB; j++) dots[j] = _mm256_setzero_si256();
        for (int i = 0; i < count; i++) {
            const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(pairs + i * stride) + half));
            if (half) ahead(i);
            for (int j = 0; j < QB; j++)
                dots[j] = _mm256_add_epi32(dots[j], _mm256_madd_epi16(wide, _mm256_set1_epi32(two(j, i))));
        }
        for (int j = 0; j < QB; j++) memcpy((char *)&sum[j] + half * 32, &dots[j], 32);
    }
#else
    for (int j = 0; j < QB; j++) sum[j] = I{};
    for (int i = 0; i < count; i++) {
        const int8_t *now = pairs + i * stride;
        ahead(i);
#if defined(__AVX512BW__)
        const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)now));
        for (int j = 0; j < QB; j++) {
            const __m512i both = _mm512_set1_epi32(two(j, i));
#if defined(__AVX512VNNI__)
            sum[j] = (I)_mm512_dpwssd_epi32((__m512i)sum[j], wide, both);
#else
            sum[j] += (I)_mm512_madd_epi16(wide, both);
#endif
        }
#else
        for (int j = 0; j < QB; j++)
            for (int c = 0; c < 16; c++)
                sum[j][c] += now[2 * c] * (int16_t)two(j, i) + now[2 * c + 1] * (two(j, i) >> 16);
#endif
    }
#endif
}

enum { MOST_CODE = 32767 };

INLINE void store_short(int16_t *p, I x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(__AVX2__)
    const Halves h = split((V)x);
    const __m256i packed = _mm256_packs_epi32((__m256i)h.low, (__m256i)h.high);
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
#else
    for (int i = 0; i < 16; i++) p[i] = (int16_t)x[i];
#endif
}

// Numbers up to ``largest`` as codes of sixteen bits; returns what one of those is worth.
INLINE float store_codes(const V *x, int count, float largest, int16_t *out) {
    const V inverse = all(largest > 0 ? MOST_CODE / largest : 0);
    for (int i = 0; i < count; i++) store_short(out + i * 16, to_int(x[i] * inverse));
    return largest / MOST_CODE;
}

INLINE float code_query(const float *q, int dim, int padded, int16_t *out) {
    V x[MOST_DIM / 16], largest = {}, spoiled = {}; // spoiled: no number where one of the query is none
    for (int e = 0; e < padded; e += 16) {
        x[e / 16] = e < dim ? load_part(q + e, dim - e) : V{};
        largest = maximum(largest, absolute(x[e / 16]));
        spoiled = fma(V{}, x[e / 16], spoiled);
    }
    return store_codes(x, padded / 16, max16(largest), out) + sum16(spoiled);
}

template <int QB> void attend_codes(const AttendTask &t, const AttendMember &m, int first, float *out) {
    const I lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int dim = t.head_dim, padded = (dim + 31) / 32 * 32, wide = (dim + 15) / 16 * 16;
    alignas(64) float sums[QB][MOST_DIM];
    alignas(64) int16_t rows[QB][MOST_DIM], p[QB][BLOCK];
    Query q[QB];
    float largest[QB], row_scale[QB], p_scale[QB];
    V weight[QB], shrink[QB];
    for (int j = 0; j < QB; j++) {
        q[j] = query_of(t, m, first + j, out);
        row_scale[j] = code_query(q[j].q, dim, padded, rows[j]);
        begin_sums(largest[j], weight[j], sums[j], wide);
    }
    const int last = q[QB - 1].position;
    for (int start = 0; start <= last; start += BLOCK) {
        const Block block = block_of(t, m.blocks, start, last + 1);
        const int8_t *keys = (const int8_t *)block.keys, *values = (const int8_t *)block.values;
        const float *key_scales = (const float *)(keys + padded * BLOCK);
        const float *value_scales = (const float *)(values + wide * BLOCK);
        I s[2][QB];
        for (int half = 0; half < 2; half++)
            dot_pairs<QB>(rows[0], MOST_DIM, keys + half * 32, BLOCK * 2, padded / 2, s[half],
                          [&](int i) { if (half) prefetch(block.next_keys + i * 64); });
        for (int i = 0; i < 2; i++) {
            prefetch(block.next_keys + padded * BLOCK + i * 64);
            prefetch(block.next_values + wide * BLOCK + i * 64);
        }
        for (int j = 0; j < QB; j++) {
            const V scale = all(row_scale[j]);
            V x[2] = {to_float(s[0][j]) * (load(key_scales) * scale), to_float(s[1][j]) * (load(key_scales + 16) * scale)};
            const int seen = q[j].position + 1 - start; // scales behind it are of others
            shrink[j] = soften(x[0], x[1], seen, t.scale, largest[j]);
            weight[j] = fma(weight[j], shrink[j], x[0] + x[1]);
            for (int i = 0; i < 2; i++) x[i] = lanes + 16 * i < seen ? x[i] * load(value_scales + 16 * i) : V{};
            weight[j] = fma(V{}, x[0] + x[1], weight[j]); // a scale that is no number is seen in the answer
            p_scale[j] = store_codes(x, 2, max16(maximum(x[0], x[1])), p[j]);
        }
        for (int e = 0; e < wide; e += 16) {
            I dots[QB];
            dot_pairs<QB>(p[0], BLOCK, values + 2 * e, wide * 2, BLOCK / 2, dots,
                          [&](int i) { if (i % 2 == 0) prefetch(block.next_values + (e + i) * 32); });
            for (int j = 0; j < QB; j++)
                store(sums[j] + e, fma(load(sums[j] + e), shrink[j], to_float(dots[j]) * all(p_scale[j])));
        }
    }
    for (int j = 0; j < QB; j++) finish_query(sums[j], weight[j], dim, q[j].out);
}

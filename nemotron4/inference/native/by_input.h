// Products with weights that lie by input: a line has the codes of one column for 64 outputs. Lines of columns in
// which no row has a code but zero are not read; sums of integers are exact, so that changes no bit.

constexpr int WOVEN = 32; // rows up to which the codes are brought into panels a group at a time

// Lines of four columns become their codes in four panels.
INLINE void weave(const uint8_t *const (&lines)[4], I (&panels)[4]) {
#if defined(__AVX512BW__)
    __m512i x[4];
    for (int i = 0; i < 4; i++) x[i] = _mm512_loadu_si512(lines[i]);
    const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpacklo_epi8(x[2], x[3]);
    const __m512i c = _mm512_unpackhi_epi8(x[0], x[1]), d = _mm512_unpackhi_epi8(x[2], x[3]);
    panels[0] = (I)_mm512_unpacklo_epi16(a, b);
    panels[1] = (I)_mm512_unpackhi_epi16(a, b);
    panels[2] = (I)_mm512_unpacklo_epi16(c, d);
    panels[3] = (I)_mm512_unpackhi_epi16(c, d);
#elif defined(__AVX2__)
    for (int half = 0; half < 64; half += 32) {
        __m256i x[4];
        for (int i = 0; i < 4; i++) x[i] = _mm256_loadu_si256((const __m256i *)(lines[i] + half));
        const __m256i a = _mm256_unpacklo_epi8(x[0], x[1]), b = _mm256_unpacklo_epi8(x[2], x[3]);
        const __m256i c = _mm256_unpackhi_epi8(x[0], x[1]), d = _mm256_unpackhi_epi8(x[2], x[3]);
        const __m256i out[4] = {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b),
                                _mm256_unpacklo_epi16(c, d), _mm256_unpackhi_epi16(c, d)};
        for (int p = 0; p < 4; p++) memcpy((char *)&panels[p] + half, &out[p], 32);
    }
#else
    for (int p = 0; p < 4; p++)
        for (int i = 0; i < 64; i++) ((uint8_t *)&panels[p])[i] = lines[i % 4][i / 16 * 16 + 4 * p + i / 4 % 4];
#endif
}

constexpr int LINE = 64; // bytes of a column

template <int KIND> INLINE const uint8_t *lines_of(const Weight &w, int panel) { // of column 0
    return (const uint8_t *)w.codes + (size_t)(panel / (KIND == W_S8 ? 4 : 8)) * w.padded * LINE;
}

// A group's codes for four panels as panels have them, ``stride`` bytes apart.
template <int KIND> INLINE void weave_group(const uint8_t *line, int panel, uint8_t *to, size_t stride) {
    const int shift = panel % 8; // of four bits: 0 or 4
    I before[4];
    for (int i = 0; i < 8; i++) {
        I now[4];
        const uint8_t *four = line + (size_t)i * 4 * LINE;
        weave({four, four + LINE, four + 2 * LINE, four + 3 * LINE}, now);
        for (int p = 0; p < 4; p++) {
            if (KIND == W_S8) {
                memcpy(to + p * stride + i * 64, &now[p], 64);
                continue;
            }
            now[p] = now[p] >> shift & 0x0f0f0f0f;
            if (i % 2 == 0) {
                before[p] = now[p];
                continue;
            }
            const I both = before[p] | now[p] << 4;
            memcpy(to + p * stride + i / 2 * 64, &both, 64);
        }
    }
}

// Rows times at most four panels.
template <int KIND, bool WIDE>
void woven_rows(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels, float *out,
                int stride) {
    constexpr int BYTES = KIND == W_S8 ? 512 : 256, WORDS = KIND == W_U4 ? 32 : 16;
    const int groups = w.padded / GROUP;
    alignas(64) uint8_t codes[4 * BYTES];
    V sums[4 * WOVEN]; // of one panel after the other, close together
    for (int p = 0; p < num_panels; p++)
        for (int r = 0; r < count; r++) sums[p * count + r] = V{};
    for (int g = 0; g < groups; g++) {
        const uint8_t *line = lines_of<KIND>(w, panel) + (size_t)g * GROUP * LINE;
        for (int i = 0; i < GROUP; i++) prefetch(line + (4 * GROUP + i) * LINE);
        weave_group<KIND>(line, panel, codes, BYTES);
        for (int p = 0; p < num_panels; p++) {
            const uint8_t *own = codes + p * BYTES;
            const uint16_t *scales = w.scales + ((size_t)(panel + p) * groups + g) * WORDS;
            V *sum = sums + p * count;
            int r = 0;
            const auto place = [&] { return place_of(rows, first + r, g); };
            for (; r + 8 <= count; r += 8) group_rows<KIND, WIDE, 8>(rows, place(), own, scales, sum + r);
            for (; r + 4 <= count; r += 4) group_rows<KIND, WIDE, 4>(rows, place(), own, scales, sum + r);
            for (; r < count; r++) group_rows<KIND, WIDE, 1>(rows, place(), own, scales, sum + r);
        }
    }
    for (int p = 0; p < num_panels; p++)
        for (int r = 0; r < count; r++) store(out + (size_t)r * stride + p * PANEL, sums[p * count + r]);
}

// Rows 0 to MR times NP panels, four or eight. ALL: every column, of one row; else those in the list.
template <int KIND, bool WIDE, int MR, int NP, bool ALL>
void listed_rows(const Weight &w, const Rows &rows, int count, int panel, int num_panels, float *out, int stride) {
    constexpr int WORDS = KIND == W_U4 ? 32 : 16, AHEAD = 8;
    const int groups = w.padded / GROUP;
    const uint8_t *lines = lines_of<KIND>(w, panel);
    const size_t second = (size_t)w.padded * LINE; // from the lines of four panels to those of the next four
    V sums[NP][MR];
    for (int p = 0; p < NP; p++)
        for (int r = 0; r < MR; r++) sums[p][r] = V{};
    for (int g = 0; g < groups; g++) {
        const uint8_t *own = lines + (size_t)g * GROUP * LINE;
        const int later = g + AHEAD < groups ? g + AHEAD : groups - 1;
        const uint8_t *ahead = lines + (size_t)later * GROUP * LINE;
        const Used &used = rows.used[g], &next = rows.used[later];
        I dots[NP][MR], lows[NP][MR];
        for (int p = 0; p < NP; p++)
            for (int r = 0; r < MR; r++) {
                dots[p][r] = I{};
                lows[p][r] = KIND == W_S8 ? alli(rows.sums[(size_t)g * 16 + r]) : I{};
            }
        const auto prefetch_line = [&](int column) __attribute__((always_inline)) {
            prefetch(ahead + column * LINE);
            if (KIND == W_S8 && NP == 8) prefetch(ahead + column * LINE + second);
        };
        for (int i = 0; !ALL && i < next.count; i++) prefetch_line(next.columns[i]);
        const int num = ALL ? GROUP : used.count;
        for (int k = 0; k < num; k += 4) {
            const uint8_t *line[4];
            for (int i = 0; i < 4; i++) {
                line[i] = own + (ALL ? k + i : used.columns[k + i]) * LINE;
                if (ALL) prefetch_line(k + i);
            }
#pragma GCC unroll 2
            for (int part = 0; part < NP / 4; part++) {
                I woven[4];
                if (KIND == W_U4)
                    weave(line, woven);
                else
                    weave({line[0] + part * second, line[1] + part * second, line[2] + part * second,
                           line[3] + part * second},
                          woven);
#pragma GCC unroll 4
                for (int p = 0; p < 4; p++) {
                    const I unsigned_codes = KIND == W_S8 ? woven[p] ^ (int32_t)0x80808080
                                                          : woven[p] >> (NP == 8 ? part * 4 : panel % 8) & 0x0f0f0f0f;
#pragma GCC unroll 4
                    for (int r = 0; r < MR; r++) {
                        const int8_t *x = ALL ? rows.codes + g * 512 + r * 32 : used.codes[r];
                        const int8_t *y = !WIDE ? nullptr : ALL ? rows.low + g * 512 + r * 32 : used.low[r];
                        I &dot = dots[part * 4 + p][r], &low = lows[part * 4 + p][r];
                        dot = dot4(dot, unsigned_codes, four_of(x + k));
                        if (WIDE) low = dot4(low, unsigned_codes, four_of(y + k));
                    }
                }
            }
        }
#pragma GCC unroll 8
        for (int p = 0; p < NP; p++) {
            const uint16_t *scales = w.scales + ((size_t)(panel + p) * groups + g) * WORDS;
            const V scale = load_halves(scales), least = KIND == W_U4 ? load_halves(scales + 16) : V{};
#pragma GCC unroll 4
            for (int r = 0; r < MR; r++) {
                const size_t place = (size_t)g * 16 + r;
                const I total = (WIDE ? dots[p][r] << 7 : dots[p][r]) + lows[p][r];
                sums[p][r] = fma(to_float(total), scale * all(rows.scales[place]), sums[p][r]);
                if (KIND == W_U4) sums[p][r] = fma(rows.scaled_sums[place], least, sums[p][r]);
            }
        }
    }
    for (int p = 0; p < num_panels; p++)
        for (int r = 0; r < count; r++) store(out + (size_t)r * stride + p * PANEL, sums[p][r]);
}

INLINE int used_columns(const Rows &rows) {
    int used = 0;
    for (int g = 0; g < rows.padded / GROUP; g++) used += rows.used[g].count;
    return used;
}

// At most eight panels, the first of them at a multiple of four.
template <int KIND, bool WIDE>
void input_rows(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels, float *out) {
    constexpr int TWO = WIDE ? 4 : 8; // panels of two rows, whose sums fit into registers
    const int stride = num_panels * PANEL;
    const bool is_sparse = rows.used && used_columns(rows) * 5 <= rows.padded * 2; // else reading all takes less time
    const bool has_eight = panel % 8 == 0 && num_panels > 4;
    if (!is_sparse && rows.used && count == 1 && has_eight)
        return listed_rows<KIND, WIDE, 1, 8, true>(w, rows, 1, panel, num_panels, out, stride);
    const int step = !is_sparse || !has_eight || count > 2 ? 4 : count == 1 ? 8 : TWO;
    for (int p = 0; p < num_panels; p += step) {
        const int some = num_panels - p < step ? num_panels - p : step;
        float *to = out + p * PANEL;
        if (!is_sparse)
            woven_rows<KIND, WIDE>(w, rows, first, count, panel + p, some, to, stride);
        else if (count == 1 && step == 8)
            listed_rows<KIND, WIDE, 1, 8, false>(w, rows, 1, panel + p, some, to, stride);
        else if (count == 1)
            listed_rows<KIND, WIDE, 1, 4, false>(w, rows, 1, panel + p, some, to, stride);
        else if (count == 2 && step == TWO)
            listed_rows<KIND, WIDE, 2, TWO, false>(w, rows, 2, panel + p, some, to, stride);
        else
            listed_rows<KIND, WIDE, LISTED, 4, false>(w, rows, count, panel + p, some, to, stride);
    }
}

// A thread that another program held up may read the list while it is written anew, and what it makes of it is
// dropped: each value is at any time one that a list may have.
void list(const int8_t *codes, const int8_t *low, int num_rows, int num_groups, Used *used) {
    for (int g = 0; g < num_groups; g++, codes += 512, low += low ? 512 : 0) {
        uint32_t any = 0;
        for (int r = 0; r < num_rows; r++)
            for (int plane = 0; plane < (low ? 2 : 1); plane++) {
                const int8_t *x = (plane ? low : codes) + r * 32;
#if defined(__AVX2__)
                const __m256i is_zero = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i *)x), _mm256_setzero_si256());
                any |= ~(uint32_t)_mm256_movemask_epi8(is_zero);
#else
                for (int i = 0; i < GROUP; i++) any |= (uint32_t)(x[i] != 0) << i;
#endif
            }
        Used &to = used[g];
        int count = 0;
        const auto put = [&](int column, bool is_there) {
            to.columns[count] = (uint8_t)column;
            for (int r = 0; r < num_rows; r++) {
                to.codes[r][count] = is_there ? codes[r * 32 + column] : 0;
                to.low[r][count] = is_there && low ? low[r * 32 + column] : 0;
            }
            count++;
        };
        for (; any; any &= any - 1) put(__builtin_ctz(any), true);
        while (count % 4) put(to.columns[count - 1], false);
        to.count = count;
    }
}

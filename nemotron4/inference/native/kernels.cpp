// The arithmetic of a step, compiled once for each instruction set (ISA is the name); native.h has the table.
// Every kernel does the same operations in the same order per element, so that all give the same bits; only what
// bfloat16 weights, keys and values are multiplied with under ``bf16`` is added in an order of its own.
#include "vector.h"
#include <type_traits>
#if defined(__AMX_INT8__)
#define HAS_AMX 1
#elif defined(__AVX512BF16__)
#define HAS_DOTS 1 // of pairs of bfloat16
#endif

namespace {

[[maybe_unused]] constexpr int FEW = 1; // rows up to which vectors multiply bfloat16 faster than tiles

// ---- products -------------------------------------------------------------------------------------------

INLINE I dot4(I sum, I codes, int32_t four) { // sum + unsigned codes times four signed ones
#if defined(__AVX512VNNI__)
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVX512BW__)
    __m512i x = _mm512_set1_epi32(four), w = (__m512i)codes;
    __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)),
                                     _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
    __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
    return (I)_mm512_add_epi32((__m512i)sum, _mm512_add_epi32(even, odd));
#elif defined(__AVX2__)
    const __m256i x = _mm256_set1_epi32(four), bytes = _mm256_set1_epi16(255);
    const __m256i a = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), b = _mm256_srai_epi16(x, 8);
    __m256i w[2], s[2];
    memcpy(w, &codes, 64);
    memcpy(s, &sum, 64);
    for (int half = 0; half < 2; half++) {
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w[half], bytes), a);
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w[half], 8), b);
        s[half] = _mm256_add_epi32(s[half], _mm256_add_epi32(even, odd));
    }
    memcpy(&sum, s, 64);
    return sum;
#else
    for (int c = 0; c < 4; c++)
        sum += (int32_t)(int8_t)((uint32_t)four >> (8 * c)) * ((codes >> (8 * c)) & 255);
    return sum;
#endif
}

INLINE I load_codes(const uint8_t *p) {
    I v;
    memcpy(&v, p, 64);
    return v;
}

INLINE int32_t four_of(const int8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

struct PanelOf { // one panel of a quantised weight
    const uint8_t *codes;
    const uint16_t *scales;
};

INLINE PanelOf panel_of(const Weight &w, int panel) {
    size_t groups = (size_t)w.padded / GROUP, bytes = (size_t)w.padded * PANEL / (w.kind == W_U4 ? 2 : 1);
    return {(const uint8_t *)w.codes + panel * bytes, w.scales + panel * groups * (w.kind == W_U4 ? 32 : 16)};
}

INLINE const int8_t *row_codes(const Rows &rows, const int8_t *codes, int row) { // its groups are 512 apart
    return codes + (size_t)(row / 16) * 16 * rows.padded + row % 16 * 32;
}

// Adds to ``dots`` 32 columns of MR rows times the codes of sixteen outputs.
template <int KIND, int MR>
INLINE void dot_group(const uint8_t *codes, const int8_t *const (&x)[MR], I (&dots)[MR]) {
#if defined(__AVX2__) && !defined(__AVX512BW__)
    const __m256i bytes = _mm256_set1_epi16(255), nibbles = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; half++) { // one after the other, so that the sums stay in registers
        __m256i sum[MR];
        for (int r = 0; r < MR; r++) memcpy(&sum[r], (char *)&dots[r] + half * 32, 32);
        for (int i = 0; i < (KIND == W_S8 ? 8 : 4); i++) {
            const __m256i c = _mm256_loadu_si256((const __m256i *)(codes + i * 64 + half * 32));
            if (KIND == W_S8) {
                const __m256i u = _mm256_xor_si256(c, _mm256_set1_epi8(-128));
                const __m256i even = _mm256_and_si256(u, bytes), odd = _mm256_srli_epi16(u, 8);
                for (int r = 0; r < MR; r++) {
                    const __m256i four = _mm256_set1_epi32(four_of(x[r] + i * 4));
                    sum[r] = _mm256_add_epi32(
                        sum[r], _mm256_add_epi32(
                                    _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8)),
                                    _mm256_madd_epi16(odd, _mm256_srai_epi16(four, 8))));
                }
            } else { // of four bits: pairs of products fit into sixteen
                const __m256i low = _mm256_and_si256(c, nibbles);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(c, 4), nibbles);
                for (int r = 0; r < MR; r++) {
                    const __m256i a = _mm256_set1_epi32(four_of(x[r] + i * 8));
                    const __m256i b = _mm256_set1_epi32(four_of(x[r] + i * 8 + 4));
                    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, a), _mm256_maddubs_epi16(high, b));
                    sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        for (int r = 0; r < MR; r++) memcpy((char *)&dots[r] + half * 32, &sum[r], 32);
    }
#else
#pragma GCC unroll 8
    for (int i = 0; i < (KIND == W_S8 ? 8 : 4); i++) {
        const I c = load_codes(codes + i * 64);
        if (KIND == W_S8) {
            const I u = c ^ (int32_t)0x80808080; // unsigned: 128 more, which sums take back
            for (int r = 0; r < MR; r++) dots[r] = dot4(dots[r], u, four_of(x[r] + i * 4));
        } else {
            const I low = c & 0x0f0f0f0f, high = (c >> 4) & 0x0f0f0f0f;
            for (int r = 0; r < MR; r++) {
                dots[r] = dot4(dots[r], low, four_of(x[r] + i * 8));
                dots[r] = dot4(dots[r], high, four_of(x[r] + i * 8 + 4));
            }
        }
    }
#endif
}

INLINE size_t place_of(const Rows &rows, int row, int g) { // of a row's group among all
    return ((size_t)row / 16 * ((size_t)rows.padded / GROUP) + (size_t)g) * 16 + (size_t)row % 16;
}

// Adds to ``sum`` what one group gives MR rows, all of one block of sixteen: the first at ``place``; ``codes`` and
// ``scales`` are those of the group.
template <int KIND, bool WIDE, int MR>
INLINE void group_rows(const Rows &rows, size_t place, const uint8_t *codes, const uint16_t *scales, V *sum) {
    const int8_t *x[MR], *y[MR];
    I dots[MR], lows[MR];
    for (int r = 0; r < MR; r++) {
        x[r] = rows.codes + (place + (size_t)r) * 32;
        y[r] = WIDE ? rows.low + (place + (size_t)r) * 32 : nullptr;
        dots[r] = I{};
        lows[r] = KIND == W_S8 ? alli(rows.sums[place + r]) : I{};
    }
    dot_group<KIND, MR>(codes, x, dots);
    if (WIDE) dot_group<KIND, MR>(codes, y, lows);
    const V scale = load_halves(scales);
    for (int r = 0; r < MR; r++) {
        const I total = (WIDE ? dots[r] << 7 : dots[r]) + lows[r];
        sum[r] = fma(to_float(total), scale * all(rows.scales[place + r]), sum[r]);
    }
    if (KIND == W_U4) {
        const V least = load_halves(scales + 16);
        for (int r = 0; r < MR; r++) sum[r] = fma(rows.scaled_sums[place + r], least, sum[r]);
    }
}

template <int KIND, bool WIDE, int MR>
INLINE void few_rows(const Weight &w, const Rows &rows, int row, PanelOf panel, float *out, int stride) {
    constexpr int BYTES = KIND == W_S8 ? 512 : 256, WORDS = KIND == W_U4 ? 32 : 16; // of a group
    V sum[MR];
    for (int r = 0; r < MR; r++) sum[r] = V{};
    for (int g = 0; g < w.padded / GROUP; g++) {
        const uint8_t *codes = panel.codes + (size_t)g * BYTES;
        for (int i = 0; i < BYTES; i += 64) prefetch(codes + i + (KIND == W_S8 ? 4096 : 3072));
        group_rows<KIND, WIDE, MR>(rows, place_of(rows, row, g), codes, panel.scales + (size_t)g * WORDS, sum);
    }
    for (int r = 0; r < MR; r++) store(out + (size_t)r * stride, sum[r]);
}

template <int KIND, bool WIDE>
void quantised_rows(const Weight &w, const Rows &rows, int first, int count, PanelOf panel, float *out, int stride) {
    int r = 0;
    for (; r + 8 <= count; r += 8) few_rows<KIND, WIDE, 8>(w, rows, first + r, panel, out + (size_t)r * stride, stride);
    for (; r + 4 <= count; r += 4) few_rows<KIND, WIDE, 4>(w, rows, first + r, panel, out + (size_t)r * stride, stride);
    for (; r + 2 <= count; r += 2) few_rows<KIND, WIDE, 2>(w, rows, first + r, panel, out + (size_t)r * stride, stride);
    for (; r < count; r++) few_rows<KIND, WIDE, 1>(w, rows, first + r, panel, out + (size_t)r * stride, stride);
}

#if defined(HAS_AMX)
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The compiler may not see that the instruction reads the configuration: the barrier keeps its stores.
INLINE void configure(const TileConfig &config) {
    asm volatile("" ::"m"(config) : "memory");
    _tile_loadconfig(&config);
}

TileConfig float_tiles(int rows) { // 0-3 sums, 4 and more of ``rows`` rows; 5-7 weights, keys or values
    TileConfig c;
    for (int t = 0; t < 8; t++) c.rows[t] = (uint8_t)(t < 5 ? rows : 16), c.row_bytes[t] = 64;
    return c;
}

TileConfig quantised_tiles() { // 0-3 sums of 16 x 16, 4-5 rows of 32 codes, 6-7 panels of 32 columns
    TileConfig c;
    for (int t = 0; t < 8; t++) {
        c.rows[t] = t < 6 ? 16 : 8;
        c.row_bytes[t] = t < 4 || t > 5 ? 64 : 32;
    }
    return c;
}

// Adds what one group of columns gives sixteen rows; ``dots`` holds a tile, of wide rows a second one behind it.
template <int KIND, bool WIDE>
INLINE void add_group(const int32_t *dots, const Rows &rows, size_t place, const uint16_t *scales, V (&sum)[16]) {
    const V scale = load_halves(scales), least = KIND == W_U4 ? load_halves(scales + 16) : V{};
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        I d = load_codes((const uint8_t *)(dots + r * 16));
        if (WIDE) d = (d << 7) + load_codes((const uint8_t *)(dots + 256 + r * 16));
        sum[r] = fma(to_float(d), scale * all(rows.scales[place + r]), sum[r]);
        if (KIND == W_U4) sum[r] = fma(rows.scaled_sums[place + r], least, sum[r]);
    }
}

#define GROUP_IN_TILES(C, A, B, rows_, codes_)                                                                         \
    _tile_zero(C);                                                                                                     \
    _tile_loadd(A, rows_, 32);                                                                                         \
    _tile_loadd(B, codes_, 64);                                                                                        \
    _tile_dpbssd(C, A, B)

// Sixteen rows times one panel, by turns of two groups of columns, or of one of wide rows. Tiles are stored one
// turn after they were computed, and what is stored is added another turn later: else each waits for the other.
template <int KIND, bool WIDE>
INLINE void sixteen_rows(const Weight &w, const Rows &rows, int row, const uint8_t *codes, const uint16_t *scales,
                         V (&sum)[16]) {
    constexpr int STEP = WIDE ? 1 : 2, WORDS = KIND == W_U4 ? 32 : 16;
    const int groups = w.padded / GROUP, turns = groups / STEP;
    const int8_t *x = row_codes(rows, rows.codes, row), *y = WIDE ? row_codes(rows, rows.low, row) : nullptr;
    const size_t at = (size_t)(row / 16) * groups * 16;
    alignas(64) int32_t dots[2][512];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) sum[r] = V{};
    auto add = [&](int turn) __attribute__((always_inline)) {
        for (int i = 0; i < STEP; i++) {
            const size_t g = (size_t)turn * STEP + i;
            add_group<KIND, WIDE>(dots[turn % 2] + i * 256, rows, at + g * 16, scales + g * WORDS, sum);
        }
    };
    for (int turn = 0; turn <= turns; turn++) {
        const size_t g = (size_t)turn * STEP * 512;
        const int8_t *a = x + g, *b = WIDE ? y + g : a + 512;
        const uint8_t *c = codes + g, *d = WIDE ? c : c + 512;
        if (turn % 2 == 0) {
            if (turn < turns) {
                GROUP_IN_TILES(0, 4, 6, a, c);
                GROUP_IN_TILES(1, 5, 7, b, d);
            }
            if (turn > 0) {
                _tile_stored(2, dots[1], 64);
                _tile_stored(3, dots[1] + 256, 64);
            }
        } else {
            if (turn < turns) {
                GROUP_IN_TILES(2, 4, 6, a, c);
                GROUP_IN_TILES(3, 5, 7, b, d);
            }
            _tile_stored(0, dots[0], 64);
            _tile_stored(1, dots[0] + 256, 64);
        }
        if (turn > 1) add(turn - 2);
    }
    if (turns > 0) add(turns - 1);
    if (turns * STEP < groups) { // one group of columns is left
        const size_t g = (size_t)groups - 1;
        GROUP_IN_TILES(0, 4, 6, x + g * 512, codes + g * 512);
        _tile_stored(0, dots[0], 64);
        add_group<KIND, WIDE>(dots[0], rows, at + g * 16, scales + g * WORDS, sum);
    }
}

template <int KIND, bool WIDE>
void tiles_quantised(const Weight &w, const Rows &rows, int first, int count, PanelOf panel, float *out, int stride,
                     uint8_t *unpacked) {
    const uint8_t *codes = panel.codes;
    if (KIND == W_U4) {
        for (size_t i = 0; i < (size_t)w.padded * 8; i += 64) {
            I both = load_codes(panel.codes + i), low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
            memcpy(unpacked + 2 * i, &low, 64);
            memcpy(unpacked + 2 * i + 64, &high, 64);
        }
        codes = unpacked;
    }
    for (int r0 = 0; r0 < count; r0 += 16) {
        V sum[16];
        sixteen_rows<KIND, WIDE>(w, rows, first + r0, codes, panel.scales, sum);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            if (r0 + r < count) store(out + (size_t)(r0 + r) * stride, sum[r]);
    }
}

void tiles_bf16(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels, float *out) {
    TileConfig config;
    for (int t = 0; t < 8; t++) config.rows[t] = 16, config.row_bytes[t] = 64;
    configure(config);
    const size_t panel_bytes = (size_t)w.padded * PANEL * 2;
    const int stride = num_panels * PANEL;
    alignas(64) float part[4][256];
    for (int p = 0; p < num_panels; p += 2) {
        const char *b0 = (const char *)w.codes + (panel + p) * panel_bytes;
        const bool two = p + 1 < num_panels;
        const char *b1 = two ? b0 + panel_bytes : b0;
        for (int r0 = 0; r0 < count; r0 += 32) { // rows are padded to a multiple of 32
            const uint16_t *x0 = rows.bf16 + (size_t)(first + r0) * rows.padded, *x1 = x0 + 16 * (size_t)rows.padded;
            const bool more = r0 + 16 < count;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int k = 0; k < w.padded; k += 32) {
                _tile_loadd(4, x0 + k, rows.padded * 2);
                _tile_loadd(6, b0 + (size_t)k * 32, 64);
                _tile_dpbf16ps(0, 4, 6);
                if (two) {
                    _tile_loadd(7, b1 + (size_t)k * 32, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (more) {
                    _tile_loadd(5, x1 + k, rows.padded * 2);
                    _tile_dpbf16ps(2, 5, 6);
                    if (two) _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, part[0], 64);
            _tile_stored(1, part[1], 64);
            _tile_stored(2, part[2], 64);
            _tile_stored(3, part[3], 64);
            for (int r = 0; r < 32 && r0 + r < count; r++) {
                float *to = out + (size_t)(r0 + r) * stride + p * PANEL;
                memcpy(to, part[r / 16 * 2] + r % 16 * 16, 64);
                if (two) memcpy(to + PANEL, part[r / 16 * 2 + 1] + r % 16 * 16, 64);
            }
        }
    }
    _tile_release();
}
#endif

struct Floats { // numbers of rows and weights that one instruction multiplies and adds: a column at a time
    static constexpr int COLUMNS = 1;
    static const float *of(const Rows &rows) { return rows.values; }
    INLINE V add(const float *x, V weights, V sum) { return fma(*x, weights, sum); }
};

#if defined(HAS_DOTS)
struct Pairs { // two columns; the instruction adds the second product to the sum, then the first
    static constexpr int COLUMNS = 2;
    static const uint16_t *of(const Rows &rows) { return rows.bf16; }
    INLINE V add(const uint16_t *x, V weights, V sum) {
        return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)alli(four_of((const int8_t *)x)), (__m512bh)weights);
    }
};
#endif

template <typename T, int MR, int NP>
INLINE void float_block(const Weight &w, const Rows &rows, int row, int panel, float *out, int stride) {
    const size_t panel_size = (size_t)w.padded / T::COLUMNS * PANEL;
    const float *b = (const float *)w.codes + panel * panel_size;
    const auto *x = T::of(rows) + (size_t)row * rows.padded;
    V sum[MR][NP] = {};
    for (int k = 0; k < w.cols; k += T::COLUMNS, b += PANEL) {
        V values[NP];
        for (int p = 0; p < NP; p++) {
            values[p] = load(b + p * panel_size);
            if (MR == 1) prefetch((const char *)(b + p * panel_size) + 4096);
        }
        for (int r = 0; r < MR; r++)
            for (int p = 0; p < NP; p++) sum[r][p] = T::add(x + (size_t)r * rows.padded + k, values[p], sum[r][p]);
    }
    for (int r = 0; r < MR; r++)
        for (int p = 0; p < NP; p++) store(out + (size_t)r * stride + p * PANEL, sum[r][p]);
}

template <typename T, int MR>
INLINE void float_rows(const Weight &w, const Rows &rows, int row, int panel, int num_panels, float *out) {
    const int stride = num_panels * PANEL;
    constexpr int NP = MR == 4 ? 4 : 2;
    int p = 0;
    for (; p + NP <= num_panels; p += NP) float_block<T, MR, NP>(w, rows, row, panel + p, out + p * PANEL, stride);
    for (; p < num_panels; p++) float_block<T, MR, 1>(w, rows, row, panel + p, out + p * PANEL, stride);
}

template <typename T>
void product_float(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels, float *out) {
    const size_t stride = (size_t)num_panels * PANEL;
    int r = 0;
    for (; r + 12 <= count; r += 12) float_rows<T, 12>(w, rows, first + r, panel, num_panels, out + r * stride);
    for (; r + 4 <= count; r += 4) float_rows<T, 4>(w, rows, first + r, panel, num_panels, out + r * stride);
    for (; r < count; r++) float_rows<T, 1>(w, rows, first + r, panel, num_panels, out + r * stride);
}

// The order of AMX's tiles: of 32 columns the even ones are summed and the odd ones, then both are added.
template <int MR>
INLINE void bf16_rows(const Weight &w, const Rows &rows, int row, const char *b, float *out, int stride) {
    V sum[MR] = {};
    const uint16_t *x = rows.bf16 + (size_t)row * rows.padded;
    for (int k = 0; k < w.padded; k += 32) {
        V even[MR] = {}, odd[MR] = {};
#pragma GCC unroll 16
        for (int i = k; i < k + 32; i += 2) {
            const I pair = load_codes((const uint8_t *)b + (size_t)i * 32);
            prefetch(b + (size_t)i * 32 + 4096);
            for (int r = 0; r < MR; r++) {
                const I two = alli(four_of((const int8_t *)(x + (size_t)r * rows.padded + i)));
                even[r] = fma(lower(two), lower(pair), even[r]);
                odd[r] = fma(upper(two), upper(pair), odd[r]);
            }
        }
        for (int r = 0; r < MR; r++) sum[r] += even[r] + odd[r];
    }
    for (int r = 0; r < MR; r++) store(out + (size_t)r * stride, sum[r]);
}

void product_bf16(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels, float *out) {
    [[maybe_unused]] const FlushSubnormals flush;
    const int stride = num_panels * PANEL;
#if defined(HAS_AMX)
    if (count > FEW) return tiles_bf16(w, rows, first, count, panel, num_panels, out);
#endif
#if defined(HAS_DOTS)
    return product_float<Pairs>(w, rows, first, count, panel, num_panels, out);
#else
    for (int p = 0; p < num_panels; p++) {
        const char *b = (const char *)w.codes + (size_t)(panel + p) * w.padded * PANEL * 2;
        int r = 0;
        for (; r + 4 <= count; r += 4) bf16_rows<4>(w, rows, first + r, b, out + (size_t)r * stride + p * 16, stride);
        for (; r < count; r++) bf16_rows<1>(w, rows, first + r, b, out + (size_t)r * stride + p * 16, stride);
    }
#endif
}

#include "by_input.h"

// Panels that lie one after the other; ``stride``: of ``out``.
void product_panels(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels, float *out,
                    int stride) {
#if defined(HAS_AMX)
    const int least = w.kind == W_U4 ? 12 : 8; // rows from which tiles are faster
    const int in_tiles = count % 16 < least ? count / 16 * 16 : count;
    if (in_tiles) configure(quantised_tiles());
    thread_local uint8_t *unpacked = nullptr;
    thread_local size_t unpacked_size = 0;
    if (in_tiles && w.kind == W_U4 && unpacked_size < (size_t)w.padded * PANEL) {
        delete[] unpacked;
        unpacked = new uint8_t[unpacked_size = (size_t)w.padded * PANEL];
    }
#else
    const int in_tiles = 0;
#endif
    for (int p = 0; p < num_panels; p++) {
        const PanelOf one = panel_of(w, panel + p);
        float *to = out + p * PANEL, *rest = to + (size_t)in_tiles * stride;
        const int last = first + in_tiles, left = count - in_tiles;
#if defined(HAS_AMX)
        if (in_tiles && w.kind == W_S8)
            rows.low ? tiles_quantised<W_S8, true>(w, rows, first, in_tiles, one, to, stride, unpacked)
                     : tiles_quantised<W_S8, false>(w, rows, first, in_tiles, one, to, stride, unpacked);
        if (in_tiles && w.kind == W_U4)
            rows.low ? tiles_quantised<W_U4, true>(w, rows, first, in_tiles, one, to, stride, unpacked)
                     : tiles_quantised<W_U4, false>(w, rows, first, in_tiles, one, to, stride, unpacked);
#endif
        if (left && w.kind == W_S8)
            rows.low ? quantised_rows<W_S8, true>(w, rows, last, left, one, rest, stride)
                     : quantised_rows<W_S8, false>(w, rows, last, left, one, rest, stride);
        if (left && w.kind == W_U4)
            rows.low ? quantised_rows<W_U4, true>(w, rows, last, left, one, rest, stride)
                     : quantised_rows<W_U4, false>(w, rows, last, left, one, rest, stride);
    }
#if defined(HAS_AMX)
    if (in_tiles) _tile_release();
#endif
}

uint8_t *room(size_t size) { // of this thread, until it asks again
    thread_local uint8_t *bytes = nullptr;
    thread_local size_t available = 0;
    if (available < size) {
        delete[] bytes;
        bytes = new uint8_t[available = size];
    }
    return bytes;
}

template <int KIND>
void product_by_input(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels, float *out) {
#if defined(HAS_AMX)
    const bool is_woven_whole = count >= (KIND == W_U4 ? 12 : 8);
#else
    const bool is_woven_whole = count > WOVEN;
#endif
    if (!is_woven_whole)
        return rows.low ? input_rows<KIND, true>(w, rows, first, count, panel, num_panels, out)
                        : input_rows<KIND, false>(w, rows, first, count, panel, num_panels, out);
    const size_t bytes = (size_t)w.padded * PANEL / (KIND == W_U4 ? 2 : 1); // of a panel
    uint8_t *codes = room(4 * bytes);
    for (int p = 0; p < num_panels; p += 4) {
        const uint8_t *line = lines_of<KIND>(w, panel + p);
        for (int g = 0; g < w.padded / GROUP; g++, line += GROUP * LINE) {
            for (int i = 0; i < GROUP; i++) prefetch(line + (4 * GROUP + i) * LINE);
            weave_group<KIND>(line, panel + p, codes + g * (KIND == W_S8 ? 512 : 256), bytes);
        }
        Weight four = w;
        four.codes = codes;
        four.scales = w.scales + (size_t)(panel + p) * w.padded / GROUP * (KIND == W_U4 ? 32 : 16);
        product_panels(four, rows, first, count, 0, num_panels - p < 4 ? num_panels - p : 4, out + p * PANEL,
                       num_panels * PANEL);
    }
}

void product(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels, float *out) {
    if (w.kind == W_F32) return product_float<Floats>(w, rows, first, count, panel, num_panels, out);
    if (w.kind == W_BF16) return product_bf16(w, rows, first, count, panel, num_panels, out);
    if (!w.is_by_input) return product_panels(w, rows, first, count, panel, num_panels, out, num_panels * PANEL);
    return w.kind == W_S8 ? product_by_input<W_S8>(w, rows, first, count, panel, num_panels, out)
                          : product_by_input<W_U4>(w, rows, first, count, panel, num_panels, out);
}

// ---- rows -----------------------------------------------------------------------------------------------

INLINE V only_first(V v, int count) { // zeros from ``count`` on
    if (count >= 16) return v;
    V out = {};
    memcpy(&out, &v, 4 * (size_t)count);
    return out;
}

void norm(const float *x, const Norm &n, int size, float eps, float *out) {
    float mean = 0;
    if (n.beta) {
        V sum = {};
        for (int i = 0; i < size; i += 16) sum += load_part(x + i, size - i);
        mean = sum16(sum) / (float)size;
    }
    V squares = {};
    for (int i = 0; i < size; i += 16) {
        V d = only_first(load_part(x + i, size - i) - all(mean), size - i);
        squares = fma(d, d, squares);
    }
    const float factor = 1.0f / __builtin_sqrtf(sum16(squares) / (float)size + eps);
    for (int i = 0; i < size; i += 16) {
        V y = (load_part(x + i, size - i) - all(mean)) * all(factor) * load_part(n.gamma + i, size - i);
        if (n.beta) y = y + load_part(n.beta + i, size - i);
        store_part(out + i, y, size - i);
    }
}

void quantise(const float *x, int size, int padded, int8_t *codes, int8_t *low, float *scales, int32_t *sums,
              float *scaled_sums) {
    typedef int8_t C __attribute__((vector_size(16)));
    const float most = low ? 16256.0f : 127.0f; // 128 * 127
    for (int g = 0; g * GROUP < padded; g++) {
        const int left = size - g * GROUP;
        const V a = left > 0 ? load_part(x + g * GROUP, left) : V{};
        const V b = left > 16 ? load_part(x + g * GROUP + 16, left - 16) : V{};
        const float largest = max16(maximum(absolute(a), absolute(b)));
        const float scale = largest / most, inverse = largest > 0 ? most / largest : 0.0f;
        const I whole[2] = {to_int(a * all(inverse)), to_int(b * all(inverse))};
        for (int half = 0; half < 2; half++) {
            const I high = low ? (whole[half] + 64) >> 7 : whole[half];
            const C c = __builtin_convertvector(high, C);
            memcpy(codes + g * 512 + half * 16, &c, 16);
            if (!low) continue;
            const C rest = __builtin_convertvector(whole[half] - (high << 7), C);
            memcpy(low + g * 512 + half * 16, &rest, 16);
        }
        const int32_t total = sum16(whole[0] + whole[1]);
        scales[g * 16] = scale;
        sums[g * 16] = -128 * total;
        scaled_sums[g * 16] = scale * (float)total;
    }
}

void to_bf16(const float *x, int size, int padded, uint16_t *out) {
    for (int i = 0; i < padded; i += 16)
        store_bf16(out + i, i < size ? rounded_bf16(load_part(x + i, size - i)) : V{});
}

void finish(const float *from, int count, const float *bias, Use use, float *to) {
    for (int i = 0; i < count; i += 16) {
        V y = load_part(from + i, count - i);
        if (bias) y += load_part(bias + i, count - i);
        if (use == ADD) y += load_part(to + i, count - i);
        if (use == RELU2) y = maximum(y, V{}), y *= y;
        store_part(to + i, y, count - i);
    }
}

void swiglu(const float *gate, const float *up, int size, float *out) {
    for (int i = 0; i < size; i += 16) {
        V g = load_part(gate + i, size - i), u = load_part(up + i, size - i);
        store_part(out + i, g / (exponential(-g) + 1.0f) * u, size - i);
    }
}

int largest(const float *x, int size) {
    const I lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    V most = all(-__builtin_inff());
    I place = lanes;
    int i = 0;
    for (; i + 16 <= size; i += 16) {
        const V v = load(x + i);
        const I is_more = v > most;
        most = is_more ? v : most;
        place = is_more ? lanes + i : place;
    }
    int found = i > 0 ? place[0] : 0;
    for (int lane = 1; i > 0 && lane < 16; lane++)
        if (most[lane] > x[found] || (most[lane] == x[found] && place[lane] < found)) found = place[lane];
    for (; i < size; i++)
        if (x[i] > x[found]) found = i;
    return found;
}

double weights(const float *x, int size, float temperature, float least, float *out) {
    V most = all(-__builtin_inff());
    int i = 0;
    for (; i + 16 <= size; i += 16) most = maximum(most, load(x + i));
    float largest = max16(most);
    for (; i < size; i++) largest = x[i] > largest ? x[i] : largest;
    largest /= temperature; // dividing keeps the order
    double total = 0;
    for (i = 0; i < size; i += 16) {
        const V v = load_part(x + i, size - i) / all(temperature);
        V w = exponential(v - all(largest));
        w = (V)((I)w & (v >= all(least)));
        store_part(out + i, w, size - i);
        total += sum16(only_first(w, size - i));
    }
    return total;
}

double mass(const float *x, int size, float least) {
    double total = 0;
    for (int i = 0; i < size; i += 16) {
        const V v = only_first(load_part(x + i, size - i), size - i);
        total += sum16((V)((I)v & (v >= all(least))));
    }
    return total;
}

int above(const float *x, int size, float least, int32_t *ids) {
    int count = 0;
    for (int i = 0; i < size; i += 16) {
        const int end = size - i < 16 ? size : i + 16;
        if (end == i + 16 && max16(load(x + i)) < least) continue;
        for (int j = i; j < end; j++)
            if (x[j] >= least) ids[count++] = j;
    }
    return count;
}

#include "attention.h"

} // namespace

#define TEXT2(a) #a
#define TEXT(a) TEXT2(a)
extern "C" const Kernels *kernels() {
    static const Kernels table = {TEXT(ISA), product, norm, quantise, list, to_bf16, finish, swiglu, largest, weights, mass, above, attend};
    return &table;
}

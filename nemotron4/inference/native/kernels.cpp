// The arithmetic of a step, compiled once for each instruction set (ISA is the name); native.h has the table.
// Every kernel does the same operations in the same order per element, so that all give the same bits; only
// products of bfloat16 weights differ between AMX and the others.
#include "vector.h"
#if defined(__AMX_INT8__)
#define HAS_AMX 1
#endif

namespace {

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
    __m256i h[2], s[2];
    memcpy(h, &codes, 64);
    memcpy(s, &sum, 64);
    __m256i x = _mm256_set1_epi32(four), x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
    __m256i x_odd = _mm256_srai_epi16(x, 8);
    for (int i = 0; i < 2; i++) {
        __m256i even = _mm256_madd_epi16(_mm256_and_si256(h[i], _mm256_set1_epi16(255)), x_even);
        __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(h[i], 8), x_odd);
        s[i] = _mm256_add_epi32(s[i], _mm256_add_epi32(even, odd));
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

// MR rows, all of one block of sixteen, times one panel.
template <int KIND, bool WIDE, int MR>
INLINE void few_rows(const Weight &w, const Rows &rows, int row, PanelOf panel, float *out, int stride) {
    const int groups = w.padded / GROUP;
    const size_t at = (size_t)(row / 16) * groups * 16 + row % 16;
    const int8_t *x[MR], *y[MR];
    V sum[MR];
    for (int r = 0; r < MR; r++) {
        x[r] = rows.codes + (size_t)(row + r) * rows.padded;
        y[r] = WIDE ? rows.low + (size_t)(row + r) * rows.padded : nullptr;
        sum[r] = V{};
    }
    for (int g = 0; g < groups; g++) {
        const size_t place = at + (size_t)g * 16;
        I dots[MR], lows[MR];
        for (int r = 0; r < MR; r++) {
            dots[r] = I{};
            lows[r] = KIND == W_S8 ? alli(rows.sums[place + r]) : I{};
        }
        if (KIND == W_S8) {
            const uint8_t *codes = panel.codes + (size_t)g * 512;
#if defined(__AVX2__)
            if (MR <= 2)
                for (int i = 0; i < 512; i += 64) _mm_prefetch((const char *)codes + i + 4096, _MM_HINT_T0);
#endif
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                I c = load_codes(codes + i * 64) ^ (int32_t)0x80808080; // unsigned: 128 more, which sums take back
                for (int r = 0; r < MR; r++) {
                    dots[r] = dot4(dots[r], c, four_of(x[r] + g * 32 + i * 4));
                    if (WIDE) lows[r] = dot4(lows[r], c, four_of(y[r] + g * 32 + i * 4));
                }
            }
        } else {
            const uint8_t *codes = panel.codes + (size_t)g * 256;
#if defined(__AVX2__)
            if (MR <= 2)
                for (int i = 0; i < 256; i += 64) _mm_prefetch((const char *)codes + i + 3072, _MM_HINT_T0);
#endif
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                I both = load_codes(codes + i * 64);
                I low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
                for (int r = 0; r < MR; r++) {
                    dots[r] = dot4(dots[r], low, four_of(x[r] + g * 32 + i * 8));
                    dots[r] = dot4(dots[r], high, four_of(x[r] + g * 32 + i * 8 + 4));
                    if (WIDE) {
                        lows[r] = dot4(lows[r], low, four_of(y[r] + g * 32 + i * 8));
                        lows[r] = dot4(lows[r], high, four_of(y[r] + g * 32 + i * 8 + 4));
                    }
                }
            }
        }
        const V scale = load_halves(panel.scales + (size_t)g * (KIND == W_U4 ? 32 : 16));
        for (int r = 0; r < MR; r++) {
            const I total = (WIDE ? dots[r] << 7 : dots[r]) + lows[r];
            sum[r] = fma(to_float(total), scale * all(rows.scales[place + r]), sum[r]);
        }
        if (KIND == W_U4) {
            const V least = load_halves(panel.scales + (size_t)g * 32 + 16);
            for (int r = 0; r < MR; r++) sum[r] = fma(rows.scaled_sums[place + r], least, sum[r]);
        }
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

// Sums of one group into ``to``, in tiles of its own: a tile is not free before it is stored.
#define GROUP_IN_TILES(C, A, B, rows_, codes_, to)                                                                     \
    _tile_zero(C);                                                                                                     \
    _tile_loadd(A, rows_, rows.padded);                                                                                \
    _tile_loadd(B, codes_, 64);                                                                                        \
    _tile_dpbssd(C, A, B);                                                                                             \
    _tile_stored(C, to, 64)

template <int KIND, bool WIDE>
void tiles_quantised(const Weight &w, const Rows &rows, int first, int count, PanelOf panel, float *out, int stride,
                     uint8_t *unpacked) {
    const int groups = w.padded / GROUP;
    const uint8_t *codes = panel.codes;
    if (KIND == W_U4) {
        for (size_t i = 0; i < (size_t)w.padded * 8; i += 64) {
            I both = load_codes(panel.codes + i), low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
            memcpy(unpacked + 2 * i, &low, 64);
            memcpy(unpacked + 2 * i + 64, &high, 64);
        }
        codes = unpacked;
    }
    const size_t step = KIND == W_U4 ? 32 : 16;
    constexpr int STEP = WIDE ? 2 : 4; // groups that are in tiles at the same time
    alignas(64) int32_t dots[4][256];
    for (int r0 = 0; r0 < count; r0 += 16) {
        const int row = first + r0;
        const int8_t *x = rows.codes + (size_t)row * rows.padded;
        const int8_t *y = WIDE ? rows.low + (size_t)row * rows.padded : nullptr;
        const size_t at = (size_t)(row / 16) * groups * 16;
        V sum[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) sum[r] = V{};
        int g = 0;
        for (; g + STEP <= groups; g += STEP) {
            const uint8_t *c = codes + (size_t)g * 512;
            const int8_t *a = x + g * 32, *b = WIDE ? y + g * 32 : a + 64;
            GROUP_IN_TILES(0, 4, 6, a, c, dots[0]);
            GROUP_IN_TILES(1, 5, 7, WIDE ? b : a + 32, c + (WIDE ? 0 : 512), dots[1]);
            GROUP_IN_TILES(2, 4, 6, WIDE ? a + 32 : b, c + (WIDE ? 512 : 1024), dots[2]);
            GROUP_IN_TILES(3, 5, 7, b + 32, c + (WIDE ? 512 : 1536), dots[3]);
#pragma GCC unroll 4
            for (int i = 0; i < STEP; i++)
                add_group<KIND, WIDE>(dots[WIDE ? 2 * i : i], rows, at + (size_t)(g + i) * 16,
                                      panel.scales + (size_t)(g + i) * step, sum);
        }
        for (; g < groups; g++) {
            GROUP_IN_TILES(0, 4, 6, x + g * 32, codes + (size_t)g * 512, dots[0]);
            if (WIDE) {
                GROUP_IN_TILES(1, 5, 7, y + g * 32, codes + (size_t)g * 512, dots[1]);
            }
            add_group<KIND, WIDE>(dots[0], rows, at + (size_t)g * 16, panel.scales + (size_t)g * step, sum);
        }
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

template <int MR, int NP>
INLINE void float_block(const Weight &w, const Rows &rows, int row, int panel, float *out, int stride) {
    const size_t panel_size = (size_t)w.padded * PANEL;
    const float *b = (const float *)w.codes + panel * panel_size;
    const float *x = rows.values + (size_t)row * rows.padded;
    V sum[MR][NP] = {};
    for (int k = 0; k < w.cols; k++) {
        V values[NP];
        for (int p = 0; p < NP; p++) values[p] = load(b + p * panel_size + (size_t)k * PANEL);
        for (int r = 0; r < MR; r++)
            for (int p = 0; p < NP; p++) sum[r][p] = fma(x[(size_t)r * rows.padded + k], values[p], sum[r][p]);
    }
    for (int r = 0; r < MR; r++)
        for (int p = 0; p < NP; p++) store(out + (size_t)r * stride + p * PANEL, sum[r][p]);
}

template <int MR>
INLINE void float_rows(const Weight &w, const Rows &rows, int row, int panel, int num_panels, float *out) {
    const int stride = num_panels * PANEL;
    constexpr int NP = MR > 4 ? 2 : 4;
    int p = 0;
    for (; p + NP <= num_panels; p += NP) float_block<MR, NP>(w, rows, row, panel + p, out + p * PANEL, stride);
    for (; p < num_panels; p++) float_block<MR, 1>(w, rows, row, panel + p, out + p * PANEL, stride);
}

void product_float(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels, float *out) {
    const size_t stride = (size_t)num_panels * PANEL;
    int r = 0;
    for (; r + 12 <= count; r += 12) float_rows<12>(w, rows, first + r, panel, num_panels, out + r * stride);
    for (; r + 4 <= count; r += 4) float_rows<4>(w, rows, first + r, panel, num_panels, out + r * stride);
    for (; r < count; r++) float_rows<1>(w, rows, first + r, panel, num_panels, out + r * stride);
}

template <int MR>
INLINE void bf16_rows(const Weight &w, const Rows &rows, int row, const char *b, float *out, int stride) {
    V sum[MR] = {};
    for (int k = 0; k < w.padded; k += 2) {
        I pair = load_codes((const uint8_t *)b + (size_t)k * 32);
        V low = (V)(pair << 16), high = (V)(pair & (int32_t)0xffff0000);
        for (int r = 0; r < MR; r++) {
            const uint16_t *x = rows.bf16 + (size_t)(row + r) * rows.padded + k;
            union {
                uint32_t u;
                float f;
            } x0 = {(uint32_t)x[0] << 16}, x1 = {(uint32_t)x[1] << 16};
            sum[r] = fma(x0.f, low, sum[r]);
            sum[r] = fma(x1.f, high, sum[r]);
        }
    }
    for (int r = 0; r < MR; r++) store(out + (size_t)r * stride, sum[r]);
}

[[maybe_unused]] void product_bf16(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels,
                                   float *out) {
    const int stride = num_panels * PANEL;
    for (int p = 0; p < num_panels; p++) {
        const char *b = (const char *)w.codes + (size_t)(panel + p) * w.padded * PANEL * 2;
        int r = 0;
        for (; r + 8 <= count; r += 8) bf16_rows<8>(w, rows, first + r, b, out + (size_t)r * stride + p * 16, stride);
        for (; r < count; r++) bf16_rows<1>(w, rows, first + r, b, out + (size_t)r * stride + p * 16, stride);
    }
}

void product(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels, float *out) {
    if (w.kind == W_F32) return product_float(w, rows, first, count, panel, num_panels, out);
#if defined(HAS_AMX)
    if (w.kind == W_BF16) return tiles_bf16(w, rows, first, count, panel, num_panels, out);
    const int in_tiles = count < 8 ? 0 : count % 16 < 8 ? count / 16 * 16 : count;
    if (in_tiles) configure(quantised_tiles());
    thread_local uint8_t *unpacked = nullptr;
    thread_local size_t unpacked_size = 0;
    if (in_tiles && w.kind == W_U4 && unpacked_size < (size_t)w.padded * PANEL) {
        delete[] unpacked;
        unpacked = new uint8_t[unpacked_size = (size_t)w.padded * PANEL];
    }
#else
    if (w.kind == W_BF16) return product_bf16(w, rows, first, count, panel, num_panels, out);
    const int in_tiles = 0;
#endif
    const int stride = num_panels * PANEL;
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
            memcpy(codes + g * GROUP + half * 16, &c, 16);
            if (!low) continue;
            const C rest = __builtin_convertvector(whole[half] - (high << 7), C);
            memcpy(low + g * GROUP + half * 16, &rest, 16);
        }
        const int32_t total = sum16(whole[0] + whole[1]);
        scales[g * 16] = scale;
        sums[g * 16] = -128 * total;
        scaled_sums[g * 16] = scale * (float)total;
    }
}

void to_bf16(const float *x, int size, uint16_t *out) {
    for (int i = 0; i < size; i++) {
        uint32_t u;
        memcpy(&u, x + i, 4);
        out[i] = (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
}

void relu2(float *x, int size) {
    for (int i = 0; i < size; i += 16) {
        V v = maximum(load_part(x + i, size - i), V{});
        store_part(x + i, v * v, size - i);
    }
}

void swiglu(const float *gate, const float *up, int size, float *out) {
    for (int i = 0; i < size; i += 16) {
        V g = load_part(gate + i, size - i), u = load_part(up + i, size - i);
        store_part(out + i, g / (exponential(-g) + 1.0f) * u, size - i);
    }
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

// ---- attention ------------------------------------------------------------------------------------------

template <bool BF16> INLINE V load_cached(const char *p, int index) {
    return BF16 ? load_bf16((const uint16_t *)p + index) : load((const float *)p + index);
}

// QB queries of one key/value head over the cache, block by block, softmax on the way. A query does the same
// operations whatever is computed next to it.
template <int QB, bool BF16>
void attend_queries(const AttendTask &t, const float *const *q, const int *position, float *const *out, float *work) {
    const int dim = t.head_dim, wide = (dim + 15) / 16 * 16;
    const size_t element = BF16 ? 2 : 4;
    float largest[QB];
    V weight[QB];
    for (int j = 0; j < QB; j++) {
        largest[j] = -__builtin_inff();
        weight[j] = V{};
    }
    memset(work, 0, sizeof(float) * QB * wide);
    const int last = position[QB - 1];
    const I lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int start = 0; start <= last; start += BLOCK) {
        const char *keys = t.keys + t.blocks[start / BLOCK] * t.key_block;
        const char *values = t.values + t.blocks[start / BLOCK] * t.value_block;
        V s0[QB] = {}, s1[QB] = {};
        for (int e = 0; e < dim; e++) {
            const V k0 = load_cached<BF16>(keys, e * BLOCK), k1 = load_cached<BF16>(keys, e * BLOCK + 16);
            for (int j = 0; j < QB; j++) {
                s0[j] = fma(q[j][e], k0, s0[j]);
                s1[j] = fma(q[j][e], k1, s1[j]);
            }
        }
        alignas(64) float p[QB][BLOCK];
        int num_seen = 0;
        V shrink[QB];
        for (int j = 0; j < QB; j++) {
            const int seen = position[j] + 1 - start; // of this block's positions
            if (seen > num_seen) num_seen = seen < BLOCK ? seen : BLOCK;
            V a = s0[j] * all(t.scale), b = s1[j] * all(t.scale);
            if (seen < BLOCK) {
                a = lanes < seen ? a : all(-__builtin_inff());
                b = lanes + 16 < seen ? b : all(-__builtin_inff());
            }
            float now = max16(maximum(a, b));
            now = now > largest[j] ? now : largest[j];
            shrink[j] = exponential(all(largest[j] - now));
            largest[j] = now;
            a = exponential(a - all(now));
            b = exponential(b - all(now));
            weight[j] = fma(weight[j], shrink[j], a + b);
            store(p[j], a);
            store(p[j] + 16, b);
        }
        for (int e = 0; e < wide; e += 16) {
            V sum[QB];
            for (int j = 0; j < QB; j++) sum[j] = load(work + j * wide + e) * shrink[j];
            const char *column = values + element * e;
            for (int i = 0; i < num_seen; i++) {
                const V v = load_cached<BF16>(column, i * wide);
                for (int j = 0; j < QB; j++) sum[j] = fma(p[j][i], v, sum[j]);
            }
            for (int j = 0; j < QB; j++) store(work + j * wide + e, sum[j]);
        }
    }
    for (int j = 0; j < QB; j++) {
        const V inverse = all(1.0f / sum16(weight[j]));
        for (int e = 0; e < dim; e += 16) store_part(out[j] + e, load(work + j * wide + e) * inverse, dim - e);
    }
}

template <bool BF16> void attend_all(const AttendTask &t, float *out) {
    const int total = t.num_rows * t.heads_per_kv;
    alignas(64) float work[6 * 512];
    for (int i = 0; i < total;) {
        const int count = total - i >= 6 ? 6 : total - i;
        const float *q[6];
        float *to[6];
        int position[6];
        for (int j = 0; j < count; j++) {
            const int row = (i + j) / t.heads_per_kv, head = (i + j) % t.heads_per_kv;
            q[j] = t.q + row * t.q_stride + head * t.head_dim;
            to[j] = out + (size_t)(i + j) * t.head_dim;
            position[j] = t.first_position + row;
        }
        switch (count) {
        case 6: attend_queries<6, BF16>(t, q, position, to, work); break;
        case 5:
        case 4: attend_queries<4, BF16>(t, q, position, to, work); break;
        case 3: attend_queries<3, BF16>(t, q, position, to, work); break;
        case 2: attend_queries<2, BF16>(t, q, position, to, work); break;
        default: attend_queries<1, BF16>(t, q, position, to, work);
        }
        i += count == 5 ? 4 : count;
    }
}

void attend(const AttendTask &t, float *out) { return t.is_bf16 ? attend_all<true>(t, out) : attend_all<false>(t, out); }

} // namespace

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define TEXT2(a) #a
#define TEXT(a) TEXT2(a)
const Kernels *JOIN(kernels_, ISA)() {
    static const Kernels table = {TEXT(ISA), product, norm, quantise, to_bf16, relu2, swiglu, weights, mass, above, attend};
    return &table;
}

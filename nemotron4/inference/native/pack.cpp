// Weights into panels: from float32 rows, or from the blocks of a GGUF file as they are stored.
#include "pack.h"
#include "native.h"
#include <cmath>
#include <cstring>

namespace {

uint16_t to_half(float x) { // to the nearest, ties to even
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint16_t sign = (uint16_t)((u >> 16) & 0x8000);
    float a = std::fabs(x);
    if (!(a < 65520.0f)) return (uint16_t)(sign | (a != a ? 0x7e00 : 0x7c00));
    if (a < 6.103515625e-05f) return (uint16_t)(sign | (uint16_t)std::nearbyint(a * 16777216.0f));
    memcpy(&u, &a, 4);
    u += 0xfff + ((u >> 13) & 1);
    return (uint16_t)(sign | ((u - (112u << 23)) >> 13));
}

struct Group { // where the 32 columns of one row lie
    uint8_t *codes;
    uint16_t *scales;
    int kind, is_by_input, shift; // shift: of a code by input in its byte
    enum { LINE = 64 };

    Group(const Weight &w, int row, int g) : kind(w.kind), is_by_input(w.is_by_input), shift(0) {
        const int panel = row / PANEL, lane = row % PANEL;
        const size_t groups = (size_t)w.padded / GROUP, place = (size_t)panel * groups + (size_t)g;
        codes = (uint8_t *)const_cast<void *>(w.codes);
        if (is_by_input) {
            shift = kind == W_U4 ? panel / 4 % 2 * 4 : 0;
            codes += ((size_t)panel / (kind == W_U4 ? 8 : 4) * (size_t)w.padded + (size_t)g * GROUP) * LINE;
            codes += lane / 4 * 16 + panel % 4 * 4 + lane % 4;
        } else
            codes += place * (kind == W_U4 ? 256 : 512) + (size_t)lane * 4;
        scales = const_cast<uint16_t *>(w.scales) + place * (kind == W_U4 ? 32 : 16) + lane;
    }
    uint8_t get(int i) const {
        if (is_by_input) return kind == W_S8 ? codes[i * LINE] : codes[i * LINE] >> shift & 15;
        if (kind == W_S8) return codes[i / 4 * 64 + i % 4];
        const uint8_t both = codes[i / 8 * 64 + i % 4];
        return i / 4 % 2 ? both >> 4 : both & 15;
    }
    void put(const uint8_t *values) {
        if (is_by_input)
            for (int i = 0; i < 32; i++) {
                uint8_t &to = codes[i * LINE];
                to = kind == W_S8 ? values[i] : (uint8_t)((to & (240 >> shift)) | values[i] << shift);
            }
        else if (kind == W_S8)
            for (int i = 0; i < 32; i++) codes[i / 4 * 64 + i % 4] = values[i];
        else
            for (int j = 0; j < 4; j++)
                for (int c = 0; c < 4; c++)
                    codes[j * 64 + c] = (uint8_t)(values[j * 8 + c] | values[j * 8 + 4 + c] << 4);
    }
};

// As instructions, where the library's functions are calls; a number that is none never wins.
float larger(float x, float than) { return x > than ? x : than; }
float smaller(float x, float than) { return x < than ? x : than; }
float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; } // of at most 2^22: ties to even, 1.5 * 2^23 has no half

void quantise8(const float *x, int count, Group g) {
    float largest = 0;
    for (int i = 0; i < count; i++) largest = larger(std::fabs(x[i]), largest);
    const uint16_t half = to_half(largest / 127);
    const float scale = half_to_float(half), inverse = scale > 0 ? 1 / scale : 0;
    uint8_t codes[32];
    for (int i = 0; i < 32; i++) {
        const float code = i < count ? smaller(x[i] * inverse, 127.0f) : 0;
        codes[i] = (uint8_t)(int8_t)nearest(larger(code, -127.0f));
    }
    g.put(codes);
    *g.scales = half;
}

// Least squares: codes by the range, then scale and minimum by the codes, for a few ranges; the best is kept.
void quantise4(const float *from, int count, Group g) {
    float x[32] = {};
    memcpy(x, from, sizeof(float) * (size_t)count);
    float low = x[0], high = x[0];
    for (int i = 1; i < count; i++) low = smaller(x[i], low), high = larger(x[i], high);
    float best = INFINITY;
    uint8_t codes[32], best_codes[32] = {};
    uint16_t best_scale = 0, best_least = to_half(low);
    for (int attempt = 0; attempt < 8; attempt++) {
        const float shrink = 0.04f * (float)(attempt / 2) * (high - low);
        float least = low + shrink * 0.5f, scale = (high - low - shrink) / 15;
        if (attempt % 2) { // the fit to the codes of the attempt before
            float s = 0, ss = 0, y = 0, sy = 0;
            for (int i = 0; i < count; i++) {
                const float c = codes[i];
                s += c, ss += c * c, y += x[i], sy += c * x[i];
            }
            const float spread = (float)count * ss - s * s;
            if (spread <= 0) continue;
            scale = ((float)count * sy - s * y) / spread;
            least = (y - scale * s) / (float)count;
        }
        const uint16_t half = to_half(scale), half_least = to_half(least);
        const float d = half_to_float(half), m = half_to_float(half_least), inverse = d > 0 ? 1 / d : 0;
        float squares[32], error = 0; // summed in their order, apart from what can be done many at a time
        for (int i = 0; i < 32; i++) {
            const float c = nearest(larger(smaller((x[i] - m) * inverse, 15.0f), 0.0f)), off = d * c + m - x[i];
            codes[i] = (uint8_t)c;
            squares[i] = off * off;
        }
        for (int i = 0; i < count; i++) error += squares[i];
        if (error < best) {
            best = error, best_scale = half, best_least = half_least;
            memcpy(best_codes, codes, 32);
        }
    }
    for (int i = count; i < 32; i++) best_codes[i] = 0;
    g.put(best_codes);
    g.scales[0] = best_scale;
    g.scales[16] = best_least;
}

uint16_t half_at(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

void nibbles(const uint8_t *p, uint8_t *codes) { // value i low, value 16 + i high
    for (int i = 0; i < 16; i++) codes[i] = p[i] & 15, codes[16 + i] = p[i] >> 4;
}

// Scale and minimum of the eight groups of a Q4_K block: six bits each, in twelve bytes.
void k_scales(const uint8_t *q, int j, int &scale, int &least) {
    if (j < 4)
        scale = q[j] & 63, least = q[j + 4] & 63;
    else
        scale = (q[j + 4] & 15) | (q[j - 4] >> 6 << 4), least = (q[j + 4] >> 4) | (q[j] >> 6 << 4);
}

} // namespace

void unpack_row(const Weight &w, int row, float *out) {
    const size_t lane = (size_t)row % PANEL, panel = (size_t)row / PANEL * (size_t)w.padded * PANEL;
    for (int k = 0; k < w.cols; k++) {
        if (w.kind == W_F32)
            out[k] = ((const float *)w.codes)[panel + (size_t)k * PANEL + lane];
        else if (w.kind == W_BF16) {
            const uint32_t u = (uint32_t)((const uint16_t *)w.codes)[panel + (size_t)(k / 2) * 32 + lane * 2 + (size_t)k % 2]
                               << 16;
            memcpy(out + k, &u, 4);
        } else {
            const Group g(w, row, k / GROUP);
            const uint8_t code = g.get(k % GROUP);
            const float scale = half_to_float(g.scales[0]);
            out[k] = w.kind == W_S8 ? scale * (int8_t)code : scale * code + half_to_float(g.scales[16]);
        }
    }
}

extern "C" {

// ``count`` rows of float32 become the weight's rows from ``first`` on.
void native_pack(const Weight *weight, const float *x, int first, int count) {
    const Weight &w = *weight;
    for (int r = 0; r < count; r++, x += w.cols) {
        const int row = first + r;
        const size_t lane = (size_t)row % PANEL, panel = (size_t)row / PANEL * (size_t)w.padded * PANEL;
        if (w.kind == W_F32)
            for (int k = 0; k < w.cols; k++) ((float *)w.codes)[panel + (size_t)k * PANEL + lane] = x[k];
        else if (w.kind == W_BF16)
            for (int k = 0; k < w.cols; k++) {
                uint32_t u;
                memcpy(&u, x + k, 4);
                ((uint16_t *)w.codes)[panel + (size_t)(k / 2) * 32 + lane * 2 + (size_t)k % 2] =
                    (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
            }
        else
            for (int k = 0; k < w.cols; k += GROUP) {
                const int left = w.cols - k < GROUP ? w.cols - k : (int)GROUP;
                w.kind == W_S8 ? quantise8(x + k, left, Group(w, row, k / GROUP))
                               : quantise4(x + k, left, Group(w, row, k / GROUP));
            }
    }
}

// The same from the stored blocks of a GGUF tensor, whose values stay as they are: Q4_0 (2), Q4_1 (3), Q8_0 (8);
// Q4_K (12) with its products of scales rounded to float16. False for another type.
int native_pack_gguf(const Weight *weight, int type, const uint8_t *p, int first, int count) {
    const Weight &w = *weight;
    uint8_t codes[32];
    for (int row = first; row < first + count; row++) {
        for (int g = 0; g * GROUP < w.cols; g++) {
            Group to(w, row, g);
            if (type == 8 && w.kind == W_S8) {
                for (int i = 0; i < 32; i++) codes[i] = p[2 + i];
                to.scales[0] = half_at(p);
                p += 34;
            } else if (type == 2 && w.kind == W_U4) {
                nibbles(p + 2, codes);
                to.scales[0] = half_at(p);
                to.scales[16] = to_half(-8 * half_to_float(half_at(p)));
                p += 18;
            } else if (type == 3 && w.kind == W_U4) {
                nibbles(p + 4, codes);
                to.scales[0] = half_at(p);
                to.scales[16] = half_at(p + 2);
                p += 20;
            } else if (type == 12 && w.kind == W_U4) {
                const int j = g % 8; // of the eight groups of a block of 256
                int scale, least;
                k_scales(p + 4, j, scale, least);
                const uint8_t *q = p + 16 + j / 2 * 32;
                for (int i = 0; i < 32; i++) codes[i] = j % 2 ? q[i] >> 4 : q[i] & 15;
                to.scales[0] = to_half(half_to_float(half_at(p)) * (float)scale);
                to.scales[16] = to_half(-half_to_float(half_at(p + 2)) * (float)least);
                if (j == 7) p += 144;
            } else
                return 0;
            to.put(codes);
        }
    }
    return 1;
}

} // extern "C"

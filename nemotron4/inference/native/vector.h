// Sixteen floats or integers at a time, the same bits under every instruction set: one operation per element,
// sums of sixteen in one fixed order.
#pragma once
#include "native.h"
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline))

INLINE V load(const float *p) {
    V v;
    memcpy(&v, p, 64);
    return v;
}
INLINE void store(float *p, V v) { memcpy(p, &v, 64); }
INLINE V all(float x) { return V{} + x; }
INLINE I alli(int32_t x) { return I{} + x; }
INLINE V load_part(const float *p, int count) { // zeros behind
    if (count >= 16) return load(p);
    V v = {};
    memcpy(&v, p, 4 * (size_t)count);
    return v;
}
INLINE void store_part(float *p, V v, int count) {
    if (count >= 16) return store(p, v); // one instruction, where a copy of unknown size takes a loop
    memcpy(p, &v, 4 * (size_t)count);
}

#if defined(__AVX512F__)
INLINE V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE V fma(float a, V b, V c) { return (V)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)c); }
INLINE V maximum(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE V minimum(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE V to_float(I x) { return (V)_mm512_cvtepi32_ps((__m512i)x); }
INLINE I to_int(V x) { return (I)_mm512_cvtps_epi32((__m512)x); } // to the nearest, ties to even
INLINE V absolute(V x) { return (V)_mm512_abs_ps((__m512)x); }
INLINE V load_halves(const uint16_t *p) { return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE I load_bytes(const int8_t *p) { return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
#else
#if defined(__AVX2__)
struct Halves {
    __m256 low, high;
};
INLINE Halves split(V v) {
    Halves h;
    memcpy(&h, &v, 64);
    return h;
}
INLINE V join(__m256 low, __m256 high) {
    V v;
    memcpy(&v, &low, 32);
    memcpy((char *)&v + 32, &high, 32);
    return v;
}
INLINE V fma(V a, V b, V c) {
    Halves x = split(a), y = split(b), z = split(c);
    return join(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high));
}
INLINE I to_int(V x) {
    Halves h = split(x);
    return (I)join((__m256)_mm256_cvtps_epi32(h.low), (__m256)_mm256_cvtps_epi32(h.high));
}
INLINE V load_halves(const uint16_t *p) {
    return join(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1)));
}
INLINE I load_bytes(const int8_t *p) {
    return (I)join((__m256)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                   (__m256)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))));
}
#else
INLINE V fma(V a, V b, V c) {
    V out;
    for (int i = 0; i < 16; i++) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
}
INLINE I to_int(V x) {
    I out;
    for (int i = 0; i < 16; i++) out[i] = (int32_t)__builtin_rintf(x[i]);
    return out;
}
INLINE V load_halves(const uint16_t *p) {
    V out;
    for (int i = 0; i < 16; i++) out[i] = half_to_float(p[i]);
    return out;
}
INLINE I load_bytes(const int8_t *p) {
    I out;
    for (int i = 0; i < 16; i++) out[i] = p[i];
    return out;
}
#endif
INLINE V fma(float a, V b, V c) { return fma(all(a), b, c); }
INLINE V maximum(V a, V b) { return a > b ? a : b; }
INLINE V minimum(V a, V b) { return a < b ? a : b; }
INLINE V to_float(I x) { return __builtin_convertvector(x, V); }
INLINE V absolute(V x) { return (V)((I)x & 0x7fffffff); }
#endif

INLINE V lower(I pairs) { return (V)(pairs << 16); } // the first and the second of two bfloat16 in each lane
INLINE V upper(I pairs) { return (V)(pairs & (int32_t)0xffff0000); }
INLINE I pairs_of(V first, V second) { // of numbers that bfloat16 holds
    typedef uint32_t U __attribute__((vector_size(64)));
    return (I)((U)first >> 16) | (I)upper((I)second);
}
INLINE V rounded_bf16(V x) { // to the nearest, ties to even
    const I u = (I)x;
    return upper(u + 0x7fff + ((u >> 16) & 1));
}
INLINE void store_bf16(uint16_t *p, V rounded) {
    typedef uint16_t H __attribute__((vector_size(32)));
    typedef uint32_t U __attribute__((vector_size(64)));
    const H h = __builtin_convertvector((U)rounded >> 16, H);
    memcpy(p, &h, 32);
}

INLINE void prefetch(const void *p) { __builtin_prefetch(p); }

struct FlushSubnormals { // as AMX's tiles do; until the end of the scope
#if defined(__AVX2__)
    const unsigned before = _mm_getcsr();
    FlushSubnormals() { _mm_setcsr(before | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(before); }
#endif
};

// Of sixteen: eight and eight, then four and four, and so on.
#if defined(__AVX512F__)
INLINE __m128 quarter(__m512 v, bool adds) {
    const __m256 low = _mm512_castps512_ps256(v), high = _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1));
    const __m256 h = adds ? _mm256_add_ps(low, high) : _mm256_max_ps(low, high);
    const __m128 a = _mm256_castps256_ps128(h), b = _mm256_extractf128_ps(h, 1);
    return adds ? _mm_add_ps(a, b) : _mm_max_ps(a, b);
}
INLINE float sum16(V v) {
    __m128 q = quarter((__m512)v, true);
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
INLINE float max16(V v) {
    __m128 q = quarter((__m512)v, false);
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
INLINE int32_t sum16(I v) { return _mm512_reduce_add_epi32((__m512i)v); }
#else
template <class T, class Vector, class Join> INLINE T joined(Vector v, Join join) {
    T a[16];
    memcpy(a, &v, 64);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) a[i] = join(a[i], a[i + width]);
    return a[0];
}
INLINE float sum16(V v) {
    return joined<float>(v, [](float x, float y) { return x + y; });
}
INLINE float max16(V v) {
    return joined<float>(v, [](float x, float y) { return x > y ? x : y; });
}
INLINE int32_t sum16(I v) {
    return joined<int32_t>(v, [](int32_t x, int32_t y) { return x + y; });
}
#endif

// e^x to 2 units in the last place; 0 below -87. Cody-Waite reduction, polynomial of degree 6 (Taylor in the
// reduced range of +-0.35).
INLINE V exponential(V x) {
    V clipped = maximum(minimum(x, all(88.0f)), all(-87.33f));
    const I whole = to_int(clipped * 1.44269504088896341f);
    V n = to_float(whole);
    V r = fma(n, all(-0.693359375f), clipped);
    r = fma(n, all(2.12194440e-4f), r);
    V p = all(1.0f / 720);
    p = fma(p, r, all(1.0f / 120));
    p = fma(p, r, all(1.0f / 24));
    p = fma(p, r, all(1.0f / 6));
    p = fma(p, r, all(0.5f));
    p = fma(p, r, all(1.0f));
    p = fma(p, r, all(1.0f));
    V power = (V)((whole + 127) << 23);
    V out = p * power;
    return (V)((I)out & (x >= -87.33f));
}

// Attention of a few queries over the blocks of the cache, softmax on the way. Part of kernels.cpp.
//
// A query does the same operations whatever is computed next to it. With keys and values in bfloat16 the queries
// and the weights of the softmax are rounded to it too, so that AMX's tiles can multiply them; the others add in
// the same order: of 32 columns the even ones and the odd ones, then both. ``bf16`` adds as its instruction does.

enum { MOST_DIM = 512 };
template <int N> using Few = std::integral_constant<int, N>;

// The scores of one query in one block become weights; returns by what the sums so far shrink.
INLINE V soften(V &a, V &b, int seen, float scale, float &largest) {
    const I lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    a *= all(scale), b *= all(scale);
    if (seen < BLOCK) { // of this block's positions
        a = lanes < seen ? a : all(-__builtin_inff());
        b = lanes + 16 < seen ? b : all(-__builtin_inff());
    }
    float now = max16(maximum(a, b));
    now = now > largest ? now : largest;
    const V shrink = now == largest ? all(1.0f) : exponential(all(largest - now)); // mostly it is
    largest = now;
    a = exponential(a - all(now));
    b = exponential(b - all(now));
    return shrink;
}

// The head of one query in the order of ``out``, and its position.
struct Query {
    const float *q;
    float *out;
    int position;
};

INLINE Query query_of(const AttendTask &t, const AttendMember &m, int i, float *out) {
    const int row = i / t.heads_per_kv, head = i % t.heads_per_kv;
    return {m.q + row * t.q_stride + head * t.head_dim, out + (size_t)i * t.head_dim, m.first_position + row};
}

INLINE void begin_sums(float &largest, V &weight, float *sums, int wide) {
    largest = -__builtin_inff();
    weight = V{};
    memset(sums, 0, sizeof(float) * (size_t)wide);
}

INLINE void finish_query(const float *sums, V weight, int dim, float *out) {
    const V inverse = all(1.0f / sum16(weight));
    for (int e = 0; e < dim; e += 16) store_part(out + e, load(sums + e) * inverse, dim - e);
}

// All queries of a task, at most MOST at a time, by ``some(their number, member, first query, out)``.
template <int MOST, class Some> INLINE void by_queries(const AttendTask &t, float *out, Some some) {
    for (int n = 0; n < t.num_members; n++) {
        const AttendMember &m = t.members[n];
        const int total = m.num_rows * t.heads_per_kv;
        int i = 0;
        for (; MOST > 4 && i + MOST <= total; i += MOST) some(Few<MOST>{}, m, i, out);
        for (; i + 4 <= total; i += 4) some(Few<4>{}, m, i, out);
        if (total - i == 3) some(Few<3>{}, m, i, out);
        if (total - i == 2) some(Few<2>{}, m, i, out);
        if (total - i == 1) some(Few<1>{}, m, i, out);
        out += (size_t)total * t.head_dim;
    }
}

template <int QB> void attend_float(const AttendTask &t, const AttendMember &m, int first, float *out) {
    const int dim = t.head_dim, wide = (dim + 15) / 16 * 16;
    alignas(64) float sums[QB][MOST_DIM];
    Query q[QB];
    float largest[QB];
    V weight[QB], shrink[QB];
    for (int j = 0; j < QB; j++) {
        q[j] = query_of(t, m, first + j, out);
        begin_sums(largest[j], weight[j], sums[j], wide);
    }
    const int last = q[QB - 1].position;
    for (int start = 0; start <= last; start += BLOCK) {
        const float *keys = (const float *)(t.keys + m.blocks[start / BLOCK] * t.key_block);
        const float *values = (const float *)(t.values + m.blocks[start / BLOCK] * t.value_block);
        V s0[QB] = {}, s1[QB] = {};
        for (int e = 0; e < dim; e++) {
            const V k0 = load(keys + e * BLOCK), k1 = load(keys + e * BLOCK + 16);
            for (int j = 0; j < QB; j++) {
                s0[j] = fma(q[j].q[e], k0, s0[j]);
                s1[j] = fma(q[j].q[e], k1, s1[j]);
            }
        }
        alignas(64) float p[QB][BLOCK];
        for (int j = 0; j < QB; j++) {
            shrink[j] = soften(s0[j], s1[j], q[j].position + 1 - start, t.scale, largest[j]);
            weight[j] = fma(weight[j], shrink[j], s0[j] + s1[j]);
            store(p[j], s0[j]);
            store(p[j] + 16, s1[j]);
        }
        const int num_seen = last + 1 - start < BLOCK ? last + 1 - start : BLOCK;
        for (int e = 0; e < wide; e += 16) {
            V sum[QB];
            for (int j = 0; j < QB; j++) sum[j] = load(sums[j] + e) * shrink[j];
            for (int i = 0; i < num_seen; i++) {
                const V v = load(values + i * wide + e);
                for (int j = 0; j < QB; j++) sum[j] = fma(p[j][i], v, sum[j]);
            }
            for (int j = 0; j < QB; j++) store(sums[j] + e, sum[j]);
        }
    }
    for (int j = 0; j < QB; j++) finish_query(sums[j], weight[j], dim, q[j].out);
}

// The values of a block that is not full, with zeros behind: what lies there is of nobody or of others.
INLINE const uint16_t *seen_values(const uint16_t *values, int num_seen, int wide, uint16_t *copy) {
    if (num_seen >= BLOCK) return values;
    memset(copy, 0, (size_t)(BLOCK * wide) * 2);
    memcpy(copy, values, (size_t)(num_seen / 2 * wide) * 4);
    if (num_seen % 2)
        for (int i = num_seen / 2 * wide, end = i + wide; i < end; i++) copy[2 * i] = values[2 * i];
    return copy;
}

// The block of positions from ``start`` on, and the one behind it: no two of a head are neighbours in memory. That
// one is fetched a few lines at a time between the products, because a core waits for sixteen lines at most.
struct Block {
    const char *keys, *values, *next_keys, *next_values;
};

INLINE Block block_of(const AttendTask &t, const int32_t *blocks, int start, int end) {
    const int32_t now = blocks[start / BLOCK], next = blocks[start / BLOCK + (start + BLOCK < end)];
    return {t.keys + now * t.key_block, t.values + now * t.value_block, t.keys + next * t.key_block,
            t.values + next * t.value_block};
}

INLINE void prefetch_columns(const char *block, int first, int count) { // of all positions
    for (int i = first * BLOCK * 2; i < (first + count) * BLOCK * 2; i += 64) prefetch(block + i);
}

// What meets keys or values: bfloat16 where an instruction multiplies pairs of it.
#if defined(HAS_AMX) || defined(HAS_DOTS)
typedef uint16_t Entry;
INLINE void put(Entry *to, V rounded) { store_bf16(to, rounded); }
#else
typedef float Entry;
INLINE void put(Entry *to, V rounded) { store(to, rounded); }
#endif

// ``a`` and ``b`` rounded to bfloat16, and so into 32 neighbouring places.
INLINE void put_rounded(V &a, V &b, Entry *to) {
    a = rounded_bf16(a), b = rounded_bf16(b);
    put(to, a);
    put(to + 16, b);
}

#if defined(HAS_AMX)

struct Running { // queries on their way through the blocks
    Query q[TILE];
    float largest[TILE];
    V weight[TILE];
    alignas(64) uint16_t rows[TILE * MOST_DIM];
    alignas(64) float sums[TILE * MOST_DIM];
};

void begin(Running &s, int j, const AttendTask &t, Query q) {
    const int dim = t.head_dim, padded = (dim + 31) / 32 * 32, wide = (dim + 15) / 16 * 16;
    for (int e = 0; e < padded; e += 16)
        store_bf16(s.rows + j * padded + e, rounded_bf16(e < dim ? load_part(q.q + e, dim - e) : V{}));
    s.q[j] = q;
    begin_sums(s.largest[j], s.weight[j], s.sums + j * wide, wide);
}

// The positions ``start`` to ``end`` for the queries ``first`` to ``first + count``, for as many as the tiles are
// configured. Tiles 0 to 3 are sums, 4 what is left of a product, 5 to 7 keys or values.
void attend_tiles(Running &run, int first, int count, const AttendTask &t, const int32_t *blocks, int start, int end) {
    const int dim = t.head_dim, padded = (dim + 31) / 32 * 32, wide = (dim + 15) / 16 * 16;
    alignas(64) uint16_t p[TILE][BLOCK], copy[BLOCK * MOST_DIM];
    alignas(64) float part[TILE * MOST_DIM], s[TILE][BLOCK];
    const uint16_t *rows = run.rows + first * padded;
    float *sums = run.sums + first * wide;
    V shrink[TILE];
    for (; start < end; start += BLOCK) {
        const Block block = block_of(t, blocks, start, end);
        const uint16_t *keys = (const uint16_t *)block.keys;
        _tile_zero(0);
        _tile_zero(1);
        for (int e = 0; e < padded; e += 32) {
            _tile_loadd(4, rows + e, padded * 2);
            _tile_loadd(5, keys + e * BLOCK, BLOCK * 4);
            prefetch_columns(block.next_keys, e, 16);
            _tile_loadd(6, keys + e * BLOCK + 32, BLOCK * 4);
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
            prefetch_columns(block.next_keys, e + 16, 16);
        }
        _tile_stored(0, s[0], BLOCK * 4);
        _tile_stored(1, s[0] + 16, BLOCK * 4);
        const uint16_t *values = seen_values((const uint16_t *)block.values, end - start, wide, copy);
        for (int j = 0; j < count; j++) {
            V a = load(s[j]), b = load(s[j] + 16);
            shrink[j] = soften(a, b, run.q[first + j].position + 1 - start, t.scale, run.largest[first + j]);
            put_rounded(a, b, p[j]);
            run.weight[first + j] = fma(run.weight[first + j], shrink[j], a + b);
        }
        _tile_loadd(4, p, 64);
        for (int e = 0; e < wide; e += 64) {
#define COLUMNS_IN_TILES(C, B, at)                                                                                     \
    if (e + at < wide) {                                                                                               \
        _tile_zero(C);                                                                                                 \
        _tile_loadd(B, values + 2 * (e + at), wide * 4);                                                               \
        _tile_dpbf16ps(C, 4, B);                                                                                       \
        prefetch_columns(block.next_values, e + at, 16);                                                        \
        _tile_stored(C, part + e + at, wide * 4);                                                                      \
    }
            COLUMNS_IN_TILES(0, 5, 0)
            COLUMNS_IN_TILES(1, 6, 16)
            COLUMNS_IN_TILES(2, 7, 32)
            COLUMNS_IN_TILES(3, 5, 48)
        }
        for (int j = 0; j < count; j++)
            for (int e = j * wide; e < (j + 1) * wide; e += 16)
                store(sums + e, fma(load(sums + e), shrink[j], load(part + e)));
    }
}

void attend_pairs(const AttendTask &t, float *out) {
    [[maybe_unused]] const FlushSubnormals flush;
    const int heads = t.heads_per_kv, wide = (t.head_dim + 15) / 16 * 16;
    Running run;
    int now = 0;
    auto set_rows = [&](int count) {
        if (count != now) configure(float_tiles(now = count));
    };
    auto finish = [&](int count) {
        for (int j = 0; j < count; j++) finish_query(run.sums + j * wide, run.weight[j], t.head_dim, run.q[j].out);
    };
    if (t.num_members > 1) {
        const int all_queries = t.num_members * heads;
        for (int j = 0; j < all_queries; j++)
            begin(run, j, t, query_of(t, t.members[j / heads], j % heads, out + (size_t)(j / heads * heads) * t.head_dim));
        set_rows(all_queries);
        attend_tiles(run, 0, all_queries, t, t.members[0].blocks, 0, t.num_shared * BLOCK);
        set_rows(heads);
        for (int i = 0; i < t.num_members; i++) {
            const AttendMember &m = t.members[i];
            attend_tiles(run, i * heads, heads, t, m.blocks, t.num_shared * BLOCK, m.first_position + 1);
        }
        finish(all_queries);
    } else {
        const AttendMember &m = t.members[0];
        const int total = m.num_rows * heads;
        for (int i = 0, count; i < total; i += count) {
            count = total - i < TILE ? total - i : TILE;
            for (int j = 0; j < count; j++) begin(run, j, t, query_of(t, m, i + j, out));
            set_rows(count);
            attend_tiles(run, 0, count, t, m.blocks, 0, run.q[count - 1].position + 1);
            finish(count);
        }
    }
    _tile_release();
}

#else

#if defined(HAS_DOTS)
enum { MOST_QUERIES = 12 }; // at once, as the registers hold them
#elif defined(__AVX512F__)
enum { MOST_QUERIES = 8 };
#else
enum { MOST_QUERIES = 4 };
#endif

// To each query's sum: 32 numbers ``x`` times sixteen pairs of bfloat16 in sixteen lanes.
template <int QB>
INLINE void sixteen_pairs(const Entry *x, int x_stride, const uint16_t *pairs, int stride, V (&sum)[QB]) {
#if defined(HAS_DOTS)
    for (int i = 0; i < 16; i++) {
        const V pair = (V)load_codes((const uint8_t *)(pairs + i * stride));
        for (int j = 0; j < QB; j++) sum[j] = Pairs::add(x + j * x_stride + 2 * i, pair, sum[j]);
    }
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i mask = _mm256_set1_epi32((int)0xffff0000);
    for (int half = 0; half < 2; half++) { // one after the other: the sums of both do not fit into the registers
        __m256 even[QB], odd[QB];
        for (int j = 0; j < QB; j++) even[j] = odd[j] = _mm256_setzero_ps();
        for (int i = 0; i < 16; i++) {
            const __m256i pair = _mm256_loadu_si256((const __m256i *)(pairs + i * stride + half * 16));
            const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
            const __m256 high = _mm256_castsi256_ps(_mm256_and_si256(pair, mask));
            for (int j = 0; j < QB; j++) {
                even[j] = _mm256_fmadd_ps(_mm256_set1_ps(x[j * x_stride + 2 * i]), low, even[j]);
                odd[j] = _mm256_fmadd_ps(_mm256_set1_ps(x[j * x_stride + 2 * i + 1]), high, odd[j]);
            }
        }
        for (int j = 0; j < QB; j++) {
            __m256 total;
            memcpy(&total, (char *)&sum[j] + half * 32, 32);
            total = _mm256_add_ps(total, _mm256_add_ps(even[j], odd[j]));
            memcpy((char *)&sum[j] + half * 32, &total, 32);
        }
    }
#else
    V even[QB] = {}, odd[QB] = {};
    for (int i = 0; i < 16; i++) {
        const I pair = load_codes((const uint8_t *)(pairs + i * stride));
        for (int j = 0; j < QB; j++) {
            even[j] = fma(x[j * x_stride + 2 * i], lower(pair), even[j]);
            odd[j] = fma(x[j * x_stride + 2 * i + 1], upper(pair), odd[j]);
        }
    }
    for (int j = 0; j < QB; j++) sum[j] += even[j] + odd[j];
#endif
}

template <int QB> void attend_pairs(const AttendTask &t, const AttendMember &m, int first, float *out) {
    const int dim = t.head_dim, padded = (dim + 31) / 32 * 32, wide = (dim + 15) / 16 * 16;
    alignas(64) float sums[QB][MOST_DIM];
    alignas(64) Entry rows[QB][MOST_DIM], p[QB][BLOCK];
    alignas(64) uint16_t copy[BLOCK * MOST_DIM];
    Query q[QB];
    float largest[QB];
    V weight[QB], shrink[QB];
    for (int j = 0; j < QB; j++) {
        q[j] = query_of(t, m, first + j, out);
        for (int e = 0; e < padded; e += 16)
            put(rows[j] + e, rounded_bf16(e < dim ? load_part(q[j].q + e, dim - e) : V{}));
        begin_sums(largest[j], weight[j], sums[j], wide);
    }
    const int last = q[QB - 1].position;
    for (int start = 0; start <= last; start += BLOCK) {
        const Block block = block_of(t, m.blocks, start, last + 1);
        const uint16_t *keys = (const uint16_t *)block.keys;
        V s[2][QB] = {};
        for (int half = 0; half < 2; half++)
            for (int e = 0; e < padded; e += 32) {
                prefetch_columns(block.next_keys, e + half * 16, 16);
                sixteen_pairs<QB>(&rows[0][e], MOST_DIM, keys + e * BLOCK + half * 32, BLOCK * 2, s[half]);
            }
        for (int j = 0; j < QB; j++) {
            V a = s[0][j], b = s[1][j];
            shrink[j] = soften(a, b, q[j].position + 1 - start, t.scale, largest[j]);
            put_rounded(a, b, p[j]);
            weight[j] = fma(weight[j], shrink[j], a + b);
        }
        const uint16_t *values = seen_values((const uint16_t *)block.values, last + 1 - start, wide, copy);
        for (int e = 0; e < wide; e += 16) {
            V sum[QB] = {};
            prefetch_columns(block.next_values, e, 16);
            sixteen_pairs<QB>(p[0], BLOCK, values + 2 * e, wide * 2, sum);
            for (int j = 0; j < QB; j++) store(sums[j] + e, fma(load(sums[j] + e), shrink[j], sum[j]));
        }
    }
    for (int j = 0; j < QB; j++) finish_query(sums[j], weight[j], dim, q[j].out);
}

void attend_pairs(const AttendTask &t, float *out) {
    [[maybe_unused]] const FlushSubnormals flush;
    by_queries<MOST_QUERIES>(t, out, [&](auto few, const AttendMember &m, int i, float *to) { attend_pairs<few>(t, m, i, to); });
}

#endif

#include "attention_codes.h"

void attend(const AttendTask &t, float *out) {
    if (t.kind == W_S8)
        by_queries<4>(t, out, [&](auto few, const AttendMember &m, int i, float *to) { attend_codes<few>(t, m, i, to); });
    else if (t.kind == W_BF16)
        attend_pairs(t, out);
    else
        by_queries<6>(t, out, [&](auto few, const AttendMember &m, int i, float *to) { attend_float<few>(t, m, i, to); });
}

// One step of a model: rows of any number of sequences in, logits out.
#include "pool.h"
#include "pack.h"
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>

namespace {

constexpr int MOST_PANELS = 8; // of one tile of a product
constexpr int LEAST_SHARED = 2; // blocks for which rows attend together

struct Span { // a range of memory that is never shared with another
    std::vector<char> bytes;
    template <class T> T *get(size_t count) {
        if (bytes.size() < count * sizeof(T) + 64) bytes.resize(count * sizeof(T) + 64);
        return (T *)(((uintptr_t)bytes.data() + 63) & ~(uintptr_t)63);
    }
};

int rounded(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }

struct Entered { // rows as the input of a product
    int8_t *codes, *low; // low: of wide rows
    uint16_t *bf16;
    float *scales, *scaled_sums;
    int32_t *sums;
    Used *used; // of at most LISTED rows
};

struct Buffers { // of one step, by rows
    float *x, *wide, *small, *values;
    Entered in, next; // next: of the product that follows, written while this one is computed
};

struct Attending { // neighbouring rows of a sequence
    int32_t sequence, row, num_rows;
};

struct AttendTile { // several with one row each, whose sequences begin with the same blocks, or one
    int32_t first, count, num_shared;
    int64_t cost;
};

struct AdaptTile { // rows with one adapter
    const LayerAdapter *layers;
    int32_t first, count; // of ``adapted``
};

struct Plan { // what the jobs of one step read, by the slot of its program
    std::vector<int32_t> adapted; // rows, those of one adapter together
    std::vector<AdaptTile> adapting;
    std::vector<Attending> attending;
    std::vector<AttendTile> tiles;
    std::vector<int32_t> positions, row_blocks, first_blocks, blocks;
};

} // namespace

struct Engine {
    Model model;
    const Kernels *kernels;
    std::unique_ptr<Pool> pool;
    Span spans[18];
    int capacity = 0;
    Buffers b;
    Plan plans[Pool::SLOTS];

    std::vector<float> cosine, sine; // [positions so far][rotary_dim / 2]; only commits read them

    void turn_to(int position) {
        for (int p = (int)cosine.size() / std::max(1, model.rotary_dim / 2); p <= position; p++)
            for (int i = 0; i < model.rotary_dim / 2; i++) {
                const float angle = (float)p * model.inverse_frequency[i];
                cosine.push_back(std::cos(angle) * model.rotary_factor);
                sine.push_back(std::sin(angle) * model.rotary_factor);
            }
    }

    int padded(int size) const { return rounded(size, GROUP); }
    int widest() const {
        const Model &m = model;
        int qkv = (m.heads + 2 * m.kv_heads) * m.head_dim;
        return padded(std::max({m.hidden, m.ffn, m.heads * m.head_dim, qkv}));
    }

    void reserve(int rows) {
        if (rows <= capacity) return;
        pool->wait_for_stragglers();
        capacity = rows = std::max(32, rounded(rows, 32));
        const size_t n = (size_t)rows, w = (size_t)widest();
        const size_t qkv = (size_t)(model.heads + 2 * model.kv_heads) * model.head_dim;
        const size_t up = (size_t)model.ffn * (model.is_gated ? 2 : 1);
        b.x = spans[0].get<float>(n * model.hidden);
        b.wide = spans[1].get<float>(n * std::max(qkv, up));
        b.small = spans[2].get<float>(n * w);
        for (Entered *in : {&b.in, &b.next}) {
            Span *own = spans + (in == &b.in ? 4 : 11);
            in->codes = own[0].get<int8_t>(n * w);
            in->low = own[1].get<int8_t>(n * w);
            in->bf16 = own[2].get<uint16_t>(n * w);
            in->scales = own[3].get<float>(n * w / GROUP);
            in->sums = own[4].get<int32_t>(n * w / GROUP);
            in->scaled_sums = own[5].get<float>(n * w / GROUP);
            in->used = own[6].get<Used>(w / GROUP);
        }
        b.values = spans[3].get<float>(n * w);
    }
};

namespace {

// Columns ``first`` and on of one row, ``size`` of them and zeros to ``end``; ``first`` begins a group.
void convert(const Kernels *kernels, const Entered &to, int kind, int is_wide, int padded, int row, int first,
             const float *x, int size, int end) {
    if (kind == W_BF16) return kernels->to_bf16(x, size, end, to.bf16 + (int64_t)row * padded + first);
    const int64_t place = (int64_t)(row / 16) * 16 * padded + first * 16 + row % 16 * 32;
    const int64_t at = (int64_t)(row / 16) * (padded / GROUP) * 16 + first / GROUP * 16 + row % 16;
    kernels->quantise(x, size, end, to.codes + place, is_wide ? to.low + place : nullptr, to.scales + at, to.sums + at,
                      to.scaled_sums + at);
}

// Which columns of rows are used, from a group's first column on; for a weight by input.
void list_used(const Kernels *kernels, const Entered &of, int is_wide, int num_rows, int first, int end) {
    kernels->list(of.codes + first * 16, is_wide ? of.low + first * 16 : nullptr, num_rows, (end - first) / GROUP,
                  of.used + first / GROUP);
}

struct Entering { // rows that become the input of a product
    const Kernels *kernels;
    Buffers b;
    const float *x; // [rows][stride]
    int64_t stride;
    const int32_t *chosen; // rows taken, or null
    const Norm *norm;      // or null
    int size, padded, kind, is_wide, is_by_input;
    float eps;
    int num_rows;
    const float *gate; // of a gated block: x is silu(gate) * x; or null

    static constexpr int ROWS = 4; // so a tile has all rows of a list
    static_assert(ROWS >= LISTED, "");
    void row(int r) const {
        const float *in = x + (int64_t)(chosen ? chosen[r] : r) * stride;
        float *out = b.values + (int64_t)r * padded;
        if (gate) {
            kernels->swiglu(gate + (int64_t)r * stride, in, size, out);
            in = out;
        }
        if (norm) {
            kernels->norm(in, *norm, size, eps, out);
            in = out;
        }
        if (kind != W_F32)
            convert(kernels, b.in, kind, is_wide, padded, r, 0, in, size, padded);
        else if (in != out)
            memcpy(out, in, sizeof(float) * (size_t)size);
    }
    void compute(int, float *) const {}
    void commit(int tile, const float *) const {
        for (int r = tile * ROWS; r < std::min(num_rows, (tile + 1) * ROWS); r++) row(r);
        if (is_by_input && num_rows <= LISTED) list_used(kernels, b.in, is_wide, num_rows, 0, padded);
    }
};

struct Product {
    const Kernels *kernels;
    const Weight *w;
    Rows rows;
    float *out;
    int64_t stride;
    Use use;
    int panels_per_tile, row_tiles, rows_per_tile;
    const Weight *next; // what the numbers meet next, as rows of ``into``; null: ``out`` takes them
    Entered into;

    void place(int tile, int &row, int &count, int &panel, int &num_panels) const {
        row = tile % row_tiles * rows_per_tile;
        count = std::min(rows.count - row, rows_per_tile);
        panel = tile / row_tiles * panels_per_tile;
        num_panels = std::min(w->panels - panel, panels_per_tile);
    }
    void compute(int tile, float *scratch) const {
        int row, count, panel, num_panels;
        place(tile, row, count, panel, num_panels);
        kernels->product(*w, rows, row, count, panel, num_panels, scratch);
    }
    void commit(int tile, const float *scratch) const {
        int row, count, panel, num_panels;
        place(tile, row, count, panel, num_panels);
        const int column = panel * PANEL, columns = std::min(w->rows - column, num_panels * PANEL);
        for (int r = 0; r < count; r++) {
            const float *from = scratch + (int64_t)r * num_panels * PANEL, *bias = w->bias ? w->bias + column : nullptr;
            float numbers[MOST_PANELS * PANEL];
            float *to = next ? numbers : out + (int64_t)(row + r) * stride + column;
            kernels->finish(from, columns, bias, use, to);
            if (next)
                convert(kernels, into, next->kind, next->is_wide, next->padded, row + r, column, numbers, columns,
                        rounded(columns, GROUP));
        }
        if (next && next->is_by_input && rows.count <= LISTED)
            list_used(kernels, into, next->is_wide, rows.count, column, column + rounded(columns, GROUP));
    }
};

struct CacheShape { // of one key/value head in one block
    int wide; // dimensions of a value
    int64_t element, scales, key_bytes, value_bytes; // scales: behind codes
    int64_t per_block; // of these in a block: of each layer, of each head

    explicit CacheShape(const Model &m)
        : wide(rounded(m.head_dim, 16)), element(m.cache_kind == W_S8 ? 1 : m.cache_kind == W_BF16 ? 2 : 4),
          scales(m.cache_kind == W_S8 ? BLOCK * 4 : 0),
          key_bytes((int64_t)(m.cache_kind == W_F32 ? m.head_dim : rounded(m.head_dim, 32)) * BLOCK * element + scales),
          value_bytes((int64_t)wide * BLOCK * element + scales), per_block((int64_t)m.num_layers * m.kv_heads) {}
};

struct Rotate { // queries and keys of neighbouring rows; keys and values into the cache
    const Model *m;
    float *qkv;
    int64_t qkv_size;
    const float *cosine, *sine;            // [position][half of the rotated dimensions]
    const int32_t *positions, *row_blocks; // block of each row
    char *keys, *values;                   // of this layer
    int num_rows;
    static constexpr int ROWS = 8;

    void compute(int, float *) const {}
    void commit(int tile, const float *) const {
        for (int r = tile * ROWS; r < std::min(num_rows, (tile + 1) * ROWS); r++) row(r);
    }
    void row(int r) const {
        const int half = m->rotary_dim / 2, dim = m->head_dim;
        float *q = qkv + r * qkv_size;
        const float *c = cosine + (int64_t)positions[r] * half, *s = sine + (int64_t)positions[r] * half;
        for (int head = 0; head < m->heads + m->kv_heads; head++) {
            float *h = q + head * dim;
            for (int i = 0; i < half; i++) {
                const float a = h[i], d = h[i + half];
                h[i] = a * c[i] - d * s[i];
                h[i + half] = d * c[i] + a * s[i];
            }
        }
        const CacheShape shape(*m);
        const int place = positions[r] % BLOCK;
        for (int kv = 0; kv < m->kv_heads; kv++) {
            const float *k = q + (m->heads + kv) * dim, *v = q + (m->heads + m->kv_heads + kv) * dim;
            const int64_t place_of_head = row_blocks[r] * shape.per_block + kv;
            char *ks = keys + place_of_head * shape.key_bytes, *vs = values + place_of_head * shape.value_bytes;
            const auto key_at = [&](int e) { return e / 2 * 2 * BLOCK + place * 2 + e % 2; };
            const auto value_at = [&](int e) { return place / 2 * 2 * shape.wide + place % 2 + 2 * e; };
            if (m->cache_kind == W_S8) {
                put_codes(k, dim, (int8_t *)ks, key_at, (float *)(ks + shape.key_bytes - shape.scales) + place);
                put_codes(v, dim, (int8_t *)vs, value_at, (float *)(vs + shape.value_bytes - shape.scales) + place);
            } else if (m->cache_kind == W_BF16) {
                for (int e = 0; e < dim; e++) ((uint16_t *)ks)[key_at(e)] = nearest(k[e]);
                for (int e = 0; e < dim; e++) ((uint16_t *)vs)[value_at(e)] = nearest(v[e]);
            } else {
                for (int e = 0; e < dim; e++) ((float *)ks)[e * BLOCK + place] = k[e];
                memcpy(vs + sizeof(float) * (size_t)(place * shape.wide), v, sizeof(float) * (size_t)dim);
            }
        }
    }
    static uint16_t nearest(float x) {
        uint32_t u;
        memcpy(&u, &x, 4);
        return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
    template <class At> static void put_codes(const float *x, int dim, int8_t *codes, At at, float *scale) {
        float largest = 0, spoiled = 0; // spoiled: no number where an element is none
        for (int e = 0; e < dim; e++) largest = std::max(largest, std::fabs(x[e])), spoiled += 0.0f * x[e];
        const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        for (int e = 0; e < dim; e++) codes[at(e)] = spoiled == 0 ? (int8_t)(int)std::nearbyint(x[e] * inverse) : 0;
        *scale = largest / 127.0f + spoiled;
    }
};

struct Attend {
    const Kernels *kernels;
    const Model *m;
    const Attending *attending;
    const AttendTile *tiles;
    const int32_t *positions, *first_blocks, *blocks;
    const float *qkv;
    int64_t qkv_size;
    const char *keys, *values;
    float *out; // [rows][heads * head_dim]

    void compute(int index, float *scratch) const {
        const AttendTile &t = tiles[index / m->kv_heads];
        const int kv = index % m->kv_heads, group = m->heads / m->kv_heads;
        const CacheShape shape(*m);
        AttendMember members[TILE];
        for (int i = 0; i < t.count; i++) {
            const Attending &a = attending[t.first + i];
            members[i] = {qkv + a.row * qkv_size + (int64_t)kv * group * m->head_dim, a.num_rows, positions[a.row],
                          blocks + first_blocks[a.sequence]};
        }
        const AttendTask task = {members,
                                 t.count,
                                 t.num_shared,
                                 qkv_size,
                                 group,
                                 m->head_dim,
                                 keys + kv * shape.key_bytes,
                                 values + kv * shape.value_bytes,
                                 shape.per_block * shape.key_bytes,
                                 shape.per_block * shape.value_bytes,
                                 m->cache_kind,
                                 1.0f / std::sqrt((float)m->head_dim)};
        kernels->attend(task, scratch);
    }
    void commit(int index, const float *scratch) const {
        const AttendTile &t = tiles[index / m->kv_heads];
        const int64_t width = (int64_t)m->heads / m->kv_heads * m->head_dim;
        for (int i = 0; i < t.count; i++) {
            const Attending &a = attending[t.first + i];
            for (int r = 0; r < a.num_rows; r++, scratch += width)
                memcpy(out + (a.row + r) * (int64_t)m->heads * m->head_dim + index % m->kv_heads * width, scratch,
                       sizeof(float) * (size_t)width);
        }
    }
};

struct Adapt { // what adapters add to a product, in float32
    const Kernels *kernels;
    const AdaptTile *tiles;
    const int32_t *rows;
    int layer, first_low, num_lows;
    const float *x; // what entered the product: [rows][stride]
    int64_t stride;
    int size, padded;
    float *out;
    int64_t out_stride;

    const Low &low(int index) const {
        return tiles[index / num_lows].layers[layer].lows[first_low + index % num_lows];
    }
    static int64_t width(const Weight &w) { return (int64_t)w.panels * PANEL; }
    int64_t row_floats(const Low &l) const { return padded + width(l.down) + width(l.up); }

    void compute(int index, float *scratch) const {
        const AdaptTile &t = tiles[index / num_lows];
        const Low &l = low(index);
        if (!l.down.codes) return;
        float *in = scratch + t.count * width(l.up), *small = in + (int64_t)t.count * padded;
        for (int i = 0; i < t.count; i++)
            memcpy(in + (int64_t)i * padded, x + rows[t.first + i] * stride, sizeof(float) * (size_t)size);
        const Rows entered = {t.count, padded, in, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
        kernels->product(l.down, entered, 0, t.count, 0, l.down.panels, small);
        const Rows narrow = {t.count, (int)width(l.down), small, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
        kernels->product(l.up, narrow, 0, t.count, 0, l.up.panels, scratch);
    }
    void commit(int index, const float *scratch) const {
        const AdaptTile &t = tiles[index / num_lows];
        const Low &l = low(index);
        for (int i = 0; l.down.codes && i < t.count; i++)
            kernels->finish(scratch + i * width(l.up), l.up.rows, nullptr, ADD, out + rows[t.first + i] * out_stride + l.column);
    }
};

struct Square { // squared ReLU of rows that adapters have changed
    const Kernels *kernels;
    float *x;
    int size;
    void compute(int, float *) const {}
    void commit(int row, const float *) const {
        float *own = x + (int64_t)row * size;
        kernels->finish(own, size, nullptr, RELU2, own);
    }
};

struct Finish { // the final norm of rows
    const Kernels *kernels;
    Norm norm;
    int size;
    float eps;
    const float *x;
    float *out;
    void compute(int, float *) const {}
    void commit(int row, const float *) const {
        kernels->norm(x + (int64_t)row * size, norm, size, eps, out + (int64_t)row * size);
    }
};

struct Drawing {
    Draw *draws;
    void compute(int, float *) const {}
    void commit(int i, const float *) const { draw(draws[i]); }
};

void enters(Entering &t, const Weight &w) { t.kind = w.kind, t.is_wide = w.is_wide, t.is_by_input = w.is_by_input; }

void enter(Engine &e, Entering t) {
    t.kernels = e.kernels;
    t.b = e.b;
    t.eps = e.model.eps;
    t.padded = e.padded(t.size);
    e.pool->add((t.num_rows + Entering::ROWS - 1) / Entering::ROWS, 0, t);
}

// ``next``: the weight that the numbers meet next, if they can be made its rows at once.
bool multiply(Engine &e, const Weight &w, int num_rows, float *out, int64_t stride, Use use, const Weight *next = nullptr) {
    const Entered &b = e.b.in;
    const int8_t *low = w.is_wide ? b.low : nullptr;
    const Used *used = w.is_by_input && num_rows <= LISTED ? b.used : nullptr;
    Product p = {e.kernels, &w, {num_rows, w.padded, e.b.values, b.bf16, b.codes, low, b.scales, b.sums, b.scaled_sums, used},
                 out, stride, use, 0, 1, num_rows, nullptr, e.b.next};
    if (num_rows > 256) { // what enters, and what leaves, has to stay near
        p.rows_per_tile = 128;
        p.row_tiles = (num_rows + 127) / 128;
    }
    const int64_t panel_bytes = (int64_t)w.padded * PANEL * (w.kind == W_F32 ? 4 : w.kind == W_BF16 ? 2 : 1);
    const int rows = std::min(num_rows, p.rows_per_tile);
    p.panels_per_tile = (int)std::max<int64_t>(1, std::min<int64_t>(MOST_PANELS, (64 << 10) / panel_bytes));
    if (rows >= 8) p.panels_per_tile = w.kind == W_S8 || w.kind == W_U4 ? 2 : 4;
    if (w.is_by_input) p.panels_per_tile = w.panels >= 16 * e.pool->num_threads() || w.kind == W_U4 ? 8 : 4;
    if (next && next->kind != W_F32 && p.panels_per_tile * PANEL % GROUP == 0) p.next = next;
    const int row_tiles = (w.panels + p.panels_per_tile - 1) / p.panels_per_tile;
    e.pool->add(row_tiles * p.row_tiles, (size_t)rows * p.panels_per_tile * PANEL, p);
    if (p.next) std::swap(e.b.in, e.b.next);
    return p.next != nullptr;
}

void embed(const Engine &e, int token, float *out) {
    const Model &m = e.model;
    if (token >= m.vocab)
        memcpy(out, m.virtual_rows + (int64_t)(token - m.vocab) * m.hidden, sizeof(float) * (size_t)m.hidden);
    else if (!m.embedding)
        unpack_row(m.head, token, out);
    else if (m.embedding_is_bf16)
        for (int i = 0; i < m.hidden; i++) {
            uint32_t u = (uint32_t)((const uint16_t *)m.embedding)[(int64_t)token * m.hidden + i] << 16;
            memcpy(out + i, &u, 4);
        }
    else
        memcpy(out, (const float *)m.embedding + (int64_t)token * m.hidden, sizeof(float) * (size_t)m.hidden);
}

// Adds to ``out`` what the adapters of the rows make of ``in``, which has entered the product.
void adapt(Engine &e, const Plan &plan, int layer, const Entering &in, int first_low, int num_lows, float *out,
           int64_t out_stride) {
    const bool is_made = in.norm || in.gate; // else the rows entered as they lay
    const int padded = e.padded(in.size);
    const Adapt task = {e.kernels, plan.adapting.data(), plan.adapted.data(), layer, first_low, num_lows,
                        is_made ? e.b.values : in.x, is_made ? padded : in.stride, in.size, padded, out, out_stride};
    const int num_tiles = (int)plan.adapting.size() * num_lows;
    int64_t most = 0;
    for (int i = 0; i < num_tiles; i++) most = std::max(most, task.row_floats(task.low(i)));
    e.pool->add(num_tiles, (size_t)(TILE * most), task);
}

void run_layer(Engine &e, const Plan &plan, int n, int layer) {
    const Model &m = e.model;
    const Layer &l = m.layers[layer];
    const Buffers &b = e.b;
    const int qkv_size = (m.heads + 2 * m.kv_heads) * m.head_dim;
    const CacheShape shape(m);
    const int64_t heads = (int64_t)layer * m.kv_heads; // of the layers before, in each block
    char *keys = (char *)m.keys + heads * shape.key_bytes, *values = (char *)m.values + heads * shape.value_bytes;

    Entering in = {};
    in.num_rows = n;
    in.x = b.x;
    in.stride = in.size = m.hidden;
    in.norm = &l.attention_norm;
    enters(in, l.qkv[0]);
    enter(e, in);
    for (int part = 0, column = 0; part < l.num_qkv; column += l.qkv[part++].rows)
        multiply(e, l.qkv[part], n, b.wide + column, qkv_size, STORE);
    adapt(e, plan, layer, in, LOW_Q, 3, b.wide, qkv_size);

    Rotate rotate = {&m, b.wide, qkv_size, e.cosine.data(), e.sine.data(), plan.positions.data(), plan.row_blocks.data(), keys, values, n};
    e.pool->add((n + Rotate::ROWS - 1) / Rotate::ROWS, 0, rotate);
    Attend attend = {e.kernels, &m, plan.attending.data(), plan.tiles.data(), plan.positions.data(), plan.first_blocks.data(), plan.blocks.data(), b.wide, qkv_size, keys, values, b.small};
    e.pool->add((int)plan.tiles.size() * m.kv_heads, (size_t)TILE * (m.heads / m.kv_heads) * m.head_dim, attend);

    in.x = b.small;
    in.stride = in.size = m.heads * m.head_dim;
    in.norm = nullptr;
    enters(in, l.out);
    enter(e, in);
    multiply(e, l.out, n, b.x, m.hidden, ADD);
    adapt(e, plan, layer, in, LOW_OUT, 1, b.x, m.hidden);

    in.x = b.x;
    in.stride = in.size = m.hidden;
    in.norm = &l.mlp_norm;
    enters(in, l.up[0]);
    enter(e, in);
    const int up_size = m.is_gated ? 2 * m.ffn : m.ffn;
    const bool is_adapted = !plan.adapting.empty(); // then what follows the product waits for the adapters
    bool has_entered = false;
    for (int part = 0, column = 0; part < l.num_up; column += l.up[part++].rows)
        has_entered = multiply(e, l.up[part], n, b.wide + column, up_size, m.is_gated || is_adapted ? STORE : RELU2,
                               m.is_gated || is_adapted ? nullptr : &l.down);
    if (is_adapted) {
        adapt(e, plan, layer, in, LOW_GATE, 2, b.wide, up_size);
        if (!m.is_gated) e.pool->add(n, 0, Square{e.kernels, b.wide, up_size});
    }

    in.x = m.is_gated ? b.wide + m.ffn : b.wide;
    in.gate = m.is_gated ? b.wide : nullptr;
    in.size = m.ffn;
    in.stride = up_size;
    in.norm = nullptr;
    enters(in, l.down);
    if (!has_entered) enter(e, in);
    multiply(e, l.down, n, b.x, m.hidden, ADD);
    adapt(e, plan, layer, in, LOW_DOWN, 1, b.x, m.hidden);
}

// Logits of rows of the hidden size.
void output(Engine &e, Entering in, float *logits) {
    const Model &m = e.model;
    if (in.num_rows == 0) return;
    in.stride = in.size = m.hidden;
    enters(in, m.head);
    enter(e, in);
    multiply(e, m.head, in.num_rows, logits, m.vocab, STORE);
}

// Single rows whose sequences begin with the same blocks attend together: the blocks are read once for all.
void group_rows(Plan &plan, int most) {
    auto &rows = plan.attending;
    const auto &starts = plan.first_blocks;
    const int32_t *blocks = plan.blocks.data();
    const auto full = [&](const Attending &a) { // blocks before the row's position
        return blocks + starts[(size_t)a.sequence] + (a.num_rows == 1 ? plan.positions[(size_t)a.row] / BLOCK : 0);
    };
    const auto begin = [&](const Attending &a) { return blocks + starts[(size_t)a.sequence]; };
    if (most > 1)
        std::stable_sort(rows.begin(), rows.end(), [&](const Attending &a, const Attending &b) {
            return std::lexicographical_compare(begin(a), full(a), begin(b), full(b));
        });
    for (int i = 0, count; i < (int)rows.size(); i += count) {
        const Attending &a = rows[(size_t)i];
        int shared = (int)(full(a) - begin(a));
        for (count = 1; count < most && i + count < (int)rows.size(); count++) {
            const Attending &b = rows[(size_t)(i + count)];
            const auto same = std::mismatch(begin(a), begin(a) + shared, begin(b), full(b)).first - begin(a);
            if (same < LEAST_SHARED) break;
            shared = (int)same;
        }
        const int64_t cost = (int64_t)(plan.positions[(size_t)a.row] + BLOCK) * a.num_rows * count;
        plan.tiles.push_back({i, count, count > 1 ? shared : 0, cost});
    }
    std::stable_sort(plan.tiles.begin(), plan.tiles.end(), [](const AttendTile &p, const AttendTile &q) {
        return p.cost > q.cost; // the longest first
    });
}

// The rows of one adapter are computed together, a tile of them at a time.
void group_adapted(const Step &s, Plan &plan) {
    plan.adapted.clear();
    plan.adapting.clear();
    for (int r = 0; s.adapters && r < s.num_rows; r++)
        if (s.adapters[r]) plan.adapted.push_back(r);
    const auto adapter = [&](int i) { return s.adapters[plan.adapted[(size_t)i]]; };
    if (s.adapters)
        std::stable_sort(plan.adapted.begin(), plan.adapted.end(), [&](int32_t p, int32_t q) {
            return std::less<>()(s.adapters[p], s.adapters[q]);
        });
    for (int i = 0, count, total = (int)plan.adapted.size(); i < total; i += count) {
        for (count = 1; count < TILE && i + count < total && adapter(i + count) == adapter(i);) count++;
        plan.adapting.push_back({adapter(i), i, count});
    }
}

void make_plan(const Step &s, Plan &plan, int heads_per_kv) {
    plan.positions.assign(s.positions, s.positions + s.num_rows);
    plan.first_blocks.assign(s.first_blocks, s.first_blocks + s.num_sequences + 1);
    plan.blocks.assign(s.blocks, s.blocks + s.first_blocks[s.num_sequences]);
    plan.row_blocks.resize((size_t)s.num_rows);
    plan.attending.clear();
    plan.tiles.clear();
    for (int i = 0; i < s.num_sequences; i++)
        for (int row = s.first_rows[i]; row < s.first_rows[i + 1];) {
            const int count = std::min(TILE - s.positions[row] % TILE, s.first_rows[i + 1] - row);
            plan.attending.push_back({i, row, count});
            for (int end = row + count; row < end; row++)
                plan.row_blocks[(size_t)row] = s.blocks[s.first_blocks[i] + s.positions[row] / BLOCK];
        }
    group_rows(plan, TILE / heads_per_kv);
    group_adapted(s, plan);
}

} // namespace

extern "C" {

int native_version() { return 8; }

Engine *native_open(const Model *model, int num_threads, const char *isa) {
    const Kernels *kernels = kernels_named(isa);
    if (!kernels) return nullptr;
    Engine *e = new Engine;
    e->model = *model;
    e->kernels = kernels;
    e->pool.reset(new Pool(num_threads));
    return e;
}

void native_close(Engine *e) {
    e->pool.reset(); // first: a thread that was kept from running may still read the buffers
    delete e;
}

void native_step(Engine *e, const Step *step) {
    const Step &s = *step;
    const Model &m = e->model;
    const int n = s.num_rows;
    e->reserve(n);
    Buffers &b = e->b;
    Plan &plan = e->plans[e->pool->begin()];
    make_plan(s, plan, m.heads / m.kv_heads);
    for (int r = 0; r < n; r++) embed(*e, s.tokens[r], b.x + (int64_t)r * m.hidden);
    e->turn_to(*std::max_element(s.positions, s.positions + n));
    for (int layer = 0; layer < m.num_layers; layer++) run_layer(*e, plan, n, layer);
    if (s.hidden) e->pool->add(n, 0, Finish{e->kernels, m.final_norm, m.hidden, m.eps, b.x, s.hidden});
    Entering in = {};
    in.num_rows = s.num_logits;
    in.x = b.x;
    in.chosen = s.logit_rows;
    in.norm = &m.final_norm;
    output(*e, in, s.logits);
    e->pool->run();
    if (!plan.adapting.empty()) e->pool->wait_for_stragglers(); // an adapter may be unloaded after the step
}

// Steps of one sequence and one row each, which go on with the token that the last one drew; the blocks of ``step`` are for
// all. Logits and draws of each; a token of ``stops`` is the last. Returns how many there are.
int native_run_on(Engine *e, const Step *step, Draw *draws, int count, const int32_t *stops, int num_stops) {
    Step s = *step;
    int32_t token = *step->tokens, position = *step->positions, first_blocks[2] = {0, 0};
    s.tokens = &token;
    s.positions = &position;
    s.first_blocks = first_blocks;
    for (int i = 0; i < count; i++, position++, s.logits += e->model.vocab) {
        first_blocks[1] = position / BLOCK + 1;
        native_step(e, &s);
        draws[i].logits = s.logits;
        draw(draws[i]);
        token = draws[i].token;
        if (std::find(stops, stops + num_stops, token) != stops + num_stops) return i + 1;
    }
    return count;
}

// Tokens of many rows, by the threads of ``e``, or by the caller's alone if it is null.
void native_draw(Engine *e, Draw *draws, int count) {
    const Drawing drawing = {draws};
    if (e && count > 1) {
        e->pool->begin();
        e->pool->add(count, 0, drawing);
        e->pool->run();
    } else
        for (int i = 0; i < count; i++) drawing.commit(i, nullptr);
}

// Logits of rows that are normed already: [num_rows][hidden] -> [num_rows][vocab].
void native_logits(Engine *e, const float *hidden, int num_rows, float *logits) {
    e->reserve(num_rows);
    e->pool->begin();
    Entering in = {};
    in.num_rows = num_rows;
    in.x = hidden;
    output(*e, in, logits);
    e->pool->run();
}

// Rows times one weight: [num_rows][cols] -> [num_rows][rows of the weight]. False without kernels for ``isa``.
int native_product(const Weight *w, const float *x, int num_rows, const char *isa, float *out) {
    Engine e;
    e.kernels = kernels_named(isa);
    if (!e.kernels) return 0;
    e.pool.reset(new Pool(1));
    e.model = {};
    e.model.hidden = e.model.ffn = w->cols;
    e.model.head = *w;
    e.model.vocab = w->rows;
    native_logits(&e, x, num_rows, out);
    return 1;
}

} // extern "C"

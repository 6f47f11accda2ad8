// What the C++ files share, and the C interface that Python calls through ctypes. No torch, no Python headers.
//
// Shapes: N = packed rows of a step, S = sequences, D = hidden size, K = input columns of a product, a "panel" is
// sixteen output rows of a weight, stored so that a product reads memory from front to back.
#pragma once
#include <cstddef>
#include <cstdint>

enum WeightKind : int32_t {
    W_F32 = 0,  // panel: K x 16 floats
    W_BF16 = 1, // panel: K/2 x 16 x 2
    W_S8 = 2,   // panel: K/4 x 16 x 4 signed codes; value = scale * code
    W_U4 = 3,   // panel: K/8 x 64 bytes, two rows of four columns to a byte row; value = scale * code + minimum
};

enum { GROUP = 32, PANEL = 16, BLOCK = 32, TILE = 16, LISTED = 4 };
// columns to a scale, outputs to a panel, positions to a cache block, queries that attend together, rows to a list

struct Weight {
    int32_t kind, rows, cols; // as in the checkpoint
    int32_t panels, padded;   // panels of 16 rows; columns padded to a multiple of 32
    int32_t is_wide;          // rows enter a quantised product with fifteen bits instead of eight
    // Of quantised weights, for rows with many zeros: the codes of a column are side by side, W_S8: of four panels,
    // [four panels][K][64], output o of panel p of four at 16 (o / 4) + 4 p + o % 4; W_U4: of eight, [eight
    // panels][K][64], the first four in the low halves of the bytes. There is room for a multiple of eight panels.
    int32_t is_by_input;
    const void *codes;        // panels side by side
    const uint16_t *scales;   // W_S8: [panel][group][16] float16; W_U4: [panel][group][16 scales, 16 minima]
    const float *bias;        // or null
};

struct Norm {
    const float *gamma, *beta; // beta null: RMSNorm
};

struct Layer {
    Norm attention_norm, mlp_norm;
    // The rows of q, k and v, and of gate and up, in one part or in parts of different kinds.
    Weight qkv[3], out, up[2], down;
    int32_t num_qkv, num_up;
};

struct Model {
    int32_t num_layers, hidden, ffn, heads, kv_heads, head_dim, vocab, rotary_dim;
    int32_t is_gated; // SwiGLU, else squared ReLU
    float eps;
    const Layer *layers;
    Norm final_norm;
    Weight head;
    const void *embedding;        // [vocab][hidden] float32 or bfloat16; null: the rows of ``head``
    int32_t embedding_is_bf16;
    const float *virtual_rows;    // [ids from vocab on][hidden], or null
    const float *inverse_frequency; // [rotary_dim / 2]
    float rotary_factor;            // of cos and sin
    int32_t cache_kind; // W_F32, W_BF16 or W_S8
    // float32: [block][layer][kv head][dim][32 positions] and [...][32 positions][dim to a multiple of 16];
    // bfloat16, in pairs: [...][dim to a multiple of 32, by two][32 positions][2], [...][16][dim to 16][2 positions];
    // codes as bfloat16, and behind those of a head and block their scales: [32 positions], float32
    void *keys, *values;
};

// What an adapter adds to the outputs ``column`` and on of a product: up (down x), both W_F32; nothing without codes.
struct Low {
    Weight down, up;
    int32_t column;
};

enum { LOW_Q, LOW_K, LOW_V, LOW_OUT, LOW_GATE, LOW_UP, LOW_DOWN, NUM_LOWS };

struct LayerAdapter {
    Low lows[NUM_LOWS];
};

struct Step {
    int32_t num_rows, num_sequences, num_logits;
    const int32_t *tokens, *positions; // [num_rows]
    const int32_t *first_rows;         // [num_sequences + 1]
    const int32_t *first_blocks;       // [num_sequences + 1] into blocks
    const int32_t *blocks;
    const int32_t *logit_rows; // [num_logits]
    float *hidden;             // [num_rows][hidden] after the final norm
    float *logits;             // [num_logits][vocab]
    const LayerAdapter *const *adapters; // [num_rows]: the layers of each row's adapter, or null; null: no row has one
};

// Of 32 columns those in which one of a few rows has a code that is not zero, and others to a multiple of four.
struct Used {
    int32_t count;
    uint8_t columns[GROUP];
    int8_t codes[LISTED][GROUP], low[LISTED][GROUP]; // of the rows in these columns; zeros behind those used
};

// Rows that enter a product. Quantised ones have a scale and the sum of the codes per row and 32 columns.
// Scales and sums lie as [block of 16 rows][group][row of the block].
struct Rows {
    int32_t count, padded;    // rows; columns
    const float *values;      // [count][padded], for W_F32
    const uint16_t *bf16;     // [rows to a multiple of 32][padded], for W_BF16
    const int8_t *codes;      // [block of 16 rows][group][row of the block][32 columns]
    const int8_t *low;        // the same of wide rows, whose codes are 128 * codes + low; or null
    const float *scales;      // scale
    const int32_t *sums;      // -128 * sum of codes
    const float *scaled_sums; // scale * sum
    const Used *used;         // [group] of at most LISTED rows that meet a weight by input; or null
};

struct AttendMember { // neighbouring rows of one sequence
    const float *q; // first query; rows are q_stride apart, heads of the group head_dim apart
    int32_t num_rows, first_position;
    const int32_t *blocks;
};

struct AttendTask { // queries of one key/value head
    const AttendMember *members; // several have one row each, and all queries fit into a tile
    int32_t num_members, num_shared; // blocks at the beginning that all have, each before the position of any
    int64_t q_stride;
    int32_t heads_per_kv, head_dim;
    const char *keys, *values; // of this layer and head, block 0
    int64_t key_block, value_block; // bytes between blocks
    int32_t kind;                   // of the cache
    float scale;
};

// One token of one row: ``point`` in [0, 1) inverts the cumulative distribution; at temperature 0 the first largest.
struct Draw {
    const float *logits;
    int32_t size, top_k;
    float temperature;
    double top_p, min_p, point;
    int32_t token; // out
};

enum Use { STORE, ADD, RELU2 }; // what is done with the numbers of a product

struct Kernels {
    const char *name;
    // out[row][16 * num_panels] = rows first .. first + count times the panels' weights, without bias
    void (*product)(const Weight &w, const Rows &rows, int first, int count, int panel, int num_panels, float *out);
    void (*norm)(const float *x, const Norm &norm, int size, float eps, float *out);
    void (*quantise)(const float *x, int size, int padded, int8_t *codes, int8_t *low, float *scales, int32_t *sums,
                     float *scaled_sums); // groups of codes: 512 apart, scales and sums: 16; low null: eight bits
    // Of the first rows of a block; they have to be at most LISTED.
    void (*list)(const int8_t *codes, const int8_t *low, int num_rows, int num_groups, Used *used);
    void (*to_bf16)(const float *x, int size, int padded, uint16_t *out); // zeros behind
    void (*finish)(const float *from, int count, const float *bias, Use use, float *to); // bias null: none
    void (*swiglu)(const float *gate, const float *up, int size, float *out);
    int (*largest)(const float *x, int size); // the place of the first largest
    // With y = x / temperature: e^(y - largest y), 0 where y is below ``least``; returns their sum
    double (*weights)(const float *x, int size, float temperature, float least, float *out);
    double (*mass)(const float *x, int size, float least);          // sum of what is not below ``least``
    int (*above)(const float *x, int size, float least, int32_t *ids); // where that is; how many
    void (*attend)(const AttendTask &task, float *out); // out[row of each member][heads_per_kv][head_dim]
};

extern "C" const Kernels *kernels(); // of the library for one instruction set

inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    union {
        uint32_t u;
        float f;
    } out;
    if (exponent == 0) { // zero or subnormal
        out.f = (float)fraction * 5.9604644775390625e-8f;
        out.u |= sign;
    } else if (exponent == 31)
        out.u = sign | 0x7f800000u | fraction << 13;
    else
        out.u = sign | (exponent + 112) << 23 | fraction << 13;
    return out.f;
}

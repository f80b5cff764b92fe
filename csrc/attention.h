// The plain interface of the native attention kernels: pointers, sizes and strides; no Python, no PyTorch.
//
// One call computes, for query row i of head h with key/value head g = h / (Hq / Hkv),
//     s_ij = softcap(scale * q_i . k_j) + bias_ij,  o_i = sum_j softmax(s_i)_j v_j,  lse_i = log sum_j exp s_ij,
// over the keys j that the mask program shows to i. Sizes are counts, strides are in elements, positions are in tokens.
#pragma once
#include <cstdint>

#include "mask/kinds.h"

namespace qkv {

enum class Type : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, i8 = 4, f8 = 5 };  // f8: e4m3, without infinities

enum class Status : int32_t {
    ok = 0,
    bad_struct = 1,   // the struct's size is not one this build knows
    unsupported = 2,  // a field asks for what no kernel here does (yet)
    no_memory = 3,
    bad_program = 4,  // the mask program is malformed or too deep
};

// Words of a mask program in postfix order; arguments follow their opcode: mask/kinds.h.
enum MaskOp : int64_t {
#define QKV_OPCODE(name, opcode, ...) kMask##name = opcode,
    QKV_MASK_KINDS(QKV_OPCODE)
#undef QKV_OPCODE
};

struct Operand {
    const void* data;
    int64_t count;  // elements
};

// One sequence of queries against one sequence of keys. Rows of q, out and lse are counted from q_first,
// those of biases, dense masks and positions from the sequence's first query.
struct Sequence {
    int64_t q_first, q_count;
    int64_t k_count;
    int64_t batch;             // row of q, out, masks and bias that this sequence belongs to
    int64_t position;          // of its first query, when positions is null
    const int64_t* positions;  // one a query, or null
    const void* k;             // first key (of head 0); with a page table: slot 0 of page 0
    const void* v;
    const int32_t* pages;  // null: keys lie one stride apart. Else key j is in slot j % page_size of pages[j /
                           // page_size]; a negative entry is a page without memory, whose keys the mask has to hide
};

enum class BiasKind : int32_t { tensor = 0, alibi = 1, relative = 2 };

struct Bias {
    BiasKind kind;
    Type type;
    const void* data;   // tensor: values; alibi: slopes (Hq,); relative: table (Hq, 2 R + 1)
    int64_t stride[4];  // tensor: b h i j (0 where broadcast); alibi: stride[1]; relative: stride[1], stride[3]
    int64_t reach;      // relative: R
};

struct Attention {
    uint64_t size;         // sizeof(Attention) of the caller
    Type q_type, kv_type;  // kv_type differs from q_type where keys and values are stored in i8 or f8, with scales
    int64_t Hq, Hkv, D, Dv;
    const void* q;
    int64_t q_stride[4];  // b h i d
    int64_t k_stride[3];  // h j d
    int64_t v_stride[3];
    void* out;
    int64_t out_stride[4];
    void* lse;  // (B, Hq, Lq) float, double for f64; null: not wanted
    int64_t lse_stride[3];
    const Sequence* sequences;
    int64_t sequence_count;
    double scale;
    double softcap;     // 0: none
    const void* sinks;  // (Hq,) of sink_type, or null
    Type sink_type;
    int64_t sink_stride;
    const int64_t* program;
    int64_t program_length;  // 0: everything is visible
    const Operand* operands;
    int64_t operand_count;
    const Bias* bias;
    int64_t bias_count;
    int64_t page_size;       // slots of a page; the three below are used with page tables only
    int64_t k_page, v_page;  // strides from page to page, in elements
    const float* k_scale;    // what a stored number is multiplied by: one a key and head, for i8 and f8; null otherwise
    const float* v_scale;
    int64_t scale_stride[3];  // page h slot; the same for both
    uint64_t dropout_below;   // a weight is dropped where its 53-bit draw is below this: p 2^53; 0: none is
    uint64_t dropout_seed;    // draws are a function of this, batch row, query head, query and key alone
    double dropout_scale;     // what weights that are kept grow by: 1 / (1 - p)
    void* state;              // row states for `backward`, laid out like lse, or null: not wanted
    int64_t state_step;       // from a row's m to its l: p_ij = exp(s_ij - m) / l
    void* observed;           // of each row its largest score (-inf: it sees nothing), its largest weight, its entropy,
    int64_t observed_step;    // so far apart; laid out like lse. Null: not wanted
    int32_t threads;
    bool part;  // the keys are a part of those that rows see: the states given to `backward` are of all of them, and
                // the gradients of q, k and v are wanted in the accumulation type
};

// A call's gradients: of sum(out * d_out) + sum(lse * d_lse), from the call's own results.
//     p_ij = exp(s_ij - m_i) / l_i      ds_ij = p_ij (d_out_i . v_j - d_out_i . out_i + d_lse_i)
// (m, l) is the row's state, made by the same instruction set: a weight made from lse alone would lose what lse rounds
// away. d_bias += ds; dx = ds through the softcap; d_q = scale sum_j dx_ij k_j, d_k = scale sum_i dx_ij q_i, d_v =
// sum_i p_ij d_out_i.
struct BiasGradient {
    void* data;         // doubles (wide) or the accumulation type, zeroed by the caller; null: not wanted
    int64_t stride[4];  // like the bias term's own
    int32_t wide;
};

struct Backward {
    uint64_t size;   // sizeof(Backward) of the caller
    Attention call;  // as it was run, with its out and state
    const void* d_out;
    int64_t d_out_stride[4];
    const void* d_lse;  // laid out like lse, or null: zero
    void* d_q;          // null where not wanted, as the next two
    int64_t d_q_stride[4];
    void* d_k;
    int64_t d_k_stride[4];  // b h j d
    void* d_v;
    int64_t d_v_stride[4];
    const BiasGradient* d_bias;  // one for each of call.bias, or null
    double* d_sinks;             // (Hq,), or null
};

// What the weights p_ij of a call come to, dropout aside, one head after another: a second pass over its scores. A row
// that is NaN is NaN in what it has of its own, has keys of -1 and adds nothing to columns and map.
struct Observation {
    uint64_t size;      // sizeof(Observation) of the caller
    Attention call;     // as it was run, with its state, or null: states are found anew. Values are not read
    int64_t top;        // keys of a row, up to kMostTop
    int64_t* top_keys;  // (row, top): those of the largest scores, of equal ones the lower key first; -1: no more seen
    void* top_weights;  // (row, top): theirs. Rows are counted as those of lse; null: not wanted, as all that follow
    void* distance;     // laid out like lse: sum_j p_ij |p_i - j| / sum_j p_ij, in tokens
    double* mass;       // b h j: sum_i p_ij. Zeroed by the caller, as the map
    int64_t mass_stride[2];  // b h
    double* map;             // b h r c: p summed over bins: of query i bin i rows / Lq, of key j bin j columns / Lk,
    int64_t map_stride[3];   // b h r
    int64_t rows, columns;   // at most as many of each as a sequence has queries and keys
};
inline constexpr int64_t kMostTop = 64;

// The instruction sets of this build that this machine can run, best first, as a comma-separated list.
const char* instruction_sets();

// What a caller may have to know of an instruction set's kernels.
struct Limits {
    int32_t tile_rows;  // queries of one tile, in float
    int32_t granule;    // keys that are visited or skipped together
    int32_t terms;      // score terms that `backward` takes
    bool pairs;         // bfloat16 is multiplied in pairs
};
Status limits(const char* instruction_set, Limits& to);

// Whether the kernels can run this mask program: well formed, not nested too deeply.
bool program_fits(const int64_t* words, int64_t length, int64_t operands);

// What a call's kernel computes of its queries and keys, found by a walk that multiplies nothing.
struct Cover {
    int64_t granules;  // in: about so many are looked at; of more, evenly spread tiles tell of the others
    int64_t pairs;     // of a query and a key, over all sequences and heads
    int64_t step;      // tiles hold rows i, i + step, ...: 1: neighbours
    int64_t block;     // tiles hold rows of one block of positions; 0: of any
    bool by_query;     // tiles hold the rows of all heads of a query
    bool gathers;      // more than a quarter of the keys were gathered
};
Status cover(const Attention& call, const char* instruction_set, Cover& to);

// Runs on the named instruction set (null or "": the best).
Status attention(const Attention& call, const char* instruction_set);
Status backward(const Backward& call, const char* instruction_set);
Status observe(const Observation& call, const char* instruction_set);

}  // namespace qkv

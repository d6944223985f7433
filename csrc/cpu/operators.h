// The operators of a CPU. target.cpp, which includes them all, is compiled once for each target (setup.py): a
// set of vector instructions, whose name is LUMI_TARGET. `cpu_targets` says which ones the processor has, at
// run time.
//
// Files of this folder use no function template or inline function of the standard library. The linker keeps
// one copy of these for all targets, and it might keep one with instructions that the processor lacks.
//
// Every operator gives the same bits for any number of threads. An address is memory of the caller, who has
// checked all sizes. Strides count elements; where none is named, memory is contiguous. Activations are of
// one type, T, which is float or bfloat16: there is one table for each. All arithmetic is float.
#pragma once

#include <cstdint>
#include <vector>

namespace lumi {

using Address = std::uintptr_t;
using Int = std::int64_t;

struct CpuOperators {
    const char* target;

    // y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps). With a residual, x + residual takes the place
    // of x and is written to total. residual and total may be 0. weight (dim) and rstd (rows) are float.
    void (*rms_norm)(Address x, Address residual, Address weight, Address total, Address y, Address rstd,
                     Int rows, Int dim, Int x_stride, Int residual_stride, float eps, int threads);

    // dx and, in float, dweight (dim). dtotal may be 0; else it is added to dx. partials: room for
    // dim floats for each of rms_norm_pieces(rows, dim).
    void (*rms_norm_backward)(Address dy, Address dtotal, Address x, Address weight, Address rstd, Address dx,
                              Address dweight, Address partials, Int rows, Int dim, Int dy_stride,
                              Int dtotal_stride, Int x_stride, int threads);
    Int (*rms_norm_pieces)(Int rows, Int dim);

    // y = silu(gate) * up. A row of `both` holds dgate, then dup.
    void (*swiglu)(Address gate, Address up, Address y, Int rows, Int dim, Int gate_stride, Int up_stride,
                   int threads);
    void (*swiglu_backward)(Address dy, Address gate, Address up, Address both, Int rows, Int dim,
                            Int dy_stride, Int gate_stride, Int up_stride, int threads);

    // Turns `heads` heads of `dim` elements for each token by the angles whose cosines and sines are float
    // (tokens, dim); sign -1 turns them back.
    void (*rope)(Address x, Address cos, Address sin, Address y, Int tokens, Int heads, Int dim,
                 Int token_stride, Int head_stride, float sign, int threads);

    // y (rows, outputs) = x W^T with W (outputs, inputs), for few rows of x (rows, inputs), which is float.
    void (*linear)(Address x, Address weight, Address y, Int rows, Int inputs, Int outputs, int threads);

    // Of logits (vocab, columns): writes each column's loss (float) and, if `gradient`, turns its logits into
    // dloss times their gradient, times the column's weight (float) where there are weights. targets
    // (columns) are int64. scratch: cross_entropy_scratch floats.
    void (*cross_entropy)(Address logits, Address targets, Address losses, Address weights, Address scratch,
                          Int vocab, Int columns, float z_loss, float dloss, bool gradient, int threads);
    Int (*cross_entropy_scratch)(Int vocab, Int columns);

    // Causal attention. Token t sees the keys first_key[t] .. t. starts (num_spans + 1, int64): tokens before
    // which no later token sees anything, the first 0 and the last the number of tokens. lse: float (q_heads,
    // tokens). Strides are of a token and of a head. scratch: attention_scratch floats for each thread.
    void (*attention)(Address q, Address k, Address v, Address first_key, Address starts, Address y,
                      Address lse, Address scratch, Int scratch_size, Int num_spans, Int q_heads,
                      Int kv_heads, Int dim, Int q_token, Int q_head, Int k_token, Int k_head, Int v_token,
                      Int v_head, int threads);
    void (*attention_backward)(Address dy, Address q, Address k, Address v, Address y, Address lse,
                               Address first_key, Address starts, Address dq, Address dk, Address dv,
                               Address scratch, Int scratch_size, Int num_spans, Int q_heads, Int kv_heads,
                               Int dim, Int dy_token, Int dy_head, Int q_token, Int q_head, Int k_token,
                               Int k_head, Int v_token, Int v_head, Int y_token, Int y_head, int threads);
    Int (*attention_scratch)(Int longest_span, Int dim, bool backward);

    // Attention of `queries` new tokens of each row to a cache of `slots`, in pages if page_size is not 0:
    // slot s of row b is slot s % page_size of page page_table[b, s / page_size] (int32). positions: int64. A
    // query sees its own slot and the window - 1 slots before it. Strides are of a row or page, of a token or
    // slot, and of a head. scratch: decode_scratch floats for each thread.
    void (*decode_attention)(Address q, Address k, Address v, Address positions, Address page_table,
                             Address y, Address scratch, Int scratch_size, Int batch, Int queries, Int slots,
                             Int q_heads, Int kv_heads, Int dim, Int window, Int page_size,
                             Int table_stride, Int q_row, Int q_token, Int q_head, Int k_row, Int k_slot,
                             Int k_head, Int v_row, Int v_slot, Int v_head, int threads);
    Int (*decode_scratch)(Int slots, Int rows, Int dim);
};

// For each target that this processor has, the best first: the tables for float and for bfloat16.
std::vector<const CpuOperators*> cpu_targets();

}  // namespace lumi

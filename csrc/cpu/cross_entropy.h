// Softmax cross-entropy over columns of logits, (vocab, columns), and its gradient in their place. A piece of
// work is some rows of the vocabulary, which lie in the cache while they are read twice.
#pragma once

#include <math.h>

#include "rows.h"

namespace lumi::LUMI_TARGET {

constexpr Int kPieceLogits = 1 << 17;

inline Int rows_of_logits(Int columns) { return columns < kPieceLogits ? kPieceLogits / columns : 1; }

inline Int logits_pieces(Int vocab, Int columns) {
    return (vocab + rows_of_logits(columns) - 1) / rows_of_logits(columns);
}

// For each piece its columns' largest logits and sums of e^(logit - largest), and twice `columns` more.
inline Int cross_entropy_scratch(Int vocab, Int columns) {
    return 2 * (logits_pieces(vocab, columns) + 1) * columns;
}

// Calls body(first, end, piece) for each piece, whose rows go from first to end.
template <typename Body>
inline void for_each_logits_piece(Int vocab, Int columns, int threads, const Body& body) {
    for_each_piece(logits_pieces(vocab, columns), threads, 1, [&](std::size_t piece, int) {
        const Int size = rows_of_logits(columns), first = static_cast<Int>(piece) * size;
        body(first, first + size < vocab ? first + size : vocab, static_cast<Int>(piece));
    });
}

template <typename T>
void cross_entropy(Address logits_, Address targets_, Address losses_, Address weights_, Address scratch_,
                   Int vocab, Int columns, float z_loss, float dloss, bool gradient, int threads) {
    T* logits = pointer<T>(logits_);
    const Int *targets = pointer<const Int>(targets_), pieces = logits_pieces(vocab, columns);
    const float* weights = pointer<const float>(weights_);
    float *losses = pointer<float>(losses_), *all_largest = pointer<float>(scratch_);
    float *all_sums = all_largest + pieces * columns, *shifts = all_sums + pieces * columns,
          *scales = shifts + columns;

    for_each_logits_piece(vocab, columns, threads, [&](Int first, Int end, Int piece) {
        float *largest = all_largest + piece * columns, *sums = all_sums + piece * columns;
        for (Int j = 0; j < columns; ++j) largest[j] = kLowest, sums[j] = 0;
        for (Int row = first; row < end; ++row)
            for_each_vector(columns, [&](Int j, int count) {
                store(largest + j, max(load(logits + row * columns + j, count), load(largest + j, count)),
                      count);
            });
        for (Int row = first; row < end; ++row)
            for_each_vector(columns, [&](Int j, int count) {
                const Vec x = load(logits + row * columns + j, count) - load(largest + j, count);
                store(sums + j, load(sums + j, count) + exp(x), count);
            });
    });

    for (Int j = 0; j < columns; ++j) {
        float shift = all_largest[j], sum = 0;
        for (Int piece = 1; piece < pieces; ++piece) {
            const float largest = all_largest[piece * columns + j];
            shift = largest > shift ? largest : shift;
        }
        for (Int piece = 0; piece < pieces; ++piece)
            sum += all_sums[piece * columns + j] * expf(all_largest[piece * columns + j] - shift);
        const float log_sum = logf(sum), lse = shift + log_sum;
        const float at_target = to_float(logits[targets[j] * columns + j]) - shift;
        losses[j] = log_sum - at_target + z_loss * lse * lse;
        shifts[j] = shift;
        const float factor = weights ? dloss * weights[j] : dloss;
        scales[j] = factor * (1.0f + 2.0f * z_loss * lse) / sum;
        all_sums[j] =
            exp(broadcast(at_target))[0] * scales[j] - factor;  // the gradient there; this sum is used up
    }
    if (!gradient) return;

    for_each_logits_piece(vocab, columns, threads, [&](Int first, Int end, Int) {
        for (Int row = first; row < end; ++row)
            for_each_vector(columns, [&](Int j, int count) {
                const Vec x = load(logits + row * columns + j, count) - load(shifts + j, count);
                store(logits + row * columns + j, exp(x) * load(scales + j, count), count);
            });
    });
    for (Int j = 0; j < columns; ++j) store(logits + targets[j] * columns + j, broadcast(all_sums[j]), 1);
}

}  // namespace lumi::LUMI_TARGET

// Causal attention inside documents, forward and backward. A unit of work is a span of tokens that see
// nothing outside it, with one kv head and the query heads that read it; forward cuts a span into blocks of
// queries too.
#pragma once

#include "../pieces.h"
#include "attention_tile.h"

namespace lumi::LUMI_TARGET {

constexpr Int kBlock = 512;  // queries of a unit of the forward: packing its keys costs 1/512 of its products

inline Int attention_scratch(Int longest_span, Int dim, bool backward) {
    const Int keys = padded(longest_span, kTile), padded_dim = padded(dim, kWidth);
    const Int matrices = backward ? 2 * keys * dim + 3 * keys * padded_dim : keys * (dim + padded_dim);
    return padded(matrices + 3 * kTile * padded_dim + 2 * kTile * kTile + 2 * kTile, kWidth);
}

// The unit with number `unit`: which span, which of its blocks of queries, which kv head.
inline void find_unit(Int unit, const Int* starts, Int kv_heads, Int block, Int& span, Int& number,
                      Int& kv_head) {
    kv_head = unit % kv_heads;
    number = unit / kv_heads;
    for (span = 0;; ++span) {
        const Int blocks = (starts[span + 1] - starts[span] + block - 1) / block;
        if (number < blocks) return;
        number -= blocks;
    }
}

inline Int count_blocks(const Int* starts, Int num_spans, Int block) {
    Int blocks = 0;
    for (Int span = 0; span < num_spans; ++span)
        blocks += (starts[span + 1] - starts[span] + block - 1) / block;
    return blocks;
}

template <typename T>
void attention(Address q_, Address k_, Address v_, Address first_key_, Address starts_, Address y_,
               Address lse_, Address scratch_, Int scratch_size, Int num_spans, Int q_heads, Int kv_heads,
               Int dim, Int q_token, Int q_head, Int k_token, Int k_head, Int v_token, Int v_head,
               int threads) {
    const T *q = pointer<const T>(q_), *k = pointer<const T>(k_), *v = pointer<const T>(v_);
    const std::int32_t* first_key = pointer<const std::int32_t>(first_key_);
    const Int* starts = pointer<const Int>(starts_);
    T* y = pointer<T>(y_);
    float *lse = pointer<float>(lse_), *all_scratch = pointer<float>(scratch_);
    const Int tokens = starts[num_spans], group = q_heads / kv_heads, padded_dim = padded(dim, kWidth);
    const float scale = 1.0f / sqrtf(static_cast<float>(dim));

    for_each_piece(
        count_blocks(starts, num_spans, kBlock) * kv_heads, threads, 1, [&](std::size_t unit, int thread) {
            Int span, number, kv_head;
            find_unit(static_cast<Int>(unit), starts, kv_heads, kBlock, span, number, kv_head);
            const Int first = starts[span] + number * kBlock;
            const Int end = first + kBlock < starts[span + 1] ? first + kBlock : starts[span + 1];
            const Int begin = first_key[first], num_keys = padded(end - begin, kTile);
            float* const keys = all_scratch + thread * scratch_size;
            float* const values = keys + num_keys * dim;
            float* const queries = values + num_keys * padded_dim;
            float* const scores = queries + kTile * padded_dim;
            const Sums sums{scores + kTile * kTile, scores + kTile * kTile + kTile * padded_dim,
                            scores + kTile * kTile + kTile * padded_dim + kTile};
            pack_columns(keys, num_keys, k + begin * k_token + kv_head * k_head, k_token, end - begin, dim);
            pack_rows(values, v + begin * v_token + kv_head * v_head, v_token, end - begin, num_keys, dim,
                      1.0f);

            for (Int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                for (Int t = first; t < end; t += kTile) {
                    const Int rows = end - t < kTile ? end - t : kTile;
                    pack_rows(queries, q + t * q_token + head * q_head, q_token, rows, kTile, dim, scale);
                    clear_sums(sums, padded_dim);
                    for (Int s = begin + (first_key[t] - begin) / kTile * kTile; s < t + rows; s += kTile) {
                        attend(sums, queries, keys + (s - begin), num_keys, values + (s - begin) * padded_dim,
                               scores, rows, dim, [&](Int row, Int& low, Int& high) {
                                   low = first_key[t + row] - s;
                                   high = t + row + 1 - s;
                               });
                    }
                    for (Int row = 0; row < rows; ++row) {
                        write_result(y + ((t + row) * q_heads + head) * dim, sums, row, dim);
                        lse[head * tokens + t + row] = sums.largest[row] + logf(sums.total[row]);
                    }
                }
            }
        });
}

// One row of a tile: scores become weights, and the weights' gradients those of the scores. 0 outside low ..
// high.
inline void differentiate(float* scores, float* gradients, Int low, Int high, float lse, float delta) {
    for (Int i = 0; i < kTile; i += kWidth) {
        const Vec weights = columns_between(i, low, high) ? exp(load(scores + i) - lse) : Vec{};
        store(scores + i, weights);
        store(gradients + i, weights * (load(gradients + i) - delta));
    }
}

template <typename T>
void attention_backward(Address dy_, Address q_, Address k_, Address v_, Address y_, Address lse_,
                        Address first_key_, Address starts_, Address dq_, Address dk_, Address dv_,
                        Address scratch_, Int scratch_size, Int num_spans, Int q_heads, Int kv_heads, Int dim,
                        Int dy_token, Int dy_head, Int q_token, Int q_head, Int k_token, Int k_head,
                        Int v_token, Int v_head, Int y_token, Int y_head, int threads) {
    const T *dy = pointer<const T>(dy_), *q = pointer<const T>(q_), *k = pointer<const T>(k_);
    const T *v = pointer<const T>(v_), *y = pointer<const T>(y_);
    const float* lse = pointer<const float>(lse_);
    const std::int32_t* first_key = pointer<const std::int32_t>(first_key_);
    const Int* starts = pointer<const Int>(starts_);
    T *dq = pointer<T>(dq_), *dk = pointer<T>(dk_), *dv = pointer<T>(dv_);
    float* all_scratch = pointer<float>(scratch_);
    const Int tokens = starts[num_spans], group = q_heads / kv_heads, padded_dim = padded(dim, kWidth);
    const float scale = 1.0f / sqrtf(static_cast<float>(dim));

    for_each_piece(num_spans * kv_heads, threads, 1, [&](std::size_t unit, int thread) {
        const Int kv_head = static_cast<Int>(unit) % kv_heads, span = static_cast<Int>(unit) / kv_heads;
        const Int begin = starts[span], end = starts[span + 1], num_keys = padded(end - begin, kTile);
        float* const keys_columns = all_scratch + thread * scratch_size;
        float* const values_columns = keys_columns + num_keys * dim;
        float* const keys = values_columns + num_keys * dim;
        float* const dkeys = keys + num_keys * padded_dim;
        float* const dvalues = dkeys + num_keys * padded_dim;
        float* const queries = dvalues + num_keys * padded_dim;
        float* const dresult = queries + kTile * padded_dim;
        float* const dqueries = dresult + kTile * padded_dim;
        float* const weights = dqueries + kTile * padded_dim;
        float* const dscores = weights + kTile * kTile;
        float* const delta = dscores + kTile * kTile;
        const T *k_span = k + begin * k_token + kv_head * k_head,
                *v_span = v + begin * v_token + kv_head * v_head;
        pack_columns(keys_columns, num_keys, k_span, k_token, end - begin, dim);
        pack_columns(values_columns, num_keys, v_span, v_token, end - begin, dim);
        pack_rows(keys, k_span, k_token, end - begin, num_keys, dim, 1.0f);
        clear(dkeys, 2 * num_keys * padded_dim);

        for (Int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            for (Int t = begin; t < end; t += kTile) {
                const Int rows = end - t < kTile ? end - t : kTile, padded_rows = padded(rows, kRows);
                pack_rows(queries, q + t * q_token + head * q_head, q_token, rows, kTile, dim, scale);
                pack_rows(dresult, dy + t * dy_token + head * dy_head, dy_token, rows, kTile, dim, 1.0f);
                clear(dqueries, kTile * padded_dim);
                for (Int row = 0; row < rows; ++row)
                    delta[row] =
                        dot(y + (t + row) * y_token + head * y_head, dresult + row * padded_dim, dim);
                for (Int s = begin + (first_key[t] - begin) / kTile * kTile; s < t + rows; s += kTile) {
                    const Int place = s - begin;
                    product(weights, kTile, {queries, padded_dim, 1}, keys_columns + place, num_keys,
                            padded_rows, kTile, dim, false);
                    product(dscores, kTile, {dresult, padded_dim, 1}, values_columns + place, num_keys,
                            padded_rows, kTile, dim, false);
                    for (Int row = 0; row < rows; ++row)
                        differentiate(weights + row * kTile, dscores + row * kTile, first_key[t + row] - s,
                                      t + row + 1 - s, lse[head * tokens + t + row], delta[row]);
                    for (Int row = rows; row < padded_rows; ++row) clear(dscores + row * kTile, kTile);
                    product(dvalues + place * padded_dim, padded_dim, {weights, 1, kTile}, dresult,
                            padded_dim, kTile, padded_dim, rows, true);
                    product(dkeys + place * padded_dim, padded_dim, {dscores, 1, kTile}, queries, padded_dim,
                            kTile, padded_dim, rows, true);
                    product(dqueries, padded_dim, {dscores, kTile, 1}, keys + place * padded_dim, padded_dim,
                            padded_rows, padded_dim, kTile, true);
                }
                for (Int row = 0; row < rows; ++row)
                    unpack_row(dq + ((t + row) * q_heads + head) * dim, dqueries + row * padded_dim, dim,
                               scale);
            }
        }
        for (Int s = begin; s < end; ++s) {
            const Int target = (s * kv_heads + kv_head) * dim, place = (s - begin) * padded_dim;
            unpack_row(dk + target, dkeys + place, dim, 1.0f);  // the queries were scaled
            unpack_row(dv + target, dvalues + place, dim, 1.0f);
        }
    });
}

}  // namespace lumi::LUMI_TARGET

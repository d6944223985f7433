// What attention in training and in generation share: tiles of queries against packed keys and values, with
// the softmax of one tile of keys at a time (Dao 2023, https://arxiv.org/abs/2307.08691).
//
// Packed memory is float, its rows and columns are filled up with zeros: K' is the head dim up to a multiple
// of kWidth, S' the number of keys up to a multiple of kTile.
#pragma once

#include <math.h>

#include "product.h"

namespace lumi::LUMI_TARGET {

constexpr Int kTile = 64;  // queries of a tile, and keys of a tile

inline Int padded(Int size, Int multiple) { return (size + multiple - 1) / multiple * multiple; }

inline void clear(float* to, Int size) {
    for (Int i = 0; i < size; ++i) to[i] = 0;
}

// A row of K elements as K' floats, times `scale`.
template <typename T>
inline void pack_row(float* to, const T* from, Int dim, float scale) {
    for_each_vector(dim, [&](Int i, int count) { store(to + i, load(from + i, count) * scale); });
}

// (rows, K) as (padded_rows, K').
template <typename T>
inline void pack_rows(float* to, const T* from, Int stride, Int rows, Int padded_rows, Int dim, float scale) {
    const Int padded_dim = padded(dim, kWidth);
    for (Int row = 0; row < rows; ++row) pack_row(to + row * padded_dim, from + row * stride, dim, scale);
    clear(to + rows * padded_dim, (padded_rows - rows) * padded_dim);
}

// A row of K elements as the column of a (K, S') matrix.
template <typename T>
inline void pack_column(float* to, Int num_columns, const T* from, Int dim) {
    for (Int i = 0; i < dim; ++i) to[i * num_columns] = to_float(from[i]);
}

// (rows, K) as (K, S').
template <typename T>
inline void pack_columns(float* to, Int num_columns, const T* from, Int stride, Int rows, Int dim) {
    for (Int row = 0; row < rows; ++row) pack_column(to + row, num_columns, from + row * stride, dim);
    for (Int i = 0; i < dim; ++i) clear(to + i * num_columns + rows, num_columns - rows);
}

// K' floats, times `scale`, as a row of K elements.
template <typename T>
inline void unpack_row(T* to, const float* from, Int dim, float scale) {
    for_each_vector(dim, [&](Int i, int count) { store(to + i, load(from + i) * scale, count); });
}

// The product of a row of K elements and a packed one.
template <typename T>
inline float dot(const T* a, const float* b, Int dim) {
    Vec products{};
    for_each_vector(dim, [&](Int i, int count) { products += load(a + i, count) * load(b + i); });
    return sum(products);
}

// Of a tile of queries, row by row: the weighted sum of values (K'), the largest score, the sum of the
// weights; the sums are divided by e^largest.
struct Sums {
    float *results, *largest, *total;
};

inline void clear_sums(Sums sums, Int padded_dim) {
    clear(sums.results, kTile * padded_dim);
    clear(sums.total, kTile);
    for (Int row = 0; row < kTile; ++row) sums.largest[row] = kLowest;
}

// The row's result; zeros if it has seen no key.
template <typename T>
inline void write_result(T* to, Sums sums, Int row, Int dim) {
    const float total = sums.total[row];
    unpack_row(to, sums.results + row * padded(dim, kWidth), dim, total > 0 ? 1.0f / total : total);
}

// Which of the columns from `first` on lie in low .. high - 1: all bits, or none.
LUMI_INLINE IntVec columns_between(Int first, Int low, Int high) {
    IntVec index;
    for (int i = 0; i < kWidth; ++i) index[i] = static_cast<int>(first) + i;
    return (index >= static_cast<int>(low)) & (index < static_cast<int>(high));
}

// Turns a row's scores into weights e^(score - largest), 0 outside low .. high, and takes them into account.
inline void take_scores(float* scores, Int low, Int high, float* result, float& largest_score, float& total,
                        Int padded_dim) {
    const bool whole = low <= 0 && high >= kTile;
    Vec most = broadcast(largest_score);
    for (Int i = 0; i < kTile; i += kWidth) {
        Vec x = load(scores + i);
        if (!whole) {
            x = columns_between(i, low, high) ? x : broadcast(kLowest);
            store(scores + i, x);
        }
        most = max(x, most);
    }
    const float largest = max(most), shrink = exp(broadcast(largest_score - largest))[0];
    Vec sums{};
    for (Int i = 0; i < kTile; i += kWidth) {
        const Vec weights = exp(load(scores + i) - largest);
        store(scores + i, weights);
        sums += weights;
    }
    total = total * shrink + sum(sums);
    if (largest != largest_score)
        for (Int i = 0; i < padded_dim; i += kWidth) store(result + i, load(result + i) * shrink);
    largest_score = largest;
}

// One tile of keys. queries: kTile packed rows, scaled; keys (K, S') and values (S', K') from the tile's
// first key on. limits(row, low, high) sets which of the tile's keys a row sees. scores: room for kTile *
// kTile floats.
template <typename Limits>
inline void attend(Sums sums, const float* queries, const float* keys, Int keys_row, const float* values,
                   float* scores, Int rows, Int dim, const Limits& limits) {
    const Int padded_dim = padded(dim, kWidth), padded_rows = padded(rows, kRows);
    product(scores, kTile, {queries, padded_dim, 1}, keys, keys_row, padded_rows, kTile, dim, false);
    for (Int row = 0; row < padded_rows; ++row) {
        Int low = 0, high = 0;
        if (row < rows) limits(row, low, high);
        if (high <= low || high <= 0 || low >= kTile)
            clear(scores + row * kTile, kTile);
        else
            take_scores(scores + row * kTile, low, high, sums.results + row * padded_dim, sums.largest[row],
                        sums.total[row], padded_dim);
    }
    product(sums.results, padded_dim, {scores, kTile, 1}, values, padded_dim, padded_rows, padded_dim, kTile,
            true);
}

}  // namespace lumi::LUMI_TARGET

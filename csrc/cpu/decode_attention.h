// Attention of new tokens to a cache of keys and values. A unit of work is a row's kv head with all query
// heads that read it. Slots past a row's last position are not read, nor are those before the window of its
// first.
#pragma once

#include "../pieces.h"
#include "attention_tile.h"

namespace lumi::LUMI_TARGET {

constexpr Int kFewRows =
    8;  // up to here reading the cache costs more than the products: it is read as it lies

// `rows`: queries times the query heads that read one kv head.
inline Int decode_scratch(Int slots, Int rows, Int dim) {
    const Int keys = padded(slots, kTile), padded_dim = padded(dim, kWidth), tiles = 2 * kTile * padded_dim;
    if (rows <= kFewRows) return padded(tiles + keys * kFewRows, kWidth);
    return padded(tiles + keys * (dim + padded_dim) + kTile * kTile + 2 * kTile, kWidth);
}

// Where a row's slots lie.
struct Slots {
    const std::int32_t* table;  // of this row, or null
    Int row, page_size;

    Int page(Int slot) const { return table == nullptr ? row : table[slot / page_size]; }
    Int slot_in_page(Int slot) const { return table == nullptr ? slot : slot % page_size; }
};

template <typename T>
struct Cache {
    const T* data;
    Int row, slot;  // strides

    const T* at(const Slots& slots, Int s) const {
        return data + slots.page(s) * row + slots.slot_in_page(s) * slot;
    }
};

// The slots first .. end - 1.
struct Span {
    Int first, end;
};

// `rows` up to kFewRows queries, packed and scaled. Each sees the slots `seen[row]`, all of them together the
// slots `all`. weights: room for kFewRows * padded(all.end, kTile) floats.
template <typename T>
void attend_few(const float* queries, float* results, float* weights, const Span* seen, Int rows, Span all,
                Int dim, const Slots& slots, const Cache<T>& keys, const Cache<T>& values) {
    const Int padded_dim = padded(dim, kWidth), length = padded(all.end, kTile);
    for (Int s = all.first; s < all.end; ++s) {
        const T* key = keys.at(slots, s);
        for (Int row = 0; row < rows; ++row)
            weights[row * length + s] = dot(key, queries + row * padded_dim, dim);
    }
    for (Int row = 0; row < rows; ++row) {
        float* const scores = weights + row * length;
        const Int first = seen[row].first, end = seen[row].end;
        float most = kLowest, total = 0;
        for (Int s = first; s < end; ++s) most = scores[s] > most ? scores[s] : most;
        Vec sums{};
        for_each_vector(end - first, [&](Int i, int count) {
            const Vec values_exp = exp(load(scores + first + i, count) - most);
            store(scores + first + i, values_exp, count);
            if (count == kWidth) sums += values_exp;
            for (int j = 0; count < kWidth && j < count; ++j) total += values_exp[j];
        });
        total += sum(sums);
        const float inverse = total > 0 ? 1.0f / total : total;
        for (Int s = first; s < end; ++s) scores[s] *= inverse;
        for (Int s = all.first; s < first; ++s) scores[s] = 0;
        for (Int s = end; s < all.end; ++s) scores[s] = 0;
    }
    clear(results, rows * padded_dim);
    for (Int s = all.first; s < all.end; ++s) {
        const T* value = values.at(slots, s);
        for (Int row = 0; row < rows; ++row) {
            const float weight = weights[row * length + s];
            float* const result = results + row * padded_dim;
            for_each_vector(dim, [&](Int i, int count) {
                store(result + i, load(result + i) + weight * load(value + i, count));
            });
        }
    }
}

template <typename T>
void decode_attention(Address q_, Address k_, Address v_, Address positions_, Address page_table_, Address y_,
                      Address scratch_, Int scratch_size, Int batch, Int queries, Int slots, Int q_heads,
                      Int kv_heads, Int dim, Int window, Int page_size, Int table_stride, Int q_row,
                      Int q_token, Int q_head, Int k_row, Int k_slot, Int k_head, Int v_row, Int v_slot,
                      Int v_head, int threads) {
    const T *q = pointer<const T>(q_), *k = pointer<const T>(k_), *v = pointer<const T>(v_);
    const Int* positions = pointer<const Int>(positions_);
    const std::int32_t* page_table = pointer<const std::int32_t>(page_table_);
    T* y = pointer<T>(y_);
    float* all_scratch = pointer<float>(scratch_);
    const Int group = q_heads / kv_heads, padded_dim = padded(dim, kWidth), all_rows = queries * group;
    const float scale = 1.0f / sqrtf(static_cast<float>(dim));

    for_each_piece(batch * kv_heads, threads, 1, [&](std::size_t unit, int thread) {
        const Int b = static_cast<Int>(unit) / kv_heads, kv_head = static_cast<Int>(unit) % kv_heads;
        const auto seen = [&](Int row) {  // by a row's query
            const Int position = positions[b * queries + row / group];
            const Int end = position < 0 ? 0 : position < slots ? position + 1 : slots;
            return Span{end > window ? end - window : 0, end};
        };
        const auto seen_by_any = [&](Int first, Int rows) {
            Span any{slots, 0};
            for (Int row = first; row < first + rows; ++row) {
                const Span one = seen(row);
                if (one.end > 0 && one.first < any.first) any.first = one.first;
                if (one.end > any.end) any.end = one.end;
            }
            return any.end > 0 ? any : Span{0, 0};
        };
        const auto place = [&](Int row) {  // of a row's query and result, in (tokens, heads)
            return (b * queries + row / group) * q_heads + kv_head * group + row % group;
        };
        const Span all = seen_by_any(0, all_rows);
        const Slots where{page_table == nullptr ? nullptr : page_table + b * table_stride, b, page_size};
        const Cache<T> keys{k + kv_head * k_head, k_row, k_slot}, values{v + kv_head * v_head, v_row, v_slot};

        const Int num_keys = padded(all.end, kTile);
        float* const scratch = all_scratch + thread * scratch_size;
        float* const packed_queries = scratch;
        float* const results = packed_queries + kTile * padded_dim;
        float* const rest = results + kTile * padded_dim;
        const auto pack_query = [&](Int row, Int first) {
            const T* query = q + b * q_row + row / group * q_token + (kv_head * group + row % group) * q_head;
            pack_row(packed_queries + (row - first) * padded_dim, query, dim, scale);
        };
        if (all_rows <= kFewRows) {
            Span spans[kFewRows];
            for (Int row = 0; row < all_rows; ++row) {
                pack_query(row, 0);
                spans[row] = seen(row);
            }
            attend_few(packed_queries, results, rest, spans, all_rows, all, dim, where, keys, values);
            for (Int row = 0; row < all_rows; ++row)
                unpack_row(y + place(row) * dim, results + row * padded_dim, dim, 1.0f);
            return;
        }
        float* const scores = rest;
        const Sums sums{results, scores + kTile * kTile, scores + kTile * kTile + kTile};
        float* const key_columns = scores + kTile * kTile + 2 * kTile;
        float* const value_rows = key_columns + num_keys * dim;
        const Int begin = all.first / kTile * kTile;  // of the first tile
        for (Int s = all.first; s < all.end; ++s) {
            pack_column(key_columns + s, num_keys, keys.at(where, s), dim);
            pack_row(value_rows + s * padded_dim, values.at(where, s), dim, 1.0f);
        }
        for (Int i = 0; i < dim; ++i) {
            clear(key_columns + i * num_keys + begin, all.first - begin);
            clear(key_columns + i * num_keys + all.end, num_keys - all.end);
        }
        clear(value_rows + begin * padded_dim, (all.first - begin) * padded_dim);
        clear(value_rows + all.end * padded_dim, (num_keys - all.end) * padded_dim);
        for (Int first = 0; first < all_rows; first += kTile) {
            const Int rows = all_rows - first < kTile ? all_rows - first : kTile;
            const Span here = seen_by_any(first, rows);
            clear(packed_queries, kTile * padded_dim);
            clear_sums(sums, padded_dim);
            for (Int row = first; row < first + rows; ++row) pack_query(row, first);
            for (Int s = here.first / kTile * kTile; s < here.end; s += kTile)
                attend(sums, packed_queries, key_columns + s, num_keys, value_rows + s * padded_dim, scores,
                       rows, dim, [&](Int row, Int& low, Int& high) {
                           const Span one = seen(first + row);
                           low = one.first - s;
                           high = one.end - s;
                       });
            for (Int row = 0; row < rows; ++row) write_result(y + place(first + row) * dim, sums, row, dim);
        }
    });
}

}  // namespace lumi::LUMI_TARGET

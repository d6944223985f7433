// Work on rows, in pieces that any thread may take.
#pragma once

#include "../pieces.h"
#include "vector.h"

namespace lumi::LUMI_TARGET {

constexpr Int kPieceElements = 1 << 14;

// Not more than the root of all rows: a sum of pieces' sums then loses few digits.
inline Int rows_of_piece(Int rows, Int dim) {
    Int size = 1;
    while (size * size < rows && (size + 1) * dim <= kPieceElements) ++size;
    return size;
}

inline Int num_pieces(Int rows, Int dim) {
    const Int size = rows_of_piece(rows, dim);
    return (rows + size - 1) / size;
}

// Calls body(row, piece) for each row; the rows of a piece follow each other on one thread.
template <typename Body>
inline void for_each_row(Int rows, Int dim, int threads, const Body& body) {
    const Int size = rows_of_piece(rows, dim);
    for_each_piece(num_pieces(rows, dim), threads, 1, [&](std::size_t piece, int) {
        const Int first = static_cast<Int>(piece) * size, end = first + size < rows ? first + size : rows;
        for (Int row = first; row < end; ++row) body(row, static_cast<Int>(piece));
    });
}

}  // namespace lumi::LUMI_TARGET

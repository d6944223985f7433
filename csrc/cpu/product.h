// Matrix products of tiles that lie in the cache.
#pragma once

#include "vector.h"

namespace lumi::LUMI_TARGET {

constexpr int kRows = 4;  // of the result, held in registers together with kColumns vectors of each
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kColumns = 4;  // 32 registers
#else
constexpr int kColumns = 2;  // 16 registers
#endif

// Element (i, j) is data[i * row + j * column].
struct Matrix {
    const float* data;
    Int row, column;
};

template <int kVectors>
inline void product_block(float* c, Int c_row, Matrix a, const float* b, Int b_row, Int depth, bool add) {
    Vec sums[kRows][kVectors] = {};
    for (Int k = 0; k < depth; ++k) {
        Vec columns[kVectors];
        for (int j = 0; j < kVectors; ++j) columns[j] = load(b + k * b_row + j * kWidth);
        for (int i = 0; i < kRows; ++i) {
            const float factor = a.data[i * a.row + k * a.column];
            for (int j = 0; j < kVectors; ++j) sums[i][j] += factor * columns[j];
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j) {
            float* const to = c + i * c_row + j * kWidth;
            store(to, add ? load(to) + sums[i][j] : sums[i][j]);  // sums of sums lose fewer digits
        }
}

// c = a . b, or c += a . b if `add`. rows is a multiple of kRows and columns one of kWidth.
inline void product(float* c, Int c_row, Matrix a, const float* b, Int b_row, Int rows, Int columns,
                    Int depth, bool add) {
    Int j = 0;
    for (; j + kColumns * kWidth <= columns; j += kColumns * kWidth)
        for (Int i = 0; i < rows; i += kRows)
            product_block<kColumns>(c + i * c_row + j, c_row, {a.data + i * a.row, a.row, a.column}, b + j,
                                    b_row, depth, add);
    for (; j < columns; j += kWidth)
        for (Int i = 0; i < rows; i += kRows)
            product_block<1>(c + i * c_row + j, c_row, {a.data + i * a.row, a.row, a.column}, b + j, b_row,
                             depth, add);
}

}  // namespace lumi::LUMI_TARGET

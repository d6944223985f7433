// y = x W^T for few rows of x. Reading W is what it costs; torch's product reads it at a fraction of the
// memory's rate. A row's result does not depend on the rows beside it.
#pragma once

#include "../pieces.h"
#include "vector.h"

namespace lumi::LUMI_TARGET {

constexpr Int kOutputsOfPiece = 64;
constexpr int kAhead = 8192;  // bytes: memory is slower to answer than a row is multiplied
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 16;  // 32 registers
#else
constexpr int kSums = 8;  // 16 registers
#endif

// kRows rows of x (rows, inputs) times kOutputs rows of W.
template <typename T, int kRows, int kOutputs>
LUMI_INLINE void dot_products(const float* x, const T* weight, T* y, Int inputs, Int outputs) {
    Vec sums[kRows][kOutputs] = {};
    for_each_vector(inputs, [&](Int i, int count) __attribute__((always_inline)) {
        Vec w[kOutputs];
        for (int o = 0; o < kOutputs; ++o) {
            const T* const from = weight + o * inputs + i;
            __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<Address>(from) + kAhead));
            w[o] = load(from, count);
        }
        for (int r = 0; r < kRows; ++r) {
            const Vec values = load(x + r * inputs + i, count);
            for (int o = 0; o < kOutputs; ++o) sums[r][o] += values * w[o];
        }
    });
    for (int r = 0; r < kRows; ++r)
        for (int o = 0; o < kOutputs; ++o) store(y + r * outputs + o, broadcast(sum(sums[r][o])), 1);
}

template <typename T, int kRows>
void few_rows(const float* x, const T* weight, T* y, Int inputs, Int outputs, Int first, Int end) {
    constexpr int kOutputs = kSums / kRows < 4 ? kSums / kRows : 4;
    Int o = first;
    for (; o + kOutputs <= end; o += kOutputs)
        dot_products<T, kRows, kOutputs>(x, weight + o * inputs, y + o, inputs, outputs);
    for (; o < end; ++o) dot_products<T, kRows, 1>(x, weight + o * inputs, y + o, inputs, outputs);
}

template <typename T>
void linear(Address x_, Address weight_, Address y_, Int rows, Int inputs, Int outputs, int threads) {
    const float* x = pointer<const float>(x_);
    const T* weight = pointer<const T>(weight_);
    T* y = pointer<T>(y_);
    const Int pieces = (outputs + kOutputsOfPiece - 1) / kOutputsOfPiece;
    for_each_piece(pieces, threads, 1, [&](std::size_t piece, int) {
        const Int first = static_cast<Int>(piece) * kOutputsOfPiece;
        const Int end = first + kOutputsOfPiece < outputs ? first + kOutputsOfPiece : outputs;
        Int row = 0;
        const auto take = [&](auto compute, Int count) {
            for (; row + count <= rows; row += count)
                compute(x + row * inputs, weight, y + row * outputs, inputs, outputs, first, end);
        };
        take(few_rows<T, 8>, 8);
        take(few_rows<T, 4>, 4);
        take(few_rows<T, 2>, 2);
        take(few_rows<T, 1>, 1);
    });
}

}  // namespace lumi::LUMI_TARGET

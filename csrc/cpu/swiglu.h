// SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202).
#pragma once

#include "rows.h"

namespace lumi::LUMI_TARGET {

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

template <typename T>
void swiglu(Address gate_, Address up_, Address y_, Int rows, Int dim, Int gate_stride, Int up_stride,
            int threads) {
    const T *gate = pointer<const T>(gate_), *up = pointer<const T>(up_);
    T* y = pointer<T>(y_);
    for_each_row(rows, dim, threads, [&](Int row, Int) {
        for_each_vector(dim, [&](Int i, int count) {
            const Vec g = load(gate + row * gate_stride + i, count),
                      u = load(up + row * up_stride + i, count);
            store(y + row * dim + i, g * sigmoid(g) * u, count);
        });
    });
}

template <typename T>
void swiglu_backward(Address dy_, Address gate_, Address up_, Address both_, Int rows, Int dim, Int dy_stride,
                     Int gate_stride, Int up_stride, int threads) {
    const T *dy = pointer<const T>(dy_), *gate = pointer<const T>(gate_), *up = pointer<const T>(up_);
    T* both = pointer<T>(both_);
    for_each_row(rows, dim, threads, [&](Int row, Int) {
        T *dgate = both + row * 2 * dim, *dup = dgate + dim;
        for_each_vector(dim, [&](Int i, int count) {
            const Vec d = load(dy + row * dy_stride + i, count),
                      g = load(gate + row * gate_stride + i, count);
            const Vec s = sigmoid(g), silu = g * s;
            store(dup + i, d * silu, count);
            const Vec u = load(up + row * up_stride + i, count);
            store(dgate + i, d * u * (s + silu * (1.0f - s)), count);
        });
    });
}

}  // namespace lumi::LUMI_TARGET

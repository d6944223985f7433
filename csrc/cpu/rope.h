// Rotary positions, half-split (Su et al. 2021, https://arxiv.org/abs/2104.09864).
#pragma once

#include "rows.h"

namespace lumi::LUMI_TARGET {

template <typename T>
void rope(Address x_, Address cos_, Address sin_, Address y_, Int tokens, Int heads, Int dim,
          Int token_stride, Int head_stride, float sign, int threads) {
    const T* x = pointer<const T>(x_);
    const float *cos = pointer<const float>(cos_), *sin = pointer<const float>(sin_);
    T* y = pointer<T>(y_);
    const Int half = dim / 2;
    for_each_row(tokens, heads * dim, threads, [&](Int token, Int) {
        for (Int head = 0; head < heads; ++head) {
            const T* from = x + token * token_stride + head * head_stride;
            T* to = y + (token * heads + head) * dim;
            for_each_vector(half, [&](Int i, int count) {
                const Vec c = load(cos + token * dim + i, count),
                          s = load(sin + token * dim + i, count) * sign;
                const Vec first = load(from + i, count), second = load(from + half + i, count);
                store(to + i, first * c - second * s, count);
                store(to + half + i, second * c + first * s, count);
            });
        }
    });
}

}  // namespace lumi::LUMI_TARGET

// RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467), with or without a sum before it.
#pragma once

#include <math.h>

#include "rows.h"

namespace lumi::LUMI_TARGET {

template <typename T>
void rms_norm(Address x_, Address residual_, Address weight_, Address total_, Address y_, Address rstd_,
              Int rows, Int dim, Int x_stride, Int residual_stride, float eps, int threads) {
    const T *x = pointer<const T>(x_), *residual = pointer<const T>(residual_);
    const float* weight = pointer<const float>(weight_);
    T *total = pointer<T>(total_), *y = pointer<T>(y_);
    float* rstd = pointer<float>(rstd_);
    for_each_row(rows, dim, threads, [&](Int row, Int) {
        const T* source = x + row * x_stride;
        if (residual != nullptr) {
            for_each_vector(dim, [&](Int i, int count) {
                const Vec added = load(residual + row * residual_stride + i, count);
                store(total + row * dim + i, load(source + i, count) + added, count);
            });
            source = total + row * dim;  // the norm is of the sum as it was rounded
        }
        const float squares = sum_of(dim, [&](Int i, int count) {
            const Vec values = load(source + i, count);
            return values * values;
        });
        const float scale = 1.0f / sqrtf(squares / static_cast<float>(dim) + eps);
        for_each_vector(dim, [&](Int i, int count) {
            store(y + row * dim + i, load(source + i, count) * scale * load(weight + i, count), count);
        });
        rstd[row] = scale;
    });
}

template <typename T>
void rms_norm_backward(Address dy_, Address dtotal_, Address x_, Address weight_, Address rstd_, Address dx_,
                       Address dweight_, Address partials_, Int rows, Int dim, Int dy_stride,
                       Int dtotal_stride, Int x_stride, int threads) {
    const T *dy = pointer<const T>(dy_), *dtotal = pointer<const T>(dtotal_), *x = pointer<const T>(x_);
    const float *weight = pointer<const float>(weight_), *rstd = pointer<const float>(rstd_);
    T* dx = pointer<T>(dx_);
    float *dweight = pointer<float>(dweight_), *partials = pointer<float>(partials_);
    const Int pieces = num_pieces(rows, dim);
    for (Int i = 0; i < pieces * dim; ++i) partials[i] = 0;
    for_each_row(rows, dim, threads, [&](Int row, Int piece) {
        const T *dy_row = dy + row * dy_stride, *x_row = x + row * x_stride;
        float* partial = partials + piece * dim;
        const float scale = rstd[row];
        const float products = sum_of(dim, [&](Int i, int count) {
            const Vec x_hat = load(x_row + i, count) * scale, gradient = load(dy_row + i, count);
            store(partial + i, load(partial + i, count) + gradient * x_hat, count);
            return gradient * load(weight + i, count) * x_hat;
        });
        const float mean = products / static_cast<float>(dim);
        for_each_vector(dim, [&](Int i, int count) {
            const Vec x_hat = load(x_row + i, count) * scale;
            Vec result = scale * (load(dy_row + i, count) * load(weight + i, count) - x_hat * mean);
            if (dtotal != nullptr) result += load(dtotal + row * dtotal_stride + i, count);
            store(dx + row * dim + i, result, count);
        });
    });
    for_each_vector(dim, [&](Int i, int count) {
        Vec total{};
        for (Int piece = 0; piece < pieces; ++piece) total += load(partials + piece * dim + i, count);
        store(dweight + i, total, count);
    });
}

inline Int rms_norm_pieces(Int rows, Int dim) { return num_pieces(rows, dim); }

}  // namespace lumi::LUMI_TARGET

// AdamW with decoupled weight decay (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) on gradients
// that are clipped as they are read. The update of one element is defined here once, for the CPU and for
// CUDA.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __CUDACC__
#define LUMI_HOST_DEVICE __host__ __device__
#else
#define LUMI_HOST_DEVICE
#endif

namespace lumi {

// One parameter with what belongs to it: contiguous memory of `size` elements each, owned by the caller.
// Nothing overlaps.
struct AdamWTensor {
    float* param;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    std::uint16_t* copy;  // the new parameter in bfloat16, or null
    float* step;          // one number: the updates so far
    std::size_t size;
    float weight_decay;
};

// The numbers of a step as they were given.
struct AdamWNumbers {
    double lr, beta1, beta2, eps;
};

// What all elements of all steps share, rounded once from double.
struct AdamWBetas {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;

    explicit AdamWBetas(const AdamWNumbers& numbers)
        : beta1(static_cast<float>(numbers.beta1)),
          one_minus_beta1(static_cast<float>(1.0 - numbers.beta1)),
          beta2(static_cast<float>(numbers.beta2)),
          one_minus_beta2(static_cast<float>(1.0 - numbers.beta2)),
          eps(static_cast<float>(numbers.eps)) {}
};

// What the elements of one tensor share in a step, rounded once from double.
struct AdamWScale {
    float factor;  // of the gradients; NaN: the step is skipped
    float decay;
    float step_size;   // lr / (1 - beta1^step)
    float root_scale;  // 1 / sqrt(1 - beta2^step)
};

// How gradients are scaled: their norm, still multiplied by loss_scale, is to be at most max_norm without it.
struct GradientClip {
    const double* norm;  // null: the gradients are not clipped
    double max_norm;
    double loss_scale;
};

// What gradients are multiplied by; NaN where the norm is not finite, which means that the step is skipped.
LUMI_HOST_DEVICE inline float clip_factor(const GradientClip& clip) {
    double factor = 1.0 / clip.loss_scale;
    if (clip.norm != nullptr) {
        const double norm = *clip.norm;
        if (!std::isfinite(norm)) return NAN;
        if (norm / clip.loss_scale > clip.max_norm) factor = clip.max_norm / norm;
    }
    return static_cast<float>(factor);
}

// Counts the step of one tensor, unless it is skipped, and scales it.
LUMI_HOST_DEVICE inline AdamWScale adamw_begin(float* step, float weight_decay, const AdamWNumbers& numbers,
                                               const GradientClip& clip) {
    const float factor = clip_factor(clip);
    if (std::isnan(factor)) return {factor, 0.0f, 0.0f, 0.0f};
    const double count = *step += 1.0f;
    return {factor, static_cast<float>(numbers.lr) * weight_decay,
            static_cast<float>(numbers.lr / (1.0 - pow(numbers.beta1, count))),
            static_cast<float>(1.0 / sqrt(1.0 - pow(numbers.beta2, count)))};
}

// The decay is part of the update, not a factor 1 - decay of the parameter: that factor loses most of the
// decay's digits.
LUMI_HOST_DEVICE inline void adamw_update(float& param, float grad, float& exp_avg, float& exp_avg_sq,
                                          const AdamWBetas& betas, const AdamWScale& scale) {
    const float g = grad * scale.factor;
    exp_avg = betas.beta1 * exp_avg + betas.one_minus_beta1 * g;
    exp_avg_sq = betas.beta2 * exp_avg_sq + betas.one_minus_beta2 * (g * g);
    param -= scale.decay * param +
             scale.step_size * (exp_avg / (sqrtf(exp_avg_sq) * scale.root_scale + betas.eps));
}

// Bits of the nearest bfloat16, ties to even; NaN stays NaN.
LUMI_HOST_DEVICE inline std::uint16_t to_bfloat16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// One step of all tensors, in place. Gradients are read only. If the norm is not finite, nothing is written.
// The result does not depend on max_threads (>= 1).
void adamw(const std::vector<AdamWTensor>& tensors, const AdamWNumbers& numbers, const GradientClip& clip,
           int max_threads);

// The same for tensors on a CUDA device: launches on `stream` (a cudaStream_t) and returns without waiting.
// clip.norm and every `step` are on the device too, and so is `scales`, scratch room for one of each tensor.
void adamw_cuda(const std::vector<AdamWTensor>& tensors, const AdamWNumbers& numbers,
                const GradientClip& clip, AdamWScale* scales, int device, void* stream);

}  // namespace lumi

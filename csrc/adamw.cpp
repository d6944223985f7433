// AdamW on the CPU: every element is updated by itself, so pieces may go to any thread.
#include "adamw.h"

#include <algorithm>

#include "pieces.h"

namespace lumi {
namespace {

struct Piece {
    const AdamWTensor* tensor;
    const AdamWScale* scale;
    std::size_t start;
};

LUMI_VECTOR_CLONES
void update(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
            float* __restrict exp_avg_sq, std::size_t size, const AdamWBetas betas, const AdamWScale scale) {
    for (std::size_t i = 0; i < size; ++i)
        adamw_update(param[i], grad[i], exp_avg[i], exp_avg_sq[i], betas, scale);
}

LUMI_VECTOR_CLONES
void round_to_bfloat16(const float* __restrict source, std::uint16_t* __restrict target, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) target[i] = to_bfloat16(source[i]);
}

}  // namespace

void adamw(const std::vector<AdamWTensor>& tensors, const AdamWNumbers& numbers, const GradientClip& clip,
           int max_threads) {
    if (std::isnan(clip_factor(clip))) return;
    std::vector<AdamWScale> scales;
    for (const AdamWTensor& tensor : tensors)
        scales.push_back(adamw_begin(tensor.step, tensor.weight_decay, numbers, clip));
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        for (std::size_t start = 0; start < tensors[i].size; start += kPieceSize)
            pieces.push_back({&tensors[i], &scales[i], start});
    }
    const AdamWBetas betas(numbers);
    for_each_piece(pieces.size(), max_threads, kPiecesPerThread, [&](std::size_t i, int) {
        const AdamWTensor& t = *pieces[i].tensor;
        const std::size_t start = pieces[i].start, size = std::min(kPieceSize, t.size - start);
        update(t.param + start, t.grad + start, t.exp_avg + start, t.exp_avg_sq + start, size, betas,
               *pieces[i].scale);
        // The piece is still in the cache.
        if (t.copy != nullptr) round_to_bfloat16(t.param + start, t.copy + start, size);
    });
}

}  // namespace lumi

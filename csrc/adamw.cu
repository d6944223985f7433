// AdamW on a CUDA device: one launch for each kCapacity tensors, after a small one that counts and scales the
// step of each tensor. Whether the step is skipped, and which number it has, the device alone knows.
// Parameters and running means are read once and written once; gradients are read once.
//
// The bits do not depend on where the tensors lie: setup.py turns the fusing of multiply and add off. nvcc
// might fuse in one of the two paths through the kernel and not in the other.
#include "adamw.h"

#include <algorithm>

#include "tensor_table.cuh"

namespace lumi {
namespace {

constexpr int kThreads = 256;
// All that sm_89 has room for. They leave each thread 40 registers.
constexpr int kBlocksPerMultiprocessor = 6;
constexpr int kChunkSize = 8192;  // 8 groups of four for each thread
constexpr int kCapacity = 480;

// An AdamWTensor of the kernel, which finds the scale of its step on the device.
struct Array {
    float* param;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    std::uint16_t* copy;
    const AdamWScale* scale;
    std::size_t size;
};
using Table = TensorTable<Array, kCapacity, kChunkSize>;

// As many tensors as one launch begins: one thread for each.
struct Begins {
    float* steps[kThreads];
    float weight_decays[kThreads];
    int count;
};

// The powers are in double. Doing them in every block of the update would cost more than reading the result.
__global__ void begin_kernel(const __grid_constant__ Begins begins,
                             const __grid_constant__ AdamWNumbers numbers,
                             const __grid_constant__ GradientClip clip, AdamWScale* scales) {
    const int i = threadIdx.x;
    if (i < begins.count) scales[i] = adamw_begin(begins.steps[i], begins.weight_decays[i], numbers, clip);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    adamw_kernel(const __grid_constant__ Table table, const __grid_constant__ AdamWBetas betas) {
    const int index = table.find(blockIdx.x);
    const Array& t = table.arrays[index];
    const AdamWScale scale = *t.scale;
    if (isnan(scale.factor)) return;
    const std::size_t start = table.start(blockIdx.x, index);
    const int count = static_cast<int>(min(static_cast<std::size_t>(kChunkSize), t.size - start));
    float* const param = t.param + start;
    const float* const grad = t.grad + start;
    float* const exp_avg = t.exp_avg + start;
    float* const exp_avg_sq = t.exp_avg_sq + start;
    std::uint16_t* const copy = t.copy == nullptr ? nullptr : t.copy + start;
    // One unaligned array sends the whole chunk through the scalar path. torch's allocations all start at a
    // 16-byte boundary.
    const bool aligned = is_aligned(param, 16) && is_aligned(grad, 16) && is_aligned(exp_avg, 16) &&
                         is_aligned(exp_avg_sq, 16) && is_aligned(copy, 8);

    for (int i = threadIdx.x * 4; i < count; i += kThreads * 4) {
        if (aligned && i + 4 <= count) {
            Group p = read4(param + i), m = read4(exp_avg + i), v = read4(exp_avg_sq + i);
            const Group g = read4(grad + i);
            for (int k = 0; k < 4; ++k)
                adamw_update(p.values[k], g.values[k], m.values[k], v.values[k], betas, scale);
            write4(param + i, p);
            write4(exp_avg + i, m);
            write4(exp_avg_sq + i, v);
            if (copy != nullptr) {
                *reinterpret_cast<ushort4*>(copy + i) =
                    make_ushort4(to_bfloat16(p.values[0]), to_bfloat16(p.values[1]), to_bfloat16(p.values[2]),
                                 to_bfloat16(p.values[3]));
            }
        } else {
            for (int k = i; k < min(i + 4, count); ++k) {
                adamw_update(param[k], grad[k], exp_avg[k], exp_avg_sq[k], betas, scale);
                if (copy != nullptr) copy[k] = to_bfloat16(param[k]);
            }
        }
    }
}

}  // namespace

void adamw_cuda(const std::vector<AdamWTensor>& tensors, const AdamWNumbers& numbers,
                const GradientClip& clip, AdamWScale* scales, int device, void* stream) {
    static_assert(sizeof(Table) + sizeof(AdamWBetas) <= kMaxArgumentBytes, "the arguments must fit");
    // This module has its own copy of the CUDA runtime, with its own current device.
    check_cuda(cudaSetDevice(device));
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    std::vector<Array> arrays;
    for (std::size_t first = 0; first < tensors.size(); first += kThreads) {
        Begins begins{};
        for (std::size_t i = first; i < std::min(first + kThreads, tensors.size()); ++i) {
            const AdamWTensor& t = tensors[i];
            begins.steps[begins.count] = t.step;
            begins.weight_decays[begins.count++] = t.weight_decay;
            arrays.push_back({t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.copy, scales + i, t.size});
        }
        begin_kernel<<<1, kThreads, 0, cuda_stream>>>(begins, numbers, clip, scales + first);
        check_cuda(cudaGetLastError());
    }
    const AdamWBetas betas(numbers);
    for_each_table<Array, kCapacity, kChunkSize>(arrays, [&](const Table& table, int chunks, std::size_t) {
        adamw_kernel<<<chunks, kThreads, 0, cuda_stream>>>(table, betas);
        check_cuda(cudaGetLastError());
    });
}

}  // namespace lumi

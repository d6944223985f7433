// L2 norm on a CUDA device, in two stages of a fixed order: a block sums the squares of one chunk, then one
// block sums the blocks' sums.
//
// Sums are in double: the square of a float is exact there and cannot overflow (at most 1.2e77). The relative
// error of a sum of n squares is at most n * 2^-53. That takes two double instructions per 4 bytes read.
// Reading takes longer than that on data-center parts, and about as long on sm_89, which does two of them per
// clock and multiprocessor.
#include <cmath>

#include "global_norm.h"
#include "tensor_table.cuh"

namespace lumi {
namespace {

constexpr int kThreads = 256;
constexpr int kFinishThreads = 1024;
constexpr int kChunkSize = 16384;  // 64 KiB: 16 groups of four for each thread
constexpr int kCapacity = 1024;
using Table = TensorTable<FloatArray, kCapacity, kChunkSize>;

// The sum over the block, in thread 0, in an order that depends on kBlock alone.
template <int kBlock>
__device__ double block_sum(double value) {
    __shared__ double warp_sums[kBlock / 32];
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x == 0) {
        for (int warp = 0; warp < kBlock / 32; ++warp) sum += warp_sums[warp];
    }
    return sum;
}

// Thread t takes the groups of four elements t, t + kThreads, ... whether or not a group can be read at once.
// So the order of the sum is the same wherever the array lies.
__global__ void __launch_bounds__(kThreads)
    partial_norm_kernel(const __grid_constant__ Table table, double* partials) {
    const int index = table.find(blockIdx.x);
    const FloatArray array = table.arrays[index];
    const std::size_t start = table.start(blockIdx.x, index);
    const float* data = array.data + start;
    const int count = static_cast<int>(min(static_cast<std::size_t>(kChunkSize), array.size - start));
    const bool aligned = is_aligned(data, sizeof(float4));

    double sums[4] = {};
#pragma unroll 4
    for (int i = threadIdx.x * 4; i < count; i += kThreads * 4) {
        Group group;
        if (aligned && i + 4 <= count) {
            group = read4(data + i);
        } else {
            for (int k = 0; k < 4; ++k) group.values[k] = i + k < count ? data[i + k] : 0.0f;
        }
        for (int k = 0; k < 4; ++k) {
            const double x = group.values[k];
            sums[k] = fma(x, x, sums[k]);  // one instruction; the square is exact, so it rounds as two would
        }
    }
    const double sum = block_sum<kThreads>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kFinishThreads)
    finish_norm_kernel(const double* partials, std::size_t num_partials, double* norm) {
    double sum = 0.0;
#pragma unroll 4
    for (std::size_t i = threadIdx.x; i < num_partials; i += kFinishThreads) sum += partials[i];
    sum = block_sum<kFinishThreads>(sum);
    if (threadIdx.x == 0) *norm = sqrt(sum);
}

}  // namespace

std::size_t global_norm_num_partials(const std::vector<std::size_t>& sizes) {
    std::size_t count = 0;
    for (const std::size_t size : sizes) count += num_chunks<kChunkSize>(size);
    return count;
}

void global_norm_cuda(const std::vector<FloatArray>& arrays, double* norm, double* partials, int device,
                      void* stream) {
    // This module has its own copy of the CUDA runtime, with its own current device.
    check_cuda(cudaSetDevice(device));
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const auto launch = [&](const Table& table, int chunks, std::size_t before) {
        partial_norm_kernel<<<chunks, kThreads, 0, cuda_stream>>>(table, partials + before);
        check_cuda(cudaGetLastError());
    };
    const std::size_t num_partials = for_each_table<FloatArray, kCapacity, kChunkSize>(arrays, launch);
    finish_norm_kernel<<<1, kFinishThreads, 0, cuda_stream>>>(partials, num_partials, norm);
    check_cuda(cudaGetLastError());
}

}  // namespace lumi

// Kernels with one fault each, and without. `faults NAME` runs one of them: what the sanitizers must find.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <vector>

namespace {

constexpr int kThreads = 64, kBlocks = 3;
constexpr const char* kNames[] = {"none",       "read beyond",     "write beyond",    "shared beyond",
                                  "no barrier", "barrier of some", "shuffle of some", "shuffle as barrier",
                                  "misaligned", "blocks collide",  "block too large"};
enum Fault {
    kNone, kReadBeyond, kWriteBeyond, kSharedBeyond,
    kNoBarrier, kBarrierOfSome, kShuffleOfSome, kShuffleAsBarrier,
    kMisaligned, kBlocksCollide, kBlockTooLarge
};

// Each block reverses its part of the source, and adds to each element that of the next lane, or itself where
// there is none.
__global__ void __launch_bounds__(kThreads)
    reverse_kernel(const float* source, float* target, int count, const __grid_constant__ Fault fault) {
    __shared__ float part[kThreads];
    const int thread = threadIdx.x, i = blockIdx.x * kThreads + thread;
    if (fault == kBarrierOfSome && thread == 0) return;
    if (i < count || fault == kReadBeyond) part[thread + (fault == kSharedBeyond)] = source[i];
    if (fault == kShuffleAsBarrier) {
        __shfl_down_sync(0xffffffffu, 0, 1);
    } else if (fault != kNoBarrier) {
        __syncthreads();
    }
    if (fault == kShuffleOfSome && thread == 33) return;
    const float value = part[kThreads - 1 - thread];
    const float sum = value + __shfl_down_sync(0xffffffffu, value, 1);
    if (i < count || fault == kWriteBeyond) target[fault == kBlocksCollide ? thread : i] = sum;
}

__global__ void copy_kernel(const float* source, float* target) {
    const float4 four = reinterpret_cast<const float4*>(source)[threadIdx.x];
    reinterpret_cast<float4*>(target)[threadIdx.x] = make_float4(four.x, four.y, four.z, four.w);
}

bool is_right(const std::vector<float>& source, const std::vector<float>& target) {
    for (int i = 0; i < (kBlocks - 1) * kThreads; ++i) {  // the last block may lack an element
        const int thread = i % kThreads, from = i - thread + kThreads - 1 - thread;
        if (target[i] != source[from] + source[thread % 32 == 31 ? from : from - 1]) return false;
    }
    return true;
}

}  // namespace

int main(int, char** arguments) {
    int fault = 0;
    while (std::strcmp(kNames[fault], arguments[1]) != 0) ++fault;
    const int count = kBlocks * kThreads - (fault == kReadBeyond || fault == kWriteBeyond);
    std::vector<float> source(count), target(count), copy(count);
    for (int i = 0; i < count; ++i) source[i] = i + 1.0f;
    const int threads = fault == kBlockTooLarge ? 2048 : kThreads;
    reverse_kernel<<<kBlocks, threads, 0, nullptr>>>(source.data(), target.data(), count,
                                                     static_cast<Fault>(fault));
    const cudaError_t error = cudaGetLastError();
    copy_kernel<<<1, 8, 0, nullptr>>>(source.data() + (fault == kMisaligned), copy.data());
    const bool right = is_right(source, target) && copy[0] == source[0] && copy[31] == source[31];
    std::printf("%s, %s\n", cudaGetErrorString(error), right ? "right" : "wrong");
    return right ? 0 : 1;
}

// Stands in for CUDA's header of this name where csrc/*.cu are compiled for the CPU, so that sanitizers can
// watch the kernels run. It has what those files use and no more. tests/cuda_on_cpu.py rewrites the syntax
// that C++ lacks. threads.cpp is the device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
// Blocks run one after the other, each in a new thread of the system. Under ThreadSanitizer a block has its
// own shared memory: the next block's writes into the same would be a race. Under AddressSanitizer it is
// static, because only that has guards around it.
#ifdef __SANITIZE_THREAD__
#define __shared__ static thread_local
#else
#define __shared__ static
#endif

using std::isnan;
using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Aligned as on the device: UndefinedBehaviorSanitizer reports an access at another address.
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) ushort4 {
    unsigned short x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) {
    return {x, y, z, w};
}

using cudaStream_t = struct CudaStream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInsufficientDriver = 35 };
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError();

extern dim3 threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();

namespace cuda_on_cpu {

// Runs kernel() once for each thread of each block and returns when all are done.
void run(dim3 grid, dim3 block, const std::function<void()>& kernel);

// The bits that the warp's lane `source` gave to the same call; its own where there is no such lane. All
// lanes of the warp must call.
std::uint64_t exchange(unsigned mask, std::uint64_t bits, unsigned source);

unsigned lane();

// kernel<<<grid, block, shared_bytes, stream>>> without its arguments. There is one stream; nothing overlaps.
template <typename... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t, cudaStream_t) {
    return [=](const std::decay_t<Parameters>&... arguments) {
        run(grid, block, [&] { kernel(arguments...); });
    };
}

}  // namespace cuda_on_cpu

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t), "a lane gives at most 8 bytes");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = cuda_on_cpu::exchange(mask, bits, cuda_on_cpu::lane() + offset);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

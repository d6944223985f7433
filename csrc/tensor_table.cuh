// Many arrays in one launch. Their addresses travel as an argument of the kernel. The driver copies arguments
// when a kernel is launched or captured into a graph. So there is no staging buffer to guard, no copy to wait
// for and no race with the step before, although gradients have new addresses in every step. From CUDA 12.1
// on a kernel may have 32,764 bytes of arguments; more arrays than that take more launches.
//
// Arrays are cut into chunks, one block each. A block finds its array by binary search among the numbers of
// the arrays' first chunks.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

namespace lumi {

constexpr std::size_t kMaxArgumentBytes = 32764;

// Array has a member `size`, in elements.
template <typename Array, int kCapacity, int kChunkSize>
struct TensorTable {
    Array arrays[kCapacity];
    int first_chunks[kCapacity];
    int num_arrays;

    // Which array a chunk belongs to.
    __device__ int find(int chunk) const {
        int low = 0;
        for (int high = num_arrays; high - low > 1;) {
            const int middle = (low + high) / 2;
            if (first_chunks[middle] <= chunk) {
                low = middle;
            } else {
                high = middle;
            }
        }
        return low;
    }

    // The chunk's first element in its array `index`.
    __device__ std::size_t start(int chunk, int index) const {
        return static_cast<std::size_t>(chunk - first_chunks[index]) * kChunkSize;
    }
};

template <int kChunkSize>
std::size_t num_chunks(std::size_t size) {
    return (size + kChunkSize - 1) / kChunkSize;
}

// Calls launch(table, its chunks, chunks before it) for as many tables as the arrays need, and returns the
// number of all chunks. Empty arrays are left out.
template <typename Array, int kCapacity, int kChunkSize, typename Launch>
std::size_t for_each_table(const std::vector<Array>& arrays, const Launch& launch) {
    using Table = TensorTable<Array, kCapacity, kChunkSize>;
    static_assert(sizeof(Table) <= kMaxArgumentBytes, "a table must fit into a kernel's arguments");
    Table table{};
    std::size_t chunks = 0, before = 0;
    const auto flush = [&] {
        if (table.num_arrays > 0) launch(table, static_cast<int>(chunks), before);
        before += chunks;
        chunks = 0;
        table.num_arrays = 0;
    };
    for (const Array& array : arrays) {
        if (array.size == 0) continue;
        if (table.num_arrays == kCapacity) flush();
        table.arrays[table.num_arrays] = array;
        table.first_chunks[table.num_arrays++] = static_cast<int>(chunks);
        chunks += num_chunks<kChunkSize>(array.size);
    }
    flush();
    return before;
}

inline void check_cuda(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::string message = std::string("CUDA: ") + cudaGetErrorString(error);
    if (error == cudaErrorInsufficientDriver)
        message += "; install Lumi with an nvcc no newer than the driver, or with LUMI_CUDA=0";
    throw std::runtime_error(message);
}

inline __device__ bool is_aligned(const void* pointer, std::size_t bytes) {
    return reinterpret_cast<std::size_t>(pointer) % bytes == 0;
}

// Four neighbours, read and written at once where they lie at a 16-byte boundary.
struct Group {
    float values[4];
};

inline __device__ Group read4(const float* pointer) {
    const float4 four = *reinterpret_cast<const float4*>(pointer);
    return {{four.x, four.y, four.z, four.w}};
}

inline __device__ void write4(float* pointer, const Group& group) {
    *reinterpret_cast<float4*>(pointer) =
        make_float4(group.values[0], group.values[1], group.values[2], group.values[3]);
}

}  // namespace lumi

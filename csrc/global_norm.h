// L2 norm of many float arrays taken as one vector.
#pragma once

#include <cstddef>
#include <vector>

namespace lumi {

// Contiguous float32 memory owned by the caller, who keeps it alive and unchanged during the call.
struct FloatArray {
    const float* data;
    std::size_t size;
};

// sqrt(sum of squares), summed in double. The result depends on the arrays' sizes and contents, never on
// max_threads (>= 1).
double global_norm(const std::vector<FloatArray>& arrays, int max_threads);

// The same for arrays on a CUDA device: launches on `stream` (a cudaStream_t) and returns without waiting.
// The result goes to `norm`; `partials` is scratch room for global_norm_num_partials doubles. Both are on the
// device. The result depends on the arrays' sizes and contents, not on their addresses.
void global_norm_cuda(const std::vector<FloatArray>& arrays, double* norm, double* partials, int device,
                      void* stream);
std::size_t global_norm_num_partials(const std::vector<std::size_t>& sizes);

}  // namespace lumi

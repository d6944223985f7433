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

// sqrt(sum of squares), summed in double. The result depends on the arrays' sizes and contents, never on max_threads (>= 1).
double global_norm(const std::vector<FloatArray>& arrays, int max_threads);

}  // namespace lumi

// Python names of the operators in this folder. No logic here: arguments are checked, the lock is released, the operator is called.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "global_norm.h"

namespace py = pybind11;

namespace {

double global_norm(const std::vector<std::uintptr_t>& pointers, const std::vector<std::size_t>& sizes, int max_threads) {
    if (pointers.size() != sizes.size()) throw std::invalid_argument("pointers and sizes must have the same length");
    if (max_threads < 1) throw std::invalid_argument("max_threads must be at least 1");
    std::vector<lumi::FloatArray> arrays;
    arrays.reserve(pointers.size());
    for (std::size_t i = 0; i < pointers.size(); ++i) {
        if (pointers[i] == 0 && sizes[i] != 0) throw std::invalid_argument("a null pointer must have size 0");
        arrays.push_back({reinterpret_cast<const float*>(pointers[i]), sizes[i]});
    }
    py::gil_scoped_release release;
    return lumi::global_norm(arrays, max_threads);
}

}  // namespace

PYBIND11_MODULE(_csrc, m) {
    m.doc() = "Lumi's C++ operators. They take raw addresses; lumi.kernels holds their public, validating faces.";
    m.def("global_norm", &global_norm, py::arg("pointers"), py::arg("sizes"), py::arg("max_threads"),
          "L2 norm of contiguous float32 arrays, given as addresses and element counts, summed in double.");
}

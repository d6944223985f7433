// Python names of the operators in this folder. This file turns lists from Python into tables of pointers,
// refuses what would make the operators read out of bounds (lengths that differ, null pointers), and releases
// the interpreter's lock. It has no logic of the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "adamw.h"
#include "cpu/operators.h"
#include "global_norm.h"

namespace py = pybind11;

namespace {

using Addresses = std::vector<std::uintptr_t>;
using Sizes = std::vector<std::size_t>;

template <typename T>
T* pointer(std::uintptr_t address, std::size_t size = 1) {
    if (address == 0 && size != 0) throw std::invalid_argument("a null pointer must have size 0");
    return reinterpret_cast<T*>(address);
}

void check_threads(int max_threads) {
    if (max_threads < 1) throw std::invalid_argument("max_threads must be at least 1");
}

std::vector<lumi::FloatArray> float_arrays(const Addresses& pointers, const Sizes& sizes) {
    if (pointers.size() != sizes.size())
        throw std::invalid_argument("pointers and sizes must have the same length");
    std::vector<lumi::FloatArray> arrays;
    arrays.reserve(pointers.size());
    for (std::size_t i = 0; i < pointers.size(); ++i)
        arrays.push_back({pointer<const float>(pointers[i], sizes[i]), sizes[i]});
    return arrays;
}

double global_norm(const Addresses& pointers, const Sizes& sizes, int max_threads) {
    const auto arrays = float_arrays(pointers, sizes);
    check_threads(max_threads);
    py::gil_scoped_release release;
    return lumi::global_norm(arrays, max_threads);
}

// The tables that both devices' AdamW take, as Python hands them over.
struct AdamWArguments {
    std::vector<lumi::AdamWTensor> tensors;
    lumi::AdamWNumbers numbers;
    lumi::GradientClip clip;

    AdamWArguments(const Addresses& params, const Addresses& grads, const Addresses& exp_avgs,
                   const Addresses& exp_avg_sqs, const Addresses& steps, const Addresses& copies,
                   const Sizes& sizes, const std::vector<float>& weight_decays, double lr, double beta1,
                   double beta2, double eps, std::uintptr_t norm, double max_norm, double loss_scale)
        : numbers{lr, beta1, beta2, eps},
          clip{reinterpret_cast<const double*>(norm), max_norm, loss_scale} {
        for (const std::size_t length :
             {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), steps.size(), sizes.size(),
              weight_decays.size()}) {
            if (length != params.size()) throw std::invalid_argument("all lists must have the same length");
        }
        if (!copies.empty() && copies.size() != params.size())
            throw std::invalid_argument("copies must be empty or one for each tensor");
        tensors.reserve(params.size());
        for (std::size_t i = 0; i < params.size(); ++i) {
            tensors.push_back({pointer<float>(params[i], sizes[i]), pointer<const float>(grads[i], sizes[i]),
                               pointer<float>(exp_avgs[i], sizes[i]),
                               pointer<float>(exp_avg_sqs[i], sizes[i]),
                               copies.empty() ? nullptr : pointer<std::uint16_t>(copies[i], sizes[i]),
                               pointer<float>(steps[i]), sizes[i], weight_decays[i]});
        }
    }
};

void adamw(const AdamWArguments& arguments, int max_threads) {
    check_threads(max_threads);
    py::gil_scoped_release release;
    lumi::adamw(arguments.tensors, arguments.numbers, arguments.clip, max_threads);
}

#ifdef LUMI_HAS_CPU
// A module with the operators of one target on activations of one type. Addresses and sizes are not checked
// here.
py::module_ cpu_module(py::module_& m, const lumi::CpuOperators& operators, const std::string& type) {
    const std::string name = std::string("cpu_") + operators.target + "_" + type;
    py::module_ table =
        m.def_submodule(name.c_str(), "Operators of csrc/cpu; operators.h says what they take.");
    table.attr("target") = operators.target;
    const py::call_guard<py::gil_scoped_release> release;
    table.def("rms_norm", operators.rms_norm, release);
    table.def("rms_norm_backward", operators.rms_norm_backward, release);
    table.def("rms_norm_pieces", operators.rms_norm_pieces);
    table.def("swiglu", operators.swiglu, release);
    table.def("swiglu_backward", operators.swiglu_backward, release);
    table.def("rope", operators.rope, release);
    table.def("linear", operators.linear, release);
    table.def("cross_entropy", operators.cross_entropy, release);
    table.def("cross_entropy_scratch", operators.cross_entropy_scratch);
    table.def("attention", operators.attention, release);
    table.def("attention_backward", operators.attention_backward, release);
    table.def("attention_scratch", operators.attention_scratch);
    table.def("decode_attention", operators.decode_attention, release);
    table.def("decode_scratch", operators.decode_scratch);
    return table;
}
#endif

#ifdef LUMI_HAS_CUDA
void global_norm_cuda(const Addresses& pointers, const Sizes& sizes, std::uintptr_t norm,
                      std::uintptr_t partials, int device, std::uintptr_t stream) {
    const auto arrays = float_arrays(pointers, sizes);
    double* const sums = pointer<double>(partials, lumi::global_norm_num_partials(sizes));
    py::gil_scoped_release release;
    lumi::global_norm_cuda(arrays, pointer<double>(norm), sums, device, reinterpret_cast<void*>(stream));
}

void adamw_cuda(const AdamWArguments& arguments, std::uintptr_t scales, int device, std::uintptr_t stream) {
    auto* const room = pointer<lumi::AdamWScale>(scales, arguments.tensors.size());
    py::gil_scoped_release release;
    lumi::adamw_cuda(arguments.tensors, arguments.numbers, arguments.clip, room, device,
                     reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_csrc, m) {
    m.doc() =
        "Lumi's C++ and CUDA operators. They take raw addresses; lumi.kernels holds their public, validating "
        "faces.";
    m.def("global_norm", &global_norm, py::arg("pointers"), py::arg("sizes"), py::arg("max_threads"),
          "L2 norm of contiguous float32 arrays, given as addresses and element counts, summed in double.");
    py::class_<AdamWArguments>(
        m, "AdamWArguments",
        "The tensors of one AdamW step, as addresses and element counts, and its numbers.")
        .def(py::init<const Addresses&, const Addresses&, const Addresses&, const Addresses&,
                      const Addresses&, const Addresses&, const Sizes&, const std::vector<float>&, double,
                      double, double, double, std::uintptr_t, double, double>(),
             py::kw_only(), py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
             py::arg("steps"), py::arg("copies"), py::arg("sizes"), py::arg("weight_decays"), py::arg("lr"),
             py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("norm"),
             py::arg("max_norm"), py::arg("loss_scale"));
    m.def("adamw", &adamw, py::arg("arguments"), py::arg("max_threads"),
          "One AdamW step in place, with clipping, on the CPU.");
    py::list cpu_targets;  // pairs of modules, for float32 and bfloat16; of the best target first
#ifdef LUMI_HAS_CPU
    for (const lumi::CpuOperators* tables : lumi::cpu_targets())
        cpu_targets.append(
            py::make_tuple(cpu_module(m, tables[0], "float32"), cpu_module(m, tables[1], "bfloat16")));
#endif
    m.attr("cpu_targets") = cpu_targets;
#ifdef LUMI_HAS_CUDA
    m.attr("has_cuda") = true;
    m.def("global_norm_cuda", &global_norm_cuda, py::arg("pointers"), py::arg("sizes"), py::arg("norm"),
          py::arg("partials"), py::arg("device"), py::arg("stream"),
          "global_norm of arrays on a CUDA device; the double result is left at `norm` there.");
    m.def("global_norm_num_partials", &lumi::global_norm_num_partials, py::arg("sizes"),
          "How many doubles global_norm_cuda's `partials` holds.");
    m.def("adamw_cuda", &adamw_cuda, py::arg("arguments"), py::arg("scales"), py::arg("device"),
          py::arg("stream"),
          "One AdamW step in place, with clipping, on a CUDA device; at `scales` there is room for four "
          "floats of each tensor.");
#else
    m.attr("has_cuda") = false;
#endif
}

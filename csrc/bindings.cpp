// Python names of the operators in this folder. No logic here.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_csrc, m) { m.doc() = "Lumi's C++ operators."; }

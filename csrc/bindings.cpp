// The Python module interlace._C: one function per compiled op, on raw pointers.
//
// Tensors are checked in interlace/ops/<op>.py, where their dtypes, shapes and lifetimes are known.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "cpu/layer_similarity.h"

namespace py = pybind11;

namespace {

template <class T>
T* as_pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void layer_similarity(const std::vector<std::uintptr_t>& states,
                      const std::vector<std::int64_t>& row_strides, int dtype,
                      std::uintptr_t groups, std::int64_t num_tokens, std::int64_t width,
                      std::int64_t num_groups, std::int64_t max_offset, std::uintptr_t sums,
                      std::uintptr_t counts, int num_threads, int max_lanes) {
  std::vector<const void*> pointers;
  for (const std::uintptr_t state : states) pointers.push_back(as_pointer<const void>(state));
  interlace::layer_similarity({
      pointers.data(),
      row_strides.data(),
      static_cast<interlace::DType>(dtype),
      as_pointer<const std::int32_t>(groups),
      static_cast<std::int64_t>(states.size()),
      num_tokens,
      width,
      num_groups,
      max_offset,
      as_pointer<float>(sums),
      as_pointer<std::int64_t>(counts),
      num_threads,
      max_lanes,
  });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of interlace.";
#if defined(INTERLACE_CUDA)
  module.attr("cuda_architectures") = INTERLACE_CUDA;
#endif
  module.def("layer_similarity", &layer_similarity, py::kw_only(), py::arg("states"),
             py::arg("row_strides"), py::arg("dtype"), py::arg("groups"), py::arg("num_tokens"),
             py::arg("width"), py::arg("num_groups"), py::arg("max_offset"), py::arg("sums"),
             py::arg("counts"), py::arg("num_threads"), py::arg("max_lanes"),
             py::call_guard<py::gil_scoped_release>());
}

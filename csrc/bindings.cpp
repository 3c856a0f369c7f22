// The Python module interlace._C: one function per compiled op, on raw pointers.
//
// Tensors are checked in interlace/ops/<op>.py, where their dtypes, shapes and lifetimes are known.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "cpu/bridge_norm.h"
#include "cpu/layer_similarity.h"

#if defined(INTERLACE_CUDA)
#include "cuda/bridge_norm.h"
#endif

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

interlace::Parameter as_parameter(std::uintptr_t address, int dtype) {
  return {as_pointer<const void>(address), static_cast<interlace::DType>(dtype)};
}

// Adds a function with the arguments that bridge_norm has everywhere, and others.
template <class... Others, class Run, class... Names>
void define_bridge_norm(py::module_& module, const char* name, const Run& run, Names... names) {
  using std::int64_t, std::uintptr_t;
  const auto called = [run](uintptr_t x, uintptr_t residual, int64_t x_stride,
                            int64_t residual_stride, int dtype, uintptr_t weight, int weight_dtype,
                            uintptr_t bias, int bias_dtype, uintptr_t scale, int scale_dtype,
                            int64_t scale_size, int64_t num_rows, int64_t width, double eps,
                            bool is_layer_norm, uintptr_t normed, uintptr_t new_residual,
                            uintptr_t rstd, uintptr_t mean, Others... others) {
    const interlace::BridgeNormArgs args{
        as_pointer<const void>(x),
        as_pointer<const void>(residual),
        x_stride,
        residual_stride,
        static_cast<interlace::DType>(dtype),
        as_parameter(weight, weight_dtype),
        as_parameter(bias, bias_dtype),
        as_parameter(scale, scale_dtype),
        scale_size,
        num_rows,
        width,
        static_cast<float>(eps),
        is_layer_norm,
        as_pointer<void>(normed),
        as_pointer<void>(new_residual),
        as_pointer<float>(rstd),
        as_pointer<float>(mean),
    };
    run(args, others...);
  };
  module.def(name, called, py::kw_only(), py::arg("x"), py::arg("residual"), py::arg("x_stride"),
             py::arg("residual_stride"), py::arg("dtype"), py::arg("weight"),
             py::arg("weight_dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("scale"),
             py::arg("scale_dtype"), py::arg("scale_size"), py::arg("num_rows"), py::arg("width"),
             py::arg("eps"), py::arg("is_layer_norm"), py::arg("normed"), py::arg("new_residual"),
             py::arg("rstd"), py::arg("mean"), py::arg(names)...,
             py::call_guard<py::gil_scoped_release>());
}

void bridge_norm(const interlace::BridgeNormArgs& args, std::uintptr_t down, std::uintptr_t up,
                 std::int64_t rank, int num_threads, int max_lanes) {
  const interlace::LowRank low{as_pointer<const void>(down), as_pointer<const void>(up), rank};
  interlace::bridge_norm(args, low, num_threads, max_lanes);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of interlace.";
  module.def("layer_similarity", &layer_similarity, py::kw_only(), py::arg("states"),
             py::arg("row_strides"), py::arg("dtype"), py::arg("groups"), py::arg("num_tokens"),
             py::arg("width"), py::arg("num_groups"), py::arg("max_offset"), py::arg("sums"),
             py::arg("counts"), py::arg("num_threads"), py::arg("max_lanes"),
             py::call_guard<py::gil_scoped_release>());
  define_bridge_norm<std::uintptr_t, std::uintptr_t, std::int64_t, int, int>(
      module, "bridge_norm", &bridge_norm, "down", "up", "rank", "num_threads", "max_lanes");
#if defined(INTERLACE_CUDA)
  define_bridge_norm<int, std::uintptr_t>(module, "bridge_norm_cuda", &interlace::bridge_norm_cuda,
                                          "device", "stream");
#endif
}

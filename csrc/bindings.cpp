// The Python module interlace._C: one function per compiled op, on raw pointers.
//
// Tensors are checked in interlace/ops/<op>.py, where their dtypes, shapes and lifetimes are known.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cpu/bridge_norm.h"
#include "cpu/layer_similarity.h"
#include "cpu/ragged_attention.h"
#include "cpu/ragged_decode.h"
#if defined(INTERLACE_CUDA)
#include "cuda/bridge_norm.h"
#include "cuda/layer_similarity.h"
#include "cuda/ragged_decode.h"
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

// Strides from token to token and from head to head.
using TokenStrides = std::array<std::int64_t, 2>;

void ragged_attention(int dtype, std::uintptr_t q, const TokenStrides& q_strides, std::uintptr_t k,
                      const TokenStrides& k_strides, std::uintptr_t v,
                      const TokenStrides& v_strides, std::uintptr_t gate, std::uintptr_t q_tokens,
                      std::uintptr_t kv_tokens, const std::vector<std::int64_t>& q_start,
                      std::int64_t num_sequences, std::int64_t num_queries, std::int64_t width,
                      std::int64_t before, std::int64_t behind, double scale, std::uintptr_t out,
                      std::uintptr_t lse, int num_threads, int max_lanes) {
  interlace::ragged_attention({
      static_cast<interlace::DType>(dtype),
      as_pointer<const void>(q),
      q_strides[0],
      q_strides[1],
      as_pointer<const void>(k),
      k_strides[0],
      k_strides[1],
      as_pointer<const void>(v),
      v_strides[0],
      v_strides[1],
      as_pointer<const float>(gate),
      as_pointer<const std::int32_t>(q_tokens),
      as_pointer<const std::int32_t>(kv_tokens),
      q_start.data(),
      num_sequences,
      num_queries,
      static_cast<std::int64_t>(q_start.size()) - 1,
      width,
      before,
      behind,
      static_cast<float>(scale),
      as_pointer<void>(out),
      as_pointer<float>(lse),
      num_threads,
      max_lanes,
  });
}

using Strides = std::array<std::int64_t, 3>;

void ragged_decode(int dtype, std::uintptr_t q, const Strides& q_strides, std::uintptr_t k,
                   const Strides& k_strides, std::uintptr_t v, const Strides& v_strides,
                   std::uintptr_t lengths, std::uintptr_t starts, std::uintptr_t block_table,
                   std::int64_t table_stride, std::int64_t block_size,
                   const std::vector<std::int64_t>& q_start, std::int64_t num_sequences,
                   std::int64_t num_tokens, std::int64_t width, std::int64_t window, double scale,
                   std::uintptr_t gate, std::uintptr_t out, int num_threads, int max_lanes) {
  interlace::ragged_decode({
      static_cast<interlace::DType>(dtype),
      as_pointer<const void>(q),
      q_strides[0],
      q_strides[1],
      q_strides[2],
      as_pointer<const void>(k),
      k_strides[0],
      k_strides[1],
      k_strides[2],
      as_pointer<const void>(v),
      v_strides[0],
      v_strides[1],
      v_strides[2],
      as_pointer<const std::int32_t>(lengths),
      as_pointer<const std::int32_t>(starts),
      as_pointer<const std::int32_t>(block_table),
      table_stride,
      block_size,
      q_start.data(),
      num_sequences,
      num_tokens,
      q_start.back(),
      static_cast<std::int64_t>(q_start.size()) - 1,
      width,
      window,
      static_cast<float>(scale),
      as_pointer<const float>(gate),
      as_pointer<void>(out),
      num_threads,
      max_lanes,
  });
}

#if defined(INTERLACE_CUDA)
// Returns the bytes of scratch memory that it needs; without any it does nothing else.
std::int64_t layer_similarity_cuda(const std::vector<std::uintptr_t>& states,
                                   const std::vector<std::int64_t>& row_strides, int dtype,
                                   std::uintptr_t groups, std::int64_t num_tokens,
                                   std::int64_t width, std::int64_t num_groups,
                                   std::int64_t max_offset, std::uintptr_t sums,
                                   std::uintptr_t counts, std::uintptr_t scratch, int device,
                                   std::uintptr_t stream) {
  std::vector<const void*> pointers;
  for (const std::uintptr_t state : states) pointers.push_back(as_pointer<const void>(state));
  const interlace::LayerSimilarityCudaArgs args{
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
      as_pointer<void>(scratch),
      device,
      as_pointer<void>(stream),
  };
  if (scratch != 0) interlace::layer_similarity_cuda(args);
  return interlace::layer_similarity_scratch(args);
}

void ragged_decode_cuda(int dtype, std::uintptr_t q, const Strides& q_strides, std::uintptr_t k,
                        const Strides& k_strides, std::uintptr_t v, const Strides& v_strides,
                        std::uintptr_t lengths, std::uintptr_t starts, std::uintptr_t block_table,
                        std::int64_t table_stride, int block_size, const std::vector<int>& q_start,
                        int num_sequences, int num_tokens, int width, int capacity, int window,
                        int num_splits, double scale, std::uintptr_t gate, std::uintptr_t out,
                        std::uintptr_t parts, int device, std::uintptr_t stream, bool overlap) {
  interlace::DecodeHeads heads{};
  for (std::size_t j = 0; j + 1 < q_start.size(); ++j) {
    if (q_start[j] == q_start[j + 1]) continue;
    if (heads.count == interlace::kMaxDecodeHeads) throw std::length_error("too many kv heads");
    heads.kv_head[heads.count] = static_cast<std::int16_t>(j);
    heads.first_head[heads.count] = static_cast<std::int16_t>(q_start[j]);
    heads.group[heads.count++] = static_cast<std::int16_t>(q_start[j + 1] - q_start[j]);
  }
  const interlace::RaggedDecodeCudaArgs args{
      static_cast<interlace::DType>(dtype),
      as_pointer<const void>(q),
      q_strides[0],
      q_strides[1],
      q_strides[2],
      as_pointer<const void>(k),
      k_strides[0],
      k_strides[1],
      k_strides[2],
      as_pointer<const void>(v),
      v_strides[0],
      v_strides[1],
      v_strides[2],
      as_pointer<const std::int32_t>(lengths),
      as_pointer<const std::int32_t>(starts),
      as_pointer<const std::int32_t>(block_table),
      table_stride,
      block_size,
      num_sequences,
      num_tokens,
      q_start.back(),
      width,
      capacity,
      window,
      num_splits,
      static_cast<float>(scale),
      as_pointer<const float>(gate),
      as_pointer<void>(out),
      as_pointer<float>(parts),
      device,
      as_pointer<void>(stream),
      overlap,
  };
  interlace::ragged_decode_cuda(args, heads);
}
#endif

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
  define_bridge_norm<std::uintptr_t, std::uintptr_t, std::int64_t, int, int>(
      module, "bridge_norm", &bridge_norm, "down", "up", "rank", "num_threads", "max_lanes");
  module.def("ragged_attention", &ragged_attention, py::kw_only(), py::arg("dtype"), py::arg("q"),
             py::arg("q_strides"), py::arg("k"), py::arg("k_strides"), py::arg("v"),
             py::arg("v_strides"), py::arg("gate"), py::arg("q_tokens"), py::arg("kv_tokens"),
             py::arg("q_start"), py::arg("num_sequences"), py::arg("num_queries"), py::arg("width"),
             py::arg("before"), py::arg("behind"), py::arg("scale"), py::arg("out"), py::arg("lse"),
             py::arg("num_threads"), py::arg("max_lanes"),
             py::call_guard<py::gil_scoped_release>());
  module.def("ragged_decode", &ragged_decode, py::kw_only(), py::arg("dtype"), py::arg("q"),
             py::arg("q_strides"), py::arg("k"), py::arg("k_strides"), py::arg("v"),
             py::arg("v_strides"), py::arg("lengths"), py::arg("starts"), py::arg("block_table"),
             py::arg("table_stride"), py::arg("block_size"), py::arg("q_start"),
             py::arg("num_sequences"), py::arg("num_tokens"), py::arg("width"), py::arg("window"),
             py::arg("scale"), py::arg("gate"), py::arg("out"), py::arg("num_threads"),
             py::arg("max_lanes"), py::call_guard<py::gil_scoped_release>());
#if defined(INTERLACE_CUDA)
  define_bridge_norm<int, std::uintptr_t, bool>(
      module, "bridge_norm_cuda", &interlace::bridge_norm_cuda, "device", "stream", "overlap");
  module.def("layer_similarity_cuda", &layer_similarity_cuda, py::kw_only(), py::arg("states"),
             py::arg("row_strides"), py::arg("dtype"), py::arg("groups"), py::arg("num_tokens"),
             py::arg("width"), py::arg("num_groups"), py::arg("max_offset"), py::arg("sums"),
             py::arg("counts"), py::arg("scratch"), py::arg("device"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>());
  module.def("ragged_decode_cuda", &ragged_decode_cuda, py::kw_only(), py::arg("dtype"),
             py::arg("q"), py::arg("q_strides"), py::arg("k"), py::arg("k_strides"), py::arg("v"),
             py::arg("v_strides"), py::arg("lengths"), py::arg("starts"), py::arg("block_table"),
             py::arg("table_stride"), py::arg("block_size"), py::arg("q_start"),
             py::arg("num_sequences"), py::arg("num_tokens"), py::arg("width"), py::arg("capacity"),
             py::arg("window"), py::arg("num_splits"), py::arg("scale"), py::arg("gate"),
             py::arg("out"), py::arg("parts"), py::arg("device"), py::arg("stream"),
             py::arg("overlap"));
#endif
}

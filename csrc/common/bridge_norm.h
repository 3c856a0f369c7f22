// What bridge_norm works on, on any device. The meaning is the reference in
// interlace/ops/_bridge_norm_reference.py.
//
// Letters: T rows, D width.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace interlace {

// A tensor of parameters without gaps, in the dtype of x or fp32. Null: there is none.
struct Parameter {
  const void* data;
  DType dtype;
};

struct BridgeNormArgs {
  const void* x;         // [T, D], elements of a row side by side
  const void* residual;  // the same, or null
  int64_t x_stride;      // in elements
  int64_t residual_stride;
  DType dtype;       // of x, residual, normed and new_residual
  Parameter weight;  // [D]
  Parameter bias;    // [D] or null
  Parameter scale;   // [1], [D] or null
  int64_t scale_size;
  int64_t num_rows;
  int64_t width;
  float eps;
  bool is_layer_norm;
  void* normed;        // [T, D], every element is written, as of all outputs
  void* new_residual;  // [T, D]
  float* rstd;         // [T]
  float* mean;         // [T]
};

}  // namespace interlace

// Memory for large tensors that are about to be overwritten.
#pragma once

#include <ATen/core/Tensor.h>

namespace robustloss {

/// A contiguous tensor of no particular content. In fresh memory the page faults cost several times what a
/// row kernel does, so a large one takes the block that the last large one has left, if that fits.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace robustloss

// What the ops on rows of logits share: layouts and checks.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "token_logps.h"

namespace robustloss {

/// The kernels of the best instruction set that this processor has.
template <typename scalar_t>
RowKernels<scalar_t> row_kernels(bool capped);

/// Row b T + t of a tensor [B, T, V] is at data + b stride_b + t stride_t.
template <typename element_t>
struct Rows {
    element_t* data;
    int64_t T, stride_b, stride_t;

    Rows(element_t* data, const at::Tensor& tensor)
        : data(data), T(tensor.size(1)), stride_b(tensor.stride(0)), stride_t(tensor.stride(1)) {}
    element_t* operator[](int64_t row) const { return data + (row / T) * stride_b + (row % T) * stride_t; }
};

template <typename scalar_t>
Scaling<scalar_t> scaling_of(double temperature, std::optional<double> softcap) {
    TORCH_CHECK_VALUE(temperature > 0, "temperature must be > 0, got ", temperature);
    TORCH_CHECK_VALUE(!softcap || *softcap > 0, "softcap must be > 0 or None, got ", *softcap);
    using opmath_t = at::opmath_type<scalar_t>;
    return {static_cast<opmath_t>(1 / temperature), static_cast<opmath_t>(softcap.value_or(0))};
}

void check_layout(const at::Tensor& logits, const at::Tensor& labels, const char* name = "logits");

/// The rows that count, in order. A label that is neither a token nor `ignore_index` is refused here, before
/// any thread starts.
std::vector<int64_t> counted_rows(const at::Tensor& labels, int64_t ignore_index, int64_t V);

/// Rows that one thread takes at least: 32768 logits, as in ATen; a small problem stays on one thread.
int64_t grain_size(int64_t V);

}  // namespace robustloss

// What the ops on rows of logits share: layouts, checks, and a row's log-probability.
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
    using opmath_t = at::opmath_type<scalar_t>;
    return {static_cast<opmath_t>(1 / temperature), static_cast<opmath_t>(softcap.value_or(0))};
}

template <typename opmath_t>
opmath_t soft_cap(opmath_t x, opmath_t cap) {
    return cap == 0 ? x : cap * std::tanh(x / cap);
}

/// A label's log-probability, and the largest z with the log-sum relative to it. The first is rounded to the
/// statistics type and the second is relative to the rounded one, so that a fused multiply-add gets z - lse
/// back.
template <typename scalar_t>
struct RowLogps {
    using opmath_t = at::opmath_type<scalar_t>;
    opmath_t logps, lse[2];

    RowLogps(const RowStatistics<scalar_t>& row, opmath_t target, const Scaling<scalar_t>& scaling) {
        // Not target - lse: for large logits lse has already lost the digits that this difference keeps.
        logps = (soft_cap(target, scaling.cap) - row.max) * scaling.inverse_temperature - row.log_sum;
        lse[0] = row.max * scaling.inverse_temperature;
        const opmath_t lost = std::fma(row.max, scaling.inverse_temperature, -lse[0]);
        lse[1] = std::isfinite(lse[0]) ? row.log_sum + lost : row.log_sum;
    }
};

void check_layout(const at::Tensor& logits, const at::Tensor& labels, double temperature,
                  const char* name = "logits");

/// The rows that count, in order. A label that is neither a token nor `ignore_index` is refused here, before
/// any thread starts.
std::vector<int64_t> counted_rows(const at::Tensor& labels, int64_t ignore_index, int64_t V);

/// Rows that one thread takes at least: 32768 logits, as in ATen; a small problem stays on one thread.
int64_t grain_size(int64_t V);

}  // namespace robustloss

// One row of the op `token_logps`, compiled once per instruction set; the best one is chosen at run time.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>

namespace robustloss {

template <typename scalar_t>
struct RowStatistics {
    using opmath_t = at::opmath_type<scalar_t>;
    opmath_t max;      // of the logits x, before the temperature
    opmath_t log_sum;  // log sum_v exp((x_v - max) / temperature), so that lse = max / temperature + log_sum
    opmath_t entropy;  // in nats; meaningless unless it was asked for
};

/// Statistics of one row of V logits. A NaN or +inf among them makes all three NaN.
template <typename scalar_t>
using ReduceRow = RowStatistics<scalar_t>(const scalar_t* logits, int64_t V,
                                          at::opmath_type<scalar_t> inverse_temperature);

/// grad_v = scale ([v = label] - exp(x_v / temperature - lse)); `grad` may be `logits`.
template <typename scalar_t>
using GradRow = void(scalar_t* grad, const scalar_t* logits, int64_t V, int64_t label,
                     at::opmath_type<scalar_t> inverse_temperature, at::opmath_type<scalar_t> lse,
                     at::opmath_type<scalar_t> scale);

template <typename scalar_t>
struct RowKernels {
    ReduceRow<scalar_t>* reduce_row;
    ReduceRow<scalar_t>* reduce_row_with_entropy;
    GradRow<scalar_t>* grad_row;
};

namespace DEFAULT {
template <typename scalar_t>
RowKernels<scalar_t> row_kernels();
}
namespace AVX2 {
template <typename scalar_t>
RowKernels<scalar_t> row_kernels();
}
namespace AVX512 {
template <typename scalar_t>
RowKernels<scalar_t> row_kernels();
}

}  // namespace robustloss

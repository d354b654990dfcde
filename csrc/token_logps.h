// One row of the ops `token_logps` and `token_logratios`, compiled once per instruction set; the best one is
// chosen at run time.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>

namespace robustloss {

/// z = s / temperature with s = cap tanh(x / cap), or s = x in the kernels without a cap.
template <typename scalar_t>
struct Scaling {
    at::opmath_type<scalar_t> inverse_temperature, cap;
};

/// What one pass over a row's logits x gives. A NaN among them, or without a cap +inf, makes everything NaN
/// but `top1`, which is 0.
template <typename scalar_t>
struct RowValues {
    using opmath_t = at::opmath_type<scalar_t>;
    opmath_t logps;    // z of the label minus the log-sum-exp
    opmath_t lse[2];   // the largest z, and log sum_v exp(z_v - lse[0])
    opmath_t entropy;  // in nats
    opmath_t top1;     // 1 where no token has a larger x than the label, else 0
    opmath_t mean;     // of s
};

enum class Wanted { Lse, Entropy, Everything };  // a statistic that is not wanted is meaningless

template <typename scalar_t>
using ReduceRow = RowValues<scalar_t>(const scalar_t* logits, int64_t V, int64_t label,
                                      Scaling<scalar_t> scaling);

/// grad_v = scale ([v = label] - exp(z_v - lse[0] - lse[1])) ds/dx; `grad` may be `logits`, and `label` may
/// be outside of the row.
template <typename scalar_t>
using GradRow = void(scalar_t* grad, const scalar_t* logits, int64_t V, int64_t label,
                     Scaling<scalar_t> scaling, const at::opmath_type<scalar_t> (&lse)[2],
                     at::opmath_type<scalar_t> scale);

template <typename scalar_t>
struct RowKernels {
    ReduceRow<scalar_t>* reduce_row[3];  // by Wanted
    GradRow<scalar_t>* grad_row;
};

namespace DEFAULT {
template <typename scalar_t>
RowKernels<scalar_t> row_kernels(bool capped);
}
namespace AVX2 {
template <typename scalar_t>
RowKernels<scalar_t> row_kernels(bool capped);
}
namespace AVX512 {
template <typename scalar_t>
RowKernels<scalar_t> row_kernels(bool capped);
}

}  // namespace robustloss

// The op `token_logps` on CPU: log-probability of each label, its log-sum-exp and (on request) statistics.
// Schemas, layouts and equations: robustloss/ops/token_logps.py.
#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "large_tensor.h"
#include "rows.h"

namespace robustloss {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> token_logps(const Tensor& logits, const Tensor& labels,
                                               int64_t ignore_index, double temperature,
                                               std::optional<double> softcap, int64_t n_statistics) {
    check_layout(logits, labels);
    TORCH_CHECK_VALUE(n_statistics == 0 || n_statistics == 1 || n_statistics == 3,
                      "n_statistics must be 0, 1 or 3, got ", n_statistics);
    const int64_t B = logits.size(0), T = logits.size(1), V = logits.size(2), N = labels.numel();
    const auto rows = counted_rows(labels, ignore_index, V);
    const auto options = logits.options().dtype(at::toOpMathType(logits.scalar_type()));
    Tensor logps = at::zeros(labels.sizes(), options);
    Tensor lse = at::zeros({2, B, T}, options);
    Tensor statistics = at::zeros({n_statistics, B, T}, options);

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "token_logps", [&] {
        using opmath_t = at::opmath_type<scalar_t>;
        const Wanted wanted = n_statistics == 0   ? Wanted::Lse
                              : n_statistics == 1 ? Wanted::Entropy
                                                  : Wanted::Everything;
        const auto reduce_row =
            row_kernels<scalar_t>(softcap.has_value()).reduce_row[static_cast<int>(wanted)];
        const auto scaling = scaling_of<scalar_t>(temperature, softcap);
        const Rows<const scalar_t> x(logits.const_data_ptr<scalar_t>(), logits);
        const int64_t* label = labels.const_data_ptr<int64_t>();
        opmath_t* logps_out = logps.mutable_data_ptr<opmath_t>();
        opmath_t* lse_out = lse.mutable_data_ptr<opmath_t>();
        opmath_t* statistics_out = statistics.mutable_data_ptr<opmath_t>();
        // Over the rows that count, so that long prompts on one thread do not leave it idle.
        at::parallel_for(0, rows.size(), grain_size(V), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t row = rows[i];
                const RowValues<scalar_t> values = reduce_row(x[row], V, label[row], scaling);
                logps_out[row] = values.logps;
                lse_out[row] = values.lse[0];
                lse_out[N + row] = values.lse[1];
                if (n_statistics > 0) statistics_out[row] = values.entropy;
                if (n_statistics > 1) {
                    statistics_out[N + row] = values.top1;
                    statistics_out[2 * N + row] = values.mean;
                }
            }
        });
    });
    return {logps, lse, statistics};
}

void token_logps_bwd_out(const Tensor& grad_logps, const Tensor& logits, const Tensor& labels,
                         const Tensor& lse, int64_t ignore_index, double temperature,
                         std::optional<double> softcap, int64_t vocabulary_start, Tensor& grad) {
    check_layout(logits, labels);
    TORCH_CHECK_VALUE(grad_logps.sizes() == labels.sizes(), "grad_logps must have shape ", labels.sizes(),
                      ", got ", grad_logps.sizes());
    TORCH_CHECK_VALUE(lse.dim() == 3 && lse.size(0) == 2 && lse[0].sizes() == labels.sizes(),
                      "lse must have shape [2, ", labels.size(0), ", ", labels.size(1), "], got ",
                      lse.sizes());
    TORCH_CHECK_VALUE(grad.sizes() == logits.sizes() && grad.scalar_type() == logits.scalar_type() &&
                          (grad.size(2) <= 1 || grad.stride(2) == 1),
                      "grad_logits must be as logits, ", logits.scalar_type(), " ", logits.sizes(),
                      " with stride 1 along the vocabulary, got ", grad.scalar_type(), " ", grad.sizes(),
                      " with strides ", grad.strides());
    at::assert_no_internal_overlap(grad);  // of an expanded tensor no element is its own
    at::assert_no_partial_overlap(grad, logits);
    const int64_t T = logits.size(1), V = logits.size(2);
    const auto statistics_type = at::toOpMathType(logits.scalar_type());
    const Tensor grad_logps_ = grad_logps.to(statistics_type), lse_ = lse.to(statistics_type);

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "token_logps_bwd", [&] {
        using opmath_t = at::opmath_type<scalar_t>;
        const auto grad_row = row_kernels<scalar_t>(softcap.has_value()).grad_row;
        const auto scaling = scaling_of<scalar_t>(temperature, softcap);
        const Rows<scalar_t> out(grad.mutable_data_ptr<scalar_t>(), grad);
        const Rows<const scalar_t> x(logits.const_data_ptr<scalar_t>(), logits);
        const int64_t* label = labels.const_data_ptr<int64_t>();
        // By their strides: the gradient of a sum is expanded.
        const auto upstream = grad_logps_.accessor<const opmath_t, 2>();
        const auto lse_in = lse_.accessor<const opmath_t, 3>();
        at::parallel_for(0, labels.numel(), grain_size(V), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                if (label[row] == ignore_index) {
                    std::fill_n(out[row], V, scalar_t(0));
                    continue;
                }
                const int64_t b = row / T, t = row % T;
                grad_row(out[row], x[row], V, label[row] - vocabulary_start, scaling,
                         {lse_in[0][b][t], lse_in[1][b][t]}, upstream[b][t] * scaling.inverse_temperature);
            }
        });
    });
}

Tensor token_logps_bwd(const Tensor& grad_logps, const Tensor& logits, const Tensor& labels,
                       const Tensor& lse, int64_t ignore_index, double temperature,
                       std::optional<double> softcap) {
    Tensor grad = empty_large(logits.sizes(), logits.options());
    token_logps_bwd_out(grad_logps, logits, labels, lse, ignore_index, temperature, softcap, 0, grad);
    return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(robustloss, CPU, m) {
    m.impl("token_logps", token_logps);
    m.impl("token_logps_bwd", token_logps_bwd);
    m.impl("token_logps_bwd_out", token_logps_bwd_out);
}

}  // namespace robustloss

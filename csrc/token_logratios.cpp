// The op `token_logratios` on CPU: the policy's and the reference's row of a token, read by one thread.
// Schemas, layouts and equations: robustloss/ops/token_logratios.py.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <functional>
#include <tuple>

#include "rows.h"

namespace robustloss {
namespace {

using at::Tensor;

struct Values {
    double logps, lse[2];
};

/// Reads a row, whatever its dtype; the two logits may have different ones.
std::function<Values(int64_t)> row_reader(const Tensor& logits, const Tensor& labels, double temperature) {
    std::function<Values(int64_t)> read;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "token_logratios", [&] {
        const auto reduce_row = row_kernels<scalar_t>(false).reduce_row[static_cast<int>(Wanted::Lse)];
        const auto scaling = scaling_of<scalar_t>(temperature, std::nullopt);
        const Rows<const scalar_t> x(logits.const_data_ptr<scalar_t>(), logits);
        const int64_t* label = labels.const_data_ptr<int64_t>();
        read = [=, V = logits.size(2)](int64_t row) -> Values {
            const RowValues<scalar_t> values = reduce_row(x[row], V, label[row], scaling);
            return {values.logps, {values.lse[0], values.lse[1]}};
        };
    });
    return read;
}

std::tuple<Tensor, Tensor> token_logratios(const Tensor& policy_logits, const Tensor& ref_logits,
                                           const Tensor& labels, int64_t ignore_index, double temperature) {
    check_layout(policy_logits, labels, "policy_logits");
    check_layout(ref_logits, labels, "ref_logits");
    const int64_t B = policy_logits.size(0), T = policy_logits.size(1), V = policy_logits.size(2);
    TORCH_CHECK_VALUE(ref_logits.size(2) == V, "ref_logits must have policy_logits' vocabulary ", V, ", got ",
                      ref_logits.size(2));
    const auto rows = counted_rows(labels, ignore_index, V);
    const auto options = policy_logits.options().dtype(at::toOpMathType(policy_logits.scalar_type()));
    Tensor logratios = at::zeros(labels.sizes(), options);
    Tensor lse = at::zeros({2, B, T}, options);
    const auto policy = row_reader(policy_logits, labels, temperature);
    const auto reference = row_reader(ref_logits, labels, temperature);

    AT_DISPATCH_FLOATING_TYPES(logratios.scalar_type(), "token_logratios", [&] {
        scalar_t* logratios_out = logratios.mutable_data_ptr<scalar_t>();
        scalar_t* lse_out = lse.mutable_data_ptr<scalar_t>();
        at::parallel_for(0, rows.size(), grain_size(V), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t row = rows[i];
                const Values values = policy(row);
                logratios_out[row] = values.logps - reference(row).logps;
                lse_out[row] = values.lse[0];
                lse_out[B * T + row] = values.lse[1];
            }
        });
    });
    return {logratios, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(robustloss, CPU, m) { m.impl("token_logratios", token_logratios); }

}  // namespace robustloss

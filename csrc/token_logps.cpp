// The op `token_logps` on CPU: log-probability of each label, its log-sum-exp and (on request) its entropy.
// Schemas, layouts and equations: robustloss/ops/token_logps.py.
#include "token_logps.h"

#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

namespace robustloss {
namespace {

using at::Tensor;

template <typename scalar_t>
const RowKernels<scalar_t>& row_kernels() {
    static const RowKernels<scalar_t> chosen = [] {
#ifdef __x86_64__
        const std::string capability = at::get_cpu_capability();  // honours ATEN_CPU_CAPABILITY
        if (capability == "AVX512") return AVX512::row_kernels<scalar_t>();
        if (capability == "AVX2") return AVX2::row_kernels<scalar_t>();
#endif
        return DEFAULT::row_kernels<scalar_t>();
    }();
    return chosen;
}

/// Row b T + t of a tensor [B, T, V] is at data + b stride_b + t stride_t.
template <typename element_t>
struct Rows {
    element_t* data;
    int64_t T, stride_b, stride_t;

    Rows(element_t* data, const Tensor& tensor)
        : data(data), T(tensor.size(1)), stride_b(tensor.stride(0)), stride_t(tensor.stride(1)) {}
    element_t* operator[](int64_t row) const { return data + (row / T) * stride_b + (row % T) * stride_t; }
};

void check_layout(const Tensor& logits, const Tensor& labels, double temperature) {
    TORCH_CHECK_VALUE(logits.dim() == 3, "logits must have shape [B, T, V], got ", logits.sizes());
    TORCH_CHECK_VALUE(logits.size(2) <= 1 || logits.stride(2) == 1,
                      "logits must have stride 1 along the vocabulary, got strides ", logits.strides());
    TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels must have dtype int64, got ",
                     labels.scalar_type());
    TORCH_CHECK_VALUE(labels.sizes() == logits.sizes().slice(0, 2), "labels must have shape ",
                      logits.sizes().slice(0, 2), " (that of logits without V), got ", labels.sizes());
    TORCH_CHECK_VALUE(labels.is_contiguous(), "labels must be contiguous, got strides ", labels.strides());
    TORCH_CHECK_VALUE(temperature > 0, "temperature must be > 0, got ", temperature);
}

/// The rows that count, in order. A label that is neither a token nor `ignore_index` is refused here, before
/// any thread starts.
std::vector<int64_t> counted_rows(const Tensor& labels, int64_t ignore_index, int64_t V) {
    const int64_t* label = labels.const_data_ptr<int64_t>();
    std::vector<int64_t> rows;
    for (int64_t row = 0; row < labels.numel(); ++row) {
        if (label[row] == ignore_index) continue;
        TORCH_CHECK_VALUE(0 <= label[row] && label[row] < V, "labels[", row / labels.size(1), ", ",
                          row % labels.size(1), "] is ", label[row], ", but must be in [0, ", V,
                          ") (the vocabulary of logits) or ignore_index = ", ignore_index);
        rows.push_back(row);
    }
    return rows;
}

/// Rows that one thread takes at least: 32768 logits, as in ATen; a small problem stays on one thread.
int64_t grain_size(int64_t V) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, V)); }

/// A contiguous tensor about to be overwritten. In fresh memory the page faults cost several times what the
/// kernel does, so a large one asks Linux for huge pages; where there are none, nothing is lost.
Tensor empty_in_huge_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
    Tensor tensor = at::empty(sizes, options);
#ifdef __linux__
    constexpr size_t page = 4096, huge_page = 2 << 20;
    if (tensor.nbytes() >= 2 * huge_page) {
        const auto address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
        const uintptr_t begin = (address + page - 1) / page * page;
        const uintptr_t end = (address + tensor.nbytes()) / page * page;
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    }
#endif
    return tensor;
}

std::tuple<Tensor, Tensor, Tensor> token_logps(const Tensor& logits, const Tensor& labels,
                                               int64_t ignore_index, double temperature,
                                               bool return_entropy) {
    check_layout(logits, labels, temperature);
    const int64_t V = logits.size(2);
    const auto rows = counted_rows(labels, ignore_index, V);
    const auto options = logits.options().dtype(at::toOpMathType(logits.scalar_type()));
    Tensor logps = at::zeros(labels.sizes(), options);
    Tensor lse = at::zeros(labels.sizes(), options);
    Tensor entropy = return_entropy ? at::zeros(labels.sizes(), options) : at::empty({0}, options);

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "token_logps", [&] {
        using opmath_t = at::opmath_type<scalar_t>;
        const auto& kernels = row_kernels<scalar_t>();
        const auto reduce_row = return_entropy ? kernels.reduce_row_with_entropy : kernels.reduce_row;
        const opmath_t inverse_temperature = 1 / temperature;
        const Rows<const scalar_t> x(logits.const_data_ptr<scalar_t>(), logits);
        const int64_t* label = labels.const_data_ptr<int64_t>();
        opmath_t* logps_out = logps.mutable_data_ptr<opmath_t>();
        opmath_t* lse_out = lse.mutable_data_ptr<opmath_t>();
        opmath_t* entropy_out = return_entropy ? entropy.mutable_data_ptr<opmath_t>() : nullptr;
        // Over the rows that count, so that long prompts on one thread do not leave it idle.
        at::parallel_for(0, rows.size(), grain_size(V), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t row = rows[i];
                const auto statistics = reduce_row(x[row], V, inverse_temperature);
                const opmath_t picked = x[row][label[row]];
                logps_out[row] = (picked - statistics.max) * inverse_temperature - statistics.log_sum;
                lse_out[row] = statistics.max * inverse_temperature + statistics.log_sum;
                if (return_entropy) entropy_out[row] = statistics.entropy;
            }
        });
    });
    return {logps, lse, entropy};
}

/// Writes the gradient into `grad`, which may be `logits`.
void write_grad(const Tensor& grad, const Tensor& grad_logps, const Tensor& logits, const Tensor& labels,
                const Tensor& lse, int64_t ignore_index, double temperature) {
    check_layout(logits, labels, temperature);
    TORCH_CHECK_VALUE(grad_logps.sizes() == labels.sizes(), "grad_logps must have shape ", labels.sizes(),
                      ", got ", grad_logps.sizes());
    TORCH_CHECK_VALUE(lse.sizes() == labels.sizes(), "lse must have shape ", labels.sizes(), ", got ",
                      lse.sizes());
    const int64_t V = logits.size(2);
    counted_rows(labels, ignore_index, V);  // refuses bad labels
    const auto statistics_type = at::toOpMathType(logits.scalar_type());
    const Tensor grad_logps_ = grad_logps.to(statistics_type).contiguous();
    const Tensor lse_ = lse.to(statistics_type).contiguous();

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "token_logps_bwd", [&] {
        using opmath_t = at::opmath_type<scalar_t>;
        const auto grad_row = row_kernels<scalar_t>().grad_row;
        const opmath_t inverse_temperature = 1 / temperature;
        const Rows<scalar_t> out(grad.mutable_data_ptr<scalar_t>(), grad);
        const Rows<const scalar_t> x(logits.const_data_ptr<scalar_t>(), logits);
        const int64_t* label = labels.const_data_ptr<int64_t>();
        const opmath_t* upstream = grad_logps_.const_data_ptr<opmath_t>();
        const opmath_t* lse_in = lse_.const_data_ptr<opmath_t>();
        at::parallel_for(0, labels.numel(), grain_size(V), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                if (label[row] == ignore_index) {
                    std::fill_n(out[row], V, scalar_t(0));
                } else {
                    grad_row(out[row], x[row], V, label[row], inverse_temperature, lse_in[row],
                             upstream[row] * inverse_temperature);
                }
            }
        });
    });
}

Tensor token_logps_bwd(const Tensor& grad_logps, const Tensor& logits, const Tensor& labels,
                       const Tensor& lse, int64_t ignore_index, double temperature) {
    Tensor grad = empty_in_huge_pages(logits.sizes(), logits.options());
    write_grad(grad, grad_logps, logits, labels, lse, ignore_index, temperature);
    return grad;
}

void token_logps_bwd_(const Tensor& grad_logps, Tensor& logits, const Tensor& labels, const Tensor& lse,
                      int64_t ignore_index, double temperature) {
    at::assert_no_internal_overlap(logits);  // of an expanded tensor no element is its own
    write_grad(logits, grad_logps, logits, labels, lse, ignore_index, temperature);
}

}  // namespace

TORCH_LIBRARY_IMPL(robustloss, CPU, m) {
    m.impl("token_logps", token_logps);
    m.impl("token_logps_bwd", token_logps_bwd);
    m.impl("token_logps_bwd_", token_logps_bwd_);
}

}  // namespace robustloss

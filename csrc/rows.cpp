// What the ops on rows of logits share.
#include "rows.h"

#include <algorithm>

#include "instruction_set.h"

namespace robustloss {

template <typename scalar_t>
RowKernels<scalar_t> row_kernels(bool capped) {
    return ROBUSTLOSS_BEST(row_kernels<scalar_t>(capped));
}

template RowKernels<double> row_kernels(bool);
template RowKernels<float> row_kernels(bool);
template RowKernels<c10::Half> row_kernels(bool);
template RowKernels<c10::BFloat16> row_kernels(bool);

void check_layout(const at::Tensor& logits, const at::Tensor& labels, const char* name) {
    TORCH_CHECK_VALUE(logits.dim() == 3, name, " must have shape [B, T, V], got ", logits.sizes());
    TORCH_CHECK_VALUE(logits.size(2) <= 1 || logits.stride(2) == 1, name,
                      " must have stride 1 along the vocabulary, got strides ", logits.strides());
    TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels must have dtype int64, got ",
                     labels.scalar_type());
    TORCH_CHECK_VALUE(labels.sizes() == logits.sizes().slice(0, 2), "labels must have shape ",
                      logits.sizes().slice(0, 2), " (that of ", name, " without V), got ", labels.sizes());
    TORCH_CHECK_VALUE(labels.is_contiguous(), "labels must be contiguous, got strides ", labels.strides());
}

std::vector<int64_t> counted_rows(const at::Tensor& labels, int64_t ignore_index, int64_t V) {
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

int64_t grain_size(int64_t V) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, V)); }

}  // namespace robustloss

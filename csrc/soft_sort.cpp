// The ops `soft_sort` and `soft_rank` on CPU: an argsort, and pooling of adjacent violators in float64.
// Schemas and layouts: robustloss/ops/soft_sort.py; equations: robustloss/naive/soft_sort.py, whose names
// these are.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string_view>
#include <tuple>

#include "sort.h"

namespace robustloss {
namespace {

using at::Tensor;

/// Positions start to start + size - 1, on which the solution of the isotonic regression is constant.
struct Block {
    int64_t start, size;
    double first, last;  // the smallest and the largest u
    double spread;       // l2: mean - first; kl: the sum of exponentials relative to the one that is 1

    double centre() const { return start + (size - 1) * 0.5; }
    double mean() const { return first + spread; }
};

double difference_of_means(const Block& a, const Block& b) {
    return (b.first - a.first) + (b.spread - a.spread);
}

/// Relative to the block's own first value, so that ties of any size have a spread of exactly 0.
double merge_means(const Block& a, const Block& b) {
    const double share = static_cast<double>(b.size) / static_cast<double>(a.size + b.size);
    return a.spread + share * ((b.first - a.first) + b.spread - a.spread);
}

/// x < log(ratio); the logarithm, between 1 - 1 / ratio and ratio - 1, is rarely needed.
bool less_than_log(double x, double ratio) {
    if (x >= ratio - 1) return false;
    return x * ratio < ratio - 1 || x < std::log(ratio);
}

// How each op and regularization pools and what becomes of a pooled block. `may_violate` is a cheap necessary
// condition for a gap between two blocks of one, the second at position i.

struct SortL2 {
    static constexpr double kSingle = 0;
    const double strength;

    explicit SortL2(double strength) : strength(strength) {}
    bool may_violate(double gap, int64_t) const { return gap * strength > 1; }
    bool violates(const Block& a, const Block& b) const {
        return difference_of_means(a, b) * strength > b.centre() - a.centre();
    }
    double merge(const Block& a, const Block& b) const { return merge_means(a, b); }
    double single(double u, int64_t) const { return u; }
    template <typename Write>
    void pooled(const Block& block, const double*, const Write& write) const {
        for (int64_t k = 0; k < block.size; ++k) {
            write(block.start + k, block.mean() + (k - (block.size - 1) * 0.5) / strength);
        }
    }
};

struct RankL2 {
    static constexpr double kSingle = 0;
    const double strength;

    explicit RankL2(double strength) : strength(strength) {}
    bool may_violate(double gap, int64_t) const { return gap < strength; }
    bool violates(const Block& a, const Block& b) const {
        return difference_of_means(a, b) < (b.centre() - a.centre()) * strength;
    }
    double merge(const Block& a, const Block& b) const { return merge_means(a, b); }
    double single(double, int64_t i) const { return i + 1; }
    template <typename Write>
    void pooled(const Block& block, const double* u, const Write& write) const {
        for (int64_t i = block.start; i < block.start + block.size; ++i) {
            write(i, ((u[i] - block.first) - block.spread) / strength + block.centre() + 1);
        }
    }
};

struct SortKL {
    static constexpr double kSingle = 1;
    const double strength, inverse_denominator;

    explicit SortKL(double strength)
        : strength(strength), inverse_denominator(1 / std::expm1(-1 / strength)) {}
    double ramp_sum(int64_t size) const {
        return size == 1 ? 1 : std::expm1(-size / strength) * inverse_denominator;
    }
    bool may_violate(double gap, int64_t) const { return gap * strength > 1; }
    bool violates(const Block& a, const Block& b) const {
        const double excess = (b.first - a.first) - a.size / strength;
        // Written so that less_than_log's bounds serve: excess > log R is -excess < log 1/R.
        return less_than_log(-excess, a.spread * ramp_sum(b.size) / (b.spread * ramp_sum(a.size)));
    }
    double merge(const Block& a, const Block& b) const {
        return a.spread + b.spread * std::exp(a.first - b.first);
    }
    double single(double u, int64_t) const { return u; }
    template <typename Write>
    void pooled(const Block& block, const double*, const Write& write) const {
        const double start = block.first - std::log(block.spread / ramp_sum(block.size));
        for (int64_t k = 0; k < block.size; ++k) write(block.start + k, start + k / strength);
    }
};

struct RankKL {
    static constexpr double kSingle = 1;
    const double strength;

    explicit RankKL(double strength) : strength(strength) {}
    static double rank_sum(const Block& block) { return block.size * (block.centre() + 1); }
    bool may_violate(double gap, int64_t i) const { return gap * i < strength; }  // log(1 + 1 / i) < 1 / i
    bool violates(const Block& a, const Block& b) const {
        return less_than_log((b.last - a.last) / strength, rank_sum(b) * a.spread / (rank_sum(a) * b.spread));
    }
    double merge(const Block& a, const Block& b) const {
        return b.spread + a.spread * std::exp((a.last - b.last) / strength);
    }
    double single(double, int64_t i) const { return i + 1; }
    template <typename Write>
    void pooled(const Block& block, const double* u, const Write& write) const {
        const double scale = rank_sum(block) / block.spread;
        for (int64_t i = block.start; i < block.start + block.size; ++i) {
            write(i, scale * std::exp((u[i] - block.last) / strength));
        }
    }
};

/// The first position that may be pooled with the one before it, or n.
template <typename Rule>
int64_t first_violation(const double* u, int64_t n, const Rule& rule) {
    constexpr int64_t kStep = 64;  // looked at together, without a branch
    int64_t i = 1;
    for (; i + kStep <= n; i += kStep) {
        bool any = false;
        for (int64_t k = i; k < i + kStep; ++k) any |= rule.may_violate(u[k] - u[k - 1], k);
        if (any) break;
    }
    while (i < n && !rule.may_violate(u[i] - u[i - 1], i)) ++i;
    return std::min(i, n);
}

/// Calls write(position, result) for every position. On the way the stack of blocks is block_start at the
/// last position of each, and spread, with room for n numbers, at the first.
template <typename Rule, typename Write>
void isotonic_row(const double* u, int64_t n, const Rule& rule, int32_t* block_start, double* spread,
                  const Write& write) {
    const int64_t singles = first_violation(u, n, rule);  // each a block so far; what follows may still join
    std::fill_n(spread, singles, Rule::kSingle);
    std::iota(block_start, block_start + singles, 0);
    const auto block_ending_at = [&](int64_t end) {
        const int64_t start = block_start[end];
        return Block{start, end - start + 1, u[start], u[end], spread[start]};
    };
    for (int64_t i = singles; i < n; ++i) {
        Block block{i, 1, u[i], u[i], Rule::kSingle};
        while (block.start > 0) {
            const Block before = block_ending_at(block.start - 1);
            if (!rule.violates(before, block)) break;
            block = {before.start, before.size + block.size, before.first, block.last,
                     rule.merge(before, block)};
        }
        block_start[i] = static_cast<int32_t>(block.start);
        spread[block.start] = block.spread;
    }
    for (int64_t end = n - 1; end >= 0;) {
        const Block block = block_ending_at(end);
        if (block.size == 1) {
            write(end, rule.single(u[end], end));
        } else {
            std::fill_n(block_start + block.start, block.size, static_cast<int32_t>(block.start));
            rule.pooled(block, u, write);
        }
        end = block.start - 1;
    }
}

/// Rows that one thread takes at least.
int64_t grain_size(int64_t n) { return std::max<int64_t>(1, 2048 / std::max<int64_t>(n, 1)); }

template <typename scalar_t>
void check_finite(const scalar_t* values, int64_t n, int64_t row, double smallest, double largest) {
    if (std::isfinite(largest - smallest)) return;  // the sort puts what is not finite at an end
    TORCH_CHECK_VALUE(!std::isfinite(smallest) || !std::isfinite(largest),
                      "values are too large: the range of row ", row, " overflows float64");
    const auto* bad = std::find_if(values, values + n, [](scalar_t value) { return !std::isfinite(value); });
    TORCH_CHECK_VALUE(false, "values must be finite, got ", *bad, " at index ", bad - values, " of row ",
                      row);
}

constexpr bool kByIndex = true, kByPosition = false;

template <bool by_index, typename Rule>
std::tuple<Tensor, Tensor, Tensor> project(const Tensor& values, bool descending, double strength) {
    TORCH_CHECK_VALUE(values.dim() == 2 && values.size(1) < int64_t{1} << 31,
                      "values must be [R, n] with n < 2^31, got ", values.sizes());
    TORCH_CHECK_VALUE(strength > 0 && std::isfinite(strength), "strength must be > 0 and finite, got ",
                      strength);
    const int64_t R = values.size(0), n = values.size(1);
    const Tensor input = values.to(at::toOpMathType(values.scalar_type())).contiguous();
    Tensor result = at::empty(values.sizes(), input.options());
    Tensor order = at::empty(values.sizes(), input.options().dtype(at::kInt));
    Tensor block_start = at::empty_like(order);
    const Rule rule(strength);
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "soft_sort", [&] {
        const auto* values_in = input.const_data_ptr<scalar_t>();
        auto* result_out = result.mutable_data_ptr<scalar_t>();
        auto* order_out = order.mutable_data_ptr<int32_t>();
        auto* start_out = block_start.mutable_data_ptr<int32_t>();
        at::parallel_for(0, n == 0 ? 0 : R, grain_size(n), [&](int64_t begin, int64_t end) {
            SortWorkspace workspace;
            const auto u = std::make_unique_for_overwrite<double[]>(2 * n);
            for (int64_t row = begin; row < end; ++row) {
                const scalar_t* x = values_in + row * n;
                scalar_t* out = result_out + row * n;
                int32_t* row_order = order_out + row * n;
                argsort(x, n, descending, row_order, workspace);
                for (int64_t i = 0; i < n; ++i) {
                    u[i] = descending ? -double{x[row_order[i]]} : double{x[row_order[i]]};
                }
                check_finite(x, n, row, u[0], u[n - 1]);
                isotonic_row(u.get(), n, rule, start_out + row * n, u.get() + n, [&](int64_t i, double y) {
                    if constexpr (by_index) {
                        out[row_order[i]] = static_cast<scalar_t>(y);
                    } else {
                        out[i] = static_cast<scalar_t>(descending ? -y : y);
                    }
                });
            }
        });
    });
    return {result.to(values.scalar_type()), order, block_start};
}

template <bool by_index, typename L2, typename KL>
std::tuple<Tensor, Tensor, Tensor> soft(const Tensor& values, bool descending,
                                        std::string_view regularization, const at::Scalar& strength) {
    TORCH_CHECK_VALUE(regularization == "l2" || regularization == "kl",
                      "regularization must be one of 'l2', 'kl', got ", regularization);
    return regularization == "l2" ? project<by_index, L2>(values, descending, strength.toDouble())
                                  : project<by_index, KL>(values, descending, strength.toDouble());
}

/// Calls visit(row, begin, end) for every block.
template <typename Visit>
void for_each_block(const Tensor& block_start, const Visit& visit) {
    const int64_t R = block_start.size(0), n = block_start.size(1);
    const auto* starts = block_start.const_data_ptr<int32_t>();
    at::parallel_for(0, n == 0 ? 0 : R, grain_size(n), [&](int64_t first_row, int64_t last_row) {
        for (int64_t row = first_row; row < last_row; ++row) {
            const int32_t* start = starts + row * n;
            for (int64_t begin = 0, end; begin < n; begin = end) {
                for (end = begin + 1; end < n && start[end] == begin;) ++end;
                visit(row, begin, end);
            }
        }
    });
}

void check_positions(const char* name, const Tensor& positions, const Tensor& like) {
    TORCH_CHECK_VALUE(like.dim() == 2 && positions.sizes() == like.sizes() && positions.is_contiguous() &&
                          positions.scalar_type() == at::kInt,
                      name, " must be int32, contiguous, [R, n] as the values or the gradient, ",
                      like.sizes(), ", got ", positions.scalar_type(), " ", positions.sizes());
}

void check_backward(const Tensor& gradient, const std::optional<Tensor>& values, const Tensor& order,
                    const Tensor& block_start) {
    check_positions("order", order, gradient);
    check_positions("block_start", block_start, gradient);
    TORCH_CHECK_VALUE(!values || values->sizes() == gradient.sizes(),
                      "values must have the gradient's shape ", gradient.sizes(), ", got ", values->sizes());
}

Tensor soft_sort_bwd(const Tensor& grad_sorted, const std::optional<Tensor>& values, const Tensor& order,
                     const Tensor& block_start, bool descending) {
    check_backward(grad_sorted, values, order, block_start);
    const int64_t n = block_start.size(1);
    const Tensor upstream = grad_sorted.to(at::toOpMathType(grad_sorted.scalar_type())).contiguous();
    const Tensor input = values ? values->to(upstream.scalar_type()).contiguous() : upstream;
    Tensor grad = at::empty_like(upstream);
    AT_DISPATCH_FLOATING_TYPES(upstream.scalar_type(), "soft_sort_bwd", [&] {
        const auto* g_in = upstream.const_data_ptr<scalar_t>();
        const auto* x_in = input.const_data_ptr<scalar_t>();
        const auto* order_in = order.const_data_ptr<int32_t>();
        auto* out = grad.mutable_data_ptr<scalar_t>();
        for_each_block(block_start, [&](int64_t row, int64_t begin, int64_t end) {
            const scalar_t *g = g_in + row * n, *x = x_in + row * n;
            const int32_t* index = order_in + row * n;
            scalar_t* grad_row = out + row * n;
            if (end - begin == 1) {
                grad_row[index[begin]] = g[begin];
                return;
            }
            double sum = 0;
            for (int64_t i = begin; i < end; ++i) sum += g[i];
            if (!values) {
                const auto mean = static_cast<scalar_t>(sum / (end - begin));
                for (int64_t i = begin; i < end; ++i) grad_row[index[i]] = mean;
                return;
            }
            const double first = x[index[begin]];
            const auto weight = [&](int64_t i) { return std::exp(-std::abs(x[index[i]] - first)); };
            double total = 0;
            for (int64_t i = begin; i < end; ++i) {
                const double w = weight(i);
                total += w;
                grad_row[index[i]] = static_cast<scalar_t>(w);
            }
            for (int64_t i = begin; i < end; ++i) {
                grad_row[index[i]] = static_cast<scalar_t>(grad_row[index[i]] / total * sum);
            }
        });
    });
    return grad.to(grad_sorted.scalar_type());
}

Tensor soft_rank_bwd(const Tensor& grad_ranks, const std::optional<Tensor>& values, const Tensor& order,
                     const Tensor& block_start, bool descending, const at::Scalar& given_strength) {
    const double strength = given_strength.toDouble();
    check_backward(grad_ranks, values, order, block_start);
    const int64_t n = block_start.size(1);
    const Tensor upstream = grad_ranks.to(at::toOpMathType(grad_ranks.scalar_type())).contiguous();
    const Tensor input = values ? values->to(upstream.scalar_type()).contiguous() : upstream;
    Tensor grad = at::empty_like(upstream);
    const double slope = (descending ? -1 : 1) / strength;
    AT_DISPATCH_FLOATING_TYPES(upstream.scalar_type(), "soft_rank_bwd", [&] {
        const auto* g_in = upstream.const_data_ptr<scalar_t>();
        const auto* x_in = input.const_data_ptr<scalar_t>();
        const auto* order_in = order.const_data_ptr<int32_t>();
        auto* out = grad.mutable_data_ptr<scalar_t>();
        for_each_block(block_start, [&](int64_t row, int64_t begin, int64_t end) {
            const scalar_t *g = g_in + row * n, *x = x_in + row * n;
            const int32_t* index = order_in + row * n;
            scalar_t* grad_row = out + row * n;
            if (end - begin == 1) {
                grad_row[index[begin]] = 0;
                return;
            }
            const auto size = static_cast<double>(end - begin);
            if (!values) {
                double sum = 0;
                for (int64_t i = begin; i < end; ++i) sum += g[index[i]];
                for (int64_t i = begin; i < end; ++i) {
                    grad_row[index[i]] = static_cast<scalar_t>((g[index[i]] - sum / size) * slope);
                }
                return;
            }
            const double last = x[index[end - 1]];
            const auto weight = [&](int64_t i) { return std::exp(-std::abs(x[index[i]] - last) / strength); };
            double total = 0, weighted = 0;
            for (int64_t i = begin; i < end; ++i) {
                const double w = weight(i);
                total += w;
                weighted += w * g[index[i]];
                grad_row[index[i]] = static_cast<scalar_t>(w);
            }
            const double scale = size * (begin + (size + 1) * 0.5) / total * slope, mean = weighted / total;
            for (int64_t i = begin; i < end; ++i) {
                grad_row[index[i]] = static_cast<scalar_t>(scale * grad_row[index[i]] * (g[index[i]] - mean));
            }
        });
    });
    return grad.to(grad_ranks.scalar_type());
}

Tensor block_sum(const Tensor& values, const Tensor& block_start) {
    check_positions("block_start", block_start, values);
    const int64_t n = block_start.size(1);
    const Tensor input = values.to(at::toOpMathType(values.scalar_type())).contiguous();
    Tensor sums = at::empty_like(input);
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "block_sum", [&] {
        const auto* x = input.const_data_ptr<scalar_t>();
        auto* out = sums.mutable_data_ptr<scalar_t>();
        for_each_block(block_start, [&](int64_t row, int64_t begin, int64_t end) {
            double sum = 0;
            for (int64_t i = begin; i < end; ++i) sum += x[row * n + i];
            std::fill(out + row * n + begin, out + row * n + end, static_cast<scalar_t>(sum));
        });
    });
    return sums.to(values.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(robustloss, CPU, m) {
    m.impl("soft_sort", soft<kByPosition, SortL2, SortKL>);
    m.impl("soft_rank", soft<kByIndex, RankL2, RankKL>);
    m.impl("soft_sort_bwd", soft_sort_bwd);
    m.impl("soft_rank_bwd", soft_rank_bwd);
    m.impl("block_sum", block_sum);
}

}  // namespace robustloss

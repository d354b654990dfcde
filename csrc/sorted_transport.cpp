// The op `sorted_transport` on CPU: two samples of a row sorted, their quantile grids merged, the link of
// every cell. Schemas, layouts and equations: robustloss/ops/sorted_transport.py.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "preference_loss.h"
#include "sort.h"

namespace robustloss {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Samples that a thread takes at least: sorting fewer costs less than waking another thread.
constexpr int64_t kGrain = 4096;
// Memory of rows of so many samples is kept by the thread, 14 MB at most.
constexpr int64_t kKept = 1 << 18;

int64_t rows(const Tensor& x) { return x.dim() == 1 ? 1 : x.size(0); }

int64_t row_stride(const Tensor& x) { return x.dim() == 1 ? 0 : x.stride(0); }

/// One argument [R, n] or [n] or none, read in float64.
struct Argument {
    const char* name;
    const Tensor* tensor;  // null for none

    Argument(const char* name, const Tensor& tensor) : name(name), tensor(&tensor) {}
    Argument(const char* name, const OptionalTensor& tensor)
        : name(name), tensor(tensor ? &*tensor : nullptr) {}

    int64_t size() const { return tensor->size(-1); }

    /// Calls visit(i, value) over the row; false where a value is not finite.
    template <typename Visit>
    bool for_each(int64_t row, const Visit& visit) const {
        // With a bit added at its lowest end, an exponent of ones, that of NaN and infinity, runs over into
        // the sign.
        constexpr uint64_t exponent = 0x7ff0'0000'0000'0000, lowest = 0x0010'0000'0000'0000;
        uint64_t overflow = 0;
        AT_DISPATCH_FLOATING_TYPES_AND2(
            at::kHalf, at::kBFloat16, tensor->scalar_type(), "sorted_transport", [&] {
                const int64_t n = size(), stride = tensor->stride(-1);
                const scalar_t* x = tensor->const_data_ptr<scalar_t>() + row * row_stride(*tensor);
                const auto read = [&](int64_t i, int64_t at) {
                    const double value = static_cast<double>(static_cast<at::opmath_type<scalar_t>>(x[at]));
                    overflow |= (std::bit_cast<uint64_t>(value) & exponent) + lowest;
                    visit(i, value);
                };
                if (stride == 1) {
                    for (int64_t i = 0; i < n; ++i) read(i, i);
                } else {
                    for (int64_t i = 0; i < n; ++i) read(i, i * stride);
                }
            });
        return !(overflow >> 63);
    }

    void refuse_non_finite() const {
        if (tensor == nullptr) return;
        int64_t bad = 0, first_row = 0, first = 0;
        double first_value = 0;
        for (int64_t row = 0; row < rows(*tensor); ++row) {
            for_each(row, [&](int64_t i, double value) {
                if (std::isfinite(value) || bad++ > 0) return;
                first_row = row, first = i, first_value = value;
            });
        }
        TORCH_CHECK_VALUE(bad == 0, name, " holds ", bad, " non-finite value(s), the first at index (",
                          tensor->dim() == 1 ? "" : std::to_string(first_row) + ", ", first,
                          tensor->dim() == 1 ? ",): " : "): ",
                          std::isnan(first_value) ? "nan"
                          : first_value > 0       ? "inf"
                                                  : "-inf",
                          "; log-probabilities and losses must be finite");
    }

    void refuse_negative() const {
        if (tensor == nullptr) return;
        double smallest = 0;
        for (int64_t row = 0; row < rows(*tensor); ++row) {
            for_each(row, [&](int64_t, double value) { smallest = std::min(smallest, value); });
        }
        TORCH_CHECK_VALUE(smallest >= 0, name, " must be >= 0, got a minimum of ", smallest);
    }
};

/// What a side is made of: (values - reference)[i], weighted, where i is of this side.
struct Samples {
    Argument values, reference, weights;
    const Tensor* desirable;  // bool of their shape, or null: all samples are of this side
    bool label;               // that of this side's samples

    void check(const Tensor& u) const {
        const Tensor& x = *values.tensor;
        TORCH_CHECK_VALUE(x.dim() == u.dim() && rows(x) == rows(u), values.name, " must have shape [",
                          u.dim() == 1 ? "" : std::to_string(rows(u)) + ", ", "n], got ", x.sizes());
        TORCH_CHECK_VALUE(values.size() <= std::numeric_limits<int32_t>::max(), values.name,
                          " must have fewer than 2^31 samples a row, got ", values.size());
        for (const Argument& other : {reference, weights}) {
            TORCH_CHECK_VALUE(!other.tensor || other.tensor->sizes() == x.sizes(), other.name,
                              " must have shape ", x.sizes(), " (that of ", values.name, "), got ",
                              other.tensor->sizes());
        }
    }
};

struct SideMemory {
    Scratch<double> values, weights, sorted, levels;
    Scratch<int32_t> sample, kept;
    SortWorkspace sort;
};

/// One side of a row: the samples of positive weight, sorted.
struct Side {
    int64_t n = 0;
    const double* sorted = nullptr;  // [n]
    const double* levels = nullptr;  // [n], the mass up to and including each sample, the last 1; if weighted
    const int32_t* sample = nullptr;  // [n], position in the row
    double* gradient = nullptr;       // [n], room for as many
    bool valid = true;                // whether all values are finite and all weights finite and >= 0
};

/// Moves the samples that are of this side and have a weight to the front of `values` and `weights`, and
/// their positions to `kept`; how many there are.
int64_t keep(const Samples& samples, int64_t row, double* values, double* weights, int32_t* kept) {
    const int64_t size = samples.values.size();
    const int64_t stride = samples.desirable ? samples.desirable->stride(-1) : 0;
    const bool* desirable =
        samples.desirable ? samples.desirable->const_data_ptr<bool>() + row * row_stride(*samples.desirable)
                          : &samples.label;
    int64_t n = 0;
    for (int64_t i = 0; i < size; ++i) {
        kept[n] = static_cast<int32_t>(i);
        values[n] = values[i];
        if (weights) weights[n] = weights[i];
        n += desirable[i * stride] == samples.label && (!weights || weights[n] > 0);
    }
    return n;
}

Side sorted_side(const Samples& samples, int64_t row, bool weighted, SideMemory& memory) {
    Side side;
    side.n = samples.values.size();
    double* values = memory.values.reserve(side.n);
    side.valid = samples.values.for_each(row, [&](int64_t i, double x) { values[i] = x; });
    if (samples.reference.tensor) {
        side.valid &= samples.reference.for_each(row, [&](int64_t i, double x) { values[i] -= x; });
    }
    double* weights = nullptr;
    if (samples.weights.tensor) {
        weights = memory.weights.reserve(side.n);
        bool negative = false;
        side.valid &= samples.weights.for_each(row, [&](int64_t i, double w) {
            weights[i] = w;
            negative |= w < 0;
        });
        side.valid &= !negative;
    }
    if (!side.valid) return side;
    int32_t* kept = nullptr;
    if (weights || samples.desirable) {
        kept = memory.kept.reserve(side.n);
        side.n = keep(samples, row, values, weights, kept);
    }
    int32_t* sample = memory.sample.reserve(side.n);
    argsort(values, side.n, false, sample, memory.sort);
    double* sorted = memory.sorted.reserve(side.n);
    for (int64_t i = 0; i < side.n; ++i) sorted[i] = values[sample[i]];
    side.sorted = sorted;
    side.gradient = values;  // no longer needed
    if (weighted) {
        double* levels = memory.levels.reserve(side.n);
        double total = 0;
        for (int64_t i = 0; i < side.n; ++i) levels[i] = total += weights ? weights[sample[i]] : 1;
        for (int64_t i = 0; i < side.n; ++i) levels[i] /= total;
        side.levels = levels;
    }
    if (kept) {
        for (int64_t i = 0; i < side.n; ++i) sample[i] = kept[sample[i]];
    }
    side.sample = sample;
    return side;
}

/// Sums over cells; on the way to a mean, not yet divided by their number.
struct Totals {
    double value = 0, area = 0, w1 = 0;

    Totals& operator+=(const Totals& other) {
        value += other.value, area += other.area, w1 += other.w1;
        return *this;
    }
};

/// Up to kBlock cells: the sorted samples that meet in each, its mass, and what the link makes of its margin.
struct Cells {
    double margins[kBlock], losses[kBlock], slopes[kBlock], mass[kBlock];
    int32_t u[kBlock], v[kBlock];

    Totals sums(int64_t count, const double* mass, const Link& link) {
        Totals totals;
        for (int64_t c = 0; c < count; ++c) {
            losses[c] = std::max(-margins[c], 0.0);
            slopes[c] = margins[c] < 0 ? 1 : 0;
        }
        totals.w1 = sum(losses, mass, count);
        totals.area = sum(slopes, mass, count);
        link_losses(margins, count, link, losses, slopes);
        totals.value = sum(losses, mass, count);
        return totals;
    }
};

/// Calls run(block, cells) for every block, on several threads; the totals are added up in the blocks' order.
template <typename Run>
Totals sum_blocks(int64_t size, const Run& run) {
    const int64_t blocks = (size + kBlock - 1) / kBlock;
    c10::SmallVector<Totals, 8> totals(blocks);
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
        static thread_local Cells cells;
        for (int64_t block = first; block < last; ++block) totals[block] = run(block, cells);
    });
    Totals total;
    for (const Totals& block : totals) total += block;
    return total;
}

/// What a row gives.
template <typename scalar_t>
struct RowResults {
    scalar_t *value, *statistics, *u_gradient, *v_gradient;  // the gradients are zero until here

    void write(const Totals& totals) const {
        *value = static_cast<scalar_t>(totals.value);
        statistics[0] = static_cast<scalar_t>(totals.area);
        statistics[1] = static_cast<scalar_t>(totals.w1);
    }
};

/// n = m without weights: cell i is that of the two i-th smallest samples.
template <typename scalar_t>
Totals match_one_to_one(const Side& u, const Side& v, const Link& link, const RowResults<scalar_t>& results) {
    const int64_t n = u.n;
    const auto count = static_cast<double>(n);
    const double mass = 1 / count;
    const Totals total = sum_blocks(n, [&](int64_t block, Cells& cells) {
        const int64_t begin = block * kBlock, size = std::min(kBlock, n - begin);
        for (int64_t c = 0; c < size; ++c) cells.margins[c] = u.sorted[begin + c] - v.sorted[begin + c];
        const Totals totals = cells.sums(size, nullptr, link);
        for (int64_t c = 0; c < size; ++c) {
            const auto gradient = static_cast<scalar_t>(mass * cells.slopes[c]);
            results.u_gradient[u.sample[begin + c]] = gradient;
            results.v_gradient[v.sample[begin + c]] = -gradient;
        }
        return totals;
    });
    return {total.value / count, total.area / count, total.w1 / count};
}

/// The levels of both sides in one ascending sequence of n + m, u's first where two are equal. Cell k ends at
/// the k-th and starts at the one before.
template <typename Level>
struct Grid {
    int64_t n, m;
    Level u_levels, v_levels;

    /// How many of the first k levels are u's (a merge path).
    int64_t u_among(int64_t k) const {
        int64_t low = std::max<int64_t>(0, k - m), high = std::min(k, n);
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (u_levels(middle) <= v_levels(k - 1 - middle)) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }

    /// Writes the cells [begin, end) that have a mass; returns how many.
    int64_t fill(int64_t begin, int64_t end, double total, Cells& cells) const {
        int64_t i = u_among(begin), j = begin - i, count = 0;
        decltype(u_levels(0)) before = 0;
        if (i > 0) before = u_levels(i - 1);
        if (j > 0) before = std::max(before, v_levels(j - 1));
        // Where a side is used up, the other's remaining levels are the last one again.
        for (int64_t k = begin; k < end && i < n && j < m; ++k) {
            const auto u_level = u_levels(i), v_level = v_levels(j), level = std::min(u_level, v_level);
            cells.u[count] = static_cast<int32_t>(i);
            cells.v[count] = static_cast<int32_t>(j);
            cells.mass[count] = static_cast<double>(level - before) / total;
            count += level > before;
            before = level;
            const bool is_u = u_level <= v_level;
            i += is_u;
            j += !is_u;
        }
        return count;
    }
};

/// The gradient of one side's samples, whose cells follow each other. A block keeps what belongs to its first
/// sample apart, because that may have cells in other blocks too.
class Gradient {
  public:
    Gradient(const Side& side, int64_t size) : side_(side), first_((size + kBlock - 1) / kBlock) {
        std::fill_n(side.gradient, side.n, 0.0);
    }

    void add(int64_t block, const int32_t* index, const double* slopes, int64_t count) {
        if (count == 0) return;
        int64_t c = 0;
        double first = 0;
        for (; c < count && index[c] == index[0]; ++c) first += slopes[c];
        for (; c < count; ++c) side_.gradient[index[c]] += slopes[c];
        first_[block] = {index[0], first};
    }

    template <typename scalar_t>
    void write(scalar_t* to, double sign) {
        for (const First& first : first_) side_.gradient[first.index] += first.gradient;
        for (int64_t i = 0; i < side_.n; ++i) {
            to[side_.sample[i]] = static_cast<scalar_t>(sign * side_.gradient[i]);
        }
    }

  private:
    struct First {
        int32_t index = 0;
        double gradient = 0;
    };
    const Side& side_;
    c10::SmallVector<First, 8> first_;
};

/// Any sizes and weights: the cells of the merged grids.
template <typename scalar_t, typename Level>
Totals match_quantiles(const Side& u, const Side& v, const Grid<Level>& grid, double total_mass,
                       const Link& link, const RowResults<scalar_t>& results) {
    const int64_t size = u.n + v.n;
    Gradient u_gradient(u, size), v_gradient(v, size);
    const Totals total = sum_blocks(size, [&](int64_t block, Cells& cells) {
        const int64_t begin = block * kBlock;
        const int64_t count = grid.fill(begin, std::min(size, begin + kBlock), total_mass, cells);
        for (int64_t c = 0; c < count; ++c) cells.margins[c] = u.sorted[cells.u[c]] - v.sorted[cells.v[c]];
        const Totals totals = cells.sums(count, cells.mass, link);
        for (int64_t c = 0; c < count; ++c) cells.slopes[c] *= cells.mass[c];
        u_gradient.add(block, cells.u, cells.slopes, count);
        v_gradient.add(block, cells.v, cells.slopes, count);
        return totals;
    });
    u_gradient.write(results.u_gradient, 1);
    v_gradient.write(results.v_gradient, -1);
    return total;
}

template <typename scalar_t>
Totals match(const Side& u, const Side& v, bool weighted, const Link& link,
             const RowResults<scalar_t>& results) {
    if (u.n == 0 || v.n == 0) return {};
    if (weighted) {
        const auto level = [](const Side& side) { return [&](int64_t i) { return side.levels[i]; }; };
        return match_quantiles(u, v, Grid<decltype(level(u))>{u.n, v.n, level(u), level(v)}, 1, link,
                               results);
    }
    if (u.n == v.n) return match_one_to_one(u, v, link, results);
    // Levels i / n and j / m as integers over n m.
    const auto level = [](int64_t other) { return [=](int64_t i) { return (i + 1) * other; }; };
    const double total = static_cast<double>(u.n) * static_cast<double>(v.n);
    return match_quantiles(u, v, Grid<decltype(level(0))>{u.n, v.n, level(v.n), level(u.n)}, total, link,
                           results);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sorted_transport(
    const Tensor& u, const OptionalTensor& u_ref, const OptionalTensor& v, const OptionalTensor& v_ref,
    const OptionalTensor& desirable, const OptionalTensor& u_weights, const OptionalTensor& v_weights,
    std::string_view link_name, double beta, double label_smoothing) {
    TORCH_CHECK_VALUE(v.has_value() != desirable.has_value(), "give either v or desirable, got ",
                      v ? "both" : "neither");
    TORCH_CHECK_VALUE(v || (!v_ref && !v_weights), "v_ref and v_weights need v, got desirable");
    const Link link = parse_link(link_name, beta, label_smoothing);
    const bool weighted = u_weights || v_weights;
    const Samples u_samples{
        {"u", u}, {"u_ref", u_ref}, {"u_weights", u_weights}, desirable ? &*desirable : nullptr, true};
    const Samples v_samples =
        v ? Samples{{"v", *v}, {"v_ref", v_ref}, {"v_weights", v_weights}, nullptr, true}
          : Samples{u_samples.values, u_samples.reference, u_samples.weights, u_samples.desirable, false};
    TORCH_CHECK_VALUE(u.dim() == 1 || u.dim() == 2, "u must be [n] or [R, n], got ", u.sizes());
    u_samples.check(u);
    v_samples.check(u);
    TORCH_CHECK_VALUE(!desirable || desirable->sizes() == u.sizes(), "desirable must have shape ", u.sizes(),
                      " (that of u), got ", desirable->sizes());
    TORCH_CHECK_TYPE(!desirable || desirable->scalar_type() == at::kBool,
                     "desirable must have dtype bool, got ", desirable->scalar_type());

    const auto is_double = [](const OptionalTensor& x) { return x && x->scalar_type() == at::kDouble; };
    const bool in_double = is_double(u) || is_double(u_ref) || is_double(v) || is_double(v_ref);
    const auto options = u.options().dtype(in_double ? at::kDouble : at::kFloat);
    const int64_t R = rows(u), n = u.size(-1), m = v ? v->size(-1) : 0;
    c10::SmallVector<int64_t, 2> shape(u.sizes().begin(), u.sizes().end() - 1);
    Tensor value = at::empty(shape, options);
    shape.push_back(2);
    Tensor statistics = at::empty(shape, options);
    Tensor u_gradient = at::zeros(u.sizes(), options);
    Tensor v_gradient = v ? at::zeros(v->sizes(), options) : at::empty({0}, options);

    AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "sorted_transport", [&] {
        scalar_t* value_out = value.mutable_data_ptr<scalar_t>();
        scalar_t* statistics_out = statistics.mutable_data_ptr<scalar_t>();
        scalar_t* u_out = u_gradient.mutable_data_ptr<scalar_t>();
        scalar_t* v_out = v ? v_gradient.mutable_data_ptr<scalar_t>() : u_out;
        std::atomic<bool> valid{true}, overflows{false};
        const int64_t rows = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n + m));
        at::parallel_for(0, R, rows, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end && valid; ++row) {
                static thread_local SideMemory kept_memory[2];
                SideMemory* memory = kept_memory;  // of this thread, whichever takes the other side
                Side sides[2];
                at::parallel_for(0, 2, n + m > kGrain ? 1 : 2, [&](int64_t first, int64_t last) {
                    for (int64_t side = first; side < last; ++side) {
                        sides[side] =
                            sorted_side(side == 0 ? u_samples : v_samples, row, weighted, memory[side]);
                    }
                });
                if (sides[0].valid && sides[1].valid) {
                    const RowResults<scalar_t> results{value_out + row, statistics_out + 2 * row,
                                                       u_out + row * n, v_out + row * (v ? m : n)};
                    results.write(match(sides[0], sides[1], weighted, link, results));
                    if (!std::isfinite(value_out[row])) overflows = true;
                } else {
                    valid = false;
                }
                if (n + m > kKept) memory[0] = {}, memory[1] = {};
            }
        });
        TORCH_CHECK_VALUE(!overflows, "the samples are too large: the cost of their transport overflows ",
                          in_double ? "float64" : "float32");
        if (valid) return;
        for (const Samples& samples : {u_samples, v_samples}) {
            for (const Argument& argument : {samples.values, samples.reference, samples.weights}) {
                argument.refuse_non_finite();
            }
            samples.weights.refuse_negative();
        }
    });
    return {value, u_gradient, v_gradient, statistics};
}

}  // namespace

TORCH_LIBRARY_IMPL(robustloss, CPU, m) { m.impl("sorted_transport", sorted_transport); }

}  // namespace robustloss

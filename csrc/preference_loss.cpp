// The op `preference_loss` on CPU: margins, link and aggregate of a batch, with the gradient.
// Schema and equations: robustloss/ops/preference_loss.py; the adversaries: robustloss/naive/worst_case.py.
#include "preference_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>
#include <sstream>
#include <tuple>
#include <utility>
#include <vector>

#include "instruction_set.h"
#include "preference_loss_kernel.h"

namespace robustloss {
namespace {

using at::Tensor;

constexpr double infinity = PairSums::infinity;
constexpr double nan = std::numeric_limits<double>::quiet_NaN();
// The threshold is found by halving a bracket until so few losses are left in it, and sorting those.
constexpr int kFew = 256;

/// The kernels of the best instruction set that this processor has.
const PreferenceKernels& kernels() {
    static const PreferenceKernels& best = ROBUSTLOSS_BEST(preference_kernels);
    return best;
}

/// Calls run(begin, n) for blocks of kBlock; several go to several threads.
template <typename Run>
void for_each_block(int64_t n, const Run& run) {
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    const auto run_blocks = [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
            run(block * kBlock, std::min(kBlock, n - block * kBlock));
        }
    };
    if (blocks <= 1) {
        run_blocks(0, blocks);
    } else {
        at::parallel_for(0, blocks, 1, run_blocks);
    }
}

/// What run(begin, n) gives for each block, added up in the order of the blocks whatever the number of
/// threads.
template <typename Sums, typename Run>
Sums sum_blocks(int64_t n, const Run& run) {
    if (n <= kBlock) return run(0, n);
    c10::SmallVector<Sums, 16> parts((n + kBlock - 1) / kBlock);
    for_each_block(n, [&](int64_t begin, int64_t size) { parts[begin / kBlock] = run(begin, size); });
    Sums sums = parts[0];
    for (size_t block = 1; block < parts.size(); ++block) sums.add(parts[block]);
    return sums;
}

enum class Aggregate {
    Mean,
    KLTilt,
    KLBall,
    KLTiltUnnormalized,
    CVaR,
    ChiSquare,
    TotalVariation,
    SoftMin,
};

Aggregate parse_aggregate(std::string_view name) {
    constexpr std::array<std::pair<std::string_view, Aggregate>, 8> names{{
        {"mean", Aggregate::Mean},
        {"kl_tilt", Aggregate::KLTilt},
        {"kl_ball", Aggregate::KLBall},
        {"kl_tilt_unnormalized", Aggregate::KLTiltUnnormalized},
        {"cvar", Aggregate::CVaR},
        {"chi_square", Aggregate::ChiSquare},
        {"total_variation", Aggregate::TotalVariation},
        {"soft_min", Aggregate::SoftMin},
    }};
    for (const auto& [known, aggregate] : names) {
        if (name == known) return aggregate;
    }
    TORCH_CHECK_VALUE(
        false, "aggregate must be one of 'mean', 'kl_tilt', 'kl_ball', 'kl_tilt_unnormalized', 'cvar', ",
        "'chi_square', 'total_variation', 'soft_min', got '", name, "'");
}

// ---- which reweighting of the losses ----------------------------------------------------------------------

/// Losses with their nominal weights (null: ones), and what is known of them.
class Losses {
  public:
    Losses(const double* losses, const double* weights, int64_t n, const PairSums& sums)
        : losses_(losses),
          weights_(weights),
          n_(n),
          mass_(sums.mass),
          high_(sums.largest),
          low_(sums.smallest) {}

    double mass() const { return mass_; }

    static Reweighting nominal() { return {.kind = Reweighting::Kind::Step, .origin = -infinity}; }

    Reweighting tilt(double temperature) const {
        // Shifted before the division: l / tau would overflow, or round the differences of large losses away.
        return {.kind = Reweighting::Kind::Exponential, .origin = high_, .slope = inverse(temperature)};
    }

    Reweighting soft_min(double temperature) const {
        return {.kind = Reweighting::Kind::Exponential, .origin = low_, .slope = -inverse(temperature)};
    }

    /// -beta' log sum q exp(-l / beta'), the value of `soft_min`.
    double soft_min_value(double temperature) const {
        const double slope = -inverse(temperature);
        // At a high temperature the sum is close to one, and only exp - 1 leaves digits of its logarithm.
        const bool near_one = (low_ - high_) * slope < 1;
        const double mean = tilted(low_ - high_, slope, near_one).zeroth / mass_;
        return low_ - temperature * (near_one ? std::log1p(mean) : std::log(mean));
    }

    Reweighting unnormalized_tilt(double temperature, double max_weight) const {
        const double total = sum_blocks<Sum>(n_, [&](int64_t begin, int64_t n) {
                                 return Sum{kernels().sum_block(losses_ + begin, at(begin), n)};
                             }).value;
        return {.kind = Reweighting::Kind::Exponential,
                .origin = total / mass_,
                .slope = inverse(temperature),
                .limit = max_weight};
    }

    /// The worst case over KL(P || q) <= rho, and its temperature.
    std::pair<Reweighting, double> kl_ball(double rho) const {
        if (rho == 0) return {nominal(), infinity};
        const Split maximum = split_at_maximum();
        if (rho >= std::log1p(maximum.mass_below / maximum.mass_above)) return {maximisers(), 0};
        const double temperature = 1 / solve_sharpness(rho);
        return {tilt(temperature), temperature};
    }

    Reweighting cvar(double alpha) const {
        const Threshold threshold = heaviest(alpha * mass_);
        return {.kind = Reweighting::Kind::Step, .origin = threshold.loss, .level = threshold.kept};
    }

    Reweighting total_variation_ball(double rho) const {
        const Split maximum = split_at_maximum();
        const double moved = std::min(rho * mass_, maximum.mass_below);
        const Threshold threshold = heaviest(mass_ - moved);
        return {.kind = Reweighting::Kind::Step,
                .origin = threshold.loss,
                .level = threshold.kept,
                .maximum = high_,
                .extra = moved / maximum.mass_above};
    }

    /// P proportional to q (l - eta)_+ with sum P^2 / q = 1 + rho. The losses above eta alone, of mass M,
    /// mean m and variance v, give eta by (m - eta)^2 (M (1 + rho) - 1) = v.
    Reweighting chi_square_ball(double rho) const {
        if (rho == 0) return nominal();
        const Split maximum = split_at_maximum();
        if (rho * maximum.mass_above >= maximum.mass_below) return maximisers();
        // Relative to the maximum. A threshold too low gives a better one that is higher, and the other way
        // round; a set of losses that gives itself back is the solution.
        double low = low_ - high_, high = 0, threshold = -infinity, mean = low / 2, count = -1;
        for (int step = 0; step < 200; ++step) {
            const Excess above = excess(threshold, mean);
            const double shift = above.first / above.mass_above;
            const double variance = std::max(0.0, above.second / above.mass_above - shift * shift);
            const double excess = (rho * above.mass_above - above.mass_below) / mass_;
            mean += shift;
            const double better = excess > 0 ? mean - std::sqrt(variance / excess) : -infinity;
            if (above.count_above == count) {
                threshold = better;
                break;
            }
            if (step > 0) (better > threshold ? low : high) = threshold;
            const bool inside = step == 0 || (low < better && better < high);
            count = inside ? above.count_above : -1;
            threshold = inside ? better : std::midpoint(low, high);
        }
        return {.kind = Reweighting::Kind::Excess, .origin = threshold, .maximum = high_};
    }

  private:
    struct Sum {
        double value = 0;
        void add(const Sum& other) { value += other.value; }
    };
    struct Threshold {
        double loss, kept;  // the share of the mass at the threshold that is kept
    };

    // An infinite slope would make NaN of the maximum's zero.
    static double inverse(double temperature) { return 1 / std::max(temperature, 1e-300); }

    const double* at(int64_t begin) const { return weights_ == nullptr ? nullptr : weights_ + begin; }

    Split split(double threshold) const {
        return sum_blocks<Split>(n_, [&](int64_t begin, int64_t n) {
            return kernels().split(losses_ + begin, at(begin), n, threshold);
        });
    }

    /// Those above are the losses that equal the maximum.
    Split split_at_maximum() const { return split(std::nextafter(high_, -infinity)); }

    Excess excess(double threshold, double offset) const {
        return sum_blocks<Excess>(n_, [&](int64_t begin, int64_t n) {
            return kernels().excess(losses_ + begin, at(begin), n, high_, offset, threshold);
        });
    }

    Reweighting maximisers() const { return {.kind = Reweighting::Kind::Step, .origin = high_, .level = 1}; }

    Tilted tilted(double offset, double slope, bool near_one) const {
        return sum_blocks<Tilted>(n_, [&](int64_t begin, int64_t n) {
            return kernels().tilted(losses_ + begin, at(begin), n, high_, offset, slope, near_one);
        });
    }

    /// The 1 / tau at which KL(P_tau || q) = rho: Newton for log KL as a function of log(1 / tau), kept
    /// inside a bracket by bisection. KL rises from 0 like 1 / tau^2 at first, a straight line in the
    /// logarithms.
    double solve_sharpness(double rho) const {
        const double spread = high_ - low_;
        const Tilted plain = tilted(0, 0, false);
        const double mean = plain.first / mass_, centre_to_end = std::max(-mean, spread + mean);
        const double variance = plain.second / mass_ - mean * mean;
        // KL is variance / (2 tau^2) at first, and at most spread^2 / (8 tau^2).
        double low = std::log(8 * rho) / 2 - std::log(spread) - 1e-6, high = 200 - std::log(spread);
        double position = (std::log(2 * rho) - std::log(variance)) / 2;
        if (!(low < position && position < high)) position = -std::log(spread);
        bool bracketed = false;
        double last_move = infinity;
        for (int step = 0; step < 200; ++step) {
            const double sharpness = std::exp(position);
            // Both terms of a small KL are close to zero and cancel to the second order: only exp - 1 leaves
            // digits.
            const bool near_one = sharpness * centre_to_end < 1;
            const Tilted sums = tilted(near_one ? mean : 0, sharpness, near_one);
            const double z = sums.zeroth / mass_, first = sums.first / mass_, second = sums.second / mass_;
            const double total = near_one ? 1 + z : z, tilted_mean = first / total;
            const double divergence = sharpness * tilted_mean - (near_one ? std::log1p(z) : std::log(z));
            (divergence < rho ? low : high) = position;
            bracketed |= divergence >= rho;
            const double slope = sharpness * sharpness * (second / total - tilted_mean * tilted_mean);
            double move = divergence > 0 && slope > 0 ? divergence * std::log(rho / divergence) / slope : nan;
            // Where KL rises in steps Newton may run in circles; a move that does not shrink is no good.
            const bool newton = low <= position + move && position + move <= high &&
                                (!bracketed || std::abs(move) <= std::abs(last_move) / 2);
            if (!newton) move = std::midpoint(low, high) - position;
            position += move;
            last_move = move;
            // Newton's error is about the square of its last step.
            if (std::abs(move) <= (newton ? 1e-8 : 1e-13)) break;
        }
        return std::exp(position);
    }

    /// The largest losses, as many as hold a mass of `share`.
    Threshold heaviest(double share) const {
        double low = low_, high = high_, above = 0, count_above = 0, candidates = static_cast<double>(n_);
        while (low < high && candidates > kFew) {
            const Split sides = split(between(low, high));
            if (sides.mass_above >= share) {
                low = sides.lowest_above;
                candidates = sides.count_above - count_above;
            } else {
                high = sides.highest_below;
                candidates -= sides.count_above - count_above;
                above = sides.mass_above;
                count_above = sides.count_above;
            }
        }
        if (low == high) {
            const double here = split(std::nextafter(low, -infinity)).mass_above - above;
            return {low, std::min(1.0, (share - above) / here)};
        }
        std::array<std::pair<double, double>, kFew + 1> levels;  // loss, weight
        int count = 0;
        for (int64_t i = 0; i < n_; ++i) {
            const double weight = weights_ == nullptr ? 1 : weights_[i];
            levels[count] = {losses_[i], weight};
            count += weight > 0 && low <= losses_[i] &&
                     losses_[i] <= high;  // without a jump that none can foretell
        }
        std::sort(levels.begin(), levels.begin() + count, [](auto a, auto b) { return a.first > b.first; });
        for (int i = 0; i < count;) {
            const double loss = levels[i].first;
            double here = 0;
            for (; i < count && levels[i].first == loss; ++i) here += levels[i].second;
            if (above + here >= share) return {loss, (share - above) / here};
            above += here;
        }
        return {low, 1};
    }

    /// A number from `low` up to but not including `high`, halfway in the order of floating-point numbers, so
    /// that 64 halvings always do.
    static double between(double low, double high) {
        const auto flip = [](int64_t bits) {
            return bits ^ ((bits >> 63) & std::numeric_limits<int64_t>::max());
        };
        const int64_t a = flip(std::bit_cast<int64_t>(low)), b = flip(std::bit_cast<int64_t>(high));
        return std::bit_cast<double>(flip((a & b) + ((a ^ b) >> 1)));
    }

    const double *losses_, *weights_;
    int64_t n_;
    double mass_, high_, low_;
};

// ---- inputs that are refused, in the words of robustloss/validation.py ------------------------------------

void check_finite(const char* name, const Tensor& vector) {
    const Tensor values = vector.to(at::kDouble).contiguous();
    const double* value = values.const_data_ptr<double>();
    const int64_t n = values.numel();
    const auto is_bad = [](double x) { return !std::isfinite(x); };
    const int64_t first = std::find_if(value, value + n, is_bad) - value;
    if (first == n) return;
    const char* what = std::isnan(value[first]) ? "nan" : value[first] > 0 ? "inf" : "-inf";
    TORCH_CHECK_VALUE(false, name, " holds ", std::count_if(value, value + n, is_bad),
                      " non-finite value(s), the first at index (", first, ",): ", what,
                      "; log-probabilities and losses must be finite");
}

void check_vector(const char* name, const Tensor& vector, const Tensor& chosen) {
    TORCH_CHECK_TYPE(at::isFloatingType(vector.scalar_type()) && vector.element_size() >= 2, name,
                     " must have dtype float32, bfloat16, float16, float64, got ", vector.scalar_type());
    TORCH_CHECK_VALUE(vector.dim() == 1, name, " must be [B], got ", vector.sizes());
    TORCH_CHECK_VALUE(vector.sizes() == chosen.sizes(), name, " must have shape ", chosen.sizes(),
                      " (chosen's shape), got ", vector.sizes());
    TORCH_CHECK_VALUE(vector.is_cpu(), name, " is on ", vector.device(), " but chosen is on ",
                      chosen.device(), "; move one of them");
}

/// Refuses what finite log-probabilities have become infinite or NaN in.
void check_size(double value, const char* dtype) {
    TORCH_CHECK_VALUE(std::isfinite(value),
                      "the log-probabilities (or losses) are too large: the loss overflows ", dtype);
}

/// Multiplies losses whose squares are no float64, and with them the temperature (null: there is none), by a
/// power of two, which every aggregate lets through; returns its exponent.
int scale_to_one(double* losses, int64_t n, PairSums& sums, double* temperature) {
    const double magnitude = std::max(std::abs(sums.largest), std::abs(sums.smallest));
    if (magnitude == 0 || (1e-140 < magnitude && magnitude < 1e140)) return 0;
    int exponent = -std::ilogb(magnitude);
    if (temperature != nullptr && *temperature > 0) {
        exponent = std::min(exponent, 1000 - std::ilogb(*temperature));  // or it would overflow
        *temperature = std::ldexp(*temperature, exponent);
    }
    for (int64_t i = 0; i < n; ++i) losses[i] = std::ldexp(losses[i], exponent);
    sums.largest = std::ldexp(sums.largest, exponent);
    sums.smallest = std::ldexp(sums.smallest, exponent);
    return exponent;
}

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor> preference_loss(
    const Tensor& chosen, const Optional& rejected, const Optional& ref_chosen, const Optional& ref_rejected,
    const Optional& weights, std::string_view link_name, double beta, double label_smoothing,
    std::string_view aggregate_name, double parameter, double max_weight) {
    const Link link = parse_link(link_name, beta, label_smoothing);
    const Aggregate aggregate = parse_aggregate(aggregate_name);
    constexpr std::array<const char*, 5> names{"chosen", "rejected", "ref_chosen", "ref_rejected", "weights"};
    Tensor copies[5];  // hold what is not contiguous
    Source sources[5];
    auto dtype = at::kFloat;
    const std::array<const Tensor*, 5> given{
        &chosen, rejected ? &*rejected : nullptr, ref_chosen ? &*ref_chosen : nullptr,
        ref_rejected ? &*ref_rejected : nullptr, weights ? &*weights : nullptr};
    for (size_t i = 0; i < given.size(); ++i) {
        if (given[i] == nullptr) continue;
        check_vector(names[i], *given[i], chosen);
        const Tensor* vector = given[i];
        if (!vector->is_contiguous()) vector = &(copies[i] = vector->contiguous());
        sources[i] = {vector->const_data_ptr(), vector->scalar_type()};
        if (i < 4 && vector->scalar_type() == at::kDouble) dtype = at::kDouble;
    }
    const Pairs pairs{sources[0], sources[1], sources[2], sources[3], sources[4]};
    const int64_t n = chosen.numel();

    const auto options = chosen.options().dtype(dtype);
    Tensor value = at::empty({}, options), statistics = at::empty({8}, options);
    Tensor gradient = at::empty({n}, options), worst_case = at::empty({n}, options);
    if (n == 0) {
        value.zero_();
        statistics.fill_(nan);
        return {value, gradient, worst_case, statistics};
    }

    const Tensor scratch = at::empty({(weights ? 3 : 2) * n}, chosen.options().dtype(at::kDouble));
    double* losses = scratch.mutable_data_ptr<double>();
    double* slopes = losses + n;
    double* nominal = weights ? slopes + n : nullptr;
    const auto at_block = [&](int64_t begin) { return nominal == nullptr ? nullptr : nominal + begin; };

    PairSums sums = sum_blocks<PairSums>(n, [&](int64_t begin, int64_t size) {
        return kernels().read_pairs(pairs, begin, size, link, losses + begin, slopes + begin,
                                    at_block(begin));
    });
    if (sums.invalid != 0) {
        for (size_t i = 0; i < given.size(); ++i) {
            if (given[i] != nullptr) check_finite(names[i], *given[i]);
        }
        check_size(nan, "float64");  // their differences
    }
    if (weights) {
        TORCH_CHECK_VALUE(sums.smallest_weight >= 0, "weights must be >= 0, got a minimum of ",
                          sums.smallest_weight);
        TORCH_CHECK_VALUE(sums.mass > 0, "weights must not all be zero");
    }

    check_size(std::max(std::abs(sums.largest), std::abs(sums.smallest)), "float64");
    const bool has_temperature = aggregate == Aggregate::KLTilt || aggregate == Aggregate::SoftMin ||
                                 aggregate == Aggregate::KLTiltUnnormalized;
    double temperature = parameter;
    const int exponent = scale_to_one(losses, n, sums, has_temperature ? &temperature : nullptr);
    const Losses batch(losses, nominal, n, sums);
    Reweighting reweighting = Losses::nominal();
    double tau = nan, soft_min = nan;
    switch (aggregate) {
        case Aggregate::Mean:
            break;
        case Aggregate::KLTilt:
            reweighting = batch.tilt(temperature);
            tau = temperature;
            break;
        case Aggregate::KLBall:
            std::tie(reweighting, tau) = batch.kl_ball(parameter);
            break;
        case Aggregate::KLTiltUnnormalized:
            reweighting = batch.unnormalized_tilt(temperature, max_weight);
            tau = temperature;
            break;
        case Aggregate::CVaR:
            reweighting = batch.cvar(parameter);
            break;
        case Aggregate::ChiSquare:
            reweighting = batch.chi_square_ball(parameter);
            break;
        case Aggregate::TotalVariation:
            reweighting = batch.total_variation_ball(parameter);
            break;
        case Aggregate::SoftMin:
            reweighting = batch.soft_min(temperature);
            soft_min = batch.soft_min_value(temperature);
            break;
    }

    double* p = losses;  // each loss makes place for its weight
    const Moments moments = sum_blocks<Moments>(n, [&](int64_t begin, int64_t size) {
        return kernels().reweigh(reweighting, losses + begin, at_block(begin), size, p + begin);
    });
    const double total = aggregate == Aggregate::KLTiltUnnormalized ? sums.mass : moments.mass;
    const double scaled = aggregate == Aggregate::SoftMin ? soft_min : moments.weighted / total;
    const double result = std::ldexp(scaled, -exponent);
    double summary[8];
    for (int i = 0; i < 5; ++i) summary[i] = sums.statistics[i] / static_cast<double>(n);
    summary[5] = moments.mass * moments.mass / moments.squares;
    summary[6] = moments.largest / total;
    summary[7] = std::ldexp(tau, -exponent);
    check_size(dtype == at::kFloat ? static_cast<float>(result) : result,
               dtype == at::kFloat ? "float32" : "float64");

    AT_DISPATCH_FLOATING_TYPES(dtype, "preference_loss", [&] {
        *value.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(result);
        std::copy(summary, summary + 8, statistics.mutable_data_ptr<scalar_t>());
        scalar_t* worst_case_out = worst_case.mutable_data_ptr<scalar_t>();
        scalar_t* gradient_out = gradient.mutable_data_ptr<scalar_t>();
        for_each_block(n, [&](int64_t begin, int64_t size) {
            kernels().write(p + begin, slopes + begin, size, 1 / total, worst_case_out + begin,
                            gradient_out + begin);
        });
    });
    return {value, gradient, worst_case, statistics};
}

}  // namespace

Link parse_link(std::string_view name, double beta, double label_smoothing) {
    constexpr std::array<std::pair<std::string_view, LinkName>, 7> names{{
        {"identity", LinkName::Identity},
        {"logistic", LinkName::Logistic},
        {"robust", LinkName::Robust},
        {"hinge", LinkName::Hinge},
        {"squared_hinge", LinkName::SquaredHinge},
        {"least_squares", LinkName::LeastSquares},
        {"ipo", LinkName::Ipo},
    }};
    for (const auto& [known, link] : names) {
        if (name == known) return {link, beta, label_smoothing};
    }
    TORCH_CHECK_VALUE(false,
                      "link must be one of 'identity', 'logistic', 'robust', 'hinge', 'squared_hinge', ",
                      "'least_squares', 'ipo', got '", name, "'");
}

void link_losses(const double* margins, int64_t n, const Link& link, double* losses, double* slopes) {
    kernels().link_block(margins, n, link, losses, slopes);
}

double sum(const double* values, const double* weights, int64_t n) {
    double result = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const double* mass = weights == nullptr ? nullptr : weights + begin;
        result += kernels().sum_block(values + begin, mass, std::min(kBlock, n - begin));
    }
    return result;
}

TORCH_LIBRARY_IMPL(robustloss, CPU, m) { m.impl("preference_loss", preference_loss); }

}  // namespace robustloss

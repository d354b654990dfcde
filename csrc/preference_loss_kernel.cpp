// The passes of `preference_loss` over a block, compiled once per instruction set, of which CPU_CAPABILITY is
// the name.
#include "preference_loss_kernel.h"

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

namespace robustloss::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<double>;
using at::vec::fmadd;
using at::vec::maximum;
using at::vec::minimum;

constexpr double infinity = PairSums::infinity;
constexpr int kWidth = Vec::size();
// Pairs that are converted to double at a time: few enough to stay in the L1 cache.
constexpr int64_t kTile = 256;

/// Calls body(i, count) for the vectors of count values that start at i. The last may be shorter: what is
/// loaded beyond it is 0.
template <typename Body>
inline void for_each_vector(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) body(i, kWidth);
    if (i < n) body(i, static_cast<int>(n - i));
}

inline Vec load(const double* values, int64_t i, int count) {
    return count == kWidth ? Vec::loadu(values + i) : Vec::loadu(values + i, count);
}

inline Vec load_weights(const double* weights, int64_t i, int count) {
    if (weights != nullptr) return load(weights, i, count);
    return count == kWidth ? Vec(1) : Vec::set(Vec(0), Vec(1), count);
}

inline Vec where(Vec mask, Vec value, Vec otherwise) { return Vec::blendv(otherwise, value, mask); }

template <typename Combine>
inline double reduce(Vec vector, const Combine& combine) {
    double lanes[kWidth];
    vector.store(lanes);
    for (int half = kWidth / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
    }
    return lanes[0];
}

inline double total(Vec vector) {
    return reduce(vector, [](double a, double b) { return a + b; });
}
inline double largest(Vec vector) {
    return reduce(vector, [](double a, double b) { return std::max(a, b); });
}
inline double smallest(Vec vector) {
    return reduce(vector, [](double a, double b) { return std::min(a, b); });
}

// ---- links
// ---------------------------------------------------------------------------------------------------

/// log(1 + e) for 0 <= e <= 1, as 2 artanh(z) with z = e / (2 + e) <= 1/3: to a few units in the last place.
inline Vec log_one_plus(Vec e) {
    const Vec z = e / (Vec(2) + e), square = z * z;
    Vec series(1.0 / 33);
    for (int odd = 31; odd > 0; odd -= 2) series = fmadd(series, square, Vec(1.0 / odd));
    return (z + z) * series;
}

struct LossAndSlope {
    Vec loss, slope;
};

template <LinkName name>
inline LossAndSlope apply_link(Vec h, double beta, double smoothing) {
    const Vec zero(0), one(1), b(beta);
    if constexpr (name == LinkName::Logistic || name == LinkName::Robust) {
        const Vec x = b * h, e = x.abs().neg().exp_u20(), common = log_one_plus(e), inverse = one / (one + e);
        const Vec right = common + maximum(x.neg(), zero);        // -log sigmoid(x)
        const Vec wrong = where(x > zero, e * inverse, inverse);  // sigmoid(-x)
        if constexpr (name == LinkName::Logistic) {
            return {fmadd(Vec(smoothing), x, right), b * (Vec(smoothing) - wrong)};
        } else {
            const Vec flipped = common + maximum(x, zero), keep(1 - smoothing), flip(smoothing);
            const Vec scale(1 / (1 - 2 * smoothing));
            const Vec sigmoid = where(x > zero, inverse, e * inverse);
            return {(keep * right - flip * flipped) * scale,
                    b * scale * (keep * wrong + flip * sigmoid).neg()};
        }
    } else if constexpr (name == LinkName::Hinge) {
        const Vec loss = one - b * h;
        return {maximum(loss, zero), where(loss > zero, b.neg(), zero)};
    } else if constexpr (name == LinkName::SquaredHinge) {
        const Vec gap = maximum(b - h, zero);
        return {gap * gap, Vec(-2) * gap};
    } else if constexpr (name == LinkName::LeastSquares) {
        const Vec gap = b - h;
        return {gap * gap, Vec(-2) * gap};
    } else if constexpr (name == LinkName::Ipo) {
        const Vec gap = h - Vec(1 / (2 * beta));
        return {gap * gap, Vec(2) * gap};
    } else {
        return {h, one};
    }
}

template <LinkName name>
void link_losses_of(const double* margins, int64_t n, const Link& link, double* losses, double* slopes) {
    for_each_vector(n, [&](int64_t i, int count) {
        const LossAndSlope result =
            apply_link<name>(load(margins, i, count), link.beta, link.label_smoothing);
        result.loss.store(losses + i, count);
        result.slope.store(slopes + i, count);
    });
}

void link_block(const double* margins, int64_t n, const Link& link, double* losses, double* slopes) {
    switch (link.name) {
        case LinkName::Identity:
            return link_losses_of<LinkName::Identity>(margins, n, link, losses, slopes);
        case LinkName::Logistic:
            return link_losses_of<LinkName::Logistic>(margins, n, link, losses, slopes);
        case LinkName::Robust:
            return link_losses_of<LinkName::Robust>(margins, n, link, losses, slopes);
        case LinkName::Hinge:
            return link_losses_of<LinkName::Hinge>(margins, n, link, losses, slopes);
        case LinkName::SquaredHinge:
            return link_losses_of<LinkName::SquaredHinge>(margins, n, link, losses, slopes);
        case LinkName::LeastSquares:
            return link_losses_of<LinkName::LeastSquares>(margins, n, link, losses, slopes);
        case LinkName::Ipo:
            return link_losses_of<LinkName::Ipo>(margins, n, link, losses, slopes);
    }
}

double sum_block(const double* values, const double* weights, int64_t n) {
    Vec result(0);
    for_each_vector(n, [&](int64_t i, int count) {
        result = fmadd(load_weights(weights, i, count), load(values, i, count), result);
    });
    return total(result);
}

// ---- the inputs
// ----------------------------------------------------------------------------------------------

template <typename scalar_t>
inline void widen(const void* data, int64_t begin, int64_t n, double* to) {
    const scalar_t* from = static_cast<const scalar_t*>(data) + begin;
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<double>(from[i]);
}

/// Values begin, ..., begin + n - 1 as doubles.
inline void read(const Source& source, int64_t begin, int64_t n, double* to) {
    if (source.data == nullptr) {
        std::fill_n(to, n, 0.0);
        return;
    }
    switch (source.dtype) {
        case c10::ScalarType::Double:
            return widen<double>(source.data, begin, n, to);
        case c10::ScalarType::BFloat16:
            return widen<c10::BFloat16>(source.data, begin, n, to);
        case c10::ScalarType::Half:
            return widen<c10::Half>(source.data, begin, n, to);
        default:
            return widen<float>(source.data, begin, n, to);
    }
}

template <bool weighted>
PairSums read_pairs_of(const Pairs& pairs, int64_t begin, int64_t n, const Link& link, double* losses,
                       double* slopes, double* weights) {
    const Vec zero(0), one(1);
    Vec statistics[5] = {zero, zero, zero, zero, zero}, mass(0), invalid(0);
    Vec high(-infinity), low(infinity), low_weight(infinity);
    double chosen[kTile], rejected[kTile], ref_chosen[kTile], ref_rejected[kTile], margins[kTile];
    for (int64_t tile = 0; tile < n; tile += kTile) {
        const int64_t size = std::min(kTile, n - tile);
        read(pairs.chosen, begin + tile, size, chosen);
        read(pairs.rejected, begin + tile, size, rejected);
        read(pairs.ref_chosen, begin + tile, size, ref_chosen);
        read(pairs.ref_rejected, begin + tile, size, ref_rejected);
        if (weighted) read(pairs.weights, begin + tile, size, weights + tile);
        for_each_vector(size, [&](int64_t i, int count) {
            const Vec a = load(chosen, i, count), b = load(rejected, i, count);
            const Vec chosen_ratio = a - load(ref_chosen, i, count);
            const Vec rejected_ratio = b - load(ref_rejected, i, count);
            const Vec margin = chosen_ratio - rejected_ratio;
            statistics[0] = statistics[0] + a;
            statistics[1] = statistics[1] + b;
            statistics[2] = statistics[2] + chosen_ratio;
            statistics[3] = statistics[3] + rejected_ratio;
            statistics[4] = statistics[4] + where(chosen_ratio > rejected_ratio, one, zero);
            invalid = invalid + (margin - margin);  // 0, or NaN where one of the four is not finite
            margin.store(margins + i, count);
        });
        link_block(margins, size, link, losses + tile, slopes + tile);
        for_each_vector(size, [&](int64_t i, int count) {
            const Vec loss = load(losses, tile + i, count);
            const Vec weight = load_weights(weighted ? weights : nullptr, tile + i, count);
            mass = mass + weight;
            if (weighted) {
                invalid = invalid + (weight - weight);
                low_weight = minimum(low_weight, weight);
            }
            const bool all_count = !weighted && count == kWidth;
            high = maximum(high, all_count ? loss : where(weight > zero, loss, Vec(-infinity)));
            low = minimum(low, all_count ? loss : where(weight > zero, loss, Vec(infinity)));
        });
    }
    PairSums sums;
    for (int i = 0; i < 5; ++i) sums.statistics[i] = total(statistics[i]);
    sums.mass = total(mass);
    sums.largest = largest(high);
    sums.smallest = smallest(low);
    sums.smallest_weight = smallest(low_weight);
    sums.invalid = total(invalid);
    return sums;
}

PairSums read_pairs(const Pairs& pairs, int64_t begin, int64_t n, const Link& link, double* losses,
                    double* slopes, double* weights) {
    const auto read_all = weights == nullptr ? read_pairs_of<false> : read_pairs_of<true>;
    return read_all(pairs, begin, n, link, losses, slopes, weights);
}

// ---- weights
// -------------------------------------------------------------------------------------------------

template <typename Factor>
inline Moments reweigh_by(const Factor& factor, const double* losses, const double* weights, int64_t n,
                          double* p) {
    const Vec zero(0);
    Vec mass(0), weighted(0), squares(0), high(0);
    for_each_vector(n, [&](int64_t i, int count) {
        const Vec loss = load(losses, i, count), weight = load_weights(weights, i, count);
        const Vec product = where(weight > zero, weight * factor(loss), zero);
        mass = mass + product;
        weighted = fmadd(product, loss, weighted);
        squares = fmadd(product, product, squares);
        high = maximum(high, product);
        product.store(p + i, count);
    });
    return {total(mass), total(weighted), total(squares), largest(high)};
}

Moments reweigh(const Reweighting& reweighting, const double* losses, const double* weights, int64_t n,
                double* p) {
    const Vec origin(reweighting.origin), zero(0), one(1), top(reweighting.maximum);
    switch (reweighting.kind) {
        case Reweighting::Kind::Exponential: {
            const Vec slope(reweighting.slope), limit(reweighting.limit);
            const auto factor = [&](Vec loss) { return minimum(((loss - origin) * slope).exp_u20(), limit); };
            return reweigh_by(factor, losses, weights, n, p);
        }
        case Reweighting::Kind::Step: {
            const Vec level(reweighting.level), extra(reweighting.extra);
            const auto factor = [&](Vec loss) {
                const Vec step = where(loss > origin, one, where(loss == origin, level, zero));
                return step + where(loss == top, extra, zero);
            };
            return reweigh_by(factor, losses, weights, n, p);
        }
        case Reweighting::Kind::Excess:
            return reweigh_by([&](Vec loss) { return maximum(loss - top - origin, zero); }, losses, weights,
                              n, p);
    }
    return {};
}

template <bool near_one>
inline Tilted tilted_by(const double* losses, const double* weights, int64_t n, double max, double offset,
                        double slope) {
    const Vec zero(0), top(max), centre(offset), steepness(slope);
    Vec zeroth(0), first(0), second(0);
    for_each_vector(n, [&](int64_t i, int count) {
        const Vec weight = load_weights(weights, i, count);
        // A sample without weight may lie above the maximum, where its exponential would overflow.
        const Vec d = where(weight > zero, (load(losses, i, count) - top) - centre, zero);
        const Vec exponent = d * steepness, growth = near_one ? exponent.expm1() : exponent.exp_u20();
        const Vec growing = weight * growth, with_d = growing * d;
        zeroth = zeroth + growing;
        first = first + with_d;
        second = fmadd(near_one ? fmadd(weight, d, with_d) : with_d, d, second);
    });
    return {total(zeroth), total(first), total(second)};
}

Tilted tilted(const double* losses, const double* weights, int64_t n, double max, double offset, double slope,
              bool near_one) {
    return near_one ? tilted_by<true>(losses, weights, n, max, offset, slope)
                    : tilted_by<false>(losses, weights, n, max, offset, slope);
}

Split split(const double* losses, const double* weights, int64_t n, double threshold) {
    const Vec zero(0), one(1), limit(threshold);
    Vec above(0), below(0), number(0), lowest(infinity), highest(-infinity);
    for_each_vector(n, [&](int64_t i, int count) {
        const Vec loss = load(losses, i, count), weight = load_weights(weights, i, count);
        const Vec counted = weight > zero, is_above = (loss > limit) & counted;
        above = above + where(is_above, weight, zero);
        below = below + where(is_above, zero, weight);
        number = number + where(is_above, one, zero);
        lowest = minimum(lowest, where(is_above, loss, Vec(infinity)));
        highest = maximum(highest, where(is_above, Vec(-infinity), where(counted, loss, Vec(-infinity))));
    });
    return {total(above), total(below), total(number), smallest(lowest), largest(highest)};
}

Excess excess(const double* losses, const double* weights, int64_t n, double max, double offset,
              double threshold) {
    const Vec zero(0), one(1), top(max), centre(offset), limit(threshold);
    Vec above(0), below(0), number(0), first(0), second(0);
    for_each_vector(n, [&](int64_t i, int count) {
        const Vec weight = load_weights(weights, i, count), gap = load(losses, i, count) - top;
        const Vec is_above = (gap > limit) & (weight > zero), d = gap - centre;
        const Vec with_d = where(is_above, weight * d, zero);
        above = above + where(is_above, weight, zero);
        below = below + where(is_above, zero, weight);
        number = number + where(is_above, one, zero);
        first = first + with_d;
        second = fmadd(with_d, d, second);
    });
    return {total(above), total(below), total(number), total(first), total(second)};
}

template <typename scalar_t>
void write(const double* p, const double* slopes, int64_t n, double scale, scalar_t* worst_case,
           scalar_t* gradient) {
    for (int64_t i = 0; i < n; ++i) {
        const double weight = p[i] * scale;
        worst_case[i] = static_cast<scalar_t>(weight);
        gradient[i] = static_cast<scalar_t>(weight * slopes[i]);
    }
}

}  // namespace

const PreferenceKernels preference_kernels{link_block, sum_block, read_pairs,   reweigh,      tilted,
                                           split,      excess,    write<float>, write<double>};

}  // namespace robustloss::CPU_CAPABILITY

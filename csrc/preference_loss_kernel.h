// Passes over a block of pairs for the op `preference_loss`, compiled once per instruction set. A weight of
// zero is absence; null weights are ones. Sums run over lanes in a fixed order.
#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <limits>

#include "preference_loss.h"

namespace robustloss {

/// A contiguous vector of any floating dtype; null counts as zeros.
struct Source {
    const void* data = nullptr;
    c10::ScalarType dtype = c10::ScalarType::Float;
};

struct Pairs {
    Source chosen, rejected, ref_chosen, ref_rejected, weights;
};

/// What the pass over the inputs gives.
struct PairSums {
    static constexpr double infinity = std::numeric_limits<double>::infinity();

    double statistics[5] = {};  // sums of the first five of naive.preference_loss.STATISTICS
    double mass = 0;            // sum of weights
    double largest = -infinity, smallest = infinity;  // losses
    double smallest_weight = infinity;
    double invalid = 0;  // NaN where an input is not finite

    void add(const PairSums& other) {
        for (int i = 0; i < 5; ++i) statistics[i] += other.statistics[i];
        mass += other.mass;
        largest = std::max(largest, other.largest);
        smallest = std::min(smallest, other.smallest);
        smallest_weight = std::min(smallest_weight, other.smallest_weight);
        invalid += other.invalid;
    }
};

/// How a loss l becomes a factor f(l) of its weight.
struct Reweighting {
    enum class Kind {
        Exponential,  // min(exp((l - origin) slope), limit)
        Step,         // 1 where l > origin, `level` where l = origin, 0 below; `extra` more where l = maximum
        Excess,       // max(l - maximum - origin, 0)
    } kind;
    double origin = 0, slope = 0, limit = PairSums::infinity, level = 0, maximum = 0, extra = 0;
};

/// Of p = weight f(loss): sum p, sum p loss, sum p^2, max p.
struct Moments {
    double mass = 0, weighted = 0, squares = 0, largest = 0;

    void add(const Moments& other) {
        mass += other.mass;
        weighted += other.weighted;
        squares += other.squares;
        largest = std::max(largest, other.largest);
    }
};

/// Sums of weight, weight d and weight d^2, where d = (loss - maximum) - offset, each times exp(slope d), or
/// in the first two times exp(slope d) - 1 if `near_one`.
struct Tilted {
    double zeroth = 0, first = 0, second = 0;

    void add(const Tilted& other) {
        zeroth += other.zeroth;
        first += other.first;
        second += other.second;
    }
};

/// Losses on both sides of a threshold: those above it and the others.
struct Split {
    double mass_above = 0, mass_below = 0, count_above = 0;
    double lowest_above = PairSums::infinity, highest_below = -PairSums::infinity;

    void add(const Split& other) {
        mass_above += other.mass_above;
        mass_below += other.mass_below;
        count_above += other.count_above;
        lowest_above = std::min(lowest_above, other.lowest_above);
        highest_below = std::max(highest_below, other.highest_below);
    }
};

/// Losses with loss - maximum above a threshold and the others; of those above the sums of weight d and
/// weight d^2, d as in `Tilted`.
struct Excess {
    double mass_above = 0, mass_below = 0, count_above = 0, first = 0, second = 0;

    void add(const Excess& other) {
        mass_above += other.mass_above;
        mass_below += other.mass_below;
        count_above += other.count_above;
        first += other.first;
        second += other.second;
    }
};

/// worst_case = scale p and gradient = worst_case slope.
template <typename scalar_t>
using Write = void (*)(const double* p, const double* slopes, int64_t n, double scale, scalar_t* worst_case,
                       scalar_t* gradient);

struct PreferenceKernels {
    void (*link_block)(const double* margins, int64_t n, const Link& link, double* losses, double* slopes);
    double (*sum_block)(const double* values, const double* weights, int64_t n);
    /// Pairs begin, ..., begin + n - 1; `weights` is filled unless it is null.
    PairSums (*read_pairs)(const Pairs& pairs, int64_t begin, int64_t n, const Link& link, double* losses,
                           double* slopes, double* weights);
    /// Writes p; it may overwrite the losses.
    Moments (*reweigh)(const Reweighting& reweighting, const double* losses, const double* weights, int64_t n,
                       double* p);
    Tilted (*tilted)(const double* losses, const double* weights, int64_t n, double maximum, double offset,
                     double slope, bool near_one);
    Split (*split)(const double* losses, const double* weights, int64_t n, double threshold);
    Excess (*excess)(const double* losses, const double* weights, int64_t n, double maximum, double offset,
                     double threshold);
    Write<float> write_float;
    Write<double> write_double;

    void write(const double* p, const double* slopes, int64_t n, double scale, float* worst_case,
               float* gradient) const {
        write_float(p, slopes, n, scale, worst_case, gradient);
    }
    void write(const double* p, const double* slopes, int64_t n, double scale, double* worst_case,
               double* gradient) const {
        write_double(p, slopes, n, scale, worst_case, gradient);
    }
};

namespace DEFAULT {
extern const PreferenceKernels preference_kernels;
}
namespace AVX2 {
extern const PreferenceKernels preference_kernels;
}
namespace AVX512 {
extern const PreferenceKernels preference_kernels;
}

}  // namespace robustloss

// What the ops `preference_loss` and `sorted_transport` share: links of margins, and sums that do not depend
// on the number of threads. Everything is float64: a tilt divides differences of losses by a small
// temperature, which would magnify the rounding of float32.
#pragma once

#include <cstdint>
#include <string_view>

namespace robustloss {

/// The links of robustloss/naive/links.py, and Identity: the margins are the losses.
enum class LinkName { Identity, Logistic, Robust, Hinge, SquaredHinge, LeastSquares, Ipo };

struct Link {
    LinkName name;
    double beta, label_smoothing;
};

/// Refuses a name that is none of the links (ValueError).
Link parse_link(std::string_view name, double beta, double label_smoothing);

/// losses[i] = link(margins[i]) and slopes[i] = link'(margins[i]), on the calling thread. Equal margins give
/// equal bits wherever they stand, so any split of the range over threads gives the same. `losses` or
/// `slopes` may be `margins`. NaN gives NaN.
void link_losses(const double* margins, int64_t n, const Link& link, double* losses, double* slopes);

/// sum_i weights[i] values[i], on the calling thread; without weights (null) sum_i values[i]. Sums of blocks
/// of kBlock values are added up in their order, so that threads may share the blocks out with `sum` of each.
double sum(const double* values, const double* weights, int64_t n);

inline double mean(const double* values, int64_t n) {
    return sum(values, nullptr, n) / static_cast<double>(n);
}

/// Values that a thread takes at least.
constexpr int64_t kBlock = 4096;

}  // namespace robustloss

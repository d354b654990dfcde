// The row kernels of `token_logps`, compiled once per instruction set, of which CPU_CAPABILITY is the name.
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "token_logps.h"

namespace robustloss::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

// Logits per block: few enough to be in the L1 cache still when a block is summed a second time.
constexpr int64_t kBlock = 1024;

// exp(-1000) = 0 in float and double, and 0 times this is 0, where 0 times -inf would be NaN.
constexpr int kLowestExponent = -1000;

/// Calls `visit` with x[0], ..., x[n - 1] in vectors of the statistics type, the last filled up with -inf.
template <typename scalar_t, typename Visit>
inline void for_each_vector(const scalar_t* x, int64_t n, const Visit& visit) {
    using Vec = Vectorized<scalar_t>;
    const auto visit_one = [&](const scalar_t* from) {
        if constexpr (std::is_same_v<scalar_t, at::opmath_type<scalar_t>>) {
            visit(Vec::loadu(from));
        } else {
            const auto [low, high] = at::vec::convert_to_float<scalar_t>(Vec::loadu(from));
            visit(low);
            visit(high);
        }
    };
    int64_t i = 0;
    for (; i + Vec::size() <= n; i += Vec::size()) visit_one(x + i);
    if (i < n) {
        scalar_t tail[Vec::size()];
        std::fill(std::copy(x + i, x + n, tail), tail + Vec::size(), -std::numeric_limits<float>::infinity());
        visit_one(tail);
    }
}

/// Sums over the logits seen so far, with d_v = (x_v - max) / temperature, a lane each.
template <typename opmath_t>
struct Sums {
    Vectorized<opmath_t> exponentials = Vectorized<opmath_t>(0);  // sum_v exp(d_v)
    Vectorized<opmath_t> weighted = Vectorized<opmath_t>(0);      // sum_v d_v exp(d_v), for the entropy
};

/// One pass over the row. A block is summed against the maximum of the blocks before it; only where it holds
/// a larger one, which happens to about log(number of blocks) of them, it is summed again.
template <bool with_entropy, typename scalar_t>
RowStatistics<scalar_t> reduce_row(const scalar_t* logits, int64_t V,
                                   at::opmath_type<scalar_t> inverse_temperature) {
    using opmath_t = at::opmath_type<scalar_t>;
    using Vec = Vectorized<opmath_t>;
    constexpr opmath_t infinity = std::numeric_limits<opmath_t>::infinity();
    const Vec scale(inverse_temperature);

    opmath_t max = -infinity;
    Sums<opmath_t> sums;
    for (int64_t begin = 0; begin < V; begin += kBlock) {
        const scalar_t* x = logits + begin;
        const int64_t n = std::min(kBlock, V - begin);
        Vec maxima(max);
        const auto sum_block = [&] {
            Sums<opmath_t> total = sums;
            const Vec shift(max);
            for_each_vector(x, n, [&](Vec v) {
                maxima = at::vec::maximum(maxima, v);
                Vec d = (v - shift) * scale;
                if constexpr (with_entropy) d = at::vec::maximum(d, Vec(kLowestExponent));
                const Vec e = d.exp_u20();
                total.exponentials = total.exponentials + e;
                if constexpr (with_entropy) total.weighted = at::vec::fmadd(d, e, total.weighted);
            });
            return total;
        };
        Sums<opmath_t> total = sum_block();
        const auto larger = [](Vec a, Vec b) { return at::vec::maximum(a, b); };
        const opmath_t new_max = at::vec::vec_reduce_all<opmath_t>(larger, maxima);
        if (!(new_max < infinity)) {  // the fast exponential maps NaN to a number, the maximum does not
            constexpr opmath_t nan = std::numeric_limits<opmath_t>::quiet_NaN();
            return {nan, nan, nan};
        }
        if (new_max == -infinity) continue;  // nothing so far but tokens that cannot occur
        if (new_max > max) {
            if (max > -infinity) {
                const opmath_t change =
                    std::max<opmath_t>((max - new_max) * inverse_temperature, kLowestExponent);
                const Vec decay(std::exp(change));
                sums.weighted = decay * (sums.weighted + Vec(change) * sums.exponentials);
                sums.exponentials = decay * sums.exponentials;
            }
            max = new_max;
            total = sum_block();
        }
        sums = total;
    }
    const auto add = [](Vec a, Vec b) { return a + b; };
    const opmath_t sum = at::vec::vec_reduce_all<opmath_t>(add, sums.exponentials);
    const opmath_t weighted = at::vec::vec_reduce_all<opmath_t>(add, sums.weighted);
    const opmath_t log_sum = std::log(sum);
    return {max, log_sum, log_sum - weighted / sum};
}

template <typename scalar_t>
void grad_row(scalar_t* grad, const scalar_t* logits, int64_t V, int64_t label,
              at::opmath_type<scalar_t> inverse_temperature, at::opmath_type<scalar_t> lse,
              at::opmath_type<scalar_t> scale) {
    using opmath_t = at::opmath_type<scalar_t>;
    using Vec = Vectorized<opmath_t>;
    // The fast exponential maps NaN to a number, so a row without a finite lse is marked here.
    if (!std::isfinite(lse)) scale = std::numeric_limits<opmath_t>::quiet_NaN();
    // Before the loop, which may overwrite the logits; 1 - p in the statistics type, rounded once.
    const opmath_t target =
        -scale * std::expm1(static_cast<opmath_t>(logits[label]) * inverse_temperature - lse);
    const Vec slope(inverse_temperature), minus_lse(-lse), minus_scale(-scale);
    at::vec::map<scalar_t>([&](Vec x) { return at::vec::fmadd(x, slope, minus_lse).exp_u20() * minus_scale; },
                           grad, logits, V);
    grad[label] = static_cast<scalar_t>(target);
}

}  // namespace

template <typename scalar_t>
RowKernels<scalar_t> row_kernels() {
    return {reduce_row<false, scalar_t>, reduce_row<true, scalar_t>, grad_row<scalar_t>};
}

template RowKernels<double> row_kernels();
template RowKernels<float> row_kernels();
template RowKernels<c10::Half> row_kernels();
template RowKernels<c10::BFloat16> row_kernels();

}  // namespace robustloss::CPU_CAPABILITY

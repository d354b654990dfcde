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

/// Calls `visit` with x[0], ..., x[n - 1] in vectors of the statistics type and how many of its lanes are
/// filled; the rest of the last is -inf.
template <typename scalar_t, typename Visit>
inline void for_each_vector(const scalar_t* x, int64_t n, const Visit& visit) {
    using Vec = Vectorized<scalar_t>;
    constexpr int64_t lanes = Vectorized<at::opmath_type<scalar_t>>::size();
    const auto visit_one = [&](const scalar_t* from, int64_t filled) {
        if constexpr (std::is_same_v<scalar_t, at::opmath_type<scalar_t>>) {
            visit(Vec::loadu(from), filled);
        } else {
            const auto [low, high] = at::vec::convert_to_float<scalar_t>(Vec::loadu(from));
            visit(low, std::min(filled, lanes));
            visit(high, std::max<int64_t>(filled - lanes, 0));
        }
    };
    int64_t i = 0;
    for (; i + Vec::size() <= n; i += Vec::size()) visit_one(x + i, Vec::size());
    if (i < n) {
        scalar_t tail[Vec::size()];
        std::fill(std::copy(x + i, x + n, tail), tail + Vec::size(), -std::numeric_limits<float>::infinity());
        visit_one(tail, n - i);
    }
}

/// s = cap tanh(x / cap).
template <bool capped, typename Vec>
inline Vec soft_cap(Vec x, Vec cap, Vec inverse_cap) {
    if constexpr (capped) return cap * (x * inverse_cap).tanh();
    return x;
}

/// Sums over the logits seen so far, with d_v = (s_v - max) / temperature, a lane each.
template <typename opmath_t>
struct Sums {
    Vectorized<opmath_t> exponentials = Vectorized<opmath_t>(0);  // sum_v exp(d_v)
    Vectorized<opmath_t> weighted = Vectorized<opmath_t>(0);      // sum_v d_v exp(d_v), for the entropy
};

/// One pass over the row. A block is summed against the maximum of the blocks before it; only where it holds
/// a larger one, which happens to about log(number of blocks) of them, it is summed again.
template <Wanted wanted, bool capped, typename scalar_t>
RowStatistics<scalar_t> reduce_row(const scalar_t* logits, int64_t V, Scaling<scalar_t> scaling) {
    using opmath_t = at::opmath_type<scalar_t>;
    using Vec = Vectorized<opmath_t>;
    constexpr bool with_entropy = wanted != Wanted::Lse, with_everything = wanted == Wanted::Everything;
    constexpr opmath_t infinity = std::numeric_limits<opmath_t>::infinity();
    const Vec scale(scaling.inverse_temperature), cap(scaling.cap), inverse_cap(1 / scaling.cap);
    const auto larger = [](Vec a, Vec b) { return at::vec::maximum(a, b); };
    const auto add = [](Vec a, Vec b) { return a + b; };

    opmath_t max = -infinity, largest = -infinity, plain_sum = 0;
    Sums<opmath_t> sums;
    for (int64_t begin = 0; begin < V; begin += kBlock) {
        const scalar_t* x = logits + begin;
        const int64_t n = std::min(kBlock, V - begin);
        Vec maxima(max), raw_maxima(largest);
        const auto sum_block = [&] {
            Sums<opmath_t> total = sums;
            const Vec shift(max);
            for_each_vector(x, n, [&](Vec v, int64_t filled) {
                Vec s = soft_cap<capped>(v, cap, inverse_cap);
                // tanh(-inf) is -1, but what fills the last vector up is no token.
                if constexpr (capped) s = Vec::set(Vec(-infinity), s, filled);
                if constexpr (capped) raw_maxima = at::vec::maximum(raw_maxima, v);
                maxima = at::vec::maximum(maxima, s);
                Vec d = (s - shift) * scale;
                if constexpr (with_entropy) d = at::vec::maximum(d, Vec(kLowestExponent));
                const Vec e = d.exp_u20();
                total.exponentials = total.exponentials + e;
                if constexpr (with_entropy) total.weighted = at::vec::fmadd(d, e, total.weighted);
            });
            return total;
        };
        Sums<opmath_t> total = sum_block();
        const opmath_t new_max = at::vec::vec_reduce_all<opmath_t>(larger, maxima);
        largest = capped ? at::vec::vec_reduce_all<opmath_t>(larger, raw_maxima) : new_max;
        if (!(largest < infinity)) {  // the fast exponential maps NaN to a number, the maximum does not
            constexpr opmath_t nan = std::numeric_limits<opmath_t>::quiet_NaN();
            return {nan, nan, nan, nan, nan};
        }
        if constexpr (with_everything) {
            const auto capping = [&](Vec v) { return soft_cap<capped>(v, cap, inverse_cap); };
            plain_sum += at::vec::map_reduce_all<scalar_t>(capping, add, x, n);
        }
        if (new_max == -infinity) continue;  // nothing so far but tokens that cannot occur
        if (new_max > max) {
            if (max > -infinity) {
                const opmath_t change =
                    std::max<opmath_t>((max - new_max) * scaling.inverse_temperature, kLowestExponent);
                const Vec decay(std::exp(change));
                sums.weighted = decay * (sums.weighted + Vec(change) * sums.exponentials);
                sums.exponentials = decay * sums.exponentials;
            }
            max = new_max;
            total = sum_block();
        }
        sums = total;
    }
    const opmath_t sum = at::vec::vec_reduce_all<opmath_t>(add, sums.exponentials);
    const opmath_t weighted = at::vec::vec_reduce_all<opmath_t>(add, sums.weighted);
    const opmath_t log_sum = std::log(sum);
    return {max, log_sum, log_sum - weighted / sum, largest, plain_sum / V};
}

template <bool capped, typename scalar_t>
void grad_row(scalar_t* grad, const scalar_t* logits, int64_t V, int64_t label, Scaling<scalar_t> scaling,
              const at::opmath_type<scalar_t> (&lse)[2], at::opmath_type<scalar_t> scale) {
    using opmath_t = at::opmath_type<scalar_t>;
    using Vec = Vectorized<opmath_t>;
    // The fast exponential maps NaN to a number, so a row without a finite lse is marked here.
    if (!std::isfinite(lse[0] + lse[1])) scale = std::numeric_limits<opmath_t>::quiet_NaN();
    const bool here = 0 <= label && label < V;
    // Before the loop, which may overwrite the logits; 1 - p in the statistics type, rounded once.
    opmath_t target = 0;
    if (here) {
        opmath_t s = logits[label], slope = 1;
        if constexpr (capped) {
            const opmath_t ratio = std::tanh(s / scaling.cap);
            s = scaling.cap * ratio;
            slope = 1 - ratio * ratio;
        }
        target = -scale * std::expm1(std::fma(s, scaling.inverse_temperature, -lse[0]) - lse[1]) * slope;
    }
    const Vec inverse_temperature(scaling.inverse_temperature), largest(lse[0]), log_sum(lse[1]);
    const Vec minus_scale(-scale), cap(scaling.cap), inverse_cap(1 / scaling.cap);
    at::vec::map<scalar_t>(
        [&](Vec x) {
            // z = s / temperature and p = exp(z - lse); ds/dx = 1 - (s / cap)^2
            const Vec s = soft_cap<capped>(x, cap, inverse_cap);
            const Vec p = (at::vec::fmsub(s, inverse_temperature, largest) - log_sum).exp_u20();
            if constexpr (!capped) return p * minus_scale;
            const Vec ratio = s * inverse_cap;
            return p * minus_scale * (Vec(1) - ratio * ratio);
        },
        grad, logits, V);
    if (here) grad[label] = static_cast<scalar_t>(target);
}

template <bool capped, typename scalar_t>
RowKernels<scalar_t> kernels() {
    return {{reduce_row<Wanted::Lse, capped, scalar_t>, reduce_row<Wanted::Entropy, capped, scalar_t>,
             reduce_row<Wanted::Everything, capped, scalar_t>},
            grad_row<capped, scalar_t>};
}

}  // namespace

template <typename scalar_t>
RowKernels<scalar_t> row_kernels(bool capped) {
    return capped ? kernels<true, scalar_t>() : kernels<false, scalar_t>();
}

template RowKernels<double> row_kernels(bool);
template RowKernels<float> row_kernels(bool);
template RowKernels<c10::Half> row_kernels(bool);
template RowKernels<c10::BFloat16> row_kernels(bool);

}  // namespace robustloss::CPU_CAPABILITY

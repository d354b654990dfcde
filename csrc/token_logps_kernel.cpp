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

// No log-sum of a vocabulary exceeds it: a larger one is mostly what the largest z was rounded by.
constexpr int kMostLogSum = 32;

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

template <typename opmath_t>
struct Capped {
    Vectorized<opmath_t> s, slope;
};

/// s = cap tanh(x / cap) and ds/dx = 4 e / (1 + e)^2, where e = exp(-2 |x / cap|): near the cap, 1 - tanh^2
/// would have no digits left. Faster than Sleef's tanh, to a few units in the last place of the cap.
template <typename opmath_t>
inline Capped<opmath_t> soft_cap(Vectorized<opmath_t> x, opmath_t cap) {
    using Vec = Vectorized<opmath_t>;
    const Vec ratio = x * Vec(1 / cap), magnitude = ratio.abs(), one(1);
    const Vec e = (magnitude * Vec(-2)).exp_u20();
    const Vec inverse = one / (one + e), slope = Vec(4) * e * inverse * inverse;
    if constexpr (std::is_same_v<opmath_t, double>) {
        return {Vec(cap) * ratio.tanh(), slope};
    } else {
        const Vec with_sign = ((one - e) * inverse) | (ratio & Vec(-0.0f));
        // The difference loses the digits of a small argument; Taylor's polynomial keeps them.
        const Vec square = ratio * ratio;
        Vec series = at::vec::fmadd(square, Vec(62.0f / 2835), Vec(-17.0f / 315));
        series = at::vec::fmadd(square, series, Vec(2.0f / 15));
        series = at::vec::fmadd(square, series, Vec(-1.0f / 3));
        series = at::vec::fmadd(ratio * square, series, ratio);
        return {Vec(cap) * Vec::blendv(with_sign, series, magnitude < Vec(0.25f)), slope};
    }
}

/// Sums of a block or the row, with d_v = (s_v - max) / temperature, a lane each.
template <typename opmath_t>
struct Sums {
    using Vec = Vectorized<opmath_t>;
    Vec exponentials = Vec(0);  // sum_v exp(d_v)
    Vec weighted = Vec(0);      // sum_v d_v exp(d_v), for the entropy

    void add(const Sums& other) {
        exponentials = exponentials + other.exponentials;
        weighted = weighted + other.weighted;
    }
    /// Adds `change` to every d_v, because the maximum has grown.
    void move(opmath_t change) {
        const Vec decay(std::exp(change));
        weighted = decay * at::vec::fmadd(Vec(change), exponentials, weighted);
        exponentials = decay * exponentials;
    }
};

/// One pass over the row. A block is summed against the maximum of the blocks before it; only where it holds
/// a larger one, which happens to about log(number of blocks) of them, it is summed again. A block has its
/// own sums: one long sum of float32 would lose digits as the row gets longer.
template <Wanted wanted, bool capped, typename scalar_t>
RowValues<scalar_t> reduce_row(const scalar_t* logits, int64_t V, int64_t label, Scaling<scalar_t> scaling) {
    using opmath_t = at::opmath_type<scalar_t>;
    using Vec = Vectorized<opmath_t>;
    constexpr bool with_entropy = wanted != Wanted::Lse, with_everything = wanted == Wanted::Everything;
    constexpr opmath_t infinity = std::numeric_limits<opmath_t>::infinity();
    constexpr opmath_t nan = std::numeric_limits<opmath_t>::quiet_NaN();
    constexpr RowValues<scalar_t> undefined{nan, {nan, nan}, nan, 0, nan};
    const auto larger = [](Vec a, Vec b) { return at::vec::maximum(a, b); };
    const auto add = [](Vec a, Vec b) { return a + b; };
    const Vec scale(scaling.inverse_temperature);

    opmath_t max = -infinity, target = 0, plain_sum = 0;  // of s
    Vec largest_x(-infinity);                             // the cap may round several x to one s
    Sums<opmath_t> sums;
    opmath_t capped_block[capped ? kBlock + Vectorized<scalar_t>::size() : 1];  // the last vector runs over
    for (int64_t begin = 0; begin < V; begin += kBlock) {
        const scalar_t* x = logits + begin;
        const int64_t n = std::min(kBlock, V - begin);
        const auto s = [&] {
            if constexpr (capped) {
                opmath_t* to = capped_block;
                for_each_vector(x, n, [&](Vec v) {
                    largest_x = at::vec::maximum(largest_x, v);
                    soft_cap<opmath_t>(v, scaling.cap).s.store(to);
                    to += Vec::size();
                });
                return capped_block;
            } else {
                return x;
            }
        }();
        if (begin <= label && label < begin + n) target = s[label - begin];
        Vec maxima(max);
        const auto sum_block = [&] {
            Sums<opmath_t> block;
            const Vec shift(max);
            for_each_vector(s, n, [&](Vec v) {
                maxima = at::vec::maximum(maxima, v);
                Vec d = (v - shift) * scale;
                if constexpr (with_entropy) d = at::vec::maximum(d, Vec(kLowestExponent));
                const Vec e = d.exp_u20();
                block.exponentials = block.exponentials + e;
                if constexpr (with_entropy) block.weighted = at::vec::fmadd(d, e, block.weighted);
            });
            return block;
        };
        Sums<opmath_t> block = sum_block();
        const opmath_t new_max = at::vec::vec_reduce_all<opmath_t>(larger, maxima);
        // The fast exponential maps NaN to a number, the maximum does not.
        if (!(new_max < infinity)) return undefined;
        if constexpr (with_everything) plain_sum += at::vec::reduce_all(add, s, n);
        if (new_max == -infinity) continue;  // nothing so far but tokens that cannot occur
        if (new_max > max) {
            if (max > -infinity) {
                sums.move(std::max<opmath_t>((max - new_max) * scaling.inverse_temperature, kLowestExponent));
            }
            max = new_max;
            block = sum_block();
        }
        sums.add(block);
    }
    const opmath_t largest = capped ? at::vec::vec_reduce_all<opmath_t>(larger, largest_x) : max;
    if (std::isnan(largest)) return undefined;
    const opmath_t sum = at::vec::vec_reduce_all<opmath_t>(add, sums.exponentials);
    const opmath_t weighted = at::vec::vec_reduce_all<opmath_t>(add, sums.weighted);
    const opmath_t log_sum = std::log(sum);
    // The largest z is rounded, and the log-sum relative to the rounded one: the two together lose nothing.
    const opmath_t largest_z = max * scaling.inverse_temperature;
    const opmath_t rounding =
        std::isfinite(largest_z) ? std::fma(max, scaling.inverse_temperature, -largest_z) : 0;
    // Not z - lse: for large logits lse has already lost the digits that this difference keeps. It may
    // overflow where both of its halves, divided by a high temperature, do not.
    const opmath_t distance = target - max, inverse = scaling.inverse_temperature;
    return {.logps = std::isinf(distance) ? target * inverse - largest_z : distance * inverse - log_sum,
            .lse = {largest_z, log_sum + rounding},
            .entropy = log_sum - weighted / sum,
            .top1 = static_cast<opmath_t>(static_cast<opmath_t>(logits[label]) == largest),
            .mean = plain_sum / V};
}

template <typename opmath_t>
opmath_t first_lane(Vectorized<opmath_t> vector) {
    opmath_t lanes[Vectorized<opmath_t>::size()];
    vector.store(lanes);
    return lanes[0];
}

template <bool capped, typename scalar_t>
void grad_row(scalar_t* grad, const scalar_t* logits, int64_t V, int64_t label, Scaling<scalar_t> scaling,
              const at::opmath_type<scalar_t> (&lse)[2], at::opmath_type<scalar_t> scale) {
    using opmath_t = at::opmath_type<scalar_t>;
    using Vec = Vectorized<opmath_t>;
    const auto cap = [&](Vec x) -> Capped<opmath_t> {
        if constexpr (capped) return soft_cap<opmath_t>(x, scaling.cap);
        return {x, Vec(1)};
    };
    // z - lse = (s - shift) / temperature - log_sum, exactly as the forward had it: `shift` is the largest s,
    // and `log_sum` takes up what the two were rounded by.
    const opmath_t slope_of_z = scaling.inverse_temperature;
    opmath_t shift = lse[0] / slope_of_z, log_sum = lse[1] - std::fma(shift, slope_of_z, -lse[0]);
    if (!(std::abs(lse[1]) < kMostLogSum && std::abs(log_sum) < kMostLogSum)) {
        // Logits beyond 1e9, whose z overflows or whose log-sum is lost in the rounding of the largest z:
        // both are found again. A part of a row that does not hold the largest, or a row that has none, is
        // left undefined.
        const auto s_at = [&](int64_t v) { return first_lane(cap(Vec(static_cast<opmath_t>(logits[v]))).s); };
        shift = -std::numeric_limits<opmath_t>::infinity();
        for (int64_t v = 0; v < V; ++v) shift = std::max(shift, s_at(v));
        opmath_t sum = 0;
        for (int64_t v = 0; v < V; ++v) sum += std::exp((s_at(v) - shift) * slope_of_z);
        log_sum = std::log(sum);
        // The fast exponential maps NaN to a number, so what is undefined is marked here.
        if (!(std::isfinite(shift) && shift * slope_of_z == lse[0])) {
            scale = std::numeric_limits<opmath_t>::quiet_NaN();
        }
    }
    const bool here = 0 <= label && label < V;
    // Before the loop, which may overwrite the logits; 1 - p in the statistics type, rounded once.
    opmath_t target = 0;
    if (here) {
        const auto [s, slope] = cap(Vec(static_cast<opmath_t>(logits[label])));
        target = -scale * std::expm1((first_lane(s) - shift) * slope_of_z - log_sum) * first_lane(slope);
    }
    const Vec shift_(shift), slope_of_z_(slope_of_z), factor(-scale * std::exp(-log_sum));
    at::vec::map<scalar_t>(
        [&](Vec x) {
            const auto [s, slope] = cap(x);
            const Vec gradient = ((s - shift_) * slope_of_z_).exp_u20() * factor;
            if constexpr (!capped) return gradient;
            return gradient * slope;
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

// The sums over the transport plan of `sinkhorn_sort`, compiled once per instruction set, of which
// CPU_CAPABILITY is the name.
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "sinkhorn_sort.h"

namespace robustloss::CPU_CAPABILITY {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
// Less is nothing beside exp(0), and Sleef's exponentials of much less are subnormal numbers, which are slow.
constexpr double kLowestExponent = -80;

constexpr int64_t kBlock = 256;  // entries of the plan in the L1 cache at once

/// exponents[0], ..., exponents[kBlock - 1] to their exponentials.
template <typename scalar_t>
void exponentials(scalar_t* exponents, int64_t n) {
    using Vec = at::vec::Vectorized<scalar_t>;
    for (int64_t k = 0; k < n; k += Vec::size()) {
        const Vec x = Vec::loadu(exponents + k);
        if constexpr (std::is_same_v<scalar_t, double>) {
            x.exp().store(exponents + k);
        } else {
            x.exp_u20().store(exponents + k);
        }
    }
}

template <typename scalar_t, bool weighted>
PlanSums sum_line(const PlanLine& line, const double* weight, const double* value, double origin) {
    using Vec = at::vec::Vectorized<double>;
    const auto add = [](Vec a, Vec b) { return a + b; };
    alignas(64) scalar_t plan[kBlock];
    alignas(64) double masses[kBlock], moments[kBlock];
    Vec mass(0), moment(0);
    for (int64_t begin = 0; begin < line.n; begin += kBlock) {
        const int64_t count = std::min(kBlock, line.n - begin);
        const double *potential = line.potential + begin, *place = line.place + begin, *x = value + begin;
        for (int64_t k = 0; k < count; ++k) {
            const double exponent = line.offset + potential[k] + line.slope * place[k];
            if constexpr (std::is_same_v<scalar_t, double>) {
                plan[k] = exponent < kLowestExponent ? -infinity : exponent;
            } else {
                plan[k] = static_cast<scalar_t>(exponent);
            }
        }
        const int64_t wide = at::vec::Vectorized<scalar_t>::size(), padded = (count + wide - 1) / wide * wide;
        std::fill(plan + count, plan + padded, -std::numeric_limits<scalar_t>::infinity());
        exponentials(plan, padded);
        for (int64_t k = 0; k < count; ++k) {
            masses[k] = weighted ? plan[k] * weight[begin + k] : plan[k];
            moments[k] = masses[k] * (x[k] - origin);
        }
        std::fill(masses + count, masses + padded, 0.0);
        std::fill(moments + count, moments + padded, 0.0);
        for (int64_t k = 0; k < padded; k += Vec::size()) {
            mass = mass + Vec::loadu(masses + k);
            moment = moment + Vec::loadu(moments + k);
        }
    }
    return {at::vec::vec_reduce_all<double>(add, mass), at::vec::vec_reduce_all<double>(add, moment)};
}

template <typename scalar_t>
PlanSums sum_any_line(const PlanLine& line, const double* weight, const double* value, double origin) {
    return (weight ? sum_line<scalar_t, true> : sum_line<scalar_t, false>)(line, weight, value, origin);
}

}  // namespace

PlanKernels plan_kernels() { return {sum_any_line<float>, sum_any_line<double>}; }

}  // namespace robustloss::CPU_CAPABILITY

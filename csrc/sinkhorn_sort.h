// The sums over the transport plan that the op `sinkhorn_sort` is made of, compiled once per instruction set;
// the best one is chosen at run time.
#pragma once

#include <cstdint>

namespace robustloss {

/// A row or a column of the transport plan: its entry k is exp(offset + potential_k + slope place_k). All of
/// it is double, because the exponents are differences of numbers as large as 1 / strength.
struct PlanLine {
    double offset, slope;
    const double *potential, *place;
    int64_t n;
};

struct PlanSums {
    double mass;    // sum_k plan_k weight_k
    double moment;  // sum_k plan_k weight_k (value_k - origin)
};

/// `weight` may be null, which is all ones. The sums are double whatever the exponential is: what leaves one
/// row of the plan must arrive in the others to the last digit, or parts that hardly exchange mass are driven
/// by rounding. And differences, not values, meet the plan: they keep the digits of what varies little along
/// the line.
using SumLine = PlanSums(const PlanLine& line, const double* weight, const double* value, double origin);

struct PlanKernels {
    SumLine *with_float_exponentials, *with_double_exponentials;
};

namespace DEFAULT {
PlanKernels plan_kernels();
}
namespace AVX2 {
PlanKernels plan_kernels();
}
namespace AVX512 {
PlanKernels plan_kernels();
}

}  // namespace robustloss

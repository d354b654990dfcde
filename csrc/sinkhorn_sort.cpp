// The op `sinkhorn_sort` on CPU: Newton's method on the semi-dual, each step by preconditioned conjugate
// gradients, which also solve the adjoint system. Schema, layouts and equations:
// robustloss/ops/sinkhorn_sort.py.
#include "sinkhorn_sort.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "instruction_set.h"

namespace robustloss {
namespace {

using at::Tensor;
using Vector = std::vector<double>;

constexpr int kMostHalvings = 30;
// What rounding may take from the semi-dual, for each column.
constexpr double kLost = 1e-7;
// Of the plan, between neighbours: what exchanges less is treated as apart.
constexpr double kLeastConductance = 1e-13;
// The steps of Newton's method need few digits, which two or three gradients give.
constexpr double kNewtonReduction = 0.1;
constexpr int kMostNewtonGradients = 20, kMostAdjointGradients = 50;

double dot(const Vector& a, const Vector& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}
double largest(const Vector& a) {
    double result = 0;
    for (double value : a) result = std::max(result, std::abs(value));
    return result;
}
double total(const Vector& a) { return std::accumulate(a.begin(), a.end(), 0.0); }

/// One row's transport problem: its standardised values z, the grid y, and the plan times n, which is
/// e_ij = exp(f_i + g_j + c z_i y_j) / mass_j with c = 2 / strength. The masses of the columns are kept
/// beside g, which they would only change to its last digit: so the columns sum to one exactly.
class Transport {
  public:
    Transport(Vector values, double strength, bool in_double)
        : n(static_cast<int64_t>(values.size())),
          c(2 / strength),
          z(std::move(values)),
          y(n),
          slope(n),
          f(n),
          g(n),
          share(n),
          barycentre(n) {
        const PlanKernels kernels = ROBUSTLOSS_BEST(plan_kernels());
        sum_line_ = in_double ? kernels.with_double_exponentials : kernels.with_float_exponentials;
        const double origin = z[0];
        for (double& value : z) value -= origin;  // exactly 0 in a constant row
        const double range = z[n - 1], mean_of_z = total(z) / n;
        TORCH_CHECK_VALUE(std::isfinite(mean_of_z), "values are too large: their sum overflows float64");
        double variance = 0;
        for (double& value : z) {
            value = range > 0 ? (value - mean_of_z) / range : 0;
            variance += value * value / n;
        }
        mean = origin + mean_of_z;
        deviation = range * std::sqrt(variance);
        const double spacing = n > 1 ? std::sqrt(12 / (static_cast<double>(n) * n - 1)) : 0;
        for (int64_t i = 0; i < n; ++i) {
            if (range > 0) z[i] /= std::sqrt(variance);
            y[i] = (i - 0.5 * (n - 1)) * spacing;
            slope[i] = c * z[i];
        }
    }

    /// The potentials of the hard sort, without entropy: exponents 0 on the diagonal, and less elsewhere.
    void start() {
        f[0] = 0;
        for (int64_t i = 1; i < n; ++i) f[i] = f[i - 1] - 0.5 * (slope[i] - slope[i - 1]) * (y[i] + y[i - 1]);
        for (int64_t i = 0; i < n; ++i) g[i] = -(f[i] + slope[i] * y[i]);
    }

    /// Makes the columns sum to one, given f and g; returns sum_j log mass_j.
    double normalize_columns() {
        for_each_column(z, [&](int64_t j, PlanSums sums) {
            share[j] = 1 / sums.mass;
            barycentre[j] = z[j] + sums.moment / sums.mass;
        });
        double sum = 0;
        for (double value : share) sum -= std::log(value);
        return sum;
    }

    /// Calls visit(j, the sums over column j, not yet divided by its mass, of value_i - value_j).
    template <typename Visit>
    void for_each_column(const Vector& value, const Visit& visit) const {
        for_each([&](int64_t j) {
            visit(j, sum_line_({g[j], y[j], f.data(), slope.data(), n}, nullptr, value.data(), value[j]));
        });
    }
    /// Calls visit(i, the sums over row i of value_j - origin_i); the weights hold the shares of the columns.
    template <typename Visit>
    void for_each_row(const Vector& weight, const Vector& value, const Vector& origin,
                      const Visit& visit) const {
        for_each([&](int64_t i) { visit(i, sum_row(i, weight, value, origin[i])); });
    }
    PlanSums sum_row(int64_t i, const Vector& weight, const Vector& value, double origin) const {
        return sum_line_({f[i], slope[i], g.data(), y.data(), n}, weight.data(), value.data(), origin);
    }
    template <typename Visit>
    void for_each(const Visit& visit) const {
        // 32768 entries of the plan a thread, at least; a plain loop where the thread has rows of its own.
        at::parallel_for(0, n, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) visit(i);
        });
    }

    int64_t n;
    double c, mean, deviation;
    Vector z, y, slope;  // slope = c z
    Vector f, g, share;  // share = 1 / mass
    Vector barycentre;   // C_j = sum_i e_ij z_i

  private:
    SumLine* sum_line_;
};

/// Conjugate gradients for (diag(r) - e e^T) x = b, r the sums of the rows. The preconditioner is
/// I + (1 - lambda) T^-1: T is the Laplacian of the path 1 - 2 - ... - n that agrees with I - e e^T on z, and
/// lambda the Rayleigh quotient of z. As e e^T averages over neighbours, this leaves a condition number of
/// about 2 at any strength; and T^-1 is two cumulative sums.
class SchurComplement {
  public:
    explicit SchurComplement(const Transport& transport, const Vector& flow)
        : transport_(transport), resistance_(transport.n) {
        const int64_t n = transport.n;
        double rayleigh = 0, through = 0;
        for (int64_t i = 0; i + 1 < n; ++i) {
            // What the rows up to i give to those above: e e^T is symmetric, so the sum of their gains in z.
            through = std::max(through + flow[i], 0.0);
            const double step = transport.z[i + 1] - transport.z[i];
            rayleigh += through * step / n;
            resistance_[i] = through > kLeastConductance * step ? step / through : 0;  // from i to i + 1
        }
        for (double& value : resistance_) value *= std::max(1 - rayleigh, 0.0);
    }

    /// Until the residual, in the preconditioner's norm, has shrunk by `reduction`, or nothing of it exceeds
    /// `least`.
    Vector solve(Vector residual, double reduction, double least, int most_gradients) const {
        const int64_t n = transport_.n;
        Vector solution(n, 0.0), across(n), product(n);
        Vector preconditioned = precondition(residual), direction = preconditioned;
        double size = dot(residual, preconditioned);
        const double wanted = size * reduction * reduction;
        for (int k = 0; k < most_gradients && size > wanted && largest(residual) > least; ++k) {
            transport_.for_each_column(direction, [&](int64_t j, PlanSums sums) {
                across[j] = direction[j] + sums.moment * transport_.share[j];
            });
            transport_.for_each_row(transport_.share, across, direction,
                                    [&](int64_t i, PlanSums sums) { product[i] = -sums.moment; });
            const double curvature = dot(direction, product);
            if (!(curvature > 0)) break;
            const double length = size / curvature;
            for (int64_t i = 0; i < n; ++i) {
                solution[i] += length * direction[i];
                residual[i] -= length * product[i];
            }
            preconditioned = precondition(residual);
            const double new_size = dot(residual, preconditioned);
            for (int64_t i = 0; i < n; ++i) direction[i] = preconditioned[i] + new_size / size * direction[i];
            size = new_size;
        }
        return solution;
    }

  private:
    Vector precondition(const Vector& residual) const {
        const int64_t n = transport_.n;
        Vector result(n);
        double through = 0, potential = 0, mean = 0;
        for (int64_t i = 0; i < n; ++i) {
            result[i] = potential;
            mean += potential / n;
            through += residual[i];
            potential -= through * resistance_[i];
        }
        for (int64_t i = 0; i < n; ++i) result[i] += residual[i] - mean;
        return result;
    }

    const Transport& transport_;
    Vector resistance_;
};

/// Finds the potentials; returns the error, the largest |sum of row i - 1| or |sum of the first i rows - i| /
/// sqrt(n). The columns sum to one, so the barycentres are monotone.
double converge(Transport& transport, int64_t max_iterations, double tolerance) {
    const int64_t n = transport.n;
    Vector flow(n), residual(n);
    transport.start();
    transport.normalize_columns();
    for (int64_t iteration = 0;; ++iteration) {
        transport.for_each_row(transport.share, transport.barycentre, transport.z,
                               [&](int64_t i, PlanSums sums) {
                                   residual[i] = 1 - sums.mass;
                                   flow[i] = sums.moment;
                               });
        double error = 0, through = 0;
        for (double value : residual) {
            through += value;
            error = std::max({error, std::abs(value), std::abs(through) / std::sqrt(n)});
        }
        if (error <= tolerance || iteration >= max_iterations) return error;

        const Vector step =
            SchurComplement(transport, flow).solve(residual, kNewtonReduction, 0, kMostNewtonGradients);
        const double ascent = dot(residual, step), sum = total(step);
        const Vector f = transport.f;
        for (int64_t j = 0; j < n; ++j) transport.g[j] += std::log(transport.share[j]);
        // The semi-dual sum f - sum log mass is concave; a step must make it grow.
        double length = 1;
        for (int halving = 0; halving < kMostHalvings; ++halving, length /= 2) {
            for (int64_t i = 0; i < n; ++i) transport.f[i] = f[i] + length * step[i];
            const double growth = length * sum - transport.normalize_columns();
            if (std::isfinite(growth) && growth >= 1e-4 * length * ascent - n * kLost) break;
        }
    }
}

/// Runs `visit` for each row, in parallel where every thread has one; where not, the loops within are.
template <typename Visit>
void for_each_problem(int64_t rows, int64_t n, const Visit& visit) {
    const auto run = [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) visit(row);
    };
    if (rows < at::get_num_threads() && n > 256) {
        run(0, rows);
    } else {
        at::parallel_for(0, rows, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, n * n)), run);
    }
}

void check(const Tensor& values, double strength) {
    TORCH_CHECK_VALUE(values.dim() == 2 && values.is_contiguous(), "values must be contiguous [R, n], got ",
                      values.sizes(), " with strides ", values.strides());
    TORCH_CHECK_VALUE(strength > 0, "strength must be > 0, got ", strength);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sinkhorn_sort(const Tensor& values, double strength,
                                                         int64_t max_iterations, double tolerance) {
    check(values, strength);
    const int64_t rows = values.size(0), n = values.size(1);
    const auto options = values.options().dtype(at::kDouble);
    Tensor sorted = at::empty_like(values);
    Tensor row_potential = at::empty({rows, n}, options), column_potential = at::empty({rows, n}, options);
    Tensor error = at::empty({rows}, options);
    if (n == 0) error.zero_();
    if (values.numel() == 0) return {sorted, row_potential, column_potential, error};
    double *f = row_potential.mutable_data_ptr<double>(), *g = column_potential.mutable_data_ptr<double>();
    double* error_out = error.mutable_data_ptr<double>();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "sinkhorn_sort", [&] {
        const scalar_t* x = values.const_data_ptr<scalar_t>();
        scalar_t* out = sorted.mutable_data_ptr<scalar_t>();
        for_each_problem(rows, n, [&](int64_t row) {
            Transport transport(Vector(x + row * n, x + (row + 1) * n), strength,
                                std::is_same_v<scalar_t, double>);
            error_out[row] = converge(transport, max_iterations, tolerance);
            for (int64_t j = 0; j < n; ++j) {
                out[row * n + j] =
                    static_cast<scalar_t>(transport.mean + transport.deviation * transport.barycentre[j]);
            }
            std::copy(transport.f.begin(), transport.f.end(), f + row * n);
            std::copy(transport.g.begin(), transport.g.end(), g + row * n);
        });
    });
    return {sorted, row_potential, column_potential, error};
}

/// The gradient with respect to the values of one row, given h, that with respect to the sorted ones.
Vector gradient(Transport& transport, const Vector& h, double tolerance) {
    const int64_t n = transport.n;
    transport.normalize_columns();
    const Vector &z = transport.z, &y = transport.y, &C = transport.barycentre;
    Vector shared_h(n), flow(n), mean_h(n), mean_y(n), rhs(n), beta(n), q(n);
    for (int64_t j = 0; j < n; ++j) shared_h[j] = transport.share[j] * h[j];
    transport.for_each_row(transport.share, C, z, [&](int64_t i, PlanSums sums) { flow[i] = sums.moment; });
    transport.for_each_row(shared_h, C, z, [&](int64_t i, PlanSums sums) {
        mean_h[i] = sums.mass;
        rhs[i] = -sums.moment;
    });
    // An error of the residual is c times as large in the gradient, at most.
    const double least = tolerance * largest(h) / transport.c;
    const Vector alpha = SchurComplement(transport, flow).solve(rhs, tolerance, least, kMostAdjointGradients);
    transport.for_each_column(
        alpha, [&](int64_t j, PlanSums sums) { beta[j] = alpha[j] + sums.moment * transport.share[j]; });
    transport.for_each_row(transport.share, y, y,
                           [&](int64_t i, PlanSums sums) { mean_y[i] = y[i] + sums.moment; });
    transport.for_each([&](int64_t i) {
        Vector multiplier(n);
        for (int64_t j = 0; j < n; ++j) {
            multiplier[j] = shared_h[j] * (z[i] - C[j]) + transport.share[j] * (beta[j] - alpha[i]);
        }
        q[i] = mean_h[i] + transport.c * transport.sum_row(i, multiplier, y, mean_y[i]).moment;
    });
    // Through the mean and the standard deviation, which took the values to z and C back.
    const double shift = (total(h) - total(q)) / n, scale = (dot(h, C) - dot(q, z)) / n;
    for (int64_t i = 0; i < n; ++i) q[i] += shift + scale * z[i];
    return q;
}

Tensor sinkhorn_sort_bwd(const Tensor& grad_sorted, const Tensor& values, const Tensor& row_potential,
                         const Tensor& column_potential, double strength, double tolerance) {
    check(values, strength);
    const int64_t rows = values.size(0), n = values.size(1);
    Tensor grad_values = at::empty_like(values);
    if (values.numel() == 0) return grad_values;
    const Tensor grad = grad_sorted.contiguous();
    const double *f = row_potential.const_data_ptr<double>(), *g = column_potential.const_data_ptr<double>();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(), "sinkhorn_sort_bwd", [&] {
        const scalar_t *x = values.const_data_ptr<scalar_t>(), *upstream = grad.const_data_ptr<scalar_t>();
        scalar_t* out = grad_values.mutable_data_ptr<scalar_t>();
        for_each_problem(rows, n, [&](int64_t row) {
            const int64_t begin = row * n, end = begin + n;
            Transport transport(Vector(x + begin, x + end), strength, std::is_same_v<scalar_t, double>);
            std::copy(f + begin, f + end, transport.f.begin());
            std::copy(g + begin, g + end, transport.g.begin());
            const Vector q = gradient(transport, Vector(upstream + begin, upstream + end), tolerance);
            for (int64_t i = 0; i < n; ++i) out[begin + i] = static_cast<scalar_t>(q[i]);
        });
    });
    return grad_values;
}

}  // namespace

TORCH_LIBRARY_IMPL(robustloss, CPU, m) {
    m.impl("sinkhorn_sort", sinkhorn_sort);
    m.impl("sinkhorn_sort_bwd", sinkhorn_sort_bwd);
}

}  // namespace robustloss

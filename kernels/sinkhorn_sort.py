r"""Kernels of the op `sinkhorn_sort`: Newton's method on the semi-dual of an entropic transport to a grid.

The plan times n is :math:`e_{ij} = \exp(f_i + g_j + c z_i y_j) / \mathrm{mass}_j`, c = 2 / strength. A Newton step
solves :math:`(\mathrm{diag}(r) - e e^T) \delta = 1 - r`, r the sums of the rows, by conjugate gradients; the backward
solves the same system for the adjoint. The preconditioner is I + (1 - lambda) T^-1, where T is the Laplacian of the
path 1 - 2 - ... - n that agrees with I - e e^T on z, and lambda is the Rayleigh quotient of z: two cumulative sums,
after which two or three gradients do at any strength.

A problem, one row of the values, is a machine of stages. Each stage is a pass over the plan, `_sum_lines`, whose n^2
entries are computed on the way, and then `_advance`: what becomes of the n sums, and which stage is next. A short
problem runs in one program. For longer ones the host launches passes, their lines spread over programs, and advances by
turns, without knowing the stages: a problem that has ended leaves its launches at once, and the host never waits.

Exponents and sums are float64, the exponential is float32 (float64 for float64 values): what leaves one row of the plan
must arrive in the others to the last digit, or parts that hardly exchange mass are driven by rounding.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# The vectors of a problem, in the order of its memory [VECTORS, BLOCK]. Beyond n they hold any finite number, but f and
# g are -inf there, so that the plan is 0.
Z: tl.constexpr = tl.constexpr(0)
PLACE: tl.constexpr = tl.constexpr(1)  # y, the grid
SLOPE: tl.constexpr = tl.constexpr(2)  # c z
F: tl.constexpr = tl.constexpr(3)
G: tl.constexpr = tl.constexpr(4)
ONES: tl.constexpr = tl.constexpr(5)
SHARE: tl.constexpr = tl.constexpr(6)  # 1 / mass_j
BARYCENTRE: tl.constexpr = tl.constexpr(7)  # C_j = sum_i e_ij z_i
MASS: tl.constexpr = tl.constexpr(8)  # the sums of a pass
MOMENT: tl.constexpr = tl.constexpr(9)
RESISTANCE: tl.constexpr = tl.constexpr(10)  # of the path's edge from i to i + 1, times 1 - lambda
RESIDUAL: tl.constexpr = tl.constexpr(11)
DIRECTION: tl.constexpr = tl.constexpr(12)
ACROSS: tl.constexpr = tl.constexpr(13)  # e^T direction
SOLUTION: tl.constexpr = tl.constexpr(14)
BASE: tl.constexpr = tl.constexpr(15)  # f before the step
H: tl.constexpr = tl.constexpr(16)  # the upstream gradient
SHARED_H: tl.constexpr = tl.constexpr(17)  # h / mass
MIXED: tl.constexpr = tl.constexpr(18)  # (h C - beta) / mass
MEAN_H: tl.constexpr = tl.constexpr(19)  # e h
LEAN: tl.constexpr = tl.constexpr(20)  # sum_j e_ij m_ij (y_j - y_i), m the multiplier of the plan's change
EXCESS: tl.constexpr = tl.constexpr(21)  # sum_j e_ij m_ij, nearly 0
GRADIENT: tl.constexpr = tl.constexpr(22)  # with respect to z
VECTORS: tl.constexpr = tl.constexpr(23)

# The numbers of a problem, in the order of its memory [NUMBERS].
STAGE: tl.constexpr = tl.constexpr(0)
ERROR: tl.constexpr = tl.constexpr(1)  # the largest |sum of row i - 1| or |sum of the first i rows - i| / sqrt(n)
SIZE: tl.constexpr = tl.constexpr(2)  # of the residual, in the preconditioner's norm, squared
WANTED: tl.constexpr = tl.constexpr(3)
GRADIENTS: tl.constexpr = tl.constexpr(4)  # left
ASCENT: tl.constexpr = tl.constexpr(5)  # solution . right-hand side
LENGTH: tl.constexpr = tl.constexpr(6)  # of the step that is tried
ITERATIONS: tl.constexpr = tl.constexpr(7)  # left
LEAST: tl.constexpr = tl.constexpr(8)  # a residual below this is none
ROW: tl.constexpr = tl.constexpr(9)  # of the problem
C: tl.constexpr = tl.constexpr(10)  # 2 / strength
TOLERANCE: tl.constexpr = tl.constexpr(11)
NUMBERS: tl.constexpr = tl.constexpr(12)

# STAGE: the pass that is next.
NORMALIZE: tl.constexpr = tl.constexpr(0)
MARGINALS: tl.constexpr = tl.constexpr(1)
APPLY_TRANSPOSE: tl.constexpr = tl.constexpr(2)
APPLY: tl.constexpr = tl.constexpr(3)
# Of the backward, which has the four as well.
RIGHT_HAND_SIDE: tl.constexpr = tl.constexpr(4)
BETA: tl.constexpr = tl.constexpr(5)
LEAN_BY_H: tl.constexpr = tl.constexpr(6)
LEAN_BY_MIXED: tl.constexpr = tl.constexpr(7)
LEAN_BY_ALPHA: tl.constexpr = tl.constexpr(8)
DONE: tl.constexpr = tl.constexpr(9)

# What rounding may take from the semi-dual, for each column.
LOST: tl.constexpr = tl.constexpr(1e-7)
SHORTEST: tl.constexpr = tl.constexpr(1e-9)  # length of a step
# Of the plan, between neighbours: what exchanges less is treated as apart.
LEAST_CONDUCTANCE: tl.constexpr = tl.constexpr(1e-13)
# A step of Newton's method needs few digits.
NEWTON_REDUCTION: tl.constexpr = tl.constexpr(0.1)
NEWTON_GRADIENTS: tl.constexpr = tl.constexpr(20)
ADJOINT_GRADIENTS: tl.constexpr = tl.constexpr(50)

# Launches are counted beforehand: an iteration has two passes, and two a gradient, of which it takes one or two.
PASSES_PER_ITERATION = 6


@triton.jit
def _sum_lines(
    p_vectors,
    stage,
    i_begin,
    n,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """MASS = sum_k e_k weight_k and MOMENT = sum_k e_k weight_k (value_k - origin) of LINES columns or rows."""
    columns = (stage == NORMALIZE) | (stage == APPLY_TRANSPOSE) | (stage == BETA)
    lean = stage >= LEAN_BY_H
    p_offset = p_vectors + tl.where(columns, G, F) * BLOCK
    p_line = p_vectors + tl.where(columns, PLACE, SLOPE) * BLOCK
    p_potential = p_vectors + tl.where(columns, F, G) * BLOCK
    p_entry = p_vectors + tl.where(columns, SLOPE, PLACE) * BLOCK
    by_h = (stage == RIGHT_HAND_SIDE) | (stage == LEAN_BY_H)
    weight = tl.where(columns, ONES, tl.where(by_h, SHARED_H, tl.where(stage == LEAN_BY_MIXED, MIXED, SHARE)))
    solving = (stage == APPLY_TRANSPOSE) | (stage == APPLY) | (stage == BETA)
    origin = tl.where(solving, DIRECTION, tl.where(lean, PLACE, Z))
    value = tl.where(stage == APPLY, ACROSS, origin)
    value = tl.where((stage == MARGINALS) | (stage == RIGHT_HAND_SIDE), BARYCENTRE, value)
    p_weight, p_value, p_origin = p_vectors + weight * BLOCK, p_vectors + value * BLOCK, p_vectors + origin * BLOCK

    o_line = i_begin + tl.arange(0, LINES)
    b_offset = tl.load(p_offset + o_line)
    b_line = tl.load(p_line + o_line)
    b_origin = tl.load(p_origin + o_line)
    b_mass = tl.zeros([LINES, ENTRIES], tl.float64)
    b_moment = tl.zeros([LINES, ENTRIES], tl.float64)
    for i_entry in range(0, n, ENTRIES):
        o_entry = i_entry + tl.arange(0, ENTRIES)
        b_potential = tl.load(p_potential + o_entry)
        b_entry = tl.load(p_entry + o_entry)
        b_weight = tl.load(p_weight + o_entry)
        b_value = tl.load(p_value + o_entry)
        # The same roundings from either side, so that rows and columns see one plan.
        b_exponent = (b_offset[:, None] + b_potential[None, :]) + b_line[:, None] * b_entry[None, :]
        if DOUBLE:
            b_plan = tl.exp(b_exponent)
        else:
            b_plan = tl.exp(b_exponent.to(tl.float32)).to(tl.float64)
        b_plan *= b_weight[None, :]
        b_mass += b_plan
        # A difference keeps the digits of what varies little along the line.
        b_moment += b_plan * (b_value[None, :] - b_origin[:, None])
    tl.store(p_vectors + MASS * BLOCK + o_line, tl.sum(b_mass, axis=1))
    tl.store(p_vectors + MOMENT * BLOCK + o_line, tl.sum(b_moment, axis=1))


@triton.jit
def _precondition(b_residual, b_resistance, n, m):
    b_drop = tl.cumsum(b_residual, axis=0) * b_resistance
    b_potential = tl.where(m, b_drop - tl.cumsum(b_drop, axis=0), 0.0)
    return tl.where(m, b_residual + b_potential - tl.sum(b_potential, axis=0) / n, 0.0)


@triton.jit
def _resistance(p_vectors, b_flow, n, o, BLOCK: tl.constexpr):
    # What the rows up to i give to those above: by the symmetry of e e^T the sum of their gains in z.
    b_through = tl.maximum(tl.cumsum(b_flow, axis=0), 0.0)
    m_edge = o + 1 < n
    b_z = tl.load(p_vectors + Z * BLOCK + o, mask=m_edge, other=0.0)
    b_step = tl.load(p_vectors + Z * BLOCK + o + 1, mask=m_edge, other=0.0) - b_z
    rayleigh = tl.sum(tl.where(m_edge, b_through * b_step, 0.0), axis=0) / n
    m_conducts = m_edge & (b_through > b_step * LEAST_CONDUCTANCE)
    b_resistance = tl.where(m_conducts, b_step / tl.where(m_conducts, b_through, 1.0), 0.0)
    return b_resistance * tl.maximum(1.0 - rayleigh, 0.0)


@triton.jit
def _begin(p_vectors, p_numbers, b_residual, b_resistance, reduction, most_gradients, n, o, m, BLOCK: tl.constexpr):
    """The first direction of the conjugate gradients."""
    b_direction = _precondition(b_residual, b_resistance, n, m)
    size = tl.sum(b_residual * b_direction, axis=0)
    tl.store(p_vectors + RESIDUAL * BLOCK + o, b_residual)
    tl.store(p_vectors + DIRECTION * BLOCK + o, b_direction)
    tl.store(p_vectors + SOLUTION * BLOCK + o, tl.zeros_like(b_direction))
    tl.store(p_numbers + SIZE, size)
    tl.store(p_numbers + WANTED, size * reduction * reduction)
    tl.store(p_numbers + GRADIENTS, size * 0.0 + most_gradients)
    tl.store(p_numbers + ASCENT, size * 0.0)


@triton.jit
def _advance(p_vectors, p_numbers, stage, n, ADJOINT: tl.constexpr, BLOCK: tl.constexpr):
    """What becomes of the sums of the pass `stage`, and the next one."""
    o = tl.arange(0, BLOCK)
    m = o < n
    b_mass = tl.where(m, tl.load(p_vectors + MASS * BLOCK + o), 1.0)
    b_moment = tl.load(p_vectors + MOMENT * BLOCK + o)
    next_stage = stage + 1
    if stage == NORMALIZE:
        b_z = tl.load(p_vectors + Z * BLOCK + o)
        tl.store(p_vectors + SHARE * BLOCK + o, 1.0 / b_mass)
        tl.store(p_vectors + BARYCENTRE * BLOCK + o, b_z + b_moment / b_mass)
        if ADJOINT:
            b_h = tl.load(p_vectors + H * BLOCK + o)
            tl.store(p_vectors + SHARED_H * BLOCK + o, b_h / b_mass)
        else:
            # The semi-dual sum f - sum log mass is concave: a step must make it grow, or is halved.
            b_solution = tl.load(p_vectors + SOLUTION * BLOCK + o)
            length = tl.load(p_numbers + LENGTH)
            growth = length * tl.sum(b_solution, axis=0) - tl.sum(tl.log(b_mass), axis=0)
            least = 1e-4 * length * tl.load(p_numbers + ASCENT) - n * LOST
            accepted = (growth >= least) & (growth < float("inf"))
            if (not accepted) & (length > SHORTEST):
                b_base = tl.load(p_vectors + BASE * BLOCK + o)
                tl.store(p_vectors + F * BLOCK + o, b_base + 0.5 * length * b_solution)
                tl.debug_barrier()  # every thread has read the length
                tl.store(p_numbers + LENGTH, 0.5 * length)
                next_stage = stage
    elif stage == MARGINALS:
        b_resistance = _resistance(p_vectors, b_moment, n, o, BLOCK)
        tl.store(p_vectors + RESISTANCE * BLOCK + o, b_resistance)
        next_stage = stage * 0 + RIGHT_HAND_SIDE
        if not ADJOINT:
            b_residual = tl.where(m, 1.0 - b_mass, 0.0)
            b_through = tl.abs(tl.cumsum(b_residual, axis=0)) / tl.sqrt(n.to(tl.float64))
            error = tl.max(tl.maximum(tl.abs(b_residual), b_through), axis=0)
            goes_on = (error > tl.load(p_numbers + TOLERANCE)) & (tl.load(p_numbers + ITERATIONS) > 0.0)
            tl.store(p_numbers + ERROR, error)
            _begin(p_vectors, p_numbers, b_residual, b_resistance, NEWTON_REDUCTION, NEWTON_GRADIENTS, n, o, m, BLOCK)
            next_stage = tl.where(goes_on, APPLY_TRANSPOSE, DONE)
    elif stage == APPLY_TRANSPOSE:
        b_direction = tl.load(p_vectors + DIRECTION * BLOCK + o)
        b_share = tl.load(p_vectors + SHARE * BLOCK + o)
        tl.store(p_vectors + ACROSS * BLOCK + o, b_direction + b_moment * b_share)
    elif stage == APPLY:
        b_direction = tl.load(p_vectors + DIRECTION * BLOCK + o)
        size = tl.load(p_numbers + SIZE)
        curvature = -tl.sum(b_direction * b_moment, axis=0)
        positive = curvature > 0.0
        length = tl.where(positive, size / tl.where(positive, curvature, 1.0), 0.0)
        b_solution = tl.load(p_vectors + SOLUTION * BLOCK + o) + length * b_direction
        tl.store(p_vectors + SOLUTION * BLOCK + o, b_solution)
        b_residual = tl.load(p_vectors + RESIDUAL * BLOCK + o) + length * b_moment
        tl.store(p_vectors + RESIDUAL * BLOCK + o, b_residual)
        b_preconditioned = _precondition(b_residual, tl.load(p_vectors + RESISTANCE * BLOCK + o), n, m)
        new_size = tl.sum(b_residual * b_preconditioned, axis=0)
        gradients = tl.load(p_numbers + GRADIENTS) - 1.0
        ascent = tl.load(p_numbers + ASCENT) + length * size
        largest = tl.max(tl.abs(b_residual), axis=0)
        wanted = (new_size > tl.load(p_numbers + WANTED)) & (largest > tl.load(p_numbers + LEAST))
        tl.debug_barrier()  # every thread has read the numbers
        tl.store(p_numbers + SIZE, new_size)
        tl.store(p_numbers + GRADIENTS, gradients)
        tl.store(p_numbers + ASCENT, ascent)
        if positive & wanted & (gradients > 0.0):
            b_direction = tl.load(p_vectors + DIRECTION * BLOCK + o)
            tl.store(p_vectors + DIRECTION * BLOCK + o, b_preconditioned + new_size / size * b_direction)
            next_stage = stage * 0 + APPLY_TRANSPOSE
        elif ADJOINT:
            tl.store(p_vectors + DIRECTION * BLOCK + o, tl.load(p_vectors + SOLUTION * BLOCK + o))
            next_stage = stage * 0 + BETA
        else:
            b_f = tl.load(p_vectors + F * BLOCK + o)
            tl.store(p_vectors + BASE * BLOCK + o, b_f)
            tl.store(p_vectors + F * BLOCK + o, b_f + tl.load(p_vectors + SOLUTION * BLOCK + o))
            b_share = tl.load(p_vectors + SHARE * BLOCK + o)
            tl.store(p_vectors + G * BLOCK + o, tl.load(p_vectors + G * BLOCK + o) + tl.log(b_share))
            iterations = tl.load(p_numbers + ITERATIONS) - 1.0
            tl.debug_barrier()
            tl.store(p_numbers + LENGTH, ascent * 0.0 + 1.0)
            tl.store(p_numbers + ITERATIONS, iterations)
            next_stage = stage * 0 + NORMALIZE
    elif ADJOINT:
        b_alpha = tl.load(p_vectors + SOLUTION * BLOCK + o)
        if stage == RIGHT_HAND_SIDE:
            tl.store(p_vectors + MEAN_H * BLOCK + o, b_mass)
            b_residual = -b_moment
            b_resistance = tl.load(p_vectors + RESISTANCE * BLOCK + o)
            reduction = tl.load(p_numbers + TOLERANCE)
            _begin(p_vectors, p_numbers, b_residual, b_resistance, reduction, ADJOINT_GRADIENTS, n, o, m, BLOCK)
            nothing = tl.max(tl.abs(b_residual), axis=0) <= tl.load(p_numbers + LEAST)
            if nothing:
                tl.store(p_vectors + DIRECTION * BLOCK + o, tl.zeros_like(b_residual))
            next_stage = tl.where(nothing, BETA, APPLY_TRANSPOSE)
        elif stage == BETA:
            b_share = tl.load(p_vectors + SHARE * BLOCK + o)
            b_barycentre = tl.load(p_vectors + BARYCENTRE * BLOCK + o)
            b_beta = b_alpha + b_moment * b_share
            b_mixed = tl.load(p_vectors + H * BLOCK + o) * b_barycentre - b_beta
            tl.store(p_vectors + MIXED * BLOCK + o, b_mixed * b_share)
        else:
            # The multiplier h_j z_i - (h_j C_j - beta_j) - alpha_i, term by term.
            b_z = tl.load(p_vectors + Z * BLOCK + o)
            b_factor = tl.where(stage == LEAN_BY_H, b_z, tl.where(stage == LEAN_BY_MIXED, -1.0, -b_alpha))
            b_lean = tl.load(p_vectors + LEAN * BLOCK + o) + b_factor * b_moment
            b_excess = tl.load(p_vectors + EXCESS * BLOCK + o) + b_factor * b_mass
            tl.store(p_vectors + LEAN * BLOCK + o, b_lean)
            tl.store(p_vectors + EXCESS * BLOCK + o, b_excess)
            if stage == LEAN_BY_ALPHA:
                b_implicit = tl.load(p_numbers + C) * (b_lean - b_moment * b_excess)
                tl.store(p_vectors + GRADIENT * BLOCK + o, tl.load(p_vectors + MEAN_H * BLOCK + o) + b_implicit)
    tl.debug_barrier()
    tl.store(p_numbers + STAGE, next_stage.to(tl.float64))


@triton.jit(do_not_specialize=["n"])
def sinkhorn_sort_kernel(
    p_state,  # [R, VECTORS, BLOCK]
    p_scalars,  # [R, NUMBERS]
    n,
    ADJOINT: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """All stages of a problem in one program."""
    p_numbers = p_scalars + tl.program_id(0).to(tl.int64) * NUMBERS
    stage = tl.load(p_numbers + STAGE).to(tl.int32)
    while stage != DONE:
        # Read anew at each turn: addresses kept over the loop would not fit the scalar registers of AMD's GPUs.
        p_vectors = p_state + tl.load(p_numbers + ROW).to(tl.int64) * VECTORS * BLOCK
        for i_begin in range(0, n, LINES):
            _sum_lines(p_vectors, stage, i_begin, n, DOUBLE, BLOCK, LINES, ENTRIES)
        tl.debug_barrier()  # what one thread has written another reads
        p_vectors = p_state + tl.load(p_numbers + ROW).to(tl.int64) * VECTORS * BLOCK
        _advance(p_vectors, p_numbers, stage, n, ADJOINT, BLOCK)
        tl.debug_barrier()
        stage = tl.load(p_numbers + STAGE).to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def sinkhorn_sort_pass_kernel(
    p_state,  # [R, VECTORS, BLOCK]
    p_scalars,  # [R, NUMBERS]
    n,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """LINES lines of a problem's next pass."""
    n_blocks = tl.cdiv(n, LINES)
    i_row = (tl.program_id(0) // n_blocks).to(tl.int64)
    stage = tl.load(p_scalars + i_row * NUMBERS + STAGE).to(tl.int32)
    if stage != DONE:
        i_begin = (tl.program_id(0) % n_blocks) * LINES
        _sum_lines(p_state + i_row * VECTORS * BLOCK, stage, i_begin, n, DOUBLE, BLOCK, LINES, ENTRIES)


@triton.jit(do_not_specialize=["n"])
def sinkhorn_sort_advance_kernel(
    p_state,  # [R, VECTORS, BLOCK]
    p_scalars,  # [R, NUMBERS]
    n,
    ADJOINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_vectors, p_numbers = p_state + i_row * VECTORS * BLOCK, p_scalars + i_row * NUMBERS
    stage = tl.load(p_numbers + STAGE).to(tl.int32)
    if stage != DONE:
        _advance(p_vectors, p_numbers, stage, n, ADJOINT, BLOCK)


# AMD's data-centre GPUs have 64.
WARP_SIZE = 64 if torch.version.hip else 32


def in_one_program(n: int, double: bool, warp_size: int = WARP_SIZE) -> bool:
    """Whether one program takes a problem. A longer one would leave the other processors idle for too long; and all
    stages in one kernel take more scalar registers than AMD's GPUs have when the problem is not short, or beside the
    constants of the exponential of float64."""
    return n <= 1024 if warp_size == 32 else n <= 512 and not double


def tile(n: int, double: bool) -> dict[str, int]:
    """BLOCK, LINES, ENTRIES and the warps of a program. A thread holds few entries of a pass, as each takes two sums of
    float64, and the exponential of float64 takes registers of its own; and few numbers of a vector, of which `_advance`
    has several at a time."""
    block = max(64, triton.next_power_of_2(n))
    return {
        "BLOCK": block,
        "LINES": 16,
        "ENTRIES": 32 if double else 64,
        "num_warps": 4 if block <= 256 else 8,
    }


class _Problems:
    """R problems in their memory."""

    def __init__(self, values: Tensor, strength: float, tolerance: float):
        rows, self.n = values.shape
        self.double = values.dtype == torch.float64
        self.tile = tile(self.n, self.double)
        self.state = torch.zeros(rows, VECTORS.value, self.tile["BLOCK"], dtype=torch.float64, device=values.device)
        self.scalars = torch.zeros(rows, NUMBERS.value, dtype=torch.float64, device=values.device)
        self.number(C).fill_(2 / strength)
        self.number(TOLERANCE).fill_(tolerance)
        centred = values.double() - values[:, :1].double()  # exactly 0 in a constant row
        range_ = centred[:, -1:]
        divisor = torch.where(range_ > 0, range_, 1.0)
        mean = (centred / divisor).mean(-1, keepdim=True)
        centred = centred / divisor - mean
        deviation = centred.square().mean(-1, keepdim=True).sqrt()
        self.mean, self.deviation = values[:, :1].double() + range_ * mean, range_ * deviation
        spacing = math.sqrt(12 / (self.n * self.n - 1)) if self.n > 1 else 0.0
        places = torch.arange(self.n, dtype=torch.float64, device=values.device) - 0.5 * (self.n - 1)
        self.vector(Z).copy_(centred / torch.where(range_ > 0, deviation, 1.0))
        self.vector(PLACE).copy_(places * spacing)
        self.vector(SLOPE).copy_(self.vector(Z) * (2 / strength))
        self.vector(ONES).fill_(1)
        self.scalars[:, ROW.value] = torch.arange(rows, device=values.device)
        self.state[:, [F.value, G.value], self.n :] = -math.inf

    def vector(self, index: tl.constexpr) -> Tensor:  # [R, n]
        return self.state[:, index.value, : self.n]

    def number(self, index: tl.constexpr) -> Tensor:  # [R]
        return self.scalars[:, index.value]

    def run(self, most_passes: int, adjoint: bool, one_program: bool | None) -> None:
        rows, n = len(self.state), self.n
        memory = self.state, self.scalars, n
        if in_one_program(n, self.double) if one_program is None else one_program:
            sinkhorn_sort_kernel[(rows,)](*memory, ADJOINT=adjoint, DOUBLE=self.double, **self.tile)
            return
        blocks = triton.cdiv(n, self.tile["LINES"])
        options = {"BLOCK": self.tile["BLOCK"], "num_warps": self.tile["num_warps"]}
        for _ in range(most_passes):
            sinkhorn_sort_pass_kernel[(rows * blocks,)](*memory, DOUBLE=self.double, **self.tile)
            sinkhorn_sort_advance_kernel[(rows,)](*memory, ADJOINT=adjoint, **options)


def sinkhorn_sort(
    values: Tensor,  # [R, n] ascending, contiguous
    strength: float,
    max_iterations: int,
    tolerance: float,
    *,
    one_program: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # sorted, f and g [R, n], error [R]
    """The op's forward; `one_program` says whether one program takes a row, None by its length."""
    if not values.numel():
        potential = torch.empty_like(values, dtype=torch.float64)
        return torch.empty_like(values), potential, potential.clone(), potential.new_zeros(len(values))
    with torch.cuda.device_of(values):
        problems = _Problems(values, strength, tolerance)
        # The potentials of the hard sort, without entropy: exponents 0 on the diagonal, and less elsewhere.
        slope, places = problems.vector(SLOPE), problems.vector(PLACE)
        f = problems.vector(F)
        f[:, 1:] = -0.5 * (slope.diff() * (places[:, 1:] + places[:, :-1])).cumsum(-1)
        problems.vector(G).copy_(-(f + slope * places))
        # The first step, of zeros, is accepted whatever it does.
        problems.number(LENGTH).fill_(1)
        problems.number(ASCENT).fill_(-math.inf)
        problems.number(ITERATIONS).fill_(max_iterations)
        problems.number(ERROR).fill_(math.inf)
        problems.run(2 + PASSES_PER_ITERATION * max_iterations, False, one_program)
    ascending = problems.mean + problems.deviation * problems.vector(BARYCENTRE)
    potentials = problems.vector(F).contiguous(), problems.vector(G).contiguous()
    return ascending.to(values.dtype), *potentials, problems.number(ERROR).clone()


def sinkhorn_sort_bwd(
    grad_sorted: Tensor,  # [R, n]
    values: Tensor,  # [R, n] ascending, contiguous
    row_potential: Tensor,  # [R, n] float64
    column_potential: Tensor,
    strength: float,
    tolerance: float,
    *,
    one_program: bool | None = None,
) -> Tensor:  # [R, n]
    if not values.numel():
        return torch.empty_like(values)
    h = grad_sorted.double()
    with torch.cuda.device_of(values):
        problems = _Problems(values, strength, tolerance)
        for index, vector in ((F, row_potential), (G, column_potential), (H, h)):
            problems.vector(index).copy_(vector)
        # An error of the residual is c times as large in the gradient, at most.
        problems.number(LEAST).copy_(h.abs().amax(-1) * (0.5 * strength * tolerance))
        problems.run(7 + 2 * ADJOINT_GRADIENTS.value, True, one_program)
    z, q, barycentre = (problems.vector(index) for index in (Z, GRADIENT, BARYCENTRE))
    # Through the mean and the standard deviation, which took the values to z and the barycentres back.
    shift = (h - q).mean(-1, keepdim=True)
    scale = (h * barycentre - q * z).mean(-1, keepdim=True)
    return (q + shift + scale * z).to(values.dtype)

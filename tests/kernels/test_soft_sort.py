"""The Triton kernels of soft sorting and ranking against their definition, pooled block by block in float64."""

from __future__ import annotations

import pytest
import torch

from robustloss.kernels import soft_sort as kernels

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # The interpreter is NumPy, which warns of what lanes that are masked off compute.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
OPS = pytest.mark.parametrize("op", ["soft_sort", "soft_rank"])
REGULARIZATIONS = pytest.mark.parametrize("regularization", ["l2", "kl"])


@pytest.fixture
def small_tiles(monkeypatch):
    """So that short rows are joined of many tiles."""
    monkeypatch.setattr(kernels, "TILE", 8)
    monkeypatch.setattr(kernels, "SUM_TILE", 32)


def block_level(z, w, regularization):
    return z.mean() - w.mean() if regularization == "l2" else z.logsumexp(0) - w.logsumexp(0)


def projection(z, w, regularization):
    """z - v with v isotonic, of one row, z and w descending; and where the block of each position starts."""
    blocks = []
    for i in range(len(z)):
        start = i
        level = block_level(z[i : i + 1], w[i : i + 1], regularization)
        while blocks and blocks[-1][1] < level:
            start, _ = blocks.pop()
            level = block_level(z[start : i + 1], w[start : i + 1], regularization)
        blocks.append((start, level))
    starts = torch.tensor([start for start, _ in blocks])
    block = torch.searchsorted(starts, torch.arange(len(z)), right=True) - 1
    return z - torch.stack([level for _, level in blocks])[block], starts[block]


def expected(op, values, descending, regularization, strength):
    """(result, order, block_start) of rows, by Blondel et al.: P(rho / e, x) and P(x / e, rho), and kl of log rho."""
    results = []
    n = values.shape[-1]
    sign = 1.0 if descending else -1.0
    order = values.sort(descending=descending, stable=True).indices
    rho = torch.arange(n, 0, -1, dtype=FLOAT64)
    for row, indices in zip(values.double(), order, strict=True):
        if op == "soft_sort":
            projected, starts = projection(rho / strength, sign * row[indices], regularization)
            results.append((sign * projected, starts))
        else:
            # Descending values of x, or of -x, from the last position to the first.
            z = (-sign * row[indices]).flip(0) / strength
            projected, starts = projection(z, rho.log() if regularization == "kl" else rho, regularization)
            ranks = (projected.exp() if regularization == "kl" else projected).flip(0)
            ends = n - starts.flip(0)  # one past the last position
            firsts = torch.searchsorted(ends, ends)
            results.append((torch.empty_like(ranks).scatter(0, indices, ranks), firsts))
    return torch.stack([r for r, _ in results]), order, torch.stack([s for _, s in results])


def check(op, values, descending, regularization, strength, device):
    actual, order, block_start = getattr(kernels, op)(values.to(device), descending, regularization, strength)
    assert (actual.dtype, order.dtype, block_start.dtype) == (values.dtype, torch.int32, torch.int32)
    wanted, wanted_order, wanted_start = expected(op, values, descending, regularization, strength)
    tolerance = 1e-9 if values.dtype == FLOAT64 else 1e-5
    scale = wanted.abs().max().item()
    torch.testing.assert_close(actual.cpu().double(), wanted, rtol=tolerance, atol=0.1 * tolerance * scale)
    assert torch.equal(order.cpu().long(), wanted_order)
    assert torch.equal(block_start.cpu().long(), wanted_start)
    return block_start


def sample(rows, n, dtype=FLOAT32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, n, generator=generator, dtype=FLOAT64).to(dtype)


@OPS
@REGULARIZATIONS
@pytest.mark.parametrize(
    ("rows", "n", "strength"),
    [(1, 1, 1.0), (3, 2, 1.0), (3, 3, 0.01), (1, 31, 100.0), (1, 33, 1e-4), (1, 64, 0.1), (1, 65, 1e4)],
)
def test_rows_of_one_tile(device, op, regularization, rows, n, strength):
    for descending in (False, True) if n < 4 else (n % 2 == 0,):
        check(op, sample(rows, n), descending, regularization, strength, device)


@OPS
@REGULARIZATIONS
@pytest.mark.parametrize(("rows", "n", "strength"), [(3, 9, 1.0), (1, 31, 0.1), (1, 41, 100.0)])
@pytest.mark.usefixtures("small_tiles")
def test_rows_of_several_tiles(device, op, regularization, rows, n, strength):
    check(op, sample(rows, n), n == 41, regularization, strength, device)


@pytest.mark.parametrize(("op", "regularization", "n"), [("soft_sort", "l2", 130), ("soft_rank", "kl", 300)])
def test_longer_rows(device, op, regularization, n):
    check(op, sample(1, n), False, regularization, 1.0, device)


@OPS
@REGULARIZATIONS
@pytest.mark.parametrize("gap", [1, 30])
@pytest.mark.usefixtures("small_tiles")
def test_a_wide_gap_pools_from_tile_to_tile(device, op, regularization, gap):
    values = 0.01 * sample(1, 31, FLOAT64).sort().values
    values[:, gap:] += 300.0
    block_start = check(op, values, False, regularization, 0.5 if op == "soft_sort" else 1e3, device)
    if op == "soft_sort":
        assert block_start[0, gap] < gap


@OPS
@pytest.mark.usefixtures("small_tiles")
def test_any_dtype(device, op):
    for dtype in (BFLOAT16, torch.float16, FLOAT64):
        values = sample(1, 9, dtype)
        actual, *_ = getattr(kernels, op)(values.to(device), True, "l2", 1.0)
        wanted, *_ = expected(op, values, True, "l2", 1.0)
        assert actual.dtype == dtype
        tolerance = 1e-12 if dtype == FLOAT64 else 1e-2
        torch.testing.assert_close(actual.cpu().double(), wanted, rtol=tolerance, atol=tolerance)


@REGULARIZATIONS
@pytest.mark.parametrize("descending", [False, True])
def test_where_nothing_pools_the_result_is_hard_to_the_bit(device, regularization, descending):
    values = sample(2, 21).to(device)
    hard, order = values.sort(descending=descending, stable=True)
    actual, actual_order, block_start = kernels.soft_sort(values, descending, regularization, 1e-3)
    assert torch.equal(actual, hard)
    assert torch.equal(actual_order, order.int())
    ranks, _, rank_start = kernels.soft_rank(values, descending, regularization, 1e-5)
    assert torch.equal(ranks, order.argsort(-1).float() + 1)
    assert torch.equal(block_start, torch.arange(21, dtype=torch.int32, device=device).expand(2, 21))
    assert torch.equal(rank_start, block_start)


@REGULARIZATIONS
@pytest.mark.usefixtures("small_tiles")
def test_ties_share_a_rank_and_keep_their_value(device, regularization):
    values = torch.tensor([[1e30, -2.0, 1e30, -2.0, -2.0, 1e30, 1e30]], device=device)
    ranks, *_ = kernels.soft_rank(values, False, regularization, 1e-4)
    torch.testing.assert_close(ranks.cpu(), torch.tensor([[5.5, 2.0, 5.5, 2.0, 2.0, 5.5, 5.5]]))
    tied = torch.full((1, 13), 1e30, device=device)
    assert torch.equal(kernels.soft_sort(tied, False, regularization, 1e4)[0], tied)
    ranks, *_ = kernels.soft_rank(tied, True, regularization, 1e-4)
    torch.testing.assert_close(ranks, torch.full_like(ranks, 7.0))


@REGULARIZATIONS
@pytest.mark.usefixtures("small_tiles")
def test_a_nan_stays_in_its_row(device, regularization):
    values = sample(3, 11).to(device)
    alone, *_ = kernels.soft_sort(values, False, regularization, 1.0)
    values[1, 4] = float("nan")
    actual, _, block_start = kernels.soft_sort(values, False, regularization, 1.0)
    assert actual[1].isnan().any()
    assert torch.equal(actual[::2], alone[::2])
    assert ((block_start >= 0) & (block_start < 11)).all()


@OPS
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_no_values_give_empty_tensors(device, op, shape):
    values = torch.zeros(shape, device=device)
    outputs = getattr(kernels, op)(values, False, "l2", 1.0)
    assert [output.shape for output in outputs] == [shape] * 3
    assert kernels.block_sum(values, outputs[2]).shape == shape
    assert kernels.soft_sort_bwd(values, None, *outputs[1:], False).shape == shape
    assert kernels.soft_rank_bwd(values, None, *outputs[1:], False, 1.0).shape == shape


# ---- backward -----------------------------------------------------------------------------------------------------

# Sizes of the blocks of a row, of which the tiles have 32 positions: within a tile, across one end, across two, to the
# last position; and one block, and a row of one tile.
SIZES = [[5, 1, 26], [20, 1, 30, 19, 1, 60, 2, 37], [100], [1] * 40]


def blocks_of(sizes, device):
    starts = torch.tensor([sum(sizes[:i]) for i, size in enumerate(sizes) for _ in range(size)])
    return torch.stack([starts, torch.zeros_like(starts)]).int().to(device)


def each_block(block_start):
    """The positions of every block of a row."""
    return [torch.where(block_start == start)[0] for start in block_start.unique()]


def soft_values(op, u, block_start, regularization, strength):
    """By position, what a row's values u give with the blocks fixed, up to constants: differentiable."""
    results = torch.empty(0, dtype=FLOAT64)
    for i in each_block(block_start):
        if op == "soft_sort":
            result = (u[i].mean() if regularization == "l2" else -(-u[i]).logsumexp(0)).expand(len(i))
        elif regularization == "l2":
            result = (u[i] - u[i].mean()) / strength
        else:
            result = (i + 1).sum() * (u[i] / strength).softmax(0)
        results = torch.cat([results, result])
    return results


@OPS
@REGULARIZATIONS
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)} blocks")
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_the_backward_is_the_gradient_with_the_blocks_held(device, op, regularization, sizes, descending):
    n, strength = sum(sizes), 2.0
    block_start = blocks_of(sizes, device)
    for dtype in (FLOAT32, FLOAT64):
        values, gradient = sample(2, n, dtype), sample(2, n, dtype, seed=1)
        order = values.sort(descending=descending, stable=True).indices
        inputs = values.double().requires_grad_()
        for row, indices, starts, g in zip(inputs, order, block_start.cpu(), gradient.double(), strict=True):
            u = -row[indices] if descending else row[indices]
            result = soft_values(op, u, starts, regularization, strength)
            if op == "soft_sort":
                (-result if descending else result).backward(g, retain_graph=True)
            else:
                result.backward(g[indices], retain_graph=True)
        options = (descending,) if op == "soft_sort" else (descending, strength)
        actual = getattr(kernels, f"{op}_bwd")(
            gradient.to(device),
            values.to(device) if regularization == "kl" else None,
            order.int().to(device),
            block_start,
            *options,
        )
        tolerance = 1e-12 if dtype == FLOAT64 else 1e-5
        scale = inputs.grad.abs().max().item()
        torch.testing.assert_close(actual.cpu().double(), inputs.grad, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)} blocks")
@pytest.mark.usefixtures("small_tiles")
def test_the_sum_over_blocks(device, sizes):
    block_start = blocks_of(sizes, device)
    values = sample(2, sum(sizes), FLOAT64)
    wanted = torch.empty_like(values)
    for row, starts, sums in zip(values, block_start.cpu(), wanted, strict=True):
        for i in each_block(starts):
            sums[i] = row[i].sum()
    torch.testing.assert_close(kernels.block_sum(values.to(device), block_start).cpu(), wanted)


@pytest.mark.usefixtures("small_tiles")
def test_a_block_of_one_takes_its_gradient_as_it_is_and_has_no_rank_to_move(device):
    gradient = sample(2, 40).to(device)
    order = gradient.argsort(-1).int()
    block_start = torch.arange(40, dtype=torch.int32, device=device).expand(2, 40).contiguous()
    for values in (None, gradient):
        actual = kernels.soft_sort_bwd(gradient, values, order, block_start, False)
        assert torch.equal(actual.gather(-1, order.long()), gradient)
        assert not kernels.soft_rank_bwd(gradient, values, order, block_start, False, 1e-4).any()


@pytest.mark.usefixtures("small_tiles")
def test_gradients_of_any_strides(device):
    values, dense = sample(2, 40).to(device), sample(40, 2, seed=1).to(device).T
    order, block_start = values.argsort(-1).int(), blocks_of([3, 30, 7], device)
    for gradient in (dense, torch.ones(1, 1, device=device).expand(2, 40)):
        layout = (values, order, block_start, False)
        strided, plain = kernels.soft_sort_bwd(gradient, *layout), kernels.soft_sort_bwd(gradient.contiguous(), *layout)
        assert torch.equal(strided, plain)
        strided = kernels.soft_rank_bwd(gradient, *layout, 0.1)
        assert torch.equal(strided, kernels.soft_rank_bwd(gradient.contiguous(), *layout, 0.1))
        assert torch.equal(
            kernels.block_sum(gradient, block_start), kernels.block_sum(gradient.contiguous(), block_start)
        )

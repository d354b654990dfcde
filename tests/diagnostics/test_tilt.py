"""The worst case of an aggregate, its distances from the nominal weights against closed forms, and its file."""

from __future__ import annotations

import json
import math

import pytest
import torch

from robustloss import ChiSquare, CVaR, DPOLoss, KLTilt, Mean, SoftMin, TotalVariation
from robustloss.diagnostics import worst_case
from robustloss.naive.kl_tilt import kl_ball

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
LOSSES = torch.tensor([0.2, 1.7, 0.9, 0.4, 1.1, 0.3], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0, 0.1], dtype=torch.float64)
EACH_WEIGHTS = pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])


def nominal(weights) -> torch.Tensor:
    weights = torch.ones_like(LOSSES) if weights is None else weights
    return weights / weights.sum()


@EACH_WEIGHTS
def test_a_tilts_divergence_is_its_closed_form(weights):
    """KL(P || q) = <P, l> / tau - log sum q exp(l / tau)."""
    tau, q = 0.4, nominal(weights)
    found = worst_case(LOSSES, KLTilt(tau=tau), weights)
    factors = q * (LOSSES / tau).exp()
    p = factors / factors.sum()
    torch.testing.assert_close(found.weights, p, **CLOSE)
    assert found.kl == pytest.approx(((p @ LOSSES) / tau - factors.sum().log()).item(), rel=1e-12)
    second = (q * (2 * LOSSES / tau).exp()).sum() / factors.sum().square()  # sum P^2 / q
    assert found.chi_square == pytest.approx(second.item() - 1, rel=1e-12)
    assert found.value == pytest.approx((p @ LOSSES).item(), rel=1e-12)
    assert found.effective_sample_size == pytest.approx(1 / p.square().sum().item(), rel=1e-12)
    assert found.max_weight == pytest.approx(p.max().item(), rel=1e-12)
    assert found.tau == tau


@EACH_WEIGHTS
def test_a_ball_is_used_to_its_edge(weights):
    assert worst_case(LOSSES, KLTilt(rho=0.2), weights).kl == pytest.approx(0.2, abs=1e-9)
    assert worst_case(LOSSES, ChiSquare(0.5), weights).chi_square == pytest.approx(0.5, abs=1e-9)
    assert worst_case(LOSSES, TotalVariation(0.25), weights).total_variation == pytest.approx(0.25, abs=1e-12)
    ratio = worst_case(LOSSES, CVaR(0.4), weights).weights / nominal(weights)
    assert ratio[nominal(weights) > 0].max().item() == pytest.approx(1 / 0.4, rel=1e-12)
    tau = kl_ball(LOSSES, rho=0.2, weights=weights)[2].item()
    assert worst_case(LOSSES, KLTilt(rho=0.2), weights).tau == pytest.approx(tau, rel=1e-9)


@EACH_WEIGHTS
def test_the_mean_looks_at_the_nominal_weights(weights):
    found = worst_case(LOSSES, Mean(), weights)
    torch.testing.assert_close(found.weights, nominal(weights), **CLOSE)
    torch.testing.assert_close(found.nominal, nominal(weights), **CLOSE)
    assert found.kl == pytest.approx(0, abs=1e-15)
    assert found.chi_square == pytest.approx(0, abs=1e-15)
    assert found.total_variation == pytest.approx(0, abs=1e-15)
    assert math.isnan(found.tau)


def test_known_numbers_of_a_worst_case_on_one_sample():
    found = worst_case(LOSSES, TotalVariation(1.0))
    assert found.weights.tolist() == [0, 1, 0, 0, 0, 0]
    assert found.kl == pytest.approx(math.log(6), rel=1e-12)
    assert found.chi_square == pytest.approx(5, rel=1e-12)
    assert found.total_variation == pytest.approx(5 / 6, rel=1e-12)
    assert found.effective_sample_size == pytest.approx(1, rel=1e-12)


def test_weights_that_do_not_sum_to_one_are_kept_and_their_divergences_are_normalised():
    found = worst_case(LOSSES, KLTilt(tau=0.4, normalize=False, max_weight=3))
    expected = ((LOSSES - LOSSES.mean()) / 0.4).exp().clamp(max=3) / 6
    torch.testing.assert_close(found.weights, expected, **CLOSE)
    p = expected / expected.sum()
    assert found.kl == pytest.approx((p * (6 * p).log()).sum().item(), rel=1e-12)


def test_it_takes_the_losses_and_the_aggregate_of_a_loss_as_they_are():
    generator = torch.Generator().manual_seed(0)
    logps = [torch.randn(8, generator=generator).requires_grad_() for _ in range(4)]
    loss = DPOLoss(0.5, aggregate=SoftMin(0.3))
    with torch.no_grad():
        found = worst_case(DPOLoss(0.5, reduction="none")(*logps), loss.aggregate)
    _, metrics = loss(*logps, return_metrics=True)
    assert found.effective_sample_size == pytest.approx(metrics["tilt/effective_sample_size"].item(), rel=1e-5)
    assert found.value == pytest.approx(loss(*logps).item(), rel=1e-6)
    assert not found.weights.requires_grad
    assert not found.losses.requires_grad
    assert found.weights.dtype == torch.float64


def test_top_gives_the_heaviest_first_and_ties_in_order():
    found = worst_case(torch.tensor([1.0, 3.0, 2.0, 3.0]), KLTilt(tau=1.0))
    assert found.top(3).tolist() == [1, 3, 2]
    assert found.top(0).tolist() == []
    assert found.top(9).tolist() == [1, 3, 2, 0]
    with pytest.raises(ValueError, match=r"k must be an integer >= 0, got -1"):
        found.top(-1)


def test_the_file_holds_one_object_a_sample_the_heaviest_first(tmp_path):
    found = worst_case(LOSSES, KLTilt(rho=0.2), WEIGHTS)
    path = tmp_path / "worst.jsonl"
    texts = [f"größer\n{i}" for i in range(6)]
    found.to_jsonl(path, ids=list("abcdef"), texts=texts)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["index"] for row in rows] == found.top(6).tolist()
    for row in rows:
        i = row["index"]
        assert row == {
            "index": i,
            "loss": LOSSES[i].item(),
            "nominal": found.nominal[i].item(),
            "weight": found.weights[i].item(),
            "id": "abcdef"[i],
            "text": texts[i],
        }
    found.to_jsonl(path)
    assert json.loads(path.read_text().splitlines()[0]).keys() == {"index", "loss", "nominal", "weight"}
    assert [file.name for file in tmp_path.iterdir()] == ["worst.jsonl"]


def test_a_failure_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "worst.jsonl"
    path.write_text("old\n")
    found = worst_case(LOSSES, KLTilt(rho=0.2))
    with pytest.raises(ValueError, match=r"ids must be one a sample \(6\), got 2"):
        found.to_jsonl(path, ids=["a", "b"])
    with pytest.raises(TypeError, match="not JSON serializable"):
        found.to_jsonl(path, ids=[object()] * 6)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        found.to_jsonl(path)
    assert path.read_text() == "old\n"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: worst_case(LOSSES[:0], Mean()), ValueError, r"losses must be a vector of at least one loss, got \(0,"),
        (lambda: worst_case(LOSSES[None], Mean()), ValueError, r"losses must be a vector .*got \(1, 6\)"),
        (lambda: worst_case([1.0], Mean()), TypeError, r"losses must be a torch.Tensor, got list"),
        (lambda: worst_case(LOSSES / 0, Mean()), ValueError, r"losses holds 6 non-finite value"),
        (lambda: worst_case(LOSSES, KLTilt), TypeError, r"aggregate must be an aggregate .*got type"),
        (lambda: worst_case(LOSSES, "mean"), TypeError, r"aggregate must be an aggregate .*got str"),
        (lambda: worst_case(LOSSES, Mean(), WEIGHTS[:2]), ValueError, r"weights must have shape \(6,\)"),
        (lambda: worst_case(LOSSES, Mean(), -WEIGHTS), ValueError, r"weights must be >= 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()

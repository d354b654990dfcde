"""Links: closed forms, limits, and what happens at margins no model should reach."""

from __future__ import annotations

import math

import pytest
import torch

from robustloss.naive.links import LINKS, OFFSET_LINKS, SMOOTHED_LINKS, link_loss

MARGINS = torch.linspace(-7, 7, 29, dtype=torch.float64) + 0.013  # no margin at a kink
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SMOOTHED_CASES = [(link, 0.0) for link in LINKS] + [(link, 0.2) for link in SMOOTHED_LINKS]


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -torch.log1p(torch.exp(-x))


@pytest.mark.parametrize("beta", [0.1, 1.7])
@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("logistic", lambda h, b: -log_sigmoid(b * h)),
        ("robust", lambda h, b: -log_sigmoid(b * h)),
        ("hinge", lambda h, b: (1 - b * h).clamp(min=0)),
        ("squared_hinge", lambda h, b: (b - h).clamp(min=0) ** 2),
        ("least_squares", lambda h, b: (b - h) ** 2),
        ("ipo", lambda h, b: (h - 1 / (2 * b)) ** 2),
    ],
)
def test_every_link_is_its_closed_form(link, expected, beta):
    torch.testing.assert_close(link_loss(MARGINS, beta=beta, link=link), expected(MARGINS, beta), **CLOSE)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_label_smoothing_is_the_mixture_of_both_labels(smoothing):
    expected = -(1 - smoothing) * log_sigmoid(2 * MARGINS) - smoothing * log_sigmoid(-2 * MARGINS)
    torch.testing.assert_close(link_loss(MARGINS, beta=2, label_smoothing=smoothing), expected, **CLOSE)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_the_robust_link_is_unbiased_under_flipped_labels(smoothing):
    def robust(margins):
        return link_loss(margins, beta=2, link="robust", label_smoothing=smoothing)

    averaged = (1 - smoothing) * robust(MARGINS) + smoothing * robust(-MARGINS)
    torch.testing.assert_close(averaged, link_loss(MARGINS, beta=2), **CLOSE)


@pytest.mark.parametrize("link", SMOOTHED_LINKS)
def test_no_smoothing_is_plain_dpo(link):
    torch.testing.assert_close(link_loss(MARGINS, beta=0.3, link=link), link_loss(MARGINS, beta=0.3), **CLOSE)


def test_the_logistic_link_is_log_two_at_a_margin_of_zero():
    assert link_loss(torch.zeros((), dtype=torch.float64), beta=0.1).item() == pytest.approx(math.log(2), abs=1e-15)


def test_ipo_is_least_at_half_the_inverse_of_beta():
    beta = 0.2
    margins = torch.tensor([1 / (2 * beta)], dtype=torch.float64, requires_grad=True)
    loss = link_loss(margins, beta=beta, link="ipo")
    (slope,) = torch.autograd.grad(loss, margins)
    assert loss.item() == slope.item() == 0
    assert (link_loss(MARGINS, beta=beta, link="ipo") > 0).all()


@pytest.mark.parametrize(("link", "smoothing"), SMOOTHED_CASES)
def test_every_link_is_convex_in_the_margin(link, smoothing):
    """What [A] Theorem 1 asks of a link."""
    losses = link_loss(MARGINS, beta=0.9, link=link, label_smoothing=smoothing)
    assert (losses.diff().diff() > -1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("link", LINKS)
def test_values_and_both_derivatives_stay_finite_at_huge_margins(link, dtype):
    margins = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
    loss = link_loss(margins, beta=1.0, link=link, label_smoothing=0.1 * (link in SMOOTHED_LINKS))
    (first,) = torch.autograd.grad(loss.sum(), margins, create_graph=True)
    (second,) = torch.autograd.grad(first.sum() + 0 * margins.sum(), margins)
    for value in (loss, first, second):
        assert torch.isfinite(value).all()
    if link == "logistic":
        # e b h beyond log s's reach: -(1 - e) (-1e4) and e 1e4.
        torch.testing.assert_close(loss.detach(), torch.tensor([9e3, 1e3], dtype=dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("link", "smoothing"), SMOOTHED_CASES)
def test_derivatives_of_both_orders_match_finite_differences(link, smoothing):
    margins = MARGINS.clone().requires_grad_()

    def function(h):
        return link_loss(h, beta=0.8, link=link, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(function, margins)
    assert torch.autograd.gradgradcheck(function, margins)


@pytest.mark.parametrize("link", OFFSET_LINKS)
def test_an_offset_moves_the_margin(link):
    torch.testing.assert_close(
        link_loss(MARGINS, beta=0.7, link=link), link_loss(MARGINS - 0.7, beta=0.0, link=link), **CLOSE
    )


def test_an_unknown_link_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"link must be one of 'logistic'.*got 'sigmoid'"):
        link_loss(MARGINS, beta=1.0, link="sigmoid")

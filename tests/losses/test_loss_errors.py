"""Bad input: the exception's type, and a message that names the argument, what came and what is wanted."""

from __future__ import annotations

import math

import pytest
import torch

from robustloss import AOTPairedLoss, AOTUnpairedLoss, DPOLoss, KLDPOLoss, KLTilt, KTOLoss, WDPOLoss

LOGPS = torch.tensor([-3.0, -2.0, -4.0])
DESIRABLE = torch.tensor([True, False, True])
PAIRED = [DPOLoss(), KLDPOLoss(tau=0.1), KLDPOLoss(rho=0.1), AOTPairedLoss(), WDPOLoss(penalty="exact")]
UNPAIRED = [AOTUnpairedLoss(), KTOLoss()]
NAMES = ["policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        # one of tau and rho
        (lambda: KLDPOLoss(), ValueError, r"exactly one of tau and rho, got tau=None and rho=None"),
        (lambda: KLDPOLoss(tau=0.1, rho=0.1), ValueError, r"exactly one of tau and rho, got tau=0.1 and rho=0.1"),
        (lambda: KLTilt(), ValueError, r"exactly one of tau and rho"),
        (lambda: KLDPOLoss(tau=0), ValueError, r"tau must be > 0, got 0"),
        (lambda: KLDPOLoss(tau=-1.5), ValueError, r"tau must be > 0, got -1.5"),
        (lambda: KLDPOLoss(tau=math.nan), ValueError, r"tau must be finite, got nan"),
        (lambda: KLDPOLoss(tau="0.1"), TypeError, r"tau must be a number, got str '0.1'"),
        (lambda: KLDPOLoss(rho=-0.1), ValueError, r"rho must be >= 0, got -0.1"),
        (lambda: KLDPOLoss(rho=math.inf), ValueError, r"rho must be finite, got inf"),
        (lambda: KLDPOLoss(tau=1, max_weight=10), ValueError, r"max_weight .*normalize=False"),
        (lambda: KLDPOLoss(rho=1, normalize=False), ValueError, r"normalize=False needs tau"),
        (lambda: KLDPOLoss(tau=1, normalize=False, max_weight=0), ValueError, r"max_weight must be > 0, got 0"),
        # beta
        (lambda: DPOLoss(0), ValueError, r"beta must be > 0, got 0"),
        (lambda: DPOLoss(-0.1), ValueError, r"beta must be > 0, got -0.1"),
        (lambda: DPOLoss(True), TypeError, r"beta must be a number, got bool True"),
        (lambda: DPOLoss(torch.tensor(0.1)), TypeError, r"beta must be a number, got Tensor"),
        (lambda: DPOLoss(-1, link="least_squares"), ValueError, r"beta must be >= 0, got -1"),
        (lambda: KTOLoss(0), ValueError, r"beta must be > 0, got 0"),
        # label smoothing
        (lambda: DPOLoss(0.1, 0.5), ValueError, r"label_smoothing must be < 0.5, got 0.5"),
        (lambda: DPOLoss(0.1, -0.1), ValueError, r"label_smoothing must be >= 0, got -0.1"),
        (
            lambda: DPOLoss(0.1, 0.1, "hinge"),
            ValueError,
            r"label_smoothing=0.1 .*'logistic', 'robust'.*, not",
        ),
        (lambda: AOTPairedLoss(link="ipo", label_smoothing=0.1), ValueError, r"label_smoothing=0.1 .* not for 'ipo'"),
        # choices
        (lambda: DPOLoss(link="sigmoid"), ValueError, r"link must be one of 'logistic', .*got 'sigmoid'"),
        (lambda: DPOLoss(link=None), ValueError, r"link must be one of .*got None"),
        (lambda: DPOLoss(reduction="sum"), ValueError, r"reduction must be one of 'mean', 'none', got 'sum'"),
        (
            lambda: AOTPairedLoss(sort="soft"),
            ValueError,
            r"sort must be one of 'hard', .*, got 'soft'",
        ),
        (
            lambda: AOTUnpairedLoss(sort="soft"),
            ValueError,
            r"sort must be one of 'hard', .*, got 'soft'",
        ),
        (lambda: DPOLoss(aggregate="mean"), TypeError, r"aggregate must be .*got str 'mean'"),
        (lambda: DPOLoss(aggregate=KLTilt), TypeError, r"aggregate must be .*got type"),
        # reduction="none" of a coupled loss says why
        (
            lambda: KLDPOLoss(tau=1, reduction="none"),
            ValueError,
            r"reduction='none' .*KLDPOLoss: .*weighs every",
        ),
        (lambda: AOTPairedLoss(reduction="none"), ValueError, r"reduction='none' .*AOTPairedLoss: sorting matches"),
        (lambda: AOTUnpairedLoss(reduction="none"), ValueError, r"reduction='none' .*AOTUnpairedLoss: sorting matches"),
        (lambda: WDPOLoss(reduction="none"), ValueError, r"reduction='none' .*WDPOLoss: its penalty"),
        # the rest
        (lambda: WDPOLoss(rho=-1), ValueError, r"rho must be >= 0, got -1"),
        (lambda: WDPOLoss(squared="yes"), TypeError, r"squared must be a bool, got str"),
        (lambda: KTOLoss(desirable_weight=-1), ValueError, r"desirable_weight must be >= 0, got -1"),
        (lambda: KTOLoss(undesirable_weight=None), TypeError, r"undesirable_weight must be a number, got NoneType"),
    ],
)
def test_options_that_cannot_be_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def replace_one(position: int, value) -> list:
    return [value if index == position else LOGPS for index in range(4)]


BAD_LOGPS = [
    ([-1.0, -2.0, -3.0], TypeError, r"{name} must be a torch.Tensor, got list"),
    (torch.tensor([-1, -2, -3]), TypeError, r"{name} must have dtype float32, .*got int64"),
    (torch.tensor([-3.0, math.nan, -2.0]), ValueError, r"{name} holds 1 non-finite value.* index \(1,\): nan"),
    (torch.tensor([-3.0, -1.0, -math.inf]), ValueError, r"{name} holds 1 non-finite value.* index \(2,\): -inf"),
    (torch.zeros(3, 2), ValueError, r"{name} must be \[B\] .*got \(3, 2\)"),
    (torch.tensor(-3.0), ValueError, r"{name} must be \[B\] .*got \(\)"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_LOGPS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("loss", PAIRED, ids=str)
def test_log_probabilities_that_are_none_are_refused_by_name(loss, bad, error, message):
    for position, name in enumerate(NAMES):
        with pytest.raises(error, match=message.format(name=name)):
            loss(*replace_one(position, bad))


@pytest.mark.parametrize(("bad", "error", "message"), BAD_LOGPS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("loss", UNPAIRED, ids=str)
def test_unpaired_log_probabilities_that_are_none_are_refused_by_name(loss, bad, error, message):
    with pytest.raises(error, match=message.format(name="policy_logps")):
        loss(bad, LOGPS, DESIRABLE)
    with pytest.raises(error, match=message.format(name="ref_logps")):
        loss(LOGPS, bad, DESIRABLE)


@pytest.mark.parametrize("position", [1, 2, 3])
def test_lengths_and_devices_must_agree(position):
    name = NAMES[position]
    with pytest.raises(ValueError, match=rf"{name} must have shape \(3,\) \(policy_chosen_logps's shape\), got \(4,\)"):
        DPOLoss()(*replace_one(position, torch.zeros(4)))
    with pytest.raises(ValueError, match=rf"{name} is on meta but policy_chosen_logps is on cpu"):
        DPOLoss()(*replace_one(position, LOGPS.to("meta")))


@pytest.mark.parametrize("loss", UNPAIRED, ids=str)
@pytest.mark.parametrize(
    ("desirable", "error", "message"),
    [
        (torch.tensor([1, 0, 1]), TypeError, r"desirable must have dtype bool, got int64"),
        ([True, False, True], TypeError, r"desirable must be a torch.Tensor, got list"),
        (torch.tensor([True, False]), ValueError, r"desirable must have shape \(3,\) .*got \(2,\)"),
        (DESIRABLE.to("meta"), ValueError, r"desirable is on meta but policy_logps is on cpu"),
    ],
    ids=["int", "list", "shape", "device"],
)
def test_the_labels_of_unpaired_data_are_booleans(loss, desirable, error, message):
    with pytest.raises(error, match=message):
        loss(LOGPS, LOGPS, desirable)


@pytest.mark.parametrize("loss", [*PAIRED, *UNPAIRED], ids=str)
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.tensor([1.0, -2.0, 1.0]), ValueError, r"weights must be >= 0, got a minimum of -2"),
        (torch.zeros(3), ValueError, r"weights must not all be zero"),
        (torch.ones(4), ValueError, r"weights must have shape \(3,\) \(one weight a sample\), got \(4,\)"),
        (torch.ones(3, 1), ValueError, r"weights must have shape \(3,\) .*got \(3, 1\)"),
        (torch.ones(3, dtype=torch.long), TypeError, r"weights must have dtype float32, .*got int64"),
        ([1.0, 1.0, 1.0], TypeError, r"weights must be a torch.Tensor, got list"),
        (torch.tensor([1.0, math.nan, 1.0]), ValueError, r"weights holds 1 non-finite value"),
        (torch.ones(3, device="meta"), ValueError, r"weights is on meta but .*cpu"),
    ],
    ids=["negative", "zero", "length", "matrix", "int", "list", "nan", "device"],
)
def test_weights_are_non_negative_numbers_one_a_sample(loss, weights, error, message):
    arguments = [LOGPS] * 4 if loss.paired else [LOGPS, LOGPS, DESIRABLE]
    with pytest.raises(error, match=message):
        loss(*arguments, weights=weights)


@pytest.mark.parametrize("loss", [DPOLoss(reduction="none"), KTOLoss(reduction="none")], ids=str)
def test_weights_are_refused_where_nothing_is_summed(loss):
    arguments = [LOGPS] * 4 if loss.paired else [LOGPS, LOGPS, DESIRABLE]
    with pytest.raises(ValueError, match=r"weights .*reduction='none'"):
        loss(*arguments, weights=torch.ones(3))


def wdpo(embeddings, logps=None):
    logps = (embeddings.sum((1, 2))[:3], embeddings.sum((1, 2))[3:]) if logps is None else logps
    return WDPOLoss(penalty="exact")(*logps, LOGPS, LOGPS, embeddings=embeddings)


def test_wdpo_says_what_is_wrong_with_its_embeddings():
    good = torch.randn(6, 4, 2, requires_grad=True)
    graph = (good.sum((1, 2))[:3], good.sum((1, 2))[3:])
    wdpo(good)
    with pytest.raises(ValueError, match=r"embeddings is missing: .*inputs_embeds"):
        WDPOLoss(penalty="exact")(*graph, LOGPS, LOGPS)
    with pytest.raises(TypeError, match=r"embeddings must be a torch.Tensor, got list"):
        wdpo([1.0], graph)
    with pytest.raises(TypeError, match=r"embeddings must have dtype float32, .*got int64"):
        wdpo(torch.ones(6, 4, 2, dtype=torch.long), graph)
    for rows in (0, 2, 5, 7):
        with pytest.raises(ValueError, match=rf"embeddings must have a multiple of 3 rows .*got \({rows}, 4, 2\)"):
            wdpo(torch.randn(rows, 4, 2, requires_grad=True), graph)
    with pytest.raises(ValueError, match=r"embeddings must have a multiple of 3 rows .*got \(\)"):
        wdpo(torch.tensor(1.0, requires_grad=True), graph)
    with pytest.raises(ValueError, match=r"embeddings must require grad: call .requires_grad_\(\)"):
        wdpo(good.detach(), graph)
    with pytest.raises(ValueError, match=r"embeddings must be part of the graph"):
        wdpo(good, (LOGPS, LOGPS))
    with pytest.raises(ValueError, match=r"embeddings must be part of the graph"):
        wdpo(torch.randn(6, 4, 2, requires_grad=True), graph)

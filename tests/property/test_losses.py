"""Every loss of any finite log-probabilities is that of the naive float64 formula, with finite gradients."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from typing import Any

import torch
from hypothesis import strategies as st
from property_cases import (
    DTYPES,
    KINDS,
    SIZES,
    WEIGHTS,
    WRONG_NUMBERS,
    assert_right,
    exact,
    gradients,
    holds_for,
    largest,
    leaf,
    refuses,
    spoiled,
    tensors,
    unless_too_large,
    weights_for,
)
from torch import Tensor

from robustloss import (
    LOSSES,
    ChiSquare,
    CVaR,
    KLTilt,
    Mean,
    SoftMin,
    TotalVariation,
)
from robustloss.losses.base import PAIRED_NAMES, UNPAIRED_NAMES
from robustloss.naive import preference_loss as naive
from robustloss.naive import sorted_transport as naive_transport
from robustloss.naive.links import LINKS, OFFSET_LINKS, SMOOTHED_LINKS, link_loss

BETAS = (0.01, 0.1, 1, 3.5)
# What the logarithm of a probability may be, and far more; the largest numbers of a type have tests of their own.
SIZED = tuple(kind for kind in KINDS if kind not in ("huge", "largest", "astronomic"))
AGGREGATES = [
    Mean(),
    KLTilt(tau=0.05),
    KLTilt(tau=100),
    KLTilt(rho=0.0),
    KLTilt(rho=0.3),
    KLTilt(rho=50.0),
    CVaR(0.2),
    CVaR(1),
    ChiSquare(0.0),
    ChiSquare(0.7),
    TotalVariation(0.3),
    TotalVariation(1),
    SoftMin(0.5),
    SoftMin(1e3),
]


@st.composite
def linked(draw: Any) -> dict[str, Any]:
    link = draw(st.sampled_from(LINKS))
    smoothing = draw(st.sampled_from((0.0, 0.1, 0.49))) if link in SMOOTHED_LINKS else 0.0
    return {"link": link, "beta": draw(st.sampled_from(BETAS)), "label_smoothing": smoothing}


@st.composite
def losses(draw: Any, names: Any = tuple(LOSSES)) -> tuple[str, dict[str, Any]]:
    """(name, options) of a loss, in evaluation mode where it has a state."""
    name = draw(st.sampled_from(names))
    options: dict[str, Any] = {"beta": draw(st.sampled_from(BETAS))}
    if "link" in inspect.signature(LOSSES[name]).parameters:
        options = draw(linked())
    if name == "kldpo":
        options |= draw(st.sampled_from(({"tau": 0.05}, {"tau": 1}, {"rho": 0.0}, {"rho": 0.4}, {"rho": 9.0})))
    elif name == "wdpo":
        options |= {"rho": draw(st.sampled_from((0.0, 0.5))), "squared": draw(st.booleans())}
        if "penalty" in inspect.signature(LOSSES[name]).parameters:
            options["penalty"] = "exact"  # the others need the model
    elif name == "dr_dpo":
        options["beta_prime"] = draw(st.sampled_from((0.3, 1, 50.0)))
    elif name == "tv_dpo":
        options["rho"] = draw(st.sampled_from((0, 0.25, 1.0)))
    elif name == "chi_po":
        options["max_reward"] = draw(st.sampled_from((None, 3.0)))
    elif name == "group_dro":
        options |= {"groups": 3, "step_size": 0.1, "group_sizes": draw(st.sampled_from((None, (1, 2, 3))))}
    elif name == "kto":
        options |= {"desirable_weight": draw(st.sampled_from((0, 1, 1.5)))}
    return name, options


@st.composite
def batches(draw: Any, paired: bool, kinds: Any = SIZED) -> tuple[list[Tensor], dict[str, Any]]:
    """The log-probabilities, as the loss takes them, and weights; one dtype for all, or one for each."""
    size, count = draw(st.sampled_from(SIZES)), 4 if paired else 2
    dtypes = [draw(st.sampled_from(DTYPES))] if draw(st.booleans()) else list(DTYPES)
    logps = [draw(tensors((size,), dtypes, kinds)) for _ in range(count)]
    weights = weights_for(size, draw(st.integers(0, 99)), draw(st.sampled_from(WEIGHTS)))
    options = {"weights": None if weights is None else weights.to(draw(st.sampled_from(DTYPES[:2])))}
    if not paired:
        options["desirable"] = torch.rand(size, generator=torch.Generator().manual_seed(size)) < draw(
            st.sampled_from((0.0, 0.3, 1.0))
        )
    return logps, options


def formula(name: str, options: dict[str, Any], logps: list[Tensor], given: dict[str, Any]) -> Tensor:
    """The value in float64, as the papers have it."""
    weights = None if given["weights"] is None else given["weights"].double()
    link = {"link": options.get("link", "logistic"), "beta": options["beta"]}
    link["label_smoothing"] = options.get("label_smoothing", 0.0)
    if not len(logps[0]):
        return logps[0].sum()
    q = torch.full_like(logps[0], 1 / len(logps[0])) if weights is None else weights / weights.sum()
    if name in ("aot_unpaired", "kto"):
        ratios, desirable = logps[0] - logps[1].detach(), given["desirable"]
        if name == "kto":
            scores = options["beta"] * ratios
            share = options["desirable_weight"] * torch.sigmoid(-scores)
            return (q * torch.where(desirable, share, torch.sigmoid(scores))).sum()
        rows = [x if x is None else x.unsqueeze(0) for x in (ratios, desirable, weights)]
        return naive_transport.sorted_transport(rows[0], None, None, None, rows[1], rows[2], **link)[0][0]
    pc, pr, rc, rr = logps
    if name == "aot_paired":
        rows = [x if x is None else x.unsqueeze(0) for x in (pc - pr, (rc - rr).detach(), weights)]
        return naive_transport.sorted_transport(rows[0], None, rows[1], None, None, rows[2], rows[2], **link)[0][0]
    margins = (pc - rc.detach()) - (pr - rr.detach())
    if name == "chi_po":
        z = [x.clamp(max=20.0).exp() for x in (pc - rc.detach(), pr - rr.detach())]
        margins = z[0] - z[1] + margins
        if options["max_reward"] is not None:
            margins = margins.clamp(
                -2 * options["max_reward"] / options["beta"], 2 * options["max_reward"] / options["beta"]
            )
    elif name == "beta_dpo":
        link["beta"] = max(options["beta"] * (1 + 0.6 * (q * margins.detach()).sum().item()), 1e-3)
    each = link_loss(margins, **link)
    if name == "group_dro":
        total, own = each.new_zeros(()), q
        for group in range(3):
            member = given["groups"] == group
            if options["group_sizes"] is not None:
                share = options["group_sizes"][group] / 6
                total = total + (own * each)[member].sum() / share / 3
            elif own[member].sum() > 0:
                total = total + (own * each)[member].sum() / own[member].sum() / 3
        return total
    if name == "wdpo":
        slopes = torch.autograd.grad(each.sum(), margins, create_graph=True)[0]
        mean = (q * slopes.square() * given["squares"]).sum()
        root = mean.sqrt() if mean > 0 else mean
        return (q * each).sum() + options["rho"] * (mean if options["squared"] else root)
    kind, parameter = {
        "kldpo": ("kl_tilt", options.get("tau")) if options.get("tau") else ("kl_ball", options.get("rho")),
        "dr_dpo": ("soft_min", options.get("beta_prime")),
        "tv_dpo": ("total_variation", options.get("rho")),
    }.get(name, ("mean", 0.0))
    return naive.preference_loss(each, None, None, None, weights, link="identity", aggregate=kind, parameter=parameter)[
        0
    ]


def slope_of(options: dict[str, Any], logps: list[Tensor]) -> float:
    """How large a loss, or its change with a margin, may be: the scale of what is added up."""
    size = 4 * largest(*logps) + 1 / min(options["beta"], 1.0) + 1
    if options.get("link") in (*OFFSET_LINKS, "ipo"):
        return size * size
    return max(options["beta"], 1.0) * size / (1 - 2 * options.get("label_smoothing", 0.0))


@holds_for(data=st.data())
def test_the_value_and_the_gradients_are_those_of_the_formula(data):
    name, options = data.draw(losses([name for name in LOSSES if name != "wdpo"]))
    loss = LOSSES[name](**options).eval()
    logps, given = data.draw(batches(loss.paired))
    if loss.needs_groups:
        given["groups"] = torch.arange(len(logps[0])) % data.draw(st.integers(1, 3))
    policies = len(logps) // 2
    logps = [leaf(x) if i < policies else x for i, x in enumerate(logps)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "AOT", UserWarning)  # of a batch with nothing to match
        value, metrics = loss(*logps, **given, return_metrics=True)
    doubles = [leaf(exact(x)) for x in logps]
    wanted = formula(name, options, doubles, given)
    assert value.dtype == (torch.float64 if any(x.dtype == torch.float64 for x in logps) else torch.float32)
    scale = slope_of(options, logps)
    if name == "beta_dpo":
        scale *= 4 + 8 * largest(*logps)  # beta follows the margins
    assert_right(value, wanted, scale=scale)
    assert all(metric.shape == () and not metric.requires_grad for metric in metrics.values())
    got = gradients(value, logps[:policies])
    for gradient, x in zip(got, logps, strict=False):
        assert gradient.isfinite().all() or (x.dtype == torch.float16 and not gradient.isnan().any())
    if scale < 1e4 and name not in ("aot_paired", "aot_unpaired"):  # at ties any of the tied samples may take it
        kinks = options.get("link") in ("hinge",) or "max_reward" in options or name in ("tv_dpo", "beta_dpo")
        for gradient, right in zip(got, gradients(wanted, doubles[:policies]), strict=True):
            if not kinks:
                assert_right(gradient, right, scale=scale, digits=20)


@holds_for(data=st.data())
def test_wdpo_is_the_mean_loss_and_the_mean_squared_gradient(data):
    _, options = data.draw(losses(["wdpo"]))
    loss = LOSSES["wdpo"](**options)
    size, dtype = data.draw(st.sampled_from(SIZES[1:])), data.draw(st.sampled_from(DTYPES[:2]))
    embeddings = leaf(data.draw(tensors((2 * size, 3), (dtype,), ("ordinary", "tied", "zeros", "constant"))))
    refs = [data.draw(tensors((size,), (dtype,), ("ordinary", "wide", "zeros"))) for _ in range(2)]
    weights = weights_for(size, data.draw(st.integers(0, 99)), data.draw(st.sampled_from(WEIGHTS)))
    policy = embeddings.sin().sum(-1).chunk(2)
    value = loss(*policy, *refs, embeddings=embeddings, weights=weights)
    doubles = leaf(exact(embeddings))
    squares = sum(doubles.cos().square().sum(-1).chunk(2))
    wanted = formula(
        "wdpo", options, [*doubles.sin().sum(-1).chunk(2), *map(exact, refs)], {"weights": weights, "squares": squares}
    )
    scale = slope_of(options, [*policy, *refs])
    assert_right(value, wanted, scale=scale)
    assert gradients(value, [embeddings])[0].isfinite().all()


@holds_for(data=st.data())
def test_numbers_as_large_as_they_come_never_give_nan(data):
    name, options = data.draw(losses([name for name in LOSSES if name != "wdpo"]))
    loss = LOSSES[name](**options).train(data.draw(st.booleans()))
    logps, given = data.draw(batches(loss.paired, KINDS))
    if loss.needs_groups:
        given["groups"] = torch.arange(len(logps[0])) % 3
    logps = [leaf(x) for x in logps]
    before = copy.deepcopy(loss.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "AOT", UserWarning)
        value = unless_too_large(lambda: loss(*logps, **given), *logps)
    if value is None:
        assert all(torch.equal(x, before[key]) for key, x in loss.state_dict().items())  # a state stays whole
        return
    assert not value.isnan()
    assert not any(gradient.isnan().any() for gradient in gradients(value, logps[: len(logps) // 2]))
    assert all(buffer.isfinite().all() for buffer in loss.state_dict().values())


@holds_for(data=st.data())
def test_soft_sorts_of_the_samples_give_finite_losses(data):
    name = data.draw(st.sampled_from(("aot_paired", "aot_unpaired")))
    options = data.draw(linked())
    sort = data.draw(st.sampled_from(("soft_l2", "soft_kl", "sinkhorn")))
    strength = data.draw(st.sampled_from(("auto", 0.05, 1.0)))
    loss = LOSSES[name](**options, sort=sort, strength=strength)
    logps, given = data.draw(batches(loss.paired))
    del given["weights"]
    logps = [leaf(x) for x in logps]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "AOT|sinkhorn_sort", UserWarning)
        value = loss(*logps, **given)
    assert value.isfinite() or options["link"] in (*OFFSET_LINKS, "ipo")  # whose squares may exceed float32
    assert not value.isnan()
    assert all(gradient.isfinite().all() for gradient in gradients(value, logps[: len(logps) // 2]))


@holds_for(data=st.data())
def test_aggregates_are_those_of_the_naive_computation_and_weigh_no_sample_less_than_nothing(data):
    aggregate = data.draw(st.sampled_from(AGGREGATES))
    size = data.draw(st.sampled_from(SIZES[1:]))
    values = leaf(data.draw(tensors((size,))))
    weights = weights_for(size, data.draw(st.integers(0, 99)), data.draw(st.sampled_from(WEIGHTS)))
    kind, parameter, _ = aggregate.arguments
    answer = unless_too_large(lambda: aggregate(values, weights), values)
    if answer is None:
        return
    got, metrics = answer
    doubles = leaf(exact(values))
    if largest(values) < 1e140 and (largest(values) > 1e-140 or largest(values) == 0):  # the naive one squares them
        rest = {"link": "identity", "aggregate": kind, "parameter": parameter}
        wanted = naive.preference_loss(doubles, None, None, None, weights, **rest)[0]
        assert_right(got, wanted, scale=largest(values), digits=10)
    assert not got.isnan()
    (gradient,) = gradients(got, [values])
    assert (gradient >= 0).all()
    assert abs(exact(gradient).sum().item() - 1) <= 1e-9 * size + 4 * torch.finfo(values.dtype).eps
    assert not any(metric.isnan() for metric in metrics.values())


WRONG_OPTIONS: dict[str, Any] = {
    "beta": (*WRONG_NUMBERS, 0),
    "label_smoothing": (*WRONG_NUMBERS, 0.5, 1),
    "tau": tuple(x for x in (*WRONG_NUMBERS, 0) if x is not None),
    "rho": tuple(x for x in (*WRONG_NUMBERS, 10**400) if x is not None),
    "alpha": WRONG_NUMBERS,
    "link": ("Logistic", "", None, 1, ["logistic"]),
    "sort": ("soft", None, 0),
    "strength": (0, -1.0, "automatic", None, math.nan),
    "squared": (1, None, "yes"),
    "beta_prime": (*WRONG_NUMBERS, 0),
    "max_reward": tuple(x for x in (*WRONG_NUMBERS, 0) if x is not None),
    "momentum": (*WRONG_NUMBERS, 1),
    "filter_ratio": (*WRONG_NUMBERS, 1),
    "filtering": ("farthest", None, 3),
    "seed": (-1, 1.5, True, None, 2**31),
    "groups": (0, -1, 2.0, True, None),
    "step_size": WRONG_NUMBERS,
    "group_sizes": ((1,), (1, 0), (1, -2), (1, math.nan), (1, None), 3),
    "desirable_weight": WRONG_NUMBERS,
    "undesirable_weight": WRONG_NUMBERS,
    "normalize": (0, None, "no"),
    "max_weight": tuple(x for x in (*WRONG_NUMBERS, 0, 5.0) if x is not None),  # 5.0 needs normalize=False
    "reduction": ("sum", None, 0),
    "aggregate": (1, "mean", KLTilt, [Mean()]),
}


@holds_for(data=st.data())
def test_options_out_of_range_are_refused_by_name(data):
    name = data.draw(st.sampled_from(sorted(LOSSES)))
    needed = {"tau": 1.0} if name == "kldpo" else {}
    known = inspect.signature(LOSSES[name]).parameters
    option = data.draw(st.sampled_from([key for key in WRONG_OPTIONS if key in known]))
    wrong = data.draw(st.sampled_from(WRONG_OPTIONS[option]))
    if option == "rho" and name == "kldpo":
        needed = {}
    refuses(lambda: LOSSES[name](**{**needed, option: wrong}), option)


@holds_for(data=st.data())
def test_arguments_that_do_not_fit_are_refused_by_name(data):
    name, options = data.draw(losses())
    loss = LOSSES[name](**options)
    names = PAIRED_NAMES if loss.paired else UNPAIRED_NAMES
    arguments: dict[str, Any] = {key: torch.tensor([-3.0, -2.0, -4.0]) for key in (*names, "weights")}
    arguments["weights"] = torch.tensor([1.0, 2.0, 0.5])
    if not loss.paired:
        arguments["desirable"] = torch.tensor([True, False, True])
    if loss.needs_groups:
        arguments["groups"] = torch.tensor([0, 1, 2])
    if loss.needs_mismatched:
        arguments["kl_logratios"] = torch.tensor([0.1, -0.2])
    if loss.needs_embeddings:
        embeddings = leaf(torch.ones(6, 2))
        arguments["embeddings"] = embeddings
        for key, rows in zip(PAIRED_NAMES, embeddings.sum(-1).chunk(2), strict=False):
            arguments[key] = rows
    loss(**arguments)
    key = data.draw(st.sampled_from(sorted(arguments)))
    if key == "desirable":
        wrong = [torch.ones(3), torch.ones(3).long(), torch.ones(2, 3).bool(), [True, False, True], None]
        arguments[key] = data.draw(st.sampled_from(wrong))
    elif key == "groups":
        wrong = [
            torch.tensor([0, 1, 3]),
            torch.tensor([0, -1, 1]),
            torch.ones(3),
            torch.ones(2).long(),
            [0, 1, 2],
            None,
        ]
        arguments[key] = data.draw(st.sampled_from(wrong))
    elif key == "weights":
        wrong = [-torch.ones(3), torch.zeros(3), torch.ones(2), [1.0] * 3, 1.0, torch.tensor([1, math.nan, 1])]
        arguments[key] = data.draw(st.sampled_from(wrong))
    elif key == "embeddings":
        wrong = [torch.ones(6, 2), torch.ones(5, 2, requires_grad=True), torch.ones(()), None, leaf(torch.ones(6, 2))]
        arguments[key] = data.draw(st.sampled_from(wrong))
    else:
        arguments[key] = data.draw(spoiled(arguments[key]))
    refuses(lambda: loss(**arguments), key, names[0])


def test_every_loss_has_its_formula_here():
    assert set(LOSSES) == {
        "dpo", "kldpo", "wdpo", "aot_paired", "aot_unpaired", "kto", "dr_dpo", "chi_po", "beta_dpo", "group_dro",
        "tv_dpo",
    }  # fmt: skip

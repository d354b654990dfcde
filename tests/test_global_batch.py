"""GlobalBatch in one process: any number of microbatches is one giant batch, in the memory of one microbatch."""

from __future__ import annotations

import copy
import pickle
import weakref
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from global_batch_cases import (
    LOSSES,
    SHARES,
    UNCOUPLED,
    distance,
    logps_of,
    make_batch,
    make_policy,
    surrogate_of,
    take,
    train_cut,
    train_giant,
)

from robustloss import (
    AOTUnpairedLoss,
    BetaDPOLoss,
    DPOLoss,
    GlobalBatch,
    GroupDROLoss,
    KLDPOLoss,
    KTOLoss,
    WDPOLoss,
)
from robustloss._random import RandomState
from robustloss.global_batch import NonFiniteError, weighted_sum

pytestmark = pytest.mark.filterwarnings("ignore:AOT")  # a microbatch of one class, or of one pair
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
# Four microbatches of ten rows, ragged, one of them empty.
ROWS = SHARES[1, 4][0]


@cache
def giant(name: str, dtype: torch.dtype) -> dict:
    return train_giant(name, dtype)


def microbatches_of(name: str, rows: list[range] = ROWS) -> list[dict[str, torch.Tensor]]:
    return [take(make_batch(name, 0), share) for share in rows]


def gradients_of(policy: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in policy.parameters()]


def logps(value: float = 0.0, size: int = 3) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_five_steps_are_those_of_the_giant_batch(name, microbatches, dtype):
    expected = giant(name, dtype)
    for masses in (False, True) if name in UNCOUPLED else (False,):
        # A framework that divides by the accumulation steps is told of by `divisor`.
        options = {"divisor": float(microbatches), "masses": masses}
        got = train_cut(name, dtype, SHARES[1, microbatches][0], policy=make_policy(dtype), **options)
        for key in ("values", "gradients", "parameters", "state"):
            assert distance(got[key], expected[key]) <= DTYPES[dtype], key
        # Differences of means, of which float32 leaves fewer digits.
        assert distance(got["metrics"], expected["metrics"]) <= (1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_ordinary_accumulation_trains_another_loss(name):
    shares = [range(2), range(2, 10)]
    got = train_cut(name, torch.float64, shares, policy=make_policy(), global_batch=False)
    assert distance(got["gradients"], giant(name, torch.float64)["gradients"]) > 0.05


@pytest.mark.parametrize("name", ["kldpo tau", "aot unpaired hard", "kto", "group dro sized"])
def test_a_head_that_is_told_the_cotangents_gives_the_same_gradients(name):
    gradients = []
    for with_surrogate in (False, True):
        policy = make_policy()
        surrogate_fn = surrogate_of(policy) if with_surrogate else None
        GlobalBatch(LOSSES[name][0]()).step(
            microbatches_of(name), logps_of(policy), torch.Tensor.backward, surrogate_fn=surrogate_fn
        )
        gradients.append(gradients_of(policy))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("loss", "masses", "passes"),
    [
        (KLDPOLoss(0.5, tau=0.2), None, 2),
        (KLDPOLoss(0.5, tau=0.2), [3, 1, 0, 6], 2),
        (DPOLoss(0.5), None, 2),
        (DPOLoss(0.5), [3, 1, 0, 6], 1),
    ],
    ids=["coupled", "coupled, masses", "uncoupled", "uncoupled, masses"],
)
def test_all_microbatches_but_the_last_run_twice_unless_the_loss_is_a_mean_of_known_mass(loss, masses, passes):
    policy, graphs, backward = make_policy(), [], []

    def logps_fn(batch):
        arguments = logps_of(policy)(batch)
        graphs.append(arguments["policy_chosen_logps"].grad_fn is not None)
        return arguments

    def backward_fn(scalar):
        backward.append(scalar.shape)
        scalar.backward()

    GlobalBatch(loss).step(microbatches_of("kldpo tau"), logps_fn, backward_fn, masses=masses)
    assert backward == [()] * 4
    # Nothing of the first pass has a graph but its last microbatch.
    assert graphs == ([False] * 3 + [True] + [True] * 3 if passes == 2 else [True] * 4)

    graphs.clear()
    GlobalBatch(loss).step(microbatches_of("kldpo tau", [range(10)]), logps_fn, backward_fn)
    assert graphs == [True]


def test_surrogates_are_asked_for_second_passes_only():
    policy, calls = make_policy(), {"logps": 0, "surrogate": []}

    def logps_fn(batch):
        calls["logps"] += 1
        return logps_of(policy)(batch)

    def surrogate_fn(batch, cotangents):
        assert all(not value.requires_grad for value in cotangents.values())
        calls["surrogate"].append({name: len(value) for name, value in cotangents.items()})
        return surrogate_of(policy)(batch, cotangents)

    loss = GlobalBatch(KLDPOLoss(0.5, tau=0.2))
    loss.step(microbatches_of("kldpo tau"), logps_fn, torch.Tensor.backward, surrogate_fn=surrogate_fn)
    assert calls["logps"] == 4
    sizes = [{"policy_chosen_logps": size, "policy_rejected_logps": size} for size in (3, 1, 0)]
    assert calls["surrogate"] == sizes


def test_at_any_time_the_graph_of_one_microbatch_is_alive():
    """What autograd keeps for the backward, in elements: its peak over four microbatches is that of one of them."""

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    def peak(rows: list[range]) -> int:
        alive, most = weakref.WeakSet(), 0

        def pack(tensor):
            nonlocal most
            saved = Saved(tensor)
            alive.add(saved)
            most = max(most, sum(other.tensor.numel() for other in alive))
            return saved

        policy = make_policy()
        logps_fn = logps_of(policy)

        def watched(batch):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
                return logps_fn(batch)

        microbatches = microbatches_of("aot paired hard", rows)
        GlobalBatch(KLDPOLoss(0.5, tau=0.2)).step(microbatches, watched, torch.Tensor.backward)
        return most

    assert peak([range(2), range(2, 4), range(4, 6), range(6, 8)]) == peak([range(2)])
    assert peak([range(8)]) > 2 * peak([range(2)])


def dropout_step(loss) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients of a step of a policy with dropout, and what the generator gives after it."""
    policy = make_policy(dropout=0.4)
    torch.manual_seed(3)
    loss.step(microbatches_of("kldpo tau"), logps_of(policy), torch.Tensor.backward)
    return gradients_of(policy), torch.rand(3)


def test_dropout_masks_are_those_of_one_pass_over_the_microbatches():
    policy = make_policy(dropout=0.4)
    torch.manual_seed(3)
    parts = [logps_of(policy)(batch) for batch in microbatches_of("kldpo tau")]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    KLDPOLoss(0.5, tau=0.2)(**whole).backward()
    expected = gradients_of(policy), torch.rand(3)
    torch.testing.assert_close(dropout_step(GlobalBatch(KLDPOLoss(0.5, tau=0.2))), expected, rtol=1e-12, atol=1e-14)


def test_without_restored_generators_dropout_gives_another_gradient(monkeypatch):
    monkeypatch.setattr(RandomState, "restore", lambda state: None)
    wrong, _ = dropout_step(GlobalBatch(KLDPOLoss(0.5, tau=0.2)))
    monkeypatch.undo()
    right, _ = dropout_step(GlobalBatch(KLDPOLoss(0.5, tau=0.2)))
    assert distance([x.tolist() for x in wrong], [x.tolist() for x in right]) > 0.1


def test_the_generator_is_put_back_when_a_second_pass_fails():
    policy, states = make_policy(dropout=0.4), []

    def surrogate_fn(batch, cotangents):
        states.append(torch.get_rng_state())
        raise KeyError("out of luck")

    loss = GlobalBatch(KLDPOLoss(0.5, tau=0.2))
    torch.manual_seed(3)
    with pytest.raises(KeyError, match="out of luck"):
        loss.step(microbatches_of("kldpo tau"), logps_of(policy), torch.Tensor.backward, surrogate_fn=surrogate_fn)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(states[0], torch.get_rng_state())
    for batch in microbatches_of("kldpo tau"):
        logps_of(policy)(batch)
    assert torch.equal(after, torch.get_rng_state())


def test_a_state_is_updated_once_a_step_and_in_evaluation_never():
    loss = GlobalBatch(BetaDPOLoss(0.5))
    for _ in range(2):
        loss.step(microbatches_of("beta dpo"), logps_of(make_policy()), torch.Tensor.backward)
    assert loss.loss.batches == 2
    before = copy.deepcopy(loss.state_dict())
    assert list(before) == ["loss.margin_mean", "loss.margin_std", "loss.batches"]
    loss.eval()
    loss.step(microbatches_of("beta dpo"), logps_of(make_policy()), torch.Tensor.backward)
    with torch.no_grad():
        loss(*[logps()] * 4)
    assert loss.state_dict() == before


def test_what_the_loss_gets_is_what_the_microbatches_hold_to_the_bit():
    """Every dtype, through one exchange."""

    class Listening(KTOLoss):
        def forward(self, policy_logps, ref_logps, desirable, *, groups, kl_logratios, return_metrics=False):
            self.got = {"ref_logps": ref_logps, "desirable": desirable, "groups": groups, "kl_logratios": kl_logratios}
            return super().forward(policy_logps, ref_logps, desirable, return_metrics=return_metrics)

    generator = torch.Generator().manual_seed(0)
    wanted = {
        "ref_logps": torch.randn(7, generator=generator, dtype=torch.float64) / 3,
        "desirable": torch.arange(7) % 2 == 0,
        "groups": torch.tensor([2**53 - 1, -5, 0, 1, 2, 3, 4]),
        "kl_logratios": torch.randn(7, generator=generator) / 3,
    }
    loss, policy = Listening(0.5), torch.zeros(7, dtype=torch.bfloat16, requires_grad=True)
    cuts = [slice(0, 4), slice(4, 4), slice(4, 7)]
    GlobalBatch(loss).step(
        [{"policy_logps": slice(cut.start, cut.stop), **{k: v[cut] for k, v in wanted.items()}} for cut in cuts],
        lambda part: {**part, "policy_logps": policy[part["policy_logps"]]},
        torch.Tensor.backward,
    )
    for name, value in wanted.items():
        assert loss.got[name].dtype == value.dtype
        assert torch.equal(loss.got[name], value)


def test_constants_get_no_gradient_whatever_the_loss_does_with_them():
    class Difference(DPOLoss):
        def forward(self, policy_chosen_logps, ref_chosen_logps, *, weights=None, return_metrics=False):
            assert weights is None
            value = (policy_chosen_logps - ref_chosen_logps).mean()
            return (value, {}) if return_metrics else value

    for masses in (None, [3, 3]):
        policy, ref = logps().requires_grad_(), logps(-1.0).requires_grad_()
        given = {"policy_chosen_logps": policy, "ref_chosen_logps": ref, "weights": None}
        value, _ = GlobalBatch(Difference()).step([given, given], dict, torch.Tensor.backward, masses=masses)
        assert value == 1
        assert not value.requires_grad
        torch.testing.assert_close(policy.grad, logps(1 / 3))
        assert ref.grad is None


@pytest.mark.parametrize("loss", [KLDPOLoss(0.5, tau=0.2), GroupDROLoss(0.5)], ids=["kldpo", "group_dro"])
def test_forward_of_one_process_is_the_loss_itself(loss, monkeypatch):
    given = []
    forward = loss.forward
    monkeypatch.setattr(
        loss, "forward", lambda *vectors, **options: given.append(vectors) or forward(*vectors, **options)
    )
    vectors = [torch.linspace(-2, 1, 4, dtype=torch.float64).roll(shift).requires_grad_() for shift in range(4)]
    options = {"groups": torch.tensor([0, 1, 1, 0])} if loss.needs_groups else {}
    value, metrics = GlobalBatch(loss)(*vectors, return_metrics=True, **options)
    assert all(one is other for one, other in zip(given[0], vectors, strict=True))  # no copies
    assert "rewards/margins" in metrics
    (first,) = torch.autograd.grad(value, vectors[0], create_graph=True)
    assert torch.autograd.grad(first.square().sum(), vectors[0])[0].abs().sum() > 0


def test_a_copy_of_it_is_another_one():
    loss = GlobalBatch(BetaDPOLoss(0.5))
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        other(*[logps()] * 4)
        assert other.loss.batches == 1
        assert loss.loss.batches == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GlobalBatch(torch.nn.MSELoss()), TypeError, r"loss must be a PreferenceLoss such as .*got MSELoss"),
        (lambda: GlobalBatch(KLDPOLoss), TypeError, r"loss must be a PreferenceLoss such as .*got type"),
        (lambda: GlobalBatch(GlobalBatch(DPOLoss())), TypeError, r"loss must be a PreferenceLoss .*got GlobalBatch"),
        (
            lambda: GlobalBatch(WDPOLoss()),
            ValueError,
            r"WDPOLoss differentiates .*robustloss\.penalty\.directional_step",
        ),
        (lambda: GlobalBatch(DPOLoss(reduction="none")), ValueError, r"reduction='none', and a global batch has one"),
    ],
)
def test_losses_that_have_no_global_batch_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_is_not_finite_is_told_by_microbatch_and_row():
    def spoiled(index):
        chosen, rejected = logps().requires_grad_(), logps()
        bad = {0: ([1], []), 1: ([], []), 2: ([0], [0, 2])}[index]
        chosen = chosen + torch.tensor([torch.nan if row in bad[0] else 0.0 for row in range(3)])
        rejected = rejected - torch.tensor([torch.inf if row in bad[1] else 0.0 for row in range(3)])
        names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
        return dict(zip(names, (chosen, rejected, logps(), logps()), strict=True))

    message = r"policy_chosen_logps and policy_rejected_logps not finite at .* \(0, 0, 1\), \(0, 2, 0\), \(0, 2, 2\)$"
    for masses, calls in ((None, 0), ([3, 3, 3], 3)):
        backward = []
        with pytest.raises(NonFiniteError, match=message) as caught:
            GlobalBatch(DPOLoss(0.5)).step([0, 1, 2], spoiled, backward.append, masses=masses)
        assert caught.value.positions == [(0, 0, 1), (0, 2, 0), (0, 2, 2)]
        assert isinstance(caught.value, FloatingPointError)
        assert len(backward) == calls
        assert pickle.loads(pickle.dumps(caught.value)).positions == caught.value.positions


def test_what_is_not_finite_teaches_a_state_nothing():
    loss = GlobalBatch(BetaDPOLoss(0.5))
    with pytest.raises(NonFiniteError):
        loss.step(
            microbatches_of("beta dpo"),
            lambda batch: {name: value + torch.nan for name, value in logps_of(make_policy())(batch).items()},
            torch.Tensor.backward,
        )
    assert loss.loss.batches == 0
    assert loss.loss.margin_mean == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"microbatches": []}, ValueError, r"the same number of microbatches, at least one, got \[0\]"),
        ({"divisor": 0}, ValueError, r"divisor must be > 0, got 0"),
        ({"masses": [3.0]}, ValueError, r"masses must be 2 numbers >= 0, one a microbatch, got \[3.0\]"),
        ({"masses": [3.0, -1.0]}, ValueError, r"masses must be 2 numbers >= 0, one a microbatch, got \[3.0, -1.0\]"),
        ({"masses": [3.0, 2.0]}, ValueError, r"masses add up to 5, but the samples to 6, so this gradient is wrong"),
    ],
)
def test_a_step_that_cannot_be_is_refused(change, error, message):
    arguments = {"microbatches": [range(3), range(3, 6)], **change}
    microbatches = [take(make_batch("kldpo tau", 0), rows) for rows in arguments.pop("microbatches")]
    with pytest.raises(error, match=message):
        GlobalBatch(DPOLoss()).step(microbatches, logps_of(make_policy()), torch.Tensor.backward, **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"desirables": logps()}, ValueError, r"arguments of the loss \(policy_logps, ref_logps, desirable, weights\)"),
        ({"desirable": None}, ValueError, r"the same in every microbatch, got policy_logps, ref_logps in microbatch 1"),
        (
            {"ref_logps": 0.0},
            TypeError,
            r"ref_logps must be a tensor \[B\] of numbers or bools, got float in microbatch 1",
        ),
        ({"ref_logps": logps()[None]}, TypeError, r"got torch.float64 \(1, 3\) in microbatch 1"),
        ({"ref_logps": logps(size=2)}, ValueError, r"of one length, got \{.*'ref_logps': 2.* in microbatch 1"),
        (
            {"ref_logps": logps().to("meta")},
            ValueError,
            r"on one device, got \{.*'ref_logps': 'meta'.* in microbatch 1",
        ),
    ],
    ids=["unknown", "missing", "float", "matrix", "length", "device"],
)
def test_arguments_that_do_not_fit_are_told_by_name_and_microbatch(change, error, message):
    good = {"policy_logps": logps().requires_grad_(), "ref_logps": logps(), "desirable": torch.arange(3) < 2}
    with pytest.raises(error, match=message):
        GlobalBatch(AOTUnpairedLoss()).step([good, {**good, **change}], dict, torch.Tensor.backward)


def test_arguments_that_the_loss_misses_are_its_own_error():
    with pytest.raises(TypeError, match=r"missing .* required positional argument"):
        GlobalBatch(DPOLoss()).step([{"policy_chosen_logps": logps()}], dict, torch.Tensor.backward)


def test_training_without_gradients_is_refused():
    with torch.no_grad(), pytest.raises(RuntimeError, match="forward gives the value without them"):
        GlobalBatch(DPOLoss()).step(microbatches_of("kldpo tau"), logps_of(make_policy()), torch.Tensor.backward)


# ----------------------------------------------------------------- in a loop that someone else owns


@pytest.mark.parametrize("name", ["kldpo tau", "aot unpaired soft", "kto", "group dro sized", "beta dpo"])
def test_the_cotangents_alone_make_the_gradients_of_a_step(name):
    """What a trainer of another library does: values first, then backward on each microbatch's weighted sum."""
    mine, theirs = make_policy(), make_policy()
    step_value, step_metrics = GlobalBatch(LOSSES[name][0]()).step(
        microbatches_of(name), logps_of(mine), torch.Tensor.backward, divisor=4.0
    )
    with torch.no_grad():
        known = [logps_of(theirs)(microbatch) for microbatch in microbatches_of(name)]
        value, metrics, cotangents = GlobalBatch(LOSSES[name][0]()).cotangents(known, divisor=4.0)
    for microbatch, cotangent in zip(microbatches_of(name), cotangents, strict=True):
        weighted_sum(logps_of(theirs)(microbatch), cotangent).backward()
    torch.testing.assert_close(gradients_of(theirs), gradients_of(mine), rtol=1e-12, atol=1e-14)
    assert torch.equal(value, step_value)
    assert not value.requires_grad
    torch.testing.assert_close(metrics, step_metrics, rtol=0, atol=0, equal_nan=True)


def test_shares_make_a_mean_of_microbatches_the_mean_of_samples():
    mine, theirs = make_policy(), make_policy()
    batches = microbatches_of("kldpo tau")
    GlobalBatch(DPOLoss(0.5)).step(batches, logps_of(mine), torch.Tensor.backward, divisor=2.0)
    loss = GlobalBatch(DPOLoss(0.5))
    for batch, share in zip(batches, loss.shares([len(rows) for rows in ROWS], divisor=2.0), strict=True):
        if share:
            (share * loss.loss(**logps_of(theirs)(batch))).backward()
    torch.testing.assert_close(gradients_of(theirs), gradients_of(mine), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("used", [True, False])
def test_random_states_are_those_of_the_accelerator_in_use(used, monkeypatch):
    states = [torch.tensor([1]), torch.tensor([2])]
    module = SimpleNamespace(
        is_initialized=lambda: used,
        get_rng_state_all=lambda: [state.clone() for state in states],
        set_rng_state_all=lambda saved: states.__setitem__(slice(None), saved),
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", {torch.device("xpu"): module}.get)
    state = RandomState()
    states[:] = [torch.tensor([3]), torch.tensor([4])]
    drawn = torch.rand(2)
    state.restore()
    assert torch.equal(torch.rand(2), drawn)
    assert [int(device) for device in states] == ([1, 2] if used else [3, 4])


def test_parts_of_a_mean_are_its_shares_and_keep_the_graph_where_there_is_nothing():
    loss, arguments = GlobalBatch(DPOLoss(0.5, link="squared_hinge")), make_batch("kldpo tau", 0)
    policy = make_policy()
    part, problem = loss.part_of_mean(logps_of(policy)(arguments), 0.25)
    torch.testing.assert_close(part, 0.25 * loss.loss(**logps_of(policy)(arguments)), rtol=0, atol=0)
    assert problem is None

    def spoiled(value: float) -> dict[str, torch.Tensor]:
        return {**logps_of(policy)(arguments), "ref_chosen_logps": torch.full((10,), value, dtype=torch.float64)}

    nothing = torch.zeros(10, dtype=torch.float64)
    for given, share, expected in (
        (logps_of(policy)(arguments), 0.0, type(None)),
        ({**logps_of(policy)(arguments), "weights": nothing}, 0.0, type(None)),  # a mean of no sample
        ({**logps_of(policy)(arguments), "weights": nothing}, 0.5, ValueError),
        (spoiled(torch.nan), 0.5, type(None)),  # which the gathered arguments tell with its place
        (spoiled(1e300), 0.5, NonFiniteError),
    ):
        policy.zero_grad()
        part, problem = loss.part_of_mean(given, share)
        assert type(problem) is expected
        assert part == 0
        part.backward()  # so that no process waits for this one
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients_of(policy))


def test_a_problem_met_before_is_raised_in_place_of_cotangents():
    with pytest.raises(NonFiniteError, match="before"):
        GlobalBatch(DPOLoss(0.5)).cotangents(
            [logps_of(make_policy())(batch) for batch in microbatches_of("kldpo tau")], problem=NonFiniteError("before")
        )


@pytest.mark.parametrize(("masses", "backward"), [(None, 0), ([3, 3], 2)])
def test_finite_samples_that_overflow_the_loss_are_told_as_not_finite(masses, backward):
    calls, names = [], ("policy_chosen_logps", "policy_rejected_logps", "ref_rejected_logps")
    others = {name: logps().requires_grad_() for name in names}
    with pytest.raises(NonFiniteError, match="too large: the loss overflows float64"):
        GlobalBatch(DPOLoss(0.5, link="squared_hinge")).step(
            [{**others, "ref_chosen_logps": logps(value)} for value in (0.0, 1e300)],
            dict,
            calls.append,
            masses=masses,
        )
    assert len(calls) == backward


@pytest.mark.parametrize("masses", [None, [3.0, 1.0, 0.0, 6.0]])
@pytest.mark.parametrize("count", [1, 4])
def test_all_passes_with_a_graph_but_the_last_are_without_synchronisation(masses, count):
    policy, apart, seen = make_policy(), [], []

    @contextmanager
    def no_sync():
        apart.append(True)
        yield
        apart.pop()

    def logps_fn(batch):
        seen.append(("forward", bool(apart), torch.is_grad_enabled()))
        return logps_of(policy)(batch)

    def backward(scalar):
        seen.append(("backward", bool(apart), True))
        scalar.backward()

    rows = ROWS if count == 4 else [range(10)]
    GlobalBatch(DPOLoss(0.5)).step(
        microbatches_of("kldpo tau", rows),
        logps_fn,
        backward,
        masses=masses and [sum(masses)] if count == 1 else masses,
        no_sync=no_sync,
    )
    passes = [(name, inside) for name, inside, graph in seen if graph]
    assert passes == (count - 1) * [("forward", True), ("backward", True)] + [("forward", False), ("backward", False)]
    assert not apart


def test_shares_and_cotangents_refuse_what_they_are_not_for():
    with pytest.raises(ValueError, match="KLDPOLoss looks at the whole batch: call cotangents instead"):
        GlobalBatch(KLDPOLoss(0.5, tau=0.2)).shares([3, 3])
    with pytest.raises(ValueError, match=r"masses must be 2 numbers >= 0, one a microbatch, got \[3, -1\]"):
        GlobalBatch(DPOLoss(0.5)).shares([3, -1])
    with pytest.raises(ValueError, match="divisor must be > 0, got 0"):
        GlobalBatch(KLDPOLoss(0.5, tau=0.2)).cotangents([], divisor=0)

"""The benchmark suites on tiny shapes: what is measured, once, how, and against whom."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import coupled_losses, linear_sequence_logps, measure, sequence_logps, soft_sort
from bench.cases import FORWARD, TRAINING, Absent, Case, Peer, Problem
from bench.linear_sequence_logps import KNOWN, Head
from bench.measure import Timing, launches, memory_on_cpu, result_of, timing_of_calls
from bench.results import COPY, OURS, PRODUCTS, READ, SORT, append, file_name, load
from bench.suites import SUITES

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SEQUENCE, LINEAR, COUPLED, SOFT_SORT = (
    module.SUITE for module in (sequence_logps, linear_sequence_logps, coupled_losses, soft_sort)
)
SHAPE = {"B": 2, "T": 3, "V": 50}
L2, KL = "l2, strength 1, forward+backward", "kl, strength 1, forward+backward"


def tiny(suite, pass_name, peer):
    return Case(suite, suite.tiny_shape, "float32", pass_name, peer)


def run_tiny(op: str, selection: str, results: Path) -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--op", op, "-k", selection, "--tiny"]
    subprocess.run(
        [*command, "-p", "no:cacheprovider", "--results", str(results)],
        cwd=ROOT,
        # Where these tests themselves run beside each other, pytest-benchmark would measure nothing.
        env={name: value for name, value in os.environ.items() if "XDIST" not in name} | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite would measure the GPU, where it takes longer")
def test_what_is_measured_already_is_skipped(tmp_path):
    read, copy = (tiny(SEQUENCE, FORWARD, peer) for peer in (READ, COPY))
    done = replace(result_of(read, Timing(ms=7.0, ms_spread=0.0, rounds=1)), threads=1)
    path = tmp_path / file_name()
    append(path, done.to_line())
    # Ceilings need nothing of robustloss or of other libraries, so they try the machinery in seconds.
    run_tiny("sequence_logps", "plain and float32-forward-", tmp_path)
    first, second = load(path)
    assert first == done
    assert (second.peer, second.commit) == (copy.peer, done.commit)
    assert second.ms > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite would measure the GPU, where it takes longer")
def test_ours_is_measured_in_turn_with_each_peer(tmp_path):
    run_tiny("coupled_losses", "KLDPO and tau and not compile", tmp_path)
    ours, eager = load(tmp_path / file_name())
    assert (ours.peer, ours.ours_ms, eager.peer) == (OURS, None, "eager torch")
    assert eager.ours_ms > 0
    assert eager.ratio_to(ours) == eager.ms / eager.ours_ms


def test_a_one_sided_difference_is_measured_where_it_has_a_step():
    cases = SUITES["training_step"].cases(torch.device("cuda"))
    assert {case.dtype for case in cases if "one-sided" in case.peer} == {"float32"}
    assert {case.dtype for case in cases if "one-sided" not in case.peer} == {"float32", "bfloat16"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_ceilings_come_first_and_what_must_compile_last(suite, device):
    every = suite.cases(torch.device(device))
    assert len(set(map(str, every))) == len(every)
    compiled = [case.is_compiled for case in every]
    assert compiled == sorted(compiled)
    seen = set()
    for case in every:
        place = (*case.shape.values(), case.dtype, case.pass_name)
        assert case.is_ceiling or place in seen or not suite.ceilings(case.pass_name)
        seen.add(place)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_a_case_travels_to_the_process_that_measures_memory(suite):
    case = suite.cases(CPU)[0]
    assert str(pickle.loads(pickle.dumps(case))) == str(case)


def test_work_is_a_read_and_a_copy_and_the_products():
    logits = 2 * 3 * 50 * 4
    assert SEQUENCE.work(Case(SEQUENCE, SHAPE, "float32", FORWARD, READ)) == (logits, "GB/s")
    assert SEQUENCE.work(Case(SEQUENCE, SHAPE, "float32", TRAINING, COPY)) == (2 * logits, "GB/s")
    assert SEQUENCE.work(Case(SEQUENCE, SHAPE, "float32", TRAINING, OURS)) == (3 * logits, "GB/s")
    product = 2 * 2 * 3 * 50 * 4
    with_head = SHAPE | {"H": 4}
    assert LINEAR.work(Case(LINEAR, with_head, "float32", KNOWN, OURS)) == (3 * product, "TFLOP/s")
    # Two of the six tokens have no room to wait in the weight's gradient.
    twice = 2 * 2 * 50 * 4
    assert LINEAR.work(Case(LINEAR, with_head, "float32", TRAINING, PRODUCTS)) == (3 * product + twice, "TFLOP/s")


def test_small_calls_have_no_rate_and_are_held_against_their_ceiling_by_time():
    ceiling = result_of(tiny(SOFT_SORT, L2, SORT), Timing(ms=1.0, ms_spread=0.0, rounds=1))
    slower = result_of(tiny(SOFT_SORT, L2, OURS), Timing(ms=4.0, ms_spread=0.0, rounds=1), ceilings=[ceiling])
    assert (slower.rate, slower.rate_unit, slower.ceiling, slower.fraction_of_ceiling) == (None, None, SORT, 0.25)


def test_launches_and_the_memory_of_small_calls_are_not_measured_on_a_cpu():
    for suite, pass_name in ((SOFT_SORT, L2), (COUPLED, next(iter(coupled_losses.PASSES)))):
        case = tiny(suite, pass_name, OURS)
        assert launches(case, Problem(list, []), CPU) is None
        assert memory_on_cpu(case) is None
        assert result_of(case).launches is None


# ---- agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pass_name", [FORWARD, TRAINING])
def test_a_contestant_that_computes_something_else_is_absent(monkeypatch, pass_name):
    wrong = Peer(lambda: lambda logits, labels: logits.logsumexp(-1).sum(-1))
    monkeypatch.setitem(SEQUENCE.peers, "wrong", wrong)
    with pytest.raises(Absent, match="differs from the reference"):
        SEQUENCE.check_agreement(tiny(SEQUENCE, pass_name, "wrong"), CPU)


def test_a_known_gradient_may_come_from_a_sum_only(monkeypatch):
    head = LINEAR.peers["linear + F.cross_entropy"].load()
    monkeypatch.setitem(LINEAR.peers, "sum only", Peer(lambda: Head(loss=head.loss)))
    LINEAR.check_agreement(tiny(LINEAR, KNOWN, "sum only"), CPU)
    with pytest.raises(Absent, match="only their sum"):
        LINEAR.check_agreement(tiny(LINEAR, TRAINING, "sum only"), CPU)


@pytest.mark.parametrize("pass_name", ["KLDPO(tau)", "KLDPO(rho)", "DPO", "AOT paired", "AOT unpaired"])
def test_eager_losses_are_robustlosses(pass_name):
    COUPLED.check_agreement(tiny(COUPLED, f"{pass_name}, {TRAINING}", OURS), CPU)


@pytest.mark.parametrize("pass_name", coupled_losses.PASSES)
def test_a_loss_with_a_wrong_gradient_is_absent(monkeypatch, pass_name):
    def value_alone(loss):
        # The right value with half the gradient.
        def function(*arguments):
            value = loss.eager(*arguments)
            return value / 2 + value.detach() / 2

        return function

    monkeypatch.setitem(COUPLED.peers, "wrong", Peer(lambda: value_alone))
    with pytest.raises(Absent, match=r"differs from the reference by 50\.0%"):
        COUPLED.check_agreement(tiny(COUPLED, pass_name, "wrong"), CPU)


def test_a_name_that_robustloss_lacks_is_absent(monkeypatch):
    loss = coupled_losses.Loss(coupled_losses._dpo("NoSuchAggregate"), coupled_losses.aot_paired)
    monkeypatch.setitem(coupled_losses.PASSES, "no such loss", loss)
    with pytest.raises(Absent, match="no NoSuchAggregate"):
        COUPLED.check_agreement(tiny(COUPLED, "no such loss", OURS), CPU)


def test_the_hard_sort_is_no_soft_one_unless_nothing_is_pooled(monkeypatch):
    monkeypatch.setitem(
        SOFT_SORT.peers, "hard", Peer(lambda: lambda values, regularization, strength: values.sort()[0])
    )
    SOFT_SORT.check_agreement(tiny(SOFT_SORT, "l2, strength 0.01, forward+backward", "hard"), CPU)
    with pytest.raises(Absent, match="differs from the reference"):
        SOFT_SORT.check_agreement(tiny(SOFT_SORT, "l2, strength 100, forward+backward", "hard"), CPU)


@pytest.mark.parametrize("regularization", ["l2", "kl"])
def test_the_reference_pools_two_values_further_apart_than_the_strength_allows(regularization):
    near, far = torch.tensor([0.0, 0.4]).double(), torch.tensor([0.0, 3.0]).double()
    # Ranks over the strength are 0.5 apart.
    assert torch.equal(soft_sort.by_minimax(near, regularization, 2.0), near)
    pooled = soft_sort.by_minimax(far, regularization, 2.0)
    # Pooled values keep their sum (l2), or that of exp(-value) (kl), and are as far apart as their ranks.
    weigh = (lambda values: values.sum()) if regularization == "l2" else (lambda values: (-values).exp().sum())
    torch.testing.assert_close(weigh(pooled), weigh(far))
    torch.testing.assert_close(pooled.diff(), torch.tensor([0.5]).double())


# ---- timing ---------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only in `run`, and a stand-in for pytest-benchmark's fixture that goes by it."""

    def __init__(self, seconds):
        self.now, self.seconds, self.calls, self.refills = 0.0, seconds, 0, 0

    def run(self):
        self.now += self.seconds
        self.calls += 1
        return []

    def refill(self):
        self.refills += 1

    def pedantic(self, function, *, setup, iterations, rounds, warmup_rounds):
        assert iterations == 1
        self.rounds, data, before = rounds, [], self.calls
        for _ in range(rounds):
            if setup:
                setup()
            start = self.now
            function()
            data.append(self.now - start)
        self.calls_of_a_round = (self.calls - before) / rounds
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


def timed(monkeypatch, seconds, refilled=False):
    clock = Clock(seconds)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    timing = timing_of_calls(Problem(clock.run, [], clock.refill if refilled else None), clock, CPU, 1.5)
    assert timing.ms == pytest.approx(1e3 * seconds)
    return clock


def test_a_fast_call_is_repeated_within_a_round(monkeypatch):
    seconds = 2.0**-13  # whose sums are exact
    clock = timed(monkeypatch, seconds)
    assert clock.calls_of_a_round == int(measure.ROUND_SECONDS / seconds)
    assert clock.rounds == measure.MOST_REPEATED_ROUNDS


def test_a_call_that_overwrites_its_input_is_refilled_each_time(monkeypatch):
    clock = timed(monkeypatch, 2.0**-13, refilled=True)
    assert (clock.calls_of_a_round, clock.rounds) == (1, measure.MOST_ROUNDS)
    assert clock.refills == clock.calls


def test_a_slow_call_is_made_as_often_as_there_is_time(monkeypatch):
    clock = timed(monkeypatch, 0.5)
    assert (clock.calls_of_a_round, clock.rounds, clock.calls) == (1, 3, 4)


def test_ours_has_its_rounds_between_those_of_another_and_none_of_its_time(monkeypatch):
    clock = Clock(0.25)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    turns = []

    def ours():
        turns.append(clock.calls)
        clock.now += 2.0**-4
        return []

    timing = timing_of_calls(Problem(clock.run, []), clock, CPU, 1.5, Problem(ours, []))
    assert (timing.ms, timing.ours_ms, timing.rounds) == (250, 62.5, 7)
    assert turns[-6:] == [1, 2, 3, 4, 5, 6]  # one call before each of the six rounds

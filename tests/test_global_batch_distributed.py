"""GlobalBatch in two processes, under every wrapper, against one giant batch in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from global_batch_cases import LOSSES, STEPS, distance, train_giant
from global_batch_worker import DTYPES, cells

from robustloss import KLDPOLoss

pytestmark = pytest.mark.distributed
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes have written, the first's first."""
    folder = tmp_path_factory.mktemp("global_batch")
    worker = Path(__file__).with_name("global_batch_worker.py")
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker, folder],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@cache
def giant(loss: str, dtype: str) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_giant(loss, DTYPES[dtype])


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: " ".join(map(str, cell)))
def test_the_mean_of_the_processes_gradients_is_the_giant_batchs(results, cell):
    expected, tolerance = giant(*cell[:2]), TOLERANCE[cell[1]]
    for process in results:
        got = process["cells"][" ".join(map(str, cell))]
        for name in ("values", "gradients", "parameters", "state"):
            assert distance(got[name], expected[name]) <= tolerance, name
        # Differences of means, of which float32 leaves fewer digits.
        assert distance(got["metrics"], expected["metrics"]) <= (1e-12 if cell[1] == "float64" else 1e-4)


def test_both_processes_have_the_same_value_metrics_and_state_to_the_bit(results):
    for cell in results[0]["cells"]:
        for name in ("values", "metrics", "parameters", "state"):
            # As text, in which NaN equals NaN.
            assert json.dumps(results[0]["cells"][cell][name]) == json.dumps(results[1]["cells"][cell][name]), cell


@pytest.mark.parametrize("loss", LOSSES)
def test_without_it_the_gradients_are_those_of_another_loss(results, loss):
    assert distance(results[0]["alone"][loss]["gradients"], giant(loss, "float64")["gradients"]) > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_forward_is_the_loss_of_all_processes_samples(results, loss, dtype):
    expected = giant(loss, dtype)
    ways = [process["forward"][dtype] for process in results]
    if dtype == "float64":
        ways += [process["in a group"] for process in results]
    for got in ways:
        assert got[loss]["value"] == pytest.approx(expected["values"][0], rel=TOLERANCE[dtype])
        assert distance(got[loss]["gradient"], expected["gradients"][0]) <= TOLERANCE[dtype]
        assert distance(got[loss]["metrics"], expected["metrics"][0]) <= (1e-12 if dtype == "float64" else 1e-4)


@pytest.mark.parametrize(
    ("case", "backward"), [("not finite, two passes", 0), ("not finite, state", 0), ("not finite, one pass", 2)]
)
def test_what_is_not_finite_in_one_process_is_told_in_both(results, case, backward):
    for process in results:
        failure = process["failures"][case]
        assert failure["type"] == "NonFiniteError"
        assert failure["positions"] == [[1, 1, 2]]
        assert failure["message"].startswith("policy_rejected_logps not finite at (process, microbatch, row) (1, 1, 2)")
        assert failure["backward"] == backward
    assert results[0]["failures"]["not finite, state"]["batches"] == 0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("microbatches", "the same number of microbatches, at least one, got [1, 2]"),
        ("microbatches, one pass", "the same number of microbatches, at least one, got [1, 2]"),
        ("no microbatches in one", "the same number of microbatches, at least one, got [0, 1]"),
        ("arguments", "the same arguments of the same dtypes"),
        ("dtypes", "the same arguments of the same dtypes"),
        ("forward", "the same arguments of the same dtypes"),
    ],
)
def test_processes_that_disagree_all_learn_of_it(results, case, message):
    for process in results:
        failure = process["failures"][case]
        assert failure["type"] == "ValueError"
        assert message in failure["message"]
        assert failure.get("backward", 0) == 0


@pytest.mark.parametrize(
    ("case", "where", "error", "message"),
    [
        ("unknown", 0, "ValueError", "logps_fn must give arguments of the loss (policy_chosen_logps,"),
        (
            "shape",
            0,
            "TypeError",
            "ref_chosen_logps must be a tensor [B] of numbers or bools, got torch.float32 (4, 1)",
        ),
        ("length", 0, "ValueError", "the arguments must be of one length, got {'policy_chosen_logps': 4,"),
        ("no tensor", 0, "TypeError", "ref_chosen_logps must be a tensor [B] of numbers or bools, got list"),
        ("masses", 1, "ValueError", "masses must be 1 numbers >= 0, one a microbatch, got [4, 4]"),
    ],
)
def test_an_error_of_one_process_ends_the_other_too(results, case, where, error, message):
    own, other = results[where]["failures"][case], results[1 - where]["failures"][case]
    assert own["type"] == error
    assert own["message"].startswith(message)
    assert other["type"] == "ValueError"
    assert other["message"] == f"processes [{where}] gave the loss what it cannot take; their own errors say why"


@pytest.mark.parametrize(("case", "backward"), [("overflow, two passes", 0), ("overflow, one pass", 2)])
def test_finite_samples_that_overflow_the_loss_in_one_process_end_both(results, case, backward):
    told = [process["failures"][case] for process in results]
    assert [failure["backward"] for failure in told] == [backward] * 2
    assert told[1]["type"] == "NonFiniteError"
    assert "too large" in told[1]["message"]
    # In one pass only the process itself has seen the sample.
    assert told[0]["type"] == ("FloatingPointError" if backward else "NonFiniteError")


def test_masses_that_are_not_the_samples_are_told_in_both(results):
    for process in results:
        assert process["failures"]["wrong masses"]["message"].startswith("masses add up to 9, but the samples to 8")


def test_a_step_without_any_sample_still_calls_every_backward(results):
    for process in results:
        assert process["failures"]["nobody has samples"] == {"type": None, "backward": 2}


def test_a_second_derivative_is_refused_rather_than_wrong(results):
    for process in results:
        assert process["failures"]["second derivative"]["type"] == "RuntimeError"


def test_without_gradients_forward_gives_the_value_and_evaluation_learns_nothing(results):
    margins = torch.tensor([0.0, 0.0, 0.0, -1.0, -1.0, -1.0])
    zeros = torch.zeros(6)
    expected = KLDPOLoss(0.5, tau=0.2)(margins, zeros, zeros, zeros).item()
    for process in results:
        assert process["failures"]["value without gradient"] == pytest.approx(expected, rel=1e-6)
        assert process["failures"]["batches in evaluation"] == 0


@pytest.mark.parametrize("loss", ["kldpo tau", "dpo weighted"])  # two passes, one pass
def test_without_synchronisation_gradients_are_averaged_once_a_step_and_are_the_same(results, loss):
    expected = giant(loss, "float64")
    for process in results:
        for way, averages in (("always", 2), ("once", 1)):
            got = process["synchronizations"][f"{loss} {way}"]
            assert len(got["averaged"]) == averages * STEPS
            for name in ("values", "gradients", "parameters"):
                assert distance(got[name], expected[name]) <= 1e-12, name


def test_a_step_exchanges_twice_however_many_its_microbatches(results):
    for process in results:
        assert process["exchanges"] == {"two passes": 2, "one pass": 3}  # the third: how many samples there are

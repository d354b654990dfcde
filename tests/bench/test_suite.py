"""The benchmark suite on tiny shapes: what is measured, once, and against whom."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.cases import (
    COPY,
    FORWARD,
    KNOWN,
    LINEAR,
    PEERS,
    READ,
    SEQUENCE,
    TINY_SHAPES,
    TRAINING,
    Case,
    Shape,
    cases,
    check_agreement,
)
from bench.measure import Timing, result_of
from bench.peers import OURS, Absent, Head, Peer
from bench.results import append, file_name, load

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHAPE = Shape(2, 3, 50)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite would measure the GPU, where it takes longer")
def test_what_is_measured_already_is_skipped(tmp_path):
    read, copy = (Case(SEQUENCE, TINY_SHAPES[SEQUENCE][0], "float32", FORWARD, peer) for peer in (READ, COPY))
    done = replace(result_of(read, Timing(ms=7.0, ms_spread=0.0, rounds=1)), threads=1)
    path = tmp_path / file_name()
    append(path, done)
    # Ceilings need nothing of robustloss or of other libraries, so they try the machinery in seconds.
    command = [sys.executable, "-m", "pytest", "bench/test_sequence_logps.py", "-k", "plain and float32-forward-"]
    subprocess.run(
        [*command, "--tiny", "-p", "no:cacheprovider", "--results", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    first, second = load(path)
    assert first == done
    assert (second.peer, second.commit) == (copy.peer, done.commit)
    assert second.ms > 0


def test_ceilings_come_first_and_what_must_compile_last():
    for op in (SEQUENCE, LINEAR):
        every = cases(op, CPU)
        assert len(set(map(str, every))) == len(every)
        compiled = [not case.is_ceiling and case.contestant.compiled for case in every]
        assert compiled == sorted(compiled)
        seen = set()
        for case in every:
            place = (case.shape, case.dtype, case.pass_name)
            assert case.is_ceiling or place in seen
            seen.add(place)


def test_work_is_a_read_and_a_copy_and_the_products():
    logits = SHAPE.tokens * SHAPE.V * 4
    assert Case(SEQUENCE, SHAPE, "float32", FORWARD, READ).work() == (logits, "GB/s")
    assert Case(SEQUENCE, SHAPE, "float32", TRAINING, COPY).work() == (2 * logits, "GB/s")
    assert Case(SEQUENCE, SHAPE, "float32", TRAINING, OURS).work() == (3 * logits, "GB/s")
    product = 2 * SHAPE.tokens * SHAPE.V * 7
    with_head = Shape(SHAPE.B, SHAPE.T, SHAPE.V, 7)
    assert Case(LINEAR, with_head, "float32", KNOWN, OURS).work() == (3 * product, "TFLOP/s")


@pytest.mark.parametrize("pass_name", [FORWARD, TRAINING])
def test_a_contestant_that_computes_something_else_is_absent(monkeypatch, pass_name):
    wrong = Peer(lambda: lambda logits, labels: logits.logsumexp(-1).sum(-1))
    monkeypatch.setitem(PEERS[SEQUENCE], "wrong", wrong)
    with pytest.raises(Absent, match="differs from eager"):
        check_agreement(Case(SEQUENCE, SHAPE, "float32", pass_name, "wrong"), CPU)


def test_a_known_gradient_may_come_from_a_sum_only(monkeypatch):
    head = PEERS[LINEAR]["linear + F.cross_entropy"].load()
    monkeypatch.setitem(PEERS[LINEAR], "sum only", Peer(lambda: Head(loss=head.loss)))
    check_agreement(Case(LINEAR, SHAPE, "float32", KNOWN, "sum only"), CPU)
    with pytest.raises(Absent, match="only their sum"):
        check_agreement(Case(LINEAR, SHAPE, "float32", TRAINING, "sum only"), CPU)

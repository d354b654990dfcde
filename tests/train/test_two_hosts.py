"""Two launches of one process each, as on two hosts, against two processes on one; and a process that is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from robustloss.train.config import InputError
from robustloss.train.distributed import LostProcessError, telling_lost_processes, timeout

TIMEOUT = 180  # seconds
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# Two network namespaces with a cable between them. Needs no privileges where users may make namespaces of their own.
TWO_HOSTS = """
set -e
ip link set lo up
unshare --net sleep 600 & other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link add host0 type veth peer name host1 netns $other
ip address add 10.0.0.1/24 dev host0
ip link set host0 up
on_other="nsenter --target $other --net"
$on_other ip link set lo up
$on_other ip address add 10.0.0.2/24 dev host1
$on_other ip link set host1 up
GLOO_SOCKET_IFNAME=host1 $on_other "$0" "$@" --node_rank 1 {program} & second=$!
GLOO_SOCKET_IFNAME=host0 "$0" "$@" --node_rank 0 {program}
wait $second
"""


def namespaces_work() -> bool:
    if not all(map(shutil.which, ("unshare", "nsenter", "ip", "bash"))):
        return False
    trial = ["unshare", "--map-root-user", "--net", "ip", "link", "add", "a", "type", "veth", "peer", "name", "b"]
    return subprocess.run(trial, capture_output=True).returncode == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def program(tiny, run_dir: Path, **changes) -> list[str]:
    settings = tiny.settings(run_dir, zero_stage=2, loss={"name": "kldpo", "tau": 1.0}, log_every=1, **changes)
    config = run_dir.with_suffix(".yaml")
    config.write_text(json.dumps(settings))
    return [str(Path(__file__).with_name("cli_without_report.py")), "train", "--config", str(config)]


def start(arguments: list[str], **changes: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, env=environment(**changes), **pipes)


def start_two_hosts(arguments: list[str]) -> list[subprocess.Popen]:
    launch = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--master_port", str(free_port())]
    if namespaces_work():
        script = TWO_HOSTS.replace("{program}", " ".join(arguments))
        return [start(["unshare", "-r", "-n", "bash", "-c", script, *launch, "--master_addr", "10.0.0.1"])]
    launch += ["--master_addr", "127.0.0.1"]
    return [start([*launch, "--node_rank", str(rank), *arguments]) for rank in range(2)]


def start_two_processes(arguments: list[str]) -> list[subprocess.Popen]:
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start([sys.executable, *arguments], RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


def train_rows(run_dir: Path) -> list[dict]:
    measured = ("seconds", "tokens_per_second", "peak_memory_bytes")
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        {key: value for key, value in row.items() if key not in measured} for row in rows if row["split"] == "train"
    ]


@pytest.mark.distributed
def test_two_hosts_train_what_one_does(tiny, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for launch in [*start_two_processes(program(tiny, one)), *start_two_hosts(program(tiny, two))]:
        _, told = launch.communicate(timeout=TIMEOUT)
        assert launch.returncode == 0, told
    assert weights(two) == weights(one)
    assert len(train_rows(one)) == 4
    assert train_rows(two) == train_rows(one)


@pytest.mark.distributed
def test_a_lost_process_is_told_in_one_line(tiny, tmp_path):
    run_dir = tmp_path / "run"
    first, second = start_two_processes(program(tiny, run_dir, max_steps=5000, save_every=2, keep_checkpoints=1))
    deadline = time.monotonic() + TIMEOUT
    while len(train_rows(run_dir)) < 5:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)  # the worse of the two: what the processes met at goes with it
    _, told = second.communicate(timeout=TIMEOUT)
    first.communicate()
    assert second.returncode == 3, told
    lines = [line for line in told.splitlines() if "lost" in line]
    assert len(lines) == 1
    assert lines[0].startswith("robustloss: error: [process 1] a process was lost (rank unknown: connection ")
    assert lines[0].endswith("the same command goes on from the last checkpoint")
    assert "Traceback" not in told
    assert "frame #" not in told


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:679."), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), True),
        (dist.DistBackendError("ncclRemoteError: a network error or a remote process exiting prematurely."), True),
        (dist.DistBackendError("ncclInvalidUsage: Duplicate GPU detected"), False),
        (RuntimeError("a download timed out"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_what_another_process_left_behind_is_told_as_a_loss(error, lost):
    with pytest.raises(RuntimeError) as raised, telling_lost_processes():
        raise error
    assert isinstance(raised.value, LostProcessError) == lost
    assert (raised.value.__cause__ if lost else raised.value) is error


def test_the_timeout_is_ten_minutes_or_what_the_environment_says(monkeypatch):
    monkeypatch.delenv("ROBUSTLOSS_TIMEOUT", raising=False)
    assert timeout().total_seconds() == 600
    monkeypatch.setenv("ROBUSTLOSS_TIMEOUT", "90.5")
    assert timeout().total_seconds() == 90.5
    for wrong in ("0", "-1", "soon", "nan", "inf"):
        monkeypatch.setenv("ROBUSTLOSS_TIMEOUT", wrong)
        with pytest.raises(InputError, match=f"ROBUSTLOSS_TIMEOUT must be a number of seconds > 0, got '{wrong}'"):
            timeout()

"""Processes that share the work, on one machine or several: what comes of one that is slow, and of one that is lost."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

import bnfold
from bnfold.backends.onnx.recalibration import stage
from tests.recalibration.test_calibration import ROOT, agree, statistics
from tests.recalibration.test_resume import X, residual

# Batches of unequal sizes; at the fifth of its own, a process does what the environment says.
DATA = """
import os, signal, time
import numpy as np

def batches():
    x = np.load("x.npy")
    for i in range(13):
        if i == 7 and os.environ.get("RANK") == os.environ.get("WHO"):
            exec(os.environ["DOES"])
        yield x[20 * i : 20 * i + 5 + i]
"""
SHARED = np.concatenate([X[20 * i : 20 * i + 5 + i] for i in range(13)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(residual(), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "data.py").write_text(DATA)
    return tmp_path


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def started(folder: Path, arguments: list[str], on: Sequence[str] = (), **env: object) -> subprocess.Popen[str]:
    line = [*on, sys.executable, "-m", *arguments, "recalibrate", "m.onnx", "--data", "data.py:batches", "-o", "out.onnx", "-q"]
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in env.items()}
    return subprocess.Popen([*line, "--timeout", "8", "--json"], cwd=folder, env=given, stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize(("lost", "does"), [(1, "STOP"), (0, "KILL")])
def test_a_lost_process_is_named_within_the_timeout(folder: Path, lost: int, does: str) -> None:
    """One of two, which stops, or is killed: the other ends, says which it was, and leaves nothing behind."""
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), "WHO": lost}
    does = f"time.sleep(1); os.kill(os.getpid(), signal.SIG{does})"
    both = [started(folder, ["bnfold"], RANK=rank, DOES=does, **shared) for rank in (0, 1)]
    try:
        _, error = both[1 - lost].communicate(timeout=100)
    finally:
        for each in both:
            each.kill()
            each.communicate()
    assert both[1 - lost].returncode == 5
    assert error.count("\n") == 1
    assert f"error: process {lost} on {socket.gethostname()} has stopped" in error
    assert "or said nothing for 8 s: look at its message and its machine; run again, with --resume" in error
    assert not (folder / "out.onnx").exists()


@pytest.fixture(params=["one machine", "two networks"])
def hosts(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, list[str], dict[str, str]]]]:
    """Two hosts: the address of the first, what starts a command on each, and what it needs there.

    In two networks each has an interface of its own, and a cable between them; making them takes a superuser on Linux.
    """
    if request.param == "one machine":
        yield [("127.0.0.1", [], {})] * 2
        return
    names = [f"bnfold-{os.getpid()}-{i}" for i in (0, 1)]
    with contextlib.ExitStack() as made:
        try:
            for name in names:
                ip("netns", "add", name)
                made.callback(ip, "netns", "del", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for i, name in enumerate(names):
                ip("-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", "cable")
                for interface in ("lo", "cable"):
                    ip("-n", name, "link", "set", interface, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no networks can be made here: {error}")
        yield [("10.77.0.1", ["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": "cable"}) for name in names]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def nodes(folder: Path, hosts: list[tuple[str, list[str], dict[str, str]]], **env: object) -> list[tuple[int, str, str]]:
    """Status, output and errors of two launches of torchrun, one on each host, of two processes and of one."""
    where = ["--nnodes", "2", "--master-addr", hosts[0][0], "--master-port", str(port())]
    launches = [
        started(
            folder,
            ["torch.distributed.run", *where, "--node-rank", str(i), "--nproc-per-node", str(2 - i), "-m", "bnfold"],
            on=on,
            **needs,
            **env,
        )
        for i, (_, on, needs) in enumerate(hosts)
    ]
    said = [each.communicate(timeout=200) for each in launches]
    return [(each.returncode, *texts) for each, texts in zip(launches, said, strict=True)]


@pytest.mark.slow
def test_two_nodes_give_the_result_of_one_process(folder: Path, hosts: Any) -> None:
    """With uneven data, and a straggler."""
    (status, said, _), (other, _, _) = nodes(folder, hosts, WHO=2, DOES="time.sleep(2)")
    assert (status, other) == (0, 0)
    assert json.loads(said)["samples"] == len(SHARED)
    agree(statistics(onnx.load(folder / "out.onnx")), statistics(bnfold.recalibrate(residual(), SHARED)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_node_that_leaves_is_named(folder: Path, hosts: Any, how: str) -> None:
    if how == "cut off" and not hosts[0][1]:
        pytest.skip("on one machine there is no cable")
    does = "os.system('ip link set cable down')" if how == "cut off" else "os.kill(os.getpid(), signal.SIGKILL)"
    start = time.monotonic()
    (status, _, error), (other, _, _) = nodes(folder, hosts, WHO=2, DOES=f"time.sleep(3); {does}")
    assert status != 0
    assert other != 0
    assert f"process 2 on {socket.gethostname()} has stopped" in error
    assert time.monotonic() - start < 150
    assert not (folder / "out.onnx").exists()


def test_what_breaks_in_mid_run_is_placed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = stage._Session.__call__, 0

    def breaking(self: Any, feeds: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Fail("[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Conv node")
        return run(self, feeds)

    monkeypatch.setattr(stage._Session, "__call__", breaking)
    with pytest.raises(bnfold.DataError, match=r"micro-batch 5: ONNX Runtime can't run the model on x \(30, 3, 6, 6\): Non-zero status"):
        bnfold.recalibrate(residual(), X, batch_size=30)
    calls = 0
    monkeypatch.setattr(stage, "run_failed", lambda error, *_: bnfold.DeviceError(f"execution provider cuda failed: {error}"))
    with pytest.raises(bnfold.DeviceError, match=r"^micro-batch 5: execution provider cuda failed: "):
        bnfold.recalibrate(residual(), X, batch_size=30)
    broken = started(folder, ["bnfold"], RANK=0, WHO=0, DOES="raise OSError('shard 7 is gone')")
    _, error = broken.communicate(timeout=100)
    assert broken.returncode == 3
    assert error == "bnfold: error: data.py:batches raised OSError instead of its batch 8: shard 7 is gone; see to it, and run again\n"

"""bnfold in somebody's program: several threads at once, forked processes, and settings of the whole process that come back."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import bnfold
from bnfold import capture
from bnfold.capture import Switch


@pytest.fixture(scope="module")
def module() -> Any:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten())
    net(torch.randn(8, 1, 8, 8))  # statistics of its own
    return net.eval()


def fused_onnx(model: onnx.ModelProto) -> tuple[str, bytes]:
    fused, report = bnfold.fuse(model)
    assert report.verify is not None
    return report.verify.verdict, fused.SerializeToString()


def fused_torch(net: Any) -> tuple[str, bytes]:
    import torch

    fused, report = bnfold.fuse(net, example=torch.ones(2, 1, 8, 8))
    assert report.verify is not None
    return report.verify.verdict, fused[0].weight.detach().numpy().tobytes()


def test_threads_that_fuse_at_once_get_what_each_would_get_alone(module: Any, digits: Path) -> None:
    proto = onnx.load(digits)
    small = onnx.load(digits)
    small.graph.initializer[0].raw_data = (np.frombuffer(small.graph.initializer[0].raw_data, np.float32) * 2).tobytes()
    work: list[Callable[[], tuple[str, bytes]]] = [
        lambda: fused_onnx(proto),
        lambda: fused_torch(module),
        lambda: fused_onnx(small),
        lambda: fused_torch(module),
    ]
    alone = [each() for each in work]
    assert {verdict for verdict, _ in alone} == {"equivalent"}
    assert alone[0] != alone[2]
    before = process_wide()
    with ThreadPoolExecutor(len(work)) as pool:
        together = [each.result() for each in [pool.submit(each) for each in work]]
    assert together == alone
    assert process_wide() == before


def process_wide() -> list[Any]:
    """What must be as it was, once nothing runs any more."""
    import torch

    flags = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_rng_state().tolist()]
    descriptors = [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in (1, 2)]
    return [*flags, sys.stdout, sys.stderr, logging.root.manager.disable, list(warnings.filters), descriptors]


def test_a_switch_goes_back_with_the_last_thread() -> None:
    seen: list[str] = []
    switch = Switch(lambda: seen.append("on"), lambda before: seen.append("off"))
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with switch():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with switch():
        thread.start()
        inside.wait()
        with switch():
            pass
    assert seen == ["on"]
    leave.set()
    thread.join()
    assert seen == ["on", "off"]


@pytest.mark.parametrize("alone", [False, True])
def test_a_switch_is_back_in_a_process_forked_by_another_thread(alone: bool) -> None:
    state = ["before"]

    def on() -> str:
        old, state[0] = state[0], "changed"
        return old

    switch = Switch(on, lambda before: state.__setitem__(0, before), alone=alone)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with switch():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    child = os.fork()
    if not child:
        with switch():
            good = state[0] == "changed"
        os._exit(0 if good and state[0] == "before" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert state[0] == "changed"
    leave.set()
    thread.join()
    assert state[0] == "before"


def test_other_threads_are_heard_while_a_model_is_read(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from bnfold.capture import quiet

    with quiet():
        print("the model's code")
        thread = threading.Thread(target=print, args=("somebody else",))
        thread.start()
        thread.join()
    assert capsys.readouterr().out == "somebody else\n"


def in_a_child(module: Any, digits: Path, answers: Any) -> None:
    if module is not None:
        import torch

        torch.set_num_threads(1)  # PyTorch's own threads don't outlive a fork: without this a convolution alone hangs
    with capture.overhearing() as hearing:
        os.write(1, b"heard in the child")
    answers.put((hearing.text, fused_onnx(onnx.load(digits))[0], None if module is None else fused_torch(module)[0]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_may_fork_after_the_first_use(module: Any, digits: Path) -> None:
    assert (fused_onnx(onnx.load(digits))[0], fused_torch(module)[0]) == ("equivalent", "equivalent")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with capture.overhearing() as hearing:
        os.write(1, b"heard in the parent")
        child = context.Process(target=in_a_child, args=(module, digits, answers), daemon=True)
    child.start()
    assert answers.get(timeout=300) == ("heard in the child", "equivalent", "equivalent")
    child.join()
    assert (child.exitcode, hearing.text) == (0, "heard in the parent")

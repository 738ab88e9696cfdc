"""What is made before it is asked for comes in order, and ends when nobody asks any more."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from bnfold.data import InputSpec, as_batches
from bnfold.data.prefetch import AHEAD, WORKERS, in_pool, read_ahead

X = [InputSpec("x", np.dtype(np.float32), ("n", 3))]
A = np.arange(60, dtype=np.float32).reshape(20, 3)


def threads() -> list[str]:
    """Those that make things ahead; the pool that sums moments stays as long as the process."""
    return [t.name for t in threading.enumerate() if t.name.startswith(("bnfold-ahead", "bnfold-images"))]


def settled(value, call) -> bool:
    for _ in range(200):
        if call() == value:
            return True
        time.sleep(0.01)
    return False


def test_items_come_in_order_and_the_thread_ends():
    assert list(read_ahead(range(100))) == list(range(100))
    assert list(read_ahead([])) == []
    assert settled([], threads)


def test_two_are_made_ahead_and_no_more():
    made = []
    items = read_ahead(made.append(i) or i for i in range(10))
    assert made == []  # nothing is done before the first is asked for
    for asked in range(1, 6):
        assert next(items) == asked - 1
        assert settled(asked + AHEAD, lambda: len(made))
        time.sleep(0.02)
        assert len(made) == asked + AHEAD


def test_an_error_comes_in_its_turn():
    def items():
        yield from range(5)
        raise ValueError("no disk")

    found = []
    with pytest.raises(ValueError, match="no disk"):
        gather(read_ahead(items()), found)
    assert found == list(range(5))
    found = []
    with pytest.raises(ValueError, match="no disk"):
        gather((made for _, made in in_pool(items(), lambda i: i)), found)
    assert found == list(range(5))
    with pytest.raises(KeyboardInterrupt):
        list(read_ahead(raising(KeyboardInterrupt())))


def gather(items, into):
    for item in items:
        into.append(item)  # one by one: what came before an error stays


def raising(error):
    yield 1
    raise error


def test_an_early_stop_ends_the_thread_and_closes_what_it_read():
    closed = threading.Event()

    def items():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    for item in read_ahead(items()):
        if item == 3:
            break
    assert closed.wait(5)
    assert settled([], threads)


def test_a_pool_works_in_order_and_not_too_far_ahead():
    begun = []

    def work(i):
        begun.append(i)
        time.sleep(0.001 * (i % 3))
        return i * i

    items = in_pool(range(50), work)
    assert next(items) == (0, 0)
    assert len(begun) <= 2 * WORKERS
    assert list(items) == [(i, i * i) for i in range(1, 50)]


def test_what_is_read_ahead():
    """Functions and loaders are; what lies in memory isn't, and a generator of the user's is read only as it is asked for."""
    read = []

    def parts():
        for i in range(0, 20, 2):
            read.append(i)
            yield A[i : i + 2]

    data = as_batches(parts, X)
    batches = iter(data)
    next(batches)
    assert settled(1 + AHEAD, lambda: len(read))
    assert threads()
    batches.close()
    assert settled([], threads)
    read.clear()
    next(iter(as_batches(parts(), X)))
    assert len(read) == 1
    for form in (A, [A[:10], A[10:]], list(A), (A, np.arange(20))):
        batches = iter(as_batches(form, X))
        next(batches)
        assert not threads()


def test_a_loader_may_use_its_buffer_again():
    def parts():
        buffer = np.zeros((3, 3), np.float32)
        for i in range(6):
            buffer[:] = i
            yield buffer

    for size in (None, 2, 5):
        found = np.concatenate([batch["x"] for batch in as_batches(parts, X, batch_size=size)])
        assert found[:, 0].tolist() == [i for i in range(6) for _ in range(3)]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a process")
def test_an_interrupt_is_not_swallowed():
    code = """
import sys, time, numpy as np
from bnfold.data import InputSpec, as_batches
def slow():
    yield np.ones((2, 3), "f")
    print("waiting", flush=True)
    time.sleep(60)
try:
    for batch in as_batches(slow, [InputSpec("x", np.dtype("f"), ("n", 3))]):
        pass
except KeyboardInterrupt:
    sys.exit(77)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 77
        assert time.monotonic() - start < 10

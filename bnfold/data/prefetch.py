"""Work done before its result is asked for, in the order in which it will be."""

from __future__ import annotations

import contextvars
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2
WORKERS = 4
PATIENCE = 1.0  # seconds that a consumer who stops early waits for what is being made


def read_ahead(items: Iterable[T], count: int = AHEAD) -> Iterator[T]:
    """The items, at most `count` of them made in a background thread before they are asked for.

    An error comes out in its turn, after the items before it. The thread starts with the first item asked for, and ends when there are no
    more or when this generator is closed.
    """
    made: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()  # (True, an item), or (False, an error or None at the end)
    slots, stop = threading.Semaphore(count), threading.Event()

    def work() -> None:
        iterator = iter(items)
        last: BaseException | None = None
        try:
            while True:
                slots.acquire()
                if stop.is_set():
                    break
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                made.put((True, item))
                del item
        except BaseException as error:  # of any kind: it is the consumer's
            last = error
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
            made.put((False, last))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="bnfold-ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                found, item = made.get(timeout=PATIENCE)
            except queue.Empty:  # a wait without end can't be interrupted on every platform
                continue
            if not found:
                if item is not None:
                    raise item
                return
            slots.release()
            yield item
            del item
    finally:
        stop.set()
        slots.release()
        thread.join(PATIENCE)


def in_pool(items: Iterable[T], work: Callable[[T], R], workers: int = WORKERS) -> Generator[tuple[T, R]]:
    """Each item and what `work` makes of it, in order; at most 2 x workers of them are begun before they are asked for.

    An error of the items themselves comes out after the results of those before it.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    failure: Exception | None = None
    iterator = iter(items)
    with ThreadPoolExecutor(workers, "bnfold-images") as pool:
        try:
            while True:
                try:
                    for item in itertools.islice(iterator, 2 * workers - len(waiting)):
                        waiting.append((item, pool.submit(work, item)))
                except Exception as error:
                    iterator, failure = iter(()), error
                if not waiting:
                    break
                first, result = waiting.popleft()
                yield first, result.result()
            if failure is not None:
                raise failure
        finally:
            for _, result in waiting:
                result.cancel()

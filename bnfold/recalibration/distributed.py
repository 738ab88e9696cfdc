"""Several processes that share the work, as `torchrun` starts them.

All of them run the same stages, each over its own share of the micro-batches, and put together what they measured before any goes on. What
goes from one to another is a few numbers per channel, so it goes through the host's memory, whichever device computes.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from datetime import timedelta
from typing import Any

from bnfold.capture import overhearing
from bnfold.errors import BnfoldError, DeviceError, UnsupportedError, UsageError
from bnfold.text import first_line, listed

TIMEOUT = 1800.0  # seconds that processes wait for each other, where nobody says how long; as PyTorch has it
SOONER = 0.8  # of the timeout, after which the first process says which one is lost, before the others give up waiting for it


class Processes:
    """rank: which of `size` processes this one is, from 0 on. Here it is alone."""

    rank = 0
    size = 1

    def gather(self, found: Any) -> list[Any]:
        """What each process gave, in the order of ranks, the same list for all. All must call it equally often."""
        return [found]


class Group(Processes):
    """A process group of torch.distributed (https://docs.pytorch.org/docs/stable/distributed.html): gloo, or nccl where the caller
    started one; made here from the environment that torchrun sets, unless there is one.

    timeout: seconds after which a process that says nothing is lost, and all others end; of a group that is made here.
    """

    def __init__(self, timeout: float) -> None:
        try:
            import torch.distributed as dist
        except ImportError:
            raise UnsupportedError("several processes need PyTorch to talk to each other: pip install torch onnxscript") from None
        self._dist = dist
        self._mine = not dist.is_initialized()
        if self._mine:
            try:
                dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
            except (RuntimeError, ValueError, OSError) as error:
                raise UsageError(f"the processes can't find each other: {first_line(error)}; start them with torchrun") from None
        self.rank, self.size, self._timeout = dist.get_rank(), dist.get_world_size(), timeout
        self._hosts = [f"process {number}" for number in range(self.size)]
        self._hosts = self.gather(f"process {self.rank} on {socket.gethostname()}")

    def gather(self, found: Any) -> list[Any]:
        every: list[Any] = [None] * self.size
        try:
            with overhearing():
                if self._mine:  # gloo alone can say who is missing
                    wait = timedelta(seconds=self._timeout * (1 if self.rank else SOONER))
                    self._dist.monitored_barrier(timeout=wait, wait_all_ranks=True)
                self._dist.all_gather_object(every, found)
        except RuntimeError as error:
            raise DeviceError(self._lost(str(error))) from None
        return every

    def _lost(self, said: str) -> str:
        """Which processes are lost, as far as this one knows."""
        named = re.search(r"Ranks? ([\d, ]+) failed to pass", said)
        which = [int(number) for number in re.findall(r"\d+", named[1])] if named else [0] if "monitoredBarrier" in said else []
        who = listed(self._hosts[number] for number in which) or "another process"
        waits = ", or waits for one that has," if which == [0] and not named else ""
        return (
            f"{who} has stopped{waits} or said nothing for {self._timeout:g} s: look at its message and its machine; run again, with "
            f"--resume to go on from what is measured, and with a longer --timeout where it was only slow"
        )

    def close(self) -> None:
        """Let the group go, where it was made here."""
        if self._mine:
            with suppress(RuntimeError):
                self._dist.destroy_process_group()


_group: Group | None = None


def processes(timeout: float = TIMEOUT) -> Processes:
    """The processes that this one belongs to: those that torchrun started, those of the caller's own process group, or itself.

    timeout: see `Group`; the first call decides.
    """
    global _group
    if _group is None and _several():
        _group = Group(timeout)
    return _group or Processes()


def rank() -> int:
    """This process's rank, before any group is made."""
    return int(os.environ.get("RANK", "0")) if _several() else 0


def local_rank() -> int:
    """Which of this machine's processes this one is; 0 where it is alone."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _several() else 0


def threads() -> int:
    """This process's share of the processor's cores, or 0 for all of them."""
    mine = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _several() else 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // mine) if mine > 1 else 0


def _several() -> bool:
    world = os.environ.get("WORLD_SIZE", "1")
    return world.isdigit() and int(world) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def close() -> None:
    """Let the group go that `processes` made."""
    global _group
    if _group is not None:
        _group.close()
        _group = None


def together(group: Processes, found: Any, failed: BnfoldError | None = None) -> list[Any]:
    """What each process gave; where one failed, all do: that one with its own error, the others with its message."""
    every = group.gather((found, failed))
    if failed is not None:
        raise failed
    for number, (_, error) in enumerate(every):
        if error is not None:
            error.args = (f"process {number}: {error}",)
            raise error
    return [each for each, _ in every]

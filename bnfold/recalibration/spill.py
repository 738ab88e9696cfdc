"""The values that wait between two stages of a network: in memory up to a budget, and past it in a temporary file.

A device that computes has memory of its own, in which values wait first, as far as there is room.

The file has no name (or goes with its last handle), so nothing is left behind however the process ends.
"""

from __future__ import annotations

import bisect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from bnfold.errors import UsageError


@dataclass(frozen=True)
class Slot:
    """An array that lies in a file. nbytes from offset on are its own. file: its name, where there are several."""

    offset: int
    nbytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: str = ""


class Store(Protocol):
    """Files in which values lie until they are needed, whether or not memory has room for them."""

    def write(self, batch: int, name: str, array: npt.NDArray[Any]) -> Slot: ...
    def read(self, slot: Slot) -> npt.NDArray[Any]: ...


class Frontier:
    """Arrays by (micro-batch, name). What doesn't fit into `memory_budget` bytes lies on disk.

    A value that isn't one of numpy's arrays lies on a device, which has room for `device_room` bytes: `room` is what is left of it.
    Micro-batches are visited in the same order stage after stage, so of all values the newest is the one that is needed last:
    it goes to disk, and nothing is ever moved. peak: the most bytes held at once, wherever they lay; spilled: bytes written to disk.
    store: where everything is written besides, and read again where memory has no room for it. Use as a context manager.
    """

    def __init__(self, memory_budget: int, device_room: int = 0, store: Store | None = None) -> None:
        self._budget = memory_budget
        self.room = 0 if store is not None else device_room  # what lies on a device can't be written
        self._store = store
        self._values: dict[int, dict[str, Any]] = {}
        self._file = _Scratch()
        self._in_memory = self._bytes = self.peak = self.spilled = 0

    def __enter__(self) -> Frontier:
        return self

    def __exit__(self, *_: object) -> None:
        self._values.clear()
        self._file.close()

    def names(self, batch: int) -> list[str]:
        return list(self._values.get(batch, ()))

    def put(self, batch: int, name: str, array: Any) -> None:
        """Hold an array, which nobody may write to from then on. array: numpy's, or one of a device, with its `nbytes`."""
        self._bytes += array.nbytes
        self.peak = max(self.peak, self._bytes)
        entry = array
        stored = None if self._store is None else self._store.write(batch, name, array)
        if not isinstance(array, np.ndarray):
            self.room -= array.nbytes
        elif self._in_memory + array.nbytes > self._budget and array.nbytes and not array.dtype.hasobject:
            entry = stored or self._file.write(array)
            self.spilled += array.nbytes
        else:
            self._in_memory += array.nbytes
        self._values.setdefault(batch, {})[name] = entry

    def found(self, values: Sequence[Mapping[str, Slot]]) -> None:
        """Take over what lies in the store already, by micro-batch and name."""
        self._values = {batch: dict(slots) for batch, slots in enumerate(values)}
        self._bytes = self.peak = sum(slot.nbytes for slots in values for slot in slots.values())

    def get(self, batch: int, name: str) -> Any:
        entry = self._values[batch][name]
        return (self._store or self._file).read(entry) if isinstance(entry, Slot) else entry

    def drop(self, batch: int, name: str) -> None:
        entry = self._values[batch].pop(name)
        self._bytes -= entry.nbytes
        if isinstance(entry, Slot):
            if self._store is None:
                self._file.free(entry)
        elif not isinstance(entry, np.ndarray):
            self.room += entry.nbytes
        else:
            self._in_memory -= entry.nbytes


def copied(copy: Callable[[memoryview], int], array: npt.NDArray[Any]) -> None:
    """Copy an array to a file or from it, which the system may do in pieces. OSError where the file ends before."""
    left = array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
    while left:
        if not (count := copy(left)):
            raise OSError("the file ends too early")
        left = left[count:]


def loaded(file: IO[bytes], slot: Slot) -> npt.NDArray[Any]:
    """The array that lies in an unbuffered file. OSError where the file ends before."""
    array = np.empty(slot.shape, slot.dtype)
    file.seek(slot.offset)
    copied(file.readinto, array)  # type: ignore[attr-defined]  # an unbuffered file has it
    return array


class _Scratch:
    """A temporary file in which room that was freed is used again, first fit."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._end = 0
        self._gaps: list[tuple[int, int]] = []  # [start, end), sorted, never touching each other

    def write(self, array: npt.NDArray[Any]) -> Slot:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="bnfold-", buffering=0)  # noqa: SIM115 (it lives as long as this object)
        slot = Slot(self._room(array.nbytes), array.nbytes, array.dtype, array.shape)
        try:
            self._file.seek(slot.offset)
            copied(self._file.write, np.ascontiguousarray(array))
        except OSError as error:
            raise UsageError(
                f"no room for {array.nbytes / 2**20:.0f} MiB more of held activations in {tempfile.gettempdir()} ({error.strerror}): "
                f"raise the memory budget, use fewer samples, or let TMPDIR name a folder on a larger disk"
            ) from None
        return slot

    def read(self, slot: Slot) -> npt.NDArray[Any]:
        assert self._file is not None
        return loaded(self._file, slot)

    def free(self, slot: Slot) -> None:
        start, end = slot.offset, slot.offset + slot.nbytes
        at = bisect.bisect(self._gaps, (start, end))
        if at < len(self._gaps) and self._gaps[at][0] == end:
            end = self._gaps.pop(at)[1]
        if at and self._gaps[at - 1][1] == start:
            at -= 1
            start = self._gaps.pop(at)[0]
        self._gaps.insert(at, (start, end))

    def _room(self, nbytes: int) -> int:
        for i, (start, end) in enumerate(self._gaps):
            if end - start >= nbytes:
                self._gaps[i : i + 1] = [(start + nbytes, end)] if end - start > nbytes else []
                return start
        self._end += nbytes
        return self._end - nbytes

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

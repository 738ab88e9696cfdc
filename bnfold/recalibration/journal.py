"""What a long measurement keeps in a folder, so that it goes on after a kill, a crash or a time limit, with the same result to the bit.

In lockstep, a record for each stage holds the moments that were measured in it, and says where the values lie that later stages read; so
at most one stage is run again. Where each micro-batch goes through all stages by itself, one record holds what all of them gave so far,
and is written anew from time to time. A record takes its place whole or not at all, and what the record before it needs goes only when
every process has its own: so there is always a stage from which all of them can go on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import ml_dtypes  # noqa: F401 - from here on numpy knows its types by their names
import numpy as np
import numpy.typing as npt

from bnfold.errors import BnfoldError, DataError, InputError, UnsupportedError, UsageError
from bnfold.files import contents, locked, write_text

from .distributed import Processes, together
from .methods import Accumulator, Method
from .moments import Moments
from .plan import BatchNorm, Measurement
from .spill import Slot, copied, loaded
from .statistics_file import PROGRESS, packed, read_arrays, unpacked, write_arrays

SHARE = 20  # times as long as a record of a pass takes to write, at the least, is measured before the next
LONGEST = 40  # characters of a setting that a message quotes
Identity = Mapping[str, str]


@dataclass(eq=False)
class Resumed:
    """What was kept. done: stages, or micro-batches of a pass; found: what they gave; layers: those that were measured.

    sizes: the samples of this process's micro-batches; values: where what they left for later stages lies, by micro-batch and name.
    skipped, first: see `lockstep.measure`.
    """

    done: int
    found: Measurement
    layers: Sequence[int] = ()
    sizes: Sequence[int] = ()
    values: Sequence[Mapping[str, Slot]] = ()
    skipped: int = 0
    first: Sequence[Moments] = ()

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        return {name: slot.dtype for each in self.values for name, slot in each.items()}


class Journal:
    """The part of a folder that is one process's, in one measurement of the run. Use as a context manager: it is this process's alone.

    run: by what is asked for, what a run must have in common with the one that it goes on from. name, of: the measurement's own, and what
    it must have in common besides. Raises UsageError where it has not, and where the folder can't be written to or another works in it.
    """

    def __init__(self, folder: Path, run: Identity, name: str, of: Identity, layers: Sequence[BatchNorm], method: Method, group: Processes):
        self._root, self.folder = folder, folder / name / f"process-{group.rank}"
        self._run, self._of, self._layers, self._method, self._group = dict(run), dict(of), layers, method, group
        self._values: IO[bytes] | None = None
        self._slots: dict[str, list[tuple[int, Slot]]] = {}  # of this stage's values
        self._files: dict[str, str] = {}  # in which the values lie that wait
        self._stage, self._due = 0, 0.0
        self._lock: int | None = None

    def __enter__(self) -> Journal:
        failed: BnfoldError | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.folder)
            path = self._root / "run.json"
            if path.exists():
                self._compare(json.loads(contents(path, 1 << 20, "what --resume keeps")), self._run)
            elif not self._group.rank:
                write_text(path, json.dumps(self._run, indent=2) + "\n")
        except BlockingIOError:
            failed = UsageError(f"{self.folder}: another process is at work there; wait for it, or name another folder")
        except OSError as error:
            failed = UsageError(f"{self._root}: can't be used ({error.strerror}); name another folder to --resume")
        except ValueError:
            failed = DataError(f"{path}: it is damaged; remove the folder, and start anew")
        except BnfoldError as error:
            failed = error
        together(self._group, None, failed)
        return self

    def __exit__(self, *_: object) -> None:
        if self._values is not None:
            self._values.close()
        if self._lock is not None:
            os.close(self._lock)

    def _compare(self, there: Any, here: Identity) -> None:
        there = there if isinstance(there, dict) else {}
        for what, mine in here.items():
            if (its := there.get(what)) != mine:
                both = f" ({its} there, {mine} now)" if max(len(str(its)), len(mine)) <= LONGEST else ""
                raise UsageError(
                    f"{self._root}: what is kept there was measured with another {what}{both}; to go on give the same, or to start anew "
                    f"name another folder to --resume"
                )

    # --- in lockstep ----------------------------------------------------------------------------------------------------------------------

    def stages(self) -> Resumed | None:
        """What was kept of the stages that all processes have been through."""
        records = list[tuple[dict[str, Any], dict[str, Any]]]()
        failed = None
        try:
            while (path := self._record(len(records))).exists():
                records.append(self._read(path))
        except (InputError, UsageError) as error:
            failed = error
        self._stage = min(together(self._group, len(records), failed))
        for number in range(self._stage, len(records)):  # which is measured again
            self._record(number).unlink()
        if not self._stage:
            return None
        first, last = records[0][0], records[self._stage - 1][0]
        tallies: dict[int, Moments] = {}
        values: list[dict[str, Slot]] = [{} for _ in first["sizes"]]
        for head, arrays in records[: self._stage]:
            tallies |= {layer: unpacked(arrays, str(layer)) for layer in head["layers"]}
            for name in set(last["keeps"]) & head["values"].keys():
                for batch, offset, nbytes, dtype, shape, file in head["values"][name]:
                    values[batch][name] = Slot(offset, nbytes, np.dtype(dtype), tuple(shape), file)
                    self._files[name] = file
        for name, file in self._files.items():
            end = max(slots[name].offset + slots[name].nbytes for slots in values if name in slots)
            path = self.folder / file
            if not path.exists() or path.stat().st_size < end:
                raise DataError(f"{path}: it is damaged; remove {self._root}, and start anew")
        found = Measurement(self._tallies(tallies), first["samples"], first["batches"], notes=first["notes"])
        return Resumed(self._stage, found, list(tallies), first["sizes"], values)

    def write(self, batch: int, name: str, array: npt.NDArray[Any]) -> Slot:
        """Keep a value that waits for a later stage."""
        if array.dtype.hasobject:
            raise UnsupportedError(f"{name!r} holds texts that wait for a later stage, which --resume can't keep; leave it out")
        try:
            if self._values is None:
                # It lives as long as the stage.
                self._values = open(self.folder / f"stage-{self._stage}.values", "wb", buffering=0)  # noqa: SIM115
            slot = Slot(self._values.tell(), array.nbytes, array.dtype, array.shape, Path(self._values.name).name)
            copied(self._values.write, np.ascontiguousarray(array))
        except OSError as error:
            self._full(error)
        self._slots.setdefault(name, []).append((batch, slot))
        return slot

    def read(self, slot: Slot) -> npt.NDArray[Any]:
        try:
            with open(self.folder / slot.file, "rb", buffering=0) as file:
                return loaded(file, slot)
        except OSError as error:
            raise DataError(f"{self.folder / slot.file}: can't be read ({error.strerror or error})") from None

    def stage_done(self, found: Measurement, layers: Iterable[int], sizes: Sequence[int], keeps: Iterable[str]) -> None:
        """Keep what a stage gave. layers: those that were measured in it, with all their calls so far; keeps: what waits behind it."""
        layers, keeps = list(layers), list(keeps)
        slots = {name: [[i, s.offset, s.nbytes, s.dtype.name, s.shape, s.file] for i, s in every] for name, every in self._slots.items()}
        head: dict[str, Any] = {"layers": layers, "keeps": keeps, "values": slots}
        if not self._stage:
            head |= {"sizes": list(sizes), "samples": found.samples, "batches": found.batches, "notes": found.notes}
        arrays: dict[str, Any] = {}
        for layer in layers:
            arrays |= packed(found.tallies[layer].moments, str(layer))
        failed = None
        try:
            if self._values is not None:
                os.fsync(self._values.fileno())
                self._values.close()
            self._write(self._record(self._stage), head, arrays)
        except UsageError as error:
            failed = error
        together(self._group, None, failed)
        self._files |= {name: every[0][1].file for name, every in self._slots.items()}
        self._files = {name: file for name, file in self._files.items() if name in set(keeps)}
        for path in self.folder.glob("*.values"):
            if path.name not in self._files.values():
                path.unlink()
        self._values, self._slots, self._stage = None, {}, self._stage + 1

    def _record(self, stage: int) -> Path:
        return self.folder / f"stage-{stage}.npz"

    # --- in one pass ----------------------------------------------------------------------------------------------------------------------

    def passed(self) -> Resumed | None:
        """What was kept of this process's pass over the data."""
        if not self._pass.exists():
            return None
        head, arrays = self._read(self._pass)
        tallies = self._tallies({i: unpacked(arrays, str(i)) for i in range(len(self._layers))})
        for i, tally in enumerate(tallies):
            tally.batches, tally.steps = arrays[f"{i}/batches"], head["steps"][i]
            tally.running = (arrays[f"{i}/running mean"], arrays[f"{i}/running variance"])
        first = [unpacked(arrays, f"first/{i}") for i in range(head["first"])]
        return Resumed(head["done"], Measurement(tallies, head["samples"], head["batches"]), skipped=head["skipped"], first=first)

    def pass_done(self, done: int, found: Measurement, skipped: int, first: Sequence[Moments]) -> None:
        """Keep what so many micro-batches gave, where it is time to."""
        start = time.monotonic()
        if start < self._due:
            return
        arrays: dict[str, Any] = {}
        for i, tally in enumerate(found.tallies):
            arrays |= packed(tally.moments, str(i))
            arrays |= {f"{i}/batches": tally.batches, f"{i}/running mean": tally.running[0], f"{i}/running variance": tally.running[1]}
        for i, moments in enumerate(first):
            arrays |= packed(moments, f"first/{i}")
        head = {"done": done, "samples": found.samples, "batches": found.batches, "skipped": skipped, "first": len(first)}
        self._write(self._pass, head | {"steps": [tally.steps for tally in found.tallies]}, arrays)
        now = time.monotonic()
        self._due = now + SHARE * (now - start)

    @property
    def _pass(self) -> Path:
        return self.folder / "pass.npz"

    # --- records --------------------------------------------------------------------------------------------------------------------------

    def _tallies(self, moments: Mapping[int, Moments]) -> list[Accumulator]:
        tallies = [self._method.start(layer.mean, layer.variance) for layer in self._layers]
        for i, each in moments.items():
            tallies[i] = Accumulator(each, tallies[i].batches, tallies[i].running)
        return tallies

    def _write(self, path: Path, head: dict[str, Any], arrays: dict[str, Any]) -> None:
        try:
            write_arrays(path, {"schema": PROGRESS, "of": self._of, **head}, arrays)
        except InputError as error:
            self._full(error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)))

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        head, arrays = read_arrays(path, PROGRESS)
        self._compare(head["of"], self._of)
        return head, arrays

    def _full(self, error: OSError) -> NoReturn:
        raise UsageError(
            f"{self.folder}: can't be written to ({error.strerror or error}): make room there and run it again, which goes on from what is "
            f"kept, or name a folder on a larger disk to --resume"
        ) from None

"""Recalibrate a PyTorch model in lockstep: what its BatchNorms are, and the new statistics written into a copy.

All of the model is in evaluation mode while it is measured, whatever mode it is in, and the copy has the modes of the original. What is
stored as running_var is M2/n of the data, by which one batch of them all would be normalised (see `bnfold.recalibrate`);
num_batches_tracked and momentum, which matter to further training alone, stay as they are.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node as Op

from ...errors import NothingToDoError
from ...feeds import check_feeds
from ...moments import Moments
from ...recalibrate import Layer, Progress, Reading
from ...recalibrate import recalibrate as run_plan
from ...report import RecalibrateReport
from ...rounding import rounded
from ...stages import Call, Operation, cut
from .constants import Constants, as_float64
from .lockstep_stage import Held, TorchStage, parts
from .lower import Lowering
from .ops import BATCHNORMS
from .ops_affine import frozen_chains
from .run import device_of, precise
from .trace import NUMPY, Traced, duplicate, to_tensor, trace
from .walk import arguments, frame, is_float, is_tensor, operator_name
from .write_program import copy_program
from .writing import without_writing

if TYPE_CHECKING:
    from ...data import Batch, InputSpec

TINY = ("sym_size",)
SMALLER = ("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin")

Feed = Callable[["Sequence[InputSpec]"], "Iterable[Batch]"]
Statistics = tuple[str, str]  # the qualified names of a layer's mean and variance


def recalibrate(
    model: nn.Module | ExportedProgram,
    feed: Feed,
    *,
    example: Any = None,
    again: bool = False,
    memory_budget: int = 1 << 30,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[nn.Module | ExportedProgram, RecalibrateReport]:
    """A copy of the model with the exact pooled statistics of the data in every BatchNorm, and what changed.

    feed: gives the micro-batches by input name, of any size each, for a model with these inputs. example: how a module is called.
    again: whether `feed` may be asked twice. Then the network is first read for samples of one size, which is quicker, and where some
    have another, all starts afresh. memory_budget: bytes of activations held in memory. device: where it runs, "cpu" or "cuda".
    Only running means and variances change. A BatchNorm without statistics of its own (track_running_stats=False) goes on normalising
    each micro-batch by itself, with a note in the report, as does what else can't be measured.

    Raises NothingToDoError (no BatchNorm to measure), DataError (no data, or such that don't fit or that end in NaN), UnsupportedError
    (a size that the data decide), DeviceError.
    """
    start = time.perf_counter()
    for one_size in (True, False) if again and isinstance(model, nn.Module) else (False,):
        traced = trace(model, example, evaluation=True, one_size=one_size)
        plan = TorchPlan(traced, device_of(device))
        try:
            with precise():
                report = run_plan(plan, _checked(feed, traced.specs, one_size), memory_budget=memory_budget, progress=progress)
            break
        except _OtherSizeError:
            continue
    return plan.write(model), dataclasses.replace(report, seconds=time.perf_counter() - start)


class _OtherSizeError(Exception):
    """A micro-batch of another size than the network was read for."""


def _checked(feed: Feed, specs: Sequence[InputSpec], one_size: bool) -> Iterator[Batch]:
    """The micro-batches; with one_size, axes behind the first may differ from the example's, but not go through."""
    open_axes = [dataclasses.replace(spec, shape=(*spec.shape[:1], *(None for _ in spec.shape[1:]))) for spec in specs]
    for batch in feed(open_axes if one_size else specs):
        if one_size and any(batch[spec.name].shape[1:] != spec.shape[1:] for spec in specs):
            raise _OtherSizeError
        check_feeds(batch, specs)
        yield batch


class TorchPlan:
    """A model cut into stages (see `bnfold.recalibrate.Plan`). The model isn't touched."""

    def __init__(self, traced: Traced, device: torch.device) -> None:
        self.device = device
        self.program = without_writing(traced.program)
        self.constants = Constants(self.program)
        self.held = Held(self.program, self.constants, device)
        self.notes: list[str] = []
        self.layers: list[Layer] = []
        self._names: list[Statistics] = []
        self._calls: list[Call[Op, Op]] = []
        self._find(traced)
        if not self._calls:
            why = "; ".join(self.notes) or "the model holds no BatchNorm"
            raise NothingToDoError(f"there are no statistics to measure: {why}")
        self._cuts, dependent = cut(self._operations(), self._calls)
        for layer in sorted(dependent):
            self.notes.append(
                f"{self.layers[layer].name} is called several times, and one call depends on another: its statistics are those of all "
                f"calls, and each call was normalised with those of the calls up to it"
            )
        self._new: dict[str, torch.Tensor] = {}

    def _operations(self) -> list[Operation[Op, Op]]:
        found = []
        found_parts: set[Op] = set()
        for op in self.program.graph.nodes:
            if op.op != "call_function" or self._is_fixed(op) or op in found_parts:
                continue
            reads = tuple(source for source in op.all_input_nodes if not self._is_fixed(source))
            name = operator_name(op)
            whole = "pool" in name and is_tensor(op) and all(n == 1 for n in op.meta["val"].shape[2:])
            shrinks = 2 if whole or name in TINY else 1 if "pool" in name or name in SMALLER else 0
            pieces = parts(op)
            found_parts.update(pieces)
            found.append(Operation(op, reads, tuple(pieces) or (op,), shrinks))
        return found

    def _is_fixed(self, op: Op) -> bool:
        """Whether a value is the same for all data: a constant, or a size, which the micro-batch's inputs tell."""
        return self.held.is_constant(op) or isinstance(op.meta.get("val"), (int, torch.SymInt))

    # --- what there is to measure -------------------------------------------------------------------------------------------------

    def _find(self, traced: Traced) -> None:
        chains = frozen_chains(Lowering(Traced(traced.model, self.program)))
        first = {chain[0]: chain for chain in chains}
        found: dict[Statistics, int] = {}
        for op in self.program.graph.nodes:
            if op in first:
                owner = frame(op)
                key = (f"{owner}.running_mean".lstrip("."), f"{owner}.running_var".lstrip("."))
                source = next(s for s in op.all_input_nodes if not self.constants.is_constant(s))
            elif operator_name(op) in BATCHNORMS and not self.constants.is_constant(op):
                given = arguments(op)
                stored = [self.constants.stored(given.get(name)) for name in ("running_mean", "running_var")]
                why = self._why_not(op, given, stored)
                if why is not None:
                    self.notes.append(f"{frame(op) or op.name} keeps its statistics: {why}")
                    continue
                assert stored[0] is not None
                assert stored[1] is not None
                key, source = (stored[0].target, stored[1].target), given["input"]
            else:
                continue
            if self._is_fixed(source):
                self.notes.append(f"{frame(op) or op.name} keeps its statistics: its input doesn't depend on the data")
                continue
            if key not in found:
                found[key] = len(self.layers)
                mean, variance = (as_float64(self.held.stored(name)) for name in key)
                self.layers.append(Layer(key[0].rpartition(".")[0] or op.name, mean, variance))
                self._names.append(key)
            self._calls.append(Call(op, source, found[key]))

    @staticmethod
    def _why_not(op: Op, given: dict[str, Any], stored: list[Any]) -> str | None:
        if given.get("running_mean") is None:
            return "it has none (track_running_stats=False): it normalises each batch by itself"
        if given.get("training", given.get("train", False)):
            return "it is in training mode: it normalises each batch by itself"
        if None in stored:
            return "they are computed"
        return None if is_float(given["input"]) else "its input isn't floating point"

    # --- the protocol -------------------------------------------------------------------------------------------------------------

    @property
    def device_room(self) -> int:
        """Half of what a GPU has left: the other half is for what runs."""
        return int(torch.cuda.mem_get_info(self.device)[0] // 2) if self.device.type == "cuda" else 0

    @property
    def stage_count(self) -> int:
        return len(self._cuts)

    def stages(self) -> Iterator[TorchStage]:
        for number, each in enumerate(self._cuts):
            readings = [Reading(call.source.name, call.layer) for call in each.calls]
            last = number == len(self._cuts) - 1
            yield TorchStage(self.program, self.held, each, readings, first=number == 0, last=last)

    def set(self, layer: int, moments: Moments) -> str | None:
        made = {}
        for name, exact, role in zip(self._names[layer], (moments.mean, moments.variance()), ("mean", "variance"), strict=True):
            old = self.held.stored(name)
            with np.errstate(over="ignore"):
                array = rounded(exact, NUMPY[old.dtype]).reshape(tuple(old.shape))
            if not np.isfinite(array.astype(np.float64)).all():
                channel = int(np.flatnonzero(~np.isfinite(array.astype(np.float64)))[0])
                self._forget(layer)
                return f"its new {role} of channel {channel} is {exact[channel]:.3g}, more than {array.dtype} can hold"
            made[name] = to_tensor(array)
        self._new |= made
        for name, tensor in made.items():
            self.held.replace(name, tensor)
        return None

    def _forget(self, layer: int) -> None:
        for name in self._names[layer]:
            self._new.pop(name, None)
            self.held.restore(name)

    def write(self, model: nn.Module | ExportedProgram) -> nn.Module | ExportedProgram:
        """A copy of the model with the statistics that were set."""
        if isinstance(model, ExportedProgram):
            program = copy_program(model)
            for name, tensor in self._new.items():
                holder = program.state_dict if name in program.state_dict else program.constants
                holder[name] = tensor.to(holder[name].device)
            return program
        module = duplicate(model)
        with torch.no_grad():
            for name, tensor in self._new.items():
                owner, _, attribute = name.rpartition(".")
                buffer = getattr(module.get_submodule(owner), attribute)
                buffer.copy_(tensor.reshape(buffer.shape))
        return module

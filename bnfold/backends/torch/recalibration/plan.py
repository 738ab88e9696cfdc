"""Recalibrate a PyTorch model in lockstep: what its BatchNorms are, and the new statistics written into a copy.

All of the model is in evaluation mode while it is measured, whatever mode it is in, and the copy has the modes of the original. What is
stored as running_var is M2/n of the data, by which one batch of them all would be normalised (see `bnfold.recalibrate`);
num_batches_tracked and momentum, which matter to further training alone, stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node as Op

from bnfold.algebra.rounding import narrowed
from bnfold.errors import NothingToDoError
from bnfold.folding.census import missed
from bnfold.recalibration.methods import Statistics
from bnfold.recalibration.moments import Moments
from bnfold.recalibration.protocol import Layer, Reading
from bnfold.recalibration.schedule import Call, Operation, cut
from bnfold.recalibration.selection import Select, every

from ..export.census import held
from ..export.constants import Constants, as_float64
from ..export.functional import without_writing
from ..export.trace import NUMPY, Traced, duplicate, to_tensor, trace
from ..export.walk import arguments, elements, frame, in_training, is_batchnorm, is_float, is_tensor, operator_name
from ..lowering.affine import frozen_chains
from ..lowering.table import lowering as lowering_of
from ..runtime.session import Oracle, device_of
from ..writing.freeze import frozen
from ..writing.program import copy_program
from .pointwise import passes, read
from .stage import Held, TorchStage, parts

if TYPE_CHECKING:
    from bnfold.data import Batch

TINY = ("sym_size",)
PRODUCTS = (*(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)), "convolution", "linear")
SMALLER = ("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin")

Names = tuple[str, str]  # the qualified names of a layer's mean and variance


def plan_of(
    model: nn.Module | ExportedProgram,
    example: Any,
    *,
    select: Select = every,
    freeze: bool = False,
    device: str = "cpu",
    one_size: bool = False,
) -> TorchPlan:
    """The model, cut into stages. example: how a module is called. one_size: it is read for samples of one size, which is quicker.

    select: whether a BatchNorm of this name is measured. freeze: those too that have no statistics (track_running_stats=False), which
    get some. device: where it runs, "cpu" or "cuda". Only running means and variances change.

    Raises NothingToDoError (no BatchNorm to measure), UnsupportedError (a size that the data decide), DeviceError.
    """
    traced = trace(model, example, evaluation=True, one_size=one_size, patient=not one_size)
    said: dict[str, str] = {}
    if freeze and isinstance(model, ExportedProgram):
        program, said = frozen(traced.program, select)
        traced = Traced(program, program) if said else traced
    return TorchPlan(traced, device_of(device), select, freeze, said)


class TorchPlan:
    """A model cut into stages (see `bnfold.recalibrate.Plan`). The model isn't touched. said: notes on layers, by their names."""

    def __init__(
        self,
        traced: Traced,
        device: torch.device,
        select: Select = every,
        freeze: bool = False,
        said: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.device = device
        self.specs = traced.specs
        self._traced = traced
        self._model = traced.model
        self._select, self._freeze = select, freeze
        self.program = without_writing(traced.program)
        self.constants = Constants(self.program)
        self.held = Held(self.program, self.constants, device)
        self.notes: list[str] = []
        self.layers: list[Layer] = []
        self._names: list[Names] = []
        self._stands_in: dict[int, Moments] = {}  # by call: statistics for which the program has no place
        self.frozen: set[int] = set()  # layers that came without statistics
        self._calls: list[Call[Op, Op]] = []
        self._find(traced)
        self.notes += [text for name, text in said.items() if any(layer.name == name for layer in self.layers)]
        if not self._calls:
            why = "; ".join(self.notes) or ("the model holds no BatchNorm" if select is every else "no BatchNorm is selected")
            raise NothingToDoError(f"there are no statistics to measure: {why}")
        self._operations = self._found_operations()
        self._cuts, dependent = cut(self._operations, [self._short(call) for call in self._calls], self._sizes())
        for layer in sorted(dependent):
            self.notes.append(
                f"{self.layers[layer].name} is called several times, and one call depends on another: its statistics are those of all "
                f"calls, and each call was normalised with those of the calls up to it"
            )
        self._new: dict[str, torch.Tensor] = {}

    def _short(self, call: Call[Op, Op]) -> Call[Op, Op]:
        """A call that is measured without running the pointwise convolution before it, where nothing else reads that one's result."""
        made = call.source
        if list(made.users) != [call.node] or not passes(made, self.held):
            return call
        return Call(call.node, arguments(made)["input"], call.layer, through=made)

    def _found_operations(self) -> list[Operation[Op, Op]]:
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
            found.append(Operation(op, reads, tuple(pieces) or (op,), shrinks, self._work(op)))
        return found

    def _sizes(self) -> dict[Op, int]:
        """The bytes of each tensor, at the example's sizes."""
        tensors = [op for op in self.program.graph.nodes if is_tensor(op)]
        return {op: count * op.meta["val"].element_size() for op in tensors if (count := elements(op)) is not None}

    def _work(self, op: Op) -> int | None:
        """The multiply-adds of a convolution or a product with stored weights, and of what only copies."""
        name = operator_name(op)
        if name == "cat":
            return 0
        if name not in PRODUCTS:
            return None
        given = arguments(op)
        weight = given["weight"]
        if not all(self.held.is_held(each) for each in (weight, given["bias"]) if each is not None):
            return None
        turned = "transpose" in name or given.get("transposed", False)
        counted = elements(given["input"] if turned else op)
        return None if counted is None else counted * (math.prod(weight.meta["val"].shape[1:]))

    def _is_fixed(self, op: Op) -> bool:
        """Whether a value is the same for all data: a constant, or a size, which the micro-batch's inputs tell."""
        return self.held.is_constant(op) or isinstance(op.meta.get("val"), (int, torch.SymInt))

    # --- what there is to measure -------------------------------------------------------------------------------------------------

    def _find(self, traced: Traced) -> None:
        lowering = lowering_of(Traced(traced.model, self.program))
        chains = [chain for chain in frozen_chains(lowering) if self._select(frame(chain[0]) or chain[-1].name)]
        for chain in chains:
            if not self._is_stored(f"{frame(chain[0])}.running_mean".lstrip(".")):
                self.notes.append(
                    f"{frame(chain[0]) or chain[-1].name} keeps its statistics: it is written out, and they aren't called running_mean and "
                    f"running_var"
                )
        chains = [chain for chain in chains if self._is_stored(f"{frame(chain[0])}.running_mean".lstrip("."))]
        first = {chain[0]: chain for chain in chains}
        met = {op for chain in chains for op in chain}
        found: dict[Names, int] = {}
        for op in self.program.graph.nodes:
            if op in first:
                owner = frame(op)
                key = (f"{owner}.running_mean".lstrip("."), f"{owner}.running_var".lstrip("."))
                source = next(s for s in op.all_input_nodes if not self.constants.is_constant(s))
                if not self._select(owner or op.name):
                    continue
            elif is_batchnorm(op) and not self.constants.is_constant(op):
                met.add(op)
                given = arguments(op)
                if not self._select(frame(op) or op.name):
                    continue
                stored = [self.constants.stored(given.get(name)) for name in ("running_mean", "running_var")]
                why = self._why_not(op, given, stored)
                if why is not None:
                    self.notes.append(f"{frame(op) or op.name} keeps its statistics: {why}")
                    continue
                if stored[0] is None or stored[1] is None:
                    owner = frame(op)
                    key = (f"{owner}.running_mean", f"{owner}.running_var")
                else:
                    key = (stored[0].target, stored[1].target)
                source = given["input"]
            else:
                continue
            if self._is_fixed(source):
                self.notes.append(f"{frame(op) or op.name} keeps its statistics: its input doesn't depend on the data")
                continue
            if key not in found:
                found[key] = len(self.layers)
                self.layers.append(self._layer(op, key, len(self.layers)))
                self._names.append(key)
            self._calls.append(Call(op, source, found[key]))
        names = {layer.name for layer in self.layers}
        said = "{} has the statistics of its other calls: in this one, {}", "{} keeps its statistics: {}"
        others = [each for each in missed(held(lowering, met), met) if self._select(each.name)]
        self.notes += dict.fromkeys(said[each.name not in names].format(each.name, each.why) for each in others)

    def _layer(self, op: Op, key: Names, place: int) -> Layer:
        name = key[0].rpartition(".")[0] or op.name
        if not self._is_stored(key[0]):
            self.frozen.add(place)
            self.notes.append(f"{name} had no statistics: it normalised each batch by itself")
            channels = int(arguments(op)["input"].meta["val"].shape[1])
            return Layer(name, np.zeros(channels), np.ones(channels))
        owner = None if isinstance(self._model, ExportedProgram) else self._model.get_submodule(key[0].rpartition(".")[0])
        if self._freeze and owner is not None and owner.training:
            self.notes.append(f"{name} was in training mode, and has statistics of its own now")
        mean, variance = (as_float64(self.held.stored(each)) for each in key)
        return Layer(name, mean, variance)

    def _is_stored(self, name: str) -> bool:
        return name in self.program.state_dict or name in self.program.constants

    def _is_named(self, stored: Any) -> bool:
        """Whether a module's own names lead to a tensor; in a program, all have names."""
        if isinstance(self._model, ExportedProgram):
            return True
        path, _, attribute = stored.target.rpartition(".")
        return hasattr(self._model.get_submodule(path), attribute)

    def _why_not(self, op: Op, given: dict[str, Any], stored: list[Any]) -> str | None:
        if given.get("running_mean") is None:
            if not self._freeze:
                return "it has none (track_running_stats=False): it normalises each batch by itself (--freeze gives it some)"
            module = None if isinstance(self._model, ExportedProgram) else dict(self._model.named_modules()).get(frame(op))
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                return "it has none, and there is no module here that could keep them"
            return None
        if in_training(op):
            if not isinstance(self._model, ExportedProgram):
                return "its code has it in training mode even in evaluation: it normalises each batch by itself"
            why = (
                "the statistics of each batch are used elsewhere in the program"
                if self._freeze
                else "--freeze gives it statistics of its own"
            )
            return f"it is in training mode: it normalises each batch by itself ({why})"
        if None in stored:
            return "they are computed"
        if not all(map(self._is_named, stored)):
            return "the module holds them under no name, so there is no place to write others"
        return None if is_float(given["input"]) else "its input isn't floating point"

    def flat(self, item: Any) -> dict[str, Any] | None:
        """See `Traced.flat`."""
        return self._traced.flat(item)

    def outputs(self, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        """What the model gives as it came, by output name; none of it where a BatchNorm in training mode mixes the samples of a batch."""
        made = self._oracle.run(batch)
        mixes = any(is_batchnorm(op) and in_training(op) for op in self._traced.program.graph.nodes)
        return {} if mixes else made

    @cached_property
    def _oracle(self) -> Oracle:
        return Oracle(self._traced)

    # --- the protocol -------------------------------------------------------------------------------------------------------------

    @property
    def device_room(self) -> int:
        """Half of what a GPU has left: the other half is for what runs."""
        return int(torch.cuda.mem_get_info(self.device)[0] // 2) if self.device.type == "cuda" else 0

    @property
    def stage_count(self) -> int:
        return len(self._cuts)

    def stages(self, own: bool = False) -> Iterator[TorchStage]:
        place = {call.node: i for i, call in enumerate(self._calls)}
        normalises = {i: (call.node, call.layer) for i, call in enumerate(self._calls)}
        cuts = cut(self._operations, self._calls)[0] if own else self._cuts  # where nothing waits, nothing runs twice
        for number, each in enumerate(cuts):
            readings = [
                Reading(
                    call.source.name, call.layer, place[call.node], through=None if call.through is None else read(call.through, self.held)
                )
                for call in each.calls
            ]
            calls = {i: found for i, found in normalises.items() if found[0] in each.nodes} if own or self.frozen else {}
            last = number == len(cuts) - 1
            stage = TorchStage(self.program, self.held, each, readings, calls, self._names, first=number == 0, last=last)
            stage.stands_in = self._stands_in
            yield stage

    def set(self, layer: int, statistics: Statistics) -> str | None:
        names, (mean, variance) = self._names[layer], statistics
        fresh = torch.empty(mean.shape, dtype=self._dtype(layer))
        old = [self.held.stored(name) if self._is_stored(name) else fresh for name in names]
        stored = narrowed((mean, variance), [NUMPY[each.dtype] for each in old])
        if isinstance(stored, str):
            self._forget(layer)
            return stored
        made = {name: to_tensor(array).reshape(each.shape) for name, array, each in zip(names, stored, old, strict=True)}
        self._new |= made
        if layer in self.frozen:
            mean, variance = (as_float64(tensor) for tensor in made.values())
            stands_in = Moments(1, mean, variance, 1, 0.0, np.zeros((5, mean.size)))  # of one element, M2 is the variance
            self._stands_in |= {i: stands_in for i, call in enumerate(self._calls) if call.layer == layer}
            return None
        for name, tensor in made.items():
            self.held.replace(name, tensor)
        return None

    def _dtype(self, layer: int) -> torch.dtype:
        """The type of a layer's parameters, or, where it has none, that of what it normalises."""
        op = next(call.node for call in self._calls if call.layer == layer)
        given = arguments(op)
        weight = given.get("weight")
        found: torch.dtype = (given.get("input", op) if weight is None else weight).meta["val"].dtype
        return found

    def _forget(self, layer: int) -> None:
        for name in self._names[layer]:
            self._new.pop(name, None)
            if self._is_stored(name):
                self.held.restore(name)

    def write(self) -> nn.Module | ExportedProgram:
        """A copy of the model with the statistics that were set."""
        if isinstance(self._model, ExportedProgram):
            program = copy_program(self._model)
            for name, tensor in self._new.items():
                holder = program.state_dict if name in program.state_dict else program.constants
                holder[name] = tensor.to(holder[name].device)
            return program
        module = duplicate(self._model)
        with torch.no_grad():
            for name, tensor in self._new.items():
                path, _, attribute = name.rpartition(".")
                owner = module.get_submodule(path)
                buffer = getattr(owner, attribute)
                if buffer is None:
                    assert isinstance(owner, nn.modules.batchnorm._BatchNorm)
                    _give(owner, attribute, tensor)
                else:
                    buffer.copy_(tensor.reshape(buffer.shape))
        if self._freeze:
            for mean, _ in self._names:
                if mean in self._new:
                    owner = module.get_submodule(mean.rpartition(".")[0])
                    owner.training = False
                    if isinstance(owner, nn.modules.batchnorm._BatchNorm):
                        owner.eval()  # an activation of its own too
        return module


def _give(norm: nn.modules.batchnorm._BatchNorm, attribute: str, tensor: torch.Tensor) -> None:
    """Statistics to a BatchNorm that had none, which it normalises with from now on."""
    device = next((p.device for p in norm.parameters()), torch.device("cpu"))
    norm.register_buffer(attribute, tensor.to(device))
    if getattr(norm, "num_batches_tracked", None) is None:
        norm.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
    norm.track_running_stats = True

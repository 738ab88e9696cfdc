"""Recalibrate a PyTorch model in lockstep: what its BatchNorms are, and the new statistics written into a copy.

All of the model is in evaluation mode while it is measured, whatever mode it is in, and the copy has the modes of the original. What is
stored as running_var is M2/n of the data, by which one batch of them all would be normalised (see `bnfold.recalibrate`);
num_batches_tracked and momentum, which matter to further training alone, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node as Op

from bnfold.data import Batch, InputSpec
from bnfold.folding.plan import missed
from bnfold.recalibration.methods import Statistics
from bnfold.recalibration.moments import Moments, Pointwise
from bnfold.recalibration.plan import BatchNorm, Reading, Select, StagePlan, every

from ..export.census import batchnorms
from ..export.constants import ProgramConstants, as_float64
from ..export.copies import duplicate
from ..export.functional import without_writing
from ..export.tensors import NUMPY, to_tensor
from ..export.trace import Traced, trace
from ..export.walk import arguments, epsilon, frame, in_training, is_batchnorm, is_float
from ..lowering.chains import Chain, frozen_chains, normalises
from ..lowering.lowering import TorchLowering
from ..lowering.places import Place
from ..lowering.table import lowering as lowering_of
from ..runtime.interpreter import TorchOracle
from ..runtime.session import device_of
from ..writing.freeze import frozen
from ..writing.program import copy_program
from ..writing.simulated import keep_codes, rounded_with, simulating, with_statistics
from . import operations
from .operations import TorchCall, TorchCut, TorchOperation
from .stage import StoredTensors, TorchStage

NAMELESS = "the module holds them under no name, so there is no place to write others"
WITHOUT_MODULE = "it has none, and there is no module here that could keep them"


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


class TorchPlan(StagePlan[Op, Op]):
    """A model cut into stages. said: notes on layers, by their names."""

    def __init__(self, traced: Traced, device: torch.device, select: Select, freeze: bool, said: Mapping[str, str]) -> None:
        super().__init__(select, freeze)
        self._traced, self._model, self._said, self.flat = traced, traced.model, said, traced.flat
        self.program = without_writing(traced.program)
        self.constants = ProgramConstants(self.program)
        self.stored = StoredTensors(self.program, self.constants, device)
        self._stands_in: dict[int, Moments] = {}  # by call: statistics for which the program has no place
        self.cut()

    # --- what there is to measure ---------------------------------------------------------------------------------------------

    def find(self) -> None:
        lowering = lowering_of(Traced(self._model, self.program))
        chains = {chain.ops[0]: chain for chain in frozen_chains(lowering)}
        lowered = {op for chain in chains.values() for op in chain.ops}
        for op in self.program.graph.nodes:
            name, axis = frame(op) or op.name, 1
            if op in chains:
                name, axis, norm = chains[op].name, chains[op].axis, chains[op].norm
                eps = None if norm is None else norm.epsilon
                if not self.select(name):
                    continue
                statistics = self._statistics(lowering, chains[op])
                if isinstance(statistics, str):
                    self.keeps(name, statistics)
                    continue
                key, source = statistics, next(s for s in op.all_input_nodes if not self.constants.is_constant(s))
            elif is_batchnorm(op) and not self.constants.is_constant(op):
                lowered.add(op)
                if not self.select(name):
                    continue
                given, eps = arguments(op), epsilon(arguments(op))
                stored = [self.constants.stored(given.get(role)) for role in ("running_mean", "running_var")]
                if (why := self._why_not(op, given, stored)) is not None:
                    self.keeps(name, why)
                    continue
                mean, variance = stored
                key = _owned(frame(op)) if mean is None or variance is None else (mean.target, variance.target)
                name = (key[0].rpartition(".")[0] if mean is None else self.constants.owner(op, mean)) or op.name
                source = given["input"]
            else:
                continue
            if operations.is_fixed(source, self.stored):
                self.keeps(name, "its input doesn't depend on the data")
                continue
            self.calls.append(TorchCall(op, source, self.place(key, partial(self._layer, name, op, key, eps)), axis=axis))
        names = {layer.name for layer in self.layers}
        said = "{} has the statistics of its other calls: in this one, {}", "{} keeps its statistics: {}"
        others = [each for each in missed(batchnorms(lowering, lowered), lowered) if self.select(each.name)]
        self.notes += dict.fromkeys(said[each.name not in names].format(each.name, each.why) for each in others)
        self.notes += [text for name, text in self._said.items() if name in names]

    def _statistics(self, lowering: TorchLowering, chain: Chain) -> tuple[str, str] | str:
        """The names of the mean and the variance of a BatchNorm that is written out; a text where they can't be measured."""
        names = _owned(chain.owner)
        if chain.norm is not None:
            mean, var = (self.constants.stored(chain.norm.tensors.get(role)) for role in ("mean", "var"))
            if mean is not None and var is not None and not self._are_named([mean, var]):
                return NAMELESS
            names = ("" if mean is None else mean.target, "" if var is None else var.target)
        known = normalises(lowering, chain) if chain.norm is None else all(map(self._is_stored, names))
        return names if known else "it is written out, and which tensors its statistics are isn't known"

    def _are_named(self, stored: list[Any]) -> bool:
        """Whether a module's own names lead to tensors; in a program, all have names."""
        module = self._model if isinstance(self._model, nn.Module) else None
        places = (Place(each.target) for each in stored)
        return module is None or all(hasattr(module.get_submodule(place.owner), place.attribute) for place in places)

    def _layer(self, name: str, op: Op, key: tuple[str, str], eps: float | None) -> BatchNorm:
        path = key[0].rpartition(".")[0]
        if not self._is_stored(key[0]):
            self.frozen.add(len(self.layers))
            self.notes.append(f"{name} had no statistics: it normalised each batch by itself")
            channels = int(arguments(op)["input"].meta["val"].shape[1])
            return BatchNorm(name, np.zeros(channels), np.ones(channels), eps)
        if self.freeze and isinstance(self._model, nn.Module) and self._model.get_submodule(path).training:
            self.notes.append(f"{name} was in training mode, and has statistics of its own now")
        mean, variance = (as_float64(self.stored.tensor(each)).ravel() for each in key)
        return BatchNorm(name, mean, variance, eps)

    def _why_not(self, op: Op, given: dict[str, Any], stored: list[Any]) -> str | None:
        module = self._model if isinstance(self._model, nn.Module) else None
        if given.get("running_mean") is None:
            if not self.freeze:
                return "it has none (track_running_stats=False): it normalises each batch by itself (--freeze gives it some)"
            norm = None if module is None else dict(module.named_modules()).get(frame(op))
            return None if isinstance(norm, nn.modules.batchnorm._BatchNorm) else WITHOUT_MODULE
        if in_training(op):
            if module is not None:
                return "its code has it in training mode even in evaluation: it normalises each batch by itself"
            used = "the statistics of each batch are used elsewhere in the program"
            why = used if self.freeze else "--freeze gives it statistics of its own"
            return f"it is in training mode: it normalises each batch by itself ({why})"
        if None in stored:
            return "they are computed"
        if not self._are_named(stored):
            return NAMELESS
        owner = stored[1].target.rpartition(".")[0].rpartition(".")[0]
        if isinstance(self._model, nn.Module) and rounded_with(self.constants, stored[1].target) and owner not in self._simulating:
            return "the module's code rounds weights by them too: give the model as an exported program (torch.export.export)"
        return None if is_float(given["input"]) else "its input isn't floating point"

    def _is_stored(self, name: str) -> bool:
        return name in self.program.state_dict or name in self.program.constants

    # --- how it is cut and runs -----------------------------------------------------------------------------------------------

    def operations(self) -> Iterator[TorchOperation]:
        return operations.operations(self.program.graph, self.stored)

    def nbytes(self, value: Op) -> int | None:
        return operations.nbytes(value)

    def weights(self, convolution: Op) -> Pointwise:
        return operations.pointwise(convolution, self.stored)

    @property
    def device_room(self) -> int:
        """Half of what a GPU has left: the other half is for what runs."""
        return int(torch.cuda.mem_get_info(self.stored.device)[0] // 2) if self.stored.device.type == "cuda" else 0

    def stage(self, part: TorchCut, readings: list[Reading], own: bool, *, first: bool, last: bool) -> TorchStage:
        normalised = own or self.frozen
        calls = {i: (call.node, self.keys[call.layer]) for i, call in enumerate(self.calls) if normalised and call.node in part.nodes}
        return TorchStage(self.program, self.stored, part, readings, calls, self._stands_in, first=first, last=last)

    # --- the model ------------------------------------------------------------------------------------------------------------

    def identity(self) -> str:
        return self._traced.identity()

    @property
    def specs(self) -> list[InputSpec]:
        return self._traced.specs

    def outputs(self, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        made = self._oracle.run(batch)
        mixes = any(is_batchnorm(op) and in_training(op) for op in self._traced.program.graph.nodes)
        return {} if mixes else made

    @cached_property
    def _simulating(self) -> dict[str, Any]:
        return simulating(self._model, evaluation=True) if isinstance(self._model, nn.Module) else {}

    @cached_property
    def _oracle(self) -> TorchOracle:
        return TorchOracle(self._traced)

    def forms(self, layer: int) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
        """Where a layer has no statistics, the type of its weight or of what it normalises."""
        op = self.nodes[layer][0]
        given = arguments(op)
        like = given.get("weight")
        kind = (given.get("input", op) if like is None else like).meta["val"].dtype
        new = torch.empty(self.layers[layer].mean.shape, dtype=kind)
        old = [self.stored.tensor(name) if self._is_stored(name) else new for name in self.keys[layer]]
        return [(NUMPY[each.dtype], tuple(each.shape)) for each in old]

    def set(self, layer: int, statistics: Statistics) -> str | None:
        if (why := super().set(layer, statistics)) is not None:
            for name in filter(self._is_stored, self.keys[layer]):
                self.stored.restore(name)
            return why
        made = self._tensors(layer)
        if layer in self.frozen:
            mean, variance = map(as_float64, made.values())
            stands_in = Moments(1, mean, variance, 1, 0.0, np.zeros((5, mean.size)))  # of one element, M2 is the variance
            self._stands_in |= {i: stands_in for i, call in enumerate(self.calls) if call.layer == layer}
        else:
            for name, tensor in made.items():
                self.stored.replace(name, tensor)
        return None

    def _tensors(self, layer: int) -> dict[str, torch.Tensor]:
        return dict(zip(self.keys[layer], map(to_tensor, self.statistics[layer]), strict=True))

    def write(self) -> nn.Module | ExportedProgram:
        new = {name: tensor for layer in self.statistics for name, tensor in self._tensors(layer).items()}
        if isinstance(self._model, ExportedProgram):
            return with_statistics(copy_program(self._model), self.constants, new)
        module = duplicate(self._model)
        with torch.no_grad():
            for name, tensor in new.items():
                path, _, attribute = name.rpartition(".")
                owner = module.get_submodule(path)
                buffer = getattr(owner, attribute)
                if buffer is None:
                    assert isinstance(owner, nn.modules.batchnorm._BatchNorm)
                    _give(owner, attribute, tensor)
                else:
                    buffer.copy_(tensor.reshape(buffer.shape))
                if self.freeze:
                    owner.training = False
                    if isinstance(owner, nn.modules.batchnorm._BatchNorm):
                        owner.eval()  # an activation of its own too
        for path, layer in self._simulating.items():
            if any(name.startswith(f"{path}.bn.") for name in new):
                keep_codes(module.get_submodule(path), layer)
        return module


def _owned(owner: str) -> tuple[str, str]:
    """The qualified names of a module's statistics."""
    return f"{owner}.running_mean".lstrip("."), f"{owner}.running_var".lstrip(".")


def _give(norm: nn.modules.batchnorm._BatchNorm, attribute: str, tensor: torch.Tensor) -> None:
    """Statistics to a BatchNorm that had none, which it normalises with from now on."""
    device = next((p.device for p in norm.parameters()), torch.device("cpu"))
    norm.register_buffer(attribute, tensor.to(device))
    if getattr(norm, "num_batches_tracked", None) is None:
        norm.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
    norm.track_running_stats = True

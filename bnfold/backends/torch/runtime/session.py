"""A PyTorch model that runs: in its stored types on a device, as its user runs it, and in float64, operator by operator.

TF32, whose rounding hides real defects, is off while a model runs here, unless it shall run as it is deployed.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.capture import Switch
from bnfold.data import Batch, InputSpec
from bnfold.data.inputs import check_feeds, samples_of
from bnfold.data.memory import enough_memory
from bnfold.errors import BnfoldError, DataError, DeviceError, OutOfMemoryError, UnsupportedError, UsageError
from bnfold.running import Placement
from bnfold.text import first_line

from ..export.constants import weights
from ..export.copies import duplicate
from ..export.observers import observers, settled_quantisers, without_observers
from ..export.tensors import flat_outputs, to_numpy, to_tensor
from ..export.trace import Traced
from ..export.walk import in_training, is_batchnorm, mutates, stored_targets, written

MOVED = 1 / 12  # the share of stored numbers that move by a unit in the last place, with the variance of rounding itself
_DEVICE = re.compile(r"(CUDA|HIP) error|CUBLAS_|CUDNN_|cuDNN error", re.IGNORECASE)


def device_of(name: str) -> torch.device:
    """A device by its name, "cpu", "cuda" or "cuda:1". Raises UsageError for another name, DeviceError where it isn't there."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UsageError(f"PyTorch models run on cpu or cuda, not on {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "there is no CUDA device, or no driver for it"
        raise DeviceError(f"device {name} isn't available: {why}; use --device cpu")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise DeviceError(f"device {name} isn't available: there are {torch.cuda.device_count()}; use --device cuda")
    return torch.device(name)


def device_for(provider: str) -> str:
    """Where a model runs for a provider of ONNX Runtime, of whose options only the number of the device counts here."""
    kind, _, rest = provider.partition(":")
    if kind.lower() not in ("cpu", "cuda"):
        return "cpu"
    number = rest if rest.isdigit() else next((text[10:] for text in rest.split(",") if text.startswith("device_id=")), "")
    return f"cuda:{number}" if number and kind.lower() == "cuda" else kind.lower()


@contextmanager
def precise() -> Iterator[None]:
    """Without gradients, and with float32 in full."""
    with _full(), torch.no_grad():
        yield


def _set_tf32(values: Sequence[bool]) -> list[bool]:
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag, value in zip(flags, values, strict=True):
        flag.allow_tf32 = value
    return before


_full = Switch(lambda: _set_tf32((False, False)), _set_tf32)  # for the whole process


def precisions(device: str) -> tuple[str, ...]:
    """In which a model is tried on a device: "full", and "as deployed" where PyTorch's settings let TF32 in."""
    coarse = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return ("full", "as deployed") if device.startswith("cuda") and coarse else ("full",)


class Where(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives its base class no types
    """Counts the operators that are called, and those whose results lie on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the same
        self.device, self.there, self.all = device, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if tensors := [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]:
            self.all += 1
            self.there += all(tensor.device.type == self.device.type for tensor in tensors)
        return returned


class TorchSession:
    """A model in its stored types on a device.

    jitter: a seed; one in twelve of its weights (see `weights`) is then moved to the next stored number, up or down. precision: "full",
    or "as deployed", with PyTorch's own settings for TF32. threads: while it runs; 0 leaves them as they are. placement: on another
    device than the CPU, after the first run, the operators that it called. Raises DeviceError where the device isn't there.
    """

    def __init__(
        self, traced: Traced, *, device: str = "cpu", jitter: int | None = None, precision: str = "full", threads: int = 0
    ) -> None:
        self.device = device_of(device)
        self.placement: Placement | None = None
        self._exact = precision == "full"
        self._threads = threads
        self._traced = traced
        if isinstance(traced.model, ExportedProgram):
            program, _ = without_observers(traced.model)
            if self.device.type != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, str(self.device))
            module: nn.Module = program.module()
            if jitter is not None or _updates(traced.program):
                module = duplicate(module)
        else:
            module = traced.model
            there = all(t.device == self.device for t in (*module.parameters(), *module.buffers()))
            changes = any(each.training for each in module.modules()) or observers(module) or _updates(traced.program)
            if jitter is not None or not there or changes:
                module = settled_quantisers(duplicate(module)).to(self.device)
        if jitter is not None:
            move_weights(module, weights(traced.program), jitter)
        self.module = module

    @property
    def specs(self) -> list[InputSpec]:
        return self._traced.specs

    def flat(self, item: Any) -> dict[str, Any] | None:
        """See `Traced.flat`."""
        return self._traced.flat(item)

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name. Raises DataError for feeds that don't fit."""
        check_feeds(feeds, self._traced.specs)
        call = self._traced.call({name: to_tensor(np.array(array)) for name, array in feeds.items()})
        where = Where(self.device) if self.placement is None and self.device.type != "cpu" else None
        with precise() if self._exact else torch.no_grad():
            try:
                with enough_memory(samples_of(feeds)), where or nullcontext(), _threads(self._threads):
                    returned = call.map_tensors(lambda tensor: tensor.to(self.device)).on(self.module)
            except OutOfMemoryError:
                raise
            except Exception as error:  # the model's code raises what it likes
                shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in feeds.items())
                raise run_failed(error, "the model", shapes, self.device) from None
        if where is not None:
            self.placement = Placement(where.there, where.all, "operators")
        return {name: to_numpy(tensor) for name, tensor in flat_outputs(returned).items()}


def run_failed(error: Exception, what: str, data: str, device: torch.device) -> BnfoldError:
    """What to raise where something can't be run on some data: DeviceError where it is the device that says so."""
    text = f"PyTorch can't run {what} on {data}: {first_line(error)}"
    if "device-side assert" not in text and _DEVICE.search(text):
        return DeviceError(f"{text}; see to device {device} and its driver, or take another device")
    return (UnsupportedError if "not implemented" in str(error) else DataError)(text)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for each operator, while this lasts; 0 for those that there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _updates(program: ExportedProgram) -> bool:
    """Whether a program writes into its buffers when it runs, such as running statistics in training mode."""
    written_to = {each.name for op in program.graph.nodes if mutates(op) for each in written(op)}
    trained = any(is_batchnorm(op) and in_training(op) for op in program.graph.nodes)
    return trained or bool(program.graph_signature.buffers_to_mutate) or not written_to.isdisjoint(stored_targets(program))


def seed_of(name: str, jitter: int) -> int:
    return zlib.crc32(f"{jitter} {name}".encode())


def move_weights(module: nn.Module, names: Iterable[str], seed: int) -> None:
    """Move one in twelve of the numbers of some of a module's tensors to the next stored number, up or down."""
    set_weights(module, module, names, lambda tensor, name: moved(tensor, seed_of(name, seed)))


def set_weights(module: nn.Module, source: nn.Module, names: Iterable[str], change: Callable[[Tensor, str], Tensor]) -> None:
    """Give some of a module's tensors the numbers that a change makes of those of another one, by their names."""
    done = set()
    with torch.no_grad():
        for name in sorted(names):
            try:
                tensor = attrgetter(name)(module)
            except AttributeError:  # a constant that the code makes afresh
                continue
            if id(tensor) in done:
                continue
            done.add(id(tensor))
            tensor.copy_(change(attrgetter(name)(source), name))


def moved(tensor: Tensor, seed: int) -> Tensor:
    """With one in twelve of its numbers moved to the next stored one, up or down."""
    draw = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.device)
    up, down = (torch.nextafter(tensor, torch.full_like(tensor, end)) for end in (float("inf"), float("-inf")))
    keep = (tensor == 0) | ~tensor.isfinite() | (draw >= MOVED)
    return torch.where(keep, tensor, torch.where(draw < MOVED / 2, up, down))

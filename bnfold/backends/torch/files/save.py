"""Write a PyTorch model, whole or not at all, in the form that the file's name asks for."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

from bnfold.backends.metadata import KEY, attach, text_of
from bnfold.capture import quiet
from bnfold.errors import CheckError, UnsupportedError, UsageError
from bnfold.files import HeldErrors, may_write, replacing
from bnfold.text import one_line

from ..export.sizes import fixed_axes, substituted
from ..export.trace import Traced, trace
from ..writing.surgery import ATTRIBUTE, Surgery
from .checkpoint import RECORD

if TYPE_CHECKING:
    import onnx_ir as ir

    from bnfold.report import VerifyReport

MADE_UP = re.compile(r"\bs\d+\b")  # a symbol of torch.export's
SUFFIXES = (".pt2", ".onnx", ".safetensors", ".pth", ".bin", ".ckpt", ".pt")


def save(
    model: nn.Module | ExportedProgram,
    path: str | Path,
    *,
    check: Callable[[Traced, ir.Model], VerifyReport],
    force: bool = False,
    example: Any = None,
    as_state: bool = False,
    plain_state: bool = False,
) -> None:
    """Write a model. By the suffix: .pt2 an exported program; .onnx, checked against the model; .safetensors, .pth, .bin and .ckpt a state
    dict, which of a folded network says what was folded; .pt the pickled module, or with `as_state` a state dict too.

    plain_state: a state dict says nothing else. example: how a module is called, for .pt2 and .onnx. check: holds an ONNX model against
    this one. Raises UsageError for another suffix, where the file exists without `force`, and where an exported program shall become a
    state dict; CheckError where the ONNX model isn't equivalent; InputError where it can't be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}")
    target = path.resolve() if path.is_symlink() else path
    may_write(target, force=force)
    if isinstance(model, ExportedProgram) and suffix not in (".pt2", ".onnx"):
        raise UsageError(f"{path}: an exported program is written as .pt2 or .onnx; for a state dict give the module")
    if suffix == ".onnx":
        _save_onnx(model, example, target, check)
        return
    if suffix == ".pt2":
        program = model if isinstance(model, ExportedProgram) else trace(model, example, patient=True).runnable
        with _written(target) as file, quiet():
            _write_program(program, file, _stated(model))
        return
    assert isinstance(model, nn.Module)
    if suffix == ".pt" and not as_state:
        with _written(target) as file:
            _write_pickle(model, file)
        return
    surgery = None if plain_state else getattr(model, ATTRIBUTE, None)
    dense = torch.contiguous_format if suffix == ".safetensors" else torch.preserve_format
    state = {name: tensor.detach().cpu().clone(memory_format=dense) for name, tensor in model.state_dict().items()}  # none share storage
    if suffix == ".safetensors":
        _save_safetensors(state, surgery, None if plain_state else text_of(model), target)
        return
    beside = {} if plain_state else ({} if surgery is None else {RECORD: surgery.to_dict()}) | _stated(model)
    with _written(target) as file:
        torch.save({"state_dict": state, **beside} if beside else state, file)


def reloaded(model: nn.Module | ExportedProgram, path: Path, *, as_state: bool) -> str:
    """How a folded state dict is loaded; "" for what else `save` writes."""
    suffix = path.suffix.lower()
    if not hasattr(model, ATTRIBUTE) or suffix in (".pt2", ".onnx") or (suffix == ".pt" and not as_state):
        return ""
    return (
        f"the weights, with what was folded: bnfold.load({path.name!r}, arch=...) makes the folded network from the class that was "
        "never folded; --plain-state writes the weights alone, for load_state_dict of a class without the BatchNorms"
    )


@contextlib.contextmanager
def _written(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes the target's place when it is whole. PyTorch's writer would end the process where the disk is full."""
    with replacing(target) as (part,), HeldErrors(part) as file:
        yield cast(IO[bytes], file)


def _stated(model: nn.Module | ExportedProgram) -> dict[str, str]:
    """The certificate by its key, where there is one."""
    text = text_of(model)
    return {} if text is None else {KEY: text}


def _write_program(program: ExportedProgram, file: IO[bytes], stated: dict[str, str]) -> None:
    try:
        torch.export.save(program, file, extra_files=stated or None)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # as it does on what a damaged file made it read
        raise UnsupportedError(f"torch.export can't write the program ({one_line(error)}); export the model again") from None


def _write_pickle(model: nn.Module, file: IO[bytes]) -> None:
    try:
        torch.save(model, file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # what pickle says of a function in a function, of a lock
        raise UnsupportedError(
            f"the module can't be pickled ({one_line(error)}); write its state dict (.safetensors, .pth) or a .pt2"
        ) from None


def _save_safetensors(state: dict[str, Tensor], surgery: Surgery | None, text: str | None, target: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"format": "pt"} | ({} if surgery is None else {RECORD: json.dumps(surgery.to_dict())})
    metadata |= {} if text is None else {KEY: text}
    with replacing(target) as (part,):
        try:
            save_file(state, part, metadata=metadata)
        except SafetensorError as error:
            raise OSError(one_line(error)) from None
        _in_order(part)


def _in_order(path: Path) -> None:
    """The metadata of a safetensors file by their names: its library writes them in another order each time."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _save_onnx(model: nn.Module | ExportedProgram, example: Any, target: Path, check: Callable[[Traced, ir.Model], VerifyReport]) -> None:
    """By torch's own exporter, without its optimiser, which would fold by rules of its own; then checked."""
    import onnx

    from bnfold.backends.onnx.files.load import from_proto
    from bnfold.backends.onnx.files.save import save as save_onnx
    from bnfold.backends.onnx.graph.edit import drop_void_biases

    traced = trace(model, example, patient=True)
    try:
        with quiet(), _kernels_at_hand(traced.runnable):
            made = torch.onnx.export(traced.runnable, dynamo=True, optimize=False, verbose=False)
    except ImportError as error:
        raise UnsupportedError(f"writing ONNX needs {error.name or 'onnxscript'}: pip install -U onnxscript, or write .pt2") from None
    except Exception as error:  # the exporter raises whatever its parts raise
        first: BaseException = error
        while first.__cause__ is not None:  # what the exporter raises last says in general what to do
            first = first.__cause__
        raise UnsupportedError(f"torch.onnx.export can't write this model: {one_line(first)}; write .pt2 instead") from error
    assert made is not None
    proto = made.model_proto
    assert isinstance(proto, onnx.ModelProto)
    converted = from_proto(proto)
    drop_void_biases(converted)
    _fix_axes(converted, fixed_axes(traced.program))
    attach(converted, text_of(model))
    checked = check(traced, converted)
    if checked.verdict == "different":
        raise CheckError(f"the ONNX model differs from the one in PyTorch, so it isn't written: {checked.reason}")
    save_onnx(converted, target, force=True)


@contextlib.contextmanager
def _kernels_at_hand(program: ExportedProgram) -> Iterator[None]:
    """Let the shapes of operators be found by running them, as torch.export finds those of fake quantisers: a loaded program forbids it."""
    modes = {v.fake_mode for op in program.graph.nodes if isinstance(v := op.meta.get("val"), FakeTensor)}
    before = {mode: mode.allow_fallback_kernels for mode in modes}
    for mode in modes:
        mode.allow_fallback_kernels = True
    try:
        yield
    finally:
        for mode, allowed in before.items():
            mode.allow_fallback_kernels = allowed


def _fix_axes(model: ir.Model, sizes: dict[str, int]) -> None:
    """State the size of axes that have one only (see `sizes`), and name the others by the inputs that have them: what the exporter makes up
    (s77) says nothing. sizes: by the axis's symbol."""
    import onnx_ir as ir

    from bnfold.backends.onnx.graph.walk import all_nodes

    graph = model.graph
    named: dict[str, str] = {}
    for value in (*graph.inputs, *graph.outputs, *(v for node in all_nodes(graph) for v in node.outputs)):
        if value.shape is not None:
            axes = [n if isinstance(n, int) else n.value for n in value.shape]
            found = [substituted(n, sizes) if isinstance(n, str) else n for n in axes]
            if value in graph.inputs:
                for axis, n in enumerate(found):
                    if isinstance(n, str) and MADE_UP.fullmatch(n):
                        named.setdefault(n, "batch" if not axis and "batch" not in named.values() else f"{value.name}_axis_{axis}")
            value.shape = ir.Shape([MADE_UP.sub(lambda m: named.get(m[0], m[0]), n) if isinstance(n, str) else n for n in found])

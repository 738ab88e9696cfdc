"""The kinds of models that bnfold serves: the one place that knows them. Each is imported when a model of its kind comes in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.errors import UnsupportedError, UsageError

from .kinds import check_readable, family, is_timm, kind_of

if TYPE_CHECKING:
    from bnfold.model import Model

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def load(path: Path, *, say: Any, **how: Any) -> Any:
    """The model in a file (see `api.load`)."""
    kind = kind_of(path)
    if kind == "onnx":
        from .onnx.files.load import load as load_onnx

        model = load_onnx(path)
        if how["arch"] is not None:
            say(f"{path}: an ONNX file holds its network, so --arch isn't used")
        return model
    try:
        from .torch.files.load import load as load_torch
    except ImportError as error:
        if error.name != "torch":
            raise
        raise UnsupportedError(f"{path}: a PyTorch file, which needs PyTorch: pip install torch onnxscript") from None
    return load_torch(path, kind, **how, say=say)


def open_model(model: Any, example: Any = None) -> Model:
    """What a caller gave, as the verbs see it.

    example: how a PyTorch module is called, where it doesn't say itself; or another model, as which it is called: of this very one, read
    already, that one comes back. Raises UsageError for a path, UnsupportedError for what is no model.
    """
    from bnfold.model import Model

    if isinstance(model, Model):
        return model
    if isinstance(example, Model) and example.source is model:
        return example
    if family(model) == "torch":
        from .torch.model import TorchModel

        return TorchModel(model, example)
    from .onnx.model import OnnxModel

    return OnnxModel(model)


def open_both(
    reference: Any, candidate: Any, batches: Any = None, input_shapes: Mapping[str, tuple[int, ...]] | None = None, example: Any = None
) -> tuple[Model, Model, Iterable[Any] | None]:
    """Two models that are compared, and the data, of which the first batch may have been looked at.

    What says nothing of its inputs is called as in the example, or as the other is, with the first batch, or with random data.
    """
    from bnfold.data.source import peek

    models = [open_model(reference, example), open_model(candidate, example)]
    first = None
    if example is None and batches is not None and any(model.is_unread for model in models):
        first, batches = peek(batches)
    for side in sorted((0, 1), key=lambda k: models[k].is_unread):
        model, other = models[side], models[1 - side]
        if not model.is_unread:
            continue
        if not other.is_unread and other.kind == model.kind:
            models[side] = model.called(other)
        elif example is None and first is not None:
            models[side] = model.fed(first)
        elif example is None:
            models[side] = model.called(None if other.is_unread else other, input_shapes)
        models[side].inputs()  # read now, for the other to follow
    return models[0], models[1], batches


def cpu_fallback(names: tuple[str, ...]) -> contextlib.AbstractContextManager[None]:
    """What of a model may run on the CPU, whatever the provider, while this lasts."""
    from .onnx.runtime.placement import cpu_fallback as allowed

    return allowed(names)


def suffixes(path: Path, *, checkpoint: bool) -> tuple[str, ...]:
    """How the name of what is made of the model in a file may end. checkpoint: whether it is said what builds its network."""
    kind = kind_of(path)
    if kind == "onnx" and (path.is_file() or not checkpoint) and path.suffix.lower() not in (*WEIGHTS, ".pt2"):
        return (".onnx",)  # a missing or damaged file of PyTorch's is for the loader to explain
    return (".pt2", ".onnx") if kind == "pt2" else (".pt2", ".onnx", *WEIGHTS)


def places(paths: Iterable[Path], providers: Sequence[str], device: str | None) -> tuple[str, ...]:
    """Where the models in some files run: ONNX Runtime's providers, PyTorch's device, or both, each looked for at once.

    Raises ModelError for a file that can't be read, of which nobody knows the kind.
    """
    kinds = set()
    for path in paths:
        if not is_timm(path):
            check_readable(path)
        kinds.add(kind_of(path) == "onnx")
    if device is not None and False not in kinds:
        raise UsageError(f"--device {device}: that is for PyTorch models; for ONNX give --provider")
    if providers and True not in kinds:
        raise UsageError(f"--provider {providers[0]}: that is for ONNX models; for PyTorch give --device")
    if True in kinds:
        from .onnx.runtime.providers import resolve

        for name in providers or ("cpu",):
            resolve(name)
    if device is not None:
        from .torch.runtime.session import device_of

        device_of(device)
    return tuple(dict.fromkeys([*providers, *([device] if device else [])])) or ("cpu",)


def providers() -> list[str]:
    """ONNX Runtime's, of those that it has here."""
    from .onnx.runtime.providers import runtime, short

    return [short(each) for each in runtime().get_available_providers()]

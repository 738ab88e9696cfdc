"""The library's verbs: each opens the models that it is given, makes one call, and gives back the same kind. None changes a model."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union

from .backends import open as backends
from .backends.kinds import local
from .certificates import certificate, folded, loaded, nothing_to_fold, recalibrated
from .errors import CheckError, ModelError, NothingToDoError
from .folding.options import FoldOptions
from .report import FuseReport, InspectReport, RecalibrateReport, VerifyReport

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    import torch

    from .model import Model
    from .recalibration.methods import Method

# What a caller may give, and, of a verb that makes a model, gets back: the same kind.
AnyModel = Union["onnx_ir.Model", "onnx.ModelProto", "torch.nn.Module", "torch.export.ExportedProgram", "Model"]
M = TypeVar("M", bound=AnyModel)
Progress = Callable[[str, int, "int | None"], None]


def load(
    path: str | Path,
    *,
    arch: str | Callable[..., Any] | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    ignore_keys: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
) -> Any:
    """The model in a file: an onnx_ir.Model, a torch.nn.Module in evaluation mode, or an ExportedProgram. The content tells, not the name.

    hf://OWNER/REPOSITORY/FILE is fetched by huggingface_hub, and timm:NAME is what timm makes of that name, with its pretrained weights.

    arch: what builds the network of a checkpoint, as "package.module:factory", "FILE.py:FACTORY" or the factory itself; arch_args: its
    arguments by name. trust_pickle: whether a file may be loaded that can run code. ignore_keys: patterns of names, as the shell's, that a
    checkpoint may hold though its architecture has no such weights. say: told what was found in a checkpoint, and where.
    Raises ModelError where the file can't be read, is unsafe, or doesn't fit; UnsupportedError for what isn't served.
    """
    how: dict[str, Any] = {"arch": arch, "arch_args": arch_args, "trust_pickle": trust_pickle, "ignore_keys": tuple(ignore_keys)}
    file = local(path)
    return loaded(backends.load(file, **how, say=say or (lambda text: None)), file)


def save(
    model: AnyModel, path: str | Path, *, force: bool = False, example: Any = None, as_state: bool = False, plain_state: bool = False
) -> list[Path]:
    """Write a model atomically, and say which files that were; an existing one is kept unless `force`.

    An ONNX model as .onnx; a PyTorch model by the suffix as .pt2, .onnx, .safetensors, .pth or .pt, for some of which a module needs an
    example of its input. as_state: whether .pt is a state dict, and not the module. plain_state: whether a state dict leaves out what was
    folded, by which `load` makes the folded network from the class that was never folded: then it is for a class without the BatchNorms.
    """
    return backends.open_model(model, example).save(path, force=force, as_state=as_state, plain_state=plain_state)


def inspect(model: AnyModel, *, example: Any = None, **options: Any) -> InspectReport:
    """What `fuse` would do with each BatchNorm, and why one would stay, and the certificate of a folded model. Nothing is changed.

    example, options: as for `fuse`.
    """
    start = time.perf_counter()
    opened = backends.open_model(model, example)
    fused, report = opened.folded(FoldOptions(**options))
    report = report.sized(opened.size(), fused.size())
    notes: tuple[str, ...] = ()
    try:
        found = certificate(opened.source)
    except ModelError as error:
        found, notes = None, (str(error),)
    if not report.layers and not report.batchnorms.before:
        notes += (nothing_to_fold(opened),)
    fields = {f.name: getattr(report, f.name) for f in dataclasses.fields(FuseReport)}
    return InspectReport(**{**fields, "notes": report.notes + notes, "certificate": found, "seconds": time.perf_counter() - start})


def fuse(
    model: M, *, example: Any = None, check: bool = True, by_layer: bool = False, graph: bool = False, **options: Any
) -> tuple[M, FuseReport]:
    """Fold every BatchNorm that can be folded exactly.

    model: an onnx_ir.Model or onnx.ModelProto; a torch.nn.Module, of which a copy comes back in which BatchNorms are Identity and the
    weights around are new, all else being as it was; or an ExportedProgram. example: a batch for the check; random inputs without it. A
    module's data flow is read by calling it with the example, so it needs one (a tensor, a tuple of arguments, a dict of them by name),
    unless it says itself what it takes. check: whether the result is verified (levels 1 and 2) before it is given back;
    by_layer: every layer, too, as in `verify`. graph: of a module comes back a torch.fx.GraphModule, as torch.export reads the module and
    for the sizes for which that holds, in which also parallel branches become one convolution (RepVGG, MobileOne, RepGhost); torch lets it
    stay in evaluation mode alone.
    options: what else may be done, all off: `clone`, `keep_per_tensor`, `clamps`, `norm_affine`, `drop_dead`,
    `merge_linear`, `equalise`, `lower`, `flush_subnormals`, `target` (see `folding.options.FoldOptions`).
    Raises NothingToDoError where the model holds no BatchNorm, UnsupportedError where torch.export can't read the module, and CheckError
    where the result fails its check.
    """
    opened = backends.open_model(model, example)
    source = opened.as_graph() if graph else opened
    fused, report = fold(source, FoldOptions(**options), example=example, check=check, by_layer=by_layer)
    made = opened.in_source_form(fused.source, changed=report.changes)
    if graph and report.changes:
        folded(opened.source, made, report)
    return made, report


def fold(
    model: Model, options: FoldOptions, *, example: Any = None, check: bool = True, by_layer: bool = False
) -> tuple[Model, FuseReport]:
    """As `fuse`, of a model as the verbs see it."""
    start = time.perf_counter()
    fused, report = model.folded(options)
    others = report.equalised or report.dropped or report.composed
    if report.batchnorms.before == 0 and not report.layers and not others:
        raise NothingToDoError(nothing_to_fold(model))
    if check and report.changes:
        from .verification.verify import check_fold

        checked = check_fold(model, fused, example, by_layer=by_layer)
        if checked.verdict == "different":
            raise CheckError(f"the folded model failed its check, so it is not given out: {checked.reason}")
        report = dataclasses.replace(report, verify=checked)
    if report.changes:
        folded(model.source, fused.source, report)
    report = dataclasses.replace(report, seconds=time.perf_counter() - start)
    return fused, report.sized(model.size(), fused.size())


def recalibrate(
    model: M,
    batches: Iterable[Any],
    *,
    method: str | Method = "exact",
    layers: Sequence[str] = (),
    skip_layers: Sequence[str] = (),
    freeze: bool = False,
    until: float | None = None,
    labelled: Any = None,
    example: Any = None,
    memory_budget: int = 1 << 30,
    batch_size: int | None = None,
    samples: int | None = None,
    provider: str = "cpu",
    device: str | None = None,
    allow_cpu_fallback: Iterable[str] = (),
    progress: Progress | bool | None = None,
    resume: str | Path | None = None,
) -> tuple[M, RecalibrateReport]:
    """Measure every BatchNorm's mean and variance afresh; by default exactly, layer by layer in one pass (lockstep).

    batches: an iterable of arrays or tensors, tuples or dicts by input name; labels may ride along. method: one of `methods.METHODS` by
    name, or with its settings, such as `methods.Prior(strength=32)`. layers, skip_layers: patterns of names, as the shell's; without any,
    all. freeze: BatchNorms in training mode, which have no statistics of their own, get them too. until: take so many samples that every
    channel's standard error of the mean is at most so many standard deviations. labelled: samples with labels, to score the model before
    and after, and to say in a word whether it improved. example: how a PyTorch module is called, where the first batch doesn't show it.
    memory_budget: bytes of activations to hold before they spill to disk. batch_size: how many samples go through
    the network at once, which changes nothing in the exact method. provider: of ONNX Runtime; device: "cpu" or "cuda", for PyTorch.
    allow_cpu_fallback: as for `verify`. resume: a folder in which what is measured is kept stage by stage; a call with the same model, data
    and settings goes on from what an earlier one left there, with a result that is the same to the bit, and any other is a UsageError.

    In a process of several that torchrun started (or with a torch.distributed process group), each gives the same data and measures its own
    share of the micro-batches; all get the result.

    Raises NothingToDoError where the model holds no BatchNorm, DataError where the data don't fit.
    """
    from .recalibration import recalibrate as calibration
    from .recalibration.methods import method as chosen

    opened = backends.open_model(model, example)
    target = calibration.Target(layers, skip_layers, freeze, place(opened, provider, device))
    with cpu_fallback(allow_cpu_fallback), _folded_already(opened):
        fresh, report = calibration.recalibrate(
            opened,
            batches,
            chosen(method),
            target,
            until=until,
            labelled=labelled,
            memory_budget=memory_budget,
            batch_size=batch_size,
            samples=samples,
            progress=told(progress),
            resume=None if resume is None else Path(resume),
        )
    return made(opened, fresh), report


def restore(model: M, before: str | Path | Mapping[str, Any], *, example: Any = None) -> tuple[M, list[str]]:
    """The model with its old statistics again, and the names of the layers that got them.

    before: the file that the command line kept beside a recalibrated model, or a report's `before`. Raises DataError where it is another
    model's.
    """
    from .recalibration import parts
    from .recalibration import statistics_file as kept_statistics

    old = kept_statistics.read(Path(before)) if isinstance(before, (str, Path)) else before
    opened = backends.open_model(model, example)
    fresh, names = parts.restore(opened, old)
    return made(opened, fresh), names


@contextlib.contextmanager
def _folded_already(model: Model) -> Iterator[None]:
    """What finds no BatchNorm says so of a model that bnfold folded."""
    try:
        yield
    except NothingToDoError:
        if certificate(model.source) is None:
            raise
        raise NothingToDoError(nothing_to_fold(model)) from None


def place(model: Model, provider: str, device: str | None) -> str:
    """Where it runs; of several processes on a machine with several GPUs, each on its own."""
    from .recalibration.distributed import local_rank

    chosen = model.place(provider, device)
    return f"{chosen}:{local_rank()}" if chosen == "cuda" and local_rank() else chosen


def made(model: Model, fresh: Model) -> Any:
    """The copy with new statistics, in the form in which the model came in."""
    return model.in_source_form(recalibrated(model.source, fresh.source))


def verify(
    reference: AnyModel,
    candidate: AnyModel,
    batches: Iterable[Any] | None = None,
    *,
    providers: Iterable[str] = ("cpu",),
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    example: Any = None,
    allow_cpu_fallback: Iterable[str] = (),
    progress: Progress | bool | None = None,
    bundle: Path | None = None,
    force: bool = False,
    coefficients_only: bool = False,
    map_inputs: Mapping[str, str] | None = None,
    map_outputs: Mapping[str, str] | None = None,
    by_layer: bool = False,
) -> VerifyReport:
    """Whether two models compute the same function: their coefficients, in float64, and as deployed (see `verification.verify`).

    batches: what to feed, as for `recalibrate`; random data of `input_shapes` (by input name) where it is None. samples: how many, a few
    where it is None. batch_size: at once. example: how a PyTorch module is called, as for `fuse`. bool(report) says whether they do.
    providers: of ONNX Runtime, each by its name, with options as "tensorrt:trt_fp16_enable=1"; or PyTorch's devices. allow_cpu_fallback:
    types or names of nodes that may run on the CPU where a provider leaves them to it; any other is a DeviceError.
    bundle: a folder into which, where they differ, goes what shows the first difference by itself; force: whatever is in it already.
    coefficients_only: the first level alone, which runs neither model. map_inputs, map_outputs: which of the candidate's is which of the
    reference's, by the reference's names; what isn't said is paired by name, or else by place, which a note tells. by_layer: compare every
    layer, too (`layers` and `graph` of the report). Raises DataError for data that don't fit, DeviceError for a provider that isn't there.
    """
    from .verification.verify import verify as verify_models

    first, second, batches = backends.open_both(reference, candidate, batches, input_shapes, example)
    with cpu_fallback(allow_cpu_fallback):
        return verify_models(
            first,
            second,
            batches,
            providers=tuple(providers),
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            input_shapes=None if input_shapes is None else dict(input_shapes),
            progress=told(progress),
            bundle=None if bundle is None else Path(bundle),
            force=force,
            coefficients_only=coefficients_only,
            map_inputs=map_inputs,
            map_outputs=map_outputs,
            by_layer=by_layer,
        )


def told(progress: Progress | bool | None) -> Progress | None:
    """What is told of progress; True is for `bnfold.library`, which makes of it what shows the stages."""
    return None if isinstance(progress, bool) else progress


def cpu_fallback(names: Iterable[str]) -> contextlib.AbstractContextManager[None]:
    """What of a model may run on the CPU, whatever the provider, while this lasts."""
    return backends.cpu_fallback(names) if (names := tuple(names)) else contextlib.nullcontext()

"""The options of models: how their files are read, and where they run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfold import api
from bnfold.backends.metadata import files_of
from bnfold.backends.open import places, suffixes
from bnfold.errors import UsageError

from ..job import Job
from . import MODELS, json_object, option


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How model files are read."""

    arch: str | None = option("--arch", "What builds the network of a checkpoint; FILE.py:FACTORY too.", MODELS, "MODULE:FACTORY")
    arch_args: dict[str, Any] | None = option("--arch-args", "The arguments of --arch.", MODELS, "JSON", read=json_object)
    trust_pickle: bool = option("--trust-pickle", "Load files that can run code.", MODELS)
    ignore_keys: list[str] | None = option(
        "--ignore-keys", "Keys of a checkpoint to pass over, which --arch has no weights for; repeatable.", MODELS, "PATTERN"
    )

    def load(self, path: Path, job: Job) -> Any:
        """The model in a file, which goes into the report."""
        ignored = tuple(self.ignore_keys or ())
        model = api.load(
            path, arch=self.arch, arch_args=self.arch_args, trust_pickle=self.trust_pickle, ignore_keys=ignored, say=job.remark
        )
        if job.reports:
            job.came_in(*files_of(model, path))
        return model

    def suffixes(self, path: Path) -> tuple[str, ...]:
        """How the name of what is made of this model may end."""
        return suffixes(path, checkpoint=self.arch is not None)

    def save(self, model: Any, path: Path, job: Job, example: Any) -> None:
        """Write a model; a .pt file is a whole module only where one came in."""
        api.save(model, path, force=job.force, example=example, as_state=self.arch is not None)


@dataclass(frozen=True, kw_only=True)
class Running:
    """Where models run."""

    device: str | None = option("--device", "For PyTorch models.", MODELS, "cpu|cuda")
    provider: list[str] | None = option(
        "--provider",
        "ONNX Runtime's execution provider: cpu (default), cuda, tensorrt:trt_fp16_enable=1, openvino, ...; repeatable.",
        MODELS,
        "NAME[:OPTION=VALUE,...]",
    )
    allow_cpu_fallback: list[str] | None = option(
        "--allow-cpu-fallback",
        "What may run on the CPU where the provider has no kernel for it; repeatable. Anything else ends the run.",
        MODELS,
        "OPERATOR|NODE",
    )

    def providers(self, *paths: Path) -> tuple[str, ...]:
        """Where the models in these files run: ONNX Runtime's providers, PyTorch's device, or both, each looked for at once."""
        return places(paths, self.provider or (), self.device)

    def fallback(self) -> AbstractContextManager[None]:
        """What of a model may run on the CPU, while this lasts."""
        return api.cpu_fallback(self.allow_cpu_fallback or ())

    def one_provider(self, *paths: Path) -> str:
        """The same, where there can be only one."""
        if len(self.provider or ()) > 1:
            raise UsageError(f"--provider {' --provider '.join(self.provider or ())}: this command takes one")
        return self.providers(*paths)[-1]

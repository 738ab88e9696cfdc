"""ONNX Runtime's execution providers: their names and options, a session that runs on the one asked for, and which nodes really do.

The provider that was asked for is the one that runs, or there is a `DeviceError`: ONNX Runtime itself drops a provider that it can't load
and carries on on the CPU, and so it does with every node that the provider has no kernel for. What it prints meanwhile becomes part of
the reason (see `capture`).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bnfold.capture import overhearing, without_telemetry
from bnfold.data.memory import out_of_memory
from bnfold.data.spec import shape_text
from bnfold.errors import DataError, DeviceError, UnsupportedError, UsageError
from bnfold.text import listed

CPU = "CPUExecutionProvider"
# Where in ONNX Runtime's sources something was said: file, line, and the function's whole signature.
SOURCE = re.compile(r"\S+\.(?:cc|cpp|h):\d+ (?:[^()\[\]]*\([^()]*(?:\([^()]*\)[^()]*)*\)(?: const)?(?: \[with [^\]]*\])?:? )?")

_ALIASES = {"directml": "dml", "trt": "tensorrt", "gpu": "cuda", "amd": "migraphx", "onednn": "dnnl", "trtrtx": "nvtensorrtrtx"}
_WHEELS = {
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu (and TensorRT)",
    "nvtensorrtrtx": "onnxruntime-trt-rtx",
    "openvino": "onnxruntime-openvino",
    "dml": "onnxruntime-directml",
    "rocm": "onnxruntime-rocm",
    "migraphx": "onnxruntime-migraphx",
    "qnn": "'onnxruntime-qnn<2'",  # from 2 on it is a plugin for the plain wheel, which no provider's name calls
    "cann": "onnxruntime-cann",
    "webgpu": "onnxruntime-webgpu",
}
# With float32 in full. For TensorRT's own kernels only the driver's switch helps, NVIDIA_TF32_OVERRIDE=0.
_FULL = {"cuda": {"use_tf32": "0"}, "openvino": {"precision": "FP32"}}
# What runs the operators that the provider doesn't have.
_BENEATH = dict.fromkeys(("tensorrt", "nvtensorrtrtx"), ("CUDAExecutionProvider",))
# ROCm left the list of names in ONNX Runtime 1.24, and is still in use with older ones.
_FORMER = ("ROCMExecutionProvider",)


def runtime() -> Any:
    """ONNX Runtime. It looks for devices when it is imported, and prints what it misses.

    From 1.31 on it would keep a database of what it is used for in the user's home, from its import on, and send it: that is switched off.
    """
    if "onnxruntime" not in sys.modules:
        with overhearing(), without_telemetry():
            importlib.import_module("onnxruntime").disable_telemetry_events()
    return sys.modules["onnxruntime"]


# --- names and options ----------------------------------------------------------------------------------------------------------------


def parse(provider: str) -> tuple[str, dict[str, str]]:
    """The name, and the options of "NAME:key=value,key=value"; "NAME:1" is the device of that number. Values may hold commas and colons."""
    name, colon, rest = provider.partition(":")
    if not colon:
        return name, {}
    if rest.isdigit():
        return name, {"device_id": rest}
    options = {}
    for part in re.split(r",(?=\s*\w+=)", rest):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"provider {provider!r}: {part!r} is no option; write them like {name}:key=value,key=value")
        options[key.strip()] = value.strip()
    return name, options


def resolve(provider: str) -> str:
    """ONNX Runtime's name of a provider that is built in. UsageError: nobody knows it. DeviceError: this build hasn't got it."""
    ort = runtime()
    name, _ = parse(provider)
    known = {short(each): each for each in (*ort.get_all_providers(), *_FORMER, *ort.get_available_providers())}
    asked = short(name)
    asked = _ALIASES.get(asked, asked)
    if asked not in known:
        close = difflib.get_close_matches(asked, known, n=3, cutoff=0.5)
        hint = f"did you mean {listed(close, 'or')}?" if close else f"ONNX Runtime knows {listed(known)}"
        raise UsageError(f"no execution provider is called {name!r}; {hint}")
    full: str = known[asked]
    available = ort.get_available_providers()
    if full not in available:
        have = listed(short(p) for p in available)
        raise DeviceError(f"execution provider {asked} is not in this ONNX Runtime {ort.__version__}, which has {have}; {_advice(full)}")
    return full


def precisions(provider: str) -> tuple[str, ...]:
    """In which a model is tried there: "full", with float32 in full, and "as deployed", where the provider by itself rounds coarser.

    "as deployed" alone where there is no switch for it, or the options say how to compute.
    """
    name, options = parse(provider)
    asked = _ALIASES.get(short(name), short(name))
    no_tf32 = os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"
    if asked == "cuda":
        return ("full",) if no_tf32 else ("full", "as deployed")
    if asked == "openvino":
        plain = options.get("device_type", "CPU").upper() == "CPU" and not {"precision", "load_config"} & options.keys()
        return ("full",) if plain else ("as deployed",)
    coarse = any(key.endswith(("fp16_enable", "bf16_enable", "int8_enable")) for key in options)
    return ("full",) if asked == "cpu" or (asked == "tensorrt" and no_tf32 and not coarse) else ("as deployed",)


def _chain(provider: str, precision: str) -> list[tuple[str, dict[str, str]]]:
    """What ONNX Runtime is given: the provider with its options, and what runs beneath it."""
    ort = runtime()
    full = resolve(provider)
    chain = [(full, parse(provider)[1]), *((name, {}) for name in _BENEATH.get(short(full), ()))]
    exact = precision == "full" and precisions(provider) != ("as deployed",)
    return [(p, {**o, **(_FULL.get(short(p), {}) if exact else {})}) for p, o in chain if p in ort.get_available_providers()]


# --- a session ------------------------------------------------------------------------------------------------------------------------


def settings(*, optimise: bool = False, threads: int = 0) -> Any:
    """The options of a session that gives the same each time. optimise: by all of ONNX Runtime's graph optimisations, or none."""
    ort = runtime()
    made, level = ort.SessionOptions(), ort.GraphOptimizationLevel
    made.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    made.use_deterministic_compute = True
    made.intra_op_num_threads = threads
    return made


def start(source: bytes | str, options: Any, provider: str, *, precision: str = "full") -> Any:
    """A session on the provider. DeviceError: it doesn't start, or isn't honoured. UnsupportedError: the model can't run there.

    options: of the session; what it logs is heard. Whether single nodes fell to the CPU is for `placed` to say.
    """
    ort = runtime()
    full, chain = resolve(provider), _chain(provider, precision)
    ort.set_default_logger_severity(2)  # warnings: the reason why a provider was dropped is in them
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    with overhearing() as hearing:
        if any(short(name) in ("cuda", "tensorrt") for name, _ in chain) and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # the libraries of the wheels nvidia-*, which the loader doesn't find by itself
        try:
            # Without fallback: else ONNX Runtime prints to standard output and tries again on the CPU.
            session, failed = ort.InferenceSession(source, options, providers=chain, enable_fallback=0), None
        except Exception as error:  # onnxruntime raises its own classes, which share no base but Exception
            session, failed = None, error
    if failed is not None:
        text = runtime_message(failed)
        if full != CPU and type(failed).__name__ not in ("InvalidGraph", "InvalidProtobuf", "NotImplemented", "InvalidArgument"):
            raise DeviceError(
                f"execution provider {short(full)} could not start: {text}{_logged(hearing.errors(), text)}; {_advice(full, built_in=True)}"
            ) from None
        raise UnsupportedError(f"ONNX Runtime can't run this model: {text}") from None
    running = session.get_providers()
    if full not in running:
        raise DeviceError(
            f"execution provider {short(full)} is built in but ONNX Runtime dropped it and would run on "
            f"{listed(map(short, running))} instead: its libraries don't load here, or there is no such device"
            f"{_logged(hearing.errors(), '')}; {_advice(full, built_in=True)}"
        )
    session.disable_fallback()
    return session


def run_failed(error: Exception, provider: str, feeds: Mapping[str, np.ndarray], on_cpu: Callable[[], object]) -> Exception:
    """What to raise for a run that failed: MemoryError; DeviceError where the CPU does the same without fail; else DataError.

    on_cpu: runs the same there.
    """
    text, name = runtime_message(error), resolve(provider)
    if out_of_memory(error):
        return MemoryError(text)
    shapes = ", ".join(f"{key} {shape_text(array.shape)}" for key, array in feeds.items())
    if name != CPU:
        with contextlib.suppress(Exception):  # onnxruntime's classes share no other base
            on_cpu()
            return DeviceError(
                f"execution provider {short(name)} failed on {shapes}, which the CPU runs: {text}; "
                f"{_advice(name, built_in=True)}, or take another provider"
            )
    return DataError(f"ONNX Runtime can't run the model on {shapes}: {text}")


def runtime_message(error: BaseException | str, limit: int = 300) -> str:
    """The message in one line, without ONNX Runtime's prefix of its status code."""
    text = " ".join(str(error).split())
    text = SOURCE.sub("", text) or text
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _logged(lines: list[str], already: str) -> str:
    """What the runtime printed, for the end of a reason."""
    messages = (runtime_message(line, 1 << 16) for line in lines)
    fresh = "; ".join(dict.fromkeys(line for line in messages if line and line not in already))
    if not fresh:
        return ""
    return f" (it says: {fresh if len(fresh) <= 400 else fresh[:399] + '…'})"


# --- words ----------------------------------------------------------------------------------------------------------------------------


def short(name: str) -> str:
    """ "cuda" of "CUDAExecutionProvider"."""
    return name.lower().removesuffix("executionprovider")


def _advice(name: str, *, built_in: bool = False) -> str:
    guide = "https://onnxruntime.ai/docs/execution-providers"
    if built_in:
        return f"see to its libraries, its driver and the options given, as {guide} says"
    asked = short(name)
    if asked == "coreml":
        return "it comes with the onnxruntime wheel for macOS"
    if asked not in _WHEELS:
        return f"it needs an ONNX Runtime that is built with it ({guide})"
    return f"pip uninstall onnxruntime, then pip install {_WHEELS[asked]}, and its libraries as {guide} says"

"""ONNX Runtime's execution providers: their names and options, a session that runs on the one asked for, and which nodes really do.

The provider that was asked for is the one that runs, or there is a `DeviceError`: ONNX Runtime itself drops a provider that it can't load
and carries on on the CPU, and so it does with every node that the provider has no kernel for. What it prints meanwhile becomes part of
the reason (see `capture`).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from bnfold.capture import overhearing
from bnfold.errors import DeviceError, UnsupportedError, UsageError
from bnfold.model import Placement
from bnfold.text import listed

CPU = "CPUExecutionProvider"
SHOWN = 3  # nodes that a message names
# How the types or names of nodes begin that ONNX Runtime itself puts between others.
INSERTED = ("Memcpy", "ReorderInput", "ReorderOutput", "InsertedPrecisionFreeCast", "InsertedCast")
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
_BENEATH = {"tensorrt": ("cuda",), "nvtensorrtrtx": ("cuda",)}  # what runs the operators that the provider doesn't have
# ROCm left the list of names in ONNX Runtime 1.24, and is still in use with older ones.
_FORMER = ("ROCMExecutionProvider",)
_FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}

_allowed: ContextVar[frozenset[str]] = ContextVar("allowed_on_the_cpu", default=frozenset())


@contextlib.contextmanager
def cpu_fallback(names: Iterable[str]) -> Iterator[None]:
    """Let nodes of these operator types or names run on the CPU, whatever the provider."""
    token = _allowed.set(frozenset(names))
    try:
        yield
    finally:
        _allowed.reset(token)


def runtime() -> Any:
    """ONNX Runtime. It looks for devices when it is imported, and prints what it misses."""
    if "onnxruntime" not in sys.modules:
        with overhearing():
            importlib.import_module("onnxruntime")
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
    chain = [(full, parse(provider)[1]), *((name, {}) for name in map(_full_name, _BENEATH.get(short(full), ())))]
    exact = precision == "full" and precisions(provider) != ("as deployed",)
    return [(p, {**o, **(_FULL.get(short(p), {}) if exact else {})}) for p, o in chain if p in ort.get_available_providers()]


# --- a session ------------------------------------------------------------------------------------------------------------------------


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
        text = one_line(failed)
        if full != CPU and type(failed).__name__ not in ("InvalidGraph", "InvalidProtobuf", "NotImplemented", "InvalidArgument"):
            raise DeviceError(
                f"execution provider {short(full)} could not start: {text}{_said(hearing.errors(), text)}; {_advice(full, built_in=True)}"
            ) from None
        raise UnsupportedError(f"ONNX Runtime can't run this model: {text}") from None
    running = session.get_providers()
    if full not in running:
        raise DeviceError(
            f"execution provider {short(full)} is built in but ONNX Runtime dropped it and would run on "
            f"{listed(map(short, running))} instead: its libraries don't load here, or there is no such device"
            f"{_said(hearing.errors(), '')}; {_advice(full, built_in=True)}"
        )
    session.disable_fallback()
    return session


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The message in one line, without ONNX Runtime's prefix of its status code."""
    text = " ".join(str(error).split())
    text = SOURCE.sub("", text) or text
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _said(lines: list[str], already: str, limit: int = 400) -> str:
    """What the runtime printed, for the end of a reason."""
    told = (one_line(line, 1 << 16) for line in lines)
    fresh = "; ".join(dict.fromkeys(line for line in told if line and line not in already))
    if not fresh:
        return ""
    return f" (it says: {fresh if len(fresh) <= limit else fresh[: limit - 1] + '…'})"


# --- which nodes run where ------------------------------------------------------------------------------------------------------------


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own, so that what is said of it can be told."""
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            name = f"{node.name or node.op_type}_{number}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
        seen.add(node.name)


def assigned(session: Any, provider: str) -> Placement | None:
    """Which nodes are on the provider, from the session itself; None where this ONNX Runtime can't say (before 1.24)."""
    try:
        parts = list(session.get_provider_graph_assignment_info())
    except Exception:  # it isn't there, or says that nothing was recorded
        return None
    nodes = [(part.ep_name, node.op_type, node.name) for part in parts for node in part.get_nodes()]
    return _placement(nodes, resolve(provider), "session") if nodes else None


def profiled(path: str, provider: str) -> Placement | None:
    """The same from the profile of one run, in which a part that a provider took over whole counts as one node. The file is removed."""
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))
        os.unlink(path)
    except (OSError, ValueError):
        return None
    suffix = "_kernel_time"
    found = {
        event["name"]: (event["args"]["provider"], event["args"].get("op_name", ""), event["name"].removesuffix(suffix))
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(suffix) and event.get("args", {}).get("provider")
    }
    return _placement(list(found.values()), resolve(provider), "profile") if found else None


def _placement(nodes: list[tuple[str, str, str]], full: str, source: str) -> Placement:
    on_cpu = () if full == CPU else tuple((op, name) for where, op, name in nodes if where == CPU)
    return Placement(sum(where == full for where, *_ in nodes), len(nodes), source, on_cpu)


def honoured(placement: Placement | None, provider: str, graph: Callable[[], onnx.ModelProto]) -> None:
    """Raise DeviceError where compute nodes are left to the CPU that nobody allowed to. graph: the model, for the types of its values.

    A compute node is one with a floating-point output, or an output whose type can't be told; what only works out shapes and indices is
    the CPU's by ONNX Runtime's own choice.
    """
    if placement is None:
        return
    allowed = _allowed.get()
    left = [(op, name) for op, name in placement.on_cpu if not {op, op.removeprefix("Fused"), name} & allowed]
    left = [(op, name) for op, name in left if not op.startswith(INSERTED) and not name.startswith(INSERTED)]
    if left:
        idle = _without_floats(graph())
        left = [(op, name) for op, name in left if name not in idle]
    if not left:
        return
    by_type = Counter(op for op, _ in left)
    names = [f"{op} {name!r}" for op, name in left[:SHOWN]]
    more = f" and {len(left) - SHOWN:,} more" if len(left) > SHOWN else ""
    allow = " ".join(f"--allow-cpu-fallback {op}" for op in by_type)
    raise DeviceError(
        f"execution provider {provider} leaves {len(left):,} of {placement.of:,} nodes to the CPU: {', '.join(names)}{more}; "
        f"allow them by type or name, with {allow}, or take another provider"
    )


def _without_floats(proto: onnx.ModelProto) -> set[str]:
    """The names, as `name_nodes` gives them, of the nodes that are known to compute no floating-point number."""
    name_nodes(proto.graph)
    known = {info.name: info.type.tensor_type.elem_type for info in _inferred(proto)}
    found = set()
    for node in proto.graph.node:
        kinds = {known.get(name, 0) for name in node.output if name}
        if 0 not in kinds and not kinds & _FLOATS:
            found.add(node.name)
    return found


def _inferred(proto: onnx.ModelProto) -> Iterable[onnx.ValueInfoProto]:
    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except Exception:  # past 2 GB, or an operator that it stumbles on
        graph = proto.graph
    return (*graph.value_info, *graph.input, *graph.output)


# --- words ----------------------------------------------------------------------------------------------------------------------------


def short(name: str) -> str:
    """ "cuda" of "CUDAExecutionProvider"."""
    return name.lower().removesuffix("executionprovider")


def _full_name(short_name: str) -> str:
    ort = runtime()

    return next((name for name in ort.get_all_providers() if short(name) == short_name), short_name)


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

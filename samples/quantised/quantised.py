"""Handwritten digits in integers: what folding, equalising and recalibrating do to networks with weights of few bits.

    pip install torch onnx scikit-learn
    python samples/quantised/quantised.py [--seeds N]

trains small networks, stores their weights as integers behind DequantizeLinear, and scores the ONNX files with ONNX Runtime: as trained,
with BatchNorms folded first, with ranges equalised too, and with the statistics measured again behind the integers and then folded into
their scales. Then it spreads the ranges of one network's channels, to see from where on int8 with one scale for a tensor loses accuracy,
and quantises a network whose BatchNorms stand behind ReLU with ONNX Runtime's own quantiser. Prints three tables, in two minutes or so.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.preprocess import quant_pre_process
from torch import Tensor, nn

import bnfold

sys.path.append(str(Path(__file__).resolve().parents[1] / "digits"))
from train import digits, export

EPOCHS, BATCH, LEARNING_RATE = 6, 32, 0.003
BITS = (4, 3)
NETWORKS = {"ReLU": (nn.ReLU, False), "ReLU6": (nn.ReLU6, False), "ReLU, depthwise": (nn.ReLU, True), "ReLU6, depthwise": (nn.ReLU6, True)}
WAYS = ("quantised", "folded, quantised", "folded, equalised, quantised", "quantised, recalibrated, folded")
SPREADS = (0, 0.5, 1, 1.25, 1.5, 1.75, 2)  # octaves: the standard deviation of what channels are multiplied by
CALIBRATION = 512  # images
PREPARED = ("as it is", "bnfold fuse", "bnfold fuse --equalise")


class Network(nn.Sequential):
    """Images (N, 1, 8, 8) to logits (N, 10): four convolutions with BatchNorms, or, depthwise, seven."""

    def __init__(self, activation: type[nn.Module], depthwise: bool) -> None:
        def layer(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
            return [conv, nn.BatchNorm2d(c_out), activation()]

        layers = layer(1, 16)
        for c_in, c_out, stride in ((16, 32, 2), (32, 32, 1), (32, 32, 2)):
            if depthwise:
                layers += [*layer(c_in, c_in, stride=stride, groups=c_in), *layer(c_in, c_out, 1)]
            else:
                layers += layer(c_in, c_out, stride=stride)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class PreActivated(nn.Sequential):
    """The same with the BatchNorms behind the activations, and without padding."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for c_in, c_out in ((1, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(c_in, c_out, 3), nn.ReLU(), nn.BatchNorm2d(c_out)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def trained(model: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """The network, trained as usual."""
    steps = EPOCHS * (len(x) // BATCH)
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            if len(batch) == BATCH:
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimiser.step()
                schedule.step()
    return model.eval()


def exported(model: nn.Module) -> onnx.ModelProto:
    """The network as an ONNX model with its BatchNorms, in the first operator set that stores four bits."""
    with tempfile.TemporaryDirectory() as folder:
        export(model, path := Path(folder, "net.onnx"))
        return onnx.version_converter.convert_version(onnx.load(path), 21)


def quantised(model: onnx.ModelProto, bits: int, *, per_channel: bool) -> onnx.ModelProto:
    """The model with the weights of its layers as integers behind DequantizeLinear, rounded to nearest; biases and the rest stay floats.

    Three bits are stored as four, of which -4 to 3 are used.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    for node in [node for node in graph.node if node.op_type in ("Conv", "Gemm")]:
        name = node.input[1]
        weight = numpy_helper.to_array(stored[name])
        largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)) if per_channel else None, keepdims=per_channel)
        scale = np.maximum(largest, 1e-12) / (2 ** (bits - 1) - 1)
        codes = np.round(weight / scale).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        kind = ml_dtypes.int4 if bits <= 4 else np.int8
        graph.initializer.append(numpy_helper.from_array(codes.astype(kind), f"{name}.codes"))
        graph.initializer.append(numpy_helper.from_array(np.asarray(scale, np.float32).reshape([-1] * per_channel), f"{name}.scale"))
        made = onnx.helper.make_node("DequantizeLinear", [f"{name}.codes", f"{name}.scale"], [f"{name}.float"], axis=0)
        graph.node.insert(0, made)
        node.input[1] = f"{name}.float"
        graph.initializer.remove(stored[name])
    return model


def codes(model: onnx.ModelProto) -> dict[str, bytes]:
    """The integers of the weights, by the layer that reads them."""
    stored = {t.name: t for t in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    layers = (node for node in model.graph.node if node.op_type in ("Conv", "Gemm"))
    return {node.output[0]: numpy_helper.to_array(stored[made[node.input[1]].input[0]]).tobytes() for node in layers}


def accuracy(model: onnx.ModelProto, x: Tensor, y: Tensor) -> float:
    """The share of images that the file gets right in ONNX Runtime."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": x.numpy()})[0]
    return float((np.asarray(found).argmax(1) == y.numpy()).mean())


def ways(model: onnx.ModelProto, images: np.ndarray, bits: int, *, per_channel: bool) -> Iterator[onnx.ModelProto]:
    """The files in integers, in the order of WAYS."""
    yield quantised(model, bits, per_channel=per_channel)
    for equalise in (False, True):
        yield quantised(bnfold.fuse(model, equalise=equalise)[0], bits, per_channel=per_channel)
    stored = quantised(model, bits, per_channel=per_channel)
    ready, _ = bnfold.pipeline(stored, [images], strict=True)
    assert ready is not None
    assert codes(ready) == codes(stored)
    yield ready


def experiment(seeds: int) -> dict[tuple[str, int, bool], list[list[float]]]:
    """For each network, number of bits, and whether per channel: for each seed the accuracy in float, and of each way."""
    x, y, x_test, y_test = digits()
    images = x[:CALIBRATION].numpy()
    found: dict[tuple[str, int, bool], list[list[float]]] = {}
    for name, (activation, depthwise) in NETWORKS.items():
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = exported(trained(Network(activation, depthwise), x, y))
            for bits in BITS:
                for per_channel in (False, True):
                    files = [model, *ways(model, images, bits, per_channel=per_channel)]
                    found.setdefault((name, bits, per_channel), []).append([accuracy(each, x_test, y_test) for each in files])
    return found


# --- what ranges cost in int8 with one scale ------------------------------------------------------------------------------------------


def spread(model: nn.Module, octaves: float) -> onnx.ModelProto:
    """The same function, with the ranges of channels spread: what a BatchNorm puts out is multiplied, what the next layer reads divided."""
    model = copy.deepcopy(model)
    layers = [each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))]
    with torch.no_grad():
        for norm, reader in zip(layers[1::2], layers[2::2], strict=True):
            factors = 2 ** (octaves * torch.randn(norm.num_features))
            norm.weight *= factors
            norm.bias *= factors
            reader.weight /= factors.reshape(1, -1, *(1,) * (reader.weight.ndim - 2))
    return exported(model)


def spreads(seeds: int) -> dict[float, list[tuple[float, float, int, float]]]:
    """For each spread, a seed each: the largest range over the median and the error that bnfold reports, both of the worst layer; how many
    layers it warns of; the accuracy in int8 with one scale a tensor."""
    x, y, x_test, y_test = digits()
    found: dict[float, list[tuple[float, float, int, float]]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = trained(Network(nn.ReLU, False), x, y)
        for octaves in SPREADS:
            folded, report = bnfold.fuse(spread(model, octaves))
            score = accuracy(quantised(folded, 8, per_channel=False), x_test, y_test)
            ratio, error = max(each.after for each in report.ranges), max(each.error for each in report.ranges)
            found.setdefault(octaves, []).append((ratio, error, sum(bool(each.warning) for each in report.ranges), score))
    return found


# --- ONNX Runtime's quantiser ---------------------------------------------------------------------------------------------------------


class Images(CalibrationDataReader):  # type: ignore[misc]  # it comes without types
    """Batches for ONNX Runtime's calibration."""

    def __init__(self, images: np.ndarray) -> None:
        self._batches = iter([{"image": batch} for batch in np.array_split(images, 8)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def statically_quantised(model: onnx.ModelProto, images: np.ndarray, *, per_channel: bool) -> onnx.ModelProto:
    """ONNX Runtime's own recipe: its preprocessing, then weights and activations of eight bits."""
    with tempfile.TemporaryDirectory() as folder:
        source, ready, target = (Path(folder) / f"{name}.onnx" for name in ("source", "ready", "target"))
        onnx.save(model, source)
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        how = {"quant_format": QuantFormat.QOperator, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(ready, target, Images(images), per_channel=per_channel, **how)
        return onnx.load(target)


def in_float(model: onnx.ModelProto) -> dict[str, int]:
    """The operators that compute in floats."""
    kinds = (node.op_type for node in model.graph.node if not node.op_type.startswith(("Q", "DequantizeLinear", "Flatten")))
    return dict(Counter(kinds))


def recipe(seeds: int) -> dict[tuple[str, bool], list[tuple[float, float, dict[str, int]]]]:
    """For each way to prepare the network, and whether per channel: for each seed the accuracy in float and in integers, and what of it
    computes in floats."""
    x, y, x_test, y_test = digits()
    found: dict[tuple[str, bool], list[tuple[float, float, dict[str, int]]]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = exported(trained(PreActivated(), x, y))
        prepared = [model, *(bnfold.fuse(model, equalise=equalise)[0] for equalise in (False, True))]
        for name, each in zip(PREPARED, prepared, strict=True):
            for per_channel in (False, True):
                integers = statically_quantised(each, x[:CALIBRATION].numpy(), per_channel=per_channel)
                scores = accuracy(model, x_test, y_test), accuracy(integers, x_test, y_test)
                found.setdefault((name, per_channel), []).append((*scores, in_float(integers)))
    return found


# --- tables ---------------------------------------------------------------------------------------------------------------------------


def mean(scores: Iterable[float], form: str = ".1%") -> str:
    """The mean, and the least and the largest of the seeds."""
    found = list(scores)
    return f"{np.mean(found):{form}} ({min(found):{form}} to {max(found):{form}})"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (titles, ["---"] * len(titles), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(seeds: int) -> Iterator[str]:
    rows = []
    for (name, bits, per_channel), scores in experiment(seeds).items():
        rows.append([name, f"{bits}, {'channel' if per_channel else 'tensor'}", *map(mean, zip(*scores, strict=True))])
    yield table(("network", "bits, a scale for each", "float", *WAYS), rows)
    rows = []
    for octaves, found in spreads(seeds).items():
        ratios, errors, warned, scores = zip(*found, strict=True)
        rows.append([f"{octaves:g}", mean(ratios, ".3g"), mean(errors, ".0%"), f"{np.mean(warned):.1f}", mean(scores)])
    yield table(("spread, octaves", "largest over median", "weights off by", "layers warned of", "accuracy in int8"), rows)
    rows = []
    for (name, per_channel), results in recipe(seeds).items():
        floats, scores, left = zip(*results, strict=True)
        kinds = ", ".join(f"{count} {kind}" for kind, count in left[0].items()) or "none"
        rows.append([name, "channel" if per_channel else "tensor", mean(floats), mean(scores), kinds])
    yield table(("before quantize_static", "a scale for each", "float", "in integers", "operators left in floats"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score networks in integers.")
    parser.add_argument("--seeds", type=int, default=3)
    torch.set_num_threads(1)  # so that sums are always added in the same order
    for each in tables(parser.parse_args().seeds):
        print(each, end="\n\n", flush=True)


if __name__ == "__main__":
    main()

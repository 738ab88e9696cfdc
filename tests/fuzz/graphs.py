"""Random networks, folded with random options and compared: the hunt for what nobody thought of.

Weights and data of two in three are float64, so both models evaluate to about 1e-15 and a coefficient in the wrong place shows. Where the
two differ by more, the network itself may be badly conditioned (a difference of nearly equal values); so a difference counts only if it is
also far larger than what moving every number that goes in, and every weight, by a unit in its last place does. Of every third, in a type as
models are deployed, `verify` and ONNX Runtime are asked too, and `verify` must find a mistake that is made in every fifth of these.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import onnx
import onnx_ir
from cases.builder import DTYPES, Net, element
from compare import Feeds, batchnorms, difference, feeds, interface, nodes, run_double, run_stored

import bnfold
from bnfold.backends.onnx.oracle.evaluator import Oracle
from bnfold.folding.options import FoldOptions
from bnfold.report import FuseReport

from . import moves, others
from . import operators as ops
from .found import Found, Say, watched

OPSETS = (9, 10, 11, 13, 14, 17, 18, 21, 23, 25)
TOLERANCE = 1e-12  # times the largest magnitude of an output
CONDITION = 50.0  # times what a unit in the last place of the inputs and the weights does
UNITS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FLOATS = [element(DTYPES[name]) for name in UNITS]
STEPS = {
    ops.batchnorm: 6,
    moves.conv_bn_relu: 5,
    ops.convolution: 4,
    ops.elementwise: 3,
    ops.constant: 2,
    ops.pair: 3,
    ops.pool: 2,
    ops.gemm: 2,
    ops.matmul: 2,
    ops.conv_transpose: 1,
    ops.product: 0.5,
    ops.einsum: 0.7,
    ops.normalisation: 0.5,
    ops.recurrent: 0.3,
    ops.table: 0.2,
    ops.reduction: 0.7,
    ops.resize: 0.7,
    moves.transpose: 1,
    moves.reshape: 1,
    moves.flatten: 0.7,
    moves.squeeze: 1,
    moves.unsqueeze: 0.7,
    moves.grow: 0.7,
    moves.concat: 2,
    moves.split: 1,
    moves.cut: 1,
    moves.gather: 1,
    moves.pad: 1,
    moves.space_and_depth: 0.7,
    moves.residual: 2,
    moves.parallel: 1.5,
    moves.gate: 0.7,
    moves.shuffle: 0.7,
    moves.twice: 0.7,
    moves.rows: 0.5,
    others.clamp: 2,
    others.normalisation: 1,
    others.linear_twice: 1,
    others.coded: 2,
    others.training: 0.2,
    others.enlarge: 0.5,
    others.mixing: 0.5,
    others.branches: 0.3,
    others.loop: 0.2,
    others.scan: 0.2,
    others.function: 0.3,
    others.microsoft: 0.5,
}
WITHOUT_BFLOAT16 = (moves.concat, moves.split, moves.gather, ops.einsum, others.mixing)  # not all of what they add takes it


def build(seed: int) -> onnx.ModelProto:
    """The network of a seed: at least 6 operators and at least one BatchNorm, weights and inputs in float64, of every third in a type as
    models are deployed."""
    rng = np.random.default_rng(seed)
    opset, dtype = int(rng.choice(OPSETS)), "float64"
    if seed % 3 == 0:
        dtype = str(rng.choice(["float32", "float16", "bfloat16"], p=[0.75, 0.15, 0.1]))
        opset = max(opset, 23) if dtype == "bfloat16" else opset
    net = Net(f"random {seed}", opset=opset, dtype=dtype)
    net.rng = rng
    net.value_info = bool(rng.random() < 0.2)
    g = ops.Growing(net, rng, dead=float(rng.choice([0, 0, 0.4, 1.0])))
    dynamic, batch = bool(rng.random() < 0.6), int(rng.integers(1, 5))
    for k in range(1 if rng.random() < 0.7 else 2):
        shape = [int(n) for n in rng.integers(1, 7, rng.choice([1, 2, 3, 3]))]
        if rng.random() < 0.3:
            shape = [batch] * len(shape)  # equal sizes, by which no axis can be told from another
        name = net.input(*(["N"] if dynamic else [batch]), *shape, name=f"x{k}")
        g.made(name, [], (-1 if dynamic else batch, *shape))
    steps = list(STEPS) if dtype != "bfloat16" else [step for step in STEPS if step not in WITHOUT_BFLOAT16]
    weights = np.array([STEPS[step] for step in steps])
    wanted = int(rng.integers(6, 26 if dtype == "float64" else 14))
    inputs = len(g.shapes)
    for _ in range(400):
        if len(g.shapes) - inputs >= wanted and g.norms:
            break
        steps[rng.choice(len(steps), p=weights / weights.sum())](g)
    made = list(g.shapes)[inputs:]
    ends = [v for v in made if v not in g.used and rng.random() < 0.9] or made[-1:]
    ends += [v for v in made if v not in ends and rng.random() < 0.04]
    for v in ends:
        net.output(v, shape=[n if n > 0 else "N" if n == -1 else f"{-n}N" for n in g.shapes[v]])
    return net.model()


def options(seed: int) -> dict[str, Any]:
    """What its fold may do besides: nothing, of every third; else each option with some chance, those of later versions too."""
    rng = np.random.default_rng((seed, 1))
    if rng.random() < 0.3:
        return {}
    kinds = {name: [True] if kind is bool else get_args(get_args(kind)[0]) for name, kind in get_type_hints(FoldOptions).items()}
    return {name: words[rng.integers(len(words))] for name, words in kinds.items() if rng.random() < 0.3}


def tried(seed: int, *, save: Path | None = None, say: Say | None = None) -> Found:
    """Fold the network of a seed with the options of the seed, and compare all that must not change."""
    model = build(seed)
    if save is not None:
        onnx.save(model, save)
    found = Found(seed, operators=Counter(node.op_type for node in nodes(model)))
    if say is not None:
        say(onnx.printer.to_text(model.graph))
        say(str(options(seed)))
    with watched(found, "random network", say):
        found.problem = _compare(model, found)
        found.became = found.became or (
            "no BatchNorm" if found.report is None else "folded" if found.report.batchnorms.after == 0 else "some stay"
        )
    if say is not None:
        for layer in found.report.layers if found.report else ():
            say(f"{layer.name}: {layer.verdict} {' '.join(layer.into)} {layer.reason}")
    return found


def _compare(model: onnx.ModelProto, found: Found) -> str:
    if not batchnorms(model):
        return ""
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString(deterministic=True)
    fused, report = bnfold.fuse(model, check=False, **options(found.seed))
    found.report = report
    if model.SerializeToString(deterministic=True) != before:
        return "the model that was given changed"
    onnx.checker.check_model(fused, full_check=True)
    if interface(fused) != interface(model):
        return f"the interface changed:\n{interface(model)}\n{interface(fused)}"
    kept = sum(layer.verdict == "kept" for layer in report.layers)
    if (kept == 0) != (report.batchnorms.after == 0) or (
        not model.functions and (batchnorms(model), batchnorms(fused)) != (report.batchnorms.before, report.batchnorms.after)
    ):
        return f"the report counts {report.batchnorms} and {kept} kept, the models hold {batchnorms(model)} and {batchnorms(fused)}"
    if silent := [layer.name for layer in report.layers if layer.verdict == "kept" and not layer.reason]:
        return f"no reason for {silent}"
    oracles = [Oracle(onnx_ir.from_proto(m)) for m in (model, fused)]
    stored = found.seed % 3 == 0
    for size in (2, 5) if model.graph.input[0].type.tensor_type.shape.dim[0].dim_param else (0,):
        fed = feeds(model, dict.fromkeys("N", size), seed=found.seed)
        reference = oracles[0].run(fed)
        if not stored and difference(reference, oracles[1].run(fed)) <= TOLERANCE:
            continue
        noise = max(difference(reference, Oracle(onnx_ir.from_proto(_moved(model, k))).run(_shaken(fed, k))) for k in range(3))
        if (gap := difference(reference, oracles[1].run(fed))) > CONDITION * noise + TOLERANCE:
            return f"the outputs differ by {gap:.2e} of their size with a batch of {size or 'fixed size'} (conditioning: {noise:.2e})"
        if stored and (said := _deployed(model, fused, fed, reference, noise)):
            return said
    if stored:
        return _judged(model, fused, found)
    return ""


def _shaken(fed: Feeds, k: int) -> Feeds:
    rng = np.random.default_rng(k)
    return {name: _nudged(x, rng) for name, x in fed.items()}


def _nudged(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each number moved by a unit in its last place."""
    unit = UNITS.get(str(x.dtype), 0.0)
    return x if not unit else (x.astype(np.float64) * (1 + unit * rng.choice([-1, 1], x.shape))).astype(x.dtype)


def _moved(model: onnx.ModelProto, k: int) -> onnx.ModelProto:
    """The model with every weight moved by a unit in its last place."""
    rng = np.random.default_rng(k)
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    for tensor in _weights(moved):
        tensor.CopyFrom(onnx.numpy_helper.from_array(_nudged(onnx.numpy_helper.to_array(tensor), rng), tensor.name))
    return moved


def _weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Its stored tensors of floating-point numbers, without those that say how much larger something becomes."""
    inner = [attr.t for node in nodes(model) for attr in node.attribute if attr.type == onnx.AttributeProto.TENSOR]
    graphs = [attr.g for node in nodes(model) for attr in node.attribute if attr.type == onnx.AttributeProto.GRAPH]
    stored = [tensor for graph in (model.graph, *graphs) for tensor in graph.initializer]
    return [tensor for tensor in (*stored, *inner) if tensor.data_type in FLOATS and not tensor.name.startswith("scales")]


def _deployed(model: onnx.ModelProto, fused: onnx.ModelProto, fed: Feeds, truth: Feeds, noise: float) -> str:
    """What is wrong with the folded model in ONNX Runtime, if that takes the model that was folded."""
    try:
        before = run_stored(model, fed)
    except Exception:
        return ""
    gap = difference(before, run_stored(fused, fed))
    own = max(noise, difference(truth, before))
    return f"in ONNX Runtime outputs differ by {gap:.2e} of their size (rounding: {own:.2e})" if gap > CONDITION * own else ""


def _judged(model: onnx.ModelProto, fused: onnx.ModelProto, found: Found) -> str:
    """What is wrong with what `verify` says, of the right fold, and of every fifth with a mistake in it."""
    verdict = bnfold.verify(model, fused)
    if verdict.verdict == "different":
        return f"verify says different of a right fold: {verdict.reason}"
    found.became = verdict.verdict if verdict.verdict == "equivalent" else f"{verdict.verdict}: {verdict.reason}"
    if found.seed % 5 or not found.report.changes:
        return ""
    known = {tensor.SerializeToString() for tensor in _weights(model)}
    wrong = onnx.ModelProto()
    wrong.CopyFrom(fused)
    new = [tensor for tensor in _weights(wrong) if tensor.SerializeToString() not in known]
    if not new:
        return ""
    rng = np.random.default_rng((found.seed, 2))
    tensor = new[rng.integers(len(new))]
    array = onnx.numpy_helper.to_array(tensor).copy()
    place = int(rng.integers(array.size))
    there = float(array.flat[place])
    array.flat[place] = array.dtype.type(there * 1.1 + (0.1 if there >= 0 else -0.1))
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    fed = feeds(model, seed=found.seed)
    seen = difference(run_double(fused, fed), run_double(wrong, fed))
    verdict = bnfold.verify(model, wrong)
    if verdict.verdict == "equivalent" and seen > TOLERANCE:
        return f"verify says equivalent of a fold with a mistake in {tensor.name} [{place}], which moves outputs by {seen:.2e}"
    found.became = f"a mistake is {verdict.verdict}"
    return ""


def share_folded(reports: list[FuseReport]) -> float:
    """The share of all BatchNorms that are gone."""
    before, after = (sum(getattr(r.batchnorms, which) for r in reports) for which in ("before", "after"))
    return 1 - after / before

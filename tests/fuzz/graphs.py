"""Random networks in float64, folded and compared: the hunt for what nobody thought of.

Weights and data are float64, so both models evaluate to about 1e-15 and a coefficient in the wrong place shows. Where the two differ
by more, the network itself may be badly conditioned (a difference of nearly equal values); so a difference counts only if it is also
far larger than what moving every number that goes in by a unit in its last place does.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from cases.builder import Net
from compare import batchnorms, difference, interface

import bnfold
from bnfold.backends.onnx.oracle.evaluator import Oracle
from bnfold.report import FuseReport

from . import moves
from . import operators as ops
from .found import Found, Say, watched

OPSETS = (9, 11, 13, 17, 18, 21)
TOLERANCE = 1e-12  # times the largest magnitude of an output
CONDITION = 50.0  # times what a unit in the last place of the inputs does
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
}


def build(seed: int) -> onnx.ModelProto:
    """The network of a seed: at least 6 operators and at least one BatchNorm, all weights and inputs in float64."""
    rng = np.random.default_rng(seed)
    net = Net(f"random {seed}", opset=int(rng.choice(OPSETS)), dtype="float64")
    net.rng = rng
    net.value_info = bool(rng.random() < 0.2)
    g = ops.Growing(net, rng)
    dynamic, batch = bool(rng.random() < 0.6), int(rng.integers(1, 5))
    for k in range(1 if rng.random() < 0.7 else 2):
        shape = [int(n) for n in rng.integers(1, 7, rng.choice([1, 2, 3, 3]))]
        if rng.random() < 0.3:
            shape = [batch] * len(shape)  # equal sizes, by which no axis can be told from another
        name = net.input(*(["N"] if dynamic else [batch]), *shape, name=f"x{k}")
        g.made(name, [], (-1 if dynamic else batch, *shape))
    steps, weights = list(STEPS), np.array(list(STEPS.values()))
    wanted = int(rng.integers(6, 26))
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


def tried(seed: int, *, save: Path | None = None, say: Say | None = None) -> Found:
    """Fold the network of a seed, and compare all that must not change.

    Of every fourth, operators may be doubled; of every third, ranges are equalised.
    """
    model = build(seed)
    if save is not None:
        onnx.save(model, save)
    found = Found(seed, operators=Counter(node.op_type for node in model.graph.node))
    with watched(found, "random network", say):
        found.problem = _compare(model, found, seed % 4 == 0)
        found.became = "no BatchNorm" if found.report is None else "folded" if found.report.batchnorms.after == 0 else "some stay"
    if say is not None:
        say(onnx.printer.to_text(model.graph))
        for layer in found.report.layers if found.report else ():
            say(f"{layer.name}: {layer.verdict} {' '.join(layer.into)} {layer.reason}")
    return found


def _compare(model: onnx.ModelProto, found: Found, clone: bool) -> str:
    if not batchnorms(model):
        return ""
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString(deterministic=True)
    fused, report = bnfold.fuse(model, check=False, clone=clone, equalise=found.seed % 3 == 0)
    found.report = report
    if model.SerializeToString(deterministic=True) != before:
        return "the model that was given changed"
    onnx.checker.check_model(fused, full_check=True)
    if interface(fused) != interface(model):
        return f"the interface changed:\n{interface(model)}\n{interface(fused)}"
    kept = sum(layer.verdict == "kept" for layer in report.layers)
    if (batchnorms(model), batchnorms(fused)) != (report.batchnorms.before, report.batchnorms.after) or (kept == 0) != (
        report.batchnorms.after == 0
    ):
        return f"the report counts {report.batchnorms} and {kept} kept, the models hold {batchnorms(model)} and {batchnorms(fused)}"
    if silent := [layer.name for layer in report.layers if layer.verdict == "kept" and not layer.reason]:
        return f"no reason for {silent}"
    pair = [onnx_ir.from_proto(m) for m in (model, fused)]
    oracles = [Oracle(m) for m in pair]
    dynamic = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for size in (2, 5) if dynamic else (0,):
        rng = np.random.default_rng((found.seed, size))
        shapes = {i.name: [d.dim_value or size for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
        feeds = {name: rng.normal(0.1, 1.0, shape) for name, shape in shapes.items()}
        reference, folded = (oracle.run(feeds) for oracle in oracles)
        if (gap := difference(reference, folded)) > TOLERANCE:
            moved = {name: x * (1 + 2.0**-52 * rng.choice([-1, 1], x.shape)) for name, x in feeds.items()}
            noise = difference(reference, oracles[0].run(moved))
            if gap > CONDITION * noise:
                return f"the outputs differ by {gap:.2e} of their size with a batch of {size or 'fixed size'} (conditioning: {noise:.2e})"
    return ""


def share_folded(reports: list[FuseReport]) -> float:
    """The share of all BatchNorms that are gone."""
    before, after = (sum(getattr(r.batchnorms, which) for r in reports) for which in ("before", "after"))
    return 1 - after / before

"""Which of ONNX Runtime's own graph optimisations changes a model's function, and on how small a part of the model.

The optimisers are switched off one at a time, on the smallest part that shows the harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from bnfold.data import Batch
from bnfold.errors import UnsupportedError

from ..graph.edit import extract, inlined
from ..graph.proto import self_contained, stored_bytes
from ..graph.weights import constants
from .providers import resolve, runtime, settings

Arrays = Mapping[str, npt.NDArray[Any]]

# By the names under which ONNX Runtime 1.20 to 1.32 takes them in `disabled_optimizers`; one that a build lacks is passed over there.
# fmt: off
NAMES = (
    "ConstantFolding", "ConstantSharing", "CommonSubexpressionElimination", "TransposeOptimizer", "ReshapeFusion",
    "PreShapeNodeElimination", "ConvBNFusion", "ConvAddFusion", "ConvMulFusion", "MatMul_BatchNormalization_Fusion",
    "Pad_Fusion", "MatMulAddFusion", "EliminateIdentity", "EliminateDropout", "EliminateSlice", "UnsqueezeElimination",
    "ExpandElimination", "CastElimination", "CastChainElimination", "NoopElimination", "DivMulFusion", "FuseReluClip",
    "ClipQuantRewrite", "ReluQuantRewrite", "NotWhereFusion", "GemmTransposeFusion", "GemmSumFusion",
    "GemmActivationFusion", "MatmulTransposeFusion", "MatMulScaleFusion", "MatMulActivationFusion",
    "ConvActivationFusion", "ConvAddActivationFusion", "NchwcTransformer", "NhwcTransformer", "GeluFusionL1",
    "GeluFusionL2", "FastGeluFusion", "QuickGeluFusion", "BiasGeluFusion", "BiasSoftmaxFusion", "BiasDropoutFusion",
    "LayerNormFusionL1", "LayerNormFusionL2", "SimplifiedLayerNormFusion", "SkipLayerNormFusion",
    "BiasSkipLayerNormFusion", "AttentionFusion", "EmbedLayerNormFusion", "GroupQueryAttentionFusion",
    "DynamicQuantizeMatMulFusion", "MatMulIntegerToFloatFusion", "ConstantFoldingDQ", "QDQPropagationTransformer",
    "QDQSelectorActionTransformer", "QDQFinalCleanupTransformer", "QDQS8ToU8Transformer", "GatherSliceToSplitFusion",
    "GatherToSliceFusion", "SliceConcatToSpaceToDepthFusion", "DoubleQDQPairsRemover", "WeightBiasQuantization",
    "EnsureUniqueDQForNodeUnit", "RemoveDuplicateCastTransformer", "FuseInitializersTransformer", "LabelEncoderFusion",
    "RocmBlasAltImpl",
)
# fmt: on
LEAST = 30.0  # units of roundoff; an output off by less is off by its own rounding
DEEPEST = 12  # operators in a row that one optimisation may look at


@dataclass(frozen=True)
class Culprit:
    """names: the optimisers without which the harm is gone, none where none alone does it. output: the first value that is harmed; nodes:
    the operators of the smallest part that shows it, which is `model`, fed with `inputs`.
    """

    names: tuple[str, ...]
    output: str
    nodes: tuple[onnx.NodeProto, ...]
    model: onnx.ModelProto
    inputs: dict[str, npt.NDArray[Any]]
    expected: npt.NDArray[Any]
    found: npt.NDArray[Any]

    @property
    def text(self) -> str:
        """What is at fault, in words."""
        path = " -> ".join(f"{node.op_type} {node.name}".strip() for node in self.nodes)
        what = " and ".join(self.names) if self.names else "which of its optimisers can't be told"
        return f"runtime optimisation: ONNX Runtime changes what {path} computes when it optimises ({what}); the file itself is right"


def culprit(model: ir.Model, feeds: Batch, provider: str, unit: float) -> Culprit | None:
    """The optimiser that harms a model on these data; None where optimising changes nothing that counts."""
    if stored_bytes(model) > 1 << 30:
        return None
    search = _Search(self_contained(inlined(model)), dict(feeds), resolve(provider), unit)
    try:
        return search.run()
    except UnsupportedError:
        return None


class _Search:
    def __init__(self, model: onnx.ModelProto, feeds: Arrays, provider: str, unit: float) -> None:
        self.model, self.feeds, self.provider, self.unit = model, feeds, provider, unit
        self.limit = float(np.sqrt(unit))
        self.made = {name: i for i, node in enumerate(model.graph.node) for name in node.output if name}
        self.constant = constants(model.graph, (tensor.name for tensor in model.graph.initializer))

    def run(self) -> Culprit | None:
        right, wrong = (self._run(self.model, self.feeds, on) for on in (False, True))
        off = {name: _off(right[name], wrong[name]) for name in right if name in self.made}
        output = max(off, key=lambda name: off[name], default="")
        if not off or off[output] < LEAST * self.unit:
            return None
        self.limit = min(float(np.sqrt(self.unit)), off[output] / 3)  # what is harmed may shrink on its way
        points = [name for name in self._narrow(output) if name != output]
        low, high = 0, len(points)  # all before `low` are right; what is at `high` is harmed
        while low < high:
            middle = (low + high) // 2
            if self._harms(points[middle]):
                high = middle
            else:
                low = middle + 1
        output = points[high] if high < len(points) else output
        while (before := next((name for name in self._reads(output) if self._harms(name)), None)) is not None:
            output = before
        return self._smallest(output)

    def _reads(self, name: str) -> list[str]:
        """The values computed from data that the operator of a value reads."""
        node = self.model.graph.node[self.made[name]]
        return [x for x in node.input if x in self.made and x not in self.constant]

    def _narrow(self, output: str) -> list[str]:
        """The values that all of an output depends on passes through, in order."""
        needed: set[int] = set()
        stack = [output]
        while stack:
            name = stack.pop()
            if name in self.made and self.made[name] not in needed:
                needed.add(self.made[name])
                stack.extend(self.model.graph.node[self.made[name]].input)
        order = sorted(needed)
        last: dict[str, int] = {}
        for i in order:
            for name in self.model.graph.node[i].input:
                last[name] = i
        found, alive = [], {name for name in self.feeds if name in last}
        for i in order:
            node = self.model.graph.node[i]
            alive |= {name for name in node.output if name in last and name not in self.constant}
            alive = {name for name in alive if last[name] > i}
            if len(alive) == 1 and (only := next(iter(alive))) in self.made:
                found.append(only)
        return list(dict.fromkeys(found))

    def _smallest(self, output: str) -> Culprit | None:
        """The shortest way back from a harmed value on which the harm still shows, fed with what the whole model computes there."""
        chosen = {self.made[output]}
        for _ in range(DEEPEST):
            graph = self.model.graph
            inside = {name for i in chosen for name in graph.node[i].output}
            edge = list(dict.fromkeys(x for i in sorted(chosen) for x in graph.node[i].input if x and x not in inside | self.constant))
            fed = {name: self.feeds[name] for name in edge if name in self.feeds}
            if computed := [name for name in edge if name not in fed]:
                fed |= self._run(extract(self.model, self.feeds, computed), self.feeds, False)
            part = extract(self.model, fed, [output])
            if self._differs(part, fed):
                right, wrong = (self._run(part, fed, on)[output] for on in (False, True))
                nodes = tuple(part.graph.node)
                return Culprit(self._named(part, fed), output, nodes, part, fed, right, wrong)
            if not computed:
                break
            chosen |= {self.made[name] for name in computed}
        return None

    def _named(self, part: onnx.ModelProto, feeds: Arrays) -> tuple[str, ...]:
        if self._differs(part, feeds, NAMES):
            return ()
        if alone := [name for name in NAMES if not self._differs(part, feeds, (name,))]:
            return tuple(alone[:1])
        needed = list(NAMES)
        for name in NAMES:
            without = [n for n in needed if n != name]
            if not self._differs(part, feeds, without):
                needed = without
        return tuple(needed)

    def _harms(self, output: str) -> bool:
        return self._differs(extract(self.model, self.feeds, [output]), self.feeds)

    def _differs(self, part: onnx.ModelProto, feeds: Arrays, disabled: Iterable[str] = ()) -> bool:
        right, wrong = self._run(part, feeds, False), self._run(part, feeds, True, disabled)
        return any(_off(right[name], wrong[name]) > self.limit for name in right)

    def _run(self, part: onnx.ModelProto, feeds: Arrays, optimise: bool, disabled: Iterable[str] = ()) -> dict[str, npt.NDArray[Any]]:
        options = settings(optimise=optimise)
        options.log_severity_level = 4
        try:
            session = runtime().InferenceSession(
                part.SerializeToString(), options, providers=[self.provider], disabled_optimizers=list(disabled), enable_fallback=0
            )
            names = [o.name for o in session.get_outputs()]
            found = session.run(names, dict(feeds))
        except Exception as error:  # onnxruntime raises its own classes, which share no base but Exception
            raise UnsupportedError(f"ONNX Runtime can't run a part of the model: {str(error)[:200]}") from None
        return dict(zip(names, found, strict=True))


def _off(right: npt.NDArray[Any], wrong: npt.NDArray[Any]) -> float:
    """The largest difference, relative to the largest number."""
    if not isinstance(right, np.ndarray) or right.dtype.kind not in "fiub":
        return 0.0
    one, other = right.astype(np.float64), wrong.astype(np.float64)
    if one.shape != other.shape or (np.isfinite(one) != np.isfinite(other)).any():
        return float("inf")
    size = float(np.abs(np.where(np.isfinite(one), one, 0.0)).max(initial=0.0))
    off = float(np.abs(np.where(np.isfinite(one), one - other, 0.0)).max(initial=0.0))
    return off / size if size else float(off > 0)

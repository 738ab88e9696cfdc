"""`verify` knows no framework: any two models can be compared, also of a kind that bnfold hasn't got."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from opened import verify

from bnfold.data.spec import Port
from bnfold.errors import DeviceError, UnsupportedError
from bnfold.model import Model


class Doubled(Model):
    """A model that isn't ONNX: y = 2 x + b, in numpy. It stands for any other back-end."""

    roundoff = 2.0**-24
    optimisations = ("off",)

    def __init__(self, shift, scale=2.0):
        self.shift, self.scale = np.float32(shift), np.float32(scale)

    @property
    def specs(self):
        from bnfold.data import InputSpec

        return [InputSpec("x", np.dtype(np.float32), ("N", 8))]

    def interface(self):
        return [Port("x", "float", ("N", 8))], [], [Port("y", "float", ("N", 8))]

    def normal_form(self, options):
        raise UnsupportedError("it has no graph")

    def oracle(self, *, jitter=None, outputs=()):
        half = 0.0 if jitter is None else np.random.default_rng(jitter).uniform(-(2.0**-25), 2.0**-25)
        return Computes(lambda x: float(self.scale) * x.astype(np.float64) + float(self.shift) * (1 + half))

    def deployed(self, provider, optimisation, *, jitter=None, precision="full"):
        return Computes(lambda x: self.scale * x + self.shift)

    def require(self, provider):
        if provider != "cpu":
            raise DeviceError("no such device")

    def layers(self):
        return {"y": "sum"}


class Computes:
    def __init__(self, function):
        self.function = function

    def run(self, feeds):
        return {"y": self.function(feeds["x"])}


def test_any_two_backends():
    same = verify(Doubled(1.5), Doubled(1.5))
    assert (same.verdict, same.levels.coefficients.reason) == ("equivalent", "it has no graph")
    other = verify(Doubled(1.5), Doubled(1.501))
    assert (other.verdict, other.first_difference) == ("different", "sum")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "two"], ["d"]), helper.make_node("Add", ["d", "b"], ["y"])],
        "doubled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(np.array([value], np.float32), name) for name, value in (("two", 2.0), ("b", 1.5))],
    )
    onnx_model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert verify(Doubled(1.5), onnx_model).verdict == "equivalent"
    assert verify(Doubled(1.5001), onnx_model).verdict == "different"

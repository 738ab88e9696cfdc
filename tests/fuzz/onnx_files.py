"""Sound ONNX files with one thing or two made wrong: each must load and come out right, or be refused in one line.

A failure is an exception that isn't a BnfoldError, a run that takes too long, and a folded model that ONNX Runtime refuses, or that
computes something else, where it took the mutant.
"""

from __future__ import annotations

import contextlib
import functools
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cases import ALL
from cases.builder import Net
from compare import SIZES
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

import bnfold

from .found import Found, Say, watched

NEAR = 1e-3  # of the largest output: far beyond what rounding does to these networks, and below what any wrong fold does
STRANGE = (-(2**63), -(2**31), -1000, -2, -1, 0, 1, 2, 3, 7, 1000, 2**31 - 1, 2**40, 2**62)
KINDS = ("i", "f", "s", "ints", "floats", "strings", "t", "g")


# --- what is mutated ----------------------------------------------------------------------------------------------------------------


def functional() -> ModelProto:
    """Two functions, of which one calls the other, and a graph in a branch."""
    net = Net("functional")
    net.output(net.bn(net.conv(net.input("N", 4, 8, 8), 4, 6), 6))
    model = net.model()
    body = [helper.make_node("Abs", ["a"], ["b"]), helper.make_node("Inner", ["b"], ["c"], domain="own")]
    inner = [helper.make_node("Relu", ["a"], ["b"], name="inner")]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model.functions.append(helper.make_function("own", "Outer", ["a"], ["c"], body, imports))
    model.functions.append(helper.make_function("own", "Inner", ["a"], ["b"], inner, imports[:1]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    last = model.graph.output[0].name
    branch = helper.make_graph([helper.make_node("Neg", [last], ["then"])], "then", [], [helper.make_tensor_value_info("then", 1, None)])
    other = helper.make_graph([helper.make_node("Exp", [last], ["else"])], "else", [], [helper.make_tensor_value_info("else", 1, None)])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "which"))
    model.graph.node.append(helper.make_node("If", ["which"], ["chosen"], then_branch=branch, else_branch=other))
    model.graph.node.append(helper.make_node("Outer", ["chosen"], ["end"], domain="own"))
    model.graph.output[0].name = "end"
    return model


@functools.cache
def seeds() -> list[ModelProto]:
    """The networks to mutate: every fourth of the catalogue's that ONNX Runtime runs, and one with functions."""
    return [functional(), *(case.build() for case in ALL[::4] if case.ort)]


# --- how ----------------------------------------------------------------------------------------------------------------------------

Mutation = Callable[[ModelProto, random.Random], None]


def graphs(model: ModelProto) -> Iterator[GraphProto]:
    def inside(nodes: Any) -> Iterator[GraphProto]:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield attribute.g
                    yield from inside(attribute.g.node)

    yield model.graph
    yield from inside(model.graph.node)


def a_node(model: ModelProto, rng: random.Random) -> NodeProto:
    nodes = [node for graph in graphs(model) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    return rng.choice(nodes)


def a_tensor(model: ModelProto, rng: random.Random) -> TensorProto:
    return rng.choice(list(model.graph.initializer) or [TensorProto()])


def names(model: ModelProto) -> list[str]:
    return ["", "nobody", *(name for graph in graphs(model) for node in graph.node for name in (*node.input, *node.output))]


def drop_input(model: ModelProto, rng: random.Random) -> None:
    node = a_node(model, rng)
    if node.input:
        del node.input[rng.randrange(len(node.input))]


def add_input(model: ModelProto, rng: random.Random) -> None:
    a_node(model, rng).input.extend(rng.choice(names(model)) for _ in range(rng.choice((1, 1, 2, 9))))


def change_input(model: ModelProto, rng: random.Random) -> None:
    node = a_node(model, rng)
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names(model))


def swap_inputs(model: ModelProto, rng: random.Random) -> None:
    node = a_node(model, rng)
    if len(node.input) > 1:
        i, k = rng.sample(range(len(node.input)), 2)
        node.input[i], node.input[k] = node.input[k], node.input[i]


def change_output(model: ModelProto, rng: random.Random) -> None:
    node = a_node(model, rng)
    which = rng.random()
    if which < 0.3:
        node.output.append(rng.choice([*names(model), "more"]))
    elif which < 0.5 and node.output:
        del node.output[-1]
    elif node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(names(model))


def change_operator(model: ModelProto, rng: random.Random) -> None:
    node, other = a_node(model, rng), a_node(model, rng)
    if rng.random() < 0.3:
        node.domain = rng.choice(("", "ai.onnx", "com.microsoft", "own", "nobody"))
    else:
        node.op_type = rng.choice((other.op_type, "Nothing", "", "Outer", "Inner", "BatchNormalization", "If", "Loop", "Constant"))


def change_node(model: ModelProto, rng: random.Random) -> None:
    graph = rng.choice(list(graphs(model)))
    if not graph.node:
        return
    i = rng.randrange(len(graph.node))
    if rng.random() < 0.5:
        del graph.node[i]
    elif rng.random() < 0.5:
        graph.node.append(graph.node[i])
    else:
        moved = NodeProto()
        moved.CopyFrom(graph.node[i])
        del graph.node[i]
        graph.node.insert(rng.randrange(len(graph.node) + 1), moved)


def set_value(attribute: AttributeProto, rng: random.Random) -> None:
    """Another value of another kind."""
    kind, name = rng.choice(KINDS), attribute.name
    attribute.Clear()
    attribute.name, attribute.type = (
        name,
        getattr(AttributeProto, {"i": "INT", "f": "FLOAT", "s": "STRING", "t": "TENSOR", "g": "GRAPH"}.get(kind, kind.upper())),
    )
    if kind in ("i", "f"):
        setattr(attribute, kind, rng.choice(STRANGE))
    elif kind in ("ints", "floats"):
        getattr(attribute, kind).extend(rng.choice(STRANGE) for _ in range(rng.choice((0, 1, 2, 3, 4, 8))))
    elif kind == "s":
        attribute.s = rng.choice((b"", b"SAME_UPPER", b"VALID", b"\xff\xfe", b"linear", b"ij,jk->ik"))
    elif kind == "strings":
        attribute.strings.append(b"x")
    elif kind == "t":
        attribute.t.CopyFrom(numpy_helper.from_array(np.ones(rng.choice(((), (1,), (2, 3)))), "t"))
    else:
        attribute.g.CopyFrom(helper.make_graph([], "g", [], []))


def change_attribute(model: ModelProto, rng: random.Random) -> None:
    node = a_node(model, rng)
    which = rng.random()
    if which < 0.2 or not node.attribute:
        known = ("axis", "axes", "pads", "strides", "group", "epsilon", "auto_pad", "kernel_shape", "perm", "to", "value", "alpha", "mode")
        set_value(node.attribute.add(name=rng.choice(known)), rng)
        return
    i = rng.randrange(len(node.attribute))
    attribute = node.attribute[i]
    if which < 0.4:
        set_value(attribute, rng)
    elif which < 0.5:
        del node.attribute[i]
    elif which < 0.55:
        node.attribute.append(attribute)
    elif which < 0.6:
        attribute.type = rng.choice((0, 1, 2, 3, 6, 7, 11))
    elif which < 0.65:
        attribute.ref_attr_name = "outer"
    elif attribute.ints:
        if rng.random() < 0.5:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(STRANGE)
        elif rng.random() < 0.5:
            attribute.ints.append(rng.choice(STRANGE))
        else:
            del attribute.ints[-1]
    elif attribute.type == AttributeProto.INT:
        attribute.i = rng.choice(STRANGE)
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), 0.5))
    else:
        set_value(attribute, rng)


def change_array(model: ModelProto, rng: random.Random) -> None:
    """A weight of another shape or type, whole in itself."""
    tensor = a_tensor(model, rng)
    try:
        array = numpy_helper.to_array(tensor)
    except Exception:
        return
    which = rng.random()
    if which < 0.3:
        array = array.reshape(rng.choice(((-1,), (1, -1), (-1, 1), (*array.shape, 1))))
    elif which < 0.6 and array.ndim:
        axis = rng.randrange(array.ndim)
        array = np.concatenate([array, array], axis) if rng.random() < 0.5 else np.take(array, range(array.shape[axis] // 2), axis)
    elif which < 0.7:
        array = np.array(array.ravel()[:1].tolist() or [0], array.dtype).reshape(rng.choice(((), (1,))))
    elif which < 0.85:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = array.astype(rng.choice((np.int64, np.int32, np.float16, np.float64, np.int8, np.bool_)))
    elif array.dtype.kind == "f" and array.size:
        array = array.copy()
        array.flat[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, -1, 0, 1e30))
    elif array.dtype.kind == "i" and array.size:
        array = array.copy()
        array.flat[rng.randrange(array.size)] = rng.choice((-7, -1, 0, 1, 3, 100))
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def break_tensor(model: ModelProto, rng: random.Random) -> None:
    tensor = a_tensor(model, rng)
    which = rng.random()
    if which < 0.25:
        tensor.data_type = rng.choice((0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 17, 21, 22, 23, 99))
    elif which < 0.5:
        tensor.dims.append(rng.choice(STRANGE))
    elif which < 0.7 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(STRANGE)
    elif which < 0.85:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif which < 0.95:
        tensor.ClearField("raw_data")
    else:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=rng.choice(("weights", "../weights", "")))


def rename(model: ModelProto, rng: random.Random) -> None:
    group = rng.choice((model.graph.initializer, model.graph.input, model.graph.output, model.graph.value_info, model.graph.node))
    if group:
        rng.choice(list(group)).name = rng.choice(names(model))


def change_shape(model: ModelProto, rng: random.Random) -> None:
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    if not infos:
        return
    kind = rng.choice(infos).type
    if rng.random() < 0.2:
        kind.tensor_type.elem_type = rng.choice((0, 1, 2, 6, 7, 8, 10, 11, 16, 99))
    elif rng.random() < 0.2:
        kind.Clear()
    elif kind.tensor_type.shape.dim and rng.random() < 0.7:
        dim = rng.choice(list(kind.tensor_type.shape.dim))
        if rng.random() < 0.3:
            dim.dim_param = rng.choice(("N", "", "H", "-1"))
        else:
            dim.dim_value = rng.choice(STRANGE)
    else:
        kind.tensor_type.shape.dim.add(dim_value=rng.choice(STRANGE))


def change_interface(model: ModelProto, rng: random.Random) -> None:
    group = rng.choice((model.graph.input, model.graph.output))
    if rng.random() < 0.4 and group:
        del group[rng.randrange(len(group))]
    elif group and rng.random() < 0.5:
        group.append(group[0])
    else:
        model.graph.output.add(name=rng.choice(names(model)))


def change_opsets(model: ModelProto, rng: random.Random) -> None:
    which = rng.random()
    if which < 0.5 and model.opset_import:
        rng.choice(list(model.opset_import)).version = rng.choice((-1, 0, 1, 5, 6, 7, 9, 11, 13, 17, 18, 21, 24, 99))
    elif which < 0.7 and model.opset_import:
        del model.opset_import[0]
    elif which < 0.8:
        model.opset_import.add(domain=rng.choice(("", "ai.onnx", "x")), version=rng.choice((1, 9, 13)))
    else:
        model.ir_version = rng.choice((-1, 0, 1, 2, 3, 4, 8, 11, 14, 99))


def change_functions(model: ModelProto, rng: random.Random) -> None:
    """Circles, names twice, wrong arity, attributes without values."""
    if not model.functions:
        body = [helper.make_node("Loopy", ["a"], ["b"], domain="own")]
        model.functions.append(helper.make_function("own", "Loopy", ["a"], ["b"], body, [helper.make_opsetid("own", 1)]))
        if rng.random() < 0.7:
            node = a_node(model, rng)
            node.op_type, node.domain = "Loopy", "own"
        return
    function = rng.choice(list(model.functions))
    which = rng.random()
    if which < 0.3:
        node = rng.choice(list(function.node))
        node.op_type, node.domain = rng.choice(list(model.functions)).name, "own"
    elif which < 0.5:
        del (function.input if rng.random() < 0.5 else function.output)[:]
    elif which < 0.6:
        function.name = rng.choice(("Outer", "Inner", "Relu", ""))
    elif which < 0.7:
        del function.opset_import[:]
    elif which < 0.8:
        function.node[0].attribute.add(name="alpha", ref_attr_name="alpha", type=AttributeProto.FLOAT)
    else:
        (function.input if rng.random() < 0.5 else function.output).append(rng.choice(("a", "b", "more")))


def change_anything(model: ModelProto, rng: random.Random) -> None:
    """Any field of any message."""
    message: Message = model
    for _ in range(rng.randrange(1, 12)):
        inner = [
            each
            for field, value in message.ListFields()
            if field.message_type is not None
            for each in (value if isinstance(value, (list,)) or hasattr(value, "add") else [value])
        ]
        if not inner or rng.random() < 0.1:
            break
        message = rng.choice(inner)
    fields = list(message.DESCRIPTOR.fields)
    field = rng.choice(fields)
    repeated = hasattr(getattr(message, field.name), "extend")
    value: Any
    if field.message_type is not None or rng.random() < 0.3:
        message.ClearField(field.name)
        return
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        value = rng.choice(("", "x", *names(model))) if field.type == FieldDescriptor.TYPE_STRING else rng.choice((b"", b"x", b"\xff" * 9))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        value = rng.choice([each.number for each in field.enum_type.values])
    elif field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        value = rng.choice((0.0, -1.0, 1e30, float("nan")))
    else:
        value = rng.choice(STRANGE)
    with contextlib.suppress(ValueError, TypeError):
        getattr(message, field.name).append(value) if repeated else setattr(message, field.name, value)


MUTATIONS: dict[Mutation, float] = {
    drop_input: 2,
    add_input: 1.5,
    change_input: 2,
    swap_inputs: 1.5,
    change_output: 2,
    change_operator: 2,
    change_node: 2,
    change_attribute: 5,
    change_array: 5,
    break_tensor: 2,
    rename: 2,
    change_shape: 2,
    change_interface: 1,
    change_opsets: 1,
    change_functions: 2,
    change_anything: 3,
}


def mutant(seed: int, models: list[ModelProto]) -> tuple[bytes, str]:
    """The file of a seed, and what was done to it."""
    rng = random.Random(seed)
    model = ModelProto()
    model.CopyFrom(rng.choice(models))
    done = rng.choices(list(MUTATIONS), list(MUTATIONS.values()), k=rng.choice((1, 1, 1, 2, 3)))
    for mutate in done:
        with contextlib.suppress(IndexError):
            mutate(model, rng)
    return model.SerializeToString(), ", ".join(mutate.__name__ for mutate in done)


# --- what must hold -----------------------------------------------------------------------------------------------------------------


def outputs(model: bytes, feeds: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[Any]] | None:
    """What ONNX Runtime makes of a model, without optimisation; None where it refuses. feeds: by default, drawn."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.use_deterministic_compute = True
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        if feeds is None:
            rng = np.random.default_rng(0)
            feeds = {each.name: _drawn(each, rng) for each in session.get_inputs()}
        return feeds, session.run(None, feeds)
    except Exception:
        return None


def _drawn(given: Any, rng: np.random.Generator) -> Any:
    shape = [size if isinstance(size, int) else SIZES.get(size, 3) for size in given.shape]
    kind = given.type.removeprefix("tensor(").removesuffix(")")
    kind = {"float": "float32", "double": "float64"}.get(kind, kind)
    return rng.integers(0, 2, shape).astype(kind) if "int" in kind or kind == "bool" else rng.standard_normal(shape).astype(kind)


def far(want: list[Any], got: list[Any]) -> str:
    """How outputs differ, in a word; "" where they don't."""
    for a, b in zip(want, got, strict=True):
        if not isinstance(a, np.ndarray) or a.dtype.kind not in "fiub":
            continue
        if a.shape != b.shape:
            return f"shape {b.shape} for {a.shape}"
        a, b = a.astype(np.float64), b.astype(np.float64)
        both = np.isfinite(a) & np.isfinite(b)
        off = np.abs(a - b)[both].max(initial=0) / max(np.abs(a[both]).max(initial=0), 1e-6)
        if off > NEAR:
            return f"off by {off:.2g} of the largest output"
    return ""


def tried(seed: int, *, save: Path | None = None, say: Say | None = None) -> Found:
    """What becomes of the file of a seed: "folded", "kept", or the error's kind and text."""
    data, done = mutant(seed, seeds())
    found = Found(seed)
    if save is not None:
        save.write_bytes(data)
    with tempfile.TemporaryDirectory() as folder, watched(found, done, say):
        path = Path(folder, "mutant.onnx")
        path.write_bytes(data)
        found.became, found.problem = outcome(path)
        found.problem = found.problem and f"{done}: {found.problem}"
    return found


def outcome(path: Path) -> tuple[str, str]:
    """What became of a file, and what is wrong with that."""
    try:
        model = bnfold.load(path)
        bnfold.inspect(model)
        fused, report = bnfold.fuse(model)
    except bnfold.BnfoldError as error:
        return f"{type(error).__name__}: {error}", ""  # ONNX Runtime isn't asked: it may be one of those that end the process
    became = "folded" if any(layer.verdict == "folded" for layer in report.layers) else "kept"
    if (ran := outputs(path.read_bytes())) is not None:
        target = path.with_name("fused.onnx")
        bnfold.save(fused, target)
        again = outputs(target.read_bytes(), ran[0])
        if again is None:
            return became, "ONNX Runtime took the mutant, and refuses what was made of it"
        if off := far(ran[1], again[1]):
            return became, f"the folded model computes something else: {off}"
        with contextlib.suppress(bnfold.BnfoldError):
            bnfold.recalibrate(model, [ran[0]])
    with contextlib.suppress(bnfold.BnfoldError):
        bnfold.verify(model, fused, samples=2)
    return became, ""

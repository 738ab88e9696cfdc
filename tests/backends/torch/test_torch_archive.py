"""An exported program can carry code in many places. Each is closed, and what a plain export holds passes."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnfold
from bnfold.backends.torch.export.call import Call
from bnfold.backends.torch.export.trace import trace
from bnfold.backends.torch.files.archive import check_archive
from bnfold.backends.torch.files.archive_json import is_plain_text

Entries = dict[str, bytes]
MODEL = "m/models/model.json"
CONSTANTS = "m/data/constants/model_constants_config.json"
WEIGHTS = "m/data/weights/model_weights_config.json"
BOOM = "__import__('os').mkdir('boom')"


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("boom",)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Entries:
    """The entries of an exported network."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    auto = torch.export.Dim.AUTO
    path = tmp_path_factory.mktemp("plain") / "m.pt2"
    torch.export.save(torch.export.export(net, (torch.randn(3, 1, 8, 8),), dynamic_shapes=({0: auto, 2: auto},)), path)
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(entries: Entries) -> Path:
    with zipfile.ZipFile("changed.pt2", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return Path("changed.pt2")


def program(change: Callable[[Any], object]) -> Callable[[Entries], Entries]:
    """The archive with a change in the program's JSON."""

    def changed(entries: Entries) -> Entries:
        found = json.loads(entries[MODEL])
        change(found)
        return entries | {MODEL: json.dumps(found).encode()}

    return changed


def renamed(old: str, new: str) -> Callable[[Entries], Entries]:
    def changed(entries: Entries) -> Entries:
        text = entries[MODEL].decode()
        assert f'"{old}"' in text
        return entries | {MODEL: text.replace(f'"{old}"', json.dumps(new)).encode()}

    return changed


def first(found: Any) -> Any:
    return found["graph_module"]["graph"]["nodes"][0]


def calling(target: str) -> Callable[[Entries], Entries]:
    return program(lambda found: first(found).update(target=target))


def with_argument(argument: Any) -> Callable[[Entries], Entries]:
    return program(lambda found: first(found)["inputs"].append({"name": "", "arg": argument, "kind": 1}))


def with_output(kind: str, context: Any) -> Callable[[Entries], Entries]:
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])
    return program(lambda found: found["graph_module"]["module_call_graph"][0]["signature"].update(out_spec=spec))


def with_guard(text: str) -> Callable[[Entries], Entries]:
    return program(lambda found: found["guards_code"].append(text))


def with_expression(text: str) -> Callable[[Entries], Entries]:
    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: text if key == "expr_str" else replaced(each) for key, each in value.items()}
        return [replaced(each) for each in value] if isinstance(value, list) else value

    return lambda entries: entries | {MODEL: json.dumps(replaced(json.loads(entries[MODEL]))).encode()}


def with_constant(name: str, use_pickle: Any = True) -> Callable[[Entries], Entries]:
    meta = {"path_name": name, "is_param": False, "use_pickle": use_pickle, "tensor_meta": None}

    def changed(entries: Entries) -> Entries:
        config = json.dumps({"config": {"k": meta}}).encode()
        return entries | {CONSTANTS: config, f"m/data/constants/{name}": pickle.dumps(Bomb())}

    return changed


def with_inputs(found: Any) -> Callable[[Entries], Entries]:
    def changed(entries: Entries) -> Entries:
        data = io.BytesIO()
        torch.save(found, data)
        return entries | {"m/data/sample_inputs/model.pt": data.getvalue()}

    return changed


def old_format(entries: Entries) -> Entries:
    names = ("serialized_exported_program.json", "serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt")
    return {"version": b"8.8"} | dict.fromkeys(names, pickle.dumps(Bomb()))


CHARACTERS = "(eval)(" + "+".join(f"(chr)({ord(c)})" for c in BOOM) + ")"
SPELLED = with_expression(CHARACTERS)
ATTACKS: dict[str, tuple[Callable[[Entries], Entries], str]] = {
    "weights as a pickle": (lambda e: {k: v for k, v in e.items() if k != WEIGHTS} | {"m/data/weights/model.pt": b"x"}, "pickled object"),
    "pickled tensors": (with_constant("tensor_0"), "pickled tensors"),
    "pickled tensors, oddly said": (with_constant("tensor_0", 1), "pickled tensors"),
    "an object": (with_constant("custom_obj_0"), "pickled object"),
    "an object in a folder": (with_constant("opaque_obj_x/y"), "pickled object"),
    "inputs": (with_inputs(Bomb()), "example inputs are no plain tensors"),
    "names of inputs": (with_inputs(((), {f"x', {BOOM}, '": torch.ones(1)})), "names that aren't plain"),
    "a library": (lambda e: e | {"m/data/aotinductor/model/x.so": b"x"}, "compiled or Python code"),
    "a path upwards": (lambda e: e | {"../../evil": b"x"}, "outside the archive"),
    "an absolute path": (lambda e: e | {"/etc/evil": b"x"}, "outside the archive"),
    "another root": (lambda e: e | {"n/extra/x": b"x"}, "several roots"),
    "an unknown part": (lambda e: e | {"m/data/more": b"x"}, "isn't known to be plain"),
    "a program by another suffix": (lambda e: {k.replace("model.json", "model.JSON"): v for k, v in e.items()}, "isn't known to be plain"),
    "two of a name": (lambda e: e | {MODEL.replace("model.json", "Model.json"): e[MODEL]}, "several entries of one name"),
    "the old format": (old_format, "of the kind that PyTorch 2.7 and older wrote"),
    "a function of torch": (calling("torch.os.mkdir"), "it calls 'torch.os.mkdir'"),
    "what torch imports": (calling("torch._higher_order_ops.utils.contextlib.os.mkdir"), "it calls"),
    "a dunder": (calling("torch.ops.__class__.x"), "it calls"),
    "any call": (calling("_operator.call"), "it calls"),
    "a library by an operator": (calling("torch.ops.load_library"), "it calls"),
    "writing files": (calling("torch.ops.aten.save.default"), "it calls"),
    "mapping files": (calling("torch.ops.aten.from_file.default"), "it calls"),
    "an operator's argument": (with_argument({"as_operator": "torch.os.mkdir"}), "it calls"),
    "an argument that looks like a remark": (
        with_argument({"as_string_to_argument": {"metadata": {"as_operator": "torch.os.mkdir"}}}),
        "it calls",
    ),
    "a guard": (with_guard(f"{BOOM} is None"), "a guard that is no comparison of sizes"),
    "a guard's attributes": (with_guard("L['x'].__class__.size() == 1"), "a guard"),
    "a guard's lambda": (with_guard("(lambda: 1)() == 1"), "a guard"),
    "a guard's comment": (with_guard("1 == 1 # x"), "a guard"),
    "a node's name": (renamed("conv2d", f"conv2d={BOOM}; conv2d"), "a name that is no name"),
    "an input's name": (renamed("input", f"input={BOOM}"), "a name that is no name"),
    "a weight's name": (renamed("0.weight", f'0.w"+{BOOM}+"'), "a name that is no name"),
    "a text as input": (
        program(lambda f: f["graph_module"]["graph"]["inputs"].append({"as_string": f"' == {BOOM} == '"})),
        "a name that is no name",
    ),
    "a default factory": (
        with_output("collections.defaultdict", {"default_factory_module": "os", "default_factory_name": "abort", "dict_context": []}),
        "a type of their own",
    ),
    "an enumeration": (with_output("builtins.dict", '[{"__enum__": true, "fqn": "os:x", "name": "y"}]'), "names that are no names"),
    "names of outputs": (with_output("builtins.dict", json.dumps([f"a' + {BOOM} + '"])), "names that are no names"),
    "a size": (with_expression(BOOM), "an expression that is no size"),
    "a size, spelled": (SPELLED, "an expression that is no size"),
    "a size of texts": (with_expression("Symbol('s0 + exec(1)')"), "an expression that is no size"),
    "a text for a number": (with_argument({"as_int": BOOM}), "where an export says nothing"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_archive_that_could_run_code_is_refused(attack: str, plain: Entries, here: Path) -> None:
    change, text = ATTACKS[attack]
    with pytest.raises(bnfold.ModelError, match=rf"{text}.*can run code when it is loaded; give trust_pickle=True"):
        bnfold.load(written(change(plain)))
    assert not Path("boom").exists()


@pytest.mark.parametrize("text", ["exec('1')", "os.mkdir('boom')", "s0.__class__", "'a'.join", "open(s0)", "[s0 for s0 in 'a']", "s0[0]"])
def test_an_expression_that_is_no_size_is_refused(text: str, plain: Entries, here: Path) -> None:
    with pytest.raises(bnfold.ModelError, match="an expression that is no size"):
        check_archive(written(with_expression(text)(plain)))


def test_a_guard_runs_code_in_torch_itself(plain: Entries, here: Path) -> None:
    """Why all this: with trust, the code runs."""
    bnfold.load(written(with_guard(f"{BOOM} is None")(plain)), trust_pickle=True).module()(torch.ones(3, 1, 8, 8))
    assert Path("boom").exists()


def no_text(data: bytes) -> bytes:
    """The last name of the directory said to be UTF-8, and made none."""
    at = data.rindex(b"PK\x01\x02")
    return data[: at + 9] + b"\x08" + data[at + 10 : at + 46] + b"\xff" + data[at + 47 :]


@pytest.mark.parametrize(
    "change", [lambda d: d[: len(d) // 2], lambda d: d.replace(b"PK\x01\x02", b"PK\x01\x03"), lambda d: d[:40], no_text]
)
def test_a_damaged_archive_is_one_line(change: Callable[[bytes], bytes], plain: Entries, here: Path) -> None:
    path = written(plain)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(bnfold.ModelError, match="damaged") as caught:
        check_archive(path)
    assert "\n" not in str(caught.value)


class Odd(nn.Module):
    """Names, structures and guards that a plain export may well hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3))
        self.layers = nn.ModuleDict({"a b": nn.Linear(4, 4), "é:x": nn.BatchNorm1d(4)})
        self.register_buffer("not-kept", torch.ones(4), persistent=False)
        self.constant = torch.arange(4.0)

    def forward(self, x: Any, flag: bool = True, mode: str = "max", scale: float = 2.0, *, extra: Any = None) -> Any:
        y = torch.einsum("bct,cd->bdt", self.first(x) + extra["k k"], self.layers["a b"].weight)
        count = (x > 0).sum().item()
        torch._check(count >= 0)
        torch._check(count < 10**6)
        taken = torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))
        with torch.no_grad():
            z = y.detach() * scale + self.constant[:, None] * getattr(self, "not-kept")[:, None]
        outputs = {"loss/total": z.mean(), "é": x[:, :, ::2], 3: y, "l": [taken, (torch.zeros(count + 1),)]}
        return self.layers["é:x"](y), outputs


@pytest.mark.parametrize("decomposed", [False, True])
def test_odd_but_plain_exports_pass(decomposed: bool, here: Path) -> None:
    call = Call((torch.randn(2, 3, 9), True, "max", float("inf")), {"extra": {"k k": torch.ones(2, 4, 7)}})
    made = trace(Odd().eval(), call).program
    torch.export.save(made.run_decompositions() if decomposed else made, "odd.pt2")
    check_archive(Path("odd.pt2"))
    assert isinstance(bnfold.load("odd.pt2"), torch.export.ExportedProgram)


@pytest.mark.parametrize(("text", "plain_one"), [("a b/é:[0].x-1", True), ("it's", False), ('"', False), ("a\nb", False), ("\\", False)])
def test_plain_text(text: str, plain_one: bool) -> None:
    assert is_plain_text(text) == plain_one

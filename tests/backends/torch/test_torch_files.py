"""PyTorch files: what they are is told by their content, nothing is unpickled unasked, and what is written is whole and loads again."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import torch
from modules import difference, lively, run
from torch import nn

import bnfold
from bnfold.backends.kinds import kind_of
from bnfold.backends.torch.files.load import build

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
FACTORY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, classes)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def make(classes=5):
    return Net(classes)


def broken():
    raise ValueError("no such\\nluck")


def odd():
    return 3


number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with net.py, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FACTORY)
    return tmp_path


@pytest.fixture
def net(here: Path) -> nn.Module:
    torch.manual_seed(0)
    return lively(build("net.py:make", None))


def said(path: str, **options: Any) -> tuple[nn.Module, list[str]]:
    notes: list[str] = []
    return bnfold.load(path, say=notes.append, **options), notes


def same(one: nn.Module, other: nn.Module) -> bool:
    return difference(run(one, X), run(other, X)) == 0


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda s: s, ""),
        (lambda s: {"state_dict": s, "epoch": 3}, "under 'state_dict'"),
        (lambda s: {"model": s, "optimizer": {"state": {0: {"exp": torch.ones(2)}}}}, "under 'model'"),
        (lambda s: {"model_ema": {"module": s}, "lr": 0.1}, "under 'model_ema.module'"),
        (lambda s: {"module." + k: v for k, v in s.items()}, "begin with 'module.'"),
        (lambda s: {"state_dict": {"_orig_mod.module." + k: v for k, v in s.items()}}, "begin with '_orig_mod.module.'"),
        (lambda s: {"module." + k: v for k, v in s.items()} | {"n_averaged": torch.tensor(3)}, "begin with 'module.'"),
        (lambda s: {"state_dict": s, "ema": s}, "also holds 'ema'"),
        (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, ""),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_is_found_wherever_it_is_nested(wrap: Any, note: str, legacy: bool, net: nn.Module) -> None:
    torch.save(wrap(net.state_dict()), "c.dat", _use_new_zipfile_serialization=not legacy)
    loaded, notes = said("c.dat", arch="net.py:make")
    assert same(net, loaded)
    assert not loaded.training
    assert bool(notes) == bool(note)
    assert note in "; ".join(notes)


def test_safetensors_and_a_factory_in_python(net: nn.Module) -> None:
    safetensors.torch.save_file(net.state_dict(), "s.bin")
    assert kind_of("s.bin") == "safetensors"
    assert same(net, bnfold.load("s.bin", arch=type(net), arch_args={"classes": 5}))


def test_weights_keep_their_type(net: nn.Module) -> None:
    torch.save(net.half().state_dict(), "half.pth")
    assert bnfold.load("half.pth", arch="net.py:make").conv.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("arch", "args", "text"),
    [
        (None, None, "weights without a network; say what builds it, with arch"),
        ("net.py", None, "write it as package.module:factory or FILE.py:FACTORY"),
        ("nope.py:make", None, "^arch=nope.py: no such file"),
        ("net.py:nope", None, "net.py has no 'nope'"),
        ("net.py:number", None, "'number' is of type int, which can't be called"),
        ("no.such.package:make", None, "there is no module 'no'"),
        ("net.py:broken", None, "arch=net.py:broken: it fails with ValueError: no such luck"),
        ("net.py:odd", None, "it gives an object of type int, not a torch.nn.Module"),
        ("net.py:make", {"depth": 3}, "it fails with TypeError: .*'depth'; see arch_args"),
    ],
)
def test_an_architecture_that_doesnt_work(arch: str | None, args: Any, text: str, net: nn.Module) -> None:
    torch.save(net.state_dict(), "c.pth")
    with pytest.raises(bnfold.UsageError, match=text):
        bnfold.load("c.pth", arch=arch, arch_args=args)


def test_weights_that_dont_fit_are_a_short_list(net: nn.Module) -> None:
    state = net.state_dict()
    del state["bn.weight"]
    state |= {f"extra.{i}": torch.ones(2) for i in range(9)}
    state["head.weight"] = torch.ones(3, 4)
    torch.save(state, "c.pth")
    text = r"1 of 8 are missing \(bn.weight\); 9 aren't in the architecture \(extra.0, extra.1, extra.2, ...\); 1 have another shape"
    with pytest.raises(bnfold.ModelError, match=text):
        bnfold.load("c.pth", arch="net.py:make")


def test_numbers_that_no_weight_holds(net: nn.Module) -> None:
    state = net.state_dict()
    torch.save(state | {"bn.weight": torch.ones(4, dtype=torch.int8)}, "c.pth")
    with pytest.raises(bnfold.ModelError, match=r"1 aren't floating-point numbers \(bn.weight int8\)"):
        bnfold.load("c.pth", arch="net.py:make")
    torch.save(state | {"bn.running_mean": state["bn.running_mean"].to_sparse()}, "c.pth")
    with pytest.raises(bnfold.UnsupportedError, match=r"holds sparse tensors \(bn.running_mean\)"):
        bnfold.fuse(bnfold.load("c.pth", arch="net.py:make"), example=X)


def test_one_number_for_all_channels(net: nn.Module) -> None:
    """A buffer that is expanded has one place for all of its numbers."""
    state = net.state_dict()
    torch.save(state | {"bn.running_mean": torch.zeros(1).expand(4)}, "c.pth")
    _, report = bnfold.recalibrate(bnfold.load("c.pth", arch="net.py:make"), X)
    assert report.samples == 3


def test_keys_that_mean_nothing_are_passed_over(net: nn.Module) -> None:
    """A profiler's counters by themselves, others as asked; what the architecture needs never is."""
    said: list[str] = []
    counted = {f"module.{key}": tensor for key, tensor in net.state_dict().items()}
    torch.save({**counted, "module.total_ops": torch.zeros(1), "module.bn.total_params": torch.zeros(1)}, "thop.pth")
    assert same(net, bnfold.load("thop.pth", arch="net.py:make", say=said.append))
    assert "thop.pth: counters of a profiler, passed over: module.total_ops, module.bn.total_params" in said

    torch.save({**counted, "module.loss.weight": torch.zeros(3)}, "loss.pth")
    with pytest.raises(bnfold.ModelError, match=r"1 aren't in the architecture.*ignore_keys=PATTERN, such as '\*loss\.\*'"):
        bnfold.load("loss.pth", arch="net.py:make")
    assert same(net, bnfold.load("loss.pth", arch="net.py:make", ignore_keys=["module.loss.*", "nothing"], say=said.append))
    assert said[-3:-1] == ["loss.pth: passed over, as asked: module.loss.weight", "loss.pth: no key matches 'nothing'"]
    assert same(net, bnfold.load("loss.pth", arch="net.py:make", ignore_keys=["*loss.*", "*weight"]))
    said.clear()
    assert same(net, bnfold.load("loss.pth", arch="net.py:make", ignore_keys=["*loss.*", "*bn.weight"], say=said.append))
    assert "loss.pth: '*bn.weight' matches weights of the architecture alone, and none of these is passed over" in said


def test_a_module_is_unpickled_only_with_trust(net: nn.Module) -> None:
    torch.save(net, "whole.pt")
    with pytest.raises(bnfold.ModelError, match=r"more than weights.*Net\), and could run code.*trust_pickle=True"):
        bnfold.load("whole.pt")
    with pytest.raises(bnfold.ModelError, match="trust_pickle=True"):
        bnfold.load("whole.pt", arch="net.py:make")
    assert same(net, bnfold.load("whole.pt", trust_pickle=True))
    torch.save({"model": net, "epoch": 1}, "nested.pt")
    assert same(net, bnfold.load("nested.pt", trust_pickle=True))


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("boom",)


def test_no_code_runs_without_trust(here: Path) -> None:
    Path("p.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": Bomb()}, "z.pt")
    for name in ("p.pt", "z.pt"):
        with pytest.raises(bnfold.ModelError):
            bnfold.load(name, arch="net.py:make")
    assert not Path("boom").exists()


def test_torchscript_is_recognised(net: nn.Module) -> None:
    torch.jit.save(torch.jit.trace(net, X), "ts.pt")
    with pytest.raises(bnfold.UnsupportedError, match=r"TorchScript archive.*arch, or export"):
        bnfold.load("ts.pt")


def test_damaged_files_are_one_line(net: nn.Module) -> None:
    torch.save(net.state_dict(), "c.pth")
    data = Path("c.pth").read_bytes()
    for name, content in (
        ("cut.pth", data[: len(data) // 2]),
        ("pickle.pt", b"\x80\x02garbage"),
        ("s.safetensors", b"\x10" + bytes(7) + b'{"a": 1}        '),
    ):
        Path(name).write_bytes(content)
        with pytest.raises(bnfold.BnfoldError) as caught:
            bnfold.load(name, arch="net.py:make")
        assert "\n" not in str(caught.value)
        assert caught.value.exit_status == 3
    torch.save({"lr": 0.1}, "none.pth")
    with pytest.raises(bnfold.ModelError, match="no state dict in it"):
        bnfold.load("none.pth", arch="net.py:make")


# --- exported programs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(net: nn.Module) -> Path:
    exported = torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},))
    torch.export.save(exported, "m.pt2")
    return Path("m.pt2")


def test_an_exported_program_loads_whatever_its_name(program: Path, net: nn.Module) -> None:
    program.rename("model.onnx")
    loaded = bnfold.load("model.onnx")
    assert isinstance(loaded, torch.export.ExportedProgram)
    assert difference(run(net, X), run(loaded, X)) < 1e-6


# --- writing --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f.safetensors", "f.pth", "f.bin", "f.ckpt"])
def test_a_folded_state_dict_loads_into_the_unfolded_class(name: str, net: nn.Module) -> None:
    fused, _ = bnfold.fuse(net, example=X)
    bnfold.save(fused, name)
    loaded, notes = said(name, arch="net.py:make")
    assert same(fused, loaded)
    assert isinstance(loaded.bn, nn.Identity)
    assert "folded" in notes[-1]
    with pytest.raises(bnfold.UsageError, match="the file exists"):
        bnfold.save(fused, name)
    bnfold.save(fused, name, force=True)
    assert {path.name for path in Path().iterdir()} == {"net.py", name} | ({"__pycache__"} if Path("__pycache__").exists() else set())


def test_the_record_says_what_became_of_every_key(net: nn.Module) -> None:
    fused, _ = bnfold.fuse(net, example=X)
    bnfold.save(fused, "f.safetensors")
    with safetensors.safe_open("f.safetensors", "pt") as file:
        record = json.loads(file.metadata()["bnfold"])
    assert record["replaced"] == {"bn": []}
    assert record["biases"] == {"conv": [4]}
    assert record["keys"]["conv.weight"] == "conv.weight"
    assert record["keys"]["bn.running_mean"] is None
    assert set(record["keys"]) == set(net.state_dict())


class Fixed(nn.Module):
    """A convolution and a BatchNorm by functions, with buffers of which a state dict holds one."""

    def __init__(self) -> None:
        super().__init__()
        parts = {"weight": torch.ones(4, 1, 3, 3), "bias": torch.zeros(4), "mean": torch.arange(4.0), "var": torch.arange(1.0, 5)}
        for name, tensor in parts.items():
            self.register_buffer(name, tensor, persistent=name == "bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(nn.functional.conv2d(x, self.weight, self.bias), self.mean, self.var)


@pytest.mark.parametrize("name", ["f.safetensors", "f.pth"])
def test_buffers_that_a_state_dict_left_out_are_written_where_they_changed(name: str, here: Path) -> None:
    net = Fixed().eval()
    fused, report = bnfold.fuse(net, example=X)
    assert [layer.verdict for layer in report.layers] == ["folded"]
    bnfold.save(fused, name)
    assert difference(run(net, X), run(bnfold.load(name, arch=Fixed), X)) < 1e-5
    assert set(net.state_dict()) == {"bias"}


def test_a_network_that_wasnt_folded_is_saved_as_it_is(net: nn.Module) -> None:
    bnfold.save(net, "n.pth")
    assert torch.load("n.pth", weights_only=True).keys() == net.state_dict().keys()


def test_a_module_and_a_program(net: nn.Module) -> None:
    fused, _ = bnfold.fuse(net, example=X)
    bnfold.save(fused, "f.pt")
    assert same(fused, bnfold.load("f.pt", trust_pickle=True))
    bnfold.save(fused, "f.pt2", example=X)
    again = bnfold.load("f.pt2")
    assert difference(run(fused, X), run(again, X)) < 1e-6
    with pytest.raises(bnfold.UsageError, match=r"written as \.pt2 or \.onnx"):
        bnfold.save(again, "f.pth")
    with pytest.raises(bnfold.UsageError, match="must end in one of"):
        bnfold.save(fused, "f.zip")


@pytest.mark.filterwarnings("ignore")
def test_a_volume_convolution_without_bias_is_written_as_onnx(here: Path) -> None:
    """torch's exporter gives it a bias that no runtime takes."""
    module, x = nn.Sequential(nn.Conv3d(2, 4, 3, bias=False), nn.ReLU(), nn.Conv3d(4, 3, 1, bias=False)).eval(), torch.randn(2, 2, 5, 5, 5)
    bnfold.save(module, "f.onnx", example=x)
    model = onnx.load("f.onnx")
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "Conv"]
    session = pytest.importorskip("onnxruntime").InferenceSession("f.onnx")
    (found,) = session.run(None, {model.graph.input[0].name: x.numpy()})
    assert abs(found - module(x).detach().numpy()).max() < 1e-5


def test_a_module_that_cant_be_pickled_isnt_written(net: nn.Module) -> None:
    net.act = lambda x: x
    with pytest.raises(bnfold.UnsupportedError, match="can't be pickled"):
        bnfold.save(net, "f.pt")
    assert not list(Path().glob("*f.*"))


def test_onnx_is_checked_and_keeps_the_dynamic_batch(net: nn.Module) -> None:
    fused, _ = bnfold.fuse(net, example=X)
    bnfold.save(fused, "f.onnx", example=X)
    model = onnx.load("f.onnx")
    onnx.checker.check_model(model)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert bnfold.verify(fused, model, X).verdict == "equivalent"


OPEN = "open"
FLAT: list[nn.Module] = [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("rest", "shape", "axes"),
    [
        (FLAT, (2, 1, 8, 8), [OPEN, 1, 8, 8, OPEN, 10]),
        (FLAT, (1, 1, 8, 8), [OPEN, 1, 8, 8, OPEN, 10]),
        ([nn.Flatten(2), nn.Linear(64, 3)], (2, 1, 8, 8), [OPEN, 1, 8, 8, OPEN, 4, 3]),
        ([nn.Linear(6, 3)], (2, 1, 8, 6), [OPEN, 1, OPEN, 6, OPEN, 4, OPEN, 3]),
        ([nn.MaxPool2d(2)], (2, 1, 8, 8), [OPEN, 1, OPEN, OPEN, OPEN, 4, OPEN, OPEN]),
        ([nn.PixelUnshuffle(4)], (2, 1, 8, 8), [OPEN, 1, OPEN, OPEN, OPEN, 64, OPEN, OPEN]),
        ([nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)], (2, 1, 8, 8), [OPEN, 1, OPEN, OPEN, OPEN, 2]),
    ],
)
def test_axes_that_only_one_size_fits_are_fixed_in_onnx(rest: list[nn.Module], shape: tuple[int, ...], axes: list[Any], here: Path) -> None:
    """torch.export leaves them open where a product of sizes alone is fixed; those that fit multiples of it stay open."""
    torch.manual_seed(0)
    net = lively(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), *rest)).eval()
    x = torch.randn(*shape)
    bnfold.save(net, "f.onnx", example=x)
    model = onnx.load("f.onnx")
    onnx.checker.check_model(model, full_check=True)
    infos = (*model.graph.input, *model.graph.output)
    found = [OPEN if d.dim_param else d.dim_value for info in infos for d in info.type.tensor_type.shape.dim]
    assert found == axes
    names = {d.dim_param for info in infos for d in info.type.tensor_type.shape.dim if re.fullmatch(r"\w+", d.dim_param)}
    assert names <= {"batch", *(f"{infos[0].name}_axis_{axis}" for axis in range(4))}
    assert bnfold.verify(net, model, x).verdict != "different"


def test_tied_weights_can_be_saved(here: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
    net[2].weight = net[0].weight
    bnfold.save(net, "t.safetensors")
    assert set(safetensors.torch.load_file("t.safetensors")) == set(net.state_dict())


def test_what_onnx_has_no_operator_for_is_named(tmp_path: Path) -> None:
    class Simulated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -127, 127)

    with pytest.raises(
        bnfold.UnsupportedError, match=r"can't write this model: .*ONNX allows only.*Got \(-127, 127\); write \.pt2 instead"
    ):
        bnfold.save(Simulated().eval(), tmp_path / "model.onnx", example=X)
    assert not list(tmp_path.iterdir())


def test_a_program_that_pytorch_can_not_write(net: nn.Module, tmp_path: Path) -> None:
    program = torch.export.export(net, (X,))
    program.module_call_graph[0].fqn = 1  # among names: as a damaged file may have it
    with pytest.raises(bnfold.UnsupportedError, match="can't write the program"):
        bnfold.save(program, tmp_path / "net.pt2")
    assert [each.name for each in tmp_path.iterdir()] == ["net.py"]

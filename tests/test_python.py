"""The library as programs and notebooks meet it."""

from __future__ import annotations

import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bnfold
from bnfold.library import in_python


@pytest.fixture
def x(here: Path) -> np.ndarray:
    """Data for the models in the working directory."""
    return np.load("x.npy")


def test_a_verdict_is_true_where_it_is_equivalent_alone(x: np.ndarray) -> None:
    model, another = bnfold.load("model.onnx"), bnfold.load("another.onnx")
    fused, _ = bnfold.fuse(model)
    reports = [bnfold.verify(model, other, [x]) for other in (fused, another, model)]
    assert [report.verdict for report in reports] == ["equivalent", "different", "inconclusive"]
    assert [report.equivalent for report in reports] == [bool(report) for report in reports] == [True, False, False]


def test_all_verbs_are_there(x: np.ndarray) -> None:
    model = bnfold.load("model.onnx")
    ready, report = bnfold.pipeline(model, [x])
    assert isinstance(report, bnfold.PipelineReport)
    assert report.verify
    timed = bnfold.bench(model, ready, x, rounds=2)
    assert isinstance(timed, bnfold.BenchReport)
    assert timed.seconds > 0
    assert report.seconds > 0
    assert timed.batch_size == len(x)  # an array is one batch, not as many as it has rows
    assert bnfold.bench(model, ready, [x[:3], x], rounds=2).batch_size == 3
    assert isinstance(bnfold.inspect(model), bnfold.InspectReport)
    assert bnfold.pipeline is bnfold.pipeline


def test_an_argument_that_there_is_not_is_named_with_the_one_that_was_meant(x: np.ndarray) -> None:
    model = bnfold.load("model.onnx")
    for verb, name, meant in ((bnfold.fuse, "clmps", "clamps"), (bnfold.pipeline, "drop_daed", "drop_dead")):
        with pytest.raises(TypeError, match=rf"{verb.__name__}\(\) has no argument '{name}'; did you mean '{meant}'\?"):
            verb(model, [x], **{name: True})


def test_progress_for_the_asking(x: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    model = bnfold.load("model.onnx")
    bnfold.recalibrate(model, [x])
    assert capsys.readouterr().err == ""
    bnfold.recalibrate(model, [x], progress=True)
    err = capsys.readouterr().err
    assert "\r" in err
    assert err.endswith("\r")
    assert "\n" not in err
    seen = []
    bnfold.recalibrate(model, [x], progress=lambda *found: seen.append(found))
    assert all(stage in err for stage, *_ in seen[:1])


def test_what_goes_on_is_logged(x: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    model = bnfold.load("model.onnx")
    with caplog.at_level(logging.DEBUG, "bnfold"):
        fused, _ = bnfold.fuse(model)
        bnfold.verify(model, fused, [x])
    found = {(record.levelname, record.message.partition(":")[0]) for record in caplog.records if record.name == "bnfold"}
    assert {("DEBUG", "fuse begins"), ("INFO", "fuse"), ("INFO", "verify")} <= found
    assert sum(level == "DEBUG" for level, _ in found) > 2  # the stages too
    assert any("equivalent" in record.message for record in caplog.records)


def test_a_module_in_training_mode_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    with caplog.at_level(logging.WARNING, "bnfold"):
        bnfold.fuse(net.eval(), example=torch.randn(2, 3, 8, 8))
        assert caplog.records == []
        bnfold.fuse(net.train(), example=torch.randn(2, 3, 8, 8))
    assert [record.message for record in caplog.records] == [
        "fuse: 1 BatchNorm in training mode can't fold: call eval() on the model, or export it so"
    ]


def test_data_in_the_forms_that_loaders_give(x: np.ndarray) -> None:
    """Pairs of images and labels for a module that hands on what it is given, a dict for one that takes it whole, batches given once."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()).eval()
    pairs = [(torch.tensor(x[i : i + 4]), torch.zeros(4, dtype=torch.int64)) for i in range(0, len(x), 4)]
    wanted, _ = bnfold.recalibrate(net, x)

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.other = net, torch.nn.Identity()

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.net(batch["image"])

    averaged = torch.optim.swa_utils.AveragedModel(net)
    for model, batches in (
        (averaged, torch.utils.data.DataLoader([(torch.tensor(each), 0) for each in x], batch_size=4)),
        (torch.nn.DataParallel(net), pairs),
        (Whole().eval(), [{"image": image, "label": label} for image, label in pairs]),
        (net, iter(pairs)),
    ):
        ready, report = bnfold.pipeline(model, batches)
        assert report.fuse.batchnorms.after == 0
        found = ready(pairs[0][0]) if not isinstance(model, Whole) else ready({"image": pairs[0][0]})
        torch.testing.assert_close(found, wanted(pairs[0][0]))


def test_buffers_that_code_writes_into_are_as_before(x: np.ndarray) -> None:
    torch = pytest.importorskip("torch")

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.b = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            self.calls += 1
            return self.b(self.c(batch["image"]))

    net = Counting().eval()
    fresh, _ = bnfold.recalibrate(net, [{"image": torch.tensor(x)}])
    assert (int(net.calls), int(fresh.calls)) == (0, 0)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("x.npy", "the data are str; give an array"),
        (None, "the data are NoneType"),
        (iter(()), "the data hold no batch: give at least one; an iterator gives its batches only once"),
    ],
)
def test_what_holds_no_batch(data: object, said: str) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    for verb in (bnfold.recalibrate, bnfold.pipeline):
        with pytest.raises(bnfold.DataError, match=said):
            verb(net, data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.pth: say what builds it, with --arch FILE.py:FACTORY", "a.pth: say what builds it, with arch=FILE.py:FACTORY"),
        ("give the --arch that they were trained with", "give the arch that they were trained with"),
        ("give --trust-pickle if you trust it", "give trust_pickle=True if you trust it"),
        ("--input-shape names 'z'", "input_shapes names 'z'"),
        ("--data x.npy, and --equalise or --lower mul-add", "batches=x.npy, and equalise=True or lower mul-add"),
        ("leave the scores out (--eval none)", "leave the scores out (labelled=None)"),
        ("--max-bad is the command line's alone", "--max-bad is the command line's alone"),
        ("a - b, -o and --- stay", "a - b, -o and --- stay"),
    ],
)
def test_errors_speak_of_arguments(text: str, said: str) -> None:
    assert in_python(text) == said


def test_an_error_names_the_argument_of_the_verb_that_was_called() -> None:
    for verb, said in ((bnfold.verify, "providers='cpu'"), (bnfold.recalibrate, "provider='cpu'")):
        assert in_python("--provider 'cpu'", inspect.signature(verb).parameters) == said


def test_errors_of_verbs_speak_of_arguments(here: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.ones(3)}, "state.pth")
    with pytest.raises(bnfold.UsageError, match=r"with arch=package.module:factory or arch=FILE.py:FACTORY"):
        bnfold.load("state.pth")


def test_a_type_checker_sees_that_a_verb_gives_back_what_it_was_given(tmp_path: Path) -> None:
    """And that the README's program is right in every type."""
    pytest.importorskip("mypy")
    root = Path(bnfold.__file__).parents[1]
    (readme,) = re.findall(r"^```python\n(import bnfold\n.*?)^```$", (root / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "readme.py").write_text(readme)
    (tmp_path / "mine.py").write_text(
        "import bnfold, onnx_ir, torch\n"
        "class Net(torch.nn.Module): ...\n"
        "def go(net: Net, model: onnx_ir.Model) -> None:\n"
        "    reveal_type(bnfold.fuse(net))\n"
        "    reveal_type(bnfold.recalibrate(model, [])[0])\n"
        "    reveal_type(bnfold.pipeline(net, [])[0])\n"
    )
    skipped = "[mypy-torch.*,onnx,onnx.*,numpy.*,rich.*]\nfollow_imports = skip\n"  # which takes four times as long
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\ndisallow_subclassing_any = False\n{skipped}")
    line = [sys.executable, "-m", "mypy", "mine.py", "readme.py"]
    done = subprocess.run(line, cwd=tmp_path, env={"PYTHONPATH": str(root), "PATH": ""}, capture_output=True, text=True)
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert revealed == ["tuple[mine.Net, bnfold.report.fuse.FuseReport]", "onnx_ir._core.Model", "mine.Net | None"], done.stdout
    assert done.returncode == 0, done.stdout + done.stderr

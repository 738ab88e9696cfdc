"""The public face: complete, typed, and light to import."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import bnfold
from bnfold import errors

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("pydantic", "torch", "onnx", "onnxruntime", "onnx_ir", "numpy")


def test_every_public_name_is_there() -> None:
    for name in bnfold.__all__:
        assert getattr(bnfold, name) is not None
    assert set(bnfold.__all__) <= set(dir(bnfold))


def test_no_module_bears_the_name_of_a_verb() -> None:
    assert not set(bnfold.__all__) & {path.stem for path in (ROOT / "bnfold").iterdir()}


def test_every_error_is_public() -> None:
    own = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.BnfoldError)}
    assert own == {name for name in bnfold.__all__ if name.endswith("Error")}


def test_every_verb_is_documented() -> None:
    for name in ("load", "save", "inspect", "recalibrate", "fuse", "verify"):
        assert inspect.getdoc(getattr(bnfold, name)), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'bnfold' has no attribute 'fold_it'"):
        _ = bnfold.fold_it


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(bnfold.__file__).parent / "py.typed").is_file()


def test_the_command_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["bnfold"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def loaded_by(code: str) -> set[str]:
    """The heavy packages that are imported once the code has run."""
    program = f"import sys\n{code}\nprint(*(m for m in {HEAVY} if m in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stderr.split("\n")[-2].split())


def test_importing_bnfold_and_its_help_imports_nothing_heavy() -> None:
    assert loaded_by("import bnfold; bnfold.UsageError") == set()
    for arguments in (["--help"], ["pipeline", "--help"], ["--version"]):
        assert loaded_by(f"from bnfold.cli import run\nassert run({arguments}) == 0") == set()


def test_no_command_imports_torch(tmp_path: Path, digits: Path) -> None:
    fused = str(tmp_path / "fused.onnx")
    lines = (["fuse", str(digits), "-o", fused], ["verify", str(digits), fused])
    code = f"from bnfold.cli import run\nfor line in {lines}:\n    assert run(line) == 0"
    assert "torch" not in loaded_by(code)


def test_a_command_imports_nothing_to_read_its_options_with(digits: Path) -> None:
    code = f"from bnfold.cli import run\nassert run({['fuse', str(digits), '--dry-run', '--no-verify', '--json']}) == 0"
    assert "pydantic" not in loaded_by(code)  # which Typer would convert them by

"""What `python -m tests.versions` reads of the project; it makes its environments in CI alone."""

from __future__ import annotations

import inspect
import sys

import pytest

from bnfold.cli.commands import command_line
from tests import versions


def test_the_bounds_are_those_of_the_project() -> None:
    assert set(versions.bounds()) == {"numpy", "onnx", "onnx-ir", "onnxruntime", "pillow", "rich", "safetensors", "tomli", "typer"}
    assert set(versions.bounds("torch")) == {"torch", "onnxscript"}


def test_the_running_python_is_found() -> None:
    assert versions.interpreters()[f"{sys.version_info.major}.{sys.version_info.minor}"] == sys.executable


def test_the_readme_has_the_digits_pipeline() -> None:
    assert versions.digits()[:2] == ["pipeline", "samples/digits/digits.onnx"]


@pytest.mark.parametrize("name", ["inspect", "recalibrate", "fuse", "verify", "pipeline", "bench"])
def test_no_option_hides_behind_its_default(name: str) -> None:
    """As typing.get_type_hints does in Python 3.10, where the default is None: what Typer reads is what is written."""
    parameters = inspect.signature(command_line(only=name).commands[name].callback).parameters
    assert parameters
    assert all(hasattr(each.annotation, "__metadata__") for each in parameters.values()), parameters

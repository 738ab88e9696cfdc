"""What CONTRIBUTING.md names is there: files, functions, commands, and the code that it shows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"<!-- in (\S+) -->\n```python\n(.*?)```", TEXT, re.S)


def test_its_files_are_there() -> None:
    named = set(re.findall(r"`((?:bnfold|tests|\.ci)/[\w/.]*)`", TEXT)) | set(re.findall(r"python (?:-m pytest -q )?(tests/[\w/.]+)", TEXT))
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_its_commands_are_there() -> None:
    modules = set(re.findall(r"python -m (tests\.\w+)", TEXT))
    assert modules
    for name in modules:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_its_functions_are_there() -> None:
    found = re.findall(r"`([\w/]+\.py)`\s\(((?:`\w+`(?:,\s)?)+)\)", TEXT)
    assert len(found) == 3
    for path, names in found:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        there |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
        assert set(re.findall(r"\w+", names)) <= there, path


@pytest.mark.parametrize(("path", "code"), SHOWN, ids=[path for path, _ in SHOWN])
def test_the_code_that_it_shows_is_there(path: str, code: str) -> None:
    assert code in (ROOT / path).read_text(encoding="utf-8")

"""The reader's map: every file and every name on it is there, and no room is missing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import bnfold
from bnfold.model import Model

ROOT = Path(bnfold.__file__).parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SPANS = re.findall(r"`([^`]+)`", TEXT)


def names_in(path: Path) -> set[str]:
    """What a file defines at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= {target.id for target in ast.walk(node) if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)}
    return found


def test_every_file_and_folder_is_there() -> None:
    named = [span.partition(":")[0] for span in SPANS if re.fullmatch(r"[\w/]+(\.py(:\w+)?|/)", span)]
    inner = [f"backends/{kind}/{span}" for kind in ("onnx", "torch") for span in named]  # rooms within a room, told beside it
    inner += [f"verification/{span}" for span in named]
    known = {span for span in (*named, *inner) if (ROOT / span).exists()}
    assert [span for span in named if span not in known and not any(each.endswith(f"/{span}") for each in known)] == []
    assert len(named) > 50


def test_every_name_is_there() -> None:
    named = [span.split(":") for span in SPANS if re.fullmatch(r"[\w/]+\.py:\w+", span)]
    assert [f"{file}:{name}" for file, name in named if name not in names_in(ROOT / file)] == []
    assert len(named) > 10


def test_every_method_of_a_model_is_there() -> None:
    listed = re.findall(r"With ((?:`\w+`(?:, | and )?)+)", TEXT)
    methods = [span.removeprefix("Model.") for span in SPANS if span.startswith("Model.")]
    methods += [name for names in listed for name in re.findall(r"`(\w+)`", names)]
    assert [name for name in methods if not hasattr(Model, name)] == []
    assert len(methods) > 15


def test_no_room_is_missing() -> None:
    rooms = [f"{path.name}/" if path.is_dir() else path.name for path in ROOT.iterdir() if not path.name.startswith(("_", "py.", "README"))]
    assert [room for room in rooms if f"`{room}`" not in TEXT] == []

"""The house stands on its own feet: a room imports from rooms below it alone, and no module imports, by whatever way, itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import bnfold

ROOT = Path(bnfold.__file__).parent
# From the top down. Rooms on one line don't know each other.
ROOMS = """
    __init__ __main__
    library
    cli
    verbs
    api
    certificates
    backends
    verification
    recalibration
    model
    running folding
    data
    report
    files
    text capture
    algebra
    errors _version
"""
FLOOR = {room: floor for floor, line in enumerate(ROOMS.split("\n")) for room in line.split()}
FILES = ((path, path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py"))
MODULES = {".".join(parts).removesuffix(".__init__"): path for path, parts in FILES}


def imports(module: str) -> Iterator[str]:
    """The modules that one imports, at any place, for types too."""
    package = module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = ".".join([*package.split(".")[: 1 - node.level or None], node.module or ""]) if node.level else node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}".replace("..", ".")
                yield whole if whole in MODULES else base.rstrip(".")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


EDGES = {module: {other for other in imports(module) if other in MODULES and other != module} for module in MODULES}


def test_every_module_has_a_room() -> None:
    assert {room(module) for module in MODULES} == FLOOR.keys()


def test_a_room_imports_only_from_rooms_below_it() -> None:
    edges = ((one, other) for one in EDGES for other in EDGES[one] if room(one) != room(other) and other != "bnfold")
    assert [f"{one} -> {other}" for one, other in edges if FLOOR[room(other)] <= FLOOR[room(one)]] == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter(EDGES).prepare()  # a CycleError names the circle


def test_the_kinds_of_models_are_known_in_the_back_ends_alone() -> None:
    kinds = ("bnfold.backends.onnx", "bnfold.backends.torch")
    assert [f"{one} -> {other}" for one in EDGES if room(one) != "backends" for other in EDGES[one] if other.startswith(kinds)] == []

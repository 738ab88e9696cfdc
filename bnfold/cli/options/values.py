"""What a shell offers behind an option: its few words, a model's layers, recipes; nothing where that can't be told, and then files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

Values = Callable[[], Iterable[str]]


def offered(values: Values) -> Callable[[str], list[str]]:
    """Those of the values that begin as what is typed. What goes wrong is nobody's concern who hasn't finished typing."""

    def complete(incomplete: str) -> list[str]:
        try:
            return [each for each in values() if each.startswith(incomplete)]
        except Exception:
            return []

    return complete


def words(metavar: str) -> Values | None:
    """The words of "biased|unbiased"; None for what stands for something else."""
    return (lambda: metavar.split("|")) if "|" in metavar and metavar.islower() else None


def methods() -> Iterable[str]:
    from bnfold.recalibration.methods import METHODS

    return METHODS


def interpolations() -> Iterable[str]:
    from bnfold.data.images.options import INTERPOLATIONS

    return INTERPOLATIONS


def providers() -> Iterable[str]:
    from bnfold.backends.open import providers as there

    return there()


def layers() -> Iterable[str]:
    """The BatchNorms of the first file on the line, unless that needs more to be read than its name."""
    from bnfold import api

    line = os.environ.get("COMP_WORDS") or os.environ["_TYPER_COMPLETE_ARGS"]
    path = next(path for path in map(Path, shlex.split(line.rpartition(" ")[0])) if path.is_file())
    return [layer.name for layer in api.inspect(api.load(path)).layers]


def operators() -> Iterable[str]:
    from bnfold.verbs.explanations import WORDS

    return dict.fromkeys([*WORDS, *(name for *_, names in WORDS.values() for name in names.split())])


def recipes() -> Iterable[str]:
    from ..settings import RECIPES, nearest

    return list(nearest(Path.cwd())[1].get(RECIPES, {}))

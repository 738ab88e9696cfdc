"""What the user's data can be, as batches: files, folders, functions, arrays and loaders.

Every form becomes a `Source` of chunks (`source`, and by name `files`, `open`, `random`, `images` and `tables`); `Data` fits the
chunks to the model's inputs (`spec`, `inputs`) and cuts them into batches (`batches`). `open` has the doors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .spec import Array, Batch, InputSpec

if TYPE_CHECKING:
    from .batches import Data
    from .inputs import WHOLE, Counted
    from .open import as_batches, open_data
    from .source import BATCH_SIZE, LABELS, Chunk, digest

__all__ = [
    "BATCH_SIZE",
    "LABELS",
    "WHOLE",
    "Array",
    "Batch",
    "Chunk",
    "Counted",
    "Data",
    "InputSpec",
    "as_batches",
    "digest",
    "open_data",
]
# Whoever folds has no data: what reads them is imported when it is asked for.
_HOMES = {"Data": "batches", "WHOLE": "inputs", "Counted": "inputs", "as_batches": "open", "open_data": "open"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bnfold.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES.get(name, 'source')}", __name__), name)

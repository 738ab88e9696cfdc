"""The `datasets` library as the reader of tables: without a network, silent, and with errors of one line."""

from __future__ import annotations

import glob
import importlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnfold.errors import DataError

ROWS = 64  # that are read at once
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_LOCK = threading.RLock()


class Library:
    """The library, reading what `spec` names. DataError where it isn't installed."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        try:
            importlib.import_module("pyarrow")
            self.datasets: Any = importlib.import_module("datasets")
        except ImportError as error:
            what = "isn't installed" if error.name in ("datasets", "pyarrow") else f"can't be imported ({error})"
            raise DataError(f"{spec}: reading it needs the datasets library, which {what}; install bnfold[datasets]") from None

    @contextmanager
    def reading(self, where: str | None = None) -> Iterator[None]:
        """The library alone, its errors as DataErrors of one line that name `where`, or all that is read."""
        try:
            with _alone(self.datasets):
                yield
        except (DataError, MemoryError):
            raise
        except Exception as error:  # of any kind: each of its readers has its own
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise DataError(f"{where or self.spec}: can't be read ({type(error).__name__}: {lines[0][:300].rstrip('.')})") from None

    def rows(self, dataset: Any) -> Iterator[Any]:
        """The arrow tables of a data set."""
        with self.reading():
            tables = iter(dataset.with_format("arrow").iter(batch_size=ROWS))
        while True:
            with self.reading():
                table = next(tables, None)
            if table is None:
                return
            yield table

    def streamed(self, kind: str, files: Sequence[Path], **more: Any) -> Any:
        """The rows of files, streamed: nothing is copied, and only locks are written, to a folder that is gone at once."""
        paths = [glob.escape(os.path.abspath(path)) for path in files]
        with self.reading(), tempfile.TemporaryDirectory(prefix="bnfold-") as cache:
            return self.datasets.load_dataset(kind, data_files={"train": paths}, split="train", streaming=True, cache_dir=cache, **more)


@contextmanager
def _alone(datasets: Any) -> Iterator[None]:
    """The library without a network, progress bars and a log of its own, for as long as this lasts, in one thread at a time."""
    hub, log = importlib.import_module("huggingface_hub.constants"), logging.getLogger("datasets")
    with _LOCK:
        flags = [(owner, name) for owner in (datasets.config, hub) for name in OFFLINE if hasattr(owner, name)]
        before, level, bars = [getattr(owner, name) for owner, name in flags], log.level, datasets.are_progress_bars_disabled()
        variables = {name: os.environ.get(name) for name in OFFLINE}
        try:
            for owner, name in flags:
                setattr(owner, name, True)
            os.environ.update(dict.fromkeys(OFFLINE, "1"))
            log.setLevel(logging.CRITICAL)
            datasets.disable_progress_bars()
            yield
        finally:
            for (owner, name), value in zip(flags, before, strict=True):
                setattr(owner, name, value)
            for name, text in variables.items():
                if text is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = text
            log.setLevel(level)
            if not bars:
                datasets.enable_progress_bars()

"""Tables to read: tar shards, Parquet files and data sets of images of known shades and classes, or of known arrays."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnfold.data import InputSpec
from bnfold.errors import DataError

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

F32 = np.dtype(np.float32)
PICTURES = [InputSpec("x", F32, ("n", 3, 16, 16))]
ROWS = [InputSpec("x", F32, ("n", 3))]
A = np.arange(60, dtype=np.float32).reshape(20, 3)
LABELS = np.arange(20)


def png(shade: int, size: tuple[int, int] = (16, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (10 * shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def shades(data) -> list[int]:
    return [round(float(v) * 25.5) for batch in data for v in batch["x"][:, 0, 8, 8]]


def refused(text: str, call) -> None:
    with pytest.raises(DataError, match=re.escape(text)) as caught:
        for _ in call():
            pass
    assert "\n" not in str(caught.value)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def tar(path: Path, first: int, last: int, **more: bytes) -> Path:
    """Samples first to last - 1, of their own shade and class. more: files of each, by their suffix, in place of these or beside them."""
    with tarfile.open(path, "w") as archive:
        for i in range(first, last):
            for suffix, content in {"png": png(i), "cls": str(i).encode(), **more}.items():
                add(archive, f"{i:03}.{suffix}", content)
    return path


def described(path: Path, *documents: object) -> str:
    """A tar of images of rising shades, each with a .json file and no .cls file."""
    with tarfile.open(path, "w") as archive:
        for i, document in enumerate(documents):
            add(archive, f"{i:03}.png", png(i % 25))
            add(archive, f"{i:03}.json", json.dumps(document).encode())
    return str(path)


def images(first: int, last: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=20)})
    rows = {"image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(first, last)], "label": list(range(first, last))}
    return datasets.Dataset.from_dict(rows, features=features)


def write(path: Path, **columns) -> str:
    parquet.write_table(pa.table({name: pa.array(list(values)) for name, values in columns.items()}), path)
    return str(path)

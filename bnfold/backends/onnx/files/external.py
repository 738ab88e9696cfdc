"""External data: the files beside a model that hold its weights, opened with suspicion and mapped into memory."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path, PureWindowsPath

import onnx
from onnx import TensorProto

from bnfold.errors import ModelError

from .validate import nbytes


class Files:
    """The data files of one model. Each is opened, checked and mapped once.

    A file must lie in the model's folder. Where the model itself is a link, as in Hugging Face's cache, its data may lie with the file
    that it leads to. Absolute paths, '..', other links that lead out, and hard links, which can be any file of the machine, are refused
    (as onnx does): a model from elsewhere must not be able to read them.
    """

    def __init__(self, model: Path) -> None:
        self._bases = list(dict.fromkeys((model.parent.resolve(), model.resolve().parent)))
        self._maps: dict[str, tuple[memoryview, Path]] = {}

    def read(self, tensor: TensorProto) -> tuple[memoryview, Path]:
        """The tensor's bytes, not read from the disk yet, and the file that holds them.

        Raises ModelError where they aren't there or mustn't be read.
        """
        info = {entry.key: entry.value for entry in tensor.external_data}
        location, need = info.get("location", ""), nbytes(tensor)
        data, file = self._open(location, tensor.name)
        try:
            offset, length = int(info.get("offset") or 0), int(info.get("length") or need)
        except ValueError:
            raise ModelError(f"tensor '{tensor.name}' has an offset or a length that is no number; export the model again") from None
        if length != need:
            raise ModelError(
                f"tensor '{tensor.name}' takes {length:,} bytes of '{location}', its shape {list(tensor.dims)} asks for {need:,}; "
                "export the model again"
            )
        if offset < 0 or offset + need > len(data):
            raise ModelError(
                f"tensor '{tensor.name}' needs bytes {offset:,} to {offset + need:,} of '{location}', which has {len(data):,}; "
                "copy the whole file"
            )
        return data[offset : offset + need], file

    def _open(self, location: str, name: str) -> tuple[memoryview, Path]:
        if location in self._maps:
            return self._maps[location]
        parts = PureWindowsPath(location)  # which knows both kinds of slash
        if not location or parts.anchor or ".." in parts.parts:
            raise ModelError(f"tensor '{name}' points outside the model's folder ('{location}'), which is not safe")
        found = next((there for base in self._bases if (there := base / location).exists()), None)
        if found is None:
            raise ModelError(f"the file '{location}' with the data of tensor '{name}' is missing from {self._bases[0]}; copy it there")
        real = found.resolve()
        if not any(real.is_relative_to(base) for base in self._bases):
            raise ModelError(f"tensor '{name}' points outside the model's folder ('{location}' is a link to {real}), which is not safe")
        try:
            with open(real, "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise ModelError(f"'{location}', with the data of tensor '{name}', is not a file")
                if status.st_nlink > 1:
                    raise ModelError(
                        f"tensor '{name}' has its data in a hard link ('{location}'), which is not safe; put a copy in its place"
                    )
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b"")
        except OSError as error:
            raise ModelError(f"'{location}', with the data of tensor '{name}', can't be read ({error.strerror or error})") from None
        self._maps[location] = data, found
        return data, found


def is_external(tensor: TensorProto) -> bool:
    """Whether its data are in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL

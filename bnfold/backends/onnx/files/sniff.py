"""Tell what a file is that is not an ONNX model, by how it begins.

Needed because almost any bytes are a protocol buffer of some kind, so that parsing alone gives no useful answer.
"""

from __future__ import annotations

import io
import zipfile

from bnfold.files import DAMAGED_ZIP

EXPORT = "export it to ONNX first, with torch.onnx.export(model, inputs, path, dynamo=True, optimize=False)"
BEGINNINGS = (  # the first bytes, in lower case and without leading blanks; what the file is; what to do
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run 'git lfs pull'"),
    (b"<!doctype html", "an HTML page, probably of a failed download", "download the model again"),
    (b"<html", "an HTML page, probably of a failed download", "download the model again"),
    (b"<?xml", "an XML file, such as an OpenVINO model", "give the ONNX model that it was made from"),
    (b"ir_version", "ONNX in text form", "convert it with onnx.save(onnx.load(path, format='textproto'), 'model.onnx')"),
    (b"<", "ONNX in text form, or a web page", "convert it with onnx.save(onnx.load(path, format='onnxtxt'), 'model.onnx')"),
    (b"{", "a JSON file", "if it is ONNX in JSON form, convert it with onnx.save(onnx.load(path, format='json'), 'model.onnx')"),
    (b"\x89hdf", "an HDF5 file, such as a Keras model", "convert it to ONNX with tf2onnx"),
    (b"\x1f\x8b", "a gzip archive", "unpack it with gunzip"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it"),
    (b"gguf", "a GGUF file, which holds weights without a network", "give the model in ONNX form"),
    (b"\x93numpy", "not an ONNX model but a NumPy array", "give the model first and the array with --data"),
    *((bytes([128, n]), "a Python pickle, such as an old PyTorch checkpoint", EXPORT) for n in range(2, 6)),
)
ZIPS = (  # the end of a member's name, what the archive is, what to do
    (".onnx", "a zip archive that holds an ONNX model", "unpack it"),
    ("constants.pkl", "a TorchScript archive", EXPORT),
    ("serialized_exported_program.json", "a PyTorch exported program (.pt2)", EXPORT),
    ("archive_format", "a PyTorch exported program (.pt2)", EXPORT),
    ("data.pkl", "a PyTorch checkpoint", EXPORT),
    ("model.weights.h5", "a Keras model", "convert it to ONNX with tf2onnx"),
    (".npy", "a NumPy .npz archive", "give the model first and the arrays with --data"),
)
AT_FOUR = {  # the identifier of a FlatBuffer, at byte 4
    b"TFL3": ("a TensorFlow Lite model", "convert it to ONNX with tf2onnx"),
    b"ORTM": ("a model in ONNX Runtime's own format (.ort)", "give the ONNX model that it was made from"),
}


def sniff(data: bytes) -> tuple[str, str] | None:
    """What the file is and what to do about it; None where nothing but ONNX is recognised."""
    if data.startswith(b"PK\x03\x04"):
        return _sniff_zip(data)
    if data[2:4] == b"\0\0" and data[4:8] in AT_FOUR:
        return AT_FOUR[data[4:8]]
    if data[8:10] == b'{"' and int.from_bytes(data[:8], "little") <= len(data) - 8:
        return "a safetensors file, which holds weights without a network", EXPORT
    start = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for first, kind, remedy in BEGINNINGS:
        if start.startswith(first):
            return kind, remedy
    return None


def _sniff_zip(data: bytes) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except DAMAGED_ZIP:
        return "a zip archive (a PyTorch checkpoint, TorchScript or .pt2 file), cut short or damaged", "save or download it again"
    for ending, kind, remedy in ZIPS:
        if any(name.endswith(ending) for name in names):
            return kind, remedy
    return "a zip archive (a PyTorch checkpoint, TorchScript or .pt2 file)", EXPORT

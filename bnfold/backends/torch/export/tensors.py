"""Tensors and arrays, one made of the other, and the tensors among what a model returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bnfold.data.spec import Port
from bnfold.errors import DataError

PLAIN = ["float16", "float32", "float64", "complex64", "complex128", "bool", "uint8", "int8", "int16", "int32", "int64"]
NUMPY = {getattr(torch, name): np.dtype(name) for name in PLAIN} | {torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}
TORCH = {numpy: kind for kind, numpy in NUMPY.items()}
# Types that ONNX names otherwise, so that a model of one framework can be compared with one of the other.
NAMES = {torch.float32: "float", torch.float64: "double"}


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """A tensor that shares the array's memory where it can."""
    if array.dtype == NUMPY[torch.bfloat16]:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    if array.dtype not in TORCH:
        raise DataError(f"the data are {array.dtype}, which PyTorch has no type for; convert them")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that one is made of, as torchao's are that hold integers and their scales; itself, where it is an ordinary one."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory format of another one of its shape: channels_last, say."""
    strides = like.stride()
    dense = all(isinstance(n, int) for n in strides) and sum((n - 1) * step for n, step in zip(like.shape, strides, strict=True)) + 1
    if tensor.shape != like.shape or tensor.stride() == strides or dense != tensor.numel():
        return tensor
    return torch.empty_strided(tuple(like.shape), strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """An array on the CPU; bfloat16 becomes ml_dtypes' type."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(NUMPY[torch.bfloat16])
    return tensor.numpy()


def output_name(path: Sequence[Any]) -> str:
    """The name of an output by its place in what the model returns."""
    keys = [next(str(getattr(p, a)) for a in ("key", "idx", "name") if hasattr(p, a)) for p in path]
    return ".".join(["output", *keys])


def as_tree(returned: Any) -> Any:
    """What a model returned, with a dict of its fields for each dataclass that PyTorch doesn't know as a tree."""

    def fields(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return {field.name: as_tree(getattr(leaf, field.name)) for field in dataclasses.fields(leaf)}

    return pytree.tree_map(fields, returned)


def flat_outputs(returned: Any) -> dict[str, Tensor]:
    """The tensors that a model returned, by output name."""
    return {output_name(path): leaf for path, leaf in pytree.tree_flatten_with_path(as_tree(returned))[0] if isinstance(leaf, Tensor)}


def axis_of(size: Any) -> int | str:
    """A size, or the symbol of one that may change."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else str(expression)


def port_of(name: str, op: torch.fx.Node) -> Port:
    """An input or output of a program as it states it."""
    value = op.meta["val"]
    shape = tuple(n if isinstance(n, int) else None for n in map(axis_of, value.shape))
    return Port(name, NAMES.get(value.dtype, str(value.dtype).removeprefix("torch.")), shape)

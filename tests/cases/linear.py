"""A BatchNorm behind Gemm, MatMul, Einsum or an embedding (lines 3 to 10, 35)."""

from __future__ import annotations

from functools import partial
from typing import Any

from .builder import Net
from .case import Theme

CASES = Theme()


# --- Gemm (line 3) -----------------------------------------------------------------------------


def gemm_bn(net: Net, *, c: tuple[int, ...] | None = (6,), rows: int | str = "N", k: int = 4, n: int = 6, **attrs: Any) -> None:
    x = net.input(k, rows) if attrs.get("transA") else net.input(rows, k)
    bias = False if c is None else net.weight(net.normal(*c), "bias")
    net.output(net.bn(net.gemm(x, k, n, bias=bias, **attrs), n))


CASES.case("gemm", 3, draw=gemm_bn, torch=lambda nn: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), example=((5, 4),))
CASES.case(
    "gemm without bias",
    3,
    draw=partial(gemm_bn, c=None),
    torch=lambda nn: nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)),
    example=((5, 4),),
)
CASES.case("gemm with transB", 3, draw=partial(gemm_bn, transB=1))
CASES.case("gemm with transA", 3, draw=partial(gemm_bn, transA=1))
CASES.case("gemm with transA and transB, square", 3, draw=partial(gemm_bn, transA=1, transB=1, k=6, rows=6))
CASES.case("gemm with equal sizes and transB", 3, draw=partial(gemm_bn, transB=1, k=6))
CASES.case("gemm with alpha", 3, draw=partial(gemm_bn, alpha=0.7))
CASES.case("gemm with beta", 3, draw=partial(gemm_bn, beta=-1.3))
CASES.case("gemm with alpha and beta and transB", 3, draw=partial(gemm_bn, alpha=2.5, beta=0.3, transB=1))
CASES.case("gemm with alpha and no bias", 3, draw=partial(gemm_bn, alpha=2.5, c=None))
CASES.case("gemm with beta 0", 3, draw=partial(gemm_bn, beta=0.0))
CASES.case("gemm with a scalar bias", 3, draw=partial(gemm_bn, c=()))
CASES.case("gemm with a bias of one element", 3, draw=partial(gemm_bn, c=(1,)))
CASES.case("gemm with a bias of one element and beta", 3, draw=partial(gemm_bn, c=(1, 1), beta=0.5))
CASES.case("gemm with a row of bias", 3, draw=partial(gemm_bn, c=(1, 6)))
CASES.case("gemm with a column of bias", 3, draw=partial(gemm_bn, c=(3, 1), rows=3))
CASES.case("gemm with a matrix of bias", 3, draw=partial(gemm_bn, c=(3, 6), rows=3))
CASES.case("gemm with a square matrix of bias and beta", 3, draw=partial(gemm_bn, c=(6, 6), rows=6, beta=2.0))
CASES.case("gemm to one channel", 3, draw=partial(gemm_bn, n=1, c=(1,)))
CASES.case("gemm on one row", 3, draw=partial(gemm_bn, rows=1))
for opset in (6, 7, 9, 11, 13, 18, 22):
    old: dict[str, Any] = {"broadcast": 1} if opset < 7 else {}
    CASES.case(f"gemm at opset {opset}", 3, draw=partial(gemm_bn, **old), opset=opset, ort=opset > 6)


@CASES.case("gemm with an empty bias", 3)
def _(net: Net) -> None:
    net.output(net.bn(net.gemm(net.input("N", 4), 4, 6, bias=""), 6))


@CASES.case("gemm with the constant on the left", 8)
def _(net: Net) -> None:
    """[6, 4] x [4, L]: the rows are the constant's, the channels (columns) the data's, so nothing can absorb the map."""
    x = net.input("L", 4)
    net.output(net.bn(net.transpose(net.op("Gemm", net.matrix(6, 4), x, transB=1), 1, 0), 6))


@CASES.case("gemm with the constant on the left, channels from the data", 8, left=1, reason=r"axis|input|constant|rows|row|absorb|rule")
def _(net: Net) -> None:
    x = net.input(4, 5)
    net.output(net.bn(net.op("Gemm", net.matrix(6, 4), x), 5))


@CASES.case(
    "three dense layers",
    3,
    torch=lambda nn: nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    ),
    example=((5, 4),),
)
def _(net: Net) -> None:
    x = net.input("N", 4)
    for k in (4, 8):
        x = net.relu(net.bn(net.gemm(x, k, 8, transB=1), 8))
    net.output(net.gemm(x, 8, 3, transB=1))


# --- MatMul, with and without an Add (lines 4, 5) ----------------------------------------------


@CASES.case("matmul without an Add leaves one behind", 4, after={"Add": 1, "MatMul": 1})
def _(net: Net) -> None:
    net.output(net.bn(net.op("MatMul", net.input("N", 4), net.matrix(4, 6)), 6))


@CASES.case("matmul with a BatchNorm without shift needs no Add", 4, after={"Add": 0, "MatMul": 1})
def _(net: Net) -> None:
    net.output(net.bn(net.op("MatMul", net.input("N", 4), net.matrix(4, 6)), 6, shift=False))


@CASES.case("matmul in mid-network without an Add", 4, after={"Add": 1})
def _(net: Net) -> None:
    x = net.op("LeakyRelu", net.bn(net.op("MatMul", net.input("N", 4), net.matrix(4, 6)), 6))
    net.output(net.gemm(x, 6, 3))


@CASES.case("two BatchNorms behind matmuls", 4)
def _(net: Net) -> None:
    x = net.relu(net.bn(net.op("MatMul", net.input("N", 6), net.matrix(6, 6)), 6))
    net.output(net.relu(net.bn(net.op("MatMul", x, net.matrix(6, 6)), 6)))


def matmul_add_bn(net: Net, *, flip: bool = False, shape: tuple[int, ...] = (6,), n: int = 6) -> None:
    product, bias = net.op("MatMul", net.input("N", 4), net.matrix(4, n)), net.weight(net.normal(*shape), "bias")
    net.output(net.bn(net.op("Add", *((bias, product) if flip else (product, bias))), n))


CASES.case("matmul and Add", 5, draw=matmul_add_bn, after={"Add": 1})
CASES.case("matmul and Add, constant first", 5, draw=partial(matmul_add_bn, flip=True))
CASES.case("matmul and Add of a scalar", 5, draw=partial(matmul_add_bn, shape=()))
CASES.case("matmul and Add of one element", 5, draw=partial(matmul_add_bn, shape=(1,)))
CASES.case("matmul and Add of a row", 5, draw=partial(matmul_add_bn, shape=(1, 6)))
CASES.case("matmul to one channel and Add", 5, draw=partial(matmul_add_bn, shape=(1,), n=1))
for opset in (7, 9, 13, 22):
    CASES.case(f"matmul and Add at opset {opset}", 5, draw=matmul_add_bn, opset=opset)


@CASES.case("matmul minus a constant", 5)
def _(net: Net) -> None:
    net.output(net.bn(net.op("Sub", net.op("MatMul", net.input("N", 4), net.matrix(4, 6)), net.bias(6)), 6))


@CASES.case("matmul taken from a constant", 5)
def _(net: Net) -> None:
    net.output(net.bn(net.op("Sub", net.bias(6), net.op("MatMul", net.input("N", 4), net.matrix(4, 6))), 6))


# --- token layouts (line 6) --------------------------------------------------------------------


def tokens(net: Net, *, length: int | str = "L", bias: bool = True, n: int = 6) -> None:
    """[N, L, 4] -> Linear -> [N, n, L] -> BatchNorm -> [N, L, n], as a transformer or a TCN does."""
    y = net.op("MatMul", net.input("N", length, 4), net.matrix(4, n))
    y = net.op("Add", net.bias(n), y) if bias else y
    net.output(net.transpose(net.bn(net.transpose(y, 0, 2, 1), n), 0, 2, 1))


CASES.case("linear on tokens, transposed for the BatchNorm", 6, draw=tokens)
CASES.case("linear on tokens without bias", 6, draw=partial(tokens, bias=False))
CASES.case("linear on as many tokens as channels", 6, draw=partial(tokens, length=6))
CASES.case("linear on tokens, opset 9", 6, draw=tokens, opset=9)


@CASES.case("linear on tokens, flattened for the BatchNorm", 6, 7)
def _(net: Net) -> None:
    y = net.op("Add", net.op("MatMul", net.input("N", 5, 4), net.matrix(4, 6)), net.bias(6))
    net.output(net.reshape(net.bn(net.reshape(y, -1, 6), 6), -1, 5, 6))


@CASES.case("linear on (N, C, L), BatchNorm on axis 1, equal sizes", 6, left=1, reason=r"axis")
def _(net: Net) -> None:
    y = net.op("Add", net.op("MatMul", net.input("N", 6, 4), net.matrix(4, 6)), net.bias(6))
    net.output(net.bn(y, 6))


@CASES.case("linear on (N, C, L), BatchNorm on axis 1, without bias", 6, 9, left=1, reason=r"axis|input")
def _(net: Net) -> None:
    net.output(net.bn(net.op("MatMul", net.input("N", 6, 4), net.matrix(4, 5)), 6))


# --- the constant on the left, batches of weights, Einsum (lines 8 to 10) ----------------------


@CASES.case("weight on the left", 8)
def _(net: Net) -> None:
    net.output(net.bn(net.op("MatMul", net.matrix(6, 4), net.input("N", 4, "L")), 6))


@CASES.case("weight on the left and Add", 8)
def _(net: Net) -> None:
    y = net.op("Add", net.op("MatMul", net.matrix(6, 4), net.input("N", 4, 6)), net.weight(net.normal(6, 1), "bias"))
    net.output(net.bn(y, 6))


@CASES.case("weight on the left, 2-D, channels from the data", 8, left=1, reason=r"axis|input")
def _(net: Net) -> None:
    net.output(net.bn(net.op("MatMul", net.matrix(6, 4), net.input(4, 5)), 5))


@CASES.case("batched weights, BatchNorm over the batch of weights", 9)
def _(net: Net) -> None:
    """[N, 3, L, 4] x [3, 4, 5]: channel h scales matrix h."""
    net.output(net.bn(net.op("MatMul", net.input("N", 3, "L", 4), net.matrix(3, 4, 5)), 3))


@CASES.case("batched weights on a stack, BatchNorm over the stack", 9)
def _(net: Net) -> None:
    y = net.op("MatMul", net.input("L", 3, "N", 4), net.matrix(3, 4, 3))
    net.output(net.bn(y, 3))


@CASES.case("batched weights, BatchNorm over the rows of the data", 9, left=1, reason=r"axis|input")
def _(net: Net) -> None:
    net.output(net.bn(net.op("MatMul", net.input(3, 5, 4), net.matrix(3, 4, 5)), 5))


@CASES.case("vector times matrix", 9, left=1, reason="vector")
def _(net: Net) -> None:
    y = net.op("MatMul", net.input(4), net.matrix(4, 6))
    net.output(net.bn(net.unsqueeze(y, 0), 6))


def einsum_bn(
    net: Net, *, equation: str, data: tuple[int | str, ...], weight: tuple[int, ...], channels: int = 6, flip: bool = False
) -> None:
    x, w = net.input(*data), net.matrix(*weight)
    net.output(net.bn(net.op("Einsum", *((w, x) if flip else (x, w)), equation=equation), channels))


CASES.case("einsum as a matrix product", 10, draw=partial(einsum_bn, equation="nk,kc->nc", data=("N", 4), weight=(4, 6)))
CASES.case(
    "einsum with the weight first", 10, draw=partial(einsum_bn, equation="ck,nkl->ncl", data=("N", 4, "L"), weight=(6, 4), flip=True)
)
CASES.case("einsum that moves the channels forward", 10, draw=partial(einsum_bn, equation="nlk,kc->ncl", data=("N", 6, 4), weight=(4, 6)))
CASES.case("einsum over two axes", 10, draw=partial(einsum_bn, equation="nhk,hkc->nc", data=("N", 3, 4), weight=(3, 4, 6)))
CASES.case(
    "einsum whose channel comes from both operands",
    10,
    draw=partial(einsum_bn, equation="nhk,hkc->nhc", data=("N", 6, 4), weight=(6, 4, 5)),
)
CASES.case(
    "einsum whose channel comes from the data",
    10,
    draw=partial(einsum_bn, equation="nck,kl->ncl", data=("N", 6, 4), weight=(4, 6)),
    left=1,
    reason=r"axis|letter|input|operand",
)


CASES.case("einsum with an ellipsis", 10, draw=partial(einsum_bn, equation="...k,kc->...c", data=("N", 4), weight=(4, 6)))
CASES.case(
    "einsum with an ellipsis in the middle", 10, draw=partial(einsum_bn, equation="n...k,kc->nc...", data=("N", 3, 4), weight=(4, 6))
)
CASES.case(
    "einsum with an ellipsis that the weight has too",
    10,
    draw=partial(einsum_bn, equation="...k,...kc->...c", data=(5, 4), weight=(5, 4, 6)),
)


def einsum_alone(net: Net, *, equation: str, data: tuple[int | str, ...], square: bool = False) -> None:
    """linear, an Einsum of one operand, BatchNorm."""
    y = net.op("MatMul", net.input(*data), net.matrix(4, 6))
    net.output(net.bn(net.op("Einsum", y, equation=equation), 6))


CASES.case("einsum that moves one operand", 10, draw=partial(einsum_alone, equation="nlc->ncl", data=("N", 5, 4)))
CASES.case("einsum that moves one operand, without an arrow", 10, draw=partial(einsum_alone, equation="acb", data=("N", 5, 4)))
CASES.case("einsum that sums one operand", 10, draw=partial(einsum_alone, equation="nlc->nc", data=("N", 5, 4)))
CASES.case("einsum that takes a diagonal", 10, draw=partial(einsum_alone, equation="nllc->ncl", data=("N", 5, 5, 4)))
CASES.case(
    "einsum that sums and moves", 10, draw=partial(einsum_alone, equation="nlmc->mcn", data=(2, 5, 3, 4)), left=1, reason="sums and moves"
)


# --- embeddings (line 35) ----------------------------------------------------------------------


@CASES.case("embedding", 35)
def _(net: Net) -> None:
    ids = net.input("N", name="ids", dtype="int64")
    net.output(net.bn(net.op("Gather", net.matrix(4, 6), ids), 6))


@CASES.case("embedding of sequences", 35)
def _(net: Net) -> None:
    ids = net.input("N", "L", name="ids", dtype="int64")
    net.output(net.bn(net.transpose(net.op("Gather", net.matrix(4, 6), ids), 0, 2, 1), 6))


@CASES.case("embedding of sequences, square table, normalised over the sequence", 35, left=1, reason=r"axis")
def _(net: Net) -> None:
    ids = net.input("N", 6, name="ids", dtype="int64")
    net.output(net.bn(net.op("Gather", net.matrix(6, 6), ids), 6))


@CASES.case("embedding gathered along the last axis", 35)
def _(net: Net) -> None:
    ids = net.input("N", name="ids", dtype="int64")
    net.output(net.bn(net.transpose(net.op("Gather", net.matrix(6, 4), ids, axis=1), 1, 0), 6))


@CASES.case("sum of two embeddings", 35, 19)
def _(net: Net) -> None:
    first, second = (net.op("Gather", net.matrix(4, 6), net.input("N", name=f"ids{i}", dtype="int64")) for i in range(2))
    net.output(net.bn(net.op("Add", first, second), 6))


@CASES.case("embedding table shared with the classifier", 35, 38)
def _(net: Net) -> None:
    """Tied weights: the table may change for one user only in a copy."""
    table = net.matrix(4, 6)
    x = net.op("LeakyRelu", net.bn(net.op("Gather", table, net.input("N", name="ids", dtype="int64")), 6))
    net.output(net.op("Gemm", x, table, transB=1))

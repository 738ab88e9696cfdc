"""THE table: for every operator, which affine maps may cross it or end in it, and on what condition.

A rule is the proof of one equation about its operator f, read in two directions:

    up    a(f(x)) = f'(b(x))     a stands behind f: the maps b that must stand before its inputs instead
    down  f(a(x)) = b(f'(x))     the maps a stand before f's inputs: the map b that comes out behind it

f' is f with updated parameters. A rule returns its options, the best first, each a `Step` with the maps that go on and the
updates; or it raises `Blocked` with the reason. The proofs themselves are in `commuting`, `movement` and `absorbing`.
"""

from __future__ import annotations

from . import absorbing, commuting
from .affine import Blocked
from .commuting import chooses, commutes
from .graph import Node
from .lowering import NO_RULE
from .movement import move_down, move_up
from .rule import Rule, Step, never

ANY = commutes()
INCREASING = commutes(increasing=True)
STRETCHING = commutes(increasing=True, unshifted=True)
MOVE = Rule(lambda node, a: [Step(move_up(node, a))], lambda node, maps: [Step([move_down(node, maps)])])
NEVER_UP = never("nothing behind it can move before it")
NEVER_DOWN = never("nothing before it can move behind it")

RULES: dict[str, Rule] = {
    # any map crosses
    "Identity": ANY,  # a(x) = a(x); dropout at inference, a cast between float types
    "Average": ANY,  # mean(s*x + t) = s*mean(x) + t; global, windowed without counted padding, or along axes
    "Resize": ANY,  # weights that sum to 1 are a mean; at computed places too, which take no map
    "Crop": ANY,  # a slice by computed bounds
    "Lookup": Rule(commuting.lookup_up, commuting.lookup_down),  # a(x[i]) = a(x)[i] for computed places i
    "Move": MOVE,  # out[i] = in[source(i)]: the coefficients move as the data do
    # maps that keep the order cross
    "Max": INCREASING,  # max(s*x + t) = s*max(x) + t if s >= 0; windowed, global, or along axes; min likewise; of one element any map
    # scalings cross
    "Scatter": commutes(unshifted=True),  # f(s*x) = s*f(x); sums of as many terms as somebody else says
    # stretchings cross
    "Relu": STRETCHING,  # relu(s*x) = s*relu(x) if s >= 0; leaky, parametric, absolute value, L1 and L2 norms
    # any map crosses, and the bounds move along; on request, since a clamp with bounds for each channel is another operator
    "Clamp": Rule(commuting.clamp_up, commuting.clamp_down),  # a(clamp(x; l, h)) = clamp(a(x); a(l), a(h))
    # maps that fix the fill cross
    "Pad": Rule(commuting.fill_up, commuting.fill_down),  # a(pad(x, v)) = pad(a(x), a(v)); average pooling that counts its zeros
    # several activations
    "Sum": Rule(commuting.sum_up, commuting.sum_down),  # s*sum(x) + t = sum(s*x + t/n)
    "Add": Rule(commuting.add_up, commuting.add_down),  # s*(x + y) + t = (s*x + t) + s*y
    "Mul": Rule(commuting.mul_up, commuting.mul_down),  # s*(x*y) = (s*x)*y
    "MatMul": Rule(commuting.matmul_up, commuting.matmul_down),  # s*(x@y) = (s*x)@y or x@(s*y)
    "Mean": chooses(),  # mean(a(x), a(y)) = a(mean(x, y))
    "Where": chooses(),  # c ? a(x) : a(y) = a(c ? x : y)
    "Maximum": chooses(increasing=True),  # max(a(x), a(y)) = a(max(x, y)); min likewise
    # the map ends here
    "Conv": Rule(absorbing.conv_up, absorbing.conv_down),  # any group, 1-3 D, transposed or not
    "Contraction": Rule(absorbing.contraction_up, absorbing.contraction_down),  # Linear, Gemm, MatMul by a constant, Einsum
    "Affine": Rule(absorbing.affine_up, absorbing.affine_down),  # BatchNorm; Mul, Add, Sub, Div by a constant
    "Normalisation": Rule(absorbing.normalised_up, NEVER_DOWN),  # the affine part of LayerNorm, InstanceNorm, GroupNorm
    "Table": Rule(absorbing.table_up, NEVER_DOWN),  # Embedding
    "Constant": Rule(absorbing.constant_up, NEVER_DOWN),
    "Recurrent": Rule(NEVER_UP, absorbing.recurrent_down),  # LSTM, GRU, RNN: their input weights
}


def rule_of(node: Node) -> Rule:
    """The node's rule; every operator without a row is a barrier."""
    rule = RULES.get(node.op)
    if rule is None:
        raise Blocked(node.attrs.get("why", NO_RULE))
    return rule

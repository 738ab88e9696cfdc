"""What the JSON of an exported program may say.

`torch.export.load` and what calls the program afterwards compile Python from it: names become variables and keywords of generated code,
guards its assertions; sizes are evaluated by `sympy.sympify`, operators looked up as attributes of torch, structures imported by name. So a
text passes only in a place that is known, and only in the form that an export gives it there. All else is refused.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[str, ...]

NAMESPACES = "aten|prims|quantized|quantized_decomposed|torchvision"
FILES = "save|from_file"  # ATen's operators on files
HIGHER = (
    "cond|while_loop|scan|map_impl|map|associative_scan|invoke_subgraph|strict_mode|hints_wrapper|wrap_with_set_grad_enabled|"
    "wrap_with_autocast|tag_activation_checkpoint|run_const_graph|flex_attention|auto_functionalized|auto_functionalized_v2"
)
SCALAR = "getitem|eq|ne|le|ge|lt|gt|neg|pos|abs|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|xor|not_|invert|lshift|rshift"  # of _operator
OPERATOR = re.compile(
    rf"torch\.ops\.({NAMESPACES})\.(?!({FILES})\b)[A-Za-z]\w*\.[A-Za-z]\w*|torch\.ops\.(aten|prims)\._(?!_)\w+\.[A-Za-z]\w*"
    rf"|torch\.ops\.higher_order\.({HIGHER})|_operator\.({SCALAR})|math\.[a-z]\w*|torch\._?sym_\w+"
)
IDENTIFIER = re.compile(r"\w*")
PLAIN_TEXT = re.compile(r"[^\x00-\x1f\x7f\"'`\\{}]*")  # may stand between quotes in code
NO_NAME, UNKNOWN = "it holds a name that is no name ({})", "it says {} where an export says nothing"
REMARKS = re.compile("stack_trace|nn_module_stack|source_fn_stack|torch_fn|custom|from_node")  # on operators, for people
STRUCTURES = {
    "builtins.tuple",
    "builtins.list",
    "builtins.dict",
    "collections.OrderedDict",
    "collections.namedtuple",
    "collections.deque",
    "torch.Size",
}
# What sizes are made of: sympy's functions, and those of torch.utils._sympy.
SIZES = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Mod|Max|Min|Abs|And|Or|Not|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|StrictLessThan|LessThan|"
    "StrictGreaterThan|GreaterThan|Piecewise|ExprCondPair|Tuple|ceiling|floor|sqrt|log|exp|sign|Identity|Where|PythonMod|FloorDiv|CleanDiv|"
    "CeilDiv|CeilToInt|FloorToInt|IntTrueDiv|FloatTrueDiv|ToFloat|TruncToInt|TruncToFloat|RoundToInt|RoundDecimal|ModularIndexing|LShift|"
    "RShift|PowByNatural|FloatPow|IsNonOverlappingAndDenseIndicator"
)
ASSUMPTIONS = re.compile("positive|integer|nonnegative|real|precision|evaluate")
# Of expressions: bits of a value, parts, an exponent or a shift, and how many sizes are held against each other.
MOST_BITS, MOST_NODES, MOST_EXPONENT, MOST_COMPARED = 1 << 14, 4000, 64, 12
POWERS = re.compile("Pow|PowByNatural|FloatPow|pow|LShift|RShift|RoundDecimal|Float|round|ldexp")
ENDLESS = ("exp", "exp2", "expm1", "factorial", "comb", "perm", "gamma", "lgamma", "sinh", "cosh")
LARGEST_OF = re.compile("Max|Min|max|min|Piecewise|And|Or")
GUARDS = re.compile("max|min|abs|round|int|float|bool")
ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.Name, ast.Constant, ast.Load,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


def program_troubles(found: Any) -> Iterator[str]:
    """What a program's JSON says that no plain export does."""
    for path, text in _texts(found, ()):
        if not (path[-2:-1] == ("metadata",) and REMARKS.fullmatch(path[-1])):
            yield from _in_text(path, text)


def payload_troubles(found: Any) -> Iterator[str]:
    """The same for a table of tensors."""
    for path, value in _texts(found, ()):
        if path[-1] == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", value):
            yield f"it holds a pickled object ({value[:60]!r})"
        elif path[-1] not in ("a key", "path_name", "type") or not is_plain_text(value):
            yield f"its table of tensors says {value[:60]!r}"
    for meta in found["config"].values():
        if meta["use_pickle"] is not False:
            yield "it holds pickled tensors"


def is_plain_text(text: str) -> bool:
    """Whether a text may stand between quotes in generated code."""
    return bool(PLAIN_TEXT.fullmatch(text))


def _texts(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """Every text in it, with the keys that lead there; the keys too."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield (*path, "a key"), key
            yield from _texts(each, (*path, key))
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, path)
    elif isinstance(value, str):
        yield path, value


def _in_text(path: Path, text: str) -> Iterator[str]:
    key = path[-1]
    if key in ("in_spec", "out_spec"):
        yield from _in_structure(text) if text else ()
    elif not (key.startswith("as_string") and path[-3:-1] == ("inputs", "arg")):  # the argument of an operator is quoted by torch
        passes, trouble = next(((passes, trouble) for keys, passes, trouble in PLACES if re.fullmatch(keys, key)), (bool, UNKNOWN))
        if trouble == UNKNOWN or not passes(text):
            yield trouble.format(repr(text[:60]))


def _is_size(text: str) -> bool:
    """Symbols, numbers and known functions of them. sympify evaluates it as Python with sympy's and the built-in names."""

    def call(node: ast.Call) -> bool:
        named = all(keyword.arg and ASSUMPTIONS.fullmatch(keyword.arg) for keyword in node.keywords)
        return named and isinstance(node.func, ast.Name) and bool(SIZES.fullmatch(node.func.id))

    return _is_arithmetic(text, call)


def _is_guard(text: str) -> bool:
    """A comparison of the inputs' sizes, such as L['x'].size()[0] >= 2."""

    def call(node: ast.Call) -> bool:
        if node.keywords:
            return False
        function = node.func
        if isinstance(function, ast.Name):
            return bool(GUARDS.fullmatch(function.id))
        assert isinstance(function, ast.Attribute)
        if isinstance(function.value, ast.Name):
            of_math = function.value.id == "math" and re.fullmatch("[a-z][a-z0-9]*", function.attr)
            return bool(of_math) or (function.value.id == "torch" and bool(re.fullmatch(r"_?sym_\w+", function.attr)))
        return function.attr in ("size", "stride", "storage_offset", "numel", "dim")

    return _is_arithmetic(text, call, (ast.Subscript, ast.Attribute))


def _is_arithmetic(text: str, call: Callable[[ast.Call], bool], more: tuple[type[ast.AST], ...] = ()) -> bool:
    """Whether a text is an expression of numbers, names and calls that pass. An attribute stands only where it is called, or in math."""
    if not text.isascii() or not text.isprintable() or "#" in text or len(text) > 100_000:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
        if _bits(tree.body) > MOST_BITS or sum(1 for _ in ast.walk(tree)) > MOST_NODES:
            return False
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            constant = isinstance(node.value, ast.Name) and (node.value.id, node.attr) in (("math", "inf"), ("math", "nan"))
            if more and (id(node) in called or constant):
                continue
            return False
        if isinstance(node, ast.keyword):
            continue
        if not isinstance(node, ARITHMETIC + more):
            return False
        if isinstance(node, ast.Call) and (not isinstance(node.func, (ast.Name, ast.Attribute)) or not call(node)):
            return False
        if isinstance(node, ast.Name) and "__" in node.id:
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
            wanted = PLAIN_TEXT if more else re.compile(r"\w+|[\d.e+-]+")
            if not isinstance(node.value, str) or not wanted.fullmatch(node.value):
                return False
    return True


def _bits(node: ast.AST) -> float:
    """The most bits that a value may have, where a size has 64: what is beyond all bounds takes its time, symbols or not."""
    if isinstance(node, ast.Constant):
        return _literal_bits(node.value)
    if isinstance(node, ast.Call):
        kind = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
        parts: list[ast.AST] = [*node.args, *(keyword.value for keyword in node.keywords)]
    elif isinstance(node, ast.BinOp):
        kind, parts = type(node.op).__name__, [node.left, node.right]
    else:
        kind, parts = "", list(ast.iter_child_nodes(node))
    bits = [_bits(part) for part in parts]
    if POWERS.fullmatch(kind) and len(parts) > 1:
        return bits[0] * _exponent(parts[1])
    if kind in ENDLESS or (LARGEST_OF.fullmatch(kind) and len(parts) > MOST_COMPARED):
        return math.inf
    if LARGEST_OF.fullmatch(kind):
        return 2 * sum(bits)  # each is held against each, so that they may not be nested without end
    return max(bits, default=0.0) + 1 if kind in ("Add", "Sub") else max(sum(bits), 64.0)


def _literal_bits(value: Any) -> float:
    if isinstance(value, str):
        if not re.fullmatch(r"[\d.e+-]+", value):
            return 64.0  # a name
        value = float(value)
    if isinstance(value, float):
        return 64.0 if math.isfinite(value) else math.inf
    return float(value.bit_length()) if isinstance(value, int) else 64.0


def _exponent(node: ast.AST) -> float:
    """An exponent's magnitude, which must be stated, and small."""
    stated = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    found = [float(abs(value)) for value in stated if isinstance(value, (int, float)) and abs(value) <= MOST_EXPONENT]
    plain = len(found) == len(stated) > 0
    named = any(isinstance(part, ast.Name) and part.id not in ("Integer", "Rational", "Float") for part in ast.walk(node))
    powers = any(isinstance(part, (ast.Pow, ast.LShift, ast.Mult)) for part in ast.walk(node))
    return max(1.0, *found) if plain and not named and not powers else math.inf


def _in_structure(text: str) -> Iterator[str]:
    """The structure of the inputs or outputs, as torch.utils._pytree.treespec_dumps writes it."""

    def walk(node: Any) -> Iterator[str]:
        kind, context = node["type"], node["context"]
        if kind is not None and kind not in STRUCTURES:
            yield f"its inputs or outputs are of a type of their own ({str(kind)[:60]!r})"
        found = json.loads(context) if isinstance(context, str) and kind != "collections.namedtuple" else context
        if isinstance(found, dict):
            yield f"its inputs or outputs are structured by something else than their names ({str(context)[:60]!r})"
        keys = found if isinstance(found, list) else [found]
        if not all(key is None or isinstance(key, (int, float)) or (isinstance(key, str) and is_plain_text(key)) for key in keys):
            yield f"its inputs or outputs have names that are no names ({str(context)[:60]!r})"
        for child in node["children_spec"]:
            yield from walk(child)

    try:
        yield from walk(json.loads(text)[1])
    except (LookupError, TypeError, ValueError):
        yield f"its inputs or outputs have no structure ({text[:60]!r})"


# Where a text may stand, whether it may say what it says, and what is wrong where it may not.
PLACES: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("target|as_operator", OPERATOR.fullmatch, "it calls {}"),
    ("expr_str", _is_size, "it holds an expression that is no size ({})"),
    ("guards_code", _is_guard, "it holds a guard that is no comparison of sizes ({})"),
    ("name|as_name|forward_arg_names|verifiers|field_names", IDENTIFIER.fullmatch, NO_NAME),
    (
        "a key|type|fqn|torch_version|parameter_name|buffer_name|tensor_constant_name|user_input_name|as_strings?|as_string_to_argument",
        is_plain_text,
        NO_NAME,
    ),
    ("as_floats?|as_float_lists", ("Infinity", "-Infinity", "NaN").__contains__, "it holds a number that is none ({})"),
)

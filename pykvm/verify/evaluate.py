"""Compiler of symbolic expressions to functions of integers.

Evaluating an expression with z3's substitution would take milliseconds.
"""

from collections.abc import Callable, Mapping
from typing import Final

import z3

from pykvm.verify.explore import symbols_in
from pykvm.verify.state import Expression

__all__ = ["Evaluated", "compiled"]

Evaluated = Callable[[Mapping[str, int]], int]
"""Function of the values of all symbols, by name; booleans are 0 and 1."""


def _signed(text: str, bits: int) -> str:
    return f"(({text} ^ {1 << (bits - 1)}) - {1 << (bits - 1)})"


def _mask(text: str, bits: int) -> str:
    return f"(({text}) & {(1 << bits) - 1})"


_WRAPPING: Final = {z3.Z3_OP_BADD: "+", z3.Z3_OP_BSUB: "-", z3.Z3_OP_BMUL: "*"}
_BITWISE: Final = {
    **{z3.Z3_OP_BAND: "&", z3.Z3_OP_BOR: "|", z3.Z3_OP_BXOR: "^"},
    **{z3.Z3_OP_AND: "&", z3.Z3_OP_OR: "|", z3.Z3_OP_XOR: "^"},
}
_UNSIGNED: Final = {
    **{z3.Z3_OP_ULT: "<", z3.Z3_OP_ULEQ: "<=", z3.Z3_OP_UGT: ">", z3.Z3_OP_UGEQ: ">="},
}
_SIGNED: Final = {
    **{z3.Z3_OP_SLT: "<", z3.Z3_OP_SLEQ: "<=", z3.Z3_OP_SGT: ">", z3.Z3_OP_SGEQ: ">="},
}


# By z3's number of the expression. z3 does not reuse the number while the expression exists.
_known: dict[int, tuple[Expression, tuple[Evaluated, frozenset[str]]]] = {}


def compiled(expression: Expression) -> tuple[Evaluated, frozenset[str]]:
    """Compile an expression.

    Returns:
        A function of the values of the expression's symbols, and the symbols' names.

    Raises:
        ValueError: the expression has an operation that is not known here.
    """
    key = expression.get_id()
    if key not in _known:
        _known[key] = (expression, _compile(expression))
    return _known[key][1]


def _compile(expression: Expression) -> tuple[Evaluated, frozenset[str]]:
    expression = z3.simplify(expression)
    names = frozenset(str(one) for one in symbols_in(expression))
    function: Evaluated = eval(f"lambda values: int({_source(expression)})")
    return function, names


def _source(one: Expression) -> str:
    kind = one.decl().kind()
    constant = _constant(one, kind)
    if constant is not None:
        return constant
    below = [_source(child) for child in one.children()]
    for operators, join in ((_WRAPPING, _wrap), (_BITWISE, _plain)):
        if kind in operators:
            return join(f" {operators[kind]} ".join(below), one)
    if kind in _UNSIGNED:
        return f"({below[0]} {_UNSIGNED[kind]} {below[1]})"
    if kind in _SIGNED:
        bits = one.arg(0).size()
        return f"({_signed(below[0], bits)} {_SIGNED[kind]} {_signed(below[1], bits)})"
    return _other(one, kind, below)


def _constant(one: Expression, kind: int) -> str | None:
    if z3.is_bv_value(one):
        return str(one.as_long())
    if kind in (z3.Z3_OP_TRUE, z3.Z3_OP_FALSE):
        return "True" if kind == z3.Z3_OP_TRUE else "False"
    if kind == z3.Z3_OP_UNINTERPRETED and z3.is_const(one):
        return f"values[{str(one)!r}]"
    return None


def _wrap(text: str, one: Expression) -> str:
    return _mask(text, one.size())


def _plain(text: str, _one: Expression) -> str:
    return f"({text})"


def _concat(one: Expression, below: list[str]) -> str:
    text, at = "0", one.size()
    for child, part in zip(one.children(), below, strict=True):
        at -= child.size()
        text += f" | ({part} << {at})"
    return f"({text})"


def _extend(one: Expression, below: list[str]) -> str:
    return _mask(_signed(below[0], one.arg(0).size()), one.size())


def _extract(one: Expression, below: list[str]) -> str:
    high, low = one.params()
    return _mask(f"{below[0]} >> {low}", high - low + 1)


def _rotate(one: Expression, below: list[str]) -> str:
    count, bits = one.params()[0], one.size()
    return _mask(f"({below[0]} << {count}) | ({below[0]} >> {bits - count})", bits)


_OTHERS: Final[dict[int, Callable[[Expression, list[str]], str]]] = {
    z3.Z3_OP_BNOT: lambda one, below: _mask(f"~{below[0]}", one.size()),
    z3.Z3_OP_BNEG: lambda one, below: _mask(f"-{below[0]}", one.size()),
    z3.Z3_OP_NOT: lambda _, below: f"(not {below[0]})",
    z3.Z3_OP_EQ: lambda _, below: f"({below[0]} == {below[1]})",
    z3.Z3_OP_DISTINCT: lambda _, below: f"({below[0]} != {below[1]})",
    z3.Z3_OP_ITE: lambda _, below: f"({below[1]} if {below[0]} else {below[2]})",
    z3.Z3_OP_CONCAT: _concat,
    z3.Z3_OP_EXTRACT: _extract,
    z3.Z3_OP_ZERO_EXT: lambda _, below: below[0],
    z3.Z3_OP_SIGN_EXT: _extend,
    z3.Z3_OP_ROTATE_LEFT: _rotate,
    z3.Z3_OP_BSHL: lambda one, below: _mask(f"{below[0]} << min({below[1]}, 64)", one.size()),
    z3.Z3_OP_BLSHR: lambda _, below: f"({below[0]} >> {below[1]})",
}


def _other(one: Expression, kind: int, below: list[str]) -> str:
    if kind not in _OTHERS:
        raise ValueError(f"no way to evaluate {one.decl()}")
    return _OTHERS[kind](one, below)

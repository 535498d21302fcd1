"""Arithmetic on bit vectors, with the status flags that it sets (SDM vol. 1 3.4.3.1, vol. 2)."""

from collections.abc import Callable
from typing import Final

import z3

from pykvm.verify.state import Expression, fresh_flag, truth, value

__all__ = ["CONDITIONS", "Result", "add", "logic", "negate", "subtract", "undefined"]

Result = tuple[Expression, dict[str, Expression]]
"""A value, and flags by name."""


def undefined() -> Expression:
    """Return a flag that the manual leaves undefined."""
    return fresh_flag("undefined")


def _of_value(content: Expression) -> dict[str, Expression]:
    top = content.size() - 1
    parity = z3.Extract(0, 0, content)
    for bit in range(1, 8):
        parity = parity ^ z3.Extract(bit, bit, content)
    return {
        "zf": content == 0,
        "sf": z3.Extract(top, top, content) == 1,
        "pf": parity == 0,
    }


def _bit(flag: Expression, bits: int) -> Expression:
    return z3.If(flag, value(1, bits), value(0, bits))


def add(left: Expression, right: Expression, carry: Expression | None = None) -> Result:
    """Return the result of ADD, or of ADC if there is a carry."""
    bits = left.size()
    extra = truth(False) if carry is None else carry
    wide = z3.ZeroExt(1, left) + z3.ZeroExt(1, right) + _bit(extra, bits + 1)
    total = z3.simplify(z3.Extract(bits - 1, 0, wide))
    top = bits - 1
    overflow = z3.Extract(top, top, (left ^ total) & (right ^ total)) == 1
    return total, {
        "cf": z3.Extract(bits, bits, wide) == 1,
        "of": overflow,
        "af": z3.Extract(4, 4, left ^ right ^ total) == 1,
        **_of_value(total),
    }


def subtract(left: Expression, right: Expression, borrow: Expression | None = None) -> Result:
    """Return the result of SUB and CMP, or of SBB if there is a borrow."""
    bits = left.size()
    extra = truth(False) if borrow is None else borrow
    wide = z3.ZeroExt(1, left) - z3.ZeroExt(1, right) - _bit(extra, bits + 1)
    rest = z3.simplify(z3.Extract(bits - 1, 0, wide))
    top = bits - 1
    overflow = z3.Extract(top, top, (left ^ right) & (left ^ rest)) == 1
    return rest, {
        "cf": z3.Extract(bits, bits, wide) == 1,
        "of": overflow,
        "af": z3.Extract(4, 4, left ^ right ^ rest) == 1,
        **_of_value(rest),
    }


def logic(content: Expression) -> Result:
    """Return `content`, a result of AND, OR, XOR or TEST, with its flags; AF is undefined."""
    content = z3.simplify(content)
    return content, {
        "cf": truth(False),
        "of": truth(False),
        "af": undefined(),
        **_of_value(content),
    }


def negate(content: Expression) -> Result:
    """Return the result of NEG."""
    rest, flags = subtract(value(0, content.size()), content)
    return rest, {**flags, "cf": content != 0}


_Flags = dict[str, Expression]

# The lower half of the condition codes (SDM vol. 1, appendix B); the odd ones negate.
_CONDITIONS: Final[dict[str, Callable[[_Flags], Expression]]] = {
    "O": lambda f: f["of"],
    "B": lambda f: f["cf"],
    "E": lambda f: f["zf"],
    "BE": lambda f: z3.Or(f["cf"], f["zf"]),
    "S": lambda f: f["sf"],
    "P": lambda f: f["pf"],
    "L": lambda f: f["sf"] != f["of"],
    "LE": lambda f: z3.Or(f["zf"], f["sf"] != f["of"]),
}
_OPPOSITES: Final = {
    **{"O": "NO", "B": "AE", "E": "NE", "BE": "A"},
    **{"S": "NS", "P": "NP", "L": "GE", "LE": "G"},
}


def _negated(condition: Callable[[_Flags], Expression]) -> Callable[[_Flags], Expression]:
    return lambda flags: z3.Not(condition(flags))


CONDITIONS: Final[dict[str, Callable[[_Flags], Expression]]] = {
    **_CONDITIONS,
    **{_OPPOSITES[name]: _negated(condition) for name, condition in _CONDITIONS.items()},
}
"""Truth of a condition, by its suffix in iced's mnemonics (JNE, CMOVAE, SETLE)."""

"""Structs of ``<linux/kvm.h>`` as values for JSON: the fields that pykvm knows, by name.

Reserved fields are left out; KVM wants zeros there, and a new struct has them.
"""

from __future__ import annotations

from typing import Any

from pykvm.errors import PykvmError
from pykvm.kvm import Struct, ffi

__all__ = ["KvmStateError", "field", "from_values", "hex_bytes", "to_values"]


class KvmStateError(PykvmError, ValueError):
    """A state that KVM cannot have."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the saved {what} is none that kvm can have", "use another snapshot")


def to_values(struct: Struct) -> dict[str, Any]:
    """Return the fields of a struct, or of what a pointer to one points to."""
    kind = ffi.typeof(struct)
    fields = kind.item.fields if kind.kind == "pointer" else kind.fields
    return {name: _value(getattr(struct, name)) for name, _ in fields}


def _value(found: Any) -> Any:
    if isinstance(found, int):
        return found
    if ffi.typeof(found).kind == "array":
        return [_value(element) for element in found]
    return to_values(found)


def from_values(name: str, values: Any) -> Struct:
    """Return a new struct with the fields that `to_values` has returned.

    Args:
        name: its name behind "struct".
        values: the fields.

    Raises:
        KvmStateError: the struct has other fields, or they do not take such values.
    """
    try:
        if not _fits(ffi.typeof(f"struct {name}"), values):
            raise KvmStateError(f"struct {name}")
        return ffi.new(f"struct {name} *", values)
    except OverflowError as error:
        raise KvmStateError(f"struct {name}") from error


def _fits(kind: Any, values: Any) -> bool:
    """Return whether values have the form of a C type; numbers may still be too large."""
    if kind.kind == "primitive":
        return isinstance(values, int)
    if kind.kind == "array":
        return (
            isinstance(values, list)
            and len(values) == kind.length
            and all(_fits(kind.item, value) for value in values)
        )
    fields = dict(kind.fields)
    return (
        isinstance(values, dict)
        and values.keys() == fields.keys()
        and all(_fits(fields[name].type, value) for name, value in values.items())
    )


def field(state: Any, name: str, kind: type) -> Any:
    """Return a field of a saved state.

    Raises:
        KvmStateError: it is not there, or of another type.
    """
    value = state.get(name) if isinstance(state, dict) else None
    if not isinstance(value, kind):
        raise KvmStateError(name)
    return value


def hex_bytes(state: Any, name: str) -> bytes:
    """Return a field of a saved state that holds bytes as hexadecimal digits.

    Raises:
        KvmStateError: it does not.
    """
    try:
        return bytes.fromhex(field(state, name, str))
    except ValueError as error:
        raise KvmStateError(name) from error

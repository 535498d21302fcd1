"""Errors of bare-metal guests: failures of their programs, and what does not fit into them."""

from typing import Final

from pykvm.errors import PykvmError
from pykvm.machine.bare.boot_info import BootFailure
from pykvm.memory.guest_memory import GuestMemory
from pykvm.sizes import PAGE_SIZE

__all__ = [
    "AttachmentsFullError",
    "GuestAssertionError",
    "GuestFaultError",
    "GuestTimeoutError",
    "ImageAddressError",
    "InputTooLargeError",
    "VcpusFullError",
    "read_failure",
]

_VECTORS: Final = {
    0: "division error",
    1: "debug exception",
    3: "breakpoint",
    6: "invalid opcode",
    8: "double fault",
    11: "segment not present",
    12: "stack fault",
    13: "general protection fault",
    14: "page fault",
    17: "alignment fault",
}


class GuestAssertionError(PykvmError):
    """An ASSERT of a guest program failed.

    Attributes:
        file: source file of the assertion.
        line: its line.
        expression: text of the asserted expression.
        console: everything that the guest had printed.
    """

    def __init__(self, file: str, line: int, expression: str, values: str, console: str) -> None:
        super().__init__(f"{file}:{line}: the guest asserts {expression}{values}")
        self.file = file
        self.line = line
        self.expression = expression
        self.console = console


class GuestFaultError(PykvmError):
    """A guest program took an exception.

    Attributes:
        vector: vector of the exception.
        error_code: its error code.
        rip: address of the instruction that caused it.
        cr2: CR2, the faulting address of a page fault.
    """

    def __init__(self, vector: int, error_code: int, rip: int, cr2: int) -> None:
        name = _VECTORS.get(vector, f"exception {vector}")
        where = f", address {cr2:#x}" if vector == 14 else ""
        next_step = "disassemble its image there"
        if vector == 6 and rip == 0:  # how the kernel ends what a process does wrong there
            next_step = "a process was ejected in trusted code: trace kvm_elisa_violation"
        elif rip < PAGE_SIZE:  # most likely an object_call() of an object that is not attached
            next_step = "it called a null pointer; attach the object that it calls before it runs"
        super().__init__(
            f"{name} in the guest at rip {rip:#x}, error code {error_code:#x}{where}", next_step
        )
        self.vector = vector
        self.error_code = error_code
        self.rip = rip
        self.cr2 = cr2


class AttachmentsFullError(PykvmError):
    """A bare guest has no room for another object on its page of information."""


class VcpusFullError(PykvmError, ValueError):
    """A bare guest has no room for another vCPU."""


class GuestTimeoutError(PykvmError):
    """A guest did not finish in time and was stopped, or was stopped by `BareGuest.stop`."""


class ImageAddressError(PykvmError, ValueError):
    """A guest image has a segment outside the area for programs (`layout.IMAGE_GPA`)."""


class InputTooLargeError(PykvmError, ValueError):
    """More input or parameters than a guest has room for."""


def read_failure(
    memory: GuestMemory, failure: BootFailure, console: str
) -> GuestAssertionError | GuestFaultError:
    """Return the error for a failure that a guest has reported.

    Args:
        memory: the guest's memory, which has the strings.
        failure: the failure.
        console: everything that the guest has printed.
    """
    if not failure.file:  # an exception, not an assertion
        return GuestFaultError(failure.left, failure.right, failure.rip, failure.cr2)
    values = ""
    if failure.left != failure.right:
        values = f" ({failure.left:#x} and {failure.right:#x})"
    expression = _string(memory, failure.expression)
    file = _string(memory, failure.file)
    return GuestAssertionError(file, failure.line, expression, values, console)


def _string(memory: GuestMemory, address: int) -> str:
    region = memory.region_at(address)
    data = bytes(region.view(address - region.gpa, min(4096, region.end - address)))
    return data.split(b"\0")[0].decode("utf-8", "replace")

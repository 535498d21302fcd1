"""The filter of system calls, put in force for all threads.

The program is our own and not libseccomp's: that would be a library more for every machine, the
emulated host and the wheel, for a program that is a list of comparisons. Ours takes the numbers
from the compiler, puts KVM_RUN's comparison first, and is checked call by call in the tests, by
an interpreter and by the kernel.

Source: seccomp(2), Linux Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from pykvm.sandbox._sandbox import ffi, lib
from pykvm.sandbox.confinement import Confinement, SandboxError
from pykvm.sandbox.filter_program import assemble, packed
from pykvm.sandbox.layers import Layer
from pykvm.sandbox.policy import REFUSED_ANSWER, policy_for

__all__ = ["restrict", "seccomp_layer"]

_NAME: Final = "seccomp"


def seccomp_layer() -> Layer:
    """Return whether this kernel filters system calls."""
    if not lib.THIS_ARCH:
        return Layer(_NAME, False, "pykvm has no filter for this processor", "use x86-64")
    result = lib.sandbox_seccomp_has(lib.SECCOMP_RET_KILL_PROCESS)
    if result:
        reason = os.strerror(-result).lower()
        return Layer(
            _NAME, False, f"this kernel has no filters ({reason})", "set CONFIG_SECCOMP_FILTER"
        )
    return Layer(_NAME, True, "this kernel filters system calls")


def restrict(confinement: Confinement) -> Layer:
    """Restrict the system calls of all threads; return what is in force.

    It takes `no_new_privs` (or CAP_SYS_ADMIN) in this thread.

    Raises:
        SandboxError: the kernel refuses the filter, or a thread has another one.
    """
    layer = seccomp_layer()
    if not layer.in_force:
        return layer
    policy = policy_for(confinement)
    code = packed(assemble(policy.checked, policy.actions, REFUSED_ANSWER))
    memory = ffi.from_buffer("char[]", code)
    result = lib.sandbox_seccomp_filter(memory, len(code) // 8)
    if result == -errno.ESRCH:
        raise SandboxError(
            "a thread has a filter of system calls of its own", "enter the sandbox before it"
        )
    if result:
        reason = os.strerror(-result).lower()
        raise SandboxError(f"the kernel refuses the filter of system calls ({reason})")
    killed = sum(action == lib.SECCOMP_RET_KILL_PROCESS for action in policy.actions.values())
    allowed = sum(action == lib.SECCOMP_RET_ALLOW for action in policy.actions.values())
    return Layer(
        _NAME,
        True,
        f"{allowed} system calls, {len(policy.checked)} more by their arguments; "
        f"{killed} end the process, all others are refused",
    )

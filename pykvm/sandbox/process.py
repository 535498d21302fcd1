"""Entry into a confinement, and what of it this machine has."""

from __future__ import annotations

import os
from typing import Final

from pykvm.sandbox import landlock, seccomp
from pykvm.sandbox._sandbox import ffi, lib
from pykvm.sandbox.confinement import Confinement, SandboxError
from pykvm.sandbox.layers import Applied, Layer

__all__ = ["available", "enter"]

_PATIENCE: Final = 5000  # milliseconds that a thread may take to answer

_STEPS: Final = {
    lib.SANDBOX_LISTING: "the threads of this process cannot be listed",
    lib.SANDBOX_ANSWER: "thread {name} does not answer",
    lib.SANDBOX_CAPABILITIES: "thread {name} cannot drop its capabilities",
    lib.SANDBOX_PRIVILEGES: "thread {name} cannot give up new privileges",
    lib.SANDBOX_LANDLOCK: "thread {name} cannot restrict its files",
}

_ALWAYS_OPEN: Final = (
    "processor time and memory: use cgroups (systemd-run --user --scope -p MemoryMax=...)",
    "names, sizes and times of all files: Landlock does not hide them",
    "what is open already: disks, TAPs, sockets, and what clients of the control socket pass on",
)


def available() -> tuple[Layer, ...]:
    """Return the layers that `enter` would put in force on this machine. Changes nothing."""
    return (
        _privileges(),
        landlock.landlock_layer(landlock.landlock_abi()),
        seccomp.seccomp_layer(),
    )


def enter(confinement: Confinement) -> Applied:
    """Confine this process, with all threads that it has and will have; return what is in force.

    Call it when everything is open and every other program has been started. There is no way back.
    A layer that this machine does not have is left out, and the result says so.

    Raises:
        SandboxError: a path does not exist, or the kernel refuses what it offers. End the process:
            a part may be in force.
    """
    abi = landlock.landlock_abi()
    files = landlock.landlock_layer(abi)
    ruleset = landlock.make_ruleset(confinement, abi) if files.in_force else -1
    try:
        threads = _confine_threads(ruleset)
    finally:
        if ruleset >= 0:
            os.close(ruleset)
    if files.in_force:
        files = landlock.described(confinement, abi)
    calls = seccomp.restrict(confinement)
    return Applied((_privileges(), files, calls), threads, _open_ways(confinement, files.in_force))


def _privileges() -> Layer:
    return Layer("privileges", True, "no capabilities, no new privileges")


def _confine_threads(ruleset: int) -> int:
    refusal = ffi.new("struct sandbox_refusal *")
    threads = lib.sandbox_confine_threads(ruleset, _PATIENCE, refusal)
    if threads >= 0:
        return int(threads)
    problem = _STEPS[refusal.step].format(name=_thread_name(refusal.thread))
    blocked = "start it after entering the sandbox: it blocks all signals"
    raise SandboxError(
        f"{problem} ({os.strerror(refusal.error).lower()})",
        blocked if refusal.step == lib.SANDBOX_ANSWER else "try --no-sandbox",
    )


def _thread_name(thread: int) -> str:
    try:
        with open(f"/proc/self/task/{thread}/comm") as file:
            return file.read().strip()
    except OSError:
        return str(thread)


def _open_ways(confinement: Confinement, landlocked: bool) -> tuple[str, ...]:
    ways = [*_ALWAYS_OPEN]
    if not landlocked:
        ways.append("files: it reads what this user may read")
        if confinement.changes_files:
            ways.append("files: it changes what this user may change, by their names")
    if confinement.families:
        ways.append(f"new sockets of {len(confinement.families)} families, to anyone")
    if confinement.io_uring:
        ways.append("io_uring: its operations pass the filter of system calls")
    return tuple(ways)

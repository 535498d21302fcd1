"""Confinement of a process that serves a guest, once everything that it needs is open.

`enter` gives up capabilities and new privileges, restricts files by Landlock and system calls by
seccomp, for all threads that there are and will be; what it returns says which layers are in force
and what is not confined. `available` says the former without changing anything.

There is no way back. Programs that a machine needs (virtiofsd, passt) are started before, and
confine themselves.
"""

from pykvm.sandbox.confinement import Confinement, SandboxError
from pykvm.sandbox.layers import Applied, Layer
from pykvm.sandbox.process import available, enter

__all__ = ["Applied", "Confinement", "Layer", "SandboxError", "available", "enter"]

"""Failures of the machine, such as a full disk, reported in one line like pykvm's own errors."""

import errno
import os

from pykvm.errors import PykvmError

__all__ = ["MachineError", "explained"]

# Errors that no program can avoid, with the next step. Any other error number is a mistake in
# pykvm, and its traceback is shown.
_NEXT_STEPS = {
    errno.EACCES: "run this as root, or use another place",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit: ulimit -f unlimited",
    errno.EIO: "look for failing hardware: dmesg",
    errno.ELOOP: "use a path with fewer links",
    errno.EMFILE: "raise the limit: ulimit -n 4096",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ENFILE: "end some programs, which have too many files open",
    errno.ENOMEM: "free some memory",
    errno.ENOSPC: "free some space there",
    errno.EROFS: "use another place",
    errno.ESTALE: "mount the network file system again",
}


class MachineError(PykvmError):
    """The machine refused what a command needs: space, memory, files, permission."""


def explained(error: Exception) -> MachineError | None:
    """Return an error of one line for `error` if the machine is its cause, else None."""
    if isinstance(error, MemoryError):
        return MachineError("out of memory", _NEXT_STEPS[errno.ENOMEM])
    if isinstance(error, UnicodeError):
        return _unicode(error)
    return _system(error) if isinstance(error, OSError) else None


def _unicode(error: UnicodeError) -> MachineError | None:
    if isinstance(error, UnicodeEncodeError):
        text = error.object[error.start : error.end]
        problem = f"{text!a} cannot be written in {error.encoding}"
    elif isinstance(error, UnicodeDecodeError):
        around = error.object[max(0, error.start - 20) : error.end + 20]
        problem = f"{around!r} is no text in {error.encoding}"
    else:
        return None
    return MachineError(problem, "use a locale with UTF-8: LC_ALL=C.UTF-8")


def _system(error: OSError) -> MachineError | None:
    if isinstance(error, FileNotFoundError) and not _has_current_folder():
        return MachineError("the current folder does not exist any more", "change to another one")
    if error.filename is None and "temporary directory" in (error.strerror or ""):  # tempfile's
        return MachineError(
            "no directory takes temporary files", "free some space, or set TMPDIR to one that does"
        )
    # EBADF is a mistake in pykvm, except for a closed standard output.
    closed = error.errno == errno.EBADF and error.filename == "standard output"
    if error.errno is None or not (closed or error.errno in _NEXT_STEPS):
        return None
    reason = os.strerror(error.errno)
    reason = reason[0].lower() + reason[1:]
    place = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
    return MachineError(place + reason, _NEXT_STEPS.get(error.errno, "send it somewhere else"))


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True

"""Programs that serve a guest's network, and die with this process.

Source: pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence

from pykvm.closeable import Closeable

__all__ = ["ChildProcess"]

_SECONDS_TO_END = 5.0
_LINES = 20

# The shell that becomes the program leaves one behind that waits for the end of a pipe of ours.
# The pipe is moved first: a shell gives /dev/null to what it leaves behind.
_DIES_WITH_US = 'exec 9<&0 </dev/null; (read _ <&9; kill $$) >/dev/null 2>&1 & exec "$@" 9<&-'


class ChildProcess(Closeable):
    """A program without input, whose last lines of complaint are kept.

    It has a session of its own: a Ctrl-C at the terminal is not for it. It gets SIGTERM when this
    process ends, however that happens.

    Attributes:
        fd: a pidfd, which becomes readable when the program has ended.

    Args:
        command: the program and its arguments.
        ends_with: descriptor of a socket that it inherits, and with whose peer it ends by itself.
        is_noise: says of a line that it is not worth keeping.

    Raises:
        OSError: the program cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        ends_with: int | None = None,
        is_noise: Callable[[str], bool] = lambda line: False,
    ) -> None:
        self._is_noise = is_noise
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._process = subprocess.Popen(
            # The shell that stays would hold the socket, too.
            command if ends_with is not None else ["/bin/sh", "-c", _DIES_WITH_US, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=() if ends_with is None else (ends_with,),
            start_new_session=True,
        )
        self.fd = os.pidfd_open(self._process.pid)
        self._reader = threading.Thread(target=self._read, name=command[0], daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The program's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the program runs. It is not reaped before `close`, so its id stays its own."""
        return self.fd >= 0 and not select.select([self.fd], [], [], 0)[0]

    def complaint(self) -> str:
        """Return the last line that the program has written, in lower case; empty if there is none.

        After its end these are all of its lines.
        """
        if not self.alive:
            self._reader.join(1)
        return self._lines[-1] if self._lines else ""

    def wait(self, seconds: float) -> bool:
        """Wait for the program's end; return whether it came in time."""
        return self.fd < 0 or bool(select.select([self.fd], [], [], seconds)[0])

    def close(self) -> None:
        """End the program. Harmless twice."""
        descriptor, self.fd = self.fd, -1
        if descriptor < 0:
            return
        if self.inherited:
            os.close(descriptor)
            return
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        self._process.stdin.close()
        if not select.select([descriptor], [], [], _SECONDS_TO_END)[0]:
            self._process.kill()
        self._process.wait()
        os.close(descriptor)
        self._reader.join(1)
        self._process.stderr.close()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError):  # closed meanwhile
            for raw in self._process.stderr:
                line = raw[:400].decode(errors="replace").strip()
                if line and not self._is_noise(line):
                    self._lines.append(line[0].lower() + line[1:])

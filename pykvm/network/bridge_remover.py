"""A small process that removes a bridge of ours where this one cannot: killed, or confined.

Sources: ip-link(8), flock(1).
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess

from pykvm.closeable import Closeable

__all__ = ["BridgeRemover"]

_SECONDS = 10.0

# Arguments: the bridge, the TAP that is its port, the alias of bridges of ours. The TAP goes with
# its last descriptor, a little later than the pipe perhaps. The lock is `namespace_lock`'s.
_SCRIPT = """
exec 9<&0 </dev/null
read _ <&9
exec 9<&-
n=0
while ip -o link show dev "$2" && [ $n -lt 40 ]; do
	n=$((n + 1))
	sleep 0.05
done
exec flock -w 10 /proc/self/ns/net sh -c '
	ip -o link show dev "$1" | grep -q "alias $2\\$" || exit 0
	[ -z "$(ip -o link show master "$1")" ] && ip link delete dev "$1" type bridge
' sh "$1" "$3"
"""


class BridgeRemover(Closeable):
    """A process that waits for the end of this one, and then removes a bridge without ports.

    Without iproute2 and util-linux it does nothing.

    Args:
        bridge: the bridge's name.
        port: name of this process's TAP in it, which goes first.
        alias: alias of a bridge that may be removed.
    """

    def __init__(self, bridge: str, port: str, alias: str) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._fd = -1
        if shutil.which("ip") is None or shutil.which("flock") is None:
            return
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "sh", bridge, port, alias],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._fd = os.pidfd_open(self._process.pid)

    def remove(self) -> None:
        """Let the process remove the bridge, and wait for that."""
        if self._process is None or self.inherited:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        select.select([self._fd], [], [], _SECONDS)
        self.close()

    def close(self) -> None:
        """End the process; the bridge stays."""
        process, self._process = self._process, None
        descriptor, self._fd = self._fd, -1
        if process is None:
            return
        assert process.stdin is not None
        if not self.inherited:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            process.wait()
        process.stdin.close()
        os.close(descriptor)

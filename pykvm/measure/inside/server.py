"""In a Linux guest: serves a file over HTTP, and memcached, until its input ends.

It says its address when it is ready.

Everything here is of Python's own library, because a guest need not have another.
"""

import functools
import http.server
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that writes no log."""

    def log_message(self, *arguments: object) -> None:
        pass


def main() -> None:
    file_bytes, seed = (int(word) for word in sys.argv[1:3])
    Path("/tmp/served").mkdir()
    Path("/tmp/served/file").write_bytes(random.Random(seed).randbytes(file_bytes))
    handler = functools.partial(Quiet, directory="/tmp/served")
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 80), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = subprocess.Popen(["memcached", "-u", "root", "-l", "0.0.0.0", "-t", "1", "-m", "8"])
    while True:
        try:
            socket.create_connection(("127.0.0.1", 11211), 1).close()
            break
        except OSError:
            if cache.poll() is not None:
                sys.exit("memcached does not start")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect((sys.argv[3], 9))  # sends nothing: it picks the address
        print(asked.getsockname()[0], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

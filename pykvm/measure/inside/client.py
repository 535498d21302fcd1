"""In a Linux guest: pings a server, fetches its file, sets and gets values in its memcached.

Prints a line of JSON: how often, how long each took (nanoseconds of this guest's clock), and
whether every byte was right.
"""

import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Any


def timed(call: Any, *arguments: Any) -> tuple[Any, int]:
    begun = time.perf_counter_ns()
    result = call(*arguments)
    return result, time.perf_counter_ns() - begun


def main() -> None:
    file_bytes, seed, pings, fetches, requests = (int(word) for word in sys.argv[1:6])
    server = sys.stdin.readline().strip()
    ping = subprocess.run(
        ["ping", "-n", "-c", str(pings), "-i", "0.2", server],
        capture_output=True,
        text=True,
        check=False,
    )
    trips = [
        round(float(word.removeprefix("time=")) * 1e6)
        for word in ping.stdout.split()
        if word.startswith("time=")
    ]
    file = random.Random(seed).randbytes(file_bytes)

    def fetch() -> bytes:
        with urllib.request.urlopen(f"http://{server}/file", timeout=120) as answer:
            content: bytes = answer.read()
        return content

    fetched = [timed(fetch) for _ in range(fetches)]
    values = random.Random(seed + 1)
    kept = {f"key{n}": values.randbytes(100) for n in range(requests)}
    with socket.create_connection((server, 11211), 120) as connection:
        stream = connection.makefile("rwb")

        def put(key: str, value: bytes) -> bool:
            stream.write(b"set %s 0 0 %d\r\n%s\r\n" % (key.encode(), len(value), value))
            stream.flush()
            return stream.readline() == b"STORED\r\n"

        def get(key: str) -> bytes:
            stream.write(b"get %s\r\n" % key.encode())
            stream.flush()
            size = int(stream.readline().split()[3])
            value = stream.read(size + 2)[:-2]
            assert stream.readline() == b"END\r\n"
            return value

        puts = [timed(put, key, value) for key, value in kept.items()]
        gets = [timed(get, key) for key in kept]
    report = {
        "ping": {"sent": pings, "right": len(trips), "each": trips},
        "http": {
            "sent": fetches,
            "right": sum(content == file for content, _ in fetched),
            "each": [taken for _, taken in fetched],
        },
        "set": {
            "sent": requests,
            "right": sum(stored for stored, _ in puts),
            "each": [taken for _, taken in puts],
        },
        "get": {
            "sent": requests,
            "right": sum(
                value == wanted for (value, _), wanted in zip(gets, kept.values(), strict=True)
            ),
            "each": [taken for _, taken in gets],
        },
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()

"""Runs KVM's selftests on the emulated host, one after another. It comes along with them::

    python3 selftest_runner.py LIMIT "PROGRAM ARGUMENT..." ...

It prints a line of JSON when a program starts, ``{"start": name}``, and one when it has ended, with
its exit status, the seconds that it took, its output, and the kernel's messages that are at least
warnings. The status is 128 plus the signal's number if a signal ended the program, and null if the
program did not end within LIMIT seconds of the emulated clock.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

_LARGEST_OUTPUT = 32 << 10  # bytes; of longer output, the beginning and the end are kept
_WARNING = 4  # of the kernel's log levels; smaller is worse


def main() -> None:
    limit = float(sys.argv[1])
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    warnings(log)
    # Many of the programs map gigabytes of guest memory and touch little of it.
    with open("/proc/sys/vm/overcommit_memory", "w") as setting:
        setting.write("1")
    for command in sys.argv[2:]:
        name, *arguments = command.split()
        tell({"start": name})
        status, seconds, output = run([os.path.abspath(name), *arguments], limit)
        lines = warnings(log)
        tell({"name": name, "status": status, "seconds": seconds, "output": output, "log": lines})


def run(command: list[str], limit: float) -> tuple[int | None, float, str]:
    """Run a program; return its exit status (None after `limit` seconds), seconds and output."""
    with tempfile.TemporaryFile() as output:
        start = time.monotonic()
        program = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = program.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        seconds = time.monotonic() - start
        with contextlib.suppress(ProcessLookupError):
            # Processes that it left behind would disturb the next program.
            os.killpg(program.pid, signal.SIGKILL)
        program.wait()
        if code is not None and code < 0:
            code = 128 - code
        return code, round(seconds, 3), text_of(output.fileno())


def text_of(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    if size <= _LARGEST_OUTPUT:
        data = os.pread(descriptor, size, 0)
    else:
        half = _LARGEST_OUTPUT // 2
        data = os.pread(descriptor, half, 0) + b"\n...\n" + os.pread(descriptor, half, size - half)
    return data.decode(errors="replace")


def warnings(log: int) -> list[str]:
    """Return the kernel's messages since the last call that are at least warnings."""
    found: list[str] = []
    while True:
        try:
            record = os.read(log, 8192).decode(errors="replace")
        except BlockingIOError:
            return found
        except BrokenPipeError:  # the oldest were overwritten
            continue
        prefix, _, message = record.partition(";")
        if int(prefix.split(",")[0]) & 7 <= _WARNING:
            found.append(message.split("\n")[0])


def tell(record: dict[str, object]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

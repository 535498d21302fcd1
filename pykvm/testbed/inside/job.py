"""Runs one job on the emulated host; it comes with the payload, not with the saved state.

The agent runs this as its own code after the machine has been resumed. On the control channel it
writes a line ``started``, then ``exit STATUS SIZE``, where SIZE is the length of the tar archive of
changed files on the output disk; or ``failed MESSAGE``.
"""

import ctypes
import fcntl
import json
import os
import pty
import select
import signal
import stat
import struct
import subprocess
import tarfile
import termios
import time
import tty
from collections.abc import Iterator
from typing import Any

CONTROL: int = globals().get("CONTROL", -1)  # the agent sets it
PAYLOAD = "/payload"
UPPER = "/run/job/upper"
OUT_DISK = "/1:0:1:0"  # the second disk of the second channel
SYS_FINIT_MODULE = 313
MS_RDONLY = 1

libc = ctypes.CDLL(None, use_errno=True)


class JobError(Exception):
    """The job cannot be started."""


def tell(text: str) -> None:
    os.write(CONTROL, os.fsencode(text.replace("\n", " ")) + b"\n")


def main() -> None:
    try:
        with open(f"{PAYLOAD}/job.json") as file:
            job = json.load(file)
        if job["task"] == "load modules":
            load_kvm(job["kvm"], job["kvm_intel"])
            return
        time.clock_settime(time.CLOCK_REALTIME, job["now"])
        mount_overlay(f"{PAYLOAD}/folder", job["folder"], UPPER)
        mount_overlay(f"{PAYLOAD}/cache", "/root/.cache/pykvm", "/run/cache/upper")
        libc.sethostname(b"testbed", 7)
        # With random addresses, no count would repeat.
        with open("/proc/sys/kernel/randomize_va_space", "w") as switch:
            switch.write("0")
        install_commands(job["scripts"])
        tell("started")
        status = run_shell(job) if job["interactive"] else run_command(job)
        size = write_changes(job["bring"])
        tell(f"exit {status} {size}")
    except Exception as error:
        tell(f"failed {type(error).__name__}: {error}")
    while True:  # process 1 must not end; the emulator is about to be stopped
        time.sleep(3600)


def mount_overlay(lower: str, target: str, upper: str) -> None:
    work = f"{os.path.dirname(upper)}/work"
    for directory in (target, upper, work):
        os.makedirs(directory, exist_ok=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    if libc.mount(b"overlay", os.fsencode(target), b"overlay", 0, options.encode()):
        raise JobError(f"cannot mount {target}: {os.strerror(ctypes.get_errno())}")


def install_commands(scripts: str) -> None:
    """Install the commands ``pykvm`` and ``pytest``.

    If the environment outside has a folder of scripts, they and ``python`` are there too.
    """
    commands = {
        "pykvm": "import sys\nfrom pykvm.cli.main import main\nsys.exit(main())\n",
        "pytest": "import sys\nfrom pytest import console_main\nsys.exit(console_main())\n",
    }
    targets = dict.fromkeys(("python", "python3"), "/usr/bin/python3")
    os.makedirs("/usr/local/bin", exist_ok=True)
    for name, text in commands.items():
        targets[name] = f"/usr/local/bin/{name}"
        with open(targets[name], "w") as file:
            file.write("#!/usr/bin/python3\n" + text)
        os.chmod(targets[name], 0o755)
    if not scripts:
        return
    os.makedirs(scripts, exist_ok=True)
    for name, target in targets.items():
        if not os.path.lexists(f"{scripts}/{name}"):
            os.symlink(target, f"{scripts}/{name}")


def load_kvm(which: str, parameters: str) -> None:
    """Load KVM's modules, unless they are loaded: those of the "payload", the "stock" or "none".

    The parameters are those of kvm-intel.ko.
    """
    if which == "none" or os.path.exists("/sys/module/kvm_intel"):
        return
    modules = f"/lib/modules/{os.uname().release}/kernel"
    directory = f"{PAYLOAD}/modules" if which == "payload" else f"{modules}/arch/x86/kvm"
    load_module(f"{modules}/virt/lib/irqbypass.ko", optional=True)
    load_module(f"{directory}/kvm.ko")
    load_module(f"{directory}/kvm-intel.ko", parameters)
    # What an emulated processor reports of weaknesses, nobody can use.
    accept = "/sys/module/kvm_intel/parameters/elisa_accept"
    if os.path.exists(accept):
        with open(accept, "w") as file:
            file.write("all\n")


def load_module(path: str, parameters: str = "", *, optional: bool = False) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        if optional:
            return
        raise
    try:
        if libc.syscall(SYS_FINIT_MODULE, descriptor, parameters.encode(), 0):
            reason = os.strerror(ctypes.get_errno())
            if not optional:
                raise JobError(f"cannot load {os.path.basename(path)}: {reason}")
    finally:
        os.close(descriptor)


def environment(job: dict[str, Any]) -> dict[str, str]:
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(job["python"]),
        # Counts have to repeat, and the payload has compiled code.
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Otherwise pytest rewrites and recompiles all of hypothesis, as part of a plugin, which
        # takes two minutes in here.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYKVM_TESTBED": "exact" if job["exact"] else "fast",
        "PYKVM_MODULES": f"{PAYLOAD}/modules",
        **job["environment"],
    }


def run_command(job: dict[str, Any]) -> int:
    output = open_serial("/dev/ttyS0")
    errors = open_serial("/dev/ttyS3")
    for descriptor in (output, errors):
        set_size(descriptor, job)
    stdin = os.open(f"{PAYLOAD}/stdin", os.O_RDONLY)
    # Start at a fixed distance from the timer's ticks, so that they interrupt the command at the
    # same places in every run, however long it took to read the payload.
    time.sleep(0.2 - time.monotonic() % 0.1)
    try:
        child = subprocess.Popen(
            job["command"],
            cwd=job["directory"],
            env=environment(job),
            stdin=stdin,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    except OSError as error:
        message = f"pykvm testbed: {job['command'][0]}: {error.strerror}\n"
        os.write(errors, os.fsencode(message))
        status = 127 if isinstance(error, FileNotFoundError) else 126
    else:
        status = wait_for(child.pid)
    for descriptor in (output, errors):
        termios.tcdrain(descriptor)
    return status


def run_shell(job: dict[str, Any]) -> int:
    """Run a shell on a terminal of its own; its input comes over the control channel."""
    console = open_serial("/dev/ttyS0")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(job["directory"])
        os.execvpe(job["command"][0], job["command"], environment(job))
    set_size(terminal, job)
    while True:
        readable, _, _ = select.select([terminal, CONTROL], [], [])
        if CONTROL in readable:
            os.write(terminal, os.read(CONTROL, 256))
        if terminal in readable:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # the last process on it has gone
                break
            os.write(console, data)
    termios.tcdrain(console)
    return wait_for(pid)


def wait_for(wanted: int) -> int:
    # Process 1 inherits every orphan.
    while True:
        pid, status = os.wait()
        if pid == wanted:
            break
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def open_serial(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(descriptor)
    attributes = termios.tcgetattr(descriptor)
    attributes[2] |= termios.CLOCAL
    attributes[4] = attributes[5] = termios.B115200
    termios.tcsetattr(descriptor, termios.TCSANOW, attributes)
    return descriptor


def set_size(descriptor: int, job: dict[str, Any]) -> None:
    rows, columns = job["size"]
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def changed_files(names: list[str]) -> Iterator[str]:
    """Yield the changed files below each of the folder's `names`, in the overlay's upper layer."""
    for name in names:
        path = os.path.normpath(os.path.join(UPPER, name))
        if not os.path.lexists(path):
            continue
        if not os.path.isdir(path) or os.path.islink(path):
            yield path
            continue
        for directory, directories, files in os.walk(path):
            for each in (*files, *(d for d in directories if os.path.islink(f"{directory}/{d}"))):
                file = os.path.join(directory, each)
                kind = os.lstat(file).st_mode
                if stat.S_ISREG(kind) or stat.S_ISLNK(kind):  # a device marks a deleted file
                    yield file


def out_disk() -> str:
    """Return the device; its name depends on which disk was found first."""
    for name in os.listdir("/sys/block"):
        if os.path.realpath(f"/sys/block/{name}/device").endswith(OUT_DISK):
            return f"/dev/{name}"
    raise JobError("the disk for what comes back is missing")


def write_changes(names: list[str]) -> int:
    files = list(changed_files(names))
    if not files:
        return 0
    with open("/run/job/out.tar", "wb") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for path in files:
                archive.add(path, os.path.relpath(path, UPPER))
        size = file.tell()
    with open("/run/job/out.tar", "rb") as file, open(out_disk(), "wb", buffering=0) as disk:
        capacity = disk.seek(0, os.SEEK_END)
        if size > capacity:
            raise JobError(f"{size >> 20} MiB to bring back, the limit is {capacity >> 20}")
        disk.seek(0)
        while data := file.read(1 << 20):
            disk.write(data)
        os.fsync(disk.fileno())
    return size


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    main()

"""Process 1 of the emulated host: prepares it, warms it up, and waits for a job.

The machine is suspended while this waits. Everything that happens afterwards comes with the job, on
a CD-ROM image that differs from run to run. This file is part of the saved state, so it holds only
what is done before the suspend.
"""

import ctypes
import fcntl  # noqa: F401  (this and others are for the job, which then finds them loaded)
import importlib.util
import json  # noqa: F401
import os
import pty  # noqa: F401
import select  # noqa: F401
import subprocess
import sys
import tarfile  # noqa: F401
import termios
import tty

CONTROL = "/dev/ttyS1"
MS_RDONLY = 1
LIBC = ctypes.CDLL(None, use_errno=True)

# Commands to run once before the suspend, so that their files are in memory afterwards.
WARM_UP = (
    ("python3", "-c", "import cffi, psutil, pyroute2, argparse, json, ctypes"),
    ("bash", "-c", "uname -r; ls / | sort | head -1; cat /proc/version; lsmod; tar --version"),
    ("sh", "-c", "echo 'int main(void){return 0;}' > /tmp/a.c; gcc -O2 -o /tmp/a /tmp/a.c; /tmp/a"),
    ("sh", "-c", "objcopy --version; objdump --version; nm /tmp/a; readelf -h /tmp/a; rm /tmp/a*"),
)


def mount(kind: str, target: str, options: str = "") -> None:
    os.makedirs(target, exist_ok=True)
    extra = ["-o", options] if options else []
    subprocess.run(["mount", "-t", kind, *extra, kind, target], check=True)


def prepare() -> None:
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    os.environ["HOME"] = "/root"
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    mount("devpts", "/dev/pts", "mode=620,ptmxmode=666")
    mount("tmpfs", "/dev/shm")
    mount("tmpfs", "/tmp")
    mount("tmpfs", "/run")
    mount("debugfs", "/sys/kernel/debug")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")
    os.symlink("/proc/self/fd", "/dev/fd")


# More of them, if the environment outside has pytest.
TESTS_WARM_UP = (
    ("python3", "-c", "import hypothesis, pytest"),
    ("python3", "-m", "pytest", "--version"),
)


def warm_up() -> None:
    tests = TESTS_WARM_UP if importlib.util.find_spec("pytest") else ()
    for command in (*WARM_UP, *tests):
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            print(f"testbed: {command} failed: {done.stderr.decode()[-500:]}", file=sys.stderr)
    # Read the modules that every job loads, and those of KVM, for jobs that use the stock ones.
    release = os.uname().release
    for directory, _, files in os.walk(f"/lib/modules/{release}/kernel"):
        for name in files:
            if name in {"kvm.ko", "kvm-intel.ko", "isofs.ko", "sr_mod.ko", "cdrom.ko", "msr.ko"}:
                with open(os.path.join(directory, name), "rb") as file:
                    file.read()


def main() -> None:
    prepare()
    warm_up()
    # Load the CD-ROM's drivers, but do not read the disc: after the suspend there is another one.
    subprocess.run(["modprobe", "-a", "sr_mod", "isofs", "overlay"], check=True)
    os.sync()
    control = os.open(CONTROL, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(control)
    attributes = termios.tcgetattr(control)
    attributes[2] |= termios.CLOCAL
    attributes[4] = attributes[5] = termios.B115200
    termios.tcsetattr(control, termios.TCSANOW, attributes)
    while True:
        os.write(control, b"ready\n")
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(control, 1)
        if LIBC.mount(b"/dev/sr0", b"/payload", b"iso9660", MS_RDONLY, None):
            os.write(control, f"failed cannot mount the payload: {ctypes.get_errno()}\n".encode())
            continue
        with open("/payload/job.py", "rb") as file:
            code = compile(file.read(), "/payload/job.py", "exec")
        # Returns only if the job was to load modules; then another suspend follows.
        exec(code, {"__name__": "__main__", "CONTROL": control})
        LIBC.umount2(b"/payload", 0)


if __name__ == "__main__":
    main()

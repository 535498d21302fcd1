"""The booted host, kept: boots once for each kernel, root file system and configuration.

A cache entry holds the two disks and the suspended machine, which waits for a job. Neither files
nor the KVM modules are part of it; they come with each job.
"""

import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pykvm import cache
from pykvm.cache import pruning as cache_pruning
from pykvm.cache import scratch
from pykvm.errors import PykvmError
from pykvm.host import debian_packages
from pykvm.kernel.series import HostKernel
from pykvm.testbed import bochs, boot_disk, kernel_image, payload, requirements, rootfs
from pykvm.testbed.bochs import Emulator, Machine

__all__ = [
    "BootError",
    "booted_host",
    "collect_logs",
    "host_key",
    "host_with_kvm",
    "lay_out",
    "tail",
]

Progress = Callable[[str], None]

_COMMAND_LINE = (
    "console=ttyS2,115200 8250.nr_uarts=4 loglevel=6 "
    # Counts must repeat: no address randomisation, no calibration against other clocks.
    "nokaslr tsc=reliable no_timer_check lpj=4000000 random.trust_cpu=on "
    # CPUID claims 3.5 GHz, but the counter advances by one an instruction, as the clock does.
    f"tsc_early_khz={bochs.CLOCK // 1000} "
    # The emulated processor has no speculation to guard against. It lacks two MSRs that the
    # timer tick would read each time, and the one that says that fast strings are on: Linux then
    # takes ERMS as absent but not FSRM, and memmove() without the one needs to be without both.
    "mitigations=off clearcpuid=aperfmperf,fsrm panic=0"
)
_INITRAMFS_MODULES = ["ata_piix", "sd_mod"]
_OUT_DISK_SIZE = 256 * 16 * 63 * 512  # 126 MiB, sparse
_BOOT_TIMEOUT = 600.0  # seconds of processor time, which a busy host gives slowly
_BOOT_PATIENCE = 3600.0  # seconds
_SUSPEND_TIMEOUT = 120.0
_KEPT_STATES = 6  # of a kind, and any in use
_INSIDE = Path(__file__).with_name("inside")


class BootError(PykvmError):
    """The emulated host did not boot or could not be suspended."""


def host_key(kernel: HostKernel, machine: Machine) -> str:
    """The cache key of the booted host with `kernel` on `machine`.

    Raises:
        PackageError, RootfsError: see there.
    """
    sources = [_INSIDE / "agent.py", _INSIDE / "init.sh"]
    here = Path(__file__)
    sources += [here.with_name(n) for n in ("boot_disk.py", "boot_sector.S", "suspend_button.py")]
    return cache.key(
        kernel.release,
        kernel.package,
        rootfs.fingerprint(),
        machine.bochs.version,
        _COMMAND_LINE,
        " ".join(_INITRAMFS_MODULES),
        machine.configuration(),
        bochs.CPUS[machine.cpu].levels,
        *sources,
    )


def booted_host(kernel: HostKernel, machine: Machine, progress: Progress) -> Path:
    """The cache entry of the booted host, made first if need be (a minute or two).

    It holds `boot.img`, `root.img` and the directory `state`.

    Raises:
        BootError: it does not boot; the message names the logs.
        EmulatorError, PackageError, RootfsError, KernelImageError: see there.
    """

    def build(directory: Path) -> None:
        requirements.require()
        progress(f"fetching Linux {kernel.release}")
        image = kernel_image.unpacked(kernel)
        root = _root_image(image, kernel.release, progress)
        (directory / "root.img").hardlink_to(root)
        progress("making the boot disk")
        _make_boot_disk(directory / "boot.img", image, kernel.release, machine)
        progress(f"booting the emulated host, Linux {kernel.series} on a {machine.cpu}")
        with tempfile.NamedTemporaryFile() as blank:
            blank.truncate(1 << 20)
            _reach_and_suspend(directory, machine, Path(blank.name), None, progress)

    return _used(cache.entry("testbed-host", host_key(kernel, machine), build))


def host_with_kvm(
    kernel: HostKernel, machine: Machine, modules: Path | None, progress: Progress
) -> Path:
    """The cache entry of the booted host with KVM loaded, from the booted host if need be.

    Loading the modules takes a few seconds inside, for their many symbols; so it is done once
    for each build of them. Without `modules`, the distribution's are loaded. The entry has the
    same shape as that of `booted_host`.

    Raises:
        BootError: the modules do not load; the message names the logs.
        And what `booted_host` raises.
    """
    files = [] if modules is None else payload.module_files(modules)
    host = booted_host(kernel, machine, progress)
    sources = [_INSIDE / "job.py"]

    def build(directory: Path) -> None:
        progress("loading KVM" if modules else "loading the distribution's KVM")
        for name in ("boot.img", "root.img"):
            (directory / name).hardlink_to(host / name)
        with scratch.directory("testbed-instances") as work:
            image = work / "modules.iso"
            payload.write_modules(image, modules)
            _reach_and_suspend(directory, machine, image, host / "state", progress)

    key = cache.key(host.name, *files, *sources)
    return _used(cache.entry("testbed-kvm", key, build))


def _used(entry: Path) -> Path:
    """Drop old entries of the same kind; each takes 100 MB and more."""
    cache_pruning.keep_newest(entry.parent, _KEPT_STATES)
    return entry


def lay_out(instance: Path, host: Path, payload: Path) -> None:
    """Give `instance` what the emulator's configuration names, from `host` and for `payload`."""
    (instance / "boot.img").symlink_to(host / "boot.img")
    (instance / "root.img").symlink_to(host / "root.img")
    (instance / "payload.iso").symlink_to(payload)
    with (instance / "out.img").open("wb") as file:
        file.truncate(_OUT_DISK_SIZE)


def _root_image(image: Path, release: str, progress: Progress) -> Path:
    def build(directory: Path) -> None:
        progress("making the root file system")
        rootfs.build_image(directory / "root.img", image, release)

    key = cache.key(image.name, rootfs.fingerprint())
    return _used(cache.entry("testbed-root", key, build)) / "root.img"


def _make_boot_disk(path: Path, image: Path, release: str, machine: Machine) -> None:
    modules = image / "lib/modules" / release
    with tempfile.TemporaryDirectory() as directory:
        (busybox,) = debian_packages.fetch(debian_packages.closure(["busybox-static"])[:1])
        debian_packages.unpack(busybox, Path(directory))
        program = next(Path(directory).glob("**/bin/busybox")).read_bytes()
    files: list[tuple[str, bytes | None, int]] = [("modules", None, 0o755)]
    for index, module in enumerate(rootfs.modules_in_order(modules, _INITRAMFS_MODULES)):
        files.append((f"modules/{index:02}-{module.name}", module.read_bytes(), 0o644))
    files.append(("busybox", program, 0o755))
    files.append(("agent.py", (_INSIDE / "agent.py").read_bytes(), 0o644))
    files.append(("init", (_INSIDE / "init.sh").read_bytes(), 0o755))
    flat = kernel_image.flatten((image / "boot" / f"vmlinuz-{release}").read_bytes())
    levels = bochs.CPUS[machine.cpu].levels
    archive = boot_disk.cpio(files)
    boot_disk.write(path, flat, archive, _COMMAND_LINE, bochs.MEMORY, levels=levels)


def _reach_and_suspend(
    directory: Path, machine: Machine, image: Path, restore: Path | None, progress: Progress
) -> None:
    """Boot, or do the job on `image` after a `restore`, until the agent waits; then suspend."""
    state = directory / "state"
    with scratch.directory("testbed-instances") as instance:
        lay_out(instance, directory, image)
        try:
            with Emulator(instance, machine, restore) as emulator:
                if restore is not None:
                    emulator.say_go()
                _await_ready(emulator, progress)
                progress("suspending it")
                _suspend(emulator, state)
        except PykvmError as error:
            kept = cache.log_path("testbed-boot")
            collect_logs(instance, kept)
            raise BootError(f"{error.problem} (logs: {kept})", error.next_step) from error


def _await_ready(emulator: Emulator, progress: Progress) -> None:
    start = told = time.monotonic()
    received = b""
    while b"ready\n" not in received:
        now = time.monotonic()
        if b"failed" in received and received.endswith(b"\n"):
            reason = received[received.index(b"failed") + 7 :].decode(errors="replace")
            raise BootError(reason.strip())
        if not emulator.running():
            raise BootError(f"the emulator died during the boot: {emulator.last_words()}")
        if "Kernel panic" in tail(emulator.directory / "kernel.log"):
            raise BootError("the emulated kernel panicked during the boot")
        if emulator.processor_time() > _BOOT_TIMEOUT or now - start > _BOOT_PATIENCE:
            raise BootError(f"the emulated host did not boot in {now - start:.0f} s")
        if now - told > 10:
            told = now
            progress(f"still booting: {_last_line(emulator.directory / 'kernel.log')}")
        readable, _, _ = select.select([emulator.control], [], [], 0.2)
        if readable:
            received += os.read(emulator.control, 4096)


def _suspend(emulator: Emulator, state: Path) -> None:
    inner = emulator.inner_pid()
    namespaces = ["--net"] if os.geteuid() == 0 else ["--user", "--preserve-credentials", "--net"]
    button = Path(__file__).with_name("suspend_button.py")
    saved = emulator.directory / "state"
    saved.mkdir()
    command = ["nsenter", f"--target={inner}", *namespaces, sys.executable, "-I", str(button)]
    press = subprocess.run(
        [*command, saved.name],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_SUSPEND_TIMEOUT,
        check=False,
    )
    if press.returncode:
        raise BootError(press.stderr.strip())
    emulator.wait(10)
    if not (saved / "memory.ram").exists() or not (saved / "hard_drive").stat().st_size:
        raise BootError(f"the emulator saved no state: {emulator.last_words()}")
    bochs.make_restorable(saved)
    shutil.copytree(saved, state, copy_function=_copy_sparse)


def _copy_sparse(source: str, target: str) -> None:
    command = ["cp", "--sparse=always", source, target]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise BootError(f"the saved state cannot be kept ({done.stderr.strip()})")


def collect_logs(instance: Path, kept: Path) -> None:
    """Write the ends of the logs in `instance` to the file `kept`."""
    with kept.open("w") as target:
        for name in ("kernel.log", "bochs.log", "bochs.out"):
            target.write(f"==== {name}\n{tail(instance / name, 100_000)}\n")


def tail(path: Path, size: int = 4096) -> str:
    """The last `size` bytes of the file `path` as text; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _last_line(path: Path) -> str:
    lines = tail(path).strip().splitlines()
    return lines[-1] if lines else "no output yet"

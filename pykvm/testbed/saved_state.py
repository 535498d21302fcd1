"""Saved states of the booted host: one boot for each kernel, root file system and configuration.

A cache entry holds the two disks and the suspended machine, which waits for a job. The user's files
are not part of it; each job brings them. KVM's modules are loaded in the entries of `host_with_kvm`
only.
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
from pykvm.kernel import module_files
from pykvm.kernel.series import HostKernel
from pykvm.machine.linux import cpio
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
    # CPUID reports 3.5 GHz, but the counter advances by one an instruction, as the clock does.
    f"tsc_early_khz={bochs.CLOCK // 1000} "
    # The emulated processor does not speculate. It lacks the two MSRs of aperfmperf, which each
    # timer tick would read. It also lacks the MSR that reports fast strings: Linux then clears
    # ERMS but not FSRM, and its memmove() needs ERMS wherever it has FSRM.
    "mitigations=off clearcpuid=aperfmperf,fsrm panic=0"
)
_INITRAMFS_MODULES = ["ata_piix", "sd_mod"]
_OUT_DISK_SIZE = 256 * 16 * 63 * 512  # 126 MiB, sparse
_BOOT_TIMEOUT = 600.0  # seconds of processor time, so that a busy host may take longer
_BOOT_PATIENCE = 3600.0  # seconds of wall-clock time
_SUSPEND_TIMEOUT = 120.0
_KEPT_STATES = 6  # entries of each kind, and those in use
_INSIDE = Path(__file__).with_name("inside")


class BootError(PykvmError):
    """The emulated host did not boot or could not be suspended."""


def host_key(kernel: HostKernel, machine: Machine) -> str:
    """Return the cache key of the booted host with `kernel` on `machine`.

    Raises:
        PackageError, RootfsError: see `pykvm.testbed.rootfs.fingerprint`.
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
        machine.exact,
        *sources,
    )


def booted_host(kernel: HostKernel, machine: Machine, progress: Progress) -> Path:
    """Return the cache entry of the booted host; boot the host if the cache lacks it.

    A boot takes a minute or two.

    Args:
        kernel: kernel of the host.
        machine: processor of the host, and the Bochs that emulates it.
        progress: called with a message at each step.

    Returns:
        A directory with `boot.img`, `root.img` and the directory `state`.

    Raises:
        BootError: the host does not boot; the message names the logs.
        RequirementsError: a program or file is missing.
        EmulatorError, PackageError, RootfsError, KernelImageError: a part cannot be made.
    """

    def build(directory: Path) -> None:
        requirements.require()
        progress(f"fetching Linux {kernel.release}")
        image = kernel_image.unpacked(kernel)
        root = _root_image(image, kernel.release, progress)
        (directory / "root.img").hardlink_to(root)
        progress("making the boot disk")
        _make_boot_disk(directory / "boot.img", image, kernel.release, machine)
        progress(f"booting the emulated host, Linux {kernel.series} on {machine}")
        with tempfile.NamedTemporaryFile() as blank:
            blank.truncate(1 << 20)
            _reach_and_suspend(directory, machine, Path(blank.name), None, progress)

    return _used(cache.entry("testbed-host", host_key(kernel, machine), build))


def host_with_kvm(
    kernel: HostKernel, machine: Machine, modules: Path | None, progress: Progress
) -> Path:
    """Return the cache entry of the booted host with KVM loaded; make it if the cache lacks it.

    The modules have many symbols, so loading them takes a few seconds on the emulated host. It is
    done once for each build of the modules.

    Args:
        kernel: kernel of the host.
        machine: processor of the host, and the Bochs that emulates it.
        modules: directory of kvm.ko and kvm-intel.ko; None for the distribution's modules.
        progress: called with a message at each step.

    Returns:
        A directory with the same files as that of `booted_host`.

    Raises:
        BootError: the modules do not load; the message names the logs.
        PayloadError: a module is missing.
        PykvmError: see `booted_host`.
    """
    files = [] if modules is None else payload.module_files(modules)
    host = booted_host(kernel, machine, progress)
    sources = [_INSIDE / "job.py"]
    parameters = bochs.CPUS[machine.cpu].kvm_intel

    def build(directory: Path) -> None:
        progress("loading KVM" if modules else "loading the distribution's KVM")
        for name in ("boot.img", "root.img"):
            (directory / name).hardlink_to(host / name)
        with scratch.directory("testbed-instances") as work:
            image = work / "modules.iso"
            payload.write_modules(image, modules, parameters)
            _reach_and_suspend(directory, machine, image, host / "state", progress)

    key = cache.key(host.name, parameters, *files, *sources)
    return _used(cache.entry("testbed-kvm", key, build))


def _used(entry: Path) -> Path:
    """Remove old entries of the same kind, each of which takes 100 MB or more.

    Returns:
        The entry itself.
    """
    cache_pruning.keep_newest(entry.parent, _KEPT_STATES)
    return entry


def lay_out(instance: Path, host: Path, payload: Path) -> None:
    """Create the disk images that the emulator's configuration names.

    Args:
        instance: directory in which the emulator will run.
        host: cache entry of the booted host.
        payload: ISO image of the job.
    """
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
    entries = [cpio.directory("modules")]
    for index, module in enumerate(module_files.in_order(modules, _INITRAMFS_MODULES)):
        entries.append(cpio.file(f"modules/{index:02}-{module.name}", module.read_bytes()))
    entries.append(cpio.file("busybox", program, 0o755))
    entries.append(cpio.file("agent.py", (_INSIDE / "agent.py").read_bytes()))
    entries.append(cpio.file("init", (_INSIDE / "init.sh").read_bytes(), 0o755))
    flat = kernel_image.flatten((image / "boot" / f"vmlinuz-{release}").read_bytes())
    levels = bochs.CPUS[machine.cpu].levels
    archive = cpio.archive(*entries)
    boot_disk.write(path, flat, archive, _COMMAND_LINE, machine.memory << 20, levels=levels)


def _reach_and_suspend(
    directory: Path, machine: Machine, image: Path, restore: Path | None, progress: Progress
) -> None:
    """Run the emulated host until its agent waits for a job, then suspend it.

    The host boots, or resumes from `restore` and runs the job on `image`. The saved state goes to
    `state` in `directory`.
    """
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
    """Return the last `size` bytes of the file `path` as text; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _last_line(path: Path) -> str:
    lines = tail(path).strip().splitlines()
    return lines[-1] if lines else "no output yet"

"""What this host has and lacks, for `pykvm doctor`: one check per need, each with a next step.

A check looks and never changes anything. The checks of the group "host" decide whether ELISA runs
on this machine itself; those of "emulated host" decide whether it can emulate one that does.
"""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.host import distribution
from pykvm.host.emulation import is_emulated
from pykvm.host.processor import MsrUnreadable, VmxCapabilities, read_processor
from pykvm.kernel import modules
from pykvm.kernel import packages as kernel_packages
from pykvm.kernel import series as kernel_series
from pykvm.kernel.patch import find_patch

__all__ = ["EMULATED", "HOST", "Check", "emulated_host_usable", "host_usable", "run_checks"]

HOST = "host"
EMULATED = "emulated host"

_USE_TESTBED = "use the emulated host: pykvm testbed -- COMMAND"
_MIB = 1 << 20
_GIB = 1 << 30

# One object with its contexts pins a few MiB; what the demo shares stays below this.
_LOCKABLE = 64 * _MIB
_MEMORY = 1 * _GIB
_DISK = 2 * _GIB

# Bits of the capability sets, linux/capability.h.
_CAP_IPC_LOCK = 14
_CAP_SYS_ADMIN = 21

# What a context of ours relies on; the rest of EPT's features is reported only.
_EPT_NEEDED = ("4 levels", "write-back tables", "execute-only", "INVEPT", "INVEPT of all contexts")

# Programs of the emulated host, and Debian's packages for them.
_TESTBED_PROGRAMS = {
    "bochs-bin": "bochs",
    "mke2fs": "e2fsprogs",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "apt-get": "apt",
    "gcc": "gcc",
    "unshare": "util-linux",
    "xorriso": "xorriso",
    "xz": "xz-utils",
    "zstd": "zstd",
}
_TESTBED_FILES = {
    "/usr/share/bochs/BIOS-bochs-latest": "bochsbios",
    "/usr/share/vgabios/vgabios.bin": "vgabios",
}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        group: `HOST` or `EMULATED`.
        name: What was looked at.
        ok: Whether it is as it should be.
        found: What was found, in a few words.
        next_step: What to type or do if it is not ok.
        needed: Whether the group is unusable without it.
    """

    group: str
    name: str
    ok: bool
    found: str
    next_step: str = ""
    needed: bool = True


def run_checks() -> list[Check]:
    """Every check, in the order in which a reader would repair things.

    Inside the emulated host there is no second one, and its checks are left out.
    """
    checks = [check() for check in _HOST_CHECKS]
    if not is_emulated():
        checks += [check() for check in _EMULATED_CHECKS]
    return checks


def host_usable(checks: list[Check]) -> bool:
    """Whether ELISA runs on this host itself."""
    return all(check.ok for check in checks if check.group == HOST and check.needed)


def emulated_host_usable(checks: list[Check]) -> bool:
    """Whether this host can run the emulated one."""
    emulated = [check for check in checks if check.group == EMULATED]
    return bool(emulated) and all(check.ok for check in emulated if check.needed)


def _distribution() -> Check:
    releases = " or ".join(distribution.DEBIAN_RELEASES)
    return Check(
        HOST,
        "distribution",
        distribution.is_supported(),
        distribution.name(),
        f"use Debian {releases}: what pykvm needs is tried on no other",
        needed=False,
    )


def _processor() -> Check:
    processor = read_processor()
    found = f"{processor.name} ({processor.vendor})"
    return Check(HOST, "processor", processor.is_intel, found, f"needs Intel; {_USE_TESTBED}")


def _vmx() -> Check:
    processor = read_processor()
    if processor.has_vmx:
        return Check(HOST, "VMX", True, "present")
    step = "switch VMX on in the firmware, or nested virtualization if this is a VM"
    return Check(HOST, "VMX", False, "absent", step if processor.is_intel else _USE_TESTBED)


def _vm_functions() -> Check:
    name = "VMFUNC with EPTP switching"
    proven = modules.elisa_version() > 0
    try:
        vmx = VmxCapabilities.read()
    except MsrUnreadable as error:
        if proven:
            return Check(HOST, name, True, "present (KVM says so)")
        if not read_processor().has_vmx:
            return Check(HOST, name, False, "absent: no VMX", _USE_TESTBED)
        problem, _, step = str(error).partition("; ")
        return Check(HOST, name, False, f"unknown: {problem}", step.removeprefix("type: "))
    values = f"MSR 0x48b = {vmx.procbased2:#x}, 0x491 = {vmx.vmfunc:#x}"
    if not vmx.enabled_by_firmware:
        return Check(HOST, name, False, f"VMX locked off, {values}", "switch it on in the firmware")
    return Check(HOST, name, vmx.eptp_switching, values, _USE_TESTBED)


def _ept() -> Check:
    try:
        features = VmxCapabilities.read().ept_features()
    except MsrUnreadable as error:
        if modules.elisa_version() > 0:
            return Check(HOST, "EPT", True, "present (KVM says so)")
        problem, _, step = str(error).partition("; ")
        if not read_processor().has_vmx:
            problem, step = "absent: no VMX", _USE_TESTBED
        return Check(HOST, "EPT", False, problem, step.removeprefix("type: "))
    has = ", ".join(name for name, present in features.items() if present)
    lacks = [name for name in _EPT_NEEDED if not features[name]]
    return Check(
        HOST, "EPT", not lacks, has or "absent", f"lacks {', '.join(lacks)}; {_USE_TESTBED}"
    )


def _device() -> Check:
    name = "/dev/kvm"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        intel = read_processor().has_vmx
        return Check(HOST, name, False, "absent", "modprobe kvm_intel" if intel else _USE_TESTBED)
    except PermissionError:
        step = "sudo usermod -aG kvm $USER, then log in again"
        return Check(HOST, name, False, "no permission", step)
    except OSError as error:
        return Check(HOST, name, False, f"does not open: {error.strerror}", "modprobe kvm_intel")
    return Check(HOST, name, True, "usable")


def _kvm() -> Check:
    status = modules.status()
    version = f", ELISA version {status.elisa}" if status.elisa else ""
    sources = "".join(f", {name} {hash}" for name, hash in status.srcversion.items() if hash)
    further = f" ({status.test_build})" if status.test_build else ""
    found = f"{status.state}{further}{version}{sources}"
    step = "pykvm kernel build && sudo .venv/bin/pykvm kernel load"
    if status.state == "built in" or not read_processor().has_vmx:
        step = _USE_TESTBED
    return Check(HOST, "patched KVM", status.state == "patched", found, step)


def _privilege() -> Check:
    allowed = _effective_capabilities() >> _CAP_SYS_ADMIN & 1
    found = "CAP_SYS_ADMIN" if allowed else "no CAP_SYS_ADMIN"
    return Check(HOST, "privilege", bool(allowed), found, "run it as root (sudo)")


def _lockable_memory() -> Check:
    name = "lockable memory"
    if _effective_capabilities() >> _CAP_IPC_LOCK & 1:
        return Check(HOST, name, True, "unlimited (CAP_IPC_LOCK)")
    limit, ceiling = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Check(HOST, name, True, "unlimited")
    step = f"ulimit -l {_LOCKABLE >> 10}"
    if ceiling != resource.RLIM_INFINITY and ceiling < _LOCKABLE:
        step = (
            'echo "$USER - memlock unlimited" | sudo tee -a /etc/security/limits.conf, '
            "then log in again"
        )
    return Check(HOST, name, limit >= _LOCKABLE, f"{limit / _MIB:.0f} MiB", step)


def _huge_pages() -> Check:
    directory = Path("/sys/kernel/mm/hugepages")
    pools = [
        f"{(pool / 'nr_hugepages').read_text().strip()} of {pool.name.removeprefix('hugepages-')}"
        for pool in sorted(directory.glob("hugepages-*"))
    ]
    return Check(HOST, "huge pages", True, ", ".join(pools) or "none", needed=False)


def _kernel_packages() -> Check:
    # Once the patched modules are loaded, nothing has to be built: hence not needed as such.
    name = "headers and source of the running kernel"
    try:
        headers = kernel_packages.find_headers()
        find_patch(headers.series)
        source = kernel_packages.find_source(headers.series)
        kernel_packages.require_match(headers, source, headers.version)
    except PykvmError as error:
        problem, _, step = str(error).partition("; ")
        return Check(HOST, name, False, problem, step.removeprefix("type: "), needed=False)
    return Check(HOST, name, True, f"{headers.release}, {headers.package}", needed=False)


def _memory() -> Check:
    words = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = int(words["MemAvailable"].split()[0]) << 10
    # The emulated host has half a GiB altogether, which is known to be enough there.
    enough = is_emulated() or available >= _MEMORY
    found = f"{available / _GIB:.1f} GiB available"
    return Check(HOST, "memory", enough, found, "free 1 GiB of memory")


def _programs() -> Check:
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = {
        program: package
        for program, package in _TESTBED_PROGRAMS.items()
        if not shutil.which(program, path=path)
    }
    missing |= {
        file: package for file, package in _TESTBED_FILES.items() if not Path(file).exists()
    }
    found = f"missing: {', '.join(missing)}" if missing else "all there"
    packages = " ".join(sorted(set(missing.values())))
    step = f"sudo apt-get install --no-install-recommends {packages}"
    return Check(EMULATED, "Bochs and tools", not missing, found, step)


def _namespaces() -> Check:
    # The emulator's display listens without a password: it gets a network of its own.
    name = "namespaces for the emulator"
    command = ["unshare", "--net", "--pid", "--fork", "true"]
    if os.geteuid() != 0:
        command[1:1] = ["--user", "--map-root-user"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return Check(EMULATED, name, False, "no unshare", "sudo apt-get install util-linux")
    found = "allowed" if done.returncode == 0 else "refused"
    step = "sudo sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=1000"
    return Check(EMULATED, name, done.returncode == 0, found, step)


def _testbed_kernels() -> Check:
    found, missing = [], []
    for series in kernel_series.SERIES:
        try:
            kernel = kernel_series.newest_kernel(series)
            find_patch(series)
        except PykvmError:
            missing.append(series)
            continue
        where = "installed" if kernel.installed else "to be fetched"
        found.append(f"{series} ({kernel.release}, {where})")
    text = ", ".join(found) or "none with headers and source of one version and a patch"
    if missing and found:
        text += f"; not {', '.join(missing)}"
    return Check(EMULATED, "kernel series (--series)", bool(found), text, "sudo apt-get update")


def _disk() -> Check:
    place = cache.root()
    while not os.path.exists(place):  # Path.exists raises where the parent cannot be read
        place = place.parent
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    found = f"{free / _GIB:.1f} GiB free in {place}" if writable else f"{place} is not writable"
    step = "set PYKVM_CACHE to a directory that you may write, with 2 GiB free"
    return Check(EMULATED, "disk for the cache", writable and free >= _DISK, found, step)


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


_HOST_CHECKS: tuple[Callable[[], Check], ...] = (
    _distribution,
    _processor,
    _vmx,
    _vm_functions,
    _ept,
    _device,
    _kvm,
    _privilege,
    _lockable_memory,
    _huge_pages,
    _memory,
    _kernel_packages,
)
_EMULATED_CHECKS: tuple[Callable[[], Check], ...] = (
    _programs,
    _namespaces,
    _testbed_kernels,
    _disk,
)

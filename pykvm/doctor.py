"""Checks of `pykvm doctor`: one for each requirement, with a next step that works on this machine.

A check never changes anything. The checks of the group "host" decide whether ELISA runs on this
machine itself. Those of the group "emulated host" decide whether it can run the emulated host.
"""

import grp
import os
import pwd
import resource
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pykvm import cache
from pykvm.cache import CacheError
from pykvm.errors import PykvmError
from pykvm.host import distribution
from pykvm.host.advice import install, load_module
from pykvm.host.commands import as_root, emulated_host, program
from pykvm.host.emulation import is_emulated
from pykvm.host.processor import MsrUnreadableError, VmxCapabilities, read_processor
from pykvm.host.weaknesses import Weakness, read_weaknesses
from pykvm.kernel import modules, weaknesses
from pykvm.kernel import packages as kernel_packages
from pykvm.kernel import series as kernel_series
from pykvm.kernel.patch import find_patch
from pykvm.testbed import requirements
from pykvm.testbed.requirements import RequirementsError

__all__ = ["EMULATED", "HOST", "Check", "emulated_host_usable", "host_usable", "run_checks"]

HOST = "host"
EMULATED = "emulated host"

_KVM = Path("/dev/kvm")
_SYSCTL = Path("/proc/sys")
_LIMITS = Path("/etc/security/limits.conf")  # of PAM

# Settings that can forbid namespaces to ordinary users: a value that forbids, and one that allows.
_NAMESPACE_SETTINGS = {
    "kernel.unprivileged_userns_clone": ("0", "1"),
    "kernel.apparmor_restrict_unprivileged_userns": ("1", "0"),
    "user.max_user_namespaces": ("0", "1000"),
    "user.max_net_namespaces": ("0", "1000"),
    "user.max_pid_namespaces": ("0", "1000"),
}

_MIB = 1 << 20
_GIB = 1 << 30

# An object with its contexts pins a few MiB; the objects of the demo stay below this.
_LOCKABLE = 64 * _MIB
_MEMORY = 1 * _GIB
_DISK = 2 * _GIB

# Bits of the capability sets, linux/capability.h.
_CAP_IPC_LOCK = 14
_CAP_SYS_ADMIN = 21

# Features that ELISA's contexts need; the other EPT features are only reported.
_EPT_NEEDED = ("4 levels", "write-back tables", "execute-only", "INVEPT", "INVEPT of all contexts")


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        group: `HOST` or `EMULATED`.
        name: name of the requirement.
        ok: whether it is met.
        found: what was found, in a few words.
        next_step: what to type or do if it is not met.
        needed: whether the group is unusable without it.
    """

    group: str
    name: str
    ok: bool
    found: str
    next_step: str = ""
    needed: bool = True


def run_checks() -> list[Check]:
    """Run all checks, in the order in which a user would fix their findings.

    Inside the emulated host, the checks of the group "emulated host" are left out.
    """
    checks = [check() for check in _HOST_CHECKS] + _weaknesses()
    if not is_emulated():
        checks += [check() for check in _EMULATED_CHECKS]
    return checks


def host_usable(checks: list[Check]) -> bool:
    """Return whether ELISA runs on this host itself, according to `checks`."""
    return all(check.ok for check in checks if check.group == HOST and check.needed)


def emulated_host_usable(checks: list[Check]) -> bool:
    """Return whether this host can run the emulated host, according to `checks`."""
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
    step = f"needs Intel; {emulated_host()}"
    return Check(HOST, "processor", processor.is_intel, found, step)


def _vmx() -> Check:
    processor = read_processor()
    if processor.has_vmx:
        return Check(HOST, "VMX", True, "present")
    step = "switch VMX on in the firmware, or nested virtualization if this is a VM"
    return Check(HOST, "VMX", False, "absent", step if processor.is_intel else emulated_host())


def _vm_functions() -> Check:
    name = "VMFUNC with EPTP switching"
    proven = modules.elisa_version() > 0
    try:
        vmx = VmxCapabilities.read()
    except MsrUnreadableError as error:
        if proven:
            return Check(HOST, name, True, "present (KVM says so)")
        if not read_processor().has_vmx:
            return Check(HOST, name, False, "absent: no VMX", emulated_host())
        return Check(HOST, name, False, f"unknown: {error.problem}", error.next_step)
    values = f"MSR 0x48b = {vmx.procbased2:#x}, 0x491 = {vmx.vmfunc:#x}"
    if not vmx.enabled_by_firmware:
        return Check(HOST, name, False, f"VMX locked off, {values}", "switch it on in the firmware")
    return Check(HOST, name, vmx.eptp_switching, values, emulated_host())


def _ept() -> Check:
    try:
        features = VmxCapabilities.read().ept_features()
    except MsrUnreadableError as error:
        if modules.elisa_version() > 0:
            return Check(HOST, "EPT", True, "present (KVM says so)")
        if not read_processor().has_vmx:
            return Check(HOST, "EPT", False, "absent: no VMX", emulated_host())
        return Check(HOST, "EPT", False, error.problem, error.next_step)
    has = ", ".join(name for name, present in features.items() if present)
    lacks = [name for name in _EPT_NEEDED if not features[name]]
    return Check(
        HOST, "EPT", not lacks, has or "absent", f"lacks {', '.join(lacks)}; {emulated_host()}"
    )


def _device() -> Check:
    name = "/dev/kvm"
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Check(HOST, name, False, "absent", _device_step())
    except PermissionError:
        return Check(HOST, name, False, "no permission", _permission_step())
    except OSError as error:
        return Check(HOST, name, False, f"does not open: {error.strerror}", _device_step())
    return Check(HOST, name, True, "usable")


def _device_step() -> str:
    if Path("/sys/module/kvm/refcnt").exists():
        return f"give this container the device {_KVM}: KVM is loaded"
    if not read_processor().has_vmx:
        return emulated_host()
    return load_module("kvm_intel", emulated_host())


def _permission_step() -> str:
    """Return the next step that gives this user access to the device.

    If the device's group has access, it is to join the group, else to run the command as root.
    """
    status = os.stat(_KVM)
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
        group = grp.getgrgid(status.st_gid)
    except KeyError:  # a user or group without an entry
        return as_root(f"{program()} COMMAND")
    if status.st_mode & 0o060 != 0o060 or group.gr_gid == 0:
        return as_root(f"{program()} COMMAND")
    if user in group.gr_mem:
        return f"log in again: {user} has become a member of {group.gr_name} meanwhile"
    command = as_root(f"usermod -aG {shlex.quote(group.gr_name)} {shlex.quote(user)}")
    return f"{command}, then log in again"


def _kvm() -> Check:
    status = modules.status()
    version = f", ELISA version {status.elisa}" if status.elisa else ""
    sources = "".join(f", {name} {hash}" for name, hash in status.srcversion.items() if hash)
    further = f" ({status.test_build})" if status.test_build else ""
    found = f"{status.state}{further}{version}{sources}"
    step = ""
    if status.state != "patched":
        buildable = status.state != "built in" and read_processor().has_vmx
        if buildable and _kernel_packages().ok:
            step = f"{program()} kernel build && {as_root(f'{program()} kernel load')}"
        else:
            step = emulated_host()
    return Check(HOST, "patched KVM", status.state == "patched", found, step)


def _privilege() -> Check:
    allowed = _effective_capabilities() >> _CAP_SYS_ADMIN & 1
    found = "CAP_SYS_ADMIN" if allowed else "no CAP_SYS_ADMIN"
    if os.geteuid() == 0:
        step = "give this container CAP_SYS_ADMIN (--cap-add SYS_ADMIN)"
    else:
        step = as_root(f"{program()} COMMAND")
    return Check(HOST, "privilege", bool(allowed), found, step)


def _lockable_memory() -> Check:
    name = "lockable memory"
    if _effective_capabilities() >> _CAP_IPC_LOCK & 1:
        return Check(HOST, name, True, "unlimited (CAP_IPC_LOCK)")
    limit, ceiling = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Check(HOST, name, True, "unlimited")
    step = f"ulimit -l {_LOCKABLE >> 10}"
    if ceiling != resource.RLIM_INFINITY and ceiling < _LOCKABLE:
        step = as_root(f"{program()} COMMAND")
        if _LIMITS.exists():
            line = 'echo "$USER - memlock unlimited"'
            step = f"{line} | {as_root(f'tee -a {_LIMITS}')}, then log in again"
    return Check(HOST, name, limit >= _LOCKABLE, f"{limit / _MIB:.0f} MiB", step)


def _huge_pages() -> Check:
    directory = Path("/sys/kernel/mm/hugepages")
    pools = [
        f"{(pool / 'nr_hugepages').read_text().strip()} of {pool.name.removeprefix('hugepages-')}"
        for pool in sorted(directory.glob("hugepages-*"))
    ]
    return Check(HOST, "huge pages", True, ", ".join(pools) or "none", needed=False)


def _weaknesses() -> list[Check]:
    name = "processor weaknesses"
    found = read_weaknesses()
    if found is None:
        step = "mount -t sysfs sysfs /sys"
        return [Check(HOST, name, False, "unknown", step, needed=False)]
    if not found:
        return [Check(HOST, name, True, "none that matters here", needed=False)]
    return [_weakness(one) for one in found]


def _weakness(weakness: Weakness) -> Check:
    answer = weaknesses.answer_to(weakness)
    found = f"{weakness.kernel}; in contexts: {answer.text}"
    name = f"weakness {weakness.name}"
    return Check(HOST, name, answer.holds, found, answer.next_step, needed=False)


def _kernel_packages() -> Check:
    # Not needed once the patched modules are loaded, because nothing has to be built then.
    name = "headers and source of the running kernel"
    release = kernel_packages.running_release()
    try:
        if series := kernel_series.of_release(release):
            find_patch(series)
        if kernel := kernel_series.find_kernel(release):
            where = "installed" if kernel.installed else "to be fetched"
            return Check(HOST, name, True, f"{release}, {kernel.package}, {where}", needed=False)
        headers = kernel_packages.find_headers(release)
        find_patch(headers.series)
        source = kernel_packages.find_source(headers.series)
        kernel_packages.require_match(headers, source, headers.version)
    except PykvmError as error:
        return Check(HOST, name, False, error.problem, error.next_step, needed=False)
    return Check(HOST, name, True, f"{release}, {headers.version}", needed=False)


def _memory() -> Check:
    available = psutil.virtual_memory().available
    # The emulated host has 512 MiB, which is known to be enough there.
    enough = is_emulated() or available >= _MEMORY
    found = f"{available / _GIB:.1f} GiB available"
    return Check(HOST, "memory", enough, found, "free 1 GiB of memory")


def _programs() -> Check:
    name = "Bochs and tools"
    try:
        requirements.require()
    except RequirementsError as error:
        return Check(EMULATED, name, False, error.problem, error.next_step)
    return Check(EMULATED, name, True, "all there")


def _namespaces() -> Check:
    # The emulator's display listens without a password, so it needs a network namespace.
    name = "namespaces for the emulator"
    command = ["unshare", "--net", "--pid", "--fork", "true"]
    if os.geteuid() != 0:
        command[1:1] = ["--user", "--map-root-user"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return Check(EMULATED, name, False, "no unshare", install(["util-linux"]))
    if done.returncode == 0:
        return Check(EMULATED, name, True, "allowed")
    return Check(EMULATED, name, False, "refused", _namespaces_step())


def _namespaces_step() -> str:
    settings = []
    for setting, (refusing, allowing) in _NAMESPACE_SETTINGS.items():
        file = _SYSCTL.joinpath(*setting.split("."))
        if file.exists() and file.read_text().strip() == refusing:
            settings.append(f"{setting}={allowing}")
    if settings:
        return as_root(f"sysctl {' '.join(settings)}")
    if os.geteuid() == 0:
        return "give this container CAP_SYS_ADMIN (--cap-add SYS_ADMIN)"
    return as_root(f"{program()} testbed -- COMMAND")


def _testbed_kernels() -> Check:
    name = "kernel series (--series)"
    found, missing = [], []
    for series in kernel_series.SERIES:
        try:
            kernel = kernel_series.newest_kernel(series)
        except kernel_series.KernelMissingError:
            missing.append(series)
            continue
        except PykvmError as error:  # not specific to a series
            return Check(EMULATED, name, False, error.problem, error.next_step)
        where = "installed" if kernel.installed else "to be fetched"
        found.append(f"{series} ({kernel.release}, {where})")
    text = ", ".join(found) or "none with headers and source of one version"
    if missing and found:
        text += f"; not {', '.join(missing)}"
    return Check(EMULATED, name, bool(found), text, as_root("apt-get update"))


def _disk() -> Check:
    try:
        place = cache.root()
    except CacheError as error:
        return Check(EMULATED, "disk for the cache", False, error.problem, error.next_step)
    while not os.path.exists(place):  # Path.exists raises where the parent cannot be read
        place = place.parent
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    found = f"{free / _GIB:.1f} GiB free in {place}" if writable else f"{place} is not writable"
    step = "set PYKVM_CACHE to a directory that you may write, with 2 GiB free"
    return Check(EMULATED, "disk for the cache", writable and free >= _DISK, found, step)


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text(errors="replace").splitlines():
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

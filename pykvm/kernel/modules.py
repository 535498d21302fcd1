"""Switch the running kernel between the distribution's KVM modules and the patched ones.

Nothing is unloaded while a virtual machine runs, and a machine that had KVM before has it
afterwards: where the wanted modules do not load, the ones that do are put back.
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pykvm.errors import PykvmError
from pykvm.host.advice import install
from pykvm.host.commands import again_as_root, as_root, emulated_host, program
from pykvm.host.kvm_users import describe_users
from pykvm.host.processor import read_processor
from pykvm.kernel import build as kernel
from pykvm.kernel import uapi, weaknesses
from pykvm.kernel.extension import check_extension

__all__ = [
    "KvmBuiltInError",
    "ModuleLoadError",
    "ModulesInUseError",
    "ModulesMissingError",
    "NotRootError",
    "Status",
    "UnsupportedProcessorError",
    "elisa_version",
    "load",
    "restore",
    "status",
]

_SYS_MODULE = Path("/sys/module")

# Unloaded in this order; sysfs and the kernel write them with an underscore.
_LOADED_NAMES = ("kvm_intel", "kvm")

# Values by module and by parameter.
_Parameters = dict[str, dict[str, str]]


class NotRootError(PykvmError):
    """A user other than root wants to change the kernel's modules."""


class UnsupportedProcessorError(PykvmError):
    """A processor without VMX, which the patched modules need."""


class KvmBuiltInError(PykvmError):
    """KVM is part of the running kernel and cannot be exchanged."""


class ModulesInUseError(PykvmError):
    """A virtual machine runs, or another module needs KVM."""


class ModulesMissingError(PykvmError):
    """There are no patched modules to load."""


class ModuleLoadError(PykvmError):
    """Modules did not load; the message says which ones are loaded now."""


@dataclass(frozen=True)
class Status:
    """The KVM of the running kernel.

    Attributes:
        state: "patched" (it offers ELISA), "test build" (with further patches, which may take its
            defences away), "stock" (the distribution's), "other" (none of these: also the patched
            modules on a processor without EPTP switching), "built in" or "absent".
        elisa: Version of the ELISA interface; 0 without it.
        srcversion: What each loaded module's source hashes to; empty where its build did not
            record one, as Debian's does not.
        users: Processes that hold `/dev/kvm`, a VM or a vCPU open, as `name (pid)`.
        test_build: The further patches of a test build, by name and content; else empty.
    """

    state: str
    elisa: int
    srcversion: dict[str, str]
    users: list[str]
    test_build: str = ""


def status() -> Status:
    """Return which KVM the running kernel has; change nothing."""
    loaded = {name: _srcversion(name) for name in _LOADED_NAMES if _is_loaded(name)}
    version = elisa_version()
    further = _further_patches()
    if further:
        state = "test build"
    elif version:
        state = "patched"
    elif _is_built_in():
        state = "built in"
    elif "kvm" not in loaded:
        state = "absent"
    else:
        state = "stock" if loaded["kvm"] == _modinfo("srcversion", "kvm") else "other"
    return Status(state, version, loaded, describe_users(), further)


def elisa_version() -> int:
    """Return the version of the ELISA interface; 0 without the patch, VMFUNC or `/dev/kvm`.

    Source: KVM_CHECK_EXTENSION(KVM_CAP_ELISA), kernel-patches/README.md.
    """
    return check_extension(uapi.lib.KVM_CAP_ELISA)


def load(directory: Path | None = None, *, accept: weaknesses.Weak | None = None) -> list[str]:
    """Put the patched modules in place of whatever KVM is loaded.

    Args:
        directory: Holds `kvm.ko` and `kvm-intel.ko`; by default `$PYKVM_MODULES`, else what
            `pykvm.kernel.build.build` makes for the running kernel.
        accept: Weaknesses of the processor to accept, and no others; by default what patched
            modules that are loaded accept, else none.

    Returns:
        The parameters, as `module.name=value`, that the new modules did not take over.

    Raises:
        NotRootError, UnsupportedProcessorError, KvmBuiltInError, ModulesInUseError,
            ModulesMissingError: nothing changed.
        ModuleLoadError: the patched modules do not load; the distribution's are loaded.
        What `pykvm.kernel.build.build` raises: nothing changed.
    """
    _require_root()
    _require_processor()
    _require_modular()
    source = directory or _built_directory()
    _require_loadable(source)
    _require_idle()
    saved = _parameters()
    try:
        _unload()
        lost = _insert_with(saved, lambda arguments: _insert_patched(source, arguments))
        if not elisa_version():
            raise ModuleLoadError(
                "the patched KVM offers no EPTP switching on this processor", emulated_host()
            )
        if accept is not None:
            # A write of nothing at all would reach no module.
            weaknesses.PARAMETER.write_text(",".join(weaknesses.names_of(accept)) + "\n")
        return lost
    except ModuleLoadError as error:
        _back_to_stock(saved, error)
        raise ModuleLoadError(
            f"{error.problem}; the distribution's KVM is loaded again", error.next_step
        ) from error


def restore() -> list[str]:
    """Put the distribution's modules back; nothing happens where they are loaded already.

    Returns:
        As `load`.

    Raises:
        NotRootError, KvmBuiltInError, ModulesInUseError: nothing changed.
        ModuleLoadError: the distribution's modules do not load; the message says what is loaded.
    """
    _require_root()
    _require_modular()
    if status().state == "stock":
        return []
    _require_idle()
    saved = _parameters()
    try:
        _unload()
        return _insert_with(saved, _insert_stock)
    except ModuleLoadError as error:
        try:
            _insert_patched(_built_directory(), {})
        except PykvmError:
            raise ModuleLoadError(
                f"{error.problem}; no KVM is loaded now", _reinstall_kernel()
            ) from error
        raise ModuleLoadError(
            f"{error.problem}; the patched KVM is loaded again", error.next_step
        ) from error


def _require_root() -> None:
    if os.geteuid() != 0:
        raise NotRootError("only root may exchange kernel modules", again_as_root())


def _require_processor() -> None:
    processor = read_processor()
    if not processor.is_intel:
        what = f"a processor by {processor.vendor or 'an unknown maker'}, not an Intel one"
    elif not processor.has_vmx:
        what = "an Intel processor without VMX (off in the firmware, or not given to this VM)"
    else:
        return
    raise UnsupportedProcessorError(f"this is {what}", emulated_host())


def _require_modular() -> None:
    if _is_built_in():
        raise KvmBuiltInError(
            "KVM is built into the running kernel and cannot be exchanged",
            f"boot a distribution kernel, or {emulated_host()}",
        )


def _built_directory() -> Path:
    if given := os.environ.get("PYKVM_MODULES"):
        return Path(given)
    return kernel.build()


def _require_loadable(directory: Path) -> None:
    for module in kernel.MODULES:
        file = directory / f"{module}.ko"
        if not file.is_file():
            raise ModulesMissingError(f"no {file}", _other_modules())
        magic = _modinfo("vermagic", str(file)).split(" ")[0]
        if magic != platform.release():
            raise ModulesMissingError(
                f"{file} is for kernel {magic or 'unknown'}, not for {platform.release()}",
                _other_modules(),
            )


def _require_idle() -> None:
    for name in _LOADED_NAMES:
        if not _is_loaded(name):
            continue
        holders = {path.name for path in (_SYS_MODULE / name / "holders").iterdir()}
        if others := sorted(holders - {"kvm_intel"}):
            raise ModulesInUseError(
                f"module {name} is needed by {', '.join(others)}",
                as_root(f"modprobe -r {others[0]}"),
            )
        if int(_read(_SYS_MODULE / name / "refcnt") or 0) > len(holders):
            users = ", ".join(describe_users()) or "a process that cannot be seen from here"
            raise ModulesInUseError(f"KVM is in use by {users}", "end these virtual machines first")


def _insert_with(saved: _Parameters, insert: Callable[[_Parameters], None]) -> list[str]:
    """Load modules by `insert` and give them the parameters of `saved`; return what was lost."""
    insert({})
    arguments: _Parameters = {}
    for module, name, value in _differences(saved):
        if not _is_writable(module, name):
            arguments.setdefault(module, {})[name] = value
    if arguments:
        _unload()
        try:
            insert(arguments)
        except ModuleLoadError:  # not every value that can be read is taken as an argument
            _unload()
            insert({})
    for module, name, value in _differences(saved):
        if _is_writable(module, name):
            # What is refused shows up below.
            with contextlib.suppress(OSError):
                _parameter(module, name).write_text(value)
    return [f"{module}.{name}={value}" for module, name, value in _differences(saved)]


def _parameter(module: str, name: str) -> Path:
    return _SYS_MODULE / module / "parameters" / name


def _is_writable(module: str, name: str) -> bool:
    # By its mode: for root, access(2) says yes to everything.
    return bool(_parameter(module, name).stat().st_mode & 0o200)


def _differences(saved: _Parameters) -> list[tuple[str, str, str]]:
    now = _parameters()
    return [
        (module, name, value)
        for module, values in saved.items()
        for name, value in values.items()
        if name in now.get(module, {}) and now[module][name] != value
    ]


def _parameters() -> _Parameters:
    """The present parameters of the loaded modules, by module and name."""
    found: _Parameters = {}
    for module in _LOADED_NAMES:
        for path in (_SYS_MODULE / module / "parameters").glob("*"):
            if os.access(path, os.R_OK):
                found.setdefault(module, {})[path.name] = _read(path)
    return found


def _unload() -> None:
    for name in _LOADED_NAMES:
        if _is_loaded(name):
            _run("rmmod", name)


def _insert_patched(directory: Path, arguments: _Parameters) -> None:
    for module in kernel.MODULES:
        file = str(directory / f"{module}.ko")
        for needed in filter(None, _modinfo("depends", file).split(",")):
            if not _is_loaded(needed):
                _run("modprobe", needed)
        _run("insmod", file, *_as_arguments(arguments, module.replace("-", "_")))


def _insert_stock(arguments: _Parameters) -> None:
    for module in reversed(_LOADED_NAMES):
        _run("modprobe", module, *_as_arguments(arguments, module))


def _as_arguments(arguments: _Parameters, module: str) -> list[str]:
    return [f"{name}={value}" for name, value in arguments.get(module, {}).items()]


def _other_modules() -> str:
    """Return what to do where the modules of the named directory cannot be loaded."""
    return f"name the directory that this prints: {program()} kernel build"


def _reinstall_kernel() -> str:
    package = f"linux-image-{platform.release()}"
    step = install([package], "boot a kernel that Debian has", again=True)
    return f"{step}; then {as_root('modprobe kvm_intel')}"


def _back_to_stock(saved: _Parameters, cause: ModuleLoadError) -> None:
    try:
        _unload()
        _insert_with(saved, _insert_stock)
    except ModuleLoadError as error:
        raise ModuleLoadError(
            f"{cause.problem}; the distribution's KVM does not load either ({error.problem})",
            _reinstall_kernel(),
        ) from error


def _is_loaded(name: str) -> bool:
    # A part of the kernel itself has a directory too when it has parameters, but never this file.
    return (_SYS_MODULE / name / "refcnt").exists()


def _is_built_in() -> bool:
    return (_SYS_MODULE / "kvm").exists() and not _is_loaded("kvm")


def _srcversion(name: str) -> str:
    return _read(_SYS_MODULE / name / "srcversion")


def _further_patches() -> str:
    versions = (_read(_SYS_MODULE / name / "version") for name in _LOADED_NAMES)
    marked = [version for version in versions if version.startswith(kernel.TEST_BUILD)]
    return marked[0].removeprefix(kernel.TEST_BUILD) if marked else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _modinfo(field: str, module: str) -> str:
    """One field of a module, by file or by name; empty if there is no such module."""
    try:
        return _run("modinfo", "-F", field, module).strip()
    except ModuleLoadError:
        return ""


def _run(tool: str, *arguments: str) -> str:
    program = shutil.which(tool, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if program is None:
        raise ModuleLoadError(f"no program {tool}", install(["kmod"]))
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split()) or f"{tool} ended with status {done.returncode}"
    if re.search("rejected|not available|not permitted", said):
        step = "sign the modules, which Secure Boot wants, or switch it off in the firmware"
        raise ModuleLoadError(said, step)
    raise ModuleLoadError(said)

"""The root file system of the emulated host, made of Debian packages without installing them.

The tree is a merged-/usr Debian with Python, a C compiler and the project's third-party Python
packages, copied from the environment that runs us. No maintainer script runs; what little they
would have done that we need is done here. The result is an ext4 image, made without being root.
"""

import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.extras import install_step
from pykvm.host import debian_packages
from pykvm.host.advice import install

__all__ = [
    "PYTHON_PACKAGES",
    "RootfsError",
    "build_image",
    "fingerprint",
    "run_depmod",
]

# What the emulated host can run, besides what these depend on.
_DEBIAN_PACKAGES = (
    "bash",
    "binutils",
    "busybox-static",
    "coreutils",
    "dash",
    "diffutils",
    "findutils",
    "gcc",
    "lz4",
    "zstd",
    "grep",
    "e2fsprogs",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libc6-dev",
    "memcached",
    "mount",
    "procps",
    "python3",
    "sed",
    "tar",
    "util-linux",
)

# The server of a guest's root file system is a package since Debian 13. Before, it is in one whose
# other programs need half a desktop: it is taken out, with what it is linked with itself.
_FILE_SERVER = "virtiofsd"
_WITH_FILE_SERVER = "qemu-system-common"
_FILE_SERVER_PROGRAM = "usr/lib/qemu/virtiofsd"
_FILE_SERVER_NEEDS = ("libcap-ng0", "libglib2.0-bin", "libnuma1", "libseccomp2")

# Third-party Python packages that pykvm imports, and those that its tests do, which an
# installation need not have; what they require comes along.
PYTHON_PACKAGES = ("cffi", "psutil", "pyroute2")
_TEST_PACKAGES = ("hypothesis", "pytest")

# Parts of packages that only cost space and time here, as patterns.
_UNWANTED = (
    "boot",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "usr/lib/python3.*/idlelib",
    "usr/lib/python3.*/lib2to3/tests",
    "usr/lib/python3.*/test",
    "usr/lib/python3.*/tkinter",
    "usr/lib*/gcc/*/*/lto1",
    "usr/lib*/gcc/*/*/lto-wrapper",
)

_MERGED_USR = ("bin", "lib", "lib64", "sbin")
_MOUNT_POINTS = ("dev", "proc", "run", "sys", "tmp", "mnt", "media", "root", "payload", "oldroot")
# The environment's packages go inside, so Python inside has to be of the environment's version.
_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
_SITE_PACKAGES = f"usr/local/lib/{_PYTHON}/dist-packages"
_IMAGE_SLACK = 64 << 20
_CYLINDER = 16 * 63 * 512


class RootfsError(PykvmError):
    """The root file system cannot be made."""


def fingerprint() -> str:
    """A key that changes whenever the content of the root file system would.

    Raises:
        PackageError: apt cannot resolve the packages.
        RootfsError: a Python package is missing.
    """
    debian = [package.file for part in _packages() for package in part]
    python = [f"{dist.name} {dist.version}" for dist in _distributions()]
    return cache.key(Path(__file__), *debian, *python)


def build_image(image: Path, kernel: Path, version: str) -> None:
    """Write the ext4 `image`, with the modules of the unpacked `kernel` package of `version`.

    Raises:
        PackageError: a package cannot be fetched.
        RootfsError: a tool is missing or fails.
    """
    _require_debian_python()
    tree = image.with_suffix(".tree")
    try:
        _populate(tree, kernel, version)
        size = sum(_disk_usage(tree)) + _IMAGE_SLACK
        size = -(-size // _CYLINDER) * _CYLINDER
        with image.open("wb") as file:
            file.truncate(size)
        # No journal: nothing ever writes to it. Inodes for the tree, not for the size.
        features = ["-b", "4096", "-m", "0", "-O", "^has_journal,^resize_inode"]
        options = ["-q", "-F", "-t", "ext4", *features, "-E", "root_owner=0:0"]
        _run("mke2fs", *options, "-d", str(tree), str(image))
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def run_depmod(root: Path, version: str) -> None:
    """Write the module lists of kernel `version` below `root` (its `lib/modules`).

    Raises:
        RootfsError: depmod is missing or fails.
    """
    _run("depmod", "-b", str(root), version)


def _packages() -> tuple[list[debian_packages.Package], list[debian_packages.Package]]:
    """Return the packages that are unpacked, and those of which only the file server is."""
    if debian_packages.offers(_FILE_SERVER):
        return debian_packages.closure([*_DEBIAN_PACKAGES, _FILE_SERVER]), []
    server = debian_packages.closure([_WITH_FILE_SERVER])
    return debian_packages.closure([*_DEBIAN_PACKAGES, *_FILE_SERVER_NEEDS]), [
        package for package in server if package.file.startswith(f"{_WITH_FILE_SERVER}_")
    ]


def _require_debian_python() -> None:
    names = (package.file.partition("_")[0] for package in debian_packages.closure(["python3"]))
    offered = next((name for name in names if re.fullmatch(r"python3\.\d+", name)), "python3")
    if offered != _PYTHON:
        raise RootfsError(
            f"the emulated host has Debian's {offered}, this is {_PYTHON}",
            f"make the environment with /usr/bin/{offered}",
        )


def _populate(tree: Path, kernel: Path, version: str) -> None:
    for name in _MERGED_USR:
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    whole, parts = _packages()
    for archive in debian_packages.fetch(whole):
        debian_packages.unpack(archive, tree)
    for archive in debian_packages.fetch(parts):
        aside = tree / "aside"
        aside.mkdir()
        debian_packages.unpack(archive, aside)
        (tree / _FILE_SERVER_PROGRAM).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(aside / _FILE_SERVER_PROGRAM, tree / _FILE_SERVER_PROGRAM)
        shutil.rmtree(aside)
    for unwanted in (path for pattern in _UNWANTED for path in tree.glob(pattern)):
        if unwanted.is_dir():
            shutil.rmtree(unwanted)
        else:
            unwanted.unlink()
    for name in _MOUNT_POINTS:
        (tree / name).mkdir(exist_ok=True)
    modules = tree / "usr/lib/modules" / version
    shutil.copytree(kernel / "lib/modules" / version, modules, dirs_exist_ok=True)
    run_depmod(tree, version)
    (tree / "boot").mkdir()
    shutil.copy(kernel / "boot" / f"vmlinuz-{version}", tree / "boot")
    _write(tree / "etc/passwd", "root:x:0:0:root:/root:/bin/bash\n")
    _write(tree / "etc/group", "root:x:0:\ntty:x:5:\nkvm:x:103:\n")
    _write(tree / "etc/hostname", "testbed\n")
    _write(tree / "etc/hosts", "127.0.0.1 localhost testbed\n")
    _write(tree / "etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")
    (tree / "usr/bin/python").symlink_to("python3")
    _link_if_missing(tree / "usr/bin/sh", "dash")
    site = tree / _SITE_PACKAGES
    site.mkdir(parents=True)
    for distribution in _distributions():
        _copy_distribution(distribution, site)
    for directory in (f"usr/lib/{_PYTHON}", "usr/lib/python3", _SITE_PACKAGES):
        _compile(tree, directory)
    # /usr/sbin/ldconfig of Debian wants no configuration of ours: the default paths suffice.
    _run("ldconfig", "-r", str(tree), optional=True)


def _link_if_missing(path: Path, target: str) -> None:
    if not path.is_symlink():
        path.symlink_to(target)


def _compile(tree: Path, directory: str) -> None:
    # Debian compiles on installation. Unchecked: the files inside cannot change, and the time
    # stamps need not survive.
    command = [
        *(sys.executable, "-m", "compileall", "-q", "-j", "2"),
        *("--invalidation-mode", "unchecked-hash", "-s", str(tree), str(tree / directory)),
    ]
    # Some files of the standard library are not meant to compile (lib2to3's).
    subprocess.run(command, capture_output=True, check=False)


def _distributions() -> list[importlib.metadata.Distribution]:
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = [*PYTHON_PACKAGES, *(name for name in _TEST_PACKAGES if _is_installed(name))]
    while wanted:
        name = wanted.pop()
        if _canonical(name) in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise RootfsError(
                f"the Python package {name} is missing", install_step([name])
            ) from error
        found[_canonical(name)] = distribution
        for requirement in distribution.requires or []:
            if wanted_name := _unconditional(requirement):
                wanted.append(wanted_name)
    return [found[name] for name in sorted(found)]


def _unconditional(requirement: str) -> str | None:
    """The name in `requirement`, unless its marker restricts it to extras or other systems."""
    text, _, marker = requirement.partition(";")
    name = re.match(r"[A-Za-z0-9._-]+", text.strip())
    if name is None:
        return None
    if not marker.strip():
        return name[0]
    if "extra" in marker:
        return None
    # Conditional on Python or the system: take it where this environment has it.
    return name[0] if _is_installed(name[0]) else None


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _copy_distribution(distribution: importlib.metadata.Distribution, site: Path) -> None:
    origin = Path(str(distribution.locate_file(""))).resolve()
    scripts = Path(sysconfig.get_path("scripts")).resolve()
    for file in distribution.files or []:
        source = Path(str(distribution.locate_file(file))).resolve()
        if "__pycache__" in file.parts or not source.is_file() or source.is_relative_to(scripts):
            continue
        if source.is_relative_to(origin):
            target = site / source.relative_to(origin)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def _disk_usage(tree: Path) -> Iterator[int]:
    for directory, _, files in os.walk(tree):
        yield 4096 + 256
        for name in files:
            status = os.lstat(os.path.join(directory, name))
            yield 512 + (-(-status.st_size // 4096) * 4096 if stat.S_ISREG(status.st_mode) else 0)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _run(program: str, *arguments: str, optional: bool = False) -> None:
    # mke2fs, depmod and ldconfig live where an ordinary user's PATH may not reach.
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    environment = {**os.environ, "PATH": path}
    try:
        result = subprocess.run(
            [shutil.which(program, path=path) or program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            check=False,
        )
    except FileNotFoundError as error:
        package = {"mke2fs": "e2fsprogs", "depmod": "kmod"}.get(program, program)
        raise RootfsError(f"no program {program}", install([package])) from error
    if result.returncode and not optional:
        raise RootfsError(f"{program} failed: {(result.stderr or result.stdout).strip()[-300:]}")

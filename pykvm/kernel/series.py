"""The kernel series that there is a patch for, and the kernels of them that Debian has.

Where headers and source of one kernel are installed, they are used. Otherwise both are fetched
as packages and unpacked into the cache: installing the headers of a newer series would bring its
whole kernel along, and a boot menu entry for it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.host import debian_packages
from pykvm.host.commands import as_root
from pykvm.kernel import packages as kernel_packages

__all__ = [
    "SERIES",
    "HostKernel",
    "KernelMissingError",
    "SeriesUnknownError",
    "default_series",
    "find_kernel",
    "newest_kernel",
    "of_release",
    "offered_series",
    "packages_directory",
    "place",
]

SERIES = ("6.1", "6.12")
_PREFERRED = "6.1"

# Small, and everything that the emulated host needs is in it.
_FLAVOUR = "cloud-amd64"

# 6.1.0-56-cloud-amd64, 6.12.117+deb12-cloud-amd64: upstream version and Debian's count, flavour.
_RELEASE = re.compile(r"(?P<abi>(?P<series>\d+\.\d+)\.\d+(?:-\d+|\+\w+))-(?P<flavour>\S+)")


class KernelMissingError(PykvmError):
    """Debian has no kernel with matching headers and source, as far as this machine knows."""


class SeriesUnknownError(PykvmError):
    """There is no patch for this series."""


@dataclass(frozen=True)
class HostKernel:
    """One kernel of the distribution, with headers and source of the same version.

    Attributes:
        series: "6.1".
        release: What `uname -r` says on it, "6.1.0-56-cloud-amd64".
        package: Version of its Debian packages, "6.1.192-2".
        installed: Whether headers and source are installed, and need not be fetched.
    """

    series: str
    release: str
    package: str
    installed: bool


def offered_series() -> list[str]:
    """Return those of `SERIES` that this machine's Debian has a kernel of, oldest first."""
    return [series for series in SERIES if _newest(series)]


def default_series() -> str:
    """Return 6.1 where Debian has it, else the newest of `offered_series`."""
    offered = offered_series()
    return _PREFERRED if _PREFERRED in offered or not offered else offered[-1]


def newest_kernel(series: str | None = None) -> HostKernel:
    """Return the newest cloud kernel of `series`: an installed one if there is any, else apt's.

    series: one of `SERIES`; by default `default_series()`.

    Raises:
        SeriesUnknownError: `series` is none of `SERIES`.
        KernelMissingError: there is none.
    """
    series = series or default_series()
    if series not in SERIES:
        raise SeriesUnknownError(
            f"no KVM patch for Linux {series}", f"use one of: {', '.join(SERIES)}"
        )
    if found := _newest(series):
        return found
    offered = offered_series()
    raise KernelMissingError(
        f"Debian has no cloud kernel of the {series} series with headers and source of one "
        "version, as far as this machine knows",
        f"use the series {' or '.join(offered)}" if offered else as_root("apt-get update"),
    )


def _newest(series: str) -> HostKernel | None:
    for release in reversed(kernel_packages.installed_headers()):
        match = _RELEASE.fullmatch(release)
        if not match or match["series"] != series or match["flavour"] != _FLAVOUR:
            continue
        if package := _installed(release, series):
            return HostKernel(series, release, package, installed=True)
    known = (kernel for kernel in _known_to_apt(series) if kernel.release.endswith(f"-{_FLAVOUR}"))
    return next(known, None)


def of_release(release: str) -> str:
    """Return the series of a kernel by its `uname -r`, "6.1"; empty if that has no numbers."""
    match = re.match(r"\d+\.\d+", release)
    return match[0] if match else ""


def find_kernel(release: str) -> HostKernel | None:
    """Return the kernel `release`, if its headers and source are installed or apt has them."""
    match = _RELEASE.fullmatch(release)
    if match is None:
        return None
    series = match["series"]
    if package := _installed(release, series):
        return HostKernel(series, release, package, installed=True)
    known = (kernel for kernel in _known_to_apt(series) if kernel.release == release)
    return next(known, None)


def place(release: str) -> Path:
    """Return the directory with headers and source of `release`, fetched if need be.

    Of a kernel that neither this machine nor apt has, it is the one where they would be installed:
    what is missing there can be named.

    Raises:
        PackageError: see `packages_directory`.
    """
    kernel = find_kernel(release)
    return kernel_packages.SRC if kernel is None else packages_directory(kernel)


def packages_directory(kernel: HostKernel) -> Path:
    """Return a directory with the headers and the source of `kernel`, as `/usr/src` has them.

    Raises:
        PackageError: a package cannot be fetched.
    """
    if kernel.installed:
        return kernel_packages.SRC

    def build(directory: Path) -> None:
        names = _headers_of(kernel.release)
        names += [_kbuild(kernel.release, kernel.package), f"linux-source-{kernel.series}"]
        for name in names:
            package = debian_packages.exact(name, kernel.package)
            (archive,) = debian_packages.fetch([package])
            debian_packages.unpack(archive, directory)
            archive.unlink()  # the source is large, and nobody wants the archive again
        # One line that includes the Makefile of the part that all flavours share, by a path
        # that holds only where the packages are installed.
        makefile = directory / f"usr/src/linux-headers-{kernel.release}/Makefile"
        makefile.write_text(makefile.read_text().replace("include /usr/src/", "include ../"))

    key = cache.key("headers and source", kernel.release, kernel.package)
    return cache.entry("kernel-packages", key, build) / "usr/src"


def _installed(release: str, series: str) -> str:
    """Version of the installed packages of `release`; empty if one is missing or another's."""
    if release not in kernel_packages.installed_headers():
        return ""
    try:
        headers = kernel_packages.find_headers(release)
        source = kernel_packages.find_source(series)
    except PykvmError:
        return ""
    return headers.package if headers.package == source.package else ""


def _known_to_apt(series: str) -> list[HostKernel]:
    """Every kernel of `series` that apt has all packages of, newest first.

    Kept until the machine's package lists change, because asking apt takes a second.
    """

    def ask(directory: Path) -> None:
        found = [(each.release, each.package) for each in _ask_apt(series)]
        (directory / "kernels.json").write_text(json.dumps(found, indent=1))

    key = cache.key("kernels", series, debian_packages.lists_fingerprint(), Path(__file__))
    kept = cache.entry("kernel-lists", key, ask) / "kernels.json"
    rows = json.loads(kept.read_text())
    return [HostKernel(series, release, package, installed=False) for release, package in rows]


def _ask_apt(series: str) -> Iterator[HostKernel]:
    names = debian_packages.apt_cache("pkgnames", "linux-").split()
    headers = [name for name in names if name.startswith(f"linux-headers-{series}.")]
    releases = [name.removeprefix("linux-headers-") for name in headers]
    releases = [name for name in releases if _RELEASE.fullmatch(name) and "common" not in name]
    releases.sort(key=kernel_packages.by_number, reverse=True)
    source = f"linux-source-{series}"
    images = [name for name in names if name.startswith(f"linux-image-{series}.")]
    kbuilds = [name for name in names if name.startswith("linux-kbuild-")]
    versions = debian_packages.known_versions([*headers, *images, *kbuilds, source])
    for release in releases:
        for package in _newest_first(versions.get(f"linux-headers-{release}", set())):
            image = f"linux-image-{release}"
            alternatives = [
                *([name] for name in (*_headers_of(release), source)),
                [image, f"{image}-unsigned"],
                _kbuild_names(release),
            ]
            if all(
                any(package in versions.get(name, ()) for name in names) for names in alternatives
            ):
                yield HostKernel(series, release, package, installed=False)


def _headers_of(release: str) -> list[str]:
    shared = "common-rt" if "-rt-" in release else "common"
    return [f"linux-headers-{release}", f"linux-headers-{_abi(release)}-{shared}"]


def _kbuild_names(release: str) -> list[str]:
    # One for each version since Debian 13's kernels, one for the series before.
    abi = _abi(release)
    return [f"linux-kbuild-{abi}", f"linux-kbuild-{'.'.join(abi.split('.')[:2])}"]


def _kbuild(release: str, package: str) -> str:
    names = _kbuild_names(release)
    versions = debian_packages.known_versions(names)
    return next((name for name in names if package in versions.get(name, ())), names[0])


def _abi(release: str) -> str:
    match = _RELEASE.fullmatch(release)
    return match["abi"] if match else release


def _newest_first(versions: set[str]) -> list[str]:
    return sorted(versions, key=kernel_packages.by_number, reverse=True)

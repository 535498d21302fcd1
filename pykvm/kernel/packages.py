"""The distribution's kernel headers and source: where they are and whether they match.

Debian puts the headers of one kernel into `/usr/src/linux-headers-RELEASE` and the source of a
whole series into `/usr/src/linux-source-SERIES.tar.xz`. A module loads only if both come from one
version of the kernel, and last month's version may be gone from the archive.
"""

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from pykvm.errors import PykvmError
from pykvm.host import debian_packages
from pykvm.host.advice import install
from pykvm.host.commands import as_root, emulated_host, program
from pykvm.kernel.patch import patched_series

__all__ = [
    "SRC",
    "Headers",
    "HeadersMissingError",
    "KernelSourceMissingError",
    "Source",
    "VersionMismatchError",
    "by_number",
    "find_headers",
    "find_source",
    "installed_headers",
    "makefile_version",
    "require_match",
    "running_release",
]

SRC = Path("/usr/src")


class HeadersMissingError(PykvmError):
    """The headers of the wanted kernel are not installed."""


class KernelSourceMissingError(PykvmError):
    """The source of the wanted kernel series is not installed."""


class VersionMismatchError(PykvmError):
    """Headers and source are of different versions of the kernel."""


@dataclass(frozen=True)
class Headers:
    """The headers of one kernel.

    Attributes:
        release: What `uname -r` says on that kernel, `6.1.0-56-cloud-amd64`.
        path: The build directory for `make -C`.
        version: The upstream version, `6.1.192`.
        package: Version of the Debian package, `6.1.192-2`; empty where there is none.
        compiler: The compiler that the distribution built the kernel with, `gcc-12`; newer
            kernels name it with its target, `x86_64-linux-gnu-gcc-12`.
    """

    release: str
    path: Path
    version: str
    package: str
    compiler: str

    @property
    def series(self) -> str:
        """The kernel series, `6.1`."""
        return ".".join(self.version.split(".")[:2])


@dataclass(frozen=True)
class Source:
    """The source of one kernel series; `package` as in `Headers`."""

    series: str
    tarball: Path
    package: str


def running_release() -> str:
    """Return the release of the running kernel, as `uname -r` prints it."""
    return platform.release()


def installed_headers(src: Path = SRC) -> list[str]:
    """Return the releases whose headers are installed, newest last."""
    releases = [
        path.name.removeprefix("linux-headers-")
        for path in src.glob("linux-headers-*")
        if (path / ".config").is_file() and (path / "Module.symvers").is_file()
    ]
    return sorted(releases, key=by_number)


def find_headers(release: str | None = None, src: Path = SRC) -> Headers:
    """Return the headers of `release`, by default of the running kernel.

    Raises:
        HeadersMissingError: they are not installed, or not complete.
    """
    wanted = release or running_release()
    path = src / f"linux-headers-{wanted}"
    installed = installed_headers(src)
    if wanted not in installed:
        raise HeadersMissingError(
            f"no headers for kernel {wanted} in {src}", _headers_step(wanted, installed)
        )
    return Headers(
        release=wanted,
        path=path,
        version=makefile_version(_top_makefile(path)),
        package=_package_version(f"linux-headers-{wanted}", src),
        compiler=_compiler(path),
    )


def find_source(series: str, src: Path = SRC) -> Source:
    """Return the distribution's source of a kernel series such as `6.1`.

    Raises:
        KernelSourceMissingError: it is not installed.
    """
    tarball = src / f"linux-source-{series}.tar.xz"
    if not tarball.is_file():
        raise KernelSourceMissingError(
            f"no source of Linux {series} ({tarball})",
            install([f"linux-source-{series}"], emulated_host()),
        )
    return Source(series, tarball, _package_version(f"linux-source-{series}", src))


def require_match(headers: Headers, source: Source, source_version: str) -> None:
    """Check that source and headers are of one version.

    Args:
        source_version: What the Makefile inside the source says, `6.1.192`.

    Raises:
        VersionMismatchError: they are not.
    """
    packages = headers.package and source.package and headers.package != source.package
    if headers.version == source_version and not packages:
        return
    raise VersionMismatchError(
        f"headers of {headers.release} are version {headers.package or headers.version}, "
        f"linux-source-{source.series} is {source.package or source_version}",
        _newest_step([f"linux-source-{source.series}", _newest_headers(headers.release)]),
    )


def by_number(release: str) -> list[tuple[int, str]]:
    """Return a key to sort releases by: `6.1.0-9` before `6.1.0-10`."""
    return [(int(number or 0), text) for number, text in re.findall(r"(\d*)(\D*)", release)]


def _newest_step(packages: list[str]) -> str:
    if len(debian_packages.known_versions(packages)) < len(packages):
        return emulated_host()
    update, newest = as_root("apt-get update"), install(packages)
    return f"{update}, then {newest}, and boot that kernel if it runs here"


def _headers_step(release: str, installed: list[str]) -> str:
    """Return what to do without the headers of `release`, with those of `installed` at hand."""
    series = "|".join(map(re.escape, patched_series()))
    buildable = [each for each in installed if re.match(rf"(?:{series})\.", each)]
    if buildable:
        instead = f"build for a kernel that is here: {program()} kernel build --kernel "
        instead += buildable[-1]
    else:
        instead = f"boot a kernel that Debian has, or {emulated_host()}"
    return install([f"linux-headers-{release}"], instead)


def _package_version(package: str, src: Path) -> str:
    """Version of an installed Debian package; empty if there is none, or `src` is not its place."""
    return "" if src != SRC else debian_packages.installed_version(package) or ""


def _newest_headers(release: str) -> str:
    """The package that always depends on the newest headers of this kind of kernel."""
    if backported := re.match(r"(\d+\.\d+)\.\d+\+\w+-", release):
        # A series besides the distribution's own.
        return f"linux-headers-{backported[1]}-{release[backported.end() :]}"
    return "linux-headers-" + re.sub(r"^[\d.]+-\d+-", "", release)


def _top_makefile(headers: Path) -> Path:
    # Debian's is one line that includes the Makefile of the part that all flavours share.
    text = (headers / "Makefile").read_text()
    if included := re.search(r"^include (\S+)$", text, re.MULTILINE):
        return headers / included[1]
    return headers / "Makefile"


def makefile_version(makefile: Path) -> str:
    """Return the version in a kernel's top Makefile, "6.1.192"."""
    words = dict(re.findall(r"^(\w+) = (\d+)$", makefile.read_text(), re.MULTILINE))
    return ".".join(words.get(name, "0") for name in ("VERSION", "PATCHLEVEL", "SUBLEVEL"))


def _compiler(headers: Path) -> str:
    config = (headers / ".config").read_text()
    text = re.search(r'^CONFIG_CC_VERSION_TEXT="(\S+)', config, re.MULTILINE)
    return text[1] if text else "gcc"

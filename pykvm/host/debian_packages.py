"""Debian packages as files: resolved and fetched with apt, unpacked with dpkg-deb, never installed.

Nothing here touches the machine's own package database, and none of it needs to be root. The
downloaded files stay in the cache, so that a package is fetched once.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.host.commands import as_root

__all__ = [
    "Package",
    "PackageError",
    "apt_cache",
    "closure",
    "exact",
    "fetch",
    "has_lists",
    "installed_version",
    "known_versions",
    "lists_fingerprint",
    "offers",
    "unpack",
    "unpack_release",
]

_APT_LISTS = Path("/var/lib/apt/lists")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_URI_LINE = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+)")


class PackageError(PykvmError):
    """A Debian package cannot be found or fetched."""


@dataclass(frozen=True)
class Package:
    """One package file.

    Attributes:
        file: name of the .deb, version included.
        size: of the .deb, in bytes.
    """

    file: str
    size: int

    @property
    def spec(self) -> str:
        """Return `name=version`, as apt takes it."""
        name, version, _ = self.file.removesuffix(".deb").split("_")
        return f"{name}={version.replace('%3a', ':')}"


def closure(names: Iterable[str]) -> list[Package]:
    """Resolve `names` and all they depend on, as if nothing were installed.

    The answer is kept until the machine's package lists change, because asking apt takes a second.

    Raises:
        PackageError: apt knows no such package or cannot resolve it.
    """
    wanted = sorted(names)

    def resolve(directory: Path) -> None:
        empty = ["-o", "Dir::State::status=/dev/null", "-o", "APT::Install-Recommends=0"]
        found = _print_uris([*empty, "-y", "install", *wanted])
        rows = [(package.file, package.size) for package in found]
        (directory / "packages.json").write_text(json.dumps(rows, indent=1))

    key = cache.key("closure", *wanted, lists_fingerprint())
    kept = cache.entry("testbed-packages", key, resolve) / "packages.json"
    return [Package(file, size) for file, size in json.loads(kept.read_text())]


def offers(name: str) -> bool:
    """Return whether apt knows a package. The answer is kept as that of `closure` is."""

    def look(directory: Path) -> None:
        (directory / "versions").write_text(" ".join(known_versions([name]).get(name, ())))

    key = cache.key("offers", name, lists_fingerprint())
    return bool((cache.entry("testbed-packages", key, look) / "versions").read_text())


def exact(name: str, version: str) -> Package:
    """Return the package `name` in exactly this `version`, without its dependencies.

    Raises:
        PackageError: the package lists do not have it.
    """
    found = _print_uris(["download", f"{name}={version}"])
    if len(found) != 1:
        raise PackageError(f"apt has no {name} {version}", as_root("apt-get update"))
    return found[0]


def fetch(packages: Sequence[Package]) -> list[Path]:
    """Return the files of `packages`; download those that the cache lacks.

    Raises:
        PackageError: a download failed.
    """
    store = cache.directory("debs")
    with cache.full_disk_named(store), (store / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [package for package in packages if not _complete(store, package)]
        if missing:
            # `download` fetches into the current directory and checks the archive's hashes.
            specs = [package.spec for package in missing]
            result = _apt(["-o", "APT::Sandbox::User=root", "download", *specs], cwd=store)
            lost = [package.file for package in missing if not _complete(store, package)]
            if lost:
                raise PackageError(
                    f"apt-get could not download {', '.join(lost[:3])} "
                    f"({_last_line(result.stderr)})",
                    as_root("apt-get update"),
                )
        files = [store / package.file for package in packages]
        for file in files:
            # apt gives it the archive's time; pruning wants that of the last use.
            with contextlib.suppress(PermissionError):  # somebody else's
                os.utime(file)
    return files


def unpack(archive: Path, root: Path) -> None:
    """Unpack the files of the .deb `archive` below `root`, following the directory links there.

    Raises:
        PackageError: the archive cannot be read.
    """
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as source:
        # /bin, /lib and so on are links into /usr in our tree; tar would replace them.
        tar = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(root)]
        unpacked = subprocess.run(tar, stdin=source.stdout, capture_output=True, check=False)
    if source.returncode or unpacked.returncode:
        said = unpacked.stderr.decode(errors="replace")
        raise PackageError(f"cannot unpack {archive.name} ({_last_line(said)})")


def unpack_release(codename: str, names: Sequence[str], root: Path) -> list[Package]:
    """Unpack `names` and all they depend on, as another Debian release has them, below `root`.

    The machine's own package lists are left alone: apt gets lists of its own, from the archive
    that the machine's Debian comes from.

    Args:
        codename: of the release, such as "trixie".

    Returns:
        The packages, by file name.

    Raises:
        PackageError: the machine has no Debian archive, or a package cannot be fetched.
    """
    with tempfile.TemporaryDirectory(dir=root) as name:
        work = Path(name)
        for directory in ("lists/partial", "archives/partial", "sources"):
            (work / directory).mkdir(parents=True)
        (work / "sources" / "release.sources").write_text(
            f"Types: deb\nURIs: {_debian_archive()}\nSuites: {codename}\nComponents: main\n"
            f"Signed-By: {_KEYRING}\n"
        )
        settings = {
            "Dir::Etc::SourceList": "/dev/null",
            "Dir::Etc::SourceParts": work / "sources",
            "Dir::State::Lists": work / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache::archives": work / "archives",
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Acquire::Languages": "none",
            "APT::Install-Recommends": 0,
            "APT::Sandbox::User": "root",
            "APT::Update::Error-Mode": "any",
            "Debug::NoLocking": 1,
        }
        options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
        for command in (["update"], ["-y", "--download-only", "install", *names]):
            result = _apt([*options, *command])
            if result.returncode:
                reason = _last_line(result.stderr)
                raise PackageError(
                    f"cannot fetch {names[0]} of debian {codename} ({reason})",
                    as_root("apt-get update"),
                )
        archives = sorted((work / "archives").glob("*.deb"))
        for archive in archives:
            unpack(archive, root)
        return [Package(archive.name, archive.stat().st_size) for archive in archives]


def _debian_archive() -> str:
    """Return the URI of the archive that the machine's Debian comes from, by apt's lists."""
    main = ["Created-By: Packages", "Origin: Debian", "Label: Debian", "Component: main"]
    result = _apt(["indextargets", "--format", "$(REPO_URI)", *main])
    uris = result.stdout.split()
    if not uris:
        raise PackageError("apt knows no archive of debian", as_root("apt-get update"))
    return uris[0]


def installed_version(name: str) -> str | None:
    """Return the version of `name` that the machine has installed, or None."""
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", name]
    try:
        result = subprocess.run(
            query, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:  # no Debian
        return None
    status, _, version = result.stdout.partition(" ")
    return version if result.returncode == 0 and status == "installed" else None


def known_versions(names: Sequence[str]) -> dict[str, set[str]]:
    """Return the versions that apt could install of each package of `names`; no others' names."""
    found: dict[str, set[str]] = {}
    for line in apt_cache("madison", *names).splitlines():
        name, version, origin = (field.strip() for field in line.split("|", 2))
        if origin.endswith("Packages"):
            found.setdefault(name, set()).add(version)
    return found


def apt_cache(*arguments: str) -> str:
    """Return what apt-cache prints; nothing where there is no apt."""
    try:
        done = subprocess.run(
            ["apt-cache", *arguments], capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout


def has_lists() -> bool:
    """Return whether the machine has lists of packages, which `apt-get update` fetches."""
    return any(_APT_LISTS.glob("*_Packages*"))


def lists_fingerprint() -> str:
    """Return a text that changes whenever the machine's package lists do."""
    digest = hashlib.sha256()
    for file in sorted(_APT_LISTS.glob("*_*")):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _print_uris(arguments: list[str]) -> list[Package]:
    # apt leaves out what its archive directory holds already: give it an empty one.
    with tempfile.TemporaryDirectory() as empty:
        archives = ["-o", f"Dir::Cache::archives={empty}"]
        result = _apt(["-o", "Debug::NoLocking=1", *archives, "--print-uris", *arguments])
    if result.returncode:
        raise PackageError(f"apt-get: {_last_line(result.stderr)}", as_root("apt-get update"))
    matches = (_URI_LINE.match(line) for line in result.stdout.splitlines())
    return sorted(
        (Package(match["file"], int(match["size"])) for match in matches if match),
        key=lambda package: package.file,
    )


def _apt(arguments: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        ["apt-get", "-q", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def _complete(store: Path, package: Package) -> bool:
    file = store / package.file
    return file.is_file() and file.stat().st_size == package.size


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if not line.startswith("W:")]
    return lines[-1].removeprefix("E: ") if lines else "no message"

"""This machine's configuration for reaching package archives, copied into a fresh system.

It consists of apt's mirror and proxies, certificates of a local authority, pip's index, the
resolver's configuration, and the environment variables that name proxies and certificates. Settings
that only make a machine faster or different (a cache, a local directory of wheels, a constraint)
are not copied.
"""

import configparser
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from pykvm.errors import PykvmError

__all__ = ["MirrorError", "apt_options", "carry_in", "environment", "pip_settings", "sources"]

_APT_OPTION: Final = re.compile(
    r"Acquire::((http|https|ftp)(::.*)?|Check-.*|Retries|ForceIPv[46]) ", re.IGNORECASE
)
_PROXIES: Final = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
_CERTIFICATES: Final = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
)
_PIP_OPTIONS: Final = (
    *("index-url", "extra-index-url", "trusted-host", "proxy", "cert"),
    *("timeout", "default-timeout", "retries"),
)
_PIP_FILES: Final = ("/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")
_AUTHORITIES: Final = "usr/local/share/ca-certificates"
_RESOLVER: Final = ("etc/resolv.conf", "etc/hosts")


class MirrorError(PykvmError):
    """This machine's apt has no archive of Debian."""


def sources(code_name: str) -> list[str]:
    """Return the lines of sources.list for a release of Debian, from this machine's mirrors.

    Args:
        code_name: code name of the release, such as "bookworm".

    Raises:
        MirrorError: apt knows no archive of Debian on this machine.
    """
    wanted = "$(ORIGIN) $(LABEL) $(REPO_URI)"
    command = ["apt-get", "indextargets", "--format", wanted, "Created-By: Packages"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    mirrors: dict[str, str] = {}
    for line in done.stdout.splitlines():
        origin, label, *uri = line.split()
        if origin == "Debian" and uri:
            mirrors[label] = uri[0]
    if "Debian" not in mirrors:
        raise MirrorError(
            "apt knows no archive of Debian on this machine",
            "name one in /etc/apt/sources.list, then type: apt-get update",
        )
    lines = [
        f"deb {mirrors['Debian']} {suite} main" for suite in (code_name, f"{code_name}-updates")
    ]
    if security := mirrors.get("Debian-Security"):
        lines.append(f"deb {security} {code_name}-security main")
    return lines


def apt_options() -> list[str]:
    """Return the lines of this machine's apt configuration that concern the network."""
    command = ["apt-config", "dump", "--no-empty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if _APT_OPTION.match(line)]


def pip_settings(
    variables: Mapping[str, str], files: Iterable[Path] | None = None
) -> dict[str, str]:
    """Return this machine's pip options that concern the network, by name.

    Args:
        variables: environment variables, which override the configuration files.
        files: pip's configuration files; by default those of this machine.
    """
    found: dict[str, str] = {}
    for file in files or _pip_files(variables):
        parser = configparser.RawConfigParser()
        parser.read(file)
        for section in ("global", "install"):
            if parser.has_section(section):
                found.update(parser.items(section))
    for name, value in variables.items():
        if name.startswith("PIP_"):
            found[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    found = {name: " ".join(_remote(name, value)) for name, value in found.items()}
    return {name: found[name] for name in _PIP_OPTIONS if found.get(name)}


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables among `variables` that name proxies and certificates."""
    names = {*_PROXIES, *(name.upper() for name in _PROXIES), *_CERTIFICATES}
    return {name: value for name, value in variables.items() if name in names and value}


def carry_in(root: Path, variables: Mapping[str, str] = os.environ) -> None:
    """Copy this machine's configuration for reaching package archives into a system.

    Certificates of local authorities are only copied; update-ca-certificates has to run there.

    Args:
        root: root file system of the system.
        variables: environment variables of this machine.
    """
    for name in _RESOLVER:
        if Path("/", name).exists():
            (root / name).unlink(missing_ok=True)
            shutil.copyfile(Path("/", name), root / name)
    if Path("/", _AUTHORITIES).is_dir():
        shutil.copytree(Path("/", _AUTHORITIES), root / _AUTHORITIES, dirs_exist_ok=True)
    pip = pip_settings(variables)
    lines = ["[global]", *(f"{name} = {value}" for name, value in pip.items())]
    (root / "etc/pip.conf").write_text("".join(f"{line}\n" for line in lines))
    named = [*environment(variables).values(), pip.get("cert", "")]
    named += [line.split('"')[1] for line in apt_options() if "::Ca" in line.title()]
    for path in filter(os.path.isabs, named):
        _copy_missing(Path(path), root)


def _copy_missing(path: Path, root: Path) -> None:
    """Copy a file of certificates into the system at `root`, unless it has one there."""
    target = root / path.relative_to("/")
    if path.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _remote(option: str, value: str) -> list[str]:
    """Return the words of an option's value, without indexes that are local directories."""
    words = value.split()
    return [word for word in words if "index-url" not in option or re.match("https?://", word)]


def _pip_files(variables: Mapping[str, str]) -> Iterator[Path]:
    for name in (*_PIP_FILES, variables.get("PIP_CONFIG_FILE", "")):
        if name:
            yield Path(name).expanduser()

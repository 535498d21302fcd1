"""File system of a fresh machine: a minimal Debian with a clone of this checkout."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Final

from pykvm import cache
from pykvm.cache import pruning
from pykvm.errors import PykvmError
from pykvm.host import git
from pykvm.host.distribution import DEBIAN_RELEASES
from tools.fresh import mirrors

__all__ = ["FreshError", "base", "clone", "unpack"]

CHECKOUT: Final = Path(__file__).resolve().parents[2]

_PACKAGES: Final = "make,git,ca-certificates"
_KEPT_BASES: Final = 2


class FreshError(PykvmError):
    """The fresh system cannot be made."""


def base(debian: str, tell: Callable[[str], None]) -> Path:
    """Return the archive of a minimal Debian system; make it if the cache lacks today's.

    Args:
        debian: version of Debian, a key of `DEBIAN_RELEASES`.
        tell: called with a message at each step.

    Raises:
        FreshError: mmdebstrap cannot be installed, or fails.
    """
    lines = mirrors.sources(DEBIAN_RELEASES[debian])
    options = mirrors.apt_options()

    def build(directory: Path) -> None:
        _install_mmdebstrap(tell)
        tell(f"making a minimal Debian {debian} ({_PACKAGES}), once a day")
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={_PACKAGES}"]
        command += [f"--aptopt={option}" for option in options]
        command += [DEBIAN_RELEASES[debian], str(directory / "root.tar"), *lines]
        if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
            raise FreshError("mmdebstrap failed", "see what it says above")

    key = cache.key(debian, _PACKAGES, *lines, *options, date.today().isoformat())
    entry = cache.entry("fresh-bases", key, build)
    pruning.keep_newest(entry.parent, _KEPT_BASES)
    return entry / "root.tar"


def _install_mmdebstrap(tell: Callable[[str], None]) -> None:
    if shutil.which("mmdebstrap"):
        return
    tell("installing mmdebstrap")
    install = ["apt-get", "-q", "install", "-y", "--no-install-recommends", "mmdebstrap"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "-q", "update"], install):
        if subprocess.run(command, env=environment, check=False).returncode:
            raise FreshError("mmdebstrap cannot be installed", "type: apt-get install mmdebstrap")


def unpack(archive: Path, root: Path) -> None:
    """Unpack the archive of a system into the new directory `root`.

    Raises:
        FreshError: tar fails.
    """
    root.mkdir()
    command = ["tar", "--extract", "--numeric-owner", "--directory", str(root)]
    if subprocess.run([*command, "--file", str(archive)], check=False).returncode:
        raise FreshError(f"cannot unpack {archive.name}", "see what tar says above")


def clone(target: Path, tell: Callable[[str], None]) -> None:
    """Clone this checkout's HEAD, and warn about files that are not committed.

    Args:
        target: directory of the clone.
        tell: called with a message at each step.

    Raises:
        FreshError: a git command fails, for example because this is not a git checkout.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".gitconfig") as config:
        # The checkout may belong to another user. git's server side of a clone takes
        # safe.directory from configuration files only.
        config.write("[safe]\n\tdirectory = *\n")
        config.flush()
        environment = {**git.environment(), "GIT_CONFIG_GLOBAL": config.name}

        def run(*arguments: str) -> str:
            command = ["git", "-C", str(CHECKOUT), *arguments]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise FreshError(
                    f"git {arguments[0]}: {done.stderr.strip()}", "run this in a clone of pykvm"
                )
            return done.stdout

        changed = run("status", "--porcelain").splitlines()
        if changed:
            tell(
                f"WARNING: {len(changed)} changed or new files are not committed: not in the clone"
            )
        head = run("rev-parse", "HEAD").strip()
        tell(f"cloning {head[:12]}")
        run("clone", "--quiet", "--no-local", CHECKOUT.as_uri(), str(target))
        run("-C", str(target), "checkout", "--quiet", head)

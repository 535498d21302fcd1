"""Stand-in for apt: programs of its names that answer from files."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from pykvm.host import debian_packages

_APT_CACHE = """\
#!/bin/sh
echo $1 >> {log}
case $1 in
pkgnames) cut -d' ' -f1 {answer} | sort -u ;;
madison) shift; for name; do grep "^$name |" {answer}; done ;;
esac
exit 0
"""


def line(package: str, version: str = "1", kind: str = "Packages") -> str:
    """Return the line that `apt-cache madison` prints for one version of a package."""
    return f"{package} | {version} | http://mirror.example bookworm/main amd64 {kind}\n"


def offer(directory: Path, monkeypatch: pytest.MonkeyPatch, madison: str) -> Path:
    """Make apt offer what `madison` lists.

    Args:
        directory: receives the programs and the file "madison" with their answers.
        madison: the output of `apt-cache madison`.

    Returns:
        The file in which the programs log their arguments.
    """
    programs, lists = directory / "bin", directory / "lists"
    for each in (programs, lists):
        each.mkdir(exist_ok=True)
    answer, log = directory / "madison", directory / "asked"
    answer.write_text(madison)
    (lists / "mirror.example_Packages").touch()
    _program(programs / "apt-cache", _APT_CACHE.format(log=log, answer=answer))
    _program(programs / "apt-get", "#!/bin/sh\nexit 100\n")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(debian_packages, "_APT_LISTS", lists)
    return log


def offer_packages(
    directory: Path, monkeypatch: pytest.MonkeyPatch, packages: Iterable[str]
) -> None:
    """Make apt offer one version of each of `packages`."""
    offer(directory, monkeypatch, "".join(map(line, packages)))


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)

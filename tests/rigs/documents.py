"""Commands and code blocks that the documents show."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pykvm.resources import PACKAGE

ROOT: Final = PACKAGE.parent

_UNQUOTED_AND = re.compile(r' && (?=(?:[^"]*"[^"]*")*[^"]*$)')
_FENCED: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN: Final = re.compile(r"`([^`\n]+)`")

# Beginnings of lines and text spans that are commands for the reader to type.
_PROGRAMS: Final = r"(?:pykvm|make|python3?|pip|pipx)"
_TYPED: Final = re.compile(rf"(?:{_PROGRAMS}|apt-get|cd|curl|git|tar|tools/\S+|benchmarks/\S+)\b.*")
_MENTIONED: Final = re.compile(rf"{_PROGRAMS} .*")

# An installation needs no directory; in a checkout the programs are in .venv/bin.
_BEFORE: Final = re.compile(r"^(?:\$ )?(?:sudo )?(?:\.venv/bin/)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document, with its language and its text."""

    document: str
    language: str
    text: str


def documents() -> list[Path]:
    """Return every document of the checkout, in Markdown."""
    found = (path for pattern in ("*.md", "*/*.md") for path in ROOT.glob(pattern))
    return sorted(path for path in found if path.parent.name not in ("build", ".pytest_cache"))


def blocks() -> Iterator[Block]:
    """Yield every fenced block of every document."""
    for path in documents():
        for language, text in _FENCED.findall(path.read_text()):
            yield Block(str(path.relative_to(ROOT)), language, text)


def typed_commands() -> dict[str, str]:
    """Return every command that a document or a `--help` shows on a line of its own.

    Each command comes with the place that shows it first.
    """
    found: dict[str, str] = {}
    for path in documents():
        place, text = str(path.relative_to(ROOT)), path.read_text()
        lines = [
            line
            for language, body in _FENCED.findall(text)
            if language == "sh"
            for line in body.replace("\\\n", " ").splitlines()
        ]
        lines += re.findall(r"^ {4}(\S.*)$", _FENCED.sub("", text), re.MULTILINE)
        for line in lines:
            for part in _UNQUOTED_AND.split(line):
                if command := _command(part, _TYPED):
                    found.setdefault(command, place)
    for source in sorted((PACKAGE / "cli").glob("*.py")):
        for line in re.findall(r"^  (pykvm .*)$", source.read_text(), re.MULTILINE):
            found.setdefault(re.sub(r"\s{2,}\(.*\)$", "", line), f"{source.stem} --help")
    listing = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for line in listing.stdout.splitlines():
        if target := re.match(r"make \S+", line):
            found.setdefault(target[0], "make help")
    return found


def mentioned_commands() -> dict[str, str]:
    """Return the commands within text, each with the first document that mentions it."""
    found: dict[str, str] = {}
    for path in documents():
        for span in _SPAN.findall(_FENCED.sub("", path.read_text())):
            if command := _command(span, _MENTIONED):
                found.setdefault(command, str(path.relative_to(ROOT)))
    return found


def _command(text: str, form: re.Pattern[str]) -> str:
    """Return the command in `text` without its comment and its prefix; empty if there is none."""
    text = _BEFORE.sub("", text.partition(" #")[0].strip())
    return text if form.fullmatch(text) else ""

"""What one run brings into the emulated host: an ISO image with the checkout and the job.

Files keep their places, times and modes. Python sources come with compiled code, so that nothing
is compiled inside, where it would take long.
"""

import importlib.util
import json
import os
import py_compile
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pykvm import cache
from pykvm.errors import PykvmError

__all__ = ["Job", "PayloadError", "checkout_files", "module_files", "write", "write_modules"]

_JOB = Path(__file__).with_name("inside") / "job.py"
_LARGEST_ARTIFACT = 16 << 20  # bytes of one file below build/
_BUILT_KINDS = ("crossing", "object", "bare-guest")  # of cache entries that go inside
_CAPACITY = 640 << 20  # bytes of an image
_NEVER = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".hypothesis", ".pytest_cache"}


class PayloadError(PykvmError):
    """The checkout or the job cannot be packed."""


@dataclass(frozen=True)
class Job:
    """What to do inside.

    Attributes:
        task: "run" the command, or only "load modules" and wait for another job.
        command: program and arguments.
        checkout: root of the checkout; it has the same path inside.
        directory: where to run the command, inside the checkout.
        kvm: "payload" (modules that come along), "stock" or "none".
        environment: variables set besides the testbed's own.
        bring: paths relative to the checkout whose changes come back.
        interactive: on a terminal of its own, with input.
        size: rows and columns of the terminal.
        now: the wall clock inside at the start, seconds since 1970.
    """

    task: str
    command: list[str]
    checkout: str
    directory: str
    kvm: str
    environment: Mapping[str, str] = field(default_factory=dict)
    bring: list[str] = field(default_factory=lambda: ["build"])
    interactive: bool = False
    size: tuple[int, int] = (24, 80)
    now: int = 0


def write(image: Path, job: Job, modules: Path | None, stdin: bytes = b"") -> None:
    """Write the ISO `image` of `job` and its checkout, with the `modules` directory if given.

    The command's standard input will be `stdin`, unless the job is interactive.

    Raises:
        PayloadError: a module is missing, or xorriso is missing or fails.
    """
    checkout = Path(job.checkout)
    description = image.with_name("job.json")
    description.write_text(json.dumps(job.__dict__, default=dict))
    standard_input = image.with_name("stdin.data")
    standard_input.write_bytes(stdin)
    grafts = [("job.json", description), ("job.py", _JOB), ("stdin", standard_input)]
    if modules is not None:
        grafts += [(f"modules/{file.name}", file) for file in module_files(modules)]
    names = sorted(checkout_files(checkout))
    grafts += [(f"checkout/{name}", checkout / name) for name in names]
    for name in names:
        if name.endswith(".py"):
            compiled = _compiled(checkout / name)
            if compiled is not None:
                cached_name = importlib.util.cache_from_source(name)
                grafts.append((f"checkout/{cached_name}", compiled))
    grafts += _built_images()
    empty = image.with_name("empty")
    empty.mkdir(exist_ok=True)
    # Something must be there for the overlays even if there is no file at all.
    grafts += [("checkout", empty), ("cache", empty)]
    _make_iso(image, grafts)
    # The kernel inside keeps the size of the first disc: let all have the same.
    if image.stat().st_size > _CAPACITY:
        raise PayloadError(f"the checkout is too large for the testbed ({_CAPACITY >> 20} MiB)")
    os.truncate(image, _CAPACITY)


def write_modules(image: Path, modules: Path | None) -> None:
    """Write the ISO `image` of a job that loads `modules`, or the stock ones.

    Raises:
        PayloadError: see `write`.
    """
    with tempfile.TemporaryDirectory() as empty:
        kvm = "stock" if modules is None else "payload"
        job = Job("load modules", command=[], checkout=empty, directory=empty, kvm=kvm)
        write(image, job, modules)


def _built_images() -> list[tuple[str, Path]]:
    """Guests and objects that were compiled here already: inside, each would take seconds."""
    return [
        (f"cache/{path.relative_to(cache.root())}", path)
        for kind in _BUILT_KINDS
        for path in sorted((cache.root() / kind).glob("*/*"))
    ]


def module_files(modules: Path) -> list[Path]:
    """The two modules of KVM in the directory `modules`.

    Raises:
        PayloadError: one is missing.
    """
    files = [modules / "kvm.ko", modules / "kvm-intel.ko"]
    for file in files:
        if not file.is_file():
            raise PayloadError(f"{modules} has no {file.name}; run: pykvm kernel build")
    return files


def checkout_files(checkout: Path) -> set[str]:
    """The files of `checkout` that go inside, relative to it.

    These are git's (tracked, or new and not ignored; all files where git knows none), built
    extensions, what is below `build/`, and test modules as pytest compiled them.
    """
    names = set(_from_git(checkout) or _from_walk(checkout, checkout))
    names |= {str(p.relative_to(checkout)) for p in (checkout / "pykvm").glob("**/*.so")}
    names |= {
        str(p.relative_to(checkout))
        for p in (checkout / "tests").glob("**/__pycache__/*-pytest-*.pyc")
    }
    for name in _from_walk(checkout / "build", checkout):
        if (checkout / name).stat().st_size <= _LARGEST_ARTIFACT:
            names.add(name)
    return {name for name in names if (checkout / name).is_file()}


def _from_git(checkout: Path) -> list[str]:
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "-c", "-o", "--exclude-standard"]
    try:
        result = subprocess.run(command, cwd=checkout, capture_output=True, check=False)
    except FileNotFoundError:
        return []
    return [os.fsdecode(name) for name in result.stdout.split(b"\0") if name]


def _from_walk(top: Path, checkout: Path) -> Iterator[str]:
    for directory, directories, files in os.walk(top):
        directories[:] = [d for d in directories if d not in _NEVER and d != "__pycache__"]
        for name in files:
            yield str(Path(directory, name).relative_to(checkout))


def _compiled(source: Path) -> Path | None:
    """The code of `source`, compiled without a time stamp; None if it does not compile."""

    def build(directory: Path) -> None:
        py_compile.compile(
            str(source),
            cfile=str(directory / "code.pyc"),
            dfile=str(source),
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )

    magic = importlib.util.MAGIC_NUMBER
    try:
        entry = cache.entry("testbed-code", cache.key(magic, str(source), source), build)
    except py_compile.PyCompileError:
        return None  # running it will say so
    return entry / "code.pyc"


def _make_iso(image: Path, grafts: Iterable[tuple[str, Path]]) -> None:
    listing = image.with_name("payload.list")
    with listing.open("w") as file:
        for inside, outside in grafts:
            file.write(f"{_escaped(inside)}={_escaped(str(outside))}\n")
    options = ["-quiet", "-R", "-uid", "0", "-gid", "0", "-graft-points", "-path-list"]
    command = ["xorriso", "-as", "mkisofs", *options, str(listing), "-o", str(image)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise PayloadError("xorriso is missing; run: apt-get install xorriso") from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "FAILURE" in line]
        raise PayloadError(f"xorriso cannot pack the checkout: {(lines or ['no message'])[0]}")


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace("=", "\\=")

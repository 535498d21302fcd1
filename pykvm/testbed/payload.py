"""The payload of one run on the emulated host: an ISO image with a folder, pykvm, and the job.

Files keep their paths, times and modes. Python sources are accompanied by compiled code, because
the emulated host takes long to compile it.
"""

import importlib.metadata
import importlib.util
import json
import os
import py_compile
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.host.advice import install
from pykvm.host.commands import program
from pykvm.resources import CHECKOUT, DISTRIBUTION
from pykvm.testbed.folder import carried_files

__all__ = [
    "Job",
    "PayloadError",
    "module_files",
    "place_of_pykvm",
    "scripts_directory",
    "write",
    "write_modules",
]

_JOB = Path(__file__).with_name("inside") / "job.py"
_BUILT_KINDS = (
    "crossing",
    "object",
    "bare-guest",
    "guest-program",
)  # kinds of cache entries to carry in
_CAPACITY = 640 << 20  # bytes of an image
# Parts of a checkout that a copy of this pykvm consists of.
_OWN_PARTS = ("pykvm", "guest", "kernel-patches", "pyproject.toml")
_OWN_PLACE = "/payload/python"  # path of that copy on the emulated host


class PayloadError(PykvmError):
    """The folder or the job cannot be packed."""


@dataclass(frozen=True)
class Job:
    """Description of a job for the emulated host.

    Attributes:
        task: "run" to run the command; "load modules" to load KVM and wait for another job.
        command: program and arguments.
        folder: the folder whose files are carried in; it has the same path inside.
        directory: working directory of the command, in the folder.
        kvm: "payload" (the modules in the image), "stock" or "none".
        exact: whether the host counts instructions exactly.
        kvm_intel: parameters with which kvm-intel.ko is loaded.
        environment: environment variables in addition to the testbed's own.
        bring: paths, relative to the folder, whose changes are copied back.
        interactive: whether the command has a terminal and keyboard input.
        size: rows and columns of the terminal.
        now: wall clock inside at the start, in seconds since 1970.
        python: directory where Python inside finds pykvm (`place_of_pykvm`); empty if it needs
            none.
        scripts: directory of this virtual environment's programs, in which python, pykvm and
            pytest are available inside too; empty if there is none.
    """

    task: str
    command: list[str]
    folder: str
    directory: str
    kvm: str
    exact: bool = True
    kvm_intel: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    bring: list[str] = field(default_factory=lambda: ["build"])
    interactive: bool = False
    size: tuple[int, int] = (24, 80)
    now: int = 0
    python: str = ""
    scripts: str = ""


def write(image: Path, job: Job, modules: Path | None, stdin: bytes = b"") -> None:
    """Write the ISO image of a job.

    Args:
        image: path of the image; other files are created beside it.
        job: the job, whose folder is packed too.
        modules: directory of kvm.ko and kvm-intel.ko to pack, or None.
        stdin: content of the command's standard input, unless the job is interactive.

    Raises:
        PayloadError: a module is missing, xorriso is missing or fails, or the image is too large.
        FolderTooLargeError, FolderNameError: see `pykvm.testbed.folder.carried_files`.
    """
    folder = Path(job.folder)
    description = image.with_name("job.json")
    description.write_text(json.dumps(job.__dict__, default=dict))
    standard_input = image.with_name("stdin.data")
    standard_input.write_bytes(stdin)
    grafts = [("job.json", description), ("job.py", _JOB), ("stdin", standard_input)]
    if modules is not None:
        grafts += [(f"modules/{file.name}", file) for file in module_files(modules)]
    grafts += _with_code("folder", ((name, folder / name) for name in carried_files(folder)))
    if job.python == _OWN_PLACE:
        grafts += _with_code("python", _own_files())
    grafts += _built_images()
    empty = image.with_name("empty")
    empty.mkdir(exist_ok=True)
    # The overlays inside need these directories even if there is no file in them.
    grafts += [("folder", empty), ("cache", empty)]
    _make_iso(image, grafts)
    # The kernel inside does not notice a change of the disc's size: all images have the same.
    if image.stat().st_size > _CAPACITY:
        raise PayloadError(f"more than {_CAPACITY >> 20} MiB to carry in", "prune: pykvm cache")
    os.truncate(image, _CAPACITY)


def write_modules(image: Path, modules: Path | None, parameters: str = "") -> None:
    """Write the ISO image of a job that loads KVM.

    Args:
        image: path of the image.
        modules: directory of kvm.ko and kvm-intel.ko; None for the distribution's modules.
        parameters: of kvm-intel.ko.

    Raises:
        PayloadError: see `write`.
    """
    with tempfile.TemporaryDirectory() as empty:
        kvm = "stock" if modules is None else "payload"
        job = Job("load modules", [], folder=empty, directory=empty, kvm=kvm, kvm_intel=parameters)
        write(image, job, modules)


def place_of_pykvm(folder: Path) -> str:
    """Return the directory where Python on the emulated host finds pykvm.

    Args:
        folder: the folder that is carried in; pykvm's own checkout serves as the directory itself.
    """
    return str(folder) if folder == CHECKOUT else _OWN_PLACE


def scripts_directory() -> str:
    """Return the directory of this virtual environment's programs; "" outside of one."""
    return str(Path(sys.prefix, "bin")) if sys.prefix != sys.base_prefix else ""


def _own_files() -> Iterator[tuple[str, Path]]:
    """Yield the files of a copy of this pykvm: name in the copy, and path here."""
    if CHECKOUT is None:
        # Including the metadata, which hold the version.
        for file in importlib.metadata.distribution(DISTRIBUTION).files or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                yield str(file), Path(str(file.locate()))
        return
    for name in carried_files(CHECKOUT):
        if name.split("/")[0] in _OWN_PARTS:
            yield name, CHECKOUT / name


def _with_code(place: str, files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    """Yield `files` with their names below `place`, and the compiled code of Python sources."""
    for name, path in files:
        yield f"{place}/{name}", path
        if name.endswith(".py"):
            compiled = _compiled(path)
            if compiled is not None:
                yield f"{place}/{importlib.util.cache_from_source(name)}", compiled


def _built_images() -> list[tuple[str, Path]]:
    """Return the cached guests and objects; the emulated host would take seconds for each."""
    return [
        (f"cache/{path.relative_to(cache.root())}", path)
        for kind in _BUILT_KINDS
        for path in sorted((cache.root() / kind).glob("*/*"))
    ]


def module_files(modules: Path) -> list[Path]:
    """Return the paths of KVM's two modules in the directory `modules`.

    Raises:
        PayloadError: a module is missing.
    """
    files = [modules / "kvm.ko", modules / "kvm-intel.ko"]
    for file in files:
        if not file.is_file():
            raise PayloadError(
                f"{modules} has no {file.name}",
                f"name the directory that this prints: {program()} kernel build --series SERIES",
            )
    return files


def _compiled(source: Path) -> Path | None:
    """Return the compiled code of `source`, without a time stamp; None if it does not compile."""

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
        return None  # Python reports the error when it runs the source
    return entry / "code.pyc"


def _make_iso(image: Path, grafts: Iterable[tuple[str, Path]]) -> None:
    listing = image.with_name("payload.list")
    links: dict[Path, str] = {}
    with listing.open("wb") as file:  # names need not be valid UTF-8
        for inside, outside in grafts:
            place = _without_line_break(outside, image.parent, links)
            file.write(os.fsencode(f"{_escaped(inside)}={_escaped(place)}\n"))
    options = ["-quiet", "-R", "-uid", "0", "-gid", "0", "-graft-points", "-path-list"]
    command = ["xorriso", "-as", "mkisofs", *options, listing.name, "-o", image.name]
    try:
        result = subprocess.run(
            command, cwd=image.parent, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError as error:
        raise PayloadError("no program xorriso", install(["xorriso"])) from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "FAILURE" in line]
        raise PayloadError(f"xorriso cannot pack the files: {(lines or ['no message'])[0]}")


def _without_line_break(path: Path, directory: Path, links: dict[Path, str]) -> str:
    """Return a name of `path` that has no line break, as xorriso's list of files requires.

    If the path of its folder has one, the name leads through a link.

    Args:
        path: file to name.
        directory: directory in which links are made.
        links: links made so far, by the folder; a new one is added.
    """
    if "\n" not in str(path):
        return str(path)
    if path.parent not in links:
        links[path.parent] = f"parent{len(links)}"
        (directory / links[path.parent]).symlink_to(path.parent)
    return f"{links[path.parent]}/{path.name}"


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace("=", "\\=")

"""The KVM patch: source files of its own, one copy for all series, and a series' hooks.

`kernel-patches/files` holds the new files where the kernel's tree will have them;
`kernel-patches/linux-SERIES.patch` holds what changes in KVM's own files.
"""

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pykvm.errors import PykvmError
from pykvm.host.commands import emulated_host, program
from pykvm.kernel import make as kernel_make
from pykvm.resources import KERNEL_PATCHES

__all__ = [
    "FurtherPatchError",
    "Patch",
    "PatchConflictError",
    "PatchMissingError",
    "apply",
    "apply_further",
    "changed_files",
    "complete",
    "conflict",
    "find_patch",
    "patched_series",
    "read_further",
]


class PatchMissingError(PykvmError):
    """There is no patch for this kernel series."""


class PatchConflictError(PykvmError):
    """The patch does not apply to the distribution's source."""


class FurtherPatchError(PykvmError):
    """A patch for a test build cannot be read, or does not apply on top of the others."""


@dataclass(frozen=True)
class Patch:
    """The patch of one kernel series.

    Attributes:
        series: "6.1".
        hooks: The file with the changes to the kernel's own files.
        files: The new files by their paths in the kernel's tree, sorted.
    """

    series: str
    hooks: Path
    files: dict[str, Path]

    def key_parts(self) -> list[str | Path]:
        """Return all that decides the patched source, for `pykvm.cache.key`."""
        return [self.hooks, *(part for item in self.files.items() for part in item)]


def patched_series(directory: Path | None = None) -> list[str]:
    """Return the kernel series that there is a patch for, as text sorts them."""
    found = (directory or KERNEL_PATCHES).glob("linux-*.patch")
    return sorted(path.stem.removeprefix("linux-") for path in found)


def find_patch(series: str, directory: Path | None = None) -> Patch:
    """Return the patch for a kernel series such as "6.1".

    Raises:
        PatchMissingError: there is none.
    """
    directory = directory or KERNEL_PATCHES
    hooks = directory / f"linux-{series}.patch"
    if not hooks.is_file():
        have = ", ".join(patched_series(directory)) or "none"
        raise PatchMissingError(
            f"no KVM patch for Linux {series}, only for: {have}",
            f"boot a kernel of such a series, or {emulated_host()}",
        )
    top = directory / "files"
    files = sorted(path for path in top.rglob("*") if path.is_file())
    return Patch(series, hooks, {path.relative_to(top).as_posix(): path for path in files})


def complete(patch: Patch) -> str:
    """Return hooks and new files as one patch, in the form and order of `git diff`."""
    message, *changes = re.split(r"^(?=diff --git )", patch.hooks.read_text(), flags=re.MULTILINE)
    sections = {_path_of(change): change for change in changes}
    sections |= {name: _addition(name, path.read_text()) for name, path in patch.files.items()}
    return message + "".join(sections[name] for name in sorted(sections))


def changed_files(patches: Sequence[Path]) -> set[str]:
    """Return the files that `patches` change and that none of them makes."""
    changed: set[str] = set()
    made: set[str] = set()
    for patch in patches:
        text = patch.read_text()
        changed.update(re.findall(r"^--- a/(\S+)", text, re.MULTILINE))
        made.update(re.findall(r"^--- /dev/null\n\+\+\+ b/(\S+)", text, re.MULTILINE))
    return changed - made


def apply(patch: Patch, tree: Path, log: Path) -> None:
    """Add the new files to the kernel source in `tree`, and the hooks to its files.

    Raises:
        PatchConflictError: the source has such a file already, or the hooks do not apply.
    """
    for name, path in patch.files.items():
        target = tree / name
        if target.exists():
            raise conflict(patch, f"the source has a file {name} of its own")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if not _applies(patch.hooks, tree, log):
        raise conflict(patch, f"see {log}")


def conflict(patch: Patch, reason: str) -> PatchConflictError:
    """Return the error for a source that the patch does not fit."""
    return PatchConflictError(
        f"{patch.hooks.name} does not apply to the distribution's source ({reason})",
        f"update pykvm; {KERNEL_PATCHES / 'README.md'} names the versions that it was tried with",
    )


def read_further(patch: Path) -> Path:
    """Return `patch`, a file for a test build, if it can be read.

    Raises:
        FurtherPatchError: it cannot.
    """
    try:
        patch.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise FurtherPatchError(
            f"cannot read the patch {patch} ({reason})", "name a file with --also"
        ) from error
    return patch


def apply_further(patches: Sequence[Path], tree: Path, log: Path) -> None:
    """Apply the patches of a test build to the patched source in `tree`.

    Raises:
        FurtherPatchError: one does not apply.
    """
    for patch in patches:
        if not _applies(patch, tree, log):
            raise FurtherPatchError(
                f"{patch} does not apply on top of pykvm's patch{_first_reject(log)}, see {log}",
                f"make it against that patch: {program()} kernel patch",
            )


def _applies(patch: Path, tree: Path, log: Path) -> bool:
    # Where lines have moved, patch would leave the originals beside the changed files.
    command = ["patch", "-p1", "--batch", "--forward", "--no-backup-if-mismatch"]
    command += ["-i", str(patch.resolve())]
    return kernel_make.run(command, tree, log) == 0


def _path_of(change: str) -> str:
    return change.split("\n", 1)[0].rpartition(" b/")[2]


def _addition(name: str, text: str) -> str:
    content = text.encode()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # git's name for it
    lines = text.removesuffix("\n").split("\n")
    return (
        f"diff --git a/{name} b/{name}\nnew file mode 100644\nindex 0000000..{blob[:7]}\n"
        f"--- /dev/null\n+++ b/{name}\n@@ -0,0 +1,{len(lines)} @@\n"
        + "".join(f"+{line}\n" for line in lines)
    )


def _first_reject(log: Path) -> str:
    file = ""
    for line in log.read_text(errors="replace").splitlines():
        if named := re.match(r"patching file (\S+)|can't find file to patch", line):
            file = named[1] or ""
        elif failed := re.match(r"Hunk #\d+ FAILED at \d+", line):
            return f" ({file}: {failed[0]})"
    return ""

"""KVM's part of the distribution's kernel source, unpacked into the cache."""

import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.host.advice import install
from pykvm.kernel import make as kernel_make
from pykvm.kernel.packages import Source
from pykvm.kernel.patch import FurtherPatchError, Patch, changed_files, conflict

__all__ = ["UnpackError", "fetch_again", "unpack"]

# Unpacked besides the files that the patch changes. Headers here come before the
# distribution's, so nothing but KVM's own belongs in the list.
_UNPACKED = (
    "Makefile",
    "arch/x86/kvm",
    "virt/kvm",
    "include/linux/kvm_*.h",
    "include/uapi/linux/kvm*.h",
    "arch/x86/include/asm/kvm*.h",
    "arch/x86/include/uapi/asm/kvm*.h",
)


class UnpackError(PykvmError):
    """The source cannot be unpacked."""


def fetch_again(source: Source) -> str:
    """Return the step for a source that cannot be read: a new copy from where it came from."""
    if source.tarball.is_relative_to(cache.root()):
        place = source.tarball.relative_to(cache.root())
        return f"rm -r {shlex.quote(str(cache.root().joinpath(*place.parts[:2])))}, and try again"
    return install([f"linux-source-{source.series}"], again=True)


def unpack(source: Source, patch: Patch | None, further: Sequence[Path] = ()) -> Path:
    """Return KVM's part of `source`, and what the patches change besides, as a cache entry.

    Raises:
        PatchConflictError, FurtherPatchError: a patch changes a file that is not there.
        UnpackError: the archive cannot be read.
    """
    own = set() if patch is None else changed_files([patch.hooks])
    made = set() if patch is None else set(patch.files)
    patterns = [*_UNPACKED, *(f"{name}/*" for name in _UNPACKED)]
    # tar fails on a name that an earlier pattern has already used up.
    besides = {
        path
        for path in (own | changed_files(further)) - made
        if not any(fnmatch(path, pattern) for pattern in patterns)
    }
    members = sorted({*_UNPACKED, *besides})
    stat = source.tarball.stat()
    key = cache.key(source.package, stat.st_size, stat.st_mtime_ns, *members)

    def extract(out: Path) -> None:
        top = f"linux-source-{source.series}"
        command = ["tar", "--force-local", "-xJf", str(source.tarball), "-C", str(out)]
        command += ["--strip-components=1", "--wildcards"]
        command += [f"{top}/{member}" for member in members]
        log = cache.log_path("kernel-unpack")
        log.write_text("")
        if kernel_make.run(command, out, log) == 0:
            return
        for absent in re.findall(rf"{top}/(\S+): Not found in archive", log.read_text()):
            if patch is not None and absent in own:
                raise conflict(patch, f"it has no {absent}")
            for each in further:
                if absent in changed_files([each]):
                    raise FurtherPatchError(
                        f"{each} changes {absent}, which Linux {source.series} has not",
                        "make it against that series",
                    )
        raise UnpackError(
            f"cannot unpack {source.tarball}, see {log}",
            fetch_again(source),
        )

    return cache.entry("linux-source", key, extract)

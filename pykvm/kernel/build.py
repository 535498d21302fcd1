"""Build the patched KVM modules out of tree, from the distribution's source and headers.

Only `arch/x86/kvm`, `virt/kvm` and the headers that belong to KVM are unpacked and patched; the
rest of the kernel is the distribution's headers package, so the modules load into its unmodified
kernel. The result is cached by everything that goes into it.
"""

import os
import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.kernel import make as kernel_make
from pykvm.kernel.packages import (
    Headers,
    Source,
    find_headers,
    find_source,
    makefile_version,
    require_match,
    running_release,
)
from pykvm.kernel.series import place

__all__ = [
    "MODULES",
    "TEST_BUILD",
    "CompileFailed",
    "FurtherPatchFailed",
    "PatchFailed",
    "PatchMissing",
    "ToolMissing",
    "build",
    "find_patch",
    "patches_directory",
]

# In the order in which they are loaded.
MODULES = ("kvm", "kvm-intel")

# What is unpacked besides the files that the patch names. Headers here come before the
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

# A file named Kbuild comes before the Makefile beside it, which stays as upstream wrote it and
# the patch left it. That Makefile names its parts by $(srctree), which in a build against headers
# is the headers; hence the exchange. An assignment here beats the environment through which the
# top Makefile hands LINUXINCLUDE down. trace.h is found by "../../arch/x86/kvm" from
# include/uapi.
_KBUILD = """\
headers_srctree := $(srctree)
srctree := $(kvm_tree)
LINUXINCLUDE := -I$(kvm_tree)/arch/x86/include -I$(kvm_tree)/include \\
	-I$(kvm_tree)/arch/x86/include/uapi -I$(kvm_tree)/include/uapi $(LINUXINCLUDE)
ccflags-y += -fmacro-prefix-map=$(kvm_tree)/=
include $(kvm_tree)/arch/x86/kvm/Makefile
srctree := $(headers_srctree)
"""

# How the version of a module starts that was built with further patches; the distribution's and
# the patched ones have no version. With it, the sources of both and so the source versions differ.
TEST_BUILD = "test build: "
_MAIN_SOURCES = ("virt/kvm/kvm_main.c", "arch/x86/kvm/vmx/vmx.c")

# No kvm-amd; no debug information, which would be ten times the code; a source version, by which
# a loaded module can be told from another.
_MAKE_VARIABLES = (
    "CONFIG_KVM_AMD=",
    "CONFIG_DEBUG_INFO=",
    "CONFIG_DEBUG_INFO_BTF_MODULES=",
    "CONFIG_MODULE_SRCVERSION_ALL=y",
)


class PatchMissing(PykvmError):
    """There is no patch for this kernel series."""


class PatchFailed(PykvmError):
    """The patch does not apply to the distribution's source."""


class FurtherPatchFailed(PykvmError):
    """A patch for a test build cannot be read, or does not apply on top of the others."""


class ToolMissing(PykvmError):
    """A program that the build needs is not installed."""


class CompileFailed(PykvmError):
    """The modules do not compile, or the source cannot be unpacked."""


def build(
    release: str | None = None,
    *,
    patched: bool = True,
    also: Sequence[Path] = (),
    src: Path | None = None,
    patches: Path | None = None,
) -> Path:
    """Build `kvm.ko` and `kvm-intel.ko` for a kernel; return the directory that holds them.

    Args:
        release: As `uname -r` says it; by default the running kernel's.
        patched: Without, the distribution's own modules come out, built by the same recipe.
        also: Patches to apply on top, for a test build; its modules carry a version that says so.
        src: Where the distribution's headers and source are; by default where they are installed,
            else they are fetched if apt has them.
        patches: Where the patches are; by default `kernel-patches` of this checkout.

    Raises:
        HeadersMissing, SourceMissing, VersionMismatch: see `pykvm.kernel.packages`.
        PatchMissing, PatchFailed, FurtherPatchFailed, ToolMissing, CompileFailed: as their names
            say.
        PackageError: the packages cannot be fetched.
    """
    release = release or running_release()
    src = src or place(release)
    headers = find_headers(release, src)
    series = [find_patch(headers.series, patches)] if patched else []
    further = [_readable(patch) for patch in also]
    source = find_source(headers.series, src)
    _require_tools(headers)
    tree = _unpack(source, [*series, *further])
    require_match(headers, source, makefile_version(tree / "Makefile"))
    key = cache.key(
        tree.name,
        *series,
        *(item for patch in further for item in (patch.name, patch)),
        headers.release,
        headers.package,
        headers.path / ".config",
        headers.path / "Module.symvers",
        _KBUILD,
        *_MAKE_VARIABLES,
    )
    return cache.entry("modules", key, lambda out: _build_into(out, tree, headers, series, further))


def patches_directory() -> Path:
    """`kernel-patches` of this checkout."""
    return Path(__file__).resolve().parents[2] / "kernel-patches"


def find_patch(series: str, patches: Path | None = None) -> Path:
    """The patch for a kernel series such as `6.1`.

    Raises:
        PatchMissing: there is none.
    """
    directory = patches or patches_directory()
    patch = directory / f"linux-{series}.patch"
    if patch.is_file():
        return patch
    have = ", ".join(
        path.stem.removeprefix("linux-") for path in sorted(directory.glob("linux-*.patch"))
    )
    raise PatchMissing(
        f"no KVM patch for Linux {series}, only for: {have or 'none'}; boot a kernel of such a "
        "series, or use the emulated host: pykvm testbed -- COMMAND"
    )


def _require_tools(headers: Headers) -> None:
    packages = {
        "make": "make",
        "tar": "tar",
        "xz": "xz-utils",
        "patch": "patch",
        headers.compiler: re.sub(r"^.*-(?=gcc)", "", headers.compiler),
    }
    missing = {tool: package for tool, package in packages.items() if not shutil.which(tool)}
    if missing:
        raise ToolMissing(
            f"the kernel build needs {', '.join(missing)}; "
            f"type: apt-get install --no-install-recommends {' '.join(missing.values())}"
        )


def _readable(patch: Path) -> Path:
    try:
        patch.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise FurtherPatchFailed(
            f"cannot read the patch {patch} ({reason}); name a file with --also"
        ) from error
    return patch


def _unpack(source: Source, patches: list[Path]) -> Path:
    """KVM's part of the source, as a cache entry; reading the whole archive takes seconds."""
    members = sorted({*_UNPACKED, *_changed_files(patches)})
    stat = source.tarball.stat()
    key = cache.key(source.package, stat.st_size, stat.st_mtime_ns, *members)

    def unpack(out: Path) -> None:
        top = f"linux-source-{source.series}"
        command = ["tar", "-xJf", str(source.tarball), "-C", str(out), "--strip-components=1"]
        command += ["--wildcards", *(f"{top}/{member}" for member in members)]
        log = cache.log_path("kernel-unpack")
        log.write_text("")
        if kernel_make.run(command, out, log) != 0:
            if patches and "Not found in archive" in log.read_text():
                raise _does_not_apply(patches[0], log)
            raise CompileFailed(
                f"cannot unpack {source.tarball}, see {log}; "
                f"type: apt-get install --reinstall linux-source-{source.series}"
            )

    return cache.entry("linux-source", key, unpack)


def _changed_files(patches: list[Path]) -> set[str]:
    """Files of the original tree that `patches` change and `_UNPACKED` does not cover."""
    changed: set[str] = set()
    made: set[str] = set()
    for patch in patches:
        text = patch.read_text()
        changed.update(re.findall(r"^--- a/(\S+)", text, re.MULTILINE))
        made.update(re.findall(r"^--- /dev/null\n\+\+\+ b/(\S+)", text, re.MULTILINE))
    patterns = [*_UNPACKED, *(f"{name}/*" for name in _UNPACKED)]
    # tar fails on a name that an earlier pattern has already used up.
    return {path for path in changed - made if not any(fnmatch(path, one) for one in patterns)}


def _build_into(
    out: Path, tree: Path, headers: Headers, series: list[Path], further: list[Path]
) -> None:
    log = cache.log_path(f"kernel-build-{headers.release}")
    log.write_text("")
    # Inside `out`, so that the cache removes it whatever happens to this process.
    work = out / "tree"
    shutil.copytree(tree, work)
    for patch in series:
        if not _applies(patch, work, log):
            raise _does_not_apply(patch, log)
    for patch in further:
        if not _applies(patch, work, log):
            raise FurtherPatchFailed(
                f"{patch} does not apply on top of the patch of Linux {headers.series}"
                f"{_first_reject(log)}; read {log}, and make it against that patch"
            )
    if further:
        _mark_as_test_build(work, further)
    kvm = work / "arch/x86/kvm"
    (kvm / "Kbuild").write_text(_KBUILD)
    (work / "include/uapi").mkdir(parents=True, exist_ok=True)
    jobs = len(os.sched_getaffinity(0))
    command = ["make", "-C", str(headers.path), f"M={kvm}", f"kvm_tree={work}"]
    command += [*_MAKE_VARIABLES, f"-j{jobs}", "modules"]
    if kernel_make.run(command, work, log) != 0:
        raise CompileFailed(
            f"the KVM modules for {headers.release} do not compile{_first_error(log)}; read {log}"
        )
    for module in MODULES:
        shutil.copy2(kvm / f"{module}.ko", out)
    shutil.rmtree(work)
    shutil.copy2(log, out / "build.log")


def _applies(patch: Path, work: Path, log: Path) -> bool:
    command = ["patch", "-p1", "--batch", "--forward", "-i", str(patch.resolve())]
    return kernel_make.run(command, work, log) == 0


def _mark_as_test_build(work: Path, patches: list[Path]) -> None:
    names = ", ".join(f"{patch.name} {cache.key(patch)[:8]}" for patch in patches)
    text = (TEST_BUILD + names).replace("\\", "").replace('"', "")
    for source in _MAIN_SOURCES:
        with (work / source).open("a") as file:
            file.write(f'\nMODULE_VERSION("{text}");\n')


def _does_not_apply(patch: Path, log: Path) -> PatchFailed:
    return PatchFailed(
        f"{patch.name} does not apply to the distribution's source, see {log}; "
        "update pykvm, or install the kernel version named in kernel-patches/README.md"
    )


def _first_error(log: Path) -> str:
    found = re.search(r"\b(?:fatal )?error: (.+)", log.read_text(errors="replace"))
    return f" ({found[1]})" if found else ""


def _first_reject(log: Path) -> str:
    file = ""
    for line in log.read_text(errors="replace").splitlines():
        if named := re.match(r"patching file (\S+)|can't find file to patch", line):
            file = named[1] or ""
        elif failed := re.match(r"Hunk #\d+ FAILED at \d+", line):
            return f" ({file}: {failed[0]})"
    return ""

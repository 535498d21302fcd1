"""Build the patched KVM modules out of tree, from the distribution's source and headers.

Only `arch/x86/kvm`, `virt/kvm` and the headers that belong to KVM are unpacked and patched; the
rest of the kernel is the distribution's headers package, so the modules load into its unmodified
kernel. The result is cached by everything that goes into it.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.host.advice import install
from pykvm.kernel import make as kernel_make
from pykvm.kernel.packages import (
    Headers,
    find_headers,
    find_source,
    makefile_version,
    require_match,
    running_release,
)
from pykvm.kernel.patch import Patch, apply, apply_further, find_patch, read_further
from pykvm.kernel.plain_place import copy_in_plain_place, plain_directory
from pykvm.kernel.series import of_release, place
from pykvm.kernel.source_tree import unpack

__all__ = [
    "MODULES",
    "TEST_BUILD",
    "ModuleBuildError",
    "ToolMissingError",
    "build",
]

# In the order in which they are loaded.
MODULES = ("kvm", "kvm-intel")

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


class ToolMissingError(PykvmError):
    """A program that the build needs is not installed."""


class ModuleBuildError(PykvmError):
    """The modules do not compile."""


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
        HeadersMissingError, KernelSourceMissingError, VersionMismatchError: see
            `pykvm.kernel.packages`.
        PatchMissingError, PatchConflictError, FurtherPatchError: see `pykvm.kernel.patch`.
        UnpackError: the source cannot be unpacked.
        ToolMissingError, ModuleBuildError: as their names say.
        PlaceError: see `pykvm.kernel.plain_place`.
        PackageError: the packages cannot be fetched.
    """
    release = release or running_release()
    if patched and (series := of_release(release)):
        find_patch(series, patches)  # before anything is fetched
    src = src or place(release)
    headers = find_headers(release, src)
    patch = find_patch(headers.series, patches) if patched else None
    further = [read_further(each) for each in also]
    source = find_source(headers.series, src)
    _require_tools(headers)
    tree = unpack(source, patch, further)
    require_match(headers, source, makefile_version(tree / "Makefile"))
    key = cache.key(
        tree.name,
        *([] if patch is None else patch.key_parts()),
        *(item for each in further for item in (each.name, each)),
        headers.release,
        headers.package,
        headers.path / ".config",
        headers.path / "Module.symvers",
        _KBUILD,
        *_MAKE_VARIABLES,
    )
    return cache.entry("modules", key, lambda out: _build_into(out, tree, headers, patch, further))


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
        raise ToolMissingError(
            f"the kernel build needs {', '.join(missing)}", install(list(missing.values()))
        )


def _build_into(
    out: Path, tree: Path, headers: Headers, patch: Patch | None, further: list[Path]
) -> None:
    # In `out` where that will do, so that the cache removes it whatever happens to this process.
    with plain_directory(out) as place, _plain(headers) as build_directory:
        log = cache.log_path(f"kernel-build-{headers.release}")
        log.write_text("")
        work = place / "tree"
        shutil.copytree(tree, work)
        _patch(work, patch, further, log)
        _make(work, build_directory, headers.release, log)
        for module in MODULES:
            shutil.copy2(work / f"arch/x86/kvm/{module}.ko", out)
        shutil.copy2(log, out / "build.log")


@contextmanager
def _plain(headers: Headers) -> Iterator[Path]:
    """Give the build directory of `headers`, or a copy of it where that has a plain path."""
    top = headers.path.parent
    if top.parts[-2:] == ("usr", "src"):
        top = top.parents[1]  # links lead to /usr/lib
    with copy_in_plain_place(top, without="linux-source-*") as plain:
        yield plain / headers.path.relative_to(top)


def _patch(work: Path, patch: Patch | None, further: list[Path], log: Path) -> None:
    if patch is not None:
        apply(patch, work, log)
    apply_further(further, work, log)
    if further:
        _mark_as_test_build(work, further)


def _make(work: Path, build_directory: Path, release: str, log: Path) -> None:
    kvm = work / "arch/x86/kvm"
    (kvm / "Kbuild").write_text(_KBUILD)
    (work / "include/uapi").mkdir(parents=True, exist_ok=True)
    jobs = len(os.sched_getaffinity(0))
    command = ["make", "-C", str(build_directory), f"M={kvm}", f"kvm_tree={work}"]
    command += [*_MAKE_VARIABLES, f"-j{jobs}", "modules"]
    if kernel_make.run(command, work, log) != 0:
        raise ModuleBuildError(
            f"the KVM modules for {release} do not compile{_first_error(log)}", f"read {log}"
        )


def _mark_as_test_build(work: Path, patches: list[Path]) -> None:
    names = ", ".join(f"{patch.name} {cache.key(patch)[:8]}" for patch in patches)
    text = TEST_BUILD + re.sub(r"[^\w ,.+-]", "", names, flags=re.ASCII)
    for source in _MAIN_SOURCES:
        with (work / source).open("a") as file:
            file.write(f'\nMODULE_VERSION("{text}");\n')


def _first_error(log: Path) -> str:
    found = re.search(r"\b(?:fatal )?error: (.+)", log.read_text(errors="replace"))
    return f" ({found[1]})" if found else ""

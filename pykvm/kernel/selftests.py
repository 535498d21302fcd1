"""Build KVM's own selftests from the distribution's source of a kernel series.

They are `tools/testing/selftests/kvm` of the kernel, with its headers as it would install them.
They need no kernel tree when they run, only the C library that this machine links them with.
"""

import os
import subprocess
from pathlib import Path

from pykvm import cache
from pykvm.errors import PykvmError
from pykvm.kernel import make as kernel_make
from pykvm.kernel.packages import Source
from pykvm.kernel.plain_place import plain_directory
from pykvm.kernel.source_tree import UnpackError, fetch_again

__all__ = ["SelftestBuildError", "build", "programs"]

_SELFTESTS = "tools/testing/selftests"

# What `make headers` and the selftests read.
_UNPACKED = (
    "Kbuild",
    "Kconfig",
    "Makefile",
    "arch/x86/Makefile*",
    "arch/x86/entry/syscalls",
    "arch/x86/include",
    "arch/x86/tools",
    "include/asm-generic",
    "include/uapi",
    "scripts",
    "tools/arch/x86",
    "tools/build",
    "tools/include",
    "tools/lib/*.c",
    "tools/scripts",
    f"{_SELFTESTS}/*.h",
    f"{_SELFTESTS}/*.mk",
    f"{_SELFTESTS}/kselftest",
    f"{_SELFTESTS}/kvm",
    f"{_SELFTESTS}/rseq",
    "usr/include/Makefile",
    "usr/include/headers_check.pl",
)

# Slips of a stable series, each by its cure on the compiler's command line. 6.1.192: the stable
# updates brought dirty_log_test a macro that was called ASSERT_EQ before 6.7, and <asm/kvm.h> a
# macro of <linux/stddef.h>, which steal_time.c includes only afterwards.
_CURES = {"6.1": "-DTEST_ASSERT_EQ=ASSERT_EQ -include linux/stddef.h"}

# Prints the programs' names, which the Makefile gives as paths below $(OUTPUT).
_LIST = "pykvm-list: ; @printf '%s\\n' $(patsubst $(OUTPUT)/%,%,$(TEST_GEN_PROGS))"


class SelftestBuildError(PykvmError):
    """A selftest does not compile."""


def build(source: Source) -> Path:
    """Build the selftests of `source`; return their directory, which `programs` lists.

    Raises:
        UnpackError: see `pykvm.kernel.source_tree`.
        SelftestBuildError: one of them does not compile.
    """
    stat = source.tarball.stat()
    cures = _CURES.get(source.series, "")
    key = cache.key(source.package, stat.st_size, stat.st_mtime_ns, cures, Path(__file__))
    return cache.entry("kvm-selftests", key, lambda out: _build_into(out, source, cures))


def programs(selftests: Path) -> list[str]:
    """Return the names of the programs below `selftests`, `x86_64/cpuid_test`, sorted."""
    return sorted((selftests / "programs").read_text().split())


def _build_into(out: Path, source: Source, cures: str) -> None:
    log = cache.log_path(f"kvm-selftests-{source.series}")
    log.write_text("")
    # In `out` where that will do, so that the cache removes it whatever happens.
    with plain_directory(out) as tree:
        _build_in(tree, out, source, cures, log)


def _build_in(tree: Path, out: Path, source: Source, cures: str, log: Path) -> None:
    top = f"linux-source-{source.series}"
    command = ["tar", "--force-local", "-xJf", str(source.tarball), "-C", str(tree)]
    command += ["--strip-components=1", "--wildcards", *(f"{top}/{member}" for member in _UNPACKED)]
    if kernel_make.run(command, tree, log) != 0:
        raise UnpackError(
            f"cannot unpack the selftests from {source.tarball}, see {log}", fetch_again(source)
        )
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    tests = tree / _SELFTESTS / "kvm"
    make = ["make", "ARCH=x86_64", "CC=gcc"]
    flags = [f"KHDR_INCLUDES=-isystem {tree}/usr/include", f"EXTRA_CFLAGS={cures}"]
    if (
        kernel_make.run(["make", "ARCH=x86", jobs, "headers"], tree, log) != 0
        or kernel_make.run([*make, *flags, jobs, "all"], tests, log) != 0
    ):
        raise SelftestBuildError(
            f"KVM's selftests of Linux {source.series} do not compile", f"read {log}"
        )
    listed = subprocess.run(
        [*make, "-s", "--eval", _LIST, "pykvm-list"],
        cwd=tests,
        env=kernel_make.environment(),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if listed.returncode:
        raise SelftestBuildError(f"make does not list the selftests ({listed.stderr.strip()})")
    names = listed.stdout.split()
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        # Stripped, since what runs on the emulated host is read from an emulated disc.
        if kernel_make.run(["strip", "-o", str(out / name), str(tests / name)], out, log) != 0:
            raise SelftestBuildError(f"the selftest {name} was not built", f"read {log}")
    (out / "programs").write_text("".join(f"{name}\n" for name in names))

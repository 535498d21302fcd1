"""Builds of the modules with every part of the distribution missing or wrong.

Small copies of the packages' contents provoke the errors; test_distribution_source.py builds from
the packages themselves.
"""

import re
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from pykvm import cache
from pykvm.host import advice
from pykvm.kernel import build as kernel
from pykvm.kernel import packages as kernel_packages
from pykvm.kernel import patch as kernel_patch
from pykvm.kernel.source_tree import UnpackError
from tests.rigs import apt
from tests.rigs.odd_names import ODD_NAMES

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("own_cache")]

RELEASE = "6.1.0-99-made-amd64"


def _makefile(version: str) -> str:
    names = ("VERSION", "PATCHLEVEL", "SUBLEVEL")
    pairs = zip(names, version.split("."), strict=True)
    return "".join(f"{name} = {number}\n" for name, number in pairs)


# Makefile rules for the out-of-tree build. The first compiles nothing and fails as a compiler
# would. The second makes modules that show what went into them.
_FAILS = "modules:\n\t@echo 'x.c:1: error: no such thing' >&2; false\n"
_WORKS = (
    "modules:\n\tcat $(M)/x86.c $(kvm_tree)/virt/kvm/kvm_main.c > $(M)/kvm.ko\n"
    "\tcat $(M)/vmx/*.c > $(M)/kvm-intel.ko\n"
)


def _make_headers(
    src: Path, release: str = RELEASE, version: str = "6.1.7", rule: str = _FAILS
) -> Path:
    common = src / "common"
    common.mkdir(parents=True, exist_ok=True)
    (common / "Makefile").write_text(_makefile(version) + rule)
    path = src / f"linux-headers-{release}"
    path.mkdir()
    (path / ".config").write_text('CONFIG_CC_VERSION_TEXT="gcc (made up) 12"\n')
    (path / "Module.symvers").touch()
    (path / "Makefile").write_text("include ../common/Makefile\n")
    return path


def _make_source(src: Path, version: str = "6.1.7") -> None:
    files = {
        "Makefile": _makefile(version),
        "arch/x86/kvm/Makefile": "",
        "arch/x86/kvm/x86.c": "int one;\nint two;\nint three;\n",
        "arch/x86/kvm/vmx/vmx.c": "int vmx;\n",
        "virt/kvm/Makefile.kvm": "",
        "virt/kvm/kvm_main.c": "int main;\n",
        "include/linux/kvm_host.h": "",
        "include/linux/other.h": "int other;\n",
        "include/uapi/linux/kvm.h": "",
        "arch/x86/include/asm/kvm_host.h": "",
        "arch/x86/include/uapi/asm/kvm.h": "",
    }
    with tarfile.open(src / "linux-source-6.1.tar.xz", "w:xz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"linux-source-6.1/{name}")
            info.size = len(text)
            archive.addfile(info, BytesIO(text.encode()))


def _make_patch(patches: Path, was: str = "int two;") -> Path:
    patches.mkdir(exist_ok=True)
    patch = patches / "linux-6.1.patch"
    patch.write_text(
        "--- a/arch/x86/kvm/x86.c\n+++ b/arch/x86/kvm/x86.c\n"
        f"@@ -1,3 +1,3 @@\n int one;\n-{was}\n+int patched;\n int three;\n"
        "--- a/include/linux/other.h\n+++ b/include/linux/other.h\n"
        "@@ -1,1 +1,1 @@\n-int other;\n+int patched;\n"
    )
    own = patches / "files/arch/x86/kvm/vmx/own.c"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("int own;\n")
    return patch


def _kept_modules() -> list[str]:
    names = [path.name for path in (cache.root() / "modules").iterdir()]
    return [name for name in names if not name.endswith(".lock")]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Stand-in for `/usr/src` with headers and source that match."""
    _make_headers(tmp_path / "src")
    _make_source(tmp_path / "src")
    return tmp_path / "src"


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    _make_patch(tmp_path / "patches")
    return tmp_path / "patches"


def test_headers_are_described(src: Path) -> None:
    headers = kernel_packages.find_headers(RELEASE, src)
    assert (headers.version, headers.series, headers.compiler) == ("6.1.7", "6.1", "gcc")


def test_releases_are_sorted_by_number(tmp_path: Path) -> None:
    for release in ("6.1.0-9-amd64", "6.1.0-56-amd64", "6.1.0-10-amd64"):
        _make_headers(tmp_path, release)
    found = kernel_packages.installed_headers(tmp_path)
    assert found == ["6.1.0-9-amd64", "6.1.0-10-amd64", "6.1.0-56-amd64"]


def test_no_headers(
    src: Path, patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt.offer_packages(tmp_path, monkeypatch, ["linux-headers-6.1.0-1-known"])
    with pytest.raises(kernel_packages.HeadersMissingError) as caught:
        kernel.build("6.1.0-1-known", src=src, patches=patches)
    assert caught.value.problem == f"no headers for kernel 6.1.0-1-known in {src}"
    assert caught.value.next_step.endswith(" linux-headers-6.1.0-1-known")
    with pytest.raises(kernel_packages.HeadersMissingError) as caught:
        kernel.build("6.1.0-1-none", src=src, patches=patches)
    assert caught.value.next_step.endswith(f"pykvm kernel build --kernel {RELEASE}")
    assert "apt-get" not in caught.value.next_step


def test_no_patch_comes_before_what_would_be_installed_in_vain(
    src: Path, patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt.offer_packages(tmp_path, monkeypatch, ["linux-headers-6.18.44"])
    with pytest.raises(kernel_patch.PatchMissingError, match=r"for Linux 6\.18, only for: 6\.1:"):
        kernel.build("6.18.44", src=src, patches=patches)


@pytest.mark.parametrize(
    ("release", "package"),
    [
        ("6.1.0-56-cloud-amd64", "linux-headers-cloud-amd64"),
        ("6.1.0-56-amd64", "linux-headers-amd64"),
        ("6.12.117+deb12-cloud-amd64", "linux-headers-6.12-cloud-amd64"),
    ],
)
def test_package_with_the_newest_headers(
    release: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt.offer_packages(tmp_path, monkeypatch, [package, "linux-source-6.1"])
    _make_headers(tmp_path, release)
    headers = kernel_packages.find_headers(release, tmp_path)
    _make_source(tmp_path)
    source = kernel_packages.find_source("6.1", tmp_path)
    with pytest.raises(kernel_packages.VersionMismatchError, match=package):
        kernel_packages.require_match(headers, source, "6.1.6")


def test_no_source(
    src: Path, patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt.offer_packages(tmp_path, monkeypatch, ["linux-source-6.1"])
    (src / "linux-source-6.1.tar.xz").unlink()
    with pytest.raises(
        kernel_packages.KernelSourceMissingError, match=r"install .* linux-source-6\.1$"
    ):
        kernel.build(RELEASE, src=src, patches=patches)


def test_source_of_another_version(
    src: Path, patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt.offer_packages(tmp_path, monkeypatch, ["linux-source-6.1", "linux-headers-made-amd64"])
    _make_source(src, "6.1.6")
    with pytest.raises(kernel_packages.VersionMismatchError) as caught:
        kernel.build(RELEASE, src=src, patches=patches)
    assert "6.1.7" in caught.value.problem
    assert "6.1.6" in caught.value.problem
    assert " linux-source-6.1 linux-headers-made-amd64, and boot" in caught.value.next_step
    apt.offer_packages(tmp_path, monkeypatch, ["linux-source-6.1"])
    with pytest.raises(kernel_packages.VersionMismatchError) as caught:
        kernel.build(RELEASE, src=src, patches=patches)
    assert "apt-get" not in caught.value.next_step


def test_no_patch_for_the_series(src: Path, patches: Path) -> None:
    (patches / "linux-6.1.patch").rename(patches / "linux-5.10.patch")
    with pytest.raises(kernel_patch.PatchMissingError, match=r"only for: 5\.10: .*pykvm testbed"):
        kernel.build(RELEASE, src=src, patches=patches)


def test_patch_that_does_not_apply(src: Path, patches: Path) -> None:
    _make_patch(patches, was="int unknown;")
    with pytest.raises(kernel_patch.PatchConflictError) as caught:
        kernel.build(RELEASE, src=src, patches=patches)
    log = cache.log_path(f"kernel-build-{RELEASE}")
    assert str(log) in str(caught.value)
    assert "FAILED" in log.read_text()
    assert _kept_modules() == []


def test_patch_of_a_file_that_is_not_there(src: Path, patches: Path) -> None:
    patch = patches / "linux-6.1.patch"
    patch.write_text(patch.read_text().replace("linux/other.h", "linux/gone.h"))
    with pytest.raises(
        kernel_patch.PatchConflictError, match=r"\(it has no include/linux/gone\.h\)"
    ):
        kernel.build(RELEASE, src=src, patches=patches)


def test_a_file_of_our_own_that_the_source_has_too(src: Path, patches: Path) -> None:
    (patches / "files/arch/x86/kvm/x86.c").write_text("int ours;\n")
    with pytest.raises(kernel_patch.PatchConflictError, match=r"has a file arch/x86/kvm/x86\.c "):
        kernel.build(RELEASE, src=src, patches=patches)


def test_further_patch_of_a_file_that_is_not_there(
    src: Path, patches: Path, tmp_path: Path
) -> None:
    further = _further(tmp_path)
    further.write_text(further.read_text().replace("arch/x86/kvm/x86.c", "mm/gone.c"))
    with pytest.raises(kernel_patch.FurtherPatchError) as caught:
        kernel.build(RELEASE, src=src, patches=patches, also=[further])
    assert caught.value.problem == f"{further} changes mm/gone.c, which Linux 6.1 has not"


def test_broken_source_archive(src: Path, patches: Path) -> None:
    (src / "linux-source-6.1.tar.xz").write_bytes(b"not an archive")
    with pytest.raises(UnpackError, match="cannot unpack") as caught:
        kernel.build(RELEASE, src=src, patches=patches)
    assert caught.value.next_step == advice.install(["linux-source-6.1"], again=True)


def test_compile_error_names_the_log(src: Path, patches: Path) -> None:
    with pytest.raises(kernel.ModuleBuildError, match="no such thing") as caught:
        kernel.build(RELEASE, src=src, patches=patches)
    log = cache.log_path(f"kernel-build-{RELEASE}")
    assert str(caught.value).endswith(f"read {log}")
    assert "x.c:1: error" in log.read_text()
    # Neither a half-built entry nor its build tree remains.
    assert _kept_modules() == []


def test_files_that_only_the_patch_names_are_unpacked(src: Path, patches: Path) -> None:
    with pytest.raises(kernel.ModuleBuildError):
        kernel.build(RELEASE, src=src, patches=patches)
    log = cache.log_path(f"kernel-build-{RELEASE}").read_text()
    assert "patching file include/linux/other.h" in log


def _further(tmp_path: Path, was: str = "int patched;", name: str = "weaken.patch") -> Path:
    patch = tmp_path / name
    patch.write_text(
        "--- a/arch/x86/kvm/x86.c\n+++ b/arch/x86/kvm/x86.c\n"
        f"@@ -1,3 +1,3 @@\n int one;\n-{was}\n+int weak;\n int three;\n"
    )
    return patch


@pytest.fixture
def working(src: Path) -> Path:
    """Stand-in for `/usr/src` whose build works."""
    shutil.rmtree(src / f"linux-headers-{RELEASE}")
    _make_headers(src, rule=_WORKS)
    return src


@pytest.mark.parametrize("name", ODD_NAMES)
def test_places_with_any_name(
    name: str, src: Path, patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / name
    monkeypatch.setenv("PYKVM_CACHE", str(place / "cache"))
    own = place / "usr" / "src"
    own.mkdir(parents=True)
    _make_headers(own, rule=_WORKS)
    _make_source(own)
    shutil.copytree(patches, place / "patches")
    further = _further(place)
    built = kernel.build(RELEASE, src=own, patches=place / "patches", also=[further])
    assert built.is_relative_to(place)
    assert "int weak;" in (built / "kvm.ko").read_text()
    assert sorted(path.name for path in built.iterdir()) == [
        *("build.log", "kvm-intel.ko", "kvm.ko"),
    ]


def test_the_name_of_a_further_patch_is_plain_text_in_the_module(
    working: Path, patches: Path, tmp_path: Path
) -> None:
    further = _further(tmp_path, name='we"ak\\\n\u00e4.patch')
    built = kernel.build(RELEASE, src=working, patches=patches, also=[further])
    (line,) = re.findall("MODULE_VERSION.*", (built / "kvm.ko").read_text())
    assert re.fullmatch(r'MODULE_VERSION\("test build: weak\.patch [0-9a-f]{8}"\);', line)


def test_further_patches_make_a_test_build(working: Path, patches: Path, tmp_path: Path) -> None:
    usual = kernel.build(RELEASE, src=working, patches=patches)
    assert "patched" in (usual / "kvm.ko").read_text()
    assert "MODULE_VERSION" not in (usual / "kvm.ko").read_text()

    weak = kernel.build(RELEASE, src=working, patches=patches, also=[_further(tmp_path)])
    assert weak != usual
    assert "int one;\nint weak;\nint three;\n" in (weak / "kvm.ko").read_text()
    for module in kernel.MODULES:
        text = (weak / f"{module}.ko").read_text()
        assert re.search(r'MODULE_VERSION\("test build: weaken\.patch [0-9a-f]{8}"\);', text)


def test_further_patches_are_kept_by_content(working: Path, patches: Path, tmp_path: Path) -> None:
    one = kernel.build(RELEASE, src=working, patches=patches, also=[_further(tmp_path)])
    assert kernel.build(RELEASE, src=working, patches=patches, also=[_further(tmp_path)]) == one
    second = tmp_path / "weaker.patch"
    second.write_text(_further(tmp_path).read_text().replace("weak", "weaker"))
    assert kernel.build(RELEASE, src=working, patches=patches, also=[second]) != one


def test_files_of_our_own_are_built_and_decide_what_is_kept(working: Path, patches: Path) -> None:
    first = kernel.build(RELEASE, src=working, patches=patches)
    assert "int own;" in (first / "kvm-intel.ko").read_text()
    own = patches / "files/arch/x86/kvm/vmx/own.c"
    own.write_text("int changed;\n")
    second = kernel.build(RELEASE, src=working, patches=patches)
    assert "int changed;" in (second / "kvm-intel.ko").read_text()
    own.rename(own.with_name("renamed.c"))
    assert kernel.build(RELEASE, src=working, patches=patches) not in (first, second)
    unpatched = kernel.build(RELEASE, src=working, patches=patches, patched=False)
    assert "changed" not in (unpatched / "kvm-intel.ko").read_text()


def test_further_patches_may_change_files_of_our_own(
    working: Path, patches: Path, tmp_path: Path
) -> None:
    further = tmp_path / "weaken.patch"
    name = "arch/x86/kvm/vmx/own.c"
    further.write_text(f"--- a/{name}\n+++ b/{name}\n@@ -1,1 +1,1 @@\n-int own;\n+int weak;\n")
    built = kernel.build(RELEASE, src=working, patches=patches, also=[further])
    assert "int weak;" in (built / "kvm-intel.ko").read_text()


def test_further_patches_follow_each_other(working: Path, patches: Path, tmp_path: Path) -> None:
    first = _further(tmp_path, name="first.patch")
    second = _further(tmp_path, was="int weak;", name="second.patch")
    with pytest.raises(kernel_patch.FurtherPatchError, match=r"second\.patch does not apply"):
        kernel.build(RELEASE, src=working, patches=patches, also=[second, first])
    both = kernel.build(RELEASE, src=working, patches=patches, also=[first, second])
    assert "test build: first.patch " in (both / "kvm.ko").read_text()
    assert ", second.patch " in (both / "kvm.ko").read_text()


def test_further_patch_that_does_not_apply(working: Path, patches: Path, tmp_path: Path) -> None:
    wrong = _further(tmp_path, was="int unknown;")
    with pytest.raises(kernel_patch.FurtherPatchError) as caught:
        kernel.build(RELEASE, src=working, patches=patches, also=[wrong])
    message = str(caught.value)
    assert message.startswith(f"{wrong} does not apply on top of pykvm's patch ")
    assert "(arch/x86/kvm/x86.c: Hunk #1 FAILED at 1)" in message
    assert _kept_modules() == []


def test_further_patch_that_cannot_be_read(src: Path, patches: Path, tmp_path: Path) -> None:
    with pytest.raises(kernel_patch.FurtherPatchError, match=r"none\.patch \(No such file"):
        kernel.build(RELEASE, src=src, patches=patches, also=[tmp_path / "none.patch"])


@pytest.mark.parametrize("tool", ["make", "patch", "gcc"])
def test_missing_tool(
    tool: str, src: Path, patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in {"make", "tar", "xz", "patch", "gcc"} - {tool}:
        found = shutil.which(name)
        (tools / name).symlink_to(found or "/bin/true")
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(kernel.ToolMissingError, match=f"needs {tool}: install .* {tool}$"):
        kernel.build(RELEASE, src=src, patches=patches)

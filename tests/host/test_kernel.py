"""Building the modules: every way in which the distribution's parts can be missing or wrong.

The errors are provoked with small copies of what the packages install; the real build runs
against the packages themselves, and the emulated host loads its result.
"""

import os
import shutil
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from pykvm.host import cache, kernel, kernel_packages

pytestmark = pytest.mark.unit

RELEASE = "6.1.0-99-made-amd64"


def _makefile(version: str) -> str:
    names = ("VERSION", "PATCHLEVEL", "SUBLEVEL")
    pairs = zip(names, version.split("."), strict=True)
    return "".join(f"{name} = {number}\n" for name, number in pairs)


def _make_headers(src: Path, release: str = RELEASE, version: str = "6.1.7") -> Path:
    common = src / "common"
    common.mkdir(parents=True, exist_ok=True)
    # What the out-of-tree build calls; it compiles nothing and fails as a compiler would.
    (common / "Makefile").write_text(
        _makefile(version) + "modules:\n\t@echo 'x.c:1: error: no such thing' >&2; false\n"
    )
    path = src / f"linux-headers-{release}"
    path.mkdir()
    (path / ".config").write_text('CONFIG_CC_VERSION_TEXT="gcc (made up) 12"\n')
    (path / "Module.symvers").touch()
    (path / "Makefile").write_text(f"include {common}/Makefile\n")
    return path


def _make_source(src: Path, version: str = "6.1.7") -> None:
    files = {
        "Makefile": _makefile(version),
        "arch/x86/kvm/Makefile": "",
        "arch/x86/kvm/x86.c": "int one;\nint two;\nint three;\n",
        "virt/kvm/Makefile.kvm": "",
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
    return patch


def _kept_modules() -> list[str]:
    names = [path.name for path in (cache.root() / "modules").iterdir()]
    return [name for name in names if not name.endswith(".lock")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKVM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A stand-in for `/usr/src` with headers and source that match."""
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


def test_no_headers(src: Path, patches: Path) -> None:
    with pytest.raises(kernel_packages.HeadersMissing) as caught:
        kernel.build("6.1.0-1-none", src=src, patches=patches)
    message = str(caught.value)
    assert "apt-get install linux-headers-6.1.0-1-none" in message
    assert f"--kernel {RELEASE}" in message


def test_no_source(src: Path, patches: Path) -> None:
    (src / "linux-source-6.1.tar.xz").unlink()
    with pytest.raises(kernel_packages.SourceMissing, match=r"install .* linux-source-6\.1$"):
        kernel.build(RELEASE, src=src, patches=patches)


def test_source_of_another_version(src: Path, patches: Path) -> None:
    _make_source(src, "6.1.6")
    with pytest.raises(kernel_packages.VersionMismatch) as caught:
        kernel.build(RELEASE, src=src, patches=patches)
    message = str(caught.value)
    assert "6.1.7" in message
    assert "6.1.6" in message
    assert "apt-get install linux-source-6.1 linux-headers-made-amd64" in message


def test_no_patch_for_the_series(src: Path, patches: Path) -> None:
    (patches / "linux-6.1.patch").rename(patches / "linux-5.10.patch")
    with pytest.raises(kernel.PatchMissing, match=r"only for: 5\.10; .*pykvm testbed"):
        kernel.build(RELEASE, src=src, patches=patches)


def test_patch_that_does_not_apply(src: Path, patches: Path) -> None:
    _make_patch(patches, was="int unknown;")
    with pytest.raises(kernel.PatchFailed) as caught:
        kernel.build(RELEASE, src=src, patches=patches)
    log = cache.log_path(f"kernel-build-{RELEASE}")
    assert str(log) in str(caught.value)
    assert "FAILED" in log.read_text()
    assert _kept_modules() == []


def test_patch_of_a_file_that_is_not_there(src: Path, patches: Path) -> None:
    patch = patches / "linux-6.1.patch"
    patch.write_text(patch.read_text().replace("linux/other.h", "linux/gone.h"))
    with pytest.raises(kernel.PatchFailed, match=r"does not apply .*kernel-unpack\.log"):
        kernel.build(RELEASE, src=src, patches=patches)


def test_broken_source_archive(src: Path, patches: Path) -> None:
    (src / "linux-source-6.1.tar.xz").write_bytes(b"not an archive")
    with pytest.raises(kernel.CompileFailed, match=r"cannot unpack .*--reinstall"):
        kernel.build(RELEASE, src=src, patches=patches)


def test_compile_error_names_the_log(src: Path, patches: Path) -> None:
    with pytest.raises(kernel.CompileFailed, match="no such thing") as caught:
        kernel.build(RELEASE, src=src, patches=patches)
    log = cache.log_path(f"kernel-build-{RELEASE}")
    assert str(caught.value).endswith(f"read {log}")
    assert "x.c:1: error" in log.read_text()
    # Neither a half-built entry nor the tree it was built in stays.
    assert _kept_modules() == []


def test_files_that_only_the_patch_names_are_unpacked(src: Path, patches: Path) -> None:
    with pytest.raises(kernel.CompileFailed):
        kernel.build(RELEASE, src=src, patches=patches)
    log = cache.log_path(f"kernel-build-{RELEASE}").read_text()
    assert "patching file include/linux/other.h" in log


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
    with pytest.raises(kernel.ToolMissing, match=f"needs {tool}; .*install .* {tool}$"):
        kernel.build(RELEASE, src=src, patches=patches)


def _buildable() -> str:
    """A kernel whose real headers and source are installed here and match."""
    for release in reversed(kernel_packages.installed_headers()):
        headers = kernel_packages.find_headers(release)
        if headers.series == "6.1" and kernel_packages.find_source("6.1").package == (
            headers.package
        ):
            return release
    pytest.skip("no matching headers and source of Linux 6.1 are installed")


@pytest.mark.testbed  # its real needs: the packages that the emulated host is made of
def test_the_patched_modules_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYKVM_CACHE")  # a minute of work that the whole checkout shares
    monkeypatch.setenv("KCFLAGS", "-DNONSENSE=(")  # a user's environment must not leak in
    release = _buildable()
    directory = kernel.build(release)
    for name in kernel.MODULES:
        module = directory / f"{name}.ko"
        info = subprocess.run(
            ["/usr/sbin/modinfo", module], capture_output=True, text=True, check=True
        ).stdout
        assert f"vermagic:       {release} " in info
        assert "srcversion:" in info
        # No path of the machine it was built on.
        assert os.fsencode(cache.root()) not in module.read_bytes()
    assert kernel.build(release) == directory

"""The patch in its stored form, source files and hooks, and as one whole."""

import subprocess
from pathlib import Path

import pytest

from pykvm.kernel import patch as kernel_patch
from pykvm.kernel import series as kernel_series
from tests.rigs.trees import files

pytestmark = pytest.mark.unit

MESSAGE = "Subject: a patch\n\n"
HOOK = """\
diff --git a/kvm/hook.c b/kvm/hook.c
index 0835e4f..97a5d10 100644
--- a/kvm/hook.c
+++ b/kvm/hook.c
@@ -1 +1 @@
-int before;
+int after;
"""
# Git's patch for "int a;", an empty line and "int b;", including the blob's name.
ADDITION = """\
diff --git a/kvm/{name} b/kvm/{name}
new file mode 100644
index 0000000..7a0eb47
--- /dev/null
+++ b/kvm/{name}
@@ -0,0 +1,3 @@
+int a;
+
+int b;
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a made-up `kernel-patches`."""
    top = tmp_path / "kernel-patches"
    (top / "files/kvm").mkdir(parents=True)
    (top / "linux-6.1.patch").write_text(MESSAGE + HOOK)
    for name in ("first.c", "own.c"):
        (top / "files/kvm" / name).write_text("int a;\n\nint b;\n")
    return top


def test_the_whole_is_in_the_order_and_form_of_git(directory: Path, tmp_path: Path) -> None:
    whole = kernel_patch.complete(kernel_patch.find_patch("6.1", directory))
    parts = [ADDITION.format(name="first.c"), HOOK, ADDITION.format(name="own.c")]
    assert whole == MESSAGE + "".join(parts)

    by_git, by_us = tmp_path / "git", tmp_path / "us"
    for place in (by_git, by_us):
        (place / "kvm").mkdir(parents=True)
        (place / "kvm/hook.c").write_text("int before;\n")
    command = ["git", "apply", "-"]
    subprocess.run(command, cwd=by_git, input=whole, text=True, check=True)
    patch = kernel_patch.find_patch("6.1", directory)
    kernel_patch.apply(patch, by_us, tmp_path / "log")
    assert files(by_us) == files(by_git)


def test_nothing_is_left_beside_files_whose_lines_have_moved(
    directory: Path, tmp_path: Path
) -> None:
    """A newer source of the same series: patch(1) finds the place, and keeps no original."""
    hook = HOOK.replace("@@ -1 +1 @@\n", "@@ -1,3 +1,3 @@\n int first;\n") + " int last;\n"
    (directory / "linux-6.1.patch").write_text(MESSAGE + hook)
    tree = tmp_path / "tree"
    (tree / "kvm").mkdir(parents=True)
    (tree / "kvm/hook.c").write_text("int new;\nint first;\nint before;\nint last;\n")
    kernel_patch.apply(kernel_patch.find_patch("6.1", directory), tree, tmp_path / "log")
    assert "offset 1 line" in (tmp_path / "log").read_text()
    assert sorted(path.name for path in (tree / "kvm").iterdir()) == ["first.c", "hook.c", "own.c"]


@pytest.mark.parametrize("series", kernel_series.SERIES)
def test_no_series_has_a_copy_of_a_new_file(series: str) -> None:
    patch = kernel_patch.find_patch(series)
    assert "/dev/null" not in patch.hooks.read_text()
    assert "include/uapi/linux/kvm_elisa.h" in patch.files
    assert "arch/x86/kvm/vmx/elisa.c" in patch.files

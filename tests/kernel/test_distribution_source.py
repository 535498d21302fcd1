"""The distribution's own source and headers: the patch applies to them, and the modules build.

The emulated host is made of them: hence the tier.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pykvm import cache
from pykvm.kernel import build as kernel
from pykvm.kernel import packages as kernel_packages
from pykvm.kernel import patch as kernel_patch
from pykvm.kernel import series as kernel_series
from pykvm.kernel.source_tree import unpack
from tests.rigs.trees import files

pytestmark = [
    pytest.mark.testbed,
    pytest.mark.parametrize("series", kernel_series.offered_series()),
]


def test_the_whole_patch_gives_the_tree_that_is_built(series: str, tmp_path: Path) -> None:
    patch = kernel_patch.find_patch(series)
    packages = kernel_series.packages_directory(kernel_series.newest_kernel(series))
    original = unpack(kernel_packages.find_source(series, packages), patch)
    by_git, by_us = tmp_path / "git", tmp_path / "us"
    for place in (by_git, by_us):
        shutil.copytree(original, place)
    whole = kernel_patch.complete(patch)
    subprocess.run(["git", "apply", "-"], cwd=by_git, input=whole, text=True, check=True)
    kernel_patch.apply(patch, by_us, tmp_path / "log")
    assert files(by_us) == files(by_git)
    assert set(files(by_us)) - set(files(original)) == set(patch.files)


def test_the_patched_modules_build(series: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCFLAGS", "-DNONSENSE=(")  # a user's environment must not leak in
    release = kernel_series.newest_kernel(series).release
    directory = kernel.build(release)
    for name in kernel.MODULES:
        module = directory / f"{name}.ko"
        info = subprocess.run(
            ["/usr/sbin/modinfo", module], capture_output=True, text=True, check=True
        ).stdout
        assert re.search(rf"vermagic: +{re.escape(release)} ", info)
        assert "srcversion:" in info
        # No path of the build machine.
        assert os.fsencode(cache.root()) not in module.read_bytes()
    assert kernel.build(release) == directory

"""The patch and the extension are compiled against the same interface."""

from pathlib import Path

import pytest

import pykvm.kernel

pytestmark = pytest.mark.unit

PATCHES = Path(__file__).parents[2] / "kernel-patches"


def added_file(patch: str, name: str) -> str:
    """The content of a file that the patch creates."""
    _, _, rest = patch.partition(f"+++ b/{name}\n")
    assert rest, f"the patch does not add {name}"
    body = rest.split("\ndiff --git ")[0].splitlines()
    return "".join(line[1:] + "\n" for line in body if line.startswith("+"))


@pytest.mark.parametrize("patch", sorted(PATCHES.glob("linux-*.patch")), ids=lambda p: p.name)
def test_the_patch_adds_the_header_that_pykvm_is_compiled_with(patch: Path) -> None:
    ours = (Path(pykvm.kernel.__file__).parent / "kvm_elisa.h").read_text()
    assert added_file(patch.read_text(), "include/uapi/linux/kvm_elisa.h") == ours


def test_there_is_a_patch() -> None:
    assert list(PATCHES.glob("linux-*.patch"))

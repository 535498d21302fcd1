"""Weaknesses of a processor, from files such as kernels make."""

from pathlib import Path

import pytest

from pykvm import doctor
from pykvm.host.weaknesses import DIRECTORY, read_weaknesses

pytestmark = pytest.mark.unit


def _kernel_says(directory: Path, **states: str) -> Path:
    for name, state in states.items():
        (directory / name).write_text(f"{state}\n")
    return directory


def test_what_matters_is_found(tmp_path: Path) -> None:
    says = _kernel_says(
        tmp_path,
        l1tf="Mitigation: PTE Inversion; VMX: conditional cache flushes, SMT disabled",
        mds="Not affected",
        mmio_stale_data="Unknown: No mitigations",
        meltdown="Mitigation: PTI",  # no matter for contexts
    )
    found = read_weaknesses(says)
    assert found is not None
    assert [(weakness.name, weakness.kind) for weakness in found] == [
        ("l1tf", "l1tf"),
        ("mmio_stale_data", "buffers"),
    ]
    assert found[0].kernel.startswith("Mitigation: PTE Inversion")


def test_a_kernel_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_weaknesses(tmp_path / "absent") is None
    monkeypatch.setattr(doctor, "read_weaknesses", lambda: None)
    (check,) = doctor._weaknesses()
    assert (check.ok, check.found, check.needed) == (False, "unknown", False)


def test_the_doctor_says_what_is_done_and_what_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = _kernel_says(tmp_path, mds="Mitigation: Clear CPU buffers", retbleed="Not affected")
    monkeypatch.setattr(doctor, "read_weaknesses", lambda: read_weaknesses(says))
    (check,) = doctor._weaknesses()
    assert check.ok
    assert check.name == "weakness mds"
    assert check.found == (
        "Mitigation: Clear CPU buffers; in contexts: "
        "VERW before each return of an object, 1 instruction a call"
    )
    _kernel_says(tmp_path, mds="Not affected")
    (check,) = doctor._weaknesses()
    assert (check.ok, check.found) == (True, "none that matters here")


@pytest.mark.skipif(not DIRECTORY.is_dir(), reason="this kernel does not tell")
def test_this_machine() -> None:
    """Each report has the kernel's whole text, and none is of a processor "Not affected"."""
    for weakness in read_weaknesses() or []:
        assert (DIRECTORY / weakness.name).read_text().strip() == weakness.kernel
        assert weakness.kernel != "Not affected"

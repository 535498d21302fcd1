"""Processor models of a Bochs, asked of stand-ins and of the real one."""

from pathlib import Path

import pytest

from pykvm.host.debian_packages import PackageError
from pykvm.testbed import bochs_installation
from pykvm.testbed.bochs import CPUS, DEFAULT_CPU, Machine
from pykvm.testbed.bochs_installation import BochsMissingError, Installation

ANSWER = r"""#!/bin/sh
[ "$*" = "-q --help cpu" ] || exit 2
printf '00000000000i[      ] BXSHARE is set to %s\n' "$BXSHARE" >&2
printf 'Supported CPU models:\n\npentium\nNAMES\n\n00000000000i[SIM   ] quit_sim called\n' >&2
"""


def answering(directory: Path, *models: str) -> Installation:
    program = directory / "-".join(models)
    program.write_text(ANSWER.replace("NAMES", r"\n".join(models)))
    program.chmod(0o755)
    return Installation("1.0-1", (str(program),), directory, {"BXSHARE": str(directory)})


@pytest.mark.unit
def test_models_are_those_that_it_lists(tmp_path: Path) -> None:
    assert answering(tmp_path, "old", "new").models() == ["pentium", "old", "new"]


@pytest.mark.unit
def test_a_program_that_does_not_start_is_told(tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho no such library >&2; exit 127\n")
    program.chmod(0o755)
    with pytest.raises(BochsMissingError, match=r"broken does not start \(no such library\)"):
        Installation("1", (str(program),), tmp_path).models()


@pytest.mark.unit
def test_the_installed_one_is_taken_if_it_knows_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = answering(tmp_path, "skylake"), answering(tmp_path, "skylake", "newest")
    monkeypatch.setattr(bochs_installation, "installed", lambda: here)
    monkeypatch.setattr(bochs_installation, "newer", lambda: other)
    assert bochs_installation.knowing("skylake") is here
    assert bochs_installation.knowing("newest") is other
    with pytest.raises(BochsMissingError, match="no bochs emulates nobodys"):
        bochs_installation.knowing("nobodys")


@pytest.mark.unit
def test_without_an_installed_one_the_newer_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = answering(tmp_path, "skylake")
    monkeypatch.setattr(bochs_installation, "installed", lambda: None)
    monkeypatch.setattr(bochs_installation, "newer", lambda: other)
    assert bochs_installation.knowing("skylake") is other


@pytest.mark.unit
def test_one_that_needs_its_debugger_is_not_taken_for_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = answering(tmp_path, "skylake"), answering(tmp_path, "skylake", "newest")
    monkeypatch.setattr(bochs_installation, "installed", lambda: here)
    monkeypatch.setattr(bochs_installation, "newer", lambda: other)
    assert not here.runs_undebugged()
    assert bochs_installation.knowing("skylake", undebugged=True) is other


@pytest.mark.unit
def test_without_a_faster_one_the_installed_one_counts_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable() -> Installation:
        raise PackageError("cannot fetch bochs", "apt-get update")

    here = answering(tmp_path, DEFAULT_CPU)
    monkeypatch.setattr(bochs_installation, "installed", lambda: here)
    monkeypatch.setattr(bochs_installation, "newer", unreachable)
    assert Machine.with_cpu(DEFAULT_CPU, fast=True) == Machine(DEFAULT_CPU, here, exact=True)


@pytest.mark.testbed
def test_the_newer_one_starts_with_libraries_of_its_own() -> None:
    newer = bochs_installation.newer()
    assert "bochs=" in newer.version
    assert CPUS.keys() <= set(newer.models())
    assert newer.root is not None
    assert (newer.root / newer.share / "BIOS-bochs-latest").exists()
    assert (newer.root / newer.share / "VGABIOS-lgpl-latest").exists()

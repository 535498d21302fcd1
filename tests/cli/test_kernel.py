"""Output and refusals of `pykvm kernel`; tests/kernel covers its actions."""

import pytest

from pykvm.cli.main import main
from pykvm.kernel import modules
from pykvm.kernel.patch import complete, find_patch


@pytest.mark.unit
def test_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel", "status"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"KVM: {modules.status().state}\n")
    assert "\nin use by: " in output


@pytest.mark.unit
def test_build_without_headers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel", "build", "--kernel", "6.1.0-1-none"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pykvm: no headers for kernel 6.1.0-1-none ")
    assert "linux-headers-6.1.0-1-none" not in error  # apt has no such package
    assert error.count("\n") == 1


@pytest.mark.unit
def test_patch_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel", "patch", "--series", "6.12"]) == 0
    whole = capsys.readouterr().out
    assert whole == complete(find_patch("6.12"))
    assert "+++ b/arch/x86/kvm/vmx/elisa.c\n" in whole
    assert "+++ b/arch/x86/kvm/vmx/main.c\n" in whole


@pytest.mark.elisa
def test_load_says_what_is_loaded(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert main(["kernel", "load", "--modules", str(tmp_path)]) == 1
    assert "the directory that this prints: pykvm kernel build" in capsys.readouterr().err
    assert main(["kernel", "status"]) == 0
    output = capsys.readouterr().out
    assert "KVM: patched\nELISA interface: version 3\n" in output

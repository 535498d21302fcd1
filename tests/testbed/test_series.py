"""Every kernel series boots, loads the patched KVM, and reports its kernel."""

from pathlib import Path

import pytest

from pykvm.kernel.series import offered_series
from pykvm.testbed import Testbed

pytestmark = pytest.mark.testbed

_LOOK = (
    "import os, platform, sys\n"
    "from pykvm.kernel import modules\n"
    "from pykvm.kvm import Kvm\n"
    "with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0): pass\n"
    "found = modules.status()\n"
    "print(platform.release(), found.state, found.elisa > 0, bool(found.test_build))\n"
    "sys.exit(9)\n"
)


@pytest.mark.parametrize("series", offered_series())
def test_the_patched_kvm_of_a_series(series: str) -> None:
    testbed = Testbed(series=series)
    outcome = testbed.run(["python3", "-c", _LOOK], timeout=120)
    assert outcome.stderr == b""
    assert outcome.stdout.decode().split() == [testbed.kernel.release, "patched", "True", "False"]
    assert testbed.kernel.release.startswith(f"{series}.")
    assert outcome.status == 9


@pytest.mark.parametrize("series", offered_series())
def test_the_distributions_kvm_of_a_series(series: str) -> None:
    testbed = Testbed(series=series)
    outcome = testbed.run(["python3", "-c", _LOOK], kvm="stock", timeout=120)
    assert outcome.stderr == b""
    assert outcome.stdout.decode().split() == [testbed.kernel.release, "stock", "False", "False"]
    assert outcome.status == 9


def test_a_test_build_says_so(tmp_path: Path) -> None:
    series = offered_series()[-1]  # one build of a minute is enough
    further = tmp_path / "further.patch"
    # Changes lines that neither the series nor its patch touches.
    further.write_text(
        "--- /dev/null\n+++ b/virt/kvm/further.h\n@@ -0,0 +1 @@\n+/* for a test */\n"
    )
    outcome = Testbed(series=series).run(["python3", "-c", _LOOK], also=[further], timeout=120)
    assert outcome.stderr == b""
    assert outcome.stdout.decode().split()[1:] == ["test", "build", "True", "True"]

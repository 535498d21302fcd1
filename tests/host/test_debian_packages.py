"""Reading apt's answers."""

import pytest

from pykvm.host.debian_packages import Package

pytestmark = pytest.mark.unit


def test_spec_is_what_apt_understands() -> None:
    package = Package("gcc_4%3a12.2.0-3_amd64.deb", 5216)
    assert package.spec == "gcc=4:12.2.0-3"
    assert Package("libc6_2.36-9+deb12u14_amd64.deb", 1).spec == "libc6=2.36-9+deb12u14"

"""Builds a wheel: what goes into it, and its cffi extensions. See pyproject.toml too."""

import shutil

from setuptools import find_packages, setup
from setuptools.command.build import build

# Directories of the checkout that a wheel carries inside the package; see pykvm/resources.py.
DATA = {"pykvm.data.guest": "guest", "pykvm.data.kernel-patches": "kernel-patches"}


class CleanBuild(build):
    """Build into an empty directory: what an earlier build left would get into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    cmdclass={"build": CleanBuild},
    packages=[*find_packages(include=["pykvm", "pykvm.*"]), "pykvm.data", *DATA],
    package_dir=DATA,
    package_data={
        "pykvm": ["py.typed"],
        "pykvm.data": ["*.pcap", "README.md"],
        "pykvm.data.guest": ["**/*.[chS]", "**/*.ld"],
        "pykvm.data.kernel-patches": ["**/*"],
        "pykvm.testbed": ["*.S", "inside/*.sh"],
    },
    cffi_modules=[
        "pykvm/kvm/native/build_kvm.py:ffibuilder",
        "pykvm/devices/build_devices.py:ffibuilder",
        "pykvm/devices/virtio/build_virtio.py:ffibuilder",
        "pykvm/devices/virtio/build_vhost.py:ffibuilder",
        "pykvm/kernel/build_uapi.py:ffibuilder",
        "pykvm/network/build_tun.py:ffibuilder",
        "pykvm/sandbox/build_sandbox.py:ffibuilder",
        "pykvm/switch/build_native.py:ffibuilder",
    ],
    # cffi keeps to the stable ABI: one wheel for every Python that pyproject.toml allows.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

"""Builds the cffi extensions; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=[
        "pykvm/kvm/build_kvm.py:ffibuilder",
        "pykvm/kernel/build_uapi.py:ffibuilder",
        "pykvm/switch/build_native.py:ffibuilder",
    ]
)

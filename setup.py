"""Builds the two cffi extensions; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=[
        "pykvm/kvm/build_kvm.py:ffibuilder",
        "pykvm/switch/build_native.py:ffibuilder",
    ]
)

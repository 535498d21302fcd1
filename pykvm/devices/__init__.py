"""Devices of virtual machines, built on handlers of the run loop (`pykvm.kvm.handlers`)."""

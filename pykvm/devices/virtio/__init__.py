"""Virtio 1.x devices, the rings between them and their drivers, and their transport over PCI.

A device (`pykvm.devices.virtio.device.VirtioDevice`) has a type, features, a configuration and
rings. Its data plane is started when its driver is ready, and is never Python: a thread in C, a
kernel's vhost device, or a vhost-user process.

Source: OASIS, Virtual I/O Device (VIRTIO) version 1.2.
"""

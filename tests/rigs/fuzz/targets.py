"""All targets, by name."""

from typing import Final

from tests.rigs.fuzz.native import NativeTarget
from tests.rigs.fuzz.scripted import ScriptedTarget
from tests.rigs.fuzz.target import Target
from tests.rigs.switch.fuzz.fuzzer import SwitchTarget

__all__ = ["TARGETS"]

# A long sequence takes its time in Python and reaches no more.
_SEQUENCES: Final = ["-max_len=600"]

_ALL: Final[list[Target]] = [
    SwitchTarget(),
    NativeTarget(
        "virtqueue",
        ["devices/virtio/chain.c", "devices/virtio/queue.c"],
        beside=["virtio_guest/guest.c"],
        guide=["-fsanitize-coverage=trace-loads,trace-stores"],
    ),
    NativeTarget(
        "block",
        ["devices/virtio/block_request.c"],
        beside=["devices/virtio/chain.c", "virtio_guest/guest.c"],
        guide=[
            *(f"-D{one}=fake_{one}" for one in ("preadv2", "pwritev2", "pwrite", "fallocate")),
            *("-Dfdatasync=fake_fdatasync", "-Dvirtio_chain_read=changing_chain_read"),
        ],
    ),
    NativeTarget(
        "console",
        [f"devices/virtio/console{part}.c" for part in ("", "_control", "_output")],
        beside=[
            *(f"devices/virtio/{name}.c" for name in ("chain", "queue", "loop")),
            "virtio_guest/guest.c",
        ],
        guide=[
            *(f"-D{one}=fake_{one}" for one in ("readv", "writev", "poll", "fcntl", "close")),
            *("-Dvirtio_loop_watch=fake_watch", "-Dvirtio_loop_again=fake_again"),
            "-Dvirtio_chain_read=changing_chain_read",
        ],
    ),
    NativeTarget(
        "net",
        ["devices/virtio/net.c", "devices/virtio/net_receive.c"],
        beside=[
            *(f"devices/virtio/{one}.c" for one in ("chain", "queue", "loop")),
            "virtio_guest/guest.c",
        ],
        guide=["-DNET_STREAM_BUFFER=70000"],  # one that fills
        link=["-pthread"],
    ),
    NativeTarget(
        "balloon",
        ["devices/virtio/balloon.c"],
        beside=[
            *(f"devices/virtio/{one}.c" for one in ("chain", "queue", "loop")),
            "virtio_guest/guest.c",
        ],
        guide=["-Dmadvise=fake_madvise"],
        link=["-pthread"],
    ),
    NativeTarget("serial", ["devices/serial.c"], include=["kvm/native"]),
    ScriptedTarget(
        "kernel-files",
        [
            "machine/linux/bzimage.py",
            "machine/linux/compression.py",
            "machine/linux/elf_kernel.py",
            "machine/linux/kernel_file.py",
            "machine/linux/multiboot.py",
            "machine/linux/segments.py",
        ],
    ),
    ScriptedTarget(
        "pci",
        ["devices/pci/bus.py", "devices/pci/function.py", "devices/pci/ports.py"],
        options=_SEQUENCES,
    ),
    ScriptedTarget(
        "virtio-pci",
        ["devices/virtio/pci.py", "devices/virtio/pci_state.py", "devices/pci/msix.py"],
        options=_SEQUENCES,
    ),
    ScriptedTarget(
        "device-state",
        [
            "devices/pci/function.py",
            "devices/pci/msix.py",
            "devices/serial.py",
            "devices/virtio/pci.py",
            "devices/virtio/pci_state.py",
            "machine/linux/system_ports.py",
        ],
    ),
    ScriptedTarget(
        "configuration",
        [
            "machine/linux/config.py",
            "network/links.py",
            "network/mac_address.py",
            "network/specification.py",
        ],
    ),
    ScriptedTarget("control", ["control/server.py"]),
    ScriptedTarget(
        "vhost-user",
        [
            "devices/virtio/vhost_user_connection.py",
            "devices/virtio/vhost_user_messages.py",
            "devices/virtio/vhost_user_watch.py",
        ],
    ),
]

TARGETS: Final = {target.name: target for target in _ALL}

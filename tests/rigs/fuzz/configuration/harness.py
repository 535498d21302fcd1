"""An input is a machine's configuration in TOML, or an option of the command line.

It is refused in one line, or it is a machine that can be: a snapshot's copy of it is the same, its
files can be opened or not, and it is described.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pykvm.errors import PykvmError
from pykvm.machine.linux import layout
from pykvm.machine.linux.boot import KernelError, open_file
from pykvm.machine.linux.config import Disk, MachineConfig, MachineConfigError, Share, parse_size
from pykvm.network.specification import NetworkSpecification
from pykvm.sizes import PAGE_SIZE
from tests.rigs.messages import one_line

OPTIONS = (parse_size, Disk.parse, Share.parse, NetworkSpecification.parse)


def try_input(data: bytes) -> None:
    kind, rest = data[:1], data[1:]
    try:
        if kind and kind[0] < len(OPTIONS):
            given = OPTIONS[kind[0]](rest.decode(errors="surrogateescape"))
            if isinstance(given, NetworkSpecification):
                assert 1 <= given.queues <= 16
                assert given.mtu is None or 68 <= given.mtu <= 65535
                assert all(0 < one.host_port < 65536 for one in given.forwards)
        else:
            _check(_from_file(rest))
    except PykvmError as error:
        one_line(error)


def _from_file(text: bytes) -> MachineConfig:
    descriptor = os.memfd_create("toml", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, text)
        return MachineConfig.from_file(Path(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)


def _check(config: MachineConfig) -> None:
    assert 1 <= config.cpus <= layout.MAX_CPUS
    assert config.memory >= layout.MIN_MEMORY
    assert not config.memory % PAGE_SIZE
    try:
        copy = MachineConfig.from_values(json.loads(json.dumps(config.to_values())))
    except MachineConfigError as error:
        raise AssertionError(f"{config} cannot be read back") from error
    assert copy == config
    assert config.described()
    assert "\0" not in config.command_line + config.name
    for path in (config.kernel, *config.initrds):
        try:
            os.close(open_file(path))
        except KernelError as error:
            # Names of files may have line feeds.
            one_line(type(error)(error.problem.replace("\n", " "), error.next_step))

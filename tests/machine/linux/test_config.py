"""pykvm.machine.linux.config: what users write, on a command line, in TOML, and what is saved."""

from pathlib import Path

import pytest

from pykvm.errors import PykvmError
from pykvm.machine.linux.config import (
    Disk,
    MachineConfig,
    MachineConfigError,
    Share,
    parse_size,
)
from pykvm.sizes import GIB, KIB, MIB
from tests.rigs.documents import blocks

pytestmark = pytest.mark.unit

WHOLE = """
kernel = "boot/vmlinuz"
unpack = false
initrd = ["a.cpio", "/b.cpio"]
append = "quiet"
memory = "1G"
cpus = 2
name = "lab"
disk = "image.raw"
net = ["user,tcp=8080:80", "none"]
share = ["data=/srv/data,rw", "etc=etc"]
"""


def test_a_file_with_everything(tmp_path: Path) -> None:
    (tmp_path / "vm.toml").write_text(WHOLE)
    config = MachineConfig.from_file(tmp_path / "vm.toml")
    assert config == MachineConfig(
        kernel=tmp_path / "boot/vmlinuz",
        unpack=False,
        command_line="quiet",
        initrds=(tmp_path / "a.cpio", Path("/b.cpio")),
        memory=GIB,
        cpus=2,
        name="lab",
        disks=(Disk(tmp_path / "image.raw"),),
        networks=("user,tcp=8080:80", "none"),
        shares=(Share("data", Path("/srv/data"), False), Share("etc", tmp_path / "etc")),
    )
    assert MachineConfig.from_values(config.to_values()) == config
    assert "net       user,tcp=8080:80" in config.described()


def test_a_number_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "vm.toml").write_text('kernel = "vmlinuz"\nmemory = 536870912\n')
    assert MachineConfig.from_file(tmp_path / "vm.toml").memory == 512 * MIB


def test_the_example_of_the_documents(tmp_path: Path) -> None:
    (example,) = [block for block in blocks() if block.language == "toml"]
    (tmp_path / "vm.toml").write_text(example.text)
    config = MachineConfig.from_file(tmp_path / "vm.toml")
    assert config.disks == (Disk(tmp_path / "image.raw"), Disk(tmp_path / "data.qcow2", True))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", 'names no kernel: write kernel = "vmlinuz"'),
        ("kernel = ", "vm.toml: Invalid value"),
        ('kernel = "x"\nkernel = "y"', "Cannot overwrite a value"),
        ('kernel = "x"\nvcpus = 2', "no key 'vcpus': use append, cpus, disk, initrd, kernel"),
        ('kernel = "x"\ncpus = "2"', "cpus has a value of another kind"),
        ('kernel = "x"\ncpus = true', "cpus has a value of another kind"),
        ('kernel = "x"\nunpack = 1', "unpack has a value of another kind"),
        ('kernel = "x"\ndisk = [1]', "disk has a value of another kind"),
        ('kernel = "x"\nmemory = "much"', "'much' is no size: write a size like 512M or 2G"),
        ('kernel = "x"\nmemory = 1.5', "memory has a value of another kind"),
        ('kernel = "x"\ncpus = 0', "0 processors: use 1 to 64"),
        ('kernel = "x"\ndisk = ",ro"', "is no disk: write --disk FILE"),
        ('kernel = "x"\nnet = "tapp"', "--net: 'tapp' is no kind of network"),
        ("kernel = 3", "kernel has a value of another kind"),
        ('[kernel]\npath = "x"', "kernel has a value of another kind"),
    ],
)
def test_files_that_mean_nothing(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "vm.toml").write_text(text)
    with pytest.raises(PykvmError) as caught:
        MachineConfig.from_file(tmp_path / "vm.toml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MachineConfigError, match="cannot be read: No such file"):
        MachineConfig.from_file(tmp_path / "none.toml")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    with pytest.raises(MachineConfigError, match="write it as TOML"):
        MachineConfig.from_file(tmp_path / "binary")


@pytest.mark.parametrize("text", ["image.raw", "image.raw,ro", "a,b.raw", "a,ro,b"])
def test_disks(text: str) -> None:
    assert str(Disk.parse(text)) == text
    assert Disk.parse("a,rw") == Disk(Path("a"))


@pytest.mark.parametrize("text", ["a=/b", "a=/b,rw", "a=b=c,d"])
def test_shares(text: str) -> None:
    assert str(Share.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "size"), [("64", 64 * MIB), ("1k", KIB), ("2G", 2 * GIB), ("3M", 3 * MIB)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_saved_configuration_of_another_kind() -> None:
    for values in ({}, {"kernel": 3}, {"kernel": "x", "wheels": 4}, {"kernel": "x", "cpus": "2"}):
        with pytest.raises(MachineConfigError, match="another kind of machine"):
            MachineConfig.from_values(values)

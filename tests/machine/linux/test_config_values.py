"""pykvm.machine.linux.config_values: a configuration survives JSON, and rubbish is refused."""

import json
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from pykvm.machine.linux.config import MachineConfig, MachineConfigError, Share
from pykvm.machine.linux.config_values import from_values, to_values
from tests.rigs.messages import one_line

pytestmark = pytest.mark.unit

CONFIG = MachineConfig(
    kernel=Path("/boot/vmlinuz"),
    unpack=False,
    command_line="quiet",
    initrds=(Path("/a"), Path("b/c")),
    memory=128 << 20,
    cpus=3,
    shares=(Share("home", Path("/home"), False), Share("usr", Path("/usr"))),
)


def test_there_and_back() -> None:
    """Each field of a machine, also one that somebody has added since."""
    default = MachineConfig(kernel=Path("/k"))
    same = [field.name for field in fields(CONFIG) if _of(CONFIG, field) == _of(default, field)]
    assert not same, "give the new fields values in CONFIG"
    for config in (CONFIG, default):
        values = json.loads(json.dumps(config.to_values()))
        assert MachineConfig.from_values(values) == config
    assert MachineConfig.from_values({"kernel": "/k"}) == default


def _of(config: MachineConfig, field: Any) -> Any:
    return getattr(config, field.name)


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": None},
        {"kernel": 5},
        {"kernel": "a\0b"},
        {"cpus": "3"},
        {"cpus": True},
        {"cpus": 1.5},
        {"cpus": 0},
        {"memory": -1},
        {"unpack": 1},
        {"initrds": "/a"},
        {"initrds": [None]},
        {"shares": [{"tag": "a"}]},
        {"shares": [{"tag": "a", "directory": "/", "more": 1}]},
        {"shares": {}},
        {"more": 1},
    ],
)
def test_no_machines(change: dict[str, Any]) -> None:
    with pytest.raises(MachineConfigError) as caught:
        MachineConfig.from_values({**CONFIG.to_values(), **change})
    one_line(caught.value)
    rubbish: list[object] = [None, [], "machine", {}]
    for values in rubbish:
        with pytest.raises(MachineConfigError):
            MachineConfig.from_values(values)


class Color(Enum):
    RED = "red"


@dataclass(frozen=True)
class Part:
    color: Color
    file: Path | None = None
    speed: float = 0.5


def test_other_types() -> None:
    for part in (Part(Color.RED), Part(Color.RED, Path("/a"), 2.5)):
        assert from_values(Part, json.loads(json.dumps(to_values(part)))) == part
    for wrong in ({"color": "blue"}, {"color": "red", "file": 1}, {"color": "red", "speed": None}):
        with pytest.raises(ValueError, match=r"blue|not of the type"):
            from_values(Part, wrong)

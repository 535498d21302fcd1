"""Charts are files that other programs can open, and show the content of the record."""

import builtins
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from pykvm.extras import ExtraMissingError
from pykvm.measure import charts

pytestmark = pytest.mark.unit

SVG = "{http://www.w3.org/2000/svg}"
FINGERPRINT = {"cpu": "A Processor <with> & signs"}


def record(host: str = "emulated", **content: Any) -> dict[str, Any]:
    unit = "instructions" if host == "emulated" else "ns"
    return {"host": host, "unit": unit, "fingerprint": FINGERPRINT, **content}


CROSSING = record(
    vmfunc={"cost": 36.0},
    vmcall_kernel={"cost": 1055.0},
    vmcall_user={"cost": 2939.0},
    direct={"cost": 3.0},
)
DEMO = record(
    "hardware",
    paths=[
        {"name": name, "cost_per_call": cost, "cost_per_packet": cost / 2}
        for name, cost in (("vmfunc", 130.5), ("vmcall", 1300.0), ("direct", 2.0))
    ],
)
SWITCH = record(
    points=[
        {"path": path, "guests": guests, "size": size, "burst": burst, "cost_per_packet": size / n}
        for n, path in enumerate(("vmfunc", "vmcall", "direct"), 1)
        for guests in (2, 4)
        for size in (64, 512, 1024, 1514)
        for burst in (1, 32)
    ]
)
INTERRUPTS = record(
    points=[
        {"way": way, "left": left, "median": 900 + (left if way == "object" else 0)}
        for way in ("default", "object")
        for left in (0, 1000, 100_000)
    ]
)
DRAWN = {
    "crossing": (charts.draw_crossing, CROSSING),
    "demo": (charts.draw_demo, DEMO),
    "switch": (charts.draw_switch, SWITCH),
    "interrupts": (charts.draw_interrupts, INTERRUPTS),
}


def check_png(data: bytes) -> tuple[int, int]:
    """Return width and height of a PNG with complete chunks (ISO/IEC 15948, 5.3 and 11.2.2)."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    kinds, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind = data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + body),)
        kinds.append(kind)
        at += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


@pytest.mark.parametrize("kind", DRAWN)
def test_files(tmp_path: Path, kind: str) -> None:
    draw, content = DRAWN[kind]
    stem = tmp_path / "charts" / kind
    assert draw(content, stem) == [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    root = ElementTree.parse(stem.with_suffix(".svg")).getroot()
    assert root.tag == f"{SVG}svg"
    assert len(list(root.iter(f"{SVG}path"))) > 10
    width, height = check_png(stem.with_suffix(".png").read_bytes())
    assert width > 500
    assert height > 200


@pytest.mark.parametrize("kind", DRAWN)
def test_the_same_record_gives_the_same_file(tmp_path: Path, kind: str) -> None:
    draw, content = DRAWN[kind]
    first, _ = draw(content, tmp_path / "first")
    second, _ = draw(content, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()


def texts(monkeypatch: pytest.MonkeyPatch, kind: str, stem: Path) -> str:
    """Return all text in the chart, which is stored as text and not as outlines."""
    mpl.rcParams["svg.fonttype"] = "none"
    draw, content = DRAWN[kind]
    svg = draw(content, stem)[0]
    return "\n".join(ElementTree.parse(svg).getroot().itertext())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("crossing", ["36", "1,055  (29.3x)", "2,939  (81.6x)", "VMFUNC", "instructions"]),
        ("crossing", ["Counted on the emulated host (A Processor <with> & signs)", "not time"]),
        ("demo", ["130", "1,300  (10.0x)", "ns", "Measured on A Processor"]),
        ("interrupts", ["taken at the return", "in the default context", "instructions"]),
        ("switch", ["64 bytes", "1514 bytes", "32", "2 guests", "instructions per packet"]),
    ],
)
def test_what_a_chart_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, says: list[str]
) -> None:
    text = texts(monkeypatch, kind, tmp_path / "chart")
    for one in says:
        assert one in text, text


def test_backend_that_does_not_exist_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import json, os, sys; from pathlib import Path; from pykvm.measure import charts\n"
        "charts.draw_crossing(json.load(sys.stdin), Path('chart'))\n"
        "print(os.environ['MPLBACKEND'])"
    )
    backend = "module://matplotlib_inline.backend_inline"  # set by notebooks
    monkeypatch.setenv("MPLBACKEND", backend)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        input=json.dumps(CROSSING),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{backend}\n"
    check_png((tmp_path / "chart.png").read_bytes())


def test_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(charts.ChartError, match=r"cannot write .*chart\.svg"):
        charts.draw_crossing(CROSSING, tmp_path / "file" / "chart")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name, name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ExtraMissingError, match=r"matplotlib is missing: type: .* 'matplotlib>="):
        charts.draw_crossing(CROSSING, tmp_path / "chart")
    assert not list(tmp_path.iterdir())

"""Charts drawn from records, as SVG and PNG. They need matplotlib, the extra `charts`.

Each function takes a record as `pykvm bench` or `pykvm demo` writes it, and the path of the files
without their suffix. It raises ChartError if a file cannot be written, and ExtraMissingError if
matplotlib is missing.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pykvm.errors import PykvmError
from pykvm.extras import ExtraMissingError
from pykvm.measure.records import extra_protections

__all__ = [
    "ChartError",
    "draw_crossing",
    "draw_demo",
    "draw_interrupts",
    "draw_linux_pair",
    "draw_protections",
    "draw_switch",
]

_COLOURS = {
    "vmfunc": "#1b7f5c",
    "direct": "#8a8f98",
    "vmcall": "#c8553d",
    "vmcall_kernel": "#dd9a7f",
    "vmcall_user": "#c8553d",
}
_OTHER = "#3a6ea5"

_LABELS = {
    "vmfunc": "VMFUNC (sub EPT context)",
    "direct": "direct (mapped, no isolation)",
    "vmcall": "VMCALL (host)",
    "vmcall_kernel": "VMCALL, answered in the kernel",
    "vmcall_user": "VMCALL, answered by the VMM",
}


class ChartError(PykvmError):
    """A chart that cannot be written."""


def _figure(width: float, height: float) -> Any:
    """Return an empty figure, independent of any display and of MPLBACKEND.

    Args:
        width: inches.
        height: inches.
    """
    # matplotlib does not load if the backend in MPLBACKEND is not installed, as a notebook's may
    # not be.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib as mpl  # noqa: PLC0415  (optional, and slow to import)
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ExtraMissingError("charts", str(error.name)) from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    mpl.rcParams.update(
        {
            "svg.hashsalt": "pykvm",  # the same record gives the same file
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "figure.constrained_layout.use": True,
        }
    )
    return Figure(figsize=(width, height))


def _save(figure: Any, stem: Path) -> list[Path]:
    written = []
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
        path = stem.with_suffix(suffix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Tight, because the line about the source is below the axes.
            figure.savefig(path, dpi=150, metadata=metadata, bbox_inches="tight")
        except OSError as error:
            raise ChartError(
                f"cannot write {path} ({error.strerror})",
                "name a file in a folder that you can write to with --json",
            ) from error
        written.append(path)
    return written


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], title: str, unit: str) -> None:
    """Draw horizontal bars with their values, and the ratio of each to the first."""
    axes.barh(
        [_LABELS.get(name, name) for name in names],
        values,
        color=[_COLOURS.get(name, _OTHER) for name in names],
        height=0.6,
    )
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.set_xlim(0, max(values) * 1.28)
    reference = values[0]
    for row, value in enumerate(values):
        ratio = f"  ({value / reference:.1f}x)" if row and reference > 0 else ""
        axes.text(value, row, f" {value:,.0f}{ratio}", va="center")


def _source(record: dict[str, Any]) -> str:
    machine = record["fingerprint"].get("cpu", "unknown processor")
    where = f"Measured on {machine}."
    if record["host"] == "emulated":
        where = f"Counted on the emulated host ({machine}): instructions, not time."
    crossing = record.get("crossing", record)
    if "for_weak_processors" not in crossing:
        return where
    return f"{where}\n({extra_protections(crossing)})"


def _caption(figure: Any, record: dict[str, Any]) -> None:
    figure.text(0.01, 0, _source(record), fontsize=7, color="#555555", verticalalignment="top")


def draw_demo(record: dict[str, Any], stem: Path) -> list[Path]:
    """Draw the demo's two costs for each path; return the files written (.svg and .png)."""
    names = [path["name"] for path in record["paths"]]
    unit = record["unit"]
    figure = _figure(7.2, 4.4)
    call, packet = figure.subplots(2, 1)
    _bars(call, names, [p["cost_per_call"] for p in record["paths"]], "One empty call", unit)
    _bars(
        packet,
        names,
        [p["cost_per_packet"] for p in record["paths"]],
        "One packet of the capture, sender's side",
        unit,
    )
    _caption(figure, record)
    return _save(figure, stem)


def draw_linux_pair(record: dict[str, Any], stem: Path) -> list[Path]:
    """Draw what each request between two Linux guests costs; return the files written."""
    kinds = record["kinds"]
    figure = _figure(7.2, 2.6)
    axes = figure.subplots()
    costs = [found["cost"] for found in kinds.values()]
    _bars(axes, list(kinds), costs, f"Two Linux guests, by {record['data_plane']}", record["unit"])
    _caption(figure, record)
    return _save(figure, stem)


def draw_crossing(record: dict[str, Any], stem: Path) -> list[Path]:
    """Draw the cost of one empty call by each path; return the files written."""
    names = ["vmfunc", "vmcall_kernel", "vmcall_user", "direct"]
    figure = _figure(7.2, 2.6)
    axes = figure.subplots()
    _bars(axes, names, [record[name]["cost"] for name in names], "One empty call", record["unit"])
    _caption(figure, record)
    return _save(figure, stem)


def draw_interrupts(record: dict[str, Any], stem: Path) -> list[Path]:
    """Draw interrupt latency against the work left at the deadline; return the files written."""
    figure = _figure(7.2, 3.4)
    axes = figure.subplots()
    for way, name, label in (
        ("object", "vmfunc", "inside an object: taken at the return"),
        ("default", "direct", "in the default context"),
    ):
        points = sorted((p["left"], p["median"]) for p in record["points"] if p["way"] == way)
        axes.plot(
            [left for left, _ in points],
            [median for _, median in points],
            marker="o",
            markersize=3,
            color=_COLOURS.get(name, _OTHER),
            label=label,
        )
    axes.set_xscale("symlog", linthresh=1000)
    axes.set_yscale("log")
    axes.set_title("Interrupt latency, median")
    axes.set_xlabel("ticks of work left when the interrupt comes")
    axes.set_ylabel(record["unit"])
    axes.legend(frameon=False)
    _caption(figure, record)
    return _save(figure, stem)


def draw_protections(record: dict[str, Any], stem: Path) -> list[Path]:
    """Draw the cost that each protection adds to one empty call; return the files written."""
    figure = _figure(7.2, 2.8)
    axes = figure.subplots()
    points = record["protections"]
    values = [point["cost"] for point in points]
    colours = ["#1b7f5c" if point["optional"] else "#8a8f98" for point in points]
    axes.barh([point["what"] for point in points], values, color=colours, height=0.6)
    axes.invert_yaxis()
    axes.set_title(
        f"Part of one empty call: {record['kernel']['cost']:.0f} {record['unit']} "
        f"from kernel mode, {record['user']['cost']:.0f} from user mode"
    )
    axes.set_xlabel(f"{record['unit']}; grey: an invariant, not an option")
    for row, value in enumerate(values):
        axes.text(value, row, f" {value:,.0f}", va="center")
    _caption(figure, record)
    return _save(figure, stem)


def draw_switch(record: dict[str, Any], stem: Path) -> list[Path]:
    """Draw cost per packet against burst length, in one panel for each packet size.

    The points with the fewest guests are drawn.

    Returns:
        The files written.
    """
    points = record["points"]
    sizes = sorted({point["size"] for point in points})
    bursts = sorted({point["burst"] for point in points})
    fewest = min(point["guests"] for point in points)
    columns = min(3, len(sizes))
    rows = -(-len(sizes) // columns)
    figure = _figure(3 * columns, 2.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel, size in zip(grid.flat, sizes, strict=False):
        for name in ("vmfunc", "vmcall", "direct"):
            line = sorted(
                (point["burst"], point["cost_per_packet"])
                for point in points
                if point["path"] == name and point["size"] == size and point["guests"] == fewest
            )
            if line:
                panel.plot(
                    [burst for burst, _ in line],
                    [cost for _, cost in line],
                    marker="o",
                    markersize=3,
                    color=_COLOURS.get(name, _OTHER),
                    label=_LABELS[name],
                )
        panel.set_xscale("log", base=2)
        panel.set_xticks(bursts, [str(burst) for burst in bursts])
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.set_title(f"{size} bytes")
    for panel in grid.flat[len(sizes) :]:
        panel.set_visible(False)
    figure.supxlabel(f"packets in a burst, {fewest} guests")
    figure.supylabel(f"{record['unit']} per packet")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    _caption(figure, record)
    return _save(figure, stem)

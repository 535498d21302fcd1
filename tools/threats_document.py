"""``python -m tools.threats_document``: write docs/threats.md from the table of threats."""

from pathlib import Path
from typing import Final

from tests.attacks.threats import THREATS, Threat

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "threats.md"

_HEAD: Final = """\
# Threats

<!-- Written by `python -m tools.threats_document` from tests/attacks/threats.py. -->

**Trusted:** the host kernel with the patch, the VMM processes, the code and the data of a shared
object. **Not trusted:** every guest, its kernel included: registers, control registers, page
tables, memory, all its vCPUs at once, and whatever it puts into a window. A guest may destroy
itself. It may not read or write anything of the host, of another guest or of a shared object
beyond what the object's code offers, nor stop the others from working.

For each row, a hostile guest tries the attack on the emulated Intel host, and a *control* shows the
same attack succeeding with the defence taken away: a build of the trusted pages without it, a
context built without the rule, or a kernel that looks away (`tests/attacks/weaken.patch`, on an
emulated host of its own). `make attacks` runs all of them and prints one line for each row. Rows
with an *open* part fall short: what it names has not been shown.

"""


def _names(tests: tuple[str, ...]) -> str:
    return ", ".join(f"`{test}`" for test in tests)


def _row(threat: Threat) -> str:
    lines = [f"## {threat.row}: {threat.tries}", "", f"- **Defence:** {threat.defence}."]
    if threat.attacks:
        lines.append(f"- **Tests:** {_names(threat.attacks)}")
    if threat.controls:
        lines.append(f"- **Controls:** {_names(threat.controls)}")
    for title, text in (
        ("No control", threat.no_control),
        ("Open", threat.open),
        ("Residual risk", threat.residual),
    ):
        if text:
            lines.append(f"- **{title}:** {text}.")
    return "\n".join(lines) + "\n"


def document() -> str:
    """Return the content of docs/threats.md."""
    return _HEAD + "\n".join(_row(threat) for threat in THREATS)


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document())

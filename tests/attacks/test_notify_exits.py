"""Exits inside an object that no guest can help, and that therefore stop none (T40).

No emulator has notify VM exits, so the list of such exits is read where the kernel has it.
"""

import re

import pytest

from pykvm.kernel import patch as kernel_patch
from pykvm.resources import KERNEL_PATCHES

pytestmark = pytest.mark.unit

LIST = "elisa_exit_is_harmless"
EXIT = "vmx_elisa_handle_exit"
SERIES = kernel_patch.patched_series()


def added(series: str) -> str:
    """Return the lines that the patch of a series adds to Linux."""
    whole = kernel_patch.complete(kernel_patch.find_patch(series))
    return "\n".join(re.findall(r"^\+(?!\+\+ )(.*)$", whole, re.MULTILINE))


def body(source: str, function: str) -> str:
    (found,) = re.findall(
        rf"^[a-z][^\n]*\b{function}\([^\n]*\)\n\{{\n(.*?)^\}}", source, re.M | re.S
    )
    assert isinstance(found, str)
    return found


def harmless(source: str) -> tuple[set[str], set[str]]:
    """Return the exit reasons that are harmless, and those that are under a condition."""
    switch = body(source, LIST)
    always, _, rest = switch.partition("return true;")
    sometimes, _, default = rest.partition("default:")
    assert re.fullmatch(r"\s*return false;\s*\}\s*", default), "everything else is not"
    assert switch.count("return true;") == 1
    cases = r"case EXIT_REASON_(\w+):"
    return set(re.findall(cases, always)), set(re.findall(cases, sometimes))


def documented() -> set[str]:
    text = (KERNEL_PATCHES / "README.md").read_text()
    section = text.partition("### Exits that are served outside\n")[2].partition("\n###")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_every_series() -> None:
    assert set(SERIES) == {"6.1", "6.12"}


@pytest.mark.attack("T40")
@pytest.mark.parametrize("series", SERIES)
def test_notify_exits_are_served(series: str) -> None:
    """They are on the list, and an exit on the list goes on to KVM's own handlers."""
    source = added(series)
    assert "NOTIFY" in harmless(source)[0]
    handler = body(source, EXIT)
    assert re.search(
        rf"if \(outside \? \({LIST}\(vcpu\) && !vmx->emulation_required\) :\s+"
        r"vmx->exit_reason\.basic != EXIT_REASON_VMFUNC\)\s+return false;\s+x = elisa_describe",
        handler,
    )
    # Before that, three conditions end an exit: no contexts, a failed entry, the return of a call.
    before = handler.partition(f"{LIST}(vcpu)")[0]
    assert len(re.findall(r"\breturn\b", before)) == 3
    assert "EXIT_REASON" not in before
    assert re.search(
        rf"if \(unlikely\(vmx->elisa\) && {EXIT}\(vcpu, &ret\)\)\s+return ret;", source
    )


@pytest.mark.attack("T40")
@pytest.mark.parametrize("series", SERIES)
def test_the_list_is_what_the_documentation_says(series: str) -> None:
    always, sometimes = harmless(added(series))
    assert sometimes == {"EXCEPTION_NMI"}
    assert always | sometimes == documented()


@pytest.mark.parametrize(
    "change",
    [
        ("\tcase EXIT_REASON_NOTIFY:\n", ""),
        ("\tcase EXIT_REASON_NOTIFY:\n", "\tcase EXIT_REASON_NOTIFY:\n\tcase EXIT_REASON_CPUID:\n"),
    ],
    ids=["one less", "one more"],
)
def test_another_list_is_told_apart(change: tuple[str, str]) -> None:
    source = added(SERIES[0])
    assert source.count(change[0]) == 1
    always, sometimes = harmless(source.replace(*change))
    assert always | sometimes != documented()

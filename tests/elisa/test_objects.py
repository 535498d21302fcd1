"""Shared objects as users declare them: refusals, and an object that the repository lacks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pykvm.elisa import GuestNumberError, ObjectSizeError, SharedObject
from pykvm.elisa.objects import ENV
from pykvm.elisa.protections import Protection
from pykvm.elisa.trusted_images import MissingEntryError, UndefinedSymbolError, build_object
from pykvm.errors import PykvmError
from pykvm.kvm import Kvm
from pykvm.machine.bare import layout
from pykvm.machine.bare.guest import BareGuest
from pykvm.resources import GUEST_SOURCES, PACKAGE
from pykvm.sizes import PAGE_SIZE
from pykvm.toolchain.compiler import CompileError, SourceMissingError
from tests.rigs.messages import one_line
from tests.rigs.probe import WILD, Probe, Step, What, calls, give, results, run

UNCHECKED = frozenset({Protection.CODE_CHECK})
COUNTER = GUEST_SOURCES / "objects" / "counter.c"
SHELF = PACKAGE.parent / "examples" / "shelf.c"

# A mailbox: a guest leaves a word for another guest, which finds it in its window.
MAILBOX = """
#include "elisa_object.h"
#include "elisa_memory.h"
#include "elisa_nospec.h"

struct mailbox { uint64_t letters; uint64_t last[16]; };

static const uint64_t SECRET = 0x5ec4e7;
static uint64_t calls;	/* in the image: one copy for all guests */

uint64_t elisa_serve(uint64_t to, uint64_t letter, uint64_t unused, const struct elisa_env *env)
{
	struct mailbox *mailbox = (struct mailbox *)env->shared;

	(void)unused;
	calls++;
	if (to >= env->guests)
		return ELISA_ERROR(ELISA_EINVAL);
	to = elisa_index_nospec(to, env->guests);
	mailbox->letters++;
	mailbox->last[env->id] = letter ^ SECRET;
	WRITE_ONCE(*(uint64_t *)(env->windows + to * env->window_size + 8 * env->id), letter);
	return calls << 32 | mailbox->letters;
}
"""


@pytest.mark.elisa
def test_an_object_of_a_users_own(tmp_path: Path) -> None:
    """An object takes about ten lines: declare, open, attach, call."""
    source = tmp_path / "mailbox.c"
    source.write_text(MAILBOX)
    mailbox = SharedObject("mailbox", source, shared=4096, window=4096, guests=3)
    with mailbox.open() as instance, Kvm() as kvm, BareGuest(kvm, Probe()) as guest:
        attachment = instance.attach(guest, 1)
        give(
            guest,
            calls(attachment.slot, 2, 42),
            calls(attachment.slot, 3, 43),
            calls(attachment.slot, 1, 44),
            Step(What.READ, layout.WINDOW_GPA + 8),
        )
        assert run(guest) == []
        refused = 2**64 - 22
        assert results(guest) == [1 << 32 | 1, refused, 3 << 32 | 2, 44]
        assert int.from_bytes(instance.window(2)[8:16], "little") == 42
        assert int.from_bytes(instance.shared[:8], "little") == 2
        assert int.from_bytes(instance.shared[16:24], "little") == 44 ^ 0x5EC4E7
        assert not any(instance.window(0))
        cost = attachment.cost
        assert cost.sub.mapped > cost.gate.mapped == 3
        attachment.detach()


@pytest.mark.elisa
def test_the_example_with_masked_indices() -> None:
    """docs/object-code.md shows it."""
    shelf = SharedObject("shelf", SHELF, shared=4096, window=0)
    with shelf.open() as instance, Kvm() as kvm, BareGuest(kvm, Probe()) as guest:
        slot = instance.attach(guest).slot
        put, look = 0, 1
        give(
            guest,
            calls(slot, put, 63, 42),
            calls(slot, look, 63, 0),
            calls(slot, look, 0, 0),
            calls(slot, look, 64, 0),
            calls(slot, 2, 0, 0),
        )
        assert run(guest) == []
        assert results(guest) == [0, 42, 0, 2**64 - 22, 2**64 - 22]


@pytest.mark.unit
def test_objects_of_these_tests_are_built() -> None:
    """Building fills the cache for the emulated host, which would take long to compile."""
    assert "elisa_serve" in build_object([SHELF]).symbols
    assert Probe().image().entry == layout.IMAGE_GPA
    assert "elisa_serve" in build_object([WILD], without=UNCHECKED).symbols


@pytest.mark.unit
def test_a_users_object_is_built(tmp_path: Path) -> None:
    source = tmp_path / "mailbox.c"
    source.write_text(MAILBOX)
    image = build_object([source])
    assert [part.writable for part in image.parts] == [False] * (len(image.parts) - 1) + [True]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("declare", "says"),
    [
        (lambda: SharedObject("x", COUNTER, guests=0), "0 guests for x: use 1 to 64"),
        (lambda: SharedObject("x", COUNTER, guests=65), "65 guests for x: use 1 to 64"),
        (lambda: SharedObject("x", COUNTER, vcpus=0), "0 vcpus of a guest for x: use 1 to 64"),
        (lambda: SharedObject("x", COUNTER, vcpus=65), "65 vcpus of a guest for x: use 1 to 64"),
        (lambda: SharedObject("x", COUNTER, shared=-1), "negative memory for x"),
        (lambda: SharedObject("x", COUNTER, window=-1), "negative memory for x"),
        (lambda: SharedObject("x", COUNTER, shared=0, window=0), "no memory for x: "),
        (
            lambda: SharedObject("x", COUNTER, shared=32 << 30),
            "32768 MiB for x: use at most 32 GiB",
        ),
        (lambda: SharedObject("x", COUNTER, window=1 << 30, guests=64), "65536 MiB for x: use"),
    ],
)
def test_sizes_that_cannot_be(declare: Callable[[], SharedObject], says: str) -> None:
    with pytest.raises(ObjectSizeError) as caught:
        declare()
    assert one_line(caught.value).startswith(says)
    assert isinstance(caught.value, PykvmError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("shared", "window", "guests", "pages"),
    [
        (0, 1, 1, (0, 1)),
        (1, 0, 1, (1, 1)),
        (1, 1, 2, (1, 3)),
        (4096, 4096, 64, (1, 65)),
        (4097, 4097, 3, (2, 8)),
        (5 << 20, 9000, 2, (1280, 1286)),
    ],
)
def test_geometry(shared: int, window: int, guests: int, pages: tuple[int, int]) -> None:
    """The memory has the expected size.

    Args:
        pages: pages of the shared memory, where the windows begin, and of everything.
    """
    offset, size = (PAGE_SIZE * count for count in pages)
    declared = SharedObject("x", COUNTER, shared=shared, window=window, guests=guests)
    assert (declared.windows_offset, declared.memory_size) == (offset, size)
    assert declared.window_size % PAGE_SIZE == 0
    base = 0x7000_0000
    environment = ENV.unpack(declared.env(base, guests - 1))
    memory = (base, offset, base + offset, declared.window_size)
    assert environment == (*memory, guests - 1, guests, 0, 1)


@pytest.mark.unit
def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match=r"nothing\.c"):
        SharedObject("x", tmp_path / "nothing.c").open()


@pytest.mark.unit
def test_source_that_does_not_compile(tmp_path: Path) -> None:
    source = tmp_path / "broken.c"
    source.write_text("int elisa_serve(\n")
    with pytest.raises(CompileError, match=r"broken\.c"):
        SharedObject("x", source).open()


@pytest.mark.unit
def test_source_without_an_entry(tmp_path: Path) -> None:
    source = tmp_path / "empty.c"
    source.write_text("int nothing;\n")
    with pytest.raises(MissingEntryError, match=r"empty\.c does not define elisa_serve"):
        SharedObject("x", source).open()


@pytest.mark.unit
def test_source_that_wants_a_library(tmp_path: Path) -> None:
    source = tmp_path / "talks.c"
    text = MAILBOX.replace("calls++;", 'calls += (uint64_t)puts("");')
    source.write_text("int puts(const char *);\n" + text)
    with pytest.raises(UndefinedSymbolError, match=r"talks\.c needs puts"):
        SharedObject("x", source).open()


@pytest.mark.unit
def test_several_sources(tmp_path: Path) -> None:
    helper = tmp_path / "helper.c"
    helper.write_text("#include <stdint.h>\nuint64_t help(void) { return 7; }\n")
    source = tmp_path / "object.c"
    source.write_text(
        "#include <stdint.h>\nuint64_t help(void);\n"
        + MAILBOX.replace("calls++;", "calls += help();")
    )
    with SharedObject("x", [str(source), helper]).open() as instance:
        assert {"help", "elisa_serve"} <= set(instance.symbols)


@pytest.mark.unit
def test_an_open_object_without_guests() -> None:
    """The host may use the memory; access to missing windows is refused by name."""
    with SharedObject("x", COUNTER, shared=10, window=10, guests=2).open() as instance:
        assert len(instance.shared) == len(instance.window(1)) == PAGE_SIZE
        instance.window(1)[0] = 3
        assert instance.memory.view(2 * PAGE_SIZE, 1)[0] == 3
        with instance.window_region(1, 5 << 30) as region:
            assert (region.gpa, region.size, region.view(0, 1)[0]) == (5 << 30, PAGE_SIZE, 3)
        with instance.direct_region(layout.DIRECT_GPA) as region:
            assert region.size == instance.declaration.memory_size
        for wrong in (-1, 2):
            for call in (instance.window, lambda n: instance.window_region(n, 5 << 30)):
                with pytest.raises(GuestNumberError) as caught:
                    call(wrong)
                assert f"x has no guest {wrong}: use 0 to 1" in one_line(caught.value)
    instance.close()  # harmless twice


@pytest.mark.unit
def test_an_object_without_windows() -> None:
    with SharedObject("x", COUNTER, window=0).open() as instance:
        assert len(instance.shared) == PAGE_SIZE
        for call in (instance.window, lambda n: instance.window_region(n, 5 << 30)):
            with pytest.raises(ObjectSizeError) as caught:
                call(0)
            assert one_line(caught.value) == "x has no windows: declare it with window=4096 or more"

"""Images that the toolchain builds from an object's sources, and sources that it refuses."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pykvm.elisa import crossing
from pykvm.elisa import trusted_images as toolchain
from pykvm.elisa.object_code import find_vmfunc
from pykvm.elisa.protections import FOR_WEAK_PROCESSORS, Protection
from pykvm.elisa.trusted_images import VMFUNC, SubImage, build_object
from pykvm.resources import GUEST_SOURCES
from pykvm.sizes import PAGE_SIZE
from pykvm.toolchain import compiler

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("own_cache")]

HEAD = '#include "elisa_object.h"\n'
SERVE = (
    "uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)\n"
    "{ (void)a0; (void)a1; (void)a2; (void)env; %s }\n"
)


def build(tmp_path: Path, text: str, name: str = "object.c") -> SubImage:
    source = tmp_path / name
    source.write_text(text)
    return build_object([source])


@pytest.mark.parametrize("name", ["objects/nop.c", "objects/counter.c", "switch/switch.c"])
def test_own_objects(name: str) -> None:
    image = build_object([GUEST_SOURCES / name])
    entry, text = image.parts[:2]
    assert (entry.offset, len(entry.data)) == (crossing.SUB_ENTRY_OFFSET, PAGE_SIZE)
    assert entry.data.endswith(VMFUNC)
    assert text.offset == crossing.IMAGE_OFFSET
    assert image.symbols["elisa_sub"] == crossing.SUB_ENTRY_OFFSET
    assert crossing.IMAGE_OFFSET <= image.symbols["elisa_serve"] < text.offset + len(text.data)
    for part in image.parts:
        assert not (part.writable and part.executable)
        assert part.offset % PAGE_SIZE == len(part.data) % PAGE_SIZE == 0
        assert part.data.count(VMFUNC) == (part is entry)


def instructions(code: bytes, file: Path) -> list[str]:
    """Return the mnemonics of straight-line code, without the int3 around it."""
    if not shutil.which("objdump"):
        pytest.skip("no objdump: apt-get install binutils")
    file.write_bytes(code)
    listing = subprocess.run(
        ["objdump", "-Dwz", "-b", "binary", "-m", "i386:x86-64", str(file)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.findall(r"^ +[0-9a-f]+:\t[0-9a-f ]+\t(\w+)", listing, re.MULTILINE)
    return [mnemonic for mnemonic in found if mnemonic != "int3"]


def test_a_crossing_to_nop_is_38_instructions(tmp_path: Path) -> None:
    """The count goes from the call to the ret, both included; 12 are the gate's (tests/guest)."""
    pages = toolchain.crossing_images()
    image = build_object([GUEST_SOURCES / "objects" / "nop.c"])
    serve = image.symbols["elisa_serve"] - crossing.IMAGE_OFFSET
    assert serve == 0
    entry = instructions(pages.entry_page, tmp_path / "entry")
    sub = instructions(image.parts[0].data, tmp_path / "sub")
    nop = instructions(image.parts[1].data, tmp_path / "nop")
    back = instructions(pages.return_page, tmp_path / "return")
    assert (entry, nop, back) == (["xor", "vmfunc"], ["xor", "ret"], ["mov", "ret"])
    assert sub[0] == "movq"  # first the transient slot
    assert sub.count("call") == 1
    assert sub.count("vmfunc") == 1
    assert 1 + len(entry) + 12 + len(sub) + len(nop) + len(back) == 38


def test_parts_have_pages_of_their_own(tmp_path: Path) -> None:
    image = build(
        tmp_path,
        HEAD
        + "static uint64_t zeroed[600]; uint64_t counter = 5; static const char text[] = "
        + '"read only";\n'
        + SERVE % "zeroed[a0 % 600]++; return counter++ + text[a1 % 9];",
    )
    assert [(part.writable, part.executable) for part in image.parts] == [
        (False, True),
        (False, True),
        (False, False),
        (True, False),
    ]
    assert b"read only" in image.parts[2].data
    data = image.parts[3]
    at = image.symbols["counter"] - data.offset
    assert data.data[at : at + 8] == (5).to_bytes(8, "little")
    assert len(data.data) == 2 * PAGE_SIZE
    assert [offset for offset, _ in data.pages()] == [data.offset, data.offset + PAGE_SIZE]


def test_bss_alone_shares_no_page_with_constants(tmp_path: Path) -> None:
    image = build(
        tmp_path,
        HEAD
        + 'static uint64_t zeroed; static const char text[] = "constant";\n'
        + SERVE % "zeroed += text[a0 % 8]; return zeroed;",
    )
    assert [(part.writable, part.executable) for part in image.parts[2:]] == [
        (False, False),
        (True, False),
    ]


def test_own_memory_functions(tmp_path: Path) -> None:
    image = build(
        tmp_path,
        HEAD
        + '#include "elisa_memory.h"\n'
        + SERVE % "__builtin_memcpy((void *)env->shared, (void *)env->windows, a0); return 0;",
    )
    assert "memcpy" in image.symbols


@pytest.mark.parametrize("name", ["objects/nop.c", "objects/counter.c", "switch/switch.c"])
def test_only_the_sub_entry_differs_for_callers_in_user_mode(name: str) -> None:
    kernel, user = (build_object([GUEST_SOURCES / name], user=user) for user in (False, True))
    assert kernel.parts[0].data != user.parts[0].data
    assert kernel.parts[1:] == user.parts[1:]


def test_what_the_two_sub_entries_do(tmp_path: Path) -> None:
    """One has STAC and CLAC around the call, the other clears AC with POPFQ before it.

    There is no other difference.
    """
    nop = GUEST_SOURCES / "objects" / "nop.c"
    kernel, user = (
        instructions(build_object([nop], user=user).parts[0].data, tmp_path / "sub")
        for user in (False, True)
    )
    start, end = ["movq", "mov", "lea"], ["mov", *["xor"] * 8, "vmfunc"]
    assert kernel == [*start, "stac", "lea", "jmp", "call", "pop", "clac", *end]
    assert user == [*start, "pushf", "andl", "popf", "lea", "jmp", "call", "pop", *end]


@pytest.mark.parametrize("user", [False, True])
def test_builds_for_weak_processors(tmp_path: Path, user: bool) -> None:
    """VERW is one instruction of the sub entry page; thunks are two for each return."""
    nop = GUEST_SOURCES / "objects" / "nop.c"

    def built(*extra: Protection) -> tuple[list[str], list[str]]:
        image = build_object([nop], user=user, extra=frozenset(extra))
        page, text = (image.parts[at].data for at in (0, 1))
        return instructions(page, tmp_path / "page"), instructions(text, tmp_path / "text")

    page, text = built()
    with_verw, same_text = built(Protection.BUFFER_CLEARING)
    same_page, with_thunk = built(Protection.RETURN_THUNKS)
    assert (same_page, same_text) == (page, text)
    assert with_verw.count("verw") == 1
    at = with_verw.index("verw")
    assert with_verw[at + 1 :] == page[-len(with_verw[at + 1 :]) :]
    assert with_verw[at + 1 :] == ["mov", *["xor"] * 8, "vmfunc"]
    assert text == ["xor", "ret"]
    assert with_thunk == ["xor", "call", "pause", "lfence", "jmp", "lea", "ret"]
    assert built(*FOR_WEAK_PROCESSORS) == (with_verw, with_thunk)


def test_protections_of_the_other_kind() -> None:
    nop = [GUEST_SOURCES / "objects" / "nop.c"]
    with pytest.raises(ValueError, match="BUFFER_CLEARING"):
        build_object(nop, without=frozenset({Protection.BUFFER_CLEARING}))
    with pytest.raises(ValueError, match="GATE_CHECK"):
        build_object(nop, extra=frozenset({Protection.GATE_CHECK}))


@pytest.mark.parametrize("protection", sorted(set(Protection) - set(FOR_WEAK_PROCESSORS), key=str))
def test_builds_without_a_protection(tmp_path: Path, protection: Protection) -> None:
    """Each build lacks some instructions and nothing else; the pages keep their form."""
    cost = {
        Protection.GATE_BARRIER: (1, 0, 0),
        Protection.GATE_CHECK: (5, 0, 0),  # three of them on the path, besides clearing and int3
        Protection.SLOT_CLEARING: (0, 1, 1),
        Protection.WINDOW_ACCESS: (0, 2, 0),
        Protection.FLAG_CLEARING: (0, 0, 3),
        Protection.REGISTER_CLEARING: (0, 6, 6),
        Protection.CODE_CHECK: (0, 0, 0),
    }[protection]
    nop = GUEST_SOURCES / "objects" / "nop.c"
    counts = []
    for without in (frozenset[Protection](), frozenset({protection})):
        pages = [toolchain.crossing_images(without).gate_page]
        pages += [build_object([nop], user=u, without=without).parts[0].data for u in (False, True)]
        assert all(page.endswith(VMFUNC) and page.count(VMFUNC) == 1 for page in pages)
        counts.append([len(instructions(page, tmp_path / "page")) for page in pages])
    whole, less = counts
    # The compare, its branch and the reload go with the clearing after the branch.
    assert [a - b for a, b in zip(whole, less, strict=True)] == [
        cost[0] - (protection is Protection.GATE_CHECK),
        *cost[1:],
    ]


ASM = SERVE % '__asm__ volatile("%s"); return 0;'
REFUSED = [
    *("wrmsr", "rdmsr", "mov %cr0, %rax", "mov %rax, %cr3", "mov %rax, %db7"),
    *("lgdt (%rdi)", "lidt (%rdi)", "lldt %ax", "ltr %ax", "sgdt (%rdi)", "invlpg (%rdi)"),
    *("in %dx, %al", "out %al, %dx", "hlt", "cli", "sti", "std", "pushf; popf", "iretq"),
    *("sysretq", "sysenter", "syscall", "int $0x80", "lretq", "ljmp *(%rdi)", "lcall *(%rdi)"),
    *("vmcall", "vmlaunch", "vmread %rax, %rbx", "vmxoff", "invept (%rdi), %rax"),
    *("stac", "clac", "swapgs", "wrfsbase %rax", "rdgsbase %rax", "mov %fs:0, %rax"),
    *("mov %gs:(%rdi), %rax", "mov %ax, %ds", "push %fs", "xsave (%rdi)", "ldmxcsr (%rdi)"),
    *("movaps %xmm0, %xmm1", "vzeroupper", "fninit", "emms", "cpuid", "rdtsc", "rdpmc"),
    *("rdrand %rax", "monitor", "mwait", "wrpkru", "xgetbv", "xbegin 1f; 1:", "enclu", "int1"),
    *(".byte 0x06", ".byte 0xd6", "senduipi %rax"),
]


@pytest.mark.attack("T14")
@pytest.mark.parametrize("text", REFUSED)
def test_instructions_that_have_no_business_in_an_object(tmp_path: Path, text: str) -> None:
    code = HEAD + ASM % text
    with pytest.raises(
        toolchain.ForbiddenInstructionError, match=r"elisa_serve of object\.c holds"
    ):
        build(tmp_path, code)
    source = tmp_path / "object.c"
    assert build_object([source], without=frozenset({Protection.CODE_CHECK}))  # control


@pytest.mark.attack("T23")
@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("jmp *%rax", toolchain.IndirectBranchError),
        ("call *%rax", toolchain.IndirectBranchError),
        ("call *(%rdi)", toolchain.IndirectBranchError),
        ("jmp . + 1", toolchain.StrayBranchError),
        ("jne elisa_sub", toolchain.StrayBranchError),
        ("call elisa_serve + 1", toolchain.StrayBranchError),
    ],
)
def test_branches_that_lead_elsewhere(tmp_path: Path, text: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"elisa_serve of object\.c holds"):
        build(tmp_path, HEAD + ASM % text)


def test_what_c_compiles_to_is_not_refused(tmp_path: Path) -> None:
    """Large switches compile to no jump table; atomics, divisions, string moves are plain code."""
    cases = "\n".join(f"case {n}: return a1 * {n * n + 1} + a2 % {n + 3};" for n in range(40))
    text = (
        HEAD
        + '#include "elisa_memory.h"\n'
        + "static __attribute__((noinline)) uint64_t deep(uint64_t n)"
        + "{ return n < 2 ? n : deep(n - 1) + deep(n - 2); }\n"
        + SERVE
        % (
            f"switch (a0) {{ {cases} }}\n"
            "uint64_t *word = (uint64_t *)env->shared, seen = 0;\n"
            "__atomic_fetch_or(word, a1, __ATOMIC_SEQ_CST);\n"
            "__atomic_compare_exchange_n(word, &seen, a2, 0, 5, 5);\n"
            "memcpy((void *)env->shared, (void *)env->windows, a2 & 63);\n"
            "return deep(a1 & 7) / (a2 | 1) + (uint64_t)((int64_t)a1 / 7) + __builtin_bswap64(a2)"
            " + (uint64_t)__builtin_ctzll(a1 | 1) + (a1 < a2)"
            " + (uint64_t)((unsigned __int128)a1 * a2 >> 64);"
        )
    )
    assert build(tmp_path, text).symbols["elisa_serve"] >= crossing.IMAGE_OFFSET


def test_vmfunc_bytes_are_found_across_every_boundary() -> None:
    a, b = b"\xcc" * (PAGE_SIZE - 1) + b"\x0f", b"\x01\xd4" + b"\xcc" * (PAGE_SIZE - 2)
    assert find_vmfunc([(0, a + b)]) == [PAGE_SIZE - 1]  # pages of one part
    assert find_vmfunc([(PAGE_SIZE, b), (0, a)]) == [PAGE_SIZE - 1]  # adjacent parts
    assert find_vmfunc([(0, a), (2 * PAGE_SIZE, b)]) == []  # parts that are not adjacent
    assert find_vmfunc([(0, VMFUNC * 2), (0x5000, b"\x0f" + VMFUNC)]) == [0, 3, 0x5001]


def test_the_sub_entry_page_is_nobody_elses(tmp_path: Path) -> None:
    text = '__attribute__((section(".elisa.sub"), noipa)) uint64_t f(void) { return 1; }\n'
    with pytest.raises(compiler.LinkError, match=r"\.elisa\.sub"):
        build(tmp_path, HEAD + text + SERVE % "return f();")


def test_a_vmfunc_split_by_a_page_boundary(tmp_path: Path) -> None:
    text = ASM % r".balign 4096\n .skip 4095, 0x90\n .byte 0x0f, 0x01, 0xd4"
    with pytest.raises(toolchain.ForeignVmfuncError, match=r"offset 0x1[0-9a-f]fff"):
        build(tmp_path, HEAD + text)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (SERVE % "return missing;", compiler.CompileError, "missing"),
        ("uint64_t nothing;\n", toolchain.MissingEntryError, "elisa_serve"),
        (
            "int puts(const char *);\n" + SERVE % 'return puts("x");',
            toolchain.UndefinedSymbolError,
            "puts",
        ),
        (
            'static const char *const names[] = {"a", "b"};\n'
            + SERVE % "return (uint64_t)*names[a0 & 1];",
            toolchain.AbsoluteAddressError,
            "absolute address",
        ),
        (
            '__asm__(".section .both, \\"awx\\"\\n nop\\n .text");\n' + SERVE % "return 0;",
            toolchain.WritableCodeError,
            ".both",
        ),
        (
            SERVE % '__asm__ volatile("vmfunc"); return 0;',
            toolchain.ForeignVmfuncError,
            "vmfunc",
        ),
        (
            # The bytes are inside an immediate: nothing looks like a vmfunc in the source.
            SERVE % "return a0 ^ 0x11d4010f22ull;",
            toolchain.ForeignVmfuncError,
            "vmfunc",
        ),
        (
            "static char huge[1 << 20];\n" + SERVE % "huge[a0 & 0xfffff] = 1; return huge[a1 & 7];",
            toolchain.ImageTooLargeError,
            "shared memory",
        ),
        (
            '__attribute__((section(".odd"))) int odd = 1;\n' + SERVE % "return (uint64_t)odd;",
            compiler.LinkError,
            ".odd",
        ),
    ],
    ids=["syntax", "entry", "undefined", "absolute", "w+x", "vmfunc", "hidden", "large", "orphan"],
)
def test_refused(tmp_path: Path, text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build(tmp_path, HEAD + text)
    with pytest.raises(error):  # nothing of it was cached
        build(tmp_path, HEAD + text)


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(compiler.SourceMissingError, match=r"nowhere\.c"):
        build_object([tmp_path / "nowhere.c"])


def test_cached_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second build runs no compiler, even if the sources have moved; an edit needs one."""
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        (directory / "amount.h").write_text("#define AMOUNT 3\n")
    text = HEAD + '#include "amount.h"\n' + SERVE % "return AMOUNT;"
    image = build(first, text)
    monkeypatch.setenv("PATH", os.devnull)
    assert build(second, text) == image
    (second / "amount.h").write_text("#define AMOUNT 4\n")
    with pytest.raises(compiler.CompilerMissingError, match="no gcc on this machine"):
        build(second, text)


def test_images_do_not_depend_on_the_directory(tmp_path: Path) -> None:
    text = HEAD + SERVE % "return (uint64_t)__FILE__[a0 % 4];"
    images = []
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        os.environ["PYKVM_CACHE"] = str(tmp_path / f"cache-{name}")  # monkeypatched above
        images.append(build(tmp_path / name, text))
    assert images[0] == images[1]

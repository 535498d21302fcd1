"""Files of kernel modules, by name, with what they need.

Source: modules.dep(5), modules.builtin of depmod(8).
"""

from collections.abc import Iterable
from pathlib import Path

from pykvm.errors import PykvmError

__all__ = ["ModuleFileError", "in_order"]


class ModuleFileError(PykvmError):
    """A kernel module that a kernel does not have."""


def in_order(modules: Path, names: Iterable[str]) -> list[Path]:
    """Return the files of modules and of all that they need, in the order to load them.

    What is built into the kernel is left out.

    Args:
        modules: a directory `lib/modules/VERSION` that depmod has been over.
        names: names of modules, with underscores.

    Raises:
        ModuleFileError: there is no such directory, or a name is neither a module nor built in.
    """
    needs: dict[str, list[str]] = {}
    try:
        listed = (modules / "modules.dep").read_text()
        built_in = {_name(p) for p in (modules / "modules.builtin").read_text().split()}
    except OSError as error:
        raise ModuleFileError(
            f"no modules of this kernel in {modules}: {error.strerror}",
            "install the package that the kernel is from",
        ) from error
    for line in listed.splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    by_name = {_name(path): path for path in needs}
    order: list[str] = []
    for name in names:
        if name in by_name:
            path = by_name[name]
            # depmod lists what a module needs from the nearest to the farthest.
            for each in [*reversed(needs[path]), path]:
                if each not in order:
                    order.append(each)
        elif name not in built_in:
            raise ModuleFileError(f"the kernel has no module {name}", "use a distribution's kernel")
    return [modules / path for path in order]


def _name(path: str) -> str:
    return Path(path).name.split(".")[0].replace("-", "_")

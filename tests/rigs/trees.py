"""Directory trees by content, to compare."""

from pathlib import Path


def files(directory: Path) -> dict[str, bytes]:
    """Return the content of every file below `directory`, by its path there."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}

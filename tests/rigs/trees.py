"""Contents of directory trees, for comparison."""

from pathlib import Path


def files(directory: Path) -> dict[str, bytes]:
    """Return the content of every file below `directory`, by its relative path."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}

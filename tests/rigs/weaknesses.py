"""What the administrator accepts of a processor's weaknesses, changed for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from pykvm.kernel import weaknesses
from pykvm.kernel.weaknesses import PARAMETER, Weak


@contextmanager
def accepting(accepted: Weak) -> Iterator[None]:
    """Accept these weaknesses and no others for the duration of the context."""
    usual = PARAMETER.read_text()
    PARAMETER.write_text(",".join(weaknesses.names_of(accepted)) + "\n")
    try:
        assert weaknesses.accepted() == accepted
        yield
    finally:
        PARAMETER.write_text(usual)

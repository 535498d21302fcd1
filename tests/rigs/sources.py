"""Sources that only tests run: guest programs and shared objects."""

from pathlib import Path
from typing import Final

GUESTS: Final = Path(__file__).with_name("guests")
OBJECTS: Final = Path(__file__).with_name("objects")

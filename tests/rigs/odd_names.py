"""File names that a file system accepts and that some tool below pykvm does not."""

from typing import Final

ODD_NAMES: Final = (
    "a b",
    "a'b",
    'a"b',
    "a:b",
    "a,b",
    "a=b",
    "a\nb",
    "a$(b)",
    "a#b",
    "a%b",
    "\u00e4",
    "a\udcffb",
)
"""One name for each character that is special to some tool; the last is not UTF-8."""

ODD_NAME: Final = "a b'\"c:d,e=f\n$(g)#%h\u00e4\udcff"
"""All those characters in one name."""

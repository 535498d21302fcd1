"""The root of every error that pykvm raises on purpose.

Each cause has a class of its own, next to the code that finds it. A message is one line, in
lower case, and says what to type next.
"""

__all__ = ["PykvmError"]


class PykvmError(Exception):
    """Something the user can act on; the command line prints it without a traceback."""

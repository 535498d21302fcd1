"""`python -m pykvm`, the same as the command `pykvm`."""

import sys

from pykvm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

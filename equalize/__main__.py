"""``python -m equalize`` is the ``equalize`` command."""

import sys

from equalize.cli import main

if __name__ == "__main__":
    sys.exit(main())

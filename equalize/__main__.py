"""``python -m equalize`` is the ``equalize`` command."""

from equalize.cli import main

if __name__ == "__main__":
    main()
